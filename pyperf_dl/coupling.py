"""Coupling layers of normalizing flows: forward and inverse with log-determinant, each in one pass."""

from __future__ import annotations

from ._coupling_affine import additive_coupling, affine_coupling, affine_coupling_packed
from ._coupling_channels import actnorm, invertible_conv1x1
from ._coupling_modules import ActNorm, AdditiveCoupling, AffineCoupling, Flow, InvertibleConv1x1, SplineCoupling
from ._coupling_spline import rational_quadratic_spline, rational_quadratic_spline_packed

__all__ = [
    "ActNorm",
    "AdditiveCoupling",
    "AffineCoupling",
    "Flow",
    "InvertibleConv1x1",
    "SplineCoupling",
    "actnorm",
    "additive_coupling",
    "affine_coupling",
    "affine_coupling_packed",
    "invertible_conv1x1",
    "rational_quadratic_spline",
    "rational_quadratic_spline_packed",
]
