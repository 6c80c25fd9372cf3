//! The UNet's objective: predict the noise in noised latents (Ho et al. 2020, eq. 14; DreamBooth's prior term, Ruiz et
//! al. 2022, eq. 2), and answer as the float model does (distillation).

use std::cell::RefCell;
use std::rc::Rc;

use anyhow::{Context, Result};
use rand::Rng;
use rand_distr::{Beta, Distribution};
use tch::{Device, Kind, Tensor};

use super::examples::{Examples, Texts, draw_latents};
use super::objective::{Loss, Objective, Part};
use super::prompts::Sampler;
use super::teacher::{Question, Teacher, asks_class_alone};
use super::trained::Networks;
use super::validate::Validation;
use crate::config::{Config, Distill};
use crate::data::samples_at;
use crate::diffusion::{NoiseSchedule, Prediction};
use crate::networks::unet::{UnetConfig, unet};
use crate::ops::Tensors;
use crate::pipeline::condition::SizeIds;
use crate::source::Component;
use crate::torch::random::{Purpose, generator, normal, uniform};

/// Trains on examples in memory.
pub struct Denoise {
    pub unet: UnetConfig,
    pub schedule: NoiseSchedule,
    pub scaling_factor: f64,
    pub examples: Examples,
    pub class: Option<Class>,
    pub texts: Texts,
    /// Where one teaches.
    pub teacher: Option<Rc<Teacher>>,
    pub validation: Option<Validation>,
    pub config: Config,
    pub device: Device,
    pub kind: Kind,
    /// Draws the config's prompts with these networks.
    pub sampler: Sampler,
}

/// DreamBooth's class, the second half of each batch.
pub struct Class {
    pub source: ClassSource,
    /// λ of its loss.
    pub weight: f64,
}

/// Where the class is known from.
pub enum ClassSource {
    Pictures(Examples),
    /// What the base answers to this prompt on the noised latents of the first half.
    Base {
        prompt: String,
        base: Rc<Teacher>,
    },
}

/// Noised latents `[B, C, h, w]` with their timesteps, what the UNet should predict of them, captions and sizes. B is how
/// many examples there are, twice that with the class, which follows.
struct Batch {
    noised: Tensor,
    timesteps: Tensor,
    target: Tensor,
    /// Of the losses, by min-SNR.
    weights: Option<Tensor>,
    captions: Vec<String>,
    sizes: Vec<SizeIds>,
}

impl Batch {
    /// The rows from `first` on, to be asked about.
    fn question(&self, first: i64) -> Question<'_> {
        let count = self.captions.len() as i64 - first;
        Question {
            noised: self.noised.narrow(0, first, count),
            timesteps: self.timesteps.narrow(0, first, count),
            captions: &self.captions[first as usize..],
            sizes: &self.sizes[first as usize..],
        }
    }
}

impl Denoise {
    fn batch(&self, part: &Part) -> Result<Batch> {
        let (config, train) = (&self.config, &self.config.train);
        let positions = part.positions(train.train_batch_size);
        let class = self.class.as_ref().map(|class| &class.source);
        let (of_class, of_base) = match class {
            Some(ClassSource::Pictures(examples)) => (Some(examples), None),
            Some(ClassSource::Base { prompt, .. }) => (None, Some(prompt)),
            None => (None, None),
        };
        let (mut moments, mut posterior, mut noise) = (Vec::new(), Vec::new(), Vec::new());
        let (mut timesteps, mut sizes) = (Vec::new(), Vec::new());
        let (mut captions, mut captions_of_base) = (Vec::new(), Vec::new());
        for (place, examples) in [Some(&self.examples), of_class].into_iter().flatten().enumerate() {
            // The class has an order and noise of its own: a set of another size would otherwise pair the same pictures.
            let seed = config.seed.wrapping_add(place as u64);
            let chosen = samples_at(seed, positions.clone(), examples.epoch.len());
            for (position, chosen) in positions.clone().zip(chosen) {
                let chosen = examples.epoch[chosen];
                let random = |purpose| generator(seed, purpose, position);
                let mut augment = random(Purpose::Augment);
                let flip = examples.flipped && augment.next_u32() & 1 == 1;
                let place = chosen + if flip { examples.len() } else { 0 };
                let mut caption = |whole: &String| {
                    let dropped = uniform(&mut augment) < config.data.caption_dropout_rate;
                    if dropped { String::new() } else { whole.clone() }
                };
                captions.push(caption(&examples.captions[chosen]));
                captions_of_base.extend(of_base.map(caption));
                sizes.push(examples.sizes[place]);
                let of_picture = &examples.moments[place];
                let size = of_picture.size();
                let size = [size[0] / 2, size[1], size[2]];
                moments.push(of_picture.shallow_clone());
                posterior.push(normal(&mut random(Purpose::Posterior), &size));
                noise.push(self.noise(&mut random(Purpose::Noise), &size));
                let steps = self.schedule.timesteps();
                timesteps.push(draw_timestep(&mut random(Purpose::Timesteps), steps, train.timestep_beta)?);
            }
        }
        let stacked = |tensors: &[Tensor]| Tensor::stack(tensors, 0).to_device(self.device);
        let mut latents = draw_latents(&stacked(&moments), self.scaling_factor, &stacked(&posterior));
        let mut noise = stacked(&noise);
        if of_base.is_some() {
            // The same noised latents once more, told the class.
            latents = Tensor::cat(&[&latents, &latents], 0);
            noise = Tensor::cat(&[&noise, &noise], 0);
            timesteps.extend_from_within(..);
            sizes.extend_from_within(..);
            captions.extend(captions_of_base);
        }
        let weights = train.min_snr_gamma.map(|gamma| self.snr_weights(gamma, &timesteps));
        let weights = weights.map(|weights| Tensor::from_slice(&weights).to_device(self.device));
        let timesteps = Tensor::from_slice(&timesteps).to_device(self.device);
        let noised = self.schedule.add_noise(&latents, &noise, &timesteps).to_kind(self.kind);
        let target = self.schedule.target(&latents, &noise, &timesteps);
        Ok(Batch { noised, timesteps, target, weights, captions, sizes })
    }

    /// Noise of one example `[C, h, w]` on the CPU: a unit normal, and by `train.noise_offset` one number more a channel.
    fn noise(&self, random: &mut impl Rng, size: &[i64; 3]) -> Tensor {
        let noise = normal(random, size);
        match self.config.train.noise_offset {
            offset if offset > 0.0 => noise + normal(random, &[size[0], 1, 1]) * offset,
            _ => noise,
        }
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

/// A timestep, 0…`steps` − 1: evenly, or where Beta(a, b) puts it between the first and the last.
fn draw_timestep(random: &mut impl Rng, steps: i64, beta: Option<[f64; 2]>) -> Result<i64> {
    let place = match beta {
        None => uniform(random),
        Some([a, b]) => Beta::new(a, b).context("train.timestep_beta")?.sample(random),
    };
    Ok(((place * steps as f64) as i64).min(steps - 1))
}

impl Objective for Denoise {
    fn loss(&mut self, networks: &Networks, part: &Part) -> Result<Loss> {
        let batch = self.batch(part)?;
        let recomputes = self.config.train.gradient_checkpointing;
        let learning = |weights| Tensors::new(weights).computing_in(self.kind).recomputing(recomputes);
        let text_encoder = networks.get(&Component::TextEncoder).map(learning);
        let told = self.texts.embed(&batch.captions, &batch.sizes, text_encoder)?.to_kind(self.kind);

        let Distill { lambda_sd, lambda_kd_output, lambda_kd_feat, .. } = self.config.distill;
        let features = self.teacher.is_some() && lambda_kd_feat > 0.0;
        let (ours, theirs) = (RefCell::new(Vec::new()), RefCell::new(Vec::new()));
        let mut student = learning(networks.get(&Component::Unet).context("the UNet does not train")?);
        if features {
            student = student.keeping_features(&ours);
        }
        let output = unet(&mut student, &self.unet, &batch.noised, &batch.timesteps, told.condition());
        let output = output.to_kind(Kind::Float);
        let rows = batch.captions.len() as i64;
        // Where the class begins, and where what the teacher is asked about does.
        let half = if self.class.is_some() { rows / 2 } else { rows };
        let first = if asks_class_alone(&self.config.distill) { half } else { 0 };
        let taught = match &self.teacher {
            Some(teacher) => Some(teacher.answer(&batch.question(first), features.then_some(&theirs))?),
            None => None,
        };
        let target = match self.class.as_ref().map(|class| &class.source) {
            Some(ClassSource::Base { base, .. }) => {
                let known = self.teacher.as_ref().filter(|teacher| Rc::ptr_eq(teacher, base)).and(taught.as_ref());
                let answer = match known {
                    Some(taught) => taught.narrow(0, half - first, half),
                    None => base.answer(&batch.question(half), None)?,
                };
                Tensor::cat(&[batch.target.narrow(0, 0, half), answer], 0)
            }
            _ => batch.target,
        };
        let prior = self.class.as_ref().map(|class| class.weight);
        // Of squares `[B]`: the mean over the pictures, and that over those of the class times λ.
        let all = |squares: Tensor| means(&squares, batch.weights.as_ref(), prior);
        // Of squares of what the teacher was asked about.
        let asked = |squares: Tensor| match first {
            0 => all(squares).sum(),
            _ => {
                let weights = batch.weights.as_ref().map(|weights| weights.narrow(0, first, rows - first));
                means(&squares, weights.as_ref(), None).sum()
            }
        };
        let lambda_sd = if self.teacher.is_some() { lambda_sd } else { 1.0 };
        let Means { pictures, class } = all(squares(&output - target));
        let mut total = pictures * lambda_sd;
        // What is logged adds up to the loss. Sums are new tensors: `+=` would change what is logged, too.
        let mut parts = vec![("loss/denoise", total.detach())];
        if let Some(class) = class {
            let class = class * lambda_sd;
            parts.push(("loss/prior", class.detach()));
            total = &total + class;
        }
        let Some(taught) = taught else { return Ok(Loss { total, parts }) };
        let of_asked = |tensor: &Tensor| tensor.narrow(0, first, rows - first);
        let distilled = asked(squares(of_asked(&output) - taught)) * lambda_kd_output;
        parts.push(("loss/distill", distilled.detach()));
        total = &total + distilled;
        if features {
            let pairs = ours.into_inner().into_iter().zip(theirs.into_inner());
            let float = |tensor: &Tensor| tensor.to_kind(Kind::Float);
            let sum: Tensor = pairs.map(|(a, b)| squares(float(&of_asked(&a)) - float(&b))).sum();
            let sum = asked(sum) * lambda_kd_feat;
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
mod tests;
