//! Text to image: prompt → text encoders → UNet under a sampler, with classifier-free guidance → VAE decoder.
//!
//! Symbols: N pictures, `h × w` the latents' size, `H × W` the pictures', f = H / h the autoencoder's factor (8). Agrees
//! with diffusers' `StableDiffusionPipeline` and `StableDiffusionXLPipeline` given the same noise.
//! Latents and the sampler's arithmetic are fp32, whatever the type of the networks.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

use super::condition::{Conditioning, TextEncoder, encode_texts, uncropped};
use super::text_to_image::TextToImage;
use crate::diffusion::{Draws, Noise, Own, Sampler, SamplerKind};
use crate::networks::autoencoder::{AutoencoderConfig, decode};
use crate::networks::unet::{UnetConfig, unet};
use crate::ops::{Parameter, Tensors, Weights};
use crate::palette::PalettizedCheckpoint;
use crate::source::{Component, Model};

/// A model that is ready to draw.
pub struct Pipeline {
    /// One, or Stable Diffusion XL's two.
    pub text_encoders: Vec<TextEncoder>,
    /// Whether an empty negative prompt is zeros, not an encoded text ([`Model::zeros_for_empty_prompt`]).
    pub zeros_for_empty_prompt: bool,
    pub unet_config: UnetConfig,
    pub unet: Weights,
    pub autoencoder_config: AutoencoderConfig,
    pub autoencoder: Weights,
    /// `scheduler_config.json`, as [`pipeline_config`] has it.
    pub scheduler_config: Value,
    /// What networks compute in: weights of another type are converted when they are used.
    pub kind: Kind,
    /// Where all weights are.
    pub device: Device,
}

/// What to draw.
#[derive(Debug)]
pub struct Request {
    pub prompt: String,
    /// What to stay away from; empty for none, see [`Pipeline::zeros_for_empty_prompt`].
    pub negative_prompt: String,
    pub steps: usize,
    /// 1 or less: no guidance, and half the work.
    pub guidance_scale: f64,
    /// The model's own, see [`Pipeline::own_sampler`], if not given.
    pub sampler: Option<SamplerKind>,
    pub noise: Noise,
    /// How many pictures; with [`Noise::Latents`] and [`Noise::Seeds`] as many as those.
    pub images: usize,
    /// Height and width in pixels; the model's own if not given. With [`Noise::Latents`] those of the latents.
    pub size: Option<(i64, i64)>,
    /// How many pictures go through the UNet together.
    pub batch: usize,
}

impl Default for Request {
    fn default() -> Self {
        Self {
            prompt: String::new(),
            negative_prompt: String::new(),
            steps: 25,
            guidance_scale: 7.5,
            sampler: None,
            noise: Noise::Seed(0),
            images: 1,
            size: None,
            batch: 4,
        }
    }
}

/// What was drawn, on the CPU.
#[derive(Debug)]
pub struct Output {
    /// Final latents, before the VAE, fp32 `[N, C, h, w]`.
    pub latents: Tensor,
    /// Pictures from 0 to 1, fp32 `[N, 3, H, W]`.
    pub images: Tensor,
}

/// The scheduler's configuration as diffusers' pipelines take it: a `steps_offset` that is not 1 and a `clip_sample`
/// that is true are mistakes of early model files of Stable Diffusion 1 and 2, which they correct on loading. `xl`: a
/// model of Stable Diffusion XL, whose `steps_offset` stays. Latents are never clipped: DDIM's default, where a file has
/// no key as those of many schedulers, is for pictures.
pub fn pipeline_config(mut config: Value, xl: bool) -> Value {
    if config.is_object() {
        if !xl {
            config["steps_offset"] = json!(1);
        }
        config["clip_sample"] = json!(false);
    }
    config
}

/// Checks that a palettized checkpoint is of this model's UNet, by name and shape.
///
/// # Errors
/// The first parameter that is missing, of another shape, or not the UNet's.
pub fn check_palettes(model: &Model, checkpoint: &PalettizedCheckpoint) -> Result<()> {
    let dense: Vec<(&str, Vec<i64>)> =
        checkpoint.dense.iter().map(|(name, tensor)| (name.as_str(), tensor.size())).collect();
    let palettes = checkpoint.palettes.iter().map(|(name, palette)| (name.as_str(), palette.shape.as_slice()));
    check_shapes(model, &palettes.chain(dense.iter().map(|(name, shape)| (*name, shape.as_slice()))).collect())
}

/// The same of the names and shapes of a checkpoint's parameters, [`PalettizedFile::shapes`] say.
///
/// [`PalettizedFile::shapes`]: crate::palette::checkpoint::PalettizedFile::shapes
///
/// # Errors
/// As [`check_palettes`].
pub fn check_shapes(model: &Model, shapes: &BTreeMap<&str, &[i64]>) -> Result<()> {
    check_parameters(shapes, &model.parameters(Component::Unet)?).context("the palettes do not fit the model")
}

fn check_parameters(shapes: &BTreeMap<&str, &[i64]>, parameters: &[Parameter]) -> Result<()> {
    for Parameter { name, shape: wanted, .. } in parameters {
        let Some(got) = shapes.get(name.as_str()) else { bail!("`{name}` is missing, which this model's UNet has") };
        ensure!(got == wanted, "`{name}` has the shape {got:?}, and this model's UNet has {wanted:?}");
    }
    match shapes.keys().find(|name| parameters.iter().all(|p| p.name != ***name)) {
        Some(name) => bail!("`{name}` is there, which this model's UNet does not have"),
        None => Ok(()),
    }
}

/// The weights of a model's UNet: its own, or `palettes` in their place, checked against its configuration.
pub fn unet_weights(
    model: &Model,
    palettes: Option<&PalettizedCheckpoint>,
    kind: Kind,
    device: Device,
) -> Result<Weights> {
    match palettes {
        None => model.weights(Component::Unet, kind, device),
        Some(checkpoint) => {
            check_palettes(model, checkpoint)?;
            checkpoint.weights(kind, device)
        }
    }
}

/// The sampler that was asked for, or that of a `scheduler_config.json` ([`pipeline_config`]), in so many steps.
///
/// # Errors
/// As [`Sampler::new`].
pub fn sampler_of(config: &Value, asked: Option<SamplerKind>, steps: usize) -> Result<(SamplerKind, Sampler)> {
    Ok(match asked {
        Some(kind) => (kind, Sampler::named(kind, config, steps)?),
        None => {
            let own = Own::of(config);
            (own.kind, Sampler::new(own.kind, &own.config, steps)?)
        }
    })
}

fn is_finite(tensor: &Tensor) -> bool {
    tensor.isfinite().all().int64_value(&[]) != 0
}

/// The first weight by name that holds values that are not finite.
fn damaged(weights: &Weights) -> Option<&str> {
    weights.iter().filter(|(_, weight)| !is_finite(weight)).map(|(name, _)| name.as_str()).min()
}

/// Guidance beyond which what it multiplies is the first to be suspected of an overflow.
const FAR_GUIDANCE: f64 = 100.0;

impl Pipeline {
    /// Loads all that drawing needs; with `palettes`, in place of the UNet's weights.
    ///
    /// # Errors
    /// Files that are missing or damaged, networks that are not supported, palettes of another model.
    pub fn load(model: &Model, palettes: Option<&PalettizedCheckpoint>, kind: Kind, device: Device) -> Result<Self> {
        // What it is, before gigabytes of it are read.
        let TextToImage { unet: unet_config, autoencoder: autoencoder_config, .. } = TextToImage::of(model)?;
        Ok(Self {
            zeros_for_empty_prompt: model.zeros_for_empty_prompt()?,
            autoencoder_config,
            scheduler_config: pipeline_config(model.scheduler_config()?, unet_config.addition.is_some()),
            unet_config,
            text_encoders: TextEncoder::all(model, kind, device)?,
            unet: unet_weights(model, palettes, kind, device)?,
            autoencoder: model.weights(Component::Autoencoder, kind, device)?,
            kind,
            device,
        })
    }

    /// The sampler of the scheduler that the model came with, or what is used instead.
    pub fn own_sampler(&self) -> Own {
        Own::of(&self.scheduler_config)
    }

    /// The sampler that was asked for, or the model's own, in so many steps.
    ///
    /// # Errors
    /// As [`Sampler::new`].
    pub fn sampler(&self, asked: Option<SamplerKind>, steps: usize) -> Result<(SamplerKind, Sampler)> {
        sampler_of(&self.scheduler_config, asked, steps)
    }

    /// The size of pictures that the model was made for, height and width.
    pub fn own_size(&self) -> (i64, i64) {
        let side = self.unet_config.sample_size * self.autoencoder_config.factor();
        (side, side)
    }

    /// The classifier-free guidance scale where nobody says: diffusers' default for the kind of model.
    pub fn own_guidance_scale(&self) -> f64 {
        if self.unet_config.addition.is_some() { 5.0 } else { 7.5 }
    }

    /// From noise `[N, C, h, w]` of unit variance to latents of the same shape, fp32 on the device.
    ///
    /// `told` is of the N prompts, that of `guidance` of the negative ones, with its scale; without it there is no
    /// guidance. `draws` is the noise that the sampler adds. `step` is called after each of [`Sampler::timesteps`]; its
    /// error ends the work.
    fn denoise(
        &self,
        sampler: &Sampler,
        noise: &Tensor,
        draws: &mut Draws,
        told: &Conditioning,
        guidance: Option<(&Conditioning, f64)>,
        step: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Tensor> {
        let told = match guidance {
            Some((negative, _)) => Conditioning::cat(&[negative, told]),
            None => Conditioning::cat(&[told]),
        };
        let rows = told.context.size()[0];
        let mut ops = Tensors::new(&self.unet).computing_in(self.kind);
        let mut evaluate = |x: &Tensor, t: f64| {
            let x = x.to_kind(self.kind);
            let x = if guidance.is_some() { Tensor::cat(&[&x, &x], 0) } else { x };
            let timestep = Tensor::full(rows, t, (Kind::Float, self.device));
            let output = unet(&mut ops, &self.unet_config, &x, &timestep, told.condition()).to_kind(Kind::Float);
            step()?;
            Ok(match guidance {
                Some((_, scale)) => {
                    let halves = output.chunk(2, 0);
                    &halves[0] + (&halves[1] - &halves[0]) * scale
                }
                None => output,
            })
        };
        sampler.run(noise, &mut evaluate, draws)
    }

    /// Latents `[N, C, h, w]` to pictures from 0 to 1, `[N, 3, H, W]`, fp32 on the CPU; one at a time, since the
    /// decoder takes more memory than all the rest.
    pub fn decode(&self, latents: &Tensor) -> Result<Tensor> {
        let overflows = self.unet_config.addition.is_some() && self.autoencoder_config.force_upcast;
        let kind = if overflows && self.kind == Kind::Half { Kind::Float } else { self.kind };
        let latents = latents.f_to_device(self.device)?.f_to_kind(kind)? / self.autoencoder_config.scaling_factor;
        let mut ops = Tensors::new(&self.autoencoder).computing_in(kind);
        let one = |latents: &Tensor| {
            let image = tch::no_grad(|| decode(&mut ops, &self.autoencoder_config, &latents.unsqueeze(0)));
            if !is_finite(&image) {
                bail!("the picture is not finite: {}", self.fault_of_autoencoder(kind));
            }
            Ok((image.to_kind(Kind::Float) / 2.0 + 0.5).clamp(0.0, 1.0).to_device(Device::Cpu))
        };
        Ok(Tensor::cat(&latents.unbind(0).iter().map(one).collect::<Result<Vec<_>>>()?, 0))
    }

    /// Why the autoencoder's output is not finite though the latents are, where it computes in `kind`.
    fn fault_of_autoencoder(&self, kind: Kind) -> String {
        match damaged(&self.autoencoder) {
            Some(name) => Component::Autoencoder.not_finite(name),
            None if kind == Kind::Half => {
                "the autoencoder overflows in fp16, as Stable Diffusion XL's does: use --precision bf16 or fp32"
                    .to_owned()
            }
            None => "the autoencoder overflows".to_owned(),
        }
    }

    /// Why latents are not finite that were drawn with this guidance scale, where there was guidance.
    fn fault_of_unet(&self, guidance_scale: Option<f64>) -> String {
        let mut encoders = [Component::TextEncoder, Component::TextEncoder2].into_iter().zip(&self.text_encoders);
        let of_texts = encoders.find_map(|(of, encoder)| Some(of.not_finite(damaged(&encoder.weights)?)));
        if let Some(fault) = of_texts {
            return fault;
        }
        match (damaged(&self.unet), guidance_scale) {
            (Some(name), _) => Component::Unet.not_finite(name),
            (None, Some(scale)) if scale > FAR_GUIDANCE => {
                format!("the guidance scale {scale} is too large; models draw with 1 to 20")
            }
            (None, _) if self.kind == Kind::Half => {
                "the UNet overflows in fp16: use --precision bf16 or fp32".to_owned()
            }
            (None, _) => "the UNet overflows".to_owned(),
        }
    }

    /// The initial noise that `request` asks for, `[N, C, h, w]` fp32, checked.
    fn noise(&self, request: &Request) -> Result<Tensor> {
        let factor = self.autoencoder_config.factor();
        let channels = self.unet_config.in_channels;
        match &request.noise {
            Noise::Seed(_) | Noise::Seeds(_) => {
                let (height, width) = request.size.unwrap_or_else(|| self.own_size());
                for (name, side) in [("height", height), ("width", width)] {
                    ensure!(side > 0 && side % factor == 0, "{name} {side} is not a multiple of {factor}");
                }
                if let Noise::Seeds(seeds) = &request.noise {
                    let (seeds, images) = (seeds.len(), request.images);
                    ensure!(seeds == images, "{images} pictures are asked for with {seeds} seeds");
                }
                Ok(request.noise.initial(request.images, &[channels, height / factor, width / factor]))
            }
            Noise::Latents(latents, _) => {
                let size = latents.size();
                ensure!(
                    size.len() == 4 && size[1] == channels && size.iter().all(|&n| n > 0),
                    "the latents have the shape {size:?}; this model takes [N, {channels}, height/{factor}, width/{factor}]"
                );
                if let Some((height, width)) = request.size {
                    ensure!(
                        (height, width) == (size[2] * factor, size[3] * factor),
                        "the latents are for {} × {} pixels (height × width), and {height} × {width} are asked for",
                        size[2] * factor,
                        size[3] * factor
                    );
                }
                Ok(latents.to_kind(Kind::Float))
            }
        }
    }

    /// Draws. `progress` is told how many evaluations of the UNet are done, and how many there will be; it is called
    /// with 0 first. Its error ends the drawing.
    ///
    /// # Errors
    /// Sizes, numbers of steps or latents that the model cannot do; an output that is not finite.
    pub fn generate(&self, request: &Request, progress: &mut dyn FnMut(usize, usize) -> Result<()>) -> Result<Output> {
        let mut drawn = Vec::new();
        self.generate_batches(request, progress, &mut |batch| {
            drawn.push(batch);
            Ok(())
        })?;
        let cat = |part: fn(&Output) -> &Tensor| Tensor::cat(&drawn.iter().map(part).collect::<Vec<_>>(), 0);
        Ok(Output { latents: cat(|output| &output.latents), images: cat(|output| &output.images) })
    }

    /// The same, batch by batch: each is given to `finished` as soon as it is done.
    ///
    /// # Errors
    /// As [`Self::generate`], and those of `finished`.
    pub fn generate_batches(
        &self,
        request: &Request,
        progress: &mut dyn FnMut(usize, usize) -> Result<()>,
        finished: &mut dyn FnMut(Output) -> Result<()>,
    ) -> Result<()> {
        ensure!(request.images > 0, "0 pictures are asked for");
        let noise = self.noise(request)?;
        let (_, sampler) = self.sampler(request.sampler, request.steps)?;
        let factor = self.autoencoder_config.factor();
        let sizes = [uncropped(noise.size()[2] * factor, noise.size()[3] * factor)];
        let encode = |text: &str| encode_texts(&self.text_encoders, &[text], (self.device, self.kind));
        let prompt = encode(&request.prompt)?;
        let negative = match request.negative_prompt.as_str() {
            _ if request.guidance_scale <= 1.0 => None,
            "" if self.zeros_for_empty_prompt => Some(prompt.map(Tensor::zeros_like)),
            text => Some(encode(text)?),
        };
        let (prompt, negative) = (prompt.with_sizes(&sizes), negative.map(|negative| negative.with_sizes(&sizes)));

        let chunks = noise.split(request.batch.max(1) as i64, 0);
        let total = chunks.len() * sampler.timesteps().len();
        let (mut done, mut first) = (0, 0);
        progress(done, total)?;
        for chunk in &chunks {
            let rows = chunk.size()[0];
            let pictures = first..first + rows as usize;
            first = pictures.end;
            let negative = negative.as_ref().map(|negative| negative.repeated(rows));
            let guidance = negative.as_ref().map(|negative| (negative, request.guidance_scale));
            let chunk = chunk.f_to_device(self.device)?;
            let mut draws = |draw: usize| Ok(request.noise.added(pictures.clone(), draw, &chunk));
            let drawn = self.denoise(&sampler, &chunk, &mut draws, &prompt.repeated(rows), guidance, &mut || {
                done += 1;
                progress(done, total)
            })?;
            if !is_finite(&drawn) {
                bail!("the latents are not finite: {}", self.fault_of_unet(guidance.map(|(_, scale)| scale)));
            }
            finished(Output { images: self.decode(&drawn)?, latents: drawn.to_device(Device::Cpu) })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mistakes_of_early_scheduler_files_are_corrected() {
        let config = pipeline_config(json!({"steps_offset": 0}), false);
        assert_eq!(config, json!({"steps_offset": 1, "clip_sample": false}));
        let config = pipeline_config(json!({"steps_offset": 0, "clip_sample": true}), true);
        assert_eq!(config, json!({"steps_offset": 0, "clip_sample": false}));
    }
}
