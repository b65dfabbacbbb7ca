"""Guidance of a pipeline of diffusers, put off until the scheduler's step, and the model's next input, made there.

A pipeline combines the halves of a model's output itself, and doubles and scales the next sample. Here the output is a
tensor that takes note of `uncond + scale * (cond - uncond)`, and the sample one that has its doubled form ready. In any
other use they are the plain tensors that they stand for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map

_METADATA = {"shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_cpu", "requires_grad", "is_sparse", "names"}
_QUESTIONS = {"size", "dim", "numel", "is_floating_point", "is_complex", "element_size", "__len__", "is_contiguous"}


class Later(torch.Tensor):
    """In memory one of the tensors that it is made of, of the same shape."""

    def value(self) -> torch.Tensor:
        return self.as_subclass(torch.Tensor)

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name, kwargs = function.__name__, kwargs or {}
        if name == "__get__":
            known = getattr(function.__self__, "__name__", "") in _METADATA  # type: ignore[attr-defined]
        else:
            known = name in _QUESTIONS or name == "as_subclass"
        if known:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **kwargs)
        noted = _NOTES[name](*args, **kwargs) if name in _NOTES else None
        return function(*tree_map(plain, args), **tree_map(plain, kwargs)) if noted is None else noted


class Outputs(Later):
    """Of a model: without the condition, then with it."""


class _Half(Later):
    outputs: torch.Tensor
    conditional: bool


class _Difference(Later):
    """scale * (cond - uncond)"""

    outputs: torch.Tensor
    scale: float

    def value(self) -> torch.Tensor:
        uncond, cond = self.outputs.chunk(2)
        return self.scale * (cond - uncond) if self.scale != 1.0 else cond - uncond


class Guided(Later):
    outputs: torch.Tensor
    scale: float

    def value(self) -> torch.Tensor:
        uncond, cond = self.outputs.chunk(2)
        return uncond + self.scale * (cond - uncond)


class Latents(Later):
    """A sample, and what the model gets of it: [2 B, ...]. scaled: whether the scheduler would have scaled it."""

    doubled: torch.Tensor
    version: int
    scaled: bool


class Doubled(Later):
    """What the model gets, on its way through the scheduler's scaling."""

    sample: torch.Tensor

    def value(self) -> torch.Tensor:
        return torch.cat([self.sample] * 2)


def plain(value: Any) -> Any:
    return value.value() if isinstance(value, Later) else value


def outputs(of_model: torch.Tensor) -> torch.Tensor:
    return of_model.as_subclass(Outputs) if type(of_model) is torch.Tensor and of_model.dim() > 1 else of_model


def latents(sample: torch.Tensor, doubled: torch.Tensor, scaled: bool) -> torch.Tensor:
    if sample.is_inference() or doubled.dtype != sample.dtype:
        return sample
    return _made(Latents, sample, doubled=doubled, version=sample._version, scaled=scaled)


def _made(kind: type, like: torch.Tensor, **parts: Any) -> Any:
    tensor = like.as_subclass(kind)
    for name, part in parts.items():
        setattr(tensor, name, part)
    return tensor


def _chunk(x: Any, chunks: int, dim: int = 0) -> Any:
    if type(x) is not Outputs or chunks != 2 or dim != 0 or x.shape[0] % 2:
        return None
    both = x.value()
    return tuple(_made(_Half, h, outputs=both, conditional=bool(k)) for k, h in enumerate(both.chunk(2)))


def _sub(a: Any, b: Any, **other: Any) -> Any:
    if other or type(a) is not _Half or type(b) is not _Half or a.outputs is not b.outputs:
        return None
    if not a.conditional or b.conditional:
        return None
    return _made(_Difference, plain(a), outputs=a.outputs, scale=1.0)


def _mul(a: Any, b: Any, **other: Any) -> Any:
    difference, scale = (a, b) if isinstance(a, _Difference) else (b, a)
    if other or type(difference) is not _Difference or type(scale) not in (int, float) or difference.scale != 1.0:
        return None
    return _made(_Difference, difference.as_subclass(torch.Tensor), outputs=difference.outputs, scale=float(scale))


def _add(a: Any, b: Any, **other: Any) -> Any:
    half, difference = (a, b) if type(a) is _Half else (b, a)
    if other or type(half) is not _Half or type(difference) is not _Difference:
        return None
    if half.conditional or half.outputs is not difference.outputs:
        return None
    return _made(Guided, plain(half), outputs=half.outputs, scale=difference.scale)


def _cat(tensors: Any, dim: int = 0, **other: Any) -> Any:
    if other or dim != 0 or len(tensors) != 2 or tensors[0] is not tensors[1] or type(tensors[0]) is not Latents:
        return None
    sample = tensors[0]
    if plain(sample)._version != sample.version:  # changed in place since
        return None
    return _made(Doubled, sample.doubled, sample=plain(sample)) if sample.scaled else sample.doubled


_NOTES: dict[str, Callable[..., Any]] = {
    "chunk": _chunk,
    **dict.fromkeys(("sub", "__sub__"), _sub),
    **dict.fromkeys(("mul", "__mul__", "__rmul__"), _mul),
    **dict.fromkeys(("add", "__add__", "__radd__"), _add),
    **dict.fromkeys(("cat", "concat"), _cat),
}
