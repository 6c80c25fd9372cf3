//! What a UNet is told of N pictures: their texts as the text encoders give them and, for Stable Diffusion XL, the texts
//! summed up and sizes (Podell et al. 2023, 2.2).
//!
//! Symbols: N pictures, T tokens, D the UNet's `cross_attention_dim`, P the width of the summed-up text.

use anyhow::Result;
use tch::{Device, Kind, Tensor};

use crate::networks::text_encoder::{TextEncoderConfig, TextOutput, text_encoder};
use crate::networks::unet::{Added, Condition};
use crate::ops::{Tensors, Weights};
use crate::source::{Component, Model, Tokenizer};

/// Texts, encoded, and sizes, for N pictures.
#[derive(Debug)]
pub struct Conditioning {
    /// `[N, T, D]`
    pub context: Tensor,
    /// `[N, P]`; of Stable Diffusion XL only.
    pub text_embeds: Option<Tensor>,
    /// `[N, 6]`, see [`SizeIds`]; none until [`Conditioning::with_sizes`] sets them.
    pub time_ids: Option<Tensor>,
}

/// What Stable Diffusion XL is told of a picture's size, in pixels: height and width of the original, top and left of
/// the crop, height and width of the result.
pub type SizeIds = [i64; 6];

/// The sizes of a picture that was never cropped.
pub fn uncropped(height: i64, width: i64) -> SizeIds {
    [height, width, 0, 0, height, width]
}

impl Conditioning {
    /// From what the model's text encoders, one or two, give for the same texts. One: its last hidden state. Two: their
    /// last but one side by side, and the second's pooled output.
    pub fn of_texts(outputs: Vec<TextOutput<Tensor>>) -> Self {
        let mut outputs = outputs;
        if outputs.len() == 1 {
            return Self { context: outputs.remove(0).last_hidden_state, text_embeds: None, time_ids: None };
        }
        let states: Vec<&Tensor> = outputs.iter().map(|output| &output.penultimate).collect();
        let context = Tensor::cat(&states, -1);
        Self { context, text_embeds: outputs.pop().map(|output| output.pooled), time_ids: None }
    }

    /// With the sizes of each of the pictures, which only Stable Diffusion XL is told.
    pub fn with_sizes(self, sizes: &[SizeIds]) -> Self {
        let time_ids = self.text_embeds.as_ref().map(|text_embeds| {
            let ids = Tensor::from_slice(&sizes.concat()).view([sizes.len() as i64, -1]);
            ids.to_kind(Kind::Float).to_device(text_embeds.device())
        });
        Self { time_ids, ..self }
    }

    /// Each part through `f`.
    pub fn map(&self, f: impl Fn(&Tensor) -> Tensor) -> Self {
        Self {
            context: f(&self.context),
            text_embeds: self.text_embeds.as_ref().map(&f),
            time_ids: self.time_ids.as_ref().map(&f),
        }
    }

    /// Texts in `kind`; sizes stay exact.
    pub fn to_kind(&self, kind: Kind) -> Self {
        Self {
            context: self.context.to_kind(kind),
            text_embeds: self.text_embeds.as_ref().map(|text| text.to_kind(kind)),
            time_ids: self.time_ids.as_ref().map(Tensor::shallow_clone),
        }
    }

    /// One picture's, N times.
    pub fn repeated(&self, count: i64) -> Self {
        self.map(|part| part.repeat_interleave_self_int(count, 0, None))
    }

    /// Of several, one upon the other. All must be of one kind of model.
    pub fn cat(parts: &[&Self]) -> Self {
        let all = |part: fn(&Self) -> Option<&Tensor>| {
            let tensors: Option<Vec<&Tensor>> = parts.iter().map(|one| part(one)).collect();
            tensors.map(|tensors| Tensor::cat(&tensors, 0))
        };
        Self {
            context: Tensor::cat(&parts.iter().map(|one| &one.context).collect::<Vec<_>>(), 0),
            text_embeds: all(|one| one.text_embeds.as_ref()),
            time_ids: all(|one| one.time_ids.as_ref()),
        }
    }

    /// The same, for the UNet.
    pub fn condition(&self) -> Condition<'_, Tensor> {
        let added = self.text_embeds.as_ref().zip(self.time_ids.as_ref());
        let added = added.map(|(text_embeds, time_ids)| Added { text_embeds, time_ids });
        Condition { context: &self.context, added, residuals: &[] }
    }
}

/// A text encoder with its tokenizer, ready to run.
pub struct TextEncoder {
    pub tokenizer: Tokenizer,
    pub config: TextEncoderConfig,
    pub weights: Weights,
}

impl TextEncoder {
    /// One of the [`Model::text_encoders`].
    ///
    /// # Errors
    /// Its files are missing or damaged.
    pub fn load(model: &Model, component: Component, kind: Kind, device: Device) -> Result<Self> {
        Ok(Self {
            tokenizer: model.tokenizer_of(component)?,
            config: model.text_encoder_config_of(component)?,
            weights: model.weights(component, kind, device)?,
        })
    }

    /// All of a model.
    ///
    /// # Errors
    /// Those of [`TextEncoder::load`].
    pub fn all(model: &Model, kind: Kind, device: Device) -> Result<Vec<Self>> {
        model.text_encoders().map(|component| Self::load(model, component, kind, device)).collect()
    }

    /// Runs it on `texts` in `kind`, on the device of its weights.
    fn run(&self, texts: &[&str], kind: Kind, device: Device) -> Result<TextOutput<Tensor>> {
        let rows: Vec<Vec<i64>> = texts.iter().map(|text| self.tokenizer.encode(text)).collect();
        let ids = Tensor::from_slice(&rows.concat()).view([texts.len() as i64, -1]).f_to_device(device)?;
        let mut ops = Tensors::new(&self.weights).computing_in(kind);
        Ok(tch::no_grad(|| text_encoder(&mut ops, &self.config, &ids)))
    }
}

/// Texts through all text encoders of a model, without sizes.
///
/// # Errors
/// libtorch's: no memory on the device.
pub fn encode_texts(encoders: &[TextEncoder], texts: &[&str], (device, kind): (Device, Kind)) -> Result<Conditioning> {
    let outputs: Result<Vec<_>> = encoders.iter().map(|encoder| encoder.run(texts, kind, device)).collect();
    Ok(Conditioning::of_texts(outputs?))
}
