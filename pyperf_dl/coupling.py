"""Coupling layers of normalizing flows: forward and inverse with log-determinant, each in one pass."""

from __future__ import annotations

from ._coupling_affine import additive_coupling, affine_coupling
from ._coupling_spline import rational_quadratic_spline, rational_quadratic_spline_packed

__all__ = [
    "additive_coupling",
    "affine_coupling",
    "rational_quadratic_spline",
    "rational_quadratic_spline_packed",
]
