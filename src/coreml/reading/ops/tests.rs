//! Operations against libtorch's own of the same meaning, or against numbers worked out by hand; for each, the shape
//! that was inferred is the shape that is computed.

use anyhow::Result;
use tch::{Device, Kind, Tensor};

use super::{infer, run};
use crate::coreml::reading::call::{Call, Operand};
use crate::coreml::reading::constant::{Array, Elements};
use crate::coreml::reading::types::{DataType, TensorType};

/// What an input is given.
enum Given {
    /// An operand.
    Value(Tensor),
    /// Several operands.
    List(Vec<Tensor>),
    /// An operand of which there can be so many.
    AtMost(Tensor, i64),
    /// A parameter that is computed, of numbers up to so many.
    Computed(Tensor, i64),
    Ints(Vec<i64>),
    Int(i64),
    Real(f32),
    Flag(bool),
    Flags(Vec<bool>),
    Text(&'static str),
}
use Given::*;

fn literal(given: &Given) -> Option<Array> {
    let (data_type, shape, elements) = match given {
        Value(_) | List(_) | AtMost(..) | Computed(..) => return None,
        Ints(list) => (DataType::Int32, vec![list.len() as i64], Elements::Ints(list.clone())),
        Int(value) => (DataType::Int32, vec![], Elements::Ints(vec![*value])),
        Real(value) => (DataType::Float32, vec![], Elements::Floats(vec![*value])),
        Flag(value) => (DataType::Bool, vec![], Elements::Bools(vec![*value])),
        Flags(list) => (DataType::Bool, vec![list.len() as i64], Elements::Bools(list.clone())),
        Text(text) => (DataType::String, vec![], Elements::Strings(vec![text.to_string()])),
    };
    Some(Array { kind: TensorType::new(data_type, shape).unwrap(), elements })
}

fn kind_of(tensor: &Tensor, shape: Vec<i64>) -> TensorType {
    let data_type = match tensor.kind() {
        Kind::Float => DataType::Float32,
        Kind::Bool => DataType::Bool,
        _ => DataType::Int32,
    };
    TensorType::new(data_type, shape).unwrap()
}

/// Infers and runs an operation of iOS 18 (`version` 9) or another.
fn try_all(version: i32, kind: &str, given: &[(&str, Given)]) -> Result<Vec<Tensor>> {
    let literals: Vec<Option<Array>> = given.iter().map(|(_, given)| literal(given)).collect();
    let tensors: Vec<Vec<&Tensor>> = given
        .iter()
        .map(|(_, given)| match given {
            Value(tensor) | AtMost(tensor, _) | Computed(tensor, _) => vec![tensor],
            List(list) => list.iter().collect(),
            _ => vec![],
        })
        .collect();
    let kinds = given.iter().zip(&tensors).map(|((_, given), list)| match given {
        AtMost(tensor, most) => vec![kind_of(tensor, [&[*most], &tensor.size()[1..]].concat()).at_most()],
        _ => list.iter().map(|tensor| kind_of(tensor, tensor.size())).collect(),
    });
    let kinds: Vec<Vec<TensorType>> = kinds.collect();
    let inputs = given.iter().enumerate().map(|(at, (name, _))| {
        let operands = match &literals[at] {
            Some(literal) => vec![Operand { kind: &literal.kind, literal: Some(literal), most: None, tensor: None }],
            None => {
                let most = if let Computed(_, most) = given[at].1 { Some(most) } else { None };
                let pairs = kinds[at].iter().zip(&tensors[at]);
                pairs.map(|(kind, t)| Operand { kind, literal: None, most, tensor: Some(t.shallow_clone()) }).collect()
            }
        };
        (*name, operands)
    });
    let call = Call { kind, specification_version: version, inputs: inputs.collect() };
    let inferred = infer(&call)?;
    let results = run(&call)?;
    assert_eq!(inferred.len(), results.len(), "{kind}");
    for (inferred, computed) in inferred.iter().zip(&results) {
        let size = computed.size();
        let first = usize::from(inferred.varying);
        assert!(!inferred.varying || size[0] <= inferred.shape[0], "{kind}: {inferred}, {size:?}");
        assert_eq!(inferred.shape[first..], size[first..], "{kind}");
    }
    Ok(results)
}

fn all(kind: &str, given: &[(&str, Given)]) -> Vec<Tensor> {
    try_all(9, kind, given).unwrap_or_else(|error| panic!("{kind}: {error:#}"))
}

fn one(kind: &str, given: &[(&str, Given)]) -> Tensor {
    let mut results = all(kind, given);
    assert_eq!(results.len(), 1);
    results.remove(0)
}

fn random(shape: &[i64]) -> Tensor {
    Tensor::randn(shape, (Kind::Float, Device::Cpu))
}

fn value(tensor: &Tensor) -> Given {
    Value(tensor.shallow_clone())
}

#[track_caller]
fn close(got: &Tensor, expected: &Tensor) {
    assert_eq!(got.size(), expected.size());
    let (got, expected) = (got.to_kind(Kind::Double), expected.to_kind(Kind::Double));
    assert!(got.allclose(&expected, 1e-5, 1e-5, false), "{got} is not {expected}");
}

fn ints(list: &[i32]) -> Tensor {
    Tensor::from_slice(list)
}

#[test]
fn convolutions() {
    let (x, weight, bias) = (random(&[2, 4, 7, 6]), random(&[6, 2, 3, 2]), random(&[6]));
    let conv = |pad_type: &'static str, pad: &[i64]| {
        one(
            "conv",
            &[
                ("x", value(&x)),
                ("weight", value(&weight)),
                ("bias", value(&bias)),
                ("strides", Ints(vec![2, 1])),
                ("pad_type", Text(pad_type)),
                ("pad", Ints(pad.to_vec())),
                ("dilations", Ints(vec![1, 2])),
                ("groups", Int(2)),
            ],
        )
    };
    let expected = |x: &Tensor, pad: [i64; 2]| x.conv2d(&weight, Some(&bias), [2, 1], pad, [1, 2], 2);
    close(&conv("valid", &[9, 9, 9, 9]), &expected(&x, [0, 0]));
    close(&conv("custom", &[1, 1, 2, 2]), &expected(&x, [1, 2]));
    close(&conv("custom", &[0, 1, 2, 0]), &expected(&x.constant_pad_nd([2, 0, 0, 1]), [0, 0]));
    // 7 rows in steps of 2 give 4, so 2 rows are added; 6 columns stay 6 with 2 more.
    close(&conv("same", &[0; 4]), &expected(&x, [1, 1]));

    let weight = random(&[4, 3, 3, 2]);
    let transposed = |given: Vec<(&'static str, Given)>| {
        let mut all = vec![
            ("x", value(&x)),
            ("weight", value(&weight)),
            ("strides", Ints(vec![2, 2])),
            ("dilations", Ints(vec![1, 1])),
            ("groups", Int(2)),
        ];
        all.extend(given);
        one("conv_transpose", &all)
    };
    let expected =
        |pad: [i64; 2], more: [i64; 2]| x.conv_transpose2d(&weight, None::<&Tensor>, [2, 2], pad, more, 2, [1, 1]);
    close(&transposed(vec![("pad_type", Text("valid")), ("pad", Ints(vec![0; 4]))]), &expected([0, 0], [0, 0]));
    close(&transposed(vec![("pad_type", Text("custom")), ("pad", Ints(vec![1, 1, 0, 0]))]), &expected([1, 0], [0, 0]));
    let shape = Ints(vec![2, 6, 14, 12]);
    let pad = Ints(vec![1, 1, 0, 0]);
    close(
        &transposed(vec![("pad_type", Text("custom")), ("pad", pad), ("output_shape", shape)]),
        &expected([1, 0], [1, 0]),
    );
}

#[test]
fn products() {
    let (x, y) = (random(&[2, 3, 4, 5]), random(&[2, 5, 3, 6]));
    let einsum = |x: &Tensor, y: &Tensor, equation: &'static str| {
        try_all(
            7,
            "einsum",
            &[("values", List(vec![x.shallow_clone(), y.shallow_clone()])), ("equation", Text(equation))],
        )
    };
    // b k h c, b c h q -> b k h q: for each b and h a product of matrices.
    let (left, right) = (random(&[2, 3, 4, 5]), random(&[2, 5, 4, 6]));
    let expected = left.permute([0, 2, 1, 3]).matmul(&right.permute([0, 2, 1, 3])).permute([0, 2, 1, 3]);
    close(&einsum(&left, &right, "bkhc,bchq->bkhq").unwrap()[0], &expected);
    let narrow = right.narrow(0, 0, 1);
    let expected = left.permute([0, 2, 1, 3]).matmul(&narrow.permute([0, 2, 1, 3])).permute([0, 2, 1, 3]);
    close(&einsum(&left, &narrow, "bkhc, bchq -> bkhq").unwrap()[0], &expected);
    assert!(einsum(&x, &y, "bkhc,bchq->bkhq").is_err(), "4 and 3 for h");
    for equation in ["bkhc,bchq->bkqh", "ij,jk->ik", "bkhc", "bkhh,bhhq->bkhq", "bkhc,bchk->bkhk"] {
        assert!(einsum(&left, &right, equation).is_err(), "{equation}");
    }

    let matmul =
        one("matmul", &[("x", value(&x)), ("y", value(&x)), ("transpose_x", Flag(false)), ("transpose_y", Flag(true))]);
    close(&matmul, &x.matmul(&x.transpose(2, 3)));

    let (query, key, values) = (random(&[2, 3, 4, 8]), random(&[2, 3, 5, 8]), random(&[2, 3, 5, 6]));
    let mask = random(&[4, 5]);
    let mut given = vec![("query", value(&query)), ("key", value(&key)), ("value", value(&values))];
    let attention = |mask: Option<&Tensor>| {
        Tensor::scaled_dot_product_attention(&query, &key, &values, mask, 0.0, false, None, false)
    };
    close(&one("scaled_dot_product_attention", &given), &attention(None));
    given.push(("attn_mask", value(&mask)));
    close(&one("scaled_dot_product_attention", &given), &attention(Some(&mask)));
    let mask = mask.gt(-1.0);
    given[3].1 = value(&mask);
    close(&one("scaled_dot_product_attention", &given), &attention(Some(&mask)));
}

#[test]
fn normalisations_and_reductions() {
    let (x, gamma, beta) = (random(&[2, 6, 5, 4]), random(&[6]), random(&[6]));
    let scaled = |x: &Tensor| vec![("x", value(x)), ("gamma", value(&gamma)), ("beta", value(&beta))];
    let mut given = scaled(&x);
    given.push(("epsilon", Real(1e-3)));
    let none = None::<&Tensor>;
    let expected = x.instance_norm(Some(&gamma), Some(&beta), none, none, true, 0.0, 1e-3, false);
    close(&one("instance_norm", &given), &expected);
    let (mean, variance) = (random(&[6]), random(&[6]).square());
    given.extend([("mean", value(&mean)), ("variance", value(&variance))]);
    let expected = x.batch_norm(Some(&gamma), Some(&beta), Some(&mean), Some(&variance), false, 0.0, 1e-3, false);
    close(&one("batch_norm", &given), &expected);

    // Over channels of an image, as Apple's UNets have it: the last axis of the transposed one.
    let mut given = scaled(&x);
    given.extend([("axes", Ints(vec![1])), ("epsilon", Real(1e-5))]);
    let last = x.permute([0, 2, 3, 1]);
    let expected = last.layer_norm([6], Some(&gamma), Some(&beta), 1e-5, false).permute([0, 3, 1, 2]);
    close(&one("layer_norm", &given), &expected);

    let reduce =
        |kind: &str, keep: bool| one(kind, &[("x", value(&x)), ("axes", Ints(vec![-1, 1])), ("keep_dims", Flag(keep))]);
    close(&reduce("reduce_mean", true), &x.mean_dim([1i64, 3].as_slice(), true, Kind::Float));
    close(&reduce("reduce_sum", false), &x.sum_dim_intlist([1i64, 3].as_slice(), false, Kind::Float));
    close(&reduce("reduce_max", false), &x.amax([1, 3], false));
    close(&reduce("reduce_min", true), &x.amin([1, 3], true));
    close(&one("reduce_max", &[("x", value(&x)), ("keep_dims", Flag(false))]), &x.max());
    let numbers = Tensor::from_slice(&[3.0f32, -4.0, 5.0, 12.0]).reshape([2, 2]);
    let length = one("reduce_l2_norm", &[("x", value(&numbers)), ("axes", Ints(vec![1])), ("keep_dims", Flag(true))]);
    close(&length, &Tensor::from_slice(&[5.0f32, 13.0]).reshape([2, 1]));
    let argmax = one("reduce_argmax", &[("x", value(&x)), ("axis", Int(-2)), ("keep_dims", Flag(true))]);
    close(&argmax, &x.argmax(2, true));
}

#[test]
fn pointwise() {
    let x = random(&[3, 4]);
    let of = |kind: &str, more: Vec<(&'static str, Given)>| {
        let mut given = vec![("x", value(&x))];
        given.extend(more);
        one(kind, &given)
    };
    let mode = |mode: &'static str| of("gelu", vec![("mode", Text(mode))]);
    close(&mode("EXACT"), &(&x * 0.5 * ((&x / 2f64.sqrt()).erf() + 1.0)));
    close(&mode("TANH_APPROXIMATION"), &x.gelu("tanh"));
    close(&mode("SIGMOID_APPROXIMATION"), &(&x * (&x * 1.702).sigmoid()));
    let square = x.square();
    let rsqrt = one("rsqrt", &[("x", value(&square)), ("epsilon", Real(0.25))]);
    close(&rsqrt, &(&square + 0.25).rsqrt());
    close(&of("clip", vec![("alpha", Real(-0.5)), ("beta", Real(0.25))]), &x.clamp(-0.5, 0.25));
    let numbers = Tensor::from_slice(&[-1.9f32, -0.2, 0.0, 2.7]);
    let cast = |to| one("cast", &[("x", value(&numbers)), ("dtype", Text(to))]);
    close(&cast("int32"), &ints(&[-1, 0, 0, 2]));
    close(&cast("bool"), &Tensor::from_slice(&[true, true, false, true]));
    let (a, b) = (ints(&[7, -7, 7, -7]), ints(&[2, 2, -2, -2]));
    let both = |kind: &str| one(kind, &[("x", value(&a)), ("y", value(&b))]);
    close(&both("floor_div"), &ints(&[3, -4, -4, 3]));
    close(&both("mod"), &ints(&[1, 1, -1, -1]));
    close(&both("less"), &Tensor::from_slice(&[false, true, false, true]));
    let wrong = [("x", value(&a)), ("y", value(&numbers))];
    assert!(try_all(9, "add", &wrong).is_err(), "an integer and a float");
    let selected = one("select", &[("cond", Value(x.gt(0.0))), ("a", value(&x)), ("b", Value(Tensor::from(0f32)))]);
    close(&selected, &x.relu());
    let zero = ints(&[0]);
    assert!(try_all(9, "floor_div", &[("x", value(&a)), ("y", value(&zero))]).is_err(), "division by zero");
}

#[test]
fn layouts() {
    let x = random(&[2, 3, 4]);
    let reshape = |shape: &[i64]| try_all(9, "reshape", &[("x", value(&x)), ("shape", Ints(shape.to_vec()))]);
    close(&reshape(&[0, -1, 2]).unwrap()[0], &x.reshape([2, 6, 2]));
    for wrong in [&[5, -1][..], &[0, -1], &[-1, -1], &[2, 3], &[i64::MAX, 2]] {
        assert!(reshape(wrong).is_err(), "{wrong:?}");
    }
    close(&one("expand_dims", &[("x", value(&x)), ("axes", Ints(vec![-1, 0]))]), &x.reshape([1, 2, 3, 4, 1]));
    let thin = x.reshape([2, 1, 3, 4, 1]);
    close(&one("squeeze", &[("x", value(&thin))]), &x);
    close(&one("squeeze", &[("x", value(&thin)), ("axes", Ints(vec![-1]))]), &x.reshape([2, 1, 3, 4]));
    let values = || List(vec![ints(&[1, 2]), ints(&[3, 4])]);
    let concat =
        |interleave| one("concat", &[("values", values()), ("axis", Int(0)), ("interleave", Flag(interleave))]);
    close(&concat(false), &ints(&[1, 2, 3, 4]));
    close(&concat(true), &ints(&[1, 3, 2, 4]));
    close(&one("stack", &[("values", values()), ("axis", Int(-1))]), &concat(true).reshape([2, 2]));
    let scalars = List(vec![Tensor::from(3i32), Tensor::from(4i32)]);
    close(&one("concat", &[("values", scalars), ("axis", Int(0)), ("interleave", Flag(false))]), &ints(&[3, 4]));
    let parts = all("split", &[("x", value(&x)), ("axis", Int(-1)), ("split_sizes", Ints(vec![1, 3]))]);
    close(&parts[1], &x.narrow(2, 1, 3));
    let huge = [("x", value(&x)), ("axis", Int(1)), ("split_sizes", Ints(vec![i64::MAX, i64::MAX, 5]))];
    assert!(try_all(9, "split", &huge).is_err());
    let pad = |mode: &'static str, pad: &[i64]| {
        let given = [("x", value(&x)), ("pad", Ints(pad.to_vec())), ("mode", Text(mode)), ("constant_val", Real(2.0))];
        one("pad", &given)
    };
    close(&pad("constant", &[0, 1, 2, 0]), &x.pad([2, 0, 0, 1], "constant", 2.0));
    close(&pad("reflect", &[1, 2, 3, 0]), &x.unsqueeze(0).pad([3, 0, 1, 2], "reflect", None).squeeze_dim(0));
    close(&pad("replicate", &[1, 2, 3, 0]), &x.unsqueeze(0).pad([3, 0, 1, 2], "replicate", None).squeeze_dim(0));
}

#[test]
fn picking() {
    let x = random(&[3, 5, 4]);
    let slice = |given: Vec<(&'static str, Given)>| {
        let mut all = vec![("x", value(&x))];
        all.extend(given);
        try_all(7, "slice_by_index", &all)
    };
    let picked = slice(vec![
        ("begin", Ints(vec![-1, 4, 0])),
        ("end", Ints(vec![0, 0, 9])),
        ("stride", Ints(vec![1, -2, 3])),
        ("end_mask", Flags(vec![false, true, false])),
        ("squeeze_mask", Flags(vec![true, false, false])),
    ]);
    let rows = x.select(0, 2).index_select(0, &Tensor::from_slice(&[4i64, 2, 0]));
    close(&picked.unwrap()[0], &rows.index_select(1, &Tensor::from_slice(&[0i64, 3])));
    assert!(slice(vec![("begin", Ints(vec![0, 2, 0])), ("end", Ints(vec![3, 2, 4]))]).is_err(), "an empty slice");
    let by_size = [("x", value(&x)), ("begin", Ints(vec![1, -2, 0])), ("size", Ints(vec![2, -1, 4]))];
    close(&one("slice_by_size", &by_size), &x.narrow(0, 1, 2).narrow(1, 3, 2));

    let gather = |version, indices: &[i32]| {
        let given = [
            ("x", value(&x)),
            ("indices", Value(ints(indices).reshape([1, -1]))),
            ("axis", Int(1)),
            ("batch_dims", Int(0)),
        ];
        try_all(version, "gather", &given)
    };
    close(&gather(7, &[4, -5]).unwrap()[0], &x.index_select(1, &Tensor::from_slice(&[4i64, 0])).unsqueeze(1));
    assert!(gather(9, &[4, -5]).is_err(), "negative indices from iOS 17 on");
    assert!(gather(7, &[5]).is_err() && gather(7, &[-6]).is_err());
    let pairs = ints(&[0, 1, 2, 4]).reshape([2, 2]);
    let picked = one("gather_nd", &[("x", value(&x)), ("indices", value(&pairs)), ("batch_dims", Int(0))]);
    close(&picked, &Tensor::stack(&[x.get(0).get(1), x.get(2).get(4)], 0));
}

#[test]
fn upsampling() {
    let x = random(&[1, 2, 3, 4]);
    let scale = |by: f32| [("x", value(&x)), ("scale_factor_height", Real(by)), ("scale_factor_width", Real(2.0))];
    close(&one("upsample_nearest_neighbor", &scale(3.0)), &x.upsample_nearest2d([9, 8], 3.0, 2.0));
    let mut given = Vec::from(scale(2.0));
    given.push(("align_corners", Flag(false)));
    close(&one("upsample_bilinear", &given), &x.upsample_bilinear2d([6, 8], false, 2.0, 2.0));
    for factor in [0.0, -1.0, 1e30, 60000.0 * 60000.0] {
        assert!(try_all(9, "upsample_nearest_neighbor", &scale(factor)).is_err(), "{factor}");
    }
}

/// Against numpy's argwhere, tile and assignment.
#[test]
fn places_and_what_is_put_there() {
    let x = ints(&[0, 3, 0, 5, 0, 7]).reshape([2, 3]);
    let places = one("non_zero", &[("x", value(&x))]);
    close(&places, &ints(&[0, 1, 1, 0, 1, 2]).reshape([3, 2]));
    close(&one("shape", &[("x", AtMost(places.shallow_clone(), 6))]), &ints(&[3, 2]));
    close(&one("tile", &[("x", value(&x)), ("reps", Ints(vec![2, 1]))]), &Tensor::cat(&[&x, &x], 0));
    let repeat = |times: i32, most: i64| {
        let reps = Computed(ints(&[times]), most);
        try_all(7, "tile", &[("x", Value(Tensor::from_slice(&[9.5f32]))), ("reps", reps)])
    };
    close(&repeat(3, 6).unwrap()[0], &Tensor::from_slice(&[9.5f32, 9.5, 9.5]));
    assert_eq!(repeat(0, 6).unwrap()[0].size(), [0]);
    assert!(repeat(7, 6).is_err() && repeat(-1, 6).is_err(), "not what was said before");
    assert!(repeat(1, i64::MAX).is_err(), "too many");
    for wrong in [vec![0, 1], vec![1], vec![1 << 25, 1]] {
        assert!(try_all(7, "tile", &[("x", value(&x)), ("reps", Ints(wrong))]).is_err());
    }

    let data = Tensor::from_slice(&[1f32, 2., 3., 4., 5., 6.]).reshape([2, 3]);
    let scatter = |indices: &Tensor, updates: &[f32], mode| {
        let updates = AtMost(Tensor::from_slice(updates), 6);
        let given = [
            ("data", value(&data)),
            ("indices", AtMost(indices.shallow_clone(), 6)),
            ("updates", updates),
            ("mode", mode),
        ];
        try_all(7, "scatter_nd", &given)
    };
    let put = scatter(&places, &[20., 40., 60.], Text("update")).unwrap();
    close(&put[0], &Tensor::from_slice(&[1f32, 20., 3., 40., 5., 60.]).reshape([2, 3]));
    let twice = Tensor::cat(&[&places, &places], 0);
    let added = scatter(&twice, &[1., 2., 3., 10., 20., 30.], Text("add")).unwrap();
    close(&added[0], &Tensor::from_slice(&[1f32, 13., 3., 26., 5., 39.]).reshape([2, 3]));
    close(&scatter(&places.narrow(0, 0, 0), &[], Text("update")).unwrap()[0], &data);
    assert!(scatter(&places, &[1., 2.], Text("update")).is_err(), "two values for three places");
    assert!(scatter(&ints(&[0, 3]).reshape([1, 2]), &[1.], Text("update")).is_err(), "outside");
    assert!(scatter(&places, &[1., 2., 3.], Text("div")).is_err());
    let rows = [
        ("data", value(&data)),
        ("indices", Value(ints(&[1]).reshape([1, 1]))),
        ("updates", Value(data.narrow(0, 0, 1))),
    ];
    let given = rows.into_iter().chain([("mode", Text("update"))]).collect::<Vec<_>>();
    close(&one("scatter_nd", &given), &Tensor::cat(&[data.narrow(0, 0, 1), data.narrow(0, 0, 1)], 0));
    let few = || AtMost(places.shallow_clone(), 6);
    close(&one("add", &[("x", few()), ("y", Value(ints(&[10, 20])))]), &(&places + ints(&[10, 20])));
    assert!(try_all(7, "add", &[("x", few()), ("y", value(&places))]).is_err(), "so many, and as many as there are");
    assert!(try_all(7, "add", &[("x", few()), ("y", AtMost(places.shallow_clone(), 5))]).is_err());
    for (kind, axes) in [("non_zero", vec![]), ("expand_dims", vec![("axes", Ints(vec![0]))])] {
        let given: Vec<_> = [("x", few())].into_iter().chain(axes).collect();
        assert!(try_all(7, kind, &given).is_err(), "{kind} of an unknown size");
    }
}
