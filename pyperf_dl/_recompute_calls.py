"""How a model calls its blocks, and what a block changes beside its output."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils import _pytree as pytree

OP = "recompute"


class Leaf(NamedTuple):
    """Where one argument of a block comes from: "previous" output and which leaf of it, "outer" arguments of the first
    block and which, or a "constant" and its value."""

    source: str
    what: Any


class Call(NamedTuple):
    """The arguments of one block."""

    leaves: tuple[Leaf, ...]
    structure: Any  # of (args, kwargs)

    def arguments(self, previous: Sequence[Any], outer: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        values = [
            previous[what] if source == "previous" else outer[what] if source == "outer" else what
            for source, what in self.leaves
        ]
        return pytree.tree_unflatten(values, self.structure)

    def differs(self, leaves: Sequence[Any], structure: Any, previous: Sequence[Any], outer: Sequence[Any]) -> bool:
        """From a call with other arguments."""
        if structure != self.structure:
            return True
        for (source, what), value in zip(self.leaves, leaves, strict=True):
            if source == "constant":
                if value is not what and (type(value) is not type(what) or value != what):
                    return True
            elif value is not (previous if source == "previous" else outer)[what]:
                return True
        return False


def flatten(args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[list[Any], Any]:
    return pytree.tree_flatten((tuple(args), dict(kwargs)))


def leaves_of(value: Any) -> list[Any]:
    return pytree.tree_flatten(value)[0]


def tensors_of(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in leaves_of(value) if isinstance(leaf, torch.Tensor)]


def signature_of(value: Any) -> str:
    """Shapes, dtypes, whether gradients are wanted; constants by value."""
    return "; ".join(
        f"{str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)}{' grad' * leaf.requires_grad}"
        if isinstance(leaf, torch.Tensor)
        else repr(leaf)[:80]
        for leaf in leaves_of(value)
    )


def signature_of_call(args: Sequence[Any], kwargs: dict[str, Any], device: torch.device) -> str:
    """Of the inputs, and of autocast, which decides what is saved."""
    signature = signature_of([args, kwargs])
    if not is_autocast(device):
        return signature
    return f"autocast {str(torch.get_autocast_dtype(device.type)).removeprefix('torch.')}; {signature}"


def is_autocast(device: torch.device) -> bool:
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def plain_call(module: nn.Module) -> Callable[..., Any]:
    """What calling the module does, compiled or not, whatever takes its place afterwards."""
    compiled = module._compiled_call_impl
    return module._call_impl if compiled is None else compiled


@contextlib.contextmanager
def intercepted(modules: Sequence[nn.Module], call: Callable[..., Any]) -> Iterator[None]:
    """call(module, args, kwargs) instead of module(*args, **kwargs), hooks of the module included."""
    distinct = list(dict.fromkeys(modules))
    before = [module._compiled_call_impl for module in distinct]
    for module in distinct:
        intercept(module, call)
    try:
        yield
    finally:
        for module, compiled in zip(distinct, before, strict=True):
            module._compiled_call_impl = compiled


def intercept(module: nn.Module, call: Callable[..., Any]) -> None:
    def handle(*args: Any, **kwargs: Any) -> Any:
        return call(module, args, kwargs)

    handle.of_recompute = True
    module._compiled_call_impl = handle


def is_intercepted(module: nn.Module) -> bool:
    return getattr(module._compiled_call_impl, "of_recompute", False)


# ---- state ----


class State:
    """Buffers of modules and random generators: what a block may change beside its output.

    Args:
        buffers: (module, name) of those that change.
        generators: all that may be drawn from.
    """

    def __init__(self, buffers: Sequence[tuple[nn.Module, str]], generators: Sequence[torch.Generator]) -> None:
        self.buffers, self.generators = tuple(buffers), tuple(generators)
        self._objects = [module._buffers[name] for module, name in self.buffers]
        self._values = [None if b is None else b.detach().clone() for b in self._objects]
        self._states = [generator.get_state() for generator in self.generators]

    def set(self) -> None:
        """As it was. Values are written past autograd: a graph that holds a buffer has used its value already."""
        kept, values = [], []
        for (module, name), buffer, value in zip(self.buffers, self._objects, self._values, strict=True):
            module._buffers[name] = buffer
            if buffer is not None and not overlaps(buffer):
                kept.append(buffer.data)
                values.append(value)
        if kept:
            torch._foreach_copy_(kept, values)
        for generator, state in zip(self.generators, self._states, strict=True):
            generator.set_state(state)

    def drew(self) -> int:
        """Forgets the generators that are as they were; bytes of the others' states."""
        moved = [
            (generator, state)
            for generator, state in zip(self.generators, self._states, strict=True)
            if not torch.equal(generator.get_state(), state)
        ]
        self.generators, self._states = tuple(g for g, _ in moved), [state for _, state in moved]
        return sum(state.nbytes for state in self._states)

    def changed(self) -> list[tuple[nn.Module, str]]:
        """The buffers that are not as they were."""
        return [
            key
            for key, buffer, value in zip(self.buffers, self._objects, self._values, strict=True)
            if key[0]._buffers[key[1]] is not buffer
            or (buffer is not None and not torch.equal(_bits(buffer), _bits(value)))
        ]


def overlaps(t: torch.Tensor) -> bool:
    """Several elements have the same memory, so that nothing can be written to it."""
    return torch._debug_has_internal_overlap(t) == 1


class Replay:
    """Runs something for the first time, and again as then: with the buffers and generators of the first time, and
    leaves them as they were before."""

    def __init__(self, buffers: Sequence[tuple[nn.Module, str]], generators: Sequence[torch.Generator]) -> None:
        self._buffers, self._generators = buffers, generators
        self._state: State | None = None

    def __call__(self, run: Callable[[], Any]) -> Any:
        if self._state is None:
            self._state = State(self._buffers, self._generators)
            output = run()
            self._state.drew()
            return output
        now = State(self._state.buffers, self._state.generators)
        self._state.set()
        try:
            return run()
        finally:
            now.set()


def _bits(t: torch.Tensor) -> torch.Tensor:
    """So that NaNs equal themselves."""
    return t.detach().contiguous().view(-1).view(torch.uint8) if t.numel() else t


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(_bits(a), _bits(b))


def buffers_of(module: nn.Module) -> list[tuple[nn.Module, str]]:
    return [(m, name) for m in module.modules() for name in m._buffers]


def buffers_named(module: nn.Module, names: Sequence[str]) -> list[tuple[nn.Module, str]]:
    pairs = [name.rpartition(".") for name in names]
    return [(module.get_submodule(path), name) for path, _, name in pairs]


def generators_of(device: torch.device, named: Sequence[torch.Generator]) -> tuple[torch.Generator, ...]:
    """The default ones, and those."""
    index = torch.cuda.current_device() if device.type == "cuda" and device.index is None else device.index
    own = [torch.cuda.default_generators[index]] if device.type == "cuda" and torch.cuda.is_initialized() else []
    return tuple(dict.fromkeys([torch.default_generator, *own, *named]))
