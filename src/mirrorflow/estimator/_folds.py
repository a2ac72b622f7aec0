"""The flows of all folds and targets at once, and their errors on what was left out."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from joblib import effective_n_jobs
from numpy.typing import NDArray
from scipy.sparse import issparse
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.parallel import Parallel, delayed

from .._threads import one_thread
from ._base import Decay, least_squares, rate_and_end, without_small
from ._chebyshev import BatchedFlows, Saved, integrate
from ._data import Data, centered, triangle

__all__ = ["Folds"]

KEPT = 2**22  # numbers of dual variables up to which they are kept: 32 MB
Array = NDArray[np.float64]
Index = NDArray[np.intp]


@dataclass(frozen=True)
class _Part:
    """Folds whose flows share the products with X.

    Attributes
    ----------
    X, y, train : arrays of shape (n, d), (n, K), (n, number of folds)
        What they are trained on; the weights of each fold sum to 1.
    center : bool
        Whether each fold has means of its own to subtract.
    error : callable
        Gives, of coefficients (d, c) for target k and these folds, the squared errors (c,) on what
        was left out.
    """

    X: Any
    y: Array
    train: Array
    center: bool
    error: Callable[[Array, int, Index], Array]


@dataclass(frozen=True)
class Folds:
    """The problems of a cross-validation.

    Attributes
    ----------
    data : Data
        All samples, in whose units scales and times are.
    train, test : arrays of shape (n, n_folds)
        The weight of each row in the training and in the test part; columns sum to 1.
    decay, positive, tol, max_iter
        As for `MirrorFlowRegressorCV`.
    duals : dict
        The dual variables (n, n_ts, folds) of flows that have been integrated, by part, target and
        flow, as far as they are few numbers.
    """

    data: Data
    train: Array
    test: Array
    decay: Decay
    positive: bool
    tol: float
    max_iter: int
    duals: dict[Any, Any] = field(default_factory=dict)

    def errors(self, log_A: float, shrinkage: float, ts: Array) -> Array:
        """Return the errors (n_ts, n_folds) of one flow, the mean over the targets.

        Flows are integrated one by one, and with one thread, so that neither the other candidates
        nor the way in which the work is shared out can change a bit.
        """
        targets, parts = range(self.data.y.shape[1]), range(len(self.parts))
        with one_thread():
            found = [[self._errors(p, k, log_A, shrinkage, ts) for p in parts] for k in targets]
        return np.mean([np.concatenate(errors, axis=1) for errors in found], axis=0)

    def all_errors(self, log_As: Array, shrinkages: Array, ts: Array, n_jobs: Any) -> Array:
        """Return the errors (n_flows, n_ts, n_folds), the work shared out by flows."""
        flows = zip(log_As.tolist(), shrinkages.tolist(), strict=True)
        if effective_n_jobs(n_jobs) == 1:  # None asks joblib's context
            found = [self.errors(*flow, ts) for flow in flows]
        else:
            run = delayed(self.errors)
            shared: Any = Parallel(n_jobs=n_jobs)(run(*flow, ts) for flow in flows)
            found = list(shared)
        errors = np.stack(found)
        _warn_unfinished(np.isinf(errors), self.max_iter)
        return errors

    def zero_errors(
        self, log_A: float, shrinkage: float, ts: Array, j: int, zero_tols: Array, refit: bool
    ) -> list[Array]:
        """Return the errors (n_tols, n_folds) of one flow whose small coefficients are set to 0.

        With ``refit`` twice: as the flow leaves the others, and refitted.
        """
        ways = (False, True) if refit else (False,)
        found: list[list[Array]] = [[] for _ in ways]
        for k in range(self.data.y.shape[1]):
            parts = range(len(self.parts))
            coefs = [self._coefs(p, k, log_A, shrinkage, ts, j) for p in parts]
            rows = np.concatenate(coefs, axis=1).T
            for way, errors in zip(ways, found, strict=True):
                each = [self._thresholded(c, k, f, zero_tols, way) for f, c in enumerate(rows)]
                errors.append(np.stack(each, axis=1))
        return [np.mean(errors, axis=0) for errors in found]

    def intercept_errors(self) -> Array:
        """Return the errors (n_folds,) of the intercept alone."""
        zero, folds = np.zeros((self.data.X.shape[1], 1)), range(self.train.shape[1])
        found = [
            [self._missed(zero, k, np.array([f]))[0] / self._units[k] for f in folds]
            for k in range(self.data.y.shape[1])
        ]
        return np.mean(found, axis=0)

    @cached_property
    def parts(self) -> list[_Part]:
        """The folds: all together, or each by itself where its rows can be made few."""
        (n, d), K = self.data.X.shape, self.data.y.shape[1]
        if issparse(self.data.X) or n <= 2 * (d + K):
            return [_Part(self.data.X, self.data.y, self.train, self.data.center, self._missed)]
        return [self._compressed(f) for f in range(self.train.shape[1])]

    def _missed(self, x: Array, k: int, fold: Index) -> Array:
        """Return the squared errors, with the intercept of the training part."""
        missed = self.data.y[:, [k]] - self.data.X @ x
        if self.data.center:
            missed -= (self.train[:, fold] * missed).sum(axis=0)
        return (self.test[:, fold] * missed**2).sum(axis=0)

    def _compressed(self, f: int) -> _Part:
        """Return a fold as few rows: its flow and its errors depend on triangular factors alone."""
        X, y, train = self.data.X, self.data.y, self.train[:, f]
        if self.data.center:
            (X, means), (y, offsets) = centered(X, train), centered(y, train)
            test = triangle(self.data.X - means, self.data.y - offsets, self.test[:, f])
        else:
            test = triangle(X, y, self.test[:, f])
        few, targets = triangle(X, y, train)
        size = np.sqrt(len(few))

        def error(x: Array, k: int, _: Index) -> Array:
            return ((test[0] @ x - test[1][:, [k]]) ** 2).sum(axis=0)

        return _Part(size * few, size * targets, np.full((len(few), 1), size**-2), False, error)

    def _errors(self, p: int, k: int, log_A: float, shrinkage: float, ts: Array) -> Array:
        """Return the errors (n_ts, folds of the part) of one target."""
        part = self.parts[p]
        found = np.full((len(ts), part.train.shape[1]), np.inf)
        kept = found.size * len(part.y) <= KEPT
        duals = np.zeros((len(part.y) if kept else 0, *found.shape))

        def save(fold: Index, index: Index, nu: Array, x: Array, _: Array) -> None:
            found[index, fold] = part.error(x, k, fold) / self._units[k]
            if kept:
                duals[:, index, fold] = nu

        reached = self._run(part, k, log_A, shrinkage, ts, save)
        found[np.arange(len(ts))[:, None] >= reached] = np.inf
        if kept:
            self.duals[p, k, log_A, shrinkage] = duals
        return found

    def _coefs(self, p: int, k: int, log_A: float, shrinkage: float, ts: Array, j: int) -> Array:
        """Return the coefficients (d, folds of the part) of one flow at its j-th time."""
        part, known = self.parts[p], self.duals.get((p, k, log_A, shrinkage))
        folds = part.train.shape[1]
        if not self.data.pull[k] > 0:
            return np.zeros((part.X.shape[1], folds))
        nus = np.zeros((len(part.y), folds))

        def save(fold: Index, index: Index, nu: Array, _: Array, __: Array) -> None:
            if index[0] == j:
                nus[:, fold] = nu

        if known is None:  # the same steps as before
            self._run(part, k, log_A, shrinkage, ts, save)
        else:
            nus = np.ascontiguousarray(known[:, j])
        flows, unit = self._flows(part, k, log_A, shrinkage)
        return flows.primal(nus, np.full(folds, unit * ts[j]))[0]

    def _run(
        self, part: _Part, k: int, log_A: float, shrinkage: float, ts: Array, save: Saved
    ) -> Index:
        """Integrate a flow on the folds of a part; return how many times each has reached."""
        folds = part.train.shape[1]
        if not self.data.pull[k] > 0:  # a constant target: all coefficients stay 0
            nu, x = (np.zeros((size, 1)) for size in part.X.shape)
            for fold, index in np.ndindex(folds, len(ts)):
                save(np.array([fold]), np.array([index]), nu, x, np.zeros(1))
            return np.full(folds, len(ts))
        flows, unit = self._flows(part, k, log_A, shrinkage)
        return integrate(flows, np.tile(unit * ts, (folds, 1)), save, self.tol, self.max_iter)[0]

    def _flows(
        self, part: _Part, k: int, log_A: float, shrinkage: float
    ) -> tuple[BatchedFlows, float]:
        """Return a flow on the folds of a part, one column each, and its unit of time."""
        unit, one = float(self.data.unit(log_A, self.positive)[k]), np.ones(part.train.shape[1])
        rate, end = rate_and_end(self.decay)
        stays = shrinkage > 0
        flows = BatchedFlows(
            part.X,
            np.tile(part.y[:, [k]], (1, len(one))),
            part.train,
            self.data.log_A(log_A)[k] * one,
            (shrinkage * self.data.pull[k] if stays else rate / unit) * one,
            (np.inf if stays else end * unit) * one,
            part.center,
            self.positive,
        )
        return flows, unit

    def _thresholded(self, coef: Array, k: int, f: int, zero_tols: Array, refit: bool) -> Array:
        """Return the errors (n_tols,) of coefficients (d,) of fold f without the small ones."""
        rows = without_small(np.tile(coef, (len(zero_tols), 1)), zero_tols[:, None])
        if refit:
            rows = self._refitted(k, rows != 0, self.train[:, f])
        part = self.parts[0] if len(self.parts) == 1 else self.parts[f]
        return part.error(rows.T, k, np.full(len(rows), f)) / self._units[k]

    def _refitted(self, k: int, supports: NDArray[np.bool_], weights: Array) -> Array:
        """Fit on each of the nested supports, on equal ones once."""
        _, first, back = np.unique(supports.sum(axis=1), return_index=True, return_inverse=True)
        fitted = [least_squares(self.data, k, supports[i], weights) for i in first]
        return np.stack(fitted)[back]

    @property
    def spread(self) -> float:
        """The variance of the targets in the units of the errors."""
        y, weights = self.data.y, self.data.weights
        return float((weights @ y**2 / self._units).mean())

    @cached_property
    def _units(self) -> Array:
        """The units of the errors: the variances of several targets, as far as they vary."""
        y, weights = self.data.y, self.data.weights
        variances = weights @ (y - weights @ y) ** 2
        return np.where((variances > 0) & (y.shape[1] > 1), variances, 1.0)


def _warn_unfinished(late: NDArray[Any], max_iter: int) -> None:
    """Warn that candidates are left out because the steps did not reach them."""
    if late.any():
        warnings.warn(
            f"{late.sum()} of {late.size} candidates (flow, time and fold) have not been reached "
            f"in max_iter={max_iter} steps and are left out; increase max_iter, give smaller ts, "
            "or bring the columns of X to a common scale (StandardScaler)",
            ConvergenceWarning,
            stacklevel=5,
        )
