//! Pictures for a judge: scenes, subjects, and others of the subjects' classes, which it has to tell apart. The label
//! `subject` says what is shown: a subject as prompts call it ("sks cat"), or else the thing.

use std::path::Path;

use anyhow::Result;
use rand::RngExt;
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};
use tiny_skia::Pixmap;

use crate::places::{PLACES, Place};
use crate::scenes::{LeftOut, Scene};
use crate::subjects::SUBJECTS;
use crate::things::THINGS;
use crate::{COLORS, caption, draw, write_folder};

const TRAINING_PICTURES: usize = 16_000;
const VALIDATION_PICTURES: usize = 1500;
/// How often a subject is shown, and how often another of its class.
const SUBJECT: f64 = 0.2;
const CLASS: f64 = 0.15;

/// Draws `folder/train` and `folder/validation`. Scenes of the second part have what is left out of the first; of subjects
/// and their classes all poses, sizes and colours are drawn by lot.
pub fn write(folder: &Path, side: u32, rng: &mut ChaCha8Rng) -> Result<()> {
    let left_out = LeftOut::draw(rng);
    for (part, unseen, count) in [("train", false, TRAINING_PICTURES), ("validation", true, VALIDATION_PICTURES)] {
        write_folder(&folder.join(part), &vec![unseen; count], |&unseen| {
            let which = rng.random_range(0.0..1.0);
            let (subject, place) =
                (&SUBJECTS[rng.random_range(0..SUBJECTS.len())], &PLACES[rng.random_range(0..PLACES.len())]);
            if which < SUBJECT {
                let look = rng.random_range(-4.0..4.0);
                let picture = draw(place, true, side, rng, |pen| (subject.draw)(pen, look));
                let name = format!("sks {}", subject.class);
                let line = json!({
                    "text": format!("a {name} {}", place.phrase), "thing": subject.class, "place": place.phrase,
                    "subject": name,
                });
                (picture, line)
            } else if which < SUBJECT + CLASS {
                of_class(subject.class, place, side, rng)
            } else {
                scene(&Scene::any(&left_out, unseen, rng), side, rng)
            }
        })?;
    }
    Ok(())
}

/// Any one of a class.
fn of_class(class: &str, place: &Place, side: u32, rng: &mut ChaCha8Rng) -> (Pixmap, Value) {
    let thing = THINGS.iter().find(|thing| thing.name == class).expect("a subject's class is a thing");
    let (color_name, color) = COLORS[rng.random_range(0..COLORS.len())];
    let picture = draw(place, thing.stands, side, rng, |pen| (thing.draw)(pen, color));
    let line = json!({
        "text": caption(thing.name, color_name, place.phrase, rng), "thing": thing.name, "color": color_name,
        "place": place.phrase, "subject": thing.name,
    });
    (picture, line)
}

fn scene(scene: &Scene, side: u32, rng: &mut ChaCha8Rng) -> (Pixmap, Value) {
    let picture = scene.picture(side, rng);
    let mut line = scene.labels();
    line["text"] = scene.caption(rng).into();
    match line["things"].as_array().map(Vec::len) {
        Some(1) => line["subject"] = line["thing"].clone(),
        // Of two things, neither is what the picture shows.
        _ => {
            ["thing", "color"].iter().for_each(|label| drop(line.as_object_mut().and_then(|line| line.remove(*label))))
        }
    }
    (picture, line)
}
