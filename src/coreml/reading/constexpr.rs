//! Compressed constants, `constexpr_*`: their two forms, the types they give, and their decoding.
//!
//! Up to specification version 8 the parameters are attributes; from 9 on they are inputs, each a value in place or
//! the name of an earlier constant. Both are decoded to [`Array`]s by definition, not by speed: one table look-up, one
//! multiplication an element.

use std::collections::{BTreeMap, HashMap};

use anyhow::{Context, Result, bail, ensure};

use super::blocks::{block_numbers, block_sizes, by_tables, inner_size, look_up, pick, table};
use super::constant::{Array, Blobs, Constant, Elements, unpack};
use super::program::{Argument, Operation, Program};
use super::types::{DataType, TensorType};
use DataType::*;

/// Weights that a byte of the package may stand for at most: palettes of 1 bit with vectors of 64. It bounds what a
/// small hostile package can make the reader allocate.
const WEIGHTS_PER_BYTE: u64 = 512;

/// How constants may follow from one another. coremltools makes chains of two.
pub const LONGEST_CHAIN: usize = 4;

/// A parameter of a compressed constant.
#[derive(Clone, Copy, Debug)]
pub enum Source<'a> {
    Stored(&'a Constant),
    Named(&'a str),
}

type Rule = (&'static str, &'static [DataType], bool);

const INDICES: &[DataType] = &[Uint1, Uint2, Uint3, Uint4, Uint6, Uint8];
const TABLE: &[DataType] = &[Int8, Uint8, Float16, Float32];
const QUANTIZED: &[DataType] = &[Int4, Uint4, Int8, Uint8, Float16, Float32];
const FLOATS: &[DataType] = &[Float16, Float32];

/// Parameters of an operation: name, types, whether it is optional. `None` where the form does not have it.
fn rules(operation: &str, attributes: bool) -> Option<&'static [Rule]> {
    Some(match (operation, attributes) {
        ("constexpr_lut_to_dense", true) => {
            &[("indices", &[Uint8], false), ("lut", TABLE, false), ("shape", &[Uint32], false)]
        }
        ("constexpr_lut_to_dense", false) => {
            &[("indices", INDICES, false), ("lut", TABLE, false), ("vector_axis", &[Int32], true)]
        }
        ("constexpr_affine_dequantize", true) => &[
            ("quantized_data", &[Uint8, Int8], false),
            ("zero_point", &[Uint8, Int8, Float32], false),
            ("scale", FLOATS, false),
            ("axis", &[Int32], false),
        ],
        ("constexpr_blockwise_shift_scale", false) => {
            &[("data", QUANTIZED, false), ("scale", FLOATS, false), ("offset", QUANTIZED, true)]
        }
        ("constexpr_sparse_to_dense", true) => {
            &[("nonzero_data", TABLE, false), ("mask", &[Uint8], false), ("shape", &[Uint32], false)]
        }
        ("constexpr_sparse_to_dense", false) => &[("nonzero_data", QUANTIZED, false), ("mask", &[Uint1], false)],
        ("constexpr_cast", _) => &[("source_val", &[Float16], false), ("output_dtype", &[String], false)],
        _ => return None,
    })
}

/// The constants of a program by name.
pub struct Constants<'a> {
    blobs: &'a Blobs,
    specification_version: i32,
    producers: HashMap<&'a str, &'a Operation>,
    /// Most elements of a decoded constant.
    limit: u64,
}

impl<'a> Constants<'a> {
    /// `package_bytes` is the length of all files together.
    pub fn new(program: &'a Program, blobs: &'a Blobs, specification_version: i32, package_bytes: u64) -> Self {
        let constants = program.operations.iter().filter(|operation| operation.is_const() || operation.is_constexpr());
        let mut producers = HashMap::new();
        for operation in constants {
            if let Some(output) = operation.outputs.first() {
                // The first of two of one name: so what is behind a constant lies before it, and chains end.
                producers.entry(output.name.as_str()).or_insert(operation);
            }
        }
        let limit = package_bytes.saturating_mul(WEIGHTS_PER_BYTE);
        Self { blobs, specification_version, producers, limit }
    }

    /// The operation that defines a constant.
    pub fn producer(&self, name: &str) -> Option<&'a Operation> {
        self.producers.get(name).copied()
    }

    pub fn kind_of(&self, source: Source<'a>) -> Result<&'a TensorType> {
        match source {
            Source::Stored(constant) => Ok(&constant.kind),
            Source::Named(name) => {
                let producer = self.producer(name).with_context(|| format!("{name} is not a constant"))?;
                Ok(&producer.outputs[0].kind)
            }
        }
    }

    fn array_of(&self, source: Source) -> Result<Array> {
        match source {
            Source::Stored(constant) => constant.decode(self.blobs),
            Source::Named(name) => self.array(name),
        }
    }

    /// The elements of a constant. Only for programs that have been checked: chains end, types are right.
    pub fn array(&self, name: &str) -> Result<Array> {
        let operation = self.producer(name).with_context(|| format!("{name} is not a constant"))?;
        if operation.is_const() {
            let value = operation.attributes.get("val").context("a const has no val")?;
            return value.decode(self.blobs).with_context(|| operation.place());
        }
        self.decode(operation).with_context(|| operation.place())
    }

    /// The parameters of a compressed constant, in the form that belongs to the specification version.
    pub fn parameters(&self, operation: &'a Operation) -> Result<BTreeMap<&'a str, Source<'a>>> {
        let attributes = self.specification_version < 9;
        ensure!(self.specification_version >= 7, "{} needs specification version 7", operation.kind);
        let rules = rules(&operation.kind, attributes).with_context(|| {
            format!("{} is not supported in specification version {}", operation.kind, self.specification_version)
        })?;
        if attributes {
            ensure!(operation.inputs.is_empty(), "before specification version 9 its parameters must be attributes");
        } else {
            ensure!(operation.attributes.is_empty(), "from specification version 9 on its parameters must be inputs");
        }
        let mut found: BTreeMap<&str, Source> =
            operation.attributes.iter().map(|(key, constant)| (key.as_str(), Source::Stored(constant))).collect();
        for (key, bound) in &operation.inputs {
            let source = match &bound[..] {
                [Argument::Name(name)] => Source::Named(name),
                [Argument::Value(constant)] => Source::Stored(constant),
                _ => bail!("parameter {key} must be one value"),
            };
            found.insert(key, source);
        }
        if let Some(key) = found.keys().find(|key| rules.iter().all(|rule| rule.0 != **key)) {
            bail!("unknown parameter {key}");
        }
        if let Some(rule) = rules.iter().find(|rule| !rule.2 && !found.contains_key(rule.0)) {
            bail!("parameter {} is missing", rule.0);
        }
        Ok(found)
    }

    /// The type of a compressed constant, from the types of its parameters and the small ones' values.
    pub fn infer(&self, operation: &'a Operation) -> Result<TensorType> {
        let parameters = self.parameters(operation)?;
        let attributes = self.specification_version < 9;
        for (name, types, _) in rules(&operation.kind, attributes).unwrap_or_default() {
            let Some(source) = parameters.get(name) else { continue };
            let kind = self.kind_of(*source)?;
            ensure!(types.contains(&kind.data_type), "parameter {name} is {kind}, allowed are {types:?}");
        }
        let kind = |name: &str| self.kind_of(parameters[name]);
        let shape = || -> Result<Vec<i64>> {
            let shape = kind("shape")?;
            ensure!(shape.rank() == 1 && shape.elements() <= 8, "shape is {shape}");
            self.array_of(parameters["shape"])?.ints().context("shape holds no integers")
        };
        let inferred = match operation.kind.as_str() {
            "constexpr_lut_to_dense" if attributes => {
                let (indices, lut) = (kind("indices")?, kind("lut")?);
                ensure!(
                    indices.rank() == 1 && lut.rank() == 1 && [2, 4, 16, 64, 256].contains(&lut.shape[0]),
                    "lut is {lut} and indices are {indices}; a lut has 2, 4, 16, 64 or 256 entries"
                );
                let dense = TensorType::new(lut.data_type, shape()?)?;
                let needed = (dense.elements() * u64::from(lut.shape[0].ilog2())).div_ceil(8);
                ensure!(indices.elements() == needed, "{dense} by {lut} needs {needed} bytes of indices: {indices}");
                dense
            }
            "constexpr_lut_to_dense" => {
                let (indices, lut) = (kind("indices")?, kind("lut")?);
                let axis = parameters.get("vector_axis").map(|source| self.scalar(*source)).transpose()?;
                let mut dense = indices.shape.clone();
                let (groups, entries, vector) = table(indices, lut)?;
                block_sizes(&indices.shape, groups)?;
                if vector > 1 {
                    let axis = axis.context("vector_axis is missing, the lut holds vectors")?;
                    let axis = indices.axis(axis)?;
                    dense[axis] = dense[axis].checked_mul(vector).context("too many elements")?;
                } else if let Some(axis) = axis {
                    indices.axis(axis)?;
                }
                ensure!(entries == 1 << indices.data_type.bits(), "a lut of {lut} does not fit indices of {indices}");
                TensorType::new(lut.data_type, dense)?
            }
            "constexpr_blockwise_shift_scale" => {
                let (data, scale) = (kind("data")?, kind("scale")?);
                ensure!(data.rank() == scale.rank() && data.rank() > 0, "data is {data}, scale is {scale}");
                block_sizes(&data.shape, &scale.shape)?;
                if let Some(offset) = parameters.get("offset") {
                    let offset = self.kind_of(*offset)?;
                    ensure!(
                        offset.shape == scale.shape
                            && (offset.data_type.is_float() || offset.data_type == data.data_type),
                        "offset is {offset}, scale is {scale}, data is {data}"
                    );
                }
                TensorType::new(scale.data_type, data.shape.clone())?
            }
            "constexpr_affine_dequantize" => {
                let (data, scale, zero) = (kind("quantized_data")?, kind("scale")?, kind("zero_point")?);
                let axis = data.axis(self.scalar(parameters["axis"])?)?;
                for vector in [scale, zero] {
                    ensure!(
                        vector.rank() == 0 || vector.shape == [data.shape[axis]],
                        "{vector} is neither a scalar nor a vector along axis {axis} of {data}"
                    );
                }
                ensure!(
                    zero.data_type == data.data_type || zero.data_type == Float32,
                    "zero_point {zero}, data {data}"
                );
                TensorType::new(scale.data_type, data.shape.clone())?
            }
            "constexpr_sparse_to_dense" => {
                let (values, mask) = (kind("nonzero_data")?, kind("mask")?);
                let dense = TensorType::new(values.data_type, if attributes { shape()? } else { mask.shape.clone() })?;
                let fits = !attributes || (mask.rank() == 1 && mask.elements() == dense.elements().div_ceil(8));
                ensure!(values.rank() == 1 && fits, "nonzero_data is {values}, mask is {mask}, result is {dense}");
                dense
            }
            _ => {
                let wanted = self.array_of(parameters["output_dtype"])?.elements;
                ensure!(wanted == Elements::Strings(vec!["fp32".into()]), "output_dtype must be fp32");
                TensorType::new(Float32, kind("source_val")?.shape.clone())?
            }
        };
        ensure!(inferred.elements() <= self.limit, "{inferred} is larger than its package can stand for");
        Ok(inferred)
    }

    fn scalar(&self, source: Source<'a>) -> Result<i64> {
        let kind = self.kind_of(source)?;
        ensure!(kind.rank() == 0, "{kind} must be a scalar");
        let ints = self.array_of(source)?.ints();
        ints.and_then(|ints| ints.first().copied()).context("a scalar is not an integer")
    }

    fn decode(&self, operation: &'a Operation) -> Result<Array> {
        let parameters = self.parameters(operation)?;
        let kind = self.infer(operation)?;
        let array = |name: &str| self.array_of(parameters[name]).context(format!("parameter {name}"));
        let finite = |name: &str| -> Result<Array> {
            let array = array(name)?;
            let infinite = matches!(&array.elements, Elements::Floats(list) if !list.iter().all(|v| v.is_finite()));
            ensure!(!infinite, "parameter {name} has infinite values");
            Ok(array)
        };
        let count = usize::try_from(kind.elements())?;
        let elements = match operation.kind.as_str() {
            "constexpr_lut_to_dense" => {
                let (indices, lut) = (array("indices")?, finite("lut")?);
                let Elements::Small(mut numbers) = indices.elements else { bail!("indices are {}", indices.kind) };
                if self.specification_version < 9 {
                    numbers = unpack(&numbers, lut.kind.shape[0].ilog2(), count);
                    look_up(&lut.elements, &numbers)?
                } else {
                    let axis = match parameters.get("vector_axis") {
                        Some(source) => indices.kind.axis(self.scalar(*source)?)?,
                        None => 0,
                    };
                    by_tables(&indices.kind, &numbers, &lut.kind, &lut.elements, axis)?
                }
            }
            "constexpr_blockwise_shift_scale" => {
                let (data, scale) = (array("data")?, finite("scale")?);
                let blocks = block_numbers(&data.kind.shape, &scale.kind.shape)?;
                let offset = match parameters.contains_key("offset") {
                    true => Some(finite("offset")?.into_floats()?),
                    false => None,
                };
                let scale = scale.into_floats()?;
                let mut floats = data.into_floats()?;
                for (at, value) in floats.iter_mut().enumerate() {
                    let block = blocks.as_ref().map_or(0, |blocks| blocks[at] as usize);
                    *value = (*value - offset.as_ref().map_or(0.0, |offset| offset[block])) * scale[block];
                }
                Elements::Floats(floats)
            }
            "constexpr_affine_dequantize" => {
                let (data, axis) = (array("quantized_data")?, self.scalar(parameters["axis"])?);
                let (scale, zero) = (finite("scale")?.into_floats()?, finite("zero_point")?.into_floats()?);
                let axis = data.kind.axis(axis)?;
                let (length, inner) = (data.kind.shape[axis] as usize, inner_size(&data.kind.shape, axis));
                let of = |list: &[f32], at: usize| list[if list.len() == 1 { 0 } else { at / inner % length }];
                let mut floats = data.into_floats()?;
                for (at, value) in floats.iter_mut().enumerate() {
                    *value = (*value - of(&zero, at)) * of(&scale, at);
                }
                Elements::Floats(floats)
            }
            "constexpr_sparse_to_dense" => {
                let (values, mask) = (finite("nonzero_data")?, array("mask")?);
                let Elements::Small(mut mask) = mask.elements else { bail!("mask is {}", mask.kind) };
                if self.specification_version < 9 {
                    mask = unpack(&mask, 1, count);
                }
                let set = mask.iter().filter(|&&bit| bit != 0).count() as u64;
                ensure!(set == values.kind.elements(), "{set} bits of the mask are set for {}", values.kind);
                let mut next = 0..;
                pick(&values.elements, mask.iter().map(|&bit| if bit == 0 { None } else { next.next() }))?
            }
            _ => array("source_val")?.elements,
        };
        let elements = match elements {
            // Products are computed in 32 bits; what is only looked up is FLOAT16 already.
            Elements::Floats(mut floats) if kind.data_type == Float16 && parameters.contains_key("scale") => {
                floats.iter_mut().for_each(|v| *v = half::f16::from_f32(*v).to_f32());
                ensure!(floats.iter().all(|v| v.is_finite()), "decoded values pass the range of FLOAT16");
                Elements::Floats(floats)
            }
            other => other,
        };
        Ok(Array { kind, elements })
    }
}

#[cfg(test)]
mod tests;
