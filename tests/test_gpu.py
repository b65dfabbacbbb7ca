"""What only a GPU can show: the operators there, streams, captured graphs, determinism, launches without a sync."""

import pytest
import torch

from pyperf_dl import check, sliding_window_max, sliding_window_minmax
from pyperf_dl._backend import cuda_problem

pytestmark = pytest.mark.gpu


@pytest.fixture
def x():
    x = torch.randn(64, 20011, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    assert x.is_cuda
    return x


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_every_operator_against_its_reference(backend):
    assert not cuda_problem()
    results = list(check.check(["cuda"], [backend], ["sliding_window"], quick=backend == "triton"))
    assert results
    assert [r for r in results if r.problem] == []


@pytest.mark.parametrize("window", [1, 2, 3, 9, 33, 129, 1025, 4097, 9000, 16385])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8])
def test_values_indices_and_gradients_are_those_of_the_cpu(x, window, dtype):
    x = (x * 50).to(dtype) if not dtype.is_floating_point else x.to(dtype)
    y, index = sliding_window_max(x, window, padding="same", return_indices=True)
    want, where = sliding_window_max(x.cpu(), window, padding="same", return_indices=True)
    assert torch.equal(y.cpu(), want)
    assert torch.equal(index.cpu(), where)
    if dtype.is_floating_point:
        grad = torch.randn_like(y)
        leaf, local = x.clone().requires_grad_(), x.cpu().requires_grad_()
        sliding_window_max(leaf, window, padding="same").backward(grad)
        sliding_window_max(local, window, padding="same").backward(grad.cpu())
        assert torch.equal(leaf.grad.cpu(), local.grad)  # one order of summation on every device


@pytest.mark.parametrize("window", [9, 1025, 16385])
def test_a_thousand_repeats_under_memory_load(x, window):
    grad = torch.randn(64, 20011 - window + 1, device="cuda")
    leaf = x.requires_grad_()
    want = torch.autograd.grad(sliding_window_max(leaf, window), leaf, grad)[0]
    load = torch.cuda.Stream()
    noise = torch.randn(1 << 26, device="cuda")
    for _ in range(1000):
        with torch.cuda.stream(load):
            noise.mul_(1.0001)
        got = torch.autograd.grad(sliding_window_max(leaf, window), leaf, grad)[0]
        assert torch.equal(got, want)


def test_captured_graph_on_new_data(x):
    static = x.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            sliding_window_minmax(static, 777)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        low, high = sliding_window_minmax(static, 777)
    static.copy_(x.flip(1))
    graph.replay()
    want = sliding_window_minmax(x.flip(1), 777)
    assert torch.equal(low, want[0])
    assert torch.equal(high, want[1])


def test_runs_on_the_current_stream(x):
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        late = x + 1
        y = sliding_window_max(late, 129)
    side.synchronize()
    assert torch.equal(y, sliding_window_max(x + 1, 129))


def test_no_host_sync(x):
    sliding_window_max(x, 129)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        sliding_window_max(x, 129, return_indices=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_one_launch_for_values(x):
    sliding_window_max(x, 129)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        sliding_window_max(x, 129)
        torch.cuda.synchronize()
    kernels = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert len(kernels) == 1


def test_second_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x = torch.randn(4, 1000, device="cuda:1")
    assert torch.equal(sliding_window_max(x, 99).cpu(), sliding_window_max(x.cpu(), 99))
