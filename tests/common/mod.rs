//! What several tests need: the shared data beside the checkout, the independent checker, a small UNet.

// Each test takes what it needs of it.
#![allow(dead_code)]

use std::ffi::OsString;
use std::path::PathBuf;

use palettist::networks::unet::UnetConfig;
use serde_json::{Value, json};

/// The folder or file `name` of the shared data: in `../shared/data` or in $PALETTIST_SHARED. Without it, `None` and a
/// word on why the test does nothing.
pub fn shared(name: &str) -> Option<PathBuf> {
    let beside = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../shared/data"));
    let named = std::env::var_os("PALETTIST_SHARED").map(PathBuf::from);
    let found = [Some(beside), named].into_iter().flatten().map(|data| data.join(name)).find(|path| path.exists());
    if found.is_none() {
        eprintln!("skipped: no {name} in ../shared/data or in $PALETTIST_SHARED");
    }
    found
}

/// A Python with coremltools 9 and torch ($PALETTIST_PYTHON), and the folder of the independent checker of packages.
/// Without them, `None` and a word on why the test does nothing.
pub fn checker() -> Option<(OsString, PathBuf)> {
    let tools = shared("../tools")?;
    let python = std::env::var_os("PALETTIST_PYTHON").filter(|_| tools.join("mlpackage_eval.py").exists());
    if python.is_none() {
        eprintln!("skipped: needs the shared checker and PALETTIST_PYTHON, a Python with coremltools 9 and torch");
    }
    Some((python?, tools))
}

/// A UNet of two blocks, one with attention. `heads` is `attention_head_dim`; `linear` is `use_linear_projection`.
pub fn small_unet(sample_size: i64, channels: [i64; 2], heads: Value, linear: bool) -> UnetConfig {
    UnetConfig::from_json(&json!({
        "_class_name": "UNet2DConditionModel",
        "sample_size": sample_size,
        "block_out_channels": channels,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "layers_per_block": 1,
        "attention_head_dim": heads,
        "cross_attention_dim": 40,
        "norm_num_groups": 8,
        "use_linear_projection": linear,
    }))
    .unwrap()
}
