//! The places: backgrounds in picture coordinates, paler than the things that stand in front of them.

use crate::pen::{Pen, Rgb, WHITE, circle, ellipse, rect, star, svg};
use rand::RngExt;
use rand_chacha::ChaCha8Rng;

/// One nameable place.
pub struct Place {
    /// As it stands in a caption: "on a table".
    pub phrase: &'static str,
    pub draw: fn(&mut Pen, &mut ChaCha8Rng),
    /// The shadow that things throw on its ground; none where there is no ground.
    pub shadow: Option<Rgb>,
}

pub const PLACES: &[Place] = &[
    Place { phrase: "on paper", draw: paper, shadow: Some(Rgb(226, 221, 208)) },
    Place { phrase: "on a table", draw: table, shadow: Some(Rgb(158, 108, 72)) },
    Place { phrase: "in the snow", draw: snow, shadow: Some(Rgb(194, 212, 232)) },
    Place { phrase: "on the grass", draw: grass, shadow: Some(Rgb(104, 168, 86)) },
    Place { phrase: "at night", draw: night, shadow: Some(Rgb(34, 42, 84)) },
    Place { phrase: "at the beach", draw: beach, shadow: Some(Rgb(214, 182, 128)) },
    Place { phrase: "at sea", draw: sea, shadow: None },
    Place { phrase: "in the desert", draw: desert, shadow: Some(Rgb(200, 124, 72)) },
    Place { phrase: "in the forest", draw: forest, shadow: Some(Rgb(66, 104, 70)) },
];

/// The side of a picture.
const S: f32 = 128.0;

fn jitter(rng: &mut ChaCha8Rng, by: f32) -> f32 {
    rng.random_range(-by..by)
}

fn paper(pen: &mut Pen, _rng: &mut ChaCha8Rng) {
    pen.flat(&rect(0.0, 0.0, S, S), Rgb(252, 249, 240));
}

fn table(pen: &mut Pen, rng: &mut ChaCha8Rng) {
    pen.flat(&rect(0.0, 0.0, S, S), Rgb(244, 226, 200));
    let top = 86.0 + jitter(rng, 2.0);
    pen.flat(&rect(0.0, top, S, S), Rgb(190, 136, 92));
    pen.flat(&rect(0.0, top, S, top + 3.0), Rgb(216, 166, 120));
    pen.flat(&rect(0.0, 119.0, S, S), Rgb(140, 94, 62));
}

fn snow(pen: &mut Pen, rng: &mut ChaCha8Rng) {
    pen.flat(&rect(0.0, 0.0, S, S), Rgb(182, 208, 232));
    let top = 84.0 + jitter(rng, 2.0);
    pen.flat(
        &svg(&format!(
            "M0 {} Q40 {} 80 {} Q110 {} 128 {} L128 128 L0 128 Z",
            top,
            top - 10.0,
            top,
            top + 5.0,
            top - 4.0
        )),
        Rgb(240, 246, 252),
    );
    // Flakes on a loose grid, so that they never clump.
    for row in 0..5 {
        for column in 0..5 {
            let x = 14.0 + 25.0 * column as f32 + if row % 2 == 0 { 0.0 } else { 12.0 } + jitter(rng, 4.0);
            let y = 8.0 + 15.0 * row as f32 + jitter(rng, 3.0);
            pen.flat(&circle(x, y, 2.2), WHITE);
        }
    }
}

fn grass(pen: &mut Pen, rng: &mut ChaCha8Rng) {
    pen.flat(&rect(0.0, 0.0, S, S), Rgb(196, 230, 248));
    let top = 84.0 + jitter(rng, 2.0);
    pen.flat(&svg(&format!("M0 {} Q64 {} 128 {} L128 128 L0 128 Z", top, top - 9.0, top)), Rgb(142, 204, 108));
    for blade in 0..8 {
        let (x, y) = (8.0 + 16.0 * blade as f32 + jitter(rng, 3.0), 116.0 + if blade % 2 == 0 { 0.0 } else { 7.0 });
        pen.line(&svg(&format!("M{} {} L{x} {y} L{} {}", x - 3.0, y - 5.0, x + 3.0, y - 5.0)), Rgb(104, 172, 84), 1.8);
    }
}

fn night(pen: &mut Pen, rng: &mut ChaCha8Rng) {
    pen.flat(&rect(0.0, 0.0, S, S), Rgb(58, 74, 138));
    let top = 98.0 + jitter(rng, 2.0);
    pen.flat(&svg(&format!("M0 {} Q50 {} 128 {} L128 128 L0 128 Z", top, top - 8.0, top + 3.0)), Rgb(42, 52, 100));
    for (x, y) in [
        (12.0, 14.0),
        (36.0, 8.0),
        (64.0, 10.0),
        (92.0, 8.0),
        (116.0, 18.0),
        (10.0, 46.0),
        (118.0, 52.0),
        (9.0, 78.0),
        (119.0, 84.0),
    ] {
        pen.flat(&star(x + jitter(rng, 3.0), y + jitter(rng, 3.0), 1.6, 4.2, 4), Rgb(255, 236, 160));
    }
}

fn beach(pen: &mut Pen, rng: &mut ChaCha8Rng) {
    pen.flat(&rect(0.0, 0.0, S, S), Rgb(206, 236, 248));
    let shore = 84.0 + jitter(rng, 2.0);
    pen.flat(&rect(0.0, shore - 22.0, S, S), Rgb(92, 186, 212));
    pen.flat(
        &svg(&format!(
            "M0 {} Q32 {} 64 {} Q96 {} 128 {} L128 128 L0 128 Z",
            shore - 3.0,
            shore - 8.0,
            shore - 3.0,
            shore + 2.0,
            shore - 3.0
        )),
        WHITE,
    );
    pen.flat(
        &svg(&format!("M0 {shore} Q32 {} 64 {shore} Q96 {} 128 {shore} L128 128 L0 128 Z", shore - 5.0, shore + 5.0)),
        Rgb(244, 218, 164),
    );
}

fn sea(pen: &mut Pen, rng: &mut ChaCha8Rng) {
    pen.flat(&rect(0.0, 0.0, S, S), Rgb(220, 240, 246));
    let shift = jitter(rng, 4.0);
    for (row, color) in [Rgb(122, 182, 226), Rgb(92, 156, 212), Rgb(66, 130, 194)].into_iter().enumerate() {
        let y = 72.0 + 18.0 * row as f32;
        let mut wave = format!("M-40 128 L-40 {y}");
        for crest in 0..7 {
            let x = -40.0 + 32.0 * crest as f32 + shift * if row % 2 == 0 { 1.0 } else { -1.0 } + 8.0 * row as f32;
            wave += &format!(" L{x} {y} Q{} {} {} {y}", x + 16.0, y + 14.0, x + 32.0);
        }
        pen.flat(&svg(&format!("{wave} L200 128 Z")), color);
    }
}

fn desert(pen: &mut Pen, rng: &mut ChaCha8Rng) {
    pen.flat(&rect(0.0, 0.0, S, S), Rgb(254, 226, 170));
    pen.flat(&circle(106.0 + jitter(rng, 3.0), 20.0, 11.0), Rgb(255, 246, 214));
    let top = 78.0 + jitter(rng, 2.0);
    pen.flat(
        &svg(&format!(
            "M0 {} Q30 {} 70 {} Q100 {} 128 {} L128 128 L0 128 Z",
            top,
            top - 16.0,
            top,
            top - 12.0,
            top - 4.0
        )),
        Rgb(240, 178, 112),
    );
    pen.flat(
        &svg(&format!("M0 {} Q50 {} 128 {} L128 128 L0 128 Z", top + 20.0, top + 2.0, top + 22.0)),
        Rgb(228, 154, 92),
    );
}

fn forest(pen: &mut Pen, rng: &mut ChaCha8Rng) {
    pen.flat(&rect(0.0, 0.0, S, S), Rgb(168, 204, 164));
    for (row, (color, count)) in [(Rgb(126, 174, 128), 5), (Rgb(92, 146, 100), 4)].into_iter().enumerate() {
        for tree in 0..count {
            let x = (tree as f32 + 0.5 * row as f32) * S / (count - 1) as f32 + jitter(rng, 3.0);
            let y = 92.0;
            let top = 12.0 + 14.0 * row as f32 + jitter(rng, 4.0);
            pen.flat(&svg(&format!("M{x} {top} L{} {y} L{} {y} Z", x + 17.0, x - 17.0)), color);
        }
    }
    pen.flat(&svg("M0 90 Q64 82 128 90 L128 128 L0 128 Z"), Rgb(92, 136, 84));
}

/// The shadow under a thing that stands: an ellipse around its foot.
pub fn shadow(pen: &mut Pen, color: Rgb) {
    pen.flat(&ellipse(2.0, 47.0, 40.0, 7.0), color);
}
