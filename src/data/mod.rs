//! Pictures, captions, caches and batches.
//!
//! | file | knows |
//! |---|---|
//! | [`folder`] | which pictures a folder holds and what their captions are |
//! | [`picture`] | one picture file → a tensor, as diffusers' training scripts make it |
//! | [`resample`] | Pillow's resize, to the bit |
//! | [`cache`] | tensors on the disk under the hash of all they were made from |
//! | [`manifest`] | what a run learned from, by content |
//! | [`order`] | which samples a step takes, as a function of its number |
//!
//! Data are read before anything is trained: a mistake in the 700th caption is told at once and with all the others
//! ([`Problems`]), not after an hour.

pub mod cache;
pub mod folder;
pub mod manifest;
pub mod order;
pub mod picture;
pub mod resample;

pub use cache::{Cache, Key, hash_weights};
pub use folder::{CaptionOptions, Dreambooth, Missing, Sample, check_pictures, dreambooth, is_picture, read_folder};
pub use manifest::Manifest;
pub use order::{batch_indices, epoch_order};
pub use picture::{Crop, Transform, load_picture, picture_size};
pub use resample::Filter;

/// Everything that is wrong with the data, one line each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problems(pub Vec<String>);

impl std::fmt::Display for Problems {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str(&self.0.join("\n"))
    }
}

impl std::error::Error for Problems {}
