//! Which of a few entries of D numbers is nearest to each of many points: where the k-means of vectors spends its time.
//!
//! Points come in blocks of [`LANES`], so that the compiler makes vectors of them, as wide as the
//! [level](crate::palette::Level) in use has them. No fused multiplications.

use crate::palette::level::vectorized;

/// Points in a block.
const LANES: usize = 32;

/// Writes to `to`, for each of `points`, the index of the nearest of `entries` (at most 256); of equally near ones, the
/// first. By ½|c|² − x·c in f32: right up to rounding of |x|² to 24 bits.
pub fn nearest<const D: usize>(points: &[[f32; D]], entries: &[[f32; D]], to: &mut [u8]) {
    assert!(points.len() == to.len() && (1..=256).contains(&entries.len()));
    let halves: Vec<f32> = entries.iter().map(|entry| entry.iter().map(|c| c * c).sum::<f32>() / 2.0).collect();
    vectorized(
        #[inline(always)]
        || nearest_of(points, entries, &halves, to),
    );
}

#[inline(always)]
fn nearest_of<const D: usize>(points: &[[f32; D]], entries: &[[f32; D]], halves: &[f32], to: &mut [u8]) {
    for (points, to) in points.chunks(LANES).zip(to.chunks_mut(LANES)) {
        // One row a coordinate; what is missing of the last block stays 0 and is not read.
        let mut x = [[0f32; LANES]; D];
        for (lane, point) in points.iter().enumerate() {
            for d in 0..D {
                x[d][lane] = point[d];
            }
        }
        let (mut least, mut at) = ([f32::INFINITY; LANES], [0u32; LANES]);
        for (j, (entry, &half)) in entries.iter().zip(halves).enumerate() {
            for lane in 0..LANES {
                let mut distance = half;
                for d in 0..D {
                    distance -= x[d][lane] * entry[d];
                }
                let nearer = distance < least[lane];
                least[lane] = if nearer { distance } else { least[lane] };
                at[lane] = if nearer { j as u32 } else { at[lane] };
            }
        }
        to.iter_mut().zip(at).for_each(|(to, at)| *to = at as u8);
    }
}

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;
    use crate::palette::Level;

    fn agrees<const D: usize>(count: usize, entries: usize) {
        let mut random = ChaCha8Rng::seed_from_u64((count * entries) as u64);
        let mut draw = |count: usize| -> Vec<[f32; D]> {
            (0..count).map(|_| std::array::from_fn(|_| random.random::<f32>() - 0.5)).collect()
        };
        let (points, entries) = (draw(count), draw(entries));
        let mut found = vec![0; count];
        nearest(&points, &entries, &mut found);
        let distance =
            |x: &[f32; D], c: &[f32; D]| -> f64 { x.iter().zip(c).map(|(x, c)| f64::from(x - c).powi(2)).sum() };
        for (x, &index) in points.iter().zip(&found) {
            let least = entries.iter().map(|c| distance(x, c)).fold(f64::INFINITY, f64::min);
            assert!(distance(x, &entries[index as usize]) <= least + 1e-6);
        }
        for level in Level::available() {
            level.force();
            let mut again = vec![0; count];
            nearest(&points, &entries, &mut again);
            assert_eq!(found, again, "{level}");
        }
    }

    #[test]
    fn the_nearest_is_found() {
        for count in [0, 1, 31, 32, 33, 1000] {
            for entries in [1, 2, 16, 255, 256] {
                agrees::<2>(count, entries);
                agrees::<4>(count, entries);
            }
        }
    }

    #[test]
    fn of_equals_the_first() {
        let mut found = [9; 3];
        nearest(&[[1.0, 1.0]; 3], &[[5.0, 5.0], [1.0, 1.0], [1.0, 1.0]], &mut found);
        assert_eq!(found, [1; 3]);
    }
}
