"""Flows of zuko, with their rational-quadratic splines and affine transformations served by pyperf_dl.

    from pyperf_dl.integrations import zuko

    zuko.enable()                       # from now on, in the whole process
    with zuko.enable(precision="exact"):
        ...                             # inside the block

Densities and samples are those of zuko within its own float32 error; where zuko gives NaN for finite input, ours is
finite. Transformations made during a takeover work out what zuko prepares for its own formulas (``horizontal``,
``vertical``, ``derivatives``, ``log_scale``, ``scale``) only if somebody asks for it; they are zuko's again after it.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch

import pyperf_dl

from . import _swap
from ._swap import Declined, Report, Settings, Takeover

__all__ = ["Report", "disable", "enable", "report"]

_peer = _swap.Peer("zuko", "zuko", "1.5", "1.6")
disable, report = _peer.disable, _peer.report
_BINS = 256  # the most that the operator takes
_GIVEN = "_pyperf_dl_given"  # on a transformation: the arguments that it was made from


@functools.cache
def _lazy(theirs: type, prepared: tuple[str, ...]) -> type:
    """A form of one of zuko's classes whose instances run its __init__ when one of these attributes is wanted."""

    def __getattr__(self: Any, name: str) -> Any:  # noqa: N807
        if name not in prepared:
            raise AttributeError(f"{theirs.__name__!r} object has no attribute {name!r}")
        args, kwargs = self.__dict__[_GIVEN]
        _peer.original(theirs, "__init__")(self, *args, **kwargs)
        return self.__dict__[name]

    def __reduce__(self: Any) -> Any:  # noqa: N807
        args, kwargs = self.__dict__[_GIVEN]
        return functools.partial(theirs, **kwargs), args  # by the name that pickle finds: zuko's own

    members = {"__getattr__": __getattr__, "__reduce__": __reduce__, "__module__": theirs.__module__}
    return type(theirs.__name__, (theirs,), members)


def _remember(self: Any, theirs: type, prepared: tuple[str, ...], args: tuple[Any, ...], kwargs: Any) -> Any:
    """Instead of __init__: only what it was given."""
    if type(self) is not theirs:
        return Declined("subclass")
    setattr(self, _GIVEN, (args, kwargs))
    if torch.compiler.is_compiling():
        return Declined()  # the compiler removes what zuko prepares and nobody uses, and cannot change a class
    torch.distributions.Transform.__init__(self, **{k: v for k, v in kwargs.items() if k not in ("bound", "slope")})
    self.__class__ = _lazy(theirs, prepared)
    return None


@_peer.replaces("zuko.transforms", "MonotonicRQSTransform.__init__", counted=False)
def _spline_init(
    settings: Settings,
    self: Any,
    widths: Any,
    heights: Any,
    derivatives: Any,
    bound: Any = 5.0,
    slope: Any = 1e-3,
    **kwargs: Any,
) -> Any:
    from zuko.transforms import MonotonicRQSTransform

    if not _swap.number(bound) or not _swap.number(slope) or slope >= 1:
        return Declined("arguments")
    prepared = ("horizontal", "vertical", "derivatives")
    how = {"bound": bound, "slope": slope, **kwargs}
    return _remember(self, MonotonicRQSTransform, prepared, (widths, heights, derivatives), how)


@_peer.replaces("zuko.transforms", "MonotonicAffineTransform.__init__", counted=False)
def _affine_init(settings: Settings, self: Any, shift: Any, scale: Any, slope: Any = 1e-3, **kwargs: Any) -> Any:
    from zuko.transforms import MonotonicAffineTransform

    if not _swap.number(slope) or slope >= 1:
        return Declined("arguments")
    how = {"slope": slope, **kwargs}
    return _remember(self, MonotonicAffineTransform, ("log_scale", "scale"), (shift, scale), how)


# ---- one transformation at work ----


def _run(settings: Settings, transform: Any, x: Any, inverse: bool, summed: int = 0) -> Any:
    """(y, log-det, over the last `summed` dimensions), or Declined; without a reason for what is none of ours."""
    args, kwargs = getattr(transform, "__dict__", {}).get(_GIVEN, (None, None))
    if args is None:
        return Declined()
    why = _swap.unfit(x, *args)
    if why:
        return Declined(why)
    function = _spline if len(args) == 3 else _affine
    return function(settings, x, args, kwargs, inverse, summed)


def _sum(rank: int, dims: int) -> dict[str, Any]:
    if not dims:
        return {"logdet": "elementwise"}
    return {"logdet": "sum", "sum_dims": tuple(range(rank - dims, rank))}


def _common(summed: int, *shapes: Any) -> Any:
    """The shape that all broadcast to, or None."""
    try:
        shape = torch.broadcast_shapes(*shapes)
    except RuntimeError:
        return None
    return shape if len(shape) >= summed else None


def _spline(settings: Settings, x: Any, args: Any, kwargs: Any, inverse: bool, summed: int) -> Any:
    if any(p.dim() == 0 for p in args):
        return Declined("shape")
    bins = args[0].shape[-1]
    if not 1 <= bins <= _BINS:
        return Declined("number of bins")
    if args[1].shape[-1] != bins or args[2].shape[-1] != bins - 1:
        return Declined("number of derivatives")
    shape = _common(summed, x.shape, *(p.shape[:-1] for p in args))
    if shape is None:
        return Declined("shape")
    y, logdet = pyperf_dl.rational_quadratic_spline(
        x.expand(shape),
        *(p.expand(*shape, p.shape[-1]) for p in args),
        inverse=inverse,
        tail_bound=float(kwargs["bound"]),
        parametrization="zuko",
        slope=float(kwargs["slope"]),
        precision=settings.precision,
        **_sum(len(shape), summed),
    )
    return y, logdet.to(x.dtype)


def _affine(settings: Settings, x: Any, args: Any, kwargs: Any, inverse: bool, summed: int) -> Any:
    shape = _common(summed, x.shape, *(p.shape for p in args))
    if shape is None:
        return Declined("shape")
    shift, scale = (p.expand(shape) for p in args)
    y, logdet = pyperf_dl.affine_coupling(
        x.expand(shape),
        scale,
        shift,
        inverse=inverse,
        activation="softclip",
        clamp=-math.log(kwargs["slope"]),
        **_sum(len(shape), summed),
    )
    return y, logdet.to(x.dtype)


def _first(result: Any) -> Any:
    return result if type(result) is Declined else result[0]


@_peer.replaces("zuko.transforms", "MonotonicRQSTransform._call", "MonotonicAffineTransform._call")
def _call(settings: Settings, self: Any, x: Any) -> Any:
    return _first(_run(settings, self, x, False))


@_peer.replaces("zuko.transforms", "MonotonicRQSTransform._inverse", "MonotonicAffineTransform._inverse")
def _inverse(settings: Settings, self: Any, y: Any) -> Any:
    return _first(_run(settings, self, y, True))


@_peer.replaces("zuko.transforms", "MonotonicRQSTransform.call_and_ladj", "Transform.call_and_ladj")
def _call_and_ladj(settings: Settings, self: Any, x: Any) -> Any:
    return _both(settings, self, x, 0)


@_peer.replaces("zuko.transforms", "DependentTransform.call_and_ladj")
def _dependent_call_and_ladj(settings: Settings, self: Any, x: Any) -> Any:
    got = _both(settings, self.base, x, self.reinterpreted)
    # With a reason, the transformation below counts it.
    return Declined() if type(got) is Declined else got


def _both(settings: Settings, transform: Any, x: Any, summed: int) -> Any:
    if type(transform) is torch.distributions.transforms._InverseTransform:
        return _run(settings, transform._inv, x, True, summed)
    return _run(settings, transform, x, False, summed)


def enable(*, precision: str = "fast") -> Takeover:
    """Sends the rational-quadratic splines and affine transformations of zuko to pyperf_dl.

    Taken over are ``MonotonicRQSTransform`` and ``MonotonicAffineTransform``: ``__call__``, ``inv`` and
    ``call_and_ladj``, and the latter of a ``DependentTransform`` of one of them, so that the sum over the features
    happens in the same pass. That covers ``NSF``, ``NCSF``, ``MAF``, ``NICE``, ``RealNVP`` and whatever else is made of
    the two, flows from before the takeover too. A call with an argument, dtype or shape that the operators do not have
    goes to zuko as before, errors too, and :func:`report` says why; subclasses stay with zuko.

    Args:
        precision: ``"fast"``, or ``"exact"`` for splines that are computed in float64 inside.

    Returns:
        A context manager: ``with enable():`` ends with the block. Takeovers nest, and hold for all threads; the latest
        one that is still open decides.

    Raises:
        ValueError: a version of zuko other than 1.5 and 1.6; an unknown precision.
        ImportError: zuko is not installed.

    >>> from zuko.transforms import MonotonicRQSTransform
    >>> from pyperf_dl.integrations import zuko
    >>> before = zuko.report(reset=True)
    >>> with zuko.enable():
    ...     spline = MonotonicRQSTransform(torch.randn(4, 8), torch.randn(4, 8), torch.randn(4, 7))
    ...     y, ladj = spline.call_and_ladj(torch.randn(10, 4))
    >>> zuko.report()
    Report(taken=1, fell_back={})
    """
    return _peer.enable(Settings(precision))
