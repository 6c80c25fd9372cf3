//! What a run would cost: bits, memory, disk, time; and what each of its losses is asked to do.

use std::collections::BTreeMap;

use super::Report;
use crate::cli::doctor::free_disk;
use crate::cli::size;
use crate::config::{Config, TrainedComponent};
use crate::coreml::components::cost::Cost;
use crate::palette::post_training::Chosen;
use crate::source::{Component, Model};
use crate::terminal::{duration, tell};
use crate::train::estimate::{Pictures, estimate};
use crate::train::{self, device_and_kind};

impl Report {
    /// What each loss is asked to do.
    pub(super) fn losses(&mut self, config: &Config, model: &Model) {
        let first = config.first_stage();
        let stages = first.iter().map(|first| ("stage 1: ", first)).chain([("stage 2: ", config)]);
        let mut heading = "losses";
        for (stage, config_of_stage) in stages {
            let stage = if first.is_some() { stage } else { "" };
            for loss in self.take(train::losses::told(config_of_stage, model)).unwrap_or_default() {
                self.line(std::mem::take(&mut heading), format!("{stage}{loss}"));
            }
        }
    }

    /// Palettes, the size of the result, checkpoints.
    pub(super) fn weights(&mut self, config: &Config, model: &Model) {
        let component = match config.train.component {
            TrainedComponent::Unet => Component::Unet,
            TrainedComponent::Autoencoder => Component::Autoencoder,
        };
        // What is wrong with them has been noted.
        let Ok(parameters) = model.parameters(component) else { return };
        let (mut bits, mut total, mut palette_bits, mut palettized) = (0, 0, 0, 0);
        // Bytes: of all master weights, and of what training holds of them at once.
        let (mut masters, mut held) = (0, 0);
        let mut layers: BTreeMap<u32, usize> = BTreeMap::new();
        // Whose assignments stay; what is wrong with them has been noted.
        let file = train::file_of_palettes(config).ok().flatten();
        let chosen = match (component, &file) {
            (Component::Unet, Some(file)) => {
                let forms = file.palettes().map(|(name, form, _)| (name.to_owned(), form)).collect();
                Chosen { forms, ..Chosen::default() }
            }
            (Component::Unet, None) => config.palettize.chosen(&parameters),
            _ => Chosen::default(),
        };
        let mut palettes = Vec::new();
        for parameter in &parameters {
            let elements = parameter.shape.iter().product::<i64>() as u64;
            let form = chosen.forms.get(&parameter.name).copied();
            total += elements;
            let master = match form.filter(|_| file.is_some()) {
                Some(form) => (form.groups(&parameter.shape) * form.table()) as u64 * 4,
                None => elements * if config.train.is_bf16(&parameter.shape) { 2 } else { 4 },
            };
            masters += master;
            held += match form {
                // Entries learn, with two moments and a gradient; assignments take a byte each, and the network sees the
                // weight, of which there is a gradient too.
                Some(_) if file.is_some() => master * 4 + elements * 9,
                // AdamW's two moments, the gradient, and what the network sees in place of the master.
                Some(_) => master * 5,
                None => master * 4,
            };
            let Some(form) = form else {
                bits += elements * 16;
                continue;
            };
            palettized += elements;
            palette_bits += form.stored_bits(&parameter.shape);
            palettes.push((parameter.name.as_str(), form, parameter.shape.as_slice()));
            *layers.entry(form.bits).or_default() += 1;
        }
        bits += palette_bits;
        if component == Component::Unet && config.train.train_text_encoder {
            let parameters = model.parameters(Component::TextEncoder).unwrap_or_default();
            let sizes = parameters
                .iter()
                .map(|p| p.shape.iter().product::<i64>() as u64 * if config.train.is_bf16(&p.shape) { 2 } else { 4 });
            let text_encoder = sizes.sum::<u64>();
            masters += text_encoder;
            held += 4 * text_encoder;
        }
        if let Some((first, why)) = chosen.misfits.first() {
            let more = chosen.misfits.len() - 1;
            let others = if more > 0 { format!(" (and {more} more)") } else { String::new() };
            self.line("palettes", format!("{first}: {why}: stays fp16{others}"));
        }
        if !layers.is_empty() {
            let counts: Vec<String> = layers.iter().map(|(n, count)| format!("{count} of {n} bits")).collect();
            let per_weight = bits as f64 / total.max(1) as f64;
            let average = palette_bits as f64 / palettized.max(1) as f64;
            let each = format!("{average:.3} bits a palettized weight, palettes counted");
            self.line("palettes", format!("{}: {each}", counts.join(", ")));
            self.line(
                "",
                format!("the UNet: {} ({per_weight:.3} bits a weight); {} as fp16", size(bits / 8), size(total * 2)),
            );
            if config.export.coreml {
                let cost = Cost::of(palettes);
                [cost.note(), cost.warning()].into_iter().flatten().for_each(|text| self.line("", text));
            }
        }
        if config.export.coreml && component == Component::Unet {
            let found = train::export_plan(config, model, Default::default()).and_then(|plan| plan.warnings());
            for misfit in self.take(found).unwrap_or_default() {
                self.line("", format!("warning: {misfit}"));
            }
        }
        let teachers = match train::teacher::asked_models(config) {
            0 => String::new(),
            1 => format!(", and {} for a frozen model that is asked", size(total * 2)),
            models => format!(", and {} for {models} frozen models that are asked", size(models * total * 2)),
        };
        // Its weights have no palettes between them and the network.
        let first = match config.first_stage() {
            Some(first) => {
                let asked = train::teacher::asked_models(&first) * total * 2;
                format!(" (the first stage takes {})", size(4 * masters + asked))
            }
            None => String::new(),
        };
        let held = size(held);
        self.line(
            "memory",
            format!("{held} for weights, gradients and optimizer{teachers}{first}; activations come on top"),
        );
        // Weights and AdamW's two moments.
        let kept = config.checkpoint.checkpoints_total_limit as u64;
        let checkpoint = masters * 3;
        self.line("output", config.output_dir.display().to_string());
        let mut model_of_first = 0;
        if let Some(first) = config.first_stage() {
            let parts = model.components().filter_map(|part| model.parameters(part).ok()).flatten();
            model_of_first = parts.map(|p| p.shape.iter().product::<i64>() as u64 * 2).sum();
            self.line(
                "",
                format!("{}: the model of the first stage, {}", first.output_dir.display(), size(model_of_first)),
            );
        }
        self.line("", format!("checkpoints of about {}, {kept} kept", size(checkpoint)));
        if let Some(free) = free_disk(&config.output_dir) {
            self.line("", format!("{} free on that disk", size(free)));
            // One more is written before the oldest is deleted.
            let needed = checkpoint * (kept + 1) + model_of_first;
            if free < needed {
                self.mistakes.push(format!(
                    "{} has {} free, but {kept} checkpoints, and a new one before the oldest goes, take {}; free some \
                     space or lower checkpoint.checkpoints_total_limit",
                    config.output_dir.display(),
                    size(free),
                    size(needed)
                ));
            }
        }
    }

    /// How long the run would take.
    pub(super) fn time(&mut self, config: &Config, model: &Model) {
        let Some(data) = &self.data else { return };
        let (of_class, drawn) = data.class.as_ref().map_or((0, 0), |class| (class.samples.len(), class.missing));
        let validation = data.validation.as_ref().map_or(0, Vec::len);
        let trained_on = data.training.len() + of_class + drawn;
        let encoded = trained_on * if config.data.flip_aug { 2 } else { 1 } + validation;
        let pictures = Pictures { encoded, drawn, validates: validation > 0 };
        // What the first stage encodes and draws is there for the second.
        let first = config.first_stage();
        let again = Pictures { encoded: 0, drawn: 0, ..pictures };
        let stages = match &first {
            Some(first) => vec![("stage 1: ", first, pictures), ("stage 2: ", config, again)],
            None => vec![("", config, pictures)],
        };
        tell("timing the networks' operations (--no-estimate leaves this out)");
        let (mut total, mut lines) = (0.0, Vec::new());
        for (stage, config, pictures) in stages {
            let timed = device_and_kind(config).and_then(|place| estimate(config, model, pictures, place));
            let Some(estimated) = self.take(timed) else { return };
            let steps = config.train.max_train_steps;
            total += estimated.total(steps);
            let training = duration(estimated.step * steps as f64);
            lines.push(format!("{stage}{steps} steps of {:.2} s: {training}", estimated.step));
            for (what, seconds) in estimated.phases {
                lines.push(format!("{stage}{what}: {}", duration(seconds)));
            }
        }
        self.line("time", format!("about {}, estimated from timed operations", duration(total)));
        lines.iter().for_each(|line| self.line("", line));
    }
}
