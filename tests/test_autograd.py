"""The routes of an operator: torch.func transforms, forward AD, compilation, export, sharding; on sliding_window."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.library import opcheck

import pyperf_dl
from pyperf_dl import sliding_window as family
from pyperf_dl import sliding_window_max, sliding_window_min, sliding_window_minmax

X = torch.randn(4, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
T = torch.randn(4, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def ours(x):
    return sliding_window_max(x, 3, padding="same")


def peer(x):
    """The same in torch's own operators; rank 1 or 2."""
    rows = x.reshape(1, -1, x.shape[-1])
    return torch.nn.functional.max_pool1d(rows, 3, 1, 1).reshape(x.shape)


def backward_of_vmap(f):
    leaf = X.clone().requires_grad_()
    (vmap(f)(leaf) ** 2).sum().backward()
    return leaf.grad


def dual(f, requires_grad):
    with forward_ad.dual_level():
        x = forward_ad.make_dual(X.clone().requires_grad_(requires_grad), T)
        return forward_ad.unpack_dual(f(x)).tangent


TRANSFORMS = {
    "grad": lambda f: grad(lambda x: (f(x) ** 2).sum())(X),
    "vmap": lambda f: vmap(f, in_dims=1, out_dims=1)(X.t().contiguous().t()),
    "vmap of grad": lambda f: vmap(grad(lambda x: (f(x) ** 2).sum()))(X),
    "grad of vmap": lambda f: grad(lambda x: (vmap(f)(x) ** 2).sum())(X),
    "vmap of vmap": lambda f: vmap(vmap(f))(X.reshape(2, 2, 12)),
    "jvp": lambda f: jvp(f, (X,), (T,))[1],
    "vjp": lambda f: vjp(f, X)[1](T)[0],
    "jacfwd": lambda f: jacfwd(f)(X[0]),
    "jacrev": lambda f: jacrev(f)(X[0]),
    "hessian": lambda f: hessian(lambda x: (f(x) ** 3).sum())(X[0]),
    "vmap of jvp": lambda f: vmap(lambda x, t: jvp(f, (x,), (t,))[1])(X, T),
    "backward of vmap": backward_of_vmap,
    "dual": lambda f: dual(f, False),
    "dual that requires grad": lambda f: dual(f, True),
}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("recompute", [False, True])
def test_transforms(name, recompute):
    got = TRANSFORMS[name](lambda x: sliding_window_max(x, 3, padding="same", recompute=recompute))
    torch.testing.assert_close(got, TRANSFORMS[name](peer))


@pytest.mark.parametrize("name", ["grad", "vmap", "vmap of grad", "jvp", "jacfwd", "hessian", "dual"])
def test_compiled_transforms_are_right_or_an_error(name):
    transform = TRANSFORMS[name]
    torch._dynamo.reset()
    compiled = torch.compile(lambda: transform(ours), fullgraph=True, backend="aot_eager")
    try:
        got = compiled()
    except torch._dynamo.exc.TorchDynamoException:  # what dynamo cannot do it says
        return
    torch.testing.assert_close(got, transform(peer))


FUNCTIONS = {
    "max": lambda x: sliding_window_max(x, 3),
    "min, strided": lambda x: sliding_window_min(x, 3, stride=2, dilation=2, padding=(4, 1)),
    "minmax, reflected": lambda x: sliding_window_minmax(x, 5, padding="same", mode="reflect"),
    "ties last, recomputed": lambda x: sliding_window_max(x, 4, 0, ties="last", recompute=True),
    "minmax, recomputed": lambda x: sliding_window_minmax(x, 4, recompute=True),
    "box": lambda x: sliding_window_max(x, (2, 3), (0, 1), padding="same"),
    "box minmax": lambda x: sliding_window_minmax(x, (3, 2), (0, 1), mode="wrap", padding=1),
    "min_count": lambda x: sliding_window_max(x, 3, nan="ignore", padding="causal", min_count=3)[:, 2:],
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradcheck(name):
    leaf = X.clone().requires_grad_()
    assert torch.autograd.gradcheck(FUNCTIONS[name], leaf, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(FUNCTIONS[name], leaf)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_forced_reference_agrees(name):
    leaf = X.clone().requires_grad_()
    with pyperf_dl.backend("reference"):
        want = FUNCTIONS[name](leaf)
        want = want if isinstance(want, tuple) else (want,)
        (want_grad,) = torch.autograd.grad(sum((y * y).sum() for y in want), leaf)
    got = FUNCTIONS[name](leaf)
    got = got if isinstance(got, tuple) else (got,)
    (got_grad,) = torch.autograd.grad(sum((y * y).sum() for y in got), leaf)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(got_grad, want_grad)


def test_backend_names():
    with pytest.raises(ValueError, match="backend: name must be one of 'native', 'triton', 'reference', got 'cuda'"):
        pyperf_dl.backend("cuda")
    with pyperf_dl.backend("reference"), pyperf_dl.backend("native"):
        assert pyperf_dl._backend.serving("cpu") == "native"
    twice = pyperf_dl.backend("reference")
    with twice, twice:
        assert pyperf_dl._backend.serving(X) == "reference"
    assert pyperf_dl._backend._forced is None


# ---- opcheck ----


def operator_calls():
    leaf = X.clone().requires_grad_()
    strided = torch.randn(12, 4, dtype=torch.float64).t().requires_grad_()
    offsets = family._extremum_offsets(X, 1, 3, 1, 1, 1, 12, "constant", False, False, False)[1]
    head, tail = (1, 3, 1, 1, 1, 12, "constant"), (False, True)
    geometry = (3, 1, 1, 1, "constant")
    for x in (X, leaf, strided):
        yield family._extremum, (x, *head, True, *tail)
        yield family._extremum_offsets, (x, *head, False, *tail)
        yield family._minmax, (x, *head, *tail)
        yield family._minmax_offsets, (x, *head, *tail)
        yield family._backward, (x, offsets, 1, 12, *geometry)
        yield family._gather, (x, offsets, 1, *geometry)
    yield family._index, (offsets, 1, 12, *geometry)
    yield family._extremum, (torch.randint(0, 9, (3, 12)), *head, True, *tail)


@pytest.mark.parametrize("n", range(20))
def test_opcheck(n):
    operator, args = list(operator_calls())[n]
    opcheck(operator.native.op, args)


def test_every_operator_is_checked():
    assert len(list(operator_calls())) == 20
    called = {operator.name for operator, _ in operator_calls()}
    assert called == {o.name for o in vars(family).values() if isinstance(o, type(family._extremum))}


# ---- compilation ----


@pytest.mark.parametrize("requires_grad", [False, True])
def test_compile_takes_one_graph_and_keeps_it(requires_grad):
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()

    def f(x):
        y, index = sliding_window_max(x, 5, padding="same", return_indices=True)
        low, high = sliding_window_minmax(x, (2, 3), (0, 1), padding="causal")
        return y * 2 + low - high, index

    compiled = torch.compile(f, fullgraph=True, backend=counter)
    for shape in ((3, 40), (7, 33), (2, 129)):
        x = torch.randn(shape, requires_grad=requires_grad)
        for got, want in zip(compiled(x), f(x), strict=True):
            assert torch.equal(got, want)
    assert counter.frame_count <= 2


def test_symbolic_tracing():
    from torch.fx.experimental.proxy_tensor import make_fx

    traced = make_fx(lambda x: sliding_window_max(x, 3), tracing_mode="symbolic")(torch.randn(2, 20))
    x = torch.randn(3, 31)
    assert torch.equal(traced(x), sliding_window_max(x, 3))


def test_compiled_gradients():
    torch._dynamo.reset()
    f = torch.compile(lambda x: ours(x) ** 2, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (12, 30, 57):
        x = torch.randn(3, length, dtype=torch.float64, requires_grad=True)
        (got,) = torch.autograd.grad(f(x).sum(), x)
        (want,) = torch.autograd.grad((peer(x) ** 2).sum(), x)
        torch.testing.assert_close(got, want)


class Layer(torch.nn.Module):
    def forward(self, x):
        y, index = sliding_window_max(x, 7, padding="causal", return_indices=True)
        return y, index, sliding_window_min(x, 3, stride=2)


def test_export_and_decompositions():
    length = torch.export.Dim("length", min=20, max=4096)
    exported = torch.export.export(Layer(), (torch.randn(2, 100),), dynamic_shapes={"x": {1: length}})
    x = torch.randn(2, 333)
    for got, want in zip(exported.module()(x), Layer()(x), strict=True):
        assert torch.equal(got, want)
    table = torch.export.default_decompositions()
    table.update(pyperf_dl.decompositions())
    plain = torch.export.export(Layer(), (torch.randn(2, 100),)).run_decompositions(table)
    assert "pyperf_dl" not in str(plain.graph)
    x = torch.randn(2, 100)
    for got, want in zip(plain.module()(x), Layer()(x), strict=True):
        assert torch.equal(got, want)


def test_aot_inductor(tmp_path, monkeypatch):
    """Also where CI is set, which makes Inductor refuse operators that have a decomposition it does not use."""
    monkeypatch.setenv("CI", "1")
    exported = torch.export.export(Layer(), (torch.randn(2, 100),))
    with torch._inductor.utils.fresh_inductor_cache():
        package = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "layer.pt2"))
    x = torch.randn(2, 100)
    for got, want in zip(torch._inductor.aoti_load_package(package)(x), Layer()(x), strict=True):
        assert torch.equal(got, want)


def test_inductor():
    torch._dynamo.reset()
    x = torch.randn(4, 200, requires_grad=True)
    f = torch.compile(lambda x: (ours(x * 2) + 1).relu().sum(), fullgraph=True)
    (got,) = torch.autograd.grad(f(x), x)
    (want,) = torch.autograd.grad((peer(x * 2) + 1).relu().sum(), x)
    torch.testing.assert_close(got, want)


# ---- sharding, flops, imports ----


def test_dtensor_shards_every_other_dim():
    """Two gloo processes; the operator runs on local shards and the window dim is gathered where it is sharded."""
    script = """
        import torch, torch.distributed as dist, pyperf_dl
        from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh
        dist.init_process_group("gloo")
        mesh = init_device_mesh("cpu", (2,))
        torch.manual_seed(0)
        x, g = torch.randn(6, 4, 50), torch.randn(6, 4, 50)
        for placement in (Shard(0), Shard(1), Shard(2), Replicate()):
            leaf = distribute_tensor(x, mesh, [placement]).requires_grad_()
            y, index = pyperf_dl.sliding_window_max(leaf, 5, padding="same", return_indices=True)
            if placement.is_shard() and placement.dim != 2:
                assert y.placements == (placement,), (placement, y.placements)
            y.backward(distribute_tensor(g, mesh, [placement]))
            local = x.clone().requires_grad_()
            want, where = pyperf_dl.sliding_window_max(local, 5, padding="same", return_indices=True)
            want.backward(g)
            assert torch.equal(y.full_tensor(), want) and torch.equal(index.full_tensor(), where)
            assert torch.equal(leaf.grad.full_tensor(), local.grad)
        dist.destroy_process_group()
        print("sharded")
    """
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "--standalone",
        "--no-python",
        sys.executable,
    ]
    done = subprocess.run(
        [*command, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.stdout.count("sharded") == 2, done.stdout + done.stderr


def test_flop_formula_counts_comparisons():
    from torch.utils.flop_counter import FlopCounterMode

    x = torch.randn(3, 100)
    with FlopCounterMode(display=False) as counter:
        sliding_window_max(x, 9)
        sliding_window_minmax(x, 9)
    assert counter.get_total_flops() == 3 * 3 * 92 + 2 * 3 * 3 * 92


def test_fake_tensors_keep_layouts():
    from torch._subclasses.fake_tensor import FakeTensorMode

    real = [
        torch.randn(2, 8, 6, 5),
        torch.randn(2, 8, 6, 5).to(memory_format=torch.channels_last),
        torch.randn(8, 2).t(),
    ]
    for x in real:
        for dim in range(x.dim()):
            y, offsets = sliding_window_max(x, 2, dim, return_indices=True, index="offset")
            with FakeTensorMode() as mode:
                fy, fo = sliding_window_max(mode.from_tensor(x), 2, dim, return_indices=True, index="offset")
            assert (fy.shape, fy.stride(), fy.dtype) == (y.shape, y.stride(), y.dtype)
            assert (fo.shape, fo.stride(), fo.dtype) == (offsets.shape, offsets.stride(), offsets.dtype)
    meta = sliding_window_max(torch.empty(3, 10, device="meta"), 4)
    assert meta.shape == (3, 7)


@pytest.mark.parametrize("grad", [False, True])
def test_results_may_be_changed_in_place(grad):
    x, shift = torch.rand(2, 3, 8, requires_grad=grad), torch.rand(2)
    for call in (
        lambda: (pyperf_dl.sliding_window_max(x, 3),),
        lambda: pyperf_dl.affine_coupling(x, x, x),
        lambda: pyperf_dl.additive_coupling(x, x),
        lambda: pyperf_dl.rational_quadratic_spline(x, *(torch.rand(2, 3, 8, k) for k in (4, 4, 3)), logdet="sum"),
    ):
        with torch.no_grad():
            outside = call()
        for t in (*call(), *outside):
            t += shift.view(-1, *[1] * (t.dim() - 1))
