//! Reading packages back from the bytes on disk, and running them.
//!
//! This is how a package can be trusted without a Mac: what was written is read by code that shares nothing with the
//! writer but the protobuf messages, checked against the rules of the format, run with tensors, and compared with the
//! network that was trained. It is also written for packages of others, hence with no trust in them: no file makes it
//! panic, or allocate more than a bounded multiple of the file's own length.
//!
//! | file | what |
//! |---|---|
//! | [`package`](Package) | the folder, its manifest and its description |
//! | `compiled` | the same of a compiled model, from the text of its program |
//! | `file` | a file that is no link and not too long |
//! | `blob` | `weight.bin` |
//! | `types`, `constant`, `program` | the protobuf messages in the reader's own, checked terms |
//! | `signature`, `check` | the rules of a program |
//! | `constexpr`, `blocks` | compressed constants |
//! | `call`, `ops` | types and tensors of each operation |
//! | [`evaluate`](evaluate()) | running a program |
//! | `chain` | packages that run one after the other |
//! | `summary` | what weights cost |
//! | `values` | whether all that is stored is finite |

mod blob;
mod blocks;
mod call;
mod chain;
mod check;
pub mod compiled;
mod constant;
mod constexpr;
mod evaluate;
mod file;
mod ops;
mod package;
mod program;
mod signature;
mod summary;
mod types;
mod values;

pub use chain::{Chain, Chunk};
pub use evaluate::{Precision, evaluate, evaluate_watched, parameter_of, psnr};
pub use package::{Feature, Package};
pub use summary::{Palettes, WeightSummary};
pub use types::{DataType, TensorType};
