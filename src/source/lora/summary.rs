//! What the file of a LoRA holds, without a model.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use anyhow::Result;

use super::super::Component;
use super::NETWORKS;
use super::family::Family;
use super::file::LoraFile;
use super::form::Form;
use super::keys::Part;
use super::modules::networks;

/// What `inspect` tells of a LoRA.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraSummary {
    /// `LoRA`, `LoCon`, `LoHa`, …, with `DoRA` where lengths are there.
    pub kinds: Vec<&'static str>,
    /// Who wrote it in this way.
    pub layouts: Vec<&'static str>,
    pub ranks: Vec<i64>,
    /// Those that tensors say; where one is not said it is the rank, or `adapter_config.json` says it.
    pub alphas: Vec<f64>,
    /// How many layers of each network, as far as names tell.
    pub layers: Vec<(&'static str, usize)>,
    /// The models that it was made for.
    pub family: Option<String>,
}

impl LoraSummary {
    /// Reads the file of a LoRA.
    ///
    /// # Errors
    /// One line with file and tensor: it does not exist, is a pickle, is empty, or holds what no LoRA has.
    pub fn of(path: &Path) -> Result<Self> {
        Ok(Self::of_file(&LoraFile::open(&path.to_string_lossy())?))
    }

    fn of_file(file: &LoraFile) -> Self {
        let (mut kinds, mut ranks, mut alphas) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
        let mut layers: BTreeMap<&str, usize> = BTreeMap::new();
        for (spelled, parts) in &file.layers {
            if let Some(form) = Form::of(parts).ok().flatten() {
                kinds.insert(form.title(file));
                ranks.extend(form.rank(file));
            }
            if parts.contains_key(&Part::DoraScale) || parts.contains_key(&Part::Magnitude) {
                kinds.insert("DoRA");
            }
            let alpha = file.number(parts, Part::Alpha).ok().flatten();
            alphas.extend(alpha.map(f64::to_bits));
            *layers.entry(network(spelled)).or_default() += 1;
        }
        let mut alphas: Vec<f64> = alphas.into_iter().map(f64::from_bits).collect();
        alphas.sort_by(f64::total_cmp);
        Self {
            kinds: kinds.into_iter().collect(),
            layouts: file.layouts.iter().map(|layout| layout.title()).collect(),
            ranks: ranks.into_iter().collect(),
            alphas,
            layers: layers.into_iter().collect(),
            family: Family::of_lora(file).map(|family| family.to_string()),
        }
    }

    /// `LoRA of rank 4 in kohya's layout, for Stable Diffusion 1`.
    pub fn title(&self) -> String {
        let family = self.family.as_ref().map_or(String::new(), |family| format!(", for {family}"));
        format!("{} in {}{family}", self.kind(), self.layouts.join(" and "))
    }

    /// `LoRA of rank 4`.
    fn kind(&self) -> String {
        let rank = range(&self.ranks).map_or(String::new(), |ranks| format!(" of rank {ranks}"));
        let kinds = if self.kinds.is_empty() { "LoRA".to_owned() } else { self.kinds.join(", ") };
        format!("{kinds}{rank}")
    }

    /// Its alphas, and its layers by network, as lines of key and value.
    pub fn lines(&self) -> Vec<(String, String)> {
        let alpha = range(&self.alphas).unwrap_or_else(|| "not said by its tensors".to_owned());
        let layers = self.layers.iter().map(|(network, count)| (format!("layers of the {network}"), count.to_string()));
        std::iter::once(("alpha".to_owned(), alpha)).chain(layers).collect()
    }
}

/// `LoRA of rank 4, kohya's layout`, for lists.
pub fn short(file: &LoraFile) -> String {
    let summary = LoraSummary::of_file(file);
    format!("{}, {}", summary.kind(), summary.layouts.join(" and "))
}

/// `4`, or `4 to 16`.
fn range<T: std::fmt::Display + PartialEq>(sorted: &[T]) -> Option<String> {
    match sorted {
        [] => None,
        [first, .., last] if first != last => Some(format!("{first} to {last}")),
        [first, ..] => Some(first.to_string()),
    }
}

/// The network of a layer, by its name.
fn network(spelled: &str) -> &'static str {
    let counted = spelled.split_once(':').map(|(network, _)| network);
    if let Some(component) = NETWORKS.into_iter().find(|component| counted == Some(component.folder())) {
        return component.title();
    }
    match networks(spelled) {
        ([only], _) => only.title(),
        (_, name) if name.starts_with("text_model") || name.starts_with("encoder") => Component::TextEncoder.title(),
        _ => Component::Unet.title(),
    }
}
