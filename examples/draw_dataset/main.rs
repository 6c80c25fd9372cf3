//! Draws the project's own pictures with their captions.
//!
//! ```text
//! cargo run --example draw_dataset -- datasets/sketchbook
//! cargo run --example draw_dataset -- --mascot datasets/mascot
//! ```
//!
//! A picture is one thing in one colour at one place, 128x128 pixels, and its caption names all three: "a red apple
//! on a table". Of all combinations one in twenty is left out of the training part altogether: a model that draws
//! those has learnt the words, not the pictures. The validation part holds left-out combinations and, as many, known
//! ones drawn anew. The mascot is one certain cat at six places, without captions. Everything follows from the seed: the same program draws the same bytes.

mod mascot;
mod pen;
mod places;
mod things;

use anyhow::{Context, Result, bail, ensure};
use image::codecs::png::{CompressionType, FilterType, PngEncoder};
use image::{ExtendedColorType, ImageEncoder};
use pen::{Pen, Rgb};
use places::{PLACES, Place};
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::fs;
use std::path::Path;
use things::THINGS;
use tiny_skia::{Pixmap, Transform};

const SIDE: u32 = 128;
const SEED: u64 = 2;
const TRAINING_PICTURES: usize = 2500;
/// Of each kind: combinations left out of training, and combinations that are in it.
const VALIDATION_PICTURES: usize = 48;

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
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let mut rng = ChaCha8Rng::seed_from_u64(SEED);
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["--mascot", folder] => write_mascot(Path::new(folder), &mut rng),
        [folder] if !folder.starts_with('-') => write_sketchbook(Path::new(folder), &mut rng),
        _ => bail!("usage: draw_dataset [--mascot] FOLDER"),
    }
}

/// Draws the training and the validation part.
fn write_sketchbook(folder: &Path, rng: &mut ChaCha8Rng) -> Result<()> {
    let mut all: Vec<Combination> = Vec::new();
    for thing in 0..THINGS.len() {
        for color in 0..COLORS.len() {
            all.extend((0..PLACES.len()).map(|place| (thing, color, place)));
        }
    }
    all.shuffle(rng);
    let unseen = all.split_off(all.len() - all.len() / 20);
    all.truncate(TRAINING_PICTURES);
    ensure!(all.len() == TRAINING_PICTURES, "only {} combinations", all.len());

    let known = all.iter().take(VALIDATION_PICTURES).map(|&combination| (combination, false));
    let validation: Vec<_> =
        unseen.iter().take(VALIDATION_PICTURES).map(|&combination| (combination, true)).chain(known).collect();
    all.sort();
    let training: Vec<_> = all.into_iter().map(|combination| (combination, false)).collect();

    write_part(&folder.join("train"), &training, rng)?;
    write_part(&folder.join("validation"), &validation, rng)
}

/// Draws `combinations` (each with whether training never sees it) and writes `metadata.jsonl` beside them.
fn write_part(folder: &Path, combinations: &[(Combination, bool)], rng: &mut ChaCha8Rng) -> Result<()> {
    fs::create_dir_all(folder).with_context(|| format!("cannot make the folder {}", folder.display()))?;
    let (mut lines, mut bytes) = (String::new(), 0);
    for (number, &((thing, color, place), unseen)) in combinations.iter().enumerate() {
        let (thing, (color_name, color), place) = (&THINGS[thing], COLORS[color], &PLACES[place]);
        let name = format!("{number:04}.png");
        let png = compress(&draw(place, thing.stands, rng, |pen| (thing.draw)(pen, color)))?;
        bytes += png.len();
        fs::write(folder.join(&name), png).with_context(|| format!("cannot write {name}"))?;
        let mut line = serde_json::json!({
            "file_name": name,
            "text": caption(thing.name, color_name, place.phrase, rng),
            "thing": thing.name,
            "color": color_name,
            "place": place.phrase,
        });
        if unseen {
            line["unseen"] = true.into();
        }
        lines += &format!("{line}\n");
    }
    fs::write(folder.join("metadata.jsonl"), lines).context("cannot write metadata.jsonl")?;
    println!("{}: {} pictures, {:.1} MB", folder.display(), combinations.len(), bytes as f64 / 1e6);
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

/// Draws the mascot at six places.
fn write_mascot(folder: &Path, rng: &mut ChaCha8Rng) -> Result<()> {
    fs::create_dir_all(folder).with_context(|| format!("cannot make the folder {}", folder.display()))?;
    for (number, place) in [0, 1, 3, 4, 5, 8].into_iter().map(|place| &PLACES[place]).enumerate() {
        let look = [-3.0, 3.0, 0.0][number % 3];
        let path = folder.join(format!("{number}.png"));
        fs::write(&path, compress(&draw(place, true, rng, |pen| mascot::draw(pen, look)))?)
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

/// The picture: the place, the shadow of a thing that stands, the thing a little off the middle.
fn draw(place: &Place, stands: bool, rng: &mut ChaCha8Rng, thing: impl FnOnce(&mut Pen)) -> Pixmap {
    let mut picture = Pixmap::new(SIDE, SIDE).expect("the size is not zero");
    (place.draw)(&mut Pen { picture: &mut picture, place: Transform::identity() }, rng);
    let scale = 0.84 * rng.random_range(0.93..1.07);
    let (x, y) = (64.0 + rng.random_range(-4.0..4.0), 65.0 + rng.random_range(-3.0..3.0));
    let turn = rng.random_range(-3.5..3.5);
    let square = Transform::from_translate(x, y).pre_scale(scale, scale);
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
