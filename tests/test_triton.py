"""The Triton kernels, in Triton's interpreter (TRITON_INTERPRET=1, set before the kernels are imported) or on a GPU.

`make test` runs this file a second time, in a process of its own, with that variable set.
"""

import importlib.util
import itertools
import os
import random
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch

import pyperf_dl
from pyperf_dl import sliding_window as family
from pyperf_dl.reference import sliding_window as reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

pytestmark = [
    pytest.mark.skipif(
        not INTERPRETED and not torch.cuda.is_available(),
        reason="Triton kernels need TRITON_INTERPRET=1 (a process of its own: `make test` has it) or a CUDA device",
    ),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
]

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
WINDOWS = (1, 2, 3, 7, 8, 9, 16, 33, 100, 257)
PADDINGS = ("valid", "same", "causal")
POLICIES = tuple(itertools.product((False, True), repeat=3))  # minimum, ignore NaN, last of ties


@pytest.fixture
def launcher():
    from pyperf_dl._launch import sliding_window

    return sliding_window


@pytest.fixture
def small_tiles(launcher, monkeypatch):
    """Short rows then take the two-kernel form."""
    monkeypatch.setattr(launcher, "LANES", 64)
    monkeypatch.setattr(launcher, "_TILE_STEP", 4)


@pytest.fixture
def wide_programs(launcher, monkeypatch):
    """The interpreter pays by the program."""
    if INTERPRETED:
        monkeypatch.setattr(launcher, "SUM_LANES", 1 << 14)


def special_rows(dtype, length, seed=0):
    """[3, length]: every special value in turn, a random row, and stretches of NaN, -inf and equal values."""
    chance = torch.Generator().manual_seed(seed)
    if not dtype.is_floating_point:
        low, high = (0, 1) if dtype == torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
        values = torch.tensor([low, low, low + 1 if high > 1 else low, 0, high], dtype=dtype)
        x = values[torch.randint(len(values), (3, length), generator=chance)]
        x[1, : length // 2] = low
        return x
    nan, inf = torch.nan, torch.inf
    values = torch.tensor([-inf, -1.0, -0.0, 0.0, 0.0, -0.0, 1.0, inf, nan, -nan, 1e-7, -65504.0])
    few = values[torch.randint(len(values), (length,), generator=chance)]
    some = torch.randn(length, generator=chance)
    kind = torch.randint(4, (length // 20 + 1,), generator=chance).repeat_interleave(20)[:length]
    runs = torch.tensor([nan, -inf, 0.5, 0.0])[kind]
    runs = torch.where((kind == 3) & (torch.arange(length) % 3 > 0), some, runs)
    return torch.stack([few, some, runs]).to(dtype)


def bits(t):
    """For bitwise comparison on the CPU; NaN has one pattern."""
    t = t.detach().cpu()
    if not t.is_floating_point():
        return t
    t = t.masked_fill(t.isnan(), torch.nan)
    return t.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


def assert_same(got, wanted):
    assert got.dtype == wanted.dtype
    torch.testing.assert_close(bits(got), bits(wanted), rtol=0, atol=0)


def geometry(length, window, padding):
    """left, out_length."""
    return (0, length - window + 1) if padding == "valid" else ((window - 1) // (2 if padding == "same" else 1), length)


def by_deque(x, window, padding, minimum, ignore_nan, last):
    left, out_length = geometry(x.shape[-1], window, padding)
    how = {"minimum": minimum, "ignore_nan": ignore_nan and x.is_floating_point(), "last": last}
    y, taps = reference.deque_extremum(x, -1, window=window, left=left, out_length=out_length, **how)
    none = reference.none_offset(window)
    return y, torch.where(taps < 0, none, taps).to(reference.offset_dtype(window))


def by_triton(x, window, padding, minimum, ignore_nan, last, **kwargs):
    function = pyperf_dl.sliding_window_min if minimum else pyperf_dl.sliding_window_max
    with pyperf_dl.backend("triton"):
        return function(
            x.to(DEVICE),
            window,
            padding=padding,
            nan="ignore" if ignore_nan else "propagate",
            ties="last" if last else "first",
            index="offset",
            **kwargs,
        )


def check_extremum(x, window, padding, policy):
    y, offsets = by_triton(x, window, padding, *policy, return_indices=True)
    wanted, wanted_offsets = by_deque(x, window, padding, *policy)
    assert_same(y, wanted)
    assert_same(offsets, wanted_offsets)


def policies_of(dtype, window, padding):
    """They take turns; with float32 every window meets each of them."""
    turn = 3 * FLOATS.index(dtype) + 5 * WINDOWS.index(window) + PADDINGS.index(padding)
    if dtype != torch.float32:
        return (POLICIES[turn % 8],)
    return POLICIES if turn % 3 == 0 else (POLICIES[turn % 8], POLICIES[7 - turn % 8])


# ---- forward ----


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_extremum(dtype, window):
    x = special_rows(dtype, 300 if window > 100 else 113)
    for padding in PADDINGS:
        for policy in policies_of(dtype, window, padding):
            check_extremum(x, window, padding, policy)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool], ids=str)
def test_extremum_of_integers(dtype):
    x = special_rows(dtype, 90)
    for turn, (window, padding) in enumerate(itertools.product((3, 17), PADDINGS)):
        check_extremum(x, window, padding, POLICIES[turn])


@pytest.mark.parametrize("padding", ["same", "causal"])
@pytest.mark.parametrize("length", [1, 2, 5, 40])
def test_window_longer_than_the_row(length, padding):
    x = special_rows(torch.float32, length)
    for turn, window in enumerate((length + 1, 2 * length + 31, 40_000)):
        check_extremum(x, window, padding, POLICIES[(turn + length) % 8])


def test_longest_window():
    x, window = special_rows(torch.float32, 40), 2**31 - 1
    results = []
    for backend, device in (("triton", DEVICE), ("native", "cpu")):
        with pyperf_dl.backend(backend):
            results.append(
                pyperf_dl.sliding_window_max(
                    x.to(device), window, padding="causal", return_indices=True, index="offset"
                )
            )
    for got, wanted in zip(*results, strict=True):
        assert_same(got, wanted)


def test_more_padding_than_window():
    x = special_rows(torch.float32, 21)
    for window, (left, right) in itertools.product((1, 3, 20), ((50, 0), (0, 50), (7, 60))):
        y, taps = reference.deque_extremum(x, -1, window=window, left=left, out_length=21 + left + right - window + 1)
        got, index = by_triton(x, window, (left, right), False, False, False, return_indices=True)
        assert_same(got, y)
        assert_same(index, torch.where(taps < 0, 255, taps).to(torch.uint8))


@pytest.mark.parametrize("window", [67, 130, 257, 600])
def test_huge_windows(small_tiles, window):
    x = special_rows(torch.float32, 291)[:2]
    for turn, padding in enumerate(PADDINGS if window < 291 else PADDINGS[1:]):
        for policy in (POLICIES[(turn + window) % 8], POLICIES[7 - (turn + window) % 8]):
            check_extremum(x, window, padding, policy)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int8, torch.int64], ids=str)
def test_huge_windows_of_other_dtypes(small_tiles, dtype):
    x = special_rows(dtype, 171)[:2]
    for turn, (window, padding) in enumerate(((70, "same"), (99, "valid"), (150, "causal"))):
        check_extremum(x, window, padding, POLICIES[3 * turn])
        check_extremum(x, window, padding, POLICIES[3 * turn + 1])


def test_tiles_of_tiles(small_tiles, launcher, monkeypatch):
    monkeypatch.setattr(launcher, "LANES", 32)
    x = special_rows(torch.float32, 1301)[1:2]
    check_extremum(x, 1250, "valid", (False, False, True))


def test_every_tile_fits_its_lanes(launcher):
    for reach in itertools.chain(range(2049, 9000), (2**31 - 2, 10**6, 4_194_304, 4_194_303)):
        tile = launcher._tile(reach)
        assert tile + reach % tile <= launcher.LANES < 3 * tile
        assert reach // tile >= 2


def random_geometry(choose):
    """length, window, left, out_length, in any combination."""
    length = choose.choice((0, 1, 2, choose.randint(3, 40), choose.randint(3, 200)))
    window = choose.choice((choose.randint(1, 12), choose.randint(1, 80), choose.randint(1, 400)))
    left = choose.choice((0, window - 1, (window - 1) // 2, choose.randint(0, 300)))
    whole = max(0, length + left - window + 1)
    return length, window, left, choose.choice((0, 1, choose.randint(1, 60), whole, length))


@pytest.mark.parametrize("seed", range(40))
def test_random_geometry(launcher, monkeypatch, seed):
    choose = random.Random(seed)
    monkeypatch.setattr(launcher, "LANES", choose.choice((16, 32, 64, 256)))
    monkeypatch.setattr(launcher, "SUM_LANES", choose.choice((16, 64, 1024)))
    monkeypatch.setattr(launcher, "_TILE_STEP", choose.choice((1, 2, 4)))
    dtype = choose.choice(family.DTYPES)
    length, window, left, out_length = random_geometry(choose)
    x = special_rows(dtype, max(length, 1), seed)[:, :length]
    minimum, ignore_nan, last = choose.choice(POLICIES)
    how = (1, window, 1, 1, left, out_length, "constant", minimum, ignore_nan and dtype.is_floating_point, last)
    back = (1, length, window, 1, 1, left, "constant")
    grad_y = torch.randn(3, out_length, generator=torch.Generator().manual_seed(seed))
    results = []
    for backend, device in (("triton", DEVICE), ("native", "cpu")):
        with pyperf_dl.backend(backend):
            y, offsets = family._extremum_offsets(x.to(device), *how)
            sums = family._backward(grad_y.to(device), offsets, *back)
            taken = family._gather(x.to(device), offsets, 1, *back[2:])
            results.append((y, offsets, sums, taken, family._index(offsets, *back)))
    for got, wanted in zip(*results, strict=True):
        assert_same(got, wanted)


@pytest.mark.parametrize("window", [4, 50])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.uint8], ids=str)
def test_values_alone_and_both_extrema(dtype, window):
    x = special_rows(dtype, 101)
    sides = [by_deque(x, window, "same", minimum, True, False) for minimum in (True, False)]
    for minimum, (wanted, _) in zip((True, False), sides, strict=True):
        assert_same(by_triton(x, window, "same", minimum, True, False), wanted)
    with pyperf_dl.backend("triton"):
        how = {"padding": "same", "nan": "ignore", "index": "offset"}
        values = pyperf_dl.sliding_window_minmax(x.to(DEVICE), window, **how)
        everything = pyperf_dl.sliding_window_minmax(x.to(DEVICE), window, return_indices=True, **how)
    for got, wanted in zip(values, (sides[0][0], sides[1][0]), strict=True):
        assert_same(got, wanted)
    for got, wanted in zip(everything, (sides[0][0], sides[1][0], sides[0][1], sides[1][1]), strict=True):
        assert_same(got, wanted)


def test_values_alone_of_huge_windows(small_tiles):
    x = special_rows(torch.bfloat16, 391)[:2]
    for window, padding in ((100, "valid"), (391, "same")):
        assert_same(
            by_triton(x, window, padding, False, False, False), by_deque(x, window, padding, False, False, False)[0]
        )


def layouts():
    x = torch.randn(2, 3, 20, 17, generator=torch.Generator().manual_seed(1))
    return {
        "contiguous": x,
        "channels_last": x.to(memory_format=torch.channels_last),
        "transposed": x.transpose(0, 3),
        "every other": x[..., ::2],
        "expanded": x[:, :1].expand(2, 3, 20, 17),
        "no rows": x[:0],
        "empty row": x[..., :0],
    }


@pytest.mark.parametrize("layout", layouts())
def test_layouts_and_dims(layout):
    x = layouts()[layout].to(DEVICE)
    for dim in range(4):
        outputs = []
        for backend in ("triton", "native"):
            leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
            with pyperf_dl.backend(backend):
                y, index = pyperf_dl.sliding_window_max(leaf, 3, dim, padding=(2, 1), return_indices=True)
                grad_y = (torch.arange(y.numel(), device=DEVICE) * 37 % 101 / 8).view_as(y)
                (grad,) = torch.autograd.grad(y, leaf, grad_y)
            outputs.append((y.detach(), index, grad))
        for got, wanted in zip(*outputs, strict=True):
            assert_same(got, wanted)
            assert got.stride() == wanted.stride()


def test_two_dims():
    x = special_rows(torch.float32, 7 * 30).view(3, 7, 30)
    results = []
    for backend in ("triton", "reference"):
        with pyperf_dl.backend(backend):
            results.append(
                pyperf_dl.sliding_window_min(x.to(DEVICE), (3, 12), (1, 2), padding="same", return_indices=True)
            )
    for got, wanted in zip(*results, strict=True):
        assert_same(got, wanted)


# ---- gradients ----


def gradient_rows(length, window):
    """[6, length]: rows whose runs of equal winners are as short and as long as can be."""
    ramp = torch.arange(length, dtype=torch.float32)
    spikes = torch.where(ramp % (window + 7) == 5, 1e4, torch.sin(ramp))
    gaps = torch.where((ramp % 97 < 60), torch.nan, ramp % 13)
    return torch.stack([torch.randn(length), torch.zeros(length), ramp, -ramp, spikes, gaps])


GRADIENTS = [*itertools.product((1, 30, 257), (torch.float32, torch.bfloat16)), *itertools.product((3, 700), FLOATS)]


@pytest.mark.parametrize(("window", "dtype"), GRADIENTS, ids=str)
def test_gradient_has_the_bits_of_native(wide_programs, window, dtype):
    torch.manual_seed(window)
    length = 70 if window < 4 else 2 * window + 100
    x = gradient_rows(length, window)
    for padding, ties in (("valid", "first"), ("causal", "last")):
        left, out_length = geometry(length, window, padding)
        how = (1, window, 1, 1, left, out_length, "constant", False, True, ties == "last")
        with pyperf_dl.backend("native"):
            _, offsets = family._extremum_offsets(x, *how)
        grad_y = torch.randn(len(x), out_length).to(dtype)
        grad_y[:, ::5] = -0.0
        grad_y[0, 3:5] = torch.inf
        results = []
        for backend in ("triton", "native"):
            on = DEVICE if backend == "triton" else "cpu"
            with pyperf_dl.backend(backend):
                results.append(
                    family._backward(grad_y.to(on), offsets.to(on), 1, length, window, 1, 1, left, "constant")
                )
        assert_same(*results)


@pytest.mark.parametrize("lanes", [32, 128])
def test_gradient_of_runs_across_programs(launcher, monkeypatch, lanes):
    monkeypatch.setattr(launcher, "SUM_LANES", lanes)
    x = gradient_rows(400, 290)[3:5].requires_grad_()
    grad_y = torch.randn(2, 400, generator=torch.Generator().manual_seed(4))
    results = []
    for backend, device in (("triton", DEVICE), ("native", "cpu")):
        with pyperf_dl.backend(backend):
            y = pyperf_dl.sliding_window_max(x.to(device), 290, padding="causal")
            results += torch.autograd.grad(y, x, grad_y.to(device))
    assert_same(*results)


def test_gradient_has_the_order_of_the_specification(wide_programs):
    torch.manual_seed(0)
    length, window = 700, 400
    x = torch.sin(torch.arange(length) / 61.0)[None] + (torch.arange(length) == 350)
    y, offsets = by_triton(x, window, "causal", False, False, False, return_indices=True)
    grad_y = torch.randn(1, length).to(y.device)
    with pyperf_dl.backend("triton"):
        got = family._backward(grad_y, offsets, 1, length, window, 1, 1, window - 1, "constant")
    winners = (torch.arange(length) - window + 1 + offsets[0].cpu()).tolist()
    sums = reference.run_sums(winners, grad_y[0].cpu().numpy(), np.float32(-0.0))
    wanted = torch.tensor([sums.get(j, np.float32(0)) for j in range(length)])
    assert_same(got[0], wanted)


def test_offsets_that_no_forward_makes_touch_nothing(wide_programs):
    grad_y = torch.ones(2, 40, device=DEVICE)
    offsets = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(3)).to(torch.uint8).to(DEVICE)
    with pyperf_dl.backend("triton"):
        assert family._backward(grad_y, offsets, 1, 9, 255, 1, 1, 3, "constant").shape == (2, 9)
        assert family._index(offsets, 1, 9, 255, 1, 1, 3, "constant").max() < 9
        assert family._gather(grad_y[:, :9], offsets, 1, 255, 1, 1, 3, "constant").shape == (2, 40)


def test_shapes_that_do_not_belong_together_raise():
    grad_y, offsets = torch.ones(2, 40, device=DEVICE), torch.zeros(2, 40, dtype=torch.uint8, device=DEVICE)
    with pyperf_dl.backend("triton"):
        with pytest.raises(ValueError, match=r"must have shape \[2, 40\], got \[2, 39\]"):
            family._backward(grad_y[:, 1:], offsets, 1, 42, 3, 1, 1, 0, "constant")
        with pytest.raises(ValueError, match=r"must have shape \[2, 40\], got \[1, 40\]"):
            family._gather(grad_y[:1], offsets, 1, 3, 1, 1, 0, "constant")
        with pytest.raises(ValueError, match=r"offsets of window 300 must be torch.int16"):
            family._index(offsets, 1, 42, 300, 1, 1, 0, "constant")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.uint8, torch.bool], ids=str)
def test_gather_and_index(dtype):
    x = special_rows(torch.float32, 90)
    left, out_length = geometry(90, 20, "causal")
    _, offsets = reference.extremum_offsets(x, 1, 20, 1, 1, left, out_length, "constant", False, True, False)
    values, offsets = special_rows(dtype, 90, seed=5).to(DEVICE), offsets.to(DEVICE)
    with pyperf_dl.backend("triton"):
        taken = family._gather(values, offsets, 1, 20, 1, 1, left, "constant")
        index = family._index(offsets, 1, 90, 20, 1, 1, left, "constant")
    assert_same(taken, reference.gather(values, offsets, 1, 20, 1, 1, left, "constant"))
    assert_same(index, reference.index(offsets, 1, 90, 20, 1, 1, left, "constant"))


# ---- how PyTorch sees the operators ----


def weighted(x):
    y = pyperf_dl.sliding_window_max(x, 3, padding="same")
    return (y * torch.arange(y.shape[-1], dtype=y.dtype, device=y.device)).sin().sum()


TRANSFORMS = {
    "grad": lambda x: torch.func.grad(weighted)(x[0]),
    "vmap": lambda x: torch.func.vmap(weighted, in_dims=1)(x),
    "vmap of grad": lambda x: torch.func.vmap(torch.func.grad(weighted))(x),
    "grad of vmap": lambda x: torch.func.grad(lambda x: torch.func.vmap(weighted)(x).sum())(x),
    "jvp": lambda x: torch.func.jvp(weighted, (x,), (torch.cos(x),))[1],
    "jacfwd": lambda x: torch.func.jacfwd(weighted)(x),
    "hessian": lambda x: torch.func.hessian(weighted)(x[0]),
    "autograd": lambda x: torch.autograd.grad(weighted(x), x, create_graph=True)[0].square().sum(),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms(transform):
    x = torch.randn(2, 6, dtype=torch.float64, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(2))
    x.requires_grad_(transform == "autograd")
    results = []
    for backend in ("triton", "native"):
        with pyperf_dl.backend(backend):
            results.append(TRANSFORMS[transform](x))
    torch.testing.assert_close(*results, rtol=0, atol=1e-12)


def operator_samples():
    how = (1, 3, 1, 1, 1, 8, "constant")
    back = (1, 8, 3, 1, 1, 1, "constant")
    offsets = torch.tensor([[1, 2, 1, 0, 1, 0, 255, 255]] * 2, dtype=torch.uint8)
    return {
        "extremum": lambda x: (x, *how, True, False, False),
        "extremum_offsets": lambda x: (x, *how, True, True, True),
        "minmax": lambda x: (x, *how, False, False),
        "minmax_offsets": lambda x: (x, *how, False, True),
        "backward": lambda x: (x, offsets.to(DEVICE), *back),
        "gather": lambda x: (x, offsets.to(DEVICE), 1, *back[2:]),
        "index": lambda x: (offsets.to(DEVICE), *back),
    }


@pytest.mark.parametrize("name", operator_samples())
def test_opcheck(name):
    operator = getattr(family, f"_{name}")
    x = torch.randn(2, 8, device=DEVICE, requires_grad=name != "index")
    torch.library.opcheck(operator.triton.op, operator_samples()[name](x))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled(backend):
    torch._dynamo.reset()
    x = torch.randn(2, 30, device=DEVICE, requires_grad=True)
    with pyperf_dl.backend("triton"):
        compiled = torch.compile(weighted, fullgraph=True, backend=backend)
        got, wanted = compiled(x), weighted(x)
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)
        torch.testing.assert_close(*(torch.autograd.grad(y, x)[0] for y in (got, wanted)), rtol=0, atol=0)


def test_registration_inside_the_compiler():
    """The Triton forms are registered when they are first needed, and the compiler cannot trace that."""
    code = (
        "import torch, pyperf_dl\n"
        "def f(x):\n"
        "    with pyperf_dl.backend('triton'):\n"
        "        return pyperf_dl.sliding_window_max(x, 3)\n"
        "print(torch.compile(f, fullgraph=True, backend='eager')(torch.arange(5.0)))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=interpreted("1"), check=False
    )
    assert run.stdout.strip() == "tensor([2., 3., 4.])", run.stderr


@pytest.mark.parametrize("option", [{"stride": 2}, {"dilation": 2}, {"mode": "reflect", "padding": "same"}], ids=str)
def test_what_is_not_covered_runs_the_reference(launcher, option):
    launcher._warn_uncovered.cache_clear()
    x = special_rows(torch.float32, 41).to(DEVICE)
    with pyperf_dl.backend("triton"), pytest.warns(UserWarning, match="runs the reference"):
        got = pyperf_dl.sliding_window_max(x, 5, return_indices=True, **option)
    with warnings.catch_warnings(), pyperf_dl.backend("triton"):
        warnings.simplefilter("error")  # once is enough
        pyperf_dl.sliding_window_max(x, 5, return_indices=True, **option)
    with pyperf_dl.backend("reference"):
        wanted = pyperf_dl.sliding_window_max(x, 5, return_indices=True, **option)
    for a, b in zip(got, wanted, strict=True):
        assert_same(a, b)


# ---- processes that are not interpreted ----


def interpreted(value):
    return {**os.environ, "TRITON_INTERPRET": value}


def test_cpu_tensors_need_the_interpreter():
    code = "import torch, pyperf_dl\nwith pyperf_dl.backend('triton'): pyperf_dl.sliding_window_max(torch.zeros(5), 3)"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=interpreted("0"), check=False
    )
    assert "RuntimeError: pyperf_dl: the triton backend needs a GPU" in run.stderr


def test_importing_the_package_loads_neither_triton_nor_the_compiler():
    code = "import sys, pyperf_dl\nprint([m for m in ('triton', 'torch._dynamo') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize("target", ["cuda:90:32", "hip:gfx942:64"])
def test_every_kernel_compiles(target):
    """What the interpreter accepts is not all Triton; no GPU is needed to compile for one."""
    command = [sys.executable, __file__, target]
    run = subprocess.run(command, capture_output=True, text=True, env=interpreted("0"), check=False)
    assert run.returncode == 0, run.stderr
    kernels = {"direct_windows", "van_herk_windows", "tile_extrema", "take_winners", "sum_runs"}
    assert kernels <= set(run.stdout.split())


class _AbsentGpu:
    """As much of a Triton driver as compiling asks for."""

    def __init__(self, target):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def _compile_for(target):
    """Compiles what calls of every form would launch, and prints the kernels' names."""
    import triton
    from triton.backends.compiler import GPUTarget

    from pyperf_dl._launch import sliding_window as launcher

    kind, architecture, warp = target.split(":")
    triton.runtime.driver.set_active(
        _AbsentGpu(GPUTarget(kind, int(architecture) if architecture.isdigit() else architecture, int(warp)))
    )

    def compiled(kernel, programs, on, *args, **constants):
        kernel.warmup(*args, grid=(programs,), **constants)
        print(kernel.__name__)

    launcher._launch, launcher._check_device = compiled, lambda t: None
    for dtype, window in ((torch.bfloat16, 5), (torch.float64, 20), (torch.float32, 5000)):
        x = torch.zeros(2, 6000, dtype=dtype)
        out_length = 6000 - window + 1
        how = (1, window, 1, 1, 0, out_length, "constant", False, False, False)
        launcher.extremum(x, *how)
        _, offsets = launcher.extremum_offsets(x, *how)
        launcher.backward(x[:, :out_length], offsets, 1, 6000, window, 1, 1, 0, "constant")
    launcher.extremum(x > 0, *how[:-3], True, False, True)
    launcher.gather(x, offsets, 1, window, 1, 1, 0, "constant")
    launcher.index(offsets, 1, 6000, window, 1, 1, 0, "constant")


if __name__ == "__main__":
    _compile_for(sys.argv[1])
