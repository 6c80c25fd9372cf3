//! Differentiable k-means of numbers, through a histogram of 16-bit codes.
//!
//! | file | what a reader finds there |
//! |---|---|
//! | `code` | the 16-bit numbers through which weights are seen |
//! | `histogram` | how many weights have each code |
//! | [`clustering`] | differentiable k-means on a histogram, forward and backward |
//! | `attention`, `bin_passes` | its arithmetic, a block of bins at a time |
//! | `faint` | entries that hardly any weight looks at |
//! | [`soften()`] | the soft weight of a tensor, and its gradient |
//! | `codes` | a tensor through its codes: look-ups, sums, gradients, AdamW's step; on the CPU and elsewhere |
//! | `passes` | what every weight costs on the CPU: the loops over slices |
//! | `operators` | the passes by libtorch's operators, for GPUs |
//! | `scratch` | tables by code that are kept from layer to layer |
//! | `nearest` | which entry is nearest to a number |

mod attention;
mod bin_passes;
pub mod clustering;
mod code;
mod codes;
mod faint;
mod histogram;
mod nearest;
mod operators;
mod passes;
mod scratch;
mod soften;

pub(super) use code::CODES;
pub use code::Code;
pub(super) use codes::combine_and_step;
pub use histogram::Histogram;
pub(super) use histogram::ascending_halves;
pub(super) use nearest::{first_of_equals, midpoints, nearest};
pub use passes::AdamWStep;
pub use soften::{Soften, soften};
pub(super) use soften::{check, soften_counted};
