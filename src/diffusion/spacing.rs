//! Where the steps of a sampler lie: timesteps (Lin et al. 2023, table 2) and noise levels σ = √((1 − ᾱ) / ᾱ).
//!
//! The arithmetic follows numpy's `linspace`, `arange`, `round` and `interp`, since a timestep that rounds the other
//! way is another timestep.

use anyhow::{Result, bail};

use super::settings::Settings;

/// `timestep_spacing`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Spacing {
    Leading,
    Trailing,
    Linspace,
}

impl Spacing {
    pub fn read(settings: Settings, default: Self) -> Result<Self> {
        settings.choice(
            "timestep_spacing",
            default,
            &[("leading", Self::Leading), ("trailing", Self::Trailing), ("linspace", Self::Linspace)],
        )
    }
}

/// `count` numbers from 0 to `stop`, both included.
pub(super) fn linspace(stop: f64, count: i64) -> Vec<f64> {
    let step = stop / (count - 1).max(1) as f64;
    (0..count).map(|i| if i > 0 && i == count - 1 { stop } else { i as f64 * step }).collect()
}

/// 0, r, 2r, … `count` of them, plus `offset`; falling.
pub(super) fn leading(ratio: i64, count: i64, offset: i64) -> Vec<f64> {
    (0..count).rev().map(|i| (i * ratio + offset) as f64).collect()
}

/// From `last` − 1 down in steps of `train` / `steps`, rounded. The last step that floating point sometimes adds,
/// at −1 (for instance for 61 steps of 1000), is left out.
pub(super) fn trailing(train: i64, last: i64, steps: i64) -> Vec<f64> {
    let start = last as f64;
    let step = train as f64 / steps as f64;
    let difference = (start - step) - start;
    let count = (start / step).ceil() as i64;
    let timesteps = (0..count).map(|i| (start + i as f64 * difference).round_ties_even() - 1.0);
    timesteps.filter(|&t| t >= 0.0).collect()
}

/// Timesteps of DDIM, PNDM and Euler, falling; `linspace` not yet rounded.
pub(super) fn timesteps(spacing: Spacing, train: i64, steps: i64, offset: i64) -> Result<Vec<f64>> {
    let timesteps = match spacing {
        Spacing::Leading => leading(train / steps, steps, offset),
        Spacing::Trailing => trailing(train, train, steps),
        Spacing::Linspace => linspace((train - 1) as f64, steps).into_iter().rev().collect(),
    };
    within(&timesteps, train)?;
    Ok(timesteps)
}

/// Those that `timestep_spacing`, else `default`, and `steps_offset` ask for.
pub(super) fn read_timesteps(settings: Settings, default: Spacing, train: i64, steps: i64) -> Result<Vec<f64>> {
    let offset = settings.integer("steps_offset", 0, 0)?;
    timesteps(Spacing::read(settings, default)?, train, steps, offset)
}

/// Refuses timesteps that the schedule does not have.
pub(super) fn within(timesteps: &[f64], train: i64) -> Result<()> {
    match timesteps.iter().find(|&&t| t > (train - 1) as f64) {
        None => Ok(()),
        Some(t) => bail!(
            "{} steps with this model's `steps_offset` reach timestep {t}, beyond the last, {}; take fewer steps",
            timesteps.len(),
            train - 1
        ),
    }
}

/// α and s of a noise level σ: the amplitudes of x₀ and ε in x of unit variance, α² + s² = 1.
pub(super) fn amplitudes(sigma: f64) -> (f64, f64) {
    let alpha = 1.0 / (sigma * sigma + 1.0).sqrt();
    (alpha, sigma * alpha)
}

/// σ of every training timestep, rising, as fp32 numbers.
pub(super) struct Sigmas(pub Vec<f64>);

impl Sigmas {
    /// With zero terminal SNR the last ᾱ is 0; it is taken as 2⁻²⁴ here, so that σ is finite.
    pub fn new(alphas_cumprod: &mut [f64], zero_snr: bool) -> Self {
        if zero_snr && let Some(last) = alphas_cumprod.last_mut() {
            *last = 2f64.powi(-24);
        }
        Self(alphas_cumprod.iter().map(|a| ((1.0 - a) / a).sqrt() as f32 as f64).collect())
    }

    pub fn least(&self) -> f64 {
        self.0.first().copied().unwrap_or_default()
    }

    pub fn most(&self) -> f64 {
        self.0.last().copied().unwrap_or_default()
    }

    /// σ at a timestep, which may lie between two.
    pub fn at(&self, t: f64) -> f64 {
        let t = t.clamp(0.0, (self.0.len() - 1) as f64);
        let (low, fraction) = (t.floor() as usize, t.fract());
        if fraction == 0.0 { self.0[low] } else { self.0[low] + fraction * (self.0[low + 1] - self.0[low]) }
    }

    /// The timestep, between two as a rule, whose σ this is; linear in log σ.
    pub fn timestep_of(&self, sigma: f64) -> f64 {
        let log = |sigma: f64| (sigma as f32).ln() as f64;
        let wanted = sigma.max(1e-10).ln();
        let below = self.0.partition_point(|&sigma| log(sigma) <= wanted);
        let low = below.saturating_sub(1).min(self.0.len().saturating_sub(2));
        let high = (low + 1).min(self.0.len() - 1);
        let (low_log, high_log) = (log(self.0[low]), log(self.0[high]));
        if low_log == high_log {
            return low as f64;
        }
        let weight = ((low_log - wanted) / (low_log - high_log)).clamp(0.0, 1.0);
        (1.0 - weight) * low as f64 + weight * high as f64
    }
}

/// Noise levels that do not come from timesteps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Levels {
    /// From the timesteps after all.
    OfTimesteps,
    /// Karras et al. 2022, eq. 5, ρ = 7.
    Karras,
    /// Evenly in log σ.
    Exponential,
    /// Quantiles of the Beta distribution (Lee et al. 2024, arXiv:2407.12173), α = β = 0.6.
    Beta,
    /// Lu et al. 2022, evenly in λ = −log σ: the same levels, but timesteps rounded as Karras' are.
    Lu,
}

impl Levels {
    /// The keys that most samplers know.
    pub const USUAL: [(&'static str, Self); 3] = [
        ("use_karras_sigmas", Self::Karras),
        ("use_exponential_sigmas", Self::Exponential),
        ("use_beta_sigmas", Self::Beta),
    ];

    /// `use_karras_sigmas` and the like; `keys` are those that the sampler knows.
    pub fn read(settings: Settings, keys: &[(&str, Self)]) -> Result<Self> {
        let mut chosen = None;
        for &(key, levels) in keys {
            if settings.truth(key, false)?
                && let Some((other, _)) = chosen.replace((key, levels))
            {
                bail!("scheduler_config.json: `{other}` and `{key}` are both true; only one can be");
            }
        }
        Ok(chosen.map_or(Self::OfTimesteps, |(_, levels)| levels))
    }

    /// `count` levels falling from `most` to `least`.
    pub fn spread(self, most: f64, least: f64, count: i64) -> Vec<f64> {
        let ramp = linspace(1.0, count).into_iter();
        match self {
            Self::Karras => {
                let (high, low) = (most.powf(1.0 / 7.0), least.powf(1.0 / 7.0));
                ramp.map(|r| (high + r * (low - high)).powf(7.0)).collect()
            }
            Self::Beta => ramp.map(|r| least + beta_quantile(1.0 - r) * (most - least)).collect(),
            _ => {
                // Lu's ends are fp32 logarithms.
                let log = |sigma: f64| if self == Self::Lu { (sigma as f32).ln() as f64 } else { sigma.ln() };
                let (high, low) = (log(most), log(least));
                ramp.map(|r| (high + r * (low - high)).exp()).collect()
            }
        }
    }
}

/// `final_sigmas_type`: the level after the last step.
pub(super) fn last_sigma(settings: Settings, sigmas: &Sigmas) -> Result<f64> {
    let least = sigmas.least();
    settings.choice("final_sigmas_type", 0.0, &[("zero", 0.0), ("sigma_min", least)])
}

/// Where the Beta distribution with α = β = 0.6 has `probability` below it.
fn beta_quantile(probability: f64) -> f64 {
    if probability > 0.5 {
        return 1.0 - beta_quantile(1.0 - probability);
    }
    let (mut low, mut high) = (0.0, 0.5);
    for _ in 0..100 {
        let middle = (low + high) / 2.0;
        if beta_below(middle) < probability {
            low = middle;
        } else {
            high = middle;
        }
    }
    (low + high) / 2.0
}

/// The probability below `x`, at most ½: x^a / (a B(a, a)) · ₂F₁(a, 1 − a; a + 1; x) with a = 0.6 (Abramowitz & Stegun
/// 1964, 26.5.4 and 6.6.8).
fn beta_below(x: f64) -> f64 {
    const A: f64 = 0.6;
    /// Γ(0.6)² / Γ(1.2)
    const B: f64 = 1.489_192_248_812_817 * 1.489_192_248_812_817 / 0.918_168_742_399_760_6;
    let (mut term, mut sum) = (1.0, 0.0);
    for n in 0..200 {
        sum += term / (A + f64::from(n));
        term *= (f64::from(n) + 1.0 - A) / (f64::from(n) + 1.0) * x;
    }
    x.powf(A) / B * sum
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `scipy.stats.beta.ppf(p, 0.6, 0.6)`
    #[test]
    fn quantiles_of_the_beta_distribution_are_scipys() {
        for (probability, wanted) in SCIPY {
            let got = beta_quantile(probability);
            assert!((got - wanted).abs() < 1e-12, "{probability}: {got} instead of {wanted}");
        }
    }

    const SCIPY: [(f64, f64); 8] = [
        (0.0, 0.0),
        (0.01, 0.0008612388215429059),
        (0.1, 0.03958440558878085),
        (0.3, 0.23401700387523572),
        (0.5, 0.5000000000000001),
        (0.7, 0.7659829961247643),
        (0.96, 0.9913362306152167),
        (1.0, 1.0),
    ];
}
