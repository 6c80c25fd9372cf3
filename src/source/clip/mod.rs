//! CLIP's own vocabulary, for models that come without a tokenizer: single-file checkpoints.
//!
//! `bpe_simple_vocab_16e6.txt.gz` is OpenAI's, unmodified (github.com/openai/CLIP, MIT, see `LICENSE` beside it): the
//! merges of a byte-pair encoding in order. The 49,408 tokens follow from it as in OpenAI's `simple_tokenizer.py`: the
//! 256 bytes, the 256 bytes at the end of a word, what 48,894 merges make, and two special tokens.

use std::io::Read;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

const MERGES: &[u8] = include_bytes!("bpe_simple_vocab_16e6.txt.gz");
const TOKENS: usize = 49_408;
pub const END_OF_WORD: &str = "</w>";
pub const START: &str = "<|startoftext|>";
/// Ends a text; Stable Diffusion 1 also fills up texts with it.
pub const END: &str = "<|endoftext|>";
/// What Stable Diffusion 2 fills up texts with: the token of id 0.
pub const EXCLAMATION_MARK: &str = "!";

/// The vocabulary.
pub struct Clip {
    /// By id.
    pub tokens: Vec<String>,
    /// In the order in which they are applied.
    pub merges: Vec<(String, String)>,
}

impl Clip {
    /// Unpacks it.
    ///
    /// # Errors
    /// None but in a program that was built of a damaged file.
    pub fn new() -> Result<Self> {
        let mut text = String::new();
        flate2::read::GzDecoder::new(MERGES).read_to_string(&mut text).context("CLIP's vocabulary in this program")?;
        let bytes = byte_characters();
        let merges = text
            .lines()
            // A header; and OpenAI's file goes on after the merges that CLIP uses.
            .skip(1)
            .take(TOKENS - 2 * bytes.len() - 2)
            .map(|line| line.split_once(' ').map(|(left, right)| (left.to_owned(), right.to_owned())))
            .collect::<Option<Vec<_>>>()
            .context("CLIP's vocabulary in this program has a line that is not two tokens")?;
        let mut tokens: Vec<String> = bytes.iter().map(char::to_string).collect();
        tokens.extend(bytes.iter().map(|character| format!("{character}{END_OF_WORD}")));
        tokens.extend(merges.iter().map(|(left, right)| format!("{left}{right}")));
        tokens.extend([START.to_owned(), END.to_owned()]);
        if tokens.len() != TOKENS {
            bail!("CLIP's vocabulary in this program has {} tokens, not {TOKENS}", tokens.len());
        }
        Ok(Self { tokens, merges })
    }

    /// A tokenizer folder that transformers loads: names and contents of its files. Texts are filled up with `pad` to
    /// `length` tokens.
    pub fn files(&self, pad: &str, length: i64) -> Result<[(&'static str, String); 4]> {
        // In the order of the ids, which a map of serde_json would not keep.
        let entries =
            self.tokens.iter().enumerate().map(|(id, token)| Ok(format!("{}: {id}", serde_json::to_string(token)?)));
        let vocabulary = format!("{{{}}}", entries.collect::<Result<Vec<_>>>()?.join(", "));
        let merges: String = self.merges.iter().map(|(left, right)| format!("{left} {right}\n")).collect();
        Ok([
            ("vocab.json", vocabulary),
            ("merges.txt", format!("#version: 0.2\n{merges}")),
            ("tokenizer_config.json", serde_json::to_string_pretty(&config(pad, length))? + "\n"),
            ("special_tokens_map.json", serde_json::to_string_pretty(&special_tokens(pad))? + "\n"),
        ])
    }
}

/// `tokenizer_config.json`, with the values of Stable Diffusion's own.
fn config(pad: &str, length: i64) -> Value {
    json!({
        "add_prefix_space": false,
        "bos_token": START,
        "do_lower_case": true,
        "eos_token": END,
        "errors": "replace",
        "model_max_length": length,
        "pad_token": pad,
        "tokenizer_class": "CLIPTokenizer",
        "unk_token": END,
    })
}

/// `special_tokens_map.json`, which wins over the former.
pub fn special_tokens(pad: &str) -> Value {
    let token = |content: &str| json!({ "content": content, "lstrip": false, "normalized": true, "rstrip": false, "single_word": false });
    json!({ "bos_token": token(START), "eos_token": token(END), "unk_token": token(END), "pad_token": pad })
}

/// The characters that stand for the 256 bytes: the printable ones of Latin-1 for themselves and before the others, for
/// which characters from U+0100 on stand.
fn byte_characters() -> Vec<char> {
    let printable = |byte: &u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    let own = (0..=255).filter(printable).map(char::from);
    let others = (0..=255).filter(|byte| !printable(byte));
    own.chain(others.zip('\u{100}'..).map(|(_, character)| character)).collect()
}
