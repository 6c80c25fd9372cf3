//! What a model can do, decided once, from its configurations alone: every command that needs more than one of a model's
//! networks asks here before its work begins, and says the same words.

use anyhow::{Context, Result, anyhow, bail, ensure};

use crate::diffusion::{NoiseSchedule, Prediction};
use crate::networks::autoencoder::AutoencoderConfig;
use crate::networks::text_encoder::TextEncoderConfig;
use crate::networks::unet::UnetConfig;
use crate::source::{Component, Misused, Model};

/// The configurations of a model that draws pictures from texts, which fit each other.
#[derive(Clone, Debug)]
pub struct TextToImage {
    pub unet: UnetConfig,
    pub autoencoder: AutoencoderConfig,
    /// One, or Stable Diffusion XL's two.
    pub text_encoders: Vec<TextEncoderConfig>,
    pub schedule: NoiseSchedule,
}

impl TextToImage {
    /// Reads the configurations of `model` and checks that it is a text-to-image model whose networks fit each other.
    ///
    /// # Errors
    /// One line: a part that is missing or not supported, another kind of model (named by its input channels), networks
    /// or a schedule that do not go together.
    pub fn of(model: &Model) -> Result<Self> {
        let read = || {
            let configs = model.text_encoders().map(|component| model.text_encoder_config_of(component));
            let (unet, autoencoder) = (model.unet_config()?, model.autoencoder_config()?);
            text_to_image_channels(&unet, &autoencoder).with_context(|| model.path().display().to_string())?;
            anyhow::Ok(Self {
                unet,
                autoencoder,
                text_encoders: configs.collect::<Result<_>>()?,
                schedule: schedule(model)?,
            })
        };
        let all = read()?;
        fit(model).map(|()| all)
    }
}

/// Checks that the networks that `model` has fit each other, whatever kind of model they make: a UNet for inpainting
/// passes. A network that is missing is not asked for.
///
/// # Errors
/// One line that names the two that do not fit, or a schedule that is not supported.
pub fn fit(model: &Model) -> Result<()> {
    // What is wrong with one network's configuration names its own file.
    let place = || model.path().display().to_string();
    schedule(model)?;
    if !model.has(Component::Unet) {
        return Ok(());
    }
    let unet = model.unet_config()?;
    if model.text_encoders().all(|component| model.has(component)) {
        let configs = model.text_encoders().map(|component| model.text_encoder_config_of(component));
        check_texts(&unet, configs.collect::<Result<Vec<_>>>()?.iter()).with_context(place)?;
    }
    if model.has(Component::Autoencoder) {
        let autoencoder = model.autoencoder_config()?;
        check_latents(&unet, &autoencoder).with_context(place)?;
        if let Some(own) = model.own_autoencoder_config() {
            check_scaling(&own?, &autoencoder).with_context(place)?;
        }
    }
    Ok(())
}

/// The noise schedule of a model.
///
/// # Errors
/// One that is not supported, or in which the UNet's prediction says nothing.
pub fn schedule(model: &Model) -> Result<NoiseSchedule> {
    let schedule = NoiseSchedule::from_config(&model.scheduler_config()?)
        .with_context(|| format!("the scheduler of {}", model.path().display()))?;
    let last = schedule.alphas_cumprod.last().copied().unwrap_or(1.0);
    if last <= 0.0 && schedule.prediction != Prediction::VPrediction {
        let message = format!(
            "{}: `rescale_betas_zero_snr` ends the schedule in noise alone, from which a prediction of the noise (epsilon) \
             cannot be undone: set model.prediction_type = \"v_prediction\" (--prediction-type v_prediction) or \
             model.rescale_betas_zero_snr = false (--rescale-betas-zero-snr false)",
            model.path().display()
        );
        return Err(if model.scheduler_is_overruled() { Misused(message).into() } else { anyhow!(message) });
    }
    Ok(schedule)
}

/// Checks that the UNet is told what the text encoders say.
///
/// # Errors
/// Widths that do not agree; one text encoder where two are wanted.
fn check_texts<'c>(unet: &UnetConfig, encoders: impl Iterator<Item = &'c TextEncoderConfig>) -> Result<()> {
    let encoders: Vec<_> = encoders.collect();
    let width: i64 = encoders.iter().map(|config| config.hidden_size).sum();
    ensure!(
        unet.cross_attention_dim == width,
        "the UNet's `cross_attention_dim` is {} and the text encoders' `hidden_size` {width}; they should agree",
        unet.cross_attention_dim
    );
    let pooled = if encoders.len() > 1 { encoders.last().and_then(|config| config.projection) } else { None };
    let wanted = unet.addition.map(|addition| addition.text_width);
    match (wanted, pooled) {
        _ if wanted == pooled => Ok(()),
        (Some(wanted), None) => bail!(
            "the UNet is one of Stable Diffusion XL and wants pooled text of {wanted} numbers, and there is no second \
             text encoder with a projection"
        ),
        (None, _) => bail!("there are two text encoders, and the UNet is none of Stable Diffusion XL"),
        (Some(wanted), Some(pooled)) => bail!(
            "the UNet wants a text summed up in {wanted} numbers, and the second text encoder gives {pooled} \
             (`projection_dim`)"
        ),
    }
}

/// Checks that the UNet gives latents as the autoencoder takes them.
fn check_latents(unet: &UnetConfig, autoencoder: &AutoencoderConfig) -> Result<()> {
    let (given, latents) = (unet.out_channels, autoencoder.latent_channels);
    ensure!(
        given == latents,
        "the UNet gives {given} channels and the autoencoder's latents have {latents}; they should agree"
    );
    Ok(())
}

/// An autoencoder that was given in place of the model's `own` must scale latents as that does.
fn check_scaling(own: &AutoencoderConfig, given: &AutoencoderConfig) -> Result<()> {
    let (own, given) = (own.scaling_factor, given.scaling_factor);
    ensure!(
        (own - given).abs() <= 1e-4 * own.abs(),
        "the autoencoder that was given has `scaling_factor`: {given}, and that of the model is {own}: it is of another \
         kind of Stable Diffusion"
    );
    Ok(())
}

/// Checks that the UNet takes latents and nothing beside them.
///
/// # Errors
/// The kind of model that it is instead.
pub fn text_to_image_channels(unet: &UnetConfig, autoencoder: &AutoencoderConfig) -> Result<()> {
    let (taken, given, latents) = (unet.in_channels, unet.out_channels, autoencoder.latent_channels);
    if (taken, given) == (latents, latents) {
        return Ok(());
    }
    ensure!(
        taken != given,
        "the UNet takes and gives {taken} channels, and the autoencoder's latents have {latents}; they should agree"
    );
    let kind = match (taken - latents, given == latents) {
        (5, true) => "an inpainting model, whose UNet also takes a mask and a masked picture",
        (4, true) => "a model that edits pictures (InstructPix2Pix), whose UNet also takes a picture's latents",
        (3, true) => "an upscaler, whose UNet also takes a small picture",
        (1, true) => "a depth-to-image model, whose UNet also takes depth",
        _ => "not a text-to-image model",
    };
    bail!(
        "the UNet takes {taken} channels and gives {given}, and the autoencoder's latents have {latents}: this is {kind}; \
         only text-to-image models are supported here"
    )
}
