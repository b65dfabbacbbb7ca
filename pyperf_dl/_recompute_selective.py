"""Outputs of expensive operators, which a block keeps while it computes everything else again in its backward."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch._ops import OpOverload, OpOverloadPacket
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ._recompute_calls import State

Selective = bool | Collection[OpOverload | OpOverloadPacket]

# Those whose time grows faster than the bytes of their output: products, convolutions, attention.
_EXPENSIVE = (
    "mm", "addmm", "bmm", "baddbmm", "linear", "_scaled_mm", "_scaled_mm_v2", "_grouped_mm", "_scaled_grouped_mm",
    "_scaled_grouped_mm_v2", "convolution", "_convolution", "convolution_overrideable", "cudnn_convolution",
    "mkldnn_convolution", "miopen_convolution", "_slow_conv2d_forward", "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_fused_attention_overrideable",
    "_flash_attention_forward", "_efficient_attention_forward", "_cudnn_attention_forward",
)  # fmt: skip


def operator_names(op: str, selective: Any) -> tuple[str, ...]:
    """Of the overloads whose outputs are kept; none where no block is to have the option."""
    rule = f"{op}: selective must be a bool or a collection of operators such as torch.ops.aten.mm"
    if isinstance(selective, bool):
        packets = [getattr(torch.ops.aten, name, None) for name in _EXPENSIVE] if selective else []
        return tuple(overload.name() for packet in packets if packet is not None for overload in _overloads(packet))
    if isinstance(selective, str) or not isinstance(selective, Collection):
        raise TypeError(f"{rule}, got {type(selective).__name__}")
    names = []
    for operator in selective:
        if not isinstance(operator, (OpOverload, OpOverloadPacket)):
            raise TypeError(f"{rule}, got {str(operator)[:80]} of {type(operator).__name__} in it")
        found = [overload.name() for overload in _overloads(operator)]
        if not found:
            raise ValueError(f"{rule}, that make tensors of their own and are no casts, got {operator}")
        names += found
    if not names:
        raise ValueError(f"{rule}, at least one, got none")
    return tuple(dict.fromkeys(names))


def _overloads(operator: OpOverload | OpOverloadPacket) -> list[OpOverload]:
    """But for those that write to a tensor or give a view of one, which keep what others own; and for casts, which
    autocast leaves out where it has done them already."""
    every = [operator] if isinstance(operator, OpOverload) else [getattr(operator, o) for o in operator.overloads()]
    return [
        overload
        for overload in every
        if not overload._schema.is_mutable
        and not any(value.alias_info for value in overload._schema.returns)
        and overload.name() != "aten::_to_copy"
    ]


class KeptOutputs:
    """What a run of a block keeps of its operators' outputs for the run after it.

    What is not there any more, or has been written to since, is computed again.

    Args:
        operators: names of overloads.
        most: how many outputs, the first ones.
        generators: an output that was drawn from one is not kept, for the run after it must draw as well.
    """

    def __init__(self, operators: Collection[str], most: int, generators: Sequence[torch.Generator] = ()) -> None:
        self.operators, self.most, self.generators = operators, most, generators
        self.outputs: dict[tuple[str, int], tuple[Any, list[int]]] = {}

    def contexts(self, keeps: bool = True) -> tuple[Any, Any]:
        """Of the first run, which may keep nothing, and of the one after it."""
        return _Keep(self) if keeps else contextlib.nullcontext(), _Take(self)


class _Mode(TorchDispatchMode):
    run: Callable[[Any, tuple[str, int], Callable[[], Any]], Any]  # what becomes of a call of one of the operators
    supports_higher_order_operators = True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __init__(self, kept: KeptOutputs) -> None:
        super().__init__()
        self.kept = kept
        self.calls: Counter[str] = Counter()

    def __enter__(self) -> Any:
        self.calls.clear()
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if name not in self.kept.operators:
            return func(*args, **(kwargs or {}))
        self.calls[name] += 1
        return self.run((name, self.calls[name]), lambda: func(*args, **(kwargs or {})))


class _Keep(_Mode):
    def run(self, call: tuple[str, int], function: Callable[[], Any]) -> Any:
        if self.calls.total() > self.kept.most or torch.is_inference_mode_enabled():
            return function()  # tensors of inference do not tell whether they have been written to
        before = State((), self.kept.generators)
        output = function()
        if not before.drew():
            held = pytree.tree_map_only(torch.Tensor, _detached, output)
            self.kept.outputs[call] = held, _versions(held)
        return output


class _Take(_Mode):
    def run(self, call: tuple[str, int], function: Callable[[], Any]) -> Any:
        output, versions = self.kept.outputs.pop(call, (None, []))
        if not versions or _versions(output) != versions:
            return function()
        return output


def _versions(output: Any) -> list[int]:
    return [t._version for t in pytree.tree_leaves(output) if isinstance(t, torch.Tensor)]


def _detached(t: torch.Tensor) -> torch.Tensor:
    """Without the history that it gets, whose nodes would refer to it in a circle; with the same version, which the
    dispatch of `detach` sees to."""
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
        return t.detach()


def needed_outputs(operators: Collection[str], run: Callable[[], Any]) -> int:
    """How many outputs a second run would take, which ends where the last tensor is saved."""
    counting, needed = _Keep(KeptOutputs(operators, 0)), 0

    def save(_: Any) -> None:
        nonlocal needed
        needed = counting.calls.total()

    with torch.autograd.graph.saved_tensors_hooks(save, lambda _: None), counting:
        run()
    return needed
