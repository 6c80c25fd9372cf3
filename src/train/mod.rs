//! Training: from a [`Config`] to `output_dir/`.
//!
//! [`run`] opens the model and the data (`setup`), then repeats one step: the weights that the networks see
//! (`trained`, palettes included), the loss (`objective`: `denoise` or `reconstruct`), the gradient, AdamW.
//! Everything random is a function of the seed and an example's position in the run, or the step's number, and a checkpoint
//! (`state`) holds the rest, so that a run killed at any instant and resumed writes the same bytes as one that was not.

mod class_images;
mod denoise;
mod divergence;
pub mod estimate;
pub mod evaluate;
mod examples;
mod finished;
pub mod fisher;
pub mod identity;
pub mod initialise;
mod learning_rate;
pub mod losses;
mod objective;
pub mod optimizer;
mod output;
pub mod palettes;
pub mod plan;
pub mod prompts;
mod reconstruct;
mod refused;
mod reporter;
pub mod run_folder;
pub mod sensitivity;
mod setup;
mod stages;
pub mod state;
mod stop;
pub mod teacher;
mod together;
pub mod trained;
mod validate;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use tch::{Device, Kind};

pub use self::class_images::drawing;
use self::identity::Identity;
use self::learning_rate::LearningRate;
use self::objective::{Objective, Part};
use self::optimizer::AdamW;
pub use self::output::export_plan;
use self::output::{Ending, OutputDir};
pub use self::palettes::file_of_palettes;
pub use self::plan::Resume;
use self::plan::{Action, Before};
pub use self::refused::{Refused, refused};
use self::reporter::{Reporter, SAMPLING, SAVING, VALIDATING};
pub use self::setup::{begins_from, identity as identity_of, manifest, merged, names_layers, open_model, supports};
pub use self::stages::Ended;
use self::stages::Stage;
use self::stop::stopped;
pub use self::stop::{Stopped, go_on, stop};
use self::trained::{Diverged, Slot, Trained};
use crate::config::{Config, DeviceChoice, MixedPrecision};
use crate::source::Component;
use crate::terminal::{note, tell};
use crate::torch::random::{Purpose, generator};

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
            return refused(
                "`train.device` is \"cuda\", but libtorch finds no CUDA GPU; `palettist doctor` says what it sees"
                    .into(),
            );
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

/// Trains as `config` says, in one stage or two.
///
/// # Errors
/// One line: what, where, what to do. What was saved before stays usable. [`Stopped`] before the first step.
pub fn run(config: &Config, resume: &Resume) -> Result<Ended> {
    stage(config, resume, Stage { before: config.first_stage_steps(), after: 0 })
}

/// Trains one stage of a run, the last or only one after the first of two.
fn stage(config: &Config, resume: &Resume, stage: Stage) -> Result<Ended> {
    let (device, kind) = device_and_kind(config)?;
    let plan = plan::plan(config, resume)?;
    if let Action::Finished { step, gone, learned_from } = plan.action {
        plan.notes.iter().for_each(note);
        let now = || setup::learns_from(config).ok();
        plan::is_finished(config, step, &gone, learned_from.as_deref(), now).iter().for_each(tell);
        return Ok(Ended::Done);
    }
    run_folder::check_writable(&config.output_dir).context("output_dir")?;
    run_folder::check_writable(&config.data.cache_dir).context("data.cache_dir")?;
    let (output, action) = OutputDir::claim(config, resume)?;
    let mut resumed = match action {
        Action::Resume(resumed) => Some(resumed),
        Action::Start => None,
        // By another run, just now.
        Action::Finished { .. } => return Ok(Ended::Done),
    };
    if let Some(resumed) = &resumed {
        state::verify(&resumed.checkpoint, &resumed.facts)?;
    }
    if let Some(first) = config.first_stage() {
        // What the second stage could not do is told before the first.
        setup::supports(config, &setup::open_model(config)?)?;
        if resumed.is_none() {
            // The folder is this run's from now on.
            output.begin(config, None)?;
        }
        if let Ended::Stopped = stages::first(config, &first, |first, place| self::stage(first, &Resume::Auto, place))?
        {
            return Ok(Ended::Stopped);
        }
    }
    let learned_from = resumed.as_ref().and_then(|resumed| resumed.facts.learned_from.as_ref());
    let before = Before { learned_from, folder: &output.folder, resumes: resumed.is_some() };
    let setup::Setup { mut objective, mut trained, model, learned_from } = setup::open(config, device, kind, before)?;
    if let Some(resumed) = &resumed {
        let checkpoint = resumed.checkpoint.display();
        trained
            .restore(&state::tensors(&resumed.checkpoint)?, resumed.facts.frozen)
            .with_context(|| format!("the checkpoint {checkpoint} does not fit this model and config"))?;
        tell(format_args!(
            "resuming from {checkpoint} (step {} of {})",
            resumed.facts.step, config.train.max_train_steps
        ));
    }
    let schedules = Schedules::new(config);
    let facts = resumed.as_ref().map(|resumed| &resumed.facts);
    let start = facts.map_or(0, |facts| facts.step);
    let mut frozen = facts.is_some_and(|facts| facts.frozen);
    let skipped = facts.map(|facts| facts.skipped.clone()).unwrap_or_default();
    let (thawed, total) = (schedules.freeze_at, config.train.max_train_steps);
    if frozen && start < thawed {
        trained.thaw_palettes()?;
        frozen = false;
        note(format_args!(
            "assignments were fixed and learn again, up to step {thawed} of the longer run; then they are fixed again"
        ));
    } else if frozen && thawed > 0 && start < total && facts.is_some_and(|facts| facts.is_last()) {
        note(format_args!(
            "of {total} steps assignments are fixed from step {thawed} on: in those that were added they stay so"
        ));
    }
    let only = resumed.as_mut().and_then(|resumed| resumed.only.take());
    output.begin(config, resumed.as_deref_mut())?;
    if only.is_none() {
        losses::told(config, &model)?.iter().for_each(tell);
    }
    // A run that only writes results again has nothing to log.
    let reporter = Reporter::new(config, &output.folder, start, (stage.before, stage.after), only.is_none())?;
    let learned = &learned_from;
    let mut run =
        Run { config, output: &output, learned_from: learned, schedules, stage, frozen, done: start, reporter };
    let ended = run.steps(start, skipped, objective.as_mut(), &mut trained).and_then(|ended| {
        if ended == Ended::Done {
            let (reporter, learned_from, only) = (&run.reporter, &learned_from, only.as_ref());
            let (output, model, trained, goes_on) = (&output, &model, &trained, stage.after > 0);
            let ending = Ending { config, output, model, learned_from, trained, reporter, only, goes_on };
            ending.finish(objective.as_mut())?;
        }
        Ok(ended)
    });
    let failed = (start, run.done);
    ended.map_err(|error| divergence::explained(error, config, &trained, &output.checkpoints(), failed))
}

/// Whether what comes after each `n` steps (0: never) is due after this one.
fn every(n: u64, step: u64) -> bool {
    n > 0 && step.is_multiple_of(n)
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
    learned_from: &'a Identity,
    schedules: Schedules,
    stage: Stage,
    frozen: bool,
    /// Steps done.
    done: u64,
    reporter: Reporter,
}

impl Run<'_> {
    /// The steps from `start` on; `skipped` is what was due after the one before and was cut short.
    fn steps(
        &mut self,
        start: u64,
        skipped: Vec<String>,
        objective: &mut dyn Objective,
        trained: &mut Trained,
    ) -> Result<Ended> {
        let config = self.config;
        let total = config.train.max_train_steps;
        let minutes = Duration::from_secs(60 * config.checkpoint.checkpoint_every_n_minutes);
        self.look(start, |what| skipped.iter().any(|skipped| skipped == what), objective, trained)?;
        let mut saved = Instant::now();
        for step in start..total {
            if config.palettize.enabled && !self.frozen && step >= self.schedules.freeze_at {
                trained.freeze_palettes()?;
                self.frozen = true;
            }
            self.step(step, objective, trained)?;
            let done = step + 1;
            self.done = done;
            let skipped = self.look(done, |_| true, objective, trained)?;
            let due =
                every(config.checkpoint.checkpointing_steps, done) || (!minutes.is_zero() && saved.elapsed() > minutes);
            if due || stopped() || done == total {
                let path = self.save(skipped, trained)?;
                saved = Instant::now();
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

    /// Validates and draws samples where that is due after the step that ended at `done`, and `asked` for. What of it was
    /// not done: Ctrl-C cuts it short, because the state is saved next.
    fn look(
        &mut self,
        done: u64,
        asked: impl Fn(&str) -> bool,
        objective: &mut dyn Objective,
        trained: &Trained,
    ) -> Result<Vec<String>> {
        let config = self.config;
        let mut skipped = Vec::new();
        let last = done == config.train.max_train_steps;
        if asked(VALIDATING) && (every(config.validation.every_n_steps, done) || last) {
            let work = || unless_stopped(objective.validate(&trained.shipped()?.0));
            let loss = self.reporter.during(VALIDATING, work)?;
            skipped.extend(loss.is_none().then(|| VALIDATING.to_owned()));
            if let Some(Some(loss)) = loss {
                self.reporter.scalars(done, &[("loss/validation", loss)])?;
                self.reporter.say(&format!("step {done}: validation loss {loss:.5}"));
            }
        }
        if asked(SAMPLING) && every(config.sample.sample_every_n_steps, done) {
            let work = || unless_stopped(objective.pictures(&trained.shipped()?.0));
            let pictures = self.reporter.during(SAMPLING, work)?;
            skipped.extend(pictures.is_none().then(|| SAMPLING.to_owned()));
            if let Some(pictures) = pictures {
                self.reporter.pictures(done, &pictures)?;
            }
        }
        Ok(skipped)
    }

    /// Saves a checkpoint, unless nothing could go on from it.
    fn save(&mut self, skipped: Vec<String>, trained: &Trained) -> Result<PathBuf> {
        if let Some(fault) = trained.fault() {
            return Err(Diverged(fault).into());
        }
        let facts = state::Facts {
            step: self.done,
            frozen: self.frozen,
            skipped,
            config: self.config.resolved_toml(),
            learned_from: Some(self.learned_from.clone()),
            tensors_crc32: None,
        };
        let (folder, limit) = (self.output.checkpoints(), self.config.checkpoint.checkpoints_total_limit);
        self.reporter.during(SAVING, || state::save(&folder, &facts, trained, limit))
    }

    fn step(&mut self, step: u64, objective: &mut dyn Objective, trained: &mut Trained) -> Result<()> {
        let config = self.config;
        let train = &config.train;
        let (stop, of_run) = (train.stop_text_encoder_training, self.stage.before + step);
        let alone = self.frozen && !config.palettize.reestimate_norms_and_biases;
        let of_subject = config.palettize.enabled && config.palettize.palettes.is_some();
        let learns = |slot: &Slot| match slot.component {
            _ if !objective.learns(&slot.name) => false,
            Component::TextEncoder => stop == 0 || of_run < stop,
            _ if of_subject => slot.palette.is_some() || (!alone && slot.is_bias_or_norm()),
            _ => slot.palette.is_some() || !alone,
        };
        let temperature = self.schedules.temperature(step);
        let begun = trained.begin(temperature, learns)?;
        let micro_steps = train.gradient_accumulation_steps as u64;
        // Means over all of the step. Each number is a wait for the device: parts are read where they are reported.
        let due = self.reporter.due(step + 1);
        let (mut loss, mut parts) = (0.0, Vec::<(&str, f64)>::new());
        for micro in 0..micro_steps {
            let part = Part::whole(step * micro_steps + micro, train.train_batch_size);
            let one = objective.loss(&begun.networks, &part)?;
            let scaled = one.total / micro_steps as f64;
            loss += scaled.double_value(&[]);
            scaled.f_backward().map_err(crate::torch::error)?;
            if !due {
                continue;
            }
            parts.resize(one.parts.len(), ("", 0.0));
            for (part, (name, value)) in parts.iter_mut().zip(&one.parts) {
                *part = (name, part.1 + value.double_value(&[]) / micro_steps as f64);
            }
        }
        if !loss.is_finite() {
            return Err(Diverged(format!("the loss is not finite ({loss})")).into());
        }
        let rate = self.schedules.rate.at(step);
        let (text, palette) = (self.schedules.text_encoder_ratio, self.schedules.palette_ratio);
        let frozen = self.frozen;
        let rate_of = |slot: &Slot| match slot.component {
            Component::TextEncoder => rate * text,
            _ if frozen && slot.palette.is_some() => rate * palette,
            _ => rate,
        };
        let adamw = AdamW::of(&train.optimizer);
        let mut random = generator(config.seed, Purpose::Rounding, step);
        let norm = trained.apply(begun, &adamw, train.max_grad_norm, &mut random, rate_of)?;
        // Far beyond any rate that learns: a single step may leave what numbers hold, and what comes next would stumble.
        if rate * text.max(palette).max(1.0) > 1.0
            && let Some(fault) = trained.fault()
        {
            return Err(Diverged(fault).into());
        }
        if train.use_ema {
            // Young averages follow faster, as diffusers' EMAModel: (1 + step)/(10 + step).
            let young = (1 + step) as f64 / (10 + step) as f64;
            trained.update_average(train.ema_decay.min(young));
        }
        self.reporter.step(step + 1, loss);
        if !due {
            return Ok(());
        }
        let mut values = vec![("loss", loss), ("learning_rate", rate), ("gradient_norm", norm)];
        values.extend(parts);
        if config.palettize.enabled && !of_subject {
            values.push(("palette_error", trained.palette_error()));
            if !frozen {
                values.push(("temperature", temperature));
            }
        }
        self.reporter.scalars(step + 1, &values)
    }
}
