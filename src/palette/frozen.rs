//! A palette whose assignments no longer change, so that only its entries are trained.

use anyhow::{Context, Result, ensure};
use half::f16;
use rayon::prelude::*;
use tch::{Device, Kind, Tensor};

use super::rows::Rows;
use super::{Form, LutDtype, Palette, piece};
use crate::ops::Weights;
use crate::torch::slices;

/// How the entries of a layer are rounded where they are stored.
#[derive(Clone, Debug, PartialEq)]
pub struct Stored {
    /// Numbers of a table.
    table: usize,
    /// For integers of 8 bits, what each table's are multiplied by, as f16 holds it.
    units: Vec<f64>,
}

impl Stored {
    /// For tables of `entries` (`[G, K, d]`) that are multiplied by `scales`, none or one a channel: integers reach up to the
    /// largest of a table, or less far where f16 has few bits for a scale so small.
    pub fn new(form: &Form, entries: &[f64], scales: &[f64]) -> Self {
        let units = match form.lut_dtype {
            LutDtype::F16 => Vec::new(),
            LutDtype::I8 => {
                let tables = entries.chunks(form.table());
                let channels = scales.len() / tables.len().max(1);
                tables.enumerate().map(|(group, table)| unit(table, &scales[group * channels..][..channels])).collect()
            }
        };
        Self { table: form.table(), units }
    }

    /// What is stored for an entry of table `group`: itself in f16, or an integer.
    fn round(&self, group: usize, entry: f64) -> f16 {
        match self.units.get(group) {
            Some(unit) => f16::from_f64((entry / unit).round().clamp(-127.0, 127.0)),
            None => f16::from_f64(entry),
        }
    }

    /// What is stored for `entries` (`[G, K, d]`): numbers of f16.
    fn rounded(&self, entries: &[f64]) -> Vec<f64> {
        entries.iter().enumerate().map(|(place, &entry)| self.round(place / self.table, entry).to_f64()).collect()
    }

    /// The values of `entries` (`[G, K, d]`) once stored, in units of a channel's scale where there is one.
    pub fn values(&self, entries: &[f64]) -> Vec<f64> {
        let value = |(place, &entry): (usize, &f64)| {
            let group = place / self.table;
            let stored = self.round(group, entry).to_f64();
            // As Core ML computes it, unless a channel's scale comes in between: f16 of the product.
            self.units.get(group).map_or(stored, |unit| f16::from_f64(stored * unit).to_f64())
        };
        entries.iter().enumerate().map(value).collect()
    }
}

/// What the integers of a table are multiplied by, so that times each of `scales` it is a number of f16, or nearly so.
fn unit(table: &[f64], scales: &[f64]) -> f64 {
    /// The smallest number of f16 above 0.
    const SMALLEST: f64 = 1.0 / (1 << 24) as f64;
    let largest = table.iter().fold(0f64, |m, e| m.max(e.abs()));
    let least = (largest / 127.0).max(f64::MIN_POSITIVE);
    if scales.is_empty() {
        let near = f16::from_f64(least);
        // Among the small ones, which are few, the one above is taken: the one below would cut off the largest entries.
        let above = if near.is_normal() || near.to_f64() >= least { near } else { f16::from_bits(near.to_bits() + 1) };
        return above.to_f64().max(SMALLEST);
    }
    // What is lost by integers of this unit, and by the scales in it.
    let power = table.iter().map(|entry| entry * entry).sum::<f64>() / table.len() as f64;
    let lost = |unit: f64| -> f64 {
        let of_scale = |scale: &f64| {
            let off = f16::from_f64(scale * unit).to_f64() / unit - scale;
            (unit * scale).powi(2) / 12.0 + power * off * off
        };
        scales.iter().map(of_scale).sum()
    };
    let (median, mut ascending) = (scales.len() / 2, scales.to_vec());
    ascending.sort_by(f64::total_cmp);
    let exact = |unit: f64| f16::from_f64(unit * ascending[median]).to_f64() / ascending[median];
    let steps = (0..=14).map(|step| least * (f64::from(step) / 2.0).exp2());
    let tried = steps.flat_map(|unit| [unit, exact(unit)]).filter(|&unit| unit >= least);
    tried.min_by(|a, b| lost(*a).total_cmp(&lost(*b))).unwrap_or(least)
}

/// One layer with fixed assignments.
#[derive(Debug)]
pub struct Frozen {
    /// The parameter's diffusers name.
    pub name: String,
    pub form: Form,
    rows: Rows,
    stored: Stored,
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
        stored: Stored,
        indices: &[u8],
        entries: &[f64],
        device: Device,
    ) -> Result<Self> {
        let entries: Vec<f32> = entries.iter().map(|&e| e as f32).collect();
        let groups = rows.groups() as i64;
        let frozen = Self {
            name: name.to_string(),
            form,
            stored,
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
            Self::new(name, *form, rows, Stored { table, units }, &indices, &entries, device)
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
        let scales = if self.form.per_channel_scale { self.scales()? } else { Vec::new() };
        let values = if scales.is_empty() { self.stored.values(&entries) } else { self.stored.rounded(&entries) };
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

    /// The scales that are stored: none, one a table, or one a channel.
    fn scales(&self) -> Result<Vec<f16>> {
        let of_channels = self.rows.scales()?;
        let units = &self.stored.units;
        if of_channels.is_empty() {
            return Ok(units.iter().map(|&unit| f16::from_f64(unit)).collect());
        }
        let unit = |channel: usize| units.get(channel * units.len() / of_channels.len()).unwrap_or(&1.0);
        Ok(of_channels.iter().enumerate().map(|(c, scale)| f16::from_f64(scale * unit(c))).collect())
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
            let entries = self.stored.rounded(&self.entries()?).into_iter().map(f16::from_f64).collect();
            let indices = self.rows.indices_in_shape(&self.indices)?;
            let indices = Vec::<u8>::try_from(indices.f_view(-1)?.f_to_device(Device::Cpu)?)?;
            Palette::with_form(self.form, self.rows.shape().to_vec(), indices, entries, self.scales()?)
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
        for (part, values) in [("units", &self.stored.units), ("scales", &scales)] {
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
        super::check_form(&form, shape).with_context(|| format!("parameter {name}"))?;
        let (groups, indices) = (form.groups(shape), (super::elements(shape)? / form.cluster_dim) as i64);
        let numbers = |wanted: bool, part: &str, length: usize| {
            if wanted { super::dkm::saved(tensors, name, part, length) } else { Ok(Vec::new()) }
        };
        let scales = numbers(form.per_channel_scale, "scales", shape.first().map_or(0, |&c| c as usize))?;
        let units = numbers(form.lut_dtype == LutDtype::I8, "units", groups)?;
        let frozen = Self {
            name: name.to_string(),
            form,
            rows: Rows::new(&form, shape, &scales, device)?,
            stored: Stored { table: form.table(), units },
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
