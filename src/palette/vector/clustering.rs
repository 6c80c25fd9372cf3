//! Differentiable k-means of vectors, forward and backward: what [`crate::palette::clustering`] is for numbers.
//!
//! With x_i the points, D weights each, c^t_j entry j after t of T iterations, τ the temperature:
//!
//! ```text
//! a^t_ij = softmax_j(−|x_i − c^{t−1}_j|² / τ)     s^t_j = Σ_i a^t_ij     c^t_j = Σ_i a^t_ij x_i / s^t_j
//! f_i = Σ_j a^T_ij c^T_j                          (the soft point: the last attention reads the last entries)
//! ```
//!
//! Points share nothing as numbers of one code do, so each pass goes over all of them; what is kept between passes does not
//! grow with points × entries. c⁰ is held constant.
//!
//! Forward and back, three iterations, 7.4 M weights of one Gaussian, ns of CPU time a weight at ρ = 1, 0.3 and 0.1 (a Xeon
//! with AVX-512 shared with other work, November 2026): D = 2 with 16 entries 71, 47, 45; D = 2 with 256 entries 117, 87, 83;
//! D = 4 with 256 entries 536, 265, 203. Beside the weight, the soft weight and the gradient a step holds a byte a point, and
//! while a layer is computed 8 bytes a weight and 2 a point more.

use anyhow::{Result, ensure};

use super::cells::Vector;

/// Sums over points for one entry: Σ p, Σ p·(point − entry), and Σ of D other numbers, p being what a pass says.
#[derive(Clone)]
pub struct Sums<const D: usize> {
    pub weight: f64,
    pub moment: Vector<D>,
    pub other: Vector<D>,
}

/// The passes over all points: those that share an attention, and its derivatives.
pub trait Passes<const D: usize> {
    /// For each entry Σ a and Σ a·(x − entry), with the attention a to `entries`.
    fn update(&mut self, entries: &[Vector<D>]) -> Result<Vec<Sums<D>>>;

    /// Makes the points' soft ones, Σ_j a_j `last`_j with the attention a to `previous`. Returns the sum of squared
    /// distances from the points to the nearest of `last`.
    fn read(&mut self, previous: &[Vector<D>], last: &[Vector<D>]) -> Result<f64>;

    /// Turns the gradient of the soft points into that of the points through their own attention. Returns for each entry
    /// ∂L/∂`last` and ∂L/∂`previous`.
    fn read_back(&mut self, previous: &[Vector<D>], last: &[Vector<D>]) -> Result<Vec<[Vector<D>; 2]>>;

    /// Adds to the gradient of the points what comes through the update from `old` to `new` entries, and returns
    /// ∂L/∂`old`. `share` is ∂L/∂`new` over the entries' masses.
    fn update_back(&mut self, share: &[Vector<D>], old: &[Vector<D>], new: &[Vector<D>]) -> Result<Vec<Vector<D>>>;
}

/// One clustering: what its backward pass needs beside the points.
#[derive(Debug)]
pub struct Clustering<const D: usize> {
    /// c⁰ … c^T
    centroids: Vec<Vec<Vector<D>>>,
    /// s¹ … s^T
    masses: Vec<Vec<f64>>,
    /// Sum of squared distances from the points to the nearest of the last entries.
    pub hard_error: f64,
}

impl<const D: usize> Clustering<D> {
    /// Clusters: `iterations` (T ≥ 1) updates of `centroids`, at most 256.
    ///
    /// # Errors
    /// When an argument is out of its range; those of `passes`.
    pub fn cluster(passes: &mut impl Passes<D>, centroids: Vec<Vector<D>>, iterations: usize) -> Result<Self> {
        ensure!((1..=256).contains(&centroids.len()), "{} entries are not a palette", centroids.len());
        ensure!(iterations >= 1, "at least one iteration is needed");
        let mut clustering = Self { centroids: vec![centroids], masses: Vec::new(), hard_error: 0.0 };
        for t in 0..iterations {
            let old = &clustering.centroids[t];
            let sums = passes.update(old)?;
            // An entry that no weight looks at stays where it is.
            let new = |(old, sums): (&Vector<D>, &Sums<D>)| -> Vector<D> {
                let share = |d: usize| if sums.weight > 0.0 { sums.moment[d] / sums.weight } else { 0.0 };
                std::array::from_fn(|d| old[d] + share(d))
            };
            let new = old.iter().zip(&sums).map(new).collect();
            clustering.masses.push(sums.iter().map(|sums| sums.weight).collect());
            clustering.centroids.push(new);
        }
        clustering.hard_error =
            passes.read(&clustering.centroids[iterations - 1], &clustering.centroids[iterations])?;
        Ok(clustering)
    }

    /// The entries after the last iteration.
    pub fn entries(&self) -> &[Vector<D>] {
        self.centroids.last().expect("c⁰ is there")
    }

    /// Turns the gradient of the soft points that `passes` hold into that of the points.
    ///
    /// # Errors
    /// Those of `passes`.
    pub fn backward(&self, passes: &mut impl Passes<D>) -> Result<()> {
        let iterations = self.masses.len();
        let through = passes.read_back(&self.centroids[iterations - 1], self.entries())?;
        // γ^t = ∂L/∂c^t
        let (mut gamma, mut previous): (Vec<Vector<D>>, Vec<Vector<D>>) =
            through.into_iter().map(|[a, b]| (a, b)).unzip();
        for t in (1..=iterations).rev() {
            let mass = &self.masses[t - 1];
            let mut share = gamma.clone();
            for ((share, previous), &mass) in share.iter_mut().zip(&mut previous).zip(mass) {
                if mass > 0.0 {
                    *share = share.map(|x| x / mass);
                } else {
                    // What moves an entry that no weight looks at is the entry before.
                    (0..D).for_each(|d| previous[d] += share[d]);
                    *share = [0.0; D];
                }
            }
            let rest = passes.update_back(&share, &self.centroids[t - 1], &self.centroids[t])?;
            for (previous, rest) in previous.iter_mut().zip(rest) {
                (0..D).for_each(|d| previous[d] += rest[d]);
            }
            gamma = std::mem::replace(&mut previous, vec![[0.0; D]; mass.len()]);
        }
        Ok(())
    }
}
