//! Euler's method on the probability-flow ODE (Karras et al. 2022, algorithm 2 with no churn).

use anyhow::Result;
use tch::Tensor;

use super::k_diffusion::{KSchedule, Reads, is_log_linear};
use super::walk::{Draws, Model, Walk};
use crate::diffusion::schedule::{BetaDefaults, Prediction};
use crate::diffusion::settings::Settings;
use crate::diffusion::spacing::{Levels, last_sigma};

pub(super) struct Euler(KSchedule);

impl Euler {
    pub fn new(settings: Settings, steps: i64) -> Result<Self> {
        let reads = Reads { betas: BetaDefaults::USUAL, zero_snr: true, interpolation: true, ..Reads::USUAL };
        let mut schedule = KSchedule::new(settings, steps, &reads)?;
        let last = last_sigma(settings, &schedule.table)?;

        if is_log_linear(settings)? && Levels::read(settings, &Levels::USUAL)? == Levels::OfTimesteps {
            // One level more than timesteps, so that the walk ends at the least σ and not at `final_sigmas_type`.
            let (most, least) = (schedule.table.most(), schedule.table.least());
            schedule.sigmas = Levels::Exponential.spread(most, least, steps + 1);
        } else {
            let _zero = schedule.sigmas.pop();
            schedule.sigmas.push(last);
        }
        let continuous = settings.choice("timestep_type", false, &[("discrete", false), ("continuous", true)])?;
        if continuous && schedule.prediction == Prediction::VPrediction {
            schedule.timesteps = schedule.steps().map(|(sigma, ..)| 0.25 * sigma.ln()).collect();
        }
        Ok(Self(schedule))
    }
}

impl Walk for Euler {
    fn timesteps(&self) -> Vec<f64> {
        self.0.timesteps.clone()
    }

    fn init_noise_sigma(&self) -> f64 {
        self.0.init_noise_sigma()
    }

    fn walk(&self, mut x: Tensor, model: &mut Model, _draws: &mut Draws) -> Result<Tensor> {
        for (sigma, next, t) in self.0.steps() {
            x += self.0.slope(&x, sigma, t, model)? * (next - sigma);
        }
        Ok(x)
    }
}
