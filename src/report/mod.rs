//! What a run shows and leaves behind: a progress line, `metrics.jsonl`, TensorBoard event files, pictures.

mod html;
mod metrics;
pub mod pictures;
mod progress;
mod tensorboard;

pub use html::write_report;
pub use metrics::Metrics;
pub use progress::{Copying, Progress, duration};
pub use tensorboard::{TensorBoard, is_caught};
