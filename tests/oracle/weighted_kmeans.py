"""What scikit-learn's weighted k-means makes of a few weights with importances.

    python tests/oracle/weighted_kmeans.py        (scikit-learn)

Writes tests/fixtures/palettes/weighted.safetensors (values fp16, importances fp32) and weighted.json: for each case and
number of bits the weighted squared error, sum of importance · (value − nearest centre)², of its centres as they are
("centres") and rounded to fp16 as a package stores them ("rounded"); the best of ten starts.
"""
import json
import pathlib
import warnings

import numpy as np
from safetensors.numpy import save_file
from sklearn.cluster import KMeans

warnings.filterwarnings("ignore")
out = pathlib.Path(__file__).parent.parent / "fixtures" / "palettes"
out.mkdir(parents=True, exist_ok=True)
rng = np.random.default_rng(11)
n = 3000

cases = {
    # Squares of gradients: a few weights matter thousands of times more than most.
    "squares": (0.02 * rng.standard_normal(n), rng.standard_normal(n) ** 4),
    # Large weights matter more.
    "large": (0.02 * rng.standard_t(4, n), None),
    # Half of the weights do not matter at all.
    "zeros": (rng.uniform(-1, 1, n), np.where(rng.random(n) < 0.5, 0, rng.random(n))),
    # Orders of magnitude apart, as between the ends of a layer that is hardly used and one that is.
    "wide": (0.1 * rng.standard_normal(n), 10 ** rng.uniform(-12, 0, n)),
}
tensors, errors = {}, {}
for name, (values, importance) in cases.items():
    values = values.astype(np.float16)
    importance = (values.astype(np.float64) ** 2 if importance is None else importance).astype(np.float32)
    tensors[f"{name}.values"], tensors[f"{name}.importance"] = values, importance
    x, weight = values.astype(np.float64)[:, None], importance.astype(np.float64)
    errors[name] = {}
    for bits in (1, 2, 3, 4, 6):
        means = KMeans(2**bits, n_init=10, random_state=0, tol=0, max_iter=1000).fit(x, sample_weight=weight)
        centres = means.cluster_centers_[:, 0]
        error = lambda c: float((weight * ((x - c[None, :]) ** 2).min(1)).sum())
        errors[name][bits] = {"centres": error(centres), "rounded": error(centres.astype(np.float16).astype(np.float64))}
save_file(tensors, out / "weighted.safetensors")
(out / "weighted.json").write_text(json.dumps(errors, indent=1) + "\n")
