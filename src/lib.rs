//! # Palettist
//!
//! Fine-tunes a Stable Diffusion UNet while it learns, by differentiable k-means, a palette of a few values for
//! the weights of each layer, then writes it as Core ML packages. The map, imports running downward:
//!
//! | room | knows |
//! |---|---|
//! | [`cli`] | one file for each command: parse, call, print |
//! | [`train`] | the loop: objective, teacher, optimizer, state, resume |
//! | [`judge`] | final pictures: CLIP scores, right answers, intervals |
//! | [`report`] | metrics, event files, pictures |
//! | [`data`] | pictures, captions, cache, batches |
//! | [`config`] | the TOML schema |
//! | [`coreml`] | packages: the format, writing a network, reading one back and running it |
//! | [`pipeline`] | networks that work together: prompt to picture, and what a model can do |
//! | [`source`] | where models come from: diffusers folders, single files, tokenizers |
//! | [`networks`] | UNet, autoencoder, text encoder, each a function over [`ops`] |
//! | [`diffusion`] | noise schedules, samplers, losses |
//! | [`palette`] | k-means, differentiable k-means, packing, the palettized checkpoint |
//! | [`ops`] | the vocabulary of operations and its tensor interpreter |
//! | [`cuda`] | kernels of our own on CUDA devices, compiled when they are first used |
//! | [`files`] | files that are whole or not there; safetensors and JSON, read without trust |
//! | [`torch`] | the shim over libtorch |
//! | [`terminal`] | what is printed, made safe; progress |

pub mod cli;
pub mod config;
pub mod coreml;
pub mod cuda;
pub mod data;
pub mod diffusion;
pub mod files;
pub mod judge;
pub mod networks;
pub mod ops;
pub mod palette;
pub mod pipeline;
pub mod report;
pub mod source;
pub mod terminal;
pub mod torch;
pub mod train;
