"""The training parts of all folds as problems that share their products, and their test errors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import issparse

from ._data import BLOCK, CONSTANT, Data
from ._flows import Flows, GramFlows, RowFlows, tall
from ._net import net_of_moments, net_path
from ._ridge import ridge_of_gram, ridge_path, ridge_unit

__all__ = ["FoldProblem", "fold_problem"]

Array = NDArray[Any]
GRAMS = 2**22  # numbers of Gram matrices that are always allowed: 32 MB
SINGLE = 1e-3  # tolerance from which products are formed in single precision


class FoldProblem(ABC):
    """The flows of the training parts of F folds, and errors on what was left out."""

    @abstractmethod
    def flows(self, k: int, log_A: float, rate: float, off: float) -> tuple[Flows, float]:
        """Return a flow of target k on each fold, and its unit of time.

        ``log_A`` is relative to the scale; the rate of decay and its end are in the units of time
        of the data, which the times of the flow are divided by.
        """

    @abstractmethod
    def size(self, k: int) -> float:
        """Return the unit of the flow's coefficients of target k."""

    @abstractmethod
    def error(self, x: Array, k: int, fold: int) -> Array:
        """Return the squared errors (...), with the fold's intercept, of the flow's x (..., d)."""

    @abstractmethod
    def ridge(self, fold: int, penalties: Array) -> Array:
        """Return the coefficients (K, n_penalties, d) of ridge regression on a training part.

        They are in the units of the flow's.
        """

    @abstractmethod
    def net(self, fold: int, ratio: float, penalties: Array, tol: float) -> Array:
        """Return the same of elastic nets, up to a duality gap of ``tol`` times |y|^2."""


def fold_problem(data: Data, train: Array, test: Array, positive: bool, tol: float) -> FoldProblem:
    """Return the problem of folds with weights (n, F): Gram matrices where X is tall, else rows."""
    (n, d), F = data.X.shape, train.shape[1]
    small = 2 * F * d * d <= max(n * d, GRAMS)
    if not issparse(data.X) and tall(n, d) and small:
        return _GramFolds.of(data, train, test, positive)
    return _RowFolds.of(data, train, test, positive, tol)


@dataclass(frozen=True)
class _RowFolds(FoldProblem):
    r"""Folds that share the products with X, in units in which all numbers are moderate.

    With X' = alpha X, y' = alpha y / S, x' = x / S and t' = t S / alpha^2,
    nu' = nu / alpha follows the flow of X' and y' from the scale A / S.

    Attributes
    ----------
    data : Data
        All samples.
    X : array or sparse matrix of shape (n, d)
        X', in single precision where the tolerance allows it: half the memory to be read.
    alpha : float
        What X was multiplied by.
    y : array of shape (K, n)
        y' of each target.
    scale : array of shape (K,)
        S of each target.
    train, test : arrays of shape (F, n)
        The weights.
    positive : bool
        As for the estimator.
    """

    data: Data
    X: Any
    alpha: float
    y: Array
    scale: Array
    train: Array
    test: Array
    positive: bool

    @classmethod
    def of(cls, data: Data, train: Array, test: Array, positive: bool, tol: float) -> _RowFolds:
        """Return the folds of weights (n, F)."""
        X, alpha, scale = data.X, 1.0, np.where(data.scale > 0, data.scale, 1.0)
        if not issparse(X) and tol >= SINGLE:
            largest = float((data.spreads / data.units).max(initial=0.0))
            alpha = 1 / largest if largest > 0 else 1.0
            X = np.multiply(X, alpha, out=np.empty(X.shape, np.float32), casting="same_kind")
        few = np.ascontiguousarray(train.T), np.ascontiguousarray(test.T)
        return cls(data, X, alpha, alpha * data.y.T / scale[:, None], scale, *few, positive)

    def flows(self, k: int, log_A: float, rate: float, off: float) -> tuple[Flows, float]:
        """Return the flows in nu."""
        one, unit = np.ones(len(self.train)), self.alpha**2 / float(self.scale[k])
        y = np.tile(self.y[k], (len(one), 1))
        flows = RowFlows(
            log_A * one, rate * unit * one, off / unit * one, self.positive,
            self.X, y, self.train, self.data.center,
        )  # fmt: skip
        return flows, unit

    def size(self, k: int) -> float:
        """Return S."""
        return float(self.scale[k])

    def error(self, x: Array, k: int, fold: int) -> Array:
        """Return the errors from the residuals of all rows."""
        missed = self.y[k] - x.astype(self.X.dtype) @ self.X.T
        if self.data.center:
            missed -= (missed @ self.train[fold])[..., None]
        missed *= missed
        # y' - X' x' = (alpha / S) (y - X x)
        return missed @ self.test[fold] * (float(self.scale[k]) / self.alpha) ** 2

    def ridge(self, fold: int, penalties: Array) -> Array:
        """Return the coefficients from the rows."""
        return ridge_path(self.data, self.train[fold], penalties) / self.scale[:, None, None]

    def net(self, fold: int, ratio: float, penalties: Array, tol: float) -> Array:
        """Return the coefficients from the rows."""
        weights, positive = self.train[fold], self.positive
        found = net_path(self.data, weights, ratio, penalties, positive, tol)
        return found / self.scale[:, None, None]


@dataclass(frozen=True)
class _GramFolds(FoldProblem):
    """Folds of tall data: flow and errors depend on sums over rows alone.

    Attributes
    ----------
    data : Data
        All samples.
    train, test : arrays of shape (F, d + K, d + K)
        The second moments of (X, y), about the means of the training part with an intercept.
    positive : bool
        As for the estimator.
    """

    data: Data
    train: Array
    test: Array
    positive: bool

    @classmethod
    def of(cls, data: Data, train: Array, test: Array, positive: bool) -> _GramFolds:
        """Sum over the rows, block by block."""
        d, size = data.X.shape[1], data.X.shape[1] + data.y.shape[1]
        means = np.zeros((2, train.shape[1], size))
        moments = np.zeros((*means.shape, size))
        for start in range(0, len(data.y), BLOCK):
            block = slice(start, start + BLOCK)
            Z = np.hstack([data.X[block], data.y[block]])
            for i, weights in enumerate((train[block], test[block])):
                means[i] += weights.T @ Z
                for f in np.flatnonzero(weights.any(axis=0)):
                    moments[i, f] += _moments(Z, weights[:, f])
        if data.center:
            moments = _about(moments, means, d)
        return cls(data, moments[0], moments[1], positive)

    def flows(self, k: int, log_A: float, rate: float, off: float) -> tuple[Flows, float]:
        """Return the flows in the integral of x."""
        one, d = np.ones(len(self.train)), self.data.X.shape[1]
        start = float(self.data.log_A(log_A)[k]) * one
        G, b = np.ascontiguousarray(self.train[:, :d, :d]), self.train[:, d + k, :d].copy()
        return GramFlows(start, rate * one, off * one, self.positive, G, b), 1.0

    def size(self, k: int) -> float:
        """Return 1: the units are those of the data."""
        return 1.0

    def error(self, x: Array, k: int, fold: int) -> Array:
        """Return the errors as a quadratic form."""
        M, d = self.test[fold], self.data.X.shape[1]
        # sum w (y - Xx)^2 = x^T M_XX x - 2 M_yX x + M_yy
        square = ((x @ M[:d, :d] - 2 * M[d + k, :d]) * x).sum(axis=-1)
        return np.maximum(square + M[d + k, d + k], 0.0)

    def ridge(self, fold: int, penalties: Array) -> Array:
        """Return the coefficients from the moments."""
        M, d = self.train[fold], self.data.X.shape[1]
        return ridge_of_gram(M[:d, :d], M[:d, d:], penalties * ridge_unit(self.data))

    def net(self, fold: int, ratio: float, penalties: Array, tol: float) -> Array:
        """Return the coefficients from the moments."""
        M, d = self.train[fold], self.data.X.shape[1]
        moments = M[:d, :d], M[:d, d:]
        return net_of_moments(self.data, *moments, ratio, penalties, self.positive, tol)


def _moments(Z: Array, weights: Array) -> Array:
    """Return Z^T w Z."""
    rows = np.flatnonzero(weights)
    if len(rows) < len(Z):
        Z, weights = Z[rows], weights[rows]
    scaled = np.sqrt(weights)[:, None] * Z
    return scaled.T @ scaled  # of a matrix with itself: half the work


def _about(moments: Array, means: Array, d: int) -> Array:
    """Return the moments about the means m of the training part.

    Of what is constant there up to rounding, among the d columns of X, nothing is left in it.
    """
    m = means[0]
    cross = means[:, :, :, None] * m[:, None, :]
    # sum w (z - m)(z - m)^T with weights that sum to 1; test rows have another mean than m.
    centred = moments - cross - cross.swapaxes(-1, -2) + m[:, :, None] * m[:, None, :]
    before, after = (np.einsum("fii->fi", of[0]) for of in (moments, centred))
    constant = after <= CONSTANT * before
    constant[:, d:] = False
    centred[0][constant] = 0.0
    centred[0].swapaxes(-1, -2)[constant] = 0.0
    return centred
