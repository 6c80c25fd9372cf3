//! CLIP's byte-pair tokenizer (Radford et al. 2021, after Sennrich et al. 2016), with the ids that transformers'
//! `CLIPTokenizer` gives.
//!
//! Read from `tokenizer.json` or from `vocab.json` and `merges.txt`, or made of OpenAI's own vocabulary. As transformers does since its version 5, only the
//! vocabulary, the merges and the special tokens are taken from the files; normalisation and splitting are CLIP's own.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail};
use serde_json::Value;
use tokenizers::models::bpe::BPE;
use tokenizers::normalizers::replace::ReplacePattern;
use tokenizers::normalizers::{Lowercase, NFC, Replace, Sequence as Normalizers};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence as Splitters;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, SplitDelimiterBehavior};

use super::clip::{self, Clip, END_OF_WORD};
use crate::files::json::{read_json, read_json_if_there, read_text};
use crate::networks::text_encoder::TextEncoderConfig;

/// Special tokens, then contractions, words, single digits, runs of anything else (OpenAI's `simple_tokenizer.py`).
const PIECES: &str = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";

/// Text to ids.
pub struct Tokenizer {
    bpe: tokenizers::Tokenizer,
    start: i64,
    end: i64,
    pad: i64,
    length: usize,
    is_length_said: bool,
    /// Tokens that are in no vocabulary and not special, as textual inversion adds them.
    added: Vec<String>,
}

/// How many tokens OpenAI's CLIP reads.
const CLIP_LENGTH: u64 = 77;

impl Tokenizer {
    /// Reads a tokenizer folder.
    ///
    /// # Errors
    /// One line with the file: neither form is there, it is not CLIP's kind, a token that another file needs is missing.
    pub fn open(folder: &Path) -> Result<Self> {
        let files = Files::read(folder)?;
        let file = |name: &str| Ok::<_, anyhow::Error>(read_json_if_there(&folder.join(name))?.unwrap_or(Value::Null));
        let config = file("tokenizer_config.json")?;
        // transformers lets the older special_tokens_map.json win, unless the newer file lists its added tokens.
        let map = match config.get("added_tokens_decoder") {
            None => file("special_tokens_map.json")?,
            Some(_) => Value::Null,
        };
        let build = || Self::build(files, &config, &map, file("added_tokens.json")?);
        build().with_context(|| format!("the tokenizer in {}", folder.display()))
    }

    /// CLIP's own, from this program; texts are filled up with the token `pad`.
    pub fn clip(pad: &str) -> Result<Self> {
        let clip = Clip::new()?;
        let vocabulary = clip.tokens.into_iter().zip(0..).collect();
        let files = Files { vocabulary, merges: clip.merges, added: Vec::new(), pad: None };
        Self::build(files, &Value::Null, &clip::special_tokens(pad), Value::Null)
    }

    /// `config`, `map` and `added_tokens`: `tokenizer_config.json`, `special_tokens_map.json` and `added_tokens.json`.
    fn build(files: Files, config: &Value, map: &Value, added_tokens: Value) -> Result<Self> {
        let special = |key: &str, default: &str| {
            let value = [map, config].into_iter().find_map(|json| json.get(key).filter(|value| !value.is_null()));
            value.map_or_else(|| Ok(AddedToken::from(default, true)), |value| added_token(value, true))
        };
        let (start, end) = ("<|startoftext|>", "<|endoftext|>");
        let pad = special("pad_token", files.pad.as_deref().unwrap_or(end))?;
        let specials =
            [special("bos_token", start)?, special("eos_token", end)?, special("unk_token", end)?, pad.clone()];
        // The byte-pair model itself answers with this one to bytes that it does not know.
        if !files.vocabulary.contains_key(&specials[2].content) {
            bail!("its vocabulary lacks the unknown token `{}`", specials[2].content);
        }
        let model = BPE::builder()
            .vocab_and_merges(files.vocabulary.into_iter().collect::<tokenizers::models::bpe::Vocab>(), files.merges)
            .unk_token(specials[2].content.clone())
            .continuing_subword_prefix(String::new())
            .end_of_word_suffix("</w>".into())
            .build()
            .map_err(|error| anyhow!("{error}"))?;
        let mut bpe = tokenizers::Tokenizer::new(model);
        let spaces = Replace::new(ReplacePattern::Regex(r"\s+".into()), " ").map_err(|error| anyhow!("{error}"))?;
        let normalizers = Normalizers::new(vec![NFC.into(), spaces.into(), Lowercase.into()]);
        bpe.with_normalizer(Some(normalizers)).map_err(|error| anyhow!("{error}"))?;
        let pieces = Split::new(SplitPattern::Regex(PIECES.into()), SplitDelimiterBehavior::Removed, true)
            .map_err(|error| anyhow!("{error}"))?;
        bpe.with_pre_tokenizer(Some(Splitters::new(vec![pieces.into(), ByteLevel::new(false, true, true).into()])));

        let mut added = files.added;
        for (id, token) in config.get("added_tokens_decoder").and_then(Value::as_object).into_iter().flatten() {
            let id = id.parse().map_err(|_| anyhow!("`added_tokens_decoder` has the id `{id}`"))?;
            added.push((added_token(token, false)?, id));
        }
        if let Value::Object(tokens) = added_tokens {
            for (token, id) in tokens {
                let id = id.as_u64().ok_or_else(|| anyhow!("added_tokens.json: `{token}` has no id"))?;
                added.push((AddedToken::from(token, false), id));
            }
        }
        // New tokens take the next free ids: in the order of the ids that the files give them.
        added.sort_by_key(|(_, id)| *id);
        let mut extra = Vec::new();
        for (token, id) in added {
            let name = token.content.clone();
            if bpe.token_to_id(&name).is_none() && specials.iter().all(|special| special.content != name) {
                extra.push(name.clone());
            }
            let added = if token.special { bpe.add_special_tokens([token]) } else { bpe.add_tokens([token]) };
            added.map_err(|error| anyhow!("the added token `{name}`: {error}"))?;
            if bpe.token_to_id(&name).map(u64::from) != Some(id) {
                bail!("the added token `{name}` has the id {id}, which does not follow the vocabulary");
            }
        }
        let id = |token: &AddedToken| bpe.token_to_id(&token.content).map(i64::from).ok_or(token.content.clone());
        let ids: Result<Vec<i64>, String> = specials.iter().map(id).collect();
        let ids = ids.map_err(|token| anyhow!("its vocabulary lacks the special token `{token}`"))?;
        bpe.add_special_tokens(specials).map_err(|error| anyhow!("its special tokens: {error}"))?;
        // Absent, or absurd: transformers writes 1e30 for "unknown".
        let said = config.get("model_max_length").and_then(Value::as_u64).filter(|&n| n < 10_000);
        let length = said.unwrap_or(CLIP_LENGTH);
        if length < 2 {
            bail!("tokenizer_config.json has `model_max_length`: {length}; start and end alone are 2");
        }
        Ok(Self {
            bpe,
            start: ids[0],
            end: ids[1],
            pad: ids[3],
            length: length as usize,
            is_length_said: said.is_some(),
            added: extra,
        })
    }

    /// With texts of as many tokens as `encoder` has positions, where the files do not say how many (those of LongCLIP have
    /// 248), checked against it.
    /// `place` is where the tokenizer's files are.
    ///
    /// # Errors
    /// It has more tokens, or longer texts, than the encoder takes.
    pub(super) fn fitting(self, encoder: &TextEncoderConfig, place: &Path) -> Result<Self> {
        let tokenizer = match usize::try_from(encoder.positions) {
            Ok(positions) if !self.is_length_said && positions >= 2 => Self { length: positions, ..self },
            _ => self,
        };
        if tokenizer.vocabulary_size() > encoder.vocab_size || tokenizer.length() as i64 > encoder.positions {
            bail!(
                "{}: {} tokens of texts of {}, but the text encoder knows {} (`vocab_size`) and reads {} \
                 (`max_position_embeddings`)",
                place.display(),
                tokenizer.vocabulary_size(),
                tokenizer.length(),
                encoder.vocab_size,
                encoder.positions
            );
        }
        Ok(tokenizer)
    }

    /// Ids of `text` between start and end, cut and padded to [`Self::length`], as transformers does with
    /// `padding="max_length", truncation=True`.
    pub fn encode(&self, text: &str) -> Vec<i64> {
        // Nothing in CLIP's pipeline fails on text: bytes that the vocabulary lacks become the unknown token.
        let pieces = self.bpe.encode_fast(text, false).expect("CLIP's splitting takes any text");
        let mut ids = vec![self.start];
        ids.extend(pieces.get_ids().iter().take(self.length - 2).map(|&id| i64::from(id)));
        ids.push(self.end);
        ids.resize(self.length, self.pad);
        ids
    }

    /// How many ids `text` has with start and end, before [`Self::encode`] cuts it.
    pub fn count(&self, text: &str) -> usize {
        2 + self.bpe.encode_fast(text, false).expect("CLIP's splitting takes any text").len()
    }

    /// How many ids [`Self::encode`] gives: 77 for every Stable Diffusion but those with LongCLIP.
    pub fn length(&self) -> usize {
        self.length
    }

    /// The id of the end-of-text.
    pub fn end(&self) -> i64 {
        self.end
    }

    /// What texts are filled up with.
    pub fn pad(&self) -> i64 {
        self.pad
    }

    /// The tokens that were added to the vocabulary, with their ids.
    pub fn added(&self) -> impl Iterator<Item = (&str, i64)> {
        self.added.iter().filter_map(|token| Some((token.as_str(), self.id(token)?)))
    }

    /// The id of a token.
    pub fn id(&self, token: &str) -> Option<i64> {
        self.bpe.token_to_id(token).map(i64::from)
    }

    /// One more than the largest id.
    pub fn vocabulary_size(&self) -> i64 {
        self.bpe.get_vocab(true).into_values().max().map_or(0, |id| i64::from(id) + 1)
    }
}

/// What a tokenizer's files hold, whichever form they have.
struct Files {
    vocabulary: BTreeMap<String, u32>,
    merges: Vec<(String, String)>,
    added: Vec<(AddedToken, u64)>,
    pad: Option<String>,
}

/// A tokenizer as Apple's Swift package reads it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SwiftTokenizer {
    /// `vocab.json` and `merges.txt`, names and contents.
    pub files: [(&'static str, String); 2],
    /// Added tokens that no text reaches there: it knows no added tokens, and takes a word apart by the merges alone.
    pub unreachable: Vec<String>,
}

/// The tokenizer of a folder for Apple's Swift package, whichever form it has, with all added tokens. Swift needs the two
/// special tokens in `vocab.json`, and a line end after the last line of `merges.txt`.
///
/// # Errors
/// Those of [`Tokenizer::open`]; without one of the special tokens.
pub fn for_swift(folder: &Path) -> Result<SwiftTokenizer> {
    let tokenizer = Tokenizer::open(folder)?;
    let Files { mut vocabulary, merges, added, .. } = Files::read(folder)?;
    for (token, id) in added {
        vocabulary.entry(token.content).or_insert(u32::try_from(id).context("the id of an added token")?);
    }
    let ranks: HashMap<(&str, &str), usize> =
        merges.iter().enumerate().map(|(rank, (left, right))| ((left.as_str(), right.as_str()), rank)).collect();
    let mut unreachable = Vec::new();
    for (token, id) in tokenizer.added() {
        let id = u32::try_from(id).context("the id of an added token")?;
        vocabulary.entry(token.to_owned()).or_insert(id);
        // What Swift makes of a word ends with the mark of its end.
        let word = format!("{token}{END_OF_WORD}");
        let lower = token.to_lowercase() == token && !token.contains(char::is_whitespace);
        if lower && swift_pieces(token, &ranks) == [word.as_str()] {
            vocabulary.entry(word).or_insert(id);
        } else {
            unreachable.push(token.to_owned());
        }
    }
    for token in [clip::START, clip::END] {
        if !vocabulary.contains_key(token) {
            bail!("the tokenizer in {} lacks the token `{token}`", folder.display());
        }
    }
    let mut entries: Vec<(String, u32)> = vocabulary.into_iter().collect();
    entries.sort_by(|a, b| (a.1, &a.0).cmp(&(b.1, &b.0)));
    let entries = entries.into_iter().map(|(token, id)| Ok(format!("{}: {id}", serde_json::to_string(&token)?)));
    let entries = entries.collect::<Result<Vec<_>>>()?.join(", ");
    let merges: String = merges.into_iter().map(|(left, right)| format!("{left} {right}\n")).collect();
    let files = [("vocab.json", format!("{{{entries}}}\n")), ("merges.txt", format!("#version: 0.2\n{merges}"))];
    Ok(SwiftTokenizer { files, unreachable })
}

/// The pieces that Apple's Swift package takes a word apart in: its characters, merged pair by pair in the order of the
/// merges.
fn swift_pieces(word: &str, ranks: &HashMap<(&str, &str), usize>) -> Vec<String> {
    let mut pieces: Vec<String> = word.chars().map(String::from).collect();
    if let Some(last) = pieces.last_mut() {
        last.push_str(END_OF_WORD);
    }
    loop {
        let pairs = pieces.windows(2).filter_map(|pair| Some((*ranks.get(&(&*pair[0], &*pair[1]))?, pair)));
        let Some((_, pair)) = pairs.min_by_key(|(rank, _)| *rank) else { return pieces };
        let (left, right) = (pair[0].clone(), pair[1].clone());
        let mut merged: Vec<String> = Vec::with_capacity(pieces.len());
        let mut rest = pieces.into_iter().peekable();
        while let Some(piece) = rest.next() {
            let pairs = piece == left && rest.peek() == Some(&right);
            merged.push(if pairs { piece + &rest.next().unwrap_or_default() } else { piece });
        }
        pieces = merged;
    }
}

impl Files {
    fn read(folder: &Path) -> Result<Self> {
        let whole = folder.join("tokenizer.json");
        match read_json_if_there(&whole)? {
            Some(json) => Self::from_tokenizer_json(&json).with_context(|| whole.display().to_string()),
            None => Self::from_vocabulary_and_merges(folder),
        }
    }

    fn from_vocabulary_and_merges(folder: &Path) -> Result<Self> {
        let path = folder.join("vocab.json");
        if !path.is_file() {
            bail!("{} has no tokenizer: neither tokenizer.json nor vocab.json and merges.txt", folder.display());
        }
        let vocabulary = serde_json::from_value(read_json(&path)?)
            .with_context(|| format!("{} is not a table of tokens and ids", path.display()))?;
        let path = folder.join("merges.txt");
        let text = read_text(&path)?;
        let mut merges = Vec::new();
        for (number, line) in text.lines().enumerate() {
            if line.starts_with("#version") || line.trim().is_empty() {
                continue;
            }
            match line.split_once(' ') {
                Some((left, right)) if !right.contains(' ') => merges.push((left.to_owned(), right.to_owned())),
                _ => bail!("{}, line {}: `{line}` is not two tokens", path.display(), number + 1),
            }
        }
        Ok(Self { vocabulary, merges, added: Vec::new(), pad: None })
    }

    fn from_tokenizer_json(json: &Value) -> Result<Self> {
        let model = json.get("model").context("it has no `model`")?;
        match model.get("type").and_then(Value::as_str) {
            None | Some("BPE") => {}
            Some(other) => bail!("`model.type` is {other}, which is not supported (BPE is)"),
        }
        if model.get("end_of_word_suffix").and_then(Value::as_str) != Some("</w>") {
            bail!("`model.end_of_word_suffix` is not \"</w>\": it is not a CLIP tokenizer");
        }
        let vocabulary = model.get("vocab").cloned().unwrap_or(Value::Null);
        let vocabulary =
            serde_json::from_value(vocabulary).context("`model.vocab` is not a table of tokens and ids")?;
        let merges = model.get("merges").and_then(Value::as_array).context("`model.merges` is missing")?;
        // Two forms: "a b", and since tokenizers 0.20 ["a", "b"].
        let pair = |merge: &Value| match merge {
            Value::String(text) => text.split_once(' ').map(|(left, right)| (left.to_owned(), right.to_owned())),
            other => serde_json::from_value(other.clone()).ok(),
        };
        let merges = merges
            .iter()
            .map(|merge| pair(merge).ok_or_else(|| anyhow!("`model.merges` has {merge}, which is not two tokens")))
            .collect::<Result<_>>()?;
        let mut added = Vec::new();
        for token in json.get("added_tokens").and_then(Value::as_array).into_iter().flatten() {
            let id =
                token.get("id").and_then(Value::as_u64).with_context(|| format!("added token {token} has no id"))?;
            added.push((added_token(token, false)?, id));
        }
        let pad = json.pointer("/padding/pad_token").and_then(Value::as_str).map(str::to_owned);
        Ok(Self { vocabulary, merges, added, pad })
    }
}

/// A token given as a text (then never normalised, as transformers has it) or as an object with its flags.
fn added_token(value: &Value, special: bool) -> Result<AddedToken> {
    let flag = |key: &str, default: bool| value.get(key).and_then(Value::as_bool).unwrap_or(default);
    let content = value.as_str().or_else(|| value.get("content").and_then(Value::as_str));
    let content = content.with_context(|| format!("a special token is {value}, neither a text nor an object"))?;
    let special = special || flag("special", false);
    Ok(AddedToken::from(content, special)
        .normalized(flag("normalized", !special))
        .lstrip(flag("lstrip", false))
        .rstrip(flag("rstrip", false))
        .single_word(flag("single_word", false)))
}
