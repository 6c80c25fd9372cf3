//! Words that only the safety checker uses: cosines with known vectors, and whether any number is positive.

use std::io::{Seek, Write};

use anyhow::{Result, bail};
use half::f16;

use super::interpreter::MilOps;
use super::operations::half_factors;
use crate::coreml::format::proto::data_type::{BOOL, FLOAT16};
use crate::coreml::writing::program::{Parameter, Var};
use crate::coreml::writing::weights::Weight;
use crate::ops::Conv;

impl<W: Write + Seek> MilOps<'_, W> {
    /// Cosines of `x` `[B, C, 1, 1]` and the rows of the parameter `name` `[rows, C]`.
    pub(super) fn angles(&mut self, x: &Var, name: &str, rows: i64, out: Vec<i64>) -> Result<Var> {
        let (batch, channels) = (x.shape[0], x.shape[1]);
        let squares = self.unary("square", "squares", x);
        let parameters =
            [("x", Parameter::Var(&squares)), ("axes", Parameter::Ints(&[1])), ("keep_dims", Parameter::Bool(true))];
        let sum = self.program.op("reduce_sum", "squared_length", &parameters, FLOAT16, vec![batch, 1, 1, 1]);
        let length = self.unary("sqrt", "length", &sum);
        // A vector of zeros stays one.
        let length = self.binary("maximum", "length_at_least", &length, Parameter::Half(f16::MIN_POSITIVE));
        let unit = self.binary("real_div", "unit", x, Parameter::Var(&length));

        let Weight::Dense { values, .. } = self.weight(name, &[rows, channels])? else {
            bail!("`{name}` is a palette; it is not a layer's weight")
        };
        let weight = self.constant(name, &values, &[rows, channels, 1, 1])?;
        let products = self.convolution("products", &unit, &weight, None, Conv::same(channels, rows, 1), out);
        // One over each row's length, in two factors: one alone is off by up to a part in 2000.
        let (first, second): (Vec<f16>, Vec<f16>) = values
            .chunks(channels as usize)
            .map(|row| row.iter().map(|value| value.to_f64().powi(2)).sum::<f64>().sqrt())
            .map(|length| half_factors(1.0 / length.max(1e-4)))
            .unzip();
        let mut cosines = products;
        for factors in [first, second] {
            let bytes: Vec<u8> = factors.iter().flat_map(|factor| factor.to_le_bytes()).collect();
            let factors = self.program.tensor("one_over_lengths", FLOAT16, &[1, rows, 1, 1], &bytes)?;
            cosines = self.binary("mul", "cosines", &cosines, Parameter::Var(&factors));
        }
        Ok(cosines)
    }

    /// `worth` where any of `x` `[B, C, 1, 1]` along C is positive, else 0: `[B, 1, 1, 1]`.
    pub(super) fn worth_where_positive(&mut self, x: &Var, worth: f64, out: Vec<i64>) -> Var {
        let parameters =
            [("x", Parameter::Var(x)), ("axes", Parameter::Ints(&[1])), ("keep_dims", Parameter::Bool(true))];
        let most = self.program.op("reduce_max", "largest_score", &parameters, FLOAT16, out.clone());
        let parameters = [("x", Parameter::Var(&most)), ("y", Parameter::Half(f16::ZERO))];
        let positive = self.program.op("greater", "positive", &parameters, BOOL, out);
        let positive = self.cast("positive_to_fp16", &positive, FLOAT16);
        if worth == 1.0 {
            return positive;
        }
        self.binary("mul", "positive_worth", &positive, Parameter::Half(f16::from_f64(worth)))
    }
}
