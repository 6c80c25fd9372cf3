//! The `.mlpackage` folder: its manifest, its model, its weights, and what it declares to callers. A compiled model,
//! `.mlmodelc`, is read as the package that it was made of.
//!
//! Everything is checked when a package is opened, so that what has been opened can be run. Nothing in it is trusted:
//! sizes are compared with the files before they are used, names cannot lead out of the folder.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail, ensure};
use prost::Message;
use serde_json::Value;

use super::blob::BlobFile;
use super::check::{Checked, check};
use super::compiled;
use super::constant::Blobs;
use super::constexpr::Constants;
use super::file::read_file;
use super::program::Program;
use super::types::{DataType, TensorType};
use crate::coreml::format::proto::{self, FeatureKind};

const AUTHOR: &str = "com.apple.CoreML";
const MANIFEST: &str = "Manifest.json";
const MODEL: &str = "model.mlmodel";
const WEIGHTS: &str = "weights";

/// A package that has been read and checked.
#[derive(Debug)]
pub struct Package {
    path: PathBuf,
    is_compiled: bool,
    compiler: Option<String>,
    specification_version: i32,
    metadata: proto::Metadata,
    inputs: Vec<Feature>,
    outputs: Vec<Feature>,
    file_bytes: u64,
    pub(super) blobs: Blobs,
    pub(super) program: Program,
    pub(super) checked: Checked,
}

/// An input or output as callers see it.
#[derive(Clone, Debug, PartialEq)]
pub struct Feature {
    pub name: String,
    pub kind: TensorType,
    pub description: String,
}

impl Package {
    /// Reads a package folder, or a compiled one.
    ///
    /// # Errors
    /// Names the package, the file or the operation, and the rule that is broken.
    pub fn open(path: &Path) -> Result<Self> {
        let what = if compiled::is_compiled(path) { "compiled Core ML model" } else { "Core ML package" };
        Self::read(path).with_context(|| format!("{} is not a sound {what}", path.display()))
    }

    fn read(path: &Path) -> Result<Self> {
        ensure!(path.exists(), "there is no such folder");
        ensure!(path.is_dir(), "it is a file; a package is a folder, NAME.mlpackage");
        let is_compiled = compiled::is_compiled(path);
        let Parts { version, compiler, program, description, blobs, file_bytes } =
            if is_compiled { Parts::of_compiled(path)? } else { Parts::of_package(path)? };
        let file = if is_compiled { "model.mil" } else { MODEL };
        let program = Program::from_proto(program, version, &blobs).context(file)?;
        let checked = {
            let constants = Constants::new(&program, &blobs, version, file_bytes);
            check(&program, &blobs, version, &constants).context(file)?
        };
        let names = |named: &[super::program::Named]| named.iter().map(|n| n.name.clone()).collect::<Vec<_>>();
        let mut given = names(&program.inputs);
        if is_compiled {
            // Its text has them sorted; callers see them in the order of the description.
            let place = |name: &String| description.input.iter().position(|feature| feature.name == *name);
            given.sort_by_key(place);
        }
        let inputs = features(description.input, &given, &checked, version).context("model inputs")?;
        let outputs = features(description.output, &program.outputs, &checked, version).context("model outputs")?;
        Ok(Self {
            path: path.to_path_buf(),
            is_compiled,
            compiler,
            specification_version: version,
            metadata: description.metadata.unwrap_or_default(),
            inputs,
            outputs,
            file_bytes,
            blobs,
            program,
            checked,
        })
    }

    /// Whether it is a compiled one.
    pub fn is_compiled(&self) -> bool {
        self.is_compiled
    }

    /// Where it was read from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Who compiled it, `coremlc 3500.32.1`, where it is compiled and says so.
    pub fn compiler(&self) -> Option<&str> {
        self.compiler.as_deref()
    }

    /// Inputs in the order of the description.
    pub fn inputs(&self) -> &[Feature] {
        &self.inputs
    }

    /// Outputs in the order of the description.
    pub fn outputs(&self) -> &[Feature] {
        &self.outputs
    }

    /// 7 for iOS 16, 8 for iOS 17, 9 for iOS 18, 10 for iOS 26.
    pub fn specification_version(&self) -> i32 {
        self.specification_version
    }

    /// The set of operations, `CoreML6` for iOS 16 and so on.
    pub fn opset(&self) -> &str {
        &self.program.opset
    }

    /// Author, license, version, description and the writer's own keys.
    pub fn metadata(&self) -> &proto::Metadata {
        &self.metadata
    }

    /// Bytes of all its files.
    pub fn file_bytes(&self) -> u64 {
        self.file_bytes
    }

    /// How often each operation occurs.
    pub fn operation_counts(&self) -> BTreeMap<&str, usize> {
        let mut counts = BTreeMap::new();
        for operation in &self.program.operations {
            *counts.entry(operation.kind.as_str()).or_default() += 1;
        }
        counts
    }

    pub(super) fn constants(&self) -> Constants<'_> {
        Constants::new(&self.program, &self.blobs, self.specification_version, self.file_bytes)
    }
}

/// What is read of either kind of folder, before it is checked.
struct Parts {
    version: i32,
    compiler: Option<String>,
    program: proto::Program,
    description: proto::ModelDescription,
    blobs: Blobs,
    file_bytes: u64,
}

impl Parts {
    fn of_package(path: &Path) -> Result<Self> {
        let files = [MANIFEST.to_owned(), format!("Data/{AUTHOR}/{MODEL}")];
        if let Some(missing) = files.iter().find(|file| fs::symlink_metadata(path.join(file)).is_err()) {
            bail!("{missing} is missing: export it again, or copy all of the folder");
        }
        let manifest = read_file(&path.join(MANIFEST), 1 << 20)?;
        ensure!(!manifest.is_empty(), damaged(MANIFEST, "it is empty"));
        let items: Value = serde_json::from_slice(&manifest).map_err(|error| {
            damaged(MANIFEST, format_args!("it is not JSON at line {}, column {}", error.line(), error.column()))
        })?;
        let has_weights = check_manifest(path, &items).context(MANIFEST)?;
        let folder = path.join("Data").join(AUTHOR);
        let bytes = read_file(&folder.join(MODEL), (1 << 31) - 1)?;
        let mut file_bytes = (manifest.len() + bytes.len()) as u64;
        ensure!(!bytes.is_empty(), damaged(MODEL, "it is empty"));
        let model = proto::Model::decode(&bytes[..]).map_err(|error| damaged(MODEL, undecoded(&error)))?;
        drop(bytes);
        let version = model.specification_version;
        let blobs = if has_weights { open_blobs(&folder.join(WEIGHTS), version)? } else { Blobs::new() };
        file_bytes += blobs.values().map(BlobFile::length).sum::<u64>();
        let program = model.ml_program.context("the model is not an ML program")?;
        ensure!(!model.is_updatable, "ML programs cannot be updatable");
        let description = model.description.context("the model has no description")?;
        Ok(Self { version, compiler: None, program, description, blobs, file_bytes })
    }

    fn of_compiled(path: &Path) -> Result<Self> {
        let read = compiled::read(path)?;
        let version = read.specification_version;
        let weights = path.join(WEIGHTS);
        let blobs = match fs::symlink_metadata(&weights) {
            Ok(found) => {
                ensure!(found.is_dir(), "{WEIGHTS} is not a folder");
                open_blobs(&weights, version)?
            }
            Err(_) => Blobs::new(),
        };
        let file_bytes = read.bytes + blobs.values().map(BlobFile::length).sum::<u64>();
        let description = proto::ModelDescription::decode(&read.description[..]).context("its description")?;
        Ok(Self { version, compiler: read.compiler(), program: read.program, description, blobs, file_bytes })
    }
}

/// Of a file whose bytes are not those that were written.
fn damaged(file: &str, what: impl fmt::Display) -> anyhow::Error {
    anyhow!("{file} is damaged: {what}; export the package again")
}

/// Where the model cannot be decoded: prost tells the messages and fields around it, from within to without.
fn undecoded(error: &prost::DecodeError) -> String {
    let text = error.to_string();
    match text.split(": ").find(|part| part.contains('.') && !part.contains(' ')) {
        Some(field) => format!("its `{field}` cannot be decoded"),
        None => "it cannot be decoded".to_owned(),
    }
}

/// Checks the manifest; tells whether it lists a folder of weights.
fn check_manifest(package: &Path, manifest: &Value) -> Result<bool> {
    let text = |value: &Value, key: &str| match value.get(key) {
        Some(Value::String(text)) => Ok(text.clone()),
        _ => bail!("{key} is missing or no string"),
    };
    let version = text(manifest, "fileFormatVersion")?;
    ensure!(version == "1.0.0", "fileFormatVersion is {version:?}, not \"1.0.0\"");
    let root = text(manifest, "rootModelIdentifier")?;
    let Some(Value::Object(items)) = manifest.get("itemInfoEntries") else { bail!("itemInfoEntries is missing") };
    let mut seen: Vec<(&str, String)> = Vec::new();
    for (identifier, item) in items {
        let check = || -> Result<String> {
            let (path, name, author) = (text(item, "path")?, text(item, "name")?, text(item, "author")?);
            text(item, "description")?;
            ensure!(path == format!("{author}/{name}"), "path {path:?} is not author/name");
            ensure!(
                author == AUTHOR && (name == MODEL || name == WEIGHTS),
                "item {path:?} is neither {AUTHOR}/{MODEL} nor {AUTHOR}/{WEIGHTS}"
            );
            ensure!(seen.iter().all(|(_, other)| *other != name), "a second item {path:?}");
            let full = package.join("Data").join(&path);
            let kind = fs::symlink_metadata(&full).with_context(|| format!("Data/{path}"))?;
            ensure!(if name == MODEL { kind.is_file() } else { kind.is_dir() }, "Data/{path} is of another kind");
            Ok(name)
        };
        let name = check().with_context(|| format!("item {identifier:?}"))?;
        seen.push((identifier, name));
    }
    let model = seen.iter().find(|(identifier, _)| *identifier == root);
    ensure!(
        model.is_some_and(|(_, name)| name == MODEL),
        "rootModelIdentifier {root:?} is not the item {AUTHOR}/{MODEL}"
    );
    Ok(seen.iter().any(|(_, name)| name == WEIGHTS))
}

/// Every file of the folder of weights.
fn open_blobs(folder: &Path, version: i32) -> Result<Blobs> {
    let mut blobs = Blobs::new();
    for entry in fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))? {
        let entry = entry?;
        let path = entry.path();
        ensure!(entry.file_type()?.is_file(), "{} is not a regular file", path.display());
        let name = entry.file_name().into_string().ok().with_context(|| format!("bad name {}", path.display()))?;
        blobs.insert(name, BlobFile::open(&path, version)?);
    }
    Ok(blobs)
}

/// Compares described features with the program's own, which come in the same order.
fn features(
    described: Vec<proto::FeatureDescription>,
    names: &[String],
    checked: &Checked,
    version: i32,
) -> Result<Vec<Feature>> {
    let given: Vec<&str> = described.iter().map(|feature| feature.name.as_str()).collect();
    ensure!(given == names, "described are {given:?}, the program has {names:?}");
    ensure!(!names.is_empty() || version >= 9, "there are none");
    described
        .into_iter()
        .map(|feature| {
            let kind = checked.kinds.get(&feature.name).context("it is not defined")?;
            check_feature(&feature, kind, version).with_context(|| feature.name.clone())?;
            Ok(Feature { name: feature.name, kind: kind.clone(), description: feature.short_description })
        })
        .collect()
}

fn check_feature(feature: &proto::FeatureDescription, kind: &TensorType, version: i32) -> Result<()> {
    let described = feature.r#type.as_ref().context("it has no type")?;
    ensure!(!described.is_optional, "it is optional");
    ensure!(!kind.varying, "it is {kind}; flexible shapes are not read");
    match described.kind.as_ref().context("its type is neither an array nor an image")? {
        FeatureKind::MultiArray(array) => {
            let data_type = match array.data_type {
                proto::array_type::FLOAT16 if version >= 7 => DataType::Float16,
                proto::array_type::FLOAT32 => DataType::Float32,
                proto::array_type::INT32 => DataType::Int32,
                other => bail!("array type {other} is not allowed in specification version {version}"),
            };
            // A scalar is described as a vector of one element.
            let shape = if kind.shape.is_empty() { &[1][..] } else { &kind.shape };
            ensure!(
                data_type == kind.data_type && array.shape == shape,
                "described as {data_type}{:?}, the program has {kind}",
                array.shape
            );
        }
        FeatureKind::Image(image) => {
            let channels = match image.color_space {
                10 => 1,
                20 | 30 => 3,
                40 if version >= 7 => 1,
                other => bail!("colour space {other} is not known"),
            };
            let shape = [1, channels, image.height, image.width];
            ensure!(kind.shape == shape, "described as an image {shape:?}, the program has {kind}");
        }
    }
    Ok(())
}
