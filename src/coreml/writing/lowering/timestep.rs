//! The sinusoids of a timestep.

use std::io::{Seek, Write};

use anyhow::Result;
use tch::{Device, Kind, Tensor};

use super::interpreter::MilOps;
use crate::coreml::format::proto::data_type::{FLOAT16, FLOAT32};
use crate::coreml::writing::program::{Parameter, Var};

impl<W: Write + Seek> MilOps<'_, W> {
    /// Of `t` `[B]`, or of n numbers `[B, n, 1, 1]`, one after the other: `[B, n·dim, 1, 1]`.
    pub(super) fn sinusoids(&mut self, t: &Var, dim: i64, flip: bool, shift: f64, out: Vec<i64>) -> Result<Var> {
        let (batch, half) = (out[0], dim / 2);
        let numbers: i64 = t.shape[1..].iter().product();
        // One number's lie along the channels at once; those of several behind their numbers first.
        let axis = if numbers == 1 { 1 } else { 2 };
        let lying = |size: i64| {
            let mut shape = vec![1; 4];
            shape[axis] = size;
            shape
        };
        // The very numbers that `ops::Tensors` computes.
        let exponents = Tensor::f_arange(half, (Kind::Float, Device::Cpu))?
            .f_mul_scalar(-(10_000f64.ln()) / (half as f64 - shift))?;
        let frequencies: Vec<f32> = Vec::try_from(exponents.f_exp()?)?;
        let bytes: Vec<u8> = frequencies.iter().flat_map(|value| value.to_le_bytes()).collect();

        let mut t = self.cast("timestep_to_fp32", t, FLOAT32);
        if t.shape.len() == 1 {
            let parameters = [("x", Parameter::Var(&t)), ("axes", Parameter::Ints(&[1, 2, 3]))];
            t = self.program.op("expand_dims", "timestep_expanded", &parameters, FLOAT32, vec![batch, 1, 1, 1]);
        }
        let frequencies = self.program.tensor("time_frequencies", FLOAT32, &lying(half), &bytes)?;
        let parameters = [("x", Parameter::Var(&t)), ("y", Parameter::Var(&frequencies))];
        let mut shape = t.shape.clone();
        shape[axis] = half;
        let angles = self.program.op("mul", "time_angles", &parameters, FLOAT32, shape.clone());
        let sin = self.unary("sin", "time_sin", &angles);
        let cos = self.unary("cos", "time_cos", &angles);
        let mut parts = if flip { vec![&cos, &sin] } else { vec![&sin, &cos] };
        let zeros;
        if dim % 2 == 1 {
            shape[axis] = 1;
            let bytes = vec![0; 4 * (batch * numbers) as usize];
            zeros = self.program.tensor("time_padding", FLOAT32, &shape, &bytes)?;
            parts.push(&zeros);
        }
        let mut embedding = self.concat("time_sinusoids", parts, axis);
        if embedding.shape != out {
            embedding = self.reshape("time_sinusoids_in_a_row", &embedding, out);
        }
        Ok(if self.element == FLOAT32 { embedding } else { self.cast("time_sinusoids_to_fp16", &embedding, FLOAT16) })
    }
}
