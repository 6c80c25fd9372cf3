//! From text to [`Config`], gathering every mistake.
//!
//! The text is walked as a tree with spans. Each leaf (a key whose value is not a table) is looked up among the keys
//! that exist and then deserialised alone, which is possible because every key has a default: so one wrong value
//! does not hide the next.

use std::ops::Range;

use toml::de::{DeTable, DeValue};
use toml::{Spanned, Table, Value};

use super::{Config, Error, Mode, Problem, Recipe, defaults, rules};

/// A key with its value, and where it was written.
struct Leaf {
    path: Vec<String>,
    value: Value,
    place: String,
}

/// What has been read so far.
struct Reader<'a> {
    text: &'a str,
    file: &'a str,
    known: Table,
    leaves: Vec<Leaf>,
    recipe: Option<Recipe>,
    problems: Vec<Problem>,
}

pub(super) fn read(text: &str, file: &str, overrides: &[String]) -> Result<Config, Error> {
    let known = Table::try_from(defaults::every_key()).expect("the schema has a TOML form");
    let mut reader = Reader { text, file, known, leaves: Vec::new(), recipe: None, problems: Vec::new() };
    match (DeTable::parse(text), text.parse::<Table>()) {
        (Ok(spans), Ok(values)) => reader.table(&mut Vec::new(), spans.get_ref(), &values),
        (Err(error), _) | (_, Err(error)) => {
            let place = reader.place(error.span());
            reader.problem(place, format!("is not TOML here: {}", error.message().trim()));
        }
    }
    for text in overrides {
        reader.over(text);
    }
    reader.check_types();
    let mut problems = std::mem::take(&mut reader.problems);
    match reader.finish(!problems.is_empty()) {
        Ok(config) if problems.is_empty() => Ok(config),
        Ok(_) => Err(Error { problems }),
        Err(error) => {
            problems.extend(error.problems);
            Err(Error { problems })
        }
    }
}

impl Reader<'_> {
    fn place(&self, span: Option<Range<usize>>) -> String {
        place(self.text, self.file, span)
    }

    fn problem(&mut self, place: String, message: String) {
        self.problems.push(Problem { place, message });
    }

    /// Notes the leaves under one table. `spans` and `values` are the same table, read twice.
    fn table(&mut self, path: &mut Vec<String>, spans: &DeTable, values: &Table) {
        // In the order of the file, so that mistakes are too.
        let mut entries: Vec<_> = spans.iter().collect();
        entries.sort_by_key(|(key, _)| key.span().start);
        for (key, span) in entries {
            let name: &str = key.get_ref();
            path.push(name.to_string());
            let place = self.place(Some(key.span()));
            match (self.exists(path), span.get_ref(), &values[name]) {
                (Err(message), _, _) => self.problem(place, message),
                (Ok(true), DeValue::Table(inner), Value::Table(values)) => self.table(path, inner, values),
                (Ok(true), ..) => {
                    let message = format!("`{0}` is a table; write its keys under [{0}]", path.join("."));
                    self.problem(place, message);
                }
                (Ok(false), _, value) => {
                    let mut value = value.clone();
                    if let (DeValue::Array(spans), Value::Array(values)) = (span.get_ref(), &mut value) {
                        self.elements(path, spans, values);
                    }
                    self.leaves.push(Leaf { path: path.clone(), value, place })
                }
            }
            path.pop();
        }
    }

    /// Checks the keys of each table in an array of tables, and drops those that do not exist.
    fn elements(&mut self, path: &[String], spans: &[Spanned<DeValue>], values: &mut [Value]) {
        let Some(Value::Array(example)) = self.known(path) else { return };
        let Some(Value::Table(example)) = example.first().cloned() else { return };
        for (span, value) in spans.iter().zip(values) {
            let (DeValue::Table(spans), Value::Table(value)) = (span.get_ref(), value) else { continue };
            for key in spans.keys() {
                let name: &str = key.get_ref();
                if !example.contains_key(name) {
                    let place = self.place(Some(key.span()));
                    let hint = nearest(name, example.keys().map(String::as_str));
                    self.problem(place, format!("unknown key `{name}` in [[{}]]{hint}", path.join(".")));
                    value.remove(name);
                }
            }
        }
    }

    /// The value at `path` in a config that has every key.
    fn known(&self, path: &[String]) -> Option<&Value> {
        let (last, tables) = path.split_last()?;
        let mut table = &self.known;
        for name in tables {
            table = table.get(name)?.as_table()?;
        }
        table.get(last)
    }

    /// Whether a key is a table; an error with a suggestion if there is no such key.
    fn exists(&self, path: &[String]) -> Result<bool, String> {
        if let Some(value) = self.known(path) {
            return Ok(value.is_table());
        }
        let (name, parent) = path.split_last().expect("paths have at least one part");
        let siblings = if parent.is_empty() { Some(&self.known) } else { self.known(parent).and_then(Value::as_table) };
        let section = if parent.is_empty() { String::new() } else { format!(" in [{}]", parent.join(".")) };
        let elsewhere = leaves(&self.known, "")
            .into_iter()
            .map(|(key, _)| key)
            .filter(|key| key.rsplit('.').next() == Some(name))
            .min_by_key(|key| key.matches('.').count());
        let hint = match (SYNONYMS.iter().find(|(theirs, _)| theirs == name), elsewhere) {
            (Some((_, ours)), _) => format!("; here it is `{ours}`"),
            (None, Some(key)) => match key.rsplit_once('.') {
                Some((section, _)) => format!("; it belongs in [{section}]"),
                None => "; it belongs at the top, before the first [table]".to_string(),
            },
            (None, None) => nearest(name, siblings.into_iter().flat_map(|t| t.keys()).map(String::as_str)),
        };
        Err(format!("unknown key `{name}`{section}{hint}"))
    }

    /// Lays one `key=value` over the file.
    fn over(&mut self, text: &str) {
        let place = format!("`{text}` on the command line");
        let Some((key, value)) = text.split_once('=') else {
            return self.problem(place, "is not of the form key=value".to_string());
        };
        let path: Vec<String> = key.trim().split('.').map(str::to_string).collect();
        match self.exists(&path) {
            Err(message) => return self.problem(place, message),
            Ok(true) => return self.problem(place, format!("`{key}` is a table; give one of its keys, {key}.…=value")),
            Ok(false) => {}
        }
        // What is no TOML value (a path, a name, a prompt) is a string, so that a shell needs no second quotes.
        let value = match format!("value = {value}").parse::<Table>() {
            Ok(mut table) if table.len() == 1 => table.remove("value").expect("the only key"),
            _ => Value::String(value.trim().to_string()),
        };
        self.leaves.retain(|leaf| leaf.path != path);
        self.leaves.push(Leaf { path, value, place });
    }

    /// Deserialises each leaf alone, and drops those that are of another type.
    fn check_types(&mut self) {
        for leaf in std::mem::take(&mut self.leaves) {
            match table_of([&leaf]).try_into::<Config>() {
                Ok(_) => self.leaves.push(leaf),
                Err(error) => {
                    let message = format!("`{}`: {}", leaf.path.join("."), plain(error.message()));
                    self.problem(leaf.place, message);
                }
            }
        }
    }

    /// Adds the defaults that depend on other keys, deserialises the whole and checks what must fit together. With other
    /// mistakes `beside`, only of what is written: what is missing then may be misspelt or of a wrong type.
    fn finish(mut self, beside: bool) -> Result<Config, Error> {
        let mut first = self.deserialise()?;
        if let Some(path) = &first.palettize.recipe {
            self.recipe = Some(Recipe::read(path)?);
            first = self.deserialise()?;
        }
        if first.train.mode == Mode::Dreambooth {
            self.default("train.learning_rate", 1e-6);
            self.default("data.caption_dropout_rate", 0.0);
        }
        self.default("export.latent_h", first.data.resolution / 8);
        self.default("export.latent_w", first.data.resolution / 8);
        if first.palettize.needs_ios18().is_some() {
            self.default("export.min_deployment_target", "iOS18");
        }
        let rate = self.deserialise()?.train.learning_rate;
        self.default("train.text_encoder_lr", rate / 2.0);
        self.default("palettize.palette_learning_rate", rate);
        let mut config = self.deserialise()?;
        rules::fill_names(&mut config);
        let problems: Vec<Problem> = rules::broken(&config)
            .into_iter()
            .map(|(key, message)| {
                let written = self.leaves.iter().find(|leaf| leaf.path.join(".") == key);
                let place = written.map_or_else(|| self.file.to_string(), |leaf| leaf.place.clone());
                Problem { place, message: format!("`{key}` {message}") }
            })
            .filter(|problem| !beside || problem.place != self.file)
            .collect();
        if problems.is_empty() { Ok(config) } else { Err(Error { problems }) }
    }

    /// Sets a key that was not written.
    fn default(&mut self, key: &str, value: impl Into<Value>) {
        let path: Vec<String> = key.split('.').map(str::to_string).collect();
        if !self.leaves.iter().any(|leaf| leaf.path == path) {
            self.leaves.push(Leaf { path, value: value.into(), place: self.file.to_string() });
        }
    }

    /// The config of the leaves so far, with the layers of its recipe among its overrides.
    fn deserialise(&self) -> Result<Config, Error> {
        let mut config: Config = table_of(&self.leaves).try_into().map_err(|error: toml::de::Error| Error {
            problems: vec![Problem { place: self.file.to_string(), message: plain(error.message()) }],
        })?;
        if let Some(recipe) = &self.recipe {
            // Before the overrides of the config itself, so that these win.
            config.palettize.overrides.splice(0..0, recipe.overrides());
        }
        Ok(config)
    }
}

/// `file:line:column` of a span of `text`, counted from 1, columns in characters.
pub(super) fn place(text: &str, file: &str, span: Option<Range<usize>>) -> String {
    let start = span.map_or(text.len(), |span| span.start).min(text.len());
    let before = String::from_utf8_lossy(&text.as_bytes()[..start]);
    let line = before.matches('\n').count() + 1;
    let column = before.rsplit('\n').next().unwrap_or("").chars().count() + 1;
    format!("{file}:{line}:{column}")
}

/// The table that holds these leaves.
fn table_of<'a>(leaves: impl IntoIterator<Item = &'a Leaf>) -> Table {
    let mut root = Table::new();
    for leaf in leaves {
        let (last, parents) = leaf.path.split_last().expect("paths have at least one part");
        let mut table = &mut root;
        for name in parents {
            table = table
                .entry(name)
                .or_insert_with(|| Value::Table(Table::new()))
                .as_table_mut()
                .expect("only tables lie above leaves");
        }
        table.insert(last.clone(), leaf.value.clone());
    }
    root
}

/// All keys under a table, dotted, with their values.
pub(super) fn leaves(table: &Table, prefix: &str) -> Vec<(String, Value)> {
    let mut found = Vec::new();
    for (name, value) in table {
        match value {
            Value::Table(inner) => found.extend(leaves(inner, &format!("{prefix}{name}."))),
            _ => found.push((format!("{prefix}{name}"), value.clone())),
        }
    }
    found
}

/// `; did you mean …?`, or nothing if no name is near.
pub(super) fn nearest<'a>(name: &str, names: impl Iterator<Item = &'a str>) -> String {
    names
        .map(|known| (strsim::jaro_winkler(name, known), known))
        .filter(|(similarity, _)| *similarity > 0.75)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map_or_else(String::new, |(_, known)| format!("; did you mean `{known}`?"))
}

/// What other trainers call our keys.
const SYNONYMS: [(&str, &str); 12] = [
    ("snr_gamma", "train.min_snr_gamma"),
    ("max_steps", "train.max_train_steps"),
    ("steps", "train.max_train_steps"),
    ("batch_size", "train.train_batch_size"),
    ("lr", "train.learning_rate"),
    ("unet_lr", "train.learning_rate"),
    ("caption_ext", "data.caption_extension"),
    ("instance_dir", "data.dreambooth.instance_data_dir"),
    ("sample_every", "sample.sample_every_n_steps"),
    ("save_every", "checkpoint.checkpointing_steps"),
    ("max_step_saves_to_keep", "checkpoint.checkpoints_total_limit"),
    ("bits", "palettize.n_bits"),
];

/// serde's words in a user's.
fn plain(message: &str) -> String {
    let message = message.lines().next().unwrap_or_default().trim();
    let message = message.strip_prefix("invalid type: ").map_or(message.to_string(), |rest| format!("is {rest}"));
    let message = message.strip_prefix("invalid value: ").map_or(message.clone(), |rest| format!("is {rest}"));
    let message = message.strip_prefix("unknown variant ").map_or(message.clone(), |rest| format!("is {rest}"));
    let mut message = message;
    for (theirs, ours) in [
        ("expected f64", "expected a number"),
        ("expected u64", "expected a whole number of at least 0"),
        ("expected u32", "expected a whole number of at least 0"),
        ("expected usize", "expected a whole number of at least 0"),
        ("expected i64", "expected a whole number"),
        ("expected a boolean", "expected true or false"),
        ("expected a sequence", "expected a list, as in [\"…\"]"),
        ("expected path string", "expected a path in quotes"),
        ("expected a string", "expected text in quotes"),
    ] {
        message = message.replace(theirs, ours);
    }
    message
}
