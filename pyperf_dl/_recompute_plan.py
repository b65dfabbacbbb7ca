"""A plan: the schedule of a model's blocks for a budget, and the model that runs it."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ._autograd import _are_functorch_transforms_active
from ._recompute_blocks import Blocks, Chain
from ._recompute_calls import OP, Call, Leaf, intercept, is_intercepted, plain_call, signature_of_call
from ._recompute_chain import ChainProfile, Schedule, Timeline, keep_everything
from ._recompute_execute import Executor, Options, Segment, depth_of, frame_bytes, items_of_model
from ._recompute_offload import HostLink
from ._recompute_profile import Measured, job_of, measure
from ._recompute_report import plot_plan, shown_bytes, table_of
from ._recompute_selective import Selective, operator_names
from ._recompute_solver import least_budget, simulate, solve

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_RESERVE = 0.05  # of a device's memory, which budget="fit" leaves
_STATE = ("state_bytes", "drawn_bytes", "random_bytes", "operators", "needed")
_TRIES = 3
_ON_NEW_SHAPES = ("replan", "error", "keep")


def budget_bytes(budget: int | str, full_peak: int, device: torch.device) -> int:
    """Of a number of bytes, "6GiB", "500 MB", "70%" of the peak without recomputation, or "fit"."""
    rule = f"{OP}: budget must be bytes, a size such as '6GiB' or '500 MB', a part such as '70%', 'fit', or 'least'"
    if isinstance(budget, bool) or not isinstance(budget, (int, str)):
        raise TypeError(f"{rule}, got {budget!r} of {type(budget).__name__}")
    if isinstance(budget, int):
        amount = budget
    elif budget.strip().lower() == "fit":
        if device.type != "cuda":
            raise ValueError(f"{OP}: budget='fit' is for CUDA devices, got a model on {device}; pass bytes")
        free, total = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        amount = free + cached + torch.cuda.memory_allocated(device) - int(_RESERVE * total)
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(%|[a-zA-Z]*)\s*", budget)
        unit = match.group(2).lower() if match else "?"
        if (unit != "%" and unit not in _UNITS) or float(match.group(1)) > 1e15:
            raise ValueError(f"{rule}, got {budget!r}")
        number = float(match.group(1))
        amount = round(number * full_peak / 100) if unit == "%" else int(number * _UNITS[unit])
    if amount <= 0:
        raise ValueError(f"{rule}, and > 0, got {budget!r}")
    return amount


def plan(
    model: nn.Module,
    inputs: Any,
    *,
    budget: int | str,
    loss_fn: Callable[[Any], torch.Tensor] | None = None,
    optimizer: torch.optim.Optimizer | int | None = None,
    blocks: Blocks = None,
    generators: Sequence[torch.Generator] = (),
    offload: bool | HostLink = False,
    selective: Selective = False,
    group: Any = None,
    on_new_shapes: str | None = None,
    time_limit: float | None = 10.0,
    progress: bool = False,
) -> Plan:
    """Which activations of a model to keep and which to compute again, so that a training step stays within a budget
    of memory at the least extra time.

    Measures the model's chain of blocks (`profile`) and solves for the best persistent schedule (`solve`).
    ``plan.apply()`` makes the model run it.

    Args:
        model: on the device it trains on, in the mode it trains in; not yet wrapped in DDP or FSDP.
        inputs: of a training step: a tensor, a tuple of arguments, or a dict of keyword arguments.
        budget: the peak of the whole step as the allocator counts it: parameters, gradients, optimizer state, inputs,
            activations. Bytes, ``"6GiB"``, ``"500 MB"``, ``"70%"`` of the peak without recomputation, ``"fit"``: what
            is free on the CUDA device, less 5 % of its memory, or ``"least"``: as little as possible.
        loss_fn: the loss of the model's output. None: the output's ``loss``, or the output itself where it is one
            number, or else the sum of the means of its tensors.
        optimizer: whose state counts; or bytes. None: none.
        blocks: the name of a container, or names or modules in the order of the forward. None: the longest chain among
            the children of the model's ``nn.Sequential`` and ``nn.ModuleList``.
        generators: that the blocks draw from, beside the default ones.
        offload: whether what a block saves may also wait in the host's pinned memory; CUDA, or a `HostLink`.
        selective: whether a block may also keep the outputs of expensive operators alone (products of matrices,
            convolutions, attention), and compute the rest again in its backward. Or the operators: a collection of
            ``torch.ops.aten.addmm`` or its overloads, none that write to an argument, give a view or cast.
        group: a ``torch.distributed`` process group, all of whose processes make this call: they get the same plan, for
            the largest bytes and the mean times that they measured.
        on_new_shapes: what to do when the model gets inputs of other shapes in training: ``"replan"`` (None without a
            group) makes and keeps another plan with the same budget, ``"error"`` raises, ``"keep"`` (None with one)
            goes on with this plan, whose budget then holds for inputs that are not larger.
        time_limit: seconds for the solver, which then returns the best schedule so far, and its gap.
        progress: shows a bar (needs rich).

    Returns:
        Plan: not applied yet.

    Raises:
        TypeError, ValueError: a budget below the least feasible one, which the message names with the block that
            decides it; blocks that are no chain, or change their input in place, or are not the same when run again.

    Gradients, outputs, buffers and random numbers are those of the model without a plan, bit for bit, where its
    operators are deterministic. Beaumont et al.: Optimal checkpointing for heterogeneous chains (HAL hal-02352969).

    >>> from pyperf_dl import recompute
    >>> model = torch.nn.Sequential(*[torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU()) for _ in range(8)])
    >>> plan = recompute.plan(model, torch.randn(512, 64), budget="75%")
    >>> plan.predicted_peak <= plan.budget
    True
    >>> model = plan.apply()
    """
    if on_new_shapes is None:
        on_new_shapes = "replan" if group is None else "keep"
    if on_new_shapes not in _ON_NEW_SHAPES:
        raise ValueError(f"{OP}: on_new_shapes must be one of {', '.join(_ON_NEW_SHAPES)}, got {on_new_shapes!r}")
    if group is not None and on_new_shapes == "replan":
        raise ValueError(
            f"{OP}: on_new_shapes='replan' is not for a group, whose processes may get other shapes; 'keep' or 'error'"
        )
    if isinstance(budget, bool) or not isinstance(budget, (int, str)):
        budget_bytes(budget, 0, torch.device("cpu"))
    job = job_of(model, inputs, loss_fn)
    link = _link_of(offload, job.device)
    how = {"optimizer": optimizer, "blocks": blocks, "generators": generators, "link": link, "progress": progress}
    how["operators"] = operator_names(f"{OP}.plan", selective)
    measured = measure(job, **how)
    if group is None:
        amount, schedule = _solved(measured, budget, job.device, time_limit)
    else:
        measured, amount, schedule = _solved_together(measured, budget, job.device, time_limit, group)

    def again(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Measured, Schedule]:
        found = measure(job._replace(args=args, kwargs=kwargs), **how)
        return found, _solved(found, amount, job.device, time_limit)[1]

    return Plan(model, measured, schedule, amount, tuple(generators), link, on_new_shapes, again)


def _link_of(offload: bool | HostLink, device: torch.device) -> HostLink | None:
    if isinstance(offload, HostLink):
        if offload.device.type != device.type:
            raise ValueError(
                f"{OP}: offload must be a link of the model's device {device}, got one of {offload.device}"
            )
        return offload
    if not isinstance(offload, bool):
        raise TypeError(f"{OP}: offload must be a bool or a HostLink, got {type(offload).__name__}")
    if offload and device.type != "cuda":
        raise ValueError(f"{OP}: offload=True is for models on CUDA devices, got one on {device}")
    return HostLink(device) if offload else None


def profile(
    model: nn.Module,
    inputs: Any,
    *,
    loss_fn: Callable[[Any], torch.Tensor] | None = None,
    optimizer: torch.optim.Optimizer | int | None = None,
    blocks: Blocks = None,
    generators: Sequence[torch.Generator] = (),
    selective: Selective = False,
    device: str | None = None,
    progress: bool = False,
) -> ChainProfile:
    """Times and bytes of a model's chain of blocks.

    Nine forwards and four backwards of each block, of which none keeps the activations of more than one; with
    `selective` fourteen and six. The model, its buffers, gradients and mode, and the generators are left as they were.
    Times are medians over the steps, and over blocks that are alike; bytes are the allocator's own, see `peak_memory`.

    Args:
        model, inputs, loss_fn, optimizer, blocks, generators, progress: see `plan`.
        selective: see `plan`. `Block.options` then has "selective" behind "keep", where that keeps less.
        device: ``"meta"`` predicts without running: the operators get tensors without data, so that a model which does
            not fit can be looked at; it may lie on the device "meta" itself. Bytes are those of what operators return,
            not of what they allocate within themselves; times are those of a machine of 200 TFLOP/s and 2 TB/s.

    Raises:
        TypeError, ValueError: see `plan`.

    Returns:
        ChainProfile: its first and last entries are what lies before and behind the blocks.

    >>> from pyperf_dl import recompute
    >>> model = torch.nn.Sequential(*[torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh()) for _ in range(3)])
    >>> chain = recompute.profile(model, torch.randn(4, 8))
    >>> [(block.name, block.output_bytes) for block in chain.blocks[1:-1]]
    [('0', 128), ('1', 128), ('2', 128)]
    """
    if device not in (None, "meta"):
        raise ValueError(f"{OP}.profile: device must be None, the model's own, or 'meta', got {device!r}")
    return measure(
        job_of(model, inputs, loss_fn),
        without_data=device == "meta",
        optimizer=optimizer,
        blocks=blocks,
        generators=generators,
        operators=operator_names(f"{OP}.profile", selective),
        progress=progress,
    ).profile


def pareto(chain: ChainProfile, points: int = 20) -> list[Schedule]:
    """The best schedules for budgets between the least feasible one and that without recomputation.

    Args:
        chain: see `profile`.
        points: how many budgets.

    Returns:
        list[Schedule]: by budget; each `predicted_peak` and `predicted_time` is a point of the trade.

    >>> from pyperf_dl import recompute
    >>> chain = recompute.ChainProfile.from_lists(
    ...     forward=[1] * 4, backward=[2] * 4, output_bytes=[10] * 4, saved_bytes=[50] * 4
    ... )
    >>> [(schedule.predicted_peak, schedule.predicted_time) for schedule in recompute.pareto(chain, 3)]
    [(80, 18.0), (130, 14.0), (220, 12.0)]
    """
    if not isinstance(points, int) or isinstance(points, bool) or points < 2:
        raise ValueError(f"{OP}.pareto: points must be an int >= 2, got {points!r}")
    least, most = least_budget(chain)[0], full_peak(chain)
    step = (most - least) / (points - 1)
    return [solve(chain, least + round(k * step)) for k in range(points)]


def full_peak(chain: ChainProfile) -> int:
    """Bytes of a step without recomputation.

    >>> from pyperf_dl import recompute
    >>> chain = recompute.ChainProfile.from_lists(
    ...     forward=[1, 1], backward=[2, 2], output_bytes=[10, 10], saved_bytes=[50, 50]
    ... )
    >>> recompute.full_peak(chain)
    120
    """
    return simulate(chain, keep_everything(chain)).peak


def _solved(
    measured: Measured, budget: int | str, device: torch.device, time_limit: float | None
) -> tuple[int, Schedule]:
    """The budget in bytes, and a schedule that fits in it with what its segments hold to be run again."""
    chain, held = measured.profile, 0
    if isinstance(budget, str) and budget.strip().lower() == "least":
        schedule, _ = _least(measured, time_limit)
        return schedule.predicted_peak, schedule
    amount = budget_bytes(budget, full_peak(chain), device)
    for _ in range(_TRIES):
        try:
            schedule = _solved_for_execution(chain, amount - held, time_limit)
        except ValueError:
            break
        needed = _held_bytes(measured, schedule)
        if schedule.predicted_peak + needed <= amount:
            return amount, dataclasses.replace(schedule, predicted_peak=schedule.predicted_peak + needed)
        held = max(needed, held + 1)
    schedule, block = _least(measured, time_limit)
    least = schedule.predicted_peak
    if least <= amount:
        return amount, schedule
    raise ValueError(
        f"{OP}: budget must be at least {least} bytes ({shown_bytes(least)}), which block "
        f"{chain.blocks[block].name} needs, got {budget!r} ({amount} bytes)"
    )


def _solved_together(
    measured: Measured, budget: int | str, device: torch.device, time_limit: float | None, group: Any
) -> tuple[Measured, int, Schedule]:
    """The group's first process solves for all; its error is everybody's."""
    import torch.distributed as dist

    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, measured.profile.to_json(), group=group)
    measured = measured._replace(profile=ChainProfile.merged([ChainProfile.from_json(data) for data in gathered]))
    answer: list[Any] = [None, None]
    if dist.get_rank(group) == 0:
        try:
            amount, schedule = _solved(measured, budget, device, time_limit)
            answer = [amount, schedule.to_json()]
        except (ValueError, TypeError) as error:
            answer = [None, str(error)]
    dist.broadcast_object_list(answer, src=dist.get_global_rank(group, 0), group=group)
    amount, found = answer
    if amount is None:
        raise ValueError(found)
    return measured, amount, Schedule.from_json(found)


def _least(measured: Measured, time_limit: float | None) -> tuple[Schedule, int]:
    """A schedule with the least peak, and the block that decides it. Segments in segments hold more to be run again, so
    that the least peak of the chain alone need not be the least. Other options than the first one would not lower it by
    more than what they hold."""
    first = tuple(block._replace(options=block.options[:1]) for block in measured.profile.blocks)
    chain = dataclasses.replace(measured.profile, blocks=first)
    least, block = least_budget(chain)
    room = full_peak(chain) - least
    found = [solve(chain, least + round(part * room), time_limit=time_limit) for part in (0, 0.02, 0.05, 0.1, 0.2, 1)]
    peaks = [schedule.predicted_peak + _held_bytes(measured, schedule) for schedule in found]
    best = min(range(len(found)), key=peaks.__getitem__)
    return dataclasses.replace(found[best], predicted_peak=peaks[best]), block


def _solved_for_execution(chain: ChainProfile, amount: int, time_limit: float | None) -> Schedule:
    """Blocks that run again do not wait on the host: a checkpoint keeps what they save in its own way. The solver does
    not know that, so that blocks for which it plans both lose the choice, until there are none."""
    first = schedule = solve(chain, amount, time_limit=time_limit)
    while both := [
        k
        for k, (runs, option) in enumerate(zip(schedule.replays, schedule.kept_options, strict=True))
        if runs and chain.blocks[k].options[option].label == "offload"
    ]:
        chain = _without_offload(chain, both)
        schedule = solve(chain, amount, time_limit=time_limit)
    return dataclasses.replace(schedule, bound=first.bound, flat_bound=first.flat_bound)


def _without_offload(chain: ChainProfile, which: Collection[int]) -> ChainProfile:
    """It is the last option of a block, so that the others keep their numbers."""
    blocks = tuple(b._replace(options=b.options[:-1]) if k in which else b for k, b in enumerate(chain.blocks))
    return dataclasses.replace(chain, blocks=blocks)


def _held_bytes(measured: Measured, schedule: Schedule) -> int:
    """The most that segments hold to be run again: buffers that blocks change, and states of generators."""

    def own(segment: Segment) -> int:
        blocks = slice(segment.first, segment.end)
        random = min(sum(measured.drawn_bytes[blocks]), measured.random_bytes)
        return sum(measured.state_bytes[blocks]) + random

    items = items_of_model(schedule, measured.profile.blocks)
    held = [frame_bytes([item], own) for item in items]
    # While one runs again, it holds the state of before, and those within it are there twice; one that runs for the
    # first time looks at all generators.
    return sum(held) + max(held) + depth_of(items) * measured.random_bytes


class Plan:
    """A schedule for a model; `print` shows it block by block.

    Attributes:
        profile: the `ChainProfile` it was solved for.
        schedule: the `Schedule`.
        budget: bytes.
        predicted_peak: bytes of the whole step.
        predicted_time: seconds of forward and backward.
        gap: how much longer than the best persistent schedule it may take, as a part of that.
    """

    def __init__(
        self,
        model: nn.Module | None,
        measured: Measured,
        schedule: Schedule,
        budget: int,
        generators: tuple[torch.Generator, ...] = (),
        link: HostLink | None = None,
        on_new_shapes: str = "keep",
        again: Callable[..., tuple[Measured, Schedule]] | None = None,
    ) -> None:
        self._model, self._measured, self.schedule, self.budget = model, measured, schedule, budget
        self._generators, self._link, self._on_new_shapes, self._again = generators, link, on_new_shapes, again
        self._others: dict[str, tuple[Measured, Schedule]] = {}
        self._executor: Executor | None = None
        self._model_before: Any = None

    @property
    def profile(self) -> ChainProfile:
        return self._measured.profile

    @property
    def predicted_peak(self) -> int:
        return self.schedule.predicted_peak

    @property
    def predicted_time(self) -> float:
        return self.schedule.predicted_time

    @property
    def gap(self) -> float:
        return self.schedule.gap

    @property
    def timeline(self) -> Timeline:
        """The step, event by event."""
        return simulate(self.profile, self.schedule)

    # ---- the model ----

    def apply(self, model: nn.Module | None = None) -> nn.Module:
        """Makes the model run the plan, and returns it.

        Parameters, names, state_dict and hooks are as before; a copy or a pickle of the model is one without a plan.
        Nothing is run again where gradients are off.

        Args:
            model: None for the one that was measured. Another one must have blocks of the same names and parameters:
                a copy, or a model for which the plan was loaded.
        """
        if self._executor is not None:
            raise ValueError(f"{OP}: the plan is applied already; call remove() first")
        if model is None:
            model = self._model
        if model is None:
            raise ValueError(f"{OP}: a plan that was loaded needs the model: apply(model)")
        if not isinstance(model, nn.Module):
            raise TypeError(f"{OP}: model must be a torch.nn.Module, got {type(model).__name__}")
        if any(is_intercepted(module) for module in model.modules()):
            raise ValueError(f"{OP}: model runs another plan; call its remove() first")
        if model is not self._model:
            self._measured = self._measured._replace(chain=self._measured.chain.of(model))
            self._model, self._again = model, None
        self._model_before, self._plain_model = model._compiled_call_impl, plain_call(model)
        self._attach(self._measured, self.schedule)
        if model not in self._measured.chain.modules:
            intercept(model, self._call)
        return model

    def remove(self) -> nn.Module:
        """The model as it was, which it returns."""
        if self._executor is None or self._model is None:
            raise ValueError(f"{OP}: the plan is not applied")
        self._executor.detach()
        self._executor = None
        self._model._compiled_call_impl = self._model_before
        return self._model

    def _attach(self, measured: Measured, schedule: Schedule) -> None:
        if self._executor is not None:
            self._executor.detach()
        chain = measured.chain
        self._executor = Executor(
            chain.modules,
            chain.names,
            chain.calls,
            chain.outputs,
            items_of_model(schedule, measured.profile.blocks),
            measured.buffers,
            self._generators,
            self._options(),
            measured.operators,
            measured.needed,
        )
        self._executor.attach()
        self._signature = measured.profile.signature

    def _options(self) -> Options | None:
        used = [
            block.options[k].label for block, k in zip(self.profile.blocks, self.schedule.kept_options, strict=True)
        ]
        if "offload" in used and self._link is None:
            self._link = HostLink(next(self._model.parameters()).device)
        context = None if self._link is None else self._link.context
        return [
            [context if o.label == "offload" else None for o in block.options] for block in self.profile.blocks[1:-1]
        ]

    def _call(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch.is_grad_enabled() and not _are_functorch_transforms_active():
            if self._executor is None:  # another plan is being made
                return self._plain_model(*args, **kwargs)
            self._executor.restart()
            signature = signature_of_call(args, kwargs, next(self._model.parameters()).device)
            if signature != self._signature and self._on_new_shapes != "keep":
                self._renew(signature, args, kwargs)
            output = self._plain_model(*args, **kwargs)
            self._executor.end()
            return output
        return self._plain_model(*args, **kwargs)

    def _renew(self, signature: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._on_new_shapes == "error" or self._again is None:
            raise ValueError(
                f"{OP}: the plan is for inputs {self.profile.signature}, got {signature}; make another plan, or plan "
                "with on_new_shapes='replan' or 'keep'"
            )
        self._others.setdefault(self.profile.signature, (self._measured, self.schedule))
        if signature not in self._others:
            attached, self._executor = self._executor, None
            attached.detach()
            try:
                self._others[signature] = self._again(args, kwargs)
            finally:
                self._executor = attached
                attached.attach()
        self._measured, self.schedule = self._others[signature]
        self._attach(self._measured, self.schedule)

    # ---- files ----

    def save(self, path: str | Path) -> None:
        """As JSON: measurements, schedule, and how the model calls its blocks; no parameters, no code."""
        Path(path).write_text(json.dumps(self._to_json(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """What `save` wrote; for `apply(model)`."""
        data = json.loads(Path(path).read_text())
        if not isinstance(data, dict) or not {"calls", "outputs", "schedule"} <= data.keys():
            raise ValueError(f"{OP}: path must be a file that Plan.save wrote, {path} is not a plan")
        calls, outputs = (
            tuple(
                Call(tuple(Leaf(*leaf) for leaf in call["leaves"]), pytree.treespec_loads(call["structure"]))
                for call in data[what]
            )
            for what in ("calls", "outputs")
        )
        chain = Chain((), tuple(data["names"]), calls, outputs, tuple(data["parameters"]))
        buffers = tuple(tuple(names) for names in data["buffers"])
        measured = Measured(ChainProfile.from_json(data["profile"]), chain, buffers, **{k: data[k] for k in _STATE})
        return cls(None, measured, Schedule.from_json(data["schedule"]), data["budget"])

    def _to_json(self) -> dict[str, Any]:
        chain = self._measured.chain
        for call, output, name in zip(chain.calls, chain.outputs, chain.names, strict=True):
            for leaf in [*call.leaves, *output.leaves]:
                if leaf.source == "constant" and not isinstance(leaf.what, (int, float, str, bool, type(None))):
                    raise TypeError(
                        f"{OP}: a plan can be saved where blocks take and give tensors, numbers and strings, got a "
                        f"{type(leaf.what).__name__} for block {name}"
                    )
        return {
            "budget": self.budget,
            "names": list(chain.names),
            **{
                what: [
                    {"leaves": [list(f) for f in c.leaves], "structure": pytree.treespec_dumps(c.structure)}
                    for c in calls
                ]
                for what, calls in (("calls", chain.calls), ("outputs", chain.outputs))
            },
            "parameters": list(chain.parameters),
            "buffers": [list(names) for names in self._measured.buffers],
            **{k: getattr(self._measured, k) for k in _STATE},
            "profile": self.profile.to_json(),
            "schedule": self.schedule.to_json(),
        }

    # ---- reports ----

    def __str__(self) -> str:
        return table_of(self)

    def __repr__(self) -> str:
        return (
            f"Plan({len(self.profile) - 2} blocks, budget {shown_bytes(self.budget)}, predicted peak "
            f"{shown_bytes(self.predicted_peak)}, predicted time {self.predicted_time * 1e3:.1f} ms)"
        )

    def plot(self, path: str | Path) -> None:
        """Draws memory over time, and the schedule below it (needs matplotlib)."""
        plot_plan(self, path)
