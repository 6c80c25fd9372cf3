//! `palettist inspect`: what a checkpoint or a package holds.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use tch::Kind;

use super::{grouped, print, size};
use crate::coreml::cost::Cost;
use crate::coreml::read::{Package, Palettes};
use crate::palette::{LutDtype, PalettizedCheckpoint};
use crate::source::files::TensorFile;
use crate::terminal::tell;

/// Tells what a checkpoint or package holds: tensors, bits per weight with palettes counted, sizes
#[derive(clap::Args)]
pub struct Args {
    /// `.safetensors` files, palettized or not, and `.mlpackage` folders
    #[arg(required = true)]
    files: Vec<PathBuf>,
    /// One JSON object a file, one a line
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> Result<()> {
    for (i, path) in args.files.iter().enumerate() {
        let contents = Contents::read(path)?;
        if args.json {
            print(contents.json(path))?;
            continue;
        }
        if i > 0 {
            print("")?;
        }
        contents.print(path)?;
    }
    Ok(())
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
    entries: Vec<Entry>,
    metadata: Vec<(String, String)>,
    bytes: u64,
    /// Of a checkpoint's palettes.
    cost: Cost,
}

impl Contents {
    fn read(path: &Path) -> Result<Self> {
        let found = path.metadata().with_context(|| path.display().to_string())?;
        if found.is_dir() {
            return Self::package(path);
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
            let kind = file.kind(&name)?;
            let elements = shape.iter().product::<i64>() as u64;
            let bits = file.bytes(&name)?.len() as u64 * 8;
            let kind = if file.is_fp8(&name) { "fp8".to_owned() } else { kind_name(kind) };
            entries.push(Entry { name, shape, kind, elements, bits, palettized: false });
        }
        Ok(Self { what: "safetensors", entries, metadata, bytes, cost: Cost::default() })
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
        Self { what: "palettized checkpoint", entries, metadata, bytes, cost }
    }

    fn package(path: &Path) -> Result<Self> {
        // Users know model folders better than packages.
        let network = path.join("unet/diffusion_pytorch_model.safetensors");
        if network.exists() {
            bail!("{} is a model's folder: name one of its files, such as {}", path.display(), network.display());
        }
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
        Ok(Self { what: "Core ML package", entries, metadata, bytes: package.file_bytes(), cost: Cost::default() })
    }

    /// (weights, bits) of the entries that `keep` accepts.
    fn sum(&self, keep: impl Fn(&Entry) -> bool) -> (u64, u64) {
        self.entries.iter().filter(|entry| keep(entry)).fold((0, 0), |(n, b), e| (n + e.elements, b + e.bits))
    }

    fn print(&self, path: &Path) -> Result<()> {
        print(format_args!("{}: {}, {} on disk", path.display(), self.what, size(self.bytes)))?;
        let width = self.entries.iter().map(|entry| entry.name.len()).max().unwrap_or(0);
        for entry in &self.entries {
            let shape = entry.shape.iter().map(i64::to_string).collect::<Vec<_>>().join("×");
            let per_weight = entry.bits as f64 / entry.elements.max(1) as f64;
            print(format_args!("  {:width$}  {shape:>18}  {:<14}  {per_weight:6.3} bits", entry.name, entry.kind))?;
        }
        for (key, value) in &self.metadata {
            // A recipe is a whole config.
            let first = value.lines().next().unwrap_or_default();
            let more = if value.lines().count() > 1 { " …" } else { "" };
            print(format_args!("  {key}: {first}{more}"))?;
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
            "file_bytes": self.bytes,
            "weights": weights,
            "bits": bits,
            "bits_per_weight": bits as f64 / weights.max(1) as f64,
            "palettized_weights": palettized_weights,
            "palettized_bits": palettized_bits,
            "metadata": self.metadata.iter().cloned().collect::<std::collections::BTreeMap<_, _>>(),
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

fn kind_name(kind: Kind) -> String {
    match kind {
        Kind::Half => "fp16".to_string(),
        Kind::BFloat16 => "bf16".to_string(),
        Kind::Float => "fp32".to_string(),
        Kind::Double => "fp64".to_string(),
        other => format!("{other:?}").to_lowercase(),
    }
}
