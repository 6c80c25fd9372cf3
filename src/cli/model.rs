//! The model that a command works on: `MODEL`, and the options that say more of it, the same for every command.

use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::coreml::export::PackageMetadata;
use crate::palette::PalettizedCheckpoint;
use crate::source::Model;
use crate::train::run_folder::RunFolder;

/// `MODEL` and its options, to be flattened into a command's `Args`.
#[derive(Clone, Debug, clap::Args)]
pub struct ModelArgs {
    /// A diffusers folder, a single-file checkpoint (.safetensors), a hub id in the local Hugging Face cache, or the folder
    /// of a finished run, with its palettes
    #[arg(value_name = "MODEL")]
    pub model: String,
}

/// A model that was opened, with the palettes that go in place of the weights of its UNet.
pub struct Opened {
    pub model: Model,
    pub palettes: Option<PathBuf>,
    /// Of a run's folder: the run.
    pub run: Option<Box<RunFolder>>,
}

impl ModelArgs {
    /// Opens the model. `palettes` is what `--palettes` gave; of a run's folder its own are taken where it gave none.
    ///
    /// # Errors
    /// As [`Model::open`]; a run that is not finished.
    pub fn open(&self, palettes: Option<&Path>) -> Result<Opened> {
        let palettes = palettes.map(Path::to_owned);
        let Some((run, folder)) = RunFolder::model_of(Path::new(&self.model))? else {
            return Ok(Opened { model: Model::open(&self.model)?, palettes, run: None });
        };
        let model = Model::open(&folder.to_string_lossy())?.named(run.name());
        match &run.finished {
            Some(finished) if finished.step < run.step() => eprintln!(
                "note: the results in {} are those of step {}; the run has gone on to step {}",
                run.path.display(),
                finished.step,
                run.step()
            ),
            _ => {}
        }
        Ok(Opened { model, palettes: palettes.or_else(|| run.palettes()), run: Some(run) })
    }
}

impl Opened {
    /// What packages of the model say of it, called `name` or else as the model is.
    pub fn metadata(&self, name: Option<&str>) -> PackageMetadata {
        let name = name.unwrap_or(self.model.name());
        match self.run.as_ref().and_then(|run| run.finished.as_ref()) {
            // The run's own packages were made beside the base model, whose card told it.
            Some(finished) => PackageMetadata { model: name.to_owned(), ..finished.package.clone() },
            None => PackageMetadata::of_folder(name, self.model.path()),
        }
    }

    /// Says of a run with palettes that its model holds their values, so that `what` is of those.
    pub fn note_values(&self, what: &str) {
        if let Some(run) = self.run.as_ref().filter(|run| run.palettes().is_some()) {
            eprintln!("note: the model of {} holds the values of its palettes: {what}", run.path.display());
        }
    }

    /// Height and width of the latents that a run's own packages are for.
    pub fn latents(&self) -> Option<(i64, i64)> {
        let export = &self.run.as_ref()?.config.export;
        Some((export.latent_h, export.latent_w))
    }

    /// Reads the palettes, where there are any.
    ///
    /// # Errors
    /// As [`PalettizedCheckpoint::read`].
    pub fn checkpoint(&self) -> Result<Option<PalettizedCheckpoint>> {
        self.palettes.as_deref().map(PalettizedCheckpoint::read).transpose()
    }
}
