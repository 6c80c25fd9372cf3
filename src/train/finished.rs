//! `finished.json`: that a run is finished, and its results by their content, so that what somebody changed since is known.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::identity::Identity;
use crate::coreml::PackageMetadata;
use crate::data::listing::is_of_the_system;
use crate::files::hex;

/// What `finished.json` says.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Finished {
    /// Optimizer steps done.
    pub step: u64,
    /// `config.resolved.toml` of the run when its results were written.
    pub config: String,
    pub learned_from: Identity,
    /// Author, licence and base model of the packages.
    #[serde(default)]
    pub package: PackageMetadata,
    /// Of each result (a path in the folder) its files, with a hash of some of their bytes.
    pub results: BTreeMap<String, BTreeMap<String, String>>,
}

impl Finished {
    /// Whether a result is at `path` and not as the run wrote it: changed, damaged, with files that are gone or that somebody
    /// added.
    pub fn is_changed(&self, result: &str, path: &Path) -> bool {
        let Some(written) = self.results.get(result).filter(|_| path.exists()) else { return false };
        // What cannot be read is nothing that the run wrote.
        !marks(path).is_ok_and(|now| now == *written)
    }

    /// The first file of a result, at `path`, that is there and not as the run wrote it.
    pub fn changed_file(&self, result: &str, path: &Path) -> Option<PathBuf> {
        let written = self.results.get(result)?;
        let files = written.iter().map(|(file, mark)| (file_of(path, file), mark)).filter(|(file, _)| file.exists());
        files.into_iter().find(|(file, written)| !mark(file).is_ok_and(|now| now == **written)).map(|(file, _)| file)
    }
}

/// A file of a result; without a name, the result itself.
pub fn file_of(result: &Path, file: &str) -> PathBuf {
    // Joining nothing would make a folder of it.
    if file.is_empty() { result.to_owned() } else { result.join(file) }
}

/// A hash of some bytes of each file of a result, without what systems leave in folders.
///
/// # Errors
/// A file can't be read.
pub fn marks(path: &Path) -> Result<BTreeMap<String, String>> {
    let files = if path.is_dir() { all_files(path) } else { vec![String::new()] };
    let ours = files.into_iter().filter(|file| !is_of_the_system(file.rsplit('/').next().unwrap_or_default()));
    ours.map(|file| Ok((file.clone(), mark(&file_of(path, &file))?))).collect()
}

/// All files below a folder, as paths in it, sorted.
pub fn all_files(folder: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            found.extend(all_files(&entry.path()).into_iter().map(|inner| format!("{name}/{inner}")));
        } else {
            found.push(name);
        }
    }
    found.sort();
    found
}

/// A hash of a file's size, its beginning, middle and end: enough to tell whether somebody changed it.
///
/// # Errors
/// It can't be read.
pub fn mark(path: &Path) -> Result<String> {
    const PIECE: u64 = 65536;
    let read = || -> std::io::Result<String> {
        let mut file = File::open(path)?;
        let size = file.metadata()?.len();
        let mut hash = Sha256::new();
        hash.update(size.to_le_bytes());
        for start in [0, size.saturating_sub(PIECE) / 2, size.saturating_sub(PIECE)] {
            file.seek(SeekFrom::Start(start))?;
            let mut piece = Vec::new();
            Read::by_ref(&mut file).take(PIECE).read_to_end(&mut piece)?;
            hash.update(&piece);
        }
        Ok(hex(&hash.finalize()[..16]))
    };
    read().with_context(|| format!("cannot read {}", path.display()))
}
