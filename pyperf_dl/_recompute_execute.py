"""Runs a model's blocks under a schedule: nested segments, each a `torch.utils.checkpoint` of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from ._autograd import _are_functorch_transforms_active
from ._recompute_calls import Call, Replay, buffers_named, flatten, generators_of, intercept, plain_call
from ._recompute_chain import Block, Node, Schedule
from ._recompute_selective import KeptOutputs

# For each block and option, of its index, the module and its inputs.
Options = Sequence[Sequence[Callable[[int, nn.Module, Any], contextlib.AbstractContextManager] | None]]


class Kept(NamedTuple):
    """A block that keeps what its option says."""

    block: int
    option: int


class Segment(NamedTuple):
    """Blocks first, ..., end - 1, which keep nothing (selective: outputs of expensive operators alone) until their
    backward, and then what `items` say."""

    first: int
    end: int
    items: tuple[Any, ...]
    selective: bool = False


def items_of(nodes: Sequence[Node], at: int = 0) -> tuple[tuple[Kept | Segment, ...], int]:
    """What a subtree of a schedule does in a row, and where the next subtree begins. Recurses by the depth of segments
    in segments alone."""
    items: list[Any] = []
    segments = []
    while True:
        node = nodes[at]
        at += 1
        if node.split is None:
            items.append(Kept(node.first, node.option))
            if node.first == node.last:
                break
        else:
            segments.append((len(items), node))
            items.append(None)
    for place, node in reversed(segments):
        inner, at = items_of(nodes, at)
        items[place] = Segment(node.first, node.split, inner)
    return tuple(items), at


def items_of_model(schedule: Schedule, blocks: Sequence[Block]) -> tuple[Kept | Segment, ...]:
    """Without what lies before and behind the blocks, whose entries are the first and the last. The option "selective"
    is a segment of one block."""

    def moved(item: Kept | Segment) -> Kept | Segment:
        if isinstance(item, Segment):
            return Segment(item.first - 1, item.end - 1, tuple(map(moved, item.items)))
        k = item.block - 1
        if blocks[item.block].options[item.option].label == "selective":
            return Segment(k, k + 1, (Kept(k, 0),), selective=True)
        return Kept(k, item.option)

    return tuple(map(moved, items_of(schedule.nodes)[0][1:-1]))


def frame_bytes(items: Sequence[Kept | Segment], own: Callable[[Segment], int]) -> int:
    """What segments hold from their forward to their backward, those within others too; `own` of each."""
    return sum(own(item) + frame_bytes(item.items, own) for item in items if isinstance(item, Segment))


def depth_of(items: Sequence[Kept | Segment]) -> int:
    """How many segments are within each other, and look at generators at a time; a selective one does so thrice."""
    return max((1 + 2 * i.selective + depth_of(i.items) for i in items if isinstance(i, Segment)), default=0)


class Executor:
    """Takes the place of the blocks' calls.

    The first call of a block that begins a segment runs the whole segment; the calls of the blocks behind it hand on
    what is there already.

    Args:
        modules: the blocks, in the order of the forward; one module may come several times.
        names: of them.
        calls: how the model calls them.
        outputs: how what they give is arranged.
        items: what they do in a row.
        buffers: names of those that each block changes.
        generators: that the blocks draw from, beside the default ones.
        options: for each block and option a context in which it runs, or None.
        operators: whose outputs selective segments keep.
        needed: how many of them each block needs.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        names: Sequence[str],
        calls: Sequence[Call],
        outputs: Sequence[Call],
        items: Sequence[Kept | Segment],
        buffers: Sequence[Sequence[str]],
        generators: Sequence[torch.Generator] = (),
        options: Options | None = None,
        operators: Collection[str] = (),
        needed: Sequence[int] = (),
    ) -> None:
        self.modules, self.names, self.calls, self._outputs = tuple(modules), tuple(names), tuple(calls), tuple(outputs)
        self.buffers = [buffers_named(module, names) for module, names in zip(modules, buffers, strict=True)]
        parameters = [p for module in self.modules for p in module.parameters()]
        device = parameters[0].device if parameters else torch.device("cpu")
        self.generators, self.options = generators_of(device, generators), options
        self._operators, self._needed = frozenset(operators), needed
        # Autocast holds what it cast of parameters until it is left. For one that comes again that is used again: its
        # gradients are summed before they are cast back.
        self._forgets_casts = len(set(parameters)) == len(parameters)
        self._plain = {module: plain_call(module) for module in self.modules}
        self._before = {module: module._compiled_call_impl for module in self.modules}
        self._places: dict[nn.Module, list[int]] = {}
        for k, module in enumerate(self.modules):
            self._places.setdefault(module, []).append(k)
        # What later blocks read of the first one's arguments.
        self._shared = {leaf.what for call in self.calls[1:] for leaf in call.leaves if leaf.source == "outer"}
        self._items = {item.block if isinstance(item, Kept) else item.first: item for item in items}
        self.restart()

    def attach(self) -> None:
        for module in self._places:
            intercept(module, self._call)

    def detach(self) -> None:
        for module, before in self._before.items():
            module._compiled_call_impl = before

    def restart(self) -> None:
        """Before a forward, and behind it: the first block is next."""
        self._next = 0
        self._through = 0  # blocks below it have run
        self._result: Any = None  # of the last of them
        self._output: Any = None  # what the model got for the block before the next
        self._outer: dict[int, Any] = {}  # of the first block's arguments

    def end(self) -> None:
        """Behind a forward, which may leave out the last blocks, but not get what a segment has run of them."""
        at, through = self._next, self._through
        self.restart()
        if at < through:
            raise RuntimeError(
                f"recompute: blocks must be called in the order of the plan, got the end of the forward where "
                f"{self.names[at]} is next; make a new plan"
            )

    # ---- calls of the model ----

    def _call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not torch.is_grad_enabled() or _are_functorch_transforms_active():
            return self._plain[module](*args, **kwargs)
        k = self._place(module)
        try:
            output = self._run(k, args, kwargs)
        except BaseException:
            self.restart()
            raise
        self._next = k + 1
        if self._next == len(self.modules):
            self.restart()
        return output

    def _place(self, module: nn.Module) -> int:
        places = self._places[module]
        k = next((p for p in places if p >= self._next), places[0])
        if k != self._next:
            if k:
                expected = self.names[self._next % len(self.names)]
                self.restart()
                raise RuntimeError(
                    f"recompute: blocks must be called in the order of the plan, got {self.names[k]} where {expected} "
                    "is next; make a new plan"
                )
            self.restart()
        return k

    def _run(self, k: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        item = self._items.get(k)
        if isinstance(item, Kept) and k >= self._through and (k or not self._shared):
            # It runs once, with whatever the model calls it with.
            self._result = self._output = self._kept(item, args, kwargs)
            self._through = k + 1
            return self._output
        call = self.calls[k]
        leaves, structure = flatten(args, kwargs)
        if k == 0:
            previous: Mapping[int, Any] = {}
            outer: Mapping[int, Any] = dict(enumerate(leaves))
            tensors = {leaf.what for leaf in call.leaves if leaf.source == "outer"}
            if call.differs(leaves, structure, previous, outer) or not all(
                isinstance(outer[i], torch.Tensor) for i in tensors
            ):
                self._refuse(k)
            self._outer = {i: outer[i] for i in self._shared}
        else:
            previous, outer = dict(enumerate(pytree.tree_flatten(self._output)[0])), self._outer
            if call.differs(leaves, structure, previous, outer):
                self._refuse(k)
        if k >= self._through:
            self._result = None
            item = self._items[k]
            if isinstance(item, Kept):
                self._result, self._through = self._kept(item, args, kwargs), k + 1
            else:
                self._result, self._through = self._segment(item, previous, outer), item.end
        self._output = self._handed_on(k)
        return self._output

    def _handed_on(self, k: int) -> Any:
        """The output of the segment that has run, arranged as block k's own would be if it ended there."""
        if k + 1 == self._through:
            return self._result
        values = pytree.tree_flatten(self._result)[0]
        some = next(value for value in values if isinstance(value, torch.Tensor))
        own = self._outputs[k]
        tensors = dict.fromkeys(range(len(own.leaves)), some)
        tensors |= {i: value for i, value in enumerate(values) if isinstance(value, torch.Tensor)}
        return pytree.tree_unflatten(
            [tensors[i] if leaf.source == "previous" else leaf.what for i, leaf in enumerate(own.leaves)], own.structure
        )

    def _refuse(self, k: int) -> None:
        raise RuntimeError(
            f"recompute: block {self.names[k]} was called with other arguments than when it was measured, or with "
            "something that is not the output of the block before; make a new plan"
        )

    # ---- execution ----

    def _kept(self, item: Kept, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        context = self.options[item.block][item.option] if self.options else None
        module = self.modules[item.block]
        with contextlib.nullcontext() if context is None else context(item.block, module, (args, kwargs)):
            return self._plain[module](*args, **kwargs)

    def _segment(
        self,
        segment: Segment,
        previous: Mapping[int, Any],
        outer: Mapping[int, Any],
        around: _Frame | None = None,
    ) -> Any:
        """around: the segment in which this one is."""
        contexts = contextlib.nullcontext(), contextlib.nullcontext()
        if segment.selective:
            k = segment.first
            kept = KeptOutputs(self._operators, self._needed[k], self.generators)
            if around is not None:  # when it runs again, that is for the backward of the segments of its first run
                kept = around.kept.setdefault(k, kept)
            contexts = kept.contexts(around is None or around.again)
        frame = _Frame(self, segment, previous, outer, contexts)
        return checkpoint(frame, *frame.tensors(previous, outer), use_reentrant=False, preserve_rng_state=False)

    def run_items(
        self,
        items: Sequence[Kept | Segment],
        previous: Mapping[int, Any],
        outer: Mapping[int, Any],
        around: _Frame | None = None,
    ) -> Any:
        output = None
        for place, item in enumerate(items):
            if place:
                previous = dict(enumerate(pytree.tree_flatten(output)[0]))
            del output
            if isinstance(item, Kept):
                args, kwargs = self.calls[item.block].arguments(previous, outer)
                output = self._kept(item, args, kwargs)
                del args, kwargs
                if self._forgets_casts:
                    torch.clear_autocast_cache()
            else:
                output = self._segment(item, previous, outer, around)
        return output


class _Frame:
    """A segment as the function of a checkpoint, which is called once in the forward, and again for the backward: then
    with the parameters, buffers and generators of the first time, and leaves them as they were before.

    contexts: in which the blocks run, and run again."""

    def __init__(
        self,
        executor: Executor,
        segment: Segment,
        previous: Mapping[int, Any],
        outer: Mapping[int, Any],
        contexts: tuple[Any, Any],
    ) -> None:
        self._executor, self._segment, self._contexts = executor, segment, contexts
        calls = executor.calls[segment.first : segment.end]
        read = {leaf.what for leaf in calls[0].leaves if leaf.source == "previous"}
        read_outer = {leaf.what for call in calls for leaf in call.leaves if leaf.source == "outer"}
        self._previous = sorted(i for i in read if isinstance(previous[i], torch.Tensor))
        self._outer = sorted(i for i in read_outer if isinstance(outer[i], torch.Tensor))
        self._constants = {i: previous[i] for i in read if i not in self._previous}
        buffers = [key for k in range(segment.first, segment.end) for key in executor.buffers[k]]
        self._replay = Replay(buffers, executor.generators)
        self._tensors: list[tuple[dict[str, Any], str, Any]] | None = None
        self.again = False
        self.kept: dict[int, KeptOutputs] = {}  # of the blocks in it that run selectively

    def tensors(self, previous: Mapping[int, Any], outer: Mapping[int, Any]) -> list[torch.Tensor]:
        return [*(previous[i] for i in self._previous), *(outer[i] for i in self._outer)]

    def __call__(self, *tensors: torch.Tensor) -> Any:
        count = len(self._previous)
        previous = dict(zip(self._previous, tensors[:count], strict=True)) | self._constants
        outer = dict(zip(self._outer, tensors[count:], strict=True))
        del tensors
        self.again = self._tensors is not None
        if self._tensors is None:
            self._tensors = self._current_tensors()

        def run() -> Any:
            with _tensors_set(self._tensors), self._contexts[self.again]:
                return self._executor.run_items(self._segment.items, previous, outer, self)

        return self._replay(run)

    def _current_tensors(self) -> list[tuple[dict[str, Any], str, Any]]:
        """What `torch.func.functional_call` may have put in the place of parameters and buffers. Sharded ones are their
        owner's business."""
        found = []
        for module in dict.fromkeys(self._executor.modules[self._segment.first : self._segment.end]):
            for owner in module.modules():
                for there in (owner._parameters, owner._buffers):
                    found += [(there, name, t) for name, t in there.items() if not _is_sharded(t)]
        return found


def _is_sharded(tensor: Any) -> bool:
    return type(tensor).__name__ == "DTensor" or type(getattr(tensor, "data", None)).__name__ == "DTensor"


@contextlib.contextmanager
def _tensors_set(tensors: Sequence[tuple[dict[str, Any], str, Any]]) -> Iterator[None]:
    others = [(there, name, there[name]) for there, name, value in tensors if there[name] is not value]
    for there, name, value in tensors:
        there[name] = value
    try:
        yield
    finally:
        for there, name, value in others:
            there[name] = value
