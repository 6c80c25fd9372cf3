//! Words that only text encoders use: tables of tokens and positions, the causal mask, the end of the text.
//!
//! Look-ups, comparisons and whole numbers run on the CPU, before and after what the other units compute.

use std::io::{Seek, Write};

use anyhow::{Context, Result, bail, ensure};
use half::f16;

use super::interpreter::{MilOps, MilValue};
use super::operations::half_factors;
use crate::coreml::DeploymentTarget;
use crate::coreml::format::proto::data_type::{BOOL, FLOAT16, INT32};
use crate::coreml::prompt::Prompt;
use crate::coreml::writing::program::{Parameter, Var};
use crate::coreml::writing::weights::Weight;

/// What the mask adds to the score of a token that must not be looked at. As good as −∞, since exp(−10⁴) is 0 in fp16
/// and in fp32 alike, and a number, which −∞ is not to everything that reads packages.
const FORBIDDEN: f16 = f16::from_f32_const(-1e4);

impl<W: Write + Seek> MilOps<'_, W> {
    /// Rows of the table `name.weight` `[rows, width]` at `ids` `[B, T]`, as tokens `[B, width, 1, T]`.
    pub(super) fn look_up(&mut self, ids: &Var, name: &str, rows: i64, width: i64, out: Vec<i64>) -> Result<Var> {
        let table = self.parameter(&format!("{name}.weight"), &[rows, width], &[rows, width])?;
        let (batch, tokens) = (out[0], out[3]);
        let found = self.gather(name, &table, ids, 0, vec![batch, tokens, width]);
        let parameters = [("x", Parameter::Var(&found)), ("perm", Parameter::Ints(&[0, 2, 1]))];
        let turned = self.program.op("transpose", "channels_first", &parameters, FLOAT16, vec![batch, width, tokens]);
        let parameters = [("x", Parameter::Var(&turned)), ("axes", Parameter::Ints(&[2]))];
        Ok(self.program.op("expand_dims", "embedded", &parameters, FLOAT16, out))
    }

    /// Tokens `[B, C, 1, T]` as `[B, T, C]`.
    pub(super) fn tokens_last(&mut self, x: &Var, name: &str) -> Var {
        let (batch, channels, tokens) = (x.shape[0], x.shape[1], x.shape[3]);
        let parameters = [("x", Parameter::Var(x)), ("axes", Parameter::Ints(&[2]))];
        let flat = self.program.op(
            "squeeze",
            &format!("{name}_squeezed"),
            &parameters,
            x.element,
            vec![batch, channels, tokens],
        );
        let parameters = [("x", Parameter::Var(&flat)), ("perm", Parameter::Ints(&[0, 2, 1]))];
        let hint = format!("{name}_in_half");
        self.program.op("transpose", &hint, &parameters, x.element, vec![batch, tokens, channels])
    }

    /// Tokens `[B, C, 1, T]` plus the first T rows of the table `name.weight` `[rows, C]`, which is written turned.
    /// It is never palettized: every token hears of it, and it is small.
    pub(super) fn add_rows(&mut self, x: &Var, name: &str, rows: i64) -> Result<Var> {
        let (channels, tokens) = (x.shape[1], x.shape[3]);
        let table = format!("{name}.weight");
        ensure!(tokens <= rows, "`{table}` has {rows} positions, too few for {tokens} tokens");
        let Weight::Dense { values, .. } = self.weight(&table, &[rows, channels])? else {
            bail!("`{table}` is a palette; position embeddings are not palettized")
        };
        let (channels, tokens) = (channels as usize, tokens as usize);
        let turned: Vec<f16> =
            (0..channels).flat_map(|c| (0..tokens).map(move |t| t * channels + c)).map(|at| values[at]).collect();
        let positions = self.constant(&table, &turned, &[1, x.shape[1], 1, x.shape[3]])?;
        Ok(self.binary("add", "positions_added", x, Parameter::Var(&positions)))
    }

    /// `[1, 1, T, T]`: nothing on and below the diagonal, [`FORBIDDEN`] above.
    pub(super) fn causal_mask(&mut self, tokens: i64) -> Result<Var> {
        let shape = [1, 1, tokens, tokens];
        if let Some(mask) = self.causal_mask.as_ref().filter(|mask| mask.shape == shape) {
            return Ok(mask.clone());
        }
        let entries = (0..tokens).flat_map(|query| (0..tokens).map(move |key| key > query));
        let bytes: Vec<u8> =
            entries.flat_map(|above| if above { FORBIDDEN } else { f16::ZERO }.to_le_bytes()).collect();
        let mask =
            self.program.tensor("causal_mask", FLOAT16, &shape, &bytes).context("cannot write the causal mask")?;
        self.causal_mask = Some(mask.clone());
        Ok(mask)
    }

    /// The token of `x` `[1, C, 1, T]` at the end-of-text of `ids` `[1, T]`: `[1, C, 1, 1]`.
    pub(super) fn take_end(&mut self, x: &Var, ids: &Var, eos: i64, out: Vec<i64>) -> Result<Var> {
        ensure!(ids.shape[0] == 1, "texts are pooled one at a time, and this batch has {}", ids.shape[0]);
        let tokens = ids.shape[1] as i32;
        // Old configs name 2 and mean the largest id.
        let largest;
        let end = if eos == 2 {
            largest = self.largest("largest_id", ids);
            Parameter::Var(&largest)
        } else {
            Parameter::Int(i32::try_from(eos).context("`eos_token_id`")?)
        };
        let parameters = [("x", Parameter::Var(ids)), ("y", end)];
        let ends = self.program.op("equal", "ends", &parameters, BOOL, ids.shape.clone());
        let ends = self.cast("ends_to_int32", &ends, INT32);
        // Padding may be end-of-text too, and it is the first that counts: weighted, there is one largest.
        let falling: Vec<i32> = (1..=tokens).rev().collect();
        let weighted = self.binary("mul", "ends_weighted", &ends, Parameter::Ints(&falling));
        let mut parameters =
            vec![("x", Parameter::Var(&weighted)), ("axis", Parameter::Int(1)), ("keep_dims", Parameter::Bool(false))];
        if self.program.target() != DeploymentTarget::Ios16 {
            parameters.push(("output_dtype", Parameter::Text("int32")));
        }
        let place = self.program.op("reduce_argmax", "end_of_text", &parameters, INT32, vec![1]);
        Ok(self.gather("pooled", x, &place, 3, out))
    }

    /// Ids of a text as the model's own tokenizer fills it up, whether it was filled up so or as Apple's Swift package
    /// does.
    pub fn own_padding(&mut self, ids: &MilValue, prompt: &Prompt) -> MilValue {
        if !prompt.differs() {
            return ids.clone();
        }
        self.value(ids.shape.clone(), |ops, _| ops.fill_up(&ids.var, prompt))
    }

    /// The padding is what stands behind the end of the text: behind the first end-of-text that only end-of-texts and
    /// padding of either kind follow. A text may hold the tokens that others are filled up with.
    fn fill_up(&mut self, ids: &Var, prompt: &Prompt) -> Result<Var> {
        ensure!(ids.shape[0] == 1, "texts are filled up one at a time, and this batch has {}", ids.shape[0]);
        let id = |id: i64| i32::try_from(id).context("the id of a token");
        let (end, pad, swift_pad) = (id(prompt.end)?, id(prompt.pad)?, id(prompt.swift_pad)?);
        let tokens = ids.shape[1] as i32;
        let (rising, falling): (Vec<i32>, Vec<i32>) = ((1..=tokens).collect(), (1..=tokens).rev().collect());
        let ends = self.where_equal("text_ends", ids, end);
        // End-of-texts and padding are 1, words 0.
        let mut fillers = ends.clone();
        for (at, filler) in [pad, swift_pad].into_iter().enumerate().filter(|(_, filler)| *filler != end) {
            let found = self.where_equal(&format!("filler_{at}"), ids, filler);
            fillers = self.binary("add", "fillers", &fillers, Parameter::Var(&found));
        }
        let negated = self.binary("mul", "fillers_negated", &fillers, Parameter::Int(-1));
        let words = self.binary("add", "words", &negated, Parameter::Int(1));
        let places = self.binary("mul", "word_places", &words, Parameter::Ints(&rising));
        let last = self.largest("last_word", &places);
        let behind = self.compared("less", "behind_words", &last, &rising);
        // The first of the end-of-texts behind the last word: what is left of the text from there.
        let closing = self.binary("mul", "closing_ends", &ends, Parameter::Var(&behind));
        let rests = self.binary("mul", "closing_rests", &closing, Parameter::Ints(&falling));
        let rest = self.largest("closing_rest", &rests);
        let filled = self.compared("greater", "filled_up", &rest, &falling);
        let away = self.binary("mul", "ids_negated", ids, Parameter::Int(-1));
        let away = self.binary("add", "away_from_padding", &away, Parameter::Int(pad));
        let change = self.binary("mul", "change_to_padding", &filled, Parameter::Var(&away));
        Ok(self.binary("add", "own_padding", ids, Parameter::Var(&change)))
    }

    /// 1 where ids are `id`, else 0.
    fn where_equal(&mut self, name: &str, ids: &Var, id: i32) -> Var {
        let parameters = [("x", Parameter::Var(ids)), ("y", Parameter::Int(id))];
        let found = self.program.op("equal", name, &parameters, BOOL, ids.shape.clone());
        self.cast(&format!("{name}_to_int32"), &found, INT32)
    }

    /// The largest of whole numbers `[1, T]`: `[1, 1]`.
    fn largest(&mut self, name: &str, x: &Var) -> Var {
        let parameters =
            [("x", Parameter::Var(x)), ("axes", Parameter::Ints(&[1])), ("keep_dims", Parameter::Bool(true))];
        self.program.op("reduce_max", name, &parameters, INT32, vec![1, 1])
    }

    /// 1 where `number` `[1, 1]` is less, or greater, than one of the T `others`, else 0: `[1, T]`.
    fn compared(&mut self, kind: &str, name: &str, number: &Var, others: &[i32]) -> Var {
        let parameters = [("x", Parameter::Var(number)), ("y", Parameter::Ints(others))];
        let found = self.program.op(kind, name, &parameters, BOOL, vec![1, others.len() as i64]);
        self.cast(&format!("{name}_to_int32"), &found, INT32)
    }

    /// Elements of `x` along `axis` at `indices`, which are not negative.
    pub(super) fn gather(&mut self, name: &str, x: &Var, indices: &Var, axis: i32, out: Vec<i64>) -> Var {
        let mut parameters = vec![
            ("x", Parameter::Var(x)),
            ("indices", Parameter::Var(indices)),
            ("axis", Parameter::Int(axis)),
            ("batch_dims", Parameter::Int(0)),
        ];
        if self.program.target() != DeploymentTarget::Ios16 {
            parameters.push(("validate_indices", Parameter::Bool(false)));
        }
        self.program.op("gather", name, &parameters, x.element, out)
    }

    /// `x · sigmoid(1.702 x)`. The factor is 90 parts in a million off in fp16, which twelve layers would show.
    pub(super) fn quick_gelu(&mut self, x: &Var) -> Var {
        let (first, second) = half_factors(1.702);
        let steep = self.binary("mul", "quick_gelu_scaled", x, Parameter::Half(first));
        let steep = self.binary("mul", "quick_gelu_rescaled", &steep, Parameter::Half(second));
        let gate = self.unary("sigmoid", "quick_gelu_gate", &steep);
        self.binary("mul", "quick_gelu", x, Parameter::Var(&gate))
    }
}
