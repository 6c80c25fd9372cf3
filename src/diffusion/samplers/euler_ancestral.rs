//! Euler's method with fresh noise at each step: a step too far down, and noise up to the next level (k-diffusion's
//! `sample_euler_ancestral`).

use anyhow::Result;
use tch::Tensor;

use super::k_diffusion::{KSchedule, Reads, ancestral};
use super::walk::{Draws, Model, Walk};
use crate::diffusion::schedule::BetaDefaults;
use crate::diffusion::settings::Settings;

pub(super) struct EulerAncestral(KSchedule);

impl EulerAncestral {
    pub fn new(settings: Settings, steps: i64) -> Result<Self> {
        // diffusers' class has its levels from timesteps only.
        let reads = Reads { betas: BetaDefaults::USUAL, zero_snr: true, levels: false, ..Reads::USUAL };
        Ok(Self(KSchedule::new(settings, steps, &reads)?))
    }
}

impl Walk for EulerAncestral {
    fn timesteps(&self) -> Vec<f64> {
        self.0.timesteps.clone()
    }

    fn init_noise_sigma(&self) -> f64 {
        self.0.init_noise_sigma()
    }

    fn walk(&self, mut x: Tensor, model: &mut Model, draws: &mut Draws) -> Result<Tensor> {
        for (index, (sigma, next, t)) in self.0.steps().enumerate() {
            let (down, up) = ancestral(sigma, next);
            x += self.0.slope(&x, sigma, t, model)? * (down - sigma);
            if up > 0.0 {
                x += draws(index)? * up;
            }
        }
        Ok(x)
    }
}
