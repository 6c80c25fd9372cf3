//! `palettist compile`.

use std::path::{Path, PathBuf};

use anyhow::Result;

use super::{Mistakes, Usage, check_output, print};
use crate::coreml::compiling::{InTheWay, check_place, compile};
use crate::terminal::Copying;

/// Compiles packages to the folders that apps load, NAME.mlmodelc, on any machine: no Mac is needed
#[derive(clap::Args)]
pub struct Args {
    /// .mlpackage folders, of whatever converter: ML Programs of specification version 6 to 9 with fixed shapes
    #[arg(required = true, value_name = "PACKAGE")]
    packages: Vec<PathBuf>,
    /// The folder to write into, each package as NAME.mlmodelc. Weights are shared with the package where the disk can
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
    /// Replaces compiled models that are there already, each once its successor is written
    #[arg(long)]
    overwrite: bool,
}

pub fn run(args: Args) -> Result<()> {
    let mut places: Vec<PathBuf> = Vec::new();
    for package in &args.packages {
        let Some(name) = package.file_stem() else {
            return Err(Usage(format!("{} does not name a package", package.display())).into());
        };
        let place = args.output.join(Path::new(name).with_added_extension("mlmodelc"));
        if places.contains(&place) {
            return Err(Usage(format!("two of the packages would be {}", place.display())).into());
        }
        check_place(&place, args.overwrite).map_err(|taken| refusal(&taken))?;
        places.push(place);
    }
    check_output(&args.output)?;
    let mut failed = Vec::new();
    for (package, place) in args.packages.iter().zip(&places) {
        let mut copying = Copying::default();
        match compile(package, place, args.overwrite, &mut |done, total| copying.hear(done, total)) {
            Ok(shared) => print(format_args!("{}: {shared}", place.display()))?,
            // It came there meanwhile.
            Err(error) if error.is::<InTheWay>() => return Err(Usage(format!("{error:#}")).into()),
            Err(error) => failed.push(format!("{error:#}").lines().next().unwrap_or_default().to_owned()),
        }
    }
    if failed.is_empty() { Ok(()) } else { Err(Mistakes(failed).into()) }
}

fn refusal(taken: &InTheWay) -> Usage {
    let hint = if matches!(taken, InTheWay::Compiled(_)) { ": --overwrite replaces it" } else { "" };
    Usage(format!("{taken}{hint}"))
}
