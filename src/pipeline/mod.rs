//! Networks that work together: prompt to picture, and what a model can do.
//!
//! | file | what |
//! |---|---|
//! | [`text_to_image`] | what a model can do, and whether its networks fit each other |
//! | [`condition`] | texts through the text encoders, and what a UNet is told of a picture |
//! | [`drawing`] | the pipeline: prompt, text encoders, UNet under a sampler, decoder |

pub mod condition;
pub mod drawing;
pub mod text_to_image;

pub use condition::{Conditioning, TextEncoder};
pub use drawing::{Output, Pipeline, Request};
pub use text_to_image::TextToImage;
