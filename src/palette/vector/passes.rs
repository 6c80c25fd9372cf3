//! What differentiable k-means of vectors does with every weight: attention to the entries that its cell sees, and sums.
//!
//! A block of points that see the same entries is computed at once, so that the compiler makes vectors of it, as wide as
//! the [level](crate::palette::Level) in use has them. Entries whose attention is below 2⁻²⁶ of the largest count as not seen, being
//! lost in its rounding. Sums run in f32 over a cell of a piece, then in f64, in a fixed order; every multiplication and
//! addition that is fused is so on every processor: results do not depend on threads or on the width of vectors.

// Loops over lanes and axes by number, as the compiler makes vectors of them.
#![allow(clippy::needless_range_loop)]

use std::f64::consts::LN_2;

use anyhow::Result;
use rayon::prelude::*;

use super::attention::{BLOCK, LANES, Lanes, Nearby, Numbers, PARTS, Seen, attend, offset};
use super::cells::{Frame, Sorted, Vector};
use super::clustering::{Passes, Sums};
use crate::palette::level::vectorized;

/// [`Sums`] over the points of one cell, lane by lane; moments are measured from the cell's origin.
#[derive(Clone)]
struct CellSums<const D: usize> {
    weight: Lanes,
    moment: [Lanes; D],
    other: [Lanes; D],
}

struct Block<'a, const D: usize> {
    /// How many of the registers hold points.
    parts: usize,
    points: &'a [Numbers; D],
    /// 1 for points, 0 past the end of the cell.
    valid: &'a Numbers,
    seen: &'a [Seen<D>],
    /// A row for each of `seen`; 0 past the end of the cell.
    attention: &'a [Numbers],
}

/// One pass over all points.
trait Pass<const D: usize>: Sync {
    /// Whether it makes sums, and of other numbers too.
    const SUMS: bool;
    const OTHER: bool;
    /// Whether it reads or replaces what points carry.
    const CARRIES: bool;

    /// [`Seen::vector`] and [`Seen::constant`] of an entry for cells of this label.
    fn prepare(&self, frame: &Frame<D>, label: usize, place: usize) -> ([f32; D], f32);

    /// Adds the block to the sums of the entries that it sees; may read and replace what the points carry. What it
    /// returns is added up.
    fn block(&self, block: &Block<D>, sums: &mut [CellSums<D>], carried: &mut [Numbers; D]) -> f64;
}

/// The points of a weight in memory, sorted.
pub struct Points<'a, const D: usize> {
    pub frame: &'a Frame<D>,
    pub pieces: Vec<Sorted<D>>,
}

/// What points carry is, after [`Passes::read`], from their origin and in units of 1/κ.
impl<const D: usize> Passes<D> for Points<'_, D> {
    fn update(&mut self, entries: &[Vector<D>]) -> Result<Vec<Sums<D>>> {
        Ok(self.run(entries, &Update).0)
    }

    fn read(&mut self, previous: &[Vector<D>], last: &[Vector<D>]) -> Result<f64> {
        Ok(self.run(previous, &Read { last }).1 / (self.frame.scale * self.frame.scale))
    }

    fn read_back(&mut self, previous: &[Vector<D>], last: &[Vector<D>]) -> Result<Vec<[Vector<D>; 2]>> {
        let sums = self.run(previous, &ReadBack { last }).0;
        Ok(sums.into_iter().map(|sums| [sums.other, self.through_slopes(sums.moment)]).collect())
    }

    fn update_back(&mut self, share: &[Vector<D>], old: &[Vector<D>], new: &[Vector<D>]) -> Result<Vec<Vector<D>>> {
        let sums = self.run(old, &UpdateBack { share, new }).0;
        Ok(sums.into_iter().map(|sums| self.through_slopes(sums.moment)).collect())
    }
}

/// [`Passes::update`].
struct Update;

impl<const D: usize> Pass<D> for Update {
    const SUMS: bool = true;
    const OTHER: bool = false;
    const CARRIES: bool = false;

    fn prepare(&self, _: &Frame<D>, _: usize, _: usize) -> ([f32; D], f32) {
        ([0.0; D], 0.0)
    }

    #[inline(always)]
    fn block(&self, block: &Block<D>, sums: &mut [CellSums<D>], _: &mut [Numbers; D]) -> f64 {
        for (attention, sums) in block.attention.iter().zip(sums) {
            let CellSums { mut weight, mut moment, .. } = sums.clone();
            for part in 0..block.parts {
                for lane in 0..LANES {
                    let a = attention[part][lane];
                    weight[lane] += a;
                    for d in 0..D {
                        moment[d][lane] = a.mul_add(block.points[d][part][lane], moment[d][lane]);
                    }
                }
            }
            (sums.weight, sums.moment) = (weight, moment);
        }
        0.0
    }
}

/// [`Passes::read`].
struct Read<'a, const D: usize> {
    last: &'a [Vector<D>],
}

impl<const D: usize> Pass<D> for Read<'_, D> {
    const SUMS: bool = false;
    const OTHER: bool = false;
    const CARRIES: bool = true;

    fn prepare(&self, frame: &Frame<D>, label: usize, place: usize) -> ([f32; D], f32) {
        offset(frame, label, &self.last[place])
    }

    #[inline(always)]
    fn block(&self, block: &Block<D>, _: &mut [CellSums<D>], carried: &mut [Numbers; D]) -> f64 {
        let mut error = [0.0; LANES];
        for part in 0..block.parts {
            let (mut soft, mut near) = ([[0.0; LANES]; D], [f32::NEG_INFINITY; LANES]);
            for (seen, attention) in block.seen.iter().zip(block.attention) {
                for lane in 0..LANES {
                    // |x|² − |x − c|²
                    let mut nearer = seen.constant;
                    for d in 0..D {
                        let x = block.points[d][part][lane];
                        nearer = (2.0 * seen.vector[d]).mul_add(x, nearer);
                        soft[d][lane] = attention[part][lane].mul_add(seen.vector[d], soft[d][lane]);
                    }
                    near[lane] = if nearer > near[lane] { nearer } else { near[lane] };
                }
            }
            for lane in 0..LANES {
                let square: f32 = (0..D).map(|d| block.points[d][part][lane].powi(2)).sum();
                error[lane] += if block.valid[part][lane] > 0.0 { (square - near[lane]).max(0.0) } else { 0.0 };
            }
            for d in 0..D {
                carried[d][part] = soft[d];
            }
        }
        error.iter().map(|&e| f64::from(e)).sum()
    }
}

/// [`Passes::read_back`].
struct ReadBack<'a, const D: usize> {
    last: &'a [Vector<D>],
}

impl<const D: usize> Pass<D> for ReadBack<'_, D> {
    const SUMS: bool = true;
    const OTHER: bool = true;
    const CARRIES: bool = true;

    fn prepare(&self, frame: &Frame<D>, label: usize, place: usize) -> ([f32; D], f32) {
        offset(frame, label, &self.last[place])
    }

    #[inline(always)]
    fn block(&self, block: &Block<D>, sums: &mut [CellSums<D>], carried: &mut [Numbers; D]) -> f64 {
        let upstream = *carried;
        let score = |seen: &Seen<D>, part: usize, lane: usize| {
            (0..D).fold(0.0f32, |score, d| upstream[d][part][lane].mul_add(seen.vector[d], score))
        };
        let mean = block.mean(score);
        let mut direct = [[[0.0f32; LANES]; PARTS]; D];
        for ((seen, attention), sums) in block.seen.iter().zip(block.attention).zip(sums) {
            let CellSums { mut weight, mut moment, mut other } = sums.clone();
            for part in 0..block.parts {
                for lane in 0..LANES {
                    let a = attention[part][lane];
                    let slope = a * (score(seen, part, lane) - mean[part][lane]);
                    weight[lane] += slope;
                    for d in 0..D {
                        direct[d][part][lane] = slope.mul_add(seen.offset[d], direct[d][part][lane]);
                        moment[d][lane] = slope.mul_add(block.points[d][part][lane], moment[d][lane]);
                        other[d][lane] = a.mul_add(upstream[d][part][lane], other[d][lane]);
                    }
                }
            }
            *sums = CellSums { weight, moment, other };
        }
        for d in 0..D {
            for part in 0..block.parts {
                carried[d][part] = direct[d][part].map(|x| x * (2.0 * LN_2) as f32);
            }
        }
        0.0
    }
}

/// [`Passes::update_back`].
struct UpdateBack<'a, const D: usize> {
    share: &'a [Vector<D>],
    new: &'a [Vector<D>],
}

impl<const D: usize> Pass<D> for UpdateBack<'_, D> {
    const SUMS: bool = true;
    const OTHER: bool = false;
    const CARRIES: bool = true;

    fn prepare(&self, frame: &Frame<D>, label: usize, place: usize) -> ([f32; D], f32) {
        let (share, new, origin) = (&self.share[place], &self.new[place], &frame.origins[label]);
        let constant: f64 = (0..D).map(|d| share[d] * (new[d] - origin[d]) * frame.scale).sum();
        (share.map(|x| x as f32), -constant as f32)
    }

    #[inline(always)]
    fn block(&self, block: &Block<D>, sums: &mut [CellSums<D>], carried: &mut [Numbers; D]) -> f64 {
        let score = |seen: &Seen<D>, part: usize, lane: usize| {
            (0..D).fold(seen.constant, |score, d| block.points[d][part][lane].mul_add(seen.vector[d], score))
        };
        let mean = block.mean(score);
        for ((seen, attention), sums) in block.seen.iter().zip(block.attention).zip(sums) {
            let CellSums { mut weight, mut moment, .. } = sums.clone();
            let pull = seen.offset.map(|x| x * (2.0 * LN_2) as f32);
            for part in 0..block.parts {
                for lane in 0..LANES {
                    let a = attention[part][lane];
                    let slope = a * (score(seen, part, lane) - mean[part][lane]);
                    weight[lane] += slope;
                    for d in 0..D {
                        let through = a.mul_add(seen.vector[d], carried[d][part][lane]);
                        carried[d][part][lane] = slope.mul_add(pull[d], through);
                        moment[d][lane] = slope.mul_add(block.points[d][part][lane], moment[d][lane]);
                    }
                }
            }
            (sums.weight, sums.moment) = (weight, moment);
        }
        0.0
    }
}

impl<const D: usize> Block<'_, D> {
    /// Σ_j a_j · `of`(j, point)
    #[inline(always)]
    fn mean(&self, of: impl Fn(&Seen<D>, usize, usize) -> f32) -> Numbers {
        let mut mean = [[0.0; LANES]; PARTS];
        for (seen, attention) in self.seen.iter().zip(self.attention) {
            for part in 0..self.parts {
                for lane in 0..LANES {
                    mean[part][lane] = attention[part][lane].mul_add(of(seen, part, lane), mean[part][lane]);
                }
            }
        }
        mean
    }
}

impl<const D: usize> Points<'_, D> {
    /// Shows `pass` all points of all pieces, with their attention to `entries`.
    fn run<P: Pass<D>>(&mut self, entries: &[Vector<D>], pass: &P) -> (Vec<Sums<D>>, f64) {
        let (frame, pieces) = (self.frame, self.pieces.par_iter_mut());
        let parts = pieces.map(|piece| {
            vectorized(
                #[inline(always)]
                || run_piece(frame, piece, entries, pass),
            )
        });
        let parts: Vec<(Vec<Sums<D>>, f64)> = parts.collect();
        let none = Sums { weight: 0.0, moment: [0.0; D], other: [0.0; D] };
        parts.into_iter().fold((vec![none; entries.len()], 0.0), |(mut sums, extra), (part, more)| {
            for (sums, part) in sums.iter_mut().zip(part) {
                sums.weight += part.weight;
                for d in 0..D {
                    sums.moment[d] += part.moment[d];
                    sums.other[d] += part.other[d];
                }
            }
            (sums, extra + more)
        })
    }

    /// ∂L/∂entry of a moment of slopes: those are in units of κ, and 2/τ = 2 ln 2 κ².
    fn through_slopes(&self, moment: Vector<D>) -> Vector<D> {
        moment.map(|m| m * 2.0 * LN_2 * self.frame.scale)
    }
}

#[inline(always)]
fn run_piece<const D: usize, P: Pass<D>>(
    frame: &Frame<D>,
    piece: &mut Sorted<D>,
    entries: &[Vector<D>],
    pass: &P,
) -> (Vec<Sums<D>>, f64) {
    let mut totals = vec![Sums { weight: 0.0, moment: [0.0; D], other: [0.0; D] }; entries.len()];
    let (mut extra, unit) = (0.0, 1.0 / frame.scale);
    let mut nearby = Nearby::new(entries.len());
    let mut seen = Vec::with_capacity(entries.len());
    let mut attention = vec![[[0.0; LANES]; PARTS]; entries.len()];
    let none = CellSums { weight: [0.0; LANES], moment: [[0.0; LANES]; D], other: [[0.0; LANES]; D] };
    let mut sums = Vec::with_capacity(entries.len());
    let Sorted { cells, points, carried, .. } = piece;
    for cell in cells.iter() {
        nearby.find(frame, cell, entries, &mut seen, |place| pass.prepare(frame, cell.label, place));
        sums.clear();
        sums.resize(seen.len(), none.clone());
        for first in cell.points.clone().step_by(BLOCK) {
            let here = first..(first + BLOCK).min(cell.points.end);
            let parts = here.len().div_ceil(LANES);
            let mut valid = [[0.0; LANES]; PARTS];
            valid.as_flattened_mut()[..here.len()].fill(1.0);
            let points = std::array::from_fn(|d| load(&points[d][here.clone()]));
            let attention = &mut attention[..seen.len()];
            attend(&points, parts, &valid, &seen, attention);
            let block = Block { parts, points: &points, valid: &valid, seen: &seen, attention };
            if !P::CARRIES {
                extra += pass.block(&block, &mut sums, &mut [[[0.0; LANES]; PARTS]; D]);
                continue;
            }
            let mut with = std::array::from_fn(|d| load(&carried[d][here.clone()]));
            extra += pass.block(&block, &mut sums, &mut with);
            for d in 0..D {
                carried[d][here.clone()].copy_from_slice(&with[d].as_flattened()[..here.len()]);
            }
        }
        if !P::SUMS {
            continue;
        }
        for (seen, sums) in seen.iter().zip(&sums) {
            let total = &mut totals[seen.place];
            let (entry, origin) = (&entries[seen.place], &frame.origins[cell.label]);
            let weight = sum(&sums.weight);
            total.weight += weight;
            for d in 0..D {
                total.moment[d] += sum(&sums.moment[d]) * unit + weight * (origin[d] - entry[d]);
                total.other[d] += if P::OTHER { sum(&sums.other[d]) } else { 0.0 };
            }
        }
    }
    (totals, extra)
}

/// Of all lanes, in a fixed order that vectors can follow.
#[inline(always)]
fn sum(lanes: &Lanes) -> f64 {
    let mut sums: [f64; LANES] = lanes.map(f64::from);
    for width in [8, 4, 2, 1] {
        for lane in 0..width {
            sums[lane] += sums[lane + width];
        }
    }
    sums[0]
}

/// Some numbers as a block; zeros past their end.
#[inline(always)]
fn load(numbers: &[f32]) -> Numbers {
    let mut points = [[0.0; LANES]; PARTS];
    points.as_flattened_mut()[..numbers.len()].copy_from_slice(numbers);
    points
}
