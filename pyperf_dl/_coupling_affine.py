"""Stand-in until the operators are there: the public affine functions over the reference, saving x and parameters."""

from __future__ import annotations

from typing import Any

import torch

from . import _checks
from ._coupling_spline import _dims, saving
from .reference import coupling as reference


def _affine(x, scale, shift, inverse, activation, clamp, order, volume_preserving):
    dtype = reference.working_dtype(x, scale)
    ls = reference.log_scale(scale.to(dtype), activation, clamp)
    if volume_preserving:
        ls = ls - ls.mean(1, keepdim=True)
    t = shift.to(dtype)
    s = (-ls if inverse else ls).exp()
    u = x.to(dtype)
    if order == "scale_shift":
        y = (u - t) * s if inverse else u * s + t
    else:
        y = u * s - t if inverse else (u + t) * s
    if volume_preserving:
        ls = torch.zeros_like(ls)
    return y.to(x.dtype), (-ls if inverse else ls).to(reference.logdet_dtype(x))


def affine_coupling(
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    *,
    inverse: bool = False,
    activation: str = "exp",
    clamp: float | None = None,
    order: str = "scale_shift",
    volume_preserving: bool = False,
    logdet: str = "sum",
    sum_dims: Any = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Stand-in."""
    op = "affine_coupling"
    _checks.strided_tensor(op, "x", x, (torch.float16, torch.bfloat16, torch.float32, torch.float64))
    _checks.choice(op, "activation", activation, reference.ACTIVATIONS)
    _checks.choice(op, "order", order, ("scale_shift", "shift_scale"))
    if clamp is not None and not clamp > 0:
        raise ValueError(f"{op}: clamp must be > 0, got {clamp}")
    how = (inverse, activation, clamp or (0.0 if activation == "exp" else 1.0), order, volume_preserving)
    y, ld = saving(lambda x, s, t: _affine(x, s, t, *how), x, scale, shift)
    return y, ld.sum(_dims(op, x, logdet, sum_dims)) if logdet == "sum" else ld


def additive_coupling(
    x: torch.Tensor, shift: torch.Tensor, *, inverse: bool = False, logdet: str = "sum", sum_dims: Any = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Stand-in."""
    _checks.strided_tensor("additive_coupling", "x", x, (torch.float16, torch.bfloat16, torch.float32, torch.float64))
    dtype = reference.working_dtype(x, shift)
    y, ld = saving(
        lambda x, t: (
            (x.to(dtype) - t if inverse else x.to(dtype) + t).to(x.dtype),
            torch.zeros_like(x, dtype=reference.logdet_dtype(x)),
        ),
        x,
        shift,
    )
    return y, ld.sum(_dims("additive_coupling", x, logdet, sum_dims)) if logdet == "sum" else ld
