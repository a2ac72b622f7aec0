"""How well a fit satisfies its conditions, and how far from L1 it is."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["gap", "kkt"]

Array = NDArray[Any]


def kkt(x: Array, A: float, mu: Array, positive: bool) -> float:
    """Compare mirror(x) with X^T nu."""
    size = float(np.abs(mu).max(initial=0.0))
    if size == 0:
        return 0.0
    if positive:
        held = x > 0
        error = (np.log(x[held]) - np.log(A)) / 2 - mu[held]
    else:
        error = np.sign(x) * _arcsinh(np.abs(x), A) / 2 - mu
    return float(np.abs(error).max(initial=0.0)) / size


def _arcsinh(x: Array, A: float) -> Array:
    """Give arcsinh(x / A), x >= 0, also where x / A overflows."""
    with np.errstate(over="ignore", divide="ignore"):
        ratio = x / A
    large = ratio > 1e150
    safe = np.arcsinh(np.where(large, 0.0, ratio))
    return np.where(large, np.log(2 * np.maximum(x, 1e-300)) - np.log(max(A, 1e-320)), safe)


def gap(x: Array, gain: float, mu: Array, positive: bool) -> float:
    """Give the relative duality gap of the L1 norm, with nu as the witness."""
    size = float(np.abs(x).sum())
    height = float((mu if positive else np.abs(mu)).max(initial=0.0))
    if size == 0 or height <= 0:
        return 0.0
    return min(1.0, max(0.0, 1 - gain / (height * size)))
