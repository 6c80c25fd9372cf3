//! What an app needs beside the packages: the folder `Resources/` that Apple's Swift package reads.
//!
//! It holds compiled packages, and the vocabulary and merges of the tokenizer. They are [compiled](crate::coreml::compiling)
//! here, on any machine. The script `compile.sh`, which is written too, does it again with Apple's compiler, on a Mac with
//! Xcode; there it is run at once.
//!
//! | room | what |
//! |---|---|
//! | `names` | what packages are called in an app |
//! | `script` | `compile.sh` |

mod names;
mod script;

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

pub(super) use self::names::{COMPILED, SAFETY_CHECKER};
use self::script::{SCRIPT, UNTOUCHED, digest, is_untouched, script};
use crate::coreml::AttentionImplementation;
use crate::coreml::compiling::{self, Shared, Unsupported, is_made_of};
use crate::coreml::components::Part;
use crate::coreml::format::metadata::PackageMetadata;
use crate::files::beside::{PART, beside};
use crate::files::rename::rename_new;
use crate::files::{settle, write_bytes};
use crate::source::Model;
use crate::terminal::shell_word;

pub use self::script::holds_bundle;

/// What [`Bundle::write`] made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bundled {
    pub resources: PathBuf,
    pub script: PathBuf,
    /// The compiled packages that were written, and how they came by their weights.
    pub compiled: Vec<(PathBuf, Shared)>,
    /// What could not be compiled here, or was left as it is: a line each.
    pub left: Vec<String>,
    /// Whether the script has been run, which takes a Mac.
    pub by_apple: bool,
}

impl Bundled {
    /// What is to be said of it: a line each.
    pub fn notes(&self) -> Vec<String> {
        let mut notes = self.left.clone();
        let script = shell_word(&self.script.to_string_lossy());
        if !self.by_apple {
            notes.push(format!(
                "compiled here as Apple's compiler does it; no device has loaded one of these yet. On a Mac, Apple's own \
                 compiles them again: sh {script}"
            ));
        }
        notes
    }
}

/// What is at the place of a file or folder of a bundle and stays there.
#[derive(Debug, thiserror::Error)]
pub enum InTheWay {
    #[error("{} exists already and is left as it is: --overwrite replaces it", .0.display())]
    Kept(PathBuf),
    #[error("{} is a link or no folder: nothing is written through it", .0.display())]
    NoFolder(PathBuf),
}

/// A bundle to be made.
#[derive(Clone, Copy, Debug)]
pub struct Bundle<'a> {
    /// Where the packages are, and where `Resources/` will be.
    pub folder: &'a Path,
    pub metadata: &'a PackageMetadata,
    /// The UNet's: the Diffusers app tells models apart by it.
    pub attention: AttentionImplementation,
    /// Names and contents of the tokenizer's files.
    pub tokenizer: &'a [(&'static str, String)],
    /// Last parts of the names of the packages that are written with it.
    pub written: &'a [String],
    /// Replaces what is there.
    pub overwrite: bool,
}

impl Bundle<'_> {
    /// Looks at all that it would replace, before the packages are written.
    ///
    /// # Errors
    /// The first file or compiled package that is there and is not to be replaced.
    pub fn check(&self) -> Result<(), InTheWay> {
        let resources = self.folder.join("Resources");
        if fs::symlink_metadata(&resources).is_ok_and(|found| !found.is_dir()) {
            return Err(InTheWay::NoFolder(resources));
        }
        if self.overwrite {
            return Ok(());
        }
        let own = self.tokenizer.iter().map(|(name, text)| (resources.join(name), text.as_str()));
        let kept = own.filter(|(path, text)| !is_free(path, |found| found == *text)).map(|(path, _)| path);
        let script = self.folder.join(SCRIPT);
        let script = Some(script).filter(|path| !is_free(path, is_untouched));
        match kept.chain(script).chain(self.outdated()).next() {
            Some(path) => Err(InTheWay::Kept(path)),
            None => Ok(()),
        }
    }

    /// Packages that were compiled of what was there before those that are written, whole or in chunks: they would pass for
    /// what is there now.
    fn outdated(&self) -> Vec<PathBuf> {
        let compiled = COMPILED
            .iter()
            .chain([&SAFETY_CHECKER])
            .filter(|(component, _)| self.written.iter().any(|written| written == component));
        let stems = compiled.map(|(_, compiled)| {
            ["Chunk1", "Chunk2"].iter().find_map(|chunk| compiled.strip_suffix(chunk)).unwrap_or(compiled)
        });
        let names = stems.flat_map(|stem| ["", "Chunk1", "Chunk2"].map(|chunk| format!("{stem}{chunk}.mlmodelc")));
        let paths = names.map(|name| self.folder.join("Resources").join(name));
        let mut found: Vec<PathBuf> = paths.filter(|path| fs::symlink_metadata(path).is_ok()).collect();
        found.sort();
        found.dedup();
        found
    }

    /// The packages of the model that are there, with the names that they get.
    fn packages(&self) -> Vec<(String, &'static str)> {
        let named = COMPILED.into_iter().chain([SAFETY_CHECKER]);
        let packages = named.map(|(component, compiled)| (self.metadata.package_name(component), compiled));
        packages.filter(|(package, _)| self.folder.join(package).is_dir()).collect()
    }

    /// Makes `Resources/` of the packages that are there and of the tokenizer, and the script. `progress` hears how many bytes
    /// of how many are copied of a package's weights, where they are not shared.
    ///
    /// # Errors
    /// Those of [`Self::check`]; when a package is not sound, or the files cannot be written or, on a Mac with Xcode, when
    /// its compiler fails.
    pub fn write(&self, progress: &mut dyn FnMut(u64, u64)) -> Result<Bundled> {
        self.check()?;
        let resources = self.folder.join("Resources");
        match fs::create_dir(&resources) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            made => made.with_context(|| format!("cannot create {}", resources.display()))?,
        }
        for (name, text) in self.tokenizer {
            self.put(&resources.join(name), text, |found| found == text)?;
        }
        if self.overwrite {
            for path in self.outdated() {
                remove(&path).with_context(|| format!("cannot remove {}", path.display()))?;
            }
        }
        let mut left = Vec::new();
        let compiled = self.compile(&resources, &mut left, progress)?;
        let path = self.folder.join(SCRIPT);
        let text = script(&self.packages(), self.metadata, self.attention);
        self.put(&path, &format!("{text}{UNTOUCHED}{}\n", digest(&text)), is_untouched)?;
        let by_apple = cfg!(target_os = "macos") && has_apples_compiler();
        if by_apple {
            let status = Command::new("sh").arg(&path).status().context("cannot run sh")?;
            if !status.success() {
                bail!("compiling failed; `sh {}` tries again", shell_word(&path.to_string_lossy()));
            }
        }
        Ok(Bundled { resources, script: path, compiled, left, by_apple })
    }

    /// Compiles the packages that are there; those that are compiled already only to replace them. `left` gets what is to be
    /// said of the rest.
    fn compile(
        &self,
        resources: &Path,
        left: &mut Vec<String>,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Vec<(PathBuf, Shared)>> {
        let mut compiled = Vec::new();
        for (package, name) in self.packages() {
            let (package, place) = (self.folder.join(package), resources.join(format!("{name}.mlmodelc")));
            if fs::symlink_metadata(&place).is_ok() && !self.overwrite {
                if !is_made_of(&place, &package) {
                    let (place, package) = (place.display(), package.display());
                    left.push(format!(
                        "{place} is not made of {package}, and is left as it is: --overwrite replaces it"
                    ));
                }
                continue;
            }
            match compiling::compile(&package, &place, self.overwrite, progress) {
                Ok(shared) => compiled.push((place, shared)),
                Err(error) if error.is::<Unsupported>() || error.is::<compiling::InTheWay>() => {
                    left.push(format!("{error:#}"));
                }
                Err(error) => return Err(error),
            }
        }
        for network in ["Unet", "ControlledUnet"] {
            let is_there = |chunk: &str| resources.join(format!("{network}{chunk}.mlmodelc")).exists();
            if is_there("") && is_there("Chunk1") {
                left.push(format!(
                    "{} holds {network} whole and in chunks, and programs take the chunks: remove those that are old",
                    resources.display()
                ));
            }
        }
        Ok(compiled)
    }

    /// Writes a file beside its place and renames it there: onto what is there where that is to be replaced or is `own`,
    /// a link itself and not what it leads to.
    fn put(&self, path: &Path, text: &str, own: impl Fn(&str) -> bool) -> Result<()> {
        let there = fs::symlink_metadata(path).is_ok();
        if there && !self.overwrite && !is_free(path, own) {
            return Err(InTheWay::Kept(path.to_owned()).into());
        }
        if there {
            return write_bytes(path, text.as_bytes());
        }
        let part = beside(path, PART);
        let written = fs::write(&part, text).and_then(|()| settle(&part)).and_then(|()| rename_new(&part, path));
        if let Err(error) = written {
            let _ = fs::remove_file(&part);
            if error.kind() == ErrorKind::AlreadyExists {
                return Err(InTheWay::Kept(path.to_owned()).into());
            }
            return Err(error).with_context(|| format!("cannot write {}", path.display()));
        }
        Ok(())
    }

    /// What Apple's programs will miss in the bundle of a model, and what they will not load: a line each.
    pub fn missing(&self, model: &Model) -> Vec<String> {
        let there = self.packages();
        let has = |name: &str| there.iter().any(|(_, compiled)| *compiled == name);
        let network = |name: &str| has(name) || (has(&format!("{name}Chunk1")) && has(&format!("{name}Chunk2")));
        let (unet, controlled) = (network("Unet"), network("ControlledUnet"));
        let mut needed = vec![("TextEncoder", Part::TextEncoder), ("VAEDecoder", Part::VaeDecoder)];
        if model.is_xl() {
            needed.insert(1, ("TextEncoder2", Part::TextEncoder2));
        }
        if !controlled {
            needed.push(("Unet", Part::Unet));
        }
        needed.retain(|(name, part)| if *part == Part::Unet { !unet } else { !has(name) });
        let mut lines = Vec::new();
        if !needed.is_empty() {
            let names: Vec<&str> = needed.iter().map(|(name, _)| *name).collect();
            let parts: Vec<&str> = needed.iter().map(|(_, part)| part.name()).collect();
            let many = if names.len() > 1 { "are" } else { "is" };
            let (names, parts) = (names.join(", "), parts.join(","));
            lines.push(format!("{names} {many} missing there, which Apple's programs need: add --component {parts}"));
        }
        if controlled && !unet {
            let without = "without --unet-support-controlnet";
            lines.push(match model.is_xl() {
                true => format!("Unet is missing there, which Apple's programs need: add --component unet, {without}"),
                false => format!(
                    "Unet is missing there, which Apple's programs need for pictures without a ControlNet: add --component \
                     unet, {without}"
                ),
            });
        }
        if controlled && !model.is_xl() {
            lines.push(
                "ControlledUnet needs ControlNets, compiled and of the same size and attention, in Resources/controlnet: \
                 Palettist does not export them"
                    .to_owned(),
            );
        }
        if !has("VAEEncoder") {
            lines.push(
                "without VAEEncoder, Apple's programs start from no picture, and Mochi Diffusion offers no ControlNets"
                    .to_owned(),
            );
        }
        lines
    }
}

/// Whether nothing is at a path, or a file, not a link, with a text that is `own`.
fn is_free(path: &Path, own: impl Fn(&str) -> bool) -> bool {
    match fs::symlink_metadata(path) {
        Err(error) => error.kind() == ErrorKind::NotFound,
        Ok(found) => found.is_file() && fs::read_to_string(path).is_ok_and(|text| own(&text)),
    }
}

/// Whether Xcode's compiler is on this machine.
fn has_apples_compiler() -> bool {
    let found = Command::new("xcrun").args(["--find", "coremlcompiler"]).output();
    found.is_ok_and(|found| found.status.success())
}

/// Removes a folder with all that is in it, or a link.
fn remove(path: &Path) -> std::io::Result<()> {
    if fs::symlink_metadata(path)?.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) }
}

#[cfg(test)]
mod tests;
