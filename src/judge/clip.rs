//! A CLIP that is ready to judge.

use anyhow::{Context, Result};
use image::RgbImage;
use tch::{Device, Kind, Tensor};

use super::Preprocessor;
use crate::networks::clip_model::{ClipConfig, LOGIT_SCALE};
use crate::networks::text_encoder::text_encoder;
use crate::networks::vision::image_embeds;
use crate::ops::{Tensors, Weights};
use crate::source::{ClipFolder, Tokenizer};

/// How many texts or pictures go through an encoder together.
const BATCH: usize = 32;

/// Both encoders in fp32, the tokenizer, and how pictures are made ready. E is the width of the embeddings.
pub struct Clip {
    config: ClipConfig,
    weights: Weights,
    tokenizer: Tokenizer,
    preprocessor: Preprocessor,
    device: Device,
}

impl Clip {
    /// Opens the folder of a CLIP, or the id of one in the local Hugging Face cache.
    ///
    /// # Errors
    /// One line: it is not a CLIP of transformers', a file is missing or damaged, its pictures are of another size than
    /// its network takes.
    pub fn open(clip: &str, device: Device) -> Result<Self> {
        let folder = ClipFolder::open(clip)?;
        let (path, json) = folder.preprocessor()?;
        let preprocessor = Preprocessor::from_json(&json)
            .and_then(|preprocessor| preprocessor.fitting(&folder.config.vision))
            .with_context(|| path.display().to_string())?;
        Ok(Self {
            tokenizer: folder.tokenizer()?,
            weights: folder.weights(Kind::Float, device)?,
            config: folder.config,
            preprocessor,
            device,
        })
    }

    /// Unit vectors `[N, E]` of N texts, fp32 on the device. A text of more tokens than CLIP reads is cut: see
    /// [`Clip::cuts`].
    ///
    /// # Errors
    /// libtorch's: no memory on the device.
    pub fn texts(&self, texts: &[&str]) -> Result<Tensor> {
        let encode = |texts: &[&str]| {
            let rows: Vec<Vec<i64>> = texts.iter().map(|text| self.tokenizer.encode(text)).collect();
            let ids = Tensor::from_slice(&rows.concat()).view([texts.len() as i64, -1]).f_to_device(self.device)?;
            let mut ops = Tensors::new(&self.weights);
            anyhow::Ok(tch::no_grad(|| text_encoder(&mut ops, &self.config.text, &ids).pooled))
        };
        unit(texts.chunks(BATCH).map(encode))
    }

    /// Unit vectors `[N, E]` of N pictures, fp32 on the device.
    ///
    /// # Errors
    /// A picture of a shape that its image processor cannot make square; libtorch's.
    pub fn pictures(&self, pictures: &[&RgbImage]) -> Result<Tensor> {
        let encode = |pictures: &[&RgbImage]| {
            let pictures: Result<Vec<Tensor>> = pictures.iter().map(|one| self.preprocessor.apply(one)).collect();
            let pictures = Tensor::stack(&pictures?, 0).f_to_device(self.device)?;
            let mut ops = Tensors::new(&self.weights);
            anyhow::Ok(tch::no_grad(|| image_embeds(&mut ops, &self.config.vision, &pictures)))
        };
        unit(pictures.chunks(BATCH).map(encode))
    }

    /// Logits `[pictures, texts]` of unit vectors, `logits_per_image` of transformers: cosines times the learnt scale.
    pub fn logits(&self, pictures: &Tensor, texts: &Tensor) -> Tensor {
        pictures.matmul(&texts.tr()) * self.weights[LOGIT_SCALE].exp()
    }

    /// Whether a text has more tokens than CLIP reads.
    pub fn cuts(&self, text: &str) -> bool {
        self.tokenizer.count(text) > self.tokenizer.length()
    }
}

/// Batches of embeddings, one upon the other, each row of length 1.
fn unit(batches: impl Iterator<Item = Result<Tensor>>) -> Result<Tensor> {
    let embeds = Tensor::cat(&batches.collect::<Result<Vec<_>>>()?, 0);
    Ok(&embeds / embeds.norm_scalaropt_dim(2, [-1], true))
}
