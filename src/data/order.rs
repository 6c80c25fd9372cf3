//! Which sample stands at each position of a run, as a function of (seed, position): a resumed run needs no state to go on
//! where it was, and it does not matter how positions are grouped into batches.
//!
//! The samples of a run are its epochs one after another, each a permutation of all samples. A batch may reach over the end
//! of an epoch, so none is cut short and every sample is met once an epoch.

use std::ops::Range;

use crate::torch::random::{Purpose, generator};
use rand::Rng;

/// The order of `n` samples in an epoch: Fisher and Yates' shuffle with ChaCha8, the same on every machine.
pub fn epoch_order(seed: u64, epoch: u64, n: usize) -> Vec<usize> {
    let mut random = generator(seed, Purpose::Order, epoch);
    let mut order: Vec<usize> = (0..n).collect();
    for last in (1..n).rev() {
        order.swap(last, below(&mut random, last as u64 + 1) as usize);
    }
    order
}

/// The samples at these positions of a run: numbers below `n`. Empty when there are no samples.
pub fn samples_at(seed: u64, positions: Range<u64>, n: usize) -> Vec<usize> {
    if n == 0 {
        return Vec::new();
    }
    let count = (positions.end - positions.start) as usize;
    let mut epoch = positions.start / n as u64;
    let mut place = (positions.start % n as u64) as usize;
    let mut samples = Vec::with_capacity(count);
    while samples.len() < count {
        let order = epoch_order(seed, epoch, n);
        samples.extend(order[place..].iter().take(count - samples.len()));
        (epoch, place) = (epoch + 1, 0);
    }
    samples
}

/// Uniform below `bound` without bias (Lemire 2019, "Fast random integer generation in an interval", algorithm 5).
fn below(random: &mut impl Rng, bound: u64) -> u64 {
    loop {
        let product = u128::from(random.next_u64()) * u128::from(bound);
        if product as u64 >= bound.wrapping_neg() % bound {
            return (product >> 64) as u64;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_epoch_is_a_permutation_of_its_own() {
        let sorted = |mut order: Vec<usize>| {
            order.sort();
            order
        };
        for n in [0, 1, 2, 7, 100] {
            assert_eq!(sorted(epoch_order(3, 0, n)), (0..n).collect::<Vec<_>>());
        }
        let first = epoch_order(3, 0, 100);
        assert_eq!(first, epoch_order(3, 0, 100));
        assert_ne!(first, epoch_order(3, 1, 100));
        assert_ne!(first, epoch_order(4, 0, 100));
        // Runs that were begun with an earlier build go on in the same order.
        assert_eq!(epoch_order(42, 5, 8), [3, 5, 1, 0, 7, 6, 4, 2]);
        // Each of the six orders of three comes about equally often (chance of a false alarm: below 1e-8).
        let mut counts = std::collections::BTreeMap::new();
        for epoch in 0..6000 {
            *counts.entry(epoch_order(0, epoch, 3)).or_insert(0) += 1;
        }
        assert!(counts.len() == 6 && counts.values().all(|count| (820..1180).contains(count)), "{counts:?}");
    }

    #[test]
    fn batches_go_through_the_epochs_without_gap_or_repeat() {
        for (batch, n) in [(4, 10), (3, 3), (7, 5), (16, 3), (1, 4)] {
            let steps = 3 * n as u64;
            let batches = (0..steps).map(|step| step * batch..(step + 1) * batch);
            let taken: Vec<usize> = batches.flat_map(|positions| samples_at(9, positions, n)).collect();
            assert_eq!(taken.len(), (steps * batch) as usize);
            for (epoch, order) in taken.chunks(n).enumerate() {
                assert_eq!(
                    order,
                    &epoch_order(9, epoch as u64, n)[..order.len()],
                    "batch {batch} of {n}, epoch {epoch}"
                );
            }
        }
        assert!(samples_at(9, 20..24, 0).is_empty());
    }
}
