//! Scenes: one or two things of a size at a side of a place, and captions that name all of it.
//!
//! ```text
//! a small red apple on the left, on a table
//! a big blue boat and a yellow sun at sea            (the first is on the left)
//! a cat to the right of a green tree, on the grass
//! ```
//!
//! Two sorts of combinations are kept out of the training part: one in twenty of thing, colour and place, and one in
//! ten of two things beside each other.

use crate::pen::Pen;
use crate::places::{self, PLACES, Place};
use crate::things::THINGS;
use crate::{COLORS, Combination};
use rand::RngExt;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use tiny_skia::{Pixmap, Transform};

/// How large a thing is beside others of its kind.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Size {
    Plain,
    Big,
    Small,
}

/// Where a thing is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Side {
    Middle,
    Left,
    Right,
}

/// One thing in a scene.
#[derive(Clone, Copy, Debug)]
pub struct Part {
    thing: usize,
    color: usize,
    size: Size,
    side: Side,
}

/// A place with one thing, or with two, the left one first.
#[derive(Clone, Debug)]
pub struct Scene {
    place: usize,
    parts: Vec<Part>,
}

/// What the training part never shows.
pub struct LeftOut {
    combinations: BTreeSet<Combination>,
    /// Two things, the smaller number first.
    pairs: BTreeSet<(usize, usize)>,
}

impl LeftOut {
    pub fn draw(rng: &mut ChaCha8Rng) -> Self {
        let mut combinations = crate::combinations();
        combinations.shuffle(rng);
        combinations.truncate(combinations.len() / 20);
        let mut pairs: Vec<_> =
            (0..THINGS.len()).flat_map(|first| (first + 1..THINGS.len()).map(move |second| (first, second))).collect();
        pairs.shuffle(rng);
        pairs.truncate(pairs.len() / 10);
        Self { combinations: combinations.into_iter().collect(), pairs: pairs.into_iter().collect() }
    }

    fn holds(&self, scene: &Scene) -> bool {
        let pair = |first: usize, second: usize| (first.min(second), first.max(second));
        scene.parts.iter().any(|part| self.combinations.contains(&(part.thing, part.color, scene.place)))
            || matches!(scene.parts[..], [a, b] if self.pairs.contains(&pair(a.thing, b.thing)))
    }
}

impl Scene {
    /// Any scene for which left out is `unseen`.
    pub fn any(left_out: &LeftOut, unseen: bool, rng: &mut ChaCha8Rng) -> Self {
        loop {
            let scene = Self::draw_lots(rng);
            if left_out.holds(&scene) == unseen {
                return scene;
            }
        }
    }

    /// Half of all scenes have one thing as it is; of the others most have two.
    fn draw_lots(rng: &mut ChaCha8Rng) -> Self {
        let place = rng.random_range(0..PLACES.len());
        let any = |side, rng: &mut ChaCha8Rng| Part {
            thing: rng.random_range(0..THINGS.len()),
            color: rng.random_range(0..COLORS.len()),
            size: [Size::Plain, Size::Plain, Size::Big, Size::Small][rng.random_range(0..4)],
            side,
        };
        let parts = match rng.random_range(0..10) {
            0..5 => vec![Part { size: Size::Plain, ..any(Side::Middle, rng) }],
            5 => vec![any(Side::Middle, rng)],
            6 => vec![any([Side::Left, Side::Right][rng.random_range(0..2)], rng)],
            _ => {
                let left = any(Side::Left, rng);
                let mut right = any(Side::Right, rng);
                while right.thing == left.thing {
                    right.thing = rng.random_range(0..THINGS.len());
                }
                vec![left, right]
            }
        };
        Self { place, parts }
    }

    /// The caption, in one of several phrasings.
    pub fn caption(&self, rng: &mut ChaCha8Rng) -> String {
        let place = PLACES[self.place].phrase;
        let names: Vec<String> = self.parts.iter().map(Part::name).collect();
        match (&names[..], self.parts[0].side) {
            ([left, right], _) => match rng.random_range(0..4) {
                0 => format!("{left} to the left of {right}, {place}"),
                1 => format!("{right} to the right of {left}, {place}"),
                2 => format!("{place}, {left} and {right}"),
                _ => format!("{left} and {right} {place}"),
            },
            ([name, ..], Side::Middle) => match rng.random_range(0..4) {
                0 => format!("{name}, {place}"),
                1 => format!("{place}, {name}"),
                _ => format!("{name} {place}"),
            },
            ([name, ..], side) => match rng.random_range(0..2) {
                0 => format!("{name} on the {}, {place}", side.name()),
                _ => format!("{place}, {name} on the {}", side.name()),
            },
            ([], _) => unreachable!("a scene has a thing"),
        }
    }

    /// What the scene shows, for a judge: of the first thing as in the sketchbook, then of all.
    pub fn labels(&self) -> Value {
        let all: Vec<Value> = self
            .parts
            .iter()
            .map(|part| {
                let mut label = json!({ "thing": THINGS[part.thing].name, "color": COLORS[part.color].0 });
                if part.size != Size::Plain {
                    label["size"] = part.size.name().into();
                }
                if part.side != Side::Middle {
                    label["side"] = part.side.name().into();
                }
                label
            })
            .collect();
        json!({
            "thing": all[0]["thing"],
            "color": all[0]["color"],
            "place": PLACES[self.place].phrase,
            "things": all,
        })
    }

    pub fn picture(&self, side: u32, rng: &mut ChaCha8Rng) -> Pixmap {
        let place = &PLACES[self.place];
        let mut picture = crate::blank(side);
        let unit = crate::unit(side);
        (place.draw)(&mut Pen { picture: &mut picture, place: unit }, rng);
        for part in &self.parts {
            part.draw(&mut Pen { picture: &mut picture, place: unit }, place, self.parts.len() > 1, rng);
        }
        picture
    }
}

impl Part {
    /// "a big red apple"
    fn name(&self) -> String {
        let words = format!("{}{} {}", self.size.word(), COLORS[self.color].0, THINGS[self.thing].name);
        format!("{} {words}", if words.starts_with(['a', 'e', 'i', 'o', 'u']) { "an" } else { "a" })
    }

    /// Draws the thing into its half of the picture, or into the middle.
    fn draw(&self, pen: &mut Pen, place: &Place, beside: bool, rng: &mut ChaCha8Rng) {
        let (middle, plain) = match self.side {
            Side::Middle => (64.0, 0.84),
            Side::Left => (if beside { 33.0 } else { 40.0 }, 0.52),
            Side::Right => (if beside { 95.0 } else { 88.0 }, 0.52),
        };
        let grown = match (self.size, self.side) {
            (Size::Plain, _) => 1.0,
            // A thing in the middle has room for less, one at a side for no more than its half.
            (Size::Big, Side::Middle) => 1.27,
            (Size::Big, _) => 1.18,
            (Size::Small, _) => 0.6,
        };
        let scale: f32 = plain * grown * rng.random_range(0.95..1.05);
        // What stands, stands on the same ground whatever its size.
        let lift = if THINGS[self.thing].stands { 46.0 * (0.84 - scale.min(1.0)) } else { 0.0 };
        let (x, y) = (middle + rng.random_range(-3.0..3.0), 64.0 + lift + rng.random_range(-2.0..2.0));
        let turn = rng.random_range(-3.5..3.5);
        let square = pen.place.pre_translate(x, y).pre_scale(scale, scale);
        pen.place = square;
        if let (true, Some(shadow)) = (THINGS[self.thing].stands, place.shadow) {
            places::shadow(pen, shadow);
        }
        pen.place = square.pre_concat(Transform::from_rotate(turn));
        (THINGS[self.thing].draw)(pen, COLORS[self.color].1);
    }
}

impl Size {
    fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Big => "big",
            Self::Small => "small",
        }
    }

    /// As it stands in a caption, with the space after it.
    fn word(self) -> &'static str {
        match self {
            Self::Plain => "",
            Self::Big => "big ",
            Self::Small => "small ",
        }
    }
}

impl Side {
    fn name(self) -> &'static str {
        match self {
            Self::Middle => "middle",
            Self::Left => "left",
            Self::Right => "right",
        }
    }
}
