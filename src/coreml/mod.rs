//! Core ML packages: writing, reading back, running.

pub mod proto;
