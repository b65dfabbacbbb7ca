"""The operators of a sampler's step against what they are in plain PyTorch and float64: values, derivatives,
transforms, compilation, and the noise of keys."""

import itertools
import math
import os
import subprocess
import sys

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad, jacfwd, jacrev, jvp, vmap
from torch.library import opcheck

from pyperf_dl import _backend
from pyperf_dl import _sampler_operators as operators
from pyperf_dl.reference import _sampler_linear as linear

ops = torch.ops.pyperf_dl
INF = math.inf
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
TENSORS = 9
compiled = pytest.mark.skipif(_backend._C is None, reason="the compiled library is not there")


def arguments(
    shape=(2, 3, 4),
    dtype=torch.float64,
    output_dtype=None,
    seed=0,
    uncond=True,
    variance=False,
    history=3,
    last=True,
    noise="given",
    per_sample=True,
    adjust=False,
    clip=(-INF, INF),
    row=2,
    denoised=True,
    keeps=True,
    copies=2,
    channels_last=False,
):
    """Of sampler_step: random tensors and a table of random numbers, so that no coefficient hides behind a 0."""
    g = torch.Generator().manual_seed(seed)
    output_dtype = output_dtype or dtype
    samples = shape[0]

    def tensor(wanted, dtype):
        if not wanted:
            return None
        t = torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)
        return t.contiguous(memory_format=torch.channels_last) if channels_last else t

    def numbers(made):
        return made if per_sample else made[:1]

    x, output = tensor(True, dtype), tensor(True, output_dtype)
    unconditional, learned = tensor(uncond, output_dtype), tensor(variance, output_dtype)
    h = [tensor(k < history, dtype) for k in range(3)]
    table = torch.randn(5, 19, generator=g, dtype=torch.float64)
    step = numbers(torch.randint(0, 5, (samples,), generator=g)) if per_sample else None
    guidance = numbers(torch.rand(samples, generator=g, dtype=torch.float64) * 5) if per_sample else None
    key = numbers(torch.randint(-(2**62), 2**62, (samples,), generator=g)) if noise == "key" else None
    bounds = torch.where(torch.rand(samples, generator=g) < 0.5, 1.5, INF).double()
    factors = torch.rand(samples, generator=g, dtype=torch.float64) + 0.5
    return (
        x, output, unconditional, learned, *h, tensor(last, dtype), tensor(noise == "given", dtype),
        table, step, guidance, key, None, torch.stack([factors, bounds], 1) if adjust else None,
        row, 2.5, *clip, 0, denoised, keeps, copies, 1,
    )  # fmt: skip


def assert_near(got, want, ulps, size=1.0):
    """Outputs of a call: within so many ulps of the largest term, which has `size` or what there is."""
    for g, w in zip(got, want, strict=True):
        assert (g.shape, g.dtype) == (w.shape, w.dtype)
        if g.numel():
            bound = ulps * torch.finfo(g.dtype).eps * (w.double().abs() + size)
            off = torch.where(g == w, 0.0, (g.double() - w.double()).abs() / bound)  # infinite in float16 is the same
            assert off.max().item() <= 1, off.max()


# The arithmetic of 16 bits is float32, that of float32 float64: both round once. float64 rounds at each of 15 terms.
ULPS = {torch.float16: 1, torch.bfloat16: 1, torch.float32: 0.51, torch.float64: 16}


def feature_sets():
    flags = {
        "uncond": [False, True],
        "variance": [False, True],
        "history": [0, 1, 3],
        "last": [False, True],
        "noise": ["none", "given", "key"],
        "per_sample": [False, True],
        "adjust": [False, True],
        "clip": [(-INF, INF), (-1.0, 1.0), (-0.5, INF)],
        "denoised": [False, True],
        "keeps": [False, True],
        "copies": [0, 1, 2],
    }
    return st.fixed_dictionaries({name: st.sampled_from(values) for name, values in flags.items()})


CLIP_AND_VARIANCE = list(itertools.product([(-INF, INF), (-1.0, 1.0)], [False, True]))
SHAPES = [(2, 3, 5, 7), (1, 4, 16, 16), (4, 129), (3, 1), (2, 4100), (0, 3), (1, 0), (5,)]


def allowed(dtype, flags):
    """In ulps. Noise of keys is made in float32, which is then what bounds a result: a normal is off by up to 7e-7 (in
    40 million), and deviations here are up to 4."""
    if flags["noise"] != "key":
        return ULPS[dtype]
    return 2**31 if dtype == torch.float64 else 4 * ULPS[dtype]


@given(st.sampled_from(SHAPES), st.sampled_from(DTYPES), feature_sets(), st.integers(0, 2**20))
def test_forward_agrees_with_reference(shape, dtype, flags, seed):
    args = arguments(shape, dtype, seed=seed, **flags)
    size = 16 if flags["variance"] else 8
    assert_near(ops.sampler_step(*args), linear.sampler_step(*args), allowed(dtype, flags), size)


@pytest.mark.parametrize("output_dtype", [torch.float16, torch.bfloat16])
def test_float32_sample_with_16_bit_model(output_dtype):
    args = arguments((3, 700), torch.float32, output_dtype, noise="key", clip=(-1.0, 1.0))
    got = ops.sampler_step(*args)
    assert [t.dtype for t in got] == [torch.float32] * 4 + [output_dtype]
    assert_near(got, linear.sampler_step(*args), 2, 8)


def backward_arguments(args, wanted=None, seed=7):
    """Of sampler_step_backward, with random gradients of what a forward made."""
    g = torch.Generator().manual_seed(seed)
    made = ops.sampler_step(*args)
    grads = [torch.randn(t.shape, generator=g, dtype=torch.float64).to(t.dtype) for t in made]
    tensors, (table, step, guidance, key, state, _, *statics) = args[:TENSORS], args[TENSORS:]
    x, output, unconditional, variance, *_, last, noise = tensors
    learned = variance is not None and (noise is not None or key is not None)
    if wanted is None:
        wanted = sum(1 << k for k, t in enumerate(tensors) if t is not None and (k != 3 or learned))
    row, scale, low, high, offset, denoised, keeps, copies, sample_dims = statics
    return (
        *grads, x, output, unconditional, *((variance, noise) if learned else (None, None)), None, None,
        table, step, guidance, key if learned else None, state, row, scale, low, high, offset,
        unconditional is not None, True, denoised, keeps, last is not None, copies, wanted, sample_dims,
    )  # fmt: skip


@given(st.sampled_from(SHAPES), st.sampled_from(DTYPES), feature_sets(), st.integers(0, 2**20))
def test_gradients_agree_with_reference(shape, dtype, flags, seed):
    flags = flags | {"adjust": False}
    args = backward_arguments(arguments(shape, dtype, seed=seed, **flags))
    size = 64 if flags["variance"] else 16
    assert_near(ops.sampler_step_backward(*args), linear.sampler_step_backward(*args), allowed(dtype, flags), size)


def test_reference_gradients_are_those_of_autograd():
    for clip, variance in itertools.product([(-INF, INF), (-1.0, 1.0)], [False, True]):
        args = arguments(clip=clip, variance=variance)
        tensors = [t.requires_grad_() for t in args[:TENSORS] if t is not None]
        made = linear.sampler_step(*args)
        back = backward_arguments(args)
        want = torch.autograd.grad(made, tensors, back[:5], allow_unused=True)
        got = [
            t
            for t in linear.sampler_step_backward(*(b.detach() if torch.is_tensor(b) else b for b in back))
            if t.numel()
        ]
        torch.testing.assert_close(got, list(want))


# ---- log-probability ----


def transition_arguments(*args, target=False, score=True, **flags):
    """Of sampler_transition: every row of the table adds noise."""
    flags = flags | ({"noise": "none", "copies": 0} if target else {})
    args = list(arguments(*args, **flags))
    args[TENSORS][:, 8] = args[TENSORS][:, 8].abs() + 0.3
    x = args[0]
    wanted = torch.randn(x.shape, generator=torch.Generator().manual_seed(77)).to(x.dtype) if target else None
    return (*args[:TENSORS], wanted, *args[TENSORS:-1], score, args[-1])


def test_log_probability_is_that_of_the_normal_distribution():
    args = transition_arguments((3, 4, 5), variance=True, clip=(-1.0, 1.0))
    got = linear.sampler_transition(*args)
    mean = linear.sampler_step(*args[: TENSORS - 1], None, *args[TENSORS + 1 : -2], 1)[0]
    deviation = linear.deviation(args[0], args[3], *args[TENSORS + 1 : TENSORS + 3], args[TENSORS + 7])
    normal = torch.distributions.Normal(mean.requires_grad_(), deviation)
    want = normal.log_prob(got[0]).flatten(1).sum(1)
    torch.testing.assert_close(got[5], want)
    torch.testing.assert_close(got[6], torch.autograd.grad(want.sum(), mean)[0])


@given(
    st.sampled_from(SHAPES), st.sampled_from(DTYPES), feature_sets(), st.booleans(),
    st.integers(0, 2**20),
)  # fmt: skip
def test_transitions_agree_with_reference(shape, dtype, flags, target, seed):
    """With the sample that was made as the target of the reference, for a rounding more or less is a score's."""
    flags = flags | ({} if flags["noise"] != "none" else {"noise": "given"})
    args = transition_arguments(shape, dtype, seed=seed, target=target, **flags)
    got = ops.sampler_transition(*args)
    size = 16 if flags["variance"] else 8
    assert_near(got[:5], linear.sampler_transition(*args)[:5], allowed(dtype, flags), size)
    if not target:
        assert_near(got[:5], ops.sampler_step(*args[:TENSORS], *args[TENSORS + 1 : -2], args[-1]), 0.001, size)
        args = list(args)
        args[TENSORS], args[8], args[TENSORS + 4], args[-3] = got[0], None, None, 0
    want = linear.sampler_transition(*args)
    if not args[0].numel():
        assert got[5].shape == want[5].shape == shape[:1]
        assert not got[5].any() and not want[5].any()  # noqa: PT018 - a sum over nothing
        return
    spread = linear.deviation(args[0], args[3], *args[TENSORS + 1 : TENSORS + 3], args[TENSORS + 7])
    deviation = float(spread.min())
    eps = torch.finfo(torch.float32 if dtype.itemsize == 2 else torch.float64).eps
    terms = 64 * eps * size  # of the mean
    of_z = terms / deviation
    z = float((want[6].double() * spread).abs().max())
    single = 0 if dtype == torch.float64 else 2**-24
    torch.testing.assert_close(
        got[6].double(), want[6].double(), rtol=64 * eps + 2 * single, atol=float(of_z / deviation)
    )
    elements = math.prod(shape[1:])
    bound = elements * (of_z * (z + of_z) + 64 * eps * (z * z + 10)) + 4 * single * want[5].abs().max()
    torch.testing.assert_close(got[5], want[5], rtol=0, atol=float(bound))


def transition_backward_arguments(args, seed=7):
    """Of sampler_step_backward: of all outputs, with the bits of all inputs."""
    g = torch.Generator().manual_seed(seed)
    made = ops.sampler_transition(*args)
    target = args[TENSORS]
    grads = [torch.randn(t.shape, generator=g, dtype=torch.float64).to(t.dtype) for t in made]
    first = args[0] if target is not None else grads[0]
    x, output, unconditional, variance, *_, last, noise = args[:TENSORS]
    table, step, guidance, key, state, _, row, scale, low, high, offset, denoised, keeps, copies, _, dims = args[
        TENSORS + 1 :
    ]
    wanted = sum(1 << k for k, t in enumerate(args[:TENSORS]) if t is not None)
    return (
        first, *grads[1:5], x, output, unconditional, variance, noise, grads[5], made[6],
        table, step, guidance, key if variance is not None else None, state, row, scale, low, high, offset,
        unconditional is not None, target is None, denoised, keeps, last is not None, copies, wanted, dims,
    )  # fmt: skip


@given(st.sampled_from(SHAPES), st.sampled_from(DTYPES), feature_sets(), st.booleans(), st.integers(0, 2**20))
def test_gradients_of_transitions_agree_with_reference(shape, dtype, flags, target, seed):
    flags = flags | {"adjust": False} | ({} if flags["noise"] != "none" else {"noise": "given"})
    args = transition_backward_arguments(transition_arguments(shape, dtype, seed=seed, target=target, **flags))
    score = args[11].double().abs().max() if args[11].numel() else 1.0
    size = (64 if flags["variance"] else 16) * float(1 + score * (1 + score))
    got, want = ops.sampler_step_backward(*args), linear.sampler_step_backward(*args)
    assert_near(got, want, allowed(dtype, flags), size)


def test_gradients_of_a_transition_without_dimensions():
    batch = transition_arguments((1,), per_sample=False)
    args = (*(None if t is None else t[0] for t in batch[:TENSORS]), *batch[TENSORS:-1], 0)
    args = transition_backward_arguments(args)
    got, want = ops.sampler_step_backward(*args), linear.sampler_step_backward(*args)
    torch.testing.assert_close(got, want)


def differentiable_transition(**flags):
    args = transition_arguments(**flags)
    there = [k for k in range(TENSORS) if args[k] is not None]

    def of(function):
        def transition(*tensors):
            full = [None] * TENSORS
            for k, t in zip(there, tensors, strict=True):
                full[k] = t
            return function(*full, *args[TENSORS:])[:6]

        return transition

    return of, [args[k].detach().requires_grad_() for k in there]


@pytest.mark.parametrize("target", [False, True])
@pytest.mark.parametrize(("clip", "variance"), CLIP_AND_VARIANCE)
def test_derivatives_of_transitions(clip, target, variance):
    """Of the first and the second order, against those of the reference by autograd."""
    of, inputs = differentiable_transition(clip=clip, target=target, variance=variance)
    results = []
    for function in (operators.transition, linear.sampler_transition):
        made = [t for t in of(function)(*inputs) if t.numel()]
        first = torch.autograd.grad(sum(t.sin().sum() for t in made), inputs, create_graph=True, allow_unused=True)
        first = [torch.zeros_like(t) if g is None else g for g, t in zip(first, inputs, strict=True)]
        second = torch.autograd.grad(sum(g.cos().sum() for g in first), inputs, allow_unused=True)
        second = [torch.zeros_like(t) if g is None else g for g, t in zip(second, inputs, strict=True)]
        results.append([*made, *first, *second])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


def test_only_what_is_asked_for_is_pulled_back():
    """The loss of a policy has the log-probability alone; the step's other outputs count nothing."""
    of, inputs = differentiable_transition(target=True)
    for function in (operators.transition, linear.sampler_transition):
        of(function)(*inputs)[5].sum().backward()
    want = torch.autograd.grad(of(linear.sampler_transition)(*inputs)[5].sum(), inputs, allow_unused=True)
    for t, w in zip(inputs, want, strict=True):
        torch.testing.assert_close(t.grad, 2 * w)


@pytest.mark.parametrize("target", [False, True])
@pytest.mark.parametrize("variance", [False, True])
def test_every_output_of_a_transition_may_be_pulled_back_alone(target, variance):
    """As a learned variance matters to few of them."""
    of, inputs = differentiable_transition(target=target, variance=variance)

    def of_score(made):
        first = torch.autograd.grad(made[5].sum(), inputs[:2], create_graph=True)
        return sum(g.sin().sum() for g in first)

    def derivatives(function):
        made = of(function)(*inputs)
        every = [*(t.sin().sum() for t in made if t.numel()), of_score(made)]
        for one in every:
            found = torch.autograd.grad(one, inputs, retain_graph=True, allow_unused=True)
            for g, t in zip(found, inputs, strict=True):
                yield torch.zeros_like(t) if g is None else g

    for got, want in zip(derivatives(operators.transition), derivatives(linear.sampler_transition), strict=True):
        torch.testing.assert_close(got, want)


def test_forward_derivatives_of_transitions_are_refused():
    args = transition_arguments()
    with pytest.raises(RuntimeError, match="no forward derivative"):
        jvp(lambda x: operators.transition(x, *args[1:])[0], (args[0],), (args[0],))


def test_transitions_of_a_batch_of_batches():
    args = transition_arguments((2, 3, 4), per_sample=False, target=True, variance=True)
    many = torch.randn(3, 2, 3, 4, dtype=torch.float64)
    got = vmap(lambda x: operators.transition(x, *args[1:]))(many)
    for k in range(3):
        for g, w in zip(got, operators.transition(many[k], *args[1:]), strict=True):
            assert torch.equal(g[k] if g.numel() else g, w)


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "flags", [{}, {"noise": "key", "variance": True}, {"target": True, "clip": (-1.0, 1.0)}, {"channels_last": True}]
)
def test_opcheck_of_transitions(dtype, flags):
    args = transition_arguments((2, 3, 4, 5), dtype, **flags)
    opcheck(ops.sampler_transition.default, args)
    opcheck(ops.sampler_step_backward.default, transition_backward_arguments(args))
    opcheck(
        ops.sampler_transition.default,
        tuple(t.requires_grad_() if torch.is_tensor(t) and k < TENSORS else t for k, t in enumerate(args)),
    )


@compiled
def test_wrong_calls_of_the_raw_transition_raise():
    args = transition_arguments((2, 8), torch.float32)
    ops.sampler_transition(*args)
    x = args[0]
    cases = {
        "one of noise, key and target": {TENSORS: x},
        "no state": {TENSORS + 5: torch.tensor([1, 2]), 8: None},
        "not of a target": {TENSORS: x, 8: None},
        "target must have": {TENSORS: x[:1], 8: None, TENSORS + 14: 0},
        "sample_dims": {TENSORS + 16: 3},
    }
    for text, changes in cases.items():
        wrong = list(args)
        for k, value in changes.items():
            wrong[k] = value
        with pytest.raises(RuntimeError, match=text):
            ops.sampler_transition(*wrong)


# ---- whole samples ----


def adjustment_arguments(args, rescale, quantile, largest):
    return (*args[:3], *args[TENSORS : TENSORS + 3], *args[TENSORS + 6 : TENSORS + 8], rescale, quantile, largest, 1)


@given(
    st.sampled_from([(2, 3, 5, 7), (3, 2), (2, 4100), (5, 40), (0, 3)]),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.booleans(),
    st.sampled_from([0.0, 0.7, 1.0]),
    st.sampled_from([0.0, 0.5, 0.995, 1.0]),
    st.sampled_from([1.5, INF]),
    st.integers(0, 2**20),
)
def test_adjustments_agree_with_reference(shape, dtype, uncond, per_sample, rescale, quantile, largest, seed):
    args = arguments(shape, dtype, seed=seed, uncond=uncond, per_sample=per_sample)
    args = adjustment_arguments(args, rescale, quantile, largest)
    got, want = ops.sampler_adjustments(*args), linear.sampler_adjustments(*args)
    arithmetic = torch.float32 if dtype.itemsize == 2 else torch.float64
    rtol = 16 * torch.finfo(arithmetic).eps
    if uncond and rescale and args[0].numel():  # of elements that are nearly equal, a deviation is what rounding left
        output, unconditional = (t.double().flatten(1) for t in args[1:3])
        guidance = args[5][:, None] if per_sample else args[7]
        guided = unconditional + guidance * (output - unconditional)
        rtol *= max(float((t.abs().amax(1) / t.std(1)).max()) for t in (output, guided))
    torch.testing.assert_close(got, want, rtol=rtol, atol=0)


def test_adjustments_of_samples_of_one_element_or_none():
    table = torch.zeros(1, 19).double()
    table[0, 0] = 1
    for x in (torch.tensor([-3.0, 2.0, 0.5]).double(), torch.zeros(3, 0).double()):
        made = [
            f(x, x, x, table, None, None, 0, 2.0, 0.5, 0.9, INF, 1)
            for f in (linear.sampler_adjustments, ops.sampler_adjustments)
        ]
        assert made[0].shape == made[1].shape == (3, 2)
        assert made[0][:, 0].isnan().all()  # one element has no deviation
    x = torch.tensor([-3.0, 2.0, 0.5]).double()
    for f in (linear.sampler_adjustments, ops.sampler_adjustments):
        assert f(x, x, None, table, None, None, 0, 1.0, 0.0, 0.9, INF, 1)[:, 1].tolist() == [3.0, 2.0, 1.0]


def test_a_nan_makes_the_bound_of_its_sample_nan():
    args = list(adjustment_arguments(arguments((3, 50), torch.float32), 0.0, 0.9, INF))
    args[0] = args[0].clone()
    args[0][1, 7] = math.nan
    for function in (ops.sampler_adjustments, linear.sampler_adjustments):
        assert function(*args)[:, 1].isnan().tolist() == [False, True, False]


# ---- memory ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_channels_last_goes_in_and_out(dtype):
    args = arguments((2, 3, 5, 7), dtype, channels_last=True)
    got = ops.sampler_step(*args)
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in got[:4])
    plain = [t.contiguous() if torch.is_tensor(t) else t for t in args]
    for g, w in zip(got, ops.sampler_step(*plain), strict=True):
        assert torch.equal(g, w)


def test_operands_may_lie_anywhere():
    args = arguments((3, 4, 6), torch.float32, clip=(-1.0, 1.0), variance=True)
    want = ops.sampler_step(*args)
    for move in (
        lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        lambda t: torch.stack([t, t], -1)[..., 0],
        lambda t: torch.cat([t, t], 1)[:, 4:],
        lambda t: t.flip(0).contiguous().flip(0),
    ):
        moved = [move(t) if t is not None else None for t in args[:TENSORS]]
        for g, w in zip(ops.sampler_step(*moved, *args[TENSORS:]), want, strict=True):
            assert torch.equal(g, w)
        mixed = [m if k % 2 else t for k, (m, t) in enumerate(zip(moved, args[:TENSORS], strict=True))]
        for g, w in zip(ops.sampler_step(*mixed, *args[TENSORS:]), want, strict=True):
            assert torch.equal(g, w)


def test_expanded_samples():
    args = list(arguments((1, 40), torch.float32, noise="none", per_sample=False))
    args[:TENSORS] = [None if t is None else t.expand(3, 40) for t in args[:TENSORS]]
    want = ops.sampler_step(*(t.contiguous() if torch.is_tensor(t) else t for t in args))
    for g, w in zip(ops.sampler_step(*args), want, strict=True):
        assert torch.equal(g, w)


def test_rows_out_of_the_table_give_nan_for_their_sample():
    args = list(arguments((3, 20), torch.float32))
    args[TENSORS + 1] = torch.tensor([0, 5, -1])
    sample = ops.sampler_step(*args)[0]
    assert sample[0].isfinite().all()
    assert sample[1:].isnan().all()


def test_a_nan_stays_in_its_element():
    for clip in [(-INF, INF), (-1.0, 1.0)]:
        args = arguments((2, 70), torch.float32, clip=clip)
        for k in [0, 1]:
            changed = list(args)
            changed[k] = args[k].clone()
            changed[k][1, 33] = math.nan
            got, want = ops.sampler_step(*changed)[0], ops.sampler_step(*args)[0].clone()
            assert got[1, 33].isnan()
            got[1, 33] = want[1, 33]
            assert torch.equal(got, want)


# ---- levels and threads ----


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_give_the_same_bits(dtype):
    args = arguments((3, 70_000), dtype, noise="key", variance=True, clip=(-1.0, 1.0))
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append([*ops.sampler_step(*args), *ops.sampler_step_backward(*backward_arguments(args))])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


LEVEL_PROGRAM = """
import hashlib, torch, sys
sys.path.insert(0, sys.argv[1])
import test_sampler_operators as t
digest = hashlib.sha256()
for dtype in t.DTYPES:
    for flags in ({"noise": "key", "variance": True, "clip": (-1.0, 1.0)}, {"adjust": True}, {"history": 0}):
        args = t.arguments((3, 1003), dtype, **flags)
        back = () if "adjust" in flags else t.ops.sampler_step_backward(*t.backward_arguments(args))
        noisy = t.transition_arguments((3, 1003), dtype, **flags)
        for made in (*t.ops.sampler_step(*args), *t.ops.sampler_transition(*noisy), *back):
            digest.update(made.contiguous().view(torch.uint8).numpy().tobytes())
print(digest.hexdigest())
"""


@compiled
def test_simd_levels_give_the_same_bits():
    digests = set()
    for level in ("baseline", "x86-64-v3", "x86-64-v4"):
        done = subprocess.run(
            [sys.executable, "-c", LEVEL_PROGRAM, os.path.dirname(__file__)],
            env={**os.environ, "PYPERF_SIMD": level}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode and level in done.stderr:  # this processor does not have it
            continue
        assert done.returncode == 0, done.stderr[-2000:]
        digests.add(done.stdout)
    assert len(digests) == 1


# ---- derivatives ----


def differentiable(**flags):
    """(function of the tensors that are there, these tensors)"""
    args = arguments(**flags)
    there = [k for k in range(TENSORS) if args[k] is not None]

    def step(*tensors):
        full = [None] * TENSORS
        for k, t in zip(there, tensors, strict=True):
            full[k] = t
        return operators.step(*full, *args[TENSORS:])

    return step, [args[k].requires_grad_() for k in there]


@pytest.mark.parametrize(("clip", "variance"), CLIP_AND_VARIANCE)
def test_gradcheck(clip, variance):
    step, inputs = differentiable(clip=clip, variance=variance)
    assert torch.autograd.gradcheck(step, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(step, inputs)


@pytest.mark.parametrize(("clip", "variance"), CLIP_AND_VARIANCE)
def test_transforms(clip, variance):
    step, inputs = differentiable(clip=clip, variance=variance)
    inputs = [t.detach() for t in inputs]
    args = arguments(clip=clip, variance=variance)
    there = [k for k in range(TENSORS) if args[k] is not None]

    def reference(*tensors):
        full = [None] * TENSORS
        for k, t in zip(there, tensors, strict=True):
            full[k] = t
        return linear.sampler_step(*full, *args[TENSORS:])

    def loss(function):
        return lambda *tensors: sum(t.sin().sum() for t in function(*tensors))

    every = tuple(range(len(inputs)))
    torch.testing.assert_close(grad(loss(step), every)(*inputs), grad(loss(reference), every)(*inputs))
    tangents = tuple(torch.randn_like(t) for t in inputs)
    torch.testing.assert_close(jvp(step, tuple(inputs), tangents), jvp(reference, tuple(inputs), tangents))
    of_x = [lambda x, f=f: f(x, *inputs[1:])[0] for f in (step, reference)]
    torch.testing.assert_close(jacfwd(of_x[0])(inputs[0]), jacrev(of_x[1])(inputs[0]))
    torch.testing.assert_close(jacrev(of_x[0])(inputs[0]), jacfwd(of_x[1])(inputs[0]))
    second = [jacfwd(grad(lambda x, f=f: loss(f)(x, *inputs[1:]))) for f in (step, reference)]
    torch.testing.assert_close(second[0](inputs[0]), second[1](inputs[0]))
    many = torch.randn(3, *inputs[0].shape, dtype=torch.float64)
    for function in (lambda x: step(x, *inputs[1:]), grad(lambda x: loss(step)(x, *inputs[1:]))):
        batched, each = vmap(function)(many), [function(x) for x in many]
        batched, each = (batched, zip(*each, strict=True)) if isinstance(batched, tuple) else ((batched,), [each])
        for b, e in zip(batched, each, strict=True):
            torch.testing.assert_close(b, torch.stack(list(e)))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(inputs[0], tangents[0])
        made = [forward_ad.unpack_dual(t).tangent for t in step(dual, *inputs[1:])]
    want = jvp(lambda x: reference(x, *inputs[1:]), (inputs[0],), (tangents[0],))[1]
    torch.testing.assert_close(made[:4], list(want[:4]))


def test_nothing_is_saved_without_a_clip():
    for clip, kept in (((-INF, INF), 0), ((-1.0, 1.0), 3)):
        step, inputs = differentiable(clip=clip)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            step(*inputs)
        assert len(saved) == kept


def test_noise_has_a_tangent_of_zero():
    like, key = torch.randn(2, 3), torch.tensor([3])
    tangent = jvp(lambda x: operators.noise(x, key, None, 0, 0, 1) + 2 * x, (like,), (torch.ones(2, 3),))[1]
    assert torch.equal(tangent, torch.full((2, 3), 2.0))


def test_derivatives_with_adjust_are_refused():
    args = arguments(adjust=True)
    x = args[0].clone().requires_grad_()
    with pytest.raises(RuntimeError, match="no derivative is there with adjust"):
        operators.step(x, *args[1:])[0].sum().backward()
    with pytest.raises(RuntimeError, match="no derivative is there with adjust"):
        jvp(lambda x: operators.step(x, *args[1:])[0], (args[0],), (args[0],))


def test_vmap_over_numbers_is_refused():
    args = arguments(per_sample=False)
    with pytest.raises(ValueError, match="only over samples"):
        vmap(lambda table: operators.step(*args[:TENSORS], table, *args[TENSORS + 1 :])[0])(
            torch.randn(2, 5, 19).double()
        )


def test_vmap_without_samples_is_refused_where_inputs_are_made():
    args = arguments((2, 5), per_sample=False)
    for copies in (0, 2):
        statics = (*args[TENSORS:-2], copies, 0)
        call = vmap(lambda x, statics=statics: operators.step(x, x, *[None] * 7, *statics)[0])
        if copies:
            with pytest.raises(ValueError, match="vmap needs a dimension of samples"):
                call(args[0])
        else:
            assert torch.equal(call(args[0]), operators.step(args[0], args[0], *[None] * 7, *args[TENSORS:])[0])


# ---- registrations ----


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("flags", [{}, {"noise": "key", "clip": (-1.0, 1.0)}, {"channels_last": True}, {"copies": 0}])
def test_opcheck(dtype, flags):
    args = arguments((2, 3, 4, 5), dtype, **flags)
    opcheck(ops.sampler_step.default, args)
    with_gradients = [t.requires_grad_() if torch.is_tensor(t) and k < TENSORS else t for k, t in enumerate(args)]
    opcheck(ops.sampler_step.default, tuple(with_gradients))
    args = [t.detach() if torch.is_tensor(t) else t for t in args]
    opcheck(ops.sampler_step_backward.default, backward_arguments(args))
    opcheck(ops.sampler_adjustments.default, adjustment_arguments(args, 0.5, 0.9, 2.0))
    opcheck(ops.sampler_noise.default, (args[0], torch.tensor([3]), None, -1, 0, 1))


def test_compiled_is_the_same():
    torch._dynamo.reset()
    step = torch.compile(operators.step, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in [(2, 12), (3, 20), (4, 36)]:
        args = arguments(shape, torch.float32, clip=(-1.0, 1.0))
        inputs = [t.requires_grad_() for t in args[:TENSORS] if t is not None]
        results = []
        for function in (step, operators.step):
            made = function(*args)
            results.append([*made, *torch.autograd.grad(sum(t.sum() for t in made), inputs)])
        assert all(map(torch.equal, *results))


@compiled
def test_wrong_calls_of_the_raw_operator_raise():
    args = arguments((2, 8), torch.float32)
    cases = {
        "table": {TENSORS: torch.zeros(5, 18).double()},
        "float64": {TENSORS: torch.zeros(5, 19)},
        "step": {TENSORS + 1: torch.tensor([0, 1, 2])},
        "guidance": {TENSORS + 2: torch.ones(2)},
        "exclude": {TENSORS + 3: torch.tensor([1])},
        "state": {TENSORS + 4: torch.tensor([1, 2]), 8: None},
        "adjust": {TENSORS + 5: torch.ones(3).double()},
        "copies": {TENSORS + 13: -1},
        "sample_dims": {TENSORS + 14: 3},
        "output": {1: torch.zeros(2, 7)},
        "dtype": {1: torch.zeros(2, 8, dtype=torch.float64)},
        "h1": {4: torch.zeros(2, 8, dtype=torch.float16)},
    }
    for text, changes in cases.items():
        wrong = list(args)
        for k, value in changes.items():
            wrong[k] = value
        with pytest.raises(RuntimeError, match=text):
            ops.sampler_step(*wrong)


@compiled
def test_wrong_calls_of_the_raw_backward_raise():
    args = backward_arguments(arguments((2, 8), torch.float32, clip=(-1.0, 1.0), variance=True))
    ops.sampler_step_backward(*args)
    cases = {
        "grad_denoised": (1, args[1][:1]),
        "grad_model_input": (4, args[4][:1]),
        "float16, bfloat16": (4, args[4].int()),
        "a clip needs": (5, None),
        "learned variance needs": (8, None),
        "exclude": (15, torch.tensor([1])),
        "one a sample": (10, torch.zeros(2)),
    }
    for text, (k, value) in cases.items():
        wrong = [*args[:k], value, *args[k + 1 :]]
        with pytest.raises(RuntimeError, match=text):
            ops.sampler_step_backward(*wrong)


# ---- noise of keys ----


@given(st.integers(-(2**63), 2**63 - 1), st.integers(-(2**63), 2**63 - 1), st.sampled_from([1, 31, 128, 129, 1000]))
def test_noise_agrees_with_reference(key, draw, size):
    like = torch.empty(2, size)
    keys = torch.tensor([key, 5])
    got, want = operators.noise(like, keys, None, draw, 0, 1), linear.sampler_noise(like, keys, None, draw, 0, 1)
    torch.testing.assert_close(got, want, rtol=0, atol=2e-6)


@compiled
def test_noise_does_not_depend_on_the_batch():
    keys = torch.tensor([3, 2**40, -1])
    whole = operators.noise(torch.empty(3, 4, 999), keys, None, 6, 0, 1)
    for k in range(3):
        assert torch.equal(whole[k : k + 1], operators.noise(torch.empty(1, 4, 999), keys[k : k + 1], None, 6, 0, 1))
    assert whole.flatten(1).corrcoef().fill_diagonal_(0).abs().max() < 0.05
    other = operators.noise(torch.empty(3, 4, 999), keys, None, 7, 0, 1)
    assert abs((whole * other).mean()) < 0.05


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_step_adds_the_noise_of_its_row(dtype):
    """The same bits, from a key as from a tensor of what it makes; in 16 bits the tensor would be rounded."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    args = list(arguments((3, 500), wide, noise="key"))
    made = ops.sampler_step(*args)
    rows, keys = args[TENSORS + 1], args[TENSORS + 3]
    args[8] = torch.stack(
        [ops.sampler_noise(args[0][:1], keys[k : k + 1], None, int(rows[k]), 0, 1)[0] for k in range(3)]
    )
    args[TENSORS + 3] = None
    for g, w in zip(made, ops.sampler_step(*args), strict=True):
        assert torch.equal(g, w)
