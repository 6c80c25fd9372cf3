//! All palettes of numbers of a network at once, on a CUDA device: a few launches of kernels for all layers, however many.
//!
//! | file | what a reader finds there |
//! |---|---|
//! | [`Batch`] | one step of all layers: soft weights, then the way back and AdamW's step |
//! | [`Member`] | one layer of a batch |
//! | `layout` | how weights lie before the kernels: segments, tiles, bins, tables |
//! | `kernels` | the kernels, of `kernels.cu`, and what they are given |
//! | [`tested`] | whether the kernels do on this card what the CPU does |
//!
//! The passes of [`scalar`](super::scalar) are the same on the CPU. Vectors, scales of channels, groups of input channels and
//! layers with few weights for each entry are not for batches: they go through libtorch's operators.

mod engine;
mod kernels;
mod layout;
mod member;
mod self_test;

pub use engine::Batch;
pub use kernels::source;
pub use member::{Found, Member};
pub use self_test::tested;
