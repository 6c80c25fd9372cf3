//! Folders named as kohya's trainers have them: `10_sks dog`, ten repeats of pictures that show "sks dog".

use std::collections::BTreeMap;

use super::listing::{Listing, few};

/// kohya's layout: every picture lies in a folder like `10_sks dog`.
pub(super) struct Kohya {
    /// Repeats and words of each picture.
    pub pictures: Vec<(usize, String)>,
}

/// More repeats than these are a year or a number of something else.
const MOST_REPEATS: usize = 1000;

/// Repeats and words of a folder named as kohya's are.
pub(super) fn kohya_folder(name: &str) -> Option<(usize, &str)> {
    let (repeats, words) = name.split_once('_')?;
    let digits = repeats.bytes().all(|byte| byte.is_ascii_digit());
    let repeats = repeats.parse().ok().filter(|repeats| digits && (1..=MOST_REPEATS).contains(repeats))?;
    (!words.trim().is_empty()).then_some((repeats, words.trim()))
}

impl Kohya {
    pub fn of(listing: &Listing, remarks: &mut Vec<String>) -> Option<Self> {
        let of_picture = |name: &str| {
            let (repeats, words) = kohya_folder(name.split_once('/')?.0)?;
            Some((repeats, words.to_owned()))
        };
        let found: Vec<Option<_>> = listing.pictures.iter().map(|file| of_picture(&file.name)).collect();
        let folder = listing.folder.display();
        let folders: Vec<&str> =
            listing.top_folders().into_iter().filter(|name| kohya_folder(name).is_some()).collect();
        if found.iter().any(Option::is_none) {
            if let Some(first) = folders.first() {
                remarks.push(format!(
                    "warning: {folder} has folders named like kohya's ({first}), but also pictures beside them: \
                     repeats and words of the names are not used"
                ));
            }
            return None;
        }
        let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
        for name in listing.pictures.iter().filter_map(|file| file.name.split('/').next()) {
            *counts.entry(name).or_default() += 1;
        }
        let told = counts.into_iter().filter_map(|(name, count)| {
            let (repeats, words) = kohya_folder(name)?;
            let pictures = if count == 1 { "picture" } else { "pictures" };
            Some(format!(
                "note: {folder}/{name}: {count} {pictures} × {repeats} an epoch; \"{words}\" where there is no caption"
            ))
        });
        remarks.extend(few(told));
        Some(Self { pictures: found.into_iter().flatten().collect() })
    }
}
