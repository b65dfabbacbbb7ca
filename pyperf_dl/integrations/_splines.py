"""Layers as nflows wrote them, for nflows itself and for what descends from it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

import pyperf_dl

from ._swap import Declined, Peer, Settings, number, unfit

BINS = 256  # the most that the operator takes
BEYOND: dict[Any, int] = {"linear": -1, "circular": 0, "bounded": 1}  # derivatives beyond the number of bins


def _wrong_sizes(bins: int, smallest: tuple[Any, Any, Any]) -> str:
    if not 1 <= bins <= BINS:
        return "number of bins"
    width, height, slope = smallest
    if not (number(width) and number(height) and number(slope)) or max(width, height) * bins >= 1:
        return "smallest sizes"
    return ""


def separate(
    settings: Settings,
    inputs: Any,
    widths: Any,
    heights: Any,
    derivatives: Any,
    inverse: Any,
    tails: str | tuple[str, ...],
    bounds: torch.Tensor | tuple[Any, Any, Any, Any],
    smallest: tuple[Any, Any, Any],
) -> Any:
    """(y, elementwise log-det) of a spline on the box (left, right, bottom, top), or with tail bounds [*inputs.shape]
    or what broadcasts to that; or Declined with the reason."""
    why = unfit(inputs, widths, heights, derivatives)
    if why:
        return Declined(why)
    if not isinstance(inverse, bool):
        return Declined("arguments")
    if isinstance(bounds, torch.Tensor):
        box: dict[str, Any] = {"tail_bound": bounds}
    elif all(number(b, -torch.inf) for b in bounds) and bounds[0] < bounds[1] and bounds[2] < bounds[3]:
        box = {"bounds": tuple(map(float, bounds))}
    else:
        return Declined("arguments")
    bins = widths.shape[-1] if widths.dim() else 0
    why = _wrong_sizes(bins, smallest)
    if why:
        return Declined(why)
    if widths.shape != (*inputs.shape, bins) or heights.shape != widths.shape:
        return Declined("shape")
    if tails == "linear" and derivatives.shape in ((*inputs.shape, bins), (*inputs.shape, bins + 1)):
        return _free_on_the_right(settings, inputs, widths, heights, derivatives, inverse, bounds, smallest)
    if derivatives.shape != (*inputs.shape, bins + BEYOND.get(tails, 0)):
        return Declined("number of derivatives")
    y, logdet = pyperf_dl.rational_quadratic_spline(
        inputs,
        widths,
        heights,
        derivatives,
        inverse=inverse,
        tails=tails,
        **box,
        **_smallest(smallest),
        precision=settings.precision,
    )
    return y, logdet.to(inputs.dtype)


def _free_on_the_right(
    settings: Settings,
    inputs: Any,
    widths: Any,
    heights: Any,
    derivatives: Any,
    inverse: bool,
    bounds: Any,
    smallest: tuple[Any, Any, Any],
) -> Any:
    """Linear tails with K or K + 1 derivatives: peers put a slope of 1 in front of them, and one behind where no bin
    ends; so the K-th is the slope of the right edge, and what follows is not used."""
    if not smallest[2] < 1:
        return Declined("smallest sizes")
    derivatives = F.pad(derivatives[..., : widths.shape[-1]], (1, 0), value=math.log(math.expm1(1 - smallest[2])))
    got = separate(settings, inputs, widths, heights, derivatives, inverse, "bounded", bounds, smallest)
    if type(got) is Declined:
        return got
    low, high = (-bounds, bounds) if isinstance(bounds, torch.Tensor) else bounds[:2]
    return within(got, inputs, low, high, inputs)


def within(got: Any, inputs: Any, low: Any, high: Any, outside: Any) -> Any:
    """What was got where inputs are in [low, high], elsewhere `outside` and a log-det of 0."""
    y, logdet = got
    inside = (inputs >= low) & (inputs <= high)
    return torch.where(inside, y, outside), torch.where(inside, logdet, 0.0)


def packed(
    settings: Settings,
    inputs: Any,
    params: Any,
    bins: Any,
    inverse: Any,
    tails: str | None,
    tail_bound: Any,
    smallest: tuple[Any, Any, Any],
    hidden: Any,
    logdet: str,
) -> Any:
    """The same with all parameters in one tensor [*inputs.shape, P] and the logits over sqrt(hidden), as a conditioner
    of `hidden` features wants it. Declined without a reason: the peer's own code goes on to the function for separate
    parameters, which has one.
    """
    if unfit(inputs, params) or tails not in (None, "linear", "circular") or not isinstance(inverse, bool):
        return Declined()
    if type(bins) is not int or not number(hidden) or (tails and not number(tail_bound)):
        return Declined()
    extra = BEYOND[tails or "bounded"]
    if _wrong_sizes(bins, smallest) or params.shape != (*inputs.shape, 3 * bins + extra):
        return Declined()
    bound = float(tail_bound) if tails else 0.0
    y, total = pyperf_dl.rational_quadratic_spline_packed(
        inputs,
        params,
        bins,
        inverse=inverse,
        tails=tails or "bounded",
        bounds=(-bound, bound, -bound, bound) if tails else (0.0, 1.0, 0.0, 1.0),
        **_smallest(smallest),
        logit_scale=hidden**-0.5,
        logdet=logdet,
        precision=settings.precision,
    )
    return y, total.to(inputs.dtype)


def _smallest(smallest: tuple[Any, Any, Any]) -> dict[str, float]:
    names = ("min_bin_width", "min_bin_height", "min_derivative")
    return dict(zip(names, map(float, smallest), strict=True))


# ---- stand-ins ----


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
    if tails != "linear" or not number(tail_bound):
        return Declined("arguments")
    return separate(
        settings,
        inputs,
        unnormalized_widths,
        unnormalized_heights,
        unnormalized_derivatives,
        inverse,
        "linear",
        (-tail_bound, tail_bound, -tail_bound, tail_bound),
        (min_bin_width, min_bin_height, min_derivative),
    )


def rational_quadratic_spline(
    settings: Settings,
    inputs: Any,
    unnormalized_widths: Any,
    unnormalized_heights: Any,
    unnormalized_derivatives: Any,
    inverse: Any = False,
    left: Any = 0.0,
    right: Any = 1.0,
    bottom: Any = 0.0,
    top: Any = 1.0,
    min_bin_width: Any = 1e-3,
    min_bin_height: Any = 1e-3,
    min_derivative: Any = 1e-3,
) -> Any:
    return separate(
        settings,
        inputs,
        unnormalized_widths,
        unnormalized_heights,
        unnormalized_derivatives,
        inverse,
        "bounded",
        (left, right, bottom, top),
        (min_bin_width, min_bin_height, min_derivative),
    )


def piecewise_cdf(settings: Settings, self: Any, inputs: Any, transform_params: Any, inverse: Any = False) -> Any:
    """Of a coupling layer, elementwise. transform_params: [*inputs.shape, P], a view in any layout"""
    net = self.transform_net
    hidden = getattr(net, "hidden_features", None)
    return packed(
        settings,
        inputs,
        transform_params,
        self.num_bins,
        inverse,
        self.tails,
        self.tail_bound,
        (self.min_bin_width, self.min_bin_height, self.min_derivative),
        getattr(net, "hidden_channels", None) if hidden is None else hidden,
        "elementwise",
    )


def elementwise(settings: Settings, self: Any, inputs: Any, autoregressive_params: Any, inverse: Any = False) -> Any:
    """Of an autoregressive layer, log-det summed. inputs: [B, D], autoregressive_params: [B, D * P]"""
    if unfit(inputs, autoregressive_params) or inputs.dim() != 2:
        return Declined()
    return packed(
        settings,
        inputs,
        autoregressive_params.view(*inputs.shape, self._output_dim_multiplier()),
        self.num_bins,
        inverse,
        self.tails,
        self.tail_bound,
        (self.min_bin_width, self.min_bin_height, self.min_derivative),
        getattr(self.autoregressive_net, "hidden_features", None),
        "sum",
    )


# ---- affine layers ----


class Scale(NamedTuple):
    """The scale of a layer as arguments of affine_coupling, for `factor` times what the conditioner gives."""

    how: dict[str, Any]
    factor: float = 1.0


def floored(activation: str, min_scale: Any, max_scale: float | None = None) -> Scale | Declined:
    if not number(min_scale, 1e-30) or min_scale > 1e30:  # the operator's range
        return Declined("arguments")
    return Scale({"activation": activation, "min_scale": float(min_scale), "max_scale": max_scale})


def _affine(scale: Scale | Declined, inputs: Any, params: Any, parameters: str, inverse: bool) -> Any:
    """params: [*inputs.shape, 2], a view in any layout"""
    if type(scale) is Declined:
        return scale
    how = scale.how | {"inverse": inverse}
    if scale.factor == 1:
        y, logdet = pyperf_dl.affine_coupling_packed(inputs, params, parameters=parameters, **how)
    else:
        at = 0 if parameters == "scale_shift" else 1
        y, logdet = pyperf_dl.affine_coupling(inputs, scale.factor * params[..., at], params[..., 1 - at], **how)
    return y, logdet.to(inputs.dtype)


def _affine_elementwise(
    module: str, scale_of: Callable[[Any], Scale | Declined], layer: Any, inputs: Any, params: Any, inverse: bool
) -> Any:
    """Of an autoregressive layer of that module. inputs: [B, D], params: [B, D * 2]"""
    if type(layer)._unconstrained_scale_and_shift.__module__ != module:
        return Declined("subclass")
    why = unfit(inputs, params)
    if why:
        return Declined(why)
    if inputs.shape != (len(inputs), layer.features) or params.shape != (len(inputs), 2 * layer.features):
        return Declined("shape")
    return _affine(scale_of(layer), inputs, params.view(*inputs.shape, 2), "scale_shift", inverse)


def _affine_coupling(
    scale_of: Callable[[Any], Scale | Declined], layer: Any, inputs: Any, params: Any, inverse: bool
) -> Any:
    """inputs: [B, C, ...], params: [B, 2 * C, ...], shifts first"""
    why = unfit(inputs, params)
    if why:
        return Declined(why)
    count = layer.num_transform_features
    fits = inputs.dim() >= 2 and inputs.shape[1] == count
    if not fits or params.shape != (len(inputs), 2 * count, *inputs.shape[2:]):
        return Declined("shape")
    return _affine(scale_of(layer), inputs, params.unflatten(1, (2, count)).movedim(1, -1), "shift_scale", inverse)


def _additive(inputs: Any, shift: Any, inverse: bool) -> Any:
    why = unfit(inputs, shift)
    if why:
        return Declined(why)
    if inputs.dim() < 2 or shift.shape != inputs.shape:
        return Declined("shape")
    y, logdet = pyperf_dl.additive_coupling(inputs, shift, inverse=inverse)
    return y, logdet.to(inputs.dtype)


# ---- all of them ----


def serve_nflows(
    peer: Peer,
    package: str,
    scale_of_coupling: Callable[[Any], Scale | Declined],
    scale_of_autoregressive: Callable[[Any], Scale | Declined],
) -> None:
    """Stands in for what nflows has, under the name that it goes by. The two functions say what scale a layer has."""
    splines = f"{package}.transforms.splines.rational_quadratic"
    coupling = f"{package}.transforms.coupling"
    autoregressive = f"{package}.transforms.autoregressive"

    def couple(self: Any, inputs: Any, transform_params: Any, inverse: bool) -> Any:
        rule = type(self)._scale_and_shift
        if rule.__module__ != coupling:
            return Declined("subclass")
        if rule.__qualname__ == "AdditiveCouplingTransform._scale_and_shift":
            return _additive(inputs, transform_params, inverse)
        return _affine_coupling(scale_of_coupling, self, inputs, transform_params, inverse)

    peer.replaces(splines, "unconstrained_rational_quadratic_spline")(unconstrained_rational_quadratic_spline)
    peer.replaces(splines, "rational_quadratic_spline")(rational_quadratic_spline)
    peer.replaces(coupling, "PiecewiseRationalQuadraticCouplingTransform._piecewise_cdf")(piecewise_cdf)
    peer.replaces(autoregressive, "MaskedPiecewiseRationalQuadraticAutoregressiveTransform._elementwise")(elementwise)

    @peer.replaces(coupling, "AffineCouplingTransform._coupling_transform_forward")
    def coupling_forward(settings: Settings, self: Any, inputs: Any, transform_params: Any) -> Any:
        return couple(self, inputs, transform_params, False)

    @peer.replaces(coupling, "AffineCouplingTransform._coupling_transform_inverse")
    def coupling_inverse(settings: Settings, self: Any, inputs: Any, transform_params: Any) -> Any:
        return couple(self, inputs, transform_params, True)

    serve_affine_autoregressive(peer, autoregressive, "MaskedAffineAutoregressiveTransform", scale_of_autoregressive)


def serve_affine_autoregressive(
    peer: Peer, module: str, name: str, scale_of: Callable[[Any], Scale | Declined]
) -> None:
    """Stands in for a class of nflows' masked affine autoregressive layers."""

    @peer.replaces(module, f"{name}._elementwise_forward")
    def forward(settings: Settings, self: Any, inputs: Any, autoregressive_params: Any) -> Any:
        return _affine_elementwise(module, scale_of, self, inputs, autoregressive_params, False)

    @peer.replaces(module, f"{name}._elementwise_inverse")
    def inverse(settings: Settings, self: Any, inputs: Any, autoregressive_params: Any) -> Any:
        return _affine_elementwise(module, scale_of, self, inputs, autoregressive_params, True)
