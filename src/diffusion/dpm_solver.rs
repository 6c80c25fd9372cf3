//! DPM-Solver++ multistep (Lu et al. 2022b, algorithm 2; the default, of order 2 and midpoint, is "2M").
//!
//! Symbols: α = 1/√(σ²+1) and s = σα the amplitudes of x₀ and ε in x, λ = log(α/s) = −log σ, h the step in λ. The
//! solver integrates the network's x₀ as a polynomial in λ through its last values.

use anyhow::Result;
use tch::Tensor;

use super::sampler::{Model, Walk};
use super::schedule::{BetaDefaults, Prediction, alphas_cumprod};
use super::settings::Settings;
use super::spacing::{Levels, Sigmas, Spacing, last_sigma, leading, linspace, trailing, within};

pub(super) struct DpmSolver {
    timesteps: Vec<f64>,
    /// One for each timestep, and the last.
    sigmas: Vec<f64>,
    order: usize,
    heun: bool,
    /// The last step is of first order, that before it of at most second.
    lower_last: bool,
    lower_second_last: bool,
    prediction: Prediction,
}

/// α and s of a noise level.
fn amplitudes(sigma: f64) -> (f64, f64) {
    let alpha = 1.0 / (sigma * sigma + 1.0).sqrt();
    (alpha, sigma * alpha)
}

impl DpmSolver {
    pub fn new(settings: Settings, steps: i64) -> Result<Self> {
        settings.refuse_true(&["thresholding", "use_beta_sigmas", "use_flow_sigmas", "use_dynamic_shifting"])?;
        // The other algorithm types predict ε, or add noise, and are other samplers; "deis" is diffusers' own alias.
        settings.choice("algorithm_type", (), &[("dpmsolver++", ()), ("deis", ())])?;
        let mut alphas_cumprod = alphas_cumprod(settings, BetaDefaults::USUAL, true)?;
        let train = alphas_cumprod.len() as i64;
        let table = Sigmas::new(&mut alphas_cumprod, settings)?;

        // Timesteps whose λ is under `lambda_min_clipped` are not walked; needed by the cosine schedule.
        let least_lambda = settings.number("lambda_min_clipped", f64::NEG_INFINITY)?;
        let clipped = table.0.iter().rev().take_while(|sigma| -sigma.ln() < least_lambda).count() as i64;
        let last = train - clipped;
        let offset = settings.integer("steps_offset", 0, 0)?;
        let mut timesteps: Vec<f64> = match Spacing::read(settings, Spacing::Linspace)? {
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

        let levels = Levels::read(
            settings,
            &[
                ("use_karras_sigmas", Levels::Karras),
                ("use_lu_lambdas", Levels::Lu),
                ("use_exponential_sigmas", Levels::Exponential),
            ],
        )?;
        let mut sigmas: Vec<f64> = if levels == Levels::OfTimesteps {
            timesteps.iter().map(|&t| table.at(t)).collect()
        } else {
            // Not this sampler's keys, but diffusers finds Euler's.
            let limit = |key| if levels == Levels::Lu { Ok(None) } else { settings.optional_number(key) };
            let most = limit("sigma_max")?.unwrap_or(table.most());
            let least = limit("sigma_min")?.unwrap_or(table.least());
            let sigmas = levels.spread(most, least, steps);
            let cosine = settings.choice(
                "beta_schedule",
                false,
                &[("linear", false), ("scaled_linear", false), ("squaredcos_cap_v2", true)],
            )?;
            let rounds = levels != Levels::Exponential && !cosine;
            let whole = |t: f64| if rounds { t.round_ties_even() } else { t.trunc() };
            timesteps = sigmas.iter().map(|&sigma| whole(table.timestep_of(sigma))).collect();
            sigmas
        };
        let last_sigma = last_sigma(settings, &table)?;
        sigmas.push(last_sigma);

        let few = settings.truth("lower_order_final", true)? && timesteps.len() < 15;
        Ok(Self {
            order: settings.choice_of_numbers("solver_order", 2, &[1, 2, 3])? as usize,
            heun: settings.choice(
                "solver_type",
                false,
                &[("midpoint", false), ("heun", true), ("logrho", false), ("bh1", false), ("bh2", false)],
            )?,
            lower_last: few || settings.truth("euler_at_final", false)? || last_sigma == 0.0,
            lower_second_last: few,
            prediction: Prediction::from_settings(settings)?,
            timesteps,
            sigmas,
        })
    }

    fn order_at(&self, index: usize) -> usize {
        let left = self.timesteps.len() - index;
        if left == 1 && self.lower_last {
            1
        } else if left == 2 && self.lower_second_last {
            self.order.min(index + 1).min(2)
        } else {
            self.order.min(index + 1)
        }
    }
}

impl Walk for DpmSolver {
    fn timesteps(&self) -> Vec<f64> {
        self.timesteps.clone()
    }

    fn init_noise_sigma(&self) -> f64 {
        1.0
    }

    fn walk(&self, mut x: Tensor, model: &mut Model) -> Result<Tensor> {
        let lambda = |index: usize| -self.sigmas[index].ln();
        // The network's x₀ at the steps so far, newest last.
        let mut history: Vec<Tensor> = Vec::new();
        for (index, &t) in self.timesteps.iter().enumerate() {
            let output = model(&x, t)?;
            let (alpha, s) = amplitudes(self.sigmas[index]);
            history.push(match self.prediction {
                Prediction::Epsilon => (&x - output * s) / alpha,
                Prediction::VPrediction => &x * alpha - output * s,
            });
            if history.len() > self.order {
                let _oldest = history.remove(0);
            }
            let newest = history.len() - 1;
            let (next_alpha, next_s) = amplitudes(self.sigmas[index + 1]);
            let h = lambda(index + 1) - lambda(index);
            let decay = (-h).exp() - 1.0;
            let mut next = &x * (next_s / s) - &history[newest] * (next_alpha * decay);
            // Slopes of x₀, per step of length h.
            let slope = |back: usize| {
                let ratio = (lambda(index - back) - lambda(index - back - 1)) / h;
                ((&history[newest - back] - &history[newest - back - 1]) / ratio, ratio)
            };
            match self.order_at(index) {
                1 => {}
                2 => {
                    let (slope, _) = slope(0);
                    let weight = if self.heun { decay / h + 1.0 } else { -0.5 * decay };
                    next += slope * (next_alpha * weight);
                }
                _ => {
                    let ((near, r0), (far, r1)) = (slope(0), slope(1));
                    let bend = (&near - far) / (r0 + r1);
                    next += (near + &bend * r0) * (next_alpha * (decay / h + 1.0));
                    next -= bend * (next_alpha * ((decay + h) / (h * h) - 0.5));
                }
            }
            x = next;
        }
        Ok(x)
    }
}
