//! The palettized checkpoint: a whole UNet in one safetensors file. Training and post-training palettization write
//! it; everything downstream reads it.
//!
//! For a palettized parameter `NAME` of `shape` and of a [`Form`] (G tables of 2^bits entries of d weights):
//!
//! | tensor | type | shape |
//! |---|---|---|
//! | `NAME.indices` | U8 | `[⌈bits · elements / d / 8⌉]`: [`Palette::indices`] as [`packing`] has it |
//! | `NAME.palette` | F16, or I8 | `[2^bits]` of a plain palette, `[G, 2^bits, d]` of others |
//! | `NAME.scales` | F16 | where there are any: `[G]` or `[C]`, as [`Palette::scales`] says |
//!
//! Every other parameter is there under its own name, in F16. The file's metadata: `palettist.version`,
//! `palettist.palettes` (JSON, `NAME` → `{"bits", "shape"}`, and for what is not plain `"group_size"`, `"axis"`,
//! `"cluster_dim"`, `"per_channel_scale"`, `"lut_dtype"`), and under other keys what was palettized, and how. The
//! version is 1 where all palettes are plain and of 1, 2, 4, 6 or 8 bits, else 2: programs that know only the first
//! refuse the file. Equal checkpoints are equal bytes.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail, ensure};
use half::f16;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tch::{Device, Kind, Tensor};

use super::packing;
use crate::files::{TensorFile, hex, write_safetensors};
use crate::ops::Weights;
use crate::palette::forms::{check_form, elements};
use crate::palette::{Form, LutDtype, Palette};

/// The version of the format that holds plain palettes.
const PLAIN_VERSION: &str = "1";
/// The version that holds every [`Form`].
const VERSION: &str = "2";
/// The key of [`PalettizedCheckpoint::metadata`] for the model that was palettized.
pub const SOURCE_MODEL: &str = "source_model";
/// The key of [`PalettizedCheckpoint::metadata`] for how it was: the resolved configuration, or the command.
pub const RECIPE: &str = "recipe";

const VERSION_KEY: &str = "palettist.version";
const PALETTES_KEY: &str = "palettist.palettes";
/// The version of a subject ([`super::subject`]), and the [`PalettizedFile::key`] of its base.
pub(super) const SUBJECT_KEY: &str = "palettist.subject";
pub(super) const SUBJECT_VERSION: &str = "1";
pub(super) const BASE_KEY: &str = "palettist.base";

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
    #[serde(default, skip_serializing_if = "Option::is_none")]
    group_size: Option<usize>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    axis: Option<usize>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    cluster_dim: Option<usize>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    per_channel_scale: Option<bool>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    lut_dtype: Option<LutDtype>,
}

impl Header {
    fn of(palette: &Palette) -> Self {
        let (form, plain) = (palette.form, Form::per_tensor(palette.form.bits));
        Self {
            bits: form.bits,
            shape: palette.shape.clone(),
            group_size: form.group_size,
            axis: (form.axis != plain.axis).then_some(form.axis),
            cluster_dim: (form.cluster_dim != plain.cluster_dim).then_some(form.cluster_dim),
            per_channel_scale: form.per_channel_scale.then_some(true),
            lut_dtype: (form.lut_dtype != plain.lut_dtype).then_some(form.lut_dtype),
        }
    }

    fn form(&self) -> Form {
        let plain = Form::per_tensor(self.bits);
        Form {
            group_size: self.group_size,
            axis: self.axis.unwrap_or(plain.axis),
            cluster_dim: self.cluster_dim.unwrap_or(plain.cluster_dim),
            per_channel_scale: self.per_channel_scale.unwrap_or(plain.per_channel_scale),
            lut_dtype: self.lut_dtype.unwrap_or(plain.lut_dtype),
            ..plain
        }
    }
}

impl PalettizedCheckpoint {
    /// A parameter whose palette needs iOS 18, and what of it does, in the plural; `None` where iOS 16 will do.
    pub fn needs_ios18(&self) -> Option<(&str, &'static str)> {
        self.palettes.iter().find_map(|(name, palette)| Some((name.as_str(), palette.form.needs_ios18()?)))
    }

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
        Self::of(&PalettizedFile::open(path)?)
    }

    /// All that a file has, and the subject on it.
    ///
    /// # Errors
    /// When its parts do not fit each other; names the file, and the parameter.
    pub fn of(file: &PalettizedFile) -> Result<Self> {
        let mut checkpoint = Self { metadata: file.metadata.clone(), ..Self::default() };
        for name in file.names() {
            match file.read(name)? {
                Parameter::Palette(palette) => drop(checkpoint.palettes.insert(name.to_owned(), palette)),
                Parameter::Dense(tensor) => drop(checkpoint.dense.insert(name.to_owned(), tensor)),
            }
        }
        Ok(checkpoint)
    }

    /// Writes the file at `path`: whole or, on an error, not at all; a file that was there is replaced.
    ///
    /// # Errors
    /// When the file cannot be written, or a parameter is not of f16 or is there twice.
    pub fn write(&self, path: &Path) -> Result<()> {
        let place = || format!("cannot write the palettized checkpoint {}", path.display());
        let mut headers = BTreeMap::new();
        let mut parts = Vec::with_capacity(3 * self.palettes.len());
        for (name, palette) in &self.palettes {
            let Palette { form, indices, entries, scales, .. } = palette;
            ensure!(!self.dense.contains_key(name), "parameter {name} is there twice, as a palette and as a tensor");
            parts.push((indices_name(name), Tensor::f_from_slice(&packing::pack(indices, form.bits))?));
            parts.push((entries_name(name), entries_tensor(*form, &palette.shape, entries)?));
            if !scales.is_empty() {
                parts.push((scales_name(name), Tensor::f_from_slice(scales)?));
            }
            headers.insert(name, Header::of(palette));
        }
        if let Some((name, tensor)) = self.dense.iter().find(|(_, tensor)| tensor.kind() != Kind::Half) {
            return Err(anyhow!("parameter {name} is {:?}, and Half is expected", tensor.kind())).with_context(place);
        }
        let mut metadata = self.metadata.clone();
        let version = if self.needs_ios18().is_some() { VERSION } else { PLAIN_VERSION };
        metadata.insert(VERSION_KEY.to_string(), version.to_string());
        metadata.insert(PALETTES_KEY.to_string(), serde_json::to_string(&headers)?);
        let tensors = parts.iter().map(|(name, tensor)| (name.as_str(), tensor));
        let dense = self.dense.iter().map(|(name, tensor)| (name.as_str(), tensor));
        write_safetensors(path, tensors.chain(dense), None, &metadata).with_context(place)?;
        Ok(())
    }
}

/// A parameter as a palettized checkpoint has it.
#[derive(Debug)]
pub enum Parameter {
    Palette(Palette),
    /// In f16.
    Dense(Tensor),
}

/// A palettized checkpoint on disk, to read one parameter at a time: in memory each index takes a byte.
pub struct PalettizedFile {
    file: TensorFile,
    headers: BTreeMap<String, Header>,
    /// What is no palette, with its shape.
    dense: BTreeMap<String, Vec<i64>>,
    /// What was put on it: its tensors are in place of those of the same name.
    subject: Option<TensorFile>,
    /// As [`PalettizedCheckpoint::metadata`].
    pub metadata: BTreeMap<String, String>,
}

impl PalettizedFile {
    /// The file.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// Reads what the file at `path` says of its parameters.
    ///
    /// # Errors
    /// When it cannot be read or is not such a file; names it.
    pub fn open(path: &Path) -> Result<Self> {
        let file = TensorFile::open(path)?;
        Self::parse(file).with_context(|| format!("cannot read the palettized checkpoint {}", path.display()))
    }

    fn parse(file: TensorFile) -> Result<Self> {
        let mut metadata = file.metadata();
        let (Some(version), Some(headers)) = (metadata.remove(VERSION_KEY), metadata.remove(PALETTES_KEY)) else {
            bail!(
                "it holds no palettes (no `{VERSION_KEY}` or no `{PALETTES_KEY}` in its metadata); \
                `palettist palettize` makes such a file"
            );
        };
        ensure!(
            [PLAIN_VERSION, VERSION].contains(&version.as_str()),
            "its format has version {version}, and this program reads versions {PLAIN_VERSION} and {VERSION}"
        );
        let headers: BTreeMap<String, Header> =
            serde_json::from_str(&headers).with_context(|| format!("`{PALETTES_KEY}` in its metadata"))?;

        let mut dense = BTreeMap::new();
        for name in file.names() {
            let parameter = |suffix| name.strip_suffix(suffix).filter(|parameter| headers.contains_key(*parameter));
            if [".indices", ".palette", ".scales"].into_iter().any(|part| parameter(part).is_some()) {
                continue;
            }
            ensure!(!headers.contains_key(&name), "parameter {name} is there twice, as a palette and as a tensor");
            let kind = file.kind(&name)?;
            ensure!(kind == Kind::Half, "parameter {name} is stored as {kind:?}, and Half is expected");
            let shape = file.shape(&name).unwrap_or_default();
            dense.insert(name, shape);
        }
        Ok(Self { file, headers, dense, subject: None, metadata })
    }

    /// With a subject that was learnt on it ([`super::subject`]), of the file at `path`.
    ///
    /// # Errors
    /// It is not such a file, or was learnt on another base; names both.
    pub fn with_subject(mut self, path: &Path) -> Result<Self> {
        let subject = TensorFile::open(path)?;
        let shown = path.display();
        let metadata = subject.metadata();
        let (Some(version), Some(base)) = (metadata.get(SUBJECT_KEY), metadata.get(BASE_KEY)) else {
            bail!(
                "{shown} is not a subject (no `{SUBJECT_KEY}` or no `{BASE_KEY}` in its metadata); a run with palettize.palettes \
                 makes such a file"
            );
        };
        ensure!(
            version == SUBJECT_VERSION,
            "the format of the subject {shown} has version {version}, and this program reads version {SUBJECT_VERSION}"
        );
        ensure!(
            *base == self.key()?,
            "the subject {shown} was learnt on other palettes than {}: it goes onto those alone",
            self.file.path().display()
        );
        let is_known = |name: &String| {
            let of_palette = name.strip_suffix(".palette").is_some_and(|name| self.headers.contains_key(name));
            of_palette || self.dense.contains_key(name)
        };
        if let Some(unknown) = subject.names().iter().find(|name| !is_known(name)) {
            bail!("the subject {shown} has {unknown}, which its base has not");
        }
        self.subject = Some(subject);
        Ok(self)
    }

    /// A hash of all parameters, by which the same content is known wherever it lies. What was put on it does not count.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn key(&self) -> Result<String> {
        let mut hash = Sha256::new();
        for name in self.names() {
            hash.update((name.len() as u64).to_le_bytes());
            hash.update(name);
            match self.headers.get(name) {
                Some(header) => {
                    hash.update(serde_json::to_vec(header)?);
                    for part in [indices_name(name), entries_name(name), scales_name(name)] {
                        if self.file.shape(&part).is_some() {
                            hash.update(self.file.bytes(&part)?);
                        }
                    }
                }
                None => hash.update(self.file.bytes(name)?),
            }
        }
        Ok(hex(&hash.finalize()[..16]))
    }

    /// Names of all parameters.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.headers.keys().chain(self.dense.keys()).map(String::as_str)
    }

    /// Names and shapes of all parameters.
    pub fn shapes(&self) -> BTreeMap<&str, &[i64]> {
        let palettes = self.headers.iter().map(|(name, header)| (name.as_str(), header.shape.as_slice()));
        palettes.chain(self.dense.iter().map(|(name, shape)| (name.as_str(), shape.as_slice()))).collect()
    }

    /// Names, forms and shapes of the parameters that are palettes.
    pub fn palettes(&self) -> impl Iterator<Item = (&str, Form, &[i64])> {
        self.headers.iter().map(|(name, header)| (name.as_str(), header.form(), header.shape.as_slice()))
    }

    /// As [`PalettizedCheckpoint::needs_ios18`].
    pub fn needs_ios18(&self) -> Option<(&str, &'static str)> {
        self.headers.iter().find_map(|(name, header)| Some((name.as_str(), header.form().needs_ios18()?)))
    }

    /// Reads the parameter `name`.
    ///
    /// # Errors
    /// When there is none, or its parts do not fit each other; names the file and the parameter.
    pub fn read(&self, name: &str) -> Result<Parameter> {
        let shown = self.file.path().display();
        let read = || match self.headers.get(name) {
            Some(header) => {
                let learned = self.subject.as_ref().filter(|subject| subject.shape(&entries_name(name)).is_some());
                palette((&self.file, learned.unwrap_or(&self.file)), name, header).map(Parameter::Palette)
            }
            None => match self.subject.as_ref().filter(|subject| subject.shape(name).is_some()) {
                Some(subject) => {
                    let (shape, kind) = (subject.shape(name).unwrap_or_default(), subject.kind(name)?);
                    ensure!(
                        kind == Kind::Half && self.dense.get(name) == Some(&shape),
                        "the subject's is {kind:?} of shape {shape:?}"
                    );
                    subject.tensor(name).map(Parameter::Dense)
                }
                None => self.file.tensor(name).map(Parameter::Dense),
            },
        };
        read()
            .with_context(|| format!("parameter {name}"))
            .with_context(|| format!("cannot read the palettized checkpoint {shown}"))
    }
}

fn indices_name(name: &str) -> String {
    format!("{name}.indices")
}

pub(super) fn entries_name(name: &str) -> String {
    format!("{name}.palette")
}

fn scales_name(name: &str) -> String {
    format!("{name}.scales")
}

/// The shape under which the entries of a palette for a weight of this shape are stored.
fn entries_shape(form: Form, shape: &[i64]) -> Vec<i64> {
    let Form { bits, cluster_dim, .. } = form;
    match form.is_per_tensor() {
        true => vec![1 << bits],
        false => vec![form.groups(shape) as i64, 1 << bits, cluster_dim as i64],
    }
}

/// Entries as they are stored.
///
/// # Errors
/// libtorch's (no memory), or when they are not as many as the form has.
pub(super) fn entries_tensor(form: Form, shape: &[i64], entries: &[f16]) -> Result<Tensor> {
    let entries = match form.lut_dtype {
        LutDtype::F16 => Tensor::f_from_slice(entries)?,
        LutDtype::I8 => Tensor::f_from_slice(&entries.iter().map(|e| e.to_f32() as i8).collect::<Vec<_>>())?,
    };
    Ok(entries.f_view(entries_shape(form, shape).as_slice())?)
}

/// The palette of the parameter `name`; its entries may be in another file.
fn palette((file, learned): (&TensorFile, &TensorFile), name: &str, header: &Header) -> Result<Palette> {
    let form = header.form();
    check_form(&form, &header.shape)?;
    let count = elements(&header.shape)? / form.cluster_dim;
    let packed = packing::packed_len(count, form.bits).unwrap_or(usize::MAX);
    let indices = part(file, &indices_name(name), Kind::Uint8, &[packed as i64])?;
    let unpacked = packing::unpack(indices, form.bits, count)?;
    file.let_go(indices);
    let entries = |kind| part(learned, &entries_name(name), kind, &entries_shape(form, &header.shape));
    let entries = match form.lut_dtype {
        LutDtype::F16 => halves(entries(Kind::Half)?),
        LutDtype::I8 => entries(Kind::Int8)?.iter().map(|&byte| f16::from_f32(f32::from(byte as i8))).collect(),
    };
    let scales = match form.scales(&header.shape) {
        0 => Vec::new(),
        count => halves(part(file, &scales_name(name), Kind::Half, &[count as i64])?),
    };
    Palette::with_form(form, header.shape.clone(), unpacked, entries, scales)
}

/// The bytes of a tensor that must be of this type and shape.
fn part<'f>(file: &'f TensorFile, name: &str, kind: Kind, shape: &[i64]) -> Result<&'f [u8]> {
    let Some(found) = file.shape(name) else { bail!("`{name}` is missing") };
    let found_kind = file.kind(name)?;
    ensure!(
        found_kind == kind && found == shape,
        "`{name}` is {found_kind:?} of shape {found:?}, and {kind:?} of shape {shape:?} is expected"
    );
    file.bytes(name)
}

/// The file's bytes are little-endian and need not be aligned.
fn halves(bytes: &[u8]) -> Vec<f16> {
    bytes.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]])).collect()
}
