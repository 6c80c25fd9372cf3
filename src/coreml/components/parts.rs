//! The packages that a model is exported as.

use std::fmt;
use std::str::FromStr;

use anyhow::{Result, bail, ensure};

use serde::{Deserialize, Serialize};

use crate::ops::Parameter;
use crate::source::{Component, Model};

/// A package that a model is exported as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Part {
    Unet,
    TextEncoder,
    /// Stable Diffusion XL's second.
    #[serde(rename = "text_encoder_2")]
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

    /// Its name on the command line and in configs.
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

    /// The last part of its package's name; a UNet that takes what ControlNets add has its own.
    pub fn package(self, controlnet: bool) -> &'static str {
        if self == Part::Unet && controlnet { "control-unet" } else { self.name() }
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

/// That a package can be made for latents, or pictures, of this size.
pub(super) fn check_size(height: i64, width: i64) -> Result<()> {
    ensure!(height > 0 && width > 0, "a package for latents of {height}×{width} cannot be made");
    Ok(())
}
