//! What is printed, made safe for a terminal: text from files (names of tensors, of files, values of keys) may hold escape
//! sequences that move the cursor, recolour or rename a terminal. All printing goes through here.

mod progress;
mod shell;

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::fmt;
use std::io::Write;
use std::sync::{Mutex, PoisonError};

pub use progress::{Copying, Progress, duration};
pub use shell::shell_word;

/// `text` with each control character but line ends and tabs written out as JSON does, as in `\u001b`, so that JSON stays
/// JSON; those that turn the direction of writing around, too.
pub fn printable(text: &str) -> Cow<'_, str> {
    let bad = |c: char| {
        (c.is_control() && c != '\n' && c != '\t')
            || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{200e}' | '\u{200f}' | '\u{2028}' | '\u{2029}')
    };
    if !text.contains(bad) {
        return Cow::Borrowed(text);
    }
    let write = |mut out: String, c: char| {
        match bad(c) {
            // All of them have four digits or fewer.
            true => out.push_str(&format!("\\u{:04x}", u32::from(c))),
            false => out.push(c),
        }
        out
    };
    Cow::Owned(text.chars().fold(String::with_capacity(text.len() + 8), write))
}

/// As [`printable`], on one line: line ends are written out too.
pub fn printable_line(text: &str) -> String {
    printable(text).replace('\n', "\\n").replace('\t', "\\t")
}

/// A line on standard error. A closed one is nobody's mistake.
pub fn tell(line: impl fmt::Display) {
    let _ = writeln!(std::io::stderr(), "{}", printable(&line.to_string()));
}

/// A remark on standard error: `note: …`.
pub fn note(text: impl fmt::Display) {
    tell(format_args!("note: {text}"));
}

/// A [`note`] that is told once, however often what it is about is read.
pub fn note_once(text: impl fmt::Display) {
    static TOLD: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
    let text = text.to_string();
    // Whatever another thread died of, the set is whole.
    if TOLD.lock().unwrap_or_else(PoisonError::into_inner).insert(text.clone()) {
        note(text);
    }
}

/// A warning on standard error: `warning: …`.
pub fn warn(text: impl fmt::Display) {
    tell(format_args!("warning: {text}"));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_are_written_out() {
        assert_eq!(printable("a\tb\nc ä 犬 🐶"), "a\tb\nc ä 犬 🐶");
        let json = serde_json::json!({"a\u{9b}": "\x1b\u{202e}\x7f"});
        assert_eq!(serde_json::from_str::<serde_json::Value>(&printable(&json.to_string())).unwrap(), json);
        assert!(matches!(printable("plain"), Cow::Borrowed(_)));
        assert_eq!(printable("\x1b[31mred\x07\r\u{9b}0m"), "\\u001b[31mred\\u0007\\u000d\\u009b0m");
        assert_eq!(printable("a\u{202e}b"), "a\\u202eb");
    }
}
