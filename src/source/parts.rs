//! Parts of a model's folder that are copied as they are: tokenizers, schedulers, and what else a pipeline may have.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// The plain files of `model/name`. Links are followed within the model's folder and, as the Hugging Face cache is made
/// of such, from a snapshot into the `blobs` of its own repository; no other: a model folder of somebody else's could
/// else have any file of this machine copied, and passed on.
///
/// # Errors
/// The folder is missing; a link that leads elsewhere.
pub fn files_of(model: &Path, name: &str) -> Result<Vec<PathBuf>> {
    let from = model.join(name);
    let entries = fs::read_dir(&from).with_context(|| format!("cannot read {}", from.display()))?;
    let allowed = allowed(model)?;
    let mut files = Vec::new();
    for entry in entries {
        let path = entry.with_context(|| format!("cannot read {}", from.display()))?.path();
        if !path.is_file() {
            continue;
        }
        let real = path.canonicalize().with_context(|| format!("cannot read {}", path.display()))?;
        if !allowed.iter().any(|folder| real.starts_with(folder)) {
            bail!(
                "{} is a link to {}, out of the model's folder, and is not copied; put the file itself in its place",
                path.display(),
                real.display()
            );
        }
        files.push(path);
    }
    files.sort();
    Ok(files)
}

/// Where a link may lead: into the model's folder, or the blobs of the repository that it is a snapshot of.
fn allowed(model: &Path) -> Result<Vec<PathBuf>> {
    let model = model.canonicalize().with_context(|| format!("cannot read {}", model.display()))?;
    let snapshots = model.parent().filter(|folder| folder.file_name().is_some_and(|name| name == "snapshots"));
    let repository = snapshots.and_then(Path::parent);
    let repository = repository
        .filter(|folder| folder.file_name().is_some_and(|name| name.to_string_lossy().starts_with("models--")));
    let blobs = repository.and_then(|folder| folder.join("blobs").canonicalize().ok());
    Ok([Some(model), blobs].into_iter().flatten().collect())
}

/// Copies the plain files of `model/name` to `to/name`.
///
/// # Errors
/// As [`files_of`]; the disk is full.
pub fn copy(model: &Path, name: &str, to: &Path) -> Result<()> {
    let files = files_of(model, name)?;
    let to = to.join(name);
    fs::create_dir(&to).with_context(|| format!("cannot create {}", to.display()))?;
    for path in files {
        if let Some(name) = path.file_name() {
            fs::copy(&path, to.join(name)).with_context(|| format!("cannot copy {}", path.display()))?;
        }
    }
    Ok(())
}

#[cfg(all(test, unix))]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn links_stay_in_the_model_or_in_the_blobs_of_its_repository() {
        let folder = tempfile::tempdir().unwrap();
        let repository = folder.path().join("models--owner--name");
        let model = repository.join("snapshots/abc");
        fs::create_dir_all(model.join("tokenizer")).unwrap();
        fs::create_dir_all(repository.join("blobs")).unwrap();
        fs::write(repository.join("blobs/1234"), "blob").unwrap();
        fs::write(folder.path().join("secret"), "secret").unwrap();
        let link = model.join("tokenizer/vocab.json");
        symlink("../../../blobs/1234", &link).unwrap();
        copy(&model, "tokenizer", folder.path()).unwrap();
        assert_eq!(fs::read(folder.path().join("tokenizer/vocab.json")).unwrap(), b"blob");

        for target in ["../../../../secret", "../../../refs-main"] {
            fs::write(repository.join("refs-main"), "abc").unwrap();
            fs::remove_file(&link).unwrap();
            symlink(target, &link).unwrap();
            let error = files_of(&model, "tokenizer").unwrap_err().to_string();
            assert!(error.contains("vocab.json is a link to") && !error.contains('\n'), "{error}");
        }
        // A folder that is itself a link out.
        fs::create_dir(folder.path().join("outside")).unwrap();
        fs::write(folder.path().join("outside/secret"), "secret").unwrap();
        symlink(folder.path().join("outside"), model.join("scheduler")).unwrap();
        assert!(files_of(&model, "scheduler").is_err());
        // One that leads to another file of the model is followed; one that leads nowhere is no file.
        fs::remove_file(&link).unwrap();
        fs::write(model.join("vocab.json"), "own").unwrap();
        symlink("../vocab.json", &link).unwrap();
        symlink("nowhere", model.join("tokenizer/none")).unwrap();
        assert_eq!(files_of(&model, "tokenizer").unwrap(), [link]);
    }
}
