//! Final pictures, judged: by a CLIP, which says how well a picture fits its prompt and which of several things it shows,
//! and beside the pictures that another model draws from the same noise.
//!
//! | file | what |
//! |---|---|
//! | `clip` | a CLIP that is ready to judge |
//! | `preprocess` | how pictures are made ready for it |
//! | `prompts` | prompts from a file, with what their pictures are to show |
//! | `labels` | what a picture shows, by the texts that it is closest to |
//! | `score` | scores of pictures, gathered by prompt |
//! | `interval` | how far a mean over prompts may be off |

mod clip;
mod interval;
mod labels;
mod preprocess;
mod prompts;
mod score;

pub use clip::Clip;
pub use interval::{Interval, interval};
pub use labels::Choices;
pub use preprocess::Preprocessor;
pub use prompts::{JudgedPrompt, LabelTexts, read_labels, read_prompts};
pub use score::{Metric, Scores, psnr, right};
