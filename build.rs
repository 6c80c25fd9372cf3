//! Compiles the shim over libtorch (`src/torch/ext.cpp`) and lets every binary find libtorch without
//! environment variables.

fn main() {
    let lib = std::env::var("DEP_TCH_LIBTORCH_LIB").expect("torch-sys tells where libtorch's libraries are");
    println!("cargo::rustc-link-arg=-Wl,-rpath,{lib}");
    // For packages that depend on this one (tests/fuzz).
    println!("cargo::metadata=libtorch_lib={lib}");
    println!("cargo::rerun-if-changed=src/torch/ext.cpp");
    println!("cargo::rerun-if-changed=build.rs");
    let include = std::path::Path::new(&lib).parent().expect("lib has a parent").join("include");
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .opt_level(0)
        .debug(false)
        .warnings(false)
        .include(&include)
        .include(include.join("torch/csrc/api/include"))
        .file("src/torch/ext.cpp")
        .compile("palettist_ext");
}
