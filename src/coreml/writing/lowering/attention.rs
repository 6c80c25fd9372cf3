//! Attention, in each of the three implementations that Apple's converter has.
//!
//! ORIGINAL takes all heads in one `matmul`. The other two, for the Neural Engine, take one head at a time, channels first,
//! nothing reshaped or transposed but the keys.
//!
//! Apple's SPLIT_EINSUM (Apple 2022, "Deploying Transformers on the Apple Neural Engine") on queries `[B, C, 1, T]`, keys
//! and values `[B, C, 1, S]`, d = C / heads. For each head:
//!
//! | value | equation | shape |
//! |---|---|---|
//! | scores | `bkhc,bchq->bkhq` of kᵀ and q | `[B, S, 1, T]` |
//! | weights | softmax over axis 1 | `[B, S, 1, T]` |
//! | result | `bchk,bkhq->bchq` of v and the weights | `[B, d, 1, T]` |
//!
//! SPLIT_EINSUM_V2 does that for 512 queries at a time, so that the scores stay small. Programs tell these packages from
//! those for the GPU by their `einsum` operations, and these two equations are the only ones that Core ML takes.

use std::io::{Seek, Write};

use anyhow::{Result, ensure};
use half::f16;

use super::operations::half_factors;
use crate::coreml::AttentionImplementation;
use crate::coreml::format::proto::data_type::FLOAT32;
use crate::ops::Mask;

use super::interpreter::MilOps;
use crate::coreml::writing::program::{Parameter, Var};

/// Queries that SPLIT_EINSUM_V2 takes at a time, as Apple's does. The last ones of a number that this does not divide
/// are a smaller part.
pub const QUERIES: i64 = 512;

impl<W: Write + Seek> MilOps<'_, W> {
    /// Softmax(q kᵀ / √d) v. Only what looks at everything is split: causal attention is a text encoder's, and small.
    pub(super) fn attend(&mut self, q: &Var, k: &Var, v: &Var, heads: i64, mask: Mask, out: Vec<i64>) -> Result<Var> {
        use AttentionImplementation::{Original, SplitEinsum, SplitEinsumV2};
        match (mask, self.attention) {
            (Mask::Causal, _) | (_, Original) => self.attend_at_once(q, k, v, heads, mask, out),
            (Mask::None, SplitEinsum) => self.attend_by_head(q, k, v, heads, i64::MAX / 2),
            (Mask::None, SplitEinsumV2) => self.attend_by_head(q, k, v, heads, QUERIES),
        }
    }

    /// `q` and `k` of which the products are those of the given ones times `factor`: see [`half_factors`].
    fn scaled_pair(&mut self, q: &Var, k: &Var, factor: f64) -> (Var, Var) {
        if q.element == FLOAT32 {
            let factor = Parameter::Float(factor as f32);
            return (self.binary("mul", "query_scaled", q, factor), k.clone());
        }
        let (first, second) = half_factors(factor);
        let q = self.binary("mul", "query_scaled", q, Parameter::Half(first));
        if second == f16::ONE {
            return (q, k.clone());
        }
        (q, self.binary("mul", "key_scaled", k, Parameter::Half(second)))
    }

    /// All heads in one `matmul`.
    fn attend_at_once(&mut self, q: &Var, k: &Var, v: &Var, heads: i64, mask: Mask, out: Vec<i64>) -> Result<Var> {
        let (batch, channels, tokens, sources) = (q.shape[0], q.shape[1], q.shape[3], k.shape[3]);
        let size = channels / heads;
        ensure!(size * heads == channels, "{channels} channels do not split into {heads} heads");
        let (q, k) = self.scaled_pair(q, k, 1.0 / (size as f64).sqrt());
        let q = self.reshape("query", &q, vec![batch, heads, size, tokens]);
        let k = self.reshape("key", &k, vec![batch, heads, size, sources]);
        let v = self.reshape("value", v, vec![batch, heads, size, sources]);
        let matmul = |ops: &mut Self, hint: &str, x: &Var, y: &Var, transpose_y: bool, shape: Vec<i64>| {
            let parameters = [
                ("x", Parameter::Var(x)),
                ("y", Parameter::Var(y)),
                ("transpose_x", Parameter::Bool(!transpose_y)),
                ("transpose_y", Parameter::Bool(transpose_y)),
            ];
            ops.program.op("matmul", hint, &parameters, x.element, shape)
        };
        let mut scores = matmul(self, "attention_scores", &q, &k, false, vec![batch, heads, tokens, sources]);
        if mask == Mask::Causal {
            ensure!(tokens == sources, "{tokens} tokens cannot look only at those before them of {sources}");
            let mask = self.causal_mask(tokens)?;
            scores = self.binary("add", "attention_masked", &scores, Parameter::Var(&mask));
        }
        let parameters = [("x", Parameter::Var(&scores)), ("axis", Parameter::Int(3))];
        let weights =
            self.program.op("softmax", "attention_weights", &parameters, scores.element, scores.shape.clone());
        let mixed = matmul(self, "attention_values", &v, &weights, true, vec![batch, heads, size, tokens]);
        Ok(self.reshape("attention", &mixed, out))
    }

    /// Attention head by head, at most `most` queries at a time.
    fn attend_by_head(&mut self, q: &Var, k: &Var, v: &Var, heads: i64, most: i64) -> Result<Var> {
        let (batch, channels, queries, keys) = (q.shape[0], q.shape[1], q.shape[3], k.shape[3]);
        let size = channels / heads;
        ensure!(size * heads == channels, "{channels} channels do not split into {heads} heads");
        let (q, k) = self.scaled_pair(q, k, 1.0 / (size as f64).sqrt());
        let parameters = [("x", Parameter::Var(&k)), ("perm", Parameter::Ints(&[0, 3, 2, 1]))];
        let k = self.program.op("transpose", "key_transposed", &parameters, k.element, vec![batch, keys, 1, channels]);
        let mut by_head = Vec::new();
        for head in 0..heads {
            let (from, to) = (head * size, (head + 1) * size);
            let q = self.part("query", &q, 1, from, to);
            let k = self.part("key", &k, 3, from, to);
            let v = self.part("value", v, 1, from, to);
            let mut parts = Vec::new();
            for from in (0..queries).step_by(most as usize) {
                let q = self.part("query_part", &q, 3, from, queries.min(from + most));
                let shape = vec![batch, keys, 1, q.shape[3]];
                let scores = self.einsum("attention_scores", "bkhc,bchq->bkhq", [&k, &q], shape.clone());
                let parameters = [("x", Parameter::Var(&scores)), ("axis", Parameter::Int(1))];
                let weights = self.program.op("softmax", "attention_weights", &parameters, scores.element, shape);
                let shape = vec![batch, size, 1, q.shape[3]];
                parts.push(self.einsum("attention_values", "bchk,bkhq->bchq", [&v, &weights], shape));
            }
            by_head.push(self.joined("attention_head", parts, 3));
        }
        Ok(self.joined("attention", by_head, 1))
    }

    /// `x[from..to]` along `axis`, `x` itself where that is all of it.
    fn part(&mut self, hint: &str, x: &Var, axis: usize, from: i64, to: i64) -> Var {
        if (from, to) == (0, x.shape[axis]) {
            return x.clone();
        }
        let (mut begin, mut end, mut whole, mut shape) = ([0; 4], [0; 4], [true; 4], x.shape.clone());
        (begin[axis], end[axis], whole[axis], shape[axis]) = (from as i32, to as i32, false, to - from);
        // Ends of axes that are taken whole are masked and may be anything: their sizes, as coremltools has them.
        for (axis, end) in end.iter_mut().enumerate().filter(|(axis, _)| whole[*axis]) {
            *end = x.shape[axis] as i32;
        }
        let parameters = [
            ("x", Parameter::Var(x)),
            ("begin", Parameter::Ints(&begin)),
            ("end", Parameter::Ints(&end)),
            ("end_mask", Parameter::Bools(&whole)),
        ];
        self.program.op("slice_by_index", hint, &parameters, x.element, shape)
    }

    fn einsum(&mut self, hint: &str, equation: &str, values: [&Var; 2], shape: Vec<i64>) -> Var {
        let element = values[0].element;
        let parameters = [("values", Parameter::Vars(values.into())), ("equation", Parameter::Text(equation))];
        self.program.op("einsum", hint, &parameters, element, shape)
    }

    /// The values along `axis`; a single one as it is.
    fn joined(&mut self, hint: &str, mut values: Vec<Var>, axis: usize) -> Var {
        if values.len() == 1 {
            return values.remove(0);
        }
        self.concat(hint, values.iter().collect(), axis)
    }
}
