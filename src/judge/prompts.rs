//! Prompts from a file, with what their pictures are to show.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::config::SamplePrompt;
use crate::files::json::{read_json, read_text};

/// What to draw, and what it is to show.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct JudgedPrompt {
    /// The prompt, with the flags that a config's `sample.prompts` have.
    pub drawn: SamplePrompt,
    /// `thing` → `cat`, `place` → `in the snow`: what a judge is to find in the picture.
    pub labels: BTreeMap<String, String>,
}

/// The values that each label may have, each with the text that stands for it.
pub type LabelTexts = BTreeMap<String, BTreeMap<String, String>>;

/// Texts of a line that are not labels.
const NOT_LABELS: [&str; 2] = ["text", "file_name"];

/// Reads a file of prompts. Of `.jsonl` each line is an object: `text` is the prompt, other texts are labels (`thing`,
/// `color`, …) but for `file_name`, so that a data set's `metadata.jsonl` is such a file. Of any other name each line is a
/// prompt. Empty lines, and in plain files those that begin with `#`, are left out.
///
/// # Errors
/// The first line that is wrong, with its number; a file without prompts.
pub fn read_prompts(path: &Path) -> Result<Vec<JudgedPrompt>> {
    let text = read_text(path)?;
    let is_json = is_jsonl(path);
    let mut prompts = Vec::new();
    for (number, line) in lines(&text) {
        if !is_json && line.starts_with('#') {
            continue;
        }
        let place = || format!("{}:{number}", path.display());
        let (prompt, labels) =
            if is_json { labelled(line).with_context(place)? } else { (line.to_owned(), BTreeMap::new()) };
        let drawn = SamplePrompt::parse(&prompt).map_err(anyhow::Error::msg).with_context(place)?;
        prompts.push(JudgedPrompt { drawn, labels });
    }
    ensure!(!prompts.is_empty(), "{} has no prompts: one on each line is expected", path.display());
    Ok(prompts)
}

/// Reads the values that labels may have: a `.json` file of one object, each label with a list of values
/// (`{"thing": ["cat", "dog"]}`) or an object of values and the texts that stand for them
/// (`{"thing": {"cat": "a drawing of a cat"}}`); or a `.jsonl` file as [`read_prompts`] reads it, whose labels are gathered.
/// A value without a text stands for itself.
///
/// # Errors
/// What is wrong where.
pub fn read_labels(path: &Path) -> Result<LabelTexts> {
    let mut found = LabelTexts::new();
    if is_jsonl(path) {
        for (number, line) in lines(&read_text(path)?) {
            let (_, labels) = labelled(line).with_context(|| format!("{}:{number}", path.display()))?;
            for (label, value) in labels {
                found.entry(label).or_default().insert(value.clone(), value);
            }
        }
        return Ok(found);
    }
    let json = read_json(path)?;
    let expected =
        "one object is expected: {\"thing\": [\"cat\", \"dog\"]} or {\"thing\": {\"cat\": \"a drawing of a cat\"}}";
    let Some(object) = json.as_object() else { bail!("{}: {expected}", path.display()) };
    for (label, values) in object {
        let values: Option<BTreeMap<String, String>> = match values {
            Value::Array(values) => {
                values.iter().map(|value| value.as_str().map(|text| (text.to_owned(), text.to_owned()))).collect()
            }
            Value::Object(texts) => {
                texts.iter().map(|(value, text)| Some((value.clone(), text.as_str()?.to_owned()))).collect()
            }
            _ => None,
        };
        let values = values.with_context(|| format!("{}: `{label}` is neither; {expected}", path.display()))?;
        found.insert(label.clone(), values);
    }
    Ok(found)
}

fn is_jsonl(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("jsonl"))
}

/// Lines that say something, with their numbers.
fn lines(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let text = text.trim_start_matches('\u{feff}');
    (1..).zip(text.lines()).map(|(number, line)| (number, line.trim())).filter(|(_, line)| !line.is_empty())
}

/// Prompt and labels of a line of JSON.
fn labelled(line: &str) -> Result<(String, BTreeMap<String, String>)> {
    let expected = "an object like {\"text\": \"a red cat\", \"thing\": \"cat\", \"color\": \"red\"} is expected";
    let Value::Object(object) = serde_json::from_str(line).with_context(|| format!("not JSON; {expected}"))? else {
        bail!("{expected}")
    };
    let text = object.get("text").and_then(Value::as_str).with_context(|| format!("there is no `text`; {expected}"))?;
    let labels = object.iter().filter(|(key, _)| !NOT_LABELS.contains(&key.as_str()));
    let labels = labels.filter_map(|(key, value)| Some((key.clone(), value.as_str()?.to_owned())));
    Ok((text.to_owned(), labels.collect()))
}
