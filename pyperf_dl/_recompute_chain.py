"""What a chain of blocks costs, and schedules of it: plain data, without torch."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Option(NamedTuple):
    """One way to run a block with history: what it keeps for its backward, and what that costs.

    Bytes count from the memory that was there before; `history_peak` is reached during the forward, `backward_peak`
    during the backward, with what was kept and both gradients in it.
    """

    label: str
    forward: float
    backward: float
    saved_bytes: int
    history_peak: int
    backward_peak: int


class Block(NamedTuple):
    """One block of a chain. Times are seconds, sizes are bytes.

    Args:
        name: of the module.
        forward: time of a forward that keeps nothing but its output.
        output_bytes: of its output; and of the gradient of that.
        forward_peak: most bytes during such a forward, the output included, the input not.
        options: ways to run it with history; the first keeps everything.
        recomputable: False for what lies before the first block and behind the last one, which is always kept.
    """

    name: str
    forward: float
    output_bytes: int
    forward_peak: int
    options: tuple[Option, ...]
    recomputable: bool = True


@dataclasses.dataclass(frozen=True)
class ChainProfile:
    """Times and bytes of a chain of blocks, of which each reads the output of the one before.

    Args:
        blocks: in the order of the forward.
        fixed_bytes: what is there during the whole step: parameters, buffers, gradients, optimizer state, inputs.
        frame_seconds: what each segment that is run again costs beside its blocks.
        device: where it was measured.
        signature: shapes and dtypes of the inputs it holds for.
    """

    blocks: tuple[Block, ...]
    fixed_bytes: int = 0
    frame_seconds: float = 0.0
    device: str = "cpu"
    signature: str = ""

    def __post_init__(self) -> None:
        if not self.blocks:
            raise ValueError("ChainProfile: blocks must hold at least one block, got none")
        for block in self.blocks:
            if not block.options:
                raise ValueError(f"ChainProfile: block {block.name} must have an option that keeps everything")
            numbers = [block.forward, block.output_bytes, block.forward_peak]
            numbers += [v for option in block.options for v in option[1:]]
            if not all(0 <= v < float("inf") for v in numbers):
                raise ValueError(
                    f"ChainProfile: times and bytes of block {block.name} must be finite and >= 0, got {block}"
                )

    @classmethod
    def from_lists(
        cls,
        *,
        forward: Sequence[float],
        backward: Sequence[float],
        output_bytes: Sequence[int],
        saved_bytes: Sequence[int],
        forward_with_history: Sequence[float] | None = None,
        forward_peak: Sequence[int] | None = None,
        history_peak: Sequence[int] | None = None,
        backward_peak: Sequence[int] | None = None,
        names: Sequence[str] | None = None,
        fixed_bytes: int = 0,
        frame_seconds: float = 0.0,
    ) -> ChainProfile:
        """A profile that was not measured.

        Args:
            forward, backward: seconds of each block.
            output_bytes: of each block's output.
            saved_bytes: what a forward with history keeps, the output included.
            forward_with_history: seconds; as `forward` where it is None.
            forward_peak, history_peak: most bytes during a forward; the output, and what is kept, where they are None.
            backward_peak: most bytes during a backward; what is kept and both gradients where it is None.
            names, fixed_bytes, frame_seconds: see the class.

        >>> from pyperf_dl import recompute
        >>> chain = recompute.ChainProfile.from_lists(
        ...     forward=[1, 1], backward=[2, 2], output_bytes=[10, 10], saved_bytes=[50, 50]
        ... )
        >>> chain.blocks[1].options[0].backward_peak
        70
        """
        count = len(forward)
        with_history = forward if forward_with_history is None else forward_with_history
        forward_peak = output_bytes if forward_peak is None else forward_peak
        history_peak = saved_bytes if history_peak is None else history_peak
        if backward_peak is None:
            before = [0, *output_bytes[:-1]]
            backward_peak = [s + x + y for s, x, y in zip(saved_bytes, before, output_bytes, strict=False)]
        names = [f"block {k}" for k in range(count)] if names is None else names
        lists = {
            "backward": backward, "output_bytes": output_bytes, "saved_bytes": saved_bytes,
            "forward_with_history": with_history, "forward_peak": forward_peak, "history_peak": history_peak,
            "backward_peak": backward_peak, "names": names,
        }  # fmt: skip
        for name, values in lists.items():
            if len(values) != count:
                raise ValueError(
                    f"ChainProfile.from_lists: {name} must have {count} entries, as forward has, got {len(values)}"
                )
        blocks = []
        for k in range(count):
            everything = Option(
                "keep",
                with_history[k],
                backward[k],
                saved_bytes[k],
                max(history_peak[k], saved_bytes[k]),
                backward_peak[k],
            )
            blocks.append(
                Block(names[k], forward[k], output_bytes[k], max(forward_peak[k], output_bytes[k]), (everything,))
            )
        return cls(tuple(blocks), fixed_bytes, frame_seconds)

    @classmethod
    def merged(cls, profiles: Sequence[ChainProfile]) -> ChainProfile:
        """Of the same model in several processes: the largest bytes and the mean times, of options that all have."""
        first = profiles[0]
        names = [block.name for block in first.blocks]
        if any([block.name for block in p.blocks] != names for p in profiles):
            raise ValueError("ChainProfile.merged: profiles must be of the same blocks")

        def options(blocks: Sequence[Block]) -> Iterator[Option]:
            labelled = [{o.label: o for o in block.options} for block in blocks]
            for label in labelled[0]:
                same = [found[label] for found in labelled if label in found]
                if len(same) < len(blocks):
                    continue
                times = (statistics.fmean(o[i] for o in same) for i in (1, 2))
                yield Option(same[0].label, *times, *(max(o[i] for o in same) for i in (3, 4, 5)))

        made = []
        for same in zip(*(p.blocks for p in profiles), strict=True):
            made.append(
                same[0]._replace(
                    forward=statistics.fmean(b.forward for b in same),
                    output_bytes=max(b.output_bytes for b in same),
                    forward_peak=max(b.forward_peak for b in same),
                    options=tuple(options(same)),
                )
            )
        fixed, frame = max(p.fixed_bytes for p in profiles), statistics.fmean(p.frame_seconds for p in profiles)
        return dataclasses.replace(first, blocks=tuple(made), fixed_bytes=fixed, frame_seconds=frame)

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def kinds(self) -> tuple[int, ...]:
        """A number for each block, the same for blocks that cost the same."""
        seen: dict[Any, int] = {}
        return tuple(seen.setdefault(block[1:], len(seen)) for block in self.blocks)

    def to_json(self) -> dict[str, Any]:
        return {
            "blocks": [[*block[:4], [list(o) for o in block.options], block.recomputable] for block in self.blocks],
            **{f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "blocks"},
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ChainProfile:
        blocks = tuple(
            Block(*first, tuple(Option(*o) for o in options), recomputable)
            for *first, options, recomputable in data["blocks"]
        )
        return cls(blocks, **{name: value for name, value in data.items() if name != "blocks"})

    def save(self, path: str | Path) -> None:
        """As JSON."""
        Path(path).write_text(json.dumps(self.to_json(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> ChainProfile:
        """What `save` wrote."""
        return cls.from_json(json.loads(Path(path).read_text()))


class Node(NamedTuple):
    """How blocks first, ..., last are trained, given the input of `first` and the gradient of the output of `last`.

    Without a split: `first` keeps what its option says, then come the blocks behind it, then its backward. With one:
    first, ..., split - 1 run and keep nothing but the last output, split, ..., last are trained, then
    first, ..., split - 1 from the start.
    """

    first: int
    last: int
    split: int | None = None
    option: int = 0


def relative_gap(seconds: float, bound: float) -> float:
    """How much longer than a lower bound something takes, as a part of that; infinite above a bound of 0."""
    if seconds <= bound:
        return 0.0
    return seconds / bound - 1 if bound else float("inf")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A persistent schedule of a chain: what is kept, what is run again.

    Attributes:
        nodes: in preorder; behind a node with a split come those of split, ..., last, then those of first, ...,
            split - 1; behind one without come those of first + 1, ..., last.
        predicted_peak: bytes of the whole step, `ChainProfile.fixed_bytes` included.
        predicted_time: seconds of forward and backward.
        bound: no persistent schedule within the budget takes less time than this; 0 where nothing is known.
        flat_bound: the same for schedules that run each block at most twice.
        complete: False where a limit of time or memory ended the search.
    """

    nodes: tuple[Node, ...]
    predicted_peak: int
    predicted_time: float
    bound: float = 0.0
    flat_bound: float = 0.0
    complete: bool = True

    @property
    def gap(self) -> float:
        """How much longer than any persistent schedule this may take, as a part of that."""
        return relative_gap(self.predicted_time, self.bound)

    @property
    def flat_gap(self) -> float:
        """The same against schedules that run each block at most twice."""
        return relative_gap(self.predicted_time, self.flat_bound)

    @property
    def replays(self) -> tuple[int, ...]:
        """How many times each block runs again."""
        counts = [0] * (self.nodes[0].last + 1)
        for node in self.nodes:
            if node.split is not None:
                for k in range(node.first, node.split):
                    counts[k] += 1
        return tuple(counts)

    @property
    def kept_options(self) -> tuple[int, ...]:
        """The option with which each block has history in the end."""
        found = {node.first: node.option for node in self.nodes if node.split is None}
        return tuple(found[k] for k in range(self.nodes[0].last + 1))

    def to_json(self) -> dict[str, Any]:
        return {"nodes": [list(node) for node in self.nodes]} | {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "nodes"
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Schedule:
        return cls(tuple(Node(*n) for n in data["nodes"]), **{k: v for k, v in data.items() if k != "nodes"})


class Event(NamedTuple):
    """What one block does, from `start` seconds on: "forward", "replay" (both keep nothing), "history", "backward"."""

    what: str
    block: int
    start: float
    seconds: float
    peak: int  # bytes, most during it
    after: int  # bytes, when it is done


@dataclasses.dataclass(frozen=True)
class Timeline:
    """A step of forward and backward under a schedule, as the model of the chain has it."""

    events: tuple[Event, ...]

    @property
    def peak(self) -> int:
        return max(event.peak for event in self.events)

    @property
    def seconds(self) -> float:
        last = self.events[-1]
        return last.start + last.seconds

    def __iter__(self) -> Iterator[Event]:
        return iter(self.events)


def keep_everything(profile: ChainProfile) -> tuple[Node, ...]:
    """The schedule without recomputation."""
    last = len(profile) - 1
    return tuple(Node(k, last) for k in range(last + 1))
