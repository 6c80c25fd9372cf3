//! Exports the networks beside the UNet: text encoders, the two halves of the autoencoder, safety checker.
//!
//! | package | in | out (fp32) |
//! |---|---|---|
//! | `text_encoder` | `input_ids` `[1, T]`, fp32 | `last_hidden_state` `[1, T, H]`, `pooled_outputs` `[1, H]` |
//! | SDXL's two, the second being `text_encoder_2` | the same | `hidden_embeds`, of the last layer but one; as above |
//! | `vae_decoder` | `z` `[1, 4, h, w]`, fp16 | `image` `[1, 3, 8h, 8w]`, −1…1 |
//! | `vae_encoder` | `x` `[1, 3, 8h, 8w]`, fp16, −1…1 | `latent` `[1, 8, h, w]`: means, then logarithms of variances |
//! | `safety_checker` | `clip_input` `[1, 3, 224, 224]`, `images` `[1, 8h, 8w, 3]`, `adjustment` `[1]`, fp16 | `filtered_images` `[1, 8h, 8w, 3]`, `has_nsfw_concepts` `[1, 1, 1, 1]`, `concept_scores` `[1, 17]` |
//!
//! T, the tokens of a [`Prompt`], is 77 but for encoders that were made for longer texts.
//!
//! Stable Diffusion XL's autoencoder overflows in fp16: its halves take fp32 and compute in it, the decoder but for an
//! autoencoder that was made not to overflow.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use anyhow::{Result, bail, ensure};

use super::interface::{Destination, Input, InputKind, Interface, Output, Weighted, write};
use super::prompt::Prompt;
use crate::networks::autoencoder::{AutoencoderConfig, decode, encode};
use crate::networks::safety_checker::{SafetyCheckerConfig, safety_checker};
use crate::networks::text_encoder::{TextEncoderConfig, TextOutput, text_encoder};
use crate::ops::Parameter;
use crate::source::{Component, Model};

/// A package that a model is exported as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    Unet,
    TextEncoder,
    /// Stable Diffusion XL's second.
    TextEncoder2,
    VaeDecoder,
    VaeEncoder,
    SafetyChecker,
}

impl Part {
    /// All of them; [`Part::of`] tells those of a model.
    pub const ALL: [Part; 6] =
        [Part::Unet, Part::TextEncoder, Part::TextEncoder2, Part::VaeDecoder, Part::VaeEncoder, Part::SafetyChecker];

    /// Those that a model has.
    pub fn of(model: &Model) -> Vec<Part> {
        let has = |part: &Part| match part {
            Part::SafetyChecker => model.has(Component::SafetyChecker),
            _ => model.components().any(|component| component == part.component()),
        };
        Part::ALL.into_iter().filter(has).collect()
    }

    /// Its name on the command line, and the last part of its package's name.
    pub fn name(self) -> &'static str {
        match self {
            Part::Unet => "unet",
            Part::TextEncoder => "text_encoder",
            Part::TextEncoder2 => "text_encoder_2",
            Part::VaeDecoder => "vae_decoder",
            Part::VaeEncoder => "vae_encoder",
            Part::SafetyChecker => "safety_checker",
        }
    }

    /// The component of the model that holds its weights.
    pub fn component(self) -> Component {
        match self {
            Part::Unet => Component::Unet,
            Part::TextEncoder => Component::TextEncoder,
            Part::TextEncoder2 => Component::TextEncoder2,
            Part::VaeDecoder | Part::VaeEncoder => Component::Autoencoder,
            Part::SafetyChecker => Component::SafetyChecker,
        }
    }

    /// The parameters that go into its package.
    pub fn parameters(self, model: &Model) -> Result<Vec<Parameter>> {
        Ok(match self {
            Part::Unet => model.unet_config()?.parameters(),
            Part::TextEncoder | Part::TextEncoder2 => model.text_encoder_config_of(self.component())?.parameters(),
            Part::VaeDecoder => model.autoencoder_config()?.decoder_parameters(),
            Part::VaeEncoder => model.autoencoder_config()?.encoder_parameters(),
            Part::SafetyChecker => model.safety_checker_config()?.parameters(),
        })
    }
}

impl FromStr for Part {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        // From a list, where spaces follow the commas.
        let text = text.trim();
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

/// What a UNet attends to of a text encoder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attended {
    /// What the last layer gives, normed: Stable Diffusion 1 and 2.
    Last,
    /// What the last layer but one gives: Stable Diffusion XL.
    Penultimate,
}

impl Attended {
    /// Of the UNet of a model.
    pub fn of(model: &Model) -> Self {
        if model.is_xl() { Self::Penultimate } else { Self::Last }
    }

    /// The name of the output.
    pub fn output(self) -> &'static str {
        match self {
            Self::Last => "last_hidden_state",
            Self::Penultimate => "hidden_embeds",
        }
    }

    /// What there is of it, with the names of the outputs.
    pub fn outputs<V>(self, output: TextOutput<V>) -> [(&'static str, V); 2] {
        let attended = match self {
            Self::Last => output.last_hidden_state,
            Self::Penultimate => output.penultimate,
        };
        [(self.output(), attended), ("pooled_outputs", output.pooled)]
    }
}

/// Writes a text encoder, `part` of its model, for texts as `prompt` has them.
///
/// # Errors
/// Those of [`write()`]; an encoder for shorter texts.
pub fn export_text_encoder(
    part: Part,
    attended: Attended,
    prompt: &Prompt,
    config: &TextEncoderConfig,
    weighted: Weighted,
    destination: Destination,
) -> Result<PathBuf> {
    let interface = Interface {
        component: part.name().into(),
        about: "The text encoder of Stable Diffusion (CLIP's), which turns the tokens of a prompt into what the UNet \
                attends to. See https://arxiv.org/abs/2103.00020."
            .into(),
        inputs: vec![Input {
            name: "input_ids".into(),
            about: format!("The tokens of the prompt by their numbers, padded to {}", prompt.tokens),
            kind: InputKind::TokenIds,
            shape: vec![1, prompt.tokens],
        }],
        outputs: vec![
            Output::new(attended.output(), "A vector for each token: what the UNet attends to, before transposing"),
            Output::new("pooled_outputs", "The vector at the end of the text"),
        ],
    };
    write(destination, &interface, weighted, |ops, inputs| {
        let ids = ops.own_padding(&inputs[0], prompt);
        let output = text_encoder(ops, config, &ids);
        attended.outputs(output).map(|(_, value)| value).into()
    })
}

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

/// Writes a safety checker for pictures of `height × width` pixels. Apple's programs only use it for 512×512.
///
/// # Errors
/// Those of [`write()`].
pub fn export_safety_checker(
    config: &SafetyCheckerConfig,
    (height, width): (i64, i64),
    weighted: Weighted,
    destination: Destination,
) -> Result<PathBuf> {
    check_size(height, width)?;
    let side = config.image_size;
    let interface = Interface {
        component: Part::SafetyChecker.name().into(),
        about: "The safety checker of Stable Diffusion, which tells whether a picture shows what it should not. See \
                https://arxiv.org/abs/2210.04610."
            .into(),
        inputs: vec![
            Input::half(
                "clip_input",
                "The picture, resized and normalised as CLIP's are: 1, channels, height, width",
                &[1, config.channels, side, side],
            ),
            Input::half("images", "The picture in full: 1, height, width, channels", &[1, height, width, 3]),
            Input::half("adjustment", "Added to the scores of special care: more than 0 is stricter", &[1]),
        ],
        outputs: vec![
            Output::new("filtered_images", "The picture, black if it is held back"),
            Output::new("has_nsfw_concepts", "1 if the picture is held back, else 0"),
            Output::new("concept_scores", "For each concept, how far it is above its threshold"),
        ],
    };
    write(destination, &interface, weighted, |ops, inputs| {
        let output = safety_checker(ops, config, &inputs[0], &inputs[1], &inputs[2]);
        vec![output.filtered, output.held_back, output.scores]
    })
}

fn check_size(height: i64, width: i64) -> Result<()> {
    ensure!(height > 0 && width > 0, "a package for latents of {height}×{width} cannot be made");
    Ok(())
}
