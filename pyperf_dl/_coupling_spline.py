"""Stand-in until the operators are there: the public spline functions over the reference, saving x and parameters."""

from __future__ import annotations

import math
from typing import Any

import torch

from . import _checks
from .reference import coupling as reference


class _Saving(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, *tensors):
        ctx.save_for_backward(*tensors)
        ctx.function = function
        return function(*tensors)

    @staticmethod
    def backward(ctx, *grads):
        tensors, twice = ctx.saved_tensors, torch.is_grad_enabled()
        with torch.enable_grad():
            leaves = [t.view_as(t) if twice and t.requires_grad else t.detach().requires_grad_() for t in tensors]
            out = ctx.function(*leaves)
            pairs = [(o, g) for o, g in zip(out, grads, strict=True) if o.requires_grad]
            outputs, weights = zip(*pairs, strict=True)
            found = torch.autograd.grad(outputs, leaves, weights, allow_unused=True, create_graph=twice)
        return (None, *(torch.zeros_like(t) if g is None else g for g, t in zip(found, tensors, strict=True)))


def saving(function, *tensors):
    plain = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    return function(*tensors) if plain else _Saving.apply(function, *tensors)


def _dims(op, x, logdet, sum_dims):
    _checks.choice(op, "logdet", logdet, ("elementwise", "sum"))
    return tuple(range(1, x.dim())) if sum_dims is None else tuple(sum_dims)


def rational_quadratic_spline_packed(
    x: torch.Tensor,
    params: torch.Tensor,
    bins: int,
    *,
    inverse: bool = False,
    tails: str = "linear",
    tail_bound: float = 1.0,
    bounds: Any = None,
    min_bin_width: float = 1e-3,
    min_bin_height: float = 1e-3,
    min_derivative: float = 1e-3,
    identity_init: bool = False,
    logit_scale: float = 1.0,
    parametrization: str = "nflows",
    slope: float = 1e-3,
    logdet: str = "elementwise",
    sum_dims: Any = None,
    precision: str = "fast",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Stand-in."""
    op = "rational_quadratic_spline_packed"
    _checks.strided_tensor(op, "x", x, (torch.float16, torch.bfloat16, torch.float32, torch.float64))
    bins = _checks.integer(op, "bins", bins, 1)
    _checks.choice(op, "tails", tails, reference.TAILS)
    _checks.choice(op, "parametrization", parametrization, reference.PARAMETRIZATIONS)
    if not tail_bound > 0:
        raise ValueError(f"{op}: tail_bound must be > 0, got {tail_bound}")
    if min_bin_width * bins >= 1 or min_bin_height * bins >= 1:
        raise ValueError(f"{op}: min_bin_width * bins must be < 1, got {min_bin_width} * {bins}")
    if params.shape[-1] != 2 * bins + reference.derivative_count(bins, tails):
        raise ValueError(f"{op}: params must have another size, got {_checks.described(params)}")
    box = bounds or (-tail_bound, tail_bound, -tail_bound, tail_bound)
    zuko = parametrization == "zuko"
    curve = -math.log(slope) if zuko else math.log(2) / (1 - min_derivative) if identity_init else 1.0
    smallest = (0.0, 0.0, 0.0) if zuko else (min_bin_width, min_bin_height, min_derivative)
    statics = (bins, inverse, tails, parametrization, box, smallest, logit_scale, curve, -1, precision == "exact")
    y, ld = saving(lambda x, p: reference.rational_quadratic_spline_packed(x, p, *statics), x, params)
    dims = _dims(op, x, logdet, sum_dims)
    return y, ld.sum(dims) if logdet == "sum" else ld


def rational_quadratic_spline(x, widths, heights, derivatives, **how):
    """Stand-in."""
    params = torch.cat([widths, heights, derivatives], -1)
    return rational_quadratic_spline_packed(x, params, widths.shape[-1], **how)
