//! The command line: one file a command, each with its `Args` and `run`.
//!
//! Results go to standard output, progress and errors to standard error. Exit codes are in `EXIT_CODES`: 2 is for
//! `Usage`, [`crate::config::Error`], [`crate::train::Refused`] and [`crate::source::Misused`], 130 for `Interrupted` and
//! [`crate::train::Stopped`]. Whatever is written takes
//! a new name or says that the old one is there: nothing is overwritten, but for packages with `export --overwrite`,
//! compiled ones with `compile --overwrite`, and what `generate` draws, which replaces files as a compiler's `-o` does.

mod analyze;
mod check;
mod clean;
mod compile;
mod demo;
mod doctor;
mod drawing;
mod evaluate;
mod export;
pub mod generate;
mod init;
mod inspect;
mod model;
mod palettize;
mod schema;
mod shared;
mod train;
mod verify;

use std::io::Write;
use std::panic::AssertUnwindSafe;
use std::process::ExitCode;

use anyhow::Result;
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

use self::shared::{
    ClosedPipe, Interrupted, MEASURED, Mistakes, Usage, check_output, grouped, is_of_data, is_usage, load_config,
    must_be_new, print, size, warn_of_unused,
};
use crate::terminal::{printable, tell};

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
    Schema(schema::Args),
    Check(check::Args),
    Train(train::Args),
    Clean(clean::Args),
    Analyze(analyze::Args),
    Palettize(palettize::Args),
    Generate(Box<generate::Args>),
    Export(export::Args),
    Compile(compile::Args),
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
        Command::Schema(args) => schema::run(args),
        Command::Check(args) => check::run(args),
        Command::Train(args) => train::run(args),
        Command::Clean(args) => clean::run(args),
        Command::Analyze(args) => analyze::run(args),
        Command::Palettize(args) => palettize::run(args),
        Command::Generate(args) => generate::run(*args),
        Command::Export(args) => export::run(args),
        Command::Compile(args) => compile::run(args),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        command_line().debug_assert();
    }
}
