//! `palettist train`.

use std::path::PathBuf;

use anyhow::Result;

use super::{Interrupted, Usage, load_config};
use crate::train::{self, Ended, Resume, run_folder, state};

/// Fine-tunes a model as a config says; writes output_dir/
#[derive(clap::Args)]
pub struct Args {
    /// The config, a TOML file; `palettist init` writes one
    config: PathBuf,
    /// Changes to it: train.max_train_steps=20
    #[arg(value_name = "key=value")]
    overrides: Vec<String>,
    /// Where to start: the newest checkpoint (auto), the beginning (never), or a checkpoint's folder
    #[arg(long, default_value = "auto", value_name = "auto|never|DIR")]
    resume: String,
}

pub fn run(args: Args) -> Result<()> {
    let config = load_config(&args.config, &args.overrides)?;
    let resume = match args.resume.as_str() {
        "auto" => Resume::Auto,
        "never" => Resume::Never,
        folder => Resume::From(checkpoint(folder)?),
    };
    stop_on_interrupt(SAVING)?;
    match train::run(&config, &resume)? {
        Ended::Done => Ok(()),
        Ended::Stopped => Err(Interrupted("stopped after saving; run the same command to resume".into()).into()),
    }
}

/// The folder of a checkpoint that `--resume` names.
fn checkpoint(folder: &str) -> Result<PathBuf, Usage> {
    let path = PathBuf::from(folder);
    if state::is_checkpoint(&path) {
        return Ok(path);
    }
    let what = if !path.exists() { "does not exist" } else { "is not a checkpoint, a folder with state.json" };
    let within = [path.clone(), path.join(run_folder::CHECKPOINTS)].iter().flat_map(|path| state::list(path)).last();
    let hint = match within {
        Some((_, newest)) => format!("; {} is one", newest.display()),
        None => "; there are auto, never, and the folders in a run's checkpoints/".to_owned(),
    };
    Err(Usage(format!("--resume {folder}: {what}{hint}")))
}

/// What is said at the first Ctrl-C by commands that keep what they have done.
pub const SAVING: &str = "finishing this step, then saving";

/// The first Ctrl-C asks the work to end, as `told` says; the second ends the program at once.
pub fn stop_on_interrupt(told: &'static str) -> Result<()> {
    let asked = std::sync::atomic::AtomicBool::new(false);
    let set = ctrlc::set_handler(move || {
        if asked.swap(true, std::sync::atomic::Ordering::Relaxed) {
            std::process::exit(130);
        }
        crate::terminal::tell(format_args!("{told}; press Ctrl-C again to quit now"));
        train::stop();
    });
    match set {
        // Two commands in one process, as in tests: the handler is the same.
        Ok(()) | Err(ctrlc::Error::MultipleHandlers) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
