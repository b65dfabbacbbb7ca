"""Splines on a GPU: the bits of the CPU, streams, captured graphs, determinism, launches without a sync."""

import itertools

import pytest
import torch

from pyperf_dl import (
    additive_coupling,
    affine_coupling_packed,
    rational_quadratic_spline,
    rational_quadratic_spline_packed,
)

pytestmark = pytest.mark.gpu

DERIVATIVES = {"linear": -1, "circular": 0, "bounded": 1}
BINS = [1, 2, 5, 7, 8, 10, 16, 32, 33, 64, 256]


def drawn(*shape, dtype=torch.float32, scale=1.0, seed=0, device="cuda"):
    """The same numbers on every device."""
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale
    return numbers.to(dtype).to(device)


def problem(bins, tails="linear", shape=(64, 33), dtype=torch.float32, parameter_dtype=None, scale=1.0):
    x = drawn(*shape, dtype=dtype, scale=2.0)
    count = 3 * bins + DERIVATIVES[tails]
    params = drawn(*shape, count, dtype=parameter_dtype or dtype, scale=scale, seed=1)
    assert x.is_cuda
    assert params.is_cuda
    return x, params


def forward_and_backward(x, params, bins, **options):
    """y, log-det and both gradients, for gradients that do not depend on the device."""
    x, params = x.detach().requires_grad_(), params.detach().requires_grad_()
    y, logdet = rational_quadratic_spline_packed(x, params, bins, **{"tail_bound": 3.0, **options})
    grads = (drawn(*t.shape, dtype=t.dtype, seed=2 + k, device=t.device) for k, t in enumerate((y, logdet)))
    return [t.detach() for t in (y, logdet, *torch.autograd.grad((y, logdet), (x, params), tuple(grads)))]


def kernels(run):
    """How many kernels `run` launches, the second time."""
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    return len([e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA])


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("tails", DERIVATIVES)
@pytest.mark.parametrize("bins", BINS)
def test_bits_of_the_cpu(bins, tails, inverse):
    for precision, parametrization, scale in itertools.product(
        ("fast", "exact"), ("nflows", "zuko"), (1.0, 30.0) if bins < 64 else (1.0,)
    ):
        x, params = problem(bins, tails, (16, 33) if bins < 64 else (3, 33), scale=scale)
        options = {"inverse": inverse, "tails": tails, "precision": precision, "parametrization": parametrization}
        got = forward_and_backward(x, params, bins, **options)
        want = forward_and_backward(x.cpu(), params.cpu(), bins, **options)
        for g, w in zip(got, want, strict=True):
            assert g.is_cuda
            assert torch.equal(g.cpu(), w)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("bins", BINS)
def test_bits_of_the_cpu_by_element(bins, dtype, inverse):
    rules = (*DERIVATIVES, ["linear", "circular", "circular"] * 11)
    for tails, precision in itertools.product(rules, ("fast", "exact")):
        x, params = problem(bins, tails if isinstance(tails, str) else "circular", (5, 33), dtype)
        bound = (torch.arange(33, device=x.device) % 5 + 1) / 2
        bound = bound.to(torch.float64 if dtype == torch.float64 else torch.float32)
        options = {"inverse": inverse, "tails": tails, "precision": precision}
        got = forward_and_backward(x, params, bins, tail_bound=bound, **options)
        want = forward_and_backward(x.cpu(), params.cpu(), bins, tail_bound=bound.cpu(), **options)
        for g, w in zip(got, want, strict=True):
            assert g.is_cuda
            assert torch.equal(g.cpu(), w)


@pytest.mark.parametrize(
    ("dtype", "parameter_dtype"),
    [
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.float64, torch.float64),
    ],
    ids=str,
)
@pytest.mark.parametrize("bins", [5, 8, 9, 10, 16, 32])
def test_dtypes(bins, dtype, parameter_dtype):
    x, params = problem(bins, dtype=dtype, parameter_dtype=parameter_dtype)
    got = forward_and_backward(x, params, bins)
    want = forward_and_backward(x.cpu(), params.cpu(), bins)
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g.cpu(), w)


def layouts(bins):
    """(x, params) of one shape in many layouts."""
    x, params = problem(bins, shape=(4, 6, 130))
    count = params.shape[-1]
    yield "dense", x, params
    yield "planes", x, params.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2)
    yield "half of x", torch.cat([x, x], 2)[:, :, :130], params
    yield "rows with gaps", x, torch.cat([params, params], 3)[..., :count]
    yield "one of two", x, torch.stack([params, params], 3)[:, :, :, 0]
    yield "shared", x, params[:1].expand(4, 6, 130, count)
    yield "transposed x", x.transpose(0, 2).contiguous().transpose(0, 2), params
    shifted = torch.empty(params.numel() + 1, device="cuda")[1:].view_as(params)
    yield "not aligned", x, shifted.copy_(params)


@pytest.mark.parametrize("bins", [7, 8, 32])
def test_layouts(bins):
    want = None
    for name, x, params in layouts(bins):
        got = forward_and_backward(x, params, bins)
        if name == "shared":
            assert torch.equal(got[0].cpu(), forward_and_backward(x.cpu(), params.cpu(), bins)[0])
            continue
        want = want or got
        for g, w in zip(got, want, strict=True):
            assert torch.equal(g, w), name


def test_separate_parameters_are_the_packed_ones():
    x, params = problem(8)
    parts = [p.contiguous() for p in params.split([8, 8, 7], -1)]
    want = rational_quadratic_spline_packed(x, params, 8)
    for tensors in (parts, params.split([8, 8, 7], -1)):
        got = rational_quadratic_spline(x, *tensors)
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1], want[1])


@pytest.mark.parametrize("size", [1, 2, 31, 64, 100, 128, 129, 500, 513, 3000])
@pytest.mark.parametrize("bins", [8, 33])
def test_sums(bins, size):
    x, params = problem(bins, shape=(7, size))
    _, elements = rational_quadratic_spline_packed(x, params, bins, tail_bound=3.0)
    _, logdet = rational_quadratic_spline_packed(x, params, bins, tail_bound=3.0, logdet="sum")
    torch.testing.assert_close(logdet, elements.double().sum(1).float(), rtol=2e-7, atol=1e-10)


def test_many_large_samples_and_empty_ones():
    x, params = problem(2, shape=(600, 700))
    _, elements = rational_quadratic_spline_packed(x, params, 2)
    _, logdet = rational_quadratic_spline_packed(x, params, 2, logdet="sum")
    torch.testing.assert_close(logdet, elements.double().sum(1).float(), rtol=2e-7, atol=1e-10)
    _, logdet = rational_quadratic_spline_packed(x[:, :0], params[:, :0], 2, logdet="sum")
    assert torch.equal(logdet, torch.zeros(600, device="cuda"))


@pytest.mark.parametrize("options", [{}, {"logdet": "sum"}, {"inverse": True, "precision": "exact"}], ids=str)
def test_a_thousand_repeats_under_memory_load(options):
    x, params = problem(8, shape=(40, 3001))
    want = forward_and_backward(x, params, 8, **options)
    load = torch.cuda.Stream()
    noise = torch.randn(1 << 26, device="cuda")
    x, params = x.requires_grad_(), params.requires_grad_()
    grads = [drawn(*t.shape, seed=2 + k) for k, t in enumerate(want[:2])]
    for _ in range(1000):
        with torch.cuda.stream(load):
            noise.mul_(1.0001)
        y, logdet = rational_quadratic_spline_packed(x, params, 8, tail_bound=3.0, **options)
        got = (y, logdet, *torch.autograd.grad((y, logdet), (x, params), grads))
        assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("size", [64, 3000])
def test_captured_graph_on_new_data(size):
    x, params = problem(8, shape=(8, size))
    static, static_params = x.clone(), params.clone()

    def step():
        leaf, raw = static.requires_grad_(), static_params.requires_grad_()
        y, logdet = rational_quadratic_spline_packed(leaf, raw, 8, tail_bound=3.0, logdet="sum")
        return (y, logdet, *torch.autograd.grad(y.sum() + logdet.sum(), (leaf, raw)))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    with torch.no_grad():
        static.copy_(x.flip(0, 1))
        static_params.copy_(params.flip(0, 1))
    graph.replay()
    replayed = [t.clone() for t in got]
    for g, w in zip(replayed, step(), strict=True):
        assert torch.equal(g, w)


def test_runs_on_the_current_stream():
    x, params = problem(16, shape=(64, 1000))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        y, logdet = rational_quadratic_spline_packed(x + 1, params, 16)
    side.synchronize()
    want = rational_quadratic_spline_packed(x + 1, params, 16)
    assert torch.equal(y, want[0])
    assert torch.equal(logdet, want[1])


@pytest.mark.parametrize("options", [{}, {"logdet": "sum"}], ids=str)
def test_one_launch_each_way(options):
    x, params = problem(8, shape=(256, 64))  # 16 Ki scalars
    x, params = x.requires_grad_(), params.requires_grad_()

    def run():
        return rational_quadratic_spline_packed(x, params, 8, **options)

    assert kernels(run) == 1
    y, logdet = run()
    grads = torch.ones_like(y), torch.ones_like(logdet)
    assert kernels(lambda: torch.autograd.grad((y, logdet), (x, params), grads, retain_graph=True)) == 1


CHANNELS = [slice(64, None), slice(0, 64), slice(1, None, 2), slice(0, None, 2), slice(3, 61, 4), slice(5, 6)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("channels", CHANNELS, ids=str)
def test_other_channels_pass_in_the_same_launch(channels, dtype):
    for shape, dense in (((256, 128), True), ((2, 128, 3, 8), True), ((2, 128, 3, 8), False)):
        x = drawn(*shape, dtype=dtype, seed=0)
        x = x if dense else x.to(memory_format=torch.channels_last)
        part = x[:, channels].shape
        params, grad = drawn(*part, 14, dtype=dtype, seed=1), drawn(*shape, dtype=dtype, seed=2)
        leaves = x.requires_grad_(), params.requires_grad_()
        calls = {
            "spline": lambda x, p: rational_quadratic_spline_packed(x, p, 5, channels=channels, tail_bound=3.0),
            "affine": lambda x, p: affine_coupling_packed(x, p[..., :2], channels=channels, activation="tanh"),
            "additive": lambda x, p: additive_coupling(x, p[..., 0], channels=channels),
        }
        for name, call in calls.items():
            got = call(*leaves)
            wants = [t.detach().cpu().requires_grad_() for t in leaves]
            want = call(*wants)
            others = torch.ones(shape[1], dtype=torch.bool)
            others[channels] = False
            assert torch.equal(got[0][:, others].cpu(), x[:, others].cpu())
            torch.testing.assert_close(got[0].cpu(), want[0], rtol=1e-2, atol=1e-2)
            assert kernels(lambda: call(*leaves)) == 1  # noqa: B023
            (of_x,) = torch.autograd.grad(got[0], leaves[:1], grad, retain_graph=True)
            (wanted,) = torch.autograd.grad(want[0], wants[:1], grad.cpu())
            assert torch.equal(of_x[:, others].cpu(), grad[:, others].cpu())
            torch.testing.assert_close(of_x.cpu(), wanted, rtol=1e-2, atol=1e-2)
            if name == "spline":
                grads = grad, torch.ones_like(got[1])
                assert kernels(lambda: torch.autograd.grad(got, leaves, grads, retain_graph=True)) == 1  # noqa: B023


def test_two_launches_for_few_large_samples():
    x, params = problem(8, shape=(2, 5000))
    assert kernels(lambda: rational_quadratic_spline_packed(x, params, 8, logdet="sum")) == 2


def test_no_host_sync():
    x, params = problem(8, shape=(2, 5000))
    x, params = x.requires_grad_(), params.requires_grad_()

    def run():
        y, logdet = rational_quadratic_spline_packed(x, params, 8, logdet="sum")
        torch.autograd.grad((y, logdet), (x, params), (torch.ones_like(y), torch.ones_like(logdet)))

    run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_second_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x, params = problem(8)
    got = forward_and_backward(x.to("cuda:1"), params.to("cuda:1"), 8)
    for g, w in zip(got, forward_and_backward(x, params, 8), strict=True):
        assert g.device == torch.device("cuda:1")
        assert torch.equal(g.cpu(), w.cpu())
