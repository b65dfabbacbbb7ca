"""Cases of the family `sampler`: guidance and one step of the common samplers, against diffusers and a compiled step.

Each case is a step in the middle of a loop of 20. Peers compute guidance in PyTorch and call their scheduler's step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import harness
import pytest
import torch
from harness import Case, Peer, optional, pyperf_dl, tensor_bytes

FAMILY = "sampler"
STEPS, ROW, SCALE, SEED = 20, 10, 7.5, 3
SMALL, LATENTS, LARGE = (1, 4, 64, 64), (16, 4, 64, 64), (64, 16, 256, 256)


class Method(NamedTuple):
    """One sampler, here and in diffusers (class of the scheduler and its arguments)."""

    table: Callable[[], Any]
    scheduler: str
    config: dict[str, Any] = {}
    clip: float | None = None


def _variance_preserving() -> Any:
    return pyperf_dl.NoiseSchedule.from_betas(STEPS, spacing="leading", steps_offset=1)


def _sigmas() -> Any:
    return pyperf_dl.NoiseSchedule.from_betas(STEPS, space="sigma", sigmas="karras")


_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_KARRAS = _BETAS | {"use_karras_sigmas": True}
_Table = pyperf_dl.StepTable
METHODS = {
    "Euler": Method(lambda: _Table.euler(_sigmas()), "EulerDiscreteScheduler", _KARRAS),
    "flow Euler": Method(
        lambda: _Table.flow_euler(pyperf_dl.NoiseSchedule.flow(STEPS)), "FlowMatchEulerDiscreteScheduler"
    ),
    "DDIM": Method(lambda: _Table.ddim(_variance_preserving()), "DDIMScheduler", _BETAS | {"clip_sample": True}, 1.0),
    "DPM-Solver++ 2M": Method(
        lambda: _Table.dpm_solver_pp(_variance_preserving()), "DPMSolverMultistepScheduler", _BETAS
    ),
    "UniPC": Method(lambda: _Table.unipc(_variance_preserving()), "UniPCMultistepScheduler", _BETAS),
    "DDPM": Method(lambda: _Table.ddpm(_variance_preserving()), "DDPMScheduler", _BETAS | {"clip_sample": True}, 1.0),
    "DPM-Solver++ 2M SDE": Method(
        lambda: _Table.dpm_solver_pp(_variance_preserving(), eta=1.0),
        "DPMSolverMultistepScheduler",
        _BETAS | {"algorithm_type": "sde-dpmsolver++"},
    ),
}


class Spec(NamedTuple):
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: str
    noise: str = "generator"  # or "key", which no peer has
    gradient: bool = False

    @property
    def method(self) -> Method:
        return METHODS[self.name]


@functools.cache
def table_of(name: str) -> Any:
    return METHODS[name].table()


def inputs_of(spec: Spec) -> Callable[[torch.Generator], Any]:
    """x, outputs with and without the condition, and the history that the row reads; with a backward, a gradient."""

    def make(generator: torch.Generator) -> Any:
        table = table_of(spec.name)
        count = 3 + table.history[ROW] + table.corrects[ROW] + spec.gradient
        how = {"generator": generator, "device": generator.device, "dtype": spec.dtype}
        made = [torch.randn(spec.shape, **how) for _ in range(count)]
        return tuple(t.requires_grad_(spec.gradient and k < 3) for k, t in enumerate(made))

    return make


@functools.cache
def generator_of(device: str) -> torch.Generator:
    return torch.Generator(device)


def ours(spec: Spec, inputs: Any, table: Any = None) -> Any:
    """The sample, and what the step keeps."""
    table = table_of(spec.name) if table is None else table
    x, cond, uncond, *history = inputs
    how: dict[str, Any] = {}
    if table.noisy[ROW]:
        how = {"generator": generator_of(spec.device).manual_seed(SEED)} if spec.noise == "generator" else {"key": SEED}
    step = pyperf_dl.sampler_step(
        x, cond, table, ROW, uncond=uncond, guidance=SCALE, history=tuple(history), clip=spec.method.clip, **how
    )
    return step.sample, *step.history[: max(table.history) > 0]


def with_gradients(spec: Spec, inputs: Any) -> Any:
    *inputs, grad = inputs
    sample = ours(spec, inputs)[0]
    return sample, *torch.autograd.grad(sample, inputs[:3], grad)


def run(spec: Spec, inputs: Any) -> Any:
    if spec.gradient:
        return with_gradients(spec, inputs)
    with torch.no_grad():
        return ours(spec, inputs)


def error(spec: Spec, inputs: Any, outputs: Any, whole: bool) -> float:
    """Of the sample, against the reference in float64 with the same noise."""
    table = table_of(spec.name)
    x, cond, uncond, *history = (t.detach().double() for t in inputs[: 3 + len(inputs) - 3 - spec.gradient])
    how: dict[str, Any] = {}
    if table.noisy[ROW]:
        if spec.noise == "generator":
            generator = generator_of(spec.device).manual_seed(SEED)
            noise = torch.randn(spec.shape, generator=generator, dtype=spec.dtype, device=spec.device)
        else:
            noise = pyperf_dl.per_sample_noise(spec.shape, SEED, ROW, device=spec.device)
        how = {"noise": noise.double()}
    with torch.no_grad(), pyperf_dl.backend("reference"):
        want = pyperf_dl.sampler_step(
            x, cond, table, ROW, uncond=uncond, guidance=SCALE, history=tuple(history), clip=spec.method.clip, **how
        ).sample
    return harness.max_difference(outputs[0].detach().double(), want)


# ---- peers ----


def scheduler_of(spec: Spec) -> Any:
    """diffusers', as it is before the step; its history is put there in each call."""
    scheduler = getattr(optional("diffusers"), spec.method.scheduler)(**spec.method.config)
    scheduler.set_timesteps(STEPS, device=spec.device)
    return scheduler


def diffusers_step(spec: Spec, prepared: Any) -> Any:
    scheduler, timestep, takes_generator, x, cond, uncond, history = prepared
    scheduler._step_index = ROW
    if hasattr(scheduler, "model_outputs"):
        scheduler.model_outputs = (
            [*history[::-1], None] if False else [None, *history[::-1]][-len(scheduler.model_outputs) :]
        )
        scheduler.lower_order_nums = 2
        scheduler.last_sample, scheduler.this_order = x, 2
    with torch.no_grad():
        output = uncond + SCALE * (cond - uncond)
        how = {"generator": generator_of(spec.device).manual_seed(SEED)} if takes_generator else {}
        return scheduler.step(output, timestep, x, **how).prev_sample


def peers_of(spec: Spec) -> dict[str, Peer]:
    if spec.gradient or spec.noise == "key" or optional("diffusers") is None:
        return {}
    import inspect

    def prepare(inputs: Any) -> Any:
        x, cond, uncond, *history = inputs
        scheduler = scheduler_of(spec)
        takes = "generator" in inspect.signature(scheduler.step).parameters and table_of(spec.name).noisy[ROW]
        return scheduler, scheduler.timesteps[ROW], takes, x, cond, uncond, history

    def agrees(inputs: Any, made: Any, theirs: Any) -> bool:
        bound = 0.05 if spec.dtype.itemsize == 2 else 1e-3
        return theirs.shape == made[0].shape and harness.max_difference(made[0].float(), theirs.float()) <= bound * 20

    return {"diffusers": Peer(functools.partial(diffusers_step, spec), prepare=prepare, agrees=agrees)}


def case(spec: Spec, suffix: str = "") -> Case:
    size = "x".join(map(str, spec.shape))
    return Case(
        FAMILY,
        "sampler_step",
        f"{spec.name}{suffix}, {size}",
        spec.dtype,
        spec.device,
        make=inputs_of(spec),
        ours=functools.partial(run, spec),
        error=functools.partial(error, spec),
        moved=lambda inputs, outputs: tensor_bytes(inputs, outputs),
        peers=peers_of(spec),
        tolerance={torch.float32: 1e-5, torch.float16: 0.1, torch.bfloat16: 0.5}[spec.dtype],
        params={"sampler": spec.name, "shape": list(spec.shape)},
        cold=spec.shape != SMALL,
    )


def cases(device: str, full: bool) -> list[Case]:
    """Everything that this family measures on a device."""
    return [case(Spec(name, LATENTS, torch.float32, device)) for name in METHODS]
