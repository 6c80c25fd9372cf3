//! PNDM (Liu, Ren, Lin & Zhao 2022): pseudo linear multistep (PLMS), begun by three pseudo Runge–Kutta steps (PRK),
//! or, with `skip_prk_steps` as Stable Diffusion has it, by one step that is taken twice.

use anyhow::{Result, bail};
use tch::Tensor;

use super::walk::{Draws, Model, Walk};
use crate::diffusion::schedule::{BetaDefaults, Prediction, alphas_cumprod};
use crate::diffusion::settings::Settings;
use crate::diffusion::spacing::{Spacing, timesteps};

pub(super) struct Pndm {
    /// Evaluations of the Runge–Kutta steps, four each; none with `skip_prk_steps`.
    runge_kutta: Vec<i64>,
    /// Evaluations of the multistep part.
    multistep: Vec<i64>,
    /// Training timesteps per step.
    stride: i64,
    alphas_cumprod: Vec<f64>,
    final_alpha: f64,
    prediction: Prediction,
}

impl Pndm {
    pub fn new(settings: Settings, steps: i64) -> Result<Self> {
        // PNDM has no `rescale_betas_zero_snr`.
        let alphas_cumprod = alphas_cumprod(settings, BetaDefaults::USUAL, false)?;
        let train = alphas_cumprod.len() as i64;
        let offset = settings.integer("steps_offset", 0, 0)?;
        let timesteps = timesteps(Spacing::read(settings, Spacing::Leading)?, train, steps, offset)?;
        let falling: Vec<i64> = timesteps.into_iter().map(|t| t.round_ties_even() as i64).collect();
        let stride = train / steps;
        let (runge_kutta, multistep) = if settings.truth("skip_prk_steps", false)? {
            // The second timestep twice: predicted with the first slope, then corrected with the mean of two.
            let second = falling.get(1).into_iter();
            (Vec::new(), falling.iter().take(1).chain(second).chain(falling.iter().skip(1)).copied().collect())
        } else {
            if falling.len() < 4 {
                bail!("{steps} steps: pndm without `skip_prk_steps` takes at least 4");
            }
            let half = stride / 2;
            let rounds = falling.windows(2).take(3);
            let evaluations = rounds.flat_map(|pair| [pair[0], pair[1] + half, pair[1] + half, pair[1]]);
            (evaluations.collect(), falling[3..].to_vec())
        };
        Ok(Self {
            runge_kutta,
            multistep,
            stride,
            final_alpha: if settings.truth("set_alpha_to_one", false)? { 1.0 } else { alphas_cumprod[0] },
            alphas_cumprod,
            prediction: Prediction::from_settings(settings)?,
        })
    }

    /// From x at timestep `from` to `to`, along `output` (eq. 9 and 11 of the paper).
    fn transfer(&self, x: &Tensor, from: i64, to: i64, output: &Tensor) -> Result<Tensor> {
        let alpha_at = |t: i64| match usize::try_from(t) {
            Err(_) => Ok(self.final_alpha),
            Ok(t) => match self.alphas_cumprod.get(t) {
                Some(alpha) => Ok(*alpha),
                None => bail!("pndm needs timestep {t}, beyond the schedule's last; take another number of steps"),
            },
        };
        let (alpha, next) = (alpha_at(from)?, alpha_at(to)?);
        let noise = self.prediction.noise(x, output, alpha.sqrt(), (1.0 - alpha).sqrt());
        let denominator = alpha * (1.0 - next).sqrt() + (alpha * (1.0 - alpha) * next).sqrt();
        Ok(x * (next / alpha).sqrt() - noise * ((next - alpha) / denominator))
    }
}

impl Walk for Pndm {
    fn timesteps(&self) -> Vec<f64> {
        self.runge_kutta.iter().chain(&self.multistep).map(|&t| t as f64).collect()
    }

    fn walk(&self, mut x: Tensor, model: &mut Model, _draws: &mut Draws) -> Result<Tensor> {
        // The outputs at the last four timesteps, newest last.
        let mut outputs: Vec<Tensor> = Vec::new();
        let half = self.stride / 2;
        for round in self.runge_kutta.chunks_exact(4) {
            let (start, from) = (x.shallow_clone(), round[0]);
            let first = model(&x, round[0] as f64)?;
            x = self.transfer(&start, from, round[0] - half, &first)?;
            let second = model(&x, round[1] as f64)?;
            x = self.transfer(&start, from, round[1], &second)?;
            let third = model(&x, round[2] as f64)?;
            x = self.transfer(&start, from, round[2] - half, &third)?;
            let fourth = model(&x, round[3] as f64)?;
            let mean = (&first + fourth) / 6.0 + (second + third) / 3.0;
            x = self.transfer(&start, from, round[3], &mean)?;
            outputs.push(first);
        }
        let corrects_second = self.runge_kutta.is_empty();
        let mut start = x.shallow_clone();
        for (index, &t) in self.multistep.iter().enumerate() {
            let output = model(&x, t as f64)?;
            if corrects_second && index == 1 {
                // Back to the start, and over the first step again with the mean of the slopes at its two ends.
                let mean = (&output + &outputs[0]) / 2.0;
                x = self.transfer(&start, t + self.stride, t, &mean)?;
                continue;
            }
            outputs.push(output);
            if outputs.len() > 4 {
                let _oldest = outputs.remove(0);
            }
            let slope = match outputs.as_slice() {
                [a] => a.shallow_clone(),
                [b, a] => (a * 3.0 - b) / 2.0,
                [c, b, a] => (a * 23.0 - b * 16.0 + c * 5.0) / 12.0,
                [d, c, b, a] => (a * 55.0 - b * 59.0 + c * 37.0 - d * 9.0) / 24.0,
                _ => bail!("pndm keeps one to four outputs"),
            };
            start = x;
            x = self.transfer(&start, t, t - self.stride, &slope)?;
        }
        Ok(x)
    }
}
