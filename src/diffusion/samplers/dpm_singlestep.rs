//! DPM-Solver++ singlestep (Lu et al. 2022b, algorithm 1; of order 2 it is "2S"): rounds of as many evaluations as the
//! order has, each from where the round began, with all that the round has found so far.

use anyhow::Result;
use tch::Tensor;

use super::dpm_kernel::{Kernel, Polynomial, READS};
use super::dpm_schedule::{DpmSchedule, Reads};
use super::walk::{Draws, Model, Walk};
use crate::diffusion::settings::Settings;

pub(super) struct DpmSinglestep {
    schedule: DpmSchedule,
    kernel: Kernel,
    /// The place of each step in its round, from 1.
    orders: Vec<usize>,
}

impl DpmSinglestep {
    pub fn new(settings: Settings, steps: i64) -> Result<Self> {
        settings.refuse_true(&["thresholding"])?;
        // The class reads no spacing.
        let schedule = DpmSchedule::new(settings, steps, &Reads { spacing: false, zero_snr: false, ..READS })?;
        let order = settings.choice_of_numbers("solver_order", 2, &[1, 2, 3])? as usize;
        let lower_last = settings.truth("lower_order_final", false)?
            || schedule.ends_at_zero()
            || schedule.timesteps.len() % order != 0;
        Ok(Self {
            kernel: Kernel::read(settings, &schedule, false)?,
            orders: orders(schedule.timesteps.len(), order, lower_last, schedule.ends_at_zero()),
            schedule,
        })
    }
}

/// Rounds of 1 … `order`; with `lower_last` the last are shorter.
fn orders(steps: usize, order: usize, lower_last: bool, ends_at_zero: bool) -> Vec<usize> {
    let mut orders: Vec<usize> = (0..steps).map(|index| index % order + 1).collect();
    if lower_last && steps.is_multiple_of(order) && order > 1 {
        // A whole last round of third order becomes one of second and one of first.
        orders[steps - 1] = 1;
    }
    if ends_at_zero {
        orders[steps - 1] = 1;
    }
    orders
}

impl Walk for DpmSinglestep {
    fn timesteps(&self) -> Vec<f64> {
        self.schedule.timesteps.clone()
    }

    fn walk(&self, mut x: Tensor, model: &mut Model, draws: &mut Draws) -> Result<Tensor> {
        let lambda = |index: usize| self.schedule.level(index).lambda;
        // Where the round began, and the outputs that it has found, oldest first.
        let mut start = x.shallow_clone();
        let mut found: Vec<Tensor> = Vec::new();
        for (index, &order) in self.orders.iter().enumerate() {
            if order == 1 {
                start = x.shallow_clone();
                found.clear();
            }
            found.push(self.kernel.evaluate(&self.schedule, &x, index, model)?);
            let first = index + 1 - order;
            let h = lambda(index + 1) - lambda(first);
            let ratio = |index: usize| (lambda(index) - lambda(first)) / h;
            let slope = |place: usize| (&found[place] - &found[0]) / ratio(first + place);
            let value = found[0].shallow_clone();
            let outputs = match order {
                1 => Polynomial::Constant(value),
                2 => Polynomial::Linear(value, slope(1)),
                // Midpoint's third order has no bend.
                _ if !self.kernel.heun => Polynomial::Quadratic(value, slope(2), None),
                _ => {
                    let (near, far) = (ratio(first + 1), ratio(first + 2));
                    let (near_slope, far_slope) = (slope(1), slope(2));
                    let mixed = (&near_slope * far - &far_slope * near) / (far - near);
                    let bend = (far_slope - near_slope) * (2.0 / (far - near));
                    Polynomial::Quadratic(value, mixed, Some(bend))
                }
            };
            let levels = (self.schedule.level(first), self.schedule.level(index + 1));
            x = self.kernel.step(&start, levels, &outputs, index, draws)?;
        }
        Ok(x)
    }
}

#[cfg(test)]
mod tests {
    use super::orders;

    /// diffusers' `get_order_list`.
    #[test]
    fn rounds_are_those_of_diffusers() {
        assert_eq!(orders(6, 3, true, true), [1, 2, 3, 1, 2, 1]);
        assert_eq!(orders(7, 3, true, true), [1, 2, 3, 1, 2, 3, 1]);
        assert_eq!(orders(8, 3, true, true), [1, 2, 3, 1, 2, 3, 1, 1]);
        assert_eq!(orders(8, 3, true, false), [1, 2, 3, 1, 2, 3, 1, 2]);
        assert_eq!(orders(4, 2, true, false), [1, 2, 1, 1]);
        assert_eq!(orders(4, 2, false, false), [1, 2, 1, 2]);
        assert_eq!(orders(5, 2, true, true), [1, 2, 1, 2, 1]);
        assert_eq!(orders(3, 1, true, true), [1, 1, 1]);
    }
}
