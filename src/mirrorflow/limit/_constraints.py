"""The constraints Zx = y with orthonormal rows, and the part of y that no x can reach."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import get_blas_funcs, get_lapack_funcs

__all__ = ["Constraints", "length", "orthonormal"]

Array = NDArray[np.float64]
# Below this reciprocal condition of the Gram matrix an SVD decides. The last pivot does not: of
# dependent rows it is rounding, divided by the pivots before it.
RCOND = 1e-12
DROP = 1e-11  # singular values, relative to the largest, that count as zero
MISSED = 1e-9  # part of y outside the range of Z, relative to y, that counts as inconsistent
(trmm,) = get_blas_funcs(("trmm",), dtype=np.float64)
potrf, pocon, trtri = get_lapack_funcs(("potrf", "pocon", "trtri"), dtype=np.float64)


@dataclass(frozen=True)
class Constraints:
    """Q x = b with orthonormal rows Q, equivalent to Z x = y where that has a solution.

    Attributes
    ----------
    Q, b : arrays of shape (r, d), (r,)
        The rows and the targets; r is the rank of Z.
    back : array of shape (n, r)
        theta = back @ (the dual variable of Q x = b), so that Z^T theta = Q^T (...).
    missed : float
        The part of y outside the range of Z, relative to y.
    """

    Q: Array
    b: Array
    back: Array
    missed: float

    @property
    def consistent(self) -> bool:
        """Return whether some x has Zx = y."""
        return self.missed <= MISSED


def length(v: Array) -> float:
    """Return the Euclidean norm, also where squares would overflow or underflow."""
    peak = float(np.abs(v).max(initial=0.0))
    return peak * float(np.linalg.norm(v / peak)) if peak > 0 else 0.0


def orthonormal(Z: Array, y: Array) -> Constraints:
    """Orthonormalize the rows of Z (n, d), dropping dependent ones."""
    lengths = np.sqrt(np.einsum("ij,ij->i", Z, Z))
    scale = np.where(lengths > 0, lengths, 1.0)  # rows of any scale; a zero row is dropped below
    U, v = Z / scale[:, None], y / scale
    n, d = Z.shape
    if 0 < n <= d:
        # U U^T = L L^T: the rows of Q = L^{-1} U are orthonormal.
        gram = U @ U.T
        factor, failed = potrf(gram, lower=1, clean=1)
        if failed == 0 and pocon(factor, np.abs(gram).sum(0).max(), uplo="L")[0] > RCOND:
            inverse = trtri(factor, lower=1)[0]
            # inverse @ U, in half the time
            Q = trmm(1.0, inverse, U.T, side=1, lower=1, trans_a=1).T
            # Z^T D^{-1} L^{-T} theta = U^T L^{-T} theta = Q^T theta, D the lengths of the rows.
            return Constraints(Q, inverse @ v, inverse.T / scale[:, None], 0.0)
    return _by_singular_vectors(Z, y, U, v, scale)


def _by_singular_vectors(Z: Array, y: Array, U: Array, v: Array, scale: Array) -> Constraints:
    """Keep the directions in which the rows are independent."""
    P, s, Q = np.linalg.svd(U, full_matrices=False)  # Q x = diag(1/s) P^T v, where U x = v
    keep = s > DROP * max(s.max(initial=0.0), 1e-300)
    P, s, Q = P[:, keep], s[keep], Q[keep]
    b, back = (P.T @ v) / s, P / s / scale[:, None]
    size = float(np.linalg.norm(v))
    missed = float(np.linalg.norm(v - P @ (P.T @ v))) / size if size > 0 else 0.0
    if missed > MISSED:  # the flow on |Zx - y|^2 projects y in its own metric, not in that of U
        b = np.linalg.lstsq(Z @ Q.T, y, rcond=None)[0]
        missed = float(np.linalg.norm(Z @ (Q.T @ b) - y) / np.linalg.norm(y))
    return Constraints(Q, np.asarray(b, dtype=np.float64), back, missed)
