//! The interpreter that computes shapes only and notes every parameter a network asks for.

use super::{Activation, Conv, Linear, Mask, Ops};

/// How a parameter starts when a model is trained from scratch (PyTorch's own defaults).
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Initial {
    /// Uniform in ±1/√fan_in (what PyTorch's conv and linear layers use for weights and biases).
    Uniform { fan_in: i64 },
    /// Normal with this standard deviation (embeddings).
    Normal(f64),
    /// One number everywhere: 1 for scales of norms, 0 for their shifts.
    Constant(f64),
}

/// One parameter of a network.
#[derive(Clone, Debug, PartialEq)]
pub struct Parameter {
    /// Its diffusers name, with `.weight` or `.bias`.
    pub name: String,
    pub shape: Vec<i64>,
    pub initial: Initial,
    /// A conv's or linear layer's weight: what palettes may replace.
    pub palettizable: bool,
}

/// Lists parameters in the order in which the network first uses them. Values are shapes.
#[derive(Default)]
pub struct Declare {
    pub parameters: Vec<Parameter>,
}

/// The parameters that `network` asks for.
pub fn declared(network: impl FnOnce(&mut Declare)) -> Vec<Parameter> {
    let mut ops = Declare::default();
    network(&mut ops);
    ops.parameters
}

impl Declare {
    fn note(&mut self, name: String, shape: Vec<i64>, initial: Initial, palettizable: bool) {
        if !self.parameters.iter().any(|p| p.name == name) {
            self.parameters.push(Parameter { name, shape, initial, palettizable });
        }
    }

    fn weight_and_bias(&mut self, name: &str, shape: Vec<i64>, bias: bool) {
        let fan_in = shape[1..].iter().product();
        let out = shape[0];
        self.note(format!("{name}.weight"), shape, Initial::Uniform { fan_in }, true);
        if bias {
            self.note(format!("{name}.bias"), vec![out], Initial::Uniform { fan_in }, false);
        }
    }

    fn norm(&mut self, name: &str, channels: i64) {
        self.note(format!("{name}.weight"), vec![channels], Initial::Constant(1.0), false);
        self.note(format!("{name}.bias"), vec![channels], Initial::Constant(0.0), false);
    }
}

impl Ops for Declare {
    type Value = Vec<i64>;

    fn share(&self, x: &Vec<i64>) -> Vec<i64> {
        x.clone()
    }
    fn shape(&self, x: &Vec<i64>) -> Vec<i64> {
        x.clone()
    }
    fn conv2d(&mut self, x: &Vec<i64>, name: &str, conv: Conv) -> Vec<i64> {
        let Conv { in_channels, out_channels, kernel, stride, padding, bias } = conv;
        self.weight_and_bias(name, vec![out_channels, in_channels, kernel, kernel], bias);
        let size = |n: i64| (n + 2 * padding - kernel) / stride + 1;
        vec![x[0], out_channels, size(x[2]), size(x[3])]
    }
    fn linear(&mut self, x: &Vec<i64>, name: &str, linear: Linear) -> Vec<i64> {
        self.weight_and_bias(name, vec![linear.out_features, linear.in_features], linear.bias);
        let mut shape = x.clone();
        *shape.last_mut().expect("tokens or vectors have axes") = linear.out_features;
        shape
    }
    fn group_norm(&mut self, x: &Vec<i64>, name: &str, _groups: i64, _eps: f64) -> Vec<i64> {
        self.norm(name, x[1]);
        x.clone()
    }
    fn layer_norm(&mut self, x: &Vec<i64>, name: &str, _eps: f64) -> Vec<i64> {
        self.norm(name, x[x.len() - 1]);
        x.clone()
    }
    fn attention(&mut self, q: &Vec<i64>, _k: &Vec<i64>, _v: &Vec<i64>, _heads: i64, _mask: Mask) -> Vec<i64> {
        q.clone()
    }
    fn activation(&mut self, x: &Vec<i64>, _function: Activation) -> Vec<i64> {
        x.clone()
    }
    fn geglu(&mut self, x: &Vec<i64>) -> Vec<i64> {
        vec![x[0], x[1], x[2] / 2]
    }
    fn add(&mut self, a: &Vec<i64>, _b: &Vec<i64>) -> Vec<i64> {
        a.clone()
    }
    fn add_to_pixels(&mut self, image: &Vec<i64>, _vector: &Vec<i64>) -> Vec<i64> {
        image.clone()
    }
    fn concat_channels(&mut self, parts: &[Vec<i64>]) -> Vec<i64> {
        let mut shape = parts[0].clone();
        shape[1] = parts.iter().map(|part| part[1]).sum();
        shape
    }
    fn upsample(&mut self, x: &Vec<i64>, height: i64, width: i64) -> Vec<i64> {
        vec![x[0], x[1], height, width]
    }
    fn pad_bottom_right(&mut self, x: &Vec<i64>) -> Vec<i64> {
        vec![x[0], x[1], x[2] + 1, x[3] + 1]
    }
    fn image_to_tokens(&mut self, x: &Vec<i64>) -> Vec<i64> {
        vec![x[0], x[2] * x[3], x[1]]
    }
    fn tokens_to_image(&mut self, x: &Vec<i64>, height: i64, width: i64) -> Vec<i64> {
        vec![x[0], x[2], height, width]
    }
    fn timestep_embedding(&mut self, t: &Vec<i64>, dim: i64, _flip: bool, _freq_shift: f64) -> Vec<i64> {
        vec![t[0], t[1..].iter().product::<i64>() * dim]
    }
    fn embedding(&mut self, ids: &Vec<i64>, name: &str, rows: i64, width: i64) -> Vec<i64> {
        self.note(format!("{name}.weight"), vec![rows, width], Initial::Normal(0.02), false);
        vec![ids[0], ids[1], width]
    }
    fn add_positions(&mut self, x: &Vec<i64>, name: &str, rows: i64) -> Vec<i64> {
        self.note(format!("{name}.weight"), vec![rows, x[2]], Initial::Normal(0.01), false);
        x.clone()
    }
    fn pool_at_end_of_text(&mut self, x: &Vec<i64>, _ids: &Vec<i64>, _eos: i64) -> Vec<i64> {
        vec![x[0], x[2]]
    }
    fn prepend(&mut self, x: &Vec<i64>, name: &str) -> Vec<i64> {
        self.note(name.to_owned(), vec![x[2]], Initial::Normal(0.02), false);
        vec![x[0], x[1] + 1, x[2]]
    }
    fn first_token(&mut self, x: &Vec<i64>) -> Vec<i64> {
        vec![x[0], x[2]]
    }
    fn cosines(&mut self, x: &Vec<i64>, name: &str, rows: i64) -> Vec<i64> {
        self.note(name.to_owned(), vec![rows, x[1]], Initial::Constant(1.0), false);
        vec![x[0], rows]
    }
    fn subtract(&mut self, x: &Vec<i64>, name: &str) -> Vec<i64> {
        self.note(name.to_owned(), vec![x[1]], Initial::Constant(1.0), false);
        x.clone()
    }
    fn any_positive(&mut self, x: &Vec<i64>, _worth: f64) -> Vec<i64> {
        vec![x[0], 1]
    }
    fn vector_to_image(&mut self, x: &Vec<i64>) -> Vec<i64> {
        vec![x[0], x[1], 1, 1]
    }
    fn blank_where(&mut self, images: &Vec<i64>, _flags: &Vec<i64>) -> Vec<i64> {
        images.clone()
    }
}
