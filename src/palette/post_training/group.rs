//! The palette of one group of channels, and the numbers that it may hold: f16, or integers of 8 bits and their unit.

use half::f16;

/// The smallest number of f16 above 0, which is also how far apart its smallest are.
pub const SMALLEST: f64 = 1.0 / (1 << 24) as f64;
/// Units tried for integers, and the range in which, as parts of the least that keeps the largest entry in range.
const UNITS: usize = 128;
const LEAST_UNIT: f64 = 0.25;
const LARGEST_UNIT: f64 = 1.5;

/// The palette of a group.
#[derive(Default)]
pub struct Group {
    /// `[2^bits, d]`
    pub entries: Vec<f16>,
    /// None, one, or one a channel.
    pub scales: Vec<f16>,
    /// In the order of the group's own weights.
    pub indices: Vec<u8>,
}

/// The f16 nearest to a number, within the finite ones.
pub fn finite(value: f64) -> f16 {
    f16::from_f64(value.clamp(f16::MIN.to_f64(), f16::MAX.to_f64()))
}

/// The integer of 8 bits that is nearest to `value` in units of `unit`, and that times the unit is a number of f16.
pub fn whole(value: f64, unit: f64) -> f64 {
    let limit = (f16::MAX.to_f64() / unit).floor().min(127.0);
    (value / unit).round().clamp(-limit, limit)
}

/// A unit as it is stored with its table: a number of f16, of which small ones are few.
pub fn stored_unit(unit: f64) -> f64 {
    finite(unit).to_f64().max(SMALLEST)
}

/// The unit, not below `least`, of those that `stored` makes of any, in which integers from -127 to 127 come nearest to
/// `numbers`, by squared error with `weights`.
pub fn integers(numbers: &[f64], weights: &[f64], least: f64, stored: impl Fn(f64) -> f64) -> f64 {
    let largest = numbers.iter().map(|n| n.abs()).fold(0.0, f64::max);
    if largest == 0.0 {
        return least.max(1.0);
    }
    let items = || numbers.iter().zip(weights);
    let tried = |part: f64| {
        let unit = stored((part * largest / 127.0).max(least));
        // The best unit for these integers.
        let (mut products, mut squares) = (0.0, 0.0);
        for (&number, weight) in items() {
            let whole = whole(number, unit);
            products += weight * number * whole;
            squares += weight * whole * whole;
        }
        let better = if squares > 0.0 { stored((products / squares).max(least)) } else { unit };
        let error =
            |unit: f64| -> f64 { items().map(|(&n, weight)| weight * (n - whole(n, unit) * unit).powi(2)).sum() };
        [unit, better].map(|unit| (error(unit), unit)).into_iter().min_by(|a, b| a.0.total_cmp(&b.0))
    };
    let steps = (0..=UNITS).map(|i| LEAST_UNIT * (LARGEST_UNIT / LEAST_UNIT).powf(i as f64 / UNITS as f64));
    let best = std::iter::once(1.0).chain(steps).filter_map(tried).min_by(|a, b| a.0.total_cmp(&b.0));
    best.map_or(1.0, |(_, unit)| unit)
}
