"""Launches the Triton kernels of kernels/triton/sliding_window.py; signatures as in csrc/sliding_window.cpp.

The window dimension is made the dense one; what :func:`covers` rules out runs the reference.
"""

from __future__ import annotations

import functools
import math
import warnings
from typing import Any, NamedTuple

import torch
import triton

from pyperf_dl._triton import sliding_window as kernels
from pyperf_dl.reference import sliding_window as reference
from pyperf_dl.sliding_window import _laid_out

from . import common

COVERED = "every dtype, window, length and padding with mode 'constant', stride 1 and dilation 1"

LANES = 2048  # longest tile; longer windows take two kernels
SUM_LANES = 1024
DIRECT_WINDOW = 8
_TILE_STEP = 16  # tiles begin at multiples of this many elements, for the sake of alignment
_ELEMENTS_A_WARP = 256
_LEAF, _CHUNK = 16, 256  # of the fixed order of summation, kernels/math/sliding_window.h

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_INFINITIES = {
    torch.float16: 0x7C00,
    torch.bfloat16: 0x7F80,
    torch.float32: 0x7F800000,
    torch.float64: 0x7FF0000000000000,
}


def covers(stride: int, dilation: int, mode: str) -> bool:
    """Whether the kernels serve these arguments; see COVERED."""
    return mode == "constant" and stride == 1 and dilation == 1


@functools.cache
def _warn_uncovered(name: str, kind: str) -> None:
    warnings.warn(f"pyperf_dl: {name} with {kind} runs the reference; triton covers {COVERED}", stacklevel=4)


def _uncovered(name: str, stride: int, dilation: int, mode: str) -> bool:
    if covers(stride, dilation, mode):
        return False
    _warn_uncovered(name, f"mode={mode!r}" if mode != "constant" else "stride > 1" if stride > 1 else "dilation > 1")
    return True


# ---- keys ----


class OrderedKey(NamedTuple):
    """kernels/math/ordered_key.h: what turns the bits of a dtype into keys and back."""

    pre: int
    float_mask: int
    infinity: int
    nan: int
    empty_bits: int
    top_bits: int


def _ordered_key(dtype: torch.dtype, minimum: bool, ignore_nan: bool) -> OrderedKey:
    lowest = -(1 << (8 * dtype.itemsize - 1))
    highest = ~lowest
    if dtype.is_floating_point:
        infinity = _INFINITIES[dtype]
        canonical_nan = infinity | (infinity & -infinity) >> 1
        empty = canonical_nan if ignore_nan else infinity ^ (0 if minimum else lowest)
        return OrderedKey(
            lowest if minimum else 0, highest, infinity, lowest if ignore_nan else highest, empty, canonical_nan
        )
    pre = (-1 if minimum else 0) ^ (0 if dtype.is_signed else lowest)
    empty = int(minimum) if dtype == torch.bool else lowest ^ pre
    return OrderedKey(pre, 0, highest, lowest, empty, highest ^ pre)


# ---- rows and launches ----


def _as_integers(t: torch.Tensor) -> torch.Tensor:
    return t.view(_INTEGERS[t.element_size()])


def _rows(t: torch.Tensor, dim: int) -> torch.Tensor:
    """[rows, length], dense; a copy where dim is not the dense one."""
    moved = t.movedim(dim, -1)
    return moved.reshape(math.prod(moved.shape[:-1]), moved.shape[-1]).contiguous()


def _row_buffer(out: torch.Tensor, dim: int) -> torch.Tensor:
    """The memory of `out` as [rows, length], or as much new memory where dim is not the dense one."""
    moved = out.movedim(dim, -1)
    shape = math.prod(moved.shape[:-1]), moved.shape[-1]
    return moved.view(shape) if moved.is_contiguous() else out.new_empty(shape)


def _fill(out: torch.Tensor, dim: int, rows: torch.Tensor) -> torch.Tensor:
    """`out`, with `rows` copied into it unless they are its own memory."""
    if rows.data_ptr() != out.data_ptr():
        moved = out.movedim(dim, -1)
        moved.copy_(rows.view(moved.shape))
    return out


def _check_device(t: torch.Tensor) -> None:
    common.check_device(t, kernels.direct_windows)


def _launch(kernel: Any, programs: int, on: torch.Tensor, *args: Any, **constants: int) -> None:
    warps = max(1, min(8, constants["LANES"] * constants.get("SEGMENTS", 1) // _ELEMENTS_A_WARP))
    with common.on_device_of(on):
        kernel[(programs,)](*args, **constants, num_warps=warps)


def _segments(pieces: int, lanes: int, most: int) -> int:
    """Pieces of `lanes` elements that one program takes."""
    return min(most // lanes, triton.next_power_of_2(pieces))


def _blocks(rows: int, length: int, most: int) -> tuple[int, int, int]:
    """Lanes, blocks a row, segments a program, where any cut of the rows will do."""
    lanes = min(most, triton.next_power_of_2(length))
    blocks = triton.cdiv(length, lanes)
    return lanes, blocks, _segments(rows * blocks, lanes, most)


# ---- forward ----


class _Windows(NamedTuple):
    """Window i holds the positions [i - left, i - left + window) of its row; `taps_before` lie in front of those."""

    window: int
    left: int
    taps_before: int

    @staticmethod
    def clipped(window: int, left: int, length: int, out_length: int) -> _Windows:
        """Without the taps that lie in the padding for every output: no window is longer than the padded row."""
        before = max(0, min(left - (out_length - 1), window - 1))
        window, left = window - before, left - before
        return _Windows(min(window, max(1, length + left)), left, before)


def _extrema(
    x: torch.Tensor,
    y: torch.Tensor,
    winners: torch.Tensor | None,
    key: OrderedKey,
    window: int,
    left: int,
    last: bool,
    tile_winners: torch.Tensor | None = None,
) -> None:
    """Fills y and winners [rows, out_length] from x [rows, length], all dense and x, y integers.

    `winners` gets taps, or, where the elements of x are tiles, the winners of the tiles that won.
    """
    if y.numel() == 0:
        return
    windows = _Windows.clipped(window, left, x.shape[1], y.shape[1])
    form = _direct if windows.window <= DIRECT_WINDOW else _van_herk
    form(x, y, winners, tile_winners, windows, last, key)


def _direct(
    x: torch.Tensor,
    y: torch.Tensor,
    winners: torch.Tensor | None,
    tile_winners: torch.Tensor | None,
    windows: _Windows,
    last: bool,
    key: OrderedKey,
) -> None:
    (rows, length), out_length = x.shape, y.shape[1]
    lanes, blocks, segments = _blocks(rows, out_length, LANES)
    _launch(
        kernels.direct_windows,
        triton.cdiv(rows * blocks, segments),
        x,
        *(x, y, winners, tile_winners, rows, length, out_length, blocks, *windows, int(last), key),
        SEGMENTS=segments,
        LANES=lanes,
    )


def _van_herk(
    x: torch.Tensor,
    y: torch.Tensor,
    winners: torch.Tensor | None,
    tile_winners: torch.Tensor | None,
    windows: _Windows,
    last: bool,
    key: OrderedKey,
) -> None:
    (rows, length), out_length = x.shape, y.shape[1]
    reach = windows.window - 1
    tile, lanes = reach, triton.next_power_of_2(reach)
    if reach > LANES:
        tile, lanes = _tile(reach), LANES
    tiles = triton.cdiv(out_length, tile)
    middle = middle_winners = None
    if reach > LANES:
        middle, middle_winners = _between(x, winners is not None, tiles, tile, reach, windows.left, last, key)
    segments = _segments(rows * tiles, lanes, LANES)
    _launch(
        kernels.van_herk_windows,
        triton.cdiv(rows * tiles, segments),
        x,
        *(x, y, winners, tile_winners, middle, middle_winners),
        *(rows, length, out_length, tiles, *windows, tile, reach % tile, int(last), key),
        SEGMENTS=segments,
        LANES=lanes,
    )


def _tile(reach: int) -> int:
    """The longest tile for windows that end `reach` > LANES elements after their start: tile + reach % tile fits."""
    return next(t for t in range(LANES, 0, -_TILE_STEP) if t + reach % t <= LANES)


def _between(
    x: torch.Tensor, with_winners: bool, tiles: int, tile: int, reach: int, left: int, last: bool, key: OrderedKey
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Keys and winners [rows, tiles] of the whole tiles that lie in every window of a tile: windows over tiles."""
    rows, length = x.shape
    between = reach // tile - 1
    # Only tiles that hold an element of the row: padding must not win over the lowest integer.
    first = max(1, left // tile)
    kept = max(0, min(tiles + between, triton.cdiv(left + length, tile)) - first)
    keys = x.new_empty(rows, kept)
    at = x.new_empty(rows, kept, dtype=torch.int64) if with_winners else None
    if keys.numel():
        sizes = (length, kept, first, left, tile, int(last), key)
        _launch(kernels.tile_extrema, rows * kept, x, x, keys, at, *sizes, LANES=LANES)
    middle = x.new_empty(rows, tiles)
    middle_at = x.new_empty(rows, tiles, dtype=torch.int64) if with_winners else None
    _extrema(keys, middle, middle_at, _ordered_key(keys.dtype, False, False), between, first - 1, last, at)
    return middle, middle_at


def _side(
    x: torch.Tensor, key: OrderedKey, dim: int, window: int, left: int, out_length: int, last: bool, offsets: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Values and, where asked for, offsets of one extremum."""
    _check_device(x)
    y = _laid_out(x, dim, out_length, x.dtype)
    at = _laid_out(x, dim, out_length, reference.offset_dtype(window)) if offsets else None
    y_rows = _row_buffer(y, dim)
    at_rows = None if at is None else _row_buffer(at, dim)
    _extrema(_as_integers(_rows(x, dim)), _as_integers(y_rows), at_rows, key, window, left, last)
    return _fill(y, dim, y_rows), None if at is None else _fill(at, dim, at_rows)


def extremum_offsets(x, dim, window, stride, dilation, left, out_length, mode, minimum, ignore_nan, last):
    if _uncovered("sliding_window_extremum_offsets", stride, dilation, mode):
        return reference.extremum_offsets(
            x, dim, window, stride, dilation, left, out_length, mode, minimum, ignore_nan, last
        )
    return _side(x, _ordered_key(x.dtype, minimum, ignore_nan), dim, window, left, out_length, last, True)


def extremum(x, dim, window, stride, dilation, left, out_length, mode, minimum, ignore_nan, last):
    if _uncovered("sliding_window_extremum", stride, dilation, mode):
        return reference.extremum(x, dim, window, stride, dilation, left, out_length, mode, minimum, ignore_nan, last)
    return _side(x, _ordered_key(x.dtype, minimum, ignore_nan), dim, window, left, out_length, last, False)[0]


def minmax_offsets(x, dim, window, stride, dilation, left, out_length, mode, ignore_nan, last):
    if _uncovered("sliding_window_minmax_offsets", stride, dilation, mode):
        return reference.minmax_offsets(x, dim, window, stride, dilation, left, out_length, mode, ignore_nan, last)
    keys = [_ordered_key(x.dtype, minimum, ignore_nan) for minimum in (True, False)]
    (low, low_at), (high, high_at) = (_side(x, key, dim, window, left, out_length, last, True) for key in keys)
    return low, high, low_at, high_at


def minmax(x, dim, window, stride, dilation, left, out_length, mode, ignore_nan, last):
    if _uncovered("sliding_window_minmax", stride, dilation, mode):
        return reference.minmax(x, dim, window, stride, dilation, left, out_length, mode, ignore_nan, last)
    keys = [_ordered_key(x.dtype, minimum, ignore_nan) for minimum in (True, False)]
    return tuple(_side(x, key, dim, window, left, out_length, last, False)[0] for key in keys)


# ---- what follows from winners ----


def _sums(grad_y: torch.Tensor, offsets: torch.Tensor, grad_x: torch.Tensor, left: int) -> None:
    """Fills grad_x [rows, length]; pass by pass over outputs, leaves and chunks, each adding what runs on."""
    values, winners = grad_y, offsets
    grad_x.zero_()
    for group in (_LEAF, 2 * _CHUNK // _LEAF, 0):  # a group leaves two partial sums: of its first and last run
        rows, items = values.shape
        if items <= group:
            group = 0
        sums = sum_winners = None
        if group:
            groups = triton.cdiv(items, group)
            wide = torch.float64 if values.dtype == torch.float64 else torch.float32
            sums = values.new_empty(rows, 2 * groups, dtype=wide)
            sum_winners = values.new_empty(rows, 2 * groups, dtype=torch.int64)
        lanes, blocks, segments = _blocks(rows, items, SUM_LANES)
        _launch(
            kernels.sum_runs,
            triton.cdiv(rows * blocks, segments),
            values,
            *(values, winners, grad_x, sums, sum_winners, rows, items, grad_x.shape[1], blocks, left),
            OFFSETS=winners is offsets,
            GROUP=group,
            SEGMENTS=segments,
            LANES=lanes,
        )
        if not group:
            return
        values, winners = sums, sum_winners


def _check_offsets(offsets: torch.Tensor, window: int, companion: torch.Tensor, dim: int, size: int) -> None:
    """What memory safety needs: `companion` has `size` elements along dim and is shaped as the offsets elsewhere."""
    expected = [*offsets.shape[:dim], size, *offsets.shape[dim + 1 :]]
    if list(companion.shape) != expected:
        raise ValueError(f"sliding_window: values or gradients must have shape {expected}, got {list(companion.shape)}")
    if offsets.dtype != reference.offset_dtype(window):
        raise ValueError(f"sliding_window: offsets of window {window} must be {reference.offset_dtype(window)}")


def _storage(t: torch.Tensor) -> torch.Tensor:
    """bfloat16 as bits: the interpreter has no such arithmetic."""
    return t.view(torch.int16) if t.dtype == torch.bfloat16 else t


def backward(grad_y, offsets, dim, length, window, stride, dilation, left, mode):
    if _uncovered("sliding_window_backward", stride, dilation, mode):
        return reference.backward(grad_y, offsets, dim, length, window, stride, dilation, left, mode)
    _check_device(grad_y)
    _check_offsets(offsets, window, grad_y, dim, offsets.shape[dim])
    grad_x = _laid_out(offsets, dim, length, grad_y.dtype)
    if grad_x.numel() == 0 or grad_y.numel() == 0:
        return grad_x.zero_()
    rows = _row_buffer(grad_x, dim)
    _sums(_storage(_rows(grad_y, dim)), _rows(offsets, dim), _storage(rows), left)
    return _fill(grad_x, dim, rows)


def _taken(
    values: torch.Tensor | None, offsets: torch.Tensor, out: torch.Tensor, dim: int, length: int, left: int
) -> torch.Tensor:
    _check_device(offsets)
    if out.numel() == 0:
        return out
    taps, to = _rows(offsets, dim), _row_buffer(out, dim)
    rows, out_length = taps.shape
    lanes, blocks, segments = _blocks(rows, out_length, LANES)
    bits = None if values is None else _as_integers(_rows(values, dim))
    sizes = (rows, length, out_length, blocks, left)
    programs = triton.cdiv(rows * blocks, segments)
    _launch(kernels.take_winners, programs, taps, bits, taps, _as_integers(to), *sizes, SEGMENTS=segments, LANES=lanes)
    return _fill(out, dim, to)


def gather(values, offsets, dim, window, stride, dilation, left, mode):
    if _uncovered("sliding_window_gather", stride, dilation, mode):
        return reference.gather(values, offsets, dim, window, stride, dilation, left, mode)
    _check_offsets(offsets, window, values, dim, values.shape[dim])
    out = _laid_out(offsets, dim, offsets.shape[dim], values.dtype)
    return _taken(values, offsets, out, dim, values.shape[dim], left)


def index(offsets, dim, length, window, stride, dilation, left, mode):
    if _uncovered("sliding_window_index", stride, dilation, mode):
        return reference.index(offsets, dim, length, window, stride, dilation, left, mode)
    _check_offsets(offsets, window, offsets, dim, offsets.shape[dim])
    return _taken(None, offsets, _laid_out(offsets, dim, offsets.shape[dim], torch.int64), dim, length, left)
