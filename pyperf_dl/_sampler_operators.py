"""The operators of a sampler's step: shapes, derivatives, batching, sharding."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from ._autograd import Operator, is_plain, pushed_forward, replicated_beside
from .reference import _sampler_linear as linear

_TENSORS = ("x", "output", "unconditional", "variance", "h1", "h2", "h3", "last", "noise")
_OF_MODEL = (1, 2, 3)  # which of them have the dtype of the model
_TRANSITION_TENSORS = (*_TENSORS, "target")
# Five gradients, x, output, unconditional, variance, noise, the gradient of log-probabilities, score.
_BACKWARD_TENSORS = 12


class _Numbers(NamedTuple):
    """What follows the tensors of a step: constants, then statics."""

    table: Any
    step: Any
    guidance: Any
    key: Any
    state: Any
    adjust: Any
    row: Any
    guidance_scale: Any
    low: Any
    high: Any
    offset: Any
    denoised: Any
    keeps: Any
    copies: Any
    sample_dims: Any


def _layout(x: torch.Tensor, sample_dims: int, logical: bool) -> list[int]:
    """Order of the dimensions in memory of new tensors: x's own where its samples are dense, else the logical one."""
    order = list(range(x.dim()))
    if logical or x.is_contiguous():
        return order
    order[sample_dims:] = sorted(order[sample_dims:], key=lambda d: -x.stride(d))
    expected = 1
    for d in reversed(order[sample_dims:]):
        if x.shape[d] != 1 and x.stride(d) != expected:
            return list(range(x.dim()))
        expected *= x.shape[d]
    return order


def _empty(x: torch.Tensor, shape: Sequence[int], layout: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    strides, step = [0] * len(shape), 1
    for d in reversed(layout):
        strides[d] = step
        step *= max(shape[d], 1)
    return torch.empty_strided(shape, strides, dtype=dtype, device=x.device)


def _fake_noise(like, key, state, draw, offset, sample_dims):
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def _fake_adjustments(x, *rest):
    return x.new_empty((math.prod(x.shape[: rest[-1]]), 2), dtype=torch.float64)


def _fake_step(x, output, unconditional, variance, h1, h2, h3, last, noise, *rest):
    n = _Numbers(*rest)
    layout = _layout(x, n.sample_dims, n.key is not None or n.state is not None)
    at = max(n.sample_dims - 1, 0)

    def made(wanted):
        return _empty(x, x.shape, layout, x.dtype) if wanted else x.new_empty(0)

    model_input = output.new_empty(0)
    if n.copies:
        behind = [d + (d >= at) for d in layout]
        model_input = _empty(
            x, [*x.shape[:at], n.copies, *x.shape[at:]], [*behind[:at], at, *behind[at:]], output.dtype
        )
    return made(True), made(n.denoised), made(n.keeps), made(last is not None), model_input


def _fake_transition(*args):
    x, target, (*rest, score, sample_dims) = args[0], args[len(_TENSORS)], args[len(_TRANSITION_TENSORS) :]
    after, *others = _fake_step(*args[: len(_TENSORS)], *rest, sample_dims)
    wide = linear.log_prob_dtype(x)
    return (
        after if target is None else x.new_empty(0),
        *others,
        x.new_empty(x.shape[:sample_dims], dtype=wide),
        torch.empty_like(after, dtype=wide) if score else x.new_empty(0, dtype=wide),
    )


def _fake_backward(grad_next, *rest):
    grad_model_input, (key, state) = rest[3], rest[14:16]
    wanted, sample_dims = rest[-2:]
    layout = _layout(grad_next, sample_dims, key is not None or state is not None)

    def made(k):
        dtype = grad_model_input.dtype if k in _OF_MODEL else grad_next.dtype
        if wanted >> k & 1:
            return _empty(grad_next, grad_next.shape, layout, dtype)
        return grad_next.new_empty(0, dtype=dtype)

    return tuple(made(k) for k in range(len(_TENSORS)))


def _save_step(ctx, inputs, output):
    """Values matter where there is a clip or a learned variance; elsewhere a step is linear and nothing is kept."""
    x, model_output, unconditional, variance, *_, noise = inputs[: len(_TENSORS)]
    n = _Numbers(*inputs[len(_TENSORS) :])
    ctx.given = [t is not None for t in inputs[: len(_TENSORS)]]
    ctx.dtypes = x.dtype, model_output.dtype
    ctx.learned = variance is not None and (noise is not None or n.key is not None)
    values = (x, model_output, unconditional) if linear.clips(n.low, n.high) else (None, None, None)
    return *values, *((variance, noise) if ctx.learned else (None, None))


def _save_transition(ctx, inputs, output):
    """x for its shape, the score for its values, and what a step keeps."""
    target, (*rest, _, sample_dims) = inputs[len(_TENSORS)], inputs[len(_TRANSITION_TENSORS) :]
    _, output_, unconditional, _, noise = _save_step(ctx, (*inputs[: len(_TENSORS)], *rest, sample_dims), output)
    variance = inputs[_TENSORS.index("variance")]
    ctx.learned, ctx.targeted = variance is not None, target is not None
    ctx.set_materialize_grads(False)
    return inputs[0], output_, unconditional, variance, noise, output[-1]


def _wanted(ctx, tensors):
    """Bits of the inputs whose gradients are asked for."""
    needed = ctx.needs_input_grad
    # The plain route has the numbers in front.
    needed = (needed[1:] if len(needed) == 1 + tensors else needed)[: len(_TENSORS)]
    able = [*ctx.given]
    able[_TENSORS.index("variance")] = ctx.learned
    return sum(1 << k for k, (n, a) in enumerate(zip(needed, able, strict=True)) if n and a)


def _refuse_adjust(n):
    if n.adjust is not None:
        raise RuntimeError("sampler_step: no derivative is there with adjust, which depends on the tensors")


def _gradients(ctx, *grads):
    n = _Numbers(*ctx.statics)
    _refuse_adjust(n)
    given = dict(zip(_TENSORS, ctx.given, strict=True))
    wanted = _wanted(ctx, len(_TENSORS))
    distributed = next((g for g in grads if not is_plain(g)), None)
    if distributed is not None:  # zeros for what was not used are plain
        grads = [replicated_beside(distributed, g) for g in grads]
    made = _backward(
        *grads, *ctx.saved_tensors, None, None,
        n.table, n.step, n.guidance, n.key if ctx.learned else None, None,
        n.row, n.guidance_scale, n.low, n.high, n.offset,
        given["unconditional"], True, n.denoised, n.keeps, given["last"], n.copies, wanted, n.sample_dims,
    )  # fmt: skip
    return tuple(g if wanted >> k & 1 else None for k, g in enumerate(made))


def _transition_gradients(ctx, *grads):
    *statics, _, sample_dims = ctx.statics
    n = _Numbers(*statics, sample_dims)
    _refuse_adjust(n)
    given = dict(zip(_TENSORS, ctx.given, strict=True))
    wanted = _wanted(ctx, len(_TRANSITION_TENSORS))
    x, output, unconditional, variance, noise, score = ctx.saved_tensors
    *grads, of_score = grads
    if ctx.targeted:
        grads[0] = None
    clips = linear.clips(n.low, n.high)
    learned, drawn = (1 << _TENSORS.index(name) for name in ("variance", "noise"))
    # Without noise, the variance is in the log-probability and its score alone.
    by_step = wanted & ~learned if ctx.targeted and grads[-1] is None else wanted

    def pulled(of_next, of_denoised, of_kept, of_corrected, of_model_input, of_log_prob, wanted):
        if given["last"] and of_corrected is None:
            of_corrected = torch.zeros_like(x)
        empty = replicated_beside(x, torch.empty(0, dtype=ctx.dtypes[1], device=x.device))
        return _backward(
            x if of_next is None else of_next,
            *(empty if g is None else g for g in (of_denoised, of_kept, of_corrected, of_model_input)),
            x if clips else None, output, unconditional, variance, noise,
            of_log_prob, None if of_log_prob is None else score,
            n.table, n.step, n.guidance, n.key if ctx.learned else None, None,
            n.row, n.guidance_scale, n.low, n.high, n.offset,
            given["unconditional"], of_next is not None, of_denoised is not None, of_kept is not None, given["last"],
            0 if of_model_input is None else n.copies, wanted, n.sample_dims,
        )  # fmt: skip

    made = pulled(*grads, by_step)
    gradients = [g if by_step >> k & 1 else None for k, g in enumerate(made)]
    if of_score is None:
        return (*gradients, None)
    # Of a gradient's gradient: score = (x' - mean) / deviation^2.
    spread = linear.deviation(x, variance, n.table, n.step, n.row, n.sample_dims)
    of_mean = wanted & ~learned & ~drawn
    more = pulled((-of_score / spread**2).to(x.dtype), None, None, None, None, None, of_mean)
    for k in range(len(_TENSORS)):
        if of_mean >> k & 1:
            gradients[k] = gradients[k] + more[k]
    if wanted & learned:
        slope = linear.log_deviation_slope(x, n.table, n.step, n.row, n.sample_dims)
        place = _TENSORS.index("variance")
        of_variance = (-2 * slope * score * of_score).to(variance.dtype)
        gradients[place] = of_variance if gradients[place] is None else gradients[place] + of_variance
    return (*gradients, None)


def _refuse_push(ctx, *tangents):
    raise RuntimeError("sampler_transition: no forward derivative is there; its reference has one")


def _pushed_step(ctx, *tangents):
    """The reference at the values that were saved, and at 0 for those that do not matter."""
    n = _Numbers(*ctx.statics)
    _refuse_adjust(n)
    if not ctx.learned:
        n = n._replace(key=None, state=None)
    like = next(t for t in tangents if t is not None)
    x, output, unconditional, variance, noise = ctx.saved_tensors
    values = (x, output, unconditional, variance, None, None, None, None, noise)
    there = [k for k, given in enumerate(ctx.given) if given]
    inputs = [
        torch.zeros_like(like, dtype=ctx.dtypes[k in _OF_MODEL]) if values[k] is None else values[k] for k in there
    ]
    return pushed_forward(_at(linear.sampler_step, there, len(_TENSORS), n), inputs, [tangents[k] for k in there])


def _at(function: Callable[..., Any], places: Sequence[int], tensors: int, statics: Sequence[Any]) -> Any:
    """`function` of the tensors at some places, None at the others."""

    def of(*given):
        inputs = [None] * tensors
        for k, t in zip(places, given, strict=True):
            inputs[k] = t
        return function(*inputs, *statics)

    return of


def _backward_there(ctx):
    return [k for k, t in enumerate(ctx.saved_tensors) if t is not None]


def _pull_backward(ctx, *grads):
    there = _backward_there(ctx)
    inputs = [ctx.saved_tensors[k] for k in there]
    found = torch.func.vjp(_at(linear.sampler_step_backward, there, _BACKWARD_TENSORS, ctx.statics), *inputs)[1](grads)
    pulled = [None] * _BACKWARD_TENSORS
    for k, g in zip(there, found, strict=True):
        pulled[k] = g
    return pulled


def _pushed_backward(ctx, *tangents):
    there = _backward_there(ctx)
    return pushed_forward(
        _at(linear.sampler_step_backward, there, _BACKWARD_TENSORS, ctx.statics),
        [ctx.saved_tensors[k] for k in there],
        [tangents[k] for k in there],
    )


def _batched(*args):
    return (*args[:-1], args[-1] + 1)


def _batched_step(copies):
    """`copies`: its place, from the end."""

    def batched(*args):
        if args[-1] == 0 and args[copies]:
            raise ValueError("sampler_step: vmap needs a dimension of samples, for inputs of the model are made")
        return _batched(*args)

    return batched


def _shardable(step, guidance, *others):
    """Whether all samples are treated alike, and nothing is made by an element's index."""
    return all(t is None or math.prod(t.shape) == 1 for t in (step, guidance)) and all(t is None for t in others)


def _places(dim, at, there, behind):
    """`dim` for tensors of x's shape that are there; that of the model's input, which has one more at `at`."""
    return [*(dim if t else None for t in there), dim + (dim >= at) if behind else None]


def _sharded(*args):
    n = _Numbers(*args[len(_TENSORS) :])
    if not _shardable(n.step, n.guidance, n.key, n.state, n.adjust):
        return
    at = max(n.sample_dims - 1, 0)
    made = (True, n.denoised, n.keeps, args[_TENSORS.index("last")] is not None)
    for dim in range(len(args[0].shape)):
        yield [dim] * len(_TENSORS), _places(dim, at, made, n.copies)


def _sharded_transition(*args):
    *others, _, sample_dims = args[len(_TRANSITION_TENSORS) :]
    n = _Numbers(*others, sample_dims)
    if not _shardable(n.step, n.guidance, n.key, n.state, n.adjust):
        return
    made = (args[len(_TENSORS)] is None, n.denoised, n.keeps, args[_TENSORS.index("last")] is not None)
    for dim in range(sample_dims):
        score = dim if args[-2] else None
        yield [dim] * len(_TRANSITION_TENSORS), [*_places(dim, max(sample_dims - 1, 0), made, n.copies), dim, score]


def _sharded_backward(*args):
    step, guidance, key, state = args[_BACKWARD_TENSORS + 1 :][:4]
    if not _shardable(step, guidance, key, state):
        return
    denoised, keeps, corrects, copies, wanted, sample_dims = args[-6:]
    at = max(sample_dims - 1, 0)
    sums = args[_BACKWARD_TENSORS - 1] is not None
    for dim in range(sample_dims if sums else len(args[0].shape)):
        given = _places(dim, at, (True, denoised, keeps, corrects), copies) + [dim] * (_BACKWARD_TENSORS - 5)
        yield given, [dim if wanted >> k & 1 else None for k in range(len(_TENSORS))]


def _operations(x, *rest, out_shape=None, **kwargs):
    return 20 * math.prod(x)


_LAUNCH = "pyperf_dl._launch.sampler"

adjustments = Operator(
    "sampler_adjustments",
    tensors=3,
    constants=3,
    fake=_fake_adjustments,
    reference=linear.sampler_adjustments,
)
noise = Operator(
    "sampler_noise",
    tensors=1,
    constants=2,
    fake=_fake_noise,
    reference=linear.sampler_noise,
    launch=f"{_LAUNCH}:sampler_noise",
    jvp=lambda ctx, *tangents: None,  # nothing depends on the values of `like`
    batch=_batched,
)
_backward = Operator(
    "sampler_step_backward",
    tensors=_BACKWARD_TENSORS,
    constants=5,
    fake=_fake_backward,
    reference=linear.sampler_step_backward,
    launch=f"{_LAUNCH}:sampler_step_backward",
    save=lambda ctx, inputs, output: inputs[:_BACKWARD_TENSORS],
    backward=_pull_backward,
    jvp=_pushed_backward,
    batch=_batched_step(-3),
    shard=_sharded_backward,
    flops=_operations,
)
transition = Operator(
    "sampler_transition",
    tensors=len(_TRANSITION_TENSORS),
    constants=6,
    fake=_fake_transition,
    reference=linear.sampler_transition,
    launch=f"{_LAUNCH}:sampler_transition",
    save=_save_transition,
    backward=_transition_gradients,
    jvp=_refuse_push,
    batch=_batched_step(-3),
    shard=_sharded_transition,
    flops=_operations,
)
step = Operator(
    "sampler_step",
    tensors=len(_TENSORS),
    constants=6,
    fake=_fake_step,
    reference=linear.sampler_step,
    launch=f"{_LAUNCH}:sampler_step",
    save=_save_step,
    backward=_gradients,
    jvp=_pushed_step,
    batch=_batched_step(-2),
    shard=_sharded,
    flops=_operations,
)
