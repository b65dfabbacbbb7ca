"""One operator's faces: raw kernel, autograd, torch.func transforms, compilation, sharding, and the route between them.

`torch.library.register_autograd` alone is not enough: with it `func.grad`, `vmap(grad)` and `hessian` raise, and
`func.jvp` returns a wrong tangent without an error. So every call takes the first route that fits:

    compiling                              the registered operator, which the compiler sees as one node
    a torch.func transform, forward AD     an autograd.Function with vmap and jvp rules over the raw operator
    a tensor subclass or a dispatch mode   the registered operator, whose autograd kernel is that same Function
    no gradient wanted                     the raw operator, below autograd
    otherwise                              an autograd.Function without those rules, which costs half as much
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd import forward_ad

from . import _backend

_PLAIN = (torch.Tensor, torch.nn.Parameter)
_are_functorch_transforms_active = torch._C._are_functorch_transforms_active
_len_torch_dispatch_stack = torch._C._len_torch_dispatch_stack
_Excluding = torch._C._ExcludeDispatchKeyGuard
# Below autograd, and below the tracking of views too: kernels arrange their outputs in memory with as_strided, and what
# counts as a view must not be changed in place, as in `logdet += other`.
_AUTOGRAD = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)
for _key in ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor"):
    _AUTOGRAD |= torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, _key))

_library = torch.library.Library("pyperf_dl", "FRAGMENT")
# Rules that only a dispatch mode or a tensor subclass asks for; their modules are slow to import, or import triton.
_unregistered_flops: list[tuple[Operator, Any]] = []
_unregistered_sharding: list[tuple[Operator, Any]] = []
_decompositions: dict[Any, Callable[..., Any]] = {}


def is_plain(t: torch.Tensor) -> bool:
    """Not a subclass that distributes, wraps or records."""
    return type(t) in _PLAIN


def replicated_beside(other: torch.Tensor, t: torch.Tensor | None) -> torch.Tensor | None:
    """Beside a DTensor, `t` as one."""
    if t is None or type(other).__name__ != "DTensor" or not is_plain(t):
        return t
    from torch.distributed.tensor import DTensor, Replicate

    return DTensor.from_local(t, other.device_mesh, [Replicate()] * other.device_mesh.ndim, run_check=False)


def _any_requires_grad(args: Sequence[Any], tensors: int) -> bool:
    return args[0].requires_grad or (tensors > 1 and any(t is not None and t.requires_grad for t in args[1:tensors]))


class Operator:
    """A registered operator `pyperf_dl::<name>` whose first `tensors` arguments are tensors, followed by `constants`.

    Args:
        name: the schema is in `csrc/<family>.cpp`.
        tensors: number of leading tensor arguments, of which all but the first may be None.
        constants: number of those behind them, or None, that have no derivative and no batch dimension. The other
            arguments are numbers, strings and flags.
        fake: shapes, strides and dtypes of the outputs, without data.
        reference: the same function in plain PyTorch; differentiable, and the operator's decomposition.
        launch: `module:function` of the Triton form, same arguments.
        save: `save(ctx, inputs, output)` -> tensors that the two rules below find in `ctx.saved_tensors`; the
            arguments behind the first `tensors` they find in `ctx.statics`.
        backward: `backward(ctx, *grads)` -> gradients of the tensor arguments. None: not differentiable.
        jvp: `jvp(ctx, *tangents)` -> tangents of the outputs, given those of the tensor arguments.
        batch: `batch(*args)` -> args, for tensors that got a batch dimension in front; outputs carry it in front too.
        shard: `shard(*args)` -> dimensions along which all tensors of the call may be sharded alike; or pairs, those of
            the tensor arguments and those of the outputs, None for what is replicated. Constants are replicated.
        flops: `flops(*shapes_and_args, out_shape)`, for torch.utils.flop_counter.
    """

    def __init__(
        self,
        name: str,
        *,
        tensors: int,
        constants: int = 0,
        fake: Callable[..., Any],
        reference: Callable[..., Any],
        launch: str | None = None,
        save: Callable[..., Sequence[Any]] | None = None,
        backward: Callable[..., Any] | None = None,
        jvp: Callable[..., Any] | None = None,
        batch: Callable[..., Sequence[Any]] | None = None,
        shard: Callable[..., Sequence[int]] | None = None,
        flops: Callable[..., int] | None = None,
    ) -> None:
        self.name, self.tensors, self.constants = name, tensors, constants
        self.fake, self.reference, self.launch = fake, reference, launch
        self.save, self.backward, self.jvp, self.batch, self.shard, self.flops = (
            save,
            backward,
            jvp,
            batch,
            shard,
            flops,
        )
        self._triton: _Registered | None = None
        if _backend._C is not None:
            self.native = _Registered(self, name)
        if launch is not None and _backend.triton_installed():
            _backend.triton_registrations.append(lambda: self.triton)
            for key in ("CUDA", "XPU"):  # direct calls of the operator, where nothing was compiled for a device
                if not torch._C._dispatch_has_kernel_for_dispatch_key(f"pyperf_dl::{name}", key):
                    _library.impl(name, self._launched, key)

    def __call__(self, *args: Any) -> Any:
        first = args[0]
        which = _backend.serving(first)
        if which == "reference":
            return self.reference(*args)
        registered = self.triton if which == "triton" else self.native
        if torch.compiler.is_compiling():
            return registered.op(*args)
        if _are_functorch_transforms_active() or forward_ad._current_level >= 0:
            return registered.function.apply(*args)
        if not is_plain(first) or _len_torch_dispatch_stack():
            _register_late()
            return registered.op(*args)
        if torch.is_grad_enabled() and _any_requires_grad(args, self.tensors):
            return registered.apply_plainly(args[self.tensors :], *args[: self.tensors])
        with _Excluding(_AUTOGRAD):
            return registered.op(*args)

    @property
    def triton(self) -> _Registered:
        """The Triton form: an operator of its own, registered when it is first needed."""
        if self._triton is None:
            if self.launch is None:
                raise RuntimeError(f"{self.name}: the triton backend has no form of this operator; force another one")
            schema = str(self.native.op._schema).split("::", 1)[1].replace(self.name, f"{self.name}_triton", 1)
            _library.define(schema)
            _library.impl(f"{self.name}_triton", self._launched, "CompositeExplicitAutograd")
            self._triton = _Registered(self, f"{self.name}_triton")
        return self._triton

    def _launched(self, *args: Any) -> Any:
        module, function = self.launch.split(":")
        return getattr(importlib.import_module(module), function)(*args)


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Every operator in plain PyTorch, for ``ExportedProgram.run_decompositions``.

    >>> table = torch.export.default_decompositions()
    >>> table.update(pyperf_dl.decompositions())
    """
    # Not in PyTorch's global table: Inductor refuses an operator that is there and not in its own, where CI is set.
    return dict(_decompositions)


def pushed_forward(
    function: Callable[..., Any], inputs: Sequence[torch.Tensor], tangents: Sequence[torch.Tensor | None]
) -> tuple[torch.Tensor, ...]:
    """Tangents of the outputs, as the transpose of the transpose: that nests in forward AD of every kind."""
    tangents = [torch.zeros_like(x) if t is None else t for x, t in zip(inputs, tangents, strict=True)]
    outputs, pull = torch.func.vjp(function, *inputs)
    back = torch.func.vjp(pull, tuple(map(torch.zeros_like, outputs)))[1]
    return back(tuple(tangents))[0]


class _Registered:
    """Every registration of one dispatcher entry."""

    def __init__(self, operator: Operator, name: str) -> None:
        self.op = getattr(torch.ops.pyperf_dl, name).default
        self.function = _function(operator, self.op)
        # Past the apply of torch.autograd.Function, which asks for transforms once more.
        self.apply_plainly = super(torch.autograd.Function, _plain_function(operator, self.op)).apply
        qualified = f"pyperf_dl::{name}"
        torch.library.register_fake(qualified, operator.fake, lib=_library, allow_override=True)
        _library.impl(name, _autograd_kernel(operator, self.op, self.function), "Autograd")
        if operator.batch is not None:
            torch.library.register_vmap(qualified, _vmap_rule(operator, self.op), lib=_library)
        _decompositions[self.op] = operator.reference
        if operator.flops is not None:
            _unregistered_flops.append((operator, self.op))
        if operator.shard is not None:
            _unregistered_sharding.append((operator, self.op))


def _remember(operator: Operator, ctx: Any, inputs: tuple[Any, ...], output: Any) -> Sequence[Any]:
    """Returns what was saved."""
    ctx.statics = inputs[operator.tensors :]
    saved = () if operator.save is None else operator.save(ctx, inputs, output)
    ctx.save_for_backward(*saved)
    outputs = output if isinstance(output, tuple) else (output,)
    undifferentiated = [t for t in outputs if not (t.is_floating_point() and operator.backward)]
    if undifferentiated:
        ctx.mark_non_differentiable(*undifferentiated)
    return saved


def _pulled_back(operator: Operator, ctx: Any, *grads: torch.Tensor) -> Any:
    return (*operator.backward(ctx, *grads), *([None] * len(ctx.statics)))


def _function(operator: Operator, op: Any) -> type[torch.autograd.Function]:
    class OperatorFunction(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> Any:
            with _Excluding(_AUTOGRAD):
                return op(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.save_for_forward(*_remember(operator, ctx, inputs, output))

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> Any:
            return _pulled_back(operator, ctx, *grads)

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            return operator.jvp(ctx, *tangents[: operator.tensors])

        @staticmethod
        def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
            return _vmap_rule(operator, operator)(info, in_dims, *args)

    OperatorFunction.__name__ = OperatorFunction.__qualname__ = f"{operator.name}_function"
    return OperatorFunction


def _plain_function(operator: Operator, op: Any) -> type[torch.autograd.Function]:
    class PlainFunction(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, statics: tuple[Any, ...], *tensors: Any) -> Any:  # every argument has its price
            args = (*tensors, *statics)
            with _Excluding(_AUTOGRAD):
                output = op(*args)
            _remember(operator, ctx, args, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> Any:
            return None, *operator.backward(ctx, *grads)

    PlainFunction.__name__ = PlainFunction.__qualname__ = f"{operator.name}_function"
    return PlainFunction


def _autograd_kernel(operator: Operator, op: Any, function: type[torch.autograd.Function]) -> Callable[..., Any]:
    def kernel(*args: Any) -> Any:
        if (torch.is_grad_enabled() and _any_requires_grad(args, operator.tensors)) or any(
            map(_has_tangent, args[: operator.tensors])
        ):
            return function.apply(*args)
        with _Excluding(_AUTOGRAD):
            return op(*args)

    return kernel


def _has_tangent(t: torch.Tensor | None) -> bool:
    """Asks the tensor itself: in a compiled forward AD level, Python's own record of the level is not kept."""
    return t is not None and torch._VF._unpack_dual(t, level=0)[1] is not None  # type: ignore[attr-defined]


def is_differentiated(t: torch.Tensor) -> bool:
    """By autograd or forward AD, at any level of the transforms that are active."""
    if t.requires_grad:
        return True
    if torch.compiler.is_compiling() or not _are_functorch_transforms_active():
        return _has_tangent(t)
    from torch._C import _functorch
    from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack

    if _functorch.maybe_get_level(t) == _functorch.maybe_current_level():
        if _functorch.peek_interpreter_stack().key() == _functorch.TransformType.Jvp and _has_tangent(t):
            return True
        t = _functorch.get_unwrapped(t)
    with temporarily_pop_interpreter_stack():
        return is_differentiated(t)


def _in_front(t: torch.Tensor | None, dim: int | None, batch_size: int) -> torch.Tensor | None:
    if t is None:
        return None
    return t.unsqueeze(0).expand(batch_size, *t.shape) if dim is None else t.movedim(dim, 0)


def _vmap_rule(operator: Operator, call: Callable[..., Any]) -> Callable[..., Any]:
    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        behind = operator.tensors + operator.constants
        if any(d is not None for d in in_dims[operator.tensors : behind]):
            raise ValueError(
                f"{operator.name}: vmap over a table or over numbers of samples is not there, only over samples"
            )
        batched = [_in_front(t, d, info.batch_size) for t, d in zip(args[: operator.tensors], in_dims, strict=False)]
        out = call(*operator.batch(*batched, *args[operator.tensors :]))
        return out, tuple(0 for _ in out) if isinstance(out, tuple) else 0

    return rule


def _register_late() -> None:
    """Flop formulas and DTensor rules, once the modules that use them are there."""
    if _unregistered_flops and "torch.utils.flop_counter" in sys.modules:
        from torch.utils.flop_counter import register_flop_formula

        while _unregistered_flops:
            operator, op = _unregistered_flops.pop()
            register_flop_formula(op.overloadpacket)(operator.flops)
    if _unregistered_sharding and "torch.distributed.tensor" in sys.modules:
        from torch.distributed.tensor.experimental import register_sharding

        while _unregistered_sharding:
            operator, op = _unregistered_sharding.pop()
            register_sharding(op)(_sharding_rule(operator, op))


def _sharding_rule(operator: Operator, op: Any) -> Callable[..., Any]:
    def rule(*args: Any) -> list[tuple[list[Any], list[Any]]]:
        from torch.distributed.tensor import Replicate, Shard

        def placed(dims: Sequence[int | None]) -> list[Any]:
            return [Replicate() if d is None else Shard(d) for d in dims]

        tensors, outputs = operator.tensors, len(op._schema.returns)
        found = [([None] * outputs, [None] * tensors)]
        for dims in operator.shard(*args):
            given, made = ([dims] * tensors, [dims] * outputs) if isinstance(dims, int) else dims
            found.append((made, given))
        rest = len(args) - tensors
        there = [n < tensors + operator.constants and arg is not None for n, arg in enumerate(args)]
        return [
            (placed(made), [p if t else None for t, p in zip(there, placed([*given, *[None] * rest]), strict=True)])
            for made, given in found
        ]

    return rule
