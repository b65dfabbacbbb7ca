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
from collections.abc import Callable
from typing import Any

import torch

from .. import _checks
from . import _diffusers_guidance as guidance_of
from . import _diffusers_run as core
from . import _swap
from ._diffusers_steps import SCHEDULERS
from ._swap import Declined, Report, Settings, Takeover

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
    _peer.check_version()
    _takeovers()
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
        The new scheduler; the same object where it is one already, which then takes `denoised`, or where pyperf_dl has
        no such class, which :func:`report` counts.

    Raises:
        TypeError: what is neither a scheduler nor a pipeline with one.
        ValueError: a version of diffusers other than 0.42; guidance without a pipeline.
        ImportError: diffusers is not installed.

    >>> import diffusers, pyperf_dl.integrations.diffusers
    >>> fused = pyperf_dl.integrations.diffusers.fuse(diffusers.DDIMScheduler())
    >>> isinstance(fused, diffusers.DDIMScheduler), type(fused).__name__
    (True, 'DDIMScheduler')
    """
    op = "diffusers.fuse"
    _peer.check_version("fuse")
    _checks.flag(op, "denoised", denoised)
    _checks.flag(op, "guidance", guidance)
    pipeline = None if hasattr(scheduler, "step") else scheduler
    own = scheduler if pipeline is None else getattr(pipeline, "scheduler", None)
    if isinstance(own, type) or not hasattr(own, "step"):
        raise TypeError(f"{op}: scheduler must be a scheduler, or a pipeline with one, got {scheduler!r}")
    if pipeline is None and guidance:
        raise ValueError(f"{op}: guidance is for a pipeline, got a {type(scheduler).__name__}")
    scheduler, kind = own, type(own)
    if getattr(kind, "_pyperf_dl_of", None) is not None:
        scheduler._pyperf_dl.denoised = denoised
    else:
        if kind is not _takeovers().get(kind.__name__, (None,))[0]:
            _peer.count(f"{kind.__name__} is not taken over")
            return scheduler
        state = {name: copy.copy(v) if type(v) is list else v for name, v in vars(scheduler).items()}
        scheduler = _restored(kind, {**state, "_pyperf_dl": core.State(denoised)})
    if pipeline is not None:
        pipeline.scheduler = scheduler
    if guidance:
        _puts_off(pipeline)
    return scheduler


def _puts_off(pipeline: Any) -> None:
    models = [m for m in (getattr(pipeline, name, None) for name in ("unet", "transformer")) if m is not None]
    if not models:
        raise ValueError(
            f"diffusers.fuse: guidance is for a pipeline with a unet or a transformer, got {type(pipeline).__name__}"
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


_found: dict[str, tuple[type, Callable[..., Any]]] = {}


def _takeovers() -> dict[str, tuple[type, Callable[..., Any]]]:
    """Each class by its name, with what makes a step of it, or declines."""
    if not _found:
        for name, known in SCHEDULERS.items():
            module = importlib.import_module(_MODULE + known.module)
            _found[name] = getattr(module, name), functools.partial(known.step, getattr(module, known.output))
    return _found


@functools.cache
def _subclass(kind: type) -> type:
    _, take = _takeovers()[kind.__name__]
    scaling = getattr(kind, "scale_model_input", None)
    known = SCHEDULERS[kind.__name__]

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
        latents = guidance_of.latents(got[0], doubled, known.scales)
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
        self._pyperf_dl = core.State()

    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
        kind.set_timesteps(self, *args, **kwargs)
        if "_pyperf_dl" in self.__dict__:  # some constructors call this
            core.prepare(self, (known.table, known.options))

    def scale_model_input(self: Any, sample: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        if type(sample) is guidance_of.Doubled:
            return sample.as_subclass(torch.Tensor)
        if known.scales and (args or "timestep" in kwargs):
            core.begin(self, args[0] if args else kwargs["timestep"])
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


def _stands_in(name: str) -> Callable[..., Any]:
    def stand_in(settings: Settings, scheduler: Any, *args: Any, **kwargs: Any) -> Any:
        kind, take = _found[name]
        return take(scheduler, *args, **kwargs) if type(scheduler) is kind else Declined("a subclass")

    return stand_in


for _name, _known in SCHEDULERS.items():
    _peer.replaces(_MODULE + _known.module, f"{_name}.step")(_stands_in(_name))
