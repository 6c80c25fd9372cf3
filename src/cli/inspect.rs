//! `palettist inspect`: what a checkpoint or a package holds.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use tch::Kind;

use super::{Mistakes, grouped, print, size};
use crate::coreml::components::cost::Cost;
use crate::coreml::reading::compiled::is_compiled;
use crate::coreml::reading::{Package, Palettes};
use crate::files::TensorFile;
use crate::palette::{LutDtype, PalettizedCheckpoint};
use crate::source::lora::{LoraSummary, is_of_lora};
use crate::terminal::{printable_line, tell};

/// Tells what a checkpoint or package holds: tensors, bits per weight with palettes counted, sizes
#[derive(clap::Args)]
pub struct Args {
    /// `.safetensors` files, palettized or not, `.mlpackage` and `.mlmodelc` folders, and folders of models and runs
    #[arg(required = true)]
    files: Vec<PathBuf>,
    /// One JSON object a file, one a line
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> Result<()> {
    let mut failed = Vec::new();
    let mut first = true;
    for path in &args.files {
        let contents = match Contents::read(path) {
            Ok(contents) => contents,
            Err(error) => {
                failed.push(format!("{error:#}").lines().next().unwrap_or_default().to_owned());
                continue;
            }
        };
        if args.json {
            print(contents.json(path))?;
            continue;
        }
        if !std::mem::take(&mut first) {
            print("")?;
        }
        contents.print(path)?;
    }
    if failed.is_empty() { Ok(()) } else { Err(Mistakes(failed).into()) }
}

/// One weight tensor.
struct Entry {
    name: String,
    shape: Vec<i64>,
    /// `f16`, or `2-bit palette`.
    kind: String,
    elements: u64,
    /// Bits on disk, palette included.
    bits: u64,
    palettized: bool,
}

/// All of a file.
pub struct Contents {
    what: &'static str,
    /// What a file without palettes holds, by the names of its tensors.
    network: Option<String>,
    /// How many of the entries each file has, where a folder is looked at.
    files: Vec<(PathBuf, usize)>,
    entries: Vec<Entry>,
    metadata: Vec<(String, String)>,
    bytes: u64,
    /// Of a checkpoint's palettes.
    cost: Cost,
}

impl Contents {
    fn read(path: &Path) -> Result<Self> {
        let found = path.metadata().with_context(|| path.display().to_string())?;
        if found.is_dir() && is_package(path) {
            return Self::package(path);
        }
        if found.is_dir() {
            return Self::folder(path);
        }
        let bytes = found.len();
        let file = TensorFile::open(path)?;
        let metadata: Vec<(String, String)> = file.metadata().into_iter().collect();
        if metadata.iter().any(|(key, _)| key == "palettist.palettes") {
            return Ok(Self::palettized(&PalettizedCheckpoint::read(path)?, bytes));
        }
        let mut entries = Vec::new();
        for name in file.names() {
            let shape = file.shape(&name).unwrap_or_default();
            let kind = type_name(&file.type_name(&name)?);
            let elements = shape.iter().product::<i64>() as u64;
            let bits = file.bytes(&name)?.len() as u64 * 8;
            entries.push(Entry { name, shape, kind, elements, bits, palettized: false });
        }
        let shapes: BTreeMap<&str, &[i64]> = entries.iter().map(|e| (e.name.as_str(), e.shape.as_slice())).collect();
        let network = network(&shapes);
        let mut metadata = metadata;
        let network = match network.as_deref() {
            Some(LORA) => Some(lora(path, &mut metadata)),
            _ => network,
        };
        Ok(Self { network, ..Self::new("safetensors", entries, metadata, bytes) })
    }

    fn new(what: &'static str, entries: Vec<Entry>, metadata: Vec<(String, String)>, bytes: u64) -> Self {
        Self { what, network: None, files: Vec::new(), entries, metadata, bytes, cost: Cost::default() }
    }

    /// Reads all files and packages in a folder: a model's, a network's, or a run's without its checkpoints.
    fn folder(path: &Path) -> Result<Self> {
        let mut all = Self::new("folder", Vec::new(), Vec::new(), 0);
        let mut files = weight_files(path, DEEPEST)?;
        // What is compiled of packages that are there holds their weights once more.
        if files.iter().any(|file| !is_compiled(file)) {
            files.retain(|file| !is_compiled(file));
        }
        for file in files {
            let within = file.strip_prefix(path).unwrap_or(&file).to_owned();
            let contents = Self::read(&file)?;
            all.files.push((within.clone(), contents.entries.len()));
            all.bytes += contents.bytes;
            let named = |entry: Entry| Entry { name: format!("{}: {}", within.display(), entry.name), ..entry };
            all.entries.extend(contents.entries.into_iter().map(named));
        }
        if all.files.is_empty() {
            bail!("{} holds no .safetensors file and no Core ML package, and is none", path.display());
        }
        for (name, what) in [("model_index.json", "model folder"), ("config.json", "network folder")] {
            let config = fs::read(path.join(name)).ok().and_then(|text| serde_json::from_slice::<Value>(&text).ok());
            let Some(config) = config else { continue };
            all.what = what;
            let class = config.get("_class_name").or_else(|| config.pointer("/architectures/0"));
            all.network = class.and_then(Value::as_str).map(str::to_owned);
            break;
        }
        if path.join("config.resolved.toml").is_file() {
            all.what = "run folder";
        }
        Ok(all)
    }

    /// Of a palettized checkpoint that takes `bytes` on disk.
    pub fn palettized(checkpoint: &PalettizedCheckpoint, bytes: u64) -> Self {
        let mut entries = Vec::new();
        for (name, palette) in &checkpoint.palettes {
            let (form, elements) = (palette.form, (palette.indices.len() * palette.form.cluster_dim) as u64);
            let groups = form.groups(&palette.shape) as u64;
            let mut kind = palette_kind(form.bits, groups, form.cluster_dim as u64);
            if form.per_channel_scale {
                kind += ", scaled";
            }
            if form.lut_dtype == LutDtype::I8 {
                kind += ", int8";
            }
            entries.push(Entry {
                name: name.clone(),
                shape: palette.shape.clone(),
                kind,
                elements,
                bits: palette.stored_bits(),
                palettized: true,
            });
        }
        for (name, tensor) in &checkpoint.dense {
            let elements = tensor.numel() as u64;
            let bits = elements * tensor.kind().elt_size_in_bytes() as u64 * 8;
            let kind = kind_name(tensor.kind());
            entries.push(Entry { name: name.clone(), shape: tensor.size(), kind, elements, bits, palettized: false });
        }
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        let metadata = checkpoint.metadata.clone().into_iter().collect();
        let palettes = checkpoint.palettes.iter();
        let cost = Cost::of(palettes.map(|(name, palette)| (name.as_str(), palette.form, palette.shape.as_slice())));
        Self { cost, ..Self::new("palettized checkpoint", entries, metadata, bytes) }
    }

    fn package(path: &Path) -> Result<Self> {
        let package = Package::open(path)?;
        let mut entries = Vec::new();
        for weight in package.weights()? {
            let kind = match weight.palettes {
                None => weight.data_type.to_string().replace("FLOAT", "fp").to_lowercase(),
                Some(Palettes { bits, groups, vector }) => palette_kind(bits, groups, vector),
            };
            entries.push(Entry {
                name: weight.name,
                shape: weight.shape,
                kind,
                elements: weight.elements,
                bits: weight.bytes * 8,
                palettized: weight.palettes.is_some(),
            });
        }
        let mut metadata = vec![
            ("specification version".to_string(), package.specification_version().to_string()),
            ("opset".to_string(), package.opset().to_string()),
        ];
        for (what, features) in [("input", package.inputs()), ("output", package.outputs())] {
            metadata.extend(features.iter().map(|f| (format!("{what} {}", f.name), f.kind.to_string())));
        }
        let about = package.metadata();
        let known = [
            ("description", &about.short_description),
            ("version", &about.version_string),
            ("author", &about.author),
            ("license", &about.license),
        ];
        metadata.extend(known.into_iter().filter(|(_, v)| !v.is_empty()).map(|(k, v)| (k.to_string(), v.clone())));
        metadata.extend(about.user_defined.clone());
        metadata.extend(package.compiler().map(|compiler| ("compiled by".to_owned(), compiler.to_owned())));
        let what = if package.is_compiled() { "compiled Core ML model" } else { "Core ML package" };
        Ok(Self::new(what, entries, metadata, package.file_bytes()))
    }

    /// (weights, bits) of the entries that `keep` accepts.
    fn sum(&self, keep: impl Fn(&Entry) -> bool) -> (u64, u64) {
        self.entries.iter().filter(|entry| keep(entry)).fold((0, 0), |(n, b), e| (n + e.elements, b + e.bits))
    }

    fn print(&self, path: &Path) -> Result<()> {
        let network = self.network.as_ref().map_or(String::new(), |network| format!(", {}", printable_line(network)));
        print(format_args!("{}: {}{network}, {} on disk", path.display(), self.what, size(self.bytes)))?;
        let names: Vec<String> = self.entries.iter().map(|entry| printable_line(&entry.name)).collect();
        let width = names.iter().map(|name| name.chars().count()).max().unwrap_or(0);
        // A folder's files are shown, and not all of their tensors.
        let shown = if self.files.is_empty() { self.entries.len() } else { 0 };
        for (entry, name) in self.entries.iter().zip(names).take(shown) {
            let shape = entry.shape.iter().map(i64::to_string).collect::<Vec<_>>().join("×");
            let per_weight = entry.bits as f64 / entry.elements.max(1) as f64;
            print(format_args!("  {name:width$}  {shape:>18}  {:<14}  {per_weight:6.3} bits", entry.kind))?;
        }
        let mut entries = self.entries.iter();
        for (file, count) in &self.files {
            let of_file: Vec<&Entry> = entries.by_ref().take(*count).collect();
            let kinds: BTreeSet<&str> = of_file.iter().map(|entry| entry.kind.as_str()).collect();
            let kinds = kinds.into_iter().collect::<Vec<_>>().join(", ");
            let weights: u64 = of_file.iter().map(|entry| entry.elements).sum();
            let bits: u64 = of_file.iter().map(|entry| entry.bits).sum();
            let (file, weights) = (printable_line(&file.to_string_lossy()), grouped(weights));
            print(format_args!("  {file}: {count} tensors, {weights} weights, {}: {kinds}", size(bits / 8)))?;
        }
        for (key, value) in &self.metadata {
            // A recipe is a whole config.
            let first = printable_line(value.lines().next().unwrap_or_default());
            let more = if value.lines().count() > 1 { " …" } else { "" };
            print(format_args!("  {}: {first}{more}", printable_line(key)))?;
        }
        self.print_sums()
    }

    /// What the weights take, those in palettes and all; the file's header and metadata do not count. And what a package
    /// made of them takes, where that is not the same.
    pub fn print_sums(&self) -> Result<()> {
        let (weights, bits) = self.sum(|_| true);
        let (in_palettes, palette_bits) = self.sum(|entry| entry.palettized);
        if in_palettes > 0 {
            print(format_args!(
                "{} of {} weights in palettes, {} tensors, at {:.3} bits each with palettes counted",
                grouped(in_palettes),
                grouped(weights),
                self.entries.iter().filter(|entry| entry.palettized).count(),
                palette_bits as f64 / in_palettes as f64
            ))?;
        }
        if let Some(note) = self.cost.note() {
            print(note)?;
        }
        if let Some(warning) = self.cost.warning() {
            tell(warning);
        }
        print(format_args!(
            "{} tensors, {} weights, {}: {:.3} bits a weight; {} as fp16",
            self.entries.len(),
            grouped(weights),
            size(bits / 8),
            bits as f64 / weights.max(1) as f64,
            size(weights * 2)
        ))
    }

    fn json(&self, path: &Path) -> Value {
        let (weights, bits) = self.sum(|_| true);
        let (palettized_weights, palettized_bits) = self.sum(|entry| entry.palettized);
        let tensors: Vec<Value> = self
            .entries
            .iter()
            .map(|e| json!({"name": e.name, "shape": e.shape, "type": e.kind, "weights": e.elements, "bits": e.bits}))
            .collect();
        json!({
            "file": path.display().to_string(),
            "kind": self.what,
            "network": self.network,
            "file_bytes": self.bytes,
            "weights": weights,
            "bits": bits,
            "bits_per_weight": bits as f64 / weights.max(1) as f64,
            "palettized_weights": palettized_weights,
            "palettized_bits": palettized_bits,
            "metadata": self.metadata.iter().cloned().collect::<BTreeMap<_, _>>(),
            "tensors": tensors,
        })
    }
}

/// `4-bit palette`, `4-bit palettes × 20` for as many groups of channels, `4-bit palette of 2` with vectors of two.
fn palette_kind(bits: u32, groups: u64, vector: u64) -> String {
    let groups = if groups > 1 { format!("s × {groups}") } else { String::new() };
    let vector = if vector > 1 { format!(" of {vector}") } else { String::new() };
    format!("{bits}-bit palette{groups}{vector}")
}

/// Whether a folder is a package, compiled or not, or what is left of one, which may lack its manifest.
fn is_package(folder: &Path) -> bool {
    let named = folder.extension().is_some_and(|extension| extension == "mlpackage");
    named
        || is_compiled(folder)
        || ["Manifest.json", "Data/com.apple.CoreML"].iter().any(|part| folder.join(part).exists())
}

/// How deep in a folder files are looked for: in a run, `model/unet/` is two folders down.
const DEEPEST: usize = 2;

/// The `.safetensors` files and packages in a folder, those in folders within it too, sorted. What is hidden and a run's
/// checkpoints are left out, and links to folders are not followed.
fn weight_files(folder: &Path, deeper: usize) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    let mut entries = entries.collect::<Result<Vec<_>, _>>().with_context(|| folder.display().to_string())?;
    entries.sort_by_key(fs::DirEntry::file_name);
    let mut files = Vec::new();
    for entry in entries {
        let (path, name) = (entry.path(), entry.file_name());
        let is = |ending: &str| path.extension() == Some(ending.as_ref());
        if name.as_encoded_bytes().starts_with(b".") || name == "checkpoints" {
            continue;
        }
        let folder = entry.file_type().is_ok_and(|kind| kind.is_dir());
        if (is("safetensors") && path.is_file()) || (folder && is_package(&path)) {
            files.push(path);
        } else if folder && deeper > 0 {
            files.extend(weight_files(&path, deeper - 1)?);
        }
    }
    Ok(files)
}

/// What a file of a LoRA is called.
const LORA: &str = "a LoRA";

/// What is told of a LoRA: kind, rank, layout and family; its alphas and layers go to `metadata`.
fn lora(path: &Path, metadata: &mut Vec<(String, String)>) -> String {
    match LoraSummary::of(path) {
        Ok(summary) => {
            metadata.extend(summary.lines());
            format!("{LORA}: {}", summary.title())
        }
        Err(error) => {
            let text = format!("{error:#}");
            metadata.push(("cannot be merged".to_owned(), text.lines().next().unwrap_or_default().to_owned()));
            LORA.to_owned()
        }
    }
}

/// What tensors of these names and shapes are, where that is known.
fn network(shapes: &BTreeMap<&str, &[i64]>) -> Option<String> {
    let any = |test: fn(&str) -> bool| shapes.keys().any(|name| test(name));
    let channels = |name: &str| shapes.get(name).and_then(|shape| shape.get(1).copied());
    let unet = |what: &str, first: &str| match channels(first) {
        None | Some(4) => what.to_owned(),
        Some(channels) => format!("{what}, {channels} input channels"),
    };
    const ORIGINAL: [&str; 3] = ["model.diffusion_model.", "diffusion_model.", ""];
    let original =
        ORIGINAL.into_iter().find(|prefix| shapes.contains_key(&*format!("{prefix}input_blocks.0.0.weight")));
    let has_base = any(|name| name.contains(".base_layer."));
    Some(if any(is_of_lora) && has_base {
        "a network with a PEFT LoRA that is not fused".to_owned()
    } else if any(is_of_lora) {
        LORA.to_owned()
    } else if has_base {
        "a network as PEFT saves it, with base_layer in its names".to_owned()
    } else if any(|name| name.starts_with("controlnet_cond_embedding.") || name.starts_with("control_model.")) {
        "a ControlNet".to_owned()
    } else if let Some(prefix) = original {
        let whole = any(|name| name.starts_with("first_stage_model."));
        let what = match (whole, prefix) {
            (true, _) => "a single-file checkpoint in the original layout".to_owned(),
            (_, "") => "a UNet alone, in the original layout without a prefix".to_owned(),
            _ => format!("a UNet alone, in the original layout under {prefix}"),
        };
        unet(&what, &format!("{prefix}input_blocks.0.0.weight"))
    } else if any(|name| name.starts_with("encoder.")) && any(|name| name.starts_with("decoder.")) {
        "an autoencoder".to_owned()
    } else if shapes.contains_key("conv_in.weight") && any(|name| name.starts_with("down_blocks.")) {
        unet("a UNet of diffusers", "conv_in.weight")
    } else if any(|name| name.starts_with("vision_model.vision_model.")) {
        "a safety checker".to_owned()
    } else if any(|name| name.starts_with("text_model.")) {
        "a text encoder (CLIP's)".to_owned()
    } else {
        return None;
    })
}

/// The format's name of a type as messages have it: `fp16` for `F16`.
fn type_name(name: &str) -> String {
    match name {
        "F16" | "F32" | "F64" => format!("fp{}", &name[1..]),
        other => other.to_lowercase(),
    }
}

fn kind_name(kind: Kind) -> String {
    match kind {
        Kind::Half => "fp16".to_string(),
        Kind::BFloat16 => "bf16".to_string(),
        Kind::Float => "fp32".to_string(),
        Kind::Double => "fp64".to_string(),
        other => format!("{other:?}").to_lowercase(),
    }
}
