//! The linear multistep method in σ: the slopes of up to four steps as a polynomial in σ, integrated over the step
//! (Adams and Bashforth; k-diffusion's `sample_lms`).

use anyhow::Result;
use tch::Tensor;

use super::k_diffusion::{KSchedule, Reads};
use super::walk::{Draws, Model, Walk};
use crate::diffusion::schedule::BetaDefaults;
use crate::diffusion::settings::Settings;

/// How many slopes count.
const ORDER: usize = 4;

pub(super) struct Lms(KSchedule);

impl Lms {
    pub fn new(settings: Settings, steps: i64) -> Result<Self> {
        let reads = Reads { betas: BetaDefaults::USUAL, karras_limits: false, ..Reads::USUAL };
        Ok(Self(KSchedule::new(settings, steps, &reads)?))
    }
}

/// The weight of the slope at `levels[which]` in the step from `from` to `to`: the integral of its Lagrange polynomial.
/// Gauss' two points are exact up to the third degree, that of four levels.
fn weight(levels: &[f64], which: usize, from: f64, to: f64) -> f64 {
    let polynomial = |tau: f64| -> f64 {
        let others = levels.iter().enumerate().filter(|(index, _)| *index != which);
        others.map(|(_, other)| (tau - other) / (levels[which] - other)).product()
    };
    let (middle, half) = ((from + to) / 2.0, (to - from) / 2.0);
    let offset = half / 3f64.sqrt();
    half * (polynomial(middle - offset) + polynomial(middle + offset))
}

impl Walk for Lms {
    fn timesteps(&self) -> Vec<f64> {
        self.0.timesteps.clone()
    }

    fn init_noise_sigma(&self) -> f64 {
        self.0.init_noise_sigma()
    }

    fn walk(&self, mut x: Tensor, model: &mut Model, _draws: &mut Draws) -> Result<Tensor> {
        // The slopes at the last levels, newest last.
        let mut slopes: Vec<Tensor> = Vec::new();
        for (index, (sigma, next, t)) in self.0.steps().enumerate() {
            slopes.push(self.0.slope(&x, sigma, t, model)?);
            if slopes.len() > ORDER {
                let _oldest = slopes.remove(0);
            }
            let levels = &self.0.sigmas[index + 1 - slopes.len()..=index];
            for (which, slope) in slopes.iter().enumerate() {
                x += slope * weight(levels, which, sigma, next);
            }
        }
        Ok(x)
    }
}

#[cfg(test)]
mod tests {
    use super::weight;

    #[test]
    fn cubic_slopes_are_integrated_exactly() {
        let levels = [9.0, 7.0, 4.0, 3.0];
        let cubic = |s: f64| 2.0 * s.powi(3) - s.powi(2) + 5.0;
        let integral = |s: f64| s.powi(4) / 2.0 - s.powi(3) / 3.0 + 5.0 * s;
        let got: f64 = (0..4).map(|i| weight(&levels, i, 3.0, 1.0) * cubic(levels[i])).sum();
        assert!((got - (integral(1.0) - integral(3.0))).abs() < 1e-9, "{got}");
    }
}
