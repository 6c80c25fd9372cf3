//! `palettist train`.

use std::path::{Path, PathBuf};

use anyhow::Result;

use super::{Interrupted, Usage, load_config};
use crate::train::{self, Ended, Resume};

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
        folder if Path::new(folder).is_dir() => Resume::From(folder.into()),
        other => {
            let message = format!("--resume {other}: there is no such folder (auto, never, or a checkpoint's folder)");
            return Err(Usage(message).into());
        }
    };
    stop_on_interrupt()?;
    match train::run(&config, &resume)? {
        Ended::Done => Ok(()),
        Ended::Stopped => Err(Interrupted("stopped after saving; the same command goes on".into()).into()),
    }
}

/// The first Ctrl-C asks the run to save and end, the second ends the program at once.
pub fn stop_on_interrupt() -> Result<()> {
    let asked = std::sync::atomic::AtomicBool::new(false);
    let set = ctrlc::set_handler(move || {
        if asked.swap(true, std::sync::atomic::Ordering::Relaxed) {
            std::process::exit(130);
        }
        eprintln!("stopping as soon as nothing is half done; Ctrl-C again ends at once");
        train::stop();
    });
    match set {
        // Two commands in one process, as in tests: the handler is the same.
        Ok(()) | Err(ctrlc::Error::MultipleHandlers) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
