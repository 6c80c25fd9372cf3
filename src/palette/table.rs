//! Differentiable k-means on the bins of a histogram, forward and backward (Cho et al. 2021, arXiv 2108.12659).
//!
//! All weights of one code share their attention, so clustering a tensor is clustering its at most 65,536 bins. With
//! u_b the value of bin b, n_b its count, c^t_j entry j after t of T iterations, τ the temperature:
//!
//! ```text
//! a^t_bj = softmax_j(−(u_b − c^{t−1}_j)² / τ)     s^t_j = Σ_b n_b a^t_bj     c^t_j = Σ_b n_b a^t_bj u_b / s^t_j
//! f_b = Σ_j a^T_bj c^T_j                          (the soft weight: the last attention reads the last entries)
//! ```
//!
//! The gradient of one weight i of bin b, g_i being that of its soft weight, is g_i·D_b + Ψ_b: D through its own
//! attention, Ψ through the entries, which only needs G_b = Σ_{i∈b} g_i. c⁰ is held constant.
//!
//! Everything here is f64: at a low temperature the attention between two entries is a spike that f32 entries would
//! shift. Terms below e⁻³⁸ of their row's largest are left out, being lost in its rounding: that leaves a few entries a
//! bin whatever the palette's size, often one, and no denormals. Bins go through the arithmetic ([`super::attention`])
//! in blocks that see the same entries. Sums run over fixed runs of bins, merged in order: results do not depend on
//! the number of threads.

use std::ops::Range;

use anyhow::{Result, ensure};
use rayon::prelude::*;

use super::attention::{LANES, Lanes, attend};
use super::codes::Histogram;

/// Logits further than this below the largest of their row count as minus infinity: e⁻³⁸ is 3e-17.
const FLOOR: f64 = 38.0;
/// Bins that one task takes.
const RUN: usize = 4096;
/// Of a palette.
const MOST_ENTRIES: usize = 256;

/// One clustering: what its backward pass needs.
#[derive(Debug)]
pub struct Table {
    histogram: Histogram,
    values: Vec<f64>,
    tau: f64,
    /// `order[j]`: which of the caller's entries is the j-th smallest.
    order: Vec<usize>,
    /// c⁰ … c^T, ascending. Attention keeps them so: in one dimension a greater entry has greater members.
    centroids: Vec<Vec<f64>>,
    /// s¹ … s^T.
    masses: Vec<Vec<f64>>,
}

/// Per entry.
type Sums = Vec<f64>;

impl Table {
    /// Clusters: `iterations` (T ≥ 1) updates of `centroids` at the temperature `tau`.
    ///
    /// # Errors
    /// When an argument is out of its range.
    pub fn cluster(histogram: Histogram, centroids: &[f64], tau: f64, iterations: usize) -> Result<Self> {
        ensure!((1..=MOST_ENTRIES).contains(&centroids.len()), "{} entries are not a palette", centroids.len());
        ensure!(centroids.iter().all(|c| c.is_finite()), "an entry of the palette is not a finite number");
        ensure!(tau > 0.0 && tau.is_finite(), "the temperature must be positive: {tau}");
        ensure!(iterations >= 1, "at least one iteration is needed");
        let mut order: Vec<usize> = (0..centroids.len()).collect();
        order.sort_by(|&a, &b| centroids[a].total_cmp(&centroids[b]));
        let start = order.iter().map(|&j| centroids[j]).collect();
        let values = histogram.values();
        let mut table = Self { histogram, values, tau, order, centroids: vec![start], masses: Vec::new() };
        for t in 0..iterations {
            table.update(t);
        }
        Ok(table)
    }

    /// c^{t+1} from c^t.
    fn update(&mut self, t: usize) {
        let old = &self.centroids[t];
        let count = old.len();
        let runs = self.for_blocks(
            t,
            || vec![[0.0; 2]; count],
            |sums, block| {
                for (j, attention) in block.entries.clone().zip(block.attention) {
                    let moved = std::array::from_fn(|lane| block.counts[lane] * attention[lane]);
                    let moments = std::array::from_fn(|lane| moved[lane] * (block.values[lane] - old[j]));
                    sums[j][0] += sum(&moved);
                    sums[j][1] += sum(&moments);
                }
            },
        );
        let mut totals = vec![[0.0; 2]; count];
        for run in runs {
            totals.iter_mut().zip(run).for_each(|(total, run)| {
                total[0] += run[0];
                total[1] += run[1];
            });
        }
        let mass: Vec<f64> = totals.iter().map(|total| total[0]).collect();
        // An entry that no weight looks at stays where it is.
        let new = |(&old, [mass, moment]): (&f64, [f64; 2])| if mass > 0.0 { old + moment / mass } else { old };
        let new = old.iter().zip(totals).map(new).collect();
        self.masses.push(mass);
        self.centroids.push(new);
    }

    /// The entries after the last iteration, in the caller's order.
    pub fn entries(&self) -> Vec<f64> {
        let mut entries = vec![0.0; self.order.len()];
        for (&place, &value) in self.order.iter().zip(self.last()) {
            entries[place] = value;
        }
        entries
    }

    fn last(&self) -> &[f64] {
        self.centroids.last().expect("c⁰ is there")
    }

    pub fn histogram(&self) -> &Histogram {
        &self.histogram
    }

    /// Mean squared distance of the weights to the nearest of the last entries: the error if palettes were made now.
    pub fn hard_error(&self) -> f64 {
        self.histogram.error(self.last())
    }

    /// f_b for each bin of the histogram.
    pub fn soft_values(&self) -> Vec<f64> {
        let entries = self.last();
        let read = |soft: &mut Vec<f64>, block: Block| soft.extend(&block.mean(|j, _| entries[j])[..block.len]);
        self.for_blocks(self.masses.len() - 1, Vec::new, read).concat()
    }

    /// (D_b, Ψ_b) for each bin of the histogram, from G_b, the sums of the upstream gradient over its weights.
    pub fn backward(&self, upstream: &[f64]) -> Vec<(f64, f64)> {
        let iterations = self.masses.len();
        let count = self.order.len();
        let entries = self.last();
        // The read-out: f_b depends on c^T directly and on c^{T−1} through the attention.
        struct ReadOut {
            direct: Vec<f64>,
            to_last: Sums,
            to_previous: Sums,
        }
        let previous = &self.centroids[iterations - 1];
        let scale = 2.0 / self.tau;
        let runs = self.for_blocks(
            iterations - 1,
            || ReadOut { direct: Vec::new(), to_last: vec![0.0; count], to_previous: vec![0.0; count] },
            |sums, block| {
                let upstream = block.pick(upstream);
                let soft = block.mean(|j, _| entries[j]);
                let mut direct = [0.0; LANES];
                for (j, attention) in block.entries.clone().zip(block.attention) {
                    // ∂f/∂logit_j · ∂logit_j/∂c_j; ∂logit_j/∂u is its opposite.
                    let slope: Lanes = std::array::from_fn(|lane| {
                        attention[lane] * (entries[j] - soft[lane]) * scale * (block.values[lane] - previous[j])
                    });
                    for lane in 0..LANES {
                        direct[lane] -= slope[lane];
                    }
                    sums.to_last[j] += sum(&std::array::from_fn(|lane| upstream[lane] * attention[lane]));
                    sums.to_previous[j] += sum(&std::array::from_fn(|lane| upstream[lane] * slope[lane]));
                }
                sums.direct.extend(&direct[..block.len]);
            },
        );
        let mut lines: Vec<(f64, f64)> = runs.iter().flat_map(|run| &run.direct).map(|&d| (d, 0.0)).collect();
        // γ^t = ∂L/∂c^t
        let mut gamma = total_of(runs.iter().map(|run| &run.to_last), count);
        let mut gamma_previous = total_of(runs.iter().map(|run| &run.to_previous), count);
        for t in (1..=iterations).rev() {
            let (old, new, mass) = (&self.centroids[t - 1], &self.centroids[t], &self.masses[t - 1]);
            // What moves an entry that no weight looks at is the entry before.
            let share: Sums = (0..count).map(|j| if mass[j] > 0.0 { gamma[j] / mass[j] } else { 0.0 }).collect();
            for j in (0..count).filter(|&j| mass[j] <= 0.0) {
                gamma_previous[j] += gamma[j];
            }
            let runs = self.for_blocks(
                t - 1,
                || (Vec::new(), vec![0.0; count]),
                |(psi, to_previous): &mut (Vec<f64>, Sums), block| {
                    let mean = block.mean(|j, u| share[j] * (u - new[j]));
                    let mut through = [0.0; LANES];
                    for (j, attention) in block.entries.clone().zip(block.attention) {
                        let slope: Lanes = std::array::from_fn(|lane| {
                            let u = block.values[lane];
                            attention[lane] * (share[j] * (u - new[j]) - mean[lane]) * scale * (u - old[j])
                        });
                        for lane in 0..LANES {
                            through[lane] += attention[lane] * share[j] - slope[lane];
                        }
                        to_previous[j] += sum(&std::array::from_fn(|lane| block.counts[lane] * slope[lane]));
                    }
                    psi.extend(&through[..block.len]);
                },
            );
            for ((_, through), psi) in lines.iter_mut().zip(runs.iter().flat_map(|run| &run.0)) {
                *through += psi;
            }
            let rest = total_of(runs.iter().map(|run| &run.1), count);
            gamma = gamma_previous.iter().zip(rest).map(|(a, b)| a + b).collect();
            gamma_previous = vec![0.0; count];
        }
        lines
    }

    /// Calls `step` with the attention of each block of bins on c^t, in the order of the bins. Returns the sums of all
    /// runs, in order.
    fn for_blocks<S: Send>(
        &self,
        t: usize,
        start: impl Fn() -> S + Sync,
        step: impl Fn(&mut S, Block) + Sync,
    ) -> Vec<S> {
        let centroids = &self.centroids[t];
        self.values
            .par_chunks(RUN)
            .enumerate()
            .map(|(run, values)| {
                let mut sums = start();
                let mut attention = vec![[0.0; LANES]; MOST_ENTRIES.min(centroids.len())];
                let first = run * RUN;
                let (mut from, mut near) = (0, 0);
                while from < values.len() {
                    let window = self.window(values[from], centroids, &mut near);
                    let most = (from + LANES).min(values.len());
                    let to = from + values[from..most].partition_point(|&u| u < window.until).max(1);
                    let block_values = lanes(&values[from..to]);
                    let attention = &mut attention[..window.entries.len()];
                    attend(
                        &block_values,
                        &centroids[window.entries.clone()],
                        near - window.entries.start,
                        self.tau,
                        attention,
                    );
                    let mut counts = [0.0; LANES];
                    counts
                        .iter_mut()
                        .zip(&self.histogram.counts[first + from..first + to])
                        .for_each(|(to, &n)| *to = n as f64);
                    let block = Block {
                        start: first + from,
                        len: to - from,
                        values: block_values,
                        counts,
                        entries: window.entries,
                        attention,
                    };
                    step(&mut sums, block);
                    from = to;
                }
                sums
            })
            .collect()
    }

    /// Which of `centroids` the bin at `u` sees, and up to where the bins above it see the same. `near` is moved up to
    /// the nearest.
    fn window(&self, u: f64, centroids: &[f64], near: &mut usize) -> Window {
        let middle = |j: usize| centroids[j] / 2.0 + centroids[j + 1] / 2.0;
        while *near + 1 < centroids.len() && middle(*near) <= u {
            *near += 1;
        }
        let nearest = centroids[*near];
        let mut until = if *near + 1 < centroids.len() { middle(*near) } else { f64::INFINITY };
        let reach = FLOOR * self.tau / 2.0;
        // (u − c_j)² − (u − c_near)² is linear in u: entry j is in reach up to here (below), or from here on (above).
        let edge = |j: usize| nearest / 2.0 + centroids[j] / 2.0 - reach / (centroids[j] - nearest);
        let (mut from, mut to) = (*near, *near + 1);
        while from > 0 && (centroids[from - 1] == nearest || u < edge(from - 1)) {
            from -= 1;
            if centroids[from] < nearest {
                until = until.min(edge(from));
            }
        }
        while to < centroids.len() && (centroids[to] == nearest || edge(to) <= u) {
            to += 1;
        }
        if to < centroids.len() {
            until = until.min(edge(to));
        }
        Window { entries: from..to, until }
    }
}

struct Window {
    entries: Range<usize>,
    until: f64,
}

/// Consecutive bins that see the same entries. Lanes past `len` have no weights.
struct Block<'a> {
    /// The first bin.
    start: usize,
    len: usize,
    values: Lanes,
    counts: Lanes,
    entries: Range<usize>,
    /// One row for each of `entries`.
    attention: &'a [Lanes],
}

impl Block<'_> {
    /// Σ_j a_bj · `of`(j, u_b)
    #[inline]
    fn mean(&self, of: impl Fn(usize, f64) -> f64) -> Lanes {
        let mut mean = [0.0; LANES];
        for (j, attention) in self.entries.clone().zip(self.attention) {
            for lane in 0..LANES {
                mean[lane] += attention[lane] * of(j, self.values[lane]);
            }
        }
        mean
    }

    /// The block's part of a number for each bin; zero in the lanes past its end.
    #[inline]
    fn pick(&self, of_bins: &[f64]) -> Lanes {
        let mut lanes = [0.0; LANES];
        lanes[..self.len].copy_from_slice(&of_bins[self.start..self.start + self.len]);
        lanes
    }
}

/// Values as lanes, the last repeated.
fn lanes(values: &[f64]) -> Lanes {
    std::array::from_fn(|lane| values[lane.min(values.len() - 1)])
}

/// In a fixed order that vectors can follow.
#[inline]
fn sum(lanes: &Lanes) -> f64 {
    let mut sums = [0.0; 8];
    for part in lanes.chunks_exact(8) {
        for lane in 0..8 {
            sums[lane] += part[lane];
        }
    }
    ((sums[0] + sums[4]) + (sums[1] + sums[5])) + ((sums[2] + sums[6]) + (sums[3] + sums[7]))
}

/// The sum of the runs, in their order.
fn total_of<'a>(runs: impl Iterator<Item = &'a Sums>, count: usize) -> Sums {
    runs.fold(vec![0.0; count], |mut sum, run| {
        sum.iter_mut().zip(run).for_each(|(sum, value)| *sum += value);
        sum
    })
}
