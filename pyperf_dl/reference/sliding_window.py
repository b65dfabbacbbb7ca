"""What `pyperf_dl.sliding_window` computes, twice: the monotonic deque in plain Python, and the same in PyTorch.

The deque is the specification and the oracle of the tests. The PyTorch form (doubling of window maxima,
O(n log window)) serves devices without kernels, forced reference runs, and decompositions.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import torch

# ---- the specification ----


def source(position: int, length: int, mode: str) -> int | None:
    """Index of the element that a position of the padded row reads; None in constant padding."""
    if 0 <= position < length:
        return position
    if mode == "constant" or length == 0:
        return None
    if mode == "nearest":
        return 0 if position < 0 else length - 1
    if mode == "wrap":
        return position % length
    if mode == "reflect":
        r = position % (2 * length)
        return r if r < length else 2 * length - 1 - r
    if length == 1:
        return 0
    r = position % (2 * length - 2)
    return r if r < length else 2 * length - 2 - r


def rank(value: float, minimum: bool) -> tuple[int, float, float]:
    """Sorts -inf < ... < -0 < +0 < ... < inf < NaN for a maximum, and the mirrored values for a minimum."""
    if isinstance(value, float):
        if math.isnan(value):
            return (1, 0.0, 0.0)
        value = -value if minimum else value
        return (0, value, math.copysign(1.0, value))
    return (0, -value if minimum else value, 0.0)


def row_winners(
    row: Sequence[Any],
    window: int,
    *,
    stride: int = 1,
    dilation: int = 1,
    left: int = 0,
    out_length: int,
    mode: str = "constant",
    minimum: bool = False,
    ignore_nan: bool = False,
    last: bool = False,
) -> list[int | None]:
    """The tap that wins each window of one row, by a monotonic deque; None where the window holds no value.

    Candidates wait in the deque in falling order; a new value drops those it beats, and the front leaves when the
    window has passed it. Each value enters and leaves once.
    """
    taps: list[int | None] = [None] * out_length
    for phase in range(dilation):  # outputs whose starts agree modulo the dilation share their elements
        outputs = {i * stride // dilation: i for i in range(out_length) if i * stride % dilation == phase}
        candidates: deque[tuple[tuple[int, float, float], int]] = deque()
        for j in range(max(outputs, default=-1) + window):  # element j of this phase
            at = source(phase - left + j * dilation, len(row), mode)
            if at is not None and not (ignore_nan and isinstance(row[at], float) and math.isnan(row[at])):
                new = rank(row[at], minimum)
                while candidates and (candidates[-1][0] < new or (last and candidates[-1][0] == new)):
                    candidates.pop()
                candidates.append((new, j))
            first = j - window + 1
            while candidates and candidates[0][1] < first:
                candidates.popleft()
            if first in outputs:
                taps[outputs[first]] = candidates[0][1] - first if candidates else None
    return taps


def rows(x: torch.Tensor, dim: int) -> Iterator[tuple[tuple[int, ...], list[Any]]]:
    """Every row along dim as a list of Python numbers, with the index of its place among the other dimensions."""
    moved = x.detach().movedim(dim, -1)
    for index in (
        torch.cartesian_prod(*(torch.arange(n) for n in moved.shape[:-1])).reshape(-1, x.dim() - 1).tolist()
        if (x.dim() > 1)
        else [()]
    ):
        yield tuple(index), moved[tuple(index)].tolist()


def deque_extremum(x: torch.Tensor, dim: int, **how: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Values, and int64 taps with -1 for none, by :func:`row_winners` on every row."""
    moved = x.movedim(dim, -1)
    shape = (*moved.shape[:-1], how["out_length"])
    y = torch.full(shape, empty_value(x.dtype, how.get("minimum", False), how.get("ignore_nan", False)), dtype=x.dtype)
    taps = torch.full(shape, -1)
    for index, row in rows(x, dim):
        for i, tap in enumerate(row_winners(row, **how)):
            if tap is not None:
                at = i * how.get("stride", 1) - how.get("left", 0) + tap * how.get("dilation", 1)
                y[(*index, i)] = moved[(*index, source(at, len(row), how.get("mode", "constant")))]
                taps[(*index, i)] = tap
    return y.movedim(-1, dim), taps.movedim(-1, dim)


def run_sums(winners: Sequence[int | None], grads: Sequence[Any], zero: Any) -> dict[int, Any]:
    """Sum of the gradients of each winner, in the order that every backend keeps, in the arithmetic of `grads`.

    Runs of equal winners are cut at multiples of 16 and of 256 outputs. Values are added from left to right within
    16, those sums within 256, those sums in the end. `winners` are those of one phase, in output order.
    """
    sums: dict[int, Any] = {}
    for position in dict.fromkeys(w for w in winners if w is not None):
        at = [i for i, w in enumerate(winners) if w == position]
        total = zero
        for chunk in sorted({i // 256 for i in at}):
            chunk_sum = zero
            for leaf in sorted({i // 16 for i in at if i // 256 == chunk}):
                leaf_sum = zero
                for i in at:
                    if i // 16 == leaf:
                        leaf_sum = leaf_sum + grads[i]
                chunk_sum = chunk_sum + leaf_sum
            total = total + chunk_sum
        sums[position] = total
    return sums


# ---- the operators in PyTorch; signatures as in csrc/sliding_window.cpp ----


def empty_value(dtype: torch.dtype, minimum: bool, ignore_nan: bool) -> float | int | bool:
    """What a window without a value gives: NaN if NaN is ignored, else the neutral element of the dtype."""
    if dtype.is_floating_point:
        return math.nan if ignore_nan else math.inf if minimum else -math.inf
    if dtype == torch.bool:
        return minimum
    limits = torch.iinfo(dtype)
    return limits.max if minimum else limits.min


def offset_dtype(window: int) -> torch.dtype:
    """The narrowest dtype that holds every tap of a window; all bits set means none."""
    return torch.uint8 if window <= 255 else torch.int16 if window <= 32767 else torch.int32


def none_offset(window: int) -> int:
    return 255 if window <= 255 else -1


def source_positions(positions: torch.Tensor, length: int, mode: str) -> torch.Tensor:
    """:func:`source` for a tensor of positions; -1 for none."""
    inside = (positions >= 0) & (positions < length)
    if mode == "constant" or length == 0:
        return torch.where(inside, positions, -1)
    if mode == "nearest":
        return positions.clamp(0, length - 1)
    if mode == "wrap":
        return positions % length
    if mode == "reflect":
        r = positions % (2 * length)
        return torch.where(r < length, r, 2 * length - 1 - r)
    r = positions % max(2 * length - 2, 1)
    return torch.where(r < length, r, 2 * length - 2 - r)


def ordered_keys(x: torch.Tensor, minimum: bool, ignore_nan: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 keys that order as :func:`rank` does, and which elements take part."""
    if not x.is_floating_point():
        keys = x.to(torch.int64)
        return (~keys if minimum else keys), torch.ones_like(x, dtype=torch.bool)
    bits = x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
    lowest = torch.iinfo(bits.dtype).min
    if minimum:
        bits = bits ^ lowest
    keys = torch.where(bits < 0, bits ^ ~lowest, bits).to(torch.int64)
    nan = x.isnan()
    return keys.masked_fill(nan, torch.iinfo(torch.int64).max), ~nan if ignore_nan else torch.ones_like(nan)


def winners(
    x: torch.Tensor,
    dim: int,
    window: int,
    stride: int,
    dilation: int,
    left: int,
    out_length: int,
    mode: str,
    minimum: bool,
    ignore_nan: bool,
    last: bool,
) -> torch.Tensor:
    """int64 taps of the winners, -1 for none: two overlapping windows of the largest power of two, made by doubling."""
    length = x.shape[dim]
    shape = list(x.shape)
    shape[dim] = out_length
    if x.numel() == 0 or out_length == 0:
        return x.new_full(shape, -1, dtype=torch.int64)
    positions = torch.arange((out_length - 1) * stride + (window - 1) * dilation + 1, device=x.device) - left
    at = source_positions(positions, length, mode)
    keys, takes_part = ordered_keys(x.detach(), minimum, ignore_nan)
    keys = keys.index_select(dim, at.clamp(min=0))
    column = [-1 if d == dim else 1 for d in range(x.dim())]
    valid = takes_part.index_select(dim, at.clamp(min=0)) & (at >= 0).reshape(column)
    where = torch.arange(positions.shape[0], device=x.device).reshape(column).expand_as(keys)

    def merged(state: tuple[torch.Tensor, ...], by: int) -> tuple[torch.Tensor, ...]:
        n = state[0].shape[dim] - by
        (ka, va, wa), (kb, vb, wb) = ([t.narrow(dim, o, n) for t in state] for o in (0, by))
        beats = kb >= ka if last else kb > ka
        take_b = vb & (~va | beats)
        return torch.where(take_b, kb, ka), va | vb, torch.where(take_b, wb, wa)

    state = (keys, valid, where)
    span = 1
    while 2 * span <= window:
        state = merged(state, span * dilation)
        span *= 2
    if span < window:
        state = merged(state, (window - span) * dilation)
    starts = torch.arange(out_length, device=x.device) * stride
    _, valid, where = (t.index_select(dim, starts) for t in state)
    taps = torch.div(where - starts.reshape(column), dilation, rounding_mode="floor")
    return torch.where(valid, taps, -1)


def taken(
    x: torch.Tensor, taps: torch.Tensor, dim: int, stride: int, dilation: int, left: int, mode: str
) -> tuple[Any, Any]:
    """x at the winners (anything where there is none), and the winners' indices, -1 for none."""
    column = [-1 if d == dim else 1 for d in range(taps.dim())]
    starts = (torch.arange(taps.shape[dim], device=taps.device) * stride - left).reshape(column)
    index = source_positions(starts + taps * dilation, x.shape[dim], mode)
    index = torch.where(taps < 0, -1, index)
    if x.numel() == 0:
        return x.sum(dim, keepdim=True, dtype=x.dtype).expand(taps.shape), index
    return x.gather(dim, index.clamp(min=0)), index


def extremum_offsets(
    x: torch.Tensor,
    dim: int,
    window: int,
    stride: int,
    dilation: int,
    left: int,
    out_length: int,
    mode: str,
    minimum: bool,
    ignore_nan: bool,
    last: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    taps = winners(x, dim, window, stride, dilation, left, out_length, mode, minimum, ignore_nan, last)
    y, _ = taken(x, taps, dim, stride, dilation, left, mode)
    if y.is_floating_point() and not y.requires_grad:
        y = y.masked_fill(y.isnan(), math.nan)  # one NaN pattern out; a fill would stop the gradient of a NaN
    y = y.masked_fill(taps < 0, empty_value(x.dtype, minimum, ignore_nan))
    return y, torch.where(taps < 0, none_offset(window), taps).to(offset_dtype(window))


def extremum(x: torch.Tensor, *how: Any) -> torch.Tensor:
    return extremum_offsets(x, *how)[0]


def minmax_offsets(x: torch.Tensor, *how: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    *geometry, ignore_nan, last = how
    low, low_at = extremum_offsets(x, *geometry, True, ignore_nan, last)
    high, high_at = extremum_offsets(x, *geometry, False, ignore_nan, last)
    return low, high, low_at, high_at


def minmax(x: torch.Tensor, *how: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return minmax_offsets(x, *how)[:2]


def signed_taps(offsets: torch.Tensor, window: int) -> torch.Tensor:
    taps = offsets.to(torch.int64)
    return torch.where(taps == none_offset(window), -1, taps)


def index(
    offsets: torch.Tensor, dim: int, length: int, window: int, stride: int, dilation: int, left: int, mode: str
) -> torch.Tensor:
    shape = list(offsets.shape)
    shape[dim] = length
    row = torch.empty((), device=offsets.device).expand(shape)
    return taken(row, signed_taps(offsets, window), dim, stride, dilation, left, mode)[1]


def gather(
    values: torch.Tensor, offsets: torch.Tensor, dim: int, window: int, stride: int, dilation: int, left: int, mode: str
) -> torch.Tensor:
    taps = signed_taps(offsets, window)
    return taken(values, taps, dim, stride, dilation, left, mode)[0].masked_fill(taps < 0, 0)


def backward(
    grad_y: torch.Tensor,
    offsets: torch.Tensor,
    dim: int,
    length: int,
    window: int,
    stride: int,
    dilation: int,
    left: int,
    mode: str,
) -> torch.Tensor:
    at = index(offsets, dim, length, window, stride, dilation, left, mode)
    shape = list(offsets.shape)
    shape[dim] = length
    wide = grad_y.to(torch.promote_types(grad_y.dtype, torch.float32)).masked_fill(at < 0, 0)
    if length == 0:
        return grad_y.new_zeros(shape)
    return wide.new_zeros(shape).scatter_add(dim, at.clamp(min=0), wide).to(grad_y.dtype)


# ---- cases of `python -m pyperf_dl.check` ----

# name, shape, dim, window, other arguments. The windows reach every algorithm: doubling, van Herk, blocks of blocks.
_QUICK_CASES: list[tuple[str, tuple[int, ...], int, int, dict[str, Any]]] = [
    ("window 1", (2, 33), -1, 1, {}),
    ("window 3", (3, 259), -1, 3, {}),
    ("even window, same", (2, 131), -1, 32, {"padding": "same"}),
    ("causal, last of ties, NaN ignored", (2, 517), -1, 100, {"padding": "causal", "ties": "last", "nan": "ignore"}),
    ("stride and dilation", (2, 203), -1, 9, {"stride": 3, "dilation": 2, "padding": (5, 11)}),
    ("dim 0", (97, 21), 0, 24, {"padding": "same"}),
    ("longer than the row, reflect", (2, 19), -1, 45, {"padding": "same", "mode": "reflect"}),
    ("window 1500", (1, 4111), -1, 1500, {}),
]
_FULL_CASES = [
    ("window 2", (2, 64), -1, 2, {}),
    ("window 255, wrap", (2, 400), -1, 255, {"padding": "same", "mode": "wrap"}),
    ("window 256, mirror", (2, 400), -1, 256, {"padding": "same", "mode": "mirror"}),
    ("nearest, NaN ignored", (2, 300), -1, 33, {"padding": (40, 3), "mode": "nearest", "nan": "ignore"}),
    ("dim 1 of 3, dilation", (3, 120, 5), 1, 17, {"dilation": 3, "padding": "causal"}),
    ("padding longer than the window", (2, 50), -1, 7, {"padding": (20, 20)}),
    ("window 9000", (1, 20011), -1, 9000, {"padding": "causal"}),
]


def check_cases(device: str, quick: bool) -> Iterator[tuple[Any, ...]]:
    """(operator, case, dtype, run, expected, tolerance); all are held against the deque, bit for bit."""
    import pyperf_dl

    cases = _QUICK_CASES if quick else _QUICK_CASES + _FULL_CASES
    for (name, shape, dim, window, how), dtype in itertools.product(cases, pyperf_dl.sliding_window.DTYPES):
        x = _check_input(shape, dtype)
        there = x.to(device)
        side = functools.cache(functools.partial(_checked_side, x, dim, window, how))
        for op, sides in (("min", (True,)), ("max", (False,)), ("minmax", (True, False))):
            function = getattr(pyperf_dl, f"sliding_window_{op}")
            run = functools.partial(_run_operator, function, there, dim, window, how)
            yield function.__name__, name, dtype, run, functools.partial(_merged, side, sides), 0.0
        if {"ties", "mode"}.isdisjoint(how):
            stream = pyperf_dl.SlidingWindowStream(window, "max", dim, **{"padding": "valid", **how})
            run = functools.partial(_run_stream, stream, there, dim)
            yield "SlidingWindowStream", name, dtype, run, functools.partial(lambda side: side(False)[:1], side), 0.0


def _check_input(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Ties, both ends of the dtype, and the special values of floats."""
    g = torch.Generator().manual_seed(0)
    if dtype == torch.bool:
        return torch.rand(shape, generator=g) < 0.1
    special = [torch.iinfo(dtype).min, torch.iinfo(dtype).max] if not dtype.is_floating_point else _SPECIAL
    x = torch.randint(0, 9, shape, generator=g).to(dtype)
    which = torch.randint(0, 40, shape, generator=g)
    for i, value in enumerate(special):
        x[which == i] = value
    return x


_SPECIAL = [math.inf, -math.inf, math.nan, -0.0, 0.0, -1.0]


def _check_grad(y: torch.Tensor) -> torch.Tensor:
    """Small integers, so that every order of additions gives the same sum."""
    return (torch.arange(y.numel()) % 5 - 2).reshape(y.shape).to(y.dtype)


def _run_operator(
    function: Any, x: torch.Tensor, dim: int, window: int, how: dict[str, Any]
) -> tuple[torch.Tensor, ...]:
    """Values, indices and, for floats, the gradient."""
    leaf = x.clone().requires_grad_(x.is_floating_point())
    out = function(leaf, window, dim, return_indices=True, **how)
    if not leaf.requires_grad:
        return out
    values = out[: len(out) // 2]
    return *out, *torch.autograd.grad(values, leaf, [_check_grad(y).to(y.device) for y in values])


def _run_stream(stream: Any, x: torch.Tensor, dim: int) -> tuple[torch.Tensor, ...]:
    """In chunks of growing length."""
    stream.reset()
    sizes = [*range(1, 60, 7), max(x.shape[dim] // 3, 1)] * x.shape[dim]
    ends = [end for end in itertools.accumulate(sizes) if end < x.shape[dim]]
    return (torch.cat([*map(stream, x.tensor_split(ends, dim)), stream.flush()], dim),)


def _checked_side(
    x: torch.Tensor, dim: int, window: int, how: dict[str, Any], minimum: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values, indices and gradient of one extremum, by the deque and a plain loop over its winners."""
    dim %= x.dim()
    length, stride, dilation = x.shape[dim], how.get("stride", 1), how.get("dilation", 1)
    extent = (window - 1) * dilation + 1
    padding, mode = how.get("padding", "valid"), how.get("mode", "constant")
    words = {"valid": (0, 0), "same": ((extent - 1) // 2, extent // 2), "causal": (extent - 1, 0)}
    left, right = words.get(padding, padding) if isinstance(padding, str) else padding
    out_length = (length + left + right - extent) // stride + 1
    geometry = {"window": window, "stride": stride, "dilation": dilation, "left": left, "mode": mode}
    policy = {"minimum": minimum, "ignore_nan": how.get("nan") == "ignore", "last": how.get("ties") == "last"}
    y, taps = deque_extremum(x, dim, out_length=out_length, **geometry, **policy)
    at = taken(x, taps, dim, stride, dilation, left, mode)[1]
    grad = torch.zeros(x.shape, dtype=torch.float64)
    grad.scatter_add_(dim, at.clamp(min=0), _check_grad(y).double().masked_fill(at < 0, 0))
    return y, at, grad.to(x.dtype)


def _merged(side: Any, sides: tuple[bool, ...]) -> tuple[torch.Tensor, ...]:
    """Values of all sides, indices of all sides, the sum of their gradients for floats."""
    values, indices, grads = zip(*map(side, sides), strict=True)
    return *values, *indices, *([sum(grads[1:], grads[0])] if values[0].is_floating_point() else [])
