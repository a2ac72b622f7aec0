"""The candidates of a model choice, whether they were enough, and criteria of information."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln

from ._base import LOG_A, Zeros
from ._data import Data
from ._folds import Folds
from ._ridge import decomposes

__all__ = [
    "CRITERIA",
    "Informed",
    "better_ridge",
    "flows",
    "informed",
    "penalties",
    "scales",
    "thresholds",
    "times",
    "warn_at_the_last_time",
]

Array = NDArray[np.float64]
FALLING = 0.2  # an error that falls faster than t to the minus this has not reached its least
FITTED = 1e-3  # of the variance of y: what is left over when a fit has nothing to gain
SHRUNK = (0.05, 0.2)  # between none and all of the lasso's shrinkage
RIDGES = np.geomspace(10.0, 1e-7, 33)  # of the sum of the mean squares of the columns
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


def flows(log_As: Any, shrinkages: Any, decay: Any) -> tuple[Array, Array]:
    """Return log A and shrinkage of each flow; those that shrink start from the largest log A.

    Chosen on draws of the sparse study with seeds 100 to 103, which it does not report: with ridge
    regression these defaults predict, in the mean, within 0.01 R^2 of twice as many scales.
    """
    found, shrunk = scales(log_As), _shrunken(shrinkages, decay)
    start = np.full(len(shrunk), found.max())
    return np.r_[found, start], np.r_[np.zeros(len(found)), shrunk]


def _shrunken(values: Any, decay: Any) -> Array:
    """Return the shrinkages of flows whose decay stays on; none by default where there is decay."""
    given = (() if decay else SHRUNK) if values is None else values
    shrunk = np.asarray(given, dtype=np.float64)
    if shrunk.ndim != 1 or not ((shrunk > 0) & (shrunk < 1)).all():
        raise ValueError(f"shrinkages must be > 0 and < 1, got {given!r}. Use () for none")
    if decay and shrunk.size:
        raise ValueError(f"shrinkages must be None or () with decay, got {given!r}")
    return shrunk


def penalties(values: Any, offered: bool, data: Data) -> Array:
    """Return the penalties of ridge regression, decreasing; none where it is not offered."""
    offered = offered and decomposes(data)
    if values is None:
        return RIDGES if offered else RIDGES[:0]
    given = np.asarray(values, dtype=np.float64)
    if given.ndim != 1 or not ((given > 0) & (given < np.inf)).all():
        raise ValueError(f"ridges must be numbers > 0, got {values!r}")
    if given.size and not offered:
        raise ValueError(
            "ridges must be () with positive=True, decay, a criterion or a large sparse X, "
            f"got {values!r}"
        )
    return -np.sort(-given)


def better_ridge(ridges: Array, errors: Array, others: list[Array], spread: float) -> float | None:
    """Return the penalty of least mean error, where that is less than all others have.

    Data without noise are fitted exactly by any small penalty, with no zeros: where a flow leaves
    next to nothing of the variance ``spread``, it keeps its zeros.
    """
    mean = errors.mean(axis=1)
    least = min(float(other.mean(axis=1).min()) for other in others)
    if least < FITTED * spread:
        return None
    return float(ridges[mean.argmin()]) if mean.min(initial=np.inf) < least else None


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


# Criteria of information: what a coefficient has to bring in fit, instead of held-out samples.

CRITERIA = ("cv", "bic", "ebic")
SATURATED = 0.5  # coefficients for each sample from which a fit says nothing about the noise
EXACT = 1e-12  # of the variance of y: errors below it count as this


@dataclass(frozen=True)
class Informed:
    """The choice by a criterion: flow, time and zeros, and the criterion of all candidates.

    ``path`` is (n_flows, n_ts, n_tols), the better of refitted and not.
    """

    i: int
    j: int
    zeros: Zeros
    path: Array


def informed(
    folds: Folds,
    log_As: Array,
    shrinkages: Array,
    ts: Array,
    zero_tols: Array,
    refit: bool,
    criterion: str,
) -> Informed:
    """Return the candidate of least criterion; ``folds`` has one, of all samples.

    Where the intercept alone has less, the threshold is infinite. Of equal ones the first counts.
    """
    if folds.data.y.shape[1] > 1:
        raise ValueError(
            f"y must be one target with criterion={criterion!r}, got {folds.data.y.shape[1]}. Fit "
            "a model to each, or take criterion='cv'"
        )
    extended = criterion == "ebic"
    ways = (False, True) if refit else (False,)
    path = np.empty((len(log_As), len(ts), len(ways), len(zero_tols)))
    for i, flow in enumerate(zip(log_As.tolist(), shrinkages.tolist(), strict=True)):
        for j in range(len(ts)):
            errors = folds.zero_errors(*flow, ts, j, zero_tols, refit)
            sizes = folds.sizes(*flow, ts, j, zero_tols)
            path[i, j] = [_information(e[:, 0], sizes, folds, extended) for e in errors]
    i, j, way, k = (int(v) for v in np.unravel_index(path.argmin(), path.shape))
    alone = _information(folds.intercept_errors(), np.zeros(1), folds, extended)[0]
    chosen = Zeros(float(zero_tols[k]), ways[way])
    if alone <= path[i, j, way, k]:
        chosen = Zeros(np.inf, False)
    return Informed(i, j, chosen, path.min(axis=2))


def _information(errors: Array, sizes: Array, folds: Folds, extended: bool) -> Array:
    """Return n log(error) + k log n, extended by 2 log(d over k): the choice among d features."""
    n, d = folds.data.X.shape
    fit = n * np.log(np.maximum(errors, EXACT * folds.spread))
    found = fit + sizes * np.log(n)
    if extended:
        found += 2 * (gammaln(d + 1) - gammaln(sizes + 1) - gammaln(d - sizes + 1))
    return np.where(sizes > SATURATED * n, np.inf, found)
