//! `CLIPModel`: an encoder of texts and one of pictures that put both into one space (Radford et al. 2021).

use anyhow::Result;
use serde_json::{Value, json};

use super::clip::sub_config;
use super::json::Json;
use super::text_encoder::{TextEncoderConfig, text_encoder};
use super::vision::{VisionConfig, image_embeds};
use crate::ops::{Initial, Parameter, declared};

/// The parameter by whose exponential cosines become logits; a scalar.
pub const LOGIT_SCALE: &str = "logit_scale";
/// What it starts from, ln(1 / 0.07) (Radford et al. 2021, 2.5).
pub const FIRST_LOGIT_SCALE: f64 = 2.6592;

/// What `config.json` of a CLIP says.
#[derive(Clone, Debug, PartialEq)]
pub struct ClipConfig {
    /// With a projection to as many numbers as pictures have.
    pub text: TextEncoderConfig,
    pub vision: VisionConfig,
}

impl ClipConfig {
    /// # Errors
    /// A key with a value that is not supported, named with it; a part that is missing.
    pub fn from_json(value: &Value) -> Result<Self> {
        const NETWORK: &str = "CLIPModel";
        let whole = Json::new(NETWORK, value)?;
        whole.only("model_type", &[json!("clip")])?;
        let projection = whole.integer("projection_dim", 512)?;
        Ok(Self {
            text: TextEncoderConfig::projected(sub_config(NETWORK, value, "text")?, projection)?,
            vision: VisionConfig::from_json(NETWORK, sub_config(NETWORK, value, "vision")?, projection)?,
        })
    }

    /// The parameters of both encoders, by their names in files, and [`LOGIT_SCALE`].
    pub fn parameters(&self) -> Vec<Parameter> {
        let side = self.vision.image_size;
        let mut parameters = declared(|ops| {
            text_encoder(ops, &self.text, &vec![1, self.text.positions]);
            image_embeds(ops, &self.vision, &vec![1, self.vision.channels, side, side]);
        });
        parameters.push(Parameter {
            name: LOGIT_SCALE.to_owned(),
            shape: Vec::new(),
            initial: Initial::Constant(FIRST_LOGIT_SCALE),
            palettizable: false,
        });
        parameters
    }
}
