//! Writes safetensors files whose bytes depend on nothing but their contents (the `safetensors` crate keeps metadata in
//! hash order), one tensor in memory at a time.

use std::collections::BTreeMap;
use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail};
use safetensors::tensor::Dtype;
use tch::{Device, Kind, Tensor};

use super::atomic::write_file;
use super::checksum::Summing;

/// Writes a safetensors file through [`write_atomically`](super::write_atomically). With `kind`, floating-point tensors are converted to it;
/// tensors of other types, and all of them without `kind`, keep their own. Returns the CRC-32 of the file.
///
/// # Errors
/// A tensor of a type the format lacks (named), or what [`write_atomically`](super::write_atomically) reports.
pub fn write_safetensors<'t>(
    path: &Path,
    tensors: impl IntoIterator<Item = (&'t str, &'t Tensor)>,
    kind: Option<Kind>,
    metadata: &BTreeMap<String, String>,
) -> Result<u32> {
    let mut tensors = tensors
        .into_iter()
        .map(|(name, tensor)| {
            let own = tensor.f_kind().with_context(|| format!("tensor `{name}`"))?;
            let stored = kind.filter(|_| is_floating(own)).unwrap_or(own);
            let dtype = dtype_of(stored).ok_or_else(|| anyhow!("tensor `{name}`: safetensors has no {stored:?}"))?;
            Ok((name, tensor, stored, dtype))
        })
        .collect::<Result<Vec<_>>>()?;
    // Wide types first, as the format recommends: every tensor is then aligned to its type.
    tensors.sort_by(|(a, _, _, left), (b, _, _, right)| right.cmp(left).then(a.cmp(b)));

    let mut header = serde_json::Map::new();
    if !metadata.is_empty() {
        header.insert("__metadata__".into(), serde_json::to_value(metadata)?);
    }
    let mut offset = 0;
    for (name, tensor, _, dtype) in &tensors {
        let end = offset + tensor.numel() * dtype.bitsize() / 8;
        let entry = serde_json::json!({ "dtype": dtype, "shape": tensor.size(), "data_offsets": [offset, end] });
        if header.insert((*name).to_owned(), entry).is_some() {
            bail!("two tensors are named `{name}`");
        }
        offset = end;
    }
    let mut header = serde_json::to_vec(&header)?;
    header.resize(header.len().next_multiple_of(8), b' ');

    let mut sum = 0;
    write_file(path, |file| {
        let context = || format!("cannot write {}", path.display());
        let mut file = Summing::new(BufWriter::with_capacity(1 << 20, file));
        file.write_all(&(header.len() as u64).to_le_bytes()).with_context(context)?;
        file.write_all(&header).with_context(context)?;
        for (name, tensor, stored, _) in &tensors {
            let bytes = tensor_bytes(tensor, *stored).with_context(|| format!("tensor `{name}`"))?;
            file.write_all(&bytes).with_context(context)?;
        }
        sum = file.sum();
        file.flush().with_context(context)
    })?;
    Ok(sum)
}

/// The values of a tensor as `kind`, row-major, little-endian.
fn tensor_bytes(tensor: &Tensor, kind: Kind) -> Result<Vec<u8>> {
    let tensor = tensor.f_detach()?.f_to_device(Device::Cpu)?.f_to_kind(kind)?.f_contiguous()?;
    let mut bytes = vec![0; tensor.numel() * kind.elt_size_in_bytes()];
    tensor.f_copy_data_u8(&mut bytes, tensor.numel())?;
    Ok(bytes)
}

/// Whether a type holds floating-point numbers.
pub fn is_floating(kind: Kind) -> bool {
    matches!(kind, Kind::Half | Kind::BFloat16 | Kind::Float | Kind::Double)
}

fn dtype_of(kind: Kind) -> Option<Dtype> {
    TYPES.iter().find(|(own, _)| *own == kind).map(|&(_, dtype)| dtype)
}

pub(super) fn kind_of(dtype: Dtype) -> Option<Kind> {
    TYPES.iter().find(|(_, stored)| *stored == dtype).map(|&(kind, _)| kind)
}

/// libtorch's types and the format's.
const TYPES: [(Kind, Dtype); 10] = [
    (Kind::Float, Dtype::F32),
    (Kind::Half, Dtype::F16),
    (Kind::BFloat16, Dtype::BF16),
    (Kind::Double, Dtype::F64),
    (Kind::Int64, Dtype::I64),
    (Kind::Int, Dtype::I32),
    (Kind::Int16, Dtype::I16),
    (Kind::Int8, Dtype::I8),
    (Kind::Uint8, Dtype::U8),
    (Kind::Bool, Dtype::BOOL),
];

#[cfg(test)]
mod tests {
    use std::fs;

    use super::super::TensorFile;
    use super::*;

    #[test]
    fn tensors_survive_a_round_trip_and_bytes_do_not_vary() {
        let folder = tempfile::tempdir().unwrap();
        let options = (Kind::Float, Device::Cpu);
        let tensors = [
            ("half", Tensor::randn([3, 5], options).to_kind(Kind::Half)),
            ("brain", Tensor::randn([7], options).to_kind(Kind::BFloat16)),
            ("turned", Tensor::randn([4, 6], options).transpose(0, 1)),
            ("ids", Tensor::from_slice(&[1i64, -2])),
            ("bytes", Tensor::from_slice(&[1u8, 2, 255])),
            ("empty", Tensor::zeros([0, 3], options)),
            ("scalar", Tensor::from(3.5f64)),
        ];
        let metadata: BTreeMap<_, _> = (0..9).map(|i| (format!("key {i}"), format!("value {i}"))).collect();
        let list = || tensors.iter().map(|(name, tensor)| (*name, tensor));
        let paths = ["a", "b"].map(|name| folder.path().join(name));
        write_safetensors(&paths[0], list(), None, &metadata).unwrap();
        write_safetensors(&paths[1], list().collect::<Vec<_>>().into_iter().rev(), None, &metadata).unwrap();
        assert_eq!(fs::read(&paths[0]).unwrap(), fs::read(&paths[1]).unwrap());

        let file = TensorFile::open(&paths[0]).unwrap();
        assert_eq!(file.metadata(), metadata);
        assert_eq!(file.names(), ["brain", "bytes", "empty", "half", "ids", "scalar", "turned"]);
        for (name, tensor) in list() {
            let read = file.tensor(name).unwrap();
            assert_eq!((read.kind(), read.size()), (tensor.kind(), tensor.size()), "{name}");
            assert!(read.equal(tensor), "{name}");
        }

        write_safetensors(&paths[1], list(), Some(Kind::Half), &metadata).unwrap();
        let file = TensorFile::open(&paths[1]).unwrap();
        assert_eq!(file.kind("turned").unwrap(), Kind::Half);
        assert_eq!(file.kind("ids").unwrap(), Kind::Int64);
    }
}
