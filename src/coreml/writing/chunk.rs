//! Cuts a package in two that run one after the other, each with half of the bytes: phones refuse, or load slowly, a
//! UNet that is one large file.
//!
//! The cut is a place in the order of the operations. What is computed before it and needed behind it becomes an output
//! of the first chunk and an input of the second of the same name, in fp32 as Apple's programs expect; inputs of the
//! whole stay inputs of the chunks that use them. Palettes, tables and metadata are carried over as they are, so the
//! chunks one after the other compute exactly what the whole does. Weights are copied one at a time.
//!
//! Of all places whose larger half is at most a hundredth larger than need be, the cut is at the one where the least is
//! handed over.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use prost::Message;

use super::interface::feature;
use super::program::{Parameter, ProgramBuilder, Var};
use crate::coreml::DeploymentTarget;
use crate::coreml::format::blob::{BlobType, BlobWriter};
use crate::coreml::format::metadata::CUT_FROM;
pub use crate::coreml::format::package::chunk_paths;
use crate::coreml::format::package::write_package;
use crate::coreml::format::place::{Aside, recover, replaces};
use crate::coreml::format::proto::data_type::{FLOAT16, FLOAT32};
use crate::coreml::format::proto::{
    self, BindingKind, DimensionKind, Model, NamedValueType, Operation, Value, ValueKind, ValueTypeKind, array_type,
};
use crate::files::at_place;
use crate::files::beside::{WHOLE, beside, hold, missing_folders, remove_empty, remove_leftovers};

/// How much larger than the best the larger half may be, where that makes the border smaller.
const TOLERANCE: f64 = 1.01;

/// Cuts `package` into the chunks of `whole`, which is its place or where it would be, and returns their paths. A package
/// at `whole` goes when they are there, since programs take one form of a UNet and apps should not hold two.
///
/// # Errors
/// Those of [`export_in_chunks`].
pub fn cut_package(package: &Path, whole: &Path, overwrite: bool) -> Result<[PathBuf; 2]> {
    let paths = chunk_paths(whole);
    [whole, &paths[0], &paths[1]].into_iter().try_for_each(|path| replaces(path, overwrite).map(drop))?;
    let place = || format!("cannot cut {}", package.display());
    let data = package.join("Data").join("com.apple.CoreML");
    let bytes = fs::read(data.join("model.mlmodel")).with_context(place)?;
    let mut model = Model::decode(&bytes[..]).with_context(place)?;
    drop(bytes);
    let manifest = fs::read(package.join("Manifest.json")).with_context(place)?;
    let manifest: serde_json::Value = serde_json::from_slice(&manifest).with_context(place)?;
    let identifier = manifest["rootModelIdentifier"].as_str().with_context(place)?;
    let metadata = model.description.get_or_insert_default().metadata.get_or_insert_default();
    metadata.user_defined.insert(CUT_FROM.to_owned(), identifier.to_owned());
    let mut weights = WeightFile::open(&data.join("weights").join("weight.bin")).with_context(place)?;
    let cut = Cut::of(&model, &mut weights).with_context(place)?;
    // Both lie ready before the first is put in its place.
    let aside = Aside::of(whole)?;
    for (chunk, path) in paths.iter().enumerate() {
        write_package(&aside.place_of(path), false, |file| cut.chunk(&model, chunk, &mut weights, file))
            .map_err(|error| at_place(error, path))?;
    }
    // Another export may have written one meanwhile.
    aside.put_in_place(&paths, &[whole.to_owned()], overwrite)?;
    Ok(paths)
}

/// Writes a package with `export`, which is given a folder, and leaves only its chunks, beside `whole`, where it would be
/// itself: `…_chunk1.mlpackage` and `…_chunk2.mlpackage`, whose paths it returns. With `overwrite` they replace chunks, and
/// a package at `whole`. Needs room on disk for the package twice.
///
/// # Errors
/// What `export` returns; when one of these places is taken and is not to be overwritten, when the package is none that
/// Palettist wrote, or files cannot be read or written. All is then as it was.
pub fn export_in_chunks(
    whole: &Path,
    overwrite: bool,
    export: impl FnOnce(&Path) -> Result<PathBuf>,
) -> Result<[PathBuf; 2]> {
    recover(whole)?;
    remove_leftovers(whole, WHOLE);
    let aside = beside(whole, WHOLE);
    let made = missing_folders(&aside);
    fs::create_dir_all(&aside).with_context(|| format!("cannot create {}", aside.display()))?;
    let held = hold(&aside);
    let chunks = export(&aside).map_err(|error| at_place(error, whole));
    let chunks = chunks.and_then(|package| cut_package(&package, whole, overwrite));
    fs::remove_dir_all(&aside).with_context(|| format!("cannot remove {}", aside.display()))?;
    drop(held);
    if chunks.is_err() {
        remove_empty(&made);
    }
    chunks
}

/// `weight.bin` of a package that is cut.
struct WeightFile {
    file: File,
}

/// One blob: its type, how many elements, where its bytes are and how many.
struct Blob {
    kind: BlobType,
    count: usize,
    at: u64,
    bytes: u64,
}

impl WeightFile {
    fn open(path: &Path) -> Result<Self> {
        Ok(Self { file: File::open(path).with_context(|| format!("cannot open {}", path.display()))? })
    }

    /// The blob whose record lies at `offset`.
    fn blob(&mut self, offset: u64) -> Result<Blob> {
        let mut record = [0; 40];
        self.file.seek(SeekFrom::Start(offset))?;
        self.file.read_exact(&mut record).with_context(|| format!("weight.bin has no record at {offset}"))?;
        let number = |at: usize| u64::from_le_bytes(record[at..at + 8].try_into().unwrap_or_default());
        let (kind, bytes, padding) = ((number(0) >> 32) as u32, number(8), number(24));
        let kind = BlobType::numbered(kind).with_context(|| format!("weight.bin has a blob of type {kind}"))?;
        let count = ((8 * bytes).saturating_sub(padding) / kind.bits()) as usize;
        Ok(Blob { kind, count, at: number(16), bytes })
    }

    fn read(&mut self, blob: &Blob) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.file.seek(SeekFrom::Start(blob.at))?;
        (&self.file).take(blob.bytes).read_to_end(&mut bytes)?;
        ensure!(bytes.len() as u64 == blob.bytes, "weight.bin ends within a blob");
        Ok(bytes)
    }
}

/// Where a program is cut.
struct Cut {
    /// Which chunks have each operation: constants may be in both.
    chunks: Vec<[bool; 2]>,
    /// What is handed over, in the order in which it is computed, with the names that it has on the way.
    border: Vec<(Var, String)>,
    target: DeploymentTarget,
}

/// The first and the last computing operation that needs a value.
type Uses = (usize, usize);

impl Cut {
    fn of(model: &Model, weights: &mut WeightFile) -> Result<Self> {
        let target = DeploymentTarget::of_specification(model.specification_version)?;
        let block = block(model)?;
        let uses = uses(&block.operations);
        let range = |operation: &Operation| -> Option<Uses> {
            operation.outputs.iter().filter_map(|output| uses.get(output.name.as_str()).copied()).reduce(spanning)
        };

        // Bytes of weights by where they are needed first and last.
        let mut blobs: HashMap<u64, Uses> = HashMap::new();
        for operation in block.operations.iter().filter(|operation| is_constant(operation)) {
            let Some(range) = range(operation) else { continue };
            for offset in offsets(operation) {
                blobs.entry(offset).and_modify(|known| *known = spanning(*known, range)).or_insert(range);
            }
        }
        let count = block.operations.len();
        let (mut before, mut behind) = (vec![0u64; count + 1], vec![0u64; count + 1]);
        for (offset, (first, last)) in blobs {
            let bytes = weights.blob(offset)?.bytes.next_multiple_of(64) + 64;
            before[first] += bytes;
            behind[last] += bytes;
        }
        // Elements handed over by a cut behind each operation; none where that cannot be.
        let mut handed = vec![Some(0i64); count];
        for (at, operation) in block.operations.iter().enumerate() {
            if is_constant(operation) {
                handed[at] = None;
                continue;
            }
            for output in &operation.outputs {
                let var = var(output)?;
                let last = match block.outputs.contains(&output.name) {
                    true => count,
                    false => uses.get(output.name.as_str()).map_or(at, |(_, last)| *last),
                };
                let wire = matches!(var.element, FLOAT16 | FLOAT32) && last < count;
                for place in handed.iter_mut().take(last).skip(at) {
                    *place = place.filter(|_| wire).map(|sum| sum + var.shape.iter().product::<i64>());
                }
            }
        }
        let mut larger = Vec::with_capacity(count);
        let (mut first, mut second) = (0, behind.iter().sum::<u64>());
        for at in 0..count {
            first += before[at];
            second -= behind[at];
            larger.push(first.max(second));
        }
        let places = || (0..count).filter_map(|at| handed[at].filter(|&handed| handed > 0).map(|handed| (at, handed)));
        let best = places().map(|(at, _)| larger[at]).min().context("it has no place to be cut at")?;
        let limit = (best as f64 * TOLERANCE) as u64;
        let place = places().filter(|(at, _)| larger[*at] <= limit).min_by_key(|(at, handed)| (*handed, larger[*at]));
        let (place, _) = place.context("it has no place to be cut at")?;

        let mut chunks = Vec::with_capacity(count);
        let mut border = Vec::new();
        let names: HashSet<&str> = named(block).collect();
        for (at, operation) in block.operations.iter().enumerate() {
            if is_constant(operation) {
                chunks.push(range(operation).map_or([false; 2], |(first, last)| [first <= place, last > place]));
                continue;
            }
            chunks.push([at <= place, at > place]);
            for output in operation.outputs.iter().filter(|_| at <= place) {
                if uses.get(output.name.as_str()).is_some_and(|(_, last)| *last > place) {
                    let var = var(output)?;
                    let mut wire = var.name.clone();
                    while var.element == FLOAT16 && names.contains(wire.as_str()) {
                        wire.push_str("_fp32");
                    }
                    border.push((var, wire));
                }
            }
        }
        Ok(Self { chunks, border, target })
    }

    /// Writes the weights of one chunk; its model.
    fn chunk<W: Write + Seek>(
        &self,
        whole: &Model,
        chunk: usize,
        weights: &mut WeightFile,
        file: BlobWriter<W>,
    ) -> Result<(Model, [u8; 32])> {
        let function = main(whole)?;
        let block = block(whole)?;
        let about = whole.description.as_ref().context("the model has no description")?;
        let own = || block.operations.iter().zip(&self.chunks).filter(|(_, chunks)| chunks[chunk]).map(|(op, _)| op);
        let read: HashSet<&str> = own().flat_map(inputs).collect();
        let mut program = ProgramBuilder::new(self.target, file);
        let mut description = proto::ModelDescription { metadata: about.metadata.clone(), ..Default::default() };
        if let Some(metadata) = &mut description.metadata {
            metadata.short_description += &format!(" Chunk {} of 2.", chunk + 1);
        }
        for input in function.inputs.iter().filter(|input| read.contains(input.name.as_str())) {
            let var = var(input)?;
            program.input(&var.name, var.element, &var.shape);
            let known = about.input.iter().find(|feature| feature.name == input.name);
            description.input.push(known.context("an input is not described")?.clone());
        }
        let handed = self.border.iter().map(|(var, wire)| {
            let from = ["What this chunk hands to the second", "What the first chunk hands to this one"][chunk];
            feature(wire, from, array_type::FLOAT32, &var.shape)
        });
        if chunk == 1 {
            description.input.extend(handed);
            for (var, wire) in &self.border {
                let input = program.input(wire, FLOAT32, &var.shape);
                if var.element == FLOAT16 {
                    cast(&mut program, &var.name, &input, "fp16", FLOAT16);
                }
            }
            description.output.clone_from(&about.output);
        } else {
            description.output.extend(handed);
        }
        for operation in own() {
            let mut operation = operation.clone();
            for value in values(&mut operation) {
                if let Some(ValueKind::BlobFile(place)) = &mut value.kind {
                    let blob = weights.blob(place.offset)?;
                    place.offset = program.blob(blob.kind, blob.count, &weights.read(&blob)?)?;
                }
            }
            program.adopt(operation);
        }
        let mut outputs = Vec::new();
        if chunk == 0 {
            for (var, wire) in &self.border {
                outputs.push(match var.element {
                    FLOAT32 => var.clone(),
                    _ => cast(&mut program, wire, var, "fp32", FLOAT32),
                });
            }
        } else {
            for name in &block.outputs {
                let known = own().flat_map(|operation| &operation.outputs).find(|output| output.name == *name);
                outputs.push(var(known.context("an output is not computed")?)?);
            }
        }
        let (program, _, digest) = program.finish(&outputs.iter().collect::<Vec<_>>())?;
        let model = Model {
            specification_version: whole.specification_version,
            description: Some(description),
            ml_program: Some(program),
            ..Default::default()
        };
        Ok((model, digest))
    }
}

fn cast<W: Write + Seek>(program: &mut ProgramBuilder<W>, name: &str, x: &Var, to: &str, element: i32) -> Var {
    let parameters = [("x", Parameter::Var(x)), ("dtype", Parameter::Text(to))];
    program.op("cast", name, &parameters, element, x.shape.clone())
}

fn main(model: &Model) -> Result<&proto::Function> {
    let program = model.ml_program.as_ref().context("the model is not an ML program")?;
    program.functions.get("main").context("the program has no function main")
}

fn block(model: &Model) -> Result<&proto::Block> {
    let function = main(model)?;
    function.block_specializations.get(&function.opset).context("the function has no block")
}

/// A `const` or a compressed constant.
fn is_constant(operation: &Operation) -> bool {
    operation.r#type.starts_with("const")
}

/// Names of the values that an operation takes.
fn inputs(operation: &Operation) -> impl Iterator<Item = &str> {
    operation.inputs.values().flat_map(|argument| &argument.arguments).filter_map(|binding| match &binding.binding {
        Some(BindingKind::Name(name)) => Some(name.as_str()),
        _ => None,
    })
}

/// Every name in a block: of values and of operations.
fn named(block: &proto::Block) -> impl Iterator<Item = &str> {
    block.operations.iter().flat_map(|operation| &operation.outputs).map(|output| output.name.as_str())
}

/// Where each value is needed by operations that compute, directly or through compressed constants.
fn uses(operations: &[Operation]) -> BTreeMap<&str, Uses> {
    let mut uses: BTreeMap<&str, Uses> = BTreeMap::new();
    for (at, operation) in operations.iter().enumerate().rev() {
        let range = match is_constant(operation) {
            false => Some((at, at)),
            true => {
                operation.outputs.iter().filter_map(|output| uses.get(output.name.as_str()).copied()).reduce(spanning)
            }
        };
        let Some(range) = range else { continue };
        for name in inputs(operation) {
            uses.entry(name).and_modify(|known| *known = spanning(*known, range)).or_insert(range);
        }
    }
    uses
}

fn spanning(a: Uses, b: Uses) -> Uses {
    (a.0.min(b.0), a.1.max(b.1))
}

/// The values that stand in an operation: attributes, and inputs written in place.
fn values(operation: &mut Operation) -> impl Iterator<Item = &mut Value> {
    let bindings = operation.inputs.values_mut().flat_map(|argument| &mut argument.arguments);
    let in_place = bindings.filter_map(|binding| match &mut binding.binding {
        Some(BindingKind::Value(value)) => Some(value),
        _ => None,
    });
    operation.attributes.values_mut().chain(in_place)
}

/// Offsets of the blobs that an operation refers to.
fn offsets(operation: &Operation) -> Vec<u64> {
    let bindings = operation.inputs.values().flat_map(|argument| &argument.arguments);
    let in_place = bindings.filter_map(|binding| match &binding.binding {
        Some(BindingKind::Value(value)) => Some(value),
        _ => None,
    });
    let places = operation.attributes.values().chain(in_place).filter_map(|value| match &value.kind {
        Some(ValueKind::BlobFile(place)) => Some(place.offset),
        _ => None,
    });
    places.collect()
}

fn var(value: &NamedValueType) -> Result<Var> {
    let Some(ValueTypeKind::Tensor(tensor)) = value.r#type.as_ref().and_then(|kind| kind.kind.as_ref()) else {
        bail!("{} is not a tensor", value.name);
    };
    let size = |dimension: &proto::Dimension| match &dimension.dimension {
        Some(DimensionKind::Constant(constant)) => Ok(constant.size as i64),
        _ => bail!("{} has a shape that is not fixed", value.name),
    };
    let shape = tensor.dimensions.iter().map(size).collect::<Result<_>>()?;
    Ok(Var { name: value.name.clone(), shape, element: tensor.data_type })
}
