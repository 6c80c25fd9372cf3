//! `--quantize-nbits` and `export.quantize_nbits`: post-training palettes on the way into a package.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use anyhow::{Context, Result, bail};
use serde::de::{self, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use crate::coreml::components::{Part, autoencoder_numbers};
use crate::coreml::writing::interface::InputKind;
use crate::ops::Parameter;
use crate::palette::Form;
use crate::palette::post_training::{WEIGHT_THRESHOLD, chosen};
use crate::source::{Component, Model};

/// Bits of the palettes of each package.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(into = "String")]
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
            let bits: u32 = bits.trim().parse().with_context(|| format!("`{bits}` is not a number of bits"))?;
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

impl fmt::Display for Nbits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rest = self.rest.iter().map(u32::to_string);
        let named = self.named.iter().map(|(part, bits)| format!("{part}={bits}"));
        f.write_str(&rest.chain(named).collect::<Vec<_>>().join(","))
    }
}

impl From<Nbits> for String {
    fn from(nbits: Nbits) -> Self {
        nbits.to_string()
    }
}

impl schemars::JsonSchema for Nbits {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Nbits".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({ "type": ["integer", "string"] })
    }
}

/// From a number, or from a text as the command line has it.
impl<'de> Deserialize<'de> for Nbits {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Text;

        impl Visitor<'_> for Text {
            type Value = Nbits;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number of bits, or text as in \"unet=4,text_encoder=6\"")
            }

            fn visit_i64<E: de::Error>(self, bits: i64) -> Result<Nbits, E> {
                self.visit_str(&bits.to_string())
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Nbits, E> {
                text.parse().map_err(|error| E::custom(format!("{error:#}")))
            }
        }

        deserializer.deserialize_any(Text)
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

    /// What of the palettes of these packages needs iOS 18, with the name of the first such package.
    pub fn needs_ios18(&self, parts: impl IntoIterator<Item = Part>) -> Option<(&'static str, &'static str)> {
        parts.into_iter().find_map(|part| Some((part.name(), self.of(part)?.needs_ios18()?)))
    }

    /// The packages that are named.
    pub fn named(&self) -> impl Iterator<Item = Part> {
        self.named.keys().copied()
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
        assert_eq!(
            (nbits.to_string().parse::<Nbits>().unwrap(), nbits.to_string().as_str()),
            (nbits, "4,vae_decoder=8")
        );
        let nbits: Nbits = "text_encoder=6".parse().unwrap();
        assert_eq!((nbits.of(Part::Unet), nbits.of(Part::TextEncoder).map(|f| f.bits)), (None, Some(6)));
        for (text, said) in
            [("5", "is 5"), ("vae=4", "unknown component"), ("4,6", "twice"), ("x", "`x` is not a number of bits")]
        {
            let error = format!("{:#}", text.parse::<Nbits>().unwrap_err());
            assert!(error.contains(said), "{text}: {error}");
        }
    }
}
