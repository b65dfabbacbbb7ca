"""Rational-quadratic splines: values, gradients and routes against the reference in float64, mpmath and nflows."""

import importlib.util
import itertools
import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.library import opcheck

import pyperf_dl
from pyperf_dl import _coupling_spline as family
from pyperf_dl import rational_quadratic_spline, rational_quadratic_spline_packed
from pyperf_dl.reference import coupling as reference

ROOT = Path(__file__).resolve().parent.parent
TAILS, PARAMETRIZATIONS = reference.TAILS, reference.PARAMETRIZATIONS
BINS = (1, 2, 3, 5, 7, 8, 10, 16, 17, 32, 33, 64, 256)
DTYPES = [(d, d) for d in family.DTYPES] + [(torch.float32, d) for d in family.HALF_DTYPES]  # of x, of the parameters
HOWS = list(itertools.product(TAILS, PARAMETRIZATIONS, (False, True)))
UNIT = 1024  # elements whose log-dets are summed at a time (kernels/common/sample_units.h)
ops = torch.ops.pyperf_dl


def bits(t):
    """Bit patterns with one NaN."""
    t = t.detach().masked_fill(t.isnan(), math.nan).contiguous()
    return t.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


def assert_same(got, want):
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    torch.testing.assert_close(bits(got), bits(want), rtol=0, atol=0)


def count(bins, tails):
    return 2 * bins + reference.derivative_count(bins, tails)


def split(params, bins):
    return params.split((bins, bins, params.shape[-1] - 2 * bins), -1)


def sample(shape, bins, tails="linear", dtypes=(torch.float32, torch.float32), sigma=1.0, bound=3.0, seed=0):
    """x, mostly inside the box and both ends of it, and packed parameters."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g).mul(bound / 2).to(dtypes[0])
    if x.numel() > 4:
        x.view(-1)[:4] = torch.tensor([-bound, bound, 1.5 * bound, -1.5 * bound])
    return x, torch.randn(*shape, count(bins, tails), generator=g).mul(sigma).to(dtypes[1])


def weights(t):
    """Gradients that come in: a few numbers that every dtype has."""
    return (0.5 + torch.arange(t.numel()).remainder(8).view(t.shape) / 8).to(t.dtype)


def results(x, params, bins, separate=False, **how):
    """y, log-det, and the gradients of x and of the packed parameters for fixed gradients of both."""
    x, params = x.detach().requires_grad_(), params.detach().requires_grad_()
    if separate:
        y, logdet = rational_quadratic_spline(x, *split(params, bins), **how)
    else:
        y, logdet = rational_quadratic_spline_packed(x, params, bins, **how)
    gx, gp = torch.autograd.grad((y, logdet), (x, params), (weights(y), weights(logdet)))
    return y.detach(), logdet.detach(), gx, gp


def truth(x, params, bins, **how):
    """The same by the reference in float64."""
    with pyperf_dl.backend("reference"):
        return results(x.double(), params.double(), bins, **how)


def ulp(dtype, size):
    """Spacing of the dtype at numbers of that size, float64."""
    info = torch.finfo(dtype)
    size = size.abs().clamp(min=info.tiny)
    return torch.exp2(size.log2().floor()) * info.eps


# ---- values and gradients ----


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("how", HOWS, ids=str)
def test_exact_mode_rounds_once(dtypes, how):
    """All but float64 itself: within half a unit in the last place, a little more for what float64 leaves."""
    tails, parametrization, inverse = how
    bins = 8
    x, params = sample((300,), bins, tails, dtypes, 2.0)
    options = {"tails": tails, "parametrization": parametrization, "inverse": inverse, "tail_bound": 3.0}
    got = results(x, params, bins, precision="exact", **options)
    want = truth(x, params, bins, **options)
    for name, a, b in zip(("y", "logdet", "gx", "gp"), got, want, strict=True):
        if a.dtype == torch.float64:
            allowed = 1e-8 * b.abs() + 1e-8  # so far off is the reference
        else:
            allowed = 0.5001 * ulp(a.dtype, b) + 1e-8
        assert bool(((a.double() - b).abs() <= allowed).all()), name


@pytest.mark.parametrize("bins", BINS)
def test_every_number_of_bins(bins):
    """float64 against the reference; float32 within a few roundings of its intermediate values in most elements."""
    for tails, parametrization, inverse in HOWS if bins < 64 else HOWS[::3]:
        options = {"tails": tails, "parametrization": parametrization, "inverse": inverse, "tail_bound": 2.0}
        x, params = sample((67 if bins < 64 else 19,), bins, tails, (torch.float64, torch.float64), 1.5, 2.0)
        want = truth(x, params, bins, **options)
        for separate in (False, True):
            for a, b in zip(results(x, params, bins, separate, **options), want, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)
        x, params = x.float(), params.float()
        want = truth(x, params, bins, **options)
        for dtype in (torch.float32, torch.bfloat16, torch.float16) if bins < 17 else (torch.float32,):
            got = results(x, params.to(dtype), bins, **options)
            if dtype != torch.float32:
                want = truth(x, params.to(dtype), bins, **options)
            for a, b in zip(got, want, strict=True):
                assert a.isfinite().all()
                if not b.numel():
                    continue
                error = (a.double() - b).abs() / (b.abs() + 1)
                rounding = torch.finfo(a.dtype).eps
                growth = max(1, bins / 8)  # of the box against a bin
                assert error.quantile(0.5) <= 2e-6 * growth + rounding
                assert error.quantile(0.95) <= 2e-4 * growth + rounding


def test_float64_against_mpmath():
    """Where the two float64 forms disagree most, the kernel is the one that is right; gradients too."""
    mpmath = pytest.importorskip("mpmath")
    mp = mpmath.mp.clone()
    mp.prec = 200
    bins, bound, least = 8, 3, mp.mpf(1e-3)

    def sized(raw):
        e = [mp.exp(r) for r in raw]
        return [2 * bound * (least + (1 - least * bins) * v / mp.fsum(e)) for v in e]

    def spline(x, params, inverse):
        w, h = sized(params[:bins]), sized(params[bins : 2 * bins])
        d = [mp.mpf(1), *(least + mp.log1p(mp.exp(r)) for r in params[2 * bins :]), mp.mpf(1)]
        edges = [[-bound + mp.fsum(sizes[:k]) for k in range(bins)] for sizes in (w, h)]
        k = max(k for k in range(bins) if k == 0 or x >= edges[inverse][k])
        s = h[k] / w[k]
        if inverse:
            z = (x - edges[1][k]) / h[k]
            a = s - d[k] + z * (d[k] + d[k + 1] - 2 * s)
            b = d[k] - z * (d[k] + d[k + 1] - 2 * s)
            t = 2 * s * z / (b + mp.sqrt(b * b + 4 * a * s * z))
        else:
            t = (x - edges[0][k]) / w[k]
        below = s + (d[k] + d[k + 1] - 2 * s) * t * (1 - t)
        slope = s**2 * (d[k + 1] * t**2 + 2 * s * t * (1 - t) + d[k] * (1 - t) ** 2) / below**2
        if inverse:
            return edges[0][k] + t * w[k], -mp.log(slope)
        return edges[1][k] + h[k] * (s * t**2 + d[k] * t * (1 - t)) / below, mp.log(slope)

    for inverse, sigma in itertools.product((False, True), (3.0, 10.0)):
        x, params = sample((4000,), bins, dtypes=(torch.float64, torch.float64), sigma=sigma)
        inside = x.abs() < bound
        x, params = x[inside], params[inside]
        how = {"inverse": inverse, "tail_bound": float(bound)}
        got, other = results(x, params, bins, **how), truth(x, params, bins, **how)
        disagree = ((got[1] - other[1]).abs() + (got[0] - other[0]).abs()).topk(4).indices
        for i in [*disagree.tolist(), 0, 1]:
            xs, ps = mp.mpf(x[i].item()), [mp.mpf(v) for v in params[i].tolist()]
            y, logdet = spline(xs, ps, inverse)
            assert abs(got[0][i].item() - y) <= 1e-12
            assert abs(got[1][i].item() - logdet) <= 1e-7
            gy = weights(x)[i].item()

            def loss(j, v, xs=xs, ps=ps, gy=gy, inverse=inverse):
                y, logdet = spline(v, ps, inverse) if j < 0 else spline(xs, [*ps[:j], v, *ps[j + 1 :]], inverse)
                return gy * (y + logdet)

            for j in (-1, 0, bins - 1, bins + 2, 2 * bins + 1):
                at = xs if j < 0 else ps[j]
                step = mp.mpf(2) ** -70
                slope = (loss(j, at + step) - loss(j, at - step)) / (2 * step)
                mine = got[2][i].item() if j < 0 else got[3][i, j].item()
                assert abs(mine - slope) <= 1e-7 * abs(slope) + 1e-12


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("sigma", [1.0, 4.0, 10.0])
def test_exact_mode_keeps_its_promise(sigma, inverse):
    """y within 1 ulp, a row's log-det within 1e-5 nats, gradients within 1e-7 relative."""
    bins, bound = 8, 3.0
    x, params = sample((512, 32), bins, sigma=sigma)
    how = {"inverse": inverse, "tail_bound": bound}
    got = results(x, params, bins, precision="exact", **how)
    want = results(x.double(), params.double(), bins, **how)
    size = want[0].abs().clamp(min=bound / 1024)
    assert bool(((got[0].double() - want[0]).abs() <= ulp(torch.float32, size)).all())
    rows = rational_quadratic_spline_packed(x, params, bins, precision="exact", logdet="sum", **how)[1]
    want_rows = want[1].sum(1)
    assert bool(((rows.double() - want_rows).abs() <= (0.501 * ulp(torch.float32, want_rows)).clamp(min=1e-5)).all())
    for a, b in zip(got[2:], want[2:], strict=True):
        assert bool(((a.double() - b).abs() <= 1e-7 * b.abs() + 1e-44).all())


@pytest.fixture(scope="module")
def accuracy():
    """bench/accuracy_coupling.py: what prints the table of the docs page measures here too."""
    spec = importlib.util.spec_from_file_location("accuracy_coupling", ROOT / "bench" / "accuracy_coupling.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(("bins", "sigma"), [(8, 1.0), (8, 4.0), (32, 1.0)])
def test_fast_mode_is_no_worse_than_nflows(accuracy, monkeypatch, bins, sigma, inverse):
    """At the 50, 90 and 99 % quantiles; up to twice at 99.9 % and in the largest error.

    Errors are absolute, those of the gradient of x relative but for the largest. One element is no measure, so the
    largest is the median of those of 16 parts.
    """
    pytest.importorskip("nflows")
    monkeypatch.setattr(accuracy, "BINS", bins)
    x, params = accuracy.inputs(1 << 14, sigma, 3)
    for loss in ("y", "log-det"):
        fast, peer, want = (
            accuracy.outputs(f, x.to(d), params.to(d), inverse, loss)
            for f, d in (
                (accuracy.ours("nflows"), torch.float32),
                (accuracy.nflows_spline, torch.float32),
                (accuracy.ours("nflows"), torch.float64),
            )
        )
        for i, name in enumerate(accuracy.OUTPUTS):
            if loss == "log-det" and i < 2:
                continue  # done
            assert fast[i].isfinite().all()
            found = [accuracy.errors(t[i], want[i], relative=i == 2) for t in (fast, peer)]
            largest = [
                torch.tensor(
                    [accuracy.errors(a, b)[-1] for a, b in zip(t[i].chunk(16), want[i].chunk(16), strict=True)]
                ).median()
                for t in (fast, peer)
            ]
            for q, mine, other in zip(accuracy.QUANTILES, *(f[:-1] for f in found), strict=True):
                assert mine <= other * (1 if q <= 0.99 else 2), (name, loss, q)
            assert largest[0] <= 2 * largest[1], (name, loss)


@pytest.mark.parametrize("dtype", family.HALF_DTYPES)
def test_16_bit_outputs_round_once(dtype):
    """y within 1 ulp of the dtype of the exact value, in fast mode too."""
    for inverse in (False, True):
        x, params = sample((4000,), 8, dtypes=(dtype, dtype), sigma=2.0)
        y, logdet = rational_quadratic_spline_packed(x, params, 8, tail_bound=3.0, inverse=inverse)
        want = truth(x, params, 8, tail_bound=3.0, inverse=inverse)[0]
        assert logdet.dtype == torch.float32
        assert bool(((y.double() - want).abs() <= ulp(dtype, want) + 1e-4).all())


def test_options():
    """Everything that changes the function, each against the reference, and against what it means."""
    x, params = sample((200,), 6, "bounded", (torch.float64, torch.float64), 2.0)
    for inverse in (False, True):
        for how in (
            {"bounds": (-2.0, 1.0, 5.0, 5.5)},
            {"bounds": [-1.0, 3.0, -2.0, 0.0], "min_bin_width": 0.1, "min_bin_height": 0.01, "min_derivative": 0.3},
            {"identity_init": True, "tail_bound": 2.0},
            {"logit_scale": 0.3, "tail_bound": 2.0},
            {"parametrization": "zuko", "slope": 1e-2, "logit_scale": 2.0},
            {"min_bin_width": 0.0, "min_bin_height": 0.0},
        ):
            how = {"tails": "bounded", "inverse": inverse, **how}
            at = x + 4 if inverse and "bounds" in how and how["bounds"][2] == 5.0 else x
            for a, b in zip(results(at, params, 6, **how), truth(at, params, 6, **how), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
    zeros = torch.zeros(50, 3 * 6 - 1, dtype=torch.float64)
    at = torch.linspace(-3, 3, 50, dtype=torch.float64)
    for how in ({"identity_init": True}, {"parametrization": "zuko"}):
        y, logdet = rational_quadratic_spline_packed(at, zeros, 6, tail_bound=2.0, **how)
        torch.testing.assert_close(y, at)
        torch.testing.assert_close(logdet, torch.zeros_like(at))
    scaled = rational_quadratic_spline(x, *split(params[:, :17], 6), logit_scale=0.25)
    w, h, d = split(params[:, :17], 6)
    torch.testing.assert_close(rational_quadratic_spline(x, w / 4, h / 4, d), scaled)
    bounds = rational_quadratic_spline_packed(x, params[:, :17], 6, bounds=(-2.0, 2.0, -2.0, 2.0))
    for a, b in zip(bounds, rational_quadratic_spline_packed(x, params[:, :17], 6, tail_bound=2.0), strict=True):
        assert_same(a, b)
    # circular: the last knot has the slope of the first
    circular = rational_quadratic_spline_packed(x.clamp(-1, 1), params[:, :18], 6, tails="circular")
    closed = torch.cat([params[:, :18], params[:, 12:13]], 1)
    for a, b in zip(
        circular, rational_quadratic_spline_packed(x.clamp(-1, 1), closed, 6, tails="bounded"), strict=True
    ):
        assert_same(a, b)


def test_forced_reference_agrees():
    for how in HOWS:
        tails, parametrization, inverse = how
        x, params = sample((5, 40), 4, tails, (torch.float64, torch.float64))
        options = {"tails": tails, "parametrization": parametrization, "inverse": inverse, "logdet": "sum"}
        for a, b in zip(results(x, params, 4, True, **options), truth(x, params, 4, **options), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


# ---- the same bits ----

BATTERY = """
    import itertools, sys, torch, pyperf_dl
    from pyperf_dl import rational_quadratic_spline_packed as spline
    level = torch.ops.pyperf_dl._simd_level() if hasattr(torch.ops.pyperf_dl, "_simd_level") else ""
    out = []
    pairs = [(d, d) for d in (torch.float16, torch.bfloat16, torch.float32, torch.float64)]
    pairs += [(torch.float32, torch.float16), (torch.float32, torch.bfloat16)]
    mixed = ("linear", "circular", "circular") * 22 + ("linear",)
    bounds = 0.5 * torch.arange(67.0) - 1
    for threads, (dtype, of_params), bins in itertools.product((1, 2), pairs, (1, 3, 8, 10, 17)):
        torch.set_num_threads(threads)
        for n, (tails, parametrization, inverse) in enumerate(itertools.product(
            ("linear", "circular", "bounded", mixed), ("nflows", "zuko"), (False, True)
        )):
            g = torch.Generator().manual_seed(bins + n)
            p = 2 * bins + bins + {"linear": -1, "circular": 0, "bounded": 1, mixed: 0}[tails]
            bound = bounds.double() if dtype == torch.float64 else bounds
            x = (torch.randn(3, 67, generator=g) * 2).to(dtype)
            x[0, :6] = torch.tensor([torch.nan, torch.inf, -torch.inf, 3.0, -3.0, 1e-40])
            params = (torch.randn(3, 67, p, generator=g) * (1 + 30 * (n % 2))).to(of_params)
            params[1, :3] = torch.tensor([torch.nan, 1e4, -1e30])[:, None]
            x.requires_grad_(), params.requires_grad_()
            y, logdet = spline(x, params, bins, inverse=inverse, tails=tails, parametrization=parametrization,
                               tail_bound=bound if tails == mixed or n % 4 == 1 else 3.0, logdet="sum",
                               precision=("fast", "exact")[n % 3 == 2])
            out += [y, logdet, *torch.autograd.grad((y, logdet), (x, params), (y.detach(), logdet.detach()))]
    torch.save([t.detach().masked_fill(t.isnan(), torch.nan) for t in out], sys.argv[1])
"""


@pytest.fixture(scope="module")
def simd_results(tmp_path_factory):
    """One battery in a process for each SIMD level: all start before the first is waited for."""
    folder = tmp_path_factory.mktemp("simd")
    levels = ("baseline", "x86-64-v3", "x86-64-v4")
    running = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(BATTERY), str(folder / level)],
            env=os.environ | {"PYPERF_SIMD": level},
        )
        for level in levels
    ]
    assert [process.wait(timeout=300) for process in running] == [0] * len(levels)
    return {level: torch.load(folder / level) for level in levels}


def test_every_simd_level_and_number_of_threads_gives_the_same_bits(simd_results):
    first, *others = simd_results.values()
    for other in others:
        for a, b in zip(first, other, strict=True):
            assert_same(a, b)
    for a, b in zip(first[: len(first) // 2], first[len(first) // 2 :], strict=True):  # 1 thread, 2 threads
        assert_same(a, b)


def layouts(x, params):
    """Views with the same values and other strides."""
    if not x.dim():
        return
    yield "packed slice", torch.stack([x, x], -1)[..., 0], torch.cat([params, params], -1)[..., : params.shape[-1]]
    order = list(range(x.dim()))
    yield "parameters first", x, params.movedim(-1, 0).contiguous().movedim(0, -1)
    yield "planar", x, params.movedim(-1, max(0, x.dim() - 2)).contiguous().movedim(max(0, x.dim() - 2), -1)
    back = order[::-1]
    yield (
        "reversed",
        x.permute(back).contiguous().permute(back),
        params.permute(*back, x.dim()).contiguous().permute(*back, x.dim()),
    )
    yield (
        "dense x, reversed parameters",
        x,
        params.permute(x.dim(), *back).contiguous().permute(*range(x.dim(), 0, -1), 0),
    )
    every = tuple(slice(None, None, 2) for _ in order)
    yield "every other", x.repeat_interleave(2, -1)[..., ::2], params.repeat_interleave(2, -1)[..., ::2]
    wide = [t.new_zeros([2 * s for s in t.shape]) for t in (x, params)]
    wide[0][every], wide[1][(*every, slice(None, None, 2))] = x, params
    yield "strided everywhere", wide[0][every], wide[1][(*every, slice(None, None, 2))]


@st.composite
def problems(draw):
    """x, packed parameters, bins, options"""
    dtypes = draw(st.sampled_from(DTYPES))
    shape = tuple(draw(st.lists(st.sampled_from([0, 1, 2, 3, 7, 8, 9]), max_size=2)))
    if draw(st.booleans()):
        shape = (*shape, draw(st.sampled_from([1, 5, 15, 16, 17, 31, 33, 63, 64, 65])))
    bins = draw(st.sampled_from([1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17]))
    tails = draw(st.sampled_from(TAILS))
    sigma = draw(st.sampled_from([0.0, 1.0, 5.0]))
    x, params = sample(shape, bins, tails, dtypes, sigma, 1.0, draw(st.integers(0, 1000)))
    how = {
        "tails": tails,
        "parametrization": draw(st.sampled_from(PARAMETRIZATIONS)),
        "inverse": draw(st.booleans()),
        "precision": draw(st.sampled_from(["fast", "exact"])),
    }
    return x, params, bins, how


@given(problems())
def test_strides_change_nothing(problem):
    """The same bits for any layout, both ways to pass parameters, and each element alone."""
    x, params, bins, how = problem
    want = results(x, params, bins, **how)
    for _, x_view, params_view in layouts(x, params):
        assert torch.equal(x_view, x)
        assert torch.equal(params_view, params)
        for separate in (False, True):
            for a, b in zip(results(x_view, params_view, bins, separate, **how), want, strict=True):
                assert_same(a, b)
    if x.numel():
        y, logdet = rational_quadratic_spline_packed(
            x.reshape(-1)[-1], params.reshape(-1, params.shape[-1])[-1], bins, **how
        )
        assert_same(y, want[0].reshape(-1)[-1])
        assert_same(logdet, want[1].reshape(-1)[-1])


@given(problems(), st.data())
def test_sums_are_those_of_the_elements(problem, data):
    x, params, bins, how = problem
    dims = data.draw(st.lists(st.sampled_from(range(x.dim())), unique=True) if x.dim() else st.just([]))
    y, logdet = rational_quadratic_spline_packed(x, params, bins, **how)
    total_y, total = rational_quadratic_spline_packed(x, params, bins, logdet="sum", sum_dims=dims, **how)
    assert_same(total_y, y)
    assert total.dtype == logdet.dtype
    want = logdet.double().sum(dims) if dims else logdet.double()
    tolerance = 2e-7 if x.dtype != torch.float64 else 1e-15
    if how["precision"] == "exact" and x.dtype != torch.float64:
        tolerance = 1e-6  # sums float64 elements that the elementwise form has rounded
    scale = logdet.double().abs().sum(dims) if dims else logdet.double().abs()
    assert total.shape == want.shape
    assert bool(((total.double() - want).abs() <= tolerance * scale + 1e-30).all())


@pytest.mark.parametrize("size", [1, 2, 255, 511, 512, 513, UNIT - 1, UNIT, UNIT + 1, 3 * UNIT + 7])
def test_samples_smaller_and_larger_than_a_unit(size):
    """And the gradient of a sample's log-det goes to all its elements."""
    for dtype in (torch.float32, torch.float64):
        x, params = sample((5, size), 4, dtypes=(dtype, dtype))
        _y, logdet = rational_quadratic_spline_packed(x, params, 4, tail_bound=3.0)
        for shaped in (x, x.t().contiguous().t()):
            _, total = rational_quadratic_spline_packed(shaped, params, 4, tail_bound=3.0, logdet="sum")
            assert total.shape == (5,)
            rounding = torch.finfo(dtype).eps * (1 + logdet.double().abs().sum(1))
            assert bool(((total.double() - logdet.double().sum(1)).abs() <= rounding).all())
        a, b = x.clone().requires_grad_(), params.clone().requires_grad_()
        weights = torch.arange(1.0, 6.0, dtype=dtype)
        _, total = rational_quadratic_spline_packed(a, b, 4, tail_bound=3.0, logdet="sum")
        _, each = rational_quadratic_spline_packed(a, b, 4, tail_bound=3.0)
        got = torch.autograd.grad(total, (a, b), weights)
        want = torch.autograd.grad(each, (a, b), weights[:, None].expand_as(each))
        for u, v in zip(got, want, strict=True):
            assert_same(u, v)


def test_sums_in_any_place():
    x, params = sample((4, 3, 5, 6), 5, sigma=2.0)
    y, logdet = rational_quadratic_spline_packed(x, params, 5)
    for r in range(5):
        for dims in itertools.permutations(range(4), r):
            got_y, got = rational_quadratic_spline_packed(x, params, 5, logdet="sum", sum_dims=[d - 4 for d in dims])
            assert_same(got_y, y)
            torch.testing.assert_close(got, logdet.double().sum(dims).float() if dims else logdet)
    assert_same(
        rational_quadratic_spline_packed(x, params, 5, logdet="sum")[1],
        rational_quadratic_spline_packed(x, params, 5, logdet="sum", sum_dims=(1, 2, 3))[1],
    )
    assert_same(
        rational_quadratic_spline_packed(x, params, 5, logdet="sum", sum_dims=2)[1],
        rational_quadratic_spline_packed(x, params, 5, logdet="sum", sum_dims=(2,))[1],
    )


def test_convolution_layouts():
    """[B, C * P, H, W] and [B, C, P, T], as convolutions give them, channels_last too."""
    bins, p = 8, 23
    raw = torch.randn(2, 3 * p, 4, 5)
    x = torch.randn(2, 3, 4, 5)
    want = results(x, raw.view(2, 3, p, 4, 5).movedim(2, -1).contiguous(), bins)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        image, params = x.to(memory_format=memory_format), raw.to(memory_format=memory_format)
        view = params.unflatten(1, (3, p)).movedim(2, -1)
        assert view.data_ptr() == params.data_ptr()
        got = results(image, view, bins)
        for a, b in zip(got, want, strict=True):
            assert_same(a, b)
        assert got[0].is_contiguous(memory_format=memory_format)
        assert got[2].is_contiguous(memory_format=memory_format)
        assert got[3].stride() == view.stride()
    series = torch.randn(2, 3, p, 7)
    x = torch.randn(2, 3, 7)
    for a, b in zip(
        results(x, series.movedim(2, -1), bins), results(x, series.movedim(2, -1).clone(), bins), strict=True
    ):
        assert_same(a, b)


@pytest.mark.parametrize("packed", [False, True])
def test_many_dimensions(packed):
    """More of them than a kernel's row description holds, and parameters in another order than x."""
    order = [10, 0, 9, 1, 8, 2, 7, 3, 6, 4, 5]
    back = [order.index(d) for d in range(11)]
    x, params = sample([2] * 11, 2)
    want = results(x, params, 2)
    for a_order, b_order in ((back, range(11)), (range(11), back), (back, back), (back[::-1], back)):
        a, b = x, params
        for _ in range(2):  # dense in that order
            inverse = [list(a_order).index(d) for d in range(11)]
            a = x.permute(*a_order).contiguous().permute(*inverse)
            inverse = [list(b_order).index(d) for d in range(11)]
            b = params.permute(*b_order, 11).contiguous().permute(*inverse, 11)
        got = results(a, b, 2, not packed)
        for u, v in zip(got, want, strict=True):
            assert_same(u, v)
        assert got[0].stride() == a.stride() == got[2].stride()
        if packed:
            assert got[3].stride() == b.stride()
        total = rational_quadratic_spline_packed(a, b, 2, logdet="sum", sum_dims=(9, 10))[1]
        torch.testing.assert_close(total, want[1].sum((9, 10)))


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_determinism(threads):
    torch.set_num_threads(threads)
    x, params = sample((3, 3000), 8)
    want = results(x, params, 8, logdet="sum")
    for _ in range(33):
        for a, b in zip(results(x, params, 8, logdet="sum"), want, strict=True):
            assert_same(a, b)


@settings(max_examples=50)
@given(problems())
def test_fakes_keep_layouts(problem):
    from torch._subclasses.fake_tensor import FakeTensorMode

    x, params, bins, how = problem
    for name, a, b in [("as it is", x, params), *layouts(x, params)]:
        for logdet in ("elementwise", "sum"):
            real = rational_quadratic_spline_packed(a, b, bins, logdet=logdet, **how)
            with FakeTensorMode() as mode:
                fake = rational_quadratic_spline_packed(
                    mode.from_tensor(a), mode.from_tensor(b), bins, logdet=logdet, **how
                )
            for f, r in zip(fake, real, strict=True):
                assert (f.shape, f.dtype) == (r.shape, r.dtype)
                assert f.stride() == r.stride() or not r.numel(), (name, f.stride(), r.stride())


# ---- special values ----

SPECIAL_HOWS = [{"tails": t, "parametrization": p, "inverse": i} for t, p, i in HOWS]


@pytest.mark.parametrize("how", SPECIAL_HOWS, ids=lambda h: "-".join(map(str, h.values())))
@pytest.mark.parametrize("precision", ["fast", "exact"])
def test_finite_in_finite_out(how, precision):
    """Whatever the parameters and the box; what a line outside the box cannot represent is infinite, never NaN."""
    for bound, bins, scale, dtype in itertools.product(
        (1e-3, 1.0, 1e4), (1, 2, 8), (1e2, 1e4, 1e18, 1e30), (torch.float32, torch.float64, torch.bfloat16)
    ):
        if dtype == torch.bfloat16 and bins != 8:
            continue
        g = torch.Generator().manual_seed(bins)
        params = torch.randint(-1, 2, (120, count(bins, how["tails"])), generator=g) * scale
        params[::3] = torch.randn(params[::3].shape, generator=g) * scale
        x = (torch.rand(120, generator=g) * 2.4 - 1.2) * bound
        edges = [bound, -bound, math.nextafter(bound, 0), math.nextafter(-bound, 0), bound * (1 + 2e-7)]
        x[:11] = torch.tensor([*edges, 0.0, -0.0, 1e-40, -1e-40, bound / 2, -bound / 4])
        params[:11] *= torch.arange(11)[:, None] % 2  # all equal: knots on the grid
        for beyond in (False, True):
            if beyond:
                x = torch.tensor([1e4, -1e4, 1e30, -1e30, 3e38, -3e38] * 20)
            got = results(x.to(dtype), params.to(dtype), bins, tail_bound=bound, precision=precision, **how)
            for t in got:
                assert not t.isnan().any()
            for t in got if not (beyond and how["tails"] == "bounded") else got[1:2]:
                assert t.isfinite().all()
            if not beyond:
                inside = x.to(dtype).double().abs() <= bound  # of exact mode in the precision of a float64
                assert got[0][inside].abs().max() <= bound * (1 + torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", family.DTYPES)
@pytest.mark.parametrize("how", SPECIAL_HOWS, ids=lambda h: "-".join(map(str, h.values())))
def test_special_inputs(how, dtype):
    bins = 5
    x = torch.tensor([0.3, math.nan, math.inf, -math.inf, -0.0, 0.0, 5.0, -5.0, 0.5], dtype=dtype)
    params = torch.randn(9, count(bins, how["tails"]), generator=torch.Generator().manual_seed(0)).to(dtype)
    params[5] = params[4]
    y, logdet, gx, gp = results(x, params, bins, tail_bound=3.0, **how)
    assert y.isnan().tolist() == [False, True] + [False] * 7
    assert y[2] == math.inf
    assert y[3] == -math.inf
    assert logdet.isfinite().all()
    alone = results(x[8:], params[8:], bins, tail_bound=3.0, **how)
    for a, b in zip((y[8:], logdet[8:]), alone[:2], strict=True):  # NaN stays where it is
        assert_same(a, b)
    for i in (0, 4, 5, 8):
        assert gx[i].isfinite()
        assert gp[i].isfinite().all()
    assert_same(y[4], y[5])
    if how["tails"] != "bounded":
        assert y[6:8].tolist() == [5.0, -5.0]
        assert logdet[[1, 2, 3, 6, 7]].tolist() == [0.0] * 5
        assert gp[[6, 7]].count_nonzero() == 0
    # a NaN among the parameters
    for column in (0, bins, 2 * bins):
        broken = params.clone()
        broken[0, column] = math.nan
        a, b = rational_quadratic_spline_packed(x, broken, bins, tail_bound=3.0, **how)
        assert_same(a[1:], y[1:])
        assert_same(b[1:], logdet[1:])
        if column < 2 * bins:
            assert a[0].isnan()
            assert b[0].isnan()


@pytest.mark.parametrize("bound", [2.0**-10, 0.75, 3.0, 1e4])
@pytest.mark.parametrize("tails", TAILS)
def test_the_ends_of_the_box_stay(bound, tails):
    """Bit for bit, and what is outside is not touched by linear and circular tails."""
    for dtype, precision, inverse, sigma in itertools.product(
        (torch.float32, torch.float64), ("fast", "exact"), (False, True), (1.0, 100.0)
    ):
        _, params = sample((500,), 8, tails, (dtype, dtype), sigma)
        end = torch.tensor(bound, dtype=dtype).expand(500)
        how = {"tail_bound": bound, "tails": tails, "inverse": inverse, "precision": precision}
        for x in (end, -end):
            assert_same(rational_quadratic_spline_packed(x, params, 8, **how)[0], x.clone())
        if tails == "bounded":
            continue
        for x in (end.nextafter(end * 2), (-end).nextafter(-end * 2)):
            y, logdet = rational_quadratic_spline_packed(x, params, 8, **how)
            assert_same(y, x.clone())
            assert logdet.count_nonzero() == 0


@pytest.mark.parametrize("inverse", [False, True])
def test_values_on_knots(inverse):
    """Equal bins: the knots are exact, and belong to the bin on their right."""
    bins = 8
    params = torch.zeros(9, 3 * bins - 1)
    params[:, 2 * bins :] = torch.arange(7.0) - 3
    knots = torch.linspace(-2, 2, 9)
    slopes = torch.cat([torch.ones(1), 1e-3 + torch.nn.functional.softplus(torch.arange(7.0) - 3), torch.ones(1)])
    y, logdet, gx, gp = results(knots, params, bins, tail_bound=2.0, inverse=inverse)
    torch.testing.assert_close(y, knots, rtol=0, atol=5e-7)
    torch.testing.assert_close(logdet, slopes.log() * (-1 if inverse else 1), rtol=1e-5, atol=1e-5)
    want = truth(knots, params, bins, tail_bound=2.0, inverse=inverse)
    for a, b in zip((gx, gp), want[2:], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)
    y = rational_quadratic_spline_packed(knots.clamp(-1.9, 1.9), torch.zeros(9, 23), bins, tail_bound=2.0)[0]
    assert bool((y.diff() > 0).all())


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("sigma", [0.0, 1.0, 5.0])
def test_monotone(sigma, inverse):
    """Over adjacent floats: exactly in exact mode, within the rounding of the box in fast mode."""
    bins, bound = 8, 3.0
    _, params = sample((40, 1), bins, sigma=sigma)
    g = torch.Generator().manual_seed(1)
    start = (torch.rand(40, 1, generator=g) * 2 - 1) * 2.99
    # runs of adjacent floats: anywhere, and across the knots
    w, _, _ = split(params, bins)
    h = params[..., bins : 2 * bins]
    knots = reference.bin_edges(h if inverse else w, -bound, bound, 1e-3)[0].squeeze(1)
    for first in (start, knots[:, 1:2], knots[:, 4:5], knots[:, 7:8]):
        runs = [first]
        for _ in range(60):
            runs.append(runs[-1].nextafter(torch.tensor(10.0)))
            runs.insert(0, runs[0].nextafter(torch.tensor(-10.0)))
        x = torch.cat(runs, 1)
        spread = params.expand(40, x.shape[1], params.shape[-1])
        how = {"tail_bound": bound, "inverse": inverse}
        y = rational_quadratic_spline_packed(x, spread, bins, precision="exact", **how)[0]
        assert bool((y.diff() >= 0).all())
        y = rational_quadratic_spline_packed(x, spread, bins, **how)[0]
        fallen = (y.cummax(1).values - y).max()
        assert fallen <= 2e-6  # a few ulp of the box's 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tails", TAILS)
def test_the_inverse_undoes_the_forward(dtype, tails):
    """Within the rounding of y, seen through the inverse's slope."""
    eps = torch.finfo(dtype).eps
    for parametrization, sigma in itertools.product(PARAMETRIZATIONS, (1.0, 3.0)):
        for precision in ("fast", "exact"):
            x, params = sample((3000,), 8, tails, (dtype, dtype), sigma)
            how = {"tail_bound": 3.0, "tails": tails, "parametrization": parametrization, "precision": precision}
            y, forward = rational_quadratic_spline_packed(x, params, 8, **how)
            back, inverse = rational_quadratic_spline_packed(y, params, 8, inverse=True, **how)
            slack = 16 if precision == "fast" or dtype == torch.float64 else 1
            allowed = slack * eps * 3.0 * (1 + (-forward.double()).exp() + forward.double().exp())
            assert bool(((back - x).double().abs() <= allowed).all())
            assert (forward + inverse).abs().quantile(0.5) <= 200 * eps


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 5), (2, 0, 4), (0, 0)])
def test_nothing_in_nothing_out(shape):
    for how in ({}, {"logdet": "sum"}, {"logdet": "sum", "sum_dims": -1}, {"inverse": True}):
        x, params = sample(shape, 4)
        y, logdet, gx, gp = results(x, params, 4, **how)
        assert y.shape == gx.shape == shape
        assert gp.shape == params.shape
        if "sum_dims" in how:
            assert logdet.shape == shape[:-1]
        elif "logdet" in how:
            assert logdet.shape == shape[:1]
        else:
            assert logdet.shape == shape
        assert logdet.count_nonzero() == 0
    y, logdet = rational_quadratic_spline(torch.zeros(2, 0), *(torch.zeros(2, 0, k) for k in (3, 3, 2)), logdet="sum")
    assert logdet.tolist() == [0.0, 0.0]


def test_scalars():
    x, params = sample((), 4)
    y, logdet = rational_quadratic_spline_packed(x, params, 4)
    assert y.shape == logdet.shape == ()
    for how in ({"logdet": "sum"}, {"logdet": "sum", "sum_dims": ()}):
        assert_same(rational_quadratic_spline_packed(x, params, 4, **how)[1], logdet)


def test_broadcast_parameters():
    """Shared by a batch, and one element at a time; gradients come back in the shape that was given."""
    x, _ = sample((6, 5), 4)
    g = torch.Generator().manual_seed(1)
    for shape in ((11,), (5, 11), (6, 1, 11), (1, 5, 11)):
        params = torch.randn(shape, generator=g, requires_grad=True)
        y, logdet = rational_quadratic_spline_packed(x, params, 4, logdet="sum")
        full = params.expand(6, 5, 11).clone()
        want = rational_quadratic_spline_packed(x, full, 4, logdet="sum")
        assert_same(y, want[0])
        assert_same(logdet, want[1])
        got = torch.autograd.grad(logdet.sum() + y.sum(), params)[0]
        assert got.shape == shape
        wide = torch.autograd.grad(want[1].sum() + want[0].sum(), params)[0]
        torch.testing.assert_close(got, wide)


SHARED = [  # shapes of x, and the dimensions along which parameters are shared
    ((6, 5), (0,)),
    ((3000, 3), (0,)),  # several units of each set, in short rows
    ((5, 1500), (1,)),
    ((2, 3, 5, 7), (0, 2, 3)),
    ((4, 3, 40, 33), (0, 2)),
    ((2, 16, 64), (0, 1, 2)),
    ((3, 4, 5), (1,)),  # few elements of a set: gradients of each, added up
    ((2, 300), (0,)),
]


@pytest.mark.parametrize(("shape", "shared"), SHARED, ids=str)
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.float32, torch.bfloat16)], ids=str)
def test_gradients_of_shared_parameters_are_sums(shape, shared, dtypes):
    """Of what each element gives, exact to the last bit; x and its gradient as if nothing were shared."""
    x, params = sample(shape, 5, dtypes=dtypes)
    for d in shared:
        params = params.narrow(d, 0, 1)
    every = params.expand(*shape, 14)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(3)) < 0.7
    for n, base in enumerate((x, x.movedim(0, -1).contiguous().movedim(-1, 0), x.repeat_interleave(2, -1)[..., ::2])):
        how = {"logdet": ("sum", "elementwise")[n % 2], "tail_bound": 3.0, "inverse": n == 1}
        how |= {"sample_mask": mask if n else None, "precision": "exact" if n == 2 else "fast"}
        got = results(base, params, 5, **how)
        want = results(base, every.float().contiguous(), 5, **how)
        for a, b in zip(got[:3], want[:3], strict=True):
            assert_same(a, b)
        sums = want[3].sum(shared, keepdim=True, dtype=torch.float64)
        near = ulp(params.dtype, sums)
        if how["precision"] == "exact":  # the elements' gradients were rounded to float32, those in the sum were not
            near = near + 2**-24 * want[3].abs().sum(shared, keepdim=True, dtype=torch.float64)
        assert ((got[3].double() - sums).abs() <= near).all()
        for a, b in zip(results(base, params, 5, separate=True, **how), got, strict=True):
            assert_same(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_of_gradients_do_not_depend_on_threads(dtype):
    x, params = sample((3001, 3), 5, dtypes=(dtype, dtype))
    want = results(x, params[:1], 5)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert_same(results(x, params[:1], 5)[3], want[3])


def test_shared_parameters_along_dimensions_that_cannot_be_walked():
    """Every second one, of more than rows have: gradients of full size are made, and added up."""
    for dims in (10, 13):
        x, params = sample((2,) * dims, 3)
        some = params[tuple(slice(None) if d % 2 else slice(1) for d in range(dims))]
        mask = torch.rand((2,) * dims) < 0.5
        how = {"sample_mask": mask, "tail_bound": torch.rand((2,) * (dims - 1) + (1,)) + 1, "logdet": "sum"}
        got = results(x, some, 3, **how)
        want = results(x, some.expand(params.shape).contiguous(), 3, **how)
        for a, b in zip(got[:3], want[:3], strict=True):
            assert_same(a, b)
        sums = want[3].sum(tuple(range(0, dims, 2)), keepdim=True, dtype=torch.float64)
        torch.testing.assert_close(got[3], sums.float())


def test_shared_parameters_without_elements():
    params = torch.randn(1, 3, 14, requires_grad=True)
    y, logdet = rational_quadratic_spline_packed(torch.zeros(0, 3), params, 5, logdet="sum")
    (y.sum() + logdet.sum()).backward()
    assert_same(params.grad, torch.zeros(1, 3, 14))


def test_channels_share_parameters():
    x, params = sample((64, 6, 40), 5)
    for channels, lead in (
        (slice(3, None), (1, 3, 1)),
        (slice(0, None, 3), (64, 1, 1)),
        (slice(5, None, 9), (1, 1, 40)),
    ):
        some = params[tuple(slice(n) for n in lead)]
        part = x[:, channels]
        got = results(x, some, 5, channels=channels, logdet="sum")
        want = results(part, some.expand(*part.shape, 14).contiguous(), 5, logdet="sum")
        shared = [d for d in range(3) if lead[d] != part.shape[d]]
        assert_same(got[0][:, channels], want[0])
        assert_same(got[1], want[1])
        # Gradients that come in are other ones: those of all channels.
        y, logdet = rational_quadratic_spline_packed(x, (leaf := some.clone().requires_grad_()), 5, channels=channels)
        (grad,) = torch.autograd.grad(y[:, channels].sum() + logdet.sum(), leaf)
        every = some.expand(*part.shape, 14).clone().requires_grad_()
        (each,) = torch.autograd.grad(sum(t.sum() for t in rational_quadratic_spline_packed(part, every, 5)), every)
        torch.testing.assert_close(grad, each.sum(shared, keepdim=True, dtype=torch.float64).float())


CHANNELS = [
    slice(0, 3),
    slice(4, None, 10),
    slice(3, None),
    slice(None, None, 2),
    slice(1, None, 2),
    slice(2, 2),
    slice(-1, None),
    None,
]


@pytest.mark.parametrize("channels", CHANNELS, ids=str)
@pytest.mark.parametrize("shape", [(4, 6), (2, 7, 40), (2, 6, 3, 5)], ids=str)
def test_some_channels(shape, channels):
    """The others pass, with their gradients; all bits as by hand."""
    (z, _), at = sample(shape, 5), slice(None) if channels is None else channels
    part = z[:, at]
    _, params = sample(part.shape, 5)
    g = torch.Generator().manual_seed(2)
    grad = torch.randn(shape, generator=g)
    for n, x in enumerate((z, z.movedim(1, -1).contiguous().movedim(-1, 1), z.repeat_interleave(2, -1)[..., ::2])):
        how = {"logdet": ("sum", "elementwise")[n % 2], "sum_dims": (-1, 0) if n == 2 else None, "inverse": n == 1}
        how |= {"sample_mask": (torch.rand(part.shape, generator=g) < 0.5) if n else None}
        how["logdet"] = "sum" if n == 2 else how["logdet"]
        leaves = [t.clone().requires_grad_() for t in (x, params)]
        y, logdet = rational_quadratic_spline_packed(*leaves, 5, channels=channels, **how)
        same = [t.clone().requires_grad_() for t in (part, params)]
        want, total = rational_quadratic_spline_packed(*same, 5, **how)
        assert_same(y[:, at], want)
        assert_same(logdet, total)
        into = weights(logdet)
        got = torch.autograd.grad((y, logdet), leaves, (grad, into))
        by_part = torch.autograd.grad((want, total), same, (grad[:, at], into))
        assert_same(got[0][:, at], by_part[0])
        assert_same(got[1], by_part[1])
        others = torch.ones(shape[1], dtype=torch.bool)
        others[at] = False
        assert_same(y[:, others], x[:, others])
        assert_same(got[0][:, others], grad[:, others])
        assert y.stride() == rational_quadratic_spline_packed(x, sample(shape, 5)[1], 5)[0].stride()


@pytest.mark.parametrize("how", HOWS, ids=str)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_sample_masks(how, dtypes):
    """What does not count passes, bit for bit, whatever it and its parameters are."""
    tails, parametrization, inverse = how
    how = {"tails": tails, "parametrization": parametrization, "inverse": inverse}
    x, params = sample((9, 37), 3, tails, dtypes)
    x[:, 5], x[:, 7], params[:, 11] = torch.inf, torch.nan, torch.nan
    for mask in (torch.rand(9, 37) < 0.5, torch.arange(9)[:, None] < 4, torch.zeros((), dtype=torch.bool)):
        got, want = results(x, params, 3, sample_mask=mask, **how), results(x, params, 3, **how)
        on = mask.expand(x.shape)
        for a, b in zip(got[:3], want[:3], strict=True):
            assert_same(a[on], b[on])
        assert_same(got[3][on], want[3][on])
        assert_same(got[0][~on], x[~on])
        assert not got[1][~on].any()
        assert_same(got[2][~on], weights(got[0])[~on])
        assert not got[3][~on].any()
        total = results(x, params, 3, sample_mask=mask, logdet="sum", **how)[1]
        torch.testing.assert_close(total, got[1].double().sum(1).to(total.dtype), equal_nan=True)
        with pyperf_dl.backend("reference"):
            by_formula = results(x, params, 3, sample_mask=mask, **how)
        for a, b in zip(got, by_formula, strict=True):
            assert_same(a[~on], b[~on])


@pytest.mark.parametrize("bins", [7, 8, 10, 16])
@pytest.mark.parametrize("inverse", [False, True])
def test_large_tensors_give_the_bits_of_their_parts(bins, inverse):
    """Tensors beyond the caches are walked in other steps."""
    x, params = sample((4000, 16), bins)
    all_of_it = results(x, params, bins, inverse=inverse)
    some = slice(104, 168)
    y, logdet, grad_x, grad_params = results(x[some], params[some], bins, inverse=inverse)
    for a, b in zip(all_of_it, (y, logdet, grad_x, grad_params), strict=True):
        assert_same(a[some], b)


def test_more_than_2_31_parameters():
    """Stride-0 views: elements whose offsets do not fit 32 bits."""
    params = torch.randn(23).expand(2**28, 23)[-3:]
    x = torch.tensor(0.25).expand(2**28)[-3:]
    y, _ = rational_quadratic_spline_packed(x, params, 8)
    assert_same(y, rational_quadratic_spline_packed(x[:1], params[:1], 8)[0].expand(3).clone())
    far = torch.zeros(1).as_strided((2, 3), (0, 0))
    base = torch.randn(1, 23).as_strided((2, 3, 23), (0, 0, 1))
    assert rational_quadratic_spline_packed(far, base, 8)[0].unique().numel() == 1


# ---- derivatives, transforms ----


def away_from_knots(shape, bins, tails, seed=0):
    """float64 x and parameters for which a step of gradcheck crosses no knot, along x or y."""
    g = torch.Generator().manual_seed(seed)
    x = torch.empty(shape, dtype=torch.float64)
    params = torch.randn(*shape, count(bins, tails), generator=g, dtype=torch.float64)
    w, h, _ = split(params, bins)
    edges = [reference.bin_edges(t, -2.0, 2.0, 1e-3)[0] for t in (w, h)]
    for _ in range(200):
        fresh = (torch.rand(shape, generator=g, dtype=torch.float64) * 2 - 1) * 2.6
        near = torch.stack([(fresh.unsqueeze(-1) - e).abs().amin(-1) for e in edges]).amin(0)
        good = (near > 1e-2) & ((fresh.abs() - 2).abs() > 1e-2)
        x = torch.where(good, fresh, x) if _ else torch.where(good, fresh, 0.123)
    return x, params


@pytest.mark.parametrize("how", HOWS, ids=str)
def test_gradcheck(how):
    tails, parametrization, inverse = how
    x, params = away_from_knots((2, 2), 3, tails)
    options = {"tails": tails, "parametrization": parametrization, "inverse": inverse, "tail_bound": 2.0}

    def packed(x, params):
        return rational_quadratic_spline_packed(x, params, 3, logdet="sum", **options)

    def separate(x, w, h, d):
        return rational_quadratic_spline(x, w, h, d, **options)

    leaves = [t.clone().requires_grad_() for t in (x, params)]
    assert torch.autograd.gradcheck(packed, leaves, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(packed, leaves, fast_mode=True)
    leaves = [t.clone().requires_grad_() for t in (x, *split(params, 3))]
    assert torch.autograd.gradcheck(separate, leaves)
    if how == HOWS[0]:
        assert torch.autograd.gradgradcheck(separate, leaves, fast_mode=True)


@pytest.mark.parametrize("inverse", [False, True])
def test_gradcheck_of_shared_parameters_masks_and_channels(inverse):
    x, params = away_from_knots((3, 1, 2), 3, "linear")
    mask = torch.tensor([True, False, True]).view(3, 1, 1)
    how = {"tail_bound": 2.0, "inverse": inverse, "logdet": "sum"}

    def shares(x, params):
        return rational_quadratic_spline_packed(x, params, 3, sample_mask=mask, **how)

    def passes(x, params):
        return rational_quadratic_spline_packed(x, params, 3, sample_mask=mask, channels=slice(1, None, 2), **how)

    leaves = [t.clone().requires_grad_() for t in (x, params.narrow(0, 0, 1).narrow(2, 1, 1))]
    some = [t.clone().requires_grad_() for t in (torch.cat([x.cos(), x, x.sin()], 1), params)]
    for function, inputs in ((shares, leaves), (passes, some)):
        assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


X, PARAMS = away_from_knots((4, 6), 3, "linear")
T = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def by_formula(x, params, sums=False, inverse=False):
    how = (inverse, "linear", "nflows", (-2.0, 2.0, -2.0, 2.0), (1e-3, 1e-3, 1e-3), 1.0, 1.0)
    return reference.rational_quadratic_spline_packed(
        x, params, None, None, 3, None, *how, x.dim() - 1 if sums else -1, False
    )


def ours(x, params, sums=False, inverse=False):
    how = {"logdet": "sum", "sum_dims": -1} if sums else {}
    return rational_quadratic_spline_packed(x, params, 3, tail_bound=2.0, inverse=inverse, **how)


def separately(x, params, sums=False, inverse=False):
    how = {"logdet": "sum", "sum_dims": -1} if sums else {}
    return rational_quadratic_spline(x, *split(params, 3), tail_bound=2.0, inverse=inverse, **how)


def scalar(f):
    def total(x, params):
        y, logdet = f(x, params)
        return (y**3).sum() + (logdet**2).sum()

    return total


def backward_of_vmap(f):
    leaves = [t.clone().requires_grad_() for t in (X, PARAMS)]
    y, logdet = vmap(f)(*leaves)
    ((y**2).sum() + (logdet**2).sum()).backward()
    return [t.grad for t in leaves]


def dual(f, requires_grad):
    with forward_ad.dual_level():
        x = forward_ad.make_dual(X.clone().requires_grad_(requires_grad), T)
        params = forward_ad.make_dual(PARAMS.clone().requires_grad_(requires_grad), PARAMS.cos())
        return [forward_ad.unpack_dual(t).tangent for t in f(x, params)]


TRANSFORMS = {
    "grad": lambda f: grad(scalar(f), (0, 1))(X, PARAMS),
    "vmap": lambda f: vmap(f, in_dims=(1, 1), out_dims=0)(X, PARAMS),
    "vmap of one": lambda f: vmap(f, in_dims=(0, None))(X, PARAMS[0]),
    "vmap of grad": lambda f: vmap(grad(scalar(f), (0, 1)))(X, PARAMS),
    "grad of vmap": lambda f: grad(scalar(vmap(f)), (0, 1))(X, PARAMS),
    "vmap of vmap": lambda f: vmap(vmap(f))(X.reshape(2, 2, 6), PARAMS.reshape(2, 2, 6, -1)),
    "jvp": lambda f: jvp(f, (X, PARAMS), (T, PARAMS.sin()))[1],
    "vjp": lambda f: vjp(lambda x, p: f(x, p)[0], X, PARAMS)[1](T),
    "jacfwd": lambda f: jacfwd(f, (0, 1))(X[0], PARAMS[0]),
    "jacrev": lambda f: jacrev(f, (0, 1))(X[0], PARAMS[0]),
    "hessian": lambda f: hessian(scalar(f))(X[0], PARAMS[0]),
    "vmap of jvp": lambda f: vmap(lambda x, p, t: jvp(lambda x: f(x, p), (x,), (t,))[1])(X, PARAMS, T),
    "vmap of hessian": lambda f: vmap(hessian(scalar(f), 0))(X[:2], PARAMS[:2]),
    "backward of vmap": backward_of_vmap,
    "dual": lambda f: dual(f, False),
    "dual that requires grad": lambda f: dual(f, True),
}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("sums", [False, True])
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("function", [ours, separately])
def test_transforms(name, sums, inverse, function):
    got = TRANSFORMS[name](lambda x, p: function(x, p, sums and x.dim() > 0, inverse))
    want = TRANSFORMS[name](lambda x, p: by_formula(x, p, sums and x.dim() > 0, inverse))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", ["grad", "vmap", "vmap of grad", "jvp", "jacfwd", "hessian", "dual"])
def test_compiled_transforms_are_right_or_an_error(name):
    transform = TRANSFORMS[name]
    torch._dynamo.reset()
    compiled = torch.compile(lambda: transform(ours), fullgraph=True, backend="aot_eager")
    try:
        got = compiled()
    except torch._dynamo.exc.TorchDynamoException:  # what dynamo cannot do it says
        return
    torch.testing.assert_close(got, transform(by_formula))


def test_double_backward_of_float32():
    x, params = (t.float().requires_grad_() for t in (X, PARAMS))
    y, logdet = rational_quadratic_spline_packed(x, params, 3, tail_bound=2.0, logdet="sum")
    first = torch.autograd.grad((y**2).sum() + logdet.sum(), (x, params), create_graph=True)
    got = torch.autograd.grad(sum((g**2).sum() for g in first), (x, params))
    a, b = (t.clone().requires_grad_() for t in (X, PARAMS))
    y, logdet = by_formula(a, b, True)
    first = torch.autograd.grad((y**2).sum() + logdet.sum(), (a, b), create_graph=True)
    want = torch.autograd.grad(sum((g**2).sum() for g in first), (a, b))
    for u, v in zip(got, want, strict=True):
        torch.testing.assert_close(u.double(), v, rtol=1e-2, atol=1e-2)


# ---- boxes and tails by element ----

FEATURES = ("linear", "circular", "circular", "linear", "circular")
BOUNDS = (1.0, 2.5, 3.0, 0.5, 4.0)
BY_ELEMENT = {  # tails, tail bound
    "bounds": ("linear", BOUNDS),
    "circular bounds": ("circular", BOUNDS),
    "bounded bounds": ("bounded", BOUNDS),
    "tails": (FEATURES, 3.0),
    "both": (FEATURES, BOUNDS),
}


def by_element(rule, dtype=torch.float32, shape=(40, 5), bins=6, dtypes=None, sigma=1.5):
    """x, packed parameters, and the arguments of a rule."""
    tails, bound = BY_ELEMENT[rule]
    x, params = sample(shape, bins, "mixed" if tails is FEATURES else tails, dtypes or (dtype, dtype), sigma, 2.5)
    bound = torch.tensor(bound, dtype=reference.logdet_dtype(x)) if isinstance(bound, tuple) else bound
    return x, params, {"tails": tails, "tail_bound": bound}


def in_float64(how):
    bound = how["tail_bound"]
    return how | {"tail_bound": bound.double() if isinstance(bound, torch.Tensor) else bound}


@pytest.mark.parametrize("rule", BY_ELEMENT)
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
def test_boxes_and_tails_by_element(rule, inverse, parametrization):
    for dtypes, bins in itertools.product(DTYPES, (1, 2, 6, 8)):
        x, params, how = by_element(rule, bins=bins, dtypes=dtypes)
        how |= {"inverse": inverse, "parametrization": parametrization}
        want = truth(x, params, bins, **in_float64(how))
        for separate in (False, True):
            got = results(x, params, bins, separate, precision="exact", **how)
            for a, b in zip(got, want, strict=True):
                rounding = 1e-8 if a.dtype == torch.float64 else 0.5001 * ulp(a.dtype, b) + 1e-8
                assert bool(((a.double() - b).abs() <= rounding + 1e-8 * b.abs()).all())
        for a, b in zip(results(x, params, bins, **how), want, strict=True):
            error = (a.double() - b).abs() / (b.abs() + 1)
            assert a.isfinite().all()
            assert error.quantile(0.95) <= 2e-4 + torch.finfo(a.dtype).eps


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("precision", ["fast", "exact"])
def test_tails_by_element_are_those_of_calls_apart(inverse, precision):
    """Bit for bit; the first derivative of a feature with linear tails is not used."""
    for dtypes, bins in itertools.product(DTYPES, (1, 5, 8)):
        x, params, how = by_element("tails", bins=bins, dtypes=dtypes)
        how |= {"inverse": inverse, "precision": precision}
        y, logdet, gx, gp = results(x, params, bins, **how)
        gy, gl = weights(y), weights(logdet)
        for d, tails in enumerate(FEATURES):
            used = torch.arange(3 * bins) if tails == "circular" else torch.arange(3 * bins) != 2 * bins
            a, p = x[:, d].clone().requires_grad_(), params[:, d, used].clone().requires_grad_()
            want = rational_quadratic_spline_packed(a, p, bins, **how | {"tails": tails})
            assert_same(y[:, d], want[0])
            assert_same(logdet[:, d], want[1])
            grads = torch.autograd.grad(want, (a, p), (gy[:, d], gl[:, d]))
            assert_same(gx[:, d], grads[0])
            assert_same(gp[:, d, used], grads[1])
            assert tails == "circular" or gp[:, d, 2 * bins].count_nonzero() == 0


@pytest.mark.parametrize("tails", TAILS)
@pytest.mark.parametrize("inverse", [False, True])
def test_bounds_by_element_are_those_of_calls_apart(tails, inverse):
    """Bit for bit where they are powers of two, which scale without rounding."""
    bounds = torch.tensor([0.125, 1.0, 2.0, 8.0])
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x, params = sample((50, 4), 8, tails, (dtype, dtype), 1.5)
        how = {"tails": tails, "inverse": inverse}
        got = results(x, params, 8, tail_bound=bounds.to(reference.logdet_dtype(x)), **how)
        gy, gl = weights(got[0]), weights(got[1])
        for d, bound in enumerate(bounds.tolist()):
            a, p = x[:, d].clone().requires_grad_(), params[:, d].clone().requires_grad_()
            want = rational_quadratic_spline_packed(a, p, 8, tail_bound=bound, **how)
            grads = torch.autograd.grad(want, (a, p), (gy[:, d], gl[:, d]))
            for u, v in zip(got, (*want, *grads), strict=True):
                assert_same(u[:, d], v)


def test_where_bounds_may_lie():
    """Any strides and any shape that broadcasts, in any order of the dimensions, summed or not: the same bits."""
    shape = (4, 3, 6)
    x, params = sample(shape, 5, "mixed", sigma=1.5)
    g = torch.Generator().manual_seed(3)
    full = torch.rand(shape, generator=g) * 3 + 0.2
    tails = (*FEATURES, "linear")
    for sizes in ((), (1,), (6,), (3, 1), (3, 6), (4, 1, 1), (4, 1, 6), shape):
        bound = full[tuple(slice(n) for n in (*[1] * (3 - len(sizes)), *sizes))].reshape(sizes)
        dense = bound.expand(shape).clone()
        for how in ({}, {"logdet": "sum"}, {"logdet": "sum", "sum_dims": (0, 2)}, {"logdet": "sum", "sum_dims": 1}):
            for rule in ("circular", tails):
                want = results(x, params, 5, tails=rule, tail_bound=dense, **how)
                strided = torch.stack([bound, bound], -1)[..., 0]
                permuted = bound.mT.contiguous().mT if bound.dim() > 1 else bound
                for view in (bound, strided, permuted):
                    for a, b in zip(results(x, params, 5, tails=rule, tail_bound=view, **how), want, strict=True):
                        assert_same(a, b)
        moved = x.permute(2, 0, 1).contiguous().permute(1, 2, 0)
        want = results(x, params, 5, tails=tails, tail_bound=bound)
        for a, b in zip(results(moved, params, 5, tails=tails, tail_bound=bound), want, strict=True):
            assert_same(a, b)


def test_bounds_beside_many_dimensions():
    """More of them than a row description holds, of the bounds alone and of all."""
    x, params = sample([2] * 11, 2)
    order = [10, 0, 9, 1, 8, 2, 7, 3, 6, 4, 5]
    bound = (torch.arange(2.0**11).view([2] * 11) % 7 + 1).div(2)
    want = results(x, params, 2, tail_bound=bound)
    mixed_up = bound.permute(order).contiguous().permute([order.index(d) for d in range(11)])
    assert not mixed_up.is_contiguous()
    for a, b in zip(results(x, params, 2, tail_bound=mixed_up), want, strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("tails", [*TAILS, FEATURES], ids=str)
def test_bounds_that_bound_nothing(tails, inverse):
    """NaN in the whole element, gradients too, and in no other one."""
    bad = [0.0, -0.0, -1.0, math.nan, math.inf, -math.inf, 2.0**-101, 2.0**101, 1e-45]
    for dtype, bins, x in itertools.product((torch.float32, torch.float64), (1, 2, 8), (0.3, 5.0, math.inf, math.nan)):
        params = sample((len(bad), 5), bins, "mixed" if tails is FEATURES else tails, (dtype, dtype))[1]
        at = torch.full((len(bad), 5), 0.3, dtype=dtype)
        at[:, 2] = x
        bound = torch.ones_like(at)
        bound[:, 2] = torch.tensor(bad, dtype=dtype)
        how = {"tails": tails, "inverse": inverse}
        want = results(at, params, bins, tail_bound=torch.ones_like(at), **how)
        for a, b in zip(results(at, params, bins, tail_bound=bound, **how), want, strict=True):
            assert a[:, 2].isnan().all()
            for d in (0, 1, 3, 4):
                assert_same(a[:, d], b[:, d])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_ends_of_scaled_boxes_stay(dtype):
    """Bit for bit, the next number beyond too; y does not leave the box."""
    g = torch.Generator().manual_seed(0)
    bound = torch.exp2(torch.rand(2000, generator=g, dtype=torch.float64) * 40 - 20).to(dtype)
    for tails, precision, inverse in itertools.product(TAILS, ("fast", "exact"), (False, True)):
        _, params = sample((2000,), 4, tails, (dtype, dtype), 3.0)
        how = {"tails": tails, "tail_bound": bound, "precision": precision, "inverse": inverse}
        for end in (bound, -bound):
            assert_same(rational_quadratic_spline_packed(end, params, 4, **how)[0], end.clone())
            inner = end.nextafter(torch.zeros_like(end))
            assert bool((rational_quadratic_spline_packed(inner, params, 4, **how)[0].abs() <= bound).all())
            if tails == "bounded":
                continue
            y, logdet = rational_quadratic_spline_packed(end.nextafter(2 * end), params, 4, **how)
            assert_same(y, end.nextafter(2 * end))
            assert logdet.count_nonzero() == 0


def test_finite_in_finite_out_of_scaled_boxes():
    g = torch.Generator().manual_seed(0)
    for inverse, tails, dtype in itertools.product(
        (False, True), ("bounded", FEATURES), (torch.float32, torch.float64)
    ):
        for size in (1e-3, 1.0, 1e4, 1e25):
            kind = "mixed" if tails is FEATURES else tails
            params = (torch.randint(-1, 2, (300, 5, count(8, kind)), generator=g) * 1e4).to(dtype)
            bound = (torch.rand(5, generator=g) + 0.5).to(dtype) * size
            x = ((torch.rand(300, 5, generator=g) * 2.4 - 1.2) * bound).to(dtype)
            for t in results(x, params, 8, tails=tails, tail_bound=bound, inverse=inverse):
                assert t.isfinite().all()
    far, bound = torch.tensor([3e38, -3e38]), torch.tensor(1e-20)  # beyond the numbers in units of the bound
    for inverse in (False, True):
        how = {"tails": "bounded", "tail_bound": bound, "inverse": inverse}
        assert rational_quadratic_spline_packed(far, torch.full((2, 10), 0.5414), 3, **how)[0].isfinite().all()


def test_bounds_have_no_gradient():
    bound = torch.full((6,), 2.0, dtype=torch.float64)

    def f(bound, x=X):
        return rational_quadratic_spline_packed(x, PARAMS, 3, tail_bound=bound)[0].sum()

    x = X.clone()
    message = "tail_bound must not require a gradient, it has none: detach it"
    for call in (
        lambda: f(bound.clone().requires_grad_()),
        lambda: grad(f)(bound),
        lambda: jvp(f, (bound,), (bound,)),
        lambda: hessian(f)(bound),
        lambda: vmap(grad(f))(bound.expand(2, 6)),
        lambda: vmap(lambda b: jvp(f, (b,), (b,)))(bound.expand(2, 6)),
        lambda: jvp(vmap(f), (bound.expand(2, 6),), (bound.expand(2, 6),)),
        lambda: jvp(lambda b: grad(lambda t: f(b, t))(x), (bound,), (bound,)),
        lambda: grad(lambda b: grad(lambda t: f(b, t))(x).sum())(bound),
        torch.compile(lambda: jvp(f, (bound,), (bound,)), backend="aot_eager"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with forward_ad.dual_level(), pytest.raises(ValueError, match=message):
        f(forward_ad.make_dual(bound, bound))
    f(bound.clone().requires_grad_().detach())
    assert jvp(lambda t: f(bound, t), (x,), (x,))[1].isfinite()


def test_saved_bytes_of_bounds():
    """What is kept of bounds is what was given, not one for each element; what changes it is noticed."""
    bound = torch.tensor(BOUNDS)
    x, params, _ = by_element("both")
    x.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        rational_quadratic_spline_packed(x, params[..., :17], 6, tail_bound=bound)
    assert bound.data_ptr() in {t.data_ptr() for t in saved}
    y, _ = rational_quadratic_spline_packed(x, params[..., :17], 6, tail_bound=bound)
    bound.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("rule", BY_ELEMENT)
def test_gradcheck_by_element(rule, inverse):
    tails, bound = BY_ELEMENT[rule]
    kind = "mixed" if tails is FEATURES else tails
    x, params = away_from_knots((2, 5), 3, kind)  # of the box [-2, 2]
    if isinstance(bound, tuple):
        bound = torch.tensor(bound, dtype=torch.float64)
        x = x / 2 * bound
    else:
        bound = 2.0
    how = {"tails": tails, "tail_bound": bound, "inverse": inverse}

    def packed(x, params):
        return rational_quadratic_spline_packed(x, params, 3, logdet="sum", **how)

    def separate(x, params):
        return rational_quadratic_spline(x, *split(params, 3), **how)

    leaves = [t.clone().requires_grad_() for t in (x, params)]
    for function in (packed, separate):
        assert torch.autograd.gradcheck(function, leaves, check_forward_ad=True, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


def scaled(x, params, sums=False, inverse=False):
    """`ours` with a bound that broadcasts, whatever a transform leaves of x."""
    how = {"logdet": "sum", "sum_dims": -1} if sums else {}
    bound = torch.tensor(1.5, dtype=x.dtype)
    return rational_quadratic_spline_packed(x, params, 3, tail_bound=bound, inverse=inverse, **how)


def scaled_by_formula(x, params, sums=False, inverse=False):
    how = (inverse, "linear", "nflows", (-1.0, 1.0, -1.0, 1.0), (1e-3, 1e-3, 1e-3), 1.0, 1.0)
    bound = torch.tensor(1.5, dtype=x.dtype).expand(x.shape)
    return reference.rational_quadratic_spline_packed(
        x, params, bound, None, 3, None, *how, x.dim() - 1 if sums else -1, False
    )


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("inverse", [False, True])
def test_transforms_of_scaled_boxes(name, inverse):
    got = TRANSFORMS[name](lambda x, p: scaled(x, p, x.dim() > 0, inverse))
    want = TRANSFORMS[name](lambda x, p: scaled_by_formula(x, p, x.dim() > 0, inverse))
    torch.testing.assert_close(got, want)


def test_transforms_of_bounds():
    """vmap over bounds, alone and beside x, with tails of their own too."""
    x, params, how = by_element("both", torch.float64, (4, 5))
    bounds = how["tail_bound"] * torch.tensor([[0.5], [1.0], [2.0], [3.0]], dtype=torch.float64)

    def f(x, params, bound):
        y, logdet = rational_quadratic_spline_packed(x, params, 6, tails=FEATURES, tail_bound=bound)
        return (y.sin() + logdet.cos()).sum()

    each = [f(*t) for t in zip(x, params, bounds, strict=True)]
    torch.testing.assert_close(vmap(f)(x, params, bounds), torch.stack(each))
    each = [f(x[0], params[0], b) for b in bounds]
    torch.testing.assert_close(vmap(f, (None, None, 0))(x[0], params[0], bounds), torch.stack(each))
    each = [torch.stack(grad(f)(*t).split(1)) for t in zip(x, params, bounds, strict=True)]
    torch.testing.assert_close(vmap(grad(f))(x, params, bounds), torch.stack(each).squeeze(-1))
    got = hessian(f)(x[0], params[0], bounds[0])
    with pyperf_dl.backend("reference"):
        torch.testing.assert_close(got, hessian(f)(x[0], params[0], bounds[0]))


class FeatureLayer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("bound", torch.tensor(BOUNDS))

    def forward(self, x, params):
        how = {"tails": list(FEATURES), "tail_bound": self.bound}
        y, logdet = rational_quadratic_spline_packed(x, params, 6, logdet="sum", **how)
        back, _ = rational_quadratic_spline(y, *split(params, 6), inverse=True, **how)
        return y, logdet, back


@pytest.mark.parametrize("requires_grad", [False, True])
def test_compile_by_element(requires_grad):
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    layer, counter = FeatureLayer(), CompileCounter()
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for n in (3, 7, 20):
        x, params, _ = by_element("both", shape=(n, 5))
        x.requires_grad_(requires_grad)
        for got, want in zip(compiled(x, params), layer(x, params), strict=True):
            assert_same(got, want)
    assert counter.frame_count <= 2
    torch._dynamo.reset()
    inductor = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, params = (t.detach().requires_grad_() for t in by_element("both")[:2])
    grads = [torch.autograd.grad(sum(t.sum() for t in f(x, params)), (x, params)) for f in (inductor, layer)]
    for got, want in zip(*grads, strict=True):
        assert_same(got, want)


def test_export_by_element():
    batch = torch.export.Dim("batch", min=2, max=4096)
    inputs, layer = by_element("both", shape=(6, 5))[:2], FeatureLayer()
    exported = torch.export.export(layer, inputs, dynamic_shapes={"x": {0: batch}, "params": {0: batch}})
    table = torch.export.default_decompositions()
    table.update(pyperf_dl.decompositions())
    plain = exported.run_decompositions(table)
    assert "pyperf_dl" not in str(plain.graph)
    other = by_element("both", shape=(33, 5))[:2]
    for got, decomposed, want in zip(exported.module()(*other), plain.module()(*other), layer(*other), strict=True):
        assert_same(got, want)
        torch.testing.assert_close(decomposed, want, rtol=1e-4, atol=1e-4)


# ---- slopes ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("precision", ["fast", "exact"])
def test_the_largest_slopes_can_be_inverted(dtype, precision):
    """In the first bin, where x is as small as it must be: the inverse and its log-det undo the forward."""
    limit = reference.LARGEST_SLOPE[torch.float64 if precision == "exact" else dtype]
    y = torch.linspace(0.0025, 0.1225, 500, dtype=dtype)  # the bin ends at 0.25
    how = {"tails": "bounded", "bounds": (0.0, 1.0, 0.0, 1.0), "precision": precision}
    for raw in (1e10, 1e17, 1e30, 1e38):
        params = torch.zeros(500, 3 * 4 + 1, dtype=dtype)
        params[:, 8:] = raw
        slope = min(params[0, 8].item(), limit)
        x, inverse, *grads = results(y, params, 4, inverse=True, **how)
        back, forward, *more = results(x, params, 4, **how)
        held = precision == "fast" or dtype == torch.float64  # float32 does not hold gradients of such slopes
        assert not any(t.isnan().any() or (held and t.isinf().any()) for t in (*grads, *more))
        torch.testing.assert_close(inverse, -(math.log(slope) + 2 * torch.log1p(-8 * y)), rtol=1e-5, atol=1e-4)
        if slope < 1e35:  # else x is no normal number
            torch.testing.assert_close(back, y, rtol=1e-5, atol=0)
            torch.testing.assert_close(forward, -inverse, rtol=1e-5, atol=1e-4)


# ---- opcheck ----


def statics(tails="linear", inverse=False, sample_dims=-1, exact=False, parametrization="nflows"):
    return (inverse, tails, parametrization, [-2.0, 2.0, -2.0, 2.0], [1e-3] * 3, 1.0, 1.0, sample_dims, exact)


def operator_calls():
    """Contiguous, strided, planar and expanded, with and without grad."""
    x, params = (t.clone() for t in (X[:2, :3], PARAMS[:2, :3]))
    image = torch.randn(2, 3 * 8, 2, 2, dtype=torch.float64).unflatten(1, (3, 8)).movedim(2, -1)
    packed, separate = "packed", "separate"
    calls = [
        ((packed, separate), x, params),
        ((packed, separate), x.clone().requires_grad_(), params.clone().requires_grad_()),
        ((packed,), x.t().contiguous().t(), torch.cat([params, params], -1)[..., ::2]),
        ((separate,), x, params.movedim(-1, 1).contiguous().movedim(1, -1)),
        ((packed,), torch.randn(2, 3, 2, 2, dtype=torch.float64), image),
        ((separate,), x, params[:1, :1].expand(2, 3, 8)),
        ((packed,), x.float(), params.bfloat16()),
    ]
    for n, (forms, a, b) in enumerate(calls):
        how = statics(inverse=n % 2 == 1, sample_dims=(-1, 1)[n % 2], exact=n % 3 == 0)
        grads = (a.detach().sin(), family._packed(a.detach(), b.detach(), None, None, 3, None, *how)[1].cos())
        if packed in forms:
            yield family._packed, (a, b, None, None, 3, None, *how)
            yield family._packed_backward, (*grads, a, b, None, None, 3, None, *how)
        if separate in forms:
            yield family._spline, (a, *split(b, 3), None, None, *how)
            yield family._spline_backward, (*grads, a, *split(b, 3), None, None, *how)
    bound = torch.tensor([1.0, -2.0, 3.0], dtype=x.dtype).expand(2, 3)
    params = torch.cat([params, params[..., :1]], -1).requires_grad_()
    for sample_dims in (-1, 1):
        how = statics("mixed", inverse=sample_dims > 0, sample_dims=sample_dims)
        grads = (x.sin(), family._packed(x, params.detach(), bound, None, 3, None, *how)[1].cos())
        yield family._packed, (x, params, bound, None, 3, None, *how)
        yield family._packed_backward, (*grads, x, params, bound, None, 3, None, *how)
        yield family._spline, (x, *split(params, 3), bound, None, *how)
        yield family._spline_backward, (*grads, x, *split(params, 3), bound, None, *how)
    x = torch.randn(3, 5, 2, dtype=torch.float64)
    for sample_dims, channels, lead in ((-1, None, (1, 5, 1)), (1, [1, 0, 2], (1, 3, 1)), (2, None, (3, 1, 2))):
        params = torch.randn(*lead, 8, dtype=torch.float64).requires_grad_()
        how = (3, channels, *statics(sample_dims=sample_dims))
        mask = torch.rand(3, lead[1] if channels else 5, 2) < 0.6
        grads = (x.sin(), family._packed(x, params.detach(), None, mask, *how)[1].cos())
        yield family._packed, (x, params, None, mask, *how)
        yield family._packed_backward, (*grads, x, params, None, mask, *how)
        if not channels:
            yield family._spline, (x, *split(params, 3), None, mask, *how[2:])
            yield family._spline_backward, (*grads, x, *split(params, 3), None, mask, *how[2:])


@pytest.mark.parametrize("n", range(36))
def test_opcheck(n):
    operator, args = list(operator_calls())[n]
    opcheck(operator.native.op, args)


def test_every_operator_is_checked():
    calls = list(operator_calls())
    assert len(calls) == 36
    assert {o.name for o, _ in calls} == {o.name for o in vars(family).values() if isinstance(o, type(family._packed))}


def test_raw_operators_are_memory_safe():
    """What Python checks is checked again where memory is at stake."""
    x, params = torch.randn(4), torch.randn(4, 8)
    how = statics()
    bad = [
        (
            "bound has another shape",
            lambda: ops.rational_quadratic_spline_packed(x, params, x[:3].abs(), None, 3, None, *how),
        ),
        (
            "bound must have the dtype of log-dets",
            lambda: ops.rational_quadratic_spline_packed(x, params, x.double(), None, 3, None, *how),
        ),
        (
            "mixed tails need bounds",
            lambda: ops.rational_quadratic_spline_packed(x, torch.randn(4, 9), None, None, 3, None, *statics("mixed")),
        ),
        (
            "unexpected number of parameters",
            lambda: ops.rational_quadratic_spline_packed(x, params[:, :7], None, None, 3, None, *how),
        ),
        ("bins must be in", lambda: ops.rational_quadratic_spline_packed(x, params, None, None, 0, None, *how)),
        ("bins must be in", lambda: ops.rational_quadratic_spline_packed(x, params, None, None, -1, None, *how)),
        (
            "bins must be in",
            lambda: ops.rational_quadratic_spline_packed(x, torch.randn(4, 3 * 257 - 1), None, None, 257, None, *how),
        ),
        ("that of x or 1", lambda: ops.rational_quadratic_spline_packed(x[:3], params, None, None, 3, None, *how)),
        ("one more", lambda: ops.rational_quadratic_spline_packed(x, params[0], None, None, 3, None, *how)),
        ("one more", lambda: ops.rational_quadratic_spline_packed(x[0], x[0], None, None, 3, None, *how)),
        (
            "sample_dims out of range",
            lambda: ops.rational_quadratic_spline_packed(x, params, None, None, 3, None, *statics(sample_dims=2)),
        ),
        (
            "sample_dims out of range",
            lambda: ops.rational_quadratic_spline_packed(x, params, None, None, 3, None, *statics(sample_dims=-2)),
        ),
        (
            "tails must be",
            lambda: ops.rational_quadratic_spline_packed(x, params, None, None, 3, None, *statics(tails="none")),
        ),
        (
            "parametrization must be",
            lambda: ops.rational_quadratic_spline_packed(
                x, params, None, None, 3, None, *statics(parametrization="none")
            ),
        ),
        (
            "must be float16, bfloat16, float32 or float64",
            lambda: ops.rational_quadratic_spline_packed(x.int(), params.int(), None, None, 3, None, *how),
        ),
        (
            "one dtype",
            lambda: ops.rational_quadratic_spline(
                x, params[:, :3], params[:, 3:6].double(), params[:, 6:], None, None, *how
            ),
        ),
        (
            "number of parameters",
            lambda: ops.rational_quadratic_spline(x, params[:, :3], params[:, :2], params[:, 6:], None, None, *how),
        ),
        (
            "grad_y has another shape",
            lambda: ops.rational_quadratic_spline_packed_backward(x[:3], x, x, params, None, None, 3, None, *how),
        ),
        *(
            (
                "grad_y has another shape",
                lambda grad_y=grad_y: ops.rational_quadratic_spline_packed_backward(
                    grad_y, x.view(2, 2)[:, :1], x.view(2, 2), params[:2, None], None, None, 3, [1, 0, 1], *how
                ),
            )
            for grad_y in (torch.randn(2, 3), torch.randn(2, 1), torch.randn(3, 2))
        ),
        (
            "grad_logdet has another shape",
            lambda: ops.rational_quadratic_spline_packed_backward(x, x[:3], x, params, None, None, 3, None, *how),
        ),
        (
            "another dtype",
            lambda: ops.rational_quadratic_spline_packed_backward(x.double(), x, x, params, None, None, 3, None, *how),
        ),
        (
            "another dtype",
            lambda: ops.rational_quadratic_spline_packed_backward(x, x.double(), x, params, None, None, 3, None, *how),
        ),
    ]
    for message, call in bad:
        with pytest.raises(RuntimeError, match=message):
            call()


# ---- compilation ----


@pytest.mark.parametrize("requires_grad", [False, True])
def test_compile_takes_one_graph_and_keeps_it(requires_grad):
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()

    def f(x, params):
        y, logdet = rational_quadratic_spline_packed(x, params, 4, tail_bound=3.0, logdet="sum")
        back, _ = rational_quadratic_spline(y * 0.9, *split(params, 4), tail_bound=3.0, inverse=True)
        _, rows = rational_quadratic_spline_packed(back, params, 4, logdet="sum", sum_dims=0)
        return y, back, logdet, rows

    compiled = torch.compile(f, fullgraph=True, backend=counter)
    for shape in ((3, 40), (7, 33), (2, 129)):
        x, params = sample(shape, 4)
        x.requires_grad_(requires_grad)
        for got, want in zip(compiled(x, params), f(x, params), strict=True):
            assert_same(got, want)
    assert counter.frame_count <= 2


def test_compiled_gradients():
    torch._dynamo.reset()

    def f(x, params):
        y, logdet = ours(x, params, True)
        return (y**2).sum() - logdet.sum()

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (2, 3, 4):
        x, params = X[:rows].clone().requires_grad_(), PARAMS[:rows].clone().requires_grad_()
        got = torch.autograd.grad(compiled(x, params), (x, params))
        want = torch.autograd.grad(f(x, params), (x, params))
        for a, b in zip(got, want, strict=True):
            assert_same(a, b)


def test_symbolic_tracing():
    from torch.fx.experimental.proxy_tensor import make_fx

    f = lambda x, p: rational_quadratic_spline_packed(x, p, 4, logdet="sum")  # noqa: E731
    traced = make_fx(f, tracing_mode="symbolic")(*sample((3, 5), 4))
    x, params = sample((4, 7), 4)
    for got, want in zip(traced(x, params), f(x, params), strict=True):
        assert_same(got, want)


class Layer(torch.nn.Module):
    def forward(self, x, params):
        y, logdet = rational_quadratic_spline_packed(x, params, 4, tail_bound=3.0, logdet="sum")
        back, _ = rational_quadratic_spline(y, *split(params, 4), tail_bound=3.0, inverse=True)
        return y, logdet, back


def test_export_and_decompositions():
    batch = torch.export.Dim("batch", min=2, max=4096)
    inputs = sample((6, 10), 4)
    exported = torch.export.export(Layer(), inputs, dynamic_shapes={"x": {0: batch}, "params": {0: batch}})
    other = sample((33, 10), 4, seed=1)
    for got, want in zip(exported.module()(*other), Layer()(*other), strict=True):
        assert_same(got, want)
    table = torch.export.default_decompositions()
    table.update(pyperf_dl.decompositions())
    plain = exported.run_decompositions(table)
    assert "pyperf_dl" not in str(plain.graph)
    for got, want in zip(plain.module()(*other), Layer()(*other), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_aot_inductor(tmp_path, monkeypatch):
    monkeypatch.setenv("CI", "1")  # makes Inductor refuse operators that have a decomposition it does not use
    inputs = sample((6, 10), 4)
    exported = torch.export.export(Layer(), inputs)
    with torch._inductor.utils.fresh_inductor_cache():
        package = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "layer.pt2"))
    other = sample((6, 10), 4, seed=1)
    for got, want in zip(torch._inductor.aoti_load_package(package)(*other), Layer()(*other), strict=True):
        assert_same(got, want)


@pytest.mark.filterwarnings("ignore")
def test_onnx_export(tmp_path):
    """Through the decompositions: a model of standard operators, which runs without this package."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    inputs = sample((6, 10), 4)
    table = torch.export.default_decompositions()
    table.update(pyperf_dl.decompositions())
    plain = torch.export.export(Layer(), inputs).run_decompositions(table)
    program = torch.onnx.export(plain, dynamo=True, verbose=False)
    program.save(str(tmp_path / "layer.onnx"))
    session = runtime.InferenceSession(str(tmp_path / "layer.onnx"), providers=["CPUExecutionProvider"])
    other = sample((6, 10), 4, seed=1)
    names = [i.name for i in session.get_inputs()]
    got = session.run(None, dict(zip(names, (t.numpy() for t in other), strict=True)))
    for a, b in zip(got, Layer()(*other), strict=True):
        torch.testing.assert_close(torch.from_numpy(a), b, rtol=1e-4, atol=1e-4)


# ---- autocast, sharding, memory ----


def test_autocast_leaves_dtypes_alone():
    conditioner = torch.nn.Linear(4, 4 * 11)
    x = torch.randn(5, 4, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        params = conditioner(x).view(5, 4, 11)
        assert params.dtype == torch.bfloat16
        y, logdet = rational_quadratic_spline_packed(x, params, 4, logdet="sum")
        params.retain_grad()
    assert y.dtype == logdet.dtype == torch.float32
    (y.sum() + logdet.sum()).backward()
    assert x.grad.dtype == conditioner.weight.grad.dtype == torch.float32
    assert params.grad.dtype == torch.bfloat16
    half = rational_quadratic_spline_packed(x.bfloat16(), params, 4)
    assert (half[0].dtype, half[1].dtype) == (torch.bfloat16, torch.float32)


def test_dtensor_shards_samples():
    """Two gloo processes; elements without sums may be sharded along any dimension."""
    script = """
        import torch, torch.distributed as dist, pyperf_dl
        from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh
        dist.init_process_group("gloo")
        mesh = init_device_mesh("cpu", (2,))
        torch.manual_seed(0)
        x, params = torch.randn(6, 4), torch.randn(6, 4, 11)
        cases = (("sum", Shard(0)), ("elementwise", Shard(1)), ("sum", Shard(1)), ("sum", Replicate()))
        for logdet, placement in cases:
            a, b = (distribute_tensor(t, mesh, [placement]).requires_grad_() for t in (x, params))
            y, l = pyperf_dl.rational_quadratic_spline_packed(a, b, 4, logdet=logdet)
            if placement == Shard(0) or logdet == "elementwise":
                assert y.placements == l.placements == (placement,), (placement, y.placements)
            (y.sum() + l.sum()).backward()
            c, d = (t.clone().requires_grad_() for t in (x, params))
            z, m = pyperf_dl.rational_quadratic_spline_packed(c, d, 4, logdet=logdet)
            (z.sum() + m.sum()).backward()
            assert torch.equal(y.full_tensor(), z) and torch.equal(l.full_tensor(), m)
            assert torch.equal(a.grad.full_tensor(), c.grad) and torch.equal(b.grad.full_tensor(), d.grad)
        bound, how = torch.tensor([1.0, 2.0, 0.5, 3.0]), {"tails": ["linear", "circular"] * 2, "logdet": "sum"}
        params = torch.randn(6, 4, 12)
        a, b = (distribute_tensor(t, mesh, [Shard(0)]).requires_grad_() for t in (x, params))
        shared = distribute_tensor(bound, mesh, [Replicate()])
        y, l = pyperf_dl.rational_quadratic_spline_packed(a, b, 4, tail_bound=shared, **how)
        assert y.placements == l.placements == (Shard(0),)
        (y.sum() + l.sum()).backward()
        c, d = (t.clone().requires_grad_() for t in (x, params))
        z, m = pyperf_dl.rational_quadratic_spline_packed(c, d, 4, tail_bound=bound, **how)
        (z.sum() + m.sum()).backward()
        assert torch.equal(y.full_tensor(), z) and torch.equal(l.full_tensor(), m)
        assert torch.equal(a.grad.full_tensor(), c.grad) and torch.equal(b.grad.full_tensor(), d.grad)
        dist.destroy_process_group()
        print("sharded")
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "--no-python"]
    done = subprocess.run(
        [*command, sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.stdout.count("sharded") == 2, done.stdout + done.stderr


@pytest.mark.parametrize("separate", [False, True])
def test_saved_bytes(separate):
    """x and the parameters, no copies of them, and nothing that hooks do not see."""
    import gc
    import weakref

    x, params = (t.requires_grad_() for t in sample((50, 20), 8))
    saved: list[torch.Tensor] = []

    def keep(t):
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        if separate:
            rational_quadratic_spline(x, *split(params, 8), logdet="sum")
        else:
            rational_quadratic_spline_packed(x, params, 8, logdet="sum")
    assert sum(t.numel() for t in saved) == x.numel() + params.numel()
    assert {t.untyped_storage().data_ptr() for t in saved} == {t.untyped_storage().data_ptr() for t in (x, params)}
    a, b = x * 1, params * 1
    watched = [weakref.ref(a), weakref.ref(b)]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t):  # as offloading does
        y, logdet = rational_quadratic_spline_packed(a, b, 8, logdet="sum")
    del a, b
    gc.collect()
    assert [w() for w in watched] == [None, None]
    (y.sum() + logdet.sum()).backward()


def test_checkpointing_gives_the_same_gradient():
    from torch.utils.checkpoint import checkpoint

    def loss(x, params):
        y, logdet = rational_quadratic_spline_packed(x * 2, params * 3, 3, tail_bound=2.0)
        return y.sum() + logdet.sum()

    x, params = X.clone().requires_grad_(), PARAMS.clone().requires_grad_()
    want = torch.autograd.grad(loss(x, params), (x, params))
    got = torch.autograd.grad(checkpoint(loss, x, params, use_reentrant=False), (x, params))
    for a, b in zip(got, want, strict=True):
        assert_same(a, b)


def test_memory_does_not_grow():
    import resource

    x, params = (t.requires_grad_() for t in sample((8, 64), 8))

    def run(times):
        for _ in range(times):
            y, logdet = rational_quadratic_spline_packed(x, params, 8, logdet="sum")
            torch.autograd.grad(y.sum() + logdet.sum(), (x, params))

    run(50)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run(1000)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 16 << 10  # KiB


def test_inputs_are_not_written():
    x, params = sample((20, 3), 5)
    before = [t.clone() for t in (x, params)]
    y, _ = rational_quadratic_spline_packed(x, params, 5)
    y.add_(1)  # never a view of x
    results(x, params, 5)
    for a, b in zip((x, params), before, strict=True):
        assert_same(a, b)
    with torch.inference_mode():
        assert rational_quadratic_spline_packed(x, params, 5)[0].shape == x.shape


def test_flop_formula_counts_bins():
    from torch.utils.flop_counter import FlopCounterMode

    def counted(elements, bins):
        x, params = sample((elements,), bins)
        with FlopCounterMode(display=False) as counter:
            rational_quadratic_spline_packed(x, params, bins)
            rational_quadratic_spline(x, *split(params, bins))
        return counter.get_total_flops()

    assert counted(20, 8) == 2 * counted(10, 8) > 2 * counted(10, 4) > 0


# ---- bad input ----

ZEROS, PACKED = torch.zeros(2, 5), torch.zeros(2, 5, 11)
BAD = [
    (TypeError, "x must be a torch.Tensor, got list", lambda f: f([1.0, 2.0])),
    (TypeError, "x must have one of the dtypes .* got torch.int64", lambda f: f(ZEROS.long())),
    (TypeError, "x must be a dense tensor, got torch.sparse_coo", lambda f: f(ZEROS.to_sparse())),
    (
        TypeError,
        "must have x's dtype, or float16 .* got torch.float64 for x torch.float32",
        lambda f: f(params=PACKED.double()),
    ),
    (TypeError, "must have x's dtype.* got torch.float32 for x torch.bfloat16", lambda f: f(ZEROS.bfloat16())),
    (TypeError, "must have one of the dtypes .* got torch.int32", lambda f: f(params=PACKED.int())),
    (ValueError, "must be on x's device meta, got cpu", lambda f: f(ZEROS.to("meta"))),
    (
        ValueError,
        r"must have shape \[\*x.shape, parameters\] or broadcast to it, got",
        lambda f: f(params=PACKED[:, :4]),
    ),
    (ValueError, "must have a last dimension of parameters", lambda f: f(params=torch.tensor(1.0))),
    (TypeError, "inverse must be a bool, got 1", lambda f: f(inverse=1)),
    (TypeError, "identity_init must be a bool, got None", lambda f: f(identity_init=None)),
    (ValueError, "tails must be one of 'linear', 'circular', 'bounded', got 'none'", lambda f: f(tails="none")),
    (TypeError, "tails must be one of .*got None", lambda f: f(tails=None)),
    (
        ValueError,
        "tails='circular' with K = 4 bins needs K = 4 derivatives an element .*, got 3",
        lambda f: f(tails="circular"),
    ),
    (ValueError, r"tails='bounded' with K = 4 bins needs K \+ 1 = 5 derivatives", lambda f: f(tails="bounded")),
    (ValueError, "parametrization must be one of 'nflows', 'zuko', got 'pyro'", lambda f: f(parametrization="pyro")),
    (ValueError, "tail_bound must be > 0, got 0", lambda f: f(tail_bound=0)),
    (ValueError, "tail_bound must be finite, got nan", lambda f: f(tail_bound=math.nan)),
    (ValueError, "tail_bound must be finite, got inf", lambda f: f(tail_bound=math.inf)),
    (ValueError, r"tail_bound must be 0 or of a size in \[1e-30, 1e30\], got 1e\+39", lambda f: f(tail_bound=1e39)),
    (ValueError, r"logit_scale must be 0 or of a size in \[1e-30, 1e30\]", lambda f: f(logit_scale=1e-45)),
    (
        TypeError,
        "tail_bound must have the dtype of x or of log-dets, torch.float32, got torch.float64",
        lambda f: f(tail_bound=torch.ones(5, dtype=torch.float64)),
    ),
    (
        TypeError,
        "tail_bound must have one of the dtypes .* got torch.int64",
        lambda f: f(tail_bound=torch.ones(5).long()),
    ),
    (TypeError, "tail_bound must be a dense tensor, got torch.sparse_coo", lambda f: f(tail_bound=ZEROS.to_sparse())),
    (
        ValueError,
        "tail_bound must be on x's device cpu, got meta",
        lambda f: f(tail_bound=torch.ones(5, device="meta")),
    ),
    (
        ValueError,
        r"tail_bound must be a number or broadcast to the shape of x, got \[4\] for x \[2, 5\]",
        lambda f: f(tail_bound=torch.ones(4)),
    ),
    (
        ValueError,
        r"tail_bound must be a number or broadcast to the shape of x, got \[1, 2, 5\] for x \[2, 5\]",
        lambda f: f(tail_bound=torch.ones(1, 2, 5)),
    ),
    (
        ValueError,
        "tail_bound must not require a gradient, it has none: detach it",
        lambda f: f(tail_bound=torch.ones(5, requires_grad=True)),
    ),
    (
        ValueError,
        "tail_bound must be a number beside bounds, got a tensor",
        lambda f: f(tail_bound=torch.ones(5), bounds=(0.0, 1.0, 0.0, 1.0)),
    ),
    (TypeError, r"tail_bound must be a number, got \[1.0\]", lambda f: f(tail_bound=[1.0])),
    (
        ValueError,
        "each of tails must be one of 'linear', 'circular', got 'bounded'",
        lambda f: f(tails=["linear"] * 4 + ["bounded"], params=torch.zeros(2, 5, 12)),
    ),
    (TypeError, "each of tails must be one of 'linear', 'circular', got 1", lambda f: f(tails=[1] * 5)),
    (
        ValueError,
        r"a sequence of tails must have one for each element of x's last dimension, got 4 for x \[2, 5\]",
        lambda f: f(tails=["linear"] * 4, params=torch.zeros(2, 5, 12)),
    ),
    (
        ValueError,
        r"a sequence of tails must have one for each .*, got 1 for x \[\]",
        lambda f: f(torch.tensor(0.5), torch.zeros(12), tails=["linear"]),
    ),
    (
        ValueError,
        "a sequence of tails with K = 4 bins needs K = 4 derivatives an element .12 parameters in all., got 3",
        lambda f: f(tails=["linear"] * 5),
    ),
    (
        ValueError,
        "bounds must be the same along x and y with mixed tails",
        lambda f: f(tails=["linear"] * 5, params=torch.zeros(2, 5, 12), bounds=(0.0, 1.0, 0.0, 2.0)),
    ),
    (TypeError, "tail_bound must be a number, got True", lambda f: f(tail_bound=True)),
    (ValueError, r"bounds must be \(left, right, bottom, top\), got", lambda f: f(bounds=(0.0, 1.0))),
    (ValueError, "bounds must have left < right and bottom < top", lambda f: f(bounds=(1.0, 0.0, 0.0, 1.0))),
    (ValueError, "bounds must be the same along x and y with linear tails", lambda f: f(bounds=(0.0, 1.0, 0.0, 2.0))),
    (ValueError, "min_bin_width must be >= 0, got -0.1", lambda f: f(min_bin_width=-0.1)),
    (ValueError, r"min_bin_width \* K must be < 1 to fit the box, got 0.25 \* 4", lambda f: f(min_bin_width=0.25)),
    (ValueError, r"min_bin_height \* K must be < 1", lambda f: f(min_bin_height=1)),
    (ValueError, "min_derivative must be >= 0, got -1", lambda f: f(min_derivative=-1)),
    (ValueError, "min_derivative must be < 1 with identity_init", lambda f: f(min_derivative=1.5, identity_init=True)),
    (ValueError, "logit_scale must be > 0, got 0", lambda f: f(logit_scale=0)),
    (ValueError, r"slope must be in \(0, 1\), got 1.0", lambda f: f(parametrization="zuko", slope=1.0)),
    (
        ValueError,
        "identity_init is for parametrization='nflows'",
        lambda f: f(parametrization="zuko", identity_init=True),
    ),
    (ValueError, "logdet must be one of 'elementwise', 'sum', got 'mean'", lambda f: f(logdet="mean")),
    (ValueError, "sum_dims needs logdet='sum'", lambda f: f(sum_dims=1)),
    (
        ValueError,
        r"sum_dims must be in \[-2, 1\] for a tensor with 2 dimensions, got 2",
        lambda f: f(logdet="sum", sum_dims=2),
    ),
    (ValueError, "sum_dims must name each dimension once", lambda f: f(logdet="sum", sum_dims=(1, -1))),
    (TypeError, "sum_dims must be an int, got 'x'", lambda f: f(logdet="sum", sum_dims="x")),
    (ValueError, "precision must be one of 'fast', 'exact', got 'high'", lambda f: f(precision="high")),
    (TypeError, "sample_mask must be a bool tensor", lambda f: f(sample_mask=torch.ones(2, 5))),
    (TypeError, "sample_mask must be a bool tensor", lambda f: f(sample_mask=True)),
    (
        ValueError,
        r"sample_mask must broadcast to the shape of what is transformed, \[2, 5\], got \[2\]",
        lambda f: f(sample_mask=torch.ones(2, dtype=torch.bool)),
    ),
    (
        ValueError,
        "sample_mask must be on x's device cpu, got meta",
        lambda f: f(sample_mask=torch.ones(5, dtype=torch.bool, device="meta")),
    ),
]


@pytest.mark.parametrize(
    ("channels", "params", "error", "message"),
    [
        ((0, 2), PACKED, TypeError, "channels must be a slice of dim 1 of x, or None"),
        (slice(0, 2, -1), PACKED, ValueError, "channels must be a slice of ints with a step >= 1"),
        (
            slice(0, 2),
            PACKED,
            ValueError,
            r"params must have shape .* or broadcast to it, got \[2, 5, 11\] .* \[2, 2\]",
        ),
    ],
)
def test_bad_channels(channels, params, error, message):
    with pytest.raises(error, match=f"rational_quadratic_spline_packed: {message}"):
        rational_quadratic_spline_packed(ZEROS, params, 4, channels=channels)


def call_packed(x=ZEROS, params=PACKED, bins=4, **how):
    return rational_quadratic_spline_packed(x, params, bins, **how)


def call_separate(x=ZEROS, params=PACKED, **how):
    parts = split(params, 4) if params.dim() else [params] * 3
    return rational_quadratic_spline(x, *parts, **how)


@pytest.mark.parametrize(("error", "message", "call"), BAD, ids=[m for _, m, _ in BAD])
@pytest.mark.parametrize("function", [call_packed, call_separate])
def test_bad_input(function, error, message, call):
    name = "rational_quadratic_spline" + ("_packed" if function is call_packed else "")
    with pytest.raises(error, match=f"^{name}: .*{message}"):
        call(function)
    assert torch.equal(ZEROS, torch.zeros(2, 5))
    assert torch.equal(PACKED, torch.zeros(2, 5, 11))


def test_bad_counts():
    with pytest.raises(TypeError, match=r"^rational_quadratic_spline_packed: bins must be an int, got 4.0"):
        call_packed(bins=4.0)
    with pytest.raises(ValueError, match=r"^rational_quadratic_spline_packed: bins must be >= 1, got 0"):
        call_packed(bins=0)
    with pytest.raises(
        ValueError, match=r"with K = 5 bins needs K - 1 = 4 derivatives an element .14 parameters in all."
    ):
        call_packed(bins=5)
    with pytest.raises(ValueError, match=r"number of bins must be in \[1, 256\], got 257"):
        call_packed(params=torch.zeros(2, 5, 3 * 257 - 1), bins=257)
    w, h, d = split(PACKED, 4)
    with pytest.raises(
        ValueError, match=r"^rational_quadratic_spline: heights must have as many bins as widths, 4, got 3"
    ):
        rational_quadratic_spline(ZEROS, w, h[..., :3], d)
    with pytest.raises(TypeError, match=r"^rational_quadratic_spline: derivatives must have the dtype of widths"):
        rational_quadratic_spline(ZEROS, w, h, d.bfloat16())
    with pytest.raises(ValueError, match=r"number of bins must be in \[1, 256\], got 0"):
        rational_quadratic_spline(ZEROS, w[..., :0], h[..., :0], d[..., :0])
