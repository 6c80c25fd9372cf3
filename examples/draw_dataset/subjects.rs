//! Subjects for DreamBooth: one certain cat, dog and teapot. Each is the same in every picture; only the place, its
//! size, where it looks and how it holds itself differ.

use crate::pen::{BLUSH, CREAM, GLASS, GOLD, INK, Pen, Rgb, WHITE, circle, ellipse, star, svg, turned};

/// One certain thing or animal.
pub struct Subject {
    /// Of its folder: `datasets/NAME`.
    pub name: &'static str,
    /// What the base calls it.
    pub class: &'static str,
    /// Draws it; where it has pupils they are that far to the side.
    pub draw: fn(&mut Pen, f32),
    /// Places that it is drawn at, positions in `PLACES`.
    pub places: [usize; 6],
}

pub const SUBJECTS: &[Subject] = &[
    Subject { name: "mascot", class: "cat", draw: mascot, places: [0, 1, 3, 4, 5, 8] },
    Subject { name: "puppy", class: "dog", draw: puppy, places: [0, 2, 3, 5, 6, 7] },
    Subject { name: "teapot", class: "teapot", draw: teapot, places: [0, 1, 2, 4, 7, 8] },
];

const FUR: Rgb = Rgb(168, 172, 190);
const STRIPE: Rgb = Rgb(112, 114, 138);
const EAR: Rgb = Rgb(48, 176, 168);
const TIE: Rgb = Rgb(222, 62, 70);
const FRAME: Rgb = Rgb(250, 190, 50);

/// A gray tabby with a teal ear, round glasses and a red bow tie; its pupils are `look` to the side.
fn mascot(pen: &mut Pen, look: f32) {
    for (side, color) in [(-1.0, FUR), (1.0, EAR)] {
        pen.solid(&svg(&format!("M{} -12 L{} -52 L{} -34 Z", 42.0 * side, 38.0 * side, 6.0 * side)), color);
        pen.flat(&svg(&format!("M{} -24 L{} -43 L{} -33 Z", 35.0 * side, 34.0 * side, 19.0 * side)), BLUSH);
    }
    pen.solid(&ellipse(0.0, 0.0, 45.0, 36.0), FUR);
    pen.line(&svg("M0 -33 L0 -19 M-12 -31 L-9 -20 M12 -31 L9 -20"), STRIPE, 5.0);
    pen.line(&svg("M-43 6 L-33 8 M-40 16 L-31 15 M43 6 L33 8 M40 16 L31 15"), STRIPE, 4.0);
    pen.flat(&ellipse(0.0, 17.0, 19.0, 13.0), CREAM);
    pen.line(&svg("M-9 18 Q-4 25 0 17 Q4 25 9 18"), INK, 2.8);
    pen.flat(&svg("M-6 9 L6 9 L0 15 Z"), BLUSH.shade());
    for x in [-18.0, 18.0] {
        pen.flat(&circle(x, -5.0, 13.0), GLASS);
        pen.flat(&circle(x + look, -4.0, 6.0), INK);
        pen.flat(&circle(x + look - 2.0, -6.5, 2.2), Rgb(255, 255, 255));
        pen.line(&circle(x, -5.0, 13.0), FRAME.outline(), 6.0);
        pen.line(&circle(x, -5.0, 13.0), FRAME, 3.0);
    }
    pen.line(&svg("M-5 -6 Q0 -9 5 -6"), FRAME.outline(), 4.0);
    pen.solid(&svg("M0 41 L-26 30 L-26 52 Z"), TIE);
    pen.solid(&svg("M0 41 L26 30 L26 52 Z"), TIE);
    pen.solid(&circle(0.0, 41.0, 6.0), TIE);
}

const COAT: Rgb = Rgb(246, 240, 228);
const PATCH: Rgb = Rgb(168, 104, 60);
const COLLAR: Rgb = Rgb(40, 104, 200);

/// A white puppy with one brown ear and eye, a green cap and a blue collar with a gold tag.
fn puppy(pen: &mut Pen, look: f32) {
    pen.solid(
        &svg("M-30 -34 C-14 -44 14 -44 30 -34 C40 -16 38 10 32 24 C24 44 -24 44 -32 24 C-38 10 -40 -16 -30 -34 Z"),
        COAT,
    );
    pen.flat(&turned(ellipse(15.0, -10.0, 13.0, 17.0), 15.0, 15.0, -10.0), PATCH);
    for (side, color) in [(-1.0, COAT), (1.0, PATCH)] {
        let ear = format!(
            "M{} -36 C{} -42 {} -16 {} 8 C{} 18 {} 14 {} 2 C{} -14 {} -24 {} -36 Z",
            24.0 * side,
            46.0 * side,
            52.0 * side,
            48.0 * side,
            44.0 * side,
            34.0 * side,
            32.0 * side,
            30.0 * side,
            26.0 * side,
            24.0 * side
        );
        pen.solid(&svg(&ear), color.shade());
    }
    for x in [-15.0, 15.0] {
        pen.flat(&circle(x, -9.0, 7.5), WHITE);
        pen.flat(&circle(x + look * 0.6, -8.5, 5.5), INK);
        pen.flat(&circle(x + look * 0.6 - 1.8, -10.5, 2.0), WHITE);
    }
    pen.solid(&svg("M-6 22 L6 22 Q8 36 0 36 Q-8 36 -6 22 Z"), BLUSH);
    pen.line(&svg("M0 10 L0 20 M-14 18 Q-7 26 0 20 Q7 26 14 18"), INK, 2.8);
    pen.flat(&ellipse(0.0, 8.0, 9.0, 6.5), INK);
    pen.solid(&svg("M-26 36 Q0 50 26 36 L24 46 Q0 58 -24 46 Z"), COLLAR);
    pen.solid(&circle(0.0, 52.0, 6.0), GOLD);
    pen.solid(&svg("M-24 -36 C-20 -58 20 -58 24 -36 Z"), Rgb(70, 170, 90));
    pen.solid(&svg("M-24 -38 L-44 -33 Q-40 -28 -22 -32 Z"), Rgb(70, 170, 90));
}

const GLAZE: Rgb = Rgb(126, 206, 190);
const BAND: Rgb = Rgb(240, 112, 92);

/// A mint teapot with a coral band, white dots, a gold star and a purple lid. It looks nowhere.
fn teapot(pen: &mut Pen, _look: f32) {
    pen.rod(&svg("M-26 -8 C-54 -20 -54 30 -26 24"), BAND, 6.0);
    pen.solid(&svg("M24 8 C36 6 34 -16 50 -20 L52 -10 C44 -4 46 24 24 30 Z"), BAND);
    pen.solid(
        &svg("M-18 -20 L18 -20 C34 -10 38 6 34 22 C30 36 22 43 12 43 L-12 43 C-22 43 -30 36 -34 22 C-38 6 -34 -10 -18 -20 Z"),
        GLAZE,
    );
    pen.flat(&svg("M-35 14 Q0 22 35 14 L31 29 Q0 36 -31 29 Z"), BAND);
    for x in [-22.0, -11.0, 0.0, 11.0, 22.0] {
        pen.flat(&circle(x, 25.0 - x * x * 0.005, 3.2), WHITE);
    }
    pen.solid(&star(0.0, 0.0, 5.0, 11.0, 5), GOLD);
    pen.solid(&svg("M-22 -18 C-18 -34 18 -34 22 -18 Z"), Rgb(140, 90, 196));
    pen.solid(&circle(0.0, -35.0, 6.0), GOLD);
}
