//! Core ML packages: writing, reading back, running.
