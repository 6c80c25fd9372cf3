//! Compiled models, `NAME.mlmodelc`: what Apple's compiler, or this program, makes of a package.
//!
//! The text of the program is parsed into the messages that a package has, and from there on a compiled model is checked and
//! run as a package is. Nothing here is shared with what prints that text, and nothing is trusted.

mod data;
mod elements;
mod metadata;
mod number;
mod program;
mod words;

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use prost::Message;

use super::file::read_file;
use crate::coreml::format::proto::{ModelDescription, Program};

/// The largest of the files but the weights.
const LARGEST: u64 = (1 << 31) - 1;

/// The files whose names tell a compiled model.
const OWN_FILES: [&str; 2] = ["model.mil", "coremldata.bin"];

/// What a compiled model is, its weights aside.
pub struct Compiled {
    pub specification_version: i32,
    pub program: Program,
    /// What callers see: the message `ModelDescription`.
    pub description: Vec<u8>,
    /// Bytes of the files that were read.
    pub bytes: u64,
}

impl Compiled {
    /// Who compiled it, as its text says.
    pub fn compiler(&self) -> Option<String> {
        self.program.attributes.get("buildInfo")?.texts()?.into_iter().find_map(|(key, version)| {
            let compiler = ["palettist", "coremlc"].into_iter().find(|name| key == format!("{name}-version"))?;
            Some(format!("{compiler} {version}"))
        })
    }
}

/// Whether a folder is a compiled model or what is left of one.
pub fn is_compiled(folder: &Path) -> bool {
    let named = folder.extension().is_some_and(|extension| extension == "mlmodelc");
    folder.is_dir() && (named || OWN_FILES.iter().any(|file| folder.join(file).exists()))
}

/// Reads a compiled model and checks that its files are of one model.
///
/// # Errors
/// Names the file, where in it, and what is wrong.
pub fn read(folder: &Path) -> Result<Compiled> {
    for file in OWN_FILES.iter().chain(&["metadata.json"]) {
        ensure!(
            folder.join(file).symlink_metadata().is_ok(),
            "{file} is missing: it is not a compiled ML Program, or not all of one"
        );
    }
    let data = read_file(&folder.join("coremldata.bin"), LARGEST)?;
    let about = data::parse(&data).context("coremldata.bin")?;
    let text = read_file(&folder.join("model.mil"), LARGEST)?;
    let json = read_file(&folder.join("metadata.json"), 1 << 26)?;
    let bytes = (data.len() + text.len() + json.len()) as u64;
    let Ok(text) = String::from_utf8(text) else { bail!("model.mil is not text") };
    let (dialect, program) = program::parse(&text).context("model.mil")?;
    let wanted = if about.specification_version < 9 { "1.0" } else { "1.3" };
    ensure!(
        dialect == wanted,
        "model.mil is program({dialect}); specification version {} goes with program({wanted})",
        about.specification_version
    );
    let description = ModelDescription::decode(about.description).ok();
    let description = description.context("coremldata.bin: its description cannot be decoded")?;
    metadata::check(&json, about.specification_version, &description, &program).context("metadata.json")?;
    Ok(Compiled {
        specification_version: about.specification_version,
        program,
        description: about.description.to_vec(),
        bytes,
    })
}
