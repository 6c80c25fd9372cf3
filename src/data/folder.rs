//! Which pictures a folder holds and what their captions are.
//!
//! Three layouts. With a `metadata.jsonl` or a `metadata.csv` in the folder (diffusers), each line names a picture and its
//! caption; without one, the caption of `a/b.png` is the text of `a/b.txt` (kohya). Where all pictures lie in folders like
//! `10_sks dog` (kohya's too), an epoch has each of them ten times, and those without a caption have "sks dog".
//! Subfolders are read too; names that begin with a dot are not. Samples come sorted by path, the same everywhere.
//!
//! Captions that are missing or cannot be matched are the most frequent silent mistake of such data sets: everything
//! that does not add up is a problem with a line of its own, or a warning where it does no harm.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::listing::{Listing, few, name};
use super::manifest::listed;
use super::{Problems, metadata, near_miss, sidecars};

/// A picture to train on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample {
    pub path: PathBuf,
    /// The path below the folder that was read, its parts joined by `/`, in composed Unicode: the same on every system.
    pub name: String,
    pub caption: String,
    /// Whether it shows the class rather than the subject (DreamBooth's prior preservation).
    pub is_class: bool,
    /// How often an epoch has it.
    pub repeats: usize,
}

impl Sample {
    /// The picture `file` of `folder`, once an epoch, without a caption yet.
    pub fn new(folder: &Path, file: &Path) -> Self {
        Self { path: folder.join(file), name: name(file), caption: String::new(), is_class: false, repeats: 1 }
    }
}

/// What a picture without a caption is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Missing {
    /// A mistake in the data.
    Error,
    /// Trained on with this caption: the empty one, or class words.
    Fill(String),
}

/// Where captions are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CaptionOptions {
    /// Extensions of sidecar files with their dot, tried in this order, in any case.
    pub extensions: Vec<String>,
    pub missing: Missing,
    /// Keys of `metadata.jsonl`, columns of `metadata.csv`.
    pub image_column: String,
    pub caption_column: String,
}

impl Default for CaptionOptions {
    fn default() -> Self {
        Self {
            extensions: vec![".txt".into(), ".caption".into()],
            missing: Missing::Error,
            image_column: "file_name".into(),
            caption_column: "text".into(),
        }
    }
}

impl From<&crate::config::Data> for CaptionOptions {
    fn from(data: &crate::config::Data) -> Self {
        let missing = match data.missing_caption {
            crate::config::MissingCaption::Error => Missing::Error,
            crate::config::MissingCaption::Empty => Missing::Fill(String::new()),
        };
        // With its dot or without, as other trainers have it.
        let extensions = data.caption_extension.iter().map(|own| format!(".{}", own.trim_start_matches('.')));
        Self { extensions: extensions.collect(), missing, ..Self::default() }
    }
}

/// What a folder holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Contents {
    /// Sorted by path.
    pub samples: Vec<Sample>,
    /// What may be a mistake, or is worth knowing: lines that begin with `warning: ` or `note: `.
    pub remarks: Vec<String>,
}

/// A caption as a source has it.
pub(super) enum Caption {
    /// Not empty.
    Text(String),
    /// Missing or empty: what the message says of the picture.
    None(String),
    /// Told of already.
    Unreadable,
}

/// Captions of all pictures of a listing, in its order, from one source.
pub(super) struct Captions {
    pub captions: Vec<Caption>,
    /// Whether a source for captions was found at all; without one, a single line says so for all pictures.
    pub found: bool,
}

/// Reads a folder of pictures and captions.
///
/// # Errors
/// Every problem: no such folder, no pictures, pictures of other formats, pictures without a caption (unless `options` fill
/// it), lines of `metadata.jsonl` that cannot be used, captions that belong to no picture where pictures lack theirs.
pub fn read_folder(folder: &Path, options: &CaptionOptions) -> Result<Contents, Problems> {
    let mut problems = Vec::new();
    let mut remarks = Vec::new();
    let listing = Listing::read(folder, &mut problems)?.not_empty()?;
    let metadata = metadata::choose(&listing, &mut remarks);
    let kohya = if metadata.is_none() { Kohya::of(&listing, &mut remarks) } else { None };
    let Captions { captions, found } = match metadata {
        Some(file) => {
            let captions = metadata::read(&listing, file, options, &mut problems);
            remarks.extend(sidecars::beside_table(&listing, file, &captions, options));
            captions
        }
        None => sidecars::read(&listing, options, kohya.is_none(), &mut problems, &mut remarks),
    };
    let (mut samples, mut lacking, mut filled) = (Vec::new(), Vec::new(), Vec::new());
    for (place, (file, caption)) in listing.pictures.iter().zip(captions).enumerate() {
        let folder_words = kohya.as_ref().map(|kohya| &kohya.pictures[place]);
        let caption = match (caption, folder_words, &options.missing) {
            (Caption::Text(text), ..) => text,
            (Caption::Unreadable, ..) => String::new(),
            (Caption::None(_), Some((_, words)), _) => words.clone(),
            (Caption::None(_), None, Missing::Fill(text)) => {
                filled.push(file.name.clone());
                text.clone()
            }
            (Caption::None(why), None, Missing::Error) => {
                lacking.push(why);
                continue;
            }
        };
        let repeats = folder_words.map_or(1, |(repeats, _)| *repeats);
        samples.push(Sample { caption, repeats, ..Sample::new(folder, &file.path) });
    }
    // Without any caption at all the place or the extension is wrong: one line says so better than a thousand.
    match found {
        false if !lacking.is_empty() => problems.push(near_miss::none_at_all(&listing, options)),
        _ => problems.extend(few(lacking)),
    }
    if let Missing::Fill(text) = &options.missing
        && !filled.is_empty()
    {
        remarks.push(told_filled(&listing, &filled, text, options));
    }
    if problems.is_empty() { Ok(Contents { samples, remarks }) } else { Err(Problems(problems)) }
}

/// Says which pictures have the caption `text` for want of one of their own, and what was found instead.
fn told_filled(listing: &Listing, filled: &[String], text: &str, options: &CaptionOptions) -> String {
    let (count, all, folder) = (filled.len(), listing.pictures.len(), listing.folder.display());
    let has = if text.is_empty() { "the empty one".to_owned() } else { format!("\"{text}\"") };
    // Pictures that are to have a prompt are as they should be.
    let kind = if text.is_empty() { "warning" } else { "note" };
    let near = near_miss::near(listing, options).map_or_else(String::new, |near| format!("; {near}"));
    if count == all {
        format!("{kind}: none of the {all} pictures in {folder} has a caption: all have {has}{near}")
    } else {
        let names = listed(filled);
        format!("{kind}: {count} of the {all} pictures in {folder} have no caption and have {has}: {names}{near}")
    }
}

/// kohya's layout: every picture lies in a folder like `10_sks dog`.
struct Kohya {
    /// Repeats and words of each picture.
    pictures: Vec<(usize, String)>,
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
    fn of(listing: &Listing, remarks: &mut Vec<String>) -> Option<Self> {
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
