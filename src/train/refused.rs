//! What is said of a config that does not go with what is there.

use anyhow::Result;

/// The config does not go with the model, the machine or what is in its `output_dir`: it is for the user to change, as what
/// is wrong in the config by itself is.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Refused(pub String);

/// Refuses a config.
///
/// # Errors
/// Always: [`Refused`].
pub fn refused<T>(text: String) -> Result<T> {
    Err(Refused(text).into())
}
