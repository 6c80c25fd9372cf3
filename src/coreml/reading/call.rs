//! One operation with its inputs resolved: what both shape inference and execution look at.

use anyhow::{Context, Result, bail, ensure};
use std::collections::BTreeMap;
use tch::Tensor;

use super::constant::{Array, Elements};
use super::types::{DataType, TensorType};

/// An operation about to be inferred (no tensors) or run (tensors for every operand).
pub struct Call<'a> {
    pub kind: &'a str,
    pub specification_version: i32,
    pub inputs: BTreeMap<&'a str, Vec<Operand<'a>>>,
}

/// One bound value.
#[derive(Debug)]
pub struct Operand<'a> {
    pub kind: &'a TensorType,
    /// Its elements, where it is a parameter.
    pub literal: Option<&'a Array>,
    /// The most that its elements can be, where they are integers computed from shapes.
    pub most: Option<i64>,
    /// Its tensor, where it is an operand of an operation that is run: floats are 32 bits wide whatever the type.
    pub tensor: Option<Tensor>,
}

impl Call<'_> {
    pub fn has(&self, name: &str) -> bool {
        self.inputs.contains_key(name)
    }

    fn one(&self, name: &str) -> Result<&Operand<'_>> {
        match self.inputs.get(name).map(Vec::as_slice) {
            Some([operand]) => Ok(operand),
            _ => bail!("input {name} must be one value"),
        }
    }

    /// Type of an input.
    pub fn kind(&self, name: &str) -> Result<&TensorType> {
        Ok(self.one(name)?.kind)
    }

    /// Type of an input that may be absent.
    pub fn kind_if_any(&self, name: &str) -> Result<Option<&TensorType>> {
        if self.has(name) { self.kind(name).map(Some) } else { Ok(None) }
    }

    /// Types of a list.
    pub fn kinds(&self, name: &str) -> Result<Vec<&TensorType>> {
        let list = self.inputs.get(name).with_context(|| format!("input {name} is missing"))?;
        Ok(list.iter().map(|operand| operand.kind).collect())
    }

    /// Tensor of an input.
    pub fn tensor(&self, name: &str) -> Result<&Tensor> {
        self.one(name)?.tensor.as_ref().with_context(|| format!("input {name} has no tensor"))
    }

    /// Tensor of an input that may be absent.
    pub fn tensor_if_any(&self, name: &str) -> Result<Option<&Tensor>> {
        if self.has(name) { self.tensor(name).map(Some) } else { Ok(None) }
    }

    /// Tensors of a list.
    pub fn tensors(&self, name: &str) -> Result<Vec<&Tensor>> {
        let list = self.inputs.get(name).with_context(|| format!("input {name} is missing"))?;
        list.iter().map(|operand| operand.tensor.as_ref().with_context(|| format!("{name} has no tensor"))).collect()
    }

    /// Whether a parameter that may be computed is.
    pub fn is_computed(&self, name: &str) -> Result<bool> {
        Ok(self.one(name)?.literal.is_none())
    }

    /// The most that the elements of an input can be, or of all of a list, where it is known.
    pub fn most(&self, name: &str) -> Option<i64> {
        let bounds = self.inputs.get(name)?.iter().map(|operand| operand.most);
        bounds.collect::<Option<Vec<_>>>()?.into_iter().max()
    }

    fn literal(&self, name: &str) -> Result<&Array> {
        self.one(name)?.literal.with_context(|| format!("parameter {name} is not a known constant"))
    }

    /// A vector of INT32 (a scalar counts as one element).
    pub fn ints(&self, name: &str) -> Result<Vec<i64>> {
        let literal = self.literal(name)?;
        ensure!(
            literal.kind.data_type == DataType::Int32 && literal.kind.rank() <= 1,
            "parameter {name} must be a vector of INT32, it is {}",
            literal.kind
        );
        literal.ints().with_context(|| format!("parameter {name} holds no integers"))
    }

    /// The same with a number of elements that is known.
    pub fn ints_of(&self, name: &str, count: usize) -> Result<Vec<i64>> {
        let ints = self.ints(name)?;
        ensure!(ints.len() == count, "parameter {name} has {} elements, it needs {count}", ints.len());
        Ok(ints)
    }

    fn scalar(&self, name: &str) -> Result<&Array> {
        let literal = self.literal(name)?;
        ensure!(literal.kind.rank() == 0, "parameter {name} must be a scalar, it is {}", literal.kind);
        Ok(literal)
    }

    pub fn int(&self, name: &str) -> Result<i64> {
        self.scalar(name)?;
        self.ints_of(name, 1).map(|ints| ints[0])
    }

    /// A number of any type, finite.
    pub fn real(&self, name: &str) -> Result<f64> {
        let reals = self.scalar(name)?.reals().filter(|reals| reals.len() == 1);
        let real = reals.with_context(|| format!("parameter {name} is not a number"))?[0];
        ensure!(real.is_finite(), "parameter {name} is {real}");
        Ok(real)
    }

    pub fn boolean(&self, name: &str) -> Result<bool> {
        match &self.scalar(name)?.elements {
            Elements::Bools(bools) if bools.len() == 1 => Ok(bools[0]),
            _ => bail!("parameter {name} must be BOOL"),
        }
    }

    /// `rank` truth values; all false where the parameter is absent.
    pub fn mask(&self, name: &str, rank: usize) -> Result<Vec<bool>> {
        if !self.has(name) {
            return Ok(vec![false; rank]);
        }
        match &self.literal(name)?.elements {
            Elements::Bools(bools) if bools.len() == rank => Ok(bools.clone()),
            _ => bail!("parameter {name} must be {rank} values of BOOL"),
        }
    }

    pub fn text(&self, name: &str) -> Result<&str> {
        match &self.scalar(name)?.elements {
            Elements::Strings(strings) if strings.len() == 1 => Ok(&strings[0]),
            _ => bail!("parameter {name} must be STRING"),
        }
    }

    /// `axes` counted from the front, ascending, none twice. Absent: all of `x`.
    pub fn axes(&self, name: &str, x: &TensorType) -> Result<Vec<i64>> {
        if !self.has(name) {
            return Ok((0..x.rank() as i64).collect());
        }
        let mut axes =
            self.ints(name)?.into_iter().map(|axis| Ok(x.axis(axis)? as i64)).collect::<Result<Vec<i64>>>()?;
        axes.sort_unstable();
        ensure!(axes.windows(2).all(|pair| pair[0] < pair[1]), "parameter {name} names an axis twice");
        Ok(axes)
    }
}
