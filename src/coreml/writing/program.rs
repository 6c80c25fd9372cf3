//! Builds a MIL program, operation by operation.
//!
//! The form is that of coremltools: every parameter of an operation, defaults included, is a `const` operation of its
//! own that is bound by name, and constants of ten elements or more lie in weight.bin. Core ML's parser knows fewer
//! defaults than its documentation does, so nothing is left out.

use std::collections::{BTreeMap, HashSet};
use std::io::{Seek, Write};

use anyhow::{Result, bail, ensure};
use half::f16;

use crate::coreml::DeploymentTarget;
use crate::coreml::format::blob::{BlobType, BlobWriter};
use crate::coreml::format::proto::{
    self, Argument, Binding, BindingKind, DimensionKind, ImmediateKind, NamedValueType, Operation, TensorElements,
    Value, ValueKind, ValueType, ValueTypeKind, data_type,
};

/// A value of the program: its name, its shape in memory and its element type (one of [`data_type`]).
#[derive(Clone, Debug, PartialEq)]
pub struct Var {
    pub name: String,
    pub shape: Vec<i64>,
    pub element: i32,
}

/// What a parameter of an operation is bound to: values, or an immediate that becomes a `const`.
pub enum Parameter<'a> {
    Var(&'a Var),
    Vars(Vec<&'a Var>),
    Int(i32),
    Ints(&'a [i32]),
    Bool(bool),
    Bools(&'a [bool]),
    Text(&'a str),
    /// A number in fp16.
    Half(f16),
    /// A number in fp32.
    Float(f32),
}

/// A program of one function, `main`, while it grows.
pub struct ProgramBuilder<W> {
    target: DeploymentTarget,
    inputs: Vec<NamedValueType>,
    operations: Vec<Operation>,
    names: HashSet<String>,
    blobs: BlobWriter<W>,
}

impl<W: Write + Seek> ProgramBuilder<W> {
    /// `blobs` becomes the package's `weights/weight.bin`.
    pub fn new(target: DeploymentTarget, blobs: BlobWriter<W>) -> Self {
        Self { target, inputs: Vec::new(), operations: Vec::new(), names: HashSet::new(), blobs }
    }

    /// Keeps `name` for an output: until it is [released](Self::release), nothing else gets it.
    pub(super) fn reserve(&mut self, name: &str) {
        self.names.insert(name.to_owned());
    }

    /// The next value of this name gets it.
    pub(super) fn release(&mut self, name: &str) {
        self.names.remove(name);
    }

    pub(super) fn target(&self) -> DeploymentTarget {
        self.target
    }

    /// A new value; `hint` names it, made unique where it is not.
    pub(super) fn var(&mut self, hint: &str, element: i32, shape: &[i64]) -> Var {
        Var { name: self.unique(hint), shape: shape.to_vec(), element }
    }

    /// An input of the function.
    pub fn input(&mut self, name: &str, element: i32, shape: &[i64]) -> Var {
        let var = self.var(name, element, shape);
        self.inputs.push(named(&var));
        var
    }

    /// Appends an operation with one result and returns that. `hint` names both, made unique where it is not.
    pub fn op(
        &mut self,
        kind: &str,
        hint: &str,
        parameters: &[(&str, Parameter)],
        element: i32,
        shape: Vec<i64>,
    ) -> Var {
        let var = Var { name: self.unique(hint), shape, element };
        self.append(kind, &var.name, parameters, std::slice::from_ref(&var));
        var
    }

    /// Appends `split`, the one operation here with several results: `parts` equal ones along `axis`.
    pub fn split(&mut self, hint: &str, x: &Var, axis: i32, parts: i32) -> Vec<Var> {
        let mut shape = x.shape.clone();
        shape[axis as usize] /= i64::from(parts);
        let outputs: Vec<Var> = (0..parts)
            .map(|part| Var { name: self.unique(&format!("{hint}_{part}")), shape: shape.clone(), element: x.element })
            .collect();
        let name = self.unique(hint);
        let parameters =
            [("x", Parameter::Var(x)), ("num_splits", Parameter::Int(parts)), ("axis", Parameter::Int(axis))];
        self.append("split", &name, &parameters, &outputs);
        outputs
    }

    /// A constant tensor in row-major little-endian `bytes`, fp16 or fp32.
    ///
    /// # Errors
    /// When there are not as many bytes as `shape` needs, or weight.bin cannot be written.
    pub fn tensor(&mut self, hint: &str, element: i32, shape: &[i64], bytes: &[u8]) -> Result<Var> {
        let var = self.var(hint, element, shape);
        let value = self.stored(element, shape, bytes)?;
        let attributes = attributes(&var.name, [("val", value)]);
        self.push("const", BTreeMap::new(), attributes, std::slice::from_ref(&var));
        Ok(var)
    }

    /// Appends an operation of another program with the names that it has. The blobs that it refers to are this file's
    /// ([`ProgramBuilder::blob`]), and its names are not yet taken.
    pub(super) fn adopt(&mut self, operation: Operation) {
        self.names.extend(operation.outputs.iter().map(|output| output.name.clone()));
        self.operations.push(operation);
    }

    /// Stores `count` elements in weight.bin; their offset.
    pub(super) fn blob(&mut self, kind: BlobType, count: usize, bytes: &[u8]) -> Result<u64> {
        self.blobs.add(kind, count, bytes)
    }

    /// The program with its `outputs`, the file of its weights, and a digest of what lies in that.
    pub fn finish(self, outputs: &[&Var]) -> Result<(proto::Program, W, [u8; 32])> {
        let opset = self.target.opset().to_owned();
        let block = proto::Block {
            outputs: outputs.iter().map(|var| var.name.clone()).collect(),
            operations: self.operations,
            ..Default::default()
        };
        let function = proto::Function {
            inputs: self.inputs,
            opset: opset.clone(),
            block_specializations: [(opset, block)].into(),
            ..Default::default()
        };
        let program =
            proto::Program { version: 1, functions: [("main".to_owned(), function)].into(), ..Default::default() };
        let (file, digest) = self.blobs.finish()?;
        Ok((program, file, digest))
    }

    fn append(&mut self, kind: &str, name: &str, parameters: &[(&str, Parameter)], outputs: &[Var]) {
        let mut inputs = BTreeMap::new();
        for (key, parameter) in parameters {
            let value = match parameter {
                Parameter::Var(var) => {
                    inputs.insert((*key).to_owned(), by_name([*var]));
                    continue;
                }
                Parameter::Vars(vars) => {
                    inputs.insert((*key).to_owned(), by_name(vars.iter().copied()));
                    continue;
                }
                Parameter::Int(value) => {
                    immediate(data_type::INT32, &[], TensorElements::Ints(proto::RepeatedInts { values: vec![*value] }))
                }
                Parameter::Ints(values) => immediate(
                    data_type::INT32,
                    &[values.len() as i64],
                    TensorElements::Ints(proto::RepeatedInts { values: values.to_vec() }),
                ),
                Parameter::Bool(value) => immediate(
                    data_type::BOOL,
                    &[],
                    TensorElements::Bools(proto::RepeatedBools { values: vec![*value] }),
                ),
                Parameter::Bools(values) => immediate(
                    data_type::BOOL,
                    &[values.len() as i64],
                    TensorElements::Bools(proto::RepeatedBools { values: values.to_vec() }),
                ),
                Parameter::Text(value) => text(value),
                Parameter::Half(value) => immediate(
                    data_type::FLOAT16,
                    &[],
                    TensorElements::Bytes(proto::RepeatedBytes { values: value.to_le_bytes().to_vec() }),
                ),
                Parameter::Float(value) => immediate(
                    data_type::FLOAT32,
                    &[],
                    TensorElements::Floats(proto::RepeatedFloats { values: vec![*value] }),
                ),
            };
            let constant =
                NamedValueType { name: self.unique(&format!("{name}_{key}_0")), r#type: value.r#type.clone() };
            inputs.insert((*key).to_owned(), by_name_text(&constant.name));
            self.operations.push(Operation {
                r#type: "const".to_owned(),
                attributes: attributes(&constant.name, [("val", value)]),
                outputs: vec![constant],
                ..Default::default()
            });
        }
        self.push(kind, inputs, attributes(name, []), outputs);
    }

    pub(super) fn push(
        &mut self,
        kind: &str,
        inputs: BTreeMap<String, Argument>,
        attributes: BTreeMap<String, Value>,
        outputs: &[Var],
    ) {
        self.operations.push(Operation {
            r#type: kind.to_owned(),
            inputs,
            outputs: outputs.iter().map(named).collect(),
            attributes,
            ..Default::default()
        });
    }

    /// A tensor's value: in weight.bin from ten elements on, where the type may lie there; else in the program.
    pub(super) fn stored(&mut self, element: i32, shape: &[i64], bytes: &[u8]) -> Result<Value> {
        let count = shape.iter().product::<i64>() as usize;
        let kind = match element {
            data_type::FLOAT16 => BlobType::Float16,
            data_type::FLOAT32 => BlobType::Float32,
            data_type::UINT8 => BlobType::UInt8,
            data_type::INT8 => BlobType::Int8,
            data_type::UINT1 => BlobType::UInt1,
            data_type::UINT2 => BlobType::UInt2,
            data_type::UINT3 => BlobType::UInt3,
            data_type::UINT4 => BlobType::UInt4,
            data_type::UINT6 => BlobType::UInt6,
            _ => bail!("constants of MIL's type {element} are not written as tensors"),
        };
        if count >= 10 {
            let offset = self.blobs.add(kind, count, bytes)?;
            let file_name = "@model_path/weights/weight.bin".to_owned();
            return Ok(Value {
                r#type: Some(tensor_type(element, shape)),
                kind: Some(ValueKind::BlobFile(proto::BlobFileValue { file_name, offset })),
                ..Default::default()
            });
        }
        ensure!(
            bytes.len() as u64 == (count as u64 * kind.bits()).div_ceil(8),
            "{count} elements of type {kind:?} do not take {} bytes",
            bytes.len()
        );
        let elements = match element {
            data_type::FLOAT32 => TensorElements::Floats(proto::RepeatedFloats {
                values: bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
            }),
            _ => TensorElements::Bytes(proto::RepeatedBytes { values: bytes.to_vec() }),
        };
        Ok(immediate(element, shape, elements))
    }

    /// An identifier that no value or operation has yet, from a parameter's name or another hint.
    fn unique(&mut self, hint: &str) -> String {
        let mut base: String = hint.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect();
        if !base.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_') {
            base.insert(0, '_');
        }
        let mut name = base.clone();
        let mut count = 1;
        while !self.names.insert(name.clone()) {
            name = format!("{base}_{count}");
            count += 1;
        }
        name
    }
}

/// The type of a tensor; rank 0 for a scalar.
pub fn tensor_type(element: i32, shape: &[i64]) -> ValueType {
    let dimension = |&size: &i64| proto::Dimension {
        dimension: Some(DimensionKind::Constant(proto::ConstantDimension { size: size as u64 })),
    };
    ValueType {
        kind: Some(ValueTypeKind::Tensor(proto::TensorType {
            data_type: element,
            rank: shape.len() as i64,
            dimensions: shape.iter().map(dimension).collect(),
            ..Default::default()
        })),
    }
}

fn named(var: &Var) -> NamedValueType {
    NamedValueType { name: var.name.clone(), r#type: Some(tensor_type(var.element, &var.shape)) }
}

pub(super) fn immediate(element: i32, shape: &[i64], elements: TensorElements) -> Value {
    let tensor = ImmediateKind::Tensor(proto::TensorValue { value: Some(elements) });
    Value {
        r#type: Some(tensor_type(element, shape)),
        kind: Some(ValueKind::Immediate(proto::ImmediateValue { value: Some(tensor) })),
        ..Default::default()
    }
}

fn text(value: &str) -> Value {
    let values = vec![value.to_owned()];
    immediate(data_type::STRING, &[], TensorElements::Strings(proto::RepeatedStrings { values }))
}

/// The attributes of an operation: its name and `others`.
pub(super) fn attributes<const N: usize>(name: &str, others: [(&str, Value); N]) -> BTreeMap<String, Value> {
    let others = others.into_iter().map(|(key, value)| (key.to_owned(), value));
    others.chain([("name".to_owned(), text(name))]).collect()
}

fn by_name_text(name: &str) -> Argument {
    Argument { arguments: vec![Binding { binding: Some(BindingKind::Name(name.to_owned())) }] }
}

pub(super) fn by_name<'a>(vars: impl IntoIterator<Item = &'a Var>) -> Argument {
    let binding = |var: &Var| Binding { binding: Some(BindingKind::Name(var.name.clone())) };
    Argument { arguments: vars.into_iter().map(binding).collect() }
}

pub(super) fn bound<const N: usize>(values: [Value; N]) -> Argument {
    let binding = |value| Binding { binding: Some(BindingKind::Value(value)) };
    Argument { arguments: values.map(binding).into() }
}
