//! Figures that a Python with other libraries measures.

use std::ffi::OsStr;
use std::path::Path;
use std::process::Command;

/// The three numbers in the last line that a script of benches/peers prints, run by the Python that $PALETTIST_PEERS names;
/// `None` where there is none, or where it prints something else.
pub fn ask(script: &str, arguments: &[impl AsRef<OsStr>]) -> Option<[f64; 3]> {
    let python = std::env::var_os("PALETTIST_PEERS")?;
    let scripts = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/benches/peers"));
    let output = Command::new(python).arg(scripts.join(script)).args(arguments).output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let numbers: Vec<f64> = text.lines().last()?.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    numbers.try_into().ok()
}
