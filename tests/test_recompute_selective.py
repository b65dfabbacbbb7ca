"""Blocks that keep outputs of expensive operators and compute the rest again: bits, bytes, and when a plan takes it."""

import copy
import dataclasses
import gc

import pytest
import torch
import torch.nn.functional as F
from recompute_models import Case, accumulate, gpt, power, resnet, results
from test_recompute_execute import STEPS, assert_same, seed
from test_recompute_plan import GRID, Counts, bits, measured_peak, step
from torch import nn

from pyperf_dl import recompute
from pyperf_dl._recompute_chain import ChainProfile, Node, Option, Schedule
from pyperf_dl._recompute_plan import Plan, _held_bytes, _solved
from pyperf_dl._recompute_profile import _without_dominated, job_of, measure
from pyperf_dl._recompute_selective import KeptOutputs, needed_outputs, operator_names

aten = torch.ops.aten


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


class MLP(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


def stack(make, count=4, dim=16, rows=64):
    torch.manual_seed(0)
    model = nn.Sequential(*(make(dim) for _ in range(count)))
    return Case(model, (torch.randn(rows, dim),), lambda y: y.square().mean())


def measured_of(case, selective=True, **how):
    job = job_of(case.model, case.inputs, case.loss_fn)
    operators = operator_names("plan", selective)
    return measure(job, blocks=case.blocks, generators=case.generators, operators=operators, **how)


def labels(chain):
    return [[option.label for option in block.options] for block in chain.blocks[1:-1]]


def used(plan):
    return [b.options[o].label for b, o in zip(plan.profile.blocks, plan.schedule.kept_options, strict=True)]


def selective_plan(case, measured, inside=False):
    """Each block that can is selective; inside: in one segment, which holds the half of itself as another."""
    chain, last = measured.profile, len(measured.profile) - 1

    def leaves(first, end):
        return [Node(k, end, None, len(chain.blocks[k].options) - 1) for k in range(first, end + 1)]

    nodes = leaves(0, last)
    if inside:
        middle = last // 2
        nodes = [Node(0, last), Node(1, last, last), Node(last, last), Node(1, last - 1, middle)]
        nodes += [*leaves(middle, last - 1), *leaves(1, middle - 1)]
    line = recompute.simulate(chain, nodes)
    schedule = Schedule(tuple(nodes), line.peak, line.seconds)
    schedule = dataclasses.replace(schedule, predicted_peak=line.peak + _held_bytes(measured, schedule))
    return Plan(case.model, measured, schedule, schedule.predicted_peak, case.generators)


# ---- bytes ----


def test_bytes_of_a_block_known_by_hand():
    """Of Linear, GELU, Linear behind a norm: what GELU reads, and the output; the last product is not needed again."""
    chain = measured_of(stack(MLP, rows=100)).profile
    size = 100 * 16 * 4
    for block in chain.blocks[1:-1]:
        keep, selective = block.options
        assert (keep.label, selective.label) == ("keep", "selective")
        assert keep.saved_bytes == size + 4 * size + 4 * size + size + 2 * 100 * 4  # norm, product, GELU, output
        assert selective.saved_bytes == 4 * size + size
        assert selective.history_peak == 4 * size + 4 * size + size  # the product, GELU, the last product
        assert selective.forward + selective.backward >= keep.forward + keep.backward


@pytest.mark.parametrize("name", [*GRID, "counts"])
def test_the_peak_is_as_predicted_and_the_bits_are_the_same(name):
    case = GRID[name]() if name in GRID else stack(lambda dim: nn.Sequential(Counts(), MLP(dim)))
    measured = measured_of(case)
    before = copy.deepcopy(case.model.state_dict())
    step(case)
    wanted = bits(case)
    some = name != "ragged"  # which has nothing to gain
    assert any("selective" in found for found in labels(measured.profile)) == some
    for inside in (False, True):
        case.model.load_state_dict(before)
        plan = selective_plan(case, measured, inside)
        assert ("selective" in used(plan)) == some
        plan.apply()
        step(case)
        assert all(torch.equal(a, b) for a, b in zip(wanted, bits(case), strict=True))
        peak = measured_peak(case)
        plan.remove()
        # The profiler does not see that buffers which were there before are released, as those that are replaced.
        assert peak <= plan.predicted_peak + (4 * 1024 if name == "power" else 0)
        if not inside and some:
            assert plan.predicted_peak <= (1.04 if name == "counts" else 1.01) * peak  # large buffers


class Gated(MLP):
    """Its backward needs the last product too."""

    def forward(self, x):
        return x * self.down(F.gelu(self.up(x)))


class Holds(nn.Sequential):
    """The forward is the peak: it has a local variable."""

    def forward(self, x):
        local = torch.cat([x] * 50)
        return super().forward(x + local[:1])


def test_looks_at_generators_are_counted_where_the_last_output_is_kept():
    case = stack(Gated)
    case = case._replace(model=Holds(*case.model))
    plan = selective_plan(case, measured_of(case))
    step(case)
    plan.apply()
    peak = measured_peak(case)
    assert peak <= plan.predicted_peak <= 1.01 * peak


@pytest.mark.parametrize("name", ["gpt", "resnet"])
def test_fake_tensors_save_as_many_bytes(name):
    case = GRID[name]()
    how = {"loss_fn": case.loss_fn, "blocks": case.blocks, "selective": True}
    real = recompute.profile(case.model, case.inputs, **how)
    fake = recompute.profile(case.model, case.inputs, device="meta", **how)
    assert labels(real) == labels(fake)
    for a, b in zip(real.blocks[1:-1], fake.blocks[1:-1], strict=True):
        assert a.options[1].saved_bytes == pytest.approx(b.options[1].saved_bytes, rel=0.01)
        assert b.options[1].forward + b.options[1].backward > b.options[0].forward + b.options[0].backward


# ---- which blocks have the option, and when it is taken ----


def test_dominated_options_are_dropped():
    keep, smaller, slower = (
        Option("keep", 1, 2, 50, 50, 60),
        Option("a", 1, 2, 40, 50, 60),
        Option("b", 1, 3, 50, 50, 60),
    )
    block = recompute.Block("0", 1.0, 10, 10, (keep, smaller, slower))
    assert _without_dominated(block).options == (keep, smaller)
    assert _without_dominated(block._replace(options=(keep, slower))).options == (keep,)
    faster = smaller._replace(backward=1)
    assert _without_dominated(block._replace(options=(smaller, faster))).options == (smaller, faster)  # none behind it
    # Of Linear and tanh the output is all there is to keep: the product comes on top.
    tanh = stack(lambda dim: nn.Sequential(nn.Linear(dim, dim), nn.Tanh()))
    assert labels(measured_of(tanh).profile) == labels(measured_of(tanh, without_data=True).profile) == [["keep"]] * 4
    # Nothing of it is expensive.
    norms = stack(lambda dim: nn.Sequential(nn.LayerNorm(dim), nn.GELU(), nn.LayerNorm(dim)))
    assert labels(measured_of(norms).profile) == [["keep"]] * 4
    assert labels(measured_of(norms, [aten.native_layer_norm]).profile) != [["keep"]] * 4


def test_operators_by_overload_and_packet():
    case = stack(MLP)
    saved = {
        name: [block.options[-1].saved_bytes for block in measured_of(case, what).profile.blocks[1:-1]]
        for name, what in {"none": False, "all": True, "packet": [aten.addmm], "overload": {aten.addmm.default}}.items()
    }
    assert saved["all"] == saved["packet"] == saved["overload"] != saved["none"]
    both = measured_of(case, (aten.addmm, aten.native_layer_norm.default))
    assert both.profile.blocks[1].options[1].saved_bytes > saved["all"][0]


def test_compiled_blocks_have_no_such_option():
    torch._dynamo.reset()
    case = stack(MLP)
    case.model[1].compile(backend="eager")
    case.model[2].up = torch.compile(case.model[2].up, backend="eager")
    assert [len(found) for found in labels(measured_of(case).profile)] == [2, 1, 1, 2]
    torch._dynamo.reset()


def timed(measured, extra):
    """With times by hand: forward 1, backward 2, selective `extra` more."""

    def block(b):
        options = [o._replace(forward=1.0, backward=2.0 + extra * (o.label == "selective")) for o in b.options]
        return b._replace(forward=1.0, options=tuple(options))

    blocks = measured.profile.blocks
    blocks = (blocks[0], *map(block, blocks[1:-1]), blocks[-1])
    return measured._replace(profile=dataclasses.replace(measured.profile, blocks=blocks, frame_seconds=0.01))


@pytest.mark.parametrize("name", ["gpt", "resnet"])
def test_a_plan_takes_what_is_faster(name):
    case = {"gpt": lambda: gpt(batch=4, length=32, dim=64, layers=8, heads=4), "resnet": GRID["resnet"]}[name]()
    measured = measured_of(case)
    before = copy.deepcopy(case.model.state_dict())
    step(case)
    wanted = bits(case)
    full, least = recompute.full_peak(measured.profile), _solved(measured, "least", torch.device("cpu"), None)[0]
    found, replayed = set(), False
    for part, extra in ((0.8, 0.1), (0.5, 0.1), (0.2, 0.1), (0.1, 0.1), (0.6, 1.5)):
        budget = int(least + part * (full - least))
        amount, schedule = _solved(timed(measured, extra), budget, torch.device("cpu"), None)
        plan = Plan(case.model, measured, schedule, amount, case.generators)
        if extra > 1:
            assert "selective" not in used(plan)
            continue
        found |= set(used(plan))
        replayed |= any(runs and label == "selective" for runs, label in zip(schedule.replays, used(plan), strict=True))
        case.model.load_state_dict(before)
        plan.apply()
        step(case)
        assert all(torch.equal(a, b) for a, b in zip(wanted, bits(case), strict=True))
        peak = measured_peak(case)
        plan.remove()
        assert peak <= plan.predicted_peak <= budget
        assert plan.predicted_peak == pytest.approx(peak, rel=0.04)
    assert found == {"keep", "selective"}
    assert replayed


def test_a_plan_of_measured_times_takes_it():
    """Two thirds of the time is products, most bytes are not theirs."""
    case = stack(MLP, count=4, dim=256, rows=512)
    wanted = results(case)
    plan = recompute.plan(case.model, case.inputs, budget="85%", loss_fn=case.loss_fn, selective=True)
    assert "selective" in used(plan)
    assert "selective" in str(plan)
    first = tuple(block._replace(options=block.options[:1]) for block in plan.profile.blocks)
    assert (
        plan.predicted_time
        < recompute.solve(dataclasses.replace(plan.profile, blocks=first), plan.budget).predicted_time
    )
    plan.apply()
    assert all(torch.equal(a, b) for a, b in zip(wanted, results(case), strict=True))
    peak = plan.profile.fixed_bytes + recompute.peak_memory(lambda: accumulate(case))
    assert peak <= plan.budget
    assert plan.predicted_peak == pytest.approx(peak, rel=0.02)
    assert len(recompute.pareto(plan.profile, 4)) == 4


def test_blocks_that_wait_on_the_host_and_blocks_that_are_selective():
    case = gpt(batch=8, length=32, dim=64, layers=6, heads=2)
    wanted = results(case)
    link = recompute.HostLink("cpu", bandwidth=1e9, least_bytes=1024)
    measured = measured_of(case, link=link)
    assert labels(measured.profile) == [["keep", "selective", "offload"]] * 6
    seen = set()
    for part, transfer in ((0.2, 0.0), (0.3, 0.3), (0.7, 0.3), (0.2, 0.9)):
        chain = timed(measured, 0.1).profile
        blocks = [
            b._replace(
                options=tuple(o._replace(backward=2.0 + transfer) if o.label == "offload" else o for o in b.options)
            )
            for b in chain.blocks
        ]
        by_hand = measured._replace(profile=dataclasses.replace(chain, blocks=tuple(blocks)))
        least, full = _solved(by_hand, "least", torch.device("cpu"), None)[0], recompute.full_peak(chain)
        amount, schedule = _solved(by_hand, int(least + part * (full - least)), torch.device("cpu"), None)
        plan = Plan(case.model, by_hand, schedule, amount, (), link)
        seen |= set(used(plan))
        assert not any(n and label == "offload" for n, label in zip(schedule.replays, used(plan), strict=True))
        plan.apply()
        assert all(torch.equal(a, b) for a, b in zip(wanted, results(case), strict=True))
        peak = plan.profile.fixed_bytes + recompute.peak_memory(lambda: accumulate(case))
        plan.remove()
        assert peak <= amount
    assert seen == {"keep", "selective", "offload"}


# ---- every bit ----


class Drawn(nn.Module):
    """An operator to keep that draws random numbers, before another one that does."""

    def __init__(self, dim):
        super().__init__()
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x):
        y = self.up(x)
        y = F.gelu(y * torch.bernoulli(y.detach().sigmoid()))
        return x + F.dropout(self.down(F.dropout(y, 0.3)).tanh(), 0.3)


class Inferred(Drawn):
    """Holds tensors of inference, which have no version."""

    def forward(self, x):
        with torch.inference_mode():
            scale = self.down(self.up(x)).sigmoid()
        return x + scale.clone() * self.down(F.gelu(self.up(x)))


class Dropped(Drawn):
    """As stochastic depth has it: what runs depends on random numbers and on a buffer, which changes at the end."""

    def __init__(self, dim):
        super().__init__(dim)
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x):
        if torch.rand(()) < 0.3 or self.steps > 7:
            x = super().forward(x)
        else:
            x = F.dropout(self.down(self.up(x).tanh()))
        x = x * 2
        self.steps += 1
        return x


class InPlace(nn.Module):
    """Writes to what could be kept."""

    def __init__(self, dim):
        super().__init__()
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x):
        y = self.up(x)
        y.mul_(1.5)
        return x + self.down(F.gelu(y)).tanh()


KEPT = (*operator_names("plan", True), "aten::bernoulli", "aten::clone")  # segments make clones of buffers themselves
BITS = {
    "gpt": lambda: gpt(dim=16, layers=4),
    "resnet": lambda: resnet(size=8, depths=(2, 1, 1)),
    "power": lambda: power(layers=5),
    "drawn": lambda: stack(Drawn),
    "inferred": lambda: stack(Inferred),
    "dropped": lambda: stack(Dropped, count=6),
    "in place": lambda: stack(InPlace),
}


def with_create_graph(case):
    case.model.zero_grad()
    parameters = list(case.model.parameters())
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        grads = torch.autograd.grad(case.loss(), parameters, create_graph=True)
        sum(g.square().sum() for g in grads).backward()
    return {f"grad {i}": g.detach().clone() for i, g in enumerate([*grads, *(p.grad for p in parameters)])}


def with_other_parameters(case):
    torch.manual_seed(3)
    others = {n: torch.randn_like(p).requires_grad_() for n, p in case.model.named_parameters()}
    loss = case.loss_fn(torch.func.functional_call(case.model, others, case.inputs))
    return dict(zip(others, torch.autograd.grad(loss, list(others.values())), strict=True))


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("name", BITS)
def test_steps_of_every_kind_give_the_same_bits(name, inside):
    case = BITS[name]()
    job = job_of(case.model, case.inputs, case.loss_fn)
    measured = measure(job, generators=case.generators, operators=KEPT)
    # Whether it pays or not: the first block's option in all.
    option = Option("selective", 1.0, 2.0, 1, 1, 1)
    blocks = [b._replace(options=(b.options[0], option)) if b.recomputable else b for b in measured.profile.blocks]
    measured = measured._replace(profile=dataclasses.replace(measured.profile, blocks=tuple(blocks)))
    plan = selective_plan(case, measured, inside)
    before = copy.deepcopy(case.model.state_dict())
    others = [] if name == "resnet" else [with_create_graph]  # whose normalization has no second derivative of all bits
    for one in [*STEPS, with_other_parameters, *others]:
        found = []
        for under in (False, True):
            case.model.load_state_dict(before)
            seed(case)
            if under:
                plan.apply()
            found.append(one(case))
            if under:
                plan.remove()
        assert_same(*found)


def runs_of(function):
    """How many times matrices are multiplied."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def test_products_are_not_computed_again():
    case = stack(MLP, count=6)
    plain = runs_of(lambda: case.loss().backward())
    plan = selective_plan(case, measured_of(case))
    plan.apply()
    assert runs_of(lambda: case.loss().backward()) == plain
    plan.remove()
    selective_plan(case, measured_of(case), inside=True).apply()
    with torch.no_grad():
        forward = runs_of(case.loss)
    # The segments run again: blocks 1, 2, 3, 4, 5, and 1. What their last blocks keep comes too late, so that they
    # compute the first of two products in their own backward.
    assert runs_of(lambda: case.loss().backward()) == plain + (6 + 0.5 + 0.5) * forward // 6


def test_what_changes_behind_the_last_saved_tensor_is_seen():
    assert measured_of(stack(Dropped)).buffers == (("steps",),) * 4


def test_nothing_is_held_of_a_forward_without_a_backward():
    case = stack(MLP)
    selective_plan(case, measured_of(case)).apply()
    gc.collect()
    gc.disable()
    try:
        loss = case.loss()
        before = sum(type(o) is KeptOutputs for o in gc.get_objects())
        del loss
        assert before == 4
        assert not any(type(o) is KeptOutputs for o in gc.get_objects())
    finally:
        gc.enable()


def test_what_was_drawn_or_written_to_is_computed_again():
    x, kept = torch.randn(4, 4), KeptOutputs(frozenset({"aten::bernoulli", "aten::mm"}), 10, [torch.default_generator])
    calls = []

    def run():
        a = torch.bernoulli(torch.full((3,), 0.5))
        b, c = x @ x, x @ x
        c.add_(1)
        calls.append((a, b, c))

    first, again = kept.contexts()
    with first:
        run()
    assert set(kept.outputs) == {("aten::mm", 1), ("aten::mm", 2)}
    for same in (True, False):  # what is taken is taken once
        with again:
            run()
        (_, b, c), (_, b_again, c_again) = calls[0], calls[-1]
        assert (b.data_ptr() == b_again.data_ptr()) == same
        assert c.data_ptr() != c_again.data_ptr()
        assert torch.equal(b, b_again)
        assert torch.equal(c, c_again)
    assert not kept.outputs
    assert needed_outputs({"aten::addmm"}, lambda: MLP(4)(x)) == 1


@pytest.mark.parametrize("wait", [1, 2, 3])
def test_an_exception_in_a_forward_or_a_replay_leaves_nothing_broken(wait):
    from test_recompute_execute import Sometimes

    case = stack(Sometimes, count=3)
    model = case.model
    option = Option("selective", 1.0, 2.0, 1, 1, 1)
    measured = measured_of(case)
    blocks = [b._replace(options=(b.options[0], option)) if b.recomputable else b for b in measured.profile.blocks]
    measured = measured._replace(profile=dataclasses.replace(measured.profile, blocks=tuple(blocks)))
    before = copy.deepcopy(model.state_dict())
    wanted = results(case)
    buffers = wanted[-len(list(model.buffers())) :]
    model.load_state_dict(before)
    selective_plan(case, measured).apply()
    torch.manual_seed(3)
    model[1].wait = wait
    if wait == 1:
        with pytest.raises(ZeroDivisionError):
            case.loss()
    else:
        loss = case.loss()
        random = torch.get_rng_state()
        if wait == 2:
            with pytest.raises(ZeroDivisionError):
                loss.backward()
        else:
            loss.backward()
        assert torch.equal(random, torch.get_rng_state())
        assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))
    model[1].wait = 0
    model.load_state_dict(before)
    assert all(torch.equal(a, b) for a, b in zip(wanted, results(case), strict=True))


# ---- files, processes, shapes, the command ----


def test_saved_and_loaded(tmp_path):
    case = gpt(batch=4, length=32, dim=64, layers=4, heads=4)
    step(case)
    wanted = bits(case)
    plan = selective_plan(case, measured_of(case, [aten.addmm, aten._scaled_dot_product_flash_attention_for_cpu]))
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert str(loaded) == str(plan)
    assert used(loaded) == ["keep", *["selective"] * 4, "keep"]
    loaded.apply(case.model)
    step(case)
    assert all(torch.equal(a, b) for a, b in zip(wanted, bits(case), strict=True))
    peak = measured_peak(case)
    assert peak <= loaded.predicted_peak <= 1.01 * peak


def test_processes_that_found_other_options_have_those_of_all():
    chain = measured_of(stack(MLP)).profile
    blocks = list(chain.blocks)
    blocks[2] = blocks[2]._replace(options=blocks[2].options[:1])
    other = dataclasses.replace(chain, blocks=tuple(blocks))
    for profiles in ([chain, other], [other, chain]):
        assert [len(found) for found in labels(ChainProfile.merged(profiles))] == [2, 1, 2, 2]


def test_other_shapes_have_the_option_too():
    case = stack(MLP, count=3)
    plan = recompute.plan(case.model, case.inputs, loss_fn=case.loss_fn, budget="100%", selective=True)
    plan.apply()
    with pytest.raises(ValueError, match="must be at least"):
        case.model(torch.randn(1000, 16))
    case.model(torch.randn(60, 16)).sum().backward()
    assert plan.profile.signature == "float32[60, 16]"
    assert "selective" in labels(plan.profile)[0]


def test_the_command(monkeypatch, tmp_path, capsys):
    from pyperf_dl.recompute import main

    monkeypatch.setattr("sys.path", [str(tmp_path), *__import__("sys").path])
    (tmp_path / "selective_models.py").write_text(
        "from test_recompute_selective import MLP, stack\ndef small(): return stack(MLP).model\n"
    )
    arguments = ["--model", "selective_models:small", "--inputs", "64x16", "--budget", "90%", "--selective"]
    assert main([*arguments, "--save", str(tmp_path / "plan.json")]) == 0
    assert "without recomputation:" in capsys.readouterr().out
    assert labels(Plan.load(tmp_path / "plan.json").profile) == [["keep", "selective"]] * 4
