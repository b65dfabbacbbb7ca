"""The steps of the schedulers of diffusers: one function a class, with the signature of its `step`.

It returns what that does, with the same state left on the scheduler, or why diffusers has to make the step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from . import _diffusers_run as core
from . import _diffusers_tables as tables
from ._swap import Declined

# ---- schedulers of sigmas ----


def _euler(
    output: type, scheduler: Any, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor,
    s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0, generator: Any = None,
    return_dict: bool = True, *, noise: Any = None, key: Any = None,
) -> Any:  # fmt: skip
    if s_churn != 0:
        return Declined("s_churn")
    return _in_sigmas(
        tables.euler, output, scheduler, model_output, timestep, sample, generator, return_dict, noise, key
    )


def _euler_ancestral(
    output: type, scheduler: Any, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor,
    generator: Any = None, return_dict: bool = True, *, noise: Any = None, key: Any = None,
) -> Any:  # fmt: skip
    return _in_sigmas(
        tables.euler_ancestral, output, scheduler, model_output, timestep, sample, generator, return_dict, noise, key
    )


def _in_sigmas(
    build: Callable[..., tables.Table], output: type, scheduler: Any, model_output: torch.Tensor, timestep: Any,
    sample: torch.Tensor, generator: Any, return_dict: bool, noise: Any, key: Any,
) -> Any:  # fmt: skip
    """diffusers has the sample in float32 inside, the denoised one as it comes, and the result in the model's dtype."""
    why = core.unfit(sample, model_output)
    if why or core.is_integer(timestep) or core.is_unscaled(scheduler):
        return Declined(why or core.REFUSED)
    plan = core.plan_of(scheduler, build)
    if isinstance(plan, Declined):
        return plan
    step = core.index_of(scheduler, plan, timestep)
    denoised = scheduler._pyperf_dl.denoised
    of_model = scheduler.config.prediction_type in ("sample", "original_sample")
    of_guided = of_model and scheduler._pyperf_dl.guided is not None
    wide = denoised and not of_model
    dtype = core.common_dtype(sample, model_output, wide)
    drawn = core.drawn(plan, step, noise, key, generator, model_output, dtype)
    made = core.run(
        scheduler, plan, sample, model_output, step, noise=drawn, denoised=wide or (denoised and of_guided), wide=wide
    )  # fmt: skip
    scheduler._step_index = step + 1
    if not denoised:
        d = None
    elif of_model:
        d = made.denoised.to(model_output.dtype) if of_guided else model_output
    else:
        d = made.denoised
    return core.returned(output, return_dict, made.sample.to(model_output.dtype), d)


def _heun(
    output: type, scheduler: Any, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor,
    return_dict: bool = True, *, noise: Any = None, key: Any = None,
) -> Any:  # fmt: skip
    why = core.unfit(sample, model_output)
    plan = Declined(why) if why else core.plan_of(scheduler, tables.heun)
    if isinstance(plan, Declined):
        return _handed_back(scheduler, plan)
    step = core.index_of(scheduler, plan, timestep)
    begins = scheduler.dt is None
    if not begins and scheduler._pyperf_dl.first is None:
        return Declined("the second half of a step that diffusers began")
    history = () if begins else (scheduler.sample, scheduler._pyperf_dl.first)
    wanted = scheduler._pyperf_dl.denoised
    made = core.run(
        scheduler, plan, sample, model_output, step, block=int(not begins), history=history, denoised=wanted or begins
    )
    _between(scheduler, begins, sample, made.denoised)
    scheduler._step_index = step + 1
    return core.returned(output, return_dict, made.sample, made.denoised if wanted else None)


def _between(scheduler: Any, begins: bool, sample: torch.Tensor, first: torch.Tensor) -> None:
    """What the second evaluation of a step needs of the first."""
    scheduler.dt = 0.0 if begins else None  # diffusers, too, goes by whether there is one
    scheduler.sample = sample if begins else None
    scheduler._pyperf_dl.first = first if begins else None


def _handed_back(scheduler: Any, why: Declined) -> Declined:
    """With what diffusers wants in the middle of a step."""
    state = scheduler.__dict__.get("_pyperf_dl")
    if scheduler.dt is not None and state is not None and state.first is not None:
        i = int(scheduler._step_index)
        sigma, after = scheduler.sigmas[i - 1], scheduler.sigmas[i]
        scheduler.dt, first, state.first = after - sigma, state.first, None
        flows = type(scheduler).__name__ == "FlowMatchHeunDiscreteScheduler"
        scheduler.prev_derivative = first if flows else (scheduler.sample - first) / sigma
    return why


def _lms(
    output: type, scheduler: Any, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, order: int = 4,
    return_dict: bool = True, *, noise: Any = None, key: Any = None,
) -> Any:  # fmt: skip
    why = core.unfit(sample, model_output)
    if why or core.is_unscaled(scheduler):
        return Declined(why or core.REFUSED)
    plan = core.plan_of(scheduler, tables.lms, order)
    if isinstance(plan, Declined):
        return plan
    step = core.index_of(scheduler, plan, timestep)
    older = scheduler.derivatives[::-1][: order - 1]
    wanted = scheduler._pyperf_dl.denoised
    made = core.run(
        scheduler, plan, sample, model_output, step, block=len(older), history=older, denoised=wanted,
        keeps=plan.keeps == "combination",
    )  # fmt: skip
    slope = made.kept if plan.keeps == "combination" else made.output.to(made.sample.dtype)
    scheduler.derivatives = [*scheduler.derivatives, slope][-order:]
    scheduler._step_index = step + 1
    return core.returned(output, return_dict, made.sample, made.denoised if wanted else None)


# ---- flows ----


def _flow_match_euler(
    output: type, scheduler: Any, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor,
    s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0, generator: Any = None,
    per_token_timesteps: Any = None, return_dict: bool = True, *, noise: Any = None, key: Any = None,
) -> Any:  # fmt: skip
    if per_token_timesteps is not None:
        return Declined("per_token_timesteps")
    why = core.unfit(sample, model_output)
    if why or core.is_integer(timestep):
        return Declined(why or core.REFUSED)
    plan = core.plan_of(scheduler, tables.flow_match_euler)
    if isinstance(plan, Declined):
        return plan
    step = core.index_of(scheduler, plan, timestep)
    dtype, wide = core.common_dtype(sample, sample, True), plan.draws(step) and key is None
    drawn = core.drawn(plan, step, noise, key, generator, sample, core.common_dtype(sample, model_output, wide), dtype)
    made = core.run(scheduler, plan, sample, model_output, step, noise=drawn, wide=wide)
    scheduler._step_index = step + 1
    return core.returned(output, return_dict, made.sample.to(model_output.dtype))


def _flow_match_heun(
    output: type, scheduler: Any, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor,
    s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0, generator: Any = None,
    return_dict: bool = True, *, noise: Any = None, key: Any = None,
) -> Any:  # fmt: skip
    why = "s_churn" if s_churn != 0 else core.unfit(sample, model_output)
    if not why and core.is_integer(timestep):
        why = core.REFUSED
    plan = Declined(why) if why else core.plan_of(scheduler, tables.flow_match_heun)
    if isinstance(plan, Declined):
        return _handed_back(scheduler, plan)
    step = core.index_of(scheduler, plan, timestep)
    begins = scheduler.dt is None
    if not begins and scheduler._pyperf_dl.first is None:
        return Declined("the second half of a step that diffusers began")
    history = () if begins else (scheduler.sample, scheduler._pyperf_dl.first)
    made = core.run(scheduler, plan, sample, model_output, step, block=int(not begins), history=history)
    _between(scheduler, begins, sample, made.output)
    scheduler._step_index = step + 1
    return core.returned(output, return_dict, made.sample.to(model_output.dtype))


# ---- schedulers of alphas ----


def _ddim(
    output: type, scheduler: Any, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, eta: float = 0.0,
    use_clipped_model_output: bool = False, generator: Any = None, variance_noise: Any = None,
    return_dict: bool = True, *, noise: Any = None, key: Any = None,
) -> Any:  # fmt: skip
    if scheduler.num_inference_steps is None or not isinstance(eta, (int, float)):
        return Declined(core.REFUSED if scheduler.num_inference_steps is None else "eta")
    if variance_noise is not None and generator is not None:
        return Declined(core.REFUSED)
    why = core.unfit(sample, model_output)
    plan = Declined(why) if why else core.plan_of(scheduler, tables.ddim, float(eta), bool(use_clipped_model_output))
    if isinstance(plan, Declined):
        return plan
    step = core.train_step(scheduler, timestep)
    if step is None:
        return Declined("a timestep for each sample, or out of range")
    noise = variance_noise if noise is None else noise
    kept = core.common_dtype(sample, model_output, False)
    drawn = core.drawn(plan, step, noise, key, generator, model_output, kept)
    wanted = scheduler._pyperf_dl.denoised
    made = core.run(scheduler, plan, sample, model_output, step, noise=drawn, denoised=wanted)
    return core.returned(output, return_dict, made.sample, made.denoised if wanted else None)


def _ddpm(
    output: type, scheduler: Any, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor,
    generator: Any = None, return_dict: bool = True, *, noise: Any = None, key: Any = None,
) -> Any:  # fmt: skip
    variance = None
    if scheduler.variance_type in ("learned", "learned_range"):
        if model_output.dim() < 2 or model_output.shape[1] != 2 * sample.shape[1]:
            return Declined("no learned variance")
        model_output, variance = model_output.split(sample.shape[1], 1)
    why = core.unfit(sample, model_output)
    plan = Declined(why) if why else core.plan_of(scheduler, tables.ddpm)
    if isinstance(plan, Declined):
        return plan
    step = core.train_step(scheduler, timestep, on_host=True)  # diffusers draws no noise at 0
    if step is None:
        return Declined("a timestep for each sample, or out of range")
    kept = core.common_dtype(sample, model_output, False)
    drawn = core.drawn(plan, step, noise, key, generator, model_output, kept)
    wanted = scheduler._pyperf_dl.denoised
    made = core.run(scheduler, plan, sample, model_output, step, noise=drawn, variance=variance, denoised=wanted)
    return core.returned(output, return_dict, made.sample, made.denoised if wanted else None)


def _pndm(
    output: type, scheduler: Any, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor,
    return_dict: bool = True, *, noise: Any = None, key: Any = None,
) -> Any:  # fmt: skip
    if scheduler.num_inference_steps is None:
        return Declined(core.REFUSED)
    if not scheduler.config.skip_prk_steps and (
        scheduler.counter < len(scheduler.prk_timesteps) or len(scheduler.ets) < 3
    ):
        return Declined("Runge-Kutta steps")
    why = core.unfit(sample, model_output)
    plan = Declined(why) if why else core.plan_of(scheduler, tables.pndm)
    if isinstance(plan, Declined):
        return plan
    step = core.train_step(scheduler, timestep)
    if step is None:
        return Declined("a timestep for each sample, or out of range")
    again, older = scheduler.counter == 1, scheduler.ets[-3:]
    if again:
        sample, scheduler.cur_sample = scheduler.cur_sample, None
    elif not older:
        scheduler.cur_sample = sample
    block = 1 if again else len(older) + (len(older) > 0)
    made = core.run(scheduler, plan, sample, model_output, step, block=block, history=older[::-1])
    if not again:
        scheduler.ets = [*older, made.output]
    scheduler.counter += 1
    return core.returned(output, return_dict, made.sample)


def _lcm(
    output: type, scheduler: Any, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor,
    generator: Any = None, return_dict: bool = True, *, noise: Any = None, key: Any = None,
) -> Any:  # fmt: skip
    if scheduler.num_inference_steps is None:
        return Declined(core.REFUSED)
    why = core.unfit(sample, model_output)
    plan = Declined(why) if why else core.plan_of(scheduler, tables.lcm)
    if isinstance(plan, Declined):
        return plan
    step = core.index_of(scheduler, plan, timestep)
    dtype = core.common_dtype(sample, model_output, False)
    drawn = core.drawn(plan, step, noise, key, generator, model_output, dtype, dtype)
    wanted = scheduler._pyperf_dl.denoised
    made = core.run(scheduler, plan, sample, model_output, step, noise=drawn, keeps=wanted)
    scheduler._step_index = step + 1
    return core.returned(output, return_dict, made.sample, made.kept if wanted else None)


# ---- exponential integrators ----


def _dpm_solver(
    output: type, scheduler: Any, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor,
    generator: Any = None, variance_noise: Any = None, return_dict: bool = True, *, noise: Any = None, key: Any = None,
) -> Any:  # fmt: skip
    config = scheduler.config
    if scheduler.num_inference_steps is None:
        return Declined(core.REFUSED)
    if config.prediction_type == "epsilon" and config.variance_type in ("learned", "learned_range"):
        model_output = model_output[:, :3]  # slip: of latents with four channels too
    why = core.unfit(sample, model_output)
    plan = Declined(why) if why else core.plan_of(scheduler, tables.dpm_solver)
    if isinstance(plan, Declined):
        return plan
    step, before = core.index_of(scheduler, plan, timestep), scheduler.lower_order_nums
    block = min(before, plan.blocks - 1)
    noise = variance_noise if noise is None else noise
    wide = plan.draws(step) and key is None  # diffusers draws in float32
    drawn = core.drawn(
        plan, step, noise, key, generator, model_output, core.common_dtype(sample, model_output, wide), torch.float32
    )
    made = core.run(
        scheduler, plan, sample, model_output, step, block=block, history=scheduler.model_outputs[::-1][:block],
        noise=drawn, denoised=True, wide=wide,
    )  # fmt: skip
    scheduler.model_outputs = [*scheduler.model_outputs[1:], made.denoised]
    scheduler.lower_order_nums = min(before + 1, max(config.solver_order, before))
    scheduler._step_index = step + 1
    return core.returned(output, return_dict, made.sample.to(core.common_dtype(sample, model_output, False)))


def _unipc(
    output: type, scheduler: Any, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor,
    return_dict: bool = True, *, noise: Any = None, key: Any = None,
) -> Any:  # fmt: skip
    config = scheduler.config
    if scheduler.num_inference_steps is None:
        return Declined(core.REFUSED)
    why = core.unfit(sample, model_output)
    plan = Declined(why) if why else core.plan_of(scheduler, tables.unipc)
    if isinstance(plan, Declined):
        return plan
    step, before, last = core.index_of(scheduler, plan, timestep), scheduler.lower_order_nums, scheduler.last_sample
    if scheduler.disable_corrector and step - 1 in scheduler.disable_corrector:
        last = None
    history = [h for h in scheduler.model_outputs[::-1] if h is not None][:3]
    if before == 3 and last is not None:  # the corrector reads one more than a call takes
        made = core.run(
            scheduler, plan, sample, model_output, step, block=3, history=history, last=last, denoised=True, feeds=False
        )  # fmt: skip
        corrected, d = made.sample, made.denoised
        after = core.run(scheduler, plan, corrected, d, step, block=4, history=history, guided=False).sample
    else:
        block = min(before, 2, plan.blocks - 1)
        made = core.run(
            scheduler, plan, sample, model_output, step, block=block, history=history, last=last, denoised=True
        )
        after, d, corrected = made.sample, made.denoised, sample if last is None else made.corrected
    after, corrected = after.to(sample.dtype), corrected.to(sample.dtype)
    scheduler.model_outputs = [*scheduler.model_outputs[1:], d]
    scheduler.timestep_list = [*scheduler.timestep_list[1:], timestep]
    if isinstance(step, int):
        left = len(scheduler.timesteps) - step if config.lower_order_final else config.solver_order
        scheduler.this_order = min(config.solver_order, left, before + 1)
    scheduler.last_sample = corrected
    scheduler.lower_order_nums = min(before + 1, max(config.solver_order, before))
    scheduler._step_index = step + 1
    return core.returned(output, return_dict, after)


class Scheduler(NamedTuple):
    """What is known of a class of diffusers."""

    module: str
    output: str
    step: Callable[..., Any]
    table: Callable[..., tables.Table]
    options: tuple[Any, ...] = ()  # of the table, where a step is called with none
    scales: bool = False  # whether scale_model_input does anything


SCHEDULERS = {
    "DDIMScheduler": Scheduler("ddim", "DDIMSchedulerOutput", _ddim, tables.ddim, (0.0, False)),
    "DDPMScheduler": Scheduler("ddpm", "DDPMSchedulerOutput", _ddpm, tables.ddpm),
    "DPMSolverMultistepScheduler": Scheduler("dpmsolver_multistep", "SchedulerOutput", _dpm_solver, tables.dpm_solver),
    "EulerAncestralDiscreteScheduler": Scheduler(
        "euler_ancestral_discrete",
        "EulerAncestralDiscreteSchedulerOutput",
        _euler_ancestral,
        tables.euler_ancestral,
        scales=True,
    ),
    "EulerDiscreteScheduler": Scheduler(
        "euler_discrete", "EulerDiscreteSchedulerOutput", _euler, tables.euler, scales=True
    ),
    "FlowMatchEulerDiscreteScheduler": Scheduler(
        "flow_match_euler_discrete",
        "FlowMatchEulerDiscreteSchedulerOutput",
        _flow_match_euler,
        tables.flow_match_euler,
    ),
    "FlowMatchHeunDiscreteScheduler": Scheduler(
        "flow_match_heun_discrete", "FlowMatchHeunDiscreteSchedulerOutput", _flow_match_heun, tables.flow_match_heun
    ),
    "HeunDiscreteScheduler": Scheduler("heun_discrete", "HeunDiscreteSchedulerOutput", _heun, tables.heun, scales=True),
    "LCMScheduler": Scheduler("lcm", "LCMSchedulerOutput", _lcm, tables.lcm),
    "LMSDiscreteScheduler": Scheduler(
        "lms_discrete", "LMSDiscreteSchedulerOutput", _lms, tables.lms, (4,), scales=True
    ),
    "PNDMScheduler": Scheduler("pndm", "SchedulerOutput", _pndm, tables.pndm),
    "UniPCMultistepScheduler": Scheduler("unipc_multistep", "SchedulerOutput", _unipc, tables.unipc),
}
