//! The 16-bit numbers through which weights are seen.

use half::f16;

/// How many values a 16-bit code has.
pub const CODES: usize = 1 << 16;

/// One value for every code.
pub type ByCode<T> = [T; CODES];

/// Which 16-bit number stands for a weight; all round to nearest, ties to even.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Code {
    /// A number of f16: fine near zero, and at home with a few weights far above the others. Some 20,000 bins.
    F16,
    /// Multiples of `step`, a power of two, up to 32,766 of them: as many bins as a temperature needs, evenly spaced, which
    /// makes their attention cheap ([`super::clustering`]).
    Fixed { step: f32 },
}

impl Code {
    /// Multiples of a step of at most `finest`, as good a one as any for a number out of reach.
    pub fn fixed(finest: f64) -> Self {
        // The power of two below, far from where floats end.
        let finest = finest.clamp(1e-25, 1e25) as f32;
        Self::Fixed { step: f32::from_bits(finest.to_bits() & 0x7F80_0000) }
    }

    /// This code, or one that also holds weights as large as `most`: with a larger step, or where that would be
    /// [`MOST_COARSER`] times as large, f16.
    pub(in crate::palette) fn holding(self, most: f32) -> Self {
        let Self::Fixed { step } = self else { return self };
        let mut coarser = step;
        // What is half a step more is rounded down.
        while f64::from(most) > (MOST_STEPS + 0.5) * f64::from(coarser) {
            coarser *= 2.0;
        }
        if coarser > MOST_COARSER * step { Self::F16 } else { Self::Fixed { step: coarser } }
    }

    /// The value that a code stands for.
    #[inline]
    pub fn value(self, code: u16) -> f64 {
        match self {
            Code::F16 => f16::from_bits(code).to_f64(),
            Code::Fixed { step } => (f64::from(code) - 32_768.0) * f64::from(step),
        }
    }

    /// The code of a value.
    pub fn of(self, value: f32) -> u16 {
        match self {
            Code::F16 => f16::from_f32(value).to_bits(),
            Code::Fixed { step } => fixed_code(value / step),
        }
    }
}

/// As many steps a weight is at most, with fixed point: the code beyond stands for all that are more.
const MOST_STEPS: f64 = 32_766.0;
/// Times.
const MOST_COARSER: f32 = 16.0;

/// Of a weight in steps: to nearest, ties to even. What is no number or does not fit comes out as the first code or the
/// last, which no weight has.
#[inline(always)]
pub fn fixed_code(steps: f32) -> u16 {
    /// Adding it leaves the nearest whole number in the lowest bits.
    const ROUND: f32 = 12_582_912.0; // 1.5 · 2²³
    let steps = if steps > -32_768.0 { steps } else { -32_768.0 };
    let steps = if steps < 32_767.0 { steps } else { 32_767.0 };
    (steps + ROUND).to_bits() as u16 ^ 0x8000
}
