//! Pictures with captions and labels.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use image::RgbImage;
use palettist::data::picture::read_picture;
use palettist::data::resample::{Filter, resize};
use palettist::judge::{JudgedPrompt, LabelTexts, read_prompts};
use serde_json::Value;
use tch::{Kind, Tensor};

/// All of some folders, in memory.
pub struct Drawings {
    /// As they are seen, `side` px wide and high.
    pub pictures: Vec<RgbImage>,
    pub captions: Vec<String>,
    pub labels: Vec<BTreeMap<String, String>>,
    /// `u8 [N, 3, side, side]`
    pub pixels: Tensor,
}

impl Drawings {
    pub fn read(folders: &[PathBuf], side: u32) -> Result<Self> {
        let (mut pictures, mut captions, mut labels) = (Vec::new(), Vec::new(), Vec::new());
        for folder in folders {
            let path = folder.join("metadata.jsonl");
            for (prompt, name) in read_prompts(&path)?.into_iter().zip(names(&path)?) {
                let picture = read_picture(&folder.join(name))?;
                pictures.push(resize(&picture, side, side, Filter::Bicubic));
                captions.push(prompt.drawn.prompt);
                labels.push(prompt.labels);
            }
        }
        let bytes: Vec<u8> = pictures.iter().flat_map(|picture: &RgbImage| picture.as_raw()).copied().collect();
        let side = i64::from(side);
        let pixels = Tensor::from_slice(&bytes).view([-1, side, side, 3]).permute([0, 3, 1, 2]).contiguous();
        Ok(Self { pictures, captions, labels, pixels })
    }

    pub fn len(&self) -> usize {
        self.captions.len()
    }

    /// Of each label its values, each standing for itself.
    pub fn values(&self) -> LabelTexts {
        let mut values = LabelTexts::new();
        for (label, value) in self.labels.iter().flatten() {
            values.entry(label.clone()).or_default().insert(value.clone(), value.clone());
        }
        values
    }

    /// `thing of 44, color of 9`
    pub fn summary(&self) -> String {
        let of = self.values().into_iter().map(|(label, values)| format!("{label} of {}", values.len()));
        of.collect::<Vec<_>>().join(", ")
    }

    /// The pictures as prompts, whose labels the judge is asked for.
    pub fn prompts(&self) -> Vec<JudgedPrompt> {
        self.labels.iter().map(|labels| JudgedPrompt { labels: labels.clone(), ..JudgedPrompt::default() }).collect()
    }

    /// fp32 `[batch, 3, side, side]` from 0 to 1.
    pub fn batch(&self, which: &[usize]) -> Tensor {
        let which: Vec<i64> = which.iter().map(|&index| index as i64).collect();
        self.pixels.index_select(0, &Tensor::from_slice(&which)).to_kind(Kind::Float) / 255.0
    }
}

/// The names of the pictures in a `metadata.jsonl`, in order.
fn names(path: &Path) -> Result<Vec<String>> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let name = |line: &str| {
        let json: Value = serde_json::from_str(line)?;
        json["file_name"].as_str().map(str::to_owned).context("a line without `file_name`")
    };
    let names: Vec<String> = text
        .lines()
        .filter(|line| !line.trim().is_empty())
        .map(name)
        .collect::<Result<_>>()
        .with_context(|| path.display().to_string())?;
    ensure!(!names.is_empty(), "{} names no pictures", path.display());
    Ok(names)
}
