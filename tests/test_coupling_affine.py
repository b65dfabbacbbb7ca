"""Affine and additive couplings against the reference in float64, the peers' own modules, and the rules of the page."""

import functools
import itertools
import math

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.library import opcheck

import pyperf_dl
from pyperf_dl import _coupling_affine as family
from pyperf_dl import additive_coupling, affine_coupling
from pyperf_dl.reference import coupling as reference

ops = torch.ops.pyperf_dl
# activation, clamp, min_scale, max_scale
SCALES = {a: (a, family.DEFAULT_CLAMPS.get(a, 0.0), 0.0, 0.0) for a in reference.ACTIVATIONS} | {
    "sigmoid, floor": ("sigmoid", 0.0, 1e-3, 0.0),
    "sigmoid, floor and limit": ("sigmoid", 0.0, 0.25, 0.75),
    "softplus, floor": ("softplus", 0.0, 1e-3, 0.0),
    "softplus, floor and limit": ("softplus", 0.0, 1e-3, 3.0),
}
NAMES = [name for name in SCALES if name != "none"]
FLOORS = [name for name in SCALES if "floor" in name]
BOTH = [False, True]
ORDERS = ["scale_shift", "shift_scale"]
INF = math.inf


def arguments(name):
    """Of the public functions."""
    return {k: v or None for k, v in zip(("activation", "clamp"), SCALES[name], strict=False)} | {
        "min_scale": SCALES[name][2],
        "max_scale": SCALES[name][3] or None,
    }


def sample(shape, dtype=torch.float32, seed=0, spread=(1, 2, 1)):
    """x, scale, shift"""
    g = torch.Generator().manual_seed(seed)
    return tuple((torch.randn(shape, generator=g, dtype=torch.float64) * s).to(dtype) for s in spread)


def bits(t):
    return t.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


def assert_same(got, want):
    for g, w in zip(got, want, strict=True):
        assert g.dtype == w.dtype
        assert g.shape == w.shape
        assert torch.equal(bits(g), bits(w))


def in_float64(function, tensors, *statics):
    return function(*(t.double() for t in tensors), *statics)


def assert_near(got, want, size, ulps):
    """Within so many ulps of `size`, the magnitude of the terms."""
    bound = ulps * torch.finfo(got.dtype).eps * size + torch.finfo(got.dtype).smallest_normal
    assert bool(((got.double() - want).abs() <= bound).all()), ((got.double() - want).abs() / bound).max()


# ---- values ----


def check_against_reference(tensors, statics, seed=0):
    """Forward and gradients, in ulps of what is added up."""
    x, u, t = tensors
    y, logdet = ops.affine_coupling(*tensors, *statics)
    want_y, want_logdet = in_float64(reference.affine_coupling, tensors, *statics)
    assert y.dtype == x.dtype
    assert y.shape == x.shape
    assert logdet.dtype == reference.logdet_dtype(x)
    assert logdet.shape == want_logdet.shape
    inverse, *scale, _shift_first, sample_dims = statics
    e = (-1 if inverse else 1) * reference.log_scale(u.double(), *scale)
    size = (x.double().abs() + t.double().abs()) * (1 + e.exp()) * (1 + e.abs())
    assert_near(y, want_y, size, 4)
    of_logs = e.abs().sum(tuple(range(sample_dims, x.dim()))) if 0 <= sample_dims < x.dim() else e.abs()
    assert_near(logdet, want_logdet, of_logs + 1, 4)

    g = torch.Generator().manual_seed(seed)
    grads = (torch.randn(y.shape, generator=g).to(y.dtype), torch.randn(logdet.shape, generator=g).to(logdet.dtype))
    got = ops.affine_coupling_backward(*grads, *tensors, *statics)
    want = in_float64(reference.affine_coupling_backward, (*grads, *tensors), *statics)
    size = (1 + grads[0].double().abs()) * (1 + size) + INFLATED * max(
        grads[1].double().abs().flatten().tolist(), default=0
    )
    for got_grad, want_grad, of in zip(got, want, tensors, strict=True):
        assert got_grad.dtype == of.dtype
        assert got_grad.shape == of.shape
        assert_near(got_grad, want_grad, size, 8)


INFLATED = 8  # the largest slope of a log scale here


def statics_of(draw):
    activation, clamp, *floor = SCALES[draw(st.sampled_from(list(SCALES)))]
    if activation in ("exp", *family.DEFAULT_CLAMPS) and draw(st.booleans()):
        clamp = draw(st.sampled_from([0.1, 1.0, 3.5]))
    return draw(st.booleans()), activation, clamp, *floor, draw(st.booleans())


@st.composite
def problems(draw):
    """(tensors, statics of the operator): any shape, strides and dtypes."""
    shape = draw(st.lists(st.sampled_from([0, 1, 2, 3, 5, 7, 16, 17, 33, 130]), min_size=0, max_size=3))
    if draw(st.integers(0, 5)) == 0:
        shape = [draw(st.sampled_from([1, 2])), draw(st.sampled_from([1023, 1024, 1025, 2500]))]
    dtypes = draw(
        st.sampled_from(
            [
                (torch.float32, torch.float32),
                (torch.float64, torch.float64),
                (torch.float16, torch.float16),
                (torch.bfloat16, torch.bfloat16),
                (torch.float32, torch.bfloat16),
                (torch.float32, torch.float16),
            ]
        )
    )
    tensors = []
    for n, values in enumerate(sample(shape, seed=draw(st.integers(0, 1000)))):
        values = values.to(dtypes[n > 0])
        how = draw(st.sampled_from(["dense", "permuted", "half", "interleaved", "expanded"])) if shape else "dense"
        if how == "permuted":
            order = draw(st.permutations(range(len(shape))))
            values = values.permute(order).contiguous().permute([order.index(d) for d in range(len(shape))])
        elif how == "half":
            values = torch.cat([values, values], -1)[..., shape[-1] :]
        elif how == "interleaved":
            values = torch.stack([values, values], -1)[..., 1]
        elif how == "expanded":
            values = values[:1].expand(shape) if shape[0] else values
        tensors.append(values)
    return tuple(tensors), (*statics_of(draw), draw(st.integers(-1, len(shape))))


@given(problems())
def test_operators_agree_with_the_reference(problem):
    check_against_reference(*problem)


@pytest.mark.parametrize("name", SCALES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_scales_over_the_whole_range(name, dtype):
    """Of every magnitude of u, relative to the log scale; the scale itself where it is representable."""
    u = torch.cat([torch.logspace(-30, 4, 4001, dtype=torch.float64), torch.linspace(0, 12, 4001, dtype=torch.float64)])
    u = torch.cat([u, -u]).to(dtype)
    activation, _, min_scale, _ = scale = SCALES[name]
    y, logdet = ops.affine_coupling(torch.ones_like(u), u, torch.zeros_like(u), False, *scale, False, -1)
    want = reference.log_scale(u.double(), *scale)
    conditioned = want.abs() + torch.finfo(dtype).smallest_normal / torch.finfo(dtype).eps
    if activation.startswith("sigmoid"):  # u + 2 is rounded
        conditioned = conditioned + reference_slope(u, scale) * (u.double() + 2).abs()
    if min_scale:  # which is rounded
        conditioned = conditioned + min_scale / want.exp()
    if activation == "softplus" or (min_scale and dtype == torch.float64):  # log s near s = 1, here or in the reference
        conditioned = conditioned + 1
    assert bool(((logdet.double() - want).abs() <= 4 * torch.finfo(dtype).eps * conditioned).all())
    fits = (want < math.log(torch.finfo(dtype).max) - 1) & (want > math.log(torch.finfo(dtype).smallest_normal) + 1)
    error = (y.double() / want.exp() - 1).abs()[fits]
    exact_scale = activation.startswith("sig") or activation == "softplus"
    allowed = 6 if exact_scale else 4 + 4 * want.abs()[fits]
    if dtype == torch.float64:
        allowed = allowed + 2 * want.abs()[fits]  # of the reference
    assert bool((error <= allowed * torch.finfo(dtype).eps).all())
    high = math.log(torch.finfo(dtype).max)
    assert torch.equal(y.isinf(), want > high) or bool((want[y.isinf() != (want > high)] - high).abs().max() < 1e-4)


def reference_slope(u, scale):
    leaf = u.double().requires_grad_()
    return torch.autograd.grad(reference.log_scale(leaf, *scale).sum(), leaf)[0].abs()


def exact_floored(mpmath, u, name):
    """The scale, and its derivative."""
    activation, _, min_scale, max_scale = SCALES[name]
    v = u + 2 if activation == "sigmoid" else u
    e = mpmath.exp(-abs(v))
    share = e / (1 + e)
    if activation == "sigmoid":
        scale, by_u = share if v < 0 else 1 / (1 + e), share / (1 + e)
    else:
        scale, by_u = max(v, 0) + mpmath.log1p(e), share if v < 0 else 1 / (1 + e)
    scale += mpmath.mpf(min_scale)
    return (max_scale, 0) if max_scale and scale > max_scale else (scale, by_u)


@pytest.mark.parametrize("name", FLOORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_floors(name, dtype):
    """Where the scale is near 1 too, and with gradients for all u."""
    mpmath = pytest.importorskip("mpmath")
    sigmoid, min_scale = SCALES[name][0] == "sigmoid", SCALES[name][2]
    u = torch.cat([torch.linspace(-9, 9, 201), (4.9 if sigmoid else 0.54) + torch.linspace(-0.05, 0.05, 201)])
    u = torch.cat([u, torch.tensor([-1e30, -1e4, -90, -40, 40, 90, 1e4, 1e30])]).to(dtype)
    zeros, ones = torch.zeros_like(u), torch.ones_like(u)
    eps = torch.finfo(dtype).eps
    for inverse, sign in ((False, 1), (True, -1)):
        how = (inverse, *SCALES[name], False, -1)
        y, logdet = ops.affine_coupling(ones, u, zeros, *how)
        _, grads, _ = ops.affine_coupling_backward(zeros, ones, ones, u, zeros, *how)
        with mpmath.workdps(60):
            for v, *got in zip(*(t.tolist() for t in (u, y, logdet, grads)), strict=True):
                scale, by_u = exact_floored(mpmath, mpmath.mpf(v), name)
                log, slope = sign * mpmath.log(scale), sign * by_u / scale
                of_inputs = (abs(v + 2) * abs(slope) if sigmoid else 1) + min_scale / scale  # which are rounded
                assert abs(got[0] / mpmath.exp(log) - 1) <= 4 * eps
                assert abs(got[1] - log) <= 2 * eps * (abs(log) + of_inputs)
                assert abs(got[2] - slope) <= 8 * eps * abs(slope) + 1e-37


def test_no_gradient_beyond_the_largest_scale():
    how = {"activation": "softplus", "min_scale": 1.0, "max_scale": 3.0}
    u = torch.tensor([[-50.0, 0.0, 1.8, 1.9, 2.0, 50.0, 1e30]], requires_grad=True)
    y, logdet = affine_coupling(torch.ones_like(u), u, torch.zeros_like(u), **how)
    torch.testing.assert_close(y[0, 3:], torch.full((4,), 3.0), rtol=1e-6, atol=0)
    (grad_u,) = torch.autograd.grad(y.sum() + logdet.sum(), u)
    assert (grad_u != 0).tolist() == [[True, True, True, False, False, False, False]]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("order", ORDERS)
def test_inverse_undoes_the_forward(name, order):
    x, u, t = sample((200, 7), torch.float64)
    how = arguments(name) | {"order": order}
    y, logdet = affine_coupling(x, u, t, **how)
    back, of_inverse = affine_coupling(y, u, t, **how, inverse=True)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-11)
    assert torch.equal(of_inverse, -logdet)
    jacobian = vmap(jacrev(lambda x, u, t: affine_coupling(x, u, t, **how, sum_dims=())[0]))
    log = jacobian(x, u, t).diagonal(dim1=1, dim2=2).log().sum(1)
    torch.testing.assert_close(log, logdet)


@pytest.mark.parametrize("size", [*range(18), 31, 33, 500, 1023, 1024, 1025, 2049, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_are_in_the_stated_order(size, dtype):
    """Units of 1024 elements; in a unit 16 sums in float64, added up as a tree; then the units."""
    x, u, t = sample((3, size), dtype)
    total = ops.affine_coupling(x, u, t, False, "tanh", 2.0, 0.0, 0.0, False, 1)[1]
    each = ops.affine_coupling(x, u, t, False, "tanh", 2.0, 0.0, 0.0, False, -1)[1].double()

    def tree(v):
        lanes = torch.nn.functional.pad(v, (0, -v.numel() % 16)).reshape(-1, 16)
        sums = torch.zeros(16, dtype=torch.float64)
        for row in lanes:
            sums = sums + row
        for half in (8, 4, 2, 1):
            sums = sums[:half] + sums[half : 2 * half]
        return sums[0]

    for row, got in zip(each, total, strict=True):
        units = torch.stack([tree(unit) for unit in row.split(1024)]) if size else torch.zeros(1, dtype=torch.float64)
        assert got == (units[0] if size <= 1024 else tree(units)).to(dtype)


# ---- special values ----

LARGEST = torch.finfo(torch.float32).max


@pytest.mark.parametrize(
    ("x", "u", "t", "order", "inverse", "want"),
    [
        (0.0, 1e4, 3.0, "scale_shift", False, 3.0),  # not 0 * inf
        (0.0, 200.0, 0.0, "shift_scale", False, 0.0),
        (1e-30, 100.0, 0.0, "scale_shift", False, 1e-30 * math.exp(100)),
        (1e-45, 176.0, 0.0, "scale_shift", False, 2.0**-149 * math.exp(176)),
        (1e30, -100.0, 0.0, "scale_shift", False, 1e30 * math.exp(-100)),
        (1.0, 100.0, 0.0, "scale_shift", False, INF),
        (-1.0, 1e4, 5.0, "scale_shift", False, -INF),
        (1.0, -1e4, 5.0, "scale_shift", False, 5.0),
        (3e38, 1.0, -3e38, "scale_shift", False, 3e38 * math.exp(1) - 3e38),  # beyond, and back
        (3e38, 0.2, -3e38, "scale_shift", False, 3e38 * (math.exp(0.2) - 1)),
        (3e38, -2.0, 3e38, "shift_scale", False, 6e38 * math.exp(-2)),
        (3e38, 2.0, -3e38, "scale_shift", True, 6e38 * math.exp(-2)),
        (1e-38, -80.0, 0.0, "scale_shift", True, 1e-38 * math.exp(80)),
        (-0.0, 0.0, -0.0, "scale_shift", False, -0.0),
    ],
)
def test_infinite_only_where_not_representable(x, u, t, order, inverse, want):
    args = [torch.full((21,), v) for v in (x, u, t)]
    y, logdet = affine_coupling(*args, order=order, inverse=inverse, logdet="elementwise")
    exact = torch.tensor(want, dtype=torch.float64).to(torch.float32)
    if abs(want) > LARGEST:
        exact = torch.tensor(math.copysign(INF, want))
    torch.testing.assert_close(y, exact.expand(21), rtol=1e-5, atol=0)
    assert torch.equal(logdet, torch.full((21,), -u if inverse else u))


@pytest.mark.parametrize("name", SCALES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_finite_input_never_gives_nan(name, dtype):
    activation, _, *floor = SCALES[name]
    limits = torch.finfo(dtype)
    values = [0.0, -0.0, 1.0, -3.0, 100.0, -100.0, 1e4, -1e4, limits.max, -limits.max, limits.tiny, limits.tiny / 4]
    grid = torch.tensor(list(itertools.product(values, repeat=3)), dtype=dtype)
    x, u, t = grid.unbind(-1)
    for inverse, first, clamp in itertools.product(BOTH, BOTH, (0.0, 1e-3, 2.0, 1e4)):
        if clamp == 0 and activation in family.DEFAULT_CLAMPS:
            continue
        how = (inverse, activation, clamp, *floor, first, -1)
        y, logdet = ops.affine_coupling(x, u, t, *how)
        assert not y.isnan().any()
        assert logdet.isfinite().all()
        for grads in ((0.0, 0.0), (1.0, 1.0), (limits.max, -1.0), (-1e-3, 1e30)):
            given = torch.full_like(y, grads[0]), torch.full_like(logdet, grads[1])
            for of in ops.affine_coupling_backward(*given, x, u, t, *how):
                assert not of.isnan().any()


@pytest.mark.parametrize("name", SCALES)
def test_nan_and_infinity_stay_in_their_element(name):
    clean = sample((4, 37))
    how = (False, *SCALES[name], False)
    want = ops.affine_coupling(*clean, *how, -1)
    for which, value in itertools.product(range(3), (math.nan, INF, -INF)):
        tensors = [t.clone() for t in clean]
        tensors[which][2, 5] = value
        got = ops.affine_coupling(*tensors, *how, -1)
        other = torch.ones(4, 37, dtype=torch.bool)
        other[2, 5] = False
        assert_same([g[other] for g in got], [w[other] for w in want])
        if math.isnan(value) and not (which == 1 and name == "none"):
            assert got[0][2, 5].isnan()
        total = ops.affine_coupling(*tensors, *how, 1)[1]
        assert torch.equal(total[[0, 1, 3]], ops.affine_coupling(*clean, *how, 1)[1][[0, 1, 3]])


# ---- layouts ----


def layouts():
    g = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    z, p = rand(9, 12), rand(9, 12)
    yield "halves", z[:, 6:], p[:, :6], p[:, 6:]
    yield "interleaved", z[:, 6:], p[:, 1::2], p[:, 0::2]
    yield "flat", rand(300, 6), rand(300, 6), rand(300, 6)
    yield "one column", rand(300, 1), rand(300, 2)[:, :1], rand(300, 2)[:, 1:]
    z, p = rand(5, 16, 6, 7), rand(5, 16, 6, 7)
    yield "channels", z[:, 8:], p[:, :8], p[:, 8:]
    yield "channels interleaved", z[:, 8:], p[:, 0::2], p[:, 1::2]
    z, p = (t.contiguous(memory_format=torch.channels_last) for t in (z, p))
    yield "channels_last", z[:, 8:], p[:, :8], p[:, 8:]
    yield "channels_last interleaved", z[:, 8:], p[:, 0::2], p[:, 1::2]
    yield "shared by the batch", rand(40, 3, 50), rand(1, 3, 50).expand(40, 3, 50), rand(3, 1).expand(40, 3, 50)
    yield "[B, D, P]", rand(40, 11), *rand(40, 11, 2).unbind(-1)
    yield "transposed", rand(31, 40).t(), rand(31, 40).t(), rand(40, 31)
    yield "long rows", rand(2, 5000), rand(2, 10000)[:, :5000], rand(2, 10000)[:, 5000:]
    yield "odd rows in large samples", rand(2, 30, 101)[..., 1:], rand(2, 30, 100), rand(2, 60, 100)[:, ::2]
    yield "ten dims", *(rand(*[2, 3] * 5).permute(3, 1, 9, 5, 7, 0, 2, 8, 4, 6) for _ in range(3))


@pytest.mark.parametrize("case", list(layouts()), ids=lambda c: c[0])
@pytest.mark.parametrize("name", ["exp", "softplus", "sigmoid, floor and limit"])
def test_layouts(case, name):
    """Any strides give what contiguous copies give: the same bits, sums too where y is walked alike."""
    _, *tensors = case
    how = (True, *SCALES[name], False)
    dense = [t.contiguous() for t in tensors]
    for sample_dims in (-1, 1):
        got, want = (ops.affine_coupling(*t, *how, sample_dims) for t in (tensors, dense))
        assert_same(got[:1], want[:1])
        torch.testing.assert_close(got[1], want[1], rtol=1e-6, atol=1e-5)
        if sample_dims < 0:
            assert_same(got[1:], want[1:])
        grads = torch.randn_like(want[0]), torch.randn_like(want[1])
        assert_same(
            ops.affine_coupling_backward(*grads, *tensors, *how, sample_dims),
            ops.affine_coupling_backward(*grads, *dense, *how, sample_dims),
        )


def test_memory_order_is_kept():
    z = torch.randn(5, 16, 6, 7).contiguous(memory_format=torch.channels_last)
    for x in (z, z[:, 8:], z.permute(1, 2, 0, 3), z[:, :, ::2]):
        y, logdet = affine_coupling(x, x, x, logdet="elementwise")
        order = sorted(range(4), key=lambda d: -x.stride(d))
        assert sorted(range(4), key=lambda d: -y.stride(d)) == order
        assert y.permute(order).is_contiguous()
        assert logdet.stride() == y.stride()
    expanded = torch.randn(6).expand(4, 6)
    assert affine_coupling(expanded, expanded, expanded)[0].is_contiguous()


def test_sum_dims():
    x, u, t = sample((3, 4, 5, 6), torch.float64)
    y, each = affine_coupling(x, u, t, logdet="elementwise")
    for dims in ((), 0, (1,), (0, 2), (-1, 1), (3, 2, 1), (0, 1, 2, 3)):
        got, total = affine_coupling(x, u, t, sum_dims=dims)
        assert torch.equal(got, y)
        torch.testing.assert_close(total, each.sum(dims) if dims != () else each)
        shifted, zero = additive_coupling(x, t, sum_dims=dims)
        assert torch.equal(shifted, x + t)
        assert torch.equal(zero, torch.zeros_like(total))
    torch.testing.assert_close(affine_coupling(x, u, t)[1], each.sum((1, 2, 3)))
    scalar = affine_coupling(x[0, 0, 0, 0], u[0, 0, 0, 0], t[0, 0, 0, 0])
    assert torch.equal(scalar[1], each[0, 0, 0, 0])


# ---- volume preserving, additive ----


@pytest.mark.parametrize("name", ["exp", "atan", "softplus", "softplus, floor and limit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_volume_preserving(name, dtype):
    x, u, t = sample((5, 4, 3), dtype)
    how = arguments(name) | {"volume_preserving": True}
    y, logdet = affine_coupling(x, u, t, **how)
    assert torch.equal(logdet, torch.zeros(5, dtype=dtype))
    logs = reference.log_scale(u, *SCALES[name])
    logs = logs - logs.mean((1, 2), keepdim=True)
    torch.testing.assert_close(y, x * logs.exp() + t)
    torch.testing.assert_close(affine_coupling(y, u, t, inverse=True, **how)[0], x)
    channels, zero = affine_coupling(x, u, t, sum_dims=1, **how)
    logs = reference.log_scale(u, *SCALES[name])
    torch.testing.assert_close(channels, x * (logs - logs.mean(1, keepdim=True)).exp() + t)
    assert zero.shape == (5, 3)
    each = affine_coupling(x, u, t, logdet="elementwise", **how)[1]
    torch.testing.assert_close(each.sum((1, 2)), torch.zeros(5, dtype=dtype), rtol=0, atol=1e-5)
    if dtype == torch.float64:
        leaves = [v.clone().requires_grad_() for v in (x, u, t)]
        assert torch.autograd.gradcheck(lambda *v: affine_coupling(*v, **how)[0], leaves)


def test_additive():
    x, _, t = sample((4, 9))
    for inverse in BOTH:
        y, logdet = additive_coupling(x, t, inverse=inverse)
        assert torch.equal(y, x - t if inverse else x + t)
        assert torch.equal(logdet, torch.zeros(4))
        leaves = [v.clone().requires_grad_() for v in (x, t)]
        y, logdet = additive_coupling(*leaves, inverse=inverse)
        gx, gt = torch.autograd.grad((y * x).sum() + logdet.sum(), leaves)
        assert torch.equal(gx, x)
        assert torch.equal(gt, -x if inverse else x)
    mixed = t.bfloat16().requires_grad_()
    (gt,) = torch.autograd.grad(additive_coupling(x, mixed)[0].sum(), mixed)
    assert gt.dtype == torch.bfloat16


def test_saved_bytes():
    """The inputs themselves; nothing for an additive coupling."""
    x, u, t = (v.requires_grad_() for v in sample((50, 6)))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda s: saved.append(s) or s, lambda s: s):
        affine_coupling(x, u, t)
        assert {s.data_ptr() for s in saved} == {v.data_ptr() for v in (x, u, t)}
        saved.clear()
        additive_coupling(x, t)
        assert not saved


# ---- peers ----


@pytest.mark.parametrize("inverse", BOTH)
def test_nflows(inverse):
    """Shifts come first."""
    module = pytest.importorskip("nflows.transforms.coupling")
    x, u, t = sample((20, 5), torch.float64)
    peer = module.AdditiveCouplingTransform
    layer = peer(torch.arange(10) % 2, lambda i, o: lambda z, c: t)
    call = layer._coupling_transform_inverse if inverse else layer._coupling_transform_forward
    want, logdet = call(x, t)
    got, ours = additive_coupling(x, t, inverse=inverse)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(ours, logdet)
    layer = module.AffineCouplingTransform(torch.arange(10) % 2, lambda i, o: torch.nn.Identity())
    call = layer._coupling_transform_inverse if inverse else layer._coupling_transform_forward
    got = affine_coupling(x, u, t, inverse=inverse, activation="sigmoid", min_scale=1e-3)
    torch.testing.assert_close(got, call(x, torch.cat([t, u], 1)))


@pytest.mark.parametrize("inverse", BOTH)
@pytest.mark.parametrize("scale_map", ["exp", "sigmoid", "sigmoid_inv"])
def test_normflows(scale_map, inverse):
    module = pytest.importorskip("normflows.flows.affine.coupling")
    x, u, t = sample((20, 5), torch.float64)
    layer = module.AffineCoupling(torch.nn.Identity(), scale_map=scale_map)
    params = torch.stack([t, u], -1).flatten(1)  # interleaved
    (_, want), logdet = (layer.inverse if inverse else layer.forward)([params, x])
    ours = {"exp": "exp", "sigmoid": "sigmoid_inv", "sigmoid_inv": "sigmoid"}[scale_map]
    got, total = affine_coupling(x, params[:, 1::2], params[:, 0::2], activation=ours, inverse=inverse)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(total, logdet)


@pytest.mark.parametrize("inverse", BOTH)
def test_zuko(inverse):
    module = pytest.importorskip("zuko.transforms")
    x, u, t = sample((20, 5), torch.float64)
    f = module.MonotonicAffineTransform(t, u)
    got, total = affine_coupling(x, u, t, activation="softclip", inverse=inverse)
    want, logdet = (f.inv if inverse else f).call_and_ladj(x)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(total, logdet.sum(1))


@pytest.mark.parametrize("inverse", BOTH)
@pytest.mark.parametrize(("name", "activation"), [("ATAN", "atan"), ("TANH", "tanh")])
@pytest.mark.parametrize("block", ["AffineCouplingOneSided", "GINCouplingBlock"])
def test_freia(block, name, activation, inverse):
    module = pytest.importorskip("FrEIA.modules")
    x, u, t = sample((20, 5), torch.float64)
    params = torch.cat([u, t], 1)
    layer = getattr(module, block)([(10,)], subnet_constructor=lambda i, o: lambda z: params, clamp_activation=name)
    if block == "GINCouplingBlock":
        layer.subnet1 = layer.subnet2 = lambda z: params
        want, _ = layer._coupling2(x, x, rev=inverse)
    else:
        layer.subnet = lambda z: params
        (out,), logdet = layer([torch.cat([x, x], 1)], rev=inverse)
        want = out[:, 5:]
    gin = block == "GINCouplingBlock"
    got, total = affine_coupling(
        x, params[:, :5], params[:, 5:], activation=activation, inverse=inverse, volume_preserving=gin
    )
    torch.testing.assert_close(got, want)
    if not gin:
        torch.testing.assert_close(total, logdet)


# ---- packed parameters, and some of the channels ----

CHANNELS = [
    None,
    slice(1, None, 10),
    slice(0, 3),
    slice(3, None),
    slice(0, None, 2),
    slice(1, 5, 3),
    slice(-2, None),
    slice(2, 2),
]


def packed_sample(shape, channels, layout, dtype=torch.float64):
    """x, and parameters as a conditioner's output of that layout and the view of it."""
    count = shape[1] if channels is None else len(range(shape[1])[channels])
    x, first, second = sample(shape, dtype)
    pair = torch.stack([first[:, :count], second[:, :count]], 1 if layout == "halves" else -1)
    pair = pair.contiguous(memory_format=torch.channels_last) if layout == "channels_last" and x.dim() == 3 else pair
    leaves = [t.detach().requires_grad_() for t in (x, pair)]
    return leaves, leaves[1].movedim(1, -1) if layout == "halves" else leaves[1]


def by_parts(x, params, channels, parameters, **how):
    """What the packed operator is to do, by the other one."""
    at = slice(None) if channels is None else channels
    scale_at = ORDERS.index(parameters)
    part, logdet = affine_coupling(x[:, at], params[..., scale_at], params[..., 1 - scale_at], **how)
    y = x.clone()
    y[:, at] = part
    return y, logdet


@pytest.mark.parametrize("layout", ["halves", "interleaved", "channels_last"])
@pytest.mark.parametrize("channels", CHANNELS, ids=str)
@pytest.mark.parametrize("shape", [(5, 6), (3, 7, 4), (2, 6, 3, 5), (2, 130)], ids=str)
def test_packed_parameters_of_some_channels(shape, channels, layout):
    leaves, params = packed_sample(shape, channels, layout)
    for inverse, parameters, how in itertools.product(
        BOTH, ORDERS, ({"logdet": "elementwise"}, {}, {"sum_dims": 0}, {"sum_dims": (-1, 1)} if len(shape) > 2 else {})
    ):
        how = how | {"inverse": inverse, "activation": "tanh", "order": "shift_scale"}
        got = pyperf_dl.affine_coupling_packed(leaves[0], params, channels=channels, parameters=parameters, **how)
        want = by_parts(leaves[0], params, channels, parameters, **how)
        assert_same([t.detach() for t in got], [t.detach() for t in want])
        weights = [torch.randn_like(t) for t in got]
        assert_same(*(torch.autograd.grad(out, leaves, weights) for out in (got, want)))
        with pyperf_dl.backend("reference"):
            plain = pyperf_dl.affine_coupling_packed(leaves[0], params, channels=channels, parameters=parameters, **how)
        torch.testing.assert_close(got, plain)


@pytest.mark.parametrize("channels", CHANNELS, ids=str)
def test_additive_coupling_of_some_channels(channels):
    leaves, params = packed_sample((4, 6, 3), channels, "interleaved")
    shift = params[..., 0]
    y, logdet = additive_coupling(leaves[0], shift, channels=channels)
    want = leaves[0].clone()
    want[:, slice(None) if channels is None else channels] += shift
    assert_same([y.detach()], [want.detach()])
    assert torch.equal(logdet, torch.zeros(4, dtype=torch.float64))
    assert_same(*(torch.autograd.grad(out, leaves, leaves[0].detach().clone()) for out in (y, want)))
    back, _ = additive_coupling(y, shift, channels=channels, inverse=True)
    torch.testing.assert_close(back, leaves[0])


def test_packed_gradients_keep_the_layout():
    """A permuted convolution output gets its gradient without a copy."""
    x, raw = torch.randn(2, 8, 4, 4), torch.randn(2, 2, 4, 4, 4)
    params = raw.movedim(1, -1)
    y, logdet = ops.affine_coupling_packed(x, params, False, "exp", 0.0, 0.0, 0.0, False, False, [1, 4, 1], 1)
    grads = ops.affine_coupling_packed_backward(
        y, logdet, x, params, False, "exp", 0.0, 0.0, 0.0, False, False, [1, 4, 1], 1
    )
    assert grads[1].stride() == params.stride()


def test_packed_channels_last():
    x = torch.randn(2, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    y, logdet = pyperf_dl.affine_coupling_packed(
        x, torch.randn(2, 4, 4, 4, 2), channels=slice(4, None), logdet="elementwise"
    )
    assert y.stride() == x.stride()
    assert logdet.shape == (2, 4, 4, 4)


def test_packed_gradcheck():
    for channels in CHANNELS[:4]:
        leaves, _ = packed_sample((2, 6), channels, "interleaved")
        call = lambda x, p: pyperf_dl.affine_coupling_packed(x, p, channels=channels, activation="atan")  # noqa: B023, E731
        assert torch.autograd.gradcheck(call, leaves, check_forward_ad=True, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_sample_masks(name, dtype):
    """What does not count passes, whatever it and its parameters are; the rest is as without a mask."""
    activation, clamp, min_scale, max_scale = SCALES[name]
    how = {"activation": activation, "clamp": clamp or None, "min_scale": min_scale, "max_scale": max_scale or None}
    x, u, t = (torch.randn(9, 7, dtype=torch.float64).to(dtype) for _ in range(3))
    x[0], x[1], x[2] = INF, math.nan, -0.0
    u[3], t[4] = math.nan, INF
    leaves = [v.requires_grad_() for v in (x, u, t)]
    on = torch.tensor([False] * 5 + [True, False, True, True])[:, None]
    everywhere = on.expand(9, 7)
    for inverse, order in itertools.product(BOTH, ORDERS):
        both = [
            affine_coupling(*leaves, inverse=inverse, order=order, logdet="elementwise", sample_mask=mask, **how)
            for mask in (on, None)
        ]
        weights = [torch.randn(9, 7).to(v.dtype) for v in both[0]]
        masked, plain = ([*out, *torch.autograd.grad(out, leaves, weights)] for out in both)
        rounding = {"rtol": 0.02, "atol": 0.02} if dtype == torch.bfloat16 else {}  # of log s, for want of a neutral u
        for a, b in zip(masked, plain, strict=True):
            torch.testing.assert_close(a[everywhere], b[everywhere], **rounding)
        off = ~everywhere
        assert torch.equal(masked[0][off].view(torch.uint8), x.detach()[off].view(torch.uint8))
        assert not masked[1][off].any()
        assert torch.equal(masked[2][off], weights[0][off])
        assert not masked[3][off].any()
        assert not masked[4][off].any()
        pair = torch.stack(leaves[1:], -1)
        packed = pyperf_dl.affine_coupling_packed(x, pair, inverse=inverse, order=order, sample_mask=on, **how)
        torch.testing.assert_close(packed[0], both[0][0], equal_nan=True)
        torch.testing.assert_close(packed[1], both[0][1].sum(1), equal_nan=True)


def test_sample_masks_of_shifts():
    x, t = torch.randn(4, 6), torch.randn(4, 3)
    t[0] = math.nan
    mask = torch.tensor([False, True, True, False])[:, None]
    for inverse in BOTH:
        y, logdet = additive_coupling(x, t, channels=slice(3, None), sample_mask=mask, inverse=inverse)
        want = x.clone()
        want[1:3, 3:] += -t[1:3] if inverse else t[1:3]
        assert torch.equal(y, want)
        assert not logdet.any()


@pytest.mark.parametrize("activation", ["exp", "sigmoid", "softplus"])
def test_padding_does_not_change_volume_preserving_couplings(activation):
    x, u, t = (torch.randn(3, 4, dtype=torch.float64) for _ in range(3))
    how = {"activation": activation, "volume_preserving": True}
    want, zeros = affine_coupling(x, u, t, **how)
    padded = [torch.cat([v, torch.randn(3, 9, dtype=torch.float64)], 1) for v in (x, u, t)]
    y, logdet = affine_coupling(*padded, sample_mask=torch.arange(13) < 4, **how)
    torch.testing.assert_close(y[:, :4], want)
    assert torch.equal(y[:, 4:], padded[0][:, 4:])
    assert torch.equal(logdet, zeros)
    assert not zeros.any()


@pytest.mark.parametrize("channels", CHANNELS, ids=str)
def test_volume_preserving_channels(channels):
    leaves, params = packed_sample((4, 6, 3), channels, "interleaved")
    at = slice(None) if channels is None else channels
    for inverse, sum_dims in itertools.product(BOTH, (None, 1)):
        how = {"activation": "atan", "volume_preserving": True, "inverse": inverse, "sum_dims": sum_dims}
        got = pyperf_dl.affine_coupling_packed(leaves[0], params, channels=channels, **how)
        part, logdet = affine_coupling(leaves[0][:, at], params[..., 0], params[..., 1], **how)
        y = leaves[0].clone()
        y[:, at] = part
        torch.testing.assert_close(got, (y, logdet))
        torch.testing.assert_close(*(torch.autograd.grad(out.sum(), leaves) for out in (got[0].sin(), y.sin())))


PACKED_BAD = [
    (TypeError, "params must be a torch.Tensor, got None", {"params": None}),
    (ValueError, r"params must have 2 in the last dimension, .* got \[4, 3, 3\]", {"params": torch.zeros(4, 3, 3)}),
    (ValueError, "params must have a last dimension", {"params": torch.tensor(0.0)}),
    (ValueError, r"params must have shape .* got \[4, 3, 2\] for x \[4, 4\]", {"channels": slice(2, None)}),
    (TypeError, "channels must be a slice of dim 1 of x, or None, got 3", {"channels": 3}),
    (ValueError, "channels must be a slice of ints with a step >= 1", {"channels": slice(None, None, -1)}),
    (ValueError, "channels must be a slice of ints with a step >= 1", {"channels": slice("a", None)}),
    (ValueError, "channels needs an x of at least 2 dimensions", {"x": torch.zeros(4), "channels": slice(1)}),
    (ValueError, "parameters must be one of 'scale_shift', 'shift_scale', got 'scale'", {"parameters": "scale"}),
    (TypeError, "sample_mask must be a bool tensor", {"sample_mask": torch.ones(4, 3)}),
    (ValueError, r"sample_mask must broadcast to .*, \[4, 3\], got \[4\]", {"sample_mask": torch.ones(4) > 0}),
]


@pytest.mark.parametrize(("error", "message", "change"), PACKED_BAD, ids=[m for _, m, _ in PACKED_BAD])
def test_bad_packed_input(error, message, change):
    good = {"x": torch.zeros(4, 6), "params": torch.zeros(4, 3, 2), "channels": slice(3, None)}
    with pytest.raises(error, match=f"affine_coupling_packed: {message}"):
        pyperf_dl.affine_coupling_packed(**(good | change))


@pytest.mark.parametrize(
    ("message", "params", "split"),
    [
        ("params must have 2 in the last dimension", torch.zeros(4, 6, 1), None),
        ("params has a shape", torch.zeros(4, 3, 2), None),
        ("params has a shape", torch.zeros(3, 3, 2), [1, 0, 1]),
        ("params must have the dimensions of x and one more", torch.zeros(6, 2), None),
        ("split must be a dimension of x", torch.zeros(4, 3, 2), [1, 0]),
        ("split must be a dimension of x", torch.zeros(4, 3, 2), [2, 0, 1]),
        ("split must lie in x", torch.zeros(4, 3, 2), [1, 4, 1]),
        ("split must lie in x", torch.zeros(4, 3, 2), [1, -1, 1]),
        ("split must lie in x", torch.zeros(4, 3, 2), [1, 0, 0]),
        ("split must lie in x", torch.zeros(4, 3, 2), [1, 0, 2**62]),
        ("split must lie in x", torch.zeros(4, 3, 2), [1, 2**62, 1]),
    ],
)
def test_raw_packed_operators_are_memory_safe(message, params, split):
    x, how = torch.zeros(4, 6), (False, "exp", 0.0, 0.0, 0.0, False, False)
    with pytest.raises(RuntimeError, match=message):
        ops.affine_coupling_packed(x, params, *how, split, 1)
    with pytest.raises(RuntimeError, match=message):
        ops.affine_coupling_packed_backward(x, torch.zeros(4), x, params, *how, split, 1)


# ---- derivatives and transforms ----


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("inverse", "order"), list(itertools.product(BOTH, ORDERS)))
def test_gradcheck(name, inverse, order):
    leaves = [v.requires_grad_() for v in sample((2, 3), torch.float64)]
    clamp = {"clamp": 1.7} if name in ("exp", *family.DEFAULT_CLAMPS) else {}
    how = arguments(name) | clamp | {"inverse": inverse, "order": order}
    call = lambda *v: affine_coupling(*v, **how)  # noqa: E731
    assert torch.autograd.gradcheck(call, leaves, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(call, leaves)


def test_gradients_of_parameters_that_a_batch_shares():
    x, u, t = sample((40, 3), torch.float64)
    leaves = [x.requires_grad_(), u[:1].clone().requires_grad_(), t[0].clone().requires_grad_()]
    y, logdet = affine_coupling(*leaves)
    got = torch.autograd.grad((y * y).sum() + logdet.sum(), leaves)
    with pyperf_dl.backend("reference"):
        y, logdet = affine_coupling(*leaves)
        want = torch.autograd.grad((y * y).sum() + logdet.sum(), leaves)
    torch.testing.assert_close(got, want)


X, U, T = sample((4, 3), torch.float64)
A, B, C = sample((4, 3), torch.float64, seed=1)


def loss(f):
    def of(x, u, t):
        y, logdet = f(x, u, t)
        return (y**3).sum() + (logdet**2).sum()

    return of


def plain(x, u, t, name="tanh"):
    return reference.affine_coupling(x, u, t, False, *SCALES[name], False, min(1, x.dim()))


def ours(x, u, t, name="tanh"):
    return affine_coupling(x, u, t, **arguments(name))


def dual(f):
    with forward_ad.dual_level():
        out = f(*(forward_ad.make_dual(p, d) for p, d in zip((X, U, T), (A, B, C), strict=True)))
        return tuple(forward_ad.unpack_dual(o).tangent for o in out)


def backward_of_vmap(f):
    leaves = [v.clone().requires_grad_() for v in (X, U, T)]
    y, logdet = vmap(f)(*leaves)
    ((y**2).sum() + logdet.sin().sum()).backward()
    return tuple(v.grad for v in leaves)


ALL = (0, 1, 2)
TRANSFORMS = {
    "grad": lambda f: grad(loss(f), ALL)(X, U, T),
    "vmap": lambda f: vmap(f)(X, U, T),
    "vmap, some": lambda f: vmap(f, (None, 0, 1))(X[0], U, T.t()),
    "vmap of grad": lambda f: vmap(grad(loss(f), ALL))(X, U, T),
    "grad of vmap": lambda f: grad(loss(vmap(f)), ALL)(X, U, T),
    "jvp": lambda f: jvp(f, (X, U, T), (A, B, C)),
    "jvp of one": lambda f: jvp(lambda u: f(X, u, T), (U,), (B,)),
    "jacfwd": lambda f: jacfwd(f, ALL)(X, U, T),
    "jacrev": lambda f: jacrev(f, ALL)(X, U, T),
    "hessian": lambda f: hessian(loss(f), ALL)(X, U, T),
    "grad of grad": lambda f: grad(lambda *v: sum(g.sum() for g in grad(loss(f), ALL)(*v)), ALL)(X, U, T),
    "backward of vmap": backward_of_vmap,
    "dual tensors": dual,
}


@pytest.mark.parametrize("scale", ["tanh", "softplus, floor and limit"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms(name, scale):
    got, want = (TRANSFORMS[name](functools.partial(f, name=scale)) for f in (ours, plain))
    torch.testing.assert_close(got, want)


def packed(call):
    """The same function of (x, u, t) through packed parameters of some channels, beside which others pass."""

    def f(x, u, t):
        y, logdet = call(torch.cat([t, x, u], -1), torch.stack([u, t], -1))
        return y, logdet

    return f


def plain_packed(x, params):
    split = [x.dim() - 1, 3, 1]
    return reference.affine_coupling_packed(x, params, False, "tanh", 2.0, 0.0, 0.0, False, False, split, x.dim() - 1)


def our_packed(x, params):
    if x.dim() < 2:  # one sample of a batch
        y, logdet = our_packed(x[None], params[None])
        return y[0], logdet[0]
    return pyperf_dl.affine_coupling_packed(x, params, channels=slice(3, 6), activation="tanh")


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_of_packed(name):
    torch.testing.assert_close(TRANSFORMS[name](packed(our_packed)), TRANSFORMS[name](packed(plain_packed)))


def plain_packed_shift(x, params):
    split = [x.dim() - 1, 3, 1]
    return reference.affine_coupling_packed(
        x, params[..., 1:], True, "none", 0.0, 0.0, 0.0, False, False, split, x.dim() - 1
    )


def our_packed_shift(x, params):
    if x.dim() < 2:
        y, logdet = our_packed_shift(x[None], params[None])
        return y[0], logdet[0]
    return additive_coupling(x, params[..., 1], channels=slice(3, 6), inverse=True)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_of_additive_channels(name):
    got, want = (TRANSFORMS[name](packed(f)) for f in (our_packed_shift, plain_packed_shift))
    flat = lambda tree: [v for v in torch.utils._pytree.tree_leaves(tree) if v is not None]  # noqa: E731
    if name == "dual tensors":  # no tangent is one of zeros
        got, want = got[:1], want[:1]
    torch.testing.assert_close(flat(got), flat(want))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_of_additive(name):
    got = TRANSFORMS[name](lambda x, u, t: additive_coupling(x, t))
    want = TRANSFORMS[name](
        lambda x, u, t: reference.affine_coupling(x, u, t, False, "none", 0.0, 0.0, 0.0, False, min(1, x.dim()))
    )
    flat = lambda tree: [v for v in torch.utils._pytree.tree_leaves(tree) if v is not None]  # noqa: E731
    if name == "dual tensors":  # no tangent is one of zeros
        got, want = got[:1], want[:1]
    torch.testing.assert_close(flat(got), flat(want))


def operator_calls():
    x, u, t = sample((4, 6), torch.float64)
    strided = [torch.randn(6, 4, dtype=torch.float64).t() for _ in range(3)]
    halves = [torch.randn(4, 12)[:, 6:] for _ in range(3)]
    leaves = [v.clone().requires_grad_() for v in (x, u, t)]
    for tensors, sample_dims in itertools.product(((x, u, t), strided, halves, leaves), (-1, 1)):
        statics = (
            sample_dims == 1,
            *SCALES["softplus, floor and limit" if tensors is leaves else "softplus"],
            False,
            sample_dims,
        )
        yield family._coupling, (*tensors, *statics)
        grads = (torch.randn_like(tensors[0]), torch.randn_like(tensors[0] if sample_dims < 0 else tensors[0][:, 0]))
        yield family._backward, (*grads, *tensors, *statics)
    mixed = [v.bfloat16().requires_grad_() for v in (u, t)]
    yield family._coupling, (x.float().requires_grad_(), *mixed, False, "exp", 1.0, 0.0, 0.0, True, 1)
    yield family._coupling, (*leaves, True, "none", 0.0, 0.0, 0.0, False, 1)
    params = torch.stack([u, t], 1).movedim(1, -1).requires_grad_()
    some = params[:, :3]
    for pair, split, sample_dims in ((params, None, 1), (some, [1, 3, 1], -1), (some.float(), [1, 1, 2], 1)):
        data = x.to(pair.dtype).requires_grad_()
        statics = (True, "tanh", 2.0, 0.0, 0.0, True, False, split, sample_dims)
        logdet = torch.randn(pair.shape[:sample_dims] if sample_dims > 0 else pair.shape[:-1], dtype=pair.dtype)
        yield family._packed, (data, pair, *statics)
        yield family._packed_backward, (torch.randn_like(data), logdet, data, pair, *statics)
    yield family._packed, (leaves[0], some[..., :1], False, "none", 0.0, 0.0, 0.0, False, False, [1, 0, 1], 1)


@pytest.mark.parametrize("n", range(25))
def test_opcheck(n):
    operator, args = list(operator_calls())[n]
    opcheck(operator.native.op, args)


def test_every_operator_is_checked():
    assert len(list(operator_calls())) == 25
    called = {operator.name for operator, _ in operator_calls()}
    assert called == {o.name for o in vars(family).values() if isinstance(o, type(family._coupling))}


def test_compile_takes_at_most_two_graphs():
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()

    def f(x, u, t):
        y, a = affine_coupling(x, u, t, activation="atan", sum_dims=(-1,))
        z, b = additive_coupling(y, t, inverse=True)
        w, c = affine_coupling(z, u, t, volume_preserving=True, inverse=True)
        return w, a.sum() + b.sum() + c.sum()

    compiled = torch.compile(f, fullgraph=True, backend=counter)
    for shape in ((3, 40), (7, 33), (2, 129)):
        args = sample(shape)
        torch.testing.assert_close(compiled(*args), f(*args))
    assert counter.frame_count <= 2


def test_compiled_gradients():
    torch._dynamo.reset()
    compiled = torch.compile(loss(ours), fullgraph=True, backend="aot_eager")
    leaves = [v.clone().requires_grad_() for v in (X, U, T)]
    got = torch.autograd.grad(compiled(*leaves), leaves)
    torch.testing.assert_close(got, torch.autograd.grad(loss(plain)(*leaves), leaves))


def test_export_and_decompositions():
    class Layer(torch.nn.Module):
        def forward(self, x, u, t):
            return affine_coupling(x, u, t, activation="sigmoid")

    program = torch.export.export(Layer(), sample((4, 6)))
    torch.testing.assert_close(program.module()(*sample((4, 6))), Layer()(*sample((4, 6))))
    table = torch.export.default_decompositions()
    table.update(pyperf_dl.decompositions())
    decomposed = program.run_decompositions(table)
    assert not any("pyperf_dl" in str(n.target) for n in decomposed.graph.nodes)
    torch.testing.assert_close(decomposed.module()(*sample((4, 6))), Layer()(*sample((4, 6))))


def test_flops_are_counted():
    from torch.utils.flop_counter import FlopCounterMode

    x, u, t = (v.requires_grad_() for v in sample((8, 5)))
    with FlopCounterMode(display=False) as counter:
        y, logdet = affine_coupling(x, u, t)
        (y.sum() + logdet.sum()).backward()
    assert counter.get_total_flops() == 40 * (40 + 50)


def test_autocast_leaves_dtypes_alone():
    x, u, t = sample((8, 5))
    with torch.autocast("cpu", torch.bfloat16):
        y, logdet = affine_coupling(x, u.bfloat16(), t.bfloat16())
    assert (y.dtype, logdet.dtype) == (torch.float32, torch.float32)
    check_against_reference((x, u.bfloat16(), t.bfloat16()), (False, "exp", 0.0, 0.0, 0.0, False, 1))


# ---- determinism, memory ----


@pytest.mark.parametrize("shape", [(3000, 6), (3, 70_001), (200_003,)])
def test_determinism(shape):
    tensors = sample(shape)
    how = (False, "softplus", 0.0, 0.0, 0.0, False, len(shape) - 1)
    wants = None
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for _ in range(20):
            out = ops.affine_coupling(*tensors, *how)
            grads = ops.affine_coupling_backward(tensors[0], torch.ones_like(out[1]), *tensors, *how)
            if wants is None:
                wants = (*out, *grads)
            assert_same((*out, *grads), wants)


# ---- bad input ----

GOOD = torch.zeros(4, 3)
BAD = [
    (TypeError, "x must be a torch.Tensor, got list", {"x": [1.0]}),
    (TypeError, "x must have one of the dtypes .*, got torch.int64", {"x": torch.zeros(4, 3, dtype=torch.int64)}),
    (TypeError, "scale must be a torch.Tensor, got float", {"scale": 1.0}),
    (TypeError, "scale must have x's dtype, .* got torch.float64", {"scale": GOOD.double()}),
    (TypeError, "shift must have the dtype of scale", {"shift": GOOD.half()}),
    (TypeError, "scale must have x's dtype", {"x": GOOD.half()}),
    (ValueError, r"scale must have x's shape or broadcast to it, got \[5, 3\]", {"scale": torch.zeros(5, 3)}),
    (ValueError, r"shift must have x's shape or broadcast to it, got \[2, 4, 3\]", {"shift": torch.zeros(2, 4, 3)}),
    (ValueError, "scale must be on x's device cpu, got meta", {"scale": GOOD.to("meta")}),
    (TypeError, "inverse must be a bool, got 1", {"inverse": 1}),
    (TypeError, "sample_mask must be a bool tensor", {"sample_mask": True}),
    (ValueError, "sample_mask must broadcast", {"sample_mask": torch.ones(3, 3) > 0}),
    (ValueError, "sample_mask must be on x's device cpu, got meta", {"sample_mask": GOOD.to("meta") > 0}),
    (ValueError, "activation must be one of 'exp', .* got 'none'", {"activation": "none"}),
    (TypeError, "activation must be one of .*, got None", {"activation": None}),
    (ValueError, "clamp must be > 0, got 0", {"clamp": 0}),
    (ValueError, "clamp must be finite, got nan", {"clamp": math.nan}),
    (TypeError, "clamp must be a number, got a tensor", {"clamp": torch.tensor(1.0)}),
    (
        ValueError,
        "clamp is for the activations 'exp', .*, got 1.0 with 'softplus'",
        {"clamp": 1.0, "activation": "softplus"},
    ),
    (
        ValueError,
        "min_scale is for the activations 'sigmoid', 'softplus', got 0.001 with 'exp'",
        {"min_scale": 1e-3},
    ),
    (ValueError, "min_scale is for .*, got 0.1 with 'sigmoid_inv'", {"min_scale": 0.1, "activation": "sigmoid_inv"}),
    (ValueError, "max_scale must be above a min_scale > 0, got 3.0 with min_scale=0.0", {"max_scale": 3.0}),
    *(
        (error, message, {"activation": "softplus"} | change)
        for error, message, change in (
            (ValueError, "min_scale must be >= 0, got -0.001", {"min_scale": -1e-3}),
            (ValueError, r"min_scale must be 0 or of a size in \[1e-30, 1e30\], got 1e-31", {"min_scale": 1e-31}),
            (ValueError, "min_scale must be 0 or of a size in .*, got 1e[+]31", {"min_scale": 1e31}),
            (ValueError, "min_scale must be finite, got nan", {"min_scale": math.nan}),
            (TypeError, "min_scale must be a number, got None", {"min_scale": None}),
            (ValueError, "max_scale must be above a min_scale > 0, got 3.0 with", {"max_scale": 3.0}),
            (
                ValueError,
                "max_scale must be above .* got 0.5 with min_scale=0.5",
                {"min_scale": 0.5, "max_scale": 0.5},
            ),
            (ValueError, "max_scale must be 0 or of a size in .*, got 1e[+]31", {"min_scale": 0.5, "max_scale": 1e31}),
            (ValueError, "max_scale must be finite, got inf", {"min_scale": 0.5, "max_scale": math.inf}),
            (TypeError, "max_scale must be a number, got a tensor", {"max_scale": torch.tensor(1.0)}),
        )
    ),
    (ValueError, "order must be one of 'scale_shift', 'shift_scale', got 'scale'", {"order": "scale"}),
    (ValueError, "logdet must be one of 'sum', 'elementwise', got 'mean'", {"logdet": "mean"}),
    (ValueError, r"sum_dims must be in \[-2, 1\] for a tensor with 2 dimensions, got 2", {"sum_dims": 2}),
    (ValueError, "sum_dims must name each dimension once", {"sum_dims": (1, -1)}),
    (TypeError, "sum_dims must be an int", {"sum_dims": 1.0}),
    (ValueError, "sum_dims needs logdet='sum'", {"sum_dims": 1, "logdet": "elementwise"}),
    (TypeError, "volume_preserving must be a bool", {"volume_preserving": "yes"}),
]


@pytest.mark.parametrize(("error", "message", "change"), BAD, ids=[m for _, m, _ in BAD])
def test_bad_input(error, message, change):
    with pytest.raises(error, match=f"affine_coupling: {message}"):
        affine_coupling(**({"x": GOOD, "scale": GOOD, "shift": GOOD} | change))
    shared = {"x", "shift", "inverse", "sample_mask", "logdet", "sum_dims"}
    if set(change) <= shared and "scale" not in message:
        with pytest.raises(error, match=f"additive_coupling: {message}"):
            additive_coupling(**({"x": GOOD, "shift": GOOD} | change))


@pytest.mark.parametrize(
    ("message", "args"),
    [
        ("scale has a shape", (GOOD, GOOD[:2], GOOD, False, "exp", 0.0, 0.0, 0.0, False, 1)),
        ("shift has a shape", (GOOD, GOOD, GOOD[0], False, "exp", 0.0, 0.0, 0.0, False, 1)),
        ("one dtype", (GOOD, GOOD.half(), GOOD, False, "exp", 0.0, 0.0, 0.0, False, 1)),
        ("must have the dtype of x", (GOOD.half(), GOOD, GOOD, False, "exp", 0.0, 0.0, 0.0, False, 1)),
        (
            "float16, bfloat16, float32 or float64",
            (GOOD.long(), GOOD.long(), GOOD.long(), False, "exp", 0.0, 0.0, 0.0, False, 1),
        ),
        ("unknown activation relu", (GOOD, GOOD, GOOD, False, "relu", 0.0, 0.0, 0.0, False, 1)),
        ("clamp must be > 0 for tanh", (GOOD, GOOD, GOOD, False, "tanh", 0.0, 0.0, 0.0, False, 1)),
        ("min_scale is for sigmoid and softplus, got exp", (GOOD, GOOD, GOOD, False, "exp", 0.0, 0.1, 0.0, False, 1)),
        ("min_scale must be >= 0", (GOOD, GOOD, GOOD, False, "softplus", 0.0, -0.1, 0.0, False, 1)),
        ("min_scale must be >= 0", (GOOD, GOOD, GOOD, False, "softplus", 0.0, math.nan, 0.0, False, 1)),
        ("max_scale above a min_scale > 0", (GOOD, GOOD, GOOD, False, "softplus", 0.0, 0.0, 3.0, False, 1)),
        ("max_scale above a min_scale > 0", (GOOD, GOOD, GOOD, False, "softplus", 0.0, 0.5, 0.5, False, 1)),
        ("max_scale above a min_scale > 0", (GOOD, GOOD, GOOD, False, "softplus", 0.0, 0.5, math.nan, False, 1)),
        (r"sample_dims must be in \[-1, 2\], got 3", (GOOD, GOOD, GOOD, False, "exp", 0.0, 0.0, 0.0, False, 3)),
    ],
)
def test_raw_operators_are_memory_safe(message, args):
    with pytest.raises(RuntimeError, match=message):
        ops.affine_coupling(*args)
    with pytest.raises(RuntimeError, match=message):
        ops.affine_coupling_backward(args[0], torch.zeros(4), *args)
    good = (GOOD, GOOD, GOOD, False, "exp", 0.0, 0.0, 0.0, False, 1)
    for grads in (
        (GOOD[:1], torch.zeros(4)),
        (GOOD, torch.zeros(3)),
        (GOOD.half(), torch.zeros(4)),
        (GOOD, GOOD[:, 0].half()),
    ):
        with pytest.raises(RuntimeError, match="affine_coupling: "):
            ops.affine_coupling_backward(*grads, *good)
