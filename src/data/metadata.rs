//! Captions for a whole folder, from `metadata.jsonl` (one JSON object a line) or `metadata.csv` (a header line, then a row
//! a picture).

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::fs;
use std::path::Path;

use serde::Deserializer;
use serde::de::{IgnoredAny, MapAccess, Visitor};
use serde_json::{Map, Value};
use unicode_normalization::UnicodeNormalization;

use super::captions::{Caption, CaptionOptions, Captions, one_line};
use super::listing::{File, Listing, PICTURES, few};

/// The files with captions for a whole folder, in the order in which they are looked for; in any case of letters.
pub(super) const NAMES: [&str; 2] = ["metadata.jsonl", "metadata.csv"];

/// Whether a file's name is one of [`NAMES`].
pub(super) fn is_named(name: &str) -> bool {
    NAMES.iter().any(|known| name.eq_ignore_ascii_case(known))
}

/// The file of captions that is read, if there is one; what is left out for it is told.
pub(super) fn choose<'l>(listing: &'l Listing, remarks: &mut Vec<String>) -> Option<&'l File> {
    let rank = |file: &&File| {
        let place = NAMES.iter().position(|known| file.name.eq_ignore_ascii_case(known));
        (place, !NAMES.contains(&file.name.as_str()))
    };
    let chosen = listing.others.iter().filter(|file| is_named(&file.name)).min_by_key(rank)?;
    let others = listing.others.iter().filter(|file| is_named(file.last()) && *file != chosen);
    remarks.extend(few(others.map(|file| {
        format!("warning: captions are those of {}; {} is not read", listing.shown(chosen), listing.shown(file))
    })));
    Some(chosen)
}

/// A line or row: where it stands, what it says.
struct Row {
    number: u64,
    cells: Map<String, Value>,
}

fn rows(path: &Path, problems: &mut Vec<String>) -> Vec<Row> {
    let text = match fs::read(path).map(String::from_utf8) {
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
    let text = text.trim_start_matches('\u{feff}');
    let (rows, wrong) = match path.extension() {
        Some(extension) if extension.eq_ignore_ascii_case("csv") => csv_rows(path, text),
        _ => json_rows(path, text),
    };
    problems.extend(few(wrong));
    rows
}

/// The first key that a JSON object has twice, of which a reader would take the last without a word.
fn key_twice(object: &str) -> Option<String> {
    struct Keys;
    impl<'de> Visitor<'de> for Keys {
        type Value = Option<String>;

        fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
            f.write_str("an object")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Self::Value, A::Error> {
            let (mut seen, mut twice) = (HashSet::new(), None);
            while let Some((key, IgnoredAny)) = entries.next_entry::<String, IgnoredAny>()? {
                if twice.is_none() && !seen.insert(key.clone()) {
                    twice = Some(key);
                }
            }
            Ok(twice)
        }
    }
    serde_json::Deserializer::from_str(object).deserialize_map(Keys).ok().flatten()
}

fn json_rows(path: &Path, text: &str) -> (Vec<Row>, Vec<String>) {
    let (mut rows, mut wrong) = (Vec::new(), Vec::new());
    for (number, line) in (1..).zip(text.lines()).filter(|(_, line)| !line.trim().is_empty()) {
        let place = format!("{}:{number}", path.display());
        match serde_json::from_str::<Value>(line) {
            Ok(Value::Object(cells)) => match key_twice(line) {
                Some(key) => wrong.push(format!("{place}: `{key}` is there twice")),
                None => rows.push(Row { number, cells }),
            },
            Ok(_) => wrong.push(format!("{place}: not an object like {{\"file_name\": \"a.png\", \"text\": \"...\"}}")),
            Err(error) => wrong.push(format!("{place}: not JSON: {error}")),
        }
    }
    (rows, wrong)
}

fn csv_rows(path: &Path, text: &str) -> (Vec<Row>, Vec<String>) {
    // Where the comma is the decimal sign, spreadsheets part columns with semicolons.
    let first = text.lines().next().unwrap_or_default();
    let (delimiter, parted) =
        if first.contains(';') && !first.contains(',') { (b';', "semicolons") } else { (b',', "commas") };
    let mut reader =
        csv::ReaderBuilder::new().delimiter(delimiter).trim(csv::Trim::Headers).from_reader(text.as_bytes());
    let columns = match reader.headers() {
        Ok(columns) => columns.clone(),
        Err(error) => return (Vec::new(), vec![format!("{}:1: not a table: {error}", path.display())]),
    };
    if let Some(twice) =
        columns.iter().enumerate().find(|(i, name)| columns.iter().take(*i).any(|other| other == *name))
    {
        return (Vec::new(), vec![format!("{}:1: the column `{}` is there twice", path.display(), twice.1)]);
    }
    let (mut rows, mut wrong) = (Vec::new(), Vec::new());
    let has_odd_quote = !text.matches('"').count().is_multiple_of(2);
    for record in reader.records() {
        match record {
            // Quotes come in pairs, doubled ones too: where one is left over, a cell of several lines has swallowed rows.
            Ok(record) if has_odd_quote && record.iter().any(|cell| cell.contains('\n')) => {
                let line = record.position().map_or(0, csv::Position::line);
                wrong.push(format!("{}:{line}: a quote is not closed here", path.display()));
            }
            Ok(record) => {
                let cells = columns.iter().zip(&record).map(|(column, cell)| (column.into(), cell.into())).collect();
                rows.push(Row { number: record.position().map_or(0, csv::Position::line), cells });
            }
            Err(error) => {
                let line = error.position().map_or(0, csv::Position::line);
                let why = match error.kind() {
                    csv::ErrorKind::UnequalLengths { expected_len, len, .. } => format!(
                        "{len} cells, but the first line has {expected_len}; a caption with {parted} needs \
                         \"quotes\" around it"
                    ),
                    _ => error.to_string(),
                };
                wrong.push(format!("{}:{line}: {why}", path.display()));
            }
        }
    }
    (rows, wrong)
}

/// Reads the captions in `file`.
pub(super) fn read(listing: &Listing, file: &File, options: &CaptionOptions, problems: &mut Vec<String>) -> Captions {
    let path = listing.folder.join(&file.path);
    let places = Places::of(listing);
    let before = problems.len();
    let rows = rows(&path, problems);
    let mut captions: Vec<Option<(u64, String)>> = listing.pictures.iter().map(|_| None).collect();
    // For each column that lines lack: the first such line, what it has instead, how many more there are.
    let mut lacking: BTreeMap<&str, (u64, String, usize)> = BTreeMap::new();
    let (mut wrong, mut gone) = (Vec::new(), Vec::new());
    // Pictures that lines with other names seem to mean.
    let mut strayed = HashSet::new();
    for Row { number, cells } in rows {
        let place = format!("{}:{number}", path.display());
        let mut cell = |column| match cells.get(column) {
            Some(Value::String(text)) => Some(text.clone()),
            Some(other) => {
                wrong.push(format!("{place}: `{column}` is {other}, but must be a string"));
                None
            }
            None => {
                let keys = cells.keys().map(|key| format!("`{key}`")).collect::<Vec<_>>().join(", ");
                lacking.entry(column).and_modify(|entry| entry.2 += 1).or_insert((number, keys, 0));
                None
            }
        };
        let name = cell(&options.image_column);
        let caption = cell(&options.caption_column);
        let Some(name) = name else { continue };
        match places.find(&name) {
            Err(Stray { why, meant }) => {
                gone.push(format!("{place}: {why}"));
                strayed.extend(meant);
            }
            Ok(picture) => match &captions[picture] {
                Some((earlier, _)) => wrong.push(format!("{place}: `{name}` is already on line {earlier}")),
                // A line whose caption could not be read has had its own problem; its picture has no second one.
                None => captions[picture] = Some((number, caption.map_or_else(|| "?".into(), |text| one_line(&text)))),
            },
        }
    }
    // In the order of the lines, as far as a line tells; counts of many at the end.
    let mut told: Vec<String> = few(wrong).into_iter().chain(few(gone)).collect();
    let start = format!("{}:", path.display());
    let line = |text: &String| text.strip_prefix(&start).and_then(|rest| rest.split(':').next()?.parse::<u64>().ok());
    told.extend(problems.drain(before..));
    told.sort_by_key(line);
    problems.extend(told);
    for (column, (number, keys, more)) in lacking {
        let more = match more {
            0 => String::new(),
            1 => "; so on 1 more line".to_owned(),
            more => format!("; so on {more} more lines"),
        };
        problems.push(format!("{}:{number}: there is no `{column}`, only {keys}{more}", path.display()));
    }
    // When no line could be used, that every picture lacks a caption is no news.
    let hopeless = captions.iter().all(Option::is_none) && problems.len() > before;
    let shown = file.last();
    let captions = (0..).zip(listing.pictures.iter().zip(captions)).map(|(index, (picture, caption))| match caption {
        Some((_, text)) if !text.is_empty() => Caption::Text(text),
        Some((number, _)) => Caption::None(format!("{}:{number}: the caption is empty", path.display())),
        None if hopeless || strayed.contains(&index) => Caption::Unreadable,
        None => Caption::None(format!("{} has no caption: {shown} does not name it", listing.shown(picture))),
    });
    Captions { captions: captions.collect(), found: true }
}

/// A name that no picture has.
struct Stray {
    why: String,
    /// The picture that seems to be meant.
    meant: Option<usize>,
}

/// Finds pictures by the names that metadata have for them.
struct Places<'l> {
    listing: &'l Listing,
    exact: HashMap<&'l str, usize>,
    others: HashSet<&'l str>,
    stems: HashMap<&'l str, usize>,
    lower: HashMap<String, usize>,
    /// By the name's last part; `None` where several have it.
    last: HashMap<&'l str, Option<usize>>,
    /// The folder as metadata may have it before names.
    roots: Vec<String>,
}

impl<'l> Places<'l> {
    fn of(listing: &'l Listing) -> Self {
        let pictures = || listing.pictures.iter().enumerate();
        // Where several have one stem, the first is taken.
        let reversed = || pictures().rev();
        let mut last: HashMap<&str, Option<usize>> = HashMap::new();
        for (place, file) in pictures() {
            last.entry(file.last()).and_modify(|known| *known = None).or_insert(Some(place));
        }
        let roots = [std::path::absolute(&listing.folder).ok(), listing.folder.canonicalize().ok()];
        let root = |root: std::path::PathBuf| root.to_string_lossy().replace('\\', "/").nfc().collect::<String>();
        let roots = roots.into_iter().flatten().map(root).map(|root| root.trim_end_matches('/').to_owned() + "/");
        Self {
            listing,
            exact: pictures().map(|(place, file)| (file.name.as_str(), place)).collect(),
            others: listing.others.iter().map(|file| file.name.as_str()).collect(),
            stems: reversed().map(|(place, file)| (file.stem(), place)).collect(),
            lower: reversed().map(|(place, file)| (file.name.to_lowercase(), place)).collect(),
            last,
            roots: roots.collect(),
        }
    }

    /// The picture `name`, relative to the folder or absolute, with `/` or `\`, in any form of Unicode.
    ///
    /// # Errors
    /// Says that there is none, and which one may be meant.
    fn find(&self, name: &str) -> Result<usize, Stray> {
        let name: String = name.nfc().collect();
        if let Some(place) = self.exact.get(name.as_str()) {
            return Ok(*place);
        }
        let slashes = name.replace('\\', "/");
        let inner = self.roots.iter().find_map(|root| slashes.strip_prefix(root)).unwrap_or(&slashes);
        let mut parts: Vec<&str> = Vec::new();
        for (place, part) in inner.split('/').enumerate() {
            match part {
                "." => {}
                // What stands before the first slash of an absolute path keeps it from being a relative one.
                "" if place > 0 => {}
                ".." if parts.last().is_some_and(|last| *last != "..") => drop(parts.pop()),
                part => parts.push(part),
            }
        }
        let inner = parts.join("/");
        if let Some(place) = self.exact.get(inner.as_str()) {
            return Ok(*place);
        }
        if self.others.contains(inner.as_str()) {
            let why = format!("`{name}` is not a picture of a kind that is read (.{})", PICTURES.join(", ."));
            return Err(Stray { why, meant: None });
        }
        let wanted = File::new(inner.as_str().into());
        let close = self.stems.get(wanted.stem()).or_else(|| self.lower.get(&inner.to_lowercase()));
        // The end of a longer path, from another folder or another machine; or the picture's folder is left out.
        let mut ends = (1..parts.len()).map(|start| parts[start..].join("/"));
        let elsewhere = || {
            let end = ends.find_map(|end| self.exact.get(end.as_str()).copied());
            end.or_else(|| self.last.get(wanted.last()).copied().flatten())
        };
        let called = |place: usize| &self.listing.pictures[place].name;
        let (why, meant) = match (close, close.map_or_else(elsewhere, |_| None)) {
            (Some(place), _) => (format!("there is no `{name}`, but `{}`", called(*place)), Some(*place)),
            (None, Some(place)) => {
                let why = "names are relative to the folder of the captions";
                (format!("there is no `{name}`, but `{}`: {why}", called(place)), Some(place))
            }
            (None, None) => (format!("there is no `{name}` in {}", self.listing.folder.display()), None),
        };
        Err(Stray { why, meant })
    }
}
