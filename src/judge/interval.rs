//! How far a mean over prompts may be from that over all prompts of their kind.

use rand::Rng;
use rand_chacha::ChaCha8Rng;

use crate::torch::random::{Purpose, generator};

/// How often the prompts are drawn again.
const RESAMPLES: usize = 4000;
/// What is left out of the means at either end.
const TAIL: f64 = 0.025;

/// A mean and the range that holds 95 % of the means of prompts drawn again.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Interval {
    pub mean: f64,
    pub low: f64,
    pub high: f64,
}

/// The mean of `values`, one of each prompt, and its interval: the percentile bootstrap (Efron 1979; Efron and Tibshirani
/// 1993, 13.3) of 4000 resamples, which follow from `seed` and the number of values alone: intervals of two models, and that
/// of their differences, are of the same resamples. Too narrow for fewer than some twenty prompts; a point where all values
/// are equal. `None` without values.
pub fn interval(values: &[f64], seed: u64) -> Option<Interval> {
    let count = values.len();
    let mean = |sum: f64| sum / count as f64;
    if count == 0 {
        return None;
    }
    let mut generator: ChaCha8Rng = generator(seed, Purpose::Resample, count as u64);
    let mut pick = || values[(generator.next_u64() % count as u64) as usize];
    let mut means: Vec<f64> = (0..RESAMPLES).map(|_| mean((0..count).map(|_| pick()).sum())).collect();
    means.sort_by(f64::total_cmp);
    let at = |share: f64| means[((share * RESAMPLES as f64) as usize).min(RESAMPLES - 1)];
    Some(Interval { mean: mean(values.iter().sum()), low: at(TAIL), high: at(1.0 - TAIL) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::torch::random::{generator, uniform};

    /// Of many samples of a known distribution, nearly 95 % have its mean in their interval.
    #[test]
    fn intervals_hold_the_true_mean_as_often_as_they_say() {
        let mut random = generator(5, Purpose::Noise, 0);
        let samples = 400;
        let holds = (0..samples).filter(|&seed| {
            let values: Vec<f64> = (0..40).map(|_| f64::from(uniform(&mut random) < 0.7)).collect();
            let found = interval(&values, seed).unwrap();
            assert!(found.low <= found.mean && found.mean <= found.high);
            (found.low..=found.high).contains(&0.7)
        });
        let share = holds.count() as f64 / samples as f64;
        assert!((0.90..0.98).contains(&share), "{share}");
    }

    #[test]
    fn an_interval_follows_from_its_seed() {
        let values: Vec<f64> = (1..30).map(|i| f64::from(i).sqrt()).collect();
        assert_eq!(interval(&values, 1), interval(&values, 1));
        assert_ne!(interval(&values, 1), interval(&values, 2));
        assert_eq!(interval(&[], 1), None);
        assert_eq!(interval(&[3.0], 1), Some(Interval { mean: 3.0, low: 3.0, high: 3.0 }));
    }
}
