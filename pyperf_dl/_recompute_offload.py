"""Activations that wait in the host's memory for their backward."""

from __future__ import annotations

import contextlib
import time
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ._recompute_calls import OP, tensors_of

_LEAST_BYTES = 1 << 16  # smaller tensors stay: a transfer takes longer than its bytes


class HostLink:
    """Copies what a block saves to the host, and back before its backward: exact bits, on a stream of its own.

    The tensors of one block come back together, and those of the block before it while that one's backward runs.

    Args:
        device: a CUDA device. On a CPU the link is a stand-in for tests: tensors go to memory that PyTorch's allocator
            does not count.
        bandwidth: bytes a second in each direction. None: measured when it is first needed.
        least_bytes: of a tensor that is sent.
    """

    def __init__(
        self, device: torch.device | str, bandwidth: float | None = None, least_bytes: int = _LEAST_BYTES
    ) -> None:
        self.device = torch.device(device)
        if self.device.type not in ("cpu", "cuda"):
            raise ValueError(f"{OP}.HostLink: device must be a CUDA device, or the CPU for tests, got {self.device}")
        if bandwidth is not None and not bandwidth > 0:
            raise ValueError(f"{OP}.HostLink: bandwidth must be bytes a second > 0, got {bandwidth}")
        self._bandwidth, self._least = bandwidth, least_bytes
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._last: tuple[int, weakref.ref[Sent] | None] = (-1, None)

    @property
    def bandwidth(self) -> float:
        if self._bandwidth is None:
            self._bandwidth = self._measured()
        return self._bandwidth

    @contextlib.contextmanager
    def context(self, block: int, module: nn.Module, inputs: Any) -> Iterator[Sent]:
        """For the forward of a block: what it saves goes to the host, but for parameters and inputs, which are needed
        anyway."""
        kept = {t.untyped_storage()._cdata for t in [*tensors_of(inputs), *module.parameters(), *module.buffers()]}
        group = Sent(self, kept, self._last[1] if self._last[0] == block - 1 else None)
        self._last = block, weakref.ref(group)
        with torch.autograd.graph.saved_tensors_hooks(group.pack, group.unpack):
            yield group

    def _send(self, t: torch.Tensor) -> tuple[torch.Tensor, Any]:
        if self._stream is None:
            return _outside_the_allocator(t).copy_(t), None
        host = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, pin_memory=True)
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            host.copy_(t, non_blocking=True)
        t.record_stream(self._stream)
        return host, self._stream.record_event()

    def _fetch(self, host: torch.Tensor, sent: Any) -> tuple[torch.Tensor, Any]:
        if self._stream is None:
            return torch.empty_strided(host.shape, host.stride(), dtype=host.dtype).copy_(host), None
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(sent)
            there = torch.empty_strided(host.shape, host.stride(), dtype=host.dtype, device=self.device)
            there.copy_(host, non_blocking=True)
        return there, self._stream.record_event()

    def _arrived(self, there: torch.Tensor, event: Any) -> torch.Tensor:
        if event is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(event)
            there.record_stream(current)
        return there

    def _measured(self) -> float:
        size = 1 << 26
        if self._stream is None:
            return 1e10
        there = torch.empty(size, dtype=torch.uint8, device=self.device)
        host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        host.copy_(there)
        torch.cuda.synchronize(self.device)
        begin = time.perf_counter()
        for _ in range(3):
            host.copy_(there, non_blocking=True)
        torch.cuda.synchronize(self.device)
        return 3 * size / (time.perf_counter() - begin)


class _OnHost:
    """One tensor on the host."""

    __slots__ = ("__weakref__", "coming", "event", "host")

    def __init__(self, host: torch.Tensor, event: Any) -> None:
        self.host, self.event = host, event
        self.coming: tuple[torch.Tensor, Any] | None = None


class Sent:
    """What one block saved; `nbytes` of it are on the host."""

    def __init__(self, link: HostLink, kept: set[int], before: weakref.ref[Sent] | None) -> None:
        self._link, self._kept, self._before = link, kept, before
        self.nbytes = 0
        self._sent: list[weakref.ref[_OnHost]] = []
        self._known: dict[Any, tuple[Any, weakref.ref[_OnHost]]] = {}

    def pack(self, t: torch.Tensor) -> Any:
        storage = t.untyped_storage()
        if (
            type(t) is not torch.Tensor
            or (t.is_leaf and t.requires_grad)
            or t.device != self._link.device
            or t.numel() * t.element_size() < self._link._least
            or storage._cdata in self._kept
            or not _is_dense(t)
        ):  # fmt: skip
            return t
        key = storage._cdata, t.storage_offset(), t.shape, t.stride(), t.dtype
        known, reference = self._known.get(key, (None, None))
        if known is not None and known() is storage and reference() is not None:
            return reference()
        sent = _OnHost(*self._link._send(t.detach()))
        self.nbytes += t.numel() * t.element_size()
        self._sent.append(weakref.ref(sent))
        self._known[key] = weakref.ref(storage), weakref.ref(sent)
        return sent

    def unpack(self, packed: Any) -> torch.Tensor:
        if not isinstance(packed, _OnHost):
            return packed
        if packed.coming is None:
            self.fetch()
            before = self._before() if self._before is not None else None
            if before is not None:
                before.fetch()
        there, event = packed.coming
        packed.coming = None
        return self._link._arrived(there, event)

    def fetch(self) -> None:
        """The last one first, as the backward wants them."""
        for reference in reversed(self._sent):
            sent = reference()
            if sent is not None and sent.coming is None:
                sent.coming = self._link._fetch(sent.host, sent.event)


def _is_dense(t: torch.Tensor) -> bool:
    """Elements fill a range of memory, in any order of the dimensions."""
    expected = 1
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return t.layout == torch.strided


def _outside_the_allocator(t: torch.Tensor) -> torch.Tensor:
    memory = torch.frombuffer(bytearray(t.numel() * t.element_size()), dtype=torch.uint8)
    return torch.as_strided(memory.view(t.dtype), t.shape, t.stride())


def offload_seconds(link: HostLink, moved: int, forward: float, backward: float) -> tuple[float, float]:
    """Of a block's forward and backward, during which its transfers go on."""
    transfer = moved / link.bandwidth
    return forward + max(0.0, transfer - forward), backward + max(0.0, transfer - backward)
