//! How long a run would take on this machine, told before it begins: each operation of its networks is timed once
//! ([`Stopwatch`]), each form of palette on one layer, and what the config asks for is counted.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use tch::{Device, Kind};

use super::optimizer::AdamW;
use super::teacher::{asked_models, asks_class_alone};
use super::trained::{Fixed, Trained};
use crate::config::{Config, Palettize, TrainedComponent};
use crate::networks::autoencoder::{decode, encode};
use crate::networks::text_encoder::text_encoder;
use crate::networks::unet::UnetConfig;
use crate::ops::{Parameter, Seconds, Stopwatch, Weights};
use crate::palette::Form;
use crate::source::{Component, Model};
use crate::torch::random::{Purpose, generator, normal};

/// Operations are run for about so long; the rest is judged by their speed.
const BUDGET: Duration = Duration::from_secs(20);
/// Palettes are timed on a layer of at most so many weights, where there is one.
const SAMPLE: i64 = 1 << 21;

/// How many pictures a run works on.
#[derive(Clone, Copy, Debug, Default)]
pub struct Pictures {
    /// Those that it trains on, of the class too, mirrored ones included, and those that it validates on.
    pub encoded: usize,
    /// Those of the class that are still to be drawn.
    pub drawn: usize,
    /// Whether there are any to validate on.
    pub validates: bool,
}

/// What a run would take.
#[derive(Clone, Debug)]
pub struct Estimate {
    /// One optimizer step, in seconds.
    pub step: f64,
    /// What else there is to do, and the seconds that it takes.
    pub phases: Vec<(&'static str, f64)>,
}

impl Estimate {
    /// Of all, in seconds; `steps` are the optimizer steps that are left.
    pub fn total(&self, steps: u64) -> f64 {
        self.step * steps as f64 + self.phases.iter().map(|(_, seconds)| seconds).sum::<f64>()
    }
}

/// What the run of `config` would take on `device`, computing in `kind`.
///
/// # Errors
/// The model's configurations can't be read; libtorch can't compute there.
pub fn estimate(
    config: &Config,
    model: &Model,
    pictures: Pictures,
    (device, kind): (Device, Kind),
) -> Result<Estimate> {
    let train = &config.train;
    let steps = train.max_train_steps;
    let autoencoder = model.autoencoder_config()?;
    let (factor, side) = (autoencoder.factor(), config.data.resolution);
    let batch = train.train_batch_size as i64;
    let micro_steps = train.gradient_accumulation_steps as f64;
    // What the run computes in; drawing and encoding are fp32.
    let mut learning = Stopwatch::new(kind, device, true, BUDGET);
    let again = |seconds: Seconds| seconds.learning + if train.gradient_checkpointing { seconds.forward } else { 0.0 };

    if train.component == TrainedComponent::Autoencoder {
        let side = train.autoencoder.crop.unwrap_or(side);
        let both = learning.of(|ops| {
            encode(ops, &autoencoder, &vec![batch, autoencoder.in_channels, side, side]);
            decode(ops, &autoencoder, &vec![batch, autoencoder.latent_channels, side / factor, side / factor]);
        });
        let parameters = model.parameters(Component::Autoencoder)?;
        let step = micro_steps * again(both) + optimizer(config, &parameters, device)?;
        return Ok(Estimate { step, phases: Vec::new() });
    }

    let unet = model.unet_config()?;
    let size = (side / factor, side / factor);
    let prior = config.data.prior();
    let rows = batch * if prior.is_some() { 2 } else { 1 };
    let network = learning.of(|ops| unet.walk(ops, rows, size));
    let mut micro_step = again(network);
    micro_step += network.forward * asked(config);
    let mut parameters = model.parameters(Component::Unet)?;
    if train.train_text_encoder {
        let texts = model.text_encoder_config()?;
        let seconds = learning.of(|ops| {
            text_encoder(ops, &texts, &vec![rows, texts.positions]);
        });
        micro_step += again(seconds);
        parameters.extend(model.parameters(Component::TextEncoder)?);
    }
    let step = micro_steps * micro_step + optimizer(config, &parameters, device)?;

    let mut drawing = Stopwatch::new(kind, device, false, BUDGET);
    let mut evaluation = |rows: i64| drawing.of(|ops| unet.walk(ops, rows, size)).forward;
    let mut phases = Vec::new();
    if pictures.validates {
        let often = looks(steps, config.validation.every_n_steps, true);
        phases.push(("validation", (often * config.validation.batches as u64) as f64 * evaluation(batch)));
    }
    let guided = |scale: f64| if scale > 1.0 { 2 } else { 1 };
    let samples = looks(steps, config.sample.sample_every_n_steps, false) * config.sample.prompts.len() as u64;
    let (mut sampling, mut class) = (0.0, 0.0);
    if samples > 0 {
        let steps = config.sample.sample_steps as f64;
        sampling = steps * evaluation(guided(config.sample.guidance_scale));
    }
    if let Some(prior) = prior.filter(|_| pictures.drawn > 0) {
        let together = prior.sample_batch_size as i64;
        let rows = together * guided(prior.prior_guidance_scale);
        class = prior.prior_sample_steps as f64 * evaluation(rows) / together as f64;
    }
    let latents = vec![1, autoencoder.latent_channels, size.0, size.1];
    if samples > 0 || pictures.drawn > 0 {
        let decoding = drawing.of(|ops| drop(decode(ops, &autoencoder, &latents))).forward;
        phases.push(("samples", samples as f64 * (sampling + decoding)));
        phases.push(("class pictures to draw", pictures.drawn as f64 * (class + decoding)));
    }
    let picture = vec![1, autoencoder.in_channels, side, side];
    let encoding = drawing.of(|ops| drop(encode(ops, &autoencoder, &picture))).forward;
    phases.push(("encoding what is not cached yet", pictures.encoded as f64 * encoding));
    phases.retain(|(_, seconds)| *seconds > 0.0);
    Ok(Estimate { step, phases })
}

/// How many of a batch's rows frozen models are asked about, as a fraction.
fn asked(config: &Config) -> f64 {
    let of_class = if config.data.prior().is_some() { 0.5 } else { 0.0 };
    let of_teacher = match config.distill.enabled {
        true if !asks_class_alone(&config.distill) => 1.0,
        true => of_class,
        false => 0.0,
    };
    // A base that teaches has answered the prior's question too.
    let apart = asked_models(config) > u64::from(config.distill.enabled);
    of_teacher + if apart { of_class } else { 0.0 }
}

/// One training step of a UNet: `batch` latents of `size`, forward twice (gradient checkpointing) and backward, in seconds.
/// The optimizer is not in it.
pub fn unet_step(unet: &UnetConfig, batch: i64, size: (i64, i64), device: Device, budget: Duration) -> f64 {
    let seconds = Stopwatch::new(Kind::Float, device, true, budget).of(|ops| unet.walk(ops, batch, size));
    seconds.learning + seconds.forward
}

/// How often something happens in a run: every `n` steps (0 = never), and at the end.
fn looks(steps: u64, n: u64, at_end: bool) -> u64 {
    let often = steps.checked_div(n).unwrap_or(0);
    let last = at_end && (n == 0 || !steps.is_multiple_of(n));
    often + u64::from(last)
}

/// Palettes, clipping and AdamW of one step on all `parameters`: each form of palette, and weights without one, timed on one
/// of them.
fn optimizer(config: &Config, parameters: &[Parameter], device: Device) -> Result<f64> {
    let elements = |parameter: &Parameter| parameter.shape.iter().product::<i64>();
    let mut kinds: Vec<(Option<Form>, Vec<&Parameter>)> = Vec::new();
    let unet = config.train.component == TrainedComponent::Unet;
    // Palettes whose assignments stay take about as long as weights without.
    let learned = unet && config.palettize.palettes.is_none();
    let mut forms = if learned { config.palettize.chosen(parameters).forms } else { Default::default() };
    for parameter in parameters {
        let form = forms.remove(&parameter.name);
        match kinds.iter_mut().find(|(known, _)| *known == form) {
            Some((_, all)) => all.push(parameter),
            None => kinds.push((form, vec![parameter])),
        }
    }
    let mut seconds = 0.0;
    for (_, all) in kinds {
        let weights: i64 = all.iter().map(|parameter| elements(parameter)).sum();
        let fitting = all.iter().filter(|parameter| elements(parameter) <= SAMPLE).max_by_key(|p| elements(p));
        let smallest = all.iter().min_by_key(|parameter| elements(parameter));
        let sample = fitting.or(smallest).context("a kind of parameters has parameters")?;
        seconds += optimizer_step(config, sample, device)? * weights as f64 / elements(sample).max(1) as f64;
    }
    Ok(seconds)
}

/// Of one parameter of random values; the second of two steps, as the first counts all weights.
fn optimizer_step(config: &Config, parameter: &Parameter, device: Device) -> Result<f64> {
    let values = normal(&mut generator(config.seed, Purpose::Initial, 0), &parameter.shape) * 0.02;
    let weights = Weights::from([(parameter.name.clone(), values)]);
    let network = vec![(Component::Unet, weights, vec![parameter.clone()])];
    let palettize = Palettize { enabled: config.palettize.palettes.is_none(), ..config.palettize.clone() };
    let of = (&palettize, &Fixed::new());
    let mut trained = Trained::new(network, of, &config.train, device, false, &mut |_, _| {})?;
    let adamw = AdamW::of(&config.train.optimizer);
    let mut seconds = 0.0;
    for step in 0..2 {
        let start = Instant::now();
        let begun = trained.begin(config.palettize.temperature_start, |_| true)?;
        seconds = start.elapsed().as_secs_f64();
        for leaf in begun.networks.values().flat_map(|weights| weights.values()) {
            leaf.f_sum(Kind::Float)?.f_backward()?;
        }
        let start = Instant::now();
        let mut random = generator(config.seed, Purpose::Rounding, step);
        trained.apply(begun, &adamw, config.train.max_grad_norm, &mut random, |_| 1e-9)?;
        seconds += start.elapsed().as_secs_f64();
    }
    Ok(seconds)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_look_at_the_end_is_not_counted_twice() {
        assert_eq!([looks(100, 10, true), looks(105, 10, true), looks(5, 10, true), looks(5, 0, true)], [10, 11, 1, 1]);
        assert_eq!([looks(100, 10, false), looks(105, 0, false)], [10, 0]);
    }
}
