"""pyperf_dl.integrations.normflows beside normflows itself."""

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

pytest.importorskip("normflows", reason="normflows is not installed")
import normflows as nf
from normflows.flows import affine
from normflows.utils import splines

from pyperf_dl.integrations import normflows

_as_it_was = restored(normflows)


def unconstrained(x, *params, **how):
    return splines.unconstrained_rational_quadratic_spline(x, *params, **how)


# ---- splines ----

LIST = ["linear", "circular", "circular", "linear"]
RULES = {  # tails, tail bound, derivatives beyond the number of bins
    "linear": ("linear", 2.0, -1),
    "circular": ("circular", 2.0, 0),
    "by feature": (LIST, 2.0, 1),
    "bounds by feature": ("linear", torch.tensor([1.0, 2.0, 3.0, 0.5]), -1),
    "both by feature": (LIST, torch.tensor([1.0, 2.0, 3.0, 0.5]), 1),
    "circular bounds": ("circular", torch.tensor([[1.0], [2.0]]).expand(2, 1000).reshape(2000, 1), 0),
    "K derivatives": ("linear", 2.0, 0),
    "K + 1 derivatives": ("linear", 2.0, 1),
    "K + 1 derivatives, bounds by feature": ("linear", torch.tensor([1.0, 2.0, 3.0, 0.5]), 1),
}


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_splines(rule, inverse):
    tails, bound, beyond = RULES[rule]
    torch.manual_seed(0)
    x, params = torch.randn(2_000, 4), [torch.randn(2_000, 4, k) for k in (8, 8, 8 + beyond)]

    def function(x, *params):
        b = bound.to(x.dtype) if isinstance(bound, torch.Tensor) else bound
        return unconstrained(x, *params, inverse=inverse, tails=tails, tail_bound=b)

    assert_as_accurate(*three_runs(values_and_gradients(function), nn.Module(), normflows, x, *params))
    assert normflows.report() == (1, {})


@pytest.mark.parametrize("inverse", [False, True])
def test_splines_without_tails(inverse):
    torch.manual_seed(0)
    x, params = torch.rand(8_000), [torch.randn(8_000, k) for k in (8, 8, 9)]

    def function(x, *params):
        return splines.rational_quadratic_spline(x, *params, inverse=inverse)

    assert_as_accurate(*three_runs(values_and_gradients(function), nn.Module(), normflows, x, *params))
    assert normflows.report() == (1, {})


def test_what_is_outside():
    params = [torch.ones(3, 2, k) for k in (4, 4, 5)]
    x = torch.tensor([[-9.0, 0.5], [0.5, 9.0], [torch.inf, -torch.inf]])
    for how in ({"tails": ["linear", "circular"]}, {"tails": ["circular"] * 2, "tail_bound": torch.tensor([2.0, 3.0])}):
        want = unconstrained(x, *params, **how)
        with normflows.enable():
            torch.testing.assert_close(unconstrained(x, *params, **how), want)


# ---- flows ----


def glow(scale=True, scale_map="sigmoid", split_mode="channel"):
    blocks = [nf.flows.GlowBlock(4, 8, scale=scale, scale_map=scale_map, split_mode=split_mode) for _ in range(2)]
    model = nf.NormalizingFlow(nf.distributions.DiagGaussian((4, 4, 4), trainable=False), blocks)
    model.log_prob(torch.randn(8, 4, 4, 4))  # ActNorm takes its statistics
    return spread(model, 0.05)


def vectors(*layers):
    return spread(nf.NormalizingFlow(nf.distributions.DiagGaussian(4, trainable=False), list(layers)))


def affine_block():
    mlp = nf.nets.MLP([2, 16, 4], init_zeros=True)
    return nf.flows.AffineCouplingBlock(mlp)


FLOWS = {  # and the calls in one direction
    "coupling": (
        lambda: vectors(*(nf.flows.CoupledRationalQuadraticSpline(4, 1, 16, reverse_mask=b) for b in (True, False))),
        4,
    ),
    "autoregressive": (lambda: vectors(nf.flows.AutoregressiveRationalQuadraticSpline(4, 1, 16)), 1),
    "circular coupling": (lambda: vectors(nf.flows.CircularCoupledRationalQuadraticSpline(4, 1, 16, [0, 1])), 2),
    "circular coupling, bounds by feature": (
        lambda: vectors(
            *(
                nf.flows.CircularCoupledRationalQuadraticSpline(
                    4, 1, 16, [0, 1], tail_bound=torch.tensor([3.0, 2.0, 4.0, 2.5]), reverse_mask=b
                )
                for b in (True, False)
            )
        ),
        4,
    ),
    "circular autoregressive": (
        lambda: vectors(nf.flows.CircularAutoregressiveRationalQuadraticSpline(4, 1, 16, [1, 2])),
        1,
    ),
    "affine MAF": (lambda: vectors(nf.flows.MaskedAffineAutoregressive(4, 16)), 4),
    "affine": (lambda: vectors(affine_block(), nf.flows.Permute(4), affine_block()), 2),
    "glow": (glow, 2),
    "glow exp": (lambda: glow(scale_map="exp"), 2),
    "glow sigmoid_inv": (lambda: glow(scale_map="sigmoid_inv", split_mode="checkerboard"), 2),
    "glow additive": (lambda: glow(scale=False), 2),
}


def shape_of(name):
    return (64, 4, 4, 4) if "glow" in name else (2000, 4)


@pytest.mark.parametrize("name", FLOWS)
def test_density_and_gradients(name):
    make, calls = FLOWS[name]
    torch.manual_seed(0)
    run = density_and_gradients(lambda model, x: model.log_prob(x))
    assert_flow_as_accurate(draws_of(run, make(), normflows, torch.randn(shape_of(name))))
    assert normflows.report() == (calls, {})


@pytest.mark.parametrize("name", FLOWS)
def test_samples(name):
    make, calls = FLOWS[name]
    torch.manual_seed(0)
    model = make()

    def run(model, z):
        total = 0
        for layer in model.flows:
            z, logdet = layer(z)
            total = total + logdet
        return {"x": z.detach(), "logdet": total.detach()}

    torch.manual_seed(1)
    z, _ = model.q0(shape_of(name)[0])
    draws = draws_of(run, model, normflows, z)
    assert_flow_as_accurate(draws)
    _, theirs, ours = draws[0]
    if name == "affine MAF":  # whose density takes the passes
        calls //= 4
    passes = 4 if name.endswith("autoregressive") else 1
    assert normflows.report(reset=True) == (calls * passes, {})
    for on in (False, True):
        with normflows.enable() if on else torch.no_grad():
            torch.manual_seed(1)
            x, _ = model.sample(len(z))
            assert torch.equal(x, (ours if on else theirs)["x"])


def test_training():
    torch.manual_seed(0)
    moons = [torch.stack([x := torch.randn(128), x**2 / 2 + 0.3 * torch.randn(128)], 1) for _ in range(20)]
    layers = [nf.flows.CoupledRationalQuadraticSpline(2, 1, 16, tail_bound=4.0, reverse_mask=b) for b in (True, False)]
    model = nf.NormalizingFlow(nf.distributions.DiagGaussian(2, trainable=False), layers)
    assert_overlays(*training_curves(model, moons, lambda f, x: -f.log_prob(x).mean(), normflows))
    assert normflows.report() == (80, {})


# ---- where normflows fails ----


def test_the_inverse_never_fails():
    torch.manual_seed(0)
    params = [(30 * torch.randn(50_000, k)).requires_grad_() for k in (8, 8, 7)]
    y = (6 * torch.rand(50_000) - 3).requires_grad_()
    assert not torch.stack(unconstrained(y, *params, inverse=True, tail_bound=3.0)).isfinite().all()
    with normflows.enable():
        x, logabsdet = unconstrained(y, *params, inverse=True, tail_bound=3.0)
    for t in (x, logabsdet, *torch.autograd.grad((x + logabsdet).sum(), [y, *params])):
        assert t.isfinite().all()


def test_outside_the_domain():
    params = [torch.ones(3, k) for k in (4, 4, 5)]
    x = torch.tensor([-0.5, 0.5, 1.5])
    with pytest.raises((RuntimeError, IndexError)):
        splines.rational_quadratic_spline(x, *params)
    with normflows.enable():
        y, logabsdet = splines.rational_quadratic_spline(x, *params)
        back, inverse = splines.rational_quadratic_spline(y, *params, inverse=True)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(inverse, -logabsdet)


def test_tails_by_feature_are_one_call():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Calls(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen += func.namespace == "pyperf_dl"
            return func(*args, **kwargs or {})

    params = [torch.randn(5, 4, k) for k in (8, 8, 9)]
    with normflows.enable(), Calls() as calls:
        unconstrained(torch.randn(5, 4), *params, tails=LIST, tail_bound=torch.tensor([1.0, 2.0, 3.0, 0.5]))
    assert calls.seen == 1


def test_nothing_is_read_from_the_device():
    params = [torch.empty(5, 4, k, device="meta") for k in (8, 8, 9)]
    x, bound = torch.empty(5, 4, device="meta"), torch.empty(4, device="meta")
    with normflows.enable():
        y, logabsdet = unconstrained(x, *params, tails=LIST, tail_bound=bound)
        assert y.shape == logabsdet.shape == (5, 4)
        layer = affine_block().to("meta")
        assert layer.flows[1]([x[:, :2], x[:, 2:]])[1].shape == (5,)
    assert normflows.report() == (2, {})


# ---- what goes to normflows ----


def some(derivatives=7, bins=8, dtype=torch.float32, shape=(3, 4), **how):
    torch.manual_seed(0)
    params = [torch.randn(*shape, k).to(dtype) for k in (bins, bins, derivatives)]
    return unconstrained(torch.randn(3, 4), *params, **how)


class Counting(nn.Module):
    """Two parameters for each of two features; counts how often it is asked."""

    def __init__(self, outputs=4, dtype=torch.float32):
        super().__init__()
        self.calls, self.outputs, self.dtype = 0, outputs, dtype

    def forward(self, z):
        self.calls += 1
        return torch.ones(len(z), self.outputs, dtype=self.dtype) * (1 + z.sum().to(self.dtype))


def couple(param_map, z2=None, **how):
    layer = affine.coupling.AffineCoupling(param_map, **how)
    return layer([torch.ones(3, 2), torch.ones(3, 2) if z2 is None else z2])


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (lambda: some(tails="cubic"), "arguments"),
        (lambda: some(tail_bound=-2.0), "arguments"),
        (lambda: some(tail_bound="2"), "arguments"),
        (lambda: some(tail_bound=torch.tensor([1, 1, 1, 2])), "dtype"),
        (lambda: some(tail_bound=torch.ones(5)), "shape"),
        (lambda: some(tail_bound=torch.ones(4, requires_grad=True)), "bounds with a gradient"),
        (lambda: some(derivatives=8, min_derivative=1.0), "smallest sizes"),
        (lambda: some(tails=["linear"] * 4), "number of derivatives"),
        (lambda: some(tails=["linear"] * 3, derivatives=9), "shape"),
        (lambda: some(tails=["linear", "cubic"] * 2, derivatives=9), "arguments"),
        (lambda: some(tails="circular"), "number of derivatives"),
        (lambda: some(min_bin_width=0.2), "smallest sizes"),
        (lambda: some(shape=(2, 4)), "shape"),
        (lambda: some(dtype=torch.float64), "dtype"),
        (lambda: some(bins=257, derivatives=256), "number of bins"),
        (lambda: couple(Counting(dtype=torch.float64)), "dtype"),
        (lambda: couple(Counting(5)), "shape"),
        (lambda: couple(Counting(), scale_map="tanh"), "arguments"),
        (lambda: couple(Counting(2), torch.ones(1, 2), scale=False)[0], "shape"),
        (
            lambda: nf.flows.MaskedAffineFlow(torch.tensor([0.0, 1.0]), nn.Identity(), nn.Identity())(torch.ones(3, 2)),
            "mask",
        ),
    ],
)
def test_falls_back(call, why):
    assert_same(call, normflows, 0, **{why.replace(" ", "_"): 1})


def test_the_conditioner_runs_once():
    for outputs, dtype in ((4, torch.float32), (4, torch.float64)):
        net = Counting(outputs, dtype)
        with normflows.enable():
            couple(net)
        assert net.calls == 1
    assert normflows.report() == (1, {"dtype": 1})


# ---- beginning and end ----


def test_takeovers():
    assert_takeovers(normflows, lambda: some(tail_bound=2.0))


def test_other_versions(monkeypatch):
    assert_versions_are_checked(normflows, monkeypatch, "normflows", ["1.7.2", "1.7.3"], ["1.7.1", "1.7.4", "1.8.0"])


def test_compiles_whole():
    torch.manual_seed(0)
    layer = FLOWS["coupling"][0]().flows[0]
    assert_compiles_whole(layer.inverse, normflows, torch.randn(6, 4), rtol=1e-4, atol=1e-4)
