//! A look at each picture before the work: whether it can be read, how large it is, whether it is there twice.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use rayon::prelude::*;
use sha2::{Digest, Sha256};

use super::Sample;
use super::listing::listed;
use super::picture::{decode_picture, is_animated};

/// What one picture is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Look {
    /// The hash of its pixels, upright and in RGB, as they are trained on: the same for a picture that was saved again in
    /// another lossless format, or with other metadata.
    pub pixels: [u8; 32],
    /// px, upright.
    pub width: u32,
    pub height: u32,
    /// Whether only its first picture is read.
    pub animated: bool,
}

/// Reads and decodes a picture.
///
/// # Errors
/// One line naming the file: not readable, not a picture, truncated or damaged, of an extreme shape.
pub fn look(path: &Path) -> Result<Look> {
    let named = || format!("cannot read the picture {}", path.display());
    let bytes = fs::read(path).with_context(named)?;
    let picture = decode_picture(&bytes).with_context(named)?;
    let mut hash = Sha256::new();
    // Rows of other lengths may have the same pixels.
    hash.update(picture.width().to_le_bytes());
    hash.update(picture.as_raw());
    Ok(Look {
        pixels: hash.finalize().into(),
        width: picture.width(),
        height: picture.height(),
        animated: is_animated(&bytes),
    })
}

/// [`look`] at many, on all cores.
pub fn look_at(samples: &[&Sample]) -> Vec<Result<Look>> {
    samples.par_iter().map(|sample| look(&sample.path)).collect()
}

/// Pictures with what they are.
pub type Looked<'s> = Vec<(&'s Sample, Look)>;

/// Warns of pictures that are there twice in one set.
pub(super) fn twice(pictures: &Looked, what: &str) -> Option<String> {
    let mut first: HashMap<[u8; 32], &Sample> = HashMap::new();
    let mut copies = Vec::new();
    for (sample, look) in pictures {
        match first.get(&look.pixels) {
            Some(earlier) => copies.push(format!("{} is {}", sample.name, earlier.name)),
            None => drop(first.insert(look.pixels, sample)),
        }
    }
    let are = if copies.len() == 1 { "is a copy of another" } else { "are copies of others" };
    (!copies.is_empty()).then(|| format!("warning: {} {what} {are}: {}", some(copies.len()), listed(&copies)))
}

/// Warns of pictures of one set that are in another one too, under whatever name.
pub(super) fn shared(pictures: &Looked, others: &Looked, what: &str, harm: &str) -> Option<String> {
    let known: HashMap<[u8; 32], &Sample> = others.iter().map(|(sample, look)| (look.pixels, *sample)).collect();
    let found = pictures.iter().filter_map(|(sample, look)| Some((sample, known.get(&look.pixels)?)));
    let names: Vec<String> = found.map(|(sample, other)| format!("{} is {}", sample.name, other.name)).collect();
    (!names.is_empty())
        .then(|| format!("warning: {} of the {} {what}, {harm}: {}", names.len(), pictures.len(), listed(&names)))
}

/// Warns of pictures that are enlarged more than twice.
pub(super) fn small(pictures: &Looked, resolution: i64, what: &str) -> Option<String> {
    let shorter = |look: &Look| i64::from(look.width.min(look.height));
    let small = pictures.iter().filter(|(_, look)| shorter(look) * 2 < resolution);
    let names: Vec<String> =
        small.map(|(sample, look)| format!("{} has {} × {} px", sample.name, look.width, look.height)).collect();
    let are = if names.len() == 1 { "is" } else { "are" };
    (!names.is_empty()).then(|| {
        format!(
            "warning: {} of the {} {what} {are} enlarged more than twice to data.resolution = {resolution}, and blurred: \
             {}",
            names.len(),
            pictures.len(),
            listed(&names)
        )
    })
}

/// Tells of pictures that move.
pub(super) fn animated(pictures: &Looked) -> Option<String> {
    let names: Vec<&str> =
        pictures.iter().filter(|(_, look)| look.animated).map(|(sample, _)| sample.name.as_str()).collect();
    (!names.is_empty()).then(|| format!("note: the first picture is read of what is animated: {}", listed(&names)))
}

fn some(count: usize) -> String {
    if count == 1 { "1 of the".into() } else { format!("{count} of the") }
}
