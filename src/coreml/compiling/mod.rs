//! Compiling packages: `NAME.mlmodelc`, the folder that apps load and that `xcrun coremlcompiler compile` makes of a package
//! on a Mac.
//!
//! Of an ML Program that compiler changes nothing: it prints the program as text, copies the weights, and writes what callers
//! see into two files. So it can be done on any machine. The rules here were read off pairs of a package and what Apple's
//! compiler made of it (specification 6 to 9); what none of them shows is [refused](Unsupported), not guessed.
//!
//! | file of the folder | room | what |
//! |---|---|---|
//! | `model.mil` | `text`, `values` | the program as text |
//! | `coremldata.bin`, `analytics/coremldata.bin` | `data` | what callers see, as in the package; the model's digest |
//! | `metadata.json` | `metadata`, `versions` | the same for tools and apps, with the kinds of operations |
//! | `weights/` | `weights` | the package's own files, shared with it where the disk can |
//!
//! `source` says what is compiled and what is not; `check` reads the folder back, by a parser that shares nothing with
//! the printer, before it comes to its place.

mod check;
mod data;
mod metadata;
mod source;
mod text;
mod unsupported;
mod values;
mod versions;
mod weights;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use self::source::{PackageFiles, Source};
pub use self::unsupported::Unsupported;
pub use self::weights::Shared;
use crate::files::{at_place, replace_folder, write_folder};

/// What is at the place of a compiled model and stays there.
#[derive(Debug, thiserror::Error)]
pub enum InTheWay {
    #[error("{} exists already and is left as it is", .0.display())]
    Compiled(PathBuf),
    #[error("{} exists and is not a compiled Core ML model: it is left as it is", .0.display())]
    Other(PathBuf),
}

/// The files of a compiled model, weights aside.
#[derive(Clone, Debug, PartialEq)]
pub struct Compiled {
    /// `model.mil`
    pub program: String,
    /// `coremldata.bin`
    pub data: Vec<u8>,
    /// `analytics/coremldata.bin`
    pub analytics: Vec<u8>,
    /// `metadata.json`
    pub metadata: serde_json::Value,
}

impl Compiled {
    /// Compiles `model`, the bytes of a `model.mlmodel`. `name` is the package's name without its ending, which the class is
    /// named after that Xcode generates; `file` the model file's.
    ///
    /// # Errors
    /// [`Unsupported`]; the bytes are not a sound model.
    pub fn of(model: &[u8], name: &str, file: &str) -> Result<Self> {
        Self::of_source(&Source::of(model)?, model, name, file)
    }

    fn of_source(source: &Source, model: &[u8], name: &str, file: &str) -> Result<Self> {
        Ok(Self {
            program: text::print(source)?,
            data: data::coremldata(source),
            analytics: data::analytics(model, file),
            metadata: metadata::metadata(source, name)?,
        })
    }
}

/// Looks at the place of a compiled model, before the work.
///
/// # Errors
/// [`InTheWay`]: something is there that is not to be replaced, which without `overwrite` is anything.
pub fn check_place(place: &Path, overwrite: bool) -> Result<(), InTheWay> {
    match fs::symlink_metadata(place) {
        Err(_) => Ok(()),
        Ok(found)
            if !found.is_dir() || !["coremldata.bin", "model.mil"].iter().any(|file| place.join(file).is_file()) =>
        {
            Err(InTheWay::Other(place.to_owned()))
        }
        Ok(_) if !overwrite => Err(InTheWay::Compiled(place.to_owned())),
        Ok(_) => Ok(()),
    }
}

/// Compiles the package at `package` to the folder `place`: beside it first, read back and compared with the package, then
/// moved. `progress` hears how many bytes of how many of the weights are copied, where they are. Returns how the folder came
/// by its weights.
///
/// # Errors
/// [`InTheWay`], [`Unsupported`]; the package is not sound; the files cannot be written, or are not what was to be written.
pub fn compile(package: &Path, place: &Path, overwrite: bool, progress: &mut dyn FnMut(u64, u64)) -> Result<Shared> {
    check_place(place, overwrite)?;
    let files = PackageFiles::of(package).with_context(|| format!("cannot compile {}", package.display()))?;
    let context = || package.display().to_string();
    let source = Source::of(&files.model).with_context(context)?;
    weights::check(&source, &files.weights).with_context(context)?;
    let name = package.file_stem().unwrap_or_default().to_string_lossy();
    let compiled = Compiled::of_source(&source, &files.model, &name, &files.stem).with_context(context)?;
    let mut shared = Shared::None;
    let write = |folder: &Path| -> Result<()> {
        write_files(&compiled, folder)?;
        shared = weights::share(&files.weights, &folder.join("weights"), progress)?;
        check::same_as_package(folder, &source)
            .with_context(|| format!("{} was not written as it is", package.display()))
    };
    let written = if overwrite { replace_folder(place, write) } else { write_folder(place, write) };
    written.map_err(|error| at_place(error, place))?;
    Ok(shared)
}

/// Whether a compiled model says that it was made of this package's model: by a digest of it, which Apple's compiler writes
/// too. Of the weights it says nothing.
pub fn is_made_of(place: &Path, package: &Path) -> bool {
    let read = || {
        let files = PackageFiles::of(package).ok()?;
        let said = fs::read(place.join("analytics/coremldata.bin")).ok()?;
        Some(said == data::analytics(&files.model, &files.stem))
    };
    read().unwrap_or_default()
}

fn write_files(compiled: &Compiled, folder: &Path) -> Result<()> {
    let write = |name: &str, bytes: &[u8]| {
        let path = folder.join(name);
        fs::write(&path, bytes).with_context(|| format!("cannot write {}", path.display()))
    };
    write("model.mil", compiled.program.as_bytes())?;
    write("coremldata.bin", &compiled.data)?;
    let analytics = folder.join("analytics");
    fs::create_dir(&analytics).with_context(|| format!("cannot create {}", analytics.display()))?;
    write("analytics/coremldata.bin", &compiled.analytics)?;
    write("metadata.json", format!("{:#}\n", compiled.metadata).as_bytes())
}
