"""A small Glow on scikit-learn's handwritten digits, conditioned on the class.

    python examples/glow_digits.py [--quick] [--out examples/out] [--epochs N] [--save x|recompute_params|nothing]

Two scales of flow steps (actnorm, invertible 1x1 convolution, affine coupling) on 8 x 8 images. Prints the bits a pixel
of held-out images and how well they come back through the inverse, and draws a grid of samples, a row for each digit.
Needs scikit-learn, matplotlib and rich (the extra `bench`).
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import matplotlib as mpl
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import pyperf_dl

mpl.use("Agg")
import matplotlib.pyplot as plt

STEPS, HIDDEN, BATCH, LEARNING_RATE = 6, 64, 128, 2e-3
LEVELS, MARGIN = 17, 0.05  # pixels are 0 ... 16; the logit is taken of [MARGIN, 1 - MARGIN]


class Squeeze(nn.Module):
    """[B, C, H, W] to [B, 4 C, H / 2, W / 2]: a permutation, so its log-det is 0."""

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return F.pixel_unshuffle(x, 2), x.new_zeros(len(x))

    def inverse(self, y: torch.Tensor, context: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return F.pixel_shuffle(y, 2), y.new_zeros(len(y))


class Conditioner(nn.Module):
    """Convolutions over the untouched channels; the class is a bias of the hidden ones. Starts as the identity."""

    def __init__(self, inputs: int, outputs: int, classes: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, HIDDEN, 3, padding=1)
        self.label = nn.Linear(classes, HIDDEN)
        self.second = nn.Conv2d(HIDDEN, HIDDEN, 1)
        self.last = nn.Conv2d(HIDDEN, outputs, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        hidden = F.relu(self.first(x) + self.label(label)[:, :, None, None])
        return self.last(F.relu(self.second(hidden)))


def glow(save: str) -> pyperf_dl.Flow:
    other = "nothing" if save == "nothing" else "x"
    layers: list[nn.Module] = []
    channels = 1
    for _ in range(2):
        layers.append(Squeeze())
        channels *= 4
        for _ in range(STEPS):
            net = Conditioner(channels // 2, pyperf_dl.AffineCoupling.parameter_count(channels // 2), 10)
            layers += [
                pyperf_dl.ActNorm(channels, save=other),
                pyperf_dl.InvertibleConv1x1(channels, save=other),
                pyperf_dl.AffineCoupling(net, activation="tanh", clamp=2.0, save=save),
            ]
    return pyperf_dl.Flow(layers, event_shape=(16, 2, 2))


def to_logits(pixels: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Dequantised pixels on the whole line, and the log-det. pixels: [B, 1, 8, 8], 0 ... 16; noise in [0, 1)"""
    p = MARGIN + (1 - 2 * MARGIN) * (pixels + noise) / LEVELS
    slope = math.log((1 - 2 * MARGIN) / LEVELS) - p.log() - (1 - p).log()
    return p.logit(), slope.flatten(1).sum(1)


def to_pixels(logits: torch.Tensor) -> torch.Tensor:
    """Back to [0, 1]."""
    return ((logits.sigmoid() - MARGIN) / (1 - 2 * MARGIN)).clamp(0, 1)


def bits(flow: pyperf_dl.Flow, pixels: torch.Tensor, labels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Bits a pixel, an upper bound for the discrete images, [B]."""
    x, slope = to_logits(pixels, torch.rand(pixels.shape, generator=generator))
    return -(flow.log_prob(x, labels) + slope) / (math.log(2) * pixels[0].numel())


def draw(flow: pyperf_dl.Flow, path: Path) -> None:
    labels = F.one_hot(torch.arange(10).repeat_interleave(12), 10).float()
    z = 0.8 * torch.randn(len(labels), 16, 2, 2, generator=torch.Generator().manual_seed(4))  # a cooler base: clearer
    with torch.no_grad():
        images = to_pixels(flow.inverse(z, labels)[0])
    grid = F.pad(images, (1, 1, 1, 1)).view(10, 12, 10, 10).permute(0, 2, 1, 3).reshape(100, 120)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure, axis = plt.subplots(figsize=(6, 5), layout="constrained")
    axis.imshow(grid, cmap="gray", vmin=0, vmax=1)
    axis.set(xticks=[], yticks=range(5, 100, 10), yticklabels=range(10), title="samples, a row for each digit")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="A small Glow on scikit-learn's digits.")
    parser.add_argument("--quick", action="store_true", help="fewer epochs: under 2 minutes on 2 cores")
    parser.add_argument("--epochs", type=int, help="instead of 20 (--quick) or 200")
    parser.add_argument("--save", choices=("x", "recompute_params", "nothing"), default="x", help="what couplings keep")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out", help="folder for the figure")
    options = parser.parse_args()
    epochs = options.epochs or (20 if options.quick else 200)

    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    digits = load_digits()
    pixels = torch.as_tensor(digits.images, dtype=torch.float32)[:, None]  # [1797, 1, 8, 8]
    labels = F.one_hot(torch.as_tensor(digits.target), 10).float()
    order = torch.randperm(len(pixels), generator=generator)
    test, train = order[: len(order) // 5], order[len(order) // 5 :]

    flow = glow(options.save)
    optimizer = torch.optim.Adam(flow.parameters(), LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[bits]:.3f} bits a pixel"),
        TimeRemainingColumn(),
    )
    start = time.perf_counter()
    with Progress(*columns) as progress:
        task = progress.add_task("epochs", total=epochs, bits=math.nan)
        for _ in range(epochs):
            seen = []
            for rows in train[torch.randperm(len(train), generator=generator)].split(BATCH):
                loss = bits(flow, pixels[rows], labels[rows], generator).mean()
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(flow.parameters(), 1.0)
                optimizer.step()
                seen.append(loss.item())
            schedule.step()
            progress.update(task, advance=1, bits=sum(seen) / len(seen))
    seconds = time.perf_counter() - start

    flow.eval()
    with torch.no_grad():
        held_out = torch.stack([bits(flow, pixels[test], labels[test], generator) for _ in range(5)]).mean()
        x, _ = to_logits(pixels[test], torch.rand(pixels[test].shape, generator=generator))
        back = flow.inverse(flow(x, labels[test])[0], labels[test])[0]
    print(f"images: {len(train)} train, {len(test)} held out; save={options.save!r}; {seconds:.1f} s")
    print(f"held-out bits a pixel: {held_out:.3f} (uniform: {math.log2(LEVELS):.3f})")
    print(f"largest error of an image after forward and inverse: {(to_pixels(back) - to_pixels(x)).abs().max():.1e}")
    path = options.out / "glow_digits.png"
    draw(flow, path)
    print(f"samples: {path}")


if __name__ == "__main__":
    main()
