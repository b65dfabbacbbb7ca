"""One step of each diffusion sampler, as its paper writes it: one function a sampler, in PyTorch operators,
differentiable, in the precision of its tensors.

Nothing here goes through a table of coefficients, so that tables can be tested against it. x is the sample, `d` the
denoised sample that a model's output stands for, `noise` standard normal. Levels are those of the step's begin (`now`)
and end (`after`).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

PREDICTIONS = ("epsilon", "x0", "v", "flow")


class Level(NamedTuple):
    """What a sample is at a time: x = alpha x0 + sigma noise. Variance preserving: alpha^2 + sigma^2 = 1; with sigmas
    alone, as in EDM and k-diffusion: alpha = 1; rectified flows: alpha = 1 - sigma."""

    alpha: float
    sigma: float

    @property
    def log_ratio(self) -> float:
        """lambda = log(alpha / sigma)."""
        if self.sigma == 0:
            return math.inf
        return math.log(self.alpha / self.sigma) if self.alpha else -math.inf


# ---- what a model's output stands for ----


def denoised(x: torch.Tensor, output: torch.Tensor, now: Level, prediction: str) -> torch.Tensor:
    """x0 as predicted: through the noise (epsilon), itself (x0), v = alpha noise - sigma x0 of the sample at unit
    variance (Salimans and Ho, 2022), or the velocity noise - x0 (Liu et al.: rectified flow, 2022)."""
    alpha, sigma = now
    if prediction == "epsilon":
        return (x - sigma * output) / alpha
    if prediction == "x0":
        return output
    if prediction == "flow":
        return x - sigma * output
    size = math.hypot(alpha, sigma)
    return (alpha / size) * (x / size) - (sigma / size) * output


def noise_in(x: torch.Tensor, d: torch.Tensor, now: Level) -> torch.Tensor:
    """The noise that makes x of the denoised sample."""
    return (x - now.alpha * d) / now.sigma


# ---- variance-preserving samplers ----


def ddim(
    x: torch.Tensor,
    d: torch.Tensor,
    epsilon: torch.Tensor,
    now: Level,
    after: Level,
    eta: float = 0.0,
    noise: torch.Tensor | None = None,
) -> torch.Tensor:
    """Song, Meng, Ermon: Denoising diffusion implicit models (2020), eq. 12. epsilon: the noise that was predicted, or
    noise_in(x, d), where d was clipped."""
    s = eta * ddim_deviation(now, after)
    mean = after.alpha * d + math.sqrt(max(after.sigma**2 - s**2, 0.0)) * epsilon
    return mean if noise is None else mean + s * noise


def ddim_deviation(now: Level, after: Level) -> float:
    """Of the noise that eta = 1 adds: that of DDPM."""
    return after.sigma / now.sigma * math.sqrt(max(1 - (now.alpha / after.alpha) ** 2, 0.0))


def ddpm_variances(now: Level, after: Level) -> tuple[float, float]:
    """The variance of the posterior, and that of the forward process; Ho et al. found both to work."""
    forward = 1 - (now.alpha / after.alpha) ** 2
    return forward * (after.sigma / now.sigma) ** 2, forward


def ddpm(
    x: torch.Tensor,
    d: torch.Tensor,
    now: Level,
    after: Level,
    deviation: float | torch.Tensor,
    noise: torch.Tensor | None = None,
) -> torch.Tensor:
    """Ho, Jain, Abbeel: Denoising diffusion probabilistic models (2020), eq. 7."""
    ratio = now.alpha / after.alpha
    mean = after.alpha * (1 - ratio**2) / now.sigma**2 * d + ratio * (after.sigma / now.sigma) ** 2 * x
    return mean if noise is None else mean + deviation * noise


def learned_deviation(v: torch.Tensor, now: Level, after: Level) -> torch.Tensor:
    """Nichol and Dhariwal: Improved denoising diffusion probabilistic models (2021), eq. 15; v in [-1, 1]."""
    share = (v + 1) / 2
    posterior, forward = ddpm_variances(now, after)
    return torch.exp(0.5 * (share * math.log(forward) + (1 - share) * math.log(posterior)))


def plms(x: torch.Tensor, epsilons: Sequence[torch.Tensor], now: Level, after: Level) -> torch.Tensor:
    """Liu, Ren, Lin, Zhao: Pseudo numerical methods for diffusion models on manifolds (2022), eq. 11 and 12; predicted
    noises, the newest first, of which four are used at most."""
    return transferred(x, extrapolated(epsilons), now, after)


def extrapolated(outputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """Adams-Bashforth on even steps: the newest first, of order 4 where there are as many."""
    weights = {1: [1.0], 2: [3 / 2, -1 / 2], 3: [23 / 12, -16 / 12, 5 / 12], 4: [55 / 24, -59 / 24, 37 / 24, -9 / 24]}
    used = list(outputs[:4])
    return sum((w * e for w, e in zip(weights[len(used)], used, strict=True)), torch.zeros_like(used[0]))


def transferred(x: torch.Tensor, epsilon: torch.Tensor, now: Level, after: Level) -> torch.Tensor:
    """The transfer part of plms, which is DDIM: its eq. 11."""
    (a, s), (a1, s1) = now, after
    return a1 / a * x - (a1**2 - a**2) / (a * (a * s1 + a1 * s)) * epsilon


def consistency(
    x: torch.Tensor, d: torch.Tensor, c_skip: float, c_out: float, after: Level, noise: torch.Tensor | None = None
) -> torch.Tensor:
    """Song, Dhariwal, Chen, Sutskever: Consistency models (2023), algorithm 1, and Luo et al.: Latent consistency
    models (2023): to the end at once, then noise of the next level; None: the last step has none."""
    end = c_out * d + c_skip * x
    return end if noise is None else after.alpha * end + after.sigma * noise


# ---- samplers in sigma-space: alpha = 1 ----


def euler(x: torch.Tensor, d: torch.Tensor, sigma: float, sigma_after: float) -> torch.Tensor:
    """Karras, Aittala, Aila, Laine: Elucidating the design space of diffusion-based generative models (2022), eq. 4:
    dx = (x - D) / sigma dsigma."""
    return x + (sigma_after - sigma) * slope(x, d, sigma)


def slope(x: torch.Tensor, d: torch.Tensor, sigma: float) -> torch.Tensor:
    return (x - d) / sigma


def churned(x: torch.Tensor, sigma: float, gamma: float, noise: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Karras et al. (2022), algorithm 2, lines 4 to 6: the sample with more noise, and its level; noise is times
    S_noise."""
    raised = sigma * (1 + gamma)
    return x + math.sqrt(raised**2 - sigma**2) * noise, raised


def heun(
    x: torch.Tensor, d: torch.Tensor, x1: torch.Tensor, d1: torch.Tensor, sigma: float, sigma_after: float
) -> torch.Tensor:
    """Karras et al. (2022), algorithm 1, lines 6 to 8; x1 is euler(x, d), d1 what the model makes of it."""
    return x + (sigma_after - sigma) * (slope(x, d, sigma) + slope(x1, d1, sigma_after)) / 2


def ancestral_levels(sigma: float, sigma_after: float, eta: float = 1.0) -> tuple[float, float]:
    """sigma_down, to which a deterministic step goes, and sigma_up, of the noise that brings it to sigma_after."""
    up = min(sigma_after, eta * math.sqrt(sigma_after**2 * (sigma**2 - sigma_after**2) / sigma**2))
    return math.sqrt(sigma_after**2 - up**2), up


def euler_ancestral(
    x: torch.Tensor,
    d: torch.Tensor,
    sigma: float,
    sigma_after: float,
    noise: torch.Tensor,
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> torch.Tensor:
    """k-diffusion's sample_euler_ancestral: DDPM in sigma-space."""
    down, up = ancestral_levels(sigma, sigma_after, eta)
    return euler(x, d, sigma, down) + up * s_noise * noise


def lms(x: torch.Tensor, slopes: Sequence[torch.Tensor], sigmas: Sequence[float], sigma_after: float) -> torch.Tensor:
    """Linear multistep of Katherine Crowson's k-diffusion (an Adams-Bashforth method on uneven steps): the polynomial
    through the slopes, integrated. slopes and their sigmas: the newest first."""
    from numpy.polynomial import Polynomial

    for j, of in enumerate(slopes):
        basis = Polynomial([1.0])
        for k, sigma in enumerate(sigmas[: len(slopes)]):
            if k != j:
                basis = basis * Polynomial([-sigma, 1.0]) / (sigmas[j] - sigma)
        integral = basis.integ()
        x = x + float(integral(sigma_after) - integral(sigmas[0])) * of
    return x


# ---- exponential integrators: any alpha ----


def dpm_solver_pp(x: torch.Tensor, d: torch.Tensor, now: Level, after: Level) -> torch.Tensor:
    """The first order of all of them, which is DDIM (Lu et al.: DPM-Solver++, 2022, eq. 11)."""
    h = after.log_ratio - now.log_ratio
    return after.sigma / now.sigma * x - after.alpha * math.expm1(-h) * d


def dpm_solver_pp_2m(
    x: torch.Tensor,
    d: torch.Tensor,
    d_before: torch.Tensor,
    before: Level,
    now: Level,
    after: Level,
    *,
    kind: str = "midpoint",
    eta: float = 0.0,
    noise: torch.Tensor | None = None,
) -> torch.Tensor:
    """Lu et al. (2022), algorithm 2, and with eta = 1 its SDE of section 4.2; kinds "midpoint" and "heun" treat the
    second order as those methods do. noise: times the paper's s_noise."""
    h = after.log_ratio - now.log_ratio
    r = (now.log_ratio - before.log_ratio) / h
    difference = (d - d_before) / r
    g = (1 + eta) * h
    second = -math.expm1(-g) / 2 if kind == "midpoint" else math.expm1(-g) / g + 1
    x = after.sigma / now.sigma * math.exp(-eta * h) * x
    x = x - after.alpha * math.expm1(-g) * d + after.alpha * second * difference
    return x if noise is None else x + after.sigma * math.sqrt(-math.expm1(-2 * eta * h)) * noise


def dpm_solver_pp_sde(
    x: torch.Tensor, d: torch.Tensor, now: Level, after: Level, noise: torch.Tensor, eta: float = 1.0
) -> torch.Tensor:
    """The first order with noise."""
    h = after.log_ratio - now.log_ratio
    g = (1 + eta) * h
    x = after.sigma / now.sigma * math.exp(-eta * h) * x - after.alpha * math.expm1(-g) * d
    return x + after.sigma * math.sqrt(-math.expm1(-2 * eta * h)) * noise


def dpm_solver_pp_3m(
    x: torch.Tensor,
    ds: Sequence[torch.Tensor],
    levels: Sequence[Level],
    after: Level,
    *,
    eta: float = 0.0,
    noise: torch.Tensor | None = None,
) -> torch.Tensor:
    """Lu et al. (2022), section 4.1 at third order, with the noise of k-diffusion's sample_dpmpp_3m_sde; three denoised
    samples and their levels, the newest first."""
    now = levels[0]
    h = after.log_ratio - now.log_ratio
    r0, r1 = ((levels[k].log_ratio - levels[k + 1].log_ratio) / h for k in (0, 1))
    newer, older = (ds[0] - ds[1]) / r0, (ds[1] - ds[2]) / r1
    first = newer + r0 / (r0 + r1) * (newer - older)
    second = (newer - older) / (r0 + r1)
    g = (1 + eta) * h
    phi2 = math.expm1(-g) / g + 1
    phi3 = phi2 / g - 0.5
    x = after.sigma / now.sigma * math.exp(-eta * h) * x - after.alpha * math.expm1(-g) * ds[0]
    x = x + after.alpha * (phi2 * first - phi3 * second)
    return x if noise is None else x + after.sigma * math.sqrt(-math.expm1(-2 * eta * h)) * noise


def unipc_predictor(
    x: torch.Tensor,
    ds: Sequence[torch.Tensor],
    levels: Sequence[Level],
    after: Level,
    b: str = "bh2",
) -> torch.Tensor:
    """Zhao, Bai, Rao, Zhou, Lu: UniPC (2023), UniP of order len(ds), 1 or 2, with the data prediction of appendix A;
    denoised samples and levels, the newest first. b: B(h) = h ("bh1") or exp(h) - 1 ("bh2")."""
    now = levels[0]
    h = after.log_ratio - now.log_ratio
    base = after.sigma / now.sigma * x - after.alpha * math.expm1(-h) * ds[0]
    if len(ds) == 1:
        return base
    r = (levels[1].log_ratio - now.log_ratio) / h
    return base - after.alpha * _b(-h, b) * 0.5 * (ds[1] - ds[0]) / r


def unipc_corrector(
    x: torch.Tensor,
    d: torch.Tensor,
    ds: Sequence[torch.Tensor],
    levels: Sequence[Level],
    now: Level,
    b: str = "bh2",
) -> torch.Tensor:
    """UniC of order len(ds), 1 or 2: the step from levels[0] to `now` again, with what the model said there, d. x: the
    sample at levels[0]; ds and levels: of the steps before, the newest first."""
    before = levels[0]
    h = now.log_ratio - before.log_ratio
    base = now.sigma / before.sigma * x - now.alpha * math.expm1(-h) * ds[0]
    if len(ds) == 1:
        return base - now.alpha * _b(-h, b) * 0.5 * (d - ds[0])
    r = (levels[1].log_ratio - before.log_ratio) / h
    # Weights that make the method exact for polynomials of degree 2: R(h) rho = phi(h) / B(h).
    phi2 = math.expm1(-h) / -h - 1
    phi3 = phi2 / -h - 0.5
    older, newer = phi2 - 2 * phi3, 2 * phi3 - r * phi2  # of older + newer = phi2, r older + newer = 2 phi3,
    weight = _b(-h, b) * (1 - r)  # times (1 - r)
    older, newer = older / weight, newer / weight
    return base - now.alpha * _b(-h, b) * (older * (ds[1] - ds[0]) / r + newer * (d - ds[0]))


def _b(h: float, kind: str) -> float:
    return h if kind == "bh1" else math.expm1(h)


# ---- rectified flows: alpha = 1 - sigma ----


def flow_euler(x: torch.Tensor, velocity: torch.Tensor, sigma: float, sigma_after: float) -> torch.Tensor:
    """Liu, Gong, Liu: Flow straight and fast (2022), eq. 1 with time running from noise to data."""
    return x + (sigma_after - sigma) * velocity


def flow_stochastic(d: torch.Tensor, sigma_after: float, noise: torch.Tensor) -> torch.Tensor:
    """To the end at once, then noise again."""
    return (1 - sigma_after) * d + sigma_after * noise


def flow_sde(
    x: torch.Tensor,
    velocity: torch.Tensor,
    sigma: float,
    sigma_after: float,
    deviation: float,
    noise: torch.Tensor,
) -> torch.Tensor:
    """Liu et al.: Flow-GRPO (2025), eq. 9."""
    step = sigma_after - sigma
    drift = velocity + deviation**2 / (2 * sigma) * (x + (1 - sigma) * velocity)
    return x + drift * step + deviation * math.sqrt(-step) * noise


def flow_ancestral(
    x: torch.Tensor,
    d: torch.Tensor,
    sigma: float,
    sigma_after: float,
    noise: torch.Tensor,
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> torch.Tensor:
    """euler_ancestral for a rectified flow: a step beyond sigma_after, scaled so that noise brings it there."""
    down = sigma_after * (1 + (sigma_after / sigma - 1) * eta)
    scale = (1 - sigma_after) / (1 - down)
    share = down / sigma
    deviation = math.sqrt(max(sigma_after**2 - (down * scale) ** 2, 0.0))
    return scale * (share * x + (1 - share) * d) + deviation * s_noise * noise


# ---- python -m pyperf_dl.check ----


def check_cases(device: str, quick: bool) -> Iterator[tuple[Any, ...]]:
    """(operator, case, dtype, run, expected, tolerance): single steps in the middle of a loop; expected is a step in
    float64 in plain PyTorch."""
    import pyperf_dl

    shapes = [(2, 3, 9)] if quick else [(2, 3, 9), (3, 4, 16, 16), (1, 5001)]
    for (name, table), shape, (dtype, tolerance) in itertools.product(_check_tables(), shapes, _TOLERANCE.items()):
        for guided in (False, True):
            case = f"{name}, {list(shape)}" + ", guidance" * guided
            run = functools.partial(_run_checked, table, shape, dtype, guided)
            expected = functools.partial(_expected, run)
            yield "sampler_step", case, dtype, functools.partial(run, device, dtype), expected, tolerance
    for shape, (dtype, tolerance) in itertools.product(shapes, _TOLERANCE.items()):
        how = {"key": torch.arange(shape[0]) - 1, "draw": 5}

        def noise(device: str, shape: Any = shape, dtype: torch.dtype = dtype, how: Any = how) -> Any:
            return (pyperf_dl.per_sample_noise(shape, how["key"].to(device), how["draw"], dtype=dtype),)

        def expected_noise(noise: Any = noise) -> Any:
            with pyperf_dl.backend("reference"):
                return noise("cpu")

        at_least = max(tolerance, 4e-6)
        yield "per_sample_noise", str(list(shape)), dtype, functools.partial(noise, device), expected_noise, at_least


_TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 0.03, torch.float16: 0.004, torch.float64: 1e-12}


def _check_tables() -> list[tuple[str, Any]]:
    from pyperf_dl import NoiseSchedule, StepTable

    discrete, flow = NoiseSchedule.from_betas(10, spacing="trailing"), NoiseSchedule.flow(10)
    sigmas = NoiseSchedule.from_betas(10, space="sigma", sigmas="karras")
    return [
        ("DDIM", StepTable.ddim(discrete)),
        ("DDPM", StepTable.ddpm(discrete)),
        ("DDPM, learned variance", StepTable.ddpm(discrete, variance="learned_range")),
        ("Euler", StepTable.euler(sigmas)),
        ("Heun", StepTable.heun(sigmas)),
        ("LMS", StepTable.lms(sigmas)),
        ("DPM-Solver++ 3M", StepTable.dpm_solver_pp(discrete, order=3)),
        ("UniPC", StepTable.unipc(discrete)),
        ("flow Euler", StepTable.flow_euler(flow)),
    ]


def _run_checked(
    table: Any, shape: tuple[int, ...], dtype: torch.dtype, guided: bool, device: str, within: torch.dtype
) -> tuple[torch.Tensor, ...]:
    """What a step makes, and gradients of the tensors that go in; `within`: the dtype that it is computed in."""
    import pyperf_dl

    g = torch.Generator().manual_seed(0)
    row = 5

    def made(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=g).to(dtype).to(device, within)

    wide = (shape[0], 2 * shape[1], *shape[2:]) if table.learned_variance else shape
    x, output, uncond, noise = made(shape), made(wide), made(shape), made(shape)
    history = tuple(made(shape) for _ in range(table.history[row] + table.corrects[row]))
    leaves = [t.requires_grad_() for t in (x, output, *history, *([uncond] if guided else []))]
    how = {"uncond": uncond, "guidance": 3.5} if guided else {}
    step = pyperf_dl.sampler_step(
        x, output, table, row, history=history, noise=noise, clip=2.0, model_inputs=1, denoised=True, **how
    )
    outputs = [step.sample, step.denoised, step.model_input, *step.history]
    outputs = [t for t in outputs if t.requires_grad]
    weights = [made(t.shape) for t in outputs]
    gradients = torch.autograd.grad(outputs, leaves, weights)
    if table.noisy[row]:
        target = made(shape)
        step = pyperf_dl.sampler_step(
            x, output, table, row, history=history, clip=2.0, log_prob=True, target=target, **how
        )
        mean = step.log_prob / target[0].numel()
        outputs.append(mean.to(within))
        gradients += torch.autograd.grad(mean.sum(), leaves)
    return tuple(t.detach() for t in (*outputs, *gradients))


def _expected(run: Callable[..., tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
    import pyperf_dl

    dtype = run.args[2]  # type: ignore[attr-defined]
    with pyperf_dl.backend("reference"):
        return tuple(t.to(dtype) for t in run("cpu", torch.float64))
