"""The solver of `recompute` against the reference, exhaustive search, Dijkstra, integer programming and Revolve."""

import itertools
import math
import random
import signal
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

import pyperf_dl
from pyperf_dl import _recompute_solver as solver
from pyperf_dl._recompute_chain import Block, ChainProfile, Node, Option, Schedule, keep_everything
from pyperf_dl._recompute_solver import least_budget, simulate, solve
from pyperf_dl.reference import recompute as reference

compiled = pytest.mark.skipif(solver._compiled() is None, reason="the compiled solver is not there")
close = pytest.approx


def full_peak(profile):
    return simulate(profile, keep_everything(profile)).peak


def part_of_peak(profile, part):
    return int(full_peak(profile) * part)


def periodic_chain(length, kinds, seed):
    blocks = reference.random_chain(kinds, seed).blocks
    return ChainProfile(tuple(blocks[k % kinds] for k in range(length)))


def reference_seconds(profile, budget):
    nodes = reference.optimum(profile, budget - profile.fixed_bytes)
    return math.inf if nodes is None else reference.simulate(profile, nodes).seconds


def every_schedule(profile, first=0, last=None):
    """All persistent schedules, as lists of nodes."""
    last = len(profile) - 1 if last is None else last
    for option in range(len(profile.blocks[first].options)):
        rest = every_schedule(profile, first + 1, last) if first < last else [[]]
        yield from ([Node(first, last, None, option), *nodes] for nodes in rest)
    for split in range(first + 1, last + 1):
        if not profile.blocks[split - 1].recomputable:
            break
        left = list(every_schedule(profile, first, split - 1))
        for right, again in itertools.product(every_schedule(profile, split, last), left):
            yield [Node(first, last, split), *right, *again]


def check(profile, schedule, budget):
    """What holds for every schedule that `solve` returns."""
    line = reference.simulate(profile, schedule.nodes)
    assert line.peak == schedule.predicted_peak <= budget
    assert line.seconds == close(schedule.predicted_time, rel=1e-12)
    assert schedule.bound <= schedule.predicted_time
    assert schedule.bound <= schedule.flat_bound or schedule.flat_bound == 0
    assert not any(n > 0 and not b.recomputable for n, b in zip(schedule.replays, profile.blocks, strict=True))


@st.composite
def chains(draw, longest=5, options=2):
    sizes = draw(st.sampled_from([st.integers(0, 12), st.integers(1, 1000), st.sampled_from([0, 1, 7, 1 << 40])]))
    seconds = draw(st.sampled_from([st.just(0.0), st.integers(0, 4).map(float), st.floats(0, 1e3, width=32)]))
    blocks = []
    for k in range(draw(st.integers(1, longest))):
        x = draw(sizes)
        ways = tuple(
            Option(f"way {o}", draw(seconds), draw(seconds), draw(sizes), draw(sizes), draw(sizes))
            for o in range(draw(st.integers(1, options)))
        )
        recomputable = draw(st.integers(0, 5)) > 0
        blocks.append(Block(f"block {k}", draw(seconds), x, x + draw(sizes), ways, recomputable))
    return ChainProfile(tuple(blocks), draw(sizes), draw(seconds))


# ---- against other ways to the optimum ----


@given(chains(), st.floats(0, 1))
def test_exhaustive_search(profile, part):
    costs = []
    for nodes in every_schedule(profile):
        line = reference.simulate(profile, nodes)
        flat = max(Schedule(tuple(nodes), 0, 0).replays) <= 1
        costs.append((line.peak, line.seconds, flat))
    least = min(peak for peak, _, _ in costs)
    assert least_budget(profile)[0] == least
    budget = int(least + part * (max(peak for peak, _, _ in costs) - least))
    if budget < 1:
        return
    best = min(seconds for peak, seconds, _ in costs if peak <= budget)
    best_flat = min((seconds for peak, seconds, flat in costs if peak <= budget and flat), default=math.inf)
    assert reference_seconds(profile, budget) == close(best)
    for method in solver.METHODS:
        found = solve(profile, budget, method=method)
        check(profile, found, budget)
        assert found.complete
        if method != "flat" or best_flat == math.inf:
            assert found.predicted_time >= best * (1 - 1e-9)
        assert found.bound <= best * (1 + 1e-9)
        assert found.flat_bound <= best_flat * (1 + 1e-9)
        if method in ("auto", "exact"):
            assert found.predicted_time == close(best)
            assert found.gap == close(0, abs=1e-9)


@given(chains(longest=9, options=3), st.floats(0, 1))
@settings(max_examples=60)
def test_reference_optimum(profile, part):
    least = least_budget(profile)[0]
    budget = max(1, int(least + part * (full_peak(profile) - least)))
    for method in ("auto", "exact"):
        found = solve(profile, budget, method=method)
        check(profile, found, budget)
        assert found.predicted_time == close(reference_seconds(profile, budget))


@given(chains(longest=6, options=2))
@settings(max_examples=60)
def test_timelines_agree_with_the_reference(profile):
    nodes = solve(profile, max(1, least_budget(profile)[0])).nodes
    assert list(simulate(profile, nodes)) == list(reference.simulate(profile, nodes))


@pytest.mark.parametrize("seed", range(8))
def test_best_of_all_schedules(seed):
    """No persistent schedule beats Dijkstra over all schedules, which is at most a fifth better."""
    profile = reference.random_chain(3 + seed % 3, seed, options=1 + seed % 2)
    least = least_budget(profile)[0]
    for part in (0.0, 0.3, 0.7, 1.0):
        budget = int(least + part * (full_peak(profile) - least))
        best = reference.any_schedule(profile, budget - profile.fixed_bytes)
        found = solve(profile, budget).predicted_time
        assert best * (1 - 1e-9) <= found <= 1.25 * best
    assert found == close(best)


def flat_by_integer_programming(profile, available):
    """A path through blocks 0, ..., L of arcs "keep block s" and "run s, ..., j - 1 again", under a memory constraint
    on each arc that is taken; blocks of one option."""
    blocks, length = profile.blocks, len(profile)
    last = blocks[-1].output_bytes
    arcs = []  # from, to, seconds, bytes that stay, bytes it needs
    for s, block in enumerate(blocks):
        option = block.options[0]
        need = max(last + option.history_peak, option.backward_peak)
        arcs.append((s, s + 1, option.forward + option.backward, option.saved_bytes, need))
        for j, run, seconds in reference.splits(profile, s, length - 1):
            kept, need = 0, run
            for again in blocks[s:j]:
                option = again.options[0]
                peak = max(blocks[j - 1].output_bytes + option.history_peak, option.backward_peak)
                need, kept = max(need, kept + peak), kept + option.saved_bytes
                seconds += option.forward + option.backward
            arcs.append((s, j, seconds, blocks[j - 1].output_bytes, need))
    rows, low, high = [], [], []
    for at in range(length + 1):
        rows.append([float(a[0] == at) - float(a[1] == at) for a in arcs])
        low.append(float(at == 0) - float(at == length))
        high.append(low[-1])
    for i, arc in enumerate(arcs):
        most = sum(other[3] for other in arcs) + arc[4]
        rows.append([other[3] if other[1] <= arc[0] else 0.0 for other in arcs])
        rows[-1][i] += most
        low.append(-np.inf)
        high.append(available - arc[4] + most)
    done = milp(
        [arc[2] for arc in arcs],
        constraints=LinearConstraint(np.array(rows), low, high),
        integrality=np.ones(len(arcs)),
        bounds=Bounds(0, 1),
    )
    return done.fun if done.success else math.inf


@pytest.mark.parametrize(("length", "seed"), [(4, 0), (5, 1), (6, 2), (7, 3), (8, 4), (8, 5)])
@pytest.mark.parametrize("part", [0.45, 0.6, 0.8])
def test_integer_programming(length, seed, part):
    profile = reference.random_chain(length, seed)
    budget = part_of_peak(profile, part)
    best = flat_by_integer_programming(profile, budget - profile.fixed_bytes)
    if budget < least_budget(profile)[0]:
        assert best == math.inf
        return
    found = solve(profile, budget, method="flat")
    assert found.flat_bound <= best * (1 + 1e-9)
    if max(found.replays) <= 1:
        assert found.predicted_time == close(best)


@pytest.mark.parametrize("checkpoints", [1, 2, 3, 5])
@pytest.mark.parametrize("length", [1, 2, 7, 20, 45])
def test_revolve(length, checkpoints):
    """Equal blocks of which one at a time can keep its history."""
    profile = ChainProfile.from_lists(
        forward=[1] * length, backward=[1] * length, output_bytes=[1] * length, saved_bytes=[1000] * length,
        backward_peak=[1002] * length,
    )  # fmt: skip
    found = solve(profile, 1002 + checkpoints)  # the first state is free, the one a step starts from is not
    assert found.predicted_time - 2 * length == reference.revolve(length, checkpoints)
    assert found.gap <= 0.01


def test_revolve_of_the_paper():
    """Figures 1 and 3 of Griewank and Walther (2000): 10 steps with 3 states, and the steps that r sweeps reach."""
    assert reference.revolve(10, 3) == 15
    assert [reference.revolve(math.comb(3 + r, r), 3) for r in (1, 2, 3)] == [3, 15, 45]


@compiled
@given(st.integers(0, 10**6), st.integers(3, 12), st.integers(1, 3), st.integers(8, 200), st.floats(0, 0.9))
def test_bounds_by_few_slots(seed, length, options, slots, part):
    """Rounding to few slots makes bounds weak, never wrong."""
    profile = reference.random_chain(length, seed, options)
    least = least_budget(profile)[0]
    available = int(least + part * (full_peak(profile) - least)) - profile.fixed_bytes
    best = solve(profile, available + profile.fixed_bytes, method="exact").predicted_time
    flat = solve(profile, available + profile.fixed_bytes, method="flat")
    native = solver._compiled()
    chain, progress = native.Chain(profile.blocks, 0.0, profile.kinds), native.Progress(math.inf, math.inf)
    size = -(-available // slots)
    for most in (math.inf, 1.5 * (best - chain.seconds), best - chain.seconds):
        for bound in (
            native.flat_bound(chain, size, available // size, True, most, progress),
            native.table_bound(chain, size, available // size, most, 1 << 30, progress),
        ):
            assert min(bound, most) <= (best - chain.seconds) * (1 + 1e-5)
        bound = native.flat_bound(chain, size, available // size, False, most, progress)
        if max(flat.replays) <= 1:
            assert min(bound, most) <= (flat.predicted_time - chain.seconds) * (1 + 1e-5)


# ---- chains of useful lengths ----


@compiled
@pytest.mark.parametrize("part", [0.2, 0.3, 0.5])
@pytest.mark.parametrize(("length", "options"), [(24, 1), (40, 2), (56, 1), (80, 1)])
def test_within_one_percent_of_the_optimum(length, options, part):
    profile = reference.random_chain(length, length, options)
    budget = max(part_of_peak(profile, part), least_budget(profile)[0])
    best = solve(profile, budget, method="exact")
    check(profile, best, budget)
    assert best.gap == 0
    for method in ("auto", "slots"):
        found = solve(profile, budget, method=method)
        check(profile, found, budget)
        assert best.predicted_time * (1 - 1e-9) <= found.predicted_time <= 1.01 * best.predicted_time
        assert found.bound <= best.predicted_time * (1 + 1e-9)
    flat = solve(profile, budget, method="flat")
    assert flat.bound <= best.predicted_time * (1 + 1e-9)
    assert flat.predicted_time >= best.predicted_time * (1 - 1e-9)


@compiled
@pytest.mark.parametrize("part", [0.2, 0.6])
@pytest.mark.parametrize("kinds", [None, 1, 3])
def test_a_thousand_blocks(kinds, part):
    profile = periodic_chain(1000, kinds, 3) if kinds else reference.random_chain(1000, 3)
    budget = part_of_peak(profile, part)
    found = solve(profile, budget)
    check(profile, found, budget)
    assert found.complete
    assert found.flat_gap <= 0.005
    assert found.gap <= 0.01


@compiled
@pytest.mark.parametrize("kinds", [1, 2, 3])
def test_equal_blocks_share_what_is_known(kinds):
    """With each block a kind of its own the table is larger and says the same."""
    profile = periodic_chain(50, kinds, seed=kinds)
    native = solver._compiled()
    chains = [native.Chain(profile.blocks, 0.1, numbers) for numbers in (profile.kinds, tuple(range(50)))]
    available = part_of_peak(profile, 0.12)
    for rounding in (native.Rounding.nearest, native.Rounding.up):
        progress = native.Progress(math.inf, math.inf)
        plans = [
            native.table(chain, available, -(-available // 500), 500, rounding, math.inf, 1 << 30, progress)
            for chain in chains
        ]
        assert plans[0]
        assert plans[0] == plans[1]
    shared, plain = (native.table_bound(c, -(-available // 500), 500, math.inf, 1 << 30, progress) for c in chains)
    assert shared == plain > 0


@compiled
def test_tight_budgets_of_a_long_chain():
    profile = periodic_chain(400, 3, seed=5)
    least, block = least_budget(profile)
    assert simulate(profile, solve(profile, least)).peak == least
    assert 0 <= block < 400
    before = math.inf
    for factor in (1.0, 1.02, 1.3, 2.0, 4.0):
        found = solve(profile, int(least * factor))
        check(profile, found, int(least * factor))
        assert found.predicted_time <= before
        before = found.predicted_time


@pytest.mark.parametrize("seed", range(6))
def test_bytes_of_any_size(seed):
    """Peaks stay within the budget whatever rounding to slots does to the sizes."""
    draw = random.Random(seed)
    length = 20 + 10 * seed
    sizes = [1, 2, 3, 1 << 20, (1 << 20) + 1, 1 << 40, (1 << 40) - 1][: 3 + 2 * (seed % 3)]
    pick = [[draw.choice(sizes) for _ in range(length)] for _ in range(2)]
    profile = ChainProfile.from_lists(
        forward=[draw.choice([0, 1e-9, 1, 1000]) for _ in range(length)], backward=[1] * length,
        output_bytes=pick[0], saved_bytes=[a + b for a, b in zip(*pick, strict=True)],
    )  # fmt: skip
    least, full = least_budget(profile)[0], full_peak(profile)
    for part in (0.0, 1e-6, 0.1, 0.5, 0.9, 1.0):
        budget = int(least + part * (full - least))
        found = solve(profile, budget)
        check(profile, found, budget)
    assert found.predicted_time == close(sum(o.forward + o.backward for (o,) in (b.options for b in profile.blocks)))


def test_an_option_that_offloads():
    """It keeps almost nothing, takes a little longer, and is worth it for the block whose forward is long."""
    keep = Option("keep", 1, 2, 100, 100, 120)
    offload = Option("offload", 1.5, 2.5, 10, 100, 120)
    cheap = [Block(f"block {k}", 0.5, 10, 10, (keep, offload)) for k in range(3)]
    dear = Block("dear", 5, 10, 10, (keep._replace(forward=5, backward=10), offload._replace(forward=5.5, backward=10)))
    profile = ChainProfile((dear, *cheap))
    everything = full_peak(profile)
    assert solve(profile, everything).kept_options == (0, 0, 0, 0)
    found = solve(profile, everything - 90)
    assert found.predicted_time == 15 + 9 + 0.5
    assert (found.kept_options[0], found.replays[0]) in [(1, 0), (0, 0)]
    assert solve(profile, everything - 270).kept_options[0] == 1
    assert solve(profile, everything - 270).replays[0] == 0


def test_what_is_not_recomputable_is_kept():
    blocks = list(reference.random_chain(12, 1).blocks)
    blocks[0], blocks[7], blocks[11] = (blocks[k]._replace(recomputable=False) for k in (0, 7, 11))
    profile = ChainProfile(tuple(blocks))
    budget = least_budget(profile)[0]
    assert budget > least_budget(ChainProfile(tuple(b._replace(recomputable=True) for b in blocks)))[0]
    found = solve(profile, budget)
    check(profile, found, budget)
    assert [found.replays[k] for k in (0, 7, 11)] == [0, 0, 0]
    assert max(found.replays) > 0


def test_frames_cost_time():
    blocks = reference.random_chain(30, 2).blocks
    budget = part_of_peak(ChainProfile(blocks), 0.3)
    segments = []
    for seconds in (0.0, 20.0):
        found = solve(ChainProfile(blocks, frame_seconds=seconds), budget)
        segments.append(sum(node.split is not None for node in found.nodes))
    assert segments[1] < segments[0]


def test_fixed_bytes_shift_the_budget():
    profile = reference.random_chain(20, 4)
    bare = ChainProfile(profile.blocks)
    budget = part_of_peak(bare, 0.5)
    found = solve(profile, budget + profile.fixed_bytes)
    assert found.nodes == solve(bare, budget).nodes
    assert found.predicted_peak == solve(bare, budget).predicted_peak + profile.fixed_bytes


# ---- limits ----


@pytest.fixture
def long_search():
    """A chain and a budget whose search takes many seconds: unlike blocks, and no flat schedule fits."""
    profile = reference.random_chain(500, 6)
    return profile, int(1.3 * least_budget(profile)[0])


@compiled
def test_a_signal_ends_the_search(long_search):
    class AlarmError(Exception):
        pass

    def ring(number, frame):
        raise AlarmError

    before = signal.signal(signal.SIGALRM, ring)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        start = time.perf_counter()
        with pytest.raises(AlarmError):
            solve(*long_search)
        assert time.perf_counter() - start < 0.6
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@compiled
@pytest.mark.parametrize("seconds", [0, 0.2])
def test_time_limit(long_search, seconds):
    start = time.perf_counter()
    found = solve(*long_search, time_limit=seconds)
    assert time.perf_counter() - start < seconds + 0.5
    assert not found.complete
    check(*[long_search[0], found, long_search[1]])
    assert 0 < found.bound < found.predicted_time
    assert 0 < found.gap < math.inf


@compiled
@pytest.mark.parametrize("memory", [1, 100_000, 4 << 20])
def test_memory_limit(long_search, memory):
    profile, budget = long_search
    found = solve(profile, budget, memory_limit=memory)
    check(profile, found, budget)
    assert not found.complete
    assert found.gap > 0


def test_the_same_again():
    profile = reference.random_chain(60, 8)
    budget = part_of_peak(profile, 0.25)
    assert solve(profile, budget) == solve(profile, budget)


# ---- without the compiled solver ----


@pytest.mark.parametrize(("length", "part"), [(8, 0.6), (14, 0.4), (24, 0.35)])
def test_without_the_compiled_solver(length, part, monkeypatch):
    profile = reference.random_chain(length, length, options=2)
    budget = max(part_of_peak(profile, part), least_budget(profile)[0])
    best = solve(profile, budget, method="exact").predicted_time
    least = least_budget(profile)
    monkeypatch.setattr(solver, "_compiled", lambda: None)
    assert least_budget(profile) == least
    found = solve(profile, budget)
    check(profile, found, budget)
    assert best * (1 - 1e-9) <= found.predicted_time <= best * (1 + 1e-9 if length <= 16 else 1.05)
    assert found.bound <= best * (1 + 1e-9)
    assert solve(profile, budget, time_limit=0).predicted_time >= found.predicted_time
    assert not solve(profile, budget, time_limit=0).complete


def test_forced_reference_is_taken(monkeypatch):
    profile = reference.random_chain(8, 1)
    asked = []
    monkeypatch.setattr(reference, "optimum", lambda *arguments: asked.append(arguments))
    with pyperf_dl.backend("reference"):
        solve(profile, part_of_peak(profile, 0.8))
    assert asked


@pytest.mark.parametrize("quick", [True, False])
def test_cases_of_the_check(quick):
    cases = list(reference.check_cases("cpu", quick))
    assert len(cases) >= 8
    for op, case, _, run, expected, tolerance in cases:
        for got, want in zip(run(), expected(), strict=True):
            error = abs(float(got) - float(want)) if math.isfinite(float(want)) else float(got != want)
            assert error <= tolerance * max(1.0, abs(float(want))) or got == want, (op, case)
    assert not list(reference.check_cases("cuda", quick))


# ---- errors ----


def test_infeasible_budget_says_what_it_takes():
    profile = reference.random_chain(10, 0)
    least, block = least_budget(profile)
    assert solve(profile, least).predicted_peak == least
    for budget in (least - 1, profile.fixed_bytes, 1):
        with pytest.raises(
            ValueError, match=rf"^recompute.solve: budget_bytes must be at least {least} bytes"
        ) as error:
            solve(profile, budget)
        assert f"block {block} ({profile.blocks[block].name})" in str(error.value)
        assert f"got {budget} bytes" in str(error.value)
        assert "MiB" in str(error.value)


GOOD = reference.random_chain(4, 0)


@pytest.mark.parametrize(
    ("error", "message", "arguments", "named"),
    [
        (TypeError, "profile must be a ChainProfile, got 3", (3, 100), {}),
        (TypeError, "budget_bytes must be an int, got '6GiB'", (GOOD, "6GiB"), {}),
        (TypeError, r"budget_bytes must be an int, got 1e\+?0?9|got 1000000000.0", (GOOD, 1e9), {}),
        (ValueError, "budget_bytes must be >= 1, got 0", (GOOD, 0), {}),
        (ValueError, "budget_bytes must be >= 1, got -5", (GOOD, -5), {}),
        (TypeError, "time_limit must be a number, got 'long'", (GOOD, 10**6), {"time_limit": "long"}),
        (ValueError, r"time_limit must be >= 0, got -1", (GOOD, 10**6), {"time_limit": -1}),
        (ValueError, "time_limit must be", (GOOD, 10**6), {"time_limit": math.nan}),
        (ValueError, "memory_limit must be >= 1, got 0", (GOOD, 10**6), {"memory_limit": 0}),
        (TypeError, "memory_limit must be an int, got None", (GOOD, 10**6), {"memory_limit": None}),
        (ValueError, "method must be one of 'auto', 'flat', 'slots', 'exact', got 'ilp'", (GOOD, 1), {"method": "ilp"}),
    ],
)
def test_arguments_of_solve(error, message, arguments, named):
    with pytest.raises(error, match=r"^recompute.solve: ") as raised:
        solve(*arguments, **named)
    assert raised.match(message)


def test_sizes_of_a_profile():
    block = GOOD.blocks[0]
    with pytest.raises(TypeError, match=r"recompute.solve: profile must have bytes that are ints, got Block"):
        solve(ChainProfile((block._replace(output_bytes=1.5),)), 1000)
    with pytest.raises(ValueError, match=r"recompute.least_budget: profile must have less than 2\*\*62 bytes in all"):
        least_budget(ChainProfile((block._replace(output_bytes=1 << 62),)))


@pytest.mark.parametrize(
    "nodes",
    [
        [],
        [Node(0, 3)],
        [*keep_everything(GOOD), Node(3, 3)],
        [Node(0, 3, None, 7), *keep_everything(GOOD)[1:]],
        [Node(0, 3, None, -1), *keep_everything(GOOD)[1:]],
        [Node(0, 3, 0)],
        [Node(0, 3, 4)],
        [Node(0, 2), Node(1, 2), Node(2, 2)],
    ],
)
@pytest.mark.parametrize("native", [True, False])
def test_nodes_that_are_no_schedule(nodes, native, monkeypatch):
    if not native:
        monkeypatch.setattr(solver, "_compiled", lambda: None)
    with pytest.raises(ValueError, match=r"^recompute.simulate: schedule must be one of this chain: "):
        simulate(GOOD, nodes)


@pytest.mark.parametrize("native", [True, False])
def test_a_schedule_that_runs_again_what_it_may_not(native, monkeypatch):
    if not native:
        monkeypatch.setattr(solver, "_compiled", lambda: None)
    fixed = ChainProfile((GOOD.blocks[0]._replace(recomputable=False), *GOOD.blocks[1:2]))
    with pytest.raises(ValueError, match="block 0"):
        simulate(fixed, [Node(0, 1, 1), Node(1, 1), Node(0, 0)])


def test_profiles_of_several_processes_are_merged():
    def chain(forward, saved, fixed):
        return ChainProfile.from_lists(
            forward=forward, backward=[2, 2], output_bytes=[10, 10], saved_bytes=saved, fixed_bytes=fixed
        )

    merged = ChainProfile.merged([chain([1, 3], [50, 70], 5), chain([3, 3], [60, 40], 9)])
    assert [block.forward for block in merged.blocks] == [2, 3]
    assert [block.options[0].saved_bytes for block in merged.blocks] == [60, 70]
    assert merged.fixed_bytes == 9
    other = ChainProfile.from_lists(forward=[1], backward=[2], output_bytes=[10], saved_bytes=[50])
    with pytest.raises(ValueError, match="of the same blocks"):
        ChainProfile.merged([merged, other])
