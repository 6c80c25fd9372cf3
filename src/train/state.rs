//! Checkpoints that a run resumes from: `checkpoints/step-000800/` with `state.safetensors` (weights, moments,
//! palettes) and `state.json` (step, config, what was learned from). Written beside and renamed; the newest whole one
//! counts.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::identity::Identity;
use super::trained::Trained;
use crate::files;

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
}

impl Facts {
    /// Whether the run had done all of its steps.
    pub fn is_last(&self) -> bool {
        let config = crate::config::parse_resolved(&self.config, FACTS);
        config.is_ok_and(|config| config.train.max_train_steps == self.step)
    }
}

/// Writes `folder/step-…`, then removes the oldest ones beyond `limit`.
///
/// # Errors
/// The disk is full or not writable; older checkpoints are untouched then.
pub fn save(folder: &Path, facts: &Facts, trained: &Trained, limit: usize) -> Result<PathBuf> {
    let target = folder.join(format!("step-{:06}", facts.step));
    let state = trained.state();
    files::replace_folder(&target, |part| {
        let tensors = state.iter().map(|(name, tensor)| (name.as_str(), tensor));
        files::write_safetensors(&part.join(TENSORS), tensors, None, &Default::default())?;
        files::write_bytes(&part.join(FACTS), &serde_json::to_vec_pretty(facts)?)
    })
    .with_context(|| match list(folder).last() {
        Some((_, path)) => format!("step {} is not saved; {} is whole", facts.step, path.display()),
        None => format!("step {} is not saved", facts.step),
    })?;
    let all = list(folder);
    for (_, old) in all.iter().take(all.len().saturating_sub(limit)) {
        let _ = files::remove(old);
    }
    Ok(target)
}

/// The whole checkpoints in `folder`, oldest first.
pub fn list(folder: &Path) -> Vec<(u64, PathBuf)> {
    let mut found: Vec<(u64, PathBuf)> = fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let step = entry.file_name().to_str()?.strip_prefix("step-")?.parse().ok()?;
            is_checkpoint(&entry.path()).then(|| (step, entry.path()))
        })
        .collect();
    found.sort();
    found
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
    serde_json::from_slice(&bytes).with_context(|| format!("{} is not a checkpoint's state", path.display()))
}

/// The tensors of one checkpoint.
///
/// # Errors
/// The file is damaged.
pub fn tensors(checkpoint: &Path) -> Result<files::TensorFile> {
    files::TensorFile::open(&checkpoint.join(TENSORS)).with_context(|| {
        format!("the checkpoint {} is damaged; delete it to resume from the one before", checkpoint.display())
    })
}
