"""The Triton kernels of samplers, against plain PyTorch in float64 and the CPU's; test_triton.py says where this runs.

Triton's interpreter cuts off the bits that bfloat16 has no place for, where a GPU rounds.
"""

import importlib
import itertools
import random
import subprocess
import sys

import pytest
import torch
from test_triton import DEVICE, INTERPRETED, _AbsentGpu, interpreted, pytestmark  # noqa: F401 - pytest reads the last one

import pyperf_dl
from pyperf_dl import NoiseSchedule, StepTable, sampler_step
from pyperf_dl import _sampler_operators as operators
from pyperf_dl.reference import _sampler_linear as linear

NATIVE = hasattr(torch.ops.pyperf_dl, "sampler_step")
ULP = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7, torch.float32: 2.0**-23, torch.float64: 2.0**-52}
DTYPES = (  # of samples, and of what the model makes
    *((d, d) for d in ULP),
    (torch.float32, torch.float16),
    (torch.float32, torch.bfloat16),
)
INF = float("inf")
OUTPUTS = ("next", "denoised", "kept", "corrected", "model_input")
GRADIENTS = ("x", "output", "unconditional", "variance", "h1", "h2", "h3", "last", "noise")
FORMS = {
    "plain": {},
    "guided": {"guided": True},
    "clipped, guided": {"guided": True, "clip": (-0.7, 0.9)},
    "one bound": {"clip": (-INF, 0.4)},
    "history of one": {"history": 1, "denoised": True},
    "history of three": {"history": 3, "keeps": True, "clip": (-1.0, 1.0)},
    "corrected": {"history": 2, "last": True, "keeps": True, "denoised": True},
    "corrected, clipped, guided": {"history": 2, "last": True, "keeps": True, "guided": True, "clip": (-1.0, 1.0)},
    "noise": {"noise": "given", "keeps": True},
    "noise from a key": {"noise": "one key"},
    "noise from keys": {"noise": "keys", "history": 1, "guided": True},
    "learned variance": {"noise": "given", "variance": True},
    "learned variance, keys": {"noise": "keys", "variance": True, "clip": (-1.0, 1.0)},
    "two inputs of the model": {"copies": 2, "guided": True},
    "one input of the model": {"copies": 1, "noise": "keys"},
    "row from memory": {"step": 1, "guided": True, "guidance": 1},
    "a row for each sample": {"step": 4, "guided": True, "guidance": 2, "copies": 3, "noise": "keys"},
    "adjusted": {"adjust": 4, "guided": True, "denoised": True, "history": 1},
    "adjusted alike": {"adjust": 1, "keeps": True, "clip": (-0.5, 0.5)},
    "all": {
        "guided": True, "guidance": 4, "clip": (-1.0, 1.0), "history": 3, "last": True, "noise": "keys", "step": 2,
        "variance": True, "copies": 2, "denoised": True, "keeps": True, "adjust": 2,
    },
}  # fmt: skip


@pytest.fixture
def launcher():
    from pyperf_dl._launch import sampler

    return sampler


@pytest.fixture
def small_programs(launcher, monkeypatch):
    """Few elements then take several programs."""
    monkeypatch.setattr(launcher, "ELEMENTS", 16)


def rounds_once():
    """Older interpreters multiply and then add: bits are not those of the CPU then."""
    return not INTERPRETED or hasattr(importlib.import_module("triton._C.libtriton").interpreter, "fma_fp32")


def numbers(*shape, seed=0, dtype=torch.float32, size=1.0):
    return (size * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def like(x, seed, dtype=None):
    return torch.empty_like(x).copy_(numbers(*x.shape, seed=seed)).to(dtype or x.dtype)


def a_table(rows=3):
    table = numbers(rows, len(linear.COLUMNS), seed=99, dtype=torch.float64)
    table[:, 16:18] -= 1.0
    return table


def step_call(
    x, model_dtype, guided=False, guidance=0, clip=(-INF, INF), history=0, last=False, noise=None, variance=False,
    step=0, copies=0, denoised=False, keeps=False, adjust=0, sample_dims=1, row=1,
):  # fmt: skip
    """The arguments of the operator by name; counts: of how many samples there are numbers, 0 for a number by value."""
    table = a_table()
    keyed = {"one key": torch.tensor([2**40 + 5]), "keys": torch.arange(2) * 2**62 - 3}.get(noise)
    bounds = numbers(adjust, seed=13, dtype=torch.float64).abs() + 0.2
    bounds[1:2] = INF
    return {
        "x": x,
        "output": like(x, 1, model_dtype),
        "unconditional": like(x, 2, model_dtype) if guided else None,
        "variance": like(x, 3, model_dtype) if variance else None,
        **{f"h{k}": like(x, 3 + k) if k <= history else None for k in (1, 2, 3)},
        "last": like(x, 7) if last else None,
        "noise": like(x, 8) if noise == "given" else None,
        "table": table,
        "step": torch.tensor([2, 0, 1, 2])[:step] if step else None,
        "guidance": numbers(guidance, seed=9, dtype=torch.float64) if guidance else None,
        "key": keyed,
        "state": None,
        "adjust": torch.stack([1 + numbers(adjust, seed=14, dtype=torch.float64) / 8, bounds], 1) if adjust else None,
        "row": row,
        "guidance_scale": 3.7,
        "low": clip[0],
        "high": clip[1],
        "offset": 0,
        "denoised": denoised,
        "keeps": keeps,
        "copies": copies,
        "sample_dims": sample_dims,
    }


def on_device(call):
    return {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in call.items()}


def wide(call):
    return {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in call.items()}


def with_noise(launcher, call, like):
    """The noise as the kernels have it, which is in float32, in place of a key."""
    if call["key"] is None:
        return call
    where = on_device(call)
    draw = call["row"] if call["step"] is None else call["step"].tolist()
    single = torch.empty_like(like, dtype=torch.float32, device=DEVICE)
    if isinstance(draw, int):
        noise = launcher.sampler_noise(single, where["key"], None, draw, 0, call["sample_dims"])
    else:  # each row's, of which a sample takes its own
        lead = like.shape[: call["sample_dims"]]
        rows = torch.tensor(draw).repeat(max(lead.numel() // len(draw), 1))[: lead.numel()]
        every = [launcher.sampler_noise(single, where["key"], None, r, 0, call["sample_dims"]).cpu() for r in range(3)]
        flat = [t.reshape(lead.numel(), -1) for t in every]
        noise = torch.stack([flat[r][s] for s, r in enumerate(rows.tolist())]).reshape(like.shape)
    return {**call, "noise": noise.cpu(), "key": None}


def assert_rounded(got, wanted, scale, work):
    """Rounded once from what arithmetic with an epsilon of `work` makes of numbers up to `scale`."""
    assert got.shape == wanted.shape
    got, wanted, dtype = got.detach().cpu().double(), wanted.detach().double(), got.dtype
    stored = ULP[dtype] * (1.0 if INTERPRETED and dtype == torch.bfloat16 else 0.5)
    bound = stored * 1.001 * wanted.abs() + 16 * work * scale
    if dtype == torch.float16:
        bound += 2.0**-25  # below normal numbers
    same = (got == wanted) | (got.isnan() & wanted.isnan())
    off = ~((got - wanted).abs() <= bound) & ~same
    assert not off.any(), f"{got[off][:4]} for {wanted[off][:4]}, bound {bound[off][:4]}"


def check(launcher, name, call, like, outputs):
    """Against plain PyTorch in float64, and the CPU's kernels."""
    got = getattr(launcher, name)(*on_device(call).values())
    wanted = getattr(linear, name)(*wide(with_noise(launcher, call, like)).values())
    work = ULP[torch.float64 if like.dtype in (torch.float32, torch.float64) else torch.float32]
    scale = max([1.0, *(float(t.abs().nan_to_num(0).max()) for t in wanted if t.numel())]) * 16
    for a, b in zip(got, wanted, strict=True):
        assert_rounded(a, b, scale, work)
    assert len(got) == len(outputs)
    if not NATIVE:
        return got
    native = getattr(torch.ops.pyperf_dl, name)(*call.values())
    for what, a, b in zip(outputs, got, native, strict=True):
        assert a.dtype == b.dtype, what
        assert a.shape == b.shape, what
        if a.numel():
            assert a.stride() == b.stride(), what
        cut = INTERPRETED and a.dtype == torch.bfloat16
        if rounds_once() and call["variance"] is None and not cut:  # the exponential is another one
            torch.testing.assert_close(a.cpu(), b, rtol=0, atol=0, equal_nan=True, msg=what)
    return got


def check_step(launcher, call):
    return check(launcher, "sampler_step", call, call["x"], OUTPUTS)


# ---- steps ----


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_step(launcher, form, dtypes):
    check_step(launcher, step_call(numbers(4, 3, 7, dtype=dtypes[0]), dtypes[1], **FORMS[form]))


@pytest.mark.parametrize("form", ["plain", "noise from a key", "noise from keys", "two inputs of the model", "all"])
def test_several_programs(small_programs, launcher, form):
    """With samples of more than a program, and programs of several samples."""
    for shape in ((4, 150), (4, 5, 2), (4, 1)):
        check_step(launcher, step_call(numbers(*shape), torch.float32, **FORMS[form]))


@pytest.mark.parametrize("sample_dims", [0, 1, 2, 3])
def test_sample_dims(launcher, sample_dims):
    x = numbers(4, 2, 3)
    for options in (FORMS["two inputs of the model"], {"noise": "one key", "copies": 2}, {"copies": 3, "keeps": True}):
        got = check_step(launcher, step_call(x, torch.float32, **options, sample_dims=sample_dims))
        at = max(sample_dims - 1, 0)
        assert got[4].shape == (*x.shape[:at], options["copies"], *x.shape[at:])
    if sample_dims:
        check_step(launcher, step_call(x, torch.float32, **FORMS["all"], sample_dims=sample_dims))


def test_rows_that_do_not_exist(launcher):
    for row in (-1, 3, 2**40):
        got = check_step(launcher, step_call(numbers(2, 5), torch.float32, row=row, denoised=True))
        assert got[0].isnan().all()
    call = step_call(numbers(4, 5), torch.float32, **FORMS["a row for each sample"])
    call["step"] = torch.tensor([0, 7, -1, 2])
    got = launcher.sampler_step(*on_device(call).values())[0].cpu()
    assert got.isnan().all(1).tolist() == [False, True, True, False]
    assert not got[[0, 3]].isnan().any()


def test_nan_and_infinities(launcher):
    """NaN stays in its element; a clip brings infinities back."""
    x = numbers(1, 8)
    x[0, 2], x[0, 5] = torch.nan, torch.inf
    for options in ({"clip": (-1.0, 1.0)}, {"adjust": 1}, {"last": True, "history": 1, "clip": (-1.0, 1.0)}):
        got = check_step(launcher, step_call(x, torch.float32, **options))
        assert got[0].isnan().flatten().nonzero().flatten().tolist() == [2]
    denoised = launcher.sampler_step(*on_device(step_call(x, torch.float32, denoised=True, clip=(-1, 1))).values())[1]
    assert denoised.cpu()[0, 5].abs() == 1


def test_a_learned_variance_in_float64(launcher):
    """To a few ulps of the exponential, for deviations of all sizes."""
    call = step_call(numbers(1, 64, dtype=torch.float64), torch.float64, noise="given", variance=True)
    call["variance"] = torch.linspace(-1, 1, 64, dtype=torch.float64)[None]
    call["table"][:, :15] = 0
    call["table"][:, 8] = 1
    call["table"][:, 16], call["table"][:, 17] = -40.0, 1.0
    got = launcher.sampler_step(*on_device(call).values())[0].cpu()
    wanted = linear.sampler_step(*call.values())[0]
    torch.testing.assert_close(got, wanted, rtol=1e-14, atol=0)


# ---- layouts ----


def layouts():
    x = numbers(4, 3, 2, 5)
    return {
        "contiguous": x,
        "channels last": x.to(memory_format=torch.channels_last),
        "every other": numbers(4, 3, 4, 10)[..., ::2, ::2],
        "every other sample": numbers(8, 3, 2, 5)[::2],
        "part of the channels": numbers(4, 6, 2, 5)[:, 1:4],
        "samples last": x.movedim(0, -1).contiguous().movedim(-1, 0),
        "samples expanded": x[:1].expand(4, 3, 2, 5),
        "channels expanded": x[:, :1].expand(4, 3, 2, 5),
        "flat samples": numbers(4, 1, 1, 1),
        "one": numbers(1, 1, 1, 1),
        "no sample": x[:0],
        "empty samples": x[..., :0],
    }


@pytest.mark.parametrize("layout", layouts())
def test_layouts(launcher, layout):
    """Of x, and of an operand; of the outputs, as those of the CPU are."""
    x = layouts()[layout]
    options = [{"copies": 2, "keeps": True, "noise": "given"}, {"noise": "one key"}]
    for sample_dims, option in itertools.product((0, 1, 2), options):
        call = step_call(x, torch.float32, **option, sample_dims=sample_dims)
        checks = [call, {**call, "output": x.flip(-1)}, {**call, "x": x.contiguous(), "output": x}]
        for c in checks:
            if x.numel():
                check_step(launcher, c)
            else:
                assert [t.shape for t in launcher.sampler_step(*on_device(c).values())] == [
                    t.shape for t in linear.sampler_step(*c.values())
                ]


@pytest.mark.parametrize("seed", range(24))
def test_random_calls(launcher, monkeypatch, seed):
    choose = random.Random(seed)
    monkeypatch.setattr(launcher, "ELEMENTS", choose.choice((4, 32, 1024)))
    dims = choose.randint(1, 4)
    sample_dims = choose.randint(0, dims)
    shape = [choose.choice((1, 2, 4)) for _ in range(sample_dims)]
    shape += [choose.choice((1, 2, 3, 5, 33)) for _ in range(dims - sample_dims)]
    dtype, model_dtype = choose.choice(DTYPES)
    order = choose.sample(range(dims), dims)
    x = numbers(*(shape[d] for d in order), dtype=dtype).permute([order.index(d) for d in range(dims)])
    samples = torch.Size(shape[:sample_dims]).numel()
    counts = [n for n in (1, 2, 4) if samples % n == 0]
    coin = lambda: choose.random() < 0.5  # noqa: E731
    noise = choose.choice((None, "given", "one key", "keys" if samples % 2 == 0 else None))
    bounds = choose.choice(((-INF, INF), (-0.8, 0.8), (0.0, INF)))
    options = {
        "guided": coin(), "guidance": choose.choice((0, *counts)), "clip": bounds, "history": choose.randint(0, 3),
        "last": coin(), "noise": noise, "variance": coin(), "step": choose.choice((0, *counts)),
        "copies": choose.randint(0, 3), "denoised": coin(), "keeps": coin(), "row": choose.randint(0, 2),
        "adjust": choose.choice((0, *counts)), "sample_dims": sample_dims,
    }  # fmt: skip
    check_step(launcher, step_call(x, model_dtype, **options))
    options.pop("adjust")
    check_backward(launcher, x, model_dtype, options)


# ---- noise ----


@pytest.mark.skipif(not NATIVE, reason="the compiled library is not there")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("draw", [-1, 0, 1, 2**31 - 1, 2**40 + 3, -(2**63)])
def test_noise_is_that_of_the_cpu(launcher, dtype, draw):
    keys = torch.tensor([0, -1, 2**63 - 1, 0x123456789ABCDEF])
    for shape in ((4, 7, 300), (4, 129), (4, 5), (8, 1)):
        x = torch.empty(shape, dtype=dtype)
        got = launcher.sampler_noise(x.to(DEVICE), keys.to(DEVICE), None, draw, 0, 1)
        wanted = torch.ops.pyperf_dl.sampler_noise(x, keys, None, draw, 0, 1)
        assert got.dtype == dtype
        assert got.is_contiguous()
        if INTERPRETED and rounds_once():
            assert torch.equal(got.cpu(), wanted)
        apart = 2 * ULP[torch.float32] + (ULP[dtype] if dtype == torch.float16 else 0)
        assert ((got.cpu().double() - wanted.double()).abs() <= apart * wanted.double().abs()).all()


def test_noise_is_that_of_plain_pytorch(launcher):
    x, keys = torch.empty(2, 5000), torch.tensor([3, -(2**50)])
    got = launcher.sampler_noise(x.to(DEVICE), keys.to(DEVICE), None, 12, 0, 1).cpu().double()
    wanted = linear.sampler_noise(x.double(), keys, None, 12, 0, 1)
    assert ((got - wanted).abs() <= 4 * ULP[torch.float32] * wanted.abs() + 1e-7).all()


def test_noise_does_not_depend_on_the_batch(launcher, small_programs):
    x, keys = torch.empty(3, 2, 200, device=DEVICE), torch.tensor([5, 6, 7], device=DEVICE)
    together = launcher.sampler_noise(x, keys, None, 4, 0, 1)
    for i in range(3):
        assert torch.equal(together[i], launcher.sampler_noise(x[i], keys[i : i + 1], None, 4, 0, 0))
    channels_last = x[..., None].to(memory_format=torch.channels_last)
    assert torch.equal(launcher.sampler_noise(channels_last, keys, None, 4, 0, 1)[..., 0], together)


# ---- backward ----


def backward_call(x, model_dtype, options, wanted=None):
    call = step_call(x, model_dtype, **options)
    outputs = linear.sampler_step(*call.values())
    grads = [like(t, 20 + k) for k, t in enumerate(outputs)]
    grads[0] = like(x, 20)  # in the layout of x
    clipping = linear.clips(call["low"], call["high"])
    drawn = call["noise"] is not None or call["key"] is not None
    keep_noise = call["variance"] is not None and drawn
    if wanted is None:
        given = [call[name] is not None for name in GRADIENTS]
        given[3] = given[3] and drawn
        wanted = sum(1 << k for k, there in enumerate(given) if there)
    return {
        **{f"grad_{what}": g for what, g in zip(OUTPUTS, grads, strict=True)},
        **{name: call[name] if clipping else None for name in ("x", "output", "unconditional")},
        "variance": call["variance"] if keep_noise else None,
        "noise": call["noise"] if keep_noise else None,
        "grad_log_prob": None,
        "score": None,
        **{name: call[name] for name in ("table", "step", "guidance", "key", "state")},
        **{name: call[name] for name in ("row", "guidance_scale", "low", "high", "offset")},
        "guided": call["unconditional"] is not None,
        "next": True,
        "denoised": call["denoised"],
        "keeps": call["keeps"],
        "corrects": call["last"] is not None,
        "copies": call["copies"],
        "wanted": wanted,
        "sample_dims": call["sample_dims"],
    }


def check_backward(launcher, x, *how, **wanted):
    return check(launcher, "sampler_step_backward", backward_call(x, *how, **wanted), x, GRADIENTS)


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("form", [f for f in FORMS if not f.startswith("adjusted")])
def test_backward(launcher, form, dtypes):
    options = {k: v for k, v in FORMS[form].items() if k != "adjust"}
    check_backward(launcher, numbers(4, 3, 7, dtype=dtypes[0]), dtypes[1], options)


@pytest.mark.parametrize("wanted", range(9))
def test_one_gradient_alone(launcher, wanted):
    options = {k: v for k, v in FORMS["all"].items() if k != "adjust"}
    got = check_backward(launcher, numbers(4, 9), torch.float16, options, wanted=1 << wanted)
    assert [t.numel() for t in got] == [36 if k == wanted else 0 for k in range(9)]


@pytest.mark.parametrize("layout", layouts())
def test_layouts_of_gradients(small_programs, launcher, layout):
    x = layouts()[layout]
    if x.numel():
        for sample_dims, option in itertools.product((0, 1, 2), ({"copies": 2, "clip": (-1.0, 1.0)}, FORMS["noise"])):
            check_backward(launcher, x, torch.float32, {**option, "sample_dims": sample_dims})


# ---- log-probability ----

TRANSITIONS = {
    "noise": {"noise": "given", "copies": 2},
    "learned variance, keys": {"noise": "keys", "variance": True, "clip": (-1.0, 1.0), "denoised": True},
    "target": {"history": 2, "guided": True},
    "corrected target": {"history": 2, "last": True, "keeps": True, "variance": True},
    "a row for each sample": {"noise": "given", "step": 4, "guided": True, "guidance": 2},
    "adjusted": {"noise": "one key", "adjust": 4, "guided": True},
}


def transition_call(x, model_dtype, **options):
    call = step_call(x, model_dtype, **options)
    call["table"][:, 8] = call["table"][:, 8].abs() + 0.5
    drawn = call["noise"] is not None or call["key"] is not None
    behind = {"score": True, "sample_dims": call.pop("sample_dims")}
    names = list(call)
    at = names.index("table")
    target = None if drawn else like(x, 17)
    return {**{n: call[n] for n in names[:at]}, "target": target, **{n: call[n] for n in names[at:]}, **behind}


def transition_backward_call(call, made):
    grads = [like(t, 20 + k) for k, t in enumerate(made)]
    names = ("x", "output", "unconditional", "variance", "noise")
    given = [call[name] is not None for name in GRADIENTS]
    return {
        "grad_next": call["x"] if call["target"] is not None else grads[0],
        **{f"grad_{what}": g for what, g in zip(OUTPUTS[1:], grads[1:5], strict=True)},
        **{name: call[name] for name in names},
        "grad_log_prob": grads[5],
        "score": made[6],
        **{name: call[name] for name in ("table", "step", "guidance", "key", "state")},
        **{name: call[name] for name in ("row", "guidance_scale", "low", "high", "offset")},
        "guided": call["unconditional"] is not None,
        "next": call["target"] is None,
        **{name: call[name] for name in ("denoised", "keeps")},
        "corrects": call["last"] is not None,
        "copies": call["copies"],
        "wanted": sum(1 << k for k, there in enumerate(given) if there),
        "sample_dims": call["sample_dims"],
    }


@pytest.mark.skipif(not NATIVE, reason="the compiled library is not there")
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("form", TRANSITIONS)
def test_transitions_are_those_of_the_cpu(launcher, small_programs, form, dtypes):
    """Which are compared with plain PyTorch; sums but for their order, and exponentials are others."""
    for shape in ((4, 3, 7), (4, 150), (4, 1)):
        call = transition_call(numbers(*shape, dtype=dtypes[0]), dtypes[1], **TRANSITIONS[form])
        got = launcher.sampler_transition(*on_device(call).values())
        native = torch.ops.pyperf_dl.sampler_transition(*call.values())
        narrow = dtypes[0].itemsize == 2 or dtypes[1].itemsize == 2
        for k, (a, b) in enumerate(zip(got, native, strict=True)):
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            close = {"rtol": 2.0**-6, "atol": 2.0**-5} if narrow else {"rtol": 1e-5, "atol": 1e-5}
            if k >= 5:  # by deviations of 0.5, which samples of 16 bits are off by
                close["atol"] *= 16 * (shape[-1] if k == 5 else 1)
            torch.testing.assert_close(a.cpu(), b, **close)
        if call["adjust"] is not None:
            continue
        back = transition_backward_call(call, native)
        got = launcher.sampler_step_backward(*on_device(back).values())
        for a, b in zip(got, torch.ops.pyperf_dl.sampler_step_backward(*back.values()), strict=True):
            close = {"rtol": 2.0**-6, "atol": 2.0**-5} if narrow else {"rtol": 1e-5, "atol": 1e-4}
            torch.testing.assert_close(a.cpu(), b, **close)


def test_a_log_probability_in_float64(launcher, small_programs):
    x = numbers(4, 70, dtype=torch.float64)
    call = transition_call(x, torch.float64, noise="given", variance=True, guided=True)
    got = launcher.sampler_transition(*on_device(call).values())
    for a, b in zip(got, linear.sampler_transition(*call.values()), strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-12, atol=1e-12)
    back = transition_backward_call(call, [t.cpu() for t in got])
    wanted = linear.sampler_step_backward(*back.values())
    for a, b in zip(launcher.sampler_step_backward(*on_device(back).values()), wanted, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-12, atol=1e-12)


# ---- what is wrong ----


def test_numbers_of_a_generator_are_refused(launcher):
    state = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    call = on_device(step_call(numbers(2, 3), torch.float32))
    for name, arguments in (
        ("sampler_step", {**call, "state": state}.values()),
        ("sampler_noise", (call["x"], None, state, 0, 0, 1)),
    ):
        with pytest.raises(RuntimeError, match=f"^{name}: the triton backend does not make .* draw them with torch.ra"):
            getattr(launcher, name)(*arguments)


X = torch.zeros(4, 6)
BAD = [
    ("output must be torch.float64, got torch.float32", {"x": X.double()}),
    ("output must be torch.float16, got torch.float32", {"x": X.half()}),
    ("x must be torch.float16 or .*, got torch.int64", {"x": X.long(), "output": X.long()}),
    (r"output must have shape \[4, 6\], got \[4, 5\]", {"output": X[:, 1:]}),
    (r"h2 must have shape \[4, 6\], got \[6\]", {"h2": X[0]}),
    ("unconditional must be torch.float32, got torch.float16", {"unconditional": X.half()}),
    ("last must be torch.float32, got torch.float64", {"last": X.double()}),
    ("noise and key exclude each other, got both", {"noise": X, "key": torch.tensor([1])}),
    (r"sample_dims must be in \[0, 2\], got 3", {"sample_dims": 3}),
    (r"sample_dims must be in \[0, 2\], got -1", {"sample_dims": -1}),
    (r"table must be torch.float64 \[rows, 19\], .*, got torch.float64 \[3, 18\]", {"table": a_table()[:, 1:]}),
    (r"table must be .*, got torch.float32 \[3, 19\]", {"table": a_table().float()}),
    ("step must be torch.int64, .* got torch.int32", {"step": torch.tensor([1], dtype=torch.int32)}),
    (r"step must be .* one for each, got torch.int64 \[3\]", {"step": torch.tensor([1, 2, 0])}),
    (r"key must be .* one for each, got torch.int64 \[0\]", {"key": torch.tensor([1])[:0]}),
    ("guidance must be torch.float64, .*, got torch.float32", {"guidance": torch.tensor(1.0)}),
    (r"adjust must be .*, got torch.float64 \[3\]", {"adjust": torch.ones(3, dtype=torch.float64)}),
    ("copies must be >= 0, got -1", {"copies": -1}),
]


@pytest.mark.parametrize(("message", "change"), BAD, ids=lambda v: v if isinstance(v, str) else "")
def test_what_native_operators_refuse_is_refused(launcher, message, change):
    call = {**step_call(X, torch.float32), **change}
    with pytest.raises(RuntimeError, match=f"^sampler_step: {message}"):
        launcher.sampler_step(*on_device(call).values())
    if NATIVE:
        with pytest.raises(RuntimeError):
            torch.ops.pyperf_dl.sampler_step(*call.values())


@pytest.mark.parametrize("wrong", [torch.zeros(4, dtype=torch.float64), torch.zeros(3)], ids=["dtype", "count"])
def test_gradients_of_log_probabilities_are_checked(launcher, wrong):
    call = transition_call(X, torch.float32, noise="given")
    back = transition_backward_call(call, linear.sampler_transition(*call.values()))
    launcher.sampler_step_backward(*on_device(back).values())
    with pytest.raises(RuntimeError, match=r"^sampler_step_backward: grad_log_prob must be torch.float32 .* 4 samples"):
        launcher.sampler_step_backward(*on_device({**back, "grad_log_prob": wrong}).values())


# ---- processes that are not interpreted ----


def test_cpu_tensors_need_the_interpreter():
    code = (
        "import torch, pyperf_dl\nfrom pyperf_dl._launch import sampler\n"
        "sampler.sampler_noise(torch.zeros(2, 3), torch.tensor([1]), None, 0, 0, 1)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=interpreted("0"), check=False
    )
    assert "needs a GPU" in run.stderr


@pytest.mark.parametrize("target", ["cuda:90:32", "hip:gfx942:64"])
def test_every_kernel_compiles(target):
    """What the interpreter accepts is not all Triton; no GPU is needed to compile for one."""
    command = [sys.executable, __file__, target]
    run = subprocess.run(command, capture_output=True, text=True, env=interpreted("0"), check=False)
    assert run.returncode == 0, run.stderr
    assert {"sampler_step", "sampler_step_backward", "sampler_noise"} <= set(run.stdout.split())


# ---- through the package ----


def public_calls():
    """A stochastic sampler, a corrector, and a step that needs whole samples, each with its gradients."""
    schedule = NoiseSchedule.from_betas(10, spacing="trailing")
    g = torch.Generator().manual_seed(0)

    def normal():
        return torch.randn(2, 3, 20, generator=g).to(DEVICE)

    how = {"uncond": normal(), "guidance": 3.0, "model_inputs": 2, "denoised": True}
    yield StepTable.ddpm(schedule), (normal(), normal()), how | {"key": 5, "clip": 1.0}
    yield StepTable.unipc(schedule), (normal(), normal()), how | {"history": tuple(normal() for _ in range(3))}
    yield (
        StepTable.ddim(schedule),
        (normal(), normal()),
        how | {"dynamic_threshold": (0.9, 2.0), "guidance_rescale": 0.5},
    )


@pytest.mark.parametrize("call", range(3))
def test_public_step_is_that_of_the_reference(call):
    table, inputs, how = list(public_calls())[call]
    results = []
    for backend in ("triton", "reference"):
        with pyperf_dl.backend(backend):
            leaves = [t.detach().clone().requires_grad_() for t in inputs]
            step = sampler_step(*leaves, table, 4, **how)
            outputs = [step.sample, step.denoised, step.model_input]
            results.append([*outputs, *torch.autograd.grad(sum(t.sin().sum() for t in outputs), leaves)])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_opcheck():
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    forward = list(step_call(x, torch.float32, **FORMS["corrected, clipped, guided"]).values())
    torch.library.opcheck(operators.step.triton.op, tuple(forward))
    forward = [t.requires_grad_() if torch.is_tensor(t) and k < 9 else t for k, t in enumerate(forward)]
    torch.library.opcheck(operators.step.triton.op, tuple(forward))
    backward = backward_call(x, torch.float32, FORMS["corrected, clipped, guided"]).values()
    torch.library.opcheck(operators._backward.triton.op, tuple(backward))


def _compile_for(target):
    """Compiles what calls of every form would launch, and prints the kernels' names."""
    import triton
    from triton.backends.compiler import GPUTarget

    from pyperf_dl._launch import sampler as launcher

    kind, architecture, warp = target.split(":")
    triton.runtime.driver.set_active(
        _AbsentGpu(GPUTarget(kind, int(architecture) if architecture.isdigit() else architecture, int(warp)))
    )
    found = []

    def compiled(kernel, programs, on, *args, **options):
        found.append(kernel.warmup(*args, grid=(programs,), **options))
        print(kernel.__name__)

    launcher._launch, launcher.common.check_device = compiled, lambda t, kernel: None
    options = {name: v for name, v in FORMS["all"].items() if name != "adjust"}
    for dtype, model_dtype, form in (
        (torch.float16, torch.float16, "plain"),
        (torch.bfloat16, torch.bfloat16, "learned variance, keys"),
        (torch.float32, torch.bfloat16, "all"),
        (torch.float64, torch.float64, "corrected"),
    ):
        x = torch.zeros(4, 5, 300, dtype=dtype)
        launcher.sampler_step(*step_call(x, model_dtype, **FORMS[form]).values())
        if dtype in (torch.bfloat16, torch.float64):
            launcher.sampler_noise(x, torch.tensor([1]), None, -1, 0, 1)
            launcher.sampler_step_backward(*backward_call(x, model_dtype, options).values())
    for dtype, model_dtype, form in (
        (torch.float16, torch.float16, "learned variance, keys"),
        (torch.float32, torch.bfloat16, "corrected target"),
        (torch.float64, torch.float64, "a row for each sample"),
    ):
        call = transition_call(torch.zeros(4, 5, 300, dtype=dtype), model_dtype, **TRANSITIONS[form])
        made = launcher.sampler_transition(*call.values())
        launcher.sampler_step_backward(*transition_backward_call(call, made).values())
    # A row and a draw are no part of what is compiled.
    found.clear()
    for row in (0, 1, 16, 2**40):
        launcher.sampler_step(*step_call(X, torch.float32, row=row).values())
        launcher.sampler_noise(X, torch.tensor([1]), None, row, 0, 1)
    assert len(set(map(id, found))) == 2


if __name__ == "__main__":
    _compile_for(sys.argv[1])
