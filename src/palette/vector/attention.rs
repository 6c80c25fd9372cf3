//! Blocks of points and their attention to the entries that their cell sees: the arithmetic under
//! [`super::passes`].

// Loops over lanes and axes by number, as the compiler makes vectors of them.
#![allow(clippy::needless_range_loop)]

use super::cells::{Cell, Frame, Vector};

/// Points of a vector register, and registers of a block.
pub const LANES: usize = 16;
pub const PARTS: usize = 4;
pub const BLOCK: usize = LANES * PARTS;
/// Attention below 2 to the minus this, of the largest, counts as none: a quarter of what f32 rounds it by.
const FLOOR: f32 = 26.0;

pub type Lanes = [f32; LANES];
/// One number for each point of a block.
pub type Numbers = [Lanes; PARTS];

/// An entry that a cell sees, from the cell's origin and in units of 1/κ.
pub struct Seen<const D: usize> {
    /// Which entry.
    pub place: usize,
    pub offset: [f32; D],
    /// −|offset|²
    pub bias: f32,
    /// What the pass needs to know of it.
    pub vector: [f32; D],
    pub constant: f32,
}

/// An entry as cells of this label see it, and −|that|².
pub fn offset<const D: usize>(frame: &Frame<D>, label: usize, entry: &Vector<D>) -> ([f32; D], f32) {
    let origin = &frame.origins[label];
    let offset: [f32; D] = std::array::from_fn(|d| ((entry[d] - origin[d]) * frame.scale) as f32);
    (offset, -offset.iter().map(|x| x * x).sum::<f32>())
}

/// Which entries a cell sees.
pub struct Nearby<const D: usize> {
    /// The label that `offsets` and `biases` are of.
    label: Option<usize>,
    offsets: [Vec<f32>; D],
    biases: Vec<f32>,
    reach: Vec<f32>,
}

impl<const D: usize> Nearby<D> {
    pub fn new(entries: usize) -> Self {
        let zeros = vec![0.0; entries];
        let offsets = std::array::from_fn(|_| zeros.clone());
        Self { label: None, offsets, biases: zeros.clone(), reach: zeros }
    }

    /// Writes to `seen` each entry that some point between the cell's bounds may pay attention to, with what `prepare` says
    /// of it.
    #[inline(always)]
    pub fn find(
        &mut self,
        frame: &Frame<D>,
        cell: &Cell<D>,
        entries: &[Vector<D>],
        seen: &mut Vec<Seen<D>>,
        prepare: impl Fn(usize) -> ([f32; D], f32),
    ) {
        if self.label != Some(cell.label) {
            self.label = Some(cell.label);
            for (place, entry) in entries.iter().enumerate() {
                let (offset, bias) = offset(frame, cell.label, entry);
                (0..D).for_each(|d| self.offsets[d][place] = offset[d]);
                self.biases[place] = bias;
            }
        }
        // By how much the logit of an entry can be above that of the cell's own, within the bounds.
        let own = self.biases[cell.label];
        self.reach.iter_mut().zip(&self.biases).for_each(|(reach, bias)| *reach = bias - own);
        for d in 0..D {
            let (low, high, own) = (2.0 * cell.low[d], 2.0 * cell.high[d], self.offsets[d][cell.label]);
            for (reach, offset) in self.reach.iter_mut().zip(&self.offsets[d]) {
                let away = offset - own;
                let (at_low, at_high) = (away * low, away * high);
                *reach += if at_low > at_high { at_low } else { at_high };
            }
        }
        seen.clear();
        for (first, reach) in self.reach.chunks(LANES).enumerate() {
            // A little further, for rounding.
            let mut near = reach
                .iter()
                .enumerate()
                .fold(0u32, |near, (lane, &reach)| near | u32::from(reach >= -FLOOR - 1.0) << lane);
            while near != 0 {
                let place = first * LANES + near.trailing_zeros() as usize;
                near &= near - 1;
                let (vector, constant) = prepare(place);
                let offset = std::array::from_fn(|d| self.offsets[d][place]);
                seen.push(Seen { place, offset, bias: self.biases[place], vector, constant });
            }
        }
    }
}

/// a_j = softmax_j(−ln 2 · |point − offset_j|²), by rows of `attention`.
#[inline(always)]
pub fn attend<const D: usize>(
    points: &[Numbers; D],
    parts: usize,
    valid: &Numbers,
    seen: &[Seen<D>],
    attention: &mut [Numbers],
) {
    for part in 0..parts {
        let mut most = [f32::NEG_INFINITY; LANES];
        for (seen, row) in seen.iter().zip(attention.iter_mut()) {
            // |point|² more than the logit.
            let mut logit = [seen.bias; LANES];
            for d in 0..D {
                let twice = 2.0 * seen.offset[d];
                for lane in 0..LANES {
                    logit[lane] = points[d][part][lane].mul_add(twice, logit[lane]);
                }
            }
            for lane in 0..LANES {
                most[lane] = if logit[lane] > most[lane] { logit[lane] } else { most[lane] };
            }
            row[part] = logit;
        }
        let mut norm = [0.0; LANES];
        for row in attention.iter_mut() {
            let mut power = row[part];
            for lane in 0..LANES {
                power[lane] = exp2(power[lane] - most[lane]);
                norm[lane] += power[lane];
            }
            row[part] = power;
        }
        for lane in 0..LANES {
            norm[lane] = valid[part][lane] / norm[lane];
        }
        for row in attention.iter_mut() {
            for lane in 0..LANES {
                row[part][lane] *= norm[lane];
            }
        }
    }
}

/// 2ˣ for x ≤ 0, to 2e-7 of itself; 0 below −[`FLOOR`].
#[inline(always)]
fn exp2(x: f32) -> f32 {
    /// Adding it leaves the nearest integer in the lowest bits.
    const ROUND: f32 = 12_582_912.0; // 1.5 · 2²³
    /// Of 2ʳ for |r| ≤ ½, interpolated at Chebyshev's points: 4e-9 from it.
    const SERIES: [f32; 7] =
        [1.0, std::f32::consts::LN_2, 0.240_226_5, 0.055_503_27, 0.009_618_057, 0.001_340_042_8, 0.000_154_614_45];
    let shifted = x + ROUND;
    let r = x - (shifted - ROUND);
    let mut power = SERIES[6];
    for n in (0..6).rev() {
        power = power.mul_add(r, SERIES[n]);
    }
    // Times 2ᵏ, by the exponent's bits.
    let power = f32::from_bits(power.to_bits().wrapping_add(shifted.to_bits() << 23));
    if x < -FLOOR { 0.0 } else { power }
}
