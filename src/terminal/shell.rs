//! Commands that are told to the user, or written for later.

/// A word of a command for the shell, in quotes where it needs them.
pub fn shell_word(text: &str) -> String {
    let plain = |c: char| c.is_alphanumeric() || "/._-+:,=@%".contains(c);
    if !text.is_empty() && text.chars().all(plain) { text.into() } else { format!("'{}'", text.replace('\'', r"'\''")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_for_the_shell_are_quoted_where_they_need_it() {
        let words = ["runs/dog.toml", "my models/dog.toml", "it's", "", "$HOME", "~/dog"].map(shell_word);
        assert_eq!(words, ["runs/dog.toml", "'my models/dog.toml'", r"'it'\''s'", "''", "'$HOME'", "'~/dog'"]);
    }
}
