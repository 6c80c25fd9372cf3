//! Single operations of MIL, appended to a program.

use std::io::{Seek, Write};

use super::lower::MilOps;
use super::program::{Parameter, Var};
use super::proto::data_type::{FLOAT16, INT32};
use crate::ops::Conv;

impl<W: Write + Seek> MilOps<'_, W> {
    /// `x` as fp16, fp32 or int32 ([`data_type`](super::proto::data_type)).
    pub(super) fn cast(&mut self, name: &str, x: &Var, element: i32) -> Var {
        let to = match element {
            FLOAT16 => "fp16",
            INT32 => "int32",
            _ => "fp32",
        };
        let parameters = [("x", Parameter::Var(x)), ("dtype", Parameter::Text(to))];
        self.program.op("cast", name, &parameters, element, x.shape.clone())
    }

    /// A 2-d convolution.
    pub(super) fn convolution(
        &mut self,
        name: &str,
        x: &Var,
        weight: &Var,
        bias: Option<&Var>,
        conv: Conv,
        out: Vec<i64>,
    ) -> Var {
        let (strides, pad) = ([conv.stride as i32; 2], [conv.padding as i32; 4]);
        let mut parameters = vec![
            ("x", Parameter::Var(x)),
            ("weight", Parameter::Var(weight)),
            ("strides", Parameter::Ints(&strides)),
            ("pad_type", Parameter::Text(if conv.padding == 0 { "valid" } else { "custom" })),
            ("pad", Parameter::Ints(&pad)),
            ("dilations", Parameter::Ints(&[1, 1])),
            ("groups", Parameter::Int(1)),
        ];
        parameters.extend(bias.map(|bias| ("bias", Parameter::Var(bias))));
        self.program.op("conv", name, &parameters, x.element, out)
    }

    pub(super) fn unary(&mut self, kind: &str, name: &str, x: &Var) -> Var {
        self.program.op(kind, name, &[("x", Parameter::Var(x))], x.element, x.shape.clone())
    }

    /// `x ∘ y` by broadcasting; the result has the shape of `x`.
    pub(super) fn binary(&mut self, kind: &str, name: &str, x: &Var, y: Parameter) -> Var {
        self.program.op(kind, name, &[("x", Parameter::Var(x)), ("y", y)], x.element, x.shape.clone())
    }

    pub(super) fn reshape(&mut self, name: &str, x: &Var, shape: Vec<i64>) -> Var {
        let sizes: Vec<i32> = shape.iter().map(|&size| size as i32).collect();
        let parameters = [("x", Parameter::Var(x)), ("shape", Parameter::Ints(&sizes))];
        self.program.op("reshape", name, &parameters, x.element, shape)
    }

    pub(super) fn concat(&mut self, name: &str, values: Vec<&Var>, axis: usize) -> Var {
        let mut shape = values[0].shape.clone();
        shape[axis] = values.iter().map(|value| value.shape[axis]).sum();
        let element = values[0].element;
        let parameters = [
            ("values", Parameter::Vars(values)),
            ("axis", Parameter::Int(axis as i32)),
            ("interleave", Parameter::Bool(false)),
        ];
        self.program.op("concat", name, &parameters, element, shape)
    }

    pub(super) fn gelu(&mut self, x: &Var) -> Var {
        let parameters = [("x", Parameter::Var(x)), ("mode", Parameter::Text("EXACT"))];
        self.program.op("gelu", "gelu", &parameters, x.element, x.shape.clone())
    }
}
