//! The interpreter that runs a network with libtorch.

use std::collections::HashMap;

use tch::{Kind, Tensor};

use super::{Activation, Conv, Linear, Mask, Ops};

/// A network's parameters by their diffusers name; all of one type and on one device.
pub type Weights = HashMap<String, Tensor>;

/// Runs operations on tensors. The weights must be those that the network declares (see [`super::declared`]), of
/// those shapes: loading checks that, so that here a missing one is a bug and panics with its name.
pub struct Tensors<'w> {
    weights: &'w Weights,
}

impl<'w> Tensors<'w> {
    pub fn new(weights: &'w Weights) -> Self {
        Self { weights }
    }

    fn weight(&self, name: &str, part: &str) -> &'w Tensor {
        let full = format!("{name}.{part}");
        self.weights.get(&full).unwrap_or_else(|| panic!("the network asks for {full}, which loading did not check"))
    }
}

impl Ops for Tensors<'_> {
    type Value = Tensor;

    fn share(&self, x: &Tensor) -> Tensor {
        x.shallow_clone()
    }
    fn shape(&self, x: &Tensor) -> Vec<i64> {
        x.size()
    }
    fn conv2d(&mut self, x: &Tensor, name: &str, conv: Conv) -> Tensor {
        let (stride, padding) = ([conv.stride; 2], [conv.padding; 2]);
        x.conv2d(self.weight(name, "weight"), Some(self.weight(name, "bias")), stride, padding, [1, 1], 1)
    }
    fn linear(&mut self, x: &Tensor, name: &str, linear: Linear) -> Tensor {
        x.linear(self.weight(name, "weight"), linear.bias.then(|| self.weight(name, "bias")))
    }
    fn group_norm(&mut self, x: &Tensor, name: &str, groups: i64, eps: f64) -> Tensor {
        x.group_norm(groups, Some(self.weight(name, "weight")), Some(self.weight(name, "bias")), eps, true)
    }
    fn layer_norm(&mut self, x: &Tensor, name: &str, eps: f64) -> Tensor {
        let weight = self.weight(name, "weight");
        x.layer_norm(weight.size(), Some(weight), Some(self.weight(name, "bias")), eps, true)
    }
    fn attention(&mut self, q: &Tensor, k: &Tensor, v: &Tensor, heads: i64, mask: Mask) -> Tensor {
        let (batch, tokens, channels) = (q.size()[0], q.size()[1], q.size()[2]);
        let split = |x: &Tensor| x.view([batch, -1, heads, channels / heads]).transpose(1, 2);
        Tensor::scaled_dot_product_attention(
            &split(q),
            &split(k),
            &split(v),
            None::<&Tensor>,
            0.0,
            mask == Mask::Causal,
            None,
            false,
        )
        .transpose(1, 2)
        .reshape([batch, tokens, channels])
    }
    fn activation(&mut self, x: &Tensor, function: Activation) -> Tensor {
        match function {
            Activation::Silu => x.silu(),
            Activation::Gelu => x.gelu("none"),
            Activation::QuickGelu => x * (x * 1.702).sigmoid(),
        }
    }
    fn geglu(&mut self, x: &Tensor) -> Tensor {
        let halves = x.chunk(2, -1);
        &halves[0] * halves[1].gelu("none")
    }
    fn add(&mut self, a: &Tensor, b: &Tensor) -> Tensor {
        a + b
    }
    fn add_to_pixels(&mut self, image: &Tensor, vector: &Tensor) -> Tensor {
        image + vector.unsqueeze(-1).unsqueeze(-1)
    }
    fn concat_channels(&mut self, images: &[Tensor]) -> Tensor {
        Tensor::cat(images, 1)
    }
    fn upsample(&mut self, x: &Tensor, height: i64, width: i64) -> Tensor {
        x.upsample_nearest2d([height, width], None, None)
    }
    fn pad_bottom_right(&mut self, x: &Tensor) -> Tensor {
        x.constant_pad_nd([0, 1, 0, 1])
    }
    fn image_to_tokens(&mut self, x: &Tensor) -> Tensor {
        x.flatten(2, 3).transpose(1, 2)
    }
    fn tokens_to_image(&mut self, x: &Tensor, height: i64, width: i64) -> Tensor {
        let (batch, channels) = (x.size()[0], x.size()[2]);
        x.transpose(1, 2).reshape([batch, channels, height, width])
    }
    fn timestep_embedding(&mut self, t: &Tensor, dim: i64, flip_sin_to_cos: bool, freq_shift: f64) -> Tensor {
        let half = dim / 2;
        let exponent =
            Tensor::arange(half, (Kind::Float, t.device())) * (-(10_000f64.ln()) / (half as f64 - freq_shift));
        let angles = t.to_kind(Kind::Float).unsqueeze(1) * exponent.exp().unsqueeze(0);
        let (sin, cos) = (angles.sin(), angles.cos());
        let parts = if flip_sin_to_cos { [cos, sin] } else { [sin, cos] };
        let embedding = Tensor::cat(&parts, 1);
        let embedding = if dim % 2 == 1 { embedding.constant_pad_nd([0, 1]) } else { embedding };
        embedding.to_kind(self.weights.values().next().map_or(Kind::Float, Tensor::kind))
    }
    fn embedding(&mut self, ids: &Tensor, name: &str, _rows: i64, _width: i64) -> Tensor {
        Tensor::embedding(self.weight(name, "weight"), ids, -1, false, false)
    }
    fn add_positions(&mut self, x: &Tensor, name: &str, _rows: i64) -> Tensor {
        x + self.weight(name, "weight").narrow(0, 0, x.size()[1])
    }
    fn pool_at_end_of_text(&mut self, x: &Tensor, ids: &Tensor, eos: i64) -> Tensor {
        let position = if eos == 2 { ids.argmax(-1, false) } else { ids.eq(eos).to_kind(Kind::Int).argmax(-1, false) };
        let index = position.view([-1, 1, 1]).expand([-1, 1, x.size()[2]], false);
        x.gather(1, &index, false).squeeze_dim(1)
    }
}
