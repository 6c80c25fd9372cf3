//! A subject that was learnt on a palettized base: other entries of its palettes, other biases and norms, nothing else. Some
//! hundred kilobytes that go onto that base and no other ([`PalettizedFile::with_subject`]).
//!
//! | tensor | type | shape |
//! |---|---|---|
//! | `NAME.palette` | as in the palettized checkpoint ([`super::checkpoint`]) | as there |
//! | `NAME` | F16 | of a bias or norm |
//!
//! The file's metadata: `palettist.subject` (the version, 1), `palettist.base` ([`PalettizedFile::key`] of the base), and how it
//! was learnt. Equal subjects are equal bytes.

use std::path::Path;

use anyhow::{Context, Result, ensure};

use super::checkpoint::{
    BASE_KEY, PalettizedCheckpoint, PalettizedFile, Parameter, SUBJECT_KEY, SUBJECT_VERSION, entries_name,
    entries_tensor,
};
use crate::files::write_safetensors;
use crate::palette::Palette;

/// Writes what of `learned` is not as in the base that it began with to the file at `path`: whole or, on an error, not at all.
///
/// # Errors
/// It differs in more than entries, biases and norms; the base can't be read; the file can't be written.
pub fn write(path: &Path, base: &PalettizedFile, learned: &PalettizedCheckpoint) -> Result<()> {
    let mut tensors = Vec::new();
    for name in base.names() {
        match base.read(name)? {
            Parameter::Palette(own) => {
                let palette = learned.palettes.get(name).with_context(|| format!("the palette of {name} is gone"))?;
                let Palette { form, shape, indices, scales, entries } = palette;
                let same = (form, shape, indices, scales) == (&own.form, &own.shape, &own.indices, &own.scales);
                ensure!(same, "the palette of {name} differs from the base's in more than its entries");
                if *entries != own.entries {
                    tensors.push((entries_name(name), entries_tensor(*form, shape, entries)?));
                }
            }
            Parameter::Dense(own) => {
                let tensor = learned.dense.get(name).with_context(|| format!("{name} is gone"))?;
                if !tensor.equal(&own) {
                    tensors.push((name.to_owned(), tensor.shallow_clone()));
                }
            }
        }
    }
    let mut metadata = learned.metadata.clone();
    metadata.insert(SUBJECT_KEY.to_owned(), SUBJECT_VERSION.to_owned());
    metadata.insert(BASE_KEY.to_owned(), base.key()?);
    write_safetensors(path, tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)), None, &metadata)
        .with_context(|| format!("cannot write the subject {}", path.display()))?;
    Ok(())
}
