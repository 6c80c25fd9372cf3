//! DPM-Solver++ with noise, second order in one step (k-diffusion's `sample_dpmpp_sde`; Lu et al. 2022b, section 5):
//! half a step in log σ, then the whole step with the x₀ found there. Two evaluations a step, and one for the last.
//!
//! The noise of both is the increment of one Brownian motion in σ, as torchsde's tree gives it to diffusers: the whole
//! step's contains the half's.

use anyhow::Result;
use tch::Tensor;

use super::k_diffusion::{KSchedule, Reads, ancestral};
use super::walk::{Draws, Model, Walk};
use crate::diffusion::settings::Settings;

pub(super) struct DpmSde(KSchedule);

impl DpmSde {
    pub fn new(settings: Settings, steps: i64) -> Result<Self> {
        Ok(Self(KSchedule::new(settings, steps, &Reads { karras_limits: false, ..Reads::USUAL })?))
    }
}

/// From x of level `sigma` to level `next`: towards `denoised` as far as the ancestral step goes, and `noise` up again.
fn step(x: &Tensor, denoised: &Tensor, noise: &Tensor, sigma: f64, next: f64) -> Tensor {
    let (down, up) = ancestral(sigma, next);
    x * (down / sigma) + denoised * (1.0 - down / sigma) + noise * up
}

impl Walk for DpmSde {
    fn timesteps(&self) -> Vec<f64> {
        let steps = self.0.steps().flat_map(|(sigma, next, t)| {
            let second = (next > 0.0).then(|| self.0.table.timestep_of((sigma * next).sqrt()));
            std::iter::once(t).chain(second)
        });
        steps.collect()
    }

    fn init_noise_sigma(&self) -> f64 {
        self.0.init_noise_sigma()
    }

    fn walk(&self, mut x: Tensor, model: &mut Model, draws: &mut Draws) -> Result<Tensor> {
        for (index, (sigma, next, t)) in self.0.steps().enumerate() {
            let denoised = self.0.denoised(&x, sigma, t, model)?;
            if next == 0.0 {
                x = denoised;
                continue;
            }
            let middle = (sigma * next).sqrt();
            // Increments of the Brownian motion over both halves, and over their sum, of unit variance.
            let (first, second) = (draws(2 * index)?, draws(2 * index + 1)?);
            let whole = (&first * (sigma - middle).sqrt() + second * (middle - next).sqrt()) / (sigma - next).sqrt();
            let there = step(&x, &denoised, &first, sigma, middle);
            let denoised = self.0.denoised(&there, middle, self.0.table.timestep_of(middle), model)?;
            x = step(&x, &denoised, &whole, sigma, next);
        }
        Ok(x)
    }
}
