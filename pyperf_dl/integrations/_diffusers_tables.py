"""Coefficients of the schedulers of diffusers, as their `step` has them, from a scheduler's own numbers in float64.

One function a class. Where diffusers departs from the papers so do these: the comments "slip" say where.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch

from .._sampler_table import history, integrals, towards
from ..reference._sampler_linear import COLUMNS

Numbers = Any  # a float64, or an array of them, one a row
_AT = {name: k for k, name in enumerate(COLUMNS)}


class Table(NamedTuple):
    """rows: [blocks, steps, columns]; a block is for how many steps went before, or for a part of a step."""

    rows: np.ndarray
    keeps: str = "nothing"  # of a step for the next ones: "output", "denoised" or "combination"
    noisy: tuple[bool, ...] | bool = False  # whether the peer draws noise, at all steps or at each
    clip: float = math.inf
    threshold: tuple[float, float] | None = None  # quantile and largest bound


class UnsupportedError(Exception):
    """With the reason."""


# ---- schedulers of sigmas ----


def euler(scheduler: Any) -> Table:
    sigma, after = _steps(scheduler)
    rows = _rows(**_denoised_in_sigmas(scheduler, sigma), **towards(sigma, after), input=_input_scale(after))
    return _table(scheduler, [rows])


def euler_ancestral(scheduler: Any) -> Table:
    sigma, after = _steps(scheduler)
    up = np.sqrt(after**2 * (sigma**2 - after**2) / sigma**2)
    down = np.sqrt(after**2 - up**2)
    if scheduler.config.prediction_type == "sample":
        raise UnsupportedError("prediction type")
    rows = _rows(**_denoised_in_sigmas(scheduler, sigma), **towards(sigma, down), z=up, input=_input_scale(after))
    return _table(scheduler, [rows], noisy=True)


def heun(scheduler: Any) -> Table:
    """Blocks: at the begin of a step, and at its end, with the sample at the begin and what was denoised there."""
    sigma, after = _steps(scheduler)
    begin = _rows(**_denoised_in_sigmas(scheduler, sigma), **towards(sigma, after), input=_input_scale(after))
    before = np.concatenate([[math.nan], sigma[:-1]])
    half = (sigma - before) / 2
    end = _rows(
        **_denoised_in_sigmas(scheduler, sigma),
        x=half / sigma,
        d=-half / sigma,
        h1=1 + half / before,
        h2=-half / before,
        input=_input_scale(after),
    )
    return _table(scheduler, [begin, end], keeps="denoised")


def lms(scheduler: Any, order: int) -> Table:
    """Blocks: by how many slopes there are. slip: the order follows the index, so that a loop that begins late takes
    the first terms of a higher order."""
    if not 1 <= order <= 4:
        raise UnsupportedError("order above 4")
    sigmas = _float64(scheduler.sigmas)
    sigma, after = _steps(scheduler)
    steps, blocks = len(sigma), []
    weights = np.zeros([steps, 4])
    for i in range(steps):
        used = sigmas[max(i + 1 - order, 0) : i + 1][::-1]
        weights[i, : len(used)] = integrals(used.tolist(), sigma[i], after[i])
    for there in range(1, order + 1):
        slope, *older = weights[:, :there].T
        blocks.append(
            _rows(
                **_denoised_in_sigmas(scheduler, sigma),
                x=1 + slope / sigma,
                d=-slope / sigma,
                **history(older),
                keep_x=1 / sigma,
                keep_d=-1 / sigma,
                input=_input_scale(after),
            )
        )
    epsilon = scheduler.config.prediction_type == "epsilon"
    return _table(scheduler, blocks, keeps="output" if epsilon else "combination")


# ---- flows ----


def flow_match_euler(scheduler: Any) -> Table:
    sigma, after = _steps(scheduler)
    if scheduler.config.stochastic_sampling:
        return _table(scheduler, [_rows(p=1.0, q=-sigma, d=1 - after, z=after)], noisy=True)
    return _table(scheduler, [_rows(p=1.0, q=-sigma, x=1.0, m=after - sigma)])


def flow_match_heun(scheduler: Any) -> Table:
    """Blocks: at the begin of a step, and at its end, with the sample and the velocity at the begin."""
    sigma, after = _steps(scheduler)
    half = (sigma - np.concatenate([[math.nan], sigma[:-1]])) / 2
    begin = _rows(p=1.0, q=-sigma, x=1.0, m=after - sigma, keep_m=1.0)
    end = _rows(p=1.0, q=-sigma, m=half, h1=np.ones_like(half), h2=half)
    return _table(scheduler, [begin, end], keeps="output")


# ---- schedulers of alphas: a row for each timestep of the training ----


def ddim(scheduler: Any, eta: float, rederive: bool) -> Table:
    apart = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    square, square_after = _squares(scheduler, apart, scheduler.final_alpha_cumprod)
    alpha, sigma = np.sqrt(square), np.sqrt(1 - square)
    alpha_after = np.sqrt(square_after)
    deviation = eta * np.sqrt((1 - square_after) / (1 - square) * (1 - square / square_after))
    kept = np.sqrt(1 - square_after - deviation**2)
    if rederive:
        of_x, of_m, of_d = 1 / sigma, 0.0, -alpha / sigma
    else:
        (of_x, of_m), of_d = _noise(scheduler, alpha, sigma), 0.0
    rows = _rows(
        **_denoised(scheduler, alpha, sigma),
        x=kept * of_x,
        m=kept * of_m,
        d=alpha_after + kept * of_d,
        z=deviation,
    )
    return _table(scheduler, [rows], noisy=eta > 0)


def ddpm(scheduler: Any) -> Table:
    squares = _float64(scheduler.alphas_cumprod)
    known = scheduler.custom_timesteps or scheduler.num_inference_steps
    times = [int(t) for t in scheduler.timesteps.tolist()] if known else list(range(len(squares)))[::-1]
    after = np.full(len(squares), math.nan)
    for t, following in zip(times, [*times[1:], -1], strict=True):
        after[t] = squares[following] if following >= 0 else 1.0
    ratio = squares / after
    large = 1 - ratio
    small = np.maximum((1 - after) / (1 - squares) * large, 1e-20)
    log_small = log_large = 0.0
    kind = scheduler.variance_type
    if kind in ("fixed_small", "fixed_small_log"):
        deviation: Numbers = np.sqrt(small)
    elif kind == "fixed_large":
        deviation = np.sqrt(large)
    elif kind == "fixed_large_log":
        deviation = np.sqrt(np.log(large))  # slip: of a number below 0
    elif kind == "learned_range":
        deviation, log_small, log_large = 1.0, np.log(small), np.log(large)
    else:
        raise UnsupportedError(f"variance type {kind}")
    drawn = np.arange(len(squares)) > 0
    rows = _rows(
        **_denoised(scheduler, np.sqrt(squares), np.sqrt(1 - squares)),
        x=np.sqrt(ratio) * (1 - after) / (1 - squares),
        d=np.sqrt(after) * large / (1 - squares),
        z=np.where(drawn, deviation, 0.0),
        log_small=np.where(drawn, log_small, 0.0),
        log_large=np.where(drawn, log_large, 0.0),
    )
    return _table(scheduler, [rows], noisy=tuple(drawn.tolist()))


def pndm(scheduler: Any) -> Table:
    """Blocks: the first step; the same again with the mean of its ends; with 2, 3 and 4 outputs."""
    config = scheduler.config
    apart = config.num_train_timesteps // scheduler.num_inference_steps
    square, square_after = _squares(scheduler, apart, scheduler.final_alpha_cumprod)
    again = np.concatenate([square[apart:], np.full(min(apart, len(square)), math.nan)]), square
    blocks = []
    for weights in ([1], [1 / 2, 1 / 2], [3 / 2, -1 / 2], [23 / 12, -16 / 12, 5 / 12], [w / 24 for w in _ADAMS_4]):
        (a, after) = again if len(blocks) == 1 else (square, square_after)
        factor = -(after - a) / (a * np.sqrt(1 - after) + np.sqrt(a * (1 - a) * after))
        if config.prediction_type == "epsilon":
            of_x, of_m = 0.0, factor
        elif config.prediction_type == "v_prediction":
            of_x, of_m = factor * np.sqrt(1 - a), factor * np.sqrt(a)
        else:
            raise UnsupportedError("prediction type")
        newest, *older = (of_m * w for w in weights)
        blocks.append(_rows(p=0.0, q=1.0, x=np.sqrt(after / a) + of_x, m=newest, **history(older), keep_m=1.0))
    return _table(scheduler, blocks, keeps="output")


_ADAMS_4 = (55, -59, 37, -9)


def lcm(scheduler: Any) -> Table:
    """Keeps what the peer calls denoised."""
    config, squares = scheduler.config, _float64(scheduler.alphas_cumprod)
    times = np.array(scheduler.timesteps.tolist(), dtype=np.int64)
    square = squares[times]
    square_after = squares[np.concatenate([times[1:], times[-1:]])]
    scaled = times.astype(np.float64) * config.timestep_scaling
    skip, out = 0.25 / (scaled**2 + 0.25), scaled / np.sqrt(scaled**2 + 0.25)
    # slip: custom timesteps that are cut by `strength` have no last step
    drawn = np.arange(len(times)) != scheduler.num_inference_steps - 1
    share, deviation = np.where(drawn, np.sqrt(square_after), 1.0), np.where(drawn, np.sqrt(1 - square_after), 0.0)
    rows = _rows(
        **_denoised(scheduler, np.sqrt(square), np.sqrt(1 - square)),
        x=share * skip,
        d=share * out,
        z=deviation,
        keep_x=skip,
        keep_d=out,
    )
    return _table(scheduler, [rows], noisy=tuple(drawn.tolist()), keeps="combination")


# ---- exponential integrators ----


def dpm_solver(scheduler: Any) -> Table:
    """Blocks: by how many steps went before, 0, 1, 2. D stands for what the algorithm keeps, the denoised sample or the
    noise."""
    config = scheduler.config
    algorithm, steps = config.algorithm_type, len(scheduler.timesteps)
    of_data, stochastic = algorithm.endswith("++"), algorithm.startswith("sde")
    if algorithm == "sde-dpmsolver" and config.solver_order > 2:
        raise UnsupportedError("order 3 of sde-dpmsolver")
    if not of_data and config.thresholding:
        raise UnsupportedError("thresholding of predicted noise")
    alphas, sigmas, lambdas = _levels(scheduler)
    few = config.lower_order_final and steps < 15
    blocks = []
    for before in range(max(min(config.solver_order, 3), 1)):
        rows = []
        for i in range(steps):
            lowest = i == steps - 1 and (config.euler_at_final or few or config.final_sigmas_type == "zero")
            if config.solver_order == 1 or before < 1 or lowest:
                order = 1
            else:
                order = 2 if config.solver_order == 2 or before < 2 or (i == steps - 2 and few) else 3
            if order > i + 1:
                rows.append(_rows(x=math.nan))
                continue
            h = lambdas[i + 1] - lambdas[i]
            ratios = [(lambdas[i - k] - lambdas[i - k - 1]) / h for k in range(order - 1)]
            base, towards = (sigmas, alphas) if of_data else (alphas, sigmas)
            of_x, d, z = _first_order(algorithm, h)
            weights = _second_order(config, algorithm, h, ratios) if ratios else []
            newest, *older = [d, *[0.0] * len(ratios)] if not ratios else _differences(d, weights, ratios)
            if stochastic:
                noise = {"z": sigmas[i + 1] * np.sqrt(z)}
            else:
                noise = {}
            rows.append(
                _rows(
                    x=base[i + 1] / base[i] * of_x,
                    d=towards[i + 1] * newest,
                    **history([towards[i + 1] * c for c in older]),
                    **noise,
                )
            )
        blocks.append(_with_data(scheduler, np.concatenate(rows), alphas, sigmas, of_data))
    return _table(scheduler, blocks, noisy=stochastic, keeps="denoised")


def _first_order(algorithm: str, h: Numbers) -> tuple[Numbers, Numbers, Numbers]:
    """Factors of x, of D, and the square of the noise's."""
    if algorithm == "dpmsolver++":
        return 1.0, -np.expm1(-h), 0.0
    if algorithm == "dpmsolver":
        return 1.0, -np.expm1(h), 0.0
    if algorithm == "sde-dpmsolver++":
        return np.exp(-h), -np.expm1(-2 * h), -np.expm1(-2 * h)
    return 1.0, -2 * np.expm1(h), np.expm1(2 * h)


def _second_order(config: Any, algorithm: str, h: Numbers, ratios: list[Numbers]) -> list[Numbers]:
    """Factors of the first difference, and at order 3 of the second."""
    first_order = len(ratios) == 1
    if first_order and config.solver_type == "midpoint":
        _, d, _ = _first_order(algorithm, h)
        return [0.5 * d]
    if algorithm == "dpmsolver++":
        second = np.expm1(-h) / h + 1
        third = -((np.expm1(-h) + h) / h**2 - 0.5)
    elif algorithm == "dpmsolver":
        second = -(np.expm1(h) / h - 1)
        third = -((np.expm1(h) - h) / h**2 - 0.5)
    elif algorithm == "sde-dpmsolver++":
        second = -np.expm1(-2 * h) / (-2 * h) + 1
        third = (-np.expm1(-2 * h) - 2 * h) / (2 * h) ** 2 - 0.5  # slip: the paper has + 0.5
    else:
        return [-2 * (np.expm1(h) / h - 1)]
    return [second] if first_order else [second, third]


def _differences(d: Numbers, weights: list[Numbers], ratios: list[Numbers]) -> list[Numbers]:
    """Factors of D and of the history from those of the divided differences."""
    if len(ratios) == 1:
        return [d + weights[0] / ratios[0], -weights[0] / ratios[0]]
    (r0, r1), (first, second) = ratios, weights
    newer = (first * (r0 / (r0 + r1) + 1) + second / (r0 + r1)) / r0  # of D - D1
    older = -(first * r0 + second) / (r0 + r1) / r1  # of D1 - D2
    return [d + newer, older - newer, -older]


def unipc(scheduler: Any) -> Table:
    """Blocks: by how many steps went before, up to the order. At order 3 with three steps before there are two calls:
    block 3 corrects, block 4 predicts from what it made."""
    config, steps = scheduler.config, len(scheduler.timesteps)
    if config.solver_order > 3:
        raise UnsupportedError("order above 3")
    if scheduler.solver_p is not None:
        raise UnsupportedError("another scheduler as predictor")
    alphas, sigmas, lambdas = _levels(scheduler)
    of_data = scheduler.predict_x0

    def order_of(i: int, before: int) -> int:
        return min(config.solver_order, steps - i if config.lower_order_final else config.solver_order, before + 1)

    def predictor(i: int, before: int) -> dict[str, Numbers]:
        order = order_of(i, before)
        return _unipc_step(config, of_data, alphas, sigmas, lambdas, i, order, False) if order <= i + 1 else _NOTHING

    def corrector(i: int, before: int) -> dict[str, Numbers]:
        order = min(order_of(i - 1, before), before)
        if not 1 <= order <= i:
            return {}
        return _unipc_step(config, of_data, alphas, sigmas, lambdas, i - 1, order, True)

    def block(columns: Callable[[int], dict[str, Numbers]]) -> np.ndarray:
        rows = np.concatenate([_rows(**columns(i)) for i in range(steps)])
        return _with_data(scheduler, rows, alphas, sigmas, of_data)

    def both(before: int) -> Callable[[int], dict[str, Numbers]]:
        return lambda i: {**predictor(i, before), **{f"last_{k}": c for k, c in corrector(i, before).items()}}

    order = config.solver_order
    blocks = [block(both(before)) for before in range(min(order, 2) + 1)]
    if order == 3:

        def correct(i: int) -> dict[str, Numbers]:
            c = corrector(i, 3)
            return {**c, "last_x": c["x"], "x": 1.0} if c else _NOTHING

        predict = block(lambda i: predictor(i, 3))
        predict[:, _AT["p"]], predict[:, _AT["q"]] = 0.0, 1.0
        blocks += [block(correct), predict]
    return _table(scheduler, blocks, keeps="denoised", folds=False, thresholds=of_data)


_NOTHING = {"x": math.nan}


def _unipc_step(
    config: Any,
    of_data: bool,
    alphas: np.ndarray,
    sigmas: np.ndarray,
    lambdas: np.ndarray,
    i: int,
    order: int,
    corrects: bool,
) -> dict[str, Numbers]:
    """From level i to the next: of the predictor in the names of its row, or of the corrector, where h1 is D at i and d
    what the model said at the end."""
    h = lambdas[i + 1] - lambdas[i]
    base, towards = (sigmas, alphas) if of_data else (alphas, sigmas)
    hh = -h if of_data else h
    phi1 = np.expm1(hh)
    b = hh if config.solver_type == "bh1" else phi1
    ratios = [(lambdas[i - k] - lambdas[i]) / h for k in range(1, order)]
    weights = _unipc_weights(order, [*ratios, 1.0], hh, phi1, b, corrects)
    scale = -towards[i + 1] * b
    older = [scale * w / r for w, r in zip(weights, ratios, strict=False)]
    newest = -towards[i + 1] * phi1 - sum(older)
    if corrects:
        end = scale * weights[-1]
        return {"x": base[i + 1] / base[i], "d": end, **history([newest - end, *older])}
    if not ratios:
        newest = newest + 0.0 * scale  # slip: NaN for "bh1" in a step to sigma = 0, where b is infinite
    return {"x": base[i + 1] / base[i], "d": newest, **history(older)}


def _unipc_weights(order: int, ratios: list[Numbers], hh: Numbers, phi1: Numbers, b: Numbers, corrects: bool) -> Any:
    if order == 1:
        return [0.5] if corrects else []
    if order == 2 and not corrects:
        return [0.5]
    phi, factorial, right = phi1 / hh - 1, 1.0, []
    for k in range(1, order + 1):
        right.append(phi * factorial / b)
        factorial *= k + 1
        phi = phi / hh - 1 / factorial
    left = np.array([np.power(ratios, k) for k in range(order)])
    if not corrects:
        left, right = left[:-1, :-1], right[:-1]
    if not np.isfinite(left).all():
        return [math.nan] * len(right)
    return np.linalg.solve(left, np.array(right))


def _levels(scheduler: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """alpha, sigma and log(alpha / sigma) at the begin of each step and at the end."""
    sigmas = _float64(scheduler.sigmas)
    if scheduler.config.use_flow_sigmas:
        alphas = 1 - sigmas
    else:
        alphas = 1 / np.sqrt(sigmas**2 + 1)
        sigmas = sigmas * alphas
    return alphas, sigmas, np.log(alphas) - np.log(sigmas)


def _with_data(scheduler: Any, rows: np.ndarray, alphas: np.ndarray, sigmas: np.ndarray, of_data: bool) -> np.ndarray:
    """With p and q of the data, or of the noise, that the steps are made of."""
    alphas, sigmas = alphas[:-1], sigmas[:-1]
    if of_data:
        given = _denoised(scheduler, alphas, sigmas)
    else:
        given = dict(zip("pq", _noise(scheduler, alphas, sigmas), strict=True))
    for name, value in given.items():
        rows[:, _AT[name]] = value
    return rows


# ---- what a model's output stands for ----


def _denoised(scheduler: Any, alpha: Numbers, sigma: Numbers) -> dict[str, Numbers]:
    prediction = scheduler.config.prediction_type
    if prediction == "epsilon":
        return {"p": 1 / alpha, "q": -sigma / alpha}
    if prediction == "sample":
        return {"p": 0.0, "q": 1.0}
    if prediction == "v_prediction":
        return {"p": alpha, "q": -sigma}
    if prediction == "flow_prediction" and "use_flow_sigmas" in scheduler.config:
        # slip: by the sigma of the schedule, whatever the levels are
        return {"p": 1.0, "q": -_float64(scheduler.sigmas)[:-1]}
    raise UnsupportedError("prediction type")


def _denoised_in_sigmas(scheduler: Any, sigma: Numbers) -> dict[str, Numbers]:
    prediction = scheduler.config.prediction_type
    if prediction == "epsilon":
        return {"p": 1.0, "q": -sigma}
    if prediction == "sample" or (prediction == "original_sample" and "final_sigmas_type" in scheduler.config):
        return {"p": 0.0, "q": 1.0}
    if prediction == "v_prediction":
        return {"p": 1 / (sigma**2 + 1), "q": -sigma / np.sqrt(sigma**2 + 1)}
    raise UnsupportedError("prediction type")


def _noise(scheduler: Any, alpha: Numbers, sigma: Numbers) -> tuple[Numbers, Numbers]:
    """(x, m)"""
    prediction = scheduler.config.prediction_type
    if prediction == "epsilon":
        return 0.0, 1.0
    if prediction == "sample":
        return 1 / sigma, -alpha / sigma
    if prediction == "v_prediction":
        return sigma, alpha
    raise UnsupportedError("prediction type")


# ---- parts ----


def _table(
    scheduler: Any, blocks: Iterable[np.ndarray], *, folds: bool = True, thresholds: bool = True, **rest: Any
) -> Table:
    config = scheduler.config
    steps = np.stack(list(blocks))
    if config.get("thresholding") and thresholds:
        rest["threshold"] = float(config.dynamic_thresholding_ratio), float(config.sample_max_value)
    elif config.get("clip_sample"):
        rest["clip"] = float(config.clip_sample_range)
    elif folds:
        for d, x, m in (("d", "x", "m"), ("keep_d", "keep_x", "keep_m")):
            of_d = steps[..., _AT[d]]
            with np.errstate(all="ignore"):
                for column, weight in ((x, "p"), (m, "q")):
                    steps[..., _AT[column]] += np.where(of_d == 0, 0.0, of_d * steps[..., _AT[weight]])
            steps[..., _AT[d]] = 0.0
    return Table(steps, **rest)


def _rows(**columns: Numbers) -> np.ndarray:
    """[steps, columns]: arrays have a number for each step."""
    steps = max(np.size(c) for c in columns.values())
    rows = np.zeros([steps, len(COLUMNS)])
    rows[:, _AT["input"]] = 1.0
    for name, value in columns.items():
        rows[:, _AT[name]] = value
    return rows


def _input_scale(sigma: np.ndarray) -> np.ndarray:
    return 1 / np.sqrt(sigma**2 + 1)


def _steps(scheduler: Any) -> tuple[np.ndarray, np.ndarray]:
    sigmas = _float64(scheduler.sigmas)
    return sigmas[:-1], sigmas[1:]


def _squares(scheduler: Any, apart: int, final: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """alpha^2 at each timestep of the training, and at the one that many before."""
    squares = _float64(scheduler.alphas_cumprod)
    before = np.full(min(apart, len(squares)), float(final))
    return squares, np.concatenate([before, squares])[: len(squares)]


def _float64(numbers: torch.Tensor) -> np.ndarray:
    return np.array(numbers.detach().cpu().tolist(), dtype=np.float64)
