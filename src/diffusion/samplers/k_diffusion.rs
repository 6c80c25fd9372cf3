//! What the samplers in k-diffusion's variables share: x = x₀ + σ ε, the network sees x / √(σ² + 1), and the
//! probability-flow ODE is dx/dσ = ε (Karras et al. 2022, eq. 1 and table 1).

use anyhow::Result;
use tch::Tensor;

use super::walk::Model;
use crate::diffusion::schedule::{BetaDefaults, Prediction, alphas_cumprod};
use crate::diffusion::settings::Settings;
use crate::diffusion::spacing::{Levels, Sigmas, Spacing, amplitudes, timesteps};

/// How diffusers' classes differ in what they read.
pub(super) struct Reads {
    pub betas: BetaDefaults,
    /// `rescale_betas_zero_snr`.
    pub zero_snr: bool,
    /// `use_karras_sigmas` and the like.
    pub levels: bool,
    /// Karras' levels lie between `sigma_max` and `sigma_min`.
    pub karras_limits: bool,
    /// The timesteps of Karras' levels are rounded.
    pub karras_rounds: bool,
    /// `interpolation_type`: where it is `log_linear`, levels begin and end with those of training, whatever the timesteps.
    pub interpolation: bool,
}

impl Reads {
    /// What Heun and DPM-Solver-2 read; the others say what is different.
    pub const USUAL: Self = Self {
        betas: BetaDefaults::STABLE_DIFFUSION,
        zero_snr: false,
        levels: true,
        karras_limits: true,
        karras_rounds: false,
        interpolation: false,
    };
}

/// Timesteps and noise levels.
pub(super) struct KSchedule {
    /// One for each step.
    pub timesteps: Vec<f64>,
    /// One for each step, and the level after the last, 0.
    pub sigmas: Vec<f64>,
    /// The first timestep is not the last of training.
    leading: bool,
    /// σ of all training timesteps.
    pub table: Sigmas,
    pub prediction: Prediction,
}

impl KSchedule {
    pub fn new(settings: Settings, steps: i64, reads: &Reads) -> Result<Self> {
        let mut alphas_cumprod = alphas_cumprod(settings, reads.betas, reads.zero_snr)?;
        let train = alphas_cumprod.len() as i64;
        let table =
            Sigmas::new(&mut alphas_cumprod, reads.zero_snr && settings.truth("rescale_betas_zero_snr", false)?);
        let spacing = Spacing::read(settings, Spacing::Linspace)?;
        let offset = settings.integer("steps_offset", 0, 0)?;
        let mut timesteps: Vec<f64> =
            timesteps(spacing, train, steps, offset)?.into_iter().map(|t| t as f32 as f64).collect();
        let mut sigmas: Vec<f64> = timesteps.iter().map(|&t| table.at(t)).collect();

        let levels = if reads.levels { Levels::read(settings, &Levels::USUAL)? } else { Levels::OfTimesteps };
        if levels != Levels::OfTimesteps {
            let limited = levels != Levels::Karras || reads.karras_limits;
            let limit = |key| if limited { settings.optional_number(key) } else { Ok(None) };
            let ends = match reads.interpolation && is_log_linear(settings)? {
                true => [table.most(), table.least()],
                false => [sigmas[0], sigmas[sigmas.len() - 1]],
            };
            let (most, least) = (limit("sigma_max")?.unwrap_or(ends[0]), limit("sigma_min")?.unwrap_or(ends[1]));
            sigmas = levels.spread(most, least, steps);
            let rounds = levels == Levels::Karras && reads.karras_rounds;
            let whole = |t: f64| if rounds { t.round_ties_even() } else { t };
            timesteps = sigmas.iter().map(|&sigma| whole(table.timestep_of(sigma))).collect();
        }
        sigmas.push(0.0);
        Ok(Self {
            leading: spacing == Spacing::Leading,
            prediction: Prediction::from_settings(settings)?,
            timesteps,
            sigmas,
            table,
        })
    }

    /// What noise of unit variance is multiplied by: where the walk does not begin at pure noise, x₀ has variance too.
    pub fn init_noise_sigma(&self) -> f64 {
        let most = self.sigmas.iter().copied().fold(0.0, f64::max);
        if self.leading { (most * most + 1.0).sqrt() } else { most }
    }

    /// Levels from and to, and the timestep, of each step.
    pub fn steps(&self) -> impl Iterator<Item = (f64, f64, f64)> {
        self.sigmas.windows(2).zip(&self.timesteps).map(|(pair, &t)| (pair[0], pair[1], t))
    }

    /// dx/dσ at x `[B, …]` of level `sigma`: the network's ε.
    pub fn slope(&self, x: &Tensor, sigma: f64, t: f64, model: &mut Model) -> Result<Tensor> {
        let (alpha, s) = amplitudes(sigma);
        let scaled = x * alpha;
        let output = model(&scaled, t)?;
        Ok(self.prediction.noise(&scaled, &output, alpha, s))
    }

    /// The network's x₀ at x `[B, …]` of level `sigma`.
    pub fn denoised(&self, x: &Tensor, sigma: f64, t: f64, model: &mut Model) -> Result<Tensor> {
        let (alpha, s) = amplitudes(sigma);
        let scaled = x * alpha;
        let output = model(&scaled, t)?;
        Ok(self.prediction.x0(&scaled, &output, alpha, s))
    }
}

/// Whether `interpolation_type` is `log_linear`.
pub(super) fn is_log_linear(settings: Settings) -> Result<bool> {
    settings.choice("interpolation_type", false, &[("linear", false), ("log_linear", true)])
}

/// A step from one level to a lower as a step further down, and noise that leads up again: the two levels
/// (k-diffusion's `get_ancestral_step` with η = 1).
pub(super) fn ancestral(sigma: f64, next: f64) -> (f64, f64) {
    let up = next * (1.0 - (next / sigma).powi(2)).sqrt();
    (next * next / sigma, up)
}
