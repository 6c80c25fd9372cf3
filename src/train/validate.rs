//! The denoising loss on pictures that are never trained on, with noise and timesteps that never change, so that two
//! models, or two moments of a run, can be compared to the fourth digit.

use anyhow::Result;
use tch::{Device, Kind, Tensor};

use super::examples::{Examples, mean_latents};
use crate::data::{Key, hash_weights};
use crate::diffusion::NoiseSchedule;
use crate::networks::unet::{UnetConfig, unet};
use crate::ops::{Tensors, Weights};
use crate::pipeline::Conditioning;
use crate::pipeline::condition::SizeIds;
use crate::torch::random::{Purpose, generator, normal};

/// A batch as the UNet sees it, and what it should predict (fp32).
pub struct Input {
    pub noised: Tensor,
    pub timesteps: Tensor,
    pub told: Conditioning,
    pub target: Tensor,
}

/// Fixed examples.
pub struct Validation {
    /// Scaled latents `[N, 4, h, w]`.
    latents: Tensor,
    captions: Vec<String>,
    sizes: Vec<SizeIds>,
    noise: Tensor,
    timesteps: Tensor,
    batch: i64,
    kind: Kind,
}

impl Validation {
    /// `count` examples, measured `batch` at a time: the pictures in order, again and again, each time with other noise.
    /// Timesteps are spread evenly over the schedule, so that few examples already cover it.
    pub fn new(
        examples: &Examples,
        scaling_factor: f64,
        (batch, count): (usize, usize),
        seed: u64,
        schedule: &NoiseSchedule,
        (device, kind): (Device, Kind),
    ) -> Self {
        let chosen: Vec<usize> = (0..count).map(|i| i % examples.len()).collect();
        let moments: Vec<&Tensor> = chosen.iter().map(|&i| &examples.moments[i]).collect();
        let latents = mean_latents(&Tensor::stack(&moments, 0).to_device(device), scaling_factor);
        let noise = normal(&mut generator(seed, Purpose::Validation, 0), &latents.size()).to_device(device);
        // A stride coprime to the count visits every place once, so that neighbours differ in timestep.
        let stride = (count * 5 / 8..).find(|&s| gcd(s.max(1), count) == 1).unwrap_or(1).max(1);
        let timesteps: Vec<i64> = (0..count)
            .map(|i| ((((i * stride) % count) as f64 + 0.5) / count as f64 * schedule.timesteps() as f64) as i64)
            .collect();
        Self {
            latents,
            captions: chosen.iter().map(|&i| examples.captions[i].clone()).collect(),
            sizes: chosen.iter().map(|&i| examples.sizes[i]).collect(),
            noise,
            timesteps: Tensor::from_slice(&timesteps).to_device(device),
            batch: batch as i64,
            kind,
        }
    }

    /// How many examples are measured.
    pub fn len(&self) -> usize {
        self.captions.len()
    }

    /// What the UNet with these weights predicts, and its mean squared error.
    ///
    /// # Errors
    /// A caption can't be embedded; [`super::Stopped`].
    pub fn measure(
        &self,
        weights: &Weights,
        config: &UnetConfig,
        schedule: &NoiseSchedule,
        embed: impl Fn(&[String], &[SizeIds]) -> Result<Conditioning>,
    ) -> Result<Measured> {
        let _guard = tch::no_grad_guard();
        let (mut total, mut outputs) = (0.0, Vec::new());
        self.inputs(self.batch, schedule, embed, &mut |input| {
            let Input { noised, timesteps, told, target } = input;
            let mut ops = Tensors::new(weights).computing_in(self.kind);
            let output = unet(&mut ops, config, noised, timesteps, told.condition()).to_kind(Kind::Float);
            total += mean_square(&(&output - target)) * output.size()[0] as f64;
            outputs.push(output);
            Ok(())
        })?;
        Ok(Measured { loss: total / self.len() as f64, outputs: Tensor::f_cat(&outputs, 0)? })
    }

    /// Gives `see` what goes into the UNet, `batch` at a time.
    ///
    /// # Errors
    /// A caption can't be embedded; those of `see`; [`super::Stopped`].
    pub fn inputs(
        &self,
        batch: i64,
        schedule: &NoiseSchedule,
        embed: impl Fn(&[String], &[SizeIds]) -> Result<Conditioning>,
        see: &mut dyn FnMut(&Input) -> Result<()>,
    ) -> Result<()> {
        let count = self.len() as i64;
        for start in (0..count).step_by(batch as usize) {
            super::stop::go_on()?;
            let size = batch.min(count - start);
            let part = |t: &Tensor| t.narrow(0, start, size);
            let (latents, noise, timesteps) = (part(&self.latents), part(&self.noise), part(&self.timesteps));
            let range = start as usize..(start + size) as usize;
            let told = embed(&self.captions[range.clone()], &self.sizes[range])?.to_kind(self.kind);
            let noised = schedule.add_noise(&latents, &noise, &timesteps).to_kind(self.kind);
            let target = schedule.target(&latents, &noise, &timesteps);
            see(&Input { noised, timesteps, told, target })?;
        }
        Ok(())
    }

    /// The key of all that goes into the UNet.
    ///
    /// # Errors
    /// A caption can't be embedded.
    pub fn key(
        &self,
        schedule: &NoiseSchedule,
        embed: impl Fn(&[String], &[SizeIds]) -> Result<Conditioning>,
    ) -> Result<Key> {
        let mut inputs = Weights::new();
        inputs.insert("noised".into(), schedule.add_noise(&self.latents, &self.noise, &self.timesteps));
        inputs.insert("target".into(), schedule.target(&self.latents, &self.noise, &self.timesteps));
        inputs.insert("timesteps".into(), self.timesteps.shallow_clone());
        let Conditioning { context, text_embeds, time_ids } = embed(&self.captions, &self.sizes)?;
        inputs.insert("context".into(), context);
        for (name, tensor) in [("text_embeds", text_embeds), ("time_ids", time_ids)] {
            inputs.extend(tensor.map(|tensor| (name.to_owned(), tensor)));
        }
        hash_weights(&inputs)
    }
}

/// One network's answers to the examples.
pub struct Measured {
    /// The mean squared error of the predicted noise (or velocity).
    pub loss: f64,
    /// fp32 `[examples, 4, h, w]`
    outputs: Tensor,
}

impl Measured {
    /// Mean square of the outputs.
    pub fn power(&self) -> f64 {
        mean_square(&self.outputs)
    }

    /// Mean squared difference of the outputs from those of `other`.
    pub fn difference(&self, other: &Self) -> f64 {
        mean_square(&(&self.outputs - &other.outputs))
    }
}

/// A signal-to-noise ratio in dB, of mean squares.
pub fn snr(power: f64, noise: f64) -> f64 {
    10.0 * (power / noise).log10()
}

/// In fp64.
fn mean_square(values: &Tensor) -> f64 {
    values.square().mean(Kind::Double).double_value(&[])
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}
