//! The script that compiles a bundle with Apple's compiler, on a Mac.

use std::fs;
use std::path::Path;

use sha2::{Digest, Sha256};

use crate::coreml::AttentionImplementation;
use crate::coreml::format::metadata::PackageMetadata;
use crate::files::hex;
use crate::terminal::shell_word;

/// The script that compiles a bundle.
pub const SCRIPT: &str = "compile.sh";

/// What the last line of a script that is as it was written begins with; then comes the digest of what is above.
pub const UNTOUCHED: &str = "# written by palettist export, unchanged: ";

/// Whether a script is as it was written.
pub fn is_untouched(text: &str) -> bool {
    let written = text.trim_end().rsplit_once('\n');
    written.is_some_and(|(above, last)| {
        last.strip_prefix(UNTOUCHED).is_some_and(|known| known == digest(&format!("{above}\n")))
    })
}

pub fn digest(text: &str) -> String {
    hex(&Sha256::digest(text)[..8])
}

/// The shell script that finishes the work on a Mac.
pub fn script(packages: &[(String, &str)], metadata: &PackageMetadata, attention: AttentionImplementation) -> String {
    let compile: String =
        packages.iter().map(|(package, compiled)| format!("    \"$1\" {} {compiled}\n", shell_word(package))).collect();
    let name = metadata.model.rsplit(['/', '\\']).next().unwrap_or_default();
    let variant = match attention {
        AttentionImplementation::Original => "original",
        AttentionImplementation::SplitEinsum => "split_einsum",
        AttentionImplementation::SplitEinsumV2 => "split_einsum_v2",
    };
    include_str!("compile.sh")
        .replace("'@NAME@'", &shell_word(name))
        .replace("'@VARIANT@'", &format!("'{variant}_compiled'"))
        .replace("@COMPILE@\n", &compile)
}

/// Whether there is a bundle in `folder`, with the script that was written for it.
pub fn holds_bundle(folder: &Path) -> bool {
    fs::read_to_string(folder.join(SCRIPT)).is_ok_and(|text| text.contains(UNTOUCHED))
}
