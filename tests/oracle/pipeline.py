"""A tiny Stable Diffusion with random weights, and what diffusers draws with it, for tests/generate.rs.

    python tests/oracle/pipeline.py tests/fixtures/pipeline        (diffusers 0.42.1, transformers 5.23, torch 2.11)

Writes the diffusers folder `model/` (fp16), `prompts.json`, and `expected.safetensors`: the initial noise, the final
latents `SAMPLER.PREDICTION` of each sampler after 25 steps in fp32, and the pictures of one of them.
"""

import json
import shutil
import sys
import warnings
from pathlib import Path

import diffusers
import numpy as np
import torch
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

warnings.filterwarnings("ignore")
diffusers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()
out = Path(sys.argv[1])
shutil.rmtree(out, ignore_errors=True)
out.mkdir(parents=True)
torch.manual_seed(0)
PROMPT, NEGATIVE = "a red fox in the snow, painted", "blue"
# As in the files of Stable Diffusion 1: many keys are missing, and each sampler has its own defaults for them.
SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000,
    "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1, "clip_sample": False,
}  # fmt: skip


def tokenizer(folder):
    """CLIP's form with a vocabulary of bytes and a few merges."""
    folder.mkdir()
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    merges = ["t h", "th e</w>", "r e", "re d</w>", "f o", "fo x</w>", "i n</w>", "s n", "sn o", "sno w</w>"]
    words = symbols + [s + "</w>" for s in symbols] + ["".join(m.split()) for m in merges]
    words += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    config = special | {"pad_token": "<|endoftext|>", "model_max_length": 77, "tokenizer_class": "CLIPTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return CLIPTokenizer.from_pretrained(folder), len(words)


def randomize(module):
    """Norms and biases random too, so that one that is left out shows."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            if p.dim() > 1:
                p.normal_(0, (1 if "embedding" in name else p[0].numel()) ** -0.5)
            else:
                p.normal_(1.0 if name.endswith("weight") else 0.0, 0.1)
    return module.half().float().eval()


tokens, size = tokenizer(out / "tokenizer")
text_encoder = CLIPTextModel(CLIPTextConfig(
    vocab_size=size, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
    eos_token_id=size - 1, bos_token_id=size - 2, pad_token_id=size - 1,
))  # fmt: skip
unet = diffusers.UNet2DConditionModel(
    sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=16,
    attention_head_dim=2, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
)  # fmt: skip
vae = diffusers.AutoencoderKL(
    block_out_channels=(4, 4, 8, 8), layers_per_block=1, norm_num_groups=2, latent_channels=4,
    down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, sample_size=64,
)  # fmt: skip
pipe = diffusers.StableDiffusionPipeline(
    vae=randomize(vae), text_encoder=randomize(text_encoder), tokenizer=tokens, unet=randomize(unet),
    scheduler=diffusers.PNDMScheduler.from_config(SCHEDULER), safety_checker=None, feature_extractor=None,
    requires_safety_checker=False,
)  # fmt: skip
pipe.set_progress_bar_config(disable=True)
noise = torch.randn(2, 4, 8, 6, generator=torch.Generator().manual_seed(1))
expected = {"noise": noise}
for name, sampler in {
    "ddim": diffusers.DDIMScheduler, "pndm": diffusers.PNDMScheduler, "euler": diffusers.EulerDiscreteScheduler,
    "dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
}.items():  # fmt: skip
    for prediction in ("epsilon", "v_prediction"):
        pipe.scheduler = sampler.from_config(SCHEDULER | {"prediction_type": prediction})

        def draw(kind, scale=7.5):
            return pipe(
                prompt=PROMPT, negative_prompt=NEGATIVE, num_images_per_prompt=2, latents=noise.clone(),
                num_inference_steps=25, guidance_scale=scale, output_type=kind, height=64, width=48,
            ).images  # fmt: skip

        with torch.no_grad():
            expected[f"{name}.{prediction}"] = draw("latent")
            print(name, prediction, expected[f"{name}.{prediction}"].std())
            if (name, prediction) == ("pndm", "epsilon"):
                expected["unguided"] = draw("latent", 1.0)
                expected["pictures"] = torch.from_numpy(np.stack([np.asarray(image) for image in draw("pil")]))
save_file({name: tensor.contiguous() for name, tensor in expected.items()}, out / "expected.safetensors")
(out / "prompts.json").write_text(json.dumps({"prompt": PROMPT, "negative_prompt": NEGATIVE}) + "\n")

pipe.scheduler = diffusers.PNDMScheduler.from_config(SCHEDULER)
pipe.to(dtype=torch.float16).save_pretrained(out / "model")
(out / "model" / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER, indent=2) + "\n")
shutil.rmtree(out / "tokenizer")
for file in out.rglob("*.safetensors"):
    file.chmod(0o644)
