//! Trains a small CLIP that judges drawn pictures: which thing, colour, place and subject they show.
//!
//! ```text
//! cargo run --example train_judge -- OUT --train FOLDER … --validation FOLDER …
//! ```
//!
//! A folder holds pictures and `metadata.jsonl`: `file_name`, `text` (the caption) and any labels (`thing`, `color`, …), as
//! `draw_dataset` writes it. OUT becomes a folder of transformers' (CLIPModel), which `palettist evaluate --clip` takes. At
//! the end it is opened again and asked about each picture of the validation folders.
//!
//! Two losses (Radford et al. 2021, figure 3): captions against the pictures of a batch, where pictures of equal captions
//! count as each other's; and each label's value against all its values, as the judge will be asked. Pictures are shifted,
//! zoomed, tinted, blurred and noised, so that what counts is what they show and not how clean they are.
//!
//! Every so many steps all is kept in OUT.state.safetensors: the same command resumes there. A run that was cut off gives
//! the same CLIP as one that was not.

mod drawings;
mod model;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use drawings::Drawings;
use model::{Judge, Sizes};
use palettist::judge::{Choices, Clip, right};
use palettist::terminal::Progress;
use palettist::torch::random::{Purpose, generator};
use rand::seq::SliceRandom;
use tch::Device;

/// Trains a small CLIP on drawn pictures with labels.
#[derive(Parser)]
struct Arguments {
    /// A new folder for the CLIP.
    out: PathBuf,
    /// Folders with pictures and metadata.jsonl to learn from.
    #[arg(long, required = true, num_args = 1.., value_name = "FOLDER")]
    train: Vec<PathBuf>,
    /// Folders to be asked about at the end.
    #[arg(long, required = true, num_args = 1.., value_name = "FOLDER")]
    validation: Vec<PathBuf>,
    /// The folder of a tokenizer.
    #[arg(long, default_value = "examples/base/tokenizer", value_name = "FOLDER")]
    tokenizer: PathBuf,
    #[arg(long, default_value_t = 2000)]
    steps: usize,
    #[arg(long, default_value_t = 48)]
    batch: usize,
    #[arg(long, default_value_t = 1e-3)]
    learning_rate: f64,
    /// Side of the pictures that the judge sees, in pixels.
    #[arg(long, default_value_t = 48)]
    side: u32,
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    ensure!(!arguments.out.exists(), "{} exists already", arguments.out.display());
    let training = Drawings::read(&arguments.train, arguments.side)?;
    println!("{} pictures; {}", training.len(), training.summary());
    let mut judge =
        Judge::new(&Sizes { side: arguments.side, ..Sizes::default() }, &arguments.tokenizer, arguments.seed)?;
    let state = arguments.out.with_extension("state.safetensors");
    learn(&mut judge, &training, &arguments, &state)?;
    judge.save(&arguments.out, &arguments.tokenizer)?;
    if state.exists() {
        std::fs::remove_file(&state).with_context(|| format!("cannot remove {}", state.display()))?;
    }
    // What was written is asked, in fp16 and by the program's own code.
    let clip = Clip::open(&arguments.out.display().to_string(), Device::Cpu)?;
    for folder in &arguments.validation {
        let drawings = Drawings::read(std::slice::from_ref(folder), arguments.side)?;
        println!("{}: {} pictures", folder.display(), drawings.len());
        ask(&clip, &drawings, &training)?;
    }
    Ok(())
}

/// How often the state is kept, in steps.
const KEEP_EVERY: usize = 100;

fn learn(judge: &mut Judge, training: &Drawings, arguments: &Arguments, state: &Path) -> Result<()> {
    let batch = arguments.batch.clamp(1, training.len());
    let settings = format!("{} steps of {batch}, {}, seed {}", arguments.steps, training.summary(), arguments.seed);
    let first = judge.resume(state, &settings)?;
    let batches = training.len() / batch;
    let mut order: Vec<usize> = Vec::new();
    let mut bar = Progress::new("training", first as u64, arguments.steps as u64);
    let mut shown = None;
    for step in first..arguments.steps {
        if order.is_empty() || step % batches == 0 {
            order = (0..training.len()).collect();
            order.shuffle(&mut generator(arguments.seed, Purpose::Order, (step / batches) as u64));
        }
        // What is drawn by lot depends on the step, not on where a run began.
        tch::manual_seed((arguments.seed << 32 | step as u64) as i64);
        let which = &order[step % batches * batch..][..batch];
        let loss = judge.step(training, which, rate(step, arguments))?;
        ensure!(loss.is_finite(), "the loss is {loss} at step {step}; try a smaller --learning-rate");
        let average = shown.map_or(loss, |shown| shown + 0.05 * (loss - shown));
        shown = Some(average);
        bar.update(step as u64 + 1, &[("loss", average)]);
        if (step + 1) % KEEP_EVERY == 0 {
            judge.keep(state, step + 1, &settings)?;
        }
    }
    bar.finish();
    Ok(())
}

/// Up over the first twentieth, then down to zero along half a cosine.
fn rate(step: usize, arguments: &Arguments) -> f64 {
    let warm = (arguments.steps / 20).max(1);
    if step < warm {
        return arguments.learning_rate * (step + 1) as f64 / warm as f64;
    }
    let done = (step - warm) as f64 / (arguments.steps - warm).max(1) as f64;
    arguments.learning_rate * 0.5 * (1.0 + (std::f64::consts::PI * done).cos())
}

/// Prints of each label how often the judge is right, choosing among all values that were trained on.
fn ask(clip: &Clip, drawings: &Drawings, training: &Drawings) -> Result<()> {
    let choices = Choices::new(clip, &drawings.prompts(), &training.values())?;
    let shown = choices.shown(&clip.pictures(&drawings.pictures.iter().collect::<Vec<_>>())?);
    for (label, values) in choices.counts() {
        let asked: Vec<(&str, &str)> = shown
            .iter()
            .zip(&drawings.labels)
            .filter_map(|(shown, labels)| Some((*shown.get(label)?, labels.get(label)?.as_str())))
            .collect();
        let wrong: Vec<&(&str, &str)> = asked.iter().filter(|(shown, asked)| shown != asked).collect();
        let share = 100.0 * (1.0 - wrong.len() as f64 / asked.len() as f64);
        let examples: Vec<String> =
            wrong.iter().take(6).map(|(shown, asked)| format!("{asked} taken for {shown}")).collect();
        let examples = if examples.is_empty() { String::new() } else { format!(" ({})", examples.join("; ")) };
        println!("  {label}: {share:.1} % right of {}, among {values}{examples}", asked.len());
    }
    let is_right = |(shown, labels): &(&BTreeMap<&str, &str>, &BTreeMap<String, String>)| {
        right(shown, labels).values().all(|&score| score > 0.0)
    };
    let right = shown.iter().zip(&drawings.labels).filter(is_right).count();
    let share = 100.0 * right as f64 / Some(drawings.len()).filter(|&count| count > 0).context("no pictures")? as f64;
    println!("  all labels of a picture: {share:.1} % right");
    Ok(())
}
