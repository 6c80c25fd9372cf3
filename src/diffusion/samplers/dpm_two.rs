//! DPM-Solver-2 as k-diffusion has it (`sample_dpm_2`, `sample_dpm_2_ancestral`; Karras et al. 2022, algorithm 2 with
//! a step to the middle in log σ): the slope in the middle leads over the whole step. Two evaluations a step, and one
//! for the last.

use anyhow::Result;
use tch::Tensor;

use super::k_diffusion::{KSchedule, Reads, ancestral};
use super::walk::{Draws, Model, Walk};
use crate::diffusion::settings::Settings;

pub(super) struct DpmTwo {
    schedule: KSchedule,
    /// Steps go further down than the next level, and fresh noise leads up to it.
    ancestral: bool,
}

impl DpmTwo {
    pub fn new(settings: Settings, steps: i64, ancestral: bool) -> Result<Self> {
        let reads = Reads { karras_rounds: true, ..Reads::USUAL };
        Ok(Self { schedule: KSchedule::new(settings, steps, &reads)?, ancestral })
    }

    /// Where a step ends, and how much noise is added there.
    fn end(&self, sigma: f64, next: f64) -> (f64, f64) {
        if self.ancestral { ancestral(sigma, next) } else { (next, 0.0) }
    }

    /// Level and timestep of a step's middle.
    fn middle(&self, sigma: f64, end: f64) -> (f64, f64) {
        let middle = (sigma * end).sqrt();
        (middle, self.schedule.table.timestep_of(middle))
    }
}

impl Walk for DpmTwo {
    fn timesteps(&self) -> Vec<f64> {
        let steps = self.schedule.steps().flat_map(|(sigma, next, t)| {
            let (end, _) = self.end(sigma, next);
            let second = (next > 0.0).then(|| self.middle(sigma, end).1);
            std::iter::once(t).chain(second)
        });
        steps.collect()
    }

    fn init_noise_sigma(&self) -> f64 {
        self.schedule.init_noise_sigma()
    }

    fn walk(&self, mut x: Tensor, model: &mut Model, draws: &mut Draws) -> Result<Tensor> {
        for (index, (sigma, next, t)) in self.schedule.steps().enumerate() {
            let slope = self.schedule.slope(&x, sigma, t, model)?;
            let (end, up) = self.end(sigma, next);
            if next == 0.0 {
                x += slope * -sigma;
                continue;
            }
            let (middle, middle_t) = self.middle(sigma, end);
            let there = &x + slope * (middle - sigma);
            x += self.schedule.slope(&there, middle, middle_t, model)? * (end - sigma);
            if up > 0.0 {
                x += draws(index)? * up;
            }
        }
        Ok(x)
    }
}
