//! Values in tables by their dotted keys, and what is wrong with one that can't be read.

use toml::{Table, Value};

use super::Config;
use super::unknown::nearest;

/// All values of a config.
pub(super) fn values(config: &Config) -> Table {
    Table::try_from(config).expect("the schema has a TOML form")
}

/// The value at a dotted key.
pub(super) fn find<'t>(table: &'t Table, key: &str) -> Option<&'t Value> {
    match key.split_once('.') {
        Some((first, rest)) => find(table.get(first)?.as_table()?, rest),
        None => table.get(key),
    }
}

/// Sets a key that is not there.
pub(super) fn default(table: &mut Table, key: &str, value: impl Into<Value>) {
    match key.split_once('.') {
        Some((first, rest)) => {
            if let Some(inner) = table.entry(first).or_insert_with(|| Value::Table(Table::new())).as_table_mut() {
                default(inner, rest, value);
            }
        }
        None => {
            table.entry(key).or_insert_with(|| value.into());
        }
    }
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

/// What is wrong with the value of a key, in a user's words.
pub(super) fn mistyped(key: &str, value: &Value, error: &toml::de::Error) -> String {
    // An enum tells its words when it is given another.
    let mut probe = Table::new();
    default(&mut probe, key, "\u{0}");
    let words = match probe.try_into::<Config>() {
        Err(error) if error.message().starts_with("unknown variant") => error
            .message()
            .split_once("expected ")
            .map(|(_, words)| words.trim_start_matches("one of ").replace('`', "\"")),
        _ => None,
    };
    let Some(words) = words else { return plain(error.message()) };
    match value {
        Value::String(value) => {
            let known = words.split('"').skip(1).step_by(2);
            format!("is \"{value}\", expected {words}{}", nearest(value, known))
        }
        value => format!("is {value}, expected {words}"),
    }
}

/// serde's words in a user's.
pub(super) fn plain(message: &str) -> String {
    let message = message.lines().next().unwrap_or_default().trim();
    let begins = [
        ("invalid type: ", "is "),
        ("invalid value: ", "is "),
        ("unknown variant ", "is "),
        ("invalid length ", "has the length "),
    ];
    let mut message = begins
        .into_iter()
        .find_map(|(theirs, ours)| message.strip_prefix(theirs).map(|rest| format!("{ours}{rest}")))
        .unwrap_or_else(|| message.to_owned());
    for (theirs, ours) in [
        ("expected f64", "expected a number"),
        ("expected u64", "expected a whole number of at least 0"),
        ("expected u32", "expected a whole number of at least 0"),
        ("expected usize", "expected a whole number of at least 0"),
        ("expected i64", "expected a whole number"),
        ("expected a boolean", "expected true or false"),
        ("expected a sequence", "expected a list, as in [\"…\"]"),
        ("expected an array of length 2", "expected a list of two numbers"),
        ("expected fewer elements in array", "expected two numbers"),
        ("expected path string", "expected a path in quotes"),
        ("expected a string", "expected text in quotes"),
        ("expected struct PaletteOverride", "expected a table, as in { match = \"conv_in.*\", n_bits = 8 }"),
        ("expected struct LoraChoice", "expected a table, as in { path = \"style.safetensors\", weight = 0.8 }"),
        ("missing field ", "a table of the list lacks "),
        ("is map", "is a table"),
        ("is sequence", "is a list"),
        ("is unit variant, expected string only", "has an element that is not text in quotes"),
        ("wanted string or table", "has an element that is not text in quotes"),
        ("number too large to fit in target type", "is too large a number"),
        ("number too small to fit in target type", "is too small a number"),
    ] {
        message = message.replace(theirs, ours);
    }
    message
}
