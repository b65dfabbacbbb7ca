"""Measures a model's chain of blocks: times, and bytes of the allocator."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import statistics
import time
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ._recompute_blocks import Blocks, Chain, find_chain
from ._recompute_calls import (
    OP,
    Replay,
    State,
    buffers_named,
    buffers_of,
    generators_of,
    intercepted,
    is_intercepted,
    overlaps,
    plain_call,
    same_bits,
    signature_of,
    signature_of_call,
    tensors_of,
)
from ._recompute_chain import Block, ChainProfile, Option
from ._recompute_memory import FakeRecorder, MemoryRecorder, StorageWatch, Usage, storage_bytes
from ._recompute_offload import HostLink, offload_seconds
from ._recompute_selective import KeptOutputs, needed_outputs

_BEFORE, _BEHIND = "before the blocks", "behind the blocks"
_SCALARS = 1024  # bytes of numbers that operators turn into tensors
_REPETITIONS = 3  # with the pass that finds the blocks, and that of bytes, five steps


class Measured(NamedTuple):
    """A profile, and what running a plan of it needs to know."""

    profile: ChainProfile
    chain: Chain
    buffers: tuple[tuple[str, ...], ...]  # names of those that each block changes
    state_bytes: tuple[int, ...]  # of these
    drawn_bytes: tuple[int, ...]  # of the states of generators that each block draws from
    random_bytes: int  # of the generators' states, where they lie on the device
    operators: tuple[str, ...]  # whose outputs the option "selective" keeps
    needed: tuple[int, ...]  # how many of these outputs each block needs


class Job(NamedTuple):
    """A training step without its optimizer: the loss of a model's output."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    loss_fn: Callable[[Any], torch.Tensor] | None

    def forward(self) -> Any:
        return self.model(*self.args, **self.kwargs)

    def loss(self, output: Any) -> torch.Tensor:
        if self.loss_fn is not None:
            loss = self.loss_fn(output)
            if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
                raise ValueError(f"{OP}: loss_fn must return a tensor with one number, got {_described(loss)}")
            return loss
        if isinstance(getattr(output, "loss", None), torch.Tensor):
            return output.loss
        floats = [t for t in tensors_of(output) if t.requires_grad]
        if not floats:
            raise ValueError(f"{OP}: nothing in the model's output needs a gradient, got {signature_of(output)}")
        return floats[0] if floats[0].numel() == 1 else sum(t.float().mean() for t in floats)

    @property
    def modules(self) -> list[nn.Module]:
        return [self.model, self.loss_fn] if isinstance(self.loss_fn, nn.Module) else [self.model]

    @property
    def leaves(self) -> list[torch.Tensor]:
        """What gradients are gathered in."""
        tensors = [p for module in self.modules for p in module.parameters()]
        tensors += tensors_of([self.args, self.kwargs])
        return list({id(t): t for t in tensors if t.requires_grad and t.is_leaf}.values())

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


def job_of(model: nn.Module, inputs: Any, loss_fn: Callable[[Any], torch.Tensor] | None) -> Job:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{OP}: model must be a torch.nn.Module, got {type(model).__name__}")
    if loss_fn is not None and not callable(loss_fn):
        raise TypeError(f"{OP}: loss_fn must be a function of the model's output, got {type(loss_fn).__name__}")
    parameters = list(model.parameters())
    if not any(p.requires_grad for p in parameters):
        raise ValueError(f"{OP}: model must have parameters that need gradients, {type(model).__name__} has none")
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(inputs, Mapping):
        kwargs = dict(inputs)
    elif isinstance(inputs, (tuple, list)):
        args = tuple(inputs)
    else:
        args = (inputs,)
    tensors = tensors_of([args, kwargs])
    if not tensors:
        raise TypeError(
            f"{OP}: inputs must be a tensor, a tuple of arguments, or a dict of keyword arguments, with at least one "
            f"tensor, got {type(inputs).__name__}"
        )
    device = parameters[0].device
    for tensor in tensors:
        if tensor.device != device:
            raise ValueError(f"{OP}: inputs must be on the model's device {device}, got a tensor on {tensor.device}")
    if any(is_intercepted(module) for module in model.modules()):
        raise ValueError(f"{OP}: model runs a plan already; call its remove() first")
    return Job(model, args, kwargs, loss_fn)


def measure(
    job: Job,
    *,
    optimizer: torch.optim.Optimizer | int | None = None,
    blocks: Blocks = None,
    generators: Sequence[torch.Generator] = (),
    link: HostLink | None = None,
    operators: tuple[str, ...] = (),
    without_data: bool = False,
    progress: bool = False,
) -> Measured:
    """Five forwards and four backwards, of which none keeps the activations of more than one block. The model, its
    buffers and gradients, and the generators are left as they were."""
    if not isinstance(generators, Sequence) or not all(isinstance(g, torch.Generator) for g in generators):
        got = [type(g).__name__ for g in generators] if isinstance(generators, Sequence) else type(generators).__name__
        raise TypeError(f"{OP}: generators must be a sequence of torch.Generator, got {got}")
    extra = optimizer_bytes(job.model, optimizer)
    generators = generators_of(job.device, generators)
    state = State([key for module in job.modules for key in buffers_of(module)], generators)
    with (
        _progress(2 + _REPETITIONS, progress) as advance,
        torch.enable_grad(),
        _without_data(job) if without_data else contextlib.nullcontext(job) as job,
    ):
        try:
            chain = find_chain(job.model, job.forward, blocks)
            selective = _Selective(frozenset(operators), [not _is_compiled(module) for module in chain.modules])
            with _zero_gradients(job.leaves):
                advance("bytes")
                if without_data:
                    with FakeRecorder() as recorder:
                        trace = _trace(job, chain, recorder.phase, generators, selective)
                    times, frame = recorder.times, 0.0
                    buffers = tuple(tuple(n for n, _ in m.named_buffers()) for m in chain.modules)
                else:
                    state.set()
                    with MemoryRecorder(job.device) as recorder:
                        trace = _trace(job, chain, recorder.phase, generators, selective, link, careful=True)
                    state.set()
                    selective = selective._replace(needed=trace.needed)
                    times = {}
                    for turn in range(_REPETITIONS):
                        advance("times")
                        chosen = _chosen(_alike(chain, trace, recorder.usages), turn)
                        _trace(
                            job,
                            chain,
                            _Timer(job.device, times).phase,
                            generators,
                            selective,
                            chosen=chosen,
                            changed=trace.buffers,
                        )
                        state.set()
                    frame, buffers = _frame_seconds(job.device, generators), trace.buffers
        finally:
            state.set()
    usages = _without_locals(recorder.usages, trace.local_bytes)
    seconds = _seconds(times, _alike(chain, trace, usages), frame)
    inner = [_block(name, str(k), usages, seconds, trace.output_bytes[k], True) for k, name in enumerate(chain.names)]
    inner = [_with_selective(block, k, usages, seconds) for k, block in enumerate(inner)]
    if link is not None:
        inner = _with_offload(inner, trace.sent_bytes, usages, link)
    inner = [_without_dominated(block) for block in inner]
    before = _block(_BEFORE, _BEFORE, usages, seconds, trace.input_bytes, False)
    behind = _block(_BEHIND, _BEHIND, usages, seconds, trace.loss_bytes, False)
    static = [t for module in job.modules for t in (*module.parameters(), *module.buffers())]
    static += tensors_of([job.args, job.kwargs])
    gradients = sum(t.numel() * t.element_size() for t in job.leaves)
    profile = ChainProfile(
        tuple(_with_shared_gradients((before, *inner, behind), trace.reached)),
        storage_bytes(static) + gradients + extra + _SCALARS,
        frame,
        str(job.device),
        signature_of_call(job.args, job.kwargs, job.device),
    )
    random_bytes = sum(g.get_state().nbytes for g in generators) if job.device.type == "cpu" else 0
    changed = (buffers_named(m, names) for m, names in zip(chain.modules, buffers, strict=True))
    return Measured(
        profile,
        chain,
        buffers,
        tuple(storage_bytes(m._buffers[n] for m, n in c) for c in changed),
        tuple(trace.drawn_bytes),
        random_bytes,
        operators,
        tuple(trace.needed),
    )


def optimizer_bytes(model: nn.Module, optimizer: torch.optim.Optimizer | int | None) -> int:
    """Of its state, once it has made a step."""
    if optimizer is None:
        return 0
    if isinstance(optimizer, int) and not isinstance(optimizer, bool):
        if optimizer < 0:
            raise ValueError(f"{OP}: optimizer must be an optimizer, or bytes of its state >= 0, got {optimizer}")
        return optimizer
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"{OP}: optimizer must be a torch optimizer or bytes of its state, got {_described(optimizer)}")
    found = sum(storage_bytes(tensors_of(list(state.values()))) for state in optimizer.state.values())
    for group in optimizer.param_groups:
        fresh = [p for p in group["params"] if p.requires_grad and p not in optimizer.state]
        if fresh:
            found += _fresh_state_bytes(optimizer, group, fresh)
    return found


def _fresh_state_bytes(
    optimizer: torch.optim.Optimizer, group: dict[str, Any], parameters: Sequence[torch.Tensor]
) -> int:
    """What the same optimizer makes of small parameters, in proportion."""
    settings = {key: value for key, value in group.items() if key != "params"}
    small = [nn.Parameter(torch.zeros([min(n, 8) for n in p.shape], dtype=p.dtype)) for p in parameters]
    for p in small:
        p.grad = torch.zeros_like(p)
    try:
        trial = type(optimizer)([{**settings, "params": small}])
        trial.step()
    except Exception as error:
        raise ValueError(
            f"{OP}: bytes of the state of {type(optimizer).__name__} are not known before its first step ({error}); "
            "make a step, or pass optimizer= bytes"
        ) from error
    total = 0
    for p, real in zip(small, parameters, strict=True):
        for value in trial.state.get(p, {}).values():
            if isinstance(value, torch.Tensor):
                times = real.numel() / p.numel() if value.numel() == p.numel() and p.numel() else 1
                total += int(value.numel() * value.element_size() * times)
    return total


@contextlib.contextmanager
def _without_data(job: Job) -> Iterator[Job]:
    """The same step on fake tensors, which have no data; those of the device "meta" have none anyway."""
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    if job.device.type == "meta":
        yield job
        return
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    made: dict[torch.Tensor, torch.Tensor] = {}

    def fake(t: torch.Tensor) -> torch.Tensor:
        if isinstance(t, FakeTensor):
            return t
        if t not in made:
            made[t] = mode.from_tensor(t, static_shapes=True)
        return made[t]

    places = [
        (members, name, value)
        for whole in job.modules
        for module in whole.modules()
        for members in (module._parameters, module._buffers)
        for name, value in members.items()
        if value is not None
    ]
    try:
        for members, name, value in places:
            members[name] = fake(value)
        with mode:
            args, kwargs = torch.utils._pytree.tree_map_only(torch.Tensor, fake, (job.args, job.kwargs))
            yield job._replace(args=args, kwargs=kwargs)
    finally:
        for members, name, value in places:
            members[name] = value


# ---- one step, block by block ----


class _Trace(NamedTuple):
    output_bytes: list[int]
    input_bytes: int  # of what the first block reads
    buffers: tuple[tuple[str, ...], ...]
    drawn_bytes: list[int]  # of the states of generators that each block draws from
    sent_bytes: list[int]  # of each block, with a link
    needed: list[int]  # outputs of operators that the option "selective" keeps, of each block
    loss_bytes: int  # and its gradient's, and what refers to them, until the backward is over
    reached: list[list[torch.Tensor]]  # leaves whose gradients came from each block, and from before and behind
    local_bytes: int  # of what lies before the blocks, which the forward holds until it ends


class _Selective(NamedTuple):
    """Operators whose outputs a block may keep, and how many of them each block needs; before that is known, whether it
    may have the option at all."""

    operators: frozenset[str]
    needed: Sequence[int]


def _trace(
    job: Job,
    chain: Chain,
    phase: Callable[[str], Any],
    generators: Sequence[torch.Generator],
    selective: _Selective,
    link: HostLink | None = None,
    careful: bool = False,
    chosen: Collection[int] | None = None,
    changed: Sequence[Sequence[str]] = (),
) -> _Trace:
    """A forward and a backward, in which each block is measured when the model calls it, on inputs that are cut off."""
    plain = {module: plain_call(module) for module in chain.modules}
    leaves = job.leaves
    versions = [t.grad._version for t in leaves]
    reached: list[list[torch.Tensor]] = []

    def gather() -> None:
        now = [t.grad._version for t in leaves]
        reached.append([t for t, a, b in zip(leaves, versions, now, strict=True) if a != b])
        versions[:] = now

    output_bytes: list[int] = []
    sent_bytes: list[int] = []
    needed: list[int] = []
    drawn_bytes: list[int] = []
    buffers: list[tuple[str, ...]] = []
    edges: list[Any] = []  # between what lies before the blocks, and the first one
    input_bytes = 0
    last: list[torch.Tensor] = []
    held: list[Any] = []  # what the last block reads: in training it has that until its backward
    inputs: list[weakref.ref[torch.Tensor]] = []  # of all blocks
    running = contextlib.ExitStack()
    watch, watching = StorageWatch(), contextlib.ExitStack()
    local_bytes = 0

    def call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal input_bytes, local_bytes
        k = len(output_bytes)
        if k >= len(chain.modules):
            raise RuntimeError(f"{OP}: block {chain.names[-1]} is called again, other than in the forward before")
        if k == 0:
            running.close()
            watching.close()
            watch.forget(tensors_of([args, kwargs]))
            local_bytes = watch.bytes_held()
            grads = [t for t in tensors_of([args, kwargs]) if t.requires_grad]
            edges.extend((torch.autograd.graph.get_gradient_edge(t), _like(t)) for t in grads)
            input_bytes = storage_bytes(tensors_of([args, kwargs]))
        inputs.extend(weakref.ref(t) for t in tensors_of([args, kwargs]))
        state = State(buffers_of(module), generators)
        block = _CalledBlock(module, plain[module], args, kwargs, str(k), chain.names[k], chosen is not None)
        if chosen is None:
            output = block.measured(phase, state, careful)
            needed.append(block.selective(phase, state if careful else None, selective, k))
            if link is not None:
                sent = block.trained(phase, lambda: link.context(k, module, (args, kwargs)), ":offload")
                sent_bytes.append(sent.nbytes)
        else:
            output = block.output()
            if k in chosen:

                def replay() -> Replay:
                    return Replay(buffers_named(module, changed[k]), generators)

                block.trained(phase)
                block.again(phase, ":again", replay())
                if selective.needed[k]:
                    kept = KeptOutputs(selective.operators, selective.needed[k], generators)
                    block.again(phase, ":selective", replay(), kept)
        gather()
        output_bytes.append(storage_bytes(tensors_of(output)))
        paths = {m: path + "." * bool(path) for path, m in module.named_modules()}
        buffers.append(tuple(paths[m] + name for m, name in state.changed()) if careful else ())
        drawn_bytes.append(block.drawn_bytes)
        if k + 1 == len(chain.modules):
            last.extend(t for t in tensors_of(output) if t.requires_grad)
            output = torch.utils._pytree.tree_map_only(torch.Tensor, _made, output)
            # What a caller of blocks still holds must not count as released by what lies behind them.
            held.extend([state, block, args, kwargs, *(reference() for reference in inputs)])
            torch.clear_autocast_cache()
            running.enter_context(phase(f"{_BEHIND}:history"))
        return output

    torch.clear_autocast_cache()
    with intercepted(chain.modules, call):
        running.enter_context(phase(f"{_BEFORE}:history"))
        if chosen is None:
            watching.enter_context(watch)
        try:
            loss = job.loss(job.forward())
        finally:
            watching.close()
            running.close()
    local_bytes -= watch.bytes_held()
    if len(output_bytes) < len(chain.modules):
        raise RuntimeError(
            f"{OP}: block {chain.names[len(output_bytes)]} is not called, other than in the forward before"
        )
    if not loss.requires_grad:
        raise ValueError(f"{OP}: the loss must depend on parameters that need gradients")
    if _nodes([loss.grad_fn]) & _nodes([edge.node for edge, _ in edges]):
        raise ValueError(
            f"{OP}: what lies behind block {chain.names[-1]} reads something from before block {chain.names[0]}, other "
            "than through the blocks, so that the model is no chain; let a module that holds both be one of the blocks"
        )
    loss_bytes = 4 * loss.element_size()
    with phase(f"{_BEHIND}:backward"):
        loss.backward(inputs=[*last, *leaves])
    gather()
    del loss
    held.clear()
    with phase(f"{_BEFORE}:backward"):
        if edges:
            torch.autograd.backward([e for e, _ in edges], [_zeros(like) for _, like in edges], inputs=leaves)
    gather()
    reached.insert(0, reached.pop())
    return _Trace(
        output_bytes, input_bytes, tuple(buffers), drawn_bytes, sent_bytes, needed, loss_bytes, reached, local_bytes
    )


def _nodes(roots: Sequence[Any]) -> set[Any]:
    """What a backward from there runs, but for leaves, which a parameter has one of wherever it is used."""
    found: set[Any] = set()
    todo = list(roots)
    while todo:
        node = todo.pop()
        if node is not None and node not in found and type(node).__name__ != "AccumulateGrad":
            found.add(node)
            todo.extend(after for after, _ in node.next_functions)
    return found


class _CalledBlock:
    """A block with the arguments of its call, cut off from their history; `drawn_bytes`: of the states of generators
    that it draws from. is_timed: gradients of its output are there when a backward begins, whose time they are not."""

    drawn_bytes = 0

    def __init__(
        self,
        module: nn.Module,
        run: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        label: str,
        name: str,
        is_timed: bool,
    ) -> None:
        self._args, self._kwargs = torch.utils._pytree.tree_map_only(torch.Tensor, _cut, (args, kwargs))
        self._run, self._label, self._name, self._is_timed = run, label, name, is_timed

    def _call(self) -> Any:
        return self._run(*self._args, **self._kwargs)

    def measured(self, phase: Callable[[str], Any], state: State, careful: bool) -> Any:
        """The output, cut off from its history. careful: both forwards must give the same."""
        torch.clear_autocast_cache()
        with torch.autograd.graph.saved_tensors_hooks(_drop, _drop), phase(f"{self._label}:forward"):
            output = self._call()
        values = torch.utils._pytree.tree_map_only(torch.Tensor, _cut, output)
        del output
        if careful:
            self.drawn_bytes = state.drew()
            state.set()
        self.trained(phase, check=values if careful else None)
        return values

    def output(self) -> Any:
        """Cut off from its history."""
        with torch.autograd.graph.saved_tensors_hooks(_drop, _drop):
            return torch.utils._pytree.tree_map_only(torch.Tensor, _cut, self._call())

    def again(
        self,
        phase: Callable[[str], Any],
        option: str,
        replay: Callable[[Callable[[], Any]], Any],
        kept: KeptOutputs | None = None,
    ) -> None:
        """Trained as a segment of its own, which may keep something. replay: runs it both times."""
        run = self._run
        contexts = [contextlib.nullcontext()] if kept is None else [*kept.contexts()]

        def segment(*args: Any, **kwargs: Any) -> Any:
            context = contexts.pop(0) if len(contexts) > 1 else contexts[0]

            def within() -> Any:
                with context:
                    return run(*args, **kwargs)

            output = replay(within)
            torch.clear_autocast_cache()
            return output

        self._run = functools.partial(checkpoint, segment, use_reentrant=False, preserve_rng_state=False)
        self.trained(phase, option=option)
        self._run = run

    def selective(self, phase: Callable[[str], Any], state: State | None, how: _Selective, k: int) -> int:
        """Bytes of a run that keeps outputs of operators; how many. state: of before, which holds no memory of what is
        measured."""
        if not (how.operators and how.needed[k]):
            return 0
        after = State(state.buffers, state.generators) if state is not None else None

        def from_the_start(run: Callable[[], Any]) -> Any:
            if state is not None:
                state.set()
            return run()

        needed = needed_outputs(how.operators, lambda: from_the_start(self._call))
        if needed:
            generators = state.generators if state is not None else ()
            self.again(phase, ":selective", from_the_start, KeptOutputs(how.operators, needed, generators))
        if after is not None:
            after.set()
        return needed

    def trained(
        self,
        phase: Callable[[str], Any],
        context: Callable[[], Any] = contextlib.nullcontext,
        option: str = "",
        check: Any = None,
    ) -> Any:
        """A forward with history, and its backward; what the context gave."""
        torch.clear_autocast_cache()  # what a run before has cast is this one's to cast
        try:
            with phase(f"{self._label}{option}:history"), context() as given:
                output = self._call()
        except RuntimeError as error:
            if check is None or isinstance(error, torch.OutOfMemoryError):
                raise
            raise ValueError(
                f"{OP}: block {self._name} can't run again with the same input: it has a side effect, such as a cache "
                f"of keys and values (use_cache=False); leave it out of blocks. What it raised: {error}"
            ) from error
        if check is not None:
            pairs = zip(tensors_of(check), tensors_of(output), strict=True)
            if not all(same_bits(a, b) for a, b in pairs):
                raise ValueError(
                    f"{OP}: block {self._name} gives another output when it runs again with the same input, "
                    "parameters, buffers and random numbers, so that its gradients would be wrong: it has a side "
                    "effect, or an operator that is not deterministic (see torch.use_deterministic_algorithms); leave "
                    "it out of blocks"
                )
            del pairs
        seeded = [_Seed.apply(t, self._is_timed) for t in tensors_of(output) if t.requires_grad]
        edges = [torch.autograd.graph.get_gradient_edge(t) for t in seeded]
        zeros = [_zeros(_like(t)) for t in seeded]
        with phase(f"{self._label}{option}:release"):
            del output, seeded
        with phase(f"{self._label}{option}:backward"):
            if edges:
                torch.autograd.backward(edges, zeros)
        for t in tensors_of([self._args, self._kwargs]):
            t.grad = None
        return given


class _Seed(torch.autograd.Function):
    """A view, whose gradient is made when the backward gets there, or before, and is the engine's alone as in a whole
    backward."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, before: bool) -> torch.Tensor:
        ctx.like = _like(tensor)
        ctx.made = [_normal(ctx.like)] if before else []
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.made.pop() if ctx.made else _normal(ctx.like), None


class _Made(torch.autograd.Function):
    """A tensor cut off from its history as something that was made, which may be changed in place; its gradient ends
    here, for to hand it on from Python would copy it."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> None:
        return None


def _made(t: torch.Tensor) -> torch.Tensor:
    return _Made.apply(t) if t.requires_grad else t


def _like(t: torch.Tensor) -> tuple[Any, ...]:
    """As the gradient will be."""
    stride = torch.empty(t.shape, device="meta").stride() if overlaps(t) else t.stride()
    return tuple(t.shape), stride, t.dtype, t.device


def _normal(like: tuple[Any, ...]) -> torch.Tensor:
    shape, stride, dtype, device = like
    return torch.empty_strided(shape, stride, dtype=dtype, device=device).normal_()


def _zeros(like: tuple[Any, ...]) -> torch.Tensor:
    """Without memory of its own."""
    shape, _, dtype, device = like
    return torch.zeros((), dtype=dtype, device=device).expand(shape)


def _drop(_: Any) -> None:
    return None


def _cut(t: torch.Tensor) -> torch.Tensor:
    return t.detach().requires_grad_(t.requires_grad)


@contextlib.contextmanager
def _zero_gradients(leaves: Sequence[torch.Tensor]) -> Iterator[None]:
    """Gradients of their own, so that a backward adds to them as it will in training; and no hooks that wait for them,
    such as those that make an optimizer's step."""
    before = [(t, t.grad) for t in leaves]
    hooks = [(t._post_accumulate_grad_hooks, dict(t._post_accumulate_grad_hooks or {})) for t in leaves]
    for t in leaves:
        t.grad = torch.zeros_like(t)
    for there, _ in hooks:
        if there is not None:
            there.clear()
    try:
        yield
    finally:
        for t, grad in before:
            t.grad = grad
        for there, held in hooks:
            if there is not None:
                there.update(held)


# ---- numbers ----


def _block(
    name: str, label: str, usages: dict[str, Any], seconds: dict[str, float], output_bytes: int, recomputable: bool
) -> Block:
    option = _option("keep", label, usages, seconds)
    if not recomputable:
        return Block(name, 0.0, output_bytes, output_bytes, (option,), False)
    peak = max(usages[f"{label}:forward"].peak, output_bytes)
    return Block(name, seconds[f"{label}:forward"], output_bytes, peak, (option,), recomputable)


def _option(name: str, label: str, usages: dict[str, Any], seconds: dict[str, float]) -> Option:
    history, backward = usages[f"{label}:history"], usages[f"{label}:backward"]
    released = usages[f"{label}:release"].after if f"{label}:release" in usages else 0
    saved = max(history.after, 0)
    return Option(
        name,
        seconds[f"{label}:history"],
        seconds[f"{label}:backward"],
        saved,
        max(history.peak, saved),
        max(saved + released + backward.peak, 0),
    )


def _with_offload(
    blocks: Sequence[Block], sent_bytes: Sequence[int], usages: dict[str, Any], link: HostLink
) -> list[Block]:
    """One more option each: what it saves is on the host between forward and backward. While a block's backward runs,
    what the block before sent may come back."""
    made = []
    for k, (block, sent) in enumerate(zip(blocks, sent_bytes, strict=True)):
        keep = block.options[0]
        offload = _option("offload", f"{k}:offload", usages, dict.fromkeys(_phases(k), 0.0))
        forward, backward = offload_seconds(link, sent, keep.forward, keep.backward)
        peak = max(offload.backward_peak, keep.backward_peak) + max(sent_bytes)
        offload = offload._replace(forward=forward, backward=backward, backward_peak=peak)
        made.append(block._replace(options=(*block.options, offload)) if sent else block)
    return made


def _with_selective(block: Block, k: int, usages: dict[str, Any], seconds: dict[str, float]) -> Block:
    """One more option, where it was measured. It computes more than the first one: less time is chance."""
    if f"{k}:selective:history" not in usages or f"{k}:selective:history" not in seconds:
        return block
    keep, option = block.options[0], _option("selective", f"{k}:selective", usages, seconds)
    backward = max(option.backward, keep.forward + keep.backward - option.forward)
    return block._replace(options=(keep, option._replace(backward=backward)))


def _without_dominated(block: Block) -> Block:
    """But for options that keep no less, and take no less time, than one before them."""
    found: list[Option] = []
    for option in block.options:
        seconds = option.forward + option.backward
        if not any(o.saved_bytes <= option.saved_bytes and o.forward + o.backward <= seconds for o in found):
            found.append(option)
    return block._replace(options=tuple(found))


def _is_compiled(module: nn.Module) -> bool:
    """Whether some of it is, whose operators nobody sees."""
    return any(m._compiled_call_impl is not None or hasattr(m, "_orig_mod") for m in module.modules())


def _phases(k: int) -> tuple[str, str]:
    return f"{k}:offload:history", f"{k}:offload:backward"


def _without_locals(usages: dict[str, Usage], local_bytes: int) -> dict[str, Usage]:
    """What the model's forward holds of what it computed before the blocks is there as long as it runs, and gone in the
    backward; measured was as if `before` kept that, and `behind` released it."""
    made = {}
    for name, (peak, after) in usages.items():
        label, _, what = name.rpartition(":")
        if what in ("forward", "history"):
            if label == _BEFORE:
                after -= local_bytes
            else:
                peak += local_bytes
            if label == _BEHIND:
                after += local_bytes
        made[name] = Usage(peak, after)
    return made


def _with_shared_gradients(blocks: Sequence[Block], reached: Sequence[Sequence[torch.Tensor]]) -> list[Block]:
    """What gets gradients from several blocks has their sum held apart from its own, from the first backward until the
    last one is done."""
    first = {id(t): k for k, leaves in reversed(list(enumerate(reached))) for t in leaves}
    made, shared = [], {}
    for k, block in reversed(list(enumerate(blocks))):
        more = sum(shared.values())
        options = [
            o._replace(history_peak=o.history_peak + more, backward_peak=o.backward_peak + more) for o in block.options
        ]
        made.append(block._replace(forward_peak=block.forward_peak + more, options=tuple(options)))
        shared |= {id(t): t.numel() * t.element_size() for t in reached[k] if first[id(t)] < k}
    return made[::-1]


def _alike(chain: Chain, trace: _Trace, usages: dict[str, Any]) -> list[list[int]]:
    """Blocks of one class with the same bytes and parameters, which take the same time."""
    found: dict[Any, list[int]] = {}
    for k, module in enumerate(chain.modules):
        sizes = tuple(usages[f"{k}:{what}"] for what in ("forward", "history", "release", "backward"))
        shapes = tuple(p.shape for p in module.parameters())
        found.setdefault((type(module), trace.output_bytes[k], sizes, shapes), []).append(k)
    return list(found.values())


def _chosen(alike: Sequence[Sequence[int]], turn: int) -> set[int]:
    """Some of each kind, others each time; about a third of the blocks, since each takes three times as long."""
    count = max(1, sum(map(len, alike)) // (3 * len(alike)))
    return {kind[(turn * count + i) % len(kind)] for kind in alike for i in range(count)}


def _seconds(times: dict[str, list[float]], alike: Sequence[Sequence[int]], frame: float) -> dict[str, float]:
    """Medians, of a kind together. A forward that keeps nothing takes what a checkpoint adds to a block with history,
    but for what each checkpoint costs."""
    found = {name: statistics.median(values) for name, values in times.items()}
    for kind in alike:

        def median(what: str, kind: Sequence[int] = kind) -> float:
            return statistics.median(seconds for k in kind for seconds in times.get(f"{k}:{what}", ()))

        history, backward = median("history"), median("backward")
        if any(f"{k}:again:history" in times for k in kind):
            forward = max(0.0, median("again:history") + median("again:backward") - history - backward - frame)
        else:
            forward = median("forward")
        for k in kind:
            found |= {f"{k}:forward": forward, f"{k}:history": history, f"{k}:backward": backward}
        if any(f"{k}:selective:history" in times for k in kind):
            kept = {f"selective:{what}": median(f"selective:{what}") for what in ("history", "backward")}
            found |= {f"{k}:{what}": value for k in kind for what, value in kept.items()}
    return found


def _frame_seconds(device: torch.device, generators: Sequence[torch.Generator]) -> float:
    """What a segment costs beside what runs in it."""
    x = torch.zeros(1, device=device, requires_grad=True)

    def segment() -> torch.Tensor:
        replay = Replay((), generators)
        made = checkpoint(lambda t: replay(lambda: t * t), x, use_reentrant=False, preserve_rng_state=False)
        return made.sum()

    def run(function: Callable[[], torch.Tensor]) -> float:
        times = []
        for _ in range(10):
            _synchronize(device)
            begin = time.perf_counter()
            function().backward()
            _synchronize(device)
            times.append(time.perf_counter() - begin)
        return statistics.median(times)

    plain = run(lambda: (x * x).sum())
    return max(0.0, run(segment) - plain)


class _Timer:
    """Seconds of phases, gathered by name."""

    def __init__(self, device: torch.device, times: dict[str, list[float]]) -> None:
        self._device, self._times = device, times

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        _synchronize(self._device)
        begin = time.perf_counter()
        yield
        _synchronize(self._device)
        self._times.setdefault(name, []).append(time.perf_counter() - begin)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def _progress(steps: int, shown: bool) -> Iterator[Callable[[str], None]]:
    """advance(what is next)"""
    if not shown:
        yield lambda what: None
        return
    if importlib.util.find_spec("rich") is None:
        raise RuntimeError(f"{OP}: progress=True needs rich (pip install rich)")
    from rich.progress import Progress

    with Progress(transient=True) as bar:
        task = bar.add_task(f"{OP}: blocks", total=steps)
        yield lambda what: bar.update(task, advance=1, description=f"{OP}: {what}")


def _described(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor {list(value.shape)}"
    return f"{value!r} of {type(value).__name__}"[:100]
