//! The interpreter that appends a network to a Core ML program, with ORIGINAL attention.
//!
//! Layouts are those of Apple's own conversion: images `[B, C, H, W]`, tokens `[B, C, 1, T]` and vectors
//! `[B, C, 1, 1]`, so that channels are always the second axis, every linear layer is a 1×1 convolution, the step from
//! an image to its tokens is a reshape, and the text comes as the contract wants it, `[B, C, 1, 77]`. Values are fp16,
//! except for the sinusoids of the timestep: `t · f` in fp16 has steps of half a radian at t = 1000.
//!
//! Weights are asked for one at a time and go to the file at once.

use std::borrow::Cow;
use std::io::{Seek, Write};

use anyhow::{Context, Result, anyhow, bail, ensure};
use half::f16;
use tch::{Kind, Tensor};

use super::program::{Parameter, ProgramBuilder, Var};
use super::proto::data_type::{FLOAT16, FLOAT32};
use crate::ops::{Activation, Conv, Linear, Mask, Ops, Weights};
use crate::palette::{Palette, PalettizedCheckpoint};

/// One parameter of a network, as it is to be stored.
pub enum Weight<'a> {
    /// Plain values, row-major.
    Dense { shape: Vec<i64>, values: Vec<f16> },
    /// Indices into a table of values.
    Palette(Cow<'a, Palette>),
}

/// Where the exported weights come from, one at a time.
pub trait WeightSource {
    /// The parameter of this diffusers name.
    ///
    /// # Errors
    /// When there is none.
    fn weight(&self, name: &str) -> Result<Weight<'_>>;
}

impl WeightSource for Weights {
    fn weight(&self, name: &str) -> Result<Weight<'_>> {
        dense(self.get(name).with_context(|| format!("the weights lack `{name}`"))?)
    }
}

impl WeightSource for PalettizedCheckpoint {
    fn weight(&self, name: &str) -> Result<Weight<'_>> {
        match self.palettes.get(name) {
            Some(palette) => Ok(Weight::Palette(Cow::Borrowed(palette))),
            None => dense(self.dense.get(name).with_context(|| format!("the checkpoint lacks `{name}`"))?),
        }
    }
}

/// A tensor of any floating type as [`Weight::Dense`].
pub fn dense<'a>(tensor: &Tensor) -> Result<Weight<'a>> {
    let shape = tensor.size();
    let tensor = tensor.f_to_device(tch::Device::Cpu)?.f_to_kind(Kind::Half)?.f_contiguous()?;
    let mut values = vec![f16::ZERO; tensor.numel()];
    let count = values.len();
    tensor.f_copy_data(&mut values, count)?;
    Ok(Weight::Dense { shape, values })
}

/// A value of the network: where it is in the program, and its shape in the network's own terms.
#[derive(Clone, Debug)]
pub struct MilValue {
    var: Var,
    shape: Vec<i64>,
}

/// How a value of the network lies in memory: images as they are; tokens `[B, C, 1, T]`; vectors `[B, C, 1, 1]`.
fn in_memory(shape: &[i64]) -> Vec<i64> {
    match *shape {
        [batch, channels] => vec![batch, channels, 1, 1],
        [batch, tokens, channels] => vec![batch, channels, 1, tokens],
        _ => shape.to_vec(),
    }
}

/// Appends operations to a program.
///
/// The vocabulary cannot fail, files can: the first error is kept, the rest of the walk appends nothing, and
/// [`MilOps::finish`] returns the error.
pub struct MilOps<'a, W> {
    program: ProgramBuilder<W>,
    weights: &'a dyn WeightSource,
    written: &'a mut dyn FnMut(),
    error: Option<anyhow::Error>,
}

impl<'a, W: Write + Seek> MilOps<'a, W> {
    /// Takes parameters from `weights`; calls `written` after each.
    pub fn new(program: ProgramBuilder<W>, weights: &'a dyn WeightSource, written: &'a mut dyn FnMut()) -> Self {
        Self { program, weights, written, error: None }
    }

    /// An input of the program in fp16; `shape` is the network's (`[B, C, H, W]`, `[B, T, C]` or `[B]`).
    pub fn input(&mut self, name: &str, shape: &[i64]) -> MilValue {
        let var = self.program.input(name, FLOAT16, &in_memory(shape));
        MilValue { var, shape: shape.to_vec() }
    }

    /// The value in fp32 under the `name` of an output.
    pub fn output(&mut self, name: &str, x: &MilValue) -> Var {
        let shape = x.var.shape.clone();
        let parameters = [("x", Parameter::Var(&x.var)), ("dtype", Parameter::Text("fp32"))];
        self.program.op("cast", name, &parameters, FLOAT32, shape)
    }

    /// The program so far.
    ///
    /// # Errors
    /// The first error of the walk.
    pub fn finish(self) -> Result<ProgramBuilder<W>> {
        match self.error {
            Some(error) => Err(error),
            None => Ok(self.program),
        }
    }

    /// A value of `shape` made by `build`, or a placeholder after an error.
    fn value(&mut self, shape: Vec<i64>, build: impl FnOnce(&mut Self, Vec<i64>) -> Result<Var>) -> MilValue {
        let memory = in_memory(&shape);
        if self.error.is_none() {
            match build(self, memory.clone()) {
                Ok(var) => return MilValue { var, shape },
                Err(error) => self.error = Some(error),
            }
        }
        MilValue { var: Var { name: String::new(), shape: memory, element: FLOAT16 }, shape }
    }

    /// The constant of the parameter `name`, which the network declares with `declared` and which lies as `memory`.
    fn parameter(&mut self, name: &str, declared: &[i64], memory: &[i64]) -> Result<Var> {
        let weight = self.weights.weight(name)?;
        let shape = match &weight {
            Weight::Dense { shape, .. } => shape,
            Weight::Palette(palette) => &palette.shape,
        };
        ensure!(shape == declared, "`{name}` has shape {shape:?}, and the network wants {declared:?}");
        let var = match &weight {
            Weight::Dense { values, .. } => {
                if let Some(value) = values.iter().find(|value| !value.is_finite()) {
                    bail!("`{name}` holds {value} in fp16, the type of the package: its values must stay below 65504");
                }
                let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
                self.program.tensor(&format!("{name}_to_fp16"), FLOAT16, memory, &bytes)
            }
            Weight::Palette(palette) => self.program.palette(&format!("{name}_to_fp16_palettized"), palette, memory),
        };
        let var = var.with_context(|| format!("cannot export `{name}`"))?;
        (self.written)();
        Ok(var)
    }

    /// A 2-d convolution with the weight `name.weight`, declared with `declared`.
    fn convolve(
        &mut self,
        x: &Var,
        name: &str,
        declared: &[i64],
        conv: Conv,
        bias: bool,
        out: Vec<i64>,
    ) -> Result<Var> {
        let Conv { in_channels, out_channels, kernel, stride, padding } = conv;
        let memory = [out_channels, in_channels, kernel, kernel];
        let weight = self.parameter(&format!("{name}.weight"), declared, &memory)?;
        let bias =
            if bias { Some(self.parameter(&format!("{name}.bias"), &[out_channels], &[out_channels])?) } else { None };
        let (strides, pad) = ([stride as i32; 2], [padding as i32; 4]);
        let mut parameters = vec![
            ("x", Parameter::Var(x)),
            ("weight", Parameter::Var(&weight)),
            ("strides", Parameter::Ints(&strides)),
            ("pad_type", Parameter::Text(if padding == 0 { "valid" } else { "custom" })),
            ("pad", Parameter::Ints(&pad)),
            ("dilations", Parameter::Ints(&[1, 1])),
            ("groups", Parameter::Int(1)),
        ];
        parameters.extend(bias.as_ref().map(|bias| ("bias", Parameter::Var(bias))));
        Ok(self.program.op("conv", name, &parameters, FLOAT16, out))
    }

    fn unary(&mut self, kind: &str, name: &str, x: &Var) -> Var {
        self.program.op(kind, name, &[("x", Parameter::Var(x))], x.element, x.shape.clone())
    }

    /// `x ∘ y` by broadcasting; the result has the shape of `x`.
    fn binary(&mut self, kind: &str, name: &str, x: &Var, y: Parameter) -> Var {
        self.program.op(kind, name, &[("x", Parameter::Var(x)), ("y", y)], x.element, x.shape.clone())
    }

    fn reshape(&mut self, name: &str, x: &Var, shape: Vec<i64>) -> Var {
        let sizes: Vec<i32> = shape.iter().map(|&size| size as i32).collect();
        let parameters = [("x", Parameter::Var(x)), ("shape", Parameter::Ints(&sizes))];
        self.program.op("reshape", name, &parameters, x.element, shape)
    }

    fn concat(&mut self, name: &str, values: Vec<&Var>, axis: usize) -> Var {
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

    fn gelu(&mut self, x: &Var) -> Var {
        let parameters = [("x", Parameter::Var(x)), ("mode", Parameter::Text("EXACT"))];
        self.program.op("gelu", "gelu", &parameters, x.element, x.shape.clone())
    }

    /// MIL has no group norm: the mean and the variance over `[C/groups, H, W]` of `[B, groups, C/groups, H, W]`.
    fn normalize_groups(&mut self, x: &Var, name: &str, groups: i64, eps: f64) -> Var {
        let (batch, channels, height, width) = (x.shape[0], x.shape[1], x.shape[2], x.shape[3]);
        let part = |part: &str| format!("{name}_{part}");
        let mean_of = |ops: &mut Self, hint: &str, x: &Var| {
            let parameters =
                [("x", Parameter::Var(x)), ("axes", Parameter::Ints(&[2, 3, 4])), ("keep_dims", Parameter::Bool(true))];
            ops.program.op("reduce_mean", hint, &parameters, x.element, vec![batch, groups, 1, 1, 1])
        };
        let grouped = self.reshape(&part("grouped"), x, vec![batch, groups, channels / groups, height, width]);
        let mean = mean_of(self, &part("mean"), &grouped);
        let centered = self.binary("sub", &part("centered"), &grouped, Parameter::Var(&mean));
        let squared = self.unary("square", &part("squared"), &centered);
        let variance = mean_of(self, &part("variance"), &squared);
        let variance = self.binary("add", &part("variance_eps"), &variance, Parameter::Half(f16::from_f64(eps)));
        let deviation = self.unary("sqrt", &part("deviation"), &variance);
        let normalized = self.binary("real_div", &part("normalized"), &centered, Parameter::Var(&deviation));
        self.reshape(&part("ungrouped"), &normalized, x.shape.clone())
    }

    /// `x · factor` for a factor that need not be exact in fp16: see [`half_factors`].
    fn scaled_pair(&mut self, q: &Var, k: &Var, factor: f64) -> (Var, Var) {
        let (first, second) = half_factors(factor);
        let q = self.binary("mul", "query_scaled", q, Parameter::Half(first));
        if second == f16::ONE {
            return (q, k.clone());
        }
        (q, self.binary("mul", "key_scaled", k, Parameter::Half(second)))
    }

    fn attend(&mut self, q: &Var, k: &Var, v: &Var, heads: i64, out: Vec<i64>) -> Result<Var> {
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
            ops.program.op("matmul", hint, &parameters, FLOAT16, shape)
        };
        let scores = matmul(self, "attention_scores", &q, &k, false, vec![batch, heads, tokens, sources]);
        let parameters = [("x", Parameter::Var(&scores)), ("axis", Parameter::Int(3))];
        let weights = self.program.op("softmax", "attention_weights", &parameters, FLOAT16, scores.shape.clone());
        let mixed = matmul(self, "attention_values", &v, &weights, true, vec![batch, heads, size, tokens]);
        Ok(self.reshape("attention", &mixed, out))
    }

    fn sinusoids(&mut self, t: &Var, dim: i64, flip: bool, shift: f64, out: Vec<i64>) -> Result<Var> {
        let (batch, half) = (out[0], dim / 2);
        // The very numbers that `ops::Tensors` computes.
        let exponents = Tensor::f_arange(half, (Kind::Float, tch::Device::Cpu))?
            .f_mul_scalar(-(10_000f64.ln()) / (half as f64 - shift))?;
        let frequencies: Vec<f32> = Vec::try_from(exponents.f_exp()?)?;
        let bytes: Vec<u8> = frequencies.iter().flat_map(|value| value.to_le_bytes()).collect();

        let cast = |ops: &mut Self, hint: &str, x: &Var, to: (&str, i32)| {
            let parameters = [("x", Parameter::Var(x)), ("dtype", Parameter::Text(to.0))];
            ops.program.op("cast", hint, &parameters, to.1, x.shape.clone())
        };
        let t = cast(self, "timestep_to_fp32", t, ("fp32", FLOAT32));
        let parameters = [("x", Parameter::Var(&t)), ("axes", Parameter::Ints(&[1, 2, 3]))];
        let t = self.program.op("expand_dims", "timestep_expanded", &parameters, FLOAT32, vec![batch, 1, 1, 1]);
        let frequencies = self.program.tensor("time_frequencies", FLOAT32, &[1, half, 1, 1], &bytes)?;
        let parameters = [("x", Parameter::Var(&t)), ("y", Parameter::Var(&frequencies))];
        let angles = self.program.op("mul", "time_angles", &parameters, FLOAT32, vec![batch, half, 1, 1]);
        let sin = self.unary("sin", "time_sin", &angles);
        let cos = self.unary("cos", "time_cos", &angles);
        let mut parts = if flip { vec![&cos, &sin] } else { vec![&sin, &cos] };
        let zeros;
        if dim % 2 == 1 {
            zeros = self.program.tensor("time_padding", FLOAT32, &[batch, 1, 1, 1], &vec![0; 4 * batch as usize])?;
            parts.push(&zeros);
        }
        let embedding = self.concat("time_sinusoids", parts, 1);
        Ok(cast(self, "time_sinusoids_to_fp16", &embedding, ("fp16", FLOAT16)))
    }

    fn enlarge(&mut self, x: &Var, out: Vec<i64>) -> Result<Var> {
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
        let large = self.program.op("upsample_nearest_neighbor", "upsample", &parameters, FLOAT16, enlarged.clone());
        if enlarged == out {
            return Ok(large);
        }
        let end: Vec<i32> = out.iter().map(|&size| size as i32).collect();
        let parameters =
            [("x", Parameter::Var(&large)), ("begin", Parameter::Ints(&[0, 0, 0, 0])), ("size", Parameter::Ints(&end))];
        Ok(self.program.op("slice_by_size", "upsample_cropped", &parameters, FLOAT16, out))
    }
}

/// Two numbers in fp16 of which the product is `factor` to about one part in a million, the second as near to 1 as
/// that allows; the second is 1 where the first alone will do.
///
/// 1/√40, the scale of Stable Diffusion 1's attention, is off by a part in 6000 in fp16, always to the same side.
fn half_factors(factor: f64) -> (f16, f16) {
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

impl<W: Write + Seek> Ops for MilOps<'_, W> {
    type Value = MilValue;

    fn share(&self, x: &MilValue) -> MilValue {
        x.clone()
    }
    fn shape(&self, x: &MilValue) -> Vec<i64> {
        x.shape.clone()
    }
    fn conv2d(&mut self, x: &MilValue, name: &str, conv: Conv) -> MilValue {
        let Conv { in_channels, out_channels, kernel, stride, padding } = conv;
        let size = |n: i64| (n + 2 * padding - kernel) / stride + 1;
        let shape = vec![x.shape[0], out_channels, size(x.shape[2]), size(x.shape[3])];
        let declared = [out_channels, in_channels, kernel, kernel];
        self.value(shape, |ops, out| ops.convolve(&x.var, name, &declared, conv, true, out))
    }
    fn linear(&mut self, x: &MilValue, name: &str, linear: Linear) -> MilValue {
        let Linear { in_features, out_features, bias } = linear;
        let mut shape = x.shape.clone();
        shape.pop();
        shape.push(out_features);
        let conv = Conv::same(in_features, out_features, 1);
        self.value(shape, |ops, out| ops.convolve(&x.var, name, &[out_features, in_features], conv, bias, out))
    }
    fn group_norm(&mut self, x: &MilValue, name: &str, groups: i64, eps: f64) -> MilValue {
        let channels = x.shape[1];
        self.value(x.shape.clone(), |ops, _| {
            let normalized = ops.normalize_groups(&x.var, name, groups, eps);
            let memory = [1, channels, 1, 1];
            let scale = ops.parameter(&format!("{name}.weight"), &[channels], &memory)?;
            let shift = ops.parameter(&format!("{name}.bias"), &[channels], &memory)?;
            let scaled = ops.binary("mul", &format!("{name}_scaled"), &normalized, Parameter::Var(&scale));
            Ok(ops.binary("add", name, &scaled, Parameter::Var(&shift)))
        })
    }
    fn layer_norm(&mut self, x: &MilValue, name: &str, eps: f64) -> MilValue {
        let channels = [x.shape[2]];
        self.value(x.shape.clone(), |ops, out| {
            let gamma = ops.parameter(&format!("{name}.weight"), &channels, &channels)?;
            let beta = ops.parameter(&format!("{name}.bias"), &channels, &channels)?;
            let parameters = [
                ("x", Parameter::Var(&x.var)),
                ("axes", Parameter::Ints(&[1])),
                ("gamma", Parameter::Var(&gamma)),
                ("beta", Parameter::Var(&beta)),
                ("epsilon", Parameter::Half(f16::from_f64(eps))),
            ];
            Ok(ops.program.op("layer_norm", name, &parameters, FLOAT16, out))
        })
    }
    fn attention(&mut self, q: &MilValue, k: &MilValue, v: &MilValue, heads: i64, mask: Mask) -> MilValue {
        self.value(q.shape.clone(), |ops, out| match mask {
            Mask::None => ops.attend(&q.var, &k.var, &v.var, heads, out),
            Mask::Causal => Err(unknown("causal attention")),
        })
    }
    fn activation(&mut self, x: &MilValue, function: Activation) -> MilValue {
        self.value(x.shape.clone(), |ops, _| {
            Ok(match function {
                Activation::Silu => ops.unary("silu", "silu", &x.var),
                Activation::Gelu => ops.gelu(&x.var),
                Activation::QuickGelu => {
                    let steep = ops.binary("mul", "quick_gelu_scaled", &x.var, Parameter::Half(f16::from_f64(1.702)));
                    let gate = ops.unary("sigmoid", "quick_gelu_gate", &steep);
                    ops.binary("mul", "quick_gelu", &x.var, Parameter::Var(&gate))
                }
            })
        })
    }
    fn geglu(&mut self, x: &MilValue) -> MilValue {
        self.value(vec![x.shape[0], x.shape[1], x.shape[2] / 2], |ops, _| {
            let halves = ops.program.split("geglu_split", &x.var, 1, 2);
            let gate = ops.gelu(&halves[1]);
            Ok(ops.binary("mul", "geglu", &halves[0], Parameter::Var(&gate)))
        })
    }
    fn add(&mut self, a: &MilValue, b: &MilValue) -> MilValue {
        self.value(a.shape.clone(), |ops, _| Ok(ops.binary("add", "residual", &a.var, Parameter::Var(&b.var))))
    }
    fn add_to_pixels(&mut self, image: &MilValue, vector: &MilValue) -> MilValue {
        self.value(image.shape.clone(), |ops, _| {
            Ok(ops.binary("add", "time_added", &image.var, Parameter::Var(&vector.var)))
        })
    }
    fn concat_channels(&mut self, images: &[MilValue]) -> MilValue {
        let mut shape = images[0].shape.clone();
        shape[1] = images.iter().map(|image| image.shape[1]).sum();
        self.value(shape, |ops, _| Ok(ops.concat("concat", images.iter().map(|image| &image.var).collect(), 1)))
    }
    fn upsample(&mut self, x: &MilValue, height: i64, width: i64) -> MilValue {
        self.value(vec![x.shape[0], x.shape[1], height, width], |ops, out| ops.enlarge(&x.var, out))
    }
    fn pad_bottom_right(&mut self, x: &MilValue) -> MilValue {
        self.value(vec![x.shape[0], x.shape[1], x.shape[2] + 1, x.shape[3] + 1], |ops, out| {
            let parameters = [
                ("x", Parameter::Var(&x.var)),
                ("pad", Parameter::Ints(&[0, 0, 0, 0, 0, 1, 0, 1])),
                ("mode", Parameter::Text("constant")),
                ("constant_val", Parameter::Half(f16::ZERO)),
            ];
            Ok(ops.program.op("pad", "padded", &parameters, FLOAT16, out))
        })
    }
    fn image_to_tokens(&mut self, x: &MilValue) -> MilValue {
        let shape = vec![x.shape[0], x.shape[2] * x.shape[3], x.shape[1]];
        self.value(shape, |ops, out| Ok(ops.reshape("tokens", &x.var, out)))
    }
    fn tokens_to_image(&mut self, x: &MilValue, height: i64, width: i64) -> MilValue {
        let shape = vec![x.shape[0], x.shape[2], height, width];
        self.value(shape, |ops, out| Ok(ops.reshape("image", &x.var, out)))
    }
    fn timestep_embedding(&mut self, t: &MilValue, dim: i64, flip_sin_to_cos: bool, freq_shift: f64) -> MilValue {
        self.value(vec![t.shape[0], dim], |ops, out| ops.sinusoids(&t.var, dim, flip_sin_to_cos, freq_shift, out))
    }
    fn embedding(&mut self, ids: &MilValue, _name: &str, _rows: i64, width: i64) -> MilValue {
        self.value(vec![ids.shape[0], ids.shape[1], width], |_, _| Err(unknown("embeddings")))
    }
    fn add_positions(&mut self, x: &MilValue, _name: &str, _rows: i64) -> MilValue {
        self.value(x.shape.clone(), |_, _| Err(unknown("position embeddings")))
    }
    fn pool_at_end_of_text(&mut self, x: &MilValue, _ids: &MilValue, _eos: i64) -> MilValue {
        self.value(vec![x.shape[0], x.shape[2]], |_, _| Err(unknown("pooling at the end of the text")))
    }
}

/// What text encoders need and UNets and autoencoders do not.
fn unknown(what: &str) -> anyhow::Error {
    anyhow!("the Core ML export has no form for {what}: it writes UNets")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scales_are_exact_to_a_millionth() {
        for size in [1, 4, 8, 16, 20, 32, 40, 64, 80, 96, 160] {
            let scale = 1.0 / f64::from(size).sqrt();
            let (first, second) = half_factors(scale);
            assert!((first.to_f64() * second.to_f64() / scale - 1.0).abs() < 2e-6, "{size}: {first} · {second}");
        }
        assert_eq!(half_factors(0.125), (f16::from_f64(0.125), f16::ONE));
    }
}
