"""Whole loops that a StepTable drives, through the operator in plain PyTorch, in float64: against the samplers of the
papers, and against diffusers."""

import copy
import importlib
import math
import pickle

import pytest
import torch
from peer_schedulers import peer

from pyperf_dl import _sampler_table
from pyperf_dl._sampler_schedules import NoiseSchedule
from pyperf_dl._sampler_step_table import StepTable
from pyperf_dl.reference import _sampler_linear, sampler
from pyperf_dl.reference.sampler import Level

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # the peer's

SHAPE = (2, 3, 4, 5)
STEPS = 8
EXACT = 1e-11
ROUNDED = 3e-6  # of peers that round samples or coefficients to float32

PRESERVING = NoiseSchedule.from_betas(STEPS, spacing="trailing")
NO_SIGNAL = NoiseSchedule.from_betas(STEPS, spacing="trailing", zero_terminal_snr=True)
IN_SIGMAS = NoiseSchedule.from_betas(STEPS, sigmas="karras", space="sigma")
EDM = NoiseSchedule.from_sigma_range(STEPS, 0.03, 14.0)
FLOW = NoiseSchedule.flow(STEPS, shift=2.0)
# ends with some noise
OPEN = NoiseSchedule.from_betas(STEPS, spacing="trailing", space="sigma", final_sigma=None)
OPEN_FLOW = NoiseSchedule.from_sigmas([0.99, 0.7, 0.4, 0.2], space="flow")
SCHEDULES = {
    "preserving": PRESERVING,
    "no signal": NO_SIGNAL,
    "sigmas": IN_SIGMAS,
    "edm": EDM,
    "flow": FLOW,
    "open": OPEN,
    "open flow": OPEN_FLOW,
}


def model(x, t, channels=3):
    """Any smooth function of the sample and the time."""
    output = torch.tanh(1.3 * x.roll(1, -1) - 0.4 * x.mean((1, 2, 3), keepdim=True) + float(t) / 1000)
    return output if channels == 3 else torch.cat([output, torch.sin(3 * output)], 1)


def noises(count):
    torch.manual_seed(0)
    return torch.randn(count + 2, *SHAPE, dtype=torch.float64)


def by_table(table, *, clip=math.inf, first=None):
    """x before the first row and after each. The noise of row i is noises[i + 1], that of the first churn the last."""
    noise = noises(len(table))
    x = table.initial_scale * noise[0] if first is None else first
    x = x + table.first_noise * noise[-1]
    seen = table.first_input_scale * x
    samples, kept, last = [x], [], None
    for i in range(len(table)):
        output, variance = model(seen, table.timesteps[i], 6 if table.learned_variance else 3), None
        if table.learned_variance:
            output, variance = output.chunk(2, 1)
        history = [kept[k] if k < table.history[i] else None for k in range(3)]
        after, d, keep, corrected, seen = _sampler_linear.sampler_step(
            x, output, None, variance, *history, last if table.corrects[i] else None,
            noise[i + 1] if table.noisy[i] else None, table.coefficients, None, None, None, None, None,
            i, 0.0, -clip, clip, 0, True, table.keeps == "combination", 1, 1,
        )  # fmt: skip
        seen = seen[0]
        if table.keeps != "nothing":
            kept = [d if table.keeps == "denoised" else keep, *kept[:2]]
        last = corrected if table.corrects[i] else x
        x = after
        samples.append(x)
    return samples


def by_paper(schedule, prediction, step, clip=math.inf):
    """step(i, x, d, output, noise) -> the next sample; prediction: a name, or output to D."""
    noise = noises(len(schedule))
    x = schedule.initial_scale * noise[0]
    samples = [x]
    for i, t in enumerate(schedule.timesteps):
        output = model(x * schedule.input_scales[i], t)
        d = denoised(x, output, schedule, schedule.levels[i], prediction).clamp(-clip, clip)
        x = step(i, x, d, output, noise[i + 1])
        samples.append(x)
    return samples


def denoised(x, output, schedule, level, prediction):
    if prediction != "edm":
        return sampler.denoised(x, output, level, prediction)
    square = level.sigma**2 + schedule.sigma_data**2
    return schedule.sigma_data**2 / square * x + level.sigma * schedule.sigma_data / math.sqrt(square) * output


def assert_same(got, want, tolerance=EXACT):
    assert len(got) == len(want)
    for step, (a, b) in enumerate(zip(got, want, strict=True)):
        error = float((a - b).abs().max() / b.abs().max())
        assert error < tolerance, (step, error)


def cases(*names, predictions=None):
    """Schedules and what may be predicted on them."""
    own = {
        "preserving": ["epsilon", "x0", "v"],
        "no signal": ["x0", "v"],
        "sigmas": ["epsilon", "x0", "v"],
        "edm": ["edm"],
        "flow": ["x0", "flow"],
        "open": ["epsilon", "v"],
        "open flow": ["epsilon", "flow"],
    }
    return [(name, each) for name in names for each in own[name] if predictions is None or each in predictions]


def test_columns():
    assert (*_sampler_table.Row._fields, "input") == _sampler_linear.COLUMNS


@pytest.mark.parametrize("rederive", [False, True])
@pytest.mark.parametrize("eta", [0.0, 0.6])
@pytest.mark.parametrize(("name", "prediction"), cases("preserving", "no signal"))
def test_ddim(name, prediction, eta, rederive):
    schedule = SCHEDULES[name]

    def step(i, x, d, output, noise):
        now, after = schedule.levels[i : i + 2]
        raw = d if rederive else sampler.denoised(x, output, now, prediction)
        return sampler.ddim(x, d, sampler.noise_in(x, raw, now), now, after, eta, noise)

    table = StepTable.ddim(schedule, prediction, eta=eta, rederive=rederive)
    assert table.noisy == tuple(eta > 0 and i < STEPS - 1 for i in range(STEPS))
    assert table.keeps == "nothing"
    assert_same(by_table(table, clip=0.7), by_paper(schedule, prediction, step, 0.7))


@pytest.mark.parametrize("variance", ["small", "large", "learned_range"])
@pytest.mark.parametrize(("name", "prediction"), cases("preserving", "no signal"))
def test_ddpm(name, prediction, variance):
    schedule = SCHEDULES[name]

    def step(i, x, d, output, noise):
        now, after = schedule.levels[i : i + 2]
        small, large = sampler.ddpm_variances(now, after)
        deviation = math.sqrt(small if variance == "small" else large)
        if variance == "learned_range" and after.sigma:
            deviation = sampler.learned_deviation(torch.sin(3 * output), now, after)
        return sampler.ddpm(x, d, now, after, deviation, noise if after.sigma else None)

    table = StepTable.ddpm(schedule, prediction, variance=variance)
    assert table.learned_variance == (variance == "learned_range")
    assert table.noisy == (True,) * (STEPS - 1) + (False,)
    assert_same(by_table(table, clip=1.0), by_paper(schedule, prediction, step, 1.0))


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_plms(prediction):
    outputs = []

    def step(i, x, d, output, noise):
        outputs.insert(0, output)
        mixed, now = sampler.extrapolated(outputs), PRESERVING.levels[i]
        epsilon = mixed if prediction == "epsilon" else now.alpha * mixed + now.sigma * x
        return sampler.transferred(x, epsilon, now, PRESERVING.levels[i + 1])

    table = StepTable.plms(PRESERVING, prediction)
    assert table.history == (0, 1, 2, 3, 3, 3, 3, 3)
    assert table.keeps == "combination"
    assert_same(by_table(table), by_paper(PRESERVING, prediction, step))


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_latent_consistency(prediction):
    schedule = NoiseSchedule.from_betas(4, timesteps=[999, 759, 499, 259])

    def step(i, x, d, output, noise):
        s = 5.0 * schedule.timesteps[i]
        scalings = 0.09 / (s * s + 0.09), s / math.sqrt(s * s + 0.09)
        return sampler.consistency(x, d, *scalings, schedule.levels[i + 1], None if i == 3 else noise)

    table = StepTable.lcm(schedule, prediction, timestep_scaling=5.0, sigma_data=0.3)
    assert table.noisy == (True, True, True, False)
    assert_same(by_table(table, clip=1.0), by_paper(schedule, prediction, step, 1.0))


@pytest.mark.parametrize(("name", "prediction"), cases("sigmas", "edm", "flow", "open", "open flow"))
def test_euler(name, prediction):
    schedule = SCHEDULES[name]

    def step(i, x, d, output, noise):
        return sampler.euler(x, d, schedule.levels[i].sigma, schedule.levels[i + 1].sigma)

    table = StepTable.euler(schedule, prediction)
    assert not any(table.noisy)
    assert_same(by_table(table, clip=2.0), by_paper(schedule, prediction, step, 2.0))


@pytest.mark.parametrize(("name", "prediction"), cases("sigmas", "edm", "open"))
def test_churn(name, prediction):
    """The noise of a step comes before the model."""
    schedule, s_noise = SCHEDULES[name], 1.01
    sigmas = [level.sigma for level in schedule.levels]
    s_churn, s_tmin, s_tmax = 1.5, sigmas[5], sigmas[1] if name == "open" else math.inf
    noise = noises(STEPS)
    x, samples = schedule.initial_scale * noise[0], []
    for i in range(STEPS):
        gamma = s_churn / STEPS if s_tmin <= sigmas[i] <= s_tmax else 0.0
        x, sigma = sampler.churned(x, sigmas[i], gamma, s_noise * noise[i or -1])
        samples.append(x)
        t = schedule.timestep_of(sigma) if gamma else schedule.timesteps[i]
        output = model(x / math.hypot(sigma, schedule.sigma_data), t)
        x = sampler.euler(x, denoised(x, output, schedule, Level(1.0, sigma), prediction), sigma, sigmas[i + 1])
    table = StepTable.edm_churn(schedule, prediction, s_churn=s_churn, s_tmin=s_tmin, s_tmax=s_tmax, s_noise=s_noise)
    # row i adds the noise of step i + 1
    assert table.noisy == (*(s_tmin <= s <= s_tmax for s in sigmas[1:-1]), False)
    assert (table.first_noise > 0) == (name != "open")
    assert_same(by_table(table), [*samples, x])


def test_churn_is_bounded():
    table = StepTable.edm_churn(EDM, "edm", s_churn=1e9)
    assert table.first_noise == pytest.approx(14.0)  # sqrt(2) sigma
    plain = StepTable.edm_churn(EDM, "edm", s_churn=0.0)
    assert torch.equal(plain.coefficients, StepTable.euler(EDM, "edm").coefficients)
    assert torch.equal(plain.timesteps, StepTable.euler(EDM, "edm").timesteps)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("name", "prediction"), cases("sigmas", "edm", "open"))
def test_euler_ancestral(name, prediction, eta):
    schedule = SCHEDULES[name]

    def step(i, x, d, output, noise):
        sigmas = schedule.levels[i].sigma, schedule.levels[i + 1].sigma
        return sampler.euler_ancestral(x, d, *sigmas, noise, eta, 1.02)

    table = StepTable.euler_ancestral(schedule, prediction, eta=eta, s_noise=1.02)
    assert_same(by_table(table), by_paper(schedule, prediction, step))


@pytest.mark.parametrize(("name", "prediction"), cases("sigmas", "edm", "flow", "open"))
def test_heun(name, prediction):
    schedule = SCHEDULES[name]
    levels = schedule.levels

    def told(x, i):
        t = schedule.timesteps[i] if i < STEPS else schedule.timestep_of(levels[i].sigma)
        output = model(x * schedule.input_scale(levels[i].sigma), t)
        return denoised(x, output, schedule, levels[i], prediction)

    x = schedule.initial_scale * noises(0)[0]
    samples = [x]
    for i in range(STEPS):
        d = told(x, i)
        x1 = sampler.euler(x, d, levels[i].sigma, levels[i + 1].sigma)
        samples.append(x1)
        if levels[i + 1].sigma:
            x1 = sampler.heun(x, d, x1, told(x1, i + 1), levels[i].sigma, levels[i + 1].sigma)
            samples.append(x1)
        x = x1
    table = StepTable.heun(schedule, prediction)
    rows = 2 * STEPS - (levels[-1].sigma == 0)
    assert len(table) == table.rows == len(table.timesteps) == rows
    assert table.history == (0, 1) * STEPS if rows % 2 == 0 else (*(0, 1) * (STEPS - 1), 0)
    first = schedule.initial_scale * noises(0)[0]
    assert_same(by_table(table, first=first), samples)


@pytest.mark.parametrize("order", [1, 4])
@pytest.mark.parametrize(("name", "prediction"), cases("sigmas", "edm", "flow", "open"))
def test_lms(name, prediction, order):
    schedule, slopes = SCHEDULES[name], []

    def step(i, x, d, output, noise):
        sigmas = [level.sigma for level in schedule.levels[i::-1]]
        slopes.insert(0, sampler.slope(x, d, sigmas[0]))
        return sampler.lms(x, slopes[:order], sigmas[:order], schedule.levels[i + 1].sigma)

    table = StepTable.lms(schedule, prediction, order=order)
    assert table.history == tuple(min(i, order - 1) for i in range(STEPS))
    assert_same(by_table(table), by_paper(schedule, prediction, step))


def test_consistency():
    schedule = NoiseSchedule.from_sigmas([80.0, 24.0, 5.8, 0.02], sigma_data=0.5)
    noise = noises(3)
    x = 80.0 * noise[0]
    samples = [x]
    for i in range(3):
        sigma, after = schedule.levels[i].sigma, schedule.levels[i + 1].sigma
        c_skip = 0.25 / ((sigma - 0.01) ** 2 + 0.25)
        c_out = (sigma - 0.01) * 0.5 / math.sqrt(sigma**2 + 0.25)
        output = model(x / math.sqrt(sigma**2 + 0.25), schedule.timesteps[i])
        d = (c_skip * x + c_out * output).clamp(-1, 1)
        x = d + 1.1 * math.sqrt(after**2 - 0.01**2) * noise[i + 1]
        samples.append(x)
    table = StepTable.consistency(schedule, sigma_min=0.01, s_noise=1.1)
    assert_same(by_table(table, clip=1.0), samples)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize(
    ("order", "kind", "lower_order_final"),
    [(1, "midpoint", True), (2, "midpoint", True), (2, "heun", False), (3, "midpoint", False), (3, "midpoint", True)],
)
@pytest.mark.parametrize(("name", "prediction"), cases(*SCHEDULES, predictions=["v", "flow", "edm"]))
def test_dpm_solver_pp(name, prediction, order, kind, lower_order_final, eta):
    schedule, ds = SCHEDULES[name], []
    levels = schedule.levels

    def step(i, x, d, output, noise):
        after, noise = levels[i + 1], 1.02 * noise
        if levels[i].alpha == 0:  # the limit of an infinite step
            return after.alpha * d + after.sigma * (noise if eta else x)
        ds.insert(0, d)
        if after.sigma == 0:
            return after.alpha * d
        how = {"eta": eta, "noise": noise}
        past = levels[i::-1]
        at_most = min(order, len(ds), len(schedule) - i if lower_order_final else order)
        if at_most == 1:
            return sampler.dpm_solver_pp_sde(x, d, past[0], after, noise, eta)
        if at_most == 2:
            of = kind if order == 2 else "heun"
            return sampler.dpm_solver_pp_2m(x, d, ds[1], past[1], past[0], after, kind=of, **how)
        return sampler.dpm_solver_pp_3m(x, ds[:3], past[:3], after, **how)

    table = StepTable.dpm_solver_pp(
        schedule, prediction, order=order, solver_type=kind, eta=eta, s_noise=1.02, lower_order_final=lower_order_final
    )
    assert table.keeps == ("nothing" if order == 1 else "denoised")
    assert_same(by_table(table), by_paper(schedule, prediction, step))


@pytest.mark.parametrize("b", ["bh1", "bh2"])
@pytest.mark.parametrize(("name", "prediction"), cases(*SCHEDULES, predictions=["v", "flow", "edm"]))
def test_unipc(name, prediction, b):
    schedule, ds, state = SCHEDULES[name], [], {"order": 1}
    levels, count = schedule.levels, len(schedule)
    if levels[0].alpha == 0 and b == "bh1":
        with pytest.raises(ValueError, match="schedule must begin with some signal for solver_type='bh1'"):
            StepTable.unipc(schedule, prediction, solver_type=b)
        return

    def step(i, x, d, output, noise):
        past, after = levels[i::-1], levels[i + 1]
        if i == 1 and levels[0].alpha == 0:  # the limit of an infinite step
            x = past[0].sigma * state["last"] + past[0].alpha * (d + ds[0]) / 2
            ds.clear()
        elif i:
            order = state["order"]
            x = sampler.unipc_corrector(state["last"], d, ds[:order], past[1 : 1 + order], past[0], b)
        ds.insert(0, d)
        order = min(2, len(ds), count - i)
        state.update(last=x, order=order)
        if levels[i].alpha == 0:
            return after.sigma * x + after.alpha * d
        return sampler.unipc_predictor(x, ds[:order], past[:order], after, b) if after.sigma else after.alpha * d

    table = StepTable.unipc(schedule, prediction, solver_type=b)
    assert table.corrects == (False,) + (True,) * (count - 1)
    assert table.keeps == "denoised"
    assert_same(by_table(table), by_paper(schedule, prediction, step))


def test_flows():
    def euler(i, x, d, output, noise):
        return sampler.flow_euler(x, output, FLOW.levels[i].sigma, FLOW.levels[i + 1].sigma)

    assert_same(by_table(StepTable.flow_euler(FLOW)), by_paper(FLOW, "flow", euler))
    for prediction in ("flow", "x0"):

        def stochastic(i, x, d, output, noise):
            return sampler.flow_stochastic(d, FLOW.levels[i + 1].sigma, noise)

        def ancestral(i, x, d, output, noise):
            return sampler.flow_ancestral(x, d, FLOW.levels[i].sigma, FLOW.levels[i + 1].sigma, noise, 0.7, 1.01)

        table = StepTable.flow_stochastic(FLOW, prediction)
        assert_same(by_table(table), by_paper(FLOW, prediction, stochastic))
        table = StepTable.flow_ancestral(FLOW, prediction, eta=0.7, s_noise=1.01)
        assert_same(by_table(table), by_paper(FLOW, prediction, ancestral))


def test_flow_sde():
    for schedule in (FLOW, OPEN_FLOW):
        sigmas = [level.sigma for level in schedule.levels]

        def step(i, x, d, output, noise, sigmas=sigmas):
            deviation = 0.6 * math.sqrt(sigmas[i] / (1 - (sigmas[i] if sigmas[i] < 1 else sigmas[1])))
            return sampler.flow_sde(x, output, *sigmas[i : i + 2], deviation, noise)

        table = StepTable.flow_sde(schedule, noise_level=0.6)
        assert all(table.noisy)
        assert_same(by_table(table), by_paper(schedule, "flow", step))


def test_flow_sde_keeps_the_marginals():
    """Of data x0 = 0 the velocity is x / sigma, and samples at sigma have that deviation, in steps that are small."""
    table = StepTable.flow_sde(NoiseSchedule.from_sigmas(torch.linspace(0.9, 0.2, 2001).tolist(), space="flow"))
    sigmas = torch.linspace(0.9, 0.2, 2001).tolist()
    variance = sigmas[0] ** 2
    for row, sigma in zip(table.coefficients.tolist(), sigmas, strict=False):
        of_x, of_m, z = row[2], row[3], row[8]
        variance = (of_x + of_m / sigma) ** 2 * variance + z**2
    assert math.sqrt(variance) == pytest.approx(0.2, rel=2e-3)


def test_last_step_that_stays():
    """Of diffusers' set_alpha_to_one=False, for one."""
    preserving = NoiseSchedule.from_betas(4, final_sigma=None)
    in_sigmas = NoiseSchedule.from_betas(4, space="sigma", final_sigma=None)
    assert preserving.levels[-1] == preserving.levels[-2]
    for table in (
        StepTable.ddim(preserving, eta=1.0),
        StepTable.ddpm(preserving, variance="learned_range"),
        StepTable.plms(preserving),
        StepTable.dpm_solver_pp(preserving, order=3, eta=1.0, lower_order_final=False),
        StepTable.unipc(preserving, lower_order_final=False),
        StepTable.euler(in_sigmas),
        StepTable.euler_ancestral(in_sigmas),
        StepTable.lms(in_sigmas),
        StepTable.heun(in_sigmas),
    ):
        *_, before, after = by_table(table)
        assert not table.noisy[-1]
        if not table.corrects[-1]:
            torch.testing.assert_close(after, before, rtol=1e-12, atol=1e-12)


# ---- diffusers ----


def by_peer(scheduler, monkeypatch, table, **how):
    """The same loop; noise is that of the step."""
    scheduler.set_timesteps(STEPS)
    if isinstance(getattr(scheduler, "sigmas", None), torch.Tensor):
        scheduler.sigmas = scheduler.sigmas.double()
    noise, step = noises(len(table)), [0]
    module = importlib.import_module(type(scheduler).__module__)
    monkeypatch.setattr(module, "randn_tensor", lambda *a, **k: noise[step[0] + 1], raising=False)
    x = table.initial_scale * noise[0]
    samples = [x]
    for i, t in enumerate(scheduler.timesteps):
        step[0] = i
        seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(model(seen.double(), t, 6 if table.learned_variance else 3), t, x, **how)[0].double()
        samples.append(x)
    return samples


KINDS = {"epsilon": "epsilon", "sample": "x0", "v_prediction": "v"}
ANY = [{"prediction_type": kind} for kind in KINDS]
TRAILING = {"timestep_spacing": "trailing", "beta_schedule": "scaled_linear"}


def check(name, monkeypatch, build, config, tolerance=ROUNDED, clip=math.inf, **how):
    scheduler = peer(name, **config)
    table = build(NoiseSchedule.from_diffusers(scheduler, STEPS), KINDS[config.get("prediction_type", "epsilon")])
    assert_same(by_table(table, clip=clip), by_peer(scheduler, monkeypatch, table, **how), tolerance)


@pytest.mark.parametrize("eta", [0.0, 0.8])
@pytest.mark.parametrize("kind", ANY, ids=str)
def test_ddim_of_diffusers(kind, eta, monkeypatch):
    config = {**kind, "clip_sample": True, "steps_offset": 1}
    for rederive in (False, True):
        check(
            "DDIMScheduler", monkeypatch, lambda s, p, r=rederive: StepTable.ddim(s, p, eta=eta, rederive=r), config,
            1e-9, 1.0, eta=eta, use_clipped_model_output=rederive,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("variance", "spacing"),  # in a last step that is not at timestep 0 the peer has the larger variances
    [("small", "leading"), ("small", "trailing"), ("large", "leading"), ("learned_range", "leading")],
)
def test_ddpm_of_diffusers(variance, spacing, monkeypatch):
    types = {"small": "fixed_small", "large": "fixed_large"}
    config = {
        "variance_type": types.get(variance, variance), "clip_sample": True, "rescale_betas_zero_snr": True,
        "prediction_type": "v_prediction", "timestep_spacing": spacing,
    }  # fmt: skip
    check("DDPMScheduler", monkeypatch, lambda s, p: StepTable.ddpm(s, p, variance=variance), config, 1e-9, 1.0)


@pytest.mark.parametrize("kind", ANY, ids=str)
def test_latent_consistency_of_diffusers(kind, monkeypatch):
    check("LCMScheduler", monkeypatch, StepTable.lcm, kind, 1e-7)  # c_skip and c_out are float32


@pytest.mark.parametrize("kind", ANY, ids=str)
@pytest.mark.parametrize("config", [{"timestep_spacing": "leading"}, {"use_karras_sigmas": True}], ids=str)
def test_euler_of_diffusers(config, kind, monkeypatch):
    check("EulerDiscreteScheduler", monkeypatch, StepTable.euler, {**config, **kind})


def test_other_sigmas_of_diffusers(monkeypatch):
    check("EulerAncestralDiscreteScheduler", monkeypatch, StepTable.euler_ancestral, TRAILING)
    check("HeunDiscreteScheduler", monkeypatch, StepTable.heun, TRAILING)
    check("LMSDiscreteScheduler", monkeypatch, StepTable.lms, TRAILING, 1e-3)  # it integrates numerically


MULTISTEP = [TRAILING, {"use_karras_sigmas": True}, {"prediction_type": "v_prediction"}]


@pytest.mark.parametrize(
    ("order", "kind", "algorithm"),
    [
        (1, "midpoint", ""),
        (2, "midpoint", ""),
        (2, "heun", ""),
        (3, "heun", ""),  # the kind with which it has fewer denoised samples
        (1, "midpoint", "sde-"),
        (2, "midpoint", "sde-"),
        (2, "heun", "sde-"),
    ],
)
@pytest.mark.parametrize("config", MULTISTEP, ids=str)
def test_dpm_solver_of_diffusers(config, order, kind, algorithm, monkeypatch):
    def build(schedule, prediction):
        return StepTable.dpm_solver_pp(schedule, prediction, order=order, solver_type=kind, eta=float(algorithm != ""))

    options = {"solver_order": order, "solver_type": kind, "algorithm_type": algorithm + "dpmsolver++", **config}
    check("DPMSolverMultistepScheduler", monkeypatch, build, options, 1e-5)


@pytest.mark.parametrize("config", MULTISTEP, ids=str)
def test_unipc_of_diffusers(config, monkeypatch):
    check("UniPCMultistepScheduler", monkeypatch, StepTable.unipc, config, 1e-5)


@pytest.mark.parametrize("name", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"])
def test_edm_of_diffusers(name, monkeypatch):
    build = StepTable.euler if name == "EDMEulerScheduler" else StepTable.dpm_solver_pp
    check(name, monkeypatch, lambda s, p: build(s, "edm"), {}, 1e-5)


def test_consistency_of_diffusers(monkeypatch):
    check("CMStochasticIterativeScheduler", monkeypatch, lambda s, p: StepTable.consistency(s), {}, 1e-5, 1.0)


def test_flows_of_diffusers(monkeypatch):
    name, config = "FlowMatchEulerDiscreteScheduler", {"shift": 3.0}
    check(name, monkeypatch, lambda s, p: StepTable.flow_euler(s), config)
    check(name, monkeypatch, lambda s, p: StepTable.euler(s, "flow"), config)
    config = {**config, "stochastic_sampling": True}
    check(name, monkeypatch, lambda s, p: StepTable.flow_stochastic(s), config)
    check("FlowMatchHeunDiscreteScheduler", monkeypatch, lambda s, p: StepTable.heun(s, "flow"), {"shift": 3.0})
    name, config = "LTXEulerAncestralRFScheduler", {"eta": 0.7, "s_noise": 1.01}
    check(name, monkeypatch, lambda s, p: StepTable.flow_ancestral(s, eta=0.7, s_noise=1.01), config)


# ---- the object ----


def test_table_of_rows():
    """One's own sampler."""
    rows = [
        _sampler_table.Row(1.0, -2.0, x=0.5, d=0.25, keep_x=2.0),
        _sampler_table.Row(0.0, 1.0, h1=1.0, z=0.5),
    ]
    table = StepTable(rows, [7, 3], input_scales=[0.5, 0.25], initial_scale=2.0)
    assert table.coefficients.dtype == torch.float64
    assert table.coefficients.tolist() == [[*rows[0], 0.25], [*rows[1], 1.0]]
    assert table.timesteps.tolist() == [7, 3]
    assert table.timesteps.dtype == torch.int64
    assert torch.equal(StepTable(rows, table.timesteps).timesteps, table.timesteps)
    assert StepTable(rows, [7, 3.5]).timesteps.dtype == torch.float64
    assert (table.history, table.keeps, table.corrects, table.noisy) == (
        (0, 1),
        "combination",
        (False, False),
        (False, True),
    )
    assert (table.initial_scale, table.first_input_scale, table.first_noise) == (2.0, 0.5, 0.0)
    assert not table.learned_variance


def test_repr():
    assert repr(StepTable.euler(FLOW, "flow")) == "StepTable(8 rows, history 0, keeps nothing, on cpu)"
    assert repr(StepTable.unipc(FLOW, "flow")) == "StepTable(8 rows, history 2, keeps denoised, corrects, on cpu)"
    learned = StepTable.ddpm(PRESERVING, variance="learned_range")
    assert repr(learned) == "StepTable(8 rows, history 0, keeps nothing, noisy, learned variance, on cpu)"


def test_read_only():
    table = StepTable.ddim(PRESERVING)
    with pytest.raises(AttributeError, match="StepTable: rows is not to be assigned"):
        table.rows = 3
    again = pickle.loads(pickle.dumps(copy.deepcopy(table)))
    assert torch.equal(again.coefficients, table.coefficients)
    assert repr(again) == repr(table)


def test_devices():
    table = StepTable.ddim(PRESERVING)
    assert table.to("cpu") is table
    away = table.to("meta")
    assert away.coefficients.is_meta
    assert away.timesteps.is_meta
    assert away.history == table.history
    assert table.to(torch.device("meta")) is away
    assert away.to("cpu") is table


def test_update():
    table = StepTable.dpm_solver_pp(PRESERVING, eta=1.0)
    away = table.to("meta")
    address = table.coefficients.data_ptr()
    other = StepTable.dpm_solver_pp(NoiseSchedule.from_betas(STEPS, steps_offset=1), order=1, eta=0.5)
    assert away.update_(other) is away
    assert table.coefficients.data_ptr() == address
    assert torch.equal(table.coefficients, other.coefficients)
    assert torch.equal(table.timesteps, other.timesteps)
    assert table.history == (0, *[1] * (STEPS - 2), 0)
    in_sigmas = StepTable.euler(NoiseSchedule.from_sigma_range(4))
    moved = in_sigmas.to("meta")
    in_sigmas.update_(StepTable.euler(NoiseSchedule.from_sigma_range(4, 0.1, 20.0)))
    for each in (in_sigmas, moved):
        assert each.initial_scale == pytest.approx(20.0)
        assert each.first_input_scale == pytest.approx(1 / math.hypot(20, 0.5))
    quiet, loud = StepTable.ddim(PRESERVING), StepTable.ddim(PRESERVING, eta=1.0)
    loud.update_(quiet)
    assert torch.equal(loud.coefficients, quiet.coefficients)
    assert loud.noisy[0]


@pytest.mark.parametrize(
    ("table", "other", "what"),
    [
        (StepTable.ddim(PRESERVING), StepTable.ddim(NoiseSchedule.from_betas(3)), "rows"),
        (StepTable.ddim(PRESERVING), StepTable.ddim(PRESERVING, eta=0.5), "noisy"),
        (StepTable.ddim(PRESERVING), StepTable.euler(IN_SIGMAS), "timesteps' dtype"),
        (StepTable.ddim(PRESERVING), StepTable.dpm_solver_pp(PRESERVING), "history, keeps"),
        (StepTable.dpm_solver_pp(PRESERVING), StepTable.plms(PRESERVING), "history, keeps"),
        (StepTable.unipc(PRESERVING), StepTable.dpm_solver_pp(PRESERVING), "corrects"),
        (StepTable.dpm_solver_pp(PRESERVING, order=3), StepTable.unipc(PRESERVING), "corrects"),
        (StepTable.ddpm(PRESERVING, variance="learned_range"), StepTable.ddpm(PRESERVING), "learned_variance"),
        (StepTable.euler_ancestral(EDM), StepTable.edm_churn(EDM), "first_noise"),
    ],
)
def test_update_that_does_not_fit(table, other, what):
    before = table.coefficients.clone()
    with pytest.raises(ValueError, match=f"update_: other must fit this table, .* in .*{what}.*, got StepTable"):
        table.update_(other)
    assert torch.equal(table.coefficients, before)


ROW = _sampler_table.Row(1.0, 0.0)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: StepTable.ddim(3), TypeError, "StepTable.ddim: schedule must be a NoiseSchedule, got 3"),
        (
            lambda: StepTable.ddim(FLOW),
            ValueError,
            "ddim: schedule must be in space 'variance_preserving', got .*'flow'",
        ),
        (lambda: StepTable.ddpm(EDM), ValueError, "ddpm: schedule must be in space 'variance_preserving'"),
        (lambda: StepTable.euler(PRESERVING), ValueError, "euler: schedule must be in space 'sigma' or 'flow'"),
        (lambda: StepTable.edm_churn(FLOW), ValueError, "edm_churn: schedule must be in space 'sigma', got .*'flow'"),
        (lambda: StepTable.euler_ancestral(FLOW), ValueError, "euler_ancestral: schedule must be in space 'sigma'"),
        (lambda: StepTable.flow_euler(EDM), ValueError, "flow_euler: schedule must be in space 'flow', got .*'sigma'"),
        (lambda: StepTable.flow_stochastic(EDM), ValueError, "flow_stochastic: schedule must be in space 'flow'"),
        (lambda: StepTable.flow_ancestral(EDM), ValueError, "flow_ancestral: schedule must be in space 'flow'"),
        (lambda: StepTable.consistency(FLOW), ValueError, "consistency: schedule must be in space 'sigma'"),
        (lambda: StepTable.lcm(FLOW), ValueError, "lcm: schedule must be in space 'variance_preserving'"),
        (lambda: StepTable.ddim(PRESERVING, "flow"), ValueError, "prediction must be one of .* got 'flow'"),
        (lambda: StepTable.unipc(PRESERVING, "edm"), ValueError, "prediction must be one of .* got 'edm'"),
        (lambda: StepTable.unipc(FLOW, "v"), ValueError, "prediction must be one of .* got 'v'"),
        (lambda: StepTable.ddim(PRESERVING, 3), TypeError, "prediction must be one of .* got 3"),
        (lambda: StepTable.ddim(NO_SIGNAL), ValueError, "must begin with some signal for prediction 'epsilon'"),
        (lambda: StepTable.unipc(FLOW, "epsilon"), ValueError, "must begin with some signal for prediction 'epsilon'"),
        (lambda: StepTable.plms(NO_SIGNAL, "v"), ValueError, "plms: schedule must begin with some signal for PLMS"),
        (lambda: StepTable.ddim(PRESERVING, eta=1.5), ValueError, r"eta must be in \[0.0, 1.0\], got 1.5"),
        (lambda: StepTable.ddim(PRESERVING, eta="1"), TypeError, "eta must be a number, got '1'"),
        (lambda: StepTable.ddim(PRESERVING, rederive=1), TypeError, "rederive must be a bool, got 1"),
        (
            lambda: StepTable.ddpm(PRESERVING, variance="learned"),
            ValueError,
            "variance must be one of .* got 'learned'",
        ),
        (lambda: StepTable.lms(EDM, order=5), ValueError, "lms: order must be at most 4, got 5"),
        (lambda: StepTable.lms(EDM, order=0), ValueError, "lms: order must be >= 1, got 0"),
        (lambda: StepTable.dpm_solver_pp(EDM, order=4), ValueError, "dpm_solver_pp: order must be at most 3, got 4"),
        (lambda: StepTable.dpm_solver_pp(EDM, solver_type="ab"), ValueError, "solver_type must be one of .* got 'ab'"),
        (lambda: StepTable.dpm_solver_pp(EDM, s_noise=-1), ValueError, "s_noise must be >= 0.0, got -1"),
        (lambda: StepTable.unipc(EDM, solver_type="bh3"), ValueError, "solver_type must be one of .* got 'bh3'"),
        (lambda: StepTable.edm_churn(EDM, s_churn=-1), ValueError, "edm_churn: s_churn must be >= 0.0, got -1"),
        (
            lambda: StepTable.edm_churn(NoiseSchedule.from_sigmas([2.0, 1.0], timesteps=[9])),
            ValueError,
            "edm_churn: schedule must have timestep_of",
        ),
        (
            lambda: StepTable.heun(NoiseSchedule.from_sigmas([2.0, 1.0], timesteps=[9])),
            ValueError,
            "heun: schedule must have timestep_of",
        ),
        (lambda: StepTable.flow_sde(EDM), ValueError, "flow_sde: schedule must be in space 'flow'"),
        (lambda: StepTable.flow_sde(NoiseSchedule.flow(1)), ValueError, "must have 2 steps or more where it begins"),
        (lambda: StepTable([ROW], ["9"]), TypeError, "timesteps must be a number, got '9'"),
        (lambda: StepTable([], []), ValueError, "StepTable: rows must be 1 or more, .* got 0 rows"),
        (lambda: StepTable([ROW], [9, 3]), ValueError, "with a timestep .* got 1 rows, 2 timesteps"),
        (lambda: StepTable([ROW], [9], input_scales=[1, 1]), ValueError, "got 1 rows, 1 timesteps and 2 input scales"),
        (lambda: StepTable([ROW[:5]], [9]), ValueError, "rows must have 18 numbers each, got 5 in row 0"),
        (lambda: StepTable([ROW._replace(z=None)], [9]), TypeError, "rows, z of row 0, must be a number, got None"),
        (lambda: StepTable([ROW._replace(z=math.inf)], [9]), ValueError, "rows and input_scales must be finite"),
        (lambda: StepTable([ROW._replace(h1=1.0)], [9]), ValueError, "rows must read what rows before them kept"),
        (lambda: StepTable([ROW._replace(last_x=1.0)], [9]), ValueError, "rows must read what rows before them kept"),
        (lambda: StepTable.ddim(PRESERVING).update_(3), TypeError, "update_: other must be a StepTable, got 3"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message) as caught:
        call()
    assert str(caught.value).startswith("StepTable")
