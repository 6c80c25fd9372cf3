//! Noised pictures outside a run: the validation loss of any weights, by which `evaluate` and `demo` compare models, and
//! what `analyze` and calibration look at.

use anyhow::Result;
use tch::{Device, Kind};

use super::examples::{Encoder, Texts};
use super::setup::transform;
use super::validate::{Input, Validation};
pub use super::validate::{Measured, snr};
use crate::config::{self, Config};
use crate::data::{Cache, Contents, Key, set};
use crate::diffusion::NoiseSchedule;
use crate::networks::unet::UnetConfig;
use crate::ops::Weights;
use crate::pipeline::TextToImage;
use crate::source::{Component, Model};

/// Pictures of a config, encoded by one model.
pub struct Evaluation {
    unet: UnetConfig,
    schedule: NoiseSchedule,
    validation: Validation,
    texts: Texts,
}

impl Evaluation {
    /// How the UNet computes.
    pub fn unet(&self) -> &UnetConfig {
        &self.unet
    }

    /// Reads `data.validation_data_dir` and encodes it with the autoencoder and text encoder of `model`. Noised pictures:
    /// `samples`, or as many as the config's validation has.
    ///
    /// # Errors
    /// The config has no validation split; whatever is wrong with the data or the model.
    pub fn open(config: &Config, model: &Model, samples: Option<usize>, device: Device) -> Result<Self> {
        let Some(pictures) = set::validation(config) else {
            let message = "is missing: set it to a folder with pictures that are not trained on";
            return Err(config::Error::about("data.validation_data_dir", message).into());
        };
        set::apart(config)?;
        let pictures = pictures?;
        let samples = samples.unwrap_or(config.train.train_batch_size * config.validation.batches);
        Self::of(pictures, config, model, samples, device)
    }

    /// The same of the pictures that the config trains on (DreamBooth's: those of the subject).
    ///
    /// # Errors
    /// Whatever is wrong with the data or the model.
    pub fn of_training(config: &Config, model: &Model, samples: usize, device: Device) -> Result<Self> {
        set::apart(config)?;
        Self::of(set::training(config)?, config, model, samples, device)
    }

    fn of(pictures: Contents, config: &Config, model: &Model, samples: usize, device: Device) -> Result<Self> {
        // What the model is, before any long work.
        let TextToImage { unet, autoencoder, schedule, .. } = TextToImage::of(model)?;
        pictures.remarks.iter().for_each(crate::terminal::tell);
        super::identity::check_finite(model)?;
        // The others are never looked at.
        let mut pictures = pictures.samples;
        pictures.truncate(samples);
        let cache = Cache::open(&config.data.cache_dir)?;
        let weights = model.weights(Component::Autoencoder, Kind::Float, device)?;
        let encoder = Encoder::new(&autoencoder, &weights, device, &cache)?;
        let examples = encoder.encode(&pictures, &[], &|index| transform(config, index), false, &mut |_, _| {})?;
        let texts = Texts::new(examples.captions.iter(), model, Some(&cache), device)?;
        let validation = Validation::new(
            &examples,
            autoencoder.scaling_factor,
            (config.train.train_batch_size, samples),
            config.validation.seed,
            &schedule,
            (device, Kind::Float),
        );
        Ok(Self { unet, schedule, validation, texts })
    }

    /// How many noised pictures the loss is the mean over.
    pub fn examples(&self) -> usize {
        self.validation.len()
    }

    /// What the UNet with these fp32 weights answers, and its denoising loss.
    ///
    /// # Errors
    /// A caption can't be embedded.
    pub fn measure(&self, weights: &Weights) -> Result<Measured> {
        self.validation
            .measure(weights, &self.unet, &self.schedule, |captions, sizes| self.texts.embed(captions, sizes, None))
    }

    /// Gives `see` what goes into the UNet, `batch` at a time, and the UNet's configuration.
    ///
    /// # Errors
    /// A caption can't be embedded; those of `see`.
    pub fn inputs(&self, batch: i64, see: &mut dyn FnMut(&Input, &UnetConfig) -> Result<()>) -> Result<()> {
        self.validation.inputs(
            batch,
            &self.schedule,
            |captions, sizes| self.texts.embed(captions, sizes, None),
            &mut |input| see(input, &self.unet),
        )
    }

    /// The key of all that goes into the UNet and should come out.
    ///
    /// # Errors
    /// A caption can't be embedded.
    pub fn key(&self) -> Result<Key> {
        self.validation.key(&self.schedule, |captions, sizes| self.texts.embed(captions, sizes, None))
    }
}
