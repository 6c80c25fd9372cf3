//! Palettes on disk.
//!
//! | file | what a reader finds there |
//! |---|---|
//! | [`checkpoint`] | the palettized checkpoint: a whole UNet, its weights as palettes, in one safetensors file |
//! | [`subject`] | what was learnt on a palettized base: other entries, biases and norms |
//! | [`packing`] | indices as a stream of bits |

pub mod checkpoint;
pub mod packing;
pub mod subject;

pub use checkpoint::{PalettizedCheckpoint, PalettizedFile};
