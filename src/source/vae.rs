//! An autoencoder in place of a model's own: a diffusers folder of it, `vae/` of a model's folder, a hub id, or a single
//! file in anybody's names.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail};

use super::single_file::SingleFile;
use super::{Component, folder, hub};
use crate::files::json::read_json;
use crate::networks::autoencoder::AutoencoderConfig;

/// Where it is.
#[derive(Clone)]
pub enum Vae {
    /// The folder with its `config.json`.
    Folder(PathBuf),
    File(Arc<SingleFile>),
}

impl Vae {
    /// Finds `vae` for a model that is a Stable Diffusion XL or not and whose own autoencoder has this scaling factor.
    ///
    /// # Errors
    /// One line: it does not exist, or is not an autoencoder.
    pub fn open(vae: &str, is_xl: bool, scaling_factor: Option<f64>) -> Result<Self> {
        let path = Path::new(vae);
        if path.is_file() {
            let file = SingleFile::open_autoencoder(path, is_xl, scaling_factor);
            return file.map(|file| Self::File(Arc::new(file))).context("the autoencoder that was given");
        }
        if path.is_dir() {
            return Self::of_folder(path).map(Self::Folder).context("the autoencoder that was given");
        }
        let (id, revision) = hub::split(vae);
        if hub::is_id(id)
            && let Some(snapshot) = hub::cached(id, revision, |snapshot| Self::of_folder(snapshot).map(drop))?
        {
            return Self::of_folder(&snapshot).map(Self::Folder).context("the autoencoder that was given");
        }
        bail!(
            "the autoencoder {vae} does not exist; a diffusers folder of one, a single file (.safetensors), or the id of \
             one in the local Hugging Face cache is expected"
        )
    }

    /// The folder of an autoencoder in `path`: itself or its `vae/`.
    fn of_folder(path: &Path) -> Result<PathBuf> {
        let within = path.join(Component::Autoencoder.folder());
        let folder = if within.join("config.json").is_file() { within } else { path.to_owned() };
        if !folder.join("config.json").is_file() {
            bail!(
                "{} is not the folder of an autoencoder: it has neither config.json nor vae/config.json",
                path.display()
            );
        }
        let config = folder.join("config.json");
        AutoencoderConfig::from_json(&read_json(&config)?).with_context(|| config.display().to_string())?;
        folder::weight_files(&folder, Component::Autoencoder.into())?;
        Ok(folder)
    }
}
