//! Captions from one file beside each picture: that of `a/b.png` is `a/b.txt`.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::Path;

use super::captions::{Caption, CaptionOptions, Captions, Missing, one_line};
use super::listing::{File, Listing, few, listed};

/// First words of the names of text files that people and data sets put beside pictures, in lower case.
const DOCUMENTS: &[&str] = &[
    "readme",
    "read_me",
    "read me",
    "license",
    "licence",
    "copying",
    "copyright",
    "notice",
    "attribution",
    "credits",
    "reference",
    "prompts_and_classes",
    "notes",
    "source",
    "citation",
    "changelog",
    "classes",
    "urls",
];

/// The name without this extension, which has its dot; in any case of letters.
fn without<'n>(name: &'n str, extension: &str) -> Option<&'n str> {
    let (stem, end) = name.split_at_checked(name.len().checked_sub(extension.len())?)?;
    (end.eq_ignore_ascii_case(extension) && !stem.is_empty() && !stem.ends_with('/')).then_some(stem)
}

/// A caption file with its place in the order of reading: the extension's, and whether that is in another case.
type Ranked<'l> = ((usize, bool), &'l File);

/// The caption files of each stem, that which is read before the others: in the order of the extensions; of files that
/// differ in case alone, the one in the asked case first.
fn by_stem<'l>(listing: &'l Listing, options: &CaptionOptions) -> HashMap<&'l str, Vec<&'l File>> {
    let mut found: HashMap<&str, Vec<Ranked>> = HashMap::new();
    for file in &listing.others {
        for (place, extension) in options.extensions.iter().enumerate() {
            if let Some(stem) = without(&file.name, extension) {
                let files = found.entry(stem).or_default();
                // An extension may be asked for twice, in two cases.
                if files.iter().all(|(_, known)| known.name != file.name) {
                    files.push(((place, !file.name.ends_with(extension.as_str())), file));
                }
            }
        }
    }
    let sorted = found.into_iter().map(|(stem, mut files)| {
        files.sort_by_key(|(rank, _)| *rank);
        (stem, files.into_iter().map(|(_, file)| file).collect())
    });
    sorted.collect()
}

/// Warns of pictures that differ in their extensions alone, and so have one caption file.
fn told_shared(listing: &Listing, files: &HashMap<&str, Vec<&File>>) -> Option<String> {
    let (mut owners, mut shared) = (HashMap::<&str, &File>::new(), Vec::new());
    for picture in &listing.pictures {
        let Some(file) = files.get(picture.stem()).and_then(|files| files.first()) else { continue };
        match owners.entry(picture.stem()) {
            Entry::Occupied(owner) => {
                shared.push(format!("{} and {} have {}", owner.get().name, picture.last(), file.last()));
            }
            Entry::Vacant(place) => drop(place.insert(picture)),
        }
    }
    let folder = listing.folder.display();
    (!shared.is_empty()).then(|| format!("warning: {folder}: pictures share a caption file: {}", listed(&shared)))
}

/// Whether a caption file that is not read says something else than the caption that is taken.
fn reads_otherwise(listing: &Listing, file: &File, taken: Option<&String>) -> bool {
    read_caption(&listing.folder.join(&file.path)).ok().as_ref() != taken
}

/// Warns of caption files that are not read, whose texts are lost.
fn told_unread(listing: &Listing, names: &[String], why: &str) -> Option<String> {
    let what = match names.len() {
        0 => return None,
        1 => "1 caption file is not read,".to_owned(),
        count => format!("{count} caption files are not read,"),
    };
    Some(format!("warning: {}: {what} {why}: {}", listing.folder.display(), listed(names)))
}

/// Warns of caption files beside pictures whose captions are those of `table`, where they say something else.
pub(super) fn beside_table(
    listing: &Listing,
    table: &File,
    captions: &Captions,
    options: &CaptionOptions,
) -> Option<String> {
    let files = by_stem(listing, options);
    let mut unread = Vec::new();
    for (picture, caption) in listing.pictures.iter().zip(&captions.captions) {
        let taken = if let Caption::Text(text) = caption { Some(text) } else { None };
        let beside = files.get(picture.stem()).into_iter().flatten();
        unread.extend(beside.filter(|file| reads_otherwise(listing, file, taken)).map(|file| file.name.clone()));
    }
    told_unread(listing, &unread, &format!("because captions are those of {}", table.last()))
}

/// Reads the caption beside each picture. Where pictures lack theirs and that is a mistake (`strict`: nothing else gives
/// them one), captions that belong to no picture are problems too; else they are told of in one line.
pub(super) fn read(
    listing: &Listing,
    options: &CaptionOptions,
    strict: bool,
    problems: &mut Vec<String>,
    remarks: &mut Vec<String>,
) -> Captions {
    let files = by_stem(listing, options);
    let (mut found, mut unread) = (false, Vec::new());
    let asked = options.extensions.join(" or ");
    let caption = |picture: &File| {
        let Some((file, others)) = files.get(picture.stem()).and_then(|files| files.split_first()) else {
            return Caption::None(format!("{} has no caption file ({asked})", listing.shown(picture)));
        };
        found = true;
        let text = read_caption(&listing.folder.join(&file.path));
        unread.extend(
            others
                .iter()
                .filter(|other| reads_otherwise(listing, other, text.as_ref().ok()))
                .map(|other| format!("{} ({} is)", other.name, file.last())),
        );
        match text {
            Ok(text) if text.is_empty() => {
                Caption::None(format!("{} has an empty caption file ({asked})", listing.shown(picture)))
            }
            Ok(text) => Caption::Text(text),
            Err(problem) => {
                problems.push(problem);
                Caption::Unreadable
            }
        }
    };
    let captions: Vec<Caption> = listing.pictures.iter().map(caption).collect();
    remarks.extend(told_shared(listing, &files));
    remarks.extend(told_unread(listing, &unread, "whose pictures have another one, with another text"));
    let stems: HashSet<&str> = listing.pictures.iter().map(File::stem).collect();
    let owned = |file: &&File| {
        options.extensions.iter().filter_map(|own| without(&file.name, own)).all(|stem| !stems.contains(stem))
    };
    let is_caption = |file: &&File| options.extensions.iter().any(|own| without(&file.name, own).is_some());
    let mut orphans: Vec<&File> = listing.others.iter().filter(is_caption).filter(owned).collect();
    if strict && found && options.missing == Missing::Error {
        let lacking = captions.iter().any(|caption| matches!(caption, Caption::None(_)));
        let patterns: HashSet<String> = stems.iter().filter_map(|stem| numbered(stem)).collect();
        // A caption whose picture was lost; or, where pictures lack their captions, one under a wrong name.
        let is_meant = |file: &&File| {
            let pattern = numbered(file.stem());
            pattern.is_some_and(|pattern| patterns.contains(&pattern)) || lacking && !is_document(file)
        };
        let meant = orphans.iter().copied().filter(is_meant);
        problems.extend(few(meant.map(|file| format!("{} is a caption without its picture", listing.shown(file)))));
        orphans.retain(|file| !is_meant(file));
    }
    if !orphans.is_empty() {
        remarks.push(stray(listing, &orphans.iter().map(|file| file.name.as_str()).collect::<Vec<_>>()));
    }
    Captions { captions, found }
}

/// Tells of text files that no picture has.
pub(super) fn stray(listing: &Listing, names: &[&str]) -> String {
    let what = match names.len() {
        1 => "1 text file belongs to no picture and is not read".to_owned(),
        count => format!("{count} text files belong to no picture and are not read"),
    };
    format!("warning: {}: {what}: {}", listing.folder.display(), listed(names))
}

/// The stem of a numbered file without its numbers: `IMG_#` of `IMG_0003`. `None` without a number.
fn numbered(stem: &str) -> Option<String> {
    let pieces: Vec<&str> = stem.split(|c: char| c.is_ascii_digit()).collect();
    (pieces.len() > 1).then(|| {
        let mut pattern = String::new();
        for (place, piece) in pieces.iter().enumerate() {
            // Digits in a row leave empty pieces between them.
            if place > 0 && !pattern.ends_with('#') {
                pattern.push('#');
            }
            pattern.push_str(piece);
        }
        pattern
    })
}

fn is_document(file: &File) -> bool {
    let name = file.last().to_lowercase();
    DOCUMENTS.iter().any(|word| name.starts_with(word))
}

/// The most bytes of a caption. Models read some 75 words; a longer file is something else under the picture's name.
const LONGEST: u64 = 100_000;

/// The text of a caption file on one line.
fn read_caption(path: &Path) -> Result<String, String> {
    if let Ok(found) = path.metadata()
        && found.len() > LONGEST
    {
        return Err(format!("{} has {} bytes; a caption has {LONGEST} at most", path.display(), found.len()));
    }
    let bytes = fs::read(path).map_err(|error| format!("cannot read the caption {}: {error}", path.display()))?;
    let text = String::from_utf8(bytes).map_err(|_| format!("the caption {} is not UTF-8 text", path.display()))?;
    Ok(one_line(&text))
}
