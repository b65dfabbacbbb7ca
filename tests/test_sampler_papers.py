"""pyperf_dl.reference.sampler beside the steps of diffusers, both in float64."""

import importlib
import math

import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is not installed")
import diffusers

from pyperf_dl.reference import sampler
from pyperf_dl.reference.sampler import Level

STEPS = 8
ROUNDED = 1e-6  # of peers that round the sample, or a coefficient, to float32


def model(x, t):
    """Any smooth function of the sample and the time."""
    return torch.tanh(1.3 * x.roll(1, -1) - 0.4 * x.mean((1, 2, 3), keepdim=True) + float(t) / 1000)


def peer(name, monkeypatch, **config):
    """A scheduler of diffusers whose own numbers are float64, and the noise that it draws, which is one tensor."""
    scheduler = getattr(diffusers, name)(**config)
    for key in ("betas", "alphas", "alphas_cumprod", "final_alpha_cumprod"):
        value = getattr(scheduler, key, None)
        if isinstance(value, torch.Tensor):
            setattr(scheduler, key, value.double())
    scheduler.set_timesteps(STEPS)
    if isinstance(getattr(scheduler, "sigmas", None), torch.Tensor):
        scheduler.sigmas = scheduler.sigmas.double()
    noise = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    module = importlib.import_module(type(scheduler).__module__)
    if hasattr(module, "randn_tensor"):
        monkeypatch.setattr(module, "randn_tensor", lambda shape, **how: noise)
    return scheduler, noise


def stepped(scheduler, x, **how):
    """For each step its index, the time, the sample, what the model says, and what the peer makes of them."""
    for i, t in enumerate(scheduler.timesteps):
        output = model(scheduler.scale_model_input(x, t).double(), t)
        result = scheduler.step(output, t, x, **how)
        yield i, t, x, output, result
        x = result.prev_sample.double()


def start(sigma=1.0):
    return sigma * torch.randn(2, 3, 4, 5, dtype=torch.float64)


def assert_near(got, want, tolerance=1e-9):
    assert torch.allclose(got, want.double(), rtol=0, atol=tolerance * max(1.0, float(want.abs().max()))), (
        (got - want).abs().max()
    )


def preserving(scheduler):
    """Levels of the timesteps, and the one that they end at."""
    levels = [scheduler.alphas_cumprod[int(t)] for t in scheduler.timesteps] + [scheduler.final_alpha_cumprod]
    return [Level(math.sqrt(float(a)), math.sqrt(1 - float(a))) for a in levels]


PREDICTIONS = {"epsilon": "epsilon", "sample": "x0", "v_prediction": "v"}


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddim(prediction, eta, clip, monkeypatch):
    scheduler, noise = peer("DDIMScheduler", monkeypatch, prediction_type=prediction, clip_sample=clip)
    levels = preserving(scheduler)
    for rederive in (False, True):
        for i, _, x, output, result in stepped(scheduler, start(), eta=eta, use_clipped_model_output=rederive):
            d = raw = sampler.denoised(x, output, levels[i], PREDICTIONS[prediction])
            if clip:
                d = d.clamp(-1, 1)
            epsilon = sampler.noise_in(x, d if rederive else raw, levels[i])
            got = sampler.ddim(x, d, epsilon, levels[i], levels[i + 1], eta, noise)
            assert_near(d, result.pred_original_sample)
            assert_near(got, result.prev_sample)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
def test_ddpm(variance, monkeypatch):
    scheduler, noise = peer("DDPMScheduler", monkeypatch, variance_type=variance, clip_sample=False)
    scheduler.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    levels = preserving(scheduler)
    x = start()
    for i, t in enumerate(scheduler.timesteps):
        output = model(x, t)
        v = torch.sin(3 * output)
        d = sampler.denoised(x, output, levels[i], "epsilon")
        posterior, forward = sampler.ddpm_variances(levels[i], levels[i + 1])
        deviation = math.sqrt(forward if variance == "fixed_large" else max(posterior, 1e-20))
        if variance == "learned_range":
            output = torch.cat([output, v], 1)
            deviation = sampler.learned_deviation(v, levels[i], levels[i + 1]) if i < STEPS - 1 else 0.0
        want = scheduler.step(output, t, x).prev_sample
        last = i == STEPS - 1
        assert_near(sampler.ddpm(x, d, levels[i], levels[i + 1], deviation, None if last else noise), want)
        x = want


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_euler(prediction, monkeypatch):
    scheduler, _ = peer("EulerDiscreteScheduler", monkeypatch, prediction_type=prediction)
    sigmas = scheduler.sigmas.tolist()
    for i, _, x, output, result in stepped(scheduler, start(sigmas[0])):
        d = sampler.denoised(x, output, Level(1.0, sigmas[i]), PREDICTIONS[prediction])
        assert_near(sampler.euler(x, d, sigmas[i], sigmas[i + 1]), result.prev_sample, ROUNDED)


def test_churn(monkeypatch):
    """The peer adds the noise when the model has run."""
    scheduler, noise = peer("EulerDiscreteScheduler", monkeypatch)
    sigmas = scheduler.sigmas.tolist()
    gamma = min(0.8 / (len(sigmas) - 1), 2**0.5 - 1)
    for i, _, x, output, result in stepped(scheduler, start(sigmas[0]), s_churn=0.8, s_noise=1.01):
        churned, sigma = sampler.churned(x, sigmas[i], gamma, 1.01 * noise)
        d = sampler.denoised(churned, output, Level(1.0, sigma), "epsilon")
        assert_near(sampler.euler(churned, d, sigma, sigmas[i + 1]), result.prev_sample, ROUNDED)


def test_euler_ancestral(monkeypatch):
    scheduler, noise = peer("EulerAncestralDiscreteScheduler", monkeypatch)
    sigmas = scheduler.sigmas.tolist()
    for i, _, x, output, result in stepped(scheduler, start(sigmas[0])):
        d = sampler.denoised(x, output, Level(1.0, sigmas[i]), "epsilon")
        assert_near(sampler.euler_ancestral(x, d, sigmas[i], sigmas[i + 1], noise), result.prev_sample, ROUNDED)


def test_heun(monkeypatch):
    scheduler, _ = peer("HeunDiscreteScheduler", monkeypatch)
    sigmas = scheduler.sigmas.tolist()
    first = None
    for i, _, x, output, result in stepped(scheduler, start(sigmas[0])):
        if i % 2 == 0:
            d = sampler.denoised(x, output, Level(1.0, sigmas[i]), "epsilon")
            assert_near(sampler.euler(x, d, sigmas[i], sigmas[i + 1]), result.prev_sample)
            first = x, d, sigmas[i]
        else:
            d = sampler.denoised(x, output, Level(1.0, sigmas[i]), "epsilon")
            before, d_before, sigma = first
            assert_near(sampler.heun(before, d_before, x, d, sigma, sigmas[i]), result.prev_sample)


def test_lms(monkeypatch):
    scheduler, _ = peer("LMSDiscreteScheduler", monkeypatch)
    sigmas = scheduler.sigmas.tolist()
    slopes = []
    for i, _, x, output, result in stepped(scheduler, start(sigmas[0])):
        d = sampler.denoised(x, output, Level(1.0, sigmas[i]), "epsilon")
        slopes = [sampler.slope(x, d, sigmas[i]), *slopes[:3]]
        # the peer integrates numerically, to 1e-4 of each weight
        assert_near(sampler.lms(x, slopes, sigmas[i::-1][:4], sigmas[i + 1]), result.prev_sample, 1e-4)


def scaled(sigmas):
    """Levels of a variance-preserving process from sigma / alpha."""
    return [Level(1 / math.sqrt(1 + s * s), s / math.sqrt(1 + s * s)) for s in sigmas]


@pytest.mark.parametrize("kind", ["midpoint", "heun"])
@pytest.mark.parametrize("algorithm", ["dpmsolver++", "sde-dpmsolver++"])
def test_dpm_solver_2m(algorithm, kind, monkeypatch):
    scheduler, noise = peer("DPMSolverMultistepScheduler", monkeypatch, algorithm_type=algorithm, solver_type=kind)
    levels = scaled(scheduler.sigmas.tolist())
    eta = float("sde" in algorithm)
    before = None
    for i, _, x, output, result in stepped(scheduler, start(), variance_noise=noise):
        d = sampler.denoised(x, output, levels[i], "epsilon")
        how = {"eta": eta, "noise": noise if eta else None}
        if before is None or i == STEPS - 1:  # it ends at order 1
            got = sampler.dpm_solver_pp(x, d, levels[i], levels[i + 1])
            if eta:
                got = sampler.dpm_solver_pp_sde(x, d, levels[i], levels[i + 1], noise)
        else:
            got = sampler.dpm_solver_pp_2m(x, d, before, levels[i - 1], levels[i], levels[i + 1], kind=kind, **how)
        assert_near(got, result.prev_sample, ROUNDED)
        before = d


def test_dpm_solver_3m(monkeypatch):
    scheduler, _ = peer("DPMSolverMultistepScheduler", monkeypatch, solver_order=3, lower_order_final=False)
    levels = scaled(scheduler.sigmas.tolist())
    ds = []
    for i, _, x, output, result in stepped(scheduler, start()):
        ds = [sampler.denoised(x, output, levels[i], "epsilon"), *ds[:2]]
        if len(ds) == 3 and i < STEPS - 1:
            assert_near(sampler.dpm_solver_pp_3m(x, ds, levels[i::-1][:3], levels[i + 1]), result.prev_sample, ROUNDED)


@pytest.mark.parametrize("b", ["bh1", "bh2"])
def test_unipc(b, monkeypatch):
    scheduler, _ = peer("UniPCMultistepScheduler", monkeypatch, solver_type=b)
    levels = scaled(scheduler.sigmas.tolist())
    ds, last, order = [], None, 1
    for i, _, x, output, result in stepped(scheduler, start()):
        d = sampler.denoised(x, output, levels[i], "epsilon")
        if last is not None:  # of the order that the predictor had
            x = sampler.unipc_corrector(last, d, ds[:order], levels[:i][::-1][:order], levels[i], b)
        order = min(2, len(ds) + 1, STEPS - i)
        ds, last = [d, *ds[:1]], x
        got = sampler.unipc_predictor(x, ds[:order], levels[i::-1][:order], levels[i + 1], b)
        if b == "bh2" or i < STEPS - 1:  # where the peer has NaN
            assert_near(got, result.prev_sample)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_plms(prediction, monkeypatch):
    scheduler, _ = peer("PNDMScheduler", monkeypatch, skip_prk_steps=True, prediction_type=prediction)
    apart = 1000 // STEPS

    def level(t):
        a = float(scheduler.alphas_cumprod[t] if t >= 0 else scheduler.final_alpha_cumprod)
        return Level(math.sqrt(a), math.sqrt(1 - a))

    def noise_of(x, output, now):  # the peer extrapolates outputs, velocities too
        return output if prediction == "epsilon" else now.alpha * output + now.sigma * x

    outputs, first = [], None
    for i, t, x, output, result in stepped(scheduler, start()):
        if i == 1:  # it takes the first step again, with the mean of both its ends
            now, after, x, mixed = level(int(t) + apart), level(int(t)), first, (output + outputs[0]) / 2
        else:
            outputs, first = [output, *outputs[:3]], x if i == 0 else first
            now, after, mixed = level(int(t)), level(int(t) - apart), sampler.extrapolated(outputs)
        assert_near(sampler.transferred(x, noise_of(x, mixed, now), now, after), result.prev_sample)
        if prediction == "epsilon" and i != 1:
            assert_near(sampler.plms(x, outputs, now, after), result.prev_sample)


def test_latent_consistency(monkeypatch):
    scheduler, noise = peer("LCMScheduler", monkeypatch)
    levels = preserving(scheduler)
    for i, t, x, output, result in stepped(scheduler, start()):
        d = sampler.denoised(x, output, levels[i], "epsilon")
        c_skip, c_out = scheduler.get_scalings_for_boundary_condition_discrete(int(t))
        last = i == STEPS - 1
        assert_near(
            sampler.consistency(x, d, c_skip, c_out, levels[i + 1], None if last else noise),
            result.prev_sample,
            ROUNDED,
        )


@pytest.mark.parametrize("stochastic", [False, True])
def test_flow_match_euler(stochastic, monkeypatch):
    scheduler, noise = peer("FlowMatchEulerDiscreteScheduler", monkeypatch, stochastic_sampling=stochastic)
    monkeypatch.setattr(torch, "randn_like", lambda x: noise.to(x.dtype))
    sigmas = scheduler.sigmas.tolist()
    x = start()
    for i, t in enumerate(scheduler.timesteps):
        output = model(x, t)
        want = scheduler.step(output, t, x).prev_sample.double()
        if stochastic:
            d = sampler.denoised(x, output, Level(1 - sigmas[i], sigmas[i]), "flow")
            got = sampler.flow_stochastic(d, sigmas[i + 1], noise)
        else:
            got = sampler.flow_euler(x, output, sigmas[i], sigmas[i + 1])
        assert_near(got, want, ROUNDED)
        x = want


def test_flow_ancestral(monkeypatch):
    if not hasattr(diffusers, "LTXEulerAncestralRFScheduler"):
        pytest.skip("this diffusers has no such scheduler")
    scheduler, noise = peer("LTXEulerAncestralRFScheduler", monkeypatch, eta=0.7, s_noise=1.01)
    sigmas, x = scheduler.sigmas.tolist(), start()
    for i, t in enumerate(scheduler.timesteps):
        output = model(x, t)
        d = sampler.denoised(x, output, Level(1 - sigmas[i], sigmas[i]), "flow")
        want = scheduler.step(output, t, x).prev_sample.double()
        assert_near(sampler.flow_ancestral(x, d, sigmas[i], sigmas[i + 1], noise, 0.7, 1.01), want, ROUNDED)
        x = want
