"""The loop over a sampler's steps, plain or as one CUDA graph."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from . import _checks
from ._sampler_noise import GeneratorState, checked_generators, one_a_sample
from ._sampler_step import DTYPES, SamplerStep, checked_key, first_noise, sampler_step
from ._sampler_step_table import StepTable
from .reference._sampler_linear import log_prob_dtype

Model = Callable[..., torch.Tensor]


class Sampler:
    """Runs a model through the steps of a table.

    Args:
        table: of the sampler and its schedule. `table.update_()` changes it for later calls, captured ones too.
        guidance_rescale, clip, dynamic_threshold: as in `sampler_step`, for every step. `StepTable.flow_euler` does not
            go through D, so a clip changes nothing there; `StepTable.euler` does.

    >>> table = pyperf_dl.StepTable.flow_euler(pyperf_dl.NoiseSchedule.flow(8))
    >>> def model(x, t):  # the velocity towards 3, whose samples are 3
    ...     return (x - 3) / (t.view(-1, 1) / 1000)
    >>> pyperf_dl.Sampler(table).sample(model, torch.zeros(1, 2))
    tensor([[3., 3.]])
    """

    def __init__(
        self,
        table: StepTable,
        *,
        guidance_rescale: float = 0.0,
        clip: float | tuple[float, float] | None = None,
        dynamic_threshold: tuple[float, float] | None = None,
    ) -> None:
        if not isinstance(table, StepTable):
            raise TypeError(f"Sampler: table must be a StepTable, got {type(table).__name__}")
        self.table = table
        self._options = {
            "guidance_rescale": guidance_rescale,
            "clip": clip,
            "dynamic_threshold": dynamic_threshold,
        }
        self._captured: _Captured | None = None

    def sample(
        self,
        model: Model,
        x: torch.Tensor,
        *,
        guidance: float | torch.Tensor | None = None,
        generator: torch.Generator | Sequence[torch.Generator | None] | None = None,
        key: int | torch.Tensor | None = None,
        noise: Callable[[int], torch.Tensor] | None = None,
        model_dtype: torch.dtype | None = None,
        begin: int = 0,
        progress: bool = False,
        callback: Callable[[int, SamplerStep], Any] | None = None,
        return_trajectory: bool = False,
        return_log_prob: bool = False,
        capture: bool = False,
    ) -> Any:
        """From x, the sample at the first step, to the last.

        Args:
            model: ``model(inputs, t)`` -> the prediction that the table is made for. inputs: ``[B, ...]``, x as the
                model wants it (c_in x); t: ``[B]``, the table's timesteps, int64 or float32. With guidance both have
                2 B, the first half without the condition and the second with it, and so must the outputs.
            x: ``[B, ...]``, for a whole loop standard normal noise times ``table.initial_scale``.
            guidance: scale of classifier-free guidance: a number, or a tensor of one or one a sample.
            generator, key: where noise comes from, see `sampler_step`.
            noise: or a function of the row that returns it; row -1 is before the first, where the table asks for it
                (`StepTable.edm_churn`).
            model_dtype: of what the model gets; x's by default. float16 or bfloat16 beside a float32 x.
            begin: the first row, if x is a sample of a later level; one that reads no history.
            progress: shows a bar (needs rich).
            callback: ``callback(row, step)`` after each step, with denoised; its return value is not used.
            return_trajectory: also returns ``[rows - begin + 1, B, ...]``, x and the sample after each step.
            return_log_prob: also returns ``[rows - begin, B]``, the log-probability of each step's sample given the one
                before, see `sampler_step`; 0 in rows that add no noise.
            capture: records model and steps in one CUDA graph when called first, and replays it. x, guidance, key, the
                generator's seed and the table's coefficients may differ from call to call; another shape, model or kind
                of call makes another recording, and so does a table that multiplies the first input by another number,
                or gives x other noise. The model must not sync; no callback, progress or `noise`, and log-probabilities
                with `key` alone.

        Returns:
            Tensor: the last sample; with return_trajectory or return_log_prob (sample, trajectory, log_prob), without
            what was not asked for.

        Raises:
            TypeError, ValueError: as `sampler_step`; capture without CUDA, or with what it can't do.
        """
        op = "Sampler.sample"
        _checks.strided_tensor(op, "x", x, DTYPES)
        if x.dim() == 0:
            raise ValueError(f"{op}: x must have a batch dimension, got a tensor without dimensions")
        begin = _checks.integer(op, "begin", begin, 0)
        if begin >= len(self.table):
            raise ValueError(f"{op}: begin must be in [0, {len(self.table) - 1}], got {begin}")
        if noise is not None and (generator is not None or key is not None):
            raise ValueError(f"{op}: noise excludes generator and key, got both")
        if noise is not None and not callable(noise):
            raise TypeError(f"{op}: noise must be a function of the row, got {_checks.described(noise)}")
        if generator is not None and key is not None:
            raise ValueError(f"{op}: generator and key exclude each other, got both")
        generator = checked_generators(op, generator, x)
        key = None if key is None else checked_key(op, key, x)
        if isinstance(guidance, torch.Tensor):
            guidance = one_a_sample(op, "guidance", guidance, x, torch.float64)
        elif guidance is not None:
            guidance = _checks.number(op, "guidance", guidance, finite=True)
        if model_dtype not in (None, x.dtype) and not (x.dtype == torch.float32 and model_dtype in DTYPES[:2]):
            raise ValueError(f"{op}: model_dtype must be x's, or 16 bits beside a float32 x, got {model_dtype}")
        flags = {"progress": progress, "return_trajectory": return_trajectory, "return_log_prob": return_log_prob}
        for name, flag in (*flags.items(), ("capture", capture)):
            _checks.flag(op, name, flag)
        if capture:
            if not x.is_cuda:
                raise ValueError(f"{op}: capture needs CUDA, got x on {x.device}")
            if progress or callback is not None or noise is not None:
                raise ValueError(f"{op}: capture leaves no room for progress, callback or noise; pass none of them")
            if return_log_prob and key is None:
                raise ValueError(
                    f"{op}: capture with return_log_prob needs key, for noise of a generator is drawn before"
                )
            returns = (return_trajectory, return_log_prob)
            return self._replayed(model, x, guidance, generator, key, model_dtype, begin, returns)

        def source(row: int) -> dict[str, Any]:
            if noise is None:
                return {"generator": generator, "key": key}
            return {"noise": noise(row)} if row < 0 or self.table.noisy[row] else {}

        loop = _Loop(self.table, model, x, guidance, model_dtype, begin, self._options, source)
        gathered = _Gathered(x, return_trajectory, return_log_prob)
        for row in _shown(range(begin, len(self.table)), progress):
            step = loop.step(row, denoised=callback is not None, log_prob=return_log_prob and self.table.noisy[row])
            if callback is not None:
                callback(row, step)
            gathered.add(step)
        return _arranged(loop.x, *gathered.results())

    def _replayed(
        self,
        model: Model,
        x: torch.Tensor,
        guidance: Any,
        generator: Any,
        key: Any,
        model_dtype: torch.dtype | None,
        begin: int,
        returns: tuple[bool, bool],
    ) -> Any:
        kept = (self.table, model, x.shape, x.stride(), x.dtype, x.device, guidance is not None, key is not None)
        # Numbers that a recording holds, and update_ may change.
        held = (_first_scale(self.table, begin), self.table.first_noise if begin == 0 else 0.0)
        kept = (*kept, model_dtype, begin, returns, held)
        if self._captured is None or self._captured.kept != kept:
            self._captured = None  # lets go of its memory first
            self._captured = _Captured(
                kept, self.table, model, x, guidance, key, model_dtype, begin, self._options, returns
            )
        return self._captured.replayed(x, guidance, generator, key)


def _first_scale(table: StepTable, begin: int) -> float:
    """What the input of the first call is multiplied by."""
    return table.first_input_scale if begin == 0 else float(table.to("cpu").coefficients[begin - 1, -1])


class _Gathered:
    """What a loop returns beside the last sample."""

    def __init__(self, x: torch.Tensor, trajectory: bool, log_prob: bool) -> None:
        self.samples = [x] if trajectory else None
        self.log_probs: list[torch.Tensor] | None = [] if log_prob else None
        self._none = x.new_zeros(x.shape[0], dtype=log_prob_dtype(x)) if log_prob else None

    def add(self, step: SamplerStep) -> None:
        if self.samples is not None:
            self.samples.append(step.sample)
        if self.log_probs is not None:
            self.log_probs.append(self._none if step.log_prob is None else step.log_prob)

    def results(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        return tuple(None if tensors is None else torch.stack(tensors) for tensors in (self.samples, self.log_probs))


def _arranged(sample: torch.Tensor, *others: torch.Tensor | None) -> Any:
    there = [t for t in others if t is not None]
    return (sample, *there) if there else sample


class _Loop:
    """The state between steps."""

    def __init__(
        self,
        table: StepTable,
        model: Model,
        x: torch.Tensor,
        guidance: Any,
        model_dtype: torch.dtype | None,
        begin: int,
        options: dict[str, Any],
        source: Callable[[int], dict[str, Any]],
    ) -> None:
        self.table, self.model, self.guidance, self.options, self.source = table, model, guidance, options, source
        if begin == 0 and table.first_noise:
            x = x + table.first_noise * first_noise(x, **source(-1))
        self.x = x
        self.copies = 1 if guidance is None else 2
        self.dtype = x.dtype if model_dtype is None else model_dtype
        self.history: tuple[torch.Tensor, ...] = ()
        times = table.to(x.device).timesteps
        self.timesteps = times.float() if times.is_floating_point() and x.dtype != torch.float64 else times
        scale = _first_scale(table, begin)
        inputs = x if scale == 1 else x * scale
        self.inputs = inputs.to(self.dtype).repeat(self.copies, *[1] * (x.dim() - 1))

    def step(self, row: int, **how: Any) -> SamplerStep:
        samples = self.copies * self.x.shape[0]
        output = self.model(self.inputs, self.timesteps[row].expand(samples))
        if not isinstance(output, torch.Tensor) or output.shape[:1] != (samples,):
            of_both = ", for guidance twice the batch" * (self.copies == 2)
            raise ValueError(
                f"Sampler.sample: the model must return a tensor of {samples} samples{of_both}, got "
                f"{_checks.described(output)}"
            )
        unconditional = None
        if self.copies == 2:
            unconditional, output = output.chunk(2)
        last = row == len(self.table) - 1
        step = sampler_step(
            self.x, output, self.table, row, uncond=unconditional, guidance=self.guidance, history=self.history,
            model_inputs=0 if last else self.copies, **self.options, **self.source(row), **how,
        )  # fmt: skip
        self.x, self.history = step.sample, step.history
        self.inputs = None if last else step.model_input.to(self.dtype)
        return step


class _Captured:
    """A loop recorded in a CUDA graph, with what may change between replays in memory of its own."""

    def __init__(
        self,
        kept: tuple[Any, ...],
        table: StepTable,
        model: Model,
        x: torch.Tensor,
        guidance: Any,
        key: Any,
        model_dtype: torch.dtype | None,
        begin: int,
        options: dict[str, Any],
        returns: tuple[bool, bool],
    ) -> None:
        self.kept = kept
        self.x = x.clone()
        samples = x.shape[0]
        self.guidance = None if guidance is None else torch.empty(samples, dtype=torch.float64, device=x.device)
        self.key = None if key is None else torch.empty(samples, dtype=torch.int64, device=x.device)
        self.state = GeneratorState(x)
        self._set(x, guidance, key)

        source: dict[str, Any] = {"generator": self.state} if key is None else {"key": self.key}

        def run() -> tuple[torch.Tensor | None, ...]:
            self.state.begin()
            loop = _Loop(table, model, self.x, self.guidance, model_dtype, begin, options, lambda row: source)
            gathered = _Gathered(self.x, *returns)
            for row in range(begin, len(table)):
                gathered.add(loop.step(row, log_prob=returns[1] and table.noisy[row]))
            return loop.x, *gathered.results()

        side = torch.cuda.Stream(x.device)
        side.wait_stream(torch.cuda.current_stream(x.device))
        with torch.no_grad(), torch.cuda.stream(side):  # lazy set-up must not fall into the recording
            run()
        torch.cuda.current_stream(x.device).wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(self.graph, stream=side):
            self.results = run()

    def _set(self, x: torch.Tensor, guidance: Any, key: Any) -> None:
        self.x.copy_(x)
        for own, given in ((self.guidance, guidance), (self.key, key)):
            if own is None:
                continue
            if isinstance(given, torch.Tensor):
                own.copy_(given)
            else:
                own.fill_(given)

    def replayed(self, x: torch.Tensor, guidance: Any, generator: Any, key: Any) -> Any:
        self._set(x, guidance, key)
        self.state.take(generator)
        self.graph.replay()
        return _arranged(*(None if t is None else t.clone() for t in self.results))


def _shown(rows: Sequence[int], progress: bool) -> Iterable[int]:
    if not progress:
        return rows
    if importlib.util.find_spec("rich") is None:
        raise RuntimeError("Sampler.sample: progress=True needs rich (pip install rich)")
    from rich.progress import track

    return track(rows, description="sampling")
