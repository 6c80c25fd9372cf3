//! What a run learns from, by content: the values of the model's weights and the pictures of the data set. Both are kept in
//! its checkpoints, so that a resumed run does not mind that a folder moved, and notices that its content changed.
//!
//! Weights are read once before any work, which also finds those that nothing could be learned from: values that are not
//! finite, or beyond what fp16 holds.

use std::collections::{BTreeMap, HashSet};

use anyhow::{Context, Result, bail};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tch::{Device, Kind};

use crate::config::{Config, TrainedComponent};
use crate::data::Manifest;
use crate::files::hex;
use crate::palette::PalettizedFile;
use crate::source::{Component, Model, described};
use crate::torch::slices;

/// The largest number of fp16, in which models and packages are written.
pub const LARGEST: f32 = 65504.0;

/// What a run learns from.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    pub model: ModelIdentity,
    /// What is trained on; validation is not.
    pub data: Manifest,
}

impl Identity {
    /// What is different in `now`, one line each.
    pub fn changes(&self, now: &Self) -> Vec<String> {
        let mut lines = self.model.changes(&now.model);
        lines.extend(self.data.changes(&now.data));
        lines
    }
}

/// A model by its content: a hash for each of its parts.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ModelIdentity(BTreeMap<String, String>);

/// How the parts of a teacher are called.
const TEACHERS: &str = "teacher's ";

/// What reading a model's weights told.
pub struct Read {
    pub identity: ModelIdentity,
    /// Whether the UNet's weights were quantized before; `None` where they were not read.
    pub values: Option<FewValues>,
}

/// How many of a network's larger layers hold few different values, as palettes and fp8 leave them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FewValues {
    /// Layers with enough weights to tell.
    looked_at: usize,
    /// Those with few values.
    few: usize,
    /// The most values that one of these has.
    most: usize,
}

impl FewValues {
    /// How many of a layer's first weights are looked at, and how many values are few: float weights have many hundred.
    const LOOKED_AT: usize = 4096;
    const FEW: usize = 256;

    fn add(&mut self, values: &[f32]) {
        let Some(first) = values.get(..Self::LOOKED_AT) else { return };
        let mut seen = HashSet::new();
        let many = first.iter().any(|value| seen.insert(value.to_bits()) && seen.len() > Self::FEW);
        self.looked_at += 1;
        if !many {
            self.few += 1;
            self.most = self.most.max(seen.len());
        }
    }

    fn joined(self, other: Self) -> Self {
        Self { looked_at: self.looked_at + other.looked_at, few: self.few + other.few, most: self.most.max(other.most) }
    }

    /// A remark where most layers have few values.
    pub fn remark(self) -> Option<String> {
        (2 * self.few > self.looked_at).then(|| {
            format!(
                "{} of the UNet's {} larger layers hold at most {} different values: they were quantized before (palettes, \
                 fp8), and training begins from these values, not from float weights",
                self.few, self.looked_at, self.most
            )
        })
    }
}

impl ModelIdentity {
    /// Reads all weights that training begins with, and checks them.
    ///
    /// # Errors
    /// A weight is not finite or beyond fp16: names the tensor. The model can't be read.
    pub fn of(model: &Model, config: &Config) -> Result<Read> {
        let mut parts = BTreeMap::new();
        let mut few = None;
        for component in model.components().filter(|&component| is_used(config, component)) {
            // Two models of one shape may differ in how their weights are used.
            let mut hash = Sha256::new();
            hash.update(described(&model.config_json(component)?));
            if !(config.model.train_from_scratch && config.train.learns(component)) {
                let (sum, values) = weights(model, component)?;
                hash.update(sum.to_le_bytes());
                few = few.or(Some(values).filter(|_| component == Component::Unet));
            }
            parts.insert(component.title().to_owned(), hex(&hash.finalize()));
        }
        if config.train.component == TrainedComponent::Unet {
            parts.insert("scheduler".into(), hex(&Sha256::digest(described(&model.scheduler_config()?))));
            let vocabulary = model.tokenizer_for_swift()?.files.map(|(_, text)| text).concat();
            parts.insert("tokenizer".into(), hex(&Sha256::digest(vocabulary)));
        }
        Ok(Read { identity: Self(parts), values: few })
    }

    /// With what a teacher answers by.
    ///
    /// # Errors
    /// A weight of it is not finite or beyond fp16: names the tensor. It can't be read.
    pub fn with_teacher(mut self, teacher: &Model) -> Result<Self> {
        for component in std::iter::once(Component::Unet).chain(teacher.text_encoders()) {
            let mut hash = Sha256::new();
            hash.update(described(&teacher.config_json(component)?));
            hash.update(weights(teacher, component)?.0.to_le_bytes());
            self.0.insert(format!("{TEACHERS}{}", component.title()), hex(&hash.finalize()));
        }
        Ok(self)
    }

    /// Without a teacher, which is still to come.
    pub fn without_teacher(&self) -> Self {
        Self(
            self.0
                .iter()
                .filter(|(part, _)| !part.starts_with(TEACHERS))
                .map(|(a, b)| (a.clone(), b.clone()))
                .collect(),
        )
    }

    /// With the palettes whose assignments stay.
    ///
    /// # Errors
    /// They can't be read.
    pub fn with_palettes(mut self, file: &PalettizedFile) -> Result<Self> {
        self.0.insert("palettes".to_owned(), file.key()?);
        Ok(self)
    }

    /// Whether its teacher is the model itself: it can teach nothing that the model does not know.
    pub fn teacher_is_base(&self) -> bool {
        let unet = Component::Unet.title();
        self.0.get(unet).is_some_and(|own| self.0.get(&format!("{TEACHERS}{unet}")) == Some(own))
    }

    fn changes(&self, now: &Self) -> Vec<String> {
        let differs = |name: &&String| self.0.get(*name) != now.0.get(*name);
        let mut names: Vec<&str> = self.0.keys().chain(now.0.keys()).filter(differs).map(String::as_str).collect();
        names.sort_unstable();
        names.dedup();
        match names[..] {
            [] => Vec::new(),
            _ => vec![format!("the model is another: its {} changed", names.join(", "))],
        }
    }
}

/// Whether a run reads the weights of this network.
fn is_used(config: &Config, component: Component) -> bool {
    match config.train.component {
        TrainedComponent::Unet => true,
        TrainedComponent::Autoencoder => component == Component::Autoencoder,
    }
}

fn not_finite(model: &Model, component: Component, name: &str) -> String {
    format!("{}: {}", model.path().display(), component.not_finite(name))
}

/// Checks that all weights with which a text becomes a picture are numbers: of others nothing can be measured.
///
/// # Errors
/// One that is not, by name; [`super::Stopped`].
pub fn check_finite(model: &Model) -> Result<()> {
    for component in model.text_encoders().chain([Component::Unet, Component::Autoencoder]) {
        let stored = model.stored(component)?;
        let mut names: Vec<&str> = stored.names().collect();
        names.sort_unstable();
        let damaged = names.par_iter().map(|name| {
            super::stop::go_on()?;
            let tensor = stored.tensor(name, Kind::Float, Device::Cpu)?;
            Ok(tensor.f_isfinite()?.f_all()?.f_int64_value(&[])? == 0)
        });
        let damaged: Vec<bool> = damaged.collect::<Result<_>>()?;
        if let Some((name, _)) = names.iter().zip(damaged).find(|(_, damaged)| *damaged) {
            bail!(not_finite(model, component, name));
        }
    }
    Ok(())
}

/// A checksum of all weights of a network by name and value, whatever type they are stored in; and how many values they
/// take.
fn weights(model: &Model, component: Component) -> Result<(u64, FewValues)> {
    let stored = model.stored(component)?;
    let mut names: Vec<&str> = stored.names().collect();
    names.sort_unstable();
    let sums: Vec<(u64, FewValues)> = names
        .par_iter()
        .map(|name| {
            super::stop::go_on()?;
            let tensor = stored.tensor(name, Kind::Float, Device::Cpu)?.f_contiguous()?;
            // SAFETY: the tensor was read here: no other handle reaches its memory.
            let values = unsafe { slices::elements::<f32>(&tensor)? };
            let (sum, largest) = checksum(&values);
            if !largest.is_finite() {
                bail!(not_finite(model, component, name));
            }
            if largest > LARGEST {
                let place = format!("{}: the {}'s `{name}`", model.path().display(), component.title());
                bail!("{place} holds {largest}, beyond {LARGEST}, the largest number of fp16");
            }
            let mut few = FewValues::default();
            if tensor.dim() > 1 {
                few.add(&values);
            }
            Ok((sum, few))
        })
        .collect::<Result<_>>()
        .with_context(|| format!("the {} cannot be trained with", component.title()))?;
    let mut hash = Sha256::new();
    let few = sums.iter().fold(FewValues::default(), |all, (_, few)| all.joined(*few));
    for (name, (sum, _)) in names.iter().zip(sums) {
        hash.update((name.len() as u64).to_le_bytes());
        hash.update(name);
        hash.update(sum.to_le_bytes());
    }
    let mut first = [0; 8];
    first.copy_from_slice(&hash.finalize()[..8]);
    Ok((u64::from_le_bytes(first), few))
}

/// A sum over the bits of all values, each times an odd number of its place; and the largest magnitude, which is not
/// finite when one of them is not.
fn checksum(values: &[f32]) -> (u64, f32) {
    let (mut sum, mut largest) = (0u64, 0u32);
    for (place, value) in values.iter().enumerate() {
        let bits = value.to_bits();
        let factor = (place as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        sum = sum.wrapping_add(u64::from(bits).wrapping_add(1).wrapping_mul(factor));
        // Of bits without their sign the order is that of magnitudes; infinities and NaN come last.
        largest = largest.max(bits & 0x7FFF_FFFF);
    }
    (sum, f32::from_bits(largest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checksum_sees_values_places_and_what_is_not_finite() {
        let (sum, largest) = checksum(&[1.0, -3.0, 2.0]);
        assert_eq!(largest, 3.0);
        for other in [&[1.0, -3.0][..], &[-3.0, 1.0, 2.0], &[1.0, -3.0, 2.000_000_2], &[1.0, -3.0, 2.0, 0.0]] {
            assert_ne!(checksum(other).0, sum, "{other:?}");
        }
        assert!(checksum(&[1.0, f32::NAN]).1.is_nan());
        assert_eq!(checksum(&[1.0, f32::NEG_INFINITY]).1, f32::INFINITY);
        assert_eq!(checksum(&[-0.0]).1, 0.0);
    }

    #[test]
    fn layers_of_few_values_are_counted() {
        let few = |layers: &[(usize, usize)]| {
            let mut all = FewValues::default();
            for &(weights, values) in layers {
                all.add(&(0..weights).map(|place| (place % values) as f32 * 0.01 - 1.0).collect::<Vec<_>>());
            }
            all
        };
        assert_eq!(few(&[(4095, 4)]), FewValues::default(), "too few to tell");
        assert_eq!(few(&[(4096, 257), (9000, 5000)]).remark(), None);
        // One layer of zeros is no palette.
        assert_eq!(few(&[(4096, 4000), (9000, 1)]).remark(), None);
        let told = few(&[(4096, 16), (9000, 256), (5000, 3000)]).remark().unwrap();
        assert!(told.starts_with("2 of the UNet's 3 larger layers hold at most 256 different values"), "{told}");
    }
}
