"""Plans and profiles as tables and plots."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._recompute_chain import ChainProfile, Schedule

if TYPE_CHECKING:
    from ._recompute_plan import Plan

_COLORS = {"forward": "tab:gray", "replay": "tab:orange", "history": "tab:blue", "backward": "tab:green"}


def shown_bytes(amount: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if abs(amount) < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.2f} GiB"


def shown_gap(gap: float) -> str:
    return "not known" if gap == float("inf") else f"{gap:.2%}"


def table_of(plan: Plan) -> str:
    schedule, chain = plan.schedule, plan.profile
    rows = []
    for k, block in enumerate(chain.blocks):
        runs, option = schedule.replays[k], block.options[schedule.kept_options[k]]
        what = "always kept" if not block.recomputable else f"recompute x{runs}" if runs else option.label
        if runs and option.label != "keep":
            what += f", {option.label}"
        extra = runs * block.forward
        rows.append(
            (
                block.name,
                what,
                shown_bytes(option.saved_bytes),
                shown_bytes(block.output_bytes),
                f"{(option.forward + option.backward) * 1e3:.2f}",
                f"+{extra * 1e3:.2f}" if runs else "",
            )
        )
    header = ("block", "activations", "saved", "output", "ms", "again")
    plain = sum(b.options[0].forward + b.options[0].backward for b in chain.blocks)
    summary = [
        f"budget {shown_bytes(plan.budget)}, predicted peak {shown_bytes(plan.predicted_peak)}, of which "
        f"{shown_bytes(chain.fixed_bytes)} are there all the time",
        f"predicted time {plan.predicted_time * 1e3:.1f} ms, {plan.predicted_time / plain - 1:+.1%} of that without "
        "recomputation" if plain else "predicted time 0 ms",
        f"at most {shown_gap(schedule.gap)} above the best persistent schedule, {shown_gap(schedule.flat_gap)} above"
        f" the best one that runs each block at most twice{'' if schedule.complete else '; the search was cut short'}",
    ]  # fmt: skip
    return "\n".join([_columns(header, rows), *summary])


def _columns(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    if importlib.util.find_spec("rich") is not None:
        from rich.console import Console
        from rich.table import Table

        table = Table(*header)
        for column in table.columns[2:]:
            column.justify = "right"
        for row in rows:
            table.add_row(*row)
        console = Console(file=io.StringIO(), width=120, force_terminal=False)
        console.print(table)
        return console.file.getvalue().rstrip()
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    return "\n".join(
        "  ".join(text.ljust(w) for text, w in zip(row, widths, strict=True)).rstrip() for row in [header, *rows]
    )


def _pyplot(what: str) -> Any:
    if importlib.util.find_spec("matplotlib") is None:
        raise RuntimeError(f"recompute: {what} needs matplotlib (pip install matplotlib)")
    from matplotlib.figure import Figure

    return Figure


def plot_plan(plan: Plan, path: str | Path) -> None:
    figure = _pyplot("plot")(figsize=(9, 6), layout="constrained")
    memory, schedule = figure.subplots(2, 1, sharex=True, height_ratios=(2, 3))
    events, fixed = plan.timeline.events, plan.profile.fixed_bytes
    mib = 2**20
    times, peaks = [], []
    for event in events:
        times += [event.start * 1e3, (event.start + event.seconds) * 1e3]
        peaks += [event.peak / mib] * 2
    memory.fill_between(times, peaks, step=None, alpha=0.3)
    memory.plot(times, peaks, linewidth=1)
    memory.axhline(plan.budget / mib, color="tab:red", linestyle="--", label="budget")
    memory.axhline(fixed / mib, color="black", linewidth=0.8, label="parameters, gradients, inputs")
    memory.set_ylabel("MiB")
    memory.set_ylim(bottom=0)
    memory.legend(loc="lower right")
    for what, color in _COLORS.items():
        mine = [e for e in events if e.what == what]
        if mine:
            schedule.barh(
                [e.block for e in mine],
                [e.seconds * 1e3 for e in mine],
                left=[e.start * 1e3 for e in mine],
                color=color,
                label=what,
                height=0.9,
            )
    schedule.set_xlabel("ms")
    schedule.set_ylabel("block")
    schedule.invert_yaxis()
    schedule.legend(loc="upper center")  # between the forward and the backward
    figure.savefig(path)


def plot_pareto(chain: ChainProfile, schedules: list[Schedule], path: str | Path) -> None:
    """Time over memory of the schedules that `pareto` found.

    Args:
        chain: that they were solved for.
        schedules: see `pareto`.
        path: of the picture (needs matplotlib).

    >>> from pyperf_dl import recompute
    >>> chain = recompute.ChainProfile.from_lists(
    ...     forward=[1] * 4, backward=[2] * 4, output_bytes=[10] * 4, saved_bytes=[50] * 4
    ... )
    >>> recompute.plot_pareto(chain, recompute.pareto(chain), "pareto.svg")  # doctest: +SKIP
    """
    figure = _pyplot("plot_pareto")(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    plain = sum(b.options[0].forward + b.options[0].backward for b in chain.blocks)
    peaks = [s.predicted_peak / 2**20 for s in schedules]
    axes.step(
        peaks, [s.predicted_time / plain for s in schedules], where="post", label="plans", marker="o", markersize=3
    )
    bounded = [(p, s.bound / plain) for p, s in zip(peaks, schedules, strict=True) if s.bound]
    if bounded:
        axes.plot(*zip(*bounded, strict=True), linestyle=":", label="no persistent schedule is below")
    axes.set_xlabel("peak of a step, MiB")
    axes.set_ylabel("time / time without recomputation")
    axes.legend()
    figure.savefig(path)
