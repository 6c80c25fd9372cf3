//! The command line: one file a command, each with its `Args` and `run`.
//!
//! Results go to standard output, progress and errors to standard error. Exit codes are in [`EXIT_CODES`]: 2 is for
//! [`Usage`], [`crate::config::Error`], [`crate::train::plan::Refused`] and [`crate::source::Misused`], 130 for [`Interrupted`] and
//! [`crate::train::Stopped`]. Whatever is written takes
//! a new name or says that the old one is there: nothing is overwritten, but for packages with `export --overwrite`, and
//! what `generate` draws, which replaces files as a compiler's `-o` does.

mod analyze;
mod check;
mod clean;
mod demo;
mod doctor;
mod evaluate;
mod export;
pub mod generate;
mod init;
mod inspect;
mod model;
mod nbits;
mod palettize;
mod train;
mod verify;

use std::fmt;
use std::io::Write;
use std::panic::AssertUnwindSafe;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::config::{Config, Loaded};
use crate::terminal::{printable, tell, warn};

/// What `--help` ends with.
const EXIT_CODES: &str = "\
Exit codes:
  0    done
  1    the work failed, or what is named (a model, pictures, a package) cannot be used
  2    the command line or the config is wrong, or does not go with the model, the machine or a run that is there already;
       or what is to be written is there already
  130  stopped by Ctrl-C; what was done is kept";

/// Fine-tunes Stable Diffusion while it learns 2- and 4-bit palettes, and exports Core ML packages.
#[derive(Parser)]
#[command(name = "palettist", version, about, max_term_width = 100, after_help = EXIT_CODES)]
struct CommandLine {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Init(init::Args),
    Check(check::Args),
    Train(train::Args),
    Clean(clean::Args),
    Analyze(analyze::Args),
    Palettize(palettize::Args),
    Generate(Box<generate::Args>),
    Export(export::Args),
    Verify(verify::Args),
    Evaluate(evaluate::Args),
    Inspect(inspect::Args),
    Doctor(doctor::Args),
    Demo(demo::Args),
}

impl Command {
    /// Whether libtorch's threads do most of the work.
    fn computes(&self) -> bool {
        use Command::{Analyze, Check, Demo, Doctor, Evaluate, Generate, Train, Verify};
        matches!(self, Analyze(_) | Check(_) | Demo(_) | Doctor(_) | Evaluate(_) | Generate(_) | Train(_) | Verify(_))
    }
}

fn dispatch(command: Command) -> Result<()> {
    match command {
        Command::Init(args) => init::run(args),
        Command::Check(args) => check::run(args),
        Command::Train(args) => train::run(args),
        Command::Clean(args) => clean::run(args),
        Command::Analyze(args) => analyze::run(args),
        Command::Palettize(args) => palettize::run(args),
        Command::Generate(args) => generate::run(*args),
        Command::Export(args) => export::run(args),
        Command::Verify(args) => verify::run(args),
        Command::Evaluate(args) => evaluate::run(args),
        Command::Inspect(args) => inspect::run(args),
        Command::Doctor(args) => doctor::run(args),
        Command::Demo(args) => demo::run(args),
    }
}

/// The commands with their options, all of which take numbers below 0 for values, not for options that there are not: what
/// is wrong with such a number is then told.
fn command_line() -> clap::Command {
    CommandLine::command().mut_subcommands(|command| {
        command.mut_args(|arg| {
            let takes = arg.get_action().takes_values();
            arg.allow_negative_numbers(takes)
        })
    })
}

/// The program.
pub fn run() -> ExitCode {
    std::panic::set_hook(Box::new(|panic| {
        if panic.location().is_some_and(|place| crate::report::is_caught(place.file())) {
            return;
        }
        // libtorch puts its C++ stack under its messages, whose line ends are written out in a panic's.
        let message = panic.payload_as_str().unwrap_or("no message").lines().next().unwrap_or_default();
        let message = message.split("\\n").next().unwrap_or_default();
        let place = panic.location().map_or_else(String::new, |l| format!(" ({}:{})", l.file(), l.line()));
        tell(format_args!(
            "error: internal error{place}: {message}; this is a bug in palettist, please report it with your command"
        ));
    }));
    let matches = command_line().try_get_matches();
    let line = match matches.and_then(|matches| CommandLine::from_arg_matches(&matches)) {
        Ok(line) => line,
        Err(answer) => {
            // Help and versions come this way too, with code 0. A closed pipe is nobody's mistake.
            let _ = answer.print();
            return ExitCode::from(answer.exit_code() as u8);
        }
    };
    if line.command.computes() {
        crate::torch::environment::start_again();
    }
    match std::panic::catch_unwind(AssertUnwindSafe(|| dispatch(line.command))) {
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(error)) => report(&error),
        Err(_) => ExitCode::from(1),
    }
}

/// Prints an error, each of its lines with `error: ` in front, and chooses the exit code.
fn report(error: &anyhow::Error) -> ExitCode {
    if error.is::<ClosedPipe>() {
        return ExitCode::SUCCESS;
    }
    let stopped = error.downcast_ref::<crate::train::Stopped>().map(ToString::to_string);
    if let Some(text) = stopped.or(error.downcast_ref::<Interrupted>().map(ToString::to_string)) {
        tell(text);
        return ExitCode::from(130);
    }
    // libtorch puts its C++ stack under its messages; configs and data have one mistake a line.
    let usage = is_usage(error);
    let many = usage || error.is::<Mistakes>() || error.is::<crate::data::Problems>();
    let text = format!("{error:#}");
    let text = printable(&text);
    for line in text.lines().take(if many { usize::MAX } else { 1 }) {
        let _ = writeln!(std::io::stderr(), "error: {line}");
    }
    ExitCode::from(if usage { 2 } else { 1 })
}

/// Whether an error is the command line's or the config's: exit code 2.
fn is_usage(error: &anyhow::Error) -> bool {
    error.is::<crate::config::Error>()
        || error.is::<Usage>()
        || error.is::<crate::train::plan::Refused>()
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
struct ClosedPipe;

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
fn load_config(path: &Path, overrides: &[String]) -> Result<Config, crate::config::Error> {
    let Loaded { config, warnings } = crate::config::load(path, overrides)?;
    warnings.iter().for_each(warn);
    Ok(config)
}

/// Keys of a config, beside those of its pictures, on which a validation loss depends.
const MEASURED: [&str; 7] =
    ["seed", "name", "output_dir", "train.mode", "train.train_batch_size", "validation.seed", "validation.batches"];

/// Whether a key is about pictures or the model.
fn is_of_data(key: &str) -> bool {
    key.starts_with("data.") || key.starts_with("model.")
}

/// Warns of changes to a config in which a command sees no key that it uses.
fn warn_of_unused(overrides: &[String], command: &str, uses: impl Fn(&str) -> bool) {
    for text in overrides {
        let key = text.split('=').next().unwrap_or_default().trim();
        if !uses(key) {
            warn(format_args!("`{text}` on the command line has no effect on `{command}`"));
        }
    }
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
fn grouped(count: u64) -> String {
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
fn size(bytes: u64) -> String {
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

    #[test]
    fn the_command_line_is_well_formed() {
        command_line().debug_assert();
    }
}
