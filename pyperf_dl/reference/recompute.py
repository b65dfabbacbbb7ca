"""What `pyperf_dl.recompute` solves and simulates, in plain Python: short, slow, and without rounding.

The best persistent schedule, the best of all schedules of a tiny chain, and the closed form for equal blocks.
"""

from __future__ import annotations

import heapq
import itertools
import math
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .._recompute_chain import ChainProfile, Node, Option, Timeline


def simulate(profile: ChainProfile, nodes: Iterable[Node]) -> Timeline:
    """Every event of a schedule, its peaks with `ChainProfile.fixed_bytes`; ValueError where nodes are no schedule."""
    from .._recompute_chain import Event, Timeline

    blocks, events, ran, waiting = profile.blocks, [], set(), iter(nodes)
    now = 0.0

    def event(what: str, k: int, seconds: float, peak: int, after: int) -> None:
        nonlocal now
        events.append(Event(what, k, now, seconds, peak, after))
        now += seconds
        ran.add(k)

    def backward(s: int, option: Option, live: int) -> None:
        event("backward", s, option.backward, live + option.backward_peak, live + size_before(s))

    def size_before(k: int) -> int:
        return blocks[k - 1].output_bytes if k else 0

    def train(s: int, t: int, live: int) -> None:
        node = next(waiting, None)
        if node is None or (node.first, node.last) != (s, t):
            raise ValueError(f"a node must train blocks {s}, ..., {t}, got {node}")
        gradient = blocks[t].output_bytes
        if node.split is None:
            if not 0 <= node.option < len(blocks[s].options):
                raise ValueError(f"block {s} has no option {node.option}")
            option = blocks[s].options[node.option]
            after = live + gradient + option.saved_bytes
            event("history", s, option.forward, live + gradient + option.history_peak, after)
            todo.append((backward, s, option, live))
            if s < t:
                todo.append((train, s + 1, t, live + option.saved_bytes))
            return
        if not s < node.split <= t:
            raise ValueError(f"a split must lie behind the first block, got {node}")
        for k in range(s, node.split):
            if not blocks[k].recomputable:
                raise ValueError(f"block {k} is not recomputable, got {node}")
            seconds = blocks[k].forward + (profile.frame_seconds if k == s else 0)
            peak = live + gradient + (size_before(k) if k > s else 0) + blocks[k].forward_peak
            after = live + gradient + blocks[k].output_bytes
            event("replay" if k in ran else "forward", k, seconds, peak, after)
        todo.append((train, s, node.split - 1, live))
        todo.append((train, node.split, t, live + size_before(node.split)))

    todo: list[Any] = [(train, 0, len(blocks) - 1, profile.fixed_bytes)]
    while todo:
        call, *arguments = todo.pop()
        call(*arguments)
    if next(waiting, None) is not None:
        raise ValueError("there are more nodes than the schedule has")
    return Timeline(tuple(events))


def entry_peak(profile: ChainProfile, option: Option, t: int) -> int:
    """Bytes that a block needs to run with history and backward, where t is the last block that is trained with it."""
    return max(profile.blocks[t].output_bytes + option.history_peak, option.backward_peak)


def splits(profile: ChainProfile, s: int, t: int) -> Iterator[tuple[int, int, float]]:
    """Every j such that s, ..., j - 1 may run without history, the bytes they need for that, and their time."""
    peak, seconds, before = 0, profile.frame_seconds, 0
    for k, block in enumerate(profile.blocks[s:t], s):
        if not block.recomputable:
            return
        peak = max(peak, profile.blocks[t].output_bytes + before + block.forward_peak)
        seconds += block.forward
        before = block.output_bytes
        yield k + 1, peak, seconds


def optimum(
    profile: ChainProfile, available: int, resolution: int = 1, deadline: float = math.inf
) -> list[Node] | None:
    """Nodes of the fastest persistent schedule in `available` bytes; None where none fits.

    For blocks s, ..., t a list of (bytes, seconds, split, option) in which bytes rise and seconds fall: a step function
    of the memory. Above a resolution of 1 byte, sizes are rounded up to multiples of it.
    """
    from .._recompute_chain import Node

    length, blocks = len(profile), profile.blocks

    def up(size: int) -> int:
        return -(-size // resolution) * resolution

    steps: dict[tuple[int, int], list[tuple[int, float, int | None, int]]] = {}
    for t, back in itertools.product(range(length), range(length)):
        s = t - back
        if s < 0:
            continue
        if time.monotonic() > deadline:
            raise TimeoutError
        found: list[tuple[int, float, int | None, int]] = []
        for o, option in enumerate(blocks[s].options):
            need, seconds = up(entry_peak(profile, option, t)), option.forward + option.backward
            rest = [(0, 0.0)] if s == t else [(up(option.saved_bytes) + m, v) for m, v, _, _ in steps[s + 1, t]]
            found += [(max(need, m), seconds + v, None, o) for m, v in rest]
        for j, peak, seconds in splits(profile, s, t):
            kept = up(blocks[j - 1].output_bytes)
            right = [(kept + m, v) for m, v, _, _ in steps[j, t]]
            left = [(m, v) for m, v, _, _ in steps[s, j - 1]]
            for m in sorted({m for m, _ in right + left}):
                both = [min((v for at, v in side if at <= m), default=math.inf) for side in (right, left)]
                found.append((max(up(peak), m), seconds + sum(both), j, 0))
        row = steps[s, t] = []
        for step in sorted((step for step in found if step[0] <= available), key=lambda step: step[:2]):
            if step[1] < (row[-1][1] if row else math.inf):
                row.append(step)

    def nodes(s: int, t: int, memory: int) -> Iterator[Node]:
        todo = [(s, t, memory)]
        while todo:
            s, t, memory = todo.pop()
            memory, _, split, option = [step for step in steps[s, t] if step[0] <= memory][-1]
            yield Node(s, t, split, option)
            if split is not None:
                todo += [(s, split - 1, memory), (split, t, memory - up(blocks[split - 1].output_bytes))]
            elif s < t:
                todo += [(s + 1, t, memory - up(blocks[s].options[option].saved_bytes))]

    return list(nodes(0, length - 1, available)) if steps[0, length - 1] else None


def least_memory(profile: ChainProfile) -> list[Node]:
    """Nodes of a persistent schedule with the least peak."""
    from .._recompute_chain import Node

    length, blocks = len(profile), profile.blocks
    best: dict[tuple[int, int], tuple[int, int | None, int]] = {}
    for t, back in itertools.product(range(length), range(length)):
        s = t - back
        if s < 0:
            continue
        choices: list[tuple[int, int | None, int]] = []
        for o, option in enumerate(blocks[s].options):
            rest = 0 if s == t else option.saved_bytes + best[s + 1, t][0]
            choices.append((max(entry_peak(profile, option, t), rest), None, o))
        for j, peak, _ in splits(profile, s, t):
            choices.append((max(peak, blocks[j - 1].output_bytes + best[j, t][0], best[s, j - 1][0]), j, 0))
        best[s, t] = min(choices, key=lambda choice: choice[0])
    nodes, todo = [], [(0, length - 1)]
    while todo:
        s, t = todo.pop()
        _, split, option = best[s, t]
        nodes.append(Node(s, t, split, option))
        if split is not None:
            todo += [(s, split - 1), (split, t)]
        elif s < t:
            todo.append((s + 1, t))
    return nodes


def any_schedule(profile: ChainProfile, available: int) -> float:
    """Seconds of the fastest of all schedules, persistent or not, without frame costs: Dijkstra, for 6 blocks at most.

    A state is what each block holds (nothing, its output, or what one of its options keeps), and the block whose
    backward comes next. Infinite where nothing fits.
    """
    blocks = profile.blocks
    nothing, output = -2, -1

    def size(k: int, held: int) -> int:
        if held == nothing:
            return 0
        return blocks[k].output_bytes if held == output else blocks[k].options[held].saved_bytes

    start = ((nothing,) * len(blocks), len(blocks) - 1)
    best, queue = {start: 0.0}, [(0.0, start)]
    while queue:
        seconds, state = heapq.heappop(queue)
        held, last = state
        if last < 0:
            return seconds
        if seconds > best[state]:
            continue
        live = sum(map(size, range(len(blocks)), held)) + blocks[last].output_bytes

        def go(k: int, holds: int, to: int, cost: float, seconds: float = seconds, held: Any = held) -> None:
            new = ((*held[:k], holds, *held[k + 1 :]), to)
            if seconds + cost < best.get(new, math.inf):
                best[new] = seconds + cost
                heapq.heappush(queue, (seconds + cost, new))

        for k in range(last + 1):
            block = blocks[k]
            if held[k] != nothing:
                go(k, nothing, last, 0.0)
            elif k == 0 or held[k - 1] != nothing:
                if block.recomputable and live + block.forward_peak <= available:
                    go(k, output, last, block.forward)
                for o, option in enumerate(block.options):
                    if live + option.history_peak <= available:
                        go(k, o, last, option.forward)
        if held[last] >= 0 and (last == 0 or held[last - 1] != nothing):
            option = blocks[last].options[held[last]]
            if live - blocks[last].output_bytes - option.saved_bytes + option.backward_peak <= available:
                go(last, nothing, last - 1, option.backward)
    return math.inf


def revolve(steps: int, checkpoints: int) -> int:
    """Forward steps without history that reverse a chain of equal steps with that many stored states, the first one
    included: r * steps - C(checkpoints + r, r - 1) for the least r with C(checkpoints + r, r) >= steps
    (Griewank, Walther 2000)."""
    r = 0
    while math.comb(checkpoints + r, r) < steps:
        r += 1
    return r * steps - (math.comb(checkpoints + r, r - 1) if r else 0)


def random_chain(length: int, seed: int, options: int = 1) -> ChainProfile:
    """A chain of unlike blocks, the same for the same seed."""
    import random

    from .._recompute_chain import Block, ChainProfile, Option

    draw = random.Random(seed)
    blocks, before = [], 0
    for k in range(length):
        x = draw.randint(20, 200)
        saved = [int(x * draw.uniform(1.5, 8))]
        saved += [x + (saved[0] - x) * o // options for o in range(options - 1, 0, -1)]
        forward = draw.uniform(0.5, 5)
        ways = tuple(
            Option(
                f"way {o}", forward, forward * (2 + 0.3 * o), kept, saved[0] + x // 4, saved[0] + before + x + x // 2
            )
            for o, kept in enumerate(saved)
        )
        blocks.append(Block(f"block {k}", forward, x, x + x // 2, ways))
        before = x
    return ChainProfile(tuple(blocks), fixed_bytes=1000)


def check_cases(device: str, quick: bool) -> Iterator[tuple[Any, ...]]:
    """(operator, case, dtype, run, expected, tolerance): predicted time, and that the peak is as simulated and within
    the budget, against the reference optimum. The solver has no device."""
    import torch

    from .. import _recompute_solver
    from .._recompute_chain import keep_everything

    if device != "cpu":
        return
    for length, part, options in itertools.product((6, 11) if quick else (6, 11, 16), (0.4, 0.6), (1, 2)):
        chain = random_chain(length, seed=length, options=options)
        full = simulate(chain, keep_everything(chain)).peak - chain.fixed_bytes
        available = int(full * part)

        def run(chain: ChainProfile = chain, available: int = available) -> tuple[torch.Tensor, torch.Tensor]:
            budget = available + chain.fixed_bytes
            try:
                found = _recompute_solver.solve(chain, budget)
            except ValueError:
                return torch.tensor(math.inf, dtype=torch.float64), torch.tensor(True)
            peak = simulate(chain, found.nodes).peak
            return torch.tensor(found.predicted_time, dtype=torch.float64), torch.tensor(
                peak == found.predicted_peak <= budget
            )

        def expected(chain: ChainProfile = chain, available: int = available) -> tuple[torch.Tensor, torch.Tensor]:
            nodes = optimum(chain, available)
            seconds = math.inf if nodes is None else simulate(chain, nodes).seconds
            return torch.tensor(seconds, dtype=torch.float64), torch.tensor(True)

        name = f"{length} blocks, {options} option(s), {part:.0%} of the peak"
        yield "recompute.solve", name, torch.float64, run, expected, 1e-9
