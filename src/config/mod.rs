//! The config of a run: one TOML file, strict, read once into [`Config`].
//!
//! Precedence: the documented defaults  < the file < `key=value` on the command line. Names are those of
//! diffusers' and kohya's trainers. Every mistake is reported, not only the first: keys that do not exist with the
//! nearest one that does, values of a wrong type, and what does not fit together, each with its line and column.
//!
//! Relative paths are relative to the working directory, as in kohya's and diffusers' trainers (not to the file).

mod defaults;
mod differences;
mod keys;
mod palettes;
mod read;
mod recipe;
mod rules;
mod schema;

use std::fmt;
use std::path::Path;

pub use differences::Difference;
pub use keys::Change;
pub use palettes::matches_glob;
pub use recipe::{Recipe, RecipeLayer, recipe_text};
pub use schema::*;

/// One mistake and where it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// `dog.toml:12:3`, or `` `train.seed=x` on the command line ``.
    pub place: String,
    pub message: String,
}

/// Everything that is wrong with a config; the program ends with exit code 2.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    pub problems: Vec<Problem>,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        for (i, problem) in self.problems.iter().enumerate() {
            let newline = if i == 0 { "" } else { "\n" };
            write!(f, "{newline}{}: {}", problem.place, problem.message)?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {}

/// Reads the config at `path`, lays `overrides` (`train.max_train_steps=20`; a value that is not TOML is a string) over
/// it, fills in every default and checks what must fit together. Touches no file but `path` and the recipe that it names.
///
/// # Errors
/// [`Error`] with every mistake found.
pub fn load(path: &Path, overrides: &[String]) -> Result<Config, Error> {
    let text = std::fs::read_to_string(path).map_err(|error| Error {
        problems: vec![Problem { place: path.display().to_string(), message: format!("can't be read: {error}") }],
    })?;
    parse(&text, &path.display().to_string(), overrides)
}

/// [`load`] from a text; `file` is its name in messages.
///
/// # Errors
/// As [`load`].
pub fn parse(text: &str, file: &str, overrides: &[String]) -> Result<Config, Error> {
    read::read(text, file, overrides)
}

/// Reads what [`Config::resolved_toml`] wrote, of this version or an earlier one, for comparison with the config of today
/// ([`Config::differences`]): keys without effect are let pass.
///
/// # Errors
/// As [`load`].
pub fn parse_resolved(text: &str, file: &str) -> Result<Config, Error> {
    read::read(text, file, &[])
}

impl Config {
    /// The whole config with every default written out, for `output_dir/config.resolved.toml`. [`parse`] reads it back
    /// to the same `Config`, but that a recipe is in its overrides, and its file no longer named.
    pub fn resolved_toml(&self) -> String {
        let mut config = self.clone();
        config.palettize.recipe = None;
        let body = toml::to_string(&config).expect("strings, numbers and tables always have a TOML form");
        format!("# The config as it was run: every default written out, `key=value` changes included.\n{body}")
    }
}

impl Train {
    /// Whether the master weight of a parameter of this shape is bf16, with its gradient and moments: biases and norms weigh
    /// nothing, and eight bits would leave a norm's scale 0.4 % off.
    pub fn is_bf16(&self, shape: &[i64]) -> bool {
        self.full_bf16 && shape.len() > 1
    }
}

#[cfg(test)]
mod tests;
