//! What a run shows and leaves behind: `metrics.jsonl`, TensorBoard event files, pictures.

mod html;
mod metrics;
pub mod pictures;
mod tensorboard;

pub use html::write_report;
pub use metrics::Metrics;
pub use tensorboard::{TensorBoard, is_caught};
