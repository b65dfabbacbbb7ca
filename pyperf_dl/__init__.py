"""Fused operators for PyTorch, each with a plain reference that says exactly what it computes."""

import importlib as _importlib
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from ._autograd import decompositions
from ._backend import backend
from .coupling import *  # noqa: F403
from .coupling import __all__ as _coupling
from .sampler import *  # noqa: F403
from .sampler import __all__ as _sampler
from .sliding_window import *  # noqa: F403
from .sliding_window import __all__ as _sliding_window

if _TYPE_CHECKING:
    from . import recompute

__version__ = "0.1.0"
__all__ = ["__version__", "backend", "decompositions", *_coupling, *_sampler, *_sliding_window, "recompute"]


def __getattr__(name: str) -> _Any:
    """`pyperf_dl.recompute`, which is imported when it is first asked for: it can be run as a command, too."""
    if name == "recompute":
        return _importlib.import_module(f"{__name__}.recompute")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
