//! `StableDiffusionSafetyChecker`: CLIP's encoder of pictures, and how close what it sees is to 17 concepts.
//!
//! A picture is held back when one of its cosines with `concept_embeds` exceeds that concept's threshold in
//! `concept_embeds_weights`. Where one of three more, of `special_care_embeds`, exceeds its own, all thresholds are 0.01
//! lower.

use anyhow::Result;
use serde_json::{Value, json};

use super::clip::sub_config;
use super::json::Json;
use super::vision::{VisionConfig, image_embeds};
use crate::ops::{Ops, Parameter, declared};

/// Concepts that pictures are held back for.
const CONCEPTS: i64 = 17;
/// Concepts that make it stricter with all others.
const SPECIAL_CARE: i64 = 3;
/// How much stricter.
const STRICTER: f64 = 0.01;

/// What `safety_checker/config.json` says.
#[derive(Clone, Debug, PartialEq)]
pub struct SafetyCheckerConfig {
    /// Its encoder of pictures.
    pub vision: VisionConfig,
}

/// What the safety checker gives.
pub struct SafetyOutput<V> {
    /// The pictures `[B, H, W, 3]`, black where held back.
    pub filtered: V,
    /// `[B, 1, 1, 1]`: 1 where held back, else 0.
    pub held_back: V,
    /// `[B, 17]`, positive where a concept was seen.
    pub scores: V,
}

impl SafetyCheckerConfig {
    /// # Errors
    /// A key with a value that is not supported, named with it.
    pub fn from_json(value: &Value) -> Result<Self> {
        const NETWORK: &str = "StableDiffusionSafetyChecker";
        let whole = Json::new(NETWORK, value)?;
        whole.only("model_type", &[json!("clip")])?;
        let projection = whole.integer("projection_dim", 512)?;
        let vision = VisionConfig::from_json(NETWORK, sub_config(NETWORK, value, "vision")?, projection)?;
        Ok(Self { vision })
    }

    /// The parameters of this network, by their names in files.
    pub fn parameters(&self) -> Vec<Parameter> {
        let side = self.vision.image_size;
        declared(|ops| {
            safety_checker(ops, self, &vec![1, self.vision.channels, side, side], &vec![1, 8, 8, 3], &vec![1]);
        })
    }
}

/// `clip_input` `[B, 3, 224, 224]`, normalised as CLIP's pictures are; `images` `[B, H, W, 3]`, the same in full;
/// `adjustment` `[1]`, added to the scores of special care.
pub fn safety_checker<O: Ops>(
    ops: &mut O,
    config: &SafetyCheckerConfig,
    clip_input: &O::Value,
    images: &O::Value,
    adjustment: &O::Value,
) -> SafetyOutput<O::Value> {
    let embeds = image_embeds(ops, &config.vision, clip_input);
    let scores_of = |ops: &mut O, name: &str, rows: i64| {
        let cosines = ops.cosines(&embeds, name, rows);
        ops.subtract(&cosines, &format!("{name}_weights"))
    };
    let special = scores_of(ops, "special_care_embeds", SPECIAL_CARE);
    let special = ops.add(&special, adjustment);
    let special = ops.any_positive(&special, STRICTER);
    let scores = scores_of(ops, "concept_embeds", CONCEPTS);
    let scores = ops.add(&scores, &special);
    let held_back = ops.any_positive(&scores, 1.0);
    let held_back = ops.vector_to_image(&held_back);
    SafetyOutput { filtered: ops.blank_where(images, &held_back), held_back, scores }
}
