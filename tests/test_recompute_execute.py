"""Running schedules: every bit as without one, whatever a block is, and however it is called."""

import copy
import functools
import gc
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from recompute_models import CASES, Case, gpt, power, resnet
from torch import nn
from torch.utils import _pytree as pytree

from pyperf_dl import recompute
from pyperf_dl._recompute_chain import Node, Schedule
from pyperf_dl._recompute_execute import Executor, items_of
from pyperf_dl._recompute_profile import job_of, measure


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


# ---- schedules ----


@st.composite
def trees(draw, first, last):
    """Any persistent schedule of blocks first, ..., last, in preorder."""
    nodes, todo = [], [(first, last)]
    while todo:
        s, t = todo.pop()
        split = draw(st.none() | st.integers(s + 1, t)) if s < t else None
        nodes.append(Node(s, t, split))
        if split is not None:
            todo += [(s, split - 1), (split, t)]
        elif s < t:
            todo.append((s + 1, t))
    return tuple(nodes)


def deepest(count):
    """Only the input is kept: each segment's first block starts again for each block."""
    nodes, todo = [], [(0, count - 1)]
    while todo:
        s, t = todo.pop()
        nodes.append(Node(s, t, t if s < t else None))
        if s < t:
            todo += [(s, t - 1), (t, t)]
    return tuple(nodes)


def halves(count):
    nodes, todo = [], [(0, count - 1)]
    while todo:
        s, t = todo.pop()
        split = (s + t + 1) // 2 if s < t else None
        nodes.append(Node(s, t, split))
        if split:
            todo += [(s, split - 1), (split, t)]
    return tuple(nodes)


def each_alone(count):
    nodes = []
    for s in range(count - 1):
        nodes.append(Node(s, count - 1, s + 1))
    nodes.append(Node(count - 1, count - 1))
    return tuple(nodes) + tuple(Node(s, s) for s in reversed(range(count - 1)))


SHAPES = {"deepest": deepest, "halves": halves, "each alone": each_alone}


@functools.lru_cache
def prepared(name):
    case = CASES[name]()
    job = job_of(case.model, case.inputs, case.loss_fn)
    measured = measure(job, blocks=case.blocks, generators=case.generators)
    return case, measured, copy.deepcopy(case.model.state_dict())


def executor_of(case, measured, nodes, model=None):
    chain = measured.chain if model is None else measured.chain.of(model)
    return Executor(
        chain.modules, chain.names, chain.calls, chain.outputs, items_of(nodes)[0], measured.buffers, case.generators
    )


class Under:
    """A context in which a model runs a schedule."""

    def __init__(self, case, measured, nodes, model=None):
        self._executor = executor_of(case, measured, nodes, model)

    def __enter__(self):
        self._executor.attach()

    def __exit__(self, *error):
        self._executor.detach()


def planned(case, fraction=0.0):
    """A plan between the least budget and no recomputation."""
    job = job_of(case.model, case.inputs, case.loss_fn)
    measured = measure(job, blocks=case.blocks, generators=case.generators)
    least = recompute.least_budget(measured.profile)[0]
    budget = int(least + fraction * (recompute.full_peak(measured.profile) - least))
    schedule = recompute.solve(measured.profile, budget)
    return recompute.Plan(case.model, measured, schedule, budget, case.generators)


# ---- what a step leaves behind ----


def seed(case, value=7):
    torch.manual_seed(value)
    for generator in case.generators:
        generator.manual_seed(value + 1)


def state_after(case, model, *outputs):
    """All bits: outputs, gradients, buffers, generators."""
    found = {f"output {i}": t.detach().clone() for i, t in enumerate(pytree.tree_leaves(outputs)) if torch.is_tensor(t)}
    found |= {f"grad {n}": None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    found |= {f"buffer {n}": b.clone() for n, b in model.named_buffers()}
    found["generator"] = torch.get_rng_state()
    found |= {f"generator {i}": g.get_state() for i, g in enumerate(case.generators)}
    return found


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name, value in a.items():
        if value is None:
            assert b[name] is None, name
        else:
            assert torch.equal(value.view(-1).view(torch.uint8), b[name].view(-1).view(torch.uint8)), name


def one_step(case, model=None):
    model = case.model if model is None else model
    model.zero_grad()
    output = case.forward(model)
    loss = output.loss if case.loss_fn is None else case.loss_fn(output)
    loss.backward()
    return state_after(case, model, output, loss)


def both(name, nodes, step=one_step):
    """The same step without and with a schedule, from the same state."""
    case, measured, before = prepared(name)
    results = []
    for under in (False, True):
        case.model.load_state_dict(before)
        seed(case)
        if under:
            with Under(case, measured, nodes):
                results.append(step(case))
        else:
            results.append(step(case))
    return results


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=12)
@given(data=st.data())
def test_any_schedule_gives_the_same_bits(name, data):
    count = len(prepared(name)[1].chain.modules)
    assert_same(*both(name, data.draw(trees(0, count - 1))))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", CASES)
def test_nested_schedules_give_the_same_bits(name, shape):
    count = len(prepared(name)[1].chain.modules)
    assert_same(*both(name, SHAPES[shape](count)))


def two_forwards_then_two_backwards(case):
    case.model.zero_grad()
    losses = [case.loss(), case.loss()]
    for loss in losses:
        loss.backward()
    return state_after(case, case.model, losses)


def two_backwards_in_turn(case):
    case.model.zero_grad()
    losses = []
    for _ in range(2):
        losses.append(case.loss())
        losses[-1].backward()
    return state_after(case, case.model, losses)


def the_later_backward_first(case):
    case.model.zero_grad()
    first, second = case.loss(), case.loss()
    second.backward()
    first.backward()
    return state_after(case, case.model, first, second)


def twice_in_one_graph(case):
    case.model.zero_grad()
    loss = case.loss() + 3 * case.loss()
    loss.backward()
    return state_after(case, case.model, loss)


def a_graph_kept(case):
    case.model.zero_grad()
    loss = case.loss()
    loss.backward(retain_graph=True)
    loss.backward(retain_graph=True)
    loss.backward()
    return state_after(case, case.model, loss)


def gradients_asked_for(case):
    case.model.zero_grad()
    loss = case.loss()
    found = torch.autograd.grad(loss, [p for p in case.model.parameters() if p.requires_grad])
    return state_after(case, case.model, loss, found)


def only_some_gradients(case):
    case.model.zero_grad()
    loss = case.loss()
    found = torch.autograd.grad(loss, list(case.model.parameters())[-1])
    return state_after(case, case.model, loss, found)


def never_backward(case):
    case.model.zero_grad()
    loss = case.loss()
    del loss
    return one_step(case)


def evaluated_between(case):
    case.model.zero_grad()
    loss = case.loss()
    case.model.eval()
    with torch.no_grad():
        others = [case.loss()]
    with torch.inference_mode():
        others.append(case.loss().clone())
    others = [t.tolist() for t in others]
    case.model.train()
    loss.backward()
    return state_after(case, case.model, loss) | {"others": torch.tensor(others)}


def in_eval_mode(case):
    case.model.eval()
    try:
        return one_step(case)
    finally:
        case.model.train()


def under_autocast(case):
    case.model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = case.loss()
    loss.backward()
    return state_after(case, case.model, loss)


def under_autocast_with_the_backward(case):
    case.model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = case.loss()
        loss.backward()
        again = case.loss()
    again.backward()
    return state_after(case, case.model, loss, again)


def random_numbers_between(case):
    case.model.zero_grad()
    loss = case.loss()
    drawn = torch.rand(3)
    loss.backward()
    return state_after(case, case.model, loss, drawn, torch.rand(3))


STEPS = [
    two_forwards_then_two_backwards, two_backwards_in_turn, the_later_backward_first, twice_in_one_graph, a_graph_kept,
    gradients_asked_for, only_some_gradients, never_backward, evaluated_between, in_eval_mode, under_autocast,
    under_autocast_with_the_backward, random_numbers_between,
]  # fmt: skip


@pytest.mark.parametrize("name", ["gpt", "resnet", "encoder", "albert", "power", "ragged"])
@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
def test_steps_of_every_kind_give_the_same_bits(name, step):
    count = len(prepared(name)[1].chain.modules)
    assert_same(*both(name, halves(count), step))
    assert_same(*both(name, deepest(count), step))


# ---- what blocks are, and who calls them ----


def linear_blocks(count=5, dim=8, dropout=0.2):
    torch.manual_seed(0)
    return [
        nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * dim, dim))
        for _ in range(count)
    ]


def simple(count=5, dim=8, batch=6, dropout=0.2):
    model = nn.Sequential(*linear_blocks(count, dim, dropout))
    return Case(model, (torch.randn(batch, dim),), lambda y: y.square().mean())


def compared(case, step=one_step, fraction=0.0):
    """The step without a plan, and with one."""
    before = copy.deepcopy(case.model.state_dict())
    seed(case)
    plain = step(case)
    case.model.load_state_dict(before)
    plan = planned(case, fraction)
    assert any(plan.schedule.replays)
    plan.apply()
    seed(case)
    under = step(case)
    plan.remove()
    assert_same(plain, under)
    return plan


@pytest.mark.parametrize("frozen", ["the first blocks", "the last blocks", "every second", "all but one"])
def test_frozen_parameters(frozen):
    case = simple()
    for k, block in enumerate(case.model):
        last = {"the first blocks": k < 3, "the last blocks": k > 2, "every second": k % 2 == 0, "all but one": k != 2}
        block.requires_grad_(not last[frozen])
    compared(case)


def test_inputs_that_need_a_gradient():
    case = simple()
    (x,) = case.inputs
    x.requires_grad_()

    def step(case):
        x.grad = None
        found = one_step(case)
        return found | {"input": x.grad.clone()}

    compared(case, step)


def test_a_first_block_that_takes_one_tensor_twice():
    class Pair(nn.Linear):
        def forward(self, a, b):
            return super().forward(a) + b

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Pair(8, 8) for _ in range(5))

        def forward(self, x):
            y = self.layers[0](x, x)
            for layer in self.layers[1:]:
                y = layer(y, y)
            return y

    torch.manual_seed(0)
    compared(simple()._replace(model=Model()))


class Scaled(nn.Module):
    """Hands on a number, which is an attribute, to each block."""

    class Layer(nn.Linear):
        def forward(self, x, scale):
            return (super().forward(x) * scale).tanh()

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(self.Layer(8, 8) for _ in range(5))
        self.scales = [1.0] * 5

    def forward(self, x):
        for layer, scale in zip(self.layers, self.scales, strict=True):
            x = layer(x, scale)
        return x


@pytest.mark.parametrize("place", [0, 1, 4])
def test_constants_that_change_are_refused_not_ignored(place):
    torch.manual_seed(0)
    case = simple()._replace(model=Scaled())
    plan = compared(case)
    case.model.scales[place] = 2.0
    plan.apply()
    with pytest.raises(RuntimeError, match=rf"layers\.{place} was called with other arguments"):
        case.loss()
    case.model.scales[place] = 1.0
    under = one_step(case)
    plan.remove()
    assert_same(one_step(case), under | {"generator": torch.get_rng_state()})


def test_functional_call_with_other_parameters():
    case = simple()
    torch.manual_seed(3)
    others = {n: torch.randn_like(p).requires_grad_() for n, p in case.model.named_parameters()}

    def step(case):
        output = torch.func.functional_call(case.model, others, case.inputs)
        grads = torch.autograd.grad(case.loss_fn(output), list(others.values()))
        assert all(p.grad is None for p in case.model.parameters())
        return state_after(case, case.model, output, grads)

    compared(case, step)


class WithBuffer(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.linear = nn.Linear(dim, dim)
        self.register_buffer("scale", torch.rand(dim) + 0.5)

    def forward(self, x):
        return torch.tanh(self.linear(x) * self.scale)


@pytest.mark.parametrize("alone", [True, False])
def test_functional_call_with_other_buffers(alone):
    torch.manual_seed(0)
    case = simple()._replace(model=nn.Sequential(*(WithBuffer(8) for _ in range(5))))
    others = {n: torch.rand(8) + 2 for n, _ in case.model.named_buffers()}
    if not alone:
        others |= {n: torch.randn_like(p).requires_grad_() for n, p in case.model.named_parameters()}

    def step(case):
        for p in others.values():
            p.grad = None
        case.model.zero_grad()
        output = torch.func.functional_call(case.model, others, case.inputs)
        case.loss_fn(output).backward()
        return state_after(case, case.model, output, [p.grad for p in others.values() if p.requires_grad])

    compared(case, step)


def test_functional_call_within_a_transform_runs_without_recomputation():
    case = simple()
    case.model.eval()
    plan = planned(case)
    parameters = dict(case.model.named_parameters())

    def loss(parameters, x):
        return torch.func.functional_call(case.model, parameters, (x,)).square().mean()

    x = case.inputs[0]
    wanted = torch.func.grad(loss)(parameters, x)
    samples = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    tangent = torch.func.jvp(lambda x: loss(parameters, x), (x,), (torch.ones_like(x),))
    calls = count_calls(case.model)
    plan.apply()
    found = torch.func.grad(loss)(parameters, x)
    assert calls == [1] * 5
    assert all(torch.equal(wanted[n], found[n]) for n in wanted)
    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    assert all(torch.equal(samples[n], found[n]) for n in wanted)
    assert torch.equal(tangent[1], torch.func.jvp(lambda x: loss(parameters, x), (x,), (torch.ones_like(x),))[1])


def count_calls(model):
    """How many times each child runs."""
    calls = [0] * len(list(model.children()))

    def counter(k):
        def count(*args):
            calls[k] += 1

        return count

    for k, block in enumerate(model.children()):
        block.register_forward_pre_hook(counter(k))
    return calls


def test_nothing_runs_again_where_gradients_are_off():
    case = simple()
    plan = planned(case)
    calls = count_calls(case.model)
    plan.apply()
    with torch.no_grad():
        plain = case.forward()
    with torch.inference_mode():
        case.forward()
    assert calls == [2] * 5
    assert not plain.requires_grad
    case.loss().backward()
    assert calls == [3 + again for again in plan.schedule.replays[1:-1]]


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.7])
def test_blocks_run_as_often_as_the_schedule_says(fraction):
    case = simple(8)
    plan = planned(case, fraction)
    begun, ended = count_calls(case.model), [0] * 8
    for k, block in enumerate(case.model):
        block.register_forward_hook(lambda *args, k=k: ended.__setitem__(k, ended[k] + 1))
    plan.apply()
    case.loss().backward()
    replays = plan.schedule.replays[1:-1]
    assert begun == [1 + again for again in replays]
    # A replay stops where its last saved tensor is there, so that the hooks behind a block may be left out once.
    assert all(1 <= e <= b for e, b in zip(ended, begun, strict=True))


def test_hooks_of_blocks_change_what_they_change_without_a_plan():
    case = simple()
    seen = []
    for block in case.model:
        block.register_forward_pre_hook(lambda module, args: (args[0] * 1.5,))
        block.register_forward_hook(lambda module, args, output: output + 0.25)
        block.register_full_backward_hook(lambda module, into, out: seen.append(out[0].clone()))

    def step(case):
        seen.clear()
        found = one_step(case)
        assert len(seen) == 5
        return found | {f"seen {i}": t for i, t in enumerate(seen)}

    compared(case, step)


def test_saved_tensor_hooks_of_others_see_the_inputs_of_segments():
    case = simple()
    packed = []

    def step(case):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t.clone(), lambda t: t):
            return one_step(case)

    compared(case, step)
    assert packed


@pytest.mark.parametrize("how", ["module.compile", "torch.compile"])
def test_compiled_blocks(how):
    torch._dynamo.reset()
    torch.manual_seed(0)
    case = simple()._replace(model=nn.Sequential(*(WithBuffer(8) for _ in range(4))))
    graphs, calls = [], []

    def backend(graph, example):
        def run(*args):
            calls.append(graph)
            return graph(*args)

        graphs.append(graph)
        return run

    if how == "module.compile":
        for block in case.model:
            block.compile(backend=backend)
    else:
        case = case._replace(model=nn.Sequential(*(torch.compile(b, backend=backend) for b in case.model)))
    plan = compared(case)
    count = len(calls)
    plan.apply()
    case.loss().backward()
    assert len(graphs) <= 4 * 3  # with and without gradients, and packed
    assert len(calls) - count == 4 + sum(plan.schedule.replays)
    torch._dynamo.reset()


def test_a_model_compiled_as_a_whole_afterwards_still_has_the_same_gradients():
    torch._dynamo.reset()
    case = simple(3, dropout=0.0)
    plain = one_step(case)
    planned(case).apply()
    compiled = torch.compile(case.model, backend="aot_eager")
    case.model.zero_grad()
    output = compiled(*case.inputs)
    loss = case.loss_fn(output)
    loss.backward()
    assert_same(plain, state_after(case, case.model, output, loss))
    torch._dynamo.reset()


def test_autocast_within_blocks():
    class Mixed(nn.Linear):
        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = super().forward(x)
            with torch.autocast("cpu", enabled=False):
                return y.float().tanh() + x

    torch.manual_seed(0)
    compared(simple()._replace(model=nn.Sequential(*(Mixed(8, 8) for _ in range(5)))))


def test_a_plan_made_under_autocast():
    case = gpt(dim=16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plan = planned(case)

    before = copy.deepcopy(case.model.state_dict())
    seed(case)
    plain = under_autocast(case)
    case.model.load_state_dict(before)
    plan.apply()
    seed(case)
    assert_same(plain, under_autocast(case))


def test_blocks_that_share_a_parameter_under_autocast():
    """Which casts it once, and sums the gradients of the copy."""
    torch.manual_seed(0)
    case = simple()._replace(model=nn.Sequential(*(nn.Linear(8, 8) for _ in range(4))))
    for block in case.model:
        block.weight = case.model[0].weight
    plain = under_autocast(case)
    planned(case).apply()
    assert_same(plain, under_autocast(case))


# ---- exceptions ----


class Sometimes(nn.Module):
    """Raises at its n-th forward from now."""

    def __init__(self, dim):
        super().__init__()
        self.linear, self.norm = nn.Linear(dim, dim), nn.BatchNorm1d(dim)
        self.wait = 0

    def forward(self, x):
        y = self.norm(self.linear(x))
        if self.wait:
            self.wait -= 1
            if not self.wait:
                raise ZeroDivisionError("in a block")
        return F.dropout(y.tanh(), 0.2)


@pytest.mark.parametrize("place", range(5))
@pytest.mark.parametrize("wait", [1, 2, 3])
def test_an_exception_in_a_forward_or_a_replay_leaves_nothing_broken(place, wait):
    torch.manual_seed(0)
    case = simple()._replace(model=nn.Sequential(*(Sometimes(8) for _ in range(5))))
    model = case.model
    before = copy.deepcopy(model.state_dict())
    seed(case)
    plain = one_step(case)
    seed(case)
    model.load_state_dict(before)
    model.zero_grad()
    loss = case.loss()
    after_forward = state_after(case, model)
    del loss
    model.load_state_dict(before)
    plan = planned(case, 0.05)
    replays = plan.schedule.replays[1:-1]
    plan.apply()
    parameters = list(model.parameters())
    model[place].wait = wait
    seed(case)
    failed = False
    try:
        loss = case.loss()
        forward_done = True
        torch.manual_seed(99)
        random = torch.get_rng_state()
        loss.backward()
    except ZeroDivisionError:
        failed = True
        if wait > 1:
            assert forward_done
            assert torch.equal(torch.get_rng_state(), random)
            now = {k: v for k, v in state_after(case, model).items() if k.startswith("buffer")}
            assert_same({k: v for k, v in after_forward.items() if k.startswith("buffer")}, now)
    assert failed == (wait <= 1 + replays[place])
    model[place].wait = 0
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    model.load_state_dict(before)
    seed(case)
    assert_same(plain, one_step(case))


def test_an_exception_between_blocks():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(linear_blocks())
            self.fails = False

        def forward(self, x):
            for k, layer in enumerate(self.layers):
                if self.fails and k == 2:
                    raise ZeroDivisionError
                x = layer(x)
            return x

    case = simple()._replace(model=Model())
    plan = compared(case)
    plan.apply()
    case.model.fails = True
    with pytest.raises(ZeroDivisionError):
        case.loss()
    case.model.fails = False
    seed(case)
    under = one_step(case)
    plan.remove()
    seed(case)
    assert_same(one_step(case), under)


# ---- the model with a plan ----


def test_a_forward_that_ends_within_a_segment_has_no_other_output():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers, self.end = nn.ModuleList(linear_blocks()), None

        def forward(self, x):
            for layer in self.layers[: self.end]:
                x = layer(x)
            return x

    case = simple()._replace(model=Model())
    nodes = [Node(0, 6), Node(1, 6), Node(2, 6, 5), *(Node(k, 6) for k in (5, 6)), *(Node(k, 4) for k in (2, 3, 4))]
    measured = measure(job_of(case.model, case.inputs, case.loss_fn))
    line = recompute.simulate(measured.profile, nodes)
    plan = recompute.Plan(case.model, measured, Schedule(tuple(nodes), line.peak, line.seconds), line.peak)
    for end in (0, 1, 2, 3, 4, None):  # blocks 1, 2, 3 are a segment
        case.model.end = end
        seed(case)
        plain = case.loss().detach()
        plan.apply()
        seed(case)
        if end in (2, 3):
            with pytest.raises(RuntimeError, match=rf"the end of the forward where layers\.{end} is next"):
                case.loss()
        else:
            assert torch.equal(plain, case.loss())
        plan.remove()


def test_nothing_is_held_of_a_forward_with_an_exception():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Shifted(8, 8) for _ in range(4))

        def forward(self, x):
            shift = x.exp()
            for layer in self.layers:
                x = layer(x, shift)
            return x

    class Shifted(nn.Linear):
        fails = False

        def forward(self, x, shift):
            if self.fails:
                raise ZeroDivisionError
            return super().forward(x).tanh() + shift

    case = simple()._replace(model=Model())
    planned(case).apply()
    shifts = []
    case.model.layers[0].register_forward_pre_hook(lambda module, args: shifts.append(weakref.ref(args[1])))
    case.model.layers[3].fails = True
    with pytest.raises(ZeroDivisionError):
        case.loss()
    gc.collect()
    assert shifts[0]() is None


def test_nothing_of_a_step_is_held_afterwards():
    case = simple()
    planned(case).apply()
    x = torch.randn(6, 8)
    kept = weakref.ref(x)
    output = case.model(x)
    of_output = weakref.ref(output)
    output.sum().backward()
    del x, output
    gc.collect()
    assert kept() is None
    assert of_output() is None


def test_names_keys_and_modules_are_as_before():
    case = power()
    model = case.model
    facts = list(model.state_dict()), [n for n, _ in model.named_modules()], list(map(id, model.parameters()))
    types = [type(m) for m in model.modules()]
    plan = planned(case)
    assert plan.apply() is model
    assert facts == (list(model.state_dict()), [n for n, _ in model.named_modules()], list(map(id, model.parameters())))
    assert types == [type(m) for m in model.modules()]
    assert plan.remove() is model
    assert all(m._compiled_call_impl is None for m in model.modules())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_a_copy_is_without_a_plan_and_works(copied):
    case = gpt(dim=16)
    plan = planned(case)
    plan.apply()
    other = copied(case.model)
    assert not any(m._compiled_call_impl for m in other.modules())
    seed(case)
    mine = one_step(case)
    seed(case)
    assert_same(mine, one_step(case, other))
    assert any(m._compiled_call_impl for m in case.model.modules())
    recompute.plan(other, case.inputs, loss_fn=case.loss_fn, budget="100%").apply()
    seed(case)
    assert_same(mine, one_step(case, other))


@pytest.mark.parametrize("first", ["optimizer", "plan"])
def test_training_with_an_optimizer_built_before_or_after(first):
    def train(with_plan):
        case = gpt(dim=16)
        optimizer = torch.optim.AdamW(case.model.parameters()) if first == "optimizer" else None
        if with_plan:
            planned(case).apply()
        optimizer = optimizer or torch.optim.AdamW(case.model.parameters())
        seed(case)
        losses = []
        for _ in range(4):
            optimizer.zero_grad()
            losses.append(case.loss())
            losses[-1].backward()
            optimizer.step()
        return state_after(case, case.model, losses) | {n: p.detach() for n, p in case.model.named_parameters()}

    assert_same(train(False), train(True))


def test_named_generators_end_where_they_end_without_a_plan():
    case = power()
    compared(case)
    compared(case, two_forwards_then_two_backwards)


def test_buffers_move_once_a_step():
    case = resnet()
    compared(case)
    planned(case).apply()
    counts = {n: b.item() for n, b in case.model.named_buffers() if n.endswith("num_batches_tracked")}
    case.loss().backward()
    assert all(b.item() == counts[n] + 1 for n, b in case.model.named_buffers() if n in counts)
