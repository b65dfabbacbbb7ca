"""pyperf_dl.integrations.k_diffusion beside k-diffusion itself."""

import contextlib
import importlib
import importlib.util
import inspect
import sys
import types
from pathlib import Path

import pytest
import torch
from peer_flows import assert_same, assert_takeovers, assert_versions_are_checked, restored
from torch.utils._python_dispatch import TorchDispatchMode

import pyperf_dl
from pyperf_dl.integrations import k_diffusion


def imported_sampling():
    """k_diffusion.sampling, as the benchmarks import it."""
    path = Path(__file__).parent.parent / "bench" / "k_diffusion_sampling.py"
    spec = importlib.util.spec_from_file_location("k_diffusion_sampling", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.imported_sampling()


sampling = imported_sampling()
beside = pytest.mark.skipif(sampling is None, reason="k-diffusion is not installed")
WITH_TREE = sampling is not None and hasattr(sampling.torchsde, "BrownianTree")
pytestmark = pytest.mark.filterwarnings("ignore:Should have t")  # torchsde's, of sigmas in float32
_as_it_was = restored(k_diffusion) if sampling else None

CALLS = {
    "euler": ("sample_euler", {}),
    "euler churn": ("sample_euler", {"s_churn": 5.0, "s_tmin": 0.1, "s_tmax": 5.0, "s_noise": 1.01}),
    "euler churn at once": ("sample_euler", {"s_churn": 40.0}),
    "ancestral": ("sample_euler_ancestral", {}),
    "ancestral eta": ("sample_euler_ancestral", {"eta": 0.6, "s_noise": 0.9}),
    "ancestral without noise": ("sample_euler_ancestral", {"eta": 0.0}),
    "ancestral of no noise": ("sample_euler_ancestral", {"s_noise": 0.0}),
    "heun": ("sample_heun", {}),
    "heun churn": ("sample_heun", {"s_churn": 8.0, "s_tmax": 3.0, "s_noise": 1.003}),
    "heun churn at once": ("sample_heun", {"s_churn": 2.0}),
    "lms": ("sample_lms", {}),
    "lms 2": ("sample_lms", {"order": 2}),
    "lms 1": ("sample_lms", {"order": 1}),
    "2m": ("sample_dpmpp_2m", {}),
    "2m sde": ("sample_dpmpp_2m_sde", {}),
    "2m sde heun": ("sample_dpmpp_2m_sde", {"solver_type": "heun", "eta": 0.5, "s_noise": 1.1}),
    "2m sde without noise": ("sample_dpmpp_2m_sde", {"eta": 0.0}),
    "2m sde of no noise": ("sample_dpmpp_2m_sde", {"s_noise": 0.0}),
    "3m sde": ("sample_dpmpp_3m_sde", {}),
    "3m sde eta": ("sample_dpmpp_3m_sde", {"eta": 0.4, "s_noise": 0.95}),
    "3m sde without noise": ("sample_dpmpp_3m_sde", {"eta": 0.0}),
}
EXPONENTIAL = [14.6 * 0.6**k for k in range(11)]
SIGMAS = {
    "to zero": [*EXPONENTIAL, 0.0],
    "not to zero": EXPONENTIAL,
    "one step": [3.0, 1.0],
    "one step to zero": [3.0, 0.0],
    "two steps": [3.0, 0.5, 0.0],
}
FUNCTIONS = sorted({name for name, _ in CALLS.values()})


def model(x, sigma, strength=0.7):
    """A smooth denoiser that looks at its neighbours too."""
    s = sigma.view(-1, *[1] * (x.dim() - 1))
    return strength * torch.tanh((x + 0.2 * x.roll(1, -1)) / (1 + s * s) ** 0.5)


def start(dtype=torch.float64, sigmas="to zero", shape=(2, 3, 8, 5)):
    torch.manual_seed(0)
    levels = torch.tensor(SIGMAS[sigmas], dtype=torch.float64)
    # Levels that float32 has, so that all runs have the same.
    return (levels[0] * torch.randn(shape, dtype=torch.float64)).to(dtype), levels.float().to(
        torch.float64 if dtype == torch.float64 else torch.float32
    )


def both(name, *args, seed=1, function=model, **how):
    """(k-diffusion's, ours), and both leave the generator at the same place."""
    results, states = [], []
    for on in (False, True):
        torch.manual_seed(seed)
        with k_diffusion.enable() if on else contextlib.nullcontext():
            results.append(getattr(sampling, name)(function, *args, disable=True, **how))
        states.append([torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if args[0].is_cuda else ())])
    for before, after in zip(*states, strict=True):
        assert torch.equal(before, after)
    return results


def needs_tree(call, sigmas="to zero"):
    if "sde" in call and not WITH_TREE:
        pytest.skip("torchsde is not installed, which k-diffusion's noise of an SDE needs")
    if "sde" in call and sigmas == "one step to zero":
        pytest.skip("k-diffusion fails here: it has no h")


@beside
@pytest.mark.parametrize("sigmas", SIGMAS)
@pytest.mark.parametrize("call", CALLS)
def test_float64(call, sigmas):
    needs_tree(call, sigmas)
    name, how = CALLS[call]
    x, levels = start(sigmas=sigmas)
    theirs, ours = both(name, x, levels, **how)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert k_diffusion.report() == (1, {})


def numbers_of(dtypes, monkeypatch):
    """torch.randn_like draws in these dtypes, one after the other."""
    draw, dtypes = torch.randn_like, iter(dtypes)
    monkeypatch.setattr(torch, "randn_like", lambda x: draw(x.to(next(dtypes))).to(x.dtype))


@beside
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("call", CALLS)
def test_as_accurate_as_k_diffusion(call, dtype, monkeypatch):
    name, how = CALLS[call]
    x, levels = start(dtype)

    def noise(x):
        generator = torch.Generator().manual_seed(3)
        return lambda sigma, after: torch.randn(x.shape, generator=generator).to(dtype).to(x.dtype)

    if "sde" in call or "ancestral" in call:
        how = how | {"noise_sampler": noise}

    def run(x, levels, function):
        torch.manual_seed(1)
        given = {k: v(x) if k == "noise_sampler" else v for k, v in how.items()}
        return function(model, x, levels, disable=True, **given)

    theirs = run(x, levels, getattr(sampling, name))
    ours = run(x, levels, getattr(k_diffusion, name))
    assert ours.dtype == theirs.dtype
    with monkeypatch.context() as patched:
        numbers_of([dtype, *20 * [theirs.dtype]], patched)
        truth = run(x.double(), levels.double(), getattr(sampling, name))
    rounding = torch.finfo(dtype).eps / 2 * truth.abs().max()  # of the first output at least
    error, peers = ours - truth, theirs - truth
    assert error.abs().max() <= peers.abs().max() + rounding
    assert error.square().mean().sqrt() <= peers.square().mean().sqrt() + rounding / 10


@beside
@pytest.mark.parametrize("call", CALLS)
def test_what_model_and_callback_see(call):
    needs_tree(call)
    name, how = CALLS[call]
    x, levels = start(torch.float32)
    seen = []

    def watched(x, sigma, strength):
        seen.append({"x": x, "sigma": sigma})
        return model(x, sigma, strength)

    both(name, x, levels, {"strength": 0.3}, seen.append, function=watched, **how)
    theirs, ours = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert len(theirs) == len(ours) >= 2 * 11
    for a, b in zip(theirs, ours, strict=True):
        assert list(a) == list(b)
        for key in a.keys() - {"x", "denoised", "i"}:
            assert torch.equal(a[key], b[key])
        assert a.get("i") == b.get("i")
        for key in a.keys() & {"x", "denoised"}:
            torch.testing.assert_close(b[key], a[key], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_callback_comes_before_the_step(name):
    x, levels = start()
    order = []

    def watched(x, sigma):
        order.append("model")
        return model(x, sigma)

    getattr(k_diffusion, name)(watched, x, levels, callback=lambda info: order.append(info["i"]), disable=True)
    if name == "sample_heun":
        assert order == [v for i in range(10) for v in ("model", i, "model")] + ["model", 10]
    else:
        assert order == [v for i in range(11) for v in ("model", i)]


@beside
@pytest.mark.parametrize("call", ["ancestral", "ancestral eta", "ancestral without noise", "2m sde", "3m sde"])
def test_a_noise_sampler_of_the_caller(call):
    name, how = CALLS[call]
    x, levels = start(torch.float32)
    asked = []

    def noise(sigma, after):
        asked.append((sigma, after))
        return torch.randn(x.shape, dtype=torch.float64)  # of a wider dtype: all is, from there on

    theirs, ours = both(name, x, levels, noise_sampler=noise, **how)
    assert ours.dtype == theirs.dtype == torch.float64
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    half = len(asked) // 2
    assert asked[:half] == asked[half:]
    assert all(isinstance(s, torch.Tensor) and s.dim() == 0 for pair in asked for s in pair)


@beside
@pytest.mark.parametrize("call", ["euler churn at once", "ancestral", "heun churn", "lms", "2m", "2m sde", "3m sde"])
@pytest.mark.parametrize(
    ("dtype", "output", "close"),
    [(torch.float32, torch.bfloat16, 1e-5), (torch.float16, torch.float32, 2e-3), (torch.float32, torch.float64, 1e-5)],
)
def test_a_model_of_another_dtype(call, dtype, output, close):
    needs_tree(call)
    name, how = CALLS[call]
    x, levels = start(dtype)
    told = []
    if output == torch.bfloat16 and ("2m" in call or "3m" in call):
        close = 2e-2  # k-diffusion multiplies outputs as they are

    def function(x, sigma):
        told.append(sigma.dtype)
        return model(x.float(), sigma.float()).bfloat16().to(output)

    theirs, ours = both(name, x, levels, function=function, **how)
    assert ours.dtype == theirs.dtype
    assert {*told} == {dtype}
    torch.testing.assert_close(ours, theirs, rtol=close, atol=close)


@beside
@pytest.mark.parametrize("call", ["euler churn", "ancestral", "heun churn at once", "2m"])
@pytest.mark.parametrize("layout", ["channels_last", "strided", "one dimension"])
def test_layouts(call, layout):
    name, how = CALLS[call]
    x, levels = start()
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    elif layout == "strided":
        x = x.transpose(1, 3)[:, ::2]
    else:
        x = x.flatten()
    theirs, ours = both(name, x, levels, function=lambda x, sigma: x / (2 + sigma[0]), **how)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@beside
@pytest.mark.parametrize("levels_dtype", [torch.float64, torch.float32, torch.float16])
def test_limits_of_churn_are_rounded_like_sigmas(levels_dtype):
    x, _ = start()
    levels = torch.tensor([1.0, 0.7, 0.3, 0.1], dtype=levels_dtype)
    told = []

    def function(x, sigma):
        told.append(sigma[0].item())
        return x / 2

    both("sample_euler", x, levels, function=function, s_churn=1.0, s_tmin=0.3, s_tmax=0.7)
    assert told[:3] == told[3:]
    assert told[2] > 0.35


# ---- ours without k-diffusion ----


@beside
@pytest.mark.parametrize("call", [call for call in CALLS if "sde" not in call])
def test_the_functions_are_those_of_the_takeover(call):
    name, how = CALLS[call]
    x, levels = start(torch.float32)
    _, swapped = both(name, x, levels, **how)
    torch.manual_seed(1)
    assert torch.equal(getattr(k_diffusion, name)(model, x, levels, disable=True, **how), swapped)


@beside
@pytest.mark.parametrize("name", FUNCTIONS)
def test_signatures(name):
    theirs, ours = (inspect.signature(getattr(m, name)).parameters.values() for m in (sampling, k_diffusion))
    assert [(p.name, p.default) for p in ours] == [(p.name, p.default) for p in theirs]


SDE = ["sample_dpmpp_2m_sde", "sample_dpmpp_3m_sde"]


@pytest.mark.parametrize("name", SDE)
def test_own_noise_of_an_sde(name):
    x, levels = start(shape=(3, 4096))
    function = getattr(k_diffusion, name)

    def run(seed, levels=levels, x=x):
        torch.manual_seed(seed)
        return function(lambda x, sigma: 0 * x, x, levels, disable=True)

    # With D = 0 the noise of the last sigma is left.
    to_a_level = levels[:8]
    got = run(5, to_a_level) / to_a_level[-1]
    assert torch.equal(run(5, to_a_level) / to_a_level[-1], got)
    torch.testing.assert_close(got.std(1), torch.ones(3, dtype=got.dtype), rtol=0.05, atol=0)
    torch.testing.assert_close(got.corrcoef(), torch.eye(3, dtype=got.dtype), rtol=0, atol=0.07)
    torch.manual_seed(5)
    torch.randint(0, 2**63 - 1, [])  # as k-diffusion seeds its own
    state = torch.get_rng_state()
    run(5)
    assert torch.equal(torch.get_rng_state(), state)
    # More steps follow the same path: its noise, and with it the sample, is nearly the same.
    finer = torch.cat([torch.stack([levels[:7], (levels[:7] * levels[1:8]) ** 0.5], 1).flatten(), levels[7:8]])
    again, other = run(5, finer) / to_a_level[-1], run(6, to_a_level) / to_a_level[-1]
    assert (again - got).std() < 0.5 * (other - got).std()


@pytest.mark.parametrize("name", SDE)
def test_one_step_of_an_sde_to_zero(name):
    x, levels = start(sigmas="one step to zero")
    torch.testing.assert_close(
        getattr(k_diffusion, name)(model, x, levels, disable=True), model(x, levels[:1].expand(2)), rtol=0, atol=0
    )


def test_the_model_may_write_into_its_sigma():
    x, levels = start(torch.float32)

    def writes(x, sigma):
        got = model(x, sigma)
        sigma.zero_()
        return got

    want = k_diffusion.sample_heun(model, x, levels, disable=True)
    assert torch.equal(k_diffusion.sample_heun(writes, x, levels, disable=True), want)


def test_no_gradient():
    x, levels = start()
    x.requires_grad_()
    enabled = []

    def watched(x, sigma):
        enabled.append(torch.is_grad_enabled())
        return model(x, sigma)

    assert not k_diffusion.sample_euler(watched, x, levels, disable=True).requires_grad
    assert not any(enabled)
    with torch.inference_mode():
        assert k_diffusion.sample_dpmpp_2m(model, x, levels, disable=True).is_inference()


def test_inputs_stay():
    x, levels = start()
    before = x.clone(), levels.clone()
    for name in FUNCTIONS:
        getattr(k_diffusion, name)(model, x, levels, disable=True)
    assert torch.equal(x, before[0])
    assert torch.equal(levels, before[1])


def test_progress(capsys):
    x, levels = start()
    k_diffusion.sample_euler(model, x, levels, disable=True)
    assert capsys.readouterr().err == ""
    pytest.importorskip("tqdm", reason="tqdm is not installed")
    k_diffusion.sample_euler(model, x, levels, disable=False)
    assert "11/11" in capsys.readouterr().err


class Operations(TorchDispatchMode):
    """Names of all operators that make tensors of a size, or numbers."""

    def __init__(self, numel):
        super().__init__()
        self.numel, self.made, self.read = numel, [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        got = function(*args, **(kwargs or {}))
        self.read += function is torch.ops.aten._local_scalar_dense.default
        outputs = got if isinstance(got, (tuple, list)) else [got]
        given = {t.data_ptr() for t in args if isinstance(t, torch.Tensor)}
        if any(isinstance(t, torch.Tensor) and t.numel() == self.numel and t.data_ptr() not in given for t in outputs):
            self.made.append(str(function))
        return got


@pytest.mark.parametrize("call", ["euler", "euler churn", "ancestral", "heun", "lms", "2m", "2m sde", "3m sde"])
def test_a_step_is_one_pass_and_nothing_is_read(call):
    name, how = CALLS[call]
    x, levels = start(torch.float32, shape=(2, 3, 64, 5))
    outputs = [torch.randn_like(x) for _ in range(21)]
    if "sde" in call:
        how = how | {"noise_sampler": lambda sigma, after: outputs[0]}

    def count(function):
        counted, calls, before = Operations(x.numel()), iter(outputs), []

        def next_output(x, sigma):
            before.append(counted.read)
            return next(calls)

        with counted:
            function(next_output, x, levels, disable=True, **how)
        return [o for o in counted.made if "randn" not in o and "normal" not in o], counted.read - before[0]

    passes, read = count(getattr(k_diffusion, name))
    assert passes == ["pyperf_dl.sampler_step.default"] * {"sample_heun": 21}.get(name, 10 if "sde" in call else 11)
    assert read == 0
    if sampling:
        passes, read = count(getattr(sampling, name))
        assert len(passes) >= 4 * 11
        assert read > 0 or name == "sample_lms"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_x_on_another_device_than_sigmas(name):
    x, levels = start(torch.float32)
    got = getattr(k_diffusion, name)(model, x.to("meta"), levels, disable=True)
    assert got.shape == x.shape
    assert got.device.type == "meta"


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(
    ("error", "says", "x", "sigmas"),
    [
        (TypeError, "x must be a torch.Tensor, got list", [1.0], [2.0, 1.0]),
        (TypeError, "x must have one of the dtypes float16, .*, got torch.int64", torch.ones(2, 2).long(), [2.0, 1.0]),
        (ValueError, "x must have a batch dimension, got a tensor without dimensions", torch.ones([]), [2.0, 1.0]),
        (TypeError, "sigmas must be a torch.Tensor, got NoneType", torch.ones(2, 2), None),
        (ValueError, r"sigmas must be floats \[n \+ 1\] for n steps, 1 or more, got .* \[1\]", torch.ones(2, 2), [2.0]),
        (ValueError, r"sigmas must be floats .*, got .*int64 \[2\]", torch.ones(2, 2), [2, 1]),
        (ValueError, r"sigmas must be floats .*, got .*\[1, 2\]", torch.ones(2, 2), [[2.0, 1.0]]),
        (ValueError, r"sigmas must be finite, descend, and end at 0 or above, got \[1", torch.ones(2, 2), [1.0, 2.0]),
        (ValueError, "sigmas must be finite, descend", torch.ones(2, 2), [2.0, 2.0, 1.0]),
        (ValueError, "sigmas must be finite, descend", torch.ones(2, 2), [2.0, 0.0, 0.0]),
        (ValueError, "sigmas must be finite, descend", torch.ones(2, 2), [2.0, -1.0]),
        (ValueError, "sigmas must be finite, descend", torch.ones(2, 2), [float("inf"), 1.0]),
        (ValueError, "sigmas must be finite, descend", torch.ones(2, 2), [2.0, float("nan"), 1.0]),
    ],
)
def test_errors_of_tensors(name, error, says, x, sigmas):
    sigmas = None if sigmas is None else torch.tensor(sigmas)
    with pytest.raises(error, match=rf"^k_diffusion\.{name}: {says}"):
        getattr(k_diffusion, name)(model, x, sigmas, disable=True)


@pytest.mark.parametrize(
    ("name", "error", "says", "how"),
    [
        ("sample_euler", ValueError, "s_churn must be >= 0.0, got -1.0", {"s_churn": -1.0}),
        ("sample_heun", TypeError, "s_noise must be a number, got '1'", {"s_noise": "1"}),
        ("sample_heun", ValueError, "s_tmin must be >= -inf, got nan", {"s_tmin": float("nan")}),
        ("sample_euler_ancestral", ValueError, "eta must be >= 0.0, got -0.5", {"eta": -0.5}),
        ("sample_euler_ancestral", TypeError, "eta must be a number, got a tensor", {"eta": torch.ones([])}),
        ("sample_dpmpp_2m_sde", ValueError, "eta must be finite, got inf", {"eta": float("inf")}),
        ("sample_dpmpp_2m_sde", ValueError, "solver_type must be one of 'midpoint', 'heun'", {"solver_type": "euler"}),
        ("sample_dpmpp_3m_sde", ValueError, "s_noise must be >= 0.0, got -1", {"s_noise": -1}),
        ("sample_lms", ValueError, "order must be at most 4, got 5", {"order": 5}),
        ("sample_lms", ValueError, "order must be >= 1, got 0", {"order": 0}),
        ("sample_lms", TypeError, "order must be an int, got 2.0", {"order": 2.0}),
    ],
)
def test_errors_of_options(name, error, says, how):
    x, levels = start()
    state = torch.get_rng_state()
    with pytest.raises(error, match=rf"^k_diffusion\.{name}: {says}"):
        getattr(k_diffusion, name)(model, x, levels, disable=True, **how)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("answer", [None, torch.ones(2), torch.ones(1, 3, 8, 5)])
def test_a_model_that_returns_something_else(answer):
    says = r"^k_diffusion\.sample_euler: the model must return a tensor of x's shape \[2, 3, 8, 5\], got "
    with pytest.raises(ValueError, match=says):
        k_diffusion.sample_euler(lambda x, sigma: answer, *start(), disable=True)


# ---- the takeover ----


@beside
def test_takeovers():
    x, levels = start()
    assert_takeovers(k_diffusion, lambda: sampling.sample_euler(model, x, levels, disable=True))


@beside
def test_versions(monkeypatch):
    assert_versions_are_checked(k_diffusion, monkeypatch, "k-diffusion", ["0.1.1"], ["0.1", "0.1.0", "0.1.2", "0.2"])


class Marked(torch.Tensor):
    pass


UP = torch.tensor([0.1, 0.5, 2.0], dtype=torch.float64)


@beside
@pytest.mark.parametrize(
    ("name", "change", "why"),
    [
        ("sample_euler", {"sigmas": UP}, "sigmas"),
        ("sample_euler", {"sigmas": [2.0, 1.0, 0.0]}, "sigmas"),
        ("sample_euler", {"sigmas": UP[:1]}, "sigmas"),
        ("sample_euler", {"sigmas": UP.flip(0).as_subclass(Marked)}, "sigmas"),
        ("sample_heun", {"sigmas": torch.tensor([2.0, 2.0, 1.0])}, "sigmas"),
        ("sample_dpmpp_2m", {"sigmas": UP}, "sigmas"),
        ("sample_euler", {"s_churn": -0.2}, "arguments"),
        ("sample_euler_ancestral", {"eta": -0.5}, "arguments"),
        ("sample_euler_ancestral", {"eta": torch.tensor(0.5)}, "arguments"),
        ("sample_heun", {"s_noise": -1.0}, "arguments"),
        ("sample_lms", {"order": 5}, "arguments"),
        ("sample_lms", {"order": "two"}, "arguments"),
        ("sample_dpmpp_2m_sde", {"solver_type": "euler"}, "arguments"),
        ("sample_dpmpp_2m", {"eta": 1.0}, "arguments"),
        ("sample_euler", {"x": start()[0].as_subclass(Marked)}, "not_a_plain_tensor"),
        ("sample_euler", {"x": start()[0].to(torch.complex64)}, "dtype"),
        ("sample_euler", {"x": "x"}, "not_a_plain_tensor"),
        ("sample_euler", {"x": torch.tensor(1.0)}, "shape"),
    ],
)
def test_what_goes_to_k_diffusion(name, change, why):
    x, levels = start()

    def call():
        torch.manual_seed(4)
        how = {"x": x, "sigmas": levels, "disable": True} | change
        return getattr(sampling, name)(lambda x, sigma: x / 2, **how)

    assert_same(call, k_diffusion, 0, **{why: 1})


@beside
def test_errors_of_a_model_pass():
    def fails(x, sigma):
        raise TypeError("no")

    x, levels = start()
    assert_same(lambda: sampling.sample_lms(fails, x, levels, disable=True), k_diffusion, 0)


@beside
def test_names_that_a_module_imported():
    module = types.ModuleType("importer")
    module.sample_heun = sampling.sample_heun
    sys.modules["importer"] = module
    try:
        x, levels = start()
        with k_diffusion.enable():
            module.sample_heun(model, x, levels, disable=True)
        assert k_diffusion.report() == (1, {})
        assert module.sample_heun is sampling.sample_heun
    finally:
        del sys.modules["importer"]


@beside
def test_the_reference_serves_too():
    x, levels = start()
    with pyperf_dl.backend("reference"):
        theirs, ours = both("sample_dpmpp_2m", x, levels)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


# ---- on a GPU ----


@beside
@pytest.mark.gpu
@pytest.mark.parametrize("call", CALLS)
def test_gpu(call):
    needs_tree(call)
    name, how = CALLS[call]
    x, levels = (t.cuda() for t in start(torch.float32))
    theirs, ours = both(name, x, levels, **how)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("call", [call for call in CALLS if "sde" not in call])
def test_gpu_reads_sigmas_once(call):
    name, how = CALLS[call]
    x, levels = (t.cuda() for t in start(torch.float32))
    function = getattr(k_diffusion, name)
    function(model, x, levels, disable=True, **how)  # the table is there

    def last(x, sigma):
        torch.cuda.set_sync_debug_mode("error")  # from the first call of the model on
        return model(x, sigma)

    try:
        function(last, x, levels, disable=True, **how)
    finally:
        torch.cuda.set_sync_debug_mode("default")
