//! `coremldata.bin` and `analytics/coremldata.bin`. All numbers are little endian.

use sha2::{Digest, Sha256};

use super::source::Source;

/// The number of an ML Program among the kinds of models.
const ML_PROGRAM: u32 = 502;

/// What the version of the file's form is for a model of this specification version.
fn form(specification_version: i32) -> u32 {
    if specification_version < 8 { 5 } else { specification_version as u32 }
}

/// `coremldata.bin`: the kind of the model, the version, the description as the package has it, and the kind once more for
/// each function.
pub fn coremldata(source: &Source) -> Vec<u8> {
    let mut out = Vec::new();
    out.extend(ML_PROGRAM.to_le_bytes());
    out.extend(form(source.specification_version).to_le_bytes());
    out.extend([0; 20]);
    text(b"generic", &mut out);
    out.extend((source.specification_version as u32).to_le_bytes());
    out.extend([0; 28]);
    let mut description = source.description.clone();
    if source.described.metadata.is_none() {
        // Field 100, empty.
        description.extend([0xa2, 0x06, 0x00]);
    }
    text(&description, &mut out);
    for _ in &source.program.functions {
        out.extend(ML_PROGRAM.to_le_bytes());
        out.extend([0; 12]);
    }
    out
}

/// `analytics/coremldata.bin`: a digest of the model, and the name of its file.
pub fn analytics(model: &[u8], file: &str) -> Vec<u8> {
    let digest = base64(&Sha256::digest(model));
    let sections: [(&str, [(&str, &str); 2]); 2] = [
        ("NeuralNetworkModelDetails", [("containsCustomLayer", "0"), ("modelDimension", "0")]),
        ("SpecificationDetails", [("modelHash", &digest), ("modelName", file)]),
    ];
    let mut out = Vec::new();
    for (name, entries) in sections {
        text(name.as_bytes(), &mut out);
        out.extend((entries.len() as u64).to_le_bytes());
        for (key, value) in entries {
            text(key.as_bytes(), &mut out);
            text(value.as_bytes(), &mut out);
        }
    }
    out
}

/// Bytes with their number before them.
fn text(bytes: &[u8], out: &mut Vec<u8>) {
    out.extend((bytes.len() as u64).to_le_bytes());
    out.extend(bytes);
}

/// RFC 4648, section 4.
fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::new();
    for part in bytes.chunks(3) {
        let bits = (0..3).fold(0usize, |bits, place| bits << 8 | usize::from(part.get(place).copied().unwrap_or(0)));
        for place in 0..4 {
            let digit = char::from(ALPHABET[bits >> (18 - 6 * place) & 63]);
            out.push(if place <= part.len() { digit } else { '=' });
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 4648, section 10.
    #[test]
    fn base64_is_that_of_the_standard() {
        let cases =
            [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foob", "Zm9vYg=="), ("fooba", "Zm9vYmE=")];
        for (bytes, text) in cases {
            assert_eq!(base64(bytes.as_bytes()), text);
        }
    }
}
