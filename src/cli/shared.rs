//! What several commands share: how a command fails, reads its config and prints.

use std::fmt;
use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result};

use crate::config::{Config, Loaded};
use crate::files::{NotAFolder, check_writable};
use crate::terminal::{printable, warn};

/// Whether an error is the command line's or the config's: exit code 2.
pub fn is_usage(error: &anyhow::Error) -> bool {
    error.is::<crate::config::Error>()
        || error.is::<Usage>()
        || error.is::<crate::train::Refused>()
        || error.is::<crate::source::Misused>()
}

/// The command line is wrong: exit code 2. One mistake a line.
#[derive(Debug)]
pub struct Usage(pub String);

impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Usage {}

/// All that is wrong with what a config names: exit code 1.
#[derive(Debug)]
pub struct Mistakes(pub Vec<String>);

impl fmt::Display for Mistakes {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(&self.0.join("\n"))
    }
}

impl std::error::Error for Mistakes {}

/// Ctrl-C, after saving; says what was saved and how to go on. Exit code 130.
#[derive(Debug)]
pub struct Interrupted(pub String);

impl fmt::Display for Interrupted {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Interrupted {}

/// Whoever read standard output has seen enough (`| head`): exit code 0, no message.
#[derive(Debug)]
pub struct ClosedPipe;

impl fmt::Display for ClosedPipe {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("standard output is closed")
    }
}

impl std::error::Error for ClosedPipe {}

/// Writes a result to standard output with a line end. Unlike `println!` it does not panic on a closed pipe.
///
/// # Errors
/// An error that ends the program quietly when the pipe is closed; that of the system otherwise (a full disk).
pub fn print(text: impl fmt::Display) -> Result<()> {
    let mut out = std::io::stdout().lock();
    match writeln!(out, "{}", printable(&text.to_string())).and_then(|()| out.flush()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Err(ClosedPipe.into()),
        result => result.context("writing to standard output"),
    }
}

/// The config at `path` with `overrides` on top of it; warnings go to standard error.
///
/// # Errors
/// As [`crate::config::load`].
pub fn load_config(path: &Path, overrides: &[String]) -> Result<Config, crate::config::Error> {
    let Loaded { config, warnings } = crate::config::load(path, overrides)?;
    warnings.iter().for_each(warn);
    Ok(config)
}

/// Keys of a config, beside those of its pictures, on which a validation loss depends.
pub const MEASURED: [&str; 7] =
    ["seed", "name", "output_dir", "train.mode", "train.train_batch_size", "validation.seed", "validation.batches"];

/// Whether a key is about pictures or the model.
pub fn is_of_data(key: &str) -> bool {
    key.starts_with("data.") || key.starts_with("model.")
}

/// Warns of changes to a config in which a command sees no key that it uses.
pub fn warn_of_unused(overrides: &[String], command: &str, uses: impl Fn(&str) -> bool) {
    for text in overrides {
        let key = text.split('=').next().unwrap_or_default().trim();
        if !uses(key) {
            warn(format_args!("`{text}` on the command line has no effect on `{command}`"));
        }
    }
}

/// Checks that the folder `-o` can be written.
///
/// # Errors
/// It can't; [`Usage`] where something else has its name.
pub fn check_output(folder: &Path) -> Result<()> {
    check_writable(folder)
        .map_err(|error| if error.is::<NotAFolder>() { Usage(format!("-o {error}")).into() } else { error })
}

/// Refuses a path that exists already.
///
/// # Errors
/// [`Usage`], naming it.
pub fn must_be_new(path: &Path) -> Result<()> {
    match path.symlink_metadata() {
        Ok(_) => Err(Usage(format!("{} exists already; nothing was overwritten", path.display())).into()),
        Err(_) => Ok(()),
    }
}

/// A count with thin groups of three: `859 520 964`.
pub fn grouped(count: u64) -> String {
    let digits = count.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(' ');
        }
        text.push(digit);
    }
    text
}

/// Bytes in decimal units, as disks and app stores count: `0.43 GB`.
pub fn size(bytes: u64) -> String {
    let bytes = bytes as f64;
    match bytes {
        b if b >= 1e9 => format!("{:.2} GB", b / 1e9),
        b if b >= 1e6 => format!("{:.1} MB", b / 1e6),
        b if b >= 1e3 => format!("{:.1} kB", b / 1e3),
        b => format!("{b} B"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_and_sizes_read_well() {
        let counts: Vec<String> = [0, 999, 1000, 859_520_964].map(grouped).to_vec();
        assert_eq!(counts, ["0", "999", "1 000", "859 520 964"]);
        let sizes: Vec<String> = [12, 1500, 214_900_000, 1_720_000_000].map(size).to_vec();
        assert_eq!(sizes, ["12 B", "1.5 kB", "214.9 MB", "1.72 GB"]);
    }
}
