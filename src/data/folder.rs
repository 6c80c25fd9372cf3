//! Which pictures a folder holds and what their captions are.
//!
//! Two layouts, those of diffusers and of kohya. With a `metadata.jsonl` in the folder, each line names a picture
//! (relative to the folder) and its caption; without one, the caption of `a/b.png` is the text of `a/b.txt`.
//! Subfolders are read too; names that begin with a dot are not. Samples come sorted by path, the same everywhere.
//!
//! Captions that are missing or cannot be matched are the most frequent silent mistake of such data sets: everything
//! that does not add up is a problem with a line of its own, and none of them hides the others.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Component, Path, PathBuf};

use rayon::prelude::*;
use serde_json::Value;
use unicode_normalization::UnicodeNormalization;

use super::Problems;
use super::picture::read_picture;

/// The file with captions for a whole folder.
pub const METADATA: &str = "metadata.jsonl";
/// Extensions of the pictures that are read.
const PICTURES: &[&str] = &["png", "jpg", "jpeg", "webp", "bmp"];
/// Pictures that other programs read and this one does not: leaving them out silently would be a surprise.
const OTHER_PICTURES: &[&str] = &["gif", "tif", "tiff", "heic", "heif", "avif", "jxl", "jfif", "psd", "tga", "ppm"];

/// A picture to train on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample {
    pub path: PathBuf,
    /// The path below the folder that was read, its parts joined by `/`, in composed Unicode: the same on every system.
    pub name: String,
    pub caption: String,
    /// Of the class rather than of the subject (DreamBooth's prior preservation).
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

/// [`Sample::name`] of a relative path.
fn name(file: &Path) -> String {
    let parts: Vec<_> = file.components().map(|part| part.as_os_str().to_string_lossy()).collect();
    parts.join("/").nfc().collect()
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
    /// Extensions of sidecar files with their dot, tried in this order.
    pub extensions: Vec<String>,
    pub missing: Missing,
    /// Keys of `metadata.jsonl`.
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
        Self { extensions: data.caption_extension.clone(), missing, ..Self::default() }
    }
}

/// The two sets of DreamBooth.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dreambooth {
    /// Pictures of the subject, with the instance prompt.
    pub instance: Vec<Sample>,
    /// Pictures of its class, with the class prompt; empty where the folder is empty or not there yet.
    pub class: Vec<Sample>,
}

/// Reads a folder of pictures and captions, sorted by path.
///
/// # Errors
/// Every problem: no such folder, no pictures, pictures of other formats, captions without a picture, pictures
/// without a caption (unless `options` fill it), lines of `metadata.jsonl` that cannot be used.
pub fn read_folder(folder: &Path, options: &CaptionOptions) -> Result<Vec<Sample>, Problems> {
    let mut problems = Vec::new();
    let listing = Listing::read(folder, &mut problems)?;
    let samples = if folder.join(METADATA).is_file() {
        from_metadata(folder, &listing, options, &mut problems)
    } else {
        from_sidecars(folder, &listing, options, &mut problems)
    };
    if problems.is_empty() { Ok(samples) } else { Err(Problems(problems)) }
}

/// The samples of a DreamBooth run: every picture of a folder has the folder's prompt, caption files are not read.
///
/// # Errors
/// Every problem with either folder. That the class folder is empty or not there is none: the trainer fills it.
pub fn dreambooth(
    instance_folder: &Path,
    instance_prompt: &str,
    class_folder: Option<&Path>,
    class_prompt: &str,
) -> Result<Dreambooth, Problems> {
    let mut problems = Vec::new();
    let mut read = |folder: &Path, prompt: &str, is_class: bool| match Listing::read(folder, &mut problems) {
        Ok(listing) => listing.samples(folder, |_| Some(prompt.to_owned()), is_class),
        Err(Problems(more)) => {
            problems.extend(more);
            Vec::new()
        }
    };
    let instance = read(instance_folder, instance_prompt, false);
    let class = match class_folder {
        Some(folder) if has_files(folder) => read(folder, class_prompt, true),
        _ => Vec::new(),
    };
    if problems.is_empty() { Ok(Dreambooth { instance, class }) } else { Err(Problems(problems)) }
}

/// Decodes every picture, on all cores, and throws it away.
///
/// # Errors
/// A line for each picture that is not readable, truncated or damaged.
pub fn check_pictures(samples: &[Sample]) -> Result<(), Problems> {
    let problems: Vec<String> = samples
        .par_iter()
        .filter_map(|sample| read_picture(&sample.path).err().map(|error| format!("{error:#}")))
        .collect();
    if problems.is_empty() { Ok(()) } else { Err(Problems(problems)) }
}

fn has_files(folder: &Path) -> bool {
    fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_some())
}

/// The files of a folder, relative to it, sorted.
struct Listing {
    pictures: Vec<PathBuf>,
    others: Vec<PathBuf>,
}

impl Listing {
    /// Lists `folder`; a picture of another format is a problem, a folder without pictures an error.
    fn read(folder: &Path, problems: &mut Vec<String>) -> Result<Self, Problems> {
        if !folder.is_dir() {
            let what = if folder.exists() { "is not a folder" } else { "does not exist" };
            return Err(Problems(vec![format!("the folder of pictures {} {what}", folder.display())]));
        }
        let mut files = Vec::new();
        list(folder, Path::new(""), 0, &mut files).map_err(|problem| Problems(vec![problem]))?;
        files.sort();
        let (pictures, others): (Vec<_>, Vec<_>) = files.into_iter().partition(|file| is_picture(file));
        if pictures.is_empty() {
            return Err(Problems(vec![format!("{} holds no pictures (.{})", folder.display(), PICTURES.join(", ."))]));
        }
        let unread = others.iter().filter(|file| has_extension(file, OTHER_PICTURES));
        problems.extend(unread.map(|file| {
            format!("{}: pictures of this kind are not read; convert it to PNG or JPEG", folder.join(file).display())
        }));
        Ok(Self { pictures, others })
    }

    fn samples(&self, folder: &Path, caption: impl Fn(&Path) -> Option<String>, is_class: bool) -> Vec<Sample> {
        let sample = |file: &PathBuf| Some(Sample { caption: caption(file)?, is_class, ..Sample::new(folder, file) });
        self.pictures.iter().filter_map(sample).collect()
    }

    /// How many files have this extension.
    fn count(&self, extension: &str) -> usize {
        self.others.iter().filter(|file| with_dot(file).is_some_and(|own| own == extension)).count()
    }
}

/// Lists the files below `folder/inner`. Links are followed; the depth ends those that go in circles.
fn list(folder: &Path, inner: &Path, depth: usize, files: &mut Vec<PathBuf>) -> Result<(), String> {
    let here = folder.join(inner);
    if depth > 32 {
        return Err(format!("{} is more than 32 folders deep: is it a link to a folder above it?", here.display()));
    }
    let unreadable = |error| format!("cannot list the folder {}: {error}", here.display());
    for entry in fs::read_dir(&here).map_err(unreadable)? {
        let name = entry.map_err(unreadable)?.file_name();
        // `.DS_Store`, macOS' `._` twins of pictures, half-written files.
        if name.as_encoded_bytes().starts_with(b".") {
            continue;
        }
        let file = inner.join(name);
        if folder.join(&file).is_dir() {
            list(folder, &file, depth + 1, files)?;
        } else {
            files.push(file);
        }
    }
    Ok(())
}

fn has_extension(file: &Path, extensions: &[&str]) -> bool {
    let own = file.extension().map(|own| own.to_string_lossy().to_lowercase());
    own.is_some_and(|own| extensions.contains(&own.as_str()))
}

/// The extension with its dot.
fn with_dot(file: &Path) -> Option<String> {
    file.extension().map(|extension| format!(".{}", extension.to_string_lossy()))
}

/// Captions from one file beside each picture.
fn from_sidecars(
    folder: &Path,
    listing: &Listing,
    options: &CaptionOptions,
    problems: &mut Vec<String>,
) -> Vec<Sample> {
    let mut captions: BTreeMap<&Path, String> = BTreeMap::new();
    let (mut missing, mut matched) = (Vec::new(), 0);
    for picture in &listing.pictures {
        let files: Vec<_> = options.extensions.iter().map(|own| picture.with_extension(&own[1..])).collect();
        match files.iter().find(|file| listing.others.binary_search(file).is_ok()) {
            None => missing.push((picture, "has no caption file")),
            Some(file) => {
                matched += 1;
                match read_caption(&folder.join(file)) {
                    Ok(caption) if caption.is_empty() => missing.push((picture, "has an empty caption file")),
                    Ok(caption) => drop(captions.insert(picture, caption)),
                    Err(problem) => problems.push(problem),
                }
            }
        }
    }
    for file in &listing.others {
        let is_caption = with_dot(file).is_some_and(|own| options.extensions.contains(&own));
        if is_caption && !listing.pictures.iter().any(|picture| picture.with_extension("") == file.with_extension("")) {
            problems.push(format!("{} is a caption without its picture", folder.join(file).display()));
        }
    }
    match &options.missing {
        Missing::Fill(caption) => captions.extend(missing.iter().map(|(file, _)| (file.as_path(), caption.clone()))),
        // Without any caption at all the place or the extension is wrong: one line says so better than a thousand.
        Missing::Error if matched == 0 => problems.push(no_captions(folder, listing, options)),
        Missing::Error => {
            problems.extend(missing.iter().map(|(file, why)| {
                format!("{} {why} ({})", folder.join(file).display(), options.extensions.join(" or "))
            }))
        }
    }
    listing.samples(folder, |file| captions.get(file).cloned(), false)
}

/// The text of a caption file on one line.
fn read_caption(path: &Path) -> Result<String, String> {
    let bytes = fs::read(path).map_err(|error| format!("cannot read the caption {}: {error}", path.display()))?;
    let text = String::from_utf8(bytes).map_err(|_| format!("the caption {} is not UTF-8 text", path.display()))?;
    Ok(one_line(&text))
}

fn one_line(text: &str) -> String {
    text.trim_start_matches('\u{feff}').split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Says that no picture has a caption, and what was found instead.
fn no_captions(folder: &Path, listing: &Listing, options: &CaptionOptions) -> String {
    let asked = options.extensions.join(" or ");
    let start = format!("{}: none of the {} pictures has a caption", folder.display(), listing.pictures.len());
    if let Some(file) = listing.others.iter().find(|file| file.file_name().is_some_and(|name| name == METADATA)) {
        let inner = file.parent().unwrap_or(Path::new(""));
        return format!("{start}; there is a {METADATA} in {}: give that folder", folder.join(inner).display());
    }
    if let Some(file) = listing
        .others
        .iter()
        .find(|file| file.file_stem().is_some_and(|stem| stem == "metadata" || stem == "captions" || stem == "prompts"))
    {
        return format!(
            "{start}; there is a {}, which is not read: captions for a folder are in {METADATA}, one line \
                        {{\"file_name\": \"a.png\", \"text\": \"...\"}} a picture",
            folder.join(file).display()
        );
    }
    let mut counts: Vec<(usize, String)> = [".txt", ".caption", ".cap", ".json", ".text", ".TXT"]
        .iter()
        .map(|extension| (listing.count(extension), (*extension).to_owned()))
        .filter(|(count, _)| *count > 0)
        .collect();
    counts.sort_by(|a, b| b.cmp(a));
    match counts.first() {
        Some((count, found)) => format!("{start}; found {count} {found}; you asked for {asked}"),
        None => format!("{start}: looked for {METADATA} and for {asked} beside each picture"),
    }
}

/// Captions from `metadata.jsonl`.
fn from_metadata(
    folder: &Path,
    listing: &Listing,
    options: &CaptionOptions,
    problems: &mut Vec<String>,
) -> Vec<Sample> {
    let path = folder.join(METADATA);
    let text = match fs::read(&path).map(String::from_utf8) {
        Ok(Ok(text)) => text,
        Ok(Err(_)) => {
            problems.push(format!("{} is not UTF-8 text", path.display()));
            return Vec::new();
        }
        Err(error) => {
            problems.push(format!("cannot read {}: {error}", path.display()));
            return Vec::new();
        }
    };
    let mut captions: BTreeMap<PathBuf, (usize, String)> = BTreeMap::new();
    // Of each column that lines lack: the first such line, what it has instead, how many more there are.
    let mut lacking: BTreeMap<&str, (usize, String, usize)> = BTreeMap::new();
    for (number, line) in text.trim_start_matches('\u{feff}').lines().enumerate() {
        let number = number + 1;
        if line.trim().is_empty() {
            continue;
        }
        let place = format!("{}:{number}", path.display());
        let row = match serde_json::from_str::<Value>(line) {
            Ok(Value::Object(row)) => row,
            Ok(_) => {
                problems.push(format!("{place}: not an object like {{\"file_name\": \"a.png\", \"text\": \"...\"}}"));
                continue;
            }
            Err(error) => {
                problems.push(format!("{place}: not JSON: {error}"));
                continue;
            }
        };
        let mut cell = |column| match row.get(column) {
            Some(Value::String(text)) => Some(text.clone()),
            Some(other) => {
                problems.push(format!("{place}: `{column}` is {other}, but must be a string"));
                None
            }
            None => {
                let keys = row.keys().map(|key| format!("`{key}`")).collect::<Vec<_>>().join(", ");
                lacking.entry(column).and_modify(|entry| entry.2 += 1).or_insert((number, keys, 0));
                None
            }
        };
        let name = cell(&options.image_column);
        let caption = cell(&options.caption_column);
        let Some(name) = name else { continue };
        let file: PathBuf = Path::new(&name).components().filter(|part| *part != Component::CurDir).collect();
        if listing.pictures.binary_search(&file).is_err() {
            problems.push(format!("{place}: {}", not_there(folder, listing, &name, &file)));
        } else if let Some((earlier, _)) = captions.get(&file) {
            problems.push(format!("{place}: `{name}` is already on line {earlier}"));
        } else {
            // A line whose caption could not be read has had its own problem; its picture has no second one.
            captions.insert(file, (number, caption.map_or_else(|| "?".into(), |text| one_line(&text))));
        }
    }
    for (column, (number, keys, more)) in lacking {
        let more = if more > 0 { format!(", and so {more} more lines") } else { String::new() };
        problems.push(format!("{}:{number}: there is no `{column}`, only {keys}{more}", path.display()));
    }
    // When no line could be used, that every picture lacks a caption is no news.
    let hopeless = captions.is_empty() && !problems.is_empty();
    let mut filled = BTreeMap::new();
    for picture in &listing.pictures {
        let caption = match (captions.remove(picture), &options.missing) {
            (Some((_, caption)), _) if !caption.is_empty() => caption,
            (_, Missing::Fill(caption)) => caption.clone(),
            (Some((number, _)), Missing::Error) => {
                problems.push(format!("{}:{number}: the caption is empty", path.display()));
                continue;
            }
            (None, Missing::Error) if hopeless => continue,
            (None, Missing::Error) => {
                problems
                    .push(format!("{} has no caption: {METADATA} does not name it", folder.join(picture).display()));
                continue;
            }
        };
        filled.insert(picture.as_path(), caption);
    }
    listing.samples(folder, |file| filled.get(file).cloned(), false)
}

/// Whether this file is, by its name, a picture that is read.
pub fn is_picture(file: &Path) -> bool {
    has_extension(file, PICTURES)
}

/// Says that a picture named in `metadata.jsonl` cannot be used, and which one may be meant.
fn not_there(folder: &Path, listing: &Listing, name: &str, file: &Path) -> String {
    if listing.others.binary_search_by(|other| other.as_path().cmp(file)).is_ok() {
        return format!("`{name}` is not a picture of a kind that is read (.{})", PICTURES.join(", ."));
    }
    let same_stem = listing.pictures.iter().find(|picture| picture.with_extension("") == file.with_extension(""));
    let same_letters = || {
        let lower = name.to_lowercase();
        listing.pictures.iter().find(|picture| picture.to_string_lossy().to_lowercase() == lower)
    };
    match same_stem.or_else(same_letters) {
        Some(near) => format!("there is no `{name}`, but `{}`", near.display()),
        None => format!("there is no `{name}` in {}", folder.display()),
    }
}
