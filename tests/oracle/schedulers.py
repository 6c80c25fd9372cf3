"""What diffusers' schedulers do with many configurations, for tests/diffusion.rs.

    python tests/oracle/schedulers.py tests/fixtures/schedulers        (diffusers 0.39.0, torch 2.11, torchsde 0.2.6)

Writes `tables.json` (the alphas_cumprod of each schedule at some timesteps, noised latents and targets) and
`samples.json` (the final latents of each sampler under each configuration, with a network that is a formula).
"""

import json
import math
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
TRAINED = BARE | {"num_train_timesteps": 100, "trained_betas": [0.001 + 0.0003 * i for i in range(100)]}
# What the cases of `samples.json` add to, so that it stays small.
BASES = {"zero": ZERO, "sd2": SD2, "sd1": SD1, "trained": TRAINED, "cosine": COSINE, "bare": BARE, "empty": {}}


def numbers(tensor):
    return [int(x) if x == int(x) else float(f"{x:.8g}") for x in tensor.flatten().tolist()]


def tables():
    cases = []
    for name, config in {
        "sd1": SD1, "sd2": SD2, "bare": BARE, "zero": ZERO, "cosine": COSINE, "trained": TRAINED,
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
    "ddpm": diffusers.DDPMScheduler,
    "lms": diffusers.LMSDiscreteScheduler,
    "euler_a": diffusers.EulerAncestralDiscreteScheduler,
    "heun": diffusers.HeunDiscreteScheduler,
    "dpm_2": diffusers.KDPM2DiscreteScheduler,
    "dpm_2_a": diffusers.KDPM2AncestralDiscreteScheduler,
    "dpmpp_2s": diffusers.DPMSolverSinglestepScheduler,
    "dpmpp_sde": diffusers.DPMSolverSDEScheduler,
    "unipc": diffusers.UniPCMultistepScheduler,
    "lcm": diffusers.LCMScheduler,
}
DOUBLE = ("lms", "heun", "dpm_2", "dpmpp_sde")
OLD = ("ddim", "pndm", "euler", "dpmpp_2m")


def fresh(draw):
    """Noise that both sides can make."""
    return torch.tensor([[1.3 * math.sin(17 * draw + 3 * j + 1) for j in range(6)]])


class Counted:
    """Noise number 0, 1, …, one at each call."""

    def __init__(self):
        self.draw = -1

    def __call__(self, *args, **kwargs):
        self.draw += 1
        return fresh(self.draw)


class Brownian:
    """Increments of one Brownian motion in σ over half a step and over the whole, in the order of DPMSolverSDE's calls."""

    def __init__(self):
        self.first, self.middle, self.noise = True, None, Counted()

    def __call__(self, sigma, sigma_next):
        if self.first:
            self.first, self.middle, self.half = False, sigma_next, self.noise()
            return self.half
        self.first = True
        whole = self.half * (sigma - self.middle).sqrt() + self.noise() * (self.middle - sigma_next).sqrt()
        return whole / (sigma - sigma_next).sqrt()


def new_plans(spacings):
    """For the samplers that are not in OLD."""
    plans = []
    keep = {"final_sigmas_type": "sigma_min"}
    for kind in [kind for kind in SAMPLERS if kind not in OLD]:
        plans += [(kind, base, steps) for base in (SD1, SD2) for steps in (1, 2, 3, 5, 25)]
        plans += [(kind, base | spacing, 7) for base in (SD1, SD2) for spacing in spacings]
        # dpm_2_a subtracts the squares of two fp32 levels, of which nothing is left with σ of 20000.
        plans += [(kind, config, 25) for config in (COSINE, COSINE | V) if kind != "dpm_2_a"]
        plans += [(kind, TRAINED, 10), (kind, {}, 25), (kind, SD1 | {"steps_offset": 0}, 25)]
    for kind in ("euler", "dpmpp_2m", "lms", "heun", "dpm_2", "dpm_2_a", "dpmpp_2s", "dpmpp_sde", "unipc"):
        for flag in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"):
            if kind in OLD and flag != "use_beta_sigmas":
                continue
            limits = {"sigma_min": 0.1, "sigma_max": 10.0}
            bases = (SD1, SD2) if kind == "dpm_2_a" else (SD1, SD2, COSINE)
            plans += [(kind, base | {flag: True}, n) for base in bases for n in (2, 10)]
            plans += [(kind, SD1 | {flag: True} | limits, 12)]
    for kind in ("euler_a", "unipc", "ddpm", "lcm"):
        plans += [(kind, ZERO | s, n) for n in (5, 25) for s in spacings]
    # From here on one sampler after the other.
    plans += [("lms", SD1 | {"use_karras_sigmas": True}, 1), ("heun", SD1 | {"use_karras_sigmas": True}, 1)]
    plans += [("heun", base | {"clip_sample": True, "clip_sample_range": 0.7}, 10) for base in (SD1, SD2)]
    plans += [("ddpm", base | {"variance_type": t}, 10) for base in (SD1, SD2) for t in ("fixed_large", "fixed_small_log")]
    plans += [("ddpm", SD1 | {"clip_sample": True, "clip_sample_range": 0.7}, 10)]
    plans += [("lcm", base, n) for base in (SD1, SD2) for n in (4, 8, 49, 50)]
    plans += [("lcm", base | {"original_inference_steps": 20, "timestep_scaling": 0.01}, 3) for base in (SD1, SD2)]
    plans += [("lcm", SD1 | {"clip_sample": True}, 4)]
    for base in (SD1, SD2):
        for order in (1, 2, 3):
            for n in (1, 2, 5, 20):
                plans += [("unipc", base | {"solver_order": order}, n)]
                plans += [("unipc", base | {"solver_order": order, "solver_type": "bh1"} | keep, n)]
            plans += [("unipc", base | {"solver_order": order, "lower_order_final": False} | keep, 6)]
        plans += [("unipc", base | {"disable_corrector": [0, 2]}, 9), ("unipc", base | {"solver_type": "heun"}, 9)]
        plans += [("unipc", base | {"use_karras_sigmas": True} | keep, 9)]
        for order in (1, 2, 3):
            for solver in ("midpoint", "heun"):
                form = base | {"solver_order": order, "solver_type": solver}
                for algorithm in ("dpmsolver++", "sde-dpmsolver++", "dpmsolver"):
                    for last in ({}, keep, keep | {"lower_order_final": False}):
                        if algorithm == "dpmsolver" and last == {}:
                            continue
                        plans += [("dpmpp_2s", form | {"algorithm_type": algorithm} | last, n) for n in (6, 7)]
                for algorithm in ("sde-dpmsolver++", "dpmsolver", "sde-dpmsolver"):
                    if algorithm == "sde-dpmsolver" and order == 3:
                        continue
                    for last in ({}, keep, keep | {"euler_at_final": True}):
                        if algorithm != "sde-dpmsolver++" and last == {}:
                            continue
                        plans += [("dpmpp_2m", form | {"algorithm_type": algorithm} | last, n) for n in (6, 16)]
        sde = base | {"algorithm_type": "sde-dpmsolver++"}
        plans += [("dpmpp_2m", sde | {"use_karras_sigmas": True}, n) for n in (1, 8, 25)]
        plans += [("dpmpp_2m", sde | {"use_lu_lambdas": True, "timestep_spacing": "trailing"}, 8)]
    plans += [("dpmpp_2s", COSINE | {"lambda_min_clipped": -5.1} | v, 20) for v in ({}, V)]
    return plans


def samples():
    spacings = [{"timestep_spacing": spacing} for spacing in ("leading", "trailing", "linspace")]
    plans = []
    for kind in OLD:
        for steps in (1, 2, 3, 5, 25, 50):
            plans += [(kind, SD1, steps), (kind, SD2, steps)]
        plans += [(kind, base | spacing, steps) for base in (SD1, SD2) for spacing in spacings for steps in (7, 25)]
        plans += [(kind, config, 25) for config in (COSINE, COSINE | V, BARE | {"clip_sample": False})]
        plans += [(kind, TRAINED, 10)]
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
    for flag in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"):
        log = {"interpolation_type": "log_linear", flag: True}
        plans += [("euler", SD1 | log | s, n) for n in (1, 7) for s in spacings]
        plans += [("euler", SD1 | log | {"sigma_max": 10.0}, 7)]
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
    plans += new_plans(spacings)
    x = torch.tensor([[-2.1, -0.9, -0.2, 0.05, 0.4, 1.3]])
    cases = []
    for kind, config, steps in plans:
        scheduler = SAMPLERS[kind].from_config(config)
        scheduler.set_timesteps(steps)
        if hasattr(scheduler, "set_begin_index"):
            # Or two equal first timesteps are taken for the second: the index is looked up by the timestep.
            scheduler.set_begin_index(0)
        scheduler.noise_sampler = Brownian()
        sys.modules[type(scheduler).__module__].randn_tensor = Counted()
        # Where diffusers keeps the type, without its rounding: σ reaches 20000 with the cosine schedule.
        latents = (x.double() if kind in DOUBLE else x) * scheduler.init_noise_sigma
        try:
            for t in scheduler.timesteps:
                output = network(scheduler.scale_model_input(latents, t), t)
                latents = scheduler.step(output, t, latents).prev_sample
        except IndexError as error:
            print(f"left out, diffusers stops: {error}: {kind}, {steps} steps, {config}")
            continue
        if not torch.isfinite(latents).all():
            if kind not in OLD:
                print(f"left out, diffusers gives {latents}: {kind}, {steps} steps, {config}")
                continue
            raise SystemExit(f"diffusers itself gives {latents} for {kind}, {steps} steps, {config}")
        base, added = next(
            (name, {k: v for k, v in config.items() if k not in base})
            for name, base in BASES.items()
            if all(config.get(k) == v for k, v in base.items())
        )
        cases.append({
            "sampler": kind, "base": base, "added": added, "steps": steps, "timesteps": numbers(scheduler.timesteps),
            "latents": numbers(latents),
        })  # fmt: skip
    return {"noise": numbers(x), "bases": BASES, "cases": cases}


for name, content in (("tables", tables()), ("samples", samples())):
    lines = json.dumps(content, separators=(",", ":")).replace('{"sampler"', '\n{"sampler"').replace('{"name"', '\n{"name"')
    (out / f"{name}.json").write_text(lines + "\n")
    print(name, len(content if isinstance(content, list) else content["cases"]), "cases")
