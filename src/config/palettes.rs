//! Which weights become palettes, and of which form.

use super::{Config, Granularity, PaletteOverride, Palettize};
use crate::coreml::components::Part;
use crate::ops::Parameter;
use crate::palette::Form;
use crate::palette::post_training::{Chosen, chosen_by};

impl Config {
    /// Which network that is palettized on the way into its package needs iOS 18, and what of its palettes.
    pub fn quantized_needs_ios18(&self) -> Option<(&'static str, &'static str)> {
        let free = self.export.parts().into_iter().filter(|part| *part != Part::Unet || !self.palettize.enabled);
        self.export.quantize_nbits.as_ref().filter(|_| self.export.coreml)?.needs_ios18(free)
    }
}

impl Palettize {
    /// The form of palettes of so many bits.
    pub fn form(&self, bits: u32) -> Form {
        Form {
            bits,
            group_size: (self.granularity == Granularity::PerGroupedChannel).then_some(self.group_size),
            axis: self.group_axis,
            cluster_dim: self.cluster_dim,
            per_channel_scale: self.enable_per_channel_scale,
            lut_dtype: self.lut_dtype,
        }
    }

    /// Which of a network's parameters get palettes, and of which forms ([`Palettize::bits_of`]).
    pub fn chosen(&self, parameters: &[Parameter]) -> Chosen {
        chosen_by(parameters, |parameter| {
            let elements = parameter.shape.iter().product::<i64>() as usize;
            Some(self.form(self.bits_of(&parameter.name, elements)?))
        })
    }

    /// What of the palettes needs iOS 18, in the plural; `None` where iOS 16 will do.
    pub fn needs_ios18(&self) -> Option<&'static str> {
        // Where an override matches every layer, none has `n_bits`.
        let rest = (!self.names_every_layer()).then_some(self.n_bits);
        let bits = self.overrides.iter().filter_map(|exception| exception.n_bits).chain(rest);
        let needs = |bits: u32| self.form(bits).needs_ios18();
        // What a checkpoint needs is looked at where that is read.
        let learned = self.enabled && self.palettes.is_none();
        if learned { bits.into_iter().find_map(needs) } else { None }
    }

    /// Bits of the palette of a conv's or linear layer's weight, or `None` where it stays dense: palettes are off, it
    /// has no more than `weight_threshold` elements, or the last of the `overrides` that matches its name says so.
    /// An override with `n_bits` also makes palettes of smaller weights.
    pub fn bits_of(&self, name: &str, elements: usize) -> Option<u32> {
        if !self.enabled {
            return None;
        }
        match self.exception(name) {
            Some(exception) => exception.n_bits.filter(|_| !exception.skip),
            None => (elements > self.weight_threshold).then_some(self.n_bits),
        }
    }

    /// Whether some override matches every weight, as in a recipe: then `n_bits` and `weight_threshold` hold for none.
    pub fn names_every_layer(&self) -> bool {
        self.overrides.iter().any(|exception| exception.pattern == "*")
    }

    /// An override that a later one replaces for every weight, and that later one, by their patterns.
    pub fn shadowed(&self) -> Option<(&str, &str)> {
        let pairs = self.overrides.iter().enumerate();
        let patterns = |place: usize| self.overrides[place + 1..].iter().map(|later| later.pattern.as_str());
        pairs
            .filter_map(|(place, own)| {
                let by = patterns(place).find(|later| *later == "*" || *later == own.pattern)?;
                Some((own.pattern.as_str(), by))
            })
            .next()
    }

    /// The overrides without those that later ones replace.
    pub(super) fn effective_overrides(&self) -> Vec<PaletteOverride> {
        let mut kept: Vec<PaletteOverride> = Vec::new();
        for own in self.overrides.iter().rev() {
            if !kept.iter().any(|later| later.pattern == "*" || later.pattern == own.pattern) {
                kept.push(own.clone());
            }
        }
        kept.reverse();
        kept
    }

    /// The step, of so many, before which assignments freeze (`freeze_fraction`): the first, where they are a checkpoint's.
    pub fn freeze_at(&self, steps: u64) -> u64 {
        if self.palettes.is_some() {
            return 0;
        }
        (steps as f64 * (1.0 - self.freeze_fraction)).round() as u64
    }

    /// The override that holds for a weight.
    pub fn exception(&self, name: &str) -> Option<&PaletteOverride> {
        self.overrides.iter().rev().find(|exception| matches_glob(&exception.pattern, name))
    }
}

/// Whether all of `name` fits `pattern`, in which `*` is any text, `?` any one character.
pub fn matches_glob(pattern: &str, name: &str) -> bool {
    let (pattern, name): (Vec<char>, Vec<char>) = (pattern.chars().collect(), name.chars().collect());
    // The last star and how much of the name it stands for, to come back to when what follows does not fit.
    let (mut p, mut n, mut star) = (0, 0, None);
    while n < name.len() {
        if pattern.get(p) == Some(&'*') {
            star = Some((p, n));
            p += 1;
        } else if pattern.get(p).is_some_and(|&c| c == '?' || c == name[n]) {
            (p, n) = (p + 1, n + 1);
        } else if let Some((at, taken)) = star {
            (p, n, star) = (at + 1, taken + 1, Some((at, taken + 1)));
        } else {
            return false;
        }
    }
    pattern[p..].iter().all(|&c| c == '*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn globs_match_whole_names() {
        for (pattern, name, fits) in [
            ("*", "conv_in.weight", true),
            ("conv_in.weight", "conv_in.weight", true),
            ("conv_in", "conv_in.weight", false),
            ("*.attn1.*", "down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q.weight", true),
            ("*.attn1.*", "down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_q.weight", false),
            ("*to_?.weight", "mid.attn1.to_q.weight", true),
            ("*to_?.weight", "mid.attn1.to_out.0.weight", false),
            ("a*b*c", "a.b.b.cc", true),
            ("", "x", false),
        ] {
            assert_eq!(matches_glob(pattern, name), fits, "{pattern} on {name}");
        }
    }

    #[test]
    fn the_last_override_that_matches_holds() {
        let exception = |pattern: &str, n_bits, skip| PaletteOverride { pattern: pattern.into(), n_bits, skip };
        let overrides =
            vec![exception("*", Some(6), false), exception("*attn*", None, true), exception("*attn2*", Some(8), false)];
        let palettize = Palettize { overrides, ..Palettize::default() };
        let bits: Vec<_> = ["conv_in", "mid.attn1", "mid.attn2"].map(|name| palettize.bits_of(name, 100)).to_vec();
        assert_eq!(bits, [Some(6), None, Some(8)]);
        let plain = Palettize::default();
        assert_eq!((plain.bits_of("a", 2048), plain.bits_of("a", 2049)), (None, Some(4)));
        assert_eq!(Palettize { enabled: false, ..plain }.bits_of("a", 9999), None);
    }
}
