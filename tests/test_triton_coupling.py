"""The Triton kernels of the couplings, against the reference in float64; see test_triton.py for where this runs.

Bounds in float32: rounding moves x and the knots by a few ulps of the box, which moves y by as much times the slope,
and the log-det by as much times its own derivative.
"""

import itertools
import random
import subprocess
import sys
import warnings

import pytest
import torch
from test_triton import DEVICE, INTERPRETED, _AbsentGpu, interpreted, pytestmark  # noqa: F401 - pytest reads the last one

import pyperf_dl
from pyperf_dl import _coupling_spline as family
from pyperf_dl.reference import coupling as reference

BINS = (1, 2, 5, 8, 10, 16, 33, 64)
KINDS = tuple(itertools.product(("nflows", "zuko"), (False, True)))  # parametrisation, inverse
BOX = (-3.0, 3.0, -2.5, 3.5)
ULP = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7, torch.float32: 2.0**-23, torch.float64: 2.0**-52}


@pytest.fixture
def launcher(monkeypatch):
    from pyperf_dl._launch import coupling

    if INTERPRETED:  # the interpreter pays by the program
        monkeypatch.setattr(coupling, "PARAMETERS", 1 << 14)
    return coupling


@pytest.fixture
def small_programs(launcher, monkeypatch):
    """Few elements then take several programs."""
    monkeypatch.setattr(launcher, "ELEMENTS", 32)
    monkeypatch.setattr(launcher, "PARAMETERS", 512)


def spline_statics(parametrization="nflows", inverse=False, sample_dims=-1, box=BOX, logit_scale=0.8, exact=False):
    """What follows the tensors, for linear tails."""
    smallest, curve = ((1e-3, 2e-3, 1e-3), 0.7) if parametrization == "nflows" else ((0.0, 0.0, 0.0), 6.9)
    return inverse, "linear", parametrization, box, smallest, logit_scale, curve, sample_dims, exact


def numbers(*shape, seed=0, dtype=torch.float32, size=1.0):
    return (size * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def wide(tensors):
    return [t.detach().double().cpu() for t in tensors]


def on_device(tensors):
    return [t.to(DEVICE) for t in tensors]


def assert_within(got, wanted, bound):
    """|got - wanted| <= bound, number by number; NaN and infinities where they are wanted."""
    got, wanted = got.detach().double().cpu(), wanted.detach().double().cpu()
    assert got.shape == wanted.shape
    close = (got - wanted).abs() <= bound
    same = (got == wanted) | (got.isnan() & wanted.isnan())
    off = ~(close | same)
    assert not off.any(), f"{got[off][:4]} for {wanted[off][:4]}, off by {(got - wanted).abs()[off].max()}"


def differentiated(forward, inputs, statics):
    """Results of `forward` in float64, and the derivatives of the log-det by x. Log-dets are not summed."""
    x, *parameters = wide(inputs)
    x.requires_grad_()
    y, logdet = forward(x, *parameters, *statics)
    (lean,) = torch.autograd.grad(logdet.sum(), x)
    return y.detach(), logdet.detach(), lean


def check_spline(launcher, x, parameters, statics, ulps=64):
    """Packed where there is one parameter tensor, followed by the number of bins."""
    name = "rational_quadratic_spline" + ("" if len(parameters) == 3 else "_packed")
    tensors = [t for t in parameters if isinstance(t, torch.Tensor)]
    arguments = [None, None, *(() if len(tensors) == 3 else (*parameters[1:], None)), *statics]
    y, logdet = getattr(launcher, name)(*on_device((x, *tensors)), *arguments)
    assert y.dtype == x.dtype
    assert logdet.dtype == reference.logdet_dtype(x)
    elementwise = [*arguments[:-2], -1, arguments[-1]]
    wanted, wanted_logdet, lean = differentiated(getattr(reference, name), (x, *tensors), elementwise)
    work = ULP[torch.float64 if x.dtype == tensors[0].dtype == torch.float64 else torch.float32]
    unit = ulps * work * max(map(abs, statics[3]))
    stored = 0 if x.dtype == torch.float64 else ULP[x.dtype]
    bound = unit * (1 + wanted_logdet.exp()) + stored * wanted.abs()
    assert_within(y, wanted, bound)
    bound = unit * (1 + lean.abs()) + work * wanted_logdet.abs()
    sample_dims = statics[-2]
    sums = (reference.summed(t, sample_dims, torch.float64) for t in (wanted_logdet, bound))
    assert_within(logdet, *sums)
    return y, logdet


def reference_gradients(x, packed, bins, statics):
    """Gradients of y and log-det, and by the reference in float64 those of the inputs."""
    results = reference.rational_quadratic_spline_packed(x, packed, None, None, bins, None, *statics)
    grads = [numbers(*t.shape, seed=5 + i).to(t.dtype) for i, t in enumerate(results)]
    wanted = reference.rational_quadratic_spline_packed_backward(
        *wide((*grads, x, packed)), None, None, bins, None, *statics
    )
    return grads, wanted


def spline_gradients(launcher, x, packed, bins, statics):
    """(by Triton, by the reference in float64)"""
    grads, wanted = reference_gradients(x, packed, bins, statics)
    got = launcher.rational_quadratic_spline_packed_backward(
        *on_device((*grads, x, packed)), None, None, bins, None, *statics
    )
    assert [t.dtype for t in got] == [x.dtype, packed.dtype]
    return got, wanted


# ---- the spline ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bins", BINS)
def test_spline(launcher, bins, dtype):
    for turn, (kind, inverse) in enumerate(KINDS):
        x = numbers(6, 21, seed=bins + turn, dtype=dtype, size=2.0)
        packed = numbers(6, 21, 3 * bins - 1, seed=turn, dtype=dtype, size=1.5)
        statics = spline_statics(kind, inverse, sample_dims=1 if turn % 3 else -1)
        check_spline(launcher, x, (packed, bins) if turn % 2 else packed.split((bins, bins, bins - 1), -1), statics)


@pytest.mark.parametrize("bins", BINS)
def test_gradients_of_the_spline(launcher, bins):
    for turn, (kind, inverse) in enumerate(KINDS):
        x = numbers(4, 17, seed=bins + turn, dtype=torch.float64, size=2.0)
        packed = numbers(4, 17, 3 * bins - 1, seed=turn, dtype=torch.float64, size=1.5)
        statics = spline_statics(kind, inverse, sample_dims=1 if turn % 3 else -1)
        got, wanted = spline_gradients(launcher, x, packed, bins, statics)
        for a, b in zip(got, wanted, strict=True):
            assert_within(a, b, 1e-10 * (1 + b.abs().amax()) if b.numel() else 0)


def test_gradients_of_separate_parameters(launcher):
    x, packed, grad = (numbers(3, 11, *p, seed=len(p), dtype=torch.float64) for p in ((), (14,), ()))
    parts = packed.split((5, 5, 4), -1)
    got = launcher.rational_quadratic_spline_backward(
        *on_device((grad, grad, x, *parts)), None, None, *spline_statics()
    )
    wanted = reference.rational_quadratic_spline_backward(grad, grad, x, *parts, None, None, *spline_statics())
    for a, b in zip(got, wanted, strict=True):
        assert_within(a, b, 1e-10 * (1 + b.abs().amax()))


@pytest.mark.parametrize("bins", [5, 8, 33])
def test_gradients_in_float32(launcher, bins):
    """Away from the knots, where they jump; bound by how much they change over a few ulps of the box."""
    for turn, (kind, inverse) in enumerate(KINDS):
        x = numbers(4, 25, seed=bins + turn, size=2.0)
        packed = numbers(4, 25, 3 * bins - 1, seed=turn)
        statics = spline_statics(kind, inverse)
        got, wanted = spline_gradients(launcher, x, packed, bins, statics)
        step = 64 * ULP[torch.float32] * 3.5
        shifted = [reference_gradients(x.double() + d, packed, bins, statics)[1] for d in (-step, step)]
        moved = [(a - b).abs() for a, b in zip(*shifted, strict=True)]
        row = torch.maximum(moved[0], moved[1].amax(-1))
        size = torch.maximum(wanted[0].abs(), wanted[1].abs().amax(-1))
        bound = row + 64 * ULP[torch.float32] * (1 + size)
        assert_within(got[0], wanted[0], bound)
        assert_within(got[1], wanted[1], bound[..., None])


HALVES = (torch.float16, torch.bfloat16)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("dtypes", [*((d, d) for d in HALVES), *((torch.float32, d) for d in HALVES)], ids=str)
def test_half_precision(launcher, dtypes, kind):
    x, packed = numbers(5, 13, dtype=dtypes[0], size=2.0), numbers(5, 13, 23, seed=1, dtype=dtypes[1])
    check_spline(launcher, x, (packed, 8), spline_statics(*kind, sample_dims=1))
    got, wanted = spline_gradients(launcher, x, packed, 8, spline_statics(*kind))
    for a, b in zip(got, wanted, strict=True):
        assert_within(a, b, ULP[a.dtype] * b.abs() + 2e-3 * (1 + b.abs().amax()))


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_knots_and_ends(launcher, kind, dtype):
    """Left ends of all bins and their neighbours; the box's ends are kept bit by bit, and nothing changes outside."""
    parametrization, inverse = kind
    bins, (low, high) = 8, BOX[2:] if inverse else BOX[:2]
    packed = numbers(1, 23, seed=3, dtype=dtype).expand(8, 23)
    statics = spline_statics(*kind)
    raw = packed[0, bins : 2 * bins] if inverse else packed[0, :bins]
    if parametrization == "zuko":
        raw = raw / (1 + (2 * raw / statics[6]).abs())
    knots, _ = reference.bin_edges(raw * statics[5], low, high, statics[4][int(inverse)])
    for x in (knots, knots.nextafter(knots + 1), knots.nextafter(knots - 1)):
        check_spline(launcher, x, (packed, bins), statics)
    ends = torch.tensor([low, high], dtype=dtype)
    beyond = ends.nextafter(ends * 2)
    x = torch.cat([ends, beyond, torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30], dtype=dtype)])
    y, logdet = check_spline(launcher, x, (packed, bins), statics)
    to = torch.tensor(BOX[:2] if inverse else BOX[2:], dtype=dtype)
    assert y[:2].tolist() == to.tolist()
    torch.testing.assert_close(y[2:].cpu(), x[2:], rtol=0, atol=0, equal_nan=True)
    assert not logdet[2:].any()
    (grad, grad_packed), _ = spline_gradients(launcher, x, packed, bins, statics)
    assert torch.equal(grad[2:].cpu(), numbers(8, seed=5).to(dtype)[2:])
    assert not grad_packed[2:].any()


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("size", [10.0, 100.0, 1e4])
def test_huge_parameters(launcher, kind, size):
    """Finite, within the box, and as exact as the slope allows."""
    for bins in (2, 8, 33):
        x = (2 * torch.rand(4, 25, generator=torch.Generator().manual_seed(bins)) - 1) * 3
        packed = numbers(4, 25, 3 * bins - 1, seed=bins + 1).clamp(-1, 1) * size
        statics = spline_statics(*kind)
        y, _ = check_spline(launcher, x, (packed, bins), statics)
        inside = x >= -2.5 if statics[0] else torch.ones_like(x, dtype=torch.bool)
        low, high = BOX[:2] if statics[0] else BOX[2:]
        assert ((y.cpu() >= low) & (y.cpu() <= high))[inside].all()
        (grad_x, grad_packed), _ = spline_gradients(launcher, x, packed, bins, statics)
        assert grad_x.isfinite().all()
        assert grad_packed.isfinite().all()


@pytest.mark.parametrize("inverse", [False, True])
def test_slopes_beyond_the_largest(launcher, inverse):
    x = torch.linspace(-3, 3, 41)
    packed = numbers(41, 14, seed=2) * torch.tensor([1.0] * 10 + [3e38] * 4)
    results = launcher.rational_quadratic_spline_packed(
        *on_device((x, packed)), None, None, 5, None, *spline_statics("nflows", inverse)
    )
    gradients, _ = spline_gradients(launcher, x, packed, 5, spline_statics("nflows", inverse))
    for t in (*results, *gradients):
        assert t.isfinite().all()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_nan_stays_in_its_element(launcher, kind):
    x, packed = numbers(1, 30).clamp(-2, 2), numbers(1, 30, 14, seed=1)
    statics = spline_statics(*kind)
    clean = launcher.rational_quadratic_spline_packed(*on_device((x, packed)), None, None, 5, None, *statics)
    packed[0, 3, 2] = packed[0, 11, 7] = torch.nan
    x[0, 20] = torch.nan
    touched = launcher.rational_quadratic_spline_packed(*on_device((x, packed)), None, None, 5, None, *statics)
    others = [i for i in range(30) if i not in (3, 11, 20)]
    for a, b in zip(clean, touched, strict=True):
        assert torch.equal(a[0, others], b[0, others])
    assert touched[0].isnan().sum() == 3


@pytest.mark.parametrize("kind", KINDS[::2], ids=str)
def test_round_trip(launcher, kind):
    x, packed = numbers(3, 40, dtype=torch.float64, size=2), numbers(3, 40, 23, seed=1, dtype=torch.float64)
    there, back = (spline_statics(kind[0], inverse, box=(-3.0, 3.0, -3.0, 3.0)) for inverse in (False, True))
    tensors = on_device((x, packed))
    y, logdet = launcher.rational_quadratic_spline_packed(*tensors, None, None, 8, None, *there)
    again, inverse_logdet = launcher.rational_quadratic_spline_packed(y, tensors[1], None, None, 8, None, *back)
    # The inverse divides what rounding did to y by the slope; the log-dets differ by as much times their derivative.
    lean = differentiated(reference.rational_quadratic_spline_packed, (x, packed), (None, None, 8, None, *there))[2]
    moved = 64 * ULP[torch.float64] * (1 + (-logdet).exp().cpu())
    assert_within(again, x, moved * 3)
    assert_within(inverse_logdet, -logdet, moved * 3 * (1 + lean.abs()))


# ---- layouts ----


def layouts():
    """x, and parameters of 5 bins, as conditioners make them."""
    base = numbers(2, 3, 2, 5, dtype=torch.float64, size=2)
    per_channel = numbers(2, 3 * 14, 2, 5, seed=1, dtype=torch.float64)
    return {
        "[B, C, H, W, P]": (base, numbers(2, 3, 2, 5, 14, seed=1, dtype=torch.float64)),
        "[B, C*P, H, W]": (base, per_channel.view(2, 3, 14, 2, 5).permute(0, 1, 3, 4, 2)),
        "[B, P*C, H, W]": (base, per_channel.view(2, 14, 3, 2, 5).permute(0, 2, 3, 4, 1)),
        "[B, C, P, T]": (base[:, 0], per_channel.view(2, 3, 14, 10)[:, 0, :, :].view(2, 14, 2, 5).permute(0, 2, 3, 1)),
        "channels last": (base.to(memory_format=torch.channels_last), per_channel.view(2, 3, 2, 5, 14)),
        "shared by the batch": (base, per_channel.view(2, 3, 2, 5, 14)[:1].expand(2, 3, 2, 5, 14)),
        "one for all": (base, per_channel.view(-1)[:14].expand(2, 3, 2, 5, 14)),
        "every other": (base[..., ::2, 1::2], per_channel.view(2, 3, 2, 5, 14)[..., ::2, 1::2, :]),
        "expanded x": (base[:1, :, :1].expand(2, 3, 2, 5), per_channel.view(2, 3, 2, 5, 14)),
        "transposed": (base.transpose(0, 3), per_channel.view(2, 3, 2, 5, 14).transpose(0, 3)),
        "a number": (base[0, 0, 0, 0], per_channel.view(-1)[:14]),
        "one element": (base[:1, :1, :1, :1], per_channel.view(2, 3, 2, 5, 14)[:1, :1, :1, :1]),
        "no sample": (base[:0], per_channel.view(2, 3, 2, 5, 14)[:0]),
        "empty samples": (base[..., :0], per_channel.view(2, 3, 2, 5, 14)[..., :0, :]),
    }


def expected_layout(t):
    """The strides of a new tensor whose dimensions keep their order in memory; the logical one if t is expanded."""
    order = list(range(t.dim()))
    if not any(stride == 0 and size != 1 for stride, size in zip(t.stride(), t.shape, strict=True)):
        order = order if t.is_contiguous() else sorted(order, key=lambda d: -t.stride(d))
    return torch.empty_permuted(t.shape, order).stride()


@pytest.mark.parametrize("layout", layouts())
def test_layouts_of_splines(small_programs, launcher, layout):
    x, packed = on_device(layouts()[layout])
    for turn, sample_dims in enumerate(range(-1, x.dim() + 1)):
        statics = spline_statics(*KINDS[turn % 4], sample_dims)
        y, logdet = check_spline(launcher, x, (packed, 5), statics)
        assert y.stride() == expected_layout(x)
        if x.numel():
            got, wanted = spline_gradients(launcher, x, packed, 5, statics)
            for a, b, like in zip(got, wanted, (x, packed), strict=True):
                assert_within(a, b, 1e-10 * (1 + b.abs().amax()))
                assert a.stride() == expected_layout(like)
        else:
            grads = launcher.rational_quadratic_spline_packed_backward(
                y, logdet, x, packed, None, None, 5, None, *statics
            )
            assert [g.shape for g in grads] == [x.shape, packed.shape]


def test_positions_in_64_bits(launcher, monkeypatch):
    launch = launcher._launch
    monkeypatch.setattr(launcher, "_launch", lambda *args, **options: launch(*args, **{**options, "NARROW": False}))
    x, packed = layouts()["transposed"]
    check_spline(launcher, x, (packed, 5), spline_statics(sample_dims=1))
    check_affine(launcher, (x, packed[..., 0], packed[..., 1]), (False, "exp", 0.0, 0.0, 0.0, False, -1))


@pytest.mark.parametrize("seed", range(12))
def test_random_geometry(launcher, monkeypatch, seed):
    choose = random.Random(seed)
    monkeypatch.setattr(launcher, "ELEMENTS", choose.choice((4, 16, 1024)))
    monkeypatch.setattr(launcher, "PARAMETERS", choose.choice((64, 256, 2048)))
    bins, dims = choose.choice((1, 2, 3, 7, 8, 9)), choose.randint(1, 5)
    shape = [choose.choice((1, 2, 3, 5)) for _ in range(dims)]

    def strided(*shape, seed):
        order = choose.sample(range(len(shape)), len(shape))
        steps = [choose.choice((1, 1, 2)) for _ in shape]
        t = numbers(*(shape[d] * steps[d] for d in order), seed=seed, dtype=torch.float64)
        return t.permute([order.index(d) for d in range(len(shape))])[tuple(slice(None, None, s) for s in steps)]

    x, packed = strided(*shape, seed=seed), strided(*shape, 3 * bins - 1, seed=seed + 1)
    kind = choose.choice(KINDS)
    statics = spline_statics(*kind, choose.randint(-1, dims))
    check_spline(launcher, x, (packed, bins), statics)
    got, wanted = spline_gradients(launcher, x, packed, bins, statics)
    for a, b in zip(got, wanted, strict=True):
        assert_within(a, b, 1e-10 * (1 + b.abs().amax()) if b.numel() else 0)
    scale, shift = strided(*shape, seed=seed + 2), strided(*shape, seed=seed + 3)
    activation = choose.choice(reference.ACTIVATIONS)
    how = (kind[1], activation, 1.5, 0.0, 0.0, choose.random() < 0.5, statics[-2])
    check_affine(launcher, (x, scale, shift), how)


# ---- affine couplings ----


def affine_in_torch(x, scale, shift, inverse, activation, clamp, min_scale, max_scale, shift_first, sample_dims):
    size = reference.log_scale(scale, activation, clamp, min_scale, max_scale)
    if inverse:
        y = x * (-size).exp() - shift if shift_first else (x - shift) * (-size).exp()
    else:
        y = (x + shift) * size.exp() if shift_first else x * size.exp() + shift
    return y, reference.summed(-size if inverse else size, sample_dims, torch.float64)


def check_affine(launcher, tensors, how):
    """Forward and backward; rounding of the log-scale moves y by as much times its size."""
    work = ULP[torch.float64 if tensors[0].dtype == torch.float64 else torch.float32]
    leaves = [t.requires_grad_() for t in wide(tensors)]
    wanted = affine_in_torch(*leaves, *how)
    got = launcher.affine_coupling(*on_device(tensors), *how)
    size = affine_in_torch(*leaves, *how[:-1], -1)[1].detach()
    x, _, shift = wide(tensors)
    scale = (1 + size.abs()) * size.exp()
    moved = x.abs() + shift.abs()
    bound = 32 * work * (1 + moved * (1 + scale)) + (0 if work < 1e-10 else ULP[tensors[0].dtype]) * wanted[0].abs()
    assert_within(got[0], wanted[0], bound.detach())
    assert_within(got[1], wanted[1], 32 * work * reference.summed(1 + size.abs(), how[-1], torch.float64))
    assert got[0].dtype == tensors[0].dtype
    assert got[1].dtype == reference.logdet_dtype(tensors[0])
    grads = [numbers(*t.shape, seed=7 + i).to(t.dtype) for i, t in enumerate(got)]
    outputs, weights = zip(*((t, g) for t, g in zip(wanted, wide(grads), strict=True) if t.requires_grad), strict=True)
    wanted = torch.autograd.grad(outputs, leaves, weights, allow_unused=True)
    got = launcher.affine_coupling_backward(*on_device((*grads, *tensors)), *how)
    for a, b, t in zip(got, wanted, tensors, strict=True):
        assert a.dtype == t.dtype
        b = torch.zeros_like(leaves[0]) if b is None else b
        stored = 0 if t.dtype == torch.float64 else ULP[t.dtype]
        most = (1 + moved) * (1 + scale) * max(1.0, how[2])
        assert_within(a, b, 64 * work * (1 + most.detach()) * 5 + stored * b.abs())


CLAMPS = {"tanh": 2.0, "atan": 1.9, "softclip": 6.9}
SCALES = {a: (a, CLAMPS.get(a, 0.0), 0.0, 0.0) for a in reference.ACTIVATIONS} | {
    "sigmoid, floor": ("sigmoid", 0.0, 1e-3, 0.0),
    "sigmoid, floor and limit": ("sigmoid", 0.0, 0.25, 0.75),
    "softplus, floor": ("softplus", 0.0, 1e-3, 0.0),
    "softplus, floor and limit": ("softplus", 0.0, 1e-3, 3.0),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", SCALES)
def test_affine(launcher, name, dtype):
    tensors = [numbers(5, 3, 7, seed=i, dtype=dtype, size=size) for i, size in enumerate((2.0, 2.5, 1.0))]
    if dtype == torch.bfloat16:
        tensors[0] = tensors[0].float()  # as under autocast
    for inverse, shift_first in itertools.product((False, True), repeat=2):
        how = (inverse, *SCALES[name], shift_first, 1 if inverse == shift_first else -1)
        check_affine(launcher, tensors, how)


def test_clamped_exp(launcher):
    tensors = [numbers(4, 9, seed=i, dtype=torch.float64, size=2.0) for i in range(3)]
    check_affine(launcher, tensors, (False, "exp", 1.25, 0.0, 0.0, False, 1))


def test_floors_near_a_scale_of_1(launcher):
    """Sigmoids have logarithms that are known to more than an ulp of 1."""
    u = torch.linspace(4.8, 5.0, 101)
    _, logdet = launcher.affine_coupling(*on_device((u, u, u)), False, *SCALES["sigmoid, floor"], False, -1)
    wanted = reference.log_scale(u.double(), *SCALES["sigmoid, floor"])
    assert_within(logdet, wanted, 0.02 * ULP[torch.float32] * torch.ones(101))


@pytest.mark.parametrize("name", SCALES)
def test_huge_scales(launcher, name):
    """Infinite only where the exact value does not fit, and NaN only where something is NaN."""
    u = torch.tensor([-1e4, -300.0, -100.0, -90.0, -1e-30, 0.0, 1e-30, 90.0, 100.0, 300.0, 1e4])
    x = torch.tensor([0.0, 1e-30, -1e-20, 1.0, 1e30])[:, None].expand(5, 11)
    u = u.expand(5, 11)
    for inverse in (False, True):
        how = (inverse, *SCALES[name], False, -1)
        y, logdet = launcher.affine_coupling(*on_device((x, u, torch.zeros_like(u))), *how)
        size = logdet.double().cpu()
        assert size.isfinite().all()
        wanted = torch.where(x == 0, 0.0, x.double().sign() * (x.double().abs().log() + size).exp())
        large = torch.finfo(torch.float32).max
        wanted = torch.where(wanted.abs() > large, torch.inf * wanted.sign(), wanted)
        assert_within(y, wanted, 1e-4 * wanted.abs() + 1e-37)
        grads = launcher.affine_coupling_backward(
            *on_device((torch.ones_like(x), torch.ones_like(x), x, u, torch.zeros_like(u))), *how
        )
        assert not any(g.isnan().any() for g in grads)


def test_nan_stays_in_its_element_of_affine_couplings(launcher):
    for how in list(SCALES.values())[1:]:
        x, scale, shift = (numbers(1, 20, seed=i) for i in range(3))
        x[0, 3] = scale[0, 9] = shift[0, 15] = torch.nan
        y, logdet = launcher.affine_coupling(*on_device((x, scale, shift)), False, *how, False, -1)
        assert y[0].isnan().nonzero().flatten().tolist() == [3, 9, 15]
        assert logdet[0].isnan().nonzero().flatten().tolist() == [9]


@pytest.mark.parametrize("split", [None, [1, 2, 1], [1, 0, 2]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_packed_splines_of_some_channels_and_shared_parameters(launcher, split, dtype):
    x = numbers(3, 5, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    params = numbers(*((3, 3) if split else (1, 5)), 14, seed=1).to(dtype)
    how = (None, None, 5, split, *spline_statics(sample_dims=1))
    got = launcher.rational_quadratic_spline_packed(*on_device((x, params)), *how)
    want = reference.rational_quadratic_spline_packed(x, params, *how)
    torch.testing.assert_close([t.cpu() for t in got], list(want))
    grads = torch.randn_like(want[0]), torch.randn_like(want[1])
    got = launcher.rational_quadratic_spline_packed_backward(*on_device((*grads, x, params)), *how)
    want = reference.rational_quadratic_spline_packed_backward(*grads, x, params, *how)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(
            a.cpu(), b, rtol=None if a.dtype == dtype else 1e-4, atol=None if a.dtype == dtype else 1e-5
        )


@pytest.mark.parametrize("split", [None, [1, 2, 1], [1, 0, 2]], ids=str)
def test_packed_affine(launcher, split):
    x, params = torch.randn(3, 5), torch.randn(3, 3 if split else 5, 2)
    how = (False, "tanh", 2.0, 0.0, 0.0, False, True, split, 1)
    got = launcher.affine_coupling_packed(*on_device((x, params)), *how)
    want = reference.affine_coupling_packed(x, params, *how)
    torch.testing.assert_close([t.cpu() for t in got], list(want))
    grads = torch.randn_like(want[0]), torch.randn_like(want[1])
    got = launcher.affine_coupling_packed_backward(*on_device((*grads, x, params)), *how)
    want = reference.affine_coupling_packed_backward(*grads, x, params, *how)
    torch.testing.assert_close([t.cpu() for t in got], list(want))


def test_affine_layouts(small_programs, launcher):
    """Halves and interleaved channels of one tensor, a shared scale, dense results as they were."""
    both = numbers(4, 6, 2, 3, seed=2, dtype=torch.float64)
    x = numbers(4, 3, 2, 3, seed=1, dtype=torch.float64)
    pairs = ((both[:, :3], both[:, 3:]), (both[:, 1::2], both[:, 0::2]), (both[:1, :3, :1, :1].expand(x.shape), x * 0))
    bases = (x, x.to(memory_format=torch.channels_last), x[..., ::2])
    for (scale, shift), base in itertools.product(pairs, bases):
        tensors = base, scale[..., : base.shape[-1]], shift[..., : base.shape[-1]]
        for sample_dims in (0, 1, 4):
            check_affine(launcher, tensors, (sample_dims == 1, "sigmoid", 0.0, 0.0, 0.0, False, sample_dims))
        y, _ = launcher.affine_coupling(*on_device(tensors), False, "exp", 0.0, 0.0, 0.0, True, 1)
        assert y.stride() == expected_layout(base)


# ---- what is not covered, and what is wrong ----


@pytest.mark.parametrize(
    ("tails", "bound", "masked", "bins", "exact", "said"),
    [
        ("circular", None, False, 5, False, "tails='circular'"),
        ("bounded", None, False, 5, False, "tails='bounded'"),
        ("linear", 2.0, False, 5, False, "a tensor for tail_bound"),
        ("mixed", -1.5, False, 5, False, "a list of tails"),
        ("linear", None, True, 5, False, "a sample mask"),
        ("linear", None, False, 5, True, "precision='exact'"),
        ("linear", None, False, 65, False, "more than 64 bins"),
    ],
)
def test_what_is_not_covered_runs_the_reference(launcher, tails, bound, masked, bins, exact, said):
    launcher._warn_uncovered.cache_clear()
    x = numbers(2, 9).to(DEVICE)
    packed = numbers(2, 9, 2 * bins + reference.derivative_count(bins, tails), seed=1).to(DEVICE)
    bound = None if bound is None else torch.full_like(x, bound)
    mask = x > 0 if masked else None
    inverse, _, *statics = spline_statics(exact=exact)
    name = "rational_quadratic_spline_packed"
    calls = {name: (x, packed), f"{name}_backward": (x, x, x, packed)}
    for name, tensors in calls.items():
        arguments = (*tensors, bound, mask, bins, None, inverse, tails, *statics)
        with pytest.warns(UserWarning, match="runs the reference") as caught:
            got = getattr(launcher, name)(*arguments)
        assert said in str(caught[0].message)
        assert name in str(caught[0].message)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # once is enough
            getattr(launcher, name)(*arguments)
        for a, b in zip(got, getattr(reference, name)(*arguments), strict=True):
            assert torch.equal(a, b)
    parts = packed.split((bins, bins, packed.shape[-1] - 2 * bins), -1)
    with pytest.warns(UserWarning, match="runs the reference"):
        launcher.rational_quadratic_spline(x, *parts, bound, mask, inverse, tails, *statics)
    with pytest.warns(UserWarning, match="runs the reference"):
        launcher.rational_quadratic_spline_backward(x, x, x, *parts, bound, mask, inverse, tails, *statics)


X, PACKED = torch.zeros(2, 9), torch.zeros(2, 9, 14)
SUMS = torch.zeros(2)
PACKED_CALL = {"x": X, "params": PACKED, "bound": None, "mask": None, "bins": 5, "split": None}
PARTS_CALL = {"x": X, "bound": None, "mask": None} | dict(
    zip(("widths", "heights", "derivatives"), PACKED.split((5, 5, 4), -1), strict=True)
)
AFFINE_CALL = {"x": X, "scale": X, "shift": X, "inverse": False, "activation": "exp", "clamp": 0.0}
AFFINE_CALL |= {"min_scale": 0.0, "max_scale": 0.0, "shift_first": False, "sample_dims": 1}
GRADS = {"grad_y": X, "grad_logdet": SUMS}
NAMES = ("inverse", "tails", "parametrization", "box", "smallest", "logit_scale", "curve", "sample_dims", "exact")
STATICS = dict(zip(NAMES, spline_statics(sample_dims=1), strict=True))
PAIRS = torch.zeros(2, 4, 2)
CALLS = {
    "affine_coupling": AFFINE_CALL,
    "affine_coupling_packed": {k: v for k, v in AFFINE_CALL.items() if k not in ("scale", "shift")}
    | {"params": PAIRS, "shift_leads": False, "split": [1, 5, 1]},
    "rational_quadratic_spline": PARTS_CALL | STATICS,
    "rational_quadratic_spline_packed": PACKED_CALL | STATICS,
}
BAD = {  # by operator: the rule, and what breaks it
    "affine_coupling": [
        (r"scale must have shape \[2, 9\], got \[2, 8\]", {"scale": X[:, 1:]}),
        (r"shift must have shape \[2, 9\], got \[9\]", {"shift": X[0]}),
        ("x must be torch.float16 or .*, got torch.int64", {"x": X.long(), "scale": X.long(), "shift": X.long()}),
        ("shift must be torch.float32, got torch.float16", {"shift": X.half()}),
        ("scale must be torch.float16, got torch.float32", {"x": X.half()}),
        ("scale must be torch.float32 or .*, got torch.float64", {"scale": X.double(), "shift": X.double()}),
        ("activation must be one of none, exp, .*, got relu", {"activation": "relu"}),
        ("clamp must be > 0 for tanh, got 0", {"activation": "tanh"}),
        ("clamp must be > 0 for exp, got -1", {"clamp": -1.0}),
        ("clamp must be > 0 for exp, got nan", {"clamp": float("nan")}),
        ("activation with a min_scale must be one of sigmoid, softplus, got exp", {"min_scale": 0.1}),
        ("min_scale must be >= 0, and max_scale above a min_scale > 0, or 0, got .-0.1, 0", {"min_scale": -0.1}),
        ("min_scale must be >= 0, .*, got .nan, 0", {"min_scale": float("nan"), "activation": "softplus"}),
        ("min_scale must be >= 0, .*, got .0.0, 3", {"max_scale": 3.0, "activation": "softplus"}),
        ("min_scale must be >= 0, .*, got .0.1, nan", {"min_scale": 0.1, "max_scale": float("nan")}),
        (r"sample_dims must be in \[-1, 2\], got 3", {"sample_dims": 3}),
        (r"sample_dims must be in \[-1, 2\], got -2", {"sample_dims": -2}),
    ],
    "affine_coupling_packed": [
        (r"params must have the dimensions of x and one more, got \[4, 2\]", {"params": PAIRS[0]}),
        (r"params must have shape \[2, 4, 2\], got \[2, 4, 1\]", {"params": PAIRS[..., :1]}),
        (r"params must have shape \[2, 9, 2\], got \[2, 4, 2\]", {"split": None}),
        (r"params must have shape \[2, 4, 2\], got \[1, 4, 2\]", {"params": PAIRS[:1]}),
        (r"split must be a dimension of x, .*, got \[1, 5\]", {"split": [1, 5]}),
        (r"split must be a dimension of x, .*, got \[2, 5, 1\]", {"split": [2, 5, 1]}),
        (r"split must lie in x, \[2, 9\], got \[1, 6, 1\]", {"split": [1, 6, 1]}),
        ("split must lie in x", {"split": [1, -1, 1]}),
        ("split must lie in x", {"split": [1, 0, 0]}),
        ("split must lie in x", {"split": [1, 0, 2**62]}),
        ("scale must be torch.float32 or .*, got torch.float64", {"params": PAIRS.double()}),
        ("params must be torch.float16 or .*, got torch.int64", {"params": PAIRS.long()}),
        ("clamp must be > 0 for tanh, got 0", {"activation": "tanh"}),
        (r"sample_dims must be in \[-1, 2\], got 3", {"sample_dims": 3}),
    ],
    "rational_quadratic_spline": [
        (r"heights must have shape \[2, 9, 5\], got \[2, 9, 4\]", {"heights": PACKED[..., :4]}),
        (r"derivatives must have shape \[2, 9, 4\], got \[2, 9, 5\]", {"derivatives": PACKED[..., :5]}),
        ("heights must be torch.float32, got torch.float64", {"heights": PACKED[..., :5].double()}),
        (r"bins must be in \[1, 256\], got 0", {"widths": torch.tensor(0.0)}),
        (r"sample_dims must be in \[-1, 2\], got 3", {"sample_dims": 3}),
    ],
    "rational_quadratic_spline_packed": [
        (r"params must have shape \[2, 9, 14\], got \[2, 9, 13\]", {"params": PACKED[..., 1:]}),
        (r"params must have shape \[2, 9, 14\], got \[2, 8, 14\]", {"params": PACKED[:, 1:]}),
        (r"params must have the dimensions of x and one more, got \[\]", {"params": torch.tensor(0.0)}),
        (r"bins must be in \[1, 256\], got 257", {"params": torch.zeros(2, 9, 770), "bins": 257}),
        (r"bins must be in \[1, 256\], got 0", {"bins": 0}),
        ("params must be torch.float16 or .*, got torch.int64", {"params": PACKED.long()}),
        ("tails must be one of linear, circular, bounded, mixed, got none", {"tails": "none"}),
        ("tails='mixed' needs bounds", {"tails": "mixed"}),
        (r"bound must have shape \[2, 9\], got \[9\]", {"bound": X[0]}),
        ("bound must be torch.float32, got torch.float64", {"bound": X.double()}),
        ("parametrization must be one of nflows, zuko, got pyro", {"parametrization": "pyro"}),
        ("box must have 4 numbers, smallest 3", {"box": [1.0]}),
        (r"sample_dims must be in \[-1, 2\], got 3", {"sample_dims": 3}),
        (r"sample_dims must be in \[-1, 2\], got 3", {"sample_dims": 3, "exact": True}),  # which is not covered
    ],
}
BAD_GRADIENTS = [
    (r"grad_y must have shape \[2, 9\], got \[1, 9\]", {"grad_y": X[:1]}),
    (r"grad_logdet must have shape \[2\], got \[2, 9\]", {"grad_logdet": X}),
    ("grad_y must be torch.float32, got torch.float16", {"grad_y": X.half()}),
    ("grad_logdet must be torch.float32, got torch.float64", {"grad_logdet": SUMS.double()}),
]


@pytest.mark.parametrize("name", BAD)
def test_what_native_operators_refuse_is_refused(launcher, name):
    """By the same kind of error, forward and backward."""

    def check(operator, arguments, message):
        arguments = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
        with pytest.raises(RuntimeError, match=f"^coupling: {message}"):
            getattr(launcher, operator)(**arguments)
        with pytest.raises(RuntimeError, match=r"(coupling|pyperf_dl): "):
            getattr(torch.ops.pyperf_dl, operator)(**arguments)

    for message, change in BAD[name]:
        check(name, CALLS[name] | change, message)
        check(f"{name}_backward", GRADS | CALLS[name] | change, message)
    for message, change in BAD_GRADIENTS:
        check(f"{name}_backward", GRADS | CALLS[name] | change, message)


def test_parts_of_large_samples_are_added_in_float64(launcher, monkeypatch):
    """To half an ulp of the sum of the parts, which a sum in float32 misses in some of the samples."""
    monkeypatch.setattr(launcher, "ELEMENTS", 4)
    parts = numbers(8, 40)
    (x,) = on_device((parts.repeat_interleave(4, 1) / 4,))
    _, logdet = launcher.affine_coupling(x, x, x, False, "exp", 0.0, 0.0, 0.0, False, 1)
    assert torch.equal(logdet.cpu(), parts.double().sum(1).float())


# ---- how PyTorch sees the operators ----


def weighted(x, packed):
    y, logdet = pyperf_dl.rational_quadratic_spline_packed(x, packed, 5, tail_bound=3.0, inverse=True, logdet="sum")
    return (y * torch.arange(y.numel(), dtype=y.dtype, device=y.device).view_as(y)).sin().sum() + logdet.cos().sum()


TRANSFORMS = {
    "autograd": lambda x, p: torch.autograd.grad(weighted(x, p), (x, p)),
    "grad": torch.func.grad(weighted, (0, 1)),
    "vmap of grad": lambda x, p: torch.func.vmap(torch.func.grad(weighted))(x[:, None], p[:, None]),
    "grad of vmap": torch.func.grad(lambda x, p: torch.func.vmap(weighted)(x[:, None], p[:, None]).sum()),
    "jvp": lambda x, p: torch.func.jvp(weighted, (x, p), (x.cos(), p.sin())),
    "compiled": lambda x, p: torch.compile(weighted, fullgraph=True, backend="aot_eager")(x, p),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms(transform):
    torch._dynamo.reset()
    tensors = numbers(2, 6, dtype=torch.float64), numbers(2, 6, 14, seed=1, dtype=torch.float64)
    tensors = [t.requires_grad_(transform == "autograd") for t in on_device(tensors)]
    results = []
    for backend in ("triton", "reference"):
        with pyperf_dl.backend(backend):
            results.append(TRANSFORMS[transform](*tensors))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sample_dims", [-1, 1])
def test_opcheck(sample_dims):
    """Packed, and separate for the sums: both forms meet both kinds of log-dets in other tests."""
    x, packed = numbers(2, 3, 2), numbers(2, 14, 3, 2, seed=1).movedim(1, -1)
    x, packed = (t.requires_grad_() for t in on_device((x.transpose(0, 1), packed.transpose(0, 1))))
    statics = spline_statics(sample_dims=sample_dims)
    grads = [
        torch.ones_like(t) for t in reference.rational_quadratic_spline_packed(x, packed, None, None, 5, None, *statics)
    ]
    if sample_dims < 0:
        forward, backward, arguments = family._packed, family._packed_backward, (x, packed, None, None, 5, None)
    else:
        parts = [t.detach().clone().requires_grad_() for t in packed.split((5, 5, 4), -1)]
        forward, backward, arguments = family._spline, family._spline_backward, (x, *parts, None, None)
    torch.library.opcheck(forward.triton.op, (*arguments, *statics))
    torch.library.opcheck(backward.triton.op, (*grads, *arguments, *statics))


# ---- processes that are not interpreted ----


@pytest.mark.parametrize("target", ["cuda:90:32", "hip:gfx942:64"])
def test_every_kernel_compiles(target):
    """What the interpreter accepts is not all Triton; no GPU is needed to compile for one."""
    command = [sys.executable, __file__, target]
    run = subprocess.run(command, capture_output=True, text=True, env=interpreted("0"), check=False)
    assert run.returncode == 0, run.stderr
    assert {"affine", "spline"} <= set(run.stdout.split())


def _compile_for(target):
    """Compiles what calls of every form would launch, and prints the kernels' names."""
    import triton
    from triton.backends.compiler import GPUTarget

    from pyperf_dl._launch import coupling as launcher

    kind, architecture, warp = target.split(":")
    triton.runtime.driver.set_active(
        _AbsentGpu(GPUTarget(kind, int(architecture) if architecture.isdigit() else architecture, int(warp)))
    )

    def compiled(kernel, programs, on, *args, **options):
        for narrow in (True, False) if kernel.__name__ == "affine" else (True,):
            kernel.warmup(*args, grid=(programs,), **{**options, "NARROW": narrow})
        print(kernel.__name__)

    launcher._launch, launcher.common.check_device = compiled, lambda t, kernel: None
    x = torch.zeros(4, 6, 10)
    forms = (
        (torch.float32, 8, "nflows", False, -1),
        (torch.bfloat16, 33, "zuko", True, 1),
        (torch.float64, 1, "zuko", False, 2),
    )
    for dtype, bins, parametrization, inverse, sample_dims in forms:
        packed = torch.zeros(4, 3 * bins - 1, 6, 10, dtype=dtype).movedim(1, -1)
        statics = spline_statics(parametrization, inverse, sample_dims)
        given = x.double() if dtype == torch.float64 else x
        y, logdet = launcher.rational_quadratic_spline_packed(given, packed, None, None, bins, None, *statics)
        launcher.rational_quadratic_spline_packed_backward(y, logdet, given, packed, None, None, bins, None, *statics)
    for i, scale in enumerate(SCALES.values()):
        given = x.to((torch.float16, torch.float32, torch.float64)[i % 3])
        how = (i % 2 == 0, *scale, i % 4 < 2, i % 4 - 1)
        y, logdet = launcher.affine_coupling(given, given, given, *how)
        launcher.affine_coupling_backward(y, logdet, given, given, given, *how)


if __name__ == "__main__":
    _compile_for(sys.argv[1])
