//! What an app needs beside the packages: the folder `Resources/` that Apple's Swift package reads.
//!
//! It holds compiled packages, and the vocabulary and merges of the tokenizer. Compiling is a program of Xcode, so it
//! happens on a Mac, by the script `compile.sh` that is written here; on a Mac it is run at once.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::attention::AttentionImplementation;
use super::components::Part;
use super::metadata::{NAME, PackageMetadata};
use crate::report::shell_word;

/// Last parts of packages' names, and what Swift looks for in `Resources/`. It takes chunks before the whole.
const COMPILED: [(&str, &str); 10] = [
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
const SAFETY_CHECKER: (&str, &str) = ("safety_checker", "SafetyChecker");

/// The script that compiles a bundle.
const SCRIPT: &str = "compile.sh";

/// What [`bundle`] made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bundle {
    pub resources: PathBuf,
    pub script: PathBuf,
    /// Whether the script has been run, which takes a Mac.
    pub compiled: bool,
    /// What Swift always needs and the folder has no package for.
    pub missing: Vec<&'static str>,
}

/// Makes `folder/Resources/` of the packages in `folder` that `metadata` names and of `tokenizer`, names and contents of
/// files. `attention` is the UNet's: the Diffusers app tells models apart by it.
///
/// # Errors
/// When the files cannot be written or, on a Mac, when compiling fails.
pub fn bundle(
    folder: &Path,
    metadata: &PackageMetadata,
    attention: AttentionImplementation,
    tokenizer: &[(&str, String)],
) -> Result<Bundle> {
    let resources = folder.join("Resources");
    fs::create_dir_all(&resources).with_context(|| format!("cannot create {}", resources.display()))?;
    for (name, text) in tokenizer {
        let path = resources.join(name);
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    let package = |component: &str| metadata.package_name(component);
    let there: Vec<(String, &'static str)> = COMPILED
        .into_iter()
        .chain([SAFETY_CHECKER])
        .map(|(component, compiled)| (package(component), compiled))
        .filter(|(package, _)| folder.join(package).is_dir())
        .collect();
    // Compiled of what was there before: it would pass for what is there now until the script has run.
    for (_, compiled) in &there {
        let whole = ["Chunk1", "Chunk2"].iter().find_map(|chunk| compiled.strip_suffix(chunk)).unwrap_or(compiled);
        for name in [whole.to_owned(), format!("{whole}Chunk1"), format!("{whole}Chunk2")] {
            let outdated = resources.join(format!("{name}.mlmodelc"));
            if outdated.is_dir() {
                fs::remove_dir_all(&outdated).with_context(|| format!("cannot remove {}", outdated.display()))?;
            }
        }
    }
    let has = |name: &str| there.iter().any(|(_, compiled)| *compiled == name);
    let mut missing: Vec<&'static str> =
        ["TextEncoder", "VAEDecoder"].into_iter().filter(|compiled| !has(compiled)).collect();
    let unet = has("Unet") || (has("UnetChunk1") && has("UnetChunk2"));
    if !unet {
        missing.push("Unet");
    }
    let path = folder.join(SCRIPT);
    fs::write(&path, script(&there, metadata, attention))
        .with_context(|| format!("cannot write {}", path.display()))?;
    let compiled = cfg!(target_os = "macos");
    if compiled {
        let status = Command::new("sh").arg(&path).status().context("cannot run sh")?;
        if !status.success() {
            bail!("compiling failed; `sh {}` tries again", shell_word(&path.to_string_lossy()));
        }
    }
    Ok(Bundle { resources, script: path, compiled, missing })
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

/// Whether [`bundle`] made one in `folder`.
pub fn holds_bundle(folder: &Path) -> bool {
    folder.join(SCRIPT).is_file()
}

/// A package in `folder` that is of another model than the one that `metadata` names, which has `parts`: a bundle holds one
/// model. Of two models of one name, that is known by what the other has more.
pub fn of_another_model(folder: &Path, metadata: &PackageMetadata, parts: &[Part]) -> Option<PathBuf> {
    let all: Vec<&str> = COMPILED.iter().chain([&SAFETY_CHECKER]).map(|(component, _)| *component).collect();
    let has = |component: &&&str| component.contains("unet") || parts.iter().any(|part| part.name() == **component);
    let own: Vec<String> = all.iter().filter(has).map(|component| metadata.package_name(component)).collect();
    let entries = fs::read_dir(folder).ok()?.flatten().map(|entry| entry.path());
    entries.into_iter().find(|path| {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let package =
            name.starts_with(NAME) && all.iter().any(|component| name.ends_with(&format!("_{component}.mlpackage")));
        package && !own.iter().any(|own| own == name)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

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
        let there = bundle(folder.path(), &metadata, AttentionImplementation::SplitEinsum, &texts);
        if cfg!(target_os = "macos") {
            // A real compiler refuses these.
            return;
        }
        let there = there.unwrap();
        assert_eq!((there.compiled, &there.missing[..]), (false, &["VAEDecoder"][..]));

        let tool = folder.path().join("bin/xcrun");
        fs::create_dir(tool.parent().unwrap()).unwrap();
        let fake = "#!/bin/sh\n[ \"$1\" = --find ] && exit 0\n[ -d \"$3\" ] || exit 1\n\
                    mkdir \"$4/$(basename \"$3\" .mlpackage).mlmodelc\"\n";
        fs::write(&tool, fake).unwrap();
        fs::set_permissions(&tool, fs::Permissions::from_mode(0o755)).unwrap();
        let path = format!("{}:{}", tool.parent().unwrap().display(), std::env::var("PATH").unwrap());
        // The second time what is there already is made anew.
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
        assert_eq!(names(there.resources), expected);
        assert_eq!(names(folder.path().join("MochiDiffusion/models/it's new")), expected);
        // Then the UNet whole: chunks, which programs take first, are gone from everywhere.
        for chunk in ["unet_chunk1", "unet_chunk2"] {
            fs::remove_dir(folder.path().join(metadata.package_name(chunk))).unwrap();
        }
        fs::create_dir(folder.path().join(metadata.package_name("unet"))).unwrap();
        let there = bundle(folder.path(), &metadata, AttentionImplementation::SplitEinsum, &texts).unwrap();
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
}
