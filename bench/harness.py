"""What the benchmarks of all families share: cases, checked results, and timing in pairs.

A family adds `bench/bench_<stem>.py` with `cases(device, full) -> list[Case]`; run.py, report.py and pytest find it.

One sample of the floor, of ours and of each peer are taken in turn, in one process, and what is reported are medians
of the ratios within a turn. So a machine whose speed drifts slows both sides of a ratio.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

BENCH = Path(__file__).resolve().parent
sys.path.append(str(BENCH.parent))  # a tree that is built in place and not installed

import pyperf_dl  # noqa: E402
from pyperf_dl import _backend  # noqa: E402

# ---- cases ----


def _itself(inputs: Any) -> Any:
    return inputs


COPY = _itself  # a floor that is a copy of the bytes that `Case.moved` says
COPY_IS = "a copy of the same bytes"


@dataclass
class Peer:
    """Another implementation of what a case computes.

    Args:
        call: `call(prepared)`, the only thing that is timed.
        prepare: `prepare(inputs)` -> prepared: conversions and views, made once, not timed.
        agrees: `agrees(inputs, ours, theirs)`: whether it computed the same. A peer that does not is left out.
        scale: it runs on 1 / scale of the case's work, and its time is multiplied by this.
        compiles: its first call is far slower than the others.
    """

    call: Callable[[Any], Any]
    prepare: Callable[[Any], Any] = _itself
    agrees: Callable[[Any, Any, Any], bool] | None = None
    scale: float = 1.0
    compiles: bool = False


@dataclass
class Case:
    """One operator on one kind of input.

    Args:
        make: `make(generator)` -> tuple of input tensors on the case's device.
        ours: `ours(inputs)` -> tensor or tuple of tensors.
        error: `error(inputs, outputs, whole)` -> largest difference to the reference; `whole` asks for every output,
            else a sample of them will do. NaN or more than `tolerance` is a wrong result.
        moved: `moved(inputs, outputs)` -> bytes that any correct operator must move.
        floor: `floor(inputs)`, the least work, where that is no copy of `moved` bytes; None where nothing is.
        floor_is: what the floor is, in words.
        figures: `figures(inputs, outputs, entry)` -> numbers beside time and error, by the names of their columns;
            `entry` holds the times. Such cases have a table of their own.
        params: what the case varies, for tables and plots: `{"window": 33, "sweep": "window"}` puts it on that plot.
        cold: inputs are rotated on a GPU until they exceed its cache; False where the host's cost is the point.
        one_thread: it is measured with the first of the numbers of threads alone. Where that is 1, on a CPU, times are
            those of the process, which other programs do not lengthen.
        rounds: turns of a case whose calls are so long that they need no others before them. Peers have as many.
    """

    family: str
    op: str
    name: str
    dtype: torch.dtype | None
    device: str
    make: Callable[[torch.Generator], tuple[torch.Tensor, ...]]
    ours: Callable[[tuple[torch.Tensor, ...]], Any]
    error: Callable[[Any, Any, bool], float]
    moved: Callable[[Any, Any], int] = field(default=lambda inputs, outputs: tensor_bytes(inputs, outputs))
    peers: dict[str, Peer] = field(default_factory=dict)
    tolerance: float = 0.0
    params: dict[str, Any] = field(default_factory=dict)
    cold: bool = True
    floor: Callable[[Any], Any] | None = COPY
    floor_is: str = COPY_IS
    figures: Callable[[Any, Any, dict[str, Any]], dict[str, float]] | None = None
    one_thread: bool = False
    rounds: int | None = None

    @property
    def dtype_name(self) -> str:
        return "" if self.dtype is None else str(self.dtype).removeprefix("torch.")

    @property
    def title(self) -> str:
        return f"{self.op} {self.name} {self.dtype_name}".rstrip()

    def threads(self, wanted: Iterable[int]) -> list[int]:
        return list(wanted)[: 1 if self.one_thread else None]


@dataclass
class Budget:
    """How long to measure: turns, the length of one sample, and when a slow peer has been timed enough."""

    rounds: int
    sample_s: float
    peer_s: float
    whole: bool


QUICK = Budget(rounds=7, sample_s=0.012, peer_s=0.25, whole=False)
FULL = Budget(rounds=41, sample_s=0.015, peer_s=4.0, whole=True)


def tensors(tree: Any) -> Iterator[torch.Tensor]:
    """Every tensor in nested tuples and lists."""
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for part in tree:
            yield from tensors(part)


def tensor_bytes(*trees: Any) -> int:
    """Bytes of all tensors: inputs read once and outputs written once."""
    return sum(t.numel() * t.element_size() for t in tensors(trees))


def max_difference(got: Any, want: Any) -> float:
    """Largest absolute difference; NaN equals NaN, and another shape or dtype is infinitely wrong."""
    worst = 0.0
    for g, w in zip(tensors(got), tensors(want), strict=True):
        if g.shape != w.shape or g.dtype != w.dtype:
            return math.inf
        differs = (g != w) & ~((g != g) & (w != w))
        if differs.any():
            difference = (g[differs].double() - w[differs].double()).abs()
            worst = max(worst, difference.nan_to_num(math.inf, math.inf).max().item())
    return worst


def optional(name: str) -> Any:
    """A module, or None where it is not installed."""
    try:
        return importlib.import_module(name)
    except Exception:  # a package that is there and broken raises what it likes
        return None


def families() -> dict[str, Path]:
    """Every family that has a benchmark."""
    return {path.stem.removeprefix("bench_"): path for path in sorted(BENCH.glob("bench_*.py"))}


def discovered(family: str | None, device: str, full: bool) -> list[Case]:
    """The cases of one family, or of all."""
    if str(BENCH) not in sys.path:
        sys.path.insert(0, str(BENCH))
    names = [family] if family else list(families())
    return [case for name in names for case in importlib.import_module(f"bench_{name}").cases(device, full)]


# ---- timing ----


def set_threads(n: int) -> None:
    """Threads of torch and of every peer that can be told."""
    torch.set_num_threads(n)
    if "cv2" in sys.modules:
        sys.modules["cv2"].setNumThreads(n)


def pin_peers(n: int) -> None:
    """Threads of the peers that read the environment once, when they are imported."""
    for name in ("OMP", "MKL", "OPENBLAS", "NUMEXPR"):
        os.environ.setdefault(f"{name}_NUM_THREADS", str(n))
    os.environ.setdefault("POLARS_MAX_THREADS", str(n))


def _wall(run: Callable[[], Any], repeats: int) -> float:
    begin = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - begin) / repeats


def _process(run: Callable[[], Any], repeats: int) -> float:
    begin = time.process_time()
    for _ in range(repeats):
        run()
    return (time.process_time() - begin) / repeats


def _events(run: Callable[[], Any], repeats: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / repeats


SETTLED_S = 0.1  # a call this long has its caches settled in a fraction of it
SETTLING_CALLS = 10  # a large L3 keeps what it has seen several times: a call of 1 ms takes six to reach its speed


class Contender:
    """Something to time: a call, and the arguments it goes through in turn.

    `first_s` is its first call, which found caches and allocators as they were.
    """

    def __init__(self, call: Callable[[Any], Any], arguments: list[Any], device: str) -> None:
        self.call, self.arguments, self.turn = call, arguments, 0
        self.clock = _events if device == "cuda" else _wall
        self.samples: list[float] = []
        self.spent, self.repeats = 0.0, 1
        self.warms_up = True

    def _once(self) -> Any:
        self.turn = (self.turn + 1) % len(self.arguments)
        return self.call(self.arguments[self.turn])

    def first(self) -> Any:
        """The result on the first arguments."""
        results = []
        self.first_s = self.clock(lambda: results.append(self.call(self.arguments[0])), 1)
        return results[0]

    def calibrate(self, sample_s: float) -> None:
        """Finds how many calls make one sample long enough to be timed."""
        if self.first_s > 5 * sample_s:
            return
        once = self.clock(self._once, 1)
        while once * self.repeats < sample_s:
            self.repeats = max(self.repeats + 1, min(10 * self.repeats, math.ceil(sample_s / max(once, 1e-7))))
            once = self.clock(self._once, self.repeats)

    def settle(self) -> None:
        """Calls, untimed, until pages, caches and clocks are those of a program that calls again and again."""
        begin = time.perf_counter()
        while self.warms_up and time.perf_counter() - begin < SETTLED_S:
            self._once()

    def sample(self) -> float:
        if (
            self.warms_up and self.first_s < SETTLED_S
        ):  # caches as this contender's own calls leave them, whatever ran before it
            for _ in range(min(self.repeats, SETTLING_CALLS)):
                self._once()
        seconds = self.clock(self._once, self.repeats)
        self.samples.append(seconds)
        self.spent += seconds * self.repeats
        return seconds


def floor_contender(moved: int, copies: int, device: str) -> Contender:
    """`copy_` between tensors of its own that reads and writes `moved` bytes in all."""
    count = max(1, moved // 8)
    pairs = [(torch.rand(count, device=device), torch.empty(count, device=device)) for _ in range(copies)]
    return Contender(lambda pair: pair[1].copy_(pair[0]), pairs, device)


def quartiles(values: list[float]) -> list[float]:
    """First and third quartile."""
    if len(values) < 2:
        return [values[0]] * 2
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return [low, high]


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def _ratio(values: list[float], factor: float = 1.0) -> tuple[float, list[float]]:
    return _rounded(statistics.median(values) * factor), [_rounded(v * factor) for v in quartiles(values)]


def time_in_turn(
    floor: Contender | None, ours: Contender, peers: dict[str, Contender], budget: Budget
) -> dict[str, list[float]]:
    """Ratios, turn by turn: ours / floor under "floor", and each peer / ours."""
    both = [c for c in (floor, ours) if c is not None]
    ratios: dict[str, list[float]] = {name: [] for name in ("floor", *peers)}
    hopeless = {name for name, peer in peers.items() if peer.first_s > budget.peer_s}
    for contender in both:
        contender.settle()
    for contender in (*both, *peers.values()):
        contender.calibrate(budget.sample_s)
    for turn in range(budget.rounds):
        for contender in both if turn % 2 else reversed(both):
            contender.sample()
        if floor is not None:
            ratios["floor"].append(ours.samples[-1] / floor.samples[-1])
        for name, peer in peers.items():
            if name in hopeless and not peer.samples:
                peer.samples.append(peer.first_s)
            elif name not in hopeless and (len(peer.samples) < 2 or peer.spent < budget.peer_s):
                peer.sample()
            else:
                continue
            ratios[name].append(peer.samples[-1] / ours.samples[-1])
    return ratios


# ---- one case ----


def _rotation(case: Case, moved: int) -> int:
    """Copies of the inputs that exceed the GPU's cache four times."""
    if case.device != "cuda" or not case.cold:
        return 1
    cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return max(1, min(64, math.ceil(4 * cache / max(moved, 1))))


def _entry(case: Case, threads: int) -> dict[str, Any]:
    return {
        "family": case.family,
        "op": case.op,
        "case": case.name,
        "dtype": case.dtype_name,
        "device": case.device,
        "threads": threads,
        "backend": _backend.serving(torch.empty(0, device=case.device)),
        "ms": None,
        "floor_ms": None,
        "x_floor": None,
        "peers": {},
        "max_error": None,
        "status": "ok",
        "params": case.params,
    } | ({} if case.floor is COPY else {"floor": case.floor and case.floor_is})


DISAGREES = "does not compute the same here"


def _contender(case: Case, call: Callable[[Any], Any], arguments: list[Any], entry: dict[str, Any]) -> Contender:
    made = Contender(call, arguments, case.device)
    made.warms_up = case.rounds is None
    if case.one_thread and case.device == "cpu" and entry["threads"] == 1:
        made.clock = _process
    return made


def _ready_peers(case: Case, inputs: list[Any], outputs: Any, entry: dict[str, Any]) -> dict[str, Contender]:
    """Peers that run and agree; the entry is told of the others."""
    ready, found = {}, entry["peers"]
    for name, peer in case.peers.items():
        try:
            contender = _contender(case, peer.call, [peer.prepare(i) for i in inputs], entry)
            if peer.compiles:
                contender.first()
            theirs = contender.first()
            if peer.agrees is None or peer.agrees(inputs[0], outputs, theirs):
                ready[name] = contender
            else:
                found[name] = {"error": DISAGREES}
        except Exception as error:
            found[name] = {"error": f"{type(error).__name__}: {error}".split("\n")[0][:200]}
    return ready


def _measured(
    case: Case, inputs: list[Any], outputs: Any, peers: dict[str, Contender], entry: dict[str, Any], budget: Budget
) -> None:
    """Fills in times and ratios."""
    floor = None
    if case.floor is COPY:
        entry["bytes"] = case.moved(inputs[0], outputs)
        floor = floor_contender(entry["bytes"], len(inputs), case.device)
    elif case.floor is not None:
        floor = _contender(case, case.floor, inputs, entry)
    if floor is not None:
        floor.first()
    ours = _contender(case, case.ours, inputs, entry)
    ours.first()
    if case.rounds is not None:
        budget = replace(budget, rounds=case.rounds, peer_s=math.inf)
    ratios = time_in_turn(floor, ours, peers, budget)
    entry["ms"] = _rounded(statistics.median(ours.samples) * 1e3)
    if floor is not None:
        entry["floor_ms"] = _rounded(statistics.median(floor.samples) * 1e3)
        entry["x_floor"], entry["x_floor_quartiles"] = _ratio(ratios["floor"])
    for name, contender in peers.items():
        scale = case.peers[name].scale
        speedup, spread = _ratio(ratios[name], scale)
        entry["peers"][name] = {
            "ms": _rounded(statistics.median(contender.samples) * 1e3 * scale),
            "speedup": speedup,
            "speedup_quartiles": spread,
            "samples": len(contender.samples),
        }
        if scale != 1:
            entry["peers"][name]["measured_part"] = _rounded(1 / scale)


@contextlib.contextmanager
def _without_gc() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def generator(device: str, seed: int) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


class WrongResultError(Exception):
    """Ours differs from the reference by more than the case allows, or breaks another promise."""


def _checked(case: Case, inputs: Any, outputs: Any, entry: dict[str, Any], whole: bool) -> None:
    """Fills in the error.

    Raises:
        WrongResultError: it is too large.
    """
    error = case.error(inputs, outputs, whole)
    entry["max_error"] = error if math.isfinite(error) else None  # JSON has no infinity
    if not error <= case.tolerance:
        raise WrongResultError(f"differs from the reference by {error:.3g}")


def _outcome(case: Case, inputs: list[Any], entry: dict[str, Any], budget: Budget) -> None:
    """Checks, then times; a peer that disagrees has every output checked, for it may be the one that is right."""
    outputs = case.ours(inputs[0])
    _checked(case, inputs[0], outputs, entry, budget.whole)
    copies = _rotation(case, case.moved(inputs[0], outputs)) if case.floor is COPY else 1
    inputs += [case.make(generator(case.device, seed)) for seed in range(len(inputs), copies)]
    peers = _ready_peers(case, inputs, outputs, entry)
    if not budget.whole and any(peer.get("error") == DISAGREES for peer in entry["peers"].values()):
        _checked(case, inputs[0], outputs, entry, True)
    with _without_gc():
        _measured(case, inputs, outputs, peers, entry, budget)
    if case.figures is not None:
        figures = case.figures(inputs[0], outputs, entry)
        entry["figures"] = {name: _rounded(value) for name, value in figures.items()}


def run_case(case: Case, threads: Iterable[int], budget: Budget) -> Iterator[dict[str, Any]]:
    """One result for each number of threads; nothing is timed that was not found right just before."""
    inputs: list[Any] = []
    for n in case.threads(threads):
        set_threads(n)
        entry = _entry(case, n)
        try:
            inputs = inputs or [case.make(generator(case.device, 0))]
            _outcome(case, inputs, entry, budget)
        except WrongResultError as wrong:
            entry["status"], entry["message"] = "WRONG", str(wrong)
        except Exception as failure:  # one broken case must not hide the others
            entry["status"], entry["message"] = "ERROR", f"{type(failure).__name__}: {failure}".split("\n")[0][:300]
        yield entry


def failures(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [r for r in results if r["status"] != "ok"]


def in_pytest(case: Case, benchmark: Any) -> None:
    """One case under pytest-benchmark: its table shows our time, `extra_info` in its JSON holds the ratios."""
    from machine import cores, keep_freed_memory

    keep_freed_memory()
    (entry,) = run_case(case, [cores()], QUICK)
    assert entry["status"] == "ok", f"{case.title}: {entry['status']} {entry['max_error']} {entry.get('message', '')}"
    benchmark.group = f"{case.family} {case.device}"
    benchmark.extra_info.update(entry)
    inputs = case.make(generator(case.device, 0))

    def once() -> None:
        case.ours(inputs)
        if case.device == "cuda":
            torch.cuda.synchronize()

    iterations = max(1, int(QUICK.sample_s * 1e3 / entry["ms"]))
    benchmark.pedantic(once, rounds=QUICK.rounds, iterations=iterations, warmup_rounds=1)


__all__ = [
    "BENCH",
    "FULL",
    "QUICK",
    "Budget",
    "Case",
    "Peer",
    "WrongResultError",
    "discovered",
    "failures",
    "families",
    "in_pytest",
    "max_difference",
    "optional",
    "pyperf_dl",
    "run_case",
    "set_threads",
    "tensor_bytes",
]
