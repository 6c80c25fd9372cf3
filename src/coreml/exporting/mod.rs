//! From what is asked for to packages on the disk.
//!
//! | file | what |
//! |---|---|
//! | [`plan`] | what `export`, or `[export]` of a config, asks for, as one plan, and doing it |
//! | [`nbits`] | the bits of palettes that are made on the way |

pub mod nbits;
pub mod plan;

pub use nbits::Nbits;
pub use plan::{Asked, Plan};
