"""Runs every operator against its reference on this machine: `python -m pyperf_dl.check [--quick] [--json]`.

Every device that is there, every backend that can run on it, every dtype. Exit status 1 on a miss.

A family takes part through a function in `pyperf_dl/reference/<stem>.py`:

    def check_cases(device: str, quick: bool) -> Iterator[tuple]:
        yield op, case, dtype, run, expected, tolerance

`op` and `case` are names for the table. `run()` calls the public operator on tensors of that device and `expected()`
gives what the reference makes of the same input; both return a tuple of tensors, `expected` on the CPU. `tolerance`
bounds |run - expected| / max(1, |expected|); 0 asks for the same bits (any NaN equals any NaN).
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

import pyperf_dl

from . import _backend, env


class Result(NamedTuple):
    """One case on one backend; `problem` is empty where it agrees."""

    family: str
    op: str
    case: str
    dtype: str
    device: str
    backend: str
    error: float
    problem: str


def unavailable(device: str, backend: str) -> str:
    """Why a backend cannot be checked on a device; empty where it can."""
    if backend == "native":
        if _backend._C is None:
            return f"the compiled library is not there ({_backend.native_error})"
        if device == "cuda":
            return _backend.cuda_problem()
        return "" if device == "cpu" else f"no compiled kernels for {device}"
    if backend == "triton":
        if not _backend.triton_installed():
            return "triton is not installed"
        if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            return "needs a GPU, or TRITON_INTERPRET=1"
    return ""


def check(
    devices: Sequence[str], backends: Sequence[str], families: Sequence[str], quick: bool = False
) -> Iterator[Result]:
    """Every case of the families, on the devices and backends given.

    >>> from pyperf_dl import check
    >>> results = list(check.check(["cpu"], ["reference"], ["sliding_window"], quick=True))
    >>> [r.case for r in results if r.problem]
    []
    """
    for family in families:
        module = importlib.import_module(f"pyperf_dl.reference.{family}")
        for device in devices:
            able = [backend for backend in backends if not unavailable(device, backend)]
            for op, case, dtype, run, expected, tolerance in module.check_cases(device, quick) if able else ():
                wanted = expected()
                for backend in able:
                    error, problem = _compared(backend, run, wanted, tolerance)
                    dtype_name = str(dtype).removeprefix("torch.")
                    yield Result(family, op, case, dtype_name, device, backend, error, problem)


def _compared(backend: str, run: Any, wanted: Any, tolerance: float) -> tuple[float, str]:
    try:
        with _backend.backend(backend), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            got = run()
    except Exception as problem:
        return math.nan, f"{type(problem).__name__}: {problem}"
    if len(got) != len(wanted):
        return math.nan, f"{len(got)} outputs where the reference has {len(wanted)}"
    found = [difference(g.detach().cpu(), w, tolerance) for g, w in zip(got, wanted, strict=True)]
    return max(error for error, _ in found), next((f"output {i}: {p}" for i, (_, p) in enumerate(found) if p), "")


def difference(got: torch.Tensor, want: torch.Tensor, tolerance: float) -> tuple[float, str]:
    """(largest error, what is wrong with it); the error is relative to max(1, |want|)."""
    if got.dtype != want.dtype or got.shape != want.shape:
        return math.nan, f"{got.dtype} {list(got.shape)} where the reference has {want.dtype} {list(want.shape)}"
    same = got == want
    if want.is_floating_point():
        same = (same & (got.signbit() == want.signbit())) | (got.isnan() & want.isnan())
    if same.all():
        return 0.0, ""
    a, b = got.double(), want.double()
    error = torch.where(same, 0.0, ((a - b).abs() / b.abs().clamp(min=1)).nan_to_num(math.inf, math.inf))
    worst = int(error.argmax()) if error.any() else int((~same).flatten().int().argmax())
    largest = float(error.max())
    if tolerance and largest <= tolerance:
        return largest, ""
    at = list(map(int, torch.unravel_index(torch.tensor(worst), got.shape)))
    wrong = f"{int((~same).sum())} of {same.numel()} differ, first or worst at {at}"
    return largest, f"{wrong}: {got.flatten()[worst].item()} where the reference has {want.flatten()[worst].item()}"


def _rows(results: Sequence[Result]) -> list[list[str]]:
    """One row for each operator, device and backend."""
    groups: dict[tuple[str, ...], list[Result]] = {}
    for r in results:
        groups.setdefault((r.family, r.op, r.device, r.backend), []).append(r)
    rows = []
    for key, group in groups.items():
        error = max((r.error for r in group if not math.isnan(r.error)), default=math.nan)
        misses = sum(bool(r.problem) for r in group)
        verdict = "ok" if not misses else f"{misses} WRONG"
        rows.append(
            [*key, str(len({r.dtype for r in group})), str(len(group)), f"{error:.1e}" if error else "0", verdict]
        )
    return rows


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    header = ["family", "operator", "device", "backend", "dtypes", "cases", "max error", "verdict"]
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        for row in [header, *rows]:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        return
    table = Table(*header, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    Console(width=max(100, Console().width)).print(table)


def _print_report(results: Sequence[Result], missing: Sequence[str], seconds: float) -> None:
    _print_table(_rows(results))
    for line in missing:
        print(f"not checked: {line}")
    wrong = [r for r in results if r.problem]
    for r in wrong[:20]:
        print(f"WRONG {r.op} [{r.case}] {r.dtype} {r.device} {r.backend}: {r.problem}")
    if len(wrong) > 20:
        print(f"... and {len(wrong) - 20} more; --json lists all")
    print(f"pyperf_dl {pyperf_dl.__version__}, torch {torch.__version__}, {seconds:.1f} s")
    print(f"{len(results) - len(wrong)} passed, {len(wrong)} failed")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pyperf_dl.check", description="Runs every operator against its reference on this machine."
    )
    parser.add_argument("--device", choices=env.device_types(), help="only this one")
    parser.add_argument("--backend", choices=_backend.NAMES, help="only this one")
    parser.add_argument("--family", choices=env.families(), help="only this one")
    parser.add_argument("--quick", action="store_true", help="fewer and smaller cases")
    parser.add_argument("--json", action="store_true", help="print one JSON object with every single result")
    options = parser.parse_args(arguments)
    devices = [options.device] if options.device else env.device_types()
    backends = [options.backend] if options.backend else _backend.NAMES
    families = [options.family] if options.family else env.families()
    reasons = {(device, backend): unavailable(device, backend) for device in devices for backend in backends}
    missing = [f"{backend} on {device}: {reason}" for (device, backend), reason in reasons.items() if reason]
    start = time.perf_counter()
    results = list(check(devices, backends, families, options.quick))
    seconds = time.perf_counter() - start
    if options.json:
        listed = [r._asdict() | {"error": None if math.isnan(r.error) else r.error} for r in results]
        versions = env.report()["versions"]
        print(
            json.dumps({"versions": versions, "seconds": seconds, "not_checked": missing, "results": listed}, indent=1)
        )
    else:
        _print_report(results, missing, seconds)
    return 1 if not results or any(r.problem for r in results) else 0


if __name__ == "__main__":
    raise SystemExit(main())
