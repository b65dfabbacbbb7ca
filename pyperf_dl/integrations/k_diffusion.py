"""Samplers of k-diffusion, with each step one pass of pyperf_dl: under their names, and in k-diffusion itself.

    from pyperf_dl.integrations import k_diffusion

    x = k_diffusion.sample_dpmpp_2m(model, x, sigmas)   # needs no k-diffusion

    k_diffusion.enable()                                # k_diffusion.sampling's own functions, in the whole process
    with k_diffusion.enable():
        ...                                             # inside the block

Samples are those of k-diffusion 0.1.1 within its own error: it rounds after every operation and works with sigmas in
their dtype, here a step is computed in float64 (float32 for 16-bit samples) from coefficients in float64 and rounded
once. Noise is the same for the same state of the default generator, which ends where k-diffusion leaves it. Where
sigmas are on a device they are read once, when a loop begins, and nothing is read in it; k-diffusion reads some in
every step. Other differences:

- sigmas must descend;
- the SDE samplers' own noise is that of k-diffusion (torchsde's tree) only in a takeover; the functions here take
  `pyperf_dl.BrownianNoise` with a key that the default generator draws, which is as independent of the steps;
- a callback should not write into the tensors that it gets.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

import pyperf_dl

from .. import _checks
from .. import _sampler_table as table
from .._sampler_noise import generator_state
from .._sampler_step import DTYPES
from ..reference.sampler import Level
from . import _swap
from ._swap import HALVES, Declined, Report, Settings, Takeover

__all__ = [
    "Report",
    "disable",
    "enable",
    "report",
    "sample_dpmpp_2m",
    "sample_dpmpp_2m_sde",
    "sample_dpmpp_3m_sde",
    "sample_euler",
    "sample_euler_ancestral",
    "sample_heun",
    "sample_lms",
]

_peer = _swap.Peer("k_diffusion", "k-diffusion", "0.1.1", "0.1.1")
disable, report = _peer.disable, _peer.report
_SAMPLING = "k_diffusion.sampling"
_SDE = ("sample_dpmpp_2m_sde", "sample_dpmpp_3m_sde")


Numbers = tuple[float, ...]


class _Plan(NamedTuple):
    """A whole loop. A step has one row of the table, or two, whose model is called at its end."""

    table: pyperf_dl.StepTable
    rows: tuple[int, ...]  # of each step
    draws: tuple[bool, ...]  # whether the peer draws noise between a step and the next, used or not
    raised: tuple[float, ...] | None = None  # by what each step's sigma is multiplied; row 0 does so to the first x
    keeps: str = "outputs"  # what the history is made of: the model's outputs, what "rows" keep, "x and output"
    slopes: bool = False  # the peer divides by sigma as a tensor like x, which can make x wider
    ends_with_output: bool = False  # the last step returns the model's output itself


# ---- tables ----


def _table(rows: list[table.Row]) -> pyperf_dl.StepTable:
    return pyperf_dl.StepTable(rows, [0.0] * len(rows))  # the model is told sigma, by the loop


def _levels(sigmas: Numbers) -> list[Level]:
    return [Level(1.0, sigma) for sigma in sigmas]


def _churned(heun: bool, sigmas: Numbers, s_churn: float, s_tmin: float, s_tmax: float, s_noise: float) -> _Plan:
    levels = _levels(sigmas)
    raised = table.raised_levels(levels, s_churn, s_tmin, s_tmax)
    rows = [table.Row(0.0, 1.0, x=1.0, z=table.churn_deviation(levels[0], raised[0], s_noise))]
    counts = []
    for i, after in enumerate(levels[1:]):
        of_step = table.euler([raised[i], after], "x0")
        if heun and after.sigma > 0:
            of_step.append(_heun(raised[i].sigma, after.sigma))
        of_step[-1] = of_step[-1]._replace(z=table.churn_deviation(after, raised[i + 1], s_noise))
        rows += of_step
        counts.append(len(of_step))
    factor = 1 + min(s_churn / len(counts), 2**0.5 - 1)
    return _Plan(
        _table(rows),
        tuple(counts),
        (*[True] * (len(counts) - 1), False),
        raised=tuple(1.0 if up == level else factor for up, level in zip(raised[:-1], levels, strict=False)),
        keeps="x and output" if heun else "rows",
        slopes=True,
    )


def _heun(sigma: float, after: float) -> table.Row:
    """The second evaluation of a step, from x and D of the first, which are exact, unlike a sum of both."""
    half = (after - sigma) / 2
    return table.Row(0.0, 1.0, x=half / after, d=-half / after, h1=1 + half / sigma, h2=-half / sigma)


def _ancestral(sigmas: Numbers, eta: float, s_noise: float) -> _Plan:
    rows = table.euler_ancestral(_levels(sigmas), "x0", eta, s_noise)
    return _Plan(_table(rows), (1,) * len(rows), tuple(after > 0 for after in sigmas[1:]), slopes=True)


def _multistep(sigmas: Numbers, order: int, kind: str = "midpoint", eta: float = 0.0, s_noise: float = 1.0) -> _Plan:
    rows = table.dpm_solver_pp(_levels(sigmas), "x0", order, kind, eta, s_noise, lower_order_final=False)
    rows = [row._replace(keep_d=0.0) for row in rows]  # D is there already: the model's output
    return _Plan(_table(rows), (1,) * len(rows), tuple(eta > 0 and after > 0 for after in sigmas[1:]))


def _sde(sigmas: Numbers, order: int, *how: Any) -> _Plan:
    return _multistep(sigmas, order, *how)._replace(ends_with_output=sigmas[-1] == 0)


def _lms(sigmas: Numbers, order: int) -> _Plan:
    rows = table.lms(_levels(sigmas), "x0", order)
    return _Plan(_table(rows), (1,) * len(rows), (False,) * len(rows), keeps="rows", slopes=True)


_PLANS: dict[str, Callable[..., _Plan]] = {
    "sample_euler": functools.partial(_churned, False),
    "sample_euler_ancestral": _ancestral,
    "sample_heun": functools.partial(_churned, True),
    "sample_lms": _lms,
    "sample_dpmpp_2m": lambda sigmas: _multistep(sigmas, 2),
    "sample_dpmpp_2m_sde": lambda sigmas, eta, s_noise, solver_type: _sde(sigmas, 2, solver_type, eta, s_noise),
    "sample_dpmpp_3m_sde": lambda sigmas, eta, s_noise: _sde(sigmas, 3, "midpoint", eta, s_noise),
}


@functools.lru_cache(maxsize=64)
def _plan(name: str, sigmas: Numbers, *options: Any) -> _Plan:
    return _PLANS[name](sigmas, *options)


# ---- arguments ----


def _checked_sigmas(op: str, sigmas: Any) -> Numbers:
    """Their values, read from the device."""
    if not isinstance(sigmas, torch.Tensor):
        raise TypeError(f"{op}: sigmas must be a torch.Tensor, got {type(sigmas).__name__}")
    if sigmas.dim() != 1 or len(sigmas) < 2 or not sigmas.is_floating_point():
        raise ValueError(f"{op}: sigmas must be floats [n + 1] for n steps, 1 or more, got {_checks.described(sigmas)}")
    values = tuple(sigmas.tolist())
    if not values[0] < math.inf or not all(a > b for a, b in itertools.pairwise(values)) or values[-1] < 0:
        raise ValueError(f"{op}: sigmas must be finite, descend, and end at 0 or above, got {list(values)}")
    return values


def _checked_options(op: str, sigmas: torch.Tensor, options: dict[str, Any]) -> list[Any]:
    checked = []
    for name, value in options.items():
        if name == "solver_type":
            value = _checks.choice(op, name, value, ("midpoint", "heun"))
        elif name == "order":
            value = _checks.integer(op, name, value, 1)
            if value > 4:
                raise ValueError(f"{op}: order must be at most 4, got {value}")
        elif name in ("s_tmin", "s_tmax"):
            value = _checks.number(op, name, value)
            value = torch.tensor(value, dtype=sigmas.dtype).item()  # as where a tensor is compared with a number
        else:
            value = _checks.number(op, name, value, 0.0, finite=True)
        checked.append(value)
    return checked


# ---- the loop ----


def _shown(steps: int, disable: bool | None) -> Iterable[int]:
    if disable:
        return range(steps)
    try:
        from tqdm.auto import trange
    except ImportError:
        return range(steps)
    return trange(steps, disable=disable)


def _default_noise(like: torch.Tensor, dtype: torch.dtype, step_dtype: torch.dtype | None) -> torch.Tensor | None:
    """What torch.randn_like draws for a step in step_dtype, or for none. None where sampler_step draws just that, and
    where the generator can be moved without drawing."""
    if like.is_contiguous():
        moved = step_dtype is None and dtype == like.dtype and generator_state(like, None) is not None
        if moved or step_dtype == dtype:
            return None
    return torch.randn_like(like, dtype=dtype)


@torch.no_grad()
def _run(
    op: str,
    plan: _Plan,
    model: Callable[..., torch.Tensor],
    x: torch.Tensor,
    sigmas: torch.Tensor,
    extra_args: dict[str, Any] | None,
    callback: Callable[[dict[str, Any]], Any] | None,
    disable: bool | None,
    noise_of: Callable[[int], torch.Tensor] | None,
) -> torch.Tensor:
    extra_args = {} if extra_args is None else extra_args
    like, hats = x, list(sigmas[:-1])
    history: tuple[torch.Tensor, ...] = ()
    row = 0
    if plan.raised is not None:
        hats = [sigma if up == 1 else sigma * up for sigma, up in zip(hats, plan.raised, strict=True)]
        noisy = plan.table.noisy[0]
        noise = _default_noise(x, x.dtype, x.dtype if noisy else None)
        if noisy:
            x = pyperf_dl.sampler_step(x, x, plan.table, 0, noise=noise).sample
        row = 1
    at = [sigma for i, hat in enumerate(hats) for sigma in (hat, sigmas[i + 1])[: plan.rows[i]]]
    # A tensor of its own for each call, for a model may write into it.
    told = iter(torch.stack(at).to(like.device, like.dtype, non_blocking=True)[:, None].repeat(1, like.shape[0]))
    for i in _shown(len(hats), disable):
        for second in range(plan.rows[i]):
            denoised = model(x, next(told), **extra_args)
            if not isinstance(denoised, torch.Tensor) or denoised.shape != x.shape:
                raise ValueError(
                    f"{op}: the model must return a tensor of x's shape {list(x.shape)}, got "
                    f"{_checks.described(denoised)}"
                )
            if callback is not None and not second:
                callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": hats[i], "denoised": denoised})
            if plan.ends_with_output and i == len(hats) - 1:
                return denoised
            dtype = torch.promote_types(x.dtype, denoised.dtype)
            if plan.slopes:
                dtype = torch.promote_types(dtype, sigmas.dtype)
            noise, noisy = None, plan.table.noisy[row]
            if plan.draws[i] and second == plan.rows[i] - 1:
                if noise_of is not None:
                    noise = noise_of(i)
                    dtype = torch.promote_types(dtype, noise.dtype)
                else:
                    drawn = like.dtype if plan.raised is None else dtype  # of x as it came, or as it is
                    noise = _default_noise(like, drawn, dtype if noisy else None)
            step = pyperf_dl.sampler_step(
                x.to(dtype),
                denoised if dtype == torch.float32 and denoised.dtype in HALVES else denoised.to(dtype),
                plan.table,
                row,
                history=[h.to(dtype) for h in history[: plan.table.history[row]]],
                noise=noise.to(dtype) if noisy and noise is not None else None,
            )
            if plan.keeps == "rows":
                history = step.history
            elif plan.keeps == "outputs":
                history = (denoised, *history)[: max(plan.table.history)]
            else:
                history = () if second else (x, denoised)
            x = step.sample
            row += 1
    return x


def _brownian_noise(x: torch.Tensor, sigmas: Numbers) -> Callable[[int], torch.Tensor]:
    keys = torch.randint(0, 2**63 - 1, []) + torch.arange(x.shape[0])
    noise = functools.cache(
        lambda: pyperf_dl.BrownianNoise(x, keys.to(x.device, non_blocking=True), *_positive_ends(sigmas))
    )
    return lambda i: noise()(sigmas[i], sigmas[i + 1])


def _positive_ends(sigmas: Any) -> tuple[Any, Any]:
    return sigmas[-1] if sigmas[-1] > 0 else sigmas[-2], sigmas[0]


def _theirs(x: torch.Tensor, sigmas: torch.Tensor, values: Numbers) -> Callable[[int], torch.Tensor]:
    """The peer's noise of an SDE, with sigmas on the host, so that nothing is read."""
    low_high = torch.tensor(values, dtype=sigmas.dtype)
    tree = importlib.import_module(_SAMPLING).BrownianTreeNoiseSampler(x, *_positive_ends(low_high))
    return lambda i: tree(low_high[i], low_high[i + 1])


def _noise_of(noise_sampler: Any, sigmas: torch.Tensor) -> Callable[[int], torch.Tensor] | None:
    return None if noise_sampler is None else lambda i: noise_sampler(sigmas[i], sigmas[i + 1])


def _sampled(
    name: str,
    model: Any,
    x: Any,
    sigmas: Any,
    extra_args: Any,
    callback: Any,
    disable: Any,
    noise_sampler: Any = None,
    **options: Any,
) -> torch.Tensor:
    op = f"k_diffusion.{name}"
    _checks.strided_tensor(op, "x", x, DTYPES)
    if x.dim() == 0:
        raise ValueError(f"{op}: x must have a batch dimension, got a tensor without dimensions")
    values = _checked_sigmas(op, sigmas)
    plan = _plan(name, values, *_checked_options(op, sigmas, options))
    noise_of = _noise_of(noise_sampler, sigmas)
    if noise_of is None and name in _SDE:
        noise_of = _brownian_noise(x, values)
    return _run(op, plan, model, x, sigmas, extra_args, callback, disable, noise_of)


# ---- the functions ----

Model = Callable[..., torch.Tensor]
Callback = Callable[[dict[str, Any]], Any]
NoiseSampler = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def sample_euler(
    model: Model,
    x: torch.Tensor,
    sigmas: torch.Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = float("inf"),
    s_noise: float = 1.0,
) -> torch.Tensor:
    """Euler's method with churn (Karras et al.: Elucidating the design space of diffusion-based generative models,
    2022, algorithm 2), x' = x + (sigma' - sigma) (x - D) / sigma.

    What is said here holds for every function of this module.

    Args:
        model: ``model(x, sigma, **extra_args)`` is the denoised sample D, of x's shape; sigma ``[B]``, in x's dtype.
        x: ``[B, ...]``, noise of the first sigma; float16, bfloat16, float32 or float64.
        sigmas: ``[n + 1]``, descending, the last one where the last step ends, mostly 0. On a device: read once.
        extra_args: more arguments of the model.
        callback: called in every step, before x changes, with ``{"x", "i", "sigma", "sigma_hat", "denoised"}``.
        disable: True shows no progress bar of tqdm, None shows one on a terminal; without tqdm there is none.
        s_churn: how much noise is added in the whole loop: in steps with sigma in [s_tmin, s_tmax] sigma rises by a
            factor 1 + min(s_churn / n, sqrt(2) - 1) first.
        s_tmin, s_tmax: see s_churn.
        s_noise: standard deviation of the noise.

    Returns:
        Tensor: the last sample, as in k-diffusion without a gradient and in x's dtype, or a wider one that the model's
        output, the noise or, but in ``sample_dpmpp_*``, sigmas have: float16 x with float32 sigmas become float32.

    Raises:
        TypeError, ValueError: sigmas that do not descend, a dtype that is no float, options out of their range, a model
            that returns another shape.

    Noise is torch.randn_like of the default generator, drawn where k-diffusion draws it, which is in every step.

    >>> from pyperf_dl.integrations import k_diffusion
    >>> def model(x, sigma):  # of data that are all 3
    ...     return torch.full_like(x, 3.0)
    >>> k_diffusion.sample_euler(model, 10 * torch.randn(1, 2), torch.tensor([10.0, 5.0, 0.0]), disable=True)
    tensor([[3., 3.]])
    """
    churn = {"s_churn": s_churn, "s_tmin": s_tmin, "s_tmax": s_tmax, "s_noise": s_noise}
    return _sampled("sample_euler", model, x, sigmas, extra_args, callback, disable, **churn)


def sample_euler_ancestral(
    model: Model,
    x: torch.Tensor,
    sigmas: torch.Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> torch.Tensor:
    """A step of Euler's method down to sigma_down, then noise sigma_up: `StepTable.euler_ancestral`.

    Args:
        model, x, sigmas, extra_args, callback, disable: see `sample_euler`.
        eta: sigma_up = eta sigma' sqrt(1 - sigma'^2 / sigma^2); 0 is Euler's method.
        s_noise: times the noise.
        noise_sampler: ``noise_sampler(sigma, sigma_next)`` is standard normal noise of x's shape; None:
            torch.randn_like of the default generator.

    >>> from pyperf_dl.integrations import k_diffusion
    >>> sigmas = torch.tensor([10.0, 5.0, 0.0])
    >>> k_diffusion.sample_euler_ancestral(lambda x, sigma: 0 * x + 3, torch.randn(1, 2), sigmas, disable=True)
    tensor([[3., 3.]])
    """
    return _sampled(
        "sample_euler_ancestral", model, x, sigmas, extra_args, callback, disable, noise_sampler, eta=eta,
        s_noise=s_noise,
    )  # fmt: skip


def sample_heun(
    model: Model,
    x: torch.Tensor,
    sigmas: torch.Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = float("inf"),
    s_noise: float = 1.0,
) -> torch.Tensor:
    """Heun's method with churn (Karras et al., 2022, algorithm 2): the mean of the slopes at both ends of a step, so
    that the model is called twice, once where a step ends at sigma = 0.

    Args:
        model, x, sigmas, extra_args, disable, s_churn, s_tmin, s_tmax, s_noise: see `sample_euler`.
        callback: likewise, once a step.

    >>> from pyperf_dl.integrations import k_diffusion
    >>> sigmas = torch.tensor([10.0, 5.0, 0.0])
    >>> k_diffusion.sample_heun(lambda x, sigma: 0 * x + 3, torch.randn(1, 2), sigmas, disable=True)
    tensor([[3., 3.]])
    """
    churn = {"s_churn": s_churn, "s_tmin": s_tmin, "s_tmax": s_tmax, "s_noise": s_noise}
    return _sampled("sample_heun", model, x, sigmas, extra_args, callback, disable, **churn)


def sample_lms(
    model: Model,
    x: torch.Tensor,
    sigmas: torch.Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    order: int = 4,
) -> torch.Tensor:
    """Linear multistep: the polynomial in sigma through the last slopes (x - D) / sigma, integrated, exactly.

    Args:
        model, x, sigmas, extra_args, callback, disable: see `sample_euler`.
        order: of slopes, 1 to 4; lower in the first steps.

    >>> from pyperf_dl.integrations import k_diffusion
    >>> sigmas = torch.tensor([10.0, 5.0, 0.0])
    >>> k_diffusion.sample_lms(lambda x, sigma: 0 * x + 3, torch.full((1, 2), 13.0), sigmas, disable=True)
    tensor([[3., 3.]])
    """
    return _sampled("sample_lms", model, x, sigmas, extra_args, callback, disable, order=order)


def sample_dpmpp_2m(
    model: Model,
    x: torch.Tensor,
    sigmas: torch.Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
) -> torch.Tensor:
    """Multistep DPM-Solver++ of order 2 (Lu et al.: DPM-Solver++, 2022, algorithm 2), of order 1 in the first step and
    in one to sigma = 0.

    Args:
        model, x, sigmas, extra_args, callback, disable: see `sample_euler`.

    >>> from pyperf_dl.integrations import k_diffusion
    >>> sigmas = torch.tensor([10.0, 5.0, 0.0])
    >>> k_diffusion.sample_dpmpp_2m(lambda x, sigma: 0 * x + 3, torch.randn(1, 2), sigmas, disable=True)
    tensor([[3., 3.]])
    """
    return _sampled("sample_dpmpp_2m", model, x, sigmas, extra_args, callback, disable)


def sample_dpmpp_2m_sde(
    model: Model,
    x: torch.Tensor,
    sigmas: torch.Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    solver_type: str = "midpoint",
) -> torch.Tensor:
    """Multistep DPM-Solver++ of order 2 for the SDE (Lu et al.: DPM-Solver++, 2022, section 5).

    Args:
        model, x, sigmas, extra_args, callback, disable: see `sample_euler`.
        eta: how stochastic; 0 is the ODE.
        s_noise: times the noise.
        noise_sampler: see `sample_euler_ancestral`; None: `pyperf_dl.BrownianNoise` from the smallest sigma above 0 to
            the largest, with a key that torch's default generator (of the CPU) draws. In a takeover k-diffusion's own.
        solver_type: "midpoint" or "heun".

    >>> from pyperf_dl.integrations import k_diffusion
    >>> sigmas = torch.tensor([10.0, 5.0, 2.0, 0.0])
    >>> k_diffusion.sample_dpmpp_2m_sde(lambda x, sigma: 0 * x + 3, torch.randn(1, 2), sigmas, disable=True)
    tensor([[3., 3.]])
    """
    return _sampled(
        "sample_dpmpp_2m_sde", model, x, sigmas, extra_args, callback, disable, noise_sampler, eta=eta, s_noise=s_noise,
        solver_type=solver_type,
    )  # fmt: skip


def sample_dpmpp_3m_sde(
    model: Model,
    x: torch.Tensor,
    sigmas: torch.Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> torch.Tensor:
    """Multistep DPM-Solver++ of order 3 for the SDE, lower in the first two steps and in one to sigma = 0.

    Args:
        model, x, sigmas, extra_args, callback, disable: see `sample_euler`.
        eta, s_noise, noise_sampler: see `sample_dpmpp_2m_sde`.

    >>> from pyperf_dl.integrations import k_diffusion
    >>> sigmas = torch.tensor([10.0, 5.0, 2.0, 0.0])
    >>> k_diffusion.sample_dpmpp_3m_sde(lambda x, sigma: 0 * x + 3, torch.randn(1, 2), sigmas, disable=True)
    tensor([[3., 3.]])
    """
    return _sampled(
        "sample_dpmpp_3m_sde", model, x, sigmas, extra_args, callback, disable, noise_sampler, eta=eta, s_noise=s_noise
    )


# ---- in k-diffusion ----

_SERVED = (
    sample_euler,
    sample_euler_ancestral,
    sample_heun,
    sample_lms,
    sample_dpmpp_2m,
    sample_dpmpp_2m_sde,
    sample_dpmpp_3m_sde,
)


def _serve(ours: Callable[..., torch.Tensor]) -> None:
    name = ours.__name__
    op = f"k_diffusion.{name}"
    signature = inspect.signature(ours)

    def stand_in(settings: Settings, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return Declined()
        try:
            given = signature.bind(*args, **kwargs)
        except TypeError:
            return Declined("arguments")
        given.apply_defaults()
        model, x, sigmas, extra_args, callback, disable = given.args[:6]
        options = dict(list(given.arguments.items())[6:])
        noise_sampler = options.pop("noise_sampler", None)
        if why := _swap.unfit(x):
            return Declined(why)
        if x.dim() == 0:
            return Declined("shape")
        if not _swap._plain(sigmas):
            return Declined("sigmas")
        try:
            values = _checked_sigmas(op, sigmas)
        except ValueError:
            return Declined("sigmas")
        try:
            checked = _checked_options(op, sigmas, options)
        except (TypeError, ValueError):
            return Declined("arguments")
        noise_of = _noise_of(noise_sampler, sigmas)
        if noise_of is None and name in _SDE:
            noise_of = _theirs(x, sigmas, values)
        return _run(op, _plan(name, values, *checked), model, x, sigmas, extra_args, callback, disable, noise_of)

    settings = inspect.Parameter("settings", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = [settings, *signature.parameters.values()]
    stand_in.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    _peer.replaces(_SAMPLING, name)(stand_in)


for _ours in _SERVED:
    _serve(_ours)


def enable() -> Takeover:
    """Sends the samplers of ``k_diffusion.sampling`` that this module has to pyperf_dl, by every name under which a
    module imported them.

    A call with sigmas that do not descend, an option or dtype that is not taken over, a subclass of a tensor or a
    device without kernels goes to k-diffusion as before, errors too, and :func:`report` says why. The noise of the SDE
    samplers is k-diffusion's own.

    Returns:
        A context manager: ``with enable():`` ends with the block. Takeovers nest, and hold for all threads.

    Raises:
        ValueError: a version of k-diffusion other than 0.1.1.
        ImportError: k-diffusion is not installed, or can't be imported.

    >>> from k_diffusion import sampling
    >>> from pyperf_dl.integrations import k_diffusion
    >>> before = k_diffusion.report(reset=True)
    >>> with k_diffusion.enable():
    ...     x = sampling.sample_euler(lambda x, sigma: 0 * x, torch.randn(1, 2), torch.tensor([2.0, 1.0, 0.0]))
    >>> k_diffusion.report()
    Report(taken=1, fell_back={})
    """
    return _peer.enable(Settings())
