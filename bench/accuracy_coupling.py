"""Errors of the splines in float32 against float64, beside those of nflows and zuko where these are installed.

python bench/accuracy_coupling.py [--elements 65536] [--insert docs/coupling.md]
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import pyperf_dl

BINS, BOUND = 8, 3.0
QUANTILES = (0.5, 0.9, 0.99, 0.999)
SIGMAS = (1.0, 4.0)  # of the parameters; x is N(0, 1.5^2)
OUTPUTS = ("y", "log-det", "gradient of x", "gradient of the parameters")
# Gradients of y and of the log-det, from y. The last is a flow's loss: sum of y^2 / 2 less the log-dets.
LOSSES: dict[str, Callable[[torch.Tensor], Any]] = {
    "y": lambda y: (torch.ones_like(y), torch.zeros_like(y)),
    "log-det": lambda y: (torch.zeros_like(y), torch.ones_like(y)),
    "flow": lambda y: (y, -torch.ones_like(y)),
}
Spline = Callable[[torch.Tensor, torch.Tensor, bool], tuple[torch.Tensor, torch.Tensor]]  # x, parameters, inverse


def ours(parametrization: str, precision: str = "fast") -> Spline:
    how: dict[str, Any] = {"tail_bound": BOUND, "parametrization": parametrization, "precision": precision}
    return lambda x, params, inverse: pyperf_dl.rational_quadratic_spline_packed(
        x, params, BINS, inverse=inverse, **how
    )


def nflows_spline(x: torch.Tensor, params: torch.Tensor, inverse: bool) -> tuple[torch.Tensor, torch.Tensor]:
    from nflows.transforms.splines.rational_quadratic import unconstrained_rational_quadratic_spline

    parts = params.split((BINS, BINS, BINS - 1), -1)
    return unconstrained_rational_quadratic_spline(x, *parts, inverse=inverse, tails="linear", tail_bound=BOUND)


def zuko_spline(x: torch.Tensor, params: torch.Tensor, inverse: bool) -> tuple[torch.Tensor, torch.Tensor]:
    from zuko.transforms import MonotonicRQSTransform

    transform = MonotonicRQSTransform(*params.split((BINS, BINS, BINS - 1), -1), bound=BOUND)
    return (transform.inv if inverse else transform).call_and_ladj(x)


PEERS: dict[str, Spline] = {"nflows": nflows_spline, "zuko": zuko_spline}


def inputs(elements: int, sigma: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(elements, generator=g) * 1.5, torch.randn(elements, 3 * BINS - 1, generator=g) * sigma


def outputs(spline: Spline, x: torch.Tensor, params: torch.Tensor, inverse: bool, loss: str) -> list[torch.Tensor]:
    """y, log-det, gradients of x and of the parameters, in float64; NaN for elements for which the spline raises."""
    try:
        x, params = x.detach().requires_grad_(), params.detach().requires_grad_()
        y, logdet = spline(x, params, inverse)
        grads = torch.autograd.grad((y, logdet), (x, params), LOSSES[loss](y.detach()))
        return [t.detach().double() for t in (y, logdet, *grads)]
    except AssertionError:  # nflows' discriminant: one element refuses all, so halve until it is found
        if x.shape[0] == 1:
            return [torch.full(t.shape, torch.nan, dtype=torch.float64) for t in (x, x, x, params)]
        halves = (
            outputs(spline, a, b, inverse, loss) for a, b in zip(x.tensor_split(2), params.tensor_split(2), strict=True)
        )
        return [torch.cat(parts) for parts in zip(*halves, strict=True)]


def errors(got: torch.Tensor, want: torch.Tensor, relative: bool = False) -> list[float]:
    """Quantiles of |got - want|, and its maximum; what is NaN counts as infinite."""
    e = (got - want).abs()
    if relative:
        e = (e / want.abs())[want != 0]
    e = e.nan_to_num(torch.inf).flatten().sort().values
    return [float(e[int(q * (e.numel() - 1))]) for q in (*QUANTILES, 1.0)]


# ---- the table ----

SHOWN = (0, 2, 4)  # of the quantiles and the maximum


def cell(found: list[float]) -> str:
    return " / ".join(f"{found[i]:.0e}".replace("e-0", "e-") for i in SHOWN)


def table(parametrization: str, peer: str, elements: int) -> list[str]:
    """Rows for one parametrisation, the errors of its peer in the last column."""
    columns = {"exact": ours(parametrization, "exact"), "fast": ours(parametrization)}
    if importlib.util.find_spec(peer):
        columns[peer] = PEERS[peer]
    lines = [f"| parameters | direction | error of | {' | '.join(columns)} |", f"|{'---|' * (3 + len(columns))}"]
    for sigma in SIGMAS:
        for inverse in (False, True):
            x, params = inputs(elements, sigma)
            truth = outputs(ours(parametrization), x.double(), params.double(), inverse, "flow")
            found = {name: outputs(f, x, params, inverse, "flow") for name, f in columns.items()}
            for i, name in enumerate(OUTPUTS):
                cells = " | ".join(cell(errors(got[i], truth[i])) for got in found.values())
                direction = "inverse" if inverse else "forward"
                lines.append(f"| N(0, {sigma:g}²) | {direction} | {name} | {cells} |")
    return lines


def markdown(elements: int) -> str:
    bound = (
        f"Absolute errors in float32, 50 % / 99 % / largest, of {elements:,} elements: x ~ N(0, 1.5²), K = {BINS}, box "
        f"[-{BOUND:g}, {BOUND:g}]; gradients of sum(y² / 2 - log-det). Truth: float64.\n"
    )
    parts = [bound, *table("nflows", "nflows", elements), "", "zuko's parametrisation:", ""]
    return "\n".join([*parts, *table("zuko", "zuko", elements)])


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="bench/accuracy_coupling.py", description=__doc__.split("\n")[0])
    parser.add_argument("--elements", type=int, default=1 << 16)
    parser.add_argument("--insert", type=Path, metavar="FILE", help="put the tables between their markers in this file")
    options = parser.parse_args(arguments)
    text = markdown(options.elements)
    if options.insert is None:
        print(text)
        return 0
    from report import insert

    insert(text, options.insert, "accuracy_coupling")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
