//! Which pictures a folder holds and what their captions are.
//!
//! Three layouts. With a `metadata.jsonl` or a `metadata.csv` in the folder (diffusers), each line names a picture and its
//! caption; without one, the caption of `a/b.png` is the text of `a/b.txt` (kohya). Where all pictures lie in folders like
//! `10_sks dog` (kohya's too), an epoch has each of them ten times, and those without a caption have "sks dog".
//! Subfolders are read too; names that begin with a dot are not. Samples come sorted by path, the same everywhere.
//!
//! Captions that are missing or cannot be matched are the most frequent silent mistake of such data sets: everything
//! that does not add up is a problem with a line of its own, or a warning where it does no harm.

use std::path::{Path, PathBuf};

use super::captions::{Caption, CaptionOptions, Captions, Missing};
use super::kohya::Kohya;
use super::listing::{Listing, few, listed, name};
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

/// What a folder holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Contents {
    /// Sorted by path.
    pub samples: Vec<Sample>,
    /// What may be a mistake, or is worth knowing: lines that begin with `warning: ` or `note: `.
    pub remarks: Vec<String>,
}

/// Reads a folder of pictures and captions.
///
/// # Errors
/// Every problem: no such folder, no pictures, pictures of other formats, pictures without a caption (unless `options` fill
/// it), lines of `metadata.jsonl` that cannot be used, captions that belong to no picture where pictures lack theirs.
pub fn read_folder(folder: &Path, options: &CaptionOptions) -> Result<Contents, Problems> {
    let mut problems = Vec::new();
    let mut remarks = Vec::new();
    let listing = Listing::read(folder, &mut problems)?.not_empty(&mut problems)?;
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
            (Caption::None(_), None, Missing::Unneeded) => String::new(),
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
