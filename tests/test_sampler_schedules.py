"""Noise schedules against set_timesteps of diffusers, with betas in float64, and against formulas."""

import copy
import itertools
import math
import pickle

import numpy as np
import pytest
import torch
from peer_schedulers import peer

from pyperf_dl._sampler_schedules import NoiseSchedule

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # the peer's

ROUNDED = 2e-6  # a few roundings of the peer to float32


def built(name, steps, mu=None, **config):
    """The peer after set_timesteps, and our schedule."""
    scheduler = peer(name, **config)
    scheduler.set_timesteps(steps, **({} if mu is None else {"mu": mu}))
    return scheduler, NoiseSchedule.from_diffusers(scheduler, steps, mu=mu)


def assert_near(got, want, rtol=ROUNDED):
    torch.testing.assert_close(
        torch.tensor(got, dtype=torch.float64),
        torch.as_tensor(want).double(),
        rtol=rtol,
        atol=ROUNDED,
    )


def by_spacing(**others):
    return [
        {"timestep_spacing": spacing, **dict(zip(others, values, strict=True))}
        for spacing in ("leading", "trailing", "linspace")
        for values in itertools.product(*others.values())
    ]


@pytest.mark.parametrize("steps", [1, 7, 20, 50])
@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler"])
@pytest.mark.parametrize(
    "config",
    by_spacing(
        beta_schedule=["linear", "scaled_linear", "squaredcos_cap_v2"],
        steps_offset=[0, 1],
        rescale_betas_zero_snr=[False, True],
    ),
    ids=str,
)
def test_discrete_steps(name, config, steps):
    scheduler, schedule = built(name, steps, **config)
    assert schedule.space == "variance_preserving"
    assert schedule.initial_scale == 1 == set(schedule.input_scales).pop()
    assert schedule.timesteps == tuple(scheduler.timesteps.tolist())
    products = scheduler.alphas_cumprod[scheduler.timesteps]
    assert_near([level.alpha for level in schedule.levels[:-1]], products.sqrt(), 1e-9)
    assert_near([level.sigma for level in schedule.levels[:-1]], (1 - products).sqrt(), 1e-9)
    assert schedule.levels[-1] == (1, 0)


def test_end_of_discrete_steps():
    scheduler, schedule = built("DDIMScheduler", 10, set_alpha_to_one=False)
    assert_near(schedule.levels[-1].alpha ** 2, scheduler.final_alpha_cumprod, 1e-9)
    assert schedule.levels[-1] == schedule.levels[-2]  # leading spacing ends where that step begins
    _, schedule = built("PNDMScheduler", 10, skip_prk_steps=True, steps_offset=1)
    assert schedule.timesteps == tuple(range(901, 0, -100))


@pytest.mark.parametrize("steps", [1, 4, 7])
def test_latent_consistency(steps):
    scheduler, schedule = built("LCMScheduler", steps)
    assert schedule.timesteps == tuple(scheduler.timesteps.tolist())
    assert_near([level.alpha for level in schedule.levels[:-1]], scheduler.alphas_cumprod[scheduler.timesteps].sqrt())


def assert_like_sigmas(scheduler, schedule):
    assert schedule.space == "sigma"
    assert_near([level.sigma for level in schedule.levels], scheduler.sigmas)
    assert_near(schedule.timesteps, scheduler.timesteps)
    assert_near(schedule.initial_scale, scheduler.init_noise_sigma)
    x = torch.tensor(1.0, dtype=torch.float64)
    for t, scale in zip(scheduler.timesteps, schedule.input_scales, strict=True):
        scheduler._step_index = None
        assert_near(scale, scheduler.scale_model_input(x, t))


RANGES = [{}, *({f"use_{kind}_sigmas": True} for kind in ("karras", "exponential", "beta"))]


@pytest.mark.parametrize("steps", [2, 7, 30])
@pytest.mark.parametrize("sigmas", RANGES, ids=str)
@pytest.mark.parametrize("config", by_spacing(beta_schedule=["scaled_linear", "squaredcos_cap_v2"]), ids=str)
def test_euler(config, sigmas, steps):
    if "use_beta_sigmas" in sigmas:
        pytest.importorskip("scipy", reason="scipy is not installed")
    assert_like_sigmas(*built("EulerDiscreteScheduler", steps, steps_offset=1, **config, **sigmas))


@pytest.mark.parametrize(
    "config",
    [
        {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
        {"final_sigmas_type": "sigma_min"},
        {"use_karras_sigmas": True, "sigma_min": 0.1, "sigma_max": 12.0},
        {
            "use_karras_sigmas": True,
            "sigma_min": 0.002,
            "sigma_max": 700.0,
            "timestep_type": "continuous",
            "prediction_type": "v_prediction",
        },
        {"trained_betas": np.linspace(0.001, 0.01, 1000).tolist()},
    ],
    ids=lambda config: next(iter(config)),
)
def test_options_of_euler(config):
    assert_like_sigmas(*built("EulerDiscreteScheduler", 9, **config))


@pytest.mark.parametrize("name", ["EulerAncestralDiscreteScheduler", "LMSDiscreteScheduler"])
@pytest.mark.parametrize("config", by_spacing(beta_schedule=["linear"]), ids=str)
def test_other_sigmas(name, config):
    assert_like_sigmas(*built(name, 9, **config))


def test_heun():
    scheduler, schedule = built("HeunDiscreteScheduler", 9, use_karras_sigmas=True)
    sigmas = [level.sigma for level in schedule.levels]
    assert_near([sigmas[0], *np.repeat(sigmas[1:-1], 2), sigmas[-1]], scheduler.sigmas)
    assert_near([schedule.timesteps[0], *np.repeat(schedule.timesteps[1:], 2)], scheduler.timesteps)


@pytest.mark.parametrize("steps", [2, 7, 20])
@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
@pytest.mark.parametrize(
    "sigmas", [*RANGES, {"rescale_betas_zero_snr": True}, {"final_sigmas_type": "sigma_min"}], ids=str
)
@pytest.mark.parametrize("config", by_spacing(beta_schedule=["scaled_linear", "squaredcos_cap_v2"]), ids=str)
def test_multistep(name, config, sigmas, steps):
    if "use_beta_sigmas" in sigmas:
        pytest.importorskip("scipy", reason="scipy is not installed")
    assert_like_multistep(*built(name, steps, **config, **sigmas))


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("DPMSolverMultistepScheduler", {"use_lu_lambdas": True}),
        ("DPMSolverMultistepScheduler", {"lambda_min_clipped": -5.1, "beta_schedule": "squaredcos_cap_v2"}),
        ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True, "flow_shift": 3.0}),
        ("UniPCMultistepScheduler", {"use_flow_sigmas": True, "flow_shift": 3.0}),
        ("UniPCMultistepScheduler", {"use_flow_sigmas": True, "shift_terminal": 0.1}),
        ("UniPCMultistepScheduler", {"use_karras_sigmas": True, "sigma_min": 0.1, "final_sigmas_type": "sigma_min"}),
    ],
)
def test_options_of_multistep(name, config):
    assert_like_multistep(*built(name, 8, **config))


def assert_like_multistep(scheduler, schedule):
    pairs = [scheduler._sigma_to_alpha_sigma_t(s) for s in scheduler.sigmas.double()]
    assert_near([level.alpha for level in schedule.levels], torch.stack([a for a, _ in pairs]), 1e-5)
    assert_near([level.sigma for level in schedule.levels], torch.stack([s for _, s in pairs]))
    got, want = torch.tensor(schedule.timesteps), scheduler.timesteps
    assert torch.equal(got, want), (got, want)
    assert schedule.initial_scale == scheduler.init_noise_sigma == 1


@pytest.mark.parametrize("steps", [2, 4, 28])
@pytest.mark.parametrize("sigmas", RANGES, ids=str)
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"shift": 3.0},
        {"shift": 3.0, "shift_terminal": 0.1},
        {"use_dynamic_shifting": True},
        {"use_dynamic_shifting": True, "time_shift_type": "linear", "shift_terminal": 0.02},
    ],
    ids=str,
)
def test_flow(config, sigmas, steps):
    if "use_beta_sigmas" in sigmas:
        pytest.importorskip("scipy", reason="scipy is not installed")
    mu = 0.9 if "use_dynamic_shifting" in config else None
    scheduler, schedule = built("FlowMatchEulerDiscreteScheduler", steps, mu, **config, **sigmas)
    assert schedule.space == "flow"
    assert schedule.initial_scale == 1 == set(schedule.input_scales).pop()
    assert_near([level.sigma for level in schedule.levels], scheduler.sigmas)
    assert_near([1 - level.alpha for level in schedule.levels], scheduler.sigmas)
    assert_near(schedule.timesteps, scheduler.timesteps)


def test_flow_as_pipelines_ask_for_it():
    """Sigmas from 1 to 1 / n, which set_timesteps is given and shifts."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 6, 6))
    assert_near([level.sigma for level in NoiseSchedule.flow(6, shift=3.0).levels], scheduler.sigmas)


def test_other_flows():
    for name in ("FlowMatchLCMScheduler", "LTXEulerAncestralRFScheduler"):
        scheduler, schedule = built(name, 6)
        assert_near([level.sigma for level in schedule.levels], scheduler.sigmas)
        assert_near(schedule.timesteps, scheduler.timesteps)
    scheduler, schedule = built("FlowMatchHeunDiscreteScheduler", 6, shift=2.0)
    sigmas = [level.sigma for level in schedule.levels]
    assert_near([sigmas[0], *np.repeat(sigmas[1:-1], 2), sigmas[-1]], scheduler.sigmas)


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("kind", ["karras", "exponential"])
@pytest.mark.parametrize("name", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"])
def test_edm(name, kind, final):
    assert_like_sigmas(*built(name, 9, sigma_schedule=kind, final_sigmas_type=final, sigma_data=0.7, rho=5.0))


@pytest.mark.parametrize("steps", [1, 2, 6])
def test_consistency(steps):
    scheduler, schedule = built("CMStochasticIterativeScheduler", steps)
    assert_like_sigmas(scheduler, schedule)


def test_configurations():
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    config = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "steps_offset": 1}
    scheduler, schedule = built("DDIMScheduler", 5, beta_schedule="scaled_linear", steps_offset=1)
    assert NoiseSchedule.from_diffusers(config, 5) == schedule
    assert NoiseSchedule.from_diffusers(type("Own", (type(scheduler),), {})(**scheduler.config), 5) == schedule


# ---- formulas ----


def test_betas():
    schedule = NoiseSchedule.from_betas(1000, "linear", beta_start=1e-4, beta_end=0.02)
    products = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[::-1]
    assert_near([level.alpha for level in schedule.levels[:-1]], np.sqrt(products).copy(), 1e-12)
    in_sigmas = NoiseSchedule.from_betas(1000, "linear", beta_start=1e-4, beta_end=0.02, space="sigma")
    assert_near([level.sigma for level in in_sigmas.levels[:-1]], np.sqrt((1 - products) / products), 1e-12)
    assert schedule.timesteps == in_sigmas.timesteps == tuple(range(999, -1, -1))


def test_zero_terminal_snr():
    schedule = NoiseSchedule.from_betas(10, zero_terminal_snr=True, spacing="trailing")
    assert schedule.levels[0] == (0, 1)
    in_sigmas = NoiseSchedule.from_betas(10, zero_terminal_snr=True, spacing="trailing", space="sigma")
    assert math.isclose(in_sigmas.levels[0].sigma, math.sqrt(2**24 - 1))
    for (alpha, sigma), (_, ratio) in zip(schedule.levels[1:], in_sigmas.levels[1:], strict=True):
        assert math.isclose(sigma, ratio * alpha, abs_tol=1e-15)


@pytest.mark.parametrize("kind", ["karras", "exponential", "beta"])
def test_sigma_range(kind):
    low, high, u = 0.03, 14.6, np.linspace(0, 1, 9)
    if kind == "karras":
        want = (high ** (1 / 5) + u * (low ** (1 / 5) - high ** (1 / 5))) ** 5
    elif kind == "exponential":
        want = np.geomspace(high, low, 9)
    else:
        stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
        want = low + (high - low) * stats.beta.ppf(1 - u, 0.6, 0.6)
    schedule = NoiseSchedule.from_sigma_range(9, low, high, sigmas=kind, rho=5.0)
    assert_near([level.sigma for level in schedule.levels], [*want, 0.0], 1e-12)
    assert_near(schedule.timesteps, np.log(want) / 4, 1e-12)
    assert_near(schedule.input_scales, (want**2 + 0.25) ** -0.5, 1e-12)
    assert_near(schedule.initial_scale, high, 1e-12)
    of_betas = NoiseSchedule.from_betas(9, sigmas=kind, sigma_min=low, sigma_max=high, rho=5.0)
    assert_near([level.sigma / level.alpha for level in of_betas.levels], [*want, 0.0], 1e-12)


def test_timesteps_between():
    """Of sigmas in training they are the step itself, and halfway between two in the logarithm."""
    schedule = NoiseSchedule.from_betas(1000, space="sigma")
    sigmas = [level.sigma for level in schedule.levels[:-1]][::-1]
    assert_near([schedule.timestep_of(s) for s in sigmas], np.arange(1000.0), 1e-12)
    assert_near(schedule.timestep_of(math.sqrt(sigmas[41] * sigmas[42])), 41.5, 1e-12)
    assert schedule.timestep_of(2 * sigmas[-1]) == 999
    assert schedule.timestep_of(sigmas[0] / 2) == 0


def test_explicit_sigmas():
    schedule = NoiseSchedule.from_sigmas([4.0, 1.0, 0.0])
    assert schedule.levels == ((1, 4), (1, 1), (1, 0))
    assert schedule.initial_scale == 4
    assert_near(schedule.timesteps, [math.log(4) / 4, 0.0], 1e-12)
    assert NoiseSchedule.from_sigmas(torch.tensor([4.0, 1.0, 0.0])) == schedule
    flow = NoiseSchedule.from_sigmas([1.0, 0.25, 0.125], space="flow")
    assert flow.levels == ((0, 1), (0.75, 0.25), (0.875, 0.125))
    assert flow.timesteps == (1000, 250)
    preserving = NoiseSchedule.from_sigmas([math.inf, 0.75, 0], space="variance_preserving", timesteps=[9, 3])
    assert_near(preserving.levels, [[0, 1], [0.8, 0.6], [1, 0]], 1e-12)
    assert preserving.timesteps == (9, 3)


def test_values():
    """Schedules are values: equal, hashable, copied, pickled, and not assigned to."""
    for schedule in (NoiseSchedule.from_betas(4), NoiseSchedule.flow(4), NoiseSchedule.from_sigma_range(4)):
        again = pickle.loads(pickle.dumps(copy.deepcopy(schedule)))
        assert again == schedule
        assert hash(again) == hash(schedule)
        assert again.timestep_of(0.5) == schedule.timestep_of(0.5)
        with pytest.raises(AttributeError):
            schedule.space = "sigma"


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: NoiseSchedule.from_betas(0), ValueError, "from_betas: steps must be >= 1, got 0"),
        (lambda: NoiseSchedule.from_betas(4.0), TypeError, "from_betas: steps must be an int, got 4.0"),
        (lambda: NoiseSchedule.from_betas(1001), ValueError, "steps must be at most those of training, 1000, got 1001"),
        (lambda: NoiseSchedule.from_betas(4, "cubic"), ValueError, "betas must be one of 'linear', .* got 'cubic'"),
        (lambda: NoiseSchedule.from_betas(4, [0.1, 1.5]), ValueError, r"betas must be in \[0.0, 1.0\], got 1.5"),
        (
            lambda: NoiseSchedule.from_betas(4, [0.1, 0.0]),
            ValueError,
            "betas must be 2 or more numbers between 0 and 1",
        ),
        (lambda: NoiseSchedule.from_betas(4, space="flow"), ValueError, "space must be one of .* got 'flow'"),
        (lambda: NoiseSchedule.from_betas(4, spacing="even"), ValueError, "spacing must be one of .* got 'even'"),
        (lambda: NoiseSchedule.from_betas(2, timesteps=[9]), ValueError, "timesteps must be 2, the steps, got 1"),
        (
            lambda: NoiseSchedule.from_betas(1, timesteps=[1000]),
            ValueError,
            r"timesteps must be in \[0, 999\], got 1000",
        ),
        (lambda: NoiseSchedule.from_betas(2, timesteps=[9, 99]), ValueError, "sigma / alpha must descend"),
        (
            lambda: NoiseSchedule.from_betas(4, zero_terminal_snr=1),
            TypeError,
            "zero_terminal_snr must be a bool, got 1",
        ),
        (lambda: NoiseSchedule.from_betas(4, final_sigma=9.0), ValueError, "sigma / alpha must descend"),
        (
            lambda: NoiseSchedule.from_betas(4, final_sigma=-1),
            ValueError,
            "from_betas: final_sigma must be >= 0.0, got -1",
        ),
        (lambda: NoiseSchedule.from_sigma_range(4, 2.0, 1.0), ValueError, "sigma_min must be positive and less than"),
        (lambda: NoiseSchedule.from_sigma_range(4, rho=0.0), ValueError, "rho must be positive, got 0.0"),
        (lambda: NoiseSchedule.from_sigma_range(4, sigmas="even"), ValueError, "sigmas must be one of .* got 'even'"),
        (lambda: NoiseSchedule.from_sigmas([1.0]), ValueError, "sigmas must be 2 or more"),
        (lambda: NoiseSchedule.from_sigmas([1.0, 2.0]), ValueError, "sigma / alpha must descend, got .* at step 0"),
        (lambda: NoiseSchedule.from_sigmas([2.0, 1.0, 1.0, 0.0]), ValueError, "must descend, got .* at step 1"),
        (lambda: NoiseSchedule.from_sigmas([1.0, 0.0, 0.0]), ValueError, "only the last be 0"),
        (lambda: NoiseSchedule.from_sigmas([1.0, -1.0]), ValueError, "sigmas must be >= 0.0, got -1.0"),
        (lambda: NoiseSchedule.from_sigmas([math.nan, 1.0]), ValueError, "sigmas must be >= 0.0, got nan"),
        (lambda: NoiseSchedule.from_sigmas([math.inf, 1.0]), ValueError, "levels must be those of space 'sigma'"),
        (lambda: NoiseSchedule.from_sigmas(["1", 0.0]), TypeError, "sigmas must be a number, got '1'"),
        (lambda: NoiseSchedule.from_sigmas([2.0, 1.0], space="flow"), ValueError, r"sigmas must be in \[0.0, 1.0\]"),
        (
            lambda: NoiseSchedule.from_sigmas([2.0, 1.0], space="variance_preserving"),
            ValueError,
            "timesteps must be given",
        ),
        (lambda: NoiseSchedule.flow(0), ValueError, "flow: steps must be >= 1, got 0"),
        (lambda: NoiseSchedule.flow(4, shift=0), ValueError, "the shift and sigma_min must be positive, got 0.0"),
        (lambda: NoiseSchedule.flow(4, mu=0, mu_kind="linear"), ValueError, "the shift and sigma_min must be positive"),
        (lambda: NoiseSchedule.flow(1, shift_terminal=0.1), ValueError, "shift_terminal must be below 1, with 2 steps"),
        (lambda: NoiseSchedule([(1.0, 0.5)], [], "sigma"), ValueError, "levels must be one more than timesteps"),
        (lambda: NoiseSchedule([(1, 1), (1, 0)], [9], "flow"), ValueError, "levels must be those of space 'flow'"),
        (lambda: NoiseSchedule([(1, 1), (1, 0)], [9], "other"), ValueError, "space must be one of .* got 'other'"),
        (lambda: NoiseSchedule([(1, 1), (1, 0)], [True], "sigma"), TypeError, "timesteps must be a number, got True"),
        (lambda: NoiseSchedule.from_diffusers(3, 4), TypeError, "must be a scheduler of diffusers .* got 3"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message) as caught:
        call()
    assert str(caught.value).startswith("NoiseSchedule")


def test_errors_of_peers():
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    for call, message in [
        (
            lambda: NoiseSchedule.from_diffusers({"beta_start": 1}, 4),
            "the name of a scheduler as _class_name, got None",
        ),
        (lambda: NoiseSchedule.from_diffusers(diffusers.VQDiffusionScheduler(10), 4), "must be one of DDIM.* got VQ"),
        (
            lambda: NoiseSchedule.from_diffusers(diffusers.DDPMScheduler(beta_schedule="sigmoid"), 4),
            "beta_schedule must be one of .* got 'sigmoid'",
        ),
        (
            lambda: NoiseSchedule.from_diffusers(
                diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), 4
            ),
            "mu must be given",
        ),
        (
            lambda: NoiseSchedule.from_diffusers(diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True), 4),
            "invert_sigmas must be False, got True",
        ),
        (
            lambda: NoiseSchedule.from_diffusers(diffusers.EulerDiscreteScheduler(interpolation_type="log_linear"), 4),
            "interpolation_type must be 'linear', got 'log_linear'",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
