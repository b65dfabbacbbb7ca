"""pyperf_dl.integrations.nflows beside nflows itself."""

import sys
import threading
import types
import warnings

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
    spread,
    three_runs,
    training_curves,
    values_and_gradients,
)
from torch import nn

pytest.importorskip("nflows", reason="nflows is not installed")
from nflows import transforms
from nflows.distributions import StandardNormal
from nflows.flows import Flow
from nflows.nn.nets import ConvResidualNet, ResidualNet
from nflows.transforms import autoregressive, coupling, splines
from nflows.transforms.splines import rational_quadratic

from pyperf_dl.integrations import nflows

_as_it_was = restored(nflows)


def net(inputs, outputs):
    return ResidualNet(inputs, outputs, hidden_features=16)


def flow(*layers, features=4):
    torch.manual_seed(0)
    return spread(Flow(transforms.CompositeTransform([layer() for layer in layers]), StandardNormal([features])))


def spline_coupling(**how):
    how = {"num_bins": 8, "tails": "linear", "tail_bound": 3.0} | how
    return coupling.PiecewiseRationalQuadraticCouplingTransform([1, 0, 1, 0], net, **how)


def spline_autoregressive(**how):
    how = {"num_bins": 5, "tails": "linear", "tail_bound": 2.0} | how
    return autoregressive.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(4, 16, **how)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(("tails", "derivatives"), [("linear", 7), ("linear", 8), ("linear", 9), (None, 9)])
def test_the_functions(tails, derivatives, inverse):
    torch.manual_seed(0)
    x = torch.randn(8_000) if tails else torch.rand(8_000)
    params = [torch.randn(8_000, k) for k in (8, 8, derivatives)]

    def function(x, *params):
        if tails:
            return splines.unconstrained_rational_quadratic_spline(x, *params, inverse=inverse, tail_bound=2.0)
        return splines.rational_quadratic_spline(x, *params, inverse=inverse)

    assert_as_accurate(*three_runs(values_and_gradients(function), nn.Module(), nflows, x, *params))
    assert nflows.report() == (1, {})


FLOWS = {
    "coupling": (
        lambda: flow(spline_coupling, lambda: transforms.ReversePermutation(4), spline_coupling),
        2,
    ),
    "unconditional": (lambda: flow(lambda: spline_coupling(apply_unconditional_transform=True)), 2),
    "autoregressive": (lambda: flow(spline_autoregressive, spline_autoregressive), 2),
    "without tails": (
        lambda: flow(
            lambda: spline_coupling(tails=None, apply_unconditional_transform=True),
            lambda: spline_autoregressive(tails=None),
        ),
        3,
    ),
    "additive": (
        lambda: flow(lambda: coupling.AdditiveCouplingTransform([1, 0, 1, 0], net), spline_coupling),
        2,
    ),
    "affine": (
        lambda: flow(
            lambda: coupling.AffineCouplingTransform([1, 0, 1, 0], net),
            lambda: coupling.AffineCouplingTransform([0, 1, 1, 1], net),
        ),
        2,
    ),
    "affine autoregressive": (
        lambda: flow(*2 * [lambda: autoregressive.MaskedAffineAutoregressiveTransform(4, 16)]),
        2,
    ),
}


@pytest.mark.parametrize("name", FLOWS)
def test_density_and_gradients(name):
    make, calls = FLOWS[name]
    torch.manual_seed(2)
    x = torch.rand(2000, 4) if name == "without tails" else 1.5 * torch.randn(2000, 4)
    assert_flow_as_accurate(draws_of(density_and_gradients(lambda f, x: f.log_prob(x)), make(), nflows, x))
    assert nflows.report() == (calls, {})


@pytest.mark.parametrize("name", FLOWS)
def test_samples(name):
    model = FLOWS[name][0]()
    torch.manual_seed(1)
    noise = torch.rand(1000, 4) if name == "without tails" else model._distribution.sample(1000)

    def run(model, noise):
        x, logabsdet = model._transform.inverse(noise)
        return {"x": x.detach(), "logabsdet": logabsdet.detach()}

    draws = draws_of(run, model, nflows, noise)
    assert_flow_as_accurate(draws)
    _, theirs, ours = draws[0]
    if name == "without tails":  # what the base draws is outside the domain
        return
    for on in (False, True):
        torch.manual_seed(1)
        with nflows.enable() if on else torch.no_grad():
            assert torch.equal(model.sample(1000), (ours if on else theirs)["x"])


def test_images():
    torch.manual_seed(0)
    layer = spread(
        coupling.PiecewiseRationalQuadraticCouplingTransform(
            [1, 0, 1], lambda i, o: ConvResidualNet(i, o, 8), num_bins=4, tails="linear", tail_bound=2.0
        )
    )
    x = torch.randn(8, 3, 6, 5)
    for direction in (layer.forward, layer.inverse):
        run = density_and_gradients(lambda model, x, d=direction.__name__: sum(t.sum() for t in getattr(model, d)(x)))
        assert_flow_as_accurate(draws_of(run, layer, nflows, x), ["gradient of x", "gradients of parameters"])
        assert nflows.report() == (1, {})


def test_affine_images():
    torch.manual_seed(0)
    layer = spread(coupling.AffineCouplingTransform([1, 0, 1], lambda i, o: ConvResidualNet(i, o, 8)))
    x = torch.randn(8, 3, 6, 5)
    for direction in ("forward", "inverse"):
        run = density_and_gradients(lambda model, x, d=direction: getattr(model, d)(x)[1])
        assert_flow_as_accurate(draws_of(run, layer, nflows, x))
        assert nflows.report() == (1, {})


def test_exact():
    torch.manual_seed(0)
    x = 1.5 * torch.randn(4000, 4)
    layer = spread(spline_coupling(num_bins=16), 1.0)

    def run(model, x):
        return {"logabsdet": model(x)[1].detach()}

    assert_flow_as_accurate(draws_of(run, layer, nflows, x, precision="exact"))
    assert nflows.report().taken == 1


def test_training():
    torch.manual_seed(0)
    moons = [torch.stack([x := torch.randn(128), x**2 / 2 + 0.3 * torch.randn(128)], 1) for _ in range(20)]

    def layer(mask):
        return lambda: coupling.PiecewiseRationalQuadraticCouplingTransform(
            mask, net, num_bins=8, tails="linear", tail_bound=4.0
        )

    model = Flow(transforms.CompositeTransform([layer([1, 0])(), layer([0, 1])()]), StandardNormal([2]))
    assert_overlays(*training_curves(model, moons, lambda f, x: -f.log_prob(x).mean(), nflows))
    assert nflows.report() == (40, {})


# ---- where nflows fails ----


def rough_parameters(n, bins=8):
    torch.manual_seed(0)
    return (30 * torch.randn(n, k) for k in (bins, bins, bins - 1))


def test_the_inverse_never_fails():
    params = [p.requires_grad_() for p in rough_parameters(50_000)]
    y = (6 * torch.rand(50_000) - 3).requires_grad_()

    def call():
        return rational_quadratic.unconstrained_rational_quadratic_spline(y, *params, inverse=True, tail_bound=3.0)

    assert not torch.stack(call()).isfinite().all()
    with nflows.enable():
        x, logabsdet = call()
    for t in (x, logabsdet, *torch.autograd.grad((x + logabsdet).sum(), [y, *params])):
        assert t.isfinite().all()


def test_a_whole_flow_with_rough_parameters():
    model = spread(flow(spline_coupling, spline_coupling), 3.0)
    with nflows.enable():
        x = model.sample(20_000)
        assert x.isfinite().all()
        assert model.log_prob(x).isfinite().all()


def test_outside_the_domain():
    layer = spline_coupling(tails=None)
    x = torch.tensor([[-0.5, 0.2, 1.5, 0.3]])
    with pytest.raises(transforms.base.InputOutsideDomain):
        layer(x)
    with nflows.enable():
        y, logabsdet = layer(x)
        back, inverse = layer.inverse(y)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(inverse, -logabsdet)


def test_nothing_is_read_from_the_device():
    layers = (
        spline_coupling,
        spline_autoregressive,
        lambda: coupling.AffineCouplingTransform([1, 0, 1, 0], net),
        lambda: autoregressive.MaskedAffineAutoregressiveTransform(4, 16),
    )
    model, x = flow(*layers).to("meta"), torch.empty(5, 4, device="meta")
    with pytest.raises(RuntimeError):  # nflows' own code does read
        model.log_prob(x)
    with nflows.enable():
        assert model.log_prob(x).shape == (5,)
        assert model._transform.inverse(x)[0].shape == (5, 4)


# ---- what goes to nflows ----


def unconstrained(x=None, bins=8, derivatives=7, dtype=torch.float32, **how):
    torch.manual_seed(0)
    shape = (3, 4)
    params = [torch.randn(*shape, k).to(dtype) for k in (bins, bins, derivatives)]
    return rational_quadratic.unconstrained_rational_quadratic_spline(
        torch.randn(shape) if x is None else x, *params, **how
    )


class Tagged(torch.Tensor):
    pass


class Own(coupling.AdditiveCouplingTransform):
    def _scale_and_shift(self, transform_params):
        return torch.full_like(transform_params, 2.0), transform_params


class OwnAutoregressive(autoregressive.MaskedAffineAutoregressiveTransform):
    def _unconstrained_scale_and_shift(self, autoregressive_params):
        return autoregressive_params.chunk(2, 1)


def masked_affine(kind=autoregressive.MaskedAffineAutoregressiveTransform, epsilon=1e-3, **params):
    layer = kind(2, 4)
    layer._epsilon = epsilon
    params = {"dtype": torch.float32, "size": (3, 4)} | params
    return layer._elementwise_forward(torch.ones(3, 2), torch.ones(**params))


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (lambda: unconstrained(tails="cubic"), "arguments"),
        (lambda: unconstrained(tail_bound=torch.tensor(2.0)), "arguments"),
        (lambda: unconstrained(tail_bound=-2.0), "arguments"),
        (lambda: unconstrained(inverse=1), "arguments"),
        (lambda: unconstrained(derivatives=10), "number of derivatives"),
        (lambda: unconstrained(derivatives=5), "number of derivatives"),
        (lambda: unconstrained(min_bin_width=0.2), "smallest sizes"),
        (lambda: unconstrained(min_derivative=0.0), "smallest sizes"),
        (lambda: unconstrained(x=torch.zeros(4)), "shape"),
        (lambda: unconstrained(dtype=torch.float64), "dtype"),
        (lambda: unconstrained(x=torch.zeros(3, 4).as_subclass(Tagged)), "not a plain tensor"),
        (lambda: unconstrained(bins=257, derivatives=256), "number of bins"),
        (lambda: splines.rational_quadratic_spline(*(torch.rand(5, k) for k in (5, 4, 4, 5))), "shape"),
        (lambda: splines.rational_quadratic_spline(torch.rand(5), *3 * [torch.rand(5, 4)]), "number of derivatives"),
        (lambda: Own([1, 0], net)(torch.ones(2, 2))[0] * 0, "subclass"),
        (lambda: masked_affine(OwnAutoregressive), "subclass"),
        (lambda: masked_affine(epsilon=0.0), "arguments"),
        (lambda: masked_affine(epsilon=torch.tensor(0.1)), "arguments"),
        (lambda: masked_affine(size=(2, 6)), "shape"),
        (lambda: masked_affine(dtype=torch.float64), "dtype"),
    ],
)
def test_falls_back(call, why):
    assert_same(call, nflows, 0, **{why.replace(" ", "_"): 1})


def test_a_conditioner_without_a_width():
    """nflows warns and leaves the logits as they are."""
    layer = coupling.PiecewiseRationalQuadraticCouplingTransform([1, 0], nn.Linear, tails="linear")
    layer.transform_net.forward = lambda x, context: nn.functional.linear(
        x, layer.transform_net.weight, layer.transform_net.bias
    )
    x = torch.randn(50, 2)
    with pytest.warns(UserWarning, match="not scaled down"):
        want = layer(x)
    with nflows.enable(), pytest.warns(UserWarning, match="not scaled down"):
        torch.testing.assert_close(layer(x), want)
    assert nflows.report() == (1, {})


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype):
    torch.manual_seed(0)
    x, *params = (torch.randn(*shape).to(dtype) for shape in ((200,), (200, 8), (200, 8), (200, 7)))
    want = splines.unconstrained_rational_quadratic_spline(x.double(), *(p.double() for p in params), tail_bound=2.0)
    with nflows.enable():
        got = splines.unconstrained_rational_quadratic_spline(x, *params, tail_bound=2.0)
    assert nflows.report() == (1, {})
    for a, b in zip(got, want, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a, b.to(dtype))


def test_autocast():
    layer, x = spline_coupling(), torch.randn(20, 4)
    want = layer(x)
    with nflows.enable(), torch.autocast("cpu", torch.bfloat16):
        y, logabsdet = layer(x)
    assert nflows.report() == (1, {})
    assert y.dtype == logabsdet.dtype == torch.float32
    torch.testing.assert_close(y, want[0], rtol=0.02, atol=0.02)


# ---- beginning and end ----


def test_takeovers():
    layer, x = spline_coupling(), torch.randn(5, 4)
    assert_takeovers(nflows, lambda: layer(x))


def test_names_that_are_imported_meanwhile():
    late = types.ModuleType("late")
    with nflows.enable():
        assert rational_quadratic.rational_quadratic_spline is splines.rational_quadratic_spline
        sys.modules["late"] = late
        late.spline = splines.rational_quadratic_spline
    try:
        assert late.spline is splines.rational_quadratic_spline
    finally:
        del sys.modules["late"]


def test_blocks_nest_and_end():
    first = nflows.enable()
    with nflows.enable(precision="exact"):
        assert nflows._peer.settings.precision == "exact"
    assert nflows._peer.settings.precision == "fast"
    first.__exit__(None, None, None)
    with first, first:
        spline_coupling()(torch.randn(5, 4))
    assert nflows._peer.settings is None
    assert nflows.report().taken == 1
    with pytest.raises(KeyError), nflows.enable():
        raise KeyError
    assert nflows._peer.settings is None


def test_threads():
    layer, x, wrong = spline_coupling(), torch.randn(50, 4), []
    want = layer(x)[0].detach()

    def work():
        for _ in range(20):
            with nflows.enable():
                if not torch.allclose(layer(x)[0], want, rtol=1e-4, atol=1e-4):
                    wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong
    assert nflows._peer.settings is None
    assert nflows.report() == (80, {})


def test_functions_of_others_stay():
    original = splines.rational_quadratic_spline
    nflows.enable()
    ours = splines.rational_quadratic_spline
    try:
        splines.rational_quadratic_spline = theirs = lambda *args, **kwargs: ours(*args, **kwargs)
        nflows.disable()
        assert splines.rational_quadratic_spline is theirs
        spline_args = [torch.rand(5), *(torch.rand(5, k) for k in (4, 4, 5))]
        theirs(*spline_args)
        assert nflows.report().taken == 0
        with nflows.enable():
            assert splines.rational_quadratic_spline is theirs
            theirs(*spline_args)
        assert nflows.report().taken == 1
    finally:
        splines.rational_quadratic_spline = original


def test_other_versions(monkeypatch):
    assert_versions_are_checked(nflows, monkeypatch, "nflows", ["0.14", "0.14.1"], ["0.13", "0.15", "1.0.dev0", "?"])
    with pytest.raises(ValueError, match=r"nflows\.enable: precision must be one of 'fast', 'exact', got 'double'"):
        nflows.enable(precision="double")


# ---- compilers and transforms ----


@pytest.mark.parametrize("name", ["coupling", "affine", "affine autoregressive"])
def test_compiles_whole(name):
    model = FLOWS[name][0]()._transform
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_compiles_whole(model, nflows, torch.randn(6, 4), rtol=1e-4, atol=1e-4)


def test_function_transforms():
    layer, x = spline_coupling(), torch.randn(6, 1, 4)
    want = torch.stack([layer(row)[0] for row in x])
    with nflows.enable():
        got = torch.func.vmap(lambda row: layer(row)[0])(x)
    torch.testing.assert_close(got, want)
