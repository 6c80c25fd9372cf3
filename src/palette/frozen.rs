//! A palette whose assignments no longer change, so that only its entries are trained.

use anyhow::{Context, Result, ensure};
use half::f16;
use rayon::prelude::*;
use tch::{Device, Kind, Tensor};

use super::{Palette, piece};
use crate::ops::Weights;
use crate::torch::slices;

/// One layer with fixed assignments.
#[derive(Debug)]
pub struct Frozen {
    /// The parameter's diffusers name.
    pub name: String,
    pub bits: u32,
    shape: Vec<i64>,
    /// `[elements]` u8.
    indices: Tensor,
    /// `[2^bits]` f32: what an optimizer may change, in place. The network sees them rounded to f16, as they will be
    /// stored; gradients pass that rounding as if it were not there.
    pub entries: Tensor,
}

impl Frozen {
    /// The assignments and entries of `palette`, on `device`.
    ///
    /// # Errors
    /// When it is not one table of numbers for the whole weight, and libtorch's (no memory, no such device).
    pub fn new(name: &str, palette: &Palette, device: Device) -> Result<Self> {
        ensure!(palette.form.is_per_tensor(), "parameter {name}: this form of palette is not trained yet");
        let entries: Vec<f32> = palette.entries.iter().map(|e| e.to_f32()).collect();
        Ok(Self {
            name: name.to_string(),
            bits: palette.form.bits,
            shape: palette.shape.clone(),
            indices: Tensor::f_from_slice(&palette.indices)?.f_to_device(device)?,
            entries: Tensor::f_from_slice(&entries)?.f_to_device(device)?,
        })
    }

    fn rounded(&self) -> Result<Tensor> {
        Ok(self.entries.f_detach()?.f_to_kind(Kind::Half)?)
    }

    /// Writes the weight to `dense` (contiguous f32 of its shape, on its device): exactly what [`Self::palette`] holds.
    ///
    /// # Errors
    /// libtorch's (no memory).
    pub fn dense(&self, dense: &mut Tensor) -> Result<()> {
        ensure!(dense.size() == self.shape, "{:?} is not the shape {:?}", dense.size(), self.shape);
        let entries = self.rounded()?.f_to_kind(Kind::Float)?;
        if entries.device() != Device::Cpu {
            let values = entries.f_index_select(0, &self.indices.f_to_kind(Kind::Int)?)?;
            dense.f_copy_(&values.f_view(self.shape.as_slice())?)?;
            return Ok(());
        }
        let (entries, indices) = (slices::floats(&entries)?, slices::bytes(&self.indices)?);
        let values = slices::floats_mut(dense)?;
        let size = piece(indices.len());
        values.par_chunks_mut(size).zip(indices.par_chunks(size)).for_each(|(values, indices)| {
            for (value, &index) in values.iter_mut().zip(indices) {
                *value = entries[index as usize];
            }
        });
        Ok(())
    }

    /// ∂L/∂entries (`[2^bits]` f32) from `upstream`, ∂L/∂weight: for each entry the sum over its members.
    ///
    /// # Errors
    /// When `upstream` has another shape or is on another device.
    pub fn gradient(&self, upstream: &Tensor) -> Result<Tensor> {
        let upstream = upstream.f_detach()?.f_to_kind(Kind::Float)?.f_contiguous()?;
        ensure!(
            upstream.size() == self.shape && upstream.device() == self.indices.device(),
            "parameter {}: a gradient of shape {:?} on {:?} is not that of its weight, of shape {:?} on {:?}",
            self.name,
            upstream.size(),
            upstream.device(),
            self.shape,
            self.indices.device()
        );
        let count = 1usize << self.bits;
        if upstream.device() != Device::Cpu {
            let (indices, flat) = (self.indices.f_to_kind(Kind::Int)?, upstream.f_view(-1)?);
            return Ok(indices.f_bincount(Some(&flat), count as i64)?.f_to_kind(Kind::Float)?);
        }
        let (values, indices) = (slices::floats(&upstream)?, slices::bytes(&self.indices)?);
        let size = piece(indices.len());
        let pieces: Vec<Vec<f64>> = values
            .par_chunks(size)
            .zip(indices.par_chunks(size))
            .map(|(values, indices)| {
                // Neighbours often share an entry: four sums each, so that additions need not wait for each other.
                let mut sums = vec![[0f64; 4]; count];
                for (place, (&value, &index)) in values.iter().zip(indices).enumerate() {
                    sums[index as usize][place % 4] += value as f64;
                }
                sums.iter().map(|s| (s[0] + s[1]) + (s[2] + s[3])).collect()
            })
            .collect();
        let sums: Vec<f32> = (0..count).map(|j| pieces.iter().map(|piece| piece[j]).sum::<f64>() as f32).collect();
        Ok(Tensor::f_from_slice(&sums)?)
    }

    /// The palette, entries rounded to f16, in the order in which they are trained.
    ///
    /// # Errors
    /// When an entry is not finite in f16; names the layer.
    pub fn palette(&self) -> Result<Palette> {
        let entries = Vec::<f16>::try_from(self.rounded()?.f_to_device(Device::Cpu)?)?;
        let indices = Vec::<u8>::try_from(self.indices.f_to_device(Device::Cpu)?)?;
        Palette::new(self.bits, self.shape.clone(), indices, entries)
            .with_context(|| format!("parameter {}", self.name))
    }

    /// All of the state, as tensors named after the layer: shared with it, not copies.
    pub fn tensors(&self) -> Vec<(String, Tensor)> {
        vec![
            (format!("{}.assignments", self.name), self.indices.shallow_clone()),
            (format!("{}.entries", self.name), self.entries.shallow_clone()),
        ]
    }

    /// The layer of `shape` whose [`Self::tensors`] are among `tensors`, bit for bit, on `device`.
    ///
    /// # Errors
    /// When one is missing or not as expected; names it.
    pub fn restore(name: &str, bits: u32, shape: &[i64], tensors: &Weights, device: Device) -> Result<Self> {
        let get = |part: &str, kind: Kind, length: i64| -> Result<Tensor> {
            let key = format!("{name}.{part}");
            let tensor = tensors.get(&key).with_context(|| format!("the saved state lacks `{key}`"))?;
            ensure!(
                tensor.f_kind()? == kind && tensor.size() == [length],
                "`{key}` in the saved state is {:?} of shape {:?}, and {kind:?} of shape [{length}] is expected",
                tensor.f_kind()?,
                tensor.size()
            );
            Ok(tensor.f_detach()?.f_to_device(device)?.f_to_dtype(kind, false, true)?)
        };
        ensure!(super::BITS.contains(&bits), "parameter {name}: a palette has 1, 2, 3, 4, 6 or 8 bits, not {bits}");
        let indices = get("assignments", Kind::Uint8, super::elements(shape)? as i64)?;
        let entries = get("entries", Kind::Float, 1 << bits)?;
        let frozen = Self { name: name.to_string(), bits, shape: shape.to_vec(), indices, entries };
        // Assignments past the entries are found here, not when the weight is looked up.
        frozen.palette()?;
        Ok(frozen)
    }
}
