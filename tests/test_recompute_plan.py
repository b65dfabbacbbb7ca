"""Plans: the budget holds, the prediction is right, and what a user does with a plan."""

import copy
import io
import json
import re
import subprocess
import sys

import pytest
import torch
from recompute_models import Case, albert, encoder, gpt, power, ragged, resnet
from torch import nn
from torch.utils import _pytree as pytree

from pyperf_dl import recompute
from pyperf_dl._recompute_memory import storage_bytes
from pyperf_dl._recompute_plan import _held_bytes, budget_bytes
from pyperf_dl._recompute_profile import job_of, measure, optimizer_bytes

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def options_of(case):
    return {"loss_fn": case.loss_fn, "blocks": case.blocks, "generators": case.generators}


def planned(case, budget, **options):
    return recompute.plan(case.model, case.inputs, budget=budget, **(options_of(case) | options))


def between(case, fraction, least=None):
    """A budget between the least feasible one and that without recomputation."""
    plan = planned(case, "least") if least is None else least
    return int(plan.budget + fraction * (recompute.full_peak(plan.profile) - plan.budget))


def step(case, model=None):
    model = case.model if model is None else model
    torch.manual_seed(5)
    for generator in case.generators:
        generator.manual_seed(6)
    for p in model.parameters():
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        p.grad.zero_()
    loss = case.loss(model)
    loss.backward()
    return loss.detach()


def measured_peak(case, optimizer=None):
    """Of a whole step: what is there before it, and the most above that."""
    inputs = [t for t in pytree.tree_leaves(case.inputs) if isinstance(t, torch.Tensor)]
    there = storage_bytes([*case.model.parameters(), *case.model.buffers(), *inputs])
    there += sum(p.nbytes for p in case.model.parameters() if p.requires_grad)
    there += optimizer_bytes(case.model, optimizer)
    return there + recompute.peak_memory(lambda: step(case))


def bits(case):
    return [t.clone() for t in [*(p.grad for p in case.model.parameters()), *case.model.buffers()]]


# ---- the budget ----

GRID = {
    "gpt": lambda: gpt(batch=4, length=32, dim=64, layers=10, heads=4),
    "gpt, logits are the most": lambda: gpt(batch=4, length=32, dim=16, layers=6, vocabulary=2000),
    "gpt tied": lambda: gpt(batch=4, length=32, dim=64, layers=6, tied=True),
    "resnet": lambda: resnet(batch=8, size=32, depths=(3, 3, 3)),
    "encoder": lambda: encoder(length=64, dim=64, layers=8),
    "albert": lambda: albert(batch=4, length=32, dim=64, repeats=8),
    "power": lambda: power(batch=2048, dim=32, layers=8),
    "ragged": lambda: ragged(batch=512, dim=32),
}


@pytest.mark.parametrize("name", GRID)
def test_the_peak_is_within_the_budget_and_as_predicted(name, record_property):
    case = GRID[name]()
    optimizer = torch.optim.AdamW(case.model.parameters())
    before = copy.deepcopy(case.model.state_dict())
    step(case)
    wanted = bits(case)
    job = job_of(case.model, case.inputs, case.loss_fn)
    measured = measure(job, optimizer=optimizer, blocks=case.blocks, generators=case.generators)
    chain = measured.profile
    full = measured_peak(case, optimizer)
    # The chain has every output until its backward; that of a block here is lost before, for nothing saves it.
    slack = 0.13 if name == "ragged" else 0.02
    assert recompute.full_peak(chain) == pytest.approx(full, rel=slack)
    # A segment that runs again ends where its last tensor is saved, before what "power" makes behind that.
    slack = 0.1 if name == "power" else slack
    # The profiler does not see that buffers which were there before are released, as those that are replaced.
    unseen = 4 * storage_bytes(case.model.buffers()) if name == "power" else 0
    least = planned(case, "least", optimizer=optimizer)
    for fraction in (0.02, 0.05, 0.3, 0.7, 1):
        case.model.load_state_dict(before)
        budget = between(case, fraction, least)
        plan = planned(case, budget, optimizer=optimizer)
        plan.apply()
        peak = measured_peak(case, optimizer)
        plan.remove()
        assert all(torch.equal(a, b) for a, b in zip(wanted, bits(case), strict=True))
        record_property(f"peak / budget at {fraction}", peak / budget)
        record_property(f"predicted / peak at {fraction}", plan.predicted_peak / peak)
        assert peak <= budget + unseen, (fraction, peak / budget)
        assert plan.predicted_peak <= budget
        # What is set aside for states of generators is there at the peak only in part: more or less, by the schedule.
        held = _held_bytes(measured, plan.schedule)
        more = plan.predicted_peak - peak
        assert -slack * peak <= more <= slack * peak + held, (fraction, plan.predicted_peak / peak)


class Wide(nn.Module):
    """Its forward holds a large tensor that no backward needs."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32), nn.Tanh()) for _ in range(6)
        )

    def forward(self, x):
        wide = x.repeat(1, 16)
        x = wide.unflatten(1, (16, 32)).sum(1)
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("fraction", [0, 0.3, 1])
def test_what_the_forward_holds_is_gone_in_the_backward(fraction):
    torch.manual_seed(0)
    case = Case(Wide(), (torch.randn(512, 32),), lambda y: y.square().mean())
    step(case)
    plan = planned(case, between(case, fraction))
    plan.apply()
    assert 0 <= plan.predicted_peak - measured_peak(case) < 32 << 10  # states of generators


class Counts(nn.Module):
    """Changes a buffer that is larger than its activations."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.register_buffer("counts", torch.zeros(1 << 14))

    def forward(self, x):
        self.counts.add_(1)
        return self.linear(x).tanh()


@pytest.mark.parametrize("split", ["the last", "the middle"])
def test_what_segments_in_segments_hold_is_counted(split):
    """Buffers of the first run, until the backward."""
    torch.manual_seed(0)
    case = Case(nn.Sequential(*(Counts() for _ in range(8))), (torch.randn(64, 16),), lambda y: y.square().mean())
    measured = measure(job_of(case.model, case.inputs, case.loss_fn))
    nodes, todo = [recompute.Node(0, 9), recompute.Node(1, 9, 9), recompute.Node(9, 9)], [(1, 8)]
    while todo:
        first, last = todo.pop()
        at = None if first == last else last if split == "the last" else (first + last + 1) // 2
        nodes.append(recompute.Node(first, last, at))
        todo += [(first, at - 1), (at, last)] if at else []
    peak = recompute.simulate(measured.profile, nodes).peak
    schedule = recompute.Schedule(tuple(nodes), peak, 0.0)
    peak += _held_bytes(measured, schedule)
    recompute.Plan(case.model, measured, schedule, peak).apply()
    step(case)
    assert 0.9 * peak <= measured_peak(case) <= peak


def test_a_smaller_budget_means_less_memory_and_more_time():
    case = gpt(batch=4, length=32, dim=64, layers=8, heads=4)
    chain = recompute.profile(case.model, case.inputs, **options_of(case))
    schedules = recompute.pareto(chain, 8)
    assert len(schedules) == 8
    times = [s.predicted_time for s in schedules]
    assert times == sorted(times, reverse=True)
    assert sum(schedules[-1].replays) == 0
    assert sum(schedules[0].replays) > 0
    assert schedules[0].predicted_peak <= recompute.least_budget(chain)[0]


def test_optimizer_state_counts():
    case = gpt(dim=16)
    optimizer = torch.optim.Adam(case.model.parameters())
    plain, with_state = planned(case, "100%"), planned(case, "100%", optimizer=optimizer)
    state = optimizer_bytes(case.model, optimizer)
    assert with_state.budget - plain.budget == state
    assert planned(case, "100%", optimizer=state).budget == with_state.budget


BUDGETS = {
    1000: 1000, "1000": 1000, "1000B": 1000, "2 KiB": 2048, "2kb": 2000, "1.5MiB": 3 << 19, "6GiB": 6 << 30,
    " 500 MB ": 500_000_000, ".5TB": 5 * 10**11, "1tib": 1 << 40, "70%": 700, "100%": 1000, "12.5 %": 125, "150%": 1500,
}  # fmt: skip


@pytest.mark.parametrize("budget", BUDGETS)
def test_budgets(budget):
    assert budget_bytes(budget, 1000, CPU) == BUDGETS[budget]


# ---- applying and removing ----


def test_apply_remove_and_again():
    case = gpt(dim=16)
    step(case)
    wanted = bits(case)
    plan = planned(case, "80%")
    with pytest.raises(ValueError, match="not applied"):
        plan.remove()
    for _ in range(2):
        plan.apply()
        with pytest.raises(ValueError, match=r"applied already; call remove\(\) first"):
            plan.apply()
        step(case)
        assert all(torch.equal(a, b) for a, b in zip(wanted, bits(case), strict=True))
        plan.remove()
        step(case)
        assert all(torch.equal(a, b) for a, b in zip(wanted, bits(case), strict=True))
    with pytest.raises(ValueError, match="not applied"):
        plan.remove()
    assert all(m._compiled_call_impl is None for m in case.model.modules())


def test_two_plans_of_one_model():
    case = gpt(dim=16)
    first, second = planned(case, "80%"), planned(case, "90%")
    first.apply()
    with pytest.raises(ValueError, match="runs another plan"):
        second.apply()
    with pytest.raises(ValueError, match="runs a plan already"):
        planned(case, "90%")
    step(case)
    first.remove()
    second.apply()
    step(case)


def test_a_copy():
    case = resnet()
    plan = planned(case, "85%")
    assert sum(plan.schedule.replays)
    other = copy.deepcopy(case.model)
    step(case)
    wanted = bits(case)
    assert plan.apply(other) is other
    assert case.model._compiled_call_impl is None
    copied = case._replace(model=other)
    step(copied)
    assert all(torch.equal(a, b) for a, b in zip(wanted, bits(copied), strict=True))


def test_compiled_models_are_compiled_again_afterwards():
    case = gpt(dim=16)
    for block in case.model.blocks:
        block.compile(backend="eager")
    impls = [m._compiled_call_impl for m in case.model.modules()]
    plan = planned(case, "85%")
    plan.apply()
    step(case)
    plan.remove()
    assert impls == [m._compiled_call_impl for m in case.model.modules()]


def test_a_model_that_is_its_only_block():
    case = Case(nn.Linear(8, 8), (torch.randn(4, 8),), lambda y: y.sum())
    plan = planned(case, "100%", blocks=[case.model])
    plan.apply()
    step(case)
    plan.remove()
    assert case.model._compiled_call_impl is None


# ---- files ----


@pytest.mark.parametrize("name", ["gpt", "resnet", "encoder", "albert", "ragged"])
def test_saved_and_loaded(name, tmp_path):
    case = {"gpt": gpt, "resnet": resnet, "encoder": encoder, "albert": albert, "ragged": ragged}[name]()
    plan = planned(case, between(case, 0.1))
    step(case)
    plan.save(tmp_path / "plan.json")
    case.model.load_state_dict(before := copy.deepcopy(case.model.state_dict()))
    step(case)
    wanted = bits(case)
    loaded = recompute.Plan.load(tmp_path / "plan.json")
    assert loaded.schedule == plan.schedule
    assert loaded.profile == plan.profile
    assert (loaded.budget, str(loaded), repr(loaded)) == (plan.budget, str(plan), repr(plan))
    with pytest.raises(ValueError, match=r"apply\(model\)"):
        loaded.apply()
    case.model.load_state_dict(before)
    loaded.apply(case.model)
    step(case)
    assert all(torch.equal(a, b) for a, b in zip(wanted, bits(case), strict=True))


def test_a_profile_saved_and_loaded(tmp_path):
    chain = recompute.profile(*(case := gpt(dim=16))[:2], loss_fn=case.loss_fn)
    chain.save(tmp_path / "profile.json")
    assert recompute.ChainProfile.load(tmp_path / "profile.json") == chain
    with pytest.raises(ValueError, match="not a plan"):
        recompute.Plan.load(tmp_path / "profile.json")


def test_a_plan_with_objects_between_blocks_is_not_saved(tmp_path):
    class Layer(nn.Linear):
        def forward(self, x, dtype):
            return super().forward(x).to(dtype)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Layer(8, 8) for _ in range(3))

        def forward(self, x):
            for layer in self.layers:
                x = layer(x, torch.float32)
            return x

    plan = planned(Case(Model(), (torch.randn(4, 8),), lambda y: y.sum()), "100%")
    with pytest.raises(TypeError, match=r"a plan can be saved.*got a dtype for block layers\.0"):
        plan.save(tmp_path / "plan.json")
    assert not (tmp_path / "plan.json").exists()


# ---- other shapes ----


def test_other_shapes_get_a_plan_of_their_own():
    case = gpt(dim=16, length=32)
    plan = planned(case, int(planned(case, "100%").budget * 0.9))
    tokens = [torch.randint(0, 61, (2, n)) for n in (32, 24, 32, 16, 24)]
    calls = []
    case.model.register_forward_pre_hook(lambda *args: calls.append(1))

    def losses():
        found = []
        for t in tokens:
            torch.manual_seed(3)
            loss = case.model(t).square().mean()
            case.model.zero_grad()
            loss.backward()
            found += [loss.detach(), *bits(case)]
        return found

    case.model.train()
    plan.apply()
    case = case._replace(loss_fn=lambda y: y.square().mean())
    plan.remove()
    plan = planned(case, plan.budget)
    wanted = losses()
    plan.apply()
    calls.clear()
    found = losses()
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))
    assert len(calls) <= 5 + 2 * 5  # 24 and 16 are measured, once each
    assert plan.profile.signature == "int64[2, 24]"
    calls.clear()
    losses()
    assert len(calls) == 5
    plan.remove()
    assert all(m._compiled_call_impl is None for m in case.model.modules())


def shapes_case():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 8)) for _ in range(6)))
    return Case(model, (torch.randn(64, 8),), lambda y: y.square().mean())


def test_other_shapes_are_an_error_where_they_should_be():
    case = shapes_case()
    plan = planned(case, "90%", on_new_shapes="error")
    plan.apply()
    step(case)
    with pytest.raises(ValueError, match=r"inputs float32\[64, 8\], got float32\[65, 8\].*on_new_shapes"):
        case.model(torch.randn(65, 8))
    with torch.no_grad():
        case.model(torch.randn(65, 8))
    step(case)


def test_a_plan_kept_for_other_shapes():
    case = shapes_case()
    budget = between(case, 0.05)
    plan = planned(case, budget, on_new_shapes="keep")
    smaller = case._replace(inputs=(torch.randn(40, 8),))
    step(smaller)
    wanted = bits(smaller)
    plan.apply()
    step(smaller)
    assert all(torch.equal(a, b) for a, b in zip(wanted, bits(smaller), strict=True))
    assert measured_peak(smaller) <= budget


def test_a_budget_too_small_for_other_shapes_names_the_least_and_leaves_the_plan():
    case = shapes_case()
    plan = planned(case, "80%")
    plan.apply()
    step(case)
    wanted = bits(case)
    with pytest.raises(ValueError, match="budget must be at least"):
        case.model(torch.randn(640, 8))
    step(case)
    assert all(torch.equal(a, b) for a, b in zip(wanted, bits(case), strict=True))
    plan.remove()


def test_a_copy_makes_no_plans_for_other_shapes():
    case = shapes_case()
    plan = planned(case, "90%")
    model = plan.apply(copy.deepcopy(case.model))
    with pytest.raises(ValueError, match="make another plan"):
        model(torch.randn(65, 8))


# ---- which blocks ----


def names_of(plan):
    return [b.name for b in plan.profile.blocks[1:-1]]


def test_blocks_by_name_container_and_module():
    case = gpt(dim=16, layers=4)
    every = [f"blocks.{k}" for k in range(4)]
    assert names_of(planned(case, "100%")) == every
    assert names_of(planned(case, "100%", blocks="blocks")) == every
    assert names_of(planned(case, "100%", blocks=tuple(every))) == every
    assert names_of(planned(case, "100%", blocks=list(case.model.blocks))) == every
    assert names_of(planned(case, "100%", blocks=case.model.blocks)) == every
    assert names_of(planned(case, "100%", blocks=["blocks.1", case.model.blocks[2]])) == every[1:3]
    assert names_of(planned(case, "100%", blocks=["embedding"])) == ["embedding"]


def test_blocks_of_a_sequential_model_are_its_children():
    case = shapes_case()
    assert names_of(planned(case, "100%")) == [str(k) for k in range(6)]


# ---- reports ----


def test_print():
    case = shapes_case()
    plan = planned(case, between(case, 0.2))
    text = str(plan)
    for k in range(6):
        assert re.search(rf"\b{k}\b", text)
    assert "recompute x1" in text
    assert "always kept" in text
    assert "predicted peak" in text
    assert "persistent schedule" in text
    assert "6 blocks" in repr(plan)
    assert max(map(len, text.splitlines())) <= 200
    assert plan.timeline.peak <= plan.predicted_peak  # which has what segments hold, too
    assert plan.timeline.seconds == pytest.approx(plan.predicted_time)
    assert 0 <= plan.gap < 1


def test_print_and_progress_without_rich(monkeypatch):
    case = shapes_case()
    plan = planned(case, "90%")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "always kept" in str(plan)
    with pytest.raises(RuntimeError, match="pip install rich"):
        planned(case, "90%", progress=True)
    with pytest.raises(RuntimeError, match="pip install matplotlib"):
        plan.plot(io.BytesIO())


def test_progress(capsys):
    planned(shapes_case(), "90%", progress=True)


def test_plots(tmp_path):
    case = shapes_case()
    plan = planned(case, "80%")
    plan.plot(tmp_path / "plan.png")
    recompute.plot_pareto(plan.profile, recompute.pareto(plan.profile, 5), tmp_path / "pareto.png")
    for name in ("plan.png", "pareto.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


MODEL = """
import torch
from torch import nn

def small():
    return nn.Sequential(*(nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 8)) for _ in range(6)))

class Text(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.layers = nn.Embedding(9, 8), small()
    def forward(self, tokens):
        return self.layers(self.embedding(tokens))

ready = small()
"""


def command(tmp_path, *arguments):
    (tmp_path / "some_models.py").write_text(MODEL)
    return subprocess.run(
        [sys.executable, "-m", "pyperf_dl.recompute", *arguments],
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_the_command(tmp_path):
    done = command(
        tmp_path, "--model", "some_models:Text", "--inputs", "16x10:int64", "--budget", "90%", "--optimizer", "Adam",
        "--save", "plan.json", "--blocks", "layers",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "layers.3" in done.stdout
    assert "without recomputation:" in done.stdout
    assert len(json.loads((tmp_path / "plan.json").read_text())["names"]) == 6


BAD_COMMANDS = {
    "some_models": (["--model", "some_models", "--inputs", "4x8"], "must be module:callable"),
    "module": (["--model", "no_models:small", "--inputs", "4x8"], "no_models"),
    "attribute": (["--model", "some_models:large", "--inputs", "4x8"], "large"),
    "inputs": (["--model", "some_models:ready", "--inputs", "4xx8"], "--inputs must be shapes"),
    "dtype": (["--model", "some_models:ready", "--inputs", "4x8:int9"], "--inputs must be shapes"),
    "budget": (["--model", "some_models:ready", "--inputs", "4x8", "--budget", "1KiB"], "must be at least"),
    "shape": (["--model", "some_models:ready", "--inputs", "4x9"], "shapes cannot be multiplied"),
}


@pytest.mark.parametrize("name", BAD_COMMANDS)
def test_the_command_refuses(name, tmp_path, monkeypatch, capsys):
    from pyperf_dl.recompute import main

    (tmp_path / "some_models.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "some_models", raising=False)
    arguments, message = BAD_COMMANDS[name]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
