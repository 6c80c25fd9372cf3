//! The program of a package in the reader's own terms: operations over named values, each type known, each constant
//! tied to its bytes. Built from the protobuf messages, refusing whatever the reader does not know.

use anyhow::{Context, Result, bail, ensure};
use std::collections::BTreeMap;

use super::constant::{Blobs, Constant, Elements};
use super::types::TensorType;
use crate::coreml::format::proto::{self, BindingKind};

/// Specification version and the name of its set of operations.
const OPSETS: [(i32, &str); 5] = [(6, "CoreML5"), (7, "CoreML6"), (8, "CoreML7"), (9, "CoreML8"), (10, "CoreML9")];

/// A function `main` over named values.
#[derive(Debug)]
pub struct Program {
    pub opset: String,
    pub inputs: Vec<Named>,
    pub outputs: Vec<String>,
    pub operations: Vec<Operation>,
}

/// A value's name and type.
#[derive(Debug)]
pub struct Named {
    pub name: String,
    pub kind: TensorType,
}

/// One operation. Parameters of `constexpr_*` in attribute form are in `attributes`, as is `val` of `const`.
#[derive(Debug)]
pub struct Operation {
    pub number: usize,
    pub kind: String,
    pub name: String,
    pub inputs: BTreeMap<String, Vec<Argument>>,
    pub attributes: BTreeMap<String, Constant>,
    pub outputs: Vec<Named>,
}

/// What an input is bound to.
#[derive(Debug)]
pub enum Argument {
    /// An earlier value.
    Name(String),
    /// A value written in place.
    Value(Constant),
}

impl Operation {
    pub fn is_const(&self) -> bool {
        self.kind == "const"
    }

    /// A constant in compressed form.
    pub fn is_constexpr(&self) -> bool {
        self.kind.starts_with("constexpr_")
    }

    /// For messages: number, kind, and first output.
    pub fn place(&self) -> String {
        place(self.number, &self.kind, self.outputs.first().map_or("?", |output| &output.name))
    }
}

fn place(number: usize, kind: &str, output: &str) -> String {
    // Escaped: the names come from the file and are not checked yet.
    format!("operation {number}, {} -> {}", kind.escape_debug(), output.escape_debug())
}

impl Program {
    /// From a model that has a program with the single function `main`.
    pub fn from_proto(program: proto::Program, specification_version: i32, blobs: &Blobs) -> Result<Self> {
        let Some((_, opset)) = OPSETS.iter().find(|(version, _)| *version == specification_version) else {
            bail!("specificationVersion is {specification_version}, known are 6 to 10");
        };
        ensure!(program.version == 1, "the program's version is {}, not 1", program.version);
        ensure!(program.doc_string.is_empty(), "the program has a docString");
        if let Some(key) = program.attributes.keys().find(|key| *key != "buildInfo") {
            bail!("unknown program attribute {key:?}");
        }
        let names: Vec<String> = program.functions.keys().cloned().collect();
        let mut functions = program.functions.into_values();
        let (Some(mut function), true) = (functions.next(), names == ["main"]) else {
            bail!("the program must have the single function main, it has {names:?}");
        };
        ensure!(
            function.opset == *opset,
            "the function's opset is {:?}, specification version {specification_version} goes with {opset}",
            function.opset
        );
        ensure!(function.attributes.is_empty(), "the function has attributes");
        ensure!(
            function.block_specializations.len() == 1,
            "the function has {} blocks, it must have one, for {opset}",
            function.block_specializations.len()
        );
        let Some(block) = function.block_specializations.remove(&function.opset) else {
            bail!("the function has no block for its opset {opset}");
        };
        ensure!(
            block.inputs.is_empty() && block.attributes.is_empty(),
            "the block has inputs or attributes of its own"
        );
        let inputs = function
            .inputs
            .into_iter()
            .map(|input| named(input).context("input of the function"))
            .collect::<Result<_>>()?;
        let operations = block
            .operations
            .into_iter()
            .enumerate()
            .map(|(number, operation)| {
                let first = operation.outputs.first().map_or("?", |output| &output.name);
                let place = place(number, &operation.r#type, first);
                Operation::from_proto(number, operation, blobs).context(place)
            })
            .collect::<Result<_>>()?;
        Ok(Self { opset: function.opset, inputs, outputs: block.outputs, operations })
    }
}

impl Operation {
    fn from_proto(number: usize, operation: proto::Operation, blobs: &Blobs) -> Result<Self> {
        ensure!(operation.blocks.is_empty(), "control flow is not supported");
        ensure!(!operation.outputs.is_empty(), "it has no outputs");
        let outputs = operation.outputs.into_iter().map(result).collect::<Result<_>>()?;
        let mut attributes = operation
            .attributes
            .into_iter()
            .map(|(key, value)| {
                let constant = Constant::from_proto(value, blobs).with_context(|| format!("attribute {key}"))?;
                Ok((key, constant))
            })
            .collect::<Result<BTreeMap<_, _>>>()?;
        let name = match attributes.remove("name").map(|name| name.decode(blobs)).transpose()?.map(|name| name.elements)
        {
            Some(Elements::Strings(mut strings)) if strings.len() == 1 => strings.remove(0),
            _ => bail!("it needs an attribute `name` that holds one string"),
        };
        let inputs = operation
            .inputs
            .into_iter()
            .map(|(key, argument)| {
                let bound = argument
                    .arguments
                    .into_iter()
                    .map(|binding| match binding.binding {
                        Some(BindingKind::Name(name)) => Ok(Argument::Name(name)),
                        Some(BindingKind::Value(value)) => Ok(Argument::Value(Constant::from_proto(value, blobs)?)),
                        None => bail!("a binding is empty"),
                    })
                    .collect::<Result<Vec<_>>>()
                    .with_context(|| format!("input {key}"))?;
                ensure!(!bound.is_empty(), "input {key} is bound to nothing");
                Ok((key, bound))
            })
            .collect::<Result<_>>()?;
        Ok(Self { number, kind: operation.r#type, name, inputs, attributes, outputs })
    }
}

/// What an operation gives: how much that is may depend on values.
fn result(value: proto::NamedValueType) -> Result<Named> {
    let kind = TensorType::of_result(value.r#type.as_ref()).with_context(|| value.name.clone())?;
    Ok(Named { name: value.name, kind })
}

fn named(value: proto::NamedValueType) -> Result<Named> {
    let kind = TensorType::from_proto(value.r#type.as_ref()).with_context(|| value.name.clone())?;
    Ok(Named { name: value.name, kind })
}
