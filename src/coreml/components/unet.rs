//! Exports a UNet as the package that Apple's Stable Diffusion programs expect.
//!
//! | | name | type | shape |
//! |---|---|---|---|
//! | in | `sample` | fp16 | `[B, 4, h, w]` |
//! | in | `timestep` | fp16 | `[B]` |
//! | in | `encoder_hidden_states` | fp16 | `[B, D, 1, T]`, T mostly 77 |
//! | in, for SDXL | `time_ids` | fp16 | `[B, 6]` |
//! | in, for SDXL | `text_embeds` | fp16 | `[B, P]` |
//! | in, for ControlNets | `additional_residual_0` … | fp16 | those of [`UnetConfig::residual_shapes`] |
//! | out | `noise_pred` | fp32 | `[B, 4, h, w]` |

use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};

use super::parts::Part;
use crate::coreml::format::metadata::PackageMetadata;
use crate::coreml::prompt::PROMPT_TOKENS;
use crate::coreml::writing::interface::{Destination, Input, Interface, Output, Weighted, write};
use crate::coreml::writing::lowering::velocity::Velocity;
use crate::coreml::writing::weights::WeightSource;
use crate::coreml::{AttentionImplementation, DeploymentTarget};
use crate::networks::unet::{Added, Addition, Condition, TIME_IDS, UnetConfig, unet};

/// The longest side of latents in a package: far beyond what any device draws, and within what a package can declare.
pub const LARGEST_LATENTS: i64 = 4096;

/// Whether a package can be made for latents of these sides.
pub fn takes_latents(height: i64, width: i64) -> bool {
    [height, width].iter().all(|side| (1..=LARGEST_LATENTS).contains(side))
}

/// What a UNet's package is made for.
#[derive(Clone, Debug, PartialEq)]
pub struct UnetOptions {
    /// 2: with and without the prompt in one call, for classifier-free guidance; 1: one call each.
    pub batch: i64,
    /// Of the latents.
    pub height: i64,
    /// Of the latents.
    pub width: i64,
    /// How many the texts have that it attends to: [`prompt_tokens`](crate::coreml::prompt::prompt_tokens).
    pub tokens: i64,
    pub target: DeploymentTarget,
    pub attention: AttentionImplementation,
    /// Takes what ControlNets add: inputs `additional_residual_0` and so on.
    pub controlnet: bool,
    /// For a network that predicts v: the package then predicts ε nevertheless.
    pub velocity: Option<Velocity>,
    /// Replaces a package that is there already.
    pub overwrite: bool,
}

impl UnetOptions {
    /// Batch 2, the size that the model was made for, CLIP's own length of texts, iOS 16, nothing overwritten.
    pub fn new(config: &UnetConfig) -> Self {
        let size = config.sample_size;
        Self {
            batch: 2,
            height: size,
            width: size,
            tokens: PROMPT_TOKENS,
            target: DeploymentTarget::default(),
            attention: AttentionImplementation::default(),
            controlnet: false,
            velocity: None,
            overwrite: false,
        }
    }
}

/// The input that takes the residual of this number: see [`UnetConfig::residual_shapes`].
pub fn residual_name(number: usize) -> String {
    format!("additional_residual_{number}")
}

/// Writes the UNet of `config` and `weights` as a package into `folder` and returns its path. `progress` hears how
/// many parameters of how many are written.
///
/// # Errors
/// Those of [`write()`]; a size that cannot be exported.
pub fn export_unet(
    config: &UnetConfig,
    weights: &dyn WeightSource,
    options: &UnetOptions,
    metadata: &PackageMetadata,
    folder: &Path,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<PathBuf> {
    let UnetOptions { batch, height, width, tokens, target, attention, controlnet, overwrite, ref velocity } = *options;
    ensure!(batch > 0, "a package for a batch of {batch} cannot be made: 2 or 1");
    ensure!(height > 0 && width > 0, "a package for latents of {height}×{width} cannot be made");
    let mut interface = Interface {
        component: Part::Unet.package(options.controlnet).into(),
        about: "The UNet of Stable Diffusion, which takes noise out of latents step by step, guided by a prompt. See \
                https://arxiv.org/abs/2112.10752."
            .into(),
        inputs: vec![
            Input::half(
                "sample",
                "The noisy latents: batch, channels, height, width",
                &[batch, config.in_channels, height, width],
            ),
            Input::half(
                "timestep",
                "How far the noise has gone, from 999 (noise only) down to 0; one number a row of the batch",
                &[batch],
            ),
            Input::half(
                "encoder_hidden_states",
                "The prompt as the text encoder gives it, transposed: batch, width, 1, tokens",
                &[batch, tokens, config.cross_attention_dim],
            ),
        ],
        outputs: vec![Output::new("noise_pred", "The predicted noise, of the same shape as the latents")],
    };
    if let Some(Addition { text_width, .. }) = config.addition {
        let sizes =
            "Sizes in pixels: height and width of the original, top and left of the crop, height and width wanted";
        interface.inputs.push(Input::half("time_ids", sizes, &[batch, TIME_IDS]));
        let text = "The prompt as the second text encoder sums it up";
        interface.inputs.push(Input::half("text_embeds", text, &[batch, text_width]));
    }
    if controlnet {
        let shapes = config.residual_shapes(batch, height, width);
        let middle = shapes.len() - 1;
        interface.inputs.extend(shapes.iter().enumerate().map(|(i, shape)| {
            let skip = "What ControlNets add to a value that is kept for the way up";
            let about = if i == middle { "What ControlNets add to the middle" } else { skip };
            Input::half(&residual_name(i), about, shape)
        }));
    }
    // The contract that the package keeps, by the version of Apple's package that states it.
    let mut metadata = metadata.clone();
    metadata.user_defined.insert("com.github.apple.ml-stable-diffusion.version".to_owned(), "1.1.0".to_owned());
    if velocity.is_some() {
        metadata.user_defined.insert("palettist.prediction".to_owned(), "epsilon, from the network's v".to_owned());
    }
    let destination = Destination { folder, target, overwrite, metadata: &metadata };
    let weighted = Weighted { weights, parameters: config.parameters().len(), progress };
    write(destination, &interface, weighted, |ops, inputs| {
        ops.attend_as(attention);
        let (added, first) = match config.addition {
            Some(_) => (Some(Added { time_ids: &inputs[3], text_embeds: &inputs[4] }), 5),
            None => (None, 3),
        };
        let condition = Condition { context: &inputs[2], added, residuals: &inputs[first..] };
        let predicted = unet(ops, config, &inputs[0], &inputs[1], condition);
        vec![match velocity {
            Some(velocity) => ops.noise_of_velocity(&predicted, &inputs[0], &inputs[1], velocity),
            None => predicted,
        }]
    })
}
