//! Which inputs each operation has, which of them must be constant, and which Core ML's own parser wants written out
//! although they have a default.

/// One input of an operation.
#[derive(Clone, Copy, Debug)]
pub struct Input {
    pub name: &'static str,
    /// A tensor to compute with; otherwise a parameter, whose value decides shapes or the formula.
    pub operand: bool,
    /// Bound to a list of values.
    pub list: bool,
    /// May be left out.
    pub optional: bool,
    /// Must be constant before this specification version.
    pub constant_before: i32,
    /// First specification version that has it.
    pub since: i32,
    /// A parameter that may be computed too.
    pub computed: bool,
}

impl Input {
    const fn optional(mut self) -> Self {
        self.optional = true;
        self
    }
    const fn constant_before(mut self, version: i32) -> Self {
        self.constant_before = version;
        self
    }
    const fn constant(self) -> Self {
        self.constant_before(i32::MAX)
    }
    const fn since(mut self, version: i32) -> Self {
        self.since = version;
        self
    }
    const fn computed(mut self) -> Self {
        self.computed = true;
        self.constant_before(0)
    }
    const fn list(mut self) -> Self {
        self.list = true;
        self
    }
}

const fn operand(name: &'static str) -> Input {
    Input { name, operand: true, list: false, optional: false, constant_before: 0, since: 0, computed: false }
}

const fn parameter(name: &'static str) -> Input {
    Input { constant_before: i32::MAX, operand: false, ..operand(name) }
}

const X: Input = operand("x");
const Y: Input = operand("y");
const VALUES: Input = operand("values").list();
const GAMMA: Input = operand("gamma").constant().optional();
const BETA: Input = operand("beta").constant().optional();
const EPSILON: Input = parameter("epsilon");
const AXIS: Input = parameter("axis");
const STRIDES: Input = parameter("strides");
const PAD_TYPE: Input = parameter("pad_type");
const PAD: Input = parameter("pad");
const DILATIONS: Input = parameter("dilations");
const GROUPS: Input = parameter("groups");
const KEEP_DIMS: Input = parameter("keep_dims");
const INDICES: Input = operand("indices");
const BATCH_DIMS: Input = parameter("batch_dims").since(7);
const VALIDATE_INDICES: Input = parameter("validate_indices").since(8);
const SCALE_HEIGHT: Input = parameter("scale_factor_height");
const SCALE_WIDTH: Input = parameter("scale_factor_width");

/// The inputs of an operation, or `None` where this reader does not know it. Parameters that are not optional have to
/// be written out; those that are newer than the model have to be left out.
pub fn inputs(operation: &str) -> Option<&'static [Input]> {
    Some(match operation {
        "silu" | "sigmoid" | "tanh" | "relu" | "erf" | "exp" | "sin" | "cos" | "sqrt" | "abs" | "square"
        | "identity" | "logical_not" | "shape" | "non_zero" => &[X],
        "gelu" => const { &[X, parameter("mode")] },
        "rsqrt" | "log" | "inverse" => &[X, EPSILON],
        "clip" => const { &[X, parameter("alpha"), parameter("beta")] },
        "add" | "sub" | "mul" | "real_div" | "maximum" | "minimum" | "floor_div" | "mod" | "pow" | "equal"
        | "not_equal" | "less" | "less_equal" | "greater" | "greater_equal" | "logical_and" | "logical_or" => &[X, Y],
        "select" => const { &[operand("cond"), operand("a"), operand("b")] },
        "cast" => const { &[X, parameter("dtype")] },
        "softmax" => &[X, AXIS],
        "conv" => {
            const {
                &[
                    X,
                    operand("weight"),
                    operand("bias").optional().constant_before(8),
                    STRIDES,
                    PAD_TYPE,
                    PAD,
                    DILATIONS,
                    GROUPS,
                ]
            }
        }
        "conv_transpose" => {
            const {
                &[
                    X,
                    operand("weight").constant_before(8),
                    operand("bias").optional().constant_before(8),
                    STRIDES,
                    PAD_TYPE,
                    PAD,
                    DILATIONS,
                    GROUPS,
                    parameter("output_shape").optional(),
                ]
            }
        }
        "linear" => const { &[X, operand("weight").constant(), operand("bias").constant()] },
        "matmul" => const { &[X, Y, parameter("transpose_x"), parameter("transpose_y")] },
        "einsum" => const { &[VALUES, parameter("equation")] },
        "scaled_dot_product_attention" => {
            const {
                &[
                    operand("query").since(9),
                    operand("key").since(9),
                    operand("value").since(9),
                    operand("attn_mask").optional(),
                ]
            }
        }
        "layer_norm" => const { &[X, parameter("axes"), GAMMA, BETA, EPSILON] },
        "batch_norm" => {
            const { &[X, operand("mean").constant(), operand("variance").constant(), GAMMA, BETA, EPSILON] }
        }
        "instance_norm" => &[X, GAMMA, BETA, EPSILON],
        "reduce_mean" | "reduce_sum" | "reduce_max" | "reduce_min" | "reduce_l2_norm" => {
            const { &[X, parameter("axes").optional(), KEEP_DIMS] }
        }
        "reduce_argmax" => const { &[X, AXIS, KEEP_DIMS, parameter("output_dtype").since(8)] },
        "reshape" => const { &[X, parameter("shape")] },
        "transpose" => const { &[X, parameter("perm")] },
        "expand_dims" => const { &[X, parameter("axes")] },
        "squeeze" => const { &[X, parameter("axes").optional()] },
        "concat" => const { &[VALUES, AXIS, parameter("interleave")] },
        "stack" => &[VALUES, AXIS],
        "split" => const { &[X, AXIS, parameter("num_splits").optional(), parameter("split_sizes").optional()] },
        "slice_by_index" => {
            const {
                &[
                    X,
                    parameter("begin"),
                    parameter("end"),
                    parameter("stride").optional(),
                    parameter("begin_mask").optional(),
                    parameter("end_mask").optional(),
                    parameter("squeeze_mask").optional(),
                ]
            }
        }
        "slice_by_size" => const { &[X, parameter("begin"), parameter("size")] },
        "gather" => &[X, INDICES, AXIS, BATCH_DIMS, VALIDATE_INDICES],
        "gather_nd" => &[X, INDICES, BATCH_DIMS, VALIDATE_INDICES],
        "scatter_nd" => const { &[operand("data"), INDICES, operand("updates"), parameter("mode"), VALIDATE_INDICES] },
        "tile" => const { &[X, parameter("reps").computed()] },
        "upsample_nearest_neighbor" => &[X, SCALE_HEIGHT, SCALE_WIDTH],
        "upsample_bilinear" => {
            const {
                &[
                    X,
                    SCALE_HEIGHT,
                    SCALE_WIDTH,
                    parameter("align_corners"),
                    parameter("half_pixel_centers").optional().since(7),
                ]
            }
        }
        "pad" => const { &[X, PAD, parameter("mode"), parameter("constant_val")] },
        _ => return None,
    })
}
