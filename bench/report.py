"""Turns the JSON files of run.py into a Markdown table and a plot.

python bench/report.py bench/results/cpu.json --threads 1 --insert README.md --name sliding_window
python bench/report.py bench/results/*.json --op sliding_window_max --dtype float32 --plot docs/sliding_window.svg
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

from run import TIMES, error_cell, figure_cell, figure_names, floors, legend, peer_cell, peer_names, short


def parsed(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench/report.py", description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="what run.py wrote")
    parser.add_argument("--family")
    parser.add_argument("--op")
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int)
    parser.add_argument("--dtype")
    parser.add_argument("--case", default="", metavar="REGEX", help="only cases in which this is found")
    parser.add_argument("--insert", type=Path, metavar="FILE", help="put the table between its markers in this file")
    parser.add_argument("--name", default="results", help="of the markers <!-- bench:begin NAME -->")
    parser.add_argument("--plot", type=Path, nargs="+", metavar="FILE", help="SVG, PNG or PDF; instead of the table")
    parser.add_argument("--sweep", default="window", help="what the plot has on its horizontal axis")
    return parser.parse_args(arguments)


def read(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The results that were asked for, each with the report it comes from."""
    results = [
        dict(r, report=report)
        for report in (json.loads(f.read_text()) for f in options.files)
        for r in report["results"]
    ]
    for key in ("family", "op", "device", "threads", "dtype"):
        wanted = getattr(options, key)
        results = [r for r in results if wanted is None or r[key] == wanted]
    return [r for r in results if re.search(options.case, r["case"])]


# ---- table ----


def origin(report: dict[str, Any]) -> str:
    """One line that says where figures come from."""
    m, v = report["machine"], report["versions"]
    simd = f", {m['simd']}" if m.get("simd") else ""
    gpu = f"{m['gpu']['name']}, driver {m['gpu']['driver']}; " if m["gpu"] else ""
    commit = f" ({v['commit']})" if "commit" in v else ""
    made_with = f"torch {v['torch']}, pyperf_dl {v['pyperf_dl']}{commit}"
    return f"`{report['command']}`: {gpu}{m['cpu']}, {m['cores']} cores{simd}; {made_with}."


def columns(results: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Cells by column; what is the same in every row is left out."""
    shown = {"operator": [r["op"] for r in results], "case": [r["case"] for r in results]}
    shown["dtype"] = [r["dtype"] for r in results]
    shown["device"] = [r["device"] for r in results]
    shown["threads"] = [str(r["threads"]) for r in results]
    shown = {name: cells for name, cells in shown.items() if name == "case" or len(set(cells)) > 1}
    shown["ms"] = [short(r["ms"]) for r in results]
    if floors(results):
        shown[f"{TIMES} floor"] = [short(r["x_floor"]) for r in results]
    for peer in peer_names(results):
        shown[f"{TIMES} {peer}"] = [peer_cell(r["peers"].get(peer)) for r in results]
    for name in figure_names(results):
        shown[name] = [figure_cell(r, name) for r in results]
    shown["max error"] = [error_cell(r) for r in results]
    return shown


def markdown(results: list[dict[str, Any]]) -> str:
    """A table, what its columns mean, and where it comes from."""
    shown = columns(results)
    text = ("operator", "case", "dtype", "device")
    lines = [" | ".join(shown), " | ".join("---" if name in text else "--:" for name in shown)]
    lines += [" | ".join(cells) for cells in zip(*shown.values(), strict=True)]
    meaning = [line for line in (legend(results), "") if legend(results)]
    origins = dict.fromkeys(origin(r["report"]) for r in results)
    return "\n".join([*(f"| {line} |" for line in lines), "", *meaning, *origins])


def insert(text: str, file: Path, name: str) -> None:
    """Puts text between the markers of that name.

    Raises:
        ValueError: the file has no such markers.
    """
    begin, end = f"<!-- bench:begin {name} -->", f"<!-- bench:end {name} -->"
    page = file.read_text()
    if page.count(begin) != 1 or page.find(end) < page.find(begin):
        raise ValueError(f"report: {file} must hold one pair of markers {begin} {end}")
    before, _, rest = page.partition(begin)
    file.write_text(f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2]}")


# ---- plot ----

OURS, PEER, TEXT = "#c2185b", "#9e9e9e", "#616161"


def sweeps(results: list[dict[str, Any]], sweep: str) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """Results by (device, threads), each in the order of what is swept."""
    panels: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for r in results:
        if r["status"] == "ok" and r["params"].get("sweep") == sweep:
            panels.setdefault((r["device"], r["threads"]), []).append(r)
    return {key: sorted(rs, key=lambda r: r["params"][sweep]) for key, rs in sorted(panels.items())}


def spread_apart(values: list[float], gap: float) -> list[float]:
    """Ascending positions at least `gap` apart, each near its own value."""
    placed: list[list[float]] = []  # groups of values that touch
    for value in values:
        placed.append([value])
        while len(placed) > 1:
            low, high = placed[-2], placed[-1]
            middles = [sum(group) / len(group) for group in (low, high)]
            if middles[1] - middles[0] >= gap * (len(low) + len(high)) / 2:
                break
            placed[-2:] = [low + high]
    out = []
    for group in placed:
        start = sum(group) / len(group) - gap * (len(group) - 1) / 2
        out += [start + gap * n for n in range(len(group))]
    return out


def lines_of(results: list[dict[str, Any]], sweep: str) -> dict[str, tuple[list[float], list[float]]]:
    """Each peer's points: what is swept, and its time over the floor's."""
    lines: dict[str, tuple[list[float], list[float]]] = {}
    for r in results:
        for name, peer in r["peers"].items():
            if "speedup" in peer:
                xs, ys = lines.setdefault(name, ([], []))
                xs.append(r["params"][sweep])
                ys.append(peer["speedup"] * r["x_floor"])
    return lines


def label_ends(axes: Any, ends: list[tuple[str, float, float, str]], right: float) -> None:
    """Names at the right ends of lines, moved apart: those that end early stand on their line's end."""
    low, high = (math.log10(y) for y in axes.get_ylim())
    late = sorted((e for e in ends if e[1] == right), key=lambda e: e[2])
    heights = spread_apart([math.log10(y) for _, _, y, _ in late], 0.045 * (high - low))
    for (name, x, y, colour), height in zip(late, heights, strict=True):
        line = {"arrowstyle": "-", "color": PEER, "lw": 0.5, "shrinkA": 0, "shrinkB": 2}
        where = {"xytext": (1.06, (height - low) / (high - low)), "textcoords": axes.transAxes}
        axes.annotate(name, (x, y), **where, color=colour, va="center", fontsize=9, arrowprops=line)
    for name, x, y, colour in (e for e in ends if e[1] != right):
        box = {"boxstyle": "square,pad=0.1", "fc": "white", "ec": "none", "alpha": 0.8}
        axes.annotate(name, (x, y), (5, 4), textcoords="offset points", color=colour, fontsize=9, bbox=box)


def panel(axes: Any, title: str, results: list[dict[str, Any]], sweep: str) -> list[tuple[str, float, float, str]]:
    """Ours in colour with its quartiles, peers in grey, the floor at 1; returns the lines' names, ends and colours."""
    xs = [r["params"][sweep] for r in results]
    ours = [r["x_floor"] for r in results]
    ends = [("pyperf_dl", xs[-1], ours[-1], OURS)]
    for name, (px, py) in lines_of(results, sweep).items():
        axes.plot(px, py, color=PEER, lw=1.2, marker="o", ms=2.5)
        ends.append((name, px[-1], py[-1], TEXT))
    axes.fill_between(xs, *zip(*(r["x_floor_quartiles"] for r in results), strict=True), color=OURS, alpha=0.2, lw=0)
    axes.plot(xs, ours, color=OURS, lw=2.2, marker="o", ms=4)
    axes.axhline(1, color="black", lw=0.8, ls="--")
    axes.set(xscale="log", yscale="log", title=title, xlabel=f"{sweep} (elements)" if sweep == "window" else sweep)
    axes.set_xlim(xs[0] / 1.5, xs[-1] * 1.5)
    axes.annotate("floor: copy of the same bytes", (xs[0], 1), (0, -10), textcoords="offset points", fontsize=8)
    axes.grid(True, which="major", color="#eeeeee")
    axes.spines[["top", "right"]].set_visible(False)
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}" if y < 1e4 else f"{y:,.0f}")
    return ends


def plot(results: list[dict[str, Any]], sweep: str, files: list[Path]) -> None:
    """One panel for each device and number of threads.

    Raises:
        ValueError: no result belongs to that sweep, or several do to one point.
    """
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "pyperf_dl"  # the same file from the same figures
    import matplotlib.pyplot as plt

    panels = sweeps(results, sweep)
    if not panels:
        raise ValueError(f"report: no result here sweeps {sweep!r}")
    figure, grid = plt.subplots(
        1, len(panels), figsize=(6.6 * len(panels), 4.6), squeeze=False, sharey=True, layout="constrained"
    )
    ends = []
    for axes, ((device, threads), rs) in zip(grid[0], panels.items(), strict=True):
        xs = [r["params"][sweep] for r in rs]
        if len(set(xs)) < len(xs):
            raise ValueError("report: several results for one point; choose with --op, --dtype, --device, --threads")
        m = rs[0]["report"]["machine"]
        where = m["gpu"]["name"] if device == "cuda" else f"{m['cpu']}, {threads} thread{'s' * (threads > 1)}"
        shape = " x ".join(f"{n:,}" for n in rs[0]["params"].get("shape", []))
        ends.append(panel(axes, f"{rs[0]['op']}, {shape} {rs[0]['dtype']}\n{where}", rs, sweep))
        axes.title.set_fontsize(10)
    grid[0][0].set_ylim(0.5)
    for axes, names, rs in zip(grid[0], ends, panels.values(), strict=True):
        label_ends(axes, names, rs[-1]["params"][sweep])
    grid[0][0].set_ylabel("time / time of a copy")
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=150, metadata={"Date": None} if file.suffix == ".svg" else None)


def main(arguments: list[str]) -> int:
    options = parsed(arguments)
    results = read(options)
    try:
        if not results:
            raise ValueError("report: no result fits")
        if options.plot:
            plot(results, options.sweep, options.plot)
        elif options.insert:
            insert(markdown(results), options.insert, options.name)
        else:
            print(markdown(results))
    except (ValueError, ImportError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
