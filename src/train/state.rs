//! Checkpoints that a run resumes from: `checkpoints/step-000800/` with `state.safetensors` (weights, moments,
//! palettes) and `state.json` (step and config). Written beside and renamed; the newest whole one counts.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::trained::Trained;
use crate::config::Config;
use crate::source::files;

const TENSORS: &str = "state.safetensors";
const FACTS: &str = "state.json";

/// What a checkpoint says beside its tensors.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Facts {
    /// Optimizer steps done.
    pub step: u64,
    /// Whether assignments were frozen by then.
    pub frozen: bool,
    /// `config.resolved.toml` of the run, to refuse another run's state.
    pub config: String,
}

/// Writes `folder/step-…`, then removes the oldest ones beyond `limit`.
///
/// # Errors
/// The disk is full or not writable; older checkpoints are untouched then.
pub fn save(folder: &Path, facts: &Facts, trained: &Trained, limit: usize) -> Result<PathBuf> {
    let target = folder.join(format!("step-{:06}", facts.step));
    if target.exists() {
        // Only a run that saved, went on and was resumed from an older one gets here: the states are equal.
        fs::remove_dir_all(&target).with_context(|| format!("cannot replace {}", target.display()))?;
    }
    let state = trained.state();
    files::write_atomically(&target, |part| {
        let tensors = state.iter().map(|(name, tensor)| (name.as_str(), tensor));
        files::write_safetensors(&part.join(TENSORS), tensors, None, &Default::default())?;
        files::write_bytes(&part.join(FACTS), &serde_json::to_vec_pretty(facts)?)
    })?;
    let all = list(folder);
    for (_, old) in all.iter().take(all.len().saturating_sub(limit)) {
        let _ = fs::remove_dir_all(old);
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
            entry.path().join(FACTS).is_file().then(|| (step, entry.path()))
        })
        .collect();
    found.sort();
    found
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

/// Refuses a state whose run learned something else: of the config, only what does not change the weights may differ,
/// and, with a notice, how long and how fast is learned.
///
/// # Errors
/// Names the first line that differs.
pub fn check_same_run(before: &str, config: &Config) -> Result<()> {
    let old = crate::config::parse_resolved(before, "its config.resolved.toml")?;
    let neutral = |config: &Config| {
        let mut config = config.clone();
        config.sample = Default::default();
        config.logging = Default::default();
        config.checkpoint = Default::default();
        config.export = Default::default();
        config.validation.every_n_steps = 0;
        config.train.gradient_checkpointing = false;
        config.output_dir = PathBuf::new();
        config.data.cache_dir = PathBuf::new();
        config
    };
    let (mut old, mut new) = (neutral(&old), neutral(config));
    let (length, rate) = (old.train.max_train_steps, old.train.learning_rate);
    if length != new.train.max_train_steps || rate != new.train.learning_rate {
        eprintln!(
            "note: this run began with max_train_steps = {length} and learning_rate = {rate:?}; from here on it has {} and \
             {:?}",
            new.train.max_train_steps, new.train.learning_rate
        );
    }
    for config in [&mut old, &mut new] {
        let defaults = Config::default();
        config.train.max_train_steps = defaults.train.max_train_steps;
        config.train.learning_rate = defaults.train.learning_rate;
        config.train.text_encoder_lr = defaults.train.text_encoder_lr;
        config.palettize.palette_learning_rate = defaults.palettize.palette_learning_rate;
    }
    let (old, new) = (old.resolved_toml(), new.resolved_toml());
    match old.lines().zip(new.lines()).find(|(a, b)| a != b) {
        Some((a, b)) => bail!(
            "the run to resume has `{a}`, the config now `{b}`: resuming would not be the same run; change it back, or \
             set another output_dir"
        ),
        None if old != new => bail!("the config is not the one of the run to resume; set another output_dir"),
        None => Ok(()),
    }
}
