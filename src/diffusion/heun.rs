//! Heun's method on the probability-flow ODE: the mean of the slopes at both ends of a step (Karras et al. 2022,
//! algorithm 1). Two evaluations a step, and one for the last.

use anyhow::Result;
use tch::Tensor;

use super::k_diffusion::{KSchedule, Reads};
use super::settings::Settings;
use super::walk::{Draws, Model, Walk};

pub(super) struct Heun {
    schedule: KSchedule,
    /// x₀ is held within ± this.
    clip: Option<f64>,
}

impl Heun {
    pub fn new(settings: Settings, steps: i64) -> Result<Self> {
        let clip = settings.number("clip_sample_range", 1.0)?;
        Ok(Self {
            schedule: KSchedule::new(settings, steps, &Reads::USUAL)?,
            clip: settings.truth("clip_sample", false)?.then_some(clip),
        })
    }

    fn slope(&self, x: &Tensor, sigma: f64, t: f64, model: &mut Model) -> Result<Tensor> {
        match self.clip {
            None => self.schedule.slope(x, sigma, t, model),
            Some(range) => Ok((x - self.schedule.denoised(x, sigma, t, model)?.clamp(-range, range)) / sigma),
        }
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
