//! Captions: of folders made here, of the project's own pictures, and of photographs where those are at hand.

mod common;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use common::pictures::{encoded, folder, picture, unreadable};
use common::shared;
use image::ImageFormat;
use palettist::data::{CaptionOptions, Contents, Missing, Problems, read_folder};

fn own(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// The problems of a folder, without its path.
fn problems(folder: &tempfile::TempDir, options: &CaptionOptions) -> Vec<String> {
    let Problems(lines) = read_folder(folder.path(), options).unwrap_err();
    let prefix = format!("{}/", folder.path().display());
    let lines: Vec<String> = lines.into_iter().map(|line| line.replace(&prefix, "")).collect();
    assert!(lines.iter().all(|line| !line.contains('\n')), "{lines:#?}");
    lines
}

/// (path in the folder, caption) of each sample.
fn samples(folder: &tempfile::TempDir, options: &CaptionOptions) -> Vec<(String, String)> {
    let Contents { samples, .. } = read_folder(folder.path(), options).unwrap();
    let short = |path: &Path| path.strip_prefix(folder.path()).unwrap().to_string_lossy().into_owned();
    samples.into_iter().map(|sample| (short(&sample.path), sample.caption)).collect()
}

/// What is remarked of a folder, without its path.
fn remarks(folder: &tempfile::TempDir, options: &CaptionOptions) -> Vec<String> {
    let Contents { remarks, .. } = read_folder(folder.path(), options).unwrap();
    remarks.into_iter().map(|line| line.replace(&folder.path().display().to_string(), "HERE")).collect()
}

fn pairs(expected: &[(&str, &str)]) -> Vec<(String, String)> {
    expected.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect()
}

#[test]
fn sidecar_captions_are_read_in_order() {
    let folder = folder(&[
        ("b.png", ""),
        ("b.txt", "\u{feff} a red\n apple \n"),
        ("a.JPG", ""),
        ("a.caption", "a pear"),
        ("inner/c.webp", ""),
        ("inner/c.txt", "a plum"),
        ("inner/c.caption", "of less rank"),
        (".hidden.png", ""),
        ("readme.md", "any text"),
    ]);
    let expected = pairs(&[("a.JPG", "a pear"), ("b.png", "a red apple"), ("inner/c.webp", "a plum")]);
    assert_eq!(samples(&folder, &CaptionOptions::default()), expected);
}

#[test]
fn a_folder_of_pictures_that_are_not_read_says_so() {
    let folder = folder(&[("IMG_1.HEIC", "x"), ("IMG_2.heic", "x")]);
    let expected = "pictures of this kind are not read; convert it to PNG or JPEG";
    let told = problems(&folder, &CaptionOptions::default());
    assert_eq!(told, [format!("IMG_1.HEIC: {expected}"), format!("IMG_2.heic: {expected}")]);
}

#[test]
fn a_file_that_is_too_long_for_a_caption_is_named() {
    let folder = folder(&[("a.png", ""), ("a.txt", &"word ".repeat(30_000)), ("b.png", ""), ("b.txt", "a pear")]);
    let told = problems(&folder, &CaptionOptions::default());
    assert_eq!(told, ["a.txt has 150000 bytes; a caption has 100000 at most"]);
}

#[test]
fn captions_that_lose_to_another_file_are_told() {
    let files = [
        ("a.png", ""),
        ("a.txt", "a dog"),
        ("a.caption", "a cat"),
        // Equal words, in two files: nothing is lost.
        ("b.png", ""),
        ("b.txt", "a bird\n"),
        ("b.caption", " a  bird"),
        // Letters in two cases, where the disk tells them apart; an empty one that is read before one with words.
        ("c.png", ""),
        ("c.caption", "a fish"),
        ("c.CAPTION", "a snail"),
        ("d.png", ""),
        ("d.txt", ""),
        ("d.caption", "a mouse"),
    ];
    let options = CaptionOptions { missing: Missing::Fill(String::new()), ..CaptionOptions::default() };
    let lost = "HERE: 3 caption files are not read, whose pictures have another one, with another text: a.caption (a.txt \
                is), c.CAPTION (c.caption is), d.caption (d.txt is)";
    let told = remarks(&folder(&files), &options);
    assert_eq!(told[0], format!("warning: {lost}"), "{told:#?}");
    // The other order of extensions, one of them asked for in two cases.
    let extensions = [".caption", ".CAPTION", ".txt"].map(String::from).to_vec();
    let told = remarks(&folder(&files[..6]), &CaptionOptions { extensions, ..CaptionOptions::default() });
    let lost =
        "HERE: 1 caption file is not read, whose pictures have another one, with another text: a.txt (a.caption is)";
    assert_eq!(told, [format!("warning: {lost}")]);
    // Beside a table of captions.
    let table = "{\"file_name\": \"a.png\", \"text\": \"a dog\"}\n{\"file_name\": \"b.png\", \"text\": \"a bird\"}";
    let mut files = files[..6].to_vec();
    files.push(("metadata.jsonl", table));
    let lost = "HERE: 1 caption file is not read, because captions are those of metadata.jsonl: a.caption";
    assert_eq!(remarks(&folder(&files), &CaptionOptions::default()), [format!("warning: {lost}")]);
}

#[test]
fn pictures_that_share_a_caption_are_told() {
    let folder =
        folder(&[("in/a.jpg", ""), ("in/a.png", ""), ("in/a.txt", "a dog"), ("b.png", ""), ("b.txt", "a cat")]);
    let expected = "warning: HERE: pictures share a caption file: in/a.jpg and a.png have a.txt";
    assert_eq!(remarks(&folder, &CaptionOptions::default()), [expected]);
}

/// As spreadsheets write it where the comma is the decimal sign.
#[test]
fn a_table_may_be_parted_by_semicolons() {
    let table = "file_name;text\na.png;a dog, sitting\nb.png;\"a cat; asleep\"\n";
    let mut files = vec![("a.png", ""), ("b.png", ""), ("metadata.csv", table)];
    let expected = pairs(&[("a.png", "a dog, sitting"), ("b.png", "a cat; asleep")]);
    assert_eq!(samples(&folder(&files), &CaptionOptions::default()), expected);
    files[2].1 = "file_name;text\na.png;a dog; sitting\nb.png;x\n";
    let lines = problems(&folder(&files), &CaptionOptions::default());
    let expected =
        "metadata.csv:2: 3 cells, but the first line has 2; a caption with semicolons needs \"quotes\" around it";
    assert_eq!(lines[0], expected, "{lines:#?}");
}

#[test]
fn a_key_that_a_line_has_twice_is_refused() {
    let rows = [
        r#"{"file_name": "a.png", "text": "a dog", "text": "a cat"}"#,
        r#"{"file_name": "b.png", "text": "fine", "more": {"text": 1, "x": 2}}"#,
        r#"{"file_name": "c.png", "file_name": "b.png", "te\u0078t": "x", "text": "y"}"#,
    ];
    let rows = rows.join("\n");
    let folder = folder(&[("a.png", ""), ("b.png", ""), ("c.png", ""), ("metadata.jsonl", &rows)]);
    let lines = problems(&folder, &CaptionOptions::default());
    assert_eq!(
        lines[..2],
        ["metadata.jsonl:1: `text` is there twice", "metadata.jsonl:3: `file_name` is there twice"],
        "{lines:#?}"
    );
}

#[test]
fn metadata_captions_are_read_in_order_of_the_path() {
    let folder = folder(&[
        ("b.png", ""),
        ("inner/a.png", ""),
        (
            "metadata.jsonl",
            "{\"file_name\": \"./inner/a.png\", \"text\": \"two\", \"more\": 3}\n\n{\"file_name\": \"b.png\", \"text\": \"one\"}\n",
        ),
        ("b.txt", "not read beside metadata.jsonl"),
    ]);
    assert_eq!(samples(&folder, &CaptionOptions::default()), pairs(&[("b.png", "one"), ("inner/a.png", "two")]));
}

#[test]
fn columns_may_have_other_names() {
    let row = "{\"image\": \"a.png\", \"caption\": \"a thing\"}";
    let folder = folder(&[("a.png", ""), ("metadata.jsonl", row)]);
    let columns = ["image", "caption"].map(String::from);
    let [image_column, caption_column] = columns;
    let options = CaptionOptions { image_column, caption_column, ..CaptionOptions::default() };
    assert_eq!(samples(&folder, &options), pairs(&[("a.png", "a thing")]));
    let lines = problems(&folder, &CaptionOptions::default());
    assert_eq!(lines.len(), 2, "{lines:#?}");
    assert_eq!(lines[0], "metadata.jsonl:1: there is no `file_name`, only `caption`, `image`");
}

#[test]
fn every_sidecar_mistake_is_told() {
    let mut files = vec![("a.png", ""), ("a.txt", "fine"), ("b.png", ""), ("c.png", ""), ("c.txt", " \n")];
    files.extend([("lonely.txt", "a caption"), ("photo.heic", "x")]);
    let folder = folder(&files);
    fs::write(folder.path().join("d.png"), "").unwrap();
    fs::write(folder.path().join("d.txt"), b"\xff\xfe").unwrap();
    assert_eq!(
        problems(&folder, &CaptionOptions::default()),
        [
            "photo.heic: pictures of this kind are not read; convert it to PNG or JPEG",
            "the caption d.txt is not UTF-8 text",
            "lonely.txt is a caption without its picture",
            "b.png has no caption file (.txt or .caption)",
            "c.png has an empty caption file (.txt or .caption)",
        ]
    );
}

#[test]
fn every_metadata_mistake_is_told_with_its_line() {
    let rows = [
        r#"{"file_name": "a.png", "text": "fine"}"#,
        r#"{"file_name": "gone.png", "text": "x"}"#,
        r#"{"file_name": "a.png", "text": "again"}"#,
        r#"{"file_name": "b.jpg", "text": "x"}"#,
        r#"{"file_name": "c.png"}"#,
        "not json",
        r#"{"file_name": "d.png", "text": 7}"#,
        r#"{"file_name": "e.png", "text": ""}"#,
        r#"["list"]"#,
        r#"{"file_name": "A.PNG", "text": "x"}"#,
    ]
    .join("\n");
    let mut files: Vec<_> = ["a.png", "b.png", "c.png", "d.png", "e.png"].map(|name| (name, "")).into();
    files.push(("metadata.jsonl", &rows));
    let folder = folder(&files);
    let here = folder.path().display().to_string();
    let lines: Vec<_> =
        problems(&folder, &CaptionOptions::default()).iter().map(|line| line.replace(&here, "HERE")).collect();
    // Nothing more of b.png, which line 4 seems to mean.
    assert_eq!(
        lines,
        [
            "metadata.jsonl:2: there is no `gone.png` in HERE",
            "metadata.jsonl:3: `a.png` is already on line 1",
            "metadata.jsonl:4: there is no `b.jpg`, but `b.png`",
            "metadata.jsonl:6: not JSON: expected ident at line 1 column 2",
            "metadata.jsonl:7: `text` is 7, but must be a string",
            "metadata.jsonl:9: not an object like {\"file_name\": \"a.png\", \"text\": \"...\"}",
            "metadata.jsonl:10: there is no `A.PNG`, but `a.png`",
            "metadata.jsonl:5: there is no `text`, only `file_name`",
            "metadata.jsonl:8: the caption is empty",
        ]
    );
}

#[test]
fn a_missing_caption_may_be_filled() {
    let options = CaptionOptions { missing: Missing::Fill("a toy".into()), ..CaptionOptions::default() };
    let sidecars = folder(&[("a.png", ""), ("b.png", ""), ("b.txt", "a duck")]);
    assert_eq!(samples(&sidecars, &options), pairs(&[("a.png", "a toy"), ("b.png", "a duck")]));
    let row = "{\"file_name\": \"b.png\", \"text\": \"a duck\"}";
    let metadata = folder(&[("a.png", ""), ("b.png", ""), ("metadata.jsonl", row)]);
    assert_eq!(samples(&metadata, &options), pairs(&[("a.png", "a toy"), ("b.png", "a duck")]));
}

#[test]
fn near_misses_are_pointed_at() {
    let options = CaptionOptions { extensions: vec![".caption".into()], ..CaptionOptions::default() };
    let sidecars = folder(&[("a.png", ""), ("a.txt", "x"), ("b.png", ""), ("b.txt", "x")]);
    let lines = problems(&sidecars, &options);
    assert_eq!(lines.len(), 1);
    assert!(lines[0].ends_with("has a caption; found 2 .txt; you asked for .caption"), "{lines:?}");

    let misnamed = folder(&[("a.png", ""), ("metadata.json1", "x")]);
    assert!(problems(&misnamed, &options)[0].contains("metadata.json1, which is not read"));

    let above = folder(&[("train/a.png", ""), ("train/metadata.jsonl", "x")]);
    assert!(problems(&above, &options)[0].ends_with("in train: give that folder"));
}

#[test]
fn stray_text_files_are_told_and_do_no_harm() {
    // google/dreambooth's folders have their sources and licences beside the pictures.
    let mut files = vec![("00.jpg", ""), ("00.txt", "a dog"), ("01.jpg", ""), ("01.txt", "a dog")];
    files.extend([("README.txt", "x"), ("license.TXT", "x"), ("references_and_licenses.txt", "x"), ("todo.txt", "x")]);
    let folder = folder(&files);
    assert_eq!(samples(&folder, &CaptionOptions::default()).len(), 2);
    assert_eq!(
        remarks(&folder, &CaptionOptions::default()),
        ["warning: HERE: 4 text files belong to no picture and are not read: README.txt, license.TXT, \
          references_and_licenses.txt and 1 more"]
    );
    // Where a picture lacks its caption, what could be one is named as that, and the others still are not.
    fs::remove_file(folder.path().join("01.txt")).unwrap();
    let expected = ["todo.txt is a caption without its picture", "01.jpg has no caption file (.txt or .caption)"];
    assert_eq!(problems(&folder, &CaptionOptions::default()), expected);
    // A caption that is numbered like the pictures had one: it was lost.
    fs::write(folder.path().join("01.txt"), "a dog").unwrap();
    fs::write(folder.path().join("17.txt"), "a dog").unwrap();
    assert_eq!(problems(&folder, &CaptionOptions::default()), ["17.txt is a caption without its picture"]);
}

#[test]
fn extensions_are_taken_in_any_case_and_may_have_two_dots() {
    let folder = folder(&[("a.png", ""), ("a.TXT", "one"), ("b.png", ""), ("b.Txt", "no"), ("b.txt", "two")]);
    assert_eq!(samples(&folder, &CaptionOptions::default()), pairs(&[("a.png", "one"), ("b.png", "two")]));
    let lost = "1 caption file is not read, whose pictures have another one, with another text: b.Txt (b.txt is)";
    assert_eq!(remarks(&folder, &CaptionOptions::default()), [format!("warning: HERE: {lost}")]);
    fs::write(folder.path().join("a.wd14.txt"), "three").unwrap();
    fs::write(folder.path().join("b.wd14.txt"), "four").unwrap();
    let options = CaptionOptions { extensions: vec![".wd14.txt".into()], ..CaptionOptions::default() };
    assert_eq!(samples(&folder, &options), pairs(&[("a.png", "three"), ("b.png", "four")]));
}

#[test]
fn metadata_name_pictures_as_people_write_them() {
    let folder =
        folder(&[("a.png", ""), ("in/b.png", ""), ("in/cafe\u{301}.png", ""), ("d\u{fc}.png", ""), ("e.png", "")]);
    let here = folder.path().canonicalize().unwrap().display().to_string();
    let names = [
        format!("{here}/a.png"),
        r"in\b.png".into(),
        "in/caf\u{e9}.png".into(),
        "du\u{308}.png".into(),
        "./in/..//e.png".into(),
    ];
    let row = |name: &String| serde_json::json!({"file_name": name, "text": format!("caption {name}")}).to_string();
    fs::write(folder.path().join("metadata.jsonl"), names.iter().map(row).collect::<Vec<_>>().join("\n")).unwrap();
    let read = read_folder(folder.path(), &CaptionOptions::default()).unwrap().samples;
    let found: BTreeSet<(String, String)> = read.into_iter().map(|sample| (sample.name, sample.caption)).collect();
    let expected = ["a.png", "in/b.png", "in/caf\u{e9}.png", "d\u{fc}.png", "e.png"].map(String::from);
    let expected = expected.into_iter().zip(&names).map(|(file, name)| (file, format!("caption {name}")));
    assert_eq!(found, expected.collect());

    // What is ambiguous is refused with the file that is meant.
    for (name, meant) in [
        ("train/a.png", "`a.png`"),
        ("/home/somebody/train/in/b.png", "`in/b.png`"),
        (r"C:\pictures\in\b.png", "`in/b.png`"),
        ("b.png", "`in/b.png`"),
    ] {
        let row = serde_json::json!({"file_name": name, "text": "x"}).to_string();
        fs::write(folder.path().join("metadata.jsonl"), &row).unwrap();
        let lines = problems(&folder, &CaptionOptions::default());
        let expected = format!("there is no `{name}`, but {meant}: names are relative to the folder of the captions");
        assert_eq!(lines, [format!("metadata.jsonl:1: {expected}")]);
        // Beside a line that is right the picture that is meant is not told of a second time; the others are.
        let right = serde_json::json!({"file_name": "e.png", "text": "x"}).to_string();
        fs::write(folder.path().join("metadata.jsonl"), format!("{right}\n{row}")).unwrap();
        let lines = problems(&folder, &CaptionOptions::default());
        assert_eq!((lines.len(), &lines[0]), (4, &format!("metadata.jsonl:2: {expected}")), "{lines:#?}");
        let meant = meant.trim_matches('`');
        assert!(lines[1..].iter().all(|line| line.contains("does not name it") && !line.contains(meant)), "{lines:#?}");
    }
}

#[test]
fn captions_come_from_a_csv_too() {
    let table = "\u{feff}file_name,text\na.png,\"a dog, \"\"sitting\"\"\"\nin/b.png,a cat\n";
    let table = folder(&[("a.png", ""), ("in/b.png", ""), ("metadata.csv", table)]);
    let expected = pairs(&[("a.png", "a dog, \"sitting\""), ("in/b.png", "a cat")]);
    assert_eq!(samples(&table, &CaptionOptions::default()), expected);
    // The JSON form stands before it, under a name in any case; what is not read is told.
    let row = "{\"file_name\": \"a.png\", \"text\": \"of rank\"}\n{\"file_name\": \"in/b.png\", \"text\": \"too\"}";
    fs::write(table.path().join("Metadata.JSONL"), row).unwrap();
    assert_eq!(samples(&table, &CaptionOptions::default()), pairs(&[("a.png", "of rank"), ("in/b.png", "too")]));
    let told = remarks(&table, &CaptionOptions::default());
    assert_eq!(told, ["warning: captions are those of HERE/Metadata.JSONL; HERE/metadata.csv is not read"]);

    let wrong =
        folder(&[("a.png", ""), ("b.png", ""), ("metadata.csv", "file_name,text\na.png,a dog, sitting\nb.png,\n")]);
    assert_eq!(
        problems(&wrong, &CaptionOptions::default()),
        [
            "metadata.csv:2: 3 cells, but the first line has 2; a caption with commas needs \"quotes\" around it",
            "a.png has no caption: metadata.csv does not name it",
            "metadata.csv:3: the caption is empty",
        ]
    );
    // A quote that is not closed would swallow the next row; an inch is no such quote.
    let open =
        folder(&[("a.png", ""), ("b.png", ""), ("metadata.csv", "file_name,text\na.png,\"a dog\nb.png,a cat\n")]);
    assert!(problems(&open, &CaptionOptions::default())[0].ends_with("metadata.csv:2: a quote is not closed here"));
    let inch =
        folder(&[("a.png", ""), ("b.png", ""), ("metadata.csv", "file_name,text\na.png,a 5\" disk\nb.png,a cat\n")]);
    assert_eq!(samples(&inch, &CaptionOptions::default()), pairs(&[("a.png", "a 5\" disk"), ("b.png", "a cat")]));
    let twice = folder(&[("a.png", ""), ("metadata.csv", "file_name,text,text\na.png,a dog,a cat\n")]);
    assert!(
        problems(&twice, &CaptionOptions::default())[0].ends_with("metadata.csv:1: the column `text` is there twice")
    );
    let columns = folder(&[("a.png", ""), ("metadata.csv", "image;caption\na.png;a dog\n")]);
    let lines = problems(&columns, &CaptionOptions::default());
    assert!(lines[0].ends_with("there is no `file_name`, only `caption`, `image`"), "{lines:?}");
}

#[test]
fn kohyas_folders_have_repeats_and_words() {
    let folder = folder(&[
        ("10_sks dog/a.png", ""),
        ("10_sks dog/b.png", ""),
        ("10_sks dog/b.txt", "sks dog, asleep"),
        ("2_cat_x/c.png", ""),
    ]);
    let read = read_folder(folder.path(), &CaptionOptions::default()).unwrap();
    let found: Vec<_> = read.samples.iter().map(|s| (s.name.as_str(), s.caption.as_str(), s.repeats)).collect();
    let expected = [
        ("10_sks dog/a.png", "sks dog", 10),
        ("10_sks dog/b.png", "sks dog, asleep", 10),
        ("2_cat_x/c.png", "cat_x", 2),
    ];
    assert_eq!(found, expected);
    assert_eq!(
        remarks(&folder, &CaptionOptions::default()),
        [
            "note: HERE/10_sks dog: 2 pictures × 10 an epoch; \"sks dog\" where there is no caption",
            "note: HERE/2_cat_x: 1 picture × 2 an epoch; \"cat_x\" where there is no caption"
        ]
    );
    // A year is no number of repeats; beside other pictures such names mean nothing, and that is told.
    let years = self::folder(&[("2023_dogs/a.png", ""), ("2023_dogs/a.txt", "a dog")]);
    assert_eq!(read_folder(years.path(), &CaptionOptions::default()).unwrap().samples[0].repeats, 1);
    fs::write(folder.path().join("d.png"), encoded(&picture(4, 4), ImageFormat::Png)).unwrap();
    let empty = CaptionOptions { missing: Missing::Fill(String::new()), ..CaptionOptions::default() };
    assert!(read_folder(folder.path(), &empty).unwrap().samples.iter().all(|sample| sample.repeats == 1));
    assert!(
        remarks(&folder, &empty)[0].starts_with("warning: HERE has folders named like kohya's (10_sks dog), but also")
    );
}

#[test]
fn empty_captions_are_told_with_what_may_be_meant() {
    let empty = CaptionOptions { missing: Missing::Fill(String::new()), ..CaptionOptions::default() };
    let told = |files: &[(&str, &str)]| {
        let files: Vec<_> = [("a.png", ""), ("b.png", "")].into_iter().chain(files.iter().copied()).collect();
        let lines = remarks(&folder(&files), &empty);
        assert_eq!(lines.len(), 1, "{lines:?}");
        lines[0]
            .strip_prefix("warning: none of the 2 pictures in HERE has a caption: all have the empty one")
            .unwrap()
            .to_owned()
    };
    assert_eq!(told(&[]), "");
    for name in
        ["metadata1000.jsonl", "metadata.json", "captions.csv", "train.parquet", "prompts.xlsx", "in/Labels.tsv"]
    {
        let line = told(&[(name, "x")]);
        assert!(line.starts_with(&format!("; there is a HERE/{name}, which is not read: captions")), "{line}");
    }
    assert_eq!(told(&[("in/metadata.jsonl", "x")]), "; there is a metadata.jsonl in in: give that folder");
    assert_eq!(told(&[("a.tags", "x"), ("b.tags", "x")]), "; found 2 .tags; you asked for .txt or .caption");
    assert_eq!(told(&[("a.json", "{}"), ("b.json", "{}")]), "; found 2 .json; you asked for .txt or .caption");
    let line = remarks(&folder(&[("a.png", ""), ("a.png.txt", "x")]), &empty).join("\n");
    assert!(line.contains("; found 1 NAME.png.txt; you asked for .txt or .caption"), "{line}");
    // A kohya folder itself, or what is above the folder of such folders.
    let above = folder(&[("10_sks dog/a.png", "")]);
    let own = read_folder(&above.path().join("10_sks dog"), &empty).unwrap().remarks;
    assert!(own[0].ends_with("give the folder above it, and each has the caption \"sks dog\""), "{own:?}");
    let deeper = remarks(&folder(&[("img/10_sks dog/a.png", "")]), &empty);
    assert!(deeper[0].contains("; img/10_sks dog is named like kohya's folders"), "{deeper:?}");
    // Some of them: how many, and which.
    let some = remarks(&folder(&[("a.png", ""), ("a.txt", "x"), ("b.png", "")]), &empty);
    assert_eq!(some, ["warning: 1 of the 2 pictures in HERE have no caption and have the empty one: b.png"]);
}

#[test]
fn captions_of_twenty_thousand_pictures_are_matched_in_one_pass() {
    // In the square of their number this took more than a minute: the suite would show it.
    let folder = tempfile::tempdir().unwrap();
    let one = encoded(&picture(1, 1), ImageFormat::Png);
    for i in 0..20_000 {
        fs::write(folder.path().join(format!("{i:05}.png")), &one).unwrap();
        fs::write(folder.path().join(format!("{i:05}.txt")), "x").unwrap();
    }
    let read = read_folder(folder.path(), &CaptionOptions::default()).unwrap();
    assert!(read.samples.len() == 20_000 && read.remarks.is_empty());
    // And so are names that are all wrong, as after a folder was moved, and told in few lines.
    let row = |i: usize| serde_json::json!({"file_name": format!("old/{i:05}.png"), "text": "x"}).to_string();
    fs::write(folder.path().join("metadata.jsonl"), (0..20_000).map(row).collect::<Vec<_>>().join("\n")).unwrap();
    let Problems(lines) = read_folder(folder.path(), &CaptionOptions::default()).unwrap_err();
    assert_eq!(lines.len(), 20, "{lines:#?}");
    assert!(lines[19].ends_with("(and 19980 more of this kind)") && lines[0].contains("but `00000.png`"), "{lines:#?}");
}

#[test]
fn no_folder_and_no_pictures_are_told() {
    let empty = folder(&[("a.txt", "x")]);
    assert!(read_folder(empty.path(), &CaptionOptions::default()).unwrap_err().0[0].contains("holds no pictures"));
    let gone = read_folder(Path::new("no/such/folder"), &CaptionOptions::default()).unwrap_err();
    assert_eq!(gone.0, ["the folder of pictures no/such/folder does not exist"]);
}

#[test]
fn real_photographs_are_read() {
    let Some(folder) = shared("dreambooth") else { return };
    let all = read_folder(&folder.join("instance"), &CaptionOptions::default()).unwrap().samples;
    assert!(all.len() >= 20 && all.iter().all(|sample| sample.caption.len() > 5), "{}", all.len());
    let dogs: Vec<_> = all.into_iter().filter(|sample| sample.name.starts_with("dog/")).collect();
    assert_eq!(unreadable(&dogs), [""; 0]);
}

#[test]
fn the_sketchbook_is_whole_and_its_unseen_combinations_are_unseen() {
    let [train, validation] = ["train", "validation"].map(|part| own("datasets/sketchbook").join(part));
    let words = |folder: &Path| -> (usize, BTreeSet<String>, BTreeSet<Vec<String>>) {
        let Contents { samples, .. } = read_folder(folder, &CaptionOptions::default()).unwrap();
        let bag = |caption: &str| {
            let mut words: Vec<String> = caption.replace(',', "").split(' ').map(String::from).collect();
            words.sort();
            words
        };
        let bags: BTreeSet<_> = samples.iter().map(|sample| bag(&sample.caption)).collect();
        (samples.len(), bags.iter().flatten().cloned().collect(), bags)
    };
    let (count, vocabulary, combinations) = words(&train);
    assert_eq!(count, 2500);
    assert_eq!(combinations.len(), 2500, "a combination is there twice");
    assert!(vocabulary.len() < 100);
    let (count, more, kept_out) = words(&validation);
    assert_eq!(count, 96);
    assert!(more.is_subset(&vocabulary));
    assert_eq!(kept_out.difference(&combinations).count(), 48);
    assert_eq!(unreadable(&read_folder(&validation, &CaptionOptions::default()).unwrap().samples), [""; 0]);
    let fill = CaptionOptions { missing: Missing::Fill("a sks cat".into()), ..CaptionOptions::default() };
    let mascot = read_folder(&own("datasets/mascot"), &fill).unwrap().samples;
    assert_eq!(mascot.len(), 6);
    assert_eq!(unreadable(&mascot), [""; 0]);
}
