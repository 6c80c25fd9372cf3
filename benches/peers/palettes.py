"""One layer's differentiable k-means, forward and backward, by a peer: prints seconds of wall time, seconds of CPU time
and bytes of memory beyond weight, soft weight and gradient.

    python palettes.py coremltools|autograd BITS SHAPE...
"""
import resource
import sys
import time

import torch

peer, bits, shape = sys.argv[1], int(sys.argv[2]), [int(size) for size in sys.argv[3:]]
count = 1
for size in shape:
    count *= size
# Measured: bytes a weight at its peak, with room; beyond what the machine has the answer is "-".
needed = count * (220 if bits == 2 else 760)
with open("/proc/meminfo") as file:
    free = next(int(line.split()[1]) for line in file if line.startswith("MemAvailable")) * 1024
if needed > free:
    print("too large")
    sys.exit()

fan_in = count // shape[0]
torch.manual_seed(0)
weight = (torch.randn(shape) / fan_in**0.5).requires_grad_()
upstream = torch.randn(shape)
variance = 1 / fan_in

if peer == "coremltools":
    from coremltools.optimize.torch.palettization import DKMPalettizer, DKMPalettizerConfig, ModuleDKMPalettizerConfig

    layer = torch.nn.Linear(fan_in, shape[0], bias=False) if len(shape) == 2 else torch.nn.Conv2d(shape[1], shape[0], shape[2], bias=False)
    layer.weight.data.copy_(weight.data)
    options = dict(n_bits=bits, weight_threshold=0, palett_tau=0.01 * variance, kmeans_max_iter=3, palett_epsilon=0.0)
    config = DKMPalettizerConfig(global_config=ModuleDKMPalettizerConfig(**options))
    palettizer = DKMPalettizer(torch.nn.Sequential(layer), config)
    prepared = palettizer.prepare()
    palettizer.step()
    prepared.train()
    (run,) = [module for module in prepared.modules() if type(module).__name__ == "FakePalettize"]
    # Its own initialisation takes minutes on large layers and is not what is measured: quantiles instead.
    quantiles = (torch.arange(2**bits) + 0.5) / 2**bits
    run.create_partitions(weight.detach())
    run.centroids = [torch.quantile(weight.detach().flatten()[: 1 << 16], quantiles).reshape(-1, 1)]
    run.init_partitions = lambda weights: None

    def step(w):
        return run(w)
else:
    centroids = torch.quantile(weight.detach().flatten()[: 1 << 16], (torch.arange(2**bits) + 0.5) / 2**bits)

    def step(w):
        column, entries = w.reshape(-1, 1), centroids
        for _ in range(3):
            attention = torch.softmax(-((column - entries) ** 2) / (0.01 * variance), dim=1)
            entries = (attention * column).sum(0) / attention.sum(0)
        return (attention @ entries).reshape(w.shape)


def once():
    weight.grad = None
    step(weight).backward(upstream)


def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) * 1024


before = peak()
once()
memory = peak() - before - 8 * count
best_wall = best_cpu = float("inf")
for _ in range(2):
    usage, start = resource.getrusage(resource.RUSAGE_SELF), time.time()
    once()
    after = resource.getrusage(resource.RUSAGE_SELF)
    best_wall = min(best_wall, time.time() - start)
    best_cpu = min(best_cpu, after.ru_utime + after.ru_stime - usage.ru_utime - usage.ru_stime)
print(best_wall, best_cpu, memory)
