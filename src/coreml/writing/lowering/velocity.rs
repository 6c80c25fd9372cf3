//! Networks that predict v, exported as networks that predict ε, the only kind that Apple's programs know.
//!
//! ε = √ᾱ_t v + √(1 − ᾱ_t) x_t (Salimans & Ho 2022, appendix D; symbols as in [`NoiseSchedule`]). Both roots are tables
//! over t in the package, in fp32 as all of this is: at small t the two terms nearly are v and nothing, at large t
//! nothing and x_t, and what is nothing must not be noise of rounding.

use std::io::{Seek, Write};

use anyhow::{Result, ensure};

use super::interpreter::{MilOps, MilValue};
use crate::coreml::format::proto::data_type::{FLOAT32, INT32};
use crate::coreml::writing::program::{Parameter, Var};
use crate::diffusion::{NoiseSchedule, Prediction};

/// What turns a prediction of v into one of ε, for each timestep.
#[derive(Clone, Debug, PartialEq)]
pub struct Velocity {
    /// √ᾱ_t
    signal: Vec<f32>,
    /// √(1 − ᾱ_t)
    spread: Vec<f32>,
}

impl Velocity {
    /// The tables of a schedule whose networks predict v; nothing for those that predict ε already.
    pub fn of(schedule: &NoiseSchedule) -> Option<Self> {
        let root = |of: fn(f64) -> f64| schedule.alphas_cumprod.iter().map(|&alpha| of(alpha).sqrt() as f32).collect();
        (schedule.prediction == Prediction::VPrediction)
            .then(|| Self { signal: root(|alpha| alpha), spread: root(|alpha| 1.0 - alpha) })
    }
}

impl<W: Write + Seek> MilOps<'_, W> {
    /// ε in fp32 of `v` and `sample` `[B, C, h, w]` at `timestep` `[B]`.
    pub fn noise_of_velocity(
        &mut self,
        v: &MilValue,
        sample: &MilValue,
        timestep: &MilValue,
        velocity: &Velocity,
    ) -> MilValue {
        self.value(v.shape.clone(), |ops, _| {
            ensure!(v.shape == sample.shape, "v has the shape {:?}, and the sample {:?}", v.shape, sample.shape);
            let t = ops.cast("timestep_to_int32", &timestep.var, INT32);
            let signal = ops.at_timestep("noise_signal", &velocity.signal, &t)?;
            let spread = ops.at_timestep("noise_spread", &velocity.spread, &t)?;
            let v = ops.cast("velocity_to_fp32", &v.var, FLOAT32);
            let sample = ops.cast("sample_to_fp32", &sample.var, FLOAT32);
            let v = ops.binary("mul", "noise_of_velocity", &v, Parameter::Var(&signal));
            let sample = ops.binary("mul", "noise_of_sample", &sample, Parameter::Var(&spread));
            Ok(ops.binary("add", "noise", &v, Parameter::Var(&sample)))
        })
    }

    /// The entries of `table` at `t` `[B]`, as `[B, 1, 1, 1]`.
    fn at_timestep(&mut self, name: &str, table: &[f32], t: &Var) -> Result<Var> {
        let bytes: Vec<u8> = table.iter().flat_map(|value| value.to_le_bytes()).collect();
        let table = self.program.tensor(&format!("{name}_table"), FLOAT32, &[table.len() as i64], &bytes)?;
        let found = self.gather(&format!("{name}_found"), &table, t, 0, t.shape.clone());
        let parameters = [("x", Parameter::Var(&found)), ("axes", Parameter::Ints(&[1, 2, 3]))];
        Ok(self.program.op("expand_dims", name, &parameters, FLOAT32, vec![t.shape[0], 1, 1, 1]))
    }
}
