"""Bytes: the recorder against known patterns, and against a tracker of live storages; the profiler against both."""

import random
import weakref

import pytest
import torch
from recompute_models import CASES
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from pyperf_dl import recompute
from pyperf_dl._recompute_memory import MemoryRecorder, storage_bytes

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


class LiveStorages(TorchDispatchMode):
    """Bytes of the storages that operators have made since, and that somebody holds; sees every operator's outputs,
    those of a backward too, but nothing that an operator takes and gives back inside."""

    def __init__(self, existing=()):
        super().__init__()
        self._known = weakref.WeakSet()
        self._known_ids = {t.untyped_storage()._cdata for t in existing}
        self._finalizers = []
        self.now = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for t in pytree.tree_leaves((made,)):
            if isinstance(t, torch.Tensor):
                self._see(t.untyped_storage())
        return made

    def _see(self, storage):
        if storage._cdata in self._known_ids:
            return
        self._known_ids.add(storage._cdata)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._lose, storage._cdata, storage.nbytes())

    def _lose(self, address, size):
        self._known_ids.discard(address)
        self.now -= size


def usage_of(function):
    """Peak and what is left, by the recorder."""
    with MemoryRecorder(CPU) as recorder, recorder.phase("x"):
        held = function()
    del held
    return recorder.usages["x"]


def tracked(function, existing):
    with LiveStorages(existing) as tracker:
        held = function()
        left = tracker.now
    del held
    return tracker.peak, left


# ---- the recorder ----


def chain_of_three(x):
    y = x + x
    y = y * x  # two at a time
    return y.relu()


def held(x):
    parts = [x + x for _ in range(5)]
    total = torch.cat(parts)
    del parts
    return total


def in_place(x):
    y = x + x
    for _ in range(10):
        y.mul_(x)
    return y.view(-1)[:1]  # holds all of it


def with_graph(x):
    w = torch.empty_like(x).requires_grad_()
    y = (w * x) * x  # keeps x twice, and no product
    y.sum().backward()
    return w.grad


PATTERNS = {
    "three in a row": (chain_of_three, 8000, 4000),
    "held together": (held, 40000, 20000),
    "in place, and a view": (in_place, 4000, 4000),
    "nothing": (lambda x: x.view(10, 100).t()[3], 0, 0),
    "made and lost": (lambda x: (x + x).sum() and None, 4004, 0),
    "no elements": (lambda x: x.new_empty(0), 0, 0),
    "a storage that grows": (lambda x: torch.empty(10).untyped_storage().resize_(400), 440, 400),
}


@pytest.mark.parametrize("name", PATTERNS)
def test_known_patterns_are_exact(name):
    function, peak, after = PATTERNS[name]
    x = torch.ones(1000)
    usage = usage_of(lambda: function(x))
    assert usage == (peak, after)
    assert recompute.peak_memory(lambda: function(x)) == peak


def test_a_backward_is_counted():
    x = torch.ones(1000)
    usage = usage_of(lambda: with_graph(x))
    assert usage.after == 4000
    assert usage == tracked(lambda: with_graph(x), [x]) == (usage.peak, 4000)


def test_phases_are_apart_and_the_largest_of_a_name_counts():
    x = torch.ones(1000)
    with MemoryRecorder(CPU) as recorder:
        with recorder.phase("a"):
            first = x + x
        with recorder.phase("b"):
            second = first + x
            del first
        with recorder.phase("c"), recorder.phase("inside"):
            del second
        for times in (1, 3, 2):
            with recorder.phase("again"):
                kept = [x + x for _ in range(times)]
            del kept
        outside = x + x
    del outside
    assert recorder.usages == {
        "a": (4000, 4000), "b": (4000, 0), "c": (0, -4000), "inside": (0, -4000), "again": (12000, 12000),
    }  # fmt: skip


def test_an_error_leaves_no_profiler_behind():
    with pytest.raises(ZeroDivisionError):
        recompute.peak_memory(lambda: 1 // 0)
    assert recompute.peak_memory(lambda: torch.ones(10)) == 40
    with torch.profiler.profile():
        torch.ones(3).add_(1)


def random_program(seed, backwards):
    """A function that makes, keeps, overwrites and drops tensors; the same each time."""

    def run():
        choose = random.Random(seed)
        pool = [torch.ones(choose.randint(1, 64)) for _ in range(3)]
        parameter = nn.Parameter(torch.ones(16))
        parameter.grad = torch.zeros(16)  # the engine adds to it, whoever else looks at the tensors
        for _ in range(choose.randint(5, 60)):
            what, a, b = choose.randrange(9), choose.choice(pool), choose.choice(pool)
            if what == 0:
                pool.append(torch.empty(choose.randint(0, 5000), dtype=choose.choice([torch.float64, torch.int8])))
            elif what == 1:
                pool.append(torch.cat([a.flatten(), b.flatten().to(a.dtype)]))
            elif what == 2:
                pool.append(a.flatten()[: choose.randint(0, a.numel())])
            elif what == 3 and len(pool) > 3:
                del pool[choose.randrange(len(pool))]
            elif what == 4:
                pool.append((parameter * parameter).relu())
            elif what == 5 and backwards:
                sum((t.sum() for t in pool if t.requires_grad), parameter.sum()).backward()
                pool = [t.detach() for t in pool]
            elif what == 6:
                pool[choose.randrange(len(pool))] = a.clone()
            elif what == 7:
                parameter.grad = torch.zeros(16)
            else:
                pool.append(a.detach().neg())
        del a, b
        return pool, parameter

    return run


@pytest.mark.parametrize("block", range(2))
def test_random_programs_as_a_tracker_of_storages_has_them(block):
    for seed in range(block * 12, block * 12 + 12):
        run = random_program(seed, backwards=False)
        assert usage_of(run) == tracked(run, []), seed
        run = random_program(seed, backwards=True)
        usage, (peak, left) = usage_of(run), tracked(run, [])
        assert usage.after == left, seed
        assert 0 <= peak - usage.peak <= 64, seed  # a tracker in Python holds the engine's arguments, 16 numbers here


def test_storage_bytes_counts_a_storage_once():
    x = torch.ones(100)
    assert storage_bytes([x, x.view(10, 10), x[:3], torch.ones(5, dtype=torch.int8)]) == 405
    assert storage_bytes([]) == 0


@pytest.mark.parametrize("name", CASES)
def test_steps_of_models_as_a_tracker_of_storages_has_them(name):
    """What is left is the same to the byte, but for constants of 8 bytes that are no operator's outputs, and buffers
    that are replaced; the peak may be higher by what an operator takes inside."""
    case = CASES[name]()
    replaced = 4 * sum(
        b.nbytes for b in case.model.buffers()
    )  # the profiler does not see that the old ones are released
    slack = {"encoder": 64, "ragged": 8, "power": replaced}.get(name, 0)
    parameters = list(case.model.parameters())
    for p in parameters:
        p.grad = torch.zeros_like(p)
    existing = [*parameters, *(p.grad for p in parameters), *case.model.buffers()]
    existing += [t for t in pytree.tree_leaves(case.inputs) if isinstance(t, torch.Tensor)]
    case.loss().backward()  # what is made once for all

    def forward():
        return case.loss()

    def step():
        case.loss().backward()

    for function in (forward, step):
        peak, left = tracked(function, [*existing, *case.model.buffers()])
        usage = usage_of(function)
        assert abs(usage.after - left) <= slack
        assert peak - slack <= usage.peak <= peak * 1.1 + slack
