//! What the weights of a package are and what they cost.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use anyhow::{Context, Result};
use tch::{Device, Kind, Tensor};

use super::constant::Constant;
use super::constexpr::{Constants, Source};
use super::package::Package;
use super::program::{Argument, Operation};
use super::types::DataType;

/// Inputs that count as weights of convolutions and linear layers.
const LAYERS: [(&str, &str); 5] =
    [("conv", "weight"), ("conv_transpose", "weight"), ("linear", "weight"), ("matmul", "x"), ("matmul", "y")];

/// A float constant with a shape that an operation computes with.
#[derive(Clone, Debug, PartialEq)]
pub struct WeightSummary {
    pub name: String,
    pub shape: Vec<i64>,
    /// Element type after decoding.
    pub data_type: DataType,
    pub elements: u64,
    /// Stored bytes: indices, tables, scales, masks or the plain values, without alignment and records.
    pub bytes: u64,
    /// `8 bytes / elements`
    pub bits_per_weight: f64,
    /// Whether a convolution, a linear layer or a matrix product uses it.
    pub layer: bool,
    /// How it is palettized, if it is.
    pub palettes: Option<Palettes>,
}

/// Palettes of one weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Palettes {
    /// Bits of an index.
    pub bits: u32,
    /// How many tables: 1, or one for each group of channels.
    pub groups: u64,
    /// Weights that an entry holds; 1 for scalar palettes.
    pub vector: u64,
}

impl Package {
    /// Every float constant of rank 1 or more that an operation computes with, by its name.
    ///
    /// # Errors
    /// None for a package that was opened; the walk over constants is checked again.
    pub fn weights(&self) -> Result<Vec<WeightSummary>> {
        let constants = self.constants();
        let mut uses: BTreeMap<&str, BTreeSet<(&str, &str)>> = BTreeMap::new();
        for operation in self.program.operations.iter().filter(|operation| !operation.is_constexpr()) {
            for (input, bound) in &operation.inputs {
                for argument in bound {
                    if let Argument::Name(name) = argument
                        && constants.producer(name).is_some()
                    {
                        uses.entry(name).or_default().insert((&operation.kind, input));
                    }
                }
            }
        }
        let mut weights = Vec::new();
        for (name, uses) in uses {
            let kind = self.checked.kinds.get(name).with_context(|| format!("{name} has no type"))?;
            if !kind.data_type.is_float() || kind.shape.is_empty() {
                continue;
            }
            let producer = constants.producer(name).with_context(|| format!("{name} is not a constant"))?;
            let bytes = stored_bytes(&constants, producer, &mut HashSet::new())?;
            weights.push(WeightSummary {
                name: name.to_string(),
                shape: kind.shape.clone(),
                data_type: kind.data_type,
                elements: kind.elements(),
                bytes,
                bits_per_weight: 8.0 * bytes as f64 / kind.elements() as f64,
                layer: LAYERS.iter().any(|layer| uses.contains(layer)),
                palettes: palettes(&constants, producer)?,
            });
        }
        Ok(weights)
    }

    /// The values of a constant, decoded: fp32 of its shape, on the CPU.
    ///
    /// # Errors
    /// When there is no constant of that name, or its values pass the range of its type.
    pub fn weight(&self, name: &str) -> Result<Tensor> {
        self.constants().array(name)?.tensor(Device::Cpu)?.f_to_kind(Kind::Float).map_err(Into::into)
    }
}

/// Bytes of everything behind a constant; what it uses twice counts once.
fn stored_bytes<'a>(
    constants: &Constants<'a>,
    operation: &'a Operation,
    seen: &mut HashSet<(&'a str, u64)>,
) -> Result<u64> {
    let mut of = |constant: &'a Constant| match constant.blob() {
        Some(place) if !seen.insert(place) => 0,
        _ => constant.kind.packed_bytes(),
    };
    if operation.is_const() {
        return Ok(operation.attributes.get("val").map_or(0, of));
    }
    let mut bytes = 0;
    for (name, source) in constants.parameters(operation)? {
        match source {
            // Shapes, axes and names of types are no payload.
            Source::Stored(_) if matches!(name, "shape" | "axis" | "vector_axis" | "output_dtype") => {}
            Source::Stored(constant) => bytes += of(constant),
            Source::Named(_) => {}
        }
    }
    for source in constants.parameters(operation)?.into_values() {
        if let Source::Named(name) = source {
            let producer = constants.producer(name).with_context(|| format!("{name} is not a constant"))?;
            bytes += stored_bytes(constants, producer, seen)?;
        }
    }
    Ok(bytes)
}

/// The palettes of a constant, its own or those of what it scales.
fn palettes<'a>(constants: &Constants<'a>, operation: &'a Operation) -> Result<Option<Palettes>> {
    if !operation.is_constexpr() {
        return Ok(None);
    }
    let parameters = constants.parameters(operation)?;
    if operation.kind != "constexpr_lut_to_dense" {
        let Some(Source::Named(data)) = parameters.get("data") else { return Ok(None) };
        let producer = constants.producer(data).with_context(|| format!("{data} is not a constant"))?;
        return palettes(constants, producer);
    }
    let lut = constants.kind_of(parameters["lut"])?;
    Ok(Some(match &lut.shape[..] {
        [groups @ .., entries, vector] => {
            Palettes { bits: entries.ilog2(), groups: groups.iter().product::<i64>() as u64, vector: *vector as u64 }
        }
        _ => Palettes { bits: lut.elements().ilog2(), groups: 1, vector: 1 },
    }))
}
