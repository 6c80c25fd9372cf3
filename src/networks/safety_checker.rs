//! `StableDiffusionSafetyChecker`: CLIP's encoder of pictures, and how close what it sees is to 17 concepts.
//!
//! A picture is held back when one of its cosines with `concept_embeds` exceeds that concept's threshold in
//! `concept_embeds_weights`. Where one of three more, of `special_care_embeds`, exceeds its own, all thresholds are 0.01
//! lower. Symbols: P the patch's side, D the encoder's width, E the width of the embeddings.

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::clip::{Layer, Layers, activation};
use super::json::Json;
use crate::ops::{Conv, Linear, Mask, Ops, Parameter, declared};

/// Concepts that pictures are held back for.
const CONCEPTS: i64 = 17;
/// Concepts that make it stricter with all others.
const SPECIAL_CARE: i64 = 3;
/// How much stricter.
const STRICTER: f64 = 0.01;

/// What `safety_checker/config.json` says.
#[derive(Clone, Debug, PartialEq)]
pub struct SafetyCheckerConfig {
    /// Side of the pictures that it sees.
    pub image_size: i64,
    pub channels: i64,
    pub patch_size: i64,
    pub layers: i64,
    /// E
    pub projection: i64,
    encoder: Layers,
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
        // Old files have the second name too, or alone.
        let vision = ["vision_config", "vision_config_dict"].into_iter().find_map(|key| value.get(key));
        let vision = vision.filter(|vision| vision.is_object()).with_context(|| {
            format!("{NETWORK}: config.json has no `vision_config`, which says what its encoder looks like")
        })?;
        let json = Json::new(NETWORK, vision)?;
        let config = Self {
            image_size: json.integer("image_size", 224)?,
            channels: json.integer("num_channels", 3)?,
            patch_size: json.integer("patch_size", 32)?,
            layers: json.layers("num_hidden_layers", 12)?,
            projection: whole.integer("projection_dim", 512)?,
            encoder: Layers {
                width: json.integer("hidden_size", 768)?,
                inner: json.integer("intermediate_size", 3072)?,
                heads: json.integer("num_attention_heads", 12)?,
                eps: json.number("layer_norm_eps", 1e-5)?,
                activation: activation(NETWORK, &json)?,
                mask: Mask::None,
            },
        };
        let Layers { width, heads, .. } = config.encoder;
        if width % heads != 0 {
            bail!(
                "{NETWORK}: config.json has `num_attention_heads`: {heads}, which does not divide `hidden_size`: {width}"
            );
        }
        if config.image_size < config.patch_size {
            bail!(
                "{NETWORK}: config.json has `image_size`: {}, less than `patch_size`: {}",
                config.image_size,
                config.patch_size
            );
        }
        Ok(config)
    }

    /// The parameters of this network, by their names in files.
    pub fn parameters(&self) -> Vec<Parameter> {
        let side = self.image_size;
        declared(|ops| {
            safety_checker(ops, self, &vec![1, self.channels, side, side], &vec![1, 8, 8, 3], &vec![1]);
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
    let embeds = image_embeds(ops, config, clip_input);
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

/// Pictures `[B, 3, 224, 224]` → `[B, E]`: `CLIPVisionModelWithProjection`.
fn image_embeds<O: Ops>(ops: &mut O, config: &SafetyCheckerConfig, picture: &O::Value) -> O::Value {
    let &SafetyCheckerConfig { patch_size, channels, encoder, .. } = config;
    let name = "vision_model.embeddings";
    let patches =
        Conv { stride: patch_size, padding: 0, bias: false, ..Conv::same(channels, encoder.width, patch_size) };
    let x = ops.conv2d(picture, &format!("{name}.patch_embedding"), patches);
    let x = ops.image_to_tokens(&x);
    let x = ops.prepend(&x, &format!("{name}.class_embedding"));
    let positions = ops.shape(&x)[1];
    let x = ops.add_positions(&x, &format!("{name}.position_embedding"), positions);
    let mut x = ops.layer_norm(&x, "vision_model.pre_layrnorm", encoder.eps);
    for layer in 0..config.layers {
        x = ops.block(Layer { layers: encoder, name: format!("vision_model.encoder.layers.{layer}") }, &[&x]);
    }
    let x = ops.first_token(&x);
    let x = ops.layer_norm(&x, "vision_model.post_layernorm", encoder.eps);
    let projection = Linear { in_features: encoder.width, out_features: config.projection, bias: false };
    ops.linear(&x, "visual_projection", projection)
}
