"""Training steps of a UNet with diffusers, one for each line of the input: prints seconds of wall time, of CPU time, and
bytes beyond what is held between steps.

    python step.py MODEL BATCH
"""
import resource
import sys
import time

import torch
from diffusers import UNet2DConditionModel

folder, batch = sys.argv[1], int(sys.argv[2])
unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", torch_dtype=torch.float32)
unet.train()
optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-6, weight_decay=0.01, fused=True)
config = unet.config
latents = torch.randn(batch, config.in_channels, config.sample_size, config.sample_size)
noise = torch.randn(batch, config.out_channels, config.sample_size, config.sample_size)
text = torch.randn(batch, 77, config.cross_attention_dim)
timesteps = torch.randint(1000, (batch,))


def step():
    output = unet(latents, timesteps, text).sample
    torch.nn.functional.mse_loss(output, noise).backward()
    torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def memory(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field)) * 1024


step()
for _ in sys.stdin:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    held, usage, start = memory("VmRSS"), resource.getrusage(resource.RUSAGE_SELF), time.time()
    step()
    wall, after = time.time() - start, resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - usage.ru_utime - usage.ru_stime
    print(wall, cpu, memory("VmHWM") - held, flush=True)
