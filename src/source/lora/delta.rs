//! The mathematics of a change: what is added to a weight, in fp32.

use anyhow::{Context, Result, ensure};
use std::sync::Arc;
use tch::{Kind, Tensor};

use super::file::{LoraFile, finite};
use super::form::{Factors, Form, Side};

/// The change of one parameter.
pub struct Change {
    pub file: Arc<LoraFile>,
    pub form: Form,
    /// What the change is multiplied by but for the LoRA's weight: α by the rank.
    pub scale: f64,
    /// The LoRA's weight.
    pub weight: f64,
    pub dora: Option<Dora>,
}

/// DoRA (Liu et al. 2024, arXiv:2402.09353): after the change every row of the weight is brought to a length of its own.
pub struct Dora {
    /// The tensor with the lengths.
    pub magnitudes: String,
    pub by: DoraBy,
}

/// Whose DoRA it is: they differ in what a weight other than 1 means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DoraBy {
    /// `dora_scale`, a number for each output: what the layer becomes with the whole LoRA is mixed with what it was, as
    /// ComfyUI and AUTOMATIC1111 do.
    Outputs,
    /// `dora_scale` with a number for each input, as LyCORIS has it without `wd_on_out`; mixed as [`Outputs`](Self::Outputs).
    Inputs,
    /// PEFT's `lora_magnitude_vector`: the weight multiplies `up · down` alone, as diffusers' `fuse_lora` does.
    Peft,
}

impl Change {
    /// The parameter, of fp32 on the CPU, with the change.
    ///
    /// # Errors
    /// The file was damaged meanwhile; the change is not finite.
    pub fn apply(&self, weight: &Tensor) -> Result<Tensor> {
        self.changed(weight).with_context(|| {
            let tensor = self.form.tensors().first().copied().unwrap_or_default();
            format!("{}: `{tensor}`", self.file.path().display())
        })
    }

    fn changed(&self, weight: &Tensor) -> Result<Tensor> {
        let change = delta(&self.file, &self.form, &weight.size())?;
        let Some(dora) = &self.dora else {
            return Ok(weight.f_add(&change.f_mul_scalar(self.scale * self.weight)?)?);
        };
        let within = if dora.by == DoraBy::Peft { self.weight } else { 1.0 };
        let moved = weight.f_add(&change.f_mul_scalar(self.scale * within)?)?;
        let magnitudes = self.file.tensor(&dora.magnitudes)?;
        // The axis whose rows have a length each, and the shape with which lengths are laid along it.
        let axis = i64::from(dora.by == DoraBy::Inputs);
        let others: Vec<i64> = (0..weight.dim() as i64).filter(|other| *other != axis).collect();
        let mut shape = vec![1; weight.dim()];
        shape[axis as usize] = weight.size()[axis as usize];
        let mut lengths = moved.f_norm_scalaropt_dim(2, others.as_slice(), true)?;
        if dora.by != DoraBy::Peft {
            // As LyCORIS keeps from dividing by zero.
            lengths = lengths.f_add_scalar(f64::from(f32::EPSILON))?;
        }
        let whole = moved.f_mul(&magnitudes.f_view(shape.as_slice())?.f_div(&lengths)?)?;
        ensure!(finite(&whole)?, "a row of the changed weight is zero, and has no direction that DoRA could keep");
        if dora.by == DoraBy::Peft || self.weight == 1.0 {
            return Ok(whole);
        }
        Ok(weight.f_add(&whole.f_sub(weight)?.f_mul_scalar(self.weight)?)?)
    }
}

/// What the tensors of `form` make, as a tensor of `shape`. [`Form::fits`] has checked theirs.
fn delta(file: &LoraFile, form: &Form, shape: &[i64]) -> Result<Tensor> {
    let matrix = |name: &String| -> Result<Tensor> {
        let tensor = file.tensor(name)?;
        let rows = tensor.size().first().copied().unwrap_or(1);
        Ok(tensor.f_reshape([rows, -1])?)
    };
    let change = match form {
        Form::Product { up, mid: None, down } => matrix(up)?.f_matmul(&matrix(down)?)?,
        Form::Product { up, mid: Some(mid), down } => {
            tucker(&file.tensor(mid)?, &matrix(up)?.f_transpose(0, 1)?, &matrix(down)?)?
        }
        Form::Embedding { up, down } => matrix(up)?.f_matmul(&matrix(down)?)?.f_transpose(0, 1)?,
        Form::Hadamard([first, second]) => {
            product(file, first)?.f_reshape(shape)?.f_mul(&product(file, second)?.f_reshape(shape)?)?
        }
        Form::Kronecker([first, second]) => {
            let (mut outer, inner) = (side(file, first)?, side(file, second)?);
            // Of a convolution the second side has the kernel.
            while outer.dim() < inner.dim() {
                outer = outer.f_unsqueeze(-1)?;
            }
            outer.f_kron(&inner)?
        }
        Form::Difference(name) => file.tensor(name)?,
    };
    Ok(change.f_reshape(shape)?)
}

/// `middle` of `[i, j, …]` between `[i, out]` and `[j, in]`: `[out, in, …]`.
fn tucker(middle: &Tensor, left: &Tensor, right: &Tensor) -> Result<Tensor> {
    let middle = middle.f_to_kind(Kind::Float)?;
    Ok(Tensor::f_einsum("ij...,io,jc->oc...", &[&middle, left, right], None::<i64>)?)
}

fn product(file: &LoraFile, factors: &Factors) -> Result<Tensor> {
    let (a, b) = (file.tensor(&factors.a)?, file.tensor(&factors.b)?);
    let rows = |tensor: &Tensor| tensor.size().first().copied().unwrap_or(1);
    match &factors.tucker {
        Some(middle) => tucker(&file.tensor(middle)?, &a, &b),
        None => Ok(a.f_reshape([rows(&a), -1])?.f_matmul(&b.f_reshape([rows(&b), -1])?)?),
    }
}

fn side(file: &LoraFile, side: &Side) -> Result<Tensor> {
    match side {
        Side::Whole(name) => file.tensor(name),
        Side::Factors(factors) => product(file, factors),
    }
}
