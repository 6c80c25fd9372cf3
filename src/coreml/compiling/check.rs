//! Whether a compiled folder is what its package is: read back from the disk, by the [reader](crate::coreml::reading) that
//! shares nothing with the printer, and compared value by value.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};

use super::source::Source;
use super::values::{Element, Elements, tensor_type};
use crate::coreml::format::proto::{
    Argument, Binding, BindingKind, Function, ImmediateKind, NamedValueType, Operation, TensorValue, Value, ValueKind,
};
use crate::coreml::reading::compiled;

/// Compares the folder with the package that it was made of; the files of weights, which are the package's own, aside.
///
/// # Errors
/// The first that differs; the folder cannot be read.
pub fn same_as_package(folder: &Path, source: &Source) -> Result<()> {
    let read = compiled::read(folder)?;
    ensure!(read.specification_version == source.specification_version, "its specification version differs");
    let description = &read.description[..];
    let rest = description.strip_prefix(&source.description[..]).context("its description differs")?;
    ensure!(rest.is_empty() != source.described.metadata.is_none(), "its description differs");
    let (own, theirs) = (&read.program, &source.program);
    ensure!(own.functions.keys().eq(theirs.functions.keys()), "its functions differ");
    for (name, function) in &theirs.functions {
        same_function(&own.functions[name], function).with_context(|| format!("function {name}"))?;
    }
    Ok(())
}

fn same_function(own: &Function, theirs: &Function) -> Result<()> {
    ensure!(own.opset == theirs.opset, "its set of operations differs");
    let sorted = |function: &Function| {
        let mut inputs = function.inputs.clone();
        inputs.sort_by(|a, b| a.name.cmp(&b.name));
        inputs
    };
    same_named(&sorted(own), &sorted(theirs))?;
    let block = |function: &Function| function.block_specializations.get(&function.opset).cloned();
    let (own, theirs) = (block(own).context("it has no block")?, block(theirs).context("it has no block")?);
    ensure!(own.outputs == theirs.outputs, "its outputs differ");
    ensure!(own.operations.len() == theirs.operations.len(), "the number of its operations differs");
    for (number, (own, theirs)) in own.operations.iter().zip(&theirs.operations).enumerate() {
        same_operation(own, theirs).with_context(|| format!("operation {number}"))?;
    }
    Ok(())
}

fn same_operation(own: &Operation, theirs: &Operation) -> Result<()> {
    ensure!(own.r#type == theirs.r#type, "its kind differs");
    same_named(&own.outputs, &theirs.outputs)?;
    same_map(&own.inputs, &theirs.inputs, same_argument)?;
    same_map(&own.attributes, &theirs.attributes, same_value)
}

fn same_named(own: &[NamedValueType], theirs: &[NamedValueType]) -> Result<()> {
    ensure!(own.len() == theirs.len(), "the number of values differs");
    for (own, theirs) in own.iter().zip(theirs) {
        let same = own.name == theirs.name && tensor_type(own.r#type.as_ref())? == tensor_type(theirs.r#type.as_ref())?;
        ensure!(same, "{} differs", theirs.name);
    }
    Ok(())
}

fn same_map<T>(
    own: &BTreeMap<String, T>,
    theirs: &BTreeMap<String, T>,
    same: impl Fn(&T, &T) -> Result<()>,
) -> Result<()> {
    ensure!(own.keys().eq(theirs.keys()), "the names of its arguments differ");
    own.iter().zip(theirs.values()).try_for_each(|((name, own), theirs)| same(own, theirs).context(name.clone()))
}

fn same_argument(own: &Argument, theirs: &Argument) -> Result<()> {
    ensure!(own.arguments.len() == theirs.arguments.len(), "the number of values differs");
    let same = |(own, theirs): (&Binding, &Binding)| match (&own.binding, &theirs.binding) {
        (Some(BindingKind::Name(own)), Some(BindingKind::Name(theirs))) if own == theirs => Ok(()),
        (Some(BindingKind::Value(own)), Some(BindingKind::Value(theirs))) => same_value(own, theirs),
        _ => bail!("what it is bound to differs"),
    };
    own.arguments.iter().zip(&theirs.arguments).try_for_each(same)
}

fn same_value(own: &Value, theirs: &Value) -> Result<()> {
    let kind = tensor_type(theirs.r#type.as_ref())?;
    ensure!(tensor_type(own.r#type.as_ref())? == kind, "its type differs");
    match (&own.kind, &theirs.kind) {
        (Some(ValueKind::BlobFile(own)), Some(ValueKind::BlobFile(theirs))) => {
            ensure!(own == theirs, "where its value lies differs");
        }
        (Some(own), Some(theirs)) => {
            let (own, theirs) = (Elements::of(in_place(own)?, kind)?, Elements::of(in_place(theirs)?, kind)?);
            let same = |(own, theirs)| match (own, theirs) {
                // −0 is not 0.
                (Element::Real(own), Element::Real(theirs)) => own.to_bits() == theirs.to_bits(),
                (own, theirs) => own == theirs,
            };
            let pairs = (0..theirs.count).map(|place| (own.at(place), theirs.at(place)));
            ensure!(own.count == theirs.count && pairs.into_iter().all(same), "its elements differ");
        }
        _ => bail!("a value is missing"),
    }
    Ok(())
}

fn in_place(kind: &ValueKind) -> Result<&TensorValue> {
    let ValueKind::Immediate(immediate) = kind else { bail!("where its value lies differs") };
    let Some(ImmediateKind::Tensor(tensor)) = &immediate.value else { bail!("its value is not a tensor") };
    Ok(tensor)
}
