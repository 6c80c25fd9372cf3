//! K-means of vectors of D weights, for palettes whose entries hold several.
//!
//! Unlike numbers, vectors have no exact k-means that is fast enough. So: k-means++ with several trials a centre
//! (Arthur & Vassilvitskii 2007) and Lloyd's iterations, from several starts, of which the best is improved by merging
//! two entries and splitting another while that helps. On large groups all of this sees a *lightweight coreset* only
//! (Bachem, Lucic & Krause 2018, arXiv 1702.08248: points drawn half evenly and half by their distance from the mean,
//! weighted so that sums stay right, so that outliers are not missed); Lloyd's iterations on all points follow.
//! Everything follows from a seed, whatever the number of threads.

use std::collections::BTreeSet;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

use crate::palette::vector::nearest;

/// A coreset holds so many points an entry, but at least and at most so many in all.
const CORESET_AN_ENTRY: usize = 128;
const LEAST_CORESET: usize = 1 << 13;
const LARGEST_CORESET: usize = 1 << 15;
/// Starts of which the best goes on: as many as make this many entries, within limits; few entries have more ways to be
/// wrong and cost less.
const STARTED_ENTRIES: usize = 64;
const STARTS: (usize, usize) = (2, 16);
/// Draws for each centre of k-means++.
const DRAWS: usize = 3;
/// Iterations of a start end when the error falls by less than this part of itself, or after so many: which is best shows
/// early, and what was merged and split moves on.
const TOLERANCE: f64 = 3e-4;
const ITERATIONS: usize = 8;
/// So many parts of the entries are merged and split at once, fewer after each time that did not help; single ones so
/// many times. Iterations that each trial gets, and the part of the error by which it must lower it.
const SWAPPED: usize = 8;
const FAILURES: usize = 10;
const TRIAL_ITERATIONS: usize = 8;
const GAIN: f64 = 1e-4;
/// The last iterations of the best.
const LAST_TOLERANCE: f64 = 1e-6;
const LAST_ITERATIONS: usize = 100;
/// The same on all points of a large group.
const FULL_TOLERANCE: f64 = 1e-3;
const FULL_ITERATIONS: usize = 6;
/// Points that one thread takes at a time.
const PIECE: usize = 1 << 13;

/// At most `count` entries (256 at most) that stand for `points` with little squared error; fewer only where there are
/// fewer distinct points, which then are the entries.
pub fn means<const D: usize>(points: &[[f32; D]], count: usize, seed: u64) -> Vec<[f32; D]> {
    if let Some(few) = distinct(points, count) {
        return few;
    }
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let size = (CORESET_AN_ENTRY * count).clamp(LEAST_CORESET, LARGEST_CORESET);
    let (sample, weights) = match points.len() > 2 * size {
        true => coreset(points, size, &mut random),
        false => (points.to_vec(), vec![1.0; points.len()]),
    };
    let starts = (STARTED_ENTRIES / count).clamp(STARTS.0, STARTS.1) as u64;
    let starts: Vec<(f64, Vec<[f32; D]>)> = (0..starts)
        .into_par_iter()
        .map(|start| {
            let mut random = ChaCha8Rng::seed_from_u64(seed);
            random.set_stream(1 + start);
            let mut entries = plus_plus(&sample, &weights, count, &mut random);
            let error = lloyd(&sample, Some(&weights), &mut entries, TOLERANCE, ITERATIONS);
            (error, entries)
        })
        .collect();
    let best = starts.into_iter().min_by(|a, b| a.0.total_cmp(&b.0));
    let Some((mut error, mut entries)) = best else { return Vec::new() };
    let (mut swaps, mut failures) = ((count / SWAPPED).max(1), 0);
    while failures < FAILURES && entries.len() > 2 {
        let mut trial = merge_and_split(&sample, &weights, &entries, swaps, failures);
        let left = lloyd(&sample, Some(&weights), &mut trial, TOLERANCE, TRIAL_ITERATIONS);
        if left < error * (1.0 - GAIN) {
            (error, entries, failures) = (left, trial, 0);
        } else if swaps > 1 {
            swaps /= 2;
        } else {
            failures += (count / 16).clamp(1, FAILURES);
        }
    }
    let (tolerance, iterations) = match sample.len() < points.len() {
        true => (FULL_TOLERANCE, FULL_ITERATIONS),
        false => (LAST_TOLERANCE, LAST_ITERATIONS),
    };
    lloyd(points, None, &mut entries, tolerance, iterations);
    entries
}

/// The distinct points, if there are at most `count`.
fn distinct<const D: usize>(points: &[[f32; D]], count: usize) -> Option<Vec<[f32; D]>> {
    let mut found = BTreeSet::new();
    for point in points {
        // 0 and -0 are one number.
        found.insert(point.map(|x| (x + 0.0).to_bits()));
        if found.len() > count {
            return None;
        }
    }
    Some(found.into_iter().map(|bits| bits.map(f32::from_bits)).collect())
}

/// Entries of which `swaps` pairs that are cheap to merge have become one, and as many others with large errors two.
/// `attempt` tells which are passed over: none at 0, one more or the other at 1 and 2, and so on.
fn merge_and_split<const D: usize>(
    points: &[[f32; D]],
    weights: &[f32],
    entries: &[[f32; D]],
    swaps: usize,
    attempt: usize,
) -> Vec<[f32; D]> {
    let found = assign(points, Some(weights), entries, None);
    let away = |a: &[f32; D], b: &[f32; D]| (0..D).map(|d| f64::from(a[d] - b[d]).powi(2)).sum::<f64>();
    // What merging i with j would cost: w_i w_j / (w_i + w_j) · |c_i − c_j|².
    let cost = |i: usize, j: usize| {
        let (a, b) = (found.sums[i].0, found.sums[j].0);
        if a + b > 0.0 { a * b / (a + b) * away(&entries[i], &entries[j]) } else { 0.0 }
    };
    let cheapest = |i: usize| (i + 1..entries.len()).map(|j| (cost(i, j), i, j)).min_by(|a, b| a.0.total_cmp(&b.0));
    let mut merges: Vec<(f64, usize, usize)> = (0..entries.len()).filter_map(cheapest).collect();
    merges.sort_by(|a, b| a.0.total_cmp(&b.0));
    let error = |k: usize| found.squares[k].iter().sum::<f64>();
    let mut splits: Vec<usize> = (0..entries.len()).collect();
    splits.sort_by(|&a, &b| error(b).total_cmp(&error(a)));
    let diagonals = (0..).flat_map(|sum: usize| (0..=sum).map(move |merge| (merge, sum - merge)));
    let (merge, split) = diagonals.into_iter().nth(attempt).unwrap_or_default();

    let mut trial = entries.to_vec();
    let mut used = vec![false; entries.len()];
    let (mut merges, mut splits) = (merges.into_iter().skip(merge), splits.into_iter().skip(split));
    for _ in 0..swaps {
        let Some((_, i, j)) = merges.find(|&(_, i, j)| !used[i] && !used[j]) else { break };
        let Some(k) = splits.find(|&k| !used[k] && k != i && k != j) else { break };
        [i, j, k].into_iter().for_each(|entry| used[entry] = true);
        let (a, b) = (found.sums[i].0, found.sums[j].0);
        if a + b > 0.0 {
            let middle = |d: usize| (f64::from(entries[i][d]) * a + f64::from(entries[j][d]) * b) / (a + b);
            trial[i] = std::array::from_fn(|d| middle(d) as f32);
        }
        // Half a standard deviation to either side, along the axis where the members of k are widest.
        let squares = found.squares[k];
        let axis = (0..D).max_by(|&a, &b| squares[a].total_cmp(&squares[b])).unwrap_or(0);
        let step = (squares[axis] / found.sums[k].0.max(f64::MIN_POSITIVE)).sqrt() as f32 / 2.0;
        trial[j] = entries[k];
        trial[j][axis] -= step;
        trial[k][axis] += step;
    }
    trial
}

/// What the members of each entry add up to, and how far they are from it.
#[derive(Clone)]
pub struct Assigned<const D: usize> {
    /// Weight of the members, and sum of weight × point.
    pub sums: Vec<(f64, [f64; D])>,
    /// Sum of weight × squared distance along each axis.
    pub squares: Vec<[f64; D]>,
}

impl<const D: usize> Assigned<D> {
    /// Weight × squared distance, over all.
    pub fn error(&self) -> f64 {
        self.squares.iter().flatten().sum()
    }
}

/// Assigns each of `points` to the nearest of `entries`; the indices go to `to` where it is given.
pub fn assign<const D: usize>(
    points: &[[f32; D]],
    weights: Option<&[f32]>,
    entries: &[[f32; D]],
    to: Option<&mut [u8]>,
) -> Assigned<D> {
    let none = Assigned { sums: vec![(0.0, [0.0; D]); entries.len()], squares: vec![[0.0; D]; entries.len()] };
    let piece = |(number, points): (usize, &[[f32; D]]), to: &mut [u8]| {
        nearest(points, entries, to);
        let mut found = none.clone();
        let weights = weights.map(|weights| &weights[number * PIECE..]);
        for (place, (point, &index)) in points.iter().zip(to.iter()).enumerate() {
            let weight = weights.map_or(1.0, |weights| f64::from(weights[place]));
            let (entry, index) = (&entries[index as usize], index as usize);
            let ((total, sum), square) = (&mut found.sums[index], &mut found.squares[index]);
            *total += weight;
            for d in 0..D {
                let x = f64::from(point[d]);
                sum[d] += weight * x;
                square[d] += weight * (x - f64::from(entry[d])).powi(2);
            }
        }
        found
    };
    let pieces: Vec<Assigned<D>> = match to {
        Some(to) => points
            .par_chunks(PIECE)
            .enumerate()
            .zip(to.par_chunks_mut(PIECE))
            .map(|(points, to)| piece(points, to))
            .collect(),
        None => {
            points.par_chunks(PIECE).enumerate().map(|points| piece(points, &mut vec![0; points.1.len()])).collect()
        }
    };
    // In order, so that the sums are the same on any number of threads.
    pieces.into_iter().fold(none, |mut all, piece| {
        for (all, piece) in all.sums.iter_mut().zip(piece.sums) {
            all.0 += piece.0;
            (0..D).for_each(|d| all.1[d] += piece.1[d]);
        }
        for (all, piece) in all.squares.iter_mut().zip(piece.squares) {
            (0..D).for_each(|d| all[d] += piece[d]);
        }
        all
    })
}

/// Moves `entries` to the means of their members, again and again. Returns the error before the last move: an upper
/// bound of what is left.
fn lloyd<const D: usize>(
    points: &[[f32; D]],
    weights: Option<&[f32]>,
    entries: &mut [[f32; D]],
    tolerance: f64,
    iterations: usize,
) -> f64 {
    let mut last = f64::INFINITY;
    for _ in 0..iterations {
        let found = assign(points, weights, entries, None);
        for (entry, (total, sum)) in entries.iter_mut().zip(&found.sums) {
            if *total > 0.0 {
                *entry = sum.map(|sum| (sum / total) as f32);
            }
        }
        let error = found.error();
        if error >= last * (1.0 - tolerance) {
            return error;
        }
        last = error;
    }
    last
}

/// A first choice of entries among `points`: each drawn by weight × squared distance to the entries so far, the best
/// of a few draws. Stops early when no point is left that is no entry.
fn plus_plus<const D: usize>(
    points: &[[f32; D]],
    weights: &[f32],
    count: usize,
    random: &mut ChaCha8Rng,
) -> Vec<[f32; D]> {
    let away = |a: &[f32; D], b: &[f32; D]| (0..D).map(|d| (a[d] - b[d]).powi(2)).sum::<f32>();
    let mut errors: Vec<f32> = weights.to_vec();
    let mut first = true;
    let mut entries = Vec::with_capacity(count);
    while entries.len() < count {
        let mut sums = Vec::with_capacity(points.len());
        let mut total = 0f64;
        errors.iter().for_each(|&error| {
            total += f64::from(error);
            sums.push(total);
        });
        if total <= 0.0 {
            break;
        }
        let mut best: Option<(f64, usize, Vec<f32>)> = None;
        for _ in 0..DRAWS {
            let mark = random.random::<f64>() * total;
            let drawn = sums.partition_point(|&sum| sum <= mark).min(points.len() - 1);
            let left: Vec<f32> = (points.iter().zip(weights).zip(&errors))
                .map(|((point, weight), &error)| {
                    let moved = weight * away(point, &points[drawn]);
                    if first { moved } else { moved.min(error) }
                })
                .collect();
            let error = left.iter().map(|&e| f64::from(e)).sum();
            if best.as_ref().is_none_or(|best| error < best.0) {
                best = Some((error, drawn, left));
            }
        }
        let Some((_, drawn, left)) = best else { break };
        // By rounding, a point that is an entry already may be drawn.
        if entries.contains(&points[drawn]) {
            break;
        }
        entries.push(points[drawn]);
        errors = left;
        first = false;
    }
    entries
}

/// `size` of `points` and their weights (algorithm 1 of Bachem et al.).
fn coreset<const D: usize>(points: &[[f32; D]], size: usize, random: &mut ChaCha8Rng) -> (Vec<[f32; D]>, Vec<f32>) {
    let count = points.len() as f64;
    let mean = assign(points, None, &[[0.0; D]], None).sums[0].1.map(|sum| sum / count);
    let away = |point: &[f32; D]| (0..D).map(|d| (f64::from(point[d]) - mean[d]).powi(2)).sum::<f64>();
    let pieces: Vec<f64> = points.par_chunks(PIECE).map(|points| points.iter().map(&away).sum()).collect();
    let total: f64 = pieces.iter().sum();
    let chance = |point: &[f32; D]| 0.5 / count + if total > 0.0 { 0.5 * away(point) / total } else { 0.5 / count };
    // Where in the sum of all chances each sample lies, ascending: one walk over the points finds them all.
    let mut marks: Vec<f64> = (0..size).map(|_| random.random::<f64>()).collect();
    marks.sort_by(f64::total_cmp);
    let (mut sample, mut weights) = (Vec::with_capacity(size), Vec::with_capacity(size));
    let (mut next, mut sum) = (0, 0.0);
    for (number, point) in points.iter().enumerate() {
        let chance = chance(point);
        sum += chance;
        let last = number + 1 == points.len();
        let here = marks[next..].iter().take_while(|&&mark| mark < sum || last).count();
        if here > 0 {
            sample.push(*point);
            weights.push((here as f64 / (chance * size as f64)) as f32);
            next += here;
        }
    }
    (sample, weights)
}
