"""Rational-quadratic splines: the operators with their derivatives, and the public functions."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from . import _checks
from ._autograd import Operator, is_differentiated, is_plain, pushed_forward
from .reference import coupling as reference

DTYPES, HALF_DTYPES = _checks.FLOATS, _checks.HALVES
MOST_BINS = 256

# ---- operators: shapes, derivatives, batching, sharding ----

# tensors: [grad_y, grad_logdet,] x, parameters, bound, mask (these two may be None, and have no gradient)
# statics: [bins, split,] inverse, tails, parametrization, box, smallest, logit_scale, curve, sample_dims, exact
_UNDIFFERENTIATED = 2
_BINS, _SPLIT, _SAMPLE_DIMS = -11, -10, -2


def _like(t: torch.Tensor, dtype: torch.dtype | None = None, shape: Sequence[int] | None = None) -> torch.Tensor:
    """An empty tensor whose dimensions lie in memory in the order of those of t (csrc: preserved_layout)."""
    layout = list(range(t.dim()))
    expanded = any(t.stride(d) == 0 and t.shape[d] != 1 for d in layout)
    if not t.is_contiguous() and not expanded:
        layout = sorted(layout, key=lambda d: -t.stride(d))
    return torch.empty_permuted(t.shape if shape is None else shape, layout, dtype=dtype or t.dtype, device=t.device)


def fake_outputs(x: torch.Tensor, transformed: Sequence[int], sample_dims: int) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = reference.logdet_dtype(x)
    if sample_dims >= 0:
        return _like(x), x.new_empty(transformed[:sample_dims], dtype=dtype)
    return _like(x), _like(x, dtype, transformed)


def _fake_forward(x, *rest):
    return fake_outputs(x, x.shape, rest[_SAMPLE_DIMS])


def transformed_shape(x: Sequence[int], params: Sequence[int], split: Sequence[int] | None) -> list[int]:
    """Of the part of x that is transformed, for the shapes of x and of its parameters."""
    return [params[d] if split and d == split[0] else size for d, size in enumerate(x)]


def _fake_packed_forward(x, params, *rest):
    return fake_outputs(x, transformed_shape(x.shape, params.shape, rest[_SPLIT]), rest[_SAMPLE_DIMS])


def _by_reference(function: Any, tensors: int) -> dict[str, Any]:
    """Derivatives of an operator as those of its reference."""

    def saved(ctx: Any) -> tuple[Any, Sequence[torch.Tensor]]:
        inputs, others = ctx.saved_tensors[:-_UNDIFFERENTIATED], ctx.saved_tensors[-_UNDIFFERENTIATED:]
        return lambda *t: function(*t, *others, *ctx.statics), inputs

    def backward(ctx, *grads):
        of, inputs = saved(ctx)
        return *torch.func.vjp(of, *inputs)[1](grads), *[None] * _UNDIFFERENTIATED

    def jvp(ctx, *tangents):
        return pushed_forward(*saved(ctx), tangents[:-_UNDIFFERENTIATED])

    return {"backward": backward, "jvp": jvp, "save": lambda ctx, inputs, output: inputs[:tensors], "tensors": tensors}


def split_behind(split: Sequence[int] | None) -> list[int] | None:
    """The same channels where there is one dimension more in front."""
    return [split[0] + 1, *split[1:]] if split else None


def _batched(*args):
    """A new dimension in front is one more that samples have."""
    *rest, sample_dims, exact = args
    return (*rest, sample_dims if sample_dims < 0 else sample_dims + 1, exact)


def _batched_packed(*args):
    args = _batched(*args)
    return (*args[:_SPLIT], split_behind(args[_SPLIT]), *args[_SPLIT + 1 :])


def sample_dims_of(x: Any, parameters: Any, split: Sequence[int] | None, sample_dims: int) -> list[int]:
    """Dimensions in front, along which tensors may be sharded alike: all of them where nothing is summed."""
    dims = range(len(x.shape) if sample_dims < 0 else sample_dims)
    return [d for d in dims if x.shape[d] == parameters.shape[d] and not (split and d == split[0])]


def _operations(per_bin: int, per_element: int, x_at: int, packed: bool) -> Any:
    """About so many additions and multiplications; an exponential counts as twelve."""

    def count(*args, out_shape=None, **kwargs):
        x, parameters = args[x_at], args[x_at + 1]
        if not packed:
            return math.prod(x) * (per_bin * parameters[-1] + per_element)
        return math.prod(transformed_shape(x, parameters, args[_SPLIT])) * (per_bin * args[_BINS] + per_element)

    return count


_LAUNCH = "pyperf_dl._launch.coupling"


def _operators(name: str, tensors: int, fake: Any, batch: Any) -> tuple[Operator, Operator]:
    """The forward and the backward of one way to pass parameters; `tensors` of the forward."""
    packed = batch is _batched_packed

    def shard(first: int) -> Any:
        return lambda *args: sample_dims_of(
            args[first], args[first + 1], args[_SPLIT] if packed else None, args[_SAMPLE_DIMS]
        )

    forward, backward = getattr(reference, name), getattr(reference, f"{name}_backward")
    spline_backward = Operator(
        f"{name}_backward",
        fake=lambda grad_y, grad_logdet, *rest: tuple(map(_like, rest[: tensors - _UNDIFFERENTIATED])),
        reference=backward,
        launch=f"{_LAUNCH}:{name}_backward",
        batch=batch,
        shard=shard(2),
        flops=_operations(60, 150, 2, packed),
        **_by_reference(backward, tensors + 2),
    )

    def gradients(ctx, *grads):
        return *spline_backward(*grads, *ctx.saved_tensors, *ctx.statics), *[None] * _UNDIFFERENTIATED

    spline = Operator(
        name,
        fake=fake,
        reference=forward,
        launch=f"{_LAUNCH}:{name}",
        batch=batch,
        shard=shard(0),
        flops=_operations(40, 90, 0, packed),
        **_by_reference(forward, tensors) | {"backward": gradients},
    )
    return spline, spline_backward


_spline, _spline_backward = _operators("rational_quadratic_spline", 6, _fake_forward, _batched)
_packed, _packed_backward = _operators("rational_quadratic_spline_packed", 4, _fake_packed_forward, _batched_packed)

# ---- arguments ----


def _number(op: str, name: str, value: Any) -> float:
    value = _checks.number(op, name, value, finite=True)
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
            f"{op}: bounds must be the same along x and y with {tails} tails, which continue as the identity, "
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


_DERIVATIVES = {"linear": "K - 1", "circular": "K", "mixed": "K", "bounded": "K + 1"}


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
    if isinstance(tails, tuple):
        for rule in tails:
            _checks.choice(op, "each of tails", rule, ("linear", "circular"))
        given, tails = "a sequence of tails", "mixed"
    else:
        given = f"tails={_checks.choice(op, 'tails', tails, reference.TAILS)!r}"
    _checks.choice(op, "parametrization", parametrization, reference.PARAMETRIZATIONS)
    _checks.choice(op, "logdet", logdet, ("elementwise", "sum"))
    _checks.choice(op, "precision", precision, ("fast", "exact"))
    if not 1 <= bins <= MOST_BINS:
        raise ValueError(f"{op}: the number of bins must be in [1, {MOST_BINS}], got {bins}")
    wanted = reference.derivative_count(bins, tails)
    if derivatives != wanted:
        raise ValueError(
            f"{op}: {given} with K = {bins} bins needs {_DERIVATIVES[tails]} = {wanted} derivatives an element "
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
_CACHED_TYPES = {bool, int, float, str, type(None)}
_cached_plan = functools.lru_cache(maxsize=256, typed=True)(_plan)  # typed: True is not 1 here


def _planned(*arguments: Any) -> _How:
    if torch.compiler.is_compiling():
        return _plan(*arguments)
    types = set(map(type, arguments))
    if tuple in types:  # into which `typed` does not look
        types = {type(v) for a in arguments for v in (a if type(a) is tuple else (a,))}
    return (_cached_plan if types <= _CACHED_TYPES else _plan)(*arguments)


def transformed_channels(op: str, channels: Any, x: Any) -> tuple[torch.Size, list[int] | None]:
    """The shape of what is transformed, and the operator's split."""
    _checks.strided_tensor(op, "x", x, DTYPES)
    if channels is None:
        return x.shape, None
    if not isinstance(channels, slice):
        raise TypeError(f"{op}: channels must be a slice of dim 1 of x, or None, got {_checks.described(channels)}")
    if x.dim() < 2:
        raise ValueError(f"{op}: channels needs an x of at least 2 dimensions, got {_checks.described(x)}")
    try:
        first, last, step = channels.indices(int(x.shape[1]))
    except (TypeError, ValueError):
        step = 0
    if step < 1:
        raise ValueError(f"{op}: channels must be a slice of ints with a step >= 1, got {channels}")
    count = len(range(first, last, step))
    step = step if count > 1 else 1
    return torch.Size((x.shape[0], count, *x.shape[2:])), [1, first, step]


def _checked_parameters(
    op: str, name: str, value: Any, x: torch.Tensor, shape: Sequence[int] | None = None, *, shared: bool = False
) -> torch.Tensor:
    """`value` with the shape of x, or of the part of x that is transformed, and one dimension more. `shared`: with 1 in
    place of a size along which it is repeated, except the channels of a part."""
    _checks.strided_tensor(op, name, value, DTYPES)
    checked_companion(op, name, value, x)
    if value.dim() == 0:
        raise ValueError(f"{op}: {name} must have a last dimension of parameters, got {_checks.described(value)}")
    shape = x.shape if shape is None else shape
    if value.shape[:-1] == shape:
        return value
    try:
        repeated = value.expand(*shape, value.shape[-1])
        if not shared or not is_plain(x):  # a shard of x has a gradient of its own for what it shares
            return repeated
        kept = value[(None,) * (len(shape) + 1 - value.dim())]
        return kept if shape == x.shape else kept.expand(-1, shape[1], *[-1] * (len(shape) - 1))
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


def _checked_bound(op: str, value: torch.Tensor, x: torch.Tensor, shape: Sequence[int], bounds: Any) -> torch.Tensor:
    """A tensor for a tail bound, in the dtype of log-dets."""
    if bounds is not None:
        raise ValueError(f"{op}: tail_bound must be a number beside bounds, got {_checks.described(value)}")
    dtype = reference.logdet_dtype(x)
    _checks.strided_tensor(op, "tail_bound", value, DTYPES)
    if value.dtype not in (x.dtype, dtype):
        raise TypeError(f"{op}: tail_bound must have the dtype of x or of log-dets, {dtype}, got {value.dtype}")
    if value.device != x.device:
        raise ValueError(f"{op}: tail_bound must be on x's device {x.device}, got {value.device}")
    if is_differentiated(value):
        raise ValueError(f"{op}: tail_bound must not require a gradient, it has none: detach it")
    try:
        value.expand(shape)
    except RuntimeError:
        raise ValueError(
            f"{op}: tail_bound must be a number or broadcast to the shape of x, got {list(value.shape)} for x "
            f"{list(shape)}"
        ) from None
    return value.to(dtype)


def _bound(
    op: str, x: torch.Tensor, shape: Sequence[int], tails: Any, tail_bound: Any, bounds: Any
) -> torch.Tensor | None:
    """What each element's box is multiplied with, [*shape]; negative where its tails are circular among others."""
    bound = _checked_bound(op, tail_bound, x, shape, bounds) if isinstance(tail_bound, torch.Tensor) else None
    if isinstance(tails, tuple):
        if not shape or len(tails) != shape[-1]:
            raise ValueError(
                f"{op}: a sequence of tails must have one for each element of x's last dimension, got {len(tails)} for "
                f"x {list(shape)}"
            )
        if bound is None:
            bound = torch.ones(len(tails), dtype=reference.logdet_dtype(x), device=x.device)
        bound = bound.clamp(min=0).expand(*bound.shape[:-1], len(tails))  # signs are taken
        parts, start = [], 0
        for rule, run in itertools.groupby(tails):  # made on the device: a copy of numbers to it would wait for it
            part = bound[..., start : start + len(list(run))]
            parts.append(-part if rule == "circular" else part)
            start += part.shape[-1]
        bound = torch.cat(parts, -1) if parts else bound
    return None if bound is None else bound.expand(shape)


def checked_mask(op: str, value: Any, x: torch.Tensor, shape: Sequence[int]) -> torch.Tensor | None:
    """A sample mask, [*shape]."""
    if value is None:
        return None
    if not isinstance(value, torch.Tensor) or value.dtype != torch.bool:
        raise TypeError(
            f"{op}: sample_mask must be a bool tensor, True where x is transformed, got {_checks.described(value)}"
        )
    if value.device != x.device:
        raise ValueError(f"{op}: sample_mask must be on x's device {x.device}, got {value.device}")
    try:
        return value.expand(shape)
    except RuntimeError:
        raise ValueError(
            f"{op}: sample_mask must broadcast to the shape of what is transformed, {list(shape)}, got "
            f"{list(value.shape)}"
        ) from None


def _arranged(
    op: str, x: torch.Tensor, others: Sequence[Any], logdet: str, sum_dims: Any, split: list[int] | None = None
) -> tuple[torch.Tensor, Sequence[Any], int, list[int] | None]:
    """x and the others, [*x.shape, ...] or None, with the summed dimensions behind the rest, how many the rest is, and
    the way back. `split` follows its dimension."""
    if logdet == "elementwise":
        if sum_dims is not None:
            raise ValueError(f"{op}: sum_dims needs logdet='sum', got sum_dims={sum_dims!r} with 'elementwise'")
        return x, others, -1, None
    if sum_dims is None:
        return x, others, min(1, x.dim()), None
    listed = sum_dims if isinstance(sum_dims, (tuple, list)) else (sum_dims,)
    summed = [_checks.dimension(op, "sum_dims", d, x.dim()) for d in listed]
    if len(set(summed)) != len(summed):
        raise ValueError(f"{op}: sum_dims must name each dimension once, got {sum_dims!r}")
    order = [d for d in range(x.dim()) if d not in summed] + sorted(summed)
    if order == list(range(x.dim())):
        return x, others, x.dim() - len(summed), None
    back = sorted(range(x.dim()), key=order.__getitem__)
    moved = [None if t is None else t.permute(*order, *range(x.dim(), t.dim())) for t in others]
    if split:
        split[0] = back[split[0]]
    return x.permute(order), moved, x.dim() - len(summed), back


def rational_quadratic_spline(
    x: torch.Tensor,
    widths: torch.Tensor,
    heights: torch.Tensor,
    derivatives: torch.Tensor,
    *,
    inverse: bool = False,
    tails: str | Sequence[str] = "linear",
    tail_bound: float | torch.Tensor = 1.0,
    bounds: Sequence[float] | None = None,
    min_bin_width: float = 1e-3,
    min_bin_height: float = 1e-3,
    min_derivative: float = 1e-3,
    identity_init: bool = False,
    logit_scale: float = 1.0,
    parametrization: str = "nflows",
    slope: float = 1e-3,
    sample_mask: torch.Tensor | None = None,
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
        widths, heights: raw parameters [*x.shape, K], K in [1, 256], or what broadcasts to that: gradients of
            parameters that elements share are added up in the operator, in float64. x's dtype, or float16 or bfloat16
            beside a float32 x. Any strides: a permuted convolution output needs no copy.
        derivatives: [*x.shape, K - 1], K or K + 1, as `tails` says.
        inverse: x from y.
        tails: ``"linear"`` (K - 1 derivatives; slope 1 at both ends, the identity outside), ``"circular"`` (K; the last
            knot has the slope of the first, the identity outside), ``"bounded"`` (K + 1; the line through the corner
            goes on outside, so that no input is refused). Or a sequence of ``"linear"`` and ``"circular"``, one for
            each element of x's last dimension: K derivatives, of which linear tails do not use the first.
        tail_bound: the box is [-tail_bound, tail_bound] along x and y. Or a tensor of what broadcasts to x's shape, of
            x's dtype or that of log-dets, which has no gradient; where it is not in [2^-100, 2^100], the element and
            its gradients are NaN.
        bounds: (left, right, bottom, top) of the box, instead.
        min_bin_width, min_bin_height, min_derivative: the first two are parts of the box; all > 0 for a finite log-det
            of every input.
        identity_init: softplus is sharpened so that raw derivatives of 0 give slope 1 (nflows' enable_identity_init).
        logit_scale: factor of the raw widths and heights; nflows' couplings divide them by sqrt(hidden features).
        parametrization: ``"nflows"``, as above, or ``"zuko"``: ``u / (1 + |2 u / log slope|)`` before the softmax,
            ``d = exp(raw / (1 + |raw / log slope|))``, no minimal sizes.
        slope: the least slope of zuko's parametrization.
        sample_mask: bool, broadcasts to x's shape. Where it is False an element passes as it is, with a log-det of 0
            and no gradient for its parameters, whatever they are.
        logdet: ``"elementwise"``, or ``"sum"`` over all dimensions but the first.
        sum_dims: the dimensions to sum over, instead.
        precision: ``"exact"`` computes in float64 inside, whatever the dtype.

    Returns:
        y, with x's shape and dtype, and the log-det, float32 (float64 for float64): [*x.shape], or the dimensions that
        were not summed. Of the inverse it is log \\|dx/dy\\|.

    Raises:
        TypeError, ValueError: arguments that do not fit. No value of a tensor raises: every finite input gives finite
            results and gradients, NaN stays in its element.

    Deterministic: the same bits for any number of threads. Differentiable in x and the parameters, twice too; they and
    tensors of bounds and masks are all that is saved. Durkan, Bekasov, Murray, Papamakarios: Neural Spline Flows
    (2019); conventions of nflows 0.14.

    >>> x = torch.tensor([-2.0, -0.5, 0.5])
    >>> widths = heights = torch.zeros(3, 4)
    >>> pyperf_dl.rational_quadratic_spline(x, widths, heights, torch.zeros(3, 3), identity_init=True)
    (tensor([-2.0000, -0.5000,  0.5000]), tensor([0., 0., 0.]))
    """
    op = "rational_quadratic_spline"
    tails = tuple(tails) if isinstance(tails, list) else tails
    _checks.strided_tensor(op, "x", x, DTYPES)
    parameters = [
        _checked_parameters(op, name, value, x, shared=True)
        for name, value in (("widths", widths), ("heights", heights), ("derivatives", derivatives))
    ]
    if any(p.shape[:-1] != parameters[0].shape[:-1] for p in parameters):  # the operator wants one shape
        common = torch.broadcast_shapes(*(p.shape[:-1] for p in parameters))
        parameters = [p.expand(*common, p.shape[-1]) for p in parameters]
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
        1.0 if isinstance(tail_bound, torch.Tensor) else tail_bound,
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
    bound = _bound(op, x, x.shape, tails, tail_bound, bounds)
    mask = checked_mask(op, sample_mask, x, x.shape)
    x, tensors, sample_dims, back = _arranged(op, x, [*parameters, bound, mask], logdet, sum_dims)
    y, total = _spline(x, *tensors, *how, sample_dims, precision == "exact")
    return (y if back is None else y.permute(back)), total


def rational_quadratic_spline_packed(
    x: torch.Tensor,
    params: torch.Tensor,
    bins: int,
    *,
    channels: slice | None = None,
    inverse: bool = False,
    tails: str | Sequence[str] = "linear",
    tail_bound: float | torch.Tensor = 1.0,
    bounds: Sequence[float] | None = None,
    min_bin_width: float = 1e-3,
    min_bin_height: float = 1e-3,
    min_derivative: float = 1e-3,
    identity_init: bool = False,
    logit_scale: float = 1.0,
    parametrization: str = "nflows",
    slope: float = 1e-3,
    sample_mask: torch.Tensor | None = None,
    logdet: str = "elementwise",
    sum_dims: int | Sequence[int] | None = None,
    precision: str = "fast",
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`rational_quadratic_spline` with all parameters in one tensor, as a conditioner gives them.

    Args:
        params: [*x.shape, P] with P = 3 K - 1 (linear tails), 3 K (circular, or a sequence of tails) or 3 K + 1
            (bounded): widths, then heights, then derivatives. Or what broadcasts to it, with sums of gradients as
            there. Any strides; its gradient is one tensor, laid out alike. With `channels` [B, C', ..., P].
        bins: K.
        channels: the slice of dim 1 of x [B, C, ...] that is transformed, of a step >= 1 and C' channels. The others
            are copied to y, and their gradient to x. By default all of x is transformed. sample_mask, a tensor for
            tail_bound and a sequence of tails go with the part that is.

    The other arguments, results and errors are those of :func:`rational_quadratic_spline`.

    >>> x, params = torch.rand(8, 3), torch.randn(8, 3 * 14)
    >>> y, logdet = pyperf_dl.rational_quadratic_spline_packed(x, params.view(8, 3, 14), 5, logdet="sum")
    >>> back, _ = pyperf_dl.rational_quadratic_spline_packed(y, params.view(8, 3, 14), 5, inverse=True)
    >>> logdet.shape, torch.allclose(back, x, atol=1e-4)
    (torch.Size([8]), True)
    """
    op = "rational_quadratic_spline_packed"
    tails = tuple(tails) if isinstance(tails, list) else tails
    shape, split = transformed_channels(op, channels, x)
    params = _checked_parameters(op, "params", params, x, shape, shared=True)
    bins = _checks.integer(op, "bins", bins, 1)
    how = _planned(
        op,
        bins,
        int(params.shape[-1]) - 2 * bins,
        inverse,
        tails,
        1.0 if isinstance(tail_bound, torch.Tensor) else tail_bound,
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
    others = [params, _bound(op, x, shape, tails, tail_bound, bounds), checked_mask(op, sample_mask, x, shape)]
    x, others, sample_dims, back = _arranged(op, x, others, logdet, sum_dims, split)
    y, total = _packed(x, *others, bins, split, *how, sample_dims, precision == "exact")
    return (y if back is None else y.permute(back)), total
