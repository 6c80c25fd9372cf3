//! The form of a Core ML package on the disk.
//!
//! | file | what |
//! |---|---|
//! | [`proto`] | the protobuf messages of a model and of its program |
//! | [`blob`] | `weight.bin` |
//! | [`metadata`] | what a package says about itself: name, model, licence |
//! | [`package`] | the folder: manifest, model, weights |
//! | [`place`] | how a package comes to its place whole or not at all |

pub mod blob;
pub mod metadata;
pub mod package;
pub mod place;
pub mod proto;
