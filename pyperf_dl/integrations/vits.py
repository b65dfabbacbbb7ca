"""The flows of VITS in Hugging Face transformers, served by pyperf_dl.

    from pyperf_dl.integrations import vits

    vits.enable()                       # from now on, in the whole process
    with vits.enable(precision="exact"):
        ...                             # inside the block

Speech and likelihoods are those of transformers within its own float32 error. They differ where transformers fails: the
inverse is finite for every finite input, where transformers raises for a negative discriminant. Nothing is read back
from the device, so that the duration predictor compiles and exports whole.
"""

from __future__ import annotations

from typing import Any

import torch

import pyperf_dl

from . import _splines, _swap
from ._swap import Declined, Report, Settings, Takeover

__all__ = ["Report", "disable", "enable", "report"]

_peer = _swap.Peer("vits", "transformers", "4.45", "5.24")
disable, report = _peer.disable, _peer.report
_MODELING = "transformers.models.vits.modeling_vits"
_SMALLEST = (1e-3, 1e-3, 1e-3)


@_peer.replaces(_MODELING, "_unconstrained_rational_quadratic_spline")
def _unconstrained_rational_quadratic_spline(
    settings: Settings,
    inputs: Any,
    unnormalized_widths: Any,
    unnormalized_heights: Any,
    unnormalized_derivatives: Any,
    reverse: Any = False,
    tail_bound: Any = 5.0,
    min_bin_width: Any = 1e-3,
    min_bin_height: Any = 1e-3,
    min_derivative: Any = 1e-3,
) -> Any:
    if not _swap.number(tail_bound):
        return Declined("arguments")
    return _splines.separate(
        settings,
        inputs,
        unnormalized_widths,
        unnormalized_heights,
        unnormalized_derivatives,
        reverse,
        "linear",
        (-tail_bound, tail_bound, -tail_bound, tail_bound),
        (min_bin_width, min_bin_height, min_derivative),
    )


def _halves(layer: Any, inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    first, second = torch.split(inputs, [layer.half_channels] * 2, dim=1)
    return first, second


@_peer.replaces(_MODELING, "VitsConvFlow.forward")
def _conv_flow(
    settings: Settings, self: Any, inputs: Any, padding_mask: Any, global_conditioning: Any = None, reverse: Any = False
) -> Any:
    if _swap.unfit(inputs) or inputs.dim() != 3:
        return Declined()  # the function above has the reason
    first, second = _halves(self, inputs)  # [B, C, T]
    before = self.conv_pre(first)
    hidden = self.conv_dds(before, padding_mask, global_conditioning)
    projected = self.conv_proj(hidden)
    params = projected * padding_mask  # [B, C * P, T]
    batch, channels, length = first.shape
    params = params.reshape(batch, channels, -1, length).permute(0, 1, 3, 2)
    got = _splines.packed(
        settings,
        second,
        params,
        self.num_bins,
        reverse,
        "linear",
        self.tail_bound,
        _SMALLEST,
        self.filter_channels,
        "elementwise",
    )
    if type(got) is Declined:
        return Declined(conv_pre=before, conv_dds=hidden, conv_proj=projected)
    second, logdet = got
    outputs = torch.cat([first, second], dim=1) * padding_mask
    return outputs, None if reverse else torch.sum(logdet * padding_mask, [1, 2])


@_peer.replaces(_MODELING, "VitsResidualCouplingLayer.forward")
def _residual_coupling(
    settings: Settings, self: Any, inputs: Any, padding_mask: Any, global_conditioning: Any = None, reverse: Any = False
) -> Any:
    why = _swap.unfit(inputs, padding_mask) or ("" if inputs.dim() == 3 and isinstance(reverse, bool) else "arguments")
    if why:
        return Declined(why)
    first, second = _halves(self, inputs)  # [B, C, T]
    before = self.conv_pre(first)
    hidden = self.wavenet(before * padding_mask, padding_mask, global_conditioning)
    after = self.conv_post(hidden)
    mean = after * padding_mask
    why = _swap.unfit(second, mean) or ("" if mean.shape == second.shape else "shape")
    if why:
        return Declined(why, conv_pre=before, wavenet=hidden, conv_post=after)
    if reverse:
        second, _ = pyperf_dl.additive_coupling(second, mean, inverse=True)
        return torch.cat([first, second * padding_mask], dim=1), None
    second, logdet = pyperf_dl.additive_coupling(second * padding_mask, mean)
    return torch.cat([first, second], dim=1), logdet.to(mean.dtype)


def enable(*, precision: str = "fast") -> Takeover:
    """Sends the splines and couplings of VITS in transformers to pyperf_dl.

    Taken over are ``VitsConvFlow``, the spline layer of the stochastic duration predictor, with the output of its
    network as it comes, the spline function below it, and ``VitsResidualCouplingLayer``. A call with an argument, dtype
    or shape that the operators do not have goes to transformers as before, errors too, and :func:`report` says why.

    Args:
        precision: ``"fast"``, or ``"exact"`` for splines that are computed in float64 inside.

    Returns:
        A context manager: ``with enable():`` ends with the block. Takeovers nest, and hold for all threads; the latest
        one that is still open decides.

    Raises:
        ValueError: a version of transformers whose VITS is not known, before 4.45 or after 5.24; an unknown precision.
        ImportError: transformers is not installed.

    >>> from transformers.models.vits import modeling_vits
    >>> from pyperf_dl.integrations import vits
    >>> before = vits.report(reset=True)
    >>> with vits.enable():
    ...     y, log_abs_det = modeling_vits._unconstrained_rational_quadratic_spline(
    ...         torch.randn(4, 1, 9), *(torch.randn(4, 1, 9, k) for k in (10, 10, 9)))
    >>> vits.report()
    Report(taken=1, fell_back={})
    """
    return _peer.enable(Settings(precision))
