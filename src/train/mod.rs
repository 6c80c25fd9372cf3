//! The training loop.

pub mod learning_rate;
pub mod optimizer;
