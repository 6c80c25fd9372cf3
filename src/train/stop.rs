//! Ctrl-C: a run that is asked to stop does so where nothing is lost.

use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Result;

static STOP: AtomicBool = AtomicBool::new(false);

/// Asks a run in progress to save and end (Ctrl-C).
pub fn stop() {
    STOP.store(true, Ordering::Relaxed);
}

pub(super) fn stopped() -> bool {
    STOP.load(Ordering::Relaxed)
}

/// [`stop`] was asked for amid work that can be cut short: what was finished is kept, nothing is half written.
#[derive(Debug, thiserror::Error)]
#[error("stopped; what was finished is kept; run the same command to resume")]
pub struct Stopped;

/// Called again and again by work that takes long.
///
/// # Errors
/// [`Stopped`] once [`stop`] was called.
pub fn go_on() -> Result<()> {
    if stopped() { Err(Stopped.into()) } else { Ok(()) }
}
