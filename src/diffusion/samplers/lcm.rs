//! Multistep sampling of latent consistency models (Luo et al. 2023, algorithm 3): each evaluation leads to x₀, and
//! noise from there to the next timestep.

use anyhow::{Result, bail};
use tch::Tensor;

use super::walk::{Draws, Model, Walk};
use crate::diffusion::schedule::{BetaDefaults, Clip, Prediction, alphas_cumprod};
use crate::diffusion::settings::Settings;

/// Standard deviation of the data, as the boundary condition takes it (Luo et al. 2023, section 3).
const SIGMA_DATA: f64 = 0.5;

pub(super) struct Lcm {
    timesteps: Vec<i64>,
    alphas_cumprod: Vec<f64>,
    /// What a timestep is multiplied by in the boundary condition.
    timestep_scaling: f64,
    clip: Clip,
    prediction: Prediction,
}

impl Lcm {
    pub fn new(settings: Settings, steps: i64) -> Result<Self> {
        settings.refuse_true(&["thresholding"])?;
        let alphas_cumprod = alphas_cumprod(settings, BetaDefaults::LATENT_CONSISTENCY, true)?;
        let train = alphas_cumprod.len() as i64;
        let original = settings.integer("original_inference_steps", 50, 1)?;
        if original > train {
            bail!(
                "scheduler_config.json: `original_inference_steps` is {original}, more than the {train} timesteps of \
                 `num_train_timesteps`"
            );
        }
        if steps > original {
            bail!("{steps} steps: lcm takes at most {original} with this model (`original_inference_steps`)");
        }
        // The timesteps that the model was distilled at, falling, and of them evenly spaced ones.
        let stride = original as f64 / steps as f64;
        let distilled = |index: i64| (original - index) * (train / original) - 1;
        Ok(Self {
            timesteps: (0..steps).map(|i| distilled((i as f64 * stride).floor() as i64)).collect(),
            alphas_cumprod,
            timestep_scaling: settings.number("timestep_scaling", 10.0)?,
            clip: Clip::read(settings, false)?,
            prediction: Prediction::from_settings(settings)?,
        })
    }
}

impl Walk for Lcm {
    fn timesteps(&self) -> Vec<f64> {
        self.timesteps.iter().map(|&t| t as f64).collect()
    }

    fn walk(&self, mut x: Tensor, model: &mut Model, draws: &mut Draws) -> Result<Tensor> {
        for (index, &t) in self.timesteps.iter().enumerate() {
            let output = model(&x, t as f64)?;
            let alpha = self.alphas_cumprod[t as usize];
            let x0 = self.prediction.x0(&x, &output, alpha.sqrt(), (1.0 - alpha).sqrt());
            let x0 = self.clip.apply(x0);
            // So that the answer at timestep 0 is the input.
            let scaled = t as f64 * self.timestep_scaling;
            let variance = scaled * scaled + SIGMA_DATA * SIGMA_DATA;
            let (skip, out) = (SIGMA_DATA * SIGMA_DATA / variance, scaled / variance.sqrt());
            x = x0 * out + x * skip;
            if let Some(&next) = self.timesteps.get(index + 1) {
                let alpha = self.alphas_cumprod[next as usize];
                x = x * alpha.sqrt() + draws(index)? * (1.0 - alpha).sqrt();
            }
        }
        Ok(x)
    }
}
