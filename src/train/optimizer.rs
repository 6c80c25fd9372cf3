//! AdamW (Loshchilov and Hutter 2019, algorithm 2) on plain tensors, so that its state can be saved and restored.

use anyhow::Result;
use tch::Tensor;

use crate::torch::{Arg, call};

/// The constants of one AdamW step.
#[derive(Clone, Copy, Debug)]
pub struct AdamW {
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    pub weight_decay: f64,
}

/// One parameter with its moments; all of one shape.
pub struct Moments {
    pub exp_avg: Tensor,
    pub exp_avg_sq: Tensor,
    /// Steps that these moments have seen: the bias correction's exponent. A scalar tensor, as libtorch wants it.
    pub step: Tensor,
}

impl Moments {
    pub fn zeros_like(parameter: &Tensor) -> Self {
        Self {
            exp_avg: parameter.zeros_like(),
            exp_avg_sq: parameter.zeros_like(),
            step: Tensor::zeros([], (tch::Kind::Float, parameter.device())),
        }
    }
}

impl AdamW {
    /// Updates `parameters` in place by libtorch's fused kernel.
    ///
    /// # Errors
    /// libtorch's message, when shapes or types differ.
    pub fn step(&self, parameters: &[&Tensor], gradients: &[&Tensor], moments: &[&Moments], lr: f64) -> Result<()> {
        if parameters.is_empty() {
            return Ok(());
        }
        let _guard = tch::no_grad_guard();
        let steps: Vec<&Tensor> = moments.iter().map(|m| &m.step).collect();
        for step in &steps {
            let _ = step.shallow_clone().g_add_scalar_(1.0);
        }
        let exp_avgs: Vec<&Tensor> = moments.iter().map(|m| &m.exp_avg).collect();
        let exp_avg_sqs: Vec<&Tensor> = moments.iter().map(|m| &m.exp_avg_sq).collect();
        call(
            "aten::_fused_adamw_",
            "",
            &[
                Arg::Tensors(parameters),
                Arg::Tensors(gradients),
                Arg::Tensors(&exp_avgs),
                Arg::Tensors(&exp_avg_sqs),
                Arg::Tensors(&[]),
                Arg::Tensors(&steps),
                Arg::Double(lr),
                Arg::Double(self.beta1),
                Arg::Double(self.beta2),
                Arg::Double(self.weight_decay),
                Arg::Double(self.eps),
                Arg::Bool(false),
                Arg::Bool(false),
                Arg::None,
                Arg::None,
            ],
        )?;
        Ok(())
    }
}

/// Scales the gradients so that their common L2 norm is at most `max_norm` (as `torch.nn.utils.clip_grad_norm_`);
/// returns the norm before.
pub fn clip_gradients(gradients: &[&Tensor], max_norm: f64) -> f64 {
    let _guard = tch::no_grad_guard();
    if gradients.is_empty() {
        return 0.0;
    }
    let norms: Vec<Tensor> = gradients.iter().map(|g| g.norm().to_kind(tch::Kind::Float)).collect();
    let total = Tensor::stack(&norms, 0).norm().double_value(&[]);
    let scale = max_norm / (total + 1e-6);
    if max_norm > 0.0 && scale < 1.0 {
        for gradient in gradients {
            let _ = gradient.shallow_clone().g_mul_scalar_(scale);
        }
    }
    total
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::torch::random::{Purpose, generator, normal};

    #[test]
    fn fused_step_equals_the_formula() {
        let draw = |i| normal(&mut generator(5, Purpose::Initial, i), &[37, 5]);
        let (parameter, expected) = (draw(0), draw(0));
        let adamw = AdamW { beta1: 0.9, beta2: 0.99, eps: 1e-8, weight_decay: 0.05 };
        let moments = Moments::zeros_like(&parameter);
        let (mut m, mut v, lr) = (expected.zeros_like(), expected.zeros_like(), 0.01);
        let mut expected = expected;
        for t in 1..=4 {
            let gradient = draw(t);
            adamw.step(&[&parameter], &[&gradient], &[&moments], lr).unwrap();
            m = m * 0.9 + &gradient * 0.1;
            v = v * 0.99 + gradient.square() * 0.01;
            let (m_hat, v_hat) = (&m / (1.0 - 0.9f64.powi(t as i32)), &v / (1.0 - 0.99f64.powi(t as i32)));
            expected = &expected * (1.0 - lr * 0.05) - m_hat / (v_hat.sqrt() + 1e-8) * lr;
        }
        let error = (&parameter - &expected).abs().max().double_value(&[]);
        assert!(error < 1e-6, "{error}");
    }

    #[test]
    fn clipping_keeps_small_gradients_and_scales_large_ones() {
        let (a, b) = (Tensor::from_slice(&[3f32, 0.0]), Tensor::from_slice(&[4f32]));
        assert_eq!(clip_gradients(&[&a, &b], 10.0), 5.0);
        assert_eq!(a.double_value(&[0]), 3.0);
        clip_gradients(&[&a, &b], 1.0);
        assert!((a.double_value(&[0]) - 0.6).abs() < 1e-6 && (b.double_value(&[0]) - 0.8).abs() < 1e-6);
    }
}
