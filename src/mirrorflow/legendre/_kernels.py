r"""Formulas shared by NumPy and torch: the entropy of m * w, and the certificates of end points.

``x = A sinh t`` is needed for A far below what a float holds (A = e^{-300}) and for t so large that
e^t overflows; only A e^t, which is about 2x, is a number. Hence A comes as log A everywhere.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy.optimize import nnls

__all__ = [
    "LOG_2",
    "arcsinh_ratio",
    "duality_gap",
    "exp_sinh",
    "exp_sinh_cosh",
    "kkt_residual",
    "nonnegative_least_squares",
    "outside_cone",
    "shared_sinh_cosh",
]

LOG_2 = math.log(2.0)
# arcsinh z = log 2z + 1/(4 z^2) - ...: at z = e^18.4 = 1e8 the second term is 2.5e-17.
FAR = 18.4  # log(|x|/A) from which arcsinh(x/A) = log(2|x|/A) to rounding


def exp_sinh(log_A: Any, t: Any) -> Any:
    """Return A sinh(t), an array or tensor like ``t``, accurate near t = 0 as well."""
    sign, half, fall = _exponentials(log_A, t)
    return -sign * half * fall  # (A/2) (e^|t| - e^-|t|)


def exp_sinh_cosh(log_A: Any, t: Any) -> tuple[Any, Any]:
    """Return A sinh(t) and its derivative A cosh(t)."""
    sign, half, fall = _exponentials(log_A, t)
    return -sign * half * fall, half * (2 + fall)  # (A/2) (e^|t| -+ e^-|t|)


def shared_sinh_cosh(log_A: Any, t: Any) -> tuple[Any, Any]:
    """Return A sinh(t) and A cosh(t) for arrays t (K, d) and log A (K, 1) that rows share.

    One exponential for each entry, since A e^-t = A^2 / (A e^t); x is right to an eps of A + |x|,
    in the precision of t.
    """
    log_half = log_A - np.asarray(LOG_2, dtype=t.dtype)  # log(A/2)
    large = np.abs(t)
    large += log_half
    np.exp(large, out=large)  # (A/2) e^|t|
    small = np.maximum(large, np.finfo(t.dtype).tiny)  # not 0, where all of x underflows
    np.divide(np.exp(2 * log_half), small, out=small)  # (A/2) e^-|t| = (A/2)^2 / ((A/2) e^|t|)
    x = large - small  # A sinh |t|
    large += small  # A cosh t
    return np.copysign(x, t, out=x), large


def _exponentials(log_A: Any, t: Any) -> tuple[Any, Any, Any]:
    """Return the sign of t, (A/2) e^|t|, and e^{-2|t|} - 1.

    The sign is +-1 also at t = 0, and constant: |t| = sign * t then has all derivatives of a smooth
    branch, and those of A sinh(t) are right at 0.
    """
    xp = _module(t)
    sign = xp.copysign(xp.ones_like(t), t)
    size = sign * t
    half = xp.exp(log_A - LOG_2 + size)  # never e^|t| alone: it may overflow
    return sign, half, xp.expm1(-2 * size)  # expm1 keeps the digits of sinh near t = 0


def arcsinh_ratio(x: Any, log_A: Any) -> Any:
    """Return arcsinh(x/A): in logarithms for |x|/A > 1e8, where the derivative may overflow."""
    xp = _module(x)
    log_A = log_A + xp.zeros_like(x)
    size = xp.abs(x)
    big = (size > 0) & (xp.log(xp.where(size > 0, size, 1.0)) - log_A > FAR)
    # Both branches are made finite before `where`, so that neither spoils the other's gradient.
    small_x, safe_log = xp.where(big, 0.0, x), xp.where(big, 0.0, log_A)
    lowest = 1 - math.log(float(xp.finfo(log_A.dtype).max))  # e^-lowest is finite
    # 1/A overflows before x/A does: in two halves; the derivative at x = 0 is clipped.
    least = xp.where(small_x == 0, 0.5 * lowest, lowest)
    root = xp.exp(-xp.maximum(0.5 * safe_log, least))  # 1 / sqrt(A)
    near = xp.arcsinh(small_x * root * root)
    far = xp.sign(x) * (LOG_2 + xp.log(xp.where(big, size, 1.0)) - log_A)  # sign(x) log(2|x|/A)
    return xp.where(big, far, near)


def kkt_residual(mirror: Any, mu: Any, held: Any) -> float:
    """Return max |grad R_a(x) - mu| over the coordinates ``held``: 0 where x is optimal."""
    error = abs(mirror - mu)[held]
    return float(error.max()) if len(error) else 0.0


def duality_gap(norm: float, gain: float, ceiling: float) -> float:
    """Return the part of |x| by which x may exceed the smallest norm of a solution, in [0, 1].

    Every solution of Zx = y has norm >= <theta, y> / ceiling, where ceiling = sup <Z^T theta, x>
    over x of norm 1. A ``ceiling`` <= 0 proves nothing.

    Parameters
    ----------
    norm : float
        |x|.
    gain : float
        <theta, y>.
    ceiling : float
        The dual norm of Z^T theta.
    """
    if norm == 0:
        return 0.0
    # <theta, y> = <Z^T theta, x> <= ceiling |x| for every x with Zx = y: a lower bound of |x|.
    least = gain / ceiling if ceiling > 0 else 0.0
    return min(1.0, max(0.0, 1 - least / norm))


def nonnegative_least_squares(A: Any, b: Any) -> Any:
    """Return the x >= 0 of least |Ax - b|, arrays; SciPy's crashes without rows or columns."""
    if 0 in A.shape:
        return np.zeros(A.shape[1])
    return nnls(A, b, maxiter=max(100, 10 * A.shape[1]))[0]


def outside_cone(A: Any, b: Any, apart: float) -> bool:
    """Return whether b is farther than ``apart`` from the cone of A's columns (Farkas)."""
    return float(np.linalg.norm(A @ nonnegative_least_squares(A, b) - b)) > apart


def _module(value: Any) -> Any:
    """Return numpy or torch, whichever computes with ``value``."""
    if isinstance(value, np.ndarray | np.generic):
        return np
    import torch  # late: the estimators use these formulas without torch

    return torch
