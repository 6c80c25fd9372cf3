//! The config of a run: one TOML file, strict, read once into [`Config`].
//!
//! Precedence: the documented defaults  < the file < `key=value` on the command line. Names are those of
//! diffusers' and kohya's trainers. Every mistake is reported, not only the first: keys that do not exist with the
//! nearest one that does, values of a wrong type, and what does not fit together, each with its line and column.
//!
//! Relative paths are relative to the working directory, as in kohya's and diffusers' trainers (not to the file).

mod defaults;
mod differences;
mod effects;
mod findings;
mod foreign;
mod keys;
mod known;
mod palettes;
mod problem;
mod prompts;
mod read;
mod recipe;
mod reference;
mod rules;
mod schema;
mod syntax;
mod unknown;
mod values;

use std::path::Path;

pub use crate::coreml::DeploymentTarget;
use crate::source::Component;

pub use differences::Difference;
pub use keys::Change;
pub use known::TITLE as SCHEMA_TITLE;
pub use palettes::matches_glob;
pub use problem::{Error, Loaded, Problem};
pub use prompts::SamplePrompt;
pub use recipe::{Recipe, RecipeLayer, recipe_text};
pub use reference::{json_schema, key_reference, reference_config};
pub use rules::{LONGEST_NAME, POLYNOMIAL_END};
pub use schema::*;

/// Reads the config at `path`, lays `overrides` (`train.max_train_steps=20`; a value that is not TOML is a string) over
/// it, fills in every default and checks what must fit together. Touches no file but `path` and the recipe that it names.
///
/// # Errors
/// [`Error`] with every mistake found.
pub fn load(path: &Path, overrides: &[String]) -> Result<Loaded, Error> {
    let file = path.display().to_string();
    match syntax::read_text(path) {
        Ok(text) => parse(&text, &file, overrides),
        Err(message) => Err(Error { problems: vec![Problem { place: file, message }] }),
    }
}

/// [`load`] from a text; `file` is its name in messages.
///
/// # Errors
/// As [`load`].
pub fn parse(text: &str, file: &str, overrides: &[String]) -> Result<Loaded, Error> {
    read::read(text, file, overrides, read::Effects::Checked)
}

/// Reads what [`Config::resolved_toml`] wrote, of this version or an earlier one, for comparison with the config of today
/// ([`Config::differences`]): keys without effect are let pass.
///
/// # Errors
/// As [`load`].
pub fn parse_resolved(text: &str, file: &str) -> Result<Config, Error> {
    read::read(text, file, &[], read::Effects::Ignored).map(|loaded| loaded.config)
}

impl Config {
    /// The whole config with every default written out that has an effect, for `output_dir/config.resolved.toml`. [`parse`]
    /// reads it back to a `Config` that does the same: a recipe is in its overrides, and its file no longer named.
    pub fn resolved_toml(&self) -> String {
        let mut config = self.clone();
        config.palettize.recipe = None;
        config.palettize.overrides = config.palettize.effective_overrides();
        let table = values::values(&config);
        // In the order of the schema, which is that of the table of keys.
        let (mut body, mut section) = (String::new(), "");
        for key in keys::KEYS.iter().filter(|key| !key.is_idle(self)) {
            let Some(value) = values::find(&table, key.name) else { continue };
            let (parent, name) = key.name.rsplit_once('.').unwrap_or(("", key.name));
            match value.as_array().filter(|items| items.iter().any(toml::Value::is_table)) {
                Some(items) => {
                    for item in items {
                        let item = toml::to_string(item).expect("a table has a TOML form");
                        body += &format!("\n[[{}]]\n{item}", key.name);
                    }
                }
                None => {
                    if parent != section {
                        body += &format!("\n[{parent}]\n");
                        section = parent;
                    }
                    body += &format!("{name} = {value}\n");
                }
            }
        }
        format!(
            "# The config as it was run: every default that has an effect written out, `key=value` changes included.\n{body}"
        )
    }
}

/// The folder of the first of two stages, in that of the run.
pub const PERSONALIZED: &str = "personalized";

impl Config {
    /// The settings of prior preservation and the folder of its pictures, where the config has any.
    pub fn class_folder(&self) -> Option<(&Dreambooth, &Path)> {
        let settings = self.data.prior()?;
        let folder = settings.class_data_dir.as_deref().filter(|_| settings.prior_source == PriorSource::Pictures)?;
        Some((settings, folder))
    }

    /// The folders of pictures that the config names, with their keys.
    pub fn picture_folders(&self) -> Vec<(&'static str, &Path)> {
        let data = &self.data;
        let mut named: Vec<(&'static str, &Path)> = Vec::new();
        match data.dreambooth.as_ref().filter(|_| self.train.mode == Mode::Dreambooth) {
            Some(settings) => named.push(("data.dreambooth.instance_data_dir", &settings.instance_data_dir)),
            None => named.extend(data.train_data_dir.as_deref().map(|folder| ("data.train_data_dir", folder))),
        }
        named.extend(self.class_folder().map(|(_, folder)| ("data.dreambooth.class_data_dir", folder)));
        named.extend(data.validation_data_dir.as_deref().map(|folder| ("data.validation_data_dir", folder)));
        named
    }

    /// The first of two stages (`distill.teacher = "personalized"`) as a run of its own: the same in float, without a
    /// teacher, in [`PERSONALIZED`].
    pub fn first_stage(&self) -> Option<Self> {
        let steps = self.first_stage_steps();
        if steps == 0 {
            return None;
        }
        let mut first = self.clone();
        first.output_dir = self.output_dir.join(PERSONALIZED);
        first.train.max_train_steps = steps;
        first.train.learning_rate = self.distill.personalize_learning_rate;
        first.palettize.enabled = false;
        first.distill.enabled = false;
        first.export.coreml = false;
        Some(first)
    }

    /// Steps of the first of two stages; 0 where there is only one.
    pub fn first_stage_steps(&self) -> u64 {
        let two = self.distill.enabled && self.distill.teacher == TeacherChoice::Personalized;
        if two { self.distill.personalize_steps } else { 0 }
    }
}

impl Data {
    /// The settings of DreamBooth, where its prior is preserved.
    pub fn prior(&self) -> Option<&Dreambooth> {
        self.dreambooth.as_ref().filter(|settings| settings.with_prior_preservation)
    }
}

impl Train {
    /// Whether a run changes this network.
    pub fn learns(&self, component: Component) -> bool {
        match (self.component, component) {
            (TrainedComponent::Unet, Component::Unet) | (TrainedComponent::Autoencoder, Component::Autoencoder) => true,
            (TrainedComponent::Unet, Component::TextEncoder) => self.train_text_encoder,
            _ => false,
        }
    }

    /// Whether the master weight of a parameter of this shape is bf16, with its gradient and moments: biases and norms weigh
    /// nothing, and eight bits would leave a norm's scale 0.4 % off.
    pub fn is_bf16(&self, shape: &[i64]) -> bool {
        self.full_bf16 && shape.len() > 1
    }
}

#[cfg(test)]
mod tests;
