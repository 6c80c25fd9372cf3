//! Core ML packages: writing, reading back, running.
//!
//! | file | what |
//! |---|---|
//! | [`proto`] | the protobuf messages |
//! | [`blob`] | weight.bin |
//! | [`program`] | a MIL program, built operation by operation |
//! | [`lower`] | the vocabulary's interpreter that builds one |
//! | [`package`] | the folder |
//! | [`export`] | what Apple's programs expect of a UNet |

pub mod blob;
pub mod export;
pub mod lower;
pub mod package;
pub mod program;
pub mod proto;
