//! Pictures, captions, caches and batches.
//!
//! | file | knows |
//! |---|---|
//! | [`set`] | the data set of a config, and everything that is wrong with its folders |
//! | [`folder`] | which pictures a folder holds and what their captions are |
//! | [`listing`] | the files of a folder, by what they are |
//! | `captions` | what a caption is, and what stands for one that is missing |
//! | `metadata`, `sidecars` | captions from one table, captions from a file beside each picture |
//! | `kohya` | folders named `10_sks dog`: repeats and words |
//! | `near_miss` | what was meant to be captions, where none were found |
//! | [`place`] | whether two paths lead to one folder |
//! | [`picture`] | one picture file → a tensor, as diffusers' training scripts make it |
//! | [`look`] | what is noticed of pictures before the work: unreadable, small, there twice |
//! | [`drawn`] | what a picture was drawn from, in the picture |
//! | [`resample`] | Pillow's resize, to the bit |
//! | [`cache`] | tensors on the disk under the hash of all they were made from |
//! | [`manifest`] | what a run learned from, by content |
//! | [`order`] | which sample stands at each position of a run |
//!
//! Data are read before anything is trained: a mistake in the 700th caption is told at once and with all the others
//! ([`Problems`]), not after an hour.

pub mod cache;
mod captions;
pub mod drawn;
pub mod folder;
mod kohya;
pub mod listing;
pub mod look;
pub mod manifest;
mod metadata;
mod near_miss;
pub mod order;
pub mod picture;
pub mod place;
pub mod resample;
pub mod set;
mod sidecars;

pub use cache::{Cache, Key, hash_weights, network_key};
pub use captions::{CaptionOptions, Missing};
pub use folder::{Contents, Sample, read_folder};
pub use listing::is_picture;
pub use manifest::Manifest;
pub use order::{epoch_order, samples_at};
pub use picture::{Crop, Transform, load_bytes, load_picture, picture_size};
pub use resample::Filter;
pub use set::{Class, DataSet};

/// Everything that is wrong with the data, one line each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problems(pub Vec<String>);

impl std::fmt::Display for Problems {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str(&self.0.join("\n"))
    }
}

impl std::error::Error for Problems {}
