//! What is said of a model besides where it is: what its own files leave out or get wrong.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// What the UNet predicts, where it is said outright.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum PredictionType {
    /// What the model's files say.
    #[default]
    Auto,
    /// The noise.
    Epsilon,
    /// The velocity.
    VPrediction,
}

/// The options of [`Model::open_with`](super::Model::open_with); each default is "as the model's files have it".
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ModelOptions {
    /// A branch, tag or commit of a hub id.
    pub revision: Option<String>,
    /// Another autoencoder: a diffusers folder of it, a model's folder with `vae/`, a single file, or a hub id.
    pub vae: Option<String>,
    pub prediction_type: PredictionType,
    /// Overrules `rescale_betas_zero_snr` of the scheduler.
    pub rescale_betas_zero_snr: Option<bool>,
}

impl ModelOptions {
    /// Whether the scheduler's configuration is not the file's.
    pub(super) fn change_scheduler(&self) -> bool {
        self.prediction_type != PredictionType::Auto || self.rescale_betas_zero_snr.is_some()
    }

    /// `scheduler_config.json` with what the options overrule.
    pub(super) fn scheduler(&self, mut config: Value) -> Value {
        if let Some(keys) = config.as_object_mut() {
            let prediction = match self.prediction_type {
                PredictionType::Auto => None,
                PredictionType::Epsilon => Some("epsilon"),
                PredictionType::VPrediction => Some("v_prediction"),
            };
            if let Some(prediction) = prediction {
                keys.insert("prediction_type".into(), json!(prediction));
            }
            if let Some(rescale) = self.rescale_betas_zero_snr {
                keys.insert("rescale_betas_zero_snr".into(), json!(rescale));
            }
        }
        config
    }
}
