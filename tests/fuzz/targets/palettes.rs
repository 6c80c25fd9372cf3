#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| palettist_fuzz::palettes(bytes));
