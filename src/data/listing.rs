//! The files of a folder and of the folders below it: pictures, and whatever else lies among them.

use std::fs;
use std::path::{Path, PathBuf};

use unicode_normalization::UnicodeNormalization;

use super::Problems;

/// Extensions of the pictures that are read.
pub(super) const PICTURES: &[&str] = &["png", "jpg", "jpeg", "webp", "bmp"];
/// Pictures that other programs read and this one does not: leaving them out silently would be a surprise.
const OTHER_PICTURES: &[&str] =
    &["gif", "tif", "tiff", "heic", "heif", "avif", "jxl", "jfif", "psd", "tga", "ppm", "apng", "jp2", "dng", "svg"];
/// What Windows, macOS and disk stations put into folders, in lower case. Names that begin with a dot are theirs too.
const SYSTEM: &[&str] =
    &[".ds_store", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "@eadir", "__macosx", "$recycle.bin"];

/// Whether a file or folder of this name is one of those.
pub fn is_of_the_system(name: &str) -> bool {
    SYSTEM.contains(&name.to_lowercase().as_str())
}

/// A file below a folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct File {
    /// Relative to the folder.
    pub path: PathBuf,
    /// The same, its parts joined by `/`, in composed Unicode (macOS' disks may hold the decomposed form).
    pub name: String,
}

impl File {
    pub fn new(path: PathBuf) -> Self {
        Self { name: name(&path), path }
    }

    /// The name up to the last dot of its last part.
    pub fn stem(&self) -> &str {
        let last = self.name.rfind('/').map_or(0, |slash| slash + 1);
        match self.name[last..].rfind('.') {
            Some(dot) if dot > 0 => &self.name[..last + dot],
            _ => &self.name,
        }
    }

    /// The name's last part.
    pub fn last(&self) -> &str {
        self.name.rsplit('/').next().unwrap_or(&self.name)
    }

    /// The extension with its dot, in lower case; empty without one.
    pub fn extension(&self) -> String {
        self.name[self.stem().len()..].to_lowercase()
    }
}

/// A relative path as [`File::name`].
pub(super) fn name(path: &Path) -> String {
    let parts: Vec<_> = path.components().map(|part| part.as_os_str().to_string_lossy()).collect();
    parts.join("/").nfc().collect()
}

/// Whether this file is, by its name, a picture that is read.
pub fn is_picture(file: &Path) -> bool {
    has_extension(file, PICTURES)
}

fn has_extension(file: &Path, extensions: &[&str]) -> bool {
    let own = file.extension().map(|own| own.to_string_lossy().to_lowercase());
    own.is_some_and(|own| extensions.contains(&own.as_str()))
}

/// The files of a folder, sorted by their names part by part.
pub(super) struct Listing {
    pub folder: PathBuf,
    pub pictures: Vec<File>,
    pub others: Vec<File>,
}

impl Listing {
    /// Lists `folder`, which may be without pictures. What its pictures are stored as is not looked at, but a kind that is
    /// not read is a problem.
    ///
    /// # Errors
    /// There is no such folder, or a part of it cannot be listed.
    pub fn read(folder: &Path, problems: &mut Vec<String>) -> Result<Self, Problems> {
        if !folder.is_dir() {
            let what = if folder.exists() { "is not a folder" } else { "does not exist" };
            return Err(Problems(vec![format!("the folder of pictures {} {what}", folder.display())]));
        }
        let mut files = Vec::new();
        list(folder, Path::new(""), 0, &mut files).map_err(|problem| Problems(vec![problem]))?;
        let mut files: Vec<File> = files.into_iter().map(File::new).collect();
        // A folder's files stand together, before what has the folder's name and more.
        files.sort_by_cached_key(|file| file.name.replace('/', "\0"));
        let (pictures, others): (Vec<_>, Vec<_>) = files.into_iter().partition(|file| is_picture(&file.path));
        let unread = others.iter().filter(|file| has_extension(&file.path, OTHER_PICTURES));
        problems.extend(few(unread.map(|file| {
            let shown = folder.join(&file.path);
            format!("{}: pictures of this kind are not read; convert it to PNG or JPEG", shown.display())
        })));
        Ok(Self { folder: folder.to_owned(), pictures, others })
    }

    /// A file's path, for messages.
    pub fn shown(&self, file: &File) -> String {
        self.folder.join(&file.path).display().to_string()
    }

    /// Refuses a folder without pictures, where `problems` do not say why it has none: they are of a kind that is not read.
    ///
    /// # Errors
    /// It has none.
    pub fn not_empty(self, problems: &mut Vec<String>) -> Result<Self, Problems> {
        if self.pictures.is_empty() && !problems.is_empty() {
            return Err(Problems(std::mem::take(problems)));
        }
        if self.pictures.is_empty() {
            let kinds = PICTURES.join(", .");
            return Err(Problems(vec![format!("{} holds no pictures (.{kinds})", self.folder.display())]));
        }
        Ok(self)
    }

    /// The folders at the top that pictures lie in or below, each once; pictures at the top itself are in none.
    pub fn top_folders(&self) -> Vec<&str> {
        let mut folders: Vec<&str> =
            self.pictures.iter().filter_map(|file| Some(file.name.split_once('/')?.0)).collect();
        folders.dedup();
        folders
    }
}

/// How many lines of one kind are told one by one.
const TOLD: usize = 20;

/// The first lines of one kind, and how many more there are.
pub(super) fn few(lines: impl IntoIterator<Item = String>) -> Vec<String> {
    let mut lines: Vec<String> = lines.into_iter().collect();
    if lines.len() > TOLD {
        let more = lines.len() - TOLD;
        lines.truncate(TOLD);
        if let Some(last) = lines.last_mut() {
            last.push_str(&format!(" (and {more} more of this kind)"));
        }
    }
    lines
}

/// How many names [`listed`] tells.
const NAMED: usize = 3;

/// `a.jpg, b.jpg, c.jpg and 2 more`
pub(super) fn listed(names: &[impl AsRef<str>]) -> String {
    let first = names.iter().take(NAMED).map(AsRef::as_ref).collect::<Vec<_>>().join(", ");
    match names.len().saturating_sub(NAMED) {
        0 => first,
        more => format!("{first} and {more} more"),
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
        let entry = entry.map_err(unreadable)?;
        let name = entry.file_name();
        // `.DS_Store`, macOS' `._` twins of pictures, half-written files.
        if name.as_encoded_bytes().starts_with(b".") || is_of_the_system(&name.to_string_lossy()) {
            continue;
        }
        let kind = entry.file_type().map_err(unreadable)?;
        // A link that leads nowhere is told of when it is read.
        let target =
            if kind.is_symlink() { fs::metadata(entry.path()).map(|m| m.file_type()).ok() } else { Some(kind) };
        let file = inner.join(name);
        match target {
            Some(kind) if kind.is_dir() => list(folder, &file, depth + 1, files)?,
            // Pipes and devices could be waited for without an end.
            Some(kind) if !kind.is_file() => {}
            _ => files.push(file),
        }
    }
    Ok(())
}
