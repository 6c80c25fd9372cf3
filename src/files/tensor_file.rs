//! A safetensors file, read through a memory map: opening a 3 GB checkpoint costs its header only, and nothing in the
//! file is trusted before it is checked.
//!
//! 8-bit floating-point weights (OCP's E4M3 and E5M2) are read as wider ones. Their values are exact in fp16. A scale
//! that the file has for such a tensor (`X.scale_weight` for `X.weight`, one number or one for each row) is applied.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail, ensure};
use half::f16;
use safetensors::tensor::{Dtype, Metadata, SafeTensors};
use tch::{Kind, Tensor};

use super::known::known_otherwise;
use super::safetensors::kind_of;

/// A safetensors file, mapped.
pub struct TensorFile {
    path: PathBuf,
    map: memmap2::Mmap,
    header: Metadata,
    start: usize,
}

impl TensorFile {
    /// Maps `path` and checks its whole header: sizes, offsets, types, nothing missing at the end.
    ///
    /// # Errors
    /// One line naming the file and what is wrong with it.
    pub fn open(path: &Path) -> Result<Self> {
        let context = || format!("cannot open {}", path.display());
        // Before it is opened: a pipe would be waited for.
        ensure!(path.metadata().with_context(context)?.is_file(), "{} is not a file", path.display());
        let file = File::open(path).with_context(context)?;
        // SAFETY: the map is read-only and its bytes are copied out when a tensor is made. Somebody else truncating
        // the file meanwhile would be a SIGBUS, not undefined behaviour here; this program only replaces by renaming.
        let map = unsafe { memmap2::Mmap::map(&file) }.with_context(|| format!("cannot read {}", path.display()))?;
        if map.len() < 8 {
            if let Some(what) = known_otherwise(&map) {
                bail!("{} is {what}", path.display());
            }
            bail!("{} is not a safetensors file: it has only {} bytes", path.display(), map.len());
        }
        // A whole header begins with a brace. Seen before it is read: the first bytes of anything else are a length, too.
        if map.get(8) != Some(&b'{')
            && let Some(what) = known_otherwise(&map)
        {
            bail!("{} is {what}", path.display());
        }
        let (length, header) = SafeTensors::read_metadata(&map).map_err(|error| {
            use safetensors::SafeTensorError as E;
            let what = match error {
                E::MetadataIncompleteBuffer => size_mismatch(&map),
                E::InvalidHeaderLength | E::HeaderTooLarge => "its header is longer than the file".into(),
                other => other.to_string(),
            };
            anyhow!("{} is not a whole safetensors file: {what}; fetch it again", path.display())
        })?;
        Ok(Self { path: path.to_owned(), start: 8 + length, map, header })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Names of the tensors, sorted.
    pub fn names(&self) -> Vec<String> {
        let mut names = self.header.offset_keys();
        names.sort();
        names
    }

    /// The free-form metadata of the header, sorted by key.
    pub fn metadata(&self) -> BTreeMap<String, String> {
        self.header.metadata().iter().flatten().map(|(key, value)| (key.clone(), value.clone())).collect()
    }

    /// The shape of a tensor; `None` when there is none of that name.
    pub fn shape(&self, name: &str) -> Option<Vec<i64>> {
        // The header was checked: the product of the axes in bytes is within the file.
        self.header.info(name).map(|info| info.shape.iter().map(|&n| n as i64).collect())
    }

    /// Whether a tensor holds 8-bit floating-point numbers.
    pub fn is_fp8(&self, name: &str) -> bool {
        self.header.info(name).is_some_and(|info| is_fp8(info.dtype))
    }

    /// The tensor that holds the scale of the fp8 tensor `name`.
    fn scale(&self, name: &str) -> Option<String> {
        let stem = name.strip_suffix(".weight").filter(|_| self.is_fp8(name))?;
        WEIGHT_SCALES.iter().map(|ending| format!("{stem}{ending}")).find(|scale| self.header.info(scale).is_some())
    }

    /// Names of the tensors, sorted, without the scales of others.
    pub fn unscaled_names(&self) -> Vec<String> {
        let mut names = self.names();
        names.retain(|name| !is_scale(name));
        names
    }

    /// The type that a tensor is read as; an error when it is missing or of a type that libtorch lacks.
    pub fn kind(&self, name: &str) -> Result<Kind> {
        let dtype = self.info(name)?.dtype;
        if is_fp8(dtype) {
            return Ok(if self.scale(name).is_some() { Kind::Float } else { Kind::Half });
        }
        kind_of(dtype)
            .ok_or_else(|| anyhow!("{}: tensor `{name}` has the type {dtype}, not supported", self.path.display()))
    }

    /// The name of a tensor's type as the format has it, such as `F16` or `F8_E4M3`.
    ///
    /// # Errors
    /// No such tensor.
    pub fn type_name(&self, name: &str) -> Result<String> {
        Ok(self.info(name)?.dtype.to_string())
    }

    /// The bytes of a tensor, in the mapped file.
    pub fn bytes(&self, name: &str) -> Result<&[u8]> {
        let (from, to) = self.info(name)?.data_offsets;
        self.map
            .get(self.start + from..self.start + to)
            .ok_or_else(|| anyhow!("{}: tensor `{name}` lies outside the file", self.path.display()))
    }

    /// Copies a tensor to the CPU as it is stored; fp8 as [`TensorFile::kind`] says.
    ///
    /// # Errors
    /// No such tensor, or a type that libtorch lacks; a scale that does not fit.
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        let shape = self.shape(name).unwrap_or_default();
        let bytes = self.bytes(name)?;
        self.copied(name, bytes, &shape, 0)
    }

    /// The same of the rows `from` and on, `count` of them, along the first axis.
    pub fn rows(&self, name: &str, from: i64, count: i64) -> Result<Tensor> {
        let bytes = self.bytes(name)?;
        let mut shape = self.shape(name).unwrap_or_default();
        let whole = shape.first().copied().unwrap_or(0);
        let size = if whole > 0 { bytes.len() / whole as usize } else { 0 };
        let end = from.checked_add(count).filter(|end| from >= 0 && count >= 0 && *end <= whole);
        let rows = end.and_then(|end| bytes.get(from as usize * size..end as usize * size));
        let (Some(rows), Some(first)) = (rows, shape.first_mut()) else {
            bail!("{}: tensor `{name}` has no {count} rows from {from} on", self.path.display());
        };
        *first = count;
        self.copied(name, rows, &shape, from)
    }

    /// A tensor of these bytes of `name`, its rows `from` and on.
    fn copied(&self, name: &str, bytes: &[u8], shape: &[i64], from: i64) -> Result<Tensor> {
        let dtype = self.info(name)?.dtype;
        let read = || {
            if !is_fp8(dtype) {
                return Ok(Tensor::f_from_data_size(bytes, shape, self.kind(name)?)?);
            }
            let values = fp8_values(dtype);
            let halves: Vec<f16> = bytes.iter().map(|&byte| values[usize::from(byte)]).collect();
            let tensor = Tensor::f_from_slice(&halves)?.f_view(shape)?;
            match self.scale(name) {
                None => Ok(tensor),
                Some(scale) => self.scaled(&tensor.f_to_kind(Kind::Float)?, &scale, (name, from)),
            }
        };
        let tensor = read();
        self.let_go(bytes);
        tensor.with_context(|| format!("{}: tensor `{name}`", self.path.display()))
    }

    /// The rows `from` and on of the tensor `name`, times its scale.
    fn scaled(&self, rows: &Tensor, scale: &str, (name, from): (&str, i64)) -> Result<Tensor> {
        let whole = self.shape(name).and_then(|shape| shape.first().copied()).unwrap_or(1);
        let scales = self.tensor(scale)?.f_to_kind(Kind::Float)?.f_view([-1])?;
        if scales.numel() == 1 {
            return Ok(rows.f_mul(&scales.f_view(&[] as &[i64])?)?);
        }
        ensure!(
            scales.numel() as i64 == whole,
            "its scale `{scale}` has {} numbers; one, or one for each of {whole} rows is supported",
            scales.numel()
        );
        let mut shape = vec![1; rows.dim()];
        shape[0] = rows.size()[0];
        Ok(rows.f_mul(&scales.f_narrow(0, from, shape[0])?.f_view(shape.as_slice())?)?)
    }

    /// Tells the system that these bytes of [`TensorFile::bytes`], copied now, are not needed soon: they stay in its cache of the file,
    /// and no longer count as this process's memory. Reading a model tensor by tensor then takes the memory of one.
    pub fn let_go(&self, bytes: &[u8]) {
        #[cfg(unix)]
        {
            let offset = bytes.as_ptr() as usize - self.map.as_ptr() as usize;
            // SAFETY: the map is of a file and read-only: a page that is read again has the file's bytes again.
            // Failing costs memory only.
            let _ = unsafe { self.map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, offset, bytes.len()) };
        }
        #[cfg(not(unix))]
        let _ = bytes;
    }

    fn info(&self, name: &str) -> Result<&safetensors::tensor::TensorInfo> {
        self.header.info(name).ok_or_else(|| anyhow!("{} has no tensor `{name}`", self.path.display()))
    }
}

/// How many bytes a header promises and how many there are.
fn size_mismatch(bytes: &[u8]) -> String {
    let length = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes, checked")) as usize;
    let promised = bytes
        .get(8..8 + length)
        .and_then(|header| serde_json::from_slice::<Metadata>(header).ok())
        .map(|header| 8 + length + header.data_len());
    match promised {
        Some(promised) => format!("its header promises {promised} bytes and it has {}", bytes.len()),
        None => "its header and its size disagree".into(),
    }
}

/// What the scale of `X.weight` may be called: ComfyUI's name, and that of others.
const WEIGHT_SCALES: [&str; 2] = [".scale_weight", ".weight_scale"];

/// Whether a tensor is no parameter but the scale of one in fp8, or of what goes into it.
pub fn is_scale(name: &str) -> bool {
    name == "scaled_fp8"
        || name.ends_with(".scaled_fp8")
        || WEIGHT_SCALES.iter().chain(&[".scale_input", ".input_scale"]).any(|ending| name.ends_with(ending))
}

fn is_fp8(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::F8_E4M3 | Dtype::F8_E5M2)
}

/// What the 256 bytes stand for. E5M2 is the upper half of fp16; E4M3 (libtorch's `float8_e4m3fn`) has a bias of 7, no
/// infinities, and NaN where all bits but the sign are set.
fn fp8_values(dtype: Dtype) -> [f16; 256] {
    std::array::from_fn(|byte| {
        let byte = byte as u8;
        if dtype == Dtype::F8_E5M2 {
            return f16::from_bits(u16::from(byte) << 8);
        }
        let (exponent, mantissa) = (i32::from(byte >> 3 & 15), f32::from(byte & 7) / 8.0);
        let size = match (byte & 127, exponent) {
            (127, _) => f32::NAN,
            (_, 0) => mantissa * 2f32.powi(-6),
            _ => (1.0 + mantissa) * 2f32.powi(exponent - 7),
        };
        f16::from_f32(if byte & 128 == 0 { size } else { -size })
    })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use tch::Device;

    use super::super::write_safetensors;
    use super::*;

    /// A file of one header and these bytes.
    fn raw(path: &Path, header: &str, bytes: &[u8]) {
        fs::write(path, [&(header.len() as u64).to_le_bytes(), header.as_bytes(), bytes].concat()).unwrap();
    }

    #[test]
    fn every_byte_of_fp8_is_libtorchs_number() {
        let bytes: Vec<u8> = (0..=255).collect();
        for (dtype, name, kind) in
            [(Dtype::F8_E4M3, "F8_E4M3", Kind::Float8e4m3fn), (Dtype::F8_E5M2, "F8_E5M2", Kind::Float8e5m2)]
        {
            let theirs = Tensor::from_data_size(&bytes, &[256], kind).to_kind(Kind::Half);
            let ours = Tensor::from_slice(&fp8_values(dtype));
            let differ = ours.ne_tensor(&theirs).logical_and(&ours.isnan().logical_and(&theirs.isnan()).logical_not());
            assert_eq!(differ.any().int64_value(&[]), 0, "{name}");
            assert_eq!(ours.isnan().sum(Kind::Int64).int64_value(&[]), if name == "F8_E4M3" { 2 } else { 6 });
        }
    }

    #[test]
    fn fp8_is_read_wider_and_scaled() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.safetensors");
        // 1.0 is 0x38 in E4M3; -2 is 0xc0.
        let entry = |name: &str, dtype: &str, shape: &str, from: usize, to: usize| {
            format!(r#""{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{from},{to}]}}"#)
        };
        let header = [
            entry("plain.weight", "F8_E4M3", "[2,2]", 0, 4),
            entry("rows.weight", "F8_E4M3", "[2,2]", 4, 8),
            entry("rows.scale_weight", "F32", "[2,1]", 8, 16),
            entry("one.weight", "F8_E4M3", "[2]", 16, 18),
            entry("one.scale_weight", "F32", "[]", 18, 22),
            entry("bad.weight", "F8_E4M3", "[2]", 22, 24),
            entry("bad.scale_weight", "F32", "[3]", 24, 36),
        ];
        let bytes = [0x38, 0xc0, 0x38, 0xc0];
        let number = |x: f32| x.to_le_bytes();
        let all =
            [&bytes[..], &bytes[..], &number(0.1), &number(10.0), &bytes[..2], &number(0.5), &bytes[..2], &[0; 12]];
        raw(&path, &format!("{{{}}}", header.join(",")), &all.concat());
        let file = TensorFile::open(&path).unwrap();
        let values = |tensor: Tensor| Vec::<f32>::try_from(tensor.to_kind(Kind::Float).view(-1)).unwrap();
        assert_eq!(file.kind("plain.weight").unwrap(), Kind::Half);
        assert_eq!(values(file.tensor("plain.weight").unwrap()), [1.0, -2.0, 1.0, -2.0]);
        assert_eq!(file.kind("rows.weight").unwrap(), Kind::Float);
        assert_eq!(values(file.tensor("rows.weight").unwrap()), [0.1, -0.2, 10.0, -20.0]);
        assert_eq!(values(file.rows("rows.weight", 1, 1).unwrap()), [10.0, -20.0]);
        assert_eq!(values(file.tensor("one.weight").unwrap()), [0.5, -1.0]);
        let error = format!("{:#}", file.tensor("bad.weight").unwrap_err());
        assert!(error.contains("bad.scale_weight") && error.contains("3 numbers"), "{error}");
        assert_eq!(file.unscaled_names(), ["bad.weight", "one.weight", "plain.weight", "rows.weight"]);
    }

    #[test]
    fn two_tensors_in_one_place_or_of_one_name_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.safetensors");
        for header in [
            r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#,
            r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#,
            r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#,
        ] {
            raw(&path, header, &[0; 8]);
            let message = format!("{:#}", TensorFile::open(&path).map(|_| ()).unwrap_err());
            assert!(message.contains("is not a whole safetensors file"), "{message}");
        }
    }

    #[test]
    fn damaged_files_are_refused_in_one_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        let tensor = Tensor::ones([64], (Kind::Float, Device::Cpu));
        write_safetensors(&path, [("x", &tensor)], None, &BTreeMap::new()).unwrap();
        let whole = fs::read(&path).unwrap();
        // Every truncation; then headers that lie.
        let mut hostile: Vec<Vec<u8>> = (0..whole.len()).step_by(5).map(|n| whole[..n].to_vec()).collect();
        hostile.push([whole.as_slice(), b"tail"].concat());
        hostile.push([&u64::MAX.to_le_bytes(), &whole[8..]].concat());
        hostile.push(b"PK\x03\x04 a zip, as torch.save writes".to_vec());
        hostile.push(Vec::new());
        for header in [
            r#"{"x":{"dtype":"F32","shape":[1000000000000,1000000000000],"data_offsets":[0,8]}}"#,
            r#"{"x":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}"#,
            r#"{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,80]}}"#,
            r#"{"x":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}}"#,
            r#"{"x":{"dtype":"complex","shape":[2],"data_offsets":[0,8]}}"#,
            r#"["x"]"#,
        ] {
            hostile.push([&(header.len() as u64).to_le_bytes(), header.as_bytes(), &[0; 8]].concat());
        }
        for bytes in hostile {
            fs::write(&path, &bytes).unwrap();
            let message = format!("{:#}", TensorFile::open(&path).map(|_| ()).unwrap_err());
            assert!(message.contains("model.safetensors") && !message.contains('\n'), "{message}");
        }
    }
}
