//! What a file is that is not what its name says, by its first bytes: what people download instead of a model.

/// What the bytes are known to be, with what to do about it; `None` for what could be a damaged safetensors file.
pub fn known_otherwise(bytes: &[u8]) -> Option<String> {
    let text = bytes.trim_ascii_start();
    let text = text.strip_prefix(b"\xef\xbb\xbf").unwrap_or(text);
    let begins = |word: &str| text.len() >= word.len() && text[..word.len()].eq_ignore_ascii_case(word.as_bytes());
    let saved = "saved under this name instead of the file (a page of an error or a log-in): fetch it again";
    Some(if bytes.is_empty() {
        "empty (0 bytes): an unfinished download; fetch it again".into()
    } else if begins("version https://git-lfs") {
        "a Git LFS pointer, not the file itself: fetch that with `git lfs pull`, or with `hf download`".into()
    } else if begins("<!doctype html") || begins("<html") || begins("<head") {
        format!("an HTML page, {saved}")
    } else if begins("<?xml") || begins("<error") {
        format!("an XML document, {saved}")
    } else if bytes.starts_with(b"GGUF") {
        "a GGUF file, whose quantized weights are not supported; fetch the .safetensors form".into()
    } else if bytes.starts_with(b"PK") && holds(bytes, b"data.pkl")
        || bytes[0] == 0x80 && bytes.len() > 1 && bytes[1] < 6
    {
        format!(
            "a PyTorch pickle, which can run code and is never read; fetch its .safetensors form, or convert it once: {}",
            conversion(bytes)
        )
    } else if bytes.starts_with(b"PK") {
        "a zip archive; unpack it, and give what is in it (a PyTorch pickle in it is never read: it can run code)"
            .into()
    } else if bytes.starts_with(b"\x1f\x8b") || bytes.starts_with(b"7z\xbc\xaf") || bytes.starts_with(b"Rar!") {
        "a compressed archive; unpack it, and give what is in it".into()
    } else if bytes.starts_with(b"\x89HDF") {
        "an HDF5 file of Keras or TensorFlow, not supported; fetch the .safetensors form".into()
    } else if matches!(text.first(), Some(b'{' | b'[')) && serde_json::from_slice::<serde::de::IgnoredAny>(text).is_ok()
    {
        "a JSON document, not weights (a server's error, if it was downloaded under this name: fetch it again)".into()
    } else if bytes.len() >= 64 && bytes[..bytes.len().min(4096)].iter().all(|&byte| byte == 0) {
        "nothing but zeros at its beginning: an unfinished download; fetch it again".into()
    } else if bytes.len() >= 8 && is_text(&bytes[..bytes.len().min(256)]) {
        let line = String::from_utf8_lossy(&text[..text.len().min(60)]).lines().next().unwrap_or_default().to_owned();
        format!("a text file that begins with \"{line}\"; fetch the model again")
    } else {
        return None;
    })
}

/// Only what a text has, and letters among it.
fn is_text(bytes: &[u8]) -> bool {
    bytes.iter().all(|&byte| byte >= b' ' && byte != 0x7f || matches!(byte, b'\n' | b'\r' | b'\t'))
        && bytes.iter().any(u8::is_ascii_alphabetic)
        && std::str::from_utf8(bytes).map_or_else(|error| error.error_len().is_none(), |_| true)
}

/// Whether the beginning, where a pickle lists names, has this text.
fn holds(bytes: &[u8], text: &[u8]) -> bool {
    const BEGINNING: usize = 8 << 20;
    bytes[..bytes.len().min(BEGINNING)].windows(text.len()).any(|window| window == text)
}

/// How a single-file pickle becomes a diffusers folder. Which kind of model it is stands in the names of its tensors, which
/// a pickle spells out.
fn conversion(bytes: &[u8]) -> String {
    let xl = holds(bytes, b"conditioner.embedders.");
    let class = if xl { "StableDiffusionXLPipeline" } else { "StableDiffusionPipeline" };
    format!(
        "python -c \"from diffusers import {class} as P; P.from_single_file('FILE.ckpt').save_pretrained('FOLDER')\""
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_people_download_instead_is_named() {
        for (bytes, what) in [
            (&b""[..], "empty"),
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7\nsize 3438167540\n", "a Git LFS pointer"),
            (b"<!DOCTYPE html><html><head><title>Sign in</title>", "an HTML page"),
            (b"\n  <html lang=en>", "an HTML page"),
            (b"<?xml version=\"1.0\"?><Error><Code>AccessDenied</Code></Error>", "an XML document"),
            (b"{\"error\":\"Invalid username or password.\"}", "a JSON document"),
            (b"GGUF\x03\0\0\0\x01\0", "a GGUF file"),
            (b"PK\x03\x04\0\0archive/data.pkl", "a PyTorch pickle"),
            (b"PK\x03\x04\0\0model.safetensors", "a zip archive"),
            (b"\x80\x02}q\0(X", "a PyTorch pickle"),
            (b"\x1f\x8b\x08\0", "a compressed archive"),
            (b"Entry not found", "a text file that begins with \"Entry not found\""),
            (b"Repository is gated", "a text file"),
            (&[0; 100], "nothing but zeros"),
        ] {
            let known = known_otherwise(bytes).unwrap_or_default();
            assert!(known.starts_with(what), "{what}: {known}");
        }
        for bytes in [&b"\x10\0\0\0\0\0\0\0{}"[..], b"\xff\xff\xff\xff\xff\xff\xff\xff{\"x\"", b"abc"] {
            assert_eq!(known_otherwise(bytes), None);
        }
    }

    #[test]
    fn the_advice_for_a_pickle_is_for_its_kind_of_model() {
        let advice = known_otherwise(b"PK\x03\x04 data.pkl conditioner.embedders.1.model.ln_final.weight").unwrap();
        assert!(advice.contains("StableDiffusionXLPipeline") && advice.contains("from_single_file"), "{advice}");
        let advice = known_otherwise(b"PK\x03\x04 data.pkl cond_stage_model.transformer").unwrap();
        assert!(advice.contains("import StableDiffusionPipeline"), "{advice}");
    }
}
