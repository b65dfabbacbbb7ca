"""The activation-recompute scheduler: a training step within a budget of memory, at the least extra time.

`python -m pyperf_dl.recompute --model module:callable --inputs "2x128:int64" --budget 70%` shows a plan without code.
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from typing import Any

import torch

from ._recompute_chain import Block, ChainProfile, Event, Node, Option, Schedule, Timeline
from ._recompute_memory import peak_memory
from ._recompute_offload import HostLink
from ._recompute_plan import Plan, full_peak, pareto, plan, profile
from ._recompute_report import plot_pareto, shown_bytes
from ._recompute_solver import least_budget, simulate, solve

__all__ = [
    "Block", "ChainProfile", "Event", "HostLink", "Node", "Option", "Plan", "Schedule", "Timeline",
    "full_peak", "least_budget", "pareto", "peak_memory", "plan", "plot_pareto", "profile", "simulate", "solve",
]  # fmt: skip


def _object(name: str) -> Any:
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise ValueError(f"recompute: --model must be module:callable, got {name!r}")
    sys.path.insert(0, "")
    found = importlib.import_module(module)
    for part in attribute.split("."):
        found = getattr(found, part)
    return found


def _inputs(text: str, device: str) -> tuple[torch.Tensor, ...]:
    """ "8x3x64x64, 8x16:int64" as tensors of random numbers."""
    made = []
    for item in text.split(","):
        match = re.fullmatch(r"\s*(\d+(?:x\d+)*)(?::(\w+))?\s*", item)
        dtype = getattr(torch, match.group(2) or "float32", None) if match else None
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"recompute: --inputs must be shapes such as 8x3x64x64 or 2x128:int64, got {item!r}")
        shape = [int(n) for n in match.group(1).split("x")]
        made.append(
            torch.randn(shape, device=device, dtype=dtype)
            if dtype.is_floating_point
            else torch.zeros(shape, device=device, dtype=dtype)
        )
    return tuple(made)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pyperf_dl.recompute", description="Measures a model and shows a plan for a budget of memory."
    )
    parser.add_argument("--model", required=True, help="module:callable that returns the model, or module:model")
    parser.add_argument("--inputs", required=True, help="shapes of its arguments, such as 8x3x64x64 or 2x128:int64")
    parser.add_argument("--budget", default="70%", help="such as 6GiB or 70%% (the default) of the peak")
    parser.add_argument("--blocks", nargs="+", help="a container, or the blocks in order; default: found by itself")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--optimizer", help="a class of torch.optim, whose state counts")
    parser.add_argument("--selective", action="store_true", help="blocks may keep outputs of expensive operators alone")
    parser.add_argument("--plot", metavar="FILE", help="draw the plan")
    parser.add_argument("--pareto", metavar="FILE", help="draw time over memory for other budgets")
    parser.add_argument("--save", metavar="FILE", help="write the plan as JSON")
    options = parser.parse_args(arguments)
    try:
        model = _object(options.model)
        model = (model if isinstance(model, torch.nn.Module) else model()).to(options.device).train()
        optimizer = getattr(torch.optim, options.optimizer)(model.parameters()) if options.optimizer else None
        blocks = options.blocks[0] if options.blocks and len(options.blocks) == 1 else options.blocks
        inputs = _inputs(options.inputs, options.device)
        how = {"budget": options.budget, "optimizer": optimizer, "blocks": blocks, "selective": options.selective}
        made = plan(model, inputs, **how)
    except (ValueError, TypeError, RuntimeError, ImportError, AttributeError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    print(made)
    print(f"without recomputation: {shown_bytes(full_peak(made.profile))}")
    if options.plot:
        made.plot(options.plot)
    if options.pareto:
        plot_pareto(made.profile, pareto(made.profile), options.pareto)
    if options.save:
        made.save(options.save)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
