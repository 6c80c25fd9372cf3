//! What is not compiled here.

use anyhow::Result;

/// Something that is not compiled here, though Apple's compiler may do it.
#[derive(Debug, thiserror::Error)]
#[error(
    "{0}, which Palettist does not compile; on a Mac `xcrun coremlcompiler compile` does, as a bundle's compile.sh runs it"
)]
pub struct Unsupported(String);

/// Says what is not compiled here.
pub fn unsupported<T>(what: &str) -> Result<T> {
    Err(Unsupported(what.to_owned()).into())
}
