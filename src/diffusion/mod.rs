//! Noise schedules, samplers, and text to image.
//!
//! Everything is configured by a model's `scheduler_config.json` ([`Settings`]). A [`NoiseSchedule`] says how noise
//! is mixed into clean latents during training and what the network then has to predict; a [`Sampler`] walks from
//! pure noise to latents.

pub mod condition;
mod ddim;
mod dpm_solver;
mod euler;
pub mod pipeline;
mod pndm;
mod sampler;
mod schedule;
mod settings;
mod spacing;
pub mod text_to_image;

pub use condition::{Conditioning, TextEncoder};
pub use pipeline::{Noise, Output, Pipeline, Request};
pub use sampler::{Model, Sampler, SamplerKind, sample};
pub use schedule::{MOST_TIMESTEPS, NoiseSchedule, Prediction};
pub use settings::{Settings, parse_config};
pub use text_to_image::TextToImage;
