//! The networks, each a function over the vocabulary of [`crate::ops`], and the `config.json` of each.

pub mod autoencoder;
mod clip;
pub mod clip_model;
mod json;
mod resnet;
pub mod safety_checker;
pub mod text_encoder;
mod transformer;
pub mod unet;
pub mod vision;
