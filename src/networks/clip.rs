//! What CLIP's encoders of text and of pictures have in common: their layers (Radford et al. 2021, 2.4).

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::json::Json;
use crate::ops::{Activation, Block, Linear, Mask, Ops};

/// The layers of one encoder.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Layers {
    pub width: i64,
    /// Of the feed-forward network.
    pub inner: i64,
    pub heads: i64,
    pub eps: f64,
    pub activation: Activation,
    pub mask: Mask,
}

/// The part of `network`'s configuration about its encoder of `what`, "text" or "vision". Of the two names that old files
/// have, transformers lets `…_config_dict` win, with defaults for what it leaves out.
pub(super) fn sub_config<'v>(network: &str, value: &'v Value, what: &str) -> Result<&'v Value> {
    let keys = [format!("{what}_config_dict"), format!("{what}_config")];
    let found = keys.iter().filter_map(|key| value.get(key)).find(|part| part.is_object());
    found.with_context(|| {
        format!("{network}: config.json has no `{what}_config`, which describes its encoder of {what}")
    })
}

/// `hidden_act` of `network`'s configuration.
pub(super) fn activation(network: &str, json: &Json) -> Result<Activation> {
    Ok(match json.text("hidden_act", "quick_gelu")?.as_str() {
        "quick_gelu" => Activation::QuickGelu,
        "gelu" => Activation::Gelu,
        other => {
            bail!(
                "{network}: config.json has `hidden_act`: \"{other}\", which is not supported (quick_gelu or gelu is)"
            )
        }
    })
}

/// `CLIPEncoderLayer`: self-attention, then a feed-forward network, each on a norm, each added.
pub(super) struct Layer {
    pub layers: Layers,
    pub name: String,
}

impl Block for Layer {
    fn run<O: Ops>(&self, ops: &mut O, inputs: &[O::Value]) -> O::Value {
        let Self { layers: Layers { width, inner, heads, eps, activation, mask }, ref name } = *self;
        let square = Linear { in_features: width, out_features: width, bias: true };
        let h = ops.layer_norm(&inputs[0], &format!("{name}.layer_norm1"), eps);
        let q = ops.linear(&h, &format!("{name}.self_attn.q_proj"), square);
        let k = ops.linear(&h, &format!("{name}.self_attn.k_proj"), square);
        let v = ops.linear(&h, &format!("{name}.self_attn.v_proj"), square);
        let h = ops.attention(&q, &k, &v, heads, mask);
        let h = ops.linear(&h, &format!("{name}.self_attn.out_proj"), square);
        let x = ops.add(&inputs[0], &h);
        let h = ops.layer_norm(&x, &format!("{name}.layer_norm2"), eps);
        let h = ops.linear(&h, &format!("{name}.mlp.fc1"), Linear { out_features: inner, ..square });
        let h = ops.activation(&h, activation);
        let h = ops.linear(&h, &format!("{name}.mlp.fc2"), Linear { in_features: inner, ..square });
        ops.add(&x, &h)
    }
}
