"""Tables of coefficients as the operators take them: a sampler over a noise schedule."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from . import _checks
from . import _sampler_table as table
from ._sampler_schedules import SPACES, NoiseSchedule, as_timesteps
from ._sampler_table import Row
from .reference.sampler import Level


class RowPlan(NamedTuple):
    """What a row does; of rows in a tensor, what any of them does."""

    noisy: bool
    reads: int  # how many kept tensors
    corrects: bool
    keeps_denoised: bool
    combines: bool  # keeps a combination
    depth: int  # how many kept tensors a later row may read
    correcting: bool  # whether any row corrects


class StepTable:
    """A sampler over a schedule: for each call of the model the coefficients of one linear form, in float64.

    With m the model's output, h1, h2, h3 what the last steps kept, the newest first, and z standard normal noise:

        D  = clip(p x + q m)                                               the denoised sample
        x' = x_ x + m_ m + d_ D + h1_ h1 + h2_ h2 + h3_ h3 + z_ z          the next sample
        h  = keep_x x + keep_m m + keep_d D                                what this step keeps

    A corrector (UniPC) first replaces x by last_x last + last_d D + last_h1 h1 + last_h2 h2, last being the x that the
    step before went from. Not to be changed but by update_.

    Args:
        rows: of each call of the model p, q, x_, m_, d_, h1_, h2_, h3_, z_, keep_x, keep_m, keep_d, last_x, last_d,
            last_h1, last_h2, log_small, log_large; the two last ones are logarithms of the ends of a learned range of
            variances, 0 without one, and z_ is 1 with it, or 0.
        timesteps: what the model is told at each row.
        input_scales: what its input is multiplied by; None: 1.
        initial_scale: sampling begins with x = initial_scale * noise.
        first_noise: times more noise that x gets before the first row (churn).

    Attributes:
        coefficients: float64 [rows, 19]: those of `rows`, then what the input of the next call is multiplied by.
        rows: how many.
        timesteps: int64 or float64 [rows].
        history: how many kept tensors each row reads.
        keeps: "nothing", "denoised" (what is kept is D itself), or "combination".
        keeping: whether each row keeps something that a later one may read.
        corrects: whether each row corrects x first.
        noisy: whether each row adds noise.
        learned_variance: the model's output has a range of variances in a second half of its channels.
        initial_scale, first_noise: as given.
        first_input_scale: what the input of the first call is multiplied by.

    Raises ValueError or TypeError where rows are not finite, read what is not there, or do not fit the others.

    Example:
        >>> schedule = pyperf_dl.NoiseSchedule.from_betas(20, spacing="trailing")
        >>> pyperf_dl.StepTable.dpm_solver_pp(schedule, "v", eta=1.0)
        StepTable(20 rows, history 1, keeps denoised, noisy, on cpu)
    """

    coefficients: torch.Tensor
    rows: int
    timesteps: torch.Tensor
    history: tuple[int, ...]
    keeps: str
    keeping: tuple[bool, ...]
    corrects: tuple[bool, ...]
    noisy: tuple[bool, ...]
    learned_variance: bool
    initial_scale: float
    first_noise: float
    first_input_scale: float

    def __init__(
        self,
        rows: Sequence[Sequence[float]],
        timesteps: Sequence[float],
        *,
        input_scales: Sequence[float] | None = None,
        initial_scale: float = 1.0,
        first_noise: float = 0.0,
    ) -> None:
        op = "StepTable"
        timesteps = as_timesteps(op, timesteps)
        for i, row in enumerate(rows):
            if len(row) != len(Row._fields):
                raise ValueError(f"{op}: rows must have {len(Row._fields)} numbers each, got {len(row)} in row {i}")
        rows = [
            Row(*(_checks.number(op, f"rows, {n} of row {i},", v) for n, v in zip(Row._fields, row, strict=True)))
            for i, row in enumerate(rows)
        ]
        scales = (
            [1.0] * len(rows)
            if input_scales is None
            else [_checks.number(op, "input_scales", scale, 0.0) for scale in input_scales]
        )
        if not rows or not len(rows) == len(timesteps) == len(scales):
            raise ValueError(
                f"{op}: rows must be 1 or more, with a timestep and an input scale each, got {len(rows)} rows, "
                f"{len(timesteps)} timesteps and {len(scales)} input scales"
            )
        coefficients = torch.tensor(
            [[*row, scale] for row, scale in zip(rows, [*scales[1:], 1.0], strict=True)], dtype=torch.float64
        )
        if not coefficients.isfinite().all():
            raise ValueError(f"{op}: rows and input_scales must be finite, got {coefficients.tolist()}")
        history = tuple(
            max(k * bool(c) for k, c in ((1, r.h1), (2, r.h2), (3, r.h3), (1, r.last_h1), (2, r.last_h2))) for r in rows
        )
        corrects = tuple(any((r.last_x, r.last_d, r.last_h1, r.last_h2)) for r in rows)
        for i, read in enumerate(history):
            if read > i or (corrects[i] and i == 0):
                raise ValueError(f"{op}: rows must read what rows before them kept, got {rows[i]} as row {i}")
        kept = {(r.keep_x, r.keep_m, r.keep_d) for r in rows}
        integers = all(isinstance(t, int) for t in timesteps)
        self.__dict__.update(
            coefficients=coefficients,
            rows=len(rows),
            timesteps=torch.tensor(timesteps, dtype=torch.int64 if integers else torch.float64),
            history=history,
            keeps="nothing" if not any(history) else "denoised" if kept == {(0, 0, 1)} else "combination",
            keeping=tuple(any((r.keep_x, r.keep_m, r.keep_d)) and any(history[i + 1 :]) for i, r in enumerate(rows)),
            corrects=corrects,
            noisy=tuple(r.z != 0 for r in rows),
            learned_variance=any(r.log_small or r.log_large for r in rows),
            initial_scale=_checks.number(op, "initial_scale", initial_scale, 0.0),
            first_noise=_checks.number(op, "first_noise", first_noise, 0.0),
            first_input_scale=scales[0],
            _on_devices={coefficients.device: self},
        )
        self.__dict__.update(plans=tuple(map(self._plan, range(len(rows)))), plan_of_any=self._plan(None))

    def _plan(self, row: int | None) -> RowPlan:
        def of(values: Sequence[Any]) -> Any:
            return max(values) if row is None else values[row]

        keeps = of(self.keeping)
        return RowPlan(
            of(self.noisy),
            of(self.history),
            of(self.corrects),
            keeps and self.keeps == "denoised",
            keeps and self.keeps == "combination",
            max(self.history),
            any(self.corrects),
        )

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"StepTable: {name} is not to be assigned; update_ changes a table")

    def __len__(self) -> int:
        return self.rows

    def __repr__(self) -> str:
        words = [f"{self.rows} rows", f"history {max(self.history)}", f"keeps {self.keeps}"]
        words += ["corrects"] * any(self.corrects) + ["noisy"] * any(self.noisy)
        words += ["learned variance"] * self.learned_variance
        return f"StepTable({', '.join(words)}, on {self.coefficients.device})"

    def to(self, device: torch.device | str) -> StepTable:
        """The same table on a device, made once for each; update_ changes all of them."""
        device = torch.empty(0, device=device).device  # "cuda" gets an index
        if device not in self._on_devices:
            moved = copy.copy(self)
            moved.__dict__.update(coefficients=self.coefficients.to(device), timesteps=self.timesteps.to(device))
            self._on_devices[device] = moved
        return self._on_devices[device]

    def update_(self, other: StepTable) -> StepTable:
        """Take the numbers of another table in place, on every device, so that captured loops follow.

        The other has as many rows, and needs no more of what a captured loop does: it may add noise to fewer rows and
        read less history. Raises ValueError otherwise.
        """
        op = "StepTable.update_"
        if not isinstance(other, StepTable):
            raise TypeError(f"{op}: other must be a StepTable, got {_checks.described(other)}")
        fits = {
            "rows": self.rows == other.rows,
            "timesteps' dtype": self.timesteps.dtype == other.timesteps.dtype,
            "history": all(b <= a for a, b in zip(self.history, other.history, strict=False)),
            "keeps": other.keeps in (self.keeps, "nothing"),
            "corrects": self.corrects == other.corrects,
            "noisy": all(b <= a for a, b in zip(self.noisy, other.noisy, strict=False)),
            "learned_variance": self.learned_variance == other.learned_variance,
            "first_noise": bool(self.first_noise) >= bool(other.first_noise),
        }
        if wrong := [name for name, fit in fits.items() if not fit]:
            raise ValueError(f"{op}: other must fit this table, {self!r}, in {', '.join(wrong)}, got {other!r}")
        for each in self._on_devices.values():
            each.coefficients.copy_(other.coefficients)
            each.timesteps.copy_(other.timesteps)
            for name in ("initial_scale", "first_noise", "first_input_scale"):
                each.__dict__[name] = getattr(other, name)
        return self

    @classmethod
    def joined(cls, *tables: StepTable) -> StepTable:
        """The rows of several tables after each other, for a batch whose samples are at steps of different samplers:
        row i of the second table is row ``len(first) + i``. initial_scale and first_noise are those of the first."""
        op = "StepTable.joined"
        if not tables or not all(isinstance(t, StepTable) for t in tables):
            names = ", ".join(type(t).__name__ for t in tables)
            raise TypeError(f"{op}: tables must be one StepTable or more, got ({names})")
        coefficients = torch.cat([t.to("cpu").coefficients for t in tables])
        times = [time for t in tables for time in t.timesteps.tolist()]
        first = tables[0]
        made = cls(
            coefficients[:, :-1].tolist(),
            times,
            initial_scale=first.initial_scale,
            first_noise=first.first_noise,
        )
        made.coefficients.copy_(coefficients)
        made.__dict__["first_input_scale"] = first.first_input_scale
        return made

    # ---- samplers of a variance-preserving process ----

    @classmethod
    def ddim(
        cls, schedule: NoiseSchedule, prediction: str | None = None, *, eta: float = 0.0, rederive: bool = False
    ) -> StepTable:
        """DDIM (Song et al.: Denoising diffusion implicit models, 2020, eq. 12). eta: 0 deterministic, 1 as noisy as
        DDPM. rederive: the predicted noise is that which makes x of the clipped D, not the model's own."""
        op = "StepTable.ddim"
        prediction = _of(op, schedule, prediction, ("variance_preserving",))
        eta = _checks.number(op, "eta", eta, 0.0, 1.0)
        return _over(schedule, table.ddim(schedule.levels, prediction, eta, _checks.flag(op, "rederive", rederive)))

    @classmethod
    def ddpm(cls, schedule: NoiseSchedule, prediction: str | None = None, *, variance: str = "small") -> StepTable:
        """DDPM (Ho et al.: Denoising diffusion probabilistic models, 2020, eq. 7), with no noise in the last step.
        variance: "small" (of the posterior), "large" (of the forward process), or "learned_range" (Nichol and Dhariwal:
        Improved DDPM, 2021, eq. 15: the model's second half of channels says where between both)."""
        op = "StepTable.ddpm"
        prediction = _of(op, schedule, prediction, ("variance_preserving",))
        _checks.choice(op, "variance", variance, ("small", "large", "learned_range"))
        return _over(schedule, table.ddpm(schedule.levels, prediction, variance))

    @classmethod
    def plms(cls, schedule: NoiseSchedule, prediction: str | None = None) -> StepTable:
        """Pseudo linear multistep (Liu et al.: Pseudo numerical methods for diffusion models on manifolds, 2022, eq. 11
        and 12), of order 4 from the fourth step on and lower before, so that the model is called once a step."""
        op = "StepTable.plms"
        prediction = _of(op, schedule, prediction, ("variance_preserving",))
        _needs_signal(op, schedule, "PLMS")
        return _over(schedule, table.plms(schedule.levels, prediction))

    @classmethod
    def lcm(
        cls,
        schedule: NoiseSchedule,
        prediction: str | None = None,
        *,
        timestep_scaling: float = 10.0,
        sigma_data: float = 0.5,
    ) -> StepTable:
        """Latent consistency models (Luo et al., 2023): to the end at once, c_skip x + c_out D, then noise of the next
        level. With s = timestep_scaling * t: c_skip = sigma_data^2 / (s^2 + sigma_data^2), c_out = s / sqrt(s^2 +
        sigma_data^2)."""
        op = "StepTable.lcm"
        prediction = _of(op, schedule, prediction, ("variance_preserving",))
        times = [_checks.number(op, "timestep_scaling", timestep_scaling, 0.0) * t for t in schedule.timesteps]
        data = _checks.number(op, "sigma_data", sigma_data, 1e-8)
        scalings = [((data / math.hypot(s, data)) ** 2, s / math.hypot(s, data)) for s in times]
        return _over(schedule, table.latent_consistency(schedule.levels, scalings, prediction))

    # ---- samplers in sigmas; those that follow dx = (x - D) / sigma dsigma do so in rectified flows too ----

    @classmethod
    def euler(cls, schedule: NoiseSchedule, prediction: str | None = None) -> StepTable:
        """Euler's method, x' = x + (sigma' - sigma) (x - D) / sigma (Karras et al.: Elucidating the design space of
        diffusion-based generative models, 2022, eq. 4). prediction "edm": the network behind their preconditioning."""
        weights = _of("StepTable.euler", schedule, prediction, ("sigma", "flow"))
        return _over(schedule, table.euler(schedule.levels, weights))

    @classmethod
    def edm_churn(
        cls,
        schedule: NoiseSchedule,
        prediction: str | None = None,
        *,
        s_churn: float = 40.0,
        s_tmin: float = 0.0,
        s_tmax: float = math.inf,
        s_noise: float = 1.0,
    ) -> StepTable:
        """Euler's method after a little noise (Karras et al., 2022, algorithm 2, as k-diffusion's sample_euler): from a
        sigma in [s_tmin, s_tmax] up to (1 + min(s_churn / steps, sqrt(2) - 1)) sigma, then down. Each row adds what the
        step after it begins with, so that its x' is what the model sees; x gets that of the first row, `first_noise`
        times normal noise, before."""
        op = "StepTable.edm_churn"
        weights = _of(op, schedule, prediction, ("sigma",))
        limits = [
            _checks.number(op, name, value, 0.0)
            for name, value in (("s_churn", s_churn), ("s_tmin", s_tmin), ("s_tmax", s_tmax))
        ]
        s_noise = _checks.number(op, "s_noise", s_noise, 0.0)
        raised = table.raised_levels(schedule.levels, *limits)
        return cls(
            table.churn(schedule.levels, raised, weights, s_noise),
            [_timestep(op, schedule, i, level) for i, level in enumerate(raised[:-1])],
            input_scales=[schedule.input_scale(sigma) for _, sigma in raised[:-1]],
            initial_scale=schedule.initial_scale,
            first_noise=table.churn_deviation(schedule.levels[0], raised[0], s_noise),
        )

    @classmethod
    def euler_ancestral(
        cls, schedule: NoiseSchedule, prediction: str | None = None, *, eta: float = 1.0, s_noise: float = 1.0
    ) -> StepTable:
        """DDPM in sigmas, as k-diffusion's sample_euler_ancestral: a step of Euler to sigma_down, then noise sigma_up
        with sigma_down^2 + sigma_up^2 = sigma'^2, sigma_up = eta sigma' sqrt(1 - sigma'^2 / sigma^2)."""
        op = "StepTable.euler_ancestral"
        weights = _of(op, schedule, prediction, ("sigma",))
        return _over(schedule, table.euler_ancestral(schedule.levels, weights, *_noise(op, eta, s_noise)))

    @classmethod
    def heun(cls, schedule: NoiseSchedule, prediction: str | None = None) -> StepTable:
        """Heun's method (Karras et al., 2022, algorithm 1): two rows a step, a step of Euler and then the mean of the
        slopes at both its ends; one row where a step ends at sigma = 0."""
        op = "StepTable.heun"
        weights = _of(op, schedule, prediction, ("sigma", "flow"))
        levels = schedule.levels
        # which level each row is at
        at = [k for i in range(len(schedule)) for k in (i, i + 1) if k == i or levels[k].sigma > 0]
        return cls(
            table.heun(levels, weights),
            [_timestep(op, schedule, i, levels[i]) for i in at],
            input_scales=[schedule.input_scale(levels[i].sigma) for i in at],
            initial_scale=schedule.initial_scale,
        )

    @classmethod
    def lms(cls, schedule: NoiseSchedule, prediction: str | None = None, *, order: int = 4) -> StepTable:
        """Linear multistep of k-diffusion, an Adams-Bashforth method on uneven steps: the polynomial in sigma through
        the last slopes (x - D) / sigma, `order` of them, 1 to 4, integrated."""
        op = "StepTable.lms"
        weights = _of(op, schedule, prediction, ("sigma", "flow"))
        return _over(schedule, table.lms(schedule.levels, weights, _order(op, order, 4)))

    @classmethod
    def consistency(cls, schedule: NoiseSchedule, *, sigma_min: float = 0.002, s_noise: float = 1.0) -> StepTable:
        """Multistep consistency sampling (Song et al.: Consistency models, 2023, algorithm 1): to the end at once, D =
        c_skip x + c_out m with c_skip = sigma_data^2 / ((sigma - sigma_min)^2 + sigma_data^2) and c_out = (sigma -
        sigma_min) sigma_data / sqrt(sigma^2 + sigma_data^2), then noise sqrt(sigma'^2 - sigma_min^2). sigma_data is the
        schedule's."""
        op = "StepTable.consistency"
        _of(op, schedule, "x0", ("sigma",))
        sigma_min = _checks.number(op, "sigma_min", sigma_min, 0.0)
        s_noise = _checks.number(op, "s_noise", s_noise, 0.0)
        return _over(schedule, table.consistency(schedule.levels, sigma_min, schedule.sigma_data, s_noise))

    # ---- exponential integrators: any process ----

    @classmethod
    def dpm_solver_pp(
        cls,
        schedule: NoiseSchedule,
        prediction: str | None = None,
        *,
        order: int = 2,
        solver_type: str = "midpoint",
        eta: float = 0.0,
        s_noise: float = 1.0,
        lower_order_final: bool = True,
    ) -> StepTable:
        """Multistep DPM-Solver++ (Lu et al.: DPM-Solver++, 2022, algorithm 2 and section 4).

        order: 1 to 3; the first steps, and one to sigma = 0, have a lower one, and with lower_order_final the last two.
        solver_type: "midpoint" or "heun", of order 2. eta: of its SDE, 1 in the paper and k-diffusion's default.
        s_noise: times its noise.
        """
        op = "StepTable.dpm_solver_pp"
        weights = _of(op, schedule, prediction)
        order = _order(op, order, 3)
        _checks.choice(op, "solver_type", solver_type, ("midpoint", "heun"))
        _checks.flag(op, "lower_order_final", lower_order_final)
        how = (order, solver_type, *_noise(op, eta, s_noise), lower_order_final)
        return _over(schedule, table.dpm_solver_pp(schedule.levels, weights, *how))

    @classmethod
    def unipc(
        cls,
        schedule: NoiseSchedule,
        prediction: str | None = None,
        *,
        solver_type: str = "bh2",
        lower_order_final: bool = True,
    ) -> StepTable:
        """UniPC of order 2 with data prediction (Zhao et al.: UniPC, 2023, appendix A): the corrector of a step and the
        predictor of the next in one row. solver_type: B(h) = h ("bh1") or exp(h) - 1 ("bh2")."""
        op = "StepTable.unipc"
        weights = _of(op, schedule, prediction)
        if _checks.choice(op, "solver_type", solver_type, ("bh1", "bh2")) == "bh1":
            _needs_signal(op, schedule, "solver_type='bh1'")
        _checks.flag(op, "lower_order_final", lower_order_final)
        return _over(schedule, table.unipc(schedule.levels, weights, solver_type, lower_order_final))

    # ---- rectified flows ----

    @classmethod
    def flow_euler(cls, schedule: NoiseSchedule, prediction: str | None = None) -> StepTable:
        """Euler's method on a velocity m (Liu et al.: Flow straight and fast, 2022): x' = x + (sigma' - sigma) m, which
        a clip of D does not touch; `euler` goes through D, and takes other predictions."""
        op = "StepTable.flow_euler"
        if _of(op, schedule, prediction, ("flow",)) != "flow":
            raise ValueError(f"{op}: prediction must be 'flow', a velocity, got {prediction!r}; euler takes others")
        return _over(schedule, table.flow_euler(schedule.levels))

    @classmethod
    def flow_stochastic(cls, schedule: NoiseSchedule, prediction: str | None = None) -> StepTable:
        """To the end at once, then noise of the next level: x' = (1 - sigma') D + sigma' z, as diffusers'
        FlowMatchEulerDiscreteScheduler with stochastic_sampling."""
        prediction = _of("StepTable.flow_stochastic", schedule, prediction, ("flow",))
        return _over(schedule, table.flow_stochastic(schedule.levels, prediction))

    @classmethod
    def flow_ancestral(
        cls, schedule: NoiseSchedule, prediction: str | None = None, *, eta: float = 1.0, s_noise: float = 1.0
    ) -> StepTable:
        """euler_ancestral for rectified flows, as diffusers' LTXEulerAncestralRFScheduler: a step to sigma_down =
        sigma' (1 + eta (sigma' / sigma - 1)), scaled by (1 - sigma') / (1 - sigma_down), then noise up to sigma'."""
        op = "StepTable.flow_ancestral"
        prediction = _of(op, schedule, prediction, ("flow",))
        return _over(schedule, table.flow_ancestral(schedule.levels, prediction, *_noise(op, eta, s_noise)))

    @classmethod
    def flow_sde(cls, schedule: NoiseSchedule, *, noise_level: float = 0.7) -> StepTable:
        """The SDE of Flow-GRPO (Liu et al., 2025, eq. 9), whose steps have a log-probability. With h = sigma' - sigma,
        s = noise_level sqrt(sigma / (1 - sigma)): x' = x + (m + s^2 / (2 sigma) (x + (1 - sigma) m)) h + s sqrt(-h) z.
        At sigma = 1 the 1 - sigma of s is that of the next level, as in their code."""
        op = "StepTable.flow_sde"
        _of(op, schedule, "flow", ("flow",))
        level = _checks.number(op, "noise_level", noise_level, 0.0)
        if schedule.levels[0].alpha == 0 and len(schedule) == 1:
            raise ValueError(f"{op}: schedule must have 2 steps or more where it begins at sigma = 1, got 1")
        return _over(schedule, table.flow_sde(schedule.levels, level))


def _over(schedule: NoiseSchedule, rows: Sequence[Row]) -> StepTable:
    """One row a step."""
    return StepTable(rows, schedule.timesteps, input_scales=schedule.input_scales, initial_scale=schedule.initial_scale)


def _of(op: str, schedule: NoiseSchedule, prediction: str | None, spaces: Sequence[str] = SPACES) -> Any:
    """The prediction as rows take it, where it and the schedule serve a sampler. None: a velocity in flows, else the
    noise."""
    if not isinstance(schedule, NoiseSchedule):
        raise TypeError(f"{op}: schedule must be a NoiseSchedule, got {_checks.described(schedule)}")
    if schedule.space not in spaces:
        names = " or ".join(map(repr, spaces))
        raise ValueError(f"{op}: schedule must be in space {names}, got one in {schedule.space!r}")
    if prediction is None:
        prediction = "flow" if schedule.space == "flow" else "epsilon"
    known = {"variance_preserving": ("v",), "sigma": ("v", "edm"), "flow": ("flow",)}[schedule.space]
    _checks.choice(op, "prediction", prediction, ("epsilon", "x0", *known))
    if prediction == "epsilon":
        _needs_signal(op, schedule, "prediction 'epsilon'")
    return partial(table.edm_weights, sigma_data=schedule.sigma_data) if prediction == "edm" else prediction


def _needs_signal(op: str, schedule: NoiseSchedule, what: str) -> None:
    if schedule.levels[0].alpha == 0:
        raise ValueError(f"{op}: schedule must begin with some signal for {what}, got {schedule.levels[0]}")


def _noise(op: str, eta: float, s_noise: float) -> tuple[float, float]:
    return _checks.number(op, "eta", eta, 0.0), _checks.number(op, "s_noise", s_noise, 0.0)


def _order(op: str, order: int, most: int) -> int:
    if _checks.integer(op, "order", order, 1) > most:
        raise ValueError(f"{op}: order must be at most {most}, got {order}")
    return order


def _timestep(op: str, schedule: NoiseSchedule, i: int, level: Level) -> float:
    """What the model is told at a level; of step i, or not."""
    if i < len(schedule) and level == schedule.levels[i]:
        return schedule.timesteps[i]
    if schedule.timestep_of is None:
        raise ValueError(f"{op}: schedule must have timestep_of, to say what the model is told at {level}")
    return schedule.timestep_of(level.sigma)
