"""Cases of the family `coupling`: splines and affine layers, forward, inverse and with gradients, real features.

`pytest bench --benchmark-only` runs the quick ones; `python bench/run.py --family coupling` makes the report.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import harness
import pytest
import torch
from harness import Case, Peer, optional, pyperf_dl, tensor_bytes

FAMILY = "coupling"
BOUND = 3.0
FEATURES = 16
DIRECTIONS = ("forward", "inverse", "forward + backward")


class Spec(NamedTuple):
    """One way to call the spline: [rows, FEATURES] elements with linear tails."""

    rows: int
    bins: int
    device: str
    what: str = "forward"
    dtype: torch.dtype = torch.float32  # of the parameters; x is float32 beside 16-bit ones
    precision: str = "fast"
    form: str = "each"  # element has its own parameters; "shared": by all rows; "channels": the first half of x passes
    full: bool = False

    @property
    def parameters(self) -> int:
        return 3 * self.bins - 1

    @property
    def x_dtype(self) -> torch.dtype:
        return self.dtype if self.dtype.itemsize >= 4 else torch.float32

    @property
    def inverse(self) -> bool:
        return self.what == "inverse"

    @property
    def gradient(self) -> bool:
        return self.what == "forward + backward"


# ---- inputs ----


def with_gradients(spec: Any, x: torch.Tensor, params: torch.Tensor, generator: torch.Generator) -> Any:
    """x, parameters, and for a backward the gradients of y and of the log-det."""
    if not spec.gradient:
        return x, params
    how = {"generator": generator, "device": generator.device}
    grad_y = torch.randn(x.shape, dtype=x.dtype, **how)
    grad_logdet = torch.randn(x.shape[:1], dtype=torch.promote_types(x.dtype, torch.float32), **how)
    return x.requires_grad_(), params.requires_grad_(), grad_y, grad_logdet


def random_elements(spec: Spec) -> Callable[[torch.Generator], Any]:
    """Normal x, of which some lie in the tails, and normal parameters."""

    def make(generator: torch.Generator) -> Any:
        how = {"generator": generator, "device": generator.device}
        x = 1.5 * torch.randn(spec.rows, FEATURES * (1 + (spec.form == "channels")), dtype=spec.x_dtype, **how)
        rows = 1 if spec.form == "shared" else spec.rows
        params = torch.randn(rows, FEATURES, spec.parameters, dtype=torch.float32, **how)
        return with_gradients(spec, x, params.to(spec.dtype), generator)

    return make


@functools.cache
def measured_features() -> torch.Tensor:
    """scikit-learn's breast cancer data, standardised: [569, 30]."""
    data = torch.from_numpy(optional("sklearn.datasets").load_breast_cancer().data).float()
    return (data - data.mean(0)) / data.std(0)


def real_elements(spec: Spec) -> Callable[[torch.Generator], Any]:
    """Half of the features transformed by what an untrained conditioner makes of the other half; tiled to size."""

    def make(generator: torch.Generator) -> Any:
        data = measured_features()
        rows = data.repeat(-(-spec.rows // len(data)), 1)[: spec.rows]
        torch.manual_seed(0)
        conditioner = torch.nn.Sequential(
            torch.nn.Linear(14, 64), torch.nn.ReLU(), torch.nn.Linear(64, FEATURES * spec.parameters)
        )
        with torch.no_grad():
            params = conditioner(rows[:, FEATURES:]).view(spec.rows, FEATURES, spec.parameters)
        x = rows[:, :FEATURES].contiguous().to(generator.device)
        return with_gradients(spec, x, params.to(generator.device, spec.dtype), generator)

    return make


# ---- ours, the peers, and what is right ----


def parts(params: torch.Tensor) -> tuple[torch.Tensor, ...]:
    bins = (params.shape[-1] + 1) // 3
    return params[..., :bins], params[..., bins : 2 * bins], params[..., 2 * bins :]


def nflows(x: torch.Tensor, params: torch.Tensor, inverse: bool) -> tuple[torch.Tensor, torch.Tensor]:
    splines = optional("nflows.transforms.splines.rational_quadratic")
    widths, heights, derivatives = parts(params)
    y, logdet = splines.unconstrained_rational_quadratic_spline(
        x, widths, heights, derivatives, inverse=inverse, tails="linear", tail_bound=BOUND
    )
    return y, logdet.sum(-1)


def normflows(x: torch.Tensor, params: torch.Tensor, inverse: bool) -> tuple[torch.Tensor, torch.Tensor]:
    splines = optional("normflows.utils.splines")
    widths, heights, derivatives = parts(params)
    y, logdet = splines.unconstrained_rational_quadratic_spline(
        x, widths, heights, derivatives, inverse=inverse, tails="linear", tail_bound=BOUND
    )
    return y, logdet.sum(-1)


def zuko(x: torch.Tensor, params: torch.Tensor, inverse: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Its own parametrisation of the same spline: as much work, other numbers."""
    transform = optional("zuko.transforms").MonotonicRQSTransform(*parts(params), bound=BOUND)
    y, logdet = (transform.inv if inverse else transform).call_and_ladj(x)
    return y, logdet.sum(-1)


PEERS = {"nflows": nflows, "normflows": normflows, "zuko": zuko}


def ours(spec: Spec, x: torch.Tensor, params: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return pyperf_dl.rational_quadratic_spline_packed(
        x,
        params,
        spec.bins,
        channels=slice(FEATURES, None) if spec.form == "channels" else None,
        inverse=spec.inverse,
        tail_bound=BOUND,
        logdet="sum",
        precision=spec.precision,
    )


def run(spec: Any, function: Callable[..., Any], inputs: Any) -> tuple[torch.Tensor, ...]:
    """Outputs, and gradients where the case asks for them."""
    y, logdet = function(*inputs[:2])
    if not spec.gradient:
        return y, logdet
    return y.detach(), logdet.detach(), *torch.autograd.grad((y, logdet), inputs[:2], inputs[2:])


def check(spec: Any, function: Callable[..., Any]) -> Callable[[Any, Any, bool], float]:
    """Largest error against the float64 reference; of y and log-det relative to max(1, size), of gradients to their
    largest entry."""

    def error(inputs: Any, outputs: Any, whole: bool) -> float:
        some = slice(None) if whole else slice(0, 1024)
        wide = [t.detach()[some].double() for t in inputs]
        wide = [t.requires_grad_() if spec.gradient and i < 2 else t for i, t in enumerate(wide)]
        with pyperf_dl.backend("reference"):
            wanted = run(spec, functools.partial(function, spec), wide)
        worst = 0.0
        for i, (got, want) in enumerate(zip(outputs, wanted, strict=True)):
            if i == 3 and len(inputs[1]) < len(inputs[0]) and not whole:  # a sum over all rows
                continue
            size = want.abs().clamp(min=1) if i < 2 else want.abs().max().clamp(min=1)
            worst = max(worst, float(((got[some].double() - want).abs() / size).max()))
        return worst

    return error


def peer(spec: Spec, function: Callable[..., Any], compiled: bool) -> Peer:
    """On a quarter of the rows where the whole would take seconds."""
    part = 4 if spec.rows >= 65_536 and not compiled else 1

    def call(x: torch.Tensor, params: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        params = params.expand(len(x), -1, -1)
        if spec.form != "channels":
            return function(x, params, spec.inverse)
        y, logdet = function(x[:, FEATURES:], params, spec.inverse)
        return torch.cat([x[:, :FEATURES], y], 1), logdet

    call = torch.compile(call, dynamic=False) if compiled else call

    def prepare(inputs: Any) -> Any:
        cut = [t.detach()[: max(1, len(t) // part)].clone().to(spec.x_dtype) for t in inputs]
        return [t.requires_grad_() if spec.gradient and i < 2 else t for i, t in enumerate(cut)]

    def agrees(inputs: Any, mine: Any, theirs: Any) -> bool:
        tolerance = {"rtol": 2e-2, "atol": 2e-2}
        n = len(theirs[0])
        return torch.allclose(mine[0][:n], theirs[0].to(mine[0].dtype), **tolerance)

    same = None if function is zuko else agrees
    return Peer(lambda i: run(spec, call, i), prepare, same, scale=part, compiles=compiled)


def peers_of(spec: Spec) -> dict[str, Peer]:
    """normflows has nflows' code; compiled peers take minutes to compile."""
    names = PEERS if spec.full else ("nflows", "zuko")
    there = {name: PEERS[name] for name in names if optional(name) is not None}
    found = {name: peer(spec, function, False) for name, function in there.items()}
    if spec.full:
        found |= {f"{name} compiled": peer(spec, f, True) for name, f in there.items() if name != "normflows"}
    return found


# ---- cases ----


def moved(spec: Any, inputs: Any, outputs: Any) -> int:
    """x and parameters in, y and log-det out; a backward reads x and parameters again."""
    again = tensor_bytes(inputs[:2]) if spec.gradient else 0
    return tensor_bytes(inputs, outputs) + again


TOLERANCE = {torch.float64: 1e-9, torch.float32: 5e-3, torch.bfloat16: 5e-3, torch.float16: 5e-3}


def spline_case(name: str, spec: Spec, make: Any = None, peers: bool = True) -> Case:
    return Case(
        FAMILY,
        "rational_quadratic_spline",
        f"{spec.what}, {name}",
        spec.dtype,
        spec.device,
        make=(make or random_elements)(spec),
        ours=lambda inputs: run(spec, functools.partial(ours, spec), inputs),
        error=check(spec, ours),
        moved=functools.partial(moved, spec),
        peers=peers_of(spec) if peers else {},
        tolerance=TOLERANCE[spec.dtype],
        params={"bins": spec.bins, "shape": [spec.rows, FEATURES], "precision": spec.precision, "what": spec.what},
        cold=spec.rows > 1024,
    )


def spline_cases(device: str, full: bool) -> list[Case]:
    """Bins, directions, precisions, sizes, and real features."""
    base = Spec(262_144 if device == "cuda" else 65_536, 8, device, full=full)
    every = [base._replace(what=what) for what in DIRECTIONS]
    some = every if full else every[-1:]
    found = [spline_case("K=8", spec) for spec in every]
    found += [spline_case(f"K={k}", spec._replace(bins=k), peers=full) for k in (16, 32) for spec in some]
    found += [spline_case("exact, K=8", spec._replace(precision="exact"), peers=False) for spec in some]
    found += [spline_case("K=8, 16-bit parameters", s._replace(dtype=torch.bfloat16), peers=False) for s in some]
    for form, name in (("shared", "shared parameters"), ("channels", "half of the channels")):
        found += [spline_case(f"{name}, K=8", s._replace(form=form), peers=full) for s in some]
    for few in (64, 256) if full else (256,):
        found += [spline_case(f"{few * FEATURES} elements, K=8", spec._replace(rows=few)) for spec in every]
    if optional("sklearn.datasets"):
        found += [spline_case("breast cancer features, K=8", spec, real_elements) for spec in some]
    return found


# ---- affine couplings ----


class AffineSpec(NamedTuple):
    """x [rows, 64], and scale and shift as the two halves of one conditioner's output."""

    rows: int
    activation: str
    device: str
    what: str = "forward"
    dtype: torch.dtype = torch.float32
    full: bool = False

    @property
    def inverse(self) -> bool:
        return self.what == "inverse"

    @property
    def gradient(self) -> bool:
        return self.what == "forward + backward"


def affine_elements(spec: AffineSpec) -> Callable[[torch.Generator], Any]:
    def make(generator: torch.Generator) -> Any:
        how = {"generator": generator, "device": generator.device, "dtype": spec.dtype}
        x, params = torch.randn(spec.rows, 64, **how), torch.randn(spec.rows, 128, **how)
        return with_gradients(spec, x, params, generator)

    return make


def our_affine(spec: AffineSpec, x: torch.Tensor, params: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    pairs = params.view(len(x), 2, -1).transpose(1, 2)  # scale and shift of each element
    return pyperf_dl.affine_coupling_packed(x, pairs, inverse=spec.inverse, activation=spec.activation)


def eager_affine(spec: AffineSpec, x: torch.Tensor, params: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The formula in PyTorch's operators, as flow libraries write it."""
    scale, shift = params.chunk(2, -1)
    log_scale = _LOG_SCALES[spec.activation](scale)
    y = (x - shift) * torch.exp(-log_scale) if spec.inverse else x * torch.exp(log_scale) + shift
    return y, (-log_scale if spec.inverse else log_scale).sum(-1)


_LOG_SCALES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "exp": lambda u: u,
    "sigmoid": lambda u: torch.nn.functional.logsigmoid(u + 2),
    "softplus": lambda u: torch.nn.functional.softplus(u).log(),
    "tanh": lambda u: 2.0 * torch.tanh(u),
    "atan": lambda u: 2.0 * 0.636 * torch.atan(u),
}


def zuko_affine(spec: AffineSpec, x: torch.Tensor, params: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Its own clipping of the same kind: as much work, other numbers."""
    scale, shift = params.chunk(2, -1)
    transform = optional("zuko.transforms").MonotonicAffineTransform(shift, scale)
    y, logdet = (transform.inv if spec.inverse else transform).call_and_ladj(x)
    return y, logdet.sum(-1)


class _Given(torch.nn.Module):
    """A conditioner that has its answer already."""

    answer: torch.Tensor

    def forward(self, untouched: torch.Tensor) -> torch.Tensor:
        return self.answer


@functools.cache
def _freia_block() -> Any:
    layers = optional("FrEIA.modules")
    return layers.GLOWCouplingBlock(
        [(64,)], subnet_constructor=lambda i, o: _Given(), clamp=2.0, clamp_activation="ATAN"
    )


def freia_affine(spec: AffineSpec, x: torch.Tensor, params: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A block with both of its halves, each of which has scales and shifts."""
    block = _freia_block()
    scale, shift = params.chunk(2, -1)
    block.subnet2.answer = torch.cat([scale[:, :32], shift[:, :32]], -1)
    block.subnet1.answer = torch.cat([scale[:, 32:], shift[:, 32:]], -1)
    (y,), logdet = block([x], rev=spec.inverse)
    return y, logdet


def affine_peers(spec: AffineSpec) -> dict[str, Peer]:
    def peer(function: Callable[..., Any], compiled: bool = False) -> Peer:
        call = functools.partial(function, spec)
        call = torch.compile(call, dynamic=False) if compiled else call
        agrees = None
        if function is not zuko_affine:
            agrees = lambda inputs, mine, theirs: torch.allclose(mine[0], theirs[0], rtol=1e-3, atol=1e-3)  # noqa: E731
        return Peer(lambda inputs: run(spec, call, inputs), agrees=agrees, compiles=compiled)

    found = {"eager": peer(eager_affine), "compiled": peer(eager_affine, True)}
    if spec.activation == "exp" and optional("zuko") is not None:
        found["zuko"] = peer(zuko_affine)
    if spec.activation == "atan" and optional("FrEIA") is not None:
        found["FrEIA"] = peer(freia_affine)
    return found


def affine_case(name: str, spec: AffineSpec, peers: bool = True) -> Case:
    return Case(
        FAMILY,
        "affine_coupling_packed",
        f"{spec.what}, {name}",
        spec.dtype,
        spec.device,
        make=affine_elements(spec),
        ours=lambda inputs: run(spec, functools.partial(our_affine, spec), inputs),
        error=check(spec, our_affine),
        moved=functools.partial(moved, spec),
        peers=affine_peers(spec) if peers else {},
        tolerance={torch.float32: 1e-4, torch.bfloat16: 2e-2}[spec.dtype],
        params={"activation": spec.activation, "shape": [spec.rows, 64], "what": spec.what},
        cold=spec.rows > 1024,
    )


def affine_cases(device: str, full: bool) -> list[Case]:
    """Activations, directions, sizes."""
    base = AffineSpec(262_144 if device == "cuda" else 65_536, "exp", device, full=full)
    found = [affine_case("exp", base._replace(what=what)) for what in DIRECTIONS if full or what != "inverse"]
    for activation in tuple(_LOG_SCALES)[1:]:
        for what in DIRECTIONS if full else DIRECTIONS[-1:]:
            spec = base._replace(activation=activation, what=what)
            found.append(affine_case(activation, spec, full or activation == "atan"))
    found.append(affine_case("exp", base._replace(what=DIRECTIONS[-1], dtype=torch.bfloat16), False))
    few = base._replace(rows=64)
    found += [affine_case("exp, 4096 elements", few._replace(what=what), full) for what in DIRECTIONS[::2]]
    return found


def cases(device: str, full: bool) -> list[Case]:
    """Everything that this family measures on a device."""
    return spline_cases(device, full) + affine_cases(device, full)


# ---- pytest ----

_DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


@pytest.mark.parametrize("case", [c for d in _DEVICES for c in cases(d, False)], ids=lambda c: f"{c.device}: {c.title}")
def test_coupling(case: Case, benchmark: Any) -> None:
    """Right first, then timed."""
    harness.in_pytest(case, benchmark)
