//! What reading a config gives: the config, or everything that is wrong with it.

use std::fmt;

use super::schema::Config;

/// One mistake and where it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// `dog.toml:12:3`, or `` `train.seed=x` on the command line ``.
    pub place: String,
    pub message: String,
}

impl fmt::Display for Problem {
    /// One line: what a user wrote may have line breaks, or codes that steer a terminal.
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        for c in self.place.chars().chain(": ".chars()).chain(self.message.chars()) {
            if c.is_control() { write!(f, "{}", c.escape_default())? } else { write!(f, "{c}")? }
        }
        Ok(())
    }
}

/// Everything that is wrong with a config; the program ends with exit code 2.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    pub problems: Vec<Problem>,
}

impl Error {
    /// That a command needs more of a config than training does.
    pub fn about(key: &str, message: &str) -> Self {
        Self { problems: vec![Problem { place: "the config".into(), message: format!("`{key}` {message}") }] }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        for (i, problem) in self.problems.iter().enumerate() {
            let newline = if i == 0 { "" } else { "\n" };
            write!(f, "{newline}{problem}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {}

/// A config and what is odd about it without being wrong: keys that are written and have no effect.
#[derive(Clone, Debug, PartialEq)]
pub struct Loaded {
    pub config: Config,
    pub warnings: Vec<Problem>,
}
