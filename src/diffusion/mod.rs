//! Noise schedules, samplers, and text to image.
//!
//! Everything is configured by a model's `scheduler_config.json` ([`Settings`]). A [`NoiseSchedule`] says how noise
//! is mixed into clean latents during training and what the network then has to predict; a [`Sampler`] walks from
//! pure noise to latents.

mod schedule;
mod settings;

pub use schedule::{NoiseSchedule, Prediction};
pub use settings::{Settings, parse_config};
