"""Affine and additive couplings: the operators with their derivatives, and the public functions."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch

from . import _checks
from ._autograd import Operator, pushed_forward
from ._coupling_spline import (
    DTYPES,
    HALF_DTYPES,
    _arranged,
    _checked_parameters,
    _like,
    _number,
    checked_companion,
    checked_mask,
    fake_outputs,
    sample_dims_of,
    split_behind,
    transformed_channels,
    transformed_shape,
)
from .reference import coupling as reference

ACTIVATIONS = ("exp", "sigmoid", "sigmoid_inv", "softplus", "tanh", "atan", "softclip")
# The largest |log scale| where none is given: FrEIA's clamp, and zuko's smallest slope of 1e-3.
DEFAULT_CLAMPS = {"tanh": 2.0, "atan": 2.0, "softclip": -math.log(1e-3)}
FLOORED = ("sigmoid", "softplus")  # activations that take min_scale and max_scale
ORDERS = ("scale_shift", "shift_scale")

# ---- operators: shapes, derivatives, batching, sharding ----

# statics: inverse, activation, clamp, min_scale, max_scale, shift_first, sample_dims
# packed:  inverse, activation, clamp, min_scale, max_scale, shift_first, shift_leads, split, sample_dims


def _fake_forward(x, scale, shift, *statics):
    return fake_outputs(x, x.shape, statics[-1])


def _fake_packed_forward(x, params, *statics):
    *_, split, sample_dims = statics
    return fake_outputs(x, transformed_shape(x.shape, params.shape, split), sample_dims)


def _fake_backward(grad_y, grad_logdet, *tensors_and_statics):
    return tuple(_like(t) for t in tensors_and_statics if isinstance(t, torch.Tensor))


def _save(tensors: int) -> Any:
    def save(ctx, inputs, output):
        if inputs[tensors + 1] == "none":  # its derivative does not depend on them
            ctx.zeros = [
                functools.partial(torch.zeros, t.shape, dtype=t.dtype, device=t.device) for t in inputs[:tensors]
            ]
            return ()
        return inputs[:tensors]

    return save


def _gradients(ctx, grad_y, grad_logdet):
    inverse, activation = ctx.statics[:2]
    if activation != "none":
        return _backward(grad_y, grad_logdet, *ctx.saved_tensors, *ctx.statics)
    return grad_y, None, (-grad_y if inverse else grad_y).to(ctx.zeros[2].keywords["dtype"])


def _packed_gradients(ctx, grad_y, grad_logdet):
    inverse, activation, *_, split, _ = ctx.statics
    if activation != "none":
        return _packed_backward(grad_y, grad_logdet, *ctx.saved_tensors, *ctx.statics)
    zeros = ctx.zeros[1]
    part = reference.part_of(grad_y, split, zeros.args[0][split[0]]) if split else grad_y
    return grad_y, (-part if inverse else part).unsqueeze(-1).to(zeros.keywords["dtype"])


def _by_reference(function: Any) -> dict[str, Any]:
    """Derivatives of an operator as those of its reference."""

    def of(ctx: Any) -> Any:
        return lambda *inputs: function(*inputs, *ctx.statics)

    def jvp(ctx, *tangents):
        if ctx.statics[1] != "none":
            return pushed_forward(of(ctx), ctx.saved_tensors, tangents)
        tangents = (zeros() if t is None else t for t, zeros in zip(tangents, ctx.zeros, strict=True))
        return of(ctx)(*tangents)  # it is linear

    return {
        "reference": function,
        "backward": lambda ctx, *grads: torch.func.vjp(of(ctx), *ctx.saved_tensors)[1](grads),
        "jvp": jvp,
    }


def _batched(*args):
    """A new dimension in front is one more that samples have."""
    return (*args[:-1], args[-1] if args[-1] < 0 else args[-1] + 1)


def _batched_packed(*args):
    *rest, split, sample_dims = _batched(*args)
    return (*rest, split_behind(split), sample_dims)


def _sample_dims(*args):
    return sample_dims_of(args[0], args[0], None, args[-1])


def _packed_sample_dims(*args):
    return sample_dims_of(args[0], args[0], args[-2], args[-1])


def _operations(per_element: int, activation_at: int) -> Any:
    """About so many additions and multiplications; an exponential counts as twelve."""

    def count(*args, out_shape=None, **kwargs):
        transformed = args[activation_at - 2]  # the shape of the last parameters
        return math.prod(transformed) * (1 if args[activation_at] == "none" else per_element)

    return count


_LAUNCH = "pyperf_dl._launch.coupling"


def _operators(name: str, tensors: int, fake: Any, gradients: Any, batch: Any, shard: Any) -> tuple[Operator, Operator]:
    """The forward and the backward of one way to pass parameters."""
    common: dict[str, Any] = {"batch": batch, "shard": shard}
    backward = Operator(
        f"{name}_backward",
        tensors=tensors + 2,
        launch=f"{_LAUNCH}:{name}_backward",
        fake=_fake_backward,
        save=_save(tensors + 2),
        flops=_operations(50, tensors + 3),
        **_by_reference(getattr(reference, f"{name}_backward")),
        **common,
    )
    forward = Operator(
        name,
        tensors=tensors,
        launch=f"{_LAUNCH}:{name}",
        fake=fake,
        save=_save(tensors),
        flops=_operations(40, tensors + 1),
        **_by_reference(getattr(reference, name)) | {"backward": gradients},
        **common,
    )
    return forward, backward


_coupling, _backward = _operators("affine_coupling", 3, _fake_forward, _gradients, _batched, _sample_dims)
_packed, _packed_backward = _operators(
    "affine_coupling_packed", 2, _fake_packed_forward, _packed_gradients, _batched_packed, _packed_sample_dims
)

# ---- arguments ----


_Scale = tuple[str, float, float, float]  # activation, clamp, min_scale, max_scale


def _plan(
    op: str,
    inverse: Any,
    activation: Any,
    clamp: Any,
    min_scale: Any,
    max_scale: Any,
    order: Any,
    volume_preserving: Any,
    logdet: Any,
) -> tuple[_Scale, bool]:
    """The operator's scale and shift_first."""
    _checks.flag(op, "inverse", inverse)
    _checks.flag(op, "volume_preserving", volume_preserving)
    _checks.choice(op, "activation", activation, ACTIVATIONS)
    _checks.choice(op, "order", order, ORDERS)
    _checks.choice(op, "logdet", logdet, ("sum", "elementwise"))
    bound = _clamp(op, activation, clamp)
    return (activation, bound, *_floor(op, activation, min_scale, max_scale)), order == "shift_scale"


def _clamp(op: str, activation: str, clamp: Any) -> float:
    if clamp is None:
        return DEFAULT_CLAMPS.get(activation, 0.0)
    _check_activation(op, "clamp", clamp, activation, ("exp", *DEFAULT_CLAMPS))
    bound = _number(op, "clamp", clamp)
    if bound <= 0:
        raise ValueError(f"{op}: clamp must be > 0, got {clamp}")
    return bound


def _floor(op: str, activation: str, min_scale: Any, max_scale: Any) -> tuple[float, float]:
    smallest = _number(op, "min_scale", min_scale)
    if smallest:
        _check_activation(op, "min_scale", min_scale, activation, FLOORED)
    if smallest < 0:
        raise ValueError(f"{op}: min_scale must be >= 0, got {min_scale}")
    if max_scale is None:
        return smallest, 0.0
    largest = _number(op, "max_scale", max_scale)
    if not 0 < smallest < largest:
        raise ValueError(f"{op}: max_scale must be above a min_scale > 0, got {max_scale} with min_scale={min_scale}")
    return smallest, largest


def _check_activation(op: str, name: str, value: Any, activation: str, allowed: Sequence[str]) -> None:
    if activation not in allowed:
        names = ", ".join(map(repr, allowed))
        raise ValueError(f"{op}: {name} is for the activations {names}, got {value!r} with {activation!r}")


# Programs call with few combinations of arguments; checking them again costs more than a small tensor does.
_planned = functools.lru_cache(maxsize=256, typed=True)(_plan)


def _planned_once(*arguments: Any) -> tuple[_Scale, bool]:
    if torch.compiler.is_compiling():
        return _plan(*arguments)
    try:
        return _planned(*arguments)
    except TypeError:  # an argument without a hash, or a wrong one
        return _plan(*arguments)


def _parameter(op: str, name: str, value: Any, x: torch.Tensor, shape: torch.Size | None = None) -> torch.Tensor:
    """`value` with the shape of x, or of the part of x that is transformed."""
    _checks.strided_tensor(op, name, value, DTYPES)
    checked_companion(op, name, value, x)
    shape = x.shape if shape is None else shape
    if value.shape == shape:
        return value
    try:
        return value.expand(shape)
    except RuntimeError:
        raise ValueError(
            f"{op}: {name} must have x's shape or broadcast to it, got {list(value.shape)} for x {list(shape)}"
        ) from None


_LOG_SCALE: _Scale = ("exp", 0.0, 0.0, 0.0)
_NEUTRAL = {"exp": 0.0, "tanh": 0.0, "atan": 0.0, "softclip": 0.0, "sigmoid": 1e4, "sigmoid_inv": 1e4}  # log s is 0


def _mean(log: torch.Tensor, mask: torch.Tensor | None, dims: tuple[int, ...]) -> torch.Tensor:
    """Of what counts."""
    if mask is None:
        return log.mean(dims, keepdim=True)
    return torch.where(mask, log, 0.0).sum(dims, keepdim=True) / mask.sum(dims, keepdim=True).clamp(min=1)


def _adapted(
    scale: torch.Tensor,
    shift: torch.Tensor,
    x: torch.Tensor,
    of_scale: _Scale,
    volume_preserving: bool,
    mask: torch.Tensor | None,
    inverse: bool,
    sample_dims: int,
) -> tuple[torch.Tensor, torch.Tensor, _Scale]:
    """Parameters of the operator that do what it has no argument for."""
    activation, _, min_scale, _ = of_scale
    if volume_preserving or (mask is not None and (min_scale or activation not in _NEUTRAL)):
        scale = scale if mask is None else torch.where(mask, scale, 0.0)  # NaN has a gradient even if it is not taken
        log = reference.log_scale(scale.to(reference.working_dtype(x)), *of_scale)
        dims = tuple(range(min(1, x.dim()) if sample_dims < 0 else sample_dims, x.dim()))
        if volume_preserving:
            log = log - _mean(log, mask, dims) if dims else torch.zeros_like(log)
        scale, shift, of_scale = log.to(x.dtype), shift.to(x.dtype), _LOG_SCALE
    if mask is not None:
        scale = torch.where(mask, scale, _NEUTRAL[of_scale[0]])
        shift = torch.where(mask, shift, 0.0 if inverse else -0.0)  # what it adds to -0.0 is -0.0
    return scale, shift, of_scale


def affine_coupling(
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    *,
    inverse: bool = False,
    activation: str = "exp",
    clamp: float | None = None,
    min_scale: float = 0.0,
    max_scale: float | None = None,
    order: str = "scale_shift",
    volume_preserving: bool = False,
    sample_mask: torch.Tensor | None = None,
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
        min_scale: for ``"sigmoid"`` and ``"softplus"``, a floor that is added: s = sigmoid(u + 2) + min_scale or
            softplus(u) + min_scale, as in nflows with 1e-3. 0 for none.
        max_scale: beside a floor, the largest s, above min_scale, and no gradient beyond it.
        order: ``"scale_shift"`` or ``"shift_scale"``.
        volume_preserving: log s less its mean over the summed dimensions, so that the log-det of a sample is 0 (GIN);
            of what sample_mask lets through.
            FrEIA's GINCouplingBlock takes the mean over the channels: ``sum_dims=1``.
        sample_mask: bool, broadcasts to x's shape. Where it is False an element passes as it is, with a log-det of 0
            and no gradient for its parameters, whatever they are.
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
    that is saved, but for what a mask or volume_preserving makes of scale and shift. Dinh et al.: RealNVP (2017);
    Kingma and Dhariwal: Glow (2018); Sorrenson et al.: GIN (2020).

    >>> x, u, t = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, -1.0]])
    >>> y, logdet = pyperf_dl.affine_coupling(x, u, t)
    >>> y, logdet
    (tensor([[1.5000, 4.4366]]), tensor([1.]))
    >>> pyperf_dl.affine_coupling(y, u, t, inverse=True)
    (tensor([[1., 2.]]), tensor([-1.]))
    """
    op = "affine_coupling"
    of_scale, shift_first = _planned_once(
        op, inverse, activation, clamp, min_scale, max_scale, order, volume_preserving, logdet
    )
    _checks.strided_tensor(op, "x", x, DTYPES)
    scale, shift = _parameter(op, "scale", scale, x), _parameter(op, "shift", shift, x)
    if scale.dtype != shift.dtype:
        raise TypeError(f"{op}: shift must have the dtype of scale, {scale.dtype}, got {shift.dtype}")
    mask = checked_mask(op, sample_mask, x, x.shape)
    x, (scale, shift, mask), sample_dims, back = _arranged(op, x, (scale, shift, mask), logdet, sum_dims)
    if volume_preserving or mask is not None:
        scale, shift, of_scale = _adapted(scale, shift, x, of_scale, volume_preserving, mask, inverse, sample_dims)
    y, total = _coupling(x, scale, shift, inverse, *of_scale, shift_first, sample_dims)
    return (y if back is None else y.permute(back)), _preserved(total, x, volume_preserving, sample_dims)


def _preserved(total: torch.Tensor, x: torch.Tensor, volume_preserving: bool, sample_dims: int) -> torch.Tensor:
    """Zeros where the log-dets of a sample are 0 but for rounding; 16 bits do not hold a mean of 0."""
    exact = volume_preserving and sample_dims >= 0 and x.dtype not in HALF_DTYPES
    return torch.zeros_like(total) if exact else total


def affine_coupling_packed(
    x: torch.Tensor,
    params: torch.Tensor,
    *,
    channels: slice | None = None,
    parameters: str = "scale_shift",
    inverse: bool = False,
    activation: str = "exp",
    clamp: float | None = None,
    min_scale: float = 0.0,
    max_scale: float | None = None,
    order: str = "scale_shift",
    volume_preserving: bool = False,
    sample_mask: torch.Tensor | None = None,
    logdet: str = "sum",
    sum_dims: int | Sequence[int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`affine_coupling` with both parameters in one tensor, as a conditioner gives them, of some channels of x.

    Args:
        x: [B, C, ...]; without `channels` any shape.
        params: [*x.shape, 2], or [B, C', ..., 2] for C' `channels`; or what broadcasts to it. Any strides: halves and
            interleaved parameters are views of that shape. Its gradient is one tensor, laid out alike.
        channels: the slice of dim 1 that is transformed, of a step >= 1. The others are copied to y, and their gradient
            to x. By default all of x is transformed. sample_mask goes with the part that is.
        parameters: ``"scale_shift"`` or ``"shift_scale"``: which comes first in params.

    The other arguments, results and errors are those of :func:`affine_coupling`.

    >>> x, params = torch.randn(8, 6), torch.randn(8, 2 * 3)  # halves: scales of 3 channels, then shifts
    >>> params = params.view(8, 2, 3).transpose(1, 2)
    >>> y, logdet = pyperf_dl.affine_coupling_packed(x, params, channels=slice(3, None), activation="tanh")
    >>> torch.equal(y[:, :3], x[:, :3]), logdet.shape
    (True, torch.Size([8]))
    """
    op = "affine_coupling_packed"
    of_scale, shift_first = _planned_once(
        op, inverse, activation, clamp, min_scale, max_scale, order, volume_preserving, logdet
    )
    _checks.choice(op, "parameters", parameters, ORDERS)
    shape, split = transformed_channels(op, channels, x)
    params = _checked_parameters(op, "params", params, x, shape)
    if params.shape[-1] != 2:
        raise ValueError(
            f"{op}: params must have 2 in the last dimension, a scale and a shift, got {list(params.shape)}"
        )
    mask, shift_leads = checked_mask(op, sample_mask, x, shape), parameters == "shift_scale"
    x, (params, mask), sample_dims, back = _arranged(op, x, [params, mask], logdet, sum_dims, split)
    if volume_preserving or mask is not None:
        pair = reference.scale_and_shift(params, shift_leads)
        *pair, of_scale = _adapted(*pair, x, of_scale, volume_preserving, mask, inverse, sample_dims)
        params, shift_leads = torch.stack(pair, -1), False
    y, total = _packed(x, params, inverse, *of_scale, shift_first, shift_leads, split, sample_dims)
    return (y if back is None else y.permute(back)), _preserved(total, x, volume_preserving, sample_dims)


def additive_coupling(
    x: torch.Tensor,
    shift: torch.Tensor,
    *,
    channels: slice | None = None,
    inverse: bool = False,
    sample_mask: torch.Tensor | None = None,
    logdet: str = "sum",
    sum_dims: int | Sequence[int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Shift every element, or undo that: ``y = x + t``, whose log-det is 0.

    Args:
        x: float16, bfloat16, float32 or float64, any shape and strides.
        shift: t, x's shape or what broadcasts to it; x's dtype, or float16 or bfloat16 beside a float32 x. Any strides.
        channels: the slice of dim 1 of x [B, C, ...] that is shifted, for a shift [B, C', ...]; the others are copied.
        inverse: ``x = y - t``.
        sample_mask: bool, broadcasts to what is shifted. Where it is False an element passes as it is.
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
    shape, split = transformed_channels(op, channels, x)
    shift = _parameter(op, "shift", shift, x, shape)
    mask = checked_mask(op, sample_mask, x, shape)
    if mask is not None:
        shift = torch.where(mask, shift, 0.0 if inverse else -0.0)
    x, (params,), sample_dims, back = _arranged(op, x, [shift.unsqueeze(-1)], logdet, sum_dims, split)
    y, total = _packed(x, params, inverse, "none", 0.0, 0.0, 0.0, False, False, split, sample_dims)
    return (y if back is None else y.permute(back)), total
