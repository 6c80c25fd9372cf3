"""Prints the numbers in the test of src/train/learning_rate.rs (diffusers 0.42)."""

import torch
from diffusers.optimization import get_scheduler

for name in ["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = get_scheduler(name, optimizer, num_warmup_steps=10, num_training_steps=110, num_cycles=2, power=2.0)
    rates = []
    for _ in range(110):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    print(name, [rates[step] for step in (0, 5, 10, 35, 60, 109)])
