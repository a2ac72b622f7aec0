"""Which coefficients are 0: the flow itself makes them small, never 0."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import issparse

from .data import Data

__all__ = ["finish", "largest_harmless", "least_squares", "without_small"]

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


def largest_harmless(zero_tols: Array, errors: Any, without: float) -> float:
    """Choose the largest threshold whose error is at most that of the flow without zeros.

    Where none is (a refit can be worse throughout), that of least error.
    """
    harmless = np.flatnonzero(errors <= without)
    return float(zero_tols[harmless[-1] if len(harmless) else int(np.argmin(errors))])
