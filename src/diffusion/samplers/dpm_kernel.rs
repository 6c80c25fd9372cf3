//! What the DPM-Solvers integrate: the exact solution of the linear part over a step h in λ, with the network's x₀ or ε
//! as a polynomial in λ (Lu et al. 2022a, eq. 3.4; 2022b, eq. 9; their stochastic forms 2022b, eq. 18 and appendix).

use anyhow::{Result, bail};
use tch::Tensor;

use super::dpm_schedule::{DpmSchedule, Level, Reads};
use super::walk::{Draws, Model};
use crate::diffusion::settings::{Settings, Unsupported};

/// `algorithm_type`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Algorithm {
    /// "dpmsolver": ε is integrated.
    Noise,
    /// "dpmsolver++": x₀ is integrated.
    Data,
    /// "sde-dpmsolver"
    NoiseSde,
    /// "sde-dpmsolver++"
    DataSde,
}

/// The algorithm with the form of its second order.
#[derive(Clone, Copy)]
pub(super) struct Kernel {
    pub algorithm: Algorithm,
    /// `solver_type` "heun"; else "midpoint".
    pub heun: bool,
}

/// The network's output at some steps: its value, slope and bend in λ, per step of length h.
pub(super) enum Polynomial {
    Constant(Tensor),
    /// Value and slope, weighted as `solver_type` says.
    Linear(Tensor, Tensor),
    /// Value, slope and bend.
    Quadratic(Tensor, Tensor, Option<Tensor>),
}

impl Kernel {
    /// `sde-dpmsolver` where the class knows it.
    pub fn read(settings: Settings, schedule: &DpmSchedule, noise_sde: bool) -> Result<Self> {
        let all = [
            // "deis" is diffusers' own alias.
            ("dpmsolver++", Algorithm::Data),
            ("deis", Algorithm::Data),
            ("sde-dpmsolver++", Algorithm::DataSde),
            ("dpmsolver", Algorithm::Noise),
            ("sde-dpmsolver", Algorithm::NoiseSde),
        ];
        let algorithm =
            settings.choice("algorithm_type", Algorithm::Data, &all[..if noise_sde { all.len() } else { 4 }])?;
        if matches!(algorithm, Algorithm::Noise | Algorithm::NoiseSde) && schedule.ends_at_zero() {
            bail!(
                "scheduler_config.json: `algorithm_type` dpmsolver cannot end at `final_sigmas_type` zero; set \
                 `final_sigmas_type` to sigma_min"
            );
        }
        if algorithm == Algorithm::NoiseSde && settings.integer("solver_order", 2, 1)? > 2 {
            return Err(Unsupported("scheduler_config.json `solver_order` is 3 with sde-dpmsolver".into()).into());
        }
        let heun = settings.choice(
            "solver_type",
            false,
            &[("midpoint", false), ("heun", true), ("logrho", false), ("bh1", false), ("bh2", false)],
        )?;
        Ok(Self { algorithm, heun })
    }

    /// What is integrated, from the network's output at x of step `index`.
    pub fn evaluate(&self, schedule: &DpmSchedule, x: &Tensor, index: usize, model: &mut Model) -> Result<Tensor> {
        let output = model(x, schedule.timesteps[index])?;
        let Level { alpha, s, .. } = schedule.level(index);
        Ok(match self.algorithm {
            Algorithm::Data | Algorithm::DataSde => schedule.prediction.x0(x, &output, alpha, s),
            Algorithm::Noise | Algorithm::NoiseSde => schedule.prediction.noise(x, &output, alpha, s),
        })
    }

    /// From x at level `from` to level `to`. `draw` is the number of the step's noise.
    pub fn step(
        &self,
        x: &Tensor,
        (from, to): (Level, Level),
        outputs: &Polynomial,
        draw: usize,
        draws: &mut Draws,
    ) -> Result<Tensor> {
        let h = to.lambda - from.lambda;
        // The scale of x, the weight of the outputs, the exponent whose integrals weight them, and the noise.
        let (scale, weight, e, noise) = match self.algorithm {
            Algorithm::Data => (to.s / from.s, to.alpha, -h, 0.0),
            Algorithm::DataSde => {
                (to.s / from.s * (-h).exp(), to.alpha, -2.0 * h, to.s * (-(-2.0 * h).exp_m1()).sqrt())
            }
            Algorithm::Noise => (to.alpha / from.alpha, to.s, h, 0.0),
            Algorithm::NoiseSde => (to.alpha / from.alpha, 2.0 * to.s, h, to.s * (2.0 * h).exp_m1().sqrt()),
        };
        let grown = e.exp_m1();
        let (value, slope, bend) = match outputs {
            Polynomial::Constant(value) => (value, None, None),
            Polynomial::Linear(value, slope) => {
                (value, Some((slope, if self.heun { 1.0 - grown / e } else { -0.5 * grown })), None)
            }
            Polynomial::Quadratic(value, slope, bend) => {
                // diffusers has the other sign in the stochastic form.
                let half = if self.algorithm == Algorithm::DataSde { 0.5 } else { -0.5 };
                let bend = bend.as_ref().map(|bend| (bend, -((grown - e) / (e * e) + half)));
                (value, Some((slope, 1.0 - grown / e)), bend)
            }
        };
        let mut next = x * scale - value * (weight * grown);
        for (term, factor) in slope.into_iter().chain(bend) {
            next += term * (weight * factor);
        }
        if noise > 0.0 {
            next += draws(draw)? * noise;
        }
        Ok(next)
    }
}

/// What both classes read.
pub(super) const READS: Reads = Reads {
    spacing: true,
    clip: true,
    zero_snr: true,
    levels: &crate::diffusion::spacing::Levels::USUAL,
    cosine_truncates: false,
    last_is_own: false,
};
