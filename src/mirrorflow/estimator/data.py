"""What the estimators need to know of X and y: weights, and the natural units of A and t."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import issparse
from scipy.sparse.linalg import LinearOperator, lsqr

__all__ = ["Data", "growth", "prepare"]

Array = NDArray[np.float64]
RANK = 1e-10  # eigenvalues of the Gram matrix below it, relative to the largest, count as zero


@dataclass(frozen=True)
class Data:
    """Rows with positive weight, and the units of the problem.

    Attributes
    ----------
    X : array or sparse matrix of shape (n, d)
        As given, float64.
    y : array of shape (n, K)
        One column for each output.
    weights : array of shape (n,)
        Sum to 1.
    rows : array of shape (n,)
        Their indices among the samples that were given.
    scale : array of shape (K,)
        The largest entry of the minimum-norm least-squares solution: the unit of A.
    pull : array of shape (K,)
        The largest entry of X^T w y, centred: the gradient at x = 0. It is 0 for constant y.
    center : bool
        Whether there is an intercept.
    samples : int
        How many samples were given.
    """

    X: Any
    y: Array
    weights: Array
    rows: NDArray[np.intp]
    scale: Array
    pull: Array
    center: bool
    samples: int

    def log_A(self, relative: float) -> Array:
        """Give log A for each output, from log(A / scale)."""
        return relative + np.log(np.where(self.scale > 0, self.scale, 1.0))

    def unit(self, relative: float, positive: bool) -> Array:
        r"""Give the unit of time: when the strongest coordinate, unopposed, has grown to the scale.

        A sinh(2 t pull) = scale for t = arcsinh(scale / A) / (2 pull).
        """
        return growth(relative, positive) / np.where(self.pull > 0, self.pull, 1.0)

    def intercept(self, coef: Array, repeat: bool = False) -> Array:
        """Give the intercepts of coefficients (K, d); with ``repeat`` all are of the one target."""
        if not self.center:
            return np.zeros(len(coef))
        means, targets = np.asarray(self.weights @ self.X).ravel(), self.weights @ self.y
        return (targets[0] if repeat else targets) - coef @ means


def growth(relative: float, positive: bool) -> float:
    """Give mu at which a coordinate has grown to the scale: the unit of time times the pull."""
    # arcsinh(e^z) = z + log(1 + sqrt(1 + e^{-2z})), without overflow for small A.
    z = -relative
    return 0.5 * (float(np.logaddexp(0.0, z)) if positive else _arcsinh_exp(z))


def _arcsinh_exp(z: float) -> float:
    """Give arcsinh(e^z) for any z."""
    return float(np.arcsinh(np.exp(z))) if z < 300 else z + float(np.log(2.0))


def prepare(X: Any, y: Array, weights: Array | None, center: bool, positive: bool) -> Data:
    """Drop rows without weight, and measure scale and pull."""
    given = np.ones(len(y)) if weights is None else np.asarray(weights, dtype=np.float64)
    rows, samples = np.flatnonzero(given > 0), len(y)
    v = given / given.sum()
    if len(rows) < len(y):
        X, y, v = X[rows], y[rows], v[rows]
    X = X.astype(np.float64, copy=False)
    y = y.reshape(len(rows), -1).astype(np.float64)
    yc = y - v @ y if center else y
    gradient = X.T @ (v[:, None] * yc)
    pull = gradient.max(axis=0) if positive else np.abs(gradient).max(axis=0)
    noise = 1e-13 * np.sqrt(v @ y**2) * _column_sizes(X, v).max(initial=0.0)
    pull = np.where(pull > noise, pull, 0.0)
    sizes = np.abs(_shortest(X, yc, v, center)).max(axis=0, initial=0.0)
    return Data(X, y, v, rows, np.where(pull > 0, sizes, 0.0), pull, center, samples)


def _column_sizes(X: Any, weights: Array) -> Array:
    """Give the weighted root mean square of each column."""
    squares = X.multiply(X).T @ weights if issparse(X) else weights @ X**2
    return np.sqrt(squares)


def _shortest(X: Any, yc: Array, weights: Array, center: bool) -> Array:
    """Give the least-squares solutions (d, K) of minimal norm."""
    root = np.sqrt(weights)
    means = np.asarray(weights @ X).ravel() if center else np.zeros(X.shape[1])
    if issparse(X):
        return _by_lsqr(X, yc, root, means)
    Z = root[:, None] * (X - means)
    right = root[:, None] * yc
    wide = Z.shape[0] < Z.shape[1]
    values, vectors = np.linalg.eigh(Z @ Z.T if wide else Z.T @ Z)
    keep = values > RANK * values.max(initial=0.0)
    inverse = (vectors[:, keep] / values[keep]) @ vectors[:, keep].T
    return Z.T @ (inverse @ right) if wide else inverse @ (Z.T @ right)


def _by_lsqr(X: Any, yc: Array, root: Array, means: Array) -> Array:
    """Solve by LSQR from 0, which stays in the row space: its limit is the shortest solution."""
    n, d = X.shape
    make: Any = LinearOperator  # its constructor is chosen at run time
    operator = make(
        (n, d),
        matvec=lambda v: root * (X @ v - means @ v),
        rmatvec=lambda u: X.T @ (root * u) - means * (root @ u),
        dtype=np.float64,
    )
    found = [lsqr(operator, root * yc[:, k], atol=1e-12, btol=1e-12) for k in range(yc.shape[1])]
    return np.stack([f[0] for f in found], axis=1)
