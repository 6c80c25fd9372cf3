//! Where exported weights come from: dense tensors or palettes, one at a time.

use std::borrow::Cow;
use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};
use half::f16;
use tch::{Device, Kind, Tensor};

use crate::ops::Weights;
use crate::palette::checkpoint::{PalettizedFile, Parameter};
use crate::palette::{Form, Palette, PalettizedCheckpoint, fit};
use crate::source::Stored;

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

    /// The plain values of the parameter of this diffusers name in fp32, row-major, and its shape.
    ///
    /// # Errors
    /// When there is none, or only as a palette.
    fn single(&self, name: &str) -> Result<(Vec<i64>, Vec<f32>)> {
        bail!("`{name}` is not there as plain fp32 values")
    }
}

impl WeightSource for Weights {
    fn weight(&self, name: &str) -> Result<Weight<'_>> {
        dense(self.get(name).with_context(|| format!("the weights lack `{name}`"))?)
    }

    fn single(&self, name: &str) -> Result<(Vec<i64>, Vec<f32>)> {
        single(self.get(name).with_context(|| format!("the weights lack `{name}`"))?)
    }
}

/// Each read from its file when it is asked for.
impl WeightSource for Stored {
    fn weight(&self, name: &str) -> Result<Weight<'_>> {
        dense(&self.tensor(name, Kind::Half, Device::Cpu)?)
    }

    fn single(&self, name: &str) -> Result<(Vec<i64>, Vec<f32>)> {
        single(&self.tensor(name, Kind::Float, Device::Cpu)?)
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

/// Each read from its file when it is asked for.
impl WeightSource for PalettizedFile {
    fn weight(&self, name: &str) -> Result<Weight<'_>> {
        match self.read(name)? {
            Parameter::Palette(palette) => Ok(Weight::Palette(Cow::Owned(palette))),
            Parameter::Dense(tensor) => dense(&tensor),
        }
    }
}

/// What another source has, some of it as the palettes nearest to it, made when they are asked for.
pub struct PostTraining<'a> {
    pub source: &'a dyn WeightSource,
    /// Which become palettes, and of what form.
    pub forms: BTreeMap<String, Form>,
}

impl WeightSource for PostTraining<'_> {
    fn weight(&self, name: &str) -> Result<Weight<'_>> {
        match (self.source.weight(name)?, self.forms.get(name)) {
            (Weight::Dense { shape, values }, Some(form)) => {
                let fit = fit(&values, &shape, form).with_context(|| format!("palettizing `{name}`"))?;
                Ok(Weight::Palette(Cow::Owned(fit.palette)))
            }
            (weight, _) => Ok(weight),
        }
    }
}

/// A tensor of any floating type as [`Weight::Dense`].
pub fn dense<'a>(tensor: &Tensor) -> Result<Weight<'a>> {
    let shape = tensor.size();
    let tensor = tensor.f_to_device(Device::Cpu)?.f_to_kind(Kind::Half)?.f_contiguous()?;
    let mut values = vec![f16::ZERO; tensor.numel()];
    let count = values.len();
    tensor.f_copy_data(&mut values, count)?;
    Ok(Weight::Dense { shape, values })
}

fn single(tensor: &Tensor) -> Result<(Vec<i64>, Vec<f32>)> {
    let (shape, tensor) = (tensor.size(), tensor.f_to_device(Device::Cpu)?.f_to_kind(Kind::Float)?.f_contiguous()?);
    let mut values = vec![0.0; tensor.numel()];
    let count = values.len();
    tensor.f_copy_data(&mut values, count)?;
    Ok((shape, values))
}
