//! The config's prompts, drawn during a run with the weights as they would ship.

use anyhow::{Context, Result, anyhow};
use tch::{Device, Kind, Tensor};

use super::refused::Refused;
use super::trained::Networks;
use crate::config::{Config, Sample, SamplePrompt};
use crate::diffusion::{Noise, Own};
use crate::ops::Weights;
use crate::pipeline::drawing::{pipeline_config, sampler_of};
use crate::pipeline::{Pipeline, Request, TextEncoder};
use crate::source::{Component, Model};

/// Draws one picture a prompt, `[3, H, W]` in −1…1, always from the same noise.
pub type Sampler = Box<dyn FnMut(&Networks) -> Result<Vec<Tensor>>>;

/// Whether a run draws samples with the sampler of the model's scheduler.
pub fn samples_with_own(config: &Config) -> bool {
    let sample = &config.sample;
    sample.sample_every_n_steps > 0 && !sample.prompts.is_empty() && sample.sampler.0.is_none()
}

/// Which sampler is used for the pictures of a run, those of the class too, where the model's own is not there.
///
/// # Errors
/// The scheduler's configuration can't be read.
pub fn other_sampler(config: &Config, model: &Model) -> Result<Option<String>> {
    let draws = samples_with_own(config) || config.class_folder().is_some();
    Ok(if draws { Own::of(&model.scheduler_config()?).warning } else { None })
}

/// Checks that the samplers of a run's pictures, DreamBooth's of the class too, can do what is asked of them.
///
/// # Errors
/// What a sampler cannot do with the model's schedule or in so many steps.
pub fn check_samplers(config: &Config, model: &Model) -> Result<()> {
    let scheduler = pipeline_config(model.scheduler_config()?, model.is_xl());
    let mut asked = Vec::new();
    if config.sample.sample_every_n_steps > 0 {
        let requests = requests(&config.sample, config.data.resolution)?;
        asked.extend(requests.iter().map(|request| ("sample.sample_steps", request.sampler, request.steps)));
    }
    if let Some((settings, _)) = config.class_folder() {
        asked.push(("data.dreambooth.prior_sample_steps", None, settings.prior_sample_steps));
    }
    for (key, sampler, steps) in asked {
        // Whatever the number of steps, it is the model's scheduler that cannot.
        let by_steps = |error: anyhow::Error| match sampler_of(&scheduler, sampler, 1) {
            Ok(_) => Refused(format!("{key} = {steps}: {error:#}")).into(),
            Err(_) => error.context(format!("{key} = {steps}")),
        };
        sampler_of(&scheduler, sampler, steps).map_err(by_steps)?;
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
        let draw = |request: Request| Ok(pipeline.generate(&request, &mut |_, _| super::stop::go_on())?.images.get(0));
        requests(&sample, side)?.into_iter().map(draw).collect()
    })
}

/// What to draw of each of the prompts: what a prompt does not say is what `sample` says, `side` px wide and high.
///
/// # Errors
/// A prompt's flags are wrong.
fn requests(sample: &Sample, side: i64) -> Result<Vec<Request>> {
    let request = |(index, line): (usize, &String)| {
        let prompt = SamplePrompt::parse(line).map_err(|message| anyhow!("sample.prompts (\"{line}\"): {message}"))?;
        Ok(prompt.request(Request {
            steps: sample.sample_steps,
            guidance_scale: sample.guidance_scale,
            sampler: sample.sampler.0,
            noise: Noise::Seed(sample.seed.wrapping_add(index as u64)),
            size: Some((side, side)),
            ..Request::default()
        }))
    };
    sample.prompts.iter().enumerate().map(request).collect()
}

/// Handles to the same tensors.
fn shared(weights: &Weights) -> Weights {
    weights.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diffusion::SamplerKind;

    #[test]
    fn flags_of_a_prompt_win_over_the_config() {
        let prompts =
            ["a cat", "a dog --n blurry --w 512 --h 768 --d 7 --l 5 --s 9 --ss euler"].map(String::from).to_vec();
        let requests = requests(&Sample { prompts, seed: 40, ..Sample::default() }, 64).unwrap();
        let [plain, told] = requests.as_slice() else { panic!("two prompts") };
        assert_eq!((plain.prompt.as_str(), plain.negative_prompt.as_str(), plain.steps), ("a cat", "", 25));
        assert_eq!((plain.size, plain.guidance_scale, plain.sampler), (Some((64, 64)), 7.5, None));
        assert!(matches!(plain.noise, Noise::Seed(40)));
        assert_eq!((told.prompt.as_str(), told.negative_prompt.as_str(), told.steps), ("a dog", "blurry", 9));
        assert_eq!((told.size, told.guidance_scale, told.sampler), (Some((768, 512)), 5.0, Some(SamplerKind::Euler)));
        assert!(matches!(told.noise, Noise::Seed(7)));
    }
}
