//! Typed reading of `scheduler_config.json`: a key that is missing takes the reader's default, a key of another type is an
//! error that names the key and the value. A `null` is what diffusers makes of it: false where true or false is expected,
//! nothing where nothing is allowed, and an error elsewhere.

use anyhow::{Context, Result, bail};
use serde_json::Value;

/// A scheduler's configuration. The file holds the keys of whichever scheduler wrote it, so a sampler reads the keys
/// that it knows, with its own defaults, and leaves the others.
#[derive(Clone, Copy)]
pub struct Settings<'a>(&'a Value);

/// Parses the text of a `scheduler_config.json`. Python's `json` writes `-Infinity` for `lambda_min_clipped`, which
/// is no JSON: such a number is read as `null`, which means the default of this key, which it is. [`config_text`] writes it
/// back.
///
/// # Errors
/// Text that is not JSON.
pub fn parse_config(text: &str) -> Result<Value> {
    let mut json = String::with_capacity(text.len());
    let mut rest = text;
    let mut in_string = false;
    while let Some(first) = rest.chars().next() {
        let special = ["-Infinity", "Infinity", "NaN"].into_iter().find(|word| !in_string && rest.starts_with(word));
        let length = match special {
            Some(word) => {
                json.push_str("null");
                word.len()
            }
            None if in_string && first == '\\' => {
                let length = 1 + rest[1..].chars().next().map_or(0, char::len_utf8);
                json.push_str(&rest[..length]);
                length
            }
            None => {
                in_string ^= first == '"';
                json.push(first);
                first.len_utf8()
            }
        };
        rest = &rest[length..];
    }
    Ok(serde_json::from_str(&json)?)
}

/// The text of a `scheduler_config.json`, as diffusers reads it.
pub fn config_text(config: &Value) -> String {
    let null = format!("\"{LAMBDA_MIN}\": null");
    format!("{config:#}\n").replace(&null, &null.replace("null", "-Infinity"))
}

/// The key that diffusers writes as `-Infinity`.
const LAMBDA_MIN: &str = "lambda_min_clipped";

/// A value that diffusers may know and this version does not.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct Unsupported(pub String);

impl Unsupported {
    fn one_of<T: std::fmt::Display>(key: &str, choices: impl Iterator<Item = T>, value: &Value) -> anyhow::Error {
        let names: Vec<_> = choices.map(|name| name.to_string()).collect();
        let text = format!("scheduler_config.json `{key}` is {value}; this version supports {}", names.join(", "));
        Self(text).into()
    }
}

impl<'a> Settings<'a> {
    /// # Errors
    /// A configuration that is not a JSON object.
    pub fn new(config: &'a Value) -> Result<Self> {
        if !config.is_object() {
            bail!("scheduler_config.json holds no JSON object");
        }
        Ok(Self(config))
    }

    /// The value of a key that is there and not `null`.
    pub fn get(&self, key: &str) -> Option<&'a Value> {
        self.0.get(key).filter(|value| !value.is_null())
    }

    /// The value of a key, `None` where it is missing.
    ///
    /// # Errors
    /// It is `null`, which is not the default; or a number that is not finite, see [`parse_config`].
    fn given(&self, key: &str, what: &str) -> Result<Option<&'a Value>> {
        match self.0.get(key) {
            Some(Value::Null) => bail!(
                "scheduler_config.json: `{key}` is null or not finite, which is not its default; it should be {what}, or the \
                 key left out"
            ),
            value => Ok(value),
        }
    }

    fn read<T>(&self, key: &str, default: T, what: &str, read: impl Fn(&'a Value) -> Option<T>) -> Result<T> {
        match self.given(key, what)? {
            None => Ok(default),
            Some(value) => {
                read(value).with_context(|| format!("scheduler_config.json: `{key}` should be {what}, and is {value}"))
            }
        }
    }

    pub fn number(&self, key: &str, default: f64) -> Result<f64> {
        self.read(key, default, "a number", Value::as_f64)
    }

    /// A number, or nothing where the key is missing or `null`.
    pub fn optional_number(&self, key: &str) -> Result<Option<f64>> {
        match self.get(key) {
            None => Ok(None),
            Some(_) => self.number(key, 0.0).map(Some),
        }
    }

    /// `lambda_min_clipped`
    pub fn lambda_min(&self) -> Result<f64> {
        Ok(self.optional_number(LAMBDA_MIN)?.unwrap_or(f64::NEG_INFINITY))
    }

    /// A whole number of at least `least`.
    pub fn integer(&self, key: &str, default: i64, least: i64) -> Result<i64> {
        self.read(key, default, &format!("a whole number from {least}"), |value| {
            value.as_i64().filter(|&integer| integer >= least)
        })
    }

    /// True or false; a `null` is false, as in Python.
    pub fn truth(&self, key: &str, default: bool) -> Result<bool> {
        if self.0.get(key).is_some_and(Value::is_null) {
            return Ok(false);
        }
        self.read(key, default, "true or false", Value::as_bool)
    }

    /// One of the named values.
    pub fn choice<T: Copy>(&self, key: &str, default: T, choices: &[(&str, T)]) -> Result<T> {
        let what = || choices.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(" or ");
        let Some(value) = self.given(key, &what())? else { return Ok(default) };
        match choices.iter().find(|(name, _)| value.as_str() == Some(*name)) {
            Some((_, choice)) => Ok(*choice),
            None => Err(Unsupported::one_of(key, choices.iter().map(|(name, _)| *name), value)),
        }
    }

    /// One of a few whole numbers.
    pub fn choice_of_numbers(&self, key: &str, default: i64, choices: &[i64]) -> Result<i64> {
        let what = || choices.iter().map(i64::to_string).collect::<Vec<_>>().join(" or ");
        let Some(value) = self.given(key, &what())? else { return Ok(default) };
        match value.as_i64().filter(|number| choices.contains(number)) {
            Some(number) => Ok(number),
            None => Err(Unsupported::one_of(key, choices.iter(), value)),
        }
    }

    /// A list of numbers, or nothing where the key is missing or `null`.
    pub fn numbers(&self, key: &str) -> Result<Option<Vec<f64>>> {
        if self.get(key).is_none() {
            return Ok(None);
        }
        self.read(key, None, "a list of numbers", |value| {
            value.as_array()?.iter().map(Value::as_f64).collect::<Option<Vec<_>>>().map(Some)
        })
    }

    /// Refuses keys that ask for what Palettist does not do.
    pub fn refuse_true(&self, keys: &[&str]) -> Result<()> {
        for key in keys {
            if self.truth(key, false)? {
                return Err(Unsupported(format!(
                    "scheduler_config.json `{key}` is true, which this version does not support"
                ))
                .into());
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn infinities_of_python_are_defaults() {
        let config = parse_config(r#"{"lambda_min_clipped": -Infinity, "a\"Infinity": "NaN", "b": 0.5}"#).unwrap();
        let settings = Settings::new(&config).unwrap();
        assert_eq!(settings.lambda_min().unwrap(), f64::NEG_INFINITY);
        assert_eq!(settings.get("a\"Infinity").unwrap(), "NaN");
        assert_eq!(settings.number("b", 0.0).unwrap(), 0.5);
        // And it is written as it was read.
        let text = config_text(&config);
        assert!(text.contains("\"lambda_min_clipped\": -Infinity"), "{text}");
        assert_eq!(parse_config(&text).unwrap(), config);
    }

    #[test]
    fn a_null_is_what_diffusers_makes_of_it() {
        let config = parse_config(r#"{"a": null, "trained_betas": null, "b": NaN}"#).unwrap();
        let settings = Settings::new(&config).unwrap();
        for result in [
            settings.number("a", 1.0).map(drop),
            settings.integer("a", 1, 0).map(drop),
            settings.choice("a", 1, &[("x", 1)]).map(drop),
            settings.choice_of_numbers("a", 1, &[1, 2]).map(drop),
            settings.number("b", 1.0).map(drop),
        ] {
            let error = result.unwrap_err().to_string();
            assert!(error.contains("` is null or not finite") && error.contains("or the key left out"), "{error}");
        }
        assert!(!settings.truth("a", true).unwrap());
        assert!(
            settings.numbers("trained_betas").unwrap().is_none() && settings.optional_number("a").unwrap().is_none()
        );
    }

    #[test]
    fn errors_name_the_key_and_the_value() {
        let config = parse_config(r#"{"steps_offset": "one", "timestep_spacing": "even", "n": -1}"#).unwrap();
        let settings = Settings::new(&config).unwrap();
        let error = settings.integer("steps_offset", 0, 0).unwrap_err().to_string();
        assert!(error.contains("`steps_offset`") && error.contains("\"one\""), "{error}");
        let error = settings.choice("timestep_spacing", 0, &[("leading", 0), ("trailing", 1)]).unwrap_err().to_string();
        assert!(error.contains("leading, trailing") && error.contains("\"even\""), "{error}");
        assert!(settings.integer("n", 0, 0).is_err());
    }
}
