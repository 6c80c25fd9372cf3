//! `CLIPTextModel`: the text encoder of Stable Diffusion 1 (OpenAI's, quick GELU) and 2 (OpenCLIP's, GELU), and
//! `CLIPTextModelWithProjection`, the second one of Stable Diffusion XL (OpenCLIP's).

use anyhow::{Result, bail};
use serde_json::{Value, json};

use super::clip::{Layer, Layers, activation};
use super::json::Json;
use crate::ops::{Activation, Linear, Mask, Ops, Parameter, declared};

/// What `text_encoder/config.json` says.
#[derive(Clone, Debug, PartialEq)]
pub struct TextEncoderConfig {
    pub vocab_size: i64,
    pub hidden_size: i64,
    pub intermediate_size: i64,
    pub layers: i64,
    pub heads: i64,
    pub positions: i64,
    pub layer_norm_eps: f64,
    pub activation: Activation,
    /// Where the pooled output is read; 2 is the sign of old configs for "the largest id".
    pub eos_token_id: i64,
    /// Width of the layer without bias that the pooled output goes through; none in a plain `CLIPTextModel`.
    pub projection: Option<i64>,
}

/// What the text encoder gives.
pub struct TextOutput<V> {
    /// `[B, T, hidden]`, after the last layer and its norm: what the UNets of Stable Diffusion 1 and 2 attend to.
    pub last_hidden_state: V,
    /// `[B, T, hidden]`, what the last layer reads, transformers' `hidden_states[-2]`: what the UNet of Stable Diffusion
    /// XL attends to.
    pub penultimate: V,
    /// `[B, hidden]`, the last hidden state at the end of the text; `[B, projection]` where it is projected.
    pub pooled: V,
}

impl TextEncoderConfig {
    /// # Errors
    /// A key with a value that is not supported, named with it.
    pub fn from_json(value: &Value) -> Result<Self> {
        let projects = value.pointer("/architectures/0").is_some_and(|class| class == "CLIPTextModelWithProjection");
        let json = Json::new("CLIPTextModel", value)?;
        let projection = if projects { Some(json.integer("projection_dim", 512)?) } else { None };
        Self::with(&json, projection)
    }

    /// That of a whole CLIP, which says itself how wide its `projection` is.
    ///
    /// # Errors
    /// As [`Self::from_json`].
    pub(super) fn projected(value: &Value, projection: i64) -> Result<Self> {
        Self::with(&Json::new("CLIPTextModel", value)?, Some(projection))
    }

    fn with(json: &Json, projection: Option<i64>) -> Result<Self> {
        json.only("model_type", &[json!("clip_text_model")])?;
        let activation = activation("CLIPTextModel", json)?;
        let config = Self {
            vocab_size: json.integer("vocab_size", 49408)?,
            hidden_size: json.integer("hidden_size", 512)?,
            intermediate_size: json.integer("intermediate_size", 2048)?,
            layers: json.layers("num_hidden_layers", 12)?,
            heads: json.integer("num_attention_heads", 8)?,
            positions: json.integer("max_position_embeddings", 77)?,
            layer_norm_eps: json.number("layer_norm_eps", 1e-5)?,
            activation,
            eos_token_id: json.integer("eos_token_id", 49407)?,
            projection,
        };
        if config.hidden_size % config.heads != 0 {
            bail!(
                "CLIPTextModel: config.json has `num_attention_heads`: {}, which does not divide `hidden_size`: {}",
                config.heads,
                config.hidden_size
            );
        }
        Ok(config)
    }

    /// The parameters of this network, by their transformers names.
    pub fn parameters(&self) -> Vec<Parameter> {
        declared(|ops| {
            text_encoder(ops, self, &vec![1, self.positions]);
        })
    }
}

/// Token ids `[B, T]` → hidden states, and the one at the end of the text.
pub fn text_encoder<O: Ops>(ops: &mut O, config: &TextEncoderConfig, ids: &O::Value) -> TextOutput<O::Value> {
    let width = config.hidden_size;
    let x = ops.embedding(ids, "text_model.embeddings.token_embedding", config.vocab_size, width);
    let mut x = ops.add_positions(&x, "text_model.embeddings.position_embedding", config.positions);
    let layers = Layers {
        width,
        inner: config.intermediate_size,
        heads: config.heads,
        eps: config.layer_norm_eps,
        activation: config.activation,
        mask: Mask::Causal,
    };
    let mut penultimate = ops.share(&x);
    for layer in 0..config.layers {
        penultimate = ops.share(&x);
        x = ops.block(Layer { layers, name: format!("text_model.encoder.layers.{layer}") }, &[&x]);
    }
    let last_hidden_state = ops.layer_norm(&x, "text_model.final_layer_norm", config.layer_norm_eps);
    let mut pooled = ops.pool_at_end_of_text(&last_hidden_state, ids, config.eos_token_id);
    if let Some(out_features) = config.projection {
        pooled = ops.linear(&pooled, "text_projection", Linear { in_features: width, out_features, bias: false });
    }
    TextOutput { last_hidden_state, penultimate, pooled }
}
