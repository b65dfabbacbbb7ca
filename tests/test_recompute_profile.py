"""Measuring a model: what it leaves as it was, how often it runs the model, and its numbers."""

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from recompute_models import CASES, Case, gpt, power, resnet
from torch import nn
from torch.utils import _pytree as pytree

from pyperf_dl import recompute
from pyperf_dl._recompute_memory import storage_bytes
from pyperf_dl._recompute_profile import job_of, measure, optimizer_bytes


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def profiled(case, **options):
    how = {"loss_fn": case.loss_fn, "blocks": case.blocks, "generators": case.generators} | options
    return recompute.profile(case.model, case.inputs, **how)


class Layer(nn.Module):
    def __init__(self, dim=8):
        super().__init__()
        self.linear = nn.Linear(dim, dim)

    def forward(self, x):
        return self.linear(x).tanh()


def layers(count=4, make=Layer):
    torch.manual_seed(0)
    return Case(nn.Sequential(*(make() for _ in range(count))), (torch.randn(5, 8),), lambda y: y.square().mean())


class Before:
    """Everything that measuring must leave alone."""

    def __init__(self, case):
        self.case, model = case, case.model
        self.tensors = [*model.parameters(), *model.buffers(), *pytree.tree_leaves(case.inputs)]
        self.tensors = [t for t in self.tensors if isinstance(t, torch.Tensor)]
        self.values = [t.detach().clone() for t in self.tensors]
        self.grads = [t.grad for t in self.tensors]
        self.grad_values = [None if g is None else g.clone() for g in self.grads]
        self.random = torch.get_rng_state(), [g.get_state() for g in case.generators], random.getstate()
        self.modes = [(m, m.training, m._compiled_call_impl) for m in model.modules()]
        self.hooks = [
            {name: dict(value) for name, value in vars(m).items() if name.endswith("_hooks")} for m in model.modules()
        ]

    def check(self):
        model, generators = self.case.model, self.case.generators
        now = [*model.parameters(), *model.buffers(), *pytree.tree_leaves(self.case.inputs)]
        now = [t for t in now if isinstance(t, torch.Tensor)]
        assert all(a is b for a, b in zip(self.tensors, now, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(self.values, now, strict=True))
        assert all(t.grad is g for t, g in zip(now, self.grads, strict=True))
        assert all(g is None or torch.equal(g, v) for g, v in zip(self.grads, self.grad_values, strict=True))
        assert torch.equal(self.random[0], torch.get_rng_state())
        assert all(torch.equal(a, g.get_state()) for a, g in zip(self.random[1], generators, strict=True))
        assert self.random[2] == random.getstate()
        assert self.modes == [(m, m.training, m._compiled_call_impl) for m in model.modules()]
        assert self.hooks == [
            {name: dict(value) for name, value in vars(m).items() if name.endswith("_hooks")} for m in model.modules()
        ]
        assert torch.is_grad_enabled()


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_the_model_is_as_before(name, gradients):
    case = CASES[name]()
    if gradients:
        case.loss().backward()
    for k, module in enumerate(case.model.modules()):
        if k % 3 == 2:
            module.eval()
    case.model.register_forward_hook(lambda *args: None)
    torch.rand(5)
    before = Before(case)
    profiled(case)
    before.check()


def test_a_model_in_eval_mode_stays_in_it_and_its_buffers_are_not_changed():
    case = resnet()
    case.model.eval()
    before = Before(case)
    measured = measure(job_of(case.model, case.inputs, case.loss_fn))
    before.check()
    assert not any(measured.buffers)
    case.model.train()
    measured = measure(job_of(case.model, case.inputs, case.loss_fn))
    assert len(measured.buffers[0]) == 6


def test_an_input_that_needs_a_gradient_gets_none():
    case = layers()
    case.inputs[0].requires_grad_()
    before = Before(case)
    profiled(case)
    before.check()


def test_an_input_with_a_history_keeps_it():
    w = torch.ones(8, requires_grad=True)
    case = layers()
    case = case._replace(inputs=(case.inputs[0] * w * w,))
    profiled(case)
    profiled(case, blocks=["1", "2", "3"])
    assert w.grad is None
    case.loss().backward()
    assert w.grad is not None


def test_an_optimizer_that_steps_within_the_backward_does_not():
    case = layers()
    optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in case.model.parameters()}
    for p in case.model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: optimizers[p].step())
    before = Before(case)
    profiled(case)
    before.check()
    case.loss().backward()
    assert not torch.equal(before.values[0], before.tensors[0])


def test_a_loss_with_parameters_gets_no_gradients():
    loss = nn.Sequential(nn.Linear(8, 1), nn.Flatten(0))
    case = layers()._replace(loss_fn=lambda y: loss(y).mean())
    profiled(case)
    assert all(p.grad is None for p in loss.parameters())


def test_a_loss_module_is_a_part_of_the_step():
    case = layers()
    plain = profiled(case).fixed_bytes
    whole = nn.Sequential(nn.Linear(8, 100), nn.BatchNorm1d(100), nn.Linear(100, 1), Mean())
    before = copy.deepcopy(whole.state_dict())
    chain = profiled(case._replace(loss_fn=whole))
    parameters = storage_bytes(whole.parameters())
    assert chain.fixed_bytes == plain + 2 * parameters + storage_bytes(whole.buffers())
    assert all(p.grad is None for p in whole.parameters())
    assert all(torch.equal(before[name], value) for name, value in whole.state_dict().items())


class Mean(nn.Module):
    def forward(self, x):
        return x.mean()


class Failing(Layer):
    wait = 0

    def forward(self, x):
        self.norm = x.mean()
        if Failing.wait:
            Failing.wait -= 1
            if not Failing.wait:
                raise ZeroDivisionError("in a block")
        return F.dropout(super().forward(x))


class Replaced(nn.BatchNorm1d):
    """Has what an error could leave behind: buffers, random numbers, a failure."""

    def __init__(self):
        super().__init__(8)
        self.layer = Failing()

    def forward(self, x):
        return self.layer(super().forward(x))


@pytest.mark.parametrize("wait", [1, 3, 5, 8, 11, 17, 30])
def test_the_model_is_as_before_after_an_error_in_a_block(wait):
    case = layers(make=Replaced)
    case.loss().backward()
    Failing.wait = wait
    before = Before(case)
    with pytest.raises(ZeroDivisionError):
        profiled(case)
    Failing.wait = 0
    before.check()


@pytest.mark.parametrize("wait", [1, 2, 4])
def test_the_model_is_as_before_after_an_error_in_the_loss(wait):
    case = layers(make=Replaced)
    calls = []

    def loss(y):
        calls.append(y.shape)
        if len(calls) == wait:
            raise ZeroDivisionError
        return y.mean()

    before = Before(case)
    with pytest.raises(ZeroDivisionError):
        profiled(case, loss_fn=loss)
    before.check()


@pytest.mark.parametrize("name", ["gpt", "resnet", "albert"])
def test_at_most_five_steps(name):
    case = CASES[name]()
    calls, losses = [], []
    case.model.register_forward_pre_hook(lambda *args: calls.append(1))
    profiled(case, loss_fn=lambda y: losses.append(1) or case.loss_fn(y))
    assert len(calls) <= 5
    assert len(losses) <= 5


def test_equal_blocks_have_equal_numbers():
    chain = profiled(gpt())
    assert len(set(chain.kinds)) == 3
    assert len({block[1:] for block in chain.blocks[1:-1]}) == 1
    assert len(set(profiled(resnet(depths=(3, 2))).kinds[1:-1])) == 3  # the second stage's first block, and its others


def test_an_odd_block_has_numbers_of_its_own():
    case = layers(5)
    case.model[2] = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 8))
    kinds = profiled(case).kinds[1:-1]
    assert kinds[1] == kinds[3] == kinds[4]
    assert len(set(kinds)) == 3  # the first one's input needs no gradient


def test_bytes_of_a_block_known_by_hand():
    """Linear and tanh: input and output are kept, the product is not."""
    case = Case(nn.Sequential(*(Layer(64) for _ in range(3))), (torch.randn(100, 64),), lambda y: y.sum())
    chain = profiled(case)
    size = 100 * 64 * 4
    for block in chain.blocks[1:-1]:
        (option,) = block.options
        assert block.output_bytes == size
        assert block.forward_peak == 2 * size
        assert option.saved_bytes == size
        assert option.history_peak == 2 * size
        # the output and its gradient, that of the product, and then that of the input or of the weight
        assert 3 * size <= option.backward_peak <= 4 * size + 64 * 64 * 4
    parameters = sum(p.numel() * 4 for p in case.model.parameters())
    assert chain.fixed_bytes >= 2 * parameters + size
    assert chain.signature == "float32[100, 64]"
    assert chain.device == "cpu"


@pytest.mark.parametrize("name", CASES)
def test_fixed_bytes(name):
    """Parameters once, gradients of those that need one, buffers, inputs, the optimizer's state; and a little for
    numbers that operators turn into tensors."""
    case = CASES[name]()
    next(case.model.parameters()).requires_grad_(False)
    parameters = list(case.model.parameters())
    inputs = [t for t in pytree.tree_leaves(case.inputs) if isinstance(t, torch.Tensor)]
    expected = storage_bytes([*parameters, *case.model.buffers(), *inputs])
    expected += sum(p.numel() * 4 for p in parameters if p.requires_grad)
    chain = profiled(case)
    assert chain.fixed_bytes == expected + 1024
    assert profiled(case, optimizer=12345).fixed_bytes == chain.fixed_bytes + 12345


OPTIMIZERS = {
    "SGD": (lambda p: torch.optim.SGD(p, lr=0.1), 0),
    "momentum": (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), 1),
    "Adam": (torch.optim.Adam, 2),
    "AdamW amsgrad": (lambda p: torch.optim.AdamW(p, amsgrad=True), 3),
    "RMSprop": (torch.optim.RMSprop, 1),
    "groups": (lambda p: torch.optim.Adam([{"params": [q], "lr": 0.1} for q in p]), 2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_bytes_before_and_after_its_first_step(name):
    make, copies = OPTIMIZERS[name]
    case = gpt(dim=16, layers=2)
    case.model.norm.requires_grad_(False)
    optimizer = make(list(case.model.parameters()))
    values = {n: p.detach().clone() for n, p in case.model.named_parameters()}
    before = optimizer_bytes(case.model, optimizer)
    assert not optimizer.state
    assert all(torch.equal(p, values[n]) for n, p in case.model.named_parameters())
    case.loss().backward()
    optimizer.step()
    after = optimizer_bytes(case.model, optimizer)
    state = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
    assert before == after == storage_bytes(state)
    needed = sum(p.numel() * 4 for p in case.model.parameters() if p.requires_grad)
    assert copies * needed <= after <= copies * needed + 8 * len(list(case.model.parameters()))


def test_an_optimizer_of_some_parameters():
    case = gpt(dim=16, layers=2)
    optimizer = torch.optim.Adam(case.model.head.parameters())
    optimizer_before = copy.deepcopy(optimizer.state_dict())
    found = optimizer_bytes(case.model, optimizer)
    assert found == 2 * case.model.head.weight.nbytes + 4
    assert optimizer.state_dict() == optimizer_before


# ---- blocks that are not so simple ----


def test_a_buffer_with_overlapping_memory():
    class Expanded(Layer):
        def __init__(self):
            super().__init__()
            self.register_buffer("mask", torch.ones(1).expand(8))
            self.register_buffer("none", None)
            self.register_buffer("empty", torch.zeros(0))

        def forward(self, x):
            return super().forward(x) * self.mask

    case = layers(make=Expanded)
    before = Before(case)
    profiled(case)
    before.check()


def test_an_output_with_overlapping_memory():
    class Mean(Layer):
        def forward(self, x):
            return super().forward(x).mean(1, keepdim=True).expand_as(x)

    profiled(layers(make=Mean))


def test_a_last_output_that_is_changed_in_place():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Layer() for _ in range(4))

        def forward(self, x):
            for layer in self.layers:
                x = layer(x) if layer is not self.layers[-1] else layer.linear(x)
            return x

    class InPlace(Model):
        def forward(self, x):
            for layer in self.layers:
                x = layer.linear(x)
            return x.relu_()

    case = layers()._replace(model=InPlace())
    chain = profiled(case, blocks=[f"layers.{k}.linear" for k in range(4)])
    assert len(chain) == 6


def test_a_block_that_hands_its_input_on():
    case = layers(5)
    case.model[2] = nn.Identity()
    case.model[3] = nn.Flatten()
    chain = profiled(case)
    assert [b.name for b in chain.blocks[1:-1]] == ["0", "1", "2", "3", "4"]


def test_nested_containers_are_one_chain():
    chain = profiled(resnet())
    assert [b.name for b in chain.blocks[1:-1]] == [f"stages.{i}.{k}" for i in range(3) for k in range(2)]


def test_blocks_that_keep_no_activations_of_others():
    """Not more memory than the model's own peak without recomputation."""
    case = gpt(layers=12)
    chain = profiled(case)
    for p in case.model.parameters():
        p.grad = torch.zeros_like(p)
    whole = recompute.peak_memory(lambda: case.loss().backward())
    assert recompute.peak_memory(lambda: case.loss().backward()) == whole
    profiling = max(o.backward_peak + b.output_bytes for b in chain.blocks for o in b.options)
    assert profiling < whole / 3


def test_a_plan_that_runs_is_not_measured():
    case = power()
    plan = recompute.plan(case.model, case.inputs, loss_fn=case.loss_fn, generators=case.generators, budget="100%")
    plan.apply()
    with pytest.raises(ValueError, match="runs a plan"):
        profiled(case)
    plan.remove()
    profiled(case)
