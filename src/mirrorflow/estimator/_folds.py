"""The flows of all folds and targets at once, and their errors on what was left out."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import issparse
from sklearn.exceptions import ConvergenceWarning

from ._base import TurnOff, least_squares, without_small
from ._chebyshev import Columns, Saved, integrate
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
        The dual variables of flows that have been integrated, as far as they are few numbers.
    """

    data: Data
    train: Array
    test: Array
    decay: TurnOff | None
    positive: bool
    tol: float
    max_iter: int
    duals: dict[Any, Any] = field(default_factory=dict)

    def errors(self, log_As: Array, shrinkages: Array, ts: Array) -> Array:
        """Return the errors (n_flows, n_ts, n_folds), the mean over the targets."""
        targets = range(self.data.y.shape[1])
        found = [
            [self._errors(part, k, log_As, shrinkages, ts) for part in self.parts] for k in targets
        ]
        reached = np.mean([np.concatenate(parts, axis=2) for parts in found], axis=0)
        _warn_unfinished(np.isinf(reached), self.max_iter)
        return reached

    def zero_errors(
        self, log_A: float, shrinkage: float, t: float, zero_tols: Array, refit: bool
    ) -> Array:
        """Return the errors (n_tols, n_folds) of one flow whose small coefficients are set to 0."""
        found = []
        for k in range(self.data.y.shape[1]):
            parts = [self._coefs(part, k, log_A, shrinkage, t) for part in self.parts]
            coefs = np.concatenate(parts, axis=1).T
            errors = [self._thresholded(c, k, f, zero_tols, refit) for f, c in enumerate(coefs)]
            found.append(np.stack(errors, axis=1))
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

    def _errors(self, part: _Part, k: int, log_As: Array, shrinkages: Array, ts: Array) -> Array:
        """Return the errors (n_flows, n_ts, folds of the part) of one target."""
        count, folds = len(log_As), part.train.shape[1]
        found = np.full((count * folds, len(ts)), np.inf)
        few = found.size * len(part.y) <= KEPT
        duals = np.zeros((len(part.y), *found.shape)) if few else None

        def save(column: Index, index: Index, nu: Array, x: Array, _: Array) -> None:
            found[column, index] = part.error(x, k, column % folds) / self._units[k]
            if duals is not None:
                duals[:, column, index] = nu

        reached = self._run(part, k, log_As, shrinkages, ts, save)
        found[np.arange(len(ts)) >= reached[:, None]] = np.inf
        if duals is not None:
            kept = duals.reshape(len(part.y), count, folds, len(ts))
            for i, flow in enumerate(zip(log_As.tolist(), shrinkages.tolist(), strict=True)):
                self.duals[id(part), k, flow] = ts.tolist(), kept[:, i]
        return found.reshape(count, folds, len(ts)).transpose(0, 2, 1)

    def _coefs(self, part: _Part, k: int, log_A: float, shrinkage: float, t: float) -> Array:
        """Return the coefficients (d, folds of the part) of one flow at one time."""
        coefs = np.zeros((part.X.shape[1], part.train.shape[1]))
        one, known = (np.array([log_A]), np.array([shrinkage])), (id(part), k, (log_A, shrinkage))
        if self.data.pull[k] > 0 and known in self.duals:
            ts, kept = self.duals[known]
            columns, unit = self._columns(part, k, *one, coefs.shape[1])
            return columns.primal(kept[..., ts.index(t)], unit[:, 0] * t)[0]

        def save(column: Index, _: Index, __: Array, x: Array, ___: Array) -> None:
            coefs[:, column] = x

        self._run(part, k, *one, np.array([t]), save)
        return coefs

    def _run(
        self, part: _Part, k: int, log_As: Array, shrinkages: Array, ts: Array, save: Saved
    ) -> Index:
        """Integrate the flows of a part, folds running fastest; say how many times are reached."""
        count, folds = len(log_As) * part.train.shape[1], part.train.shape[1]
        if not self.data.pull[k] > 0:  # a constant target: all coefficients stay 0
            column, index = (i.ravel() for i in np.indices((count, len(ts))))
            nu, x = (np.zeros((size, len(column))) for size in part.X.shape)
            save(column, index, nu, x, np.zeros(0))
            return np.full(count, len(ts))
        columns, unit = self._columns(part, k, log_As, shrinkages, folds)
        return integrate(columns, unit * ts, save, self.tol, self.max_iter)[0]

    def _columns(
        self, part: _Part, k: int, log_As: Array, shrinkages: Array, folds: int
    ) -> tuple[Columns, Array]:
        """Return the flows, and their units of time (., 1)."""
        units = np.array([self.data.unit(z, self.positive)[k] for z in log_As])
        decay = self.decay or TurnOff(0.0, 1.0)
        stays = shrinkages > 0
        rates = np.where(stays, shrinkages * self.data.pull[k], decay.alpha / units)
        offs = np.where(stays, np.inf, decay.t * units)
        columns = Columns(
            part.X,
            np.tile(part.y[:, [k]], (1, len(log_As) * folds)),
            np.tile(part.train, (1, len(log_As))),
            np.repeat([self.data.log_A(z)[k] for z in log_As], folds),
            np.repeat(rates, folds),
            np.repeat(offs, folds),
            part.center,
            self.positive,
        )
        return columns, np.repeat(units, folds)[:, None]

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
