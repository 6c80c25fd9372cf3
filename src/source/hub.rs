//! Models that Hugging Face's tools downloaded: `owner/name` or `owner/name@revision` in the local cache. Nothing is
//! downloaded here.
//!
//! A repository is the folder `models--owner--name` of a cache: `snapshots/COMMIT` holds the files of a commit as links
//! into `blobs`, `refs/NAME` the commit of a branch or tag.

use std::path::{Component, Path, PathBuf};

use anyhow::{Result, bail};

use crate::terminal::note;

/// Splits `owner/name@revision`; the second is what follows the `@`.
pub fn split(text: &str) -> (&str, Option<&str>) {
    text.split_once('@').map_or((text, None), |(id, revision)| (id, Some(revision)))
}

/// Whether a text reads as a hub id: one slash, between names of letters, digits, `-`, `_` and `.`.
pub fn is_id(text: &str) -> bool {
    let name = |part: &str| {
        let mut characters = part.chars();
        characters.next().is_some_and(|c| c.is_ascii_alphanumeric() || c == '_')
            && characters.all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
    };
    text.split_once('/').is_some_and(|(owner, model)| name(owner) && name(model))
}

/// The folder of a snapshot of `id` in the local cache: that of `revision` (a branch, a tag, a commit or the beginning of
/// one), or without one the first that `whole` takes: the one of `main`, else the newest. Where none is whole, it is that
/// of `main` or the newest, so that what is missing there is told. `None` when the cache has nothing of this id.
///
/// # Errors
/// A revision that the cache does not have.
pub fn cached(id: &str, revision: Option<&str>, whole: impl Fn(&Path) -> Result<()>) -> Result<Option<PathBuf>> {
    cached_in(&caches(), id, revision, whole)
}

fn cached_in(
    caches: &[PathBuf],
    id: &str,
    revision: Option<&str>,
    whole: impl Fn(&Path) -> Result<()>,
) -> Result<Option<PathBuf>> {
    let repositories: Vec<PathBuf> =
        caches.iter().map(|cache| repository(cache, id)).filter(|folder| folder.is_dir()).collect();
    if let Some(revision) = revision {
        let found = repositories.iter().find_map(|repository| of_revision(repository, revision));
        if found.is_none() && !repositories.is_empty() {
            bail!(
                "the local Hugging Face cache has {id}, and not its revision {revision}; fetch it with: hf download {id} \
                 --revision {revision} --exclude '*.ckpt' '*.bin'"
            );
        }
        return Ok(found);
    }
    let snapshots: Vec<PathBuf> = repositories.iter().flat_map(|repository| snapshots(repository)).collect();
    let Some(first) = snapshots.first() else { return Ok(None) };
    let name = |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let newest = repositories.iter().find_map(|repository| reference(repository, "main"));
    if let Some(newest) = newest.filter(|newest| !snapshots.iter().any(|snapshot| name(snapshot) == *newest)) {
        note(format_args!(
            "{id}: the newest snapshot, {newest}, is not in the cache (an update that was cut off); the older {} is used",
            name(first)
        ));
    }
    let Err(reason) = whole(first) else { return Ok(Some(first.clone())) };
    let Some(other) = snapshots[1..].iter().find(|snapshot| whole(snapshot).is_ok()) else {
        return Ok(Some(first.clone()));
    };
    note(format_args!(
        "{id}: the snapshot {} in the cache is not whole ({reason:#}); the older {} is used",
        name(first),
        name(other)
    ));
    Ok(Some(other.clone()))
}

fn repository(cache: &Path, id: &str) -> PathBuf {
    cache.join(format!("models--{}", id.replace('/', "--")))
}

/// The commit that a branch or tag stands for.
fn reference(repository: &Path, name: &str) -> Option<String> {
    // The name comes from the command line or a config: it stays within the folder.
    let plain = Path::new(name).components().all(|part| matches!(part, Component::Normal(_)));
    let text = std::fs::read_to_string(repository.join("refs").join(Some(name).filter(|_| plain)?)).ok()?;
    // The commit comes from a file: only a plain one is followed.
    let commit = text.trim();
    (!commit.is_empty() && commit.chars().all(|c| c.is_ascii_alphanumeric())).then(|| commit.to_owned())
}

fn of_revision(repository: &Path, revision: &str) -> Option<PathBuf> {
    let snapshots = repository.join("snapshots");
    if let Some(commit) = reference(repository, revision) {
        return Some(snapshots.join(commit)).filter(|folder| folder.is_dir());
    }
    // As git does, the beginning of a commit stands for it where there is one such.
    let hexadecimal = revision.len() >= 4 && revision.chars().all(|c| c.is_ascii_alphanumeric());
    let folders = std::fs::read_dir(snapshots).ok()?.flatten().map(|entry| entry.path()).filter(|path| path.is_dir());
    let mut found = folders.filter(|path| {
        hexadecimal && path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(revision))
    });
    let first = found.next()?;
    found.next().is_none().then_some(first)
}

/// All snapshots: that of `main`, then the others, the newest first.
fn snapshots(repository: &Path) -> Vec<PathBuf> {
    let folder = repository.join("snapshots");
    let entries = std::fs::read_dir(&folder).map(|entries| entries.flatten().map(|entry| entry.path()).collect());
    let mut folders: Vec<PathBuf> = entries.unwrap_or_default();
    folders.retain(|path| path.is_dir());
    let main = reference(repository, "main").map(|commit| folder.join(commit));
    let modified = |path: &Path| path.metadata().and_then(|metadata| metadata.modified()).ok();
    folders.sort_by_key(|path| (main.as_ref() == Some(path), modified(path)));
    folders.reverse();
    folders
}

/// Where `huggingface_hub` keeps its downloads, by its own environment variables.
fn caches() -> Vec<PathBuf> {
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let home = std::env::home_dir().map(|home| home.join(".cache"));
    [
        variable("HF_HUB_CACHE"),
        variable("HUGGINGFACE_HUB_CACHE"),
        variable("HF_HOME").map(|folder| folder.join("hub")),
        variable("XDG_CACHE_HOME").or(home).map(|folder| folder.join("huggingface/hub")),
    ]
    .into_iter()
    .flatten()
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_told_from_paths() {
        for id in ["runwayml/stable-diffusion-v1-5", "nota-ai/bk-sdm-tiny", "a/b.c"] {
            assert!(is_id(id), "{id}");
        }
        for path in ["model", "a/b/c", "./model", "../x", "/x", "a/", "a/../b", "C:\\x"] {
            assert!(!is_id(path), "{path}");
        }
        assert_eq!(split("a/b@v1.0"), ("a/b", Some("v1.0")));
    }

    /// A cache with these snapshots of owner/name, the later the newer, each with a file but the empty ones.
    fn cache(snapshots: &[(&str, bool)]) -> (tempfile::TempDir, PathBuf) {
        let cache = tempfile::tempdir().unwrap();
        let repository = repository(cache.path(), "owner/name");
        std::fs::create_dir_all(repository.join("refs/refs/pr")).unwrap();
        for (age, (commit, whole)) in snapshots.iter().rev().enumerate() {
            let folder = repository.join("snapshots").join(commit);
            std::fs::create_dir_all(&folder).unwrap();
            if *whole {
                std::fs::write(folder.join("whole"), "").unwrap();
            }
            let time = std::time::SystemTime::now() - std::time::Duration::from_secs(100 * age as u64);
            std::fs::File::open(&folder).unwrap().set_modified(time).unwrap();
        }
        (cache, repository)
    }

    fn found(cache: &Path, revision: Option<&str>) -> Result<Option<String>> {
        let whole = |folder: &Path| match folder.join("whole").is_file() {
            true => Ok(()),
            false => bail!("a file is missing"),
        };
        let folder = cached_in(&[cache.to_owned()], "owner/name", revision, whole)?;
        Ok(folder.map(|folder| folder.file_name().unwrap().to_str().unwrap().to_owned()))
    }

    #[test]
    fn the_snapshot_of_main_comes_first_and_an_empty_one_hides_no_other() {
        let (cache, repository) = cache(&[("aaaa1", true), ("bbbb2", true), ("cccc3", false)]);
        let of = |revision: Option<&str>| found(cache.path(), revision).unwrap().unwrap();
        // Without `main`: the newest that is whole.
        assert_eq!(of(None), "bbbb2");
        std::fs::write(repository.join("refs/main"), "aaaa1\n").unwrap();
        assert_eq!(of(None), "aaaa1");
        std::fs::write(repository.join("refs/main"), "cccc3").unwrap();
        assert_eq!(of(None), "bbbb2");
        std::fs::write(repository.join("refs/main"), "../../elsewhere").unwrap();
        assert_eq!(of(None), "bbbb2");
        let other = cached_in(&[cache.path().to_owned()], "owner/other", None, |_| Ok(())).unwrap();
        assert_eq!(other, None);
    }

    #[test]
    fn nothing_whole_is_told_of_the_newest() {
        let (cache, _) = cache(&[("aaaa1", false), ("bbbb2", false)]);
        assert_eq!(found(cache.path(), None).unwrap().unwrap(), "bbbb2");
    }

    #[test]
    fn revisions_are_branches_tags_and_commits() {
        let (cache, repository) = cache(&[("aaaa1", true), ("aaaa2", true), ("bbbb2", true)]);
        std::fs::write(repository.join("refs/v1.0"), "aaaa1").unwrap();
        std::fs::write(repository.join("refs/refs/pr/3"), "bbbb2").unwrap();
        std::fs::write(repository.join("secret"), "bbbb2").unwrap();
        let of = |revision: &str| found(cache.path(), Some(revision)).ok().flatten();
        for (revision, commit) in [("v1.0", "aaaa1"), ("refs/pr/3", "bbbb2"), ("aaaa2", "aaaa2"), ("bbbb", "bbbb2")] {
            assert_eq!(of(revision).as_deref(), Some(commit), "{revision}");
        }
        for revision in ["aaaa", "v2", "../secret", "", "."] {
            assert_eq!(of(revision), None, "{revision}");
        }
        let error = found(cache.path(), Some("v2")).unwrap_err().to_string();
        assert!(error.contains("v2") && error.contains("hf download owner/name --revision v2"), "{error}");
    }
}
