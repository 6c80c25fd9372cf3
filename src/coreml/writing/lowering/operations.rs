//! Single operations of MIL, appended to a program.

use std::io::{Seek, Write};

use anyhow::{Result, bail};
use half::f16;

use super::interpreter::MilOps;
use crate::coreml::format::proto::data_type::{FLOAT16, INT32};
use crate::coreml::writing::program::{Parameter, Var};
use crate::ops::Conv;

impl<W: Write + Seek> MilOps<'_, W> {
    /// `x` as fp16, fp32 or int32 ([`data_type`](crate::coreml::format::proto::data_type)).
    pub(super) fn cast(&mut self, name: &str, x: &Var, element: i32) -> Var {
        let to = match element {
            FLOAT16 => "fp16",
            INT32 => "int32",
            _ => "fp32",
        };
        let parameters = [("x", Parameter::Var(x)), ("dtype", Parameter::Text(to))];
        self.program.op("cast", name, &parameters, element, x.shape.clone())
    }

    /// A 2-d convolution.
    pub(super) fn convolution(
        &mut self,
        name: &str,
        x: &Var,
        weight: &Var,
        bias: Option<&Var>,
        conv: Conv,
        out: Vec<i64>,
    ) -> Var {
        let (strides, pad) = ([conv.stride as i32; 2], [conv.padding as i32; 4]);
        let mut parameters = vec![
            ("x", Parameter::Var(x)),
            ("weight", Parameter::Var(weight)),
            ("strides", Parameter::Ints(&strides)),
            ("pad_type", Parameter::Text(if conv.padding == 0 { "valid" } else { "custom" })),
            ("pad", Parameter::Ints(&pad)),
            ("dilations", Parameter::Ints(&[1, 1])),
            ("groups", Parameter::Int(1)),
        ];
        parameters.extend(bias.map(|bias| ("bias", Parameter::Var(bias))));
        self.program.op("conv", name, &parameters, x.element, out)
    }

    pub(super) fn unary(&mut self, kind: &str, name: &str, x: &Var) -> Var {
        self.program.op(kind, name, &[("x", Parameter::Var(x))], x.element, x.shape.clone())
    }

    /// `x ∘ y` by broadcasting; the result has the shape of `x`.
    pub(super) fn binary(&mut self, kind: &str, name: &str, x: &Var, y: Parameter) -> Var {
        self.program.op(kind, name, &[("x", Parameter::Var(x)), ("y", y)], x.element, x.shape.clone())
    }

    pub(super) fn reshape(&mut self, name: &str, x: &Var, shape: Vec<i64>) -> Var {
        let sizes: Vec<i32> = shape.iter().map(|&size| size as i32).collect();
        let parameters = [("x", Parameter::Var(x)), ("shape", Parameter::Ints(&sizes))];
        self.program.op("reshape", name, &parameters, x.element, shape)
    }

    pub(super) fn concat(&mut self, name: &str, values: Vec<&Var>, axis: usize) -> Var {
        let mut shape = values[0].shape.clone();
        shape[axis] = values.iter().map(|value| value.shape[axis]).sum();
        let element = values[0].element;
        let parameters = [
            ("values", Parameter::Vars(values)),
            ("axis", Parameter::Int(axis as i32)),
            ("interleave", Parameter::Bool(false)),
        ];
        self.program.op("concat", name, &parameters, element, shape)
    }

    pub(super) fn gelu(&mut self, x: &Var) -> Var {
        let parameters = [("x", Parameter::Var(x)), ("mode", Parameter::Text("EXACT"))];
        self.program.op("gelu", "gelu", &parameters, x.element, x.shape.clone())
    }

    /// Nearest-neighbour resize of `x` `[B, C, H, W]` to the shape `out`.
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
