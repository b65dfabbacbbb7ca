"""The operators of samplers in plain PyTorch, in float64: what the kernels compute.

Arguments are those of the operators (csrc/sampler.cpp). A row of the table has the coefficients of
_sampler_step_table.COLUMNS; `rest` of the operators' arguments are numbers and flags.
"""

from __future__ import annotations

import math
from typing import Any

import torch

Tensors = tuple[torch.Tensor, ...]


def sampler_step(
    x, output, unconditional, variance, h1, h2, h3, last, noise,
    table, step, guidance, key, state, adjust,
    row, guidance_scale, low, high, offset, denoised, keeps, copies, sample_dims,
) -> Tensors:  # fmt: skip
    """(x', denoised, kept, corrected x, input of the model [..., copies, samples, ...]); empty: not asked for."""
    return _step_and_mean(
        x, output, unconditional, variance, h1, h2, h3, last, noise,
        table, step, guidance, key, state, adjust,
        row, guidance_scale, low, high, denoised, keeps, copies, sample_dims,
    )[0]  # fmt: skip


def sampler_transition(
    x, output, unconditional, variance, h1, h2, h3, last, noise, target,
    table, step, guidance, key, state, adjust,
    row, guidance_scale, low, high, offset, denoised, keeps, copies, score, sample_dims,
) -> Tensors:  # fmt: skip
    """The same, then log N(x'; mean, deviation^2) of each sample, and its gradient with respect to the mean. x' counts
    as given there; with `target`, which takes its place, there is none."""
    (after, *others), mean = _step_and_mean(
        x, output, unconditional, variance, h1, h2, h3, last, noise,
        table, step, guidance, key, state, adjust,
        row, guidance_scale, low, high, denoised, keeps, copies, sample_dims,
    )  # fmt: skip
    spread = deviation(x, variance, table, step, row, sample_dims)
    z = ((after if target is None else target).detach().double() - mean) / spread
    each = -z * z / 2 - torch.log(spread) - math.log(2 * math.pi) / 2
    wide = log_prob_dtype(x)
    return (
        after if target is None else x.new_empty(0),
        *others,
        each.reshape(*x.shape[:sample_dims], math.prod(x.shape[sample_dims:])).sum(-1).to(wide),
        (z / spread).to(wide) if score else x.new_empty(0, dtype=wide),
    )


def _step_and_mean(
    x, output, unconditional, variance, h1, h2, h3, last, noise,
    table, step, guidance, key, state, adjust,
    row, guidance_scale, low, high, denoised, keeps, copies, sample_dims,
) -> tuple[Tensors, torch.Tensor]:  # fmt: skip
    assert state is None, "numbers of a CUDA generator are drawn before"
    shape = x.shape
    c = _coefficients(table, step, row, shape, sample_dims)
    wide = [None if t is None else t.double() for t in (x, output, unconditional, variance, h1, h2, h3, last, noise)]
    x64, m, unconditional64, variance64, h1, h2, h3, last, noise = wide
    factor, bound = (1.0, None) if adjust is None else _of_samples(adjust, shape, sample_dims)
    if unconditional is not None:
        scale = guidance_scale if guidance is None else _of_samples(guidance, shape, sample_dims)
        m = unconditional64 + scale * (m - unconditional64)
    m = m * factor
    d = c["p"] * x64 + c["q"] * m
    clipped = d.clamp(low, high) if clips(low, high) else d
    d = clipped if bound is None else torch.where(bound.isinf(), clipped, d.clamp(-bound, bound) / bound)
    if last is not None:
        x64 = (
            c["last_x"] * last
            + c["last_d"] * d
            + sum(c[f"last_h{k}"] * h for k, h in ((1, h1), (2, h2)) if h is not None)
        )
    kept = c["keep_x"] * x64 + c["keep_m"] * m + c["keep_d"] * d
    after = c["x"] * x64 + c["m"] * m + c["d"] * d
    for k, h in enumerate((h1, h2, h3), 1):
        after = after if h is None else after + c[f"h{k}"] * h
    if key is not None:
        noise = sampler_noise(x64, key, None, row if step is None else step, 0, sample_dims)
    mean = after
    if noise is not None:
        after = after + _deviation(c, variance64) * noise
    at = max(sample_dims - 1, 0)
    model_input = (c["input"] * after).unsqueeze(at).repeat_interleave(max(copies, 1), at)
    nothing = x.new_empty(0)
    outputs = (
        after.to(x.dtype),
        d.to(x.dtype) if denoised else nothing,
        kept.to(x.dtype) if keeps else nothing,
        x64.to(x.dtype) if last is not None else nothing,
        model_input.to(output.dtype) if copies else output.new_empty(0),
    )
    return outputs, mean


def sampler_step_backward(
    grad_next, grad_denoised, grad_kept, grad_corrected, grad_model_input, x, output, unconditional, variance, noise,
    grad_log_prob, score, table, step, guidance, key, state,
    row, guidance_scale, low, high, offset, guided, next, denoised, keeps, corrects, copies, wanted, sample_dims,
) -> Tensors:  # fmt: skip
    """Gradients of (x, output, unconditional, variance, h1, h2, h3, last, noise); empty: not a bit of `wanted`. Values
    of x, output and unconditional matter where there is a clip, those of variance and noise where one was learned,
    those of grad_next with `next`. score: of a transition."""
    assert state is None, "numbers of a CUDA generator are drawn before"
    shape = grad_next.shape
    c = _coefficients(table, step, row, shape, sample_dims)
    scale = guidance_scale if guidance is None else _of_samples(guidance, shape, sample_dims)
    of_sample = grad_next.double() if next else torch.zeros_like(grad_next, dtype=torch.float64)
    if copies:
        of_sample = of_sample + c["input"] * grad_model_input.double().sum(max(sample_dims - 1, 0))
    of_next = of_sample
    if score is not None:
        of_log_prob = grad_log_prob.double().reshape([*shape[:sample_dims], *[1] * (len(shape) - sample_dims)])
        of_next = of_next + of_log_prob * score.double()
    of_kept = grad_kept.double() if keeps else torch.zeros_like(of_next)
    of_x = c["x"] * of_next + c["keep_x"] * of_kept
    if corrects:
        of_x = of_x + grad_corrected.double()
    of_d = c["d"] * of_next + c["keep_d"] * of_kept
    if denoised:
        of_d = of_d + grad_denoised.double()
    if corrects:
        of_d = of_d + c["last_d"] * of_x
    if clips(low, high):
        m = output.double()
        if guided:
            m = unconditional.double() + scale * (m - unconditional.double())
        d = c["p"] * x.double() + c["q"] * m
        of_d = torch.where((d >= low) & (d <= high), of_d, 0.0)
    of_m = c["m"] * of_next + c["keep_m"] * of_kept + c["q"] * of_d
    of_last = of_x if corrects else torch.zeros_like(of_next)
    deviation, of_variance = _deviation(c, None if variance is None else variance.double()), None
    if variance is not None:
        if key is not None:
            noise = sampler_noise(of_next, key, None, row if step is None else step, 0, sample_dims)
        slope = log_deviation_slope(grad_next, table, step, row, sample_dims)
        of_variance = 0.0 if noise is None else of_sample * noise.double() * deviation
        if score is not None:
            of_variance = of_variance + of_log_prob * ((score.double() * deviation) ** 2 - 1)
        of_variance = slope * of_variance
    gradients = (
        c["p"] * of_d + (0.0 if corrects else of_x),
        scale * of_m if guided else of_m,
        (1 - scale) * of_m,
        of_variance,
        c["h1"] * of_next + c["last_h1"] * of_last,
        c["h2"] * of_next + c["last_h2"] * of_last,
        c["h3"] * of_next,
        c["last_x"] * of_last,
        deviation * of_sample,
    )
    model_dtype = grad_model_input.dtype
    dtypes = [model_dtype if 1 <= k <= 3 else grad_next.dtype for k in range(len(gradients))]
    return tuple(
        g.to(dtype) if wanted >> k & 1 else grad_next.new_empty(0, dtype=dtype)
        for k, (g, dtype) in enumerate(zip(gradients, dtypes, strict=True))
    )


def _deviation(c: dict[str, torch.Tensor], variance: torch.Tensor | None) -> torch.Tensor:
    """Of the noise that a step adds."""
    if variance is None:
        return c["z"]
    return c["z"] * torch.exp(((variance + 1) * c["log_large"] + (1 - variance) * c["log_small"]) / 4)


def deviation(x, variance, table, step, row, sample_dims=1) -> torch.Tensor:
    """The same in float64, of x's shape or such that it broadcasts."""
    c = _coefficients(table, step, row, x.shape, sample_dims)
    return _deviation(c, None if variance is None else variance.double())


def log_deviation_slope(x, table, step, row, sample_dims) -> torch.Tensor:
    """How the logarithm of the deviation grows with a learned variance."""
    c = _coefficients(table, step, row, x.shape, sample_dims)
    return (c["log_large"] - c["log_small"]) / 4


def log_prob_dtype(x: torch.Tensor) -> torch.dtype:
    """Of log-probabilities of samples as x, and of their scores."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def clips(low: float, high: float) -> bool:
    return low > -math.inf or high < math.inf


def _of_samples(numbers: torch.Tensor, shape: torch.Size, sample_dims: int) -> Any:
    """Numbers of all samples, or one of each, so that they broadcast with samples; [.., 2]: a pair of such."""
    if numbers.dim() == 2:
        return tuple(_of_samples(n, shape, sample_dims) for n in numbers.unbind(1))
    lead = shape[:sample_dims]
    samples = math.prod(lead)
    each = numbers.reshape(-1).repeat(max(samples // max(numbers.numel(), 1), 1))[:samples]
    return each.reshape([*lead, *[1] * (len(shape) - sample_dims)])


def _coefficients(
    table: torch.Tensor, step: torch.Tensor | None, row: Any, shape: torch.Size, sample_dims: int
) -> dict[str, torch.Tensor]:
    rows = torch.full((1,), row, device=table.device) if step is None else step.reshape(-1)
    exists = (rows >= 0) & (rows < table.shape[0])
    found = torch.where(exists[:, None], table[rows.clamp(0, table.shape[0] - 1)], math.nan)
    return {name: _of_samples(found[:, k], shape, sample_dims) for k, name in enumerate(COLUMNS)}


COLUMNS = (
    "p", "q", "x", "m", "d", "h1", "h2", "h3", "z", "keep_x", "keep_m", "keep_d",
    "last_x", "last_d", "last_h1", "last_h2", "log_small", "log_large", "input",
)  # fmt: skip


# ---- noise from keys ----


def sampler_noise(like, key, state, draw, offset, sample_dims) -> torch.Tensor:
    """Philox4x32-10 and Box-Muller: see kernels/math/normal.h. draw: an int, or one of each sample."""
    assert state is None, "numbers of a CUDA generator are drawn before"
    samples = math.prod(like.shape[:sample_dims])
    size = math.prod(like.shape[sample_dims:])
    if samples * size == 0:
        return torch.empty_like(like, memory_format=torch.contiguous_format)
    draws = torch.as_tensor(draw, dtype=torch.int64, device=like.device).reshape(-1)
    keys, draws = (t.reshape(-1).repeat(samples // t.numel())[:, None] for t in (key, draws))
    element = torch.arange(size, device=like.device)
    block, place = element // 128 * 32 + element % 32, element % 128 // 32
    words = _philox([block & _LOW, block >> 32, draws & _LOW, (draws >> 32) & _LOW], keys)
    words = [w.expand(samples, size) for w in words]
    first, second = (torch.where(place < 2, words[k], words[k + 2]) for k in (0, 1))
    # Rounded to float32 as in the kernels: the last bits of small numbers decide how large a normal is.
    uniform = ((first >> 1).float() + 0.5).double() * 2.0**-31
    quadrant = ((second + 2**29) >> 30) & 3
    turn = (((second - (quadrant << 30) + 2**31) & _LOW) - 2**31).float().double() * 2.0**-32
    angle = 2 * math.pi * (turn + quadrant.double() / 4)
    radius = torch.sqrt(-2 * torch.log(uniform))
    return (radius * torch.where(place % 2 == 0, angle.cos(), angle.sin())).reshape(like.shape).to(like.dtype)


_LOW = 0xFFFFFFFF


def _philox(counter: list[torch.Tensor], key: torch.Tensor) -> list[torch.Tensor]:
    low, high = key & _LOW, (key >> 32) & _LOW
    for _ in range(10):
        first, second = _product(counter[0], 0xD2511F53), _product(counter[2], 0xCD9E8D57)
        counter = [second[1] ^ counter[1] ^ low, second[0], first[1] ^ counter[3] ^ high, first[0]]
        low, high = (low + 0x9E3779B9) & _LOW, (high + 0xBB67AE85) & _LOW
    return counter


def _product(word: torch.Tensor, factor: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The lower and the upper 32 bits."""
    upper = (((word * (factor & 0xFFFF)) >> 16) + word * (factor >> 16)) >> 16
    return (word * factor) & _LOW, upper


# ---- what a step needs to know of whole samples ----


def sampler_adjustments(
    x, output, unconditional, table, step, guidance, row, guidance_scale, rescale, quantile, largest, sample_dims
) -> torch.Tensor:
    """[samples, 2]: by what the guided output is multiplied (Lin, Liu, Li, Yang: Common diffusion noise schedules and
    sample steps are flawed, 2023, eq. 15 and 16), and the bound of the denoised sample (dynamic thresholding: Saharia
    et al.: Photorealistic text-to-image diffusion models, 2022, 2.3); infinite where `quantile` is 0."""
    # With a dimension behind, a sample of one element has one too.
    x, output, unconditional = (None if t is None else t.double().unsqueeze(-1) for t in (x, output, unconditional))
    shape = x.shape
    dims = tuple(range(sample_dims, x.dim()))
    m = output
    factor = m.new_ones(())
    if unconditional is not None:
        scale = guidance_scale if guidance is None else _of_samples(guidance, shape, sample_dims)
        m = unconditional + scale * (m - unconditional)
        if rescale:
            factor = rescale * output.std(dims, keepdim=True) / m.std(dims, keepdim=True) + (1 - rescale)
    bound = m.new_full((), math.inf)
    if quantile and x.numel():
        c = _coefficients(table, step, row, shape, sample_dims)
        d = (c["p"] * x + c["q"] * m * factor).abs().flatten(sample_dims)
        bound = _quantile(d, quantile).clamp(1.0, largest).reshape(*shape[:sample_dims], *[1] * len(dims))
    lead = (*shape[:sample_dims], *[1] * len(dims))
    return torch.stack([factor.expand(lead), bound.expand(lead)], -1).reshape(-1, 2)


def _quantile(values: torch.Tensor, q: float) -> torch.Tensor:
    """torch.quantile along the last dimension, which is for 16 million elements at most: NaN where there is one."""
    place = q * (values.shape[-1] - 1)
    below = math.floor(place)
    ordered = values.sort(-1).values
    low, high = ordered[..., below], ordered[..., min(below + 1, values.shape[-1] - 1)]
    return torch.where(ordered[..., -1].isnan(), math.nan, low + (high - low) * (place - below))
