//! How the entries of a layer are rounded where they are stored: to f16, or to integers of 8 bits.

use half::f16;

use crate::palette::{Form, LutDtype};

/// How the entries of a layer are rounded where they are stored.
#[derive(Clone, Debug, PartialEq)]
pub struct Rounding {
    /// Numbers of a table.
    pub table: usize,
    /// For integers of 8 bits, what each table's are multiplied by, as f16 holds it.
    pub units: Vec<f64>,
}

impl Rounding {
    /// For tables of `entries` (`[G, K, d]`) that are multiplied by `scales`, none or one a channel: integers reach up to the
    /// largest of a table, or less far where f16 has few bits for a scale so small.
    pub fn new(form: &Form, entries: &[f64], scales: &[f64]) -> Self {
        let units = match form.lut_dtype {
            LutDtype::F16 => Vec::new(),
            LutDtype::I8 => {
                let tables = entries.chunks(form.table());
                let channels = scales.len() / tables.len().max(1);
                tables.enumerate().map(|(group, table)| unit(table, &scales[group * channels..][..channels])).collect()
            }
        };
        Self { table: form.table(), units }
    }

    /// What is stored for an entry of table `group`: itself in f16, or an integer.
    fn round(&self, group: usize, entry: f64) -> f16 {
        match self.units.get(group) {
            Some(unit) => f16::from_f64((entry / unit).round().clamp(-127.0, 127.0)),
            None => saturated(entry),
        }
    }

    /// What is stored for `entries` (`[G, K, d]`): numbers of f16.
    pub fn rounded(&self, entries: &[f64]) -> Vec<f64> {
        entries.iter().enumerate().map(|(place, &entry)| self.round(place / self.table, entry).to_f64()).collect()
    }

    /// The values of `entries` (`[G, K, d]`) once stored, in units of a channel's scale where there is one.
    pub fn values(&self, entries: &[f64]) -> Vec<f64> {
        let value = |(place, &entry): (usize, &f64)| {
            let group = place / self.table;
            let stored = self.round(group, entry).to_f64();
            // As Core ML computes it, unless a channel's scale comes in between: f16 of the product.
            self.units.get(group).map_or(stored, |unit| f16::from_f64(stored * unit).to_f64())
        };
        entries.iter().enumerate().map(value).collect()
    }
}

/// How far beyond the largest number of f16 a value may lie, as a fraction of it, and still be meant to be that number: as
/// far as the 16-bit codes and k-means round. What lies farther has diverged.
const MARGIN: f64 = 1.0 / 512.0;

/// `value` in f16: the largest number of f16 where it is beyond by no more than rounding.
fn saturated(value: f64) -> f16 {
    let largest = f16::MAX.to_f64();
    f16::from_f64(if value.abs() <= largest * (1.0 + MARGIN) { value.clamp(-largest, largest) } else { value })
}

/// A channel's scale in f16, so that its product with the `largest` of its entries is finite there wherever rounding alone
/// would make it infinite.
pub fn scale_within(scale: f64, largest: f64) -> f16 {
    let mut stored = saturated(scale);
    let reach = f16::MAX.to_f64() * (1.0 + MARGIN);
    while scale * largest <= reach && f16::from_f64(stored.to_f64() * largest).is_infinite() {
        stored = f16::from_bits(stored.to_bits() - 1);
    }
    stored
}

/// What the integers of a table are multiplied by, so that times each of `scales` it is a number of f16, or nearly so.
fn unit(table: &[f64], scales: &[f64]) -> f64 {
    /// The smallest number of f16 above 0.
    const SMALLEST: f64 = 1.0 / (1 << 24) as f64;
    let largest = table.iter().fold(0f64, |m, e| m.max(e.abs()));
    let least = (largest / 127.0).max(f64::MIN_POSITIVE);
    if scales.is_empty() {
        let near = f16::from_f64(least);
        // Among the small ones, which are few, the one above is taken: the one below would cut off the largest entries.
        let above = if near.is_normal() || near.to_f64() >= least { near } else { f16::from_bits(near.to_bits() + 1) };
        // The largest integer times it is finite too.
        return scale_within(above.to_f64().max(SMALLEST), 127.0).to_f64();
    }
    // What is lost by integers of this unit, and by the scales in it.
    let power = table.iter().map(|entry| entry * entry).sum::<f64>() / table.len() as f64;
    let lost = |unit: f64| -> f64 {
        let of_scale = |scale: &f64| {
            let off = f16::from_f64(scale * unit).to_f64() / unit - scale;
            (unit * scale).powi(2) / 12.0 + power * off * off
        };
        scales.iter().map(of_scale).sum()
    };
    let (median, mut ascending) = (scales.len() / 2, scales.to_vec());
    ascending.sort_by(f64::total_cmp);
    let exact = |unit: f64| f16::from_f64(unit * ascending[median]).to_f64() / ascending[median];
    let steps = (0..=14).map(|step| least * (f64::from(step) / 2.0).exp2());
    // A unit with which f16 overflows is infinite, and what it loses is not a number.
    let tried = steps.flat_map(|unit| [unit, exact(unit)]).filter(|&unit| unit >= least && unit.is_finite());
    tried.min_by(|a, b| lost(*a).total_cmp(&lost(*b))).unwrap_or(least)
}
