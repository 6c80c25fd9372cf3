//! Training examples in memory: the autoencoder's moments of each picture and the text embedding of each caption.
//! Moments are computed once and kept in the cache between runs; embeddings are computed once a run.

use std::collections::HashMap;

use anyhow::{Context, Result};
use tch::{Device, Kind, Tensor};

use crate::data::{Cache, Key, Sample, Transform, hash_weights, load_picture};
use crate::networks::autoencoder::{AutoencoderConfig, encode};
use crate::networks::text_encoder::{TextEncoderConfig, text_encoder};
use crate::ops::{Tensors, Weights};
use crate::source::Tokenizer;
use crate::torch::random::{Purpose, generator, normal};

/// Pictures with captions, as the UNet's training sees them.
pub struct Examples {
    /// `[2·latent, h, w]` (mean, log-variance) for each picture, then, when `flipped`, for each mirrored one.
    pub moments: Vec<Tensor>,
    /// One for each picture.
    pub captions: Vec<String>,
    pub flipped: bool,
}

impl Examples {
    pub fn len(&self) -> usize {
        self.captions.len()
    }
}

/// Turns pictures into moments with one autoencoder, through a cache.
pub struct Encoder<'a> {
    config: &'a AutoencoderConfig,
    weights: &'a Weights,
    device: Device,
    cache: &'a Cache,
    /// Of the encoder's weights: another autoencoder never meets this one's latents.
    network: Key,
}

impl<'a> Encoder<'a> {
    /// `weights` are fp32 on `device`.
    ///
    /// # Errors
    /// The cache folder can't be made.
    pub fn new(config: &'a AutoencoderConfig, weights: &'a Weights, device: Device, cache: &'a Cache) -> Result<Self> {
        let encoder: Weights = weights
            .iter()
            .filter(|(name, _)| !name.starts_with("decoder") && !name.starts_with("post_quant"))
            .map(|(name, tensor)| (name.clone(), tensor.shallow_clone()))
            .collect();
        Ok(Self { config, weights, device, cache, network: hash_weights(&encoder)? })
    }

    /// The moments of all `samples`, and of their mirror images when `flip`.
    ///
    /// # Errors
    /// A picture can't be read: named; [`super::Stopped`].
    pub fn encode(
        &self,
        samples: &[Sample],
        transform: &dyn Fn(usize) -> Transform,
        flip: bool,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Examples> {
        let _guard = tch::no_grad_guard();
        let mut moments = Vec::new();
        let total = samples.len() * if flip { 2 } else { 1 };
        for flipped in if flip { vec![false, true] } else { vec![false] } {
            for (index, sample) in samples.iter().enumerate() {
                super::go_on()?;
                let transform = Transform { flip: flipped, ..transform(index) };
                let key = Key::of_file(&sample.path, &transform.describe(), &self.network)?;
                let tensor = self.cache.get_or_make(&key, || {
                    let picture = load_picture(&sample.path, &transform)?.unsqueeze(0).to_device(self.device);
                    let moments = encode(&mut Tensors::new(self.weights), self.config, &picture);
                    Ok(moments.squeeze_dim(0).to_kind(Kind::Float))
                })?;
                moments.push(tensor);
                progress(moments.len(), total);
            }
        }
        let captions = samples.iter().map(|sample| sample.caption.clone()).collect();
        Ok(Examples { moments, captions, flipped: flip })
    }
}

/// Draws latents from moments `[B, 2·latent, h, w]` with the noise of `index` and scales them: mean + σ·ε
/// (Kingma and Welling 2014, 2.4; log-variance clamped to −30…20 as diffusers does).
pub fn draw_latents(moments: &Tensor, scaling_factor: f64, seed: u64, index: u64) -> Tensor {
    let halves = moments.chunk(2, 1);
    let noise = normal(&mut generator(seed, Purpose::Posterior, index), &halves[0].size()).to_device(moments.device());
    let deviation = (halves[1].clamp(-30.0, 20.0) * 0.5).exp();
    (&halves[0] + deviation * noise) * scaling_factor
}

/// The mean of the posterior, scaled: what validation uses.
pub fn mean_latents(moments: &Tensor, scaling_factor: f64) -> Tensor {
    moments.chunk(2, 1).swap_remove(0) * scaling_factor
}

/// Captions to embeddings.
pub struct Texts {
    config: TextEncoderConfig,
    device: Device,
    ids: HashMap<String, Vec<i64>>,
    /// Embeddings `[T, D]` of a text encoder that does not change.
    embeddings: HashMap<String, Tensor>,
}

impl Texts {
    /// Tokenizes every caption (and the empty one), and embeds it, through the cache, when `frozen` gives a text encoder
    /// that stays as it is.
    ///
    /// # Errors
    /// The cache can't be written; [`super::Stopped`].
    pub fn new<'c>(
        captions: impl Iterator<Item = &'c String>,
        tokenizer: &Tokenizer,
        config: TextEncoderConfig,
        frozen: Option<(&Weights, &Cache)>,
        device: Device,
    ) -> Result<Self> {
        let mut texts = Self { config, device, ids: HashMap::new(), embeddings: HashMap::new() };
        for caption in captions.map(String::as_str).chain([""]) {
            if texts.ids.contains_key(caption) {
                continue;
            }
            let ids = tokenizer.encode(caption);
            texts.ids.insert(caption.to_owned(), ids);
        }
        if let Some((weights, cache)) = frozen {
            let _guard = tch::no_grad_guard();
            let network = hash_weights(weights)?;
            let mut all: Vec<String> = texts.ids.keys().cloned().collect();
            all.sort();
            for caption in all {
                super::go_on()?;
                let ids: Vec<u8> = texts.ids[&caption].iter().flat_map(|id| id.to_le_bytes()).collect();
                let key = Key::of(&[b"text", &ids, network.bytes()]);
                let embedded = cache.get_or_make(&key, || {
                    Ok(texts.encode(std::slice::from_ref(&caption), Tensors::new(weights))?.squeeze_dim(0))
                })?;
                texts.embeddings.insert(caption, embedded.to_device(device));
            }
        }
        Ok(texts)
    }

    /// Captions → `[B, T, D]`, by `text_encoder` when that learns, else from memory.
    ///
    /// # Errors
    /// A caption that was not given to [`Texts::new`].
    pub fn embed(&self, captions: &[String], text_encoder: Option<Tensors>) -> Result<Tensor> {
        if let Some(ops) = text_encoder {
            return self.encode(captions, ops);
        }
        let found: Option<Vec<&Tensor>> = captions.iter().map(|caption| self.embeddings.get(caption)).collect();
        Ok(Tensor::stack(&found.context("a caption was not embedded")?, 0))
    }

    fn encode(&self, captions: &[String], mut ops: Tensors) -> Result<Tensor> {
        let ids: Option<Vec<Tensor>> =
            captions.iter().map(|caption| self.ids.get(caption).map(|ids| Tensor::from_slice(ids))).collect();
        let ids = Tensor::stack(&ids.context("a caption was not tokenized")?, 0).to_device(self.device);
        Ok(text_encoder(&mut ops, &self.config, &ids).last_hidden_state)
    }
}
