//! Files that are either whole or not there, and safetensors files.
//!
//! Everything this program writes is written beside its destination, flushed to the disk and renamed: a reader, a
//! killed run or a full disk never meets half a file. Files are world-readable (mode 644), as other tools expect.
//!
//! [`TensorFile`] reads a safetensors file. [`write_safetensors`] writes one whose bytes depend on nothing but its
//! contents (the `safetensors` crate keeps metadata in hash order), one tensor in memory at a time.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use safetensors::tensor::Dtype;
use tch::{Device, Kind, Tensor};

use super::beside::{
    NEW, OLD, PART, beside, create, folder_of, hold, leftovers, missing_folders, remove_empty, remove_leftovers, tidy,
};
pub use super::tensor_file::TensorFile;

/// Calls `write` with a temporary path beside `path`, then moves what it wrote (a file or a folder) to `path`.
/// A file that exists there is replaced; a folder that exists there is not.
///
/// # Errors
/// What `write` returned, or one line when the disk is full or the folder cannot be written. Nothing is left over.
pub fn write_atomically(path: &Path, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    path.file_name().with_context(|| format!("`{}` does not name a file", path.display()))?;
    let (folder, part) = (folder_of(path), beside(path, PART));
    let made = missing_folders(folder);
    let written = fs::create_dir_all(folder)
        .with_context(|| format!("cannot create the folder {}", folder.display()))
        .and_then(|()| write(&part))
        .and_then(|()| settle(&part).with_context(|| format!("cannot write {}", path.display())))
        .and_then(|()| fs::rename(&part, path).with_context(|| format!("cannot write {}", path.display())));
    if let Err(error) = written {
        // Whichever of the two it is; if neither can be removed, the error that matters is still the first one.
        let _ = fs::remove_file(&part).or_else(|_| fs::remove_dir_all(&part));
        remove_empty(&made);
        return Err(at_place(error, path));
    }
    flush_renames(folder);
    Ok(())
}

/// A rename lasts once the folder is flushed; a file system that cannot do that is no reason to fail.
pub fn flush_renames(folder: &Path) {
    if let Ok(folder) = File::open(folder) {
        let _ = folder.sync_all();
    }
}

/// Writes a file through [`write_atomically`], held while it is written, so that nobody takes it for a leftover.
///
/// # Errors
/// As [`write_atomically`].
pub fn write_file(path: &Path, write: impl FnOnce(&File) -> Result<()>) -> Result<()> {
    let mut held = None;
    write_atomically(path, |part| {
        let file = create(part).with_context(|| format!("cannot write {}", path.display()))?;
        write(held.insert(file))
    })
}

/// Writes `bytes` to `path` through [`write_file`].
pub fn write_bytes(path: &Path, bytes: &[u8]) -> Result<()> {
    write_file(path, |mut file| file.write_all(bytes).with_context(|| format!("cannot write {}", path.display())))
}

/// Writes a new folder through [`write_atomically`], held while it is written. `write` fills the folder that it is given.
///
/// # Errors
/// As [`write_atomically`]; a folder is at `path` already.
pub fn write_folder(path: &Path, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    remove_leftovers(path, PART);
    let mut held = None;
    let written = write_atomically(path, |part| {
        fs::create_dir(part).with_context(|| format!("cannot create {}", path.display()))?;
        held = hold(part);
        write(part)
    });
    drop(held);
    written
}

/// As [`write_folder`], and replaces a folder that is there: the new one is whole on the disk before two renames put it in
/// the place of the old. A process that is killed between them leaves both beside, and `beside::tidy` puts one back.
///
/// # Errors
/// As [`write_folder`]; the old folder is there then.
pub fn replace_folder(path: &Path, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let ours = leftovers(folder_of(path)).into_iter().any(|(_, place, _)| place.file_name() == path.file_name());
    if ours {
        tidy(folder_of(path));
    }
    if !path.exists() {
        return write_folder(path, write);
    }
    let (new, old) = (beside(path, NEW), beside(path, OLD));
    write_folder(&new, write).map_err(|error| at_place(error, path))?;
    let context = || format!("cannot replace {}", path.display());
    fs::rename(path, &old).with_context(context)?;
    if let Err(error) = fs::rename(&new, path) {
        fs::rename(&old, path).with_context(|| format!("cannot put back {}", path.display()))?;
        return Err(error).with_context(context);
    }
    flush_renames(folder_of(path));
    fs::remove_dir_all(&old).with_context(|| format!("cannot remove {}", old.display()))
}

/// A disk or a quota is full. Of nested writes the outermost names its path: the inner ones are temporary.
#[derive(Debug, thiserror::Error)]
#[error("no space left for {}: nothing was written; free some space there and run again", path.display())]
struct NoSpace {
    path: PathBuf,
}

/// What went wrong with a file that was to become `path`, told of `path` where the disk is full.
pub fn at_place(error: anyhow::Error, path: &Path) -> anyhow::Error {
    if is_full_disk(&error) { NoSpace { path: path.to_owned() }.into() } else { error }
}

/// Whether an error comes, at the bottom, from a disk or a quota that is full.
pub fn is_full_disk(error: &anyhow::Error) -> bool {
    error.is::<NoSpace>()
        || error.chain().filter_map(|cause| cause.downcast_ref::<io::Error>()).any(|error| {
            matches!(
                error.kind(),
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge
            )
        })
}

/// Flushes to the disk and makes readable for everybody, a folder with all that is in it.
pub(crate) fn settle(path: &Path) -> io::Result<()> {
    // What a link names is somebody else's.
    if path.is_symlink() {
        return Ok(());
    }
    let folder = path.is_dir();
    if folder {
        for entry in fs::read_dir(path)? {
            settle(&entry?.path())?;
        }
    }
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        fs::set_permissions(path, fs::Permissions::from_mode(if folder { 0o755 } else { 0o644 }))?;
    }
    if folder { Ok(()) } else { File::open(path)?.sync_all() }
}

/// Writes a safetensors file through [`write_atomically`]. With `kind`, floating-point tensors are converted to it;
/// tensors of other types, and all of them without `kind`, keep their own.
///
/// # Errors
/// A tensor of a type the format lacks (named), or what [`write_atomically`] reports.
pub fn write_safetensors<'t>(
    path: &Path,
    tensors: impl IntoIterator<Item = (&'t str, &'t Tensor)>,
    kind: Option<Kind>,
    metadata: &BTreeMap<String, String>,
) -> Result<()> {
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

    write_file(path, |file| {
        let context = || format!("cannot write {}", path.display());
        let mut file = BufWriter::with_capacity(1 << 20, file);
        file.write_all(&(header.len() as u64).to_le_bytes()).with_context(context)?;
        file.write_all(&header).with_context(context)?;
        for (name, tensor, stored, _) in &tensors {
            let bytes = tensor_bytes(tensor, *stored).with_context(|| format!("tensor `{name}`"))?;
            file.write_all(&bytes).with_context(context)?;
        }
        file.flush().with_context(context)
    })
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
    use super::*;

    fn names_in(folder: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_full_disk_is_one_line_and_leaves_the_old_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("weights.safetensors");
        write_bytes(&path, b"old").unwrap();
        let error = write_atomically(&path, |part| {
            fs::write(part, b"half")?;
            Err(io::Error::from(io::ErrorKind::StorageFull)).context("cannot write")
        })
        .unwrap_err();
        assert!(format!("{error:#}").starts_with("no space left for "), "{error:#}");
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(names_in(folder.path()), ["weights.safetensors"]);

        // A file within a folder that is itself written beside its place: the message names the place.
        let model = folder.path().join("model");
        let error = write_atomically(&model, |part| {
            write_atomically(&part.join("unet/a"), |_| Err(io::Error::from(io::ErrorKind::StorageFull).into()))
        })
        .unwrap_err();
        let message = format!("{error:#}");
        assert!(message.starts_with(&format!("no space left for {}:", model.display())), "{message}");
        assert_eq!(names_in(folder.path()), ["weights.safetensors"]);
    }

    #[test]
    fn a_folder_is_moved_whole_and_never_over_another() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model");
        let make = |part: &Path| {
            fs::create_dir(part)?;
            fs::write(part.join("config.json"), b"{}").context("config.json")
        };
        write_atomically(&path, make).unwrap();
        assert_eq!(names_in(&path), ["config.json"]);
        assert!(write_atomically(&path, make).is_err());
        assert_eq!(names_in(folder.path()), ["model"]);
    }

    #[test]
    #[cfg(unix)]
    fn files_are_readable_by_everybody() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.safetensors");
        write_safetensors(&path, [("x", &Tensor::ones([2], (Kind::Float, Device::Cpu)))], None, &BTreeMap::new())
            .unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o644);
    }

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
