//! Element by element: functions of one and of two values, comparisons, `select`, `cast`.

use anyhow::{Result, bail, ensure};
use tch::{Kind, Tensor};

use super::checks::{broadcast, floats};
use crate::coreml::reading::call::Call;
use crate::coreml::reading::types::{DataType, TensorType};

pub fn infer(call: &Call) -> Result<TensorType> {
    Ok(match call.kind {
        "identity" => call.kind("x")?.clone(),
        "abs" | "square" => {
            let x = call.kind("x")?;
            ensure!(x.data_type.is_float() || x.data_type == DataType::Int32, "input x is {x}");
            x.clone()
        }
        "logical_not" => {
            let x = call.kind("x")?;
            ensure!(x.data_type == DataType::Bool, "input x must be BOOL, it is {x}");
            x.clone()
        }
        "cast" => {
            let (x, data_type) = (call.kind("x")?, cast_type(call)?);
            ensure!(x.data_type != DataType::String, "a string cannot be cast");
            TensorType::new(data_type, x.shape.clone())?
        }
        "select" => {
            let (cond, a, b) = (call.kind("cond")?, call.kind("a")?, call.kind("b")?);
            ensure!(cond.data_type == DataType::Bool, "input cond must be BOOL, it is {cond}");
            ensure!(a.data_type == b.data_type, "inputs a and b have the types {} and {}", a.data_type, b.data_type);
            a.with_shape(broadcast(&broadcast(&a.shape, &b.shape)?, &cond.shape)?)?
        }
        kind if call.has("y") => {
            let (x, y) = (call.kind("x")?, call.kind("y")?);
            ensure!(x.data_type == y.data_type, "inputs x and y have the types {} and {}", x.data_type, y.data_type);
            let (accepted, result) = match kind {
                "logical_and" | "logical_or" => (x.data_type == DataType::Bool, DataType::Bool),
                "real_div" | "pow" => (x.data_type.is_float(), x.data_type),
                "equal" | "not_equal" | "less" | "less_equal" | "greater" | "greater_equal" => {
                    (x.data_type != DataType::String, DataType::Bool)
                }
                _ => (x.data_type.is_float() || x.data_type == DataType::Int32, x.data_type),
            };
            ensure!(accepted, "{kind} does not accept {}", x.data_type);
            TensorType::new(result, broadcast(&x.shape, &y.shape)?)?
        }
        kind => {
            floats(call, &["x", "epsilon", "alpha", "beta"])?;
            for name in ["epsilon", "alpha", "beta"] {
                if call.has(name) {
                    call.real(name)?;
                }
            }
            if kind == "gelu" {
                gelu_mode(call)?;
            }
            call.kind("x")?.clone()
        }
    })
}

pub fn run(call: &Call) -> Result<Tensor> {
    if call.kind == "select" {
        return Ok(call.tensor("a")?.f_where_self(call.tensor("cond")?, call.tensor("b")?)?);
    }
    let x = call.tensor("x")?;
    if call.has("y") {
        let y = call.tensor("y")?;
        return Ok(match call.kind {
            "add" => x.f_add(y),
            "sub" => x.f_sub(y),
            "mul" => x.f_mul(y),
            "real_div" => x.f_div(y),
            "maximum" => x.f_maximum(y),
            "minimum" => x.f_minimum(y),
            "floor_div" => x.f_div_tensor_mode(y, "floor"),
            "mod" => x.f_remainder_tensor(y),
            "pow" => x.f_pow(y),
            "equal" => x.f_eq_tensor(y),
            "not_equal" => x.f_ne_tensor(y),
            "less" => x.f_lt_tensor(y),
            "less_equal" => x.f_le_tensor(y),
            "greater" => x.f_gt_tensor(y),
            "greater_equal" => x.f_ge_tensor(y),
            "logical_and" => x.f_logical_and(y),
            "logical_or" => x.f_logical_or(y),
            kind => bail!("{kind} cannot be run"),
        }?);
    }
    Ok(match call.kind {
        "identity" => Ok(x.shallow_clone()),
        "silu" => x.f_silu(),
        "sigmoid" => x.f_sigmoid(),
        "tanh" => x.f_tanh(),
        "relu" => x.f_relu(),
        "erf" => x.f_erf(),
        "exp" => x.f_exp(),
        "sin" => x.f_sin(),
        "cos" => x.f_cos(),
        "sqrt" => x.f_sqrt(),
        "abs" => x.f_abs(),
        "square" => x.f_square(),
        "logical_not" => x.f_logical_not(),
        // In the types of the program: an epsilon of 1e-12 in FLOAT16 has become 0 when it was stored.
        "rsqrt" => x.f_add_scalar(call.real("epsilon")?)?.f_rsqrt(),
        "log" => x.f_add_scalar(call.real("epsilon")?)?.f_log(),
        "inverse" => x.f_add_scalar(call.real("epsilon")?)?.f_reciprocal(),
        "clip" => x.f_clamp(call.real("alpha")?, call.real("beta")?),
        "gelu" => match gelu_mode(call)? {
            Gelu::Exact => x.f_gelu("none"),
            Gelu::Tanh => x.f_gelu("tanh"),
            Gelu::Sigmoid => x.f_mul(&x.f_mul_scalar(1.702)?.f_sigmoid()?),
        },
        "cast" => {
            let kind = match cast_type(call)? {
                DataType::Bool => return Ok(x.f_ne(0)?),
                DataType::Float16 | DataType::Float32 => Kind::Float,
                DataType::Int8 => Kind::Int8,
                DataType::Uint8 => Kind::Uint8,
                DataType::Int16 => Kind::Int16,
                _ => Kind::Int,
            };
            // To integers, libtorch truncates as MIL does.
            x.f_to_kind(kind)
        }
        kind => bail!("{kind} cannot be run"),
    }?)
}

enum Gelu {
    Exact,
    Tanh,
    Sigmoid,
}

fn gelu_mode(call: &Call) -> Result<Gelu> {
    Ok(match call.text("mode")? {
        "EXACT" => Gelu::Exact,
        "TANH_APPROXIMATION" => Gelu::Tanh,
        "SIGMOID_APPROXIMATION" => Gelu::Sigmoid,
        mode => bail!("unknown gelu mode {mode:?}"),
    })
}

fn cast_type(call: &Call) -> Result<DataType> {
    let (data_type, since) = match call.text("dtype")? {
        "fp16" => (DataType::Float16, 0),
        "fp32" => (DataType::Float32, 0),
        "int32" => (DataType::Int32, 0),
        "bool" => (DataType::Bool, 0),
        "int8" => (DataType::Int8, 8),
        "uint8" => (DataType::Uint8, 8),
        "int16" => (DataType::Int16, 8),
        "uint16" => (DataType::Uint16, 8),
        other => bail!("cast to {other:?} is not known"),
    };
    ensure!(call.specification_version >= since, "cast to {data_type} needs specification version {since}");
    Ok(data_type)
}
