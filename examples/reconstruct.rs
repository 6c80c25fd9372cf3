//! How much of a picture an autoencoder holds: `cargo run --example reconstruct -- MODEL FOLDER... [--sheet FILE]`.
//!
//! Every picture of the folders is encoded (to the mean of its latents) and decoded, at its own size. Printed is the
//! peak signal-to-noise ratio, 10 · log10(1 / mean squared error) in dB with values in 0…1: per folder, or per `kind`
//! where the folder's metadata.jsonl names one, the mean over pictures, the worst picture, and the standard deviation
//! of each latent channel times `scaling_factor`. `--sheet` writes pictures side by side, the originals above.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use image::{Rgb, RgbImage};
use palettist::networks::autoencoder::{AutoencoderConfig, decode, encode};
use palettist::ops::{Tensors, Weights};
use palettist::source::{Component, Model};
use serde_json::Value;
use tch::{Device, Kind, Tensor};

/// Of each kind, on the sheet.
const SHOWN: usize = 2;

struct Autoencoder {
    config: AutoencoderConfig,
    weights: Weights,
}

impl Autoencoder {
    /// `[1, 3, H, W]` in −1…1 → latents `[1, C, H/8, W/8]` and the picture decoded from them.
    fn both(&self, picture: &Tensor) -> (Tensor, Tensor) {
        let _guard = tch::no_grad_guard();
        let ops = &mut Tensors::new(&self.weights);
        let latents = encode(ops, &self.config, picture).narrow(1, 0, self.config.latent_channels);
        let decoded = decode(ops, &self.config, &latents).clamp(-1.0, 1.0);
        (latents * self.config.scaling_factor, decoded)
    }
}

#[derive(Default)]
struct Group {
    decibels: Vec<f64>,
    latents: Vec<Tensor>,
    shown: Vec<(RgbImage, RgbImage)>,
}

fn main() -> Result<()> {
    let mut arguments: Vec<String> = std::env::args().skip(1).collect();
    let sheet = match arguments.iter().position(|argument| argument == "--sheet") {
        Some(at) if at + 1 < arguments.len() => arguments.drain(at..at + 2).nth(1),
        Some(_) => bail!("--sheet wants the name of a PNG file"),
        None => None,
    };
    let [model, folders @ ..] = arguments.as_slice() else {
        bail!("usage: reconstruct MODEL FOLDER... [--sheet FILE]")
    };
    ensure!(!folders.is_empty(), "usage: reconstruct MODEL FOLDER... [--sheet FILE]");
    let model = Model::open(model)?;
    let autoencoder = Autoencoder {
        config: model.autoencoder_config()?,
        weights: model.weights(Component::Autoencoder, Kind::Float, Device::Cpu)?,
    };

    let mut groups: BTreeMap<String, Group> = BTreeMap::new();
    for folder in folders.iter().map(Path::new) {
        let kinds = kinds(folder)?;
        for path in pictures(folder)? {
            let original = image::open(&path).with_context(|| format!("cannot read {}", path.display()))?.to_rgb8();
            let picture = tensor(&original);
            let (latents, decoded) = autoencoder.both(&picture);
            let error = ((&decoded - &picture) / 2.0).square().mean(Kind::Double).double_value(&[]);
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            let kind = kinds.get(name).map(|kind| format!(" {kind}")).unwrap_or_default();
            let group = groups.entry(format!("{}{kind}", folder.display())).or_default();
            group.decibels.push(-10.0 * error.max(1e-10).log10());
            group.latents.push(latents.transpose(0, 1).flatten(1, -1));
            if group.shown.len() < SHOWN {
                group.shown.push((original, image(&decoded)));
            }
        }
    }

    println!("{:<44} {:>8} {:>7} {:>7}  deviation of latents", "", "pictures", "mean dB", "worst");
    for (name, group) in &groups {
        let count = group.decibels.len();
        let mean = group.decibels.iter().sum::<f64>() / count as f64;
        let worst = group.decibels.iter().copied().fold(f64::INFINITY, f64::min);
        let latents = Tensor::cat(&group.latents, 1);
        let deviations: Vec<String> = (0..latents.size()[0])
            .map(|channel| format!("{:.2}", latents.get(channel).std(true).double_value(&[])))
            .collect();
        println!("{name:<44} {count:>8} {mean:>7.2} {worst:>7.2}  {}", deviations.join(" "));
    }
    if let Some(file) = sheet {
        let shown: Vec<_> = groups.into_values().flat_map(|group| group.shown).collect();
        side_by_side(&shown).save(&file).with_context(|| format!("cannot write {file}"))?;
        println!("{file}: {} pictures, above as drawn, below encoded and decoded", shown.len());
    }
    Ok(())
}

/// The PNG pictures of a folder in the order of their names.
fn pictures(folder: &Path) -> Result<Vec<PathBuf>> {
    let listed = std::fs::read_dir(folder).with_context(|| format!("cannot read the folder {}", folder.display()))?;
    let mut paths = listed.map(|entry| Ok(entry?.path())).collect::<Result<Vec<PathBuf>>>()?;
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "png"));
    ensure!(!paths.is_empty(), "{} has no PNG pictures", folder.display());
    paths.sort();
    Ok(paths)
}

/// Which kind each picture is of, by file name; empty where nothing says so.
fn kinds(folder: &Path) -> Result<BTreeMap<String, String>> {
    let path = folder.join("metadata.jsonl");
    if !path.exists() {
        return Ok(BTreeMap::new());
    }
    let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut kinds = BTreeMap::new();
    for line in text.lines().filter(|line| !line.trim().is_empty()) {
        let line: Value =
            serde_json::from_str(line).with_context(|| format!("{}: not JSON: {line}", path.display()))?;
        if let (Some(name), Some(kind)) = (line["file_name"].as_str(), line["kind"].as_str()) {
            kinds.insert(name.to_owned(), kind.to_owned());
        }
    }
    Ok(kinds)
}

/// To `[1, 3, H, W]` in −1…1.
fn tensor(picture: &RgbImage) -> Tensor {
    let (width, height) = (i64::from(picture.width()), i64::from(picture.height()));
    let bytes = Tensor::from_slice(picture.as_raw()).view([1, height, width, 3]);
    bytes.permute([0, 3, 1, 2]).to_kind(Kind::Float) / 127.5 - 1.0
}

fn image(picture: &Tensor) -> RgbImage {
    let (height, width) = (picture.size()[2] as u32, picture.size()[3] as u32);
    let rounded = ((picture + 1.0) * 127.5).round().to_kind(Kind::Uint8).permute([0, 2, 3, 1]).contiguous();
    let bytes = Vec::<u8>::try_from(rounded.flatten(0, -1)).expect("the kind is bytes");
    RgbImage::from_raw(width, height, bytes).expect("as many bytes as pixels")
}

/// Rows of twelve: each original above what became of it.
fn side_by_side(pairs: &[(RgbImage, RgbImage)]) -> RgbImage {
    const COLUMNS: usize = 12;
    const GAP: u32 = 4;
    let side = pairs.iter().map(|(picture, _)| picture.width().max(picture.height())).max().unwrap_or(0) + GAP;
    let (columns, rows) = (pairs.len().min(COLUMNS) as u32, pairs.len().div_ceil(COLUMNS) as u32);
    let mut sheet = RgbImage::from_pixel(columns * side, rows * 2 * side, Rgb([255, 255, 255]));
    for (index, (original, decoded)) in pairs.iter().enumerate() {
        let (column, row) = ((index % COLUMNS) as u32, (index / COLUMNS) as u32);
        for (below, picture) in [(0, original), (1, decoded)] {
            image::imageops::replace(
                &mut sheet,
                picture,
                i64::from(column * side),
                i64::from((2 * row + below) * side),
            );
        }
    }
    sheet
}
