"""Values, indices and gradients of the family against the monotonic deque, scipy and the properties of a maximum."""

import math

import numpy as np
import pytest
import scipy.ndimage
import torch
from hypothesis import given
from hypothesis import strategies as st

import pyperf_dl
from pyperf_dl import SlidingWindowStream, sliding_window_max, sliding_window_min, sliding_window_minmax
from pyperf_dl.reference import sliding_window as reference
from pyperf_dl.sliding_window import DTYPES, MODES

FLOATS = [d for d in DTYPES if d.is_floating_point]
OPS = {"max": sliding_window_max, "min": sliding_window_min, "minmax": sliding_window_minmax}
ops = torch.ops.pyperf_dl


def bits(t):
    """Bit patterns, so that NaN, -0 and +0 compare as they are."""
    return t.contiguous().view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


def assert_same(got, want):
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    torch.testing.assert_close(bits(got), bits(want), rtol=0, atol=0)


def sample(shape, dtype, seed=0):
    """Few distinct values, so that ties are common, and every special value of the dtype."""
    g = torch.Generator().manual_seed(seed)
    mask = lambda p: torch.rand(shape, generator=g) < p  # noqa: E731
    if dtype == torch.bool:
        return mask(0.5)
    if not dtype.is_floating_point:
        limits = torch.iinfo(dtype)
        x = torch.randint(max(-3, limits.min), 4, shape, generator=g).to(dtype)
        x[mask(0.1)] = limits.min
        x[mask(0.1)] = limits.max
        return x
    x = torch.randn(shape, generator=g).mul(2).round().to(dtype)
    for value in (math.nan, math.inf, -math.inf, -0.0, 0.0, torch.finfo(dtype).tiny / 2):
        x[mask(0.06)] = value
    return x


@st.composite
def problems(draw):
    """(x, dim, arguments of the operators)"""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.sampled_from([0, 1, 2, 3, 17]), min_size=1, max_size=3))
    dim = draw(st.integers(0, len(shape) - 1))
    shape[dim] = draw(st.sampled_from([0, 1, 2, 3, 5, 16, 31, 33, 67, 130]))
    mode = draw(st.sampled_from(MODES)) if shape[dim] else "constant"
    x = sample(shape, dtype, draw(st.integers(0, 1000)))
    layout = draw(st.permutations(range(len(shape))))
    if draw(st.booleans()):
        x = x.permute(layout).contiguous().permute([layout.index(d) for d in range(len(shape))])
    window = draw(st.sampled_from([1, 2, 3, 4, 7, 8, 9, 16, 17, 31, 33, 64, 65, 127, 129]))
    stride, dilation = draw(st.sampled_from([1, 1, 2, 3, 7])), draw(st.sampled_from([1, 1, 2, 3, 20]))
    extent = (window - 1) * dilation + 1
    left = draw(st.sampled_from([0, 1, extent - 1, (extent - 1) // 2, extent + 3]))
    padded = x.shape[dim] + left + draw(st.sampled_from([0, 2, extent]))
    out_length = max(0, (padded - extent) // stride + 1)
    how = {
        "window": window,
        "stride": stride,
        "dilation": dilation,
        "left": left,
        "out_length": out_length,
        "mode": mode,
        "minimum": draw(st.booleans()),
        "ignore_nan": draw(st.booleans()) and dtype.is_floating_point,
        "last": draw(st.booleans()),
    }
    return x, dim, how


@given(problems())
def test_operators_agree_with_the_deque(problem):
    x, dim, how = problem
    y, taps = reference.deque_extremum(x, dim, **how)
    if y.is_floating_point():
        y = y.masked_fill(y.isnan(), math.nan)
    args = (x, dim, *how.values())
    values, offsets = ops.sliding_window_extremum_offsets(*args)
    assert_same(values, y)
    assert_same(reference.signed_taps(offsets, how["window"]), taps)
    assert_same(ops.sliding_window_extremum(*args), y)
    geometry = (how["window"], how["stride"], how["dilation"], how["left"], how["mode"])
    index = ops.sliding_window_index(offsets, dim, x.shape[dim], *geometry)
    assert_same(index, reference.index(offsets, dim, x.shape[dim], *geometry))
    found = index >= 0
    assert torch.equal(found, taps >= 0)
    if x.numel():
        picked = x.gather(dim, index.clamp(min=0))
        assert_same(bits(picked)[found & ~picked.isnan()], bits(y)[found & ~picked.isnan()])
    both = ops.sliding_window_minmax_offsets(
        x, dim, *geometry[:4], how["out_length"], how["mode"], how["ignore_nan"], how["last"]
    )
    assert_same(both[0 if how["minimum"] else 1], y)
    assert_same(both[2 if how["minimum"] else 3], offsets)


@given(problems(), st.sampled_from(FLOATS))
def test_gradients_agree_with_the_reference(problem, dtype):
    x, dim, how = problem
    geometry = (how["window"], how["stride"], how["dilation"], how["left"], how["mode"])
    offsets = ops.sliding_window_extremum_offsets(x, dim, *how.values())[1]
    grad = torch.randint(-5, 6, offsets.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    got = ops.sliding_window_backward(grad, offsets, dim, x.shape[dim], *geometry)
    assert_same(
        got + 0.0, reference.backward(grad, offsets, dim, x.shape[dim], *geometry) + 0.0
    )  # integers: exact in any order
    values = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    assert_same(
        ops.sliding_window_gather(values, offsets, dim, *geometry), reference.gather(values, offsets, dim, *geometry)
    )


@pytest.mark.parametrize("window", [1, 2, 5, 40, 200, 700])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gradient_sums_in_the_stated_order(window, dtype):
    """Bitwise: leaves of 16, chunks of 256, left to right (reference.run_sums)."""
    x = sample((2, 1500), torch.float32, window).nan_to_num().to(dtype)
    out = x.shape[1] - window + 1
    _, offsets = ops.sliding_window_extremum_offsets(x, 1, window, 1, 1, 0, out, "constant", False, False, False)
    grad = torch.randn(2, out, generator=torch.Generator().manual_seed(3)).to(dtype)
    got = ops.sliding_window_backward(grad, offsets, 1, x.shape[1], window, 1, 1, 0, "constant")
    wide = np.float64 if dtype == torch.float64 else np.float32
    for row in range(2):
        winners = winners_of(offsets[row], window).tolist()
        sums = reference.run_sums(
            winners, list(grad[row].to(torch.float64 if wide is np.float64 else torch.float32).numpy()), wide(0)
        )
        want = np.zeros(x.shape[1], wide)
        for position, total in sums.items():
            want[position] = total
        assert_same(got[row] + 0.0, torch.from_numpy(want).to(dtype) + 0.0)
    minus = ops.sliding_window_backward(-torch.zeros_like(grad), offsets, 1, x.shape[1], window, 1, 1, 0, "constant")
    won = torch.zeros(x.shape, dtype=torch.bool).scatter_(1, winners_of(offsets, window), True)
    assert torch.equal(minus.signbit(), won)  # -0 is the neutral element of the sums


def winners_of(offsets, window):
    return torch.arange(offsets.shape[-1]) + reference.signed_taps(offsets, window)


def test_outputs_without_a_winner_are_passed_over():
    """Also within a run, whose sum goes on behind them, however the row is cut among threads."""
    offsets = torch.arange(29999, -1, -1, dtype=torch.int16)[None].clone()  # one winner for all
    offsets[0, ::3] = -1
    grad = torch.randint(-8, 9, (1, 30000)).float()
    want = grad[offsets >= 0].sum()
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        got = ops.sliding_window_backward(grad, offsets, 1, 60000, 30000, 1, 1, 0, "constant")
        torch.set_num_threads(before)
        assert got[0, 29999] == want
        assert got.count_nonzero() == (want != 0)


def test_gradient_of_folded_edges_sums_in_the_stated_order():
    x = torch.randn(1, 300, generator=torch.Generator().manual_seed(0))
    window, left = 101, 150
    out = 300 + 2 * left - window + 1
    for mode in ("reflect", "mirror", "wrap", "nearest"):
        _, offsets = ops.sliding_window_extremum_offsets(x, 1, window, 1, 1, left, out, mode, False, False, False)
        grad = torch.randn(1, out, generator=torch.Generator().manual_seed(1))
        got = ops.sliding_window_backward(grad, offsets, 1, 300, window, 1, 1, left, mode)
        winners = (torch.arange(out) - left + reference.signed_taps(offsets[0], window)).tolist()
        sums = reference.run_sums(winners, list(grad[0].numpy()), np.float32(0))
        want = np.array([sums.get(j, np.float32(0)) for j in range(300)], np.float32)
        for position in sorted(sums):
            if not 0 <= position < 300:
                want[reference.source(position, 300, mode)] += sums[position]
        assert_same(got[0] + 0.0, torch.from_numpy(want) + 0.0)


# ---- oracles ----


@pytest.mark.parametrize("mode", ["reflect", "nearest", "mirror", "wrap"])
@pytest.mark.parametrize("window", [1, 2, 5, 16, 40, 333, 1000])
def test_scipy_edges(mode, window):
    x = torch.randn(3, 257, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    left = window // 2
    got = sliding_window_max(x, window, padding=(left, window - 1 - left), mode=mode)
    want = scipy.ndimage.maximum_filter1d(x.numpy(), window, axis=1, mode=mode)
    assert_same(got, torch.from_numpy(want))
    got = sliding_window_min(x, window, 0, padding=(left, window - 1 - left), mode=mode)
    want = scipy.ndimage.minimum_filter1d(x.numpy(), window, axis=0, mode=mode)
    assert_same(got, torch.from_numpy(want))


@pytest.mark.parametrize("kernel", [2, 3, 8, 41])
def test_torch_max_pool(kernel):
    x = torch.randn(2, 3, 200, requires_grad=True)
    y, index = torch.nn.functional.max_pool1d(x, kernel, 1, kernel // 2, return_indices=True)
    z, at = sliding_window_max(x, kernel, padding=kernel // 2, return_indices=True)
    assert_same(z, y)
    assert torch.equal(at, index)
    (want,) = torch.autograd.grad((y * y).sum(), x)
    (got,) = torch.autograd.grad((z * z).sum(), x)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("window", [(1, 1), (2, 3), (3, 2), (7, 16)])
@pytest.mark.parametrize("ties", ["first", "last"])
def test_boxes_in_raster_order(window, ties):
    x = torch.randint(0, 3, (2, 20, 30), generator=torch.Generator().manual_seed(0)).float()
    y, at = sliding_window_max(x, window, (1, 2), return_indices=True, ties=ties)
    patches = x.unfold(1, window[0], 1).unfold(2, window[1], 1).flatten(-2)  # [2, H, W, taps]
    assert_same(y, patches.amax(-1))
    equal = patches == patches.amax(-1, keepdim=True)
    order = torch.arange(patches.shape[-1])
    tap = torch.where(equal, order, 10**6).amin(-1) if ties == "first" else torch.where(equal, order, -1).amax(-1)
    rows = torch.arange(y.shape[1])[:, None] + tap // window[1]
    columns = torch.arange(y.shape[2]) + tap % window[1]
    assert torch.equal(at, rows * 30 + columns)
    _, offset = sliding_window_max(x, window, (1, 2), return_indices=True, ties=ties, index="offset")
    assert offset.dtype == torch.uint8
    assert torch.equal(offset.long(), tap)


def test_boxes_agree_with_max_pool2d_and_carry_gradients():
    x = torch.randn(2, 3, 40, 50, requires_grad=True)
    y, index = torch.nn.functional.max_pool2d(x, 5, 1, 2, return_indices=True)
    z, at = sliding_window_max(x, 5, (-2, -1), padding=2, return_indices=True)
    assert_same(z, y)
    assert torch.equal(at, index)
    (want,) = torch.autograd.grad((y * y).sum(), x)
    (got,) = torch.autograd.grad((z * z).sum(), x)
    torch.testing.assert_close(got, want)
    low, high = sliding_window_minmax(x, 5, (-1, -2), padding=2)
    assert_same(high, y)
    assert_same(low, -torch.nn.functional.max_pool2d(-x, 5, 1, 2))


# ---- properties, on windows far above a few dozen ----

ROWS = {
    "random": lambda n, w: torch.randn(n, generator=torch.Generator().manual_seed(n)),
    "ascending": lambda n, w: torch.arange(n).float(),
    "descending": lambda n, w: -torch.arange(n).float(),
    "constant": lambda n, w: torch.full((n,), 2.5),
    "swapped": lambda n, w: (torch.arange(n) ^ 1).float(),
    "saw-teeth": lambda n, w: (torch.arange(n) % w).float(),
    "falling teeth": lambda n, w: -(torch.arange(n) % w).float(),
}


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("window", [2, 63, 64, 65, 255, 256, 257, 1025, 4096, 4113, 9001, 20000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int16, torch.uint8])
def test_long_rows(rows, window, dtype):
    x = ROWS[rows](33333, window).to(dtype)
    for op in (sliding_window_max, sliding_window_min):
        y, at = op(x, window, return_indices=True)
        starts = torch.arange(y.numel())
        assert torch.equal(x[at], y)
        assert bool(((at >= starts) & (at < starts + window)).all())
        assert bool((at.diff() >= 0).all())  # winners never go back
        assert_same(op(x, window), y)
        half = window // 2
        assert_same(op(op(x, half), window - half + 1) if half else y, y)  # w1 then w2 is w1 + w2 - 1
        mirrored, back = op(x.flip(0), window, return_indices=True, ties="last")
        assert_same(mirrored.flip(0), y)
        assert torch.equal(x.numel() - 1 - back.flip(0), at)
    if dtype.is_floating_point:
        assert_same(sliding_window_min(x, window), -sliding_window_max(-x, window))


@pytest.mark.parametrize("window", [49_153, 98_304, 98_319, 98_320, 131_073, 250_000, 399_999])
@pytest.mark.parametrize("padding", ["valid", "same", "causal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_windows_beyond_the_caches(window, padding, dtype):
    """Against repeated doubling over integers that hold value and position."""
    n = 400_000
    row = torch.randint(-9000, 9000, (n,), generator=torch.Generator().manual_seed(window))
    left = {"valid": 0, "same": (window - 1) // 2, "causal": window - 1}[padding]
    right = {"valid": 0, "same": window - 1 - left, "causal": 0}[padding]
    x = row.to(dtype)
    packed = torch.nn.functional.pad((x.long() << 32) + (n - torch.arange(n)), (left, right), value=-(2**62))
    span = 1
    while 2 * span <= window:
        packed = torch.maximum(packed[:-span], packed[span:])
        span *= 2
    want = torch.maximum(packed[: packed.numel() - (window - span)], packed[window - span :])
    y, at = sliding_window_max(x, window, padding=padding, return_indices=True)
    assert_same(y, (want >> 32).to(dtype))
    assert torch.equal(at, n - (want & 0xFFFFFFFF))
    assert_same(sliding_window_max(x, window, padding=padding), y)


@pytest.mark.parametrize("window", [3, 700, 5000])
def test_a_row_is_the_same_in_any_company(window):
    """Neighbours, layout and threads change nothing."""
    x = torch.randn(5, 12345, generator=torch.Generator().manual_seed(0))
    want = torch.stack([sliding_window_max(row, window) for row in x])
    for threads in (1, 2, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            assert_same(sliding_window_max(x, window), want)
            assert_same(sliding_window_max(x.t().contiguous(), window, 0).t(), want)
            assert_same(sliding_window_max(x.t().contiguous().t(), window), want)
        finally:
            torch.set_num_threads(before)


def test_gradient_sums_are_kept():
    x = torch.randn(4, 5000, requires_grad=True)
    grad = torch.randint(-8, 9, (4, 5000)).float()
    sliding_window_max(x, 999, padding="same").backward(grad)
    assert torch.equal(x.grad.sum(1), grad.sum(1))


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_determinism(threads):
    x = torch.randn(3, 40000, generator=torch.Generator().manual_seed(0)).round(decimals=1).requires_grad_()
    grad = torch.randn(3, 40000, generator=torch.Generator().manual_seed(1))
    before = torch.get_num_threads()
    results = []
    try:
        for n in (1, threads):
            torch.set_num_threads(n)
            for _ in range(50):
                y = sliding_window_max(x, 333, padding="same")
                results.append((y.detach(), *torch.autograd.grad(y, x, grad)))
    finally:
        torch.set_num_threads(before)
    for y, gx in results[1:]:
        assert_same(y, results[0][0])
        assert_same(gx, results[0][1])


# ---- policies ----


def test_padding_is_absence():
    x = torch.tensor([-math.inf, -math.inf])
    y, at = sliding_window_max(x, 3, padding=(4, 4), return_indices=True)
    assert y.tolist() == [-math.inf] * 8
    assert at.tolist() == [-1, -1, 0, 0, 0, 1, -1, -1]
    lowest = torch.full((2,), -128, dtype=torch.int8)
    y, at = sliding_window_max(lowest, 3, padding=(4, 4), return_indices=True, ties="last")
    assert y.tolist() == [-128] * 8
    assert at.tolist() == [-1, -1, 0, 1, 1, 1, -1, -1]
    assert sliding_window_min(lowest, 1, padding=(1, 0)).tolist() == [127, -128, -128]


def test_nan_policies():
    x = torch.tensor([1.0, math.nan, 2.0, math.nan, math.nan, 3.0], requires_grad=True)
    assert str(sliding_window_max(x, 2).tolist()) == "[nan, nan, nan, nan, nan]"
    y, at = sliding_window_max(x, 2, nan="ignore", return_indices=True)
    assert str(y.tolist()) == "[1.0, 2.0, 2.0, nan, 3.0]"
    assert at.tolist() == [0, 2, 2, -1, 5]
    y.nan_to_num().sum().backward()
    assert x.grad.tolist() == [1.0, 0.0, 2.0, 0.0, 0.0, 1.0]
    assert sliding_window_max(torch.tensor([1, 5, 2]), 2, nan="ignore").tolist() == [5, 5]  # no effect on integers


@pytest.mark.parametrize("op", ["max", "min", "minmax"])
@pytest.mark.parametrize("dims", [0, (0, 1)])
@pytest.mark.parametrize("mode", ["constant", "reflect", "wrap"])
def test_min_count(op, dims, mode):
    x = sample((13, 11), torch.float32, 5)
    for count in (0, 1, 2, 5):
        for stride, dilation in ((1, 1), (2, 3), (3, 2)):
            how = {"stride": stride, "dilation": dilation, "padding": 9, "mode": mode, "nan": "ignore"}
            plain = OPS[op](x, 3, dims, return_indices=True, **how)
            got = OPS[op](x, 3, dims, return_indices=True, min_count=count, **how)
            valid = (~x.isnan()).double()
            for dim in [dims] if isinstance(dims, int) else dims:
                at = (torch.arange(plain[0].shape[dim]) * stride - 9)[:, None] + torch.arange(3) * dilation
                at = reference.source_positions(at, x.shape[dim], mode)
                taken = valid.index_select(dim, at.clamp(min=0).flatten()).movedim(dim, -1).unflatten(-1, at.shape)
                valid = (taken * (at >= 0)).sum(-1).movedim(-1, dim)
            half = len(got) // 2
            for n, (mine, other) in enumerate(zip(got, plain, strict=True)):
                if n >= half:
                    want = other.masked_fill(valid < count, -1)
                elif count:
                    want = other.masked_fill(valid < count, math.nan)
                else:
                    minimum = op == "min" or (op == "minmax" and n == 0)
                    want = other.masked_fill(valid == 0, math.inf if minimum else -math.inf)
                assert_same(mine, want)


def test_min_count_is_pandas_min_periods():
    pandas = pytest.importorskip("pandas")
    x = sample((200,), torch.float64, 9)
    x[x.isinf()] = math.nan
    for window, periods in ((5, 1), (5, 3), (40, 20)):
        got = sliding_window_max(x, window, padding="causal", nan="ignore", min_count=periods)
        want = pandas.Series(x.numpy()).rolling(window, min_periods=periods).max().to_numpy()
        np.testing.assert_array_equal(got.numpy() + 0.0, want + 0.0)


@pytest.mark.parametrize("window", [1, 255, 256, 32767, 32768])
def test_offset_dtypes(window):
    x = torch.randn(40000)
    y, offsets = sliding_window_max(x, window, padding="causal", return_indices=True, index="offset")
    assert offsets.dtype == (torch.uint8 if window <= 255 else torch.int16 if window <= 32767 else torch.int32)
    assert torch.equal(x[torch.arange(40000) - (window - 1) + offsets.long()], y)


@pytest.mark.parametrize("padding", ["valid", "same", "causal", 3, (0, 7), (50, 60)])
@pytest.mark.parametrize("stride", [1, 2, 5])
@pytest.mark.parametrize("dilation", [1, 3])
def test_lengths(padding, stride, dilation):
    x = torch.randn(40)
    window, length = 6, 40
    extent = (window - 1) * dilation + 1
    y = sliding_window_max(x, window, stride=stride, dilation=dilation, padding=padding)
    if padding in ("same", "causal"):
        left, expected = ((extent - 1) // 2 if padding == "same" else extent - 1), -(-length // stride)
    else:
        left, right = {"valid": (0, 0), 3: (3, 3)}.get(padding, padding)
        expected = (length + left + right - extent) // stride + 1
    row = torch.nn.functional.pad(x, (left, 1000), value=-math.inf)
    want = torch.stack([row[i * stride : i * stride + extent : dilation].max() for i in range(expected)])
    assert_same(y, want)


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_memory_format_is_kept(memory_format):
    x = torch.randn(2, 8, 16, 20).to(memory_format=memory_format)
    for dim in range(4):
        y, offsets = sliding_window_max(x, 2, dim, return_indices=True, index="offset")
        assert y.is_contiguous(memory_format=memory_format)
        assert offsets.stride() == y.stride()
        assert_same(y, sliding_window_max(x.contiguous(), 2, dim))


def test_strided_views():
    base = torch.randn(7, 60, 11)
    views = {
        "every other": base[:, ::2],
        "expanded": base[:1].expand(5, 60, 11),
        "transposed": base.transpose(0, 2),
        "narrowed": base[1:4, 5:40, 2:9],
        "diagonal": base.as_strided((6, 30, 5), (130, 3, 2)),
        "overlapping": base.flatten().unfold(0, 50, 7),
    }
    for x in views.values():
        for dim in range(x.dim()):
            assert_same(
                sliding_window_max(x, 3, dim, padding="same"), sliding_window_max(x.clone(), 3, dim, padding="same")
            )


def test_many_dimensions():
    """More of them than a kernel's row description holds."""
    x = torch.randn([2] * 12).permute(11, 0, 10, 1, 9, 2, 8, 3, 7, 4, 6, 5)[..., :1, :]
    assert_same(sliding_window_max(x, 2, 5), torch.maximum(x.narrow(5, 0, 1), x.narrow(5, 1, 1)))
    grad = torch.randn_like(x.narrow(5, 0, 1))
    leaf = x.clone().requires_grad_()
    sliding_window_max(leaf, 2, 5).backward(grad)
    assert torch.equal(leaf.grad.sum(5, keepdim=True), grad)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 5), (2, 0, 4)])
def test_nothing_in_nothing_out(shape):
    x = torch.zeros(shape, requires_grad=True)
    for dim in range(len(shape)):
        y, at = sliding_window_max(x, 2, dim, padding="same", return_indices=True)
        assert y.shape == at.shape == x.shape
        y.sum().backward()
        assert x.grad.shape == x.shape
    assert sliding_window_max(torch.zeros(0), 2, padding=(3, 0)).tolist() == [-math.inf, -math.inf]


def test_more_than_2_31_elements():
    """Stride-0 views: rows whose positions, and tensors whose elements, do not fit 32 bits."""
    row = torch.zeros(1, dtype=torch.int8).expand(2**31 + 5)
    y = sliding_window_max(row, 2**31 + 4)
    assert y.tolist() == [0, 0]
    rows = torch.ones(1, 1, dtype=torch.int8).expand(2**31 + 7, 1)[-3:]
    assert sliding_window_min(rows, 1).tolist() == [[1], [1], [1]]


def test_windows_of_any_length():
    x = torch.randn(100)
    for padding in ("same", "causal"):
        assert_same(sliding_window_max(x, 2**40, padding=padding)[-1:], x.max()[None])
    assert sliding_window_max(x, 3, dilation=2**40, padding="causal").equal(x)


# ---- autocast, out-of-the-way uses ----


def test_autocast_leaves_dtypes_alone():
    x = torch.randn(20, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = sliding_window_max(x, 3)
        assert y.dtype == torch.float32
        assert sliding_window_max(x.bfloat16(), 3).dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad.dtype == torch.float32


def test_inference_mode_and_views():
    with torch.inference_mode():
        x = torch.randn(20)
        assert sliding_window_max(x, 3).shape == (18,)
    x = torch.randn(20)
    before = x.clone()
    sliding_window_max(x, 1).add_(1)  # never a view of x
    assert torch.equal(x, before)


def test_saved_bytes():
    """The backward keeps 1, 2 or 4 bytes an output, or x itself with recompute."""
    x = torch.randn(50000, requires_grad=True)
    for window, recompute, expected in ((255, False, 1), (3000, False, 2), (40000, False, 4), (40000, True, 4)):
        saved: list[torch.Tensor] = []

        def keep(t, saved=saved):
            saved.append(t)
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            y = sliding_window_max(x, window, recompute=recompute)
        assert sum(t.numel() * t.element_size() for t in saved) == expected * (x if recompute else y).numel()
        if recompute:
            assert saved[0].data_ptr() == x.data_ptr()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("ties", ["first", "last"])
def test_recompute_and_ties_give_the_same_gradient(recompute, ties):
    x = torch.zeros(5, requires_grad=True)
    (grad,) = torch.autograd.grad(sliding_window_max(x, 3, recompute=recompute, ties=ties).sum(), x)
    assert grad.tolist() == ([1, 1, 1, 0, 0] if ties == "first" else [0, 0, 1, 1, 1])


def test_modules():
    x = torch.randn(2, 30)
    for op, module in (
        ("max", pyperf_dl.SlidingWindowMax),
        ("min", pyperf_dl.SlidingWindowMin),
        ("minmax", pyperf_dl.SlidingWindowMinMax),
    ):
        layer = module(5, padding="same", stride=2)
        got, want = layer(x), OPS[op](x, 5, padding="same", stride=2)
        for a, b in zip(*(t if isinstance(t, tuple) else (t,) for t in (got, want)), strict=True):
            assert_same(a, b)
        assert repr(layer) == f"{module.__name__}(window=5, dim=-1, stride=2, padding='same')"


def test_memory_does_not_grow():
    import resource

    x = torch.randn(64, 4096, requires_grad=True)

    def run(times):
        for _ in range(times):
            sliding_window_max(x, 99, padding="same").sum().backward()
            x.grad = None

    run(50)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run(1000)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 16 << 10  # KiB


# ---- streaming ----


@given(
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int16, torch.uint8]),
    st.sampled_from(["max", "min", "minmax"]),
    st.sampled_from([1, 2, 3, 5, 16, 40]),
    st.sampled_from([1, 2, 3]),
    st.sampled_from([1, 2, 3]),
    st.sampled_from(["causal", "same", "valid", (4, 0), (0, 30), (60, 7)]),
    st.lists(st.sampled_from([0, 1, 2, 7, 50, 200]), min_size=1, max_size=6),
    st.sampled_from([None, 0, 1, 2, 3]),
    st.booleans(),
)
def test_any_chunking_gives_the_offline_result(dtype, op, window, stride, dilation, padding, cuts, min_count, ignore):
    x = sample((2, sum(cuts), 3), dtype, sum(cuts))
    how = {"stride": stride, "dilation": dilation, "padding": padding, "nan": "ignore" if ignore else "propagate"}
    if ignore and dtype.is_floating_point:
        how["min_count"] = min_count
    stream = SlidingWindowStream(window, op, 1, **how)
    try:
        want = OPS[op](x, window, 1, **how)
    except ValueError:
        assert padding not in ("causal", "same")  # shorter than the window
        return
    parts = []
    for chunk in x.split(cuts, 1):
        parts.append(stream(chunk))
        resumed = SlidingWindowStream(window, op, 1, **how)
        resumed.load_state_dict(stream.state_dict())
        stream = resumed
    parts.append(stream.flush())
    sides = zip(*parts, strict=True) if op == "minmax" else [parts]
    for got, expected in zip(sides, want if op == "minmax" else [want], strict=True):
        assert_same(torch.cat(got, 1), expected)


def test_stream_state_is_small_and_survives_errors():
    stream = SlidingWindowStream(64, "max")
    x = torch.randn(3, 1000)
    outputs = [stream(chunk) for chunk in x[:, :500].split(7, 1)]
    held = sum(t.numel() for t in stream.state_dict()["_extra_state"]["state"] if isinstance(t, torch.Tensor))
    assert held <= 3 * (2 * 64 + 2)
    errors = [
        (ValueError, torch.randn(4, 5)),
        (ValueError, torch.randn(3, 5, dtype=torch.float64)),
        (ValueError, torch.randn(3, 5, requires_grad=True)),
        (ValueError, torch.randn(3)),
        (ValueError, torch.tensor(1.0)),
        (TypeError, [1.0, 2.0]),
        (TypeError, torch.randn(3, 5, dtype=torch.complex64)),
        (TypeError, torch.randn(3, 5).to_sparse()),
    ]
    for error, chunk in errors:
        with pytest.raises(error, match="SlidingWindowStream: chunk"):
            stream(chunk)
    outputs += [stream(chunk) for chunk in x[:, 500:].split(101, 1)]
    assert_same(torch.cat(outputs, 1), sliding_window_max(x, 64, padding="causal"))
    stream.reset()
    with pytest.raises(ValueError, match="at least one chunk"):
        stream.flush()
    assert_same(stream(x[:2, :9]), sliding_window_max(x[:2, :9], 64, padding="causal"))


def test_stream_checkpoints_are_independent():
    x = torch.randn(2, 60)
    stream, fork = SlidingWindowStream(7), SlidingWindowStream(7)
    stream(x[:, :10])
    fork.load_state_dict(stream.state_dict())
    ours, theirs = [], []
    for n in range(10, 60, 5):  # in turn, on different data
        ours.append(stream(x[:, n : n + 5]))
        theirs.append(fork(-x[:, n : n + 5]))
    other = torch.cat([x[:, :10], -x[:, 10:]], 1)
    assert_same(torch.cat(ours, 1), sliding_window_max(x, 7, padding="causal")[:, 10:])
    assert_same(torch.cat(theirs, 1), sliding_window_max(other, 7, padding="causal")[:, 10:])


@pytest.mark.parametrize(
    "change", [{"window": 6}, {"op": "min"}, {"dilation": 2}, {"nan": "ignore"}, {"padding": "same"}]
)
def test_stream_states_of_other_streams_are_refused(change):
    stream = SlidingWindowStream(**{"window": 3} | change)
    stream(torch.randn(9))
    resumed = SlidingWindowStream(3)
    with pytest.raises(ValueError, match="load_state_dict: state_dict must come from a stream with the same arguments"):
        resumed.load_state_dict(stream.state_dict())
    assert_same(resumed(torch.ones(2)), torch.ones(2))


def test_stream_begun_in_inference_mode():
    x, stream = torch.randn(40), SlidingWindowStream(8)
    with torch.inference_mode():
        first = stream(x[:13])
    assert_same(torch.cat([first.clone(), stream(x[13:])]), sliding_window_max(x, 8, padding="causal"))


# ---- bad input ----

X = torch.zeros(2, 5)
BAD = [
    (TypeError, "x must be a torch.Tensor", lambda f: f([1.0, 2.0], 2)),
    (
        TypeError,
        "x must have one of the dtypes .* got torch.complex64",
        lambda f: f(torch.zeros(5, dtype=torch.complex64), 2),
    ),
    (TypeError, "x must be a dense tensor, got torch.sparse_coo", lambda f: f(torch.zeros(5).to_sparse(), 2)),
    (TypeError, "x must be a dense tensor", lambda f: f(torch.zeros(2, 2).to_sparse_csr(), 2)),
    (ValueError, "x must have at least one dimension", lambda f: f(torch.tensor(1.0), 1)),
    (ValueError, "window must be >= 1, got 0", lambda f: f(X, 0)),
    (ValueError, "window must be >= 1, got -3", lambda f: f(X, -3)),
    (TypeError, "window must be an int, got 2.0", lambda f: f(X, 2.0)),
    (TypeError, "window must be an int, got True", lambda f: f(X, True)),
    (TypeError, "window must be an int, got a tensor torch.int64", lambda f: f(X, torch.tensor(2))),
    (TypeError, "window must be an int, got None", lambda f: f(X, None)),
    (ValueError, "got window 6 > length 5 along dim 1", lambda f: f(X, 6)),
    (
        ValueError,
        r"got window 7 \(window 3 with dilation 3\) > length 6 along dim 1",
        lambda f: f(X, 3, dilation=3, padding=(1, 0)),
    ),
    (ValueError, r"dim must be in \[-2, 1\] .* got 2", lambda f: f(X, 2, 2)),
    (ValueError, "dim must name each dimension once", lambda f: f(X, 2, (0, -2))),
    (ValueError, "dim must name at least one dimension", lambda f: f(X, 2, ())),
    (TypeError, "dim must be an int, got 'x'", lambda f: f(X, 2, "x")),
    (ValueError, "window must have one entry for each of the 2 dims", lambda f: f(X, (2, 2, 2), (0, 1))),
    (ValueError, "stride must be >= 1, got -1", lambda f: f(X, 2, stride=-1)),
    (ValueError, "dilation must be >= 1, got 0", lambda f: f(X, 2, dilation=0)),
    (ValueError, "padding must be one of 'valid', 'same', 'causal', got 'full'", lambda f: f(X, 2, padding="full")),
    (ValueError, "padding must be >= 0, got -1", lambda f: f(X, 2, padding=(-1, 2))),
    (ValueError, "padding must be .* got", lambda f: f(X, 2, padding=(1, 2, 3))),
    (ValueError, "padding must be .* for 1 dims", lambda f: f(X, 2, padding=((1, 2), (3, 4)))),
    (ValueError, "mode must be one of", lambda f: f(X, 2, mode="circular")),
    (ValueError, "nan must be one of 'propagate', 'ignore', got 'skip'", lambda f: f(X, 2, nan="skip")),
    (ValueError, "ties must be one of", lambda f: f(X, 2, ties="any")),
    (ValueError, "index must be one of", lambda f: f(X, 2, index="local")),
    (TypeError, "return_indices must be a bool, got 1", lambda f: f(X, 2, return_indices=1)),
    (TypeError, "min_count needs a float dtype", lambda f: f(X.int(), 2, nan="ignore", min_count=1)),
    (ValueError, "min_count .* needs nan='ignore'", lambda f: f(X, 2, min_count=1)),
    (ValueError, "min_count must be >= 0, got -1", lambda f: f(X, 2, nan="ignore", min_count=-1)),
    (ValueError, "mode='wrap' needs at least one element", lambda f: f(torch.zeros(0), 2, padding=4, mode="wrap")),
    (ValueError, r"window must be < 2\*\*58", lambda f: f(X, 2**60, padding="causal")),
    (ValueError, r"stride must be < 2\*\*58", lambda f: f(X, 2, stride=2**64)),
    (ValueError, r"padding must be < 2\*\*58", lambda f: f(X, 2, padding=(2**61, 5))),
    (ValueError, r"fewer than 2\*\*31 elements", lambda f: f(X, 2**31, padding="same", return_indices=True)),
]


@pytest.mark.parametrize(("error", "message", "call"), BAD, ids=[m for _, m, _ in BAD])
@pytest.mark.parametrize("op", OPS)
def test_bad_input(op, error, message, call):
    with pytest.raises(error, match=f"^sliding_window_{op}: .*{message}"):
        call(OPS[op])
    assert torch.equal(X, torch.zeros(2, 5))


@pytest.mark.filterwarnings("ignore")
def test_quantized_tensors_are_refused():
    x = torch.quantize_per_tensor(torch.zeros(5), 0.1, 0, torch.qint8)
    with pytest.raises(TypeError, match="sliding_window_max: x must be a dense tensor"):
        sliding_window_max(x, 2)


def test_nested_tensors_are_refused():
    with pytest.raises(TypeError, match="sliding_window_max: x must be a dense tensor, got nested"):
        sliding_window_max(torch.nested.nested_tensor([torch.zeros(3), torch.zeros(4)]), 2)


BAD_STREAM = [
    (ValueError, "window must be >= 1", (0,), {}),
    (TypeError, "window must be an int", (2.5,), {}),
    (ValueError, "op must be one of 'max', 'min', 'minmax'", (2, "mean"), {}),
    (ValueError, "padding must be", (2,), {"padding": "full"}),
    (ValueError, "stride must be >= 1", (2,), {"stride": 0}),
    (ValueError, "min_count .* needs nan='ignore'", (2,), {"min_count": 2}),
]


@pytest.mark.parametrize(("error", "message", "args", "how"), BAD_STREAM, ids=[m for _, m, _, _ in BAD_STREAM])
def test_bad_stream(error, message, args, how):
    with pytest.raises(error, match=f"SlidingWindowStream: .*{message}"):
        SlidingWindowStream(*args, **how)


def test_raw_operators_are_memory_safe():
    """What Python checks is checked again where memory is at stake, and foreign offsets lead nowhere."""
    x = torch.randn(2, 10)
    with pytest.raises(RuntimeError, match="dim must be in"):
        ops.sliding_window_extremum(x, 2, 3, 1, 1, 0, 8, "constant", False, False, False)
    with pytest.raises(RuntimeError, match="must be >= 1"):
        ops.sliding_window_extremum(x, 1, 0, 1, 1, 0, 8, "constant", False, False, False)
    with pytest.raises(RuntimeError, match="too long"):
        ops.sliding_window_extremum(x, 1, 2**62, 1, 2, 0, 8, "constant", False, False, False)
    offsets = torch.zeros(2, 10, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="one device"):
        ops.sliding_window_gather(x.to("meta"), offsets, 1, 3, 1, 1, 0, "constant")
    with pytest.raises(RuntimeError, match="offsets of another dtype"):
        ops.sliding_window_backward(x, torch.zeros(2, 10, dtype=torch.int64), 1, 10, 3, 1, 1, 0, "constant")
    with pytest.raises(RuntimeError, match="shape"):
        ops.sliding_window_backward(x, torch.zeros(2, 9, dtype=torch.uint8), 1, 10, 3, 1, 1, 0, "constant")
    wild = torch.randint(0, 256, (2, 10), dtype=torch.uint8)
    for mode in MODES:
        assert ops.sliding_window_backward(x, wild, 1, 10, 200, 1, 7, 3, mode).shape == (2, 10)
        assert ops.sliding_window_gather(x, wild, 1, 200, 1, 7, 3, mode).shape == (2, 10)
