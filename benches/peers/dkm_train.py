"""coremltools' DKMPalettizer, trained in PyTorch on the same model with the same pictures, steps and loss as
`palettist train configs/study-2bit.toml`: distillation of the output, AdamW, cosine.

    python benches/peers/dkm_train.py MODEL PICTURES OUT [--bits 2] [--steps 200] [--learning-rate 3e-4] [--tau 1e-4]

MODEL is a diffusers folder, PICTURES one with metadata.jsonl; OUT gets the model with the palettized weights, which
`palettist evaluate OUT --config configs/study-2bit.toml` measures. Prints the seconds of processor time of the
initialisation and of each step. Needs torch, diffusers, transformers, coremltools, Pillow.
"""

import argparse
import copy
import json
import math
import resource
import shutil
from pathlib import Path

import numpy
import torch
from coremltools.optimize.torch.palettization import DKMPalettizer, DKMPalettizerConfig, ModuleDKMPalettizerConfig
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer

parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("pictures", type=Path)
parser.add_argument("out", type=Path)
parser.add_argument("--bits", type=int, default=2)
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--batch", type=int, default=16)
parser.add_argument("--learning-rate", type=float, default=3e-4)
parser.add_argument("--tau", type=float, default=1e-4, help="palett_tau; coremltools' default is 1e-4")
parser.add_argument("--seed", type=int, default=42)
parser.add_argument("--cache", type=Path, help="a file for the encoded pictures")
arguments = parser.parse_args()


def processor():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def load(kind, part):
    return kind.from_pretrained(arguments.model, subfolder=part, torch_dtype=torch.float32).eval()


torch.manual_seed(arguments.seed)
lines = [json.loads(line) for line in (arguments.pictures / "metadata.jsonl").read_text().splitlines()]
autoencoder = load(AutoencoderKL, "vae")
if arguments.cache and arguments.cache.exists():
    moments = torch.from_numpy(numpy.load(arguments.cache))
else:
    encoded = []
    with torch.no_grad():
        for line in lines:
            picture = numpy.asarray(Image.open(arguments.pictures / line["file_name"]).convert("RGB"), dtype="float32")
            picture = torch.from_numpy(picture).permute(2, 0, 1)[None] / 127.5 - 1
            encoded.append(autoencoder.encode(picture).latent_dist.parameters)
    moments = torch.cat(encoded)
    if arguments.cache:
        numpy.save(arguments.cache, moments.numpy())
tokenizer = CLIPTokenizer.from_pretrained(arguments.model, subfolder="tokenizer")
text_encoder = load(CLIPTextModel, "text_encoder")
captions = [""] + [line["text"] for line in lines]
ids = tokenizer(captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
with torch.no_grad():
    texts = torch.cat([text_encoder(part)[0] for part in ids.split(64)])
schedule = DDPMScheduler.from_pretrained(arguments.model, subfolder="scheduler")
unet = load(UNet2DConditionModel, "unet")
teacher = copy.deepcopy(unet).requires_grad_(False)

options = dict(n_bits=arguments.bits, palett_tau=arguments.tau, kmeans_n_init=1, kmeans_init="cpu.kmeans++")
config = DKMPalettizerConfig(global_config=ModuleDKMPalettizerConfig(**options))
palettizer = DKMPalettizer(unet, config)
student = palettizer.prepare()
student.train()
optimizer = torch.optim.AdamW(student.parameters(), lr=arguments.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
order = torch.randperm(len(lines))
for step in range(arguments.steps):
    began = processor()
    palettizer.step()
    for group in optimizer.param_groups:
        group["lr"] = arguments.learning_rate * 0.5 * (1 + math.cos(math.pi * step / arguments.steps))
    chosen = order[torch.arange(step * arguments.batch, (step + 1) * arguments.batch) % len(lines)]
    mean, logvar = moments[chosen].chunk(2, dim=1)
    latents = (mean + torch.exp(0.5 * logvar.clamp(-30, 20)) * torch.randn_like(mean)) * autoencoder.config.scaling_factor
    dropped = torch.rand(arguments.batch) < 0.1
    context = texts[torch.where(dropped, 0, chosen + 1)]
    noise = torch.randn_like(latents)
    timesteps = torch.randint(0, schedule.config.num_train_timesteps, (arguments.batch,))
    noised = schedule.add_noise(latents, noise, timesteps)
    with torch.no_grad():
        taught = teacher(noised, timesteps, context).sample
    loss = torch.nn.functional.mse_loss(student(noised, timesteps, context).sample, taught)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(f"step {step + 1}: loss {loss.item():.4f}, {processor() - began:.1f} s of processor, peak {peak:.2f} GB", flush=True)

student.eval()
finished = palettizer.finalize()
shutil.copytree(arguments.model, arguments.out, dirs_exist_ok=True)
weights = {name: value for name, value in finished.state_dict().items() if "_COREML_" not in name}
for name, value in weights.items():
    if value.dim() > 1 and value.numel() > 2048 and value.unique().numel() > 2**arguments.bits:
        print(f"{name} has {value.unique().numel()} values")
plain = UNet2DConditionModel.from_config(teacher.config)
plain.load_state_dict(weights)
plain.save_pretrained(arguments.out / "unet")
