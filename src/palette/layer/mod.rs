//! The palette of one layer while it is trained.
//!
//! | file | what a reader finds there |
//! |---|---|
//! | `dkm` | [`DkmLayer`]: entries and temperature of a layer, its soft weight, its hard palette |
//! | `backward` | from the gradient of the soft weight to that of the weight, or straight to AdamW's step |
//! | `frozen` | [`Frozen`]: a layer with fixed assignments, its entries trained |
//! | `rounding` | what entries are where they are stored: f16, or integers of 8 bits |
//! | `rows` | a weight laid out for clustering: one row for each group of channels |
//! | `start` | where a layer starts: entries, scales of channels, and how far entries are apart |
//! | `saved` | numbers of a layer in a saved state |

mod backward;
mod dkm;
mod frozen;
mod rounding;
mod rows;
mod saved;
mod start;

pub use backward::{Gradient, SoftenRows};
pub use dkm::DkmLayer;
pub use frozen::Frozen;
