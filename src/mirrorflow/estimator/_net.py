r"""The elastic net: decay that is kept, the lasso's penalty, with a share of ridge regression's.

For weights w that sum to 1 and the l1 ratio r, 0 < r < 1, it is

.. math:: \min_x \tfrac12 \sum_i w_i (y_i - X_i x)^2
    + \alpha \left(r \lVert x \rVert_1 + \tfrac{1 - r}{2} \lVert x \rVert_2^2\right)

for X and y of unit scale, as glmnet has it: else the units of y would decide how much of it is a
lasso. `mixes` turns r into the ratio for the units as they are. alpha is in units of the smallest
that leaves nothing, max |X^T w y| / r.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import issparse
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import ElasticNet, enet_path

from ._data import BLOCK, ROUNDING, Data
from ._ridge import ridge_unit

__all__ = ["mixes", "net_dual", "net_of_moments", "net_path", "net_primal"]

Array = NDArray[np.float64]
SINGLE, COARSE = np.float32, 1e-4  # precision of paths up to gaps that are not below
SWEEPS = 1000  # over the coordinates; what has not converged then is judged as it is


def mixes(data: Data, ratio: float) -> Array:
    """Return the l1 ratio (K,) in the units of X and y that is ``ratio`` for unit scales."""
    columns, targets = _scales(data)
    # With x' = x s_X / s_y the share of |x|^2 beside |x|_1 is s_X / s_y times that of x'.
    return 1 / (1 + (1 - ratio) / ratio * columns / targets)


def net_path(
    data: Data, weights: Array, ratio: float, penalties: Array, positive: bool, tol: float
) -> Array:
    """Return the coefficients (K, n_penalties, d) for rows of these weights.

    ``penalties`` decrease; their unit is that of all samples, so that they are alike in each fold.
    """
    rows = np.flatnonzero(weights)
    v, y, (columns, targets) = weights[rows], data.y[rows], _scales(data)
    y = (y - v @ y if data.center else y) / targets
    if issparse(data.X):
        X = data.X[rows].tocsc() / columns
        found = _sparse_path(data, X, y, v, ratio, penalties, positive, tol)
        return found * _back(data)
    Z = np.empty((len(rows), data.X.shape[1]), SINGLE if tol >= COARSE else np.float64, order="F")
    root = np.sqrt(v)[:, None]
    for start in range(0, Z.shape[1], BLOCK):  # one copy of the rows, of many columns
        block = data.X[rows, start : start + BLOCK]
        mean = v @ block if data.center else 0.0
        Z[:, start : start + BLOCK] = root / columns * (block - mean)
    return _path(data, Z, root * y, ratio, penalties, positive, tol) * _back(data)


def net_of_moments(
    data: Data, G: Array, b: Array, ratio: float, penalties: Array, positive: bool, tol: float
) -> Array:
    """Return the same from G = X^T w X and b = X^T w y of the rows."""
    columns, targets = _scales(data)
    values, vectors = np.linalg.eigh(G / columns**2)
    kept = values > ROUNDING * values.max(initial=1e-300)
    root, turned = np.sqrt(values[kept])[:, None], vectors[:, kept].T
    # Z = L^{1/2} U^T and t = L^{-1/2} U^T b have these moments: Z^T Z = G, Z^T t = b.
    Z, t = np.asfortranarray(root * turned), turned @ (b / columns / targets) / root
    return _path(data, Z, t, ratio, penalties, positive, tol) * _back(data)


def _scales(data: Data) -> tuple[float, Array]:
    """Return the root mean square of the columns of X, and of each target (K,)."""
    targets = np.sqrt(data.weights @ data.y**2)
    columns = float(np.sqrt(ridge_unit(data) / data.X.shape[1]))
    return columns if columns > 0 else 1.0, np.where(targets > 0, targets, 1.0)


def _back(data: Data) -> Array:
    """Return what coefficients (K, ., .) for unit scales are multiplied by."""
    columns, targets = _scales(data)
    return (targets / columns)[:, None, None]


def _alphas(data: Data, ratio: float, penalties: Array) -> Array:
    """Return scikit-learn's penalties (K, n_penalties) for unit scales."""
    columns, targets = _scales(data)
    return (data.pull / columns / targets)[:, None] * penalties / ratio


def _path(
    data: Data, Z: Any, t: Array, ratio: float, penalties: Array, positive: bool, tol: float
) -> Array:
    """Return the coefficients for least squares |t - Z x|^2 / 2, for unit scales."""
    found = np.zeros((len(data.pull), len(penalties), Z.shape[1]))
    # scikit-learn divides the squares, not the penalty, by the number of rows.
    alphas = _alphas(data, ratio, penalties) / max(len(Z), 1)
    options: Any = {"precompute": False, "check_input": False}  # what they are is known
    for k in np.flatnonzero(data.pull > 0):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            found[k] = enet_path(
                Z, np.ascontiguousarray(t[:, k], dtype=Z.dtype), l1_ratio=ratio, alphas=alphas[k],
                positive=positive, tol=tol, max_iter=SWEEPS, **options,
            )[1].T  # fmt: skip
    return found


def _sparse_path(
    data: Data, X: Any, y: Array, v: Array, ratio: float, penalties: Array, positive: bool,
    tol: float,
) -> Array:  # fmt: skip
    """Return the coefficients for a sparse X, whose means are taken off without making it dense."""
    found = np.zeros((len(data.pull), len(penalties), X.shape[1]))
    options: Any = {"positive": positive, "fit_intercept": data.center, "warm_start": True}
    alphas = _alphas(data, ratio, penalties)
    for k in np.flatnonzero(data.pull > 0):
        net = ElasticNet(l1_ratio=ratio, tol=tol, max_iter=SWEEPS, **options)
        for i, alpha in enumerate(alphas[k]):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                found[k, i] = net.set_params(alpha=alpha).fit(X, y[:, k], v).coef_
    return found


def net_dual(data: Data, coef: Array, ratios: Array, penalty: float) -> Array:
    """Return nu (n, K) with X^T nu in the subgradient of the penalty at x, and a sum of 0."""
    missed = data.y - data.X @ coef.T
    if data.center:
        missed -= data.weights @ missed
    alpha = penalty * data.pull / ratios
    return data.weights[:, None] * missed / np.where(alpha > 0, alpha, 1.0)


def net_primal(mu: Array, ratios: Array, positive: bool) -> Array:
    """Return the x that minimizes R(x) - <mu, x>, with R the penalty: mu shrunk by r, / (1 - r)."""
    left = np.maximum((mu if positive else np.abs(mu)) - ratios[:, None], 0.0)
    return np.sign(mu) * left / (1 - ratios[:, None])
