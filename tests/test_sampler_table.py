"""Rows of coefficients against the samplers as their papers write them, over whole loops in float64."""

import itertools
import math

import pytest
import torch

from pyperf_dl import _sampler_table as table
from pyperf_dl.reference import sampler
from pyperf_dl.reference.sampler import Level

SHAPE = (2, 3, 4, 5)


def preserving(steps=7, end=True):
    """Scaled-linear betas, evenly spaced, down to no noise."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    products = torch.cumprod(1 - betas, 0)
    squares = [float(products[t]) for t in torch.linspace(999, 40, steps).long()]
    return [Level(math.sqrt(a), math.sqrt(1 - a)) for a in squares] + ([Level(1.0, 0.0)] if end else [])


def in_sigmas(steps=7):
    """Karras' sigmas, down to 0."""
    ramp = torch.linspace(14.6 ** (1 / 7), 0.03 ** (1 / 7), steps, dtype=torch.float64) ** 7
    return [Level(1.0, s) for s in [*ramp.tolist(), 0.0]]


def flow(steps=7, last=0.0):
    return [Level(1 - s, s) for s in torch.linspace(0.98, last, steps + 1, dtype=torch.float64).tolist()]


def model(x, level):
    return (
        torch.tanh(1.3 * x.roll(1, -1) - 0.4 * x.mean((1, 2, 3), keepdim=True)) * (1 + level.sigma) / (2 + level.sigma)
    )


def start(levels):
    torch.manual_seed(0)
    x = torch.randn(SHAPE, dtype=torch.float64) * math.hypot(*levels[0])
    return x, torch.randn(len(levels), *SHAPE, dtype=torch.float64)


def by_rows(rows, levels, clip=None):
    """The samples of a loop through the linear form; levels: of the rows."""
    x, noises = start(levels)
    kept, last, samples = [], None, []
    for row, level, noise in zip(rows, levels, noises, strict=False):
        m = model(x, level)
        d = row.p * x + row.q * m
        d = d if clip is None else d.clamp(-clip, clip)
        h = [*kept, *[torch.zeros(())] * 3]
        if row.last_x:
            x = row.last_x * last + row.last_d * d + row.last_h1 * h[0] + row.last_h2 * h[1]
        last = x
        keep = row.keep_x * x + row.keep_m * m + row.keep_d * d
        x = row.x * x + row.m * m + row.d * d + row.h1 * h[0] + row.h2 * h[1] + row.h3 * h[2] + row.z * noise
        if row.keep_x or row.keep_m or row.keep_d:
            kept = [keep, *kept[:2]]
        samples.append(x)
    return samples


def assert_same(got, want):
    assert len(got) == len(want)
    for step, (a, b) in enumerate(zip(got, want, strict=True)):
        error = float((a - b).abs().max() / b.abs().max())
        assert error < 1e-12, (step, error)


def loop(levels, step, prediction="epsilon", clip=None):
    """step(i, x, d, output, noise) -> the next sample."""
    x, noises = start(levels)
    samples = []
    for i, now in enumerate(levels[:-1]):
        output = model(x, now)
        d = sampler.denoised(x, output, now, prediction)
        d = d if clip is None else d.clamp(-clip, clip)
        x = step(i, x, d, output, noises[i])
        samples.append(x)
    return samples


@pytest.mark.parametrize("rederive", [False, True])
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
def test_ddim(prediction, eta, clip, rederive):
    levels = preserving()

    def step(i, x, d, output, noise):
        raw = d if rederive else sampler.denoised(x, output, levels[i], prediction)
        return sampler.ddim(x, d, sampler.noise_in(x, raw, levels[i]), levels[i], levels[i + 1], eta, noise)

    assert_same(
        by_rows(table.ddim(levels, prediction, eta, rederive), levels, clip), loop(levels, step, prediction, clip)
    )


@pytest.mark.parametrize("variance", ["small", "large"])
def test_ddpm(variance):
    levels = preserving()

    def step(i, x, d, output, noise):
        both = sampler.ddpm_variances(levels[i], levels[i + 1])
        last = i == len(levels) - 2
        deviation = math.sqrt(both[variance == "large"])
        return sampler.ddpm(x, d, levels[i], levels[i + 1], deviation, None if last else noise)

    assert_same(by_rows(table.ddpm(levels, variance=variance), levels, 1.0), loop(levels, step, clip=1.0))


def test_learned_range():
    levels = preserving(end=False)
    for row, now, after in zip(table.ddpm(levels, variance="learned_range"), levels, levels[1:], strict=False):
        v = torch.linspace(-1, 1, 9, dtype=torch.float64)
        share = (v + 1) / 2
        deviation = torch.exp(0.5 * (share * row.log_large + (1 - share) * row.log_small))
        torch.testing.assert_close(deviation, sampler.learned_deviation(v, now, after), rtol=1e-12, atol=0)


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
def test_euler(prediction):
    levels = in_sigmas()

    def step(i, x, d, output, noise):
        return sampler.euler(x, d, levels[i].sigma, levels[i + 1].sigma)

    assert_same(by_rows(table.euler(levels, prediction), levels), loop(levels, step, prediction))


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ancestral(eta):
    for levels, prediction, one, rows in (
        (in_sigmas(), "v", sampler.euler_ancestral, table.euler_ancestral),
        (flow(last=0.0), "flow", sampler.flow_ancestral, table.flow_ancestral),
    ):

        def step(i, x, d, output, noise, levels=levels, one=one):
            return one(x, d, levels[i].sigma, levels[i + 1].sigma, noise, eta, 1.01)

        assert_same(by_rows(rows(levels, prediction, eta, 1.01), levels), loop(levels, step, prediction))


def test_heun():
    levels = in_sigmas()
    x, _ = start(levels)
    samples, of_rows = [], []
    for now, after in itertools.pairwise(levels):
        d = sampler.denoised(x, model(x, now), now, "v")
        x1 = sampler.euler(x, d, now.sigma, after.sigma)
        samples.append(x1)
        of_rows.append(now)
        if after.sigma:
            d1 = sampler.denoised(x1, model(x1, after), after, "v")
            x1 = sampler.heun(x, d, x1, d1, now.sigma, after.sigma)
            samples.append(x1)
            of_rows.append(after)
        x = x1
    assert_same(by_rows(table.heun(levels, "v"), of_rows), samples)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_lms(order):
    levels = in_sigmas(9)
    slopes = []

    def step(i, x, d, output, noise):
        slopes.insert(0, sampler.slope(x, d, levels[i].sigma))
        sigmas = [level.sigma for level in levels[: i + 1]][::-1]
        return sampler.lms(x, slopes[:order], sigmas[:order], levels[i + 1].sigma)

    assert_same(by_rows(table.lms(levels, order=order), levels), loop(levels, step))


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_plms(prediction):
    levels, outputs = preserving(9), []

    def step(i, x, d, output, noise):
        outputs.insert(0, output)
        mixed = sampler.extrapolated(outputs)
        now = levels[i]
        epsilon = mixed if prediction == "epsilon" else now.alpha * mixed + now.sigma * x
        return sampler.transferred(x, epsilon, now, levels[i + 1])

    assert_same(by_rows(table.plms(levels, prediction), levels), loop(levels, step, prediction))


@pytest.mark.parametrize("schedule", [preserving, in_sigmas, flow])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(("order", "kind"), [(1, "midpoint"), (2, "midpoint"), (2, "heun"), (3, "midpoint")])
def test_dpm_solver_pp(order, kind, eta, schedule):
    levels = schedule(9)
    prediction = "flow" if schedule is flow else "v"
    ds = []

    def step(i, x, d, output, noise):
        ds.insert(0, d)
        past, after, noise = levels[: i + 1][::-1], levels[i + 1], 1.02 * noise
        if after.sigma == 0:
            return after.alpha * d
        how = {"eta": eta, "noise": noise}
        at_most = min(order, len(ds))
        if at_most == 1:
            return sampler.dpm_solver_pp_sde(x, d, past[0], after, noise, eta)
        if at_most == 2:
            of = kind if order == 2 else "heun"
            return sampler.dpm_solver_pp_2m(x, d, ds[1], past[1], past[0], after, kind=of, **how)
        return sampler.dpm_solver_pp_3m(x, ds[:3], past[:3], after, **how)

    rows = table.dpm_solver_pp(levels, prediction, order, kind, eta, 1.02, lower_order_final=False)
    assert_same(by_rows(rows, levels), loop(levels, step, prediction))


def test_lower_orders_at_the_end():
    rows = table.dpm_solver_pp(preserving(9), order=3)
    assert [bool(r.h1) + bool(r.h2) for r in rows] == [0, 1, 2, 2, 2, 2, 2, 1, 0]


@pytest.mark.parametrize("schedule", [preserving, flow])
@pytest.mark.parametrize("b", ["bh1", "bh2"])
def test_unipc(b, schedule):
    levels = schedule(8)
    prediction = "flow" if schedule is flow else "v"
    ds, state = [], {"order": 1}

    def step(i, x, d, output, noise):
        past = levels[: i + 1][::-1]
        if i:
            order = state["order"]
            x = sampler.unipc_corrector(state["last"], d, ds[:order], past[1 : 1 + order], past[0], b)
        order = min(2, i + 1, len(levels) - 1 - i)
        ds.insert(0, d)
        state.update(last=x, order=order)
        after = levels[i + 1]
        return sampler.unipc_predictor(x, ds[:order], past[:order], after, b) if after.sigma else after.alpha * d

    assert_same(by_rows(table.unipc(levels, prediction, b), levels), loop(levels, step, prediction))


def test_flows():
    levels = flow()

    def euler(i, x, d, output, noise):
        return sampler.flow_euler(x, output, levels[i].sigma, levels[i + 1].sigma)

    def stochastic(i, x, d, output, noise):
        return sampler.flow_stochastic(d, levels[i + 1].sigma, noise)

    assert_same(by_rows(table.flow_euler(levels), levels), loop(levels, euler, "flow"))
    assert_same(by_rows(table.flow_stochastic(levels), levels), loop(levels, stochastic, "flow"))


def test_latent_consistency():
    levels = preserving(4)
    scalings = [(0.25 / (s * s + 0.25), s / math.sqrt(s * s + 0.25)) for s in (9.0, 6.0, 2.0, 0.4)]

    def step(i, x, d, output, noise):
        last = i == len(scalings) - 1
        return sampler.consistency(x, d, *scalings[i], levels[i + 1], None if last else noise)

    assert_same(by_rows(table.latent_consistency(levels, scalings), levels), loop(levels, step))
