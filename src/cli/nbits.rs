//! `--quantize-nbits`: post-training palettes on the way into a package.

use std::collections::BTreeMap;
use std::str::FromStr;

use anyhow::{Context, Result, bail};

use crate::coreml::components::{Part, autoencoder_numbers};
use crate::coreml::writing::interface::InputKind;
use crate::ops::Parameter;
use crate::palette::Form;
use crate::palette::post_training::{WEIGHT_THRESHOLD, chosen};
use crate::source::{Component, Model};

/// Bits of the palettes of each package.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Nbits {
    /// Of those that are not named.
    rest: Option<u32>,
    named: BTreeMap<Part, u32>,
}

impl FromStr for Nbits {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let mut nbits = Self::default();
        for item in text.split(',') {
            let (part, bits) = match item.split_once('=') {
                Some((part, bits)) => (Some(part.parse::<Part>()?), bits),
                None => (None, item),
            };
            let bits: u32 = bits.trim().parse().with_context(|| format!("`{bits}` is no number of bits"))?;
            if let Some((_, problem)) = Form::per_tensor(bits).problem() {
                bail!("{problem}");
            }
            let before = match part {
                Some(part) => nbits.named.insert(part, bits),
                None => nbits.rest.replace(bits),
            };
            if before.is_some() {
                bail!("{} is there twice", part.map_or("a number without a name", Part::name));
            }
        }
        Ok(nbits)
    }
}

impl Nbits {
    /// The form of a package's palettes; none where its weights stay fp16.
    pub fn of(&self, part: Part) -> Option<Form> {
        self.named.get(&part).copied().or(self.rest).map(Form::per_tensor)
    }

    /// The form of the palettes that the package of this model gets: that of [`Self::of`], but none where it computes in
    /// fp32, since palettes are fp16.
    ///
    /// # Errors
    /// The autoencoder's configuration can't be read.
    pub fn of_model(&self, part: Part, model: &Model) -> Result<Option<Form>> {
        let fp32 = part.component() == Component::Autoencoder && autoencoder_numbers(part, model)? == InputKind::Single;
        Ok(self.of(part).filter(|_| !fp32))
    }

    /// Whether a package is named in so many words.
    pub fn names(&self, part: Part) -> bool {
        self.named.contains_key(&part)
    }
}

/// Which of a network's parameters become palettes: weights of convolutions and linear layers that are not small, never
/// embeddings.
pub fn forms(parameters: &[Parameter], form: Form) -> BTreeMap<String, Form> {
    chosen(parameters, form, WEIGHT_THRESHOLD).forms
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_for_all_and_for_some() {
        let nbits: Nbits = "4, vae_decoder = 8".parse().unwrap();
        let bits = |part| nbits.of(part).map(|form| form.bits);
        assert_eq!([Part::Unet, Part::TextEncoder, Part::VaeDecoder].map(bits), [Some(4), Some(4), Some(8)]);
        let nbits: Nbits = "text_encoder=6".parse().unwrap();
        assert_eq!((nbits.of(Part::Unet), nbits.of(Part::TextEncoder).map(|f| f.bits)), (None, Some(6)));
        for (text, said) in [("5", "is 5"), ("vae=4", "unknown component"), ("4,6", "twice"), ("x", "`x` is no number")]
        {
            let error = format!("{:#}", text.parse::<Nbits>().unwrap_err());
            assert!(error.contains(said), "{text}: {error}");
        }
    }
}
