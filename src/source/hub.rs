//! Models that Hugging Face's tools downloaded: `owner/name` in the local cache. Nothing is downloaded here.

use std::path::{Path, PathBuf};

/// The folder of the newest local snapshot of `owner/name`, when it is in the cache.
pub fn cached(id: &str) -> Option<PathBuf> {
    caches().iter().find_map(|cache| snapshot(cache, id))
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

fn snapshot(cache: &Path, id: &str) -> Option<PathBuf> {
    let repository = cache.join(format!("models--{}", id.replace('/', "--")));
    let snapshots = repository.join("snapshots");
    let main = std::fs::read_to_string(repository.join("refs/main")).ok();
    // The name comes from a file: only a plain one is followed.
    let main = main.map(|text| text.trim().to_owned()).filter(|name| name.chars().all(|c| c.is_ascii_alphanumeric()));
    if let Some(folder) = main.filter(|name| !name.is_empty()).map(|name| snapshots.join(name)).filter(|f| f.is_dir()) {
        return Some(folder);
    }
    let folders = std::fs::read_dir(snapshots).ok()?.flatten().map(|entry| entry.path()).filter(|path| path.is_dir());
    folders.max_by_key(|path| path.metadata().and_then(|metadata| metadata.modified()).ok())
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
    }

    #[test]
    fn the_snapshot_that_main_names_is_taken() {
        let cache = tempfile::tempdir().unwrap();
        let repository = cache.path().join("models--owner--name");
        for hash in ["aaa", "bbb"] {
            std::fs::create_dir_all(repository.join("snapshots").join(hash)).unwrap();
        }
        std::fs::create_dir(repository.join("refs")).unwrap();
        std::fs::write(repository.join("refs/main"), "aaa\n").unwrap();
        assert_eq!(snapshot(cache.path(), "owner/name"), Some(repository.join("snapshots/aaa")));
        std::fs::write(repository.join("refs/main"), "../../elsewhere").unwrap();
        assert!(snapshot(cache.path(), "owner/name").unwrap().starts_with(repository.join("snapshots")));
        assert_eq!(snapshot(cache.path(), "owner/other"), None);
    }
}
