"""Layers of a flow that mix or scale the channels alike at every position: actnorm and the 1x1 convolution."""

from __future__ import annotations

import math
from typing import Any

import torch

from . import _checks
from .reference import coupling as reference

DTYPES = _checks.FLOATS

# ---- checks ----


def checked_input(op: str, x: Any) -> torch.Tensor:
    _checks.strided_tensor(op, "x", x, DTYPES)
    if x.dim() < 2:
        raise ValueError(f"{op}: x must have shape [B, C, ...], got {_checks.described(x)}")
    return x


def _of_shape(op: str, name: str, value: Any, shape: tuple[int, ...], x: torch.Tensor, dtypes: Any = DTYPES) -> None:
    _checks.strided_tensor(op, name, value, dtypes)
    if value.shape != shape:
        raise ValueError(
            f"{op}: {name} must have shape {list(shape)} for the {x.shape[1]} channels of x, "
            f"got {_checks.described(value)}"
        )
    if value.device != x.device:
        raise ValueError(f"{op}: {name} must be on the device of x, {x.device}, got {_checks.described(value)}")


def checked_sample_mask(op: str, mask: Any, x: torch.Tensor) -> torch.Tensor | None:
    """The mask as bool, True where x takes part; its shape broadcasts to [B, 1, ...]."""
    if mask is None:
        return None
    _checks.strided_tensor(op, "sample_mask", mask, (torch.bool, *DTYPES))
    fits = mask.dim() == x.dim() and mask.shape[1] == 1
    if not fits or any(m not in (1, n) for d, (m, n) in enumerate(zip(mask.shape, x.shape, strict=True)) if d != 1):
        wanted = [x.shape[0], 1, *x.shape[2:]]
        raise ValueError(
            f"{op}: sample_mask must have shape {wanted}, or 1 in place of a size, for x {list(x.shape)}, "
            f"got {_checks.described(mask)}"
        )
    if mask.device != x.device:
        raise ValueError(f"{op}: sample_mask must be on the device of x, {x.device}, got {_checks.described(mask)}")
    return mask if mask.dtype == torch.bool else mask != 0


def _at_positions(one: torch.Tensor, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The log-det of each sample, [B], from that of one position."""
    one = one.to(reference.logdet_dtype(x))
    if mask is None:
        return (one * math.prod(x.shape[2:])).repeat(x.shape[0])
    return one * mask.expand(x.shape[0], 1, *x.shape[2:]).flatten(1).sum(1)


def _passed(mask: torch.Tensor | None, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return y if mask is None else torch.where(mask, y, x)


# ---- public functions ----


def actnorm(
    x: torch.Tensor,
    log_scale: torch.Tensor,
    bias: torch.Tensor,
    *,
    inverse: bool = False,
    sample_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Affine map of every channel: y = x * exp(log_scale) + bias, with its log-determinant.

    Args:
        x: [B, C, ...], float16, bfloat16, float32 or float64; any strides.
        log_scale, bias: [C]; a float dtype each. Computed in float32, or in float64 for x in float64.
        inverse: x = (y - bias) * exp(-log_scale).
        sample_mask: bool or float, [B, 1, ...] or 1 in place of a size; where it is 0, x passes unchanged and adds
            nothing to the log-det.

    Returns:
        y, with the dtype of x, and log |det dy/dx| of each sample, [B]: the sum of log_scale times the number of
        positions; float32, or float64 for x in float64.

    Raises:
        TypeError, ValueError: a tensor of another dtype, shape or device.

    Plain PyTorch operators: deterministic, differentiable any number of times. Follows Kingma and Dhariwal, "Glow"
    (2018); :class:`ActNorm` has the initialisation from data.

    >>> y, logdet = pyperf_dl.actnorm(torch.ones(2, 3), torch.zeros(3), torch.tensor([0.0, 1.0, 2.0]))
    >>> y[0], logdet
    (tensor([1., 2., 3.]), tensor([0., 0.]))
    """
    op = "actnorm"
    checked_input(op, x)
    _of_shape(op, "log_scale", log_scale, (x.shape[1],), x)
    _of_shape(op, "bias", bias, (x.shape[1],), x)
    _checks.flag(op, "inverse", inverse)
    mask = checked_sample_mask(op, sample_mask, x)
    dtype = reference.working_dtype(x)
    channel = (-1, *[1] * (x.dim() - 2))
    a, b = log_scale.to(dtype), bias.to(dtype).view(channel)
    if inverse:
        a = -a
    scale = a.exp().view(channel)
    y = ((x - b) * scale if inverse else x * scale + b).to(x.dtype)
    return _passed(mask, y, x), _at_positions(a.sum(), x, mask)


def invertible_conv1x1(
    x: torch.Tensor,
    lower: torch.Tensor,
    upper: torch.Tensor,
    log_diagonal: torch.Tensor,
    permutation: torch.Tensor,
    sign: torch.Tensor,
    *,
    inverse: bool = False,
    sample_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Linear map of the channels at every position, y = W x, with its log-determinant.

    W = (L U)[permutation]: L is `lower` below a unit diagonal, U is `upper` above the diagonal
    sign * exp(log_diagonal). Whatever else the two matrices hold is not read.

    Args:
        x: [B, C, ...], float16, bfloat16, float32 or float64; any strides.
        lower, upper: [C, C]; a float dtype each.
        log_diagonal: [C].
        permutation: int64 [C], the row of L U that each row of W is.
        sign: [C], -1 or 1.
        inverse: x = W^-1 y. W^-1 comes from two triangular solves in float64, whatever the dtype of x.
        sample_mask: as for :func:`actnorm`.

    Returns:
        y, with the dtype of x, and log |det dy/dx| of each sample, [B]: the sum of log_diagonal times the number of
        positions; float32, or float64 for x in float64. Autocast does not lower the precision of the product.

    Raises:
        TypeError, ValueError: a tensor of another dtype, shape or device.

    Plain PyTorch operators: differentiable any number of times; deterministic where torch.matmul is. Follows Kingma
    and Dhariwal, "Glow" (2018). :class:`InvertibleConv1x1` holds the parameters.

    >>> swap = torch.tensor([1, 0])
    >>> zero, one = torch.zeros(2), torch.ones(2)
    >>> x = torch.tensor([[3.0, 4.0]])
    >>> pyperf_dl.invertible_conv1x1(x, torch.zeros(2, 2), torch.zeros(2, 2), zero, swap, one)
    (tensor([[4., 3.]]), tensor([0.]))
    """
    op = "invertible_conv1x1"
    checked_input(op, x)
    channels = x.shape[1]
    _of_shape(op, "lower", lower, (channels, channels), x)
    _of_shape(op, "upper", upper, (channels, channels), x)
    _of_shape(op, "log_diagonal", log_diagonal, (channels,), x)
    _of_shape(op, "permutation", permutation, (channels,), x, (torch.int64,))
    _of_shape(op, "sign", sign, (channels,), x)
    _checks.flag(op, "inverse", inverse)
    mask = checked_sample_mask(op, sample_mask, x)
    with torch.autocast(x.device.type, enabled=False):
        weight = _weight(lower, upper, log_diagonal, permutation, sign, inverse)
        y = _times_channels(x.to(reference.working_dtype(x)), weight).to(x.dtype)
    one = log_diagonal.to(reference.logdet_dtype(x)).sum()
    return _passed(mask, y, x), _at_positions(-one if inverse else one, x, mask)


def _weight(
    lower: torch.Tensor,
    upper: torch.Tensor,
    log_diagonal: torch.Tensor,
    permutation: torch.Tensor,
    sign: torch.Tensor,
    inverse: bool,
) -> torch.Tensor:
    """W or its inverse, float64 [C, C]."""
    left, right = lower.double().tril(-1), upper.double().triu(1)
    eye = torch.eye(len(left), dtype=left.dtype, device=left.device)
    left, right = left + eye, right + torch.diag(sign.double() * log_diagonal.double().exp())
    if not inverse:
        return (left @ right)[permutation]
    rows = torch.linalg.solve_triangular(left, eye[permutation].mT, upper=False, unitriangular=True)
    return torch.linalg.solve_triangular(right, rows, upper=True)


def _times_channels(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """weight [C, C] times x [B, C, ...] along dim 1, without a copy of x where its channels or positions are dense."""
    weight = weight.to(x.dtype)
    last = x.movedim(1, -1)
    if x.dim() == 2 or last.is_contiguous():
        return (last @ weight.mT).movedim(-1, 1)
    return (weight @ x.flatten(2)).view(x.shape)
