//! `metadata.json` of a compiled model, as far as apps rely on it: it must say of inputs, outputs and attention what the model
//! has.

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::coreml::format::proto::{FeatureDescription, FeatureKind, ModelDescription, Program};

/// Compares the file with what the other two say.
pub fn check(json: &[u8], specification_version: i32, description: &ModelDescription, program: &Program) -> Result<()> {
    let value: Value = serde_json::from_slice(json)
        .map_err(|error| anyhow::anyhow!("it is not valid JSON at line {}, column {}", error.line(), error.column()))?;
    let Some([about]) = value.as_array().map(Vec::as_slice) else { bail!("it is not a list of one model") };
    let version = about.get("specificationVersion").and_then(Value::as_i64);
    ensure!(
        version == Some(specification_version.into()),
        "specificationVersion is not {specification_version}, that of coremldata.bin"
    );
    // What several functions take is not told by the description that packages of one function have.
    if !description.input.is_empty() {
        schema(about, "inputSchema", &description.input)?;
        schema(about, "outputSchema", &description.output)?;
    }
    let histogram = about.get("mlProgramOperationTypeHistogram").and_then(Value::as_object);
    let histogram = histogram.context("mlProgramOperationTypeHistogram is missing")?;
    // What other functions compute is not read.
    let Some(main) = program.functions.get("main") else { return Ok(()) };
    let operations = main.block_specializations.values().flat_map(|block| &block.operations);
    let einsums = operations.filter(|operation| operation.r#type == "einsum").count();
    // Apps know attention for the Neural Engine by this key.
    let counted = ["Ios16.einsum", "Einsum"].iter().find_map(|key| histogram.get(*key)?.as_u64()).unwrap_or(0);
    ensure!(
        counted == einsums as u64 || program.functions.len() > 1,
        "mlProgramOperationTypeHistogram counts {counted} einsum, the program has {einsums}"
    );
    Ok(())
}

fn schema(about: &Value, key: &str, described: &[FeatureDescription]) -> Result<()> {
    let Some(Value::Array(listed)) = about.get(key) else { bail!("{key} is missing") };
    ensure!(listed.len() == described.len(), "{key} has {} entries, there are {}", listed.len(), described.len());
    for (entry, feature) in listed.iter().zip(described) {
        let Some(entry) = entry.as_object() else { bail!("{key} holds something other than dictionaries") };
        // Apps decode them as dictionaries of texts.
        if let Some((name, _)) = entry.iter().find(|(_, value)| !value.is_string()) {
            bail!("{key}: {name:.40} is not a text");
        }
        let text = |name: &str| entry.get(name).and_then(Value::as_str);
        ensure!(text("name") == Some(&feature.name), "{key}: an entry is not that of {:.80}", feature.name);
        let kind = feature.r#type.as_ref().and_then(|kind| kind.kind.as_ref());
        let same = match kind {
            Some(FeatureKind::MultiArray(array)) => text("shape") == Some(&format!("{:?}", array.shape)),
            Some(FeatureKind::Image(image)) => {
                text("width") == Some(&image.width.to_string()) && text("height") == Some(&image.height.to_string())
            }
            None => true,
        };
        ensure!(same, "{key}: the shape of {:.80} differs from that of coremldata.bin", feature.name);
    }
    Ok(())
}
