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

/// Writes `part`, a half of an autoencoder, for latents of `height × width`; `numbers` as [`autoencoder_numbers`] has it.
///
/// # Errors
/// Those of [`write()`]; a size that cannot be exported.
pub fn export_autoencoder(
    part: Part,
    config: &AutoencoderConfig,
    numbers: InputKind,
    (height, width): (i64, i64),
    weighted: Weighted,
    destination: Destination,
) -> Result<PathBuf> {
    check_size(height, width)?;
    let decoder = part == Part::VaeDecoder;
    let (what, input, output) = if decoder {
        let about = "The latents without noise, divided by the scaling factor: 1, channels, height, width";
        let input = Input::of(numbers, "z", about, &[1, config.latent_channels, height, width]);
        let output = Output::new("image", "The picture, from -1 to 1: 1, channels, height, width");
        ("decoder of Stable Diffusion's autoencoder, which turns latents into a picture", input, output)
    } else {
        let (about, factor) = ("The picture, from -1 to 1: 1, channels, height, width", config.factor());
        let input = Input::of(numbers, "x", about, &[1, config.in_channels, factor * height, factor * width]);
        let about = "The distribution of the latents before the scaling factor: means, then logarithms of variances";
        (
            "encoder of Stable Diffusion's autoencoder, which turns a picture into latents",
            input,
            Output::new("latent", about),
        )
    };
    let interface = Interface {
        component: part.name().into(),
        about: format!("The {what}. See https://arxiv.org/abs/2112.10752."),
        inputs: vec![input],
        outputs: vec![output],
    };
    write(destination, &interface, weighted, |ops, inputs| {
        ops.expect_large_values();
        vec![if decoder { decode(ops, config, &inputs[0]) } else { encode(ops, config, &inputs[0]) }]
    })
}
