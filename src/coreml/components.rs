//! Exports the networks beside the UNet: text encoder, and the two halves of the autoencoder.
//!
//! | package | in | out (fp32) |
//! |---|---|---|
//! | `text_encoder` | `input_ids` `[1, 77]`, fp32 | `last_hidden_state` `[1, 77, H]`, `pooled_outputs` `[1, H]` |
//! | `vae_decoder` | `z` `[1, 4, h, w]`, fp16 | `image` `[1, 3, 8h, 8w]`, −1…1 |
//! | `vae_encoder` | `x` `[1, 3, 8h, 8w]`, fp16, −1…1 | `latent` `[1, 8, h, w]`: means, then logarithms of variances |

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use anyhow::{Result, bail, ensure};

use super::export::PROMPT_TOKENS;
use super::interface::{Destination, Input, InputKind, Interface, Output, Weighted, write};
use crate::networks::autoencoder::{AutoencoderConfig, decode, encode};
use crate::networks::text_encoder::{TextEncoderConfig, text_encoder};
use crate::ops::Parameter;
use crate::source::{Component, Model};

/// A package that a model is exported as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    Unet,
    TextEncoder,
    VaeDecoder,
    VaeEncoder,
}

impl Part {
    /// All of them.
    pub const ALL: [Part; 4] = [Part::Unet, Part::TextEncoder, Part::VaeDecoder, Part::VaeEncoder];

    /// Its name on the command line, and the last part of its package's name.
    pub fn name(self) -> &'static str {
        match self {
            Part::Unet => "unet",
            Part::TextEncoder => "text_encoder",
            Part::VaeDecoder => "vae_decoder",
            Part::VaeEncoder => "vae_encoder",
        }
    }

    /// The component of the model that holds its weights.
    pub fn component(self) -> Component {
        match self {
            Part::Unet => Component::Unet,
            Part::TextEncoder => Component::TextEncoder,
            Part::VaeDecoder | Part::VaeEncoder => Component::Autoencoder,
        }
    }

    /// The parameters that go into its package.
    pub fn parameters(self, model: &Model) -> Result<Vec<Parameter>> {
        Ok(match self {
            Part::Unet => model.unet_config()?.parameters(),
            Part::TextEncoder => model.text_encoder_config()?.parameters(),
            Part::VaeDecoder => model.autoencoder_config()?.decoder_parameters(),
            Part::VaeEncoder => model.autoencoder_config()?.encoder_parameters(),
        })
    }
}

impl FromStr for Part {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        match Part::ALL.into_iter().find(|part| part.name() == text) {
            Some(part) => Ok(part),
            None => bail!("unknown component `{text}`: {}", Part::ALL.map(Part::name).join(", ")),
        }
    }
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Writes a text encoder.
///
/// # Errors
/// Those of [`write`]; an encoder for shorter texts than [`PROMPT_TOKENS`].
pub fn export_text_encoder(
    config: &TextEncoderConfig,
    weighted: Weighted,
    destination: Destination,
) -> Result<PathBuf> {
    let interface = Interface {
        component: Part::TextEncoder.name().into(),
        about: "The text encoder of Stable Diffusion (CLIP's), which turns the tokens of a prompt into what the UNet \
                attends to. See https://arxiv.org/abs/2103.00020."
            .into(),
        inputs: vec![Input {
            name: "input_ids".into(),
            about: "The tokens of the prompt by their numbers, padded to 77".into(),
            kind: InputKind::TokenIds,
            shape: vec![1, PROMPT_TOKENS],
        }],
        outputs: vec![
            Output::new("last_hidden_state", "A vector for each token: what the UNet attends to, before transposing"),
            Output::new("pooled_outputs", "The vector at the end of the text"),
        ],
    };
    write(destination, &interface, weighted, |ops, inputs| {
        let output = text_encoder(ops, config, &inputs[0]);
        vec![output.last_hidden_state, output.pooled]
    })
}

/// Writes the half of an autoencoder that makes pictures of latents of `height × width`.
///
/// # Errors
/// Those of [`write`]; a size that cannot be exported.
pub fn export_vae_decoder(
    config: &AutoencoderConfig,
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
        inputs: vec![Input::half(
            "z",
            "The latents without noise, divided by the scaling factor: 1, channels, height, width",
            &[1, config.latent_channels, height, width],
        )],
        outputs: vec![Output::new("image", "The picture, from -1 to 1: 1, channels, height, width")],
    };
    write(destination, &interface, weighted, |ops, inputs| vec![decode(ops, config, &inputs[0])])
}

/// Writes the half of an autoencoder that makes latents of `height × width` of pictures.
///
/// # Errors
/// Those of [`write`]; a size that cannot be exported.
pub fn export_vae_encoder(
    config: &AutoencoderConfig,
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
        inputs: vec![Input::half(
            "x",
            "The picture, from -1 to 1: 1, channels, height, width",
            &[1, config.in_channels, factor * height, factor * width],
        )],
        outputs: vec![Output::new(
            "latent",
            "The distribution of the latents before the scaling factor: means, then logarithms of variances",
        )],
    };
    write(destination, &interface, weighted, |ops, inputs| vec![encode(ops, config, &inputs[0])])
}

fn check_size(height: i64, width: i64) -> Result<()> {
    ensure!(height > 0 && width > 0, "a package for latents of {height}×{width} cannot be made");
    Ok(())
}
