//! Checkpoints that a run resumes from: `checkpoints/step-000800/` with `state.safetensors` (weights, moments,
//! palettes) and `state.json` (step, config, what was learned from, a checksum of the tensors). Written beside and renamed;
//! the newest whole one counts. A folder whose name says another step than its `state.json` is a copy that somebody made:
//! it is not the run's.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::identity::Identity;
use super::trained::Trained;
use crate::files;
use crate::terminal::Progress;

const TENSORS: &str = "state.safetensors";
const FACTS: &str = "state.json";
/// All files of a checkpoint.
pub const FILES: [&str; 2] = [TENSORS, FACTS];

/// What a checkpoint says beside its tensors.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Facts {
    /// Optimizer steps done.
    pub step: u64,
    /// Whether assignments were frozen by then.
    pub frozen: bool,
    /// What was due after this step and is still to be done, because Ctrl-C cut it short: validating, sampling.
    #[serde(default)]
    pub skipped: Vec<String>,
    /// `config.resolved.toml` of the run, to refuse another run's state.
    pub config: String,
    /// None in those of older versions.
    #[serde(default)]
    pub learned_from: Option<Identity>,
    /// CRC-32 of `state.safetensors`; [`save`] fills it in. None in those of older versions.
    #[serde(default)]
    pub tensors_crc32: Option<u32>,
}

impl Facts {
    /// Whether the run had done all of its steps.
    pub fn is_last(&self) -> bool {
        let config = crate::config::parse_resolved(&self.config, FACTS);
        config.is_ok_and(|config| config.train.max_train_steps == self.step)
    }
}

/// Writes `folder/step-…`, then removes the oldest ones beyond `limit`, but for those that hold a user's files.
///
/// # Errors
/// The disk is full or not writable; older checkpoints are untouched then.
pub fn save(folder: &Path, facts: &Facts, trained: &Trained, limit: usize) -> Result<PathBuf> {
    let target = place(folder, facts.step);
    let state = trained.state()?;
    files::replace_folder(&target, |part| {
        let tensors = state.iter().map(|(name, tensor)| (name.as_str(), tensor));
        let sum = files::write_safetensors(&part.join(TENSORS), tensors, None, &Default::default())?;
        let facts = Facts { tensors_crc32: Some(sum), ..facts.clone() };
        files::write_bytes(&part.join(FACTS), &serde_json::to_vec_pretty(&facts)?)
    })
    .with_context(|| match list(folder).last() {
        Some((_, path)) => format!("step {} is not saved; {} is whole", facts.step, path.display()),
        None => format!("step {} is not saved", facts.step),
    })?;
    let all = list(folder);
    for (_, old) in all.iter().take(all.len().saturating_sub(limit)) {
        if stranger(old).is_none() {
            let _ = files::remove(old);
        }
    }
    Ok(target)
}

/// Where the checkpoint of a step lies.
pub fn place(folder: &Path, step: u64) -> PathBuf {
    folder.join(format!("step-{step:06}"))
}

/// The whole checkpoints in `folder`, oldest first.
pub fn list(folder: &Path) -> Vec<(u64, PathBuf)> {
    named(folder).into_iter().filter(|(step, path)| step_of(path).is_none_or(|own| own == *step)).collect()
}

/// The checkpoints in `folder` that are named after another step than theirs, each with its step.
pub fn misnamed(folder: &Path) -> Vec<(u64, PathBuf)> {
    let own = named(folder).into_iter().filter_map(|(step, path)| Some((step, step_of(&path)?, path)));
    own.filter(|(step, own, _)| step != own).map(|(_, own, path)| (own, path)).collect()
}

/// The checkpoints in `folder` with the steps that they are named after, oldest first.
fn named(folder: &Path) -> Vec<(u64, PathBuf)> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut found: Vec<(u64, PathBuf)> = entries
        .filter_map(|entry| {
            let step = entry.file_name().to_str()?.strip_prefix("step-")?.parse().ok()?;
            is_checkpoint(&entry.path()).then(|| (step, entry.path()))
        })
        .collect();
    found.sort();
    found
}

/// The step that a checkpoint's `state.json` says; None where it cannot be read.
fn step_of(checkpoint: &Path) -> Option<u64> {
    #[derive(Deserialize)]
    struct Step {
        step: u64,
    }
    let bytes = fs::read(checkpoint.join(FACTS)).ok()?;
    Some(serde_json::from_slice::<Step>(&bytes).ok()?.step)
}

/// A file in a checkpoint that is not the run's: a user's.
pub fn stranger(checkpoint: &Path) -> Option<PathBuf> {
    let mut entries = fs::read_dir(checkpoint).into_iter().flatten().flatten();
    entries.find(|file| !FILES.iter().any(|own| file.file_name() == *own)).map(|file| file.path())
}

/// Whether a folder is a whole checkpoint.
pub fn is_checkpoint(folder: &Path) -> bool {
    folder.join(FACTS).is_file() && folder.join(TENSORS).is_file()
}

/// The facts of one checkpoint.
///
/// # Errors
/// Its `state.json` is missing or not ours.
pub fn facts(checkpoint: &Path) -> Result<Facts> {
    let path = checkpoint.join(FACTS);
    let bytes = fs::read(&path).with_context(|| format!("can't read {}", path.display()))?;
    serde_json::from_slice(&bytes).with_context(|| damaged(checkpoint, FACTS))
}

/// Reads the tensors of a checkpoint once, and compares them with what was written.
///
/// # Errors
/// They are not what was written.
pub fn verify(checkpoint: &Path, facts: &Facts) -> Result<()> {
    let path = checkpoint.join(TENSORS);
    let Some(written) = facts.tensors_crc32 else { return Ok(()) };
    let megabytes = |bytes: u64| bytes / 1_000_000;
    let read = || -> std::io::Result<u32> {
        let total = megabytes(fs::metadata(&path)?.len());
        // A second or so.
        let mut bar = (total > 1000).then(|| Progress::new("reading the checkpoint", 0, total).counting("MB"));
        files::crc32(&path, |bytes| {
            if let Some(bar) = &mut bar {
                bar.update(megabytes(bytes), &[]);
            }
        })
    };
    if read().with_context(|| format!("cannot read {}", path.display()))? != written {
        bail!("{}", damaged(checkpoint, TENSORS));
    }
    Ok(())
}

/// What is said of a checkpoint whose `file` is not as it was written.
fn damaged(checkpoint: &Path, file: &str) -> String {
    format!(
        "the checkpoint {} is damaged: {file} is not as it was written; delete that folder to resume from the checkpoint \
         before it",
        checkpoint.display()
    )
}

/// The tensors of one checkpoint.
///
/// # Errors
/// The file is damaged.
pub fn tensors(checkpoint: &Path) -> Result<files::TensorFile> {
    files::TensorFile::open(&checkpoint.join(TENSORS)).with_context(|| damaged(checkpoint, TENSORS))
}
