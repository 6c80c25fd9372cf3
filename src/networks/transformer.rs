//! `Transformer2DModel`: tokens of an image attend to themselves and to the text.

use crate::ops::{Block, Conv, Linear, Mask, Ops};

/// One spatial transformer of the UNet: an image `[B, C, H, W]` and a context `[B, S, D]` → `[B, C, H, W]`.
pub(super) struct SpatialTransformer {
    pub name: String,
    pub groups: i64,
    pub heads: i64,
    pub layers: i64,
    /// `proj_in` and `proj_out` are linear layers (SD 2) rather than 1×1 convolutions (SD 1).
    pub linear_projection: bool,
}

impl Block for SpatialTransformer {
    fn run<O: Ops>(&self, ops: &mut O, inputs: &[O::Value]) -> O::Value {
        let (name, x, context) = (&self.name, &inputs[0], &inputs[1]);
        let shape = ops.shape(x);
        let (channels, height, width) = (shape[1], shape[2], shape[3]);
        let (proj_in, proj_out) = (format!("{name}.proj_in"), format!("{name}.proj_out"));
        let linear = Linear { in_features: channels, out_features: channels, bias: true };
        let conv = Conv::same(channels, channels, 1);

        let h = ops.group_norm(x, &format!("{name}.norm"), self.groups, 1e-6);
        let mut h = if self.linear_projection {
            let tokens = ops.image_to_tokens(&h);
            ops.linear(&tokens, &proj_in, linear)
        } else {
            let h = ops.conv2d(&h, &proj_in, conv);
            ops.image_to_tokens(&h)
        };
        for layer in 0..self.layers {
            h = self.layer(ops, &format!("{name}.transformer_blocks.{layer}"), &h, context);
        }
        let h = if self.linear_projection {
            let h = ops.linear(&h, &proj_out, linear);
            ops.tokens_to_image(&h, height, width)
        } else {
            let h = ops.tokens_to_image(&h, height, width);
            ops.conv2d(&h, &proj_out, conv)
        };
        ops.add(&h, x)
    }
}

impl SpatialTransformer {
    /// `BasicTransformerBlock`: self-attention, cross-attention, gated feed-forward, each on a norm, each added.
    fn layer<O: Ops>(&self, ops: &mut O, name: &str, x: &O::Value, context: &O::Value) -> O::Value {
        let channels = ops.shape(x)[2];
        let h = ops.layer_norm(x, &format!("{name}.norm1"), 1e-5);
        let h = self.attention(ops, &format!("{name}.attn1"), &h, None);
        let x = ops.add(&h, x);
        let h = ops.layer_norm(&x, &format!("{name}.norm2"), 1e-5);
        let h = self.attention(ops, &format!("{name}.attn2"), &h, Some(context));
        let x = ops.add(&h, &x);
        let h = ops.layer_norm(&x, &format!("{name}.norm3"), 1e-5);
        let up = Linear { in_features: channels, out_features: 8 * channels, bias: true };
        let h = ops.linear(&h, &format!("{name}.ff.net.0.proj"), up);
        let h = ops.geglu(&h);
        let down = Linear { in_features: 4 * channels, out_features: channels, bias: true };
        let h = ops.linear(&h, &format!("{name}.ff.net.2"), down);
        ops.add(&h, &x)
    }

    fn attention<O: Ops>(&self, ops: &mut O, name: &str, x: &O::Value, context: Option<&O::Value>) -> O::Value {
        let channels = ops.shape(x)[2];
        let context = context.unwrap_or(x);
        let keys = Linear { in_features: ops.shape(context)[2], out_features: channels, bias: false };
        let queries = Linear { in_features: channels, out_features: channels, bias: false };
        let q = ops.linear(x, &format!("{name}.to_q"), queries);
        let k = ops.linear(context, &format!("{name}.to_k"), keys);
        let v = ops.linear(context, &format!("{name}.to_v"), keys);
        let h = ops.attention(&q, &k, &v, self.heads, Mask::None);
        ops.linear(&h, &format!("{name}.to_out.0"), Linear { bias: true, ..queries })
    }
}
