r"""End points so deep that they are the L1 vertex: found on its support, and verified."""

from __future__ import annotations

import warnings

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve_triangular
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import lars_path

from ..legendre._exponential_duals import ColumnDual
from ._continuation import GOOD, DualPoint

__all__ = ["at_vertex"]

Array = NDArray[np.float64]
FITTED = 1e-9  # residual, relative to b, at which the homotopy has reached the data
SINH = 20.0  # exponents from which sinh is half an exponential, to rounding
SHOWS = 1e-10  # size of a coordinate of the support, in units in which b has norm 1
SUNK = -34.0  # log-size of the other coordinates: all together they do not show in x
MARGIN = 0.95  # how deep, of what SUNK asks for, a coordinate is pushed that was too high
ROUNDS = 20


def at_vertex(dual: ColumnDual, b: Array, tau: float) -> DualPoint | None:
    """Solve Q x = b at ``tau`` where its x is the sparsest L1 minimizer; None if it is not.

    The homotopy of the lasso (LARS) finds that x in a few cheap steps, if it is sparse. Any theta
    that gives x on its support, and nothing that shows elsewhere, is a solution: the one of least
    norm is tried, and coordinates that it leaves too high are pushed down together.
    """
    x = _sparse(dual, b)
    if x is None:
        return None
    support = np.abs(x) > SHOWS
    # |x| = e^(log_scale + |t|) at these depths, t the exponent.
    wanted = np.where(support, np.log(np.abs(x) + SHOWS * ~support), SUNK) - dual.log_scale(tau)
    if wanted.min() < SINH:
        return None
    sign, pushed = np.sign(x), support.copy()
    for _ in range(ROUNDS):
        if 2 * pushed.sum() > len(b):
            return None
        columns = _LeastNorm(dual.Q[:, pushed])
        depth = np.where(support, 1.0, MARGIN)
        # The exponents s Q^T theta + shift of the pushed columns are what is wanted of them.
        theta = columns.theta(((sign * wanted * depth - dual.shift) / dual.speed)[pushed])
        dual.evaluate(theta, tau)
        high = ~support & (np.abs(dual.x) > np.exp(SUNK))
        if not high.any():
            # -s d theta / d tau: Q^T of it is the sign of x on the support, and within 1 off it.
            return _point(dual, b, theta, columns.theta((sign * depth)[pushed]))
        sign[high & ~pushed] = np.sign(dual.x[high & ~pushed])
        pushed |= high
    return None


def _sparse(dual: ColumnDual, b: Array) -> Array | None:
    """Return the L1 minimizer of Q x = b if the homotopy of the lasso gets there soon."""
    Q = dual.signed()
    with warnings.catch_warnings():  # a path that stops early is an answer here
        warnings.simplefilter("ignore", ConvergenceWarning)
        _, _, x = lars_path(
            Q, b, method="lasso", max_iter=len(b) // 3, positive=dual.one_sided, return_path=False
        )
    support = np.abs(x) > SHOWS
    if not support.any() or np.linalg.norm(b - Q @ x) > FITTED:
        return None
    x = np.zeros_like(x)
    x[support] = _LeastNorm(Q[:, support]).fit(b)  # without the rounding of the homotopy
    return x * dual.signs()


class _LeastNorm:
    """The columns K of Q that matter: least squares, and theta of least norm for K^T theta = t."""

    def __init__(self, K: Array) -> None:
        self.basis, self.factor = np.linalg.qr(K)

    def fit(self, b: Array) -> Array:
        """Return x that minimizes |K x - b|."""
        return solve_triangular(self.factor, self.basis.T @ b)

    def theta(self, t: Array) -> Array:
        """Return the shortest theta with K^T theta = t."""
        # K = basis R, so that K^T theta = R^T (basis^T theta).
        return self.basis @ solve_triangular(self.factor, t, trans=1)


def _point(dual: ColumnDual, b: Array, theta: Array, certificate: Array) -> DualPoint | None:
    """Return the point where the dual has been placed, if it solves the whole problem."""
    residual = float(np.linalg.norm(b - dual.Q @ dual.x))
    if not residual < GOOD:
        return None
    return DualPoint(dual.x, theta, -certificate, residual, steps=0, vertex=True)
