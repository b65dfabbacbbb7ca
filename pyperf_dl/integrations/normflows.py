"""Flows of normflows, with their rational-quadratic splines and affine couplings served by pyperf_dl.

    from pyperf_dl.integrations import normflows

    normflows.enable()                    # from now on, in the whole process
    with normflows.enable(precision="exact"):
        ...                               # inside the block

Densities and samples are those of normflows within its own float32 error. They differ where normflows fails: outside
its domain a spline without tails goes on along its edge slopes, where normflows raises or reads out of bounds; and the
inverse is finite for every finite input, where normflows asserts a discriminant >= 0 or gives NaN. With a list of
tails, what is outside the bounds becomes 0 with log-det 0, as in normflows. Nothing is read back from the device.
"""

from __future__ import annotations

from typing import Any

import torch

import pyperf_dl

from . import _splines, _swap
from ._swap import Declined, Report, Settings, Takeover

__all__ = ["Report", "disable", "enable", "report"]

_peer = _swap.Peer("normflows", "normflows", "1.7.2", "1.7.3")
disable, report = _peer.disable, _peer.report
_SPLINES = "normflows.utils.splines"
_COUPLING = "normflows.flows.neural_spline.coupling"
_AUTOREGRESSIVE = "normflows.flows.neural_spline.autoregressive"
_AFFINE = "normflows.flows.affine.coupling"
_ACTIVATIONS = {"exp": "exp", "sigmoid": "sigmoid_inv", "sigmoid_inv": "sigmoid"}  # its "sigmoid" divides

# ---- splines ----


@_peer.replaces(_SPLINES, "unconstrained_rational_quadratic_spline")
def unconstrained_rational_quadratic_spline(
    settings: Settings,
    inputs: Any,
    unnormalized_widths: Any,
    unnormalized_heights: Any,
    unnormalized_derivatives: Any,
    inverse: Any = False,
    tails: Any = "linear",
    tail_bound: Any = 1.0,
    min_bin_width: Any = 1e-3,
    min_bin_height: Any = 1e-3,
    min_derivative: Any = 1e-3,
) -> Any:
    why = _swap.unfit(inputs, unnormalized_widths, unnormalized_heights, unnormalized_derivatives)
    bounds_given = isinstance(tail_bound, torch.Tensor)
    if not why and bounds_given:
        why = _swap.unfit(inputs, tail_bound)
    if why:
        return Declined(why)
    by_feature = isinstance(tails, (list, tuple))
    if any(rule not in ("linear", "circular") for rule in (tails if by_feature else [tails])):
        return Declined("arguments")
    if bounds_given:
        if tail_bound.requires_grad:
            return Declined("bounds with a gradient")
        if tail_bound.dim() > inputs.dim() or any(
            b not in (1, n) for b, n in zip(tail_bound.shape[::-1], inputs.shape[::-1], strict=False)
        ):
            return Declined("shape")
        bounds: Any = tail_bound.to(inputs.dtype)
    elif _swap.number(tail_bound):
        bounds = (-tail_bound, tail_bound, -tail_bound, tail_bound)
    else:
        return Declined("arguments")
    if by_feature:  # K + 1 derivatives, of which linear tails use the inner ones and circular tails all but the last
        if len(tails) == 0 or inputs.shape[-1:] != (len(tails),):
            return Declined("shape")
        if unnormalized_derivatives.shape[-1:] != (unnormalized_widths.shape[-1] + 1,):
            return Declined("number of derivatives")
        tails, unnormalized_derivatives = tuple(tails), unnormalized_derivatives[..., :-1]
    got = _splines.separate(
        settings,
        inputs,
        unnormalized_widths,
        unnormalized_heights,
        unnormalized_derivatives,
        inverse,
        tails,
        bounds,
        (min_bin_width, min_bin_height, min_derivative),
    )
    if by_feature and type(got) is not Declined:
        got = _splines.within(got, inputs, -tail_bound, tail_bound, 0.0)
    return got


_peer.replaces(_SPLINES, "rational_quadratic_spline")(_splines.rational_quadratic_spline)
_peer.replaces(_COUPLING, "PiecewiseRationalQuadraticCoupling._piecewise_cdf")(_splines.piecewise_cdf)
_peer.replaces(_AUTOREGRESSIVE, "MaskedPiecewiseRationalQuadraticAutoregressive._elementwise")(_splines.elementwise)

# ---- affine couplings ----


def _affine(layer: Any, z: Any, inverse: bool) -> Any:
    """z: the untouched and the other half; parameters interleave shift and scale along dim 1."""
    if not isinstance(z, (list, tuple)) or len(z) != 2:
        return Declined("arguments")
    z1, z2 = z
    why = _swap.unfit(z2) or ("" if z2.dim() >= 2 else "shape")
    if why:
        return Declined(why)
    if layer.scale and layer.scale_map not in _ACTIVATIONS:
        return Declined("arguments")
    param = layer.param_map(z1)
    why = _swap.unfit(z2, param)
    if not why and (param.dim() != z2.dim() or param.shape[1] != z2.shape[1] * (2 if layer.scale else 1)):
        why = "shape"
    shift = param[:, 0::2] if not why and layer.scale else param
    if not why and shift.shape != z2.shape:
        why = "shape"
    if why:
        return Declined(why, param_map=param)
    if layer.scale:
        activation = _ACTIVATIONS[layer.scale_map]
        z2, logdet = pyperf_dl.affine_coupling(z2, param[:, 1::2], shift, inverse=inverse, activation=activation)
    else:
        z2, logdet = pyperf_dl.additive_coupling(z2, shift, inverse=inverse)
    return [z1, z2], logdet.to(z2.dtype)


@_peer.replaces(_AFFINE, "AffineCoupling.forward")
def _affine_forward(settings: Settings, self: Any, z: Any) -> Any:
    return _affine(self, z, False)


@_peer.replaces(_AFFINE, "AffineCoupling.inverse")
def _affine_inverse(settings: Settings, self: Any, z: Any) -> Any:
    return _affine(self, z, True)


@_peer.replaces(_AFFINE, "MaskedAffineFlow.forward", "MaskedAffineFlow.inverse")
def _masked_affine(settings: Settings, self: Any, z: Any) -> Any:
    return Declined("mask")


_splines.serve_affine_autoregressive(
    _peer,
    "normflows.flows.affine.autoregressive",
    "MaskedAffineAutoregressive",
    lambda layer: _splines.floored("sigmoid", 1e-3),
)


def enable(*, precision: str = "fast") -> Takeover:
    """Sends the rational-quadratic splines and affine couplings of normflows to pyperf_dl.

    Taken over are ``rational_quadratic_spline`` and ``unconstrained_rational_quadratic_spline``, with linear and
    circular tails, one rule for all or a list by feature, and with tensors for bounds; above those, with the output of
    the conditioner as it comes, ``PiecewiseRationalQuadraticCoupling`` and
    ``MaskedPiecewiseRationalQuadraticAutoregressive``; and ``AffineCoupling``, which ``AffineCouplingBlock`` and
    ``GlowBlock`` are made of, and ``MaskedAffineAutoregressive``. A call with an argument, dtype or shape that the
    operators do not have goes to normflows as before, errors too, and :func:`report` says why; so does
    ``MaskedAffineFlow``.

    Args:
        precision: ``"fast"``, or ``"exact"`` for splines that are computed in float64 inside.

    Returns:
        A context manager: ``with enable():`` ends with the block. Takeovers nest, and hold for all threads; the latest
        one that is still open decides.

    Raises:
        ValueError: a version of normflows other than 1.7.2 and 1.7.3; an unknown precision.
        ImportError: normflows is not installed.

    >>> from normflows.utils import splines
    >>> from pyperf_dl.integrations import normflows
    >>> before = normflows.report(reset=True)
    >>> with normflows.enable():
    ...     y, logabsdet = splines.unconstrained_rational_quadratic_spline(
    ...         torch.randn(4, 2), *torch.randn(3, 4, 2, 8), tails="circular", tail_bound=3.0)
    >>> normflows.report()
    Report(taken=1, fell_back={})
    """
    return _peer.enable(Settings(precision))
