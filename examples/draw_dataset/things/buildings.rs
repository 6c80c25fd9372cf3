//! Buildings and vehicles.

use crate::pen::{BEAK, CREAM, GLASS, GOLD, INK, Pen, Rgb, SLATE, WOOD, circle, ellipse, rect, round, svg};

const ROOF: Rgb = Rgb(122, 82, 84);

pub fn house(pen: &mut Pen, color: Rgb) {
    pen.solid(&rect(18.0, -44.0, 30.0, -16.0), ROOF);
    pen.solid(&rect(-36.0, -8.0, 36.0, 46.0), color);
    pen.solid(&svg("M0 -48 L48 -6 L-48 -6 Z"), ROOF);
    pen.solid(&round(-26.0, 14.0, -6.0, 46.0, 2.0), WOOD);
    pen.solid(&rect(8.0, 8.0, 26.0, 26.0), GLASS);
    pen.line(&svg("M17 8 L17 26 M8 17 L26 17"), INK, 2.0);
}

pub fn castle(pen: &mut Pen, color: Rgb) {
    for x in [-35.0, 35.0] {
        pen.line(&svg(&format!("M{x} -30 L{x} -50")), INK, 3.0);
        pen.flat(&svg(&format!("M{x} -50 L{} -44 L{x} -38 Z", x + 13.0)), Rgb(222, 70, 74));
    }
    pen.solid(
        &svg("M-22 46 L-22 -8 L-22 -16 L-12 -16 L-12 -8 L-5 -8 L-5 -16 L5 -16 L5 -8 L12 -8 L12 -16 L22 -16 L22 46 Z"),
        color,
    );
    for x in [-35.0, 35.0] {
        let (l, r) = (x - 14.0, x + 14.0);
        let tower = format!(
            "M{l} 46 L{l} -34 L{} -34 L{} -26 L{} -26 L{} -34 L{} -34 L{} -26 L{} -26 L{} -34 L{r} -34 L{r} 46 Z",
            l + 7.0,
            l + 7.0,
            x - 3.5,
            x - 3.5,
            x + 3.5,
            x + 3.5,
            r - 7.0,
            r - 7.0
        );
        pen.solid(&svg(&tower), color);
        pen.flat(&round(x - 4.0, -12.0, x + 4.0, 4.0, 3.0), INK);
    }
    pen.solid(&svg("M-12 46 L-12 26 C-12 10 12 10 12 26 L12 46 Z"), WOOD);
}

pub fn tent(pen: &mut Pen, color: Rgb) {
    pen.line(&svg("M-7 -46 L0 -36 L7 -46"), WOOD.outline(), 5.0);
    pen.solid(&svg("M0 -40 L48 44 L-48 44 Z"), color);
    pen.solid(&svg("M0 -22 L20 44 L-20 44 Z"), INK.mix(WOOD, 0.4));
    pen.solid(&svg("M0 -22 L20 44 L34 44 Q10 10 0 -22 Z"), color.light());
}

pub fn lighthouse(pen: &mut Pen, color: Rgb) {
    pen.solid(&svg("M-13 -22 L13 -22 L22 47 L-22 47 Z"), color);
    pen.flat(&svg("M-15 -8 L15 -8 L17 9 L-17 9 Z M-19 25 L19 25 L21 42 L-21 42 Z"), color.spots());
    pen.solid(&round(-19.0, -26.0, 19.0, -20.0, 2.0), SLATE);
    pen.solid(&rect(-10.0, -40.0, 10.0, -26.0), GOLD);
    pen.solid(&svg("M0 -52 L16 -39 L-16 -39 Z"), SLATE);
}

pub fn boat(pen: &mut Pen, color: Rgb) {
    pen.rod(&svg("M0 20 L0 -46"), WOOD, 4.0);
    pen.solid(&svg("M6 -44 C34 -28 42 -4 42 10 L6 10 Z"), CREAM);
    pen.solid(&svg("M-6 -32 C-24 -18 -34 -4 -36 10 L-6 10 Z"), CREAM);
    pen.solid(&svg("M-48 16 L48 16 C44 36 34 46 24 46 L-24 46 C-36 46 -44 34 -48 16 Z"), color);
}

fn wheel(pen: &mut Pen, x: f32, y: f32, r: f32) {
    pen.flat(&circle(x, y, r), INK);
    pen.flat(&circle(x, y, r * 0.45), Rgb(206, 208, 218));
}

pub fn car(pen: &mut Pen, color: Rgb) {
    pen.solid(&svg("M-28 -2 C-22 -26 -16 -30 -6 -30 L10 -30 C20 -30 26 -22 34 -2 Z"), color);
    pen.solid(&svg("M-46 30 L-48 10 C-48 -2 -40 -4 -28 -4 L34 -4 C46 -2 50 6 49 18 L48 30 Z"), color);
    pen.flat(&svg("M-18 -5 C-14 -20 -10 -23 -4 -23 L0 -23 L0 -5 Z M6 -5 L6 -23 L10 -23 C16 -23 20 -16 24 -5 Z"), GLASS);
    pen.flat(&ellipse(44.0, 8.0, 4.0, 5.0), GOLD);
    wheel(pen, -26.0, 30.0, 12.5);
    wheel(pen, 27.0, 30.0, 12.5);
}

pub fn bus(pen: &mut Pen, color: Rgb) {
    pen.solid(&round(-48.0, -34.0, 48.0, 32.0, 10.0), color);
    for x in [-41.0, -19.0, 3.0] {
        pen.flat(&round(x, -24.0, x + 17.0, -5.0, 3.0), GLASS);
    }
    pen.flat(&round(25.0, -24.0, 43.0, 24.0, 3.0), GLASS);
    pen.line(&svg("M34 -24 L34 24"), color.outline(), 2.5);
    pen.line(&svg("M-42 8 L18 8"), color.spots(), 5.0);
    wheel(pen, -27.0, 33.0, 12.0);
    wheel(pen, 14.0, 33.0, 12.0);
}

pub fn rocket(pen: &mut Pen, color: Rgb) {
    pen.solid(&svg("M-10 26 Q-8 42 0 51 Q8 42 10 26 Z"), BEAK);
    pen.flat(&svg("M-5 28 Q-4 36 0 42 Q4 36 5 28 Z"), GOLD);
    pen.solid(&svg("M-14 4 C-30 10 -34 24 -32 36 L-12 26 Z"), SLATE);
    pen.solid(&svg("M14 4 C30 10 34 24 32 36 L12 26 Z"), SLATE);
    pen.solid(&svg("M0 -50 C20 -34 24 -4 14 28 L-14 28 C-24 -4 -20 -34 0 -50 Z"), color);
    pen.solid(&circle(0.0, -12.0, 9.0), GLASS);
}
