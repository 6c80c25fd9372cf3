//! The vocabulary: the operations that networks are written in.
//!
//! A network is a function over [`Ops`]. Four interpreters read it: [`Tensors`] runs it with libtorch (training,
//! sampling, evaluation), [`Declare`] lists its parameters (loading, checking, initialising), [`Stopwatch`] tells how long
//! it takes, and `coreml::writing::lowering::interpreter` appends it to a Core ML program. Parameters are asked for by their diffusers name, without
//! `.weight` / `.bias`; what is exported is therefore what was trained, under the same names.
//!
//! Shapes: images are `[B, C, H, W]`, tokens `[B, T, C]`, vectors `[B, C]`. How an interpreter lays tokens out in
//! memory is its own affair: networks only go between the two through [`Ops::image_to_tokens`] and back.

mod declare;
mod stopwatch;
mod tensors;

pub use declare::{Declare, Initial, Parameter, declared};
pub use stopwatch::{Seconds, Stopwatch};
pub use tensors::{Tensors, Watch, Weights};

/// Shape of a 2-d convolution; square kernel, same stride and zero padding on both axes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Conv {
    pub in_channels: i64,
    pub out_channels: i64,
    pub kernel: i64,
    pub stride: i64,
    pub padding: i64,
    pub bias: bool,
}

impl Conv {
    /// Kernel `kernel`, stride 1, padded to keep the size, with a bias.
    pub fn same(in_channels: i64, out_channels: i64, kernel: i64) -> Self {
        Self { in_channels, out_channels, kernel, stride: 1, padding: kernel / 2, bias: true }
    }
}

/// Shape of a linear layer, `[out_features, in_features]` in files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Linear {
    pub in_features: i64,
    pub out_features: i64,
    pub bias: bool,
}

/// Pointwise functions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x · sigmoid(x)`
    Silu,
    /// The exact GELU, `x · Φ(x)`
    Gelu,
    /// `x · sigmoid(1.702 x)`, CLIP's
    QuickGelu,
}

/// What an attention may look at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mask {
    /// Everything.
    None,
    /// The token itself and those before it.
    Causal,
}

/// A part of a network with many values inside and few at its borders.
pub trait Block: Send + 'static {
    /// `inputs` → the block's one output: the same operations every time.
    fn run<O: Ops>(&self, ops: &mut O, inputs: &[O::Value]) -> O::Value;
}

/// The vocabulary.
pub trait Ops {
    /// What flows: a tensor, a name in a program, a shape.
    type Value;

    /// Another handle to the same value.
    fn share(&self, x: &Self::Value) -> Self::Value;

    /// The shape of a value in the network's own terms (`[B, C, H, W]`, `[B, T, C]` or `[B, C]`).
    fn shape(&self, x: &Self::Value) -> Vec<i64>;

    /// Runs `block`. An interpreter that keeps values for a backward pass may forget those inside the block, and run it
    /// once more when the pass gets there (gradient checkpointing; Chen et al. 2016, arXiv:1604.06174).
    fn block(&mut self, block: impl Block, inputs: &[&Self::Value]) -> Self::Value
    where
        Self: Sized,
    {
        let inputs: Vec<_> = inputs.iter().map(|x| self.share(x)).collect();
        block.run(self, &inputs)
    }

    /// Shows what a stage of the network gives to the next. Most interpreters do not look.
    fn feature(&mut self, _x: &Self::Value) {}

    /// `[B, in, H, W] → [B, out, H', W']`
    fn conv2d(&mut self, x: &Self::Value, name: &str, conv: Conv) -> Self::Value;
    /// `[…, in] → […, out]` on tokens or vectors.
    fn linear(&mut self, x: &Self::Value, name: &str, linear: Linear) -> Self::Value;
    /// Over channels of an image, in `groups`, with scale and shift.
    fn group_norm(&mut self, x: &Self::Value, name: &str, groups: i64, eps: f64) -> Self::Value;
    /// Over the last axis of tokens or vectors, with scale and shift.
    fn layer_norm(&mut self, x: &Self::Value, name: &str, eps: f64) -> Self::Value;
    /// Multi-head attention of `q` `[B, T, C]` on `k`, `v` `[B, S, C]`: softmax(q kᵀ / √(C/heads)) v → `[B, T, C]`.
    fn attention(&mut self, q: &Self::Value, k: &Self::Value, v: &Self::Value, heads: i64, mask: Mask) -> Self::Value;
    /// Pointwise.
    fn activation(&mut self, x: &Self::Value, function: Activation) -> Self::Value;
    /// `[B, T, 2C] → [B, T, C]`: the first half times the exact GELU of the second.
    fn geglu(&mut self, x: &Self::Value) -> Self::Value;
    /// Sum of two values of one shape, or of `a` and a number `[1]` or numbers `[B, 1]` for all of a vector.
    fn add(&mut self, a: &Self::Value, b: &Self::Value) -> Self::Value;
    /// An image `[B, C, H, W]` plus a vector `[B, C]`, the same at every pixel.
    fn add_to_pixels(&mut self, image: &Self::Value, vector: &Self::Value) -> Self::Value;
    /// Images, or vectors, along their channels.
    fn concat_channels(&mut self, parts: &[Self::Value]) -> Self::Value;
    /// Nearest-neighbour resize of an image to `height × width`.
    fn upsample(&mut self, x: &Self::Value, height: i64, width: i64) -> Self::Value;
    /// One row of zeros below, one column of zeros at the right.
    fn pad_bottom_right(&mut self, x: &Self::Value) -> Self::Value;
    /// `[B, C, H, W] → [B, H·W, C]`.
    fn image_to_tokens(&mut self, x: &Self::Value) -> Self::Value;
    /// `[B, H·W, C] → [B, C, H, W]`.
    fn tokens_to_image(&mut self, x: &Self::Value, height: i64, width: i64) -> Self::Value;
    /// `[B] → [B, dim]`, `[B, n] → [B, n·dim]`: the sinusoids of a timestep, or of n numbers one after the other,
    /// computed in fp32 whatever the network's type (Ho et al. 2020, appendix B; Vaswani et al. 2017, 3.5). Cosines first
    /// when `flip_sin_to_cos`.
    fn timestep_embedding(&mut self, t: &Self::Value, dim: i64, flip_sin_to_cos: bool, freq_shift: f64) -> Self::Value;
    /// Rows of a table: ids `[B, T] → [B, T, width]`; the parameter is `name.weight` `[rows, width]`.
    fn embedding(&mut self, ids: &Self::Value, name: &str, rows: i64, width: i64) -> Self::Value;
    /// Adds rows `0..T` of the table `name.weight` `[rows, C]` to tokens `[B, T, C]`.
    fn add_positions(&mut self, x: &Self::Value, name: &str, rows: i64) -> Self::Value;
    /// CLIP's pooling: for each row of ids `[B, T]`, the token of `x` `[B, T, C]` at the end-of-text → `[B, C]`.
    /// With `eos` 2 (old configs) that is the position of the largest id, else the first position of `eos`.
    fn pool_at_end_of_text(&mut self, x: &Self::Value, ids: &Self::Value, eos: i64) -> Self::Value;
    /// Tokens `[B, T, C]` with the parameter `name` `[C]` in front of them → `[B, 1 + T, C]`.
    fn prepend(&mut self, x: &Self::Value, name: &str) -> Self::Value;
    /// `[B, T, C] → [B, C]`: the first token.
    fn first_token(&mut self, x: &Self::Value) -> Self::Value;
    /// Cosines of the angles between vectors `[B, C]` and the rows of the parameter `name` `[rows, C]` → `[B, rows]`.
    fn cosines(&mut self, x: &Self::Value, name: &str, rows: i64) -> Self::Value;
    /// Vectors `[B, C]` less the parameter `name` `[C]`.
    fn subtract(&mut self, x: &Self::Value, name: &str) -> Self::Value;
    /// `[B, C] → [B, 1]`: `worth` where an element is positive, else 0.
    fn any_positive(&mut self, x: &Self::Value, worth: f64) -> Self::Value;
    /// `[B, C] → [B, C, 1, 1]`
    fn vector_to_image(&mut self, x: &Self::Value) -> Self::Value;
    /// Images `[B, …]`, zero where `flags` `[B, 1, 1, 1]` are 1.
    fn blank_where(&mut self, images: &Self::Value, flags: &Self::Value) -> Self::Value;
}
