//! Where the parameters of a network lie in files.

use std::collections::HashMap;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use half::f16;
use sha2::{Digest, Sha256};
use tch::{Device, Kind, Tensor};

use super::lora::Changes;
use super::{Network, names};
use crate::files::{TensorFile, is_floating};
use crate::ops::{Parameter, Weights};

/// A tensor of a file, or a part of one, that is a parameter.
#[derive(Clone, Debug)]
pub struct Place {
    /// Today's name of the parameter.
    pub parameter: String,
    /// Which of the files.
    pub file: usize,
    /// What the file calls the tensor.
    pub tensor: String,
    /// Of a tensor of several parameters, one upon the other along the first axis: which, and of how many.
    pub part: Option<(i64, i64)>,
    /// Whether the file has a matrix of two axes the other way round.
    pub transposed: bool,
}

impl Place {
    /// The shape that the network has for this parameter, as far as the file's shape tells; empty without such a tensor.
    pub(super) fn shape(&self, network: Network, file: &TensorFile) -> Vec<i64> {
        let mut shape = file.shape(&self.tensor).unwrap_or_default();
        if let (Some((_, parts)), Some(rows)) = (self.part, shape.first_mut()) {
            *rows /= parts;
        }
        if self.transposed {
            shape.reverse();
        }
        names::today_shape(network, &self.parameter, &shape)
    }
}

/// What says which parameters there are, for messages.
#[derive(Clone, Copy)]
pub enum Origin {
    ConfigJson,
    /// The shapes of the file's other tensors.
    OtherTensors,
}

/// Where each parameter of a network lies: all that its configuration asks for, and nothing else. Headers were read,
/// weights are read when they are asked for.
pub struct Stored {
    files: Vec<Arc<TensorFile>>,
    /// By the parameters' names of today.
    places: HashMap<String, (Place, Vec<i64>)>,
    /// What LoRAs change of them.
    changes: Changes,
}

impl Stored {
    /// Checks names, shapes and types, reading headers only.
    ///
    /// # Errors
    /// One line naming tensor and file: missing, unexpected, there twice, of another shape, not floating-point.
    pub(super) fn new(
        network: Network,
        origin: Origin,
        parameters: &[Parameter],
        files: Vec<Arc<TensorFile>>,
        found: impl IntoIterator<Item = Place>,
    ) -> Result<Self> {
        let wanted: HashMap<&str, &Parameter> = parameters.iter().map(|p| (p.name.as_str(), p)).collect();
        let title = network.title();
        let (described, asking) = match origin {
            Origin::ConfigJson => ("this config.json", "this config.json asks for"),
            Origin::OtherTensors => ("its other tensors", "its other tensors ask for"),
        };
        let mut places: HashMap<String, (Place, Vec<i64>)> = HashMap::with_capacity(wanted.len());
        for place in found {
            let file = &files[place.file];
            let (shown, name) = (file.path().display(), &place.tensor);
            let Some(parameter) = wanted.get(place.parameter.as_str()) else {
                let hint = stranger(name);
                bail!("{shown} has the tensor `{name}`, which the {title} of {described} does not have{hint}");
            };
            let kind = file.kind(name)?;
            if !is_floating(kind) {
                let by = if is_bitsandbytes(file) { " (bitsandbytes')" } else { "" };
                bail!("{shown}: tensor `{name}` holds {kind:?} numbers; quantized weights{by} are not supported");
            }
            let shape = place.shape(network, file);
            let whole = place.part.is_none_or(|(_, parts)| {
                file.shape(name).is_some_and(|s| s.first().is_some_and(|rows| rows % parts == 0))
            });
            let same =
                shape == parameter.shape || (place.part.is_none() && trimmed(&shape) == trimmed(&parameter.shape));
            if !same || !whole {
                let (shape, expected) = (file.shape(name).unwrap_or_default(), &parameter.shape);
                let each = if place.part.is_some() { " for each of its parts" } else { "" };
                bail!("{shown}: tensor `{name}` has the shape {shape:?}; {asking} {expected:?}{each}");
            }
            let name = name.clone();
            if let Some((other, _)) = places.insert(place.parameter.clone(), (place, parameter.shape.clone())) {
                let first = files[other.file].path().display();
                bail!("{shown}: tensor `{name}` is there twice, also as `{}` in {first}", other.tensor);
            }
        }
        let missing: Vec<_> = parameters.iter().filter(|p| !places.contains_key(&p.name)).collect();
        if let (Some(first), Some(file)) = (missing.first(), files.first()) {
            let more = match missing.len() {
                1 => String::new(),
                n => format!(" and {} more", n - 1),
            };
            let naming = match origin {
                Origin::ConfigJson => "the tensor",
                Origin::OtherTensors => "what diffusers calls",
            };
            bail!("{}: {naming} `{}`{more} of the {title} is missing", file.path().display(), first.name);
        }
        Ok(Self { files, places, changes: Changes::default() })
    }

    /// With LoRAs merged in.
    pub(super) fn with_changes(self, changes: Changes) -> Self {
        Self { changes, ..self }
    }

    /// Reads all, converted to `kind`, to `device`.
    pub fn read(&self, kind: Kind, device: Device) -> Result<Weights> {
        self.places.keys().map(|name| Ok((name.clone(), self.tensor(name, kind, device)?))).collect()
    }

    /// Their names.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.places.keys().map(String::as_str)
    }

    /// Names, shapes, and first and last values of each, as fp16 whatever type they are stored in: enough to tell a model
    /// from its fine-tunings, which change every tensor, without reading gigabytes. Of what LoRAs change, the ends
    /// are those of the merged values, as a copy of the model has them.
    ///
    /// # Errors
    /// A file is damaged.
    pub(super) fn identify(&self, hash: &mut Sha256) -> Result<()> {
        let mut names: Vec<&String> = self.places.keys().collect();
        names.sort();
        for name in names {
            let (place, shape) = &self.places[name];
            if self.changes.has(name) {
                let merged = self.tensor(name, Kind::Half, Device::Cpu)?;
                identify(hash, name, shape, both_ends(&merged)?)?;
                continue;
            }
            let file = &self.files[place.file];
            let bytes = file.bytes(&place.tensor)?;
            let kind = file.kind(&place.tensor)?;
            // Of several in one tensor, its own rows.
            let count: usize = shape.iter().map(|&length| length as usize).product();
            let (width, first) = (kind.elt_size_in_bytes(), place.part.map_or(0, |(part, _)| part as usize * count));
            let own = bytes.get(first * width..(first + count) * width).with_context(|| format!("tensor `{name}`"))?;
            let end = own.len().min(ENDS as usize * width);
            let values = |bytes: &[u8]| Tensor::f_from_data_size(bytes, &[(bytes.len() / width) as i64], kind);
            identify(hash, name, shape, [values(&own[..end])?, values(&own[own.len() - end..])?])?;
        }
        Ok(())
    }

    /// Reads the parameter `name`, LoRAs merged in, converted to `kind`, to `device`.
    ///
    /// # Errors
    /// When there is none, or its file or a LoRA's is damaged.
    pub fn tensor(&self, name: &str, kind: Kind, device: Device) -> Result<Tensor> {
        let (place, shape) = self.places.get(name).with_context(|| format!("the weights lack `{name}`"))?;
        let file = &self.files[place.file];
        let tensor = match place.part {
            None => file.tensor(&place.tensor)?,
            Some((part, _)) => file.rows(&place.tensor, part * shape[0], shape[0])?,
        };
        let tensor = if place.transposed { tensor.f_transpose(0, 1)?.f_contiguous()? } else { tensor };
        let context = || format!("{}: tensor `{}`", file.path().display(), place.tensor);
        let mut tensor = tensor.f_view(shape.as_slice()).with_context(context)?;
        if self.changes.has(name) {
            tensor = self.changes.apply(name, tensor.f_to_kind(Kind::Float).with_context(context)?)?;
        }
        tensor.f_to_kind(kind).and_then(|tensor| tensor.f_to_device(device)).with_context(context)
    }
}

/// How many values of each end of a tensor [`identify`] is given.
const ENDS: i64 = 512;

/// The values at the two ends of a tensor, for [`identify`].
pub(super) fn both_ends(tensor: &Tensor) -> Result<[Tensor; 2]> {
    let flat = tensor.f_reshape([-1])?;
    let (length, end) = (flat.size()[0], flat.size()[0].min(ENDS));
    Ok([flat.f_narrow(0, 0, end)?, flat.f_narrow(0, length - end, end)?])
}

/// Adds a parameter to a hash: its name, its shape, the values at its two ends.
pub(super) fn identify(hash: &mut Sha256, name: &str, shape: &[i64], ends: [Tensor; 2]) -> Result<()> {
    hash.update(format!("{name} {shape:?} "));
    for end in ends {
        let values = Vec::<f16>::try_from(end.f_to_kind(Kind::Half)?)?;
        values.iter().for_each(|value| hash.update(value.to_le_bytes()));
    }
    Ok(())
}

/// A shape without axes of length 1 around it: some tools write biases as `[1, C, 1, 1]`, and 1×1 convolutions as linear
/// layers or the other way round.
fn trimmed(shape: &[i64]) -> &[i64] {
    let from = shape.iter().position(|&n| n != 1).unwrap_or(shape.len());
    let to = shape.iter().rposition(|&n| n != 1).map_or(from, |last| last + 1);
    &shape[from..to]
}

/// What a tensor that no network has is known to come from, with what to do.
pub(super) fn stranger(name: &str) -> &'static str {
    let has = |words: &[&str]| words.iter().any(|word| name.contains(word));
    if has(&[".base_layer.", "lora_A", "lora_B", ".lora_", "lora_down", "lora_up"]) {
        ": it is of a LoRA that PEFT has not merged; merge it before saving, with diffusers: \
         pipe.fuse_lora(); pipe.unload_lora_weights(); pipe.save_pretrained('FOLDER')"
    } else if has(&[".quant_state.", ".absmax", ".quant_map", ".nested_", ".SCB"]) {
        ": it is of bitsandbytes' quantized weights, which are not supported; fetch the model in fp16"
    } else if has(&[".qweight", ".qzeros", ".g_idx"]) {
        ": it is of quantized weights, which are not supported; fetch the model in fp16"
    } else if has(&["motion_modules.", "temporal", "time_stack."]) {
        ": it is of a model of moving pictures, which is not supported"
    } else if has(&["to_k_ip", "to_v_ip", "ip_adapter"]) {
        ": it is of an IP-Adapter, which is not supported; unload it before saving"
    } else if has(&["controlnet_cond_embedding", "controlnet_down_blocks"]) {
        ": it is of a ControlNet; give the model that it goes with"
    } else {
        ""
    }
}

fn is_bitsandbytes(file: &TensorFile) -> bool {
    file.names()
        .iter()
        .any(|name| name.contains(".quant_state.") || name.ends_with(".absmax") || name.ends_with(".SCB"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_of_length_one_around_a_shape_do_not_count() {
        assert_eq!(trimmed(&[1, 320, 1, 1]), [320]);
        assert_eq!(trimmed(&[8, 1, 8, 1, 1]), [8, 1, 8]);
        assert!(trimmed(&[1, 1]).is_empty() && trimmed(&[]).is_empty());
    }
}
