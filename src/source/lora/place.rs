//! Where the file of a LoRA lies: the file itself, a folder with it, or a snapshot in the local Hugging Face cache.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::super::hub;

/// What diffusers and PEFT call the file in a folder.
const NAMES: [&str; 2] = ["pytorch_lora_weights.safetensors", "adapter_model.safetensors"];

/// The file of the LoRA `path`.
///
/// # Errors
/// One line: it does not exist, or the folder has none or several; a pickle, with how to convert it.
pub fn find(path: &str) -> Result<PathBuf> {
    let place = Path::new(path);
    if place.is_file() {
        return not_a_pickle(place).map(|()| place.to_owned());
    }
    if place.is_dir() {
        return of_folder(place);
    }
    let (id, revision) = hub::split(path);
    if hub::is_id(id)
        && let Some(snapshot) = hub::cached(id, revision, |snapshot| of_folder(snapshot).map(drop))?
    {
        return of_folder(&snapshot);
    }
    bail!(
        "the LoRA {path} does not exist; a .safetensors file, a folder with one, or the id of one in the local Hugging Face \
         cache is expected"
    )
}

/// The file in a folder: of one of the [`NAMES`], or the only one.
fn of_folder(folder: &Path) -> Result<PathBuf> {
    let known = NAMES.iter().map(|name| folder.join(name)).find(|path| path.is_file());
    if let Some(path) = known {
        return Ok(path);
    }
    let entries = fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    let mut files: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).filter(|path| path.is_file()).collect();
    files.sort();
    let of = |endings: &[&str]| -> Vec<&PathBuf> {
        let ends = |path: &&PathBuf| path.extension().is_some_and(|own| endings.iter().any(|ending| own == *ending));
        files.iter().filter(ends).collect()
    };
    let shown = folder.display();
    match of(&["safetensors"])[..] {
        [file] => Ok(file.clone()),
        [first, second, ..] => {
            bail!("{shown} holds {} and {}: name the file of the LoRA", first.display(), second.display())
        }
        [] => match of(&["bin", "pt", "pth", "ckpt"]).first() {
            Some(pickle) => not_a_pickle(pickle).and_then(|()| bail!("{shown} holds no .safetensors file")),
            None => bail!("{shown} holds no .safetensors file, and so no LoRA"),
        },
    }
}

/// Refuses a pickle, by its first bytes.
fn not_a_pickle(path: &Path) -> Result<()> {
    let shown = path.display();
    let mut start = Vec::new();
    let file = File::open(path).with_context(|| format!("cannot open {shown}"))?;
    file.take(9).read_to_end(&mut start).with_context(|| format!("cannot read {shown}"))?;
    // A zip file, as torch.save writes today, or a bare pickle, as it wrote before version 1.6. A safetensors file may begin
    // with the same bytes, a length; its header comes next.
    let pickled = start.starts_with(b"PK") || start.first() == Some(&0x80) && start.get(1).is_some_and(|v| *v < 6);
    if pickled && start.get(8) != Some(&b'{') {
        bail!(
            "{shown} is a PyTorch pickle, which can run code and is never read; fetch its .safetensors form, or convert it \
             once: python -c \"import torch, safetensors.torch as s; s.save_file(torch.load('FILE', weights_only=True), \
             'FILE.safetensors')\" (a list of cloneofsimo's: with convert_loras_to_safeloras of lora_diffusion)"
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_has_one_lora() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().to_str().unwrap();
        let write = |name: &str, bytes: &[u8]| fs::write(folder.path().join(name), bytes).unwrap();
        let error = || format!("{:#}", find(path).unwrap_err());
        assert!(error().contains("holds no .safetensors file"), "{}", error());
        write("adapter_model.bin", b"PK\x03\x04");
        assert!(error().contains("pickle") && error().contains("save_file"), "{}", error());
        write("a.safetensors", b"x");
        assert_eq!(find(path).unwrap(), folder.path().join("a.safetensors"));
        write("b.safetensors", b"x");
        assert!(error().contains("name the file"), "{}", error());
        write(NAMES[1], b"x");
        assert_eq!(find(path).unwrap(), folder.path().join(NAMES[1]));
        let missing = find(&format!("{path}/none.safetensors")).unwrap_err().to_string();
        assert!(missing.contains("does not exist"), "{missing}");
        for bytes in [&b"PK\x03\x04"[..], b"\x80\x02}q"] {
            write("a.safetensors", bytes);
            let error = find(&format!("{path}/a.safetensors")).unwrap_err().to_string();
            assert!(error.contains("never read"), "{error}");
        }
    }
}
