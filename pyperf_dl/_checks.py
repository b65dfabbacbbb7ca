"""Argument checks whose messages name the operator, the argument, the rule, and what it got."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Sequence
from typing import Any

import torch

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
HALVES = (torch.float16, torch.bfloat16)


def described(value: Any) -> str:
    """How a message shows what it got: a tensor by dtype, shape and device, anything else by its repr."""
    if isinstance(value, torch.Tensor):
        return f"a tensor {value.dtype} {list(value.shape)} on {value.device}"
    return repr(value)


def integer(op: str, name: str, value: Any, minimum: int | None = None) -> int:
    """`value` as an int (a SymInt passes as it is); tensors and bools are not taken for numbers."""
    if type(value) is int and (minimum is None or value >= minimum):
        return value
    if isinstance(value, torch.SymInt):
        number: Any = value
    elif isinstance(value, (bool, torch.Tensor)) or not hasattr(value, "__index__"):
        raise TypeError(f"{op}: {name} must be an int, got {described(value)}")
    else:
        number = operator.index(value)
    if minimum is not None and number < minimum:
        raise ValueError(f"{op}: {name} must be >= {minimum}, got {value}")
    return number


def number(
    op: str,
    name: str,
    value: Any,
    minimum: float = -math.inf,
    maximum: float = math.inf,
    *,
    finite: bool = False,
) -> float:
    """`value` as a float in [minimum, maximum] (a symbolic one passes as it is); tensors and bools are not taken for
    numbers."""
    if type(value) is float and minimum <= value <= maximum and -math.inf < value < math.inf:
        return value
    symbolic = isinstance(value, (torch.SymFloat, torch.SymInt))
    if isinstance(value, bool) or not (symbolic or isinstance(value, numbers.Real)):
        raise TypeError(f"{op}: {name} must be a number, got {described(value)}")
    if finite and not -math.inf < value < math.inf:  # math.isfinite takes no symbolic number
        raise ValueError(f"{op}: {name} must be finite, got {value!r}")
    if not minimum <= value <= maximum:
        bounds = f">= {minimum}" if maximum == math.inf else f"in [{minimum}, {maximum}]"
        raise ValueError(f"{op}: {name} must be {bounds}, got {value!r}")
    return value if symbolic else float(value)


def choice(op: str, name: str, value: Any, allowed: Sequence[str]) -> str:
    """`value`, one of the strings `allowed`."""
    if not isinstance(value, str):
        raise TypeError(f"{op}: {name} must be one of {', '.join(map(repr, allowed))}, got {described(value)}")
    if value not in allowed:
        raise ValueError(f"{op}: {name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    return value


def flag(op: str, name: str, value: Any) -> bool:
    """`value`, a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be a bool, got {described(value)}")
    return value


def strided_tensor(op: str, name: str, value: Any, dtypes: Sequence[torch.dtype]) -> torch.Tensor:
    """`value`, a dense tensor of one of the dtypes."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(value).__name__}")
    if value.layout != torch.strided or value.is_quantized or value.is_nested:
        kind = "quantized" if value.is_quantized else "nested" if value.is_nested else value.layout
        raise TypeError(f"{op}: {name} must be a dense tensor, got {kind}")
    if value.dtype not in dtypes:
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{op}: {name} must have one of the dtypes {names}, got {value.dtype}")
    return value


def dimension(op: str, name: str, value: Any, rank: int) -> int:
    """`value` as a dimension in [0, rank)."""
    dim = integer(op, name, value)
    if not -rank <= dim < rank:
        raise ValueError(
            f"{op}: {name} must be in [{-rank}, {rank - 1}] for a tensor with {rank} dimensions, got {dim}"
        )
    return dim % rank
