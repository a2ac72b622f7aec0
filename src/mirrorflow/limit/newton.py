"""One Newton system F W F^T z = r whose weights W span hundreds of orders of magnitude."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import get_lapack_funcs

__all__ = ["NewtonSystem"]

Array = NDArray[np.float64]
ILL = 1e-7  # smallest pivot of the scaled Cholesky factor: below it, a QR solves instead
SEEN = 1e-7  # pivots of sqrt(W) F^T below it, relative to the first, are below rounding in Fx
LIGHT = 1e-22  # columns lighter than this next to the heaviest do not reach the Gram matrix
potrf, potrs, trtrs, geqp3, ormqr = get_lapack_funcs(
    ("potrf", "potrs", "trtrs", "geqp3", "ormqr"), dtype=np.float64
)


class NewtonSystem:
    """F diag(w) F^T, factored by Cholesky, or by a pivoted QR where it is ill conditioned.

    Parameters
    ----------
    FT : array of shape (d, r)
        F transposed.
    w : array of shape (d,)
        The weights, >= 0.
    """

    def __init__(self, FT: Array, w: Array) -> None:
        self.FT, self.w = FT, w
        root = np.sqrt(w)
        heavy = np.flatnonzero(w > LIGHT * w.max(initial=0.0))
        KT = FT * root[:, None] if 2 * len(heavy) > len(w) else FT[heavy] * root[heavy, None]
        gram = KT.T @ KT
        diagonal = gram.diagonal()
        self.scale = 1 / np.sqrt(np.where(diagonal > 0, diagonal, 1.0))
        gram *= self.scale
        gram *= self.scale[:, None]
        self.factor, failed = potrf(gram, lower=1, clean=0, overwrite_a=1)
        self.ill = failed != 0 or not self.factor.diagonal().min(initial=1.0) > ILL
        if self.ill:
            self._orthogonal(root)

    def _orthogonal(self, root: Array) -> None:
        """Factor sqrt(W) F^T with its heavy rows first, which keeps the light ones accurate.

        (Cox and Higham 1998: Householder QR with sorted rows and column pivoting is backward
        stable row by row.) Columns far below the 2r heaviest cannot reach the factor.
        """
        r, d = self.FT.shape[1], len(self.w)
        order = np.argsort(-self.w, kind="stable")
        last = self.w[order[min(2 * r, d) - 1]]
        self.order = order[self.w[order] > 1e-16 * last]
        KT = np.asfortranarray(self.FT[self.order] * root[self.order, None])
        self.qr, pivot, self.tau, _, _ = geqp3(KT, overwrite_a=1)
        self.pivot = pivot - 1
        size = np.abs(self.qr.diagonal())
        first = size.max(initial=0.0)
        self.seen = int((size > SEEN * first).sum())
        self.rank = int((size > 1e-140 * first).sum())

    def solve(self, r: Array) -> Array:
        """Give z, zero in the directions whose effect on F x is below rounding."""
        if not len(r):
            return r
        if not self.ill:
            return potrs(self.factor, r * self.scale, lower=1)[0] * self.scale
        k, z = self.seen, np.zeros_like(r)
        R = self.qr[:k, :k]
        half = trtrs(R, r[self.pivot[:k]], trans=1)[0]
        z[self.pivot[:k]] = trtrs(R, half)[0]
        return z

    def fit(self, u: Array, seen: bool = False) -> Array:
        """Give z that minimizes sum w_i (F_i^T z - u_i)^2; light rows keep their digits.

        With ``seen``, z is zero in the directions whose effect on F x is below rounding.
        """
        if not self.ill:
            return self.solve(self.FT.T @ (self.w * u))
        k, z = self.seen if seen else self.rank, np.zeros(self.FT.shape[1])
        right = np.asfortranarray((np.sqrt(self.w[self.order]) * u[self.order])[:, None])
        right = ormqr("L", "T", self.qr, self.tau, right, max(1, 64 * len(right)))[0]
        z[self.pivot[:k]] = trtrs(self.qr[:k, :k], right[:k, 0])[0]
        return z
