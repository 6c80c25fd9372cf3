//! What a picture shows, by the texts that it is closest to (Radford et al. 2021, 3.1: zero-shot prediction).

use std::collections::BTreeMap;

use anyhow::{Result, ensure};
use tch::Tensor;

use super::prompts::LabelTexts;
use super::{Clip, JudgedPrompt};

/// All that a judge chooses among.
pub struct Choices(Vec<Choice>);

/// The values of one label.
struct Choice {
    label: String,
    values: Vec<String>,
    /// Unit vectors `[values, E]` of their texts.
    texts: Tensor,
}

impl Choices {
    /// The labels that prompts have, each with all values that the prompts and `more` name for it.
    ///
    /// # Errors
    /// A label with one value only, to which nothing is preferred; libtorch's.
    pub fn new(clip: &Clip, prompts: &[JudgedPrompt], more: &LabelTexts) -> Result<Self> {
        let mut all = LabelTexts::new();
        for (label, value) in prompts.iter().flat_map(|prompt| &prompt.labels) {
            all.entry(label.clone()).or_default().insert(value.clone(), value.clone());
        }
        let mut choices = Vec::new();
        for (label, mut texts) in all {
            texts.extend(more.get(&label).into_iter().flatten().map(|(value, text)| (value.clone(), text.clone())));
            let (values, texts): (Vec<String>, Vec<String>) = texts.into_iter().unzip();
            ensure!(
                values.len() > 1,
                "all prompts have the {label} `{}`: a judge that has nothing else to choose is always right; name other \
                 values with --labels",
                values[0]
            );
            let texts = clip.texts(&texts.iter().map(String::as_str).collect::<Vec<_>>())?;
            choices.push(Choice { label, values, texts });
        }
        Ok(Self(choices))
    }

    /// The labels, each with how many values there are.
    pub fn counts(&self) -> impl Iterator<Item = (&str, usize)> {
        self.0.iter().map(|choice| (choice.label.as_str(), choice.values.len()))
    }

    /// The value of each label whose text is closest to a picture, for each of the pictures' unit vectors `[N, E]`.
    pub fn shown(&self, pictures: &Tensor) -> Vec<BTreeMap<&str, &str>> {
        let mut shown = vec![BTreeMap::new(); pictures.size()[0] as usize];
        for Choice { label, values, texts } in &self.0 {
            let closest = pictures.matmul(&texts.tr()).argmax(1, false);
            for (picture, labels) in shown.iter_mut().enumerate() {
                labels.insert(label.as_str(), values[closest.int64_value(&[picture as i64]) as usize].as_str());
            }
        }
        shown
    }
}
