//! What palettes take in a Core ML package, which is more than in a checkpoint where channels have scales.

use crate::palette::Form;

/// Bits of the palettes of a network.
#[derive(Default)]
pub struct Cost {
    palettes: usize,
    weights: u64,
    /// In a checkpoint.
    stored: u64,
    package: u64,
    /// Whether channels of one have scales.
    scaled: bool,
    /// Those that take more in a package than as fp16, with their bits a weight there.
    larger: Vec<(String, f64)>,
}

impl Cost {
    /// Of weights with their names, forms and shapes.
    pub fn of<'a>(palettes: impl IntoIterator<Item = (&'a str, Form, &'a [i64])>) -> Self {
        let mut cost = Self::default();
        for (name, form, shape) in palettes {
            let weights = shape.iter().product::<i64>() as u64;
            let package = form.package_bits(shape);
            cost.palettes += 1;
            cost.weights += weights;
            cost.stored += form.stored_bits(shape);
            cost.package += package;
            cost.scaled |= form.per_channel_scale;
            if package > 16 * weights {
                cost.larger.push((name.to_owned(), package as f64 / weights.max(1) as f64));
            }
        }
        cost
    }

    /// What is to be told where a package takes other than a checkpoint.
    pub fn note(&self) -> Option<String> {
        let each = |bits: u64| bits as f64 / self.weights.max(1) as f64;
        (self.package != self.stored).then(|| {
            format!(
                "in a Core ML package palettes take {:.3} bits each, not {:.3}: there each channel has a palette of its own, \
                 its scale multiplied in",
                each(self.package),
                each(self.stored)
            )
        })
    }

    /// What is to be told where palettes are larger than what they stand for.
    pub fn warning(&self) -> Option<String> {
        let (name, bits) = self.larger.iter().max_by(|(_, a), (_, b)| a.total_cmp(b))?;
        let take = if self.larger.len() == 1 { "takes" } else { "take" };
        let less = if self.scaled { "fewer bits, or no scales of channels," } else { "fewer bits, or larger groups," };
        Some(format!(
            "warning: {} of {} palettized tensors {take} more in a Core ML package than as fp16, {name} {bits:.1} bits a \
             weight: {less} take less",
            self.larger.len(),
            self.palettes
        ))
    }
}
