"""Rational-quadratic splines: the operators with their derivatives, and the public functions."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from . import _checks
from ._autograd import Operator
from .reference import coupling as reference

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
HALF_DTYPES = (torch.float16, torch.bfloat16)
MOST_BINS = 256

# ---- operators: shapes, derivatives, batching, sharding ----

# statics: [bins,] inverse, tails, parametrization, box, smallest, logit_scale, curve, sample_dims, exact
_STATICS = 9
_SAMPLE_DIMS = -2


def _like(t: torch.Tensor, dtype: torch.dtype | None = None, shape: Sequence[int] | None = None) -> torch.Tensor:
    """An empty tensor whose dimensions lie in memory in the order of those of t (csrc: preserved_layout)."""
    layout = list(range(t.dim()))
    expanded = any(t.stride(d) == 0 and t.shape[d] != 1 for d in layout)
    if not t.is_contiguous() and not expanded:
        layout = sorted(layout, key=lambda d: -t.stride(d))
    return torch.empty_permuted(t.shape if shape is None else shape, layout, dtype=dtype or t.dtype, device=t.device)


def _fake_forward(x, *rest):
    sample_dims = rest[_SAMPLE_DIMS]
    dtype = reference.logdet_dtype(x)
    logdet = _like(x, dtype) if sample_dims < 0 else x.new_empty(x.shape[:sample_dims], dtype=dtype)
    return _like(x), logdet


def _fake_backward(grad_y, grad_logdet, *tensors_and_statics):
    return tuple(_like(t) for t in tensors_and_statics if isinstance(t, torch.Tensor))


def _saved(tensors: int) -> Any:
    def save(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:tensors])
        ctx.save_for_forward(*inputs[:tensors])

    return save


def _by_reference(function: Any, tensors: int) -> dict[str, Any]:
    """Derivatives of an operator as those of its reference."""

    def of(ctx: Any) -> Any:
        return lambda *inputs: function(*inputs, *ctx.statics)

    return {
        "backward": lambda ctx, *grads: torch.func.vjp(of(ctx), *ctx.saved_tensors)[1](grads),
        "jvp": lambda ctx, *tangents: reference.pushed_forward(of(ctx), ctx.saved_tensors, tangents),
        "save": _saved(tensors),
        "tensors": tensors,
    }


def _batched(*args):
    """A new dimension in front is one more that samples have."""
    sample_dims = args[_SAMPLE_DIMS]
    return (*args[:_SAMPLE_DIMS], sample_dims if sample_dims < 0 else sample_dims + 1, args[-1])


def _sample_dims(*args):
    tensor = args[0]
    return range(len(tensor.shape) if args[_SAMPLE_DIMS] < 0 else args[_SAMPLE_DIMS])


def _operations(per_bin: int, per_element: int, x_at: int) -> Any:
    """About so many additions and multiplications; an exponential counts as twelve."""

    def count(*args, out_shape=None, **kwargs):
        elements = math.prod(args[x_at])
        bins = args[x_at + 1][-1] if len(args) - x_at - _STATICS == 4 else args[-_STATICS - 1]
        return elements * (per_bin * bins + per_element)

    return count


_LAUNCH = "pyperf_dl._launch.coupling"
_common: dict[str, Any] = {"batch": _batched, "shard": _sample_dims}


def _operators(name: str, tensors: int) -> tuple[Operator, Operator]:
    """The forward and the backward of one way to pass parameters."""
    forward, backward = getattr(reference, name), getattr(reference, f"{name}_backward")
    spline_backward = Operator(
        f"{name}_backward",
        fake=_fake_backward,
        reference=backward,
        launch=f"{_LAUNCH}:{name}_backward",
        flops=_operations(60, 150, 2),
        **_by_reference(backward, tensors + 2),
        **_common,
    )
    spline = Operator(
        name,
        fake=_fake_forward,
        reference=forward,
        launch=f"{_LAUNCH}:{name}",
        flops=_operations(40, 90, 0),
        **_by_reference(forward, tensors)
        | {"backward": lambda ctx, *grads: spline_backward(*grads, *ctx.saved_tensors, *ctx.statics)},
        **_common,
    )
    return spline, spline_backward


_spline, _spline_backward = _operators("rational_quadratic_spline", 4)
_packed, _packed_backward = _operators("rational_quadratic_spline_packed", 2)

# ---- arguments ----


def _number(op: str, name: str, value: Any) -> float:
    if isinstance(value, (bool, torch.Tensor)) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name} must be a number, got {_checks.described(value)}")
    if not -math.inf < value < math.inf:  # math.isfinite takes no symbolic number
        raise ValueError(f"{op}: {name} must be finite, got {value}")
    if value != 0 and not 1e-30 <= abs(value) <= 1e30:  # their products must be numbers of float32 too
        raise ValueError(f"{op}: {name} must be 0 or of a size in [1e-30, 1e30], got {value}")
    return float(value)


def _box(op: str, tail_bound: Any, bounds: Any, tails: str) -> tuple[float, float, float, float]:
    if bounds is None:
        bound = _number(op, "tail_bound", tail_bound)
        if bound <= 0:
            raise ValueError(f"{op}: tail_bound must be > 0, got {tail_bound}")
        return -bound, bound, -bound, bound
    if not isinstance(bounds, (tuple, list)) or len(bounds) != 4:
        raise ValueError(f"{op}: bounds must be (left, right, bottom, top), got {bounds!r}")
    left, right, bottom, top = (_number(op, "bounds", v) for v in bounds)
    if left >= right or bottom >= top:
        raise ValueError(f"{op}: bounds must have left < right and bottom < top, got {bounds!r}")
    if tails != "bounded" and (left, right) != (bottom, top):
        raise ValueError(
            f"{op}: bounds must be the same along x and y with tails={tails!r}, which continue as the identity, "
            f"got {bounds!r}"
        )
    return left, right, bottom, top


class _How(NamedTuple):
    """Checked arguments of the operator behind `bins`, without the last two."""

    inverse: bool
    tails: str
    parametrization: str
    box: tuple[float, float, float, float]
    smallest: tuple[float, float, float]
    logit_scale: float
    curve: float


_DERIVATIVES = {"linear": "K - 1", "circular": "K", "bounded": "K + 1"}


def _plan(
    op: str,
    bins: int,
    derivatives: int,
    inverse: Any,
    tails: Any,
    tail_bound: Any,
    bounds: Any,
    min_bin_width: Any,
    min_bin_height: Any,
    min_derivative: Any,
    identity_init: Any,
    logit_scale: Any,
    parametrization: Any,
    slope: Any,
    logdet: Any,
    precision: Any,
) -> _How:
    _checks.flag(op, "inverse", inverse)
    _checks.flag(op, "identity_init", identity_init)
    _checks.choice(op, "tails", tails, reference.TAILS)
    _checks.choice(op, "parametrization", parametrization, reference.PARAMETRIZATIONS)
    _checks.choice(op, "logdet", logdet, ("elementwise", "sum"))
    _checks.choice(op, "precision", precision, ("fast", "exact"))
    if not 1 <= bins <= MOST_BINS:
        raise ValueError(f"{op}: the number of bins must be in [1, {MOST_BINS}], got {bins}")
    wanted = reference.derivative_count(bins, tails)
    if derivatives != wanted:
        raise ValueError(
            f"{op}: tails={tails!r} with K = {bins} bins needs {_DERIVATIVES[tails]} = {wanted} derivatives an element "
            f"({2 * bins + wanted} parameters in all), got {derivatives} ({2 * bins + derivatives} in all)"
        )
    box = _box(op, tail_bound, bounds, tails)
    scale = _number(op, "logit_scale", logit_scale)
    if scale <= 0:
        raise ValueError(f"{op}: logit_scale must be > 0, got {logit_scale}")
    if parametrization == "zuko":
        least = _number(op, "slope", slope)
        if not 0 < least < 1:
            raise ValueError(f"{op}: slope must be in (0, 1), got {slope}")
        if identity_init:
            raise ValueError(f"{op}: identity_init is for parametrization='nflows', got 'zuko', where zeros are it")
        return _How(inverse, tails, parametrization, box, (0.0, 0.0, 0.0), scale, -math.log(least))
    names = ("min_bin_width", "min_bin_height", "min_derivative")
    smallest = [_number(op, n, v) for n, v in zip(names, (min_bin_width, min_bin_height, min_derivative), strict=True)]
    for name, value in zip(names, smallest, strict=True):
        if value < 0:
            raise ValueError(f"{op}: {name} must be >= 0, got {value}")
        if name != "min_derivative" and value * bins >= 1:
            raise ValueError(f"{op}: {name} * K must be < 1 to fit the box, got {value} * {bins}")
    curve = 1.0
    if identity_init:
        if smallest[2] >= 1:
            raise ValueError(f"{op}: min_derivative must be < 1 with identity_init, got {smallest[2]}")
        curve = math.log(2) / (1 - smallest[2])
    return _How(inverse, tails, parametrization, box, (smallest[0], smallest[1], smallest[2]), scale, curve)


# Programs call with few combinations of arguments; checking them again costs more than a small tensor does.
_CACHED_TYPES = (bool, int, float, str, type(None))
_cached_plan = functools.lru_cache(maxsize=256, typed=True)(_plan)  # typed: True is not 1 here


def _planned(*arguments: Any) -> _How:
    flat = [v for a in arguments for v in (a if type(a) is tuple else (a,))]  # `typed` does not look into tuples
    plain = not torch.compiler.is_compiling() and all(type(v) in _CACHED_TYPES for v in flat)
    return (_cached_plan if plain else _plan)(*arguments)


def _checked_parameters(
    op: str, name: str, value: Any, x: torch.Tensor, shape: Sequence[int] | None = None
) -> torch.Tensor:
    """`value` with the shape of x, or of the part of x that is transformed, and one dimension more."""
    _checks.strided_tensor(op, name, value, DTYPES)
    checked_companion(op, name, value, x)
    if value.dim() == 0:
        raise ValueError(f"{op}: {name} must have a last dimension of parameters, got {_checks.described(value)}")
    shape = x.shape if shape is None else shape
    if value.shape[:-1] == shape:
        return value
    try:
        return value.expand(*shape, value.shape[-1])
    except RuntimeError:
        raise ValueError(
            f"{op}: {name} must have shape [*x.shape, parameters] or broadcast to it, got {list(value.shape)} for x "
            f"{list(shape)}"
        ) from None


def checked_companion(op: str, name: str, value: torch.Tensor, x: torch.Tensor) -> None:
    """Raises where a parameter's dtype or device does not go with x."""
    if value.dtype != x.dtype and not (x.dtype == torch.float32 and value.dtype in HALF_DTYPES):
        raise TypeError(
            f"{op}: {name} must have x's dtype, or float16 or bfloat16 beside a float32 x; got {value.dtype} for x "
            f"{x.dtype}"
        )
    if value.device != x.device:
        raise ValueError(f"{op}: {name} must be on x's device {x.device}, got {value.device}")


def _arranged(
    op: str, x: torch.Tensor, parameters: Sequence[torch.Tensor], logdet: str, sum_dims: Any
) -> tuple[torch.Tensor, Sequence[torch.Tensor], int, list[int] | None]:
    """x and the parameters with the summed dimensions behind the others, how many others, and the way back."""
    if logdet == "elementwise":
        if sum_dims is not None:
            raise ValueError(f"{op}: sum_dims needs logdet='sum', got sum_dims={sum_dims!r} with 'elementwise'")
        return x, parameters, -1, None
    if sum_dims is None:
        return x, parameters, min(1, x.dim()), None
    listed = sum_dims if isinstance(sum_dims, (tuple, list)) else (sum_dims,)
    summed = [_checks.dimension(op, "sum_dims", d, x.dim()) for d in listed]
    if len(set(summed)) != len(summed):
        raise ValueError(f"{op}: sum_dims must name each dimension once, got {sum_dims!r}")
    order = [d for d in range(x.dim()) if d not in summed] + sorted(summed)
    if order == list(range(x.dim())):
        return x, parameters, x.dim() - len(summed), None
    back = sorted(range(x.dim()), key=order.__getitem__)
    moved = [p.permute(*order, x.dim()) for p in parameters]
    return x.permute(order), moved, x.dim() - len(summed), back


def rational_quadratic_spline(
    x: torch.Tensor,
    widths: torch.Tensor,
    heights: torch.Tensor,
    derivatives: torch.Tensor,
    *,
    inverse: bool = False,
    tails: str = "linear",
    tail_bound: float = 1.0,
    bounds: Sequence[float] | None = None,
    min_bin_width: float = 1e-3,
    min_bin_height: float = 1e-3,
    min_derivative: float = 1e-3,
    identity_init: bool = False,
    logit_scale: float = 1.0,
    parametrization: str = "nflows",
    slope: float = 1e-3,
    logdet: str = "elementwise",
    sum_dims: int | Sequence[int] | None = None,
    precision: str = "fast",
) -> tuple[torch.Tensor, torch.Tensor]:
    """A monotone rational-quadratic spline of every element, or its inverse, and log \\|dy/dx\\|.

    K bins cut [left, right] and [bottom, top]: widths ``w = (right - left) (m + (1 - m K) softmax(logit_scale u))``
    with ``m = min_bin_width``, heights ``h`` likewise, slopes ``d = min_derivative + softplus(raw)`` at the knots. In
    the bin of x, with ``t = (x - x_k) / w``, ``s = h / w``::

        y = y_k + h (s t^2 + d_k t (1 - t)) / (s + (d_k + d_(k+1) - 2 s) t (1 - t))

    Args:
        x: float16, bfloat16, float32 or float64, any shape and strides. float32 is computed in float32, 16-bit types
            in float32 and rounded once.
        widths, heights: raw parameters [*x.shape, K], K in [1, 256], or what broadcasts to that. x's dtype, or float16
            or bfloat16 beside a float32 x. Any strides: a permuted convolution output needs no copy.
        derivatives: [*x.shape, K - 1], K or K + 1, as `tails` says.
        inverse: x from y.
        tails: ``"linear"`` (K - 1 derivatives; slope 1 at both ends, the identity outside), ``"circular"`` (K; the last
            knot has the slope of the first, the identity outside), ``"bounded"`` (K + 1; the line through the corner
            goes on outside, so that no input is refused).
        tail_bound: the box is [-tail_bound, tail_bound] along x and y.
        bounds: (left, right, bottom, top) of the box, instead.
        min_bin_width, min_bin_height, min_derivative: the first two are parts of the box; all > 0 for a finite log-det
            of every input.
        identity_init: softplus is sharpened so that raw derivatives of 0 give slope 1 (nflows' enable_identity_init).
        logit_scale: factor of the raw widths and heights; nflows' couplings divide them by sqrt(hidden features).
        parametrization: ``"nflows"``, as above, or ``"zuko"``: ``u / (1 + |2 u / log slope|)`` before the softmax,
            ``d = exp(raw / (1 + |raw / log slope|))``, no minimal sizes.
        slope: the least slope of zuko's parametrization.
        logdet: ``"elementwise"``, or ``"sum"`` over all dimensions but the first.
        sum_dims: the dimensions to sum over, instead.
        precision: ``"exact"`` computes in float64 inside, whatever the dtype.

    Returns:
        y, with x's shape and dtype, and the log-det, float32 (float64 for float64): [*x.shape], or the dimensions that
        were not summed. Of the inverse it is log \\|dx/dy\\|.

    Raises:
        TypeError, ValueError: arguments that do not fit. No value of a tensor raises: every finite input gives finite
            results and gradients, NaN stays in its element.

    Deterministic: the same bits for any number of threads. Differentiable in all four tensors, twice too; x and the
    parameters are all that is saved. Durkan, Bekasov, Murray, Papamakarios: Neural Spline Flows (2019); conventions of
    nflows 0.14.

    >>> x = torch.tensor([-2.0, -0.5, 0.5])
    >>> widths = heights = torch.zeros(3, 4)
    >>> pyperf_dl.rational_quadratic_spline(x, widths, heights, torch.zeros(3, 3), identity_init=True)
    (tensor([-2.0000, -0.5000,  0.5000]), tensor([0., 0., 0.]))
    """
    op = "rational_quadratic_spline"
    _checks.strided_tensor(op, "x", x, DTYPES)
    parameters = [
        _checked_parameters(op, name, value, x)
        for name, value in (("widths", widths), ("heights", heights), ("derivatives", derivatives))
    ]
    for name, value in (("heights", heights), ("derivatives", derivatives)):
        if value.dtype != widths.dtype:
            raise TypeError(f"{op}: {name} must have the dtype of widths, {widths.dtype}, got {value.dtype}")
    bins = int(widths.shape[-1])
    if heights.shape[-1] != bins:
        raise ValueError(f"{op}: heights must have as many bins as widths, {bins}, got {heights.shape[-1]}")
    how = _planned(
        op,
        bins,
        int(derivatives.shape[-1]),
        inverse,
        tails,
        tail_bound,
        tuple(bounds) if isinstance(bounds, list) else bounds,
        min_bin_width,
        min_bin_height,
        min_derivative,
        identity_init,
        logit_scale,
        parametrization,
        slope,
        logdet,
        precision,
    )
    x, parameters, sample_dims, back = _arranged(op, x, parameters, logdet, sum_dims)
    y, total = _spline(x, *parameters, *how, sample_dims, precision == "exact")
    return (y if back is None else y.permute(back)), total


def rational_quadratic_spline_packed(
    x: torch.Tensor,
    params: torch.Tensor,
    bins: int,
    *,
    inverse: bool = False,
    tails: str = "linear",
    tail_bound: float = 1.0,
    bounds: Sequence[float] | None = None,
    min_bin_width: float = 1e-3,
    min_bin_height: float = 1e-3,
    min_derivative: float = 1e-3,
    identity_init: bool = False,
    logit_scale: float = 1.0,
    parametrization: str = "nflows",
    slope: float = 1e-3,
    logdet: str = "elementwise",
    sum_dims: int | Sequence[int] | None = None,
    precision: str = "fast",
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`rational_quadratic_spline` with all parameters in one tensor, as a conditioner gives them.

    Args:
        params: [*x.shape, P] with P = 3 K - 1 (linear tails), 3 K (circular) or 3 K + 1 (bounded): widths, then
            heights, then derivatives. Any strides; its gradient is one tensor, laid out alike.
        bins: K.

    The other arguments, results and errors are those of :func:`rational_quadratic_spline`.

    >>> x, params = torch.rand(8, 3), torch.randn(8, 3 * 14)
    >>> y, logdet = pyperf_dl.rational_quadratic_spline_packed(x, params.view(8, 3, 14), 5, logdet="sum")
    >>> back, _ = pyperf_dl.rational_quadratic_spline_packed(y, params.view(8, 3, 14), 5, inverse=True)
    >>> logdet.shape, torch.allclose(back, x, atol=1e-4)
    (torch.Size([8]), True)
    """
    op = "rational_quadratic_spline_packed"
    _checks.strided_tensor(op, "x", x, DTYPES)
    params = _checked_parameters(op, "params", params, x)
    bins = _checks.integer(op, "bins", bins, 1)
    how = _planned(
        op,
        bins,
        int(params.shape[-1]) - 2 * bins,
        inverse,
        tails,
        tail_bound,
        tuple(bounds) if isinstance(bounds, list) else bounds,
        min_bin_width,
        min_bin_height,
        min_derivative,
        identity_init,
        logit_scale,
        parametrization,
        slope,
        logdet,
        precision,
    )
    x, (params,), sample_dims, back = _arranged(op, x, [params], logdet, sum_dims)
    y, total = _packed(x, params, bins, *how, sample_dims, precision == "exact")
    return (y if back is None else y.permute(back)), total
