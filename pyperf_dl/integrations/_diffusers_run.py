"""A step of a scheduler of diffusers as one call of the operator: its table, its row, its noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from .. import _checks
from .. import _sampler_operators as operators
from .._autograd import is_differentiated
from .._sampler_noise import generator_state
from .._sampler_step import checked_key
from ..reference import _sampler_linear as linear
from . import _diffusers_tables as tables
from . import _swap
from ._swap import HALVES, Declined

# ---- what a scheduler remembers ----


class Plan:
    """A table, where it has gone so far."""

    def __init__(self, table: tables.Table) -> None:
        self.table = table
        self.keeps = table.keeps
        self.blocks, self.steps, _ = table.rows.shape
        self.rows = torch.from_numpy(np.ascontiguousarray(table.rows.reshape(-1, table.rows.shape[-1])))
        self.noisy = table.noisy
        self.high = table.clip
        self.threshold = table.threshold
        self.moved: dict[str, torch.Tensor] = {}

    def on(self, device: torch.device) -> torch.Tensor:
        rows = self.moved.get(str(device))
        if rows is None:
            rows = self.moved[str(device)] = self.rows.to(device)
        return rows

    def draws(self, row: Any) -> bool:
        """Whether the peer draws noise there; rows in a tensor: whether it may."""
        if isinstance(self.noisy, bool):
            return self.noisy
        # Compiled code is for any row.
        return True if torch.compiler.is_compiling() or isinstance(row, torch.Tensor) else self.noisy[row]


class State:
    """On a scheduler, as `_pyperf_dl`. Copies of a scheduler make their own plans."""

    def __init__(self, denoised: bool = True, first: torch.Tensor | None = None) -> None:
        self.denoised = denoised
        self.first = first  # of Heun's: what the first evaluation of a step leaves to the second
        self.sources: tuple[Any, ...] = (self,)  # what no scheduler has
        self.plans: dict[Any, Plan | Declined] = {}
        self.builders: dict[Any, Callable[..., tables.Table]] = {}  # of the plans that were asked for
        self.begins: list[int] | None = None  # by index of a timestep, where a loop that it begins does
        self.times: list[float] | None = None
        self.guided: tuple[torch.Tensor, float] | None = None  # for the step that is on
        self.doubled: torch.Tensor | None = None  # what it made for the model

    def __reduce__(self) -> Any:
        return State, (self.denoised, self.first)


_SOURCES = (
    "_internal_dict",
    "timesteps",
    "sigmas",
    "alphas_cumprod",
    "final_alpha_cumprod",
    "num_inference_steps",
    "custom_timesteps",
    "variance_type",
    "predict_x0",
    "solver_p",
)


def state_of(scheduler: Any) -> State:
    """With the plans for the scheduler's numbers as they are now."""
    given = scheduler.__dict__
    state = given.get("_pyperf_dl")
    if state is None:
        state = given["_pyperf_dl"] = State()
    if torch.compiler.is_compiling():
        return state
    for name, before in zip(_SOURCES, state.sources, strict=False):
        if given.get(name) is not before:
            break
    else:
        return state
    state.sources, state.begins, state.times = tuple(given.get(name) for name in _SOURCES), None, None
    state.plans.clear()
    return state


def plan_of(scheduler: Any, build: Callable[..., tables.Table], *options: Any) -> Plan | Declined:
    state = state_of(scheduler)
    plan = state.plans.get((build.__name__, *options))
    return _new_plan(scheduler, state, build, options) if plan is None else plan


@torch.compiler.disable(reason="coefficients are made outside of compiled code: make a step with these options there")
def _new_plan(
    scheduler: Any, state: State, build: Callable[..., tables.Table], options: tuple[Any, ...]
) -> Plan | Declined:
    key = (build.__name__, *options)
    try:
        with np.errstate(all="ignore"):
            plan: Plan | Declined = Plan(build(scheduler, *options))
    except tables.UnsupportedError as why:
        plan = Declined(str(why))
    state.builders[key] = build
    state.plans[key] = plan
    return plan


def prepare(scheduler: Any, usual: tuple[Callable[..., tables.Table], tuple[Any, ...]]) -> None:
    """Makes the plans that a step will ask for, and moves them where the timesteps are."""
    if getattr(scheduler, "timesteps", None) is None or getattr(scheduler, "num_inference_steps", None) is None:
        return
    state = state_of(scheduler)
    for build, options in [usual, *((b, key[1:]) for key, b in list(state.builders.items()))]:
        plan = plan_of(scheduler, build, *options)
        if isinstance(plan, Plan):
            plan.on(scheduler.timesteps.device)
    _begins(scheduler, state)


# ---- where a step is ----


def _host_times(scheduler: Any, state: State) -> list[float]:
    if state.times is None:
        state.times = scheduler.timesteps.tolist()
    return state.times


def _begins(scheduler: Any, state: State) -> list[int]:
    """As diffusers has it: of equal timesteps the second."""
    if state.begins is None:
        places: dict[float, list[int]] = {}
        times = _host_times(scheduler, state)
        for i, t in enumerate(times):
            places.setdefault(t, []).append(i)
        state.begins = [places[t][min(1, len(places[t]) - 1)] for t in times]
    return state.begins


def _place(timesteps: torch.Tensor, timestep: Any) -> int | None:
    """The index of a timestep that is a view of one of the scheduler's."""
    if not isinstance(timestep, torch.Tensor) or timestep.numel() != 1 or timestep.dtype != timesteps.dtype:
        return None
    if timestep.device != timesteps.device or timestep.data_ptr() == 0:
        return None
    if timestep.untyped_storage().data_ptr() != timesteps.untyped_storage().data_ptr():
        return None
    apart = timestep.storage_offset() - timesteps.storage_offset()
    index, rest = divmod(apart, max(timesteps.stride(0), 1))
    return index if rest == 0 and 0 <= index < len(timesteps) else None


def begin(scheduler: Any, timestep: Any) -> None:
    """Sets the scheduler's step index where it has none: an int; in compiled code that cannot know, a tensor."""
    if scheduler._step_index is None:
        if scheduler._begin_index is not None:
            scheduler._step_index = scheduler._begin_index
        elif torch.compiler.is_compiling():
            scheduler._step_index = _looked_up(scheduler.timesteps, timestep)
        else:
            place = _place(scheduler.timesteps, timestep)
            if place is None:
                scheduler._init_step_index(timestep)
            else:
                scheduler._step_index = _begins(scheduler, state_of(scheduler))[place]


def index_of(scheduler: Any, plan: Plan, timestep: Any) -> Any:
    begin(scheduler, timestep)
    step = scheduler._step_index
    if not isinstance(step, torch.Tensor) and step >= plan.steps:
        raise IndexError(f"{type(scheduler).__name__}.step: the schedule has {plan.steps} steps, got one more")
    return step


def _looked_up(timesteps: torch.Tensor, timestep: Any) -> torch.Tensor:
    equal = timesteps == timestep
    second = equal & (equal.cumsum(0) == 2)
    return torch.where(second.any(), second.int().argmax(), equal.int().argmax())


def train_step(scheduler: Any, timestep: Any, on_host: bool = False) -> Any:
    """The timestep as a row: an int, or a tensor where that is unknown; None where it is neither."""
    if isinstance(timestep, torch.Tensor):
        if timestep.numel() != 1 or timestep.is_floating_point() or timestep.is_complex():
            return None
        if torch.compiler.is_compiling():
            return timestep.reshape(()).long()
        place = None if timestep.is_cpu else _place(scheduler.timesteps, timestep)
        if place is None and not timestep.is_cpu and not on_host:
            return timestep.reshape(()).long()
        row = int(timestep if place is None else _host_times(scheduler, state_of(scheduler))[place])
    elif isinstance(timestep, (int, np.integer)) and not isinstance(timestep, bool):
        row = int(timestep)
    else:
        return None
    return row if 0 <= row < len(scheduler.alphas_cumprod) else None


# ---- a step ----


class Made(NamedTuple):
    sample: torch.Tensor
    denoised: torch.Tensor
    kept: torch.Tensor
    corrected: torch.Tensor
    output: torch.Tensor  # guided, where the plan keeps it


def unfit(sample: Any, output: Any) -> str:
    """Why the operator cannot take these; empty where it can."""
    if why := _swap.unfit_for_any(sample, output):
        return why
    if sample.shape != output.shape:
        return "shape"
    return "" if sample.dim() else "no dimensions"


def common_dtype(sample: torch.Tensor, output: torch.Tensor, wide: bool) -> torch.dtype:
    """In which samples are kept. wide: not in 16 bits."""
    dtype = torch.promote_types(sample.dtype, output.dtype)
    return torch.float32 if wide and dtype in HALVES else dtype


class Noise(NamedTuple):
    """A tensor, keys, or a place in the numbers of a generator on CUDA; none of them where a step adds none."""

    tensor: torch.Tensor | None = None
    key: torch.Tensor | None = None
    state: torch.Tensor | None = None


_SILENCE = Noise()


def run(
    scheduler: Any,
    plan: Plan,
    sample: torch.Tensor,
    output: torch.Tensor,
    step: Any,
    *,
    block: int = 0,
    history: Sequence[torch.Tensor] = (),
    last: torch.Tensor | None = None,
    noise: Noise = _SILENCE,
    variance: torch.Tensor | None = None,
    denoised: bool = False,
    keeps: bool = False,
    wide: bool = False,
    guided: bool = True,
    feeds: bool = True,
) -> Made:
    dtype = common_dtype(sample, output, wide)

    def of(t: torch.Tensor | None) -> torch.Tensor | None:
        return None if t is None else t.to(dtype)

    if dtype != torch.float32 or output.dtype not in HALVES:
        output, variance = output.to(dtype), of(variance)
    sample, first = sample.to(dtype), block * plan.steps
    table = plan.on(sample.device)
    row, rows = (step + first, None) if not isinstance(step, torch.Tensor) else (0, (step + first).to(sample.device))
    h = [of(history[k]) if k < len(history) else None for k in range(3)]
    uncond, scale, copies = None, 1.0, 0
    state = scheduler._pyperf_dl
    if state.guided is not None and guided:
        uncond, scale = state.guided
        uncond = uncond[:, : output.shape[1]].to(output.dtype)  # what else there is, is the variance's
        copies = 2 if feeds and not _is_last(scheduler, plan, step) else 0
        keeps = keeps or plan.keeps == "output"
    tensors = (sample, output, uncond, variance, *h, of(last), of(noise.tensor))
    call, adjust = operators.step, None
    if plan.threshold is not None:
        adjusting = operators.adjustments
        if any(t is not None and is_differentiated(t) for t in tensors):
            call, adjusting = linear.sampler_step, linear.sampler_adjustments
        adjust = adjusting(sample, output, uncond, table, rows, None, row, scale, 0.0, *plan.threshold, 1)
    made = call(
        *tensors, table, rows, None, noise.key, noise.state, adjust,
        row, scale, -plan.high, plan.high, 0, denoised, keeps, copies, 1,
    )  # fmt: skip
    if copies:
        state.doubled = made[4].flatten(0, 1)
    return Made(*made[:4], made[2] if uncond is not None and plan.keeps == "output" else output)


def _is_last(scheduler: Any, plan: Plan, step: Any) -> bool:
    if isinstance(step, torch.Tensor):
        return False
    if plan.steps == scheduler.config.num_train_timesteps:
        return step == _host_times(scheduler, scheduler._pyperf_dl)[-1]
    return step == plan.steps - 1


def drawn(
    plan: Plan,
    step: Any,
    noise: Any,
    key: Any,
    generator: Any,
    like: torch.Tensor,
    kept: torch.dtype,
    dtype: torch.dtype | None = None,
) -> Noise:
    """What was given, or numbers as diffusers draws them: in `dtype`, which is that of `like` where it is None, for
    samples that are kept in another."""
    if not plan.draws(step):
        return _SILENCE
    if noise is not None:
        if key is not None:
            raise ValueError("step: noise and key exclude each other, got both")
        if not isinstance(noise, torch.Tensor) or noise.shape != like.shape:
            raise ValueError(
                f"step: noise must be a tensor of the sample's shape {list(like.shape)}, got {_checks.described(noise)}"
            )
        return Noise(noise.to(like.device))
    if key is not None:
        return Noise(key=checked_key("step", key.to(like.device) if isinstance(key, torch.Tensor) else key, like))
    dtype = like.dtype if dtype is None else dtype
    if dtype == kept and like.is_cuda and getattr(generator, "device", like.device) == like.device:
        drawn = generator_state(like, generator)
        if drawn is not None:
            return Noise(state=drawn[0])
    return Noise(_randn(like.shape, generator=generator, device=like.device, dtype=dtype))


def _randn(shape: torch.Size, **how: Any) -> torch.Tensor:
    from diffusers.utils.torch_utils import randn_tensor

    return randn_tensor(shape, **how)


def returned(output: type, return_dict: bool, *tensors: torch.Tensor | None) -> Any:
    return output(*tensors) if return_dict else tensors


REFUSED = "what diffusers refuses, or warns of"


def is_unscaled(scheduler: Any) -> bool:
    return not (scheduler.is_scale_input_called or torch.compiler.is_compiling())


def is_integer(timestep: Any) -> bool:
    """Which some schedulers refuse."""
    return isinstance(timestep, int) or (
        isinstance(timestep, torch.Tensor) and timestep.dtype in (torch.int32, torch.int64)
    )
