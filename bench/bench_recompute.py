"""Cases of the family `recompute`: training steps under plans, and the solver on long chains.

A step under a plan is compared with the step without recomputation, whose time is the floor, and with checkpoints as
one writes them by hand, each at its own peak: that is the budget of the plan beside it.
"""

from __future__ import annotations

import copy
import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import harness
import numpy as np
import pytest
import torch
from harness import Case, Peer, WrongResultError, optional
from recompute_models import GPT, ResNet
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from pyperf_dl import recompute

FAMILY = "recompute"
SEED, MIB = 5, 2**20
PARTS = (0.1, 0.25, 0.4, 0.6)  # of the way from the least feasible budget to the peak without recomputation
KNAPSACK_PART = 0.4  # of the bytes that blocks can keep beside their outputs


# ---- training steps ----


def gpt(batch: int, length: int, width: int, depth: int) -> Callable[[], tuple[nn.Module, tuple[torch.Tensor, ...]]]:
    def make() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
        tokens = torch.randint(256, (batch, length + 1))
        return GPT(256, length, width, 4, depth), (tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())

    return make


def resnet(batch: int, size: int, width: int) -> Callable[[], tuple[nn.Module, tuple[torch.Tensor, ...]]]:
    def make() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
        images, classes = torch.randn(batch, 3, size, size), torch.randint(10, (batch,))
        return ResNet(10, width, (3, 4, 6, 3)), (images, classes)

    return make


class OfTransformers(nn.Module):
    """A language model of transformers, as these steps call it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=tokens, labels=targets).loss


def gpt2(batch: int, length: int, width: int, depth: int) -> Callable[[], tuple[nn.Module, tuple[torch.Tensor, ...]]]:
    def make() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
        transformers = optional("transformers")
        config = transformers.GPT2Config(
            vocab_size=256, n_positions=length, n_embd=width, n_layer=depth, n_head=4, use_cache=False, bos_token_id=0,
            eos_token_id=0,
        )  # fmt: skip
        tokens = torch.randint(256, (batch, length))
        return OfTransformers(transformers.GPT2LMHeadModel(config)), (tokens, tokens)

    return make


SMALL = {"GPT": gpt(2, 128, 96, 16), "ResNet": resnet(4, 64, 16)}
LARGE = {"GPT": gpt(2, 128, 192, 48), "ResNet": resnet(8, 64, 32)}
ON_CUDA = {"GPT": gpt(16, 512, 512, 24), "ResNet": resnet(64, 128, 64)}
GPT2, COMPILED = "transformers' GPT-2", "GPT, compiled blocks"
for sizes, how in ((SMALL, (2, 128, 96, 16)), (LARGE, (2, 128, 192, 48)), (ON_CUDA, (16, 512, 512, 24))):
    sizes |= {GPT2: gpt2(*how), COMPILED: gpt(*how)}


@dataclass
class Trainer:
    """A model, its inputs, and how its blocks run."""

    model: Any
    inputs: tuple[torch.Tensor, ...]
    run: Callable[[nn.Sequential, torch.Tensor], torch.Tensor] | None = None
    compiles: bool = False  # each block

    def step(self) -> torch.Tensor:
        """Forward and backward, which adds to the gradients."""
        torch.manual_seed(SEED)
        if self.run is None:
            loss = self.model(*self.inputs)
        else:
            x, targets = self.inputs
            loss = self.model.behind(self.run(self.model.blocks, self.model.before(x)), targets)
        loss.backward()
        return loss.detach()

    def copy(self, run: Any = None, compiles: bool | None = None) -> Trainer:
        made = copy.deepcopy(self.model)
        for p in made.parameters():
            p.grad = torch.zeros_like(p)
        compiles = self.compiles if compiles is None else compiles
        if compiles:  # a copy has no compiled blocks
            for block in made.blocks:
                block.compile()
        return Trainer(made, self.inputs, run, compiles)

    def gradients(self) -> list[torch.Tensor]:
        return [p.grad for p in self.model.parameters()]

    def peak(self) -> int:
        """Bytes of a step: what is there before it, and the most above that."""
        there = [*self.model.parameters(), *self.model.buffers(), *self.gradients(), *self.inputs]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in there}
        return sum(storages.values()) + recompute.peak_memory(self.step, self.inputs[0].device)

    def result(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Loss and gradients of one step; buffers and the generator's state behind it."""
        for gradient in self.gradients():
            gradient.zero_()
        loss = self.step()
        state = torch.cuda.get_rng_state if loss.is_cuda else torch.get_rng_state
        return [loss, *self.gradients()], [*self.model.buffers(), state()]


@functools.cache
def plain(name: str, size: str, device: str) -> Trainer:
    """Without recomputation."""
    makers = {"small": SMALL, "large": LARGE, "cuda": ON_CUDA}[size]
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        model, inputs = makers[name]()
    trainer = Trainer(model.train().to(device), tuple(t.to(device) for t in inputs)).copy(compiles=name == COMPILED)
    trainer.step()
    return trainer


@functools.cache
def profile_of(name: str, size: str, device: str) -> recompute.ChainProfile:
    trainer = plain(name, size, device)
    return recompute.profile(trainer.model, trainer.inputs)


@functools.cache
def least_plan(name: str, size: str, device: str) -> recompute.Plan:
    trainer = plain(name, size, device)
    return recompute.plan(trainer.model, trainer.inputs, budget="least")


def difference(one: Trainer, other: Trainer, state: bool) -> float:
    """Of loss and gradients of a step from the same buffers; with `state`, of what it leaves, too."""
    other.model.load_state_dict(one.model.state_dict())
    (results, left), (other_results, other_left) = one.result(), other.result()
    worst = harness.max_difference(results, other_results)
    return max(worst, harness.max_difference(left, other_left)) if state else worst


# ---- peers: checkpoints as one writes them by hand ----


def each_block(blocks: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    for block in blocks:
        x = checkpoint(block, x, use_reentrant=False)
    return x


def segments(blocks: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    return checkpoint_sequential(blocks, round(math.sqrt(len(blocks))), x, use_reentrant=False)


def kept_of(kept: frozenset[int], blocks: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    for k, block in enumerate(blocks):
        x = block(x) if k in kept else checkpoint(block, x, use_reentrant=False)
    return x


def knapsack(profile: recompute.ChainProfile, part: float, slots: int = 1000) -> frozenset[int]:
    """The blocks to keep: those whose forwards take longest in all, within a part of the bytes that all keep."""
    blocks = profile.blocks[1:-1]
    sizes = [max(block.options[0].saved_bytes - block.output_bytes, 0) for block in blocks]
    slot = max(part * sum(sizes) / slots, 1)
    best: list[tuple[float, frozenset[int]]] = [(0.0, frozenset())] * (slots + 1)
    for k, (block, size) in enumerate(zip(blocks, sizes, strict=True)):
        weight = math.ceil(size / slot)
        for room in range(slots, weight - 1, -1):
            saved, kept = best[room - weight]
            best[room] = max(best[room], (saved + block.forward, kept | {k}), key=lambda found: found[0])
    return best[slots][1]


PEERS = ("each block", "\u221an parts", "knapsack")
OWN = "its own checkpoints"  # of a model of transformers: each block


@functools.cache
def by_hand(peer: str, name: str, size: str, device: str) -> Trainer:
    if peer == OWN:
        trainer = plain(name, size, device).copy()
        trainer.model.model.gradient_checkpointing_enable({"use_reentrant": False})
        trainer.step()
        return trainer
    if peer == "knapsack":
        run: Any = functools.partial(kept_of, knapsack(profile_of(name, size, device), KNAPSACK_PART))
    else:
        run = {"each block": each_block, PEERS[1]: segments}[peer]
    trainer = plain(name, size, device).copy(run)
    trainer.step()
    return trainer


@functools.cache
def peak_by_hand(peer: str, name: str, size: str, device: str) -> int:
    return by_hand(peer, name, size, device).peak()


# ---- cases of plans ----


class Spec(NamedTuple):
    name: str
    size: str
    device: str
    budget: float | str  # part of the way from the least feasible one, or the peer whose peak it is

    @property
    def model(self) -> tuple[str, str, str]:
        return self.name, self.size, self.device

    @property
    def words(self) -> str:
        if isinstance(self.budget, str):
            return f"{self.name}, peak of {self.budget}"
        return f"{self.name}, least budget + {self.budget:.0%}" if self.budget else f"{self.name}, least budget"


@dataclass
class Planned:
    """A model under a plan, and the same model without one."""

    plan: recompute.Plan
    trainer: Trainer
    plain: Trainer
    full: int
    peak: int
    seconds: float  # of planning


def budget_of(spec: Spec) -> int | str:
    if spec.budget == 0:
        return "least"
    if isinstance(spec.budget, str):
        return peak_by_hand(spec.budget, *spec.model) * 1001 // 1000  # a plan allows for a few kilobytes more
    plan = least_plan(*spec.model)
    return plan.budget + int(spec.budget * (recompute.full_peak(plan.profile) - plan.budget))


def planned(spec: Spec, _: torch.Generator) -> Planned:
    budget, without = budget_of(spec), plain(*spec.model)
    trainer = without.copy()
    begin = time.perf_counter()
    plan = recompute.plan(trainer.model, trainer.inputs, budget=budget)
    seconds = time.perf_counter() - begin
    plan.apply()
    return Planned(plan, trainer, without, recompute.full_peak(plan.profile), trainer.peak(), seconds)


def error_of_plan(at: Planned, _: Any, whole: bool) -> float:
    """Of loss, gradients, buffers and the generator's state."""
    if at.peak > at.plan.budget:
        raise WrongResultError(f"peak {at.peak} bytes, above the budget of {at.plan.budget}")
    return difference(at.plain, at.trainer, state=True)


def agrees(theirs: Callable[[], Trainer], at: Planned, ours: Any, result: Any) -> bool:
    """Buffers are left out: a checkpoint updates those of batch norm twice."""
    return difference(at.plain, theirs(), state=False) <= 1e-4


def peak_of_eager_blocks(at: Planned) -> int:
    """Under the same budget."""
    trainer = at.plain.copy(compiles=False)
    recompute.plan(trainer.model, trainer.inputs, budget=at.plan.budget).apply()
    return trainer.peak()


def figures_of_plan(at: Planned, _: Any, entry: dict[str, Any]) -> dict[str, float]:
    profile, plan = at.plan.profile, at.plan
    predicted = plan.predicted_time / recompute.solve(profile, at.full).predicted_time
    found = {
        "budget MiB": plan.budget / MIB,
        "% of full": 100 * plan.budget / at.full,
        "peak / budget %": 100 * at.peak / plan.budget,
        "peak off %": 100 * (plan.predicted_peak / at.peak - 1),
        "plan: \u00d7 floor": predicted,
        "time off %": 100 * (predicted / entry["x_floor"] - 1),
        "steps to plan": at.seconds * 1e3 / entry["floor_ms"],
    }
    if at.plain.compiles:
        found["peak / eager %"] = 100 * at.peak / peak_of_eager_blocks(at)
    for peer in entry["peers"].values():
        if "speedup" in peer:
            found["points saved"] = 100 * entry["x_floor"] * (peer["speedup"] - 1)
    return found


def peers_of(spec: Spec) -> dict[str, Peer]:
    if not isinstance(spec.budget, str):
        return {}
    theirs = functools.partial(by_hand, spec.budget, *spec.model)
    return {spec.budget: Peer(Trainer.step, prepare=lambda _: theirs(), agrees=functools.partial(agrees, theirs))}


def plan_case(spec: Spec, rounds: int) -> Case:
    return Case(
        FAMILY,
        "recompute.plan",
        spec.words,
        torch.float32,
        spec.device,
        make=functools.partial(planned, spec),
        ours=lambda at: at.trainer.step(),
        error=error_of_plan,
        peers=peers_of(spec),
        params={"model": spec.name, "budget": spec.budget},
        cold=False,
        floor=lambda at: at.plain.step(),
        floor_is="the step without recomputation",
        figures=figures_of_plan,
        one_thread=True,
        rounds=rounds,
    )


# ---- cases of the solver ----


class Chain(NamedTuple):
    """A chain without a model, and where its budget lies."""

    blocks: int
    kinds: int | None  # that follow each other again and again; None: each block is another
    part: float

    @property
    def words(self) -> str:
        kinds = "" if self.kinds is None else f" of {self.kinds} kind{'s' * (self.kinds > 1)}"
        return f"{self.blocks} blocks{kinds}, least budget + {self.part:.0%}"


def random_chain(count: int, seed: int) -> recompute.ChainProfile:
    """Outputs of 20 to 200 bytes, of which 1.5 to 8 times as many are kept; backwards take twice the forwards."""
    draw = np.random.default_rng(seed)
    outputs = draw.integers(20, 200, count)
    saved = (outputs * draw.uniform(1.5, 8, count)).astype(int)
    forward = draw.uniform(0.5, 5, count)
    read = np.concatenate([[0], outputs[:-1]])
    return recompute.ChainProfile.from_lists(
        forward=forward.tolist(),
        backward=(2 * forward).tolist(),
        output_bytes=outputs.tolist(),
        saved_bytes=saved.tolist(),
        forward_peak=(outputs + outputs // 2).tolist(),
        history_peak=(saved + outputs // 4).tolist(),
        backward_peak=(saved + outputs + read + outputs // 2).tolist(),
    )


@functools.cache
def profile_of_chain(chain: Chain) -> recompute.ChainProfile:
    if chain.kinds is None:
        return random_chain(chain.blocks, SEED)
    period = random_chain(chain.kinds, SEED).blocks
    return recompute.ChainProfile(tuple(period[k % chain.kinds] for k in range(chain.blocks)))


class Problem(NamedTuple):
    profile: recompute.ChainProfile
    budget: int
    full: int


def problem_of(chain: Chain, _: torch.Generator) -> Problem:
    profile = profile_of_chain(chain)
    full, least = recompute.full_peak(profile), recompute.least_budget(profile)[0]
    return Problem(profile, least + int(chain.part * (full - least)), full)


def error_of_schedule(of: Problem, schedule: Any, whole: bool) -> float:
    """Of the peak and, as a part, of the time, against the reference's simulation."""
    with harness.pyperf_dl.backend("reference"):
        timeline = recompute.simulate(of.profile, schedule)
    if timeline.peak > of.budget:
        raise WrongResultError(f"peak {timeline.peak} bytes, above the budget of {of.budget}")
    return max(abs(timeline.peak - schedule.predicted_peak), abs(timeline.seconds / schedule.predicted_time - 1))


def figures_of_schedule(of: Problem, schedule: Any, entry: dict[str, Any]) -> dict[str, float]:
    least = sum(block.options[0].forward + block.options[0].backward for block in of.profile.blocks)
    return {
        "% of full": 100 * of.budget / of.full,
        "overhead %": 100 * (schedule.predicted_time / least - 1),
        "gap %": 100 * schedule.gap,
        "flat gap %": 100 * schedule.flat_gap,
    }


def solver_case(chain: Chain, rounds: int) -> Case:
    return Case(
        FAMILY,
        "recompute.solve",
        chain.words,
        None,
        "cpu",
        make=functools.partial(problem_of, chain),
        ours=lambda of: recompute.solve(of.profile, of.budget),
        error=error_of_schedule,
        tolerance=1e-9,
        params={"blocks": chain.blocks, "kinds": chain.kinds, "budget": chain.part},
        cold=False,
        floor=None,
        figures=figures_of_schedule,
        one_thread=True,
        rounds=rounds,
    )


def cases(device: str, full: bool) -> list[Case]:
    """Everything that this family measures on a device; the solver runs on the host."""
    size = "cuda" if device == "cuda" else "large" if full else "small"
    grid = [(name, budget) for name in ("GPT", "ResNet") for budget in (0.0, *PARTS, *PEERS)]
    if optional("transformers") is not None:
        grid += [(GPT2, budget) for budget in (0.0, 0.4, OWN)]
    if full:
        grid.append((COMPILED, 0.4))
    found = [plan_case(Spec(name, size, device, budget), 21 if full else 7) for name, budget in grid]
    if device == "cpu":
        parts = PARTS if full else (0.25,)
        chains = [Chain(count, None, part) for count in (50, 100, 200, 1000) for part in parts]
        chains += [Chain(1000, kinds, part) for kinds in ((1, 2, 3) if full else (1, 3)) for part in parts]
        found += [solver_case(chain, 5 if full else 3 if chain.blocks < 1000 else 1) for chain in chains]
    return found


# ---- pytest ----

_DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


@pytest.mark.parametrize("case", [c for d in _DEVICES for c in cases(d, False)], ids=lambda c: f"{c.device}: {c.title}")
def test_recompute(case: Case, benchmark: Any) -> None:
    """Right first, then timed."""
    harness.in_pytest(case, benchmark)
