//! Reading a network's `config.json`: what is missing takes diffusers' default, and what is not supported is
//! refused with its key and value, a `null` in place of a value too.

use anyhow::{Result, bail};
use serde_json::Value;

/// What no network that computes anywhere exceeds. A file beyond is damaged or hostile: declaring its parameters alone
/// would take minutes and all memory. (The noise schedule's own limit is beside its reader,
/// [`MOST_TIMESTEPS`](crate::diffusion::MOST_TIMESTEPS).)
pub(super) mod limits {
    /// Widths, channels, vocabularies, sides of pictures.
    pub const WIDTH: i64 = 1 << 20;
    /// Layers in a row: of an encoder, of a block, of a transformer.
    pub const LAYERS: i64 = 256;
    /// Transformer layers of a UNet in all.
    pub const TRANSFORMERS: i64 = 2048;
    /// Resolutions of a UNet or an autoencoder, each half of the one before.
    pub const BLOCKS: usize = 16;
}

/// A `config.json` with the name of its network for messages.
pub(super) struct Json<'a> {
    network: &'static str,
    value: &'a Value,
}

impl<'a> Json<'a> {
    /// # Errors
    /// When the value is not an object, or says that it is of another class.
    pub(super) fn new(network: &'static str, value: &'a Value) -> Result<Self> {
        if !value.is_object() {
            bail!("{network}: config.json is not an object");
        }
        let json = Self { network, value };
        match json.value.get("_class_name").and_then(Value::as_str) {
            Some(class) if class != network => {
                bail!("config.json is of `_class_name` \"{class}\"; {network} is expected")
            }
            _ => Ok(json),
        }
    }

    /// The value of a key, `None` where it is missing. A `null` is not its default: diffusers takes it for a value, and most
    /// fail on it.
    fn get(&self, key: &str, expected: &str) -> Result<Option<&'a Value>> {
        match self.value.get(key) {
            Some(Value::Null) => self.refuse(key, &Value::Null, &format!("{expected}, or no such key")),
            value => Ok(value),
        }
    }

    fn refuse<T>(&self, key: &str, value: &Value, expected: &str) -> Result<T> {
        bail!("{}: config.json has `{key}`: {value}, which is not supported ({expected})", self.network)
    }

    /// A positive integer: a width of some kind, see [`limits`].
    pub(super) fn integer(&self, key: &str, default: i64) -> Result<i64> {
        self.up_to(key, default, limits::WIDTH)
    }

    /// A number of layers.
    pub(super) fn layers(&self, key: &str, default: i64) -> Result<i64> {
        self.up_to(key, default, limits::LAYERS)
    }

    fn up_to(&self, key: &str, default: i64, most: i64) -> Result<i64> {
        let expected = format!("an integer from 1 to {most} is");
        match self.get(key, &expected)? {
            None => Ok(default),
            Some(value) => match value.as_i64().filter(|&n| n > 0 && n <= most) {
                Some(n) => Ok(n),
                None => self.refuse(key, value, &expected),
            },
        }
    }

    pub(super) fn number(&self, key: &str, default: f64) -> Result<f64> {
        match self.get(key, "a number is")? {
            None => Ok(default),
            Some(value) => match value.as_f64().filter(|n| n.is_finite()) {
                Some(n) => Ok(n),
                None => self.refuse(key, value, "a number is"),
            },
        }
    }

    /// True or false; a `null` is false, as in Python.
    pub(super) fn flag(&self, key: &str, default: bool) -> Result<bool> {
        match self.value.get(key) {
            None => Ok(default),
            Some(Value::Null) => Ok(false),
            Some(value) => match value.as_bool() {
                Some(flag) => Ok(flag),
                None => self.refuse(key, value, "true or false is"),
            },
        }
    }

    /// One number of layers or heads for all blocks, or a list with one each.
    pub(super) fn per_block(&self, key: &str, default: i64, blocks: usize) -> Result<Vec<i64>> {
        match self.value.get(key) {
            Some(Value::Array(_)) => {
                let list = self.list(key, &[], limits::LAYERS)?;
                if list.len() != blocks {
                    bail!("{}: config.json has {} values in `{key}` for {blocks} blocks", self.network, list.len());
                }
                Ok(list)
            }
            _ => Ok(vec![self.layers(key, default)?; blocks]),
        }
    }

    /// Transformer layers (0 or more; default 1) after each residual block, of which the blocks have `layers`: one number
    /// for all blocks, or a list with one for each block or with a list for each of its residual blocks.
    pub(super) fn per_layer(&self, key: &str, layers: &[i64]) -> Result<Vec<Vec<i64>>> {
        let expected = format!(
            "an integer from 0 to {} is, or a list of one for each of {} blocks, or lists of one for each residual block of a \
             block",
            limits::LAYERS,
            layers.len()
        );
        let Some(value) = self.get(key, &expected)? else {
            return Ok(layers.iter().map(|&layers| vec![1; layers as usize]).collect());
        };
        let number = |value: &Value| value.as_i64().filter(|n| (0..=limits::LAYERS).contains(n));
        let of_block = |value: &Value, layers: i64| match value {
            Value::Array(items) if items.len() as i64 == layers => items.iter().map(number).collect(),
            value => Some(vec![number(value)?; layers as usize]),
        };
        let found: Option<Vec<Vec<i64>>> = match value {
            Value::Array(items) if items.len() == layers.len() => {
                items.iter().zip(layers).map(|(item, &layers)| of_block(item, layers)).collect()
            }
            Value::Array(_) => None,
            value => layers.iter().map(|&layers| of_block(value, layers)).collect(),
        };
        match found {
            Some(found) => Ok(found),
            None => self.refuse(key, &shortened(value), &expected),
        }
    }

    /// A list of positive integers, widths of blocks.
    pub(super) fn integers(&self, key: &str, default: &[i64]) -> Result<Vec<i64>> {
        self.list(key, default, limits::WIDTH)
    }

    fn list(&self, key: &str, default: &[i64], most: i64) -> Result<Vec<i64>> {
        let expected = format!("a list of at most {} integers from 1 to {most} is", limits::BLOCKS);
        let Some(value) = self.get(key, &expected)? else { return Ok(default.to_vec()) };
        let list = value.as_array().filter(|items| items.len() <= limits::BLOCKS).and_then(|items| {
            items.iter().map(|item| item.as_i64().filter(|&n| n > 0 && n <= most)).collect::<Option<Vec<_>>>()
        });
        match list {
            Some(list) if !list.is_empty() => Ok(list),
            _ => self.refuse(key, &shortened(value), &expected),
        }
    }

    /// A list of names, each one of `known`.
    pub(super) fn names(&self, key: &str, default: &[&str], known: &[&str]) -> Result<Vec<String>> {
        let Some(value) = self.get(key, "a list of block types is")? else {
            return Ok(default.iter().map(|s| s.to_string()).collect());
        };
        let items = value.as_array().map(Vec::as_slice).unwrap_or_default();
        if items.len() > limits::BLOCKS {
            let expected = format!("at most {} block types are", limits::BLOCKS);
            return self.refuse(key, &shortened(value), &expected);
        }
        let mut names = Vec::new();
        for item in items {
            match item.as_str().filter(|name| known.contains(name)) {
                Some(name) => names.push(name.to_string()),
                None => return self.refuse(key, item, &format!("{} are", known.join(", "))),
            }
        }
        if names.is_empty() {
            return self.refuse(key, value, "a list of block types is");
        }
        Ok(names)
    }

    /// A text, `default` when missing.
    pub(super) fn text(&self, key: &str, default: &str) -> Result<String> {
        match self.get(key, "a text is")? {
            None => Ok(default.to_string()),
            Some(Value::String(text)) => Ok(text.clone()),
            Some(value) => self.refuse(key, value, "a text is"),
        }
    }

    /// A text, or `None` for `null`, which is a value of its own; `default` when missing.
    pub(super) fn text_or_null(&self, key: &str, default: &str) -> Result<Option<String>> {
        if self.is_null(key) { Ok(None) } else { self.text(key, default).map(Some) }
    }

    /// Whether the key has a value other than `null`.
    pub(super) fn is_there(&self, key: &str) -> bool {
        self.value.get(key).is_some_and(|value| !value.is_null())
    }

    /// True when the key stands there as `null` (which is not the same as missing).
    pub(super) fn is_null(&self, key: &str) -> bool {
        self.value.get(key).is_some_and(Value::is_null)
    }

    /// Refuses any value but those listed; missing passes, and null where nothing or `false` is listed.
    pub(super) fn only(&self, key: &str, allowed: &[Value]) -> Result<()> {
        let is_one = |value: &Value| match value {
            Value::Null => allowed.is_empty() || allowed.iter().any(|a| a.is_null() || *a == Value::Bool(false)),
            value => allowed.iter().any(|a| a == value || (a.is_number() && a.as_f64() == value.as_f64())),
        };
        match self.value.get(key) {
            Some(value) if !is_one(value) => {
                let list: Vec<String> = allowed.iter().map(Value::to_string).collect();
                let expected = if list.is_empty() { "null is".into() } else { format!("{} is", list.join(" or ")) };
                self.refuse(key, value, &expected)
            }
            _ => Ok(()),
        }
    }
}

/// The first few items of a list, and of lists within it, for messages.
fn shortened(value: &Value) -> Value {
    match value.as_array() {
        Some(items) if items.len() > limits::BLOCKS => {
            items.iter().take(3).map(shortened).chain([Value::from("…")]).collect()
        }
        Some(items) => items.iter().map(shortened).collect(),
        None => value.clone(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_null_is_no_default() {
        let value = json!({"a": null, "names": ["x"]});
        let json = Json::new("N", &value).unwrap();
        let refused = |result: Result<()>| {
            let error = result.unwrap_err().to_string();
            assert!(error.contains("`a`: null") && error.contains("or no such key"), "{error}");
        };
        refused(json.integer("a", 1).map(drop));
        refused(json.layers("a", 1).map(drop));
        refused(json.number("a", 1.0).map(drop));
        refused(json.per_block("a", 1, 2).map(drop));
        refused(json.integers("a", &[1]).map(drop));
        refused(json.names("a", &["x"], &["x"]).map(drop));
        refused(json.text("a", "x").map(drop));
        assert!(json.only("a", &[json!("x")]).is_err() && json.only("a", &[json!(1)]).is_err());
        // Python takes it for false; and for what it is where the class has it as its default.
        assert!(!json.flag("a", true).unwrap());
        json.only("a", &[]).unwrap();
        json.only("a", &[json!(false)]).unwrap();
        json.only("a", &[json!("x"), Value::Null]).unwrap();
        assert_eq!(json.integer("b", 3).unwrap(), 3);
    }
}
