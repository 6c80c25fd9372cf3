//! The interpreter that tells how long a network takes on a device without the network's weights or values: it walks
//! shapes, and runs each operation once for all its repetitions, on random numbers.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use anyhow::Result;
use tch::{Device, Kind, Tensor};

use super::{Activation, Block, Conv, Declare, Linear, Mask, Ops, Tensors, Weights};

/// How long something takes.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Seconds {
    /// Forward, without gradients.
    pub forward: f64,
    /// Forward and backward, for inputs and weights.
    pub learning: f64,
}

impl std::ops::AddAssign for Seconds {
    fn add_assign(&mut self, other: Self) {
        self.forward += other.forward;
        self.learning += other.learning;
    }
}

impl std::ops::Mul<f64> for Seconds {
    type Output = Self;

    fn mul(self, times: f64) -> Self {
        Self { forward: self.forward * times, learning: self.learning * times }
    }
}

/// Adds up how long operations take. Values are shapes.
pub struct Stopwatch {
    kind: Kind,
    device: Device,
    /// Whether backward passes are timed too.
    learns: bool,
    /// What has been added up.
    pub total: Seconds,
    /// The time of each operation that was run, by name and shapes.
    known: HashMap<String, Seconds>,
    /// Time and work of all operations of one kind that were run. What comes after the deadline is judged by these.
    rates: HashMap<&'static str, (Seconds, f64)>,
    deadline: Instant,
}

impl Stopwatch {
    /// Operations of type `kind` on `device`. Operations are run for about as long as `budget`; those that come later are
    /// judged by their floating-point operations and the speed of those that were run.
    pub fn new(kind: Kind, device: Device, learns: bool, budget: Duration) -> Self {
        let deadline = Instant::now() + budget;
        Self { kind, device, learns, total: Seconds::default(), known: HashMap::new(), rates: HashMap::new(), deadline }
    }

    /// What `network` takes: the total of its operations.
    pub fn of(&mut self, network: impl FnOnce(&mut Self)) -> Seconds {
        self.total = Seconds::default();
        network(self);
        self.total
    }

    fn call(&mut self, call: Call, inputs: &[&Vec<i64>]) -> Vec<i64> {
        let shapes: Vec<Vec<i64>> = inputs.iter().map(|shape| shape.to_vec()).collect();
        let mut declared = Declare::default();
        let output = call.run(&mut declared, &shapes);
        let key = format!("{call:?} {shapes:?}");
        let seconds = match self.known.get(&key) {
            Some(seconds) => *seconds,
            None => {
                let (family, work) = call.work(&shapes, &output);
                let rate = self.rates.get(family).copied();
                match rate.filter(|_| Instant::now() > self.deadline) {
                    Some((seconds, done)) => seconds * (work / done.max(1.0)),
                    None => {
                        // An operation that can't be run here (out of memory, say) counts as nothing.
                        let seconds = self.run(&call, &shapes, &declared).unwrap_or_default();
                        let rate = self.rates.entry(family).or_default();
                        rate.0 += seconds;
                        rate.1 += work;
                        self.known.insert(key, seconds);
                        seconds
                    }
                }
            }
        };
        self.total += seconds;
        output
    }

    fn run(&self, call: &Call, shapes: &[Vec<i64>], declared: &Declare) -> Result<Seconds> {
        let random = |shape: &[i64]| Tensor::f_rand(shape, (self.kind, self.device));
        let mut weights = Weights::new();
        for parameter in &declared.parameters {
            let weight = random(&parameter.shape)?;
            weights.insert(parameter.name.clone(), weight.set_requires_grad(self.learns));
        }
        let mut inputs = Vec::with_capacity(shapes.len());
        for (index, shape) in shapes.iter().enumerate() {
            inputs.push(if call.takes_ids(index) {
                Tensor::f_zeros(shape, (Kind::Int64, self.device))?
            } else {
                random(shape)?.set_requires_grad(self.learns)
            });
        }
        let mut ops = Tensors::new(&weights).computing_in(self.kind);
        let forward = || {
            let _guard = tch::no_grad_guard();
            let start = Instant::now();
            wait_for(&call.run(&mut ops, &inputs))?;
            Ok(start.elapsed().as_secs_f64())
        };
        let mut seconds = Seconds { forward: least(forward)?, learning: 0.0 };
        if self.learns {
            let mut ops = Tensors::new(&weights).computing_in(self.kind);
            seconds.learning = least(|| {
                let start = Instant::now();
                let output = call.run(&mut ops, &inputs);
                output.f_sum(Kind::Float)?.f_backward()?;
                wait_for(&output)?;
                Ok(start.elapsed().as_secs_f64())
            })?;
        }
        Ok(seconds)
    }
}

/// The least of some runs: the first pays for memory and for choosing a kernel, and others may meet a busy machine. What takes
/// long runs once.
fn least(mut run: impl FnMut() -> Result<f64>) -> Result<f64> {
    let (mut least, mut spent) = (f64::INFINITY, 0.0);
    for _ in 0..5 {
        let seconds = run()?;
        least = least.min(seconds);
        spent += seconds;
        if spent > 0.1 {
            break;
        }
    }
    Ok(least)
}

/// Reading one value waits for the device to finish.
fn wait_for(tensor: &Tensor) -> Result<()> {
    let _: f64 = tensor.f_flatten(0, -1)?.f_get(0)?.f_double_value(&[])?;
    Ok(())
}

/// An operation, without the name of its parameters: layers of the same shapes are one.
#[derive(Clone, Debug)]
enum Call {
    Conv2d(Conv),
    Linear(Linear),
    GroupNorm(i64, f64),
    LayerNorm(f64),
    Attention(i64, Mask),
    Activation(Activation),
    Geglu,
    Add,
    AddToPixels,
    ConcatChannels,
    Upsample(i64, i64),
    PadBottomRight,
    ImageToTokens,
    TokensToImage(i64, i64),
    TimestepEmbedding(i64, bool, f64),
    Embedding(i64, i64),
    AddPositions(i64),
    PoolAtEndOfText(i64),
    Prepend,
    FirstToken,
    Cosines(i64),
    Subtract,
    AnyPositive(f64),
    VectorToImage,
    BlankWhere,
}

/// What the parameters of a call are called.
const NAME: &str = "layer";

impl Call {
    /// Whether input `index` is of whole numbers.
    fn takes_ids(&self, index: usize) -> bool {
        matches!((self, index), (Self::Embedding(..), 0) | (Self::PoolAtEndOfText(_), 1))
    }

    /// The kind of work, and how much: floating-point operations, or elements where these are few.
    fn work(&self, inputs: &[Vec<i64>], output: &[i64]) -> (&'static str, f64) {
        let elements = |shape: &[i64]| shape.iter().product::<i64>() as f64;
        let written = elements(output);
        match self {
            Self::Conv2d(conv) => ("conv2d", 2.0 * written * (conv.in_channels * conv.kernel * conv.kernel) as f64),
            Self::Linear(linear) => ("linear", 2.0 * written * linear.in_features as f64),
            Self::Attention(..) => ("attention", 4.0 * written * inputs[1][1] as f64),
            _ => ("elements", written),
        }
    }
}

impl Block for Call {
    fn run<O: Ops>(&self, ops: &mut O, x: &[O::Value]) -> O::Value {
        match *self {
            Self::Conv2d(conv) => ops.conv2d(&x[0], NAME, conv),
            Self::Linear(linear) => ops.linear(&x[0], NAME, linear),
            Self::GroupNorm(groups, eps) => ops.group_norm(&x[0], NAME, groups, eps),
            Self::LayerNorm(eps) => ops.layer_norm(&x[0], NAME, eps),
            Self::Attention(heads, mask) => ops.attention(&x[0], &x[1], &x[2], heads, mask),
            Self::Activation(function) => ops.activation(&x[0], function),
            Self::Geglu => ops.geglu(&x[0]),
            Self::Add => ops.add(&x[0], &x[1]),
            Self::AddToPixels => ops.add_to_pixels(&x[0], &x[1]),
            Self::ConcatChannels => ops.concat_channels(x),
            Self::Upsample(height, width) => ops.upsample(&x[0], height, width),
            Self::PadBottomRight => ops.pad_bottom_right(&x[0]),
            Self::ImageToTokens => ops.image_to_tokens(&x[0]),
            Self::TokensToImage(height, width) => ops.tokens_to_image(&x[0], height, width),
            Self::TimestepEmbedding(dim, flip, shift) => ops.timestep_embedding(&x[0], dim, flip, shift),
            Self::Embedding(rows, width) => ops.embedding(&x[0], NAME, rows, width),
            Self::AddPositions(rows) => ops.add_positions(&x[0], NAME, rows),
            Self::PoolAtEndOfText(eos) => ops.pool_at_end_of_text(&x[0], &x[1], eos),
            Self::Prepend => ops.prepend(&x[0], NAME),
            Self::FirstToken => ops.first_token(&x[0]),
            Self::Cosines(rows) => ops.cosines(&x[0], NAME, rows),
            Self::Subtract => ops.subtract(&x[0], NAME),
            Self::AnyPositive(worth) => ops.any_positive(&x[0], worth),
            Self::VectorToImage => ops.vector_to_image(&x[0]),
            Self::BlankWhere => ops.blank_where(&x[0], &x[1]),
        }
    }
}

type Shape = Vec<i64>;

impl Ops for Stopwatch {
    type Value = Shape;

    fn share(&self, x: &Shape) -> Shape {
        x.clone()
    }
    fn shape(&self, x: &Shape) -> Shape {
        x.clone()
    }
    fn conv2d(&mut self, x: &Shape, _name: &str, conv: Conv) -> Shape {
        self.call(Call::Conv2d(conv), &[x])
    }
    fn linear(&mut self, x: &Shape, _name: &str, linear: Linear) -> Shape {
        self.call(Call::Linear(linear), &[x])
    }
    fn group_norm(&mut self, x: &Shape, _name: &str, groups: i64, eps: f64) -> Shape {
        self.call(Call::GroupNorm(groups, eps), &[x])
    }
    fn layer_norm(&mut self, x: &Shape, _name: &str, eps: f64) -> Shape {
        self.call(Call::LayerNorm(eps), &[x])
    }
    fn attention(&mut self, q: &Shape, k: &Shape, v: &Shape, heads: i64, mask: Mask) -> Shape {
        self.call(Call::Attention(heads, mask), &[q, k, v])
    }
    fn activation(&mut self, x: &Shape, function: Activation) -> Shape {
        self.call(Call::Activation(function), &[x])
    }
    fn geglu(&mut self, x: &Shape) -> Shape {
        self.call(Call::Geglu, &[x])
    }
    fn add(&mut self, a: &Shape, b: &Shape) -> Shape {
        self.call(Call::Add, &[a, b])
    }
    fn add_to_pixels(&mut self, image: &Shape, vector: &Shape) -> Shape {
        self.call(Call::AddToPixels, &[image, vector])
    }
    fn concat_channels(&mut self, parts: &[Shape]) -> Shape {
        self.call(Call::ConcatChannels, &parts.iter().collect::<Vec<_>>())
    }
    fn upsample(&mut self, x: &Shape, height: i64, width: i64) -> Shape {
        self.call(Call::Upsample(height, width), &[x])
    }
    fn pad_bottom_right(&mut self, x: &Shape) -> Shape {
        self.call(Call::PadBottomRight, &[x])
    }
    fn image_to_tokens(&mut self, x: &Shape) -> Shape {
        self.call(Call::ImageToTokens, &[x])
    }
    fn tokens_to_image(&mut self, x: &Shape, height: i64, width: i64) -> Shape {
        self.call(Call::TokensToImage(height, width), &[x])
    }
    fn timestep_embedding(&mut self, t: &Shape, dim: i64, flip_sin_to_cos: bool, freq_shift: f64) -> Shape {
        self.call(Call::TimestepEmbedding(dim, flip_sin_to_cos, freq_shift), &[t])
    }
    fn embedding(&mut self, ids: &Shape, _name: &str, rows: i64, width: i64) -> Shape {
        self.call(Call::Embedding(rows, width), &[ids])
    }
    fn add_positions(&mut self, x: &Shape, _name: &str, rows: i64) -> Shape {
        self.call(Call::AddPositions(rows), &[x])
    }
    fn pool_at_end_of_text(&mut self, x: &Shape, ids: &Shape, eos: i64) -> Shape {
        self.call(Call::PoolAtEndOfText(eos), &[x, ids])
    }
    fn prepend(&mut self, x: &Shape, _name: &str) -> Shape {
        self.call(Call::Prepend, &[x])
    }
    fn first_token(&mut self, x: &Shape) -> Shape {
        self.call(Call::FirstToken, &[x])
    }
    fn cosines(&mut self, x: &Shape, _name: &str, rows: i64) -> Shape {
        self.call(Call::Cosines(rows), &[x])
    }
    fn subtract(&mut self, x: &Shape, _name: &str) -> Shape {
        self.call(Call::Subtract, &[x])
    }
    fn any_positive(&mut self, x: &Shape, worth: f64) -> Shape {
        self.call(Call::AnyPositive(worth), &[x])
    }
    fn vector_to_image(&mut self, x: &Shape) -> Shape {
        self.call(Call::VectorToImage, &[x])
    }
    fn blank_where(&mut self, images: &Shape, flags: &Shape) -> Shape {
        self.call(Call::BlankWhere, &[images, flags])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two equal layers and one that is wider.
    fn network(ops: &mut Stopwatch) {
        let mut x = vec![1, 8, 16, 16];
        for (name, conv) in [("a", Conv::same(8, 8, 3)), ("b", Conv::same(8, 8, 3)), ("c", Conv::same(8, 32, 3))] {
            x = ops.conv2d(&x, name, conv);
        }
        let x = ops.image_to_tokens(&x);
        let x = ops.attention(&x, &x, &x, 4, Mask::None);
        assert_eq!(ops.shape(&x), [1, 256, 32]);
    }

    #[test]
    fn each_operation_is_run_once_and_counted_as_often_as_it_stands_there() {
        let mut ops = Stopwatch::new(Kind::Float, Device::Cpu, true, Duration::from_secs(60));
        let total = ops.of(network);
        assert_eq!(ops.known.len(), 4, "two convolutions, tokens, attention");
        assert!(ops.known.values().all(|seconds| seconds.forward > 0.0 && seconds.learning > 0.0), "{:?}", ops.known);
        let twice = ops.known.iter().find(|(key, _)| key.contains("out_channels: 8,")).unwrap().1.forward;
        let sum: f64 = ops.known.values().map(|seconds| seconds.forward).sum();
        assert!((total.forward - sum - twice).abs() < 1e-9);
        assert_eq!(ops.of(network), total, "nothing is run again");
    }

    #[test]
    fn after_the_budget_operations_are_judged_by_their_work() {
        let mut ops = Stopwatch::new(Kind::Float, Device::Cpu, false, Duration::ZERO);
        ops.of(network);
        // The first of each family was run.
        assert_eq!(ops.known.len(), 3);
        let (one, four) = (Conv::same(8, 8, 3), Conv::same(8, 32, 3));
        let mut of = |conv| ops.of(|ops| drop(ops.conv2d(&vec![1, 8, 16, 16], "x", conv))).forward;
        let ratio = of(four) / of(one);
        assert!((ratio - 4.0).abs() < 1e-9, "{ratio}");
    }
}
