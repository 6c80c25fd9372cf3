//! Exports a UNet as the package that Apple's Stable Diffusion programs expect.
//!
//! | | name | type | shape |
//! |---|---|---|---|
//! | in | `sample` | fp16 | `[B, 4, h, w]` |
//! | in | `timestep` | fp16 | `[B]` |
//! | in | `encoder_hidden_states` | fp16 | `[B, D, 1, 77]` |
//! | out | `noise_pred` | fp32 | `[B, 4, h, w]` |

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};

use super::attention::AttentionImplementation;
use super::lower::MilOps;
use super::package::write_package;
use super::program::{ProgramBuilder, Target};
use super::proto::{self, FeatureDescription, FeatureKind, array_type};
use super::weights::WeightSource;
use crate::networks::unet::{UnetConfig, unet};

/// Tokens of a prompt, as all CLIP text encoders pad it.
const PROMPT_TOKENS: i64 = 77;

/// What a UNet's package is made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnetOptions {
    /// 2: with and without the prompt in one call, for classifier-free guidance; 1: one call each.
    pub batch: i64,
    /// Of the latents.
    pub height: i64,
    /// Of the latents.
    pub width: i64,
    pub target: Target,
    pub attention: AttentionImplementation,
    /// Replaces a package that is there already.
    pub overwrite: bool,
}

impl UnetOptions {
    /// Batch 2, the size that the model was made for, iOS 16, nothing overwritten.
    pub fn new(config: &UnetConfig) -> Self {
        let size = config.sample_size;
        Self {
            batch: 2,
            height: size,
            width: size,
            target: Target::default(),
            attention: AttentionImplementation::default(),
            overwrite: false,
        }
    }
}

/// What a package says about where it comes from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PackageMetadata {
    /// The model: a hub id (`stabilityai/stable-diffusion-2-1-base`) or any name. Part of the package's name, with
    /// `_` for `/`; also its version.
    pub model: String,
    pub author: String,
    pub license: String,
    /// Further entries, e.g. how the palettes were made; keys in the form of a domain turned round.
    pub user_defined: BTreeMap<String, String>,
}

impl PackageMetadata {
    /// What the model's folder tells: the licence of its model card (`README.md`), where it has one.
    pub fn of_folder(model: &str, folder: &Path) -> Self {
        let card = fs::read_to_string(folder.join("README.md")).unwrap_or_default();
        let field = |name: &str| front_matter(&card, name).unwrap_or_default();
        let license = [field("license_name"), field("license")].into_iter().find(|text| !text.is_empty());
        let mut license = license.unwrap_or_else(|| "see the model that this package was made from".to_owned());
        if let Some(link) = front_matter(&card, "license_link") {
            license = format!("{license} ({link})");
        }
        let author = match model.split('/').collect::<Vec<_>>()[..] {
            // A hub id, not a path.
            [owner, name] if !owner.is_empty() && !name.is_empty() && !folder.ends_with(model) => {
                format!("see the model card at huggingface.co/{model}")
            }
            _ => "see the model that this package was made from".to_owned(),
        };
        Self { model: model.to_owned(), author, license, user_defined: BTreeMap::new() }
    }

    /// `Stable_Diffusion_version_<model>_unet.mlpackage`
    pub fn package_name(&self, component: &str) -> String {
        format!("Stable_Diffusion_version_{}_{component}.mlpackage", self.model.replace(['/', '\\'], "_"))
    }
}

/// A field of a model card's YAML front matter, where it is a plain scalar.
fn front_matter(card: &str, field: &str) -> Option<String> {
    let header = card.strip_prefix("---")?.split("\n---").next()?;
    let value = header.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))?;
    let value = value.trim().trim_matches(['"', '\'']);
    (!value.is_empty()).then(|| value.to_owned())
}

/// Writes the UNet of `config` and `weights` as a package into `folder` and returns its path. `progress` hears how
/// many parameters of how many are written.
///
/// # Errors
/// When the package exists and is not to be overwritten; a weight is missing, of another shape or not finite in fp16;
/// the size cannot be exported; the files cannot be written. Nothing is left behind.
pub fn export_unet(
    config: &UnetConfig,
    weights: &dyn WeightSource,
    options: &UnetOptions,
    metadata: &PackageMetadata,
    folder: &Path,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<PathBuf> {
    let UnetOptions { batch, height, width, target, attention, overwrite } = *options;
    ensure!(batch > 0, "a package for a batch of {batch} cannot be made: 2 or 1");
    ensure!(height > 0 && width > 0, "a package for latents of {height}×{width} cannot be made");
    ensure!(!metadata.model.is_empty(), "the package needs the name of its model");
    let path = folder.join(metadata.package_name("unet"));
    let total = config.parameters().len();
    let mut done = 0;
    let mut written = || {
        done += 1;
        progress(done, total);
    };
    write_package(&path, overwrite, |file| {
        let mut ops = MilOps::new(ProgramBuilder::new(target, file), weights, &mut written).attending(attention);
        let sample = ops.input("sample", &[batch, config.in_channels, height, width]);
        let timestep = ops.input("timestep", &[batch]);
        let context = ops.input("encoder_hidden_states", &[batch, PROMPT_TOKENS, config.cross_attention_dim]);
        let noise = unet(&mut ops, config, &sample, &timestep, &context);
        let noise = ops.output("noise_pred", &noise);
        let (program, _, digest) = ops.finish()?.finish(&[&noise])?;
        let description = proto::ModelDescription {
            input: vec![
                feature(
                    "sample",
                    "The noisy latents: batch, channels, height, width",
                    array_type::FLOAT16,
                    &[batch, config.in_channels, height, width],
                ),
                feature(
                    "timestep",
                    "How far the noise has gone, from 999 (noise only) down to 0; one number a row of the batch",
                    array_type::FLOAT16,
                    &[batch],
                ),
                feature(
                    "encoder_hidden_states",
                    "The prompt as the text encoder gives it, transposed: batch, width, 1, tokens",
                    array_type::FLOAT16,
                    &[batch, config.cross_attention_dim, 1, PROMPT_TOKENS],
                ),
            ],
            output: vec![feature(
                "noise_pred",
                "The predicted noise, of the same shape as the latents",
                array_type::FLOAT32,
                &noise.shape,
            )],
            metadata: Some(described(metadata)),
        };
        let model = proto::Model {
            specification_version: target.specification(),
            description: Some(description),
            ml_program: Some(program),
            ..Default::default()
        };
        Ok((model, digest))
    })?;
    Ok(path)
}

fn described(metadata: &PackageMetadata) -> proto::Metadata {
    let mut user_defined = metadata.user_defined.clone();
    // The contract that the package keeps, by the version of Apple's package that states it.
    user_defined.insert("com.github.apple.ml-stable-diffusion.version".to_owned(), "1.1.0".to_owned());
    user_defined.insert("palettist.version".to_owned(), env!("CARGO_PKG_VERSION").to_owned());
    proto::Metadata {
        short_description: "The UNet of Stable Diffusion, which takes noise out of latents step by step, guided by a \
                            prompt. See https://arxiv.org/abs/2112.10752."
            .to_owned(),
        version_string: metadata.model.clone(),
        author: metadata.author.clone(),
        license: metadata.license.clone(),
        user_defined,
    }
}

fn feature(name: &str, description: &str, data_type: i32, shape: &[i64]) -> FeatureDescription {
    let array = proto::ArrayFeatureType { shape: shape.to_vec(), data_type };
    FeatureDescription {
        name: name.to_owned(),
        short_description: description.to_owned(),
        r#type: Some(proto::FeatureType { kind: Some(FeatureKind::MultiArray(array)), ..Default::default() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_card_gives_its_licence() {
        let folder = tempfile::tempdir().unwrap();
        let read = |card: &str| {
            fs::write(folder.path().join("README.md"), card).unwrap();
            PackageMetadata::of_folder("a/b", folder.path())
        };
        let metadata = read("---\ntags:\n- art\nlicense: openrail++\n---\n# Card\nlicense: none\n");
        assert_eq!((metadata.license.as_str(), metadata.author.contains("huggingface.co/a/b")), ("openrail++", true));
        assert_eq!(metadata.package_name("unet"), "Stable_Diffusion_version_a_b_unet.mlpackage");
        let metadata = read("---\nlicense: other\nlicense_name: ours\nlicense_link: https://x.org/l\n---\n");
        assert_eq!(metadata.license, "ours (https://x.org/l)");
        assert!(read("license: in the text\n").license.starts_with("see the model"));
    }
}
