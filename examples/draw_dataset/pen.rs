//! A small drawing kit over tiny-skia: paths written as SVG strings, flat colours and two-tone shading.
//!
//! A thing is drawn in its own square, x and y from -50 to 50 with y pointing down; the pen's transform puts that
//! square into the picture. Every solid part is an outline, a fill and a darker crescent away from the light (which
//! comes from the upper left). The outline is stroked first and the fill covers its inner half, so that a path made
//! of overlapping circles shows one outline around them all.

use tiny_skia::{
    Color, FillRule, GradientStop, LineCap, LineJoin, LinearGradient, Mask, Paint, Path, PathBuilder, Pixmap, Point,
    RadialGradient, Rect, Shader, SpreadMode, Stroke, Transform,
};

/// An opaque colour, 8 bits a channel.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Rgb(pub u8, pub u8, pub u8);

pub const INK: Rgb = Rgb(46, 38, 60);
pub const WHITE: Rgb = Rgb(250, 250, 250);
pub const CREAM: Rgb = Rgb(250, 236, 206);
pub const WOOD: Rgb = Rgb(140, 92, 58);
pub const LEAF: Rgb = Rgb(86, 168, 76);
pub const GOLD: Rgb = Rgb(252, 204, 72);
pub const GLASS: Rgb = Rgb(190, 228, 246);
pub const SLATE: Rgb = Rgb(98, 104, 130);
pub const BEAK: Rgb = Rgb(247, 152, 48);
pub const BLUSH: Rgb = Rgb(246, 156, 170);

impl Rgb {
    /// The colour `part` of the way from `self` to `other`.
    pub fn mix(self, other: Rgb, part: f32) -> Rgb {
        let blend = |a: u8, b: u8| (a as f32 + (b as f32 - a as f32) * part).round() as u8;
        Rgb(blend(self.0, other.0), blend(self.1, other.1), blend(self.2, other.2))
    }

    /// The same colour in shadow.
    pub fn shade(self) -> Rgb {
        self.mix(INK, 0.2)
    }

    /// The same colour in bright light.
    pub fn light(self) -> Rgb {
        self.mix(Rgb(255, 255, 255), 0.45)
    }

    /// The line around a part of this colour.
    pub fn outline(self) -> Rgb {
        self.mix(INK, 0.68)
    }

    /// A colour for spots and stripes on a part of this colour: white, or gray on white.
    pub fn spots(self) -> Rgb {
        if self.0 > 225 && self.1 > 225 && self.2 > 225 { Rgb(186, 190, 206) } else { WHITE }
    }

    fn paint(self, alpha: f32) -> Paint<'static> {
        let mut paint = Paint { anti_alias: true, ..Paint::default() };
        let mut color = Color::from_rgba8(self.0, self.1, self.2, 255);
        color.set_alpha(alpha);
        paint.set_color(color);
        paint
    }
}

/// A path from SVG path data: `M`, `L`, `Q`, `C` and `Z` with absolute coordinates.
///
/// # Panics
/// On anything else: the drawings are part of this program.
pub fn svg(data: &str) -> Path {
    let spaced: String =
        data.chars().flat_map(|c| if c.is_ascii_alphabetic() { vec![' ', c, ' '] } else { vec![c] }).collect();
    let mut words = spaced.split([' ', ',']).filter(|word| !word.is_empty()).peekable();
    let mut path = PathBuilder::new();
    while let Some(command) = words.next() {
        loop {
            let mut number = || -> f32 { words.next().expect("a number").parse().expect("a number") };
            match command {
                "M" => path.move_to(number(), number()),
                "L" => path.line_to(number(), number()),
                "Q" => path.quad_to(number(), number(), number(), number()),
                "C" => path.cubic_to(number(), number(), number(), number(), number(), number()),
                "Z" => path.close(),
                other => panic!("path command {other}"),
            }
            // A command letter may be followed by several groups of its numbers.
            let more = words.peek().is_some_and(|word| !word.starts_with(|c: char| c.is_ascii_alphabetic()));
            if command == "Z" || !more {
                break;
            }
        }
    }
    path.finish().expect("a path with points")
}

pub fn ellipse(x: f32, y: f32, rx: f32, ry: f32) -> Path {
    PathBuilder::from_oval(Rect::from_ltrb(x - rx, y - ry, x + rx, y + ry).expect("positive radii"))
        .expect("an ellipse has points")
}

pub fn circle(x: f32, y: f32, r: f32) -> Path {
    ellipse(x, y, r, r)
}

/// A rectangle by its left, top, right and bottom.
pub fn rect(left: f32, top: f32, right: f32, bottom: f32) -> Path {
    PathBuilder::from_rect(Rect::from_ltrb(left, top, right, bottom).expect("left < right, top < bottom"))
}

/// A rectangle with corners of radius `r`.
pub fn round(left: f32, top: f32, right: f32, bottom: f32, r: f32) -> Path {
    let (l, t, rt, b) = (left, top, right, bottom);
    svg(&format!(
        "M{} {t} L{} {t} Q{rt} {t} {rt} {} L{rt} {} Q{rt} {b} {} {b} L{} {b} Q{l} {b} {l} {} L{l} {} Q{l} {t} {} {t} Z",
        l + r,
        rt - r,
        t + r,
        b - r,
        rt - r,
        l + r,
        b - r,
        t + r,
        l + r
    ))
}

/// Several paths as one, so that they share an outline.
pub fn union(paths: &[Path]) -> Path {
    let mut all = PathBuilder::new();
    for path in paths {
        all.push_path(path);
    }
    all.finish().expect("at least one path")
}

/// A star of `points` spikes between an inner and an outer radius, the first spike upward.
pub fn star(x: f32, y: f32, inner: f32, outer: f32, points: usize) -> Path {
    let mut path = PathBuilder::new();
    for corner in 0..2 * points {
        let radius = if corner % 2 == 0 { outer } else { inner };
        let angle = std::f32::consts::PI * corner as f32 / points as f32;
        let (px, py) = (x + radius * angle.sin(), y - radius * angle.cos());
        if corner == 0 { path.move_to(px, py) } else { path.line_to(px, py) }
    }
    path.close();
    path.finish().expect("a star has points")
}

/// `path` turned by `degrees` (clockwise) about a point.
pub fn turned(path: Path, degrees: f32, x: f32, y: f32) -> Path {
    path.transform(Transform::from_rotate_at(degrees, x, y)).expect("a rotation keeps a path finite")
}

fn stops(colors: &[Rgb]) -> Vec<GradientStop> {
    let last = (colors.len() - 1) as f32;
    let stop = |(index, color): (usize, &Rgb)| {
        GradientStop::new(index as f32 / last, Color::from_rgba8(color.0, color.1, color.2, 255))
    };
    colors.iter().enumerate().map(stop).collect()
}

/// Draws into a picture through a transform.
pub struct Pen<'a> {
    pub picture: &'a mut Pixmap,
    pub place: Transform,
}

impl Pen<'_> {
    /// A part of a thing: outline, fill, shadow crescent.
    pub fn solid(&mut self, path: &Path, color: Rgb) {
        self.line(path, color.outline(), 6.0);
        self.flat(path, color.shade());
        let mut mask = Mask::new(self.picture.width(), self.picture.height()).expect("the picture has a size");
        mask.fill_path(path, FillRule::Winding, true, self.place);
        let lit = self.place.pre_translate(-3.5, -4.5);
        self.picture.fill_path(path, &color.paint(1.0), FillRule::Winding, lit, Some(&mask));
    }

    /// A plain fill.
    pub fn flat(&mut self, path: &Path, color: Rgb) {
        self.veil(path, color, 1.0);
    }

    /// A plain fill that lets what is below shine through.
    pub fn veil(&mut self, path: &Path, color: Rgb, alpha: f32) {
        self.picture.fill_path(path, &color.paint(alpha), FillRule::Winding, self.place, None);
    }

    /// A fill that goes evenly through `colors` from one point to another.
    pub fn blend(&mut self, path: &Path, from: (f32, f32), to: (f32, f32), colors: &[Rgb]) {
        let ends = (Point::from_xy(from.0, from.1), Point::from_xy(to.0, to.1));
        let shader = LinearGradient::new(ends.0, ends.1, stops(colors), SpreadMode::Pad, Transform::identity());
        self.shade(path, shader, colors[0]);
    }

    /// A fill that goes evenly through `colors` from a point to `radius` away from it.
    pub fn glow(&mut self, path: &Path, from: (f32, f32), radius: f32, colors: &[Rgb]) {
        let middle = Point::from_xy(from.0, from.1);
        let shader =
            RadialGradient::new(middle, 0.0, middle, radius, stops(colors), SpreadMode::Pad, Transform::identity());
        self.shade(path, shader, colors[0]);
    }

    /// Where the two ends of a gradient meet there is none: then it is plain.
    fn shade(&mut self, path: &Path, shader: Option<Shader<'static>>, plain: Rgb) {
        let mut paint = plain.paint(1.0);
        if let Some(shader) = shader {
            paint.shader = shader;
        }
        self.picture.fill_path(path, &paint, FillRule::Winding, self.place, None);
    }

    /// A stroke with round ends.
    pub fn line(&mut self, path: &Path, color: Rgb, width: f32) {
        let stroke = Stroke { width, line_cap: LineCap::Round, line_join: LineJoin::Round, ..Stroke::default() };
        self.picture.stroke_path(path, &color.paint(1.0), &stroke, self.place, None);
    }

    /// A rod: a stroke with an outline.
    pub fn rod(&mut self, path: &Path, color: Rgb, width: f32) {
        self.line(path, color.outline(), width + 6.0);
        self.line(path, color, width);
    }

    /// A friendly eye.
    pub fn eye(&mut self, x: f32, y: f32, r: f32) {
        self.flat(&circle(x, y, r + 1.6), WHITE);
        self.flat(&circle(x, y, r), INK);
        self.flat(&circle(x - r * 0.35, y - r * 0.4, r * 0.38), WHITE);
    }
}
