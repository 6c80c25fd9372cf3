//! A LoRA that is merged into a model: every tensor of its file belongs to a layer of the model and fits it, or the file is
//! refused.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use anyhow::{Result, anyhow};
use tch::Tensor;

use super::super::Component;
use super::super::misused::Misused;
use super::NETWORKS;
use super::choice::LoraChoice;
use super::cloneofsimo;
use super::delta::{Change, Dora, DoraBy};
use super::family::Family;
use super::file::{LoraFile, Parts};
use super::form::{Form, Side, trimmed};
use super::keys::{Layout, Part};
use super::modules::{Modules, networks};
use super::summary;
use crate::terminal::note_once;

/// The model that LoRAs are merged into.
pub struct Target {
    /// What messages call it.
    pub shown: String,
    pub is_xl: bool,
    /// The width of the text embeddings that its UNet reads.
    pub text_width: i64,
    /// Its UNet and text encoders, those that it has.
    pub networks: Vec<Modules>,
}

/// A LoRA that fits a model.
pub struct Lora {
    choice: LoraChoice,
    file: Arc<LoraFile>,
    /// By network and by the parameter's name of today.
    changes: BTreeMap<Component, BTreeMap<String, Change>>,
    /// How many layers of each network it changes.
    layers: BTreeMap<Component, usize>,
}

impl Lora {
    /// Opens what `choice` names and finds the layer of each of its tensors. What may surprise is said on standard error: a
    /// weight of 0, changes that are all zero, an α that had to be assumed.
    ///
    /// # Errors
    /// One line with file and tensor: it does not exist, is a pickle, is empty, or holds what no LoRA has; [`Misused`] where it
    /// does not go with the model: made for another family, a tensor of a layer that the model does not have, of another
    /// shape, without its other factor.
    pub fn open(choice: &LoraChoice, target: &Target) -> Result<Self> {
        if let Some(mistake) = choice.mistake() {
            return Err(Misused(format!("the LoRA {} {mistake}", choice.path)).into());
        }
        let file = Arc::new(LoraFile::open(&choice.path)?);
        let shown = file.path().display().to_string();
        let families = (Family::of_lora(&file), Family::of_model(target.is_xl, target.text_width));
        if let (Some(own), Some(models)) = families
            && own != models
        {
            let model = &target.shown;
            let text =
                format!("{shown} is a LoRA of {own}, and {model} is a {models}: give one that was made for this model");
            return Err(Misused(text).into());
        }
        let mut lora =
            Self { choice: choice.clone(), file: file.clone(), changes: BTreeMap::new(), layers: BTreeMap::new() };
        let orders = Orders::of(&file, target)?;
        let mut left_out = 0;
        for (spelled, parts) in &file.layers {
            match lora.layer(spelled, parts, target, &orders) {
                Ok(true) => {}
                Ok(false) => left_out += 1,
                Err(Wrong::Lora(text)) => return Err(Misused(format!("{shown}: {text}")).into()),
                Err(Wrong::Other(error)) => return Err(error),
            }
        }
        lora.remarks(left_out);
        Ok(lora)
    }

    /// Finds the layer that a file calls `spelled` and what changes it; false where that has the weight 0.
    fn layer(&mut self, spelled: &str, parts: &Parts, target: &Target, orders: &Orders) -> Result<bool, Wrong> {
        let file = self.file.clone();
        let named = parts.values().next().map_or(spelled, String::as_str);
        let form = Form::of(parts)?;
        let has_bias = parts.contains_key(&Part::BiasDifference) || parts.contains_key(&Part::UpBias);
        let (of, candidates) = match orders.layer(spelled, target) {
            Some(found) => found?,
            None => {
                let (of, name) = networks(spelled);
                let found = target.networks.iter().filter(|network| of.contains(&network.component));
                (of.to_vec(), found.filter_map(|network| Some((network, network.find(name)?.to_owned()))).collect())
            }
        };
        if of.iter().all(|component| self.weight(*component) == 0.0) {
            return Ok(false);
        }
        let fit = |(network, layer): &(&Modules, String)| match (&form, network.shapes(layer).weight) {
            (Some(form), Some(weight)) => form.fits(&file, &weight).err(),
            (Some(_), None) => Some(format!("`{named}`: {layer} has no weight")),
            (None, _) => None,
        };
        // Of text encoders whose layers have the same names their widths tell.
        let fitting = candidates.iter().find(|candidate| fit(candidate).is_none());
        let Some((network, layer)) = fitting.or(candidates.first()) else {
            return Err(Wrong::Lora(self.no_layer(named, &of, target)));
        };
        if let Some(misfit) = fit(&(*network, layer.clone())) {
            let text = format!(
                "{misfit}, which {layer} of the {} has: the LoRA was made for a model of other sizes",
                network.component.title()
            );
            return Err(Wrong::Lora(text));
        }
        let (component, shapes) = (network.component, network.shapes(layer));
        let weight = self.weight(component);
        if weight == 0.0 {
            return Ok(false);
        }
        let scale = self.scale(parts, form.as_ref(), component, layer)?;
        let mut changes = Vec::new();
        if let Some(form) = form {
            let of_weight = shapes.weight.unwrap_or_default();
            let dora = dora(&file, parts, &form, &of_weight)?;
            changes.push(("weight", Change { file: file.clone(), form, scale, weight, dora }));
        }
        if has_bias {
            let bias = shapes
                .bias
                .ok_or_else(|| Wrong::Lora(format!("`{named}`: {layer} has no bias that it could change")))?;
            for (part, scale) in [(Part::BiasDifference, 1.0), (Part::UpBias, scale)] {
                let Some(name) = parts.get(&part) else { continue };
                if trimmed(&file.shape(name)) != trimmed(&bias) {
                    let shape = file.shape(name);
                    return Err(Wrong::Lora(format!(
                        "`{name}` of the shape {shape:?} does not go with a bias of {bias:?}"
                    )));
                }
                let form = Form::Difference(name.clone());
                changes.push(("bias", Change { file: file.clone(), form, scale, weight, dora: None }));
            }
        }
        let own = self.changes.entry(component).or_default();
        for (part, change) in changes {
            if own.insert(format!("{layer}.{part}"), change).is_some() {
                return Err(Wrong::Lora(format!("`{named}`: the {part} of {layer} is changed by two of its tensors")));
            }
        }
        *self.layers.entry(component).or_default() += 1;
        Ok(true)
    }

    /// The weight of its changes of a network.
    fn weight(&self, component: Component) -> f64 {
        if component == Component::Unet { self.choice.weight } else { self.choice.text_weight() }
    }

    /// What the change of a layer is multiplied by but for the LoRA's weight: α by the rank, where an α is said; α is the
    /// rank where it is 0 or not said, as in kohya's tools.
    fn scale(&self, parts: &Parts, form: Option<&Form>, component: Component, layer: &str) -> Result<f64> {
        let scalar = self.file.number(parts, Part::Scalar)?.unwrap_or(1.0);
        let Some(form) = form.filter(|form| !matches!(form, Form::Difference(_))) else { return Ok(scalar) };
        let rank = form.rank(&self.file);
        let own = match (self.file.number(parts, Part::Alpha)?, rank) {
            (Some(alpha), Some(rank)) if alpha != 0.0 => Some(alpha / rank as f64),
            (Some(_), _) => Some(1.0),
            (None, _) => None,
        };
        // Whole sides of a Kronecker product have no rank: LyCORIS multiplies by 1 then, PEFT by what the adapter says.
        let whole = matches!(form, Form::Kronecker(sides) if sides.iter().all(|side| matches!(side, Side::Whole(_))));
        let own = if whole && own.is_some() { Some(1.0) } else { own };
        let adapter = || self.file.adapters.get(component).and_then(|adapter| adapter.scale(layer, rank));
        Ok(own.or_else(adapter).unwrap_or(1.0) * scalar)
    }

    /// What is said of a tensor whose layer is not there.
    fn no_layer(&self, tensor: &str, of: &[Component], target: &Target) -> String {
        match of {
            [only] if target.networks.iter().all(|network| network.component != *only) => match only {
                Component::TextEncoder2 => {
                    format!(
                        "`{tensor}` is of a second text encoder, and {} has none: the LoRA is of Stable Diffusion XL",
                        target.shown
                    )
                }
                _ => format!(
                    "`{tensor}` is of the {}, which {} does not have; te_weight = 0 in [[model.loras]] leaves the LoRA's changes \
                     of text encoders out",
                    only.title(),
                    target.shown
                ),
            },
            _ => format!(
                "`{tensor}` is of a layer that {} does not have: the LoRA was made for a model with other layers",
                target.shown
            ),
        }
    }

    /// Says what may surprise.
    fn remarks(&self, left_out: usize) {
        let shown = self.file.path().display();
        if self.changes.is_empty() {
            note_once(format_args!("the LoRA {shown} has the weight 0: nothing of it is merged"));
        } else if left_out > 0 {
            let of = if self.choice.weight == 0.0 { "the UNet" } else { "text encoders" };
            note_once(format_args!(
                "the LoRA {shown} has the weight 0 for {of}: {left_out} of its layers are left out"
            ));
        }
        let changes = || self.changes.values().flat_map(BTreeMap::values);
        let is_zero = |change: &Change| {
            change.dora.is_none() && change.form.tensors().iter().any(|name| self.file.zeros.contains(*name))
        };
        if !self.changes.is_empty() && changes().all(is_zero) {
            note_once(format_args!("the LoRA {shown} changes nothing: in every layer one of its factors is zero"));
        }
        let assumed = self.file.layouts.contains(&Layout::Peft) && self.file.adapters.is_empty();
        if assumed && !self.file.layers.values().any(|parts| parts.contains_key(&Part::Alpha)) {
            note_once(format_args!(
                "{shown} is PEFT's, and the adapter_config.json with its alpha is not beside it: alpha is taken to be the rank"
            ));
        }
    }

    /// The changes of a network, by the parameter's name of today.
    pub fn changes(&self, component: Component) -> Option<&BTreeMap<String, Change>> {
        self.changes.get(&component)
    }

    /// Whether it changes a network.
    pub fn changes_network(&self, component: Component) -> bool {
        self.changes.contains_key(&component)
    }

    /// Where it lies, as it was named.
    pub fn path(&self) -> &str {
        &self.choice.path
    }

    /// Its own name with its weights where these are not 1, as in `dog=0.8`; empty where it changes nothing.
    pub fn label(&self) -> String {
        let choice = LoraChoice { path: self.file.name(), ..self.choice.clone() };
        if self.changes.is_empty() { String::new() } else { choice.to_string() }
    }

    /// What a model's name has after it with this LoRA in it: `_` and the LoRA's own name, and its weights where these are
    /// not 1. Empty where it changes nothing.
    pub fn suffix(&self) -> String {
        if self.changes.is_empty() {
            return String::new();
        }
        let (weight, text) = (self.choice.weight, self.choice.text_weight());
        let weights = match (weight == 1.0, weight == text) {
            (true, true) => String::new(),
            (_, true) => format!("_{weight}"),
            _ => format!("_{weight}_{text}"),
        };
        format!("_{}{weights}", self.file.name())
    }
}

impl fmt::Display for Lora {
    /// `dog.safetensors (LoRA of rank 4, kohya's layout), weight 0.8: 192 layers of the UNet`.
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{} ({})", self.choice.path, summary::short(&self.file))?;
        let (weight, text) = (self.choice.weight, self.choice.text_weight());
        match weight == text {
            true => write!(f, ", weight {weight}: ")?,
            false => write!(f, ", weight {weight}, of text encoders {text}: ")?,
        }
        let layers: Vec<String> = self
            .layers
            .iter()
            .map(|(component, count)| format!("{count} layers of the {}", component.title()))
            .collect();
        f.write_str(if layers.is_empty() { "nothing".to_owned() } else { layers.join(", ") }.as_str())
    }
}

/// A mistake in a LoRA or with its model, or whatever else went wrong.
enum Wrong {
    Lora(String),
    Other(anyhow::Error),
}

impl From<String> for Wrong {
    fn from(text: String) -> Self {
        Self::Lora(text)
    }
}

impl From<anyhow::Error> for Wrong {
    fn from(error: anyhow::Error) -> Self {
        Self::Other(error)
    }
}

/// DoRA's lengths of a layer, checked against its weight.
fn dora(file: &LoraFile, parts: &Parts, form: &Form, weight: &[i64]) -> Result<Option<Dora>, Wrong> {
    let found = [Part::DoraScale, Part::Magnitude].into_iter().find_map(|part| Some((part, parts.get(&part)?)));
    let Some((part, name)) = found else { return Ok(None) };
    if matches!(form, Form::Embedding { .. } | Form::Difference(_)) || weight.len() < 2 {
        return Err(format!("`{name}`: DoRA of such a layer is not supported").into());
    }
    let shape = file.shape(name);
    let numbers = shape.iter().fold(1, |product: i64, &n| product.saturating_mul(n));
    let of_outputs = shape.len() == 1 || shape.first() == Some(&weight[0]);
    let by = match part {
        Part::Magnitude if numbers == weight[0] => DoraBy::Peft,
        Part::DoraScale if numbers == weight[0] && of_outputs => DoraBy::Outputs,
        Part::DoraScale if numbers == weight[1] && shape.get(1) == Some(&weight[1]) => DoraBy::Inputs,
        _ => return Err(format!("`{name}` of the shape {shape:?} does not go with a weight of {weight:?}").into()),
    };
    Ok(Some(Dora { magnitudes: name.clone(), by }))
}

/// The layers that cloneofsimo's files count, by network.
struct Orders(BTreeMap<&'static str, Vec<String>>);

/// The networks that a layer may be of, and what is found in them.
type Found<'t> = (Vec<Component>, Vec<(&'t Modules, String)>);

impl Orders {
    fn of(file: &LoraFile, target: &Target) -> Result<Self> {
        let mut orders = BTreeMap::new();
        for component in NETWORKS {
            let network = component.folder();
            let counted =
                file.layers.keys().any(|spelled| spelled.split_once(':').is_some_and(|(of, _)| of == network));
            let Some(modules) =
                target.networks.iter().find(|modules| modules.component == component).filter(|_| counted)
            else {
                continue;
            };
            let order = cloneofsimo::order(component, &file.targets(network)?, &modules.names());
            let order = order.map_err(|what| {
                anyhow!(Misused(format!(
                    "{}: it has {what} of the {network}, which is not supported",
                    file.path().display()
                )))
            })?;
            orders.insert(network, order);
        }
        Ok(Self(orders))
    }

    /// The layer of a counted name; `None` for names of other kinds.
    fn layer<'t>(&self, spelled: &str, target: &'t Target) -> Option<Result<Found<'t>, Wrong>> {
        let (network, number) = spelled.split_once(':')?;
        let number: usize = number.parse().ok()?;
        let component = NETWORKS.into_iter().find(|component| component.folder() == network)?;
        let modules = target.networks.iter().find(|modules| modules.component == component);
        let order = self.0.get(network);
        Some(match (modules, order) {
            (Some(modules), Some(order)) => match order.get(number) {
                Some(layer) => Ok((vec![component], vec![(modules, layer.clone())])),
                None => Err(Wrong::Lora(format!(
                    "`{spelled}` is beyond the {} layers that {} has of that kind: the LoRA was made for a model with other layers",
                    order.len(),
                    target.shown
                ))),
            },
            _ => Ok((vec![component], Vec::new())),
        })
    }
}

/// The changes that LoRAs make of a network, in their order.
#[derive(Clone, Default)]
pub struct Changes {
    loras: Vec<Arc<Lora>>,
    component: Option<Component>,
}

impl Changes {
    pub fn new(loras: &[Arc<Lora>], component: Component) -> Self {
        let changing = loras.iter().filter(|lora| lora.changes_network(component));
        Self { loras: changing.cloned().collect(), component: Some(component) }
    }

    /// Those of one parameter.
    fn of(&self, parameter: &str) -> impl Iterator<Item = &Change> {
        let component = self.component;
        self.loras.iter().filter_map(move |lora| lora.changes(component?)?.get(parameter))
    }

    /// Whether a parameter is changed.
    pub fn has(&self, parameter: &str) -> bool {
        self.of(parameter).next().is_some()
    }

    /// The parameter, of fp32 on the CPU, with all changes, one LoRA after the other.
    ///
    /// # Errors
    /// As [`Change::apply`].
    pub fn apply(&self, parameter: &str, value: Tensor) -> Result<Tensor> {
        self.of(parameter).try_fold(value, |value, change| change.apply(&value))
    }
}
