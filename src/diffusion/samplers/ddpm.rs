//! Ancestral sampling of DDPM (Ho, Jain & Abbeel 2020, algorithm 2 and eq. 7), over some of the timesteps.

use anyhow::Result;
use tch::Tensor;

use super::walk::{Draws, Model, Walk};
use crate::diffusion::schedule::{BetaDefaults, Clip, Prediction, alphas_cumprod};
use crate::diffusion::settings::Settings;
use crate::diffusion::spacing::{Spacing, read_timesteps};

/// `variance_type`: the variance of the noise that a step adds.
#[derive(Clone, Copy)]
enum Variance {
    /// That of q(x_s | x_t, x₀).
    Small,
    /// That of q(x_t | x_s).
    Large,
}

pub(super) struct Ddpm {
    timesteps: Vec<i64>,
    alphas_cumprod: Vec<f64>,
    variance: Variance,
    clip: Clip,
    prediction: Prediction,
}

impl Ddpm {
    pub fn new(settings: Settings, steps: i64) -> Result<Self> {
        settings.refuse_true(&["thresholding"])?;
        let alphas_cumprod = alphas_cumprod(settings, BetaDefaults::USUAL, true)?;
        let train = alphas_cumprod.len() as i64;
        let timesteps = read_timesteps(settings, Spacing::Leading, train, steps)?;
        Ok(Self {
            timesteps: timesteps.into_iter().map(|t| t.round_ties_even() as i64).collect(),
            alphas_cumprod,
            // The deviation of "log" is the square root of the same variance; null, which other classes write, is small too.
            variance: match settings.get("variance_type") {
                None => Variance::Small,
                Some(_) => settings.choice(
                    "variance_type",
                    Variance::Small,
                    &[
                        ("fixed_small", Variance::Small),
                        ("fixed_small_log", Variance::Small),
                        ("fixed_large", Variance::Large),
                    ],
                )?,
            },
            clip: Clip::read(settings, true)?,
            prediction: Prediction::from_settings(settings)?,
        })
    }
}

impl Walk for Ddpm {
    fn timesteps(&self) -> Vec<f64> {
        self.timesteps.iter().map(|&t| t as f64).collect()
    }

    fn walk(&self, mut x: Tensor, model: &mut Model, draws: &mut Draws) -> Result<Tensor> {
        for (index, &t) in self.timesteps.iter().enumerate() {
            let output = model(&x, t as f64)?;
            let alpha = self.alphas_cumprod[t as usize];
            let next = self.timesteps.get(index + 1).map_or(1.0, |&t| self.alphas_cumprod[t as usize]);
            let x0 = self.prediction.x0(&x, &output, alpha.sqrt(), (1.0 - alpha).sqrt());
            let x0 = self.clip.apply(x0);
            let (kept, added) = (alpha / next, 1.0 - alpha / next);
            let (before, after) = (1.0 - alpha, 1.0 - next);
            x = x0 * (next.sqrt() * added / before) + x * (kept.sqrt() * after / before);
            if t > 0 {
                let variance = match self.variance {
                    Variance::Small => (after / before * added).max(1e-20),
                    Variance::Large => added,
                };
                x += draws(index)? * variance.sqrt();
            }
        }
        Ok(x)
    }
}
