//! The model that a command works on: `MODEL`, and the options that say more of it, the same for every command.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::Result;

use super::Usage;
use crate::config::Config;
use crate::coreml::PackageMetadata;
use crate::palette::{PalettizedCheckpoint, PalettizedFile};
use crate::source::{Component, Model, ModelOptions, PREDICTION, PredictionType, autoencoder_id, goes_with, model_id};
use crate::terminal::{note, note_once, warn};
use crate::train::run_folder::RunFolder;

/// `MODEL` and its options, to be flattened into a command's `Args`.
#[derive(Clone, Debug, clap::Args)]
pub struct ModelArgs {
    /// A diffusers folder, a single-file checkpoint (.safetensors), a hub id in the local Hugging Face cache (owner/name, or
    /// owner/name@revision), or the folder of a finished run, with its palettes
    #[arg(value_name = "MODEL")]
    pub model: String,
    #[command(flatten)]
    pub options: ModelOptions,
}

/// The first of these options that was given, for messages.
pub fn given(options: &ModelOptions) -> Option<&'static str> {
    let revision = options.revision.as_ref().map(|_| "--revision");
    revision.or(about_autoencoder(options)).or(about_loras(options)).or(about_noise(options))
}

/// The option about LoRAs, which change the UNet and text encoders, if it was given.
pub fn about_loras(options: &ModelOptions) -> Option<&'static str> {
    (!options.loras.is_empty()).then_some("--lora")
}

/// The option about the autoencoder, if it was given.
pub fn about_autoencoder(options: &ModelOptions) -> Option<&'static str> {
    options.vae.as_ref().map(|_| "--vae")
}

/// The first option about the noise schedule that was given.
pub fn about_noise(options: &ModelOptions) -> Option<&'static str> {
    let options = [
        ("--prediction-type", options.prediction_type != PredictionType::Auto),
        ("--rescale-betas-zero-snr", options.rescale_betas_zero_snr.is_some()),
    ];
    options.into_iter().find_map(|(option, given)| given.then_some(option))
}

/// A model that was opened, with the palettes that go in place of the weights of its UNet.
pub struct Opened {
    pub model: Model,
    pub palettes: Option<PathBuf>,
    /// What is put onto the palettes.
    pub subject: Option<PathBuf>,
    /// The run, where `MODEL` is a run's folder.
    pub run: Option<Box<RunFolder>>,
}

impl ModelArgs {
    /// Opens the model for work by `config`: what its `[model]` says of the model holds, where no option says otherwise.
    ///
    /// # Errors
    /// As [`Model::open_with`].
    pub fn open_by(mut self, config: &Config, palettes: Option<&Path>) -> Result<Opened> {
        let (options, by_config) = (&mut self.options, &config.model);
        let mut taken = Vec::new();
        if let (None, Some(vae)) = (&options.vae, &by_config.vae) {
            taken.push(format!("vae = \"{vae}\""));
            options.vae = Some(vae.clone());
        }
        if options.loras.is_empty() && !by_config.loras.is_empty() {
            let loras: Vec<String> = by_config.loras.iter().map(ToString::to_string).collect();
            taken.push(format!("loras: {}", loras.join(", ")));
            options.loras = by_config.loras.clone();
        }
        if options.prediction_type == PredictionType::Auto && by_config.prediction_type != PredictionType::Auto {
            taken.push("prediction_type".to_owned());
            options.prediction_type = by_config.prediction_type;
        }
        if let (None, Some(rescale)) = (options.rescale_betas_zero_snr, by_config.rescale_betas_zero_snr) {
            taken.push(format!("rescale_betas_zero_snr = {rescale}"));
            options.rescale_betas_zero_snr = Some(rescale);
        }
        if options.revision.is_none() && self.model == by_config.pretrained_model_name_or_path {
            options.revision = by_config.revision.clone();
        }
        if !taken.is_empty() {
            note(format_args!("[model] of the config holds for {} too: {}", self.model, taken.join(", ")));
        }
        self.open(palettes)
    }

    /// Opens the model. `palettes` is what `--palettes` gave; of a run's folder its own are taken where it gave none.
    ///
    /// # Errors
    /// As [`Model::open_with`]; a run that is not finished.
    pub fn open(&self, palettes: Option<&Path>) -> Result<Opened> {
        let (palettes, options, given) = (palettes.map(Path::to_owned), &self.options, palettes.is_some());
        let (model, run) = RunFolder::open(&self.model, options)?;
        model.loras().iter().for_each(|lora| note_once(format_args!("merged in: the LoRA {lora}")));
        let of_unet = model.loras().iter().find(|lora| lora.changes_network(Component::Unet));
        if let (Some(lora), Some(palettes)) = (of_unet, &palettes) {
            note_once(format_args!(
                "the UNet's weights are those of {}: {} changes none of them; palettes of the UNet with it are made by \
                 `palettist palettize {} --lora …`",
                palettes.display(),
                lora.path(),
                self.model
            ));
        }
        let Some(run) = run else { return Ok(Opened { model, palettes, subject: None, run: None }) };
        let palettes = match palettes {
            Some(palettes) => Some(palettes),
            None => run.palettes()?,
        };
        if let Some(finished) = run.finished.as_ref().filter(|_| run.is_beyond_its_results()) {
            note(format_args!(
                "the results in {} are those of step {}; the run has gone on to step {}",
                run.path.display(),
                finished.step,
                run.step()
            ));
        }
        if let (Some(lora), Some(_)) = (of_unet, &palettes)
            && !given
        {
            let message = "the UNet of that run is palettes, into which no LoRA can be merged; name it under [[model.loras]] \
                           of the run's config, so that the palettes are learnt with it";
            return Err(Usage(format!("--lora {}: {message}", lora.path())).into());
        }
        Ok(Opened { model, palettes, subject: None, run: Some(run) })
    }
}

impl Opened {
    /// With what `--subject` gave.
    ///
    /// # Errors
    /// There are no palettes that it could be put onto.
    pub fn with_subject(self, subject: Option<&Path>) -> Result<Self, Usage> {
        match subject {
            Some(_) if self.palettes.is_none() => Err(Usage(
                "--subject goes onto the palettes that it was learnt on: give these with --palettes, or a run that made them"
                    .into(),
            )),
            subject => Ok(Self { subject: subject.map(Path::to_owned), ..self }),
        }
    }

    /// What packages of the model say of it, called `name` or else as the model is.
    pub fn metadata(&self, name: Option<&str>) -> PackageMetadata {
        let name = name.unwrap_or(self.model.name());
        let metadata = match self.run.as_ref().and_then(|run| run.finished.as_ref()) {
            // The run's own packages were made beside the base model, whose card told it.
            Some(finished) => PackageMetadata { model: name.to_owned(), ..finished.package.clone() },
            None => PackageMetadata::of_folder(name, self.model.path()),
        };
        PackageMetadata {
            id: model_id(&self.model),
            autoencoder_id: autoencoder_id(&self.model),
            ..metadata.with_loras(&self.model)
        }
    }

    /// Says of a run with palettes that its model holds their values, so that `what` is of those.
    pub fn note_values(&self, what: &str) {
        if let Some(run) = self.run.as_ref().filter(|run| run.config.palettize.enabled) {
            note(format_args!("the model of {} holds the values of its palettes: {what}", run.path.display()));
        }
    }

    /// Height and width of the latents that a run's own packages are for.
    pub fn latents(&self) -> Option<(i64, i64)> {
        let export = &self.run.as_ref()?.config.export;
        Some((export.latent_h, export.latent_w))
    }

    /// Opens the palettes, where there are any, with the subject on them.
    ///
    /// # Errors
    /// As [`PalettizedFile::open`]; a subject of other palettes.
    pub fn palettized(&self) -> Result<Option<PalettizedFile>> {
        let Some(file) = self.palettes.as_deref().map(PalettizedFile::open).transpose()? else { return Ok(None) };
        self.warn_of_others(&file)?;
        Ok(Some(match &self.subject {
            Some(subject) => file.with_subject(subject)?,
            None => file,
        }))
    }

    /// Warns of palettes whose UNet was trained to go with something else than what the model has.
    fn warn_of_others(&self, file: &PalettizedFile) -> Result<()> {
        let metadata = &file.metadata;
        for (name, own) in goes_with(&self.model, &BTreeMap::new())? {
            let Some(theirs) = metadata.get(&name).filter(|theirs| **theirs != own) else { continue };
            let (palettes, model) = (file.path().display(), self.model.path().display());
            warn(match name.as_str() {
                PREDICTION => {
                    format!("{palettes}: this UNet predicts {theirs}, and {model} is used as one that predicts {own}")
                }
                _ => format!(
                    "{palettes}: this UNet goes with other text encoders than those of {model}, which do not know what was \
                     learnt with it; give the model that it was made from, or the folder of the run that made it"
                ),
            });
        }
        Ok(())
    }

    /// Reads the palettes, where there are any, with the subject on them.
    ///
    /// # Errors
    /// As [`Opened::palettized`] and [`PalettizedCheckpoint::of`].
    pub fn checkpoint(&self) -> Result<Option<PalettizedCheckpoint>> {
        self.palettized()?.as_ref().map(PalettizedCheckpoint::of).transpose()
    }
}
