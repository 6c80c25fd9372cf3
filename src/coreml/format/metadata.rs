//! What a package says about itself: its name, the model that it was made from, its licence. All of it is the model
//! folder's own word; nothing is assumed.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::proto;
use crate::source::Model;

/// What the chunks of one package say among their further entries, and no others: the identifier of that package, which is
/// made of all that it holds.
pub const CUT_FROM: &str = "palettist.cut_from";

/// Which network a package holds, by the name that [`Part`](crate::coreml::components::Part) has, as its further entries say.
pub const COMPONENT: &str = "palettist.component";

/// Which model's weights a package was made beside, as its further entries say: see [`PackageMetadata::id`].
pub const MODEL_ID: &str = "palettist.model_id";

/// Which autoencoder's half a package holds: see [`PackageMetadata::autoencoder_id`].
pub const AUTOENCODER_ID: &str = "palettist.vae_id";

/// Who wrote a package, as its further entries say.
pub const VERSION: &str = "palettist.version";

/// How palettes were made on the way into a package, as its further entries say; no entry where they were those of a
/// checkpoint.
pub const PALETTES: &str = "palettist.palettes";

/// The LoRAs that were merged into the model, as its further entries say.
pub const LORAS: &str = "palettist.loras";

/// What names of packages begin with, as Apple's converter has it.
pub const NAME: &str = "Stable_Diffusion_version_";

/// What a package says about where it comes from.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PackageMetadata {
    /// The model: a hub id (`stabilityai/stable-diffusion-2-1-base`) or any name. Part of the package's name, with
    /// `_` for `/`; also its version.
    pub model: String,
    pub author: String,
    pub license: String,
    /// [`model_id`](crate::source::model_id), the same in all packages of a model; empty where it is not known.
    #[serde(skip)]
    pub id: String,
    /// [`autoencoder_id`](crate::source::autoencoder_id), the same in both halves of an autoencoder; empty where it is not
    /// known.
    #[serde(skip)]
    pub autoencoder_id: String,
    /// Further entries, e.g. how the palettes were made; keys in the form of a domain turned round.
    pub user_defined: BTreeMap<String, String>,
}

impl PackageMetadata {
    /// What the model's folder tells: the licence and the base model of its model card (`README.md`), where it has one;
    /// what `model_index.json` says it was loaded from.
    pub fn of_folder(model: &str, folder: &Path) -> Self {
        let card = fs::read_to_string(folder.join("README.md")).unwrap_or_default();
        let field = |name: &str| front_matter(&card, name).unwrap_or_default();
        let license = [field("license_name"), field("license")].into_iter().find(|text| !text.is_empty());
        let mut license = license.unwrap_or_else(|| "see the model that this package was made from".to_owned());
        if let Some(link) = front_matter(&card, "license_link") {
            license = format!("{license} ({link})");
        }
        let author = match model.split('/').collect::<Vec<_>>()[..] {
            // A hub id, not a path.
            [owner, name] if !owner.is_empty() && !name.is_empty() && !folder.ends_with(model) => {
                format!("see the model card at huggingface.co/{model}")
            }
            _ => "see the model that this package was made from".to_owned(),
        };
        let mut user_defined = BTreeMap::new();
        if let Some(base) =
            front_matter(&card, "base_model").or_else(|| loaded_from(folder)).filter(|base| base != model)
        {
            user_defined.insert("palettist.base_model".to_owned(), base);
        }
        Self { model: model.to_owned(), author, license, user_defined, ..Self::default() }
    }

    /// With the LoRAs that are merged into the model, where there are any.
    pub fn with_loras(mut self, model: &Model) -> Self {
        if let Some(loras) = model.loras_text() {
            self.user_defined.insert(LORAS.to_owned(), loras);
        }
        self
    }

    /// `Stable_Diffusion_version_<model>_<component>.mlpackage`, as Apple's converter has it.
    pub fn package_name(&self, component: &str) -> String {
        format!("{NAME}{}_{component}.mlpackage", self.model.replace(['/', '\\'], "_"))
    }

    /// As it stands in the package of a component; `about` says in a sentence what that is.
    pub(in crate::coreml) fn described(&self, component: &str, about: &str) -> proto::Metadata {
        let mut user_defined = self.user_defined.clone();
        user_defined.insert(VERSION.to_owned(), env!("CARGO_PKG_VERSION").to_owned());
        user_defined.insert(COMPONENT.to_owned(), component.to_owned());
        if !self.id.is_empty() {
            user_defined.insert(MODEL_ID.to_owned(), self.id.clone());
        }
        if !self.autoencoder_id.is_empty() && is_half_of_autoencoder(component) {
            user_defined.insert(AUTOENCODER_ID.to_owned(), self.autoencoder_id.clone());
        }
        proto::Metadata {
            short_description: about.to_owned(),
            version_string: self.model.clone(),
            author: self.author.clone(),
            license: self.license.clone(),
            user_defined,
        }
    }
}

/// Whether a package of this component holds one of the two halves of an autoencoder.
pub fn is_half_of_autoencoder(component: &str) -> bool {
    component.starts_with("vae_")
}

/// The hub id that diffusers noted when it saved the folder; a path of another machine says nothing.
fn loaded_from(folder: &Path) -> Option<String> {
    let index: serde_json::Value = serde_json::from_slice(&fs::read(folder.join("model_index.json")).ok()?).ok()?;
    let name = index.get("_name_or_path")?.as_str()?;
    let plain = |part: &str| !part.is_empty() && part != "." && part != "..";
    let (owner, model) = name.split_once('/')?;
    (plain(owner) && plain(model) && !model.contains(['/', '\\'])).then(|| name.to_owned())
}

/// A field of a model card's YAML front matter, where it is a plain scalar.
fn front_matter(card: &str, field: &str) -> Option<String> {
    let header = card.strip_prefix("---")?.split("\n---").next()?;
    let value = header.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))?;
    let value = value.trim().trim_matches(['"', '\'']);
    (!value.is_empty()).then(|| value.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_card_gives_its_licence() {
        let folder = tempfile::tempdir().unwrap();
        let read = |card: &str| {
            fs::write(folder.path().join("README.md"), card).unwrap();
            PackageMetadata::of_folder("a/b", folder.path())
        };
        let metadata = read("---\ntags:\n- art\nlicense: openrail++\n---\n# Card\nlicense: none\n");
        assert_eq!((metadata.license.as_str(), metadata.author.contains("huggingface.co/a/b")), ("openrail++", true));
        assert_eq!(metadata.package_name("unet"), "Stable_Diffusion_version_a_b_unet.mlpackage");
        let metadata = read("---\nlicense: other\nlicense_name: ours\nlicense_link: https://x.org/l\n---\n");
        assert_eq!(metadata.license, "ours (https://x.org/l)");
        assert!(read("license: in the text\n").license.starts_with("see the model"));

        let base = |metadata: PackageMetadata| metadata.user_defined.get("palettist.base_model").cloned();
        assert_eq!(base(read("no front matter")), None);
        for (path, expected) in
            [("runwayml/sd", Some("runwayml/sd")), ("/home/x/sd", None), ("./sd", None), ("a/b", None)]
        {
            let index = serde_json::json!({ "_name_or_path": path }).to_string();
            fs::write(folder.path().join("model_index.json"), index).unwrap();
            assert_eq!(base(read("no front matter")).as_deref(), expected, "{path}");
        }
        assert_eq!(base(read("---\nbase_model: c/d\n---\n")).as_deref(), Some("c/d"));
    }
}
