//! Under which names `metadata.json` counts operations: each with the set of operations that last defined it,
//! `Ios16.einsum`, and without one where that is the first, `Split`.
//!
//! Which set that is was read off the pairs, and off the names under which Core ML's plans of computation list operations,
//! which are the same. Apps look for `Ios16.einsum`, by which they know attention for the Neural Engine.

/// Those that the first set defined and none after it changed.
const FIRST_ONLY: [&str; 32] = [
    "affine",
    "argsort",
    "band_part",
    "cond",
    "crop",
    "cumsum",
    "depth_to_space",
    "fill",
    "flatten2d",
    "identity",
    "list_gather",
    "list_length",
    "list_read",
    "list_scatter",
    "list_write",
    "make_list",
    "non_zero",
    "one_hot",
    "pad",
    "random_normal",
    "random_uniform",
    "range_1d",
    "resize_bilinear",
    "resize_nearest_neighbor",
    "select",
    "shape",
    "space_to_depth",
    "split",
    "stack",
    "tile",
    "upsample_nearest_neighbor",
    "while_loop",
];

/// Those that iOS 17's set changed and iOS 16's did not: they move what they are given.
const SINCE_17: [&str; 13] = [
    "concat",
    "expand_dims",
    "logical_and",
    "logical_not",
    "logical_or",
    "logical_xor",
    "non_maximum_suppression",
    "reverse",
    "reverse_sequence",
    "slice_by_index",
    "slice_by_size",
    "squeeze",
    "transpose",
];

/// Those that iOS 16's set changed and none after it.
const UP_TO_16: [&str; 15] = [
    "einsum",
    "fill_like",
    "pixel_shuffle",
    "pixel_unshuffle",
    "reduce_l1_norm",
    "reduce_l2_norm",
    "reduce_log_sum",
    "reduce_log_sum_exp",
    "reduce_max",
    "reduce_mean",
    "reduce_min",
    "reduce_prod",
    "reduce_sum",
    "reduce_sum_square",
    "upsample_bilinear",
];

/// Those that iOS 16's and iOS 18's sets changed and iOS 17's did not: functions of one value.
const NOT_IN_17: [&str; 41] = [
    "abs",
    "acos",
    "asin",
    "atan",
    "atanh",
    "avg_pool",
    "ceil",
    "clamped_relu",
    "cos",
    "cosh",
    "elu",
    "erf",
    "exp",
    "exp2",
    "floor",
    "gelu",
    "l2_pool",
    "leaky_relu",
    "linear_activation",
    "max_pool",
    "prelu",
    "relu",
    "relu6",
    "round",
    "scaled_tanh",
    "sigmoid",
    "sigmoid_hard",
    "sign",
    "silu",
    "sin",
    "sinh",
    "softmax",
    "softplus",
    "softplus_parametric",
    "softsign",
    "sqrt",
    "square",
    "tan",
    "tanh",
    "threshold",
    "thresholded_relu",
];

/// Those that iOS 16's and iOS 17's sets changed and iOS 18's did not.
const UP_TO_17: [&str; 5] = ["crop_resize", "reduce_argmax", "reduce_argmin", "resample", "resize"];

/// How operations of a kind are counted in a function of the set `opset`, `ios16`.
pub fn counted_as(kind: &str, opset: &str) -> String {
    let has = |list: &[&str]| list.contains(&kind);
    let version = match opset {
        "ios15" => None,
        _ if has(&FIRST_ONLY) => None,
        "ios16" if has(&SINCE_17) => None,
        "ios16" => Some("Ios16"),
        _ if has(&UP_TO_16) => Some("Ios16"),
        "ios17" if has(&NOT_IN_17) || kind.starts_with("constexpr_") => Some("Ios16"),
        "ios17" => Some("Ios17"),
        _ if has(&UP_TO_17) => Some("Ios17"),
        _ => Some("Ios18"),
    };
    match version {
        None => camel(kind, true),
        Some(version) => format!("{version}.{}", camel(kind, false)),
    }
}

/// `slice_by_index` as `sliceByIndex`.
fn camel(kind: &str, mut upper: bool) -> String {
    let mut name = String::new();
    for letter in kind.chars() {
        if letter == '_' {
            upper = true;
        } else if std::mem::take(&mut upper) {
            name.push(letter.to_ascii_uppercase());
        } else {
            name.push(letter);
        }
    }
    name
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As Apple's compiler and Core ML's plans have them.
    #[test]
    fn operations_are_counted_as_apple_counts_them() {
        let cases = [
            ("ios15", "conv Conv slice_by_index SliceByIndex lstm Lstm"),
            ("ios16", "einsum Ios16.einsum split Split conv Ios16.conv transpose Transpose concat Concat"),
            ("ios16", "reshape Ios16.reshape reduce_mean Ios16.reduceMean layer_norm Ios16.layerNorm pad Pad"),
            (
                "ios16",
                "constexpr_lut_to_dense Ios16.constexprLutToDense upsample_nearest_neighbor UpsampleNearestNeighbor",
            ),
            ("ios17", "relu Ios16.relu softmax Ios16.softmax add Ios17.add less Ios17.less cast Ios17.cast"),
            ("ios17", "gather Ios17.gather transpose Ios17.transpose gelu Ios16.gelu einsum Ios16.einsum"),
            ("ios17", "constexpr_affine_dequantize Ios16.constexprAffineDequantize logical_and Ios17.logicalAnd"),
            ("ios18", "relu Ios18.relu einsum Ios16.einsum reduce_mean Ios16.reduceMean softmax Ios18.softmax"),
            ("ios17", "identity Identity conv Ios17.conv pad Pad tile Tile reduce_argmax Ios17.reduceArgmax"),
            ("ios18", "lstm Ios18.lstm max_pool Ios18.maxPool leaky_relu Ios18.leakyRelu gelu Ios18.gelu"),
            ("ios18", "concat Ios18.concat split Split select Select upsample_bilinear Ios16.upsampleBilinear"),
            ("ios18", "constexpr_lut_to_dense Ios18.constexprLutToDense sin Ios18.sin pow Ios18.pow"),
        ];
        for (opset, pairs) in cases {
            let words: Vec<&str> = pairs.split(' ').collect();
            for pair in words.chunks(2) {
                assert_eq!(counted_as(pair[0], opset), pair[1], "{opset}");
            }
        }
    }
}
