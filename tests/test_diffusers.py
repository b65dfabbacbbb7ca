"""Schedulers of diffusers and those of pyperf_dl beside each other, over whole loops."""

import copy
import functools
import importlib
import inspect
import json
import pickle

import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is not installed")
import diffusers

from pyperf_dl.integrations import diffusers as ours

STEPS = 8
SHAPE = (2, 4, 20, 20)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPSILON, SAMPLE, V, FLOW = "epsilon", "sample", "v_prediction", "flow_prediction"
ALL = (EPSILON, SAMPLE, V)

# Of each case: the scheduler, predictions, its configuration, and arguments of each step.
CASES = {
    "ddim": ("DDIM", ALL, {"clip_sample": False}, {}),
    "ddim clipped": ("DDIM", ALL, {"clip_sample_range": 0.8}, {}),
    "ddim eta": ("DDIM", ALL, {"set_alpha_to_one": False, "timestep_spacing": "trailing"}, {"eta": 0.7}),
    "ddim rederived": ("DDIM", ALL, {}, {"eta": 1.0, "use_clipped_model_output": True}),
    "ddim threshold": ("DDIM", ALL, {"thresholding": True, "sample_max_value": 2.0}, {}),
    "ddim zero snr": ("DDIM", (V,), {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, {}),
    "ddpm": ("DDPM", ALL, {}, {}),
    "ddpm large": ("DDPM", (EPSILON,), {"variance_type": "fixed_large", "clip_sample": False}, {}),
    "ddpm log": ("DDPM", (EPSILON,), {"variance_type": "fixed_small_log", "timestep_spacing": "trailing"}, {}),
    "ddpm learned": ("DDPM", ALL, {"variance_type": "learned_range"}, {}),
    "ddpm threshold": ("DDPM", (EPSILON,), {"thresholding": True, "sample_max_value": 1.5}, {}),
    "euler": ("EulerDiscrete", ALL, {}, {}),
    "euler karras": ("EulerDiscrete", ALL, {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min"}, {}),
    "euler ancestral": ("EulerAncestralDiscrete", (EPSILON, V), {}, {}),
    "heun": ("HeunDiscrete", ALL, {}, {}),
    "heun clipped": ("HeunDiscrete", ALL, {"clip_sample": True, "use_karras_sigmas": True}, {}),
    "lms": ("LMSDiscrete", ALL, {}, {}),
    "lms 2": ("LMSDiscrete", (EPSILON, V), {"use_karras_sigmas": True}, {"order": 2}),
    "pndm": ("PNDM", (EPSILON, V), {"skip_prk_steps": True}, {}),
    "pndm one": ("PNDM", (EPSILON,), {"skip_prk_steps": True, "set_alpha_to_one": True, "steps_offset": 1}, {}),
    "lcm": ("LCM", ALL, {}, {}),
    "lcm clipped": ("LCM", ALL, {"clip_sample": True, "clip_sample_range": 0.7}, {}),
    "flow euler": ("FlowMatchEulerDiscrete", (None,), {"shift": 3.0}, {}),
    "flow euler stochastic": ("FlowMatchEulerDiscrete", (None,), {"stochastic_sampling": True}, {}),
    "flow euler inverted": ("FlowMatchEulerDiscrete", (None,), {"invert_sigmas": True}, {}),
    "flow heun": ("FlowMatchHeunDiscrete", (None,), {}, {}),
    "dpm 1": ("DPMSolverMultistep", ALL, {"solver_order": 1}, {}),
    "dpm 2m": ("DPMSolverMultistep", ALL, {}, {}),
    "dpm 2m heun": ("DPMSolverMultistep", ALL, {"solver_type": "heun", "lower_order_final": False}, {}),
    "dpm 2m flow": ("DPMSolverMultistep", (FLOW,), {"use_flow_sigmas": True, "flow_shift": 2.0}, {}),
    "dpm 2m final": ("DPMSolverMultistep", (EPSILON,), {"final_sigmas_type": "sigma_min", "euler_at_final": True}, {}),
    "dpm 2m threshold": ("DPMSolverMultistep", (EPSILON,), {"thresholding": True}, {}),
    "dpm 2m learned": ("DPMSolverMultistep", (EPSILON,), {"variance_type": "learned_range"}, {}),
    "dpm 3m": ("DPMSolverMultistep", ALL, {"solver_order": 3, "use_karras_sigmas": True}, {}),
    "dpm 2m sde": ("DPMSolverMultistep", ALL, {"algorithm_type": "sde-dpmsolver++"}, {}),
    "dpm 2m sde heun": ("DPMSolverMultistep", ALL, {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"}, {}),
    "dpm 3m sde": ("DPMSolverMultistep", ALL, {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}, {}),
    **{
        f"dpm noise {algorithm} {order} {kind}": (
            "DPMSolverMultistep",
            ALL,
            {
                "algorithm_type": algorithm,
                "solver_order": order,
                "solver_type": kind,
                "final_sigmas_type": "sigma_min",
                "use_karras_sigmas": True,
            },
            {},
        )
        for algorithm, order, kind in [
            ("dpmsolver", 2, "midpoint"),
            ("dpmsolver", 2, "heun"),
            ("dpmsolver", 3, "midpoint"),
            ("sde-dpmsolver", 2, "midpoint"),
            ("sde-dpmsolver", 2, "heun"),
        ]
    },
    "unipc 1": ("UniPCMultistep", ALL, {"solver_order": 1}, {}),
    "unipc 2": ("UniPCMultistep", ALL, {}, {}),
    "unipc 2 bh1": ("UniPCMultistep", ALL, {"solver_type": "bh1", "final_sigmas_type": "sigma_min"}, {}),
    "unipc 2 few": ("UniPCMultistep", ALL, {"disable_corrector": [0, 3]}, {}),
    "unipc 2 flow": ("UniPCMultistep", (FLOW,), {"use_flow_sigmas": True, "flow_shift": 3.0}, {}),
    "unipc 2 noise": ("UniPCMultistep", ALL, {"predict_x0": False, "final_sigmas_type": "sigma_min"}, {}),
    "unipc 2 threshold": ("UniPCMultistep", (EPSILON,), {"thresholding": True}, {}),
    "unipc 3": ("UniPCMultistep", ALL, {"solver_order": 3, "disable_corrector": [4]}, {}),
    "unipc 3 full": ("UniPCMultistep", ALL, {"solver_order": 3, "lower_order_final": False, "solver_type": "bh1",
                                              "final_sigmas_type": "sigma_min"}, {}),
    "unipc 3 noise": ("UniPCMultistep", ALL, {"solver_order": 3, "predict_x0": False, "final_sigmas_type": "sigma_min"}, {}),
}  # fmt: skip
EACH = [(case, prediction) for case, (_, predictions, _, _) in CASES.items() for prediction in predictions]


@functools.cache
def built(case, prediction):
    name, predictions, config, _ = CASES[case]
    prediction = prediction or predictions[0]
    return getattr(diffusers, f"{name}Scheduler")(**config, **({"prediction_type": prediction} if prediction else {}))


def made(case, prediction=None):
    return copy.deepcopy(built(case, prediction)), CASES[case][3]


class InDouble:
    """The torch of a module to which float32 is float64."""

    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


def start(scheduler, dtype):
    scheduler.set_timesteps(STEPS)
    scale = float(getattr(scheduler, "init_noise_sigma", 1.0))
    shape = (2, 3, *SHAPE[2:]) if scheduler.config.get("variance_type") == "learned_range" else SHAPE
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)).to(dtype)


def stepped(scheduler, output, t, x, how):
    if hasattr(scheduler, "scale_model_input"):
        scheduler.scale_model_input(x, t)
    return scheduler.step(output, t, x, **how)


def results(result):
    return [result[name] for name in ("prev_sample", "pred_original_sample", "denoised") if name in result]


def with_generator(scheduler, how):
    generator = torch.Generator().manual_seed(3)
    given = "generator" in inspect.signature(scheduler.step).parameters
    return {**how, "generator": generator} if given else how, generator


def in_float64(scheduler, plan, how, dtype, monkeypatch):
    """Of each step of the scheduler in float64: the sample and the output of a model, rounded, and what it makes of
    those, with the noise that it draws in that dtype."""
    module = importlib.import_module(type(scheduler).__module__)
    x, path = start(scheduler, torch.float64), []
    pattern = 1.2 * torch.sin(torch.arange(x.numel()).reshape(x.shape))
    for name in ("alphas_cumprod", "final_alpha_cumprod", "sigmas", "one"):
        if isinstance(getattr(scheduler, name, None), torch.Tensor):
            setattr(scheduler, name, getattr(scheduler, name).double())
    noise_dtype = torch.float32 if type(scheduler).__name__.startswith(("DPM", "Flow")) else dtype
    with monkeypatch.context() as patched:
        patched.setattr(module, "torch", InDouble())
        if hasattr(module, "randn_tensor"):
            draw = module.randn_tensor
            patched.setattr(
                module, "randn_tensor", lambda shape, **k: draw(shape, **{**k, "dtype": noise_dtype}).double()
            )
        how, _ = with_generator(scheduler, how)
        for i, t in enumerate(scheduler.timesteps):
            p, q = plan.rows[int(t) if plan.steps == scheduler.config.num_train_timesteps else i, :2]
            data = pattern + float(t) / 4000 * torch.sin(3 * x.roll(1, -1))
            output = (data - p * x) / q if q else x - data
            if scheduler.config.get("variance_type") == "learned_range":
                output = torch.cat([output, torch.sin(3 * output)], 1)
            x, output = x.to(dtype), output.to(dtype)
            at = int(t) if type(scheduler).__name__ == "LCMScheduler" else t  # a tensor makes float32 of it
            found = results(stepped(scheduler, output.double(), at, x.double(), how))
            path.append((x, output, found))
            x = found[0].double()
    return path


def rms(a, b):
    return float((a.double() - b).square().mean().sqrt())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case,prediction", EACH)
@pytest.mark.filterwarnings("ignore")
def test_loops(case, prediction, dtype, monkeypatch):
    """Every step from the sample that diffusers has in float64, with the scheduler's own history: no farther from its
    results than diffusers is, but for one rounding."""
    theirs, how = made(case, prediction)
    fused = ours.fuse(theirs)
    assert isinstance(fused, type(theirs)) and type(fused) is not type(theirs)
    start(fused, dtype), start(theirs, dtype)
    plan = next(iter(fused._pyperf_dl.plans.values()))
    path = in_float64(copy.deepcopy(theirs), plan, how, dtype, monkeypatch)
    (their_how, their_generator), (our_how, our_generator) = with_generator(theirs, how), with_generator(fused, how)
    ours.report(reset=True)
    for t, (x, output, true) in zip(theirs.timesteps, path, strict=True):
        mine = results(stepped(fused, output, t, x, our_how))
        for got, peers, want in zip(mine, results(stepped(theirs, output, t, x, their_how)), true, strict=True):
            assert got.dtype == peers.dtype and got.isfinite().all()
            # In float16 diffusers overflows where it finds the noise from a sample.
            if peers.isfinite().all():
                assert rms(got, want) <= rms(peers, want) + rms(want.to(got.dtype), want)
    assert ours.report() == ours.Report(len(path), {})
    assert torch.equal(our_generator.get_state(), their_generator.get_state())
