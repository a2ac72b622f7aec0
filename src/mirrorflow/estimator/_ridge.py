"""Ridge regression, where the flows of large scales end: all penalties by one decomposition."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import issparse

from ._data import FEW, ROUNDING, Data, smaller_gram

__all__ = ["decomposes", "ridge_dual", "ridge_of_gram", "ridge_path", "ridge_unit"]

Array = NDArray[np.float64]


def ridge_unit(data: Data) -> float:
    """Return the sum of the weighted squares of X, the unit of penalties."""
    return float(((data.spreads / data.units) ** 2).sum())


def decomposes(data: Data) -> bool:
    """Return whether the smaller Gram matrix is small enough to be decomposed for each fold."""
    return not issparse(data.X) or min(data.X.shape) <= FEW


def ridge_path(data: Data, weights: Array, penalties: Array) -> Array:
    r"""Return the coefficients (K, n_penalties, d) for rows of these weights, which sum to 1.

    With Z = diag(w)^{1/2} X and t = diag(w)^{1/2} y, about the means,

    .. math:: x = (Z^T Z + \lambda)^{-1} Z^T t = Z^T (Z Z^T + \lambda)^{-1} t

    in the eigenbasis of the smaller of the two matrices. ``penalties`` are in units of
    `ridge_unit`.
    """
    rows = np.flatnonzero(weights)
    root, Z, y = np.sqrt(weights[rows]), data.X[rows], data.y[rows]
    means, sparse, wide = np.zeros(Z.shape[1]), issparse(Z), len(rows) < Z.shape[1]
    if data.center:
        means, y = np.asarray(root**2 @ Z).ravel(), y - root**2 @ y
    if sparse:
        Z = Z.multiply(root[:, None]).tocsr()
    else:  # a copy: in place
        Z -= means
        Z *= root[:, None]
    shift, right = means if sparse else 0 * means, root[:, None] * y
    # The means drop out of Z^T right: root^T right = 0, as y is centred.
    side, added = right if wide else Z.T @ right, penalties * ridge_unit(data)
    found = ridge_of_gram(smaller_gram(Z, root, shift, wide), side, added)
    if not wide:
        return found
    # x = (Z - root means^T)^T (Z Z^T + lambda)^{-1} t, sparse Z without its means.
    turned = (Z.T @ found.reshape(-1, len(rows)).T).T.reshape(*found.shape[:2], -1)
    return turned - (found @ root)[..., None] * shift if sparse else turned


def ridge_of_gram(G: Array, b: Array, penalties: Array) -> Array:
    """Return the solutions (K, n_penalties, d) of (G + lambda) x = b, one for each column of b."""
    values, vectors = np.linalg.eigh(G)
    values = np.maximum(values, 0.0)
    added = np.maximum(penalties, ROUNDING * values.max(initial=1e-300))
    # One row for each target and penalty: (s + lambda)^{-1} U^T b, turned back.
    return ((vectors.T @ b).T[:, None] / (values + added[:, None])) @ vectors.T


def ridge_dual(data: Data, coef: Array, penalty: float) -> Array:
    """Return nu (n, K) with x = X^T nu: the weighted residuals, divided by the penalty."""
    missed = data.y - data.X @ coef.T
    if data.center:
        missed -= data.weights @ missed
    # (Z^T Z + lambda) x = Z^T t, so that x = Z^T (t - Z x) / lambda.
    return data.weights[:, None] * missed / (penalty * ridge_unit(data))
