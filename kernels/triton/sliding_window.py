"""Extrema of sliding windows along dense rows, and what follows from their winners (kernels/math/sliding_window.h).

A program takes SEGMENTS pieces of rows, each of up to LANES elements; tensors are [SEGMENTS, LANES]. Elements come as
signed integers of the dtype's width and are compared as the keys of kernels/math/ordered_key.h. A winner is a position
in its row, -1 for none. Pointers that are None switch a part of a kernel off.
"""

import triton
import triton.language as tl

# ---- ordered keys ----


@triton.jit
def _encode(bits, key):
    """Narrow dtypes are widened first: sign extension commutes with everything that makes a key."""
    WIDTH: tl.constexpr = bits.dtype.primitive_bitwidth
    HIGHEST: tl.constexpr = 2 ** (WIDTH - 1) - 1
    wide = bits.to(tl.int64 if WIDTH == 64 else tl.int32)
    natural = wide ^ key.pre
    ordered = natural ^ ((natural >> (WIDTH - 1)) & key.float_mask)
    return tl.where((natural & HIGHEST) > key.infinity, key.nan, ordered)


@triton.jit
def _store_decoded(y, to, ordered, mask, key):
    WIDTH: tl.constexpr = y.dtype.element_ty.primitive_bitwidth
    HIGHEST: tl.constexpr = 2 ** (WIDTH - 1) - 1
    natural = ordered ^ ((ordered >> (WIDTH - 1)) & key.float_mask) ^ key.pre
    bits = tl.where(ordered == HIGHEST, key.top_bits, natural)
    bits = tl.where(ordered == -HIGHEST - 1, key.empty_bits, bits)
    tl.store(y + to, bits.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _load_keys(x, row, position, wanted, length, key):
    """Keys at `position`, and which of them belong to values: not to padding, and not to a NaN that is ignored."""
    LOWEST: tl.constexpr = -(2 ** (x.dtype.element_ty.primitive_bitwidth - 1))
    inside = wanted & (position >= 0) & (position < length)
    bits = tl.load(x + row * length + position, mask=inside, other=0)
    ordered = tl.where(inside, _encode(bits, key), LOWEST)
    return ordered, inside & ((ordered != LOWEST) | (key.float_mask == 0))


# ---- winners ----


@triton.jit
def _greater(a, b):
    return tl.maximum(a, b)


@triton.jit
def _preferred(key_a, rank_a, key_b, rank_b):
    take_b = (key_b > key_a) | ((key_b == key_a) & (rank_b > rank_a))
    return tl.where(take_b, key_b, key_a), tl.where(take_b, rank_b, rank_a)


@triton.jit
def _ranks(lane, valid, last, LANES: tl.constexpr):
    """Of equal keys the higher rank wins; -1 for what is no value. Its own inverse, for valid ranks."""
    return tl.where(valid, tl.where(last != 0, lane, LANES - 1 - lane), -1)


@triton.jit
def _later(key_a, at_a, key_b, at_b, last):
    """The winner of two pieces of a window, b behind a."""
    tie = tl.where(last != 0, at_b >= 0, at_a < 0)
    take_b = (key_b > key_a) | ((key_b == key_a) & tie)
    return tl.where(take_b, key_b, key_a), tl.where(take_b, at_b, at_a)


@triton.jit
def _store_winners(winners, to, at, start, mask, row, length, tile_winners):
    """Stores taps counted from `start`, or, where the elements are tiles, the winners of the tiles."""
    if tile_winners is None:
        value = tl.where(at < 0, -1, at - start)
    else:
        value = tl.load(tile_winners + row * length + at, mask=mask & (at >= 0), other=-1)
    tl.store(winners + to, value.to(winners.dtype.element_ty), mask=mask)


@triton.jit
def _segments(rows, per_row, SEGMENTS: tl.constexpr):
    """Row and number within it of this program's segments, and which of them exist, each [SEGMENTS, 1]."""
    segment = tl.program_id(0).to(tl.int64) * SEGMENTS + tl.arange(0, SEGMENTS)[:, None]
    return segment // per_row, segment % per_row, segment < rows.to(tl.int64) * per_row


# ---- forward ----


@triton.jit(do_not_specialize=["window", "left", "taps_before", "last"])
def direct_windows(
    x,  # [rows, length]
    y,  # [rows, out_length]
    winners,  # like y, or None
    tile_winners,  # like x, or None
    rows,
    length,
    out_length,
    blocks,
    window,
    left,
    taps_before,
    last,
    key,
    SEGMENTS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Short windows: reads each tap, through the cache."""
    row, block, exists = _segments(rows, blocks, SEGMENTS)
    output = block * LANES + tl.arange(0, LANES)[None, :]
    mask = exists & (output < out_length)
    start = output - left
    best, valid = _load_keys(x, row, start, mask, length, key)
    at = tl.where(valid, start, -1)
    for tap in range(1, window):
        keys, valid = _load_keys(x, row, start + tap, mask, length, key)
        if winners is None:
            best = tl.maximum(best, keys)
        else:
            best, at = _later(best, at, keys, tl.where(valid, start + tap, -1), last)
    to = row * out_length + output
    _store_decoded(y, to, best, mask, key)
    if winners is not None:
        _store_winners(winners, to, at, start - taps_before, mask, row, length, tile_winners)


@triton.jit(do_not_specialize=["window", "left", "taps_before", "skip", "last"])
def van_herk_windows(
    x,  # [rows, length]
    y,  # [rows, out_length]
    winners,  # like y, or None
    tile_winners,  # like x, or None
    middle,  # [rows, tiles] keys, or None
    middle_winners,  # like middle, or None
    rows,
    length,
    out_length,
    tiles,
    window,
    left,
    taps_before,
    tile,
    skip,
    last,
    key,
    SEGMENTS: tl.constexpr,
    LANES: tl.constexpr,
):
    """A window is the end of the tile it starts in, the tiles between, and the beginning of what follows them.

    Tile k holds the window starts k * tile ... (k + 1) * tile - 1, in the lanes skip ... skip + tile - 1; the element
    window - 1 further on ends the window of its lane. `skip` = (window - 1) mod tile lanes in front belong to the
    elements between the last whole tile and the first of those ends, so tile + skip <= LANES.
    """
    row, k, exists = _segments(rows, tiles, SEGMENTS)
    lane = tl.arange(0, LANES)[None, :]
    output = k * tile + lane - skip
    start = output - left
    end = start + window - 1
    own = exists & (lane >= skip) & (lane < skip + tile)
    mask = own & (output < out_length)
    tails, tail_valid = _load_keys(x, row, start, own, length, key)
    heads, head_valid = _load_keys(x, row, end, exists & (lane < skip + tile) & (output < out_length), length, key)
    to = row * out_length + output
    if winners is None:
        best = tl.associative_scan(tails, 1, _greater, reverse=True)
        if middle is not None:
            best = tl.maximum(best, tl.load(middle + row * tiles + k, mask=exists, other=0))
        best = tl.maximum(best, tl.associative_scan(heads, 1, _greater))
    else:
        best, rank = tl.associative_scan((tails, _ranks(lane, tail_valid, last, LANES)), 1, _preferred, reverse=True)
        tail_lane = _ranks(rank, rank >= 0, last, LANES)
        at = tl.where(rank >= 0, start - lane + tail_lane, -1)
        if middle is not None:
            between = tl.load(middle + row * tiles + k, mask=exists, other=0)
            between_at = tl.load(middle_winners + row * tiles + k, mask=exists, other=-1)
            best, at = _later(best, at, between.to(best.dtype), between_at, last)
        ahead, rank = tl.associative_scan((heads, _ranks(lane, head_valid, last, LANES)), 1, _preferred)
        head_lane = _ranks(rank, rank >= 0, last, LANES)
        best, at = _later(best, at, ahead, tl.where(rank >= 0, end - lane + head_lane, -1), last)
        _store_winners(winners, to, at, start - taps_before, mask, row, length, tile_winners)
    _store_decoded(y, to, best, mask, key)


@triton.jit(do_not_specialize=["first", "left", "last"])
def tile_extrema(
    x,  # [rows, length]
    keys,  # [rows, tiles]
    winners,  # like keys, or None
    length,
    tiles,
    first,
    left,
    tile,
    last,
    key,
    LANES: tl.constexpr,
):
    """Key, and winner, of the tiles first, first + 1, ... of the padded row."""
    segment = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    begin = (first + segment % tiles) * tile - left
    ordered, valid = _load_keys(x, segment // tiles, begin + lane, lane < tile, length, key)
    if winners is None:
        best = tl.max(ordered, axis=0)
    else:
        best, rank = tl.reduce((ordered, _ranks(lane, valid, last, LANES)), 0, _preferred)
        tl.store(winners + segment, tl.where(rank >= 0, begin + _ranks(rank, rank >= 0, last, LANES), -1))
    tl.store(keys + segment, best.to(keys.dtype.element_ty))


# ---- what follows from winners ----


@triton.jit
def _load_taps(offsets, at, wanted):
    """Taps in 32 bits, -1 for none."""
    taps = tl.load(offsets + at, mask=wanted, other=0)
    NONE: tl.constexpr = 255 if offsets.dtype.element_ty == tl.uint8 else -1
    return tl.where(taps == NONE, -1, taps.to(tl.int32))


@triton.jit(do_not_specialize=["left"])
def take_winners(
    values,  # [rows, length] bits, or None
    offsets,  # [rows, out_length]
    out,  # like offsets
    rows,
    length,
    out_length,
    blocks,
    left,
    SEGMENTS: tl.constexpr,
    LANES: tl.constexpr,
):
    """The winners' values, zero for none; without values their positions, -1 for none."""
    row, block, exists = _segments(rows, blocks, SEGMENTS)
    output = block * LANES + tl.arange(0, LANES)[None, :]
    mask = exists & (output < out_length)
    to = row * out_length + output
    taps = _load_taps(offsets, to, mask)
    at = output - left + taps
    inside = mask & (taps >= 0) & (at >= 0) & (at < length)
    if values is None:
        tl.store(out + to, tl.where(inside, at, -1), mask=mask)
    else:
        tl.store(out + to, tl.load(values + row * length + at, mask=inside, other=0), mask=mask)


@triton.jit
def _load_winners(winners, row, item, wanted, items, left, OFFSETS: tl.constexpr):
    """Winners of outputs or of partial sums.

    An output without a winner gets the start of its window: nothing else can have won there, and the order is kept.
    """
    if OFFSETS:
        return item - left + tl.maximum(_load_taps(winners, row * items + item, wanted), 0)
    else:
        return tl.load(winners + row * items + item, mask=wanted, other=0)


@triton.jit
def _load_summands(values, winners, row, item, wanted, items, OFFSETS: tl.constexpr):
    """Gradients in the type they are added in; int16 stands for the bits of bfloat16."""
    value = tl.load(values + row * items + item, mask=wanted, other=0)
    if values.dtype.element_ty == tl.int16:
        value = (value.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    if values.dtype.element_ty == tl.float16:
        value = value.to(tl.float32)
    if OFFSETS:
        value = tl.where(_load_taps(winners, row * items + item, wanted) < 0, 0.0, value)
    return value


@triton.jit
def _store_sums(grad_x, to, total, mask):
    """Rounds to nearest even; bfloat16 by hand, as kernels/math/half.h does."""
    if grad_x.dtype.element_ty == tl.int16:
        bits = total.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        tl.store(grad_x + to, tl.where(total == total, rounded, 0x7FC0).to(tl.int16), mask=mask)
    else:
        tl.store(grad_x + to, total.to(grad_x.dtype.element_ty), mask=mask)


@triton.jit
def _negative_zeros(like):
    """Bit by bit: Triton 3.4 takes the constant -0.0 for 0."""
    WIDTH: tl.constexpr = like.dtype.primitive_bitwidth
    bits = tl.full(like.shape, -(2 ** (WIDTH - 1)), tl.int64 if WIDTH == 64 else tl.int32)
    return bits.to(like.dtype, bitcast=True)


@triton.jit(do_not_specialize=["left"])
def sum_runs(
    values,  # [rows, items] gradients, or the partial sums of the pass before
    winners,  # like values: offsets of outputs, or winners of partial sums
    grad_x,  # [rows, length], zero where nothing is written
    sums,  # [rows, groups, 2], for the next pass; None in the last one
    sum_winners,  # like sums
    rows,
    items,
    length,
    blocks,
    left,
    OFFSETS: tl.constexpr,
    GROUP: tl.constexpr,
    SEGMENTS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Adds runs of equal winners, from left to right within groups of GROUP items.

    The lane of a run's first item adds the run. Runs inside a group are complete; the first and the last of a group go
    to the next pass, the last one as -0, which changes no sum, where it is also the first.
    """
    row, block, exists = _segments(rows, blocks, SEGMENTS)
    item = block * LANES + tl.arange(0, LANES)[None, :]
    mask = exists & (item < items)
    winner = _load_winners(winners, row, item, mask, items, left, OFFSETS)
    before = _load_winners(winners, row, item - 1, mask & (item > 0), items, left, OFFSETS)
    first = item % GROUP == 0 if sums is not None else item == 0
    stop = tl.minimum((item // GROUP + 1) * GROUP, items) if sums is not None else item * 0 + items
    starts = mask & (first | (before != winner))
    total = _load_summands(values, winners, row, item, mask, items, OFFSETS)
    end = item + 1
    open_runs = starts & (end < stop)
    while tl.max(tl.max(open_runs.to(tl.int32), axis=1), axis=0) > 0:
        follows = open_runs & (_load_winners(winners, row, end, open_runs, items, left, OFFSETS) == winner)
        total = tl.where(follows, total + _load_summands(values, winners, row, end, follows, items, OFFSETS), total)
        end = tl.where(follows, end + 1, end)
        open_runs = follows & (end < stop)
    complete = starts & (winner >= 0) & (winner < length)
    if sums is not None:
        touches_end = end == stop
        to = (row * tl.cdiv(items, GROUP) + item // GROUP) * 2
        tl.store(sums + to, total, mask=starts & first)
        tl.store(sum_winners + to, winner, mask=starts & first)
        tl.store(sums + to + 1, tl.where(first, _negative_zeros(total), total), mask=starts & touches_end)
        tl.store(sum_winners + to + 1, winner, mask=starts & touches_end)
        complete = complete & ~first & ~touches_end
    _store_sums(grad_x, row * length + winner, total, complete)
