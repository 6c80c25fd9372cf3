"""Packages against diffusers' and transformers' own networks, for tests/coreml_components.rs.

    python tests/oracle/components.py make FOLDER           (torch 2.11, diffusers 0.42.1, transformers 5.23)
    python tests/oracle/components.py check FOLDER TOOLS    (and coremltools 9)

`make` writes small models with random weights, as diffusers saves them in fp16: FOLDER/sd1/model (predicts noise, quick
GELU), FOLDER/sd2v/model (predicts v, GELU, linear projections) and FOLDER/bk/model (BK-SDM: no middle block). `check` takes
the packages in FOLDER/*/coreml, validates each with the independent checker in TOOLS, loads it with coremltools, runs it,
and compares with the network of the model; it prints as JSON, for each package, what was wrong with it, its inputs and
outputs, and the PSNRs in dB.
"""

import json
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from networks import BK_TINY, TEXT1, TEXT2, VAE, VISION, fill, given, safety_check, tiny_tokenizer
from transformers import CLIPConfig, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

UNET = dict(
    BK_TINY,
    sample_size=8,
    block_out_channels=[16, 32],
    norm_num_groups=8,
    attention_head_dim=4,
    cross_attention_dim=32,
    mid_block_type="UNetMidBlock2DCrossAttn",
    down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
    up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"],
)
SMALL_VAE = dict(VAE, block_out_channels=[8, 16, 16, 16], layers_per_block=1)
MODELS = {
    "sd1": (UNET, TEXT1, "epsilon"),
    "sd2v": (dict(UNET, attention_head_dim=[2, 4], use_linear_projection=True), TEXT2, "v_prediction"),
    "bk": (dict(UNET, mid_block_type=None), TEXT1, "epsilon"),
}


def make(folder):
    size = tiny_tokenizer(folder / "vocabulary")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "vocabulary")
    for name, (unet, text, prediction) in MODELS.items():
        text = dict(text, vocab_size=size)
        if name == "sd2v":
            text["eos_token_id"] = tokenizer.eos_token_id
        StableDiffusionPipeline(
            vae=fill(AutoencoderKL(**SMALL_VAE)),
            text_encoder=fill(CLIPTextModel(CLIPTextConfig(**text))),
            tokenizer=tokenizer,
            unet=fill(UNet2DConditionModel(**unet)),
            scheduler=DDIMScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                clip_sample=False,
                set_alpha_to_one=False,
                steps_offset=1,
                prediction_type=prediction,
            ),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).to(torch.float16).save_pretrained(folder / name / "model")
    checker = fill(StableDiffusionSafetyChecker(CLIPConfig(vision_config=VISION, projection_dim=24)))
    checker.to(torch.float16).save_pretrained(folder / "sd1" / "model" / "safety_checker")


def cases(component, pipe):
    """Names of cases, inputs and expected outputs of a network."""
    if component == "text_encoder":
        for text in ["a red cat", "dog " * 90]:
            ids = pipe.tokenizer(text, padding="max_length", truncation=True, return_tensors="pt").input_ids
            out = pipe.text_encoder(ids)
            yield text[:9], dict(input_ids=ids.float()), dict(
                last_hidden_state=out.last_hidden_state, pooled_outputs=out.pooler_output
            )
    elif component == "vae_decoder":
        z = given("z", [1, 4, 8, 8]).half().float()
        yield "z", dict(z=z), dict(image=pipe.vae.decode(z).sample)
    elif component == "vae_encoder":
        x = given("x", [1, 3, 64, 64]).half().float()
        yield "x", dict(x=x), dict(latent=pipe.vae.encode(x).latent_dist.parameters)
    elif component == "safety_checker":
        folder = Path(pipe.config._name_or_path) / "safety_checker"
        checker = StableDiffusionSafetyChecker.from_pretrained(folder, torch_dtype=torch.float32)
        for name, adjustment in [("plain", 0.0), ("stricter", 2.0)]:
            inputs = dict(clip_input=given(f"clip {name}", [1, 3, 42, 42]).half().float())
            inputs |= dict(images=given("images", [1, 64, 64, 3]).half().float(), adjustment=torch.tensor([adjustment]))
            yield name, inputs, safety_check(checker, **inputs)
    else:
        for t in [0, 1, 501, 981, 999]:
            sample, context = given(f"sample {t}", [2, 4, 8, 8]).half().float(), given("context", [2, 77, 32]).half().float()
            out = pipe.unet(sample, torch.tensor(t), context).sample
            if pipe.scheduler.config.prediction_type == "v_prediction":
                alpha = pipe.scheduler.alphas_cumprod[t].double()
                out = (alpha**0.5 * out.double() + (1 - alpha) ** 0.5 * sample.double()).float()
            inputs = dict(sample=sample, timestep=torch.full([2], float(t)))
            inputs["encoder_hidden_states"] = context.permute(0, 2, 1).unsqueeze(2).contiguous()
            yield f"t {t}", inputs, dict(noise_pred=out)


@torch.no_grad()
def check(folder, tools):
    import coremltools

    sys.path.insert(0, str(tools))
    import mlpackage_eval as M

    results = {}
    for model in sorted(folder.glob("*/model")):
        pipe = StableDiffusionPipeline.from_pretrained(model, torch_dtype=torch.float32)
        for path in sorted(model.parent.glob("coreml*/*.mlpackage")):
            component = path.stem.split("_tiny_")[1]
            package = M.validate(str(path))
            rows = {}
            for name, inputs, expected in cases(component, pipe):
                for precision in ["fp32", "fp16"]:
                    arrays = {key: tensor.numpy() for key, tensor in inputs.items()}
                    got = M.run(package, arrays, precision=precision)
                    assert got.keys() == expected.keys(), (got.keys(), expected.keys())
                    for key, tensor in expected.items():
                        psnr = M.compare(got[key], tensor.numpy())["psnr_db"]
                        # JSON has no infinity, which equal outputs give.
                        rows[f"{name}, {key}, {precision}"] = min(psnr, 999.0)
            # Last, for it rewrites the manifest.
            description = coremltools.models.MLModel(str(path), skip_model_load=True).get_spec().description
            kinds = {65552: "fp16", 65568: "fp32"}
            port = lambda f: f"{f.name} {kinds[f.type.multiArrayType.dataType]} {list(f.type.multiArrayType.shape)}"
            results[f"{model.parent.name}/{path.parent.name}/{component}"] = dict(
                issues=[str(issue) for issue in package.issues],
                ports=[port(f) for f in [*description.input, *description.output]],
                rows=rows,
            )
    print(json.dumps(results))


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(Path(sys.argv[2]))
    else:
        check(Path(sys.argv[2]), Path(sys.argv[3]))
