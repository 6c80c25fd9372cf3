//! Lets the targets find libtorch, as the program's own build script does for its binaries.

fn main() {
    let lib = std::env::var("DEP_PALETTIST_EXT_LIBTORCH_LIB").expect("palettist tells where libtorch's libraries are");
    println!("cargo::rustc-link-arg=-Wl,-rpath,{lib}");
    println!("cargo::rerun-if-changed=build.rs");
}
