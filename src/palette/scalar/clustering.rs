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
//! bin whatever the palette's size, often one, and no denormals. What is nothing to a row may be all that an entry has:
//! entries of hardly any mass are summed by themselves (`faint`). Bins go through the arithmetic
//! (`attention`) in blocks: of evenly spaced codes, or of any that see the same entries. Sums run over fixed runs of bins,
//! merged in order: results do not depend on the number of threads. [`reference`](mod@crate::palette::reference) is the same in a few lines.

use std::ops::Range;

use anyhow::{Result, ensure};
use rayon::prelude::*;

use super::attention::{Block, FLOOR, LANES, attend, attend_evenly, is_tame};
use super::bin_passes::{Pass, RUN, Read, ReadBack, Sums, Update, UpdateBack};
use super::code::Code;
use super::faint::{Faint, find_faint};
use super::histogram::Histogram;
use crate::palette::level::vectorized;

/// Of a palette.
const MOST_ENTRIES: usize = 256;
/// Entries of less mass than this part of all weights are [`Faint`]: of others the terms left out are 3e-11 at most.
const FAINT: f64 = 1e-6;

/// Some weights' clustering: what its backward pass needs.
#[derive(Debug)]
pub struct Clustering {
    histogram: Histogram,
    values: Vec<f64>,
    tau: f64,
    /// `order[j]`: which of the caller's entries is the j-th smallest.
    order: Vec<usize>,
    /// c⁰ … c^T, ascending. Attention keeps them so: in one dimension a greater entry has greater members.
    centroids: Vec<Vec<f64>>,
    /// s¹ … s^T; 0 for faint entries.
    masses: Vec<Vec<f64>>,
    /// For each iteration, what matters to each entry.
    faint: Vec<Vec<Faint>>,
}

/// (D_b, Ψ_b) of each bin b of a histogram: ∂L/∂w = D_b · ∂L/∂ŵ + Ψ_b of its weights.
pub type Lines = Vec<(f64, f64)>;

impl Clustering {
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
        let (centroids, masses, faint) = (vec![start], Vec::new(), Vec::new());
        let mut clustering = Self { histogram, values, tau, order, centroids, masses, faint };
        for t in 0..iterations {
            clustering.update(t);
        }
        Ok(clustering)
    }

    /// c^{t+1} from c^t.
    fn update(&mut self, t: usize) {
        let old = &self.centroids[t];
        let mut totals = vec![[0.0; 2]; old.len()];
        for run in self.for_blocks(t, &Update { old }) {
            totals.iter_mut().zip(run).for_each(|(total, run)| {
                total[0] += run[0];
                total[1] += run[1];
            });
        }
        let mut mass: Vec<f64> = totals.iter().map(|total| total[0]).collect();
        // Without weights entries stay where they are.
        let new = |(&old, [mass, moment]): (&f64, [f64; 2])| if mass > 0.0 { old + moment / mass } else { old };
        let mut new: Vec<f64> = old.iter().zip(totals).map(new).collect();
        let least = FAINT * mass.iter().sum::<f64>();
        let few = (0..old.len()).filter(|&j| mass[j] < least);
        let faint: Vec<Faint> =
            few.filter_map(|j| find_faint(&self.values, &self.histogram.counts, old, j, self.tau)).collect();
        for one in &faint {
            (mass[one.entry], new[one.entry]) = (0.0, one.mean(&self.values, &self.histogram.counts));
        }
        // Rounding may put an entry a little past its neighbour.
        for j in 1..new.len() {
            new[j] = new[j].max(new[j - 1]);
        }
        self.masses.push(mass);
        self.centroids.push(new);
        self.faint.push(faint);
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

    pub fn into_histogram(self) -> Histogram {
        self.histogram
    }

    /// Mean squared distance of the weights to the nearest of the last entries: the error if palettes were made now.
    pub fn hard_error(&self) -> f64 {
        self.histogram.error_of(&self.values, self.last())
    }

    /// f_b for each bin of the histogram.
    pub fn soft_values(&self) -> Vec<f64> {
        self.for_blocks(self.masses.len() - 1, &Read { entries: self.last() }).concat()
    }

    /// [`Lines`] of the histogram, from G_b, the sums of the upstream gradient over its weights.
    pub fn backward(&self, upstream: &[f64]) -> Lines {
        let iterations = self.masses.len();
        let count = self.order.len();
        let scale = 2.0 / self.tau;
        let read = ReadBack { upstream, entries: self.last(), previous: &self.centroids[iterations - 1], scale };
        let runs = self.for_blocks(iterations - 1, &read);
        let mut lines: Lines = runs.iter().flat_map(|run| &run.direct).map(|&d| (d, 0.0)).collect();
        // γ^t = ∂L/∂c^t
        let mut gamma = total_of(runs.iter().map(|run| &run.to_last), count);
        let mut gamma_previous = total_of(runs.iter().map(|run| &run.to_previous), count);
        for t in (1..=iterations).rev() {
            let (old, new, mass) = (&self.centroids[t - 1], &self.centroids[t], &self.masses[t - 1]);
            let share: Sums = (0..count).map(|j| if mass[j] > 0.0 { gamma[j] / mass[j] } else { 0.0 }).collect();
            let faint = &self.faint[t - 1];
            let mut beside = vec![0.0; if faint.is_empty() { 0 } else { self.values.len() }];
            for one in faint {
                one.bins.iter().for_each(|&(bin, share)| {
                    beside[bin] += share * gamma[one.entry] * (self.values[bin] - new[one.entry]);
                });
            }
            let runs = self.for_blocks(t - 1, &UpdateBack { share: &share, beside: &beside, old, new, scale });
            for ((_, through), psi) in lines.iter_mut().zip(runs.iter().flat_map(|run| &run.0)) {
                *through += psi;
            }
            let mut rest = total_of(runs.iter().map(|run| &run.1), count);
            for &Faint { entry: j, ref bins } in faint {
                for &(bin, share) in bins {
                    let (u, share) = (self.values[bin], share * gamma[j]);
                    let slope = share * (u - new[j]) * scale * (u - old[j]);
                    lines[bin].1 += share - slope;
                    rest[j] += f64::from(self.histogram.counts[bin]) * slope;
                }
            }
            gamma = gamma_previous.iter().zip(rest).map(|(a, b)| a + b).collect();
            gamma_previous = vec![0.0; count];
        }
        lines
    }

    /// Shows `pass` each block of bins with its attention on c^t, in the order of the bins. Returns the sums of all
    /// runs, in order.
    fn for_blocks<P: Pass>(&self, t: usize, pass: &P) -> Vec<P::Sums> {
        let runs = self.values.par_chunks(RUN).enumerate();
        runs.map(|(run, values)| {
            vectorized(
                #[inline(always)]
                || self.run(t, run * RUN, values, pass),
            )
        })
        .collect()
    }

    /// The bins `values` from number `first` on. Inlined, with all of `pass`, where it is made vectors of.
    #[inline(always)]
    fn run<P: Pass>(&self, t: usize, first: usize, values: &[f64], pass: &P) -> P::Sums {
        let centroids = &self.centroids[t];
        let step = match self.histogram.code {
            Code::Fixed { step } => Some(f64::from(step)),
            Code::F16 => None,
        };
        let mut sums = pass.start();
        let mut attention = vec![[0.0; LANES]; centroids.len()];
        let (mut from, mut near) = (0, 0);
        while from < values.len() {
            let Window { entries, until } = self.window(values[from], centroids, &mut near);
            // Of even codes the next LANES, whatever each of them sees; or else those that see the same.
            let last = values.get(from + LANES - 1).filter(|_| from.is_multiple_of(LANES));
            let even = step.zip(last).and_then(|(step, &last)| {
                let entries = entries.start..self.window(last, centroids, &mut near.clone()).entries.end;
                let nearest = centroids[near];
                let furthest = (centroids[entries.end - 1] - nearest).max(nearest - centroids[entries.start]);
                is_tame(step, furthest, self.tau).then_some((step, entries))
            });
            let (to, entries) = match &even {
                Some((_, entries)) => (from + LANES, entries.clone()),
                None => {
                    let most = if step.is_some() { from / LANES * LANES + LANES } else { from + LANES };
                    let most = most.min(values.len());
                    (from + values[from..most].partition_point(|&u| u < until).max(1), entries)
                }
            };
            let mut block = Block {
                start: first + from,
                len: to - from,
                values: [values[to - 1]; LANES],
                counts: [0.0; LANES],
                attention: &mut attention[..entries.len()],
                entries,
            };
            block.values[..to - from].copy_from_slice(&values[from..to]);
            let counts = &self.histogram.counts[first + from..first + to];
            block.counts.iter_mut().zip(counts).for_each(|(to, &n)| *to = f64::from(n));
            let (seen, near) = (&centroids[block.entries.clone()], near - block.entries.start);
            match even {
                Some((step, _)) => attend_evenly(values[from], step, seen, near, self.tau, block.attention),
                None => attend(&block.values, seen, near, self.tau, block.attention),
            }
            pass.block(&mut sums, &block);
            from = to;
        }
        sums
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

/// The sum of the runs, in their order.
fn total_of<'a>(runs: impl Iterator<Item = &'a Sums>, count: usize) -> Sums {
    runs.fold(vec![0.0; count], |mut sum, run| {
        sum.iter_mut().zip(run).for_each(|(sum, value)| *sum += value);
        sum
    })
}
