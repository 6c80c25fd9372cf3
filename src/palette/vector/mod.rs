//! Differentiable k-means of vectors: entries that hold 2 or 4 weights.
//!
//! | file | what a reader finds there |
//! |---|---|
//! | `cells` | weights as points, sorted by where they lie, so that neighbours see the same entries |
//! | `clustering` | differentiable k-means, forward and backward, over any passes |
//! | `passes` | what every point costs on the CPU: sums, the soft point, gradients |
//! | `attention` | the attention of a block of points to the entries that its cell sees |
//! | `operators` | the passes by libtorch's operators, for GPUs |
//! | `soften` | the soft weight of a tensor, and its gradient; which entry is nearest to each vector |
//! | `nearest` | which entry is nearest to each point, for k-means too |

mod attention;
mod cells;
mod clustering;
mod nearest;
mod operators;
mod passes;
mod soften;

pub use nearest::nearest;
pub use soften::{SoftenVectors, nearest_vectors};
