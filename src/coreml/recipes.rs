//! Words of the vocabulary that MIL spells with several operations: attention, sinusoids, resizing.

use std::io::{Seek, Write};

use anyhow::{Result, bail, ensure};
use half::f16;
use tch::{Device, Kind, Tensor};

use super::lower::MilOps;
use super::program::{Parameter, Var};
use super::proto::data_type::{FLOAT16, FLOAT32};
use crate::ops::Mask;

impl<W: Write + Seek> MilOps<'_, W> {
    /// `q` and `k` of which the products are those of the given ones times `factor`: see [`half_factors`].
    pub(super) fn scaled_pair(&mut self, q: &Var, k: &Var, factor: f64) -> (Var, Var) {
        if q.element == FLOAT32 {
            let factor = Parameter::Float(factor as f32);
            return (self.binary("mul", "query_scaled", q, factor), k.clone());
        }
        let (first, second) = half_factors(factor);
        let q = self.binary("mul", "query_scaled", q, Parameter::Half(first));
        if second == f16::ONE {
            return (q, k.clone());
        }
        (q, self.binary("mul", "key_scaled", k, Parameter::Half(second)))
    }

    pub(super) fn attend(&mut self, q: &Var, k: &Var, v: &Var, heads: i64, mask: Mask, out: Vec<i64>) -> Result<Var> {
        let (batch, channels, tokens, sources) = (q.shape[0], q.shape[1], q.shape[3], k.shape[3]);
        let size = channels / heads;
        ensure!(size * heads == channels, "{channels} channels do not split into {heads} heads");
        let (q, k) = self.scaled_pair(q, k, 1.0 / (size as f64).sqrt());
        let q = self.reshape("query", &q, vec![batch, heads, size, tokens]);
        let k = self.reshape("key", &k, vec![batch, heads, size, sources]);
        let v = self.reshape("value", v, vec![batch, heads, size, sources]);
        let matmul = |ops: &mut Self, hint: &str, x: &Var, y: &Var, transpose_y: bool, shape: Vec<i64>| {
            let parameters = [
                ("x", Parameter::Var(x)),
                ("y", Parameter::Var(y)),
                ("transpose_x", Parameter::Bool(!transpose_y)),
                ("transpose_y", Parameter::Bool(transpose_y)),
            ];
            ops.program.op("matmul", hint, &parameters, x.element, shape)
        };
        let mut scores = matmul(self, "attention_scores", &q, &k, false, vec![batch, heads, tokens, sources]);
        if mask == Mask::Causal {
            ensure!(tokens == sources, "{tokens} tokens cannot look only at those before them of {sources}");
            let mask = self.causal_mask(tokens)?;
            scores = self.binary("add", "attention_masked", &scores, Parameter::Var(&mask));
        }
        let parameters = [("x", Parameter::Var(&scores)), ("axis", Parameter::Int(3))];
        let weights =
            self.program.op("softmax", "attention_weights", &parameters, scores.element, scores.shape.clone());
        let mixed = matmul(self, "attention_values", &v, &weights, true, vec![batch, heads, size, tokens]);
        Ok(self.reshape("attention", &mixed, out))
    }

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

    pub(super) fn enlarge(&mut self, x: &Var, out: Vec<i64>) -> Result<Var> {
        let (height, width) = (x.shape[2], x.shape[3]);
        let factor = ((out[2] + height - 1) / height, (out[3] + width - 1) / width);
        let enlarged = vec![out[0], out[1], height * factor.0, width * factor.1];
        // Nearest neighbours of 2n - 1 pixels from n are those of 2n without the last: floor(i n / (2n-1)) = floor(i/2).
        let fits = |side: i64, factor: i64, to: i64| side * factor == to || (factor == 2 && to == 2 * side - 1);
        if !fits(height, factor.0, out[2]) || !fits(width, factor.1, out[3]) {
            bail!("a resize from {height}×{width} to {}×{} is not one that Core ML does exactly", out[2], out[3]);
        }
        let parameters = [
            ("x", Parameter::Var(x)),
            ("scale_factor_height", Parameter::Float(factor.0 as f32)),
            ("scale_factor_width", Parameter::Float(factor.1 as f32)),
        ];
        let large = self.program.op("upsample_nearest_neighbor", "upsample", &parameters, x.element, enlarged.clone());
        if enlarged == out {
            return Ok(large);
        }
        let end: Vec<i32> = out.iter().map(|&size| size as i32).collect();
        let parameters =
            [("x", Parameter::Var(&large)), ("begin", Parameter::Ints(&[0, 0, 0, 0])), ("size", Parameter::Ints(&end))];
        Ok(self.program.op("slice_by_size", "upsample_cropped", &parameters, x.element, out))
    }
}

/// Two numbers in fp16 of which the product is `factor` to a few parts in a million; the second is 1 where the first
/// alone will do.
///
/// 1/√40, the scale of Stable Diffusion 1's attention, is off by a part in 5000 in fp16, always to the same side.
pub(super) fn half_factors(factor: f64) -> (f16, f16) {
    let whole = f16::from_f64(factor);
    let error = |first: f16, second: f16| (first.to_f64() * second.to_f64() / factor - 1.0).abs();
    if error(whole, f16::ONE) < 1e-6 {
        return (whole, f16::ONE);
    }
    // All mantissas of one octave: there are 1024, and each leaves an error of at most 2^-11 at random.
    (0..1024)
        .map(|step| {
            let second = f16::from_bits(f16::ONE.to_bits() + step);
            (f16::from_f64(factor / second.to_f64()), second)
        })
        .min_by(|a, b| error(a.0, a.1).total_cmp(&error(b.0, b.1)))
        .unwrap_or((whole, f16::ONE))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scales_are_exact_to_parts_in_a_million() {
        for size in [1, 4, 8, 16, 20, 32, 40, 64, 80, 96, 160] {
            let scale = 1.0 / f64::from(size).sqrt();
            let (first, second) = half_factors(scale);
            assert!((first.to_f64() * second.to_f64() / scale - 1.0).abs() < 5e-6, "{size}: {first} · {second}");
        }
        assert_eq!(half_factors(0.125), (f16::from_f64(0.125), f16::ONE));
    }
}
