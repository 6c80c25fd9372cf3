//! Palettes: a weight as an index for each number into a short table of values.
//!
//! | room | what a reader finds there |
//! |---|---|
//! | [`forms`] | which forms a palette may have, and the palette itself: indices, entries, scales |
//! | [`file`](mod@file) | the palettized checkpoint on disk, packed indices, and subjects that were learnt on one |
//! | [`reference`](mod@reference) | differentiable k-means as the paper has it, with plain operators: what tests compare with |
//! | [`Level`] | which vector instructions the loops over weights use |
//! | [`scalar`] | differentiable k-means of numbers, through a histogram of 16-bit codes |
//! | `vector` | differentiable k-means of vectors of 2 or 4 weights, sorted into cells |
//! | [`post_training`] | palettes without training: exact 1-d k-means, scales, vectors; and how many bits each layer gets |
//! | [`layer`] | the palette of one layer while it is trained: soft, then with fixed assignments |
//! | [`batch`] | the palettes of numbers of all layers at once, on a CUDA device |
//!
//! Imports run down to up in this table: a layer uses all of those above it.

pub mod batch;
pub mod file;
pub mod forms;
pub mod layer;
mod level;
pub mod post_training;
pub mod reference;
pub mod scalar;
mod vector;

pub use batch::Batch;
pub use file::{PalettizedCheckpoint, PalettizedFile, checkpoint, packing, subject};
pub use forms::{BITS, CLUSTER_DIMS, Form, LutDtype, Palette};
pub use layer::{DkmLayer, Frozen, Gradient, SoftenRows};
pub use level::Level;
pub use post_training::{allocate, fit, kmeans};
pub use scalar::{AdamWStep, Code, Histogram, Soften, clustering, soften};
