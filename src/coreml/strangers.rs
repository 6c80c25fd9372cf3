//! Packages in a folder that do not go with those that are to be written there: an app takes all of them for one model.

use std::fs;
use std::path::{Path, PathBuf};

use prost::Message;

use crate::coreml::bundle::{COMPILED, SAFETY_CHECKER};
use crate::coreml::components::Part;
use crate::coreml::format::metadata::{AUTOENCODER_ID, MODEL_ID, NAME, PackageMetadata, is_half_of_autoencoder};
use crate::coreml::format::proto;

/// A package in `folder` that is of another model than the one that `metadata` names, which has `parts`: a bundle holds one
/// model. Of two models of one name, that is known by what the other has more.
pub fn of_another_model(folder: &Path, metadata: &PackageMetadata, parts: &[Part]) -> Option<PathBuf> {
    let all: Vec<&str> = COMPILED.iter().chain([&SAFETY_CHECKER]).map(|(component, _)| *component).collect();
    let has = |component: &&&str| component.contains("unet") || parts.iter().any(|part| part.name() == **component);
    let own: Vec<String> = all.iter().filter(has).map(|component| metadata.package_name(component)).collect();
    let entries = fs::read_dir(folder).ok()?.flatten().map(|entry| entry.path());
    entries.into_iter().find(|path| {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let package =
            name.starts_with(NAME) && all.iter().any(|component| name.ends_with(&format!("_{component}.mlpackage")));
        package && !own.iter().any(|own| own == name)
    })
}

/// A package in `folder`, or a compiled one of its bundle, that was made beside other weights than those of the model that
/// `metadata` is of, though it has the model's name; those at `replaced` aside. A package that does not say what it
/// was made of is passed over; so is, with `overwrite`, a compiled one whose package is there, from which it is compiled again.
pub fn of_other_weights(
    folder: &Path,
    metadata: &PackageMetadata,
    replaced: &[PathBuf],
    overwrite: bool,
) -> Option<PathBuf> {
    let place = |component: &str| folder.join(metadata.package_name(component));
    // The halves of an autoencoder must be one's; a model may be given another autoencoder than its own.
    let writes_half = replaced.iter().any(|path| {
        COMPILED.iter().any(|(component, _)| is_half_of_autoencoder(component) && *path == place(component))
    });
    let is_other = |component: &str, ids: Ids| {
        let differs = |theirs: Option<String>, own: &str| theirs.is_some_and(|id| !own.is_empty() && id != own);
        differs(ids.model, &metadata.id)
            || writes_half && differs(ids.autoencoder, &metadata.autoencoder_id) && is_half_of_autoencoder(component)
    };
    COMPILED.iter().chain([&SAFETY_CHECKER]).find_map(|(component, compiled)| {
        let package = place(component);
        if replaced.contains(&package) {
            return None;
        }
        let compiled = folder.join("Resources").join(format!("{compiled}.mlmodelc"));
        let is_replaced = overwrite && package.is_dir();
        let of_package = is_other(component, Ids::of(&package)).then_some(package);
        of_package.or_else(|| (!is_replaced && is_other(component, Ids::of_compiled(&compiled))).then_some(compiled))
    })
}

/// What a package says of the weights that it was made of and beside.
#[derive(Default)]
struct Ids {
    model: Option<String>,
    autoencoder: Option<String>,
}

impl Ids {
    /// Of a package.
    fn of(package: &Path) -> Self {
        let read = || {
            let model = fs::read(package.join("Data/com.apple.CoreML/model.mlmodel")).ok()?;
            let mut said = proto::Model::decode(&model[..]).ok()?.description?.metadata?.user_defined;
            Some(Self { model: said.remove(MODEL_ID), autoencoder: said.remove(AUTOENCODER_ID) })
        };
        read().unwrap_or_default()
    }

    /// Of a compiled one: what packages say is in a file of its own there.
    fn of_compiled(compiled: &Path) -> Self {
        let read = || {
            let json: serde_json::Value =
                serde_json::from_slice(&fs::read(compiled.join("metadata.json")).ok()?).ok()?;
            let said = json.get(0)?.get("userDefinedMetadata")?;
            let text = |key: &str| said.get(key)?.as_str().map(str::to_owned);
            Some(Self { model: text(MODEL_ID), autoencoder: text(AUTOENCODER_ID) })
        };
        read().unwrap_or_default()
    }
}
