//! `CLIPVisionModelWithProjection`: CLIP's encoder of pictures (Radford et al. 2021, 2.4), alone in the safety checker and
//! beside an encoder of texts in a whole CLIP.
//!
//! Symbols: S the picture's side, P the patch's, D the encoder's width, E the width of the embeddings.

use anyhow::{Result, bail};
use serde_json::Value;

use super::clip::{Layer, Layers, activation};
use super::json::Json;
use crate::ops::{Conv, Linear, Mask, Ops};

/// What the `vision_config` of a CLIP says.
#[derive(Clone, Debug, PartialEq)]
pub struct VisionConfig {
    /// S
    pub image_size: i64,
    pub channels: i64,
    /// P
    pub patch_size: i64,
    pub layers: i64,
    /// E
    pub projection: i64,
    encoder: Layers,
}

impl VisionConfig {
    /// Reads `vision`, the part of `network`'s configuration about this encoder, which is projected to `projection`.
    ///
    /// # Errors
    /// A key with a value that is not supported, named with it.
    pub(super) fn from_json(network: &'static str, vision: &Value, projection: i64) -> Result<Self> {
        let json = Json::new(network, vision)?;
        let config = Self {
            image_size: json.integer("image_size", 224)?,
            channels: json.integer("num_channels", 3)?,
            patch_size: json.integer("patch_size", 32)?,
            layers: json.layers("num_hidden_layers", 12)?,
            projection,
            encoder: Layers {
                width: json.integer("hidden_size", 768)?,
                inner: json.integer("intermediate_size", 3072)?,
                heads: json.integer("num_attention_heads", 12)?,
                eps: json.number("layer_norm_eps", 1e-5)?,
                activation: activation(network, &json)?,
                mask: Mask::None,
            },
        };
        let Layers { width, heads, .. } = config.encoder;
        if width % heads != 0 {
            bail!(
                "{network}: config.json has `num_attention_heads`: {heads}, which does not divide `hidden_size`: {width}"
            );
        }
        if config.image_size < config.patch_size {
            bail!(
                "{network}: config.json has `image_size`: {}, less than `patch_size`: {}",
                config.image_size,
                config.patch_size
            );
        }
        Ok(config)
    }
}

/// Pictures `[B, 3, S, S]` → `[B, E]`.
pub fn image_embeds<O: Ops>(ops: &mut O, config: &VisionConfig, picture: &O::Value) -> O::Value {
    let &VisionConfig { patch_size, channels, encoder, .. } = config;
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
