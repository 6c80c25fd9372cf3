//! A palette whose assignments no longer change, so that only its entries are trained.

use anyhow::{Context, Result, ensure};
use half::f16;
use rayon::prelude::*;
use tch::{Device, Kind, Tensor};

use super::rounding::{Rounding, scale_within};
use super::rows::Rows;
use super::saved::saved;
use crate::ops::Weights;
use crate::palette::forms::{check_form, elements};
use crate::palette::{Form, LutDtype, Palette};
use crate::torch::slices::{self, piece};

/// One layer with fixed assignments.
#[derive(Debug)]
pub struct Frozen {
    /// The parameter's diffusers name.
    pub name: String,
    pub form: Form,
    rows: Rows,
    rounding: Rounding,
    /// `[G, elements / G / d]` u8.
    indices: Tensor,
    /// `[G · 2^bits · d]` f32: what an optimizer may change, in place. The network sees them rounded as they will be stored;
    /// gradients pass that rounding as if it were not there.
    pub entries: Tensor,
}

impl Frozen {
    /// `indices` (in the order of `rows`) and `entries` (`[G, 2^bits, d]`), on `device`.
    ///
    /// # Errors
    /// libtorch's (no memory, no such device).
    pub(super) fn new(
        name: &str,
        form: Form,
        rows: Rows,
        rounding: Rounding,
        indices: &[u8],
        entries: &[f64],
        device: Device,
    ) -> Result<Self> {
        let entries: Vec<f32> = entries.iter().map(|&e| e as f32).collect();
        let groups = rows.groups() as i64;
        let frozen = Self {
            name: name.to_string(),
            form,
            rounding,
            indices: Tensor::f_from_slice(indices)?
                .f_view([groups, indices.len() as i64 / groups.max(1)])?
                .f_to_device(device)?,
            entries: Tensor::f_from_slice(&entries)?.f_to_device(device)?,
            rows,
        };
        Ok(frozen)
    }

    /// A palette as it is stored, so that its entries learn on: [`Self::palette`] is at first what it was.
    ///
    /// # Errors
    /// libtorch's (no memory, no such device); names the layer.
    pub fn of(name: &str, palette: &Palette, device: Device) -> Result<Self> {
        let make = || {
            let Palette { form, shape, indices, entries, scales } = palette;
            let stored = scales.iter().map(|scale| scale.to_f64());
            // Integers are steps of a unit: of the table's scale, or where that is a channel's, of what makes the largest 1.
            let (units, of_channels): (Vec<f64>, Vec<f64>) = match (form.lut_dtype, form.per_channel_scale) {
                (LutDtype::F16, _) => (Vec::new(), stored.collect()),
                (LutDtype::I8, false) => (stored.collect(), Vec::new()),
                (LutDtype::I8, true) => {
                    let unit = 1.0 / 127.0;
                    (vec![unit; form.groups(shape)], stored.map(|scale| scale / unit).collect())
                }
            };
            let table = form.table();
            let value = |(place, entry): (usize, &f16)| entry.to_f64() * units.get(place / table).unwrap_or(&1.0);
            let entries: Vec<f64> = entries.iter().enumerate().map(value).collect();
            let rows = Rows::new(form, shape, &of_channels, device)?;
            let indices = Vec::<u8>::try_from(rows.indices_of_shape(&Tensor::f_from_slice(indices)?)?)?;
            Self::new(name, *form, rows, Rounding { table, units }, &indices, &entries, device)
        };
        make().with_context(|| format!("parameter {name}"))
    }

    fn entries(&self) -> Result<Vec<f64>> {
        Ok(Vec::try_from(self.entries.f_detach()?.f_to_device(Device::Cpu)?.f_to_kind(Kind::Double)?)?)
    }

    /// Writes the weight to `dense` (contiguous, of its shape, on its device): in f32 exactly what [`Self::palette`] holds.
    ///
    /// # Errors
    /// libtorch's (no memory), or when `dense` has another shape.
    pub fn dense(&self, dense: &mut Tensor) -> Result<()> {
        let _guard = tch::no_grad_guard();
        let entries = self.entries()?;
        // Where channels have scales, what is stored meets them after the look-up.
        let (scales, values) = if self.form.per_channel_scale {
            let rounded = self.rounding.rounded(&entries);
            (self.scales(&rounded)?, rounded)
        } else {
            (Vec::new(), self.rounding.values(&entries))
        };
        let values: Vec<f32> = values.iter().map(|&v| v as f32).collect();
        let looked_up = if dense.device() != Device::Cpu {
            Tensor::f_from_slice(&values)?.f_to_device(dense.device())?.f_index_select(0, &self.places()?)?
        } else if self.rows.are_plain() && dense.f_kind()? == Kind::Float {
            ensure!(dense.size() == self.rows.shape(), "{:?} is not the shape of {}", dense.size(), self.name);
            return self.look_up(&values, dense);
        } else {
            let mut rows = Tensor::f_empty([dense.numel() as i64], (Kind::Float, Device::Cpu))?;
            self.look_up(&values, &mut rows)?;
            rows
        };
        let mut weight = self.rows.in_shape(&looked_up)?;
        if !scales.is_empty() {
            // As Core ML computes it: the exact product, which f32 holds, rounded once to f16.
            let scales: Vec<f32> = scales.iter().map(|scale| scale.to_f32()).collect();
            let scales = self.rows.by_channel(&scales)?.f_to_device(dense.device())?;
            weight = weight.f_mul(&scales)?.f_to_kind(Kind::Half)?;
        }
        dense.f_copy_(&weight)?;
        Ok(())
    }

    /// The scales that are stored beside `entries` as they are stored: none, one per table, or one per channel.
    fn scales(&self, entries: &[f64]) -> Result<Vec<f16>> {
        let of_channels = self.rows.scales()?;
        let units = &self.rounding.units;
        if of_channels.is_empty() {
            return Ok(units.iter().map(|&unit| f16::from_f64(unit)).collect());
        }
        let largest = |table: &[f64]| table.iter().fold(0f64, |largest, entry| largest.max(entry.abs()));
        let largest: Vec<f64> = entries.chunks(self.form.table()).map(largest).collect();
        let scale = |(channel, scale): (usize, &f64)| {
            let group = channel * largest.len() / of_channels.len();
            scale_within(scale * units.get(group).unwrap_or(&1.0), largest[group])
        };
        Ok(of_channels.iter().enumerate().map(scale).collect())
    }

    fn look_up(&self, values: &[f32], to: &mut Tensor) -> Result<()> {
        // SAFETY: values are looked up in plain Rust: no operator runs meanwhile.
        let (indices, mut to) = unsafe { (slices::elements::<u8>(&self.indices)?, slices::elements_mut::<f32>(to)?) };
        let (length, dim) = ((indices.len() / self.rows.groups().max(1)).max(1), self.form.cluster_dim);
        let groups = to.chunks_mut(length * dim).zip(indices.chunks(length)).zip(values.chunks(self.form.table()));
        for ((to, indices), table) in groups {
            let size = self.run(indices.len());
            to.par_chunks_mut(size * dim).zip(indices.par_chunks(size)).for_each(|(to, indices)| {
                for (place, to) in to.chunks_mut(indices.len().max(1)).enumerate() {
                    to.iter_mut().zip(indices).for_each(|(to, &index)| *to = table[index as usize * dim + place]);
                }
            });
        }
        Ok(())
    }

    /// So many indices, one after the other, stand for as many weights, or where entries hold d weights for d such runs.
    fn run(&self, indices: usize) -> usize {
        if self.form.cluster_dim > 1 { self.rows.inner().max(1) } else { piece(indices) }
    }

    /// Where each element's number is in all of `entries`: `[elements]` Int, in the order of rows.
    fn places(&self) -> Result<Tensor> {
        let (groups, device) = (self.rows.groups() as i64, self.indices.device());
        let dim = self.form.cluster_dim as i64;
        let first = Tensor::f_arange(groups, (Kind::Int, device))? * (1i64 << self.form.bits);
        let entries = self.indices.f_to_kind(Kind::Int)?.f_add(&first.f_view([groups, 1])?)?;
        if dim == 1 {
            return Ok(entries.f_view(-1)?);
        }
        let runs = entries.f_view([-1, 1, self.rows.inner() as i64])?.f_mul_scalar(dim)?;
        Ok(runs.f_add(&Tensor::f_arange(dim, (Kind::Int, device))?.f_view([1, dim, 1])?)?.f_view(-1)?)
    }

    /// ∂L/∂entries (`[G · 2^bits · d]` f32) from `upstream`, ∂L/∂weight: for each entry the sum over its members.
    ///
    /// # Errors
    /// When `upstream` has another shape or is on another device.
    pub fn gradient(&self, upstream: &Tensor) -> Result<Tensor> {
        let _guard = tch::no_grad_guard();
        let upstream = upstream.f_detach()?.f_to_kind(Kind::Float)?;
        ensure!(
            upstream.device() == self.indices.device(),
            "parameter {}: a gradient on {:?} is not that of its weight, on {:?}",
            self.name,
            upstream.device(),
            self.indices.device()
        );
        let rows = self.rows.of_gradient(&upstream).with_context(|| format!("parameter {}: a gradient", self.name))?;
        let (table, dim) = (self.form.table(), self.form.cluster_dim);
        if upstream.device() != Device::Cpu {
            let sums = self.places()?.f_bincount(Some(&rows.f_view(-1)?), (self.rows.groups() * table) as i64)?;
            return Ok(sums.f_to_kind(Kind::Float)?);
        }
        // SAFETY: they are added up in plain Rust: no operator runs meanwhile.
        let (values, indices) = unsafe { (slices::elements::<f32>(&rows)?, slices::elements::<u8>(&self.indices)?) };
        let length = (indices.len() / self.rows.groups().max(1)).max(1);
        let mut sums = vec![0f32; self.rows.groups() * table];
        let groups = values.chunks(length * dim).zip(indices.chunks(length)).zip(sums.chunks_mut(table));
        groups.for_each(|((values, indices), sums)| match dim {
            1 => add_up::<1>(values, indices, self.run(indices.len()), sums),
            2 => add_up::<2>(values, indices, self.run(indices.len()), sums),
            _ => add_up::<4>(values, indices, self.run(indices.len()), sums),
        });
        Ok(Tensor::f_from_slice(&sums)?)
    }

    /// The palette, entries rounded as they are stored, in the order in which they are trained.
    ///
    /// # Errors
    /// When an entry is not finite in f16; names the layer.
    pub fn palette(&self) -> Result<Palette> {
        let make = || {
            let rounded = self.rounding.rounded(&self.entries()?);
            let scales = self.scales(&rounded)?;
            let entries = rounded.into_iter().map(f16::from_f64).collect();
            let indices = self.rows.indices_in_shape(&self.indices)?;
            let indices = Vec::<u8>::try_from(indices.f_view(-1)?.f_to_device(Device::Cpu)?)?;
            Palette::with_form(self.form, self.rows.shape().to_vec(), indices, entries, scales)
        };
        make().with_context(|| format!("parameter {}", self.name))
    }

    /// All of the state, as tensors named after the layer: entries and assignments shared with it, not copies.
    pub fn tensors(&self) -> Vec<(String, Tensor)> {
        let mut tensors = vec![
            (format!("{}.assignments", self.name), self.indices.view(-1)),
            (format!("{}.entries", self.name), self.entries.shallow_clone()),
        ];
        let scales = self.rows.scales().unwrap_or_default();
        for (part, values) in [("units", &self.rounding.units), ("scales", &scales)] {
            if !values.is_empty() {
                tensors.push((format!("{}.{part}", self.name), Tensor::from_slice(values)));
            }
        }
        tensors
    }

    /// The layer of `shape` whose [`Self::tensors`] are among `tensors`, bit for bit, on `device`.
    ///
    /// # Errors
    /// When one is missing or not as expected; names it.
    pub fn restore(name: &str, form: Form, shape: &[i64], tensors: &Weights, device: Device) -> Result<Self> {
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
        check_form(&form, shape).with_context(|| format!("parameter {name}"))?;
        let (groups, indices) = (form.groups(shape), (elements(shape)? / form.cluster_dim) as i64);
        let numbers = |wanted: bool, part: &str, length: usize| {
            if wanted { saved(tensors, name, part, length) } else { Ok(Vec::new()) }
        };
        let scales = numbers(form.per_channel_scale, "scales", shape.first().map_or(0, |&c| c as usize))?;
        let units = numbers(form.lut_dtype == LutDtype::I8, "units", groups)?;
        let frozen = Self {
            name: name.to_string(),
            form,
            rows: Rows::new(&form, shape, &scales, device)?,
            rounding: Rounding { table: form.table(), units },
            indices: get("assignments", Kind::Uint8, indices)?
                .f_view([groups as i64, indices / groups.max(1) as i64])?,
            entries: get("entries", Kind::Float, (groups * form.table()) as i64)?,
        };
        // Assignments past the entries are found here, not when the weight is looked up.
        frozen.palette()?;
        Ok(frozen)
    }
}

/// Adds each value to the sum of its place in its entry: of `run` indices at a time, D runs of values.
fn add_up<const D: usize>(values: &[f32], indices: &[u8], run: usize, to: &mut [f32]) {
    // Neighbours often share an entry: four sums each, so that additions need not wait for each other.
    let none = || vec![[0f64; 4]; to.len()];
    let add = |mut sums: Vec<[f64; 4]>, (values, indices): (&[f32], &[u8])| {
        for (place, values) in values.chunks(indices.len().max(1)).enumerate() {
            for (turn, (&value, &index)) in values.iter().zip(indices).enumerate() {
                sums[index as usize * D + place][turn % 4] += value as f64;
            }
        }
        sums
    };
    // Whole runs, as many as make a piece: merged in order, whatever the number of threads.
    let size = piece(indices.len()).next_multiple_of(run);
    let pieces: Vec<Vec<[f64; 4]>> = values
        .par_chunks(size * D)
        .zip(indices.par_chunks(size))
        .map(|(values, indices)| values.chunks(run * D).zip(indices.chunks(run)).fold(none(), add))
        .collect();
    for (j, to) in to.iter_mut().enumerate() {
        let sum = |piece: &Vec<[f64; 4]>| (piece[j][0] + piece[j][1]) + (piece[j][2] + piece[j][3]);
        *to = pieces.iter().map(sum).sum::<f64>() as f32;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::palette::DkmLayer;
    use crate::torch::random::{Purpose, generator, normal};

    /// Weights up to the largest number of fp16 have palettes, though codes and k-means round beyond it; what is far beyond
    /// has diverged, and is told.
    #[test]
    fn weights_at_the_edge_of_fp16_have_palettes() {
        let edge = half::f16::MAX.to_f64();
        let signs = normal(&mut generator(4, Purpose::Initial, 1), &[16, 24, 3, 3]).sign();
        let near = Tensor::linspace(edge * 0.999, edge, 16 * 24 * 9, (Kind::Float, Device::Cpu)).view_as(&signs);
        let plain = Form::per_tensor(2);
        for form in [
            plain,
            Form::per_tensor(8),
            Form { group_size: Some(4), bits: 4, ..plain },
            Form { per_channel_scale: true, ..plain },
            Form { per_channel_scale: true, bits: 8, ..plain },
            Form { per_channel_scale: true, lut_dtype: LutDtype::I8, ..plain },
            Form { lut_dtype: LutDtype::I8, ..plain },
            Form { cluster_dim: 2, bits: 4, ..plain },
        ] {
            for weight in [&signs * edge, &signs * &near] {
                let frozen = DkmLayer::new("layer", form, &weight).unwrap().freeze(&weight).unwrap();
                let palette = frozen.palette().unwrap_or_else(|error| panic!("{form:?}: {error:#}"));
                let mut dense = weight.empty_like();
                frozen.dense(&mut dense).unwrap();
                assert!(dense.equal(&palette.tensor(Kind::Float, Device::Cpu).unwrap()), "{form:?}");
                let off = ((&dense - &weight).abs().max() / edge).double_value(&[]);
                assert!(off < 0.01, "{form:?}: {off}");
                if form.lut_dtype == LutDtype::F16 {
                    let _ = frozen.entries.get(0).fill_(-1.1 * edge);
                    frozen.palette().unwrap_err();
                }
            }
        }
    }

    /// Whatever its form, a palette is at first what it was; and its entries are of the size of the weights, or of 1.
    #[test]
    fn a_palette_of_a_file_learns_on_from_what_it_is() {
        let plain = Form::per_tensor(2);
        for form in [
            plain,
            Form { group_size: Some(4), bits: 4, ..plain },
            Form { group_size: Some(4), axis: 1, ..plain },
            Form { per_channel_scale: true, ..plain },
            Form { per_channel_scale: true, lut_dtype: LutDtype::I8, ..plain },
            Form { lut_dtype: LutDtype::I8, group_size: Some(8), ..plain },
            Form { cluster_dim: 2, bits: 4, ..plain },
            Form { cluster_dim: 4, bits: 4, axis: 1, lut_dtype: LutDtype::I8, ..plain },
        ] {
            let weight = normal(&mut generator(3, Purpose::Initial, 1), &[16, 24, 3, 3]) * 0.05;
            let palette = DkmLayer::new("layer", form, &weight).unwrap().hard(&weight).unwrap();
            let mut frozen = Frozen::of("layer", &palette, Device::Cpu).unwrap();
            assert_eq!(frozen.palette().unwrap(), palette, "{form:?}");
            let mut dense = weight.empty_like();
            frozen.dense(&mut dense).unwrap();
            assert!(dense.equal(&palette.tensor(Kind::Float, Device::Cpu).unwrap()), "{form:?}");
            let largest = frozen.entries.abs().max().double_value(&[]);
            assert!((0.05..4.0).contains(&largest), "{form:?}: {largest}");
            // An entry that moves moves its members.
            let _ = frozen.entries.get(0).fill_(0.11);
            frozen.entries = frozen.entries.copy();
            frozen.dense(&mut dense).unwrap();
            assert!(dense.equal(&frozen.palette().unwrap().tensor(Kind::Float, Device::Cpu).unwrap()), "{form:?}");
        }
    }
}
