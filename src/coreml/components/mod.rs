//! What the package of each network is: its inputs and outputs, its options, what Apple's programs expect of it.
//!
//! | file | what |
//! |---|---|
//! | `parts` | the packages that a model is exported as, by name |
//! | [`unet`] | the UNet |
//! | `text_encoder`, `autoencoder`, `safety_checker` | the other networks |
//! | [`apple`] | what Apple's Swift package takes for granted of every model |
//! | [`cost`] | what palettes take in a package |
//!
//! | package | in | out (fp32) |
//! |---|---|---|
//! | `text_encoder` | `input_ids` `[1, T]`, fp32 | `last_hidden_state` `[1, T, H]`, `pooled_outputs` `[1, H]` |
//! | SDXL's two, the second being `text_encoder_2` | the same | `hidden_embeds`, of the last layer but one; as above |
//! | `vae_decoder` | `z` `[1, 4, h, w]`, fp16 | `image` `[1, 3, 8h, 8w]`, −1…1 |
//! | `vae_encoder` | `x` `[1, 3, 8h, 8w]`, fp16, −1…1 | `latent` `[1, 8, h, w]`: means, then logarithms of variances |
//! | `safety_checker` | `clip_input` `[1, 3, 224, 224]`, `images` `[1, 8h, 8w, 3]`, `adjustment` `[1]`, fp16 | `filtered_images` `[1, 8h, 8w, 3]`, `has_nsfw_concepts` `[1, 1, 1, 1]`, `concept_scores` `[1, 17]` |
//!
//! T, the tokens of a [`Prompt`](super::prompt::Prompt), is 77 but for encoders that were made for longer texts.

pub mod apple;
mod autoencoder;
pub mod cost;
mod parts;
mod safety_checker;
mod text_encoder;
pub mod unet;

pub use autoencoder::{autoencoder_numbers, export_autoencoder};
pub use parts::Part;
pub use safety_checker::export_safety_checker;
pub use text_encoder::{Attended, export_text_encoder};
pub use unet::{UnetOptions, export_unet};
