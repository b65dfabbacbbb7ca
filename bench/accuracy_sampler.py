"""Errors of one step of a sampler against float64, over those of rounding once, beside those of diffusers' schedulers.

python bench/accuracy_sampler.py [--insert docs/sampler.md]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from bench_sampler import FAMILY, METHODS, ROW, SCALE, SEED, Spec, diffusers_step, inputs_of, ours, prepared, table_of
from harness import pyperf_dl
from report import insert

SHAPE = (16, 4, 64, 64)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def rms(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want).square().mean().sqrt())


def noise_of(spec: Spec) -> torch.Tensor:
    return torch.randn(spec.shape, generator=torch.Generator().manual_seed(SEED), dtype=spec.dtype)


def in_float64(spec: Spec, inputs: Any) -> torch.Tensor:
    """The step of the same numbers, and the same noise, in plain PyTorch."""
    table = table_of(spec.name)
    x, cond, uncond, *history = (t.double() for t in inputs)
    how: dict[str, Any] = {"uncond": uncond, "guidance": SCALE, "history": tuple(history), "clip": spec.method.clip}
    with pyperf_dl.backend("reference"):
        noise = noise_of(spec).double() if table.noisy[ROW] else None
        return pyperf_dl.sampler_step(x, cond, table, ROW, noise=noise, **how).sample


def row(name: str) -> str:
    """One sampler: ours and diffusers' in each dtype. Theirs includes that their schedules are rounded to float32."""
    cells = []
    for dtype in DTYPES:
        spec = Spec(name, SHAPE, dtype, "cpu")
        inputs = inputs_of(spec)(torch.Generator().manual_seed(0))
        truth = in_float64(spec, inputs)
        once = rms(truth.to(dtype), truth)
        cells.append(f"{rms(ours(spec, inputs)[0], truth) / once:.2f}")
        try:
            theirs = diffusers_step(spec, prepared(spec, inputs))
            cells.append(f"{rms(theirs, truth) / once:.2f}")
        except (ImportError, AttributeError):
            cells.append("")
    return f"| {name} | {' | '.join(cells)} |"


def markdown() -> str:
    names = " | ".join(f"{str(d).removeprefix('torch.')} | diffusers" for d in DTYPES)
    head = [
        f"RMS error of guidance (scale {SCALE}) and one step of normal tensors, over that of rounding what float64 "
        "gives:\n",
        f"| sampler | {names} |",
        "| --- |" + " --: |" * (2 * len(DTYPES)),
    ]
    return "\n".join([*head, *map(row, METHODS)])


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="bench/accuracy_sampler.py", description=__doc__.split("\n")[0])
    parser.add_argument("--insert", type=Path, metavar="FILE", help="put the table between its markers in this file")
    options = parser.parse_args(arguments)
    text = markdown()
    print(text) if options.insert is None else insert(text, options.insert, f"accuracy_{FAMILY}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
