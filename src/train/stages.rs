//! A run of two stages (`distill.teacher = "personalized"`): the first is a run of its own within the run's folder, so that it is
//! saved and resumed as any other; the second starts from its model.

use anyhow::{Context, Result};

use super::plan::{self, Action, Resume};
use super::refused::refused;
use super::stop::Stopped;
use super::{run_folder, state};
use crate::config::Config;
use crate::terminal::tell;

/// How a run, or a stage of one, ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    Done,
    /// Stopped by [`super::stop`], after saving.
    Stopped,
}

/// Where a stage stands in a run: steps of the one before it, and of the one after.
#[derive(Clone, Copy, Debug)]
pub struct Stage {
    pub before: u64,
    pub after: u64,
}

/// The first of two stages, unless it is finished: a run of its own within the run's folder, which `train` does.
///
/// # Errors
/// Its model is gone, with the checkpoints that it could be written from; those of [`plan::plan`] and `train`.
pub fn first(config: &Config, first: &Config, train: impl FnOnce(&Config, Stage) -> Result<Ended>) -> Result<Ended> {
    let about = "the first stage (distill.personalize_steps, distill.personalize_learning_rate)";
    let folder = first.output_dir.display();
    match plan::plan(first, &Resume::Auto).context(about)?.action {
        Action::Finished { gone, .. } if gone.is_empty() => {}
        Action::Finished { gone, .. } => {
            return refused(format!(
                "{folder}, {about}, lacks {}, which its checkpoints are not there to write again; delete that folder to \
                 have the stage run again",
                gone.join(", ")
            ));
        }
        _ => {
            tell(format_args!("stage 1 of 2: learning in float, {} steps, in {folder}", first.train.max_train_steps));
            let place = Stage { before: 0, after: config.train.max_train_steps };
            let ended = train(first, place);
            if let Ended::Stopped =
                ended.map_err(|error| if error.is::<Stopped>() { error } else { error.context(about) })?
            {
                return Ok(Ended::Stopped);
            }
        }
    }
    // The second stage needs its model alone.
    for (_, checkpoint) in state::list(&first.output_dir.join(run_folder::CHECKPOINTS)) {
        crate::files::remove(&checkpoint)?;
    }
    tell(format_args!("stage 2 of 2: {} steps from the model in {folder}", config.train.max_train_steps));
    Ok(Ended::Done)
}
