//! The model that a command works on: `MODEL`, and the options that say more of it, the same for every command.

use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::palette::PalettizedCheckpoint;
use crate::source::Model;

/// `MODEL` and its options, to be flattened into a command's `Args`.
#[derive(Clone, Debug, clap::Args)]
pub struct ModelArgs {
    /// A diffusers folder, a single-file checkpoint (.safetensors), or a hub id in the local Hugging Face cache
    #[arg(value_name = "MODEL")]
    pub model: String,
}

/// A model that was opened, with the palettes that go in place of the weights of its UNet.
pub struct Opened {
    pub model: Model,
    pub palettes: Option<PathBuf>,
}

impl ModelArgs {
    /// Opens the model. `palettes` is what `--palettes` gave.
    ///
    /// # Errors
    /// As [`Model::open`].
    pub fn open(&self, palettes: Option<&Path>) -> Result<Opened> {
        Ok(Opened { model: Model::open(&self.model)?, palettes: palettes.map(Path::to_owned) })
    }
}

impl Opened {
    /// Reads the palettes, where there are any.
    ///
    /// # Errors
    /// As [`PalettizedCheckpoint::read`].
    pub fn checkpoint(&self) -> Result<Option<PalettizedCheckpoint>> {
        self.palettes.as_deref().map(PalettizedCheckpoint::read).transpose()
    }
}
