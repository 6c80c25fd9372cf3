"""A small random CLIP, and what transformers says with it of texts and pictures, for tests/clip.rs.

    python tests/oracle/clip.py [FOLDER [CASE]]          (torch 2.11, transformers 5.24, Pillow 13)

Writes FOLDER (tests/fixtures/clip):
  model/                config.json, model.safetensors in fp16, tokenizer and preprocessor_config.json, as transformers saves them
  texts.json            the texts
  expected.safetensors  `pixels` of each of tests/fixtures/pictures/{wide,tall}.png, then computed in fp32: unit vectors
                        `text_embeds` and `image_embeds`, and `logits_per_image`

CASE picks one of several kinds of configuration: 0, 1, 2.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from networks import tiny_tokenizer
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

TESTS = Path(__file__).parents[1]
TEXTS = ["a red cat", "a dog, a red dog!", "", "red " * 90, "!!"]
# Text and vision in part, and the image processor.
CASES = [
    (dict(eos_token_id=2), dict(image_size=32), dict(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})),
    # The end by its name, GELU, patches that the picture does not divide into, a crop larger than the picture.
    (
        dict(hidden_act="gelu"),
        dict(image_size=45, hidden_act="gelu", num_hidden_layers=1),
        dict(size={"shortest_edge": 30}, crop_size={"height": 45, "width": 45}, resample=2, image_mean=[0.5, 0.4, 0.3]),
    ),
    # Squeezed to a square, not cropped. (Pillow 13 may resize columns before rows where the aspect changes, older ones never do;
    # at this size it does not.)
    (
        dict(eos_token_id=2, num_attention_heads=2),
        dict(image_size=64, patch_size=16),
        dict(size={"height": 64, "width": 64}, do_center_crop=False, resample=1, image_std=[0.2, 0.25, 0.5]),
    ),
]


@torch.no_grad()
def main(folder, number):
    text, vision, processor = CASES[number]
    shutil.rmtree(folder, ignore_errors=True)
    model_folder = folder / "model"
    vocabulary = folder / "vocabulary"
    size = tiny_tokenizer(vocabulary)
    tokenizer = CLIPTokenizer.from_pretrained(vocabulary)
    shutil.rmtree(vocabulary)
    small = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    torch.manual_seed(number)
    model = CLIPModel(
        CLIPConfig(
            text_config=small
            | dict(vocab_size=size, bos_token_id=size - 2, eos_token_id=size - 1, pad_token_id=size - 1)
            | text,
            vision_config=small | dict(patch_size=8) | vision,
            projection_dim=24,
        )
    )
    # transformers' own start is nearly the same for all texts; norms and biases of one and zero would hide a mistake.
    for name, parameter in model.named_parameters():
        if name != "logit_scale":
            scale = 0.3 if parameter.dim() == 1 else 1.5 / parameter[0].numel() ** 0.5
            start = parameter if parameter.dim() == 1 else 0
            parameter.copy_(start + scale * torch.randn_like(parameter))
    model.to(torch.float16).save_pretrained(model_folder)
    model.to(torch.float32).eval()
    tokenizer.save_pretrained(model_folder)
    processor = CLIPImageProcessorPil(**processor)
    processor.save_pretrained(model_folder)
    pictures = [Image.open(TESTS / "fixtures" / "pictures" / f"{name}.png") for name in ("wide", "tall")]
    pixels = processor(pictures, return_tensors="pt").pixel_values
    ids = tokenizer(TEXTS, padding=True, truncation=True, max_length=77, return_tensors="pt")
    said = model(**ids, pixel_values=pixels)
    (folder / "texts.json").write_text(json.dumps(TEXTS) + "\n")
    outputs = dict(pixels=pixels, **{key: said[key] for key in ("text_embeds", "image_embeds", "logits_per_image")})
    save_file({key: tensor.contiguous() for key, tensor in outputs.items()}, folder / "expected.safetensors")


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else TESTS / "fixtures" / "clip"
    main(folder, int(sys.argv[2]) if len(sys.argv) > 2 else 0)
