"""Launches the Triton kernels of kernels/triton/coupling.py; signatures as in csrc/coupling.cpp.

Tensors are walked with the strides that they have; what :func:`uncovered` names runs the reference.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from pyperf_dl._coupling_affine import DEFAULT_CLAMPS, FLOORED
from pyperf_dl._coupling_spline import DTYPES, HALF_DTYPES, _like
from pyperf_dl._triton import coupling as kernels
from pyperf_dl.reference import coupling as reference

from . import common

COVERED = "affine couplings, and splines of up to 64 bins with tails 'linear', one box, precision 'fast' and no mask"

MOST_BINS = 64
# Of a program, and of a warp. A spline's thread keeps what it knows of four parameters in registers, two in float64.
ELEMENTS, _ELEMENTS_A_WARP = 1024, 256
PARAMETERS, _PARAMETERS_A_WARP = 1024, 128


def uncovered(bound: torch.Tensor | None, mask: torch.Tensor | None, tails: str, exact: bool, bins: int) -> str:
    """What of these arguments the kernels do not serve; empty where they do."""
    if mask is not None:
        return "a sample mask"
    if bound is not None:
        return "a list of tails" if tails == "mixed" else "a tensor for tail_bound"
    if tails != "linear":
        return f"tails={tails!r}"
    if exact:
        return "precision='exact'"
    return f"more than {MOST_BINS} bins" if bins > MOST_BINS else ""


@functools.cache
def _warn_uncovered(name: str, kind: str) -> None:
    warnings.warn(f"pyperf_dl: {name} with {kind} runs the reference; triton covers {COVERED}", stacklevel=4)


def _is_uncovered(name: str, *arguments: Any) -> bool:
    kind = uncovered(*arguments)
    if kind:
        _warn_uncovered(name, kind)
    return bool(kind)


# ---- tensors ----


def _work(dtype: torch.dtype) -> Any:
    return tl.float64 if dtype == torch.float64 else tl.float32


def _refusal(rule: str, got: Any) -> RuntimeError:
    """What native operators raise too: the last line of defence, users meet the checks of the public functions."""
    return RuntimeError(f"coupling: {rule}, got {got}")


def _check_tensor(what: str, t: torch.Tensor, shape: Sequence[int], like: torch.Tensor, *dtypes: torch.dtype) -> None:
    if t.shape != torch.Size(shape):
        raise _refusal(f"{what} must have shape {list(shape)}", list(t.shape))
    if t.device != like.device:
        raise _refusal(f"{what} must be on {like.device}", t.device)
    if t.dtype not in dtypes:
        raise _refusal(f"{what} must be {' or '.join(map(str, dtypes))}", t.dtype)


def _check_choice(what: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise _refusal(f"{what} must be one of {', '.join(choices)}", value)


def _check_input(x: torch.Tensor, sample_dims: int) -> None:
    _check_tensor("x", x, x.shape, x, *DTYPES)
    if not -1 <= sample_dims <= x.dim():
        raise _refusal(f"sample_dims must be in [-1, {x.dim()}]", sample_dims)


def _check_gradients(grad_y: torch.Tensor, grad_logdet: torch.Tensor, x: torch.Tensor, sample_dims: int) -> None:
    _check_tensor("grad_y", grad_y, x.shape, x, x.dtype)
    shape = x.shape if sample_dims < 0 else x.shape[:sample_dims]
    _check_tensor("grad_logdet", grad_logdet, shape, x, reference.logdet_dtype(x))


class _Walk(NamedTuple):
    """The dimensions of a call's elements, innermost first, and the strides of every tensor along them."""

    sizes: tuple[int, ...]
    strides: tuple[tuple[int, ...] | None, ...]

    @staticmethod
    def over(shape: Sequence[int], leader: torch.Tensor, tensors: Sequence[torch.Tensor | None], split: int) -> _Walk:
        """Tensors have the shape, or one more dimension, whose stride comes last.

        The first `split` dimensions come in their order, the others in that of the memory of `leader`. Dimensions that
        every tensor allows to be one are merged.
        """
        dims = [d for d, size in enumerate(shape) if size != 1]
        dims.sort(key=lambda d: (d >= split, -leader.stride(d) if d >= split else d))
        there = [t for t in tensors if t is not None]
        sizes: list[int] = []
        steps: list[list[int]] = []
        for d in dims:
            size, step = shape[d], [t.stride(d) for t in there]
            if sizes and all(outer == size * inner for outer, inner in zip(steps[-1], step, strict=True)):
                size *= sizes.pop()
                steps.pop()
            sizes.append(size)
            steps.append(step)
        if not sizes:
            sizes, steps = [1], [[0] * len(there)]
        strides = iter(zip(*reversed(steps), strict=True))
        found = (None if t is None else (*next(strides), *t.stride()[len(shape) :]) for t in tensors)
        return _Walk(tuple(reversed(sizes)), tuple(found))


class _Tiles(NamedTuple):
    """What a program takes: `segments` times `lanes` elements, a segment being a piece of one of the samples."""

    samples: int
    sample_size: int
    blocks: int
    segments: int
    lanes: int

    @staticmethod
    def of(samples: int, sample_size: int, most: int) -> _Tiles:
        lanes = min(most, triton.next_power_of_2(sample_size))
        blocks = triton.cdiv(sample_size, lanes)
        segments = min(most // lanes, triton.next_power_of_2(samples * blocks))
        return _Tiles(samples, sample_size, blocks, segments, lanes)

    @property
    def programs(self) -> int:
        return triton.cdiv(self.samples * self.blocks, self.segments)


# ---- launches ----


class _Kernel(NamedTuple):
    """A kernel with what is not a tensor; the elements that a program and a warp take."""

    of: Any
    numbers: tuple[float, ...]
    constants: dict[str, Any]
    most: int
    a_warp: int


def _launch(kernel: Any, programs: int, on: torch.Tensor, *args: Any, **options: Any) -> None:
    with common.on_device_of(on):
        kernel[(programs,)](*args, **options)


def _run(
    kernel: _Kernel,
    tiles: _Tiles,
    tensors: Sequence[torch.Tensor | None],
    parameters: int,
    sums: int = -1,
) -> None:
    """Launches for tensors in the kernels' order: x, parameters, grad_y, result, log-det, gradients of parameters.

    sums: the samples' dimensions, where log-det is one number for each segment.
    """
    x, first = tensors[0], tensors[1]
    assert x is not None
    assert first is not None
    leader = x if 0 in first.stride() else first
    walked = list(tensors)
    if sums >= 0:
        walked[parameters + 3] = None
    sizes, strides = _Walk.over(x.shape, leader, walked, sums)
    _launch(
        kernel.of,
        tiles.programs,
        x,
        *tensors,
        *(sizes, *strides, tiles.samples, tiles.sample_size, tiles.blocks, *kernel.numbers),
        **kernel.constants,
        SUMMED=sums >= 0,
        NARROW=x.numel() < 2**31,
        SEGMENTS=tiles.segments,
        LANES=tiles.lanes,
        num_warps=max(1, min(8, tiles.segments * tiles.lanes // kernel.a_warp)),
        enable_fp_fusion=False,
    )


def _forward(
    kernel: _Kernel, x: torch.Tensor, parameters: Sequence[torch.Tensor], sample_dims: int
) -> tuple[torch.Tensor, torch.Tensor]:
    common.check_device(x, kernel.of)
    y, dtype = _like(x), reference.logdet_dtype(x)
    none = [None] * len(parameters)
    if not 0 <= sample_dims < x.dim():
        logdet = torch.empty_like(y, dtype=dtype) if sample_dims < 0 else x.new_empty(x.shape, dtype=dtype)
        if x.numel():
            _run(
                kernel, _Tiles.of(1, x.numel(), kernel.most), [x, *parameters, None, y, logdet, *none], len(parameters)
            )
        return y, logdet
    samples = x.shape[:sample_dims]
    if x.numel() == 0:
        return y, x.new_zeros(samples, dtype=dtype)
    tiles = _Tiles.of(math.prod(samples), math.prod(x.shape[sample_dims:]), kernel.most)
    pieces = x.new_empty((*samples, tiles.blocks), dtype=dtype)
    _run(kernel, tiles, [x, *parameters, None, y, pieces, *none], len(parameters), sample_dims)
    return y, pieces.sum(-1, dtype=torch.float64).to(dtype) if tiles.blocks > 1 else pieces.squeeze(-1)


def _backward(
    kernel: _Kernel,
    grad_y: torch.Tensor,
    grad_logdet: torch.Tensor,
    x: torch.Tensor,
    parameters: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    sample_dims: int,
) -> torch.Tensor:
    """Fills the parameters' gradients, and returns that of x."""
    common.check_device(x, kernel.of)
    if 0 <= sample_dims < x.dim():
        ones = [1] * (x.dim() - sample_dims)
        grad_logdet = grad_logdet.reshape(*grad_logdet.shape, *ones).expand(x.shape)
    grad_x = _like(x)
    if x.numel():
        tensors = [x, *parameters, grad_y, grad_x, grad_logdet, *grads]
        _run(kernel, _Tiles.of(1, x.numel(), kernel.most), tensors, len(parameters))
    return grad_x


# ---- some channels of x ----


def _checked_part(x: torch.Tensor, params: torch.Tensor, split: Sequence[int] | None, t: torch.Tensor) -> torch.Tensor:
    """The channels of t, which has the shape of x, that `split` and the parameters name."""
    if params.dim() != x.dim() + 1:
        raise _refusal("params must have the dimensions of x and one more", list(params.shape))
    if not split:
        return t
    if len(split) != 3 or not 0 <= split[0] < x.dim():
        raise _refusal("split must be a dimension of x, the first channel, and a step", list(split))
    dim, first, step = split
    channels, count = x.shape[dim], params.shape[dim]
    if first < 0 or step < 1 or count > channels - first or (count > 1 and (count - 1) * step >= channels - first):
        raise _refusal(f"split must lie in x, {list(x.shape)}", list(split))
    return reference.part_of(t, split, count)


def _joined(like: torch.Tensor, split: Sequence[int] | None, part: torch.Tensor) -> torch.Tensor:
    return reference.with_part(like, split, part) if split else part


# ---- affine couplings ----


def _affine(
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    inverse: bool,
    activation: str,
    clamp: float,
    min_scale: float,
    max_scale: float,
    first: bool,
    sample_dims: int,
) -> _Kernel:
    _check_input(x, sample_dims)
    _check_tensor("scale", scale, x.shape, x, x.dtype, *(HALF_DTYPES if x.dtype == torch.float32 else ()))
    _check_tensor("shift", shift, x.shape, x, scale.dtype)
    _check_choice("activation", activation, reference.ACTIVATIONS)
    if not clamp >= 0 or (clamp == 0 and activation in DEFAULT_CLAMPS):
        raise _refusal(f"clamp must be > 0 for {activation}", clamp)
    if not min_scale >= 0 or not (max_scale == 0 or max_scale > min_scale > 0):
        raise _refusal("min_scale must be >= 0, and max_scale above a min_scale > 0, or 0", (min_scale, max_scale))
    if min_scale:
        _check_choice("activation with a min_scale", activation, FLOORED)
    constants = {
        "INVERSE": inverse,
        "ACTIVATION": f"{activation}_floor" if min_scale else activation,
        "SHIFT_FIRST": first,
        "WORK": _work(reference.working_dtype(x, scale, shift)),
    }
    bound = math.inf if activation == "exp" and not clamp else clamp
    return _Kernel(kernels.affine, (bound, min_scale, max_scale or math.inf), constants, ELEMENTS, _ELEMENTS_A_WARP)


def affine_coupling(x, scale, shift, inverse, activation, clamp, min_scale, max_scale, shift_first, sample_dims):
    kernel = _affine(x, scale, shift, inverse, activation, clamp, min_scale, max_scale, shift_first, sample_dims)
    return _forward(kernel, x, (scale, shift), sample_dims)


def affine_coupling_backward(
    grad_y, grad_logdet, x, scale, shift, inverse, activation, clamp, min_scale, max_scale, shift_first, sample_dims
):
    kernel = _affine(x, scale, shift, inverse, activation, clamp, min_scale, max_scale, shift_first, sample_dims)
    _check_gradients(grad_y, grad_logdet, x, sample_dims)
    grads = [_like(t) for t in (scale, shift)]
    return _backward(kernel, grad_y, grad_logdet, x, (scale, shift), grads, sample_dims), *grads


def _check_packed(part: torch.Tensor, params: torch.Tensor, activation: str) -> None:
    _check_tensor("params", params, (*part.shape, 1 if activation == "none" else 2), part, *DTYPES)


def affine_coupling_packed(
    x, params, inverse, activation, clamp, min_scale, max_scale, shift_first, shift_leads, split, sample_dims
):
    part = _checked_part(x, params, split, x)
    _check_packed(part, params, activation)
    how = (inverse, activation, clamp, min_scale, max_scale, shift_first, sample_dims)
    y, logdet = affine_coupling(part, *reference.scale_and_shift(params, shift_leads), *how)
    return _joined(x, split, y), logdet


def affine_coupling_packed_backward(
    grad_y, grad_logdet, x, params,
    inverse, activation, clamp, min_scale, max_scale, shift_first, shift_leads, split, sample_dims,
):  # fmt: skip
    if activation == "none":
        raise _refusal("activation must have a scale in a backward", activation)
    _check_tensor("grad_y", grad_y, x.shape, x, x.dtype)
    part, grad_part = (_checked_part(x, params, split, t) for t in (x, grad_y))
    _check_packed(part, params, activation)
    pair, grad_params = reference.scale_and_shift(params, shift_leads), _like(params)
    kernel = _affine(part, *pair, inverse, activation, clamp, min_scale, max_scale, shift_first, sample_dims)
    _check_gradients(grad_part, grad_logdet, part, sample_dims)
    grads = reference.scale_and_shift(grad_params, shift_leads)
    grad_x = _backward(kernel, grad_part, grad_logdet, part, pair, grads, sample_dims)
    return _joined(grad_y, split, grad_x), grad_params


# ---- the rational-quadratic spline ----


def _check_spline(x, parameters, bins, bound, mask, tails, parametrization, box, smallest, sample_dims):
    """parameters: widths, heights and derivatives, or all in one."""
    _check_input(x, sample_dims)
    if not 1 <= bins <= 256:
        raise _refusal("bins must be in [1, 256]", bins)
    _check_choice("tails", tails, (*reference.TAILS, "mixed"))
    if bound is not None:
        _check_tensor("bound", bound, x.shape, x, reference.logdet_dtype(x))
    elif tails == "mixed":
        raise _refusal("tails='mixed' needs bounds, whose signs are the tails", None)
    if mask is not None:
        _check_tensor("mask", mask, x.shape, x, torch.bool)
    _check_choice("parametrization", parametrization, reference.PARAMETRIZATIONS)
    if len(box) != 4 or len(smallest) != 3:
        raise _refusal("box must have 4 numbers, smallest 3", (box, smallest))
    counts = {"widths": bins, "heights": bins, "derivatives": reference.derivative_count(bins, tails)}
    if len(parameters) == 1:
        counts = {"params": sum(counts.values())}
    dtypes, shape = DTYPES, _shared_shape(x, parameters[0])
    for (name, count), t in zip(counts.items(), parameters, strict=True):
        _check_tensor(name, t, (*shape, count), x, *dtypes)
        dtypes = (t.dtype,)  # they have one


def _shared_shape(x, parameters):
    """The shape of x, with 1 where elements share parameters."""
    if parameters.dim() != x.dim() + 1:
        return x.shape
    return [1 if size == 1 else of_x for of_x, size in zip(x.shape, parameters.shape[:-1], strict=True)]


def _bins(widths: torch.Tensor) -> int:
    return widths.shape[-1] if widths.dim() else 0


def _spline(x, parameters, inverse, parametrization, box, smallest, logit_scale, curve):
    bins = parameters[0].shape[-1]
    (left, right, bottom, top), (width, height, slope) = box, smallest
    least = (right - left) * width, (top - bottom) * height
    free = (right - left) * (1 - width * bins), (top - bottom) * (1 - height * bins)
    padded = max(2, triton.next_power_of_2(bins))
    constants = {
        "INVERSE": inverse,
        "EXPONENTIAL": parametrization == "zuko",
        "WORK": _work(reference.working_dtype(x, *parameters)),
        "BINS": padded,
    }
    numbers = (bins, *map(float, (*box, *least, *free, slope, logit_scale, curve)))
    each = padded * (2 if constants["WORK"] == tl.float64 else 1)
    return _Kernel(kernels.spline, numbers, constants, PARAMETERS // each, max(1, _PARAMETERS_A_WARP // each))


def _split(params: torch.Tensor, bins: int) -> tuple[torch.Tensor, ...]:
    return params.split((bins, bins, params.shape[-1] - 2 * bins), -1)


def _spline_forward(x, parameters, inverse, how, sample_dims):
    parameters = [p.expand(*x.shape, p.shape[-1]) for p in parameters]
    return _forward(_spline(x, parameters, inverse, *how), x, parameters, sample_dims)


def _spline_backward(grad_y, grad_logdet, x, parameters, grads, inverse, how, sample_dims):
    """Fills the parameters' gradients, and returns that of x."""
    repeated = [p.expand(*x.shape, p.shape[-1]) for p in parameters]
    kernel = _spline(x, repeated, inverse, *how)
    if repeated[0].shape == parameters[0].shape:
        return _backward(kernel, grad_y, grad_logdet, x, parameters, grads, sample_dims)
    every = [x.new_empty(p.shape, dtype=reference.logdet_dtype(x)) for p in repeated]
    grad_x = _backward(kernel, grad_y, grad_logdet, x, repeated, every, sample_dims)
    shared = [d for d in range(x.dim()) if parameters[0].shape[d] != x.shape[d]]
    for grad, each in zip(grads, every, strict=True):
        grad.copy_(each.sum(shared, keepdim=True, dtype=torch.float64))
    return grad_x


def rational_quadratic_spline(
    x, widths, heights, derivatives, bound, mask,
    inverse, tails, parametrization, box, smallest, logit_scale, curve, sample_dims, exact,
):  # fmt: skip
    parameters, how = (widths, heights, derivatives), (parametrization, box, smallest, logit_scale, curve)
    _check_spline(x, parameters, _bins(widths), bound, mask, tails, *how[:3], sample_dims)
    if _is_uncovered("rational_quadratic_spline", bound, mask, tails, exact, _bins(widths)):
        return reference.rational_quadratic_spline(
            x, *parameters, bound, mask, inverse, tails, *how, sample_dims, exact
        )
    return _spline_forward(x, parameters, inverse, how, sample_dims)


def rational_quadratic_spline_packed(
    x, params, bound, mask, bins, split,
    inverse, tails, parametrization, box, smallest, logit_scale, curve, sample_dims, exact,
):  # fmt: skip
    how = (parametrization, box, smallest, logit_scale, curve)
    part = _checked_part(x, params, split, x)
    _check_spline(part, (params,), bins, bound, mask, tails, *how[:3], sample_dims)
    if _is_uncovered("rational_quadratic_spline_packed", bound, mask, tails, exact, bins):
        return reference.rational_quadratic_spline_packed(
            x, params, bound, mask, bins, split, inverse, tails, *how, sample_dims, exact
        )
    y, logdet = _spline_forward(part, _split(params, bins), inverse, how, sample_dims)
    return _joined(x, split, y), logdet


def rational_quadratic_spline_backward(
    grad_y, grad_logdet, x, widths, heights, derivatives, bound, mask,
    inverse, tails, parametrization, box, smallest, logit_scale, curve, sample_dims, exact,
):  # fmt: skip
    parameters, how = (widths, heights, derivatives), (parametrization, box, smallest, logit_scale, curve)
    _check_spline(x, parameters, _bins(widths), bound, mask, tails, *how[:3], sample_dims)
    _check_gradients(grad_y, grad_logdet, x, sample_dims)
    if _is_uncovered("rational_quadratic_spline_backward", bound, mask, tails, exact, _bins(widths)):
        return reference.rational_quadratic_spline_backward(
            grad_y, grad_logdet, x, *parameters, bound, mask, inverse, tails, *how, sample_dims, exact
        )
    grads = [_like(t) for t in parameters]
    return _spline_backward(grad_y, grad_logdet, x, parameters, grads, inverse, how, sample_dims), *grads


def rational_quadratic_spline_packed_backward(
    grad_y, grad_logdet, x, params, bound, mask, bins, split,
    inverse, tails, parametrization, box, smallest, logit_scale, curve, sample_dims, exact,
):  # fmt: skip
    how = (parametrization, box, smallest, logit_scale, curve)
    _check_tensor("grad_y", grad_y, x.shape, x, x.dtype)
    part, grad_part = (_checked_part(x, params, split, t) for t in (x, grad_y))
    _check_spline(part, (params,), bins, bound, mask, tails, *how[:3], sample_dims)
    _check_gradients(grad_part, grad_logdet, part, sample_dims)
    if _is_uncovered("rational_quadratic_spline_packed_backward", bound, mask, tails, exact, bins):
        return reference.rational_quadratic_spline_packed_backward(
            grad_y, grad_logdet, x, params, bound, mask, bins, split, inverse, tails, *how, sample_dims, exact
        )
    grad = _like(params)
    grad_x = _spline_backward(
        grad_part, grad_logdet, part, _split(params, bins), _split(grad, bins), inverse, how, sample_dims
    )
    return _joined(grad_y, split, grad_x), grad
