"""Maximum and minimum of every window along one or several dimensions, in O(1) operations an element."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from . import _checks
from ._autograd import Operator
from .reference import sliding_window as reference

__all__ = [
    "SlidingWindowMax",
    "SlidingWindowMin",
    "SlidingWindowMinMax",
    "SlidingWindowStream",
    "sliding_window_max",
    "sliding_window_min",
    "sliding_window_minmax",
]

DTYPES = (
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bool,
)
MODES = ("constant", "reflect", "nearest", "wrap", "mirror")

# ---- operators: shapes, derivatives, batching, sharding ----


def _laid_out(like: torch.Tensor, dim: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    """An empty tensor whose dimensions lie in memory as those of `like`, if `like` is dense (csrc: physical_layout)."""
    shape = list(like.shape)
    shape[dim] = size
    layout = list(range(like.dim()))
    if not like.is_contiguous():
        by_stride = sorted(layout, key=lambda d: -like.stride(d))
        expected: Any = 1
        for d in reversed(by_stride):
            if like.shape[d] == 1:
                continue
            if like.stride(d) != expected:
                break
            expected = expected * like.shape[d]
        else:
            layout = by_stride
    return torch.empty_permuted(shape, layout, dtype=dtype, device=like.device)


def _fake_extremum(x, dim, window, stride, dilation, left, out_length, mode, minimum, ignore_nan, last):
    return _laid_out(x, dim, out_length, x.dtype)


def _fake_extremum_offsets(x, dim, window, stride, dilation, left, out_length, mode, minimum, ignore_nan, last):
    offsets = _laid_out(x, dim, out_length, reference.offset_dtype(window))
    return _laid_out(x, dim, out_length, x.dtype), offsets


def _fake_minmax(x, dim, window, stride, dilation, left, out_length, mode, ignore_nan, last):
    return _laid_out(x, dim, out_length, x.dtype), _laid_out(x, dim, out_length, x.dtype)


def _fake_minmax_offsets(x, dim, window, stride, dilation, left, out_length, mode, ignore_nan, last):
    dtypes = [x.dtype] * 2 + [reference.offset_dtype(window)] * 2
    return tuple(_laid_out(x, dim, out_length, dtype) for dtype in dtypes)


def _check_one_device(first, second):
    if first.device != second.device:
        raise RuntimeError(f"sliding_window: tensors must be on one device, got {first.device} and {second.device}")


def _fake_backward(grad_y, offsets, dim, length, window, stride, dilation, left, mode):
    _check_one_device(grad_y, offsets)
    return _laid_out(offsets, dim, length, grad_y.dtype)


def _fake_gather(values, offsets, dim, window, stride, dilation, left, mode):
    _check_one_device(values, offsets)
    return _laid_out(offsets, dim, offsets.shape[dim], values.dtype)


def _fake_index(offsets, dim, length, window, stride, dilation, left, mode):
    return _laid_out(offsets, dim, offsets.shape[dim], torch.int64)


class _Geometry(NamedTuple):
    """What the derivatives of a forward operator need of its arguments."""

    dim: int
    length: int
    window: int
    stride: int
    dilation: int
    left: int
    mode: str

    def sums(self, grad: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        return _backward(grad, offsets, self.dim, self.length, *self[2:])

    def take(self, values: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        return _gather(values, offsets, self.dim, *self[2:])


def _geometry(x: torch.Tensor, dim, window, stride, dilation, left, out_length, mode, *rest) -> _Geometry:
    return _Geometry(dim, x.shape[dim], window, stride, dilation, left, mode)


def _save_input(ctx, inputs, output):
    """The forms without offsets keep x and find the winners again in the backward."""
    ctx.geometry = _geometry(*inputs)
    return inputs[:1]


def _save_offsets(ctx, inputs, output):
    ctx.geometry = _geometry(*inputs)
    return output[len(output) // 2 :]


def _sum_offsets(ctx, offsets, grads):
    """Gradient of x from those of the values; a value that nothing depended on has none."""
    parts = [ctx.geometry.sums(g, o) for g, o in zip(grads, offsets, strict=False) if g is not None]
    return (sum(parts[1:], parts[0]) if parts else None,)


def _found_again(ctx):
    (x,) = ctx.saved_tensors
    if len(ctx.statics) == len(_MINMAX_STATICS):
        return _minmax_offsets(x, *ctx.statics)[2:]
    return _extremum_offsets(x, *ctx.statics)[1:]


_MINMAX_STATICS = ("dim", "window", "stride", "dilation", "left", "out_length", "mode", "ignore_nan", "last")


def _save_linear(ctx, inputs, output):
    source, offsets, dim = inputs[:3]
    length = inputs[3] if len(inputs) == 9 else source.shape[dim]
    ctx.geometry = _Geometry(dim, length, *inputs[-5:])
    return (offsets,)


def _batched(*args):
    """A new dimension in front moves dim by one."""
    tensors = sum(isinstance(a, torch.Tensor) for a in args)
    return (*args[:tensors], args[tensors] + 1, *args[tensors + 1 :])


def _other_dims(*args):
    tensors = sum(not isinstance(a, (int, str, torch.SymInt)) for a in args)
    return [d for d in range(len(args[0].shape)) if d != args[tensors]]


def _comparisons(*args, out_shape=None, **kwargs):
    """van Herk-Gil-Werman: three comparisons an output, whatever the window."""
    shape = out_shape[0] if isinstance(out_shape[0], (tuple, list, torch.Size)) else out_shape
    outputs = 1
    for n in shape:
        outputs *= n
    return 3 * outputs


_LAUNCH = "pyperf_dl._launch.sliding_window"
_common = {"batch": _batched, "shard": _other_dims}

_extremum = Operator(
    "sliding_window_extremum",
    tensors=1,
    fake=_fake_extremum,
    reference=reference.extremum,
    launch=f"{_LAUNCH}:extremum",
    save=_save_input,
    backward=lambda ctx, grad: _sum_offsets(ctx, _found_again(ctx), (grad,)),
    jvp=lambda ctx, tangent: ctx.geometry.take(tangent, *_found_again(ctx)),
    flops=_comparisons,
    **_common,
)
_extremum_offsets = Operator(
    "sliding_window_extremum_offsets",
    tensors=1,
    fake=_fake_extremum_offsets,
    reference=reference.extremum_offsets,
    launch=f"{_LAUNCH}:extremum_offsets",
    save=_save_offsets,
    backward=lambda ctx, grad, _: _sum_offsets(ctx, ctx.saved_tensors, (grad,)),
    jvp=lambda ctx, tangent: (ctx.geometry.take(tangent, *ctx.saved_tensors), None),
    flops=_comparisons,
    **_common,
)
_minmax = Operator(
    "sliding_window_minmax",
    tensors=1,
    fake=_fake_minmax,
    reference=reference.minmax,
    launch=f"{_LAUNCH}:minmax",
    save=_save_input,
    backward=lambda ctx, *grads: _sum_offsets(ctx, _found_again(ctx), grads),
    jvp=lambda ctx, tangent: tuple(ctx.geometry.take(tangent, o) for o in _found_again(ctx)),
    flops=lambda *args, **kwargs: 2 * _comparisons(*args, **kwargs),
    **_common,
)
_minmax_offsets = Operator(
    "sliding_window_minmax_offsets",
    tensors=1,
    fake=_fake_minmax_offsets,
    reference=reference.minmax_offsets,
    launch=f"{_LAUNCH}:minmax_offsets",
    save=_save_offsets,
    backward=lambda ctx, *grads: _sum_offsets(ctx, ctx.saved_tensors, grads[:2]),
    jvp=lambda ctx, tangent: (*(ctx.geometry.take(tangent, o) for o in ctx.saved_tensors), None, None),
    flops=lambda *args, **kwargs: 2 * _comparisons(*args, **kwargs),
    **_common,
)
# The derivative is linear in the gradient given the winners, and gather is its transpose.
_backward = Operator(
    "sliding_window_backward",
    tensors=2,
    fake=_fake_backward,
    reference=reference.backward,
    launch=f"{_LAUNCH}:backward",
    save=_save_linear,
    backward=lambda ctx, grad: (ctx.geometry.take(grad, *ctx.saved_tensors), None),
    jvp=lambda ctx, tangent, _: ctx.geometry.sums(tangent, *ctx.saved_tensors),
    **_common,
)
_gather = Operator(
    "sliding_window_gather",
    tensors=2,
    fake=_fake_gather,
    reference=reference.gather,
    launch=f"{_LAUNCH}:gather",
    save=_save_linear,
    backward=lambda ctx, grad: (ctx.geometry.sums(grad, *ctx.saved_tensors), None),
    jvp=lambda ctx, tangent, _: ctx.geometry.take(tangent, *ctx.saved_tensors),
    **_common,
)
_index = Operator(
    "sliding_window_index",
    tensors=1,
    fake=_fake_index,
    reference=reference.index,
    launch=f"{_LAUNCH}:index",
    **_common,
)

# ---- arguments ----

_Int = int | Sequence[int]
_Padding = str | int | Sequence[int] | Sequence[Sequence[int]]


class _Axis(NamedTuple):
    """One dimension's windows."""

    dim: int
    length: int
    window: int
    stride: int
    dilation: int
    left: int
    out_length: int


class _Call(NamedTuple):
    """Checked arguments of one public call."""

    op: str
    axes: tuple[_Axis, ...]
    taps: int
    mode: str
    ignore_nan: bool
    min_count: int
    last: bool
    return_indices: bool
    global_index: bool
    recompute: bool


def _per_dim(op: str, name: str, value: Any, dims: int, minimum: int) -> list[int]:
    if isinstance(value, (tuple, list)):
        if len(value) != dims:
            raise ValueError(f"{op}: {name} must have one entry for each of the {dims} dims, got {value!r}")
        return [_checks.integer(op, name, v, minimum) for v in value]
    return [_checks.integer(op, name, value, minimum)] * dims


def _paddings(op: str, padding: Any, dims: int) -> list[str | tuple[int, int]]:
    """For each dimension a word, or (left, right)."""
    rule = "'valid', 'same', 'causal', an int, (left, right), or one (left, right) for each dim"
    if isinstance(padding, str):
        return [_checks.choice(op, "padding", padding, ("valid", "same", "causal"))] * dims
    if isinstance(padding, (tuple, list)):
        nested = [isinstance(p, (tuple, list)) for p in padding]
        if all(nested) and nested:
            if len(padding) != dims or any(len(p) != 2 for p in padding):
                raise ValueError(f"{op}: padding must be {rule}, got {padding!r} for {dims} dims")
            return [tuple(_checks.integer(op, "padding", v, 0) for v in p) for p in padding]  # type: ignore[misc]
        if any(nested) or len(padding) != 2:
            raise ValueError(f"{op}: padding must be {rule}, got {padding!r}")
        left, right = (_checks.integer(op, "padding", v, 0) for v in padding)
        return [(left, right)] * dims
    both = _checks.integer(op, "padding", padding, 0)
    return [(both, both)] * dims


def _axis(
    op: str, dim: int, length: int, window: int, stride: int, dilation: int, padding: str | tuple[int, int]
) -> _Axis:
    extent = (window - 1) * dilation + 1
    sizes = {"window": window, "stride": stride, "dilation": dilation, "window * dilation": extent}
    if not isinstance(padding, str):
        sizes["padding"] = max(padding)
    for name, size in sizes.items():
        if type(size) is int and size >= 2**58:
            raise ValueError(f"{op}: {name} must be < 2**58, got {size}")
    if padding == "same" or padding == "causal":
        left = (extent - 1) // 2 if padding == "same" else extent - 1
        return _Axis(dim, length, window, stride, dilation, left, (length + stride - 1) // stride)
    left, right = (0, 0) if padding == "valid" else padding
    padded = length + left + right
    if padded < extent:
        spread = f" (window {window} with dilation {dilation})" if dilation > 1 else ""
        raise ValueError(
            f"{op}: window must fit the padded length, got window {extent}{spread} > length {padded} along dim {dim}; "
            "padding='same' or 'causal' allow longer windows"
        )
    return _Axis(dim, length, window, stride, dilation, left, (padded - extent) // stride + 1)


def _checked(op: str, x: Any, *arguments: Any) -> _Call:
    """The call that the arguments describe: window, dim, stride, dilation, padding, mode, min_count, nan, ties,
    return_indices, index, recompute."""
    _checks.strided_tensor(op, "x", x, DTYPES)
    plain = all(type(a) in _CACHED_TYPES for a in arguments) and all(type(n) is int for n in x.shape)
    # Sizes may be symbols, and containers compare equal where their entries differ in type.
    plan = _planned if plain and not torch.compiler.is_compiling() else _plan
    call = plan(op, x.shape, x.dtype, *arguments)
    if call.taps >= 2**31 and (call.return_indices or (torch.is_grad_enabled() and x.requires_grad)):
        raise ValueError(f"{op}: indices and gradients need windows of fewer than 2**31 elements, got {call.taps}")
    return call


def _plan(
    op: str,
    shape: torch.Size,
    dtype: torch.dtype,
    window: Any,
    dim: Any,
    stride: Any,
    dilation: Any,
    padding: Any,
    mode: Any,
    min_count: Any,
    nan: Any,
    ties: Any,
    return_indices: Any,
    index: Any,
    recompute: Any,
) -> _Call:
    rank = len(shape)
    if rank == 0:
        raise ValueError(f"{op}: x must have at least one dimension, got a tensor {dtype} {list(shape)}")
    dims = dim if isinstance(dim, (tuple, list)) else (dim,)
    if not dims:
        raise ValueError(f"{op}: dim must name at least one dimension, got {dim!r}")
    dims = [_checks.dimension(op, "dim", d, rank) for d in dims]
    if len(set(dims)) != len(dims):
        raise ValueError(f"{op}: dim must name each dimension once, got {dim!r}")
    windows = _per_dim(op, "window", window, len(dims), 1)
    strides = _per_dim(op, "stride", stride, len(dims), 1)
    dilations = _per_dim(op, "dilation", dilation, len(dims), 1)
    pads = _paddings(op, padding, len(dims))
    mode = _checks.choice(op, "mode", mode, MODES)
    ignore = _checks.choice(op, "nan", nan, ("propagate", "ignore")) == "ignore"
    last = _checks.choice(op, "ties", ties, ("first", "last")) == "last"
    global_index = _checks.choice(op, "index", index, ("global", "offset")) == "global"
    _checks.flag(op, "return_indices", return_indices)
    _checks.flag(op, "recompute", recompute)
    count = 1
    if min_count is not None:
        count = _checks.integer(op, "min_count", min_count, 0)
        if not dtype.is_floating_point:
            raise TypeError(f"{op}: min_count needs a float dtype, for it marks windows with NaN, got {dtype}")
        if not ignore:
            raise ValueError(
                f"{op}: min_count counts the values that are not NaN, so it needs nan='ignore', got nan={nan!r}"
            )
    axes = tuple(
        _axis(op, d, shape[d], *rest) for d, *rest in zip(dims, windows, strides, dilations, pads, strict=True)
    )
    taps = 1
    for axis in axes:
        if mode != "constant" and axis.length == 0 and axis.out_length != 0:
            raise ValueError(f"{op}: mode={mode!r} needs at least one element along dim {axis.dim}, got length 0")
        taps = taps * axis.window
    return _Call(
        op, axes, taps, mode, ignore and dtype.is_floating_point, count, last, return_indices, global_index, recompute
    )


# Programs call with few combinations of arguments; checking them again costs more than a small tensor does.
_CACHED_TYPES = (int, str, bool, type(None))
_planned = functools.lru_cache(maxsize=1024, typed=True)(_plan)


# ---- one call ----


class _Side(NamedTuple):
    """Values of one extremum and, where they were asked for, its taps per axis (outer axes first)."""

    values: torch.Tensor
    taps: tuple[torch.Tensor, ...]


def _along(x: torch.Tensor, axis: _Axis, call: _Call, which: str, with_taps: bool) -> list[_Side]:
    """One axis: which is "max", "min" or "minmax" (minimum first)."""
    head = (axis.dim, axis.window, axis.stride, axis.dilation, axis.left, axis.out_length, call.mode)
    tail = (call.ignore_nan, call.last)
    saves = torch.is_grad_enabled() and x.requires_grad and not call.recompute
    if which == "minmax":
        if with_taps or saves:
            low, high, low_at, high_at = _minmax_offsets(x, *head, *tail)
            return [_Side(low, (low_at,)), _Side(high, (high_at,))]
        return [_Side(y, ()) for y in _minmax(x, *head, *tail)]
    minimum = which == "min"
    if with_taps or saves:
        y, at = _extremum_offsets(x, *head, minimum, *tail)
        return [_Side(y, (at,))]
    return [_Side(_extremum(x, *head, minimum, *tail), ())]


def _taken(taps: torch.Tensor, by: torch.Tensor, axis: _Axis, mode: str) -> torch.Tensor:
    """Taps of inner axes at the winners along `axis`."""
    return _gather(taps, by, axis.dim, axis.window, axis.stride, axis.dilation, axis.left, mode)


def _extrema(x: torch.Tensor, call: _Call, which: str) -> list[_Side]:
    """All axes: inner ones first, so that the first of equal elements is the first in raster order."""
    raster = sorted(call.axes, key=lambda axis: axis.dim)
    sides = [_Side(x, ()) for _ in range(2 if which == "minmax" else 1)]
    for n, axis in enumerate(reversed(raster)):
        if n == 0:
            sides = _along(x, axis, call, which, call.return_indices)
        else:
            names = ["min", "max"] if which == "minmax" else [which]
            outer = [
                _along(s.values, axis, call, name, call.return_indices)[0] for s, name in zip(sides, names, strict=True)
            ]
            if call.return_indices:
                outer = [
                    _Side(o.values, (o.taps[0], *(_taken(t, o.taps[0], axis, call.mode) for t in s.taps)))
                    for o, s in zip(outer, sides, strict=True)
                ]
            sides = outer
    return sides


def _valid_count(x: torch.Tensor, call: _Call) -> torch.Tensor:
    """How many values of each window are not NaN."""
    count = (~x.isnan()).to(torch.int64)
    for axis in call.axes:
        length, out = axis.length, axis.out_length
        starts = torch.arange(out, device=x.device) * axis.stride - axis.left
        if call.mode == "constant" and axis.dilation == 1:
            total = torch.nn.functional.pad(count.movedim(axis.dim, -1).cumsum(-1), (1, 0))
            ends = (starts + axis.window).clamp(0, length)
            part = total.index_select(-1, ends) - total.index_select(-1, starts.clamp(0, length))
            count = part.movedim(-1, axis.dim)
            continue
        # Phases and edges: running sums over the padded row, one step of the dilation apart.
        rows = (max(0, (out - 1) * axis.stride) // axis.dilation + axis.window) * axis.dilation
        at = reference.source_positions(torch.arange(rows, device=x.device) - axis.left, length, call.mode)
        row = count.movedim(axis.dim, -1)
        padded = (
            torch.where(at >= 0, row.index_select(-1, at.clamp(min=0)), 0)
            if length
            else row.new_zeros(*row.shape[:-1], rows)
        )
        total = torch.nn.functional.pad(padded.unflatten(-1, (-1, axis.dilation)).cumsum(-2), (0, 0, 1, 0)).flatten(-2)
        begin = torch.arange(out, device=x.device) * axis.stride
        part = total.index_select(-1, begin + axis.window * axis.dilation) - total.index_select(-1, begin)
        count = part.movedim(-1, axis.dim)
    return count


def _indices(side: _Side, call: _Call) -> torch.Tensor:
    """The one index of a winner among all windowed dims, in raster order: of the element, or of the tap."""
    raster = sorted(call.axes, key=lambda axis: axis.dim)
    if len(raster) == 1 and not call.global_index:
        return side.taps[0]
    found = []
    for axis, taps in zip(raster, side.taps, strict=True):
        if call.global_index:
            at = _index(taps, axis.dim, axis.length, axis.window, axis.stride, axis.dilation, axis.left, call.mode)
            found.append((at, axis.length))
        else:
            found.append((reference.signed_taps(taps, axis.window), axis.window))
    combined = found[0][0]
    if len(raster) == 1:
        return combined
    none = combined < 0
    for at, size in found[1:]:
        none = none | (at < 0)
        combined = combined * size + at
    combined = combined.masked_fill(none, -1)
    if call.global_index:
        return combined
    return combined.masked_fill(none, reference.none_offset(call.taps)).to(reference.offset_dtype(call.taps))


_MINIMA = {"max": (False,), "min": (True,), "minmax": (True, False)}


def _neutral_for_nan(y: torch.Tensor, minimum: bool) -> torch.Tensor:
    return y.masked_fill(y.isnan(), reference.empty_value(y.dtype, minimum, False))


def _run(x: torch.Tensor, call: _Call, which: str) -> list[torch.Tensor]:
    """Values of each extremum, then their indices."""
    sides = _extrema(x, call, which)
    values = [s.values for s in sides]
    indices = [_indices(s, call) for s in sides] if call.return_indices else []
    if call.ignore_nan and call.min_count != 1:
        if call.min_count == 0:
            values = [_neutral_for_nan(y, minimum) for y, minimum in zip(values, _MINIMA[which], strict=True)]
        else:
            short = _valid_count(x.detach(), call) < call.min_count
            values = [y.masked_fill(short, torch.nan) for y in values]
            none = -1 if call.global_index else reference.none_offset(call.taps)
            indices = [i.masked_fill(short, none) for i in indices]
    return values + indices


_ARGUMENTS = """

    Args:
        x: any rank >= 1, any strides (not sparse, quantized or nested). Dtypes: float16, bfloat16, float32, float64,
            uint8, int8 ... int64, bool.
        window: elements (taps) in a window, >= 1.
        dim: the dimension, or a tuple of them (a flat box; ``window``, ``stride`` and ``dilation`` may then be tuples).
        stride: distance of neighbouring windows, in elements.
        dilation: distance of neighbouring taps, in elements. A window extends over e = (window - 1) * dilation + 1.
        padding: ``"valid"``: whole windows only, length (L - e) // stride + 1. ``"same"``: (e - 1) // 2 on the left,
            length ceil(L / stride). ``"causal"``: e - 1 on the left, length ceil(L / stride), so that output i sees
            nothing after i * stride. An int p, or ``(left, right)`` of any size: length
            (L + left + right - e) // stride + 1.
        mode: what padding reads: ``"constant"`` (nothing), or as in scipy.ndimage ``"reflect"`` (d c b a | a b c d),
            ``"nearest"`` (a a a | a b c d), ``"wrap"`` (b c d | a b c d), ``"mirror"`` (d c b | a b c d).
        min_count: floats with ``nan="ignore"``: windows with fewer values that are not NaN give NaN, no index and no
            gradient (pandas' min_periods). Default 1; 0 gives the neutral element for an empty window.
        nan: ``"propagate"``: NaN wins over everything. ``"ignore"``: NaN is skipped. No effect on integers.
        ties: which of equal elements wins the index and the gradient, by position in the padded row.
            -0 < +0, so these two are not equal.
        return_indices: also return the winners' indices.
        index: ``"global"``: int64 index of the winner along ``dim`` (raster index over several dims), -1 for none.
            ``"offset"``: its tap in the window, in uint8 up to 255 taps (255 for none), int16 up to 32767, else int32
            (-1 for none).
        recompute: keep x for the backward and find the winners again there, instead of keeping 1, 2 or 4 bytes an
            output.

    Raises:
        TypeError: x is no dense tensor of these dtypes; a count is no int; ``min_count`` for integers.
        ValueError: a value out of its range; a window longer than the padded row.

    A window that holds no value gives the neutral element (-inf for a maximum, the lowest integer), or NaN with
    ``nan="ignore"``. Exact, and the same bits on every backend, device and number of threads, gradients included: a
    gradient goes to the one winner, and sums are added in one fixed order, without atomics (the reference backend
    leaves that order, and the payload of a NaN that carries a gradient, to torch). The time depends neither
    on the window nor on the data. Differentiable any number of times; works under torch.compile, export and torch.func.

    Follows Lemire, "Streaming maximum-minimum filter using no more than three comparisons per element" (2006), van Herk
    (1992) and Gil and Werman (1993).
"""


def sliding_window_max(
    x: torch.Tensor,
    window: _Int,
    dim: _Int = -1,
    *,
    stride: _Int = 1,
    dilation: _Int = 1,
    padding: _Padding = "valid",
    mode: str = "constant",
    min_count: int | None = None,
    nan: str = "propagate",
    ties: str = "first",
    return_indices: bool = False,
    index: str = "global",
    recompute: bool = False,
) -> Any:
    """Maximum of every window: y[i] = max over t < window of x[i * stride + t * dilation - left].

    >>> pyperf_dl.sliding_window_max(torch.tensor([1.0, 3.0, 2.0, 0.0, 5.0]), 3)
    tensor([3., 3., 5.])
    >>> pyperf_dl.sliding_window_max(torch.tensor([1, 3, 2, 0, 5]), 3, padding="causal", return_indices=True)
    (tensor([1, 3, 3, 3, 5]), tensor([0, 1, 1, 1, 4]))

    Returns:
        y, or (y, indices). y has the dtype of x, and its memory format if x is dense.
    """
    call = _checked(
        "sliding_window_max",
        x,
        window,
        dim,
        stride,
        dilation,
        padding,
        mode,
        min_count,
        nan,
        ties,
        return_indices,
        index,
        recompute,
    )
    out = _run(x, call, "max")
    return tuple(out) if return_indices else out[0]


def sliding_window_min(
    x: torch.Tensor,
    window: _Int,
    dim: _Int = -1,
    *,
    stride: _Int = 1,
    dilation: _Int = 1,
    padding: _Padding = "valid",
    mode: str = "constant",
    min_count: int | None = None,
    nan: str = "propagate",
    ties: str = "first",
    return_indices: bool = False,
    index: str = "global",
    recompute: bool = False,
) -> Any:
    """Minimum of every window: y[i] = min over t < window of x[i * stride + t * dilation - left].

    >>> pyperf_dl.sliding_window_min(torch.tensor([1.0, 3.0, 2.0, 0.0, 5.0]), 3)
    tensor([1., 0., 0.])

    Returns:
        y, or (y, indices). y has the dtype of x, and its memory format if x is dense.
    """
    call = _checked(
        "sliding_window_min",
        x,
        window,
        dim,
        stride,
        dilation,
        padding,
        mode,
        min_count,
        nan,
        ties,
        return_indices,
        index,
        recompute,
    )
    out = _run(x, call, "min")
    return tuple(out) if return_indices else out[0]


def sliding_window_minmax(
    x: torch.Tensor,
    window: _Int,
    dim: _Int = -1,
    *,
    stride: _Int = 1,
    dilation: _Int = 1,
    padding: _Padding = "valid",
    mode: str = "constant",
    min_count: int | None = None,
    nan: str = "propagate",
    ties: str = "first",
    return_indices: bool = False,
    index: str = "global",
    recompute: bool = False,
) -> tuple[torch.Tensor, ...]:
    """Minimum and maximum of every window, in one pass over x.

    >>> pyperf_dl.sliding_window_minmax(torch.tensor([1.0, 3.0, 2.0, 0.0, 5.0]), 3)
    (tensor([1., 0., 0.]), tensor([3., 3., 5.]))

    Returns:
        (minimum, maximum), or (minimum, maximum, indices of the minimum, indices of the maximum).
    """
    call = _checked(
        "sliding_window_minmax",
        x,
        window,
        dim,
        stride,
        dilation,
        padding,
        mode,
        min_count,
        nan,
        ties,
        return_indices,
        index,
        recompute,
    )
    return tuple(_run(x, call, "minmax"))


for _function in (sliding_window_max, sliding_window_min, sliding_window_minmax):
    if _function.__doc__:  # python -OO strips it
        _head, _returns = inspect.cleandoc(_function.__doc__).split("\n\nReturns:")
        _function.__doc__ = f"{_head}\n\n{inspect.cleandoc(_ARGUMENTS)}\n\nReturns:{_returns}"

# ---- modules ----


class _SlidingWindow(torch.nn.Module):
    """Keeps the arguments of one of the functions."""

    def __init__(
        self,
        window: _Int,
        dim: _Int = -1,
        *,
        stride: _Int = 1,
        dilation: _Int = 1,
        padding: _Padding = "valid",
        mode: str = "constant",
        min_count: int | None = None,
        nan: str = "propagate",
        ties: str = "first",
        return_indices: bool = False,
        index: str = "global",
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.window, self.dim = window, dim
        self.options = {
            "stride": stride,
            "dilation": dilation,
            "padding": padding,
            "mode": mode,
            "min_count": min_count,
            "nan": nan,
            "ties": ties,
            "return_indices": return_indices,
            "index": index,
            "recompute": recompute,
        }

    def extra_repr(self) -> str:
        defaults = _SlidingWindow.__init__.__kwdefaults__
        changed = [f"{k}={v!r}" for k, v in self.options.items() if v != defaults[k]]
        return ", ".join([f"window={self.window}", f"dim={self.dim}", *changed])


class SlidingWindowMax(_SlidingWindow):
    """Module form of :func:`sliding_window_max`, with the same arguments after ``x``.

    >>> pyperf_dl.SlidingWindowMax(3, padding="same")(torch.tensor([1.0, 3.0, 2.0, 0.0, 5.0]))
    tensor([3., 3., 3., 5., 5.])
    """

    def forward(self, x: torch.Tensor) -> Any:
        return sliding_window_max(x, self.window, self.dim, **self.options)


class SlidingWindowMin(_SlidingWindow):
    """Module form of :func:`sliding_window_min`, with the same arguments after ``x``."""

    def forward(self, x: torch.Tensor) -> Any:
        return sliding_window_min(x, self.window, self.dim, **self.options)


class SlidingWindowMinMax(_SlidingWindow):
    """Module form of :func:`sliding_window_minmax`, with the same arguments after ``x``."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return sliding_window_minmax(x, self.window, self.dim, **self.options)


# ---- streaming ----


class _Counts(NamedTuple):
    """Running counts of the values that are not NaN, one for each phase of the dilation."""

    before: torch.Tensor  # [..., block]: at the samples of the previous block
    current: torch.Tensor  # [..., block]: of the current block, valid up to `filled`
    latest: torch.Tensor  # [..., dilation]


class _StreamState(NamedTuple):
    """What a stream knows of the past; the last dimension of every tensor is time, the first one the side (min, max).

    Time is cut into blocks of one window (window * dilation samples). A window reaches from the previous block, whose
    suffix extrema are known, into the current one, whose prefix extrema grow with each sample.
    """

    fed: int  # samples of the input so far
    position: int  # samples so far, with the padding on the left
    filled: int  # samples of the current block
    block: torch.Tensor  # [sides, ..., block]: the current block, valid up to `filled`
    suffix: torch.Tensor  # [sides, ..., block + dilation]: extrema from a sample to the end of the previous block
    prefix: torch.Tensor  # [sides, ..., dilation]: extrema from the start of the block to the latest samples
    counts: _Counts | None  # with min_count


def _copied(state: Any) -> Any:
    """The same values in tensors of their own: a running stream writes on its block in place."""
    if isinstance(state, tuple):
        return type(state)(*map(_copied, state))
    return state.clone() if isinstance(state, torch.Tensor) else state


class SlidingWindowStream(torch.nn.Module):
    """Extrema of sliding windows over a sequence that arrives in chunks, bit for bit those of the whole sequence.

    ``torch.cat([stream(c) for c in chunks] + [stream.flush()], dim)`` is the offline result for any way of cutting:
    ``sliding_window_max(torch.cat(chunks, dim), window, dim, padding=padding, ...)``. An output is returned as soon as
    its window is complete. The state is O(window) a row; a sample costs O(1), amortised, whatever its value.

    Args:
        window: samples (taps) in a window, >= 1.
        op: ``"max"``, ``"min"`` or ``"minmax"`` (returns a pair, minimum first).
        dim: the time dimension of the chunks.
        stride, dilation, nan, min_count: as for :func:`sliding_window_max`.
        padding: ``"causal"`` (an output for each sample at once), ``"valid"``, ``"same"`` (late by half a window;
            ``flush`` returns the rest) or ``(left, right)``.

    Raises:
        TypeError, ValueError: as the functions do; a chunk whose shape, dtype or device differs from the first one's;
            a chunk that requires grad (a stream is for inference). The state stays as it was before the error.

    ``reset()`` starts anew. ``state_dict()`` and ``load_state_dict()`` save and resume a stream.

    >>> stream = pyperf_dl.SlidingWindowStream(3)
    >>> stream(torch.tensor([1.0, 3.0])), stream(torch.tensor([2.0, 0.0, 0.0]))
    (tensor([1., 3.]), tensor([3., 3., 2.]))
    """

    def __init__(
        self,
        window: int,
        op: str = "max",
        dim: int = -1,
        *,
        stride: int = 1,
        dilation: int = 1,
        padding: str | int | Sequence[int] = "causal",
        nan: str = "propagate",
        min_count: int | None = None,
    ) -> None:
        super().__init__()
        name = "SlidingWindowStream"
        self.window = _checks.integer(name, "window", window, 1)
        self.op = _checks.choice(name, "op", op, ("max", "min", "minmax"))
        self.dim = _checks.integer(name, "dim", dim)
        self.stride = _checks.integer(name, "stride", stride, 1)
        self.dilation = _checks.integer(name, "dilation", dilation, 1)
        (self.padding,) = _paddings(name, padding, 1)
        self.nan = _checks.choice(name, "nan", nan, ("propagate", "ignore"))
        self.min_count = None if min_count is None else _checks.integer(name, "min_count", min_count, 0)
        if min_count is not None and nan != "ignore":
            raise ValueError(
                f"{name}: min_count counts the values that are not NaN, so it needs nan='ignore', got nan={nan!r}"
            )
        self._state: _StreamState | None = None

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self._arguments().items())

    # -- what a user calls --

    def forward(self, chunk: torch.Tensor) -> Any:
        """Outputs whose windows the chunk completes; the time dimension may have any length, 0 too."""
        samples = self._checked_chunk(chunk)
        with torch.inference_mode(False), torch.no_grad():  # a state that any later mode can go on with
            state, before = (self._state, samples[..., :0]) if self._state else self._start(samples)
            state, dense = self._push(state, samples)
        self._state = state._replace(fed=state.fed + samples.shape[-1])
        return self._outputs(torch.cat([before, dense], -1), state.position)

    def flush(self) -> Any:
        """Outputs that only the padding on the right completes; then starts anew."""
        if self._state is None:
            raise ValueError("SlidingWindowStream.flush: at least one chunk must come first, got none since the start")
        with torch.inference_mode(False), torch.no_grad():
            state, dense = self._push(self._state, self._nothing(self._state.block, self._right(self._state)))
        self._state = None
        return self._outputs(dense, state.position)

    def reset(self) -> None:
        """Forgets everything that was fed."""
        self._state = None

    def get_extra_state(self) -> dict[str, Any]:
        return {"arguments": self._arguments(), "state": _copied(self._state)}

    def set_extra_state(self, saved: dict[str, Any]) -> None:
        name, mine = "SlidingWindowStream.load_state_dict", self._arguments()
        theirs = saved.get("arguments")
        if theirs != mine:
            raise ValueError(
                f"{name}: state_dict must come from a stream with the same arguments, {mine}, got {theirs}"
            )
        self._state = _copied(saved["state"])

    def _arguments(self) -> dict[str, Any]:
        names = ("window", "op", "dim", "stride", "dilation", "padding", "nan", "min_count")
        return {name: getattr(self, name) for name in names}

    # -- geometry --

    @property
    def _extent(self) -> int:
        return (self.window - 1) * self.dilation + 1

    @property
    def _block(self) -> int:
        return self.window * self.dilation

    @property
    def _minima(self) -> tuple[bool, ...]:
        return _MINIMA[self.op]

    def _left(self) -> int:
        words = {"causal": self._extent - 1, "same": (self._extent - 1) // 2, "valid": 0}
        return words[self.padding] if isinstance(self.padding, str) else self.padding[0]

    def _right(self, state: _StreamState) -> int:
        if not isinstance(self.padding, str):
            return self.padding[1]
        if self.padding != "same" or state.fed == 0:
            return 0
        last_start = (state.fed - 1) // self.stride * self.stride
        return max(0, last_start + self._extent - state.position)

    def _nothing(self, like: torch.Tensor, length: int) -> torch.Tensor:
        """Samples that change no extremum. like: [sides, ...]"""
        ignore = self.nan == "ignore" and like.is_floating_point()
        rows = like.shape[1:-1]
        values = [reference.empty_value(like.dtype, minimum, ignore) for minimum in self._minima]
        return torch.stack([like.new_full((*rows, length), value) for value in values])

    def _outputs(self, dense: torch.Tensor, position: int) -> Any:
        """Those results that are outputs: whole windows, every stride-th. dense: [sides, ..., n], of the latest n."""
        first = position - dense.shape[-1] - (self._extent - 1)  # the dense window that dense[..., 0] is
        skip = -first if first < 0 else -first % self.stride
        out = [y.movedim(-1, self.dim) for y in dense[..., skip :: self.stride]]
        if self.min_count == 0:
            out = [_neutral_for_nan(y, minimum) for y, minimum in zip(out, self._minima, strict=True)]
        return tuple(out) if self.op == "minmax" else out[0]

    # -- checks --

    def _checked_chunk(self, chunk: Any) -> torch.Tensor:
        name = "SlidingWindowStream"
        _checks.strided_tensor(name, "chunk", chunk, DTYPES)
        if chunk.dim() == 0:
            raise ValueError(f"{name}: chunk must have at least one dimension, got {_checks.described(chunk)}")
        if self.min_count is not None and not chunk.is_floating_point():
            raise TypeError(f"{name}: min_count needs a float dtype, got {chunk.dtype}")
        if torch.is_grad_enabled() and chunk.requires_grad:
            raise ValueError(f"{name}: chunk must not require grad; sliding_window_{self.op} is differentiable")
        samples = chunk.detach().movedim(_checks.dimension(name, "dim", self.dim, chunk.dim()), -1)
        if self._state is not None:
            block = self._state.block[0]
            same = (samples.shape[:-1], samples.dtype, samples.device) == (block.shape[:-1], block.dtype, block.device)
            if not same:
                first = f"{block.dtype} {list(block.shape[:-1])} on {block.device}"
                raise ValueError(
                    f"{name}: chunk must have the dtype, device and other dimensions of the first one ({first}), "
                    f"got {samples.dtype} {list(samples.shape[:-1])} on {samples.device}; reset() starts anew"
                )
        return samples.expand(len(self._minima), *samples.shape)

    # -- one step --

    def _start(self, samples: torch.Tensor) -> tuple[_StreamState, torch.Tensor]:
        """The state after the padding on the left, and its results: a wide padding completes windows by itself."""
        block = self._nothing(samples, self._block)
        counts = None
        if self.min_count is not None and self.min_count > 1:
            zeros = torch.zeros_like(block[0], dtype=torch.int64)
            counts = _Counts(zeros, zeros, zeros[..., : self.dilation])
        suffix, prefix = self._nothing(samples, self._block + self.dilation), self._nothing(samples, self.dilation)
        state = _StreamState(0, 0, 0, block, suffix, prefix, counts)
        return self._push(state, self._nothing(samples, self._left()))

    def _push(self, state: _StreamState, samples: torch.Tensor) -> tuple[_StreamState, torch.Tensor]:
        """The state after the samples, and one result for each of them. samples: [sides, ..., n]"""
        whole = samples.shape[-1] >= 2 * self._block
        # Of a long chunk, the windows that begin before it; all others need the chunk alone.
        rest = samples[..., : self._extent - 1] if whole else samples
        results = [samples[..., :0]]
        while rest.shape[-1]:
            n = min(rest.shape[-1], self._block - state.filled)
            state, result = self._within_block(state, rest[..., :n])
            results.append(result)
            rest = rest[..., n:]
        if whole:
            state, result = self._whole_chunk(state, samples)
            results.append(result)
        return state, torch.cat(results, -1)

    def _each(self, x: torch.Tensor, window: int, dilation: int, left: int, out_length: int) -> torch.Tensor:
        """Extrema of each side. x: [sides, ..., n]"""
        dim, ignore = x.dim() - 2, self.nan == "ignore" and x.is_floating_point()
        return torch.stack(
            [
                _extremum(side, dim, window, 1, dilation, left, out_length, "constant", minimum, ignore, False)
                for side, minimum in zip(x, self._minima, strict=True)
            ]
        )

    def _within_block(self, state: _StreamState, part: torch.Tensor) -> tuple[_StreamState, torch.Tensor]:
        d, n, at = self.dilation, part.shape[-1], state.filled
        taps = (n + d - 1) // d + 1
        prefix = self._each(torch.cat([state.prefix, part], -1), taps, d, (taps - 1) * d, n + d)
        pair = torch.cat([state.suffix[..., at + d : at + d + n], prefix[..., d:]], -1)
        result = self._each(pair, 2, n, 0, n)
        # Earlier states see the block up to their own `filled` only, so it can be written on; a new block gets memory
        # of its own.
        block = state.block if at else torch.empty_like(state.block)
        block[..., at : at + n] = part
        counts = state.counts
        if counts is not None:
            current = counts.current if at else torch.empty_like(counts.current)
            running = self._running(counts.latest, part[0])
            current[..., at : at + n] = running[..., d:]
            result = self._counted(result, running[..., d:] - counts.before[..., at : at + n])
            counts = _Counts(counts.before, current, running[..., -d:])
        state = state._replace(
            position=state.position + n, filled=at + n, block=block, prefix=prefix[..., -d:], counts=counts
        )
        if at + n == self._block:
            state = self._next_block(state, block)
            if counts is not None:
                state = state._replace(counts=counts._replace(before=counts.current))
        return state, result

    def _next_block(self, state: _StreamState, block: torch.Tensor) -> _StreamState:
        nothing = self._nothing(block, self.dilation)
        suffix = self._each(block, self.window, self.dilation, 0, self._block)
        return state._replace(filled=0, suffix=torch.cat([suffix, nothing], -1), prefix=nothing)

    def _whole_chunk(self, state: _StreamState, samples: torch.Tensor) -> tuple[_StreamState, torch.Tensor]:
        n = samples.shape[-1] - self._extent + 1
        result = self._each(samples, self.window, self.dilation, 0, n)
        state = self._next_block(state._replace(position=state.position + n), samples[..., -self._block :])
        if state.counts is not None:
            running = self._running(torch.zeros_like(state.counts.latest), samples[0])[..., self.dilation :]
            earlier = torch.nn.functional.pad(running[..., : -self._block], (self._block, 0))
            result = self._counted(result, (running - earlier)[..., self._extent - 1 :])
            before = running[..., -self._block :].clone()
            state = state._replace(counts=_Counts(before, torch.empty_like(before), running[..., -self.dilation :]))
        return state, result

    def _running(self, latest: torch.Tensor, samples: torch.Tensor) -> torch.Tensor:
        """`latest`, then the running counts of each phase."""
        counts = torch.cat([latest, (~samples.isnan()).to(torch.int64)], -1)
        n = counts.shape[-1]
        padded = torch.nn.functional.pad(counts, (0, -n % self.dilation))
        return padded.unflatten(-1, (-1, self.dilation)).cumsum(-2).flatten(-2)[..., :n]

    def _counted(self, result: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        return result.masked_fill(count < self.min_count, torch.nan)
