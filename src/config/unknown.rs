//! Keys that do not exist: what each is here, what it is in other trainers, or which key is meant.

use super::foreign::{SYNONYMS, foreign, squeezed};
use super::known::everything;

/// A key that does not exist.
pub(super) struct Unknown {
    pub message: String,
    /// The key that is surely meant.
    pub meant: Option<Vec<String>>,
}

/// What to say of the key at `path`, which the schema does not have. `path` without its last part is a table that there is.
pub(super) fn unknown(path: &[String]) -> Unknown {
    let Some((name, parent)) = path.split_last() else { return Unknown { message: String::new(), meant: None } };
    let section = if parent.is_empty() { String::new() } else { format!(" in [{}]", parent.join(".")) };
    let all = everything();
    let (hint, meant) = hint(&all, name, &parent.join("."));
    let message = match foreign(name).filter(|_| meant.is_none()) {
        Some((what, instead)) => {
            let instead = if instead.is_empty() { String::new() } else { format!("; {instead}") };
            format!("`{name}`{section} is not in this version: {what}{instead}")
        }
        None => format!("unknown key `{name}`{section}{hint}"),
    };
    Unknown { message, meant: meant.map(|key| key.split('.').map(str::to_owned).collect()) }
}

/// The hint for a name in a table, and the key or table that it means.
fn hint(all: &[String], name: &str, parent: &str) -> (String, Option<String>) {
    let plain = |key: &str| key.trim_end_matches('.').to_owned();
    let parts = |key: &str| match plain(key).rsplit_once('.') {
        Some((table, last)) => (table.to_owned(), last.to_owned()),
        None => (String::new(), plain(key)),
    };
    let siblings = || all.iter().filter(|key| parts(key).0 == parent);
    let same = |a: &str, b: &str| squeezed(a) == squeezed(b);
    if let Some(key) = siblings().find(|key| same(&parts(key).1, name)) {
        return (format!("; did you mean `{}`?", parts(key).1), Some(plain(key)));
    }
    // Of `[sample]`, `steps` is `sample_steps`.
    let with_table = format!("{}_{name}", parent.rsplit('.').next().unwrap_or_default());
    if let Some(key) = siblings().find(|key| same(&parts(key).1, &with_table)) {
        return (format!("; here it is `{}`", plain(key)), Some(plain(key)));
    }
    if let Some((_, ours)) = SYNONYMS.iter().find(|(theirs, _)| same(theirs, name)) {
        return (format!("; here it is `{ours}`"), Some((*ours).to_owned()));
    }
    let elsewhere = all.iter().filter(|key| same(&parts(key).1, name)).min_by_key(|key| key.matches('.').count());
    if let Some(key) = elsewhere {
        let (table, last) = parts(key);
        if key.ends_with('.') && parent.split('.').next() == Some(name) {
            return (format!("; keys under [{parent}] stand without `{name}.`"), Some(plain(key)));
        }
        let place = match (table.is_empty(), key.ends_with('.')) {
            (_, true) => format!("; it is [{}]", plain(key)),
            (true, false) => "; it belongs at the top, before the first [table]".to_owned(),
            (false, false) if last == *name => format!("; it belongs in [{table}]"),
            (false, false) => format!("; it is `{last}` in [{table}]"),
        };
        return (place, Some(plain(key)));
    }
    if foreign(name).is_some() {
        return (String::new(), None);
    }
    if let Some(key) = closest(name, siblings().map(|key| (parts(key).1, key))) {
        return (format!("; did you mean `{}`?", parts(key).1), Some(plain(key)));
    }
    // Of another section only a key of the same name, but for one slip: a neighbour there is another thing.
    let same_but_for_a_slip = |key: &&String| name.len() >= 8 && strsim::damerau_levenshtein(name, &parts(key).1) == 1;
    if let Some(key) = all.iter().find(same_but_for_a_slip) {
        return (format!("; did you mean `{}`?", plain(key)), Some(plain(key)));
    }
    (String::new(), None)
}

/// The item whose name is a misspelling of `name`: a slip for each four letters, up to three.
fn closest<T>(name: &str, items: impl Iterator<Item = (String, T)>) -> Option<T> {
    let name = name.to_lowercase();
    let allowed = (name.chars().count() / 4).min(3);
    items
        .map(|(known, item)| (strsim::damerau_levenshtein(&name, &known.to_lowercase()), known.len(), item))
        // Not another word of the same length.
        .filter(|(slips, length, _)| *slips <= allowed && slips * 2 < *length)
        .min_by_key(|(slips, ..)| *slips)
        .map(|(_, _, item)| item)
}

/// `; did you mean …?`, or nothing if no name is near.
pub(super) fn nearest<'a>(name: &str, names: impl Iterator<Item = &'a str>) -> String {
    closest(name, names.map(|known| (known.to_owned(), known)))
        .map_or_else(String::new, |known| format!("; did you mean `{known}`?"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::foreign::FOREIGN;

    fn said(path: &str) -> (String, Option<String>) {
        let path: Vec<String> = path.split('.').map(str::to_owned).collect();
        let Unknown { message, meant } = unknown(&path);
        (message, meant.map(|path| path.join(".")))
    }

    #[test]
    fn keys_of_other_trainers_are_named_for_what_they_are() {
        for (key, expected) in [
            (
                "data.enable_bucket",
                "`enable_bucket` in [data] is not in this version: buckets of aspect ratios (kohya, OneTrainer); every picture is",
            ),
            ("train.network_dim", "`network_dim` in [train] is not in this version: LoRA"),
            ("xformers", "`xformers` is not in this version: a choice of how attention is computed"),
            ("train.num_train_epochs", "set train.max_train_steps"),
            ("train.clip_skip", "is not in this version"),
            ("data.shuffle_caption", "is not in this version"),
            ("datasets", "put all pictures below one data.train_data_dir"),
        ] {
            let (message, meant) = said(key);
            assert!(message.contains(expected) && !message.contains("did you mean"), "{message}");
            assert_eq!(meant, None, "{key}");
        }
    }

    #[test]
    fn other_names_and_misspellings_mean_a_key() {
        for (key, hint, meant) in [
            ("train.lr", "; here it is `train.learning_rate`", "train.learning_rate"),
            ("data.caption_ext", "; here it is `data.caption_extension`", "data.caption_extension"),
            ("train.learning_rte", "; did you mean `learning_rate`?", "train.learning_rate"),
            ("train.learningRate", "; did you mean `learning_rate`?", "train.learning_rate"),
            ("train.mixed-precision", "; did you mean `mixed_precision`?", "train.mixed_precision"),
            ("data.learning_rat", "; did you mean `train.learning_rate`?", "train.learning_rate"),
            ("data.learning_rate", "; it belongs in [train]", "train.learning_rate"),
            ("optimizer", "; it is [train.optimizer]", "train.optimizer"),
            ("trian", "; did you mean `train`?", "train"),
        ] {
            let (message, found) = said(key);
            assert!(message.ends_with(hint), "{message}");
            assert_eq!(found.as_deref(), Some(meant));
        }
    }

    /// Names that share some letters with a key and mean something else.
    #[test]
    fn no_far_fetched_neighbour_is_named() {
        for key in [
            "train.autoencoder.lambda_kl",
            "train.gamma",
            "train.frobnicate",
            "data.colour",
            "palettize.codebook",
            "train.momentum",
            "export.fp16",
        ] {
            let (message, meant) = said(key);
            assert!(message.starts_with("unknown key") && !message.contains(';'), "{message}");
            assert_eq!(meant, None);
        }
    }

    /// No name of another trainer hides a key of ours, and each has one entry.
    #[test]
    fn the_tables_agree_with_the_schema() {
        let all = everything();
        let mut seen = std::collections::BTreeSet::new();
        let foreign = FOREIGN.iter().flat_map(|(names, ..)| names.iter().copied());
        for name in foreign.chain(SYNONYMS.iter().map(|(theirs, _)| *theirs)) {
            assert!(seen.insert(name), "{name} is there twice");
        }
        for (theirs, ours) in SYNONYMS {
            assert!(all.iter().any(|key| key == ours), "{theirs}: there is no {ours}");
        }
    }
}
