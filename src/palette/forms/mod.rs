//! Which forms a palette may have, and the palette itself.
//!
//! | file | what a reader finds there |
//! |---|---|
//! | `form` | [`Form`]: bits, groups of channels, vectors, scales, and which weights they fit |
//! | `palette` | [`Palette`]: indices, entries and scales of one weight, and the weight that they make |

mod form;
mod palette;

pub use form::{BITS, CLUSTER_DIMS, Form, LutDtype};
pub use palette::Palette;
pub(super) use palette::{check_form, elements};
