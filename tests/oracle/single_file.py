"""Single-file checkpoints against diffusers' own conversion: run by hand, it writes no fixture.

    python tests/oracle/single_file.py SHARED_DATA target/debug/palettist        (diffusers 0.42.1, transformers 5.23)

SHARED_DATA/sd_configs/{sd15,sd21-base}/ldm_key_map.json hold all names and shapes of the original files. Each becomes a
file of random fp16 weights whose channels are fewer; `palettist export --format diffusers` writes it as a folder, which
must hold, bit for bit, what diffusers' functions make of the file, load in diffusers, and have CLIP's token ids.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from safetensors.torch import load_file, save_file

shared, program = Path(sys.argv[1]), sys.argv[2]


def shrink(name, shape, version):
    """Fewer channels: 32 (SD 1) or 64 (SD 2) to begin with in the UNet, 32 in the autoencoder, 64 in the text encoder."""
    if name.startswith("first_stage_model."):
        return [n // 4 if n >= 128 else n for n in shape]
    if name.startswith("cond_stage_model."):
        hidden = 768 if version == 1 else 1024
        return [n // (hidden // 64) if n >= 768 and n != 49408 else n for n in shape]
    cross, by = (768, 10) if version == 1 else (1024, 5)
    if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")):
        assert shape[1] == cross
        return [shape[0] // by, 64]
    return [n // by if n >= 320 else n for n in shape]


for version, model in [(1, "sd15"), (2, "sd21-base")]:
    torch.manual_seed(version)
    keys = json.loads((shared / "sd_configs" / model / "ldm_key_map.json").read_text())
    file = {k: (0.05 * torch.randn(shrink(k, e["shape"], version))).half() for k, e in keys.items()}
    if version == 2:
        hidden = 64
        last = [k for k in file if ".resblocks.22." in k]
        file |= {k.replace("resblocks.22", "resblocks.23"): torch.zeros_like(file[k]) for k in last}
        file["cond_stage_model.model.text_projection"] = torch.eye(hidden).half()
    file["global_step"] = torch.tensor(875000)
    with tempfile.TemporaryDirectory() as temporary:
        path, folder = Path(temporary) / "model.safetensors", Path(temporary) / "model"
        save_file(file, path)
        subprocess.run([program, "export", path, "--format", "diffusers", "-o", folder], check=True)
        config = lambda part: json.loads((folder / part / "config.json").read_text())
        text_file = load_file(folder / "text_encoder/model.safetensors")
        if version == 1:
            text = convert_ldm_clip_checkpoint(dict(file))
        else:
            # It asks the network for nothing but the width where there is no projection.
            text = convert_open_clip_checkpoint(None, dict(file))
            text.pop("text_projection.weight", None)
        pairs = {
            "unet": (convert_ldm_unet_checkpoint(dict(file), config("unet")), "diffusion_pytorch_model.safetensors"),
            "vae": (convert_ldm_vae_checkpoint(dict(file), config("vae")), "diffusion_pytorch_model.safetensors"),
            "text_encoder": (text, "model.safetensors"),
        }
        for part, (theirs, name) in pairs.items():
            ours = load_file(folder / part / name)
            assert ours.keys() == theirs.keys(), (part, ours.keys() ^ theirs.keys())
            for key, value in theirs.items():
                assert ours[key].dtype == value.dtype and torch.equal(ours[key], value), (part, key)
            print(f"{model} {part}: {len(ours)} tensors equal")

        pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
        for key, value in pipe.unet.state_dict().items():
            assert torch.equal(value.half(), pairs["unet"][0][key]), key
        golden = json.loads((shared / "clip_tokenizer/golden_transformers.json").read_text())
        compared = 0
        for case in golden:
            # "!" is the padding of SD 2, and so a special token of its own in its texts.
            if version == 1 or "!" not in case["text"]:
                assert pipe.tokenizer(case["text"]).input_ids == case["ids"], case["text"]
                compared += 1
        assert pipe.tokenizer.pad_token_id == (49407 if version == 1 else 0)
        picture = pipe("a fox", num_inference_steps=2, height=64, width=64, output_type="np").images
        print(f"{model}: loads in diffusers, {compared} golden texts equal, a picture of {picture.shape}")
