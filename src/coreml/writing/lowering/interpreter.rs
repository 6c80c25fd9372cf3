//! The interpreter that appends a network to a Core ML program.
//!
//! Layouts are those of Apple's own conversion: images `[B, C, H, W]`, tokens `[B, C, 1, T]` and vectors
//! `[B, C, 1, 1]`, so that channels are always the second axis, every linear layer is a 1×1 convolution, the step from
//! an image to its tokens is a reshape, and the text comes as the contract wants it, `[B, C, 1, 77]`. Values are fp16,
//! except for the sinusoids of the timestep: `t · f` in fp16 has steps of half a radian at t = 1000. A network that
//! overflows in fp16 can be written in fp32 as a whole ([`MilOps::compute_in_fp32`]).
//!
//! Weights are asked for one at a time and go to the file at once.

use std::collections::BTreeMap;
use std::io::{Seek, Write};

use anyhow::{Context, Result, bail, ensure};
use half::f16;

use crate::coreml::AttentionImplementation;
use crate::coreml::format::proto::data_type::{FLOAT16, FLOAT32, INT32};
use crate::coreml::writing::program::{Parameter, ProgramBuilder, Var};
use crate::coreml::writing::weights::{Weight, WeightSource};
use crate::ops::{Activation, Conv, Linear, Mask, Ops};

/// A value of the network: where it is in the program, and its shape in the network's own terms.
#[derive(Clone, Debug)]
pub struct MilValue {
    pub(super) var: Var,
    pub(super) shape: Vec<i64>,
}

/// How a value of the network lies in memory: images as they are; tokens `[B, C, 1, T]`; vectors `[B, C, 1, 1]`.
pub(super) fn in_memory(shape: &[i64]) -> Vec<i64> {
    match *shape {
        [batch, channels] => vec![batch, channels, 1, 1],
        [batch, tokens, channels] => vec![batch, channels, 1, tokens],
        _ => shape.to_vec(),
    }
}

/// How an input is given: as it lies in memory, but vectors as they are.
pub(in crate::coreml::writing) fn as_input(shape: &[i64]) -> Vec<i64> {
    if shape.len() == 2 { shape.to_vec() } else { in_memory(shape) }
}

/// Appends operations to a program.
///
/// The vocabulary cannot fail, files can: the first error is kept, the rest of the walk appends nothing, and
/// [`MilOps::finish`] returns the error.
pub struct MilOps<'a, W> {
    pub(super) program: ProgramBuilder<W>,
    weights: &'a dyn WeightSource,
    written: &'a mut dyn FnMut(),
    pub(super) attention: AttentionImplementation,
    /// What values are: fp16 or fp32.
    pub(super) element: i32,
    /// Whether values are expected whose squares fp16 does not hold.
    pub(super) large_values: bool,
    /// The mask of causal attention, which all layers share.
    pub(super) causal_mask: Option<Var>,
    /// By their number: zeros and ones, a channel each, which all norms share.
    pub(super) zeros_and_ones: BTreeMap<i64, [Var; 2]>,
    error: Option<anyhow::Error>,
}

impl<'a, W: Write + Seek> MilOps<'a, W> {
    /// Takes parameters from `weights`; calls `written` after each.
    pub fn new(program: ProgramBuilder<W>, weights: &'a dyn WeightSource, written: &'a mut dyn FnMut()) -> Self {
        Self {
            program,
            weights,
            written,
            attention: AttentionImplementation::default(),
            element: FLOAT16,
            large_values: false,
            causal_mask: None,
            zeros_and_ones: BTreeMap::new(),
            error: None,
        }
    }

    /// Writes attention so from here on, where it looks at everything.
    pub fn attend_as(&mut self, attention: AttentionImplementation) {
        self.attention = attention;
    }

    /// Norms hold values of 256 and above from here on, whose squares fp16 does not: a few operations more each.
    ///
    /// Autoencoders have such values. Apple's converter writes their norms as all others, and where a group has one its
    /// deviation is infinite and the whole group comes out as zeros.
    pub fn expect_large_values(&mut self) {
        self.large_values = true;
    }

    /// Inputs, weights and all values are fp32 from here on. Palettes, which hold fp16, cannot be written then.
    pub fn compute_in_fp32(&mut self) {
        self.element = FLOAT32;
    }

    /// A number among the values.
    pub(super) fn number(&self, value: f64) -> Parameter<'static> {
        match self.element {
            FLOAT32 => Parameter::Float(value as f32),
            _ => Parameter::Half(f16::from_f64(value)),
        }
    }

    /// An input of the program; `shape` is the network's (`[B, C, H, W]`, `[B, T, C]`, `[B, C]` or `[B]`). It is
    /// given as `as_input` says.
    pub fn input(&mut self, name: &str, shape: &[i64]) -> MilValue {
        let (given, memory) = (as_input(shape), in_memory(shape));
        let mut var = self.program.input(name, self.element, &given);
        if given != memory {
            var = self.reshape(&format!("{name}_as_channels"), &var, memory);
        }
        MilValue { var, shape: shape.to_vec() }
    }

    /// An input of token ids `[B, T]`. They come as fp32 numbers, as Apple's programs give them.
    pub fn token_ids(&mut self, name: &str, shape: &[i64]) -> MilValue {
        let ids = self.program.input(name, FLOAT32, shape);
        let var = self.cast(&format!("{name}_to_int32"), &ids, INT32);
        MilValue { var, shape: shape.to_vec() }
    }

    /// Keeps `names` for [`MilOps::output`].
    pub fn reserve<'n>(&mut self, names: impl IntoIterator<Item = &'n str>) {
        names.into_iter().for_each(|name| self.program.reserve(name));
    }

    /// The value in fp32 and in the network's own shape, under the `name` of an output, which was
    /// [reserved](MilOps::reserve).
    pub fn output(&mut self, name: &str, x: &MilValue) -> Var {
        let var = match *x.shape {
            [batch, channels] => self.reshape(&format!("{name}_in_half"), &x.var, vec![batch, channels]),
            [_, _, _] => self.tokens_last(&x.var, name),
            _ => x.var.clone(),
        };
        self.program.release(name);
        // A cast that does nothing is not written.
        if var.element == FLOAT32 { self.unary("identity", name, &var) } else { self.cast(name, &var, FLOAT32) }
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
    pub(super) fn value(
        &mut self,
        shape: Vec<i64>,
        build: impl FnOnce(&mut Self, Vec<i64>) -> Result<Var>,
    ) -> MilValue {
        let memory = in_memory(&shape);
        if self.error.is_none() {
            match build(self, memory.clone()) {
                Ok(var) => return MilValue { var, shape },
                Err(error) => self.error = Some(error),
            }
        }
        MilValue { var: Var { name: String::new(), shape: memory, element: self.element }, shape }
    }

    /// The constant of the parameter `name`, which the network declares with `declared` and which lies as `memory`.
    pub(super) fn parameter(&mut self, name: &str, declared: &[i64], memory: &[i64]) -> Result<Var> {
        if self.element == FLOAT32 {
            return self.single(name, declared, memory);
        }
        match self.weight(name, declared)? {
            Weight::Dense { values, .. } => self.constant(name, &values, memory),
            Weight::Palette(palette) => {
                let var = self.program.palette(&format!("{name}_to_fp16_palettized"), &palette, memory);
                let var = var.with_context(|| format!("cannot export `{name}`"))?;
                (self.written)();
                Ok(var)
            }
        }
    }

    /// The parameter `name`, checked against the shape that the network declares.
    pub(super) fn weight(&self, name: &str, declared: &[i64]) -> Result<Weight<'a>> {
        let weight = self.weights.weight(name)?;
        let shape = match &weight {
            Weight::Dense { shape, .. } => shape,
            Weight::Palette(palette) => &palette.shape,
        };
        ensure!(shape == declared, "`{name}` has shape {shape:?}, and the network wants {declared:?}");
        Ok(weight)
    }

    /// The parameter `name` as a plain fp32 constant.
    fn single(&mut self, name: &str, declared: &[i64], memory: &[i64]) -> Result<Var> {
        let (shape, values) = self.weights.single(name)?;
        ensure!(shape == declared, "`{name}` has shape {shape:?}, and the network wants {declared:?}");
        if let Some(value) = values.iter().find(|value| !value.is_finite()) {
            bail!("`{name}` holds {value}");
        }
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let var = self.program.tensor(name, FLOAT32, memory, &bytes);
        let var = var.with_context(|| format!("cannot export `{name}`"))?;
        (self.written)();
        Ok(var)
    }

    /// The parameter `name` as a plain fp16 constant.
    pub(super) fn constant(&mut self, name: &str, values: &[f16], memory: &[i64]) -> Result<Var> {
        if let Some(value) = values.iter().find(|value| !value.is_finite()) {
            bail!("`{name}` holds {value} in fp16, the type of the package: its values must stay below 65504");
        }
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let var = self.program.tensor(&format!("{name}_to_fp16"), FLOAT16, memory, &bytes);
        let var = var.with_context(|| format!("cannot export `{name}`"))?;
        (self.written)();
        Ok(var)
    }

    /// A 2-d convolution with the weight `name.weight`, declared with `declared`.
    fn convolve(&mut self, x: &Var, name: &str, declared: &[i64], conv: Conv, out: Vec<i64>) -> Result<Var> {
        let Conv { in_channels, out_channels, kernel, bias, .. } = conv;
        let memory = [out_channels, in_channels, kernel, kernel];
        let weight = self.parameter(&format!("{name}.weight"), declared, &memory)?;
        let bias =
            if bias { Some(self.parameter(&format!("{name}.bias"), &[out_channels], &[out_channels])?) } else { None };
        Ok(self.convolution(name, x, &weight, bias.as_ref(), conv, out))
    }
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
        let Conv { in_channels, out_channels, kernel, stride, padding, .. } = conv;
        let size = |n: i64| (n + 2 * padding - kernel) / stride + 1;
        let shape = vec![x.shape[0], out_channels, size(x.shape[2]), size(x.shape[3])];
        let declared = [out_channels, in_channels, kernel, kernel];
        self.value(shape, |ops, out| ops.convolve(&x.var, name, &declared, conv, out))
    }
    fn linear(&mut self, x: &MilValue, name: &str, linear: Linear) -> MilValue {
        let Linear { in_features, out_features, bias } = linear;
        let mut shape = x.shape.clone();
        shape.pop();
        shape.push(out_features);
        let conv = Conv { bias, ..Conv::same(in_features, out_features, 1) };
        self.value(shape, |ops, out| ops.convolve(&x.var, name, &[out_features, in_features], conv, out))
    }
    fn group_norm(&mut self, x: &MilValue, name: &str, groups: i64, eps: f64) -> MilValue {
        let channels = x.shape[1];
        self.value(x.shape.clone(), |ops, _| {
            let normalized = ops.normalize_groups(&x.var, name, groups, eps);
            let gamma = ops.parameter(&format!("{name}.weight"), &[channels], &[channels])?;
            let beta = ops.parameter(&format!("{name}.bias"), &[channels], &[channels])?;
            ops.scale_channels(&normalized, name, &gamma, &beta)
        })
    }
    fn layer_norm(&mut self, x: &MilValue, name: &str, eps: f64) -> MilValue {
        let channels = [x.var.shape[1]];
        self.value(x.shape.clone(), |ops, out| {
            let gamma = ops.parameter(&format!("{name}.weight"), &channels, &channels)?;
            let beta = ops.parameter(&format!("{name}.bias"), &channels, &channels)?;
            let parameters = [
                ("x", Parameter::Var(&x.var)),
                ("axes", Parameter::Ints(&[1])),
                ("gamma", Parameter::Var(&gamma)),
                ("beta", Parameter::Var(&beta)),
                ("epsilon", ops.number(eps)),
            ];
            Ok(ops.program.op("layer_norm", name, &parameters, x.var.element, out))
        })
    }
    fn attention(&mut self, q: &MilValue, k: &MilValue, v: &MilValue, heads: i64, mask: Mask) -> MilValue {
        self.value(q.shape.clone(), |ops, out| ops.attend(&q.var, &k.var, &v.var, heads, mask, out))
    }
    fn activation(&mut self, x: &MilValue, function: Activation) -> MilValue {
        self.value(x.shape.clone(), |ops, _| {
            Ok(match function {
                Activation::Silu => ops.unary("silu", "silu", &x.var),
                Activation::Gelu => ops.gelu(&x.var),
                Activation::QuickGelu => ops.quick_gelu(&x.var),
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
    fn concat_channels(&mut self, parts: &[MilValue]) -> MilValue {
        let mut shape = parts[0].shape.clone();
        shape[1] = parts.iter().map(|part| part.shape[1]).sum();
        self.value(shape, |ops, _| Ok(ops.concat("concat", parts.iter().map(|part| &part.var).collect(), 1)))
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
                ("constant_val", ops.number(0.0)),
            ];
            Ok(ops.program.op("pad", "padded", &parameters, x.var.element, out))
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
        let width = t.shape[1..].iter().product::<i64>() * dim;
        self.value(vec![t.shape[0], width], |ops, out| ops.sinusoids(&t.var, dim, flip_sin_to_cos, freq_shift, out))
    }
    fn embedding(&mut self, ids: &MilValue, name: &str, rows: i64, width: i64) -> MilValue {
        let shape = vec![ids.shape[0], ids.shape[1], width];
        self.value(shape, |ops, out| ops.look_up(&ids.var, name, rows, width, out))
    }
    fn add_positions(&mut self, x: &MilValue, name: &str, rows: i64) -> MilValue {
        self.value(x.shape.clone(), |ops, _| ops.add_rows(&x.var, name, rows))
    }
    fn pool_at_end_of_text(&mut self, x: &MilValue, ids: &MilValue, eos: i64) -> MilValue {
        let shape = vec![x.shape[0], x.shape[2]];
        self.value(shape, |ops, out| ops.take_end(&x.var, &ids.var, eos, out))
    }
    fn prepend(&mut self, x: &MilValue, name: &str) -> MilValue {
        let (batch, tokens, channels) = (x.shape[0], x.shape[1], x.shape[2]);
        self.value(vec![batch, tokens + 1, channels], |ops, _| {
            ensure!(batch == 1, "`{name}` is put before the tokens of one picture at a time, not of {batch}");
            let first = ops.parameter(name, &[channels], &[1, channels, 1, 1])?;
            Ok(ops.concat("tokens_after_first", vec![&first, &x.var], 3))
        })
    }
    fn first_token(&mut self, x: &MilValue) -> MilValue {
        self.value(vec![x.shape[0], x.shape[2]], |ops, out| {
            let size: Vec<i32> = out.iter().map(|&size| size as i32).collect();
            let begin = Parameter::Ints(&[0; 4]);
            let parameters = [("x", Parameter::Var(&x.var)), ("begin", begin), ("size", Parameter::Ints(&size))];
            Ok(ops.program.op("slice_by_size", "first_token", &parameters, FLOAT16, out))
        })
    }
    fn cosines(&mut self, x: &MilValue, name: &str, rows: i64) -> MilValue {
        self.value(vec![x.shape[0], rows], |ops, out| ops.angles(&x.var, name, rows, out))
    }
    fn subtract(&mut self, x: &MilValue, name: &str) -> MilValue {
        let channels = x.shape[1];
        self.value(x.shape.clone(), |ops, _| {
            let less = ops.parameter(name, &[channels], &[1, channels, 1, 1])?;
            Ok(ops.binary("sub", "scores", &x.var, Parameter::Var(&less)))
        })
    }
    fn any_positive(&mut self, x: &MilValue, worth: f64) -> MilValue {
        self.value(vec![x.shape[0], 1], |ops, out| Ok(ops.worth_where_positive(&x.var, worth, out)))
    }
    fn vector_to_image(&mut self, x: &MilValue) -> MilValue {
        // It lies so already.
        MilValue { var: x.var.clone(), shape: vec![x.shape[0], x.shape[1], 1, 1] }
    }
    fn blank_where(&mut self, images: &MilValue, flags: &MilValue) -> MilValue {
        self.value(images.shape.clone(), |ops, _| {
            let kept = ops.binary("mul", "held_back_negated", &flags.var, Parameter::Half(f16::NEG_ONE));
            let kept = ops.binary("add", "kept", &kept, Parameter::Half(f16::ONE));
            Ok(ops.binary("mul", "filtered", &images.var, Parameter::Var(&kept)))
        })
    }
}
