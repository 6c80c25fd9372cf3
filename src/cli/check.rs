//! `palettist check`: what a config would do, and everything that is wrong with it, its data and its model.

mod cost;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};

use super::{Mistakes, Usage, grouped, is_usage, print};
use crate::config::{self, Config, DeviceChoice, Loaded, MixedPrecision, SamplePrompt, TrainedComponent};
use crate::data::{DataSet, Problems, Sample};
use crate::source::{Model, Tokenizer};
use crate::terminal::shell_word;
use crate::train::identity::Identity;
use crate::train::plan::{self, Action, Before, Plan, plan};
use crate::train::prompts::other_sampler;
use crate::train::{self, Resume, device_and_kind, drawing, run_folder, state};

/// Reads config, data and model headers and tells what a run would do; trains nothing
#[derive(clap::Args)]
pub struct Args {
    /// The config file
    config: PathBuf,
    /// Changes to the config, as in train.max_train_steps=20
    #[arg(value_name = "KEY=VALUE")]
    overrides: Vec<String>,
    /// Does not time the networks' operations, from which the duration of the run is estimated
    #[arg(long)]
    no_estimate: bool,
}

pub fn run(args: Args) -> Result<()> {
    let Loaded { config, warnings } = config::load(&args.config, &args.overrides)?;
    let mut report = Report::default();
    for (i, warning) in warnings.iter().enumerate() {
        report.line(if i == 0 { "config" } else { "" }, format!("warning: {warning}"));
    }
    let model = report.take(train::open_model(&config));
    if let Some(model) = &model {
        report.model(&config, model);
    }
    let pictures = report.data(&config, model.as_ref());
    report.run(&config, pictures);
    if let Some(model) = &model {
        report.losses(&config, model);
        report.weights(&config, model);
    }
    report.output(&config, model.as_ref());
    if let Some(model) = model.as_ref().filter(|_| report.mistakes.is_empty() && !args.no_estimate) {
        report.time(&config, model);
    }
    for line in &report.lines {
        print(line)?;
    }
    match report.mistakes.is_empty() {
        true => {
            let words = std::iter::once(args.config.to_string_lossy()).chain(args.overrides.iter().map(Into::into));
            let words: Vec<String> = words.map(|word| shell_word(&word)).collect();
            print(format_args!("no problems found; to train: palettist train {}", words.join(" ")))
        }
        // As `train` would end.
        false if report.usage => Err(Usage(report.mistakes.join("\n")).into()),
        false => Err(Mistakes(report.mistakes).into()),
    }
}

/// What was found so far.
#[derive(Default)]
struct Report {
    lines: Vec<String>,
    mistakes: Vec<String>,
    /// Whether one of them is the config's own.
    usage: bool,
    /// The model's, where it can be read.
    tokenizer: Option<Tokenizer>,
    /// The pictures, where their folders can be read.
    data: Option<DataSet>,
}

impl Report {
    /// A line under a heading; the heading stands before the first of its lines.
    fn line(&mut self, heading: &str, text: impl AsRef<str>) {
        self.lines.push(format!("{heading:<11}{}", text.as_ref()));
    }

    /// The value of a result; an error is noted among the mistakes, unless it stands there already.
    fn take<T>(&mut self, result: Result<T>) -> Option<T> {
        let note = |error: anyhow::Error| {
            self.usage |= is_usage(&error);
            let text = format!("{error:#}").replace('\n', " ");
            if !self.mistakes.contains(&text) {
                self.mistakes.push(text);
            }
        };
        result.map_err(note).ok()
    }

    fn model(&mut self, config: &Config, model: &Model) {
        self.line("model", model.path().display().to_string());
        train::merged(config, model).iter().for_each(|line| self.line("", line));
        for component in model.components() {
            let Some(parameters) = self.take(model.parameters(component)) else { continue };
            let weights: i64 = parameters.iter().map(|p| p.shape.iter().product::<i64>()).sum();
            let learns = config.train.learns(component);
            let fresh = config.model.train_from_scratch && learns;
            let learns = match (fresh, learns) {
                (true, _) => ", learns from random weights",
                (_, true) => ", learns",
                _ => "",
            };
            self.line("", format!("{}: {} weights{learns}", component.title(), grouped(weights as u64)));
            // Random weights need no file.
            if !fresh {
                self.take(model.check(component));
            }
        }
        self.tokenizer = self.take(model.tokenizer());
        self.take(train::supports(config, model));
        if let Some(warning) = other_sampler(config, model).ok().flatten() {
            self.line("", format!("warning: {warning}"));
        }
        if config.train.component == TrainedComponent::Unet
            && let Err(error) = train::names_layers(config, model)
        {
            match error.downcast::<config::Error>() {
                Ok(config::Error { problems }) => {
                    self.usage = true;
                    self.mistakes.extend(problems.iter().map(ToString::to_string));
                }
                Err(error) => drop(self.take::<()>(Err(error))),
            }
        }
    }

    /// How many pictures an epoch has.
    fn data(&mut self, config: &Config, model: Option<&Model>) -> Option<usize> {
        // A model that cannot be read has had its own message.
        let drawing = model.and_then(|model| drawing(config, model).ok()).flatten();
        let set = match DataSet::read(config, drawing.as_ref()) {
            Ok(set) => set,
            Err(Problems(lines)) => {
                self.mistakes.extend(lines);
                return None;
            }
        };
        match &config.data.dreambooth {
            Some(settings) => {
                self.samples("data", &settings.instance_data_dir, &set.training, false);
                self.line("", format!("every picture: \"{}\"", settings.instance_prompt));
                self.long(&[("instance_prompt".into(), &settings.instance_prompt)]);
            }
            None => self.samples("data", config.data.train_data_dir.as_deref()?, &set.training, true),
        }
        if let (Some(class), Some((settings, folder))) = (&set.class, config.class_folder()) {
            let rest = match class.missing {
                0 => String::new(),
                missing => format!("; {missing} more will be drawn by the model"),
            };
            let there = match class.samples.len() {
                1 => "1 picture".to_owned(),
                count => format!("{count} pictures"),
            };
            let drawn = match class.samples.len() - class.own {
                0 => String::new(),
                drawn => format!(", {drawn} of them drawn by the model"),
            };
            self.line("", format!("{there} of the class in {}{drawn}{rest}", folder.display()));
            self.line("", format!("every one: \"{}\"", settings.class_prompt));
            self.long(&[("class_prompt".into(), &settings.class_prompt)]);
            class.remarks.iter().for_each(|remark| self.line("", remark));
        }
        if let (Some(folder), Some(samples)) = (config.data.validation_data_dir.as_deref(), &set.validation) {
            self.samples("validation", folder, samples, true);
        }
        set.remarks.iter().for_each(|remark| self.line("", remark));
        match set.examine(config.data.resolution, &mut |_, _| Ok(())) {
            Ok(remarks) => remarks.iter().for_each(|remark| self.line("", remark)),
            Err(error) => match error.downcast::<Problems>() {
                Ok(Problems(lines)) => self.mistakes.extend(lines),
                Err(error) => self.mistakes.push(format!("{error:#}")),
            },
        }
        let pictures = set.training.iter().map(|sample| sample.repeats).sum();
        self.data = Some(set);
        Some(pictures)
    }

    /// Counts pictures and shows a few captions.
    fn samples(&mut self, heading: &str, folder: &Path, samples: &[Sample], captions: bool) {
        let count = samples.len();
        let pictures = if count == 1 { "picture" } else { "pictures" };
        self.line(heading, format!("{count} {pictures} in {}", folder.display()));
        // From all over the set, not its beginning.
        for sample in samples.iter().step_by(count.div_ceil(5).max(1)).take_while(|_| captions) {
            self.line("", format!("{}: \"{}\"", sample.name, sample.caption));
        }
        if captions {
            self.long(&samples.iter().map(|sample| (sample.name.clone(), sample.caption.as_str())).collect::<Vec<_>>());
        }
    }

    /// Warns of captions, each with the name of where it is, that have more tokens than the text encoder reads.
    fn long(&mut self, captions: &[(String, &str)]) {
        let Some(tokenizer) = &self.tokenizer else { return };
        let most = tokenizer.length();
        let counted = captions.iter().map(|(name, caption)| (tokenizer.count(caption), name));
        let long: Vec<(usize, &String)> = counted.filter(|(count, _)| *count > most).collect();
        // The first of those that are longest.
        if let Some((count, name)) = long.iter().rev().max_by_key(|(count, _)| *count) {
            let text = format!(
                "warning: {} longer than {most} tokens, cut there; the longest is that of {name}, {count} tokens",
                if long.len() == 1 { "1 caption is".into() } else { format!("{} captions are", long.len()) }
            );
            self.line("", text);
        }
    }

    fn run(&mut self, config: &Config, pictures: Option<usize>) {
        let train = &config.train;
        let per_step = train.train_batch_size * train.gradient_accumulation_steps;
        let seen = train.max_train_steps as u128 * per_step as u128;
        let stages = config.first_stage();
        if let Some(first) = &stages {
            let (steps, rate) = (first.train.max_train_steps, first.train.learning_rate);
            self.line("training", format!("stage 1 of 2: the same in float, {steps} steps at {rate:?}"));
        }
        let again = match config.data.prior() {
            Some(_) if config.class_folder().is_some() => ", and as many of the class",
            Some(_) => ", each once more as one of the class",
            None => "",
        };
        self.line(
            if stages.is_some() { "" } else { "training" },
            format!(
                "{}{} steps × {} accumulated × {} in a batch = {seen} pictures{}",
                if stages.is_some() { "stage 2 of 2: " } else { "" },
                train.max_train_steps,
                train.gradient_accumulation_steps,
                train.train_batch_size,
                again
            ),
        );
        if let Some(pictures) = pictures.filter(|&pictures| pictures > 0) {
            let epochs = seen as f64 / pictures as f64;
            let each = if pictures == 1 { "1 picture".to_owned() } else { format!("{pictures} pictures") };
            self.line("", format!("{each} per epoch: {epochs:.1} epochs"));
        }
        self.take(device_and_kind(config));
        let cuda = tch::Cuda::is_available();
        let device = if cuda && train.device != DeviceChoice::Cpu { "the GPU" } else { "the CPU" };
        let kind = match train.mixed_precision {
            MixedPrecision::No => "fp32",
            MixedPrecision::Bf16 if train.full_bf16 => "bf16, master weights too",
            MixedPrecision::Bf16 => "bf16",
        };
        let again = if train.gradient_checkpointing { ", with gradient checkpointing" } else { "" };
        self.line("", format!("{0}×{0} px on {device} in {kind}{again}", config.data.resolution));
        // How flags in prompts are understood.
        let understood = config.sample.prompts.iter().filter_map(|line| {
            let prompt = SamplePrompt::parse(line).ok()?;
            (prompt.prompt != *line).then(|| prompt.to_string())
        });
        for (i, prompt) in understood.enumerate() {
            self.line(if i == 0 { "samples" } else { "" }, prompt);
        }
    }

    /// What `train` would do in the output folder, and whether it can.
    fn output(&mut self, config: &Config, model: Option<&Model>) {
        self.take(run_folder::check_writable(&config.output_dir).context("output_dir"));
        self.take(run_folder::check_writable(&config.data.cache_dir).context("data.cache_dir"));
        // Weights that nothing could be learned from are found on the way.
        let read = model.and_then(|model| self.take(train::identity_of(config, model)));
        if let Some(remark) = read.as_ref().and_then(|read| train::begins_from(config, read)) {
            self.line("", format!("note: {remark}"));
        }
        let identity = read.map(|read| read.identity);
        if let Some(warning) = identity.as_ref().and_then(|now| train::teacher::is_base_after_all(config, now)) {
            self.line("", format!("warning: {warning}"));
        }
        if let Some(process) = run_folder::busy(&config.output_dir) {
            self.take::<()>(Err(anyhow!("{}", run_folder::told_busy(&config.output_dir, &process))));
            return;
        }
        let Some(Plan { action, notes }) = self.take(plan(config, &Resume::Auto)) else { return };
        if let Action::Resume(resumed) = &action
            && self.take(state::verify(&resumed.checkpoint, &resumed.facts)).is_none()
        {
            return;
        }
        notes.iter().for_each(|note| self.line("", format!("note: {note}")));
        // What is wrong with the model or the data has been noted.
        let data = self.data.as_ref();
        let now = || Some(Identity { model: identity?, data: train::manifest(data?).ok()? });
        let resumed = match action {
            Action::Start => return,
            Action::Finished { step, gone, learned_from } => {
                let told = plan::is_finished(config, step, &gone, learned_from.as_deref(), now);
                return told.iter().for_each(|line| self.line("", line));
            }
            Action::Resume(resumed) => resumed,
        };
        let now = now();
        self.line(
            "",
            match &resumed.only {
                Some(only) => {
                    let only: Vec<&str> = only.iter().map(String::as_str).collect();
                    format!("is finished; `train` writes again what is missing: {}", only.join(", "))
                }
                None => format!("holds a run already; `train` resumes it from step {}", resumed.facts.step),
            },
        );
        if let Some(now) = now {
            let mut learned_from = resumed.facts.learned_from.clone();
            if train::teacher::first_stage_is_missing(config)
                && let Some(before) = &mut learned_from
            {
                before.model = before.model.without_teacher();
                self.line("", "note: what the first of two stages made is gone; `train` runs it again first");
            }
            let before = Before { learned_from: learned_from.as_ref(), folder: &config.output_dir, resumes: true };
            self.take(before.check_so_far(&now, self.data.as_ref().and_then(|data| data.class.as_ref())));
        }
    }
}
