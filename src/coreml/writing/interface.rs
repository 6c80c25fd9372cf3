//! What every package of a network has in common: inputs, outputs, what they are called, and how it is written.

use std::fs::File;
use std::io::BufWriter;
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};

use super::program::{ProgramBuilder, Var};
use super::weights::WeightSource;
use crate::coreml::DeploymentTarget;
use crate::coreml::format::metadata::PackageMetadata;
use crate::coreml::format::package::write_package;
use crate::coreml::format::proto::{self, FeatureDescription, FeatureKind, array_type};
use crate::coreml::writing::lowering::interpreter::{MilOps, MilValue, as_input};

/// The interpreter while a package is written.
pub type Writer<'a> = MilOps<'a, BufWriter<File>>;

/// An input of a package.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Input {
    pub name: String,
    /// Shown to whoever looks at the package.
    pub about: String,
    pub kind: InputKind,
    /// In the network's terms: `[B, C, H, W]`, `[B, T, C]`, `[B, C]` or `[B]`.
    pub shape: Vec<i64>,
}

/// What an input holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InputKind {
    /// fp16, laid out as [`MilOps::input`] takes it: `[B, T, C]` is `[B, C, 1, T]`.
    Half,
    /// The same in fp32, and so is then all that the package computes.
    Single,
    /// Token ids, fp32 for historical reasons.
    TokenIds,
}

impl Input {
    /// An input of numbers.
    pub fn of(kind: InputKind, name: &str, about: &str, shape: &[i64]) -> Self {
        Self { name: name.into(), about: about.into(), kind, shape: shape.into() }
    }

    /// An fp16 input.
    pub fn half(name: &str, about: &str, shape: &[i64]) -> Self {
        Self { name: name.into(), about: about.into(), kind: InputKind::Half, shape: shape.into() }
    }
}

/// An output of a package, fp32 in the network's own shape.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    pub name: String,
    /// Shown to whoever looks at the package.
    pub about: String,
}

impl Output {
    pub fn new(name: &str, about: &str) -> Self {
        Self { name: name.into(), about: about.into() }
    }
}

/// The borders of a network in a package.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    /// Last part of the package's name: `unet`, `text_encoder`, …
    pub component: String,
    /// One sentence for whoever looks at the package.
    pub about: String,
    pub inputs: Vec<Input>,
    pub outputs: Vec<Output>,
}

/// How and where packages are written.
#[derive(Clone, Copy, Debug)]
pub struct Destination<'a> {
    pub folder: &'a Path,
    pub target: DeploymentTarget,
    /// Replaces a package that is there already.
    pub overwrite: bool,
    pub metadata: &'a PackageMetadata,
}

/// Where the weights of a network come from, how many parameters it asks for, and who hears how many are written.
pub struct Weighted<'a> {
    pub weights: &'a dyn WeightSource,
    pub parameters: usize,
    pub progress: &'a mut dyn FnMut(usize, usize),
}

/// Writes what `network` does with the inputs of `interface`, in that order, as a package, and returns its path.
/// `network` gives a value for each output.
///
/// # Errors
/// When the package exists and is not to be overwritten; a weight is missing, of another shape or not finite in fp16;
/// the network asks for what MIL does not do; the files cannot be written. Nothing is left behind.
pub fn write(
    destination: Destination,
    interface: &Interface,
    weighted: Weighted,
    network: impl FnOnce(&mut Writer, &[MilValue]) -> Vec<MilValue>,
) -> Result<PathBuf> {
    let Destination { folder, target, overwrite, metadata } = destination;
    ensure!(!metadata.model.is_empty(), "the package needs the name of its model");
    let path = folder.join(metadata.package_name(&interface.component));
    let Weighted { weights, parameters, progress } = weighted;
    let mut done = 0;
    let mut written = || {
        done += 1;
        progress(done, parameters);
    };
    write_package(&path, overwrite, |file| {
        let mut ops = MilOps::new(ProgramBuilder::new(target, file), weights, &mut written);
        if interface.inputs.iter().any(|input| input.kind == InputKind::Single) {
            ops.compute_in_fp32();
        }
        let inputs: Vec<MilValue> = interface
            .inputs
            .iter()
            .map(|input| match input.kind {
                InputKind::Half | InputKind::Single => ops.input(&input.name, &input.shape),
                InputKind::TokenIds => ops.token_ids(&input.name, &input.shape),
            })
            .collect();
        ops.reserve(interface.outputs.iter().map(|output| output.name.as_str()));
        let values = network(&mut ops, &inputs);
        let outputs: Vec<Var> =
            interface.outputs.iter().zip(&values).map(|(output, value)| ops.output(&output.name, value)).collect();
        let (program, _, digest) = ops.finish()?.finish(&outputs.iter().collect::<Vec<_>>())?;
        let description = proto::ModelDescription {
            input: interface.inputs.iter().map(described).collect(),
            output: interface
                .outputs
                .iter()
                .zip(&outputs)
                .map(|(output, var)| feature(&output.name, &output.about, array_type::FLOAT32, &var.shape))
                .collect(),
            metadata: Some(metadata.described(&interface.component, &interface.about)),
        };
        let model = proto::Model {
            specification_version: target.specification(),
            description: Some(description),
            ml_program: Some(program),
            ..Default::default()
        };
        Ok((model, digest))
    })?;
    Ok(path)
}

fn described(input: &Input) -> FeatureDescription {
    match input.kind {
        InputKind::Half => feature(&input.name, &input.about, array_type::FLOAT16, &as_input(&input.shape)),
        InputKind::Single => feature(&input.name, &input.about, array_type::FLOAT32, &as_input(&input.shape)),
        InputKind::TokenIds => feature(&input.name, &input.about, array_type::FLOAT32, &input.shape),
    }
}

pub(super) fn feature(name: &str, description: &str, data_type: i32, shape: &[i64]) -> FeatureDescription {
    let array = proto::ArrayFeatureType { shape: shape.to_vec(), data_type, ..Default::default() };
    FeatureDescription {
        name: name.to_owned(),
        short_description: description.to_owned(),
        r#type: Some(proto::FeatureType { kind: Some(FeatureKind::MultiArray(array)), ..Default::default() }),
    }
}
