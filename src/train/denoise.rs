//! The UNet's objective: predict the noise in noised latents (Ho et al. 2020, eq. 14; DreamBooth's prior term, Ruiz et
//! al. 2022, eq. 2), and answer as the float model does (distillation).

use std::cell::RefCell;

use anyhow::{Context, Result};
use rand::Rng;
use rand_distr::{Beta, Distribution};
use tch::{Device, Kind, Tensor};

use super::examples::{Examples, Texts, draw_latents};
use super::objective::{Loss, Objective};
use super::prompts::Sampler;
use super::trained::Networks;
use super::validate::Validation;
use crate::config::{Config, Distill};
use crate::diffusion::condition::SizeIds;
use crate::diffusion::{NoiseSchedule, Prediction};
use crate::networks::unet::{UnetConfig, unet};
use crate::ops::{Tensors, Weights};
use crate::source::Component;
use crate::torch::random::{Purpose, generator, normal, uniform};

/// Trains on examples in memory.
pub struct Denoise {
    pub unet: UnetConfig,
    pub schedule: NoiseSchedule,
    pub scaling_factor: f64,
    pub examples: Examples,
    /// Pictures of the class, with the weight of their loss.
    pub class: Option<(Examples, f64)>,
    pub texts: Texts,
    /// The float model, where it teaches: two bytes a weight, converted as they are used.
    pub teacher: Option<Weights>,
    pub validation: Option<Validation>,
    pub config: Config,
    pub device: Device,
    pub kind: Kind,
    /// Draws the config's prompts with these networks.
    pub sampler: Sampler,
}

/// A batch: latents `[B, 4, h, w]`, captions, sizes, weight of each example's loss.
struct Batch {
    latents: Tensor,
    captions: Vec<String>,
    sizes: Vec<SizeIds>,
    weights: Vec<f32>,
}

impl Denoise {
    fn batch(&self, index: u64) -> Batch {
        let seed = self.config.seed;
        let size = self.config.train.train_batch_size;
        let mut random = generator(seed, Purpose::Augment, index);
        let (mut moments, mut captions, mut sizes, mut weights) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let sets = [Some((&self.examples, 1.0)), self.class.as_ref().map(|(examples, weight)| (examples, *weight))];
        for (place, (examples, weight)) in sets.into_iter().flatten().enumerate() {
            // The class has an order of its own: a set of another size would otherwise pair the same pictures.
            let order = seed.wrapping_add(place as u64);
            for chosen in crate::data::order::batch_indices(order, index, size, examples.len()) {
                let flip = examples.flipped && random.next_u32() & 1 == 1;
                let place = chosen + if flip { examples.len() } else { 0 };
                moments.push(examples.moments[place].shallow_clone());
                sizes.push(examples.sizes[place]);
                let dropped = uniform(&mut random) < self.config.data.caption_dropout_rate;
                captions.push(if dropped { String::new() } else { examples.captions[chosen].clone() });
                weights.push(weight as f32);
            }
        }
        let moments = Tensor::stack(&moments, 0).to_device(self.device);
        Batch { latents: draw_latents(&moments, self.scaling_factor, seed, index), captions, sizes, weights }
    }

    /// Weight of each example's loss by min-SNR-γ (Hang et al. 2023, 3.4): min(SNR, γ)/SNR for ε, /(SNR + 1) for v.
    fn snr_weights(&self, gamma: f64, timesteps: &[i64]) -> Vec<f32> {
        timesteps
            .iter()
            .map(|&t| {
                let alpha = self.schedule.alphas_cumprod[t as usize];
                let snr = alpha / (1.0 - alpha);
                let denominator = match self.schedule.prediction {
                    Prediction::Epsilon => snr,
                    Prediction::VPrediction => snr + 1.0,
                };
                (snr.min(gamma) / denominator.max(1e-12)) as f32
            })
            .collect()
    }
}

/// Timesteps 0…`steps` − 1: evenly, or where Beta(a, b) puts them between the first and the last.
fn draw_timesteps(random: &mut impl Rng, count: i64, steps: i64, beta: Option<[f64; 2]>) -> Result<Vec<i64>> {
    let beta = beta.map(|[a, b]| Beta::new(a, b)).transpose().context("train.timestep_beta")?;
    let mut place = || match &beta {
        None => uniform(random),
        Some(beta) => beta.sample(random),
    };
    Ok((0..count).map(|_| ((place() * steps as f64) as i64).min(steps - 1)).collect())
}

impl Objective for Denoise {
    fn loss(&mut self, networks: &Networks, index: u64) -> Result<Loss> {
        let Batch { latents, captions, sizes, mut weights } = self.batch(index);
        let seed = self.config.seed;
        let size = latents.size();
        let mut random = generator(seed, Purpose::Noise, index);
        let mut noise = normal(&mut random, &size).to_device(self.device);
        if self.config.train.noise_offset > 0.0 {
            let offset = normal(&mut random, &[size[0], size[1], 1, 1]).to_device(self.device);
            noise += offset * self.config.train.noise_offset;
        }
        let mut random = generator(seed, Purpose::Timesteps, index);
        let steps = self.schedule.timesteps();
        let timesteps = draw_timesteps(&mut random, size[0], steps, self.config.train.timestep_beta)?;
        if let Some(gamma) = self.config.train.min_snr_gamma {
            for (weight, snr) in weights.iter_mut().zip(self.snr_weights(gamma, &timesteps)) {
                *weight *= snr;
            }
        }
        let timesteps = Tensor::from_slice(&timesteps).to_device(self.device);
        let weights = Tensor::from_slice(&weights).to_device(self.device);
        let noised = self.schedule.add_noise(&latents, &noise, &timesteps).to_kind(self.kind);
        let target = self.schedule.target(&latents, &noise, &timesteps);
        let recomputes = self.config.train.gradient_checkpointing;
        let learning = |weights| Tensors::new(weights).computing_in(self.kind).recomputing(recomputes);
        let text_encoder = networks.get(&Component::TextEncoder).map(learning);
        let told = self.texts.embed(&captions, &sizes, text_encoder)?.to_kind(self.kind);

        let Distill { lambda_sd, lambda_kd_output, lambda_kd_feat, .. } = self.config.distill;
        let features = self.teacher.is_some() && lambda_kd_feat > 0.0;
        let (ours, theirs) = (RefCell::new(Vec::new()), RefCell::new(Vec::new()));
        let mut student = learning(networks.get(&Component::Unet).context("the UNet does not train")?);
        if features {
            student = student.keeping_features(&ours);
        }
        let output = unet(&mut student, &self.unet, &noised, &timesteps, told.condition()).to_kind(Kind::Float);
        let mean = |difference: Tensor| {
            let each = difference.square().mean_dim([1i64, 2, 3].as_slice(), false, Kind::Float);
            (each * &weights).mean(Kind::Float)
        };
        let task = mean(&output - target);
        let mut parts = vec![("loss/denoise", task.detach())];
        let Some(teacher) = &self.teacher else { return Ok(Loss { total: task, parts }) };
        let taught = tch::no_grad(|| {
            let mut teacher = Tensors::new(teacher).computing_in(self.kind);
            if features {
                teacher = teacher.keeping_features(&theirs);
            }
            let told = told.map(Tensor::detach);
            unet(&mut teacher, &self.unet, &noised, &timesteps, told.condition()).to_kind(Kind::Float)
        });
        let distilled = mean(output - taught);
        parts.push(("loss/distill", distilled.detach()));
        let mut total = task * lambda_sd + distilled * lambda_kd_output;
        if features {
            let pairs = ours.into_inner().into_iter().zip(theirs.into_inner());
            let sum: Tensor = pairs.map(|(a, b)| mean(a.to_kind(Kind::Float) - b.to_kind(Kind::Float))).sum();
            parts.push(("loss/features", sum.detach()));
            total += sum * lambda_kd_feat;
        }
        Ok(Loss { total, parts })
    }

    fn validate(&mut self, networks: &Networks) -> Result<Option<f64>> {
        let Some(validation) = &self.validation else { return Ok(None) };
        let texts = networks.get(&Component::TextEncoder).map(|weights| Tensors::new(weights).computing_in(self.kind));
        let weights = networks.get(&Component::Unet).context("the UNet does not train")?;
        let measured = validation.measure(weights, &self.unet, &self.schedule, |captions, sizes| {
            self.texts.embed(captions, sizes, texts.clone())
        })?;
        Ok(Some(measured.loss))
    }

    fn pictures(&mut self, networks: &Networks) -> Result<Vec<Tensor>> {
        (self.sampler)(networks)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timesteps_have_the_mean_of_their_distribution_and_stay_on_the_schedule() {
        // Evenly the mean is a half; of Beta(a, b) it is a/(a + b).
        for (beta, mean) in [(None, 0.5), (Some([3.0, 1.0]), 0.75), (Some([1.0, 1.0]), 0.5), (Some([0.2, 0.6]), 0.25)] {
            let drawn = draw_timesteps(&mut generator(1, Purpose::Timesteps, 0), 20_000, 1000, beta).unwrap();
            assert!(drawn.iter().all(|t| (0..1000).contains(t)));
            let found = drawn.iter().sum::<i64>() as f64 / 20_000.0 / 1000.0;
            assert!((found - mean).abs() < 0.01, "{beta:?}: {found}");
        }
    }
}
