"""The row space of a design matrix, with rank decisions that rounding cannot turn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import qr, solve_triangular

__all__ = ["EPS", "RowSpace", "row_space"]

Array = NDArray[np.float64]
EPS = float(np.finfo(np.float64).eps)
CARE = 10.0  # on the rounding of the data: a column may be a sum that was rounded several times


@dataclass(frozen=True)
class RowSpace:
    r"""An orthonormal basis Q of the row space of Z (n, d), and the way from Z and back.

    .. math:: Z = U \operatorname{diag}(s) G^T, \quad G = Q R

    up to what is below rounding, so that x is a least-squares solution of Zx = y exactly where
    Q^T x = R^{-T} diag(1 / s) U^T y.

    Attributes
    ----------
    Z : array of shape (n, d)
        The matrix, as it was given.
    U, s : arrays of shape (n, r) and (r,)
        The left singular vectors and the singular values of Z with columns of unit length.
    Q, R : arrays of shape (d, r) and (r, r)
        The basis, and the triangular factor.
    lengths : array of shape (d,)
        The lengths of the columns of Z; 1 for columns of zeros.
    """

    Z: Array
    U: Array
    s: Array
    Q: Array
    R: Array
    lengths: Array

    def targets(self, y: Array) -> Array:
        """Return b (r,) for which Q^T x = b holds exactly for the least-squares solutions x."""
        # Zx = U diag(s) R^T Q^T x
        return np.asarray(solve_triangular(self.R.T, (self.U.T @ y) / self.s, lower=True))

    def shortest(self, y: Array) -> Array:
        """Return the shortest least-squares solution (d,) of Zx = y."""
        return self.Q @ self.targets(y)

    def dual(self, theta: Array) -> Array:
        """Return the dual variables (n,) of Zx = y from theta (r,), those of Q^T x = b."""
        # Z^T U s^{-1} R^{-1} theta = G R^{-1} theta = Q theta
        return self.U @ (np.asarray(solve_triangular(self.R, theta)) / self.s)

    def compressed(self) -> Array:
        """Return the rows diag(s) G^T (r, d): they have the Gram matrix of Z."""
        return self.s[:, None] * (self.Q @ self.R).T  # Z = U (diag(s) G^T), U^T U = 1


def row_space(Z: Array, rounding: Array) -> RowSpace:
    """Return the row space of Z (n, d), whose columns are known up to ``rounding`` (d,).

    A direction v counts unless |Zv| is below the rounding of the decomposition, or below what
    columns that are wrong by ``rounding`` make of v. The columns are compared at unit length, so
    that units of measurement decide nothing.
    """
    lengths = np.sqrt(np.einsum("ij,ij->j", Z, Z))
    lengths = np.where(lengths > 0, lengths, 1.0)
    U, s, Vt = np.linalg.svd(Z / lengths, full_matrices=False)
    below = EPS * max(Z.shape) * s.max(initial=0.0) + CARE * np.abs(Vt) @ (rounding / lengths)
    U, s, Vt = U[:, s > below], s[s > below], Vt[s > below]
    G = lengths[:, None] * Vt.T
    # Householder's QR is exact row by row, also where rows differ in size, if these come in order
    # of size and columns are pivoted (Cox and Higham, BIT 38, 1998).
    order = np.argsort(-np.abs(G).max(axis=1, initial=0.0), kind="stable")
    factored: Any = qr(G[order], mode="economic", pivoting=True)
    ordered, R, pivots = factored
    Q = np.empty_like(ordered)
    Q[order] = ordered
    return RowSpace(Z, U[:, pivots], s[pivots], Q, R, lengths)
