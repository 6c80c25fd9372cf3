//! The mistake of a user who says something of a model that does not go with it.

/// An option or key that does not go with the model that it is given with.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Misused(pub String);
