"""Flows of glasflow, which carries a fork of nflows, with splines, affine and additive layers served by pyperf_dl.

    from pyperf_dl.integrations import glasflow

    glasflow.enable()                     # from now on, in the whole process
    with glasflow.enable(precision="exact"):
        ...                               # inside the block

Densities and samples are those of glasflow within its own float32 error. They differ where glasflow fails: outside its
domain a spline without tails (``CouplingNSF`` on a uniform base) goes on along its edge slopes, where glasflow raises
``InputOutsideDomain``; and the inverse is finite for every finite input. Nothing is read back from the device.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

from . import _splines, _swap
from ._splines import Scale
from ._swap import Declined, Report, Settings, Takeover

__all__ = ["Report", "disable", "enable", "report"]

_peer = _swap.Peer("glasflow", "glasflow", "0.4", "0.4")
disable, report = _peer.disable, _peer.report
_scales: dict[Any, Scale | Declined] = {}  # of scale activations, by function
# The code of those that capture a variable, and what scale its value makes; the compiler takes no dict of codes.
_capturing: list[tuple[Any, Callable[[Any], Scale | Declined]]] = []


def _find_activations() -> None:
    from glasflow.nflows.transforms import autoregressive, coupling
    from glasflow.transforms import utils

    narrow, wide = _splines.floored("sigmoid", 1e-3), _splines.floored("softplus", 1e-3, 3.0)
    named = {"nflows": narrow, "nflows_general": wide, "wide": wide, **{f"log{n}": _exp_tanh(n) for n in (1, 2, 3)}}
    found = {utils.SCALE_ACTIVATIONS[name]: scale for name, scale in named.items()} | {
        coupling.AffineCouplingTransform.DEFAULT_SCALE_ACTIVATION: narrow,
        coupling.AffineCouplingTransform.GENERAL_SCALE_ACTIVATION: wide,
    }
    theirs = (utils.__name__, coupling.__name__)  # names may have got other functions
    _scales.update({function: scale for function, scale in found.items() if function.__module__ in theirs})
    of_autoregressive = autoregressive.MaskedAffineAutoregressiveTransform.__init__
    _capturing[:] = [
        (_inner_code(utils.get_scale_activation, "sigmoid"), _exp_tanh),
        (_inner_code(of_autoregressive, "softplus"), lambda layer: _splines.floored("softplus", layer._epsilon)),
    ]


def _inner_code(function: Any, name: str) -> Any:
    """Of the function inside that uses the name."""
    return next(c for c in function.__code__.co_consts if name in getattr(c, "co_names", ()))


def _exp_tanh(bound: Any) -> Scale | Declined:
    """exp(2 N (sigmoid(u) - 0.5)) = exp(N tanh(u / 2))"""
    return Scale({"activation": "tanh", "clamp": bound}, 0.5) if _swap.number(bound) else Declined("arguments")


def _scale_of(layer: Any) -> Scale | Declined:
    activation = layer.scale_activation
    if not isinstance(activation, FunctionType):
        return Declined("scale activation")
    for code, scale_of in _capturing:
        if activation.__code__ is code:
            return scale_of(activation.__closure__[0].cell_contents)
    return _scales.get(activation, Declined("scale activation"))


_splines.serve_nflows(_peer, "glasflow.nflows", _scale_of, _scale_of)


def enable(*, precision: str = "fast") -> Takeover:
    """Sends the rational-quadratic splines, affine and additive layers of glasflow to pyperf_dl.

    Taken over is in glasflow's fork of nflows what :func:`pyperf_dl.integrations.nflows.enable` takes over in nflows:
    ``CouplingNSF``, ``RealNVP`` and ``MaskedAffineAutoregressiveFlow`` are made of it. Affine layers have every
    ``scale_activation`` that glasflow has a name for. A call with a function of the user's own, or an argument, dtype
    or shape that the operators do not have goes to glasflow as before, errors too, and :func:`report` says why.

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
