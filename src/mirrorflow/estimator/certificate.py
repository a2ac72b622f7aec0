"""How well a fit satisfies its conditions, and how far from L1 it is."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["gap", "kkt"]

Array = NDArray[Any]


def kkt(x: Array, log_A: float, mu: Array, positive: bool) -> float:
    """Compare mirror(x) with X^T nu, where x has digits."""
    size = float(np.abs(mu).max(initial=0.0))
    held = np.abs(x) > 1e-300  # below, x has few digits or none
    if size == 0 or not held.any():
        return 0.0
    z = np.log(np.abs(x[held])) - log_A
    mirror = z if positive else np.sign(x[held]) * _arcsinh_exp(z)
    return float(np.abs(mirror / 2 - mu[held]).max()) / size


def _arcsinh_exp(z: Array) -> Array:
    """Give arcsinh(e^z), also where e^z overflows."""
    return np.where(z > 300, z + np.log(2.0), np.arcsinh(np.exp(np.minimum(z, 300))))


def gap(x: Array, gain: float, mu: Array, positive: bool) -> float:
    """Give the relative duality gap of the L1 norm, with nu as the witness."""
    size = float(np.abs(x).sum())
    height = float((mu if positive else np.abs(mu)).max(initial=0.0))
    if size == 0 or height <= 0:
        return 0.0
    return min(1.0, max(0.0, 1 - gain / (height * size)))
