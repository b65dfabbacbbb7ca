"""pyperf_dl.integrations.torch_pooling beside torch's own max_pool1d."""

import copy
import io
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import pyperf_dl
from pyperf_dl.integrations import torch_pooling

TORCHS = {
    "torch.max_pool1d": torch.max_pool1d,
    "torch.max_pool1d_with_indices": torch.max_pool1d_with_indices,
    "F.max_pool1d": F.max_pool1d,
    "F.max_pool1d_with_indices": F.max_pool1d_with_indices,
}
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def current():
    return {
        "torch.max_pool1d": torch.max_pool1d,
        "torch.max_pool1d_with_indices": torch.max_pool1d_with_indices,
        "F.max_pool1d": F.max_pool1d,
        "F.max_pool1d_with_indices": F.max_pool1d_with_indices,
    }


@pytest.fixture(autouse=True)
def _as_it_was():
    torch_pooling.disable()
    torch_pooling.report(reset=True)
    yield
    torch_pooling.disable()
    assert current() == TORCHS


def with_ties(shape, dtype=torch.float32, seed=0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return ((x * 4).round() / 2 + 0.0).to(dtype)  # + 0: no -0


def assert_taken(taken, **fell_back):
    got = torch_pooling.report(reset=True)
    assert got.taken == taken
    assert sum(got.fell_back.values()) == sum(fell_back.values())
    return got.fell_back


# ---- results ----


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    window=st.integers(1, 12),
    padding=st.integers(0, 6),
    dilation=st.integers(1, 4),
    length=st.integers(1, 40),
    rows=st.sampled_from([(1,), (3,), (2, 3), (1, 1), (0, 2)]),
    ceil_mode=st.booleans(),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 99),
)
def test_equal_to_torch(window, padding, dilation, length, rows, ceil_mode, dtype, seed):
    x = with_ties((*rows, length), dtype, seed)
    if seed % 5 == 0:
        x = x.masked_fill(x > 1, -torch.inf)
    args = (window, 1, padding, dilation)

    def outcome(pool):
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        try:
            y, (z, at) = pool(a, *args, ceil_mode=ceil_mode), pool(b, *args, ceil_mode=ceil_mode, return_indices=True)
        except RuntimeError as error:
            return str(error)
        weights = torch.arange(y.numel()).reshape(y.shape) % 7  # sums are exact in every dtype
        (y * weights).sum().backward()
        (z * weights).sum().backward()
        return y, z, at, a.grad, b.grad

    theirs = outcome(F.max_pool1d)
    with torch_pooling.enable(min_window=1):
        ours = outcome(F.max_pool1d)
    if isinstance(theirs, str):
        assert ours == theirs
        return
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(2, 3, 50), (3, 50)])
@pytest.mark.parametrize("arguments", [{}, {"padding": 4}, {"padding": 2, "dilation": 3}, {"padding": (4,)}])
def test_every_way_to_call(shape, arguments):
    x = with_ties(shape)
    want, at = F.max_pool1d(x, 9, 1, **arguments, return_indices=True)
    with torch_pooling.enable():
        for step in (1, (1,), [1]):
            assert torch.equal(F.max_pool1d(x, 9, step, **arguments), want)
            assert torch.equal(F.max_pool1d(x, (9,), stride=step, **arguments), want)
            assert torch.equal(torch.max_pool1d(x, [9], step, **arguments), want)
            assert torch.equal(nn.MaxPool1d(9, step, **arguments)(x), want)
            for pool in (
                F.max_pool1d_with_indices,
                torch.max_pool1d_with_indices,
                lambda *a, **k: F.max_pool1d(*a, **k, return_indices=True),
                lambda x, *a, **k: nn.MaxPool1d(*a, **k, return_indices=True)(x),
            ):
                y, index = pool(x, 9, step, **arguments)
                assert torch.equal(y, want)
                assert torch.equal(index, at)
                assert index.dtype == torch.int64
        assert_taken(3 * 8)


def test_special_values():
    inf, nan = torch.inf, torch.nan
    x = torch.tensor([[-inf, -inf, -inf, 1.0, nan, 2.0, nan, inf, -0.0, 0.0, -0.0]])
    with torch_pooling.enable(min_window=2):
        y, at = torch.max_pool1d_with_indices(x, 3, 1)
    want, index = torch.max_pool1d_with_indices(x, 3, 1)
    torch.testing.assert_close(y, want, rtol=0, atol=0, equal_nan=True)
    # Documented: of NaNs torch takes the last, of zeros with both signs the first.
    assert (at - index).tolist() == [[0, 0, 0, 0, -2, 0, 0, 0, 1]]


def test_indices_lead_to_the_values():
    x = with_ties((2, 3, 30))
    with torch_pooling.enable():
        y, at = F.max_pool1d(x, 9, 1, 4, return_indices=True)
    assert_taken(1)
    assert torch.equal(x.gather(-1, at), y)


def test_gradcheck():
    x = torch.randperm(40, dtype=torch.float64).reshape(2, 20).requires_grad_()
    with torch_pooling.enable():
        assert torch.autograd.gradcheck(lambda x: F.max_pool1d(x, 9, 1, 4), x)
        assert torch.autograd.gradgradcheck(lambda x: F.max_pool1d(x, 9, 1, 4), x)


def test_function_transforms():
    x = with_ties((4, 3, 30))
    pool = lambda x: F.max_pool1d(x, 9, 1, 4)  # noqa: E731
    loss = lambda x: (pool(x) ** 2).sum()  # noqa: E731
    want = torch.func.vmap(pool)(x), torch.func.vmap(torch.func.grad(loss))(x)
    with torch_pooling.enable():
        assert torch.equal(torch.func.vmap(pool)(x), want[0])
        assert torch.equal(torch.func.vmap(torch.func.grad(loss))(x), want[1])
        assert_taken(2)


# ---- what goes to torch ----


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (lambda: F.max_pool1d(torch.zeros(2, 30), 9), "stride is not 1"),
        (lambda: F.max_pool1d(torch.zeros(2, 30), 9, 2), "stride is not 1"),
        (lambda: F.max_pool1d(torch.zeros(2, 30), 7, 1), "window below min_window"),
        (lambda: F.max_pool1d(torch.zeros(2, 30).long(), 9, 1, return_indices=True), "dtype"),
        (lambda: F.max_pool1d(torch.zeros(2, 30).long(), 9, 1), "dtype"),
        (lambda: F.max_pool1d(torch.zeros(30), 9, 1), "shape"),
        (lambda: F.max_pool1d(torch.zeros(2, 2, 2, 30), 9, 1), "shape"),
        (lambda: F.max_pool1d(torch.zeros(2, 0), 9, 1, 4), "shape"),
        (lambda: F.max_pool1d(torch.zeros(2, 30), 9, 1, 5), "arguments"),
        (lambda: F.max_pool1d(torch.zeros(2, 30), 9, 1, -1), "arguments"),
        (lambda: F.max_pool1d(torch.zeros(2, 30), 9, 1, 4, 0), "arguments"),
        (lambda: F.max_pool1d(torch.zeros(2, 8), 9, 1), "arguments"),
        (lambda: F.max_pool1d(torch.zeros(2, 30), (9, 9), 1), "arguments"),
        (lambda: F.max_pool1d(torch.zeros(2, 30), 9.5, 1), "arguments"),
        (lambda: torch.max_pool1d(torch.zeros(2, 30).to_sparse(), 9, 1), "layout"),
        (lambda: torch.max_pool1d(torch.zeros(2, 30, device="meta"), 9, 1), None),
    ],
)
def test_falls_back(call, why):
    def outcome():
        try:
            return call()
        except Exception as error:
            return type(error), str(error)

    want = outcome()
    with torch_pooling.enable():
        got = outcome()
    if isinstance(want, tuple) and isinstance(want[0], type):
        assert got == want
    else:
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert torch_pooling.report() == ((1, {}) if why is None else (0, {why: 1}))


def test_a_window_that_sees_only_padding_is_left_to_torch():
    x = torch.ones(1, 1)
    want = F.max_pool1d(x, 2, 1, 1, 2)
    with torch_pooling.enable(min_window=1):
        assert torch.equal(F.max_pool1d(x, 2, 1, 1, 2), want)
    assert torch_pooling.report() == (0, {"dilation above the length": 1})


def test_indices_can_be_left_to_torch():
    x = with_ties((3, 30))
    with torch_pooling.enable(indices=False):
        F.max_pool1d(x, 9, 1)
        F.max_pool1d(x, 9, 1, return_indices=True)
    assert torch_pooling.report() == (1, {"return_indices": 1})


def test_devices_without_kernels(monkeypatch):
    monkeypatch.setattr(torch_pooling, "_with_kernels", {"cpu": False})
    x = with_ties((3, 30))
    with torch_pooling.enable():
        F.max_pool1d(x, 9, 1)
        with pyperf_dl.backend("reference"):  # asked for
            F.max_pool1d(x, 9, 1)
    assert torch_pooling.report() == (1, {"no kernels for the device": 1})


def test_subclasses_and_modes_see_torchs_own_function():
    class Logged(torch.Tensor):
        seen = ()

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            cls.seen += (function.__name__,)
            return super().__torch_function__(function, types, args, kwargs or {})

    x = with_ties((3, 30))
    want = F.max_pool1d(x, 9, 1)
    with torch_pooling.enable():
        assert torch.equal(torch.max_pool1d(x.as_subclass(Logged), 9, 1).as_subclass(torch.Tensor), want)
        assert "max_pool1d" in Logged.seen
        assert set(torch_pooling.report(reset=True).fell_back) == {"not a plain tensor"}
        with torch.device("cpu"):  # a function mode
            assert torch.equal(F.max_pool1d(x, 9, 1), want)
            assert torch.equal(torch.max_pool1d(x, 9, 1), want)
        assert_taken(2)
        graph = torch.fx.symbolic_trace(lambda x: F.max_pool1d(x, 9, 1))
        assert torch.equal(graph(x), want)
    assert torch.equal(graph(x), want)


def test_parameters_are_taken():
    p = nn.Parameter(with_ties((3, 30)))
    with torch_pooling.enable():
        F.max_pool1d(p, 9, 1).sum().backward()
    assert_taken(1)
    assert p.grad.sum() == 3 * 22


# ---- beginning and end ----


def test_torch_is_as_before():
    torch_pooling.enable()
    assert all(now is not before for now, before in zip(current().values(), TORCHS.values(), strict=True))
    torch_pooling.enable(20)
    torch_pooling.disable()
    assert current() == TORCHS
    torch_pooling.disable()
    with pytest.raises(KeyError), torch_pooling.enable():
        raise KeyError
    assert current() == TORCHS


def test_nested_blocks():
    x = with_ties((3, 30))
    with torch_pooling.enable(min_window=8):
        with torch_pooling.enable(min_window=20):
            F.max_pool1d(x, 9, 1)
            assert assert_taken(0, other=1) == {"window below min_window": 1}
        F.max_pool1d(x, 9, 1)
        assert_taken(1)
    F.max_pool1d(x, 9, 1)
    assert_taken(0)


def test_a_block_can_be_entered_again():
    block = torch_pooling.enable()
    with block:
        assert torch.max_pool1d is not TORCHS["torch.max_pool1d"]
    assert current() == TORCHS
    with block:
        assert torch.max_pool1d is not TORCHS["torch.max_pool1d"]
    assert current() == TORCHS


def test_blocks_may_end_in_any_order():
    first, second = torch_pooling.enable(8), torch_pooling.enable(20)
    x = with_ties((3, 30))
    first.__exit__(None, None, None)
    F.max_pool1d(x, 9, 1)
    assert assert_taken(0, other=1) == {"window below min_window": 1}
    second.__exit__(None, None, None)
    assert current() == TORCHS


def test_threads():
    x = with_ties((3, 60))
    want = {n: F.max_pool1d(x, n, 1) for n in (9, 20)}
    wrong = []

    def work(n):
        for _ in range(100):
            with torch_pooling.enable(n):
                if not torch.equal(F.max_pool1d(x, n, 1), want[n]):
                    wrong.append(n)

    threads = [threading.Thread(target=work, args=(n,)) for n in (9, 20, 9, 20)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong
    assert current() == TORCHS
    got = torch_pooling.report()
    assert got.taken + sum(got.fell_back.values()) == 400


def test_functions_of_others_stay():
    x = with_ties((3, 30))
    torch_pooling.enable()
    ours = torch.max_pool1d
    try:
        torch.max_pool1d = lambda *args, **kwargs: ours(*args, **kwargs) + 1
        theirs = torch.max_pool1d
        torch_pooling.disable()
        assert torch.max_pool1d is theirs
        assert torch.equal(F.max_pool1d(x, 9, 1), TORCHS["torch.max_pool1d"](x, 9, 1) + 1)
        torch_pooling.enable()
        assert torch.equal(F.max_pool1d(x, 9, 1), TORCHS["torch.max_pool1d"](x, 9, 1) + 1)
        assert_taken(1)
    finally:
        torch.max_pool1d = ours


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: torch_pooling.enable(0), ValueError, "enable: min_window must be >= 1, got 0"),
        (lambda: torch_pooling.enable(2.5), TypeError, "enable: min_window must be an int, got 2.5"),
        (lambda: torch_pooling.enable(8, indices=1), TypeError, "enable: indices must be a bool"),
        (lambda: torch_pooling.swap(nn.Identity(), -1), ValueError, "swap: min_window must be >= 1"),
        (lambda: torch_pooling.swap(nn.Identity(), indices="yes"), TypeError, "swap: indices must be a bool"),
        (lambda: torch_pooling.swap(torch.zeros(3)), TypeError, "module must be a torch.nn.Module, got Tensor"),
        (lambda: torch_pooling.restore([nn.Identity()]), TypeError, "module must be a torch.nn.Module, got list"),
    ],
)
def test_bad_arguments(call, error, says):
    with pytest.raises(error, match=says):
        call()
    assert current() == TORCHS


# ---- layers ----


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(2, 4, 3)
        self.taken = nn.MaxPool1d(9, 1, 4)
        self.block = nn.Sequential(nn.MaxPool1d((11,), (1,), dilation=2), nn.MaxPool1d(2), nn.MaxPool1d(3, 1))
        self.again = self.taken

    def forward(self, x):
        return self.again(self.block(self.taken(self.conv(x))))


def test_swap_and_restore():
    model = Model()
    x = torch.randn(2, 2, 80)
    want, state = model(x), model.state_dict()
    calls = []
    model.taken.register_forward_hook(lambda *_: calls.append(1))
    layers = dict(model.named_modules())

    assert torch_pooling.swap(model) == ["taken", "block.0"]
    assert torch_pooling.swap(model) == []
    assert dict(model.named_modules()) == layers
    assert model.state_dict().keys() == state.keys()
    assert "SlidingMaxPool1d(kernel_size=9, stride=1, padding=4" in repr(model)
    assert torch.equal(model(x), want)
    assert len(calls) == 2
    assert_taken(3)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(Model()))):
        torch_pooling.swap(other)
        other.load_state_dict(state)
        assert torch.equal(other(x), want)
    assert_taken(6)

    assert torch_pooling.restore(model) == ["taken", "block.0"]
    assert torch_pooling.restore(model) == []
    assert all(type(m) is not torch_pooling.SlidingMaxPool1d for m in model.modules())
    assert torch.equal(model(x), want)
    assert_taken(0)


def test_swap_chooses():
    assert torch_pooling.swap(nn.MaxPool1d(9, 1)) == [""]
    assert torch_pooling.swap(nn.MaxPool1d(9, 1), 10) == []
    assert torch_pooling.swap(nn.MaxPool1d(9)) == []
    assert torch_pooling.swap(nn.MaxPool1d(9, 1, 5)) == []
    assert torch_pooling.swap(nn.MaxPool1d(9, 1, return_indices=True), indices=False) == []
    assert torch_pooling.swap(type("Own", (nn.MaxPool1d,), {})(9, 1)) == []
    assert torch_pooling.swap(nn.MaxPool2d(9, 1)) == []


def test_a_swapped_layer_is_an_nn_layer():
    layer = nn.MaxPool1d(9, 1, 4, return_indices=True)
    x = with_ties((2, 3, 30))
    want, at = layer(x)
    torch_pooling.swap(layer)
    assert isinstance(layer, nn.MaxPool1d)
    for saved in (pickle.loads(pickle.dumps(layer)), copy.copy(layer)):
        y, index = saved(x)
        assert torch.equal(y, want)
        assert torch.equal(index, at)
    assert_taken(2)
    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    assert torch.equal(torch.load(stream, weights_only=False)(x)[0], want)


def test_a_swapped_layer_falls_back_and_counts_once():
    layer = nn.MaxPool1d(9, 1, 4)
    torch_pooling.swap(layer)
    with pytest.raises(RuntimeError, match="Expected 2D or 3D"), torch_pooling.enable():
        layer(torch.zeros(30))
    assert torch_pooling.report() == (0, {"shape": 1})


# ---- compilers ----


def graph_of(function, x, **how):
    """Names of the operators that torch.compile finds, with every graph and no break."""
    torch._dynamo.reset()
    graphs = []

    def backend(module, inputs):
        graphs.append([str(n.target) for n in module.graph.nodes if n.op == "call_function"])
        return module

    y = torch.compile(function, fullgraph=True, backend=backend, **how)(x)
    assert len(graphs) == 1
    return y, " ".join(graphs[0])


def test_under_compile():
    x = with_ties((2, 3, 30))
    pooled, indexed = nn.MaxPool1d(9, 1, 4), nn.MaxPool1d(9, 1, 4, return_indices=True)
    calls = [
        lambda x: F.max_pool1d(x, 9, 1, 4),
        lambda x: torch.max_pool1d(x, 9, 1, 4),
        lambda x: pooled(x),
        lambda x: F.max_pool1d(x, 9, 1, 4, return_indices=True)[1],
        lambda x: F.max_pool1d_with_indices(x, 9, 1, 4)[1],
        lambda x: torch.max_pool1d_with_indices(x, 9, 1, 4)[1],
        lambda x: indexed(x)[1],
    ]
    want = [call(x) for call in calls]
    early, early_functional = TORCHS["torch.max_pool1d"], TORCHS["F.max_pool1d"]
    with torch_pooling.enable():
        for call, y in zip(calls, want, strict=True):
            got, graph = graph_of(call, x)
            assert "pyperf_dl.sliding_window" in graph
            assert torch.equal(got, y)
        for call in (
            lambda x: early(x, 9, 1, 4),
            lambda x: early_functional(x, 9, 1, 4),
            lambda x: F.max_pool1d(x, 3, 1),
        ):
            got, graph = graph_of(call, x)
            assert "pyperf_dl" not in graph
            assert torch.equal(got, call(x))
    for call, y in zip(calls, want, strict=True):
        got, graph = graph_of(call, x)
        assert "pyperf_dl" not in graph
        assert torch.equal(got, y)
    torch_pooling.swap(pooled)
    assert "pyperf_dl.sliding_window" in graph_of(calls[2], x)[1]


def test_compiled_code_follows_the_takeover():
    x = with_ties((2, 3, 30))
    torch._dynamo.reset()
    graphs = []

    def backend(module, inputs):
        graphs.append(any("pyperf_dl" in str(n.target) for n in module.graph.nodes))
        return module

    call = torch.compile(lambda x: F.max_pool1d(x, 9, 1, 4), backend=backend)
    want = call(x)
    with torch_pooling.enable():
        assert torch.equal(call(x), want)
    assert torch.equal(call(x), want)
    with torch_pooling.enable():
        assert torch.equal(call(x), want)
    assert graphs == [False, True]


def test_dynamic_shapes_and_backward_under_compile():
    torch._dynamo.reset()
    with torch_pooling.enable():
        call = torch.compile(lambda x: F.max_pool1d(x, 9, 1, 4), fullgraph=True, dynamic=True, backend="aot_eager")
        for n in (30, 41, 57):
            a, b = (with_ties((2, n)).requires_grad_() for _ in range(2))
            y = call(a)
            y.sum().backward()
            want = TORCHS["F.max_pool1d"](b, 9, 1, 4)
            want.sum().backward()
            assert torch.equal(y, want)
            assert torch.equal(a.grad, b.grad)


def test_the_compilers_cache_keeps_the_two_apart():
    """Inductor caches on disk what a function compiled to, so that ours must not look like torch's."""
    x = with_ties((2, 3))
    ours = []
    with torch._inductor.utils.fresh_inductor_cache():
        for takeover in (False, True, False):
            torch._dynamo.reset()
            if takeover:
                torch_pooling.enable(min_window=2)
            call = torch.compile(lambda x: F.max_pool1d(x, 2, 1) * 2, fullgraph=True)
            want = call(x)
            with torch.profiler.profile() as profile:
                assert torch.equal(call(x), want)
            ours.append(any("pyperf_dl::" in event.key for event in profile.key_averages()))
            torch_pooling.disable()
    assert ours == [False, True, False]


def test_export():
    x = with_ties((2, 3, 30))
    layer = nn.MaxPool1d(9, 1, 4)
    torch_pooling.swap(layer)
    for strict in (False, True):
        program = torch.export.export(layer, (x,), strict=strict)
        assert "pyperf_dl.sliding_window" in str(program.graph)
        assert torch.equal(program.module()(x), TORCHS["F.max_pool1d"](x, 9, 1, 4))
        with torch_pooling.enable():
            assert "pyperf_dl.sliding_window" in str(
                torch.export.export(nn.MaxPool1d(9, 1, 4), (x,), strict=strict).graph
            )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_script_and_trace_keep_torchs_operator():
    x = with_ties((2, 3, 30))
    with torch_pooling.enable():
        for indices in (False, True):
            layer = nn.MaxPool1d(9, 1, 4, return_indices=indices)
            scripted = torch.jit.script(layer)
            assert "aten::max_pool1d" in str(scripted.inlined_graph)
            traced = torch.jit.trace(layer, x)
            assert "aten::max_pool" in str(traced.inlined_graph)
            for form in (scripted, traced):
                torch.testing.assert_close(form(x), layer(x), rtol=0, atol=0)
