//! Noise schedules, samplers and losses.
