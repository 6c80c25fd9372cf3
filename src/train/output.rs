//! `output_dir/`: taking it for a run, and what is written there when one ends.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use tch::Kind;

use super::finished::{Finished, all_files, file_of, mark, marks};
use super::identity::Identity;
use super::objective::Objective;
use super::palettes::file_of_palettes;
use super::plan::{Action, Plan as RunPlan, Resume, Resumed, plan};
use super::reconstruct::move_latents;
use super::refused::refused;
use super::reporter::Reporter;
use super::run_folder::{self, CHECKPOINTS, CONFIG, FINISHED, LOGS, Lock, METRICS, MODEL, PACKAGES, REPORT, RunFolder};
use super::state;
use super::trained::{Networks, Trained};
use crate::config::{Config, TrainedComponent};
use crate::coreml::PackageMetadata;
use crate::coreml::components::Part;
use crate::coreml::components::cost::Cost;
use crate::coreml::exporting::plan::OwnPalettes;
use crate::coreml::exporting::{Asked, Plan};
use crate::files::{self, beside};
use crate::ops::Weights;
use crate::palette::checkpoint::{RECIPE, SOURCE_MODEL};
use crate::palette::{Palette, PalettizedCheckpoint, subject};
use crate::report::write_report;
use crate::source::lora::LORAS;
use crate::source::{Component, Model, autoencoder_id, fill_model, goes_with, model_id, write_component};
use crate::terminal::{Copying, Progress, note, shell_word};

/// The folder of a run, held.
pub struct OutputDir {
    pub folder: PathBuf,
    _lock: Lock,
}

impl OutputDir {
    /// Creates the folder, which [`plan`] found to be free or a run's, keeps other runs out of it, and decides what is to
    /// be done there.
    ///
    /// # Errors
    /// It can't be written, or is being written; those of [`plan`].
    pub fn claim(config: &Config, resume: &Resume) -> Result<(Self, Action)> {
        let folder = config.output_dir.clone();
        let lock = run_folder::lock(&folder)?;
        run_folder::tidy(&folder);
        // Now that nobody else writes there.
        let RunPlan { action, notes } = plan(config, resume)?;
        notes.iter().for_each(note);
        Ok((Self { folder, _lock: lock }, action))
    }

    /// Makes the folder that of the run as `config` has it. Where the run is resumed from a checkpoint that lies elsewhere,
    /// that is copied here first, so that a run that is killed before it saves resumes from there too; where it begins a
    /// new branch, what it has beyond the checkpoint is set aside.
    ///
    /// # Errors
    /// The folder can't be written.
    pub fn begin(&self, config: &Config, resumed: Option<&mut Resumed>) -> Result<()> {
        let Some(resumed) = resumed else { return run_folder::begin(&self.folder, config) };
        if !self.folder.join(CONFIG).exists() {
            run_folder::begin(&self.folder, config)?;
        }
        let elsewhere = Elsewhere::copy(&self.checkpoints(), resumed)?;
        if let Some(beyond) = resumed.beyond.take() {
            let aside = run_folder::set_aside(&self.folder, &beyond, resumed.facts.step)?;
            note(format_args!(
                "what the run had beyond {} is in {} now: checkpoints, metrics, samples, results",
                resumed.checkpoint.display(),
                aside.display()
            ));
        }
        if let Some(elsewhere) = elsewhere {
            elsewhere.put(&self.folder)?;
        }
        run_folder::begin(&self.folder, config)
    }

    pub fn checkpoints(&self) -> PathBuf {
        self.folder.join(CHECKPOINTS)
    }
}

/// A checkpoint that lies outside of the run's folder, or among what was set aside there: copied beside its place.
struct Elsewhere {
    copy: PathBuf,
    place: PathBuf,
    /// The metrics of the run that saved it, where they are there.
    metrics: Option<Vec<u8>>,
}

impl Elsewhere {
    /// Copies the checkpoint of `resumed`, unless it is one of those in `checkpoints`.
    fn copy(checkpoints: &Path, resumed: &Resumed) -> Result<Option<Self>> {
        let real = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_owned());
        let from = real(&resumed.checkpoint);
        if from.parent() == Some(&real(checkpoints)) {
            return Ok(None);
        }
        let place = state::place(checkpoints, resumed.facts.step);
        let copy = beside::beside(&place, beside::NEW);
        files::write_folder(&copy, |part| {
            for name in state::FILES {
                let to = part.join(name);
                fs::copy(from.join(name), &to).with_context(|| {
                    format!("cannot copy the checkpoint {} to {}", resumed.checkpoint.display(), place.display())
                })?;
            }
            Ok(())
        })?;
        Ok(Some(Self { copy, place, metrics: run_folder::metrics_beside(&from) }))
    }

    /// Puts the copy in its place in the run's `folder`, now that nothing is there, and the metrics that led to it.
    fn put(self, folder: &Path) -> Result<()> {
        if let Some(metrics) = self.metrics {
            files::write_bytes(&folder.join(LOGS).join(METRICS), &metrics)?;
        }
        fs::rename(&self.copy, &self.place).with_context(|| format!("cannot write {}", self.place.display()))?;
        files::flush_renames(&folder.join(CHECKPOINTS));
        Ok(())
    }
}

/// A run that has done its last step.
pub struct Ending<'a> {
    pub config: &'a Config,
    pub output: &'a OutputDir,
    pub model: &'a Model,
    pub learned_from: &'a Identity,
    pub trained: &'a Trained,
    pub reporter: &'a Reporter,
    /// Which results to write; all where there is none.
    pub only: Option<&'a BTreeSet<String>>,
    /// Whether another stage follows.
    pub goes_on: bool,
}

impl Ending<'_> {
    /// Writes what the run was for: the autoencoder; or the palettized checkpoint, the model and its packages.
    ///
    /// # Errors
    /// The disk is full.
    pub fn finish(&self, objective: &mut dyn Objective) -> Result<()> {
        let (networks, palettes) = self.trained.shipped()?;
        let Self { config, output, model, reporter, .. } = *self;
        if config.train.component == TrainedComponent::Autoencoder {
            let written = if self.wants(MODEL) { Some(self.autoencoder(objective, &networks)?) } else { None };
            return self.finished(&PackageMetadata::default(), written);
        }
        let palettized = config.palettize.enabled.then(|| self.palettized(&networks, palettes)).transpose()?;
        let name = run_folder::palettes_file(&config.name);
        if let Some(palettized) = palettized.as_ref().filter(|_| self.wants(&name)) {
            let path = output.folder.join(&name);
            self.replacing(&[name], || palettized.write(&path))?;
            reporter.wrote("the palettized checkpoint", &path);
        }
        let name = run_folder::subject_file(&config.name);
        if let Some((base, palettized)) =
            file_of_palettes(config)?.zip(palettized.as_ref()).filter(|_| self.wants(&name))
        {
            let path = output.folder.join(&name);
            self.replacing(&[name], || subject::write(&path, &base, palettized))?;
            reporter.wrote("what was learnt, for --subject", &path);
        }
        let mut written = None;
        if self.wants(MODEL) {
            let replaced: Vec<(Component, &Weights)> =
                networks.iter().map(|(component, weights)| (*component, weights)).collect();
            let (folder, files) = self.replace_model(|part| fill_model(model, part, &replaced, Kind::Half))?;
            written = Some(files);
            reporter.wrote("the model, a diffusers folder", &folder);
        }
        let mut metadata = PackageMetadata::of_folder(&config.name, model.path()).with_loras(model);
        if config.export.coreml {
            // That of the model which the run made, as `export` of the run has it.
            let made = output.folder.join(MODEL);
            let made = Model::open(&made.to_string_lossy())?;
            metadata.id = model_id(&made);
            metadata.autoencoder_id = autoencoder_id(&made);
            self.packages(&networks, palettized.as_ref(), &metadata)?;
        }
        if self.wants(REPORT) {
            let facts = facts(config, self.trained, palettized.as_ref());
            self.replacing(&[REPORT.to_owned()], || write_report(&output.folder, &config.name, &facts))?;
            reporter.wrote("the report", &output.folder.join(REPORT));
        }
        self.finished(&metadata, written)
    }

    fn wants(&self, result: &str) -> bool {
        self.only.is_none_or(|only| only.contains(result))
    }

    fn palettized(&self, networks: &Networks, palettes: BTreeMap<String, Palette>) -> Result<PalettizedCheckpoint> {
        let dense: BTreeMap<String, tch::Tensor> = networks[&Component::Unet]
            .iter()
            .filter(|(name, _)| !palettes.contains_key(*name))
            .map(|(name, tensor)| (name.clone(), tensor.to_kind(Kind::Half).to_device(tch::Device::Cpu)))
            .collect();
        let mut metadata = goes_with(self.model, networks)?;
        metadata.insert(SOURCE_MODEL.to_owned(), self.config.model.pretrained_model_name_or_path.clone());
        metadata.insert(RECIPE.to_owned(), self.config.resolved_toml());
        metadata.extend(self.model.loras_text().map(|loras| (LORAS.to_owned(), loras)));
        Ok(PalettizedCheckpoint { palettes, dense, metadata })
    }

    /// Writes results where others may be, of an earlier end of the run. What somebody changed since is kept, under another
    /// name.
    fn replacing<T>(&self, results: &[String], write: impl FnOnce() -> Result<T>) -> Result<T> {
        let Some(before) = self.finished_before()? else { return write() };
        let paths = results.iter().map(|result| (result, self.output.folder.join(result)));
        let changed = paths.filter(|(result, path)| before.is_changed(result, path));
        let kept: Vec<(PathBuf, PathBuf)> = changed.map(|(_, path)| (path.clone(), free_name(&path))).collect();
        for (path, kept) in &kept {
            fs::rename(path, kept).with_context(|| format!("cannot keep {} as {}", path.display(), kept.display()))?;
        }
        let written = write();
        for (path, kept) in kept {
            if written.is_err() && !path.exists() {
                // Nothing has taken its place.
                let _ = fs::rename(&kept, &path);
            } else if marks(&kept).is_ok_and(|kept| marks(&path).is_ok_and(|path| kept == path)) {
                // Nobody changed it: it was written at this end, by a process that was killed before it could note so.
                files::remove(&kept)?;
            } else {
                let (path, kept) = (path.display(), kept.display());
                let note = format!("note: {path} was changed since the run wrote it; what was there is {kept} now");
                self.reporter.say(&note);
            }
        }
        written
    }

    /// Puts a new `model/` in the place of one that is there. Files in the old one that this program did not write, or
    /// that were changed since, are kept in the new one. Its path, and the files that were written.
    fn replace_model(&self, write: impl FnOnce(&Path) -> Result<()>) -> Result<(PathBuf, Vec<String>)> {
        let folder = self.output.folder.join(MODEL);
        let written = self.finished_before()?.and_then(|finished| finished.results.get(MODEL).cloned());
        let (mut kept, mut files) = (Vec::new(), Vec::new());
        files::replace_folder(&folder, |part| {
            write(part)?;
            files = all_files(part);
            for file in all_files(&folder) {
                let (from, mut to) = (folder.join(&file), part.join(&file));
                if to.exists() {
                    // Without a record it is taken for what a run wrote that was killed as it ended.
                    let ours = written.as_ref().and_then(|written| written.get(&file));
                    let now = mark(&from).ok();
                    // The same as what is written now it is too, where a process was killed as it ended.
                    if ours.is_none_or(|hash| now.as_ref() == Some(hash)) || now == mark(&to).ok() {
                        continue;
                    }
                    let mut name = to.file_name().unwrap_or_default().to_owned();
                    name.push(".changed");
                    to.set_file_name(name);
                } else if written.as_ref().is_some_and(|written| written.contains_key(&file)) {
                    continue;
                }
                if let Some(above) = to.parent() {
                    fs::create_dir_all(above).with_context(|| format!("cannot create {}", above.display()))?;
                }
                keep(&from, &to).with_context(|| format!("cannot keep {}", from.display()))?;
                kept.push(to.strip_prefix(part).unwrap_or(&to).display().to_string());
            }
            Ok(())
        })?;
        if !kept.is_empty() {
            let kept = kept.join(", ");
            self.reporter.say(&format!("note: kept in {}, not of this run: {kept}", folder.display()));
        }
        Ok((folder, files))
    }

    /// What the folder said of an earlier end.
    fn finished_before(&self) -> Result<Option<Finished>> {
        Ok(match RunFolder::of(&self.output.folder)? {
            run_folder::Holds::Run(run) => run.finished,
            _ => None,
        })
    }

    fn packages(
        &self,
        networks: &Networks,
        palettized: Option<&PalettizedCheckpoint>,
        metadata: &PackageMetadata,
    ) -> Result<()> {
        let Self { config, model, reporter, .. } = *self;
        let plan = export_plan(config, model, metadata.clone())?;
        let palettes = palettized.into_iter().flat_map(|palettized| &palettized.palettes);
        let cost = Cost::of(palettes.map(|(name, palette)| (name.as_str(), palette.form, palette.shape.as_slice())));
        [cost.note(), cost.warning()].into_iter().flatten().for_each(|line| reporter.say(&line));
        let mixed = plan.of_other_weights();
        plan.warnings()?.iter().chain(&mixed).for_each(|warning| reporter.say(&format!("warning: {warning}")));
        let wanted = |part: &Part| run_folder::packages(config, *part).iter().any(|package| self.wants(package));
        let parts: Vec<Part> = plan.parts.iter().copied().filter(wanted).collect();
        for &part in &parts {
            if plan.stays_dense(part)? {
                reporter.say(&format!("note: {part} stays as it is: it computes in fp32, and palettes are fp16"));
            }
            let mut bar = Progress::new("exporting", 0, part.parameters(model)?.len() as u64).counting("tensor");
            let mut progress = |done: usize, _: usize| bar.update(done as u64, &[]);
            let written = self.replacing(&run_folder::packages(config, part), || {
                match (palettized, networks.get(&part.component())) {
                    (Some(palettized), _) if part == Part::Unet => plan.write(part, palettized, &mut progress),
                    (_, Some(trained)) => plan.write(part, trained, &mut progress),
                    // What the run did not train is the model's.
                    (_, None) => plan.write(part, &model.stored(part.component())?, &mut progress),
                }
            })?;
            bar.finish();
            written.iter().for_each(|path| reporter.wrote("the Core ML package", path));
        }
        if let Some(bundle) = plan.bundle().filter(|_| !parts.is_empty()) {
            let mut copying = Copying::default();
            let made = bundle.write(&mut |done, total| copying.hear(done, total))?;
            reporter.wrote("what Apple's Swift package reads", &made.resources);
            bundle.missing(model).iter().for_each(|line| reporter.say(&format!("note: {line}")));
            made.notes().iter().for_each(|line| reporter.say(&format!("note: {line}")));
        }
        Ok(())
    }

    /// The files that were written.
    fn autoencoder(&self, objective: &mut dyn Objective, networks: &Networks) -> Result<Vec<String>> {
        let part = Component::Autoencoder;
        let mut json = self.model.config_json(part)?;
        let mut weights: Weights = networks[&part].iter().map(|(name, w)| (name.clone(), w.shallow_clone())).collect();
        if let Some(latents) = objective.latents(networks)? {
            // So that the UNet meets latents of about zero mean and unit variance (Rombach et al. 2022, appendix G). What
            // remains of a mean is seen through the last step's noise, where sampling has none: colours come out wrong.
            json["scaling_factor"] = serde_json::json!((1e5 / latents.deviation).round() / 1e5);
            move_latents(&mut weights, &latents.mean)?;
        }
        let (folder, files) = self
            .replace_model(|folder| write_component(&folder.join(part.folder()), part, &json, &weights, Kind::Half))?;
        self.reporter.wrote("the autoencoder", &folder.join(part.folder()));
        Ok(files)
    }

    /// Says in the folder that the run is finished. `model` is what was written of the model, if it was written now.
    fn finished(&self, package: &PackageMetadata, model: Option<Vec<String>>) -> Result<()> {
        let folder = &self.output.folder;
        let before = self.finished_before()?.unwrap_or_default();
        // A user's files are none of the results.
        let model = model.or_else(|| Some(before.results.get(MODEL)?.keys().cloned().collect()));
        let mut results = BTreeMap::new();
        for result in run_folder::wanted(self.config) {
            let path = folder.join(&result);
            let files = match &model {
                Some(model) if result == MODEL => model.clone(),
                _ if path.is_dir() => all_files(&path),
                _ => vec![String::new()],
            };
            let marked = files.into_iter().map(|file| Ok((file.clone(), mark(&file_of(&path, &file))?)));
            results.insert(result, marked.collect::<Result<BTreeMap<_, _>>>()?);
        }
        let finished = Finished {
            step: self.config.train.max_train_steps,
            config: self.config.resolved_toml(),
            learned_from: self.learned_from.clone(),
            package: package.clone(),
            results,
        };
        files::write_bytes(&folder.join(FINISHED), &serde_json::to_vec_pretty(&finished)?)?;
        if self.goes_on {
            return Ok(());
        }
        let shown = shell_word(&folder.to_string_lossy());
        self.reporter.say(&format!(
            "finished; {CHECKPOINTS}/ is needed for more steps only, and may be deleted: palettist clean {shown}"
        ));
        Ok(())
    }
}

/// The packages that a run ends with, as `[export]` asks for them.
///
/// # Errors
/// As [`Plan::new`]; a network that the model does not have.
pub fn export_plan<'m>(config: &Config, model: &'m Model, metadata: PackageMetadata) -> Result<Plan<'m>> {
    let export = &config.export;
    if let Some(part) = export.components.iter().find(|part| !Part::of(model).contains(part)) {
        return refused(format!("export.components names {part}, and {} has none", model.path().display()));
    }
    let asked = Asked {
        parts: Some(export.parts()),
        nbits: export.quantize_nbits.clone().unwrap_or_default(),
        bundle: export.bundle_resources_for_swift_cli,
        attention: export.attention_implementation,
        target: Some(export.min_deployment_target),
        latents: Some((export.latent_h, export.latent_w)),
        batch_one: export.unet_batch_one,
        controlnet: export.unet_support_controlnet,
        chunk: export.chunk_unet,
        overwrite: true,
    };
    // What of these needs iOS 18 was compared with the target when the config was read.
    let palettes = config.palettize.enabled.then(OwnPalettes::default);
    Plan::new(model, &asked, palettes.as_ref(), &config.output_dir.join(PACKAGES), metadata)
}

fn facts(config: &Config, trained: &Trained, palettized: Option<&PalettizedCheckpoint>) -> Vec<(&'static str, String)> {
    let mut facts = vec![("model", config.model.pretrained_model_name_or_path.clone())];
    if let Some(palettized) = palettized {
        facts.push(("palettized weights", palettized.palettes.len().to_string()));
        let (bits, weights) = palettized.palettes.values().fold((0, 0), |(bits, weights), palette| {
            (bits + palette.stored_bits(), weights + palette.shape.iter().product::<i64>())
        });
        facts.push((
            "bits a palettized weight, palettes counted",
            format!("{:.3}", bits as f64 / weights.max(1) as f64),
        ));
        // Of palettes that a checkpoint brought, the weights that they stand for are not known.
        if config.palettize.palettes.is_none() {
            facts.push(("palettes' mean relative squared error", format!("{:.5}", trained.palette_error())));
        }
    }
    facts
}

/// A name for what is kept of a result.
fn free_name(path: &Path) -> PathBuf {
    let named = |number: u32| {
        let mut name = path.to_owned().into_os_string();
        name.push(if number == 1 { ".changed".to_owned() } else { format!(".changed-{number}") });
        PathBuf::from(name)
    };
    (1..).map(named).find(|name| fs::symlink_metadata(name).is_err()).unwrap_or_else(|| named(0))
}

/// Copies a file, or a link as one.
fn keep(from: &Path, to: &Path) -> std::io::Result<()> {
    #[cfg(unix)]
    if from.is_symlink() {
        return std::os::unix::fs::symlink(fs::read_link(from)?, to);
    }
    fs::copy(from, to).map(drop)
}
