"""coremltools' palettize_weights (k-means, without training) of one layer: prints seconds of wall time, seconds of
processor time, and the squared error over the weights' sum of squares.

    python palettize.py FILE.safetensors BITS     `weight` in it: fp16, [out, in] or [out, in, height, width]
"""

import resource
import sys
import time

import coremltools as ct
import numpy as np
from coremltools.converters.mil import Builder as mb
from coremltools.optimize.coreml import OpPalettizerConfig, OptimizationConfig, palettize_weights
from safetensors.numpy import load_file

weight, bits = load_file(sys.argv[1])["weight"], int(sys.argv[2])
convolution = weight.ndim == 4
shape = (1, weight.shape[1], 8, 8) if convolution else (1, weight.shape[1])


@mb.program(input_specs=[mb.TensorSpec(shape=shape, dtype=ct.converters.mil.mil.types.fp16)], opset_version=ct.target.iOS16)
def program(x):
    if convolution:
        return mb.conv(x=x, weight=weight, name="y")
    return mb.linear(x=x, weight=weight, name="y")


def processor():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime + children.ru_utime + children.ru_stime


model = ct.convert(program, minimum_deployment_target=ct.target.iOS16, skip_model_load=True)
config = OptimizationConfig(global_config=OpPalettizerConfig(mode="kmeans", nbits=bits, weight_threshold=0))
began, cpu = time.time(), processor()
palettized = palettize_weights(model, config)
wall, cpu = time.time() - began, processor() - cpu
(found,) = [
    op.outputs[0].op
    for op in palettized._mil_program.functions["main"].operations
    if op.op_type == "constexpr_lut_to_dense"
]
dense = found.outputs[0].val if found.outputs[0].val is not None else found.materialized_val_inference()
difference = dense.astype(np.float64).reshape(weight.shape) - weight
print(wall, cpu, (difference**2).sum() / (weight.astype(np.float64) ** 2).sum())
