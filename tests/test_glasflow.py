"""pyperf_dl.integrations.glasflow beside glasflow itself."""

import functools
import os
import subprocess
import sys

import pytest
import torch
from peer_flows import (
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
    training_curves,
)

pytest.importorskip("glasflow", reason="glasflow is not installed")
from glasflow import CouplingNSF, RealNVP
from glasflow.flows.autoregressive import MaskedAffineAutoregressiveFlow
from glasflow.nflows.transforms import autoregressive, coupling, splines
from glasflow.nflows.transforms.base import InputOutsideDomain

from pyperf_dl.integrations import glasflow, nflows

_as_it_was = restored(glasflow)


def autoregressive_flow():
    flow = CouplingNSF(4, 1)
    layer = autoregressive.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(
        4, 16, tails="linear", tail_bound=2.0
    )
    flow._transform._transforms[0] = layer
    return flow


FLOWS = {
    "NSF": lambda: CouplingNSF(4, 2, n_neurons=16, num_bins=8, tail_bound=3.0),
    "NSF with a linear transform": lambda: CouplingNSF(4, 2, linear_transform="lu", batch_norm_between_transforms=True),
    "NSF on a uniform base": lambda: CouplingNSF(4, 2, n_neurons=16, distribution="uniform"),
    "NICE": lambda: RealNVP(4, 2, n_neurons=16, volume_preserving=True),
    "RealNVP log2": lambda: RealNVP(4, 2, n_neurons=16, scale_activation="log2"),
    "RealNVP log1.5": lambda: RealNVP(4, 2, n_neurons=16, scale_activation="log1.5"),
    "RealNVP": lambda: RealNVP(4, 2, n_neurons=16),
    "RealNVP nflows": lambda: RealNVP(4, 2, n_neurons=16, scale_activation="nflows"),
    "autoregressive": autoregressive_flow,
    "affine autoregressive": lambda: MaskedAffineAutoregressiveFlow(4, 1, n_neurons=16),
    "affine autoregressive, wide": lambda: MaskedAffineAutoregressiveFlow(4, 1, scale_activation="wide"),
    "affine autoregressive, log2": lambda: MaskedAffineAutoregressiveFlow(4, 1, scale_activation="log2"),
}


def make(name):
    torch.manual_seed(0)
    flow = spread(FLOWS[name](), 0.2)
    return flow.eval(), 1 if "autoregressive" in name else 2


@pytest.mark.parametrize("name", FLOWS)
def test_density_and_gradients(name):
    flow, calls = make(name)
    x = torch.rand(2000, 4) if "uniform" in name else torch.randn(2000, 4)

    def log_prob(f, x):
        z, logdet = f._transform(x)
        return logdet - z.square().sum(1)

    assert_flow_as_accurate(draws_of(density_and_gradients(log_prob), flow, glasflow, x))
    assert glasflow.report() == (calls, {})


@pytest.mark.parametrize("name", FLOWS)
def test_samples(name):
    flow, calls = make(name)
    torch.manual_seed(1)
    noise = flow._distribution.sample(1000)

    def run(flow, noise):
        x, logdet = flow._transform.inverse(noise)
        return {"x": x.detach(), "logdet": logdet.detach()}

    draws = draws_of(run, flow, glasflow, noise)
    assert_flow_as_accurate(draws)
    _, theirs, ours = draws[0]
    assert glasflow.report() == (calls * (4 if "autoregressive" in name else 1), {})
    for on in (False, True):
        torch.manual_seed(1)
        with glasflow.enable() if on else torch.no_grad():
            assert torch.equal(flow.sample(1000), (ours if on else theirs)["x"])


def test_training():
    torch.manual_seed(0)
    moons = [torch.stack([x := torch.randn(128), x**2 / 2 + 0.3 * torch.randn(128)], 1) for _ in range(20)]
    flow = CouplingNSF(2, 2, n_neurons=16, num_bins=8, tail_bound=4.0)
    assert_overlays(*training_curves(flow, moons, lambda f, x: -f.log_prob(x).mean(), glasflow))
    assert glasflow.report() == (40, {})


def test_outside_the_domain():
    flow, x = make("NSF on a uniform base")[0], torch.tensor([[-0.5, 0.2, 1.5, 0.3]])
    with pytest.raises(InputOutsideDomain):
        flow.log_prob(x)
    with glasflow.enable():
        z, logdet = flow._transform(x)
        back, inverse = flow._transform.inverse(z)
    torch.testing.assert_close(back, x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(inverse, -logdet, rtol=1e-4, atol=1e-4)


def test_the_inverse_never_fails():
    torch.manual_seed(0)
    params = [(30 * torch.randn(50_000, k)).requires_grad_() for k in (8, 8, 7)]
    y = (6 * torch.rand(50_000) - 3).requires_grad_()

    def call():
        return splines.unconstrained_rational_quadratic_spline(y, *params, inverse=True, tail_bound=3.0)

    assert not torch.stack(call()).isfinite().all()
    with glasflow.enable():
        x, logabsdet = call()
    for t in (x, logabsdet, *torch.autograd.grad((x + logabsdet).sum(), [y, *params])):
        assert t.isfinite().all()


def test_nothing_is_read_from_the_device():
    x = torch.empty(5, 4, device="meta")
    with glasflow.enable():
        for name in ("NSF", "NICE", "RealNVP", "RealNVP log2", "autoregressive", "affine autoregressive"):
            assert make(name)[0].to("meta")._transform(x)[1].shape == (5,)
    assert glasflow.report() == (10, {})


@pytest.mark.parametrize("name", ["NSF", "RealNVP", "RealNVP log2", "affine autoregressive"])
def test_compiles_whole(name):
    assert_compiles_whole(make(name)[0]._transform, glasflow, torch.randn(6, 4), rtol=1e-4, atol=1e-4)


class Own(coupling.AffineCouplingTransform):
    def _scale_and_shift(self, transform_params):
        scale, shift = super()._scale_and_shift(transform_params)
        return scale + 1, shift


def layer(kind, activation):
    torch.manual_seed(0)
    return kind([1, 0], lambda i, o: torch.nn.Linear(i, o).requires_grad_(False), scale_activation=activation)


def couple(kind, activation, dtype=torch.float32, parameters=2):
    params = torch.ones(3, parameters, dtype=dtype)
    return layer(kind, activation)._coupling_transform_forward(torch.ones(3, 1), params)


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (lambda: couple(coupling.AffineCouplingTransform, torch.exp), "scale activation"),
        (lambda: couple(coupling.AffineCouplingTransform, lambda u: torch.sigmoid(u + 2) + 1e-3), "scale activation"),
        (lambda: couple(coupling.AffineCouplingTransform, functools.partial(torch.pow, 2)), "scale activation"),
        (lambda: couple(Own, torch.exp), "subclass"),
        (lambda: couple(coupling.AffineCouplingTransform, log(2), torch.float64), "dtype"),
        (lambda: couple(coupling.AffineCouplingTransform, log(2), parameters=3), "shape"),
        (lambda: couple(coupling.AffineCouplingTransform, log(-1)), "arguments"),
    ],
)
def test_falls_back(call, why):
    assert_same(call, glasflow, 0, **{why.replace(" ", "_"): 1})


def test_every_named_scale():
    from glasflow.transforms.utils import SCALE_ACTIVATIONS, get_scale_activation

    kind = coupling.AffineCouplingTransform
    activations = {name: get_scale_activation(name) for name in (*SCALE_ACTIVATIONS, "log4", "log0.5")}
    activations |= {"default": kind.DEFAULT_SCALE_ACTIVATION, "general": kind.GENERAL_SCALE_ACTIVATION}
    x, params = torch.randn(500, 1), 4 * torch.randn(500, 2)
    for n, (name, activation) in enumerate(activations.items(), 1):
        want = layer(kind, activation)._coupling_transform_forward(x, params)
        with glasflow.enable():
            got = layer(kind, activation)._coupling_transform_forward(x, params)
        torch.testing.assert_close(got, want, msg=name)
        assert glasflow.report() == (n, {})


def test_a_name_with_another_function(monkeypatch):
    from glasflow.transforms import utils

    monkeypatch.setitem(utils.SCALE_ACTIVATIONS, "wide", lambda u: torch.exp(u))
    call = lambda: couple(coupling.AffineCouplingTransform, utils.get_scale_activation("wide"))  # noqa: E731
    assert_same(call, glasflow, 0, scale_activation=1)


def log(n):
    from glasflow.transforms.utils import get_scale_activation

    return get_scale_activation(f"log{n}")


# ---- beginning and end ----


def test_takeovers():
    flow, calls = make("NSF")
    assert_takeovers(glasflow, lambda: flow.log_prob(torch.ones(3, 4)), calls)


def test_nflows_is_another_peer():
    pytest.importorskip("nflows", reason="nflows is not installed")
    flow, calls = make("NSF")
    with nflows.enable():
        flow.log_prob(torch.ones(3, 4))
        with glasflow.enable():
            flow.log_prob(torch.ones(3, 4))
    assert glasflow.report() == (calls, {})


def test_glasflow_on_an_installed_nflows():
    pytest.importorskip("nflows", reason="nflows is not installed")
    code = "from pyperf_dl.integrations import glasflow; glasflow.enable()"
    environment = {**os.environ, "GLASFLOW_USE_NFLOWS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "ValueError: glasflow.enable: glasflow must run on its own fork of nflows, got GLASFLOW_USE" in done.stderr


def test_other_versions(monkeypatch):
    assert_versions_are_checked(glasflow, monkeypatch, "glasflow", ["0.4.0", "0.4.1"], ["0.3.1", "0.5.0", "1.0"])
