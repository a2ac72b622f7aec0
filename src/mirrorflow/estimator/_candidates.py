"""The candidates of a cross-validation, and whether they were enough."""

from __future__ import annotations

import warnings
from numbers import Integral
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._base import LOG_A

__all__ = ["scales", "thresholds", "times", "warn_at_the_last_time"]

Array = NDArray[np.float64]
FALLING = 0.2  # an error that falls faster than t to the minus this has not reached its least
FITTED = 1e-3  # of the variance of y: what is left over when a fit has nothing to gain
ZERO_TOLS = np.geomspace(1e-3, 0.7, 25)


def _numbers(name: str, values: Any) -> Array:
    """Return a non-empty vector of finite numbers."""
    found = np.atleast_1d(np.asarray(values, dtype=np.float64))
    if found.ndim != 1 or found.size == 0 or not np.isfinite(found).all():
        raise ValueError(f"{name} must be a non-empty 1-d sequence of numbers, got {values!r}")
    return found


def scales(values: Any) -> Array:
    """Return the candidates for log_A."""
    found = _numbers("log_As", values)
    if not (found.min() >= LOG_A[0] and found.max() <= LOG_A[1]):
        raise ValueError(f"log_As must be between {LOG_A[0]} and {LOG_A[1]}, got {values!r}")
    return found


def times(values: Any) -> Array:
    """Return the candidates for t, increasing."""
    if isinstance(values, Integral):
        if values < 1:
            raise ValueError(f"ts must be a number of times >= 1, or the times, got {values!r}")
        return np.geomspace(0.3, 30, int(values))
    found = np.sort(_numbers("ts", values))
    if not found[0] > 0:
        raise ValueError(f"ts must be > 0, got {values!r}")
    return found


def thresholds(values: Any) -> Array:
    """Return the candidates for zero_tol, increasing."""
    if values is None:
        return ZERO_TOLS
    found = np.sort(_numbers("zero_tols", values))
    if not (found[0] >= 0 and found[-1] < 1):
        raise ValueError(f"zero_tols must be >= 0 and < 1, got {values!r}")
    return found


def warn_at_the_last_time(errors: Array, ts: Array, spread: float) -> None:
    """Warn where the error is still large at the last time, and falling."""
    if len(ts) < 2 or errors.argmin() < len(ts) - 1 or errors[-1] < FITTED * spread:
        return
    if errors[-1] * ts[-1] ** FALLING < errors[-2] * ts[-2] ** FALLING:
        warnings.warn(
            f"the error is still falling at the largest t, {ts[-1]:g}: columns of X on a common "
            "scale (StandardScaler) grow together; otherwise give larger ts",
            UserWarning,
            stacklevel=5,
        )
