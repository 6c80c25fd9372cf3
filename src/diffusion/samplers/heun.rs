//! Heun's method on the probability-flow ODE: the mean of the slopes at both ends of a step (Karras et al. 2022,
//! algorithm 1). Two evaluations a step, and one for the last.

use anyhow::Result;
use tch::Tensor;

use super::k_diffusion::{KSchedule, Reads};
use super::walk::{Draws, Model, Walk};
use crate::diffusion::schedule::Clip;
use crate::diffusion::settings::Settings;

pub(super) struct Heun {
    schedule: KSchedule,
    clip: Clip,
}

impl Heun {
    pub fn new(settings: Settings, steps: i64) -> Result<Self> {
        let clip = Clip::read(settings, false)?;
        Ok(Self { schedule: KSchedule::new(settings, steps, &Reads::USUAL)?, clip })
    }

    fn slope(&self, x: &Tensor, sigma: f64, t: f64, model: &mut Model) -> Result<Tensor> {
        if !self.clip.is_on() {
            return self.schedule.slope(x, sigma, t, model);
        }
        Ok((x - self.clip.apply(self.schedule.denoised(x, sigma, t, model)?)) / sigma)
    }
}

impl Walk for Heun {
    fn timesteps(&self) -> Vec<f64> {
        // The second evaluation of a step is at the timestep of the next.
        let timesteps = &self.schedule.timesteps;
        timesteps.iter().take(1).chain(timesteps.iter().skip(1).flat_map(|t| [t, t])).copied().collect()
    }

    fn init_noise_sigma(&self) -> f64 {
        self.schedule.init_noise_sigma()
    }

    fn walk(&self, mut x: Tensor, model: &mut Model, _draws: &mut Draws) -> Result<Tensor> {
        for (index, (sigma, next, t)) in self.schedule.steps().enumerate() {
            let slope = self.slope(&x, sigma, t, model)?;
            let there = &x + &slope * (next - sigma);
            x = match self.schedule.timesteps.get(index + 1) {
                None => there,
                Some(&next_t) => {
                    let mean = (slope + self.slope(&there, next, next_t, model)?) / 2.0;
                    x + mean * (next - sigma)
                }
            };
        }
        Ok(x)
    }
}
