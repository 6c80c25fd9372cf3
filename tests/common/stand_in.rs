//! Runs of the program on a stand-in for a CUDA device (tests/stand_in), which is compiled here.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use palettist::files::hex;
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::runs::program;

const SOURCES: [&str; 9] =
    ["memory", "counts", "views", "device", "operators", "attention", "shapes", "kernels", "driver"];
/// The program's own kernels, which the stand-in runs on the host.
const KERNELS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/src/palette/batch/kernels.cu");
/// The libraries of NVIDIA's that the stand-in is as well.
const OTHER_NAMES: [&str; 2] = ["libcuda.so.1", "libnvrtc.so.13"];

/// A folder with libtorch's libraries and the stand-in beside them. Compiled once for each version of its sources.
///
/// # Panics
/// It can't be compiled.
fn libraries() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let libtorch = PathBuf::from(std::env::var_os("LIBTORCH").expect("cargo sets LIBTORCH, by .cargo/config.toml"));
        let versions = SOURCES.map(|name| version_of(name, &libtorch));
        let version = hex(&Sha256::digest(versions.join(" "))[..8]);
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
            for name in OTHER_NAMES.map(|name| folder.join(name)).iter().filter(|name| !name.is_symlink()) {
                std::os::unix::fs::symlink("libtorch_cuda.so", name).unwrap();
            }
            let objects: Vec<PathBuf> =
                SOURCES.iter().zip(&versions).map(|(name, version)| all.join(format!("{name}-{version}.o"))).collect();
            compile(&objects, &libtorch, &made);
        }
        folder
    })
}

/// Where a source lies.
fn source_of(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/stand_in").join(name)
}

/// Of all that the object of a source depends on.
fn version_of(name: &str, libtorch: &Path) -> String {
    let mut hash = Sha256::new();
    hash.update(libtorch.to_string_lossy().as_bytes());
    for file in ["stand_in.h".to_owned(), format!("{name}.cpp")] {
        hash.update(fs::read(source_of(&file)).unwrap());
    }
    if ["kernels", "driver"].contains(&name) {
        hash.update(fs::read(KERNELS).unwrap());
    }
    hex(&hash.finalize()[..8])
}

/// Compiles the `objects` of [`SOURCES`] that are not there, and makes a library of them.
fn compile(objects: &[PathBuf], libtorch: &Path, made: &Path) {
    let compiler = std::env::var_os("CXX").unwrap_or_else(|| "c++".into());
    let include = libtorch.join("include");
    let run = |command: &mut Command| {
        let status = command.status().unwrap_or_else(|error| panic!("{compiler:?}: {error}"));
        assert!(status.success(), "{command:?}");
    };
    let missing: Vec<_> = SOURCES.iter().zip(objects).filter(|(_, object)| !object.exists()).collect();
    std::thread::scope(|scope| {
        // Two at a time: each takes a gigabyte.
        for half in missing.chunks(missing.len().div_ceil(2).max(1)) {
            let (compiler, include) = (&compiler, &include);
            scope.spawn(move || {
                for (name, object) in half {
                    let mut command = Command::new(compiler);
                    command.args(["-std=c++17", "-O1", "-fPIC", "-Wall", "-c", "-isystem"]).arg(include);
                    command.arg("-isystem").arg(include.join("torch/csrc/api/include"));
                    // The bits of the kernels are those of a card: nothing is fused.
                    command.args(["-ffp-contract=off", "-I"]).arg(Path::new(KERNELS).parent().unwrap());
                    command.arg(format!("-DKERNELS=\"{KERNELS}\"")).arg(source_of(&format!("{name}.cpp")));
                    let part = object.with_extension("part");
                    run(command.arg("-o").arg(&part));
                    fs::rename(part, object).unwrap();
                }
            });
        }
    });
    let part = made.with_extension("part");
    let mut command = Command::new(&compiler);
    command.args(["-shared", "-o"]).arg(&part).args(objects).arg("-L").arg(libtorch.join("lib"));
    run(command.args(["-ltorch_cpu", "-lc10"]));
    fs::rename(part, made).unwrap();
}

/// The program in `folder`, with the stand-in for a device.
pub fn on_stand_in(folder: &Path, arguments: &[&str]) -> Command {
    let mut command = program(folder, arguments);
    command.env("LD_LIBRARY_PATH", libraries()).env("STAND_IN_REPORT", folder.join("report.json"));
    command.env("XDG_CACHE_HOME", folder.join("cache"));
    command
}

const INSIDE: &str = "STAND_IN_TEST";

/// Whether this is a test program with the stand-in for a device.
pub fn is_inside() -> bool {
    let inside = std::env::var_os(INSIDE).is_some();
    assert!(!inside || palettist::torch::load_cuda() && tch::Cuda::is_available());
    inside
}

/// Runs the test `name` of this program in one that [is inside](is_inside), with some variables, and fails where it fails.
pub fn again(name: &str, variables: &[(&str, &str)]) {
    let caches = tempfile::tempdir().unwrap();
    let mut again = Command::new(std::env::current_exe().unwrap());
    again.args([name, "--exact", "--nocapture"]).env(INSIDE, "1").env("LD_LIBRARY_PATH", libraries());
    again.env("XDG_CACHE_HOME", caches.path()).env("OMP_NUM_THREADS", "1").envs(variables.iter().copied());
    let output = again.output().unwrap();
    let [said, told] = [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes));
    assert!(output.status.success() && said.contains("1 passed"), "{said}\n{told}");
    eprint!("{told}");
}

/// [`is_inside`]; otherwise runs the test `name` [`again`], where the host keeps out of the device's memory.
pub fn is_on_stand_in(name: &str) -> bool {
    if !is_inside() {
        again(name, &[("STAND_IN_FENCE", "1")]);
        return false;
    }
    true
}

/// What the last program in `folder` asked of the device, counted.
pub fn report(folder: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(folder.join("report.json")).unwrap()).unwrap()
}
