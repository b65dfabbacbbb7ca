"""Affine and additive couplings: the operators with their derivatives, and the public functions."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch

from . import _checks
from ._autograd import Operator
from ._coupling_spline import DTYPES, HALF_DTYPES, _arranged, _like, _number
from .reference import coupling as reference

ACTIVATIONS = ("exp", "sigmoid", "sigmoid_inv", "softplus", "tanh", "atan", "softclip")
# The largest |log scale| where none is given: FrEIA's clamp, and zuko's smallest slope of 1e-3.
DEFAULT_CLAMPS = {"tanh": 2.0, "atan": 2.0, "softclip": -math.log(1e-3)}
ORDERS = ("scale_shift", "shift_scale")

# ---- operators: shapes, derivatives, batching, sharding ----

# statics: inverse, activation, clamp, shift_first, sample_dims


def _fake_forward(x, scale, shift, inverse, activation, clamp, shift_first, sample_dims):
    dtype = reference.logdet_dtype(x)
    return _like(x), _like(x, dtype) if sample_dims < 0 else x.new_empty(x.shape[:sample_dims], dtype=dtype)


def _fake_backward(grad_y, grad_logdet, x, scale, shift, *statics):
    return _like(x), _like(scale), _like(shift)


def _saved(ctx, inputs, output):
    if inputs[4] == "none":  # the derivative does not depend on them
        ctx.shift_dtype = inputs[2].dtype
    else:
        ctx.save_for_backward(*inputs[:3])
        ctx.save_for_forward(*inputs[:3])


def _saved_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:5])
    ctx.save_for_forward(*inputs[:5])


def _gradients(ctx, grad_y, grad_logdet):
    inverse, activation = ctx.statics[:2]
    if activation == "none":
        return grad_y, None, (-grad_y if inverse else grad_y).to(ctx.shift_dtype)
    return _backward(grad_y, grad_logdet, *ctx.saved_tensors, *ctx.statics)


def _tangents(ctx, *tangents):
    if ctx.statics[1] != "none":
        return reference.pushed_forward(_function(reference.affine_coupling, ctx), ctx.saved_tensors, tangents)
    x, _, shift = tangents
    if shift is not None:
        shift = -shift if ctx.statics[0] else shift
    tangent = shift if x is None else x if shift is None else x + shift
    if tangent is None:  # of the scale alone, which does nothing
        return None, None
    like = _fake_forward(tangent, None, None, *ctx.statics)[1]
    return tangent, torch.zeros_like(like)


def _function(function, ctx):
    return lambda *inputs: function(*inputs, *ctx.statics)


def _batched(*args):
    """A new dimension in front is one more that samples have."""
    return (*args[:-1], args[-1] if args[-1] < 0 else args[-1] + 1)


def _sample_dims(*args):
    """Dimensions in front, along which tensors may be sharded: all of them where nothing is summed."""
    return range(len(args[0].shape) if args[-1] < 0 else args[-1])


def _operations(per_element: int, x_at: int) -> Any:
    """About so many additions and multiplications; an exponential counts as twelve."""

    def count(*args, out_shape=None, **kwargs):
        return math.prod(args[x_at]) * (1 if args[-4] == "none" else per_element)

    return count


_LAUNCH = "pyperf_dl._launch.coupling"

_backward = Operator(
    "affine_coupling_backward",
    tensors=5,
    launch=f"{_LAUNCH}:affine_coupling_backward",
    fake=_fake_backward,
    reference=reference.affine_coupling_backward,
    save=_saved_backward,
    backward=lambda ctx, *grads: torch.func.vjp(_function(reference.affine_coupling_backward, ctx), *ctx.saved_tensors)[
        1
    ](grads),
    jvp=lambda ctx, *tangents: reference.pushed_forward(
        _function(reference.affine_coupling_backward, ctx), ctx.saved_tensors, tangents
    ),
    batch=_batched,
    shard=_sample_dims,
    flops=_operations(50, 2),
)
_coupling = Operator(
    "affine_coupling",
    tensors=3,
    launch=f"{_LAUNCH}:affine_coupling",
    fake=_fake_forward,
    reference=reference.affine_coupling,
    save=_saved,
    backward=_gradients,
    jvp=_tangents,
    batch=_batched,
    shard=_sample_dims,
    flops=_operations(40, 0),
)

# ---- arguments ----


def _plan(
    op: str, inverse: Any, activation: Any, clamp: Any, order: Any, volume_preserving: Any, logdet: Any
) -> tuple[float, bool]:
    """The operator's clamp and shift_first."""
    _checks.flag(op, "inverse", inverse)
    _checks.flag(op, "volume_preserving", volume_preserving)
    _checks.choice(op, "activation", activation, ACTIVATIONS)
    _checks.choice(op, "order", order, ORDERS)
    _checks.choice(op, "logdet", logdet, ("sum", "elementwise"))
    shift_first = order == "shift_scale"
    if clamp is None:
        return DEFAULT_CLAMPS.get(activation, 0.0), shift_first
    if activation != "exp" and activation not in DEFAULT_CLAMPS:
        names = ", ".join(map(repr, ("exp", *DEFAULT_CLAMPS)))
        raise ValueError(f"{op}: clamp is for the activations {names}, got {clamp!r} with {activation!r}")
    bound = _number(op, "clamp", clamp)
    if bound <= 0:
        raise ValueError(f"{op}: clamp must be > 0, got {clamp}")
    return bound, shift_first


# Programs call with few combinations of arguments; checking them again costs more than a small tensor does.
_planned = functools.lru_cache(maxsize=256, typed=True)(_plan)


def _planned_once(*arguments: Any) -> tuple[float, bool]:
    if torch.compiler.is_compiling():
        return _plan(*arguments)
    try:
        return _planned(*arguments)
    except TypeError:  # an argument without a hash, or a wrong one
        return _plan(*arguments)


def _parameter(op: str, name: str, value: Any, x: torch.Tensor) -> torch.Tensor:
    _checks.strided_tensor(op, name, value, DTYPES)
    if value.dtype != x.dtype and not (x.dtype == torch.float32 and value.dtype in HALF_DTYPES):
        raise TypeError(
            f"{op}: {name} must have x's dtype, or float16 or bfloat16 beside a float32 x; got {value.dtype} for x "
            f"{x.dtype}"
        )
    if value.device != x.device:
        raise ValueError(f"{op}: {name} must be on x's device {x.device}, got {value.device}")
    if value.shape == x.shape:
        return value
    try:
        return value.expand(x.shape)
    except RuntimeError:
        raise ValueError(
            f"{op}: {name} must have x's shape or broadcast to it, got {list(value.shape)} for x {list(x.shape)}"
        ) from None


def _sum_arranged(
    op: str, x: torch.Tensor, parameters: Sequence[torch.Tensor], logdet: str, sum_dims: Any
) -> tuple[torch.Tensor, Sequence[torch.Tensor], int, list[int] | None]:
    if sum_dims is None:  # no dimension to move
        return x, parameters, -1 if logdet == "elementwise" else min(1, x.dim()), None
    # The permutation for splines, whose parameters have a dimension more.
    x, moved, sample_dims, back = _arranged(op, x, [p.unsqueeze(-1) for p in parameters], logdet, sum_dims)
    return x, [p.squeeze(-1) for p in moved], sample_dims, back


def _centred(scale: torch.Tensor, x: torch.Tensor, activation: str, clamp: float, sample_dims: int) -> torch.Tensor:
    """The log scale less its mean over a sample."""
    log = reference.log_scale(scale.to(reference.working_dtype(x)), activation, clamp)
    dims = tuple(range(min(1, x.dim()) if sample_dims < 0 else sample_dims, x.dim()))
    return (log - log.mean(dims, keepdim=True) if dims else torch.zeros_like(log)).to(x.dtype)


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
    sum_dims: int | Sequence[int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and shift every element, or undo that, and log \\|dy/dx\\|.

    ``y = x * s + t``, or ``y = (x + t) * s`` with ``order="shift_scale"``; t is `shift`, and log s = l(u) where u is
    `scale`, the raw output of a conditioner:

    ================  =============================  ==================================================
    activation        log s                          known from
    ================  =============================  ==================================================
    ``"exp"``         u, within +-clamp if given     RealNVP; normflows, FrEIA
    ``"sigmoid"``     log sigmoid(u + 2)             Glow; normflows calls its forward "sigmoid_inv"
    ``"sigmoid_inv"`` -log sigmoid(u + 2)            normflows' "sigmoid"
    ``"softplus"``    log softplus(u)                positive by softplus
    ``"tanh"``        clamp * tanh(u)                RealNVP; FrEIA's TANH, AllInOneBlock
    ``"atan"``        clamp * 0.636 * atan(u)        FrEIA's ATAN, its default
    ``"softclip"``    u / (1 + \\|u / clamp\\|)      zuko's MonotonicAffineTransform
    ================  =============================  ==================================================

    Args:
        x: float16, bfloat16, float32 or float64, any shape and strides. 16-bit types are computed in float32 and
            rounded once.
        scale, shift: x's shape, or what broadcasts to it; x's dtype, or float16 or bfloat16 beside a float32 x. Any
            strides: halves, interleaved or expanded parameters need no copy.
        inverse: x from y: ``(y - t) / s``, or ``y / s - t``.
        activation: as above.
        clamp: the largest \\|log s\\|, > 0. ``"exp"``: none by default, and no gradient beyond it. ``"tanh"``,
            ``"atan"``: 2.0 as in FrEIA. ``"softclip"``: -log(1e-3) = 6.908, zuko's slope.
        order: ``"scale_shift"`` or ``"shift_scale"``.
        volume_preserving: log s less its mean over the summed dimensions, so that the log-det of a sample is 0 (GIN).
            FrEIA's GINCouplingBlock takes the mean over the channels: ``sum_dims=1``.
        logdet: ``"sum"`` over all dimensions but the first, or ``"elementwise"``.
        sum_dims: the dimensions to sum over, instead.

    Returns:
        y, with x's shape and dtype, and the log-det, float32 (float64 for float64): the dimensions that were not
        summed, or [*x.shape]. Of the inverse it is log \\|dx/dy\\|.

    Raises:
        TypeError, ValueError: arguments that do not fit. No value of a tensor raises.

    The log-det comes from u and never from log(exp(u)). y is infinite only where its exact value is not representable,
    finite inputs never give NaN, and a NaN stays in its element (and in the log-det of its sample). Deterministic: the
    same bits for any number of threads and SIMD level. Differentiable in all three tensors, twice too; they are all
    that is saved. Dinh et al.: RealNVP (2017); Kingma and Dhariwal: Glow (2018); Sorrenson et al.: GIN (2020).

    >>> x, u, t = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, -1.0]])
    >>> y, logdet = pyperf_dl.affine_coupling(x, u, t)
    >>> y, logdet
    (tensor([[1.5000, 4.4366]]), tensor([1.]))
    >>> pyperf_dl.affine_coupling(y, u, t, inverse=True)
    (tensor([[1., 2.]]), tensor([-1.]))
    """
    op = "affine_coupling"
    bound, shift_first = _planned_once(op, inverse, activation, clamp, order, volume_preserving, logdet)
    _checks.strided_tensor(op, "x", x, DTYPES)
    scale, shift = _parameter(op, "scale", scale, x), _parameter(op, "shift", shift, x)
    if scale.dtype != shift.dtype:
        raise TypeError(f"{op}: shift must have the dtype of scale, {scale.dtype}, got {shift.dtype}")
    x, (scale, shift), sample_dims, back = _sum_arranged(op, x, (scale, shift), logdet, sum_dims)
    if volume_preserving:
        scale, shift = _centred(scale, x, activation, bound, sample_dims), shift.to(x.dtype)
        activation, bound = "exp", 0.0
    y, total = _coupling(x, scale, shift, inverse, activation, bound, shift_first, sample_dims)
    if volume_preserving and sample_dims >= 0 and x.dtype not in HALF_DTYPES:  # 16 bits do not hold a mean of 0
        total = torch.zeros_like(total)
    return (y if back is None else y.permute(back)), total


def additive_coupling(
    x: torch.Tensor,
    shift: torch.Tensor,
    *,
    inverse: bool = False,
    logdet: str = "sum",
    sum_dims: int | Sequence[int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Shift every element, or undo that: ``y = x + t``, whose log-det is 0.

    Args:
        x: float16, bfloat16, float32 or float64, any shape and strides.
        shift: t, x's shape or what broadcasts to it; x's dtype, or float16 or bfloat16 beside a float32 x. Any strides.
        inverse: ``x = y - t``.
        logdet: ``"sum"`` over all dimensions but the first, or ``"elementwise"``.
        sum_dims: the dimensions to sum over, instead.

    Returns:
        y, with x's shape and dtype, and zeros of the log-det's shape, float32 (float64 for float64).

    Raises:
        TypeError, ValueError: arguments that do not fit.

    Deterministic, differentiable in both tensors, of which nothing is saved. Dinh, Krueger, Bengio: NICE (2014).

    >>> y, logdet = pyperf_dl.additive_coupling(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.5, -1.0]]))
    >>> y, logdet
    (tensor([[1.5000, 1.0000]]), tensor([0.]))
    """
    op = "additive_coupling"
    _checks.flag(op, "inverse", inverse)
    _checks.choice(op, "logdet", logdet, ("sum", "elementwise"))
    _checks.strided_tensor(op, "x", x, DTYPES)
    shift = _parameter(op, "shift", shift, x)
    x, (shift,), sample_dims, back = _sum_arranged(op, x, (shift,), logdet, sum_dims)
    y, total = _coupling(x, shift, shift, inverse, "none", 0.0, False, sample_dims)
    return (y if back is None else y.permute(back)), total
