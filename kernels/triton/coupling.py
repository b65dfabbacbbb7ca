"""Coupling layers, element by element (formulas: pyperf_dl/reference/coupling.py, kernels/math/coupling_spline.h).

A program takes SEGMENTS * LANES elements, in one dimension; parameters of a spline are [elements, BINS], bins padded to
a power of two. `sizes` are the dimensions that are walked, innermost first. Strides come as tuples: one for each of
those dimensions, then, of parameters, the one between an element's parameters. One kernel does both directions and
their gradients: pointers that are None switch a part of it off.
"""

import triton
import triton.language as tl

# ---- elements ----


@triton.jit
def _positions(samples, sample_size, blocks, SUMMED: tl.constexpr, SEGMENTS: tl.constexpr, LANES: tl.constexpr):
    """Numbers of this program's elements, and which of them exist. Where log-dets are summed, a segment is a piece of
    one sample: LANES of its elements, `blocks` pieces a sample."""
    i = tl.arange(0, SEGMENTS * LANES)
    segment = tl.program_id(0).to(tl.int64) * SEGMENTS + i // LANES
    if SUMMED:
        sample = segment // blocks
        within = (segment - sample * blocks) * LANES + i % LANES
        return sample * sample_size + within, (sample < samples) & (within < sample_size)
    else:
        position = tl.program_id(0).to(tl.int64) * LANES + i
        return position, position < sample_size


@triton.jit
def _offsets(position, sizes, strides, NARROW: tl.constexpr):
    """Where elements lie; divisions in 32 bits where NARROW says that there are few enough."""
    rest = position.to(tl.int32) if NARROW else position
    offset = tl.zeros_like(position)
    for d in tl.static_range(len(sizes) - 1):
        outer = rest // sizes[d]
        offset += (rest - outer * sizes[d]).to(tl.int64) * strides[d]
        rest = outer
    return offset + rest.to(tl.int64) * strides[len(sizes) - 1]


@triton.jit
def _load(tensor, position, exists, sizes, strides, NARROW: tl.constexpr, WORK: tl.constexpr):
    return tl.load(tensor + _offsets(position, sizes, strides, NARROW), mask=exists, other=0).to(WORK)


@triton.jit
def _store(tensor, values, position, exists, sizes, strides, NARROW: tl.constexpr):
    to = tensor + _offsets(position, sizes, strides, NARROW)
    tl.store(to, values.to(tensor.dtype.element_ty), mask=exists)


@triton.jit
def _parameters(tensor, position, lane, sizes, strides, NARROW: tl.constexpr):
    """Pointers to the parameters `lane` of every element."""
    return tensor + _offsets(position, sizes, strides, NARROW)[:, None] + lane.to(tl.int64) * strides[len(sizes)]


@triton.jit
def _store_logdet(
    logdet, values, position, exists, sizes, strides, segments, NARROW: tl.constexpr, SUMMED: tl.constexpr,
    SEGMENTS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Element by element, or the sum of every segment."""
    if SUMMED:
        sums = tl.sum(tl.reshape(tl.where(exists, values, 0.0), (SEGMENTS, LANES)), axis=1)
        segment = tl.program_id(0).to(tl.int64) * SEGMENTS + tl.arange(0, SEGMENTS)
        tl.store(logdet + segment, sums.to(logdet.dtype.element_ty), mask=segment < segments)
    else:
        _store(logdet, values, position, exists, sizes, strides, NARROW)


# ---- elementary functions: Triton's own exp loses digits of large arguments, and has no log1p, atan, tanh ----


@triton.jit
def _clamp(x, low, high):
    """NaN stays."""
    x = tl.where(x < low, low, x)
    return tl.where(x > high, high, x)


@triton.jit
def _power_of_two(n, like):
    if like.dtype == tl.float64:
        return ((n.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)
    else:
        return ((n + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _split_exp(x, BOUND: tl.constexpr):
    """exp(x), for x within +-BOUND, as p * 2^n with p near 1."""
    HIGH: tl.constexpr = 6.93147180369123816490e-01 if x.dtype == tl.float64 else 0.693359375
    LOW: tl.constexpr = 1.90821492927058770002e-10 if x.dtype == tl.float64 else -2.12194440e-4
    x = _clamp(x, -BOUND, BOUND)
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    p = tl.exp((x - n * HIGH) - n * LOW)
    return p, tl.where(n == n, n, 0.0).to(tl.int32)


@triton.jit
def _exp(x):
    """0 below the exponents of normal numbers, and nothing larger than they have."""
    LOWEST: tl.constexpr = -708.0 if x.dtype == tl.float64 else -87.0
    p, n = _split_exp(x, -LOWEST)
    return tl.where(x < LOWEST, 0.0, p * _power_of_two(n, x))


@triton.jit
def _times_exp(a, p, n):
    """a * p * 2^n, finite and not 0 where the product is, whatever exp alone would be."""
    third = n // 3
    factor = _power_of_two(third, a)
    return a * p * factor * factor * _power_of_two(n - 2 * third, a)


@triton.jit
def _series(v):
    """1 + v/3 + v^2/5 + ..., for |v| <= 1/9: atanh(z) is z times that of z^2, atan(z) of -z^2."""
    LAST: tl.constexpr = 17 if v.dtype == tl.float64 else 8
    total = v * 0.0 + 1.0 / (2 * LAST + 1)
    for i in tl.static_range(LAST):
        total = total * v + 1.0 / (2 * (LAST - i) - 1)
    return total


@triton.jit
def _log1p_ratio(e):
    """log(1 + e) / e for e in [0, 1]."""
    by = 1.0 / (2.0 + e)
    z = e * by
    return 2.0 * by * _series(z * z)


@triton.jit
def _atan(u):
    """The argument is brought below tan(pi / 16) by a reciprocal and two halvings of the angle."""
    a = tl.abs(u)
    steep = a > 1.0
    a = tl.where(steep, 1.0 / tl.where(steep, a, 1.0), a)
    a = a / (1.0 + tl.sqrt(1.0 + a * a))
    a = a / (1.0 + tl.sqrt(1.0 + a * a))
    angle = 4.0 * a * _series(-a * a)
    angle = tl.where(steep, 1.5707963267948966 - angle, angle)
    return tl.where(u < 0, -angle, angle)


@triton.jit
def _softclip(u, bound):
    """u / (1 + |u / bound|), and its derivative."""
    by = 1.0 / (1.0 + tl.abs(u / bound))
    return u * by, by * by


# ---- affine couplings ----


@triton.jit
def _log_of_floored(u, least, most, SIGMOID: tl.constexpr):
    """Logarithm of a scale with a floor, and its derivative by u."""
    v = u + 2.0 if SIGMOID else u
    e = _exp(-tl.abs(v))
    share = e / (1.0 + e)
    if SIGMOID:
        part = least + tl.where(v < 0, share, -share)
        scale = tl.where(v < 0, part, 1.0 + part)
        by_u = share / (1.0 + e)
        near = (v >= 0) & (part <= 1.0)  # there the logarithm comes from how far the scale is from 1
        part = tl.where(near, part, 0.0)
        size = tl.where(near, part * _log1p_ratio(part), tl.log(scale))
    else:
        scale = tl.where(v > 0, v, 0.0) + (e * _log1p_ratio(e) + least)
        by_u = tl.where(v < 0, share, 1.0 / (1.0 + e))
        size = tl.log(scale)
    return tl.where(scale > most, tl.log(most), size), tl.where(scale > most, 0.0, by_u / scale)


@triton.jit
def _log_scale(u, clamp, least, most, ACTIVATION: tl.constexpr):
    """Logarithm of the scale, and its derivative by u."""
    if ACTIVATION == "none":
        return tl.zeros_like(u), tl.zeros_like(u)
    elif ACTIVATION == "exp":
        return _clamp(u, -clamp, clamp), tl.where(tl.abs(u) <= clamp, 1.0, 0.0).to(u.dtype)
    elif ACTIVATION == "tanh":
        e = _exp(-2.0 * tl.abs(u))
        size = (1.0 - e) / (1.0 + e)
        return clamp * tl.where(u < 0, -size, size), 4.0 * clamp * e / ((1.0 + e) * (1.0 + e))
    elif ACTIVATION == "atan":
        return 0.636 * clamp * _atan(u), 0.636 * clamp / (1.0 + u * u)
    elif ACTIVATION == "softclip":
        return _softclip(u, clamp)
    elif ACTIVATION == "softplus":
        # log(log(1 + exp(u))); for u < 0 it is u and the logarithm of a ratio near 1.
        e = _exp(-tl.abs(u))
        ratio = _log1p_ratio(e)
        of = tl.where(u < 0, ratio, u + e * ratio)
        return tl.where(u < 0, u, 0.0) + tl.log(of), 1.0 / ((1.0 + e) * of)
    elif ACTIVATION == "sigmoid_floor" or ACTIVATION == "softplus_floor":
        return _log_of_floored(u, least, most, ACTIVATION == "sigmoid_floor")
    else:  # sigmoid, sigmoid_inv
        v = u + 2.0
        e = _exp(-tl.abs(v))
        value = tl.where(v < 0, v, 0.0) - e * _log1p_ratio(e)
        derivative = tl.where(v < 0, 1.0, e) / (1.0 + e)
        if ACTIVATION == "sigmoid":
            return value, derivative
        else:
            return -value, -derivative


@triton.jit
def affine(
    x,
    scale,
    shift,
    grad_y,  # None: forward
    result,  # y, or the gradient of x
    logdet,  # a result, summed by segments or not, or its gradient
    grad_scale,
    grad_shift,
    sizes,
    x_strides,
    scale_strides,
    shift_strides,
    grad_y_strides,
    result_strides,
    logdet_strides,
    grad_scale_strides,
    grad_shift_strides,
    samples,
    sample_size,
    blocks,
    clamp: tl.float64,
    min_scale: tl.float64,
    max_scale: tl.float64,
    INVERSE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SHIFT_FIRST: tl.constexpr,
    WORK: tl.constexpr,
    SUMMED: tl.constexpr,
    NARROW: tl.constexpr,
    SEGMENTS: tl.constexpr,
    LANES: tl.constexpr,
):
    """y = x * exp(log scale) + shift, or (x + shift) * exp(log scale), or their inverses."""
    at, exists = _positions(samples, sample_size, blocks, SUMMED, SEGMENTS, LANES)
    u = _load(scale, at, exists, sizes, scale_strides, NARROW, WORK)
    move = _load(shift, at, exists, sizes, shift_strides, NARROW, WORK)
    least, most = tl.full((), min_scale, WORK), tl.full((), max_scale, WORK)
    size, size_by_u = _log_scale(u, tl.full((), clamp, WORK), least, most, ACTIVATION)
    if INVERSE:
        size, size_by_u, move = -size, -size_by_u, -move
    # An inverse takes the two steps in the other order.
    MOVED_FIRST: tl.constexpr = SHIFT_FIRST != INVERSE
    base = _load(x, at, exists, sizes, x_strides, NARROW, WORK)
    if MOVED_FIRST:
        base += move
    p, n = _split_exp(size, 1500.0 if size.dtype == tl.float64 else 200.0)
    scaled = _times_exp(base, p, n)
    if grad_y is None:
        _store(result, scaled if MOVED_FIRST else scaled + move, at, exists, sizes, result_strides, NARROW)
        _store_logdet(
            logdet, size, at, exists, sizes, logdet_strides, samples * blocks, NARROW, SUMMED, SEGMENTS, LANES
        )
    else:
        gy = _load(grad_y, at, exists, sizes, grad_y_strides, NARROW, WORK)
        gl = _load(logdet, at, exists, sizes, logdet_strides, NARROW, WORK)
        by_base = _times_exp(gy, p, n)
        by_move = by_base if MOVED_FIRST else gy
        _store(result, by_base, at, exists, sizes, result_strides, NARROW)
        _store(grad_scale, (gy * scaled + gl) * size_by_u, at, exists, sizes, grad_scale_strides, NARROW)
        _store(grad_shift, -by_move if INVERSE else by_move, at, exists, sizes, grad_shift_strides, NARROW)


# ---- the rational-quadratic spline ----


@triton.jit
def _shares(raw, lane, bins, scale, curve, EXPONENTIAL: tl.constexpr):
    """Exponentials of the logits, zero in the padding. [elements, BINS]"""
    logits = _softclip(raw, 0.5 * curve)[0] if EXPONENTIAL else raw
    logits = tl.where(lane < bins, logits * scale, -float("inf"))
    return _exp(logits - tl.max(logits, axis=1)[:, None])


@triton.jit
def _pick(values, lane, k):
    return tl.sum(tl.where(lane == k[:, None], values, 0.0), axis=1)


@triton.jit
def _bin(shares, until, ends, lane, k, low, least, unit):
    """Start and size of bin k, and the shares in front of it and its own."""
    own = _pick(shares, lane, k)
    return tl.where(k > 0, _pick(ends, lane, k - 1), low), own * unit + least, _pick(until, lane, k - 1), own


@triton.jit
def _slope(raw, least, curve, EXPONENTIAL: tl.constexpr):
    """Slope at a knot, and its derivative by the raw parameter."""
    LARGEST: tl.constexpr = 1e150 if raw.dtype == tl.float64 else 1e18
    if EXPONENTIAL:
        logarithm, derivative = _softclip(raw, curve)
        slope = _exp(logarithm)
        derivative *= slope
    else:
        u = raw * curve
        e = _exp(-tl.abs(u))
        slope = least + (tl.where(u > 0, u, 0.0) + e * _log1p_ratio(e)) / curve
        derivative = tl.where(u < 0, e, 1.0) / (1.0 + e)
    return tl.where(slope > LARGEST, LARGEST, slope), tl.where(slope > LARGEST, 0.0, derivative)


@triton.jit
def _root(z, rest, s, d0, d1):
    """theta and 1 - theta with f(theta) = z, of rest = 1 - z: from the end that makes all terms >= 0."""
    b = (d0 - s) * rest - (d1 - s) * z
    r = tl.abs(b)
    swap = b < 0
    # All divided by the larger of s and r: squares of r need not fit.
    ratio = tl.where(r > s, s, r) / tl.where(r > s, r, s)
    za = tl.where(swap, rest, z)
    zb = tl.where(swap, z, rest)
    below = 1.0 + ratio + tl.sqrt((1.0 - ratio) * (1.0 - ratio) + 4.0 * zb * ratio)
    v = _clamp(2.0 * za * tl.where(r > s, ratio, 1.0) / below, 0.0, 1.0)
    return tl.where(swap, 1.0 - v, v), tl.where(swap, v, 1.0 - v)


@triton.jit
def _softmax_gradient(shares, total, lane, k, before, own, by_start, by_size, free):
    """By the logits: a share times one of three numbers, for bins in front of k, k itself, and behind."""
    mean = (by_start * before + by_size * own) / total
    by_end = tl.where(lane < k[:, None], by_start[:, None], tl.where(lane == k[:, None], by_size[:, None], 0.0))
    return shares * ((by_end - mean[:, None]) * (free / total)[:, None])


@triton.jit
def spline(
    x,
    widths,
    heights,
    derivatives,
    grad_y,  # None: forward
    result,  # y, or the gradient of x
    logdet,  # a result, summed by segments or not, or its gradient
    grad_widths,
    grad_heights,
    grad_derivatives,
    sizes,
    x_strides,
    widths_strides,
    heights_strides,
    derivatives_strides,
    grad_y_strides,
    result_strides,
    logdet_strides,
    grad_widths_strides,
    grad_heights_strides,
    grad_derivatives_strides,
    samples,
    sample_size,
    blocks,
    bins,
    left: tl.float64,
    right: tl.float64,
    bottom: tl.float64,
    top: tl.float64,
    least_width: tl.float64,
    least_height: tl.float64,
    free_width: tl.float64,
    free_height: tl.float64,
    least_slope: tl.float64,
    logit_scale: tl.float64,
    curve: tl.float64,
    INVERSE: tl.constexpr,
    EXPONENTIAL: tl.constexpr,  # slopes are exponentials, and all parameters are clipped softly
    WORK: tl.constexpr,
    SUMMED: tl.constexpr,
    NARROW: tl.constexpr,
    SEGMENTS: tl.constexpr,
    LANES: tl.constexpr,
    BINS: tl.constexpr,
):
    """Linear tails: slope 1 at the ends, the identity outside. free_*: what the smallest bins leave of the box."""
    left, right = tl.full((), left, WORK), tl.full((), right, WORK)
    bottom, top = tl.full((), bottom, WORK), tl.full((), top, WORK)
    least_width, least_height = tl.full((), least_width, WORK), tl.full((), least_height, WORK)
    free_width, free_height = tl.full((), free_width, WORK), tl.full((), free_height, WORK)
    least_slope, curve = tl.full((), least_slope, WORK), tl.full((), curve, WORK)
    logit_scale = tl.full((), logit_scale, WORK)

    at, exists = _positions(samples, sample_size, blocks, SUMMED, SEGMENTS, LANES)
    lane = tl.arange(0, BINS)[None, :]
    wanted = exists[:, None] & (lane < bins)
    u = _load(x, at, exists, sizes, x_strides, NARROW, WORK)
    raw_w = tl.load(_parameters(widths, at, lane, sizes, widths_strides, NARROW), mask=wanted, other=0).to(WORK)
    raw_h = tl.load(_parameters(heights, at, lane, sizes, heights_strides, NARROW), mask=wanted, other=0).to(WORK)

    # Corners
    w_shares = _shares(raw_w, lane, bins, logit_scale, curve, EXPONENTIAL)
    h_shares = _shares(raw_h, lane, bins, logit_scale, curve, EXPONENTIAL)
    w_total, h_total = tl.sum(w_shares, axis=1), tl.sum(h_shares, axis=1)
    w_unit, h_unit = free_width / w_total, free_height / h_total
    w_until, h_until = tl.cumsum(w_shares, axis=1), tl.cumsum(h_shares, axis=1)
    number = (lane + 1).to(WORK)
    x_ends = w_until * w_unit[:, None] + (number * least_width + left)
    y_ends = h_until * h_unit[:, None] + (number * least_height + bottom)

    # The bin
    low, high = (bottom, top) if INVERSE else (left, right)
    inside = (u >= low) & (u <= high)
    t = tl.where(inside, u, low)
    passed = (t[:, None] >= (y_ends if INVERSE else x_ends)) & (lane < bins - 1)
    k = tl.sum(passed.to(tl.int32), axis=1)
    xk, w, w_before, w_own = _bin(w_shares, w_until, x_ends, lane, k, left, least_width, w_unit)
    yk, h, h_before, h_own = _bin(h_shares, h_until, y_ends, lane, k, bottom, least_height, h_unit)
    last = k == bins - 1
    corner = derivatives + _offsets(at, sizes, derivatives_strides, NARROW)
    step = derivatives_strides[len(sizes)]
    raw0 = tl.load(corner + (k - 1).to(tl.int64) * step, mask=exists & (k > 0), other=0).to(WORK)
    raw1 = tl.load(corner + k.to(tl.int64) * step, mask=exists & ~last, other=0).to(WORK)
    d0, d0_by_raw = _slope(raw0, least_slope, curve, EXPONENTIAL)
    d1, d1_by_raw = _slope(raw1, least_slope, curve, EXPONENTIAL)
    d0, d1 = tl.where(k > 0, d0, 1.0), tl.where(last, 1.0, d1)

    # The place in it; in the last one from the end, so that f(high) is the end itself.
    s = h / w
    part = tl.where(last, high - t, t - (yk if INVERSE else xk)) / (h if INVERSE else w)
    part = _clamp(part, 0.0, 1.0)
    theta, phi = tl.where(last, 1.0 - part, part), tl.where(last, part, 1.0 - part)
    if INVERSE:
        theta, phi = _root(theta, phi, s, d0, d1)
    q, theta2, phi2 = theta * phi, theta * theta, phi * phi
    below = s * (theta2 + phi2) + (d0 + d1) * q
    above = d1 * theta2 + 2.0 * s * q + d0 * phi2
    climb, fall = s * theta2 + d0 * q, s * phi2 + d1 * q
    slope = s / below * above * (s / below)

    if grad_y is None:
        change = tl.log(slope)
        if INVERSE:
            y = _clamp(tl.where(last, right - phi * w, xk + theta * w), left, right)
            change = -change
        else:
            y = _clamp(tl.where(last, top - h * (fall / below), yk + h * (climb / below)), bottom, top)
        _store(result, tl.where(inside, y, u), at, exists, sizes, result_strides, NARROW)
        change = tl.where(inside, change, 0.0)
        _store_logdet(
            logdet, change, at, exists, sizes, logdet_strides, samples * blocks, NARROW, SUMMED, SEGMENTS, LANES
        )
    else:
        grad = _load(grad_y, at, exists, sizes, grad_y_strides, NARROW, WORK)
        gl = _load(logdet, at, exists, sizes, logdet_strides, NARROW, WORK)
        # d log(slope) / d theta
        lean = 2.0 * (d1 * theta - d0 * phi + s * (phi - theta)) / above
        lean -= 2.0 * (d0 + d1 - 2.0 * s) * (phi - theta) / below
        if INVERSE:  # the chain rule through f(x(y)) = y
            gl = -gl
            by_x = -grad
            by_input = (grad + gl * (lean / w)) / slope
            gy = -by_input
        else:
            by_x = grad * slope + gl * (lean / w)
            by_input = by_x
            gy = grad
        _store(result, tl.where(inside, by_input, grad), at, exists, sizes, result_strides, NARROW)
        gh = gy * h * (q / below)
        by_s = gh * ((d1 * theta2 - d0 * phi2) / below)
        by_s += 2.0 * gl * (1.0 / s + q / above - (theta2 + phi2) / below)
        by_d0 = gh * (fall / below) + gl * (phi2 / above - 2.0 * q / below)
        by_d1 = -gh * (climb / below) + gl * (theta2 / above - 2.0 * q / below)
        by_d0 = tl.where(inside & (k > 0), by_d0 * d0_by_raw, 0.0)
        by_d1 = tl.where(inside & ~last, by_d1 * d1_by_raw, 0.0)

        by_w = -(by_x * theta + by_s * s / w)
        by_h = gy * (climb / below) + by_s / w
        grad_w = _softmax_gradient(w_shares, w_total, lane, k, w_before, w_own, -by_x, by_w, free_width * logit_scale)
        grad_h = _softmax_gradient(h_shares, h_total, lane, k, h_before, h_own, gy, by_h, free_height * logit_scale)
        if EXPONENTIAL:
            grad_w *= _softclip(raw_w, 0.5 * curve)[1]
            grad_h *= _softclip(raw_h, 0.5 * curve)[1]
        grad_w = tl.where(inside[:, None], grad_w, 0.0).to(grad_widths.dtype.element_ty)
        grad_h = tl.where(inside[:, None], grad_h, 0.0).to(grad_heights.dtype.element_ty)
        grad_d = tl.where(lane == k[:, None], by_d1[:, None], tl.where(lane == k[:, None] - 1, by_d0[:, None], 0.0))
        grad_d = grad_d.to(grad_derivatives.dtype.element_ty)
        tl.store(_parameters(grad_widths, at, lane, sizes, grad_widths_strides, NARROW), grad_w, mask=wanted)
        tl.store(_parameters(grad_heights, at, lane, sizes, grad_heights_strides, NARROW), grad_h, mask=wanted)
        to = _parameters(grad_derivatives, at, lane, sizes, grad_derivatives_strides, NARROW)
        tl.store(to, grad_d, mask=exists[:, None] & (lane < bins - 1))
