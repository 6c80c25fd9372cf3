//! The keys that there are, read from the schema of the structs in `schema`: by it unknown keys are found, and the JSON
//! Schema, the key reference and the reference config are written.

use std::sync::LazyLock;

use schemars::Schema;
use schemars::generate::SchemaSettings;
use schemars::transform::{Transform, transform_subschemas};
use serde_json::{Map, Value};

use super::Config;

/// What the schema is called, by which its file is known.
pub const TITLE: &str = "A config of Palettist";

/// The schema of a config (JSON Schema, draft 7, which editors' TOML plugins read), without references.
static SCHEMA: LazyLock<Value> = LazyLock::new(|| {
    let settings = SchemaSettings::draft07().with(|settings| settings.inline_subschemas = true);
    let mut schema = settings.with_transform(Tidy).into_generator().into_root_schema_for::<Config>();
    schema.insert("title".to_owned(), TITLE.into());
    schema.to_value()
});

/// TOML has no null: an optional key is left out. Descriptions are running text.
#[derive(Clone)]
struct Tidy;

impl Transform for Tidy {
    fn transform(&mut self, schema: &mut Schema) {
        if let Some(Value::Array(types)) = schema.get_mut("type") {
            types.retain(|name| name != "null");
            if let [only] = &types[..] {
                let only = only.clone();
                schema.insert("type".to_owned(), only);
            }
        }
        if let Some(Value::Array(choices)) = schema.get_mut("anyOf") {
            choices.retain(|choice| choice["type"] != "null");
            if let [Value::Object(only)] = &choices[..] {
                let only = only.clone();
                schema.remove("anyOf");
                for (key, value) in only {
                    if schema.get(&key).is_none() {
                        schema.insert(key, value);
                    }
                }
            }
        }
        // The defaults of a section are those of its keys.
        if schema.get("properties").is_some() {
            schema.remove("default");
        }
        // A number's size in memory is nothing to a reader, and editors do not know these formats.
        schema.remove("format");
        if let Some(Value::String(text)) = schema.get_mut("description") {
            *text = text.split_whitespace().collect::<Vec<_>>().join(" ");
        }
        transform_subschemas(self, schema);
    }
}

/// The whole schema.
pub(super) fn schema() -> &'static Value {
    &SCHEMA
}

/// What stands behind a key.
pub(super) enum Kind {
    /// A section, with its keys.
    Table(&'static Map<String, Value>),
    /// A list of tables, with the keys of each.
    Tables(&'static Map<String, Value>),
    Value,
}

/// The schema of the key or section at `path`.
pub(super) fn find<S: AsRef<str>>(path: &[S]) -> Option<&'static Value> {
    path.iter().try_fold(schema(), |schema, name| schema["properties"].get(name.as_ref()))
}

/// What a schema says stands behind its key.
pub(super) fn kind(schema: &'static Value) -> Kind {
    match (&schema["properties"], &schema["items"]["properties"]) {
        (Value::Object(keys), _) => Kind::Table(keys),
        (_, Value::Object(keys)) => Kind::Tables(keys),
        _ => Kind::Value,
    }
}

/// Whether there is a section at `path`.
pub(super) fn is_table<S: AsRef<str>>(path: &[S]) -> bool {
    find(path).is_some_and(|schema| matches!(kind(schema), Kind::Table(_)))
}

/// All keys and sections, dotted; sections end in a dot.
pub(super) fn everything() -> Vec<String> {
    fn below(keys: &'static Map<String, Value>, prefix: &str, found: &mut Vec<String>) {
        for (name, schema) in keys {
            match kind(schema) {
                Kind::Table(inner) => {
                    found.push(format!("{prefix}{name}."));
                    below(inner, &format!("{prefix}{name}."), found);
                }
                _ => found.push(format!("{prefix}{name}")),
            }
        }
    }
    let mut found = Vec::new();
    if let Kind::Table(keys) = kind(schema()) {
        below(keys, "", &mut found);
    }
    found
}
