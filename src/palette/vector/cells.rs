//! Weights as points of D, sorted by where they lie, so that a block of them sees the same few entries of a palette.
//!
//! A point's *cell* is the entry that is nearest to it before a step; each cell is cut further, by the signs of its
//! points' distance from that entry along one axis after the other, as long as there are points enough. Points are kept as
//! that distance in units of 1/κ,
//! κ² = log₂e/τ, in which attention is 2^−|y−e|² and f32 loses nothing however far from zero a cell lies. Pieces of a
//! tensor are sorted each by itself, so that threads share nothing; their size depends on the tensor's alone.

use std::ops::Range;

use rayon::prelude::*;

use super::nearest::nearest;
use crate::torch::slices::piece;

/// As many points a cell there are at least, on average, where cells are cut.
const WORTH_CUTTING: usize = 28;
/// Points whose nearest entries are found at a time.
const BATCH: usize = 1 << 12;

/// A point, or a vector: D numbers.
pub type Vector<const D: usize> = [f64; D];

/// How weights lie in memory and what cells are measured by.
#[derive(Clone, Debug)]
pub struct Frame<const D: usize> {
    /// A point's numbers are so many apart; so many points follow each other before the next D · `inner` weights.
    pub inner: usize,
    /// κ
    pub scale: f64,
    /// Of the cells: the entries before the step.
    pub origins: Vec<Vector<D>>,
}

/// The points of one cell, or of a part of it.
pub struct Cell<const D: usize> {
    pub label: usize,
    pub points: Range<usize>,
    /// All of the points are between these.
    pub low: [f32; D],
    pub high: [f32; D],
}

/// One piece of the weights, sorted.
pub struct Sorted<const D: usize> {
    /// In the order of the weights: which cell, counted with its cuts.
    codes: Vec<u16>,
    /// Times that a cell is cut.
    cuts: usize,
    /// The first place of each code.
    starts: Vec<u32>,
    pub cells: Vec<Cell<D>>,
    /// Of each coordinate, in the order of cells: the points.
    pub points: [Vec<f32>; D],
    /// The same of something that goes with them: a gradient, the soft weight.
    pub carried: [Vec<f32>; D],
}

impl<const D: usize> Frame<D> {
    /// Weights that one piece has: whole rows of points.
    pub fn piece(&self, weights: usize) -> usize {
        piece(weights).next_multiple_of((D * self.inner).max(1))
    }

    /// The cell of each point: the nearest origin. `None` when a weight is infinite or not a number.
    pub fn labels(&self, weights: &[f32]) -> Option<Vec<u8>> {
        let origins: Vec<[f32; D]> = self.origins.iter().map(|origin| origin.map(|c| c as f32)).collect();
        let mut labels = vec![0u8; weights.len() / D];
        let size = self.piece(weights.len());
        let finite = weights.par_chunks(size).zip(labels.par_chunks_mut(size / D)).map(|(weights, labels)| {
            let mut batch = Vec::with_capacity(BATCH);
            for (rows, labels) in weights.chunks(D * self.inner).zip(labels.chunks_mut(self.inner)) {
                for (number, labels) in labels.chunks_mut(BATCH).enumerate() {
                    let first = number * BATCH;
                    batch.clear();
                    let point = |i: usize| std::array::from_fn(|d| rows[d * self.inner + first + i]);
                    batch.extend((0..labels.len()).map(point));
                    nearest(&batch, &origins, labels);
                }
            }
            weights.iter().all(|weight| weight.is_finite())
        });
        finite.reduce(|| true, |a, b| a && b).then_some(labels)
    }

    /// The pieces of the weights, sorted; nothing is carried yet.
    pub fn sort(&self, weights: &[f32], labels: &[u8]) -> Vec<Sorted<D>> {
        let size = self.piece(weights.len());
        // An origin as the sum of two f32: a weight's distance from it loses nothing then.
        let origins: Vec<[[f32; 2]; D]> =
            self.origins.iter().map(|o| o.map(|c| [c as f32, (c - f64::from(c as f32)) as f32])).collect();
        weights
            .par_chunks(size)
            .zip(labels.par_chunks(size / D))
            .map(|(weights, labels)| self.sort_piece(weights, labels, &origins))
            .collect()
    }

    fn sort_piece(&self, weights: &[f32], labels: &[u8], origins: &[[[f32; 2]; D]]) -> Sorted<D> {
        let cuts =
            (0..=D).rev().find(|&cuts| labels.len() >= (WORTH_CUTTING * self.origins.len()) << cuts).unwrap_or(0);
        let scale = self.scale as f32;
        let at = |rows: &[f32], i: usize, label: u8| -> [f32; D] {
            let origin = &origins[label as usize];
            std::array::from_fn(|d| (rows[d * self.inner + i] - origin[d][0] - origin[d][1]) * scale)
        };
        let rows = || weights.chunks(D * self.inner).zip(labels.chunks(self.inner));
        let mut codes = Vec::with_capacity(labels.len());
        let mut starts = vec![0u32; (self.origins.len() << cuts) + 1];
        for (rows, labels) in rows() {
            for (i, &label) in labels.iter().enumerate() {
                let point = at(rows, i, label);
                let code = (0..cuts).fold(label as u16, |code, d| code << 1 | u16::from(point[d] < 0.0));
                starts[code as usize + 1] += 1;
                codes.push(code);
            }
        }
        for code in 1..starts.len() {
            starts[code] += starts[code - 1];
        }
        let mut sorted = Sorted {
            cells: Vec::new(),
            points: std::array::from_fn(|_| vec![0.0; labels.len()]),
            carried: std::array::from_fn(|_| Vec::new()),
            codes,
            cuts,
            starts,
        };
        let mut next = sorted.starts.clone();
        let mut codes = sorted.codes.iter();
        for (rows, labels) in rows() {
            for ((i, &label), &code) in labels.iter().enumerate().zip(&mut codes) {
                let place = next[code as usize] as usize;
                next[code as usize] += 1;
                let point = at(rows, i, label);
                (0..D).for_each(|d| sorted.points[d][place] = point[d]);
            }
        }
        for (code, bounds) in sorted.starts.windows(2).enumerate() {
            let points = bounds[0] as usize..bounds[1] as usize;
            let end = |d: usize, of: fn(f32, f32) -> f32, from: f32| {
                sorted.points[d][points.clone()].iter().fold(from, |a, &b| of(a, b))
            };
            if !points.is_empty() {
                let low = std::array::from_fn(|d| end(d, f32::min, f32::INFINITY));
                let high = std::array::from_fn(|d| end(d, f32::max, f32::NEG_INFINITY));
                sorted.cells.push(Cell { label: code >> cuts, points, low, high });
            }
        }
        sorted
    }

    /// Makes pieces carry `values`, one for each weight.
    pub fn carry(&self, pieces: &mut [Sorted<D>], values: &[f32]) {
        pieces.par_iter_mut().zip(values.par_chunks(self.piece(values.len()))).for_each(|(piece, values)| {
            let mut carried: [Vec<f32>; D] = std::array::from_fn(|_| vec![0.0; piece.codes.len()]);
            piece.walk(self.inner, |first, place, _| {
                (0..D).for_each(|d| carried[d][place] = values[first + d * self.inner]);
            });
            piece.carried = carried;
        });
    }

    /// Writes what pieces carry to `to`, one number for each weight; `of` makes it of its cell, coordinate and itself.
    pub fn put_down(&self, pieces: &[Sorted<D>], to: &mut [f32], of: impl Fn(usize, usize, f32) -> f32 + Sync) {
        let size = self.piece(to.len());
        pieces.par_iter().zip(to.par_chunks_mut(size)).for_each(|(piece, to)| {
            piece.walk(self.inner, |first, place, label| {
                (0..D).for_each(|d| to[first + d * self.inner] = of(label, d, piece.carried[d][place]));
            });
        });
    }
}

impl<const D: usize> Sorted<D> {
    /// Makes the points carry zeros.
    pub fn make_room(&mut self) {
        self.carried = std::array::from_fn(|_| vec![0.0; self.codes.len()]);
    }

    /// Calls `each` for the points in the order of the weights, with the place of the first weight, the place among the
    /// sorted, and the label.
    fn walk(&self, inner: usize, mut each: impl FnMut(usize, usize, usize)) {
        let mut next = self.starts.clone();
        for (row, codes) in self.codes.chunks(inner.max(1)).enumerate() {
            for (i, &code) in codes.iter().enumerate() {
                let place = next[code as usize] as usize;
                next[code as usize] += 1;
                each(row * D * inner + i, place, (code >> self.cuts) as usize);
            }
        }
    }
}
