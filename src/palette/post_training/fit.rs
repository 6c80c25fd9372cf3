//! The palette of a [`Form`] that is nearest to a weight, by squared error.
//!
//! Each group of channels is a problem of its own. Plain tables come from the exact k-means; tables with scales from
//! `scaled`; vectors from `vectors`.

use std::borrow::Cow;

use anyhow::{Result, ensure};
use half::f16;
use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;

use super::group::{Group, SMALLEST, finite, integers, stored_unit, whole};
use super::kmeans::{self, Fit};
use super::scaled::scaled;
use super::vectors::{self, assign};
use crate::palette::forms::check_form;
use crate::palette::{Form, LutDtype, Palette};
use crate::torch::slices::piece;

/// The palette of this form for `values` (row-major, of `shape`): the nearest where it is one table of numbers, one close
/// to the nearest for others.
///
/// # Errors
/// When a value is infinite or not a number, or the arguments do not fit each other.
pub fn fit(values: &[f16], shape: &[i64], form: &Form) -> Result<Fit> {
    check_form(form, shape)?;
    if form.is_per_tensor() {
        return kmeans::fit(values, shape, form.bits);
    }
    let bad = values.iter().filter(|value| !value.is_finite()).count();
    ensure!(bad == 0, "{bad} of its values are infinite or not numbers");
    let layout = Layout::new(form, shape);
    ensure!(layout.elements() == values.len(), "there are {} values for a shape {shape:?}", values.len());
    let groups = (0..layout.groups).into_par_iter().map(|group| match form.cluster_dim {
        2 => Ok(vector_group::<2>(&layout.points(values, group), form, group as u64)),
        4 => Ok(vector_group::<4>(&layout.points(values, group), form, group as u64)),
        _ => match form.scales(shape) {
            0 => {
                let (entries, indices) = kmeans::table(&layout.numbers(values, group), form.bits)?;
                Ok(Group { entries, scales: Vec::new(), indices })
            }
            scales => scaled(&layout.numbers(values, group), scales / layout.groups, form),
        },
    });
    let groups: Vec<Group> = groups.collect::<Result<_>>()?;
    let indices = layout.scatter(&groups);
    let entries = groups.iter().flat_map(|group| group.entries.iter().copied()).collect();
    let scales = groups.iter().flat_map(|group| group.scales.iter().copied()).collect();
    let palette = Palette::with_form(*form, shape.to_vec(), indices, entries, scales)?;
    let mean = |sum: f64| if values.is_empty() { 0.0 } else { sum / values.len() as f64 };
    let (error, power) = squares(values, &palette.dense());
    Ok(Fit { palette, error: mean(error), power: mean(power) })
}

/// Sums of the squares of the differences, and of `values`.
fn squares(values: &[f16], dense: &[f16]) -> (f64, f64) {
    let size = piece(values.len());
    let pieces = values.par_chunks(size).zip(dense.par_chunks(size)).map(|(values, dense)| {
        let (mut wide, mut error, mut power) = ([[0f32; 256]; 2], 0.0, 0.0);
        for (values, dense) in values.chunks(256).zip(dense.chunks(256)) {
            let [a, b] = &mut wide;
            values.convert_to_f32_slice(&mut a[..values.len()]);
            dense.convert_to_f32_slice(&mut b[..values.len()]);
            for (a, b) in a.iter().zip(b.iter()).take(values.len()) {
                error += f64::from(a - b).powi(2);
                power += f64::from(*a).powi(2);
            }
        }
        (error, power)
    });
    let pieces: Vec<(f64, f64)> = pieces.collect();
    pieces.iter().fold((0.0, 0.0), |sum, piece| (sum.0 + piece.0, sum.1 + piece.1))
}

/// One table of vectors, of fp16 numbers or of integers and their scale.
fn vector_group<const D: usize>(points: &[[f32; D]], form: &Form, seed: u64) -> Group {
    let count = 1 << form.bits;
    let mut entries = vectors::means(points, count, seed);
    // Fewer distinct points than entries: what is left is not used.
    entries.resize(count, entries.last().copied().unwrap_or([0.0; D]));
    let mut indices = vec![0; points.len()];
    if form.lut_dtype == LutDtype::F16 {
        let rounded: Vec<[f32; D]> = entries.iter().map(|entry| entry.map(|c| finite(c.into()).to_f32())).collect();
        assign(points, None, &rounded, Some(&mut indices));
        return Group { entries: halves(&rounded), scales: Vec::new(), indices };
    }
    let members = assign(points, None, &entries, None);
    let numbers: Vec<f64> = entries.iter().flatten().map(|&c| c.into()).collect();
    let weights: Vec<f64> = members.sums.iter().flat_map(|(total, _)| [*total; D]).collect();
    let scale = finite(integers(&numbers, &weights, SMALLEST, stored_unit));
    let unit = scale.to_f64();
    let value = |c: f64| f16::from_f64(c * unit).to_f32();
    let mut wholes: Vec<[f64; D]> = entries.iter().map(|entry| entry.map(|c| whole(c.into(), unit))).collect();
    let mut best = (f64::INFINITY, Vec::new());
    // Members move with the rounding, and then the best integers may too.
    for _ in 0..4 {
        let table: Vec<[f32; D]> = wholes.iter().map(|entry| entry.map(value)).collect();
        let mut found = vec![0; points.len()];
        let members = assign(points, None, &table, Some(&mut found));
        if members.error() >= best.0 {
            break;
        }
        best = (members.error(), wholes.clone());
        indices = found;
        for (entry, (total, sum)) in wholes.iter_mut().zip(members.sums) {
            if total > 0.0 {
                *entry = sum.map(|sum| whole(sum / total, unit));
            }
        }
    }
    let entries = best.1.iter().flatten().map(|&c| f16::from_f64(c)).collect();
    Group { entries, scales: vec![scale], indices }
}

fn halves<const D: usize>(entries: &[[f32; D]]) -> Vec<f16> {
    entries.iter().flatten().map(|&c| f16::from_f32(c)).collect()
}

/// How the groups of a weight lie in it: `[outer, channels, inner]`, groups and vectors along the channels.
struct Layout {
    outer: usize,
    channels: usize,
    inner: usize,
    groups: usize,
    dim: usize,
}

impl Layout {
    fn new(form: &Form, shape: &[i64]) -> Self {
        let size = |sizes: &[i64]| sizes.iter().product::<i64>() as usize;
        let axis = form.axis.min(shape.len().saturating_sub(1));
        Self {
            outer: size(&shape[..axis]),
            channels: shape.get(axis).map_or(1, |&n| n as usize),
            inner: shape.get(axis + 1..).map_or(1, size),
            groups: form.groups(shape),
            dim: form.cluster_dim,
        }
    }

    fn elements(&self) -> usize {
        self.outer * self.channels * self.inner
    }

    /// The weights of a group in the order of its indices: outer, place in the group, inner.
    fn numbers<'v>(&self, values: &'v [f16], group: usize) -> Cow<'v, [f16]> {
        let run = self.channels / self.groups * self.inner;
        let of = |outer: usize| &values[(outer * self.groups + group) * run..][..run];
        match self.outer {
            1 => Cow::Borrowed(of(0)),
            outer => Cow::Owned((0..outer).flat_map(of).copied().collect()),
        }
    }

    /// The weights of a group as points of D, in the order of its indices: outer, place in the group, inner.
    fn points<const D: usize>(&self, values: &[f16], group: usize) -> Vec<[f32; D]> {
        let size = self.channels / self.groups;
        let mut points = Vec::with_capacity(self.outer * size / D * self.inner);
        for outer in 0..self.outer {
            for place in (0..size).step_by(D) {
                let start = (outer * self.channels + group * size + place) * self.inner;
                let at = |d: usize, i: usize| values[start + d * self.inner + i].to_f32();
                points.extend((0..self.inner).map(|i| -> [f32; D] { std::array::from_fn(|d| at(d, i)) }));
            }
        }
        points
    }

    /// The indices of all groups where they belong in the weight.
    fn scatter(&self, groups: &[Group]) -> Vec<u8> {
        let run = self.channels / self.groups / self.dim * self.inner;
        let mut indices = Vec::with_capacity(self.elements() / self.dim);
        for outer in 0..self.outer {
            for group in groups {
                indices.extend_from_slice(&group.indices[outer * run..][..run]);
            }
        }
        indices
    }
}
