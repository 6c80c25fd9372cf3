//! `palettist init`: a commented config to start from.

use std::path::PathBuf;

use anyhow::Result;

use super::{Usage, must_be_new, print};
use crate::config::{SCHEMA_TITLE, json_schema};
use crate::files::write_bytes;

/// Writes a commented config to start from; without RECIPE, lists them
///
/// Beside it goes palettist.schema.json, by which editors complete and explain the keys.
#[derive(clap::Args)]
pub struct Args {
    /// Which one
    recipe: Option<String>,
    /// The file to write; `-` for standard output [default: RECIPE.toml]
    #[arg(short, long)]
    output: Option<PathBuf>,
}

macro_rules! recipes {
    ($($name:literal),*) => { [$(($name, include_str!(concat!("../../configs/", $name, ".toml")))),*] };
}

/// Names and texts of the configs that `init` writes.
pub const RECIPES: [(&str, &str); 7] = recipes![
    "dreambooth-2bit",
    "dreambooth-4bit",
    "sd21-dreambooth-2bit",
    "sd21-dreambooth-4bit",
    "finetune-2bit",
    "finetune-4bit",
    "reference"
];

/// The JSON Schema beside a config, by which editors complete and explain its keys.
const SCHEMA: &str = "palettist.schema.json";

pub fn run(args: Args) -> Result<()> {
    let Some(name) = args.recipe else {
        if let Some(output) = args.output {
            let message = format!("--output {}: of which recipe? (`palettist init` lists them)", output.display());
            return Err(Usage(message).into());
        }
        for (name, text) in RECIPES {
            let title = text.lines().next().unwrap_or_default().trim_start_matches("# ");
            print(format_args!("{name:<22}{title}"))?;
        }
        return Ok(());
    };
    let Some((_, text)) = RECIPES.iter().find(|(known, _)| *known == name) else {
        let near = RECIPES
            .iter()
            .map(|(known, _)| *known)
            .max_by(|a, b| strsim::jaro_winkler(a, &name).total_cmp(&strsim::jaro_winkler(b, &name)));
        let hint = near.map_or_else(String::new, |near| format!("; did you mean {near}?"));
        return Err(Usage(format!("there is no recipe {name}{hint} (`palettist init` lists them)")).into());
    };
    let output = args.output.unwrap_or_else(|| format!("{name}.toml").into());
    if output.as_os_str() == "-" {
        return print(text.trim_end());
    }
    must_be_new(&output)?;
    // A schema of an earlier version is replaced; a file of that name that somebody else wrote stays.
    let schema = output.with_file_name(SCHEMA);
    let is_ours = || std::fs::read_to_string(&schema).is_ok_and(|text| text.contains(&format!("\"{SCHEMA_TITLE}\"")));
    let text = if !schema.exists() || is_ours() {
        write_bytes(&schema, json_schema().as_bytes())?;
        format!("#:schema ./{SCHEMA}\n{text}")
    } else {
        (*text).to_owned()
    };
    write_bytes(&output, text.as_bytes())?;
    print(format_args!("wrote {0}; fill in its paths, then: palettist check {0}", output.display()))
}
