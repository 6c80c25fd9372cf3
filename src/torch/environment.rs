//! What the libraries under libtorch hear in their environment: how threads wait, what becomes of memory that is freed.

use std::env;
use std::os::unix::process::CommandExt;
use std::process::Command;

/// A variable, what it is set to, and what it means where the user has set one of those that `has_a_say`.
struct Setting {
    variable: &'static str,
    value: &'static str,
    has_a_say: &'static [&'static str],
}

const SETTINGS: [Setting; 2] = [
    // GNU's OpenMP: how often a thread looks at what another one does before it sleeps to wait for it. By default it looks for
    // milliseconds; beside one other busy program a step then takes a hundred times as long. With few looks, threads are
    // woken all the time, which is slow on virtual machines: with 3,000 a step took 1.0 to 1.8 times as long as with these,
    // with 30,000 about as long; beside another program 0.6 and twice as long.
    Setting { variable: "GOMP_SPINCOUNT", value: "10000", has_a_say: &["OMP_WAIT_POLICY"] },
    // GNU's malloc: memory that is freed is kept for the next step rather than given back, and comes in pages of 2 MB where
    // the system has them. By default each step asks for gigabytes anew, 4 KB at a time, which the system fills with zeros
    // first: a third of the time of a step of SD 1.5 on small pictures. The peak grows by some 8 %, which lie between blocks.
    Setting {
        variable: "GLIBC_TUNABLES",
        value: "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1099511627776:glibc.malloc.top_pad=67108864:\
                glibc.malloc.hugetlb=1",
        has_a_say: &["MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_"],
    },
];

/// Variables that [`start_again`] may set: for others that are started.
pub fn variables() -> impl Iterator<Item = &'static str> {
    SETTINGS.iter().map(|setting| setting.variable)
}

/// Starts the program again, as it was called, in the environment that suits it: libraries look there as they are loaded,
/// which is before `main`. What the user has set stays as it is. Where nothing is missing, on other systems than Linux, or
/// where the program cannot be started again, it just goes on.
pub fn start_again() {
    let is_set = |variable: &str| env::var_os(variable).is_some();
    let missing = SETTINGS.iter().filter(|Setting { variable, has_a_say, .. }| {
        cfg!(target_os = "linux") && !is_set(variable) && !has_a_say.iter().copied().any(is_set)
    });
    let missing: Vec<_> = missing.map(|setting| (setting.variable, setting.value)).collect();
    let mut words = env::args_os();
    if let (false, Some(name), Ok(program)) = (missing.is_empty(), words.next(), env::current_exe()) {
        // It returns only if it fails.
        let _ = Command::new(program).arg0(name).args(words).envs(missing).exec();
    }
}
