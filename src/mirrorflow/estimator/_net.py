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
SWEEPS = 1000  # over the coordinates; what has not converged then is judged as it is


def mixes(data: Data, ratio: float) -> Array:
    """Return the l1 ratio (K,) in the units of X and y that is ``ratio`` for unit scales."""
    columns = np.sqrt(ridge_unit(data) / data.X.shape[1])
    targets = np.sqrt(data.weights @ data.y**2)
    # With x' = x s_X / s_y the share of |x|^2 beside |x|_1 is s_X / s_y times that of x'.
    share = (1 - ratio) / ratio * columns / np.where(targets > 0, targets, 1.0)
    return 1 / (1 + share)


def net_path(
    data: Data, weights: Array, ratios: Array, penalties: Array, positive: bool, tol: float
) -> Array:
    """Return the coefficients (K, n_penalties, d) for rows of these weights.

    ``penalties`` decrease; their unit is that of all samples, so that they are alike in each fold.
    ``ratios`` (K,) are `mixes`.
    """
    rows = np.flatnonzero(weights)
    v, y = weights[rows], data.y[rows]
    if issparse(data.X):
        return _sparse_path(data, data.X[rows].tocsc(), y, v, ratios, penalties, positive, tol)
    y = y - v @ y if data.center else y
    Z, root = np.empty((len(rows), data.X.shape[1]), order="F"), np.sqrt(v)[:, None]
    for start in range(0, Z.shape[1], BLOCK):  # one copy of the rows, of many columns
        block = data.X[rows, start : start + BLOCK]
        mean = v @ block if data.center else 0.0
        np.multiply(root, block - mean, out=Z[:, start : start + BLOCK])
    return _path(Z, root * y, data.pull, ratios, penalties, positive, tol)


def net_of_moments(
    G: Array, b: Array, pull: Array, ratios: Array, penalties: Array, positive: bool, tol: float
) -> Array:
    """Return the same from G = X^T w X and b = X^T w y, for max |b| of all samples ``pull``."""
    values, vectors = np.linalg.eigh(G)
    kept = values > ROUNDING * values.max(initial=1e-300)
    root, turned = np.sqrt(values[kept])[:, None], vectors[:, kept].T
    # Z = L^{1/2} U^T and t = L^{-1/2} U^T b have these moments: Z^T Z = G, Z^T t = b.
    Z = np.asfortranarray(root * turned)
    return _path(Z, (turned @ b) / root, pull, ratios, penalties, positive, tol)


def _path(
    Z: Array, t: Array, pull: Array, ratios: Array, penalties: Array, positive: bool, tol: float
) -> Array:
    """Return the coefficients for least squares |t - Z x|^2 / 2."""
    found = np.zeros((len(pull), len(penalties), Z.shape[1]))
    for k in np.flatnonzero(pull > 0):
        # scikit-learn divides the squares, not the penalty, by the number of rows.
        alphas = penalties * pull[k] / (ratios[k] * len(Z))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            found[k] = enet_path(
                Z, np.ascontiguousarray(t[:, k]), l1_ratio=ratios[k], alphas=alphas,
                positive=positive, tol=tol, max_iter=SWEEPS, precompute=False, check_input=False,
            )[1].T  # fmt: skip
    return found


def _sparse_path(
    data: Data, X: Any, y: Array, v: Array, ratios: Array, penalties: Array, positive: bool,
    tol: float,
) -> Array:  # fmt: skip
    """Return the coefficients for a sparse X, whose means are taken off without making it dense."""
    found = np.zeros((len(data.pull), len(penalties), X.shape[1]))
    options: Any = {"positive": positive, "fit_intercept": data.center, "warm_start": True}
    for k in np.flatnonzero(data.pull > 0):
        net = ElasticNet(l1_ratio=ratios[k], tol=tol, max_iter=SWEEPS, **options)
        for i, alpha in enumerate(penalties * data.pull[k] / ratios[k]):
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
