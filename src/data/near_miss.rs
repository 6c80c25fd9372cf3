//! What was meant to be captions, where none were found.

use std::collections::{BTreeMap, HashSet};

use super::captions::CaptionOptions;
use super::kohya::kohya_folder;
use super::listing::{File, Listing, is_picture};
use super::metadata;

/// Words in the names of files with captions for a whole folder.
const TABLES: &[&str] = &["metadata", "caption", "prompt", "label", "annotation", "tags"];
/// Extensions of such files, whatever their name.
const TABLE_KINDS: &[&str] = &[".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".xlsx"];

/// Says that no picture has a caption, and what was found instead.
pub(super) fn none_at_all(listing: &Listing, options: &CaptionOptions) -> String {
    let start = format!("{}: none of the {} pictures has a caption", listing.folder.display(), listing.pictures.len());
    match near(listing, options) {
        Some(near) => format!("{start}; {near}"),
        None => {
            let asked = options.extensions.join(" or ");
            format!("{start}: looked for {} and for {asked} beside each picture", metadata::NAMES.join(", "))
        }
    }
}

/// A file that holds captions: for the whole folder, or beside a picture.
pub(super) fn captions(listing: &Listing) -> Option<&str> {
    let stems: HashSet<&str> = listing.pictures.iter().map(File::stem).collect();
    let beside = |file: &File| [".txt", ".caption"].contains(&file.extension().as_str()) && stems.contains(file.stem());
    let found = listing.others.iter().find(|file| metadata::is_named(file.last()) || beside(file))?;
    Some(found.name.as_str())
}

/// What may be meant as captions and is not read.
pub(super) fn near(listing: &Listing, options: &CaptionOptions) -> Option<String> {
    let in_place = |file: &&File| !file.name.contains('/');
    if let Some((inner, file)) =
        listing.others.iter().find_map(|file| file.name.rsplit_once('/').filter(|(_, last)| metadata::is_named(last)))
    {
        return Some(format!("there is a {file} in {inner}: give that folder"));
    }
    let read = listing.others.iter().filter(in_place).any(|file| metadata::is_named(&file.name));
    // The caption of one picture may have any name.
    let names: HashSet<&str> = listing.pictures.iter().flat_map(|file| [file.stem(), file.name.as_str()]).collect();
    let table = |file: &&File| {
        let last = file.last().to_lowercase();
        !names.contains(file.stem())
            && (TABLES.iter().any(|word| last.contains(word)) || TABLE_KINDS.contains(&file.extension().as_str()))
    };
    if let Some(file) = listing.others.iter().find(table).filter(|_| !read) {
        return Some(format!(
            "there is a {}, which is not read: captions for a folder are in metadata.jsonl, one line {{\"file_name\": \
             \"a.png\", \"text\": \"...\"}} a picture, or in metadata.csv with the columns file_name and text",
            listing.shown(file)
        ));
    }
    // Files beside pictures, by what they have in place of the picture's extension.
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    for file in &listing.others {
        let asked = options.extensions.iter().any(|own| file.name.to_lowercase().ends_with(&own.to_lowercase()));
        if names.contains(file.stem()) && (!asked || is_picture(file.stem().as_ref())) {
            let stem = if is_picture(file.stem().as_ref()) { "NAME.png" } else { "" };
            *counts.entry(format!("{stem}{}", file.extension())).or_default() += 1;
        }
    }
    if let Some((found, count)) = counts.iter().max_by_key(|(_, count)| **count) {
        return Some(format!("found {count} {found}; you asked for {}", options.extensions.join(" or ")));
    }
    let own = listing.folder.canonicalize().ok().and_then(|folder| Some(folder.file_name()?.to_str()?.to_owned()));
    if let Some(name) = own
        && let Some((_, words)) = kohya_folder(&name)
    {
        return Some(format!(
            "its name is like kohya's: give the folder above it, and each has the caption \"{words}\""
        ));
    }
    let deeper = listing.pictures.iter().find_map(|file| {
        let mut parts = file.name.split('/').collect::<Vec<_>>();
        parts.pop();
        let place = parts.iter().position(|part| kohya_folder(part).is_some())?;
        Some(parts[..=place].join("/"))
    });
    deeper.map(|folder| format!("{folder} is named like kohya's folders: give the folder that only such ones are in"))
}
