//! Files that are not TOML: what is wrong with them, in the words of who wrote them.

use std::collections::BTreeSet;
use std::io::Read;
use std::ops::Range;
use std::path::Path;

use super::Problem;

/// The most bytes of a config.
const LONGEST: u64 = 10_000_000;

/// The text of a file, without a byte order mark.
///
/// # Errors
/// Why it can't be read, without the file's name.
pub(super) fn read_text(path: &Path) -> Result<String, String> {
    if path.is_dir() {
        return Err("is a folder, not a TOML file".into());
    }
    // A pipe, of a shell's `<(…)`, is read as well; what does not end is not read to its end.
    let mut bytes = Vec::new();
    std::fs::File::open(path)
        .and_then(|file| file.take(LONGEST + 1).read_to_end(&mut bytes))
        .map_err(|error| format!("can't be read: {error}"))?;
    if bytes.len() as u64 > LONGEST {
        return Err(format!("has more than {} million bytes; it is not a config", LONGEST / 1_000_000));
    }
    if bytes.starts_with(b"\xff\xfe") || bytes.starts_with(b"\xfe\xff") {
        return Err("is text in UTF-16, as Windows Notepad saves \"Unicode\": save it as UTF-8".into());
    }
    if bytes.contains(&0) {
        return Err("is not a text file (it has bytes of 0); a config is TOML, as `palettist init` writes".into());
    }
    match String::from_utf8(bytes) {
        Ok(text) => Ok(text.trim_start_matches('\u{feff}').to_owned()),
        Err(error) => {
            let valid = &error.as_bytes()[..error.utf8_error().valid_up_to()];
            let line = valid.iter().filter(|&&byte| byte == b'\n').count() + 1;
            Err(format!("is not text in UTF-8 (line {line}): save it as UTF-8"))
        }
    }
}

/// `file:line:column` of a span of `text`, counted from 1, columns in characters.
pub(super) fn place(text: &str, file: &str, span: Option<Range<usize>>) -> String {
    let start = start(text, span);
    let before = String::from_utf8_lossy(&text.as_bytes()[..start]);
    let line = before.matches('\n').count() + 1;
    let column = before.rsplit('\n').next().unwrap_or("").chars().count() + 1;
    format!("{file}:{line}:{column}")
}

fn start(text: &str, span: Option<Range<usize>>) -> usize {
    span.map_or(text.len(), |span| span.start).min(text.len())
}

/// The number of the line, from 0, that a place in `text` lies on.
pub(super) fn line_of(text: &str, at: usize) -> usize {
    text.as_bytes()[..at.min(text.len())].iter().filter(|&&byte| byte == b'\n').count()
}

/// What is not TOML: a problem for each line at fault, and the numbers of these lines; no numbers where all that follows
/// is in doubt.
pub(super) fn problems(text: &str, file: &str, errors: &[toml::de::Error]) -> (Vec<Problem>, Option<BTreeSet<usize>>) {
    /// So many lines are wrong only in a file of another kind.
    const MOST: usize = 12;
    let mut lines = BTreeSet::new();
    let mut problems = Vec::new();
    for error in errors {
        let message = error.message();
        let at = start(text, error.span());
        // What is missing its end is told where it begins: the line before, if it ended there.
        let line = line_of(text, at);
        if !lines.insert(line) {
            continue;
        }
        if problems.len() < MOST {
            let message = format!("is not TOML here: {}", explained(text, error.span(), message));
            problems.push(Problem { place: place(text, file, error.span()), message });
        }
        // What follows these is in doubt.
        let line = line_at(text, at);
        let unclosed = ["unclosed array,", "unclosed inline", "invalid key-value pair"];
        let begun = message.starts_with("missing comma") && is_entry(line);
        let open = unclosed.iter().any(|begins| message.starts_with(begins)) || message.contains("multi-line");
        if open || begun || line.starts_with('{') {
            return (problems, None);
        }
    }
    if lines.len() > MOST {
        let message = format!("{} more lines are not TOML; `palettist init` writes a config", lines.len() - MOST);
        problems.push(Problem { place: file.to_owned(), message });
        return (problems, None);
    }
    (problems, Some(lines))
}

/// The line that a place in `text` lies on, without spaces around it.
fn line_at(text: &str, at: usize) -> &str {
    let begin = text.as_bytes()[..at].iter().rposition(|&byte| byte == b'\n').map_or(0, |newline| newline + 1);
    let end = text.as_bytes()[at..].iter().position(|&byte| byte == b'\n').map_or(text.len(), |newline| at + newline);
    text.get(begin..end).unwrap_or_default().trim()
}

/// Whether a line looks like a key with its value or the name of a table, not like an item of a list.
fn is_entry(line: &str) -> bool {
    let is_name = |text: &str| !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c));
    let table = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
    line.split_once('=').is_some_and(|(key, _)| is_name(key.trim()))
        || table.is_some_and(|table| is_name(table.trim_matches(['[', ']'])))
}

/// The parser's message in a user's words, from the line that it is about.
fn explained(text: &str, span: Option<Range<usize>>, message: &str) -> String {
    let at = start(text, span.clone());
    let line = line_at(text, at);
    let found = span.and_then(|span| text.get(span)).unwrap_or_default().trim();
    let value = line.split_once('=').map_or("", |(_, value)| value.trim());
    let rest = text.get(at..).unwrap_or_default().lines().next().unwrap_or_default().trim();
    if line.contains(['“', '”', '„', '‘', '’', '«', '»']) && !line.starts_with('#') && !value.starts_with(['"', '\''])
    {
        return "it has typographic quotes: write straight ones, as in \"text\"".into();
    }
    if value.contains(['−', '–', '—']) && !value.starts_with(['"', '\'']) {
        return "it has a typographic minus or dash: write `-`".into();
    }
    if line.contains('\u{a0}') && !value.starts_with(['"', '\'']) {
        return "it has a no-break space: write a plain one".into();
    }
    if line.starts_with("//") || line.starts_with(';') || line.starts_with("/*") {
        return "comments begin with `#`".into();
    }
    if line.starts_with('{') {
        return "it looks like JSON; a config is TOML, as `palettist init` writes".into();
    }
    let about = |start: &str| message.starts_with(start);
    match message {
        _ if message.contains("escape") || about("too few unicode") || message.contains("unicode value") => {
            "in \"…\" a backslash begins an escape; write the text in '…', as in 'C:\\Users\\me', or each backslash twice"
                .into()
        }
        _ if about("string values must be quoted") => unquoted(found),
        _ if about("invalid boolean") || about("invalid float, expected `nan`") || about("invalid float, expected `inf`") => {
            word(found)
        }
        _ if about("invalid basic string") || about("invalid literal string") => {
            "a text lacks its closing quote at the end of this line".into()
        }
        _ if message.contains("multi-line") => "a text in three quotes has no end".into(),
        _ if about("missing opening quote") => "a text lacks its opening quote".into(),
        _ if about("key with no value") || about("invalid unquoted key") => no_value(line),
        _ if about("missing comma") && is_entry(line) => "a list above lacks its closing `]`".into(),
        _ if about("missing comma") => "items of a list have commas between them".into(),
        _ if about("duplicate key") && line.starts_with('[') => {
            format!("duplicate key `{found}`: the table {line} is there twice; put all its keys under the first")
        }
        _ if about("duplicate key") => format!("duplicate key `{found}`: it is written twice"),
        _ if about("unclosed table") || about("unclosed array table") => "a [table] lacks its closing `]`".into(),
        _ if about("unclosed array") => "a list lacks its closing `]`".into(),
        _ if about("unclosed inline table") => "a table in { } lacks its `}`".into(),
        _ if about("extra `=`") => "it has two `=`".into(),
        _ if about("invalid mantissa") => "a number has a digit before its point, as in 0.5".into(),
        _ if about("invalid fraction") => "a number has a digit after its point, as in 5.0".into(),
        _ if about("unexpected leading zero") => "a number does not begin with 0".into(),
        _ if about("carriage return") => {
            "its lines end in a carriage return alone: save it with Unix or Windows line ends".into()
        }
        _ if about("unexpected key or value") => left_over(value, rest),
        _ => message.trim().to_owned(),
    }
}

/// A value that is neither a number nor in quotes.
fn unquoted(found: &str) -> String {
    if found.is_empty() {
        return "there is no value after `=`; to leave a key out, put `#` before it".into();
    }
    if let Some(value) = found.strip_suffix(';') {
        return format!("a line does not end in `;`: write {value}");
    }
    if let Some((value, _)) = found.split_once("//").filter(|(value, _)| value.trim().parse::<f64>().is_ok()) {
        return format!("comments begin with `#`: write {} # …", value.trim());
    }
    if found.split_whitespace().count() > 1 && found.split_whitespace().all(|item| item.parse::<f64>().is_ok()) {
        return format!("`{found}` needs commas between its numbers, in [ ]");
    }
    if found.contains('\'') {
        return format!("text needs quotes: \"{found}\"");
    }
    format!("text needs quotes: '{found}'")
}

/// A bare word where a value should be.
fn word(found: &str) -> String {
    match found.to_lowercase().as_str() {
        "none" | "null" | "nil" => format!("`{found}` is not a value; to leave a key out, put `#` before it"),
        lower @ ("true" | "false") => format!("write {lower}, in small letters"),
        _ => format!("`{found}` is not a value; text needs quotes: \"{found}\""),
    }
}

/// A line without a key and its value.
fn no_value(line: &str) -> String {
    let key = |text: &str| text.trim().chars().all(|c| c.is_ascii_alphanumeric() || "-_.\"".contains(c));
    if let Some((name, value)) = line.split_once(":=").or_else(|| line.split_once(':')).filter(|(name, _)| key(name)) {
        return match value.trim() {
            "" => format!("a table is written [{}]", name.trim().trim_matches('"')),
            value => {
                format!("a key and its value have `=` between them: {} = {}", name.trim(), value.trim_end_matches(','))
            }
        };
    }
    match line.split_once('=') {
        Some((name, _)) => format!("`{}` is not a key: it has letters, digits, `_` and `-` only", name.trim()),
        None => "there is no `=`: a line is `key = value`, a [table] or a # comment".into(),
    }
}

/// What follows a value on its line.
fn left_over(value: &str, rest: &str) -> String {
    if value.starts_with('\'') && value.matches('\'').count() > 2 {
        return "text in '…' can't hold a `'`: write it in \"…\"".into();
    }
    if value.starts_with('"') && value.matches('"').count() > 2 {
        return "text in \"…\" can't hold a `\"`: write it in '…', or `\\\"`".into();
    }
    match rest.strip_prefix(',') {
        Some(digits) if digits.starts_with(|c: char| c.is_ascii_digit()) => {
            "a number has no commas: write 1000 or 1_000, and a list in [ ]".into()
        }
        Some(_) => "a line does not end in `,`: only items of a list have commas between them".into(),
        None => format!("one `key = value` stands on a line, and `{rest}` is left over"),
    }
}
