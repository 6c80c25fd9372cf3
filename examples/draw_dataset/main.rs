//! Draws the project's own pictures with their captions.
//!
//! ```text
//! cargo run --example draw_dataset -- datasets/sketchbook
//! cargo run --example draw_dataset -- --subjects datasets
//! cargo run --example draw_dataset -- --free runs/free --side 256
//! cargo run --example draw_dataset -- --scenes runs/scenes --side 256
//! cargo run --example draw_dataset -- --judged runs/judged
//! ```
//!
//! A picture of the sketchbook is one thing in one colour at one place, and its caption names all three: "a red apple
//! on a table". Of all combinations one in twenty is left out of the training part altogether: a model that draws
//! those has learnt the words, not the pictures. The validation part holds left-out combinations and, as many, known
//! ones drawn anew. Scenes say more, with one thing or two (`scenes.rs`). Subjects are certain animals and things at six
//! places each, without captions (`subjects.rs`). Free drawings are for the autoencoder (`free.rs`), all of
//! it together for a judge (`judged.rs`).
//!
//! Everything follows from the seed: the same program draws the same bytes.

mod free;
mod judged;
mod pen;
mod places;
mod scenes;
mod subjects;
mod things;

use anyhow::{Context, Result, bail, ensure};
use image::codecs::png::{CompressionType, FilterType, PngEncoder};
use image::{ExtendedColorType, ImageEncoder};
use pen::{Pen, Rgb};
use places::{PLACES, Place};
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use scenes::{LeftOut, Scene};
use serde_json::Value;
use std::fs;
use std::path::Path;
use subjects::{SUBJECTS, Subject};
use things::THINGS;
use tiny_skia::{Pixmap, Transform};

/// Width and height of a picture in px without `--side`.
const SIDE: u32 = 128;
const SEED: u64 = 2;
const TRAINING_PICTURES: usize = 2500;
/// Of each kind: combinations left out of training, and combinations that are in it.
const VALIDATION_PICTURES: usize = 48;
/// Of the free drawings: for training, and of each kind (known or held out) for validation.
const FREE_PICTURES: usize = 4000;
const FREE_VALIDATION_PICTURES: usize = 16;
const SCENES: usize = 6000;
/// Of each kind: scenes with what is left out of training, and scenes without.
const VALIDATION_SCENES: usize = 96;

const COLORS: &[(&str, Rgb)] = &[
    ("red", Rgb(226, 62, 62)),
    ("orange", Rgb(247, 144, 40)),
    ("yellow", Rgb(252, 218, 64)),
    ("green", Rgb(88, 182, 80)),
    ("blue", Rgb(58, 118, 220)),
    ("purple", Rgb(146, 84, 200)),
    ("pink", Rgb(250, 142, 186)),
    ("white", Rgb(248, 248, 250)),
    ("black", Rgb(64, 62, 72)),
];

/// One combination: positions in [`THINGS`], [`COLORS`] and [`PLACES`].
type Combination = (usize, usize, usize);

fn main() -> Result<()> {
    const USAGE: &str = "usage: draw_dataset [--subjects | --free | --scenes | --judged] FOLDER [--side PIXELS]";
    let mut arguments: Vec<String> = std::env::args().skip(1).collect();
    let mut side = SIDE;
    if let Some(at) = arguments.iter().position(|argument| argument == "--side") {
        let value = arguments.get(at + 1).context(USAGE)?;
        side = value
            .parse()
            .ok()
            .filter(|side| (16..=2048).contains(side))
            .with_context(|| format!("--side {value}: a picture is 16 to 2048 px wide and high"))?;
        arguments.drain(at..at + 2);
    }
    let mut rng = ChaCha8Rng::seed_from_u64(SEED);
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["--subjects", folder] => write_subjects(Path::new(folder), side),
        ["--scenes", folder] => write_scenes(Path::new(folder), side, &mut rng),
        ["--judged", folder] => judged::write(Path::new(folder), side, &mut rng),
        ["--free", folder] => write_free(Path::new(folder), side, &mut rng),
        [folder] if !folder.starts_with('-') => write_sketchbook(Path::new(folder), side, &mut rng),
        _ => bail!(USAGE),
    }
}

/// All of them, in order.
fn combinations() -> Vec<Combination> {
    let mut all = Vec::new();
    for thing in 0..THINGS.len() {
        for color in 0..COLORS.len() {
            all.extend((0..PLACES.len()).map(|place| (thing, color, place)));
        }
    }
    all
}

/// Draws the training and the validation part.
fn write_sketchbook(folder: &Path, side: u32, rng: &mut ChaCha8Rng) -> Result<()> {
    let mut all = combinations();
    all.shuffle(rng);
    let unseen = all.split_off(all.len() - all.len() / 20);
    all.truncate(TRAINING_PICTURES);
    ensure!(all.len() == TRAINING_PICTURES, "only {} combinations", all.len());

    let known = all.iter().take(VALIDATION_PICTURES).map(|&combination| (combination, false));
    let validation: Vec<_> =
        unseen.iter().take(VALIDATION_PICTURES).map(|&combination| (combination, true)).chain(known).collect();
    all.sort();
    let training: Vec<_> = all.into_iter().map(|combination| (combination, false)).collect();

    write_part(&folder.join("train"), &training, side, rng)?;
    write_part(&folder.join("validation"), &validation, side, rng)
}

/// Draws `combinations` (each with whether training never sees it) and writes `metadata.jsonl` beside them.
fn write_part(folder: &Path, combinations: &[(Combination, bool)], side: u32, rng: &mut ChaCha8Rng) -> Result<()> {
    write_folder(folder, combinations, |&((thing, color, place), unseen)| {
        let (thing, (color_name, color), place) = (&THINGS[thing], COLORS[color], &PLACES[place]);
        let picture = draw(place, thing.stands, side, rng, |pen| (thing.draw)(pen, color));
        let mut line = serde_json::json!({
            "text": caption(thing.name, color_name, place.phrase, rng),
            "thing": thing.name,
            "color": color_name,
            "place": place.phrase,
        });
        if unseen {
            line["unseen"] = true.into();
        }
        (picture, line)
    })
}

/// Draws a picture for each of `items` and writes what is said of it to `metadata.jsonl`.
fn write_folder<T>(folder: &Path, items: &[T], mut drawn: impl FnMut(&T) -> (Pixmap, Value)) -> Result<()> {
    fs::create_dir_all(folder).with_context(|| format!("cannot make the folder {}", folder.display()))?;
    let (mut lines, mut bytes) = (String::new(), 0);
    for (number, item) in items.iter().enumerate() {
        let (picture, said) = drawn(item);
        let name = format!("{number:04}.png");
        let png = compress(&picture)?;
        bytes += png.len();
        fs::write(folder.join(&name), png).with_context(|| format!("cannot write {name}"))?;
        let mut line = serde_json::json!({ "file_name": name });
        for (key, value) in said.as_object().into_iter().flatten() {
            line[key] = value.clone();
        }
        lines += &format!("{line}\n");
    }
    fs::write(folder.join("metadata.jsonl"), lines).context("cannot write metadata.jsonl")?;
    println!("{}: {} pictures, {:.1} MB", folder.display(), items.len(), bytes as f64 / 1e6);
    Ok(())
}

/// The caption, in one of three phrasings, the plain one half of the time.
fn caption(thing: &str, color: &str, place: &str, rng: &mut ChaCha8Rng) -> String {
    let article = if color.starts_with(['a', 'e', 'i', 'o', 'u']) { "an" } else { "a" };
    match rng.random_range(0..4) {
        0 => format!("{article} {color} {thing}, {place}"),
        1 => format!("{place}, {article} {color} {thing}"),
        _ => format!("{article} {color} {thing} {place}"),
    }
}

/// Draws each subject at its six places, and writes which places those are to `subjects.jsonl`.
fn write_subjects(folder: &Path, side: u32) -> Result<()> {
    let mut lines = String::new();
    for subject in SUBJECTS {
        write_subject(&folder.join(subject.name), subject, side)?;
        let (shown, left_out): (Vec<_>, Vec<_>) =
            PLACES.iter().enumerate().partition(|(place, _)| subject.places.contains(place));
        let phrases =
            |places: Vec<(usize, &Place)>| places.into_iter().map(|(_, place)| place.phrase).collect::<Vec<_>>();
        let line = serde_json::json!({
            "subject": subject.name,
            "class": subject.class,
            "places": phrases(shown),
            "places_left_out": phrases(left_out),
        });
        lines += &format!("{line}\n");
    }
    fs::write(folder.join("subjects.jsonl"), lines).context("cannot write subjects.jsonl")
}

fn write_subject(folder: &Path, subject: &Subject, side: u32) -> Result<()> {
    fs::create_dir_all(folder).with_context(|| format!("cannot make the folder {}", folder.display()))?;
    let mut rng = ChaCha8Rng::seed_from_u64(SEED);
    for (number, place) in subject.places.into_iter().map(|place| &PLACES[place]).enumerate() {
        let look = [-3.0, 3.0, 0.0][number % 3];
        let path = folder.join(format!("{number}.png"));
        fs::write(&path, compress(&draw(place, true, side, &mut rng, |pen| (subject.draw)(pen, look)))?)
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

/// Draws free pictures: those for training in turn of every kind, those for validation of the kinds held out too.
fn write_free(folder: &Path, side: u32, rng: &mut ChaCha8Rng) -> Result<()> {
    let training: Vec<_> = free::KINDS.iter().cycle().take(FREE_PICTURES).map(|kind| (kind, false)).collect();
    let once = free::KINDS
        .iter()
        .enumerate()
        .filter(|(index, kind)| free::KINDS[..*index].iter().all(|earlier| earlier.name != kind.name));
    let kinds = once.map(|(_, kind)| (kind, false)).chain(free::HELD_OUT.iter().map(|kind| (kind, true)));
    let validation: Vec<_> = kinds.flat_map(|kind| std::iter::repeat_n(kind, FREE_VALIDATION_PICTURES)).collect();
    for (part, kinds) in [("train", training), ("validation", validation)] {
        write_folder(&folder.join(part), &kinds, |&(kind, unseen)| {
            let mut line = serde_json::json!({ "text": kind.name, "kind": kind.name });
            if unseen {
                line["unseen"] = true.into();
            }
            (free::draw(kind, side, rng), line)
        })?;
    }
    Ok(())
}

/// Draws the training and the validation part of the scenes.
fn write_scenes(folder: &Path, side: u32, rng: &mut ChaCha8Rng) -> Result<()> {
    let left_out = LeftOut::draw(rng);
    let halves = [true, false].into_iter().flat_map(|unseen| std::iter::repeat_n(unseen, VALIDATION_SCENES));
    for (part, scenes) in [("train", vec![false; SCENES]), ("validation", halves.collect())] {
        write_folder(&folder.join(part), &scenes, |&unseen| {
            let scene = Scene::any(&left_out, unseen, rng);
            let picture = scene.picture(side, rng);
            let mut line = scene.labels();
            line["text"] = scene.caption(rng).into();
            if unseen {
                line["unseen"] = true.into();
            }
            (picture, line)
        })?;
    }
    Ok(())
}

/// A picture without anything yet.
fn blank(side: u32) -> Pixmap {
    Pixmap::new(side, side).expect("the size is not zero")
}

/// Drawings are 128 units wide and high, whatever the picture's size.
fn unit(side: u32) -> Transform {
    Transform::from_scale(side as f32 / 128.0, side as f32 / 128.0)
}

/// The picture: the place, the shadow of a thing that stands, the thing a little off the middle.
fn draw(place: &Place, stands: bool, side: u32, rng: &mut ChaCha8Rng, thing: impl FnOnce(&mut Pen)) -> Pixmap {
    let mut picture = blank(side);
    let unit = unit(side);
    (place.draw)(&mut Pen { picture: &mut picture, place: unit }, rng);
    let scale = 0.84 * rng.random_range(0.93..1.07);
    let (x, y) = (64.0 + rng.random_range(-4.0..4.0), 65.0 + rng.random_range(-3.0..3.0));
    let turn = rng.random_range(-3.5..3.5);
    let square = unit.pre_translate(x, y).pre_scale(scale, scale);
    let mut pen = Pen { picture: &mut picture, place: square };
    if let (true, Some(shadow)) = (stands, place.shadow) {
        places::shadow(&mut pen, shadow);
    }
    pen.place = square.pre_concat(Transform::from_rotate(turn));
    thing(&mut pen);
    picture
}

/// The picture as an RGB PNG. Channels are rounded to multiples of 4: no eye sees it, and the blended pixels along
/// edges, which take most of the bytes, repeat more often. Flat pictures are smallest unfiltered.
fn compress(picture: &Pixmap) -> Result<Vec<u8>> {
    let round = |channel: u8| (channel.saturating_add(2) & !3).min(252);
    let rgb: Vec<u8> =
        picture.data().chunks_exact(4).flat_map(|pixel| [pixel[0], pixel[1], pixel[2]].map(round)).collect();
    let mut png = Vec::new();
    PngEncoder::new_with_quality(&mut png, CompressionType::Best, FilterType::NoFilter).write_image(
        &rgb,
        picture.width(),
        picture.height(),
        ExtendedColorType::Rgb8,
    )?;
    Ok(png)
}
