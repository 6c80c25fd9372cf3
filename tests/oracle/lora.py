"""LoRAs of every layout, as the tools that write them do, and what those tools merge, for tests/lora.rs.

    python tests/oracle/lora.py    (torch 2.11, diffusers 0.39, transformers 5.24, peft 0.21.2, lycoris-lora 4.1.3)

Writes tests/fixtures/lora/: the files of the LoRAs, for the tiny models of tests/fixtures/pipeline and sdxl;
`cases.json`: model, path and weights of each case; `expected.safetensors`: the merged parameters, fp32, as
"<case>|<component>|<parameter>", all that differ from the model's own.

LyCORIS' `get_merged_weight` of LoHa and LoKr multiplies by alpha/rank twice in this version; its `forward`, with which
they are trained, does it once, and that is taken here.
"""

import json
import shutil
import warnings
from pathlib import Path

import diffusers
import numpy as np
import peft
import torch
from lycoris.functional.general import weight_decompose
from lycoris.modules.full import FullModule
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from lycoris.modules.norms import NormModule
from networks import uniform
from safetensors.torch import load_file, save_file

warnings.filterwarnings("ignore")
diffusers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()
FIXTURES = Path(__file__).parents[1] / "fixtures"
OUT = FIXTURES / "lora"
PIPELINES = {"pipeline": diffusers.StableDiffusionPipeline, "sdxl": diffusers.StableDiffusionXLPipeline}
CASES, EXPECTED = [], {}

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
LINEAR = [f"{BLOCK}.attn1.to_q", f"{BLOCK}.attn2.to_k", f"{BLOCK}.attn1.to_out.0", f"{BLOCK}.ff.net.0.proj"]
CONV = ["down_blocks.0.resnets.0.conv1", "down_blocks.0.attentions.0.proj_in", "down_blocks.0.downsamplers.0.conv"]
TEXT = "encoder.layers.0.self_attn"


def pipeline(model):
    return PIPELINES[model].from_pretrained(FIXTURES / model / "model", torch_dtype=torch.float32)


def fresh(module, seed):
    """Random adapter parameters, so that no factor is zero."""
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            values = torch.from_numpy(uniform(f"{seed} {name}", tuple(parameter.shape)).astype(np.float32))
            # Magnitudes of DoRA stay positive.
            parameter.data = parameter.data * (1 + 0.3 * values) if "magnitude" in name or "dora" in name else 0.5 * values


def expect(case, model, merged, weight=1.0, te_weight=None, path=None):
    """Notes what differs of the `merged` state dicts, by component."""
    own = pipeline(model)
    assert merged, case
    for component, state in merged.items():
        before = getattr(own, component).state_dict()
        changed = {name: value for name, value in state.items() if not torch.equal(value, before[name])}
        assert changed, case
        for name, value in changed.items():
            # transformers 5 leaves the prefix out.
            if component != "unet" and not name.startswith("text_"):
                name = f"text_model.{name}"
            EXPECTED[f"{case}|{component}|{name}"] = value.detach().clone().contiguous()
    CASES.append(dict(name=case, model=model, path=path or f"{case}.safetensors", weight=weight, te_weight=te_weight))


def with_peft(case, component, config, weight=1.0):
    torch.manual_seed(0)
    module = getattr(pipeline("pipeline"), component)
    module = peft.get_peft_model(module, config)
    fresh(module, case)
    module.save_pretrained(OUT / case)
    (OUT / case / "README.md").unlink(missing_ok=True)
    if weight != 1.0:
        for layer in module.modules():
            if hasattr(layer, "scale_layer"):
                layer.scale_layer(weight)
    expect(case, "pipeline", {component: module.merge_and_unload().state_dict()}, weight=weight, path=case)


def peft_cases():
    exact = dict(target_modules=LINEAR + CONV)
    with_peft("peft", "unet", peft.LoraConfig(
        r=2, lora_alpha=6, rank_pattern={"to_q": 3}, alpha_pattern={"attn2.to_k": 1, "conv1": 5}, **exact))
    with_peft("peft-rslora", "unet", peft.LoraConfig(r=4, lora_alpha=3, use_rslora=True, **exact))
    with_peft("peft-dora", "unet", peft.LoraConfig(r=2, lora_alpha=4, use_dora=True, **exact))
    with_peft("peft-dora-weighted", "unet", peft.LoraConfig(r=2, lora_alpha=4, use_dora=True, **exact), weight=0.6)
    with_peft("peft-bias", "unet", peft.LoraConfig(r=2, lora_alpha=4, lora_bias=True, target_modules=[LINEAR[2]]), 0.5)
    with_peft("peft-embedding", "text_encoder",
              peft.LoraConfig(r=2, lora_alpha=4, target_modules=["token_embedding", "q_proj"]))
    with_peft("peft-loha", "unet", peft.LoHaConfig(r=2, alpha=3, use_effective_conv2d=True, **exact))
    with_peft("peft-lokr", "unet", peft.LoKrConfig(
        r=1, alpha=3, decompose_both=True, decompose_factor=4, use_effective_conv2d=True, **exact))
    with_peft("peft-lokr-whole", "unet", peft.LoKrConfig(r=100, alpha=50, **exact), 0.7)


def with_diffusers(case, model, file, weight):
    """Writes a file and merges it as diffusers loads it."""
    save_file(file, OUT / f"{case}.safetensors", {"format": "pt"})
    pipe = pipeline(model)
    # The modules of transformers 5 lack `text_model`, and diffusers finds them by their own names only.
    # Files from before there were prefixes are the UNet's; diffusers of today takes nothing of them.
    prefixed = lambda name: f"unet.{name}" if name.startswith("down_blocks.") else name
    bare = lambda name: prefixed(name).replace("text_encoder.text_model.", "text_encoder.").replace("lora_te_text_model_", "lora_te_")
    pipe.load_lora_weights({bare(name): value for name, value in file.items()})
    pipe.fuse_lora(lora_scale=weight)
    pipe.unload_lora_weights()
    parts = ["unet", "text_encoder", "text_encoder_2"] if model == "sdxl" else ["unet", "text_encoder"]
    touched = [p for p in parts if any(
        not torch.equal(v, getattr(pipeline(model), p).state_dict()[n]) for n, v in getattr(pipe, p).state_dict().items())]
    expect(case, model, {part: getattr(pipe, part).state_dict() for part in touched}, weight=weight)


def factors(seed, module, rank):
    """Random up and down for a layer."""
    weight = module.weight
    values = lambda name, shape: torch.from_numpy(0.5 * uniform(f"{seed} {name}", shape).astype(np.float32))
    tail = (1, 1) if weight.dim() == 4 else ()
    return values("up", (weight.shape[0], rank, *tail)), values("down", (rank, *weight.shape[1:]))


def layers(pipe, component, names):
    return [(name, getattr(pipe, component).get_submodule(name)) for name in names]


def diffusers_cases():
    pipe = pipeline("pipeline")
    unet, text = layers(pipe, "unet", LINEAR + CONV), layers(pipe, "text_encoder", [f"{TEXT}.q_proj", f"{TEXT}.out_proj"])
    prefixed = lambda name: f"text_model.{name}"
    kohya, today, old = {}, {}, {}
    for name, layer in unet:
        up, down = factors(name, layer, 2)
        flat = f"lora_unet_{name.replace('.', '_')}"
        kohya |= {f"{flat}.lora_up.weight": up, f"{flat}.lora_down.weight": down, f"{flat}.alpha": torch.tensor(3.0)}
        today |= {f"unet.{name}.lora.up.weight": up, f"unet.{name}.lora.down.weight": down}
    for name, layer in text:
        up, down = factors(name, layer, 3)
        flat = f"lora_te_{prefixed(name).replace('.', '_')}"
        kohya |= {f"{flat}.lora_up.weight": up, f"{flat}.lora_down.weight": down, f"{flat}.alpha": torch.tensor(1.0)}
        today |= {f"text_encoder.{prefixed(name)}.lora_linear_layer.up.weight": up,
                  f"text_encoder.{prefixed(name)}.lora_linear_layer.down.weight": down}
    for name, layer in unet[:3]:
        up, down = factors(name, layer, 2)
        attention, part = name.rsplit(".to_", 1)
        part = {"q": "q", "k": "k", "out.0": "out"}[part]
        old |= {f"{attention}.processor.to_{part}_lora.up.weight": up,
                f"{attention}.processor.to_{part}_lora.down.weight": down}
    with_diffusers("kohya", "pipeline", kohya, 1.0)
    with_diffusers("kohya-weighted", "pipeline", kohya, -0.35)
    with_diffusers("diffusers", "pipeline", today, 0.8)
    with_diffusers("processors", "pipeline", old, 0.8)
    # As diffusers saves what peft trained, with alpha in the header.
    pipe = pipeline("pipeline")
    configs = dict(
        unet=peft.LoraConfig(r=2, lora_alpha=7, target_modules=LINEAR + CONV[:1]),
        text_encoder=peft.LoraConfig(r=2, lora_alpha=5, target_modules=["q_proj", "v_proj"]),
    )
    states, merged = {}, {}
    for part, config in configs.items():
        module = peft.inject_adapter_in_model(config, getattr(pipe, part))
        fresh(module, f"header {part}")
        prefix = "text_model." if part == "text_encoder" else ""
        states[part] = {prefix + name.replace(".default", ""): value.detach().clone()
                        for name, value in module.named_parameters() if ".lora_" in name}
        for layer in [layer for layer in module.modules() if hasattr(layer, "scale_layer")]:
            layer.scale_layer(0.5)
            layer.merge()
        merged[part] = {name.replace(".base_layer", ""): value for name, value in module.state_dict().items()
                        if ".lora_" not in name}
    pipe.save_lora_weights(
        OUT / "diffusers-header", unet_lora_layers=states["unet"], text_encoder_lora_layers=states["text_encoder"],
        unet_lora_adapter_metadata=configs["unet"].to_dict(),
        text_encoder_lora_adapter_metadata=configs["text_encoder"].to_dict(),
    )
    expect("diffusers-header", "pipeline", merged, weight=0.5, path="diffusers-header")


# Layers of the tiny XL's UNet: today's name, and kohya's, which is latent-diffusion's.
XL = [
    ("conv_in", "input_blocks_0_0"),
    ("time_embedding.linear_1", "time_embed_0"),
    ("add_embedding.linear_2", "label_emb_0_2"),
    ("down_blocks.0.resnets.0.conv1", "input_blocks_1_0_in_layers_2"),
    ("down_blocks.0.downsamplers.0.conv", "input_blocks_2_0_op"),
    ("down_blocks.1.resnets.0.conv_shortcut", "input_blocks_3_0_skip_connection"),
    ("down_blocks.1.attentions.0.proj_in", "input_blocks_3_1_proj_in"),
    ("down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v", "input_blocks_3_1_transformer_blocks_0_attn2_to_v"),
    ("mid_block.attentions.0.transformer_blocks.1.ff.net.2", "middle_block_1_transformer_blocks_1_ff_net_2"),
    ("mid_block.resnets.1.time_emb_proj", "middle_block_2_emb_layers_1"),
    ("up_blocks.0.resnets.1.conv2", "output_blocks_1_0_out_layers_3"),
    ("up_blocks.0.upsamplers.0.conv", "output_blocks_1_2_conv"),
    ("up_blocks.1.attentions.1.proj_out", "output_blocks_3_1_proj_out"),
    ("conv_out", "out_2"),
]


def xl_cases():
    """diffusers' own converter takes latent-diffusion's names of real sizes only, so the same factors go to it under
    today's names; both files have to merge to what it makes of these."""
    pipe = pipeline("sdxl")
    ldm, today = {}, {}
    for name, theirs in XL:
        up, down = factors(name, pipe.unet.get_submodule(name), 2)
        for file, flat in ((ldm, theirs), (today, name.replace(".", "_"))):
            flat = f"lora_unet_{flat}"
            file |= {f"{flat}.lora_up.weight": up, f"{flat}.lora_down.weight": down, f"{flat}.alpha": torch.tensor(1.0)}
    peft_names = {}
    for name, _ in XL:
        up, down = factors(name, pipe.unet.get_submodule(name), 2)
        # alpha by rank is a half.
        peft_names |= {f"unet.{name}.lora_B.weight": 0.5 * up, f"unet.{name}.lora_A.weight": down}
    for number, component, names in (
        (1, "text_encoder", [f"{TEXT}.k_proj"]), (2, "text_encoder_2", [f"{TEXT}.v_proj", "encoder.layers.0.mlp.fc1"])
    ):
        encoder = getattr(pipe, component)
        base = encoder.text_model if hasattr(encoder, "text_model") else encoder
        for name in names:
            up, down = factors(f"{component} {name}", base.get_submodule(name), 2)
            flat = f"lora_te{number}_text_model_{name.replace('.', '_')}"
            for file in (ldm, today):
                file |= {f"{flat}.lora_up.weight": up, f"{flat}.lora_down.weight": down, f"{flat}.alpha": torch.tensor(1.0)}
            peft_names |= {f"{component}.text_model.{name}.lora_B.weight": 0.5 * up,
                           f"{component}.text_model.{name}.lora_A.weight": down}
    with_diffusers("xl-peft", "sdxl", peft_names, 0.75)
    for case, file in (("xl-ldm", ldm), ("xl-kohya", today)):
        save_file(file, OUT / f"{case}.safetensors")
        for key in [key for key in EXPECTED if key.startswith("xl-peft|")]:
            EXPECTED[key.replace("xl-peft|", f"{case}|")] = EXPECTED[key].clone()
        CASES.append(dict(name=case, model="sdxl", path=f"{case}.safetensors", weight=0.75, te_weight=None))


def lycoris_case(case, make, names, weight=1.0, decompose=None):
    """Modules of LyCORIS on layers of the UNet, as kohya's tools write them."""
    unet = pipeline("pipeline").unet
    file, state = {}, dict(unet.state_dict())
    for name in names:
        layer = unet.get_submodule(name)
        module = make(f"lora_unet_{name.replace('.', '_')}", layer)
        fresh(module, f"{case} {name}")
        own = module.custom_state_dict() if hasattr(module, "custom_state_dict") else None
        own = own if own is not None else {k: v for k, v in module.state_dict().items() if "org" not in k}
        file |= {f"{module.lora_name}.{key}": value.detach().clone().contiguous() for key, value in own.items()}
        base = layer.weight.data
        if isinstance(module, FullModule):
            state[f"{name}.weight"] = base + own["diff"] * weight
            if "diff_b" in own:
                state[f"{name}.bias"] = layer.bias.data + own["diff_b"] * weight
        elif isinstance(module, NormModule):
            merged, bias = module.get_merged_weight(weight)
            state[f"{name}.weight"], state[f"{name}.bias"] = merged, bias
        else:
            change = module.make_weight() * module.scale if isinstance(module, LoConModule) else module.get_weight(base.shape)
            moved = base + change.view(base.shape) * (1.0 if module.wd else weight)
            if module.wd:
                whole = weight_decompose(moved, module.dora_scale, 1, module.wd_on_out)
                # With a weight ComfyUI and AUTOMATIC1111 mix before and after; LyCORIS itself has no change left out at 0.
                moved = whole if weight == 1.0 else base + weight * (whole - base)
            state[f"{name}.weight"] = moved.view(base.shape)
    save_file(file, OUT / f"{case}.safetensors")
    expect(case, "pipeline", {"unet": {name: value.detach() for name, value in state.items()}}, weight=weight)


def lycoris_cases():
    both = LINEAR[:2] + CONV
    def of(kind, **options):
        return lambda name, layer: kind(name, layer, 1.0, **options)
    lycoris_case("locon", of(LoConModule, lora_dim=2, alpha=1), both, 0.9)
    lycoris_case("locon-tucker", of(LoConModule, lora_dim=2, alpha=1, use_tucker=True), both)
    lycoris_case("locon-rs", of(LoConModule, lora_dim=4, alpha=1, rs_lora=True), both)
    lycoris_case("loha", of(LohaModule, lora_dim=2, alpha=1), both, 0.9)
    lycoris_case("loha-tucker", of(LohaModule, lora_dim=2, alpha=1, use_tucker=True), both)
    lycoris_case("lokr", of(LokrModule, lora_dim=1, alpha=0.5, factor=4), both, 0.9)
    lycoris_case("lokr-both", of(LokrModule, lora_dim=1, alpha=0.5, factor=4, decompose_both=True, use_tucker=True), both)
    lycoris_case("lokr-whole", of(LokrModule, lora_dim=1, alpha=0.5, factor=2, full_matrix=True), both)
    lycoris_case("dora", of(LoConModule, lora_dim=2, alpha=1, weight_decompose=True), both)
    lycoris_case("dora-weighted", of(LoConModule, lora_dim=2, alpha=1, weight_decompose=True), both, 0.6)
    lycoris_case("dora-inputs", of(LoConModule, lora_dim=2, alpha=1, weight_decompose=True, wd_on_out=False), both)
    lycoris_case("dora-loha", of(LohaModule, lora_dim=2, alpha=1, weight_decompose=True), both)
    lycoris_case("dora-lokr", of(LokrModule, lora_dim=1, alpha=0.5, factor=4, weight_decompose=True), both)
    lycoris_case("full", lambda name, layer: FullModule(name, layer, 1.0), both, 0.7)
    lycoris_case("norms", lambda name, layer: NormModule(name, layer, 1.0), ["conv_norm_out", f"{BLOCK}.norm1"], 0.7)


def main():
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    peft_cases()
    diffusers_cases()
    xl_cases()
    with torch.no_grad():
        lycoris_cases()
    for path in OUT.rglob("adapter_config.json"):
        config = json.loads(path.read_text())
        # Of this machine.
        config["base_model_name_or_path"] = None
        if config.get("auto_mapping"):
            config["auto_mapping"] = None
        path.write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    (OUT / "cases.json").write_text(json.dumps(CASES, indent=1) + "\n")
    save_file(EXPECTED, OUT / "expected.safetensors")


main()
