"""What schedulers of diffusers make of their configurations: arguments of NoiseSchedule's class methods."""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from . import _checks
from ._sampler_schedules import (
    BETAS,
    TINY_PRODUCT,
    NoiseSchedule,
    in_range,
    interpolated,
    log_interpolated,
    quarter_log,
    shift_sigma,
    spaced,
    training_sigmas,
)
from .reference.sampler import Level

Config = Mapping[str, Any]


def _betas(op: str, config: Config) -> dict[str, Any]:
    """Arguments of from_betas."""
    if config.get("trained_betas") is not None:
        betas = [float(b) for b in config["trained_betas"]]
    else:
        kind = config["beta_schedule"]
        betas = "cosine" if kind == "squaredcos_cap_v2" else _checks.choice(op, "beta_schedule", kind, BETAS)
    return {
        "betas": betas,
        "beta_start": config["beta_start"],
        "beta_end": config["beta_end"],
        "train_steps": config["num_train_timesteps"],
    }


def _trained(op: str, config: Config) -> list[float]:
    return training_sigmas(
        op, *_betas(op, config).values(), TINY_PRODUCT if config.get("rescale_betas_zero_snr") else None
    )


def _kind(config: Config) -> str | None:
    """Those of Lu et al. are even in log sigma, which is what "exponential" means."""
    for kind in ("karras", "exponential", "beta"):
        if config.get(f"use_{kind}_sigmas"):
            return kind
    return "exponential" if config.get("use_lu_lambdas") else None


def _ends_at_zero(op: str, config: Config) -> bool:
    kind = config.get("final_sigmas_type", "zero")
    return _checks.choice(op, "final_sigmas_type", kind, ("zero", "sigma_min")) == "zero"


def _mu(op: str, config: Config, mu: float | None) -> float | None:
    if not config.get("use_dynamic_shifting"):
        return None
    if mu is None:
        raise ValueError(f"{op}: mu must be given for use_dynamic_shifting, got None")
    return mu


def _discrete_steps(op: str, config: Config, steps: int, mu: float | None) -> NoiseSchedule:
    """DDIM, DDPM, PNDM."""
    return NoiseSchedule.from_betas(
        steps,
        spacing=config["timestep_spacing"],
        steps_offset=config["steps_offset"],
        zero_terminal_snr=config.get("rescale_betas_zero_snr", False),
        final_sigma=0.0 if config.get("set_alpha_to_one", True) else None,
        **_betas(op, config),
    )


def _latent_consistency(op: str, config: Config, steps: int, mu: float | None) -> NoiseSchedule:
    """Steps among those of the distillation."""
    count = config["original_inference_steps"]
    if steps > count:
        raise ValueError(f"{op}: steps must be at most original_inference_steps, {count}, got {steps}")
    apart = config["num_train_timesteps"] // count
    return NoiseSchedule.from_betas(
        steps,
        timesteps=[(count - i * count // steps) * apart - 1 for i in range(steps)],
        zero_terminal_snr=config.get("rescale_betas_zero_snr", False),
        **_betas(op, config),
    )


def _in_sigmas(op: str, config: Config, steps: int, mu: float | None) -> NoiseSchedule:
    """Euler, Euler ancestral, Heun, LMS."""
    if config.get("interpolation_type", "linear") != "linear":
        raise ValueError(f"{op}: interpolation_type must be 'linear', got {config['interpolation_type']!r}")
    trained, spacing = _trained(op, config), config["timestep_spacing"]
    timesteps = [float(t) for t in spaced(op, steps, spacing, len(trained), config["steps_offset"], rounded=False)]
    sigmas = [interpolated(trained, t) for t in timesteps]
    if kind := _kind(config):
        low, high = (
            end if config.get(name) is None else config[name]
            for name, end in (("sigma_min", sigmas[-1]), ("sigma_max", sigmas[0]))
        )
        sigmas = in_range(op, kind, steps, low, high)
        timesteps = [log_interpolated(trained, s) for s in sigmas]
    timestep_of = partial(log_interpolated, trained)
    if config.get("timestep_type") == "continuous" and config["prediction_type"] == "v_prediction":
        timestep_of = quarter_log
        timesteps = [quarter_log(s) for s in sigmas]
    last = 0.0 if _ends_at_zero(op, config) else trained[0]
    return dataclasses.replace(
        NoiseSchedule.from_sigmas([*sigmas, last], timesteps=timesteps),
        initial_scale=math.hypot(sigmas[0], 1) if spacing == "leading" else sigmas[0],
        timestep_of=timestep_of,
    )


def _multistep(op: str, config: Config, steps: int, mu: float | None, unipc: bool) -> NoiseSchedule:
    """DPM-Solver and UniPC, whose timesteps are integers."""
    if config.get("use_flow_sigmas"):
        return _multistep_of_flow(op, config, steps, _mu(op, config, mu), unipc)
    trained, kind = _trained(op, config), _kind(config)
    last = 0.0 if _ends_at_zero(op, config) else trained[0]
    if kind:
        low, high = config.get("sigma_min") or trained[0], config.get("sigma_max") or trained[-1]
        sigmas = in_range(op, kind, steps, low, high)
        timesteps = [log_interpolated(trained, s) for s in sigmas]
        last = last and low
    else:
        most = math.exp(-config.get("lambda_min_clipped", -math.inf))  # lambda = -log(sigma / alpha)
        timesteps = spaced(
            op,
            steps,
            config["timestep_spacing"],
            len(trained),
            config["steps_offset"],
            top=bisect.bisect_right(trained, most),
            without_last=True,
        )
        sigmas = [interpolated(trained, t) for t in timesteps]
    rounds = config.get("use_karras_sigmas") or config.get("use_lu_lambdas")
    if not unipc and config["beta_schedule"] == "squaredcos_cap_v2":
        rounds = False
    return NoiseSchedule.from_sigmas(
        [*sigmas, last],
        space="variance_preserving",
        timesteps=[round(t) if rounds else int(t) for t in timesteps],
    )


def _multistep_of_flow(op: str, config: Config, steps: int, mu: float | None, unipc: bool) -> NoiseSchedule:
    if _kind(config) or not _ends_at_zero(op, config):
        raise ValueError(f"{op}: use_flow_sigmas must go without other sigmas and with final_sigmas_type='zero'")
    count = config["num_train_timesteps"]
    high = 1.0 if unipc else 1 - 1 / count
    schedule = NoiseSchedule.flow(
        steps,
        sigma_max=high,
        sigma_min=high - (1 - 1 / count) * (steps - 1) / steps,
        shift=config["flow_shift"],
        mu=mu,
        shift_terminal=config.get("shift_terminal") or None,
        train_steps=count,
    )
    levels = schedule.levels
    if unipc and levels[0].sigma > 1 - 1e-6:  # it leaves some signal there
        levels = (Level(1e-6, 1 - 1e-6), *levels[1:])
    timesteps = tuple(int(level.sigma * count) for level in levels[:-1])
    return dataclasses.replace(schedule, levels=levels, timesteps=timesteps)


def _flow(op: str, config: Config, steps: int, mu: float | None) -> NoiseSchedule:
    """Flow-matching Euler, Heun, LCM, and LTX's, which has no options."""
    if config.get("invert_sigmas"):
        raise ValueError(f"{op}: invert_sigmas must be False, got True")
    count, shift, mu = config["num_train_timesteps"], config.get("shift", 1.0), _mu(op, config, mu)
    return NoiseSchedule.flow(
        steps,
        # the lowest sigma of training is shifted already, and then again
        sigma_min=1 / count if mu is not None else shift_sigma(1 / count, shift),
        shift=shift,
        mu=mu,
        mu_kind=config.get("time_shift_type", "exponential"),
        shift_terminal=config.get("shift_terminal") or None,
        sigmas=_kind(config),
        train_steps=count,
    )


def _edm(op: str, config: Config, steps: int, mu: float | None) -> NoiseSchedule:
    """EDM's Euler and DPM-Solver++."""
    schedule = NoiseSchedule.from_sigma_range(
        steps,
        config["sigma_min"],
        config["sigma_max"],
        sigmas=config["sigma_schedule"],
        rho=config["rho"],
        sigma_data=config["sigma_data"],
        final_sigma=0.0 if _ends_at_zero(op, config) else config["sigma_min"],
    )
    return dataclasses.replace(schedule, initial_scale=math.hypot(config["sigma_max"], 1))


def _consistency(op: str, config: Config, steps: int, mu: float | None) -> NoiseSchedule:
    """Consistency models: steps among those of training, which are Karras sigmas."""
    count, low = config["num_train_timesteps"], config["sigma_min"]
    trained = in_range(op, "karras", count, low, config["sigma_max"], config["rho"])
    sigmas = [trained[i * (count // steps)] for i in range(steps)]
    return NoiseSchedule.from_sigmas(
        [*sigmas, low], timesteps=[250 * math.log(s) for s in sigmas], sigma_data=config["sigma_data"]
    )


PEERS: dict[str, Callable[[str, Config, int, float | None], NoiseSchedule]] = {
    "DDIMScheduler": _discrete_steps,
    "DDIMParallelScheduler": _discrete_steps,
    "DDPMScheduler": _discrete_steps,
    "DDPMParallelScheduler": _discrete_steps,
    "PNDMScheduler": _discrete_steps,
    "LCMScheduler": _latent_consistency,
    "EulerDiscreteScheduler": _in_sigmas,
    "EulerAncestralDiscreteScheduler": _in_sigmas,
    "HeunDiscreteScheduler": _in_sigmas,
    "LMSDiscreteScheduler": _in_sigmas,
    "DPMSolverMultistepScheduler": partial(_multistep, unipc=False),
    "UniPCMultistepScheduler": partial(_multistep, unipc=True),
    "FlowMatchEulerDiscreteScheduler": _flow,
    "FlowMatchHeunDiscreteScheduler": _flow,
    "FlowMatchLCMScheduler": _flow,
    "LTXEulerAncestralRFScheduler": _flow,
    "EDMEulerScheduler": _edm,
    "EDMDPMSolverMultistepScheduler": _edm,
    "CMStochasticIterativeScheduler": _consistency,
}
