"""What diffusers' schedulers do with many configurations, for tests/diffusion.rs.

    python tests/oracle/schedulers.py tests/fixtures/schedulers        (diffusers 0.42.1, torch 2.11)

Writes `tables.json` (the alphas_cumprod of each schedule at some timesteps, noised latents and targets) and
`samples.json` (the final latents of each sampler under each configuration, with a network that is a formula).
"""

import json
import sys
import warnings
from pathlib import Path

import diffusers
import torch

warnings.filterwarnings("ignore")
diffusers.utils.logging.set_verbosity_error()
out = Path(sys.argv[1])
out.mkdir(parents=True, exist_ok=True)

SD1 = {
    "_class_name": "PNDMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}
V = {"prediction_type": "v_prediction"}
SD2 = SD1 | V | {"_class_name": "DDIMScheduler"}
BARE = {"_class_name": "DDIMScheduler"}
ZERO = SD2 | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
COSINE = {"_class_name": "DDPMScheduler", "beta_schedule": "squaredcos_cap_v2", "clip_sample": False}
TRAINED = {"num_train_timesteps": 100, "trained_betas": [0.001 + 0.0003 * i for i in range(100)]}


def numbers(tensor):
    return [float(f"{x:.9g}") for x in tensor.flatten().tolist()]


def tables():
    cases = []
    for name, config in {
        "sd1": SD1, "sd2": SD2, "bare": BARE, "zero": ZERO, "cosine": COSINE, "trained": BARE | TRAINED,
        "lcm": {"_class_name": "LCMScheduler"}, "heun": {"_class_name": "HeunDiscreteScheduler"},
    }.items():  # fmt: skip
        theirs = getattr(diffusers, config["_class_name"]).from_config(config)
        # The class's betas under DDPM's noising, which is what diffusers' training scripts use.
        full = {k: theirs.config[k] for k in ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps")}
        full |= {k: config[k] for k in ("prediction_type", "trained_betas", "rescale_betas_zero_snr") if k in config}
        ddpm = diffusers.DDPMScheduler.from_config(full)
        steps = full["num_train_timesteps"]
        t = torch.tensor([0, 1, steps // 3, steps // 2, steps - 2, steps - 1])
        x0 = torch.linspace(-2, 2, 12).view(6, 2)
        noise = (3 * x0 + 1).sin()
        target = ddpm.get_velocity(x0, noise, t) if "prediction_type" in config else noise
        cases.append({
            "name": name, "config": config, "timesteps": t.tolist(), "x0": numbers(x0), "noise": numbers(noise),
            "alphas_cumprod": numbers(ddpm.alphas_cumprod[t]), "noised": numbers(ddpm.add_noise(x0, noise, t)),
            "target": numbers(target),
        })  # fmt: skip
    return cases


def network(x, t):
    """Non-linear, and of a different answer at each timestep."""
    t = float(t) / 1000
    return 0.3 * x + 0.1 * torch.sin(2 * x + 5 * t) - 0.2 * t


SAMPLERS = {
    "ddim": diffusers.DDIMScheduler,
    "pndm": diffusers.PNDMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
}


def samples():
    spacings = [{"timestep_spacing": spacing} for spacing in ("leading", "trailing", "linspace")]
    plans = []
    for kind in SAMPLERS:
        for steps in (1, 2, 3, 5, 25, 50):
            plans += [(kind, SD1, steps), (kind, SD2, steps)]
        plans += [(kind, base | spacing, steps) for base in (SD1, SD2) for spacing in spacings for steps in (7, 25)]
        plans += [(kind, config, 25) for config in (COSINE, COSINE | V, BARE | {"clip_sample": False})]
        plans += [(kind, BARE | TRAINED, 10)]
        plans += [(kind, SD1 | {"set_alpha_to_one": True, "steps_offset": 0}, 25)]
    plans += [("ddim", BARE, 25), ("ddim", BARE | {"clip_sample_range": 2.5} | V, 25)]
    plans += [("pndm", SD1 | p | s | {"skip_prk_steps": False}, n) for n in (4, 5, 25) for p in ({}, V) for s in spacings]
    plans += [(kind, ZERO | s, n) for kind in ("ddim", "euler", "dpmpp_2m") for n in (5, 25) for s in spacings]
    plans += [("pndm", ZERO, 25), ("euler", ZERO | {"prediction_type": "epsilon"}, 25)]
    for kind in ("euler", "dpmpp_2m"):
        for base in (SD1, SD2, COSINE):
            for flag in ("use_karras_sigmas", "use_exponential_sigmas"):
                plans += [(kind, base | {flag: True}, n) for n in (1, 2, 10, 25)]
        plans += [(kind, SD1 | {"use_karras_sigmas": True, "sigma_min": 0.1, "sigma_max": 10.0}, 12)]
        plans += [(kind, base | {"final_sigmas_type": "sigma_min"}, n) for base in (SD1, SD2) for n in (10, 25)]
    plans += [("euler", SD2 | {"interpolation_type": "log_linear"}, 25)]
    plans += [("euler", SD1 | {"interpolation_type": "log_linear", "timestep_spacing": "leading"}, 2)]
    plans += [("euler", base | {"timestep_type": "continuous", "use_karras_sigmas": True}, 9) for base in (SD1, SD2)]
    keep = {"final_sigmas_type": "sigma_min"}
    for extra in (
        {"use_lu_lambdas": True}, {"euler_at_final": True}, {"lower_order_final": False},
        {"solver_type": "heun"}, {"solver_type": "bh2"}, {"solver_order": 1},
        {"solver_order": 3}, {"lambda_min_clipped": -5.1}, {"lambda_min_clipped": -5.1, "timestep_spacing": "leading"},
        {"lambda_min_clipped": -5.1, "timestep_spacing": "trailing"},
    ):  # fmt: skip
        plans += [("dpmpp_2m", base | extra | k, n) for base in (SD1, SD2) for n in (6, 16) for k in ({}, keep)]
        plans += [("dpmpp_2m", COSINE | extra, 20)]
    plans += [("dpmpp_2m", SD1 | keep | {"algorithm_type": "deis", "solver_type": "logrho"}, 20)]
    x = torch.tensor([-2.1, -0.9, -0.2, 0.05, 0.4, 1.3])
    cases = []
    for kind, config, steps in plans:
        scheduler = SAMPLERS[kind].from_config(config)
        scheduler.set_timesteps(steps)
        latents = x * scheduler.init_noise_sigma
        try:
            for t in scheduler.timesteps:
                output = network(scheduler.scale_model_input(latents, t), t)
                latents = scheduler.step(output, t, latents).prev_sample
        except IndexError as error:  # two equal first timesteps: diffusers looks its index up by the timestep
            print(f"left out, diffusers stops: {error}: {kind}, {steps} steps, {config}")
            continue
        if not torch.isfinite(latents).all():
            raise SystemExit(f"diffusers itself gives {latents} for {kind}, {steps} steps, {config}")
        cases.append({
            "sampler": kind, "config": config, "steps": steps, "timesteps": numbers(scheduler.timesteps),
            "latents": numbers(latents),
        })  # fmt: skip
    return {"noise": numbers(x), "cases": cases}


for name, content in (("tables", tables()), ("samples", samples())):
    lines = json.dumps(content, separators=(",", ":")).replace('{"sampler"', '\n{"sampler"').replace('{"name"', '\n{"name"')
    (out / f"{name}.json").write_text(lines + "\n")
    print(name, len(content if isinstance(content, list) else content["cases"]), "cases")
