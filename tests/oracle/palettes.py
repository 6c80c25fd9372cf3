"""What coremltools' post-training palettizers make of a few weights, in every form that Palettist has too.

    python tests/oracle/palettes.py        (coremltools 9.0, torch, scikit-learn, kmeans1d)

Writes tests/fixtures/palettes/weights.safetensors (fp16) and errors.json: for each weight and form the relative squared
error of `optimize.coreml.palettize_weights` ("coreml") and of `optimize.torch.palettization.PostTrainingPalettizer`
with its fast mode ("fast") and without ("torch"), of values rounded to fp16 as a package stores them; null where the
tool has no such form.
"""
import json
import pathlib
import warnings

import numpy as np
import torch
from coremltools.optimize.coreml._quantization_passes import palettize_weights
from coremltools.optimize.torch.palettization import PostTrainingPalettizer, PostTrainingPalettizerConfig
from safetensors.numpy import save_file

warnings.filterwarnings("ignore")
out = pathlib.Path(__file__).parent.parent / "fixtures" / "palettes"
out.mkdir(parents=True, exist_ok=True)
rng = np.random.default_rng(7)
torch.manual_seed(7)
np.random.seed(7)

scales = lambda n: np.exp(0.3 * rng.standard_normal((n, 1)))
weights = {
    "normal": 0.02 * rng.standard_normal((48, 32 * 9)).reshape(48, 32, 3, 3),
    "scaled": 0.02 * (scales(64) * rng.standard_normal((64, 96))),
    "heavy": 0.02 * (scales(48) * rng.standard_t(4, (48, 128))).reshape(48, 128, 1, 1),
    "outliers": np.where(rng.random((64, 80)) < 0.002, 40, 1) * 0.01 * rng.standard_normal((64, 80)),
}
weights = {name: weight.astype(np.float16) for name, weight in weights.items()}
save_file(weights, out / "weights.safetensors")

plain = dict(group_size=None, axis=0, cluster_dim=1, per_channel_scale=False, lut_dtype="f16")
forms = [dict(plain, bits=bits) for bits in (1, 2, 3, 4, 6, 8)]
for bits in (2, 3, 4):
    forms += [
        dict(plain, bits=bits, group_size=16),
        dict(plain, bits=bits, group_size=4),
        dict(plain, bits=bits, group_size=1),
        dict(plain, bits=bits, group_size=16, axis=1),
        dict(plain, bits=bits, per_channel_scale=True),
        dict(plain, bits=bits, per_channel_scale=True, group_size=16),
        dict(plain, bits=bits, lut_dtype="i8"),
        dict(plain, bits=bits, lut_dtype="i8", group_size=16),
        dict(plain, bits=bits, cluster_dim=2),
        dict(plain, bits=bits, cluster_dim=2, group_size=16),
    ]
forms += [
    dict(plain, bits=6, cluster_dim=4),
    dict(plain, bits=8, cluster_dim=4),
    dict(plain, bits=6, cluster_dim=2),
    dict(plain, bits=6, cluster_dim=2, lut_dtype="i8"),
    dict(plain, bits=6, lut_dtype="i8"),
    dict(plain, bits=8, lut_dtype="i8"),
    dict(plain, bits=8, per_channel_scale=True),
]


def error(weight, got):
    weight, got = weight.astype(np.float64), np.asarray(got).astype(np.float16).astype(np.float64)
    return float(((got - weight) ** 2).sum() / (weight**2).sum())


def coreml(weight, form):
    """As `palettize_weights.transform_op`."""
    if form["lut_dtype"] == "i8" or form["per_channel_scale"]:
        return None  # it leaves tables as they are, and its scales are one a position of all axes but the output's
    made = palettize_weights.grouped_channelwise_compress(
        weight, "KMEANS", form["bits"], form["axis"], form["group_size"] or 0, cluster_dim=form["cluster_dim"]
    )
    return None if made is None else error(weight, palettize_weights.decompress(made))


def in_torch(weight, form, fast):
    out_channels, in_channels = weight.shape[:2]
    layer = (
        torch.nn.Linear(in_channels, out_channels)
        if weight.ndim == 2
        else torch.nn.Conv2d(in_channels, out_channels, weight.shape[2])
    )
    layer.weight.data = torch.from_numpy(weight.astype(np.float32))
    config = PostTrainingPalettizerConfig.from_dict({
        "global_config": {
            "n_bits": form["bits"],
            "lut_dtype": torch.int8 if form["lut_dtype"] == "i8" else None,
            "granularity": "per_grouped_channel" if form["group_size"] else "per_tensor",
            "group_size": form["group_size"],
            "channel_axis": form["axis"],
            "cluster_dim": form["cluster_dim"],
            "enable_per_channel_scale": form["per_channel_scale"],
            "enable_fast_kmeans_mode": fast,
        }
    })
    model = PostTrainingPalettizer(torch.nn.Sequential(layer), config).compress()
    got = model[0].weight.detach().numpy()
    return None if np.array_equal(got, weight.astype(np.float32)) else error(weight, got)


results = []
for name, weight in weights.items():
    for form in forms:
        row = {"weight": name, **form}
        for tool, run in [
            ("coreml", lambda: coreml(weight, form)),
            ("torch", lambda: in_torch(weight, form, False)),
            ("fast", lambda: in_torch(weight, form, True)),
        ]:
            try:
                row[tool] = run()
            except Exception as failure:  # a form that the tool refuses
                row[tool] = None
                print(name, form, tool, type(failure).__name__, failure)
        results.append(row)
        print(json.dumps(row), flush=True)
(out / "errors.json").write_text("[\n" + ",\n".join(map(json.dumps, results)) + "\n]\n")
