//! DDIM (Song, Meng & Ermon 2020, eq. 12) with η = 0.

use anyhow::Result;
use tch::Tensor;

use super::walk::{Draws, Model, Walk};
use crate::diffusion::schedule::{BetaDefaults, Clip, Prediction, alphas_cumprod};
use crate::diffusion::settings::Settings;
use crate::diffusion::spacing::{Spacing, read_timesteps};

pub(super) struct Ddim {
    timesteps: Vec<f64>,
    /// Training timesteps per step.
    stride: i64,
    alphas_cumprod: Vec<f64>,
    /// ᾱ after the last step.
    final_alpha: f64,
    clip: Clip,
    prediction: Prediction,
}

impl Ddim {
    pub fn new(settings: Settings, steps: i64) -> Result<Self> {
        settings.refuse_true(&["thresholding"])?;
        let alphas_cumprod = alphas_cumprod(settings, BetaDefaults::USUAL, true)?;
        let train = alphas_cumprod.len() as i64;
        let timesteps = read_timesteps(settings, Spacing::Leading, train, steps)?;
        Ok(Self {
            timesteps: timesteps.into_iter().map(f64::round_ties_even).collect(),
            stride: train / steps,
            final_alpha: if settings.truth("set_alpha_to_one", true)? { 1.0 } else { alphas_cumprod[0] },
            alphas_cumprod,
            clip: Clip::read(settings, true)?,
            prediction: Prediction::from_settings(settings)?,
        })
    }
}

impl Walk for Ddim {
    fn timesteps(&self) -> Vec<f64> {
        self.timesteps.clone()
    }

    fn walk(&self, mut x: Tensor, model: &mut Model, _draws: &mut Draws) -> Result<Tensor> {
        for &t in &self.timesteps {
            let output = model(&x, t)?;
            let alpha = self.alphas_cumprod[t as usize];
            let previous = t as i64 - self.stride;
            let next_alpha = if previous >= 0 { self.alphas_cumprod[previous as usize] } else { self.final_alpha };
            let (signal, spread) = (alpha.sqrt(), (1.0 - alpha).sqrt());
            let x0 = self.prediction.x0(&x, &output, signal, spread);
            let noise = self.prediction.noise(&x, &output, signal, spread);
            let x0 = self.clip.apply(x0);
            x = x0 * next_alpha.sqrt() + noise * (1.0 - next_alpha).sqrt();
        }
        Ok(x)
    }
}
