"""Our drop-ins beside a peer's own code: both in float32, and the peer in float64 as the truth."""

import copy
import importlib
import importlib.metadata
import inspect
import math
import re
import statistics
import sys

import pytest
import torch

EPS = torch.finfo(torch.float32).eps


def spread(module, by=0.3):
    """Random weights everywhere: many layers begin as the identity, where every spline is a line."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(by * torch.randn(p.shape))
    return module


def three_runs(run, model, integration, *tensors, **how):
    """What run(model, *tensors) gives with the peer in float64, the peer in float32, and ours in float32."""
    truth = run(copy.deepcopy(model).double(), *(t.double() for t in tensors))
    theirs = run(copy.deepcopy(model), *tensors)
    with integration.enable(**how):
        mine = run(copy.deepcopy(model), *tensors)
    return truth, theirs, mine


def draws_of(run, model, integration, *tensors, **how):
    """three_runs() on five first tensors that differ by 1e-5 or less: what one rounding makes of a steep bin is luck,
    the median of five draws is not. The integration's report is that of one of them."""
    draws = []
    for k in range(5):
        integration.report(reset=True)
        first = tensors[0] * (1 - k * 2.0**-18)
        draws.append(three_runs(run, model, integration, first, *tensors[1:], **how))
    return draws


def _listed(value):
    return value if isinstance(value, list) else [value]


def _beside_the_peer(truth, theirs, ours, names):
    """{(name, quantile): our error in units of what the peer's allows}. What is equally good differs by chance, the
    more the fewer elements count: by 10 % (30 % at 99 %), and by one rounding of the result. The maximum is the luck of
    one element in a steep bin: within a factor 10. In a list of tensors, errors are relative to the largest element of
    each, so that all tensors count alike.
    """
    assert truth.keys() == theirs.keys() == ours.keys()
    found = {}
    for name in names or truth:
        want, peers, error = [], [], []
        for t, b, a in zip(*(_listed(run[name]) for run in (truth, theirs, ours)), strict=True):
            assert a.dtype == b.dtype, name
            assert a.shape == b.shape, name
            unit = t.abs().amax().clamp(min=1e-30) if isinstance(truth[name], list) else 1.0
            want.append((t / unit).flatten())
            peers.append(((b.double() - t) / unit).abs().flatten())
            error.append(((a.double() - t) / unit).abs().flatten())
        want, peers, error = map(torch.cat, (want, peers, error))
        rounding = EPS / 2 * want.abs().median().clamp(min=1e-30)
        for level, factor in ((0.5, 1.1), (0.9, 1.1), (0.99, 1.3), (0.999, 2.0), (1.0, 10.0)):
            more, allowed = float(error.quantile(level) - rounding), factor * float(peers.quantile(level))
            assert math.isfinite(more + allowed), name
            found[name, level] = max(more, 0.0) / max(allowed, 1e-300)
    return found


def assert_as_accurate(truth, theirs, ours, names=None, through=1.0):
    """Errors at most the peer's at the 50, 90 and 99 % quantiles, at most twice the peer's at 99.9 %, for every named
    tensor."""
    ratios = _beside_the_peer(truth, theirs, ours, names)
    assert max(ratios.values()) <= through, ratios


def assert_flow_as_accurate(draws, names=None):
    """The same for what went through networks and layers after layers: they make of one rounding an error of many
    elements, of a size that is luck. So the median of several draws counts, and what is equally good differs by up to a
    factor 3."""
    ratios = [_beside_the_peer(*draw, names) for draw in draws]
    middle = {key: statistics.median(r[key] for r in ratios) for key in ratios[0]}
    assert max(middle.values()) <= 3.0, middle


def density_and_gradients(log_prob):
    """A run for draws_of: log-densities, and the gradient of their mean by x and by every parameter."""

    def run(model, x, *rest):
        x = x.clone().requires_grad_()
        density = log_prob(model, x, *rest)
        wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
        found = torch.autograd.grad(density.mean(), wanted, allow_unused=True)
        x_grad, *others = (g for g in found if g is not None)
        return {"log_prob": density.detach(), "gradient of x": [x_grad], "gradients of parameters": others}

    return run


def values_and_gradients(function):
    """A run for three_runs, of one function of tensors with elementwise values and log-dets: both, and the gradient of
    a weighted sum by every tensor. The model is an empty module."""

    def run(model, *tensors):
        tensors = [t.clone().requires_grad_() for t in tensors]
        y, logdet = function(*tensors)
        weights = torch.linspace(0.5, 1.5, y.numel(), dtype=torch.float64).reshape(y.shape)
        loss = (weights.to(y.dtype) * y).sum() + (weights.flip(0).to(y.dtype) * logdet).sum()
        found = torch.autograd.grad(loss, tensors)
        names = [f"gradient {i}" for i in range(len(tensors))]
        return {"y": y.detach(), "logdet": logdet.detach()} | dict(zip(names, found, strict=True))

    return run


def training_curves(model, batches, loss, integration):
    """Losses of Adam on the batches: the peer in float64, the peer in float32, ours in float32."""

    def train(model, *batches):
        optimizer = torch.optim.Adam(model.parameters(), 5e-3)
        curve = []
        for batch in batches:
            optimizer.zero_grad()
            value = loss(model, batch)
            value.backward()
            optimizer.step()
            curve.append(value.item())
        return torch.tensor(curve, dtype=torch.float64)

    return three_runs(train, model, integration, *batches)


def assert_overlays(truth, theirs, ours):
    """Two float32 trainings part by rounding; ours stays as near to float64 as the peer's."""
    assert truth[-1] < truth[0] - 0.05
    apart = (theirs - truth).abs().max().clamp(min=1e-4)
    assert (ours - truth).abs().max() <= 2 * apart, ((ours - truth).abs().max(), apart)


def assert_versions_are_checked(integration, monkeypatch, distribution, known, unknown):
    version = importlib.metadata.version

    def pretend(number):
        monkeypatch.setattr(importlib.metadata, "version", lambda n: number if n == distribution else version(n))

    for number in unknown:
        pretend(number)
        says = rf"enable: the version of {distribution} must be .*, got {re.escape(number)}$"
        with pytest.raises(ValueError, match=says):
            integration.enable()
    for number in known:
        pretend(number)
        integration.enable().__exit__(None, None, None)
    monkeypatch.setattr(importlib.metadata, "version", version)


def swapped(integration):
    """What is found now under the names that a takeover swaps: functions by every module of the peer that has them."""
    found = {}
    for module, name, *_ in integration._peer._stand_ins:
        home = importlib.import_module(module)
        *classes, name = name.split(".")
        if classes:
            found[classes[0], name] = vars(getattr(home, classes[0]))[name]
        else:
            package = module.split(".")[0] + "."
            found |= {(m, name): vars(sys.modules[m])[name] for m in list(sys.modules) if _has(m, package, name)}
    return found


def _has(module, package, name):
    return module.startswith(package) and name in getattr(sys.modules[module], "__dict__", {})


def restored(integration):
    """A fixture: around every test the peer is as it was."""
    theirs = swapped(integration)

    @pytest.fixture(autouse=True)
    def as_it_was():
        integration.disable()
        integration.report(reset=True)
        yield
        integration.disable()
        assert swapped(integration) == theirs

    return as_it_was


def assert_takeovers(integration, call, calls=1):
    """Stand-ins take what the peer's functions take, by the same names, with the same defaults; every name is swapped
    and comes back; takeovers nest and end in any order; what they meet is counted."""
    theirs = swapped(integration)
    integration.enable()
    ours = swapped(integration)
    assert theirs
    assert ours.keys() == theirs.keys()
    for place, function in theirs.items():
        assert ours[place] is not function
        assert inspect.signature(ours[place]) == inspect.signature(function)
    for place in integration._peer._places:
        stand_in = inspect.getclosurevars(place.ours).nonlocals["stand_in"]
        mine, others = (list(inspect.signature(f).parameters.values()) for f in (stand_in, place.original))
        assert [(p.name, p.default) for p in mine[1:]] == [(p.name, p.default) for p in others], place.name
    integration.enable()
    integration.disable()
    assert swapped(integration) == theirs
    first, second = integration.enable(), integration.enable()
    first.__exit__(None, None, None)
    call()
    second.__exit__(None, None, None)
    call()
    assert swapped(integration) == theirs
    with integration.enable(), integration.enable():
        call()
    assert swapped(integration) == theirs
    assert integration.report(reset=True) == (2 * calls, {})


def assert_same(call, integration, taken, **fell_back):
    """The call gives the same, errors included, with and without ours; and how it was counted."""

    def outcome():
        try:
            return call()
        except Exception as error:
            return type(error), str(error)

    want = outcome()
    integration.report(reset=True)
    with integration.enable():
        got = outcome()
    if isinstance(want, tuple) and isinstance(want[0], type):
        assert got == want
    else:
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    assert integration.report(reset=True) == (taken, {k.replace("_", " "): n for k, n in fell_back.items()})


def assert_compiles_whole(function, integration, *args, **near):
    """One graph during a takeover, which gives what the peer gives."""
    torch._dynamo.reset()
    want, graphs = function(*args), []
    with integration.enable():
        got = torch.compile(function, fullgraph=True, backend=lambda m, _: graphs.append(m) or m)(*args)
    assert len(graphs) == 1
    torch.testing.assert_close(got, want, **near)
    torch._dynamo.reset()
