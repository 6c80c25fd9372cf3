//! The written keys of a config that have no effect, and what is said of them.

use super::Config;
use super::effects::{Idle, Verdict};
use super::keys::KEYS;

/// A key that is written without effect, before those with the same reason are told together.
pub(super) struct Finding {
    pub key: &'static str,
    pub why: String,
    pub verdict: Verdict,
    pub refused: bool,
}

/// The written keys that have no effect. `written` tells whether a key is, `is_default` whether its value is the one that it
/// would have anyway: such a key is not refused.
pub(super) fn findings(
    config: &Config,
    written: impl Fn(&str) -> bool,
    is_default: impl Fn(&str) -> bool,
) -> Vec<Finding> {
    let idle = KEYS.iter().filter(|key| written(key.name)).filter_map(|key| Some((key.name, (key.idle)(config)?)));
    idle.filter_map(|(key, Idle { why, verdict })| {
        let default = is_default(key);
        let refused = match verdict {
            Verdict::Forgotten(switch) => !default && !written(switch),
            Verdict::Refused => !default,
            Verdict::Passing if default => return None,
            Verdict::Warned | Verdict::Passing | Verdict::Odd => false,
        };
        Some(Finding { key, why, verdict, refused })
    })
    .collect()
}

/// One message for all keys that lack an effect for the same reason.
pub(super) fn message(keys: &[&str], why: &str, verdict: Verdict) -> String {
    let listed = keys.iter().map(|key| format!("`{key}`")).collect::<Vec<_>>().join(", ");
    match (verdict, keys.len()) {
        (Verdict::Odd, _) => format!("{listed} {why}"),
        (_, 1) => format!("{listed} has no effect: {why}"),
        _ => format!("{listed} have no effect: {why}"),
    }
}
