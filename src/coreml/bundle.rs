//! What an app needs beside the packages: the folder `Resources/` that Apple's Swift package reads.
//!
//! It holds compiled packages, and the vocabulary and merges of the tokenizer. Compiling is a program of Xcode, so it
//! happens on a Mac, by the script `compile.sh` that is written here; on a Mac it is run at once.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};

use crate::coreml::AttentionImplementation;
use crate::coreml::components::Part;
use crate::coreml::format::metadata::PackageMetadata;
use crate::files::beside::{PART, beside};
use crate::files::rename::rename_new;
use crate::files::{hex, settle, write_bytes};
use crate::source::Model;
use crate::terminal::shell_word;

/// Last parts of packages' names, and what Swift looks for in `Resources/`. It takes chunks before the whole.
pub(super) const COMPILED: [(&str, &str); 10] = [
    ("text_encoder", "TextEncoder"),
    ("text_encoder_2", "TextEncoder2"),
    ("vae_decoder", "VAEDecoder"),
    ("vae_encoder", "VAEEncoder"),
    ("unet", "Unet"),
    ("unet_chunk1", "UnetChunk1"),
    ("unet_chunk2", "UnetChunk2"),
    ("control-unet", "ControlledUnet"),
    ("control-unet_chunk1", "ControlledUnetChunk1"),
    ("control-unet_chunk2", "ControlledUnetChunk2"),
];

/// And the safety checker, which programs do without where it is not there.
pub(super) const SAFETY_CHECKER: (&str, &str) = ("safety_checker", "SafetyChecker");

/// The script that compiles a bundle.
const SCRIPT: &str = "compile.sh";

/// What the last line of a script that is as it was written begins with; then comes the digest of what is above.
const UNTOUCHED: &str = "# written by palettist export, unchanged: ";

/// What [`Bundle::write`] made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bundled {
    pub resources: PathBuf,
    pub script: PathBuf,
    /// Whether the script has been run, which takes a Mac.
    pub compiled: bool,
}

impl Bundled {
    /// What is left to do where the packages could not be compiled here.
    pub fn to_compile(&self) -> Option<String> {
        let script = shell_word(&self.script.to_string_lossy());
        (!self.compiled).then(|| format!("compiling needs a Mac; there, run: sh {script}"))
    }
}

/// What is at the place of a file or folder of a bundle and stays there.
#[derive(Debug, thiserror::Error)]
pub enum InTheWay {
    #[error("{} exists already and is left as it is: --overwrite replaces it", .0.display())]
    Kept(PathBuf),
    #[error("{} is a link or no folder: nothing is written through it", .0.display())]
    NoFolder(PathBuf),
}

/// A bundle to be made.
#[derive(Clone, Copy, Debug)]
pub struct Bundle<'a> {
    /// Where the packages are, and where `Resources/` will be.
    pub folder: &'a Path,
    pub metadata: &'a PackageMetadata,
    /// The UNet's: the Diffusers app tells models apart by it.
    pub attention: AttentionImplementation,
    /// Names and contents of the tokenizer's files.
    pub tokenizer: &'a [(&'static str, String)],
    /// Last parts of the names of the packages that are written with it.
    pub written: &'a [String],
    /// Replaces what is there.
    pub overwrite: bool,
}

impl Bundle<'_> {
    /// Looks at all that it would replace, before the packages are written.
    ///
    /// # Errors
    /// The first file or compiled package that is there and is not to be replaced.
    pub fn check(&self) -> Result<(), InTheWay> {
        let resources = self.folder.join("Resources");
        if fs::symlink_metadata(&resources).is_ok_and(|found| !found.is_dir()) {
            return Err(InTheWay::NoFolder(resources));
        }
        if self.overwrite {
            return Ok(());
        }
        let own = self.tokenizer.iter().map(|(name, text)| (resources.join(name), text.as_str()));
        let kept = own.filter(|(path, text)| !is_free(path, |found| found == *text)).map(|(path, _)| path);
        let script = self.folder.join(SCRIPT);
        let script = Some(script).filter(|path| !is_free(path, is_untouched));
        match kept.chain(script).chain(self.outdated()).next() {
            Some(path) => Err(InTheWay::Kept(path)),
            None => Ok(()),
        }
    }

    /// Packages that were compiled of what was there before those that are written: they would pass for what is there now
    /// until the script has run.
    fn outdated(&self) -> Vec<PathBuf> {
        let compiled = COMPILED
            .iter()
            .chain([&SAFETY_CHECKER])
            .filter(|(component, _)| self.written.iter().any(|written| written == component));
        let stems = compiled.map(|(_, compiled)| {
            ["Chunk1", "Chunk2"].iter().find_map(|chunk| compiled.strip_suffix(chunk)).unwrap_or(compiled)
        });
        let names = stems.flat_map(|stem| ["", "Chunk1", "Chunk2"].map(|chunk| format!("{stem}{chunk}.mlmodelc")));
        let paths = names.map(|name| self.folder.join("Resources").join(name));
        let mut found: Vec<PathBuf> = paths.filter(|path| fs::symlink_metadata(path).is_ok()).collect();
        found.sort();
        found.dedup();
        found
    }

    /// The packages of the model that are there, with the names that they get.
    fn packages(&self) -> Vec<(String, &'static str)> {
        let named = COMPILED.into_iter().chain([SAFETY_CHECKER]);
        let packages = named.map(|(component, compiled)| (self.metadata.package_name(component), compiled));
        packages.filter(|(package, _)| self.folder.join(package).is_dir()).collect()
    }

    /// Makes `Resources/` of the packages that are there and of the tokenizer, and the script.
    ///
    /// # Errors
    /// Those of [`Self::check`]; when the files cannot be written or, on a Mac, when compiling fails.
    pub fn write(&self) -> Result<Bundled> {
        self.check()?;
        let resources = self.folder.join("Resources");
        match fs::create_dir(&resources) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            made => made.with_context(|| format!("cannot create {}", resources.display()))?,
        }
        for (name, text) in self.tokenizer {
            self.put(&resources.join(name), text, |found| found == text)?;
        }
        if self.overwrite {
            for path in self.outdated() {
                remove(&path).with_context(|| format!("cannot remove {}", path.display()))?;
            }
        }
        let path = self.folder.join(SCRIPT);
        let text = script(&self.packages(), self.metadata, self.attention);
        self.put(&path, &format!("{text}{UNTOUCHED}{}\n", digest(&text)), is_untouched)?;
        let compiled = cfg!(target_os = "macos");
        if compiled {
            let status = Command::new("sh").arg(&path).status().context("cannot run sh")?;
            if !status.success() {
                bail!("compiling failed; `sh {}` tries again", shell_word(&path.to_string_lossy()));
            }
        }
        Ok(Bundled { resources, script: path, compiled })
    }

    /// Writes a file beside its place and renames it there: onto what is there where that is to be replaced or is `own`,
    /// a link itself and not what it leads to.
    fn put(&self, path: &Path, text: &str, own: impl Fn(&str) -> bool) -> Result<()> {
        let there = fs::symlink_metadata(path).is_ok();
        if there && !self.overwrite && !is_free(path, own) {
            return Err(InTheWay::Kept(path.to_owned()).into());
        }
        if there {
            return write_bytes(path, text.as_bytes());
        }
        let part = beside(path, PART);
        let written = fs::write(&part, text).and_then(|()| settle(&part)).and_then(|()| rename_new(&part, path));
        if let Err(error) = written {
            let _ = fs::remove_file(&part);
            if error.kind() == ErrorKind::AlreadyExists {
                return Err(InTheWay::Kept(path.to_owned()).into());
            }
            return Err(error).with_context(|| format!("cannot write {}", path.display()));
        }
        Ok(())
    }

    /// What Apple's programs will miss in the bundle of a model, and what they will not load: a line each.
    pub fn missing(&self, model: &Model) -> Vec<String> {
        let there = self.packages();
        let has = |name: &str| there.iter().any(|(_, compiled)| *compiled == name);
        let network = |name: &str| has(name) || (has(&format!("{name}Chunk1")) && has(&format!("{name}Chunk2")));
        let (unet, controlled) = (network("Unet"), network("ControlledUnet"));
        let mut needed = vec![("TextEncoder", Part::TextEncoder), ("VAEDecoder", Part::VaeDecoder)];
        if model.is_xl() {
            needed.insert(1, ("TextEncoder2", Part::TextEncoder2));
        }
        if !controlled {
            needed.push(("Unet", Part::Unet));
        }
        needed.retain(|(name, part)| if *part == Part::Unet { !unet } else { !has(name) });
        let mut lines = Vec::new();
        if !needed.is_empty() {
            let names: Vec<&str> = needed.iter().map(|(name, _)| *name).collect();
            let parts: Vec<&str> = needed.iter().map(|(_, part)| part.name()).collect();
            let many = if names.len() > 1 { "are" } else { "is" };
            let (names, parts) = (names.join(", "), parts.join(","));
            lines.push(format!("{names} {many} missing there, which Apple's programs need: add --component {parts}"));
        }
        if controlled && !unet {
            let without = "without --unet-support-controlnet";
            lines.push(match model.is_xl() {
                true => format!("Unet is missing there, which Apple's programs need: add --component unet, {without}"),
                false => format!(
                    "Unet is missing there, which Apple's programs need for pictures without a ControlNet: add --component \
                     unet, {without}"
                ),
            });
        }
        if controlled && !model.is_xl() {
            lines.push(
                "ControlledUnet needs ControlNets, compiled and of the same size and attention, in Resources/controlnet: \
                 Palettist does not export them"
                    .to_owned(),
            );
        }
        if !has("VAEEncoder") {
            lines.push(
                "without VAEEncoder, Apple's programs start from no picture, and Mochi Diffusion offers no ControlNets"
                    .to_owned(),
            );
        }
        lines
    }
}

/// Whether nothing is at a path, or a file, not a link, with a text that is `own`.
fn is_free(path: &Path, own: impl Fn(&str) -> bool) -> bool {
    match fs::symlink_metadata(path) {
        Err(error) => error.kind() == ErrorKind::NotFound,
        Ok(found) => found.is_file() && fs::read_to_string(path).is_ok_and(|text| own(&text)),
    }
}

/// Whether a script is as it was written.
fn is_untouched(text: &str) -> bool {
    let written = text.trim_end().rsplit_once('\n');
    written.is_some_and(|(above, last)| {
        last.strip_prefix(UNTOUCHED).is_some_and(|known| known == digest(&format!("{above}\n")))
    })
}

fn digest(text: &str) -> String {
    hex(&Sha256::digest(text)[..8])
}

/// Removes a folder with all that is in it, or a link.
fn remove(path: &Path) -> std::io::Result<()> {
    if fs::symlink_metadata(path)?.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) }
}

/// The shell script that finishes the work on a Mac.
fn script(packages: &[(String, &str)], metadata: &PackageMetadata, attention: AttentionImplementation) -> String {
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

/// Whether there is one in `folder`, with the script that [`Bundle::write`] made.
pub fn holds_bundle(folder: &Path) -> bool {
    fs::read_to_string(folder.join(SCRIPT)).is_ok_and(|text| text.contains(UNTOUCHED))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::coreml::strangers::of_another_model;

    /// Runs the script with an `xcrun` that makes empty folders.
    #[test]
    #[cfg(unix)]
    fn the_script_compiles_what_is_there_under_the_names_that_swift_reads() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let metadata = PackageMetadata { model: "someone/it's new".into(), ..Default::default() };
        for component in ["text_encoder", "unet_chunk1", "unet_chunk2", "safety_checker"] {
            fs::create_dir(folder.path().join(metadata.package_name(component))).unwrap();
        }
        let texts = [("vocab.json", "{}".to_owned()), ("merges.txt", "a b\n".to_owned())];
        let bundle = Bundle {
            folder: folder.path(),
            metadata: &metadata,
            attention: AttentionImplementation::SplitEinsum,
            tokenizer: &texts,
            written: &["text_encoder", "unet", "safety_checker"].map(String::from),
            overwrite: false,
        };
        let there = bundle.write();
        if cfg!(target_os = "macos") {
            // A real compiler refuses these.
            return;
        }
        let there = there.unwrap();
        assert!(!there.compiled);

        let tool = folder.path().join("bin/xcrun");
        fs::create_dir(tool.parent().unwrap()).unwrap();
        let fake = "#!/bin/sh\n[ \"$1\" = --find ] && exit 0\n[ -d \"$3\" ] || exit 1\n\
                    mkdir \"$4/$(basename \"$3\" .mlpackage).mlmodelc\"\n";
        fs::write(&tool, fake).unwrap();
        fs::set_permissions(&tool, fs::Permissions::from_mode(0o755)).unwrap();
        let path = format!("{}:{}", tool.parent().unwrap().display(), std::env::var("PATH").unwrap());
        // The second time what is there already is written again.
        for arguments in [&[][..], &["--mochi"]] {
            let mut command = Command::new("sh");
            command.arg(&there.script).args(arguments).env("PATH", &path).env("HOME", folder.path());
            let output = command.output().unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        }
        let names = |folder: PathBuf| {
            let mut names: Vec<_> =
                fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
            names.sort();
            names
        };
        let expected = [
            "SafetyChecker.mlmodelc",
            "TextEncoder.mlmodelc",
            "UnetChunk1.mlmodelc",
            "UnetChunk2.mlmodelc",
            "merges.txt",
            "vocab.json",
        ];
        assert_eq!(names(there.resources.clone()), expected);
        assert_eq!(names(folder.path().join("MochiDiffusion/models/it's new")), expected);
        // Then the UNet whole: chunks, which programs take first, are gone from everywhere.
        for chunk in ["unet_chunk1", "unet_chunk2"] {
            fs::remove_dir(folder.path().join(metadata.package_name(chunk))).unwrap();
        }
        fs::create_dir(folder.path().join(metadata.package_name("unet"))).unwrap();
        // Not unasked.
        let refused = bundle.check().unwrap_err().to_string();
        assert!(refused.contains(".mlmodelc exists already"), "{refused}");
        assert_eq!(Bundle { written: &[], ..bundle }.write().unwrap(), there);
        assert_eq!(names(there.resources.clone()), expected);
        let there = Bundle { overwrite: true, ..bundle }.write().unwrap();
        let outdated = |name: &str| there.resources.join(name).exists();
        assert!(!outdated("UnetChunk1.mlmodelc") && !outdated("TextEncoder.mlmodelc"), "compiled of what was there");
        let mut command = Command::new("sh");
        command.arg(&there.script).arg("--mochi").env("PATH", &path).env("HOME", folder.path());
        assert!(command.output().unwrap().status.success());
        let expected = ["SafetyChecker.mlmodelc", "TextEncoder.mlmodelc", "Unet.mlmodelc", "merges.txt", "vocab.json"];
        assert_eq!(names(there.resources.clone()), expected);
        assert_eq!(names(folder.path().join("MochiDiffusion/models/it's new")), expected);
        let parts = [Part::TextEncoder, Part::Unet, Part::VaeDecoder, Part::SafetyChecker];
        assert_eq!(of_another_model(folder.path(), &metadata, &parts), None);
        let other = PackageMetadata { model: "another".into(), ..Default::default() };
        assert!(of_another_model(folder.path(), &other, &parts).is_some());
        // One of the same name that has no safety checker.
        assert!(of_another_model(folder.path(), &metadata, &parts[..3]).is_some());
        // What was compiled stays if compiling fails, and nothing is begun where a package is missing.
        fs::write(&tool, "#!/bin/sh\n[ \"$1\" = --find ]\n").unwrap();
        let run = || {
            let output = Command::new("sh").arg(&there.script).env("PATH", &path).output().unwrap();
            assert!(!output.status.success());
            assert_eq!(names(there.resources.clone()), expected);
            assert!(!folder.path().join(".compiling").exists());
            String::from_utf8_lossy(&output.stderr).into_owned()
        };
        run();
        fs::write(&tool, fake).unwrap();
        fs::remove_dir(folder.path().join(metadata.package_name("unet"))).unwrap();
        assert!(run().contains("unet.mlpackage is not here any more"));
        fs::create_dir(folder.path().join(metadata.package_name("unet"))).unwrap();
        // A script that cannot find the compiler says so.
        let output = Command::new("sh").arg(&there.script).output().unwrap();
        assert!(!output.status.success());
        assert!(String::from_utf8_lossy(&output.stderr).contains("Xcode"));
    }

    /// A script of the user's, a vocabulary of another's, and links: none is replaced unasked, and nothing is written
    /// through a link, asked or not.
    #[test]
    #[cfg(unix)]
    fn what_is_not_its_own_stays() {
        use std::os::unix::fs::symlink;
        let folder = tempfile::tempdir().unwrap();
        let (inside, outside) = (folder.path().join("bundle"), folder.path().join("outside"));
        let metadata = PackageMetadata { model: "m".into(), ..Default::default() };
        let texts = [("vocab.json", "{}".to_owned()), ("merges.txt", "a b\n".to_owned())];
        let bundle = Bundle {
            folder: &inside,
            metadata: &metadata,
            attention: AttentionImplementation::Original,
            tokenizer: &texts,
            written: &["unet".to_owned()],
            overwrite: false,
        };
        let resources = inside.join("Resources");
        let text = |path: &Path| fs::read_to_string(path).unwrap();
        let refused = |name: &str| {
            for said in [bundle.check().unwrap_err().to_string(), bundle.write().unwrap_err().to_string()] {
                assert!(said.contains(name) && said.contains("exists already"), "{said}");
            }
        };
        fs::create_dir_all(&resources).unwrap();
        fs::write(inside.join(SCRIPT), "echo mine\n").unwrap();
        refused(SCRIPT);
        assert_eq!(text(&inside.join(SCRIPT)), "echo mine\n");
        fs::remove_file(inside.join(SCRIPT)).unwrap();
        fs::create_dir_all(outside.join("compiled")).unwrap();
        fs::write(outside.join("vocab"), "theirs").unwrap();
        for (name, target) in [("vocab.json", "vocab"), ("Unet.mlmodelc", "compiled"), ("UnetChunk1.mlmodelc", "none")]
        {
            symlink(outside.join(target), resources.join(name)).unwrap();
            refused(name);
            if name != "vocab.json" {
                fs::remove_file(resources.join(name)).unwrap();
                symlink(outside.join(target), resources.join(name)).unwrap();
            }
            let there = Bundle { overwrite: true, ..bundle }.write().unwrap();
            assert!(!resources.join(name).is_symlink(), "{name}");
            assert_eq!((text(&outside.join("vocab")).as_str(), outside.join("compiled").is_dir()), ("theirs", true));
            assert!(holds_bundle(&inside) && is_untouched(&text(&there.script)));
        }
        // Its own, as it was written, gives way to the next; touched, it is the user's.
        bundle.write().unwrap();
        let own = text(&inside.join(SCRIPT));
        fs::write(inside.join(SCRIPT), own.replace("set -eu", "set -e")).unwrap();
        refused(SCRIPT);
        fs::remove_dir_all(&inside).unwrap();
        fs::create_dir(&inside).unwrap();
        symlink(&outside, &resources).unwrap();
        for overwrite in [false, true] {
            let said = Bundle { overwrite, ..bundle }.write().unwrap_err().to_string();
            assert!(said.contains("Resources is a link"), "{said}");
        }
        assert!(!outside.join("vocab.json").exists());
    }
}
