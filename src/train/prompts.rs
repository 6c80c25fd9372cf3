//! The config's prompts, drawn during a run with the weights as they would ship.

use anyhow::{Context, Result};
use tch::{Device, Kind, Tensor};

use super::trained::Networks;
use crate::config::Config;
use crate::diffusion::pipeline::pipeline_config;
use crate::diffusion::{Noise, Own, Pipeline, Request, TextEncoder};
use crate::ops::Weights;
use crate::source::{Component, Model};

/// Draws one picture a prompt, `[3, H, W]` in −1…1, always from the same noise.
pub type Sampler = Box<dyn FnMut(&Networks) -> Result<Vec<Tensor>>>;

/// Says once which sampler is used where the model's own is not there.
pub fn warn_of_sampler(config: &Config, model: &Model) -> Result<()> {
    let sample = &config.sample;
    if sample.sample_every_n_steps == 0 || sample.prompts.is_empty() || sample.sampler.0.is_some() {
        return Ok(());
    }
    if let Some(warning) = Own::of(&model.scheduler_config()?).warning {
        eprintln!("warning: {warning}");
    }
    Ok(())
}

/// A sampler that takes the UNet, and the text encoder if that learns, at each call. The rest it reads from the model
/// each time: for a few seconds of reading, their memory is the training's.
pub fn sampler(config: &Config, model: &Model, (device, kind): (Device, Kind)) -> Sampler {
    let (sample, model, side) = (config.sample.clone(), model.clone(), config.data.resolution);
    Box::new(move |networks| {
        let text_encoder = |component: Component| match networks.get(&component) {
            None => TextEncoder::load(&model, component, kind, device),
            Some(weights) => Ok(TextEncoder {
                tokenizer: model.tokenizer_of(component)?,
                config: model.text_encoder_config_of(component)?,
                weights: shared(weights),
            }),
        };
        let unet_config = model.unet_config()?;
        let pipeline = Pipeline {
            text_encoders: model.text_encoders().map(text_encoder).collect::<Result<_>>()?,
            zeros_for_empty_prompt: model.zeros_for_empty_prompt()?,
            unet: shared(networks.get(&Component::Unet).context("the UNet does not train")?),
            autoencoder_config: model.autoencoder_config()?,
            autoencoder: model.weights(Component::Autoencoder, kind, device)?,
            scheduler_config: pipeline_config(model.scheduler_config()?, unet_config.addition.is_some()),
            unet_config,
            kind,
            device,
        };
        let draw = |(index, prompt): (usize, &String)| {
            let request = Request {
                prompt: prompt.clone(),
                steps: sample.sample_steps,
                guidance_scale: sample.guidance_scale,
                sampler: sample.sampler.0,
                noise: Noise::Seed(sample.seed.wrapping_add(index as u64)),
                size: Some((side, side)),
                ..Request::default()
            };
            Ok(pipeline.generate(&request, &mut |_, _| super::go_on())?.images.get(0))
        };
        sample.prompts.iter().enumerate().map(draw).collect()
    })
}

/// Handles to the same tensors.
fn shared(weights: &Weights) -> Weights {
    weights.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect()
}
