//! The clustering between a master weight and the weight that the network sees: soft while assignments learn
//! ([`DkmLayer`]), then fixed ([`Frozen`]).

use anyhow::Result;
use tch::{Device, Tensor};

use crate::config::Palettize;
use crate::ops::{Parameter, Weights};
use crate::palette::codes::Code;
use crate::palette::{DkmLayer, Frozen, Palette, Soften};

/// Which weights get palettes, and how: the `[palettize]` table.
pub struct PalettePlan<'a>(pub &'a Palettize);

impl PalettePlan<'_> {
    /// The bits of a parameter's palette; `None` leaves it in fp16. The last override that matches holds.
    pub fn bits(&self, parameter: &Parameter) -> Option<u32> {
        let elements: i64 = parameter.shape.iter().product();
        if !parameter.palettizable || elements <= self.0.weight_threshold as i64 {
            return None;
        }
        match self.0.overrides.iter().rev().find(|o| glob_matches(&o.pattern, &parameter.name)) {
            Some(one) if one.skip => None,
            Some(one) => Some(one.n_bits.unwrap_or(self.0.n_bits)),
            None => Some(self.0.n_bits),
        }
    }

    /// The palette of one parameter, from the k-means of its weight (fp32).
    ///
    /// # Errors
    /// The weight is not finite.
    pub fn layer(&self, parameter: &Parameter, weight: &Tensor) -> Result<Option<LayerPalette>> {
        let Some(bits) = self.bits(parameter) else { return Ok(None) };
        let layer = DkmLayer::new(&parameter.name, bits, weight)?;
        let start = layer.kmeans_mse / layer.power.max(f64::MIN_POSITIVE);
        Ok(Some(LayerPalette {
            phase: Phase::Soft(layer),
            iterations: self.0.kmeans_max_iter,
            shape: parameter.shape.clone(),
            relative_error: start,
        }))
    }
}

/// Whether `name` fits `pattern`: `*` is any run of characters, `?` any one.
fn glob_matches(pattern: &str, name: &str) -> bool {
    let (pattern, name) = (pattern.as_bytes(), name.as_bytes());
    let (mut p, mut n) = (0, 0);
    // Where the last star is, and how much of the name it has taken so far.
    let mut star: Option<(usize, usize)> = None;
    while n < name.len() {
        match pattern.get(p) {
            Some(b'*') => {
                star = Some((p, n));
                p += 1;
            }
            Some(&c) if c == b'?' || c == name[n] => {
                p += 1;
                n += 1;
            }
            _ => match star {
                Some((at, taken)) => {
                    star = Some((at, taken + 1));
                    p = at + 1;
                    n = taken + 1;
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|&c| c == b'*')
}

enum Phase {
    Soft(DkmLayer),
    Frozen(Frozen),
}

/// One layer's palette during training.
pub struct LayerPalette {
    phase: Phase,
    iterations: usize,
    shape: Vec<i64>,
    /// Squared error of the hard palette over the sum of squares of the master weight, as of the last step.
    pub relative_error: f64,
}

/// What the network sees of one parameter in one step.
pub struct Seen {
    /// fp32; its gradient is asked for.
    pub leaf: Tensor,
    soften: Option<Soften>,
}

impl Seen {
    /// A parameter without palette: itself.
    pub fn plain(value: &Tensor) -> Self {
        Self { leaf: value.detach(), soften: None }
    }
}

impl LayerPalette {
    /// The weight that the network sees at ρ = `temperature`; moves the centroids.
    ///
    /// # Errors
    /// The master weight is not finite.
    pub fn seen(&mut self, value: &Tensor, temperature: f64) -> Result<Seen> {
        match &mut self.phase {
            Phase::Soft(layer) => {
                // Few entries need few bins; see [`Code`].
                let code = if layer.bits <= 2 { Code::Bf16 } else { Code::F16 };
                let (leaf, soften) = layer.soften(value, temperature, self.iterations, code)?;
                self.relative_error = soften.hard_error() / layer.power.max(f64::MIN_POSITIVE);
                Ok(Seen { leaf, soften: Some(soften) })
            }
            Phase::Frozen(frozen) => Ok(Seen { leaf: frozen.dense()?, soften: None }),
        }
    }

    /// From the gradient of what the network saw to that of what the optimizer moves.
    ///
    /// # Errors
    /// Shapes differ.
    pub fn gradient(&self, seen: &Seen, upstream: &Tensor) -> Result<Tensor> {
        match (&self.phase, &seen.soften) {
            (Phase::Frozen(frozen), _) => frozen.gradient(upstream),
            (Phase::Soft(_), Some(soften)) => soften.backward(upstream),
            (Phase::Soft(_), None) => Ok(upstream.shallow_clone()),
        }
    }

    /// Fixes the assignments; gives the entries, which the optimizer then moves in place. `None` when they were fixed.
    ///
    /// # Errors
    /// The master weight is not finite.
    pub fn freeze(&mut self, value: &Tensor) -> Result<Option<Tensor>> {
        let Phase::Soft(layer) = &self.phase else { return Ok(None) };
        let frozen = layer.freeze(value)?;
        let entries = frozen.entries.shallow_clone();
        self.phase = Phase::Frozen(frozen);
        Ok(Some(entries))
    }

    /// The palette as it would ship now.
    ///
    /// # Errors
    /// Weights or entries are not finite.
    pub fn hard(&self, value: &Tensor) -> Result<Palette> {
        match &self.phase {
            Phase::Soft(layer) => layer.hard(value),
            Phase::Frozen(frozen) => frozen.palette(),
        }
    }

    /// The state beside the slot's own value.
    pub fn tensors(&self) -> Vec<(String, Tensor)> {
        match &self.phase {
            Phase::Soft(layer) => layer.tensors(),
            Phase::Frozen(frozen) => frozen.tensors(),
        }
    }

    /// Puts back what [`LayerPalette::tensors`] gave. With fixed assignments it gives the entries, as
    /// [`LayerPalette::freeze`].
    ///
    /// # Errors
    /// A tensor is missing or of another shape.
    pub fn restore(&mut self, tensors: &Weights, frozen: bool, device: Device) -> Result<Option<Tensor>> {
        let (name, bits) = match &self.phase {
            Phase::Soft(layer) => (layer.name.clone(), layer.bits),
            Phase::Frozen(frozen) => (frozen.name.clone(), frozen.bits),
        };
        if !frozen {
            self.phase = Phase::Soft(DkmLayer::restore(&name, bits, tensors)?);
            return Ok(None);
        }
        let frozen = Frozen::restore(&name, bits, &self.shape, tensors, device)?;
        let entries = frozen.entries.shallow_clone();
        self.phase = Phase::Frozen(frozen);
        Ok(Some(entries))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn globs_match_as_written() {
        for (pattern, name, expected) in [
            ("*", "conv_in.weight", true),
            ("*.attn1.*", "a.b.attn1.to_q.weight", true),
            ("*.attn1.*", "attn1.to_q.weight", false),
            ("conv_in.weight", "conv_in.weight", true),
            ("conv_in.weight", "conv_in.weights", false),
            ("conv_?n*", "conv_in.weight", true),
            ("*weight*in", "weight_in_weight_bin", true),
            ("", "a", false),
        ] {
            assert_eq!(glob_matches(pattern, name), expected, "{pattern} on {name}");
        }
    }
}
