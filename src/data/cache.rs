//! Tensors on the disk under the hash of all they were made from.
//!
//! Latents and text embeddings cost far more to make than to read. A tensor's key is the SHA-256 of its ingredients
//! (a picture's bytes, the transform, the autoencoder's configuration and weights), so a changed caption or another
//! autoencoder is simply another key: nothing in the cache is ever stale, and runs may share one. Files appear whole or not at all,
//! and carry their key and a hash of their own; one that was damaged or renamed is made again.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};
use tch::{Device, Tensor};

use crate::files::beside::tidy;
use crate::files::{TensorFile, hex, write_safetensors};
use crate::ops::Weights;

/// What a cached tensor was made from, hashed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key([u8; 32]);

impl Key {
    /// The key of these ingredients, in this order. Each is hashed with its length: `["ab", "c"]` is not `["a", "bc"]`.
    pub fn of(ingredients: &[&[u8]]) -> Self {
        let mut hash = Sha256::new();
        for ingredient in ingredients {
            hash.update((ingredient.len() as u64).to_le_bytes());
            hash.update(ingredient);
        }
        Self(hash.finalize().into())
    }

    /// The key of what is made from a file, by the [hash](super::manifest::sha256) of its bytes, a transform and a network.
    pub fn of_file(sha256: &str, transform: &str, network: &Key) -> Self {
        Self::of(&[sha256.as_bytes(), transform.as_bytes(), &network.0])
    }

    /// The hash itself, as an ingredient of other keys.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(&hex(&self.0))
    }
}

/// The key of a network: how it computes, and its weights.
///
/// # Errors
/// What libtorch reports for a tensor (named).
pub fn network_key(config: &impl fmt::Debug, weights: &Weights) -> Result<Key> {
    Ok(Key::of(&[format!("{config:?}").as_bytes(), hash_weights(weights)?.bytes()]))
}

/// The key of tensors: their names, types, shapes and values.
///
/// # Errors
/// What libtorch reports for a tensor (named).
pub fn hash_weights(weights: &Weights) -> Result<Key> {
    let mut names: Vec<&String> = weights.keys().collect();
    names.sort();
    let mut parts = Vec::with_capacity(names.len());
    for name in names {
        let part = hash_tensor(&weights[name]).with_context(|| format!("tensor `{name}`"))?;
        parts.push(Key::of(&[name.as_bytes(), &part.0]));
    }
    Ok(Key::of(&parts.iter().map(Key::bytes).collect::<Vec<_>>()))
}

/// The key of one tensor: type, shape, values.
fn hash_tensor(tensor: &Tensor) -> Result<Key> {
    let kind = tensor.f_kind()?;
    let tensor = tensor.f_detach()?.f_to_device(Device::Cpu)?.f_contiguous()?;
    let mut bytes = vec![0; tensor.numel() * kind.elt_size_in_bytes()];
    tensor.f_copy_data_u8(&mut bytes, tensor.numel())?;
    let shape = format!("{kind:?} {:?}", tensor.size());
    Ok(Key::of(&[shape.as_bytes(), &bytes]))
}

/// A folder of cached tensors.
#[derive(Clone, Debug)]
pub struct Cache {
    folder: PathBuf,
    /// Shared by all that use the folder: who holds it alone knows that nobody writes there.
    _used: Option<Arc<File>>,
}

/// Removes what killed processes left half written in the folders of a cache.
fn remove_parts(folder: &Path) {
    let names_two = |name: &str| name.len() == 2 && name.bytes().all(|byte| byte.is_ascii_hexdigit());
    let inner = fs::read_dir(folder).into_iter().flatten().flatten();
    inner.filter(|inner| inner.file_name().to_str().is_some_and(names_two)).for_each(|inner| tidy(&inner.path()));
}

/// The name of the one tensor in a cache file.
const NAME: &str = "value";

impl Cache {
    /// Opens the cache in `folder`, making the folder where needed. What killed processes left half written is removed,
    /// unless another process uses the cache.
    ///
    /// # Errors
    /// The folder cannot be made (named).
    pub fn open(folder: &Path) -> Result<Self> {
        fs::create_dir_all(folder).with_context(|| format!("cannot make the cache folder {}", folder.display()))?;
        // Without locks, on some network disks, nothing is removed.
        let used = File::open(folder).ok().filter(|file| {
            if file.try_lock().is_ok() {
                remove_parts(folder);
            }
            file.lock_shared().is_ok()
        });
        Ok(Self { folder: folder.to_owned(), _used: used.map(Arc::new) })
    }

    /// Where the tensor of `key` is or would be kept.
    pub fn path(&self, key: &Key) -> PathBuf {
        let name = key.to_string();
        // 256 folders: no folder grows beyond what file systems and people like.
        self.folder.join(&name[..2]).join(format!("{}.safetensors", &name[2..]))
    }

    /// The tensor of `key`, on the CPU; `None` when it is not there or was damaged.
    pub fn get(&self, key: &Key) -> Option<Tensor> {
        let file = TensorFile::open(&self.path(key)).ok()?;
        if *file.metadata().get("key")? != key.to_string() {
            return None;
        }
        let tensor = file.tensor(NAME).ok()?;
        let whole = hash_tensor(&tensor).ok()?.to_string() == *file.metadata().get("sha256")?;
        whole.then_some(tensor)
    }

    /// Keeps `tensor` under `key`.
    ///
    /// # Errors
    /// The file cannot be written (named).
    pub fn put(&self, key: &Key, tensor: &Tensor) -> Result<()> {
        let metadata = BTreeMap::from([
            ("key".to_owned(), key.to_string()),
            ("sha256".to_owned(), hash_tensor(tensor)?.to_string()),
        ]);
        write_safetensors(&self.path(key), [(NAME, tensor)], None, &metadata)
            .with_context(|| format!("cannot write to the cache {}", self.folder.display()))?;
        Ok(())
    }

    /// The tensor of `key`, on the CPU, made and kept when it is not there.
    ///
    /// # Errors
    /// What `make` returns, or [`Cache::put`].
    pub fn get_or_make(&self, key: &Key, make: impl FnOnce() -> Result<Tensor>) -> Result<Tensor> {
        if let Some(tensor) = self.get(key) {
            return Ok(tensor);
        }
        let tensor = make()?.f_detach()?.f_to_device(Device::Cpu)?;
        self.put(key, &tensor)?;
        Ok(tensor)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use tch::Kind;

    use super::*;
    use crate::data::Transform;

    #[test]
    fn a_cached_tensor_is_made_once_and_again_when_damaged() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::open(&folder.path().join("cache")).unwrap();
        let key = Key::of(&[b"picture", b"transform"]);
        let tensor = Tensor::randn([4, 3], (Kind::Float, Device::Cpu)).to_kind(Kind::BFloat16);
        let mut made = 0;
        let mut ask = || {
            cache
                .get_or_make(&key, || {
                    made += 1;
                    Ok(tensor.shallow_clone())
                })
                .unwrap()
        };
        assert!(ask().equal(&tensor) && ask().equal(&tensor));
        let file = cache.path(&key);
        let whole = fs::read(&file).unwrap();
        let mut flipped = whole.clone();
        *flipped.last_mut().unwrap() ^= 1;
        for damaged in [&whole[..whole.len() - 3], &flipped[..], b""] {
            fs::write(&file, damaged).unwrap();
            assert!(ask().equal(&tensor));
            assert_eq!(fs::read(&file).unwrap(), whole, "the cache is not mended");
        }
        // Nor is the tensor of another key, under this one's name.
        let other = Key::of(&[b"another"]);
        cache.put(&other, &Tensor::from_slice(&[7f32])).unwrap();
        fs::copy(cache.path(&other), &file).unwrap();
        assert!(ask().equal(&tensor));
        assert_eq!(made, 5);
        assert!(cache.get_or_make(&Key::of(&[b"other"]), || anyhow::bail!("no memory")).is_err());
    }

    #[test]
    fn what_a_killed_process_left_half_written_is_removed_once_nobody_uses_the_cache() {
        let folder = tempfile::tempdir().unwrap();
        let user = Cache::open(folder.path()).unwrap();
        let key = Key::of(&[b"x"]);
        user.put(&key, &Tensor::from_slice(&[1f32])).unwrap();
        let part = user.path(&key).with_file_name(".abc.safetensors.123-0.part");
        fs::write(&part, "half").unwrap();
        let other = Cache::open(folder.path()).unwrap();
        assert!(part.exists(), "another process may be writing it");
        drop((user, other));
        assert!(Cache::open(folder.path()).unwrap().get(&key).is_some() && !part.exists());
    }

    #[test]
    fn a_key_changes_with_every_ingredient() {
        let weights = |value: f64, shape: &[i64], kind| {
            let tensor = Tensor::full(shape, value, (kind, Device::Cpu));
            hash_weights(&[("encoder.weight".to_owned(), tensor)].into()).unwrap()
        };
        // A network that computes otherwise with the same weights is another.
        let same = [("weight".to_owned(), Tensor::from_slice(&[1f32]))].into();
        let computed = |how: &str| network_key(&how, &same).unwrap();
        assert_eq!(computed("gelu"), computed("gelu"));
        assert_ne!(computed("gelu"), computed("quick_gelu"));
        let network = weights(1.0, &[2, 3], Kind::Float);
        assert_eq!(network, weights(1.0, &[2, 3], Kind::Float));
        let networks = [
            network,
            weights(2.0, &[2, 3], Kind::Float),
            weights(1.0, &[3, 2], Kind::Float),
            weights(1.0, &[2, 3], Kind::Half),
        ];
        let transforms = [
            Transform::center(64, 64),
            Transform::center(64, 32),
            Transform { flip: true, ..Transform::center(64, 64) },
        ];
        let mut keys = BTreeSet::new();
        for network in &networks {
            for transform in transforms {
                for sha256 in ["of one picture", "of another"] {
                    keys.insert(Key::of_file(sha256, &transform.describe(), network).to_string());
                }
            }
        }
        assert_eq!(keys.len(), 4 * 3 * 2);
        assert_ne!(Key::of(&[b"ab", b"c"]), Key::of(&[b"a", b"bc"]));
    }
}
