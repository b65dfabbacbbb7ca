"""Schedules of activation recompute under a budget of bytes: the search, its bounds, and the simulation of a result."""

from __future__ import annotations

import abc
import functools
import importlib
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from . import _backend, _checks
from ._recompute_chain import Block, ChainProfile, Event, Node, Schedule, Timeline, relative_gap
from .reference import recompute as _reference

METHODS = ("auto", "flat", "slots", "exact")

_GAP = 2e-3  # where the search by itself is content
_EXACT_BLOCKS = 32  # a chain that is solved exactly in any case: milliseconds
_WORK = 4e8  # units of `Progress`, about nanoseconds, of one search that nobody asked for by name
_MOST_BYTES = 1 << 62


def solve(
    profile: ChainProfile,
    budget_bytes: int,
    *,
    time_limit: float | None = None,
    memory_limit: int = 2 << 30,
    method: str = "auto",
) -> Schedule:
    """A persistent schedule of forward and backward that takes least time within a budget of bytes.

    With the input of block s, the gradient of the output of block t and m bytes, training s, ..., t takes C(s, t, m) =
    the least of e + b + C(s + 1, t, m - X) over the options of s, and of c + f_s + ... + f_{j-1} + C(j, t, m - x_{j-1})
    + C(s, j - 1, m) over s < j <= t, where their peaks fit. Flat schedules, which run each block at most twice, are
    searched first; a bound that holds for every persistent schedule says whether nested ones can gain.

    Args:
        profile: the chain of blocks.
        budget_bytes: peak of the whole step, `profile.fixed_bytes` included.
        time_limit: seconds; what was found until then is returned. None: as long as `method` takes.
        memory_limit: bytes that one table of the search may take.
        method: "flat"; "slots" (all persistent schedules, bytes rounded for the search); "exact" (bytes as they are:
            milliseconds for 30 blocks, a tenth of a second for 80); "auto": flat, then the others while they are cheap
            and the gap is above 0.2 %; without a limit where no flat schedule fits.

    Returns:
        The schedule, whose simulated peak is within the budget, with its bounds. Deterministic without a time limit.

    Raises:
        TypeError, ValueError: an argument is none of the above.
        ValueError: no schedule fits; the message has the least budget and the block that decides it.

    The recursion is that of Beaumont et al., "Optimal checkpointing for heterogeneous chains" (HAL hal-02352969); its
    case of equal blocks that keep nothing is Revolve (Griewank, Walther 2000). Checkmate (Jain et al. 2020) solves the
    same for graphs by integer programming.

    >>> from pyperf_dl import recompute
    >>> chain = recompute.ChainProfile.from_lists(
    ...     forward=[1, 1, 1], backward=[2, 2, 2], output_bytes=[10, 10, 10], saved_bytes=[50, 50, 50]
    ... )
    >>> sum(recompute.solve(chain, 130).replays)
    1
    """
    op = "recompute.solve"
    _check_profile(op, profile)
    budget = _checks.integer(op, "budget_bytes", budget_bytes, 1)
    memory_limit = _checks.integer(op, "memory_limit", memory_limit, 1)
    if time_limit is not None:
        time_limit = _checks.number(op, "time_limit", time_limit, 0)
    if method not in METHODS:
        raise ValueError(f"{op}: method must be one of {', '.join(map(repr, METHODS))}, got {method!r}")
    available = min(budget - profile.fixed_bytes, _MOST_BYTES)
    make = _Reference if _native() is None else _Native
    search = make(profile, available, math.inf if time_limit is None else time_limit, memory_limit)
    if available >= 0:
        search.run(method)
    if search.nodes is None:
        least, block = least_budget(profile)
        raise ValueError(
            f"{op}: budget_bytes must be at least {_bytes(least)}, which block {block} ({profile.blocks[block].name}) "
            f"needs, got {_bytes(budget)}"
        )
    return Schedule(
        tuple(Node(*node) for node in search.nodes),
        predicted_peak=search.peak + profile.fixed_bytes,
        predicted_time=search.seconds,
        bound=min(search.bound, search.seconds),
        flat_bound=max(search.bound, search.flat_bound),
        complete=search.complete,
    )


def simulate(profile: ChainProfile, schedule: Schedule | Iterable[Node]) -> Timeline:
    """What every block does under a schedule, when, and how many bytes are there, `profile.fixed_bytes` included.

    Args:
        profile: the chain of blocks.
        schedule: a schedule, or its nodes.

    Returns:
        The timeline; its peak is what `Schedule.predicted_peak` says.

    Raises:
        ValueError: the nodes are no schedule of this chain.

    >>> from pyperf_dl import recompute
    >>> chain = recompute.ChainProfile.from_lists(forward=[1], backward=[2], output_bytes=[10], saved_bytes=[50])
    >>> [(event.what, event.start, event.peak) for event in recompute.simulate(chain, [recompute.Node(0, 0)])]
    [('history', 0.0, 60), ('backward', 1.0, 60)]
    """
    _check_profile("recompute.simulate", profile)
    nodes = schedule.nodes if isinstance(schedule, Schedule) else tuple(Node(*node) for node in schedule)
    native = _native()
    try:
        if native is None:
            return _reference.simulate(profile, nodes)
        events = native.simulate(_chain(native, profile), nodes)
    except ValueError as error:
        raise ValueError(f"recompute.simulate: schedule must be one of this chain: {error}") from None
    fixed = profile.fixed_bytes
    return Timeline(tuple(Event(*event[:4], event[4] + fixed, event[5] + fixed) for event in events))


def least_budget(profile: ChainProfile) -> tuple[int, int]:
    """The least budget that any persistent schedule fits in, and the block whose peak decides it.

    Args:
        profile: the chain of blocks.

    Returns:
        Bytes of the whole step, `profile.fixed_bytes` included, and the index of the block.

    >>> from pyperf_dl import recompute
    >>> chain = recompute.ChainProfile.from_lists(
    ...     forward=[1, 1], backward=[2, 2], output_bytes=[10, 10], saved_bytes=[50, 50]
    ... )
    >>> recompute.least_budget(chain)
    (80, 1)
    """
    _check_profile("recompute.least_budget", profile)
    native = _native()
    if native is None:
        nodes = _reference.least_memory(profile)
    else:
        nodes = native.least_memory(_chain(native, profile), native.Progress(math.inf, math.inf))
    worst = max(simulate(profile, nodes), key=lambda event: event.peak)
    return worst.peak, worst.block


def _check_profile(op: str, profile: Any) -> None:
    if not isinstance(profile, ChainProfile):
        raise TypeError(f"{op}: profile must be a ChainProfile, got {_checks.described(profile)}")
    total = 0
    for block in profile.blocks:
        sizes = [block.output_bytes, block.forward_peak, *(size for option in block.options for size in option[3:])]
        if not all(hasattr(size, "__index__") for size in sizes):
            raise TypeError(f"{op}: profile must have bytes that are ints, got {block}")
        total += sum(sizes)
    if total >= _MOST_BYTES:
        raise ValueError(f"{op}: profile must have less than 2**62 bytes in all, got {total}")


def _bytes(count: int) -> str:
    return f"{count} bytes ({count / 2**20:.2f} MiB)"


@functools.cache
def _compiled() -> Any:
    try:
        return importlib.import_module("pyperf_dl._host").recompute
    except ImportError:
        return None


def _native() -> Any:
    """The compiled solver; None where it is not installed, or the reference is forced."""
    return None if _backend._forced == "reference" else _compiled()


def _chain(native: Any, profile: ChainProfile) -> Any:
    return native.Chain(profile.blocks, profile.frame_seconds, profile.kinds)


def _cheapest(block: Block) -> int:
    return min(range(len(block.options)), key=lambda o: sum(block.options[o][1:3]))


class _Search(abc.ABC):
    """The best schedule so far, in bytes without the fixed ones, and what is known about better ones."""

    def __init__(self, profile: ChainProfile, available: int, time_limit: float, memory_limit: int) -> None:
        self.profile = profile
        self.available = available
        self.deadline = time.monotonic() + time_limit
        self.memory_limit = memory_limit
        self.nodes: Any = None
        self.peak = 0
        self.seconds = math.inf
        self.least_seconds = sum(min(o.forward + o.backward for o in block.options) for block in profile.blocks)
        self.bound = self.flat_bound = self.least_seconds
        self.complete = True

    @abc.abstractmethod
    def cost(self, nodes: Any) -> tuple[int, float]:
        """Peak and seconds."""

    def offer(self, nodes: Any) -> bool:
        """Takes nodes that fit and are faster than what there is."""
        if not nodes:
            return False
        peak, seconds = self.cost(nodes)
        if peak > self.available or seconds >= self.seconds:
            return False
        self.nodes, self.peak, self.seconds = nodes, peak, seconds
        return True

    def offer_everything(self) -> bool:
        last = len(self.profile) - 1
        return self.offer([Node(k, last, None, _cheapest(block)) for k, block in enumerate(self.profile.blocks)])


class _Native(_Search):
    """By the compiled tables, which hold time above `least_seconds`."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.native = _native()
        self.chain = _chain(self.native, self.profile)
        self.stopped = ""
        saved = Counter(block.options[0].saved_bytes for block in self.profile.blocks)
        self.repeats = list(saved.items()) if 16 * len(saved) < len(self.profile) else []

    def cost(self, nodes: Any) -> tuple[int, float]:
        return self.native.cost(self.chain, nodes)

    def limited(self, search: Callable[..., Any], *arguments: Any, work: float = math.inf) -> Any:
        """What a search finds; None where a limit ends it."""
        progress = self.native.Progress(self.deadline - time.monotonic(), work)
        self.stopped = ""
        try:
            return search(self.chain, *arguments, progress)
        except self.native.Limit as limit:
            self.stopped = str(limit)
            self.complete = self.complete and self.stopped == "work"
            return None

    @property
    def gap(self) -> float:
        return relative_gap(self.seconds, self.bound)

    @property
    def extra(self) -> float:
        """What a schedule may take that is worth finding."""
        return max(self.seconds - self.least_seconds, 0.0)

    def slots(self, count: int) -> tuple[int, int, int]:
        """Bytes of a slot, slots of the budget, and how far a table has to go that rounds to nearest."""
        size = max(1, -(-self.available // count))
        if self.repeats and size > 1:  # larger ones that nearly divide what equal blocks keep lose less
            larger = {s // i for s, _ in self.repeats for i in range(1 + s // (4 * size), 1 + s // size)}
            lost = {other: sum(n * (s % other) for s, n in self.repeats) for other in larger | {size}}
            enough = max(min(lost.values()), 3e-4 * sum(n * s for s, n in self.repeats))
            size = max(other for other in lost if lost[other] <= enough)
        budget = self.available // size
        margin = 0 if size == 1 else 1 + min(len(self.profile) // 2, budget // 16)
        return size, budget, budget + margin

    def run(self, method: str) -> None:
        if self.offer_everything():
            return
        if method in ("auto", "flat"):
            self.flat()
        if method == "flat" and self.nodes is not None:
            return
        if self.nodes is None:
            # Slow as it may be, this schedule fits where any does.
            progress = self.native.Progress(math.inf, math.inf)
            if not self.offer(self.native.least_memory(self.chain, progress)) or method == "flat":
                return
            if method == "auto":
                self.bounds(self.flat_slots())
                self.nested(math.inf)
        elif self.nested_may_gain():
            self.nested(_WORK)
        if method == "exact":
            self.exact(math.inf)
        if method == "slots":
            self.table(16384, math.inf)

    def nested_may_gain(self) -> bool:
        blocks = len(self.profile)
        if blocks <= _EXACT_BLOCKS or self.gap <= _GAP:
            return blocks <= _EXACT_BLOCKS
        # In a long chain the gap may be that of rounding to slots.
        return blocks <= 2 * _EXACT_BLOCKS or self.flat_bound > self.bound * (1 + _GAP / 2)

    def flat(self) -> None:
        """The best flat schedule by slots, and bounds; once more where the slots were too few."""
        rounding = self.native.Rounding
        for finer in (1, 2):
            count = self.flat_slots(finer)
            if count < 1:
                self.complete = False
                return
            size, budget, top = self.slots(count)
            found = self.limited(self.native.flat, self.available, size, top, rounding.nearest)
            if found == []:
                found = self.limited(self.native.flat, self.available, size, budget, rounding.up)
            self.offer(found)
            if self.nodes is None:
                return
            if not self.bounds(count) or self.gap <= 2 * _GAP or self.nested_may_gain():
                return

    def flat_slots(self, finer: int = 1) -> int:
        blocks = len(self.profile)
        # Rounding loses up to half a slot for each block that is kept.
        wanted = 4096 if blocks <= _EXACT_BLOCKS else min(8192 + 16 * blocks, 24576)
        if 0 < len(self.repeats) <= 3:
            wanted //= 2
        return min(finer * wanted, int(self.memory_limit / (4.5 * (blocks + 1))))

    def bounds(self, count: int) -> bool:
        """Lower bounds for all schedules and, where those do not tell enough, for the flat ones; whether by so many
        slots."""
        wanted = count
        while count >= 64:
            size, budget, _ = self.slots(count)
            found = self.limited(self.native.flat_bound, size, budget, True, self.extra, work=2 * _WORK)
            if found is not None:
                self.raise_bound(found)
                break
            if self.stopped != "work":
                return False
            count //= 4
        if self.gap > _GAP and count >= 64:
            found = self.limited(self.native.flat_bound, size, budget, False, self.extra)
            if found is not None:
                self.flat_bound = max(self.flat_bound, self.least_seconds + self.rounded(found))
        return count == wanted

    def rounded(self, extra: float) -> float:
        """A little below `extra`, a sum in single precision of two terms a block and a few more."""
        return extra * (1 - (2 * len(self.profile) + 16) * 2.0**-24)

    def raise_bound(self, extra: float) -> None:
        self.bound = max(self.bound, min(self.least_seconds + self.rounded(extra), self.seconds))

    def nested(self, work: float) -> None:
        """Schedules that are not flat: exactly where that is cheap, else by more and more slots."""
        if len(self.profile) <= 2 * _EXACT_BLOCKS and self.exact(_WORK):
            return
        for count in (256, 1024, 4096, 16384):
            if self.gap <= _GAP or not self.table(count, work):
                return
            work = min(work, 4 * _WORK)

    def exact(self, work: float) -> bool:
        """Whether it was done."""
        most = self.extra * (1 + 1e-9)
        found = self.limited(self.native.steps, self.available, most, self.memory_limit, work=work)
        if found is None:
            return False
        self.offer(found)
        self.bound = self.seconds
        return True

    def table(self, count: int, work: float) -> bool:
        """Whether it was done."""
        size, budget, top = self.slots(count)
        rounding = self.native.Rounding
        for how, end in ((rounding.nearest, top), (rounding.up, budget)):
            most = self.extra * (1 - 1e-6)
            found = self.limited(self.native.table, self.available, size, end, how, most, self.memory_limit, work=work)
            if found is None:
                return False
            if self.offer(found) or size == 1:
                break
        most = self.extra * (1 + 1e-5)
        found = self.limited(self.native.table_bound, size, budget, most, self.memory_limit, work=min(work, 4 * _WORK))
        if found is None:
            return False
        self.raise_bound(min(found, self.extra))
        return True


class _Reference(_Search):
    """By the reference, for installations without the compiled solver: slow, and with rounded bytes for long chains."""

    def cost(self, nodes: Any) -> tuple[int, float]:
        line = _reference.simulate(self.profile, nodes)
        return line.peak - self.profile.fixed_bytes, line.seconds

    def run(self, method: str) -> None:
        if self.offer_everything():
            return
        if not self.offer(_reference.least_memory(self.profile)):
            return
        exact = method == "exact" or len(self.profile) <= _EXACT_BLOCKS // 2
        resolution = 1 if exact else max(1, self.available // 96)
        try:
            self.offer(_reference.optimum(self.profile, self.available, resolution, self.deadline))
        except TimeoutError:
            self.complete = False
            return
        if resolution == 1:
            self.bound = self.seconds
