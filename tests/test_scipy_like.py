"""pyperf_dl.integrations.scipy_like beside scipy.ndimage itself."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from pyperf_dl.integrations import scipy_like

MODES = ["reflect", "grid-mirror", "constant", "grid-constant", "nearest", "mirror", "wrap", "grid-wrap"]
NUMPY_DTYPES = [np.float64, np.float32, np.uint8, np.int8, np.int16, np.int32, np.int64, np.bool_]


def values(shape, dtype, seed=0):
    rng = np.random.default_rng(seed)
    if dtype == np.bool_:
        return rng.random(shape) < 0.5
    if np.issubdtype(dtype, np.integer):
        limits = np.iinfo(dtype)
        return rng.integers(max(limits.min, -1000), min(limits.max, 1000), shape).astype(dtype)
    return (rng.standard_normal(shape) * 8).round(1).astype(dtype) + dtype(0)  # ties, no -0


def assert_same(ours, theirs):
    assert ours.numpy().dtype == theirs.dtype
    assert ours.shape == theirs.shape
    assert ours.numpy().tobytes() == np.ascontiguousarray(theirs).tobytes()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["maximum_filter1d", "minimum_filter1d"])
def test_every_size_and_origin(name, mode):
    for length in (1, 2, 5, 8):
        x = values((3, length), np.float64, length)
        for size in (*range(1, 8), 13, 20):
            for origin in range(-(size // 2), (size - 1) // 2 + 1):
                how = {"mode": mode, "cval": 1.5, "origin": origin}
                assert_same(
                    getattr(scipy_like, name)(torch.from_numpy(x), size, **how), getattr(ndimage, name)(x, size, **how)
                )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", NUMPY_DTYPES)
def test_dtypes(dtype, mode):
    x = values((4, 5, 6), dtype)
    cvals = (0.0, 1.0) if dtype == np.bool_ else (0.0, 3.7) if dtype == np.uint8 else (0.0, 3.7, -3.7)
    for name in ("maximum_filter1d", "minimum_filter1d"):
        for axis in (0, 1, -1):
            for cval in cvals:
                how = {"axis": axis, "mode": mode, "cval": cval}
                assert_same(
                    getattr(scipy_like, name)(torch.from_numpy(x), 4, **how), getattr(ndimage, name)(x, 4, **how)
                )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
def test_half_precision_is_the_rounded_result(dtype, mode):
    x = torch.from_numpy(values((3, 9), np.float32)).to(dtype)
    ours = scipy_like.maximum_filter1d(x, 4, mode=mode, cval=0.3, origin=1)
    theirs = ndimage.maximum_filter1d(x.float().numpy(), 4, mode=mode, cval=0.3, origin=1)
    assert torch.equal(ours, torch.from_numpy(theirs).to(dtype))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.data())
def test_boxes(data):
    shape = data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=3), label="shape")
    axes = data.draw(st.none() | st.permutations(range(len(shape))).map(tuple), label="axes")
    if axes is not None:
        axes = axes[: data.draw(st.integers(1, len(shape)), label="count")]
    count = len(shape) if axes is None else len(axes)
    each = lambda strategy: data.draw(strategy | st.lists(strategy, min_size=count, max_size=count))  # noqa: E731
    size = each(st.integers(1, 9))
    mode = each(st.sampled_from(MODES))
    sizes = size if isinstance(size, list) else [size] * count
    origin = [data.draw(st.integers(-(n // 2), (n - 1) // 2), label="origin") for n in sizes]
    dtype = data.draw(st.sampled_from([np.float64, np.float32, np.int16, np.uint8]), label="dtype")
    cval = data.draw(st.sampled_from([0.0, 2.5, 200.0]), label="cval")
    x = values(shape, dtype, data.draw(st.integers(0, 99), label="seed"))
    how = {"mode": mode, "cval": cval, "origin": origin, "axes": axes}
    for name in ("maximum_filter", "minimum_filter"):
        ours = getattr(scipy_like, name)(torch.from_numpy(x), size, **how)
        assert_same(ours, getattr(ndimage, name)(x, size, **how))


def test_arguments_come_in_the_order_of_scipy():
    x = values((5, 6), np.float64)
    t = torch.from_numpy(x)
    assert_same(
        scipy_like.maximum_filter1d(t, 4, 0, None, "constant", 2.0, 1),
        ndimage.maximum_filter1d(x, 4, 0, None, "constant", 2.0, 1),
    )
    assert_same(
        scipy_like.minimum_filter(t, 4, None, None, "constant", -2.0, 1),
        ndimage.minimum_filter(x, 4, None, None, "constant", -2.0, 1),
    )


@pytest.mark.parametrize("name", ["maximum_filter1d", "maximum_filter"])
def test_output(name):
    x = values((5, 6), np.float64)
    ours, theirs = getattr(scipy_like, name), getattr(ndimage, name)
    t = torch.from_numpy(x.copy())
    assert_same(ours(t, 3, output=torch.float32), theirs(x, 3, output=np.float32))
    assert_same(ours(t, 3, output=torch.int32), theirs(x, 3, output=np.int32))

    out = torch.empty(6, 5, dtype=torch.float64).T
    assert ours(t, 3, output=out) is out
    assert_same(out.contiguous(), theirs(x, 3))
    assert ours(t, 3, output=t) is t  # the input itself
    assert_same(t, theirs(x, 3))


def test_layouts_and_empty_inputs():
    x = values((4, 5, 6), np.float32)
    t = torch.from_numpy(x).permute(2, 0, 1)
    assert_same(
        scipy_like.maximum_filter(t, (1, 3, 2)).contiguous(), ndimage.maximum_filter(x.transpose(2, 0, 1), (1, 3, 2))
    )
    for shape in ((0,), (3, 0), (0, 3)):
        for mode in MODES:
            assert scipy_like.maximum_filter(torch.empty(shape), 3, mode=mode).shape == shape


def test_a_new_tensor_comes_back():
    x = torch.rand(4)
    for y in (
        scipy_like.maximum_filter1d(x, 1),
        scipy_like.maximum_filter(x, 1),
        scipy_like.maximum_filter(x, 3, axes=()),
    ):
        assert torch.equal(x, y)
        assert y.data_ptr() != x.data_ptr()


def test_what_differs_from_scipy():
    x = torch.tensor([1.0, torch.nan, 2.0, 0.0, 0.0])
    assert scipy_like.maximum_filter1d(x, 3).isnan().tolist() == [True, True, True, False, False]
    big = torch.tensor([2**60, 2**60 + 1])
    assert scipy_like.maximum_filter1d(big, 2, mode="nearest").tolist() == [2**60, 2**60 + 1]
    assert scipy_like.minimum_filter1d(big, 2, mode="constant", cval=2**60 + 1, origin=-1).tolist() == [
        2**60,
        2**60 + 1,
    ]


@pytest.mark.parametrize("mode", ["reflect", "constant", "wrap"])
def test_gradient(mode):
    x = torch.randperm(12, dtype=torch.float64).reshape(3, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: scipy_like.maximum_filter(x, (2, 3), mode=mode, cval=5.5), x)
    assert torch.autograd.gradcheck(lambda x: scipy_like.minimum_filter1d(x, 3, 0, mode=mode, cval=5.5), x)


def test_the_first_of_equal_elements_in_raster_order_gets_the_gradient():
    x = torch.ones(3, 3, requires_grad=True)
    scipy_like.maximum_filter(x, 3)[1, 1].backward()
    assert x.grad.tolist() == [[1, 0, 0], [0, 0, 0], [0, 0, 0]]


def test_under_compile_and_vmap():
    x = torch.randn(3, 8)
    for mode in ("reflect", "constant"):
        call = lambda x, mode=mode: scipy_like.maximum_filter1d(x, 4, mode=mode, cval=0.5)  # noqa: E731
        want = call(x)
        assert torch.equal(torch.compile(call, fullgraph=True, backend="aot_eager")(x), want)
        assert torch.equal(torch.func.vmap(call)(x), want)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda f: f.maximum_filter1d(np.zeros(4), 3), TypeError, "input must be a torch.Tensor"),
        (lambda f: f.maximum_filter1d(torch.zeros(4, dtype=torch.complex64), 3), TypeError, "complex64"),
        (lambda f: f.maximum_filter1d(torch.zeros(4).to_sparse(), 3), TypeError, "dense"),
        (lambda f: f.maximum_filter1d(torch.zeros(()), 3), ValueError, "at least one dimension"),
        (lambda f: f.maximum_filter1d(torch.zeros(4), 0), ValueError, "size must be >= 1, got 0"),
        (lambda f: f.maximum_filter1d(torch.zeros(4), 2.5), TypeError, "size must be an int"),
        (lambda f: f.maximum_filter1d(torch.zeros(4), 3, axis=1), ValueError, "axis must be in"),
        (lambda f: f.maximum_filter1d(torch.zeros(4), 3, mode="symmetric"), ValueError, "mode must be one of"),
        (lambda f: f.maximum_filter1d(torch.zeros(4), 4, origin=2), ValueError, r"origin must be in \[-2, 1\]"),
        (lambda f: f.maximum_filter1d(torch.zeros(4), 4, origin=-3), ValueError, r"origin must be in \[-2, 1\]"),
        (lambda f: f.maximum_filter1d(torch.zeros(4), 3, output="float32"), TypeError, "output must be"),
        (lambda f: f.maximum_filter1d(torch.zeros(4), 3, output=torch.complex64), TypeError, "output must be"),
        (lambda f: f.maximum_filter1d(torch.zeros(4), 3, output=torch.zeros(5)), ValueError, "shape and device"),
        (
            lambda f: f.maximum_filter1d(torch.zeros(4), 3, mode="constant", cval="1"),
            TypeError,
            "cval must be a number",
        ),
        (lambda f: f.minimum_filter1d(torch.zeros(4).byte(), 3, mode="constant", cval=-1), ValueError, r"\[0, 255\]"),
        (lambda f: f.minimum_filter1d(torch.zeros(4).int(), 3, mode="constant", cval=np.nan), ValueError, "finite"),
        (lambda f: f.maximum_filter(torch.zeros(4, 4)), ValueError, "size must be"),
        (lambda f: f.maximum_filter(torch.zeros(4, 4), (3, 3, 3)), ValueError, "one entry for each of the 2 axes"),
        (lambda f: f.maximum_filter(torch.zeros(4, 4), 3, axes=(0, -2)), ValueError, "each axis once"),
        (lambda f: f.maximum_filter(torch.zeros(4, 4), footprint=np.ones((2, 2))), ValueError, "footprint"),
    ],
)
def test_bad_arguments(call, error, says):
    with pytest.raises(error, match=says) as caught:
        call(scipy_like)
    assert "_filter" in str(caught.value)


def test_output_is_untouched_after_an_error():
    out = torch.full((4,), 7.0)
    with pytest.raises(ValueError, match="origin"):
        scipy_like.maximum_filter1d(torch.zeros(4), 3, output=out, origin=9)
    assert out.tolist() == [7.0] * 4
