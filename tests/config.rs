//! The configs that are shipped, and `key=value` on top of them.

use std::path::{Path, PathBuf};

use palettist::config::{self, Config, Mode};

fn shipped() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs");
    let mut files: Vec<PathBuf> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|file| file.extension().is_some_and(|extension| extension == "toml"));
    files.sort();
    assert!(files.len() >= 6, "{files:?}");
    files
}

fn load(file: &Path) -> Config {
    let loaded = config::load(file, &[]).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(loaded.warnings, [], "{}", file.display());
    loaded.config
}

#[test]
fn one_mistake_is_told_once() {
    let told = |change: &str| {
        let config = "model.pretrained_model_name_or_path = \"m\"\ndata.train_data_dir = \"d\"\n";
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("c.toml");
        std::fs::write(&path, config).unwrap();
        let error = palettist::config::load(&path, &[change.to_owned()]).err().unwrap().to_string();
        error.replace(&folder.path().display().to_string(), "")
    };
    for (change, expected) in [
        ("train.learning_rate=-1", "`train.learning_rate` is -1"),
        ("data.resolution=0", "`data.resolution` is 0"),
        ("output_dir=~/x", "`~` is no home folder here"),
        ("data.train_data_dir=~/x", "`~` is no home folder here"),
        (&format!("name={}", "n".repeat(161)), "has 161 bytes; 160 at most"),
        ("data.caption_extension=[]", "is empty"),
    ] {
        let told = told(change);
        assert!(told.contains(expected) && told.lines().count() == 1, "{change}: {told}");
    }
}

#[test]
fn every_shipped_config_is_right_and_survives_being_resolved() {
    for file in shipped() {
        let mut config = load(&file);
        let resolved = config.resolved_toml();
        // A recipe is among its overrides.
        config.palettize.recipe = None;
        let read = config::parse(&resolved, "resolved", &[]).unwrap();
        assert_eq!((read.config, read.warnings), (config, Vec::new()), "{}", file.display());
    }
}

/// Lines like `#seed = 42` claim a default: with the `#` gone nothing changes.
#[test]
fn defaults_in_comments_are_the_defaults() {
    let mut claims = 0;
    for file in shipped() {
        let text = std::fs::read_to_string(&file).unwrap();
        let is_claim = |line: &str| line.starts_with('#') && line[1..].starts_with(|c: char| c.is_ascii_lowercase());
        let mut written = String::new();
        for line in text.lines() {
            claims += usize::from(is_claim(line));
            written += if is_claim(line) { &line[1..] } else { line };
            written.push('\n');
        }
        let name = file.display().to_string();
        let config = config::parse(&written, &name, &[]).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(config.config, load(&file), "{name}");
    }
    assert!(claims > 50, "only {claims} defaults were checked");
}

#[test]
fn recipes_are_what_their_names_say() {
    for file in shipped() {
        let name = file.file_stem().unwrap().to_string_lossy().into_owned();
        let config = load(&file);
        for bits in [2, 4] {
            if name.ends_with(&format!("-{bits}bit")) {
                assert_eq!((config.palettize.enabled, config.palettize.n_bits), (true, bits), "{name}");
            }
        }
        if name.contains("dreambooth") {
            assert_eq!(config.train.mode, Mode::Dreambooth, "{name}");
        }
    }
}

#[test]
fn an_override_replaces_what_the_file_says() {
    let file = &shipped()[0];
    let overrides = ["train.max_train_steps=20".to_string(), "name=other".to_string(), "output_dir=x".to_string()];
    let config = config::load(file, &overrides).unwrap().config;
    assert_eq!((config.train.max_train_steps, config.output_dir.as_path()), (20, Path::new("x")));
    let expected = Config {
        name: "other".into(),
        output_dir: "x".into(),
        train: config::Train { max_train_steps: 20, ..load(file).train },
        data: config::Data { cache_dir: config.data.cache_dir.clone(), ..load(file).data },
        ..load(file)
    };
    assert_eq!(config, expected, "nothing else changes");
}

#[test]
fn a_config_that_is_not_there_is_named() {
    let error = config::load(Path::new("no/such.toml"), &[]).unwrap_err();
    assert!(error.to_string().starts_with("no/such.toml: can't be read: "), "{error}");
}
