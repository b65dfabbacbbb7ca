"""pyperf_dl.integrations.freia beside FrEIA itself."""

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
)
from torch import nn

pytest.importorskip("FrEIA", reason="FrEIA is not installed")
from FrEIA import modules
from FrEIA.framework import SequenceINN
from FrEIA.modules import AllInOneBlock, GINCouplingBlock, GLOWCouplingBlock, RNVPCouplingBlock

from pyperf_dl.integrations import freia

_as_it_was = restored(freia)


def dense(inputs, outputs):
    return nn.Sequential(nn.Linear(inputs, 16), nn.ReLU(), nn.Linear(16, outputs))


def convolutions(inputs, outputs):
    return nn.Sequential(nn.Conv2d(inputs, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, outputs, 3, padding=1))


VECTOR, IMAGE = (5,), (4, 6, 6)
BLOCKS = {  # what a block is made of, the shape of the data, calls
    "RNVP": (RNVPCouplingBlock, {}, VECTOR, 2),
    "RNVP tanh": (RNVPCouplingBlock, {"clamp_activation": "TANH", "clamp": 1.5}, VECTOR, 2),
    "GLOW": (GLOWCouplingBlock, {}, VECTOR, 2),
    "GLOW sigmoid": (GLOWCouplingBlock, {"clamp_activation": "SIGMOID"}, VECTOR, 2),
    "GLOW function": (GLOWCouplingBlock, {"clamp_activation": torch.sin}, VECTOR, 2),
    "GLOW clamp": (GLOWCouplingBlock, {"clamp": -1.0}, VECTOR, 2),
    "GLOW image": (GLOWCouplingBlock, {"split_len": 0.25}, IMAGE, 2),
    "GIN": (GINCouplingBlock, {}, VECTOR, 2),
    "GIN image": (GINCouplingBlock, {"clamp_activation": "TANH"}, IMAGE, 2),
    "one-sided": (modules.AffineCouplingOneSided, {}, VECTOR, 1),
    "all in one": (AllInOneBlock, {}, VECTOR, 1),
    "all in one image": (AllInOneBlock, {"affine_clamping": 3.0, "reverse_permutation": True}, IMAGE, 1),
    "all in one GIN": (AllInOneBlock, {"gin_block": True}, VECTOR, 1),
    "all in one GIN image": (AllInOneBlock, {"gin_block": True}, IMAGE, 1),
}


def flow(name, blocks=2, conditions=0):
    kind, how, shape, _ = BLOCKS[name]
    torch.manual_seed(0)
    model = SequenceINN(*shape)
    for _ in range(blocks):
        more = {"cond": 0, "cond_shape": (conditions, *shape[1:])} if conditions else {}
        model.append(kind, subnet_constructor=dense if shape == VECTOR else convolutions, **how, **more)
    return model


def density(rev):
    def log_prob(model, x, *conditions):
        z, logdet = model(x, list(conditions), rev=rev)
        return logdet - 0.5 * z.flatten(1).square().sum(1)

    return density_and_gradients(log_prob)


@pytest.mark.parametrize("rev", [False, True])
@pytest.mark.parametrize("name", BLOCKS)
def test_density_and_gradients(name, rev):
    *_, shape, calls = BLOCKS[name]
    model = flow(name)
    x = torch.randn(2000 if shape == VECTOR else 64, *shape)
    assert_flow_as_accurate(draws_of(density(rev), model, freia, x))
    assert freia.report() == (2 * calls, {})


@pytest.mark.parametrize("name", BLOCKS)
def test_samples(name):
    *_, shape, calls = BLOCKS[name]
    model = flow(name)

    def run(model, z):
        x, logdet = model(z, rev=True)
        return {"x": x.detach(), "logdet": (logdet + torch.zeros(len(z), dtype=z.dtype)).detach()}

    torch.manual_seed(1)
    z = torch.randn(1000 if shape == VECTOR else 64, *shape)
    names = ["x"] if "GIN" in name else None  # its log-det is 0, but for what rounding leaves
    assert_flow_as_accurate(draws_of(run, model, freia, z), names=names)
    assert freia.report() == (2 * calls, {})


@pytest.mark.parametrize("name", ["RNVP", "GLOW", "GIN", "one-sided", "all in one"])
def test_conditions(name):
    x, condition = torch.randn(500, 5), torch.randn(500, 3)
    for rev in (False, True):
        assert_flow_as_accurate(draws_of(density(rev), flow(name, conditions=3), freia, x, condition))
        assert freia.report() == (2 * BLOCKS[name][-1], {})


class Given(nn.Module):
    """A network whose output is a tensor of the test."""

    def __init__(self, outputs):
        super().__init__()
        self.outputs = outputs

    def forward(self, x):
        return self.output[:, : self.outputs]


@pytest.mark.parametrize("rev", [False, True])
@pytest.mark.parametrize("how", [{}, {"clamp_activation": "TANH"}, {"clamp_activation": "SIGMOID", "clamp": 1.0}])
def test_one_coupling(how, rev):
    layer = modules.AffineCouplingOneSided([(3,)], subnet_constructor=lambda _, outputs: Given(outputs), **how)

    def run(layer, x, params):
        x, layer.subnet.output = x.clone().requires_grad_(), params.clone().requires_grad_()
        (y,), j = layer([x], rev=rev)
        grads = torch.autograd.grad((y[:, 1:] * y[:, 1:].detach()).sum() + j.sum(), [x, layer.subnet.output])
        return {"y": y.detach(), "j": j.detach(), "x": grads[0], "params": grads[1]}

    torch.manual_seed(0)
    through = 1.5 if how else 1.0  # torch's tanh is nearly the nearest number, ours lies within 2 ulp
    assert_as_accurate(*three_runs(run, layer, freia, torch.randn(8_000, 3), torch.randn(8_000, 4)), through=through)
    assert freia.report() == (1, {})


def test_transform_by_a_condition_alone():
    torch.manual_seed(0)
    layer = modules.ConditionalAffineTransform([(5,)], [(3,), (2,)], subnet_constructor=dense)
    x, conditions = torch.randn(500, 5), torch.randn(500, 5)

    def both(layer, x, c):
        (y,), j = layer([x], [c[:, :3], c[:, 3:]])
        (back,), k = layer([x], [c[:, :3], c[:, 3:]], rev=True)
        return y.sum(1) + j + back.sum(1) + 2 * k

    assert_flow_as_accurate(draws_of(density_and_gradients(both), layer, freia, x, conditions))
    assert freia.report() == (2, {})


def test_training():
    torch.manual_seed(0)
    moons = [torch.stack([x := torch.randn(128), x**2 / 2 + 0.3 * torch.randn(128)], 1) for _ in range(20)]
    model = SequenceINN(2)
    for _ in range(4):
        model.append(AllInOneBlock, subnet_constructor=dense)

    def loss(model, x):
        z, logdet = model(x)
        return (0.5 * z.square().sum(1) - logdet).mean()

    assert_overlays(*training_curves(model, moons, loss, freia))
    assert freia.report() == (80, {})


def test_huge_scales_stay_finite():
    """exp(s) overflows where the value itself, 0 * exp(s), does not."""
    block = GLOWCouplingBlock([(2,)], subnet_constructor=lambda i, o: nn.Linear(i, o), clamp=100.0)
    with torch.no_grad():
        for p in block.parameters():
            p.zero_()
        block.subnet2.bias[0] = 1e6
        block.subnet1.bias[0] = -1e6
    assert not block([torch.zeros(3, 2)])[0][0].isfinite().any()
    with freia.enable():
        (y,), logdet = block([torch.zeros(3, 2)])
    assert y.isfinite().all()
    assert logdet.isfinite().all()


def test_nothing_is_read_from_the_device():
    model, x = flow("GLOW").to("meta"), torch.empty(7, 5, device="meta")
    with freia.enable():
        assert model(x)[1].shape == (7,)
    assert freia.report() == (4, {})


# ---- what goes to FrEIA ----


class Counting(nn.Module):
    def __init__(self, outputs, dtype=torch.float32):
        super().__init__()
        self.outputs, self.dtype, self.calls = outputs, dtype, 0

    def forward(self, x):
        self.calls += 1
        return (x.sum(1, keepdim=True) + self.calls).expand(-1, self.outputs).to(self.dtype)


def block_of(kind, outputs, dtype=torch.float32, **how):
    return kind([(4,)], subnet_constructor=lambda i, o: Counting(o if outputs is None else outputs, dtype), **how)


@pytest.mark.parametrize(
    ("call", "why", "times"),
    [
        (lambda: block_of(GLOWCouplingBlock, None, torch.float64)([torch.ones(3, 4)]), "dtype", 2),
        (lambda: block_of(RNVPCouplingBlock, None, torch.float64)([torch.ones(3, 4)], rev=True), "dtype", 2),
        (lambda: block_of(GINCouplingBlock, None, torch.float64)([torch.ones(3, 4)])[0], "dtype", 2),
        (lambda: block_of(GLOWCouplingBlock, 3)([torch.ones(3, 4)]), "shape", 2),
        (lambda: block_of(RNVPCouplingBlock, 1)([torch.ones(3, 4)])[0], "shape", 2),
        (lambda: block_of(modules.AffineCouplingOneSided, 3)([torch.ones(3, 4)]), "shape", 1),
        (lambda: block_of(GLOWCouplingBlock, None)([torch.ones(3, 4, dtype=torch.int64)]), "dtype", 2),
    ],
)
def test_falls_back(call, why, times):
    assert_same(call, freia, 0, **{why: times})


def test_networks_run_once():
    for dtype in (torch.float32, torch.float64):
        blocks = [block_of(k, None, dtype) for k in (GLOWCouplingBlock, RNVPCouplingBlock, GINCouplingBlock)]
        with freia.enable():
            for block in blocks:
                block([torch.ones(3, 4)])
        assert all(net.calls == 1 for block in blocks for net in block.children())
    assert freia.report() == (6, {"dtype": 6})


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype):
    model, x = flow("GLOW").to(dtype), torch.randn(50, 5).to(dtype)
    want = model(x)
    with freia.enable():
        got = model(x)
    assert freia.report() == (4, {})
    near = {"rtol": 0.05, "atol": 0.1} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(got, want, **near)


# ---- beginning and end ----


def test_takeovers():
    assert_takeovers(freia, lambda: flow("GLOW", 1)(torch.ones(3, 5)), 2)


def test_other_versions(monkeypatch):
    assert_versions_are_checked(freia, monkeypatch, "FrEIA", ["0.2", "0.2.1"], ["0.1", "0.3.dev1"])


@pytest.mark.parametrize("name", ["GLOW", "GLOW sigmoid", "RNVP tanh", "GIN", "all in one"])
def test_compiles_whole(name):
    assert_compiles_whole(flow(name, 1).module_list[0], freia, [torch.randn(6, 5)])
