//! Compiled models that somebody broke: the bytes of their files, the words of their program's text, what lies in their
//! folder. Each is refused with a message or runs.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::symlink;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use palettist::coreml::compiling::{Compiled, compile};
use palettist::coreml::reading::Package;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tch::Tensor;

use crate::mutants::{Counts, MOST_MEMORY, limit_address_space, originals, survive, within_limits};

/// The files of a compiled model.
const FILES: [&str; 4] = ["model.mil", "coremldata.bin", "metadata.json", "weights/weight.bin"];

/// A sound compiled model: its files, and what it runs on.
struct Sound {
    name: String,
    files: Vec<Vec<u8>>,
    inputs: BTreeMap<String, Tensor>,
}

fn sound(folder: &Path) -> Vec<Sound> {
    let mut all = Vec::new();
    for original in originals(folder) {
        let place = folder.join("sound.mlmodelc");
        compile(&original.path, &place, true, &mut |_, _| {}).unwrap();
        let files = FILES.map(|file| fs::read(place.join(file)).unwrap()).into();
        all.push(Sound { name: original.name, files, inputs: original.inputs });
    }
    all
}

/// Numbers and words at which a reader goes wrong.
const ODD: [&str; 36] = [
    "",
    "0",
    "-1",
    "1",
    "18446744073709551615",
    "18446744073709551616",
    "9223372036854775808",
    "4294967296",
    "1.5",
    "0x1p+0",
    "-0x1.ffep+15",
    "0x1p-1074",
    "inf",
    "-inf",
    "nan",
    "true",
    "\"\"",
    "\"é\u{202e}\"",
    "\"a",
    "\"\u{0}\"",
    "\\",
    "?",
    "(",
    ")",
    "[",
    "]",
    "{",
    "}",
    "<",
    ">",
    ",",
    "=",
    ";",
    "->",
    "tensor<fp16, [1099511627776, 1099511627776]>",
    "BLOBFILE(",
];

struct Mutator {
    random: ChaCha8Rng,
}

impl Mutator {
    fn below(&mut self, end: usize) -> usize {
        if end == 0 { 0 } else { self.random.random_range(0..end) }
    }

    /// Changes bytes of one of the files.
    fn bytes(&mut self, files: &mut [Vec<u8>]) {
        let file = self.below(files.len());
        let file = &mut files[file];
        let (at, count) = (self.below(file.len()), 1 + self.below(9));
        let end = (at + count).min(file.len());
        match self.below(5) {
            0 => file.truncate(at),
            1 => drop(file.drain(at..end)),
            2 => {
                let again = file[at..end].to_vec();
                file.splice(at..at, again);
            }
            3 => file[at..end].fill(self.random.random()),
            _ if at < file.len() => file[at] ^= 1 << self.below(8),
            _ => {}
        }
    }

    /// Changes lines of the program, or words of one.
    fn text(&mut self, text: &str) -> String {
        let mut lines: Vec<String> = text.split('\n').map(str::to_owned).collect();
        let (one, other) = (self.below(lines.len()), self.below(lines.len()));
        match self.below(8) {
            0 => lines.swap(one, other),
            1 => drop(lines.remove(one)),
            2 => {
                let again = lines[one].clone();
                lines.insert(other, again);
            }
            3 => {
                // Brackets within brackets.
                let (depth, sign) = (1 + self.below(5000), ["(", "[", "{", "dict<"][self.below(4)]);
                let at = self.place(&lines[one]);
                lines[one].insert_str(at, &sign.repeat(depth));
            }
            _ => {
                for _ in 0..1 + self.below(3) {
                    let mut words = words(&lines[one]);
                    let at = self.below(words.len());
                    let elsewhere = self.below(words.len());
                    match self.below(4) {
                        0 if !words.is_empty() => drop(words.remove(at)),
                        1 if !words.is_empty() => words.swap(at, elsewhere),
                        2 if !words.is_empty() => words[at] = ODD[self.below(ODD.len())].to_owned(),
                        _ => words.insert(at, ODD[self.below(ODD.len())].to_owned()),
                    }
                    lines[one] = words.concat();
                }
            }
        }
        lines.join("\n")
    }

    /// A place in a line at which something can be put in.
    fn place(&mut self, line: &str) -> usize {
        let places: Vec<usize> = line.char_indices().map(|(at, _)| at).collect();
        let chosen = self.below(places.len());
        places.get(chosen).copied().unwrap_or(0)
    }
}

/// The words of a line: runs of letters and digits, and the signs and spaces between them.
fn words(line: &str) -> Vec<String> {
    let mut words: Vec<String> = Vec::new();
    for letter in line.chars() {
        let is_word = |letter: char| letter.is_alphanumeric() || letter == '_';
        match words.last_mut() {
            Some(word) if is_word(letter) && word.chars().all(is_word) => word.push(letter),
            _ => words.push(letter.to_string()),
        }
    }
    words
}

/// Mutant `number` of a compiled model: the same on every machine.
fn mutant(original: &[Vec<u8>], number: u64) -> Vec<Vec<u8>> {
    let mut mutator = Mutator { random: ChaCha8Rng::seed_from_u64(number) };
    let mut files = original.to_vec();
    for _ in 0..1 + mutator.below(2) {
        if mutator.below(3) == 0 {
            mutator.bytes(&mut files);
        } else if let Ok(text) = String::from_utf8(files[0].clone()) {
            files[0] = mutator.text(&text).into_bytes();
        }
    }
    files
}

fn put(place: &Path, files: &[Vec<u8>]) {
    for (name, bytes) in FILES.iter().zip(files) {
        let path = place.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }
}

/// `count` mutants of each compiled model, from number `first` on.
fn try_mutants(count: u64, first: u64) {
    let folder = tempfile::tempdir().unwrap();
    for original in sound(folder.path()) {
        let place = folder.path().join("mutant.mlmodelc");
        let (mut counts, began) = (Counts::default(), Instant::now());
        for number in first..first + count {
            put(&place, &mutant(&original.files, number));
            let work = || survive(&place, &original.inputs, &mut counts);
            within_limits(&format!("mutant {number} of {}", original.name), work);
        }
        println!("{}, compiled: {counts:?} in {:.1} s", original.name, began.elapsed().as_secs_f64());
        assert!(counts.refused as u64 * 2 > count && counts.refused as u64 <= count, "{}: {counts:?}", original.name);
    }
}

#[test]
fn mutants_of_compiled_models() {
    try_mutants(15, 0);
}

#[test]
#[ignore = "minutes"]
fn ten_thousand_mutants_of_compiled_models() {
    limit_address_space(MOST_MEMORY);
    try_mutants(1000, 1_000_000);
}

/// Packages that were broken are refused by the compiler too, or compiled and read back.
#[test]
fn mutants_of_packages_are_compiled_or_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (mut compiled, mut refused) = (0, 0);
    for original in originals(folder.path()) {
        for number in 0..60 {
            let files = crate::mutate::mutant(&original.files, &original.program, 4_000_000 + number);
            match catch_unwind(AssertUnwindSafe(|| Compiled::of(&files.model, "mutant", "model"))) {
                Ok(Ok(_)) => compiled += 1,
                Ok(Err(error)) => {
                    assert!(!format!("{error:#}").is_empty());
                    refused += 1;
                }
                Err(_) => panic!("mutant {number} of {} panics", original.name),
            }
        }
    }
    println!("{compiled} compiled, {refused} refused");
    assert!(compiled > 0 && refused > 0);
}

/// A compiled model that can be changed.
fn copy(folder: &Path) -> (PathBuf, String) {
    let original = sound(folder).into_iter().find(|original| original.name == "palettes").unwrap();
    let place = folder.join("copy.mlmodelc");
    put(&place, &original.files);
    Package::open(&place).unwrap();
    (place, String::from_utf8(original.files[0].clone()).unwrap())
}

#[test]
fn broken_texts_are_told_by_their_lines() {
    let folder = tempfile::tempdir().unwrap();
    let (place, text) = copy(folder.path());
    let refusal = |text: &str| {
        fs::write(place.join("model.mil"), text).unwrap();
        format!("{:#}", Package::open(&place).unwrap_err())
    };
    let shape = text.lines().find(|line| line.contains("shape = tensor<uint32, [4]>([")).unwrap();
    let cases: [(String, &str); 16] = [
        (String::new(), "model.mil: line 1: `program` is expected, there is the end of the file"),
        (text.replacen("program(1.0)", "program(1.3)", 1), "specification version 7 goes with program(1.0)"),
        (text.replacen("func main", "func other", 1), "single function main"),
        (text.replacen("ios16", "ios99", 1), "line 4: `ios99` is not a known set of operations"),
        (text.replacen("ios16", "ios17", 1), "goes with CoreML6"),
        (text.replacen("[buildInfo = ", &format!("[buildInfo = {}", "dict<".repeat(100_000)), 1), "more than 16 deep"),
        (
            text.replacen("tensor<fp16, [", &format!("tensor<fp16, [{}", "1, ".repeat(100_000)), 1),
            "more than 16 dimensions",
        ),
        (format!("{text}}}"), "the end of the file is expected"),
        (text.replacen(shape, &shape.replacen("uint32, [4]>([", "uint32, [4]>([[", 1), 1), "an integer is expected"),
        (
            text.replacen(shape, &shape.replacen("uint32, [4]>([", "uint32, [4]>([4294967296, ", 1), 1),
            "not a value of this type",
        ),
        (
            text.replacen(shape, &shape.replacen("uint32, [4]>([", "uint32, [4]>([1, ", 1), 1),
            "5 elements in brackets, the type says 4",
        ),
        (text.replacen("weights/weight.bin", "weights/../../weight.bin", 1), "is not in the package"),
        (
            text.replacen("offset = tensor<uint64, []>(", "offset = tensor<uint64, []>(1", 1),
            "no blob's record lies at offset",
        ),
        (text.replacen("[name = ", "[odd\u{7f} = ", 1), "which no program has"),
        (text.replacen("tensor<string, []>(\"", "tensor<string, []>(\"a\\", 1), "a text is not closed, or holds"),
        (text[..text.len() / 2].to_owned(), "model.mil: line"),
    ];
    for (broken, part) in cases {
        assert_ne!(broken, text, "{part}");
        let message = refusal(&broken);
        assert!(message.contains(part), "{part}: {message:.400}");
        assert!(message.len() < 2000, "{} bytes", message.len());
    }
    fs::write(place.join("model.mil"), [0xff, 0xfe]).unwrap();
    assert!(format!("{:#}", Package::open(&place).unwrap_err()).contains("model.mil is not text"));
}

#[test]
fn folders_that_lack_files_or_hold_links() {
    let folder = tempfile::tempdir().unwrap();
    let (place, _) = copy(folder.path());
    let refusal = || format!("{:#}", Package::open(&place).unwrap_err());
    for file in FILES {
        let path = place.join(file);
        let bytes = fs::read(&path).unwrap();
        fs::remove_file(&path).unwrap();
        let message = refusal();
        let said = if file.contains('/') { "is not in the package" } else { "is missing" };
        assert!(message.contains(said) && message.contains("not a sound compiled Core ML model"), "{file}: {message}");
        // A link, to what was there and to nothing.
        let outside = folder.path().join("outside");
        fs::write(&outside, &bytes).unwrap();
        for target in [&outside, &folder.path().join("nothing")] {
            symlink(target, &path).unwrap();
            assert!(refusal().contains("not a regular file"), "{file}: {}", refusal());
            fs::remove_file(&path).unwrap();
        }
        fs::write(&path, bytes).unwrap();
        Package::open(&place).unwrap();
    }
    // What apps read must be what the model has.
    let json = fs::read_to_string(place.join("metadata.json")).unwrap();
    let cases = [
        (json.replacen("\"isOptional\": \"0\"", "\"isOptional\": 0", 1), "is not a text"),
        (json.replacen("Ios16.einsum", "Ios16.matmul", 1), "counts 0 einsum"),
        (
            json.replacen("\"specificationVersion\": 7", "\"specificationVersion\": 8", 1),
            "specificationVersion is not 7",
        ),
        (json.replacen("\"shape\": \"[", "\"shape\": \"[9", 1), "the shape of"),
        ("[]".to_owned(), "not a list of one model"),
        ("[".repeat(100_000), "not valid JSON"),
    ];
    for (broken, part) in cases {
        assert_ne!(broken, json, "{part}");
        fs::write(place.join("metadata.json"), broken).unwrap();
        assert!(refusal().contains(part), "{part}: {}", refusal());
    }
    // Through the program itself.
    for command in ["inspect", "verify"] {
        let output = Command::new(env!("CARGO_BIN_EXE_palettist")).arg(command).arg(&place).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(1) && said.contains("copy.mlmodelc"), "{command}: {said}");
    }
}
