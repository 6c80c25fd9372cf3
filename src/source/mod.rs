//! Where models come from.

pub mod files;
