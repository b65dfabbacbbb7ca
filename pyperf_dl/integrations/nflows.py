"""Flows of nflows 0.14, with their rational-quadratic splines, affine and additive layers served by pyperf_dl.

    from pyperf_dl.integrations import nflows

    nflows.enable()                       # from now on, in the whole process
    with nflows.enable(precision="exact"):
        ...                               # inside the block

Densities and samples are those of nflows within its own float32 error. They differ where nflows fails: outside its
domain a spline without tails goes on along its edge slopes, where nflows raises ``InputOutsideDomain``; and the inverse
is finite for every finite input, where nflows asserts a discriminant >= 0 or gives NaN. Nothing is read back from the
device.
"""

from __future__ import annotations

from . import _splines, _swap
from ._swap import Report, Settings, Takeover

__all__ = ["Report", "disable", "enable", "report"]

_peer = _swap.Peer("nflows", "nflows", "0.14", "0.14")
disable, report = _peer.disable, _peer.report

_splines.serve_nflows(
    _peer,
    "nflows",
    lambda layer: _splines.floored("sigmoid", 1e-3),
    lambda layer: _splines.floored("softplus", layer._epsilon),
)


def enable(*, precision: str = "fast") -> Takeover:
    """Sends the rational-quadratic splines, affine and additive layers of nflows to pyperf_dl.

    Taken over are ``rational_quadratic_spline`` and ``unconstrained_rational_quadratic_spline``, under every name by
    which a module imported them; above those, with the output of the conditioner as it comes, the layers
    ``PiecewiseRationalQuadraticCouplingTransform`` and ``MaskedPiecewiseRationalQuadraticAutoregressiveTransform``; and
    ``AffineCouplingTransform``, ``AdditiveCouplingTransform`` and ``MaskedAffineAutoregressiveTransform``, but for
    subclasses with a scale of their own. A call with an argument, dtype or shape that the operators do not have goes to
    nflows as before, errors too, and :func:`report` says why.

    Args:
        precision: ``"fast"``, or ``"exact"`` for splines that are computed in float64 inside.

    Returns:
        A context manager: ``with enable():`` ends with the block. Takeovers nest, and hold for all threads; the latest
        one that is still open decides.

    Raises:
        ValueError: a version of nflows other than 0.14; an unknown precision.
        ImportError: nflows is not installed.

    >>> from nflows.transforms import splines
    >>> from pyperf_dl.integrations import nflows
    >>> before = nflows.report(reset=True)
    >>> with nflows.enable():
    ...     y, logabsdet = splines.unconstrained_rational_quadratic_spline(
    ...         torch.randn(4, 2), torch.randn(4, 2, 8), torch.randn(4, 2, 8), torch.randn(4, 2, 7), tail_bound=3.0)
    >>> nflows.report()
    Report(taken=1, fell_back={})
    """
    return _peer.enable(Settings(precision))
