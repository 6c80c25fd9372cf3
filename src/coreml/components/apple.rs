//! What Apple's Swift package takes for granted of every model, and says of none: a model that is otherwise makes wrong
//! pictures there, or none.

use anyhow::Result;
use serde_json::json;

use super::parts::Part;
use super::unet::UnetOptions;
use crate::diffusion::NoiseSchedule;
use crate::pipeline::text_to_image;
use crate::source::Model;

/// Of latents.
const CHANNELS: i64 = 4;
/// How many times smaller latents are than pictures.
const FACTOR: i64 = 8;
/// Side of the pictures that are handed to a safety checker, in pixels.
const CHECKED: i64 = 512;

/// What of the packages `parts`, made with these options, Apple's programs cannot use as it is meant: a line each.
///
/// # Errors
/// A configuration of one of them can't be read.
pub fn misfits(model: &Model, parts: &[Part], options: &UnetOptions) -> Result<Vec<String>> {
    let &UnetOptions { height, width, batch, controlnet, .. } = options;
    let mut lines = Vec::new();
    if parts.contains(&Part::Unet) {
        let unet = model.unet_config()?;
        let (taken, given) = (unet.in_channels, unet.out_channels);
        if (taken, given) != (CHANNELS, CHANNELS) {
            let kind = match (taken, given) {
                (9, CHANNELS) => ", as one for inpainting does",
                (8, CHANNELS) => ", as one that edits pictures by instructions does",
                (5, CHANNELS) => ", as one that is told depths does",
                _ => "",
            };
            lines.push(format!(
                "the UNet takes {taken} channels and gives {given}{kind}; Apple's programs feed it {CHANNELS} and expect \
                 {CHANNELS}: they cannot use it"
            ));
        }
        if model.is_xl() && controlnet {
            lines.push(
                "Apple's programs have no ControlNets for Stable Diffusion XL and never load the package control-unet: \
                 export without --unet-support-controlnet"
                    .to_owned(),
            );
        }
        if model.is_xl() && batch != 2 {
            lines.push(
                "Apple's programs always call the UNet of Stable Diffusion XL with a batch of two and cannot use this one: \
                 export without --unet-batch-one"
                    .to_owned(),
            );
        }
        if !model.is_xl() && controlnet && batch != 2 {
            lines.push(
                "ControlNets for Apple's programs have a batch of two, and this UNet takes what they add for a batch of \
                 one: export without --unet-batch-one"
                    .to_owned(),
            );
        }
        if !is_apples(&text_to_image::schedule(model)?)? {
            lines.push(
                "the noise schedule of this model is not the one that Apple's programs sample with (scaled_linear, \
                 0.00085 to 0.012, 1000 steps); their pictures will not be those of this model"
                    .to_owned(),
            );
        }
    }
    if parts.iter().any(|part| matches!(part, Part::VaeDecoder | Part::VaeEncoder)) {
        let autoencoder = model.autoencoder_config()?;
        let (channels, factor, scale) = (autoencoder.latent_channels, autoencoder.factor(), autoencoder.scaling_factor);
        if channels != CHANNELS {
            lines.push(format!(
                "latents of the autoencoder have {channels} channels, and Apple's programs know only those of {CHANNELS}: \
                 they cannot use it"
            ));
        }
        if factor != FACTOR {
            lines.push(format!(
                "the autoencoder makes pictures {factor} times as large as latents, and Apple's programs reckon with \
                 {FACTOR} times: sizes will not fit"
            ));
        }
        let apples = if model.is_xl() { 0.13025 } else { 0.18215 };
        if (scale - apples).abs() > 1e-5 {
            lines.push(format!(
                "the autoencoder's `scaling_factor` is {scale}, and Apple's programs divide latents by {apples}, whatever \
                 the model: their pictures will be wrong"
            ));
        }
    }
    if parts.contains(&Part::SafetyChecker) && model.is_xl() {
        lines.push(
            "Apple's programs have no safety checker for Stable Diffusion XL and never load the package".to_owned(),
        );
    } else if parts.contains(&Part::SafetyChecker) && !takes_safety_checker(model, height, width)? {
        let factor = model.autoencoder_config()?.factor();
        lines.push(format!(
            "the safety checker is for pictures of {}×{} pixels, and Apple's programs hand it {CHECKED}×{CHECKED}: they \
             fail with it",
            factor * width,
            factor * height
        ));
    }
    Ok(lines)
}

/// Whether Apple's programs can use a safety checker for latents of `height × width`: they fail with one of another size
/// than theirs.
///
/// # Errors
/// The autoencoder's configuration can't be read.
pub fn takes_safety_checker(model: &Model, height: i64, width: i64) -> Result<bool> {
    let factor = model.autoencoder_config()?.factor();
    Ok(!model.is_xl() && (factor * height, factor * width) == (CHECKED, CHECKED))
}

/// Whether noise is mixed in as for Apple's samplers.
fn is_apples(schedule: &NoiseSchedule) -> Result<bool> {
    let apples = NoiseSchedule::from_config(&json!({
        "_class_name": "PNDMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
    }))?;
    let mut pairs = schedule.alphas_cumprod.iter().zip(&apples.alphas_cumprod);
    Ok(schedule.timesteps() == apples.timesteps() && pairs.all(|(own, apples)| (own - apples).abs() < 1e-5))
}
