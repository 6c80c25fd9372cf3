//! `palettist evaluate`.

mod args;
mod loss;
mod pictures;
mod table;

use anyhow::Result;
pub use args::Args;

pub fn run(args: Args) -> Result<()> {
    match (&args.prompts, &args.config) {
        (Some(prompts), _) => pictures::run(&args, prompts),
        (None, Some(config)) => loss::run(&args, config),
        (None, None) => Err(super::Usage("--config or --prompts is needed".into()).into()),
    }
}
