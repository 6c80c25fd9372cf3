//! Pictures and captions: on folders made here, on Pillow's results (`tests/oracle/pictures.py`), on the
//! project's own pictures, and on real edge cases and photographs where those are at hand.

mod common;

use std::collections::BTreeSet;
use std::fs;
use std::io::Cursor;
use std::path::{Path, PathBuf};

use common::shared;
use image::{ImageFormat, RgbImage};
use palettist::data::picture::{decode_picture, read_picture};
use palettist::data::{
    CaptionOptions, Crop, Filter, Missing, Problems, Transform, check_pictures, dreambooth, load_picture, read_folder,
};
use tch::{Kind, Tensor};

fn own(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// A small picture that no filter flattens.
fn picture(width: u32, height: u32) -> RgbImage {
    RgbImage::from_fn(width, height, |x, y| image::Rgb([(x * 9) as u8, (y * 13) as u8, (x * y * 5) as u8]))
}

fn encoded(picture: &RgbImage, format: ImageFormat) -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    picture.write_to(&mut bytes, format).unwrap();
    bytes.into_inner()
}

/// A folder with these files; those named as pictures are pictures.
fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, text) in files {
        let path = folder.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        match ImageFormat::from_path(name) {
            Ok(format) if text.is_empty() => fs::write(path, encoded(&picture(20, 16), format)).unwrap(),
            _ => fs::write(path, text).unwrap(),
        }
    }
    folder
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
    let samples = read_folder(folder.path(), options).unwrap();
    let short = |path: &Path| path.strip_prefix(folder.path()).unwrap().to_string_lossy().into_owned();
    samples.into_iter().map(|sample| (short(&sample.path), sample.caption)).collect()
}

fn pairs(expected: &[(&str, &str)]) -> Vec<(String, String)> {
    expected.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect()
}

// ---- pictures ----

#[test]
fn resize_and_crop_are_pillows_to_the_bit() {
    for name in ["wide", "tall"] {
        let source = own(&format!("tests/fixtures/pictures/{name}.png"));
        for (filter, filter_name) in [(Filter::Bilinear, "bilinear"), (Filter::Lanczos, "lanczos")] {
            for size in [16, 24, 37, 48] {
                let transform = Transform { filter, ..Transform::center(size, size) };
                let expected = own(&format!("tests/fixtures/pictures/{name}_{filter_name}_{size}.png"));
                let expected = read_picture(&expected).unwrap();
                assert_eq!(transform.apply(&read_picture(&source).unwrap()), expected, "{name} {filter_name} {size}");
            }
        }
    }
}

#[test]
fn a_tensor_is_planes_from_minus_one_to_one() {
    let folder = folder(&[]);
    let path = folder.path().join("a.png");
    let mut picture = RgbImage::new(2, 1);
    picture.put_pixel(0, 0, image::Rgb([0, 255, 51]));
    picture.put_pixel(1, 0, image::Rgb([255, 0, 204]));
    picture.save(&path).unwrap();
    let tensor = load_picture(&path, &Transform::center(2, 1)).unwrap();
    assert_eq!((tensor.kind(), tensor.size()), (Kind::Float, vec![3, 1, 2]));
    let expected = Tensor::from_slice(&[-1.0f32, 1.0, 1.0, -1.0, -0.6, 0.6]).view([3, 1, 2]);
    assert!((tensor - expected).abs().max().double_value(&[]) < 1e-6);
}

#[test]
fn crops_and_flips_take_the_part_they_name() {
    let source = picture(30, 10);
    let column = |transform: Transform, x| transform.apply(&source).get_pixel(x, 5)[0];
    let transform = Transform::center(10, 10);
    assert_eq!(column(transform, 0), 10 * 9);
    assert_eq!(column(Transform { crop: Crop::At(0.0, 0.0), ..transform }, 0), 0);
    assert_eq!(column(Transform { crop: Crop::At(0.9999, 0.5), ..transform }, 0), 20 * 9);
    assert_eq!(column(Transform { flip: true, ..transform }, 9), 10 * 9);
    // Not square: as much as possible of the picture, in the asked shape.
    let wide = Transform::center(20, 5).apply(&source);
    assert_eq!((wide.width(), wide.height()), (20, 5));
}

#[test]
fn every_format_is_read_by_its_content() {
    let source = picture(33, 21);
    for format in [ImageFormat::Png, ImageFormat::Bmp, ImageFormat::WebP] {
        assert_eq!(decode_picture(&encoded(&source, format)).unwrap(), source, "{format:?}");
    }
    let folder = folder(&[]);
    let misnamed = folder.path().join("really_a_png.jpg");
    fs::write(&misnamed, encoded(&source, ImageFormat::Png)).unwrap();
    assert_eq!(read_picture(&misnamed).unwrap(), source);
}

#[test]
fn transparent_is_white() {
    let mut source = image::RgbaImage::from_pixel(3, 1, image::Rgba([200, 100, 0, 255]));
    source.get_pixel_mut(1, 0)[3] = 0;
    source.get_pixel_mut(2, 0)[3] = 51;
    let mut bytes = Cursor::new(Vec::new());
    source.write_to(&mut bytes, ImageFormat::Png).unwrap();
    let read = decode_picture(&bytes.into_inner()).unwrap();
    let pixels: Vec<[u8; 3]> = read.pixels().map(|pixel| pixel.0).collect();
    assert_eq!(pixels, [[200, 100, 0], [255, 255, 255], [244, 224, 204]]);
}

#[test]
fn exif_orientation_is_applied() {
    let jpeg = encoded(&picture(32, 16), ImageFormat::Jpeg);
    // An APP1 segment right after the start marker: big-endian TIFF, one entry, orientation 6 (turn clockwise).
    let exif = b"Exif\0\0MM\0\x2a\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0";
    let length = (exif.len() as u16 + 2).to_be_bytes();
    let turned = [&jpeg[..2], &[0xff, 0xe1], &length, exif, &jpeg[2..]].concat();
    let upright = decode_picture(&jpeg).unwrap();
    assert_eq!(decode_picture(&turned).unwrap(), image::imageops::rotate90(&upright));
}

#[test]
fn truncated_pictures_are_refused_wherever_they_stop() {
    let source = picture(64, 48);
    for format in [ImageFormat::Png, ImageFormat::Jpeg, ImageFormat::Bmp, ImageFormat::WebP] {
        let whole = encoded(&source, format);
        decode_picture(&whole).unwrap();
        for part in (0..20).map(|twentieth| whole.len() * twentieth / 20).chain([whole.len() - 40]) {
            assert!(decode_picture(&whole[..part]).is_err(), "{format:?} cut to {part} of {}", whole.len());
        }
    }
}

#[test]
fn unreadable_pictures_are_named_all_of_them() {
    let folder = folder(&[("a.png", ""), ("b.png", "not a picture"), ("c.png", ""), ("gone.png", "")]);
    let whole = fs::read(folder.path().join("c.png")).unwrap();
    fs::write(folder.path().join("c.png"), &whole[..whole.len() / 2]).unwrap();
    fs::write(folder.path().join("d.jpg"), b"GIF89a\x01\0\x01\0\0\0\0;").unwrap();
    let options = CaptionOptions { missing: Missing::Fill("a thing".into()), ..CaptionOptions::default() };
    let samples = read_folder(folder.path(), &options).unwrap();
    fs::remove_file(folder.path().join("gone.png")).unwrap();
    let Problems(lines) = check_pictures(&samples).unwrap_err();
    assert_eq!(lines.len(), 4, "{lines:#?}");
    for (line, (name, why)) in lines.iter().zip([
        ("b.png", "its content is not that of a picture"),
        ("c.png", "damaged or truncated"),
        ("d.jpg", "convert it to PNG or JPEG"),
        ("gone.png", "cannot read the picture"),
    ]) {
        assert!(line.contains(name) && line.contains(why) && !line.contains('\n'), "{line}");
    }
}

/// Sizes and channel means by Pillow (`tests/oracle/pictures.py FOLDER`); decoders differ by a fraction of a level.
const EDGE_CASES: &[(&str, (u32, u32), [f64; 3])] = &[
    ("cmyk.jpg", (320, 320), [122.3, 123.7, 116.1]),
    ("exif_orientation3.jpg", (720, 405), [136.9, 129.5, 107.1]),
    ("exif_orientation6_shows_landscape.jpg", (720, 405), [136.9, 129.5, 107.1]),
    ("fluent_fox_original_rgba_256.png", (256, 256), [241.7, 196.9, 171.0]),
    ("gray16.png", (256, 256), [122.4, 122.4, 122.4]),
    ("gray8.jpg", (320, 320), [122.4, 122.4, 122.4]),
    ("landscape_720x405.jpg", (720, 405), [136.9, 129.5, 107.1]),
    ("lossless.webp", (160, 160), [122.3, 123.7, 116.1]),
    ("lossy.webp", (320, 320), [122.3, 123.8, 116.2]),
    ("mpo_two_pictures_512.jpg", (512, 512), [117.5, 160.4, 148.3]),
    ("noto_fox_original_rgba.png", (128, 128), [240.8, 191.2, 162.8]),
    ("original_icc_srgb_615.jpg", (615, 615), [101.6, 108.3, 92.6]),
    ("photo.bmp", (256, 256), [122.3, 123.7, 116.1]),
    ("portrait_360x720.png", (360, 720), [131.7, 128.0, 107.1]),
    ("progressive.jpg", (320, 320), [122.3, 123.6, 116.2]),
    ("subsampling444.jpg", (320, 320), [122.3, 123.6, 116.1]),
    ("tiny_17x13.png", (17, 13), [122.0, 123.3, 115.9]),
];

#[test]
fn real_edge_cases_are_what_pillow_sees() {
    let Some(folder) = shared("loader_edge_cases") else { return };
    for (name, size, means) in EDGE_CASES {
        let read = read_picture(&folder.join(name)).unwrap();
        assert_eq!((read.width(), read.height()), *size, "{name}");
        for (channel, mean) in means.iter().enumerate() {
            let sum: f64 = read.pixels().map(|pixel| f64::from(pixel[channel])).sum();
            let own = sum / f64::from(read.width() * read.height());
            assert!((own - mean).abs() < 0.4, "{name} channel {channel}: {own:.2}, Pillow {mean}");
        }
        let tensor = load_picture(&folder.join(name), &Transform::center(64, 64)).unwrap();
        assert_eq!(tensor.size(), [3, 64, 64], "{name}");
    }
    // The same scene stored upright, on its side and upside down: the means alone would not tell.
    let [upright, side, down] =
        ["landscape_720x405.jpg", "exif_orientation6_shows_landscape.jpg", "exif_orientation3.jpg"]
            .map(|name| load_picture(&folder.join(name), &Transform::center(64, 64)).unwrap());
    for turned in [side, down] {
        assert!((&upright - turned).abs().mean(Kind::Float).double_value(&[]) < 0.02);
    }
    for name in ["truncated.jpg", "not_an_image.png"] {
        let message = format!("{:#}", read_picture(&folder.join(name)).unwrap_err());
        assert!(message.contains(name) && !message.contains('\n'), "{message}");
    }
}

// ---- captions ----

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
            "b.png has no caption: metadata.jsonl does not name it",
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
fn no_folder_and_no_pictures_are_told() {
    let empty = folder(&[("a.txt", "x")]);
    assert!(read_folder(empty.path(), &CaptionOptions::default()).unwrap_err().0[0].contains("holds no pictures"));
    let gone = read_folder(Path::new("no/such/folder"), &CaptionOptions::default()).unwrap_err();
    assert_eq!(gone.0, ["the folder of pictures no/such/folder does not exist"]);
}

#[test]
fn dreambooth_takes_its_captions_from_the_prompts() {
    let (instance, class) = (folder(&[("1.png", ""), ("1.txt", "not read")]), folder(&[("x.png", ""), ("y.png", "")]));
    let read = dreambooth(instance.path(), "a sks toy", Some(class.path()), "a toy").unwrap();
    assert_eq!(
        read.instance.iter().map(|s| (s.caption.as_str(), s.is_class)).collect::<Vec<_>>(),
        [("a sks toy", false)]
    );
    assert_eq!(read.class.iter().map(|s| (s.caption.as_str(), s.is_class)).collect::<Vec<_>>(), [("a toy", true); 2]);
    // The trainer draws the class where it is not there yet; without a subject there is nothing to train.
    let later = class.path().join("later");
    assert!(dreambooth(instance.path(), "a", Some(&later), "b").unwrap().class.is_empty());
    assert!(dreambooth(&later, "a", Some(class.path()), "b").is_err());
}

#[test]
fn real_photographs_are_read() {
    let Some(folder) = shared("dreambooth") else { return };
    let all = read_folder(&folder.join("instance"), &CaptionOptions::default()).unwrap();
    assert!(all.len() >= 20 && all.iter().all(|sample| sample.caption.len() > 5), "{}", all.len());
    let read = dreambooth(&folder.join("instance/dog"), "a photo of sks dog", Some(&folder.join("class_dog")), "a dog");
    let read = read.unwrap();
    assert_eq!((read.instance.len(), read.class.len()), (5, 22));
    check_pictures(&read.instance).unwrap();
}

#[test]
fn the_sketchbook_is_whole_and_its_unseen_combinations_are_unseen() {
    let [train, validation] = ["train", "validation"].map(|part| own("datasets/sketchbook").join(part));
    let words = |folder: &Path| -> (usize, BTreeSet<String>, BTreeSet<Vec<String>>) {
        let samples = read_folder(folder, &CaptionOptions::default()).unwrap();
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
    check_pictures(&read_folder(&validation, &CaptionOptions::default()).unwrap()).unwrap();
    let mascot = dreambooth(&own("datasets/mascot"), "a sks cat", None, "a cat").unwrap();
    assert_eq!(mascot.instance.len(), 6);
    check_pictures(&mascot.instance).unwrap();
}
