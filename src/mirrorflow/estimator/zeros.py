"""Which coefficients are 0: the flow itself makes them small, never 0."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import issparse

from .data import Data

__all__ = ["finish", "largest_better", "least_squares", "without_small"]

# Standard errors by which zeros have to gain: with none, dense truths lose to chance what sparse
# ones gain; with a whole one, supports of few samples stay too large (results/bench_sparse).
MARGIN = 0.5
Array = NDArray[np.float64]


def without_small(coef: Array, zero_tol: float | Array) -> Array:
    """Set to 0 what is smaller than ``zero_tol`` times the largest of its row (K, d)."""
    size = np.abs(coef)
    return np.where(size >= zero_tol * size.max(axis=-1, keepdims=True, initial=0.0), coef, 0.0)


def finish(coef: Array, data: Data, zero_tol: float, refit: bool) -> Array:
    """Set small coefficients (K, d) to 0, and fit the others again where that is asked for."""
    coef = without_small(coef, zero_tol)
    if not refit:
        return coef
    return np.stack([least_squares(data, k, row != 0, data.weights) for k, row in enumerate(coef)])


def least_squares(data: Data, k: int, support: NDArray[np.bool_], weights: Array) -> Array:
    """Fit target k by the coefficients of the support (the shortest solution)."""
    X = data.X[:, np.flatnonzero(support)]
    X = X.toarray() if issparse(X) else X
    y, root = data.y[:, k], np.sqrt(weights)
    if data.center:
        X, y = X - weights @ X, y - weights @ y
    fitted = np.zeros(len(support))
    fitted[support] = np.linalg.lstsq(root[:, None] * X, root * y, rcond=None)[0]
    return fitted


def largest_better(zero_tols: Array, errors: Array, without: Array, refit: bool) -> float:
    """Choose the largest threshold that predicts better than the flow without zeros.

    Better by half a standard error of the difference: ``errors`` (n_tols, n_folds) and ``without``
    (n_folds,) are of the same folds. Where none is, the smallest; of refits, which can be worse
    throughout, that of least error.
    """
    gained = without - errors
    doubt = gained.std(axis=1) / np.sqrt(len(without))
    better = np.flatnonzero(gained.mean(axis=1) >= MARGIN * doubt)
    otherwise = int(errors.mean(axis=1).argmin()) if refit else 0
    return float(zero_tols[better[-1] if len(better) else otherwise])
