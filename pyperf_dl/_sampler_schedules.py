"""The levels of noise that samplers walk, and what the model is told at each, in float64."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
import numbers
import operator
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from . import _checks
from .reference.sampler import Level

SPACES = ("variance_preserving", "sigma", "flow")
BETAS = ("linear", "scaled_linear", "cosine")
SPACINGS = ("leading", "trailing", "linspace")
SIGMAS = ("karras", "exponential", "beta")
TINY_PRODUCT = 2.0**-24  # of a zero terminal SNR in sigmas, which have to be finite; as in diffusers


@dataclasses.dataclass(frozen=True)
class NoiseSchedule:
    """The levels of noise that a sampler walks: what a schedule of n steps says, and nothing about the sampler.

    A sample at a level is x = alpha x0 + sigma noise. Built by one of the class methods, or from its parts.

    Args:
        levels: (alpha, sigma) of each step's begin, and where the last one ends: n + 1, with sigma / alpha descending;
            the last step may stay where it is.
        timesteps: what the model is told at each of the n steps.
        space: "variance_preserving": alpha^2 + sigma^2 = 1; "sigma": alpha = 1, as in EDM and k-diffusion; "flow":
            alpha = 1 - sigma, rectified flows.
        initial_scale: sampling begins with x = initial_scale * noise; None: the first sigma in "sigma", else 1.
        sigma_data: of a model in "sigma", which sees x / sqrt(sigma^2 + sigma_data^2).
        timestep_of: what the model is told at a sigma / alpha ("flow": at a sigma); samplers that ask the model between
            the levels, or where the last one ends, need it.

    Raises ValueError or TypeError where these do not fit.

    Example:
        >>> schedule = pyperf_dl.NoiseSchedule.from_betas(4, timesteps=[999, 759, 499, 259])
        >>> len(schedule), schedule.timesteps, schedule.levels[-1]
        (4, (999, 759, 499, 259), Level(alpha=1.0, sigma=0.0))
        >>> [round(sigma, 3) for _, sigma in pyperf_dl.NoiseSchedule.flow(4, shift=3.0).levels]
        [1.0, 0.9, 0.75, 0.5, 0.0]
    """

    levels: tuple[Level, ...]
    timesteps: tuple[float, ...]
    space: str
    initial_scale: float | None = None
    sigma_data: float = 1.0
    timestep_of: Callable[[float], float] | None = dataclasses.field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        op = "NoiseSchedule"
        _checks.choice(op, "space", self.space, SPACES)
        levels = tuple(Level(*(_checks.number(op, "levels", v, 0.0) for v in level)) for level in self.levels)
        timesteps = as_timesteps(op, self.timesteps)
        _checks.number(op, "sigma_data", self.sigma_data, 0.0)
        if len(levels) != len(timesteps) + 1 or not timesteps:
            raise ValueError(
                f"{op}: levels must be one more than timesteps, which are 1 or more, got {len(levels)} levels and "
                f"{len(timesteps)} timesteps"
            )
        for alpha, sigma in levels:
            size = math.hypot(alpha, sigma) if self.space == "variance_preserving" else alpha
            wanted = 1 - sigma if self.space == "flow" else 1.0
            if not (math.isfinite(sigma) and abs(size - wanted) < 1e-6):
                raise ValueError(f"{op}: levels must be those of space {self.space!r}, got ({alpha}, {sigma})")
        ratios = [-level.log_ratio for level in levels]
        for i, (now, after) in enumerate(itertools.pairwise(ratios)):
            if not (now > after or (now == after > -math.inf and i == len(timesteps) - 1)):
                raise ValueError(
                    f"{op}: sigma / alpha must descend, got {levels[i]} before {levels[i + 1]} at step {i}"
                )
        scale = self.initial_scale
        if scale is None:
            scale = levels[0].sigma if self.space == "sigma" else 1.0
        object.__setattr__(self, "levels", levels)
        object.__setattr__(self, "timesteps", timesteps)
        object.__setattr__(self, "initial_scale", _checks.number(op, "initial_scale", scale, 0.0))

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def input_scales(self) -> tuple[float, ...]:
        """What the model's input is multiplied by at each step."""
        return tuple(self.input_scale(level.sigma) for level in self.levels[:-1])

    def input_scale(self, sigma: float) -> float:
        """1 / sqrt(sigma^2 + sigma_data^2) in "sigma", else 1."""
        return 1 / math.hypot(sigma, self.sigma_data) if self.space == "sigma" else 1.0

    @classmethod
    def from_betas(
        cls,
        steps: int,
        betas: str | Sequence[float] = "scaled_linear",
        *,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        train_steps: int = 1000,
        zero_terminal_snr: bool = False,
        space: str = "variance_preserving",
        spacing: str = "leading",
        steps_offset: int = 0,
        timesteps: Sequence[float] | None = None,
        sigmas: str | None = None,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        rho: float = 7.0,
        final_sigma: float | None = 0.0,
    ) -> NoiseSchedule:
        """Of a model that was trained on discrete steps with variances betas (Ho et al.: DDPM, 2020): with abar the
        product of 1 - beta, alpha = sqrt(abar), sigma = sqrt(1 - abar), or in "sigma" sigma = sqrt((1 - abar) / abar).

        Args:
            steps: how many.
            betas: "linear" (Ho et al.), "scaled_linear" (linear in the root: latent diffusion), "cosine" (Nichol and
                Dhariwal: Improved DDPM, 2021, with beta <= 0.999), or the numbers themselves.
            beta_start, beta_end: of the linear ones.
            train_steps: how many betas.
            zero_terminal_snr: rescale sqrt(abar) linearly so that the last is 0 (Lin et al.: Common diffusion noise
                schedules and sample steps are flawed, 2023); in "sigma" and with sigmas it ends at abar = 2^-24.
            space: "variance_preserving" or "sigma".
            spacing: of timesteps, as in Lin et al.: "leading" multiples of train_steps // steps, plus steps_offset;
                "trailing" from the last one down; "linspace" with both ends, rounded but in "sigma", where sigmas are
                interpolated between training steps, as diffusers does.
            timesteps: instead of a spacing; latent consistency models have such.
            sigmas: instead of a spacing, sigma / alpha in a range: "karras", "exponential", "beta", see
                from_sigma_range. Timesteps are interpolated in log sigma.
            sigma_min, sigma_max: of that range; None: that of training.
            rho: of "karras".
            final_sigma: sigma / alpha where the last step ends; None: the lowest of training.
        """
        op = "NoiseSchedule.from_betas"
        steps = _checks.integer(op, "steps", steps, 1)
        _checks.choice(op, "space", space, SPACES[:2])
        finite = space == "sigma" or sigmas is not None
        terminal = TINY_PRODUCT if finite else 0.0
        if not _checks.flag(op, "zero_terminal_snr", zero_terminal_snr):
            terminal = None
        trained = training_sigmas(op, betas, beta_start, beta_end, train_steps, terminal)
        if sigmas is not None:
            low = trained[0] if sigma_min is None else sigma_min
            high = trained[-1] if sigma_max is None else sigma_max
            ratios = in_range(op, sigmas, steps, low, high, rho)
            timesteps = [log_interpolated(trained, s) for s in ratios]
        else:
            if timesteps is None:
                timesteps = spaced(op, steps, spacing, len(trained), steps_offset, rounded=space != "sigma")
            if len(timesteps) != steps:
                raise ValueError(f"{op}: timesteps must be {steps}, the steps, got {len(timesteps)}")
            for t in timesteps:
                _checks.number(op, "timesteps", t, 0, len(trained) - 1)
            ratios = [interpolated(trained, t) for t in timesteps]
        last = trained[0] if final_sigma is None else _checks.number(op, "final_sigma", final_sigma, 0.0)
        schedule = cls.from_sigmas([*ratios, last], space=space, timesteps=timesteps)
        return dataclasses.replace(schedule, timestep_of=partial(log_interpolated, trained))

    @classmethod
    def from_sigma_range(
        cls,
        steps: int,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        *,
        sigmas: str = "karras",
        rho: float = 7.0,
        sigma_data: float = 0.5,
        final_sigma: float = 0.0,
    ) -> NoiseSchedule:
        """Sigmas from sigma_max to sigma_min, of a model that is told ln(sigma) / 4 and sees
        x / sqrt(sigma^2 + sigma_data^2) (Karras et al.: Elucidating the design space of diffusion-based generative
        models, 2022, table 1).

        sigmas: with u from 0 to 1, "karras": (max^(1/rho) + u (min^(1/rho) - max^(1/rho)))^rho (their eq. 5);
        "exponential": even in the logarithm; "beta": min + (max - min) q(1 - u), q the quantiles of Beta(0.6, 0.6) (Lee
        et al.: Beta sampling is all you need, 2024; needs scipy). final_sigma: where the last step ends.
        """
        op = "NoiseSchedule.from_sigma_range"
        steps = _checks.integer(op, "steps", steps, 1)
        last = _checks.number(op, "final_sigma", final_sigma, 0.0)
        return cls.from_sigmas([*in_range(op, sigmas, steps, sigma_min, sigma_max, rho), last], sigma_data=sigma_data)

    @classmethod
    def from_sigmas(
        cls,
        sigmas: Sequence[float] | torch.Tensor,
        *,
        space: str = "sigma",
        timesteps: Sequence[float] | None = None,
        sigma_data: float = 1.0,
        train_steps: int = 1000,
    ) -> NoiseSchedule:
        """Any sigmas that descend, the last where the last step ends, mostly 0. In "variance_preserving" they are
        sigma / alpha, and timesteps are needed. None: ln(sigma) / 4 in "sigma" (Karras et al., 2022), train_steps sigma
        in "flow"."""
        op = "NoiseSchedule.from_sigmas"
        _checks.choice(op, "space", space, SPACES)
        values = sigmas.tolist() if isinstance(sigmas, torch.Tensor) else sigmas
        sigmas = [_checks.number(op, "sigmas", s, 0.0) for s in values]
        if len(sigmas) < 2:
            raise ValueError(f"{op}: sigmas must be 2 or more, that of each step and the last one, got {sigmas!r}")
        if space == "flow":
            for s in sigmas:
                _checks.number(op, "sigmas", s, 0.0, 1.0)
        told = {"sigma": quarter_log, "flow": partial(operator.mul, float(train_steps))}.get(space)
        if timesteps is None:
            if told is None:
                raise ValueError(f"{op}: timesteps must be given in space 'variance_preserving', got None")
            if 0.0 in sigmas[:-1]:
                raise ValueError(f"{op}: sigmas must descend, and only the last be 0, got {sigmas!r}")
            timesteps = [told(s) for s in sigmas[:-1]]
        else:
            told = None
        return cls(_levels(sigmas, space), tuple(timesteps), space, sigma_data=sigma_data, timestep_of=told)

    @classmethod
    def flow(
        cls,
        steps: int,
        *,
        sigma_max: float = 1.0,
        sigma_min: float | None = None,
        shift: float = 1.0,
        mu: float | None = None,
        mu_kind: str = "exponential",
        shift_terminal: float | None = None,
        sigmas: str | None = None,
        rho: float = 7.0,
        train_steps: int = 1000,
    ) -> NoiseSchedule:
        """Of a rectified flow (Liu et al.: Flow straight and fast, 2022), x = (1 - sigma) x0 + sigma noise: sigmas even
        from sigma_max to sigma_min (None: sigma_max / steps), shifted, then 0; the model is told train_steps sigma.

        Args:
            steps: how many.
            sigma_max, sigma_min: before they are shifted.
            shift: s sigma / (1 + (s - 1) sigma) (Esser et al.: Scaling rectified flow transformers, 2024).
            mu: in place of `shift`, one that depends on the size of the image: m / (m + 1 / sigma - 1), m = exp(mu) or,
                with mu_kind "linear", mu itself.
            shift_terminal: stretch 1 - sigma so that the last but 0 is this.
            sigmas: replace all between the ends by "karras", "exponential" or "beta", see from_sigma_range.
            rho: of "karras".
            train_steps: times at sigma = 1.
        """
        op = "NoiseSchedule.flow"
        steps = _checks.integer(op, "steps", steps, 1)
        high = _checks.number(op, "sigma_max", sigma_max, 0.0, 1.0)
        low = high / steps if sigma_min is None else _checks.number(op, "sigma_min", sigma_min, 0.0, high)
        factor = _checks.number(op, "shift", shift, 0.0)
        _checks.choice(op, "mu_kind", mu_kind, ("exponential", "linear"))
        if mu is not None:
            mu = _checks.number(op, "mu", mu)
            factor = math.exp(mu) if mu_kind == "exponential" else _checks.number(op, "mu", mu, 0.0)
        even = [high + u * (low - high) for u in _ramp(steps)]
        if factor == 0 or even[-1] == 0:
            raise ValueError(f"{op}: the shift and sigma_min must be positive, got {factor} and {even[-1]}")
        shifted = [shift_sigma(s, factor) for s in even]
        if shift_terminal is not None:
            terminal = _checks.number(op, "shift_terminal", shift_terminal, 0.0, 1.0)
            if shifted[-1] == 1 or terminal == 1:
                raise ValueError(f"{op}: shift_terminal must be below 1, with 2 steps or more, got {shift_terminal!r}")
            stretch = (1 - terminal) / (1 - shifted[-1])
            shifted = [1 - (1 - s) * stretch for s in shifted]
        if sigmas is not None:
            shifted = in_range(op, sigmas, steps, shifted[-1], shifted[0], rho)
        return cls.from_sigmas([*shifted, 0.0], space="flow", train_steps=train_steps)

    @classmethod
    def from_diffusers(cls, scheduler: Any, steps: int, *, mu: float | None = None) -> NoiseSchedule:
        """What a scheduler of diffusers makes of its configuration in set_timesteps(steps), in float64.

        Steps end where the next begins. A few schedulers of diffusers do otherwise: DDIM and PNDM end at
        t - num_train_timesteps // steps, which is another timestep where the spacing is "linspace" or the division has
        a remainder; PNDM asks for the second timestep twice, Heun for all but the first, as StepTable.heun does.

        Args:
            scheduler: a scheduler, or a configuration that has "_class_name" (diffusers fills in what it leaves out).
            steps: as in set_timesteps.
            mu: likewise, for dynamic shifting.

        Raises:
            ValueError: a scheduler or an option that is not known.
        """
        op = "NoiseSchedule.from_diffusers"
        steps = _checks.integer(op, "steps", steps, 1)
        if isinstance(scheduler, Mapping):
            import diffusers

            peer = getattr(diffusers, str(scheduler.get("_class_name")), None)
            if peer is None:
                raise ValueError(
                    f"{op}: a configuration must have the name of a scheduler as _class_name, "
                    f"got {scheduler.get('_class_name')!r}"
                )
            scheduler = peer.from_config(scheduler)
        if not isinstance(getattr(scheduler, "config", None), Mapping):
            raise TypeError(f"{op}: scheduler must be a scheduler of diffusers or its configuration, got {scheduler!r}")
        from ._sampler_diffusers import PEERS

        for known in type(scheduler).__mro__:
            if known.__name__ in PEERS:
                return PEERS[known.__name__](op, scheduler.config, steps, mu)
        raise ValueError(f"{op}: scheduler must be one of {', '.join(PEERS)}, got {type(scheduler).__name__}")


# ---- levels and timesteps ----


def as_timesteps(op: str, timesteps: Sequence[float] | torch.Tensor) -> tuple[float, ...]:
    """Integers stay what they are: models look them up."""
    values = timesteps.tolist() if isinstance(timesteps, torch.Tensor) else timesteps
    checked = [_checks.number(op, "timesteps", t) for t in values]
    return tuple(int(n) if isinstance(t, numbers.Integral) else n for n, t in zip(checked, values, strict=True))


def _levels(ratios: Sequence[float], space: str) -> tuple[Level, ...]:
    """Of sigma / alpha, or of sigma in a flow."""
    if space == "sigma":
        return tuple(Level(1.0, s) for s in ratios)
    if space == "flow":
        return tuple(Level(1 - s, s) for s in ratios)
    return tuple(
        Level(0.0, 1.0) if math.isinf(s) else Level(1 / math.hypot(1, s), s / math.hypot(1, s)) for s in ratios
    )


def _ramp(count: int) -> list[float]:
    """From 0 to 1."""
    return [i / (count - 1) for i in range(count)] if count > 1 else [0.0]


def training_sigmas(
    op: str, betas: str | Sequence[float], start: float, end: float, count: int, terminal: float | None = None
) -> list[float]:
    """sigma / alpha of each training step. terminal: rescale to no signal at the end, and have this abar there."""
    if isinstance(betas, str):
        _checks.choice(op, "betas", betas, BETAS)
        count = _checks.integer(op, "train_steps", count, 2)
        start, end = _checks.number(op, "beta_start", start, 0.0, 1.0), _checks.number(op, "beta_end", end, 0.0, 1.0)
        if betas == "linear":
            betas = [start + u * (end - start) for u in _ramp(count)]
        elif betas == "scaled_linear":
            betas = [(math.sqrt(start) + u * (math.sqrt(end) - math.sqrt(start))) ** 2 for u in _ramp(count)]
        else:
            left = [math.cos((i / count + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(count + 1)]
            betas = [min(1 - after / now, 0.999) for now, after in itertools.pairwise(left)]
    betas = [_checks.number(op, "betas", float(b), 0.0, 1.0) for b in betas]
    if len(betas) < 2 or 0.0 in betas or 1.0 in betas[:-1]:
        raise ValueError(f"{op}: betas must be 2 or more numbers between 0 and 1, got {len(betas)} in all")
    products = list(itertools.accumulate((1 - b for b in betas), operator.mul))
    if terminal is not None:  # algorithm 1 of Lin et al.
        first, last = math.sqrt(products[0]), math.sqrt(products[-1])
        products = [((math.sqrt(a) - last) * first / (first - last)) ** 2 for a in products[:-1]] + [terminal]
    return [math.sqrt((1 - a) / a) if a else math.inf for a in products]


def spaced(
    op: str,
    steps: int,
    spacing: str,
    count: int,
    offset: int,
    *,
    rounded: bool = True,
    top: int | None = None,
    without_last: bool = False,
) -> list[float]:
    """Timesteps that descend. top: of how many training steps, the others being too noisy. without_last: the multistep
    solvers of diffusers space one step more, and leave out the last."""
    _checks.choice(op, "spacing", spacing, SPACINGS)
    offset = _checks.integer(op, "steps_offset", offset)
    top, all_steps = count if top is None else top, steps + without_last
    if steps > count:
        raise ValueError(f"{op}: steps must be at most those of training, {count}, got {steps}")
    if spacing == "linspace":
        apart = (top - 1) / max(all_steps - 1, 1)
        even = [i * apart for i in range(all_steps - 1, -1, -1)][:steps]
        return [round(t) for t in even] if rounded else even
    if spacing == "leading":
        apart = top // all_steps
        return [i * apart + offset for i in range(all_steps - 1, -1, -1)][:steps]
    return [round(top - i * (count / steps)) - 1 for i in range(steps)]


def in_range(op: str, kind: str, count: int, low: float, high: float, rho: float = 7.0) -> list[float]:
    """From high down to low."""
    _checks.choice(op, "sigmas", kind, SIGMAS)
    low, high = _checks.number(op, "sigma_min", low, 0.0), _checks.number(op, "sigma_max", high, 0.0)
    if not 0 < low < high < math.inf:
        raise ValueError(f"{op}: sigma_min must be positive and less than sigma_max, got {low} and {high}")
    ramp = _ramp(count)
    if kind == "karras":
        rho = _checks.number(op, "rho", rho)
        if not 0 < rho < math.inf:
            raise ValueError(f"{op}: rho must be positive, got {rho}")
        return [(high ** (1 / rho) + u * (low ** (1 / rho) - high ** (1 / rho))) ** rho for u in ramp]
    if kind == "exponential":
        return [math.exp(math.log(high) + u * (math.log(low) - math.log(high))) for u in ramp]
    try:
        from scipy.special import betaincinv
    except ImportError as error:
        raise ImportError(f"{op}: sigmas='beta' needs scipy, which is not installed") from error
    return [low + (high - low) * float(betaincinv(0.6, 0.6, 1 - u)) for u in ramp]


def shift_sigma(sigma: float, factor: float) -> float:
    return factor * sigma / (1 + (factor - 1) * sigma)


def interpolated(values: Sequence[float], t: float) -> float:
    at = min(int(t), len(values) - 2)
    share = t - at
    ends = ((1 - share, values[at]), (share, values[at + 1]))
    return sum(weight * value for weight, value in ends if weight)  # the last value may be infinite


def log_interpolated(trained: Sequence[float], sigma: float) -> float:
    """The training step of a sigma, between those at the ends."""
    at = min(max(bisect.bisect_right(trained, sigma) - 1, 0), len(trained) - 2)
    share = math.log(trained[at] / max(sigma, 1e-10)) / math.log(trained[at] / trained[at + 1])
    return at + min(max(share, 0.0), 1.0)


def quarter_log(sigma: float) -> float:
    return math.log(sigma) / 4
