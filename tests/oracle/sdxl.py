"""A tiny Stable Diffusion XL with random weights, and what diffusers draws with it, for tests/sdxl.rs.

    python tests/oracle/sdxl.py          (torch 2.11, diffusers 0.42.1, transformers 5.23)

Writes tests/fixtures/sdxl/: the diffusers folder `model/` (fp16), `prompts.json`, and `expected.safetensors`: the initial
noise, final latents after 12 steps in fp32, and pictures. Weights are those of networks.py, computed from their names.
"""

import json
import shutil
import warnings
from pathlib import Path

import diffusers
import numpy as np
import torch
from networks import fill, tiny_tokenizer
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

warnings.filterwarnings("ignore")
diffusers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()
OUT = Path(__file__).parents[1] / "fixtures" / "sdxl"
PROMPT, NEGATIVE = "a red cat, a dog!", "dog"
# Stable Diffusion XL's own.
SCHEDULER = dict(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000, steps_offset=1,
    timestep_spacing="leading", interpolation_type="linear", use_karras_sigmas=False,
)  # fmt: skip


def halved(model):
    return fill(model).half().float()


@torch.no_grad()
def main():
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    size = tiny_tokenizer(OUT / "tokenizer")
    first = CLIPTokenizer.from_pretrained(OUT / "tokenizer")
    (OUT / "tokenizer" / "special_tokens_map.json").write_text(json.dumps({"pad_token": "!"}))
    second = CLIPTokenizer.from_pretrained(OUT / "tokenizer")
    shutil.rmtree(OUT / "tokenizer")
    text = dict(vocab_size=size, num_attention_heads=2, bos_token_id=0, pad_token_id=1, eos_token_id=2)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=20,
        attention_head_dim=(1, 2, 4), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 10,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4, 4, 8, 8), layers_per_block=1, norm_num_groups=2, latent_channels=4, sample_size=64,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        scaling_factor=0.13025, force_upcast=True,
    )  # fmt: skip
    pipe = diffusers.StableDiffusionXLPipeline(
        vae=halved(vae),
        text_encoder=halved(CLIPTextModel(CLIPTextConfig(
            **text, hidden_size=8, intermediate_size=16, num_hidden_layers=2, projection_dim=8,
            architectures=["CLIPTextModel"],
        ))),
        text_encoder_2=halved(CLIPTextModelWithProjection(CLIPTextConfig(
            **text, hidden_size=12, intermediate_size=24, num_hidden_layers=3, projection_dim=10, hidden_act="gelu",
            architectures=["CLIPTextModelWithProjection"],
        ))),
        tokenizer=first, tokenizer_2=second, unet=halved(unet),
        scheduler=diffusers.EulerDiscreteScheduler(**SCHEDULER), add_watermarker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    own = pipe.scheduler
    noise = torch.randn(2, 4, 8, 6, generator=torch.Generator().manual_seed(1))
    expected = {"noise": noise}

    def draw(kind, sampler=own, negative=NEGATIVE, **more):
        pipe.scheduler = sampler
        return pipe(
            prompt=PROMPT, negative_prompt=negative, num_images_per_prompt=2, latents=noise.clone(),
            num_inference_steps=12, output_type=kind, height=64, width=48, **more,
        ).images  # fmt: skip

    solver = diffusers.DPMSolverMultistepScheduler.from_config(own.config)
    expected["euler"] = draw("latent", guidance_scale=5.0)
    expected["dpmpp_2m"] = draw("latent", sampler=solver, guidance_scale=5.0)
    expected["without_negative"] = draw("latent", negative=None, guidance_scale=5.0)
    expected["unguided"] = draw("latent", guidance_scale=1.0)
    for name, latents in expected.items():
        print(name, latents.std())
    expected["pictures"] = torch.from_numpy(np.stack([np.asarray(i) for i in draw("pil", guidance_scale=5.0)]))
    save_file({name: tensor.contiguous() for name, tensor in expected.items()}, OUT / "expected.safetensors")
    (OUT / "prompts.json").write_text(json.dumps({"prompt": PROMPT, "negative_prompt": NEGATIVE}) + "\n")
    pipe.scheduler = own
    pipe.to(dtype=torch.float16).save_pretrained(OUT / "model")
    for file in OUT.rglob("*.safetensors"):
        file.chmod(0o644)


if __name__ == "__main__":
    main()
