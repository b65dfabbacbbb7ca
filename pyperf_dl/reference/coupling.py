"""What `pyperf_dl.coupling` computes, in PyTorch operators; arguments as in csrc/coupling.cpp.

Every function is differentiable as often as wanted and runs in the precision of its inputs, float64 included; 16-bit
inputs are computed in float32.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F

# ---- what all couplings share ----


def working_dtype(*tensors: torch.Tensor, exact: bool = False) -> torch.dtype:
    """The dtype of the arithmetic: float32, or float64 where that is asked for or an input has it."""
    wide = exact or any(t.dtype == torch.float64 for t in tensors)
    return torch.float64 if wide else torch.float32


def logdet_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def summed(logdet: torch.Tensor, sample_dims: int, dtype: torch.dtype) -> torch.Tensor:
    """Over all dimensions but the first `sample_dims`; as it is where that is -1."""
    if sample_dims >= 0:
        logdet = logdet.sum(tuple(range(sample_dims, logdet.dim()))) if logdet.dim() > sample_dims else logdet
    return logdet.to(dtype)


def differentiated(forward: Callable[..., Any], tensors: int, *args: Any) -> tuple[torch.Tensor, ...]:
    """A backward operator out of its forward: args are grad_y, grad_logdet, then those of the forward."""
    grads, inputs, statics = args[:2], args[2 : 2 + tensors], args[2 + tensors :]
    return torch.func.vjp(lambda *t: forward(*t, *statics), *inputs)[1](grads)


# ---- affine couplings ----

ACTIVATIONS = ("none", "exp", "sigmoid", "sigmoid_inv", "softplus", "tanh", "atan", "softclip")
FLAT_SOFTPLUS = -40.0  # below, log(softplus(u)) = u in every precision


def log_scale(
    u: torch.Tensor, activation: str, clamp: float, min_scale: float = 0.0, max_scale: float = 0.0
) -> torch.Tensor:
    """The logarithm of the scale that a raw parameter stands for. `clamp` bounds |log scale| where it is not 0,
    `max_scale` the scale, to which `min_scale` is added."""
    if min_scale:
        scale = min_scale + (torch.sigmoid(u + 2) if activation == "sigmoid" else F.softplus(u, threshold=60.0))
        return (scale.clamp(max=max_scale) if max_scale else scale).log()
    if activation == "none":
        return torch.zeros_like(u)
    if activation == "exp":
        return u.clamp(-clamp, clamp) if clamp else u
    if activation == "sigmoid":
        return F.logsigmoid(u + 2)
    if activation == "sigmoid_inv":
        return -F.logsigmoid(u + 2)
    if activation == "softplus":  # which is exp(u), and then nothing, far below 0
        return torch.where(u < FLAT_SOFTPLUS, u, F.softplus(u.clamp(min=FLAT_SOFTPLUS), threshold=60.0).log())
    if activation == "tanh":
        return clamp * torch.tanh(u)
    if activation == "atan":
        return clamp * 0.636 * torch.atan(u)
    return u / (1 + (u / clamp).abs())


def affine_coupling(
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    inverse: bool,
    activation: str,
    clamp: float,
    min_scale: float,
    max_scale: float,
    shift_first: bool,
    sample_dims: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y and log |dy/dx|. x, scale (raw), shift: [...]

    y = x * s + t or, with the shift first, (x + t) * s, where log s = log_scale(scale); or the inverse of that.
    """
    dtype = working_dtype(x, scale)
    u, raw, t = (v.to(dtype) for v in (x, scale, shift))
    logdet = log_scale(raw, activation, clamp, min_scale, max_scale)
    if inverse:
        logdet, t = -logdet, -t
    y = (u + t) * logdet.exp() if shift_first != inverse else u * logdet.exp() + t
    return y.to(x.dtype), summed(logdet, sample_dims, logdet_dtype(x))


def _some_channels(split: Sequence[int], count: int) -> tuple[int, int, int, int]:
    """Dimension, start, end and step of `count` channels. split: that dimension, the first channel, the step."""
    dim, first, step = split
    return dim, first, first + (count - 1) * step + 1 if count else first, step


def part_of(x: torch.Tensor, split: Sequence[int], count: int) -> torch.Tensor:
    """The `count` channels of x that a coupling transforms."""
    return torch.ops.aten.slice(x, *_some_channels(split, count))


def with_part(x: torch.Tensor, split: Sequence[int], part: torch.Tensor) -> torch.Tensor:
    """x with that part replaced."""
    return x.slice_scatter(part, *_some_channels(split, part.shape[split[0]]))


def scale_and_shift(params: torch.Tensor, shift_leads: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The two parameters in the last dimension; one that stands alone is both."""
    first, last = params[..., 0], params[..., -1]
    return (last, first) if shift_leads else (first, last)


def affine_coupling_packed(
    x: torch.Tensor,
    params: torch.Tensor,
    inverse: bool,
    activation: str,
    clamp: float,
    min_scale: float,
    max_scale: float,
    shift_first: bool,
    shift_leads: bool,
    split: Sequence[int] | None,
    sample_dims: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for some channels of x. params: scale and shift in the last dimension, or a shift alone ("none")."""
    scale, shift = scale_and_shift(params, shift_leads)
    how = (inverse, activation, clamp, min_scale, max_scale, shift_first, sample_dims)
    if not split:
        return affine_coupling(x, scale, shift, *how)
    y, logdet = affine_coupling(part_of(x, split, params.shape[split[0]]), scale, shift, *how)
    return with_part(x, split, y), logdet


affine_coupling_backward = functools.partial(differentiated, affine_coupling, 3)
affine_coupling_packed_backward = functools.partial(differentiated, affine_coupling_packed, 2)


# ---- the rational-quadratic spline ----

TAILS = ("linear", "circular", "bounded")
PARAMETRIZATIONS = ("nflows", "zuko")
LARGEST_SLOPE = {torch.float32: 1e18, torch.float64: 1e150}  # squares of it fit
SMALLEST_BOUND, LARGEST_BOUND = 2.0**-100, 2.0**100  # of an element


def derivative_count(bins: int, tails: str) -> int:
    return bins + {"linear": -1, "circular": 0, "mixed": 0, "bounded": 1}[tails]


def bin_edges(logits: torch.Tensor, low: float, high: float, smallest: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Left edge and size of every bin. logits: [..., K]"""
    bins = logits.shape[-1]
    size = (high - low) * (smallest + (1 - smallest * bins) * logits.softmax(-1))
    before = F.pad(size[..., :-1].cumsum(-1), (1, 0))
    return low + before, size


def knot_slopes(
    raw: torch.Tensor,
    tails: str,
    parametrization: str,
    smallest: float,
    curve: float,
    circular: torch.Tensor | None = None,
) -> torch.Tensor:
    """The derivative at each of the K + 1 knots. raw: [..., K - 1], [..., K] or [..., K + 1]; circular: [...], of mixed
    tails"""
    if parametrization == "zuko":
        slopes = (raw / (1 + (raw / curve).abs())).exp()
    else:
        slopes = smallest + F.softplus(raw * curve, threshold=60.0) / curve
    slopes = slopes.clamp(max=LARGEST_SLOPE[raw.dtype])
    if tails == "linear":
        return F.pad(slopes, (1, 1), value=1.0)
    if tails == "bounded":
        return slopes
    ends = slopes[..., :1]
    if circular is not None:
        ends = torch.where(circular.unsqueeze(-1), ends, 1.0)
    return torch.cat([ends, slopes[..., 1:], ends], -1)


def held_within(v: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """v, which leaves [low, high] by rounding only: unlike those of clamp, its derivatives stay."""
    return v + (v.clamp(low, high) - v).detach()


def rational_quadratic_spline(
    x: torch.Tensor,
    widths: torch.Tensor,
    heights: torch.Tensor,
    derivatives: torch.Tensor,
    bound: torch.Tensor | None,
    mask: torch.Tensor | None,
    inverse: bool,
    tails: str,
    parametrization: str,
    box: Sequence[float],
    smallest: Sequence[float],
    logit_scale: float,
    curve: float,
    sample_dims: int,
    exact: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y and log |dy/dx|. x: [...], widths and heights: [..., K], derivatives: [..., K - 1 | K | K + 1], parameters with
    1 in place of a size where elements share them.

    bound: [...], log-det dtype; the box of an element is `box` times its bound, and with tails "mixed" (K derivatives)
    times |bound|: where that is negative, tails are circular, else linear, and the first derivative is not used.
    mask: bool, [...]; where false, an element passes as it is, and its parameters have no gradient.
    box: left, right, bottom, top. smallest: bin width, bin height, derivative. curve: the sharpness of the softplus
    (nflows), or -log of the smallest slope (zuko).
    """
    dtype = working_dtype(x, widths, exact=exact)
    parameters = [t.to(dtype).expand(*x.shape, t.shape[-1]) for t in (widths, heights, derivatives)]
    u = x.to(dtype)
    if mask is not None:  # what does not count must not be NaN either, for the sake of gradients
        u = torch.where(mask, u, 0.0)
        parameters = [torch.where(mask.unsqueeze(-1), t, 0.0) for t in parameters]
    raw_w, raw_h, raw_d = parameters
    circular, scale, there = None, 1.0, None
    given = u
    if bound is not None:
        scale = bound.to(dtype)
        if tails == "mixed":
            circular, scale = scale < 0, scale.abs()
        bounds = (scale >= SMALLEST_BOUND) & (scale <= LARGEST_BOUND)
        there = torch.where(bounds, 1.0, torch.nan).to(dtype)  # NaN goes into all results and gradients
        given = u * there
        u = given / scale
        raw_w, raw_h, raw_d = (t * there.unsqueeze(-1) for t in (raw_w, raw_h, raw_d))
    if parametrization == "zuko":
        raw_w, raw_h = (t / (1 + (2 * t / curve).abs()) for t in (raw_w, raw_h))
    left, right, bottom, top = box
    x_edge, width = bin_edges(raw_w * logit_scale, left, right, smallest[0])
    y_edge, height = bin_edges(raw_h * logit_scale, bottom, top, smallest[1])
    slope = knot_slopes(raw_d, tails, parametrization, smallest[2], curve, circular)

    low, high = (bottom, top) if inverse else (left, right)
    inside = (u >= low) & (u <= high)
    at = torch.where(u.isnan(), low, u).clamp(low, high)
    k = (at.unsqueeze(-1) >= (y_edge if inverse else x_edge)[..., 1:]).sum(-1, keepdim=True)
    xk, w, yk, h, d0 = (t.gather(-1, k).squeeze(-1) for t in (x_edge, width, y_edge, height, slope))
    d1 = slope.gather(-1, k + 1).squeeze(-1)
    s = h / w

    last = k.squeeze(-1) == width.shape[-1] - 1  # measured from the end of the box, where rounding adds up least
    into = torch.where(last, high - at, at - (yk if inverse else xk)) / (h if inverse else w)
    part = held_within(into, 0, 1)
    theta, phi = torch.where(last, 1 - part, part), torch.where(last, part, 1 - part)
    if inverse:  # the root of a quadratic whose terms are all >= 0
        b = (d0 - s) * phi - (d1 - s) * theta
        swap, r = b < 0, b.abs()
        za, zb = torch.where(swap, phi, theta), torch.where(swap, theta, phi)
        v = held_within(2 * s * za / (s + r + ((s - r) ** 2 + 4 * s * zb * r).sqrt()), 0, 1)
        theta, phi = torch.where(swap, 1 - v, v), torch.where(swap, v, 1 - v)
    q = theta * phi
    below = s * (theta**2 + phi**2) + (d0 + d1) * q
    above = d1 * theta**2 + 2 * s * q + d0 * phi**2
    logdet = (s / below * above * (s / below)).log()
    if inverse:
        y, logdet = held_within(torch.where(last, right - w * phi, xk + w * theta), left, right), -logdet
    else:
        from_end = top - h * (s * phi**2 + d1 * q) / below
        y = held_within(torch.where(last, from_end, yk + h * (s * theta**2 + d0 * q) / below), bottom, top)

    if tails == "bounded":  # the line through the corner, with the slope there
        edge = torch.where(u < low, slope[..., 0], slope[..., -1])
        beyond = torch.where(inside, 0.0, u - at)
        y = y + (beyond / edge if inverse else beyond * edge)
        y = torch.where(u.isnan(), u, y * scale)
    else:
        y = torch.where(inside, y * scale, given)
        logdet = torch.where(inside, logdet, 0.0)
    if there is not None:
        logdet = logdet * there
    if mask is not None:
        y, logdet = torch.where(mask, y, x.to(dtype)), torch.where(mask, logdet, 0.0)
    return y.to(x.dtype), summed(logdet, sample_dims, logdet_dtype(x))


def rational_quadratic_spline_packed(
    x: torch.Tensor,
    params: torch.Tensor,
    bound: torch.Tensor | None,
    mask: torch.Tensor | None,
    bins: int,
    split: Sequence[int] | None,
    *how: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for some channels of x, with widths, heights and derivatives in one tensor, [..., P]."""
    parameters = params.split((bins, bins, params.shape[-1] - 2 * bins), -1)
    part = part_of(x, split, params.shape[split[0]]) if split else x
    y, logdet = rational_quadratic_spline(part, *parameters, bound, mask, *how)
    return (with_part(x, split, y) if split else y), logdet


rational_quadratic_spline_backward = functools.partial(differentiated, rational_quadratic_spline, 4)
rational_quadratic_spline_packed_backward = functools.partial(differentiated, rational_quadratic_spline_packed, 2)


# ---- layers along the channels (dim 1) ----


def actnorm(
    x: torch.Tensor, log_scale: torch.Tensor, bias: torch.Tensor, inverse: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """y = x * exp(log_scale) + bias, and the log-det of each sample. x: [B, C, ...], log_scale, bias: [C]"""
    dtype = working_dtype(x)
    channel = (-1, *[1] * (x.dim() - 2))
    a, b, u = log_scale.to(dtype).view(channel), bias.to(dtype).view(channel), x.to(dtype)
    y = (u - b) * (-a).exp() if inverse else u * a.exp() + b
    logdet = (-a if inverse else a).expand(x.shape)
    return y.to(x.dtype), summed(logdet, 1, logdet_dtype(x))


def invertible_conv1x1(
    x: torch.Tensor,
    lower: torch.Tensor,
    upper: torch.Tensor,
    log_diagonal: torch.Tensor,
    permutation: torch.Tensor,
    sign: torch.Tensor,
    inverse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y = W x at every position, W = (L U)[permutation], and the log-det of each sample. x: [B, C, ...]

    L: unit lower triangle from `lower`; U: upper triangle from `upper`, with sign * exp(log_diagonal) on the diagonal.
    """
    left = lower.double().tril(-1) + torch.eye(len(lower), dtype=torch.float64, device=x.device)
    right = upper.double().triu(1) + torch.diag(sign * log_diagonal.double().exp())
    weight = (left @ right)[permutation]
    weight = torch.linalg.inv(weight) if inverse else weight
    y = torch.einsum("oc,bc...->bo...", weight, x.double())
    logdet = (-log_diagonal if inverse else log_diagonal).view(-1, *[1] * (x.dim() - 2)).expand(x.shape)
    return y.to(x.dtype), summed(logdet, 1, logdet_dtype(x))


# ---- cases of `python -m pyperf_dl.check` ----

# Relative to max(1, |value|). float32 gradients in steep bins are known to no more than this, in any implementation;
# 16-bit results are rounded once.
_TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float32: 4e-3, torch.float64: 1e-9}
_SHAPES = [(7, 33), (2, 3, 130)]


def check_cases(device: str, quick: bool) -> Iterator[tuple[Any, ...]]:
    """(operator, case, dtype, run, expected, tolerance); all are held against float64 runs of this file."""
    shapes = _SHAPES[:1] if quick else _SHAPES
    for dtype, shape, inverse in itertools.product(_TOLERANCE, shapes, (False, True)):
        for op, name, how, count in _check_calls(quick):
            x, *parameters = _check_inputs(shape, count, dtype)
            case = f"{name}, {'inverse' if inverse else 'forward'}, {list(shape)}"
            run = functools.partial(_run_checked, op, how | {"inverse": inverse}, x, parameters)
            yield op, case, dtype, functools.partial(run, device), functools.partial(_expected, run), _TOLERANCE[dtype]


def _check_calls(quick: bool) -> Iterator[tuple[str, str, dict[str, Any], Any]]:
    """Operator, name, arguments, and the sizes of the parameters' last dimension: None for none."""
    for bins, tails, parametrization in itertools.product((8,) if quick else (1, 8, 19), TAILS, PARAMETRIZATIONS):
        how = {"tails": tails, "parametrization": parametrization, "tail_bound": 2.0}
        knots = derivative_count(bins, tails)
        name = f"K={bins}, {tails} tails, {parametrization}"
        if knots:
            yield "rational_quadratic_spline", name, how | {"logdet": "elementwise"}, [bins, bins, knots]
        packed = how | {"bins": bins, "logdet": "sum"}
        yield "rational_quadratic_spline_packed", name, packed, [2 * bins + knots]
    for activation, order in itertools.product(ACTIVATIONS[1:], ("scale_shift", "shift_scale")):
        yield "affine_coupling", f"{activation}, {order}", {"activation": activation, "order": order}, [None, None]
    floor = {"min_scale": 1e-3, "max_scale": 1.5}
    for activation in ("sigmoid", "softplus"):
        yield "affine_coupling", f"{activation} with a floor", floor | {"activation": activation}, [None, None]
    yield "additive_coupling", "shift", {}, [None]
    packed = {"activation": "tanh", "logdet": "elementwise"}
    yield "affine_coupling_packed", "tanh", packed | {"parameters": "shift_scale"}, [2]


def _check_inputs(shape: tuple[int, ...], sizes: Sequence[int | None], dtype: torch.dtype) -> list[torch.Tensor]:
    """x, of which some is in the tails, and parameters; all as the dtype holds them."""
    g = torch.Generator().manual_seed(0)
    x = 1.5 * torch.randn(shape, generator=g)
    parameters = [torch.randn(shape if n is None else (*shape, n), generator=g) for n in sizes]
    return [t.to(dtype) for t in (x, *parameters)]


def _run_checked(
    op: str, how: dict[str, Any], x: torch.Tensor, parameters: Sequence[torch.Tensor], device: str
) -> tuple[torch.Tensor, ...]:
    """y, log-det, and the gradients of everything."""
    import pyperf_dl

    leaves = [t.to(device, copy=True).requires_grad_() for t in (x, *parameters)]
    y, logdet = getattr(pyperf_dl, op)(*leaves, **how)
    total = (y * _check_weights(y)).sum() + (logdet * _check_weights(logdet)).sum()
    return y, logdet, *torch.autograd.grad(total, leaves)


def _check_weights(t: torch.Tensor) -> torch.Tensor:
    """Small numbers that every dtype holds."""
    return ((torch.arange(t.numel(), device=t.device) % 5 - 2) / 4).reshape(t.shape).to(t.dtype)


def _expected(run: Any) -> tuple[torch.Tensor, ...]:
    """The same call in float64 by this file, rounded to the dtypes of the call."""
    import pyperf_dl

    op, how, x, parameters = run.args
    with pyperf_dl.backend("reference"):
        wide = _run_checked(op, how, x.double(), [p.double() for p in parameters], "cpu")
    dtypes = (x.dtype, logdet_dtype(x), x.dtype, *(p.dtype for p in parameters))
    return tuple(t.detach().to(dtype) for t, dtype in zip(wide, dtypes, strict=True))
