//! Products: `linear`, `matmul`, `einsum` in its two patterns, attention.

use anyhow::{Context, Result, bail, ensure};
use tch::Tensor;

use super::checks::{broadcast, floats, vector};
use crate::coreml::reading::call::Call;
use crate::coreml::reading::types::{DataType, TensorType};

/// x `[…, in]`, weight `[out, in]`, bias `[out]` → `[…, out]`
pub fn infer_linear(call: &Call) -> Result<TensorType> {
    floats(call, &["x", "weight", "bias"])?;
    let (x, weight) = (call.kind("x")?, call.kind("weight")?);
    let (Some((&last, front)), [out, into]) = (x.shape.split_last(), &weight.shape[..]) else {
        bail!("linear needs a weight [out, in] and x of rank 1 to 3, they are {weight} and {x}");
    };
    ensure!(x.rank() <= 3 && last == *into, "linear of {x} by a weight {weight}");
    vector(call, "bias", *out)?;
    x.with_shape([front, &[*out]].concat())
}

pub fn run_linear(call: &Call) -> Result<Tensor> {
    Ok(call.tensor("x")?.f_linear(call.tensor("weight")?, call.tensor_if_any("bias")?)?)
}

/// x `[…, n, k]`, y `[…, k, m]` → `[…, n, m]`, each transposed first if told so.
pub fn infer_matmul(call: &Call) -> Result<TensorType> {
    floats(call, &["x", "y"])?;
    let side = |name: &str, flag: &str| -> Result<(Vec<i64>, i64, i64)> {
        let kind = call.kind(name)?;
        let [front @ .., rows, columns] = &kind.shape[..] else { bail!("input {name} is {kind}, it needs two axes") };
        let transposed = call.boolean(flag)?;
        let (rows, columns) = if transposed { (columns, rows) } else { (rows, columns) };
        Ok((front.to_vec(), *rows, *columns))
    };
    let ((x_front, n, k), (y_front, k_of_y, m)) = (side("x", "transpose_x")?, side("y", "transpose_y")?);
    ensure!(k == k_of_y, "matmul of {} and {}: inner sizes are {k} and {k_of_y}", call.kind("x")?, call.kind("y")?);
    let mut shape = broadcast(&x_front, &y_front)?;
    shape.extend([n, m]);
    call.kind("x")?.with_shape(shape)
}

pub fn run_matmul(call: &Call) -> Result<Tensor> {
    let side = |name: &str, flag: &str| -> Result<Tensor> {
        let tensor = call.tensor(name)?;
        Ok(if call.boolean(flag)? { tensor.f_transpose(-2, -1)? } else { tensor.shallow_clone() })
    };
    Ok(side("x", "transpose_x")?.f_matmul(&side("y", "transpose_y")?)?)
}

/// The letters of an equation: those of the two inputs and of the output.
fn equation(call: &Call) -> Result<[Vec<char>; 3]> {
    let text: String = call.text("equation")?.chars().filter(|c| !c.is_whitespace()).collect();
    let parts = text.split_once("->").and_then(|(inputs, output)| Some((inputs.split_once(',')?, output)));
    let ((x, y), output) = parts.with_context(|| format!("einsum equation {text:?} is not of the form a,b->c"))?;
    let [x, y, output] = [x, y, output].map(|letters| letters.chars().collect::<Vec<_>>());
    let known = match (&x[..], &y[..], &output[..]) {
        // nchw,nwhu->nchu and chw,whr->chr, whatever the letters
        ([n, c, h, w], [n2, w2, h2, u], out) => [n, w, h] == [n2, w2, h2] && out == [*n, *c, *h, *u] && u != c,
        ([c, h, w], [w2, h2, r], out) => [w, h] == [w2, h2] && out == [*c, *h, *r] && r != c,
        _ => false,
    };
    let letters = x.iter().chain(y.last());
    let distinct =
        letters.clone().enumerate().all(|(at, letter)| letters.clone().take(at).all(|other| other != letter));
    ensure!(
        known && distinct && x.iter().chain(&y).all(char::is_ascii_lowercase),
        "einsum knows the patterns nchw,nwhu->nchu and chw,whr->chr, not {text:?}"
    );
    Ok([x, y, output])
}

/// The contraction of split attention; `n` and `h` broadcast.
pub fn infer_einsum(call: &Call) -> Result<TensorType> {
    let kinds = call.kinds("values")?;
    let [x, y] = kinds[..] else { bail!("einsum needs two values, it has {}", kinds.len()) };
    ensure!(x.data_type.is_float() && x.data_type == y.data_type, "einsum of {x} and {y}");
    let [x_letters, y_letters, output] = equation(call)?;
    ensure!(x.rank() == x_letters.len() && y.rank() == y_letters.len(), "einsum of {x} and {y}: ranks do not fit");
    let contracted = x_letters[x_letters.len() - 1];
    let size = |letter: char| -> Result<i64> {
        let of = |kind: &TensorType, letters: &[char]| {
            letters.iter().position(|&other| other == letter).map(|axis| kind.shape[axis])
        };
        match (of(x, &x_letters), of(y, &y_letters)) {
            (Some(a), Some(b)) if a == b || (b == 1 && letter != contracted) => Ok(a),
            (Some(1), Some(b)) if letter != contracted => Ok(b),
            (Some(size), None) | (None, Some(size)) => Ok(size),
            _ => bail!("einsum of {x} and {y}: sizes of {letter} differ"),
        }
    };
    size(contracted)?;
    x.with_shape(output.into_iter().map(size).collect::<Result<_>>()?)
}

pub fn run_einsum(call: &Call) -> Result<Tensor> {
    let text: String = equation(call)?.map(String::from_iter).join(",");
    // libtorch broadcasts sizes of 1 by itself.
    let text = match text.rsplit_once(',') {
        Some((inputs, output)) => format!("{inputs}->{output}"),
        None => bail!("einsum without inputs"),
    };
    Ok(Tensor::f_einsum(&text, &call.tensors("values")?, None::<i64>)?)
}

/// query `[…, L, E]`, key `[…, S, E]`, value `[…, S, V]`, mask broadcast to `[…, L, S]` → `[…, L, V]`
pub fn infer_attention(call: &Call) -> Result<TensorType> {
    floats(call, &["query", "key", "value"])?;
    let (query, key, value) = (call.kind("query")?, call.kind("key")?, call.kind("value")?);
    let parts = |kind: &TensorType| match &kind.shape[..] {
        [front @ .., tokens, width] if !front.is_empty() => Ok((front.to_vec(), *tokens, *width)),
        _ => bail!("attention needs ranks of at least 3, one input is {kind}"),
    };
    let ((front, l, e), (key_front, s, key_e), (value_front, value_s, v)) = (parts(query)?, parts(key)?, parts(value)?);
    ensure!(
        front == key_front && front == value_front && e == key_e && s == value_s,
        "attention of {query}, {key} and {value}"
    );
    if let Some(mask) = call.kind_if_any("attn_mask")? {
        ensure!(mask.data_type == DataType::Bool || mask.data_type.is_float(), "attention mask is {mask}");
        let scores = [&front[..], &[l, s]].concat();
        ensure!(broadcast(&scores, &mask.shape)? == scores, "attention mask {mask} does not broadcast to {scores:?}");
    }
    query.with_shape([&front[..], &[l, v]].concat())
}

pub fn run_attention(call: &Call) -> Result<Tensor> {
    let (query, key, value) = (call.tensor("query")?, call.tensor("key")?, call.tensor("value")?);
    let width = call.kind("query")?.shape.last().copied().unwrap_or(1) as f64;
    let mut scores = query.f_matmul(&key.f_transpose(-2, -1)?)?.f_div_scalar(width.sqrt())?;
    if let Some(mask) = call.tensor_if_any("attn_mask")? {
        scores = if mask.kind() == tch::Kind::Bool {
            scores.f_masked_fill(&mask.f_logical_not()?, f64::NEG_INFINITY)?
        } else {
            scores.f_add(mask)?
        };
    }
    Ok(scores.f_softmax(-1, None::<tch::Kind>)?.f_matmul(value)?)
}
