"""pyperf_dl.integrations.zuko beside zuko itself."""

import copy
import pickle

import pytest
import torch
from peer_flows import (
    assert_as_accurate,
    assert_compiles_whole,
    assert_flow_as_accurate,
    assert_overlays,
    assert_same,
    assert_takeovers,
    assert_versions_are_checked,
    density_and_gradients,
    draws_of,
    restored,
    three_runs,
    training_curves,
    values_and_gradients,
)
from torch import nn

pytest.importorskip("zuko", reason="zuko is not installed")
from zuko.flows import MAF, NCSF, NICE, NSF
from zuko.transforms import DependentTransform, MonotonicAffineTransform, MonotonicRQSTransform

from pyperf_dl.integrations import zuko

_as_it_was = restored(zuko)


def spline(n=200, bins=8, by=1.0, derivatives=None, dtype=torch.float32, **how):
    torch.manual_seed(0)
    sizes = (bins, bins, bins - 1 if derivatives is None else derivatives)
    return MonotonicRQSTransform(*(by * torch.randn(n, k, dtype=dtype) for k in sizes), **how)


# ---- results ----


@pytest.mark.parametrize("direction", ["call_and_ladj", "inverse"])
@pytest.mark.parametrize("how", [{}, {"bound": 2.0, "slope": 1e-4}])
def test_splines(direction, how):
    torch.manual_seed(0)
    x, *params = (2 * torch.randn(8_000), *(torch.randn(8_000, k) for k in (8, 8, 7)))

    def function(x, *params):
        t = MonotonicRQSTransform(*params, **how)
        return (t if direction == "call_and_ladj" else t.inv).call_and_ladj(x)

    assert_as_accurate(*three_runs(values_and_gradients(function), nn.Module(), zuko, x, *params))
    assert zuko.report() == (1, {})


@pytest.mark.parametrize("inverse", [False, True])
def test_affine(inverse):
    torch.manual_seed(0)
    x, shift, scale = torch.randn(3, 8_000)

    def function(x, shift, scale):
        t = MonotonicAffineTransform(shift, 3 * scale)
        return (t.inv if inverse else t).call_and_ladj(x)

    assert_as_accurate(*three_runs(values_and_gradients(function), nn.Module(), zuko, x, shift, scale))
    assert zuko.report() == (1, {})


FLOWS = {  # and the calls for a density and for a sample
    "NSF": (lambda: NSF(3, 2, transforms=2, hidden_features=(16,)), 2, 6),
    "NSF by coupling": (lambda: NSF(4, 2, passes=2, transforms=2, hidden_features=(16,)), 2, 4),
    "NSF of one feature": (lambda: NSF(1, 2, transforms=2), 2, 2),
    "NCSF": (lambda: NCSF(3, 2, transforms=2, hidden_features=(16,)), 2, 6),
    "MAF": (lambda: MAF(3, 2, transforms=2, hidden_features=(16,)), 2, 6),
    "NICE": (lambda: NICE(4, 2, transforms=3, hidden_features=(16,)), 3, 3),
}


@pytest.mark.parametrize("name", FLOWS)
def test_density_and_gradients(name):
    make, calls, _ = FLOWS[name]
    torch.manual_seed(0)
    model, context = make(), torch.randn(2000, 2)
    x = torch.randn(2000, model(context).event_shape[0])
    run = density_and_gradients(lambda f, x, context: f(context).log_prob(x))
    assert_flow_as_accurate(draws_of(run, model, zuko, x, context))
    assert zuko.report() == (calls, {})


@pytest.mark.parametrize("name", FLOWS)
def test_samples(name):
    make, _, calls = FLOWS[name]
    torch.manual_seed(0)
    model, context = make(), torch.randn(500, 2)
    noise = model(context).base.sample((2,))

    def run(model, noise, context):
        return {"x": model(context).transform.inv(noise).detach()}

    assert_flow_as_accurate(draws_of(run, model, zuko, noise, context))
    assert zuko.report(reset=True) == (calls, {})
    for on in (False, True):
        torch.manual_seed(1)
        noise = model(context).base.sample((2,))
        torch.manual_seed(1)
        with zuko.enable() if on else torch.no_grad():
            x, log_prob = model(context).rsample_and_log_prob((2,))
            assert torch.equal(x, run(model, noise, context)["x"])
            torch.testing.assert_close(model(context).log_prob(x), log_prob, rtol=1e-3, atol=2e-3)


def test_training():
    torch.manual_seed(0)
    moons = [torch.stack([x := torch.randn(128), x**2 / 2 + 0.3 * torch.randn(128)], 1) for _ in range(20)]
    model = NSF(2, transforms=2, hidden_features=(16, 16))
    assert_overlays(*training_curves(model, moons, lambda f, x: -f().log_prob(x).mean(), zuko))
    assert zuko.report() == (40, {})


def test_the_sum_is_in_the_same_pass():
    inner, x = spline(4), torch.randn(6, 4)
    want = DependentTransform(inner, 1).call_and_ladj(x)
    with zuko.enable():
        for t in (DependentTransform(spline(4), 1), DependentTransform(spline(4).inv, 1)):
            _, ladj = t.call_and_ladj(x)
            assert ladj.shape == (6,)
        torch.testing.assert_close(DependentTransform(spline(4), 1).call_and_ladj(x), want)
    assert zuko.report() == (3, {})


def test_parameters_of_other_shapes():
    want = spline(4)(torch.ones(5, 1)), MonotonicAffineTransform(torch.ones(3, 1), torch.ones(4))(torch.ones(2, 1, 1))
    with zuko.enable():
        torch.testing.assert_close(spline(4)(torch.ones(5, 1)), want[0])
        t = MonotonicAffineTransform(torch.ones(3, 1), torch.ones(4))
        torch.testing.assert_close(t(torch.ones(2, 1, 1)), want[1])
    assert zuko.report() == (2, {})


# ---- where zuko fails ----


def test_finite_where_zuko_is_not():
    sizes = (64, 64, 63)
    torch.manual_seed(0)
    params = [(1000 * torch.randn(8000, k)).requires_grad_() for k in sizes]
    y = (10 * torch.rand(8000) - 5).requires_grad_()
    assert not MonotonicRQSTransform(*params, slope=1e-6).inv(y).isfinite().all()
    with zuko.enable():
        t = MonotonicRQSTransform(*params, slope=1e-6)
        for x, ladj in (t.inv.call_and_ladj(y), t.call_and_ladj(y)):
            for value in (x, ladj, *torch.autograd.grad((x + ladj).sum(), [y, *params])):
                assert value.isfinite().all()


def test_nothing_is_read_from_the_device():
    model, x = NSF(3, transforms=1).to("meta"), torch.empty(5, 3, device="meta")
    with zuko.enable():
        assert model().log_prob(x).shape == (5,)
        assert model().transform.inv(x).shape == (5, 3)
    assert zuko.report().taken == 4


# ---- what goes to zuko ----


class Own(MonotonicRQSTransform):
    pass


class Tagged(torch.Tensor):
    pass


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (lambda: Own(*(torch.ones(2, k) for k in (4, 4, 3)))(torch.ones(2)), "subclass"),
        (lambda: spline(slope=torch.tensor(1e-3))(torch.ones(200)), "arguments"),
        (lambda: spline(slope=2.0)(torch.ones(200)), "arguments"),
        (lambda: spline(bound=0)(torch.ones(200)), "arguments"),
        (lambda: spline(derivatives=9).call_and_ladj(torch.ones(200)), "number of derivatives"),
        (lambda: spline(bins=257).inv(torch.ones(200)), "number of bins"),
        (lambda: spline()(torch.ones(3)), "shape"),
        (lambda: spline(dtype=torch.float64)(torch.ones(200)), "dtype"),
        (lambda: spline()(torch.ones(200).as_subclass(Tagged)), "not a plain tensor"),
        (lambda: DependentTransform(spline(), 1).call_and_ladj(torch.ones(200).double()), "dtype"),
        (lambda: MonotonicAffineTransform(torch.ones(2), torch.ones(3))(torch.ones(3)), "shape"),
        (lambda: MonotonicAffineTransform(1.0, 2.0)(torch.ones(3)), "not a plain tensor"),
        (lambda: MonotonicAffineTransform(torch.ones(2), torch.ones(2), slope=0.0)(torch.ones(2)), "arguments"),
    ],
)
def test_falls_back(call, why):
    assert_same(call, zuko, 0, **{why.replace(" ", "_"): 1})


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype):
    torch.manual_seed(0)
    x, *params = (torch.randn(*shape).to(dtype) for shape in ((200,), (200, 8), (200, 8), (200, 7)))
    want = MonotonicRQSTransform(*(p.double() for p in params)).call_and_ladj(x.double())
    with zuko.enable():
        got = MonotonicRQSTransform(*params).call_and_ladj(x)
    assert zuko.report() == (1, {})
    for a, b in zip(got, want, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a, b.to(dtype))


# ---- beginning and end ----


def test_what_zuko_prepares_is_there_when_wanted():
    x = torch.linspace(-3, 3, 200)
    theirs = spline()
    affine = MonotonicAffineTransform(torch.ones(3), torch.ones(3))
    with zuko.enable():
        ours, other = spline(), MonotonicAffineTransform(torch.ones(3), torch.ones(3))
        assert "horizontal" not in vars(ours)
        assert isinstance(ours, MonotonicRQSTransform)
        assert repr(ours) == "MonotonicRQSTransform(bins=8)" == repr(copy.deepcopy(ours))
        for name in ("horizontal", "vertical", "derivatives"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name))
        assert torch.equal(other.scale, affine.scale)
        torch.testing.assert_close(other.log_abs_det_jacobian(torch.ones(3), None), affine.log_scale)
        with pytest.raises(AttributeError, match="'MonotonicRQSTransform' object has no attribute 'other'"):
            _ = ours.other
        late = spline()
    assert torch.equal(late(x), theirs(x))  # zuko's own again
    assert zuko.report() == (0, {})


def pickled(value):
    return pickle.loads(pickle.dumps(value))


@pytest.mark.parametrize("copied", [pickled, copy.deepcopy])
@pytest.mark.parametrize(
    "make",
    [
        spline,
        lambda: spline(bound=2.0, slope=1e-4),
        lambda: DependentTransform(spline(), 1),
        lambda: MonotonicAffineTransform(torch.arange(200.0), torch.ones(200), slope=1e-2, cache_size=1),
    ],
)
def test_copies_of_transformations(copied, make):
    """Made, copied and used with and without a takeover; ours are zuko's for whoever reads them."""
    x = torch.linspace(-3, 3, 200)
    want = make().call_and_ladj(x)
    with zuko.enable():
        ours = make()
        mine = ours.call_and_ladj(x)
        stored, within = pickle.dumps(ours), copied(ours)
        assert b"pyperf_dl" not in stored
        for got, value in zip(within.call_and_ladj(x), mine, strict=True):
            assert torch.equal(got, value)
        assert zuko.report(reset=True) == (2, {})
    for t in (within, copied(ours), pickle.loads(stored)):
        for got, value in zip(t.call_and_ladj(x), want, strict=True):
            assert torch.equal(got, value)
    assert zuko.report() == (0, {})


@pytest.mark.parametrize("copied", [pickled, copy.deepcopy])
@pytest.mark.parametrize("name", FLOWS)
def test_copies_of_flows(copied, name):
    torch.manual_seed(0)
    model, context = FLOWS[name][0](), torch.randn(20, 2)
    x = torch.randn(20, model(context).event_shape[0])
    want = model(context).log_prob(x)
    with zuko.enable(), torch.no_grad():
        distribution = model(context)
        for flow in (copied(model)(context), copied(distribution)):
            torch.testing.assert_close(flow.log_prob(x), want)
    with torch.no_grad():
        for flow in (copied(model)(context), copied(distribution)):
            torch.testing.assert_close(flow.log_prob(x), want)


def test_takeovers():
    assert_takeovers(zuko, lambda: spline()(torch.ones(200)))


def test_other_versions(monkeypatch):
    assert_versions_are_checked(zuko, monkeypatch, "zuko", ["1.5.0", "1.6.0"], ["1.4.1", "1.7.0", "2.0"])


# ---- compilers and transforms ----


def test_compiles_whole():
    def run(x, *params):
        y, ladj = DependentTransform(MonotonicRQSTransform(*params), 1).call_and_ladj(x)
        return MonotonicAffineTransform(y, y).inv(y), ladj

    assert_compiles_whole(run, zuko, torch.randn(6, 4), *(torch.randn(6, 4, k) for k in (8, 8, 7)))


def test_function_transforms():
    x, params = torch.randn(6, 20), [torch.randn(20, k) for k in (8, 8, 7)]
    want = MonotonicRQSTransform(*params)(x)
    with zuko.enable():
        torch.testing.assert_close(torch.func.vmap(lambda row: MonotonicRQSTransform(*params)(row))(x), want)
