"""Flows of glasflow, which carries a fork of nflows, with their splines and couplings served by pyperf_dl.

    from pyperf_dl.integrations import glasflow

    glasflow.enable()                     # from now on, in the whole process
    with glasflow.enable(precision="exact"):
        ...                               # inside the block

Densities and samples are those of glasflow within its own float32 error. They differ where glasflow fails: outside its
domain a spline without tails (``CouplingNSF`` on a uniform base) goes on along its edge slopes, where glasflow raises
``InputOutsideDomain``; and the inverse is finite for every finite input. Nothing is read back from the device.
"""

from __future__ import annotations

from typing import Any

import pyperf_dl

from . import _splines, _swap
from ._swap import Declined, Report, Settings, Takeover

__all__ = ["Report", "disable", "enable", "report"]

_peer = _swap.Peer("glasflow", "glasflow", "0.4", "0.4")
disable, report = _peer.disable, _peer.report
_tanh_ranges: dict[Any, float] = {}  # of the scale activations exp(N tanh(u / 2)), by function
_any_range: list[Any] = []  # the code of those for which N is in a closure


def _find_activations() -> None:
    from glasflow.transforms import utils

    _tanh_ranges.update((utils.SCALE_ACTIVATIONS[f"log{n}"], float(n)) for n in (1, 2, 3))
    _any_range[:] = [
        c for c in utils.get_scale_activation.__code__.co_consts if "sigmoid" in getattr(c, "co_names", ())
    ]


def _tanh_range(activation: Any) -> float | None:
    if getattr(activation, "__code__", None) in _any_range:
        return activation.__closure__[0].cell_contents
    return _tanh_ranges.get(activation)


def _affine(layer: Any, inputs: Any, transform_params: Any, inverse: bool) -> Any:
    if type(layer)._scale_and_shift.__qualname__ != "AffineCouplingTransform._scale_and_shift":
        return Declined("subclass")
    bound = _tanh_range(layer.scale_activation)
    if not _swap.number(bound):
        return Declined("scale with a floor" if bound is None else "arguments")
    why = _swap.unfit(inputs, transform_params)
    if why:
        return Declined(why)
    count = layer.num_transform_features
    if inputs.dim() < 2 or transform_params.shape != (len(inputs), 2 * count, *inputs.shape[2:]):
        return Declined("shape")
    shift, scale = transform_params[:, :count], transform_params[:, count:]
    y, logdet = pyperf_dl.affine_coupling(inputs, 0.5 * scale, shift, inverse=inverse, activation="tanh", clamp=bound)
    return y, logdet.to(inputs.dtype)


_splines.serve_nflows(_peer, "glasflow.nflows", _affine)


def enable(*, precision: str = "fast") -> Takeover:
    """Sends the rational-quadratic splines, additive and log-scaled affine couplings of glasflow to pyperf_dl.

    Taken over is in glasflow's fork of nflows what :func:`pyperf_dl.integrations.nflows.enable` takes over in nflows:
    ``CouplingNSF`` and ``RealNVP(volume_preserving=True)`` are made of it; and affine layers whose
    ``scale_activation`` is ``"log1"``, ``"log2"``, ... A call with an argument, dtype or shape that the operators do
    not have goes to glasflow as before, errors too, and :func:`report` says why. Other affine layers stay with
    glasflow: their scale has a floor.

    Args:
        precision: ``"fast"``, or ``"exact"`` for splines that are computed in float64 inside.

    Returns:
        A context manager: ``with enable():`` ends with the block. Takeovers nest, and hold for all threads; the latest
        one that is still open decides.

    Raises:
        ValueError: a version of glasflow other than 0.4; glasflow runs on an installed nflows
            (``GLASFLOW_USE_NFLOWS``), for which there is :mod:`pyperf_dl.integrations.nflows`; an unknown precision.
        ImportError: glasflow is not installed.

    >>> from glasflow import CouplingNSF
    >>> from pyperf_dl.integrations import glasflow
    >>> before = glasflow.report(reset=True)
    >>> flow = CouplingNSF(n_inputs=4, n_transforms=2)
    >>> with glasflow.enable():
    ...     log_prob = flow.log_prob(torch.randn(10, 4))
    >>> glasflow.report()
    Report(taken=2, fell_back={})
    """
    _peer.check_version()
    import glasflow

    if glasflow.USE_NFLOWS:
        raise ValueError(
            "glasflow.enable: glasflow must run on its own fork of nflows, got GLASFLOW_USE_NFLOWS: "
            "pyperf_dl.integrations.nflows serves that"
        )
    _find_activations()
    return _peer.enable(Settings(precision))
