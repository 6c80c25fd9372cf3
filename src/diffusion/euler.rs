//! Euler's method on the probability-flow ODE, in k-diffusion's variables (Karras et al. 2022, algorithm 2 with no
//! churn): x = x₀ + σ ε, and the network sees x / √(σ² + 1).

use anyhow::Result;
use tch::Tensor;

use super::sampler::{Model, Walk};
use super::schedule::{BetaDefaults, Prediction, alphas_cumprod};
use super::settings::Settings;
use super::spacing::{Levels, Sigmas, Spacing, last_sigma, timesteps};

pub(super) struct Euler {
    timesteps: Vec<f64>,
    /// One for each timestep, and those after the last.
    sigmas: Vec<f64>,
    init_noise_sigma: f64,
    prediction: Prediction,
}

impl Euler {
    pub fn new(settings: Settings, steps: i64) -> Result<Self> {
        settings.refuse_true(&["use_beta_sigmas"])?;
        let mut alphas_cumprod = alphas_cumprod(settings, BetaDefaults::USUAL, true)?;
        let train = alphas_cumprod.len() as i64;
        let table = Sigmas::new(&mut alphas_cumprod, settings)?;
        let prediction = Prediction::from_settings(settings)?;
        let spacing = Spacing::read(settings, Spacing::Linspace)?;
        let offset = settings.integer("steps_offset", 0, 0)?;
        let mut timesteps: Vec<f64> =
            timesteps(spacing, train, steps, offset)?.into_iter().map(|t| t as f32 as f64).collect();

        let log_linear = settings.choice("interpolation_type", false, &[("linear", false), ("log_linear", true)])?;
        let mut sigmas = if log_linear {
            // One level more than timesteps, so that the walk ends at the least σ and not at `final_sigmas_type`.
            Levels::Exponential.spread(table.most(), table.least(), steps + 1)
        } else {
            timesteps.iter().map(|&t| table.at(t)).collect()
        };
        let levels = Levels::read(
            settings,
            &[("use_karras_sigmas", Levels::Karras), ("use_exponential_sigmas", Levels::Exponential)],
        )?;
        if levels != Levels::OfTimesteps {
            let most = settings.optional_number("sigma_max")?.unwrap_or(sigmas[0]);
            let least = settings.optional_number("sigma_min")?.unwrap_or(sigmas[sigmas.len() - 1]);
            sigmas = levels.spread(most, least, steps);
            timesteps = sigmas.iter().map(|&sigma| table.timestep_of(sigma)).collect();
        }
        sigmas.push(last_sigma(settings, &table)?);

        let continuous = settings.choice("timestep_type", false, &[("discrete", false), ("continuous", true)])?;
        if continuous && prediction == Prediction::VPrediction {
            timesteps = sigmas.iter().take(timesteps.len()).map(|sigma| 0.25 * sigma.ln()).collect();
        }
        let most = sigmas.iter().copied().fold(0.0, f64::max);
        let init_noise_sigma = if spacing == Spacing::Leading { (most * most + 1.0).sqrt() } else { most };
        Ok(Self { timesteps, sigmas, init_noise_sigma, prediction })
    }
}

impl Walk for Euler {
    fn timesteps(&self) -> Vec<f64> {
        self.timesteps.clone()
    }

    fn init_noise_sigma(&self) -> f64 {
        self.init_noise_sigma
    }

    fn walk(&self, mut x: Tensor, model: &mut Model) -> Result<Tensor> {
        for (pair, &t) in self.sigmas.windows(2).zip(&self.timesteps) {
            let (sigma, next) = (pair[0], pair[1]);
            let norm = (sigma * sigma + 1.0).sqrt();
            let output = model(&(&x / norm), t)?;
            // dx/dσ, which is ε.
            let derivative = match self.prediction {
                Prediction::Epsilon => output,
                Prediction::VPrediction => output / norm + &x * (sigma / (norm * norm)),
            };
            x += derivative * (next - sigma);
        }
        Ok(x)
    }
}
