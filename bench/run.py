"""Measures and reports: `python bench/run.py --family F --device cpu|cuda --threads N --quick|--full --out FILE`."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import harness
import machine
from harness import Budget, Case, optional


def parsed(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench/run.py", description=__doc__.split(":")[0])
    parser.add_argument("--family", choices=sorted(harness.families()), help="default: all")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, nargs="+", help="default: 1 and all cores (one on a GPU: the host's)")
    parser.add_argument("--backend", choices=("native", "triton", "reference"), help="default: the best there is")
    parser.add_argument("--case", default="", metavar="SUBSTR", help="only cases whose 'op name dtype' holds this")
    parser.add_argument("--no-table", action="store_true", help="only the file")
    parser.add_argument("--no-peers", action="store_true", help="only ours and the floor")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="a choice of cases, in minutes (the default)")
    size.add_argument("--full", action="store_true", help="every case, each output checked, peers on larger inputs")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the results as JSON")
    options = parser.parse_args(arguments)
    if options.threads is None:
        options.threads = [1] if options.device == "cuda" else sorted({1, machine.cores()})
    if min(options.threads) < 1:
        parser.error(f"--threads must be at least 1, got {min(options.threads)}")
    return options


def chosen(options: argparse.Namespace) -> list[Case]:
    cases = harness.discovered(options.family, options.device, options.full)
    cases = [case for case in cases if options.case.lower() in case.title.lower()]
    for case in cases:
        if options.no_peers:
            case.peers = {}
    return cases


# ---- progress and table ----

TIMES = "\u00d7"


def floors(results: list[dict[str, Any]]) -> list[str]:
    """What the floors are."""
    found = dict.fromkeys(r.get("floor", harness.COPY_IS) for r in results)
    return [floor for floor in found if floor is not None]


def legend(results: list[dict[str, Any]]) -> str:
    """What the columns of a table mean."""
    said = []
    if floors(results):
        said.append(f"{TIMES} floor: our time / time of {', or of '.join(floors(results))}.")
    if peer_names(results) or not figure_names(results):
        said += [f"{TIMES} peer: peer's time / ours.", "~: measured on a part of the work."]
    return " ".join(said)


def with_progress(steps: Iterable[tuple[str, Any]], total: int) -> Iterator[Any]:
    """Yields what the steps hold, showing how far they are."""
    progress = optional("rich.progress")
    console = optional("rich.console")
    if progress is None or not console.Console(stderr=True).is_terminal:
        for n, (title, value) in enumerate(steps, 1):
            if n % 20 == 0 or n == total:
                print(f"{n}/{total} {title}", file=sys.stderr, flush=True)
            yield value
        return
    columns = ("{task.percentage:>3.0f}%", progress.BarColumn(), progress.TimeElapsedColumn(), "{task.description}")
    with progress.Progress(*columns, console=console.Console(stderr=True)) as bar:
        task = bar.add_task("", total=total)
        for title, value in steps:
            bar.update(task, advance=1, description=title)
            yield value


def short(value: float | None) -> str:
    """Three digits at most, for ratios and times."""
    if value is None:
        return "-"
    if value >= 9995:
        return f"{value / 1000:.0f}k"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}" if value >= 10 else f"{value:.2f}"


def peer_cell(peer: dict[str, Any] | None) -> str:
    """How many times ours the peer takes; ~ for one measured on a part of the work."""
    if peer is None:
        return ""
    if "error" in peer:
        return "n/a"
    return ("~" if "measured_part" in peer else "") + short(peer["speedup"])


def error_cell(result: dict[str, Any]) -> str:
    error = result["max_error"]
    shown = "" if error is None else "0" if error == 0 else f"{error:.2g}"
    return shown if result["status"] == "ok" else f"{result['status']} {shown}".strip()


def peer_names(results: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for r in results for name in r["peers"]))


def figure_names(results: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for r in results for name in r.get("figures", {})))


def figure_cell(result: dict[str, Any], name: str) -> str:
    figures = result.get("figures", {})
    return short(figures[name]) if name in figures else ""


def table_columns(results: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Cells by column."""
    shown = {
        "operator": [r["op"] for r in results],
        "case": [r["case"] for r in results],
        "dtype": [r["dtype"] for r in results],
        "threads": [str(r["threads"]) for r in results],
        "ms": [short(r["ms"]) for r in results],
    }
    if not any(shown["dtype"]):
        del shown["dtype"]
    if floors(results):
        shown[f"{TIMES} floor"] = [short(r["x_floor"]) for r in results]
    for name in peer_names(results):
        shown[f"{TIMES} {name}"] = [peer_cell(r["peers"].get(name)) for r in results]
    for name in figure_names(results):
        shown[name] = [figure_cell(r, name) for r in results]
    return shown | {"max error": [error_cell(r) for r in results]}


def tables(results: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Results by table: one, and beside it one for each operator that has columns of its own."""
    own = dict.fromkeys(r["op"] for r in results if "figures" in r)
    found = [[r for r in results if r["op"] not in own], *([r for r in results if r["op"] == op] for op in own)]
    return [table for table in found if table]


def print_table(results: list[dict[str, Any]]) -> None:
    """One table; with rich where it is installed."""
    columns = table_columns(results)
    rows = list(zip(*columns.values(), strict=True))
    rich_table, rich_console = optional("rich.table"), optional("rich.console")
    if rich_table is None:
        for row in (columns, *rows):
            print(" | ".join(row))
        print(legend(results))
        return
    table = rich_table.Table(title="pyperf_dl", caption=legend(results))
    for name in columns:
        is_text = name in ("operator", "case", "dtype")
        table.add_column(name, justify="left" if is_text else "right", no_wrap=is_text)
    for row, result in zip(rows, results, strict=True):
        table.add_row(*row, style=None if result["status"] == "ok" else "bold red")
    console = rich_console.Console()
    if not console.is_terminal:
        console = rich_console.Console(width=max(console.width, 200))
    console.print(table)


def print_notes(results: list[dict[str, Any]]) -> None:
    """Failures, and why peers are missing."""
    for r in harness.failures(results):
        print(f"{r['status']}: {r['op']} {r['case']} {r['dtype']}, {r['threads']} threads: {r['message']}")
    reasons = {f"{name}: {peer['error']}" for r in results for name, peer in r["peers"].items() if "error" in peer}
    for reason in sorted(reasons):
        print(f"n/a  {reason}")


# ---- the run ----


def measured(cases: list[Case], threads: list[int], budget: Budget) -> list[dict[str, Any]]:
    steps = ((case.title, result) for case in cases for result in harness.run_case(case, threads, budget))
    return list(with_progress(steps, sum(len(case.threads(threads)) for case in cases)))


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    budget = harness.FULL if options.full else harness.QUICK
    work: Callable[[], list[dict[str, Any]]] = lambda: measured(chosen(options), options.threads, budget)  # noqa: E731
    if options.backend:
        with harness.pyperf_dl.backend(options.backend):
            return work()
    return work()


def each_family(arguments: list[str]) -> list[dict[str, Any]]:
    """Every family in a process of its own: what one leaves in the heap and the caches would slow the next."""
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for family in harness.families():
            out = Path(folder, f"{family}.json")
            own = ["--family", family, "--out", str(out), "--no-table"]
            subprocess.run([sys.executable, __file__, *arguments, *own], check=False)
            if not out.exists():
                raise SystemExit(f"the benchmarks of {family} ended without results")
            results += json.loads(out.read_text())["results"]
    return results


def main(arguments: list[str]) -> int:
    options = parsed(arguments)
    machine.keep_freed_memory()
    harness.pin_peers(max(options.threads))
    warnings.filterwarnings("ignore", module="torch")  # what peers' paths warn of is no result
    begin = time.monotonic()
    results = run(options) if options.family or len(harness.families()) == 1 else each_family(arguments)
    report = {
        "machine": machine.machine(options.device),
        "versions": machine.versions(),
        "command": machine.command_line(arguments),
        "seconds": round(time.monotonic() - begin),
        "results": results,
    }
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    if options.no_table:
        return 1 if harness.failures(results) else 0
    for table in tables(results):
        print_table(table)
    failed = harness.failures(results)
    print_notes(results)
    if not results:
        print("no case fits")
    return 1 if failed or not results else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
