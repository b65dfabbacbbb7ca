"""Affine coupling blocks of FrEIA, served by pyperf_dl.

    from pyperf_dl.integrations import freia

    freia.enable()        # from now on, in the whole process
    with freia.enable():
        ...               # inside the block

Results are those of FrEIA within its own float32 error. Nothing is read back from the device.
"""

from __future__ import annotations

from typing import Any

import torch

import pyperf_dl

from . import _swap
from ._swap import Declined, Report, Settings, Takeover

__all__ = ["Report", "disable", "enable", "report"]

_peer = _swap.Peer("freia", "FrEIA", "0.2", "0.2")
disable, report = _peer.disable, _peer.report
_BLOCKS = "FrEIA.modules.coupling_layers"


_clamps: list[tuple[Any, str, float]] = []  # code of what FrEIA calls f_clamp, activation, factor of its argument


def _find_clamps() -> None:
    from FrEIA.modules.coupling_layers import _BaseCouplingBlock

    _clamps.clear()
    for code in _BaseCouplingBlock.__init__.__code__.co_consts:
        names = getattr(code, "co_names", ())
        if "atan" in names:
            _clamps.append((code, "atan", 1.0))
        elif "sigmoid" in names:
            _clamps.append((code, "tanh", 0.5))  # 2 sigmoid(u) - 1


def _clamp_of(function: Any) -> tuple[str, float] | None:
    if function is torch.tanh:
        return "tanh", 1.0
    code = getattr(function, "__code__", None)
    for known, activation, factor in _clamps:
        if known is code:
            return activation, factor
    return None


def _unfit(x: Any, scale: Any, shift: Any) -> str:
    why = _swap.unfit(x, scale, shift)
    return why or ("" if x.dim() >= 2 and scale.shape == shift.shape == x.shape else "shape")


def _couple(x: torch.Tensor, scale: Any, shift: Any, rev: Any, clamp: Any, f_clamp: Any, mean: Any = None) -> Any:
    """y and log-det [B]; with `mean`, the dimensions over which the log-scale is freed of its mean."""
    known = _clamp_of(f_clamp) if mean is None and _swap.number(clamp) else None
    if known:
        activation, factor = known
        scale = scale if factor == 1 else factor * scale
        how = {"activation": activation, "clamp": float(clamp)}
    else:
        scale = clamp * f_clamp(scale)
        scale = scale if mean is None else scale - scale.mean(mean, keepdim=True)
        how = {"activation": "exp"}
    y, logdet = pyperf_dl.affine_coupling(x, scale, shift, inverse=bool(rev), **how)
    return y, logdet.to(x.dtype)


def _halves(x: Any, params: Any) -> Any:
    """Scale and shift of a network that predicts both; no tensors for an output that is none of x's."""
    if not isinstance(params, torch.Tensor) or params.dim() < 2 or not isinstance(x, torch.Tensor) or x.dim() < 2:
        return None, None
    return params[:, : x.shape[1]], params[:, x.shape[1] :]


def _block(layer: Any, x: Any, params: dict[str, Any], rev: Any, mean: Any = None) -> Any:
    """One side of a block. params: what its networks returned, by attribute: one for both, or scale and shift"""
    scale, shift = _halves(x, *params.values()) if len(params) == 1 else params.values()
    why = _unfit(x, scale, shift)
    if why:
        return Declined(why, **params)
    return _couple(x, scale, shift, rev, layer.clamp, layer.f_clamp, mean)


@_peer.replaces(_BLOCKS, "RNVPCouplingBlock._coupling1")
def _rnvp_1(settings: Settings, self: Any, x1: Any, u2: Any, rev: Any = False) -> Any:
    return _block(self, x1, {"subnet_s2": self.subnet_s2(u2), "subnet_t2": self.subnet_t2(u2)}, rev)


@_peer.replaces(_BLOCKS, "RNVPCouplingBlock._coupling2")
def _rnvp_2(settings: Settings, self: Any, x2: Any, u1: Any, rev: Any = False) -> Any:
    return _block(self, x2, {"subnet_s1": self.subnet_s1(u1), "subnet_t1": self.subnet_t1(u1)}, rev)


@_peer.replaces(_BLOCKS, "GLOWCouplingBlock._coupling1")
def _glow_1(settings: Settings, self: Any, x1: Any, u2: Any, rev: Any = False) -> Any:
    return _block(self, x1, {"subnet2": self.subnet2(u2)}, rev)


@_peer.replaces(_BLOCKS, "GLOWCouplingBlock._coupling2")
def _glow_2(settings: Settings, self: Any, x2: Any, u1: Any, rev: Any = False) -> Any:
    return _block(self, x2, {"subnet1": self.subnet1(u1)}, rev)


@_peer.replaces(_BLOCKS, "GINCouplingBlock._coupling1")
def _gin_1(settings: Settings, self: Any, x1: Any, u2: Any, rev: Any = False) -> Any:
    got = _block(self, x1, {"subnet2": self.subnet2(u2)}, rev, 1)
    return got if type(got) is Declined else (got[0], 0.0)


@_peer.replaces(_BLOCKS, "GINCouplingBlock._coupling2")
def _gin_2(settings: Settings, self: Any, x2: Any, u1: Any, rev: Any = False) -> Any:
    got = _block(self, x2, {"subnet1": self.subnet1(u1)}, rev, 1)
    return got if type(got) is Declined else (got[0], 0.0)


@_peer.replaces(_BLOCKS, "AffineCouplingOneSided.forward")
def _one_sided(settings: Settings, self: Any, x: Any, c: Any = [], rev: Any = False, jac: Any = True) -> Any:  # noqa: B006
    untouched, other = torch.split(x[0], [self.split_len1, self.split_len2], dim=1)
    params = self.subnet(torch.cat([untouched, *c], 1) if self.conditional else untouched)
    got = _block(self, other, {"subnet": params}, rev)
    return got if type(got) is Declined else ((torch.cat([untouched, got[0]], 1),), got[1])


@_peer.replaces(_BLOCKS, "ConditionalAffineTransform.forward")
def _conditional(settings: Settings, self: Any, x: Any, c: Any = [], rev: Any = False, jac: Any = True) -> Any:  # noqa: B006
    params = self.subnet(torch.cat(c, 1) if len(c) > 1 else c[0])
    got = _block(self, x[0], {"subnet": params}, rev)
    return got if type(got) is Declined else ((got[0],), got[1])


@_peer.replaces("FrEIA.modules.all_in_one_block", "AllInOneBlock._affine")
def _all_in_one(settings: Settings, self: Any, x: Any, a: Any, rev: Any = False) -> Any:
    scale, shift = _halves(x, a)
    why = _unfit(x, scale, shift)
    if why:
        return Declined(why)
    scale, shift = _halves(x, 0.1 * a)
    return _couple(x, scale, shift, rev, self.clamp, torch.tanh, self.sum_dims if self.GIN else None)


def enable() -> Takeover:
    """Sends the affine couplings of FrEIA to pyperf_dl.

    Taken over are ``RNVPCouplingBlock``, ``GLOWCouplingBlock``, ``GINCouplingBlock``, ``AffineCouplingOneSided``,
    ``ConditionalAffineTransform`` and ``AllInOneBlock``, with conditions, in both directions; the clamp ``"ATAN"``,
    ``"TANH"`` or ``"SIGMOID"`` is part of the pass, a function is called before it. A call with a dtype or shape that
    the operators do not have goes to FrEIA as before, errors too, and :func:`report` says why.

    Returns:
        A context manager: ``with enable():`` ends with the block. Takeovers nest, and hold for all threads; the latest
        one that is still open decides.

    Raises:
        ValueError: a version of FrEIA other than 0.2.
        ImportError: FrEIA is not installed.

    >>> from FrEIA.modules import GLOWCouplingBlock
    >>> from pyperf_dl.integrations import freia
    >>> before = freia.report(reset=True)
    >>> block = GLOWCouplingBlock([(4,)], subnet_constructor=torch.nn.Linear)
    >>> with freia.enable():
    ...     (y,), log_jac_det = block([torch.randn(10, 4)])
    >>> freia.report()
    Report(taken=2, fell_back={})
    """
    takeover = _peer.enable(Settings())
    _find_clamps()
    return takeover
