"""``max_pool1d`` with stride 1 and a long window, served by :func:`pyperf_dl.sliding_window_max`.

    from pyperf_dl.integrations import torch_pooling

    torch_pooling.enable()                  # from now on, in the whole process
    with torch_pooling.enable(min_window=16):
        ...                                 # inside the block
    torch_pooling.swap(model)               # the nn.MaxPool1d layers of one model

Values are those of torch: each result compares equal, and is NaN where torch's is NaN. Windows that hold both -0 and +0
give +0, where torch gives the first of the two. Indices and gradients are those of torch except at two kinds of ties:
among NaNs torch takes the last and this the first; among zeros of both signs torch takes the first and this the first
+0. A gradient is the sum over the windows that an element won, in float32 or wider, so that its last bits can differ.
"""

from __future__ import annotations

import functools
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, NamedTuple

import torch

from .. import _backend, _checks
from ..sliding_window import sliding_window_max

__all__ = ["Report", "SlidingMaxPool1d", "disable", "enable", "report", "restore", "swap"]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # those of torch's own max_pool1d


class Report(NamedTuple):
    """Calls so far: how many were taken over, and how many went to torch, by reason."""

    taken: int
    fell_back: dict[str, int]


class _Settings(NamedTuple):
    min_window: int
    indices: bool


_lock = threading.Lock()
_open: list[_Takeover] = []  # the latest decides
_current: _Settings | None = None
_counts: Counter[str] = Counter()  # by reason to fall back; "" for calls taken over
_installed: dict[tuple[Any, str], tuple[Callable[..., Any], Callable[..., Any]]] = {}  # place -> (ours, torch's)
_with_kernels: dict[str, bool] = {}

# ---- one call ----


def _one(value: Any) -> Any:
    """The int of an int or of a sequence of one; None for what torch would have to judge."""
    if isinstance(value, (tuple, list)):
        if len(value) != 1:
            return None
        value = value[0]
    return value if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool) else None


def _plain(input: Any) -> bool:
    """No subclass with rules of its own. A fake tensor is plain only for torch.export: in the tracers behind
    torch.compile it comes from a call that the compiler took for torch's own, and caches as such."""
    if type(input) in (torch.Tensor, torch.nn.Parameter):
        return True
    return torch.compiler.is_exporting() and isinstance(input, torch._subclasses.FakeTensor)


def _kernels_for(device_type: str) -> bool:
    if _backend._forced is not None:
        return True
    if device_type not in _with_kernels:
        _with_kernels[device_type] = _backend.explain(device_type)[0] != "reference"
    return _with_kernels[device_type]


def _why_not(
    input: Any, kernel_size: Any, stride: Any, padding: Any, dilation: Any, indices: bool, settings: _Settings
) -> str:
    """Why torch serves this call; empty where sliding_window_max does."""
    if torch.jit.is_tracing():
        return "torch.jit.trace"
    if not _plain(input):
        return "not a plain tensor"
    window, pad, spread = _one(kernel_size), _one(padding), _one(dilation)
    step = window if stride is None or (isinstance(stride, (tuple, list)) and not stride) else _one(stride)
    if window is None or step is None or pad is None or spread is None:
        return "arguments"
    if step != 1:
        return "stride is not 1"
    if window < settings.min_window:
        return "window below min_window"
    if indices and not settings.indices:
        return "return_indices"
    if input.dtype not in _DTYPES:
        return "dtype"
    if input.layout != torch.strided or input.is_nested:
        return "layout"
    if input.dim() not in (2, 3) or input.shape[-1] == 0 or input.shape[-2] == 0:
        return "shape"
    outputs = input.shape[-1] + 2 * pad - (window - 1) * spread
    if pad < 0 or 2 * pad > window or spread < 1 or outputs < 1 or window >= 2**31:
        return "arguments"
    if spread > input.shape[-1]:  # the one way for a window to miss every element
        return "dilation above the length"
    if not _kernels_for(input.device.type):
        return "no kernels for the device"
    return ""


def _taken(input: torch.Tensor, kernel_size: Any, padding: Any, dilation: Any, indices: bool) -> Any:
    # ceil_mode adds no window where the stride is 1.
    return sliding_window_max(
        input, _one(kernel_size), padding=_one(padding), dilation=_one(dilation), return_indices=indices
    )


def _count(why: str) -> None:
    if not torch.compiler.is_compiling():
        with _lock:
            _counts[why] += 1


# ---- in the place of torch's functions ----
#
# Cached, and so never freed: torch.jit knows the first form by its id.


@functools.cache
def _builtin(original: Callable[..., Any], indices: bool) -> Callable[..., Any]:
    """Form of torch.max_pool1d and torch.max_pool1d_with_indices, which all of torch.nn ends in."""

    @functools.wraps(original)
    def pool(input, kernel_size, stride=(), padding=0, dilation=1, ceil_mode=False):
        settings = _current
        if settings is not None:
            why = _why_not(input, kernel_size, stride, padding, dilation, indices, settings)
            _count(why)
            if not why:
                return _taken(input, kernel_size, padding, dilation, indices)
        return original(input, kernel_size, stride, padding, dilation, ceil_mode)

    pool.__module__ = "torch"
    # torch.jit.script compiles the call as torch's own.
    torch.jit._builtins._register_builtin(pool, f"aten::{original.__name__}")
    return pool


@functools.cache
def _functional(original: Callable[..., Any], indices: bool) -> Callable[..., Any]:
    """Form of the functions in torch.nn.functional. They end in the two above, but the compiler looks no further."""

    @functools.wraps(original)
    def pool(input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False):
        settings = _current
        if settings is not None and torch.compiler.is_compiling():
            wanted = indices or return_indices
            if not _why_not(input, kernel_size, stride, padding, dilation, wanted, settings):
                return _taken(input, kernel_size, padding, dilation, wanted)
        return original(
            input, kernel_size, stride, padding, dilation, ceil_mode=ceil_mode, return_indices=return_indices
        )

    by_flag = torch._jit_internal.boolean_dispatched
    if original in by_flag:
        by_flag[pool] = by_flag[original]
    return pool


_PLACES = (
    (torch, "max_pool1d", _builtin, False),
    (torch, "max_pool1d_with_indices", _builtin, True),
    (torch.nn.functional, "max_pool1d", _functional, False),
    (torch.nn.functional, "max_pool1d_with_indices", _functional, True),
)


def _torchs(name: str) -> Callable[..., Any]:
    """torch.<name> as it is without this module."""
    place = (torch, name)
    return _installed[place][1] if place in _installed else getattr(torch, name)


def _apply() -> None:
    """Brings torch in line with the list of takeovers."""
    global _current
    _current = _open[-1].settings if _open else None
    for module, name, form, indices in _PLACES:
        place = (module, name)
        if _open and place not in _installed:
            original = getattr(module, name)
            _installed[place] = (form(original, indices), original)
            setattr(module, name, _installed[place][0])
        elif not _open and place in _installed and getattr(module, name) is _installed[place][0]:
            # Where somebody else has put a function over ours, ours stays below it and passes calls on.
            setattr(module, name, _installed.pop(place)[1])


class _Takeover:
    """What :func:`enable` returns; as a context manager it ends the takeover with the block."""

    def __init__(self, settings: _Settings) -> None:
        self.settings = settings

    def __enter__(self) -> _Takeover:
        with _lock:
            if not any(t is self for t in _open):
                _open.append(self)
                _apply()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with _lock:
            _open[:] = [t for t in _open if t is not self]
            _apply()


def enable(min_window: int = 8, *, indices: bool = True) -> _Takeover:
    """Sends every max_pool1d call that qualifies to :func:`pyperf_dl.sliding_window_max`.

    A call qualifies if its stride is 1, its window has at least ``min_window`` taps, and its input is a plain float16,
    bfloat16, float32 or float64 tensor on a device with kernels; any padding and dilation that torch allows, with or
    without ``ceil_mode``, indices and gradients. Everything else goes to torch as before, errors too.

    Replaces ``torch.max_pool1d``, ``torch.max_pool1d_with_indices`` and the functions of these names in
    ``torch.nn.functional``; ``torch.nn.MaxPool1d`` calls those. A name imported from torch itself before
    (``from torch import max_pool1d``) stays as it was. torch.compile compiles anew where a takeover began or ended;
    torch.jit.script and torch.jit.trace keep torch's own operator.

    Args:
        min_window: taps from which calls are taken over, >= 1.
        indices: also take calls with ``return_indices``.

    Returns:
        A context manager: ``with enable():`` ends with the block. Takeovers nest, and hold for all threads; the latest
        one that is still open decides.

    Raises:
        TypeError, ValueError: min_window is no int >= 1; indices is no bool.

    >>> from pyperf_dl.integrations import torch_pooling
    >>> with torch_pooling.enable(min_window=3):
    ...     torch.nn.functional.max_pool1d(torch.tensor([[1.0, 3.0, 2.0, 0.0, 5.0]]), 3, stride=1)
    tensor([[3., 3., 5.]])
    """
    settings = _Settings(
        _checks.integer("enable", "min_window", min_window, 1), _checks.flag("enable", "indices", indices)
    )
    import torch._dynamo  # noqa: F401 - makes its table of torch's functions now, while they are torch's own

    return _Takeover(settings).__enter__()


def disable() -> None:
    """Ends every takeover; torch is as before.

    >>> from pyperf_dl.integrations import torch_pooling
    >>> torch_pooling.disable()
    """
    with _lock:
        _open.clear()
        _apply()


def report(*, reset: bool = False) -> Report:
    """Counts of the calls that met a takeover or a swapped layer; calls inside compiled code are not counted.

    >>> from pyperf_dl.integrations import torch_pooling
    >>> before = torch_pooling.report(reset=True)
    >>> with torch_pooling.enable(min_window=3):
    ...     y = torch.max_pool1d(torch.zeros(1, 9), 3, 1), torch.max_pool1d(torch.zeros(1, 9), 3, 2)
    >>> torch_pooling.report()
    Report(taken=1, fell_back={'stride is not 1': 1})
    """
    with _lock:
        counts = dict(_counts)
        if reset:
            _counts.clear()
    return Report(counts.pop("", 0), counts)


# ---- layers ----


class SlidingMaxPool1d(torch.nn.MaxPool1d):
    """The ``nn.MaxPool1d`` that :func:`swap` makes of layers, served by :func:`pyperf_dl.sliding_window_max`."""

    def forward(self, input: torch.Tensor) -> Any:
        how = (self.kernel_size, self.stride, self.padding, self.dilation)
        why = _why_not(input, *how, self.return_indices, _Settings(1, True))
        _count(why)
        if not why:
            return _taken(input, self.kernel_size, self.padding, self.dilation, self.return_indices)
        name = "max_pool1d_with_indices" if self.return_indices else "max_pool1d"
        return _torchs(name)(input, *how, self.ceil_mode)


def _layers(module: torch.nn.Module, kind: type) -> Iterator[tuple[str, Any]]:
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"torch_pooling: module must be a torch.nn.Module, got {type(module).__name__}")
    return ((name, layer) for name, layer in module.named_modules() if type(layer) is kind)


def swap(module: torch.nn.Module, min_window: int = 8, *, indices: bool = True) -> list[str]:
    """Turns the ``nn.MaxPool1d`` layers of a module that qualify into :class:`SlidingMaxPool1d`, in place.

    Layers qualify as calls do for :func:`enable`. They stay the same objects, under the same names, with their hooks
    and settings, and the state_dict stays as it is. Subclasses of ``nn.MaxPool1d`` are left alone. torch.jit.script
    needs :func:`restore` first.

    Args:
        module: any module; it may itself be the layer.
        min_window, indices: as for :func:`enable`.

    Returns:
        The names of the layers that changed (``""`` for the module itself).

    >>> from pyperf_dl.integrations import torch_pooling
    >>> model = torch.nn.Sequential(torch.nn.MaxPool1d(9, stride=1, padding=4), torch.nn.MaxPool1d(2))
    >>> torch_pooling.swap(model)
    ['0']
    >>> torch_pooling.restore(model)
    ['0']
    """
    _checks.integer("swap", "min_window", min_window, 1)
    _checks.flag("swap", "indices", indices)
    changed = []
    for name, layer in _layers(module, torch.nn.MaxPool1d):
        window, pad = _one(layer.kernel_size), _one(layer.padding)
        if window is None or pad is None or _one(layer.stride) != 1 or window < min_window or 2 * pad > window:
            continue
        if layer.return_indices and not indices:
            continue
        layer.__class__ = SlidingMaxPool1d
        changed.append(name)
    return changed


def restore(module: torch.nn.Module) -> list[str]:
    """Makes :class:`SlidingMaxPool1d` layers plain ``nn.MaxPool1d`` again, in place; returns their names.

    >>> from pyperf_dl.integrations import torch_pooling
    >>> torch_pooling.restore(torch.nn.MaxPool1d(9, stride=1))
    []
    """
    changed = []
    for name, layer in _layers(module, SlidingMaxPool1d):
        layer.__class__ = torch.nn.MaxPool1d
        changed.append(name)
    return changed
