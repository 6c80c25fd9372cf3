"""Apple's converter, ml-stable-diffusion's torch2coreml, on a model of this machine.

    python apple.py MODEL OUT [its options, as --convert-unet --attention-implementation SPLIT_EINSUM]

MODEL is a diffusers folder of fp16 safetensors, one file a network. The packages go into OUT. Needs
ml-stable-diffusion and the versions that it pins: Python 3.11, torch 2.4.1, diffusers 0.30.2, transformers 4.44.2,
coremltools 8.3.0, numpy 1.23.5, scikit-learn 1.5.1; not diffusionkit, which is for Stable Diffusion 3.
"""

import os
import sys
import tempfile
import types
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
model, out, options = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve(), sys.argv[3:]

# Imported at the top of the converter, whatever is converted.
for name in ["diffusionkit", "diffusionkit.tests", "diffusionkit.tests.torch2coreml"]:
    sys.modules[name] = types.ModuleType(name)
for name in ["convert_mmdit_to_mlpackage", "convert_vae_to_mlpackage"]:
    setattr(sys.modules["diffusionkit.tests.torch2coreml"], name, None)
try:
    from python_coreml_stable_diffusion import torch2coreml
except ImportError as error:
    sys.exit(f"Apple's converter is not installed: {error}")

with tempfile.TemporaryDirectory() as folder:
    # It only loads files that are called fp16.
    copy = Path(folder) / "model"
    for path in model.rglob("*"):
        place = copy / path.relative_to(model)
        if path.suffix == ".safetensors" and not path.stem.endswith(".fp16"):
            place = place.with_suffix(".fp16.safetensors")
        if path.is_file() and not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(path)
    # The path is part of the packages' names.
    os.chdir(folder)
    arguments = torch2coreml.parser_spec().parse_args(["--model-version", "model", "-o", str(out), *options])
    torch2coreml.main(arguments)
