"""The public functions of samplers: steps, noise and its sources, log-probabilities, the loop, and what they refuse."""

import itertools
import math
import os
import subprocess
import sys

import pytest
import torch
import torch.autograd.forward_ad as forward_ad

import pyperf_dl
from pyperf_dl import BrownianNoise, NoiseSchedule, Sampler, StepTable, _backend, per_sample_noise, sampler_step
from pyperf_dl.reference import _sampler_linear as linear

VP = NoiseSchedule.from_betas(10, spacing="trailing")
SIGMA = NoiseSchedule.from_betas(10, space="sigma", sigmas="karras")
FLOW = NoiseSchedule.flow(10)
TABLES = {
    "ddim": StepTable.ddim(VP),
    "ddpm": StepTable.ddpm(VP),
    "learned variance": StepTable.ddpm(VP, variance="learned_range"),
    "euler ancestral": StepTable.euler_ancestral(SIGMA),
    "heun": StepTable.heun(SIGMA),
    "2M SDE": StepTable.dpm_solver_pp(VP, eta=1.0),
    "2M": StepTable.dpm_solver_pp(VP),
    "3M": StepTable.dpm_solver_pp(VP, order=3),
    "unipc": StepTable.unipc(VP),
    "lms": StepTable.lms(SIGMA),
    "flow": StepTable.flow_euler(FLOW),
}
SHAPE = (3, 4, 5, 6)
BACKENDS = ["reference", *["native"] * (_backend._C is not None)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def normal(seed=0, shape=SHAPE, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def model_of(table, shape=SHAPE, dtype=torch.float32):
    """Random outputs, a fixed one for each row."""
    channels = shape[1] * (2 if table.learned_variance else 1)
    return [normal(100 + i, (shape[0], channels, *shape[2:]), dtype).tanh() for i in range(len(table))]


def walked(table, x, outputs, **how):
    """The loop, by hand: the samples, and the last step."""
    history, samples = (), []
    for row, output in enumerate(outputs):
        step = sampler_step(x, output, table, row, history=history, **how)
        x, history = step.sample, step.history
        samples.append(x)
    return samples, step


# ---- whole loops ----


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_loops_agree_with_float64(name, dtype):
    """Each step from what the operator itself made before, so that only one rounding is between."""
    table = TABLES[name]
    x, history = normal(dtype=dtype), ()
    for row, output in enumerate(model_of(table, dtype=dtype)):
        noise = normal(row, dtype=dtype)
        how = {"noise": noise, "clip": 2.0, "denoised": True}
        got = sampler_step(x, output, table, row, history=history, **how)
        wide = tuple(h.double() for h in history)
        want = sampler_step(x.double(), output.double(), table, row, history=wide, **how | {"noise": noise.double()})
        for g, w in zip(
            (got.sample, got.denoised, *got.history), (want.sample, want.denoised, *want.history), strict=True
        ):
            assert g.dtype == dtype
            torch.testing.assert_close(g, w.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)
        x, history = got.sample, got.history


@pytest.mark.parametrize("name", TABLES)
def test_rows_in_a_tensor(name):
    """Samples at different steps in one batch are what each is alone."""
    table = TABLES[name]
    rows = [2, 7, 9]
    depth = max(table.history) + any(table.corrects)
    x, outputs = normal(), model_of(table)
    history = tuple(normal(50 + k) for k in range(depth))
    noise, guidance = normal(8), torch.tensor([2.0, 3.0, 4.0])
    how = {"history": history, "noise": noise, "guidance": guidance, "uncond": normal(9), "model_inputs": 1}
    together = sampler_step(x, outputs[0], table, torch.tensor(rows), **how)
    for s, row in enumerate(rows):
        own = {k: v[s : s + 1] if torch.is_tensor(v) else v for k, v in how.items()}
        own["history"] = tuple(h[s : s + 1] for h in history)
        own["guidance"] = float(guidance[s])
        alone = sampler_step(x[s : s + 1], outputs[0][s : s + 1], table, row, **own)
        assert torch.equal(together.sample[s], alone.sample[0])
        assert torch.equal(together.model_input[s], alone.model_input[0])


@pytest.mark.parametrize("schedule", [VP, SIGMA, FLOW])
def test_rows_in_a_tensor_of_which_some_correct_nothing(schedule):
    table = StepTable.unipc(schedule)
    x, output, history = normal(), normal(1), tuple(normal(50 + k) for k in range(3))
    together = sampler_step(x, output, table, torch.tensor([0, 5, 0]), history=history, clip=2.0)
    for s, row in enumerate([0, 5, 0]):
        own = [h[s : s + 1] for h in history] if row else []
        alone = sampler_step(x[s : s + 1], output[s : s + 1], table, row, history=own, clip=2.0)
        assert torch.equal(together.sample[s], alone.sample[0])
        assert torch.equal(together.history[0][s], alone.history[0][0])
        assert torch.equal(together.history[-1][s], alone.history[-1][0])


def test_numbers_of_samples_may_lie_anywhere():
    table, x, output, uncond = TABLES["ddpm"], normal(), normal(1), normal(2)
    steps, keys, scales = torch.tensor([3, 4, 5]), torch.tensor([7, 7, 7]), torch.tensor([2.0, 3.0, 4.0]).double()
    made = sampler_step(x, output, table, steps, key=keys, uncond=uncond, guidance=scales).sample
    spread = [torch.stack([t, t], 1)[:, 0] for t in (steps, scales)]
    key = torch.tensor(7).expand(3)
    assert torch.equal(
        made, sampler_step(x, output, table, spread[0], key=key, uncond=uncond, guidance=spread[1]).sample
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_batch(backend):
    x, numbers = torch.empty(0, 4, 5), torch.empty(0, dtype=torch.int64)
    table = TABLES["ddpm"]
    with pyperf_dl.backend(backend):
        for how in (
            {"step": numbers},
            {"key": numbers},
            {"uncond": x, "guidance": numbers.double()},
            {"uncond": x, "guidance": 2.0, "guidance_rescale": 0.5},
            {"dynamic_threshold": (0.9, 2.0)},
            {"generator": []},
        ):
            step = sampler_step(x, x, **{"table": table, "step": 3, "model_inputs": 2} | how)
            assert step.sample.shape == step.model_input.shape == (0, 4, 5)
        assert per_sample_noise([0, 3], numbers).shape == (0, 3)


def test_a_table_of_rows_of_several_samplers():
    """Mixed requests: rows of two tables after each other, one step of both in one batch."""
    both = StepTable.joined(StepTable.ddim(VP), TABLES["ddpm"])
    x, output, noise = normal(), normal(1), normal(2)
    made = sampler_step(x, output, both, torch.tensor([3, 13, 14]), noise=noise).sample
    assert torch.equal(made[0], sampler_step(x, output, StepTable.ddim(VP), 3).sample[0])
    for s in (1, 2):
        assert torch.equal(made[s], sampler_step(x, output, TABLES["ddpm"], 2 + s, noise=noise).sample[s])


def test_loops_of_several_samplers_in_one_batch():
    """Each sample gets what it gets alone, from histories of zeros on."""
    tables = [StepTable.ddim(VP), TABLES["unipc"], StepTable.dpm_solver_pp(VP)]
    both, shape = StepTable.joined(*tables), (1, *SHAPE[1:])
    x = normal(dtype=torch.float64)
    history = (torch.zeros_like(x),) * (both.plan_of_any.depth + 1)
    outputs = [normal(100 + row, dtype=torch.float64) for row in range(10)]
    for row, output in enumerate(outputs):
        step = sampler_step(x, output, both, torch.tensor([row, 10 + row, 20 + row]), history=history, clip=2.0)
        x, history = step.sample, step.history
    for s, table in enumerate(tables):
        alone = walked(
            table, normal(dtype=torch.float64)[s].reshape(shape), [o[s].reshape(shape) for o in outputs], clip=2.0
        )
        torch.testing.assert_close(x[s], alone[0][-1][0])


def test_joined_tables_keep_their_numbers():
    tables = [StepTable.euler(SIGMA), TABLES["2M SDE"], TABLES["unipc"]]
    both = StepTable.joined(*tables)
    assert torch.equal(both.coefficients, torch.cat([t.coefficients for t in tables]))
    assert both.timesteps.tolist() == [time for t in tables for time in t.timesteps.tolist()]
    assert both.initial_scale == tables[0].initial_scale
    assert both.first_input_scale == tables[0].first_input_scale
    for wrong in ((), (tables[0], 3)):
        with pytest.raises(TypeError, match="joined: tables"):
            StepTable.joined(*wrong)


# ---- guidance, model inputs ----


def test_guidance_and_the_next_model_input():
    table = StepTable.euler(SIGMA)
    x, cond, uncond = (normal(k).bfloat16() for k in range(3))
    x = x.float() * table.initial_scale
    step = sampler_step(x, cond, table, 0, uncond=uncond, guidance=7.5, model_inputs=2)
    guided = uncond.double() + 7.5 * (cond.double() - uncond.double())
    want = sampler_step(x.double(), guided, table, 0, model_inputs=1)
    torch.testing.assert_close(step.sample, want.sample.float(), rtol=1e-7, atol=1e-6)
    assert step.model_input.dtype == torch.bfloat16
    assert step.model_input.shape == (6, *SHAPE[1:])
    assert torch.equal(step.model_input[:3], step.model_input[3:])
    scale = SIGMA.input_scales[1]
    torch.testing.assert_close(step.model_input[:3], (want.sample * scale).bfloat16(), rtol=0.01, atol=1e-6)


@pytest.mark.parametrize("rescale", [0.0, 0.7])
@pytest.mark.parametrize("threshold", [None, (0.9, 1.5), (0.995, math.inf)])
def test_rescaled_guidance_and_dynamic_threshold(rescale, threshold):
    table = StepTable.ddim(VP)
    x, cond, uncond = (normal(k, dtype=torch.float64).requires_grad_() for k in range(3))

    def plain(x, cond, uncond):
        m = uncond + 5 * (cond - uncond)
        if rescale:
            dims = [1, 2, 3]
            m = rescale * m * cond.std(dims, keepdim=True) / m.std(dims, keepdim=True) + (1 - rescale) * m
        p, q, of_x, of_m, of_d = table.coefficients[4, :5]
        d = p * x + q * m
        if threshold is not None:
            s = torch.quantile(d.abs().flatten(1), threshold[0], dim=1).clamp(1, threshold[1])[:, None, None, None]
            d = d.clamp(-s, s) / s
        return of_x * x + of_m * m + of_d * d, d

    def ours(x, cond, uncond):
        how = {"guidance_rescale": rescale, "dynamic_threshold": threshold}
        step = sampler_step(x, cond, table, 4, uncond=uncond, guidance=5, denoised=True, **how)
        return step.sample, step.denoised

    want = plain(x, cond, uncond)
    with torch.no_grad():
        torch.testing.assert_close(ours(x, cond, uncond), want)
    got = ours(x, cond, uncond)
    torch.testing.assert_close(got, want)
    weight = normal(7, dtype=torch.float64)
    gradients = [torch.autograd.grad((made[0] * weight).sum(), (x, cond, uncond)) for made in (got, want)]
    torch.testing.assert_close(*gradients)


def test_dynamic_threshold_has_a_tangent_without_gradients():
    table = StepTable.ddim(VP)
    x, output, tangent = (normal(k, dtype=torch.float64) for k in range(3))

    def step(x):
        return sampler_step(x, output, table, 4, dynamic_threshold=(0.9, 1.5)).sample

    want = torch.func.jvp(step, (x,), (tangent,))[1]
    with torch.no_grad(), forward_ad.dual_level():
        got = forward_ad.unpack_dual(step(forward_ad.make_dual(x, tangent))).tangent
    torch.testing.assert_close(got, want)


# ---- noise ----


def test_noise_is_that_of_torch_randn():
    table = TABLES["ddpm"]
    x, output = normal(), normal(1)
    for dtype in DTYPES:
        x, output = x.to(dtype), output.to(dtype)
        ours, theirs = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
        got = sampler_step(x, output, table, 3, generator=ours).sample
        noise = torch.randn(SHAPE, generator=theirs, dtype=dtype)
        assert torch.equal(got, sampler_step(x, output, table, 3, noise=noise).sample)
        assert torch.equal(ours.get_state(), theirs.get_state())
    torch.manual_seed(6)
    got = sampler_step(x, output, table, 3).sample
    torch.manual_seed(6)
    assert torch.equal(got, sampler_step(x, output, table, 3, noise=torch.randn(SHAPE, dtype=x.dtype)).sample)


def test_generators_of_samples():
    table, x, output = TABLES["ddpm"], normal(), normal(1)
    made = sampler_step(x, output, table, 3, generator=[torch.Generator().manual_seed(s) for s in (1, 2, 3)]).sample
    for s in range(3):
        alone = sampler_step(x[s:][:1], output[s:][:1], table, 3, generator=torch.Generator().manual_seed(s + 1)).sample
        assert torch.equal(made[s], alone[0])


def test_a_row_without_noise_draws_none():
    generator = torch.Generator().manual_seed(1)
    before = generator.get_state()
    last = len(TABLES["ddpm"]) - 1
    sampler_step(normal(), normal(1), TABLES["ddpm"], last, generator=generator)
    sampler_step(normal(), normal(1), TABLES["ddim"], 0, generator=generator)
    assert torch.equal(before, generator.get_state())


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_noise_of_keys(memory_format):
    table = TABLES["ddpm"]
    x, output = (normal(k).contiguous(memory_format=memory_format) for k in range(2))
    keys = torch.tensor([4, 5, 2**62])
    made = sampler_step(x, output, table, 3, key=keys).sample
    noise = per_sample_noise(SHAPE, keys, 3)
    assert torch.equal(made, sampler_step(x, output, table, 3, noise=noise).sample)
    for s in range(3):
        alone = sampler_step(x[s : s + 1], output[s : s + 1], table, 3, key=int(keys[s])).sample
        assert torch.equal(made[s], alone[0])
    rows = torch.tensor([3, 4, 3])
    mixed = sampler_step(x, output, table, rows, key=keys).sample
    assert torch.equal(mixed[[0, 2]], made[[0, 2]])
    assert not torch.equal(mixed[1], made[1])


def test_per_sample_noise_is_normal_and_reproducible():
    noise = per_sample_noise([4, 50_000], torch.arange(4), 3)
    assert torch.equal(noise, per_sample_noise([4, 50_000], torch.arange(4), 3))
    assert noise.mean().abs() < 0.01
    assert abs(noise.var() - 1) < 0.02
    assert not torch.equal(noise, per_sample_noise([4, 50_000], torch.arange(4)))
    assert torch.equal(per_sample_noise([2, 9], 2**64 - 1), per_sample_noise([2, 9], -1))
    for dtype in DTYPES:
        assert torch.equal(per_sample_noise([1, 300], 7, dtype=dtype), per_sample_noise([1, 300], 7).to(dtype))


def test_brownian_noise_follows_one_path():
    """Steps of a half add up to the whole; disjoint ones are independent; each is standard normal."""
    noise = BrownianNoise(torch.empty(2, 20_000), torch.tensor([1, 2]), 0.03, 14.6)
    sigmas = torch.linspace(14.6, 0.03, 9, dtype=torch.float64).tolist()
    fine = [noise(a, b) * math.sqrt(a - b) for a, b in itertools.pairwise(sigmas)]
    coarse = [noise(a, b) * math.sqrt(a - b) for a, b in itertools.pairwise(sigmas[::2])]
    for k, whole in enumerate(coarse):
        torch.testing.assert_close(whole, fine[2 * k] + fine[2 * k + 1], rtol=0, atol=2e-5)
    steps = torch.stack([f / math.sqrt(a - b) for f, (a, b) in zip(fine, itertools.pairwise(sigmas), strict=True)])
    assert (steps.flatten(1).var(1) - 1).abs().max() < 0.05
    assert (steps.flatten(1).corrcoef() - torch.eye(8)).abs().max() < 0.05
    torch.testing.assert_close(noise(3.0, 1.0), -noise(1.0, 3.0))
    tiny = noise(1.0, 1.0001)
    assert abs(tiny.var() - 1) < 0.05
    with pytest.raises(ValueError, match="batch dimension"):
        BrownianNoise(torch.empty(()), 1, 0.0, 1.0)
    for wrong in [(1.0, 1.0), (0.0, 1.0), (1.0, 20.0)]:
        with pytest.raises(ValueError, match="BrownianNoise"):
            noise(*wrong)


# ---- log-probability ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["ddpm", "learned variance", "2M SDE"])
def test_log_prob(name, dtype):
    table, row = TABLES[name], 4
    x, output, noise = normal(dtype=dtype), model_of(table, dtype=dtype)[0], normal(3, dtype=dtype)
    history = tuple(normal(60 + k, dtype=dtype) for k in range(table.history[row]))
    step = sampler_step(x, output, table, row, history=history, noise=noise, log_prob=True)
    plain = sampler_step(x, output, table, row, history=history, noise=noise)
    assert torch.equal(step.sample, plain.sample)
    wide = [t.double() for t in (x, output)]
    mean = sampler_step(
        *wide, table, row, history=[h.double() for h in history], noise=torch.zeros(SHAPE).double()
    ).sample
    variance = output.chunk(2, 1)[1] if table.learned_variance else None
    deviation = linear.deviation(x.double(), variance, table.coefficients, None, row)
    want = torch.distributions.Normal(mean, deviation).log_prob(step.sample.double()).flatten(1).sum(1)
    assert step.log_prob.shape == (3,)
    assert step.log_prob.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(step.log_prob.double(), want, rtol=1e-5, atol=1e-2 if dtype != torch.float64 else 1e-9)
    again = sampler_step(x, output, table, row, history=history, log_prob=True, target=step.sample)
    assert torch.equal(again.sample, step.sample)
    torch.testing.assert_close(again.log_prob, step.log_prob, rtol=1e-6, atol=1e-4)


def test_log_prob_makes_the_model_input_of_the_sample():
    table = StepTable.euler_ancestral(SIGMA)
    x, output, noise = (normal(k, dtype=torch.bfloat16) for k in range(3))
    step = sampler_step(x, output, table, 4, noise=noise, log_prob=True, model_inputs=2)
    want = sampler_step(x, output, table, 4, noise=noise, model_inputs=2)
    assert torch.equal(step.model_input, want.model_input)


def test_a_target_is_a_constant_of_its_log_prob():
    x, output, target = normal(), normal(1), normal(2).requires_grad_()
    step = sampler_step(x, output, TABLES["ddpm"], 4, log_prob=True, target=target)
    assert step.sample is target
    assert not step.log_prob.requires_grad
    output.requires_grad_()
    step = sampler_step(x, output, TABLES["ddpm"], 4, log_prob=True, target=target)
    assert torch.autograd.grad(step.log_prob.sum(), target, allow_unused=True) == (None,)


def test_log_prob_with_noise_of_keys_in_forward_mode():
    table = TABLES["ddpm"]
    x, output, tangent = (normal(k, dtype=torch.float64) for k in range(3))
    got = torch.func.jvp(lambda x: sampler_step(x, output, table, 4, key=3, log_prob=True).sample, (x,), (tangent,))[1]
    p, _, of_x, _, of_d = table.coefficients[4, :5]
    torch.testing.assert_close(got, (of_x + of_d * p) * tangent)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_prob_with_rows_and_keys_of_samples(dtype):
    table = TABLES["ddpm"]
    x, output = (normal(k, dtype=dtype) for k in range(2))
    rows, keys = torch.tensor([4, 2, 3]), torch.tensor([5, 6, 7])
    together = sampler_step(x, output, table, rows, key=keys, log_prob=True)
    assert torch.equal(together.sample, sampler_step(x, output, table, rows, key=keys).sample)
    for k in range(3):
        one = slice(k, k + 1)
        alone = sampler_step(x[one], output[one], table, int(rows[k]), key=keys[one], log_prob=True)
        assert torch.equal(alone.sample, together.sample[one])
        torch.testing.assert_close(alone.log_prob, together.log_prob[one], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_policy_gradient_is_that_of_autograd(dtype):
    """Of the ratio of probabilities, with a learned variance and a clip; and by a compiler."""
    table, clip = TABLES["learned variance"], 1.5
    x, target = normal(0, dtype=dtype), normal(2, dtype=dtype)
    output = model_of(table, dtype=dtype)[0]
    before = sampler_step(x, output, table, 4, log_prob=True, target=target, clip=clip).log_prob

    def loss(x, output):
        now = sampler_step(x, output, table, 4, log_prob=True, target=target, clip=clip).log_prob
        return ((now - before) / x[0].numel()).exp().sum()

    wide = [t.double().requires_grad_() for t in (x, output)]
    with pyperf_dl.backend("reference"):
        now = sampler_step(*wide, table, 4, log_prob=True, target=target.double(), clip=clip).log_prob
    want = torch.autograd.grad(((now - before.double()) / x[0].numel()).exp().sum(), wide)
    inputs = [t.clone().requires_grad_() for t in (x, output)]
    got = torch.autograd.grad(loss(*inputs), inputs)
    eps = torch.finfo(dtype).eps
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.double(), w, rtol=8 * eps, atol=8 * eps * float(w.abs().max()))
    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for a, b in zip(torch.autograd.grad(compiled(*inputs), inputs), got, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(torch.func.grad(loss, (0, 1))(x, output), got, strict=True):
        torch.testing.assert_close(a, b, rtol=8 * eps, atol=8 * eps * float(b.abs().max()))


def test_log_prob_of_a_target_has_gradients():
    table = TABLES["ddpm"]
    x, output, target = (normal(k, dtype=torch.float64).requires_grad_(k < 2) for k in range(3))

    def log_prob(x, output):
        return sampler_step(x, output, table, 4, log_prob=True, target=target).log_prob

    assert torch.autograd.gradcheck(log_prob, (x, output))


# ---- gradients through a loop ----


@pytest.mark.parametrize("name", ["ddim", "2M SDE", "unipc", "heun", "learned variance"])
def test_gradients_through_a_loop(name):
    table = TABLES[name]
    shape = (2, 2, 3)
    x, scale = (
        normal(shape=shape, dtype=torch.float64).requires_grad_(),
        torch.ones((), dtype=torch.float64).requires_grad_(),
    )
    outputs = model_of(table, shape, torch.float64)

    def last(x, scale):
        return walked(table, x, [o * scale for o in outputs[:5]], clip=3.0, key=3)[0][-1]

    assert torch.autograd.gradcheck(last, (x, scale))


# ---- the loop ----


def flow_model(inputs, t):
    return (inputs - 3) / (t.view(-1, *[1] * (inputs.dim() - 1)).to(inputs.dtype) / 1000)


@pytest.mark.parametrize("name", TABLES)
def test_sampler_is_the_loop_by_hand(name):
    table = TABLES[name]
    outputs = iter(model_of(table))
    seen = []

    def model(inputs, t):
        seen.append((inputs, t))
        return next(outputs)

    x = normal() * table.initial_scale
    rows = []
    callback = lambda row, step: rows.append((row, step.sample, step.denoised))  # noqa: E731
    sample, trajectory = Sampler(table, clip=2.0).sample(
        model, x, generator=torch.Generator().manual_seed(2), return_trajectory=True, callback=callback
    )
    samples, _ = walked(table, x, model_of(table), clip=2.0, generator=torch.Generator().manual_seed(2))
    assert torch.equal(sample, samples[-1])
    assert torch.equal(trajectory, torch.stack([x, *samples]))
    assert [r for r, *_ in rows] == list(range(len(table)))
    assert all(d is not None for *_, d in rows)
    scales = [table.first_input_scale, *table.coefficients[:-1, -1].tolist()]
    for (inputs, t), sample, scale, time in zip(seen, [x, *samples], scales, table.timesteps, strict=False):
        torch.testing.assert_close(inputs, sample * scale)
        assert t.shape == (3,)
        assert bool((t == time).all())


@pytest.mark.parametrize("source", [{"key": 5}, {"generator": 5}])
@pytest.mark.parametrize("name", ["ddpm", "learned variance", "2M SDE", "ddim"])
def test_a_loop_returns_log_probabilities(name, source):
    table = TABLES[name]
    how = {k: torch.Generator().manual_seed(v) if k == "generator" else v for k, v in source.items()}
    outputs = iter(model_of(table))
    sampler = Sampler(table, clip=2.0)
    sample, trajectory, log_probs = sampler.sample(
        lambda *_: next(outputs), normal(), return_trajectory=True, return_log_prob=True, **how
    )
    assert log_probs.shape == (len(table), 3)
    if "generator" in source:
        how["generator"].manual_seed(source["generator"])
    outputs = iter(model_of(table))
    assert torch.equal(sample, sampler.sample(lambda *_: next(outputs), normal(), **how))
    history = ()
    for row, (output, x, after) in enumerate(zip(model_of(table), trajectory, trajectory[1:], strict=False)):
        noisy = {"log_prob": True, "target": after} if table.noisy[row] else {}
        step = sampler_step(x, output, table, row, history=history, clip=2.0, **noisy)
        history = step.history
        if noisy:
            torch.testing.assert_close(log_probs[row], step.log_prob, rtol=1e-5, atol=1e-3)
        else:
            assert not log_probs[row].any()
    outputs = iter(model_of(table))
    only = sampler.sample(lambda *_: next(outputs), normal(), return_log_prob=True, key=5)
    assert [t.shape for t in only] == [sample.shape, log_probs.shape]


def test_sampler_with_guidance():
    table = TABLES["flow"]

    def model(inputs, t):
        assert inputs.shape[0] == t.shape[0] == 6
        without, with_ = inputs.chunk(2)
        return torch.cat([without, 2 * with_])

    got = Sampler(table).sample(model, normal(), guidance=3.0)
    want = Sampler(table).sample(lambda inputs, t: inputs + 3 * (2 * inputs - inputs), normal())
    torch.testing.assert_close(got, want)


def test_sampler_may_begin_later():
    table = StepTable.euler(SIGMA)
    outputs = model_of(table)
    samples, _ = walked(table, normal(), outputs)
    rest = iter(outputs[4:])
    seen = []
    got = Sampler(table).sample(lambda inputs, t: seen.append(inputs) or next(rest), samples[3], begin=4)
    assert torch.equal(got, samples[-1])
    torch.testing.assert_close(seen[0], samples[3] * SIGMA.input_scales[4])


def test_the_model_always_gets_its_dtype():
    seen = []

    def model(inputs, t):
        seen.append(inputs.dtype)
        return flow_model(inputs.float(), t)

    sample = Sampler(TABLES["flow"]).sample(model, normal(), model_dtype=torch.bfloat16)
    assert sample.dtype == torch.float32
    assert seen == [torch.bfloat16] * 10


def test_sampler_takes_noise_of_the_caller():
    table = TABLES["2M SDE"]
    made = {row: normal(row) for row in range(len(table)) if table.noisy[row]}
    outputs = iter(model_of(table))
    got = Sampler(table).sample(lambda *_: next(outputs), normal(), noise=lambda row: made[row])
    x, history = normal(), ()
    for row, output in enumerate(model_of(table)):
        step = sampler_step(x, output, table, row, history=history, noise=made.get(row))
        x, history = step.sample, step.history
    assert torch.equal(got, x)


def test_churn_begins_with_noise():
    table = StepTable.edm_churn(SIGMA, s_churn=5.0)
    assert table.first_noise > 0
    outputs = model_of(table)
    made = {row: normal(200 + row) for row in range(-1, len(table))}
    rest = iter(outputs)
    x = normal() * table.initial_scale
    got = Sampler(table).sample(lambda *_: next(rest), x, noise=lambda row: made[row])
    x = x + table.first_noise * made[-1]
    for row, output in enumerate(outputs):
        x = sampler_step(x, output, table, row, noise=made[row]).sample
    assert torch.equal(got, x)
    for how in ({"key": 4}, {"generator": torch.Generator().manual_seed(1)}):
        rest = iter(outputs)
        assert not torch.equal(Sampler(table).sample(lambda *_, rest=rest: next(rest), normal(), **how), got)


def test_progress(capsys):
    pytest.importorskip("rich")
    Sampler(TABLES["flow"]).sample(flow_model, normal(), progress=True)
    assert "sampling" in capsys.readouterr().out


# ---- compiled ----


@pytest.mark.parametrize("how", [{}, {"noise": True}, {"key": True}])
def test_compiled_step_is_the_same(how):
    torch._dynamo.reset()
    table = TABLES["2M SDE" if how else "unipc"]

    def two(x, outputs, noise, key):
        extra = {"noise": noise} if "noise" in how else {"key": key} if "key" in how else {}
        first = sampler_step(x, outputs, table, 0, **extra)
        return sampler_step(first.sample, outputs, table, 1, history=first.history, **extra).sample

    args = (normal(), normal(1), normal(2), torch.tensor([1, 2, 3]))
    compiled = torch.compile(two, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*args), two(*args))


class GuidedStep(torch.nn.Module):
    def forward(self, x, output, uncond, kept):
        step = sampler_step(
            x, output, TABLES["2M"], 4, uncond=uncond, guidance=3.0, history=(kept,), clip=1.0, model_inputs=2
        )
        return step.sample, step.model_input


def test_export_with_dynamic_batches():
    inputs, others = ([normal(k, (size, 3, 8)) for k in range(4)] for size in (4, 7))
    batch = torch.export.Dim("batch", min=2, max=4096)
    exported = torch.export.export(GuidedStep(), tuple(inputs), dynamic_shapes=[{0: batch}] * 4)
    for got, want in zip(exported.module()(*others), GuidedStep()(*others), strict=True):
        assert torch.equal(got, want)
    table = torch.export.default_decompositions()
    table.update(pyperf_dl.decompositions())
    plain = exported.run_decompositions(table)
    assert "pyperf_dl" not in plain.graph_module.code
    torch.testing.assert_close(plain.module()(*others), GuidedStep()(*others))


def test_aotinductor_package(tmp_path):
    inputs, others = (tuple(normal(k + seed, (4, 3, 8)) for k in range(4)) for seed in (0, 10))
    exported = torch.export.export(GuidedStep(), inputs)
    package = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "step.pt2"))
    for got, want in zip(torch._inductor.aoti_load_package(package)(*others), GuidedStep()(*others), strict=True):
        assert torch.equal(got, want)


def test_vmap_over_a_step():
    table = TABLES["ddim"]
    x, output = normal(shape=(5, 2, 3, 4)), normal(1, shape=(5, 2, 3, 4))
    made = torch.func.vmap(lambda a, b: sampler_step(a, b, table, 2, clip=1.0).sample)(x, output)
    assert torch.equal(
        made, torch.stack([sampler_step(a, b, table, 2, clip=1.0).sample for a, b in zip(x, output, strict=True)])
    )


# ---- distributed ----

DISTRIBUTED = """
import torch, torch.distributed as dist
from pyperf_dl import NoiseSchedule, StepTable, sampler_step
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode

dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
schedule = NoiseSchedule.from_betas(10, spacing="trailing")
torch.manual_seed(0)
x, output, uncond, *history = torch.randn(6, 4, 3, 8)[:, :, :, None].unbind(0)
how = {"guidance": 2.0, "clip": 1.0, "denoised": True, "model_inputs": 1}
for table, count in ((StepTable.unipc(schedule), 3), (StepTable.ddim(schedule), 0)):
    for placement in (Shard(0), Shard(1), Replicate()):
        results = []
        for place in (lambda t: distribute_tensor(t, mesh, [placement]), torch.clone):
            leaves = [place(t).requires_grad_() for t in (x, output, uncond)]
            kept = [place(h) for h in history[:count]]
            step = sampler_step(*leaves[:2], table, 4, uncond=leaves[2], history=kept, **how)
            made = [step.sample, step.denoised, step.model_input, *step.history]
            (step.sample.sum() + step.model_input.sum()).backward()
            results.append([*made, *(t.grad for t in leaves)])
        sharded, whole = results
        assert all(t.placements == (placement,) for t in sharded[:2])
        assert all(torch.equal(a.full_tensor(), b) for a, b in zip(sharded, whole, strict=True))
sharded = sampler_step(distribute_tensor(x, mesh, [Shard(0)]), distribute_tensor(output, mesh, [Shard(0)]),
                       StepTable.ddpm(schedule), 4, key=3)
assert torch.equal(sharded.sample.full_tensor(), sampler_step(x, output, StepTable.ddpm(schedule), 4, key=3).sample)
results = []
for place in (lambda t: distribute_tensor(t, mesh, [Shard(0)]), torch.clone):
    leaves = [place(t).requires_grad_() for t in (x, output)]
    target = place(uncond)
    with CommDebugMode() as moved:
        log_prob = sampler_step(*leaves, StepTable.ddpm(schedule), 4, log_prob=True, target=target).log_prob
        results.append([log_prob, *torch.autograd.grad(log_prob.exp().sum(), leaves)])
    assert moved.get_total_counts() == 0
assert all(torch.equal(a.full_tensor(), b) for a, b in zip(*results, strict=True))
dist.destroy_process_group()
print("sharded")
"""


def test_dtensors_may_be_sharded():
    """Two gloo processes; with noise of keys samples come together before."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "--no-python"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, sys.executable, "-c", DISTRIBUTED], capture_output=True, text=True, check=False, env=environment
    )
    assert done.stdout.count("sharded") == 2, done.stderr[-3000:]


# ---- what is refused ----

FLOAT = normal()
WRONG = {
    "integer latents": ({"x": torch.zeros(SHAPE, dtype=torch.int64)}, TypeError, "x must have one of the dtypes"),
    "no batch": ({"x": torch.zeros(())}, ValueError, "batch dimension"),
    "no table": ({"table": TABLES["ddim"].coefficients}, TypeError, "table must be a StepTable"),
    "step above": ({"step": 10}, ValueError, r"step must be in \[0, 9\].*got 10"),
    "step below": ({"step": -1}, ValueError, "step must be in"),
    "step float": ({"step": 1.5}, TypeError, "step must be an int"),
    "step float tensor": ({"step": torch.tensor([1.0, 2.0, 3.0])}, TypeError, "step must be torch.int64"),
    "steps of another number": ({"step": torch.tensor([1, 2])}, ValueError, r"one a sample \(3\)"),
    "output shape": ({"model_output": FLOAT[:2]}, ValueError, "model_output must be"),
    "output dtype": ({"model_output": FLOAT.double()}, TypeError, "model_output must have x's dtype"),
    "uncond shape": ({"uncond": FLOAT[..., :2], "guidance": 2.0}, ValueError, "uncond must be"),
    "uncond dtype": (
        {"model_output": FLOAT.half(), "uncond": FLOAT, "guidance": 2.0}, ValueError,
        "uncond must be torch.float16 .*, as model_output is, got",
    ),
    "guidance alone": ({"guidance": 2.0}, ValueError, "guidance needs uncond"),
    "uncond alone": ({"uncond": FLOAT}, ValueError, "uncond needs guidance"),
    "guidance nan": ({"uncond": FLOAT, "guidance": math.nan}, ValueError, "guidance must be finite"),
    "guidance text": ({"uncond": FLOAT, "guidance": "7"}, TypeError, "guidance must be a number"),
    "guidance of another number": ({"uncond": FLOAT, "guidance": torch.ones(2)}, ValueError, "guidance must have one"),
    "guidance with gradients": (
        {"uncond": FLOAT, "guidance": torch.ones(3, requires_grad=True)}, ValueError, "has no derivative",
    ),
    "rescale": ({"uncond": FLOAT, "guidance": 2.0, "guidance_rescale": 1.5}, ValueError, "guidance_rescale must be in"),
    "rescale alone": ({"guidance_rescale": 0.5}, ValueError, "guidance_rescale needs guidance"),
    "clip": ({"clip": 0.0}, ValueError, "clip must be a bound > 0"),
    "clip pair": ({"clip": (1.0, -1.0)}, ValueError, "low < high"),
    "clip three": ({"clip": (1.0, 2.0, 3.0)}, ValueError, "clip must be"),
    "clip nan": ({"clip": math.nan}, ValueError, "clip must be"),
    "clip and threshold": ({"clip": 1.0, "dynamic_threshold": (0.9, 2.0)}, ValueError, "exclude each other"),
    "threshold": ({"dynamic_threshold": (1.5, 2.0)}, ValueError, r"quantile in \(0, 1\]"),
    "threshold bound": ({"dynamic_threshold": (0.5, 0.5)}, ValueError, "bound >= 1"),
    "threshold number": ({"dynamic_threshold": 0.9}, TypeError, "dynamic_threshold must be"),
    "history too long": ({"history": (FLOAT,)}, ValueError, "history must hold 0 to 0 tensors.*got 1"),
    "history too short": ({"table": TABLES["2M SDE"]}, ValueError, "history must hold 1 to 1 tensors for row 4.*got 0"),
    "history shape": ({"table": TABLES["2M SDE"], "history": (FLOAT[:1],)}, ValueError, "history must be"),
    "history of a corrector": ({"table": TABLES["unipc"], "history": (FLOAT,)}, ValueError, "history must hold 3 to 3"),
    "history tensor": ({"history": FLOAT}, TypeError, "history must be a tuple"),
    "noise and generator": ({"noise": FLOAT, "generator": torch.Generator()}, ValueError, "exclude each other"),
    "noise and key": ({"noise": FLOAT, "key": 3}, ValueError, "noise and key exclude each other"),
    "noise shape": ({"noise": FLOAT[:1]}, ValueError, "noise must be"),
    "generators of another number": ({"generator": [torch.Generator()] * 2}, ValueError, "one for each sample, got 2"),
    "generator type": ({"generator": 3}, TypeError, "generator must be a torch.Generator"),
    "generator list type": ({"generator": [1, 2, 3]}, TypeError, "generator must hold"),
    "key bits": ({"key": 2**64}, ValueError, "key must have 64 bits"),
    "key float": ({"key": torch.ones(3)}, TypeError, "key must be torch.int64"),
    "keys of another number": ({"key": torch.tensor([1, 2])}, ValueError, "key must have one number"),
    "model inputs": ({"model_inputs": -1}, ValueError, "model_inputs must be >= 0"),
    "denoised": ({"denoised": 1}, TypeError, "denoised must be a bool"),
    "log_prob without noise": ({"log_prob": True}, ValueError, "log_prob is for a row that adds noise"),
    "target alone": ({"table": TABLES["ddpm"], "target": FLOAT}, ValueError, "target is for log_prob"),
    "inputs of a target": (
        {"table": TABLES["ddpm"], "target": FLOAT, "log_prob": True, "model_inputs": 2}, ValueError,
        "model_inputs is for a new sample",
    ),
    "learned variance": ({"table": TABLES["learned variance"]}, ValueError, "twice the channels"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_raise(name):
    changes, error, text = WRONG[name]
    arguments = {"x": FLOAT, "model_output": FLOAT, "table": TABLES["ddim"], "step": 4} | changes
    state = torch.get_rng_state()
    with pytest.raises(error, match=f"sampler_step: .*{text}"):
        sampler_step(**arguments)
    assert torch.equal(state, torch.get_rng_state())


def test_a_step_on_the_cpu_beside_another_device_is_an_int():
    x = FLOAT.to("meta")
    assert sampler_step(x, x, TABLES["ddim"], torch.tensor([4])).sample.device.type == "meta"
    with pytest.raises(TypeError, match=r"step must be torch\.int64"):
        sampler_step(x, x, TABLES["ddim"], torch.tensor(1.5))


def test_a_generator_is_as_before_when_a_step_is_refused():
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    with pytest.raises(ValueError, match="clip"):
        sampler_step(FLOAT, FLOAT, TABLES["ddpm"], 4, generator=generator, clip=-1.0)
    with pytest.raises(ValueError, match="target"):
        sampler_step(FLOAT, FLOAT, TABLES["ddpm"], 4, generator=generator, target=FLOAT)
    assert torch.equal(before, generator.get_state())


def test_wrong_calls_of_the_sampler_raise():
    sampler = Sampler(TABLES["flow"])
    with pytest.raises(TypeError, match="Sampler: table"):
        Sampler(3)
    for how, text in (
        ({"capture": True}, "capture needs CUDA"),
        ({"begin": 10}, r"begin must be in \[0, 9\]"),
        ({"noise": lambda row: FLOAT, "key": 1}, "noise excludes"),
        ({"generator": torch.Generator(), "key": 1}, "generator and key exclude"),
        ({"key": 2**64}, "key must have 64 bits"),
        ({"guidance": math.nan}, "guidance must be finite"),
        ({"model_dtype": torch.float64}, "model_dtype must be x's"),
    ):
        with pytest.raises(ValueError, match=text):
            sampler.sample(flow_model, FLOAT, **how)
    with pytest.raises(ValueError, match="a tensor of 6 samples"):
        sampler.sample(lambda inputs, t: inputs[:3], FLOAT, guidance=2.0)
    with pytest.raises(TypeError, match="x must be"):
        sampler.sample(flow_model, [1.0])
    with pytest.raises(TypeError, match="noise must be a function of the row"):
        sampler.sample(flow_model, FLOAT, noise=FLOAT)
    with pytest.raises(ValueError, match="x must have a batch dimension"):
        sampler.sample(flow_model, torch.zeros(()))


def test_wrong_calls_of_per_sample_noise_raise():
    for how, error, text in (
        ({"key": torch.tensor([1, 2, 3])}, ValueError, "key must have one number"),
        ({"key": 1, "dtype": torch.int32}, TypeError, "dtype must be one of"),
        ({"key": 1, "draw": 0.5}, TypeError, "draw must be an int"),
        ({"key": 1, "draw": 2**63}, ValueError, "draw must have 64 bits"),
        ({"key": 1, "shape": ()}, ValueError, "batch dimension"),
    ):
        with pytest.raises(error, match=f"per_sample_noise: .*{text}"):
            per_sample_noise(**{"shape": (2, 3)} | how)


def test_reference_backend_is_the_same():
    table = TABLES["2M SDE"]
    x, output, history = normal(), normal(1), (normal(2),)
    how = {"history": history, "key": 3, "clip": 1.0, "model_inputs": 1}
    got = sampler_step(x, output, table, 4, **how)
    with pyperf_dl.backend("reference"):
        want = sampler_step(x, output, table, 4, **how)
    torch.testing.assert_close(got[:1] + got[3:4], want[:1] + want[3:4])
