"""Schedulers of diffusers 0.42 whose `step` is one pass of pyperf_dl.

    from pyperf_dl.integrations import diffusers

    pipeline.scheduler = diffusers.fuse(pipeline.scheduler)     # or diffusers.fuse(pipeline)
    diffusers.enable()                                          # or: from now on, every scheduler in the process

Samples are those of diffusers within its own rounding, from the same random numbers. Nothing is read back from the
device in a step. What cannot be taken over goes to diffusers as before, and :func:`report` says why.
"""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from .. import _sampler_operators as operators
from .._autograd import is_differentiated
from .._sampler_noise import generator_state
from ..reference import _sampler_linear as linear
from . import _diffusers_guidance as guidance_of
from . import _diffusers_tables as tables
from . import _swap
from ._swap import DTYPES, HALVES, Declined, Report, Settings, Takeover

__all__ = ["Report", "disable", "enable", "fuse", "report"]

_peer = _swap.Peer("diffusers", "diffusers", "0.42", "0.42")
disable, report = _peer.disable, _peer.report

_MODULE = "diffusers.schedulers.scheduling_"


def enable() -> Takeover:
    """Sends the steps of the schedulers of diffusers to pyperf_dl.

    Taken over are the steps of DDIM, DDPM, DPMSolverMultistep, EulerAncestralDiscrete, EulerDiscrete,
    FlowMatchEulerDiscrete, FlowMatchHeunDiscrete, HeunDiscrete, LCM, LMSDiscrete, PNDM and UniPCMultistep. A subclass
    with a step of its own stays as it is.

    Returns:
        A context manager: ``with enable():`` ends with the block. Takeovers nest, and hold for all threads.

    Raises:
        ValueError: a version of diffusers other than 0.42.
        ImportError: diffusers is not installed.

    >>> from diffusers import DDIMScheduler
    >>> from pyperf_dl.integrations import diffusers
    >>> before = diffusers.report(reset=True)
    >>> scheduler = DDIMScheduler()
    >>> scheduler.set_timesteps(4)
    >>> with diffusers.enable():
    ...     x = scheduler.step(torch.zeros(1, 4, 8, 8), scheduler.timesteps[0], torch.zeros(1, 4, 8, 8)).prev_sample
    >>> diffusers.report()
    Report(taken=1, fell_back={})
    """
    return _peer.enable(Settings())


def fuse(scheduler: Any, *, denoised: bool = True, guidance: bool = False) -> Any:
    """A scheduler like this one, with the same numbers and state, whose step is pyperf_dl's.

    Its class is a subclass of the scheduler's, with its name: it saves, loads and converts as that does, and what was
    saved needs no pyperf_dl. Its ``step`` takes ``noise=`` too, a tensor, or ``key=``, an int or an int64 tensor with
    one a sample, for noise that depends on that alone. Steps without noise, or with one of these, can be compiled with
    ``fullgraph=True``; where neither ``set_begin_index`` nor a step outside the compiled code has said where a loop
    begins, the timestep is looked up on the device.

    Args:
        scheduler: a scheduler of diffusers, or a pipeline, whose own is replaced.
        denoised: False to leave out ``pred_original_sample`` where the output has it, which saves a write.
        guidance: True, with a pipeline, for a step that takes the classifier-free guidance in, and makes the model's
            next input as well. The outputs of ``pipeline.unet``, or ``.transformer``, then put off
            ``uncond + scale * (cond - uncond)``, with ``uncond, cond = output.chunk(2)`` and a number as scale, and the
            step's sample has ``scale_model_input(torch.cat([sample] * 2))`` ready; whatever else the pipeline does
            to them is done as ever.

    Returns:
        The new scheduler; the same object where pyperf_dl has no such class, which :func:`report` counts.

    Raises:
        ValueError: a version of diffusers other than 0.42.
        ImportError: diffusers is not installed.

    >>> import diffusers, pyperf_dl.integrations.diffusers
    >>> fused = pyperf_dl.integrations.diffusers.fuse(diffusers.DDIMScheduler())
    >>> isinstance(fused, diffusers.DDIMScheduler), type(fused).__name__
    (True, 'DDIMScheduler')
    """
    _peer.check_version()
    pipeline = None if hasattr(scheduler, "step") else scheduler
    if pipeline is not None:
        scheduler = pipeline.scheduler
    elif guidance:
        raise ValueError(f"fuse: guidance is for a pipeline, got a {type(scheduler).__name__}")
    kind = type(scheduler)
    if getattr(kind, "_pyperf_dl_of", None) is None:
        if kind not in _takeovers():
            _peer.count(f"{kind.__name__} is not taken over")
            return scheduler
        state = {name: copy.copy(v) if type(v) is list else v for name, v in vars(scheduler).items()}
        scheduler = _restored(kind, {**state, "_pyperf_dl": _State(denoised)})
    if pipeline is not None:
        pipeline.scheduler = scheduler
    if guidance:
        _puts_off(pipeline)
    return scheduler


def _puts_off(pipeline: Any) -> None:
    models = [m for m in (getattr(pipeline, name, None) for name in ("unet", "transformer")) if m is not None]
    if not models:
        raise ValueError(
            f"fuse: guidance is for a pipeline with a unet or a transformer, got {type(pipeline).__name__}"
        )
    for model in models:
        if not any(hook is _noted for hook in model._forward_hooks.values()):
            model.register_forward_hook(_noted)


def _noted(model: Any, args: Any, output: Any) -> Any:
    if torch.is_tensor(output):
        return guidance_of.outputs(output)
    if type(output) is tuple and output and torch.is_tensor(output[0]):
        return guidance_of.outputs(output[0]), *output[1:]
    if torch.is_tensor(getattr(output, "sample", None)):
        output.sample = guidance_of.outputs(output.sample)
    return output


# ---- subclasses ----


@functools.cache
def _takeovers() -> dict[type, Callable[..., Any]]:
    """What makes a step of each class, or declines."""
    found = {}
    for module, name, output, take in _CLASSES:
        loaded = importlib.import_module(_MODULE + module)
        found[getattr(loaded, name)] = functools.partial(take, getattr(loaded, output))
    return found


@functools.cache
def _subclass(kind: type) -> type:
    take = _takeovers()[kind]
    scaling = getattr(kind, "scale_model_input", None)
    scales = kind.__name__ in _SCALE

    def of_put_off(self: Any, *args: Any, **kwargs: Any) -> Any:
        """The step of tensors of _diffusers_guidance.py."""
        output = kwargs.pop("model_output") if "model_output" in kwargs else args[0]
        args = tuple(guidance_of.plain(a) for a in args[len(args) > 0 and args[0] is output :])
        kwargs = {name: guidance_of.plain(v) for name, v in kwargs.items()}
        if type(output) is not guidance_of.Guided:
            return step(self, guidance_of.plain(output), *args, **kwargs)
        uncond, cond = output.outputs.chunk(2)
        state = self._pyperf_dl
        state.guided = uncond, output.scale
        try:
            got = take(self, cond, *args, **kwargs)
        finally:
            state.guided = None
        if type(got) is Declined:
            return step(self, output.value(), *args, **kwargs)
        _peer.count()
        doubled, state.doubled = state.doubled, None
        if doubled is None:
            return got
        latents = guidance_of.latents(got[0], doubled, scales)
        if isinstance(got, tuple):
            return latents, *got[1:]
        got.prev_sample = latents
        return got

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        for given in (*args, *kwargs.values()):
            if isinstance(given, guidance_of.Later):
                return of_put_off(self, *args, **kwargs)
        got = take(self, *args, **kwargs)
        if type(got) is not Declined:
            _peer.count()
            return got
        given = [name for name in ("noise", "key") if kwargs.pop(name, None) is not None]
        if given:
            raise ValueError(f"{kind.__name__}.step: {given[0]} is for steps of pyperf_dl, not for: {got.why}")
        _peer.count(got.why)
        with _PeersOwn():
            return kind.step(self, *args, **kwargs)

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        kind.__init__(self, *args, **kwargs)
        self._pyperf_dl = _State()

    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
        kind.set_timesteps(self, *args, **kwargs)
        if "_pyperf_dl" in self.__dict__:  # some constructors call this
            _prepare(self)

    def scale_model_input(self: Any, sample: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        if type(sample) is guidance_of.Doubled:
            return sample.as_subclass(torch.Tensor)
        if scales and (args or "timestep" in kwargs):
            _begin(self, args[0] if args else kwargs["timestep"])
        return kind.scale_model_input(self, sample, *args, **kwargs)

    def reduced(self: Any, protocol: Any = None) -> Any:
        return _restored, (kind, self.__dict__.copy())

    signature = inspect.signature(kind.step)
    extra = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=None) for n in ("noise", "key")]
    step = functools.wraps(kind.step)(step)
    step.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *extra])  # type: ignore
    methods = {
        "__init__": functools.wraps(kind.__init__)(init),
        "step": step,
        "set_timesteps": functools.wraps(kind.set_timesteps)(set_timesteps),
        **({"scale_model_input": functools.wraps(scaling)(scale_model_input)} if scaling else {}),
        "__reduce_ex__": reduced,
        "_pyperf_dl_of": kind,
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
    }
    return type(kind.__name__, (kind,), methods)


def _restored(kind: type, state: dict[str, Any]) -> Any:
    fused = object.__new__(_subclass(kind))
    fused.__dict__.update(state)
    return fused


class _PeersOwn:
    """Nothing is taken over inside."""

    def __enter__(self) -> None:
        if not torch.compiler.is_compiling():
            self.before = getattr(_peer._inside, "theirs", False)
            _peer._inside.theirs = True

    def __exit__(self, *_: Any) -> None:
        if not torch.compiler.is_compiling():
            _peer._inside.theirs = self.before


# ---- what a scheduler remembers ----


class _Plan:
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


class _State:
    """On a scheduler, as `_pyperf_dl`. Copies of a scheduler make their own plans."""

    def __init__(self, denoised: bool = True, first: torch.Tensor | None = None) -> None:
        self.denoised = denoised
        self.first = first  # of Heun's: what the first evaluation of a step leaves to the second
        self.sources: tuple[Any, ...] = (self,)  # what no scheduler has
        self.plans: dict[Any, _Plan | Declined] = {}
        self.builders: dict[Any, Callable[..., tables.Table]] = {}  # of the plans that were asked for
        self.begins: list[int] | None = None  # by index of a timestep, where a loop that it begins does
        self.times: list[float] | None = None
        self.guided: tuple[torch.Tensor, float] | None = None  # for the step that is on
        self.doubled: torch.Tensor | None = None  # what it made for the model

    def __reduce__(self) -> Any:
        return _State, (self.denoised, self.first)


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


def _state(scheduler: Any) -> _State:
    """With the plans for the scheduler's numbers as they are now."""
    given = scheduler.__dict__
    state = given.get("_pyperf_dl")
    if state is None:
        state = given["_pyperf_dl"] = _State()
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


def _plan(scheduler: Any, build: Callable[..., tables.Table], *options: Any) -> _Plan | Declined:
    state = _state(scheduler)
    plan = state.plans.get((build.__name__, *options))
    return _new_plan(scheduler, state, build, options) if plan is None else plan


@torch.compiler.disable(reason="coefficients are made outside of compiled code: make a step with these options there")
def _new_plan(
    scheduler: Any, state: _State, build: Callable[..., tables.Table], options: tuple[Any, ...]
) -> _Plan | Declined:
    key = (build.__name__, *options)
    try:
        with np.errstate(all="ignore"):
            plan: _Plan | Declined = _Plan(build(scheduler, *options))
    except tables.UnsupportedError as why:
        plan = Declined(str(why))
    state.builders[key] = build
    state.plans[key] = plan
    return plan


def _prepare(scheduler: Any) -> None:
    """Makes the plans that a step will ask for, and moves them where the timesteps are."""
    if getattr(scheduler, "timesteps", None) is None or getattr(scheduler, "num_inference_steps", None) is None:
        return
    state = _state(scheduler)
    usual = _USUAL[type(scheduler).__name__]
    for build, options in [usual, *((b, key[1:]) for key, b in list(state.builders.items()))]:
        plan = _plan(scheduler, build, *options)
        if isinstance(plan, _Plan):
            plan.on(scheduler.timesteps.device)
    _begins(scheduler, state)


# ---- where a step is ----


def _host_times(scheduler: Any, state: _State) -> list[float]:
    if state.times is None:
        state.times = scheduler.timesteps.tolist()
    return state.times


def _begins(scheduler: Any, state: _State) -> list[int]:
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


def _begin(scheduler: Any, timestep: Any) -> None:
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
                scheduler._step_index = _begins(scheduler, _state(scheduler))[place]


def _index(scheduler: Any, plan: _Plan, timestep: Any) -> Any:
    _begin(scheduler, timestep)
    step = scheduler._step_index
    if not isinstance(step, torch.Tensor) and step >= plan.steps:
        raise IndexError(f"{type(scheduler).__name__}.step: the schedule has {plan.steps} steps, got one more")
    return step


def _looked_up(timesteps: torch.Tensor, timestep: Any) -> torch.Tensor:
    equal = timesteps == timestep
    second = equal & (equal.cumsum(0) == 2)
    return torch.where(second.any(), second.int().argmax(), equal.int().argmax())


def _train_step(scheduler: Any, timestep: Any, on_host: bool = False) -> Any:
    """The timestep as a row: an int, or a tensor where that is unknown; None where it is neither."""
    if isinstance(timestep, torch.Tensor):
        if timestep.numel() != 1 or timestep.is_floating_point() or timestep.is_complex():
            return None
        if torch.compiler.is_compiling():
            return timestep.reshape(()).long()
        place = None if timestep.is_cpu else _place(scheduler.timesteps, timestep)
        if place is None and not timestep.is_cpu and not on_host:
            return timestep.reshape(()).long()
        row = int(timestep if place is None else _host_times(scheduler, _state(scheduler))[place])
    elif isinstance(timestep, (int, np.integer)) and not isinstance(timestep, bool):
        row = int(timestep)
    else:
        return None
    return row if 0 <= row < len(scheduler.alphas_cumprod) else None


# ---- a step ----


class _Made(NamedTuple):
    sample: torch.Tensor
    denoised: torch.Tensor
    kept: torch.Tensor
    corrected: torch.Tensor
    output: torch.Tensor  # guided, where the plan keeps it


def _unfit(sample: Any, output: Any) -> str:
    """Why the operator cannot take these; empty where it can."""
    tensors = (sample, output)
    if torch.jit.is_tracing():
        return "torch.jit.trace"
    if not all(_swap._plain(t) for t in tensors):
        return "not a plain tensor"
    if any(t.dtype not in DTYPES for t in tensors):
        return "dtype"
    if any(t.layout != torch.strided or t.is_nested for t in tensors):
        return "layout"
    if sample.device != output.device:
        return "device"
    if sample.shape != output.shape:
        return "shape"
    if sample.dim() == 0:
        return "no dimensions"
    if not _swap._kernels_for(sample.device.type):
        return "no kernels for the device"
    return ""


def _common(sample: torch.Tensor, output: torch.Tensor, wide: bool) -> torch.dtype:
    """In which samples are kept. wide: not in 16 bits."""
    dtype = torch.promote_types(sample.dtype, output.dtype)
    return torch.float32 if wide and dtype in HALVES else dtype


class _Noise(NamedTuple):
    """A tensor, keys, or a place in the numbers of a generator on CUDA; none of them where a step adds none."""

    tensor: torch.Tensor | None = None
    key: torch.Tensor | None = None
    state: torch.Tensor | None = None


_SILENCE = _Noise()


def _run(
    scheduler: Any,
    plan: _Plan,
    sample: torch.Tensor,
    output: torch.Tensor,
    step: Any,
    *,
    block: int = 0,
    history: Sequence[torch.Tensor] = (),
    last: torch.Tensor | None = None,
    noise: _Noise = _SILENCE,
    variance: torch.Tensor | None = None,
    denoised: bool = False,
    keeps: bool = False,
    wide: bool = False,
    guided: bool = True,
    feeds: bool = True,
) -> _Made:
    dtype = _common(sample, output, wide)

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
    return _Made(*made[:4], made[2] if uncond is not None and plan.keeps == "output" else output)


def _is_last(scheduler: Any, plan: _Plan, step: Any) -> bool:
    if isinstance(step, torch.Tensor):
        return False
    if plan.steps == scheduler.config.num_train_timesteps:
        return step == _host_times(scheduler, scheduler._pyperf_dl)[-1]
    return step == plan.steps - 1


def _drawn(
    plan: _Plan,
    step: Any,
    noise: Any,
    key: Any,
    generator: Any,
    like: torch.Tensor,
    dtype: torch.dtype,
    kept: torch.dtype,
) -> _Noise:
    """What was given, or numbers as diffusers draws them: in `dtype`, for samples that are kept in another."""
    if not plan.draws(step):
        return _SILENCE
    if noise is not None:
        if noise.shape != like.shape:
            raise ValueError(
                f"step: noise must have the shape {list(like.shape)} of the sample, got {list(noise.shape)}"
            )
        return _Noise(noise.to(like.device))
    if key is not None:
        if not isinstance(key, torch.Tensor):
            return _Noise(key=torch.full((1,), key, dtype=torch.int64, device=like.device))
        return _Noise(key=key.to(like.device, torch.int64).reshape(-1))
    if dtype == kept and like.is_cuda and getattr(generator, "device", like.device) == like.device:
        drawn = generator_state(like, generator)
        if drawn is not None:
            return _Noise(state=drawn[0])
    return _Noise(_randn(like.shape, generator=generator, device=like.device, dtype=dtype))


def _randn(shape: torch.Size, **how: Any) -> torch.Tensor:
    from diffusers.utils.torch_utils import randn_tensor

    return randn_tensor(shape, **how)


def _returned(output: type, return_dict: bool, *tensors: torch.Tensor | None) -> Any:
    return output(*tensors) if return_dict else tensors


_REFUSED = "what diffusers refuses, or warns of"


def _is_unscaled(scheduler: Any) -> bool:
    return not (scheduler.is_scale_input_called or torch.compiler.is_compiling())


def _integer_timestep(timestep: Any) -> bool:
    """Which some schedulers refuse."""
    return isinstance(timestep, int) or (
        isinstance(timestep, torch.Tensor) and timestep.dtype in (torch.int32, torch.int64)
    )


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
    why = _unfit(sample, model_output)
    if why or _integer_timestep(timestep) or _is_unscaled(scheduler):
        return Declined(why or _REFUSED)
    plan = _plan(scheduler, build)
    if isinstance(plan, Declined):
        return plan
    step = _index(scheduler, plan, timestep)
    denoised = scheduler._pyperf_dl.denoised
    of_model = scheduler.config.prediction_type in ("sample", "original_sample")
    of_guided = of_model and scheduler._pyperf_dl.guided is not None
    wide = denoised and not of_model
    made = _run(
        scheduler, plan, sample, model_output, step, denoised=wide or (denoised and of_guided), wide=wide,
        noise=_drawn(
            plan, step, noise, key, generator, model_output, model_output.dtype, _common(sample, model_output, wide)
        ),
    )  # fmt: skip
    scheduler._step_index = step + 1
    d = None if not denoised else made.denoised if of_guided or not of_model else model_output
    return _returned(output, return_dict, made.sample.to(model_output.dtype), d)


def _heun(
    output: type, scheduler: Any, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor,
    return_dict: bool = True, *, noise: Any = None, key: Any = None,
) -> Any:  # fmt: skip
    why = _unfit(sample, model_output)
    plan = Declined(why) if why else _plan(scheduler, tables.heun)
    if isinstance(plan, Declined):
        return _handed_back(scheduler, plan)
    step = _index(scheduler, plan, timestep)
    begins = scheduler.dt is None
    if not begins and scheduler._pyperf_dl.first is None:
        return Declined("the second half of a step that diffusers began")
    history = () if begins else (scheduler.sample, scheduler._pyperf_dl.first)
    wanted = scheduler._pyperf_dl.denoised
    made = _run(
        scheduler, plan, sample, model_output, step, block=int(not begins), history=history, denoised=wanted or begins
    )
    _between(scheduler, begins, sample, made.denoised)
    scheduler._step_index = step + 1
    return _returned(output, return_dict, made.sample, made.denoised if wanted else None)


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
    why = _unfit(sample, model_output)
    if why or _is_unscaled(scheduler):
        return Declined(why or _REFUSED)
    plan = _plan(scheduler, tables.lms, order)
    if isinstance(plan, Declined):
        return plan
    step = _index(scheduler, plan, timestep)
    older = scheduler.derivatives[::-1][: order - 1]
    wanted = scheduler._pyperf_dl.denoised
    made = _run(
        scheduler, plan, sample, model_output, step, block=len(older), history=older, denoised=wanted,
        keeps=plan.keeps == "combination",
    )  # fmt: skip
    slope = made.kept if plan.keeps == "combination" else made.output.to(made.sample.dtype)
    scheduler.derivatives = [*scheduler.derivatives, slope][-order:]
    scheduler._step_index = step + 1
    return _returned(output, return_dict, made.sample, made.denoised if wanted else None)


# ---- flows ----


def _flow_match_euler(
    output: type, scheduler: Any, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor,
    s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0, generator: Any = None,
    per_token_timesteps: Any = None, return_dict: bool = True, *, noise: Any = None, key: Any = None,
) -> Any:  # fmt: skip
    if per_token_timesteps is not None:
        return Declined("per_token_timesteps")
    why = _unfit(sample, model_output)
    if why or _integer_timestep(timestep):
        return Declined(why or _REFUSED)
    plan = _plan(scheduler, tables.flow_match_euler)
    if isinstance(plan, Declined):
        return plan
    step = _index(scheduler, plan, timestep)
    dtype, wide = _common(sample, sample, True), plan.draws(step) and key is None
    drawn = _drawn(plan, step, noise, key, generator, sample, dtype, _common(sample, model_output, wide))
    made = _run(scheduler, plan, sample, model_output, step, noise=drawn, wide=wide)
    scheduler._step_index = step + 1
    return _returned(output, return_dict, made.sample.to(model_output.dtype))


def _flow_match_heun(
    output: type, scheduler: Any, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor,
    s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0, generator: Any = None,
    return_dict: bool = True, *, noise: Any = None, key: Any = None,
) -> Any:  # fmt: skip
    why = "s_churn" if s_churn != 0 else _unfit(sample, model_output)
    if not why and _integer_timestep(timestep):
        why = _REFUSED
    plan = Declined(why) if why else _plan(scheduler, tables.flow_match_heun)
    if isinstance(plan, Declined):
        return _handed_back(scheduler, plan)
    step = _index(scheduler, plan, timestep)
    begins = scheduler.dt is None
    if not begins and scheduler._pyperf_dl.first is None:
        return Declined("the second half of a step that diffusers began")
    history = () if begins else (scheduler.sample, scheduler._pyperf_dl.first)
    made = _run(scheduler, plan, sample, model_output, step, block=int(not begins), history=history)
    _between(scheduler, begins, sample, made.output)
    scheduler._step_index = step + 1
    return _returned(output, return_dict, made.sample.to(model_output.dtype))


# ---- schedulers of alphas ----


def _ddim(
    output: type, scheduler: Any, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, eta: float = 0.0,
    use_clipped_model_output: bool = False, generator: Any = None, variance_noise: Any = None,
    return_dict: bool = True, *, noise: Any = None, key: Any = None,
) -> Any:  # fmt: skip
    if scheduler.num_inference_steps is None or not isinstance(eta, (int, float)):
        return Declined(_REFUSED if scheduler.num_inference_steps is None else "eta")
    if variance_noise is not None and generator is not None:
        return Declined(_REFUSED)
    why = _unfit(sample, model_output)
    plan = Declined(why) if why else _plan(scheduler, tables.ddim, float(eta), bool(use_clipped_model_output))
    if isinstance(plan, Declined):
        return plan
    step = _train_step(scheduler, timestep)
    if step is None:
        return Declined("a timestep for each sample, or out of range")
    noise = variance_noise if noise is None else noise
    drawn = _drawn(
        plan, step, noise, key, generator, model_output, model_output.dtype, _common(sample, model_output, False)
    )
    wanted = scheduler._pyperf_dl.denoised
    made = _run(scheduler, plan, sample, model_output, step, noise=drawn, denoised=wanted)
    return _returned(output, return_dict, made.sample, made.denoised if wanted else None)


def _ddpm(
    output: type, scheduler: Any, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor,
    generator: Any = None, return_dict: bool = True, *, noise: Any = None, key: Any = None,
) -> Any:  # fmt: skip
    variance = None
    if scheduler.variance_type in ("learned", "learned_range"):
        if model_output.dim() < 2 or model_output.shape[1] != 2 * sample.shape[1]:
            return Declined("no learned variance")
        model_output, variance = model_output.split(sample.shape[1], 1)
    why = _unfit(sample, model_output)
    plan = Declined(why) if why else _plan(scheduler, tables.ddpm)
    if isinstance(plan, Declined):
        return plan
    step = _train_step(scheduler, timestep, on_host=True)  # diffusers draws no noise at 0
    if step is None:
        return Declined("a timestep for each sample, or out of range")
    drawn = _drawn(
        plan, step, noise, key, generator, model_output, model_output.dtype, _common(sample, model_output, False)
    )
    wanted = scheduler._pyperf_dl.denoised
    made = _run(scheduler, plan, sample, model_output, step, noise=drawn, variance=variance, denoised=wanted)
    return _returned(output, return_dict, made.sample, made.denoised if wanted else None)


def _pndm(
    output: type, scheduler: Any, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor,
    return_dict: bool = True, *, noise: Any = None, key: Any = None,
) -> Any:  # fmt: skip
    if scheduler.num_inference_steps is None:
        return Declined(_REFUSED)
    if not scheduler.config.skip_prk_steps and (
        scheduler.counter < len(scheduler.prk_timesteps) or len(scheduler.ets) < 3
    ):
        return Declined("Runge-Kutta steps")
    why = _unfit(sample, model_output)
    plan = Declined(why) if why else _plan(scheduler, tables.pndm)
    if isinstance(plan, Declined):
        return plan
    step = _train_step(scheduler, timestep)
    if step is None:
        return Declined("a timestep for each sample, or out of range")
    again, older = scheduler.counter == 1, scheduler.ets[-3:]
    if again:
        sample, scheduler.cur_sample = scheduler.cur_sample, None
    elif not older:
        scheduler.cur_sample = sample
    block = 1 if again else len(older) + (len(older) > 0)
    made = _run(scheduler, plan, sample, model_output, step, block=block, history=older[::-1])
    if not again:
        scheduler.ets = [*older, made.output]
    scheduler.counter += 1
    return _returned(output, return_dict, made.sample)


def _lcm(
    output: type, scheduler: Any, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor,
    generator: Any = None, return_dict: bool = True, *, noise: Any = None, key: Any = None,
) -> Any:  # fmt: skip
    if scheduler.num_inference_steps is None:
        return Declined(_REFUSED)
    why = _unfit(sample, model_output)
    plan = Declined(why) if why else _plan(scheduler, tables.lcm)
    if isinstance(plan, Declined):
        return plan
    step = _index(scheduler, plan, timestep)
    dtype = _common(sample, model_output, False)
    drawn = _drawn(plan, step, noise, key, generator, model_output, dtype, dtype)
    wanted = scheduler._pyperf_dl.denoised
    made = _run(scheduler, plan, sample, model_output, step, noise=drawn, keeps=wanted)
    scheduler._step_index = step + 1
    return _returned(output, return_dict, made.sample, made.kept if wanted else None)


# ---- exponential integrators ----


def _dpm_solver(
    output: type, scheduler: Any, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor,
    generator: Any = None, variance_noise: Any = None, return_dict: bool = True, *, noise: Any = None, key: Any = None,
) -> Any:  # fmt: skip
    config = scheduler.config
    if scheduler.num_inference_steps is None:
        return Declined(_REFUSED)
    if config.prediction_type == "epsilon" and config.variance_type in ("learned", "learned_range"):
        model_output = model_output[:, :3]  # slip: of latents with four channels too
    why = _unfit(sample, model_output)
    plan = Declined(why) if why else _plan(scheduler, tables.dpm_solver)
    if isinstance(plan, Declined):
        return plan
    step, before = _index(scheduler, plan, timestep), scheduler.lower_order_nums
    block = min(before, plan.blocks - 1)
    noise = variance_noise if noise is None else noise
    wide = plan.draws(step) and key is None  # diffusers draws in float32
    drawn = _drawn(plan, step, noise, key, generator, model_output, torch.float32, _common(sample, model_output, wide))
    made = _run(
        scheduler, plan, sample, model_output, step, block=block, history=scheduler.model_outputs[::-1][:block],
        noise=drawn, denoised=True, wide=wide,
    )  # fmt: skip
    scheduler.model_outputs = [*scheduler.model_outputs[1:], made.denoised]
    scheduler.lower_order_nums = min(before + 1, max(config.solver_order, before))
    scheduler._step_index = step + 1
    return _returned(output, return_dict, made.sample.to(_common(sample, model_output, False)))


def _unipc(
    output: type, scheduler: Any, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor,
    return_dict: bool = True, *, noise: Any = None, key: Any = None,
) -> Any:  # fmt: skip
    config = scheduler.config
    if scheduler.num_inference_steps is None:
        return Declined(_REFUSED)
    why = _unfit(sample, model_output)
    plan = Declined(why) if why else _plan(scheduler, tables.unipc)
    if isinstance(plan, Declined):
        return plan
    step, before, last = _index(scheduler, plan, timestep), scheduler.lower_order_nums, scheduler.last_sample
    if scheduler.disable_corrector and step - 1 in scheduler.disable_corrector:
        last = None
    history = [h for h in scheduler.model_outputs[::-1] if h is not None][:3]
    if before == 3 and last is not None:  # the corrector reads one more than a call takes
        made = _run(
            scheduler, plan, sample, model_output, step, block=3, history=history, last=last, denoised=True, feeds=False
        )  # fmt: skip
        corrected, d = made.sample, made.denoised
        after = _run(scheduler, plan, corrected, d, step, block=4, history=history, guided=False).sample
    else:
        block = min(before, 2, plan.blocks - 1)
        made = _run(scheduler, plan, sample, model_output, step, block=block, history=history, last=last, denoised=True)
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
    return _returned(output, return_dict, after)


_CLASSES = (
    ("ddim", "DDIMScheduler", "DDIMSchedulerOutput", _ddim),
    ("ddpm", "DDPMScheduler", "DDPMSchedulerOutput", _ddpm),
    ("dpmsolver_multistep", "DPMSolverMultistepScheduler", "SchedulerOutput", _dpm_solver),
    (
        "euler_ancestral_discrete",
        "EulerAncestralDiscreteScheduler",
        "EulerAncestralDiscreteSchedulerOutput",
        _euler_ancestral,
    ),
    ("euler_discrete", "EulerDiscreteScheduler", "EulerDiscreteSchedulerOutput", _euler),
    (
        "flow_match_euler_discrete",
        "FlowMatchEulerDiscreteScheduler",
        "FlowMatchEulerDiscreteSchedulerOutput",
        _flow_match_euler,
    ),
    (
        "flow_match_heun_discrete",
        "FlowMatchHeunDiscreteScheduler",
        "FlowMatchHeunDiscreteSchedulerOutput",
        _flow_match_heun,
    ),
    ("heun_discrete", "HeunDiscreteScheduler", "HeunDiscreteSchedulerOutput", _heun),
    ("lcm", "LCMScheduler", "LCMSchedulerOutput", _lcm),
    ("lms_discrete", "LMSDiscreteScheduler", "LMSDiscreteSchedulerOutput", _lms),
    ("pndm", "PNDMScheduler", "SchedulerOutput", _pndm),
    ("unipc_multistep", "UniPCMultistepScheduler", "SchedulerOutput", _unipc),
)

_SCALE = ("EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler", "LMSDiscreteScheduler")

_USUAL: dict[str, tuple[Callable[..., tables.Table], tuple[Any, ...]]] = {
    "DDIMScheduler": (tables.ddim, (0.0, False)),
    "DDPMScheduler": (tables.ddpm, ()),
    "DPMSolverMultistepScheduler": (tables.dpm_solver, ()),
    "EulerAncestralDiscreteScheduler": (tables.euler_ancestral, ()),
    "EulerDiscreteScheduler": (tables.euler, ()),
    "FlowMatchEulerDiscreteScheduler": (tables.flow_match_euler, ()),
    "FlowMatchHeunDiscreteScheduler": (tables.flow_match_heun, ()),
    "HeunDiscreteScheduler": (tables.heun, ()),
    "LCMScheduler": (tables.lcm, ()),
    "LMSDiscreteScheduler": (tables.lms, (4,)),
    "PNDMScheduler": (tables.pndm, ()),
    "UniPCMultistepScheduler": (tables.unipc, ()),
}


def _stands_in(name: str) -> Callable[..., Any]:
    def stand_in(settings: Settings, scheduler: Any, *args: Any, **kwargs: Any) -> Any:
        take = _takeovers().get(type(scheduler))
        if take is None or type(scheduler).__name__ != name:
            return Declined("a subclass")
        return take(scheduler, *args, **kwargs)

    return stand_in


for _module, _name, _, _take in _CLASSES:
    _peer.replaces(_MODULE + _module, f"{_name}.step")(_stands_in(_name))
