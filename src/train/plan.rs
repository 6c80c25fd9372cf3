//! What a config would do in its `output_dir`: decided once, for `train` and for `check`.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::finished::{Finished, file_of};
use super::identity::Identity;
use super::refused::refused;
use super::run_folder::{CHECKPOINTS, FINISHED, Holds, OWN_FOLDERS, PACKAGES, REPORT, RunFolder, wanted};
use super::state;
use crate::config::{self, Change, Config, Difference};
use crate::data::manifest::Picture;
use crate::data::place::Place;
use crate::data::{Class, Manifest, Sample};

/// Which state a run starts from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Resume {
    /// The newest checkpoint in `output_dir`, if there is one.
    Auto,
    /// From the beginning; an `output_dir` with a run in it is refused.
    Never,
    /// This checkpoint.
    From(PathBuf),
}

/// What a config would do in its `output_dir`.
pub struct Plan {
    pub action: Action,
    /// To be told, a line each: what changed and is accepted.
    pub notes: Vec<String>,
}

pub enum Action {
    /// Trains from the beginning.
    Start,
    /// Nothing is left to do; these results are gone, and there is no checkpoint to write them from.
    Finished { step: u64, gone: Vec<String>, learned_from: Option<Box<Identity>> },
    /// Goes on from a checkpoint.
    Resume(Box<Resumed>),
}

pub struct Resumed {
    pub checkpoint: PathBuf,
    pub facts: state::Facts,
    /// Only these results are to be written: nothing is left to train. All of them where there is none.
    pub only: Option<BTreeSet<String>>,
    /// Where it begins a new branch: the checkpoints beyond it, which are set aside first, with metrics, samples and
    /// results.
    pub beyond: Option<Vec<PathBuf>>,
}

/// Decides what a config would do in its `output_dir`; writes nothing.
///
/// # Errors
/// The folder holds something else, another run, or results that would be overwritten: says what, and what to do.
pub fn plan(config: &Config, resume: &Resume) -> Result<Plan> {
    let folder = &config.output_dir;
    if let Some((key, pictures)) = config.picture_folders().into_iter().find(|(_, path)| is_own(folder, path)) {
        return refused(format!(
            "{key} ({}) is a folder in {} that the run writes to itself; set another one",
            pictures.display(),
            folder.display()
        ));
    }
    let shown = folder.display();
    let run = match RunFolder::of(folder).context("output_dir")? {
        Holds::Other(entry) => {
            return refused(format!(
                "the output folder {shown} exists and is not a run of this program (it holds {entry}); set another \
                 `output_dir`"
            ));
        }
        Holds::Nothing => None,
        Holds::Run(run) => Some(run),
    };
    if let Some((step, path)) = state::misnamed(&folder.join(CHECKPOINTS)).into_iter().next() {
        return refused(format!(
            "{} is a checkpoint of step {step} under another step's name; move it out of {CHECKPOINTS}/, or name it \
             step-{step:06}",
            path.display()
        ));
    }
    let start = |notes| Ok(Plan { action: Action::Start, notes });
    let checkpoint = match (resume, &run) {
        (Resume::From(path), _) => Some(path.clone()),
        (Resume::Never, Some(_)) => {
            return refused(format!(
                "the output folder {shown} holds a run already; set another `output_dir`, or resume it"
            ));
        }
        (_, None) => return start(Vec::new()),
        (_, Some(run)) => run.checkpoints.last().map(|(_, path)| path.clone()),
    };
    if let (Resume::Auto, Some(run)) = (resume, &run)
        && let Some(finished) = &run.finished
        && (finished.step >= config.train.max_train_steps || checkpoint.is_none())
    {
        return finished_plan(config, run, finished, checkpoint);
    }
    let Some(checkpoint) = checkpoint else {
        let run = run.context("a folder without a run has been started above")?;
        return without_checkpoint(config, &run);
    };
    let facts = state::facts(&checkpoint)?;
    let before = config::parse_resolved(&facts.config, "its config.resolved.toml")
        .with_context(|| format!("the checkpoint {}", checkpoint.display()))?;
    let mut notes = accepted(&before, config).with_context(|| format!("the output folder {shown}"))?;
    let total = config.train.max_train_steps;
    if facts.step > total {
        return refused(format!(
            "the checkpoint {} has done {} steps, and max_train_steps is {total}: set it to at least {}, or resume from an \
             earlier checkpoint with --resume",
            checkpoint.display(),
            facts.step,
            facts.step
        ));
    }
    notes.extend(run.as_deref().and_then(|run| of_the_old_name(config, run)));
    let beyond = match (resume, run) {
        (Resume::From(_), Some(run)) => run.beyond(&checkpoint, facts.step),
        _ => None,
    };
    Ok(Plan { action: Action::Resume(Box::new(Resumed { checkpoint, facts, only: None, beyond })), notes })
}

/// Whether a folder of pictures is one of those that a run in `output` writes to, or lies in one.
fn is_own(output: &Path, pictures: &Path) -> bool {
    let Ok(pictures) = Place::of(pictures) else { return false };
    let own = OWN_FOLDERS.iter().filter_map(|name| Place::of(&output.join(name)).ok());
    own.into_iter().any(|own| pictures.is_within(&own))
}

/// The plan for a run that is finished, or whose config asks for no more steps.
fn finished_plan(config: &Config, run: &RunFolder, finished: &Finished, checkpoint: Option<PathBuf>) -> Result<Plan> {
    let (shown, total) = (run.path.display(), config.train.max_train_steps);
    let before = config::parse_resolved(&finished.config, FINISHED)
        .with_context(|| format!("{}", run.path.join(FINISHED).display()))?;
    let differences = before.differences(config);
    refuse(&differences).with_context(|| format!("the output folder {shown}"))?;
    if finished.step < total {
        return refused(format!(
            "the run in {shown} is finished ({} steps) and its checkpoints are gone, so that it cannot go on to \
             max_train_steps = {total}; set another `output_dir`",
            finished.step
        ));
    }
    if finished.step > total {
        return refused(format!(
            "the run in {shown} is finished, with {} steps, and max_train_steps is {total}; set it back, or set another \
             `output_dir`",
            finished.step
        ));
    }
    // Packages made for something else are to be made again.
    let export = differences.iter().any(|difference| difference.key.starts_with("export."));
    let is_there = |result: &String| {
        let files = finished.results.get(result);
        let stale = export && result.starts_with(PACKAGES);
        !stale && files.is_some_and(|files| files.keys().all(|file| file_of(&run.path.join(result), file).exists()))
    };
    let missing: BTreeSet<String> = wanted(config).into_iter().filter(|result| !is_there(result)).collect();
    let step = finished.step;
    let last = checkpoint.filter(|_| run.checkpoints.last().is_some_and(|(saved, _)| *saved == step));
    let has_last = last.is_some();
    let action = match last {
        Some(checkpoint) if !missing.is_empty() => {
            let facts = state::facts(&checkpoint)?;
            Action::Resume(Box::new(Resumed { checkpoint, facts, only: Some(missing), beyond: None }))
        }
        _ => {
            let learned_from = Some(Box::new(finished.learned_from.clone()));
            Action::Finished { step, gone: missing.into_iter().collect(), learned_from }
        }
    };
    // What a run that learns nothing more cannot take up; another name it can.
    let unused: Vec<String> = differences
        .iter()
        .filter(|difference| difference.change == Change::Notice && difference.key != "name")
        .map(told)
        .collect();
    let mut notes: Vec<String> = of_the_old_name(config, run).into_iter().collect();
    let results = wanted(config);
    let changed = results.iter().filter_map(|result| finished.changed_file(result, &run.path.join(result)));
    notes.extend(changed.map(|file| {
        let way_out = match has_last {
            true => "; delete it to have `train` write it again",
            false => "",
        };
        format!("{} is not as the run wrote it: it was changed, or is damaged{way_out}", file.display())
    }));
    if !unused.is_empty() {
        notes.push(format!("not used, because nothing is left to learn: {}", unused.join(", ")));
    }
    Ok(Plan { action, notes })
}

/// A remark on the results of a run that goes on under another name: they stay, and are not kept up.
fn of_the_old_name(config: &Config, run: &RunFolder) -> Option<String> {
    let (name, finished) = (run.name(), run.finished.as_ref()?);
    let wanted = wanted(config);
    let left = finished.results.keys().filter(|result| !wanted.contains(*result) && run.path.join(result).exists());
    let left: Vec<&str> = left.map(String::as_str).collect();
    (name != config.name && !left.is_empty()).then(|| {
        format!(
            "the run is called {} now (was {name}); what it wrote under the old name stays as it is in {}: {}",
            config.name,
            run.path.display(),
            left.join(", ")
        )
    })
}

/// `learning_rate = 1e-5 (was 1e-6)`
fn told(difference: &Difference) -> String {
    let key = difference.key.strip_prefix("train.").unwrap_or(&difference.key);
    let [was, is] = [&difference.before, &difference.now].map(|v| v.as_deref().unwrap_or("not set"));
    format!("{key} = {is} (was {was})")
}

/// The plan for a run that has no checkpoint and is not known to be finished.
fn without_checkpoint(config: &Config, run: &RunFolder) -> Result<Plan> {
    let shown = run.path.display();
    let results = run.results();
    if !results.is_empty() {
        // An older version did not write that it is finished; its report came last.
        let differences = run.config.differences(config);
        if results.iter().any(|result| result == REPORT)
            && refuse(&differences).is_ok()
            && run.config.train.max_train_steps == config.train.max_train_steps
        {
            let step = config.train.max_train_steps;
            let action = Action::Finished { step, gone: Vec::new(), learned_from: None };
            return Ok(Plan { action, notes: Vec::new() });
        }
        return refused(format!(
            "the output folder {shown} holds results ({}) and no checkpoint to go on from: they would be overwritten; set \
             another `output_dir`, or move them away",
            results.join(", ")
        ));
    }
    // Ended before its first checkpoint: nothing is lost by beginning again, if it was this run.
    if run.name() != config.name {
        let name = run.name();
        return refused(format!("the output folder {shown} is that of the run `{name}`; set another `output_dir`"));
    }
    // A first stage says itself where it goes on.
    let first = config.first_stage().is_some_and(|first| first.output_dir.is_dir());
    let note = (!first).then(|| format!("{shown} holds no checkpoint: this run starts from the beginning"));
    Ok(Plan { action: Action::Start, notes: note.into_iter().collect() })
}

/// What a resumed run says of a config that changed; `Err` where it would be another run.
///
/// # Errors
/// Each key that may not change, with both values.
pub fn accepted(before: &Config, now: &Config) -> Result<Vec<String>> {
    let differences = before.differences(now);
    refuse(&differences)?;
    let noticed: Vec<String> =
        differences.iter().filter(|difference| difference.change == Change::Notice).map(told).collect();
    Ok(if noticed.is_empty() { Vec::new() } else { vec![format!("continuing with {}", noticed.join(", "))] })
}

fn refuse(differences: &[Difference]) -> Result<()> {
    let changed: Vec<String> =
        differences.iter().filter(|difference| difference.change == Change::Refused).map(ToString::to_string).collect();
    if changed.is_empty() {
        return Ok(());
    }
    let (it, these) = if changed.len() == 1 { ("it", "a key") } else { ("them", "keys") };
    refused(format!(
        "{}: {these} that may not change when a run is resumed; change {it} back, or set another `output_dir`",
        changed.join("; ")
    ))
}

/// What a run that is resumed learned from.
#[derive(Clone, Copy)]
pub struct Before<'a> {
    /// `None` where nothing is resumed, and of runs of older versions, which kept none.
    pub learned_from: Option<&'a Identity>,
    /// The run's; `setup::open` makes it its own once all is known to be right, before the long work.
    pub folder: &'a Path,
    /// Whether a run is resumed.
    pub resumes: bool,
}

impl Before<'_> {
    /// Refuses to resume where what the run learns from is not what it was.
    ///
    /// # Errors
    /// What changed.
    pub fn check(self, now: &Identity) -> Result<()> {
        let changes = self.learned_from.map(|before| before.changes(now)).unwrap_or_default();
        if changes.is_empty() {
            return Ok(());
        }
        refused(format!(
            "the run in {} learned from something else: {}; change it back, or set another `output_dir`",
            self.folder.display(),
            changes.join("; ")
        ))
    }

    /// As [`check`](Self::check), before class pictures are drawn: those that are gone may come again, those that would be
    /// drawn from something else may not.
    ///
    /// # Errors
    /// What changed. A picture can't be read.
    pub fn check_so_far(self, now: &Identity, class: Option<&Class>) -> Result<()> {
        self.check_outdated(class)?;
        let class = |identity: &Identity| identity.data.pictures.iter().filter(|picture| picture.is_class).count();
        let Some(before) = self.learned_from.filter(|before| class(now) < class(before)) else {
            return self.check(now);
        };
        let without_class = |identity: &Identity| {
            let mut identity = identity.clone();
            identity.data.pictures.retain(|picture| !picture.is_class);
            identity
        };
        Before { learned_from: Some(&without_class(before)), ..self }.check(&without_class(now))
    }

    /// Refuses where pictures that the run learned from would give way to pictures drawn from something else.
    fn check_outdated(self, class: Option<&Class>) -> Result<()> {
        let (Some(before), Some(class)) = (self.learned_from, class.filter(|class| class.missing > 0)) else {
            return Ok(());
        };
        let outdated: Vec<Sample> = class.outdated.iter().map(|outdated| outdated.sample.clone()).collect();
        let outdated = Manifest::of(&outdated)?;
        let learned = |picture: &Picture| {
            before.data.pictures.iter().any(|before| before.is_class && before.sha256 == picture.sha256)
        };
        match outdated.pictures.iter().filter(|picture| learned(picture)).count() {
            0 => Ok(()),
            count => refused(format!(
                "the run in {} learned from {count} of the class pictures in {}, which the model would not draw so today; \
                 change back what they were drawn from, or set another `output_dir`",
                self.folder.display(),
                class.folder.display()
            )),
        }
    }
}

/// What is told of a run that is finished: results that are gone and can't be written again, and data that changed since.
/// `now` is what the config would learn from today, if that is there: data that are gone were needed for training only.
pub fn is_finished(
    config: &Config,
    step: u64,
    gone: &[String],
    learned_from: Option<&Identity>,
    now: impl FnOnce() -> Option<Identity>,
) -> Vec<String> {
    let folder = config.output_dir.display();
    let more = match state::list(&config.output_dir.join(CHECKPOINTS)).is_empty() {
        true => "Its checkpoints are gone: to train longer, set another `output_dir`",
        false => "A larger max_train_steps trains longer",
    };
    let mut lines = vec![format!("{folder} is finished ({step} steps); nothing was written. {more}")];
    let (there, gone): (Vec<&String>, Vec<&String>) =
        gone.iter().partition(|result| config.output_dir.join(result.as_str()).exists());
    if !there.is_empty() {
        lines.push(format!(
            "note: made with other settings of [export]: {}; without its last checkpoint they are not made again (`palettist \
             export {folder}` makes packages as its options say)",
            there.into_iter().map(String::as_str).collect::<Vec<_>>().join(", ")
        ));
    }
    if !gone.is_empty() {
        let gone: Vec<&str> = gone.into_iter().map(String::as_str).collect();
        lines.push(format!(
            "note: missing in it: {}; without its last checkpoint they cannot be written again (`palettist export \
             {folder}` makes packages of what is there)",
            gone.join(", ")
        ));
    }
    if let Some(before) = learned_from
        && let Some(now) = now()
    {
        let changes = before.changes(&now);
        if !changes.is_empty() {
            let changes = changes.join("; ");
            lines.push(format!("note: since it was trained, {changes}; to train on that, set another `output_dir`"));
        }
    }
    lines
}

impl RunFolder {
    /// The checkpoints that a run that starts again from `checkpoint`, of this step, leaves behind; `None` where it leaves
    /// nothing behind.
    fn beyond(&self, checkpoint: &Path, step: u64) -> Option<Vec<PathBuf>> {
        let real = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_owned());
        let own = self.checkpoints.iter().any(|(_, path)| real(path) == real(checkpoint));
        // Those of another branch are no history of this one.
        let left = self.checkpoints.iter().filter(|(saved, _)| !own || *saved > step);
        let left: Vec<PathBuf> = left.map(|(_, path)| path.clone()).collect();
        (!left.is_empty() || self.step() > step).then_some(left)
    }
}
