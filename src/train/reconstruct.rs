//! The autoencoder's objective: reconstruct pictures, with latents kept near a unit normal
//! (Rombach et al. 2022, appendix G, without the adversarial part).

use std::ops::Range;

use anyhow::Result;
use rand::Rng;
use tch::{Device, Kind, Tensor};

use super::objective::{Latents, Loss, Objective, Part};
use super::trained::Networks;
use crate::config::{AutoencoderLoss, LossType};
use crate::data::samples_at;
use crate::networks::autoencoder::{AutoencoderConfig, decode, encode};
use crate::ops::{Tensors, Weights};
use crate::source::Component;
use crate::torch::random::{Purpose, generator, normal, uniform};

/// Trains on pictures held as bytes.
pub struct Reconstruct {
    pub config: AutoencoderConfig,
    pub settings: AutoencoderLoss,
    /// `[N, 3, H, W]`, bytes.
    pub pictures: Tensor,
    /// Which of them stands at each place of an epoch.
    pub epoch: Vec<usize>,
    /// The same for validation.
    pub validation: Option<Tensor>,
    pub batch: usize,
    pub flip: bool,
    pub seed: u64,
    pub device: Device,
    pub kind: Kind,
    pub recomputes: bool,
}

impl Reconstruct {
    /// Bytes to −1…1.
    fn picture(&self, bytes: &Tensor) -> Tensor {
        bytes.to_device(self.device).to_kind(Kind::Float) / 127.5 - 1.0
    }

    fn ops<'w>(&self, networks: &'w Networks) -> Tensors<'w> {
        Tensors::new(&networks[&Component::Autoencoder]).computing_in(self.kind)
    }

    /// What is added to the latents of one picture, `[C, h, w]` on the CPU: noise of a deviation drawn uniformly from 0 to
    /// `latent_noise`, in units of scaled latents.
    fn latent_noise(&self, position: u64, size: &[i64]) -> Tensor {
        let mut random = generator(self.seed, Purpose::Noise, position);
        let most = self.settings.latent_noise / self.config.scaling_factor;
        let deviation = most * uniform(&mut random);
        normal(&mut random, size) * deviation
    }

    /// Pictures `[B, 3, H, W]`, mirrored and cropped at random.
    fn batch(&self, positions: Range<u64>) -> Tensor {
        let chosen = samples_at(self.seed, positions.clone(), self.epoch.len());
        let (height, width) = (self.pictures.size()[2], self.pictures.size()[3]);
        let pictures: Vec<Tensor> = positions
            .zip(chosen)
            .map(|(position, place)| {
                let mut random = generator(self.seed, Purpose::Augment, position);
                let mut picture = self.pictures.get(self.epoch[place] as i64);
                if self.flip && random.next_u32() & 1 == 1 {
                    picture = picture.flip([2]);
                }
                match self.settings.crop {
                    Some(side) if side < height && side < width => {
                        let top = (random.next_u32() as i64) % (height - side + 1);
                        let left = (random.next_u32() as i64) % (width - side + 1);
                        picture.narrow(1, top, side).narrow(2, left, side)
                    }
                    _ => picture,
                }
            })
            .collect();
        self.picture(&Tensor::stack(&pictures, 0))
    }
}

/// Whether a parameter of an autoencoder works on latents, not on pictures.
fn is_of_decoder(parameter: &str) -> bool {
    parameter.starts_with("decoder.") || parameter.starts_with("post_quant_conv.")
}

/// How far `got` is from `picture`, both `[B, C, H, W]`: the mean over `settings.scales` scales of
/// d(picture, got) + `gradient_weight` · ½ · (d(∂x picture, ∂x got) + d(∂y picture, ∂y got)), where d is the mean
/// absolute or squared difference, ∂ the difference of neighbouring pixels, and a scale has the means of 2 × 2 pixels
/// of the one before it. A scalar.
pub fn reconstruction_loss(settings: &AutoencoderLoss, picture: &Tensor, got: &Tensor) -> Tensor {
    let mean = |difference: &Tensor| match settings.loss_type {
        LossType::L1 => difference.abs().mean(Kind::Float),
        LossType::L2 => difference.square().mean(Kind::Float),
    };
    // All of it is linear but the last step: the difference is taken first, and once.
    let mut difference = picture - got.to_kind(Kind::Float);
    let mut total = Tensor::zeros([], (Kind::Float, difference.device()));
    for scale in 0..settings.scales {
        if scale > 0 {
            difference = difference.avg_pool2d([2, 2], [2, 2], [0, 0], false, true, None);
        }
        total += mean(&difference);
        if settings.gradient_weight > 0.0 {
            let edges = mean(&difference.diff(1, 3, NONE, NONE)) + mean(&difference.diff(1, 2, NONE, NONE));
            total += edges * (0.5 * settings.gradient_weight);
        }
    }
    total / f64::from(settings.scales)
}

const NONE: Option<&Tensor> = None;

/// Takes `mean` (`[C]`) from the latents that an autoencoder of these weights makes, and gives it back before it decodes: what
/// comes out stays the same. Without the two 1 × 1 convolutions around latents there is no place for that, and nothing changes.
///
/// # Errors
/// libtorch's (shapes of another autoencoder).
pub fn move_latents(weights: &mut Weights, mean: &Tensor) -> Result<()> {
    const PLACES: [&str; 3] = ["quant_conv.bias", "post_quant_conv.weight", "post_quant_conv.bias"];
    let _guard = tch::no_grad_guard();
    let [Some(given), Some(taken), Some(bias)] = PLACES.map(|name| weights.get(name)) else { return Ok(()) };
    let (mean, kind) = (mean.f_to_device(given.device())?.f_to_kind(Kind::Float)?, given.kind());
    // Log-variances, behind the means, stay.
    let moved = Tensor::f_cat(&[&mean, &mean.zeros_like()], 0)?;
    let given = given.f_to_kind(Kind::Float)?.f_sub(&moved)?.f_to_kind(kind)?;
    let back = taken.f_to_kind(Kind::Float)?.f_squeeze()?.f_mv(&mean)?;
    let bias = bias.f_to_kind(Kind::Float)?.f_add(&back)?.f_to_kind(kind)?;
    weights.insert(PLACES[0].to_owned(), given);
    weights.insert(PLACES[2].to_owned(), bias);
    Ok(())
}

impl Objective for Reconstruct {
    fn learns(&self, parameter: &str) -> bool {
        !self.settings.decoder_only || is_of_decoder(parameter)
    }

    fn loss(&mut self, networks: &Networks, part: &Part) -> Result<Loss> {
        let positions = part.positions(self.batch);
        let picture = self.batch(positions.clone());
        let ops = &mut self.ops(networks).recomputing(self.recomputes);
        let moments = encode(ops, &self.config, &picture.to_kind(self.kind)).to_kind(Kind::Float);
        let halves = moments.chunk(2, 1);
        let (mean, log_variance) = (&halves[0], halves[1].clamp(-30.0, 20.0));
        let size = mean.size();
        // One tensor of each picture's own.
        let each = |draw: &dyn Fn(u64) -> Tensor| {
            Tensor::stack(&positions.clone().map(draw).collect::<Vec<_>>(), 0).to_device(self.device)
        };
        let noise = each(&|position| normal(&mut generator(self.seed, Purpose::Posterior, position), &size[1..]));
        let mut latents = mean + (&log_variance * 0.5).exp() * noise;
        if self.settings.latent_noise > 0.0 {
            latents += each(&|position| self.latent_noise(position, &size[1..]));
        }
        let got = decode(ops, &self.config, &latents.to_kind(self.kind));
        let reconstruction = reconstruction_loss(&self.settings, &picture, &got);
        if self.settings.decoder_only {
            let parts = vec![("reconstruction", reconstruction.shallow_clone())];
            return Ok(Loss { total: reconstruction, parts });
        }
        // KL(N(mean, σ²) ‖ N(0, 1)) per latent value.
        let divergence = (mean.square() + log_variance.exp() - 1.0 - &log_variance).mean(Kind::Float) * 0.5;
        let parts = vec![("reconstruction", reconstruction.shallow_clone()), ("kl", divergence.shallow_clone())];
        Ok(Loss { total: reconstruction + divergence * self.settings.kl_weight, parts })
    }

    fn validate(&mut self, networks: &Networks) -> Result<Option<f64>> {
        let Some(pictures) = &self.validation else { return Ok(None) };
        let _guard = tch::no_grad_guard();
        let ops = &mut self.ops(networks);
        let mut total = 0.0;
        for start in (0..pictures.size()[0]).step_by(8) {
            super::stop::go_on()?;
            let count = (pictures.size()[0] - start).min(8);
            let picture = self.picture(&pictures.narrow(0, start, count));
            let moments = encode(ops, &self.config, &picture.to_kind(self.kind));
            let got = decode(ops, &self.config, &moments.narrow(1, 0, self.config.latent_channels));
            total += reconstruction_loss(&self.settings, &picture, &got).double_value(&[]) * count as f64;
        }
        Ok(Some(total / pictures.size()[0] as f64))
    }

    fn pictures(&mut self, networks: &Networks) -> Result<Vec<Tensor>> {
        let _guard = tch::no_grad_guard();
        let shown = self.validation.as_ref().unwrap_or(&self.pictures);
        let picture = self.picture(&shown.narrow(0, 0, shown.size()[0].min(8)));
        let ops = &mut self.ops(networks);
        let moments = encode(ops, &self.config, &picture.to_kind(self.kind));
        let got = decode(ops, &self.config, &moments.narrow(1, 0, self.config.latent_channels)).to_kind(Kind::Float);
        // Originals above, reconstructions below.
        let count = picture.size()[0];
        let both = Tensor::cat(&[picture, got], 0) / 2.0 + 0.5;
        Ok((0..2 * count).map(|i| both.get(i)).collect())
    }

    fn latents(&mut self, networks: &Networks) -> Result<Option<Latents>> {
        if self.settings.decoder_only {
            return Ok(None);
        }
        let _guard = tch::no_grad_guard();
        let ops = &mut self.ops(networks);
        let mut latents = Vec::new();
        // Some hundred pictures settle a standard deviation to the second digit.
        for start in (0..self.pictures.size()[0].min(256)).step_by(8) {
            let count = (self.pictures.size()[0] - start).min(8);
            let picture = self.picture(&self.pictures.narrow(0, start, count));
            let moments = encode(ops, &self.config, &picture.to_kind(self.kind)).to_kind(Kind::Float);
            latents.push(moments.narrow(1, 0, self.config.latent_channels).to_device(Device::Cpu));
        }
        let latents = Tensor::cat(&latents, 0);
        let mean = latents.mean_dim([0, 2, 3].as_slice(), false, Kind::Float);
        let deviation = (latents - mean.view([1, -1, 1, 1])).std(true).double_value(&[]);
        Ok(Some(Latents { mean, deviation }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The formula with loops over pixels.
    fn plain(settings: &AutoencoderLoss, difference: &[Vec<f64>]) -> f64 {
        let of = |value: f64| match settings.loss_type {
            LossType::L1 => value.abs(),
            LossType::L2 => value * value,
        };
        let mean = |values: Vec<f64>| values.iter().copied().map(of).sum::<f64>() / values.len() as f64;
        let mut picture = difference.to_vec();
        let mut total = 0.0;
        for scale in 0..settings.scales {
            if scale > 0 {
                picture = picture
                    .chunks_exact(2)
                    .map(|rows| {
                        let pairs = rows[0].chunks_exact(2).zip(rows[1].chunks_exact(2));
                        pairs.map(|(above, below)| (above[0] + above[1] + below[0] + below[1]) / 4.0).collect()
                    })
                    .collect();
            }
            total += mean(picture.concat());
            let across: Vec<f64> = picture.iter().flat_map(|row| row.windows(2).map(|two| two[1] - two[0])).collect();
            let down =
                picture.windows(2).flat_map(|rows| rows[1].iter().zip(&rows[0]).map(|(below, above)| below - above));
            total += settings.gradient_weight * (mean(across) + mean(down.collect())) / 2.0;
        }
        total / f64::from(settings.scales)
    }

    /// An autoencoder of two channels: its latents lose their mean, and its pictures stay.
    #[test]
    fn latents_that_are_moved_decode_to_the_same_pictures() {
        let json = serde_json::json!({
            "_class_name": "AutoencoderKL", "in_channels": 3, "out_channels": 3, "latent_channels": 2,
            "block_out_channels": [8, 8], "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 16,
            "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D"],
            "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D"],
        });
        let config = AutoencoderConfig::from_json(&json).unwrap();
        let mut weights = crate::train::initialise::initialise(&config.parameters(), 5);
        let picture = normal(&mut generator(2, Purpose::Initial, 9), &[4, 3, 16, 16]);
        let latents = |weights: &Weights| encode(&mut Tensors::new(weights), &config, &picture).narrow(1, 0, 2);
        let pictures = |weights: &Weights| decode(&mut Tensors::new(weights), &config, &latents(weights));
        let (before, drawn) = (latents(&weights), pictures(&weights));
        let mean = before.mean_dim([0, 2, 3].as_slice(), false, Kind::Float);
        assert!(mean.abs().min().double_value(&[]) > 1e-3, "{mean:?}");
        move_latents(&mut weights, &mean).unwrap();
        let largest = |tensor: Tensor| tensor.abs().max().double_value(&[]);
        assert!(largest(latents(&weights) - (before - mean.view([1, 2, 1, 1]))) < 1e-6);
        assert!(largest(pictures(&weights) - drawn) < 1e-5);
    }

    #[test]
    fn the_loss_follows_its_formula() {
        let (height, width) = (8, 12);
        let pixels = |seed: usize| -> Vec<f64> {
            (0..height * width).map(|i| ((i * 37 + seed * 11) % 29) as f64 / 14.5 - 1.0).collect()
        };
        let (picture, got) = (pixels(1), pixels(6));
        let difference: Vec<f64> = picture.iter().zip(&got).map(|(a, b)| a - b).collect();
        let rows: Vec<Vec<f64>> = difference.chunks_exact(width).map(<[f64]>::to_vec).collect();
        let tensor =
            |values: &[f64]| Tensor::from_slice(values).view([1, 1, height as i64, width as i64]).to_kind(Kind::Float);
        for loss_type in [LossType::L1, LossType::L2] {
            for (gradient_weight, scales) in [(0.0, 1), (0.7, 1), (0.0, 3), (1.5, 2)] {
                let settings = AutoencoderLoss { loss_type, gradient_weight, scales, ..AutoencoderLoss::default() };
                let loss = reconstruction_loss(&settings, &tensor(&picture), &tensor(&got)).double_value(&[]);
                let expected = plain(&settings, &rows);
                assert!((loss - expected).abs() < 1e-6 * expected, "{settings:?}: {loss}, not {expected}");
            }
        }
    }
}
