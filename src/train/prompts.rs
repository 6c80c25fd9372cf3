//! The config's prompts, drawn during a run with the weights as they would ship.

use anyhow::{Context, Result};
use tch::{Device, Kind, Tensor};

use super::setup::AutoencoderParts;
use super::trained::Networks;
use crate::config::{self, Config};
use crate::diffusion::SamplerKind;
use crate::diffusion::pipeline::{Noise, Pipeline, Request, pipeline_config};
use crate::ops::Weights;
use crate::source::{Component, Model};

/// Draws one picture a prompt, `[3, H, W]` in −1…1, always from the same noise.
pub type Sampler = Box<dyn FnMut(&Networks) -> Result<Vec<Tensor>>>;

/// A sampler that shares the autoencoder and the text encoder with the run, and takes the UNet (and the text encoder
/// that learns) at each call.
///
/// # Errors
/// Files of the model that can't be read.
pub fn sampler(
    config: &Config,
    model: &Model,
    autoencoder: AutoencoderParts,
    text_weights: &Weights,
    (device, kind): (Device, Kind),
) -> Result<Sampler> {
    let mut pipeline = Pipeline {
        tokenizer: model.tokenizer()?,
        text_encoder_config: model.text_encoder_config()?,
        text_encoder: shared(text_weights, kind),
        unet_config: model.unet_config()?,
        unet: Weights::new(),
        autoencoder_config: autoencoder.config,
        autoencoder: shared(&autoencoder.weights, kind),
        scheduler_config: pipeline_config(model.scheduler_config()?),
        kind,
        device,
    };
    let sample = config.sample.clone();
    let side = config.data.resolution;
    Ok(Box::new(move |networks| {
        pipeline.unet = shared(networks.get(&Component::Unet).context("the UNet does not train")?, kind);
        if let Some(weights) = networks.get(&Component::TextEncoder) {
            pipeline.text_encoder = shared(weights, kind);
        }
        let mut pictures = Vec::new();
        for (index, prompt) in sample.prompts.iter().enumerate() {
            let request = Request {
                prompt: prompt.clone(),
                steps: sample.sample_steps,
                guidance_scale: sample.guidance_scale,
                sampler: Some(sampler_kind(sample.sampler)),
                noise: Noise::Seed(sample.seed.wrapping_add(index as u64)),
                size: Some((side, side)),
                ..Request::default()
            };
            pictures.push(pipeline.generate(&request, &mut |_, _| {})?.images.get(0));
        }
        pipeline.unet = Weights::new();
        Ok(pictures)
    }))
}

/// The config's word for a sampler, as the samplers' own.
pub fn sampler_kind(sampler: config::Sampler) -> SamplerKind {
    match sampler {
        config::Sampler::Ddim => SamplerKind::Ddim,
        config::Sampler::Pndm => SamplerKind::Pndm,
        config::Sampler::Euler => SamplerKind::Euler,
        config::Sampler::DpmppTwoM => SamplerKind::DpmppTwoM,
    }
}

/// Handles to the same tensors, converted where they are of another type.
fn shared(weights: &Weights, kind: Kind) -> Weights {
    weights.iter().map(|(name, tensor)| (name.clone(), tensor.to_kind(kind))).collect()
}
