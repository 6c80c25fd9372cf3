//! The sky's things and household things.

use crate::pen::{
    CREAM, GOLD, INK, Pen, Rgb, SLATE, WHITE, WOOD, circle, ellipse, rect, round, star, svg, turned, union,
};

pub fn sun(pen: &mut Pen, color: Rgb) {
    pen.solid(&star(0.0, 0.0, 32.0, 49.0, 12), color);
    pen.solid(&circle(0.0, 0.0, 27.0), color.mix(WHITE, 0.15));
}

pub fn moon(pen: &mut Pen, color: Rgb) {
    pen.solid(
        &svg("M14 -46 C-20 -46 -42 -24 -42 2 C-42 28 -20 48 8 46 C22 45 34 38 40 28 C14 34 -8 18 -8 -6 C-8 -24 0 -38 14 -46 Z"),
        color,
    );
}

pub fn bright_star(pen: &mut Pen, color: Rgb) {
    pen.solid(&star(0.0, 4.0, 22.0, 50.0, 5), color);
    pen.flat(&turned(ellipse(-8.0, -8.0, 5.0, 9.0), 30.0, -8.0, -8.0), color.light());
}

pub fn cloud(pen: &mut Pen, color: Rgb) {
    let puffs = [
        circle(-28.0, 10.0, 19.0),
        circle(-10.0, -10.0, 22.0),
        circle(16.0, -4.0, 20.0),
        circle(32.0, 12.0, 17.0),
        round(-34.0, 4.0, 36.0, 29.0, 11.0),
    ];
    pen.solid(&union(&puffs), color);
    pen.flat(&turned(ellipse(-16.0, -16.0, 9.0, 5.0), -25.0, -16.0, -16.0), color.light());
}

pub fn balloon(pen: &mut Pen, color: Rgb) {
    pen.line(&svg("M0 24 Q8 32 0 40 Q-6 46 0 52"), INK, 2.5);
    pen.solid(&svg("M0 18 L7 28 L-7 28 Z"), color);
    pen.solid(
        &svg("M0 -48 C22 -48 34 -32 34 -14 C34 6 16 22 0 22 C-16 22 -34 6 -34 -14 C-34 -32 -22 -48 0 -48 Z"),
        color,
    );
    pen.flat(&turned(ellipse(-15.0, -26.0, 6.0, 10.0), 25.0, -15.0, -26.0), color.light());
}

pub fn umbrella(pen: &mut Pen, color: Rgb) {
    pen.rod(&svg("M0 -46 L0 36 Q0 45 9 45 Q17 45 17 37"), WOOD, 4.0);
    pen.solid(
        &svg("M-48 4 C-46 -26 -24 -42 0 -42 C24 -42 46 -26 48 4 Q40 -6 32 4 Q24 -6 16 4 Q8 -6 0 4 Q-8 -6 -16 4 Q-24 -6 -32 4 Q-40 -6 -48 4 Z"),
        color,
    );
    pen.line(&svg("M0 -40 Q-16 -24 -16 2 M0 -40 Q16 -24 16 2"), color.shade(), 3.0);
}

pub fn cup(pen: &mut Pen, color: Rgb) {
    pen.rod(&svg("M28 -10 C52 -16 52 26 24 22"), color, 6.0);
    pen.solid(&svg("M-38 -26 L32 -26 L26 32 Q24 44 12 44 L-18 44 Q-30 44 -32 32 Z"), color);
    pen.solid(&ellipse(-3.0, -26.0, 35.0, 9.0), color.light());
    pen.flat(&ellipse(-3.0, -25.0, 28.0, 5.5), WOOD);
}

pub fn teapot(pen: &mut Pen, color: Rgb) {
    pen.rod(&svg("M-26 -8 C-54 -20 -54 30 -26 24"), color, 6.0);
    pen.solid(&svg("M24 8 C36 6 34 -16 50 -20 L52 -10 C44 -4 46 24 24 30 Z"), color);
    pen.solid(&svg("M-18 -20 L18 -20 C34 -10 38 6 34 22 C30 36 22 43 12 43 L-12 43 C-22 43 -30 36 -34 22 C-38 6 -34 -10 -18 -20 Z"), color);
    pen.solid(&svg("M-22 -18 C-18 -32 18 -32 22 -18 Z"), color);
    pen.solid(&circle(0.0, -34.0, 6.0), color);
    pen.flat(&turned(ellipse(-18.0, 2.0, 5.0, 10.0), 15.0, -18.0, 2.0), color.light());
}

pub fn bottle(pen: &mut Pen, color: Rgb) {
    pen.solid(&rect(-8.0, -50.0, 8.0, -38.0), WOOD);
    pen.solid(
        &svg("M-9 -38 L9 -38 L9 -22 C9 -12 23 -12 23 2 L23 40 Q23 48 15 48 L-15 48 Q-23 48 -23 40 L-23 2 C-23 -12 -9 -12 -9 -22 Z"),
        color,
    );
    pen.flat(&rect(-23.0, 8.0, 23.0, 32.0), color.spots().mix(CREAM, 0.5));
}

pub fn lamp(pen: &mut Pen, color: Rgb) {
    pen.rod(&svg("M0 0 L0 40"), SLATE, 5.0);
    pen.solid(&svg("M-24 47 Q-22 36 0 36 Q22 36 24 47 Z"), SLATE);
    pen.flat(&ellipse(0.0, 8.0, 30.0, 7.0), GOLD);
    pen.solid(&svg("M-20 -47 L20 -47 L40 8 Q0 14 -40 8 Z"), color);
}

pub fn clock(pen: &mut Pen, color: Rgb) {
    pen.rod(&svg("M-22 34 L-29 46 M22 34 L29 46"), SLATE, 5.0);
    pen.solid(&turned(svg("M-14 -32 C-14 -50 14 -50 14 -32 Z"), -38.0, 0.0, 4.0), SLATE);
    pen.solid(&turned(svg("M-14 -32 C-14 -50 14 -50 14 -32 Z"), 38.0, 0.0, 4.0), SLATE);
    pen.solid(&circle(0.0, 4.0, 38.0), color);
    pen.flat(&circle(0.0, 4.0, 26.0), CREAM);
    pen.line(&svg("M0 4 L0 -14 M0 4 L13 11"), INK, 5.0);
}

pub fn book(pen: &mut Pen, color: Rgb) {
    pen.solid(&svg("M-34 -38 L26 -46 L36 36 L-26 46 Q-36 46 -37 38 Z"), color);
    pen.solid(&svg("M-28 34 L35 26 L36 36 L-26 45 Q-34 40 -28 34 Z"), WHITE);
    pen.solid(&svg("M-36 -30 Q-36 -38 -28 -39 L28 -47 L36 26 L-28 34 Q-32 35 -35 40 Z"), color);
    pen.line(&svg("M-25 -36 L-18 31"), color.shade(), 4.0);
    pen.flat(&svg("M-10 -24 L20 -28 L22 -12 L-8 -8 Z"), color.spots().mix(CREAM, 0.5));
}

pub fn key(pen: &mut Pen, color: Rgb) {
    let parts = [rect(-6.0, -12.0, 6.0, 46.0), rect(4.0, 32.0, 22.0, 42.0), rect(4.0, 16.0, 18.0, 25.0)];
    pen.solid(&union(&parts), color);
    pen.line(&circle(0.0, -26.0, 16.0), color.outline(), 18.0);
    pen.line(&circle(0.0, -26.0, 16.0), color, 12.0);
    pen.flat(&rect(-6.0, -8.0, 2.0, 6.0), color);
}

pub fn guitar(pen: &mut Pen, color: Rgb) {
    let lean = |path| turned(path, 28.0, 0.0, 0.0);
    pen.solid(&lean(rect(-5.0, -46.0, 5.0, 4.0)), WOOD);
    pen.solid(&lean(round(-8.0, -56.0, 8.0, -42.0, 3.0)), WOOD.shade());
    pen.solid(
        &lean(svg("M0 -8 C14 -12 24 -6 20 8 C18 14 30 20 30 34 C30 50 14 54 0 54 C-14 54 -30 50 -30 34 C-30 20 -18 14 -20 8 C-24 -6 -14 -12 0 -8 Z")),
        color,
    );
    pen.flat(&lean(circle(0.0, 18.0, 9.0)), INK);
    pen.line(&lean(svg("M-9 40 L9 40")), INK, 4.0);
    pen.line(&lean(svg("M0 -44 L0 38")), CREAM, 2.0);
}

pub fn crown(pen: &mut Pen, color: Rgb) {
    pen.solid(&svg("M-38 38 L-47 -22 L-22 2 L0 -40 L22 2 L47 -22 L38 38 Z"), color);
    for (x, y) in [(-46.0, -25.0), (0.0, -42.0), (46.0, -25.0)] {
        pen.solid(&circle(x, y, 6.0), color);
    }
    pen.flat(&svg("M-39 22 L39 22 L38 38 L-38 38 Z"), color.shade());
    for (x, gem) in [(-22.0, Rgb(90, 190, 230)), (0.0, Rgb(240, 92, 110)), (22.0, Rgb(90, 190, 230))] {
        pen.flat(&circle(x, 30.0, 5.0), gem);
    }
}

pub fn heart(pen: &mut Pen, color: Rgb) {
    pen.solid(
        &svg("M0 46 C-30 22 -48 4 -48 -16 C-48 -44 -12 -52 0 -24 C12 -52 48 -44 48 -16 C48 4 30 22 0 46 Z"),
        color,
    );
    pen.flat(&turned(ellipse(-28.0, -20.0, 6.0, 10.0), 30.0, -28.0, -20.0), color.light());
}
