//! Free drawings, for an autoencoder that is to hold any flat drawing: shapes, lines, patterns, gradients, faces and
//! the sketchbook's things, in all hues and grays and at many sizes.
//!
//! Six kinds of drawings are only ever in the validation part ([`HELD_OUT`]): an autoencoder that holds those has
//! learnt to hold drawings, not these drawings.

use crate::pen::{Pen, Rgb, circle, ellipse, rect, round, star, svg, turned};
use crate::places::{self, PLACES};
use crate::things::THINGS;
use rand::RngExt;
use rand_chacha::ChaCha8Rng;
use std::f32::consts::TAU;
use std::fmt::Write as _;
use tiny_skia::{Path, Pixmap, Transform};

/// One kind of drawing, in a square of 128 units.
pub struct Kind {
    pub name: &'static str,
    draw: fn(&mut Pen, &mut ChaCha8Rng),
}

/// The kinds that an autoencoder is trained on.
pub const KINDS: &[Kind] = &[
    Kind { name: "things", draw: things },
    Kind { name: "blobs", draw: blobs },
    Kind { name: "polygons", draw: polygons },
    Kind { name: "boxes", draw: boxes },
    Kind { name: "lines", draw: lines },
    Kind { name: "stripes", draw: stripes },
    Kind { name: "dots", draw: dots },
    Kind { name: "gradients", draw: gradients },
    Kind { name: "faces", draw: faces },
    Kind { name: "writing", draw: writing },
    // These have the most that is small.
    Kind { name: "things", draw: things },
    Kind { name: "faces", draw: faces },
    Kind { name: "things", draw: things },
];

/// The kinds that it never sees.
pub const HELD_OUT: &[Kind] = &[
    Kind { name: "rings", draw: rings },
    Kind { name: "petals", draw: petals },
    Kind { name: "skyline", draw: skyline },
    Kind { name: "spirals", draw: spirals },
    Kind { name: "patchwork", draw: patchwork },
    Kind { name: "shading", draw: shading },
];

/// The middle of a drawing.
const M: f32 = 64.0;

/// A drawing of `kind`, `side` px wide and high.
pub fn draw(kind: &Kind, side: u32, rng: &mut ChaCha8Rng) -> Pixmap {
    let mut picture = crate::blank(side);
    (kind.draw)(&mut Pen { picture: &mut picture, place: crate::unit(side) }, rng);
    picture
}

/// Any colour: one of all hues, more or less pale and dark; one in six is a gray.
fn color(rng: &mut ChaCha8Rng) -> Rgb {
    let (hue, value) = (rng.random_range(0.0..6.0_f32), rng.random_range(0.15..1.0_f32));
    let saturation = if rng.random_range(0..6) == 0 { 0.0 } else { rng.random_range(0.1..1.0_f32) };
    // Smith 1978, "Color gamut transform pairs": HSV to RGB, a channel at a time.
    let channel = |shift: f32| {
        let k = (shift + hue) % 6.0;
        (255.0 * value * (1.0 - saturation * k.min(4.0 - k).clamp(0.0, 1.0))).round() as u8
    };
    Rgb(channel(5.0), channel(3.0), channel(1.0))
}

fn within(rng: &mut ChaCha8Rng, by: f32) -> f32 {
    rng.random_range(-by..by)
}

fn one_in(rng: &mut ChaCha8Rng, count: u32) -> bool {
    rng.random_range(0..count) == 0
}

fn whole() -> Path {
    rect(-1.0, -1.0, 129.0, 129.0)
}

/// A plain ground, a gradient, or one of the places in other colours.
fn ground(pen: &mut Pen, rng: &mut ChaCha8Rng) {
    match rng.random_range(0..4) {
        0 => pen.blend(&whole(), any_point(rng), any_point(rng), &[color(rng), color(rng)]),
        1 => {
            let horizon = rng.random_range(40.0..100.0);
            pen.flat(&whole(), color(rng));
            pen.flat(&rect(-1.0, horizon, 129.0, 129.0), color(rng));
        }
        _ => pen.flat(&whole(), color(rng)),
    }
}

fn any_point(rng: &mut ChaCha8Rng) -> (f32, f32) {
    (rng.random_range(0.0..128.0), rng.random_range(0.0..128.0))
}

/// Fills `path` in one of the ways a part of a drawing is filled.
fn fill(pen: &mut Pen, path: &Path, rng: &mut ChaCha8Rng) {
    let paint = color(rng);
    match rng.random_range(0..6) {
        0 | 1 => pen.solid(path, paint),
        2 => {
            pen.flat(path, paint);
            pen.line(path, color(rng), rng.random_range(1.0..5.0));
        }
        3 => pen.veil(path, paint, rng.random_range(0.3..0.9)),
        _ => pen.flat(path, paint),
    }
}

/// A closed curve about a point: `corners` points at uneven distances, joined by quadratic curves or straight lines.
fn closed(x: f32, y: f32, radius: f32, corners: usize, uneven: f32, curved: bool, rng: &mut ChaCha8Rng) -> Path {
    let turn = rng.random_range(0.0..TAU);
    let points: Vec<(f32, f32)> = (0..corners)
        .map(|corner| {
            let angle = turn + TAU * (corner as f32 + within(rng, 0.3)) / corners as f32;
            let reach = radius * (1.0 + within(rng, uneven));
            (x + reach * angle.cos(), y + reach * angle.sin())
        })
        .collect();
    let middle = |a: (f32, f32), b: (f32, f32)| ((a.0 + b.0) / 2.0, (a.1 + b.1) / 2.0);
    let mut data = String::new();
    for (corner, &point) in points.iter().enumerate() {
        let next = points[(corner + 1) % corners];
        let start = middle(points[(corner + corners - 1) % corners], point);
        let end = middle(point, next);
        let (first, step) = if curved { (start, "Q") } else { (point, "L") };
        if corner == 0 {
            let _ = write!(data, "M{} {} ", first.0, first.1);
        }
        let _ = match step {
            "Q" => write!(data, "Q{} {} {} {} ", point.0, point.1, end.0, end.1),
            _ => write!(data, "L{} {} ", point.0, point.1),
        };
    }
    svg(&(data + "Z"))
}

/// The sketchbook's things in any colours at any of its places, larger or smaller, one or two.
fn things(pen: &mut Pen, rng: &mut ChaCha8Rng) {
    let picture_place = pen.place;
    let place = &PLACES[rng.random_range(0..PLACES.len())];
    (place.draw)(pen, rng);
    for _ in 0..rng.random_range(1..3) {
        let thing = &THINGS[rng.random_range(0..THINGS.len())];
        let scale = rng.random_range(0.4..1.1);
        let at = Transform::from_translate(M + within(rng, 30.0), M + within(rng, 24.0)).pre_scale(scale, scale);
        pen.place = picture_place.pre_concat(at);
        if let (true, Some(shadow)) = (thing.stands, place.shadow) {
            places::shadow(pen, shadow);
        }
        pen.place = pen.place.pre_concat(Transform::from_rotate(within(rng, 12.0)));
        (thing.draw)(pen, color(rng));
    }
    pen.place = picture_place;
    if one_in(rng, 2) {
        recolor(pen.picture, rng);
    }
}

/// Exchanges the channels of a picture, and in half of all cases turns some of them around.
fn recolor(picture: &mut Pixmap, rng: &mut ChaCha8Rng) {
    const ORDERS: [[usize; 3]; 6] = [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]];
    let order = ORDERS[rng.random_range(0..6)];
    let around = if one_in(rng, 2) { rng.random_range(0..8_u8) } else { 0 };
    for pixel in picture.data_mut().chunks_exact_mut(4) {
        let old = [pixel[0], pixel[1], pixel[2]];
        for channel in 0..3 {
            let value = old[order[channel]];
            pixel[channel] = if around >> channel & 1 == 1 { 255 - value } else { value };
        }
    }
}

fn blobs(pen: &mut Pen, rng: &mut ChaCha8Rng) {
    ground(pen, rng);
    for _ in 0..rng.random_range(2..9) {
        let (x, y) = any_point(rng);
        let (radius, corners) = (rng.random_range(6.0..40.0), rng.random_range(4..10));
        let path = closed(x, y, radius, corners, 0.35, true, rng);
        fill(pen, &path, rng);
    }
}

fn polygons(pen: &mut Pen, rng: &mut ChaCha8Rng) {
    ground(pen, rng);
    for _ in 0..rng.random_range(2..9) {
        let (x, y) = any_point(rng);
        let path = if one_in(rng, 4) {
            let outer = rng.random_range(8.0..36.0);
            star(x, y, outer * rng.random_range(0.35..0.7), outer, rng.random_range(3..13))
        } else {
            let (radius, corners) = (rng.random_range(6.0..40.0), rng.random_range(3..8));
            closed(x, y, radius, corners, 0.35, false, rng)
        };
        fill(pen, &path, rng);
    }
}

/// Boxes and ovals, turned.
fn boxes(pen: &mut Pen, rng: &mut ChaCha8Rng) {
    ground(pen, rng);
    for _ in 0..rng.random_range(2..10) {
        let (x, y) = any_point(rng);
        let (w, h) = (rng.random_range(3.0..34.0), rng.random_range(3.0..34.0));
        let path = match rng.random_range(0..3) {
            0 => ellipse(x, y, w, h),
            1 => round(x - w, y - h, x + w, y + h, w.min(h) * rng.random_range(0.1..0.9)),
            _ => rect(x - w, y - h, x + w, y + h),
        };
        let degrees = if one_in(rng, 3) { 0.0 } else { within(rng, 90.0) };
        fill(pen, &turned(path, degrees, x, y), rng);
    }
}

fn lines(pen: &mut Pen, rng: &mut ChaCha8Rng) {
    ground(pen, rng);
    for _ in 0..rng.random_range(3..14) {
        let points: Vec<String> = (0..4).map(|_| any_point(rng)).map(|(x, y)| format!("{x} {y}")).collect();
        let path = match rng.random_range(0..3) {
            0 => svg(&format!("M{} L{}", points[0], points[1])),
            1 => svg(&format!("M{} Q{} {}", points[0], points[1], points[2])),
            _ => svg(&format!("M{} C{} {} {}", points[0], points[1], points[2], points[3])),
        };
        let width = rng.random_range(1.0..7.0);
        if one_in(rng, 3) { pen.rod(&path, color(rng), width) } else { pen.line(&path, color(rng), width) }
    }
}

/// Straight stripes over the picture, a shape or two above them.
fn stripes(pen: &mut Pen, rng: &mut ChaCha8Rng) {
    pen.flat(&whole(), color(rng));
    let (paint, period, degrees) = (color(rng), rng.random_range(6.0..28.0), within(rng, 90.0));
    let broad = period * rng.random_range(0.25..0.75);
    let mut at = -64.0;
    while at < 192.0 {
        pen.flat(&turned(rect(at, -64.0, at + broad, 192.0), degrees, M, M), paint);
        at += period;
    }
    for _ in 0..rng.random_range(0..3) {
        let (x, y) = any_point(rng);
        let (radius, curved) = (rng.random_range(12.0..40.0), one_in(rng, 2));
        let path = closed(x, y, radius, 6, 0.3, curved, rng);
        fill(pen, &path, rng);
    }
}

/// A shape with dots, on dots.
fn dots(pen: &mut Pen, rng: &mut ChaCha8Rng) {
    ground(pen, rng);
    if one_in(rng, 2) {
        let radius = rng.random_range(24.0..50.0);
        let path = closed(M, M, radius, 7, 0.2, true, rng);
        fill(pen, &path, rng);
    }
    let (paint, step) = (color(rng), rng.random_range(10.0..30.0_f32));
    let (radius, loose) = (step * rng.random_range(0.12..0.4), step * 0.15);
    let count = (128.0 / step) as usize + 1;
    for row in 0..count {
        for column in 0..count {
            let shift = if row % 2 == 0 { 0.0 } else { step / 2.0 };
            let (x, y) = (step * column as f32 + shift + within(rng, loose), step * row as f32 + within(rng, loose));
            pen.flat(&circle(x, y, radius), paint);
        }
    }
}

/// Shapes that go from one colour to another.
fn gradients(pen: &mut Pen, rng: &mut ChaCha8Rng) {
    pen.blend(&whole(), any_point(rng), any_point(rng), &[color(rng), color(rng), color(rng)]);
    for _ in 0..rng.random_range(0..6) {
        let (x, y) = any_point(rng);
        let (radius, corners, curved) = (rng.random_range(8.0..40.0), rng.random_range(3..9), one_in(rng, 2));
        let path = closed(x, y, radius, corners, 0.3, curved, rng);
        let from = (x - radius + within(rng, radius), y - radius);
        pen.blend(&path, from, (x + radius, y + radius), &[color(rng), color(rng)]);
    }
}

/// Heads with ears, eyes, mouths and marks.
fn faces(pen: &mut Pen, rng: &mut ChaCha8Rng) {
    ground(pen, rng);
    let picture_place = pen.place;
    for _ in 0..rng.random_range(1..4) {
        let scale = rng.random_range(0.45..1.15);
        let at = Transform::from_translate(M + within(rng, 34.0), M + within(rng, 34.0)).pre_scale(scale, scale);
        pen.place = picture_place.pre_concat(at).pre_concat(Transform::from_rotate(within(rng, 20.0)));
        face(pen, rng);
    }
    pen.place = picture_place;
}

fn face(pen: &mut Pen, rng: &mut ChaCha8Rng) {
    let (skin, mark, ink) = (color(rng), color(rng), color(rng).mix(Rgb(0, 0, 0), 0.6));
    let (wide, tall) = (rng.random_range(26.0..46.0), rng.random_range(26.0..44.0));
    let pointed = one_in(rng, 2);
    for side in [-1.0, 1.0] {
        let ear = if pointed {
            svg(&format!(
                "M{} -8 L{} {} L{} {} Z",
                wide * side,
                wide * 0.8 * side,
                -tall - 12.0,
                4.0 * side,
                -tall + 2.0
            ))
        } else {
            circle(wide * 0.75 * side, -tall * 0.75, rng.random_range(8.0..16.0))
        };
        pen.solid(&ear, if one_in(rng, 3) { color(rng) } else { skin });
    }
    pen.solid(&ellipse(0.0, 0.0, wide, tall), skin);
    if one_in(rng, 2) {
        let mut strokes = String::new();
        for x in [-14.0, -5.0, 5.0, 14.0] {
            let _ = write!(strokes, "M{x} {} L{} {} ", -tall + 4.0, x * 0.8, -tall + 15.0);
        }
        pen.line(&svg(&strokes), mark, rng.random_range(2.0..5.0));
    }
    if one_in(rng, 2) {
        pen.flat(&ellipse(0.0, tall * 0.5, wide * 0.45, tall * 0.35), color(rng));
    }
    let (apart, radius) = (wide * rng.random_range(0.3..0.5), rng.random_range(3.0..9.0));
    for x in [-apart, apart] {
        match rng.random_range(0..3) {
            0 => pen.eye(x, -4.0, radius),
            1 => {
                pen.flat(&circle(x, -4.0, radius * 1.4), color(rng).light());
                pen.flat(&circle(x + within(rng, 2.0), -4.0, radius * 0.6), ink);
                pen.line(&circle(x, -4.0, radius * 1.4), mark, rng.random_range(1.5..4.0));
            }
            _ => pen.flat(&circle(x, -4.0, radius * 0.8), ink),
        }
    }
    let (y, bend) = (tall * rng.random_range(0.35..0.6), within(rng, 12.0));
    pen.line(&svg(&format!("M-11 {y} Q0 {} 11 {y}", y + bend)), ink, rng.random_range(1.5..4.0));
    pen.flat(&svg(&format!("M-5 {} L5 {} L0 {} Z", y - 10.0, y - 10.0, y - 4.0)), color(rng));
    if one_in(rng, 3) {
        let cloth = color(rng);
        pen.solid(&svg(&format!("M0 {0} L-22 {1} L-22 {2} Z", tall + 4.0, tall - 6.0, tall + 14.0)), cloth);
        pen.solid(&svg(&format!("M0 {0} L22 {1} L22 {2} Z", tall + 4.0, tall - 6.0, tall + 14.0)), cloth);
    }
}

/// Rows of short strokes, as letters stand in lines.
fn writing(pen: &mut Pen, rng: &mut ChaCha8Rng) {
    ground(pen, rng);
    let high = rng.random_range(7.0..20.0_f32);
    let (paint, width) = (color(rng), high * rng.random_range(0.1..0.22));
    let mut y = rng.random_range(4.0..40.0);
    while y + high < 124.0 {
        let (mut x, end) = (rng.random_range(4.0..20.0), rng.random_range(70.0..124.0));
        while x + high * 0.6 < end {
            if !one_in(rng, 6) {
                let at = |rng: &mut ChaCha8Rng| {
                    (x + high * 0.6 * rng.random_range(0.0..1.0_f32), y + high * rng.random_range(0..3_u8) as f32 / 2.0)
                };
                let mut glyph = String::new();
                for _ in 0..rng.random_range(1..4) {
                    let (from, over, to) = (at(rng), at(rng), at(rng));
                    let curve = if one_in(rng, 2) { over } else { ((from.0 + to.0) / 2.0, (from.1 + to.1) / 2.0) };
                    let _ = write!(glyph, "M{} {} Q{} {} {} {} ", from.0, from.1, curve.0, curve.1, to.0, to.1);
                }
                pen.line(&svg(&glyph), paint, width);
            }
            x += high * 0.85;
        }
        y += high * 1.7;
    }
}

/// Targets: circles in each other.
fn rings(pen: &mut Pen, rng: &mut ChaCha8Rng) {
    ground(pen, rng);
    for _ in 0..rng.random_range(1..5) {
        let (x, y) = any_point(rng);
        let (colors, mut radius) = ([color(rng), color(rng)], rng.random_range(14.0..48.0));
        let step = rng.random_range(4.0..10.0);
        let mut ring = 0;
        while radius > 1.0 {
            pen.flat(&circle(x, y, radius), colors[ring % 2]);
            (radius, ring) = (radius - step, ring + 1);
        }
    }
}

/// Flowers: petals around a middle.
fn petals(pen: &mut Pen, rng: &mut ChaCha8Rng) {
    ground(pen, rng);
    for _ in 0..rng.random_range(1..5) {
        let (x, y) = any_point(rng);
        let (long, count, paint) = (rng.random_range(12.0..34.0_f32), rng.random_range(4..9), color(rng));
        let stem = color(rng);
        pen.line(&svg(&format!("M{x} {y} Q{} {} {x} 130", x + within(rng, 20.0), y + 30.0)), stem, 3.0);
        for petal in 0..count {
            let leaf = ellipse(x, y - long * 0.6, long * 0.28, long * 0.5);
            pen.solid(&turned(leaf, 360.0 * petal as f32 / count as f32, x, y), paint);
        }
        pen.solid(&circle(x, y, long * 0.3), color(rng));
    }
}

/// A town: houses with rows of windows.
fn skyline(pen: &mut Pen, rng: &mut ChaCha8Rng) {
    ground(pen, rng);
    let mut left = -4.0;
    while left < 128.0 {
        let (wide, top) = (rng.random_range(16.0..36.0_f32), rng.random_range(16.0..80.0_f32));
        let (wall, light) = (color(rng), color(rng));
        pen.flat(&rect(left, top, left + wide, 129.0), wall);
        let (step, size) = (rng.random_range(8.0..13.0), rng.random_range(3.5..6.0));
        let mut y = top + 5.0;
        while y < 122.0 {
            let mut x = left + 4.0;
            while x + size < left + wide - 2.0 {
                if !one_in(rng, 4) {
                    pen.flat(&rect(x, y, x + size, y + size * 1.2), light);
                }
                x += step;
            }
            y += step * 1.3;
        }
        left += wide + within(rng, 3.0);
    }
}

fn spirals(pen: &mut Pen, rng: &mut ChaCha8Rng) {
    ground(pen, rng);
    for _ in 0..rng.random_range(1..4) {
        let (x, y) = any_point(rng);
        let (turns, reach) = (rng.random_range(2.0..4.0), rng.random_range(20.0..46.0));
        let mut data = format!("M{x} {y}");
        for step in 1..=90 {
            let part = step as f32 / 90.0;
            let angle = TAU * turns * part;
            let _ = write!(data, " L{} {}", x + reach * part * angle.cos(), y + reach * part * angle.sin());
        }
        pen.line(&svg(&data), color(rng), rng.random_range(2.0..5.0));
    }
}

/// Patches in a grid, each with a triangle or a disc.
fn patchwork(pen: &mut Pen, rng: &mut ChaCha8Rng) {
    let side = [128.0 / 3.0, 32.0, 128.0 / 5.0][rng.random_range(0..3)];
    let colors: Vec<Rgb> = (0..5).map(|_| color(rng)).collect();
    let count = (128.0 / side) as usize + 1;
    for row in 0..count {
        for column in 0..count {
            let (l, t) = (side * column as f32, side * row as f32);
            let (r, b) = (l + side, t + side);
            pen.flat(&rect(l, t, r, b), colors[rng.random_range(0..5)]);
            let above = colors[rng.random_range(0..5)];
            match rng.random_range(0..3) {
                0 => pen.flat(&svg(&format!("M{l} {t} L{r} {t} L{l} {b} Z")), above),
                1 => pen.flat(&svg(&format!("M{l} {b} L{r} {b} L{} {t} Z", (l + r) / 2.0)), above),
                _ => pen.flat(&circle((l + r) / 2.0, (t + b) / 2.0, side * 0.33), above),
            }
        }
    }
}

/// Balls in soft light.
fn shading(pen: &mut Pen, rng: &mut ChaCha8Rng) {
    pen.blend(&whole(), (0.0, 0.0), (within(rng, 64.0), 128.0), &[color(rng), color(rng)]);
    for _ in 0..rng.random_range(1..6) {
        let (x, y) = any_point(rng);
        let radius = rng.random_range(10.0..36.0);
        let paint = color(rng);
        pen.veil(&ellipse(x + radius * 0.2, y + radius, radius, radius * 0.25), Rgb(30, 30, 40), 0.35);
        pen.glow(
            &circle(x, y, radius),
            (x - radius * 0.35, y - radius * 0.4),
            radius * 1.4,
            &[paint.light(), paint, paint.shade()],
        );
    }
}
