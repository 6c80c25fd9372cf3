//! LoRAs that are merged into a model before anything else sees its weights, in fp32: `W + w·α/r·B·A` and its relatives.
//!
//! | file | what |
//! |---|---|
//! | `choice` | what a user says of a LoRA: where it is, with which weight |
//! | `place` | where its file lies |
//! | `keys` | names of tensors: which layer, which part of its change |
//! | `adapter` | what PEFT says of an adapter beside its tensors |
//! | `file` | a file's tensors by layer and part |
//! | `form` | which tensors make a change, and whether they fit a weight |
//! | `delta` | the mathematics |
//! | `modules`, `cloneofsimo` | the layers of a model under everybody's names, or counted |
//! | `family` | which models a LoRA was made for |
//! | `merge` | a LoRA that fits a model |
//! | `summary` | what a file holds, in words |

mod adapter;
mod choice;
mod cloneofsimo;
mod delta;
mod family;
mod file;
mod form;
mod keys;
mod merge;
mod modules;
mod place;
mod summary;

use super::Component;
pub use choice::LoraChoice;
pub use merge::Lora;
pub(super) use merge::{Changes, Target};
pub(super) use modules::Modules;
pub use summary::LoraSummary;

/// Where the header of what is made of a model has the LoRAs that were merged into it.
pub const LORAS: &str = "loras";

/// The networks that LoRAs change.
const NETWORKS: [Component; 3] = [Component::Unet, Component::TextEncoder, Component::TextEncoder2];

/// Whether a tensor of this name is a LoRA's.
pub fn is_of_lora(name: &str) -> bool {
    keys::key(name).is_some()
}
