//! `palettist schema`: what a config can hold, for editors and readers.

use anyhow::Result;
use clap::ValueEnum;

use super::print;
use crate::config::{json_schema, key_reference, reference_config};

/// Writes the JSON Schema of a config, with which editors complete and explain keys
#[derive(clap::Args)]
pub struct Args {
    /// json: the schema; markdown: a page of all keys; toml: a commented config with all keys at their defaults
    #[arg(long, value_enum, default_value = "json", hide_possible_values = true)]
    format: Format,
}

#[derive(Clone, Copy, ValueEnum)]
enum Format {
    Json,
    Markdown,
    Toml,
}

pub fn run(args: Args) -> Result<()> {
    let text = match args.format {
        Format::Json => json_schema(),
        Format::Markdown => key_reference(),
        Format::Toml => reference_config(),
    };
    print(text.trim_end())
}
