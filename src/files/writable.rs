//! Whether files can be written to a folder, asked before the work that makes them.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use super::beside;

/// Something that is not a folder stands where a folder is needed.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct NotAFolder(String);

/// Checks that files can be written to `folder`, which need not be there yet: a file is made and removed in it, or in the
/// nearest folder above it.
///
/// # Errors
/// They can't: says why. [`NotAFolder`].
pub fn check_writable(folder: &Path) -> Result<()> {
    let shown = folder.display();
    let above = folder.ancestors().find(|folder| folder.as_os_str().is_empty() || folder.symlink_metadata().is_ok());
    let above = above.filter(|above| !above.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if !above.is_dir() {
        let what = if above.exists() { "is a file" } else { "is a link to nothing" };
        return Err(NotAFolder(format!("{shown} cannot be written: {} {what}", above.display())).into());
    }
    let probe = beside::beside(&above.join("palettist"), beside::PART);
    let made = beside::create(&probe).map(drop);
    let _ = fs::remove_file(&probe);
    made.with_context(|| format!("{shown} cannot be written"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_that_are_there_or_can_be_made_are_writable() {
        let root = tempfile::tempdir().unwrap();
        let path = |inner: &str| root.path().join(inner);
        fs::create_dir(path("a")).unwrap();
        fs::write(path("file"), "").unwrap();
        check_writable(&path("new/x")).unwrap();
        check_writable(&path("a")).unwrap();
        assert!(!path("new").exists() && fs::read_dir(path("a")).unwrap().count() == 0, "nothing is left");
        for inner in ["file/x", "file"] {
            let error = check_writable(&path(inner)).unwrap_err();
            assert!(error.is::<NotAFolder>() && error.to_string().ends_with("file is a file"), "{error:#}");
        }
    }
}
