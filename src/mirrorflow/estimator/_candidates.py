"""The candidates of a model choice, whether they were enough, and criteria of information."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln

from ._base import LOG_A, Zeros, nearly_best
from ._data import Data
from ._folds import Folds
from ._ridge import decomposes

__all__ = [
    "CRITERIA",
    "NETS",
    "Informed",
    "Linear",
    "flows",
    "informed",
    "penalties",
    "ratios",
    "scales",
    "thresholds",
    "times",
    "warn_at_the_last_time",
    "without_flow",
]

Array = NDArray[np.float64]
FALLING = 0.2  # an error that falls faster than t to the minus this has not reached its least
FITTED = 1e-3  # of the variance of y: what is left over when a fit has nothing to gain
RATIOS = (0.02, 0.2)  # of elastic nets; near 1 is a flow whose decay is kept
NETS = np.geomspace(1.0, 1e-2, 18)[1:]  # of the smallest penalty that leaves nothing
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
    """Return log A and shrinkage of each flow; those that shrink start from the largest log A."""
    found = scales(log_As)
    shrunk = np.asarray(shrinkages, dtype=np.float64)
    if shrunk.ndim != 1 or not ((shrunk > 0) & (shrunk < 1)).all():
        raise ValueError(f"shrinkages must be > 0 and < 1, got {shrinkages!r}. Use () for none")
    if decay and shrunk.size:
        raise ValueError(f"shrinkages must be () with decay, got {shrinkages!r}")
    start = np.full(len(shrunk), found.max())
    return np.r_[found, start], np.r_[np.zeros(len(found)), shrunk]


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


def ratios(values: Any, offered: bool) -> Array:
    """Return the l1 ratios of elastic nets; none where they are not offered."""
    if values is None:
        return np.array(RATIOS if offered else ())
    given = np.asarray(values, dtype=np.float64)
    if given.ndim != 1 or not ((given > 0) & (given < 1)).all():
        raise ValueError(f"l1_ratios must be > 0 and < 1, got {values!r}. Use () for none")
    if given.size and not offered:
        raise ValueError(f"l1_ratios must be () with decay or a criterion, got {values!r}")
    return given


@dataclass(frozen=True)
class Linear:
    """Ridge regression with a penalty, or an elastic net with an l1 ratio too: what was chosen."""

    kind: str
    penalty: float
    ratio: float = 0.0


def without_flow(
    ridges: Array, ridge_errors: Array, l1_ratios: Array, net_errors: Array,
    flows: list[Array], alone: Array, spread: float,
) -> Linear | None:  # fmt: skip
    """Return ridge regression or an elastic net where it is the better choice, else None.

    ``flows`` are the errors (n_candidates, n_folds) of flows, ``alone`` (n_folds,) those of the
    intercept. Ridge regression must have less error than all of them. For an elastic net, which has
    zeros as well, it is enough to be near the best flow, and better than the intercept: where many
    flows were tried, one that is better by a hair is so by chance. This rule and the l1 ratios were
    chosen on draws of the sparse study with seeds 200 to 203, which it does not report.
    """
    rows = np.concatenate([*flows, alone[None]])
    best = rows[rows.mean(axis=1).argmin()]
    # Data without noise are fitted exactly by any small penalty, with no zeros: where a flow leaves
    # next to nothing of the variance, it keeps its zeros.
    linear = np.concatenate([ridge_errors, net_errors.reshape(-1, len(best))])
    if best.mean() < FITTED * spread or not len(linear):
        return None
    i = int(linear.mean(axis=1).argmin())
    if i < len(ridges):
        return Linear("ridge", float(ridges[i])) if linear[i].mean() < best.mean() else None
    near = nearly_best(np.stack([linear[i], best]))[0]
    if not near or linear[i].mean() >= alone.mean():
        return None
    which, penalty = divmod(i - len(ridges), len(NETS))
    return Linear("elastic net", float(NETS[penalty]), float(l1_ratios[which]))


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
