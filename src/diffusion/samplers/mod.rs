//! Samplers. A new one takes a file beside these, a line in the table of `kinds`, and a line in `sampler`.
//!
//! | file | what |
//! |---|---|
//! | `walk` | what a sampler is: timesteps, and a walk along them |
//! | `kinds` | the samplers by name, ours and others' |
//! | `sampler` | from a name and a model's file to a walk |
//! | `ddim`, `ddpm`, `pndm`, `lcm` | samplers over the training timesteps |
//! | `k_diffusion` | noise levels as k-diffusion has them, for `euler`, `euler_ancestral`, `heun`, `lms`, `dpm_two`, `dpm_sde` |
//! | `dpm_schedule`, `dpm_kernel` | noise levels and steps of the DPM-Solvers, for `dpm_solver`, `dpm_singlestep`, `unipc` |

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
mod pndm;
mod sampler;
mod unipc;
mod walk;

pub use kinds::{SamplerChoice, SamplerKind};
pub use sampler::{Own, Sampler};
pub use walk::{Draws, Model};
