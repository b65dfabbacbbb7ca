"""Puts functions of ours in the place of a peer library's, and takes them out again.

A file of this folder makes one :class:`Peer` and says with :meth:`Peer.replaces` what stands in for what; it exports
an ``enable`` of its own, and ``disable`` and ``report`` of the peer. A stand-in has the signature of the function that
it replaces, after the settings of the takeover, and returns what that would, or :class:`Declined`: then the peer's own
code serves the call.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import math
import re
import sys
import threading
from collections import Counter
from collections.abc import Callable
from types import TracebackType
from typing import Any, NamedTuple

import torch

from .. import _backend, _checks

DTYPES, HALVES = _checks.FLOATS, _checks.HALVES


class Report(NamedTuple):
    """Calls so far: how many were taken over, and how many went to the peer, by reason."""

    taken: int
    fell_back: dict[str, int]


class Settings(NamedTuple):
    precision: str = "fast"


class Declined:
    """What a stand-in returns for a call that is the peer's; without a reason it is not counted.

    `answers` are what modules of the layer have returned already, by attribute: they are not run again.
    """

    def __init__(self, why: str = "", **answers: torch.Tensor) -> None:
        self.why, self.answers = why, answers


class _Answered:
    """A layer to the peer's own method, some of whose modules return what they returned before."""

    def __init__(self, layer: Any, answers: dict[str, torch.Tensor]) -> None:
        self.__layer = layer
        for name, answer in answers.items():
            setattr(self, name, lambda *_, answer=answer: answer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__layer, name)


_peers: dict[str, Peer] = {}


class _Place(NamedTuple):
    """One function of the peer: an attribute of a class, or a name that any module may have imported (owner None)."""

    owner: type | None
    name: str
    original: Callable[..., Any]
    ours: Callable[..., Any]


class Peer:
    """What is swapped in one peer library, and the takeovers that are open.

    Args:
        name: of the file in this folder.
        distribution: the peer's name for pip.
        oldest, newest: the releases whose code is known. The newest one stands for all that begin with its numbers.
    """

    def __init__(self, name: str, distribution: str, oldest: str, newest: str) -> None:
        self.name, self.distribution, self.known = name, distribution, (oldest, newest)
        _peers[name] = self
        self.settings: Settings | None = None  # of the latest takeover that is open
        self.open: list[Takeover] = []
        self._lock = threading.RLock()
        self._stand_ins: list[tuple[str, str, Callable[..., Any], bool]] = []
        self._places: list[_Place] = []
        self._installed = False
        self._inside = threading.local()  # .theirs: in a call that went to the peer, and what it calls in turn
        self._counts: Counter[str] = Counter()  # by reason to fall back; "" for calls taken over

    def replaces(self, module: str, *names: str, counted: bool = True) -> Callable[..., Any]:
        """Decorator: stands in for functions of a module (``"function"`` or ``"Class.method"``).

        ``counted=False`` for one that counts calls itself.
        """

        def remember(stand_in: Callable[..., Any]) -> Callable[..., Any]:
            self._stand_ins += [(module, name, stand_in, counted) for name in names]
            return stand_in

        return remember

    def count(self, why: str = "") -> None:
        if not torch.compiler.is_compiling():
            with self._lock:
                self._counts[why] += 1

    def enable(self, settings: Settings) -> Takeover:
        operator = f"{self.name}.enable"
        _checks.choice(operator, "precision", settings.precision, ("fast", "exact"))
        self.check_version()
        with self._lock:
            if not self._places:
                self._places = [self._place(*stand_in) for stand_in in self._stand_ins]
        return Takeover(self, settings).__enter__()

    def disable(self) -> None:
        """Ends every takeover; the library is as before.

        >>> from pyperf_dl.integrations import nflows
        >>> nflows.disable()
        """
        with self._lock:
            self.open.clear()
            self.apply()

    def report(self, *, reset: bool = False) -> Report:
        """Counts of the calls that met a takeover: a layer counts once, or once for each half that it transforms. Calls
        inside compiled code are not counted.

        >>> from pyperf_dl.integrations import nflows
        >>> nflows.report(reset=True).taken >= 0
        True
        """
        with self._lock:
            counts = dict(self._counts)
            if reset:
                self._counts.clear()
        return Report(counts.pop("", 0), counts)

    def original(self, owner: type, name: str) -> Callable[..., Any]:
        """The peer's own method, whatever is there now."""
        return next(p.original for p in self._places if p.owner is owner and p.name == name)

    def check_version(self, function: str = "enable") -> None:
        operator = f"{self.name}.{function}"
        try:
            version = importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            raise ImportError(f"{operator}: the package {self.distribution} is not installed") from None
        oldest, newest = (_numbers(v) for v in self.known)
        if not oldest <= _numbers(version) or not _numbers(version)[: len(newest)] <= newest:
            known = self.known[1] if oldest == newest else f"between {self.known[0]} and {self.known[1]}"
            raise ValueError(f"{operator}: the version of {self.distribution} must be {known}, got {version}")

    def _place(self, module: str, name: str, stand_in: Callable[..., Any], counted: bool) -> _Place:
        owner: Any = importlib.import_module(module)
        *classes, name = name.split(".")
        for part in classes:
            owner = getattr(owner, part)
        original = vars(owner)[name]
        return _Place(owner if classes else None, name, original, self._over(original, stand_in, counted))

    def _over(self, original: Callable[..., Any], stand_in: Callable[..., Any], counted: bool) -> Callable[..., Any]:
        name = self.name

        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            peer, compiling = _peers[name], torch.compiler.is_compiling()  # the compiler takes no objects in a closure
            settings = peer.settings
            if settings is None or (not compiling and getattr(peer._inside, "theirs", False)):
                return original(*args, **kwargs)
            got = stand_in(settings, *args, **kwargs)
            if type(got) is not Declined:
                if counted:
                    peer.count()
                return got
            if got.answers:
                args = (_Answered(args[0], got.answers), *args[1:])
            if compiling or not got.why:
                return original(*args, **kwargs)
            peer.count(got.why)
            peer._inside.theirs = True
            try:
                return original(*args, **kwargs)
            finally:
                peer._inside.theirs = False

        return call

    def apply(self) -> None:
        """Brings the peer in line with the list of takeovers."""
        self.settings = self.open[-1].settings if self.open else None
        if bool(self.open) == self._installed:
            return
        self._installed = bool(self.open)
        swaps = [(p, p.original, p.ours) if self.open else (p, p.ours, p.original) for p in self._places]
        for place, old, new in swaps:
            # Where somebody else has put a function over ours, ours stays below it and passes calls on.
            if place.owner is not None and vars(place.owner).get(place.name) is old:
                setattr(place.owner, place.name, new)
        _rename({id(old): new for place, old, new in swaps if place.owner is None})


def _rename(news: dict[int, Callable[..., Any]]) -> None:
    """Gives every name in every module that means one of these objects, by id, its new meaning."""
    for module in list(sys.modules.values()):
        names = getattr(module, "__dict__", None)
        if type(names) is dict:
            for name, value in list(names.items()):
                if id(value) in news:
                    names[name] = news[id(value)]


def _numbers(version: str) -> tuple[int, ...]:
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(n) for n in found.group().split(".")) if found else ()


class Takeover:
    """What ``enable`` returns; as a context manager it ends the takeover with the block."""

    def __init__(self, peer: Peer, settings: Settings) -> None:
        self.peer, self.settings = peer, settings

    def __enter__(self) -> Takeover:
        with self.peer._lock:
            if not any(t is self for t in self.peer.open):
                self.peer.open.append(self)
                self.peer.apply()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self.peer._lock:
            self.peer.open[:] = [t for t in self.peer.open if t is not self]
            self.peer.apply()


# ---- what a call must be like ----

_with_kernels: dict[str, bool] = {}


def _plain(input: Any) -> bool:
    """No subclass with rules of its own; fake tensors only where torch.export makes them."""
    if type(input) in (torch.Tensor, torch.nn.Parameter):
        return True
    return torch.compiler.is_exporting() and isinstance(input, torch._subclasses.FakeTensor)


def _kernels_for(device_type: str) -> bool:
    if _backend._forced is not None:
        return True
    if device_type not in _with_kernels:
        _with_kernels[device_type] = _backend.explain(device_type)[0] != "reference"
    return _with_kernels[device_type]


def unfit_for_any(*tensors: Any) -> str:
    """Why no operator can take these tensors; empty where one may."""
    if torch.jit.is_tracing():
        return "torch.jit.trace"
    if not all(_plain(t) for t in tensors):
        return "not a plain tensor"
    if any(t.dtype not in DTYPES for t in tensors):
        return "dtype"
    if any(t.layout != torch.strided or t.is_nested for t in tensors):
        return "layout"
    if any(t.device != tensors[0].device for t in tensors):
        return "device"
    if not _kernels_for(tensors[0].device.type):
        return "no kernels for the device"
    return ""


def unfit(x: Any, *params: Any) -> str:
    """Why the coupling operators cannot take these tensors; empty where they can."""
    if why := unfit_for_any(x, *params):
        return why
    dtypes = (x.dtype, *HALVES) if x.dtype == torch.float32 else (x.dtype,)  # f32 with 16-bit: autocast
    return "dtype" if any(p.dtype not in dtypes or p.dtype != params[0].dtype for p in params) else ""


def number(value: Any, above: float = 0.0) -> bool:
    """A finite Python number above a limit. Tensors are none: to look into them may wait for the device."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and above < value < math.inf
