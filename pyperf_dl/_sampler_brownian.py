"""Brownian motion as a function of its key: the same path whatever the steps."""

from __future__ import annotations

import math

import torch

from . import _checks
from ._sampler_step import DTYPES, checked_key, noise_of_key

_LEVELS = 32  # halvings of the interval, after which a path is a straight line


class BrownianNoise:
    """Noise for the steps of an SDE sampler, from one Brownian motion W a sample: where it starts and ends decides a
    step's noise, so that 40 steps follow the path of 20.

    noise(t, t') = (W(t') - W(t)) / sqrt(abs(t' - t)), standard normal.

    W is made by halving: between two known points it is in the middle their mean plus sqrt(length / 4) times standard
    normal noise, which depends on the sample's key and the place alone (`per_sample_noise`, draws below -1). After 32
    halvings it is a straight line. A call makes up to 66 draws, half of that if it starts where the last one ended.

    Args:
        like: ``[B, ...]``, shape, dtype and device of the noise.
        key: an int, or an int64 tensor with one or B of them.
        low, high: the interval of t, which is the noise level sigma for `StepTable`'s samplers; as in k-diffusion, its
            smallest sigma above 0 and its largest.

    Raises:
        TypeError, ValueError: a dtype that is no float, an empty interval; when called, t outside of it, or no step.

    >>> noise = pyperf_dl.BrownianNoise(torch.empty(1, 4), key=3, low=0.0, high=14.0)
    >>> whole, half, rest = noise(14.0, 2.0), noise(14.0, 6.0), noise(6.0, 2.0)
    >>> torch.allclose(whole * 12 ** 0.5, half * 8 ** 0.5 + rest * 4 ** 0.5, atol=1e-5)
    True
    """

    def __init__(self, like: torch.Tensor, key: int | torch.Tensor, low: float, high: float) -> None:
        op = "BrownianNoise"
        _checks.strided_tensor(op, "like", like, DTYPES)
        if like.dim() == 0:
            raise ValueError(f"{op}: like must have a batch dimension, got a tensor without dimensions")
        self._low, self._high = (_checks.number(op, n, v, finite=True) for n, v in (("low", low), ("high", high)))
        if not self._low < self._high:
            raise ValueError(f"{op}: low must be below high, got {low} and {high}")
        self._dtype = like.dtype
        wide = torch.float64 if like.dtype == torch.float64 else torch.float32
        self._like = torch.empty(like.shape, dtype=wide, device=like.device)
        self._key = checked_key(op, key, self._like)
        self._last: tuple[float, torch.Tensor] | None = None  # where the last call ended

    def __call__(self, start: float, end: float) -> torch.Tensor:
        op = "BrownianNoise"
        for name, t in (("start", start), ("end", end)):
            t = _checks.number(op, name, t)
            slack = 1e-6 * (self._high - self._low)
            if not self._low - slack <= t <= self._high + slack:
                raise ValueError(f"{op}: {name} must be in [{self._low}, {self._high}], got {t}")
        if start == end:
            raise ValueError(f"{op}: end must not be start, got {start} twice")
        before = self._last[1] if self._last is not None and self._last[0] == start else self._at(start)
        after = self._at(end)
        self._last = end, after
        return ((after - before) / math.sqrt(abs(end - start))).to(self._dtype)

    def _at(self, t: float) -> torch.Tensor:
        t = min(max(t, self._low), self._high)
        left, right = self._low, self._high
        at_left = torch.zeros_like(self._like)
        at_right = math.sqrt(right - left) * self._noise(0)
        node = 1
        for _ in range(_LEVELS):
            if t in (left, right):
                break
            middle = (left + right) / 2
            at_middle = (at_left + at_right) / 2 + math.sqrt((right - left) / 4) * self._noise(node)
            if t < middle:
                right, at_right, node = middle, at_middle, 2 * node
            else:
                left, at_left, node = middle, at_middle, 2 * node + 1
        return at_left + (t - left) / (right - left) * (at_right - at_left)

    def _noise(self, node: int) -> torch.Tensor:
        return noise_of_key(self._like, self._key, -2 - node)
