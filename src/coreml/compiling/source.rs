//! What is compiled: a package's files, its model's description and its program, and what of it is refused.
//!
//! The description goes into the compiled folder byte by byte, so it is taken out of the model as it is there; what it says
//! is decoded beside that, with the fields that tell of more than is compiled here.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use prost::Message;

use super::unsupported::unsupported;
use crate::coreml::format::proto::{FeatureDescription, FeatureKind, Metadata, Model, Program};

/// The largest `model.mlmodel` that a protobuf library reads.
const LARGEST_MODEL: u64 = (1 << 31) - 1;

/// The files of a package.
pub struct PackageFiles {
    /// The bytes of the model.
    pub model: Vec<u8>,
    /// The name of its file, without the ending.
    pub stem: String,
    /// The files of its weights.
    pub weights: Vec<PathBuf>,
}

impl PackageFiles {
    /// The files of the package at `path`, which its manifest names.
    pub fn of(path: &Path) -> Result<Self> {
        ensure!(path.exists(), "there is no such folder");
        ensure!(path.is_dir(), "it is a file; a package is a folder, NAME.mlpackage");
        let manifest = path.join("Manifest.json");
        ensure!(manifest.is_file(), "Manifest.json is missing: it is not a package, or not all of one");
        let manifest: serde_json::Value =
            serde_json::from_slice(&read(&manifest, 1 << 20)?).context("Manifest.json is not valid JSON")?;
        let root = manifest.get("rootModelIdentifier").and_then(serde_json::Value::as_str);
        let item = root.and_then(|root| manifest.get("itemInfoEntries")?.get(root)?.get("path")?.as_str());
        let item = item.context("Manifest.json does not say which file is the model")?;
        let plain = item.split('/').all(|part| !matches!(part, "" | "." | "..")) && !item.contains('\\');
        ensure!(plain, "Manifest.json: the path {item:?} leads out of the package");
        let file = path.join("Data").join(item);
        let folder = file.parent().context("the model lies in no folder")?.join("weights");
        let mut weights = Vec::new();
        if fs::symlink_metadata(&folder).is_ok() {
            for entry in fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))? {
                let entry = entry?;
                ensure!(entry.file_type()?.is_file(), "{} is not a regular file", entry.path().display());
                weights.push(entry.path());
            }
            weights.sort();
        }
        let stem = file.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        Ok(Self { model: read(&file, LARGEST_MODEL)?, stem, weights })
    }
}

fn read(path: &Path, limit: u64) -> Result<Vec<u8>> {
    let found = fs::symlink_metadata(path).with_context(|| format!("{} is missing", path.display()))?;
    ensure!(found.is_file(), "{} is not a regular file", path.display());
    ensure!(found.len() <= limit, "{} has more than {limit} bytes", path.display());
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

/// A model that is compiled.
pub struct Source {
    pub specification_version: i32,
    pub program: Program,
    /// What callers see, as the model has it.
    pub description: Vec<u8>,
    /// The same, decoded.
    pub described: Description,
}

impl Source {
    /// Reads the bytes of a `model.mlmodel`.
    ///
    /// # Errors
    /// [`Unsupported`](super::Unsupported); the bytes are not a model.
    pub fn of(model: &[u8]) -> Result<Self> {
        let damaged = "model.mlmodel is damaged: it cannot be decoded";
        let fields = Fields(model).collect::<Result<Vec<_>>>().context(damaged)?;
        let mut descriptions = fields.iter().filter(|(number, _)| *number == 2);
        let (Some((_, description)), None) = (descriptions.next(), descriptions.next()) else {
            bail!("the model has no description, or more than one");
        };
        let kinds: Vec<u64> = fields.iter().map(|(number, _)| *number).filter(|number| *number >= 200).collect();
        match kinds[..] {
            [502] => {}
            [200..=202] => unsupported("it is a pipeline of several models")?,
            [] => bail!("the model holds no program"),
            _ => unsupported("it is not an ML Program")?,
        }
        let decoded = Model::decode(model).ok().context(damaged)?;
        let version = decoded.specification_version;
        match version {
            6..=9 => {}
            10.. => unsupported(&format!("it is of specification version {version}, and 6 to 9 are known"))?,
            _ => bail!("its specification version is {version}, and ML Programs have 6 or more"),
        }
        if decoded.is_updatable {
            unsupported("it is updatable")?;
        }
        let program = decoded.ml_program.context("the model holds no program")?;
        let described = Description::decode(*description).ok().context(damaged)?;
        described.check()?;
        let named = described.functions.iter().map(|function| function.name.as_str());
        let named: Vec<&str> = if described.functions.is_empty() { vec!["main"] } else { named.collect() };
        let mut sorted = named.clone();
        sorted.sort_unstable();
        let functions: Vec<&str> = program.functions.keys().map(String::as_str).collect();
        ensure!(
            sorted == functions,
            "its description is of the functions {named:?}, and the program has {functions:?}"
        );
        Ok(Self { specification_version: version, program, description: description.to_vec(), described })
    }

    /// The inputs and outputs of what is called where no function is named.
    pub fn default_features(&self) -> Result<(&[FeatureDescription], &[FeatureDescription])> {
        let described = &self.described;
        if described.functions.is_empty() {
            return Ok((&described.input, &described.output));
        }
        let default = described.functions.iter().find(|function| function.name == described.default_function);
        let default = default.context("the default function is not one of the functions")?;
        Ok((&default.input, &default.output))
    }

    /// The function that is called where none is named.
    pub fn default_function(&self) -> &str {
        if self.described.functions.is_empty() { "main" } else { &self.described.default_function }
    }
}

/// The fields of a message that are bytes or numbers, with their numbers; of numbers nothing is kept.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn number(&mut self) -> Option<u64> {
        let mut number = 0u64;
        for place in 0..10 {
            let (&byte, rest) = self.0.split_first()?;
            self.0 = rest;
            number |= u64::from(byte & 0x7f).checked_shl(7 * place)?;
            if byte < 0x80 {
                return Some(number);
            }
        }
        None
    }

    fn take(&mut self, count: u64) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(usize::try_from(count).ok()?)?;
        self.0 = rest;
        Some(taken)
    }

    fn field(&mut self) -> Option<(u64, &'a [u8])> {
        let key = self.number()?;
        let value = match key & 7 {
            0 => self.number().map(|_| &self.0[..0])?,
            1 => self.take(8)?,
            2 => self.number().and_then(|length| self.take(length))?,
            5 => self.take(4)?,
            _ => return None,
        };
        Some((key >> 3, value))
    }
}

impl<'a> Iterator for Fields<'a> {
    type Item = Result<(u64, &'a [u8])>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let field = self.field().context("a field is cut off");
        if field.is_err() {
            self.0 = &[];
        }
        Some(field)
    }
}

/// A `ModelDescription` with all that tells whether it is compiled here. Numbers of fields are those of Apple's format.
#[derive(Clone, PartialEq, Message)]
pub struct Description {
    #[prost(message, repeated, tag = "1")]
    pub input: Vec<FeatureDescription>,
    #[prost(message, repeated, tag = "10")]
    pub output: Vec<FeatureDescription>,
    #[prost(string, tag = "11")]
    predicted_feature: String,
    #[prost(message, repeated, tag = "13")]
    state: Vec<FeatureDescription>,
    #[prost(message, repeated, tag = "20")]
    pub functions: Vec<FunctionDescription>,
    #[prost(string, tag = "21")]
    pub default_function: String,
    #[prost(message, repeated, tag = "50")]
    training_input: Vec<FeatureDescription>,
    #[prost(message, optional, tag = "100")]
    pub metadata: Option<Metadata>,
}

#[derive(Clone, PartialEq, Message)]
pub struct FunctionDescription {
    #[prost(string, tag = "1")]
    pub name: String,
    #[prost(message, repeated, tag = "2")]
    pub input: Vec<FeatureDescription>,
    #[prost(message, repeated, tag = "3")]
    pub output: Vec<FeatureDescription>,
    #[prost(string, tag = "4")]
    predicted_feature: String,
    #[prost(message, repeated, tag = "6")]
    state: Vec<FeatureDescription>,
}

impl Description {
    fn check(&self) -> Result<()> {
        let functions = &self.functions;
        let states = self.state.len() + functions.iter().map(|function| function.state.len()).sum::<usize>();
        if states > 0 {
            unsupported("it has states")?;
        }
        let classifies = functions.iter().any(|function| !function.predicted_feature.is_empty());
        if classifies || !self.predicted_feature.is_empty() {
            unsupported("it is a classifier")?;
        }
        if !self.training_input.is_empty() {
            unsupported("it is updatable")?;
        }
        let of_functions = functions.iter().flat_map(|function| function.input.iter().chain(&function.output));
        self.input.iter().chain(&self.output).chain(of_functions).try_for_each(check_feature)
    }
}

/// Refuses what has no shape, or several.
fn check_feature(feature: &FeatureDescription) -> Result<()> {
    let flexible = match feature.r#type.as_ref().and_then(|kind| kind.kind.as_ref()) {
        Some(FeatureKind::Image(image)) => image.sizes.is_some() || image.range.is_some(),
        Some(FeatureKind::MultiArray(array)) => array.shapes.is_some() || array.range.is_some(),
        None => unsupported(&format!("{:?} is neither an array nor an image", feature.name))?,
    };
    if flexible { unsupported(&format!("{:?} has a flexible shape", feature.name)) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_that_are_cut_off_or_of_no_kind_are_refused() {
        let message = [0x08, 0x07, 0x12, 0x02, 1, 2, 0x1d, 0, 0, 0, 0];
        let fields: Vec<_> = Fields(&message).map(Result::unwrap).collect();
        assert_eq!(fields, [(1, &[][..]), (2, &[1, 2]), (3, &[0, 0, 0, 0])]);
        for cut in [1, 3, 4, 5, 7, 10] {
            assert!(Fields(&message[..cut]).any(|field| field.is_err()), "{cut}");
        }
        for broken in [&[0x0b][..], &[0x80; 12], &[0x12, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1]] {
            assert!(Fields(broken).any(|field| field.is_err()), "{broken:?}");
        }
    }
}
