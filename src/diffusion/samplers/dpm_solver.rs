//! DPM-Solver++ multistep (Lu et al. 2022b, algorithm 2; the default, of order 2 and midpoint, is "2M"), and the older
//! and the stochastic forms that diffusers' `algorithm_type` names: the network's outputs at the last steps, as a
//! polynomial in λ.

use anyhow::Result;
use tch::Tensor;

use super::dpm_kernel::{Kernel, Polynomial, READS};
use super::dpm_schedule::{DpmSchedule, Reads};
use super::walk::{Draws, Model, Walk};
use crate::diffusion::settings::Settings;
use crate::diffusion::spacing::Levels;

const LEVELS: [(&str, Levels); 4] = [
    ("use_karras_sigmas", Levels::Karras),
    ("use_lu_lambdas", Levels::Lu),
    ("use_exponential_sigmas", Levels::Exponential),
    ("use_beta_sigmas", Levels::Beta),
];

pub(super) struct DpmSolver {
    schedule: DpmSchedule,
    kernel: Kernel,
    order: usize,
    /// The last step is of first order, that before it of at most second.
    lower_last: bool,
    lower_second_last: bool,
}

impl DpmSolver {
    pub fn new(settings: Settings, steps: i64) -> Result<Self> {
        settings.refuse_true(&["thresholding"])?;
        let schedule = DpmSchedule::new(settings, steps, &Reads { levels: &LEVELS, cosine_truncates: true, ..READS })?;
        let few = settings.truth("lower_order_final", true)? && schedule.timesteps.len() < 15;
        Ok(Self {
            kernel: Kernel::read(settings, &schedule, true)?,
            order: settings.choice_of_numbers("solver_order", 2, &[1, 2, 3])? as usize,
            lower_last: few || settings.truth("euler_at_final", false)? || schedule.ends_at_zero(),
            lower_second_last: few,
            schedule,
        })
    }

    fn order_at(&self, index: usize) -> usize {
        let left = self.schedule.timesteps.len() - index;
        if left == 1 && self.lower_last {
            1
        } else if left == 2 && self.lower_second_last {
            self.order.min(index + 1).min(2)
        } else {
            self.order.min(index + 1)
        }
    }

    /// The outputs, newest last, as a polynomial of `order` terms about step `index`.
    fn polynomial(&self, history: &[Tensor], index: usize, order: usize) -> Polynomial {
        let lambda = |index: usize| self.schedule.level(index).lambda;
        let h = lambda(index + 1) - lambda(index);
        let newest = history.len() - 1;
        // Slopes per step of length h.
        let slope = |back: usize| {
            let ratio = (lambda(index - back) - lambda(index - back - 1)) / h;
            ((&history[newest - back] - &history[newest - back - 1]) / ratio, ratio)
        };
        let value = history[newest].shallow_clone();
        match order {
            1 => Polynomial::Constant(value),
            2 => Polynomial::Linear(value, slope(0).0),
            _ => {
                let ((near, r0), (far, r1)) = (slope(0), slope(1));
                let bend = (&near - far) / (r0 + r1);
                Polynomial::Quadratic(value, near + &bend * r0, Some(bend))
            }
        }
    }
}

impl Walk for DpmSolver {
    fn timesteps(&self) -> Vec<f64> {
        self.schedule.timesteps.clone()
    }

    fn walk(&self, mut x: Tensor, model: &mut Model, draws: &mut Draws) -> Result<Tensor> {
        // The outputs at the steps so far, newest last.
        let mut history: Vec<Tensor> = Vec::new();
        for index in 0..self.schedule.timesteps.len() {
            history.push(self.kernel.evaluate(&self.schedule, &x, index, model)?);
            if history.len() > self.order {
                let _oldest = history.remove(0);
            }
            let outputs = self.polynomial(&history, index, self.order_at(index));
            let levels = (self.schedule.level(index), self.schedule.level(index + 1));
            x = self.kernel.step(&x, levels, &outputs, index, draws)?;
        }
        Ok(x)
    }
}
