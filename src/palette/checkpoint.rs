//! The palettized checkpoint: a whole UNet in one safetensors file. Training and post-training palettization write
//! it; everything downstream reads it.
//!
//! For a palettized parameter `NAME` of `bits` and `shape`:
//!
//! | tensor | type | shape |
//! |---|---|---|
//! | `NAME.indices` | U8 | `[⌈bits · elements / 8⌉]`, as [`packing`] has it |
//! | `NAME.palette` | F16 | `[2^bits]` |
//!
//! Every other parameter is there under its own name, in F16. The file's metadata: `palettist.version` (1),
//! `palettist.palettes` (JSON, `NAME` → `{"bits", "shape"}`), and under other keys what was palettized, and how.
//! Equal checkpoints are equal bytes.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail, ensure};
use half::f16;
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use super::{Palette, elements, packing};
use crate::ops::Weights;
use crate::source::files::{TensorFile, write_safetensors};

/// The version of the format that is written.
pub const VERSION: &str = "1";
/// The key of [`PalettizedCheckpoint::metadata`] for the model that was palettized.
pub const SOURCE_MODEL: &str = "source_model";
/// The key of [`PalettizedCheckpoint::metadata`] for how it was: the resolved configuration, or the command.
pub const RECIPE: &str = "recipe";

const VERSION_KEY: &str = "palettist.version";
const PALETTES_KEY: &str = "palettist.palettes";

/// A UNet of which some parameters are palettes.
#[derive(Debug, Default)]
pub struct PalettizedCheckpoint {
    /// Palettized parameters by their diffusers name.
    pub palettes: BTreeMap<String, Palette>,
    /// All others, in f16.
    pub dense: BTreeMap<String, Tensor>,
    /// What was palettized, and how: [`SOURCE_MODEL`], [`RECIPE`] and whatever the writer adds.
    pub metadata: BTreeMap<String, String>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    bits: u32,
    shape: Vec<i64>,
}

impl PalettizedCheckpoint {
    /// All parameters as dense tensors of their shapes. They share no memory with the checkpoint.
    ///
    /// # Errors
    /// libtorch's (no memory, no such device).
    pub fn weights(&self, kind: Kind, device: Device) -> Result<Weights> {
        let mut weights = Weights::with_capacity(self.palettes.len() + self.dense.len());
        for (name, palette) in &self.palettes {
            weights.insert(name.clone(), palette.tensor(kind, device).with_context(|| format!("parameter {name}"))?);
        }
        for (name, tensor) in &self.dense {
            // A copy even where nothing changes: what trains on these weights must not write into the checkpoint.
            weights.insert(name.clone(), tensor.f_to_device(device)?.f_to_dtype(kind, false, true)?);
        }
        Ok(weights)
    }

    /// Reads the file at `path`.
    ///
    /// # Errors
    /// When it cannot be read, is not such a file, or its parts do not fit each other; names the file, and the
    /// parameter.
    pub fn read(path: &Path) -> Result<Self> {
        let file = TensorFile::open(path)?;
        Self::parse(&file).with_context(|| format!("cannot read the palettized checkpoint {}", path.display()))
    }

    fn parse(file: &TensorFile) -> Result<Self> {
        let mut metadata = file.metadata();
        let (Some(version), Some(headers)) = (metadata.remove(VERSION_KEY), metadata.remove(PALETTES_KEY)) else {
            bail!(
                "it holds no palettes (no `{VERSION_KEY}` or no `{PALETTES_KEY}` in its metadata); \
                `palettist palettize` makes such a file"
            );
        };
        ensure!(version == VERSION, "its format has version {version}, and this program reads version {VERSION}");
        let headers: BTreeMap<String, Header> =
            serde_json::from_str(&headers).with_context(|| format!("`{PALETTES_KEY}` in its metadata"))?;

        let mut palettes = BTreeMap::new();
        let mut dense = BTreeMap::new();
        for name in file.names() {
            let parameter = |suffix| name.strip_suffix(suffix).filter(|parameter| headers.contains_key(*parameter));
            if parameter(".indices").is_some() || parameter(".palette").is_some() {
                continue;
            }
            ensure!(!headers.contains_key(&name), "parameter {name} is there twice, as a palette and as a tensor");
            let kind = file.kind(&name)?;
            ensure!(kind == Kind::Half, "parameter {name} is stored as {kind:?}, and Half is expected");
            dense.insert(name.clone(), file.tensor(&name)?);
        }
        for (name, header) in headers {
            let palette = palette(file, &name, header).with_context(|| format!("parameter {name}"))?;
            palettes.insert(name, palette);
        }
        Ok(Self { palettes, dense, metadata })
    }

    /// Writes the file at `path`: whole or, on an error, not at all; a file that was there is replaced.
    ///
    /// # Errors
    /// When the file cannot be written, or a parameter is not of f16 or is there twice.
    pub fn write(&self, path: &Path) -> Result<()> {
        let place = || format!("cannot write the palettized checkpoint {}", path.display());
        let mut headers = BTreeMap::new();
        let mut parts = Vec::with_capacity(2 * self.palettes.len());
        for (name, palette) in &self.palettes {
            let Palette { bits, shape, indices, entries } = palette;
            ensure!(!self.dense.contains_key(name), "parameter {name} is there twice, as a palette and as a tensor");
            parts.push((indices_name(name), Tensor::f_from_slice(&packing::pack(indices, *bits))?));
            parts.push((entries_name(name), Tensor::f_from_slice(entries)?));
            headers.insert(name, Header { bits: *bits, shape: shape.clone() });
        }
        if let Some((name, tensor)) = self.dense.iter().find(|(_, tensor)| tensor.kind() != Kind::Half) {
            return Err(anyhow!("parameter {name} is {:?}, and Half is expected", tensor.kind())).with_context(place);
        }
        let mut metadata = self.metadata.clone();
        metadata.insert(VERSION_KEY.to_string(), VERSION.to_string());
        metadata.insert(PALETTES_KEY.to_string(), serde_json::to_string(&headers)?);
        let tensors = parts.iter().map(|(name, tensor)| (name.as_str(), tensor));
        let dense = self.dense.iter().map(|(name, tensor)| (name.as_str(), tensor));
        write_safetensors(path, tensors.chain(dense), None, &metadata).with_context(place)
    }
}

fn indices_name(name: &str) -> String {
    format!("{name}.indices")
}

fn entries_name(name: &str) -> String {
    format!("{name}.palette")
}

/// The palette of the parameter `name`.
fn palette(file: &TensorFile, name: &str, Header { bits, shape }: Header) -> Result<Palette> {
    let (indices, entries) = (indices_name(name), entries_name(name));
    let (Some(packed), Some(values)) = (file.shape(&indices), file.shape(&entries)) else {
        bail!("`{indices}` or `{entries}` is missing");
    };
    ensure!(super::BITS.contains(&bits), "a palette has 1, 2, 4, 6 or 8 bits, not {bits}");
    let kind = file.kind(&indices)?;
    ensure!(
        kind == Kind::Uint8 && packed.len() == 1,
        "its indices are {kind:?} of shape {packed:?}, and Uint8 of one axis is expected"
    );
    let kind = file.kind(&entries)?;
    ensure!(
        kind == Kind::Half && values == [1 << bits],
        "its palette is {kind:?} of shape {values:?}, and Half of shape [{}] is expected",
        1 << bits
    );
    let indices = packing::unpack(file.bytes(&indices)?, bits, elements(&shape)?)?;
    // The file's bytes are little-endian and need not be aligned.
    let entries = file.bytes(&entries)?.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]])).collect();
    Palette::new(bits, shape, indices, entries)
}
