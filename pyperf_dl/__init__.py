"""Fused operators for PyTorch, each with a plain reference that says exactly what it computes."""

from ._autograd import decompositions
from ._backend import backend
from .coupling import *  # noqa: F403
from .coupling import __all__ as _coupling
from .sampler import *  # noqa: F403
from .sampler import __all__ as _sampler
from .sliding_window import *  # noqa: F403
from .sliding_window import __all__ as _sliding_window

__version__ = "0.1.0"
__all__ = ["__version__", "backend", "decompositions", *_coupling, *_sampler, *_sliding_window]
