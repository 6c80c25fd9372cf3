//! Exports the two halves of an autoencoder.
//!
//! Stable Diffusion XL's autoencoder overflows in fp16: its halves take fp32 and compute in it, the decoder but for an
//! autoencoder that was made not to overflow.

use std::path::PathBuf;

use anyhow::Result;

use super::parts::{Part, check_size};
use crate::coreml::writing::interface::{Destination, Input, InputKind, Interface, Output, Weighted, write};
use crate::networks::autoencoder::{AutoencoderConfig, decode, encode};
use crate::source::Model;

/// What the halves of a model's autoencoder take and compute in, as Apple's converter has it. It converts every encoder
/// of Stable Diffusion XL in fp32, and its decoder unless that is another one, made not to overflow.
pub fn autoencoder_numbers(part: Part, model: &Model) -> Result<InputKind> {
    let single = model.is_xl() && (part == Part::VaeEncoder || model.autoencoder_config()?.force_upcast);
    Ok(if single { InputKind::Single } else { InputKind::Half })
}

/// Writes the half of an autoencoder that makes pictures of latents of `height × width`; `numbers` as
/// [`autoencoder_numbers`] has it.
///
/// # Errors
/// Those of [`write()`]; a size that cannot be exported.
pub fn export_vae_decoder(
    config: &AutoencoderConfig,
    numbers: InputKind,
    (height, width): (i64, i64),
    weighted: Weighted,
    destination: Destination,
) -> Result<PathBuf> {
    check_size(height, width)?;
    let interface = Interface {
        component: Part::VaeDecoder.name().into(),
        about: "The decoder of Stable Diffusion's autoencoder, which turns latents into a picture. See \
                https://arxiv.org/abs/2112.10752."
            .into(),
        inputs: vec![Input::of(
            numbers,
            "z",
            "The latents without noise, divided by the scaling factor: 1, channels, height, width",
            &[1, config.latent_channels, height, width],
        )],
        outputs: vec![Output::new("image", "The picture, from -1 to 1: 1, channels, height, width")],
    };
    write(destination, &interface, weighted, |ops, inputs| {
        ops.expect_large_values();
        vec![decode(ops, config, &inputs[0])]
    })
}

/// Writes the half of an autoencoder that makes latents of `height × width` of pictures; `numbers` as
/// [`autoencoder_numbers`] has it.
///
/// # Errors
/// Those of [`write()`]; a size that cannot be exported.
pub fn export_vae_encoder(
    config: &AutoencoderConfig,
    numbers: InputKind,
    (height, width): (i64, i64),
    weighted: Weighted,
    destination: Destination,
) -> Result<PathBuf> {
    check_size(height, width)?;
    let factor = config.factor();
    let interface = Interface {
        component: Part::VaeEncoder.name().into(),
        about: "The encoder of Stable Diffusion's autoencoder, which turns a picture into latents. See \
                https://arxiv.org/abs/2112.10752."
            .into(),
        inputs: vec![Input::of(
            numbers,
            "x",
            "The picture, from -1 to 1: 1, channels, height, width",
            &[1, config.in_channels, factor * height, factor * width],
        )],
        outputs: vec![Output::new(
            "latent",
            "The distribution of the latents before the scaling factor: means, then logarithms of variances",
        )],
    };
    write(destination, &interface, weighted, |ops, inputs| {
        ops.expect_large_values();
        vec![encode(ops, config, &inputs[0])]
    })
}
