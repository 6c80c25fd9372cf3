//! When training runs away: what is told, and advice that is true of the run at that moment.

use std::path::Path;

use super::state;
use super::trained::{Diverged, Trained};
use crate::config::Config;

/// `error` as it is, unless it comes of training that ran away: then that is said, with what to do.
///
/// `started` is the step that this process started from, and `step` the one that failed.
pub fn explained(
    error: anyhow::Error,
    config: &Config,
    trained: &Trained,
    checkpoints: &Path,
    (started, step): (u64, u64),
) -> anyhow::Error {
    if error.is::<super::stop::Stopped>() || crate::files::is_full_disk(&error) {
        return error;
    }
    let what = match error.downcast_ref::<Diverged>() {
        Some(Diverged(what)) => what.clone(),
        // Whatever stumbled over it, it is not at fault.
        None => match trained.fault() {
            Some(what) => what,
            None => return error,
        },
    };
    let rate = config.train.learning_rate;
    let saved = state::list(checkpoints);
    let newest = saved.last().map(|(_, path)| path.display());
    if step == started && trained.fault().is_none() {
        // Nothing has moved since, so no learning rate is to blame.
        let hint = match (newest, config.train.mixed_precision) {
            (Some(_), _) if saved.len() > 1 => {
                format!("resume from an earlier checkpoint: --resume {}", saved[saved.len() - 2].1.display())
            }
            (_, crate::config::MixedPrecision::Bf16) => "try train.mixed_precision = \"no\"".to_owned(),
            _ => "the model or the data are at fault: `palettist check` looks at both".to_owned(),
        };
        let moved = if started == 0 { "before any weight has changed" } else { "right after resuming" };
        return anyhow::anyhow!("{what} at step {step}, {moved}; {hint}");
    }
    let advice = match newest {
        Some(path) => format!(
            "the newest checkpoint, {path}, is from before that: the same command with a lower learning_rate resumes \
             from it"
        ),
        None => "no checkpoint was saved before that: the same command with a lower learning_rate starts again".into(),
    };
    anyhow::anyhow!("the training diverged: {what} at step {step}; learning_rate is {rate:?}; {advice}")
}
