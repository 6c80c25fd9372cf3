//! A run's folder, `output_dir`: what everything in it is called, what state the run is in.
//! `train` and `check` ask what a config would do there (`plan`), `clean` and whatever takes a model ask
//! [`RunFolder::of`].
//!
//! | name | is |
//! |---|---|
//! | `config.resolved.toml` | the config with every default written out; makes the folder a run's |
//! | `checkpoints/step-000800/` | what a run resumes from (`state`) |
//! | `checkpoints/set-aside-1/` | what a run had beyond an older checkpoint that it was resumed from |
//! | `personalized/` | the first of two stages, a run of its own (`distill.teacher = "personalized"`) |
//! | `logs/`, `samples/` | what it told on the way |
//! | `NAME.palettes.safetensors`, `NAME.subject.safetensors`, `model/`, `coreml/`, `report.html` | its results |
//! | `finished.json` | that it is finished: steps, what it learned from, the results' files |
//! | `train.lock` | locked while a run writes here |

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::finished::{Finished, mark};
use super::refused::refused;
use super::state;
use crate::config::{self, Config, PERSONALIZED, TrainedComponent};
use crate::coreml::PackageMetadata;
use crate::coreml::components::Part;
use crate::coreml::exporting::plan::package_names;
use crate::data::listing::is_of_the_system;
use crate::files::{NotAFolder, beside, write_bytes};
use crate::source::{Model, ModelOptions};

pub const CONFIG: &str = "config.resolved.toml";
pub const CHECKPOINTS: &str = "checkpoints";
pub const LOGS: &str = "logs";
pub const METRICS: &str = "metrics.jsonl";
pub const SAMPLES: &str = "samples";
pub const MODEL: &str = "model";
pub const PACKAGES: &str = "coreml";
pub const REPORT: &str = "report.html";
pub const FINISHED: &str = "finished.json";
const LOCK: &str = "train.lock";
/// Endings of the files with what a run made.
const PALETTES: &str = ".palettes.safetensors";
const SUBJECT: &str = ".subject.safetensors";
const SET_ASIDE: &str = "set-aside-";

/// The palettized checkpoint of a run of this name.
pub fn palettes_file(name: &str) -> String {
    format!("{name}{PALETTES}")
}

/// What a run of this name learnt on a palettized base.
pub fn subject_file(name: &str) -> String {
    format!("{name}{SUBJECT}")
}

/// What results a config asks for, as paths in the run's folder.
pub fn wanted(config: &Config) -> Vec<String> {
    let mut wanted = vec![MODEL.to_owned()];
    if config.train.component == TrainedComponent::Autoencoder {
        return wanted;
    }
    if config.palettize.enabled {
        wanted.push(palettes_file(&config.name));
        if config.palettize.palettes.is_some() {
            wanted.push(subject_file(&config.name));
        }
    }
    if config.export.coreml {
        wanted.extend(config.export.parts().into_iter().flat_map(|part| packages(config, part)));
    }
    wanted.push(REPORT.to_owned());
    wanted
}

/// Where the package of a network lies in a run's folder; its chunks, where it is cut.
pub fn packages(config: &Config, part: Part) -> Vec<String> {
    let metadata = PackageMetadata { model: config.name.clone(), ..PackageMetadata::default() };
    let export = &config.export;
    let names = package_names(&metadata, part, export.unet_support_controlnet, export.chunk_unet);
    names.into_iter().map(|name| format!("{PACKAGES}/{name}")).collect()
}

/// A run on the disk.
pub struct RunFolder {
    pub path: PathBuf,
    /// As it was run last.
    pub config: Config,
    pub finished: Option<Finished>,
    /// The whole ones, oldest first.
    pub checkpoints: Vec<(u64, PathBuf)>,
}

/// What a folder holds.
pub enum Holds {
    /// Nothing, or no folder is there.
    Nothing,
    /// Something that is not a run; one of its entries.
    Other(String),
    Run(Box<RunFolder>),
}

impl RunFolder {
    /// Looks at what `path` holds; reads no tensor.
    ///
    /// # Errors
    /// It is a file; the run's own files can't be read.
    pub fn of(path: &Path) -> Result<Holds> {
        let shown = path.display();
        if path.exists() && !path.is_dir() {
            return refused(format!("{shown} is a file, not a folder"));
        }
        let resolved = path.join(CONFIG);
        let text = match fs::read_to_string(&resolved) {
            Ok(text) => text,
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
                // A run that wrote nothing yet, and what file managers leave.
                let ours = |name: &str| {
                    name == LOCK || is_of_the_system(name) || (name.starts_with('.') && name.contains(CONFIG))
                };
                let entries = fs::read_dir(path).into_iter().flatten().flatten();
                let mut names: Vec<String> =
                    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
                names.retain(|name| !ours(name));
                names.sort();
                return Ok(names.into_iter().next().map_or(Holds::Nothing, Holds::Other));
            }
            Err(error) => return Err(error).with_context(|| format!("cannot read {}", resolved.display())),
        };
        let config = config::parse_resolved(&text, &resolved.display().to_string())
            .with_context(|| format!("{shown} is a run whose config cannot be read"))?;
        let finished = path.join(FINISHED);
        let finished = match fs::read(&finished) {
            Err(_) => None,
            Ok(bytes) => Some(serde_json::from_slice(&bytes).with_context(|| {
                format!("{} is damaged; delete it to have the results written again", finished.display())
            })?),
        };
        let checkpoints = state::list(&path.join(CHECKPOINTS));
        Ok(Holds::Run(Box::new(Self { path: path.to_owned(), config, finished, checkpoints })))
    }

    /// The run's name.
    pub fn name(&self) -> &str {
        &self.config.name
    }

    /// Results that are there.
    pub fn results(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.path).into_iter().flatten().flatten();
        let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
        let mut found: Vec<String> = names
            .filter(|name| {
                [PALETTES, SUBJECT].iter().any(|ending| name.ends_with(ending)) && !name.starts_with('.')
                    || [MODEL, PACKAGES, REPORT].contains(&name.as_str())
            })
            .collect();
        found.sort();
        found
    }

    /// Opens a model; where `model` is a run's folder, the one that the run made, under the run's name.
    ///
    /// # Errors
    /// As [`Model::open_with`]; a run that has no model, because it is not finished, or trained an autoencoder alone.
    pub fn open(model: &str, options: &ModelOptions) -> Result<(Model, Option<Box<Self>>)> {
        Ok(match Self::model_of(Path::new(model))? {
            Some((run, made)) => (Model::open_with(&made.to_string_lossy(), options)?.named(run.name()), Some(run)),
            None => (Model::open_with(model, options)?, None),
        })
    }

    /// Where `path` is a run's folder: the run, and the folder of the model that it made.
    fn model_of(path: &Path) -> Result<Option<(Box<Self>, PathBuf)>> {
        if !path.join(CONFIG).is_file() {
            return Ok(None);
        }
        let Holds::Run(run) = Self::of(path)? else { return Ok(None) };
        let (shown, model) = (path.display(), path.join(MODEL));
        if run.config.train.component == TrainedComponent::Autoencoder {
            bail!(
                "{shown} is the run of an autoencoder: it has made {} and no whole model",
                model.join("vae").display()
            );
        }
        if model.is_dir() {
            return Ok(Some((run, model)));
        }
        let (step, total) = (run.step(), run.config.train.max_train_steps);
        match run.finished {
            Some(_) => {
                bail!("{shown} is a run whose {MODEL}/ is gone: `palettist train` with its config writes it again")
            }
            None => bail!(
                "{shown} is a run that is not finished (step {step} of {total}): `palettist train` with its config goes \
                 on; its results come at its end"
            ),
        }
    }

    /// The palettized checkpoint that the run made, where it made one.
    ///
    /// # Errors
    /// It is gone, or another file has its name.
    pub fn palettes(&self) -> Result<Option<PathBuf>> {
        // The results are under the name that the run had when it wrote them: it may go on under another.
        let results = || self.finished.iter().flat_map(|finished| &finished.results);
        let named = palettes_file(self.name());
        let found = results().find(|(name, _)| **name == named);
        let found = found.or_else(|| results().find(|(name, _)| name.ends_with(PALETTES)));
        let (name, made) = found.map_or((named.as_str(), None), |(name, made)| (name.as_str(), Some(made)));
        let path = self.path.join(name);
        match made {
            None => Ok((self.config.palettize.enabled && path.is_file()).then_some(path)),
            Some(_) if !path.is_file() => bail!(
                "{} is missing, the palettes of this run; `palettist train` with its config writes them again from its \
                 last checkpoint",
                path.display()
            ),
            Some(made) if made.values().next() == Some(&mark(&path)?) => Ok(Some(path)),
            Some(_) => match self.finished.as_ref().filter(|_| self.is_beyond_its_results()) {
                Some(finished) => bail!(
                    "{} is not the file that the run wrote at step {}: a longer run was writing its results and was cut \
                     off; `palettist train` with its config finishes that",
                    path.display(),
                    finished.step
                ),
                None => bail!(
                    "{} is not the file that this run wrote: put that back, name the palettes with --palettes, or delete it \
                     and run `palettist train` with its config, which writes it again from the last checkpoint",
                    path.display()
                ),
            },
        }
    }

    /// The step that the run has reached.
    pub fn step(&self) -> u64 {
        let saved = self.checkpoints.last().map_or(0, |(step, _)| *step);
        self.finished.as_ref().map_or(saved, |finished| finished.step.max(saved))
    }

    /// Whether it has gone on since its results were written.
    pub fn is_beyond_its_results(&self) -> bool {
        self.finished.as_ref().is_some_and(|finished| finished.step < self.step())
    }

    /// The whole checkpoints, those set aside too.
    fn all_checkpoints(&self) -> Vec<PathBuf> {
        let asides = asides(&self.path.join(CHECKPOINTS));
        let aside = asides.iter().flat_map(|(_, aside)| state::list(aside));
        self.checkpoints.iter().cloned().chain(aside).map(|(_, path)| path).collect()
    }

    /// A file in one of the checkpoints that is not the run's: a user's.
    pub fn stranger(&self) -> Option<PathBuf> {
        self.all_checkpoints().iter().find_map(|checkpoint| state::stranger(checkpoint))
    }

    /// A link among the run's folders: what it leads to lies elsewhere and is not the run's to delete.
    pub fn link(&self) -> Option<PathBuf> {
        let asides = asides(&self.path.join(CHECKPOINTS)).into_iter().map(|(_, aside)| aside);
        let own = folders(&self.path).into_iter().skip(1);
        own.chain(folders(&self.path.join(PERSONALIZED)))
            .chain(asides)
            .chain(self.all_checkpoints())
            .find(|path| path.is_symlink())
    }

    /// The files that `clean` removes, with their sizes: checkpoints, those set aside too, and what killed processes left.
    pub fn removable(&self) -> Vec<(PathBuf, u64)> {
        let mut found = self.all_checkpoints();
        let first = self.path.join(PERSONALIZED);
        if let Ok(Holds::Run(first)) = Self::of(&first) {
            found.extend(first.all_checkpoints());
        }
        for folder in folders(&self.path).into_iter().chain(folders(&first)) {
            found.extend(beside::leftovers(&folder).into_iter().filter_map(|(found, place, kind)| {
                let only_copy = [beside::OLD, beside::NEW].contains(&kind.as_str()) && !place.exists();
                (!only_copy).then_some(found)
            }));
        }
        found.into_iter().map(|path| (path.clone(), size(&path))).collect()
    }
}

/// The folders in a run's that the run writes to.
pub const OWN_FOLDERS: [&str; 6] = [CHECKPOINTS, LOGS, SAMPLES, MODEL, PACKAGES, PERSONALIZED];

/// The folders of a run in which this program writes.
fn folders(run: &Path) -> Vec<PathBuf> {
    let mut folders = vec![run.to_owned()];
    folders.extend([CHECKPOINTS, LOGS, SAMPLES, PACKAGES].map(|name| run.join(name)));
    folders
}

/// Bytes of a file, or of all files of a folder.
fn size(path: &Path) -> u64 {
    match fs::symlink_metadata(path) {
        Ok(data) if data.is_dir() => fs::read_dir(path).into_iter().flatten().flatten().map(|e| size(&e.path())).sum(),
        Ok(data) => data.len(),
        Err(_) => 0,
    }
}

/// The process that is writing to a run's folder, as far as that can be told; asks without writing.
pub fn busy(folder: &Path) -> Option<String> {
    let path = folder.join(LOCK);
    let file = File::open(&path).ok()?;
    let busy = matches!(file.try_lock(), Err(TryLockError::WouldBlock));
    busy.then(|| fs::read_to_string(&path).unwrap_or_default())
}

/// Keeps other runs out of a folder. A folder in which nothing was written meanwhile is left as it was found.
pub struct Lock {
    folder: PathBuf,
    /// The folders that were made for it, innermost first.
    made: Vec<PathBuf>,
    /// The system unlocks it however the process ends.
    _file: File,
}

impl Drop for Lock {
    fn drop(&mut self) {
        let holds_nothing_else =
            fs::read_dir(&self.folder).is_ok_and(|mut entries| entries.all(|e| e.is_ok_and(|e| e.file_name() == LOCK)));
        if holds_nothing_else {
            // What is not removed does no harm.
            let _ = fs::remove_file(self.folder.join(LOCK));
            let _ = self.made.iter().try_for_each(fs::remove_dir);
        }
    }
}

/// Keeps other runs out of `folder`, which is made where needed, until what is returned is dropped.
///
/// # Errors
/// Another run holds it; it can't be written.
pub fn lock(folder: &Path) -> Result<Lock> {
    let made = folder.ancestors().take_while(|above| *above != Path::new("") && !above.exists()).map(Path::to_owned);
    let made: Vec<PathBuf> = made.collect();
    fs::create_dir_all(folder).with_context(|| format!("cannot create the output folder {}", folder.display()))?;
    let path = folder.join(LOCK);
    let file = OpenOptions::new().create(true).truncate(false).write(true).open(&path);
    let mut file = file.with_context(|| format!("cannot write {}", path.display()))?;
    match file.try_lock() {
        // A run that was refused has just removed it.
        Ok(()) if !path.exists() => return lock(folder),
        Ok(()) => {
            // Who it is, for the other's message; without it that is only less clear.
            let _ = file.set_len(0).and_then(|()| write!(file, "{}", std::process::id()));
        }
        Err(TryLockError::WouldBlock) => {
            bail!("{}", told_busy(folder, &fs::read_to_string(&path).unwrap_or_default()))
        }
        // Some network file systems have no locks: that is no reason not to train.
        Err(TryLockError::Error(_)) => {}
    }
    Ok(Lock { folder: folder.to_owned(), made, _file: file })
}

/// Writes the first file of a run, which makes `folder` its own.
///
/// # Errors
/// The folder can't be written.
pub fn begin(folder: &Path, config: &Config) -> Result<()> {
    write_bytes(&folder.join(CONFIG), config.resolved_toml().as_bytes())
}

/// What is said of a folder that another `process` is writing to.
pub fn told_busy(folder: &Path, process: &str) -> String {
    format!(
        "another run (process {process}) is writing to the output folder {}; wait for its end, or set another `output_dir`",
        folder.display()
    )
}

/// Removes what killed runs left in the folder of one, which is held.
pub fn tidy(run: &Path) {
    folders(run).iter().for_each(|folder| beside::tidy(folder));
}

/// The folders that hold what was set aside, by number.
fn asides(checkpoints: &Path) -> Vec<(u64, PathBuf)> {
    let entries = fs::read_dir(checkpoints).into_iter().flatten().flatten();
    let number = |name: &str| name.strip_prefix(SET_ASIDE)?.parse::<u64>().ok();
    let mut found: Vec<_> = entries.filter_map(|e| Some((number(e.file_name().to_str()?)?, e.path()))).collect();
    found.sort();
    found
}

/// The metrics of the run that saved a checkpoint, which lies in its folder or was set aside there.
pub fn metrics_beside(checkpoint: &Path) -> Option<Vec<u8>> {
    let folder = checkpoint.parent()?;
    let aside = folder.join(METRICS);
    let metrics = if aside.is_file() { aside } else { folder.parent()?.join(LOGS).join(METRICS) };
    fs::read(metrics).ok()
}

/// Moves what a run had beyond the checkpoint that it starts again from (of `step`) to `checkpoints/set-aside-N/`: later
/// checkpoints, its metrics, later samples and its results. Returns that folder.
///
/// # Errors
/// Something can't be moved.
pub fn set_aside(run: &Path, beyond: &[PathBuf], step: u64) -> Result<PathBuf> {
    let checkpoints = run.join(CHECKPOINTS);
    let number = asides(&checkpoints).last().map_or(1, |(number, _)| number + 1);
    let aside = checkpoints.join(format!("{SET_ASIDE}{number}"));
    fs::create_dir_all(&aside).with_context(|| format!("cannot create {}", aside.display()))?;
    let shift = |from: &Path, to: PathBuf| {
        if let Some(folder) = to.parent() {
            fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
        }
        fs::rename(from, &to).with_context(|| format!("cannot move {} to {}", from.display(), to.display()))
    };
    // Copied, because the lines up to the step are kept.
    let metrics = run.join(LOGS).join(METRICS);
    if metrics.is_file() {
        let to = aside.join(METRICS);
        fs::copy(&metrics, &to).with_context(|| format!("cannot copy {} to {}", metrics.display(), to.display()))?;
    }
    for entry in fs::read_dir(run.join(SAMPLES)).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let of = name.to_str().and_then(|name| name.strip_prefix("step-")?.strip_suffix(".png")?.parse::<u64>().ok());
        if of.is_some_and(|of| of > step) {
            shift(&entry.path(), aside.join(SAMPLES).join(&name))?;
        }
    }
    if let Holds::Run(found) = RunFolder::of(run)? {
        // That it is finished goes first: a run that is killed here is then not taken for it.
        let results = found.results();
        for name in std::iter::once(FINISHED).chain(results.iter().map(String::as_str)) {
            if run.join(name).exists() {
                shift(&run.join(name), aside.join(name))?;
            }
        }
    }
    // The newest last: until then the run is seen to be where it was.
    for path in beyond {
        if let Some(name) = path.file_name() {
            shift(path, aside.join(name))?;
        }
    }
    Ok(aside)
}

/// As [`files::check_writable`](crate::files::check_writable) for a folder that a config names.
///
/// # Errors
/// It can't be written.
pub fn check_writable(folder: &Path) -> Result<()> {
    crate::files::check_writable(folder)
        .or_else(|error| if error.is::<NotAFolder>() { refused(error.to_string()) } else { Err(error) })
}
