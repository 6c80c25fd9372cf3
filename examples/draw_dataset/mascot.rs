//! One certain cat, for DreamBooth: a gray tabby with a teal ear, round glasses and a red bow tie. The same cat in
//! each picture; only the place, its size, where it looks and how it holds its head differ.

use crate::pen::{BLUSH, CREAM, GLASS, INK, Pen, Rgb, circle, ellipse, svg};

const FUR: Rgb = Rgb(168, 172, 190);
const STRIPE: Rgb = Rgb(112, 114, 138);
const EAR: Rgb = Rgb(48, 176, 168);
const TIE: Rgb = Rgb(222, 62, 70);
const FRAME: Rgb = Rgb(250, 190, 50);

/// Draws the cat; its pupils are `look` to the side.
pub fn draw(pen: &mut Pen, look: f32) {
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
