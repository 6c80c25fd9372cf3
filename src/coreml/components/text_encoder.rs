//! Exports a text encoder.

use std::path::PathBuf;

use anyhow::Result;

use super::parts::Part;
use crate::coreml::prompt::Prompt;
use crate::coreml::writing::interface::{Destination, Input, InputKind, Interface, Output, Weighted, write};
use crate::networks::text_encoder::{TextEncoderConfig, TextOutput, text_encoder};
use crate::source::Model;

/// What a UNet attends to of a text encoder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attended {
    /// What the last layer gives, normed: Stable Diffusion 1 and 2.
    Last,
    /// What the last layer but one gives: Stable Diffusion XL.
    Penultimate,
}

impl Attended {
    /// What the UNet of a model attends to.
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
