//! What differs between two configs, key by key, and what that means to a run that is resumed.

use std::collections::BTreeMap;
use std::fmt;

use toml::Value;

use super::keys::{self, Change};
use super::{Config, TeacherChoice, values};

/// A key whose value is not the same in two configs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// Dotted, as in `train.max_train_steps`.
    pub key: String,
    /// As TOML writes it; `None` where the key is absent.
    pub before: Option<String>,
    pub now: Option<String>,
    pub change: Change,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let told = |value: &Option<String>| value.clone().unwrap_or_else(|| "not set".to_owned());
        write!(f, "`{}` was {} and is now {}", self.key, told(&self.before), told(&self.now))
    }
}

impl Config {
    /// The keys whose values differ between this config and a later one, in the order of the schema, those that only one of
    /// them has included, but not those that have no effect in either. `palettize.recipe` is not among them: its layers are
    /// among the overrides.
    pub fn differences(&self, now: &Config) -> Vec<Difference> {
        let (old, new) = (compared(self), compared(now));
        let names = keys::KEYS.iter().map(|key| key.name.to_owned());
        // A key without an entry is treated as those that change what is learned.
        let rest = old.keys().chain(new.keys()).filter(|name| keys::find(name).is_none()).cloned();
        let mut names: Vec<String> = names.chain(rest).collect();
        names.dedup();
        let without_effect = |name: &str| keys::find(name).is_some_and(|key| key.is_idle(self) && key.is_idle(now));
        let differing = names.into_iter().filter(|name| old.get(name) != new.get(name) && !without_effect(name));
        differing
            .map(|name| {
                let change = keys::find(&name).map_or(Change::Refused, |key| key.change);
                let (before, now) = told(old.get(&name), new.get(&name));
                Difference { key: name, before, now, change }
            })
            .collect()
    }
}

/// The values of all keys that are set.
fn compared(config: &Config) -> BTreeMap<String, Value> {
    let mut config = config.clone();
    config.palettize.recipe = None;
    config.palettize.overrides = config.palettize.effective_overrides();
    // A model is known by its content, wherever it lies.
    if let TeacherChoice::Model(model) = &mut config.distill.teacher {
        *model = "a model".to_owned();
    }
    values::leaves(&values::values(&config), "").into_iter().collect()
}

/// Both values as text. Of lists of tables, which are long when they come from a recipe, only what differs.
fn told(before: Option<&Value>, now: Option<&Value>) -> (Option<String>, Option<String>) {
    let tables = |value: Option<&Value>| match value {
        Some(Value::Array(items)) if items.iter().all(Value::is_table) => Some(items.clone()),
        None => Some(Vec::new()),
        _ => None,
    };
    match (tables(before), tables(now)) {
        (Some(before), Some(now)) => {
            let same = before.iter().zip(&now).take_while(|(a, b)| a == b).count();
            let (before, now) = (&before[same..], &now[same..]);
            let ending = before.iter().rev().zip(now.iter().rev()).take_while(|(a, b)| a == b).count();
            let text = |items: &[Value]| match &items[..items.len() - ending] {
                [] => None,
                [one] => Some(one.to_string()),
                [first, rest @ ..] => Some(format!("{first} and {} more", rest.len())),
            };
            (text(before), text(now))
        }
        _ => (before.map(Value::to_string), now.map(Value::to_string)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Dreambooth, Mode, PaletteOverride};

    fn said(old: &Config, new: &Config) -> Vec<String> {
        old.differences(new).iter().map(|difference| format!("{difference} ({:?})", difference.change)).collect()
    }

    #[test]
    fn each_key_that_differs_is_named_with_both_values() {
        let old = Config::default();
        assert_eq!(said(&old, &old), Vec::<String>::new());
        let mut new = old.clone();
        new.train.min_snr_gamma = Some(5.0);
        new.train.max_train_steps = 900;
        new.sample.prompts = vec!["a \"dog\"".into()];
        new.train.mode = Mode::Dreambooth;
        new.data.dreambooth = Some(Dreambooth { instance_data_dir: "dogs".into(), ..Dreambooth::default() });
        let found = said(&old, &new);
        for expected in [
            "`train.max_train_steps` was 800 and is now 900 (Notice)",
            "`train.min_snr_gamma` was not set and is now 5.0 (Refused)",
            "`sample.prompts` was [] and is now ['a \"dog\"'] (Free)",
            "`data.dreambooth.instance_data_dir` was not set and is now \"dogs\" (Free)",
            "`data.dreambooth.prior_loss_weight` was not set and is now 1.0 (Refused)",
        ] {
            assert!(found.iter().any(|line| line == expected), "{expected}: {found:#?}");
        }
        // And the other way round.
        let back = said(&new, &old);
        assert_eq!(back.len(), found.len());
        assert!(back.contains(&"`train.min_snr_gamma` was 5.0 and is now not set (Refused)".to_owned()), "{back:#?}");
    }

    #[test]
    fn keys_without_effect_do_not_differ() {
        let old = Config::default();
        let mut new = old.clone();
        new.train.lr_power = 2.0;
        new.distill.lambda_sd = 0.5;
        assert_eq!(said(&old, &new), Vec::<String>::new());
        new.distill.enabled = true;
        let found = said(&old, &new);
        assert_eq!(
            found,
            [
                "`distill.enabled` was false and is now true (Refused)",
                "`distill.lambda_sd` was 1.0 and is now 0.5 (Refused)"
            ]
        );
    }

    #[test]
    fn of_a_recipe_only_the_layers_that_differ_are_told() {
        let layers = |bits: [u32; 4]| {
            let mut config = Config::default();
            let layer = |(i, bits): (usize, u32)| PaletteOverride {
                pattern: format!("layer.{i}"),
                n_bits: Some(bits),
                skip: false,
            };
            config.palettize.overrides = bits.into_iter().enumerate().map(layer).collect();
            config
        };
        let one = said(&layers([2, 2, 2, 2]), &layers([2, 4, 2, 2]));
        let expected = "`palettize.overrides` was { match = \"layer.1\", n_bits = 2 } and is now { match = \"layer.1\", \
                        n_bits = 4 } (Refused)";
        assert_eq!(one, [expected]);
        let none = said(&Config::default(), &layers([2, 4, 2, 2]));
        assert!(
            none[0]
                .starts_with("`palettize.overrides` was not set and is now { match = \"layer.0\", n_bits = 2 } and 3")
        );
        let mut recipe = layers([2, 2, 2, 2]);
        recipe.palettize.recipe = Some("moved.toml".into());
        assert_eq!(said(&layers([2, 2, 2, 2]), &recipe), Vec::<String>::new());
    }
}
