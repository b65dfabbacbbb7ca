"""Cases of the family `sampler`: guidance and one step of the common samplers, against diffusers and a compiled step.

Each case is a step in the middle of a loop of 20. Peers compute guidance in PyTorch and call their scheduler's step.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import harness
import pytest
import torch
from harness import Case, Peer, optional, pyperf_dl
from k_diffusion_sampling import imported_sampling

from pyperf_dl.integrations import k_diffusion

FAMILY = "sampler"
STEPS, ROW, SCALE, SEED = 20, 10, 7.5, 3
SMALL, LATENTS, LARGE = (1, 4, 64, 64), (16, 4, 64, 64), (64, 16, 256, 256)


class Method(NamedTuple):
    """One sampler: here, of a schedule, and in diffusers, whose schedule it is."""

    table: Callable[[Any], Any]
    scheduler: str
    config: dict[str, Any]
    clip: float | None = None


_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_Table = pyperf_dl.StepTable
METHODS = {
    "Euler": Method(_Table.euler, "EulerDiscreteScheduler", _BETAS | {"use_karras_sigmas": True}),
    "flow Euler": Method(_Table.flow_euler, "FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    "DDIM": Method(_Table.ddim, "DDIMScheduler", _BETAS | {"clip_sample": True}, 1.0),
    "DPM-Solver++ 2M": Method(_Table.dpm_solver_pp, "DPMSolverMultistepScheduler", _BETAS),
    "UniPC": Method(_Table.unipc, "UniPCMultistepScheduler", _BETAS),
    "Euler ancestral": Method(_Table.euler_ancestral, "EulerAncestralDiscreteScheduler", _BETAS),
    "DDPM": Method(_Table.ddpm, "DDPMScheduler", _BETAS | {"clip_sample": True}, 1.0),
    "DPM-Solver++ 2M SDE": Method(
        functools.partial(_Table.dpm_solver_pp, eta=1.0),
        "DPMSolverMultistepScheduler",
        _BETAS | {"algorithm_type": "sde-dpmsolver++"},
    ),
}


class Spec(NamedTuple):
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: str
    noise: str = "generator"  # or "key", which no peer has
    gradient: bool = False

    @property
    def method(self) -> Method:
        return METHODS[self.name]


@functools.cache
def table_of(name: str) -> Any:
    method = METHODS[name]
    config = method.config | {"_class_name": method.scheduler}
    return method.table(pyperf_dl.NoiseSchedule.from_diffusers(config, STEPS))


def inputs_of(spec: Spec) -> Callable[[torch.Generator], Any]:
    """x, outputs with and without the condition, and the history that the row reads; with a backward, a gradient."""

    def make(generator: torch.Generator) -> Any:
        table = table_of(spec.name)
        count = 3 + table.history[ROW] + table.corrects[ROW] + spec.gradient
        how = {"generator": generator, "device": generator.device, "dtype": spec.dtype}
        made = [torch.randn(spec.shape, **how) for _ in range(count)]
        return tuple(t.requires_grad_(spec.gradient and k < 3) for k, t in enumerate(made))

    return make


@functools.cache
def generator_of(device: str) -> torch.Generator:
    return torch.Generator(device)


def ours(spec: Spec, inputs: Any, table: Any = None) -> Any:
    """The sample, and what the step keeps."""
    table = table_of(spec.name) if table is None else table
    x, cond, uncond, *history = inputs
    how: dict[str, Any] = {}
    if table.noisy[ROW]:
        how = {"generator": generator_of(spec.device).manual_seed(SEED)} if spec.noise == "generator" else {"key": SEED}
    step = pyperf_dl.sampler_step(
        x, cond, table, ROW, uncond=uncond, guidance=SCALE, history=tuple(history), clip=spec.method.clip, **how
    )
    return step.sample, *step.history[: max(table.history) > 0]


def with_gradients(spec: Spec, inputs: Any) -> Any:
    *inputs, grad = inputs
    sample = ours(spec, inputs)[0]
    return sample, *torch.autograd.grad(sample, inputs[:3], grad)


def run(spec: Spec, inputs: Any) -> Any:
    if spec.gradient:
        return with_gradients(spec, inputs)
    with torch.no_grad():
        return ours(spec, inputs)


def error(spec: Spec, inputs: Any, outputs: Any, whole: bool) -> float:
    """Of the sample, against the reference in float64 with the same noise."""
    table = table_of(spec.name)
    x, cond, uncond, *history = (t.detach().double() for t in inputs[: len(inputs) - spec.gradient])
    how: dict[str, Any] = {}
    if table.noisy[ROW]:
        if spec.noise == "generator":
            generator = generator_of(spec.device).manual_seed(SEED)
            noise = torch.randn(spec.shape, generator=generator, dtype=spec.dtype, device=spec.device)
        else:
            noise = pyperf_dl.per_sample_noise(spec.shape, SEED, ROW, device=spec.device)
        how = {"noise": noise.double()}
    with torch.no_grad(), pyperf_dl.backend("reference"):
        want = pyperf_dl.sampler_step(
            x, cond, table, ROW, uncond=uncond, guidance=SCALE, history=tuple(history), clip=spec.method.clip, **how
        ).sample
    return harness.max_difference(outputs[0].detach().double(), want)


# ---- log-probability of samples that are there, and its gradient, as policy gradients want them ----


def inputs_of_log_prob(spec: Spec) -> Callable[[torch.Generator], Any]:
    """x, the model's output, which the gradient goes to, and a sample that such a step made."""

    def make(generator: torch.Generator) -> Any:
        how = {"generator": generator, "device": generator.device, "dtype": spec.dtype}
        x, output, noise = (torch.randn(spec.shape, **how) for _ in range(3))
        target = pyperf_dl.sampler_step(x, output, table_of(spec.name), ROW, noise=noise).sample
        return x, output.requires_grad_(), target

    return make


def log_prob(spec: Spec, inputs: Any) -> Any:
    x, output, target = inputs
    made = pyperf_dl.sampler_step(x, output, table_of(spec.name), ROW, log_prob=True, target=target).log_prob
    return made.detach(), *torch.autograd.grad(made.sum(), output)


def eager_log_prob(of: tuple[float, ...], inputs: Any) -> Any:
    """What a user would write for one sampler."""
    x, output, target = inputs
    of_x, of_output, deviation = of
    mean = of_x * x.float() + of_output * output.float()
    made = torch.distributions.Normal(mean, deviation, validate_args=False).log_prob(target.float()).flatten(1).sum(1)
    return made.detach(), *torch.autograd.grad(made.sum(), output)


def error_of_log_prob(spec: Spec, inputs: Any, outputs: Any, whole: bool) -> float:
    """Of the log-probability of an element, on average."""
    x, output, target = (t.detach().double() for t in inputs)
    with pyperf_dl.backend("reference"):
        want = pyperf_dl.sampler_step(x, output, table_of(spec.name), ROW, log_prob=True, target=target).log_prob
    return harness.max_difference(outputs[0].double(), want) / x[0].numel()


def log_prob_case(spec: Spec) -> Case:
    p, q, of_x, of_output, of_d, _, _, _, deviation = table_of(spec.name).coefficients[ROW, :9].tolist()
    of = (of_x + of_d * p, of_output + of_d * q, deviation)

    def agrees(inputs: Any, made: Any, theirs: Any) -> bool:
        close = [torch.allclose(a.float(), b.float(), rtol=0.05, atol=0.05) for a, b in zip(made, theirs, strict=True)]
        return all(close)

    return Case(
        FAMILY,
        "sampler_step",
        f"{spec.name}, log-probability forward + backward, {'x'.join(map(str, spec.shape))}",
        spec.dtype,
        spec.device,
        make=inputs_of_log_prob(spec),
        ours=functools.partial(log_prob, spec),
        error=functools.partial(error_of_log_prob, spec),
        peers={"eager": Peer(functools.partial(eager_log_prob, of), agrees=agrees)},
        tolerance=1e-5,
        params={"sampler": spec.name, "shape": list(spec.shape)},
        cold=spec.shape != SMALL,
    )


# ---- peers ----


class Prepared(NamedTuple):
    scheduler: Any
    timestep: Any
    inputs: Any
    history: list[Any]  # the oldest first, as diffusers has it
    takes_generator: bool


def prepared(spec: Spec, inputs: Any) -> Prepared:
    """diffusers' scheduler in the middle of its loop."""
    scheduler = getattr(optional("diffusers"), spec.method.scheduler)(**spec.method.config)
    scheduler.set_timesteps(STEPS, device=spec.device)
    scheduler.is_scale_input_called = True
    table = table_of(spec.name)
    history = list(inputs[3 : 3 + table.history[ROW]])[::-1]
    takes = table.noisy[ROW] and "generator" in inspect.signature(scheduler.step).parameters
    if hasattr(scheduler, "last_sample"):
        scheduler.last_sample = inputs[-1] if table.corrects[ROW] else None
        scheduler.this_order = 2
    return Prepared(scheduler, scheduler.timesteps[ROW], inputs[:3], history, takes)


def diffusers_step(spec: Spec, to: Prepared) -> Any:
    scheduler, (x, cond, uncond) = to.scheduler, to.inputs
    scheduler._step_index = ROW
    if to.history:
        scheduler.model_outputs, scheduler.lower_order_nums = ([None, *to.history])[-2:], 2
    how = {"generator": generator_of(spec.device).manual_seed(SEED)} if to.takes_generator else {}
    with torch.no_grad():
        return scheduler.step(uncond + SCALE * (cond - uncond), to.timestep, x, **how).prev_sample


def agrees(spec: Spec, inputs: Any, made: Any, theirs: Any) -> bool:
    bound = {torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.5}[spec.dtype]
    return theirs.shape == made[0].shape and harness.max_difference(made[0].float(), theirs.float()) <= bound


def eager_formula(x: Any, cond: Any, uncond: Any, of_x: Any, of_d: Any, p: Any, q: Any) -> Any:
    m = uncond + SCALE * (cond - uncond)
    return of_x * x + of_d * (p * x + q * m)


def compiled_step(spec: Spec, to: Any) -> Any:
    """What a user would write for one sampler, and torch.compile makes of it."""
    with torch.no_grad():
        return to[0](*to[1])


def peers_of(spec: Spec, full: bool) -> dict[str, Peer]:
    if spec.gradient or spec.noise == "key" or optional("diffusers") is None:
        return {}
    same = functools.partial(agrees, spec)
    found = {
        "diffusers": Peer(
            functools.partial(diffusers_step, spec), prepare=functools.partial(prepared, spec), agrees=same
        )
    }
    if spec.name == "Euler" and full:

        def prepare(inputs: Any) -> Any:
            p, q, of_x, _, of_d = table_of(spec.name).coefficients[ROW, :5].tolist()
            return torch.compile(eager_formula, dynamic=False), (*inputs[:3], of_x, of_d, p, q)

        found["compiled"] = Peer(functools.partial(compiled_step, spec), prepare=prepare, agrees=same, compiles=True)
    return found


def case(spec: Spec, full: bool) -> Case:
    size = "x".join(map(str, spec.shape))
    what = ", forward + backward" if spec.gradient else ", noise of keys" if spec.noise == "key" else ""
    return Case(
        FAMILY,
        "sampler_step",
        f"{spec.name}{what}, {size}",
        spec.dtype,
        spec.device,
        make=inputs_of(spec),
        ours=functools.partial(run, spec),
        error=functools.partial(error, spec),
        peers=peers_of(spec, full),
        tolerance={torch.float32: 1e-5, torch.float16: 0.05, torch.bfloat16: 0.3}[spec.dtype],
        params={"sampler": spec.name, "shape": list(spec.shape)},
        cold=spec.shape != SMALL,
    )


# ---- whole loops, which k-diffusion has ----

LOOPS = {"Euler": "sample_euler", "DPM-Solver++ 2M": "sample_dpmpp_2m", "Heun": "sample_heun", "LMS": "sample_lms"}


class Loop(NamedTuple):
    """Of a model that costs nothing: it gives one of its tensors."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: str

    def make(self, generator: torch.Generator) -> Any:
        how = {"generator": generator, "device": generator.device, "dtype": self.dtype}
        x, *outputs = (torch.randn(self.shape, **how) for _ in range(3))
        return 14.6 * x, outputs

    def run(self, module: Any, inputs: Any) -> Any:
        x, outputs = inputs
        calls = itertools.cycle(outputs)
        sigmas = torch.cat([torch.linspace(14.6 ** (1 / 7), 0.03 ** (1 / 7), STEPS) ** 7, torch.zeros(1)]).to(x.device)
        with torch.no_grad():
            return getattr(module, LOOPS[self.name])(lambda x, sigma: next(calls), x, sigmas, disable=True)

    def error(self, inputs: Any, outputs: Any, whole: bool) -> float:
        x, made = inputs
        with pyperf_dl.backend("reference"):
            want = self.run(k_diffusion, (x.double(), [t.double() for t in made]))
        return harness.max_difference(outputs.double(), want)

    def agrees(self, inputs: Any, made: Any, theirs: Any) -> bool:
        bound = {torch.float32: 1e-3, torch.float16: 0.1}[self.dtype]
        return theirs.shape == made.shape and harness.max_difference(made.float(), theirs.float()) <= bound

    def case(self) -> Case:
        sampling = imported_sampling()
        peer = {} if sampling is None else {"k-diffusion": Peer(lambda i: self.run(sampling, i), agrees=self.agrees)}
        return Case(
            FAMILY,
            "integrations.k_diffusion",
            f"{self.name}, loop of {STEPS}, {'x'.join(map(str, self.shape))}",
            self.dtype,
            self.device,
            make=self.make,
            ours=functools.partial(self.run, k_diffusion),
            error=self.error,
            peers=peer,
            tolerance={torch.float32: 1e-4, torch.float16: 0.05}[self.dtype],
            params={"sampler": self.name, "shape": list(self.shape)},
            cold=self.shape != SMALL,
            floor=None,
        )


def cases(device: str, full: bool) -> list[Case]:
    """Everything that this family measures on a device."""
    large = LARGE if device == "cuda" else LATENTS
    in_16_bits = METHODS if full else ("Euler", "DDIM", "UniPC")
    small = METHODS if full else ("Euler", "UniPC", "DDPM")
    every = [Spec(name, large, torch.float32, device) for name in METHODS]
    every += [Spec(name, large, torch.bfloat16, device) for name in in_16_bits]
    every += [Spec(name, SMALL, torch.float32, device) for name in small]
    every.append(Spec("DDPM", large, torch.float32, device, noise="key"))
    every.append(Spec("DDIM", large, torch.float32, device, gradient=True))
    log_probs = [Spec("Euler ancestral", large, dtype, device) for dtype in (torch.float32, torch.bfloat16)]
    loops = [Loop(name, large, torch.float32, device) for name in (LOOPS if full else ("Euler", "DPM-Solver++ 2M"))]
    loops.append(Loop("DPM-Solver++ 2M", SMALL, torch.float32, device))
    found = [case(spec, full) for spec in every] + [log_prob_case(spec) for spec in log_probs]
    return found + [loop.case() for loop in loops]


# ---- pytest ----

_DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


@pytest.mark.parametrize("case", [c for d in _DEVICES for c in cases(d, False)], ids=lambda c: f"{c.device}: {c.title}")
def test_sampler(case: Case, benchmark: Any) -> None:
    """Right first, then timed."""
    harness.in_pytest(case, benchmark)
