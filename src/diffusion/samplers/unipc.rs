//! UniPC multistep (Zhao, Bai, Rao, Zhou & Lu 2023, algorithms 5 to 8, the B(h) form with data prediction): a predictor
//! of order p, and a corrector that uses the network's answer at the step's end, which the next step needs anyway.

use anyhow::Result;
use tch::Tensor;

use super::dpm_schedule::{DpmSchedule, Level, Reads};
use super::walk::{Draws, Model, Walk};
use crate::diffusion::settings::{Settings, Unsupported};
use crate::diffusion::spacing::Levels;

pub(super) struct UniPc {
    schedule: DpmSchedule,
    order: usize,
    /// B(h) is h, not eʰ − 1.
    plain_b: bool,
    lower_last: bool,
    /// Steps that are not corrected.
    uncorrected: Vec<f64>,
}

impl UniPc {
    pub fn new(settings: Settings, steps: i64) -> Result<Self> {
        settings.refuse_true(&["thresholding"])?;
        for (key, unsupported) in
            [("predict_x0", !settings.truth("predict_x0", true)?), ("solver_p", settings.get("solver_p").is_some())]
        {
            if unsupported {
                let value = settings.get(key).map_or_else(String::new, ToString::to_string);
                let text = format!("scheduler_config.json `{key}` is {value}, which this version does not support");
                return Err(Unsupported(text).into());
            }
        }
        let reads = Reads {
            spacing: true,
            clip: false,
            zero_snr: true,
            levels: &Levels::USUAL,
            cosine_truncates: false,
            last_is_own: true,
        };
        Ok(Self {
            schedule: DpmSchedule::new(settings, steps, &reads)?,
            order: settings.choice_of_numbers("solver_order", 2, &[1, 2, 3, 4])? as usize,
            plain_b: settings.choice(
                "solver_type",
                false,
                &[("bh2", false), ("bh1", true), ("midpoint", false), ("heun", false), ("logrho", false)],
            )?,
            lower_last: settings.truth("lower_order_final", true)?,
            uncorrected: settings.numbers("disable_corrector")?.unwrap_or_default(),
        })
    }

    fn order_at(&self, index: usize) -> usize {
        let left = self.schedule.timesteps.len() - index;
        // Without noise at its end a step has an infinite h, which only the first order can take.
        let order = if left == 1 && self.schedule.ends_at_zero() { 1 } else { self.order };
        let order = if self.lower_last { order.min(left) } else { order };
        order.min(index + 1)
    }

    /// From x at step `index` to its end with the x₀ of this step and those before (newest last); with that at the end,
    /// `after`, corrected.
    fn step(&self, x: &Tensor, index: usize, history: &[Tensor], order: usize, after: Option<&Tensor>) -> Tensor {
        let (from, to): (Level, Level) = (self.schedule.level(index), self.schedule.level(index + 1));
        let h = to.lambda - from.lambda;
        let grown = (-h).exp_m1();
        let b = if self.plain_b { -h } else { grown };
        let newest = &history[history.len() - 1];
        let next = x * (to.s / from.s) - newest * (to.alpha * grown);

        // The other x₀ at their places r in the step, as differences from the newest.
        let mut places: Vec<f64> =
            (1..order).map(|back| (self.schedule.level(index - back).lambda - from.lambda) / h).collect();
        let mut differences: Vec<Tensor> =
            places.iter().enumerate().map(|(i, r)| (&history[history.len() - 2 - i] - newest) / *r).collect();
        if let Some(after) = after {
            places.push(1.0);
            differences.push(after - newest);
        }
        let weights = match (places.len(), after) {
            // diffusers' short forms.
            (1, _) => vec![0.5],
            _ => weights(&places, -h, b),
        };
        differences
            .iter()
            .zip(weights)
            .fold(next, |next, (difference, weight)| next - difference * (to.alpha * b * weight))
    }
}

/// The solution of Σ_k r_k^(i−1) w_k = i! φ_(i+1)(hh) hh / b for i = 1 … n (Zhao et al. 2023, eq. 11).
fn weights(places: &[f64], hh: f64, b: f64) -> Vec<f64> {
    let n = places.len();
    let mut phi = hh.exp_m1() / hh - 1.0;
    let mut factorial = 1.0;
    // Rows of the matrix with the right side behind.
    let mut rows: Vec<Vec<f64>> = Vec::with_capacity(n);
    for i in 0..n {
        let mut row: Vec<f64> = places.iter().map(|r| r.powi(i as i32)).collect();
        row.push(phi * factorial / b);
        rows.push(row);
        factorial *= (i + 2) as f64;
        phi = phi / hh - 1.0 / factorial;
    }
    // Gauss and Jordan, with pivots: at most 4 rows.
    for column in 0..n {
        let pivot = (column..n).max_by(|&a, &b| rows[a][column].abs().total_cmp(&rows[b][column].abs()));
        rows.swap(column, pivot.unwrap_or(column));
        let pivot = rows[column].clone();
        for (index, row) in rows.iter_mut().enumerate() {
            let factor = if index == column { 0.0 } else { row[column] / pivot[column] };
            row.iter_mut().zip(&pivot).for_each(|(value, pivot)| *value -= factor * pivot);
        }
    }
    rows.iter().enumerate().map(|(index, row)| row[n] / row[index]).collect()
}

impl Walk for UniPc {
    fn timesteps(&self) -> Vec<f64> {
        self.schedule.timesteps.clone()
    }

    fn walk(&self, mut x: Tensor, model: &mut Model, _draws: &mut Draws) -> Result<Tensor> {
        // The x₀ at the steps so far, newest last, and x before the last step.
        let mut history: Vec<Tensor> = Vec::new();
        let mut before = x.shallow_clone();
        for (index, &t) in self.schedule.timesteps.iter().enumerate() {
            let output = model(&x, t)?;
            let Level { alpha, s, .. } = self.schedule.level(index);
            let x0 = self.schedule.prediction.x0(&x, &output, alpha, s);
            if index > 0 && !self.uncorrected.contains(&((index - 1) as f64)) {
                x = self.step(&before, index - 1, &history, self.order_at(index - 1), Some(&x0));
            }
            history.push(x0);
            if history.len() > self.order {
                let _oldest = history.remove(0);
            }
            before = x.shallow_clone();
            x = self.step(&x, index, &history, self.order_at(index), None);
        }
        Ok(x)
    }
}
