"""Bytes of tensors, as the allocator counts them."""

from __future__ import annotations

import bisect
import contextlib
import gc
import os
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch.autograd.profiler import profile, record_function
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

_MARK = "pyperf_dl.recompute:"


class Usage(NamedTuple):
    """Bytes of a phase above what was there when it began: most during it, and left behind it."""

    peak: int
    after: int


class MemoryRecorder:
    """Exact bytes of phases of a program on one device; `usages` holds them when the context is left.

    On CUDA these are the allocator's own statistics. On a CPU they are the allocator's own reports, which the profiler
    of PyTorch collects: every allocation and release of a tensor's memory, whoever holds the tensor. Memory that a
    library takes without PyTorch's allocator (oneDNN's scratch, say) is in neither.

    Phases with the same name are one: the largest counts.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.usages: dict[str, Usage] = {}
        self._profile: Any = None

    def __enter__(self) -> MemoryRecorder:
        self._collected = gc.isenabled()
        gc.disable()  # what waits for it would count as released in between
        if self.device.type != "cuda":
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else each session writes lines to stderr
            # torch.profiler would make a Python object of each event, which takes longer than the step.
            self._profile = profile(use_kineto=True, profile_memory=True)
            self._profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._collected:
            gc.enable()
        if self._profile is None:
            return
        self._profile.__exit__(*error)
        if error[0] is None:
            self._read(self._profile.kineto_results.events())

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        if self._profile is not None:
            with record_function(_MARK + name):
                yield
            return
        torch.cuda.synchronize(self.device)
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        yield
        torch.cuda.synchronize(self.device)
        peak = torch.cuda.max_memory_allocated(self.device) - before
        self._add(name, Usage(peak, torch.cuda.memory_allocated(self.device) - before))

    def _add(self, name: str, usage: Usage) -> None:
        self.usages[name] = max(usage, self.usages.get(name, usage))

    def _read(self, events: Iterable[Any]) -> None:
        changes, phases = [], []
        for event in events:
            if event.name() == "[memory]":
                changes.append((event.start_ns(), event.nbytes()))
            elif event.name().startswith(_MARK):
                phases.append((event.start_ns(), event.end_ns(), event.name()[len(_MARK) :]))
        changes.sort(key=lambda change: change[0])
        times = [when for when, _ in changes]
        phases.sort()
        for begin, end, name in phases:
            bytes_now = peak = 0
            for _, change in changes[bisect.bisect_left(times, begin) : bisect.bisect_right(times, end)]:
                bytes_now += change
                peak = max(peak, bytes_now)
            self._add(name, Usage(peak, bytes_now))


class StorageWatch(TorchDispatchMode):
    """Storages of what operators return while it is active, as long as somebody holds them."""

    supports_higher_order_operators = True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for t in pytree.tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in given:
                storage = t.untyped_storage()
                self._seen[storage._cdata] = weakref.ref(storage), storage.nbytes()
        return out

    def forget(self, tensors: Iterable[torch.Tensor]) -> None:
        for t in tensors:
            self._seen.pop(t.untyped_storage()._cdata, None)

    def bytes_held(self) -> int:
        return sum(nbytes for storage, nbytes in self._seen.values() if storage() is not None)


class FakeRecorder(TorchDispatchMode):
    """Bytes and times of phases of a program on tensors without data (`FakeTensorMode`, or the device "meta").

    Follows the storages of what operators return; what an operator allocates within itself is not seen. Times are
    those of a machine with the given numbers of operations and bytes a second, each operator taking the longer one.
    """

    def __init__(self, operations: float = 2e14, bandwidth: float = 2e12) -> None:
        super().__init__()
        self.usages: dict[str, Usage] = {}
        self.times: dict[str, list[float]] = {}
        self._operations, self._bandwidth = operations, bandwidth
        self._live: dict[int, int] = {}
        self._now = self._peak = 0
        self._seconds = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]
        given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        known = {t.untyped_storage()._cdata for t in given}
        for t in tensors:
            self._follow(t.untyped_storage(), known)
        if not func.is_view:
            moved = sum(t.numel() * t.element_size() for t in [*tensors, *given])
            count = flop_registry.get(func._overloadpacket)
            operations = count(*args, **(kwargs or {}), out_val=out) if count is not None else 0
            self._seconds += max(operations / self._operations, moved / self._bandwidth)
        return out

    def _follow(self, storage: torch.UntypedStorage, known: set[int]) -> None:
        key = storage._cdata
        if key in self._live or key in known:
            return
        self._live[key] = storage.nbytes()
        self._now += storage.nbytes()
        self._peak = max(self._peak, self._now)
        weakref.finalize(storage, self._release, key)

    def _release(self, key: int) -> None:
        self._now -= self._live.pop(key, 0)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        begin, seconds = self._now, self._seconds
        self._peak = begin
        yield
        self.usages[name] = Usage(self._peak - begin, self._now - begin)
        self.times.setdefault(name, []).append(self._seconds - seconds)


def peak_memory(function: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """The most bytes of tensors that a call has at a time, above those that are there before it.

    Args:
        function: is called once.
        device: whose memory is meant.

    Returns:
        int: exact: CUDA's allocator statistics, or the CPU allocator's reports of each allocation and release. On a
            CPU, the release of what was there before the call is not seen.

    >>> from pyperf_dl import recompute
    >>> x = torch.ones(1000)
    >>> recompute.peak_memory(lambda: (x + x) * x)
    8000
    """
    with MemoryRecorder(torch.device(device)) as recorder, recorder.phase("call"):
        made = function()
    del made
    return recorder.usages["call"].peak


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Of the tensors, each storage once."""
    found = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        found[storage._cdata] = storage.nbytes()
    return sum(found.values())
