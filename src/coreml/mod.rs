//! Core ML packages: writing, reading back, running.
//!
//! | file | what |
//! |---|---|
//! | [`proto`] | the protobuf messages |
//! | [`blob`] | weight.bin |
//! | [`program`] | a MIL program, built operation by operation |
//! | `palettes` | palettes as its constants |
//! | [`weights`] | where its weights come from |
//! | [`lower`] | the vocabulary's interpreter that builds one |
//! | `operations` | single operations that it appends |
//! | `norms` | its word `group_norm` |
//! | [`attention`] | its word `attention` for the Neural Engine |
//! | `recipes` | its words that MIL spells with several operations |
//! | `text`, `safety` | its words for text encoders and for the safety checker |
//! | [`velocity`] | networks that predict v, as such that predict ε |
//! | [`package`] | the folder |
//! | `place` | and putting it in its place |
//! | [`metadata`] | what a package says about itself |
//! | [`interface`] | inputs and outputs of a network, and writing it |
//! | [`export`] | what Apple's programs expect of a UNet |
//! | [`components`] | and of the text encoder and the autoencoder |
//! | [`apple`] | what they take for granted of every model |
//! | [`prompt`] | what a text encoder is fed |
//! | [`cost`] | what palettes take in a package |
//! | [`chunk`] | a package in two |
//! | [`bundle`] | what apps need beside packages |
//! | [`read`] | reading a package back and running it |
//! | [`verify`] | a package against the network it was made from |
//! | [`layers`] | the same, layer by layer |
//! | [`parameters`] | its parameters, against the network's |

pub mod apple;
pub mod attention;
pub mod blob;
pub mod bundle;
pub mod chunk;
pub mod components;
pub mod cost;
pub mod export;
pub mod interface;
pub mod layers;
pub mod lower;
pub mod metadata;
mod norms;
mod operations;
pub mod package;
mod palettes;
pub mod parameters;
mod place;
pub mod program;
pub mod prompt;
pub mod proto;
pub mod read;
mod recipes;
mod safety;
mod text;
pub mod velocity;
pub mod verify;
pub mod weights;
