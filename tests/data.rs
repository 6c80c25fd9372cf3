//! Pictures: made here, Pillow's results (`tests/oracle/pictures.py`), and real edge cases where those are at hand.

mod common;

use std::fs;
use std::io::Cursor;
use std::path::{Path, PathBuf};

use common::pictures::{encoded, folder, picture, unreadable};
use common::shared;
use image::{ImageFormat, RgbImage};
use palettist::data::picture::{decode_picture, is_animated, read_picture};
use palettist::data::{CaptionOptions, Contents, Crop, Filter, Missing, Transform, load_picture, read_folder};
use tch::{Kind, Tensor};

fn own(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

#[test]
fn resize_and_crop_are_pillows_to_the_bit() {
    for name in ["wide", "tall"] {
        let source = own(&format!("tests/fixtures/pictures/{name}.png"));
        for (filter, filter_name) in
            [(Filter::Bilinear, "bilinear"), (Filter::Bicubic, "bicubic"), (Filter::Lanczos, "lanczos")]
        {
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
    let Contents { samples, .. } = read_folder(folder.path(), &options).unwrap();
    fs::remove_file(folder.path().join("gone.png")).unwrap();
    let lines = unreadable(&samples);
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

#[test]
fn extreme_shapes_are_refused_by_their_header() {
    let refused = |bytes: &[u8]| format!("{:#}", decode_picture(bytes).unwrap_err());
    for (width, height) in [(20_000, 1), (1, 20_000), (3000, 100), (7, 1000)] {
        let line = refused(&encoded(&RgbImage::new(width, height), ImageFormat::Png));
        assert!(
            line.starts_with(&format!("the picture is {width} x {height} px: one side is more than 20 times")),
            "{line}"
        );
    }
    decode_picture(&encoded(&RgbImage::new(1900, 100), ImageFormat::Png)).unwrap();
    // The header of a PNG says how large it is; behind it there may be next to nothing.
    let mut bomb = encoded(&picture(9, 9), ImageFormat::Png);
    for (at, side) in [(16, 60_000u32), (20, 60_000)] {
        bomb[at..at + 4].copy_from_slice(&side.to_be_bytes());
    }
    let mut checksum = flate2::Crc::new();
    checksum.update(&bomb[12..29]);
    bomb[29..33].copy_from_slice(&checksum.sum().to_be_bytes());
    assert!(
        refused(&bomb).starts_with("the picture is 60000 x 60000 px, more than 256 million pixels"),
        "{}",
        refused(&bomb)
    );
}

#[test]
fn what_comes_under_a_pictures_name_is_named() {
    for (bytes, what) in [
        (&b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"[..], "a Git LFS pointer"),
        (b"\n <!DOCTYPE html><html>", "a web page (HTML)"),
        (b"<HTML><head>", "a web page (HTML)"),
        (b"\xef\xbb\xbf<?xml version=\"1.0\"?>\n<svg xmlns", "an SVG file"),
        (b"<?xml version=\"1.0\"?><Error><Code>AccessDenied", "an XML file"),
        (b"{\"error\": \"not found\"}", "a JSON file"),
        (b"%PDF-1.4", "a PDF file"),
        (b"PK\x03\x04____", "a ZIP file"),
        (b"\0\0\0\x18ftypheic\0\0", "a HEIC file"),
        (b"\0\0\0\x18ftypavif\0\0", "an AVIF file"),
        (b"\0\0\0\x18ftypisom\0\0", "a video"),
        (b"\xff\x0a\xfa\x7f", "a JPEG XL file"),
    ] {
        let line = format!("{:#}", decode_picture(bytes).unwrap_err());
        assert!(line.starts_with(&format!("it is {what}")), "{line}");
    }
}

#[test]
fn what_moves_is_known_and_its_first_picture_read() {
    let still = encoded(&picture(9, 9), ImageFormat::Png);
    assert!(!is_animated(&still) && !is_animated(&encoded(&picture(9, 9), ImageFormat::WebP)));
    // The control chunk of an animated PNG: one frame, shown for ever (APNG specification).
    let data = [&b"acTL"[..], &[0, 0, 0, 1, 0, 0, 0, 0]].concat();
    let mut checksum = flate2::Crc::new();
    checksum.update(&data);
    let chunk = [&8u32.to_be_bytes()[..], &data, &checksum.sum().to_be_bytes()].concat();
    let moving = [&still[..33], &chunk, &still[33..]].concat();
    assert!(is_animated(&moving));
    // The extended header of an animated WebP: the second bit of its flags.
    assert!(is_animated(b"RIFF\x20\0\0\0WEBPVP8X\x0a\0\0\0\x02\0\0\0"));
    for cut in 0..40 {
        is_animated(&moving[..cut]);
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
