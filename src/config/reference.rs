//! What is written about the keys for readers: the JSON Schema, the key reference and the reference config, all from the
//! schema and the table of keys.

use std::fmt::Write;

use serde_json::Value;

use super::Config;
use super::keys::{Change, KEYS, Key};
use super::known::{self, Kind};
use super::values::{find, values};

/// Whose names the keys are; those that are not listed are Palettist's own.
const SOURCES: &[(&str, &[&str])] = &[
    (
        "diffusers",
        &[
            "output_dir",
            "seed",
            "model.pretrained_model_name_or_path",
            "model.revision",
            "model.prediction_type",
            "model.rescale_betas_zero_snr",
            "data.resolution",
            "data.train_data_dir",
            "data.center_crop",
            "data.dreambooth.instance_data_dir",
            "data.dreambooth.instance_prompt",
            "data.dreambooth.class_data_dir",
            "data.dreambooth.class_prompt",
            "data.dreambooth.with_prior_preservation",
            "data.dreambooth.prior_loss_weight",
            "data.dreambooth.num_class_images",
            "data.dreambooth.sample_batch_size",
            "train.train_text_encoder",
            "train.max_train_steps",
            "train.train_batch_size",
            "train.gradient_accumulation_steps",
            "train.learning_rate",
            "train.lr_scheduler",
            "train.lr_warmup_steps",
            "train.lr_num_cycles",
            "train.lr_power",
            "train.max_grad_norm",
            "train.use_ema",
            "train.noise_offset",
            "train.mixed_precision",
            "train.gradient_checkpointing",
            "sample.guidance_scale",
            "checkpoint.checkpointing_steps",
            "checkpoint.checkpoints_total_limit",
            "logging.report_to",
        ],
    ),
    (
        "kohya's sd-scripts",
        &[
            "model.vae",
            "data.caption_extension",
            "data.caption_dropout_rate",
            "data.flip_aug",
            "train.stop_text_encoder_training",
            "train.text_encoder_lr",
            "train.min_snr_gamma",
            "train.full_bf16",
            "sample.sample_every_n_steps",
        ],
    ),
    ("OneTrainer", &["train.ema_decay"]),
    (
        "diffusion-pipe",
        &["train.optimizer.type", "train.optimizer.betas", "train.optimizer.weight_decay", "train.optimizer.eps"],
    ),
    (
        "coremltools",
        &[
            "palettize.n_bits",
            "palettize.granularity",
            "palettize.group_size",
            "palettize.cluster_dim",
            "palettize.enable_per_channel_scale",
            "palettize.lut_dtype",
            "palettize.weight_threshold",
            "palettize.kmeans_max_iter",
        ],
    ),
    ("BK-SDM", &["distill.lambda_sd", "distill.lambda_kd_output", "distill.lambda_kd_feat"]),
    (
        "Apple's converter",
        &[
            "export.attention_implementation",
            "export.latent_h",
            "export.latent_w",
            "export.unet_batch_one",
            "export.unet_support_controlnet",
            "export.chunk_unet",
            "export.quantize_nbits",
            "export.bundle_resources_for_swift_cli",
        ],
    ),
];

/// Keys that a config must have in any case.
const REQUIRED: [&str; 2] = ["model.pretrained_model_name_or_path", "data.train_data_dir"];

/// The JSON Schema of a config, for editors.
pub fn json_schema() -> String {
    let schema = serde_json::to_string_pretty(known::schema()).expect("JSON has a text form");
    schema + "\n"
}

/// A key as it is shown.
struct Shown {
    key: &'static Key,
    name: &'static str,
    schema: &'static Value,
    /// As TOML.
    default: Option<String>,
}

/// A section and its keys, in the order of the table of keys.
struct Section {
    name: &'static str,
    keys: Vec<Shown>,
}

fn path(key: &str) -> Vec<&str> {
    key.split('.').filter(|part| !part.is_empty()).collect()
}

fn sections() -> Vec<Section> {
    let config = Config {
        data: super::Data { dreambooth: Some(Default::default()), ..Default::default() },
        ..Default::default()
    };
    let defaults = values(&config);
    let mut sections: Vec<Section> = Vec::new();
    for key in KEYS {
        let (section, name) = key.name.rsplit_once('.').unwrap_or(("", key.name));
        let schema = known::find(&path(key.name)).expect("the table of keys is that of the schema");
        let default = find(&defaults, key.name).map(ToString::to_string).filter(|text| text != "\"\"");
        let shown = Shown { key, name, schema, default };
        match sections.iter_mut().find(|known| known.name == section) {
            Some(section) => section.keys.push(shown),
            None => sections.push(Section { name: section, keys: vec![shown] }),
        }
    }
    sections
}

impl Section {
    /// What the section is for, without its own name in front.
    fn description(&self) -> String {
        let schema = known::find(&path(self.name)).expect("keys are in sections of the schema");
        let text = description(schema);
        let text = text.strip_prefix(&format!("`[{}]`", self.name)).unwrap_or(&text);
        text.trim_start_matches([':', ' ']).to_owned()
    }
}

fn description(schema: &Value) -> String {
    schema["description"].as_str().unwrap_or_default().to_owned()
}

impl Shown {
    /// The words that the key takes, each with its meaning where that is told.
    fn words(&self) -> Vec<(String, String)> {
        let schema = if self.schema["items"].is_object() { &self.schema["items"] } else { self.schema };
        let plain = schema["enum"].as_array().into_iter().flatten().filter_map(Value::as_str).map(|word| (word, ""));
        let told = schema["oneOf"].as_array().into_iter().flatten().flat_map(|choice| {
            let words = choice["enum"].as_array().into_iter().flatten().chain([&choice["const"]]);
            words.filter_map(Value::as_str).map(|word| (word, choice["description"].as_str().unwrap_or_default()))
        });
        plain.chain(told).map(|(word, meaning)| (word.to_owned(), meaning.to_owned())).collect()
    }

    fn type_name(&self) -> String {
        let words = self.words();
        let is_list = self.schema["type"] == "array";
        let one = |schema: &Value| match &schema["type"] {
            _ if !words.is_empty() => {
                words.iter().map(|(word, _)| format!("`\"{word}\"`")).collect::<Vec<_>>().join(", ")
            }
            Value::Array(types) => {
                types.iter().filter_map(Value::as_str).map(type_word).collect::<Vec<_>>().join(" or ")
            }
            Value::String(name) => type_word(name).to_owned(),
            _ => "value".to_owned(),
        };
        match is_list {
            false => one(self.schema),
            true if self.schema["items"]["properties"].is_object() => "list of tables".to_owned(),
            true if words.is_empty() => {
                let count = self.schema["maxItems"].as_u64().map_or_else(String::new, |count| format!("{count} × "));
                format!("list: {count}{}", one(&self.schema["items"]))
            }
            true => format!("list of {}", one(&self.schema["items"])),
        }
    }

    /// An example of a value, as TOML.
    fn example(&self) -> Option<String> {
        let example = self.schema["examples"].get(0)?;
        Some(toml_text(example))
    }

    fn source(&self) -> &'static str {
        let listed = SOURCES.iter().find(|(_, keys)| keys.contains(&self.key.name));
        listed.map_or("Palettist", |(program, _)| *program)
    }
}

fn type_word(name: &str) -> &str {
    match name {
        "integer" => "whole number",
        "boolean" => "`true`, `false`",
        "string" => "text",
        name => name,
    }
}

/// A JSON value as TOML on one line.
fn toml_text(value: &Value) -> String {
    match value {
        Value::Object(keys) => {
            let keys: Vec<String> = keys.iter().map(|(key, value)| format!("{key} = {}", toml_text(value))).collect();
            format!("{{ {} }}", keys.join(", "))
        }
        Value::Array(items) => format!("[{}]", items.iter().map(toml_text).collect::<Vec<_>>().join(", ")),
        value => value.to_string(),
    }
}

/// Every key with its type, default, source and effect, as Markdown: `docs/config.md`.
pub fn key_reference() -> String {
    let mut text = String::from(
        "# Every key of a config\n\n\
         `palettist schema --format markdown` writes this page, from the same source as the program reads configs by. \
         `palettist schema` writes the JSON Schema, with which editors complete keys and show these descriptions; \
         `configs/reference.toml` has all keys at their defaults.\n\n\
         \"Name of\" says in which program the key is called so, with the same meaning. \"Resumed\" says what happens if the \
         value has changed when a run is resumed: *free*, the change has no effect on what is learned; *notice*, the run \
         continues with the new value and says so; *refused*, it would be another run.\n",
    );
    for section in sections() {
        let heading = if section.name.is_empty() { "Top level".to_owned() } else { format!("`[{}]`", section.name) };
        let _ = write!(text, "\n## {heading}\n\n");
        let purpose = section.description();
        if !purpose.is_empty() && !section.name.is_empty() {
            let _ = write!(text, "{purpose}\n\n");
        }
        text += "| key | type | default | name of | resumed | effect |\n|---|---|---|---|---|---|\n";
        for key in &section.keys {
            let mut effect = description(key.schema);
            for (word, meaning) in key.words().iter().filter(|(_, meaning)| !meaning.is_empty()) {
                let _ = write!(effect, " `\"{word}\"`: {meaning}");
            }
            if let (Kind::Table(keys) | Kind::Tables(keys), true) =
                (known::kind(key.schema), key.schema["type"] == "array")
            {
                for (name, schema) in keys {
                    let _ = write!(effect, " `{name}`: {}", description(schema));
                }
            }
            let default = match (&key.default, key.example()) {
                _ if REQUIRED.contains(&key.key.name) => "required".to_owned(),
                (Some(default), _) => format!("`{default}`"),
                (None, Some(example)) => format!("not set; e.g. `{example}`"),
                (None, None) => "not set".to_owned(),
            };
            let resumed = match key.key.change {
                Change::Free => "free",
                Change::Notice => "notice",
                Change::Refused => "refused",
            };
            let cells = [&format!("`{}`", key.name), &key.type_name(), &default, key.source(), resumed, &effect];
            let cells = cells.map(|cell| cell.replace('|', "\\|"));
            let _ = writeln!(text, "| {} |", cells.join(" | "));
        }
    }
    text
}

/// A config with every key, commented, all at their defaults: `configs/reference.toml`.
pub fn reference_config() -> String {
    let mut text = String::from(
        "# Every key that a config can have, at its default: a page to look things up in, and to copy lines from.\n\
         #\n\
         # `#key = value` shows a default, `# key = value` an example of a key that is not set. `palettist schema --format toml`\n\
         # writes this file; docs/config.md has the same as tables.\n",
    );
    for section in sections() {
        if !section.name.is_empty() {
            text.push('\n');
            comment(&mut text, &section.description());
            let _ = writeln!(text, "[{}]", section.name);
        }
        for key in &section.keys {
            text.push('\n');
            comment(&mut text, &description(key.schema));
            for (word, meaning) in key.words() {
                comment(&mut text, format!("  \"{word}\": {meaning}").trim_end_matches([':', ' ']));
            }
            let required = REQUIRED.contains(&key.key.name);
            let _ = match (&key.default, key.example()) {
                (_, Some(example)) if required => writeln!(text, "{} = {example}", key.name),
                (Some(default), _) => writeln!(text, "#{} = {default}", key.name),
                (None, example) => writeln!(text, "# {} = {}", key.name, example.unwrap_or_else(|| "\"\"".to_owned())),
            };
        }
    }
    text
}

/// Adds lines of comment, broken at 120 characters.
fn comment(text: &mut String, words: &str) {
    let indent = if words.starts_with("  ") { "#   " } else { "# " };
    let mut line = String::new();
    for word in words.split_whitespace() {
        if !line.is_empty() && indent.len() + line.chars().count() + 1 + word.chars().count() > 120 {
            let _ = writeln!(text, "{indent}{line}");
            line.clear();
        }
        if !line.is_empty() {
            line.push(' ');
        }
        line.push_str(word);
    }
    if !line.is_empty() {
        let _ = writeln!(text, "{indent}{line}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A key of which nothing is said, or that neither a default nor an example shows, is a gap in the reference.
    #[test]
    fn every_key_is_described_and_shown() {
        for section in sections() {
            for key in section.keys {
                assert!(description(key.schema).len() > 10, "{} has no description", key.key.name);
                assert!(key.default.is_some() || key.example().is_some(), "{} has no example", key.key.name);
                assert_ne!(key.type_name(), "value", "{} has no type", key.key.name);
            }
        }
    }

    #[test]
    fn every_name_of_another_program_is_a_key() {
        let listed: Vec<&str> = SOURCES.iter().flat_map(|(_, keys)| keys.iter().copied()).collect();
        for name in listed.iter().chain(&REQUIRED) {
            assert!(KEYS.iter().any(|key| key.name == *name), "there is no {name}");
            assert!(listed.iter().filter(|other| other == &name).count() <= 1, "{name} is there twice");
        }
    }
}
