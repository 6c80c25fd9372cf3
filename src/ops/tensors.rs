//! The interpreter that runs a network with libtorch.

use std::cell::RefCell;
use std::collections::{BTreeSet, HashMap};

use anyhow::Result;
use tch::{Kind, Tensor};

use super::{Activation, Block, Conv, Linear, Mask, Ops};
use crate::torch::gradient::{self, Gradients};

/// A network's parameters by their diffusers name; all of one type and on one device.
pub type Weights = HashMap<String, Tensor>;

/// Who looks on while a network runs: hears the name of each layer with parameters, a convolution's, linear layer's or
/// norm's, and what it gives.
pub type Watch<'w> = &'w dyn Fn(&str, &Tensor);

/// Runs operations on tensors. The weights must be those that the network declares (see [`super::declared`]), of
/// those shapes: loading checks that, so that here a missing one is a bug and panics with its name.
#[derive(Clone)]
pub struct Tensors<'w> {
    weights: &'w Weights,
    kind: Kind,
    recomputes: bool,
    /// The weights that were asked for, where that is to be known.
    asked: Option<BTreeSet<String>>,
    watch: Option<Watch<'w>>,
    features: Option<&'w RefCell<Vec<Tensor>>>,
}

impl<'w> Tensors<'w> {
    /// Computes in the type of the weights, and keeps what a backward pass needs.
    pub fn new(weights: &'w Weights) -> Self {
        let kind = weights.values().next().map_or(Kind::Float, Tensor::kind);
        Self { weights, kind, recomputes: false, asked: None, watch: None, features: None }
    }

    /// Computes in `kind`: weights of another type are converted when they are used, one at a time.
    pub fn computing_in(self, kind: Kind) -> Self {
        Self { kind, ..self }
    }

    /// With `recomputes`, a [`Block`] keeps only its inputs, and runs again in the backward pass: values and gradients
    /// are the same to the last bit, in less memory and a third more time.
    pub fn recomputing(self, recomputes: bool) -> Self {
        Self { recomputes, ..self }
    }

    /// Shows every layer's value to `watch`.
    pub fn watched(self, watch: Watch<'w>) -> Self {
        Self { watch: Some(watch), ..self }
    }

    fn shown(&self, name: &str, value: Tensor) -> Tensor {
        if let Some(watch) = self.watch {
            watch(name, &value);
        }
        value
    }

    /// Appends to `features` what the stages of the network give to each other, with gradients where there are any.
    pub fn keeping_features(self, features: &'w RefCell<Vec<Tensor>>) -> Self {
        Self { features: Some(features), ..self }
    }

    fn weight(&mut self, name: &str, part: &str) -> Tensor {
        self.parameter(format!("{name}.{part}"))
    }

    fn parameter(&mut self, full: String) -> Tensor {
        let weight = self.weights.get(&full);
        let weight = weight.unwrap_or_else(|| panic!("the network asks for {full}, which loading did not check"));
        let weight = weight.to_kind(self.kind);
        if let Some(asked) = &mut self.asked {
            asked.insert(full);
        }
        weight
    }
}

/// What running a block again takes.
struct Again<B> {
    block: B,
    kind: Kind,
    /// The block's inputs, then its weights; without gradients.
    values: Vec<Tensor>,
    /// Which of them learn.
    learns: Vec<bool>,
    /// Of the weights.
    names: Vec<String>,
}

impl<B: Block> Again<B> {
    /// From the gradient of the block's output to those of its inputs and weights.
    fn backward(&self, upstream: &Tensor) -> Result<Gradients> {
        tch::with_grad(|| {
            let leaves: Vec<Tensor> =
                self.values.iter().zip(&self.learns).map(|(x, learns)| x.detach().set_requires_grad(*learns)).collect();
            let (inputs, weights) = leaves.split_at(leaves.len() - self.names.len());
            let shared = weights.iter().map(Tensor::shallow_clone);
            let weights: Weights = self.names.iter().cloned().zip(shared).collect();
            let value = self.block.run(&mut Tensors::new(&weights).computing_in(self.kind), inputs);
            let wanted: Vec<&Tensor> = leaves.iter().filter(|leaf| leaf.requires_grad()).collect();
            let mut found = gradient::of(&value, upstream, &wanted)?.into_iter();
            Ok(leaves.iter().map(|leaf| if leaf.requires_grad() { found.next().flatten() } else { None }).collect())
        })
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
    fn feature(&mut self, x: &Tensor) {
        if let Some(features) = self.features {
            features.borrow_mut().push(x.shallow_clone());
        }
    }
    fn block(&mut self, block: impl Block, inputs: &[&Tensor]) -> Tensor {
        if !self.recomputes {
            // Through an alias, what the block's operations add to the gradient of an input is summed before it joins
            // what others add: the same sum, to the last bit, as when the block is run again.
            let inputs: Vec<Tensor> = inputs.iter().map(|x| x.alias()).collect();
            return block.run(self, &inputs);
        }
        let mut once = Tensors { recomputes: false, asked: Some(BTreeSet::new()), ..self.clone() };
        let shared: Vec<Tensor> = inputs.iter().map(|x| x.shallow_clone()).collect();
        let value = tch::no_grad(|| block.run(&mut once, &shared));
        let names: Vec<String> = once.asked.into_iter().flatten().collect();
        let values: Vec<&Tensor> = inputs.iter().copied().chain(names.iter().map(|name| &self.weights[name])).collect();
        let again = Again {
            block,
            kind: self.kind,
            values: values.iter().map(|x| x.detach()).collect(),
            learns: values.iter().map(|x| x.requires_grad()).collect(),
            names,
        };
        gradient::custom(&value, &values, move |upstream| again.backward(upstream))
            .unwrap_or_else(|error| panic!("{error:#}"))
    }
    fn conv2d(&mut self, x: &Tensor, name: &str, conv: Conv) -> Tensor {
        let weight = self.weight(name, "weight");
        let bias = conv.bias.then(|| self.weight(name, "bias"));
        self.shown(name, x.conv2d(&weight, bias, [conv.stride; 2], [conv.padding; 2], [1, 1], 1))
    }
    fn linear(&mut self, x: &Tensor, name: &str, linear: Linear) -> Tensor {
        let weight = self.weight(name, "weight");
        let bias = linear.bias.then(|| self.weight(name, "bias"));
        self.shown(name, x.linear(&weight, bias))
    }
    fn group_norm(&mut self, x: &Tensor, name: &str, groups: i64, eps: f64) -> Tensor {
        let (weight, bias) = (self.weight(name, "weight"), self.weight(name, "bias"));
        self.shown(name, x.group_norm(groups, Some(weight), Some(bias), eps, true))
    }
    fn layer_norm(&mut self, x: &Tensor, name: &str, eps: f64) -> Tensor {
        let weight = self.weight(name, "weight");
        let bias = self.weight(name, "bias");
        self.shown(name, x.layer_norm(weight.size(), Some(&weight), Some(&bias), eps, true))
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
    fn concat_channels(&mut self, parts: &[Tensor]) -> Tensor {
        Tensor::cat(parts, 1)
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
        let angles = t.to_kind(Kind::Float).unsqueeze(-1) * exponent.exp();
        let (sin, cos) = (angles.sin(), angles.cos());
        let parts = if flip_sin_to_cos { [cos, sin] } else { [sin, cos] };
        let embedding = Tensor::cat(&parts, -1);
        let embedding = if dim % 2 == 1 { embedding.constant_pad_nd([0, 1]) } else { embedding };
        embedding.flatten(1, -1).to_kind(self.kind)
    }
    fn embedding(&mut self, ids: &Tensor, name: &str, _rows: i64, _width: i64) -> Tensor {
        Tensor::embedding(&self.weight(name, "weight"), ids, -1, false, false)
    }
    fn add_positions(&mut self, x: &Tensor, name: &str, _rows: i64) -> Tensor {
        x + self.weight(name, "weight").narrow(0, 0, x.size()[1])
    }
    fn pool_at_end_of_text(&mut self, x: &Tensor, ids: &Tensor, eos: i64) -> Tensor {
        let position = if eos == 2 { ids.argmax(-1, false) } else { ids.eq(eos).to_kind(Kind::Int).argmax(-1, false) };
        let index = position.view([-1, 1, 1]).expand([-1, 1, x.size()[2]], false);
        x.gather(1, &index, false).squeeze_dim(1)
    }
    fn prepend(&mut self, x: &Tensor, name: &str) -> Tensor {
        let first = self.parameter(name.to_owned()).expand([x.size()[0], 1, -1], false);
        Tensor::cat(&[&first, x], 1)
    }
    fn first_token(&mut self, x: &Tensor) -> Tensor {
        x.select(1, 0)
    }
    fn cosines(&mut self, x: &Tensor, name: &str, _rows: i64) -> Tensor {
        let unit = |x: &Tensor| x / x.norm_scalaropt_dim(2, [-1], true).clamp_min(1e-12);
        unit(x).linear(&unit(&self.parameter(name.to_owned())), None::<Tensor>)
    }
    fn subtract(&mut self, x: &Tensor, name: &str) -> Tensor {
        x - self.parameter(name.to_owned())
    }
    fn any_positive(&mut self, x: &Tensor, worth: f64) -> Tensor {
        x.gt(0.0).any_dim(1, true).to_kind(x.kind()) * worth
    }
    fn vector_to_image(&mut self, x: &Tensor) -> Tensor {
        x.unsqueeze(-1).unsqueeze(-1)
    }
    fn blank_where(&mut self, images: &Tensor, flags: &Tensor) -> Tensor {
        images * (1.0 - flags)
    }
}
