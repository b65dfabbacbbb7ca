"""Which code serves an operator: `native` (compiled CPU and CUDA), `triton`, or `reference` (plain PyTorch)."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable
from types import TracebackType
from typing import Any, TypeVar

import torch

_Function = TypeVar("_Function", bound=Callable[..., Any])

NAMES = ("native", "triton", "reference")

try:
    _C = importlib.import_module("pyperf_dl._C")
    native_error = ""
except ImportError as error:
    _C = None
    native_error = str(error)
_triton_found = importlib.util.find_spec("triton") is not None

# A module global on purpose: a ContextVar breaks fullgraph compilation, and a thread-local is not seen by the thread
# that runs a CUDA backward.
_forced: str | None = None
_CPU = "reference" if _C is None else "native"
_served: dict[str, tuple[str, str]] = {}  # device type -> (backend, reason)
triton_registrations: list[Callable[[], Any]] = []  # of operators that Triton has not been asked for yet


class backend:  # noqa: N801 - a context manager reads as a verb
    """Forces one backend for every operator called inside the block, on every thread.

    Args:
        name: ``"native"``, ``"triton"`` or ``"reference"``.

    Raises:
        ValueError: unknown name.
        RuntimeError: that backend cannot run in this installation.

    >>> with pyperf_dl.backend("reference"):
    ...     pyperf_dl.sliding_window_max(torch.tensor([3.0, 1.0, 2.0]), 2)
    tensor([3., 2.])
    """

    def __init__(self, name: str) -> None:
        if name not in NAMES:
            raise ValueError(f"backend: name must be one of {', '.join(map(repr, NAMES))}, got {name!r}")
        if name == "native" and _C is None:
            raise RuntimeError(f"backend: the compiled library is not there ({native_error})")
        if name == "triton" and not triton_installed():
            raise RuntimeError("backend: triton is not installed")
        if name == "triton":
            _register_triton()
        self.name = name
        self.before: list[str | None] = []

    def __enter__(self) -> backend:
        global _forced
        self.before.append(_forced)
        _forced = self.name
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _forced
        _forced = self.before.pop()


def triton_installed() -> bool:
    return _C is not None and _triton_found


def _constant(function: _Function) -> _Function:
    """torch.compiler.assume_constant_result, which imports the compiler and triton, without those imports."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_constant
def _register_triton() -> None:
    """Registers what is waiting: a compiler that meets an operator cannot trace its registration."""
    while triton_registrations:
        triton_registrations.pop()()


def serving(x: torch.Tensor) -> str:
    """The backend for a tensor."""
    if _forced is not None:
        return _forced
    return _CPU if x.is_cpu else _unforced(x.device.type)


@_constant
def _unforced(device_type: str) -> str:
    found = _served.get(device_type)
    if found is None:
        found = _served[device_type] = explain(device_type)
        if found[0] == "triton":
            _register_triton()
        if found[0] == "reference":
            warnings.warn(f"pyperf_dl: {device_type} runs the slow reference: {found[1]}", stacklevel=5)
    return found[0]


def explain(device_type: str) -> tuple[str, str]:
    """(backend, reason) for a device type when none is forced."""
    if _C is None:
        return "reference", f"the compiled library is not there ({native_error})"
    if device_type in ("cpu", "meta"):
        return "native", "compiled for the CPU"
    if device_type == "cuda":
        problem = cuda_problem()
        if not problem:
            return "native", "compiled for this GPU"
        if triton_installed():
            return "triton", problem
        return "reference", f"{problem}; triton is not installed"
    if device_type == "xpu" and triton_installed():
        return "triton", "no compiled kernels for xpu"
    return "reference", f"no kernels for device type {device_type!r}"


def cuda_problem() -> str:
    """Why the compiled CUDA kernels cannot serve the current GPU; empty where they can."""
    if not hasattr(torch.ops.pyperf_dl, "_cuda_problem"):
        return "built without CUDA"
    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    return torch.ops.pyperf_dl._cuda_problem()
