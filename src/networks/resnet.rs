//! The residual block that the UNet and the autoencoder share.

use crate::ops::{Activation, Block, Conv, Linear, Ops};

/// What all residual blocks of one network have in common.
#[derive(Clone, Copy)]
pub(super) struct Resnet {
    pub groups: i64,
    pub eps: f64,
}

impl Resnet {
    /// `x` `[B, in, H, W]`, `temb` the activated time embedding `[B, T]` → `[B, out, H, W]`.
    pub(super) fn forward<O: Ops>(
        &self,
        ops: &mut O,
        name: &str,
        x: &O::Value,
        temb: Option<&O::Value>,
        out_channels: i64,
    ) -> O::Value {
        let block = Residual { resnet: *self, name: name.to_owned(), out_channels };
        match temb {
            Some(temb) => ops.block(block, &[x, temb]),
            None => ops.block(block, &[x]),
        }
    }

    fn normed_conv<O: Ops>(&self, ops: &mut O, name: &str, part: &str, x: &O::Value, out_channels: i64) -> O::Value {
        let in_channels = ops.shape(x)[1];
        let h = ops.group_norm(x, &format!("{name}.norm{part}"), self.groups, self.eps);
        let h = ops.activation(&h, Activation::Silu);
        ops.conv2d(&h, &format!("{name}.conv{part}"), Conv::same(in_channels, out_channels, 3))
    }

    /// Norm, SiLU and 3×3 convolution at the end of a network: `conv_norm_out`, `conv_out`.
    pub(super) fn out<O: Ops>(&self, ops: &mut O, prefix: &str, x: &O::Value, out_channels: i64) -> O::Value {
        let in_channels = ops.shape(x)[1];
        let h = ops.group_norm(x, &format!("{prefix}conv_norm_out"), self.groups, self.eps);
        let h = ops.activation(&h, Activation::Silu);
        ops.conv2d(&h, &format!("{prefix}conv_out"), Conv::same(in_channels, out_channels, 3))
    }
}

/// One residual block.
struct Residual {
    resnet: Resnet,
    name: String,
    out_channels: i64,
}

impl Block for Residual {
    fn run<O: Ops>(&self, ops: &mut O, inputs: &[O::Value]) -> O::Value {
        let Self { resnet, name, out_channels } = self;
        let (x, out_channels) = (&inputs[0], *out_channels);
        let in_channels = ops.shape(x)[1];
        let h = resnet.normed_conv(ops, name, "1", x, out_channels);
        let h = match inputs.get(1) {
            Some(temb) => {
                let linear = Linear { in_features: ops.shape(temb)[1], out_features: out_channels, bias: true };
                let shift = ops.linear(temb, &format!("{name}.time_emb_proj"), linear);
                ops.add_to_pixels(&h, &shift)
            }
            None => h,
        };
        let h = resnet.normed_conv(ops, name, "2", &h, out_channels);
        if in_channels == out_channels {
            return ops.add(x, &h);
        }
        let shortcut = ops.conv2d(x, &format!("{name}.conv_shortcut"), Conv::same(in_channels, out_channels, 1));
        ops.add(&shortcut, &h)
    }
}

/// Nearest-neighbour resize to `height × width`, then a 3×3 convolution (`{name}.upsamplers.0.conv`).
pub(super) fn upsample<O: Ops>(ops: &mut O, name: &str, x: &O::Value, height: i64, width: i64) -> O::Value {
    let channels = ops.shape(x)[1];
    let x = ops.upsample(x, height, width);
    ops.conv2d(&x, &format!("{name}.upsamplers.0.conv"), Conv::same(channels, channels, 3))
}
