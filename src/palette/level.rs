//! Which vector instructions the loops over weights use: the widest that the processor has.
//!
//! Each loop is written once, in plain Rust, and compiled for every level (by the crate `pulp`). All levels give the same
//! bits: additions and multiplications are fused only where the source says so, which then holds at every level.

use std::fmt::{self, Display};
use std::sync::atomic::{AtomicU8, Ordering};

use pulp::Arch;

/// Vector instructions, ascending.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// What every processor of its kind has: SSE2, or NEON.
    Plain,
    /// AVX2 and FMA.
    Avx2,
    /// AVX-512 F, BW, CD, DQ and VL.
    Avx512,
}

/// The level in use, counted from 1; 0 until the first use.
static IN_USE: AtomicU8 = AtomicU8::new(0);

impl Level {
    const ALL: [Self; 3] = [Self::Plain, Self::Avx2, Self::Avx512];

    /// The levels that this processor has, ascending.
    pub fn available() -> Vec<Self> {
        Self::ALL.into_iter().filter(|level| level.arch().is_some()).collect()
    }

    /// The level in use.
    pub fn in_use() -> Self {
        let level = match IN_USE.load(Ordering::Relaxed) {
            0 => Self::ALL.into_iter().rfind(|level| level.arch().is_some()),
            number => Self::ALL.get(usize::from(number) - 1).copied(),
        };
        let level = level.unwrap_or(Self::Plain);
        IN_USE.store(level as u8 + 1, Ordering::Relaxed);
        level
    }

    /// Makes all threads use this level from now on, to compare and to measure; a level that the processor does not have
    /// changes nothing.
    pub fn force(self) {
        if self.arch().is_some() {
            IN_USE.store(self as u8 + 1, Ordering::Relaxed);
        }
    }

    #[cfg(target_arch = "x86_64")]
    fn arch(self) -> Option<Arch> {
        match self {
            Self::Plain => Some(Arch::Scalar),
            Self::Avx2 => pulp::x86::V3::try_new().map(Arch::V3),
            Self::Avx512 => pulp::x86::V4::try_new().map(Arch::V4),
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn arch(self) -> Option<Arch> {
        (self == Self::Plain).then_some(Arch::Scalar)
    }
}

impl Display for Level {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str(match self {
            Self::Plain => "plain",
            Self::Avx2 => "AVX2",
            Self::Avx512 => "AVX-512",
        })
    }
}

/// Does `work`, compiled for the level in use: what of it is inlined, loops foremost.
#[inline(always)]
pub fn vectorized<R>(work: impl FnOnce() -> R) -> R {
    Level::in_use().arch().unwrap_or(Arch::Scalar).dispatch(work)
}
