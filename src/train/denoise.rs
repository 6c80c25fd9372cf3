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
use crate::diffusion::{NoiseSchedule, Prediction};
use crate::networks::unet::{UnetConfig, unet};
use crate::ops::{Tensors, Weights};
use crate::pipeline::condition::SizeIds;
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

/// A batch: latents `[B, 4, h, w]`, captions, sizes. B is the size of a batch, twice that with pictures of the class,
/// which follow the others.
struct Batch {
    latents: Tensor,
    captions: Vec<String>,
    sizes: Vec<SizeIds>,
}

impl Denoise {
    fn batch(&self, index: u64) -> Batch {
        let seed = self.config.seed;
        let size = self.config.train.train_batch_size;
        let mut random = generator(seed, Purpose::Augment, index);
        let (mut moments, mut captions, mut sizes) = (Vec::new(), Vec::new(), Vec::new());
        let sets = [Some(&self.examples), self.class.as_ref().map(|(examples, _)| examples)];
        for (place, examples) in sets.into_iter().flatten().enumerate() {
            // The class has an order of its own: a set of another size would otherwise pair the same pictures.
            let order = seed.wrapping_add(place as u64);
            for chosen in crate::data::order::batch_indices(order, index, size, examples.epoch.len()) {
                let chosen = examples.epoch[chosen];
                let flip = examples.flipped && random.next_u32() & 1 == 1;
                let place = chosen + if flip { examples.len() } else { 0 };
                moments.push(examples.moments[place].shallow_clone());
                sizes.push(examples.sizes[place]);
                let dropped = uniform(&mut random) < self.config.data.caption_dropout_rate;
                captions.push(if dropped { String::new() } else { examples.captions[chosen].clone() });
            }
        }
        let moments = Tensor::stack(&moments, 0).to_device(self.device);
        Batch { latents: draw_latents(&moments, self.scaling_factor, seed, index), captions, sizes }
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

/// Mean squares `[B]` of `[B, C, h, w]`.
fn squares(difference: Tensor) -> Tensor {
    difference.square().mean_dim([1i64, 2, 3].as_slice(), false, Kind::Float)
}

/// Means over the pictures, and over those of the class, already times λ.
struct Means {
    pictures: Tensor,
    class: Option<Tensor>,
}

impl Means {
    fn sum(self) -> Tensor {
        match self.class {
            Some(class) => self.pictures + class,
            None => self.pictures,
        }
    }
}

/// The loss of each example `[B]`, times its weight, in the mean; with `prior` = λ the second half is of the class and has
/// a mean of its own, as diffusers' `train_dreambooth.py` adds them: loss = instance + λ · prior.
fn means(each: &Tensor, weights: Option<&Tensor>, prior: Option<f64>) -> Means {
    let each = weights.map_or_else(|| each.shallow_clone(), |weights| each * weights);
    match prior {
        None => Means { pictures: each.mean(Kind::Float), class: None },
        Some(lambda) => {
            let halves = each.chunk(2, 0);
            Means { pictures: halves[0].mean(Kind::Float), class: Some(halves[1].mean(Kind::Float) * lambda) }
        }
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
        let Batch { latents, captions, sizes } = self.batch(index);
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
        let weights = self.config.train.min_snr_gamma.map(|gamma| self.snr_weights(gamma, &timesteps));
        let weights = weights.map(|weights| Tensor::from_slice(&weights).to_device(self.device));
        let timesteps = Tensor::from_slice(&timesteps).to_device(self.device);
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
        let prior = self.class.as_ref().map(|(_, weight)| *weight);
        // Of squares `[B]`: the mean over the pictures, and that over those of the class times λ.
        let means = |squares: Tensor| means(&squares, weights.as_ref(), prior);
        let lambda_sd = if self.teacher.is_some() { lambda_sd } else { 1.0 };
        let Means { pictures, class } = means(squares(&output - target));
        let mut total = pictures * lambda_sd;
        // What is logged adds up to the loss. Sums are new tensors: `+=` would change what is logged, too.
        let mut parts = vec![("loss/denoise", total.detach())];
        if let Some(class) = class {
            let class = class * lambda_sd;
            parts.push(("loss/prior", class.detach()));
            total = &total + class;
        }
        let Some(teacher) = &self.teacher else { return Ok(Loss { total, parts }) };
        let taught = tch::no_grad(|| {
            let mut teacher = Tensors::new(teacher).computing_in(self.kind);
            if features {
                teacher = teacher.keeping_features(&theirs);
            }
            let told = told.map(Tensor::detach);
            unet(&mut teacher, &self.unet, &noised, &timesteps, told.condition()).to_kind(Kind::Float)
        });
        let distilled = means(squares(output - taught)).sum() * lambda_kd_output;
        parts.push(("loss/distill", distilled.detach()));
        total = &total + distilled;
        if features {
            let pairs = ours.into_inner().into_iter().zip(theirs.into_inner());
            let sum: Tensor = pairs.map(|(a, b)| squares(a.to_kind(Kind::Float) - b.to_kind(Kind::Float))).sum();
            let sum = means(sum).sum() * lambda_kd_feat;
            parts.push(("loss/features", sum.detach()));
            total = &total + sum;
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
    fn the_prior_is_added_as_diffusers_adds_it() {
        // train_dreambooth.py: model_pred, model_pred_prior = torch.chunk(model_pred, 2, dim=0); likewise the target;
        // loss = F.mse_loss(model_pred, target); prior_loss = F.mse_loss(model_pred_prior, target_prior);
        // loss = loss + args.prior_loss_weight * prior_loss
        let mut random = generator(3, Purpose::Noise, 0);
        let (output, target) = (normal(&mut random, &[6, 4, 5, 3]), normal(&mut random, &[6, 4, 5, 3]));
        let mse = |from: i64, count| {
            output
                .narrow(0, from, count)
                .mse_loss(&target.narrow(0, from, count), tch::Reduction::Mean)
                .double_value(&[])
        };
        let each = squares(&output - &target);
        let close = |tensor: &Tensor, expected: f64| {
            let found = tensor.double_value(&[]);
            assert!((found / expected - 1.0).abs() < 1e-5, "{found}, expected {expected}");
        };
        let Means { pictures, class } = means(&each, None, Some(0.7));
        close(&pictures, mse(0, 3));
        close(&class.unwrap(), 0.7 * mse(3, 3));
        let Means { pictures, class } = means(&each, None, None);
        close(&pictures, mse(0, 6));
        assert!(class.is_none());
        // min-SNR's weights, on each example: (loss.mean(dim=...) * mse_loss_weights).mean()
        let weights = Tensor::from_slice(&[0.5f32, 1.0, 2.0, 0.0, 3.0, 1.0]);
        let Means { pictures, class } = means(&each, Some(&weights), Some(1.0));
        close(&pictures, (0.5 * mse(0, 1) + mse(1, 1) + 2.0 * mse(2, 1)) / 3.0);
        close(&class.unwrap(), (3.0 * mse(4, 1) + mse(5, 1)) / 3.0);
    }

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
