//! Learning-rate schedules, as diffusers' `optimization.py` defines them: a factor on the base rate, a function of
//! the step.

use std::f64::consts::PI;

use crate::config::{LrScheduler as Shape, POLYNOMIAL_END};

/// A schedule over `total` steps, the first `warmup` of them rising linearly. [`Shape::Constant`] warms up too, as
/// [`Shape::ConstantWithWarmup`] does; diffusers' "constant" would ignore the warm-up.
#[derive(Clone, Copy, Debug)]
pub struct LearningRate {
    pub shape: Shape,
    pub base: f64,
    pub warmup: u64,
    pub total: u64,
    /// Restarts of [`Shape::CosineWithRestarts`].
    pub cycles: f64,
    /// Exponent of [`Shape::Polynomial`], which ends at [`POLYNOMIAL_END`].
    pub power: f64,
}

impl LearningRate {
    /// The rate of step `step`, counted from 0.
    pub fn at(&self, step: u64) -> f64 {
        if step < self.warmup {
            return self.base * step as f64 / self.warmup.max(1) as f64;
        }
        let rest = self.total.saturating_sub(self.warmup).max(1) as f64;
        let progress = ((step - self.warmup) as f64 / rest).min(1.0);
        let factor = match self.shape {
            Shape::Constant | Shape::ConstantWithWarmup => 1.0,
            Shape::Linear => 1.0 - progress,
            Shape::Cosine => 0.5 * (1.0 + (PI * progress).cos()),
            Shape::CosineWithRestarts if progress >= 1.0 => 0.0,
            Shape::CosineWithRestarts => 0.5 * (1.0 + (PI * ((self.cycles * progress) % 1.0)).cos()),
            Shape::Polynomial => {
                let end = POLYNOMIAL_END / self.base;
                (1.0 - end) * (1.0 - progress).powf(self.power) + end
            }
        };
        self.base * factor
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Without a warm-up it is diffusers' "constant".
    #[test]
    fn a_constant_rate_warms_up() {
        let rate =
            |warmup| LearningRate { shape: Shape::Constant, base: 1.0, warmup, total: 110, cycles: 1.0, power: 1.0 };
        let steps = [0, 5, 10, 109];
        assert_eq!(steps.map(|step| rate(10).at(step)), [0.0, 0.5, 1.0, 1.0]);
        assert_eq!(steps.map(|step| rate(0).at(step)), [1.0; 4]);
    }

    /// Numbers from diffusers 0.42: `get_scheduler(name, optimizer, num_warmup_steps=10, num_training_steps=110,
    /// num_cycles=2, power=2.0)` with lr 1, after 0, 5, 10, 35, 60 and 109 steps (tests/oracle/learning_rates.py).
    #[test]
    fn schedules_equal_those_of_diffusers() {
        let steps = [0, 5, 10, 35, 60, 109];
        let expected = [
            (Shape::ConstantWithWarmup, [0.0, 0.5, 1.0, 1.0, 1.0, 1.0]),
            (Shape::Linear, [0.0, 0.5, 1.0, 0.75, 0.5, 0.01]),
            (Shape::Cosine, [0.0, 0.5, 1.0, 0.853_553_390_593_273_7, 0.5, 0.000_246_719_817_134_2]),
            (Shape::CosineWithRestarts, [0.0, 0.5, 1.0, 0.5, 1.0, 0.000_986_635_785_864_220_5]),
            (Shape::Polynomial, [0.0, 0.5, 1.0, 0.562_500_043_75, 0.250_000_075, 0.000_100_099_990_000_000_18]),
        ];
        for (shape, factors) in expected {
            let rate = LearningRate { shape, base: 1.0, warmup: 10, total: 110, cycles: 2.0, power: 2.0 };
            for (step, factor) in steps.into_iter().zip(factors) {
                let got = rate.at(step);
                assert!((got - factor).abs() < 1e-12, "{shape:?} after {step} steps: {got}, diffusers {factor}");
            }
        }
    }
}
