"""Steps of samplers, element by element (formulas: kernels/math/sampler_call.h, kernels/math/sampler.h).

A program takes SEGMENTS * LANES elements: a segment is LANES elements of one sample, `blocks` of them a sample. Numbers
of samples are [SEGMENTS, 1]. Inputs are dense within a sample, `strides` elements from one sample to the next; outputs
are dense. Pointers that are None switch a part of a kernel off.
"""

import triton
import triton.language as tl

# ---- elements and numbers of samples ----


@triton.jit
def _elements(samples, sample_size, blocks, SEGMENTS: tl.constexpr, LANES: tl.constexpr):
    """Samples, the first elements of the segments, all elements, and which of them exist."""
    segment = tl.program_id(0).to(tl.int64) * SEGMENTS + tl.arange(0, SEGMENTS)[:, None]
    sample = segment // blocks
    first = (segment - sample * blocks) * LANES
    element = first + tl.arange(0, LANES)[None, :]
    return sample, first, element, (sample < samples) & (element < sample_size)


@triton.jit
def _of_samples(numbers, count, sample, otherwise):
    if numbers is None:
        return otherwise
    else:
        return tl.load(numbers + sample % count)


@triton.jit
def _coefficients(table, row, rows, FOLDS: tl.constexpr):
    """In the order of the table's columns, in float64; NaN where there is no such row.

    With FOLDS the denoised sample is a sum of x and m like the rest: one rounding less.
    """
    exists = (row >= 0) & (row < rows)
    at = table + tl.where(exists, row, 0) * 19
    found = ()
    for column in tl.static_range(19):
        found += (tl.load(at + column, mask=exists, other=float("nan")),)
    if FOLDS:
        p, q, d = found[0], found[1], found[4]
        folded = (p, q, found[2] + d * p, found[3] + d * q, tl.zeros_like(d))
        return folded + found[5:]
    else:
        return found


@triton.jit
def _load(tensor, at, exists, WORK: tl.constexpr):
    return tl.load(tensor + at, mask=exists, other=0).to(WORK)


@triton.jit
def _rounded(tensor, values):
    """16-bit types round from float32, as native kernels do."""
    if tensor.dtype.element_ty.primitive_bitwidth == 16:
        values = values.to(tl.float32)
    return values.to(tensor.dtype.element_ty)


@triton.jit
def _store(tensor, values, at, exists):
    tl.store(tensor + at, _rounded(tensor, values), mask=exists)


@triton.jit
def _model_input_at(sample, copy, copies, group, sample_size):
    """Where a sample begins: the samples of a group, then the group's next copy."""
    return ((sample // group * copies + copy) * group + sample % group) * sample_size


# ---- noise from keys: kernels/math/normal.h ----


@triton.jit
def _polynomial(v, coefficients):
    """The coefficient of the highest power comes first."""
    total = tl.full((), coefficients[0], tl.float32)
    for i in tl.static_range(1, len(coefficients)):
        total = tl.fma(total, v, tl.full((), coefficients[i], tl.float32))
    return total


@triton.jit
def _log(v, added_to_exponent):
    """log(v * 2^added_to_exponent) for a normal v > 0."""
    bits = v.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23  # from sqrt(1/2)
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    n = exponent.to(tl.float32) + added_to_exponent
    tail = _polynomial(
        f,
        (
            0.06746601248797919, -0.11675641272277415, 0.11888174618012086, -0.12405591423851223, 0.14219550906304348,
            -0.1666799566662192, 0.20002118732288335, -0.2500000960366467, 0.33333312602801496,
        ),
    )  # fmt: skip
    low = tl.fma(n, tl.full((), -2.12194440e-4, tl.float32), f * f * f * tail - f * f * 0.5)
    return tl.fma(n, tl.full((), 0.693359375, tl.float32), f + low)


@triton.jit
def _normal_pair(x, y):
    """Box-Muller of two words."""
    radius = tl.sqrt_rn(_log((x >> 1).to(tl.int32, bitcast=True).to(tl.float32) + 0.5, -31.0) * -2.0)
    rounded = y + 0x20000000  # its top two bits are the quadrant
    turn = (y - (rounded & 0xC0000000)).to(tl.int32, bitcast=True).to(tl.float32) * 2.3283064365386963e-10
    square = turn * turn
    odd_powers = _polynomial(
        square, (-75.40755462646484, 81.59268951416016, -41.3416633605957, -1.9519183069860446e-07)
    )
    sine = tl.fma(turn, tl.full((), 6.28318548, tl.float32), turn * odd_powers)
    cosine = _polynomial(square, (58.69950485229492, -85.42615509033203, 64.93915557861328, -19.739208221435547, 1.0))
    swaps = (rounded & 0x40000000) != 0
    even = tl.where(swaps, sine, cosine)
    odd = tl.where(swaps, cosine, sine)
    even = tl.where(((rounded + 0x40000000) & 0x80000000) != 0, -even, even)
    odd = tl.where((rounded & 0x80000000) != 0, -odd, odd)
    return radius * even, radius * odd


@triton.jit
def _normals(keys, key_count, draw, sample, first, SEGMENTS: tl.constexpr, LANES: tl.constexpr):
    """[SEGMENTS, LANES], in float32; LANES is a multiple of 128."""
    key = tl.load(keys + sample % key_count)
    block = first // 4 + tl.arange(0, LANES // 4)[None, :]
    words = tl.philox(
        key,
        (block & 0xFFFFFFFF).to(tl.uint32),
        (block >> 32).to(tl.uint32),
        (draw & 0xFFFFFFFF).to(tl.uint32),
        ((draw >> 32) & 0xFFFFFFFF).to(tl.uint32),
    )
    n0, n1 = _normal_pair(words[0], words[1])
    n2, n3 = _normal_pair(words[2], words[3])
    # Element e of 128 is normal e // 32 of block e % 32.
    by_block = tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), (SEGMENTS, LANES // 128, 32, 4))
    return tl.reshape(tl.permute(by_block, (0, 1, 3, 2)), (SEGMENTS, LANES))


@triton.jit(do_not_specialize=["draw"])
def sampler_noise(
    out,
    key,
    key_count,
    draw: tl.int64,
    samples,
    sample_size,
    blocks,
    SEGMENTS: tl.constexpr,
    LANES: tl.constexpr,
):
    sample, first, element, exists = _elements(samples, sample_size, blocks, SEGMENTS, LANES)
    normals = _normals(key, key_count, draw.to(tl.int64), sample, first, SEGMENTS, LANES)
    _store(out, normals, sample * sample_size + element, exists)


# ---- steps ----


@triton.jit
def _clamp(x, low, high):
    """NaN stays."""
    x = tl.where(x < low, low, x)
    return tl.where(x > high, high, x)


@triton.jit
def _guided(m, unconditional, guidance, at, exists, WORK: tl.constexpr):
    if unconditional is None:
        return m
    else:
        u = _load(unconditional, at, exists, WORK)
        return tl.fma(guidance, m - u, u)


@triton.jit
def _deviation(z, log_small, log_large, variance, at, exists, WORK: tl.constexpr):
    """What standard normal noise is multiplied with, and how its logarithm grows with a learned variance."""
    if variance is None:
        return z.to(WORK), tl.full((), 0, WORK)
    else:
        slope = (0.25 * (log_large - log_small)).to(WORK)
        middle = (0.25 * (log_large + log_small)).to(WORK)
        return tl.exp(tl.fma(slope, _load(variance, at, exists, WORK), middle)) * z.to(WORK), slope


@triton.jit
def _log_density(difference, z, log_small, log_large, variance, at, exists, WORK: tl.constexpr):
    """log N but for log(2 pi) / 2, and its gradient with respect to the mean."""
    deviation, slope = _deviation(z, log_small, log_large, variance, at, exists, WORK)
    inverse = 1.0 / deviation
    standard = difference * inverse
    density = standard * standard * -0.5 - tl.log(z).to(WORK)
    if variance is not None:
        middle = (0.25 * (log_large + log_small)).to(WORK)
        density -= tl.fma(slope, _load(variance, at, exists, WORK), middle)
    return density, standard * inverse


@triton.jit(do_not_specialize=["row"])
def sampler_step(
    x,
    output,
    unconditional,
    variance,
    h1,
    h2,
    h3,
    last,
    noise,
    target,
    after,
    denoised,
    kept,
    corrected,
    model_input,
    partials,  # of log-probabilities, a sum for each segment
    score,
    strides,  # of the inputs
    table,
    step,  # None: `row`; likewise the others
    guidance,
    key,
    adjust,
    rows,
    steps,
    guidances,
    keys,
    adjusts,
    row: tl.int64,
    guidance_scale: tl.float64,
    low: tl.float64,
    high: tl.float64,
    group,
    samples,
    sample_size,
    blocks,
    CLIPS: tl.constexpr,
    FOLDS: tl.constexpr,
    COPIES: tl.constexpr,
    WORK: tl.constexpr,
    SEGMENTS: tl.constexpr,
    LANES: tl.constexpr,
):
    sample, first, element, exists = _elements(samples, sample_size, blocks, SEGMENTS, LANES)
    row = _of_samples(step, steps, sample, row.to(tl.int64))
    (
        p, q, by_x, by_m, by_d, by_h1, by_h2, by_h3, z, keep_x, keep_m, keep_d,
        last_x, last_d, last_h1, last_h2, log_small, log_large, input_scale,
    ) = _coefficients(table, row, rows, FOLDS)  # fmt: skip
    guidance_scale = _of_samples(guidance, guidances, sample, tl.full((), guidance_scale, tl.float64)).to(WORK)
    low, high = tl.full((), low, tl.float64), tl.full((), high, tl.float64)

    u = _load(x, sample * strides[0] + element, exists, WORK)
    m = _load(output, sample * strides[1] + element, exists, WORK)
    m = _guided(m, unconditional, guidance_scale, sample * strides[2] + element, exists, WORK)
    if adjust is not None:
        m *= tl.load(adjust + sample % adjusts * 2).to(WORK)
        bound = tl.load(adjust + sample % adjusts * 2 + 1)
        bounded = bound != float("inf")  # NaN is a bound
        low, high = tl.where(bounded, -bound, low), tl.where(bounded, bound, high)
    d = tl.fma(p.to(WORK), u, m * q.to(WORK))
    if CLIPS:
        d = _clamp(d, low.to(WORK), high.to(WORK))
    if adjust is not None:
        d *= tl.where(bounded, 1.0 / bound, 1.0).to(WORK)
    to = sample * sample_size + element
    if denoised is not None:
        _store(denoised, d, to, exists)

    if h1 is not None:
        past1 = _load(h1, sample * strides[4] + element, exists, WORK)
    if h2 is not None:
        past2 = _load(h2, sample * strides[5] + element, exists, WORK)
    if last is not None:
        u = _load(last, sample * strides[7] + element, exists, WORK) * last_x.to(WORK)
        u = tl.fma(last_d.to(WORK), d, u)
        if h1 is not None:
            u = tl.fma(last_h1.to(WORK), past1, u)
        if h2 is not None:
            u = tl.fma(last_h2.to(WORK), past2, u)
        _store(corrected, u, to, exists)
    if kept is not None:
        keeps = tl.fma(keep_m.to(WORK), m, u * keep_x.to(WORK))
        _store(kept, tl.fma(keep_d.to(WORK), d, keeps), to, exists)

    total = m * by_m.to(WORK)
    total = tl.where(by_d == 0, total, tl.fma(by_d.to(WORK), d, total))
    total = tl.fma(by_x.to(WORK), u, total)
    if h1 is not None:
        total = tl.fma(by_h1.to(WORK), past1, total)
    if h2 is not None:
        total = tl.fma(by_h2.to(WORK), past2, total)
    if h3 is not None:
        total = tl.fma(by_h3.to(WORK), _load(h3, sample * strides[6] + element, exists, WORK), total)
    of_variance = sample * strides[3] + element
    deviation, _ = _deviation(z, log_small, log_large, variance, of_variance, exists, WORK)
    mean = total
    if noise is not None:
        total = tl.fma(deviation, _load(noise, sample * strides[8] + element, exists, WORK), total)
    if key is not None:
        total = tl.fma(deviation, _normals(key, keys, row, sample, first, SEGMENTS, LANES).to(WORK), total)
    if after is not None:
        _store(after, total, to, exists)
    if partials is not None:
        if target is None:
            made = _rounded(after, total).to(WORK)
        else:
            made = _load(target, sample * strides[9] + element, exists, WORK)
        density, slopes = _log_density(made - mean, z, log_small, log_large, variance, of_variance, exists, WORK)
        density = density.to(tl.float64) - 0.91893853320467274178
        tl.store(partials + first // LANES + sample * blocks, tl.sum(tl.where(exists, density, 0.0), 1)[:, None],
                 mask=sample < samples)  # fmt: skip
        if score is not None:
            _store(score, slopes, to, exists)
    if model_input is not None:
        total *= input_scale.to(WORK)
        for copy in tl.static_range(COPIES):
            _store(model_input, total, _model_input_at(sample, copy, COPIES, group, sample_size) + element, exists)


@triton.jit(do_not_specialize=["row"])
def sampler_step_backward(
    grad_after,
    grad_denoised,
    grad_kept,
    grad_corrected,
    grad_model_input,
    x,
    output,
    unconditional,
    variance,
    noise,
    score,
    grad_x,
    grad_output,
    grad_unconditional,
    grad_variance,
    grad_h1,
    grad_h2,
    grad_h3,
    grad_last,
    grad_noise,
    strides,  # of the inputs but grad_model_input
    grad_log_prob,
    table,
    step,  # None: `row`; likewise the others
    guidance,
    key,
    rows,
    steps,
    guidances,
    keys,
    row: tl.int64,
    guidance_scale: tl.float64,
    low: tl.float64,
    high: tl.float64,
    group,
    samples,
    sample_size,
    blocks,
    GUIDED: tl.constexpr,
    CORRECTS: tl.constexpr,
    CLIPS: tl.constexpr,
    FOLDS: tl.constexpr,
    COPIES: tl.constexpr,
    WORK: tl.constexpr,
    SEGMENTS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Where nothing is clipped, x, output and unconditional are None."""
    sample, first, element, exists = _elements(samples, sample_size, blocks, SEGMENTS, LANES)
    row = _of_samples(step, steps, sample, row.to(tl.int64))
    (
        p, q, by_x, by_m, by_d, by_h1, by_h2, by_h3, z, keep_x, keep_m, keep_d,
        last_x, last_d, last_h1, last_h2, log_small, log_large, input_scale,
    ) = _coefficients(table, row, rows, FOLDS)  # fmt: skip
    guidance_scale = _of_samples(guidance, guidances, sample, tl.full((), guidance_scale, tl.float64)).to(WORK)
    low, high = tl.full((), low, WORK), tl.full((), high, WORK)

    if grad_after is None:
        of_after = tl.zeros([SEGMENTS, LANES], WORK)
    else:
        of_after = _load(grad_after, sample * strides[0] + element, exists, WORK)
    if grad_model_input is not None:
        total = tl.zeros_like(of_after)
        for copy in tl.static_range(COPIES):
            at = _model_input_at(sample, copy, COPIES, group, sample_size) + element
            total += _load(grad_model_input, at, exists, WORK)
        of_after = tl.fma(input_scale.to(WORK), total, of_after)
    of_sample = of_after
    if score is not None:
        slopes = _load(score, sample * strides[9] + element, exists, WORK)
        of_log_prob = tl.load(grad_log_prob + sample, mask=sample < samples, other=0).to(WORK)
        of_after = tl.fma(of_log_prob, slopes, of_after)
    of_kept = tl.zeros_like(of_after)
    if grad_kept is not None:
        of_kept = _load(grad_kept, sample * strides[2] + element, exists, WORK)
    of_u = tl.fma(by_x.to(WORK), of_after, of_kept * keep_x.to(WORK))
    if CORRECTS:
        of_u += _load(grad_corrected, sample * strides[3] + element, exists, WORK)
    of_d = tl.fma(by_d.to(WORK), of_after, of_kept * keep_d.to(WORK))
    if grad_denoised is not None:
        of_d += _load(grad_denoised, sample * strides[1] + element, exists, WORK)
    if CORRECTS:
        of_d = tl.fma(last_d.to(WORK), of_u, of_d)
    if CLIPS:
        m = _load(output, sample * strides[5] + element, exists, WORK)
        m = _guided(m, unconditional, guidance_scale, sample * strides[6] + element, exists, WORK)
        d = tl.fma(p.to(WORK), _load(x, sample * strides[4] + element, exists, WORK), m * q.to(WORK))
        of_d = tl.where((d >= low) & (d <= high), of_d, 0.0)
    of_m = tl.fma(by_m.to(WORK), of_after, tl.fma(keep_m.to(WORK), of_kept, of_d * q.to(WORK)))

    to = sample * sample_size + element
    if grad_x is not None:
        of_x = of_d * p.to(WORK)
        _store(grad_x, of_x if CORRECTS else of_x + of_u, to, exists)
    of_conditional = of_m * guidance_scale if GUIDED else of_m
    if grad_output is not None:
        _store(grad_output, of_conditional, to, exists)
    if grad_unconditional is not None:
        _store(grad_unconditional, of_m - of_conditional, to, exists)
    of_last = of_u if CORRECTS else tl.zeros_like(of_u)
    if grad_h1 is not None:
        _store(grad_h1, tl.fma(by_h1.to(WORK), of_after, of_last * last_h1.to(WORK)), to, exists)
    if grad_h2 is not None:
        _store(grad_h2, tl.fma(by_h2.to(WORK), of_after, of_last * last_h2.to(WORK)), to, exists)
    if grad_h3 is not None:
        _store(grad_h3, of_after * by_h3.to(WORK), to, exists)
    if grad_last is not None:
        _store(grad_last, of_last * last_x.to(WORK), to, exists)
    deviation, slope = _deviation(z, log_small, log_large, variance, sample * strides[7] + element, exists, WORK)
    if grad_noise is not None:
        _store(grad_noise, of_sample * deviation, to, exists)
    if grad_variance is not None:
        of_variance = tl.zeros_like(of_sample)
        if noise is not None:
            of_variance = of_sample * _load(noise, sample * strides[8] + element, exists, WORK) * deviation
        if key is not None:
            drawn = _normals(key, keys, row, sample, first, SEGMENTS, LANES).to(WORK)
            of_variance = of_sample * drawn * deviation
        if score is not None:
            standard = slopes * deviation
            of_variance = tl.fma(of_log_prob, standard * standard - 1.0, of_variance)
        _store(grad_variance, of_variance * slope, to, exists)
