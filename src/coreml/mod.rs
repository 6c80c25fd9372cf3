//! Core ML packages: writing, reading back, running. Each folder uses only those above it.
//!
//! | room | what |
//! |---|---|
//! | `choices` | what a package can be made for: systems, kinds of attention |
//! | [`mod@format`] | the form on the disk: protobuf, weight file, folder |
//! | [`prompt`] | how texts reach a text encoder |
//! | [`writing`] | programs, and networks as programs |
//! | [`components`] | what the package of each network is |
//! | [`reading`] | reading a package back, compiled or not, and running it |
//! | [`compiling`] | packages as the folders that apps load |
//! | [`bundle`] | what apps need beside packages |
//! | [`strangers`] | packages in a folder that do not go with those to be written |
//! | [`exporting`] | what is asked for as one plan, and doing it |
//! | [`verifying`] | a package against the network that it was made from |

pub mod bundle;
mod choices;
pub mod compiling;
pub mod components;
pub mod exporting;
pub mod format;
pub mod prompt;
pub mod reading;
pub mod strangers;
pub mod verifying;
pub mod writing;

pub use choices::{AttentionImplementation, DeploymentTarget};
pub use format::metadata::PackageMetadata;
