//! What is said of a LoRA: where it lies, and how much of it is merged.

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A LoRA to merge into a model: an entry of `[[model.loras]]`, or what `--lora` takes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LoraChoice {
    /// A `.safetensors` file, a folder with one, or the id of such in the local Hugging Face cache.
    pub path: String,
    /// What its changes are multiplied by; any finite number, 0 leaves the LoRA out.
    #[serde(default = "whole")]
    pub weight: f64,
    /// What its changes of text encoders are multiplied by; `weight` if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub te_weight: Option<f64>,
}

fn whole() -> f64 {
    1.0
}

impl LoraChoice {
    /// The weight of its changes of text encoders.
    pub fn text_weight(&self) -> f64 {
        self.te_weight.unwrap_or(self.weight)
    }

    /// What is wrong with its weights or path.
    pub fn mistake(&self) -> Option<String> {
        if self.path.is_empty() {
            return Some("names no file".to_owned());
        }
        let numbers = [("weight", Some(self.weight)), ("te_weight", self.te_weight)];
        let wrong = numbers.into_iter().find_map(|(name, value)| value.filter(|v| !v.is_finite()).map(|v| (name, v)));
        wrong.map(|(name, value)| format!("has the {name} {value}: a finite number is expected"))
    }
}

impl FromStr for LoraChoice {
    type Err = String;

    /// `FILE` or `FILE=WEIGHT`. A path may itself hold `=`: what follows the last one is the weight where it is a number,
    /// and no file has the whole text as its name.
    fn from_str(text: &str) -> Result<Self, String> {
        let whole = |path: &str, weight| Self { path: path.to_owned(), weight, te_weight: None };
        let choice = match text.rsplit_once('=') {
            _ if Path::new(text).exists() => whole(text, 1.0),
            None => whole(text, 1.0),
            Some((path, weight)) => match weight.trim().parse() {
                Ok(weight) => whole(path, weight),
                Err(_) if Path::new(path).exists() => {
                    return Err(format!("`{weight}` is not a number: FILE=WEIGHT is expected, as in {path}=0.8"));
                }
                Err(_) => whole(text, 1.0),
            },
        };
        choice.mistake().map_or(Ok(choice), |mistake| Err(format!("it {mistake}")))
    }
}

impl fmt::Display for LoraChoice {
    /// As `--lora` takes it, the text encoders' weight in parentheses where it is another.
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(&self.path)?;
        if self.weight != 1.0 {
            write!(f, "={}", self.weight)?;
        }
        match self.te_weight.filter(|weight| *weight != self.weight) {
            Some(weight) => write!(f, " (text encoders: {weight})"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_weight_stands_after_the_last_equals_sign() {
        let read = |text: &str| text.parse::<LoraChoice>().map(|lora| (lora.path, lora.weight));
        assert_eq!(read("a.safetensors").unwrap(), ("a.safetensors".into(), 1.0));
        assert_eq!(read("a.safetensors=0.8").unwrap(), ("a.safetensors".into(), 0.8));
        assert_eq!(read("a=b.safetensors=-1e-1").unwrap(), ("a=b.safetensors".into(), -0.1));
        assert_eq!(read("a=b.safetensors").unwrap(), ("a=b.safetensors".into(), 1.0));
        for (text, expected) in [("", "no file"), ("=0.5", "no file"), ("a=inf", "finite"), ("a=NaN", "finite")] {
            let error = read(text).unwrap_err();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }

    #[test]
    fn files_that_are_there_are_told_from_weights() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("a.safetensors");
        std::fs::write(&file, "").unwrap();
        let odd = folder.path().join("b=2");
        std::fs::write(&odd, "").unwrap();
        assert_eq!(odd.to_str().unwrap().parse::<LoraChoice>().unwrap().weight, 1.0);
        let error = format!("{}=much", file.display()).parse::<LoraChoice>().unwrap_err();
        assert!(error.contains("`much` is not a number"), "{error}");
    }
}
