"""A character-level GPT and a ResNet, trained within budgets of memory.

    python examples/train_under_budget.py [--quick] [--out examples/out] [--steps N] [--threads N] [--plot-plans]

The GPT reads Python's own help (`pydoc_data.topics`), the ResNet scikit-learn's digits. Each is trained from the same
start and with the same random numbers in six ways, which take turns step by step: without recomputation,
with `torch.utils.checkpoint` on every block, with `checkpoint_sequential` of about sqrt(n) segments, and with plans of
`pyperf_dl.recompute` at 35, 50 and 70 % of the peak without recomputation, or at the least feasible budget where that
is more. Prints measured peaks and times, losses, and whether losses and the trained state have the same bits as
without recomputation; draws time over memory. Needs scikit-learn and matplotlib, and uses rich where it is there (the
extra `bench`).
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.util
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import matplotlib as mpl
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from pyperf_dl import recompute

mpl.use("Agg")
import matplotlib.pyplot as plt

mpl.rcParams["svg.hashsalt"] = "pyperf_dl"  # the same file from the same figures
PERCENT = (35, 50, 70)
MIB = 2**20
PLAIN, EVERY, SEGMENTS = "no recompute", "checkpoint every block", "checkpoint_sequential"
RICH = importlib.util.find_spec("rich") is not None

Blocks = Callable[[nn.Sequential, torch.Tensor], torch.Tensor]


# ---- models: forward(x, y) is the loss ----


def plainly(blocks: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    return blocks(x)


def every_block(blocks: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    for block in blocks:
        x = checkpoint(block, x, use_reentrant=False)
    return x


def in_segments(blocks: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    return checkpoint_sequential(blocks, round(math.sqrt(len(blocks))), x, use_reentrant=False)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.to_qkv, self.last = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.to_qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return F.dropout(self.last(y), self.dropout, self.training)


class TransformerBlock(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention = nn.Sequential(nn.LayerNorm(width), Attention(width, heads, dropout))
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(),
            nn.Linear(4 * width, width), nn.Dropout(dropout),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(x)
        return x + self.mlp(x)


class GPT(nn.Module):
    def __init__(self, characters: int, context: int, width: int = 64, heads: int = 4, depth: int = 12) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(characters, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads, 0.1) for _ in range(depth)))
        self.last = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, characters))
        self.run: Blocks = plainly
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02 / (math.sqrt(2 * depth) if name.endswith("last.weight") else 1))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = self.token(x) + self.position.weight[: x.shape[1]]
        return F.cross_entropy(self.last(self.run(self.blocks, x)).flatten(0, 1), y.flatten())


class ResidualBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        self.skip = nn.Identity() if stride == 1 else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.layers(x) + self.skip(x))


class ResNet(nn.Module):
    """Three stages of a third of the blocks, of 1, 2 and 4 times the width, on images of twice the size."""

    def __init__(self, width: int = 16, depth: int = 12) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(1, width, 3, padding=1))
        blocks, inputs = [], width
        for k in range(depth):
            outputs = width << (3 * k // depth)
            blocks.append(ResidualBlock(inputs, outputs, outputs // inputs))
            inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.last = nn.Linear(inputs, 10)
        self.run: Blocks = plainly

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.last(self.run(self.blocks, self.first(x)).mean((2, 3))), y)


# ---- data ----


class Task(NamedTuple):
    name: str
    model: nn.Module
    batches: list[tuple[torch.Tensor, torch.Tensor]]
    held_out: tuple[torch.Tensor, torch.Tensor]
    learning_rate: float


def gpt_task(steps: int, batch: int = 16, context: int = 128) -> Task:
    text = "\n".join(topics[name] for name in sorted(topics))
    characters = sorted(set(text))
    numbers = {c: i for i, c in enumerate(characters)}
    codes = torch.tensor([numbers[c] for c in text])
    split = len(codes) * 9 // 10
    generator = torch.Generator().manual_seed(1)

    def batch_of(first: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        places = torch.randint(first, end - context, (batch, 1), generator=generator) + torch.arange(context)
        return codes[places], codes[places + 1]

    torch.manual_seed(0)
    model = GPT(len(characters), context)
    held_out = batch_of(split, len(codes))
    return Task("GPT", model, [batch_of(0, split) for _ in range(steps)], held_out, 2e-3)


def resnet_task(steps: int, batch: int = 128) -> Task:
    digits = load_digits()
    images = torch.as_tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.as_tensor(digits.target)
    generator = torch.Generator().manual_seed(1)
    order = torch.randperm(len(images), generator=generator)
    test, train = order[: len(order) // 5], order[len(order) // 5 :]
    chosen = [train[torch.randperm(len(train), generator=generator)[:batch]] for _ in range(steps)]
    torch.manual_seed(0)
    return Task("ResNet", ResNet(), [(images[r], labels[r]) for r in chosen], (images[test], labels[test]), 2e-3)


# ---- training in several ways ----


class Run:
    """One way to train: a copy of the model, its optimizer, and what was seen."""

    def __init__(self, task: Task, model: nn.Module, plan: recompute.Plan | None = None) -> None:
        self.model, self.plan, self._task = model, plan, task
        self.optimizer = torch.optim.AdamW(model.parameters(), task.learning_rate)
        self.losses: list[float] = []
        self.held_out = math.nan
        self.seconds: list[float] = []  # of forward and backward
        self.peak = 0

    def step(self, number: int) -> None:
        """Gradients stay allocated, as the budgets count them."""
        torch.manual_seed(number)
        self.optimizer.zero_grad(set_to_none=False)
        start = time.perf_counter()
        loss = self.model(*self._task.batches[number])
        loss.backward()
        self.seconds.append(time.perf_counter() - start)
        self.optimizer.step()
        self.losses.append(loss.item())

    def measured_step(self, number: int) -> None:
        """Its peak is what is there before it, and the most that comes on top; its time does not count."""
        there = [*self.model.parameters(), *self.model.buffers(), *self._task.batches[number]]
        there += [p.grad for p in self.model.parameters()]
        there += [t for state in self.optimizer.state.values() for t in state.values()]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in there}
        self.peak = sum(storages.values()) + recompute.peak_memory(lambda: self.step(number))
        self.seconds.pop()

    def slowdown(self, other: Run) -> float:
        """Median over steps, of which those with one number ran one after the other."""
        return statistics.median(mine / its for mine, its in zip(self.seconds, other.seconds, strict=True))

    def evaluate(self) -> None:
        self.model.eval()
        with torch.no_grad():
            self.held_out = self.model(*self._task.held_out).item()
        self.model.train()

    def has_losses_of(self, other: Run) -> bool:
        return self.losses == other.losses

    def has_state_of(self, other: Run) -> bool:
        mine, others = self.model.state_dict(), other.model.state_dict()
        return all(torch.equal(mine[name].view(-1), others[name].view(-1)) for name in others)


class Outcome(NamedTuple):
    name: str
    chain: recompute.ChainProfile
    runs: dict[str, Run]


def predicted_ratio(schedule: recompute.Schedule, chain: recompute.ChainProfile) -> float:
    """Of its time to that without recomputation."""
    return schedule.predicted_time / recompute.solve(chain, recompute.full_peak(chain)).predicted_time


def prepare(task: Task) -> Outcome:
    """Plans, and a copy of the model for each way."""
    optimizer = torch.optim.AdamW(task.model.parameters(), task.learning_rate)
    settings = {"blocks": "blocks", "optimizer": optimizer}
    chain = recompute.profile(task.model, task.batches[0], **settings)
    least, full = recompute.least_budget(chain)[0], recompute.full_peak(chain)
    runs = {}
    for name, how in ((PLAIN, plainly), (EVERY, every_block), (SEGMENTS, in_segments)):
        runs[name] = Run(task, copy.deepcopy(task.model))
        runs[name].model.run = how
    for percent in PERCENT:
        budget = max(full * percent // 100, least + least // 100)  # measured anew, bytes differ by a little
        model = copy.deepcopy(task.model)
        plan = recompute.plan(model, task.batches[0], budget=budget, **settings)
        runs[f"plan at {100 * budget / full:.0f} %"] = Run(task, plan.apply(), plan)
    return Outcome(task.name, chain, runs)


@contextlib.contextmanager
def progress(name: str, steps: int) -> Iterator[Callable[[float], None]]:
    """advance(loss)"""
    if not RICH:
        print(f"{name}: {steps} steps in {3 + len(PERCENT)} ways", flush=True)
        yield lambda loss: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as bar:
        shown = bar.add_task(name, total=steps, loss=math.nan)
        yield lambda loss: bar.update(shown, advance=1, loss=loss)


def train(task: Task) -> Outcome:
    outcome = prepare(task)
    runs = list(outcome.runs.values())
    with progress(task.name, len(task.batches)) as advance:
        for number in range(len(task.batches)):
            for place in range(len(runs)):  # each is first as often as the others
                run = runs[(place + number) % len(runs)]
                run.measured_step(number) if number == 2 else run.step(number)
            advance(runs[0].losses[-1])
    for run in runs:
        run.seconds = run.seconds[2:]
        run.evaluate()
    return outcome


# ---- results ----


def rows_of(outcome: Outcome) -> Iterator[tuple[str, ...]]:
    plain = outcome.runs[PLAIN]
    for name, run in outcome.runs.items():
        budget = predicted = ""
        if run.plan is not None:
            budget = f"{run.plan.budget / MIB:.1f}"
            predicted = f"{predicted_ratio(run.plan.schedule, run.plan.profile):.2f}"
        yield (
            name,
            budget,
            f"{run.peak / MIB:.1f}",
            f"{run.peak / plain.peak:.3f}",
            f"{1e3 * statistics.median(run.seconds):.1f}",
            f"{run.slowdown(plain):.2f}",
            predicted,
            f"{run.losses[-1]:.4f}",
            f"{run.held_out:.4f}",
            "same" if run.has_losses_of(plain) else "other",
            "same" if run.has_state_of(plain) else "other",
        )


HEADER = ("", "budget MiB", "peak MiB", "x plain", "ms", "x plain", "predicted", "loss", "held out", "losses", "state")


def print_table(outcome: Outcome, steps: int) -> None:
    rows = list(rows_of(outcome))
    title = f"{outcome.name}, {len(outcome.chain) - 2} blocks, {steps} steps; ms: forward and backward"
    if RICH:
        from rich.console import Console
        from rich.table import Table

        table = Table(*HEADER, title=title, title_justify="left")
        for column in table.columns:
            column.no_wrap, column.justify = True, "right"
        table.columns[0].justify = "left"
        for row in rows:
            table.add_row(*row)
        Console(width=max(Console().width, 128)).print(table)
        return
    widths = [max(len(row[i]) for row in [HEADER, *rows]) for i in range(len(HEADER))]
    print(title)
    for name, *cells in [HEADER, *rows]:
        print("  ".join([name.ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells, widths[1:], strict=True))]))


def draw(outcomes: Sequence[Outcome], path: Path) -> None:
    figure, grid = plt.subplots(1, len(outcomes), figsize=(5.4 * len(outcomes), 4.2), sharey=True, layout="constrained")
    for axes, outcome in zip(grid, outcomes, strict=True):
        plain = outcome.runs[PLAIN]
        full = recompute.full_peak(outcome.chain)
        curve = recompute.pareto(outcome.chain, 40)
        axes.step(
            [s.predicted_peak / full for s in curve],
            [predicted_ratio(schedule, outcome.chain) for schedule in curve],
            where="post", color="#c2185b", lw=1, alpha=0.6, label="plans, predicted",
        )  # fmt: skip
        marks: dict[str, dict[str, Any]] = {
            PLAIN: {"color": "black", "marker": "s"},
            EVERY: {"color": "#616161", "marker": "^"},
            SEGMENTS: {"color": "#616161", "marker": "D"},
        }
        for name, mark in marks.items():
            run = outcome.runs[name]
            axes.plot(run.peak / plain.peak, run.slowdown(plain), ls="", label=name, **mark)
        planned = [run for run in outcome.runs.values() if run.plan is not None]
        axes.plot(
            [run.peak / plain.peak for run in planned],
            [run.slowdown(plain) for run in planned],
            color="#c2185b", marker="o", ls="", label="plans, measured",
        )  # fmt: skip
        axes.set(title=f"{outcome.name}, {len(outcome.chain) - 2} blocks", xlabel="peak / peak without recompute")
        axes.set(xlim=(0, 1.05), ylim=(0.95, 1.9))  # at the least budgets times go far up
        axes.grid(True, color="#eeeeee")
        axes.spines[["top", "right"]].set_visible(False)
    grid[0].set_ylabel("time / time without recompute")
    grid[0].legend(frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def keep_memory_of_steps() -> None:
    """glibc gives the memory of a big step back to the system and takes it anew in the next one, whose page faults cost
    more than what a smaller step computes again. Two variables that it reads when a process starts keep it from that.
    """
    variables = {"MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_MMAP_MAX_": "0"}
    if platform.libc_ver()[0] == "glibc" and not variables.keys() <= os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], variables | os.environ)


def main() -> None:
    parser = argparse.ArgumentParser(description="A GPT and a ResNet, trained within budgets of memory.")
    parser.add_argument("--quick", action="store_true", help="fewer steps: under 3 minutes on 2 cores")
    parser.add_argument("--steps", type=int, help="instead of 20 (--quick) or 150; at least 4")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch; one gives the steadiest times")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out", help="folder for pictures")
    parser.add_argument("--plot-plans", action="store_true", help="also a picture of each plan")
    options = parser.parse_args()
    steps = options.steps or (20 if options.quick else 150)
    if steps < 4:
        parser.error("--steps must be at least 4, of which the first two and the one that is measured are not timed")
    torch.set_num_threads(options.threads)
    torch.use_deterministic_algorithms(True)

    outcomes = []
    for task_of in (gpt_task, resnet_task):
        outcomes.append(train(task_of(steps)))
        print_table(outcomes[-1], steps)
    path = options.out / "recompute_pareto.svg"
    draw(outcomes, path)
    print(f"time over memory: {path}")
    if options.plot_plans:
        for outcome in outcomes:
            for percent, run in zip(PERCENT, [r for r in outcome.runs.values() if r.plan], strict=True):
                path = options.out / f"recompute_{outcome.name.lower()}_{percent}.svg"
                run.plan.plot(path)
                print(f"plan: {path}")


if __name__ == "__main__":
    keep_memory_of_steps()
    main()
