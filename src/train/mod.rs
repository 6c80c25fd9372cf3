//! Training: from a [`Config`] to `output_dir/`.
//!
//! [`run`] opens the model and the data (`setup`), then repeats one step: the weights that the networks see
//! (`trained`, palettes included), the loss (`objective`: `denoise` or `reconstruct`), the gradient, AdamW.
//! Everything random is a function of the seed and the step, and a checkpoint (`state`) holds the rest, so that a
//! run killed at any instant and resumed writes the same bytes as one that was not.

mod class_images;
mod denoise;
pub mod estimate;
pub mod evaluate;
mod examples;
pub mod fisher;
pub mod initialise;
mod learning_rate;
mod objective;
pub mod optimizer;
mod output;
pub mod palettes;
mod prompts;
mod reconstruct;
mod reporter;
pub mod sensitivity;
mod setup;
mod state;
pub mod trained;
mod validate;

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use tch::{Device, Kind};

pub use self::class_images::drawing;
use self::learning_rate::LearningRate;
use self::objective::Objective;
use self::optimizer::AdamW;
use self::output::OutputDir;
pub use self::output::is_occupied;
use self::reporter::Reporter;
pub use self::setup::supports;
use self::trained::{Slot, Trained};
use crate::config::{Config, DeviceChoice, MixedPrecision};
use crate::source::Component;
use crate::torch::random::{Purpose, generator};

/// Which state a run starts from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Resume {
    /// The newest checkpoint in `output_dir`, if there is one.
    Auto,
    /// From the beginning; an `output_dir` with a run in it is refused.
    Never,
    /// This checkpoint.
    From(PathBuf),
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    Done,
    /// Stopped by [`stop`], after saving.
    Stopped,
}

static STOP: AtomicBool = AtomicBool::new(false);

/// Asks a run in progress to save and end (Ctrl-C).
pub fn stop() {
    STOP.store(true, Ordering::Relaxed);
}

fn stopped() -> bool {
    STOP.load(Ordering::Relaxed)
}

/// [`stop`] was asked for amid work that can be cut short: what was finished is kept, nothing is half written.
#[derive(Debug, thiserror::Error)]
#[error("stopped; what was finished is kept, and the same command goes on")]
pub struct Stopped;

/// Called again and again by work that takes long.
///
/// # Errors
/// [`Stopped`] once [`stop`] was called.
pub fn go_on() -> Result<()> {
    if stopped() { Err(Stopped.into()) } else { Ok(()) }
}

/// What was looked at between two steps; nothing when the look was cut short, because the state is saved next.
fn unless_stopped<T>(looked: Result<T>) -> Result<Option<T>> {
    match looked {
        Err(error) if error.is::<Stopped>() => Ok(None),
        looked => looked.map(Some),
    }
}

/// Where and in what type a run computes.
pub fn device_and_kind(config: &Config) -> Result<(Device, Kind)> {
    let device = match config.train.device {
        DeviceChoice::Cpu => Device::Cpu,
        DeviceChoice::Cuda if !tch::Cuda::is_available() => {
            bail!("`train.device` is \"cuda\", but libtorch finds no CUDA GPU; `palettist doctor` says what it sees")
        }
        DeviceChoice::Cuda => Device::Cuda(0),
        DeviceChoice::Auto => Device::cuda_if_available(),
    };
    let kind = match config.train.mixed_precision {
        MixedPrecision::No => Kind::Float,
        MixedPrecision::Bf16 => Kind::BFloat16,
    };
    Ok((device, kind))
}

/// Trains as `config` says.
///
/// # Errors
/// One line: what, where, what to do. What was saved before stays usable. [`Stopped`] before the first step.
pub fn run(config: &Config, resume: &Resume) -> Result<Ended> {
    let (device, kind) = device_and_kind(config)?;
    let output = OutputDir::claim(config, resume)?;
    let resumed = output.resumed().map(state::facts).transpose()?;
    let setup::Setup { mut objective, mut trained, model } = setup::open(config, device, kind)?;
    if let (Some(facts), Some(checkpoint)) = (&resumed, output.resumed()) {
        trained
            .restore(&state::tensors(checkpoint)?, facts.frozen)
            .with_context(|| format!("the checkpoint {} does not fit this model and config", checkpoint.display()))?;
        eprintln!("resuming from {} (step {} of {})", checkpoint.display(), facts.step, config.train.max_train_steps);
    }
    let frozen = resumed.as_ref().is_some_and(|facts| facts.frozen);
    let start = resumed.map_or(0, |facts| facts.step);
    let reporter = Reporter::new(config, &output.folder, start)?;
    let mut run = Run { config, output: &output, schedules: Schedules::new(config), frozen, reporter };
    if run.steps(start, objective.as_mut(), &mut trained)? == Ended::Stopped {
        return Ok(Ended::Stopped);
    }
    output::finish(config, &output, &model, objective.as_mut(), &trained, &run.reporter)?;
    Ok(Ended::Done)
}

/// What changes with the step.
struct Schedules {
    rate: LearningRate,
    text_encoder_ratio: f64,
    palette_ratio: f64,
    freeze_at: u64,
    temperature: (f64, f64),
}

impl Schedules {
    fn new(config: &Config) -> Self {
        let train = &config.train;
        let palettize = &config.palettize;
        let steps = train.max_train_steps;
        Self {
            rate: LearningRate {
                shape: train.lr_scheduler,
                base: train.learning_rate,
                warmup: train.lr_warmup_steps,
                total: steps,
                cycles: train.lr_num_cycles as f64,
                power: train.lr_power,
            },
            text_encoder_ratio: train.text_encoder_lr / train.learning_rate,
            palette_ratio: palettize.palette_learning_rate / train.learning_rate,
            freeze_at: palettize.freeze_at(steps),
            temperature: (palettize.temperature_start, palettize.temperature_end),
        }
    }

    /// ρ of step `step`: geometric from start to end at the freezing (`palettize.temperature_*`).
    fn temperature(&self, step: u64) -> f64 {
        let progress = (step as f64 / self.freeze_at.max(1) as f64).min(1.0);
        self.temperature.0 * (self.temperature.1 / self.temperature.0).powf(progress)
    }
}

/// The loop's own state.
struct Run<'a> {
    config: &'a Config,
    output: &'a OutputDir,
    schedules: Schedules,
    frozen: bool,
    reporter: Reporter,
}

impl Run<'_> {
    fn steps(&mut self, start: u64, objective: &mut dyn Objective, trained: &mut Trained) -> Result<Ended> {
        let config = self.config;
        let total = config.train.max_train_steps;
        let every = |n: u64, step: u64| n > 0 && step.is_multiple_of(n);
        let minutes = Duration::from_secs(60 * config.checkpoint.checkpoint_every_n_minutes);
        let mut saved = Instant::now();
        for step in start..total {
            if config.palettize.enabled && !self.frozen && step >= self.schedules.freeze_at {
                trained.freeze_palettes()?;
                self.frozen = true;
            }
            self.step(step, objective, trained)?;
            let done = step + 1;
            if every(config.validation.every_n_steps, done) || done == total {
                if let Some(Some(loss)) = unless_stopped(objective.validate(&trained.shipped()?))? {
                    self.reporter.scalars(done, &[("loss/validation", loss)])?;
                    self.reporter.say(&format!("step {done}: validation loss {loss:.5}"));
                }
                self.reporter.skip_time();
            }
            if every(config.sample.sample_every_n_steps, done) {
                if let Some(pictures) = unless_stopped(objective.pictures(&trained.shipped()?))? {
                    self.reporter.pictures(done, &pictures)?;
                }
                self.reporter.skip_time();
            }
            let due =
                every(config.checkpoint.checkpointing_steps, done) || (!minutes.is_zero() && saved.elapsed() > minutes);
            if due || stopped() || done == total {
                let facts = state::Facts { step: done, frozen: self.frozen, config: config.resolved_toml() };
                let limit = config.checkpoint.checkpoints_total_limit;
                let path = state::save(&self.output.checkpoints(), &facts, trained, limit)?;
                saved = Instant::now();
                self.reporter.skip_time();
                if stopped() && done < total {
                    self.reporter
                        .say(&format!("stopped after step {done}; saved {}; the same command resumes", path.display()));
                    return Ok(Ended::Stopped);
                }
            }
        }
        self.reporter.finish();
        Ok(Ended::Done)
    }

    fn step(&mut self, step: u64, objective: &mut dyn Objective, trained: &mut Trained) -> Result<()> {
        let config = self.config;
        let train = &config.train;
        let stop = train.stop_text_encoder_training;
        let alone = self.frozen && !config.palettize.reestimate_norms_and_biases;
        let learns = |slot: &Slot| match slot.component {
            Component::TextEncoder => stop == 0 || step < stop,
            _ => slot.palette.is_some() || !alone,
        };
        let temperature = self.schedules.temperature(step);
        let begun = trained.begin(temperature, learns)?;
        let micro_steps = train.gradient_accumulation_steps as u64;
        let (mut loss, mut parts) = (0.0, Vec::new());
        for micro in 0..micro_steps {
            let one = objective.loss(&begun.networks, step * micro_steps + micro)?;
            let scaled = one.total / micro_steps as f64;
            loss += scaled.double_value(&[]);
            scaled.f_backward().map_err(crate::torch::error)?;
            parts = one.parts;
        }
        if !loss.is_finite() {
            bail!(
                "the loss of step {step} is not finite; the last checkpoint is whole: resume from it with a lower \
                 learning_rate"
            );
        }
        let rate = self.schedules.rate.at(step);
        let (text, palette) = (self.schedules.text_encoder_ratio, self.schedules.palette_ratio);
        let frozen = self.frozen;
        let rate_of = |slot: &Slot| match slot.component {
            Component::TextEncoder => rate * text,
            _ if frozen && slot.palette.is_some() => rate * palette,
            _ => rate,
        };
        let optimizer = &train.optimizer;
        let adamw = AdamW {
            beta1: optimizer.betas[0],
            beta2: optimizer.betas[1],
            eps: optimizer.eps,
            weight_decay: optimizer.weight_decay,
        };
        let mut random = generator(config.seed, Purpose::Rounding, step);
        let norm = trained.apply(begun, &adamw, train.max_grad_norm, &mut random, rate_of)?;
        if train.use_ema {
            // Young averages follow faster, as diffusers' EMAModel: (1 + step)/(10 + step).
            let young = (1 + step) as f64 / (10 + step) as f64;
            trained.update_average(train.ema_decay.min(young));
        }
        self.reporter.step(step + 1, loss);
        if !self.reporter.due(step + 1) {
            return Ok(());
        }
        let mut values = vec![("loss", loss), ("learning_rate", rate), ("gradient_norm", norm)];
        values.extend(parts.iter().map(|(name, value)| (*name, value.double_value(&[]))));
        if config.palettize.enabled {
            values.push(("palette_error", trained.palette_error()));
            if !frozen {
                values.push(("temperature", temperature));
            }
        }
        self.reporter.scalars(step + 1, &values)
    }
}
