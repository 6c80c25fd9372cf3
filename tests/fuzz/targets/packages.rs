#![no_main]
//! Half of the mutations are libFuzzer's, of bytes; half are those of tests/coreml_hostile, of the decoded program.

#[path = "../../coreml_hostile/mutate.rs"]
mod mutate;

use libfuzzer_sys::{fuzz_mutator, fuzz_target, fuzzer_mutate};
use mutate::{Files, mutant};
use palettist::coreml::format::proto;
use palettist_fuzz::{MANIFEST, join_package, packages, split_package};
use prost::Message;

fuzz_target!(|bytes: &[u8]| packages(bytes));

fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    if seed.is_multiple_of(2) {
        let (model, weights) = split_package(&data[..size]);
        if let Ok(program) = proto::Model::decode(model) {
            let files = Files { manifest: MANIFEST.to_vec(), model: model.to_vec(), weights: weights.to_vec() };
            let files = mutant(&files, &program, u64::from(seed));
            let joined = join_package(&files.model, &files.weights);
            if joined.len() <= max_size {
                data[..joined.len()].copy_from_slice(&joined);
                return joined.len();
            }
        }
    }
    fuzzer_mutate(data, size, max_size)
});
