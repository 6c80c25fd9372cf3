//! Runs of the program on a stand-in for a CUDA device (tests/stand_in), which is compiled here.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use palettist::files::hex;
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::runs::program;

const SOURCES: [&str; 7] = ["memory", "counts", "views", "device", "operators", "attention", "shapes"];

/// A folder with libtorch's libraries and the stand-in beside them. Compiled once for each version of its sources.
///
/// # Panics
/// It can't be compiled.
fn libraries() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/stand_in");
        let libtorch = PathBuf::from(std::env::var_os("LIBTORCH").expect("cargo sets LIBTORCH, by .cargo/config.toml"));
        let mut hash = Sha256::new();
        hash.update(libtorch.to_string_lossy().as_bytes());
        for name in std::iter::once("stand_in.h".to_owned()).chain(SOURCES.map(|name| format!("{name}.cpp"))) {
            hash.update(fs::read(source.join(name)).unwrap());
        }
        let version = hex(&hash.finalize()[..8]);
        let all = Path::new(env!("CARGO_TARGET_TMPDIR")).join("stand_in");
        fs::create_dir_all(&all).unwrap();
        // Other test programs wait here for the one that compiles.
        let lock = File::create(all.join("lock")).unwrap();
        lock.lock().unwrap();
        let folder = all.join(version);
        let made = folder.join("libtorch_cuda.so");
        if !made.exists() {
            fs::create_dir_all(&folder).unwrap();
            for entry in fs::read_dir(libtorch.join("lib")).unwrap().map(Result::unwrap) {
                let place = folder.join(entry.file_name());
                if entry.file_name() != "libtorch_cuda.so" && !place.exists() {
                    std::os::unix::fs::symlink(entry.path(), place).unwrap();
                }
            }
            compile(&source, &libtorch, &folder, &made);
        }
        folder
    })
}

fn compile(source: &Path, libtorch: &Path, folder: &Path, made: &Path) {
    let compiler = std::env::var_os("CXX").unwrap_or_else(|| "c++".into());
    let include = libtorch.join("include");
    let run = |command: &mut Command| {
        let status = command.status().unwrap_or_else(|error| panic!("{compiler:?}: {error}"));
        assert!(status.success(), "{command:?}");
    };
    let objects: Vec<PathBuf> = SOURCES.iter().map(|name| folder.join(name).with_extension("o")).collect();
    std::thread::scope(|scope| {
        // Two at a time: each takes a gigabyte.
        for half in SOURCES.chunks(SOURCES.len().div_ceil(2)) {
            let (compiler, include) = (&compiler, &include);
            scope.spawn(move || {
                for name in half {
                    let mut command = Command::new(compiler);
                    command.args(["-std=c++17", "-O1", "-fPIC", "-Wall", "-c", "-isystem"]).arg(include);
                    command.arg("-isystem").arg(include.join("torch/csrc/api/include"));
                    command.arg(source.join(name).with_extension("cpp"));
                    run(command.arg("-o").arg(folder.join(name).with_extension("o")));
                }
            });
        }
    });
    let part = made.with_extension("part");
    let mut command = Command::new(&compiler);
    command.args(["-shared", "-o"]).arg(&part).args(&objects).arg("-L").arg(libtorch.join("lib"));
    run(command.args(["-ltorch_cpu", "-lc10"]));
    fs::rename(part, made).unwrap();
}

/// The program in `folder`, with the stand-in for a device.
pub fn on_stand_in(folder: &Path, arguments: &[&str]) -> Command {
    let mut command = program(folder, arguments);
    command.env("LD_LIBRARY_PATH", libraries()).env("STAND_IN_REPORT", folder.join("report.json"));
    command
}

/// What the last program in `folder` asked of the device, counted.
pub fn report(folder: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(folder.join("report.json")).unwrap()).unwrap()
}
