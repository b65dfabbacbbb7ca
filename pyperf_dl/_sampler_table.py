"""Tables of coefficients: every step of every sampler as one linear form, in float64.

With m the model's output, h1, h2, h3 what the last steps kept (the newest first), and z standard normal noise:

    D  = clip(p x + q m)                                               the denoised sample
    x' = x_ x + m_ m + d_ D + h1_ h1 + h2_ h2 + h3_ h3 + z_ z          the next sample
    h  = keep_x x + keep_m m + keep_d D                                what this step keeps

A corrector (UniPC) first replaces x, which then is what the next one corrects from:

    x <- last last_x + last_d D + last_h1 h1 + last_h2 h2              last: the x of the step before
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from .reference.sampler import PREDICTIONS, Level, ancestral_levels, ddim_deviation, ddpm_variances


class Row(NamedTuple):
    """The coefficients of one step."""

    p: float
    q: float
    x: float = 0.0
    m: float = 0.0
    d: float = 0.0
    h1: float = 0.0
    h2: float = 0.0
    h3: float = 0.0
    z: float = 0.0
    keep_x: float = 0.0
    keep_m: float = 0.0
    keep_d: float = 0.0
    last_x: float = 0.0
    last_d: float = 0.0
    last_h1: float = 0.0
    last_h2: float = 0.0
    log_small: float = 0.0  # of a learned range of variances, their logarithms; z is 1 then
    log_large: float = 0.0


def prediction_weights(now: Level, prediction: str) -> tuple[float, float]:
    """(p, q) of the denoised sample p x + q m; see denoised in reference/sampler.py."""
    alpha, sigma = now
    if prediction == "epsilon":
        return 1 / alpha, -sigma / alpha
    if prediction == "x0":
        return 0.0, 1.0
    if prediction == "flow":
        return 1.0, -sigma
    square = alpha * alpha + sigma * sigma
    return alpha / square, -sigma / math.sqrt(square)


def edm_weights(now: Level, sigma_data: float) -> tuple[float, float]:
    """(p, q) of a network behind the preconditioning of Karras et al. (2022), table 1: c_skip, c_out."""
    size = math.hypot(now.sigma, sigma_data)
    return (sigma_data / size) ** 2, now.sigma * sigma_data / size


def noise_weights(now: Level, prediction: str) -> tuple[float, float]:
    """(x, m) of the noise that the output predicts."""
    alpha, sigma = now
    if prediction == "epsilon":
        return 0.0, 1.0
    if prediction == "x0":
        return 1 / sigma, -alpha / sigma
    if prediction == "flow":
        return 1.0, alpha
    square = alpha * alpha + sigma * sigma
    return sigma / square, alpha / math.sqrt(square)


# ---- one function a sampler: rows of a schedule, whose last level is where it ends ----
# prediction: one of PREDICTIONS, or in samplers that see nothing of an output but D, what gives (p, q) of a level.

Prediction = str | Callable[[Level], tuple[float, float]]


def ddim(levels: Sequence[Level], prediction: str = "epsilon", eta: float = 0.0, rederive: bool = False) -> list[Row]:
    rows = []
    for now, after in _steps(levels):
        s = eta * ddim_deviation(now, after)
        kept = math.sqrt(max(after.sigma**2 - s**2, 0.0))
        if rederive:
            share = kept / now.sigma
            rows.append(_row(now, prediction, x=share, d=after.alpha - now.alpha * share, z=s))
        else:
            of_x, of_m = noise_weights(now, prediction)
            rows.append(_row(now, prediction, x=kept * of_x, m=kept * of_m, d=after.alpha, z=s))
    return rows


def ddpm(levels: Sequence[Level], prediction: str = "epsilon", variance: str = "small") -> list[Row]:
    rows = []
    for now, after in _steps(levels):
        small, large = ddpm_variances(now, after)
        ratio = now.alpha / after.alpha
        noise = {"z": math.sqrt(large if variance == "large" else small)}
        if variance == "learned_range":
            logs = [math.log(max(v, 1e-300)) for v in (small, large)]  # both are 0 where a last step stays
            noise = {"z": 1.0, "log_small": logs[0], "log_large": logs[1]}
        rows.append(
            _row(
                now,
                prediction,
                x=ratio * (after.sigma / now.sigma) ** 2,
                d=after.alpha * (1 - ratio**2) / now.sigma**2,
                **noise,
            )
        )
    rows[-1] = rows[-1]._replace(z=0.0)
    return rows


def euler(levels: Sequence[Level], prediction: Prediction = "epsilon") -> list[Row]:
    return [_row(now, prediction, **towards(now.sigma, after.sigma)) for now, after in _steps(levels)]


def raised_levels(levels: Sequence[Level], s_churn: float, s_tmin: float, s_tmax: float) -> list[Level]:
    """sigma-hat of each step: Karras et al. (2022), algorithm 2, line 5. The last level stays."""
    steps = len(levels) - 1
    gamma = min(s_churn / steps, math.sqrt(2) - 1)
    return [
        Level(1.0, sigma * (1 + gamma)) if i < steps and s_tmin <= sigma <= s_tmax else Level(1.0, sigma)
        for i, (_, sigma) in enumerate(levels)
    ]


def churn_deviation(now: Level, raised: Level, s_noise: float) -> float:
    """Of the noise that raises a sample."""
    return s_noise * math.sqrt(raised.sigma**2 - now.sigma**2)


def churn(
    levels: Sequence[Level], raised: Sequence[Level], prediction: Prediction = "epsilon", s_noise: float = 1.0
) -> list[Row]:
    """Each row goes from a raised level to the next level, and adds the noise that raises it for the next step. x of
    the first one has churn_deviation(levels[0], raised[0]) of noise already."""
    return [
        _row(now, prediction, **towards(now.sigma, after.sigma), z=churn_deviation(after, after_raised, s_noise))
        for (now, after_raised), after in zip(_steps(raised), levels[1:], strict=True)
    ]


def euler_ancestral(
    levels: Sequence[Level], prediction: Prediction = "epsilon", eta: float = 1.0, s_noise: float = 1.0
) -> list[Row]:
    rows = []
    for now, after in _steps(levels):
        down, up = ancestral_levels(now.sigma, after.sigma, eta)
        rows.append(_row(now, prediction, **towards(now.sigma, down), z=up * s_noise))
    return rows


def flow_ancestral(
    levels: Sequence[Level], prediction: str = "flow", eta: float = 1.0, s_noise: float = 1.0
) -> list[Row]:
    rows = []
    for now, after in _steps(levels):
        down = after.sigma * (1 + (after.sigma / now.sigma - 1) * eta)
        scale = (1 - after.sigma) / (1 - down)
        share = down / now.sigma
        deviation = math.sqrt(max(after.sigma**2 - (down * scale) ** 2, 0.0))
        rows.append(_row(now, prediction, x=scale * share, d=scale * (1 - share), z=deviation * s_noise))
    return rows


def heun(levels: Sequence[Level], prediction: Prediction = "epsilon") -> list[Row]:
    """Two rows a step, at its begin and at its end; one where it ends at 0. The first keeps x + (delta / 2) slope."""
    rows = []
    for now, after in _steps(levels):
        rows.append(_row(now, prediction, **towards(now.sigma, after.sigma)))
        if after.sigma == 0:
            continue
        half = (after.sigma - now.sigma) / 2
        rows[-1] = rows[-1]._replace(keep_x=1 + half / now.sigma, keep_d=-half / now.sigma)
        rows.append(_row(after, prediction, x=half / after.sigma, d=-half / after.sigma, h1=1.0))
    return rows


def integrals(nodes: Sequence[float], begin: float, end: float) -> list[float]:
    """Of the polynomials that are 1 at one of four nodes at most and 0 at the others: by Gauss' two points, exactly."""
    middle, half = (begin + end) / 2, (end - begin) / 2
    points = (middle - half / math.sqrt(3), middle + half / math.sqrt(3))
    return [
        half * sum(math.prod((at - other) / (own - other) for other in nodes if other != own) for at in points)
        for own in nodes
    ]


def lms(levels: Sequence[Level], prediction: Prediction = "epsilon", order: int = 4) -> list[Row]:
    """Keeps slopes (x - D) / sigma."""
    rows = []
    sigmas = [level.sigma for level in levels]
    for i, (now, after) in enumerate(_steps(levels)):
        used = sigmas[: i + 1][::-1][:order]
        slope, *older = integrals(used, now.sigma, after.sigma)
        rows.append(
            _row(
                now,
                prediction,
                x=1 + slope / now.sigma,
                d=-slope / now.sigma,
                **history(older),
                keep_x=1 / now.sigma,
                keep_d=-1 / now.sigma,
            )
        )
    return rows


def plms(levels: Sequence[Level], prediction: str = "epsilon") -> list[Row]:
    """Keeps outputs, and extrapolates them, whatever they predict."""
    rows = []
    weights = ([1.0], [3 / 2, -1 / 2], [23 / 12, -16 / 12, 5 / 12], [55 / 24, -59 / 24, 37 / 24, -9 / 24])
    for i, (now, after) in enumerate(_steps(levels)):
        (a, s), (a1, s1) = now, after
        factor = -(a1**2 - a**2) / (a * (a * s1 + a1 * s))
        of_x, of_m = noise_weights(now, prediction)
        newest, *older = (factor * of_m * w for w in weights[min(i, 3)])
        rows.append(_row(now, prediction, x=a1 / a + factor * of_x, m=newest, **history(older), keep_m=1.0))
    return rows


def dpm_solver_pp(
    levels: Sequence[Level],
    prediction: Prediction = "epsilon",
    order: int = 2,
    kind: str = "midpoint",
    eta: float = 0.0,
    s_noise: float = 1.0,
    lower_order_final: bool = True,
) -> list[Row]:
    """Orders 1 to 3; the first steps, and one that ends at sigma = 0, have a lower one. Keeps denoised samples.
    lower_order_final: so have the last two steps."""
    rows = []
    steps = _steps(levels)
    for i, (now, after) in enumerate(steps):
        at_most = min(order, _known(levels, i), len(steps) - i if lower_order_final else order)
        h = after.log_ratio - now.log_ratio
        if after.sigma == 0 or h == 0:
            at_most = 1
        g = (1 + eta) * h
        d, older = -math.expm1(-g), []
        if at_most >= 2:
            r0 = (now.log_ratio - levels[i - 1].log_ratio) / h
            phi2 = math.expm1(-g) / g + 1
            if at_most == 2:
                second = -math.expm1(-g) / 2 if kind == "midpoint" and order == 2 else phi2
                d, older = d + second / r0, [-second / r0]
            else:
                r1 = (levels[i - 1].log_ratio - levels[i - 2].log_ratio) / h
                phi3 = phi2 / g - 0.5
                newer = phi2 * (1 + r0 / (r0 + r1)) - phi3 / (r0 + r1)  # of (D - D1) / r0
                oldest = -phi2 * r0 / (r0 + r1) + phi3 / (r0 + r1)  # of (D1 - D2) / r1
                d, older = d + newer / r0, [-newer / r0 + oldest / r1, -oldest / r1]
        rows.append(
            _row(
                now,
                prediction,
                x=after.sigma / now.sigma * (math.exp(-eta * h) if eta else 1.0),  # h may be infinite
                d=after.alpha * d,
                **history([after.alpha * c for c in older]),
                z=s_noise * after.sigma * (math.sqrt(-math.expm1(-2 * eta * h)) if eta else 0.0),
                keep_d=1.0,
            )
        )
    return rows


def unipc(
    levels: Sequence[Level], prediction: Prediction = "epsilon", b: str = "bh2", lower_order_final: bool = True
) -> list[Row]:
    """UniPC of order 2. Every row but the first corrects x before it predicts; keeps denoised samples."""
    of: Callable[[float], float] = math.expm1 if b == "bh2" else float
    rows: list[Row] = []
    steps = _steps(levels)
    order = 1
    for i, (now, after) in enumerate(steps):
        corrector = {}
        if i:
            before = levels[i - 1]
            h = now.log_ratio - before.log_ratio
            base = -now.alpha * math.expm1(-h)
            weight = -now.alpha * of(-h)
            if order == 1:
                older, newer = 0.0, 0.5
            else:
                r = (levels[i - 2].log_ratio - before.log_ratio) / h
                phi2 = math.expm1(-h) / -h - 1
                phi3 = phi2 / -h - 0.5
                # rho of R rho = phi / B, with older / r
                newer = (2 * phi3 - r * phi2) / (of(-h) * (1 - r))
                older = (phi2 / of(-h) - newer) / r
            corrector = {
                "last_x": now.sigma / before.sigma,
                "last_d": weight * newer,
                "last_h1": base - weight * (newer + older),
                "last_h2": weight * older,
            }
        order = min(2, _known(levels, i), len(steps) - i if lower_order_final else 2)
        h = after.log_ratio - now.log_ratio
        if after.sigma == 0 or h == 0:
            order = 1
        d, older_d = -after.alpha * math.expm1(-h), 0.0
        if order == 2:
            older_d = -after.alpha * of(-h) * 0.5 / ((levels[i - 1].log_ratio - now.log_ratio) / h)
        rows.append(
            _row(now, prediction, x=after.sigma / now.sigma, d=d - older_d, h1=older_d, keep_d=1.0, **corrector)
        )
    return rows


def flow_euler(levels: Sequence[Level]) -> list[Row]:
    return [_row(now, "flow", x=1.0, m=after.sigma - now.sigma) for now, after in _steps(levels)]


def flow_stochastic(levels: Sequence[Level], prediction: str = "flow") -> list[Row]:
    return [_row(now, prediction, d=1 - after.sigma, z=after.sigma) for now, after in _steps(levels)]


def flow_sde(levels: Sequence[Level], noise_level: float) -> list[Row]:
    rows = []
    for now, after in _steps(levels):
        step = after.sigma - now.sigma
        deviation = noise_level * math.sqrt(now.sigma / (now.alpha or after.alpha))
        pull = deviation**2 / (2 * now.sigma)
        noise = deviation * math.sqrt(-step)
        rows.append(_row(now, "flow", x=1 + pull * step, m=(1 + pull * now.alpha) * step, z=noise))
    return rows


def latent_consistency(
    levels: Sequence[Level], scalings: Sequence[tuple[float, float]], prediction: str = "epsilon"
) -> list[Row]:
    """scalings: (c_skip, c_out) of each step. The last one ends with what it found."""
    rows = []
    for i, ((now, after), (skip, out)) in enumerate(zip(_steps(levels), scalings, strict=True)):
        alpha, sigma = (1.0, 0.0) if i == len(scalings) - 1 else after
        rows.append(_row(now, prediction, x=alpha * skip, d=alpha * out, z=sigma))
    return rows


def consistency(levels: Sequence[Level], sigma_min: float, sigma_data: float, s_noise: float = 1.0) -> list[Row]:
    """Song et al. (2023), algorithm 1, with the preconditioning of their appendix C: D is what the whole model says,
    which is x itself at sigma_min."""
    rows = []
    for (_, sigma), (_, after) in _steps(levels):
        skip = sigma_data**2 / ((sigma - sigma_min) ** 2 + sigma_data**2)
        out = (sigma - sigma_min) * sigma_data / math.hypot(sigma, sigma_data)
        deviation = s_noise * math.sqrt(max(after**2 - sigma_min**2, 0.0))
        rows.append(Row(skip, out, d=1.0, z=deviation))
    return rows


# ---- parts of rows ----


def _steps(levels: Sequence[Level]) -> list[tuple[Level, Level]]:
    return list(itertools.pairwise(levels))


def _row(now: Level, prediction: Prediction, **coefficients: float) -> Row:
    if callable(prediction):
        return Row(*prediction(now), **coefficients)
    assert prediction in PREDICTIONS
    return Row(*prediction_weights(now, prediction), **coefficients)


def _known(levels: Sequence[Level], i: int) -> int:
    """How many denoised samples step i has for a polynomial in lambda: none of a level without signal, where lambda is
    infinite; but its own."""
    return max(i + (levels[0].alpha > 0), 1)


def towards(sigma: Any, sigma_after: Any) -> dict[str, Any]:
    """Of numbers or arrays: x + (sigma' - sigma) (x - D) / sigma."""
    return {"x": sigma_after / sigma, "d": 1 - sigma_after / sigma}


def history(older: Iterable[Any]) -> dict[str, Any]:
    return {f"h{k}": c for k, c in enumerate(older, 1)}
