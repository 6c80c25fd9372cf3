//! From text to [`Config`], gathering every mistake.
//!
//! The text is walked as a tree with spans. Each leaf (a key whose value is not a table) is looked up among the keys
//! that exist and then deserialised alone, which is possible because every key has a default: so one wrong value
//! does not hide the next. A key that does not exist, but surely means one that does, is read as that one, so that it hides
//! no mistake either.

use std::collections::BTreeSet;

use serde::Deserialize;
use toml::de::{DeTable, DeValue, ValueDeserializer};
use toml::{Spanned, Table, Value};

use super::findings::{self, Finding};
use super::unknown::{Unknown, nearest, unknown};
use super::values::{default, find, mistyped, plain, values};
use super::{Config, Error, Loaded, Mode, Problem, Recipe, TeacherChoice, known, rules, syntax};

/// Whether keys without effect are looked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Effects {
    Checked,
    Ignored,
}

/// A key with its value, and where it was written.
#[derive(Clone)]
struct Leaf {
    path: Vec<String>,
    value: Value,
    place: String,
}

/// What has been read so far.
struct Reader<'a> {
    text: &'a str,
    file: &'a str,
    effects: Effects,
    /// Lines that are not TOML.
    broken: BTreeSet<usize>,
    leaves: Vec<Leaf>,
    /// Keys whose values can't be read: what is said of them otherwise may be due to that.
    dropped: Vec<String>,
    /// Whether keys may be there that have not been found.
    partial: bool,
    problems: Vec<Problem>,
}

pub(super) fn read(text: &str, file: &str, overrides: &[String], effects: Effects) -> Result<Loaded, Error> {
    let mut reader = Reader {
        text,
        file,
        effects,
        broken: BTreeSet::new(),
        leaves: Vec::new(),
        dropped: Vec::new(),
        partial: false,
        problems: Vec::new(),
    };
    let (spans, errors) = DeTable::parse_recoverable(text);
    let (problems, lines) = syntax::problems(text, file, &errors);
    reader.partial = !problems.is_empty();
    reader.problems = problems;
    if let Some(lines) = lines {
        reader.broken = lines;
        reader.table(&mut Vec::new(), spans.get_ref());
    }
    for text in overrides {
        reader.over(text);
    }
    reader.check_types();
    reader.check_paths();
    reader.finish()
}

impl Reader<'_> {
    fn place(&self, span: std::ops::Range<usize>) -> String {
        syntax::place(self.text, self.file, Some(span))
    }

    fn problem(&mut self, place: String, message: String) {
        self.problems.push(Problem { place, message });
    }

    /// Notes the leaves under one table, which is that at `path` of the schema.
    fn table(&mut self, path: &mut Vec<String>, spans: &DeTable) {
        // In the order of the file, so that mistakes are too.
        let mut entries: Vec<_> = spans.iter().collect();
        entries.sort_by_key(|(key, _)| key.span().start);
        for (key, span) in entries {
            let at = key.span();
            path.push(key.get_ref().to_string());
            if self.broken.contains(&syntax::line_of(self.text, at.start)) && !span.get_ref().is_table() {
                self.dropped.push(path.join("."));
            } else {
                let place = self.place(at);
                self.entry(path.clone(), span, place);
            }
            path.pop();
        }
    }

    /// Notes what is written at `path`.
    fn entry(&mut self, mut path: Vec<String>, span: &Spanned<DeValue>, place: String) {
        match (self.exists(&path), span.get_ref()) {
            (Err(Unknown { message, meant }), value) => {
                self.problem(place.clone(), message);
                // A misspelt key hides no mistake in its value.
                let Some(meant) = meant else { return };
                let is_table = known::is_table(&meant);
                if value.is_table() == is_table && (is_table || self.is_free(&meant)) {
                    self.entry(meant, span, place);
                }
            }
            (Ok(true), DeValue::Table(inner)) => self.table(&mut path, inner),
            (Ok(true), _) => {
                let key = path.join(".");
                self.problem(place, format!("`{key}` is a table; write its keys under [{key}]"));
                self.dropped.push(key);
            }
            (Ok(false), value) => {
                let key = path.join(".");
                let is_list = matches!(known::find(&path).map(known::kind), Some(known::Kind::Tables(_)));
                if value.is_table() {
                    let hint = if is_list {
                        format!("is a list of tables; write [[{key}]]")
                    } else {
                        "is a table, expected a value".into()
                    };
                    self.problem(place, format!("`{key}` {hint}"));
                    return self.dropped.push(key);
                }
                match Value::deserialize(ValueDeserializer::from(span.clone())) {
                    Ok(mut value) => {
                        if let (DeValue::Array(spans), Value::Array(values)) = (span.get_ref(), &mut value) {
                            self.elements(&path, spans, values);
                        }
                        // A key that was meant before gives way to the one that is written.
                        self.leaves.retain(|leaf| leaf.path != path);
                        self.leaves.push(Leaf { path, value, place });
                    }
                    Err(error) => {
                        self.problem(place, format!("`{key}`: {}", plain(error.message())));
                        self.dropped.push(key);
                    }
                }
            }
        }
    }

    /// Whether no value of this key is known yet.
    fn is_free(&self, path: &[String]) -> bool {
        !self.leaves.iter().any(|leaf| leaf.path == path)
    }

    /// Checks the keys of each table in an array of tables, and drops those that do not exist.
    fn elements(&mut self, path: &[String], spans: &[Spanned<DeValue>], values: &mut [Value]) {
        let Some(known::Kind::Tables(keys)) = known::find(path).map(known::kind) else { return };
        for (span, value) in spans.iter().zip(values) {
            let (DeValue::Table(spans), Value::Table(value)) = (span.get_ref(), value) else { continue };
            for key in spans.keys() {
                let name: &str = key.get_ref();
                if !keys.contains_key(name) {
                    let place = self.place(key.span());
                    let hint = nearest(name, keys.keys().map(String::as_str));
                    self.problem(place, format!("unknown key `{name}` in [[{}]]{hint}", path.join(".")));
                    value.remove(name);
                }
            }
        }
    }

    /// Whether a key is a table; what to say of it if there is no such key.
    fn exists(&self, path: &[String]) -> Result<bool, Unknown> {
        for length in 1..=path.len() {
            match known::find(&path[..length]) {
                None => return Err(unknown(&path[..length])),
                Some(_) if length < path.len() && !known::is_table(&path[..length]) => {
                    let message = format!("`{}` has a value, and no keys of its own", path[..length].join("."));
                    return Err(Unknown { message, meant: None });
                }
                Some(_) => {}
            }
        }
        Ok(known::is_table(path))
    }

    /// Lays one `key=value` over the file.
    fn over(&mut self, text: &str) {
        let place = format!("`{text}` on the command line");
        let Some((key, value)) = text.split_once('=') else {
            return self.problem(place, "is not of the form key=value".to_string());
        };
        let mut path: Vec<String> = key.trim().split('.').map(str::to_string).collect();
        match self.exists(&path) {
            Err(Unknown { message, meant }) => {
                self.problem(place.clone(), message);
                match meant {
                    Some(meant) if !known::is_table(&meant) => path = meant,
                    _ => return,
                }
            }
            Ok(true) => return self.problem(place, format!("`{key}` is a table; give one of its keys, {key}.…=value")),
            Ok(false) => {}
        }
        // What is no TOML value (a path, a name, a prompt) is a string, so that a shell needs no second quotes.
        let value = match format!("value = {value}").parse::<Table>() {
            Ok(mut table) if table.len() == 1 => table.remove("value").expect("the only key"),
            _ => Value::String(value.trim().to_string()),
        };
        let key = path.join(".");
        self.dropped.retain(|dropped| *dropped != key);
        self.leaves.retain(|leaf| leaf.path != path);
        self.leaves.push(Leaf { path, value, place });
    }

    /// Deserialises each leaf alone, and drops those that are of another type.
    fn check_types(&mut self) {
        for leaf in std::mem::take(&mut self.leaves) {
            match table_of([&leaf]).try_into::<Config>() {
                Ok(_) => self.leaves.push(leaf),
                Err(error) => {
                    let key = leaf.path.join(".");
                    let message = format!("`{key}`: {}", mistyped(&key, &leaf.value, &error));
                    self.problem(leaf.place, message);
                    self.dropped.push(key);
                }
            }
        }
    }

    /// Refuses control characters in paths: `"C:\temp"` is `C:`, a tab, and `emp`.
    fn check_paths(&mut self) {
        let mut wrong = Vec::new();
        for leaf in &self.leaves {
            let key = leaf.path.join(".");
            let is_path = key == "output_dir"
                || key.ends_with("_dir")
                || key.ends_with("_path")
                || ["palettize.recipe", "palettize.palettes"].contains(&key.as_str());
            let text = leaf.value.as_str().unwrap_or_default();
            if is_path && text.chars().any(char::is_control) {
                let message = format!(
                    "`{key}` is {text:?}, with control characters: in \"…\" a backslash begins an escape; write the path in \
                     '…', as in 'C:\\Users\\me'"
                );
                wrong.push(Problem { place: leaf.place.clone(), message });
            }
        }
        self.problems.extend(wrong);
    }

    /// Adds the defaults that depend on other keys, checks what must fit together and what has an effect.
    fn finish(mut self) -> Result<Loaded, Error> {
        let mut recipe = None;
        let first = self.deserialise(&self.leaves, None)?;
        // A path that has been refused is not opened.
        let path = first.palettize.recipe.as_deref().filter(|path| !path.to_string_lossy().contains(char::is_control));
        if let Some(path) = path {
            match Recipe::read(path) {
                Ok(read) => recipe = Some(read),
                Err(Error { problems }) => self.problems.extend(problems),
            }
        }
        let config = self.deserialise(&self.leaves, recipe.as_ref())?;
        let broken = rules::broken(&config);
        let told: Vec<Problem> = broken
            .iter()
            .filter(|(key, _)| !self.is_in_doubt(key) && !self.follows_from(key, &broken))
            .map(|(key, message)| self.about(key, format!("`{key}` {message}")))
            .collect();
        self.problems.extend(told);
        let mut warnings = Vec::new();
        if self.effects == Effects::Checked && !self.partial && !self.dropped.iter().any(|key| is_switch(key)) {
            let is_broken = |key: &str| broken.iter().any(|(wrong, _)| wrong == key);
            warnings = self.without_effect(&config, recipe.as_ref(), is_broken)?;
        }
        if self.problems.is_empty() { Ok(Loaded { config, warnings }) } else { Err(Error { problems: self.problems }) }
    }

    /// Whether a key that nobody wrote has its value from one that breaks a rule itself.
    fn follows_from(&self, key: &str, broken: &[(String, String)]) -> bool {
        let origin = DERIVED.iter().find(|(derived, _)| *derived == key).map(|(_, origin)| *origin);
        self.leaf(key).is_none() && origin.is_some_and(|origin| broken.iter().any(|(key, _)| key == origin))
    }

    /// A problem with a key, where it is written.
    fn about(&self, key: &str, message: String) -> Problem {
        let place = self.leaf(key).map_or_else(|| self.file.to_string(), |leaf| leaf.place.clone());
        Problem { place, message }
    }

    fn leaf(&self, key: &str) -> Option<&Leaf> {
        self.leaves.iter().find(|leaf| leaf.path.join(".") == key)
    }

    /// Whether a rule about a key that is not written may be broken only because something can't be read.
    fn is_in_doubt(&self, key: &str) -> bool {
        let within = |a: &str, b: &str| a == b || a.strip_prefix(b).is_some_and(|rest| rest.starts_with('.'));
        let related = |dropped: &String| is_switch(dropped) || within(key, dropped) || within(dropped, key);
        self.leaf(key).is_none() && (self.partial || self.dropped.iter().any(related))
    }

    /// Notes the written keys that have no effect and are refused for that, and gives the warnings of the others.
    fn without_effect(
        &mut self,
        config: &Config,
        recipe: Option<&Recipe>,
        is_broken: impl Fn(&str) -> bool,
    ) -> Result<Vec<Problem>, Error> {
        let (own, defaults) = (values(config), values(&self.deserialise(&[], None)?));
        // A key whose default depends on other keys is compared with the default that follows from those.
        let is_default = |key: &str| {
            let others: Vec<Leaf> = self.leaves.iter().filter(|leaf| leaf.path.join(".") != key).cloned().collect();
            let value = find(&own, key);
            let dependent =
                || self.deserialise(&others, recipe).is_ok_and(|without| find(&values(&without), key) == value);
            find(&defaults, key) == value || dependent()
        };
        let written = |key: &str| self.leaf(key).is_some();
        let findings = findings::findings(config, written, is_default);
        let mut groups: Vec<Vec<Finding>> = Vec::new();
        for finding in findings.into_iter().filter(|finding| !is_broken(finding.key)) {
            match groups.iter_mut().find(|group| group[0].why == finding.why && group[0].refused == finding.refused) {
                Some(group) => group.push(finding),
                None => groups.push(vec![finding]),
            }
        }
        let mut warnings = Vec::new();
        for group in groups {
            let keys: Vec<&str> = group.iter().map(|finding| finding.key).collect();
            let problem = self.about(keys[0], findings::message(&keys, &group[0].why, group[0].verdict));
            if group[0].refused { self.problems.push(problem) } else { warnings.push(problem) }
        }
        Ok(warnings)
    }

    /// The config of these leaves, with the defaults that depend on other keys, and the layers of its recipe among its
    /// overrides.
    fn deserialise(&self, leaves: &[Leaf], recipe: Option<&Recipe>) -> Result<Config, Error> {
        let wrong = |error: toml::de::Error| Error {
            problems: vec![Problem { place: self.file.to_string(), message: plain(error.message()) }],
        };
        let mut table = table_of(leaves);
        let config = |table: &Table| -> Result<Config, Error> {
            let mut config: Config = table.clone().try_into().map_err(wrong)?;
            if let Some(recipe) = recipe {
                // Before the overrides of the config itself, so that these win.
                config.palettize.overrides.splice(0..0, recipe.overrides());
            }
            Ok(config)
        };
        let first = config(&table)?;
        if first.train.mode == Mode::Dreambooth {
            default(&mut table, "train.learning_rate", 1e-6);
            default(&mut table, "data.caption_dropout_rate", 0.0);
            // A run of an older version, which wrote no such key, asked its teacher about all.
            if self.effects == Effects::Checked && first.distill.teacher == TeacherChoice::Base {
                default(&mut table, "distill.on", "class");
            }
        }
        default(&mut table, "export.latent_h", first.data.resolution / 8);
        default(&mut table, "export.latent_w", first.data.resolution / 8);
        if first.train.train_text_encoder {
            let trained = ["unet", "text_encoder"].map(toml::Value::from);
            default(&mut table, "export.components", trained.to_vec());
        }
        if first.palettize.needs_ios18().is_some() || config(&table)?.quantized_needs_ios18().is_some() {
            default(&mut table, "export.min_deployment_target", "iOS18");
        }
        let rate = config(&table)?.train.learning_rate;
        default(&mut table, "train.text_encoder_lr", rate / 2.0);
        default(&mut table, "distill.personalize_learning_rate", rate);
        default(&mut table, "palettize.palette_learning_rate", rate);
        let mut config = config(&table)?;
        rules::fill_names(&mut config);
        Ok(config)
    }
}

/// Keys whose defaults follow from another key, with that.
const DERIVED: [(&str, &str); 7] = [
    ("data.cache_dir", "output_dir"),
    ("train.text_encoder_lr", "train.learning_rate"),
    ("palettize.palette_learning_rate", "train.learning_rate"),
    ("distill.personalize_learning_rate", "train.learning_rate"),
    ("export.latent_h", "data.resolution"),
    ("export.latent_w", "data.resolution"),
    ("train.autoencoder.scales", "data.resolution"),
];

/// Keys on which it depends what others mean.
fn is_switch(key: &str) -> bool {
    const SWITCHES: [&str; 14] = [
        "train.mode",
        "train.component",
        "train.train_text_encoder",
        "train.lr_scheduler",
        "train.use_ema",
        "train.max_train_steps",
        "data.dreambooth.with_prior_preservation",
        "data.dreambooth.prior_source",
        "palettize.enabled",
        "palettize.palettes",
        "palettize.granularity",
        "distill.enabled",
        "distill.on",
        "distill.teacher",
    ];
    SWITCHES.contains(&key)
}

/// The table that holds these leaves.
fn table_of<'a>(leaves: impl IntoIterator<Item = &'a Leaf>) -> Table {
    let mut root = Table::new();
    for leaf in leaves {
        default(&mut root, &leaf.path.join("."), leaf.value.clone());
    }
    root
}
