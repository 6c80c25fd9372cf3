//! Training examples in memory: the autoencoder's moments of each picture and the text embedding of each caption.
//! Moments are computed once and kept in the cache between runs; embeddings are computed once a run.

use std::collections::HashMap;
use std::fs;

use anyhow::{Context, Result, ensure};
use tch::{Device, Kind, Tensor};

use crate::data::manifest::{Picture, sha256};
use crate::data::{Cache, Key, Sample, Transform, load_bytes, network_key, picture_size};
use crate::networks::autoencoder::{AutoencoderConfig, encode};
use crate::networks::text_encoder::{TextEncoderConfig, TextOutput, text_encoder};
use crate::ops::{Tensors, Weights};
use crate::pipeline::condition::{Conditioning, SizeIds};
use crate::source::{Component, Model};

/// Pictures with captions, as the UNet's training sees them.
pub struct Examples {
    /// `[2·latent, h, w]` (mean, log-variance) for each picture, then, when `flipped`, for each mirrored one.
    pub moments: Vec<Tensor>,
    /// Sizes and crop of each of these.
    pub sizes: Vec<SizeIds>,
    /// One for each picture.
    pub captions: Vec<String>,
    pub flipped: bool,
    /// Which picture stands at each place of an epoch: each as often as its sample says.
    pub epoch: Vec<usize>,
}

/// Which of `samples` stands at each place of an epoch, before it is shuffled.
pub fn epoch(samples: &[Sample]) -> Vec<usize> {
    samples.iter().enumerate().flat_map(|(index, sample)| std::iter::repeat_n(index, sample.repeats)).collect()
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
    /// The key of the encoder, so that another autoencoder never meets this one's latents.
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
        Ok(Self { config, weights, device, cache, network: network_key(config, &encoder)? })
    }

    /// The moments of all `samples`, and of their mirror images when `flip`. `looked_at` are the same pictures as they were
    /// looked at before; none where nobody did.
    ///
    /// # Errors
    /// A picture can't be read, or is not as it was looked at: named; [`super::Stopped`].
    pub fn encode(
        &self,
        samples: &[Sample],
        looked_at: &[Picture],
        transform: &dyn Fn(usize) -> Transform,
        flip: bool,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Examples> {
        let _guard = tch::no_grad_guard();
        let (mut moments, mut sizes) = (Vec::new(), Vec::new());
        let total = samples.len() * if flip { 2 } else { 1 };
        for flipped in if flip { vec![false, true] } else { vec![false] } {
            for (index, sample) in samples.iter().enumerate() {
                super::stop::go_on()?;
                let transform = Transform { flip: flipped, ..transform(index) };
                let named = || format!("cannot read the picture {}", sample.path.display());
                // Once: what is encoded is what was looked at, whoever writes there meanwhile.
                let bytes = fs::read(&sample.path).with_context(named)?;
                let sha256 = sha256(&bytes);
                ensure!(
                    looked_at.get(index).is_none_or(|picture| picture.sha256 == sha256),
                    "{} changed while the run was reading its pictures (another run may draw its class pictures there): run \
                     the same command again",
                    sample.path.display()
                );
                let key = Key::of_file(&sha256, &transform.describe(), &self.network);
                let tensor = self.cache.get_or_make(&key, || {
                    let picture =
                        load_bytes(&bytes, &transform).with_context(named)?.unsqueeze(0).to_device(self.device);
                    let moments = encode(&mut Tensors::new(self.weights), self.config, &picture);
                    Ok(moments.squeeze_dim(0).to_kind(Kind::Float))
                })?;
                moments.push(tensor);
                let (width, height) = picture_size(&bytes).with_context(named)?;
                sizes.push(transform.size_ids(width, height));
                progress(moments.len(), total);
            }
        }
        let captions = samples.iter().map(|sample| sample.caption.clone()).collect();
        Ok(Examples { moments, sizes, captions, flipped: flip, epoch: epoch(samples) })
    }
}

/// Draws latents from moments `[B, 2·latent, h, w]` with unit `noise` `[B, latent, h, w]` and scales them: mean + σ·ε
/// (Kingma and Welling 2014, 2.4; log-variance clamped to −30…20 as diffusers does).
pub fn draw_latents(moments: &Tensor, scaling_factor: f64, noise: &Tensor) -> Tensor {
    let halves = moments.chunk(2, 1);
    let deviation = (halves[1].clamp(-30.0, 20.0) * 0.5).exp();
    (&halves[0] + deviation * noise) * scaling_factor
}

/// The mean of the posterior, scaled: what validation uses.
pub fn mean_latents(moments: &Tensor, scaling_factor: f64) -> Tensor {
    moments.chunk(2, 1).swap_remove(0) * scaling_factor
}

/// Captions to what the UNet is told of them.
pub struct Texts {
    configs: Vec<TextEncoderConfig>,
    device: Device,
    /// For each text encoder.
    ids: HashMap<String, Vec<Vec<i64>>>,
    /// Of text encoders that do not change, one caption each.
    embeddings: HashMap<String, Conditioning>,
}

impl Texts {
    /// Tokenizes every caption (and the empty one), and embeds it, through the cache, when `frozen` gives one: text
    /// encoders then stay as the model has them.
    ///
    /// # Errors
    /// The model's text encoders can't be read; the cache can't be written; [`super::Stopped`].
    pub fn new<'c>(
        captions: impl Iterator<Item = &'c String>,
        model: &Model,
        frozen: Option<&Cache>,
        device: Device,
    ) -> Result<Self> {
        let (mut configs, mut tokenizers) = (Vec::new(), Vec::new());
        for component in model.text_encoders() {
            configs.push(model.text_encoder_config_of(component)?);
            tokenizers.push(model.tokenizer_of(component)?);
        }
        let mut texts = Self { configs, device, ids: HashMap::new(), embeddings: HashMap::new() };
        for caption in captions.map(String::as_str).chain([""]) {
            if !texts.ids.contains_key(caption) {
                let ids = tokenizers.iter().map(|tokenizer| tokenizer.encode(caption)).collect();
                texts.ids.insert(caption.to_owned(), ids);
            }
        }
        let Some(cache) = frozen else { return Ok(texts) };
        let _guard = tch::no_grad_guard();
        let mut all: Vec<String> = texts.ids.keys().cloned().collect();
        all.sort();
        // One text encoder at a time is read, used and dropped.
        let mut outputs: Vec<Vec<TextOutput<Tensor>>> = all.iter().map(|_| Vec::new()).collect();
        for (place, component) in model.text_encoders().enumerate() {
            let weights = model.weights(component, Kind::Float, device)?;
            let network = network_key(&texts.configs[place], &weights)?;
            for (caption, outputs) in all.iter().zip(&mut outputs) {
                super::stop::go_on()?;
                outputs.push(texts.through_cache(caption, (place, component), &weights, &network, cache)?);
            }
        }
        texts.embeddings = all.into_iter().zip(outputs.into_iter().map(Conditioning::of_texts)).collect();
        Ok(texts)
    }

    /// What a text encoder, the model's `place`-th, gives for a caption. Only what the UNet is told is kept: of a plain
    /// Stable Diffusion the last hidden state, of XL the last but one and, of its second text encoder, the pooled one.
    fn through_cache(
        &self,
        caption: &str,
        (place, component): (usize, Component),
        weights: &Weights,
        network: &Key,
        cache: &Cache,
    ) -> Result<TextOutput<Tensor>> {
        let ids: Vec<u8> = self.ids[caption][place].iter().flat_map(|id| id.to_le_bytes()).collect();
        let mut made: Option<TextOutput<Tensor>> = None;
        let mut kept = |what: &[u8], part: fn(&TextOutput<Tensor>) -> &Tensor| {
            let key = Key::of(&[what, &ids, network.bytes()]);
            let tensor = cache.get_or_make(&key, || {
                if made.is_none() {
                    made = Some(self.encode(&[caption.to_owned()], place, Tensors::new(weights))?);
                }
                Ok(part(made.as_ref().context("no text was encoded")?).squeeze_dim(0))
            })?;
            anyhow::Ok(tensor.to_device(self.device).unsqueeze(0))
        };
        let is_xl = self.configs.len() > 1;
        let none = || Tensor::zeros([1, 0], (Kind::Float, self.device));
        Ok(TextOutput {
            last_hidden_state: if is_xl { none() } else { kept(b"text", |output| &output.last_hidden_state)? },
            penultimate: if is_xl { kept(b"text, penultimate", |output| &output.penultimate)? } else { none() },
            pooled: match component {
                Component::TextEncoder2 => kept(b"text, pooled", |output| &output.pooled)?,
                _ => none(),
            },
        })
    }

    /// Captions → what the UNet is told of them, by `text_encoder` when the one that the model has learns, else from
    /// memory; `sizes` are the pictures'.
    ///
    /// # Errors
    /// A caption that was not given to [`Texts::new`].
    pub fn embed(&self, captions: &[String], sizes: &[SizeIds], text_encoder: Option<Tensors>) -> Result<Conditioning> {
        if let Some(ops) = text_encoder {
            return Ok(Conditioning::of_texts(vec![self.encode(captions, 0, ops)?]).with_sizes(sizes));
        }
        let found: Option<Vec<&Conditioning>> = captions.iter().map(|caption| self.embeddings.get(caption)).collect();
        Ok(Conditioning::cat(&found.context("a caption was not embedded")?).with_sizes(sizes))
    }

    fn encode(&self, captions: &[String], place: usize, mut ops: Tensors) -> Result<TextOutput<Tensor>> {
        let ids: Option<Vec<Tensor>> =
            captions.iter().map(|caption| self.ids.get(caption).map(|ids| Tensor::from_slice(&ids[place]))).collect();
        let ids = Tensor::stack(&ids.context("a caption was not tokenized")?, 0).to_device(self.device);
        Ok(text_encoder(&mut ops, &self.configs[place], &ids))
    }
}
