"""``scipy.ndimage.maximum_filter1d`` and its relatives for tensors: the same arguments, edge modes and results.

Results are those of scipy bit for bit where the data are finite; -0 and +0 are the exception (here +0 is the larger
one, in scipy they are equal). What differs on purpose: NaN wins every window that it is in (in scipy that depends on
the order of the data), and int64 is exact above 2**53. Runs on the device of the tensor, and has a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .. import _checks
from ..sliding_window import DTYPES, sliding_window_max, sliding_window_min

__all__ = ["maximum_filter", "maximum_filter1d", "minimum_filter", "minimum_filter1d"]

_MODES = {
    "reflect": "reflect",
    "grid-mirror": "reflect",
    "constant": "constant",
    "grid-constant": "constant",
    "nearest": "nearest",
    "mirror": "mirror",
    "wrap": "wrap",
    "grid-wrap": "wrap",
}


def _per_axis(op: str, name: str, value: Any, axes: int) -> list[Any]:
    if isinstance(value, (tuple, list)):
        if len(value) != axes:
            raise ValueError(f"{op}: {name} must have one entry for each of the {axes} axes, got {value!r}")
        return list(value)
    return [value] * axes


def _checked_cval(op: str, cval: Any, dtype: torch.dtype) -> Any:
    """cval as a value of the dtype. Rounding keeps order, so rounding it first gives what rounding the result gives."""
    if isinstance(cval, torch.Tensor) or not hasattr(cval, "__float__"):
        raise TypeError(f"{op}: cval must be a number, got {_checks.described(cval)}")
    if dtype.is_floating_point:
        return torch.tensor(float(cval), dtype=torch.float64).to(dtype).item()
    if cval != cval or cval in (float("inf"), float("-inf")):
        raise ValueError(f"{op}: cval must be finite for {dtype}, got {cval!r}")
    whole = int(cval)
    low, high = (0, 1) if dtype == torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    if not low <= whole <= high:
        raise ValueError(f"{op}: cval must be in [{low}, {high}] for {dtype}, got {cval!r}")
    return whole


def _along(
    op: str, extremum: Callable[..., Any], x: torch.Tensor, size: Any, axis: int, mode: Any, cval: Any, origin: Any
) -> torch.Tensor:
    size = _checks.integer(op, "size", size, 1)
    origin = _checks.integer(op, "origin", origin)
    edge = _MODES[_checks.choice(op, "mode", mode, tuple(_MODES))]
    left = size // 2 + origin  # the window of output i starts at i - left
    if not 0 <= left < size:
        raise ValueError(
            f"{op}: origin must be in [{-(size // 2)}, {size - 1 - size // 2}] for size {size}, got {origin}"
        )
    if x.numel() == 0:
        return x.clone()
    pad = (left, size - 1 - left)
    if edge != "constant":
        return extremum(x, size, axis, padding=pad, mode=edge)
    # cval takes part as a value, unlike the padding of sliding_window_max, so it has to be there.
    if size == 1:
        return extremum(x, 1, axis)
    behind = [0, 0] * (x.dim() - 1 - axis)
    padded = torch.constant_pad_nd(x, [*behind, *pad], _checked_cval(op, cval, x.dtype))
    return extremum(padded, size, axis)


def _delivered(op: str, y: torch.Tensor, output: Any) -> torch.Tensor:
    """y as a new tensor, or of the dtype `output`, or in the tensor `output`."""
    if output is None:
        return y
    dtype = output.dtype if isinstance(output, torch.Tensor) else output
    if dtype not in DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        got = _checks.described(output)
        raise TypeError(f"{op}: output must be a tensor or a torch.dtype among {names}, got {got}")
    if not isinstance(output, torch.Tensor):
        return y.to(dtype)
    if output.shape != y.shape or output.device != y.device:
        raise ValueError(
            f"{op}: output must have the shape and device of input ({list(y.shape)} on {y.device}), "
            f"got {_checks.described(output)}"
        )
    return output.copy_(y)


def _filter1d(
    op: str,
    extremum: Callable[..., Any],
    input: Any,
    size: Any,
    axis: Any,
    output: Any,
    mode: Any,
    cval: Any,
    origin: Any,
) -> torch.Tensor:
    x = _checks.strided_tensor(op, "input", input, DTYPES)
    if x.dim() == 0:
        raise ValueError(f"{op}: input must have at least one dimension, got {_checks.described(x)}")
    y = _along(op, extremum, x, size, _checks.dimension(op, "axis", axis, x.dim()), mode, cval, origin)
    return _delivered(op, y, output)


def _filter(
    op: str,
    extremum: Callable[..., Any],
    input: Any,
    size: Any,
    footprint: Any,
    output: Any,
    mode: Any,
    cval: Any,
    origin: Any,
    axes: Any,
) -> torch.Tensor:
    x = _checks.strided_tensor(op, "input", input, DTYPES)
    if footprint is not None:
        raise ValueError(f"{op}: footprint is not supported, only boxes given by size, got {footprint!r}")
    if size is None:
        raise ValueError(f"{op}: size must be an int or one int for each axis, got None")
    named = range(x.dim()) if axes is None else axes if isinstance(axes, (tuple, list)) else (axes,)
    dims = [_checks.dimension(op, "axes", a, x.dim()) for a in named]
    if len(set(dims)) != len(dims):
        raise ValueError(f"{op}: axes must name each axis once, got {axes!r}")
    arguments = [_per_axis(op, n, v, len(dims)) for n, v in (("size", size), ("mode", mode), ("origin", origin))]
    y = x
    # Inner axes first, as sliding_window_max does: among equal elements the first in raster order gets the gradient.
    for dim, n, edge, shift in sorted(zip(dims, *arguments, strict=True), reverse=True, key=lambda entry: entry[0]):
        y = _along(op, extremum, y, n, dim, edge, cval, shift)
    return _delivered(op, y.clone() if y is x else y, output)


def maximum_filter1d(
    input: torch.Tensor,
    size: int,
    axis: int = -1,
    output: torch.Tensor | torch.dtype | None = None,
    mode: str = "reflect",
    cval: float = 0.0,
    origin: int = 0,
) -> torch.Tensor:
    """Maximum along one axis, as scipy.ndimage.maximum_filter1d.

    y[i] = max of x[i - size // 2 - origin], ..., ``size`` elements, with the row continued beyond its ends by ``mode``.

    Args:
        input: a dense tensor: float16, bfloat16, float32, float64, uint8, int8 ... int64, bool.
        size: elements in a window, >= 1.
        axis: the dimension.
        output: a tensor of the same shape and device, written in place and returned (it may be ``input``), or the dtype
            of the result.
        mode: ``"reflect"`` (d c b a | a b c d), ``"constant"`` (the value ``cval``), ``"nearest"`` (a a a | a b c d),
            ``"mirror"`` (d c b | a b c d), ``"wrap"`` (b c d | a b c d), or the synonyms ``"grid-mirror"`` (reflect),
            ``"grid-constant"`` and ``"grid-wrap"``.
        cval: takes part as an element in mode ``"constant"``. Rounded to the dtype, toward 0 for integers.
        origin: moves the window to the left, -(size // 2) <= origin <= (size - 1) // 2.

    Returns:
        A tensor of the shape of ``input``.

    Raises:
        TypeError: input is no dense tensor of these dtypes; output is neither a tensor nor a dtype of these.
        ValueError: an argument out of its range; output of another shape or device; cval that an integer dtype lacks.

    Deterministic. Differentiable, any number of times; mode ``"constant"`` copies the padded input, the others do not.

    >>> from pyperf_dl.integrations.scipy_like import maximum_filter1d
    >>> maximum_filter1d(torch.tensor([2, 8, 0, 4, 1, 9, 9, 0]), size=3)
    tensor([8, 8, 8, 4, 9, 9, 9, 9])
    """
    return _filter1d("maximum_filter1d", sliding_window_max, input, size, axis, output, mode, cval, origin)


def minimum_filter1d(
    input: torch.Tensor,
    size: int,
    axis: int = -1,
    output: torch.Tensor | torch.dtype | None = None,
    mode: str = "reflect",
    cval: float = 0.0,
    origin: int = 0,
) -> torch.Tensor:
    """Minimum along one axis, as scipy.ndimage.minimum_filter1d. Arguments as for :func:`maximum_filter1d`.

    >>> from pyperf_dl.integrations.scipy_like import minimum_filter1d
    >>> minimum_filter1d(torch.tensor([2, 8, 0, 4, 1, 9, 9, 0]), size=3)
    tensor([2, 0, 0, 0, 1, 1, 0, 0])
    """
    return _filter1d("minimum_filter1d", sliding_window_min, input, size, axis, output, mode, cval, origin)


def maximum_filter(
    input: torch.Tensor,
    size: int | Sequence[int] | None = None,
    footprint: None = None,
    output: torch.Tensor | torch.dtype | None = None,
    mode: str | Sequence[str] = "reflect",
    cval: float = 0.0,
    origin: int | Sequence[int] = 0,
    *,
    axes: int | Sequence[int] | None = None,
) -> torch.Tensor:
    """Maximum over a box, as scipy.ndimage.maximum_filter with ``size``.

    Args:
        size, mode, origin: one value, or one for each of ``axes``; else as for :func:`maximum_filter1d`.
        footprint: not supported; here for its place in the arguments.
        axes: the dimensions that the box extends along, all by default.
        input, output, cval: as for :func:`maximum_filter1d`.

    Raises:
        ValueError: footprint is given.
        TypeError, ValueError: as :func:`maximum_filter1d`; a sequence of another length than axes; an axis twice.

    >>> from pyperf_dl.integrations.scipy_like import maximum_filter
    >>> maximum_filter(torch.eye(4), size=(1, 3))
    tensor([[1., 1., 0., 0.],
            [1., 1., 1., 0.],
            [0., 1., 1., 1.],
            [0., 0., 1., 1.]])
    """
    return _filter("maximum_filter", sliding_window_max, input, size, footprint, output, mode, cval, origin, axes)


def minimum_filter(
    input: torch.Tensor,
    size: int | Sequence[int] | None = None,
    footprint: None = None,
    output: torch.Tensor | torch.dtype | None = None,
    mode: str | Sequence[str] = "reflect",
    cval: float = 0.0,
    origin: int | Sequence[int] = 0,
    *,
    axes: int | Sequence[int] | None = None,
) -> torch.Tensor:
    """Minimum over a box, as scipy.ndimage.minimum_filter with ``size``. Arguments as for :func:`maximum_filter`.

    >>> from pyperf_dl.integrations.scipy_like import minimum_filter
    >>> minimum_filter(torch.tensor([[3, 1], [2, 5]]), size=2, mode="constant", cval=9)
    tensor([[3, 1],
            [2, 1]])
    """
    return _filter("minimum_filter", sliding_window_min, input, size, footprint, output, mode, cval, origin, axes)
