"""Where the noise of a step comes from: PyTorch's generators."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from . import _backend, _checks
from ._autograd import _are_functorch_transforms_active, is_plain

_LARGEST = 2**31 - 1  # bytes of a tensor that torch.randn does not fill in pieces
_same_numbers: dict[int, bool] = {}  # by CUDA device: whether the kernel draws what torch.randn does


class GeneratorState:
    """Seed and offset of a generator in a device's memory, from which a recorded loop draws its noise."""

    def __init__(self, x: torch.Tensor) -> None:
        self.device = x.device
        self.tensor = torch.zeros(2, dtype=torch.int64, device=x.device)
        self.taken = 0

    def begin(self) -> None:
        """Of a loop: its draws follow each other from here."""
        self.taken = 0

    def next_offset(self, x: torch.Tensor) -> int:
        if x.dtype == torch.float64 or x.numel() * x.itemsize > _LARGEST or not draws_like_torch(x.device):
            raise RuntimeError(
                "Sampler.sample: noise of a generator can't be captured here, for the kernel does not draw the numbers "
                f"of torch.randn for {_checks.described(x)}; pass key= instead"
            )
        offset = self.taken
        self.taken += _offset_taken(x.numel(), _index(x.device))
        return offset

    def take(self, generator: torch.Generator | None) -> None:
        """Starts the next replay where the generator is, and moves that past it."""
        if not self.taken:
            return
        if isinstance(generator, (list, tuple)):
            raise ValueError("Sampler.sample: capture takes one generator, got a list; or pass key= with one a sample")
        if generator is None:
            generator = torch.cuda.default_generators[_index(self.device)]
        seed, offset = _seed(generator), generator.get_offset()
        self.tensor[0].fill_(seed)
        self.tensor[1].fill_(offset)
        generator.set_offset(offset + self.taken)


def checked_generators(
    op: str, generator: Any, x: torch.Tensor
) -> torch.Generator | list[torch.Generator | None] | None:
    """One generator, or one of each sample; an entry that is None stands for the default generator."""
    if generator is None or isinstance(generator, (torch.Generator, GeneratorState)):
        _check_device(op, generator, x)
        return generator
    if not isinstance(generator, (list, tuple)):
        raise TypeError(
            f"{op}: generator must be a torch.Generator or a list of them, got {_checks.described(generator)}"
        )
    if x.dim() == 0 or len(generator) != x.shape[0]:
        raise ValueError(
            f"{op}: a list of generators must have one for each sample, got {len(generator)} for x {list(x.shape)}"
        )
    for one in generator:
        if one is not None and not isinstance(one, torch.Generator):
            raise TypeError(f"{op}: generator must hold torch.Generator, got {_checks.described(one)}")
        _check_device(op, one, x)
    return list(generator)


def _check_device(op: str, generator: torch.Generator | None, x: torch.Tensor) -> None:
    if generator is None or isinstance(generator, GeneratorState):
        return
    own, wanted = generator.device, x.device
    if own.type != wanted.type or (own.index is not None and own.index != (wanted.index or 0)):
        raise ValueError(f"{op}: generator must be on x's device {x.device}, got one on {generator.device}")


def drawn(x: torch.Tensor, generator: Any) -> torch.Tensor:
    """torch.randn of x's shape, dtype and device; with a list of generators, a draw of each for its sample."""
    if isinstance(generator, list):
        each = [torch.randn(x.shape[1:], generator=g, dtype=x.dtype, device=x.device) for g in generator]
        return torch.stack(each) if each else torch.empty_like(x)
    if not is_plain(x) and generator is None:
        return torch.randn_like(x)
    return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)


def generator_state(x: torch.Tensor, generator: Any) -> tuple[torch.Tensor, int] | None:
    """Seed and offset, and what to add to that, for the kernel that makes the numbers of torch.randn itself; the
    generator is moved to where torch.randn would have left it. None where it can't: PyTorch draws then."""
    if isinstance(generator, GeneratorState):
        return generator.tensor, generator.next_offset(x)
    if (
        not x.is_cuda
        or x.dtype == torch.float64  # another stream of numbers
        or isinstance(generator, list)
        or not 0 < x.numel() * x.itemsize <= _LARGEST
        or torch.compiler.is_compiling()
        or _are_functorch_transforms_active()
        or _backend.serving(x) != "native"
        or torch.cuda.is_current_stream_capturing()
        or not draws_like_torch(x.device)
    ):
        return None
    return _taken(x, torch.cuda.default_generators[_index(x.device)] if generator is None else generator), 0


def draws_like_torch(device: torch.device) -> bool:
    """Whether the kernel draws what torch.randn does: found out by one draw, longer than all threads take at a time."""
    index = _index(device)
    if index not in _same_numbers:
        numel = 8 * torch.cuda.get_device_properties(device).multi_processor_count * 2048 + 3
        mine, theirs = (torch.Generator(device).manual_seed(20) for _ in range(2))
        expected = torch.randn(numel, generator=theirs, device=device)
        got = torch.ops.pyperf_dl.sampler_noise(expected, None, _taken(expected, mine), 0, 0, 0)
        _same_numbers[index] = torch.equal(got, expected) and mine.get_offset() == theirs.get_offset()
        if not _same_numbers[index]:
            warnings.warn(
                "pyperf_dl: torch.randn of this version draws other numbers than the sampler's kernel; PyTorch draws "
                "them, which takes one more pass",
                stacklevel=4,
            )
    return _same_numbers[index]


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _seed(generator: torch.Generator) -> int:
    seed = generator.initial_seed()
    return seed - 2**64 if seed >= 2**63 else seed


def _taken(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    offset = generator.get_offset()
    generator.set_offset(offset + _offset_taken(x.numel(), _index(x.device)))
    return torch.tensor([_seed(generator), offset])


def _offset_taken(numel: int, device: int) -> int:
    """How far torch.randn moves a generator: its threads take four numbers at a time."""
    properties = torch.cuda.get_device_properties(device)
    resident = properties.multi_processor_count * (properties.max_threads_per_multi_processor // 256)
    threads = 256 * min(-(-numel // 256), resident)
    return ((numel - 1) // (4 * threads) + 1) * 4


def one_a_sample(op: str, name: str, value: torch.Tensor, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`value`, a tensor of one number or one a sample, as the operators take it."""
    if value.is_complex() or value.dtype == torch.bool or (not dtype.is_floating_point and value.is_floating_point()):
        raise TypeError(f"{op}: {name} must be {dtype}, got {_checks.described(value)}")
    if value.device != x.device:
        raise ValueError(f"{op}: {name} must be on x's device {x.device}, got {_checks.described(value)}")
    if value.numel() != 1 and value.shape != x.shape[:1]:
        raise ValueError(f"{op}: {name} must have one number, or one a sample ({x.shape[0]}), got {list(value.shape)}")
    if value.requires_grad:
        raise ValueError(f"{op}: {name} has no derivative here, detach it")
    return value.reshape(-1).to(dtype).contiguous()
