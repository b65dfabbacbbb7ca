"""Cases of the family `sliding_window`: windows, dtypes, indices, gradients, layouts, real and adversarial rows.

`pytest bench --benchmark-only` runs the quick ones; `python bench/run.py --family sliding_window` makes the report.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import harness
import pytest
import torch
import torch.nn.functional as F
from harness import Case, Peer, optional, pyperf_dl

FAMILY = "sliding_window"
MI = 1 << 20
WINDOWS = (3, 9, 33, 64, 129, 1025, 9000, 65_537, 1_000_000)
LOWEST = float("-inf")


def row_shape(device: str) -> tuple[int, int]:
    """Rows far out of cache: 4 Mi elements on a CPU, 64 Mi on a GPU."""
    return (16, 4 * MI) if device == "cuda" else (1, 4 * MI)


# ---- inputs ----


def random_values(shape: tuple[int, ...], dtype: torch.dtype) -> Callable[[torch.Generator], tuple[torch.Tensor]]:
    """Normal floats, or integers over the dtype's range (below 2**53, which peers that count in float64 need)."""

    def make(generator: torch.Generator) -> tuple[torch.Tensor]:
        how = {"generator": generator, "device": generator.device, "dtype": dtype}
        if dtype.is_floating_point:
            return (torch.randn(shape, **how),)
        limits = torch.iinfo(dtype)
        return (torch.randint(max(limits.min, -(2**53)), min(limits.max, 2**53), shape, **how),)

    return make


def with_gradient(make: Callable[[torch.Generator], tuple[torch.Tensor]]) -> Callable[[torch.Generator], Any]:
    """x that wants a gradient, and small integers as the gradient of y: their sums are exact in every order."""

    def both(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        (x,) = make(generator)
        how = {"generator": generator, "device": generator.device, "dtype": x.dtype}
        return x.requires_grad_(), torch.randint(-2, 3, x.shape, **how)

    return both


ROWS: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
    "ascending": lambda i, window: i,
    "descending": lambda i, window: -i,
    "constant": lambda i, window: torch.full_like(i, 7),
    "i ^ 1": lambda i, window: i ^ 1,
    "saw of the window": lambda i, window: i % window,
    "falling saw of the window": lambda i, window: -(i % window),
}


def shaped_rows(kind: str, window: int, shape: tuple[int, ...]) -> Callable[[torch.Generator], tuple[torch.Tensor]]:
    """Rows on which algorithms whose cost depends on the data are at their best or worst."""

    def make(generator: torch.Generator) -> tuple[torch.Tensor]:
        row = ROWS[kind](torch.arange(shape[-1], device=generator.device), window)
        return (row.to(torch.float32).expand(shape).contiguous(),)

    return make


@functools.cache
def real_series(name: str) -> torch.Tensor:
    """A series that statsmodels ships: weekly CO2 at Mauna Loa, yearly sunspots, monthly sea temperature (El Nino)."""
    data = getattr(optional("statsmodels.datasets"), name).load_pandas().data
    if "YEAR" in data:
        data = data.drop(columns="YEAR")  # the other column, or the twelve months, are the values
    return torch.tensor(data.dropna().to_numpy().reshape(-1), dtype=torch.float32)


def tiled_series(name: str, shape: tuple[int, ...]) -> Callable[[torch.Generator], tuple[torch.Tensor]]:
    """The series, repeated to the row's length."""

    def make(generator: torch.Generator) -> tuple[torch.Tensor]:
        series = real_series(name)
        row = series.repeat(-(-shape[-1] // len(series)))[: shape[-1]]
        return (row.to(generator.device).expand(shape).contiguous(),)

    return make


@functools.cache
def photographs() -> torch.Tensor:
    """scikit-learn's two sample images, [2, 3, 427, 640] uint8."""
    images = optional("sklearn.datasets").load_sample_images().images
    return torch.stack([torch.from_numpy(image.copy()).permute(2, 0, 1) for image in images]).contiguous()


def photograph_batch(images: int, dtype: torch.dtype) -> Callable[[torch.Generator], tuple[torch.Tensor]]:
    def make(generator: torch.Generator) -> tuple[torch.Tensor]:
        return (photographs().repeat(images // 2, 1, 1, 1).to(generator.device, dtype),)

    return make


# ---- checks against the reference ----


def margins(padding: str, window: int) -> tuple[int, int]:
    left = {"valid": 0, "same": (window - 1) // 2, "causal": window - 1}[padding]
    return left, 0 if padding == "valid" else window - 1 - left


def pieces(length: int, other: int, whole: bool) -> list[tuple[int, int]]:
    """Ranges of outputs to check: all, or the start, a middle and the end."""
    size = max(1, 64 * 1024 // max(1, other))
    if whole or length <= 3 * size:
        return [(0, length)]
    middle = length // 2 - size // 3
    return [(0, size), (middle, middle + size), (length - size, length)]


def some_rows(dim: int, whole: bool, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """All rows, or 256 of many."""
    n = tensors[0].shape[0]
    if whole or dim == 0 or n <= 256:
        return list(tensors)
    rows = torch.linspace(0, n - 1, 256, device=tensors[0].device).long()
    return [t.index_select(0, rows) for t in tensors]


def check_forward(
    function: Callable[..., Any], window: int, dim: int, padding: str, options: dict[str, Any]
) -> Callable[..., float]:
    """The same public function on the reference backend, piece by piece."""
    left, right = margins(padding, window)

    def error(inputs: Any, outputs: Any, whole: bool) -> float:
        x, *ours = some_rows(dim % inputs[0].dim(), whole, inputs[0], *harness.tensors(outputs))
        length = x.shape[dim]
        out = length + left + right - window + 1
        if any(t.shape[dim] != out for t in ours):
            return float("inf")
        worst = 0.0
        for a, b in pieces(out, x.numel() // length, whole):
            start, end = max(0, a - left), min(length, b - left + window - 1)
            around = (start - (a - left), b - left + window - 1 - end)
            with pyperf_dl.backend("reference"):
                part = x.narrow(dim, start, end - start)
                want = list(harness.tensors(function(part, window, dim, padding=around, **options)))
            if options.get("index") == "global":
                want[-1] += start
            worst = max(worst, harness.max_difference([t.narrow(dim, a, b - a) for t in ours], want))
        return worst

    return error


def check_gradient(window: int, padding: str) -> Callable[..., float]:
    """Forward, and the gradient of pieces of x: they depend on the outputs up to one window away."""
    left, right = margins(padding, window)
    forward = check_forward(pyperf_dl.sliding_window_max, window, -1, padding, {})

    def error(inputs: Any, outputs: Any, whole: bool) -> float:
        x, grad_y = (t.detach() for t in inputs)
        length = x.shape[-1]
        worst = forward((x,), outputs[0], whole)
        for a, b in pieces(length, x.numel() // length, whole):
            start, end = max(0, a - window), min(length, b + window)
            around = (left if start == 0 else 0, right if end == length else 0)
            part = x[..., start:end].clone().requires_grad_()
            with pyperf_dl.backend("reference"):
                y = pyperf_dl.sliding_window_max(part, window, padding=around)
            first = start and start + left
            (grad,) = torch.autograd.grad(y, part, grad_y[..., first : first + y.shape[-1]])
            worst = max(worst, harness.max_difference(outputs[1][..., a:b], grad[..., a - start : b - start]))
        return worst

    return error


def check_box(window: int) -> Callable[..., float]:
    def error(inputs: Any, outputs: Any, whole: bool) -> float:
        images = inputs[0].shape[0] if whole else 1
        with pyperf_dl.backend("reference"):
            want = pyperf_dl.sliding_window_max(inputs[0][:images], window, (-2, -1), padding="same")
        return harness.max_difference(outputs[:images], want)

    return error


# ---- peers: maximum along one dim ----


class Spec(NamedTuple):
    """What a peer must compute: windows along one dim of one tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: str
    window: int
    dim: int = -1
    padding: str = "same"
    full: bool = False
    indices: bool = False
    gradient: bool = False

    @property
    def margins(self) -> tuple[int, int]:
        return margins(self.padding, self.window)

    @property
    def rows(self) -> int:
        return torch.Size(self.shape).numel() // self.shape[self.dim]

    @property
    def last(self) -> bool:
        return self.dim in (-1, len(self.shape) - 1)

    @property
    def lowest(self) -> float | int:
        return LOWEST if self.dtype.is_floating_point else torch.iinfo(self.dtype).min

    @property
    def centred(self) -> bool:
        return self.padding == "same"

    @property
    def centred_shift(self) -> int:
        """pandas and polars put the centre of an even window one later than we do."""
        return int(self.centred and self.window % 2 == 0)

    @property
    def taps(self) -> int:
        """Elements that a peer looks at whose cost grows with the window."""
        return torch.Size(self.shape).numel() * self.window


def values_of(outputs: Any) -> torch.Tensor:
    return next(harness.tensors(outputs))


def as_tensor(values: Any, like: torch.Tensor) -> torch.Tensor:
    """A peer's answer in our shape and dtype."""
    if hasattr(values, "get"):  # CuPy
        values = torch.from_dlpack(values)
    elif not isinstance(values, torch.Tensor):
        values = torch.from_numpy(values if values.flags.writeable else values.copy())
    return values.to(like.device, like.dtype).reshape(like.shape)


def same_values(spec: Spec, shift: int = 0) -> Callable[[Any, Any, Any], bool]:
    """Equal where both see whole windows in the array; theirs may be `shift` later."""

    def agrees(inputs: Any, outputs: Any, theirs: Any) -> bool:
        ours = values_of(outputs)
        n = ours.shape[spec.dim] - shift
        theirs = as_tensor(theirs, ours)
        return torch.equal(ours.narrow(spec.dim, 0, n), theirs.narrow(spec.dim, shift, n))

    return agrees


def same_all(inputs: Any, outputs: Any, theirs: Any) -> bool:
    """Every tensor equal; ours may be fewer."""
    return harness.max_difference(outputs, list(harness.tensors(theirs))[: len(list(harness.tensors(outputs)))]) == 0


def _pool_work(spec: Spec) -> float:
    """Taps that max_pool1d may look at in one call, by what it does in about 0.3 s (quick) or 5 s."""
    if spec.device == "cuda":
        return 3e11
    work = 6e9 if spec.full else 4e8
    return work / 8 if spec.indices or spec.gradient else work


def _pool_shortened(spec: Spec) -> Peer:
    """On the first outputs only, and its time multiplied: its cost is proportional to outputs * window."""
    total = spec.rows * spec.shape[-1]
    n = max(256, int(_pool_work(spec)) // spec.window)
    n = min(n, spec.shape[-1] - spec.window + 1)
    left, _ = spec.margins
    call = functools.partial(_pool, spec, 0)

    def prepare(inputs: Any) -> Any:
        return [t.detach()[:1, : n + spec.window - 1].clone().requires_grad_(t.requires_grad) for t in inputs]

    def prepare_gradient(inputs: Any) -> Any:
        x, grad_y = prepare(inputs)
        return x, grad_y[:, :n]

    def agrees(inputs: Any, outputs: Any, theirs: Any) -> bool:
        return torch.equal(values_of(outputs)[:1, left : left + n].reshape(-1), values_of(theirs).reshape(-1))

    return Peer(call, prepare_gradient if spec.gradient else prepare, agrees, scale=total / n)


def _pool(spec: Spec, pad: int, inputs: Any) -> Any:
    x = inputs[0]
    y = F.max_pool1d(x, spec.window, 1, pad, return_indices=spec.indices)
    if spec.gradient:
        return y.detach(), *torch.autograd.grad(y, x, inputs[1])
    return y


def torch_pool(spec: Spec) -> Peer | None:
    """torch's max_pool1d. Windows that it cannot place (causal, even) are padded before, which is timed."""
    if not spec.dtype.is_floating_point:
        return None
    left, right = spec.margins
    if not spec.last:  # [N, C, L, inner] with a window of (w, 1): no transposition
        outer = torch.Size(spec.shape[: spec.dim % len(spec.shape)]).numel()
        view = (outer, 1, spec.shape[spec.dim], -1)
        kernel, pad = (spec.window, 1), (spec.window // 2, 0)
        return Peer(lambda x: F.max_pool2d(x, kernel, 1, pad), lambda inputs: inputs[0].view(view), same_values(spec))
    if spec.taps > _pool_work(spec):
        return _pool_shortened(spec)
    if left == right:
        return Peer(functools.partial(_pool, spec, left), agrees=same_all)

    def padded(inputs: Any) -> Any:
        return _pool(spec, 0, (F.pad(inputs[0], (left, right), value=LOWEST), *inputs[1:]))

    return None if spec.indices or spec.gradient else Peer(padded, agrees=same_all)


def torch_unfold(spec: Spec) -> Peer | None:
    """x.unfold().amax() over a padded copy: a view of window * n elements, reduced."""
    if not spec.dtype.is_floating_point or not spec.last or spec.window > 64 or spec.taps > 3e9:
        return None

    def call(inputs: Any) -> torch.Tensor:
        return F.pad(inputs[0], spec.margins, value=LOWEST).unfold(-1, spec.window, 1).amax(-1)

    return Peer(call, agrees=same_all)


def doubling(x: torch.Tensor, window: int, margins: tuple[int, int]) -> torch.Tensor:
    """Maxima of windows of 2, 4, 8 ... elements, then of two that overlap: the best that plain torch operators do."""
    x = F.pad(x, margins, value=LOWEST)
    span = 1
    while 2 * span <= window:
        x = torch.maximum(x[..., :-span], x[..., span:])
        span *= 2
    by = window - span
    return torch.maximum(x[..., :-by], x[..., by:]) if by else x


@functools.cache
def _compiled() -> Callable[..., torch.Tensor]:
    torch._dynamo.config.recompile_limit = 1000  # each window is a shape of its own
    return torch.compile(doubling, fullgraph=True, dynamic=False)


def torch_compiled(spec: Spec) -> Peer | None:
    if not spec.dtype.is_floating_point or not spec.last:
        return None
    return Peer(
        lambda inputs: _compiled()(inputs[0], spec.window, spec.margins),
        lambda inputs: [t.detach() for t in inputs],
        same_all,
        compiles=True,
    )


def _array(inputs: Any) -> Any:
    return inputs[0].detach().numpy()


def _scipy_origin(spec: Spec) -> int:
    """scipy's window starts at i - window // 2 - origin."""
    return spec.margins[0] - spec.window // 2


def scipy_filter(spec: Spec) -> Peer | None:
    """scipy.ndimage.maximum_filter1d into an array of its own that is there already."""
    ndimage = optional("scipy.ndimage")
    if ndimage is None or spec.device != "cpu" or spec.padding == "valid" or spec.dtype == torch.bfloat16:
        return None
    how = {"axis": spec.dim, "mode": "constant", "cval": spec.lowest, "origin": _scipy_origin(spec)}
    return Peer(
        lambda p: ndimage.maximum_filter1d(p[0], spec.window, output=p[1], **how),
        lambda inputs: (_array(inputs), _array(inputs).copy()),
        same_values(spec),
    )


def bottleneck_move(spec: Spec) -> Peer | None:
    """bottleneck.move_max: a deque; its windows end at i, so it is compared one shift away, its work is the same."""
    bottleneck = optional("bottleneck")
    if bottleneck is None or spec.device != "cpu" or spec.dtype not in (torch.float32, torch.float64):
        return None
    return Peer(
        lambda a: bottleneck.move_max(a, spec.window, min_count=1, axis=spec.dim),
        _array,
        same_values(spec, spec.margins[1]),
    )


def pandas_rolling(spec: Spec) -> Peer | None:
    """pandas' rolling max of a float64 Series (what it computes in whatever it gets)."""
    pandas = optional("pandas")
    if pandas is None or spec.device != "cpu" or spec.rows > 1 or spec.dtype not in (torch.float32, torch.float64):
        return None
    return Peer(
        lambda s: s.rolling(spec.window, min_periods=1, center=spec.centred).max(),
        lambda inputs: pandas.Series(_array(inputs).reshape(-1).astype("float64")),
        lambda i, ours, theirs: same_values(spec, spec.centred_shift)(i, ours, theirs.to_numpy()),
    )


def polars_rolling(spec: Spec) -> Peer | None:
    """polars' rolling_max, on one thread whatever its pool has."""
    polars = optional("polars")
    if polars is None or spec.device != "cpu" or spec.rows > 1:
        return None
    if spec.dtype not in (torch.float32, torch.float64, torch.int64):
        return None
    return Peer(
        lambda s: s.rolling_max(spec.window, min_samples=1, center=spec.centred),
        lambda inputs: polars.Series(_array(inputs).reshape(-1)),
        lambda i, ours, theirs: same_values(spec, spec.centred_shift)(i, ours, theirs.to_numpy()),
    )


def opencv_dilate(spec: Spec) -> Peer | None:
    """cv2.dilate with a flat kernel of one row; its cost grows with the window."""
    cv2, numpy = optional("cv2"), optional("numpy")
    if cv2 is None or spec.device != "cpu" or len(spec.shape) != 2 or not spec.last:
        return None
    if spec.window > (9000 if spec.full else 1025):
        return None
    if spec.dtype not in (torch.uint8, torch.float32, torch.float64):
        return None
    kernel, anchor = numpy.ones((1, spec.window), numpy.uint8), (spec.margins[0], 0)
    return Peer(
        lambda p: cv2.dilate(p[0], kernel, dst=p[1], anchor=anchor),
        lambda inputs: (_array(inputs), _array(inputs).copy()),
        same_values(spec),
    )


def cupy_filter(spec: Spec) -> Peer | None:
    """cupyx.scipy.ndimage.maximum_filter1d over the tensor's own memory."""
    if spec.device != "cuda":
        return None
    cupy, ndimage = optional("cupy"), optional("cupyx.scipy.ndimage")
    if ndimage is None or spec.dtype == torch.bfloat16 or spec.taps > 7e10:
        return None
    how = {"axis": spec.dim, "mode": "constant", "cval": spec.lowest, "origin": _scipy_origin(spec)}
    return Peer(
        lambda p: ndimage.maximum_filter1d(p[0], spec.window, output=p[1], **how),
        lambda inputs: (cupy.from_dlpack(inputs[0].detach()), cupy.from_dlpack(torch.empty_like(inputs[0]))),
        same_values(spec),
    )


MAXIMUM_PEERS = {
    "max_pool": torch_pool,
    "unfold.amax": torch_unfold,
    "compiled doubling": torch_compiled,
    "scipy": scipy_filter,
    "bottleneck": bottleneck_move,
    "pandas": pandas_rolling,
    "polars": polars_rolling,
    "OpenCV": opencv_dilate,
    "CuPy": cupy_filter,
}


def peers_of(spec: Spec, *names: str) -> dict[str, Peer]:
    """Those of the named peers (default: all; without those that take long to compile) that can do this here."""
    if not names:
        names = tuple(name for name in MAXIMUM_PEERS if spec.full or name != "compiled doubling")
    made = {name: MAXIMUM_PEERS[name](spec) for name in names}
    return {name: peer for name, peer in made.items() if peer is not None}


# ---- peers of the other operators ----


def minmax_peers(spec: Spec) -> dict[str, Peer]:
    """A minimum and a maximum one after the other, for nobody has both in one pass."""
    left, right = spec.margins
    peers = {}
    if left == right and spec.taps <= _pool_work(spec):

        def pools(inputs: Any) -> Any:
            x = inputs[0]
            return -F.max_pool1d(-x, spec.window, 1, left), F.max_pool1d(x, spec.window, 1, left)

        peers["max_pool"] = Peer(pools, agrees=same_all)
    ndimage, bottleneck = optional("scipy.ndimage"), optional("bottleneck")
    if spec.device == "cpu" and ndimage:
        edges = {"mode": "constant", "origin": _scipy_origin(spec)}
        peers["scipy"] = Peer(
            lambda a: (
                ndimage.minimum_filter1d(a, spec.window, cval=-LOWEST, **edges),
                ndimage.maximum_filter1d(a, spec.window, cval=LOWEST, **edges),
            ),
            _array,
            lambda i, ours, theirs: all(torch.equal(o, as_tensor(t, o)) for o, t in zip(ours, theirs, strict=True)),
        )
    if spec.device == "cpu" and bottleneck:
        window = spec.window
        peers["bottleneck"] = Peer(
            lambda a: (bottleneck.move_min(a, window, min_count=1), bottleneck.move_max(a, window, min_count=1)),
            _array,
            lambda i, ours, theirs: same_values(spec, right)(i, ours[1], theirs[1]),
        )
    return peers


def box_peers(window: int, dtype: torch.dtype, device: str) -> dict[str, Peer]:
    """Flat dilation of images. OpenCV gets them as it likes them: [H, W, colour]."""
    peers = {}
    if dtype.is_floating_point:
        peers["max_pool"] = Peer(lambda inputs: F.max_pool2d(inputs[0], window, 1, window // 2), agrees=same_all)
    ndimage, cv2, numpy = optional("scipy.ndimage"), optional("cv2"), optional("numpy")
    lowest = LOWEST if dtype.is_floating_point else 0
    if device == "cpu" and ndimage:
        size = (1, 1, window, window)
        peers["scipy"] = Peer(
            lambda a: ndimage.maximum_filter(a, size, mode="constant", cval=lowest),
            _array,
            lambda i, ours, theirs: torch.equal(ours, as_tensor(theirs, ours)),
        )
    if device == "cpu" and cv2:
        kernel = cv2.getStructuringElement(cv2.MORPH_RECT, (window, window))
        peers["OpenCV"] = Peer(
            lambda images: [cv2.dilate(image, kernel) for image in images],
            lambda inputs: [numpy.ascontiguousarray(image.transpose(1, 2, 0)) for image in _array(inputs)],
            lambda i, ours, theirs: torch.equal(ours, torch.from_numpy(numpy.stack(theirs)).permute(0, 3, 1, 2)),
        )
    return peers


# ---- cases ----


def _case(op: str, name: str, dtype: torch.dtype, device: str, **rest: Any) -> Case:
    return Case(FAMILY, op, name, dtype, device, **rest)


def values_case(
    name: str, spec: Spec, make: Any = None, peers: tuple[str, ...] = (), sweep: str = "", cold: bool = True
) -> Case:
    """sliding_window_max without indices."""
    function, window, dim, padding = pyperf_dl.sliding_window_max, spec.window, spec.dim, spec.padding
    return _case(
        "sliding_window_max",
        name,
        spec.dtype,
        spec.device,
        make=make or random_values(spec.shape, spec.dtype),
        ours=lambda inputs: function(inputs[0], window, dim, padding=padding),
        error=check_forward(function, window, dim, padding, {}),
        peers=peers_of(spec, *peers),
        params={"window": window, "shape": list(spec.shape), "padding": padding} | ({"sweep": sweep} if sweep else {}),
        cold=cold,
    )


def indices_case(spec: Spec, index: str) -> Case:
    """Values and indices: int64 as in torch, or the tap in the narrowest dtype."""
    function, window = pyperf_dl.sliding_window_max, spec.window
    options = {"return_indices": True, "index": index}
    return _case(
        "sliding_window_max",
        f"+ {index} index, w={window}",
        spec.dtype,
        spec.device,
        make=random_values(spec.shape, spec.dtype),
        ours=lambda inputs: function(inputs[0], window, padding="same", **options),
        error=check_forward(function, window, -1, "same", options),
        peers=peers_of(spec._replace(indices=True), "max_pool") if index == "global" else {},
        params={"window": window, "shape": list(spec.shape), "padding": "same"},
    )


def gradient_case(spec: Spec) -> Case:
    """Forward and backward; the floor reads x and the gradient of y, and writes y and the gradient of x."""
    window = spec.window

    def ours(inputs: Any) -> Any:
        y = pyperf_dl.sliding_window_max(inputs[0], window, padding="same")
        return y.detach(), *torch.autograd.grad(y, inputs[0], inputs[1])

    return _case(
        "sliding_window_max",
        f"forward + backward, w={window}",
        spec.dtype,
        spec.device,
        make=with_gradient(random_values(spec.shape, spec.dtype)),
        ours=ours,
        error=check_gradient(window, "same"),
        peers=peers_of(spec._replace(gradient=True), "max_pool"),
        params={"window": window, "shape": list(spec.shape), "padding": "same"},
    )


def minmax_case(spec: Spec) -> Case:
    function, window = pyperf_dl.sliding_window_minmax, spec.window
    return _case(
        "sliding_window_minmax",
        f"w={window}",
        spec.dtype,
        spec.device,
        make=random_values(spec.shape, spec.dtype),
        ours=lambda inputs: function(inputs[0], window, padding="same"),
        error=check_forward(function, window, -1, "same", {}),
        peers=minmax_peers(spec),
        params={"window": window, "shape": list(spec.shape), "padding": "same"},
    )


def box_case(window: int, dtype: torch.dtype, device: str) -> Case:
    images = 64 if device == "cuda" else 4
    return _case(
        "sliding_window_max",
        f"photographs, box {window} x {window}",
        dtype,
        device,
        make=photograph_batch(images, dtype),
        ours=lambda inputs: pyperf_dl.sliding_window_max(inputs[0], window, (-2, -1), padding="same"),
        error=check_box(window),
        peers=box_peers(window, dtype, device),
        params={"window": window, "shape": [images, 3, 427, 640], "padding": "same"},
    )


def sweep_cases(device: str, full: bool) -> list[Case]:
    """Windows from 3 to a million, and the other dtypes at some of them. Rows of 8-byte types have half the length."""
    rows, length = row_shape(device)
    some = WINDOWS if full else (33, 1025)
    dtypes = {torch.float32: WINDOWS, torch.bfloat16: WINDOWS if full else (33, 1025, 65_537)}
    dtypes |= dict.fromkeys((torch.float64, torch.uint8, torch.int64), some)
    if full:
        dtypes |= dict.fromkeys((torch.float16, torch.int16, torch.int32), (33, 1025, 65_537))
    cases = []
    for dtype, windows in dtypes.items():
        shape = (rows, length // 2 if dtype.itemsize == 8 else length)
        peers = tuple(MAXIMUM_PEERS) if dtype == torch.float32 else ()
        for window in windows:
            cases.append(
                values_case(f"w={window}", Spec(shape, dtype, device, window, full=full), None, peers, "window")
            )
    return cases


def output_cases(device: str, full: bool) -> list[Case]:
    """Indices, gradients, both extrema."""
    base = Spec(row_shape(device), torch.float32, device, 0, full=full)
    half = base._replace(dtype=torch.bfloat16)
    windows = (3, 33, 129, 1025, 9001, 65_537) if full else (33, 1025, 65_537)
    few = windows if full else (33, 1025)
    return [
        *(indices_case(base._replace(window=w), "global") for w in windows),
        *(indices_case(base._replace(window=w), "offset") for w in windows),
        *(indices_case(half._replace(window=w), "offset") for w in few),
        *(gradient_case(base._replace(window=w)) for w in windows),
        *(gradient_case(half._replace(window=w)) for w in (few if full else (33,))),
        *(minmax_case(base._replace(window=w)) for w in few),
    ]


def layout_cases(device: str, full: bool) -> list[Case]:
    """Paddings, sizes and dims."""
    base = Spec(row_shape(device), torch.float32, device, 33, full=full)
    many = 8 if device == "cuda" else 1
    cases = [values_case(f"causal, w={w}", base._replace(window=w, padding="causal")) for w in (33, 1025)]
    torch_peers = ("max_pool", "unfold.amax", "compiled doubling")
    cases.append(values_case("valid, w=33", base._replace(padding="valid"), peers=torch_peers))
    small = base._replace(shape=(64, 128), window=5)
    cases.append(values_case("in cache [64, 128], w=5", small, cold=False))
    if device == "cuda":
        cases[-1].peers["empty launch"] = Peer(lambda inputs: torch.cuda._sleep(0))
    short = base._replace(shape=(65_536 * many, 128), window=9)
    cases.append(values_case(f"short rows {list(short.shape)}, w=9", short))
    middle = base._replace(shape=(8 * many, 4096, 256), dim=1)
    for window in (9, 257):
        cases.append(values_case(f"{list(middle.shape)} along dim 1, w={window}", middle._replace(window=window)))
    return cases


def data_cases(device: str, full: bool) -> list[Case]:
    """Rows that are hard or easy for algorithms whose time depends on the data, such as deques."""
    base = Spec(row_shape(device), torch.float32, device, 0, full=full)
    peers = tuple(MAXIMUM_PEERS) if full else ("scipy", "bottleneck", "polars", "CuPy")
    cases = []
    for window in (33, 1025, 65_537) if full else (33, 1025):
        for kind in ROWS:
            spec = base._replace(window=window)
            make = shaped_rows(kind, window, spec.shape)
            cases.append(values_case(f"{kind}, w={window}", spec, make, peers, sweep="data"))
    return cases


def real_cases(device: str, full: bool) -> list[Case]:
    """Series and photographs that packages ship, with windows that mean something there; tiled to size."""
    cases = []
    base = Spec(row_shape(device), torch.float32, device, 0, full=full)
    if optional("statsmodels.datasets"):
        series = (("co2", 53, "a year"), ("sunspots", 11, "a cycle"), ("elnino", 121, "ten years"))
        for name, window, meaning in series:
            spec = base._replace(window=window)
            cases.append(values_case(f"{name}, w={window} ({meaning})", spec, tiled_series(name, spec.shape)))
    if optional("sklearn.datasets"):
        boxes = (3, 9, 31, 101) if full else (9, 31)
        cases += [box_case(w, dtype, device) for dtype in (torch.uint8, torch.float32) for w in boxes]
    return cases


def cases(device: str, full: bool) -> list[Case]:
    """Everything that this family measures on a device."""
    return [
        case
        for make in (sweep_cases, output_cases, layout_cases, data_cases, real_cases)
        for case in make(device, full)
    ]


# ---- pytest ----

_DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


@pytest.mark.parametrize("case", [c for d in _DEVICES for c in cases(d, False)], ids=lambda c: f"{c.device}: {c.title}")
def test_sliding_window(case: Case, benchmark: Any) -> None:
    """Right first, then timed."""
    harness.in_pytest(case, benchmark)
