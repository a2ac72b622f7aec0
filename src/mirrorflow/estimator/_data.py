"""Weights of the rows, and the natural units of A and t, from X and y."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import issparse
from scipy.sparse.linalg import LinearOperator, lsqr
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.sparsefuncs import inplace_column_scale, mean_variance_axis

from ..legendre._kernels import arcsinh_ratio

__all__ = [
    "BLOCK",
    "CONSTANT",
    "FEW",
    "ROUNDING",
    "Data",
    "gram",
    "growth",
    "prepare",
    "pulls",
    "shortest",
    "smaller_gram",
    "warn_of_scales",
]

Array = NDArray[np.float64]
DAMPING = 1e-5  # of the shortest solution, relative to the largest singular value
FEW = 2000  # rows or columns of a sparse X up to which its Gram matrix is formed
ROUNDING = 1e-13  # eigenvalues, relative to the largest, that are 0 up to rounding
UNEQUAL = 10  # ratio of the scales of columns from which there is a warning
BLOCK = 2048  # rows of X that are read at once: they stay in the cache
CONSTANT = 1e-13  # spread, relative to the size, below which numbers count as constant


@dataclass(frozen=True)
class Data:
    """Rows with positive weight, and the units of the problem.

    Attributes
    ----------
    X : array or sparse matrix of shape (n, d)
        float64; where there is an intercept, a dense one has been centred. Divided by ``spreads``
        where columns are standardized.
    y : array of shape (n, K)
        One column for each output, centred where there is an intercept.
    weights : array of shape (n,)
        Sum to 1.
    rows : array of shape (n,)
        Their indices among the samples that were given.
    scale : array of shape (K,)
        The largest entry of the minimum-norm least-squares solution: the unit of A.
    pull : array of shape (K,)
        The largest entry of X^T w y, centred: the gradient at x = 0. It is 0 for constant y.
    center : bool
        Whether flows have to subtract means.
    samples : int
        How many samples were given.
    means, targets : arrays of shape (d,) and (K,)
        The weighted means of X, in the units of its columns, and of y; 0 without an intercept.
    spreads : array of shape (d,)
        The weighted standard deviations of the columns of X as they were given, or their root mean
        squares without an intercept.
    units : array of shape (d,)
        What the columns of X were divided by: ``spreads``, or 1.
    rounding : array of shape (d,)
        The length, weighted, of the rounding of each column as it was given.
    """

    X: Any
    y: Array
    weights: Array
    rows: NDArray[np.intp]
    scale: Array
    pull: Array
    center: bool
    samples: int
    means: Array
    targets: Array
    spreads: Array
    units: Array
    rounding: Array

    def log_A(self, relative: float) -> Array:
        """Return log A for each output, from log(A / scale)."""
        # log A = log(A / scale) + log scale
        return relative + np.log(np.where(self.scale > 0, self.scale, 1.0))

    def unit(self, relative: float, positive: bool) -> Array:
        r"""Return the unit of time: when the strongest coordinate alone has grown to the scale.

        A sinh(2 t pull) = scale for t = arcsinh(scale / A) / (2 pull).
        """
        return growth(relative, positive) / np.where(self.pull > 0, self.pull, 1.0)  # mu = t pull

    def intercept(self, coef: Array, repeat: bool = False) -> Array:
        """Return the intercepts of coefficients (K, d); with ``repeat`` all are of one target."""
        return (self.targets[0] if repeat else self.targets) - coef @ self.means

    def dual(self, nu: Array) -> Array:
        """Return the dual variables (K, samples) of all samples, 0 for those without weight."""
        found = np.zeros((nu.shape[1], self.samples))
        found[:, self.rows] = nu.T
        return found


def growth(relative: float, positive: bool) -> float:
    """Return mu at which a coordinate has grown to the scale: the unit of time times the pull."""
    if positive:
        return 0.5 * float(np.logaddexp(0.0, -relative))  # x = A e^{2 mu} = A + scale
    return 0.5 * float(arcsinh_ratio(np.ones(()), relative))  # x = A sinh(2 mu) = scale


def prepare(
    X: Any, y: Array, weights: Array | None, center: bool, positive: bool, standardize: bool = False
) -> Data:
    """Drop rows without weight, center, standardize, and measure scale and pull."""
    given = np.ones(len(y)) if weights is None else np.asarray(weights, dtype=np.float64)
    rows, samples = np.flatnonzero(given > 0), len(y)
    v = given / given.sum()
    if len(rows) < len(y):
        X, y, v = X[rows], y[rows], v[rows]
    eps = float(np.finfo(X.dtype).eps)
    X = X.astype(np.float64, copy=False)
    if not (issparse(X) or X.flags.forc):  # as it will be in another process
        X = np.ascontiguousarray(X)
    rounding = eps * np.sqrt(_squares(X, v))  # |eps x_j|, weighted
    y = y.reshape(len(rows), -1).astype(np.float64)
    means, targets, spread = np.zeros(X.shape[1]), np.zeros(y.shape[1]), None
    if center:
        y, targets = centered(y, v)
        if issparse(X):
            found: Any = mean_variance_axis(X, axis=0, weights=v)
            means, spread = found
        else:
            X, means = centered(X, v)
    squares: Array = _squares(X, v) if spread is None else spread
    spreads = np.sqrt(np.maximum(squares, 0.0))
    units = np.where((spreads > 0) & standardize, spreads, 1.0)
    if standardize:
        X, means, rounding = _divided(X, units), means / units, rounding / units
        squares = squares / units**2
    pull = _pull(X, y, v, squares, positive)
    sizes = np.abs(_shortest(X, y, v, means, pull)).max(axis=0, initial=0.0)
    scale = np.where(pull > 0, sizes, 0.0)
    return Data(
        X, y, v, rows, scale, pull, center, samples, means, targets, spreads, units, rounding
    )


def centered(values: Array, weights: Array) -> tuple[Array, Array]:
    """Subtract the weighted means; what is constant up to rounding becomes 0.

    Twice: the mean of large numbers is rounded, and what is left of it would be a direction.
    """
    means = weights @ values
    centred = values - means
    centred -= weights @ centred
    spread, size = np.sqrt(weights @ centred**2), np.sqrt(weights @ values**2)
    centred[:, spread <= CONSTANT * size] = 0.0
    return centred, means


def _squares(X: Any, weights: Array) -> Array:
    """Return the weighted sums of squares of the columns."""
    return np.asarray(X.multiply(X).T @ weights if issparse(X) else weights @ X**2)


def _divided(X: Any, units: Array) -> Any:
    """Return X with its columns divided by their units."""
    if not issparse(X):
        return X / units
    X = X.copy()
    inplace_column_scale(X, 1 / units)
    return X


def warn_of_scales(data: Data, above: int = 0) -> None:
    """Warn where the columns of X are on unequal scales: the flow grows the large ones first.

    ``above`` is the number of calls between the user's and this one's caller.
    """
    spreads = np.where(data.spreads > 0, data.spreads, np.nan)
    if np.isnan(spreads).all() or (data.units != 1).any():
        return
    large, small = int(np.nanargmax(spreads)), int(np.nanargmin(spreads))
    ratio = spreads[large] / spreads[small]
    if ratio > UNEQUAL:
        warnings.warn(
            f"the scales of the columns of X differ by a factor of {ratio:.3g} (columns {large} "
            f"and {small}), and coefficients of columns on a large scale grow first. Set "
            "standardize=True, or bring the columns to a common scale (StandardScaler)",
            UserWarning,
            stacklevel=3 + above,
        )


def _pull(X: Any, y: Array, weights: Array, squares: Array, positive: bool) -> Array:
    """Return the largest gradient at 0 of each target, 0 where it is rounding alone."""
    gradient = X.T @ (weights[:, None] * y)
    largest = float(squares.max(initial=0.0))
    # |x_j^T w y| <= |x_j| |y| in the weighted norms: rounding is a part of that.
    noise = 1e-13 * np.sqrt(weights @ y**2 * largest)
    pull = gradient.max(axis=0) if positive else np.abs(gradient).max(axis=0)
    return np.where(pull > noise, pull, 0.0)


def pulls(data: Data) -> Array:
    """Return X^T w y (d, K), the gradients at 0."""
    return data.X.T @ (data.weights[:, None] * data.y)


def shortest(data: Data) -> Array:
    """Return the least-squares solutions (d, K) whose largest entries are the scales."""
    return _shortest(data.X, data.y, data.weights, data.means, data.pull)


def _shortest(X: Any, y: Array, weights: Array, means: Array, pull: Array) -> Array:
    """Return the least-squares solutions (d, K) of minimal norm, damped by DAMPING.

    They give the unit of A, for which directions that hardly matter to the fit are not to count.
    """
    root = np.sqrt(weights)
    if issparse(X) and min(X.shape) > FEW:
        return _by_lsqr(X, y, root, means, pull)
    Z = X.multiply(root[:, None]).tocsr() if issparse(X) else root[:, None] * X
    shift, right = means if issparse(X) else 0 * means, root[:, None] * y
    wide = Z.shape[0] < Z.shape[1]
    values, vectors = np.linalg.eigh(smaller_gram(Z, root, shift, wide))
    largest = values.max(initial=1e-300)
    # (s^2 + DAMPING^2 s_max^2)^{-1}, and 0 for directions that are rounding.
    damped = np.where(values > ROUNDING * largest, values + DAMPING**2 * largest, np.inf)
    # Of (Z - root means^T)^T right the means drop out: root^T right = 0, as y is centred.
    side = right if wide else Z.T @ right
    solved = vectors @ ((vectors.T @ side) / damped[:, None])
    return Z.T @ solved - np.outer(shift, root @ solved) if wide else solved


def smaller_gram(Z: Any, root: Array, means: Array, wide: bool) -> Array:
    """Return the smaller Gram matrix of Z - root means^T, which is not formed where Z is sparse."""
    product = Z @ Z.T if wide else Z.T @ Z
    if not issparse(Z):
        return product
    if not wide:  # root^T Z = means, and |root| = 1
        return product.toarray() - np.outer(means, means)
    along = Z @ means  # (Z - root m^T)(Z - root m^T)^T, term by term
    mixed = np.outer(root, along)
    return product.toarray() - mixed - mixed.T + means @ means * np.outer(root, root)


def _by_lsqr(X: Any, y: Array, root: Array, means: Array, pull: Array) -> Array:
    """Solve by LSQR from 0, without forming X minus its means."""
    n, d = X.shape
    make: Any = LinearOperator  # its constructor is chosen at run time
    operator = make(
        (n, d),
        matvec=lambda v: root * (X @ v - means @ v),
        rmatvec=lambda u: X.T @ (root * u) - means * (root @ u),
        dtype=np.float64,
    )
    damp, most = DAMPING * _largest(operator), 20 * min(n, d) + 1000
    found = np.zeros((d, y.shape[1]))
    for k in np.flatnonzero(pull > 0):
        found[:, k], stop, *_ = lsqr(operator, root * y[:, k], damp, 1e-12, 1e-12, iter_lim=most)
        if stop == 7:
            warnings.warn(
                f"LSQR has not found the scale of the coefficients in {most} iterations: bring the "
                "columns of X to a common scale (MaxAbsScaler keeps X sparse)",
                ConvergenceWarning,
                stacklevel=5,
            )
    return found


def _largest(operator: Any) -> float:
    """Return the largest singular value, by power iterations: it sets a tolerance only."""
    v = np.random.default_rng(0).standard_normal(operator.shape[1])
    size = 0.0
    for _ in range(30):
        v = operator.rmatvec(operator.matvec(v / max(float(np.linalg.norm(v)), 1e-300)))
        size = float(np.sqrt(np.linalg.norm(v)))  # |Z^T Z v| with |v| = 1 tends to s_1^2
    return size


def gram(X: Array, weights: Array) -> Array:
    """Return X^T w X, row block by row block: each is read once and stays in the cache."""
    found = np.zeros((X.shape[1], X.shape[1]))
    root = np.sqrt(weights)
    for start in range(0, len(X), BLOCK):
        rows = root[start : start + BLOCK, None] * X[start : start + BLOCK]
        found += rows.T @ rows
    return found
