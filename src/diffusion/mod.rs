//! Noise schedules and samplers.
//!
//! Everything is configured by a model's `scheduler_config.json` ([`Settings`]). A [`NoiseSchedule`] says how noise
//! is mixed into clean latents during training and what the network then has to predict; a [`Sampler`] walks from
//! pure noise to latents.

mod ddim;
mod ddpm;
mod dpm_kernel;
mod dpm_schedule;
mod dpm_sde;
mod dpm_singlestep;
mod dpm_solver;
mod dpm_two;
mod euler;
mod euler_ancestral;
mod heun;
mod k_diffusion;
mod kinds;
mod lcm;
mod lms;
mod noise;
mod pndm;
mod sampler;
mod schedule;
mod settings;
mod spacing;
mod unipc;
mod walk;

pub use kinds::{SamplerChoice, SamplerKind};
pub use noise::Noise;
pub use sampler::{Own, Sampler};
pub use schedule::{MOST_TIMESTEPS, NoiseSchedule, Prediction};
pub use settings::{Settings, config_text, parse_config};
pub use walk::{Draws, Model};
