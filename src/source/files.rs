//! Files that are either whole or not there, and safetensors files.
//!
//! Everything this program writes is written beside its destination, flushed to the disk and renamed: a reader, a
//! killed run or a full disk never meets half a file. Files are world-readable (mode 644), as other tools expect.
//!
//! [`TensorFile`] reads a safetensors file through a memory map, so that opening a 3 GB checkpoint costs its header
//! only; nothing in the file is trusted before it is checked. [`write_safetensors`] writes one whose bytes depend on
//! nothing but its contents (the `safetensors` crate keeps metadata in hash order), one tensor in memory at a time.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use safetensors::tensor::{Dtype, Metadata, SafeTensors};
use tch::{Device, Kind, Tensor};

use super::beside::{PART, beside, folder_of, missing_folders, remove_empty};

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

/// Writes `bytes` to `path` through [`write_atomically`].
pub fn write_bytes(path: &Path, bytes: &[u8]) -> Result<()> {
    write_atomically(path, |part| fs::write(part, bytes).with_context(|| format!("cannot write {}", path.display())))
}

/// A disk or a quota is full. Of nested writes the outermost names its path: the inner ones are temporary.
#[derive(Debug, thiserror::Error)]
#[error("no space left for {}: nothing was written; free some space there and run again", path.display())]
struct NoSpace {
    path: PathBuf,
}

/// Whether an error comes, at the bottom, from a disk or a quota that is full.
/// What went wrong with a file that was to become `path`, told of `path` where the disk is full.
pub fn at_place(error: anyhow::Error, path: &Path) -> anyhow::Error {
    if is_full_disk(&error) { NoSpace { path: path.to_owned() }.into() } else { error }
}

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
fn settle(path: &Path) -> io::Result<()> {
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

    write_atomically(path, |part| {
        let context = || format!("cannot write {}", path.display());
        let mut file = BufWriter::with_capacity(1 << 20, File::create(part).with_context(context)?);
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
        let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
        // SAFETY: the map is read-only and its bytes are copied out when a tensor is made. Somebody else truncating
        // the file meanwhile would be a SIGBUS, not undefined behaviour here; this program only replaces by renaming.
        let map = unsafe { memmap2::Mmap::map(&file) }.with_context(|| format!("cannot read {}", path.display()))?;
        if map.len() < 8 {
            bail!("{} is not a safetensors file: it has only {} bytes", path.display(), map.len());
        }
        // A whole header begins with a brace. Seen before it is read: the first bytes of a zipped pickle are a length, too.
        if map.get(8) != Some(&b'{') && (map.starts_with(b"PK") || map[0] == 0x80) {
            bail!(
                "{} is a PyTorch pickle, which can run code and is never read; fetch its .safetensors form",
                path.display()
            );
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

    /// The type of a tensor; an error when it is missing or of a type that libtorch lacks.
    pub fn kind(&self, name: &str) -> Result<Kind> {
        let dtype = self.info(name)?.dtype;
        kind_of(dtype)
            .ok_or_else(|| anyhow!("{}: tensor `{name}` has the type {dtype}, not supported", self.path.display()))
    }

    /// The bytes of a tensor, in the mapped file.
    pub fn bytes(&self, name: &str) -> Result<&[u8]> {
        let (from, to) = self.info(name)?.data_offsets;
        self.map
            .get(self.start + from..self.start + to)
            .ok_or_else(|| anyhow!("{}: tensor `{name}` lies outside the file", self.path.display()))
    }

    /// Copies a tensor to the CPU as it is stored.
    ///
    /// # Errors
    /// No such tensor, or a type that libtorch lacks.
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        let (kind, bytes) = (self.kind(name)?, self.bytes(name)?);
        let shape = self.shape(name).unwrap_or_default();
        let tensor = Tensor::f_from_data_size(bytes, &shape, kind);
        self.let_go(bytes);
        tensor.with_context(|| format!("{}: tensor `{name}`", self.path.display()))
    }

    /// Copies rows of a tensor, `count` along its first axis, to the CPU as they are stored.
    ///
    /// # Errors
    /// No such tensor or rows, or a type that libtorch lacks.
    pub fn rows(&self, name: &str, from: i64, count: i64) -> Result<Tensor> {
        let (kind, bytes) = (self.kind(name)?, self.bytes(name)?);
        let mut shape = self.shape(name).unwrap_or_default();
        let size = shape.iter().skip(1).product::<i64>() as usize * kind.elt_size_in_bytes();
        let place = |row: i64| usize::try_from(row).ok()?.checked_mul(size);
        let rows = place(from).zip(from.checked_add(count).and_then(place));
        let rows = rows.and_then(|(from, to)| bytes.get(from..to));
        let (Some(rows), Some(first)) = (rows, shape.first_mut()) else {
            bail!("{}: tensor `{name}` has no {count} rows from {from} on", self.path.display());
        };
        *first = count;
        let tensor = Tensor::f_from_data_size(rows, &shape, kind);
        self.let_go(rows);
        tensor.with_context(|| format!("{}: tensor `{name}`", self.path.display()))
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

/// Whether a type holds floating-point numbers.
pub fn is_floating(kind: Kind) -> bool {
    matches!(kind, Kind::Half | Kind::BFloat16 | Kind::Float | Kind::Double)
}

fn dtype_of(kind: Kind) -> Option<Dtype> {
    TYPES.iter().find(|(own, _)| *own == kind).map(|&(_, dtype)| dtype)
}

fn kind_of(dtype: Dtype) -> Option<Kind> {
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
