"""Schedulers of diffusers and those of pyperf_dl beside each other, over whole loops."""

import copy
import functools
import importlib
import inspect
import json
import pickle

import pytest
import torch
import torch._dynamo.testing

pytest.importorskip("diffusers", reason="diffusers is not installed")
import diffusers

from pyperf_dl import _sampler_operators as operators
from pyperf_dl.integrations import diffusers as ours

try:
    ours._peer.check_version()
except ValueError as other:
    pytest.skip(str(other), allow_module_level=True)

torch_step = operators.step
STEPS = 8
SHAPE = (2, 4, 20, 20)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPSILON, SAMPLE, V, FLOW = "epsilon", "sample", "v_prediction", "flow_prediction"
ALL = (EPSILON, SAMPLE, V)

# Of each case: the scheduler, predictions, its configuration, and arguments of each step.
CASES = {
    "ddim": ("DDIM", ALL, {"clip_sample": False}, {}),
    "ddim clipped": ("DDIM", ALL, {"clip_sample_range": 0.8}, {}),
    "ddim eta": ("DDIM", ALL, {"set_alpha_to_one": False, "timestep_spacing": "trailing"}, {"eta": 0.7}),
    "ddim rederived": ("DDIM", ALL, {}, {"eta": 1.0, "use_clipped_model_output": True}),
    "ddim threshold": ("DDIM", ALL, {"thresholding": True, "sample_max_value": 2.0}, {}),
    "ddim zero snr": ("DDIM", (V,), {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, {}),
    "ddpm": ("DDPM", ALL, {}, {}),
    "ddpm large": ("DDPM", (EPSILON,), {"variance_type": "fixed_large", "clip_sample": False}, {}),
    "ddpm log": ("DDPM", (EPSILON,), {"variance_type": "fixed_small_log", "timestep_spacing": "trailing"}, {}),
    "ddpm learned": ("DDPM", ALL, {"variance_type": "learned_range"}, {}),
    "ddpm threshold": ("DDPM", (EPSILON,), {"thresholding": True, "sample_max_value": 1.5}, {}),
    "euler": ("EulerDiscrete", ALL, {}, {}),
    "euler karras": ("EulerDiscrete", ALL, {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min"}, {}),
    "euler ancestral": ("EulerAncestralDiscrete", (EPSILON, V), {}, {}),
    "heun": ("HeunDiscrete", ALL, {}, {}),
    "heun clipped": ("HeunDiscrete", ALL, {"clip_sample": True, "use_karras_sigmas": True}, {}),
    "lms": ("LMSDiscrete", ALL, {}, {}),
    "lms 2": ("LMSDiscrete", (EPSILON, V), {"use_karras_sigmas": True}, {"order": 2}),
    "pndm": ("PNDM", (EPSILON, V), {"skip_prk_steps": True}, {}),
    "pndm one": ("PNDM", (EPSILON,), {"skip_prk_steps": True, "set_alpha_to_one": True, "steps_offset": 1}, {}),
    "lcm": ("LCM", ALL, {}, {}),
    "lcm clipped": ("LCM", ALL, {"clip_sample": True, "clip_sample_range": 0.7}, {}),
    "flow euler": ("FlowMatchEulerDiscrete", (None,), {"shift": 3.0}, {}),
    "flow euler stochastic": ("FlowMatchEulerDiscrete", (None,), {"stochastic_sampling": True}, {}),
    "flow euler inverted": ("FlowMatchEulerDiscrete", (None,), {"invert_sigmas": True}, {}),
    "flow heun": ("FlowMatchHeunDiscrete", (None,), {}, {}),
    "dpm 1": ("DPMSolverMultistep", ALL, {"solver_order": 1}, {}),
    "dpm 2m": ("DPMSolverMultistep", ALL, {}, {}),
    "dpm 2m heun": ("DPMSolverMultistep", ALL, {"solver_type": "heun", "lower_order_final": False}, {}),
    "dpm 2m flow": ("DPMSolverMultistep", (FLOW,), {"use_flow_sigmas": True, "flow_shift": 2.0}, {}),
    "dpm 2m final": ("DPMSolverMultistep", (EPSILON,), {"final_sigmas_type": "sigma_min", "euler_at_final": True}, {}),
    "dpm 2m threshold": ("DPMSolverMultistep", (EPSILON,), {"thresholding": True}, {}),
    "dpm 2m learned": ("DPMSolverMultistep", (EPSILON,), {"variance_type": "learned_range"}, {}),
    "dpm 3m": ("DPMSolverMultistep", ALL, {"solver_order": 3, "use_karras_sigmas": True}, {}),
    "dpm 2m sde": ("DPMSolverMultistep", ALL, {"algorithm_type": "sde-dpmsolver++"}, {}),
    "dpm 2m sde heun": ("DPMSolverMultistep", ALL, {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"}, {}),
    "dpm 3m sde": ("DPMSolverMultistep", ALL, {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}, {}),
    **{
        f"dpm noise {algorithm} {order} {kind}": (
            "DPMSolverMultistep",
            ALL,
            {
                "algorithm_type": algorithm,
                "solver_order": order,
                "solver_type": kind,
                "final_sigmas_type": "sigma_min",
                "use_karras_sigmas": True,
            },
            {},
        )
        for algorithm, order, kind in [
            ("dpmsolver", 2, "midpoint"),
            ("dpmsolver", 2, "heun"),
            ("dpmsolver", 3, "midpoint"),
            ("sde-dpmsolver", 2, "midpoint"),
            ("sde-dpmsolver", 2, "heun"),
        ]
    },
    "unipc 1": ("UniPCMultistep", ALL, {"solver_order": 1}, {}),
    "unipc 2": ("UniPCMultistep", ALL, {}, {}),
    "unipc 2 bh1": ("UniPCMultistep", ALL, {"solver_type": "bh1", "final_sigmas_type": "sigma_min"}, {}),
    "unipc 2 few": ("UniPCMultistep", ALL, {"disable_corrector": [0, 3]}, {}),
    "unipc 2 flow": ("UniPCMultistep", (FLOW,), {"use_flow_sigmas": True, "flow_shift": 3.0}, {}),
    "unipc 2 noise": ("UniPCMultistep", ALL, {"predict_x0": False, "final_sigmas_type": "sigma_min"}, {}),
    "unipc 2 threshold": ("UniPCMultistep", (EPSILON,), {"thresholding": True}, {}),
    "unipc 3": ("UniPCMultistep", ALL, {"solver_order": 3, "disable_corrector": [4]}, {}),
    "unipc 3 full": ("UniPCMultistep", ALL, {"solver_order": 3, "lower_order_final": False, "solver_type": "bh1",
                                              "final_sigmas_type": "sigma_min"}, {}),
    "unipc 3 noise": ("UniPCMultistep", ALL, {"solver_order": 3, "predict_x0": False,
                                               "final_sigmas_type": "sigma_min"}, {}),
}  # fmt: skip
EACH = [(case, prediction) for case, (_, predictions, _, _) in CASES.items() for prediction in predictions]


@functools.cache
def built(case, prediction):
    name, predictions, config, _ = CASES[case]
    prediction = prediction or predictions[0]
    return getattr(diffusers, f"{name}Scheduler")(**config, **({"prediction_type": prediction} if prediction else {}))


def made(case, prediction=None):
    return copy.deepcopy(built(case, prediction)), CASES[case][3]


class InDouble:
    """The torch of a module to which float32 is float64."""

    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


def in_double(scheduler):
    for name in ("alphas_cumprod", "final_alpha_cumprod", "sigmas", "one"):
        if isinstance(getattr(scheduler, name, None), torch.Tensor):
            setattr(scheduler, name, getattr(scheduler, name).double())


def start(scheduler, dtype):
    scheduler.set_timesteps(STEPS)
    scale = float(getattr(scheduler, "init_noise_sigma", 1.0))
    shape = (2, 3, *SHAPE[2:]) if scheduler.config.get("variance_type") == "learned_range" else SHAPE
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)).to(dtype)


def stepped(scheduler, output, t, x, how):
    if hasattr(scheduler, "scale_model_input"):
        scheduler.scale_model_input(x, t)
    return scheduler.step(output, t, x, **how)


def results(result):
    return [result[name] for name in ("prev_sample", "pred_original_sample", "denoised") if name in result]


def with_generator(scheduler, how):
    generator = torch.Generator().manual_seed(3)
    given = "generator" in inspect.signature(scheduler.step).parameters
    return {**how, "generator": generator} if given else how, generator


def in_float64(scheduler, plan, how, dtype, monkeypatch):
    """Of each step of the scheduler in float64: the sample and the output of a model, rounded, and what it makes of
    those, with the noise that it draws in that dtype."""
    module = importlib.import_module(type(scheduler).__module__)
    x, path = start(scheduler, torch.float64), []
    pattern = 1.2 * torch.sin(torch.arange(x.numel()).reshape(x.shape))
    in_double(scheduler)
    noise_dtype = torch.float32 if type(scheduler).__name__.startswith(("DPM", "Flow")) else dtype
    with monkeypatch.context() as patched:
        patched.setattr(module, "torch", InDouble())
        if hasattr(module, "randn_tensor"):
            draw = module.randn_tensor
            patched.setattr(
                module, "randn_tensor", lambda shape, **k: draw(shape, **{**k, "dtype": noise_dtype}).double()
            )
        how, _ = with_generator(scheduler, how)
        for i, t in enumerate(scheduler.timesteps):
            p, q = plan.rows[int(t) if plan.steps == scheduler.config.num_train_timesteps else i, :2]
            data = pattern + float(t) / 4000 * torch.sin(3 * x.roll(1, -1))
            output = (data - p * x) / q if q else x - data
            if scheduler.config.get("variance_type") == "learned_range":
                output = torch.cat([output, torch.sin(3 * output)], 1)
            x, output = x.to(dtype), output.to(dtype)
            at = int(t) if type(scheduler).__name__ == "LCMScheduler" else t  # a tensor makes float32 of it
            found = results(stepped(scheduler, output.double(), at, x.double(), how))
            path.append((x, output, found))
            x = found[0].double()
    return path


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors: threads would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def assert_near(a, b, tolerance=2e-6):
    assert a.isfinite().all()
    assert (a.double() - b.double()).abs().max() <= tolerance * b.abs().max()


def rms(a, b):
    return float((a.double() - b).square().mean().sqrt())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("case", "prediction"), EACH)
@pytest.mark.filterwarnings("ignore")
def test_loops(case, prediction, dtype, monkeypatch):
    """Every step from the sample that diffusers has in float64, with the scheduler's own history: no farther from its
    results than diffusers is, but for one rounding."""
    theirs, how = made(case, prediction)
    fused = ours.fuse(theirs)
    start(fused, dtype), start(theirs, dtype)
    plan = next(iter(fused._pyperf_dl.plans.values()))
    path = in_float64(copy.deepcopy(theirs), plan, how, dtype, monkeypatch)
    (their_how, their_generator), (our_how, our_generator) = with_generator(theirs, how), with_generator(fused, how)
    ours.report(reset=True)
    for t, (x, output, true) in zip(theirs.timesteps, path, strict=True):
        mine = results(stepped(fused, output, t, x, our_how))
        for got, peers, want in zip(mine, results(stepped(theirs, output, t, x, their_how)), true, strict=True):
            assert got.dtype == peers.dtype
            assert got.isfinite().all()
            # In float16 diffusers overflows where it finds the noise from a sample.
            if peers.isfinite().all():
                assert rms(got, want) <= rms(peers, want) + rms(want.to(got.dtype), want)
    assert ours.report() == ours.Report(len(path), {})
    assert torch.equal(our_generator.get_state(), their_generator.get_state())


# ---- what a scheduler is beside its steps ----

NAMES = sorted({name for name, _, _, _ in CASES.values()})
ONE_EACH = {name: next(c for c, (n, _, _, _) in CASES.items() if n == name) for name in NAMES}


def assert_same_loop(first, second, how=None, begin=0, dtype=torch.float32, times=None):
    """Whole loops on their own, with the same model."""
    ends = []
    for scheduler in (first, second):
        x = start(scheduler, dtype)
        given, _ = with_generator(scheduler, how or {})
        for t in (times or (lambda s: s.timesteps))(scheduler)[begin:]:
            x = stepped(scheduler, (x * 0.7).tanh().to(dtype), t, x, given).prev_sample
        ends.append(x.double())
    assert ends[0].isfinite().all()
    # Of float32, after steps that enlarge what came before.
    assert (ends[0] - ends[1]).abs().max() <= 2e-5 * ends[0].abs().max()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore")
def test_is_the_peers_class(name, tmp_path):
    peer, how = made(ONE_EACH[name])
    fused = ours.fuse(peer)
    kind = type(peer)
    assert isinstance(fused, kind)
    assert (type(fused).__name__, type(fused).__module__) == (kind.__name__, kind.__module__)
    assert list(inspect.signature(fused.step).parameters) == [*inspect.signature(peer.step).parameters, "noise", "key"]
    assert ours.fuse(fused) is fused
    assert fused.config == peer.config

    fused.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "scheduler_config.json").read_text())["_class_name"] == kind.__name__
    assert type(kind.from_pretrained(tmp_path)) is kind
    for other in (type(fused).from_config(fused.config), copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert type(other) is type(fused)
        assert_same_loop(peer, other, how)
    other = kind.from_config(fused.config)
    assert type(other) is kind
    assert_same_loop(fused, other, how)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("DDIM", "DDPM", "PNDM")])
@pytest.mark.filterwarnings("ignore")
def test_where_a_loop_begins(name):
    """From a view, a copy, a number, or as set_begin_index has it; from the middle too."""
    peer, how = made(ONE_EACH[name])
    fused = ours.fuse(peer)
    for times in (
        lambda s: s.timesteps,
        lambda s: s.timesteps.clone(),
        lambda s: [s.set_begin_index(4), *s.timesteps][1:],
        lambda s: [t if t.dtype == torch.int64 else t.double() for t in s.timesteps],
    ):
        assert_same_loop(peer, fused, how, begin=4, times=times)
        assert fused.step_index == peer.step_index
    with pytest.raises(IndexError):
        stepped(fused, torch.zeros(SHAPE), peer.timesteps[-1], torch.zeros(SHAPE), how)


@pytest.mark.parametrize("name", ["DDIM", "DDPM", "PNDM"])
def test_timesteps_of_the_training(name):
    """A number, a copy, a tensor with one dimension."""
    peer, how = made(ONE_EACH[name])
    fused = ours.fuse(peer)
    for times in (lambda s: s.timesteps.tolist(), lambda s: s.timesteps.clone(), lambda s: s.timesteps[:, None]):
        assert_same_loop(peer, fused, how, times=times)


def test_runge_kutta_goes_to_the_peer():
    peer = diffusers.PNDMScheduler()
    fused = ours.fuse(peer)
    ours.report(reset=True)
    assert_same_loop(peer, fused)
    assert ours.report() == ours.Report(5, {"Runge-Kutta steps": 12})


def first_step(scheduler, shape=SHAPE, **how):
    scheduler.set_timesteps(STEPS)
    return stepped(scheduler, torch.ones(shape), scheduler.timesteps[0], torch.ones(shape), how)


@pytest.mark.parametrize(
    ("scheduler", "how", "why"),
    [
        (diffusers.EulerDiscreteScheduler(), {"s_churn": 0.5}, "s_churn"),
        (diffusers.FlowMatchHeunDiscreteScheduler(), {"s_churn": 0.5}, "s_churn"),
        (
            diffusers.FlowMatchEulerDiscreteScheduler(),
            {"per_token_timesteps": torch.full(SHAPE[:2], 500.0)},
            "per_token_timesteps",
        ),
        (diffusers.UniPCMultistepScheduler(solver_order=4), {}, "order above 3"),
        (
            diffusers.UniPCMultistepScheduler(solver_p=diffusers.DDIMScheduler()),
            {},
            "another scheduler as predictor",
        ),
    ],
)
def test_what_goes_to_the_peer(scheduler, how, why):
    shape = SHAPE[:3] if why == "per_token_timesteps" else SHAPE
    fused = ours.fuse(scheduler)
    ours.report(reset=True)
    torch.manual_seed(0)
    got = first_step(fused, shape, **how).prev_sample
    torch.manual_seed(0)
    assert torch.equal(got, first_step(scheduler, shape, **how).prev_sample)
    assert ours.report() == ours.Report(0, {why: 1})
    with pytest.raises(ValueError, match="key is for steps of pyperf_dl"):
        first_step(fused, shape, key=3, **how)


def test_errors_are_the_peers():
    for scheduler in (diffusers.EulerDiscreteScheduler(), diffusers.FlowMatchEulerDiscreteScheduler()):
        fused = ours.fuse(scheduler)
        fused.set_timesteps(STEPS)
        with pytest.raises(ValueError, match="integer indices"):
            fused.step(torch.zeros(SHAPE), 0, torch.zeros(SHAPE))
    with pytest.raises(ValueError, match="Number of inference steps is 'None'"):
        ours.fuse(diffusers.DDIMScheduler()).step(torch.zeros(SHAPE), 0, torch.zeros(SHAPE))
    with pytest.raises(ValueError, match="noise must be a tensor of the sample's shape"):
        first_step(ours.fuse(diffusers.EulerAncestralDiscreteScheduler()), noise=torch.zeros(3))


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"noise": 3}, ValueError, "noise must be a tensor"),
        ({"noise": torch.zeros(SHAPE), "key": 3}, ValueError, "noise and key exclude each other"),
        ({"key": "3"}, TypeError, "key must be an int"),
        ({"key": torch.ones(2)}, TypeError, "key must be torch.int64"),
        ({"key": torch.arange(3)}, ValueError, "key must have one number, or one a sample"),
        ({"key": 2**64}, ValueError, "key must have 64 bits"),
    ],
    ids=str,
)
def test_wrong_noise_and_keys(given, error, message):
    with pytest.raises(error, match=f"step: {message}"):
        first_step(ours.fuse(diffusers.EulerAncestralDiscreteScheduler()), **given)


def test_fuse_refuses_what_is_no_scheduler():
    for wrong in (None, "DDIM", diffusers.DDIMScheduler, torch.nn.Module()):
        with pytest.raises(TypeError, match="fuse: scheduler must be a scheduler, or a pipeline with one"):
            ours.fuse(wrong)
    with pytest.raises(TypeError, match="fuse: denoised must be a bool"):
        ours.fuse(diffusers.DDIMScheduler(), denoised=0)
    with pytest.raises(ValueError, match="guidance is for a pipeline, got a DDIMScheduler"):
        ours.fuse(diffusers.DDIMScheduler(), guidance=True)


def test_other_schedulers_stay():
    scheduler = diffusers.KDPM2DiscreteScheduler()
    ours.report(reset=True)
    assert ours.fuse(scheduler) is scheduler
    assert ours.report() == ours.Report(0, {"KDPM2DiscreteScheduler is not taken over": 1})


@pytest.mark.parametrize("where", [2, 3])
@pytest.mark.parametrize("case", ["heun", "flow heun"])
def test_a_step_of_two_halves_is_handed_back(case, where):
    """Where one evaluation cannot be taken over, diffusers makes both, or the second from ours."""

    class Wrapped(torch.Tensor):
        pass

    peer, _ = made(case)
    fused = ours.fuse(peer)
    ends = []
    for scheduler, kind in ((peer, torch.Tensor), (fused, Wrapped)):
        x = start(scheduler, torch.float32)
        for i, t in enumerate(scheduler.timesteps):
            output = (x * 0.7).tanh()
            x = stepped(scheduler, output.as_subclass(kind if i == where else torch.Tensor), t, x, {}).prev_sample
            x = x.as_subclass(torch.Tensor)
        ends.append(x)
    assert_near(*ends, 1e-5)  # of diffusers, whose last slopes are divided by a small sigma


@pytest.mark.parametrize("case", ["dpm 2m", "unipc 2", "heun", "flow heun", "lms", "pndm"])
def test_a_loop_goes_on(case):
    """On a copy, or a fused one of diffusers' own, made in the middle of a step."""
    peer, how = made(case)
    ends = []
    for scheduler in (peer, ours.fuse(peer), copy.deepcopy(peer)):
        x = start(scheduler, torch.float32)
        for i, t in enumerate(scheduler.timesteps):
            if i == 3:
                scheduler = ours.fuse(scheduler) if len(ends) == 2 else copy.deepcopy(scheduler)
            x = stepped(scheduler, (x * 0.7).tanh(), t, x, how).prev_sample
        ends.append(x)
    assert_near(ends[1], ends[0], 1e-5)
    assert_near(ends[2], ends[0], 1e-5)


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.UniPCMultistepScheduler(solver_type="bh1"),
        diffusers.DDPMScheduler(variance_type="fixed_large_log"),
    ],
    ids=["unipc", "ddpm"],
)
def test_not_a_number_where_diffusers_has_none(scheduler):
    ends = []
    for s in (scheduler, ours.fuse(scheduler)):
        x = start(s, torch.float32)
        for t in s.timesteps:
            x = stepped(s, torch.zeros_like(x), t, torch.ones_like(x), {}).prev_sample
        ends.append(x.isnan())
    assert torch.equal(*ends)


def test_enable():
    scheduler, _ = made("dpm 2m")
    before = diffusers.DPMSolverMultistepScheduler.step
    ours.report(reset=True)
    with ours.enable():
        first_step(scheduler)
        with ours.enable():
            first_step(scheduler)
        first_step(type("Own", (diffusers.DDIMScheduler,), {})())
        first_step(ours.fuse(scheduler))
    assert diffusers.DPMSolverMultistepScheduler.step is before
    first_step(scheduler)
    assert ours.report(reset=True) == ours.Report(3, {"a subclass": 1})
    ours.enable()
    first_step(scheduler)
    ours.disable()
    first_step(scheduler)
    assert ours.report(reset=True) == ours.Report(1, {})


def test_follows_new_numbers():
    scheduler, fused = diffusers.EulerDiscreteScheduler(), ours.fuse(diffusers.EulerDiscreteScheduler())
    for steps in (8, 5):
        for s in (scheduler, fused):
            s.set_timesteps(steps)
        ends = [step_at(s, s.timesteps[0]) for s in (scheduler, fused)]
        assert torch.allclose(*ends)
    for s in (scheduler, fused):
        s.sigmas = s.sigmas * 1.5
    assert torch.allclose(*[step_at(s, s.timesteps[0]) for s in (scheduler, fused)])
    for s in (scheduler, fused):
        s.register_to_config(prediction_type="v_prediction")
    assert torch.allclose(*[step_at(s, s.timesteps[0]) for s in (scheduler, fused)])


def step_at(scheduler, t):
    return stepped(scheduler, torch.ones(SHAPE), t, torch.ones(SHAPE), {}).prev_sample


def test_without_denoised():
    for name in ("DDIM", "EulerDiscrete", "HeunDiscrete", "LMSDiscrete", "LCM", "DDPM"):
        peer, how = made(ONE_EACH[name])
        fused = ours.fuse(peer, denoised=False)
        assert ours.fuse(ours.fuse(peer), denoised=False)._pyperf_dl.denoised is False
        assert first_step(fused, **how).get("pred_original_sample") is None
        assert_same_loop(peer, fused, how)


@pytest.mark.parametrize("case", ["ddim eta", "ddpm", "euler ancestral", "lcm", "flow euler stochastic", "dpm 2m sde"])
def test_noise_and_keys(case):
    peer, how = made(case)
    fused = ours.fuse(peer)
    (with_peers, _), noise = with_generator(peer, how), torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
    assert_near(first_step(fused, noise=noise, **how).prev_sample, first_step(peer, **with_peers).prev_sample)
    keys = torch.tensor([5, 6])
    both = first_step(fused, key=keys, **how).prev_sample
    assert torch.equal(both, first_step(fused, key=keys, **how).prev_sample)
    assert not torch.equal(both[0], both[1])
    fused.set_timesteps(STEPS)
    alone = stepped(fused, torch.ones(SHAPE)[1:], fused.timesteps[0], torch.ones(SHAPE)[1:], {"key": 6, **how})
    assert torch.equal(both[1:], alone.prev_sample)


@pytest.mark.parametrize("case", ["ddim", "ddim threshold", "euler", "dpm 2m", "unipc 2", "heun"])
def test_gradients(case, monkeypatch):
    peer, how = made(case)
    monkeypatch.setattr(importlib.import_module(type(peer).__module__), "torch", InDouble())
    found = []
    for scheduler in (peer, ours.fuse(peer)):
        x = start(scheduler, torch.float64).requires_grad_()
        scale = torch.ones((), dtype=torch.float64, requires_grad=True)
        in_double(scheduler)
        y = x
        for t in scheduler.timesteps[:3]:
            y = stepped(scheduler, scale * torch.tanh(y), t, y, how).prev_sample
        found.append(torch.autograd.grad((y * x.detach()).sum(), (x, scale)))
    for a, b in zip(*found, strict=True):
        assert_near(a, b, 1e-12)


# ---- compiled ----


@pytest.mark.parametrize(
    ("case", "begins"),
    [(case, True) for case in ("ddim", "euler", "dpm 3m", "unipc 2", "heun", "lms", "flow euler", "flow heun", "pndm")]
    + [(case, True) for case in ("lcm", "euler ancestral", "ddpm learned", "ddpm threshold", "dpm 2m sde")]
    + [(case, False) for case in ("euler", "dpm 2m", "unipc 2", "heun")],
)
@pytest.mark.filterwarnings("ignore")
def test_compiled(case, begins):
    torch._dynamo.reset()
    peer, how = made(case)
    fused = ours.fuse(peer)
    step = torch.compile(fused.step, fullgraph=True, backend="aot_eager")
    ends = []
    noises = torch.randn(3 * STEPS, *SHAPE)
    for scheduler, call in ((copy.deepcopy(fused), None), (fused, step)):
        x = start(scheduler, torch.float32)
        if begins and hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)
        if hasattr(scheduler, "is_scale_input_called"):
            scheduler.is_scale_input_called = True
        for t, noise in zip(scheduler.timesteps, noises, strict=False):
            output = (x * 0.7).tanh()
            output = torch.cat([output, -output], 1) if case == "ddpm learned" else output
            x = (call or scheduler.step)(output, t, x, noise=noise[:, : x.shape[1]], return_dict=False, **how)[0]
        ends.append(x)
    assert torch.allclose(*ends, rtol=1e-6)


# ---- pipelines ----


class Pipeline:
    """What those of diffusers do in a loop."""

    def __init__(self, scheduler):
        self.scheduler, self.unet, self.seen = scheduler, torch.nn.Module(), []
        self.unet.forward = lambda x, t: ((x * 0.7 + torch.arange(len(x), dtype=x.dtype).view(-1, 1, 1, 1) / 9).tanh(),)

    def __call__(self, latents, scale):
        generator = torch.Generator().manual_seed(3)
        given = {"generator": generator} if "generator" in inspect.signature(self.scheduler.step).parameters else {}
        for t in self.scheduler.timesteps:
            inputs = torch.cat([latents] * 2)
            if hasattr(self.scheduler, "scale_model_input"):
                inputs = self.scheduler.scale_model_input(inputs, t)
            self.seen.append(type(inputs))
            output = self.unet(inputs, t)[0]
            uncond, text = output.chunk(2)
            output = uncond + scale * (text - uncond)
            latents = self.scheduler.step(output, t, latents, **given, return_dict=False)[0]
        return latents


def counted(monkeypatch):
    """The calls of the operator from here on."""
    calls, run = [], torch_step
    monkeypatch.setattr(operators, "step", lambda *args: calls.append(args) or run(*args))
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "case", ["ddim", "euler", "euler ancestral", "dpm 2m", "unipc 2", "unipc 3", "heun", "lms", "lms 2", "flow euler",
             "flow heun", "pndm", "lcm", "ddpm threshold", "dpm 3m"]
)  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_guided_pipeline(case, dtype, monkeypatch):
    ends = []
    for fuses in (False, True):
        pipeline = Pipeline(made(case)[0])
        if fuses:
            assert ours.fuse(pipeline, guidance=True) is pipeline.scheduler
        x = start(pipeline.scheduler, dtype)
        ours.report(reset=True)
        calls = counted(monkeypatch)
        ends.append(pipeline(x, 3.5))
        if fuses:
            assert ours.report() == ours.Report(len(pipeline.scheduler.timesteps), {})
            assert all(c[2] is not None for c in calls) or case == "unipc 3"
            assert set(pipeline.seen) == {torch.Tensor}
    assert type(ends[1]) is torch.Tensor
    assert ends[0].dtype == ends[1].dtype
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    assert (ends[0] - ends[1]).abs().max() <= tolerance * ends[0].abs().max()


def test_put_off_guidance_is_plain_elsewhere():
    pipeline = Pipeline(diffusers.EulerDiscreteScheduler())
    ours.fuse(pipeline, guidance=True)
    pipeline.scheduler.set_timesteps(STEPS)
    x = torch.randn(4, 3, 2, 2)
    want = pipeline.unet.forward(x, 0)[0]
    output = pipeline.unet(x, 0)[0]
    assert type(output) is not torch.Tensor
    assert torch.equal(output, want)
    uncond, text = output.chunk(2)
    a, b = want.chunk(2)
    assert torch.equal((text - uncond).mean(), (b - a).mean())
    assert torch.equal(text + 2 * (text - uncond), b + 2 * (b - a))
    guided = uncond + 2.5 * (text - uncond)
    assert guided.shape == a.shape
    assert torch.equal(guided.std(), (a + 2.5 * (b - a)).std())
    assert torch.equal(uncond - text, a - b)
    sample = torch.randn(2, 3, 2, 2)
    t = pipeline.scheduler.timesteps[0]
    latents = pipeline.scheduler.step(guided, t, sample, return_dict=False)[0]
    assert type(latents) is torch.Tensor  # diffusers warns, for its input was not scaled
    pipeline.scheduler.scale_model_input(sample, t)
    latents = pipeline.scheduler.step(guided, t, sample, return_dict=False)[0]
    assert type(latents) is not torch.Tensor
    scaled = pipeline.scheduler.scale_model_input(torch.cat([latents] * 2), t)
    plain = latents.clone()
    assert type(plain) is torch.Tensor
    assert torch.allclose(scaled, pipeline.scheduler.scale_model_input(torch.cat([plain] * 2), t))
    latents[:, :1] = 0
    assert type(torch.cat([latents] * 2)) is torch.Tensor
    assert torch.cat([latents] * 2)[:, :1].abs().max() == 0


def a_unet():
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ).eval()


def a_vae():
    return diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["DDIM", "EulerDiscrete", "EulerAncestralDiscrete", "UniPCMultistep", "PNDM"])
def test_a_real_pipeline(name, tmp_path, monkeypatch):
    pytest.importorskip("transformers", reason="transformers is not installed")
    config = {"skip_prk_steps": True} if name == "PNDM" else {}
    pipeline = diffusers.StableDiffusionPipeline(
        unet=a_unet(),
        vae=a_vae(),
        text_encoder=None,
        tokenizer=None,
        scheduler=getattr(diffusers, f"{name}Scheduler")(**config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    embeds = torch.randn(2, 2, 3, 8, generator=torch.Generator().manual_seed(1))

    def images():
        return pipeline(
            prompt_embeds=embeds[0],
            negative_prompt_embeds=embeds[1],
            num_inference_steps=6,
            guidance_scale=4.0,
            generator=torch.Generator().manual_seed(2),
            output_type="latent",
        ).images

    want = images()
    fused = ours.fuse(pipeline, guidance=True)
    assert pipeline.scheduler is fused
    ours.report(reset=True)
    calls = counted(monkeypatch)
    got = images()
    assert type(got) is torch.Tensor
    assert_near(got, want, 1e-4)
    assert ours.report() == ours.Report(len(calls), {})
    assert all(call[2] is not None for call in calls)
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", f"{name}Scheduler"]


@pytest.mark.filterwarnings("ignore")
def test_a_pipeline_with_another_guidance():
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=8, num_layers=1, sample_size=8,
        num_embeds_ada_norm=1000, norm_num_groups=4,
    ).eval()  # fmt: skip
    pipeline = diffusers.DiTPipeline(transformer, a_vae(), diffusers.DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)

    def images():
        return pipeline(
            [1, 2], num_inference_steps=4, generator=torch.Generator().manual_seed(2), output_type="np"
        ).images

    want = images()
    ours.fuse(pipeline, guidance=True)
    ours.report(reset=True)
    assert abs(images() - want).max() < 1e-3
    assert ours.report() == ours.Report(4, {})


def test_compiled_in_a_takeover():
    torch._dynamo.reset()
    scheduler, _ = made("ddim")
    want = first_step(copy.deepcopy(scheduler)).prev_sample
    with ours.enable():
        scheduler.set_timesteps(STEPS)
        x, t = torch.ones(SHAPE), scheduler.timesteps[0]
        scheduler.step(x, t, x)
        step = torch.compile(scheduler.step, fullgraph=True, backend="eager")
        assert_near(step(x, t, x, return_dict=False)[0], want)


def test_compiled_steps_are_for_any_row():
    counter = torch._dynamo.testing.CompileCounter()
    for case in ("ddim", "euler", "dpm 2m"):
        torch._dynamo.reset()
        counter.clear()
        fused = ours.fuse(made(case)[0])
        step = torch.compile(fused.step, fullgraph=True, backend=counter)
        x, seen = torch.randn(SHAPE), []
        for _ in range(2):
            fused.set_timesteps(25)
            if hasattr(fused, "set_begin_index"):
                fused.set_begin_index(0)
            for t in fused.timesteps:
                x = step(torch.tanh(x), t, x, return_dict=False)[0]
            seen.append(counter.frame_count)
        # By how much history there is, and once more where a number turns out to vary.
        assert seen[0] <= 5
        assert seen[1] <= seen[0] + 1


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_no_sync(name):
    peer, how = made(ONE_EACH[name])
    fused = ours.fuse(peer)
    generator = torch.Generator("cuda").manual_seed(0)
    given = {"generator": generator} if "generator" in inspect.signature(fused.step).parameters else {}
    x = torch.randn(SHAPE, device="cuda")
    assert x.is_cuda
    for mode in ("default", "error"):  # the first time, a draw is compared with torch's
        fused.set_timesteps(STEPS, device="cuda")
        times = fused.timesteps.unbind()
        torch.cuda.set_sync_debug_mode(mode)
        try:
            for t in times:
                x = stepped(fused, torch.tanh(x), t, x, {**how, **given}).prev_sample
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert x.isfinite().all()


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", ["ddim eta", "ddpm", "euler ancestral", "lcm", "flow euler stochastic", "dpm 2m sde"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_draws_as_the_peer_on_a_gpu(case, dtype):
    peer, how = made(case)
    ends, states = [], []
    for scheduler in (peer, ours.fuse(peer)):
        generator = torch.Generator("cuda").manual_seed(3)
        scheduler.set_timesteps(STEPS, device="cuda")
        t, x = scheduler.timesteps[0], torch.ones(SHAPE, device="cuda", dtype=dtype)
        ends.append(stepped(scheduler, 0.1 * x, t, x, {**how, "generator": generator}).prev_sample)
        states.append(generator.get_state())
    assert torch.equal(*states)
    assert_near(*ends, 4 * torch.finfo(dtype).eps)
