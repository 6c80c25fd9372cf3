//! The configs that are shipped, and `key=value` on top of them.

use std::path::{Path, PathBuf};

use palettist::config::{self, Config, Mode};
use serde::Deserialize;

fn shipped() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs");
    let mut files: Vec<PathBuf> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|file| file.extension().is_some_and(|extension| extension == "toml"));
    // It has every key, also those that do nothing beside the others; it has tests of its own.
    files.retain(|file| !file.ends_with("reference.toml"));
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

/// What is generated from the schema is what lies here.
#[test]
fn the_key_reference_and_the_reference_config_are_current() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    for (file, format, text) in [
        ("docs/config.md", "markdown", config::key_reference()),
        ("configs/reference.toml", "toml", config::reference_config()),
    ] {
        let written = std::fs::read_to_string(root.join(file)).unwrap();
        assert!(written == text, "{file} is not current: palettist schema --format {format} > {file}");
    }
}

/// The reference config is the defaults, as it stands and with all its lines uncommented; its examples are of the right type.
#[test]
fn the_reference_config_is_the_defaults() {
    let text = config::reference_config();
    let read = |text: &str| config::parse(text, "reference", &[]).unwrap_or_else(|error| panic!("{error}"));
    let least = "model.pretrained_model_name_or_path = \"models/stable-diffusion-v1-5\"\ndata.train_data_dir = \"data/pictures\"";
    assert_eq!(read(&text), read(least));
    let is_line = |line: &str, start: &str| {
        let key = line.strip_prefix(start).and_then(|rest| rest.split_once(" = ")).map(|(key, _)| key);
        key.is_some_and(|key| {
            !key.is_empty() && key.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
        })
    };
    let uncommented: String = text
        .lines()
        .map(|line| if is_line(line, "#") { &line[1..] } else { line })
        .flat_map(|line| [line, "\n"])
        .collect();
    let mut whole = read(&uncommented).config;
    assert_eq!(
        whole.data.dreambooth.take(),
        Some(config::Dreambooth::default()),
        "a section that the defaults do without"
    );
    assert_eq!(whole, read(least).config);
    let mut examples = 0;
    for (at, line) in text.lines().enumerate().filter(|(_, line)| is_line(line, "# ")) {
        let section = text.lines().take(at).filter(|line| line.starts_with('[')).last().unwrap_or_default();
        let table: toml::Table = format!("{section}\n{}", &line[2..]).parse().unwrap();
        Config::deserialize(table).unwrap_or_else(|error| panic!("{line}: {error}"));
        examples += 1;
    }
    assert!(examples > 10, "{examples}");
}

/// Editors find in the schema what the program reads.
#[test]
fn the_json_schema_has_every_shipped_key() {
    let schema: serde_json::Value = serde_json::from_str(&config::json_schema()).unwrap();
    fn check(table: &toml::Table, schema: &serde_json::Value, file: &Path) {
        for (key, value) in table {
            let known = &schema["properties"][key];
            assert!(known.is_object(), "{}: {key}", file.display());
            if let toml::Value::Table(inner) = value {
                check(inner, known, file);
            }
        }
        assert_eq!(schema["additionalProperties"], false);
    }
    for file in shipped() {
        check(&std::fs::read_to_string(&file).unwrap().parse().unwrap(), &schema, &file);
    }
    assert_eq!(schema["properties"]["train"]["properties"]["max_train_steps"]["default"], 800);
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
