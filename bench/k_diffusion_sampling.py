"""k-diffusion's samplers, without what the rest of its package needs."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from typing import Any


def imported_sampling() -> Any:
    """The module k_diffusion.sampling, or None where it is not installed; modules that it imports and that are not
    installed are empty while it does."""
    spec = importlib.util.find_spec("k_diffusion")
    if spec is None:
        return None
    if "k_diffusion" not in sys.modules:
        sys.modules["k_diffusion"] = importlib.util.module_from_spec(spec)
    empty = []
    for needed in ("torchvision.transforms.functional", "torchdiffeq", "torchsde"):
        try:
            importlib.import_module(needed)
        except ImportError:
            parts = needed.split(".")
            for n in range(1, len(parts) + 1):
                name = ".".join(parts[:n])
                empty.append(name)
                sys.modules[name] = types.ModuleType(name)
                if n > 1:
                    setattr(sys.modules[".".join(parts[: n - 1])], parts[n - 1], sys.modules[name])
            sys.modules[needed].odeint = None  # of torchdiffeq
    try:
        return importlib.import_module("k_diffusion.sampling")
    finally:
        for name in empty:
            del sys.modules[name]
