//! Animals and the snowman.

use crate::pen::{BEAK, BLUSH, CREAM, INK, Pen, Rgb, WHITE, WOOD, circle, ellipse, rect, round, svg, turned, union};

pub fn fish(pen: &mut Pen, color: Rgb) {
    pen.solid(&svg("M22 0 C34 -8 40 -22 50 -24 C46 -8 46 8 50 24 C40 22 34 8 22 0 Z"), color);
    pen.solid(&svg("M-14 -22 C-6 -40 14 -40 20 -34 L14 -16 Z"), color.shade());
    pen.solid(&svg("M-48 2 C-36 -24 -4 -34 30 0 C-4 36 -36 28 -48 2 Z"), color);
    pen.solid(&svg("M-6 6 C6 2 14 8 18 16 C8 20 -2 16 -6 6 Z"), color.shade());
    pen.line(&svg("M-20 -16 Q-12 0 -20 17"), color.shade(), 3.5);
    pen.eye(-31.0, -4.0, 4.5);
}

pub fn bird(pen: &mut Pen, color: Rgb) {
    pen.line(&svg("M-4 36 L-4 47 M10 36 L10 47"), BEAK.shade(), 4.5);
    pen.solid(&svg("M20 0 L50 -18 L46 10 L22 18 Z"), color.shade());
    pen.solid(&svg("M-40 -16 L-52 -10 L-38 -4 Z"), BEAK);
    pen.solid(&svg("M-14 -42 C4 -42 12 -28 16 -16 C30 -10 40 6 32 22 C26 36 10 40 0 40 C-24 40 -40 22 -40 -14 C-40 -32 -28 -42 -14 -42 Z"), color);
    pen.flat(&svg("M-36 6 C-20 0 -6 16 -6 36 C-22 34 -33 24 -36 6 Z"), color.light());
    pen.solid(&svg("M-2 -4 C14 -8 34 4 36 20 C18 28 -2 18 -2 -4 Z"), color.shade());
    pen.eye(-22.0, -20.0, 4.5);
}

pub fn duck(pen: &mut Pen, color: Rgb) {
    pen.solid(&svg("M-36 -24 C-44 -24 -52 -20 -52 -15 C-50 -10 -42 -10 -32 -12 Z"), BEAK);
    pen.solid(
        &svg("M-18 -46 C-2 -46 6 -32 0 -16 C-2 -8 2 -4 12 -4 C26 -4 36 -6 48 -18 C52 12 40 42 4 42 C-30 42 -44 26 -36 4 C-34 -2 -34 -6 -36 -14 C-44 -34 -32 -46 -18 -46 Z"),
        color,
    );
    pen.solid(&svg("M-4 10 C10 4 28 6 36 8 C32 26 4 32 -4 10 Z"), color.shade());
    pen.eye(-20.0, -26.0, 4.5);
}

/// Two eyes, a nose and a mouth.
fn face(pen: &mut Pen, y: f32, nose: Rgb) {
    pen.eye(-17.0, y, 5.0);
    pen.eye(17.0, y, 5.0);
    pen.line(&svg(&format!("M-9 {0} Q-4 {1} 0 {2} Q4 {1} 9 {0}", y + 20.0, y + 26.0, y + 18.0)), INK, 2.8);
    pen.flat(&svg(&format!("M-6 {0} L6 {0} L0 {1} Z", y + 10.0, y + 17.0)), nose);
}

pub fn cat(pen: &mut Pen, color: Rgb) {
    for side in [-1.0, 1.0] {
        pen.solid(&svg(&format!("M{} -4 L{} -48 L{} -28 Z", 42.0 * side, 38.0 * side, 6.0 * side)), color);
        pen.flat(&svg(&format!("M{} -18 L{} -38 L{} -27 Z", 35.0 * side, 34.0 * side, 19.0 * side)), BLUSH);
    }
    pen.solid(&ellipse(0.0, 8.0, 45.0, 37.0), color);
    face(pen, 2.0, BLUSH.shade());
    pen.line(&svg("M-26 16 L-47 11 M-26 21 L-47 24 M26 16 L47 11 M26 21 L47 24"), color.outline(), 2.4);
}

pub fn dog(pen: &mut Pen, color: Rgb) {
    pen.solid(
        &svg("M-30 -40 C-14 -50 14 -50 30 -40 C40 -20 38 8 32 24 C24 48 -24 48 -32 24 C-38 8 -40 -20 -30 -40 Z"),
        color,
    );
    pen.flat(
        &svg("M0 -30 C10 -10 24 4 26 22 C22 44 -22 44 -26 22 C-24 4 -10 -10 0 -30 Z"),
        color.light().mix(CREAM, 0.35),
    );
    for side in [-1.0, 1.0] {
        let ear = format!(
            "M{} -42 C{} -46 {} -20 {} 4 C{} 14 {} 10 {} -2 C{} -18 {} -28 {} -42 Z",
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
    pen.eye(-15.0, -10.0, 5.0);
    pen.eye(15.0, -10.0, 5.0);
    pen.solid(&svg("M-7 24 L7 24 Q9 42 0 42 Q-9 42 -7 24 Z"), BLUSH);
    pen.line(&svg("M0 10 L0 22 M-14 20 Q-7 28 0 22 Q7 28 14 20"), INK, 2.8);
    pen.flat(&ellipse(0.0, 8.0, 9.0, 6.5), INK);
}

pub fn rabbit(pen: &mut Pen, color: Rgb) {
    for side in [-1.0, 1.0] {
        let (x, angle) = (17.0 * side, 9.0 * side);
        pen.solid(&turned(ellipse(x, -24.0, 11.0, 29.0), angle, x, 0.0), color);
        pen.flat(&turned(ellipse(x, -24.0, 5.0, 20.0), angle, x, 0.0), BLUSH);
    }
    pen.solid(&ellipse(0.0, 19.0, 38.0, 29.0), color);
    face(pen, 12.0, BLUSH.shade());
    pen.flat(&rect(-4.0, 34.0, 4.0, 41.0), WHITE);
    pen.line(&svg("M0 33 L0 41"), INK, 1.2);
}

pub fn snail(pen: &mut Pen, color: Rgb) {
    pen.line(&svg("M-36 0 L-46 -18 M-30 0 L-28 -20"), CREAM.outline(), 4.0);
    pen.flat(&circle(-46.0, -19.0, 4.5), INK);
    pen.flat(&circle(-28.0, -21.0, 4.5), INK);
    pen.solid(
        &svg("M-46 8 C-46 -8 -24 -8 -22 10 C-20 26 -10 26 10 26 C30 26 42 32 50 42 L-30 42 C-44 42 -46 26 -46 8 Z"),
        CREAM.mix(BEAK, 0.25),
    );
    pen.solid(&circle(10.0, 0.0, 32.0), color);
    pen.line(
        &svg("M34 16 C26 26 6 26 -4 18 C-16 6 -12 -18 8 -20 C26 -20 32 0 20 8 C10 14 0 6 4 -2 C6 -6 10 -6 12 -4"),
        color.outline(),
        4.0,
    );
    pen.flat(&circle(-36.0, 8.0, 3.0), INK);
}

pub fn butterfly(pen: &mut Pen, color: Rgb) {
    for side in [-1.0, 1.0] {
        let at = |x: f32| x * side;
        let lower = format!(
            "M{} 4 C{} 4 {} 20 {} 34 C{} 48 {} 44 {} 16 Z",
            at(2.0),
            at(34.0),
            at(40.0),
            at(32.0),
            at(22.0),
            at(6.0),
            at(2.0)
        );
        let upper = format!(
            "M{} 6 C{} -20 {} -46 {} -44 C{} -42 {} -2 {} 8 Z",
            at(2.0),
            at(10.0),
            at(30.0),
            at(42.0),
            at(56.0),
            at(48.0),
            at(2.0)
        );
        pen.solid(&svg(&lower), color.mix(INK, 0.08));
        pen.solid(&svg(&upper), color);
        pen.flat(&circle(at(34.0), -24.0, 7.0), color.spots());
        pen.flat(&circle(at(22.0), 25.0, 5.0), color.spots());
        pen.line(&svg(&format!("M{} -20 Q{} -36 {} -42", at(1.0), at(4.0), at(12.0))), INK, 3.0);
    }
    pen.flat(&ellipse(0.0, 4.0, 5.5, 28.0), INK);
}

pub fn ladybug(pen: &mut Pen, color: Rgb) {
    pen.line(
        &svg("M-36 14 L-48 20 M36 14 L48 20 M-36 32 L-46 40 M36 32 L46 40 M-38 -2 L-49 -6 M38 -2 L49 -6"),
        INK,
        4.5,
    );
    pen.line(&svg("M-8 -38 L-16 -49 M8 -38 L16 -49"), INK, 3.0);
    pen.flat(&ellipse(0.0, -26.0, 24.0, 17.0), INK);
    pen.solid(&ellipse(0.0, 11.0, 40.0, 36.0), color);
    pen.line(&svg("M0 -24 L0 46"), INK, 4.0);
    let dots = if color.0 < 90 && color.1 < 90 && color.2 < 90 { WHITE } else { INK };
    for (x, y, r) in [(-18.0, -4.0, 7.0), (18.0, -4.0, 7.0), (-20.0, 21.0, 7.0), (20.0, 21.0, 7.0)] {
        pen.flat(&circle(x, y, r), dots);
    }
    pen.flat(&circle(-10.0, -31.0, 4.0), WHITE);
    pen.flat(&circle(10.0, -31.0, 4.0), WHITE);
}

pub fn snowman(pen: &mut Pen, color: Rgb) {
    pen.line(&svg("M-22 4 L-45 -10 M22 4 L45 -10"), WOOD.shade(), 4.0);
    pen.solid(&circle(0.0, 22.0, 26.0), color);
    pen.solid(&circle(0.0, -16.0, 20.0), color);
    pen.solid(
        &union(&[round(-13.0, -52.0, 13.0, -32.0, 2.0), round(-22.0, -36.0, 22.0, -30.0, 2.0)]),
        INK.mix(SCARF, 0.15),
    );
    pen.solid(&union(&[round(-18.0, -3.0, 18.0, 6.0, 4.0), round(6.0, 2.0, 15.0, 22.0, 3.0)]), SCARF);
    pen.flat(&circle(-8.0, -20.0, 3.0), color.spots().mix(INK, if color.0 > 90 || color.1 > 90 { 1.0 } else { 0.0 }));
    pen.flat(&circle(8.0, -20.0, 3.0), color.spots().mix(INK, if color.0 > 90 || color.1 > 90 { 1.0 } else { 0.0 }));
    pen.flat(&svg("M-1 -15 L-18 -9 L0 -9 Z"), BEAK);
    for y in [16.0, 30.0] {
        pen.flat(&circle(-3.0, y, 3.0), INK.mix(WHITE, 0.2));
    }
}

const SCARF: Rgb = Rgb(214, 72, 78);
