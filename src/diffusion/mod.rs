//! Noise schedules and samplers, configured by a model's `scheduler_config.json`.
//!
//! | file | what |
//! |---|---|
//! | `settings` | typed reading of `scheduler_config.json` |
//! | `schedule` | how noise is mixed into latents, and what the network then has to predict: ε or v, and each from the other |
//! | `spacing` | where the steps of a sampler lie |
//! | `noise` | where the noise of pictures comes from |
//! | `samplers` | the walks from noise to latents, one file for each sampler |

mod noise;
mod samplers;
mod schedule;
mod settings;
mod spacing;

pub use noise::Noise;
pub use samplers::{Draws, Model, Own, Sampler, SamplerChoice, SamplerKind};
pub use schedule::{MOST_TIMESTEPS, NoiseSchedule, Prediction};
pub use settings::{Settings, config_text, parse_config};
