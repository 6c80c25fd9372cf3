//! What is said of a model besides where it is: what its own files leave out or get wrong.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::lora::LoraChoice;

/// What the UNet predicts, where it is said outright.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema, clap::ValueEnum)]
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

/// The options of [`Model::open_with`](super::Model::open_with), those of every command; each default is "as the model's
/// files have it".
#[derive(Clone, Debug, Default, PartialEq, clap::Args)]
pub struct ModelOptions {
    /// Another autoencoder in place of the model's: a diffusers folder, a single file (.safetensors) or a hub id
    #[arg(long, value_name = "VAE")]
    pub vae: Option<String>,
    /// A LoRA that is merged into the model's weights, with a weight other than 1 after `=`; may be given again: a
    /// .safetensors file, a folder with one, or a hub id
    #[arg(long = "lora", value_name = "FILE[=WEIGHT]", allow_hyphen_values = false)]
    pub loras: Vec<LoraChoice>,
    /// The branch, tag or commit of a hub id in the local Hugging Face cache
    #[arg(long, value_name = "REVISION")]
    pub revision: Option<String>,
    /// What the UNet predicts, where the model's files do not say or are wrong
    #[arg(
        long,
        value_enum,
        value_name = "auto|epsilon|v_prediction",
        default_value = "auto",
        hide_possible_values = true
    )]
    pub prediction_type: PredictionType,
    /// Whether the noise schedule is rescaled to end in noise alone, where the model's files do not say or are wrong
    #[arg(long, value_name = "true|false")]
    pub rescale_betas_zero_snr: Option<bool>,
}

/// Schedulers of diffusers that do not know `rescale_betas_zero_snr`.
const WITHOUT_RESCALING: [&str; 8] = [
    "DEISMultistepScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
];

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
                // As diffusers has it, these know no such key: they would sample the schedule as it was.
                let class = keys.get("_class_name").and_then(Value::as_str);
                if rescale && class.is_some_and(|class| WITHOUT_RESCALING.contains(&class)) {
                    keys.insert("_class_name".into(), json!("DDIMScheduler"));
                }
            }
        }
        config
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rescaled_schedule_goes_to_a_scheduler_that_knows_it() {
        let options = ModelOptions { rescale_betas_zero_snr: Some(true), ..ModelOptions::default() };
        for (class, expected) in [
            ("PNDMScheduler", "DDIMScheduler"),
            ("LMSDiscreteScheduler", "DDIMScheduler"),
            ("EulerDiscreteScheduler", "EulerDiscreteScheduler"),
        ] {
            let config = options.scheduler(json!({ "_class_name": class, "beta_end": 0.012 }));
            assert_eq!(config["_class_name"], expected);
            assert_eq!((&config["rescale_betas_zero_snr"], &config["beta_end"]), (&json!(true), &json!(0.012)));
        }
        let config = ModelOptions { rescale_betas_zero_snr: Some(false), ..options };
        assert_eq!(config.scheduler(json!({ "_class_name": "PNDMScheduler" }))["_class_name"], "PNDMScheduler");
    }
}
