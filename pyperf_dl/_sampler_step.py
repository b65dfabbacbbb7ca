"""One step of a sampler, and noise of keys: the public functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.autograd import forward_ad

from . import _backend, _checks
from . import _sampler_operators as operators
from ._autograd import _are_functorch_transforms_active, is_differentiated, is_plain, replicated_beside
from ._sampler_noise import checked_generators, drawn, generator_state, one_a_sample
from ._sampler_step_table import RowPlan, StepTable
from .reference import _sampler_linear as linear
from .reference._sampler_linear import COLUMNS

DTYPES, _HALVES = _checks.FLOATS, _checks.HALVES


class SamplerStep(NamedTuple):
    """What a step made; None where it was not asked for."""

    sample: torch.Tensor
    denoised: torch.Tensor | None
    history: tuple[torch.Tensor, ...]
    model_input: torch.Tensor | None
    log_prob: torch.Tensor | None


def sampler_step(
    x: torch.Tensor,
    model_output: torch.Tensor,
    table: StepTable,
    step: int | torch.Tensor,
    *,
    uncond: torch.Tensor | None = None,
    guidance: float | torch.Tensor | None = None,
    guidance_rescale: float = 0.0,
    history: Sequence[torch.Tensor] = (),
    noise: torch.Tensor | None = None,
    generator: torch.Generator | Sequence[torch.Generator | None] | None = None,
    key: int | torch.Tensor | None = None,
    clip: float | tuple[float, float] | None = None,
    dynamic_threshold: tuple[float, float] | None = None,
    model_inputs: int = 0,
    denoised: bool = False,
    log_prob: bool = False,
    target: torch.Tensor | None = None,
) -> SamplerStep:
    """One step of a diffusion or flow-matching sampler: guidance, the denoised sample, its clip, the update with
    history and noise, and the model's next input, in one pass.

    With c(...) the coefficients of row `step`, and m the model's output,

        m  = uncond + guidance (model_output - uncond)           model_output itself without guidance
        D  = clip(c(p) x + c(q) m)                               the denoised sample
        x' = c(x) x + c(m) m + c(d) D + sum_j c(h_j) history_j + c(z) noise

    Args:
        x: ``[B, ...]``, the sample; float16, bfloat16 (float32 inside), float32 or float64 (float64 inside).
        model_output: of x's shape, and dtype; with a float32 x also float16 or bfloat16. For a table with a learned
            variance twice the channels (dim 1), of which the second half is the variance's.
        table: the coefficients of a sampler, see `StepTable`.
        step: the row, or an int64 tensor on x's device with one row, or one a sample, which costs no sync; NaN where
            the table has no such row. With a tensor, history must have what any row reads.
        uncond: the model's output without the condition; needs `guidance`.
        guidance: scale of classifier-free guidance, 1 is none; a number, or a tensor of one or one a sample.
        guidance_rescale: in [0, 1], how much of the guided output's standard deviation is brought back to that of
            `model_output`; with it, or `dynamic_threshold`, one more pass over the tensors comes before.
        history: `history` of the last step's result; empty at first.
        noise: standard normal, of x's shape and dtype, for rows that add noise. Else drawn with
        generator: of x's device, or a list with one a sample; the numbers of ``torch.randn``, by the default generator
            where it is None. Or made from
        key: an int, or an int64 tensor of one or one a sample: noise that depends on the sample's key, the row and the
            element alone, so that a sample is the same in any batch and on any machine; see `per_sample_noise`.
        clip: bounds of the denoised sample: ``c`` for (-c, c), or (low, high).
        dynamic_threshold: (quantile, largest): D is clipped to (-s, s) and divided by s, the quantile of the sample's
            abs(D), which is at least 1 and at most `largest`. Instead of `clip`.
        model_inputs: how many copies of the model's next input, c(input) x', to make as well: 2 for guidance.
        denoised: whether to return D.
        log_prob: whether to return log N(x'; mean, c(z)^2) of each sample, ``[B]``, in float32 (float64 for float64).
        target: the x' whose log_prob it is, instead of a new one; a constant for its gradient.

    Returns:
        SamplerStep: ``sample`` x'; ``denoised`` D or None; ``history`` for the next step; ``model_input``
        ``[model_inputs * B, ...]`` in the model's dtype, or None; ``log_prob`` or None.

    Raises:
        TypeError, ValueError: a step out of the table, a history that the row does not have, unlike shapes, guidance
            without `uncond`, several sources of noise, and so on.

    Deterministic for the same noise, and differentiable with respect to x, model_output, uncond, history and noise; its
    gradients are one pass as well. Sources of the formulas are with the builders of `StepTable`.

    >>> table = pyperf_dl.StepTable.flow_euler(pyperf_dl.NoiseSchedule.flow(4))
    >>> pyperf_dl.sampler_step(torch.zeros(1, 3), torch.ones(1, 3), table, 0).sample
    tensor([[-0.2500, -0.2500, -0.2500]])
    """
    op = "sampler_step"
    _checks.strided_tensor(op, "x", x, DTYPES)
    if x.dim() == 0:
        raise ValueError(f"{op}: x must have a batch dimension, got a tensor without dimensions")
    row, rows = _checked_step(op, step, table, x)
    output, variance = _checked_output(op, model_output, table, x)
    unconditional, scale, scales = _checked_guidance(op, uncond, guidance, table, x, output)
    low, high = _checked_clip(op, clip, dynamic_threshold)
    adjustment = _checked_adjustment(op, guidance_rescale, dynamic_threshold, unconditional)
    copies = _checks.integer(op, "model_inputs", model_inputs, 0)
    _checks.flag(op, "denoised", denoised)
    _checks.flag(op, "log_prob", log_prob)
    plan = table.plans[row] if rows is None else table.plan_of_any
    kept, last = _checked_history(op, history, table, plan, row, x)
    if log_prob and not plan.noisy:
        raise ValueError(f"{op}: log_prob is for a row that adds noise, row {row} of {table} does not")
    noise, key, generator = _checked_noise(op, noise, generator, key, x, plan.noisy and target is None)
    if target is not None:
        _checked_target(op, target, log_prob, copies, x)

    coefficients = table.coefficients
    if coefficients.device != x.device:
        coefficients = table.to(x.device).coefficients
    if not is_plain(x):
        coefficients, rows, scales, key = (replicated_beside(x, t) for t in (coefficients, rows, scales, key))
    if rows is not None and last is not None:
        coefficients, last = _corrected_by_all(coefficients, rows, last, x)
    numbers = (coefficients, rows, scales)
    adjust = None
    tensors = (x, output, unconditional, variance, *history, noise)
    differentiated = (adjustment or variance is not None or log_prob) and _are_differentiated(tensors)
    by_reference = (adjustment is not None and differentiated) or (log_prob and _are_transformed())
    if adjustment is not None:
        without_kernel = by_reference or _backend.serving(x) == "triton"
        adjustments = linear.sampler_adjustments if without_kernel else operators.adjustments
        adjust = adjustments(x, output, unconditional, *numbers, row, scale, *adjustment, 1)
    state, offset = None, 0
    if plan.noisy and noise is None and key is None and target is None:
        drawing = None if log_prob or differentiated else generator_state(x, generator)
        if drawing is None:
            noise = drawn(x, generator)
        else:
            state, offset = drawing
    tensors = (x, output, unconditional, variance, *kept, *[None] * (3 - len(kept)), last, noise)
    numbers = (*numbers, key, state, adjust, row, scale, low, high, offset)
    keeps_d, probability = denoised or plan.keeps_denoised, None
    if log_prob:
        transition = linear.sampler_transition if by_reference else operators.transition
        score = differentiated and not by_reference
        sample, d, combined, corrected, model_input, probability, _ = transition(
            *tensors, None if target is None else target.detach(), *numbers, keeps_d, plan.combines, copies, score, 1
        )
        sample = sample if target is None else target
    else:
        call = linear.sampler_step if by_reference else operators.step
        sample, d, combined, corrected, model_input = call(*tensors, *numbers, keeps_d, plan.combines, copies, 1)
    newest = (d,) if plan.keeps_denoised else (combined,) if plan.combines else ()
    after = (*newest, *kept)[: plan.depth]
    if plan.correcting:
        after = (*after, x if last is None else corrected)
    return SamplerStep(
        sample,
        d if denoised else None,
        after,
        model_input.flatten(0, 1) if copies else None,
        probability,
    )


def per_sample_noise(
    shape: Sequence[int],
    key: int | torch.Tensor,
    draw: int = -1,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Standard normal noise that depends on a sample's key, the number of the draw, and the element alone: a sample
    gets the same alone and in a batch, on every machine and with any number of threads.

    Philox4x32-10 (Salmon et al.: Parallel random numbers: as easy as 1, 2, 3, 2011) with Box-Muller in float32. The
    noise that ``sampler_step(..., key=key)`` adds in row i is draw i; draw -1 is meant for the start.

    Args:
        shape: ``[B, ...]``.
        key: an int, or an int64 tensor with one or B of them. Different keys give independent noise.
        draw: an int of 64 bits, with a sign.
        dtype, device: of the result; float32 numbers are rounded to 16 bits, and not more exact in float64.

    Returns:
        Tensor: contiguous.

    Raises:
        TypeError, ValueError: keys of another number than the samples, a dtype that is no float.

    >>> one, two = (pyperf_dl.per_sample_noise([2, 3], torch.tensor(k)) for k in ([7, 8], [9, 8]))
    >>> torch.equal(one[1], two[1]), torch.equal(one[0], two[0])
    (True, False)
    """
    op = "per_sample_noise"
    if dtype not in DTYPES:
        raise TypeError(f"{op}: dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype}")
    where = key.device if device is None and isinstance(key, torch.Tensor) else device
    like = torch.empty(tuple(shape), dtype=dtype, device=where)
    if like.dim() == 0:
        raise ValueError(f"{op}: shape must have a batch dimension, got {list(shape)}")
    draw = _checks.integer(op, "draw", draw)
    if not -(2**63) <= draw < 2**63:
        raise ValueError(f"{op}: draw must have 64 bits, got {draw}")
    return noise_of_key(like, checked_key(op, key, like), draw)


def noise_of_key(like: torch.Tensor, key: torch.Tensor, draw: int) -> torch.Tensor:
    return operators.noise(like, key, None, draw, 0, 1)


def first_noise(x: torch.Tensor, noise: Any = None, generator: Any = None, key: Any = None) -> torch.Tensor:
    """For what comes before the first row; of keys a draw that no row has."""
    noise, key, generator = _checked_noise("Sampler.sample", noise, generator, key, x, True)
    if key is not None:
        return noise_of_key(x, key, 2**62)
    if noise is not None:
        return noise
    drawing = generator_state(x, generator)
    return drawn(x, generator) if drawing is None else operators.noise(x, None, drawing[0], 0, drawing[1], 1)


# ---- arguments ----


def _checked_step(op: str, step: Any, table: Any, x: torch.Tensor) -> tuple[int, torch.Tensor | None]:
    if not isinstance(table, StepTable):
        raise TypeError(f"{op}: table must be a StepTable, got {type(table).__name__}")
    if isinstance(step, torch.Tensor) and step.is_cpu and step.numel() == 1 and not x.is_cpu:
        step = int(one_a_sample(op, "step", step, step, torch.int64))
    if isinstance(step, torch.Tensor):
        return 0, one_a_sample(op, "step", step, x, torch.int64)
    row = _checks.integer(op, "step", step)
    if not 0 <= row < len(table):
        raise ValueError(f"{op}: step must be in [0, {len(table) - 1}], the rows of the table, got {step}")
    return row, None


def _checked_like(op: str, name: str, value: Any, x: torch.Tensor, dtype: torch.dtype, like: str = "x") -> torch.Tensor:
    _checks.strided_tensor(op, name, value, DTYPES)
    if value.dtype != dtype or value.device != x.device or value.shape != x.shape:
        raise ValueError(
            f"{op}: {name} must be {dtype} {list(x.shape)} on {x.device}, as {like} is, got {_checks.described(value)}"
        )
    return value


def _checked_output(
    op: str, output: Any, table: StepTable, x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The output, and the variance that was learned."""
    _checks.strided_tensor(op, "model_output", output, DTYPES)
    if output.dtype != x.dtype and not (x.dtype == torch.float32 and output.dtype in _HALVES):
        raise TypeError(
            f"{op}: model_output must have x's dtype, or 16 bits beside a float32 x, got {output.dtype} for {x.dtype}"
        )
    shape = list(x.shape)
    if table.learned_variance:
        if len(shape) < 2 or list(output.shape) != [shape[0], 2 * shape[1], *shape[2:]]:
            raise ValueError(
                f"{op}: model_output must have twice the channels of x {shape} for a table with a learned variance, "
                f"got {list(output.shape)}"
            )
        output, variance = output.chunk(2, 1)
    else:
        variance = None
    return _checked_like(op, "model_output", output, x, output.dtype), variance


def _checked_guidance(
    op: str, uncond: Any, guidance: Any, table: StepTable, x: torch.Tensor, output: torch.Tensor
) -> tuple[torch.Tensor | None, float, torch.Tensor | None]:
    """The model's output without the condition, and the scale as a number or as one a sample."""
    if (uncond is None) != (guidance is None):
        there, lacks = ("guidance", "uncond") if uncond is None else ("uncond", "guidance")
        raise ValueError(
            f"{op}: {there} needs {lacks}: the model's output without the condition and its scale go together"
        )
    if uncond is None:
        return None, 1.0, None
    _checks.strided_tensor(op, "uncond", uncond, DTYPES)
    if table.learned_variance and uncond.dim() > 1 and uncond.shape[1] == 2 * x.shape[1]:
        uncond = uncond.chunk(2, 1)[0]
    _checked_like(op, "uncond", uncond, x, output.dtype, "model_output")
    if isinstance(guidance, torch.Tensor):
        return uncond, 1.0, one_a_sample(op, "guidance", guidance, x, torch.float64)
    return uncond, _checks.number(op, "guidance", guidance, finite=True), None


def _checked_clip(op: str, clip: Any, dynamic_threshold: Any) -> tuple[float, float]:
    if clip is None:
        return -math.inf, math.inf
    if dynamic_threshold is not None:
        raise ValueError(f"{op}: clip and dynamic_threshold exclude each other, got {clip} and {dynamic_threshold}")
    if isinstance(clip, (tuple, list)):
        if len(clip) != 2:
            raise ValueError(f"{op}: clip must be a bound or (low, high), got {clip}")
        low, high = (_checks.number(op, "clip", c) for c in clip)
    else:
        high = _checks.number(op, "clip", clip)
        low = -high
    if not low < high:
        raise ValueError(f"{op}: clip must be a bound > 0, or (low, high) with low < high, got {clip}")
    return low, high


def _checked_adjustment(
    op: str, rescale: Any, dynamic_threshold: Any, unconditional: torch.Tensor | None
) -> tuple[float, float, float] | None:
    """guidance_rescale, quantile and largest bound, where there is any."""
    if rescale == 0 and dynamic_threshold is None:
        return None
    rescale = _checks.number(op, "guidance_rescale", rescale, 0.0, 1.0)
    if rescale and unconditional is None:
        raise ValueError(f"{op}: guidance_rescale needs guidance, got {rescale} without uncond")
    if dynamic_threshold is None:
        return (rescale, 0.0, math.inf) if rescale else None
    if not isinstance(dynamic_threshold, (tuple, list)) or len(dynamic_threshold) != 2:
        raise TypeError(f"{op}: dynamic_threshold must be (quantile, largest bound), got {dynamic_threshold!r}")
    quantile, largest = (_checks.number(op, "dynamic_threshold", v) for v in dynamic_threshold)
    if not 0 < quantile <= 1 or not largest >= 1:
        raise ValueError(
            f"{op}: dynamic_threshold must be a quantile in (0, 1] and a bound >= 1, got {tuple(dynamic_threshold)}"
        )
    return rescale, quantile, largest


def _checked_history(
    op: str, history: Any, table: StepTable, plan: RowPlan, row: int, x: torch.Tensor
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor | None]:
    """What was kept, and the sample that a corrector starts from."""
    if not isinstance(history, (tuple, list)):
        raise TypeError(f"{op}: history must be a tuple of tensors, got {_checks.described(history)}")
    needed, at_most = plan.reads + plan.corrects, plan.depth + plan.correcting
    if not needed <= len(history) <= at_most:
        what = "a tensor of rows" if plan is table.plan_of_any else f"row {row}"
        raise ValueError(
            f"{op}: history must hold {needed} to {at_most} tensors for {what} of {table}, got {len(history)}; pass "
            "what the step before returned"
        )
    for tensor in history:
        _checked_like(op, "history", tensor, x, x.dtype)
    kept = history[:-1] if plan.correcting else history
    return tuple(kept), history[-1] if plan.corrects else None


def _corrected_by_all(
    coefficients: torch.Tensor, rows: torch.Tensor, last: torch.Tensor, x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The table and `last` for samples of which some are at rows that correct nothing: there x is corrected to x."""
    first = COLUMNS.index("last_x")
    idle = (coefficients[:, first : COLUMNS.index("last_h2") + 1] == 0).all(1)
    coefficients = coefficients.clone()
    coefficients[:, first] += idle
    idle = idle[rows.clamp(0, idle.numel() - 1)].view(-1, *[1] * (x.dim() - 1))
    return coefficients, torch.where(idle, x, last)


def _checked_noise(
    op: str, noise: Any, generator: Any, key: Any, x: torch.Tensor, needed: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None, Any]:
    if noise is None and generator is None and key is None:
        return None, None, None
    given = [name for name, v in (("noise", noise), ("generator", generator), ("key", key)) if v is not None]
    if len(given) > 1:
        raise ValueError(f"{op}: {' and '.join(given)} exclude each other, got all of them")
    if noise is not None:
        _checked_like(op, "noise", noise, x, x.dtype)
    generator = checked_generators(op, generator, x)
    key = None if key is None else checked_key(op, key, x)
    return (noise, key, generator) if needed else (None, None, None)


def checked_key(op: str, key: Any, x: torch.Tensor) -> torch.Tensor:
    if isinstance(key, torch.Tensor):
        return one_a_sample(op, "key", key, x, torch.int64)
    number = _checks.integer(op, "key", key)
    if not -(2**63) <= number < 2**64:
        raise ValueError(f"{op}: key must have 64 bits, got {number}")
    return torch.full((1,), number - 2**64 if number >= 2**63 else number, dtype=torch.int64, device=x.device)


def _checked_target(op: str, target: Any, log_prob: bool, copies: int, x: torch.Tensor) -> None:
    if not log_prob:
        raise ValueError(f"{op}: target is for log_prob=True, whose sample it replaces")
    if copies:
        raise ValueError(f"{op}: model_inputs is for a new sample, which target replaces, got {copies} with target")
    _checked_like(op, "target", target, x, x.dtype)


def _are_transformed() -> bool:
    return _are_functorch_transforms_active() or forward_ad._current_level >= 0  # the latter whatever no_grad says


def _are_differentiated(tensors: Sequence[torch.Tensor | None]) -> bool:
    """Or batched."""
    if _are_transformed():
        return True
    return torch.is_grad_enabled() and any(t is not None and is_differentiated(t) for t in tensors)
