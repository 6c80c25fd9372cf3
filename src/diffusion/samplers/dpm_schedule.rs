//! Timesteps and noise levels of the DPM-Solvers and UniPC, whose latents have unit variance, and which step in
//! λ = log(α/s) = −log σ (Lu et al. 2022, section 3).

use anyhow::Result;

use crate::diffusion::schedule::{BetaDefaults, Prediction, alphas_cumprod};
use crate::diffusion::settings::Settings;
use crate::diffusion::spacing::{Levels, Sigmas, Spacing, amplitudes, leading, linspace, trailing, within};

/// How diffusers' classes differ in what they read.
pub(super) struct Reads {
    /// `timestep_spacing` and `steps_offset`; else evenly spaced.
    pub spacing: bool,
    /// `lambda_min_clipped`.
    pub clip: bool,
    /// `rescale_betas_zero_snr`.
    pub zero_snr: bool,
    /// The keys of noise levels that do not come from timesteps.
    pub levels: &'static [(&'static str, Levels)],
    /// Timesteps of such levels are not rounded with the cosine schedule.
    pub cosine_truncates: bool,
    /// With such levels `final_sigmas_type = "sigma_min"` is the last of them, not the model's least.
    pub last_is_own: bool,
}

/// Timesteps and noise levels.
pub(super) struct DpmSchedule {
    /// One for each step.
    pub timesteps: Vec<f64>,
    /// One for each step, and the last.
    pub sigmas: Vec<f64>,
    pub prediction: Prediction,
}

/// A noise level as the solvers see it.
#[derive(Clone, Copy)]
pub(super) struct Level {
    /// Amplitude of x₀ in x.
    pub alpha: f64,
    /// Amplitude of ε in x.
    pub s: f64,
    /// log(α/s); infinite without noise.
    pub lambda: f64,
}

impl DpmSchedule {
    pub fn new(settings: Settings, steps: i64, reads: &Reads) -> Result<Self> {
        settings.refuse_true(&["use_flow_sigmas", "use_dynamic_shifting"])?;
        let mut alphas_cumprod = alphas_cumprod(settings, BetaDefaults::USUAL, reads.zero_snr)?;
        let train = alphas_cumprod.len() as i64;
        let table =
            Sigmas::new(&mut alphas_cumprod, reads.zero_snr && settings.truth("rescale_betas_zero_snr", false)?);

        // Timesteps whose λ is under `lambda_min_clipped` are not walked; needed by the cosine schedule.
        let least_lambda = if reads.clip { settings.lambda_min()? } else { f64::NEG_INFINITY };
        let clipped = table.0.iter().rev().take_while(|sigma| -sigma.ln() < least_lambda).count() as i64;
        let last = train - clipped;
        let (spacing, offset) = if reads.spacing {
            (Spacing::read(settings, Spacing::Linspace)?, settings.integer("steps_offset", 0, 0)?)
        } else {
            (Spacing::Linspace, 0)
        };
        let mut timesteps: Vec<f64> = match spacing {
            Spacing::Linspace => {
                let rising = linspace((last - 1).max(0) as f64, steps + 1);
                rising[1..].iter().rev().map(|t| t.round_ties_even()).collect()
            }
            Spacing::Leading => {
                let ratio = last / (steps + 1);
                leading(ratio, steps, offset + ratio)
            }
            Spacing::Trailing => trailing(train, last, steps),
        };
        within(&timesteps, train)?;

        let levels = Levels::read(settings, reads.levels)?;
        let mut sigmas: Vec<f64> = if levels == Levels::OfTimesteps {
            timesteps.iter().map(|&t| table.at(t)).collect()
        } else {
            // Not these samplers' keys, but diffusers finds Euler's.
            let limit = |key| if levels == Levels::Lu { Ok(None) } else { settings.optional_number(key) };
            let most = limit("sigma_max")?.unwrap_or(table.most());
            let least = limit("sigma_min")?.unwrap_or(table.least());
            let sigmas = levels.spread(most, least, steps);
            let cosine = settings.choice(
                "beta_schedule",
                false,
                &[("linear", false), ("scaled_linear", false), ("squaredcos_cap_v2", true)],
            )?;
            let rounds = matches!(levels, Levels::Karras | Levels::Lu) && !(cosine && reads.cosine_truncates);
            let whole = |t: f64| if rounds { t.round_ties_even() } else { t.trunc() };
            timesteps = sigmas.iter().map(|&sigma| whole(table.timestep_of(sigma))).collect();
            sigmas
        };
        let own = reads.last_is_own && levels != Levels::OfTimesteps;
        let least = if own { sigmas[sigmas.len() - 1] } else { table.least() };
        sigmas.push(settings.choice("final_sigmas_type", 0.0, &[("zero", 0.0), ("sigma_min", least)])?);
        Ok(Self { timesteps, sigmas, prediction: Prediction::from_settings(settings)? })
    }

    /// Whether the walk ends without noise.
    pub fn ends_at_zero(&self) -> bool {
        self.sigmas.last() == Some(&0.0)
    }

    /// The level before step `index`; that after the last step is at the number of steps.
    pub fn level(&self, index: usize) -> Level {
        let sigma = self.sigmas[index];
        let (alpha, s) = amplitudes(sigma);
        Level { alpha, s, lambda: -sigma.ln() }
    }
}
