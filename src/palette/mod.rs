//! Palettes: a weight as an index a number into a short table of values.
//!
//! | file | what |
//! |---|---|
//! | [`codes`] | weights through a 16-bit code: histograms, look-ups, sums |
//! | [`passes`] | the same on slices: what every weight costs |
//! | [`kmeans`] | the nearest palette to a weight: exact 1-d k-means |
//! | [`table`] | differentiable k-means on a histogram, forward and backward |
//! | [`attention`] | its arithmetic, a block of bins at a time |
//! | [`dkm`] | differentiable k-means of a weight, and of a layer while it is trained |
//! | [`frozen`] | a layer with fixed assignments, its entries trained |
//! | [`packing`] | indices as a stream of bits |
//! | [`post_training`] | palettes for a trained network, without training |
//! | [`checkpoint`] | a whole UNet, its weights as palettes, in one safetensors file |

mod attention;
pub mod checkpoint;
pub mod codes;
pub mod dkm;
pub mod frozen;
pub mod kmeans;
pub mod packing;
mod passes;
pub mod post_training;
pub mod table;

use anyhow::{Result, anyhow, ensure};
use half::f16;
use tch::{Device, Kind, Tensor};

pub use checkpoint::PalettizedCheckpoint;
pub(crate) use codes::piece;
pub use dkm::{DkmLayer, Soften, soften};
pub use frozen::Frozen;

/// How many bits an index may have: those that Core ML's iOS 16 form stores.
pub const BITS: [u32; 5] = [1, 2, 4, 6, 8];

/// A weight of which every element is one of 2^bits values.
#[derive(Clone, Debug, PartialEq)]
pub struct Palette {
    /// Of an index; one of [`BITS`].
    pub bits: u32,
    /// Of the weight.
    pub shape: Vec<i64>,
    /// Which entry each element is, row-major, one a byte.
    pub indices: Vec<u8>,
    /// The 2^bits values.
    pub entries: Vec<f16>,
}

impl Palette {
    /// A palette of which every part fits the others.
    ///
    /// # Errors
    /// When `bits` is not one of [`BITS`], the entries are not 2^bits finite values, the indices are not as many as
    /// `shape` has elements, or one of them points past the entries.
    pub fn new(bits: u32, shape: Vec<i64>, indices: Vec<u8>, entries: Vec<f16>) -> Result<Self> {
        ensure!(BITS.contains(&bits), "a palette has 1, 2, 4, 6 or 8 bits, not {bits}");
        ensure!(
            entries.len() == 1 << bits,
            "a palette of {bits} bits has {} entries, not {}",
            1 << bits,
            entries.len()
        );
        if let Some(value) = entries.iter().find(|e| !e.is_finite()) {
            return Err(anyhow!("a palette entry is {value}"));
        }
        let count = elements(&shape)?;
        ensure!(
            indices.len() == count,
            "shape {shape:?} has {count} elements, and there are {} indices",
            indices.len()
        );
        if let Some(index) = indices.iter().find(|&&i| i as usize >= entries.len()) {
            return Err(anyhow!("index {index} points past the {} entries of its palette", entries.len()));
        }
        Ok(Self { bits, shape, indices, entries })
    }

    /// The weight, row-major.
    pub fn dense(&self) -> Vec<f16> {
        self.indices.iter().map(|&index| self.entries[index as usize]).collect()
    }

    /// The weight as a tensor of its shape.
    ///
    /// # Errors
    /// libtorch's (no memory, no such device).
    pub fn tensor(&self, kind: Kind, device: Device) -> Result<Tensor> {
        let halves = halves_tensor(&self.dense(), &self.shape)?;
        Ok(halves.f_to_device(device)?.f_to_kind(kind)?)
    }
}

/// How many elements `shape` has.
///
/// # Errors
/// For a negative size, or more elements than can be addressed.
pub(crate) fn elements(shape: &[i64]) -> Result<usize> {
    shape
        .iter()
        .try_fold(1usize, |n, &size| n.checked_mul(usize::try_from(size).ok()?))
        .filter(|&n| n <= isize::MAX as usize)
        .ok_or_else(|| anyhow!("{shape:?} is not the shape of a tensor"))
}

/// A tensor of f16 on the CPU.
pub(crate) fn halves_tensor(values: &[f16], shape: &[i64]) -> Result<Tensor> {
    Ok(Tensor::f_from_slice(values)?.f_view(shape)?)
}

/// Between each entry (ascending) and the next. The nearest entry to a value is that at the number of midpoints below
/// it; of two equally near, the lower.
pub(crate) fn midpoints(entries: &[f64]) -> Vec<f64> {
    entries.windows(2).map(|pair| (pair[0] + pair[1]) / 2.0).collect()
}

/// For each entry (ascending) the index of the first that equals it, so that of equal entries one only is used.
pub(crate) fn first_of_equals(entries: &[f64]) -> Vec<u8> {
    entries.iter().map(|entry| entries.partition_point(|e| e < entry) as u8).collect()
}
