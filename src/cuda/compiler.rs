//! NVRTC, NVIDIA's compiler of CUDA C++ as a library, as libtorch's CUDA build brings it along or the system has it; and the
//! folder where what it compiled is kept.

use std::ffi::{CString, c_char, c_int, c_void};
use std::fs;
use std::path::{Path, PathBuf};
use std::ptr::null_mut;

use anyhow::{Context, Result, bail, ensure};
use sha2::{Digest, Sha256};

use super::library::{Library, done, text};
use crate::files::hex;

type Handle = *mut c_void;
type GetSize = unsafe extern "C" fn(Handle, *mut usize) -> c_int;
type GetBytes = unsafe extern "C" fn(Handle, *mut c_char) -> c_int;

/// Besides the architecture. Without fused multiplication and addition results are the same to the bit on every card, and
/// on the host.
const OPTIONS: [&str; 3] = ["--std=c++17", "--fmad=false", "--ptxas-options=-v"];

/// A compiler that is there.
pub struct Compiler {
    create: unsafe extern "C" fn(
        *mut Handle,
        *const c_char,
        *const c_char,
        c_int,
        *const *const c_char,
        *const *const c_char,
    ) -> c_int,
    compile: unsafe extern "C" fn(Handle, c_int, *const *const c_char) -> c_int,
    destroy: unsafe extern "C" fn(*mut Handle) -> c_int,
    cubin: (GetSize, GetBytes),
    ptx: (GetSize, GetBytes),
    log: (GetSize, GetBytes),
    error_string: unsafe extern "C" fn(c_int) -> *const c_char,
    version: (c_int, c_int),
    /// That it compiles for, ascending.
    pub architectures: Vec<u32>,
}

/// What a source is compiled to.
#[derive(Clone, Debug, PartialEq)]
pub struct Target {
    option: String,
    /// Whether it is the card's own code; otherwise the driver compiles it on for a newer card.
    own: bool,
}

/// A compiled source.
pub struct Compiled {
    pub image: Vec<u8>,
    /// What the compiler said: registers and shared memory of each kernel, warnings.
    pub log: String,
}

impl Compiler {
    /// That of libtorch's CUDA build, or the system's.
    ///
    /// # Errors
    /// There is none.
    pub fn find() -> Result<Self> {
        let named = ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"].map(|name| (vec![], PathBuf::from(name)));
        let found: Vec<Candidate> = folders().iter().flat_map(|folder| in_folder(folder)).chain(named).collect();
        Self::first(found).context("libnvrtc, NVIDIA's compiler, is found neither beside libtorch nor by the system")
    }

    /// That in a folder of libraries.
    ///
    /// # Errors
    /// There is none.
    pub fn in_folder(folder: &Path) -> Result<Self> {
        Self::first(in_folder(folder)).with_context(|| format!("{} has no libnvrtc", folder.display()))
    }

    /// The first that can be loaded.
    fn first(found: Vec<Candidate>) -> Result<Self> {
        let library = found.into_iter().find_map(|(before, name)| {
            // NVRTC looks for it by its bare name, which is that of what is loaded already.
            for name in before {
                let _ = Library::open(&name);
            }
            Library::open(&name)
        });
        Self::of(library.context("it cannot be loaded")?)
    }

    fn of(library: Library) -> Result<Self> {
        // SAFETY: the types are those of nvrtc.h.
        unsafe {
            let mut compiler = Self {
                create: library.function(c"nvrtcCreateProgram")?,
                compile: library.function(c"nvrtcCompileProgram")?,
                destroy: library.function(c"nvrtcDestroyProgram")?,
                cubin: (library.function(c"nvrtcGetCUBINSize")?, library.function(c"nvrtcGetCUBIN")?),
                ptx: (library.function(c"nvrtcGetPTXSize")?, library.function(c"nvrtcGetPTX")?),
                log: (library.function(c"nvrtcGetProgramLogSize")?, library.function(c"nvrtcGetProgramLog")?),
                error_string: library.function(c"nvrtcGetErrorString")?,
                version: (0, 0),
                architectures: Vec::new(),
            };
            let version: unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int = library.function(c"nvrtcVersion")?;
            let count: unsafe extern "C" fn(*mut c_int) -> c_int = library.function(c"nvrtcGetNumSupportedArchs")?;
            let list: unsafe extern "C" fn(*mut c_int) -> c_int = library.function(c"nvrtcGetSupportedArchs")?;
            let (mut major, mut minor) = (0, 0);
            compiler.done(version(&mut major, &mut minor), "nvrtcVersion")?;
            compiler.version = (major, minor);
            let mut length = 0;
            compiler.done(count(&mut length), "nvrtcGetNumSupportedArchs")?;
            let mut architectures = vec![0; length.max(0) as usize];
            compiler.done(list(architectures.as_mut_ptr()), "nvrtcGetSupportedArchs")?;
            architectures.sort_unstable();
            compiler.architectures = architectures.iter().map(|&number| number as u32).collect();
            Ok(compiler)
        }
    }

    /// What to compile to for a card: its own code, or, where it is newer than the compiler, that of the newest known one in
    /// a form that its driver can compile on.
    ///
    /// # Errors
    /// The card is older than all that the compiler knows.
    pub fn target(&self, architecture: u32) -> Result<Target> {
        let nearest = self.architectures.iter().copied().filter(|&known| known <= architecture).max();
        let Some(nearest) = nearest else {
            let least = self.architectures.first().copied().unwrap_or_default();
            let of = |number: u32| format!("{}.{}", number / 10, number % 10);
            bail!("the card's compute capability is {}, NVRTC's least {}", of(architecture), of(least));
        };
        let own = nearest == architecture;
        let kind = if own { "sm" } else { "compute" };
        Ok(Target { option: format!("--gpu-architecture={kind}_{nearest}"), own })
    }

    /// Under which name what is compiled of `source` is kept: a hash of all that it depends on.
    pub fn file_name(&self, source: &str, target: &Target) -> String {
        let mut hash = Sha256::new();
        let (major, minor) = self.version;
        for part in [source, &target.option, &OPTIONS.join(" "), &format!("{major}.{minor}")] {
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part);
        }
        format!("{}.{}", hex(&hash.finalize()[..16]), if target.own { "cubin" } else { "ptx" })
    }

    /// Compiles `source`, which messages call `name`.
    ///
    /// # Errors
    /// What the compiler says of the first mistake.
    pub fn compile(&self, name: &str, source: &str, target: &Target) -> Result<Compiled> {
        let (source, name_c) = (CString::new(source)?, CString::new(name)?);
        let options: Vec<CString> =
            std::iter::once(target.option.as_str()).chain(OPTIONS).map(CString::new).collect::<Result<_, _>>()?;
        let options: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();
        let mut program = null_mut();
        let none = std::ptr::null();
        // SAFETY: the pointers outlive the calls; the program is destroyed once, after its last use.
        unsafe {
            let code = (self.create)(&mut program, source.as_ptr(), name_c.as_ptr(), 0, none, none);
            self.done(code, "nvrtcCreateProgram")?;
            let code = (self.compile)(program, options.len() as c_int, options.as_ptr());
            let log = self
                .bytes(program, self.log, "nvrtcGetProgramLog")
                .map(|log| String::from_utf8_lossy(&log).trim_end_matches('\0').to_owned());
            let image = match self.done(code, "nvrtcCompileProgram") {
                Ok(()) if target.own => self.bytes(program, self.cubin, "nvrtcGetCUBIN"),
                Ok(()) => self.bytes(program, self.ptx, "nvrtcGetPTX"),
                Err(error) => Err(error),
            };
            (self.destroy)(&mut program);
            let log = log?;
            let mistake = log.lines().find(|line| line.contains("error")).unwrap_or("it says nothing").to_owned();
            let image = image.with_context(|| format!("NVRTC cannot compile {name}: {mistake}"))?;
            ensure!(!image.is_empty(), "NVRTC made nothing of {name}");
            Ok(Compiled { image, log })
        }
    }

    /// What one of the getters of a program writes.
    ///
    /// # Safety
    /// `program` is alive, and `getters` are two that belong together.
    unsafe fn bytes(&self, program: Handle, (size, get): (GetSize, GetBytes), of: &str) -> Result<Vec<u8>> {
        let mut length = 0;
        // SAFETY: by the caller's promise; there is room for as many bytes as are asked for.
        unsafe {
            self.done(size(program, &mut length), of)?;
            let mut bytes = vec![0u8; length];
            self.done(get(program, bytes.as_mut_ptr().cast()), of)?;
            Ok(bytes)
        }
    }

    fn done(&self, code: c_int, of: &str) -> Result<()> {
        // SAFETY: NVRTC gives a text of its own for every code.
        done(code, of, |code| unsafe { text((self.error_string)(code)) })
    }
}

/// Where libtorch's CUDA build has NVRTC: beside its own libraries, or where pip puts what PyTorch's wheel asks for.
fn folders() -> Vec<PathBuf> {
    let Some(own) = crate::torch::library_folder() else { return Vec::new() };
    let mut folders = vec![own.clone()];
    // Links are followed: `.libtorch/lib` is one to `site/torch/lib`.
    let site = fs::canonicalize(&own).ok().and_then(|real| Some(real.parent()?.parent()?.to_owned()));
    if let Some(site) = site {
        folders.extend(["cu13", "cuda_nvrtc"].map(|part| site.join("nvidia").join(part).join("lib")));
    }
    folders
}

/// A libnvrtc, and what is to be loaded before it.
type Candidate = (Vec<PathBuf>, PathBuf);

/// Each libnvrtc in a folder.
fn in_folder(folder: &Path) -> Vec<Candidate> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.retain(|name| name.starts_with("libnvrtc") && name.contains(".so") && !name.contains(".alt"));
    names.sort();
    let (builtins, compilers): (Vec<String>, Vec<String>) =
        names.into_iter().partition(|name| name.starts_with("libnvrtc-builtins"));
    let builtins: Vec<PathBuf> = builtins.iter().map(|name| folder.join(name)).collect();
    compilers.iter().map(|name| (builtins.clone(), folder.join(name))).collect()
}

/// The folder where what is compiled is kept: `palettist/kernels` in the user's folder for caches.
pub fn kept_in() -> Option<PathBuf> {
    let named = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).filter(|path| path.is_absolute());
    let caches = named.or_else(|| Some(std::env::home_dir()?.join(".cache")));
    caches.map(|caches| caches.join("palettist/kernels"))
}
