"""The flows of all folds and targets at once, and their errors on what was left out."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning

from .columns import Columns, integrate
from .data import Data
from .linear import TurnOff
from .zeros import least_squares, without_small

__all__ = ["Folds"]

Array = NDArray[np.float64]


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
    """

    data: Data
    train: Array
    test: Array
    decay: TurnOff | None
    positive: bool
    tol: float
    max_iter: int

    def errors(self, log_As: Array, shrinkages: Array, ts: Array) -> Array:
        """Give the errors (n_flows, n_ts, n_folds), the mean over the targets."""
        targets = range(self.data.y.shape[1])
        return np.mean([self._target(k, log_As, shrinkages, ts) for k in targets], axis=0)

    def zero_errors(
        self, log_A: float, shrinkage: float, t: float, zero_tols: Array, refit: bool
    ) -> Array:
        """Give the errors (n_tols, n_folds) of one flow whose small coefficients are set to 0."""
        targets = range(self.data.y.shape[1])
        found = [self._thresholded(k, log_A, shrinkage, t, zero_tols, refit) for k in targets]
        return np.mean(found, axis=0)

    def _target(self, k: int, log_As: Array, shrinkages: Array, ts: Array) -> Array:
        """Give the errors of one target."""
        count, folds = len(log_As), self.train.shape[1]
        found = np.full((count * folds, len(ts)), np.inf)
        if not self.data.pull[k] > 0:  # a constant target: its mean fits
            zeros = np.zeros((len(self.train), folds))
            found[:] = np.tile(self._error(k, zeros, np.arange(folds)), count)[:, None]
        else:

            def save(column: Any, index: Any, _: Array, x: Array, __: Array) -> None:
                found[column, index] = self._error(k, self.data.X @ x, column % folds)

            columns, unit = self._columns(k, log_As, shrinkages)
            reached, _ = integrate(columns, unit * ts, save, self.tol, self.max_iter)
            late = np.arange(len(ts)) >= reached[:, None]
            found[late] = np.inf
            _warn_unfinished(late, self.max_iter)
        return found.reshape(count, folds, len(ts)).transpose(0, 2, 1)

    def _thresholded(
        self, k: int, log_A: float, shrinkage: float, t: float, zero_tols: Array, refit: bool
    ) -> Array:
        """Give the errors of one target for each threshold and fold."""
        coefs = np.zeros((self.data.X.shape[1], self.train.shape[1]))
        if self.data.pull[k] > 0:

            def save(column: Any, _: Any, __: Array, x: Array, ___: Array) -> None:
                coefs[:, column] = x

            columns, unit = self._columns(k, np.array([log_A]), np.array([shrinkage]))
            integrate(columns, unit * t, save, self.tol, self.max_iter)
        found = np.empty((len(zero_tols), len(coefs.T)))
        for f, coef in enumerate(coefs.T):
            rows = without_small(np.tile(coef, (len(zero_tols), 1)), zero_tols[:, None])
            if refit:
                rows = self._refitted(k, rows != 0, self.train[:, f])
            found[:, f] = self._error(k, self.data.X @ rows.T, np.full(len(rows), f))
        return found

    def _refitted(self, k: int, supports: NDArray[np.bool_], weights: Array) -> Array:
        """Fit on each of the nested supports, on equal ones once."""
        _, first, back = np.unique(supports.sum(axis=1), return_index=True, return_inverse=True)
        fitted = [least_squares(self.data, k, supports[i], weights) for i in first]
        return np.stack(fitted)[back]

    def _error(self, k: int, predictions: Array, fold: NDArray[np.intp]) -> Array:
        """Give the error of each column of predictions, with the intercept of its training part.

        With several targets it is relative to the variance of this one.
        """
        missed = self.data.y[:, [k]] - predictions
        if self.data.center:
            missed -= (self.train[:, fold] * missed).sum(axis=0)
        return (self.test[:, fold] * missed**2).sum(axis=0) / self._units[k]

    @cached_property
    def _units(self) -> Array:
        """Give the units of the errors: the variances of several targets, as far as they vary."""
        y, weights = self.data.y, self.data.weights
        variances = weights @ (y - weights @ y) ** 2
        return np.where((variances > 0) & (y.shape[1] > 1), variances, 1.0)

    def _columns(self, k: int, log_As: Array, shrinkages: Array) -> tuple[Columns, Array]:
        """Give the flows of one target, folds running fastest, and their units of time (., 1)."""
        count, folds = len(log_As), self.train.shape[1]
        units = np.array([self.data.unit(z, self.positive)[k] for z in log_As])
        decay = self.decay or TurnOff(0.0, 1.0)
        stays = shrinkages > 0
        rates = np.where(stays, shrinkages * self.data.pull[k], decay.alpha / units)
        offs = np.where(stays, np.inf, decay.t * units)
        columns = Columns(
            self.data.X,
            np.tile(self.data.y[:, [k]], (1, count * folds)),
            np.tile(self.train, (1, count)),
            np.repeat([self.data.log_A(z)[k] for z in log_As], folds),
            np.repeat(rates, folds),
            np.repeat(offs, folds),
            self.data.center,
            self.positive,
        )
        return columns, np.repeat(units, folds)[:, None]


def _warn_unfinished(late: NDArray[Any], max_iter: int) -> None:
    """Warn that candidates are left out because the steps did not reach them."""
    if late.any():
        warnings.warn(
            f"{late.sum()} of {late.size} flows have not reached their time in max_iter={max_iter} "
            "steps and are left out; increase max_iter, or give smaller ts",
            ConvergenceWarning,
            stacklevel=6,
        )
