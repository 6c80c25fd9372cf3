//! Files, whatever they hold for the program: written whole or not at all, and read with no trust in them.
//!
//! | file | what |
//! |---|---|
//! | `atomic` | files and folders that are either whole or not there |
//! | `beside` | names of the files that others are written as, and what killed processes left of them |
//! | `rename` | renames that replace nothing, and exchanges of two names |
//! | `checksum` | whether what is read is what was written |
//! | `safetensors` | writing safetensors files |
//! | `tensor_file` | reading them |
//! | `writable` | whether files can be written to a folder |
//! | `json` | reading texts and JSON files |
//! | `known` | what a file is that is not what its name says |

mod atomic;
pub(crate) mod beside;
mod checksum;
pub(crate) mod json;
mod known;
pub(crate) mod rename;
mod safetensors;
mod tensor_file;
mod writable;

pub(crate) use atomic::settle;
pub use atomic::{
    at_place, flush_renames, is_full_disk, remove, replace_folder, write_atomically, write_bytes, write_file,
    write_folder,
};
pub use checksum::crc32;
pub use safetensors::{is_floating, write_safetensors};
pub use tensor_file::{TensorFile, is_scale};
pub use writable::{NotAFolder, check_writable};

/// Bytes in hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
