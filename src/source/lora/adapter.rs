//! What PEFT says of an adapter beside its tensors: `adapter_config.json`, or the same in the header of diffusers' files.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value};

use super::super::Component;
use super::NETWORKS;
use crate::files::json::read_json_if_there;

/// Where diffusers keeps it in a file's header: each key behind its network's folder and a dot.
const METADATA: &str = "lora_adapter_metadata";

/// What is said of the adapter of a network.
#[derive(Clone, Debug, PartialEq)]
pub struct Adapter {
    /// `lora_alpha`, or `alpha` of a LoHa or LoKr.
    alpha: Option<f64>,
    rank: Option<f64>,
    /// Whether α is divided by the root of the rank (Kalajdzievski 2023, arXiv:2312.03732).
    use_rslora: bool,
    alphas: Vec<(Pattern, f64)>,
    ranks: Vec<(Pattern, f64)>,
}

/// What is said for each network; under `None` for all of them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Adapters(BTreeMap<Option<Component>, Adapter>);

impl Adapters {
    /// Reads what is said of the file `path` with this header: `adapter_config.json` beside it wins where both are there.
    ///
    /// # Errors
    /// One line: not JSON, a kind of adapter that is not merged, a pattern that is not plain text.
    pub fn of(path: &Path, metadata: &BTreeMap<String, String>) -> Result<Self> {
        let config = path.with_file_name("adapter_config.json");
        if let Some(json) = read_json_if_there(&config)? {
            let adapter = Adapter::of(&json).with_context(|| config.display().to_string())?;
            return Ok(Self(BTreeMap::from([(None, adapter)])));
        }
        let Some(text) = metadata.get(METADATA) else { return Ok(Self::default()) };
        let place = || format!("{}: `{METADATA}` of its header", path.display());
        let json: Value = serde_json::from_str(text).with_context(place)?;
        let keys = json.as_object().with_context(place)?;
        let mut adapters = BTreeMap::new();
        for component in NETWORKS {
            let prefix = format!("{}.", component.folder());
            let own: Map<String, Value> = keys
                .iter()
                .filter_map(|(key, value)| Some((key.strip_prefix(&prefix)?.to_owned(), value.clone())))
                .collect();
            if !own.is_empty() {
                adapters.insert(Some(component), Adapter::of(&Value::Object(own)).with_context(place)?);
            }
        }
        Ok(Self(adapters))
    }

    /// That of a network.
    pub fn get(&self, component: Component) -> Option<&Adapter> {
        self.0.get(&Some(component)).or_else(|| self.0.get(&None))
    }

    /// Whether nothing is said at all.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl Adapter {
    fn of(json: &Value) -> Result<Self> {
        if let Some(kind) = json.get("peft_type").and_then(Value::as_str) {
            ensure!(
                ["LORA", "LOHA", "LOKR"].contains(&kind.to_uppercase().as_str()),
                "is of {kind}: only LoRA, LoHa and LoKr are merged"
            );
        }
        if let Some(saved) = json.get("modules_to_save").and_then(Value::as_array).filter(|saved| !saved.is_empty()) {
            bail!("has modules_to_save ({}), whole layers in place of the model's, which are not supported", saved[0]);
        }
        Ok(Self {
            alpha: number(json, "lora_alpha")?.or(number(json, "alpha")?),
            rank: number(json, "r")?,
            use_rslora: json.get("use_rslora").and_then(Value::as_bool).unwrap_or(false),
            alphas: patterns(json, "alpha_pattern")?,
            ranks: patterns(json, "rank_pattern")?,
        })
    }

    /// What the change of `layer` is multiplied by: α by the rank or its root; `None` where no α is said. `rank` is that of
    /// its tensors, where they tell one.
    pub fn scale(&self, layer: &str, rank: Option<i64>) -> Option<f64> {
        let of = |patterns: &[(Pattern, f64)]| {
            patterns.iter().find(|(pattern, _)| pattern.matches(layer)).map(|(_, value)| *value)
        };
        let alpha = of(&self.alphas).or(self.alpha)?;
        let rank = rank.map(|rank| rank as f64).or_else(|| of(&self.ranks)).or(self.rank)?;
        Some(alpha / if self.use_rslora { rank.sqrt() } else { rank })
    }
}

fn number(json: &Value, key: &str) -> Result<Option<f64>> {
    match json.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => {
            let number = value.as_f64().filter(|number| *number > 0.0);
            number.map(Some).with_context(|| format!("`{key}` is {value}: a positive number is expected"))
        }
    }
}

fn patterns(json: &Value, key: &str) -> Result<Vec<(Pattern, f64)>> {
    let of = |(pattern, value): (&String, &Value)| {
        let number = value.as_f64().with_context(|| format!("`{key}`: {value} is not a number"))?;
        Ok((Pattern::of(pattern).with_context(|| format!("`{key}`"))?, number))
    };
    json.get(key).and_then(Value::as_object).map_or(Ok(Vec::new()), |entries| entries.iter().map(of).collect())
}

/// A key of PEFT's patterns. These are regular expressions for the end of a layer's name; here the plain ones are known, in
/// which `.` stands for itself.
#[derive(Clone, Debug, PartialEq)]
enum Pattern {
    /// The whole name.
    Whole(String),
    /// The name, or its end after a dot.
    End(String),
}

impl Pattern {
    fn of(text: &str) -> Result<Self> {
        let plain = text.replace("\\.", ".");
        let (whole, plain) = match plain.strip_prefix('^') {
            Some(rest) => (true, rest.to_owned()),
            None => (false, plain),
        };
        let plain = plain.strip_suffix('$').unwrap_or(&plain).to_owned();
        ensure!(
            plain.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '.'),
            "the pattern \"{text}\" is a regular expression; names of layers, or ends of names, are supported"
        );
        Ok(if whole { Self::Whole(plain) } else { Self::End(plain) })
    }

    fn matches(&self, layer: &str) -> bool {
        match self {
            Self::Whole(name) => layer == name,
            Self::End(end) => {
                layer.strip_suffix(end.as_str()).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_scale_is_alpha_by_the_rank_or_its_root() {
        let of = |json: Value| Adapter::of(&json).unwrap();
        let plain = of(json!({ "peft_type": "LORA", "r": 8, "lora_alpha": 16 }));
        assert_eq!(plain.scale("a.to_q", Some(4)), Some(4.0));
        assert_eq!(plain.scale("a.to_q", None), Some(2.0));
        assert_eq!(of(json!({ "r": 8, "lora_alpha": 16, "use_rslora": true })).scale("a", Some(16)), Some(4.0));
        assert_eq!(of(json!({ "peft_type": "LOHA", "r": 4, "alpha": 2 })).scale("a", None), Some(0.5));
        assert_eq!(of(json!({ "r": 4 })).scale("a", Some(4)), None);
        let each = of(json!({
            "r": 4, "lora_alpha": 4, "rank_pattern": { "conv1": 2 },
            "alpha_pattern": { "to_q": 8, "^mid\\.to_k$": 16 }
        }));
        assert_eq!(each.scale("mid.to_q", Some(4)), Some(2.0));
        assert_eq!(each.scale("mid.not_to_q", Some(4)), Some(1.0));
        assert_eq!(each.scale("mid.to_k", Some(4)), Some(4.0));
        assert_eq!(each.scale("down.mid.to_k", Some(4)), Some(1.0));
        assert_eq!(each.scale("a.conv1", None), Some(2.0));
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        for (json, expected) in [
            (json!({ "peft_type": "OFT" }), "OFT"),
            (json!({ "lora_alpha": "much" }), "lora_alpha"),
            (json!({ "r": 0 }), "positive"),
            (json!({ "alpha_pattern": { "to_(q|k)": 2 } }), "regular expression"),
            (json!({ "modules_to_save": ["conv_in"] }), "conv_in"),
        ] {
            let error = format!("{:#}", Adapter::of(&json).unwrap_err());
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn diffusers_keeps_it_in_the_header() {
        let metadata = |text: &str| BTreeMap::from([(METADATA.to_owned(), text.to_owned())]);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.safetensors");
        let text = r#"{"unet.r": 4, "unet.lora_alpha": 8, "text_encoder.r": 4, "text_encoder.lora_alpha": 2}"#;
        let adapters = Adapters::of(&path, &metadata(text)).unwrap();
        let scale = |adapters: &Adapters, component| adapters.get(component).and_then(|own| own.scale("a", Some(4)));
        assert_eq!(scale(&adapters, Component::Unet), Some(2.0));
        assert_eq!(scale(&adapters, Component::TextEncoder), Some(0.5));
        assert_eq!(scale(&adapters, Component::TextEncoder2), None);
        std::fs::write(folder.path().join("adapter_config.json"), r#"{"lora_alpha": 12}"#).unwrap();
        assert_eq!(scale(&Adapters::of(&path, &metadata(text)).unwrap(), Component::TextEncoder2), Some(3.0));
        std::fs::write(folder.path().join("adapter_config.json"), "x").unwrap();
        assert!(Adapters::of(&path, &BTreeMap::new()).is_err());
        let other = folder.path().join("other");
        std::fs::create_dir(&other).unwrap();
        assert!(Adapters::of(&other.join("a.safetensors"), &metadata("[]")).is_err());
    }
}
