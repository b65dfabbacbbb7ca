"""Finds a model's chain of blocks, and how the model calls them."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ._recompute_calls import OP, Call, Leaf, flatten, intercepted, plain_call, tensors_of

Blocks = str | Sequence[str | nn.Module] | nn.ModuleList | nn.Sequential | None
_CONTAINERS = (nn.Sequential, nn.ModuleList)


class Chain(NamedTuple):
    """Modules in the order in which they are called, of which each reads the output of the one before."""

    modules: tuple[nn.Module, ...]
    names: tuple[str, ...]
    calls: tuple[Call, ...]
    outputs: tuple[Call, ...]  # how they are arranged: a "previous" leaf is a tensor
    parameters: tuple[str, ...]  # of each block, in words

    def of(self, model: nn.Module) -> Chain:
        """The same blocks of another model."""
        by_name = dict(model.named_modules(remove_duplicate=False))
        for name, parameters in zip(self.names, self.parameters, strict=True):
            if name not in by_name:
                raise ValueError(f"{OP}: the plan is for another model: {type(model).__name__} has no block {name!r}")
            there = _parameters_in_words(by_name[name])
            if there != parameters:
                raise ValueError(
                    f"{OP}: plan is for another model, whose block {name!r} had parameters {parameters}, not {there}"
                )
        return self._replace(modules=tuple(by_name[name] for name in self.names))


def _parameters_in_words(module: nn.Module) -> str:
    return ", ".join(f"{n} {str(p.dtype).removeprefix('torch.')}{list(p.shape)}" for n, p in module.named_parameters())


def find_chain(model: nn.Module, run: Callable[[], Any], blocks: Blocks) -> Chain:
    """run() calls the model once."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{OP}: model must be a torch.nn.Module, got {type(model).__name__}")
    names = {module: name for name, module in model.named_modules()}
    modules = _candidates(model) if blocks is None else _named(model, names, blocks)
    if not modules:
        raise ValueError(
            f"{OP}: blocks were not found, for {type(model).__name__} holds no nn.Sequential or nn.ModuleList of at "
            "least two; pass blocks=[names of modules in the order of the forward]"
        )
    recorder = _Recorder(modules, names)
    with torch.no_grad(), intercepted(modules, recorder.call), recorder:
        result = run()
    chains = recorder.runs()
    del result
    best = max(chains, key=lambda c: len(c.modules), default=Chain((), (), (), (), ()))
    again = [m for m in dict.fromkeys(best.modules) if recorder.calls_of(m) > best.modules.count(m)]
    if len(best.modules) > 1 and again:
        first, last = names[again[0]], names[again[-1]]
        raise ValueError(
            f"{OP}: {f'block {first} is' if len(again) == 1 else f'blocks {first} to {last} are'} called "
            f"{recorder.calls_of(again[0])} times in one forward, by chains that do not follow each other; call them "
            "once, with the inputs of all calls in one batch, or let one module that makes all calls be a block"
        )
    if blocks is not None and recorder.problem:
        raise ValueError(f"{OP}: {recorder.problem}")
    missing = [] if blocks is None else [names[m] for m in modules if m not in best.modules]
    if missing:
        raise ValueError(f"{OP}: block {missing[0]} is not called in the forward of {type(model).__name__}")
    if blocks is None and len(best.modules) < 2:
        raise ValueError(
            f"{OP}: no two blocks of {type(model).__name__} follow each other"
            + (f" ({recorder.problem})" if recorder.problem else "")
            + "; pass blocks=[...] with modules of which each reads the output of the one before"
        )
    return best


# ---- candidates ----


def _candidates(model: nn.Module) -> list[nn.Module]:
    found: list[nn.Module] = []
    if isinstance(model, _CONTAINERS):
        _add_children(model, found)
    else:
        _search(model, found)
    return found


def _search(module: nn.Module, found: list[nn.Module]) -> None:
    for child in module.children():
        if isinstance(child, _CONTAINERS):
            _add_children(child, found)
        else:
            _search(child, found)


def _add_children(container: nn.Module, found: list[nn.Module]) -> None:
    """A Sequential of simple layers within a container is one block, one of composite modules is a stage."""
    for child in container.children():
        stage = isinstance(child, nn.ModuleList) or (
            isinstance(child, nn.Sequential) and len(child) > 0 and all(any(c.children()) for c in child)
        )
        _add_children(child, found) if stage else found.append(child)


def _named(model: nn.Module, names: dict[nn.Module, str], blocks: Any) -> list[nn.Module]:
    by_name = dict(model.named_modules(remove_duplicate=False))
    if isinstance(blocks, str):
        container = _module_of(by_name, names, blocks)
        found = list(container.children())
        if not found:
            raise ValueError(f"{OP}: blocks={blocks!r} must name a module that holds the blocks, it holds none")
    elif isinstance(blocks, (Sequence, *_CONTAINERS)):
        found = [_module_of(by_name, names, block) for block in blocks]
    else:
        raise TypeError(
            f"{OP}: blocks must be the name of a container, or a sequence of names or modules, got "
            f"{type(blocks).__name__}"
        )
    for outer in found:
        inside = [m for m in outer.modules() if m is not outer and m in found]
        if inside:
            raise ValueError(f"{OP}: blocks must not hold each other, got {names[inside[0]]} inside {names[outer]}")
    return list(dict.fromkeys(found))


def _module_of(by_name: dict[str, nn.Module], names: dict[nn.Module, str], block: Any) -> nn.Module:
    if isinstance(block, nn.Module):
        if block not in names:
            raise ValueError(f"{OP}: blocks must be modules of the model, got another {type(block).__name__}")
        return block
    if not isinstance(block, str):
        raise TypeError(f"{OP}: blocks must hold names or modules, got {type(block).__name__}")
    if block not in by_name or block == "":
        raise ValueError(f"{OP}: the model has no module named {block!r}")
    return by_name[block]


# ---- calls ----


class _Seen(NamedTuple):
    """A call of a block: tensors by number, everything else by value."""

    module: nn.Module
    structure: Any
    leaves: tuple[tuple[bool, Any], ...]  # whether it is a tensor; its number, or the value
    outputs: tuple[int | None, ...]  # numbers of tensors
    output: Call
    changes_input: bool
    shapes: dict[int, list[int]]


class _Recorder(TorchDispatchMode):
    """Follows the blocks' calls in one forward, and what the rest of the model reads of their outputs."""

    def __init__(self, modules: Sequence[nn.Module], names: dict[nn.Module, str]) -> None:
        super().__init__()
        self._plain = {module: plain_call(module) for module in modules}
        self._names = names
        self._seen: list[_Seen] = []
        self._known: dict[int, tuple[weakref.ref[torch.Tensor], int]] = {}  # numbers of tensors, by id
        self._numbers = itertools.count()
        self._owners: dict[int, tuple[weakref.ref[torch.Tensor], int]] = {}  # calls that made a storage
        self._used: dict[int, str] = {}  # calls whose output is not the next block's alone, and why
        self.problem = ""  # why the first block that can't follow the one before can't

    def call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        leaves, structure = flatten(args, kwargs)
        tensors = tensors_of(leaves)
        versions = [t._version for t in tensors]
        outer = {_storage(t) for t in tensors if self._owner(t) is None}
        numbered = tuple((True, self._number(x)) if isinstance(x, torch.Tensor) else (False, x) for x in leaves)
        shapes = {self._number(t): list(t.shape) for t in tensors}
        self.__exit__(None, None, None)  # what a block does inside is its own business
        try:
            output = self._plain[module](*args, **kwargs)
        finally:
            self.__enter__()
        values, structure_of_output = pytree.tree_flatten(output)
        outputs = tuple(self._number(x) if isinstance(x, torch.Tensor) else None for x in values)
        changes = any(t._version != version for t, version in zip(tensors, versions, strict=True))
        for t in tensors_of(values):
            if _storage(t) not in outer:
                self._owners[_storage(t)] = weakref.ref(t), len(self._seen)
        arranged = tuple(
            Leaf("previous", i) if isinstance(x, torch.Tensor) else Leaf("constant", x) for i, x in enumerate(values)
        )
        arrangement = Call(arranged, structure_of_output)
        self._seen.append(_Seen(module, structure, numbered, outputs, arrangement, changes, shapes))
        return output

    def calls_of(self, module: nn.Module) -> int:
        return sum(seen.module is module for seen in self._seen)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for t in tensors_of([args, kwargs or {}]):
            owner = self._owner(t)
            if owner is not None:
                self._used.setdefault(owner, f"{function} outside of the blocks reads it too")
        return function(*args, **(kwargs or {}))

    def runs(self) -> list[Chain]:
        """Calls that follow each other. To be called when the forward is done."""
        for reference, owner in self._owners.values():
            if reference() is not None:
                self._used.setdefault(owner, "it is held after the forward")
        runs: list[list[int]] = [[]]
        for k, seen in enumerate(self._seen):
            problem = self._problem(runs[-1], k) if runs[-1] else ""
            if problem:
                runs.append([])
            if seen.changes_input:
                problem = problem or (
                    f"block {self._names[seen.module]} changes its input in place, so that it can't be run again; make "
                    "it out of place, or make it and the module before it one block (an nn.Sequential)"
                )
                runs.append([])
            else:
                runs[-1].append(k)
            self.problem = self.problem or problem
        return [self._chain(run) for run in runs if run]

    def _problem(self, run: Sequence[int], k: int) -> str:
        first, former, seen = self._seen[run[0]], self._seen[run[-1]], self._seen[k]
        before, name = self._names[former.module], self._names[seen.module]
        tensors = [what for is_tensor, what in seen.leaves if is_tensor]
        if not any(t in former.outputs for t in tensors):
            return (
                f"blocks {before} and {name} are not a chain: no argument of {name} is the output of {before}; what "
                "lies between them must belong to one of them, or both must be one block"
            )
        for t in tensors:
            if t not in former.outputs and (True, t) not in first.leaves:
                return (
                    f"block {name} reads a tensor {seen.shapes[t]} that is neither an output of {before} nor an "
                    f"argument of the first block, {self._names[first.module]}; let the modules that share it be one "
                    "block"
                )
        if run[-1] in self._used:
            return (
                f"the output of block {before} is used twice: {name} reads it, and {self._used[run[-1]]}; make the "
                "modules up to its last use one block, or leave them out of blocks"
            )
        return ""

    def _chain(self, run: Sequence[int]) -> Chain:
        calls, first = [], self._seen[run[0]].leaves
        for place, k in enumerate(run):
            before = self._seen[run[place - 1]].outputs if place else ()
            leaves = []
            for is_tensor, what in self._seen[k].leaves:
                if not is_tensor:
                    leaves.append(Leaf("constant", what))
                elif what in before:
                    leaves.append(Leaf("previous", before.index(what)))
                else:
                    leaves.append(Leaf("outer", first.index((True, what))))
            calls.append(Call(tuple(leaves), self._seen[k].structure))
        modules = tuple(self._seen[k].module for k in run)
        names, words = tuple(self._names[m] for m in modules), tuple(_parameters_in_words(m) for m in modules)
        return Chain(modules, names, tuple(calls), tuple(self._seen[k].output for k in run), words)

    def _number(self, tensor: torch.Tensor) -> int:
        reference, number = self._known.get(id(tensor), (None, 0))
        if reference is None or reference() is not tensor:
            number = next(self._numbers)
            self._known[id(tensor)] = weakref.ref(tensor), number
        return number

    def _owner(self, tensor: torch.Tensor) -> int | None:
        """The last call that gave this storage as its output."""
        reference, owner = self._owners.get(_storage(tensor), (None, None))
        return None if reference is None or reference() is None else owner


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
