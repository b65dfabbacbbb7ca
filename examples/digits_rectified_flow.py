"""A small rectified flow on scikit-learn's handwritten digits, and what six samplers make of it.

    python examples/digits_rectified_flow.py [--quick] [--out examples/out] [--epochs N] [--guidance G]

A network learns the velocity of x = (1 - sigma) image + sigma noise (Liu et al.: Flow straight and fast, 2022), with
the class or, for classifier-free guidance, without. Six samplers then draw digits of the same noise with 4, 8 and 20
calls of it. Prints how often a classifier finds the class that was asked for and the Frechet distance of its features
to those of real digits, draws a grid of samples, and times the work between two calls beside diffusers', which is
optional. Needs scikit-learn, matplotlib and rich (the extra `bench`).
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import pyperf_dl

mpl.use("Agg")
import matplotlib.pyplot as plt

BLOCKS, HIDDEN, BATCH, LEARNING_RATE = 3, 256, 128, 2e-3
NO_CLASS, DROPPED = 10, 0.15  # the label that stands for none, and how often it is seen in training
CALLS = (4, 8, 20)

StepTable = pyperf_dl.StepTable
SAMPLERS: dict[str, Callable[[pyperf_dl.NoiseSchedule], StepTable]] = {
    "flow_euler": StepTable.flow_euler,
    "heun": lambda schedule: StepTable.heun(schedule, "flow"),
    "dpm_solver_pp": lambda schedule: StepTable.dpm_solver_pp(schedule, "flow"),
    "unipc": lambda schedule: StepTable.unipc(schedule, "flow"),
    "flow_ancestral": StepTable.flow_ancestral,
    "flow_stochastic": StepTable.flow_stochastic,
}


class Data(NamedTuple):
    train: torch.Tensor  # [N, 1, 8, 8] in [-1, 1]
    train_labels: torch.Tensor
    test: torch.Tensor
    test_labels: torch.Tensor


def load_data() -> Data:
    digits = load_digits()
    images = torch.as_tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.as_tensor(digits.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1))
    test, train = order[: len(order) // 5], order[len(order) // 5 :]
    return Data(images[train], labels[train], images[test], labels[test])


class Block(nn.Module):
    """Of a residual network, with scale, shift and gate from the condition. Starts as the identity."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN, elementwise_affine=False)
        self.condition = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.layers = nn.Sequential(nn.Linear(HIDDEN, 2 * HIDDEN), nn.SiLU(), nn.Linear(2 * HIDDEN, HIDDEN))
        nn.init.zeros_(self.condition.weight)
        nn.init.zeros_(self.condition.bias)

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        scale, shift, gate = self.condition(condition).chunk(3, 1)
        return x + gate * self.layers(self.norm(x) * (1 + scale) + shift)


class Velocity(nn.Module):
    """Noise - image, predicted from x at time 1000 sigma and the class."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequencies", math.pi * 2.0 ** torch.arange(6))
        self.time = nn.Linear(12, HIDDEN)
        self.label = nn.Embedding(NO_CLASS + 1, HIDDEN)
        self.first = nn.Linear(64, HIDDEN)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.last = nn.Linear(HIDDEN, 64)

    def forward(self, x: torch.Tensor, t: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        angles = t.to(x.dtype)[:, None] / 1000 * self.frequencies
        condition = F.silu(self.time(torch.cat([angles.sin(), angles.cos()], 1)) + self.label(label))
        hidden = self.first(x.flatten(1))
        for block in self.blocks:
            hidden = block(hidden, condition)
        return self.last(hidden).view_as(x)


def flow_loss(net: Velocity, images: torch.Tensor, labels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    sigma = torch.randn(len(images), generator=generator).sigmoid()  # logit-normal (Esser et al., 2024)
    noise = torch.randn(images.shape, generator=generator)
    labels = labels.where(torch.rand(len(images), generator=generator) >= DROPPED, NO_CLASS)
    s = sigma[:, None, None, None]
    return F.mse_loss(net((1 - s) * images + s * noise, 1000 * sigma, labels), noise - images)


class Classifier(nn.Module):
    """Judges samples; never sees any in training."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(256, 32), nn.ReLU(),
        )  # fmt: skip
        self.last = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.features(x))


def classifier_loss(
    net: Classifier, images: torch.Tensor, labels: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    noisy = images + 0.2 * torch.randn(images.shape, generator=generator)
    return F.cross_entropy(net(noisy), labels, label_smoothing=0.1)


def train(name: str, net: nn.Module, loss_of: Callable[..., torch.Tensor], data: Data, epochs: int) -> float:
    """Seconds."""
    generator = torch.Generator().manual_seed(2)
    optimizer = torch.optim.Adam(net.parameters(), LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
    )
    start = time.perf_counter()
    with Progress(*columns) as progress:
        task = progress.add_task(name, total=epochs, loss=math.nan)
        for _ in range(epochs):
            for rows in torch.randperm(len(data.train), generator=generator).split(BATCH):
                loss = loss_of(net, data.train[rows], data.train_labels[rows], generator)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            schedule.step()
            progress.update(task, advance=1, loss=loss.item())
    net.eval()
    return time.perf_counter() - start


def guided(net: Velocity, labels: torch.Tensor) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The model as a Sampler calls it: the first half of the batch without the class, the second with it."""
    both = torch.cat([torch.full_like(labels, NO_CLASS), labels])
    return lambda x, t: net(x, t, both)


def table_of(name: str, calls: int) -> StepTable:
    """Heun's method calls the model twice a step, but once in the last."""
    return SAMPLERS[name](pyperf_dl.NoiseSchedule.flow(calls // 2 if name == "heun" else calls))


def sample_all(net: Velocity, labels: torch.Tensor, guidance: float) -> dict[tuple[str, int], torch.Tensor]:
    """Of the same noise, and the same keys for what samplers add."""
    keys = torch.arange(len(labels))
    noise = pyperf_dl.per_sample_noise([len(labels), 1, 8, 8], keys)
    model = guided(net, labels)
    samples = {}
    with Progress(TextColumn("sampling"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()) as progress:
        for name, calls in progress.track([(name, calls) for name in SAMPLERS for calls in CALLS]):
            table = table_of(name, calls)
            x = table.initial_scale * noise
            x = pyperf_dl.Sampler(table).sample(model, x, guidance=guidance, key=keys)
            samples[name, calls] = x.clamp(-1, 1)
    return samples


class Judge:
    """Compares images with the real ones of training, by the features of a classifier."""

    def __init__(self, classifier: Classifier, data: Data) -> None:
        self.classifier = classifier
        self.mean, self.cov = self.moments(data.train)

    def moments(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.classifier.features(images).double()
        return features.mean(0), torch.cov(features.T)

    def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
        """Accuracy in percent; Frechet distance |m - m'|^2 + tr(C + C' - 2 (C C')^1/2)."""
        accuracy = (self.classifier(images).argmax(1) == labels).double().mean().item()
        mean, cov = self.moments(images)
        # C C' has the eigenvalues of a positive semidefinite matrix
        root = torch.linalg.eigvals(cov @ self.cov).real.clamp(min=0).sqrt().sum()
        distance = (mean - self.mean).square().sum() + cov.trace() + self.cov.trace() - 2 * root
        return 100 * accuracy, distance.item()


def print_quality(samples: dict[tuple[str, int], torch.Tensor], judge: Judge, data: Data) -> None:
    def line(title: str, accuracies: Sequence[object], distances: Sequence[object]) -> None:
        print(f"{title:<18}" + "".join(f"{a:>8}" for a in accuracies) + "".join(f"{d:>10}" for d in distances))

    print(f"{'':<18}{'right class [%]':>24}{'Frechet distance':>30}")
    line("model calls", CALLS, CALLS)
    for name in SAMPLERS:
        scores = [judge(samples[name, calls], data.test_labels) for calls in CALLS]
        line(name, [f"{accuracy:.1f}" for accuracy, _ in scores], [f"{distance:.2f}" for _, distance in scores])
    accuracy, distance = judge(data.test, data.test_labels)
    print(f"real, held out: {accuracy:.1f} % of the right class, Frechet distance {distance:.2f}")


class Between:
    """20 steps of Euler's method on the same tensors, here and in diffusers; guided: what a loop does between calls."""

    def __init__(self, shape: Sequence[int], guidance: float) -> None:
        from diffusers import FlowMatchEulerDiscreteScheduler

        schedule = pyperf_dl.NoiseSchedule.flow(20)
        self.table, self.guidance = StepTable.flow_euler(schedule), guidance
        self.scheduler = FlowMatchEulerDiscreteScheduler()
        self.sigmas = [level.sigma for level in schedule.levels[:-1]]
        generator = torch.Generator().manual_seed(3)
        self.x = torch.randn(shape, generator=generator)
        self.output = torch.randn([2 * shape[0], *shape[1:]], generator=generator)
        self.reset()

    def reset(self) -> None:
        self.scheduler.set_timesteps(sigmas=self.sigmas)
        self.scheduler.set_begin_index(0)

    def ours(self) -> torch.Tensor:
        x, output = self.x, self.output[: len(self.x)]
        for row in range(len(self.table)):
            x = pyperf_dl.sampler_step(x, output, self.table, row).sample
        return x

    def theirs(self) -> torch.Tensor:
        x, output = self.x, self.output[: len(self.x)]
        for t in self.scheduler.timesteps:
            x = self.scheduler.step(output, t, x, return_dict=False)[0]
        return x

    def ours_guided(self) -> torch.Tensor:
        x = self.x
        for row in range(len(self.table)):
            uncond, output = self.output.chunk(2)
            x, _, _, inputs, _ = pyperf_dl.sampler_step(
                x, output, self.table, row, uncond=uncond, guidance=self.guidance, model_inputs=2
            )
        return inputs

    def theirs_guided(self) -> torch.Tensor:
        x = self.x
        for t in self.scheduler.timesteps:
            uncond, output = self.output.chunk(2)
            output = uncond + self.guidance * (output - uncond)
            x = self.scheduler.step(output, t, x, return_dict=False)[0]
            inputs = torch.cat([x, x])
        return inputs


def seconds_of(passes: Sequence[Callable[[], object]], reset: Callable[[], None], repeats: int) -> list[float]:
    """Medians of runs in turns; the first run of each does not count."""
    seconds: list[list[float]] = [[] for _ in passes]
    for _ in range(repeats + 1):
        for run, found in zip(passes, seconds, strict=True):
            reset()
            start = time.perf_counter()
            run()
            found.append(time.perf_counter() - start)
    return [statistics.median(found[1:]) for found in seconds]


def print_times(net: Velocity, labels: torch.Tensor, guidance: float) -> None:
    print(f"{'microseconds between two model calls':<48}{'pyperf_dl':>12}{'diffusers':>12}")
    for shape in ([len(labels), 1, 8, 8], [2, 16, 128, 128]):
        between = Between(shape, guidance)
        for what, passes in (
            ("the step alone", (between.ours, between.theirs)),
            ("guidance, step, next input", (between.ours_guided, between.theirs_guided)),
        ):
            results = []
            for run in passes:
                between.reset()
                results.append(run())
            torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
            ours, theirs = seconds_of(passes, between.reset, 50)
            title = f"{' x '.join(map(str, shape))}: {what}"
            print(f"{title:<48}{1e6 * ours / 20:>12.1f}{1e6 * theirs / 20:>12.1f}")
        if shape[0] == len(labels):
            sample = pyperf_dl.Sampler(between.table).sample
            run = partial(sample, guided(net, labels), between.x, guidance=guidance)
            (loop,) = seconds_of([run], between.reset, 5)
            title = f"  share of a loop over the model, {1e3 * loop:.0f} ms"
            print(f"{title:<48}{ours / loop:>12.2%}{theirs / (loop - ours + theirs):>12.2%}")


def draw(samples: dict[tuple[str, int], torch.Tensor], labels: torch.Tensor, path: Path) -> None:
    chosen = torch.stack([(labels == digit).nonzero()[:2, 0] for digit in range(10)], 1).flatten()  # 2 rows of 0 ... 9
    figure, axes = plt.subplots(len(SAMPLERS), len(CALLS), figsize=(9.6, 4.6), layout="constrained")
    for (name, calls), axis in zip(samples, axes.flat, strict=True):
        images = F.pad(samples[name, calls][chosen], (1, 1, 1, 1), value=-1)
        grid = images.view(2, 10, 10, 10).permute(0, 2, 1, 3).reshape(20, 100)
        axis.imshow(grid, cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        if calls == CALLS[0]:
            axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
        if axis in axes[0]:
            axis.set_title(f"{calls} model calls", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="A small rectified flow on scikit-learn's digits.")
    parser.add_argument("--quick", action="store_true", help="fewer epochs: under 2 minutes on 2 cores")
    parser.add_argument("--epochs", type=int, help="instead of 150 (--quick) or 600")
    parser.add_argument("--guidance", type=float, default=2.0, help="scale of classifier-free guidance, 1 is none")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out", help="folder for the figure")
    options = parser.parse_args()
    epochs = options.epochs or (150 if options.quick else 600)

    torch.manual_seed(0)
    data = load_data()
    classifier, net = Classifier(), Velocity()
    train("classifier", classifier, classifier_loss, data, 30)
    seconds = train("rectified flow", net, flow_loss, data, epochs)
    with torch.no_grad():
        samples = sample_all(net, data.test_labels, options.guidance)
        print(f"images: {len(data.train)} train, {len(data.test)} held out; {epochs} epochs in {seconds:.1f} s")
        print_quality(samples, Judge(classifier, data), data)
        if importlib.util.find_spec("diffusers"):
            print_times(net, data.test_labels, options.guidance)
        else:
            print("diffusers is not installed: nothing to compare times with (pip install diffusers)")
    path = options.out / "digits_rectified_flow.png"
    draw(samples, data.test_labels, path)
    print(f"samples: {path}")


if __name__ == "__main__":
    main()
