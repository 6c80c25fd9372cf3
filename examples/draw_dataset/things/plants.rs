//! Fruit and plants.

use crate::pen::{CREAM, GOLD, LEAF, Pen, Rgb, WOOD, circle, ellipse, rect, round, svg, turned, union};

pub fn apple(pen: &mut Pen, color: Rgb) {
    pen.rod(&svg("M0 -20 Q0 -34 7 -44"), WOOD, 4.0);
    pen.solid(
        &svg("M0 -22 C-14 -36 -44 -30 -43 2 C-41 30 -22 48 -8 45 C-3 43 3 43 8 45 C22 48 41 30 43 2 C44 -30 14 -36 0 -22 Z"),
        color,
    );
    pen.solid(&svg("M8 -32 C12 -48 30 -50 38 -46 C34 -32 20 -26 8 -32 Z"), LEAF);
    pen.flat(&turned(ellipse(-25.0, -8.0, 6.0, 11.0), 20.0, -25.0, -8.0), color.light());
}

pub fn banana(pen: &mut Pen, color: Rgb) {
    pen.solid(
        &svg("M-42 -32 C-42 18 -4 52 42 30 C48 26 47 18 41 16 C14 20 -12 2 -24 -36 C-28 -46 -42 -44 -42 -32 Z"),
        color,
    );
    pen.solid(&svg("M-40 -34 L-42 -48 L-31 -49 L-26 -38 Q-33 -33 -40 -34 Z"), WOOD);
    pen.flat(&svg("M38 17 L46 18 Q48 26 42 30 Q36 26 38 17 Z"), WOOD);
    pen.line(&svg("M-33 -22 C-28 10 -4 32 30 25"), color.shade(), 3.5);
}

pub fn pear(pen: &mut Pen, color: Rgb) {
    pen.rod(&svg("M0 -36 Q0 -44 5 -49"), WOOD, 4.0);
    pen.solid(
        &svg("M0 -40 C-18 -40 -15 -18 -22 -8 C-34 4 -38 14 -35 27 C-30 44 -12 47 0 47 C12 47 30 44 35 27 C38 14 34 4 22 -8 C15 -18 18 -40 0 -40 Z"),
        color,
    );
    pen.solid(&svg("M6 -40 C12 -50 26 -50 32 -44 C26 -34 14 -32 6 -40 Z"), LEAF);
    pen.flat(&turned(ellipse(-18.0, 14.0, 6.0, 11.0), 25.0, -18.0, 14.0), color.light());
}

pub fn cherry(pen: &mut Pen, color: Rgb) {
    pen.line(&svg("M10 -42 Q-20 -20 -22 10 M10 -42 Q20 -16 22 14"), LEAF.outline(), 7.0);
    pen.solid(&svg("M10 -42 C18 -52 38 -48 44 -34 C32 -24 16 -28 10 -42 Z"), LEAF);
    for (x, y) in [(-23.0, 22.0), (23.0, 26.0)] {
        pen.solid(&circle(x, y, 21.0), color);
        pen.flat(&circle(x - 8.0, y - 7.0, 5.0), color.light());
    }
}

pub fn mushroom(pen: &mut Pen, color: Rgb) {
    pen.solid(&svg("M-14 2 C-12 18 -18 30 -18 40 Q0 50 18 40 C18 30 12 18 14 2 Z"), CREAM);
    pen.solid(&svg("M-47 6 C-48 -30 -24 -46 0 -46 C24 -46 48 -30 47 6 C30 15 -30 15 -47 6 Z"), color);
    let spots = [(-26.0, -10.0, 7.0), (0.0, -28.0, 8.0), (24.0, -14.0, 7.5), (2.0, -3.0, 6.0)];
    for (x, y, r) in spots {
        pen.flat(&circle(x, y, r), color.spots());
    }
}

pub fn tree(pen: &mut Pen, color: Rgb) {
    pen.solid(&svg("M-8 0 L-10 48 L10 48 L8 0 Z"), WOOD);
    let crown = [
        circle(-22.0, -4.0, 20.0),
        circle(22.0, -4.0, 20.0),
        circle(-14.0, -26.0, 19.0),
        circle(14.0, -26.0, 19.0),
        circle(0.0, -4.0, 20.0),
    ];
    pen.solid(&union(&crown), color);
    pen.flat(&circle(-16.0, -26.0, 7.0), color.light());
}

pub fn pine(pen: &mut Pen, color: Rgb) {
    pen.solid(&rect(-7.0, 30.0, 7.0, 49.0), WOOD);
    pen.solid(&svg("M0 -8 L38 36 L-38 36 Z"), color);
    pen.solid(&svg("M0 -30 L31 12 L-31 12 Z"), color);
    pen.solid(&svg("M0 -50 L23 -12 L-23 -12 Z"), color);
}

pub fn cactus(pen: &mut Pen, color: Rgb) {
    pen.rod(&svg("M-2 10 L-30 10 L-30 -14"), color, 13.0);
    pen.rod(&svg("M2 0 L30 0 L30 -22"), color, 13.0);
    pen.solid(&round(-14.0, -48.0, 14.0, 47.0, 13.0), color);
    pen.line(&svg("M0 -36 L0 40 M-30 8 L-30 -12 M30 -4 L30 -20"), color.light(), 3.0);
}

pub fn flower(pen: &mut Pen, color: Rgb) {
    pen.rod(&svg("M0 0 L0 47"), LEAF, 5.0);
    pen.solid(&svg("M2 40 C10 20 30 20 36 26 C30 42 14 46 2 40 Z"), LEAF);
    pen.solid(&svg("M-2 44 C-10 24 -30 24 -36 30 C-30 46 -14 50 -2 44 Z"), LEAF);
    let petals: Vec<_> =
        (0..6).map(|petal| turned(circle(0.0, -36.0, 13.0), 60.0 * petal as f32, 0.0, -14.0)).collect();
    pen.solid(&union(&petals), color);
    pen.solid(&circle(0.0, -14.0, 11.0), if color.0 > 230 && color.1 > 120 && color.2 < 120 { WOOD } else { GOLD });
}

pub fn tulip(pen: &mut Pen, color: Rgb) {
    pen.rod(&svg("M0 0 L0 47"), LEAF, 5.0);
    pen.solid(&svg("M2 46 C8 16 26 4 38 0 C38 24 24 44 2 46 Z"), LEAF);
    pen.solid(&svg("M-2 46 C-8 22 -24 12 -36 10 C-36 30 -22 46 -2 46 Z"), LEAF);
    pen.solid(&svg("M-28 -44 L-12 -28 L0 -49 L12 -28 L28 -44 C32 -10 22 8 0 8 C-22 8 -32 -10 -28 -44 Z"), color);
    pen.line(&svg("M-12 -28 Q-10 -10 0 2 M12 -28 Q10 -10 0 2"), color.shade(), 3.0);
}
