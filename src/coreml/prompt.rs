//! What a text encoder is fed: how many tokens, and what a text that is shorter is filled up with.
//!
//! Apple's Swift package fills up the texts of the first encoder with the end-of-text, and those of Stable Diffusion XL's
//! second with `!`, whatever the model was trained with. Stable Diffusion 2 was trained with `!`. A package of such an
//! encoder puts the model's own padding in place of the one that it is fed, so that both give what the model gives.

use anyhow::{Result, ensure};

use crate::source::{Component, Model, clip};

/// Tokens of a prompt, as CLIP's own text encoders pad it.
pub const PROMPT_TOKENS: i64 = 77;

/// How texts reach a text encoder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prompt {
    /// Tokens of a text, filled up.
    pub tokens: i64,
    /// The id of the end-of-text.
    pub end: i64,
    /// What the model's own tokenizer fills up with.
    pub pad: i64,
    /// What Apple's Swift package fills up with.
    pub swift_pad: i64,
}

impl Prompt {
    /// The prompt of one of a model's text encoders, by its tokenizer. Without one it has as many tokens as the network has
    /// positions, and is filled up with the end-of-text.
    ///
    /// # Errors
    /// The tokenizer or the configuration can't be read, or they do not fit.
    pub fn of(model: &Model, component: Component) -> Result<Self> {
        let config = model.text_encoder_config_of(component)?;
        let Some(tokenizer) = model.tokenizer_if_there(component)? else {
            let end = if config.eos_token_id == 2 { config.vocab_size - 1 } else { config.eos_token_id };
            return Ok(Self { tokens: config.positions, end, pad: end, swift_pad: end });
        };
        let end = tokenizer.end();
        let swift_pad = match component {
            Component::TextEncoder2 => tokenizer.id(clip::EXCLAMATION_MARK).unwrap_or(end),
            _ => end,
        };
        Ok(Self { tokens: tokenizer.length() as i64, end, pad: tokenizer.pad(), swift_pad })
    }

    /// Whether Apple's Swift package feeds another padding than the model was trained with.
    pub fn differs(&self) -> bool {
        self.pad != self.swift_pad
    }
}

/// Tokens of the texts that a model's UNet attends to; CLIP's 77 where there is no text encoder that tells.
///
/// # Errors
/// Those of [`Prompt::of`]; two text encoders that read texts of different lengths.
pub fn prompt_tokens(model: &Model) -> Result<i64> {
    let encoders = [Component::TextEncoder, Component::TextEncoder2];
    let own = encoders.into_iter().filter(|encoder| model.has(*encoder));
    let lengths = own.map(|encoder| Ok(Prompt::of(model, encoder)?.tokens)).collect::<Result<Vec<_>>>()?;
    if let [first, second] = lengths[..] {
        ensure!(
            first == second,
            "{}: its tokenizers fill texts up to {first} and to {second} tokens, and the UNet attends to both side by side",
            model.path().display()
        );
    }
    Ok(lengths.first().copied().unwrap_or(PROMPT_TOKENS))
}
