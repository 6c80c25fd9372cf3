//! What the fuzzing targets of tests/fuzz start from, and what they found: each is refused or read, and none panics.

#[path = "fuzz/inputs.rs"]
mod inputs;
#[path = "fuzz/seeds.rs"]
mod seeds;

use std::fs;
use std::path::Path;

/// What one input of a target is given to.
fn survive(target: &str, bytes: &[u8]) {
    match target {
        "safetensors" => inputs::safetensors(bytes),
        "configs" => inputs::configs(bytes),
        "packages" => inputs::packages(bytes),
        "captions" => inputs::captions(bytes),
        "pictures" => inputs::pictures(bytes),
        "loras" => inputs::loras(bytes),
        "palettes" => inputs::palettes(bytes),
        other => panic!("there is no target {other}"),
    }
}

#[test]
fn seeds_are_survived() {
    let seeds = seeds::all().unwrap();
    for target in ["safetensors", "configs", "packages", "captions", "pictures", "loras", "palettes"] {
        assert!(seeds.iter().any(|seed| seed.target == target), "{target}");
    }
    for seed in seeds {
        println!("{}/{}", seed.target, seed.name);
        survive(seed.target, &seed.bytes);
    }
}

/// tests/fixtures/fuzzed/TARGET/NAME.
#[test]
fn findings_are_survived() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/fuzzed");
    let mut count = 0;
    for target in fs::read_dir(folder).unwrap() {
        let target = target.unwrap();
        for finding in fs::read_dir(target.path()).unwrap() {
            let path = finding.unwrap().path();
            println!("{}", path.display());
            survive(&target.file_name().to_string_lossy(), &fs::read(path).unwrap());
            count += 1;
        }
    }
    assert!(count > 0);
}

#[test]
#[ignore = "writes tests/fuzz/corpus, from which cargo fuzz starts"]
fn write_the_first_corpus() {
    for seed in seeds::all().unwrap() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus").join(seed.target);
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join(seed.name), seed.bytes).unwrap();
    }
}
