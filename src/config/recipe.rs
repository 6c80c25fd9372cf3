//! A recipe: how many bits each layer has. `palettist analyze` writes it, users edit it.
//!
//! ```toml
//! recipe_version = 1
//!
//! [layers]
//! "conv_in.weight" = 8
//! "mid_block.resnets.0.conv1.weight" = 2
//! "time_embedding.linear_1.weight" = 16   # stays fp16, as does every layer that is not named
//! ```
//!
//! Read as strictly as a config: every mistake at once, each with its line. Names without quotes are names too: TOML reads
//! them as tables within tables.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;

use toml::de::{DeTable, DeValue};

use super::syntax::{self, place};
use super::unknown::nearest;
use super::{Error, PaletteOverride, Problem};
use crate::ops::Parameter;
use crate::palette::BITS;

/// What a recipe calls the bits of a layer that has no palette.
const DENSE: u32 = 16;

/// A layer of a recipe.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecipeLayer {
    /// The diffusers name of its weight.
    pub name: String,
    /// `None`: it stays fp16.
    pub bits: Option<u32>,
    /// `FILE:LINE:COLUMN`
    pub place: String,
}

/// The layers of a recipe, in the order of the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recipe {
    pub layers: Vec<RecipeLayer>,
}

impl Recipe {
    /// Reads the recipe at `path`.
    ///
    /// # Errors
    /// [`Error`] with every mistake found.
    pub fn read(path: &Path) -> Result<Self, Error> {
        let shown = path.display().to_string();
        match syntax::read_text(path) {
            Ok(text) => Self::parse(&text, &shown),
            Err(message) => {
                Err(Error { problems: vec![Problem { place: shown, message: format!("the recipe {message}") }] })
            }
        }
    }

    /// [`Recipe::read`] from a text; `file` is its name in messages.
    ///
    /// # Errors
    /// As [`Recipe::read`].
    pub fn parse(text: &str, file: &str) -> Result<Self, Error> {
        let mut reader = Reader { text, file, layers: Vec::new(), problems: Vec::new() };
        let (table, errors) = DeTable::parse_recoverable(text);
        if errors.is_empty() {
            reader.top(table.get_ref());
        }
        reader.problems.extend(syntax::problems(text, file, &errors).0);
        if reader.problems.is_empty() {
            Ok(Self { layers: reader.layers })
        } else {
            Err(Error { problems: reader.problems })
        }
    }

    /// Bits of the layers that become palettes.
    pub fn bits(&self) -> BTreeMap<String, u32> {
        self.layers.iter().filter_map(|layer| Some((layer.name.clone(), layer.bits?))).collect()
    }

    /// What says the same in `[palettize]`: nothing becomes a palette but what is named.
    pub fn overrides(&self) -> Vec<PaletteOverride> {
        let everything = PaletteOverride { pattern: "*".into(), n_bits: None, skip: true };
        let named = self.layers.iter().map(|layer| PaletteOverride {
            pattern: layer.name.clone(),
            n_bits: layer.bits,
            skip: layer.bits.is_none(),
        });
        std::iter::once(everything).chain(named).collect()
    }

    /// Refuses a recipe with layers that a network of these parameters does not have.
    ///
    /// # Errors
    /// [`Error`] with every one, and the nearest that there is.
    pub fn check(&self, parameters: &[Parameter]) -> Result<(), Error> {
        let known = || parameters.iter().filter(|p| p.palettizable).map(|p| p.name.as_str());
        let strange = self.layers.iter().filter(|layer| known().all(|name| name != layer.name));
        let problems: Vec<Problem> = strange
            .map(|layer| {
                let hint = nearest(&layer.name, known());
                let message =
                    format!("`{}` is not the weight of a convolution or linear layer of this UNet{hint}", layer.name);
                Problem { place: layer.place.clone(), message }
            })
            .collect();
        if problems.is_empty() { Ok(()) } else { Err(Error { problems }) }
    }
}

/// The text of a recipe. `header` are lines that become comments; each layer is (name, bits or `None` for fp16, remark).
pub fn recipe_text(header: &[String], layers: &[(String, Option<u32>, String)]) -> String {
    let mut text = String::new();
    for line in header {
        // No line break of a name or path ends the comment.
        let line: String = line.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
        text += format!("# {line}").trim_end();
        text.push('\n');
    }
    text += "recipe_version = 1\n\n[layers]\n";
    for (name, bits, remark) in layers {
        let name = toml::Value::String(name.clone());
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{name} = {:<2} # {remark}", bits.unwrap_or(DENSE));
    }
    text
}

struct Reader<'a> {
    text: &'a str,
    file: &'a str,
    layers: Vec<RecipeLayer>,
    problems: Vec<Problem>,
}

impl Reader<'_> {
    fn place(&self, span: Option<std::ops::Range<usize>>) -> String {
        place(self.text, self.file, span)
    }

    fn problem(&mut self, place: String, message: String) {
        self.problems.push(Problem { place, message });
    }

    fn top(&mut self, table: &DeTable) {
        let mut version = false;
        for (key, value) in in_order(table) {
            let place = self.place(Some(key.span()));
            match (key.get_ref().as_ref(), value.get_ref()) {
                ("recipe_version", DeValue::Integer(number)) if number.as_str() == "1" => version = true,
                ("recipe_version", _) => {
                    version = true;
                    self.problem(
                        place,
                        "`recipe_version` must be 1, which is what this version of Palettist reads".into(),
                    );
                }
                ("layers", DeValue::Table(layers)) => self.layers(&mut String::new(), layers),
                ("layers", _) => self.problem(place, "`layers` must be a table, [layers], of names and bits".into()),
                (name, DeValue::Integer(_)) if name.contains('.') => {
                    self.problem(place, format!("`{name}` must stand under [layers]"));
                }
                (name, _) => {
                    let hint = nearest(name, ["recipe_version", "layers"].into_iter());
                    self.problem(place, format!("unknown key `{name}`{hint}"));
                }
            }
        }
        if !version {
            self.problem(self.file.to_string(), "`recipe_version = 1` is missing: is it a recipe?".into());
        }
        if self.layers.is_empty() && self.problems.is_empty() {
            self.problem(self.file.to_string(), "[layers] names no layer: name = bits".into());
        }
    }

    /// Notes the layers of one table, whose names begin with `prefix`.
    fn layers(&mut self, prefix: &mut String, table: &DeTable) {
        for (key, value) in in_order(table) {
            let length = prefix.len();
            if length > 0 {
                prefix.push('.');
            }
            prefix.push_str(key.get_ref());
            let place = self.place(Some(key.span()));
            match value.get_ref() {
                DeValue::Table(inner) => self.layers(prefix, inner),
                DeValue::Integer(number) => {
                    let bits = number.as_str().parse().ok().filter(|bits| *bits == DENSE || BITS.contains(bits));
                    match bits {
                        None => {
                            let message = format!(
                                "`{prefix}` has {number} bits, but a palette has 1, 2, 3, 4, 6 or 8 (16: fp16)"
                            );
                            self.problem(place, message);
                        }
                        Some(_) if self.layers.iter().any(|layer| layer.name == *prefix) => {
                            self.problem(place, format!("`{prefix}` is there twice"));
                        }
                        Some(bits) => {
                            let bits = Some(bits).filter(|&bits| bits != DENSE);
                            self.layers.push(RecipeLayer { name: prefix.clone(), bits, place });
                        }
                    }
                }
                _ => self.problem(place, format!("`{prefix}` must be a whole number: its bits")),
            }
            prefix.truncate(length);
        }
    }
}

/// Keys and values as they stand in the file.
fn in_order<'t, 'd>(
    table: &'t DeTable<'d>,
) -> Vec<(&'t toml::Spanned<std::borrow::Cow<'d, str>>, &'t toml::Spanned<DeValue<'d>>)> {
    let mut entries: Vec<_> = table.iter().collect();
    entries.sort_by_key(|(key, _)| key.span().start);
    entries
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problems(text: &str) -> Vec<String> {
        let error = Recipe::parse(text, "mixed.toml").expect_err("the recipe is wrong");
        error.problems.iter().map(|p| format!("{}: {}", p.place, p.message)).collect()
    }

    #[test]
    fn what_is_written_reads_back() {
        let layers = [
            ("conv_in.weight".to_string(), Some(8), "864 weights".to_string()),
            ("time_embedding.linear_1.weight".to_string(), None, String::new()),
            ("odd \"name\"".to_string(), Some(1), "a\tb".to_string()),
        ];
        let text = recipe_text(&["made by\nhand = 3".to_string()], &layers);
        let recipe = Recipe::parse(&text, "mixed.toml").unwrap();
        let read: Vec<_> = recipe.layers.iter().map(|layer| (layer.name.clone(), layer.bits)).collect();
        assert_eq!(read, layers.map(|(name, bits, _)| (name, bits)));
        assert_eq!(recipe.layers[0].place, "mixed.toml:5:1");
        assert_eq!(recipe.bits().len(), 2);
    }

    #[test]
    fn names_without_quotes_are_names_too() {
        let text = "recipe_version = 1\n[layers]\ndown.0.conv.weight = 2\n[layers.up]\n0.conv.weight = 16\n";
        let recipe = Recipe::parse(text, "mixed.toml").unwrap();
        let read: Vec<_> = recipe.layers.iter().map(|layer| (layer.name.as_str(), layer.bits)).collect();
        assert_eq!(read, [("down.0.conv.weight", Some(2)), ("up.0.conv.weight", None)]);
    }

    #[test]
    fn every_mistake_is_told_with_its_line() {
        let text = "recipe_version = 2\nlayer = 3\n\"a.weight\" = 4\n[layers]\n\"b.weight\" = 5\n\"c.weight\" = \"2\"\n\
                    \"d.weight\" = 2\nd.weight = 4\n\"e.weight\" = 99999999999999999999\n\"f.weight\" = -1\n";
        assert_eq!(
            problems(text),
            [
                "mixed.toml:1:1: `recipe_version` must be 1, which is what this version of Palettist reads",
                "mixed.toml:2:1: unknown key `layer`; did you mean `layers`?",
                "mixed.toml:3:1: `a.weight` must stand under [layers]",
                "mixed.toml:5:1: `b.weight` has 5 bits, but a palette has 1, 2, 3, 4, 6 or 8 (16: fp16)",
                "mixed.toml:6:1: `c.weight` must be a whole number: its bits",
                "mixed.toml:8:3: `d.weight` is there twice",
                "mixed.toml:9:1: `e.weight` has 99999999999999999999 bits, but a palette has 1, 2, 3, 4, 6 or 8 \
                 (16: fp16)",
                "mixed.toml:10:1: `f.weight` has -1 bits, but a palette has 1, 2, 3, 4, 6 or 8 (16: fp16)",
            ]
        );
    }

    #[test]
    fn what_is_no_recipe_is_refused() {
        for (text, expected) in [
            ("", "mixed.toml: `recipe_version = 1` is missing: is it a recipe?"),
            ("recipe_version = 1", "mixed.toml: [layers] names no layer: name = bits"),
            ("recipe_version = 1\nlayers = 4", "mixed.toml:2:1: `layers` must be a table, [layers], of names and bits"),
            (
                "recipe_version = 1\n[layers]\n\"a\" = 1\n\"a\" = 2",
                "mixed.toml:4:1: is not TOML here: duplicate key `\"a\"`: it is written twice",
            ),
        ] {
            assert_eq!(problems(text)[0], expected, "{text}");
        }
        let deep = format!("recipe_version = 1\n[layers]\n{} = 1", ["a"; 5000].join("."));
        assert!(Recipe::parse(&deep, "mixed.toml").is_err());
    }

    #[test]
    fn a_layer_that_the_model_lacks_brings_the_nearest_to_mind() {
        let recipe =
            Recipe::parse("recipe_version = 1\n[layers]\nconv_out.weight = 4\nconv_inn.weight = 2", "r").unwrap();
        let parameter = |name: &str, palettizable| Parameter {
            name: name.into(),
            shape: vec![2, 2],
            palettizable,
            initial: crate::ops::Initial::Constant(0.0),
        };
        let parameters = ["conv_in.weight", "conv_out.weight"].map(|name| parameter(name, true));
        let error = recipe.check(&parameters).unwrap_err();
        let expected = "r:4:10: `conv_inn.weight` is not the weight of a convolution or linear layer of this UNet; did you mean \
                        `conv_in.weight`?";
        assert_eq!(error.to_string(), expected);
        assert!(recipe.check(&[parameter("conv_inn.weight", false)]).is_err());
    }
}
