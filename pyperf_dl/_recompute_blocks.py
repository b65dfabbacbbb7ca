"""Finds a model's chain of blocks, and how the model calls them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from ._recompute_calls import OP, Call, Leaf, flatten, intercepted, leaves_of, plain_call, tensors_of

Blocks = str | Sequence[str | nn.Module] | None
_CONTAINERS = (nn.Sequential, nn.ModuleList)


class Chain(NamedTuple):
    """Modules in the order in which they are called, of which each reads the output of the one before."""

    modules: tuple[nn.Module, ...]
    names: tuple[str, ...]
    calls: tuple[Call, ...]
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
    with torch.no_grad(), intercepted(modules, recorder.call):
        result = run()
    recorder.end()
    del result
    if blocks is not None and recorder.problem:
        raise ValueError(f"{OP}: {recorder.problem}")
    best = max(recorder.runs, key=lambda r: len(r.modules), default=_Run([], [], []))
    missing = [] if blocks is None else [names[m] for m in modules if m not in best.modules]
    if missing:
        raise ValueError(f"{OP}: block {missing[0]} is not called in the forward of {type(model).__name__}")
    if blocks is None and len(best.modules) < 2:
        raise ValueError(
            f"{OP}: no two blocks of {type(model).__name__} follow each other"
            + (f" ({recorder.problem})" if recorder.problem else "")
            + "; pass blocks=[...] with modules of which each reads the output of the one before"
        )
    return Chain(
        tuple(best.modules),
        tuple(names[m] for m in best.modules),
        tuple(best.calls),
        tuple(_parameters_in_words(m) for m in best.modules),
    )


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
    elif isinstance(blocks, Sequence):
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


class _Run(NamedTuple):
    """Calls that follow each other."""

    modules: list[nn.Module]
    calls: list[Call]
    first: list[Any]  # leaves of the first call's arguments


class _Recorder:
    """Follows the blocks' calls in one forward. A run ends where a block can't follow the one before; `problem` says
    why the first of them did."""

    def __init__(self, modules: Sequence[nn.Module], names: dict[nn.Module, str]) -> None:
        self._plain = {module: plain_call(module) for module in modules}
        self._names = names
        self.runs: list[_Run] = []
        self.problem = ""
        self._outputs: list[Any] = []  # of the last call
        self._before: list[weakref.ref[torch.Tensor]] = []  # outputs of the last call but one
        self._follows = False

    def call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._look_for_holders()
        leaves, structure = flatten(args, kwargs)
        if self._follows:
            self._refuse(self._problem_of_arguments(module, leaves))
        if not self._follows:
            self.runs.append(_Run([], [], leaves))
        run = self.runs[-1]
        sources = [self._source(leaf, len(run.calls) > 0) for leaf in leaves]
        versions = [(t, t._version) for t in leaves if isinstance(t, torch.Tensor)]
        output = self._plain[module](*args, **kwargs)
        self._before = [weakref.ref(t) for t in tensors_of(self._outputs)]
        self._outputs = leaves_of(output)
        if any(t._version != version for t, version in versions):
            self._refuse(
                f"block {self._names[module]} changes its input in place, so that it can't be run again; make it out "
                "of place, or make it and the module before it one block (an nn.Sequential)"
            )
            return output
        run.modules.append(module)
        run.calls.append(Call(tuple(sources), structure))
        self._follows = True
        return output

    def end(self) -> None:
        self._look_for_holders()

    def _refuse(self, problem: str) -> None:
        self.problem = self.problem or problem
        if problem:
            self._follows = False

    def _source(self, leaf: Any, follows: bool) -> Leaf:
        if not isinstance(leaf, torch.Tensor):
            return Leaf("constant", leaf)
        place = _index(leaf, self._outputs) if follows else None
        return Leaf("previous", place) if place is not None else Leaf("outer", _index(leaf, self.runs[-1].first))

    def _problem_of_arguments(self, module: nn.Module, leaves: Sequence[Any]) -> str:
        run = self.runs[-1]
        before, name = self._names[run.modules[-1]], self._names[module]
        tensors = tensors_of(leaves)
        if not any(_index(t, self._outputs) is not None for t in tensors):
            return (
                f"blocks {before} and {name} are not a chain: no argument of {name} is the output of {before}; what "
                "lies between them must belong to one of them, or both must be one block"
            )
        for t in tensors:
            if _index(t, self._outputs) is None and _index(t, run.first) is None:
                return (
                    f"block {name} reads a tensor {list(t.shape)} that is neither an output of {before} nor an "
                    f"argument of the first block, {self._names[run.modules[0]]}; let the modules that share it be one "
                    "block"
                )
        return ""

    def _look_for_holders(self) -> None:
        """The output of the last call but one has been read by the last call, and is nobody's any more."""
        if not self._follows or len(self.runs[-1].modules) < 2:
            return
        run = self.runs[-1]
        fine = [*self._outputs, *run.first]
        storages = {t.untyped_storage()._cdata for t in tensors_of(fine)}
        for reference in self._before:
            tensor = reference()
            if tensor is not None and tensor.untyped_storage()._cdata not in storages:
                former, latter = (self._names[m] for m in run.modules[-2:])
                self._refuse(
                    f"the output of block {former} is used twice: {latter} reads it, and somebody holds it afterwards; "
                    "make the modules up to its last use one block, or leave them out of blocks"
                )
                del run.modules[-1], run.calls[-1]
                return


def _index(tensor: Any, values: Sequence[Any]) -> int | None:
    return next((i for i, value in enumerate(values) if value is tensor), None)
