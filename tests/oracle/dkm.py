"""What coremltools' differentiable k-means (`FakePalettize` of its DKMPalettizer) makes of a weight, forward and backward.

    python tests/oracle/dkm.py        (coremltools 9.0, torch)

Writes tests/fixtures/palettes/dkm.safetensors and dkm.json. Its own approximations are off (`zero_threshold`,
`prune_threshold`, `palett_epsilon` at 0) and it computes in 64 bits: then it is the paper's arithmetic.
"""
import json
import pathlib

import torch
from coremltools.optimize.torch.palettization import FakePalettize
from safetensors.torch import save_file
from torch.ao.quantization.observer import MovingAveragePerChannelMinMaxObserver

out = pathlib.Path(__file__).parent.parent / "fixtures" / "palettes"
torch.manual_seed(11)
# Multiples of 2⁻¹⁰; scales, half the range of a channel, are powers of two: divided by them or not, numbers of fp16.
weight = (torch.randn(16, 8, 3, 3) * 256).round().clamp(-1024, 1024).double() / 1024
weight[:, 0, 0, 0], weight[:, 0, 0, 1] = 1, -1
weight *= 2.0 ** torch.randint(-6, -3, (16, 1, 1, 1))
upstream = torch.randn(weight.shape)
tensors, cases = {"weight": weight.float(), "upstream": upstream}, []
upstream = upstream.double()

for bits, dim, group, scaled, softness in [
    (1, 1, None, False, 0.5), (2, 1, None, False, 1.0), (2, 1, None, False, 0.1), (4, 1, None, False, 0.3),
    (2, 1, 8, False, 0.3), (2, 1, 1, False, 0.3), (4, 1, 4, False, 1.0),
    (2, 1, None, True, 0.3), (4, 1, None, True, 0.3), (2, 1, 4, True, 0.3),
    (2, 2, None, False, 0.3), (4, 2, None, False, 0.3), (4, 2, 8, False, 0.3), (4, 4, None, False, 0.3), (4, 4, 8, False, 0.3),
]:
    options = dict(zero_threshold=0.0, prune_threshold=0.0, palett_epsilon=0.0, palett_tau=1.0)
    fake = FakePalettize(
        observer=MovingAveragePerChannelMinMaxObserver, dtype=torch.qint8, n_bits=bits, cluster_dim=dim, group_size=group,
        enable_per_channel_scale=scaled, advanced_options=options,
    )
    fake.enable_fake_palett()
    fake.train()
    with torch.no_grad():
        fake(weight.clone())  # it starts its centroids now
    # Then ours, so that they are known: spread over the weights of each group.
    start = []
    seen = weight / fake.per_channel_scaling_factor.view(-1, 1, 1, 1) if scaled else weight
    for rows in fake.partitions:
        points = seen[rows].transpose(0, -1).reshape(-1, dim) if dim > 1 else seen[rows].reshape(-1, 1)
        order = points[:, 0].argsort()
        start.append(points[order[torch.linspace(3, len(points) - 4, 2**bits).long()]].float().double())
    fake.centroids = [centroids.clone() for centroids in start]
    # As soft as this share of the mean distance to the nearest.
    fake.palett_tau = float(softness * sum(
        torch.cdist((seen[rows].transpose(0, -1).reshape(-1, dim) if dim > 1 else seen[rows].reshape(-1, 1)), c)
        .square().min(1).values.mean() for rows, c in zip(fake.partitions, start)) / len(start))
    leaf = weight.clone().requires_grad_()
    soft = fake(leaf.clone())
    soft.backward(upstream)
    name = f"{bits}-{dim}-{group or 'all'}-{'scaled' if scaled else 'plain'}-{softness}"
    tensors[f"{name}.start"] = torch.stack(start)
    tensors[f"{name}.centroids"] = torch.stack([c.double() for c in fake.centroids])
    tensors[f"{name}.soft"] = soft.detach().float()
    tensors[f"{name}.gradient"] = leaf.grad.float()
    if scaled:
        tensors[f"{name}.scales"] = fake.per_channel_scaling_factor.double().view(-1)
    cases.append(dict(name=name, bits=bits, cluster_dim=dim, group_size=group, tau=fake.palett_tau,
                      iterations=fake.kmeans_max_iter))
    print(name, soft.dtype, fake.palett_tau)

save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out / "dkm.safetensors")
(out / "dkm.json").write_text(json.dumps(cases, indent=1) + "\n")
