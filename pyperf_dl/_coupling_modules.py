"""Coupling layers as modules, and `Flow`, the stack of them that has a density."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint, get_device_states, set_device_states

from . import _checks
from ._coupling_affine import additive_coupling, affine_coupling_packed
from ._coupling_channels import actnorm, checked_input, checked_sample_mask, invertible_conv1x1
from ._coupling_spline import rational_quadratic_spline_packed
from .reference import coupling as reference

SAVE = ("x", "recompute_params", "nothing")
LAYOUTS = ("halves", "interleaved")

_Result = tuple[torch.Tensor, torch.Tensor]

# ---- layers ----


class _Call(NamedTuple):
    """What a layer is called with beside x."""

    context: Any
    sample_mask: torch.Tensor | None  # bool, broadcasts to [B, 1, ...]
    inverse: bool


class _Layer(torch.nn.Module):
    """An invertible map with a log-det. Subclasses have `_transform`."""

    save = "x"

    def forward(self, x: torch.Tensor, context: Any = None, *, sample_mask: torch.Tensor | None = None) -> _Result:
        """y, and log |det dy/dx| of each sample, [B]."""
        return self._run(x, context, sample_mask, False)

    def inverse(self, y: torch.Tensor, context: Any = None, *, sample_mask: torch.Tensor | None = None) -> _Result:
        """x, and log |det dx/dy| of each sample, [B]."""
        return self._run(y, context, sample_mask, True)

    def _run(self, x: torch.Tensor, context: Any, sample_mask: Any, inverse: bool) -> _Result:
        save = _saving(self)
        if save == "nothing":
            return _rebuilt([self], x, context, sample_mask, inverse)
        call = _Call(context, _checked(self, x, sample_mask), inverse)
        if save == "recompute_params":
            return checkpoint(self._transform, x, call, use_reentrant=False)
        return self._transform(x, call)

    def _transform(self, x: torch.Tensor, call: _Call) -> _Result:
        raise RuntimeError(f"{type(self).__name__}: a layer needs a _transform")

    def _undo(self, y: torch.Tensor, call: _Call) -> torch.Tensor:
        """The x of which `_transform` made y."""
        return self._transform(y, call._replace(inverse=not call.inverse))[0]

    def _back(
        self, y: torch.Tensor, call: _Call, grads: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, Sequence[torch.Tensor | None]]:
        """x, its gradient and those of `wanted`, from y and the gradients of y and of the log-det."""
        with torch.no_grad():
            x = self._undo(y, call)
        x.requires_grad_()
        found = _gradients(self._transform(x, call), [x, *wanted], grads)
        return x.detach(), found[0], found[1:]


def _checked(layer: torch.nn.Module, x: Any, sample_mask: Any) -> torch.Tensor | None:
    name = type(layer).__name__
    return checked_sample_mask(name, sample_mask, checked_input(name, x))


def _saving(layer: torch.nn.Module) -> str:
    """What a layer keeps in this call."""
    save = layer.save if isinstance(layer, _Layer) else "x"
    if save == "x" or not torch.is_grad_enabled():
        return "x"
    if torch.compiler.is_compiling():
        return "recompute_params" if isinstance(layer, _Coupling) else "x"
    return "x" if _transforming() else save


def _transforming() -> bool:
    """Within torch.func or forward AD: these take neither saved-tensor hooks nor a backward that calls autograd."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


# ---- save="nothing": the backward walks back from the last output of a run of layers ----


class _Randomness:
    """The state of the generators before a layer."""

    def __init__(self, x: torch.Tensor) -> None:
        self.device_type = "cuda" if x.device.type == "cpu" else x.device.type
        self.host = torch.get_rng_state()
        self.devices, self.states = get_device_states(x)

    def unless_same(self, x: torch.Tensor) -> _Randomness | None:
        """Itself if the layer drew numbers; most do not, and then there is nothing to keep."""
        now = _Randomness(x)
        pairs = zip([self.host, *self.states], [now.host, *now.states], strict=True)
        return None if all(torch.equal(a, b) for a, b in pairs) else self

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        with torch.random.fork_rng(self.devices, device_type=self.device_type):
            torch.set_rng_state(self.host)
            set_device_states(self.devices, self.states, device_type=self.device_type)
            yield


def _again(randomness: _Randomness | None) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if randomness is None else randomness.again()


class _Autocast:
    """The autocast state of now, to be entered again. Casts are not cached: those made without grad would be found."""

    def __init__(self, x: torch.Tensor) -> None:
        types = [t for t in {x.device.type, "cpu"} if torch.amp.is_autocast_available(t)]
        self.settings = [(t, torch.get_autocast_dtype(t), torch.is_autocast_enabled(t)) for t in types]

    def rounding(self, x: torch.Tensor) -> float:
        """That of the coarsest dtype that something which is made of x may have."""
        halves = [dtype for _, dtype, enabled in self.settings if enabled and x.dtype == torch.float32]
        return max(torch.finfo(dtype).eps for dtype in (x.dtype, *halves))

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for kind, dtype, enabled in self.settings:
                stack.enter_context(torch.autocast(kind, dtype, enabled, cache_enabled=False))
            yield


class _Run(NamedTuple):
    """Neighbouring layers of which only the last output is kept."""

    layers: list[_Layer]  # in the order of the call
    parameters: list[torch.Tensor]
    leaves: list[Any]  # of the context; None in place of tensors
    spec: Any
    tensors: list[int]  # which leaves are tensors
    inverse: bool

    def call(self, tensors: Sequence[torch.Tensor], mask: torch.Tensor | None) -> _Call:
        leaves = list(self.leaves)
        for at, tensor in zip(self.tensors, tensors, strict=True):
            leaves[at] = tensor
        return _Call(pytree.tree_unflatten(leaves, self.spec), mask, self.inverse)


def _parameters(layers: Sequence[torch.nn.Module]) -> list[torch.Tensor]:
    return list({id(p): p for layer in layers for p in layer.parameters()}.values())


def _rebuilt(layers: list[Any], x: torch.Tensor, context: Any, sample_mask: Any, inverse: bool) -> _Result:
    name, mask = type(layers[0]).__name__, _checked(layers[0], x, sample_mask)
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"{name}: save='nothing' rebuilds x from y, so x must be float32 or float64, got {_checks.described(x)}"
        )
    leaves, spec = pytree.tree_flatten(context)
    tensors = [at for at, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    given = [leaves[at] for at in tensors]
    kept = [None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
    run = _Run(layers, _parameters(layers), kept, spec, tensors, inverse)
    return _Rebuilt.apply(run, mask, x, *given, *run.parameters)


class _Rebuilt(torch.autograd.Function):
    """The layers of a run; keeps its last output, and of the context what the caller keeps anyway."""

    @staticmethod
    def forward(
        ctx: Any, run: _Run, mask: torch.Tensor | None, x: torch.Tensor, *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        context = tensors[: len(run.tensors)]
        call, autocast = run.call(context, mask), _Autocast(x)
        total, randomness, first = None, [], x
        for layer in run.layers:
            before = _Randomness(x)
            with autocast.again():
                x, logdet = layer._transform(x, call)
            randomness.append(before.unless_same(x))
            total = logdet if total is None else total + logdet
        back = x
        for layer, numbers in zip(reversed(run.layers), reversed(randomness), strict=True):
            with autocast.again(), _again(numbers):
                back = layer._undo(back, call)
        _guard(run, first, back, math.sqrt(autocast.rounding(x)))
        ctx.run, ctx.autocast, ctx.randomness = run, autocast, randomness
        ctx.versions = [p._version for p in run.parameters]
        ctx.save_for_backward(x, mask, *context)
        return x, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, grad_logdet: torch.Tensor) -> tuple[Any, ...]:
        run = ctx.run
        _same_parameters(run, ctx.versions)
        y, mask, *context = ctx.saved_tensors
        needed = ctx.needs_input_grad[3:]
        inputs = [t.detach().requires_grad_(n) for t, n in zip(context, needed, strict=False)] + run.parameters
        call = run.call(inputs[: len(context)], mask)
        sums: dict[int, torch.Tensor] = {}
        for layer, randomness in zip(reversed(run.layers), reversed(ctx.randomness), strict=True):
            own = {id(p) for p in layer.parameters()}
            at = [i for i, t in enumerate(inputs) if needed[i] and (i < len(context) or id(t) in own)]
            with torch.enable_grad(), ctx.autocast.again(), _again(randomness):
                y, grad, found = layer._back(y, call, (grad, grad_logdet), [inputs[i] for i in at])
            for i, g in zip(at, found, strict=True):
                if g is not None:
                    sums[i] = sums[i] + g if i in sums else g
        return None, None, grad, *(sums.get(i) for i in range(len(inputs)))


def _guard(run: _Run, x: torch.Tensor, back: torch.Tensor, within: float) -> None:
    """Raises where x does not come back, which the backward would not see. Reads one number from the device."""
    if x.numel() == 0 or x.is_meta:
        return
    finite = x.isfinite()
    size = torch.where(finite, x.abs(), 0)
    usual = size.mean([d for d in range(x.dim()) if d != 1], keepdim=True)  # of each channel
    least = usual.mean() / 16  # channels that are (almost) 0 need not be
    unit = torch.maximum(size, usual.clamp(min=torch.where(least > 0, least, 1)))
    error = torch.where(finite, (back - x).abs() / unit, 0).amax().item()
    if not error <= within:
        raise RuntimeError(
            f"{type(run.layers[0]).__name__}: save='nothing' rebuilds x from y through all layers of the run "
            f"({len(run.layers)}), with an error that must be <= {within:.1e} of the size of x in {x.dtype}, got "
            f"{error:.1e}: the layers contract or shift too much; save='recompute_params' has no such bound"
        )


def _same_parameters(run: _Run, versions: Sequence[int]) -> None:
    now = _parameters(run.layers)
    if any(a is not b for a, b in itertools.zip_longest(now, run.parameters)) or any(
        p._version != v for p, v in zip(now, versions, strict=True)
    ):
        raise RuntimeError(
            f"{type(run.layers[0]).__name__}: save='nothing' runs the layers again in the backward, but their "
            "parameters were changed or replaced since the forward (an optimizer step, or torch.func.functional_call)"
        )


def _gradients(out: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor], grads: Sequence[torch.Tensor]) -> list[Any]:
    """torch.autograd.grad; the first input has zeros where nothing depends on it, the others None."""
    pairs = [(o, g) for o, g in zip(out, grads, strict=True) if o.requires_grad]
    outputs, weights = zip(*pairs, strict=True)
    found = list(torch.autograd.grad(outputs, inputs, weights, allow_unused=True))
    found[0] = torch.zeros_like(inputs[0]) if found[0] is None else found[0]
    return found


# ---- couplings ----


def _as_slice(indices: Sequence[int]) -> slice | None:
    """The slice that takes just these indices, if there is one: slices are views."""
    if len(indices) < 2:
        return slice(indices[0], indices[0] + 1, 1) if indices else slice(0, 0, 1)
    step = indices[1] - indices[0]
    regular = all(b - a == step for a, b in itertools.pairwise(indices))
    return slice(indices[0], indices[-1] + 1, step) if regular else None


class _Coupling(_Layer):
    """Transforms a part of the channels by parameters that a conditioner makes of the others."""

    params_per_feature: int

    def __init__(self, conditioner: Any, mask: Any, swap: Any, layout: Any, save: Any) -> None:
        super().__init__()
        name = type(self).__name__
        if not isinstance(conditioner, torch.nn.Module):
            raise TypeError(f"{name}: conditioner must be a torch.nn.Module, got {_checks.described(conditioner)}")
        self.swap = _checks.flag(name, "swap", swap)
        self.layout = _checks.choice(name, "layout", layout, LAYOUTS)
        self.save = _checks.choice(name, "save", save, SAVE)
        self.conditioner = conditioner
        self.features: int | None = None
        self._slices: tuple[slice | None, slice | None] = (None, None)
        if mask is not None:
            self._set_mask(name, mask)

    def _set_mask(self, name: str, mask: Any) -> None:
        if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
            got = _checks.described(mask)
            raise TypeError(f"{name}: mask must be a bool tensor [D], True where x is transformed, got {got}")
        if mask.dim() != 1:
            raise ValueError(f"{name}: mask must have one dimension, the channels of x, got {_checks.described(mask)}")
        if self.swap:
            raise ValueError(f"{name}: swap exchanges the halves that there are without a mask, got both")
        chosen = mask.tolist()
        if not any(chosen):
            raise ValueError(f"{name}: mask must be True for at least one channel, got {chosen}")
        self.features = len(chosen)
        parts = [[i for i, c in enumerate(chosen) if c == part] for part in (False, True)]
        self._slices = tuple(map(_as_slice, parts))  # type: ignore[assignment]
        for buffer, part, at in zip(("_untouched", "_transformed"), parts, self._slices, strict=True):
            self.register_buffer(buffer, torch.tensor(part) if at is None else None, persistent=False)

    # -- split --

    def _where(self, x: torch.Tensor) -> tuple[Any, Any]:
        """Slices or indices of the channels that pass, and of those that are transformed."""
        channels = x.shape[1]
        if self.features is None:
            if channels < 2:
                raise ValueError(
                    f"{type(self).__name__}: x must have at least 2 channels to be halved, got {_checks.described(x)}; "
                    "a mask may transform all of them"
                )
            halves = slice(0, channels // 2, 1), slice(channels // 2, channels, 1)
            return halves[::-1] if self.swap else halves
        if channels != self.features:
            raise ValueError(
                f"{type(self).__name__}: x must have the {self.features} channels of the mask in dim 1, "
                f"got {_checks.described(x)}"
            )
        first, second = self._slices
        return (self._untouched if first is None else first, self._transformed if second is None else second)

    @staticmethod
    def _taken(x: torch.Tensor, at: Any) -> torch.Tensor:
        return x[:, at] if isinstance(at, slice) else x.index_select(1, at)

    def _split(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        untouched, transformed = self._where(x)
        return self._taken(x, untouched), self._taken(x, transformed)

    def _merged(self, x: torch.Tensor, untouched: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        """x with `part` in place of what was transformed."""
        first, second = self._where(x)
        if untouched.shape[1] == 0:
            return part
        if isinstance(first, slice) and isinstance(second, slice) and first.step == second.step == 1:
            if first.stop == second.start:
                return torch.cat([untouched, part], 1)
            if second.stop == first.start:
                return torch.cat([part, untouched], 1)
        if isinstance(second, slice):
            return x.slice_scatter(part, 1, second.start, second.stop, second.step)
        return x.index_copy(1, second, part)

    def _joined(self, like: torch.Tensor, untouched: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        """A new tensor of both parts, where no gradient is needed."""
        out = torch.empty_like(like)
        for at, values in zip(self._where(like), (untouched, part), strict=True):
            out[:, at] = values
        return out

    # -- parameters --

    def _parameters_of(self, untouched: torch.Tensor, part: torch.Tensor, context: Any) -> torch.Tensor:
        """What the conditioner says, as a view [*part.shape, P], with 1 where it has 1 in place of another size."""
        raw = self.conditioner(untouched) if context is None else self.conditioner(untouched, context)
        count, channels, positions = self.params_per_feature, part.shape[1], part.shape[2:]
        params = None
        if isinstance(raw, torch.Tensor) and raw.is_floating_point():
            if raw.dim() == 1 and raw.shape[0] == channels * count:
                raw = raw.view(1, -1, *[1] * len(positions))
            if raw.dim() == part.dim() + 1 and raw.shape[1:3] == (channels, count):
                params = raw
            elif raw.dim() == part.dim() and raw.shape[1] == channels * count:
                if self.layout == "interleaved":
                    params = raw.unflatten(1, (channels, count))
                else:
                    params = raw.unflatten(1, (count, channels)).transpose(1, 2)
        sizes = (part.shape[0], *positions)
        if params is None or any(
            p != 1 and p != n for p, n in zip((params.shape[0], *params.shape[3:]), sizes, strict=True)
        ):
            batch, *rest = sizes
            packed, apart = [batch, channels * count, *rest], [batch, channels, count, *rest]
            kind = ValueError if isinstance(raw, torch.Tensor) and raw.is_floating_point() else TypeError
            raise kind(
                f"{type(self).__name__}: conditioner must return a float tensor {packed} or {apart} (or 1 in place of "
                f"a size other than the channels), {count} parameters ({self._parameter_names()}) for each of the "
                f"{channels} transformed features of x, got {_checks.described(raw)}"
            )
        return params.movedim(2, -1)

    def _parameter_names(self) -> str:
        """What the parameters of a feature are, for messages."""
        raise RuntimeError(f"{type(self).__name__}: a coupling names its parameters")

    # -- the map --

    def _takes_channels(self, x: torch.Tensor) -> bool:
        """Whether `_function` takes a slice of channels, and copies the others itself."""
        return True

    def _function(
        self,
        part: torch.Tensor,
        params: torch.Tensor,
        mask: torch.Tensor | None,
        inverse: bool,
        channels: slice | None = None,
    ) -> _Result:
        """The coupling function. part: [B, C, ...], params: [*part.shape, P]; or all of x, and its `channels`"""
        raise RuntimeError(f"{type(self).__name__}: a coupling needs a _function")

    def _transform(self, x: torch.Tensor, call: _Call) -> _Result:
        untouched, part = self._split(x)
        params = self._parameters_of(untouched, part, call.context)
        at = self._where(x)[1]
        if isinstance(at, slice) and self._takes_channels(x):
            return self._function(x, params, call.sample_mask, call.inverse, at)
        y, logdet = self._function(part, params, call.sample_mask, call.inverse)
        return self._merged(x, untouched, y), logdet

    def _back(
        self, y: torch.Tensor, call: _Call, grads: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, Sequence[torch.Tensor | None]]:
        """The untouched part is the same in x and y, so the conditioner runs once and its graph serves the gradient."""
        untouched, part = self._split(y.detach())
        seen = untouched.detach().requires_grad_()
        params = self._parameters_of(seen, part, call.context)
        with torch.no_grad():
            x = self._function(part, params, call.sample_mask, not call.inverse)[0]
        x.requires_grad_()
        out = self._function(x, params, call.sample_mask, call.inverse)
        grad_untouched, grad_part = self._split(grads[0])
        grad_x, grad_seen, *found = _gradients(out, [x, seen, *wanted], (grad_part, grads[1]))
        if grad_seen is not None:
            grad_untouched = grad_untouched + grad_seen
        with torch.no_grad():
            return self._joined(y, untouched, x), self._joined(y, grad_untouched, grad_x), found

    def extra_repr(self) -> str:
        split = f"swap={self.swap}" if self.features is None else f"features={self.features}"
        return ", ".join([split, f"layout={self.layout!r}", f"save={self.save!r}", *self._described()])

    def _described(self) -> list[str]:
        return []


_COUPLING_ARGUMENTS = """
        mask: bool [D], True for the channels that are transformed; the conditioner sees the others, in order, and may
            see none. Without a mask x is halved: the conditioner sees the first C // 2 channels.
        swap: exchange the halves.
        layout: of parameters [B, P * C, ...]: ``"halves"``: one parameter of all features, then the next one;
            ``"interleaved"``: all parameters of a feature side by side.
        save: what the backward finds. ``"x"``: x and the parameters, and what the conditioner keeps.
            ``"recompute_params"``: x; the conditioner runs again. ``"nothing"``: y; x is rebuilt from it, and the
            forward raises RuntimeError where that would lose more than half of its digits.
"""


class AdditiveCoupling(_Coupling):
    """Additive coupling: y = x + t for a part of the channels, t = conditioner(the others). Its log-det is 0.

    Args:
        conditioner: any module that maps the untouched part [B, C', ...] (and the context, if there is one) to one
            parameter for each transformed feature: [B, C, ...], or with 1 in place of a size other than C.{arguments}
    Raises:
        TypeError, ValueError: an argument of another type or value; a call in which x, the sample mask or what the
            conditioner returns do not fit.

    Follows Dinh, Krueger and Bengio, "NICE" (2014). See :func:`additive_coupling`.

    >>> layer = pyperf_dl.AdditiveCoupling(torch.nn.Identity())
    >>> layer(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    (tensor([[1., 2., 4., 6.]]), tensor([0.]))
    """

    params_per_feature = 1

    def __init__(
        self,
        conditioner: torch.nn.Module,
        *,
        mask: torch.Tensor | None = None,
        swap: bool = False,
        save: str = "x",
    ) -> None:
        super().__init__(conditioner, mask, swap, "halves", save)

    @staticmethod
    def parameter_count(features: int) -> int:
        """How many parameters the conditioner has to return for `features` transformed features."""
        return _checks.integer("AdditiveCoupling.parameter_count", "features", features, 0)

    def _parameter_names(self) -> str:
        return "shift"

    def _function(
        self,
        part: torch.Tensor,
        params: torch.Tensor,
        mask: torch.Tensor | None,
        inverse: bool,
        channels: slice | None = None,
    ) -> _Result:
        return additive_coupling(part, params[..., 0], channels=channels, inverse=inverse, sample_mask=mask)


class AffineCoupling(_Coupling):
    """Affine coupling: y = x * s + t for a part of the channels; s and t come from a conditioner of the others.

    Args:
        conditioner: any module that maps the untouched part [B, C', ...] (and the context, if there is one) to two
            parameters for each transformed feature: [B, 2 * C, ...] (see ``layout``) or [B, C, 2, ...], or with 1 in
            place of a size other than C and 2.{arguments}
        parameters: ``"scale_shift"`` or ``"shift_scale"``: which of the two comes first.
        activation, clamp, min_scale, max_scale, order: as for :func:`affine_coupling`.
        volume_preserving: log s less its mean over the transformed channels, at every position (GIN).

    Raises:
        TypeError, ValueError: an argument of another type or value; a call in which x, the sample mask or what the
            conditioner returns do not fit.

    Follows Dinh, Sohl-Dickstein and Bengio, "RealNVP" (2016). See :func:`affine_coupling`.

    >>> layer = pyperf_dl.AffineCoupling(torch.nn.Linear(1, 2), activation="tanh", clamp=2.0)
    >>> x = torch.randn(5, 2)
    >>> y, logdet = layer(x)
    >>> back, negative = layer.inverse(y)
    >>> torch.allclose(back, x, atol=1e-4), torch.allclose(negative, -logdet, atol=1e-5)
    (True, True)
    """

    params_per_feature = 2

    def __init__(
        self,
        conditioner: torch.nn.Module,
        *,
        mask: torch.Tensor | None = None,
        swap: bool = False,
        layout: str = "halves",
        parameters: str = "scale_shift",
        activation: str = "exp",
        clamp: float | None = None,
        min_scale: float = 0.0,
        max_scale: float | None = None,
        order: str = "scale_shift",
        volume_preserving: bool = False,
        save: str = "x",
    ) -> None:
        super().__init__(conditioner, mask, swap, layout, save)
        name, orders = "AffineCoupling", ("scale_shift", "shift_scale")
        activations = [a for a in reference.ACTIVATIONS if a != "none"]
        self.parameter_order = _checks.choice(name, "parameters", parameters, orders)
        self.options = {
            "activation": _checks.choice(name, "activation", activation, activations),
            "clamp": clamp,
            "min_scale": min_scale,
            "max_scale": max_scale,
            "order": _checks.choice(name, "order", order, orders),
            "volume_preserving": _checks.flag(name, "volume_preserving", volume_preserving),
        }
        _tried(self)

    @staticmethod
    def parameter_count(features: int) -> int:
        """How many parameters the conditioner has to return for `features` transformed features."""
        return 2 * _checks.integer("AffineCoupling.parameter_count", "features", features, 0)

    def _parameter_names(self) -> str:
        return self.parameter_order.replace("_", ", ")

    def _function(
        self,
        part: torch.Tensor,
        params: torch.Tensor,
        mask: torch.Tensor | None,
        inverse: bool,
        channels: slice | None = None,
    ) -> _Result:
        how = self.options | {"channels": channels, "parameters": self.parameter_order, "inverse": inverse}
        if self.options["volume_preserving"]:  # over the channels, so that no position depends on another one
            y, total = affine_coupling_packed(part, params, sample_mask=mask, sum_dims=1, **how)
            return y, total.flatten(1).sum(1) if total.dim() > 1 else total
        return affine_coupling_packed(part, params, sample_mask=mask, **how)

    def _described(self) -> list[str]:
        return [f"{name}={value!r}" for name, value in self.options.items()]


class SplineCoupling(_Coupling):
    """Spline coupling: monotone rational-quadratic splines of a part of the channels, from a conditioner of the others.

    Args:
        conditioner: any module that maps the untouched part [B, C', ...] (and the context, if there is one) to the
            P = 2 * bins + (bins - 1, bins or bins + 1, by ``tails``) parameters of each transformed feature, widths,
            heights, derivatives: [B, C * P, ...] (see ``layout``) or [B, C, P, ...], or with 1 in place of a size
            other than C and P. :meth:`parameter_count` says how many there are in all.
        bins: K, >= 1.{arguments}
        tails, tail_bound: as for :func:`rational_quadratic_spline_packed`; a sequence of C tails and a tensor [C] of
            bounds, which becomes a buffer, are those of the transformed features, along dim 1 of x.
        bounds, min_bin_width, min_bin_height, min_derivative, identity_init, logit_scale, parametrization, slope,
            precision: as for :func:`rational_quadratic_spline_packed`.

    Raises:
        TypeError, ValueError: an argument of another type or value; a call in which x, the sample mask or what the
            conditioner returns do not fit.

    Follows Durkan, Bekasov, Murray and Papamakarios, "Neural Spline Flows" (2019).

    >>> params = pyperf_dl.SplineCoupling.parameter_count(features=1, bins=8)
    >>> layer = pyperf_dl.SplineCoupling(torch.nn.Linear(1, params), 8, tail_bound=3.0).double()
    >>> x = torch.randn(5, 2, dtype=torch.float64)
    >>> y, logdet = layer(x)
    >>> torch.allclose(layer.inverse(y)[0], x, atol=1e-6)
    True
    """

    def __init__(
        self,
        conditioner: torch.nn.Module,
        bins: int,
        *,
        mask: torch.Tensor | None = None,
        swap: bool = False,
        layout: str = "interleaved",
        save: str = "x",
        tails: str | Sequence[str] = "linear",
        tail_bound: float | torch.Tensor = 1.0,
        bounds: Any = None,
        min_bin_width: float = 1e-3,
        min_bin_height: float = 1e-3,
        min_derivative: float = 1e-3,
        identity_init: bool = False,
        logit_scale: float = 1.0,
        parametrization: str = "nflows",
        slope: float = 1e-3,
        precision: str = "fast",
    ) -> None:
        super().__init__(conditioner, mask, swap, layout, save)
        self.bins = _checks.integer("SplineCoupling", "bins", bins, 1)
        self.params_per_feature = self.parameter_count(1, bins, tails)
        by_feature = tail_bound if isinstance(tail_bound, torch.Tensor) else None
        self.register_buffer("tail_bound", by_feature, persistent=False)
        self.options = {
            "tails": tuple(tails) if isinstance(tails, list) else tails,
            "tail_bound": 1.0 if by_feature is not None else tail_bound,
            "bounds": bounds,
            "min_bin_width": min_bin_width,
            "min_bin_height": min_bin_height,
            "min_derivative": min_derivative,
            "identity_init": identity_init,
            "logit_scale": logit_scale,
            "parametrization": parametrization,
            "slope": slope,
            "precision": precision,
        }
        _tried(self)

    @staticmethod
    def parameter_count(features: int, bins: int, tails: str | Sequence[str] = "linear") -> int:
        """How many parameters the conditioner has to return for `features` transformed features."""
        name = "SplineCoupling.parameter_count"
        features, bins = _checks.integer(name, "features", features, 0), _checks.integer(name, "bins", bins, 1)
        tails = "mixed" if isinstance(tails, (list, tuple)) else _checks.choice(name, "tails", tails, reference.TAILS)
        return features * (2 * bins + reference.derivative_count(bins, tails))

    def _parameter_names(self) -> str:
        derivatives = self.params_per_feature - 2 * self.bins
        return f"{self.bins} widths, {self.bins} heights, {derivatives} derivatives for tails={self.options['tails']!r}"

    def _by_feature(self) -> bool:
        return self.tail_bound is not None or isinstance(self.options["tails"], tuple)

    def _takes_channels(self, x: torch.Tensor) -> bool:
        return x.dim() == 2 or not self._by_feature()

    def _function(
        self,
        part: torch.Tensor,
        params: torch.Tensor,
        mask: torch.Tensor | None,
        inverse: bool,
        channels: slice | None = None,
    ) -> _Result:
        options = {**self.options, "channels": channels, "inverse": inverse, "sample_mask": mask, "logdet": "sum"}
        if self.tail_bound is not None:
            options["tail_bound"] = self.tail_bound
        if part.dim() == 2 or not self._by_feature():
            return rational_quadratic_spline_packed(part, params, self.bins, **options)
        options["sample_mask"] = None if mask is None else mask.movedim(1, -1)
        y, total = rational_quadratic_spline_packed(part.movedim(1, -1), params.movedim(1, -2), self.bins, **options)
        return y.movedim(-1, 1), total

    def _described(self) -> list[str]:
        defaults = SplineCoupling.__init__.__kwdefaults__
        changed = [f"{name}={value!r}" for name, value in self.options.items() if value != defaults[name]]
        if self.tail_bound is not None:
            changed.append(f"tail_bound={_checks.described(self.tail_bound)}")
        return [f"bins={self.bins}", *changed]


for _kind in (AdditiveCoupling, AffineCoupling, SplineCoupling):
    _kind.__doc__ = (_kind.__doc__ or "").replace("{arguments}", _COUPLING_ARGUMENTS.rstrip("\n"))


def _tried(layer: _Coupling) -> None:
    """Options that the function would refuse are refused when the layer is made."""
    features, device, dtype = 1, torch.device("cpu"), torch.float32
    if isinstance(layer, SplineCoupling):
        bound, tails = layer.tail_bound, layer.options["tails"]
        if bound is not None:
            features = bound.shape[-1] if bound.dim() else features
            device, dtype = bound.device, bound.dtype if bound.is_floating_point() else dtype
        features = len(tails) if isinstance(tails, tuple) else features
    nothing = torch.zeros(0, features, device=device, dtype=dtype)
    layer._function(nothing, nothing.unsqueeze(-1).expand(0, features, layer.params_per_feature), None, False)


# ---- layers along the channels ----


def _unversioned(t: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Writes inside do not count as changes of t for the backward of what came before."""
    if torch.compiler.is_compiling():
        return contextlib.nullcontext()
    return torch.autograd._unsafe_preserve_version_counter(t)


class ActNorm(_Layer):
    """Affine map of every channel, y = x * exp(log_scale) + bias, whose first batch comes out standardised.

    Args:
        features: channels of x.
        initialise: take log_scale and bias from the first batch in training mode, so that every channel of y has mean
            0 and standard deviation 1. Otherwise the layer starts as the identity.
        save: ``"x"``, or ``"nothing"``: x is rebuilt from y, so that a :class:`Flow` can go through it in one run.

    Raises:
        TypeError, ValueError: an argument or an input of another type, shape or value.

    Whether a layer has been initialised is in its ``state_dict``, as the buffer ``initialised``; it stays on the device
    and is never read back. Transforms of torch.func do not initialise.

    Follows Kingma and Dhariwal, "Glow" (2018). See :func:`actnorm`.

    >>> layer = pyperf_dl.ActNorm(2)
    >>> y, logdet = layer(torch.tensor([[1.0, 0.0], [3.0, 4.0]]))
    >>> y
    tensor([[-1., -1.],
            [ 1.,  1.]], grad_fn=<AddBackward0>)
    """

    def __init__(self, features: int, *, initialise: bool = True, save: str = "x") -> None:
        super().__init__()
        self.features = _checks.integer("ActNorm", "features", features, 1)
        self.save = _checks.choice("ActNorm", "save", save, ("x", "nothing"))
        self.log_scale = torch.nn.Parameter(torch.zeros(self.features))
        self.bias = torch.nn.Parameter(torch.zeros(self.features))
        first = _checks.flag("ActNorm", "initialise", initialise)
        self.register_buffer("initialised", torch.tensor(not first))
        # What the host knows of the buffer: True spares the statistics of every later batch.
        self._surely_initialised = not first

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._surely_initialised = False

    def _transform(self, x: torch.Tensor, call: _Call) -> _Result:
        _check_channels(self, x)
        if self.training and not call.inverse and not self._surely_initialised:
            self._initialise(x, call.sample_mask)
        return actnorm(x, self.log_scale, self.bias, inverse=call.inverse, sample_mask=call.sample_mask)

    def _undo(self, y: torch.Tensor, call: _Call) -> torch.Tensor:  # which is no batch to begin with
        return actnorm(y, self.log_scale, self.bias, inverse=not call.inverse, sample_mask=call.sample_mask)[0]

    @torch.no_grad()
    def _initialise(self, x: torch.Tensor, mask: torch.Tensor | None) -> None:
        if x.numel() == 0 or _transforming():
            return
        dims = [d for d in range(x.dim()) if d != 1]
        values = x.to(reference.working_dtype(x))
        weight = torch.ones_like(values[:, :1]) if mask is None else mask.expand(values[:, :1].shape).to(values.dtype)
        count = weight.sum()
        values = values if mask is None else values.masked_fill(~mask, 0)
        mean = values.sum(dims) / count
        centred = (values - mean.view(-1, *[1] * (x.dim() - 2))) * weight
        deviation = (centred.square().sum(dims) / count).sqrt()
        scale = torch.where(deviation > 0, 1 / deviation, 1.0)  # of a constant channel only the mean is known
        keep = self.initialised | (count == 0)
        with _unversioned(self.log_scale), _unversioned(self.bias):  # what is kept was not changed
            self.log_scale.copy_(torch.where(keep, self.log_scale, scale.log().to(self.log_scale.dtype)))
            self.bias.copy_(torch.where(keep, self.bias, (-mean * scale).to(self.bias.dtype)))
        self.initialised.copy_(self.initialised | (count > 0))
        self._surely_initialised = mask is None

    def extra_repr(self) -> str:
        return f"features={self.features}, save={self.save!r}"


class InvertibleConv1x1(_Layer):
    """Linear map of the channels at every position, y = W x, kept as W = (L U)[permutation]; W starts as a rotation.

    Args:
        features: channels of x.
        save: ``"x"``, or ``"nothing"``: x is rebuilt from y, so that a :class:`Flow` can go through it in one run.

    Raises:
        TypeError, ValueError: an argument or an input of another type, shape or value.

    Parameters are ``lower``, ``upper`` and ``log_diagonal``; ``permutation`` and ``sign`` are buffers.
    Follows Kingma and Dhariwal, "Glow" (2018). See :func:`invertible_conv1x1`.

    >>> layer = pyperf_dl.InvertibleConv1x1(3)
    >>> x = torch.randn(2, 3, 8)
    >>> torch.allclose(layer.inverse(layer(x)[0])[0], x, atol=1e-5)
    True
    """

    def __init__(self, features: int, *, save: str = "x") -> None:
        super().__init__()
        self.features = _checks.integer("InvertibleConv1x1", "features", features, 1)
        self.save = _checks.choice("InvertibleConv1x1", "save", save, ("x", "nothing"))
        rotation, _ = torch.linalg.qr(torch.randn(self.features, self.features, dtype=torch.float64))
        rows, left, right = torch.linalg.lu(rotation)
        diagonal, dtype = right.diagonal(), torch.get_default_dtype()
        self.lower = torch.nn.Parameter(left.tril(-1).to(dtype))
        self.upper = torch.nn.Parameter(right.triu(1).to(dtype))
        self.log_diagonal = torch.nn.Parameter(diagonal.abs().log().to(dtype))
        self.register_buffer("permutation", rows.argmax(1))
        self.register_buffer("sign", diagonal.sign().to(dtype))

    def _transform(self, x: torch.Tensor, call: _Call) -> _Result:
        _check_channels(self, x)
        tensors = (self.lower, self.upper, self.log_diagonal, self.permutation, self.sign)
        return invertible_conv1x1(x, *tensors, inverse=call.inverse, sample_mask=call.sample_mask)

    def weight(self, inverse: bool = False) -> torch.Tensor:
        """W, or its inverse, [C, C]."""
        eye = torch.eye(self.features, dtype=self.lower.dtype, device=self.lower.device)
        return (self.inverse if inverse else self)(eye)[0].mT

    def extra_repr(self) -> str:
        return f"features={self.features}, save={self.save!r}"


def _check_channels(layer: Any, x: torch.Tensor) -> None:
    if x.shape[1] != layer.features:
        raise ValueError(
            f"{type(layer).__name__}: x must have {layer.features} channels in dim 1, got {_checks.described(x)}"
        )


# ---- the stack ----


class Flow(torch.nn.Module):
    """Layers one after another, from data x to z, and the density that a simple one of z gives to x.

        log p(x) = log base(z) + sum of log-dets,    z, log-dets = layers(x)

    Args:
        layers: modules with ``forward(x, context)`` and ``inverse(y, context)``, both returning (value, log-det [B]):
            the ones here, flows, or ones of the user's own. `context` is left out where it is None. They are called in
            order by ``forward`` and in reverse by ``inverse``.
        base: the density of z: None for the standard normal one, or anything with ``log_prob(z)`` and
            ``sample(sample_shape)``, as torch.distributions has them. What ``log_prob`` returns may be [B] or have
            the dimensions of z, which are then summed.
        event_shape: the shape of one z, so that ``sample`` needs only a number; bases of torch.distributions know it.

    Raises:
        TypeError, ValueError: a layer without ``inverse``; a base without ``log_prob`` and ``sample``; no layers.

    Neighbouring layers with ``save="nothing"`` are one run: of all their values only the last one is kept for the
    backward, and forward hooks of these layers are not called.

    >>> halves = [pyperf_dl.AffineCoupling(torch.nn.Linear(1, 2), clamp=2.0, swap=swap) for swap in (False, True)]
    >>> flow = pyperf_dl.Flow([pyperf_dl.ActNorm(2), *halves], event_shape=(2,))
    >>> flow.log_prob(torch.randn(5, 2)).shape, flow.sample(3).shape
    (torch.Size([5]), torch.Size([3, 2]))
    """

    def __init__(
        self, layers: Sequence[torch.nn.Module], base: Any = None, *, event_shape: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        if isinstance(layers, torch.Tensor) or not hasattr(layers, "__iter__"):
            raise TypeError(f"Flow: layers must be a sequence of modules, got {_checks.described(layers)}")
        layers = list(layers)
        if not layers:
            raise ValueError("Flow: layers must hold at least one module, got none")
        for layer in layers:
            if not isinstance(layer, torch.nn.Module) or not callable(getattr(layer, "inverse", None)):
                raise TypeError(f"Flow: layers must be modules with forward and inverse, got {type(layer).__name__}")
        if base is not None and not all(callable(getattr(base, name, None)) for name in ("log_prob", "sample")):
            raise TypeError(f"Flow: base must have log_prob and sample, got {_checks.described(base)}")
        self.layers = torch.nn.ModuleList(layers)
        self.base = base
        self.event_shape = None if event_shape is None else _sizes("event_shape", event_shape)

    def forward(self, x: torch.Tensor, context: Any = None, *, sample_mask: torch.Tensor | None = None) -> _Result:
        """z, and log |det dz/dx| of each sample, [B]."""
        return self._through(list(self.layers), x, context, sample_mask, False)

    def inverse(self, z: torch.Tensor, context: Any = None, *, sample_mask: torch.Tensor | None = None) -> _Result:
        """x, and log |det dx/dz| of each sample, [B]."""
        return self._through(list(self.layers)[::-1], z, context, sample_mask, True)

    def log_prob(
        self, x: torch.Tensor, context: Any = None, *, sample_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """log p(x) of each sample, [B]; with a sample mask, of the elements that it leaves."""
        z, logdet = self.forward(x, context, sample_mask=sample_mask)
        return self._base_log_prob(z, _checked(self, x, sample_mask)) + logdet

    @torch.no_grad()
    def sample(
        self,
        shape: int | Sequence[int],
        context: Any = None,
        *,
        generator: torch.Generator | None = None,
        sample_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Draws x = inverse(z), z from the base; without gradients.

        Args:
            shape: how many, where the shape of one z is known (``event_shape``, or a base that has it), or the whole
                shape of z, [B, ...].
            context: for B samples.
            generator: for the standard normal base, or one whose ``sample`` has such an argument.
        """
        z = self._base_sample(shape, generator)
        return self.inverse(z, context, sample_mask=sample_mask)[0]

    def _through(
        self, layers: Sequence[torch.nn.Module], x: torch.Tensor, context: Any, sample_mask: Any, inverse: bool
    ) -> _Result:
        _checked(self, x, sample_mask)
        args = () if context is None else (context,)
        how = {} if sample_mask is None else {"sample_mask": sample_mask}
        total = None
        for run in _runs(layers):
            if len(run) > 1:
                x, logdet = _rebuilt(run, x, context, sample_mask, inverse)
            else:
                x, logdet = (run[0].inverse if inverse else run[0])(x, *args, **how)
            total = logdet if total is None else total + logdet
        return x, total

    def _base_log_prob(self, z: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        if self.base is None:
            terms = -0.5 * z.to(reference.working_dtype(z)).square() - 0.5 * math.log(2 * math.pi)
        else:
            terms = self.base.log_prob(z)
        if terms.shape[:1] != z.shape[:1]:
            raise ValueError(
                f"Flow: base.log_prob must return [{z.shape[0]}] or the shape of z, {list(z.shape)}, "
                f"got {_checks.described(terms)}"
            )
        if mask is not None:
            if terms.shape != z.shape:
                raise ValueError(
                    "Flow: a sample_mask needs a base whose log_prob has the shape of z, to leave elements out, "
                    f"got {_checks.described(terms)} for z {list(z.shape)}"
                )
            terms = torch.where(mask, terms, 0.0)
        return terms.flatten(1).sum(1) if terms.dim() > 1 else terms

    def _base_sample(self, shape: Any, generator: torch.Generator | None) -> torch.Tensor:
        whole = (_checks.integer("Flow.sample", "shape", shape, 0),) if hasattr(shape, "__index__") else None
        whole = (*whole, *self._event_shape()) if whole else _sizes("shape", shape)
        if not whole:
            raise ValueError("Flow.sample: shape must hold at least the number of samples, got ()")
        if self.base is None:
            like = next(itertools.chain(self.parameters(), self._float_buffers()), torch.empty(0))
            return torch.randn(whole, dtype=like.dtype, device=like.device, generator=generator)
        how = {}
        if generator is not None:
            if "generator" not in inspect.signature(self.base.sample).parameters:
                raise ValueError(
                    f"Flow.sample: generator needs a base whose sample has such an argument, got {type(self.base)}"
                )
            how["generator"] = generator
        own = self._base_shape()
        own = whole[1:] if own is None else own
        if whole[len(whole) - len(own) :] != own:
            raise ValueError(f"Flow.sample: shape must end with that of the base, {list(own)}, got {list(whole)}")
        return self.base.sample(whole[: len(whole) - len(own)], **how)

    def _event_shape(self) -> tuple[int, ...]:
        shape = self.event_shape if self.event_shape is not None else self._base_shape()
        if shape is None:
            raise ValueError(
                "Flow.sample: a number of samples needs the shape of one z, which neither event_shape nor the base "
                "gives; shape may be the whole shape [B, ...]"
            )
        return shape

    def _base_shape(self) -> tuple[int, ...] | None:
        if not hasattr(self.base, "event_shape"):
            return None
        return (*getattr(self.base, "batch_shape", ()), *self.base.event_shape)

    def _float_buffers(self) -> Iterator[torch.Tensor]:
        return (b for b in self.buffers() if b.is_floating_point())


def _runs(layers: Sequence[Any]) -> list[list[Any]]:
    """The layers in order; neighbours that keep nothing together."""
    runs: list[list[Any]] = []
    rebuilt = False
    for layer in layers:
        before, rebuilt = rebuilt, _saving(layer) == "nothing"
        if before and rebuilt:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return runs


def _sizes(name: str, shape: Any) -> tuple[int, ...]:
    op = "Flow.sample" if name == "shape" else "Flow"
    if not isinstance(shape, (tuple, list, torch.Size)):
        raise TypeError(f"{op}: {name} must be an int or a sequence of ints, got {_checks.described(shape)}")
    return tuple(_checks.integer(op, name, size, 0) for size in shape)
