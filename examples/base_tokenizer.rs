//! Makes the small base's tokenizer from its captions: `cargo run --example base_tokenizer -- CAPTIONS.jsonl FOLDER`.
//!
//! CLIP's format and CLIP's way (Sennrich et al. 2016, byte-pair encoding over words that end in `</w>`), with a
//! vocabulary of its own: bytes, bytes at a word's end, then merges, the most frequent pair first, until every word of
//! the captions is one token. Any other text still has ids, byte by byte.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::json;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [captions, folder] = arguments.as_slice() else {
        anyhow::bail!("usage: base_tokenizer CAPTIONS.jsonl FOLDER");
    };
    let text = std::fs::read_to_string(captions).with_context(|| captions.clone())?;
    let mut words: BTreeMap<Vec<String>, usize> = BTreeMap::new();
    for line in text.lines() {
        let line: serde_json::Value = serde_json::from_str(line)?;
        let caption = line["text"].as_str().context("a line without `text`")?.to_lowercase();
        for word in caption.replace(',', " , ").split_whitespace() {
            let mut symbols: Vec<String> = word.chars().map(String::from).collect();
            symbols.last_mut().expect("words are not empty").push_str("</w>");
            *words.entry(symbols).or_default() += 1;
        }
    }
    let merges = learn_merges(words);

    let alphabet = byte_alphabet();
    let mut vocabulary: Vec<String> = alphabet.iter().map(char::to_string).collect();
    vocabulary.extend(alphabet.iter().map(|symbol| format!("{symbol}</w>")));
    vocabulary.extend(merges.iter().map(|(left, right)| format!("{left}{right}")));
    vocabulary.extend(["<|startoftext|>", "<|endoftext|>"].map(String::from));

    let folder = Path::new(folder);
    std::fs::create_dir_all(folder)?;
    let ids: serde_json::Map<String, serde_json::Value> =
        vocabulary.iter().enumerate().map(|(id, token)| (token.clone(), json!(id))).collect();
    std::fs::write(folder.join("vocab.json"), serde_json::to_string(&ids)? + "\n")?;
    let lines: String = merges.iter().map(|(left, right)| format!("{left} {right}\n")).collect();
    std::fs::write(folder.join("merges.txt"), format!("#version: 0.2\n{lines}"))?;
    let config = json!({
        "add_prefix_space": false,
        "bos_token": "<|startoftext|>",
        "do_lower_case": true,
        "eos_token": "<|endoftext|>",
        "errors": "replace",
        "model_max_length": 77,
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "CLIPTokenizer",
        "unk_token": "<|endoftext|>",
    });
    std::fs::write(folder.join("tokenizer_config.json"), serde_json::to_string_pretty(&config)? + "\n")?;
    println!("{} tokens, {} merges; vocab_size is {}", vocabulary.len(), merges.len(), vocabulary.len());
    Ok(())
}

/// Merges, in order, until every word is one symbol.
fn learn_merges(mut words: BTreeMap<Vec<String>, usize>) -> Vec<(String, String)> {
    let mut merges = Vec::new();
    loop {
        let mut pairs: BTreeMap<(String, String), usize> = BTreeMap::new();
        for (symbols, count) in &words {
            for pair in symbols.windows(2) {
                *pairs.entry((pair[0].clone(), pair[1].clone())).or_default() += count;
            }
        }
        // Of equally frequent pairs the first in the alphabet, so that the result does not vary.
        let Some((best, _)) = pairs.into_iter().reduce(|a, b| if b.1 > a.1 { b } else { a }) else { return merges };
        words = words.into_iter().map(|(symbols, count)| (merge(&symbols, &best), count)).collect();
        merges.push(best);
    }
}

fn merge(symbols: &[String], pair: &(String, String)) -> Vec<String> {
    let mut merged = Vec::with_capacity(symbols.len());
    let mut i = 0;
    while i < symbols.len() {
        if i + 1 < symbols.len() && symbols[i] == pair.0 && symbols[i + 1] == pair.1 {
            merged.push(format!("{}{}", pair.0, pair.1));
            i += 2;
        } else {
            merged.push(symbols[i].clone());
            i += 1;
        }
    }
    merged
}

/// GPT-2's printable character for each byte, in CLIP's order: printable ones first.
fn byte_alphabet() -> Vec<char> {
    let printable: Vec<u32> = (33..=126).chain(161..=172).chain(174..=255).collect();
    let rest = (0..256u32).filter(|byte| !printable.contains(byte)).count() as u32;
    printable.iter().copied().chain(256..256 + rest).filter_map(char::from_u32).collect()
}
