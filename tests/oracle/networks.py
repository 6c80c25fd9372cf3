"""Outputs of diffusers' and transformers' own networks, for tests/networks.rs and tests/source.rs.

    python tests/oracle/networks.py          (torch 2.11, diffusers 0.39 or later, transformers 5.23)

Writes tests/fixtures/networks/:
  cases.json           for each case: the network, its config.json, the shapes of its inputs
  outputs.safetensors  what it gives, "<case>.<output>"
  pipeline/            a whole tiny Stable Diffusion as diffusers saves it today, in fp16
  pipeline.safetensors what its networks give
  vocabulary/          its tokenizer as it was saved before transformers 5
  texts.json           texts and their ids

Weights and inputs are not stored: both sides compute them from their names (`uniform` below), all of them random,
norms and biases too, so that a forgotten one shows.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker, cosine_distance
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

FIXTURES = Path(__file__).parents[1] / "fixtures" / "networks"


def uniform(name, shape):
    """Numbers in [-1, 1) that depend on `name` only: SplitMix64 from the FNV-1a hash of the name, upper 24 bits."""
    state = 0xCBF29CE484222325
    for byte in name.encode():
        state = (state ^ byte) * 0x100000001B3 % 2**64
    count = int(np.prod(shape))
    with np.errstate(over="ignore"):
        z = np.uint64(state) + np.uint64(0x9E3779B97F4A7C15) * np.arange(1, count + 1, dtype=np.uint64)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return ((z >> np.uint64(40)).astype(np.float64) / 2**23 - 1).reshape(shape)


def weight(name, shape):
    """Of the size that keeps signals near one; scales of norms about one, never one."""
    if len(shape) == 1:
        values = (1.0 if name.endswith("weight") else 0.0) + 0.5 * uniform(name, shape)
    elif "embedding" in name and "time" not in name:
        values = uniform(name, shape)
    else:
        values = uniform(name, shape) * np.sqrt(3 / np.prod(shape[1:]))
    return torch.from_numpy(values.astype(np.float32))


def fill(model):
    for name, parameter in model.named_parameters():
        if isinstance(model, CLIPTextModel) and not name.startswith("text_model."):
            name = "text_model." + name
        parameter.data.copy_(weight(name, tuple(parameter.shape)))
    return model.eval()


def given(name, shape):
    return torch.from_numpy(uniform(name, shape).astype(np.float32)) * 1.7320508075688772


def ids_given(case):
    ids = torch.from_numpy(((uniform(case["name"], case["ids"]) + 1) / 2 * case["vocab"]).astype(np.int64))
    for row, end in enumerate(case["ends"]):
        ids[row, end:] = case["end"]
    return ids


SD1 = dict(
    sample_size=16,
    block_out_channels=[32, 64, 96, 96],
    layers_per_block=2,
    attention_head_dim=8,
    cross_attention_dim=24,
    norm_num_groups=8,
    down_block_types=["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
)
SD2 = dict(SD1, attention_head_dim=[4, 8, 12, 12], use_linear_projection=True)
BK_BASE = dict(SD1, layers_per_block=1)
BK_SMALL = dict(BK_BASE, mid_block_type=None)
BK_TINY = dict(
    BK_SMALL,
    block_out_channels=[32, 64, 96],
    down_block_types=["CrossAttnDownBlock2D"] * 3,
    up_block_types=["CrossAttnUpBlock2D"] * 3,
)
SHIFTED = dict(
    BK_TINY,
    mid_block_type="UNetMidBlock2DCrossAttn",
    in_channels=9,
    out_channels=5,
    norm_eps=1e-3,
    flip_sin_to_cos=False,
    freq_shift=1,
    layers_per_block=[1, 2, 1],
    transformer_layers_per_block=[1, 2, 1],
)
SDXL = dict(
    SD1,
    block_out_channels=[32, 64, 96],
    down_block_types=["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2,
    up_block_types=["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"],
    attention_head_dim=[2, 4, 6],
    transformer_layers_per_block=[1, 2, 3],
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=6 * 8 + 20,
)
# Cut as SSD-1B is (Gupta et al. 2024): transformers of other depths in each place, no attention in the middle.
SSD = dict(
    SDXL,
    transformer_layers_per_block=[1, [2, 1], [0, 3]],
    reverse_transformer_layers_per_block=[[1, 2, 3], [2, 1, 1], 1],
    mid_block_type="UNetMidBlock2D",
)
# Height and width of the original, the crop's top and left, height and width of the target.
TIME_IDS = [[1024, 768, 0, 0, 1024, 1024], [333, 500, 17, 256, 512, 640]]
UNETS = {
    "unet_sd1": (SD1, [2, 4, 16, 16], [1, 981], 7),
    "unet_sd1_odd": (SD1, [1, 4, 9, 7], [500], 3),
    "unet_sd1_tall": (SD1, [1, 4, 24, 8], [0], 77),
    "unet_sd2": (SD2, [2, 4, 16, 8], [999, 20], 5),
    "unet_sd2_odd": (SD2, [1, 4, 11, 13], [333], 5),
    "unet_bk_base": (BK_BASE, [1, 4, 16, 16], [10], 5),
    "unet_bk_small": (BK_SMALL, [1, 4, 16, 16], [10], 5),
    "unet_bk_tiny_odd": (BK_TINY, [2, 4, 7, 9], [10, 700], 5),
    "unet_shifted": (SHIFTED, [1, 9, 8, 8], [77], 5),
    # With what a ControlNet adds.
    "unet_sd1_controlled": (SD1, [2, 4, 16, 16], [1, 981], 7),
    "unet_sd1_controlled_odd": (SD1, [1, 4, 9, 7], [500], 3),
    "unet_bk_small_controlled": (BK_SMALL, [1, 4, 16, 16], [10], 5),
    "unet_sdxl": (SDXL, [2, 4, 16, 8], [981, 1], 7),
    "unet_ssd": (SSD, [2, 4, 16, 8], [981, 1], 7),
    "unet_ssd_controlled": (SSD, [1, 4, 8, 12], [3], 5),
    "unet_uneven": (
        dict(SD1, transformer_layers_per_block=[1, 2, [1, 2], 3], reverse_transformer_layers_per_block=[1, [2, 0, 1], 2, 1]),
        [1, 4, 16, 16],
        [10],
        5,
    ),
    "unet_sdxl_sines_first": (dict(SDXL, flip_sin_to_cos=False, freq_shift=1), [1, 4, 9, 7], [500], 77),
}
SHOWN = ["unet_sd1_odd", "unet_bk_small"]
VAE = dict(
    sample_size=64,
    block_out_channels=[16, 24, 32, 32],
    layers_per_block=2,
    norm_num_groups=4,
    latent_channels=4,
    down_block_types=["DownEncoderBlock2D"] * 4,
    up_block_types=["UpDecoderBlock2D"] * 4,
)
SMALL_VAE = dict(
    VAE,
    block_out_channels=[8, 16, 16],
    layers_per_block=1,
    norm_num_groups=8,
    latent_channels=3,
    down_block_types=["DownEncoderBlock2D"] * 3,
    up_block_types=["UpDecoderBlock2D"] * 3,
)
AUTOENCODERS = {
    "vae": (VAE, [1, 3, 32, 32], [2, 4, 4, 4]),
    "vae_odd": (VAE, [2, 3, 40, 24], [1, 4, 5, 3]),
    "vae_uneven": (VAE, [1, 3, 37, 27], [1, 4, 1, 7]),
    "vae_small": (SMALL_VAE, [1, 3, 20, 12], [1, 3, 3, 5]),
}
TEXT1 = dict(
    vocab_size=99,
    hidden_size=32,
    intermediate_size=128,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=77,
    hidden_act="quick_gelu",
    bos_token_id=0,
    pad_token_id=1,
    eos_token_id=2,
)
TEXT2 = dict(TEXT1, hidden_act="gelu", num_attention_heads=2, num_hidden_layers=2)
TEXT_ENCODERS = {
    # Old configs: the end is the largest id (98), wherever it first stands.
    "text_sd1": (TEXT1, [2, 77], 98, [5, 70]),
    "text_sd2": (TEXT2, [3, 12], 98, [1, 5, 11]),
    # Newer ones name it; larger ids may come before it.
    "text_named_end": (dict(TEXT2, eos_token_id=60), [2, 9], 60, [4, 8]),
    # The second one of Stable Diffusion XL.
    "text_projected": (dict(TEXT2, num_hidden_layers=3, projection_dim=20), [3, 12], 98, [1, 5, 11]),
}


VISION = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    image_size=42,
    patch_size=14,
)
SAFETY_CHECKERS = {
    "safety": (VISION, [2, 3, 42, 42], [2, 8, 6, 3], 0.0),
    # Patches that the picture does not divide into; an adjustment.
    "safety_odd": (dict(VISION, image_size=45, hidden_act="gelu"), [1, 3, 45, 45], [1, 5, 7, 3], 0.7),
}


def safety_check(checker, clip_input, images, adjustment):
    """StableDiffusionSafetyChecker.forward_onnx with an adjustment, as Apple's converter has it."""
    embeds = checker.visual_projection(checker.vision_model(clip_input)[1])
    special = cosine_distance(embeds, checker.special_care_embeds) - checker.special_care_embeds_weights + adjustment
    stricter = (special > 0).any(dim=1, keepdim=True) * 0.01
    scores = cosine_distance(embeds, checker.concept_embeds) - checker.concept_embeds_weights + stricter
    held_back = (scores > 0).any(dim=1).float()[:, None, None, None]
    return dict(filtered_images=images * (1 - held_back), has_nsfw_concepts=held_back, concept_scores=scores)


def residual_shapes(config, sample):
    """One for each value that the UNet keeps for its way up, the last again for the middle."""
    batch, _, height, width = sample
    channels = config["block_out_channels"]
    shapes = [[batch, channels[0], height, width]]
    for block, width_of_block in enumerate(channels):
        shapes += [[batch, width_of_block, height, width]] * config["layers_per_block"]
        if block + 1 < len(channels):
            height, width = (height + 1) // 2, (width + 1) // 2
            shapes.append([batch, width_of_block, height, width])
    return shapes + shapes[-1:]


def config_of(model):
    config = dict(model.config) if not hasattr(model.config, "to_dict") else model.config.to_dict()
    return json.loads(json.dumps({key: value for key, value in config.items() if key != "_use_default_values"}))


@torch.no_grad()
def main():
    shutil.rmtree(FIXTURES, ignore_errors=True)
    FIXTURES.mkdir(parents=True)
    cases, outputs = [], {}
    for name, (config, sample, timesteps, tokens) in UNETS.items():
        model = fill(UNet2DConditionModel(**config))
        context = [sample[0], tokens, config["cross_attention_dim"]]
        case = dict(name=name, sample=sample, timesteps=timesteps, context=context, config=config_of(model))
        added = None
        if "addition_embed_type" in config:
            case |= dict(text_embeds=[sample[0], 20], time_ids=TIME_IDS[: sample[0]])
            added = dict(text_embeds=given("text_embeds", case["text_embeds"]), time_ids=torch.tensor(case["time_ids"]))
        residuals = {}
        if "controlled" in name:
            case["residuals"] = residual_shapes(config, sample)
            *skips, middle = [given(f"residual_{i}", shape) for i, shape in enumerate(case["residuals"])]
            residuals = dict(down_block_additional_residuals=skips, mid_block_additional_residual=middle)
        features = []
        if name in SHOWN:
            # What distillation compares (BK-SDM): what each block gives to the next.
            for block in [*model.down_blocks, *([model.mid_block] if model.mid_block else []), *model.up_blocks]:
                keep = lambda _module, _inputs, out: features.append(out[0] if isinstance(out, tuple) else out)
                block.register_forward_hook(keep)
        outputs[f"{name}.output"] = model(
            given("sample", sample), torch.tensor(timesteps), given("context", context), added_cond_kwargs=added, **residuals
        ).sample
        for i, feature in enumerate(features):
            outputs[f"{name}.feature_{i}"] = feature
        case |= dict(features=len(features)) if features else {}
        cases.append(case)
    for name, (config, image, latents) in AUTOENCODERS.items():
        model = fill(AutoencoderKL(**config))
        outputs[f"{name}.moments"] = model.encode(given("image", image)).latent_dist.parameters
        outputs[f"{name}.image"] = model.decode(given("latents", latents)).sample
        cases.append(dict(name=name, image=image, latents=latents, config=config_of(model)))
    for name, (config, shape, end, ends) in TEXT_ENCODERS.items():
        kind = CLIPTextModelWithProjection if "projection_dim" in config else CLIPTextModel
        model = fill(kind(CLIPTextConfig(**config, architectures=[kind.__name__])))
        case = dict(name=name, ids=shape, vocab=98, end=end, ends=ends, config=config_of(model))
        result = model(ids_given(case), output_hidden_states=True)
        outputs[f"{name}.last_hidden_state"] = result.last_hidden_state
        outputs[f"{name}.penultimate"] = result.hidden_states[-2]
        outputs[f"{name}.pooled"] = result.text_embeds if "projection_dim" in config else result.pooler_output
        cases.append(case)
    for name, (vision, picture, images, adjustment) in SAFETY_CHECKERS.items():
        model = fill(StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=24)))
        case = dict(name=name, picture=picture, images=images, adjustment=adjustment, config=config_of(model))
        result = safety_check(model, given("picture", picture), given("images", images), adjustment)
        # With these weights all pictures are held back, and are black.
        outputs[f"{name}.removed"] = given("images", images) - result["filtered_images"]
        outputs[f"{name}.held_back"] = result["has_nsfw_concepts"]
        outputs[f"{name}.scores"] = result["concept_scores"]
        cases.append(case)
    lines = ",\n".join(json.dumps(case, sort_keys=True) for case in cases)
    (FIXTURES / "cases.json").write_text(f"[\n{lines}\n]\n")
    save_file({name: tensor.contiguous() for name, tensor in outputs.items()}, FIXTURES / "outputs.safetensors")
    pipeline()


def tiny_tokenizer(folder):
    """CLIP's format with a vocabulary of letters and a few merges."""
    letters = [chr(c) for c in range(33, 127)]
    merges = ["c a", "ca t</w>", "r e", "re d</w>", "a n", "d o", "do g</w>", "! !</w>"]
    tokens = letters + [letter + "</w>" for letter in letters] + [merge.replace(" ", "") for merge in merges]
    vocabulary = {token: index for index, token in enumerate(tokens + ["<|startoftext|>", "<|endoftext|>"])}
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 77}))
    return len(vocabulary)


PROMPTS = ["a red cat, a dog!", "!!! wow !! a!", "", "Émile's 12 cats", "<|endoftext|> dog", "red " * 90]


@torch.no_grad()
def pipeline():
    """A whole model, saved by diffusers in fp16: what it says is computed in fp32 from the fp16 weights."""
    folder = FIXTURES / "pipeline"
    vocabulary = FIXTURES / "vocabulary"
    size = tiny_tokenizer(vocabulary)
    plain = CLIPTokenizer.from_pretrained(vocabulary)
    (vocabulary / "special_tokens_map.json").write_text(json.dumps({"pad_token": "!"}))
    exclamation = CLIPTokenizer.from_pretrained(vocabulary)
    unet = dict(
        BK_TINY,
        block_out_channels=[8, 16],
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=8,
        mid_block_type="UNetMidBlock2DCrossAttn",
        down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
        up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"],
    )
    vae = dict(VAE, block_out_channels=[4, 4, 8, 8], layers_per_block=1)
    text = dict(
        TEXT1, vocab_size=size, hidden_size=8, intermediate_size=16, num_attention_heads=2, num_hidden_layers=1
    )
    whole = StableDiffusionPipeline(
        vae=fill(AutoencoderKL(**vae)),
        text_encoder=fill(CLIPTextModel(CLIPTextConfig(**text))),
        tokenizer=exclamation,
        unet=fill(UNet2DConditionModel(**unet)),
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    whole.to(torch.float16).save_pretrained(folder)
    whole.to(torch.float32)
    ids = exclamation(PROMPTS, padding="max_length", truncation=True, max_length=77).input_ids
    context = whole.text_encoder(torch.tensor(ids)).last_hidden_state[:1]
    sample = given("sample", [1, 4, 8, 8])
    outputs = dict(
        sample=sample,
        context=context.contiguous(),
        noise=whole.unet(sample, torch.tensor([481]), context).sample,
        image=whole.vae.decode(sample).sample,
    )
    save_file(outputs, FIXTURES / "pipeline.safetensors")
    texts = [
        dict(text=text, ids=ids, ids_padded_with_end=plain(text, padding="max_length", truncation=True).input_ids)
        for text, ids in zip(PROMPTS, ids)
    ]
    (FIXTURES / "texts.json").write_text(",\n".join(map(json.dumps, texts)).join(["[\n", "\n]\n"]))


if __name__ == "__main__":
    main()
