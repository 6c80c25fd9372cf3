//! A weight laid out for clustering: one row for each group of channels that shares a table.

use anyhow::{Result, ensure};
use tch::{Device, Kind, Tensor};

use crate::palette::Form;
use crate::palette::forms::{check_form, elements};

/// How weights of one form and shape become rows `[G, elements / G]`, and back. Where each channel has a scale, rows
/// hold weights divided by it.
#[derive(Debug)]
pub struct Rows {
    /// The weight's shape.
    shape: Vec<i64>,
    groups: i64,
    /// Groups or vectors are of input channels: those come first in rows.
    swapped: bool,
    /// Weights of an entry: neighbours along the channels that come first.
    dim: i64,
    /// f32, one an output channel, of a shape that multiplies the weight.
    scales: Option<Tensor>,
}

impl Rows {
    /// `scales` has one number for each output channel where `form` asks for that, and is empty otherwise.
    ///
    /// # Errors
    /// When `form` does not fit `shape`, or `scales` does not fit `form`.
    pub fn new(form: &Form, shape: &[i64], scales: &[f64], device: Device) -> Result<Self> {
        check_form(form, shape)?;
        let expected = if form.per_channel_scale { shape[0] as usize } else { 0 };
        ensure!(scales.len() == expected, "{} scales are not those of {expected} channels", scales.len());
        let groups = form.groups(shape) as i64;
        let (swapped, dim) = (form.axis == 1, form.cluster_dim as i64);
        let mut rows = Self { shape: shape.to_vec(), groups, swapped, dim, scales: None };
        if !scales.is_empty() {
            let scales: Vec<f32> = scales.iter().map(|&scale| scale as f32).collect();
            rows.scales = Some(rows.by_channel(&scales)?.f_to_device(device)?);
        }
        Ok(rows)
    }

    /// The weight's shape.
    pub fn shape(&self) -> &[i64] {
        &self.shape
    }

    /// How many rows there are.
    pub fn groups(&self) -> usize {
        self.groups as usize
    }

    /// How far apart in a row the weights of an entry are, and how many entries follow each other.
    pub fn inner(&self) -> usize {
        let channels = if self.dim > 1 { self.shape[usize::from(self.swapped)] } else { 1 };
        (self.shape.iter().product::<i64>() / channels) as usize
    }

    /// Whether rows are the weight itself in another shape: then both share their memory.
    pub fn are_plain(&self) -> bool {
        !self.swapped && self.scales.is_none()
    }

    /// Rows of a weight, divided by its scales.
    ///
    /// # Errors
    /// When it has another shape.
    pub fn of_weight(&self, weight: &Tensor) -> Result<Tensor> {
        self.lay_out(match &self.scales {
            Some(scales) => weight.f_div(scales)?,
            None => weight.shallow_clone(),
        })
    }

    /// Rows of a gradient of the weight, turned into that of its rows.
    ///
    /// # Errors
    /// When it has another shape.
    pub fn of_gradient(&self, gradient: &Tensor) -> Result<Tensor> {
        self.lay_out(match &self.scales {
            Some(scales) => gradient.f_mul(scales)?,
            None => gradient.shallow_clone(),
        })
    }

    /// The weight of these rows.
    ///
    /// # Errors
    /// When they are not as many or as long.
    pub fn weight(&self, rows: &Tensor) -> Result<Tensor> {
        let weight = self.in_shape(rows)?;
        Ok(match &self.scales {
            Some(scales) => weight.f_mul(scales)?,
            None => weight,
        })
    }

    /// The gradient of the weight, from that of its rows.
    ///
    /// # Errors
    /// When they are not as many or as long.
    pub fn gradient(&self, rows: &Tensor) -> Result<Tensor> {
        let gradient = self.in_shape(rows)?;
        Ok(match &self.scales {
            Some(scales) => gradient.f_div(scales)?,
            None => gradient,
        })
    }

    /// Something for each element in the order of rows, in that of the weight.
    ///
    /// # Errors
    /// When they are not as many or as long.
    pub fn in_shape(&self, rows: &Tensor) -> Result<Tensor> {
        self.put_in(rows, &self.shape)
    }

    /// Something for each entry that is looked up, in the order of [`crate::palette::Palette::indices`].
    ///
    /// # Errors
    /// When they are not as many or as long.
    pub fn indices_in_shape(&self, rows: &Tensor) -> Result<Tensor> {
        let mut shape = self.shape.clone();
        if self.dim > 1 {
            shape[usize::from(self.swapped)] /= self.dim;
        }
        self.put_in(rows, &shape)
    }

    /// [`crate::palette::Palette::indices`], flat, in the order of rows.
    ///
    /// # Errors
    /// When they are not as many.
    pub fn indices_of_shape(&self, indices: &Tensor) -> Result<Tensor> {
        if !self.swapped {
            return Ok(indices.f_view(-1)?);
        }
        let mut shape = self.shape.clone();
        if self.dim > 1 {
            shape[usize::from(self.swapped)] /= self.dim;
        }
        Ok(indices.f_view(shape.as_slice())?.f_transpose(0, 1)?.f_contiguous()?.f_view(-1)?)
    }

    fn put_in(&self, rows: &Tensor, shape: &[i64]) -> Result<Tensor> {
        if !self.swapped {
            return Ok(rows.f_view(shape)?);
        }
        let mut swapped = shape.to_vec();
        swapped.swap(0, 1);
        Ok(rows.f_view(swapped.as_slice())?.f_transpose(0, 1)?.f_contiguous()?)
    }

    fn lay_out(&self, values: Tensor) -> Result<Tensor> {
        ensure!(values.size() == self.shape, "{:?} is not the shape {:?}", values.size(), self.shape);
        let values = if self.swapped { values.f_transpose(0, 1)? } else { values };
        let length = elements(&self.shape)? as i64 / self.groups;
        Ok(values.f_contiguous()?.f_view([self.groups, length])?)
    }

    /// One number for each output channel, of a shape that multiplies the weight.
    ///
    /// # Errors
    /// When there are not as many.
    pub fn by_channel(&self, values: &[f32]) -> Result<Tensor> {
        let mut size = vec![1; self.shape.len()];
        size[0] = self.shape[0];
        Ok(Tensor::f_from_slice(values)?.f_view(size.as_slice())?)
    }

    /// The scales, exactly those that were given, in f64.
    ///
    /// # Errors
    /// libtorch's.
    pub fn scales(&self) -> Result<Vec<f64>> {
        Ok(match &self.scales {
            Some(scales) => Vec::try_from(scales.f_to_device(Device::Cpu)?.f_to_kind(Kind::Double)?.f_view(-1)?)?,
            None => Vec::new(),
        })
    }
}

impl Clone for Rows {
    fn clone(&self) -> Self {
        let scales = self.scales.as_ref().map(Tensor::shallow_clone);
        Self { shape: self.shape.clone(), scales, ..*self }
    }
}
