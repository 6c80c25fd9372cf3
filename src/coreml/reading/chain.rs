//! Packages that run one after the other: the chunks of a UNet, as Apple's programs run them.
//!
//! Each package is given what the whole was given and what those before it gave, and the latter where both have a name.

use std::collections::BTreeMap;
use std::iter;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use tch::Tensor;

use super::evaluate::{Precision, evaluate_watched, peak_bytes};
use super::package::{Feature, Package};
use super::summary::WeightSummary;
use crate::coreml::format::metadata::CUT_FROM;

/// One package, or several of which each takes what the ones before it give.
#[derive(Debug)]
pub struct Chain {
    packages: Vec<Package>,
    inputs: Vec<Feature>,
}

impl From<Package> for Chain {
    fn from(package: Package) -> Self {
        Self { inputs: package.inputs().to_vec(), packages: vec![package] }
    }
}

impl Chain {
    /// Opens the package at `path`, compiled or not; where that is the first chunk by its name, the second too.
    ///
    /// # Errors
    /// When a package is not sound, or takes something as another type than it is given.
    pub fn open(path: &Path) -> Result<Self> {
        let paths = chunks(path);
        let packages: Vec<Package> = paths.iter().map(|path| Package::open(path)).collect::<Result<_>>()?;
        Self::new(packages)
    }

    /// `packages` in the order in which they run.
    ///
    /// # Errors
    /// When one takes something as another type than it is given, or not all that it is given; when chunks say that they
    /// were cut from different packages.
    pub fn new(packages: Vec<Package>) -> Result<Self> {
        let mut inputs: Vec<Feature> = Vec::new();
        let mut given: BTreeMap<&str, &Feature> = BTreeMap::new();
        for package in &packages {
            for input in package.inputs() {
                let Some(known) = given.get(input.name.as_str()) else {
                    given.insert(&input.name, input);
                    inputs.push(input.clone());
                    continue;
                };
                ensure!(
                    known.kind == input.kind,
                    "{} takes {} as {}, it is given {}",
                    package.path().display(),
                    input.name,
                    input.kind,
                    known.kind
                );
            }
            given.extend(package.outputs().iter().map(|output| (output.name.as_str(), output)));
        }
        ensure!(!packages.is_empty(), "there is no package to run");
        for (place, package) in packages.iter().enumerate() {
            let Some((next, behind)) = packages[place + 1..].split_first() else { continue };
            let (path, next_path) = (package.path().display(), next.path().display());
            let taken =
                |name: &str| iter::once(next).chain(behind).flat_map(Package::inputs).any(|input| input.name == name);
            if let Some(output) = package.outputs().iter().find(|output| !taken(&output.name)) {
                bail!("{next_path} does not take {}, which {path} gives: they are not of one export", output.name);
            }
            let cut_from = |package: &Package| package.metadata().user_defined.get(CUT_FROM).cloned();
            ensure!(
                cut_from(package) == cut_from(next),
                "{path} and {next_path} are halves of different packages: export again, with --chunk-unet --overwrite"
            );
        }
        Ok(Self { packages, inputs })
    }

    /// The packages in the order in which they run.
    pub fn packages(&self) -> &[Package] {
        &self.packages
    }

    /// Where the first was read from.
    pub fn path(&self) -> &Path {
        self.packages[0].path()
    }

    /// What must be given from outside.
    pub fn inputs(&self) -> &[Feature] {
        &self.inputs
    }

    /// What the last one gives.
    pub fn outputs(&self) -> &[Feature] {
        self.packages.last().map_or(&[], Package::outputs)
    }

    /// Runs one after the other, as [`evaluate_watched`] runs one.
    ///
    /// # Errors
    /// Those of [`evaluate_watched`].
    pub fn evaluate(
        &self,
        inputs: &BTreeMap<String, Tensor>,
        precision: Precision,
        watch: &mut dyn FnMut(&str, &Tensor) -> Result<()>,
    ) -> Result<BTreeMap<String, Tensor>> {
        let mut known: BTreeMap<String, Tensor> =
            inputs.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect();
        let mut outputs = BTreeMap::new();
        for package in &self.packages {
            let given = package.inputs().iter().map(|input| {
                let tensor = known.get(&input.name).with_context(|| format!("input {} is missing", input.name))?;
                Ok((input.name.clone(), tensor.shallow_clone()))
            });
            let given = given.collect::<Result<_>>()?;
            outputs = evaluate_watched(package, &given, precision, watch)?;
            known.extend(outputs.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())));
        }
        Ok(outputs)
    }

    /// The most bytes that the values of a run take at once, of what the packages hand on those of the largest only.
    pub fn peak_bytes(&self) -> u64 {
        self.packages.iter().map(peak_bytes).max().unwrap_or(0)
    }

    /// Bytes of all their files.
    pub fn file_bytes(&self) -> u64 {
        self.packages.iter().map(Package::file_bytes).sum()
    }

    /// How many operations they have together.
    pub fn operations(&self) -> usize {
        self.packages.iter().flat_map(|package| package.operation_counts().into_values()).sum()
    }

    /// The weights of all.
    ///
    /// # Errors
    /// Those of [`Package::weights`].
    pub fn weights(&self) -> Result<Vec<WeightSummary>> {
        let weights = self.packages.iter().map(Package::weights).collect::<Result<Vec<_>>>()?;
        Ok(weights.concat())
    }
}

/// The package at `path` and, where its name says that it is the first chunk, those behind it that are there.
fn chunks(path: &Path) -> Vec<PathBuf> {
    let mut paths = vec![path.to_path_buf()];
    if let Some(first) = Chunk::of(path).filter(|chunk| chunk.number == 1) {
        paths.extend((2..).map(|number| first.path(number)).take_while(|path| path.exists()));
    }
    paths
}

/// What is before and after the number in the names of chunks: those of packages, and those that Apple's programs look for.
const CHUNKS: [(&str, &str); 3] = [("_chunk", ".mlpackage"), ("_chunk", ".mlmodelc"), ("Chunk", ".mlmodelc")];

/// A path that is, by its name, that of one of a UNet's two chunks.
pub struct Chunk {
    /// 1 or 2.
    pub number: u32,
    folder: PathBuf,
    before: String,
    after: &'static str,
}

impl Chunk {
    pub fn of(path: &Path) -> Option<Self> {
        let name = path.file_name()?.to_str()?;
        CHUNKS.into_iter().find_map(|(before, after)| {
            let whole = name.strip_suffix(after)?;
            let number = [1, 2].into_iter().find(|number| whole.ends_with(&format!("{before}{number}")))?;
            let before = whole[..whole.len() - 1].to_owned();
            Some(Self { number, folder: path.with_file_name(""), before, after })
        })
    }

    /// Where the chunk of this number is, if it is anywhere.
    pub fn path(&self, number: u32) -> PathBuf {
        self.folder.join(format!("{}{number}{}", self.before, self.after))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_are_known_by_their_names() {
        let cases = [
            ("a/x_unet_chunk1.mlpackage", 1, "a/x_unet_chunk2.mlpackage"),
            ("x_unet_chunk2.mlmodelc", 2, "x_unet_chunk1.mlmodelc"),
            ("a/ControlledUnetChunk2.mlmodelc", 2, "a/ControlledUnetChunk1.mlmodelc"),
        ];
        for (path, number, other) in cases {
            let chunk = Chunk::of(Path::new(path)).unwrap();
            assert_eq!((chunk.number, chunk.path(3 - number)), (number, PathBuf::from(other)));
        }
        for path in ["x_unet.mlpackage", "x_chunk3.mlpackage", "UnetChunk1.mlpackage", "Unet.mlmodelc", "_chunk1"] {
            assert!(Chunk::of(Path::new(path)).is_none(), "{path}");
        }
    }
}
