"""Launches the Triton kernels of kernels/triton/sampler.py; signatures and outputs as in csrc/sampler.h.

Numbers of a CUDA generator (`state`) are not made here: they are drawn before, with torch.randn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from pyperf_dl import _checks
from pyperf_dl._triton import sampler as kernels
from pyperf_dl.reference._sampler_linear import COLUMNS, clips, log_prob_dtype

from . import common

ELEMENTS = 1024  # of a program
NOISE_GROUP = 128  # elements whose noise is made together
DTYPES, HALF_DTYPES = _checks.FLOATS, _checks.HALVES
OUTPUT, UNCONDITIONAL, VARIANCE, NOISE, INPUTS = 1, 2, 3, 8, 9  # places of a step's inputs, and their number

Shape = Sequence[int]
MaybeTensor = torch.Tensor | None


# ---- checks: the last line of defence, as in native operators ----


def _require(met: bool, name: str, rule: str, got: Any) -> None:
    if not met:
        raise RuntimeError(f"{name}: {rule}, got {got}")


def _check_operand(name: str, what: str, t: MaybeTensor, like: torch.Tensor, *dtypes: torch.dtype) -> None:
    if t is not None:
        _require(t.shape == like.shape, name, f"{what} must have shape {list(like.shape)}", list(t.shape))
        _require(t.device == like.device, name, f"{what} must be on {like.device}", t.device)
        _require(t.dtype in dtypes, name, f"{what} must be {' or '.join(map(str, dtypes))}", t.dtype)


def _check_noise(name: str, state: MaybeTensor, **sources: MaybeTensor) -> None:
    if state is not None:
        raise RuntimeError(
            f"{name}: the triton backend does not make the numbers of a generator (state); draw them with torch.randn, "
            "and give them as noise"
        )
    given = [what for what, t in sources.items() if t is not None]
    _require(len(given) <= 1, name, f"{' and '.join(sources)} exclude each other", "both")


class _Numbers(NamedTuple):
    """Of samples: a tensor, and of how many samples; None, 1 for what is the same for all."""

    tensor: MaybeTensor
    count: int

    @staticmethod
    def of(
        name: str, what: str, t: MaybeTensor, like: torch.Tensor, samples: int, dtype: torch.dtype, width: int = 1
    ) -> _Numbers:
        if t is None:
            return _Numbers(None, 1)
        count, rest = divmod(t.numel(), width)
        met = t.dtype == dtype and t.device == like.device and t.is_contiguous() and not rest
        _require(
            met and (samples == 0 or (count > 0 and samples % count == 0)),
            name,
            f"{what} must be {dtype}, contiguous, on {like.device}, for all of {samples} samples or one for each",
            f"{t.dtype} {list(t.shape)} on {t.device}",
        )
        return _Numbers(t, count)


# ---- how operands lie ----


class _Layout:
    """The order of a sample tensor's dimensions in memory: those that index samples lead.

    Noise goes by the logical index of an element: with `logical`, all lies in that order.
    """

    def __init__(self, name: str, x: torch.Tensor, sample_dims: int, logical: bool) -> None:
        _require(0 <= sample_dims <= x.dim(), name, f"sample_dims must be in [0, {x.dim()}]", sample_dims)
        self.shape, self.sample_dims = x.shape, sample_dims
        self.samples, self.size = math.prod(x.shape[:sample_dims]), math.prod(x.shape[sample_dims:])
        self.group = max(x.shape[sample_dims - 1], 1) if sample_dims else 1
        every = list(range(x.dim()))
        self.order = every[:sample_dims] + sorted(every[sample_dims:], key=lambda d: -x.stride(d))
        if logical or not self._is_dense(x):
            self.order = every

    def output(self, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty_permuted(self.shape, self.order, dtype=dtype, device=like.device)

    def model_inputs(self, like: torch.Tensor, copies: int, dtype: torch.dtype) -> torch.Tensor:
        """[..., copies, samples of a group, sample]"""
        at = max(self.sample_dims - 1, 0)
        order = [d + (d >= at) for d in self.order]
        shape = (*self.shape[:at], copies, *self.shape[at:])
        return torch.empty_permuted(shape, (*order[:at], at, *order[at:]), dtype=dtype, device=like.device)

    def arranged(self, t: torch.Tensor) -> tuple[torch.Tensor, int]:
        """`t`, or a copy that lies as a kernel wants it, and how far one sample is from the next."""
        stride = self._sample_stride(t) if self._is_dense(t) else None
        if stride is None:
            return self.output(t, t.dtype).copy_(t), self.size
        return t, stride

    def _is_dense(self, t: torch.Tensor) -> bool:
        expected = 1
        for d in reversed(self.order[self.sample_dims :]):
            if t.shape[d] != 1 and t.stride(d) != expected:
                return False
            expected *= t.shape[d]
        return True

    def _sample_stride(self, t: torch.Tensor) -> int | None:
        stride = following = None
        for d in reversed(range(self.sample_dims)):
            if t.shape[d] == 1:
                continue
            if following not in (None, t.stride(d)):
                return None
            stride = t.stride(d) if stride is None else stride
            following = t.stride(d) * t.shape[d]
        return stride or 0


# ---- launches ----


def _launch(kernel: Any, programs: int, on: torch.Tensor, *args: Any, **options: Any) -> None:
    with common.on_device_of(on):
        kernel[(programs,)](*args, **options)


class _Call:
    """What both directions of a step have in common."""

    def __init__(
        self, name: str, x: torch.Tensor, model_dtype: torch.dtype, table: torch.Tensor, step: MaybeTensor,
        guidance: MaybeTensor, key: MaybeTensor, adjust: MaybeTensor, row: int, guidance_scale: float,
        low: float, high: float, copies: int, sample_dims: int,
    ) -> None:  # fmt: skip
        _check_operand(name, "x", x, x, *DTYPES)
        models = (torch.float32, *HALF_DTYPES) if x.dtype == torch.float32 else (x.dtype,)
        _require(model_dtype in models, name, f"output must be {' or '.join(map(str, models))}", model_dtype)
        self.x, self.layout = x, _Layout(name, x, sample_dims, logical=key is not None)
        is_table = table.dim() == 2 and table.shape[1] == len(COLUMNS) and table.shape[0] > 0
        _require(
            is_table and table.is_contiguous() and table.dtype == torch.float64 and table.device == x.device,
            name,
            f"table must be torch.float64 [rows, {len(COLUMNS)}], contiguous, on {x.device}",
            f"{table.dtype} {list(table.shape)} on {table.device}",
        )
        _require(copies >= 0, name, "copies must be >= 0", copies)
        samples = self.layout.samples
        self.step = _Numbers.of(name, "step", step, x, samples, torch.int64)
        self.guidance = _Numbers.of(name, "guidance", guidance, x, samples, torch.float64)
        self.key = _Numbers.of(name, "key", key, x, samples, torch.int64)
        self.adjust = _Numbers.of(name, "adjust", adjust, x, samples, torch.float64, 2)
        self.table, self.copies = table, copies
        self.scalars = row, float(guidance_scale), float(low), float(high)
        self.strides: list[int] = []

    def arranged(self, tensors: Sequence[MaybeTensor]) -> list[MaybeTensor]:
        """As a kernel wants them; where each sample begins is in `strides`."""
        pairs = [(None, self.layout.size) if t is None else self.layout.arranged(t) for t in tensors]
        self.strides += [stride for _, stride in pairs]
        return [t for t, _ in pairs]

    def launch(
        self,
        kernel: Any,
        tensors: Sequence[Any],
        numbers: Sequence[_Numbers],
        behind: Sequence[MaybeTensor] = (),
        apart: bool = False,
        **constants: Any,
    ) -> None:
        """behind: tensors that are no elements of samples. apart: samples are not merged."""
        samples, size, group = self.layout.samples, self.layout.size, self.layout.group
        # Samples that are treated alike and lie one behind the other are one.
        alike = not apart and all(n.count == 1 for n in numbers) and self.key.tensor is None
        if alike and (group == samples or self.copies <= 1) and all(stride == size for stride in self.strides):
            samples, size, group = 1, samples * size, 1
        _run(
            kernel, self.x, (samples, size), self.key.tensor is not None,
            *tensors, tuple(self.strides), *behind, self.table, *(n.tensor for n in numbers),
            self.table.shape[0], *(n.count for n in numbers), *self.scalars, group,
            COPIES=self.copies,
            WORK=tl.float64 if self.x.dtype in (torch.float32, torch.float64) else tl.float32,
            **constants,
        )  # fmt: skip


def _lanes(size: int, draws: bool) -> int:
    """Elements of a segment."""
    return max(min(ELEMENTS, triton.next_power_of_2(size)), NOISE_GROUP if draws else 1)


def _run(kernel: Any, on: torch.Tensor, elements: tuple[int, int], draws: bool, *args: Any, **constants: Any) -> None:
    """elements: samples, and those of a sample."""
    samples, size = elements
    lanes = _lanes(size, draws)
    blocks = triton.cdiv(size, lanes)
    segments = max(1, min(ELEMENTS // lanes, triton.next_power_of_2(samples * blocks)))
    _launch(
        kernel,
        triton.cdiv(samples * blocks, segments),
        on,
        *args,
        samples,
        size,
        blocks,
        **constants,
        SEGMENTS=segments,
        LANES=lanes,
        num_warps=max(1, min(4, segments * lanes // 128)),
        enable_fp_fusion=False,
    )


def sampler_step(
    x, output, unconditional, variance, h1, h2, h3, last, noise,
    table, step, guidance, key, state, adjust,
    row, guidance_scale, low, high, offset, denoised, keeps, copies, sample_dims,
):  # fmt: skip
    return _stepped(
        "sampler_step", (x, output, unconditional, variance, h1, h2, h3, last, noise, None),
        table, step, guidance, key, state, adjust,
        row, guidance_scale, low, high, offset, denoised, keeps, copies, sample_dims,
    )[:5]  # fmt: skip


def sampler_transition(
    x, output, unconditional, variance, h1, h2, h3, last, noise, target,
    table, step, guidance, key, state, adjust,
    row, guidance_scale, low, high, offset, denoised, keeps, copies, score, sample_dims,
):  # fmt: skip
    name = "sampler_transition"
    sources = sum(t is not None for t in (noise, key, target))
    _require(sources == 1, name, "needs one of noise, key and target", sources)
    _require(target is None or copies == 0, name, "an input of the model is made of a new sample, not a target", copies)
    return _stepped(
        name, (x, output, unconditional, variance, h1, h2, h3, last, noise, target),
        table, step, guidance, key, state, adjust,
        row, guidance_scale, low, high, offset, denoised, keeps, copies, sample_dims, True, score,
    )  # fmt: skip


def _stepped(
    name, given, table, step, guidance, key, state, adjust,
    row, guidance_scale, low, high, offset, denoised, keeps, copies, sample_dims, log_prob=False, score=False,
):  # fmt: skip
    x, output, *_, last, noise, target = given
    common.check_device(x, kernels.sampler_step)
    _check_noise(name, state, noise=noise, key=key)
    of = _Call(
        name, x, output.dtype, table, step, guidance, key, adjust, row, guidance_scale, low, high, copies, sample_dims
    )
    names = ("x", "output", "unconditional", "variance", "h1", "h2", "h3", "last", "noise", "target")
    for k, (what, t) in enumerate(zip(names, given, strict=True)):
        _check_operand(name, what, t, x, output.dtype if _is_of_model(k) else x.dtype)
    clipping = clips(low, high) or adjust is not None
    wanted = (target is None, denoised, keeps, last is not None)
    outputs = [of.layout.output(x, x.dtype) if w else None for w in wanted]
    outputs.append(of.layout.model_inputs(x, copies, output.dtype) if copies else None)
    wide = log_prob_dtype(x)
    segments = triton.cdiv(of.layout.size, _lanes(of.layout.size, key is not None))
    partials = x.new_zeros(of.layout.samples, segments, dtype=torch.float64) if log_prob else None
    scores = of.layout.output(x, wide) if score else None
    if x.numel():
        of.launch(
            kernels.sampler_step,
            [*of.arranged(given), *outputs, partials, scores],
            (of.step, of.guidance, of.key, of.adjust),
            apart=log_prob,
            CLIPS=clipping,
            FOLDS=not clipping and last is None,
        )
    made = [
        x.new_empty(0, dtype=output.dtype if k == 4 else x.dtype) if t is None else t for k, t in enumerate(outputs)
    ]
    if log_prob:
        made.append(partials.sum(1).to(wide).reshape(x.shape[:sample_dims]))
        made.append(x.new_empty(0, dtype=wide) if scores is None else scores)
    return tuple(made)


def _is_of_model(place: int) -> bool:
    """Of a step's inputs: in the dtype of the model's output."""
    return place in (OUTPUT, UNCONDITIONAL, VARIANCE)


def sampler_step_backward(
    grad_next, grad_denoised, grad_kept, grad_corrected, grad_model_input, x, output, unconditional, variance, noise,
    grad_log_prob, score, table, step, guidance, key, state,
    row, guidance_scale, low, high, offset, guided, next, denoised, keeps, corrects, copies, wanted, sample_dims,
):  # fmt: skip
    name, dtype, model_dtype = "sampler_step_backward", grad_next.dtype, grad_model_input.dtype
    common.check_device(grad_next, kernels.sampler_step_backward)
    _check_noise(name, state, noise=noise, key=key)
    of = _Call(
        name, grad_next, model_dtype, table, step, guidance, key, None,
        row, guidance_scale, low, high, copies, sample_dims,
    )  # fmt: skip
    wants = [bool(wanted >> k & 1) for k in range(INPUTS)]
    clipping = clips(low, high)
    known = x is not None and output is not None and (unconditional is not None) == guided
    _require(known or not clipping, name, "a clip needs x, output and unconditional", "None")
    learned = wants[VARIANCE] or (variance is not None and wants[NOISE])
    known = variance is not None and any(t is not None for t in (noise, key, score))
    _require(known or not learned, name, "a learned variance needs variance and noise", "None")
    kinds = {
        "grad_next": (grad_next if next else None, dtype),
        "grad_denoised": (grad_denoised if denoised else None, dtype),
        "grad_kept": (grad_kept if keeps else None, dtype),
        "grad_corrected": (grad_corrected if corrects else None, dtype),
        "x": (x, dtype),
        "output": (output, model_dtype),
        "unconditional": (unconditional, model_dtype),
        "variance": (variance, model_dtype),
        "noise": (noise, dtype),
        "score": (score, log_prob_dtype(grad_next)),
    }
    for what, (t, kind) in kinds.items():
        _check_operand(name, what, t, grad_next, kind)
    if grad_log_prob is not None:
        met = grad_log_prob.dtype == log_prob_dtype(grad_next) and grad_log_prob.device == grad_next.device
        _require(
            met and grad_log_prob.numel() == of.layout.samples,
            name,
            f"grad_log_prob must be {log_prob_dtype(grad_next)} on {grad_next.device}, one for each of "
            f"{of.layout.samples} samples",
            f"{grad_log_prob.dtype} {list(grad_log_prob.shape)} on {grad_log_prob.device}",
        )
        grad_log_prob = grad_log_prob.contiguous()
    _require((grad_log_prob is None) == (score is None), name, "score and grad_log_prob go together", "one of them")
    made = [
        of.layout.output(grad_next, model_dtype if _is_of_model(k) else dtype) if wants[k] else None
        for k in range(INPUTS)
    ]
    if copies:
        laid = of.layout.model_inputs(grad_next, copies, model_dtype)
        _check_operand(name, "grad_model_input", grad_model_input, laid, model_dtype)
        same = laid.stride() == grad_model_input.stride()
        of_model_input = grad_model_input if same else laid.copy_(grad_model_input)
    else:
        of_model_input = None
    if grad_next.numel():
        read = [t for t, _ in kinds.values()]
        if not clipping:
            read[4:7] = None, None, None
        read = of.arranged(read)
        of.launch(
            kernels.sampler_step_backward,
            [*read[:4], of_model_input, *read[4:], *made],
            (of.step, of.guidance, of.key),
            [grad_log_prob],
            apart=score is not None,
            GUIDED=guided,
            CORRECTS=corrects,
            CLIPS=clipping,
            FOLDS=not clipping and not corrects,
        )
    return tuple(
        grad_next.new_empty(0, dtype=model_dtype if _is_of_model(k) else dtype) if t is None else t
        for k, t in enumerate(made)
    )


def sampler_noise(like, key, state, draw, offset, sample_dims):
    name = "sampler_noise"
    common.check_device(like, kernels.sampler_noise)
    _check_noise(name, state)
    _require(key is not None, name, "needs a key", "None")
    _check_operand(name, "like", like, like, *DTYPES)
    layout = _Layout(name, like, sample_dims, logical=True)
    keys = _Numbers.of(name, "key", key, like, layout.samples, torch.int64)
    out = layout.output(like, like.dtype)
    if out.numel():
        _run(kernels.sampler_noise, out, (layout.samples, layout.size), True, out, *keys, draw)
    return out
