//! What is asked for, by flags or by `[export]`, becomes one [`Plan`], and the plan becomes packages.
//!
//! A plan is made before any work: it knows the networks, their sizes, the system they are for, their names and places.
//! Nothing below it reads a flag or a key of a config again.

use std::path::{Path, PathBuf};

use anyhow::Result;

use super::nbits::{Nbits, forms};
use crate::coreml::bundle::Bundle;
use crate::coreml::components::apple::{misfits, takes_safety_checker};
use crate::coreml::components::{
    Attended, Part, UnetOptions, autoencoder_numbers, export_autoencoder, export_safety_checker, export_text_encoder,
    export_unet,
};
use crate::coreml::format::metadata::{PALETTES, PackageMetadata};
use crate::coreml::format::package::chunk_paths;
use crate::coreml::format::place::{recover, replaces};
use crate::coreml::prompt::{Prompt, prompt_tokens};
use crate::coreml::strangers::of_other_weights;
use crate::coreml::writing::chunk::export_in_chunks;
use crate::coreml::writing::interface::{Destination, Weighted};
use crate::coreml::writing::lowering::velocity::Velocity;
use crate::coreml::writing::weights::{PostTraining, WeightSource};
use crate::coreml::{AttentionImplementation, DeploymentTarget};
use crate::pipeline::text_to_image;
use crate::source::{Model, SwiftTokenizer};

/// What is asked for.
#[derive(Clone, Debug, Default)]
pub struct Asked {
    /// Each once, in the order in which they are written; `None` for all that the model has, the safety checker only where
    /// Apple's programs can use it.
    pub parts: Option<Vec<Part>>,
    /// Bits of the palettes that are made on the way.
    pub nbits: Nbits,
    /// Also makes the folder `Resources`.
    pub bundle: bool,
    pub attention: AttentionImplementation,
    /// The first that holds the palettes if not given.
    pub target: Option<DeploymentTarget>,
    /// Height and width of the latents; those that the UNet was made for if not given.
    pub latents: Option<(i64, i64)>,
    pub batch_one: bool,
    pub controlnet: bool,
    pub chunk: bool,
    /// Replaces packages that are there.
    pub overwrite: bool,
}

/// Palettes that the UNet has already.
#[derive(Clone, Debug, Default)]
pub struct OwnPalettes {
    /// The first that needs iOS 18, by name, and what of it does.
    pub needs_ios18: Option<(String, &'static str)>,
}

/// A target was asked for that does not hold the palettes.
#[derive(Debug, thiserror::Error)]
#[error("{target} does not hold {what}, as of {name}")]
pub struct TooOld {
    pub target: DeploymentTarget,
    pub what: &'static str,
    pub name: String,
}

/// What is written, where, and as what.
pub struct Plan<'a> {
    pub model: &'a Model,
    pub folder: PathBuf,
    /// In the order in which they are written.
    pub parts: Vec<Part>,
    /// What the UNet's package is made for; sizes, target and whether packages are replaced hold for all packages.
    pub options: UnetOptions,
    /// What packages say of themselves, and what they are named after.
    pub metadata: PackageMetadata,
    nbits: Nbits,
    chunk: bool,
    has_palettes: bool,
    tokenizer: Option<SwiftTokenizer>,
    /// Last parts of the packages' names.
    components: Vec<String>,
}

impl<'a> Plan<'a> {
    /// Plans packages of `model` in `folder`. `palettes` are those that its UNet has.
    ///
    /// # Errors
    /// [`TooOld`]; networks that do not fit each other; a configuration or the tokenizer can't be read.
    pub fn new(
        model: &'a Model,
        asked: &Asked,
        palettes: Option<&OwnPalettes>,
        folder: &Path,
        metadata: PackageMetadata,
    ) -> Result<Self> {
        let config = model.unet_config()?;
        let defaults = UnetOptions::new(&config);
        let (height, width) = asked.latents.unwrap_or((defaults.height, defaults.width));
        let parts = match &asked.parts {
            Some(parts) => parts.clone(),
            None => all(model, height, width)?,
        };
        let palettized = parts.iter().copied().filter(|part| *part != Part::Unet || palettes.is_none());
        let made = asked.nbits.needs_ios18(palettized).map(|(name, what)| (name.to_owned(), what));
        let target = match (asked.target, palettes.and_then(|palettes| palettes.needs_ios18.clone()).or(made)) {
            (Some(target), Some((name, what))) if target != DeploymentTarget::Ios18 => {
                return Err(TooOld { target, what, name }.into());
            }
            (Some(target), _) => target,
            (None, Some(_)) => DeploymentTarget::Ios18,
            (None, None) => DeploymentTarget::Ios16,
        };
        let options = UnetOptions {
            batch: if asked.batch_one { 1 } else { 2 },
            height,
            width,
            tokens: prompt_tokens(model)?,
            target,
            attention: asked.attention,
            controlnet: asked.controlnet,
            velocity: Velocity::of(&text_to_image::schedule(model)?),
            overwrite: asked.overwrite,
        };
        let components = parts.iter().map(|part| part.package(asked.controlnet).to_owned()).collect();
        Ok(Self {
            model,
            folder: folder.to_owned(),
            parts,
            options,
            metadata,
            nbits: asked.nbits.clone(),
            chunk: asked.chunk,
            has_palettes: palettes.is_some(),
            tokenizer: asked.bundle.then(|| model.tokenizer_for_swift()).transpose()?,
            components,
        })
    }

    /// Whether the palettes that are made on the way are made for a package: those that a UNet has already stay.
    pub fn palettizes(&self, part: Part) -> bool {
        self.nbits.of(part).is_some() && !(part == Part::Unet && self.has_palettes)
    }

    /// Looks at the places of a package, before the work.
    ///
    /// # Errors
    /// [`Occupied`](crate::coreml::format::place::Occupied) where something is that is not to be replaced; what killed
    /// processes left can't be put right.
    pub fn check_place(&self, part: Part) -> Result<()> {
        self.places(part).iter().try_for_each(|path| {
            recover(path)?;
            replaces(path, self.options.overwrite)?;
            Ok(())
        })
    }

    /// What is said where the folder holds a package of other weights than the model's, though it has the model's name, which
    /// is not written again.
    pub fn of_other_weights(&self) -> Option<String> {
        let replaced: Vec<PathBuf> = self.parts.iter().flat_map(|&part| self.places(part)).collect();
        let other = of_other_weights(&self.folder, &self.metadata, &replaced, self.options.overwrite)?;
        let model = self.model.path().display();
        Some(format!("{} is of another model of this name: its weights are not those of {model}", other.display()))
    }

    /// Where the package of `part` is: a UNet whole or in chunks, not both, since programs would take the chunks, however old.
    fn places(&self, part: Part) -> Vec<PathBuf> {
        let whole = self.path(part);
        let chunks = chunk_paths(&whole);
        std::iter::once(whole).chain(chunks.into_iter().filter(|_| part == Part::Unet)).collect()
    }

    fn path(&self, part: Part) -> PathBuf {
        self.folder.join(self.metadata.package_name(part.package(self.options.controlnet)))
    }

    /// What of the packages Apple's programs cannot use as it is meant: a line each.
    ///
    /// # Errors
    /// As [`misfits`].
    pub fn warnings(&self) -> Result<Vec<String>> {
        let mut lines = misfits(self.model, &self.parts, &self.options)?;
        let unreachable = self.tokenizer.as_ref().map(|tokenizer| tokenizer.unreachable.as_slice()).unwrap_or_default();
        if !unreachable.is_empty() {
            lines.push(format!(
                "Apple's programs take words apart by merges.txt and never make the added tokens {}, which vocab.json \
                 holds: prompts with them will not draw what they should there",
                named(unreachable)
            ));
        }
        Ok(lines)
    }

    /// The bundle around the packages, where one is asked for.
    pub fn bundle(&self) -> Option<Bundle<'_>> {
        let tokenizer = self.tokenizer.as_ref()?;
        Some(Bundle {
            folder: &self.folder,
            metadata: &self.metadata,
            attention: self.options.attention,
            tokenizer: &tokenizer.files,
            written: &self.components,
            overwrite: self.options.overwrite,
        })
    }

    /// Whether a package that palettes were asked for stays as it is: it computes in fp32, and palettes are fp16.
    ///
    /// # Errors
    /// The autoencoder's configuration can't be read.
    pub fn stays_dense(&self, part: Part) -> Result<bool> {
        Ok(self.palettizes(part) && self.nbits.of_model(part, self.model)?.is_none())
    }

    /// Writes the package of `part`, of `weights` as they are or palettized on the way, and returns where it lies, in
    /// chunks or not. `progress` hears how many parameters of how many are written.
    ///
    /// # Errors
    /// Those of [`export_unet`] and of the other networks.
    pub fn write(
        &self,
        part: Part,
        weights: &dyn WeightSource,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Vec<PathBuf>> {
        let form = self.nbits.of_model(part, self.model)?.filter(|_| self.palettizes(part));
        let mut metadata = self.metadata.clone();
        let palettized;
        let weights = match form {
            None => weights,
            Some(form) => {
                let how = format!("post-training k-means, {} bits", form.bits);
                metadata.user_defined.insert(PALETTES.to_owned(), how);
                let forms = forms(&part.parameters(self.model)?, form);
                palettized = PostTraining { source: weights, forms };
                &palettized
            }
        };
        let mut export = |folder: &Path| self.package(part, weights, &metadata, folder, progress);
        if part == Part::Unet && self.chunk {
            return export_in_chunks(&self.path(part), self.options.overwrite, export).map(Vec::from);
        }
        Ok(vec![export(&self.folder)?])
    }

    fn package(
        &self,
        part: Part,
        weights: &dyn WeightSource,
        metadata: &PackageMetadata,
        folder: &Path,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<PathBuf> {
        let (model, unet) = (self.model, &self.options);
        let parameters = part.parameters(model)?.len();
        let size = (unet.height, unet.width);
        let destination = Destination { folder, target: unet.target, overwrite: unet.overwrite, metadata };
        let weighted = Weighted { weights, parameters, progress };
        match part {
            Part::Unet => export_unet(&model.unet_config()?, weights, unet, metadata, folder, weighted.progress),
            Part::VaeDecoder | Part::VaeEncoder => {
                let numbers = autoencoder_numbers(part, model)?;
                export_autoencoder(part, &model.autoencoder_config()?, numbers, size, weighted, destination)
            }
            Part::SafetyChecker => {
                let factor = model.autoencoder_config()?.factor();
                let size = (factor * size.0, factor * size.1);
                export_safety_checker(&model.safety_checker_config()?, size, weighted, destination)
            }
            Part::TextEncoder | Part::TextEncoder2 => {
                let config = model.text_encoder_config_of(part.component())?;
                let prompt = Prompt::of(model, part.component())?;
                export_text_encoder(part, Attended::of(model), &prompt, &config, weighted, destination)
            }
        }
    }
}

/// Names of the packages that `part` becomes in a folder of `metadata`'s model.
pub fn package_names(metadata: &PackageMetadata, part: Part, controlnet: bool, chunk: bool) -> Vec<String> {
    let name = metadata.package_name(part.package(controlnet));
    let chunks = |whole: &str| chunk_paths(Path::new(whole)).map(|path| path.to_string_lossy().into_owned()).into();
    if part == Part::Unet && chunk { chunks(&name) } else { vec![name] }
}

/// All that a model has; the safety checker only where Apple's programs can use it.
fn all(model: &Model, height: i64, width: i64) -> Result<Vec<Part>> {
    let fits = takes_safety_checker(model, height, width)?;
    Ok(Part::of(model).into_iter().filter(|part| fits || *part != Part::SafetyChecker).collect())
}

/// The first few of some names.
fn named(names: &[String]) -> String {
    const SHOWN: usize = 5;
    let more = names.len().saturating_sub(SHOWN);
    let shown = names.iter().take(SHOWN).map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
    if more > 0 { format!("{shown} and {more} more") } else { shown }
}
