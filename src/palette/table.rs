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
//! shift. Terms below e⁻⁴⁶ of their row's largest are left out, which leaves a few entries a bin, whatever the
//! palette's size, and no denormals. Sums run over fixed runs of bins, merged in order: results do not depend on the
//! number of threads.

use std::ops::Range;

use anyhow::{Result, ensure};
use rayon::prelude::*;

use super::codes::Histogram;

/// Logits further than this below the largest of their row count as minus infinity: e⁻⁴⁶ is 1e-20.
const FLOOR: f64 = 46.0;
/// Bins that one task takes.
const RUN: usize = 2048;
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

/// Per entry, or per bin of a run.
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
        let runs = self.for_bins(
            t,
            || (vec![0.0; count], vec![0.0; count]),
            |(mass, moment), bin, entries, attention| {
                let n = self.histogram.counts[bin] as f64;
                for (j, a) in entries.zip(attention) {
                    mass[j] += n * a;
                    moment[j] += n * a * (self.values[bin] - old[j]);
                }
            },
        );
        let (masses, moments): (Vec<Sums>, Vec<Sums>) = runs.into_iter().unzip();
        let (mass, moment) = (total(&masses, count), total(&moments, count));
        // An entry that no weight looks at stays where it is.
        let new = (0..count).map(|j| if mass[j] > 0.0 { old[j] + moment[j] / mass[j] } else { old[j] }).collect();
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
        let read = |soft: &mut Sums, _, range: Range<usize>, attention: &[f64]| {
            soft.push(range.zip(attention).map(|(j, a)| a * entries[j]).sum());
        };
        self.for_bins(self.masses.len() - 1, Vec::new, read).concat()
    }

    /// (D_b, Ψ_b) for each bin of the histogram, from G_b, the sums of the upstream gradient over its weights.
    pub fn backward(&self, upstream: &[f64]) -> (Vec<f64>, Vec<f64>) {
        let iterations = self.masses.len();
        let count = self.order.len();
        let entries = self.last();
        // The read-out: f_b depends on c^T directly and on c^{T−1} through the attention.
        struct ReadOut {
            direct: Sums,
            to_last: Sums,
            to_previous: Sums,
        }
        let previous = &self.centroids[iterations - 1];
        let runs = self.for_bins(
            iterations - 1,
            || ReadOut { direct: Vec::new(), to_last: vec![0.0; count], to_previous: vec![0.0; count] },
            |sums, bin, range, attention| {
                let soft: f64 = range.clone().zip(attention).map(|(j, a)| a * entries[j]).sum();
                let mut direct = 0.0;
                for (j, a) in range.zip(attention) {
                    // ∂f/∂logit_j · ∂logit_j/∂c_j; ∂logit_j/∂u is its opposite.
                    let slope = a * (entries[j] - soft) * 2.0 * (self.values[bin] - previous[j]) / self.tau;
                    direct -= slope;
                    sums.to_last[j] += upstream[bin] * a;
                    sums.to_previous[j] += upstream[bin] * slope;
                }
                sums.direct.push(direct);
            },
        );
        let direct = runs.iter().flat_map(|run| &run.direct).copied().collect();
        // γ^t = ∂L/∂c^t
        let mut gamma = total_of(runs.iter().map(|run| &run.to_last), count);
        let mut gamma_previous = total_of(runs.iter().map(|run| &run.to_previous), count);
        let mut through_entries = vec![0.0; self.values.len()];
        for t in (1..=iterations).rev() {
            let (old, new, mass) = (&self.centroids[t - 1], &self.centroids[t], &self.masses[t - 1]);
            // What moves an entry that no weight looks at is the entry before.
            let share: Sums = (0..count).map(|j| if mass[j] > 0.0 { gamma[j] / mass[j] } else { 0.0 }).collect();
            for j in (0..count).filter(|&j| mass[j] <= 0.0) {
                gamma_previous[j] += gamma[j];
            }
            let runs = self.for_bins(
                t - 1,
                || (Vec::new(), vec![0.0; count]),
                |(psi, to_previous), bin, range, attention| {
                    let u = self.values[bin];
                    let e = |j: usize| share[j] * (u - new[j]);
                    let mean: f64 = range.clone().zip(attention).map(|(j, a)| a * e(j)).sum();
                    let mut sum = 0.0;
                    for (j, a) in range.zip(attention) {
                        let slope = a * (e(j) - mean) * 2.0 * (u - old[j]) / self.tau;
                        sum += a * share[j] - slope;
                        to_previous[j] += self.histogram.counts[bin] as f64 * slope;
                    }
                    psi.push(sum);
                },
            );
            for (sum, psi) in through_entries.iter_mut().zip(runs.iter().flat_map(|run| &run.0)) {
                *sum += psi;
            }
            let rest = total_of(runs.iter().map(|run| &run.1), count);
            gamma = gamma_previous.iter().zip(rest).map(|(a, b)| a + b).collect();
            gamma_previous = vec![0.0; count];
        }
        (direct, through_entries)
    }

    /// Calls `step` with the attention of each bin on c^t: (sums of its run, bin, which entries, their attention).
    /// Returns the sums of all runs, in order.
    fn for_bins<S: Send>(
        &self,
        t: usize,
        start: impl Fn() -> S + Sync,
        step: impl Fn(&mut S, usize, Range<usize>, &[f64]) + Sync,
    ) -> Vec<S> {
        let centroids = &self.centroids[t];
        let reach = FLOOR * self.tau;
        self.values
            .par_chunks(RUN)
            .enumerate()
            .map(|(run, values)| {
                let mut sums = start();
                let mut buffer = [0.0; MOST_ENTRIES];
                let mut near = 0;
                for (place, &u) in values.iter().enumerate() {
                    let distance = |j: usize| (u - centroids[j]).powi(2);
                    while near + 1 < centroids.len() && distance(near + 1) <= distance(near) {
                        near += 1;
                    }
                    let least = distance(near);
                    let (mut from, mut to) = (near, near + 1);
                    while from > 0 && distance(from - 1) - least <= reach {
                        from -= 1;
                    }
                    while to < centroids.len() && distance(to) - least <= reach {
                        to += 1;
                    }
                    let attention = &mut buffer[..to - from];
                    let mut norm = 0.0;
                    for (a, j) in attention.iter_mut().zip(from..to) {
                        *a = ((least - distance(j)) / self.tau).exp();
                        norm += *a;
                    }
                    attention.iter_mut().for_each(|a| *a /= norm);
                    step(&mut sums, run * RUN + place, from..to, attention);
                }
                sums
            })
            .collect()
    }
}

fn total(runs: &[Sums], count: usize) -> Sums {
    total_of(runs.iter(), count)
}

/// The sum of the runs, in their order.
fn total_of<'a>(runs: impl Iterator<Item = &'a Sums>, count: usize) -> Sums {
    runs.fold(vec![0.0; count], |mut sum, run| {
        sum.iter_mut().zip(run).for_each(|(sum, value)| *sum += value);
        sum
    })
}
