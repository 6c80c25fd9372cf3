//! `metadata.json`: what callers see and what the program is made of, for tools and apps. Some apps decode what stands in
//! `inputSchema` as dictionaries of texts, so every value there is one.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use anyhow::{Context, Result};
use serde_json::{Map, Value, json};

use super::source::Source;
use super::text::opset;
use super::unsupported::unsupported;
use super::values::{tensor_type, title};
use super::versions::counted_as;
use crate::coreml::format::proto::{
    ArrayFeatureType, BindingKind, DimensionKind, FeatureDescription, FeatureKind, Function, ImageFeatureType,
    Operation, TensorType, Value as Stored, ValueKind, data_type,
};

/// The content of `metadata.json` for the package of this name.
pub fn metadata(source: &Source, name: &str) -> Result<Value> {
    let (inputs, outputs) = source.default_features()?;
    let function =
        source.program.functions.get(source.default_function()).context("the default function is missing")?;
    let about = source.described.metadata.clone().unwrap_or_default();
    let mut all = json!({
        "metadataOutputVersion": "3.0",
        "method": "predict",
        "modelType": { "name": "MLModelType_mlProgram" },
        "modelParameters": [],
        "isUpdatable": "0",
        "specificationVersion": source.specification_version,
        "availability": availability(source.specification_version),
        "generatedClassName": class_name(name),
        "userDefinedMetadata": about.user_defined,
    });
    let Value::Object(map) = &mut all else { return Ok(all) };
    map.extend(of_function(function, inputs, outputs)?);
    map.extend(storage_precision(source)?.map(|precision| ("storagePrecision".to_owned(), precision.into())));
    let texts = [
        ("shortDescription", about.short_description),
        ("version", about.version_string),
        ("author", about.author),
        ("license", about.license),
    ];
    map.extend(texts.into_iter().filter(|(_, text)| !text.is_empty()).map(|(key, text)| (key.to_owned(), text.into())));
    let described = &source.described;
    if !described.functions.is_empty() {
        let functions = described.functions.iter().map(|function| {
            let program = source.program.functions.get(&function.name).context("a function is missing")?;
            let mut map = of_function(program, &function.input, &function.output)?;
            map.insert("name".to_owned(), function.name.clone().into());
            Ok(Value::Object(map))
        });
        map.insert("functions".to_owned(), Value::Array(functions.collect::<Result<_>>()?));
        map.insert("defaultFunctionName".to_owned(), described.default_function.clone().into());
    }
    Ok(Value::Array(vec![all]))
}

/// What is said of each function, and of the one that is called where none is named.
fn of_function(
    function: &Function,
    inputs: &[FeatureDescription],
    outputs: &[FeatureDescription],
) -> Result<Map<String, Value>> {
    let schema = |features: &[FeatureDescription]| features.iter().map(schema).collect::<Result<Vec<Value>>>();
    let mut map = Map::new();
    map.insert("inputSchema".to_owned(), schema(inputs)?.into());
    map.insert("outputSchema".to_owned(), schema(outputs)?.into());
    map.insert("stateSchema".to_owned(), json!([]));
    map.insert("mlProgramOperationTypeHistogram".to_owned(), json!(histogram(function)?));
    map.extend(compute_precision(function)?.map(|precision| ("computePrecision".to_owned(), precision.into())));
    Ok(map)
}

/// The first system of each kind that runs a model of this specification version.
fn availability(specification_version: i32) -> Value {
    let [mac, ios, watch, vision] = match specification_version {
        6 => ["12.0", "15.0", "8.0", "1.0"],
        7 => ["13.0", "16.0", "9.0", "1.0"],
        8 => ["14.0", "17.0", "10.0", "1.0"],
        _ => ["15.0", "18.0", "11.0", "2.0"],
    };
    json!({ "macOS": mac, "iOS": ios, "tvOS": ios, "macCatalyst": ios, "watchOS": watch, "visionOS": vision })
}

/// A name that a class of Swift's can have.
fn class_name(name: &str) -> String {
    let letter = |c: char| if c.is_ascii_alphanumeric() || c == '_' { c } else { '_' };
    let name: String = name.chars().map(letter).collect();
    if name.starts_with(|first: char| first.is_ascii_digit()) { format!("_{name}") } else { name }
}

/// What is said of one input or output.
fn schema(feature: &FeatureDescription) -> Result<Value> {
    let kind = feature.r#type.as_ref().context("an input or output has no type")?;
    let mut schema = match kind.kind.as_ref().context("an input or output has no type")? {
        FeatureKind::MultiArray(array) => of_array(array)?,
        FeatureKind::Image(image) => of_image(image)?,
    };
    let about = [
        ("name", feature.name.as_str()),
        ("shortDescription", &feature.short_description),
        ("isOptional", if kind.is_optional { "1" } else { "0" }),
    ];
    schema.extend(about.map(|(key, value)| (key.to_owned(), value.to_owned())));
    Ok(json!(schema))
}

fn of_array(array: &ArrayFeatureType) -> Result<BTreeMap<String, String>> {
    let data_type = match array.data_type {
        65_552 => "Float16",
        65_568 => "Float32",
        65_600 => "Double",
        131_080 => "Int8",
        131_104 => "Int32",
        other => unsupported(&format!("an input or output is an array of the type {other}"))?,
    };
    let sizes: Vec<String> = array.shape.iter().map(i64::to_string).collect();
    let formatted = if sizes.is_empty() { String::new() } else { format!(" {}", sizes.join(" × ")) };
    let pairs = [
        ("type", "MultiArray".to_owned()),
        ("dataType", data_type.to_owned()),
        ("shape", format!("[{}]", sizes.join(", "))),
        ("formattedType", format!("MultiArray ({data_type}{formatted})")),
        ("hasShapeFlexibility", "0".to_owned()),
    ];
    Ok(pairs.map(|(key, value)| (key.to_owned(), value)).into())
}

fn of_image(image: &ImageFeatureType) -> Result<BTreeMap<String, String>> {
    let (space, formatted, is_color) = match image.color_space {
        10 => ("Grayscale", "Grayscale", "0"),
        20 => ("RGB", "Color", "1"),
        30 => ("BGR", "Color", "1"),
        40 => ("Grayscale16Half", "Grayscale16Half", "0"),
        other => unsupported(&format!("an input or output is an image of the colour space {other}"))?,
    };
    let pairs = [
        ("type", "Image".to_owned()),
        ("colorspace", space.to_owned()),
        ("isColor", is_color.to_owned()),
        ("width", image.width.to_string()),
        ("height", image.height.to_string()),
        ("formattedType", format!("Image ({formatted} {} × {})", image.width, image.height)),
        ("hasSizeFlexibility", "0".to_owned()),
    ];
    Ok(pairs.map(|(key, value)| (key.to_owned(), value)).into())
}

fn operations(function: &Function) -> impl Iterator<Item = &Operation> {
    function.block_specializations.get(&function.opset).into_iter().flat_map(|block| &block.operations)
}

/// How many operations of each kind there are, constants left out.
fn histogram(function: &Function) -> Result<BTreeMap<String, usize>> {
    let opset = opset(function)?;
    let mut counts = BTreeMap::new();
    for operation in operations(function).filter(|operation| operation.r#type != "const") {
        *counts.entry(counted_as(&operation.r#type, opset)).or_default() += 1;
    }
    Ok(counts)
}

/// The values that are written in an operation's arguments.
fn in_place(operation: &Operation) -> impl Iterator<Item = &Stored> {
    let bindings = operation.inputs.values().flat_map(|argument| &argument.arguments);
    bindings.filter_map(|binding| match &binding.binding {
        Some(BindingKind::Value(value)) => Some(value),
        _ => None,
    })
}

/// The types that operations compute in: of what they take and of what they give, but for those that decode weights.
fn compute_precision(function: &Function) -> Result<Option<String>> {
    let mut kinds: HashMap<&str, i32> = HashMap::new();
    for input in &function.inputs {
        kinds.insert(&input.name, tensor_type(input.r#type.as_ref())?.data_type);
    }
    let mut found = BTreeSet::new();
    for operation in operations(function) {
        let computes = !operation.r#type.starts_with("constexpr_");
        for output in &operation.outputs {
            let kind = tensor_type(output.r#type.as_ref())?.data_type;
            kinds.insert(&output.name, kind);
            found.extend(computes.then_some(kind));
        }
        if !computes {
            continue;
        }
        for value in in_place(operation) {
            found.insert(tensor_type(value.r#type.as_ref())?.data_type);
        }
        for binding in operation.inputs.values().flat_map(|argument| &argument.arguments) {
            if let Some(BindingKind::Name(name)) = &binding.binding {
                found.extend(kinds.get(name.as_str()));
            }
        }
    }
    found.retain(|kind| ![data_type::BOOL, data_type::STRING].contains(kind));
    Ok(mixed(found.into_iter().map(|kind| title(kind).map(str::to_owned)).collect::<Result<_>>()?))
}

/// The types that weights are stored in.
fn storage_precision(source: &Source) -> Result<Option<String>> {
    let mut found = BTreeSet::new();
    for operation in source.program.functions.values().flat_map(operations) {
        let attributes = operation.attributes.iter().map(|(name, value)| (name.as_str(), value));
        let inputs = operation.inputs.iter().flat_map(|(name, argument)| {
            argument.arguments.iter().filter_map(move |binding| match &binding.binding {
                Some(BindingKind::Value(value)) => Some((name.as_str(), value)),
                _ => None,
            })
        });
        for (name, value) in attributes.chain(inputs) {
            let kind = tensor_type(value.r#type.as_ref())?;
            // As attributes, before iOS 18, bytes stand for indices and masks of fewer bits, of which the next words tell.
            let is_packed = matches!(name, "indices" | "mask") && operation.attributes.contains_key(name);
            if is_packed && operation.r#type.starts_with("constexpr_") {
                continue;
            }
            if matches!(value.kind, Some(ValueKind::BlobFile(_))) {
                found.insert(title(kind.data_type)?.to_owned());
            }
        }
        match operation.r#type.as_str() {
            "constexpr_sparse_to_dense" => drop(found.insert("Sparse".to_owned())),
            "constexpr_lut_to_dense" => {
                let lut = operation.attributes.get("lut").or_else(|| in_argument(operation, "lut"));
                let lut = lut.map(|lut| tensor_type(lut.r#type.as_ref())).transpose()?;
                let entries = lut.map(entries).transpose()?.filter(|entries| *entries > 0);
                found.extend(entries.map(|entries| format!("Palettized ({} bits)", entries.ilog2())));
            }
            _ => {}
        }
    }
    Ok(mixed(found))
}

fn in_argument<'a>(operation: &'a Operation, name: &str) -> Option<&'a Stored> {
    match operation.inputs.get(name)?.arguments.first()?.binding.as_ref()? {
        BindingKind::Value(value) => Some(value),
        BindingKind::Name(_) => None,
    }
}

/// How many entries all palettes of a table have together.
fn entries(lut: &TensorType) -> Result<u64> {
    let mut entries = 1u64;
    for dimension in &lut.dimensions {
        let Some(DimensionKind::Constant(constant)) = &dimension.dimension else { return Ok(0) };
        entries = entries.checked_mul(constant.size).context("a palette has too many entries")?;
    }
    Ok(entries)
}

/// `Mixed (Float16, Int32)`; of one, itself.
fn mixed(found: BTreeSet<String>) -> Option<String> {
    let names: Vec<String> = found.into_iter().collect();
    match &names[..] {
        [] => None,
        [one] => Some(one.clone()),
        _ => Some(format!("Mixed ({})", names.join(", "))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_have_names_that_swift_takes() {
        assert_eq!(
            class_name("Stable_Diffusion_version_some-one's v1.5_unet"),
            "Stable_Diffusion_version_some_one_s_v1_5_unet"
        );
        assert_eq!(class_name("2bit"), "_2bit");
    }
}
