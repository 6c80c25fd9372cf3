"""What diffusers draws with the tiny model of tests/oracle/pipeline.py and the schedulers that add no noise, for
tests/generate.rs.

    python tests/oracle/pipeline_samplers.py tests/fixtures/pipeline        (diffusers 0.39.0, torch 2.11)

Writes `samplers.safetensors`: the final latents `CLASS.PREDICTION` after 25 steps in fp32, from the noise of
`expected.safetensors`. `CLASS+key` has that key true.
"""

import json
import sys
import tempfile
import warnings
from pathlib import Path

import diffusers
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

warnings.filterwarnings("ignore")
diffusers.utils.logging.set_verbosity_error()
out = Path(sys.argv[1])
prompts = json.loads((out / "prompts.json").read_text())
noise = load_file(out / "expected.safetensors")["noise"]
known = load_file(out / "expected.safetensors")["dpmpp_2m.epsilon"]
scheduler = json.loads((out / "model/scheduler/scheduler_config.json").read_text())
# The model's tokenizer is stored as transformers 5 has it; any version reads the older form.
model = json.loads((out / "model/tokenizer/tokenizer.json").read_text())["model"]
with tempfile.TemporaryDirectory() as folder:
    Path(folder, "vocab.json").write_text(json.dumps(model["vocab"]))
    lines = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    Path(folder, "merges.txt").write_text("#version: 0.2\n" + "\n".join(lines) + "\n")
    tokenizer = CLIPTokenizer(
        f"{folder}/vocab.json", f"{folder}/merges.txt", pad_token="<|endoftext|>", model_max_length=77
    )
text_encoder = CLIPTextModel(CLIPTextConfig(**json.loads((out / "model/text_encoder/config.json").read_text())))
weights = load_file(out / "model/text_encoder/model.safetensors")
own = text_encoder.state_dict()
prefix = "" if weights.keys() & own.keys() else "text_model."
missing = text_encoder.load_state_dict({prefix + k: v.float() for k, v in weights.items()}, strict=False)
assert not missing.unexpected_keys and all("position_ids" in key for key in missing.missing_keys), missing
pipe = diffusers.StableDiffusionPipeline.from_pretrained(
    out / "model", torch_dtype=torch.float32, safety_checker=None, tokenizer=tokenizer, text_encoder=text_encoder.eval()
)
pipe.set_progress_bar_config(disable=True)
latents = {}
for name in (
    "LMSDiscreteScheduler", "HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "DPMSolverSinglestepScheduler",
    "DPMSolverMultistepScheduler", "DPMSolverMultistepScheduler+use_karras_sigmas", "UniPCMultistepScheduler",
):  # fmt: skip
    for prediction in ("epsilon", "v_prediction"):
        cls, *true = name.split("+")
        config = scheduler | {"prediction_type": prediction} | dict.fromkeys(true, True)
        pipe.scheduler = getattr(diffusers, cls).from_config(config)
        with torch.no_grad():
            latents[f"{name}.{prediction}"] = pipe(
                **prompts, num_images_per_prompt=2, latents=noise.clone(), num_inference_steps=25, guidance_scale=7.5,
                output_type="latent", height=64, width=48,
            ).images.contiguous()  # fmt: skip
        print(name, prediction, latents[f"{name}.{prediction}"].std())
# The same model as that of the other fixture.
assert torch.allclose(latents.pop("DPMSolverMultistepScheduler.epsilon"), known, rtol=1e-3, atol=1e-3)
save_file(latents, out / "samplers.safetensors")
(out / "samplers.safetensors").chmod(0o644)
