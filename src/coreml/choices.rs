//! What a package can be made for: the choices of the command line and of `[export]`, one definition for both.

use std::fmt;

use anyhow::{Result, bail};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// The oldest system that a package runs on. It decides the version of the specification, the operation set and
/// how palettes are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
pub enum DeploymentTarget {
    /// iOS 16, macOS 13: palettes of one table and 1, 2, 4, 6, 8 bits, as attributes. The form that loads everywhere.
    #[default]
    #[serde(rename = "iOS16", alias = "macOS13")]
    #[value(name = "iOS16", alias = "macOS13", help = None)]
    Ios16,
    /// iOS 17, macOS 14.
    #[serde(rename = "iOS17", alias = "macOS14")]
    #[value(name = "iOS17", alias = "macOS14", help = None)]
    Ios17,
    /// iOS 18, macOS 15: palettes of every form as inputs, with indices of their own bit width.
    #[serde(rename = "iOS18", alias = "macOS15")]
    #[value(name = "iOS18", alias = "macOS15", help = None)]
    Ios18,
}

/// The names of both systems: those of macOS are aliases, which a derived schema leaves out.
impl schemars::JsonSchema for DeploymentTarget {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "DeploymentTarget".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        let mut names = Vec::new();
        for target in Self::value_variants() {
            names.extend(
                target.to_possible_value().iter().flat_map(|value| value.get_name_and_aliases().map(str::to_owned)),
            );
        }
        schemars::json_schema!({ "type": "string", "enum": names })
    }
}

impl DeploymentTarget {
    /// `specificationVersion` of the model.
    pub fn specification(self) -> i32 {
        match self {
            Self::Ios16 => 7,
            Self::Ios17 => 8,
            Self::Ios18 => 9,
        }
    }

    /// The target of a `specificationVersion`.
    ///
    /// # Errors
    /// When none of them has it.
    pub fn of_specification(version: i32) -> Result<Self> {
        match [Self::Ios16, Self::Ios17, Self::Ios18].into_iter().find(|target| target.specification() == version) {
            Some(target) => Ok(target),
            None => bail!("specificationVersion is {version}: 7, 8 or 9 is what Palettist writes"),
        }
    }

    /// Name of the operation set of its functions.
    pub fn opset(self) -> &'static str {
        match self {
            Self::Ios16 => "CoreML6",
            Self::Ios17 => "CoreML7",
            Self::Ios18 => "CoreML8",
        }
    }
}

impl fmt::Display for DeploymentTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&name(self))
    }
}

/// How a package writes attention.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema, ValueEnum)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
#[value(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum AttentionImplementation {
    /// All heads in one `matmul`: for the GPU.
    #[default]
    #[value(help = None)]
    Original,
    /// A pair of `einsum` for each head: for the Neural Engine.
    #[value(help = None)]
    SplitEinsum,
    /// A pair of `einsum` for each head and for 512 queries at a time: for the Neural Engine, faster on phones and for
    /// large pictures.
    #[serde(rename = "SPLIT_EINSUM_V2")]
    #[value(name = "SPLIT_EINSUM_V2", help = None)]
    SplitEinsumV2,
}

impl fmt::Display for AttentionImplementation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&name(self))
    }
}

/// As the command line and configs have it.
fn name(choice: &impl ValueEnum) -> String {
    choice.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
}
