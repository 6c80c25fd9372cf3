//! How libtorch's threads wait for each other.

/// Looks at what another thread does, some ten microseconds of them, before a thread that waits for it sleeps.
const LOOKS: &str = "3000";

/// Starts the program again, as it was called, with libtorch's threads waiting by sleeping soon rather than by looking
/// for milliseconds whether the others are done. Looking is as quick on a processor that does nothing else; but beside one
/// other busy program a step takes a hundred times as long, and beside our own threads, which make palettes, some per cent
/// longer.
///
/// The library of those threads, GNU's OpenMP, hears of it in its environment alone, as it is loaded, which is before
/// `main`. Where the user says how threads wait (`GOMP_SPINCOUNT`, `OMP_WAIT_POLICY`), or on other systems than Linux,
/// nothing is done; nor where the program cannot be started again.
pub fn sleep_soon() {
    #[cfg(target_os = "linux")]
    {
        use std::env;
        use std::os::unix::process::CommandExt;
        const VARIABLE: &str = "GOMP_SPINCOUNT";
        if env::var_os(VARIABLE).is_some() || env::var_os("OMP_WAIT_POLICY").is_some() {
            return;
        }
        let mut words = env::args_os();
        if let (Some(name), Ok(program)) = (words.next(), env::current_exe()) {
            // It returns only if it fails.
            let _ = std::process::Command::new(program).arg0(name).args(words).env(VARIABLE, LOOKS).exec();
        }
    }
}
