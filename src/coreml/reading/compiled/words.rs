//! The words of a program's text, with the lines that they stand in.

use anyhow::{Result, bail, ensure};

/// One word.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Word<'a> {
    /// A name, or a word of the language.
    Name(&'a str),
    /// Digits and what belongs to them: `12`, `-0x1.8p-3`, `-inf`.
    Number(&'a str),
    /// What stands in quotation marks.
    Text(&'a str),
    /// `(`, `<`, `=`, `,` …
    Sign(char),
    /// `->`
    Arrow,
    End,
}

/// Takes a text apart, a word at a time.
#[derive(Clone)]
pub struct Words<'a> {
    text: &'a str,
    at: usize,
    next: Word<'a>,
    /// Where `next` begins.
    begin: usize,
}

impl<'a> Words<'a> {
    pub fn of(text: &'a str) -> Result<Self> {
        let mut words = Self { text, at: 0, next: Word::End, begin: 0 };
        words.advance()?;
        Ok(words)
    }

    /// The line that the next word stands in, counted from 1.
    pub fn line(&self) -> usize {
        1 + self.text.as_bytes()[..self.begin].iter().filter(|&&byte| byte == b'\n').count()
    }

    /// The next word, which stays.
    pub fn peek(&self) -> Word<'a> {
        self.next
    }

    /// The word after the next.
    pub fn peek_second(&self) -> Result<Word<'a>> {
        let mut ahead = self.clone();
        ahead.advance()?;
        Ok(ahead.next)
    }

    /// Takes the next word.
    pub fn take(&mut self) -> Result<Word<'a>> {
        let word = self.next;
        self.advance()?;
        Ok(word)
    }

    /// Takes the next word where it is this sign.
    pub fn skip(&mut self, sign: char) -> Result<bool> {
        let is_next = self.next == Word::Sign(sign);
        if is_next {
            self.advance()?;
        }
        Ok(is_next)
    }

    /// Takes the next word, which must be this sign.
    pub fn expect(&mut self, sign: char) -> Result<()> {
        let found = self.next;
        ensure!(self.skip(sign)?, "`{sign}` is expected, there is {}", shown(found));
        Ok(())
    }

    /// Takes the next word, which must be a name.
    pub fn name(&mut self) -> Result<&'a str> {
        match self.next {
            Word::Name(name) => {
                self.advance()?;
                Ok(name)
            }
            other => bail!("a name is expected, there is {}", shown(other)),
        }
    }

    /// Takes the next word, which must be this one of the language.
    pub fn keyword(&mut self, word: &str) -> Result<()> {
        let found = self.next;
        ensure!(found == Word::Name(word), "`{word}` is expected, there is {}", shown(found));
        self.advance()
    }

    fn advance(&mut self) -> Result<()> {
        let bytes = self.text.as_bytes();
        while bytes.get(self.at).is_some_and(u8::is_ascii_whitespace) {
            self.at += 1;
        }
        self.begin = self.at;
        let Some(&first) = bytes.get(self.at) else {
            self.next = Word::End;
            return Ok(());
        };
        let run = |from: usize, is: fn(u8) -> bool| from + bytes[from..].iter().take_while(|&&byte| is(byte)).count();
        let letter = |byte: u8| byte.is_ascii_alphabetic() || byte == b'_';
        match first {
            b'"' => {
                // No escapes are known, so a text ends at the next mark and holds neither line ends nor backslashes.
                let end = run(self.at + 1, |byte| !matches!(byte, b'"' | b'\\' | 0..=31 | 127));
                ensure!(bytes.get(end) == Some(&b'"'), "a text is not closed, or holds a character that it must not");
                self.next = Word::Text(&self.text[self.at + 1..end]);
                self.at = end + 1;
            }
            b'-' if bytes.get(self.at + 1) == Some(&b'>') => {
                self.next = Word::Arrow;
                self.at += 2;
            }
            b'-' | b'0'..=b'9' => {
                let mut end = self.at + 1;
                loop {
                    end = run(end, |byte| byte.is_ascii_alphanumeric() || byte == b'.');
                    let in_exponent = bytes[end - 1] == b'p' && matches!(bytes.get(end), Some(b'+' | b'-'));
                    if !in_exponent {
                        break;
                    }
                    end += 1;
                }
                self.next = Word::Number(&self.text[self.at..end]);
                self.at = end;
            }
            first if letter(first) => {
                let end = run(self.at, |byte| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'@');
                self.next = Word::Name(&self.text[self.at..end]);
                self.at = end;
            }
            b'(' | b')' | b'[' | b']' | b'{' | b'}' | b'<' | b'>' | b',' | b'=' | b';' | b'?' => {
                self.next = Word::Sign(char::from(first));
                self.at += 1;
            }
            _ => {
                let found = self.text[self.at..].chars().next().unwrap_or_default();
                bail!("there is {found:?}, which no program has");
            }
        }
        Ok(())
    }
}

/// A word as messages show it.
pub fn shown(word: Word) -> String {
    match word {
        Word::Name(name) => format!("`{name:.40}`"),
        Word::Number(number) => format!("`{number:.40}`"),
        Word::Text(text) => format!("the text {:.40}", format!("{text:?}")),
        Word::Sign(sign) => format!("`{sign}`"),
        Word::Arrow => "`->`".to_owned(),
        Word::End => "the end of the file".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_taken_apart() {
        let mut words = Words::of("a_1@b->\"é (\" [-0x1.8p-3,\n?inf -inf 12]").unwrap();
        let expected = [
            Word::Name("a_1@b"),
            Word::Arrow,
            Word::Text("é ("),
            Word::Sign('['),
            Word::Number("-0x1.8p-3"),
            Word::Sign(','),
            Word::Sign('?'),
            Word::Name("inf"),
            Word::Number("-inf"),
            Word::Number("12"),
            Word::Sign(']'),
            Word::End,
            Word::End,
        ];
        for word in expected {
            assert_eq!(words.take().unwrap(), word);
        }
        assert_eq!(words.line(), 2);
        for broken in ["\"a", "\"a\\\"b\"", "\"a\nb\"", "é", "#", "\u{0}"] {
            assert!(Words::of(broken).is_err(), "{broken:?}");
        }
    }
}
