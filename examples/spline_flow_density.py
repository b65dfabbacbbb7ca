"""A neural spline flow on real tabular data, beside the same flow in nflows.

    python examples/spline_flow_density.py [--quick] [--out examples/out] [--epochs N] [--double]

Data: the ten mean features of scikit-learn's breast-cancer set (569 images of cell nuclei), standardised. Both flows
have the same layers, start from the same weights and see the same batches, in turns. Prints the log-likelihood of
held-out rows and the wall time of both, and draws the density. In float32 the rounding of the two sets them apart after
some dozen steps; with --double their losses are the same. nflows is optional. Needs scikit-learn, matplotlib and rich
(the extra `bench`).
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import math
import statistics
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from sklearn.datasets import load_breast_cancer

import pyperf_dl

mpl.use("Agg")
import matplotlib.pyplot as plt

LAYERS, HIDDEN, BINS, BOUND = 6, 64, 8, 6.0
BATCH, LEARNING_RATE = 128, 3e-3


class Data(NamedTuple):
    names: list[str]
    train: torch.Tensor  # [N, D]
    valid: torch.Tensor
    test: torch.Tensor


def load_data() -> Data:
    table = load_breast_cancer()
    x = torch.as_tensor(table.data[:, :10], dtype=torch.get_default_dtype())
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
    train, valid, test = x.split([len(x) - 2 * (len(x) // 5), len(x) // 5, len(x) // 5])
    mean, std = train.mean(0), train.std(0)
    return Data(
        [str(name) for name in table.feature_names[:10]], *((part - mean) / std for part in (train, valid, test))
    )


class Conditioner(torch.nn.Module):
    """Two hidden layers; the last one starts small, so that the spline starts near a fixed monotone map."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(inputs, HIDDEN),
            torch.nn.SiLU(),
            torch.nn.Linear(HIDDEN, HIDDEN),
            torch.nn.SiLU(),
            torch.nn.Linear(HIDDEN, outputs),
        )
        with torch.no_grad():
            self.layers[-1].weight.mul_(0.1)

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        return self.layers(x)


def masks(features: int) -> list[torch.Tensor]:
    """Which features each layer transforms: all get their turn, with changing partners."""
    generator = torch.Generator().manual_seed(1)
    found: list[torch.Tensor] = []
    while len(found) < LAYERS:
        mask = torch.zeros(features, dtype=torch.bool)
        mask[torch.randperm(features, generator=generator)[: features // 2]] = True
        found += [mask, ~mask]
    return found[:LAYERS]


def conditioners(features: int) -> list[Conditioner]:
    torch.manual_seed(2)
    count = pyperf_dl.SplineCoupling.parameter_count
    return [Conditioner(int((~m).sum()), count(int(m.sum()), BINS)) for m in masks(features)]


def our_flow(features: int) -> pyperf_dl.Flow:
    layers = [
        pyperf_dl.SplineCoupling(net, BINS, mask=mask, tail_bound=BOUND)
        for mask, net in zip(masks(features), conditioners(features), strict=True)
    ]
    return pyperf_dl.Flow(layers, event_shape=(features,))


def nflows_flow(features: int) -> torch.nn.Module:
    from nflows.distributions import StandardNormal
    from nflows.flows import Flow
    from nflows.transforms import CompositeTransform, PiecewiseRationalQuadraticCouplingTransform

    warnings.filterwarnings("ignore", "Inputs to the softmax are not scaled down")  # ours are not either
    layers = []
    for mask, net in zip(masks(features), conditioners(features), strict=True):
        layers.append(
            PiecewiseRationalQuadraticCouplingTransform(
                mask.int(), lambda inputs, outputs, net=net: net, num_bins=BINS, tails="linear", tail_bound=BOUND
            )
        )
    return Flow(CompositeTransform(layers), StandardNormal([features]))


class Training:
    """One flow on its way; keeps the weights of the best epoch on the validation rows."""

    def __init__(self, flow: torch.nn.Module, data: Data, epochs: int) -> None:
        self.flow, self.data = flow, data
        # Many bins see no data; a larger eps keeps the rounding of their gradients from becoming whole steps.
        self.optimizer = torch.optim.AdamW(flow.parameters(), LEARNING_RATE, weight_decay=1e-2, eps=1e-3)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, epochs)
        self.order = torch.Generator().manual_seed(3)
        self.losses: list[float] = []  # of every step
        self.seconds: list[float] = []  # of every epoch
        self.best, self.weights = -math.inf, copy.deepcopy(flow.state_dict())

    def epoch(self) -> None:
        start = time.perf_counter()
        for rows in torch.randperm(len(self.data.train), generator=self.order).split(BATCH):
            loss = -self.flow.log_prob(self.data.train[rows]).mean()
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.flow.parameters(), 5.0)
            self.optimizer.step()
            self.losses.append(loss.item())
        self.schedule.step()
        self.seconds.append(time.perf_counter() - start)
        valid = mean_log_prob(self.flow, self.data.valid)
        if valid > self.best:
            self.best, self.weights = valid, copy.deepcopy(self.flow.state_dict())

    def finish(self) -> None:
        self.flow.load_state_dict(self.weights)


@torch.no_grad()
def mean_log_prob(flow: torch.nn.Module, x: torch.Tensor) -> float:
    return flow.log_prob(x).mean().item()


def gaussian_log_prob(data: Data) -> float:
    """Held-out log-likelihood of a normal density with full covariance: what a flow has to beat."""
    known = torch.cat([data.train, data.valid])
    normal = torch.distributions.MultivariateNormal(known.mean(0), torch.cov(known.T))
    return normal.log_prob(data.test).mean().item()


def draw(results: dict[str, Training], data: Data, path: Path) -> None:
    samples = results["pyperf_dl"].flow.sample(200_000, generator=torch.Generator().manual_seed(4))
    pairs = [(0, 1), (0, 5), (6, 7)]
    figure, axes = plt.subplots(1, len(pairs) + 1, figsize=(4 * len(pairs) + 4, 3.8), layout="constrained")
    for axis, (i, j) in zip(axes, pairs, strict=False):
        box = [[-2.5, 4.0], [-2.5, 4.0]]
        counts = axis.hist2d(samples[:, i].numpy(), samples[:, j].numpy(), 120, range=box, density=True, cmap="viridis")
        counts[3].set_clim(0, torch.as_tensor(counts[0]).quantile(0.999).item())
        axis.plot(data.test[:, i], data.test[:, j], ".", color="white", markersize=4, markeredgewidth=0)
        axis.set(xlabel=data.names[i], ylabel=data.names[j], xlim=box[0], ylim=box[1])
    axes[0].set_title("density of the flow; points: held-out rows", fontsize=9)
    for (name, trained), style in zip(results.items(), ("-", "--"), strict=False):
        axes[-1].plot(trained.losses, style, label=f"{name}, {sum(trained.seconds):.1f} s", linewidth=1)
    axes[-1].set(xlabel="step", ylabel="-log p of a batch [nats]")
    axes[-1].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="A neural spline flow on tabular data, beside the same flow in nflows."
    )
    parser.add_argument("--quick", action="store_true", help="fewer epochs: under 2 minutes on 2 cores")
    parser.add_argument("--epochs", type=int, help="instead of 60 (--quick) or 200")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out", help="folder for the figure")
    parser.add_argument("--double", action="store_true", help="in float64")
    options = parser.parse_args()
    torch.set_default_dtype(torch.float64 if options.double else torch.float32)
    epochs = options.epochs or (60 if options.quick else 200)
    data = load_data()
    features = data.train.shape[1]
    makers = {"pyperf_dl": our_flow}
    if importlib.util.find_spec("nflows"):
        makers["nflows"] = nflows_flow

    for make in makers.values():
        Training(make(features), data, 1).epoch()  # what only the first call pays is not timed
    results = {name: Training(make(features), data, epochs) for name, make in makers.items()}
    with Progress(TextColumn("epochs"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()) as progress:
        for _ in progress.track(range(epochs)):
            for training in results.values():
                training.epoch()
    for training in results.values():
        training.finish()

    print(
        f"rows: {len(data.train)} train, {len(data.valid)} validation, {len(data.test)} held out; {features} features"
    )
    print(f"{'':<22}{'held-out log p [nats a row]':>28}{'training [s]':>14}")
    print(f"{'normal density':<22}{gaussian_log_prob(data):>28.3f}")
    for name, trained in results.items():
        print(f"{name:<22}{mean_log_prob(trained.flow, data.test):>28.3f}{sum(trained.seconds):>14.1f}")
    if "nflows" in results:
        ours, theirs = results["pyperf_dl"], results["nflows"]
        ratio = statistics.median(t / o for o, t in zip(ours.seconds, theirs.seconds, strict=True))
        apart = (torch.tensor(ours.losses) - torch.tensor(theirs.losses)).abs()
        print(f"the same flow trains {ratio:.1f} x as fast as in nflows (median of the epochs)")
        print(f"the losses differ by at most {apart[:20].max():.1e} in the first 20 steps, {apart.max():.1e} in all")
    else:
        print("nflows is not installed: nothing to compare with (pip install nflows)")
    path = options.out / "spline_flow_density.png"
    draw(results, data, path)
    print(f"figure: {path}")


if __name__ == "__main__":
    main()
