//! `palettist clean`: what a finished run no longer needs.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};

use super::{Usage, print, size};
use crate::data::place::Place;
use crate::terminal::shell_word;
use crate::train::run_folder::{self, Holds, RunFolder};

/// Whether two paths lead to one folder.
fn is_same(one: &Path, other: &Path) -> bool {
    matches!((Place::of(one), Place::of(other)), (Ok(one), Ok(other)) if one.is(&other))
}

/// Deletes the checkpoints of a finished run, and what killed runs left half written; results stay
#[derive(clap::Args)]
pub struct Args {
    /// The run's folder, the config's output_dir
    #[arg(value_name = "RUN")]
    run: PathBuf,
    /// Only lists what would be deleted
    #[arg(long)]
    dry_run: bool,
}

pub fn run(args: Args) -> Result<()> {
    let path = &args.run;
    let shown = path.display();
    let look = || match RunFolder::of(path) {
        Ok(Holds::Run(run)) => Ok(run),
        Ok(_) if path.exists() => Err(Usage(format!("{shown} is not a run of palettist; nothing was deleted"))),
        Ok(_) => Err(Usage(format!("{shown} does not exist"))),
        Err(error) => Err(Usage(format!("{error:#}; nothing was deleted"))),
    };
    look()?;
    // A run in progress holds this lock; a folder that is only looked at may be read-only.
    let _lock = (!args.dry_run).then(|| run_folder::lock(path)).transpose()?;
    let run = look()?;
    if run.finished.is_none() {
        let (step, total) = (run.step(), run.config.train.max_train_steps);
        bail!(
            "{shown} is not finished (step {step} of {total}): it resumes from its checkpoints; nothing was deleted. To end \
             it: palettist train {} {}train.max_train_steps={}",
            shell_word(&path.join(run_folder::CONFIG).to_string_lossy()),
            // A run that was moved is to go on where it is.
            match is_same(&run.config.output_dir, path) {
                true => String::new(),
                false => shell_word(&format!("output_dir={shown}")) + " ",
            },
            step.max(1)
        );
    }
    if run.is_beyond_its_results() {
        bail!(
            "{shown} has trained beyond the steps of its results and resumes from its checkpoints; nothing was deleted"
        );
    }
    if let Some(link) = run.link() {
        bail!(
            "{} is a link, and what it leads to lies outside the run; delete that yourself, or move it here in its place; \
             nothing was deleted",
            link.display()
        );
    }
    if let Some(file) = run.stranger().filter(|_| !args.dry_run) {
        bail!("{} is not of the run; move it elsewhere first; nothing was deleted", file.display());
    }
    let (found, mut total) = (run.removable(), 0);
    for (path, bytes) in &found {
        if !args.dry_run {
            crate::files::remove(path)?;
        }
        print(format_args!("{}  {}", path.display(), size(*bytes)))?;
        total += bytes;
    }
    match (found.len(), args.dry_run) {
        (0, _) => print("nothing to delete"),
        (_, true) => print(format_args!("{} would be free; nothing was deleted", size(total))),
        (_, false) => print(format_args!("deleted: {}; results stay", size(total))),
    }
}
