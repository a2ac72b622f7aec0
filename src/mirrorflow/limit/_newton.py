"""One Newton system F W F^T z = r whose weights W span hundreds of orders of magnitude."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import get_lapack_funcs

__all__ = ["NewtonSystem"]

Array = NDArray[np.float64]
Single = NDArray[np.float32]
ILL = 1e-7  # smallest pivot of the scaled Cholesky factor: below it, a QR solves instead
ROUGH = 3e-3  # smallest pivot in single precision: below it, double precision takes over
SEEN = 1e-7  # pivots of sqrt(W) F^T below it, relative to the first, are below rounding in Fx
MANY = 1000  # columns from which looking for the heavy ones pays
LIGHT = 1e-22  # columns lighter than this next to the heaviest do not reach the Gram matrix
potrf, potrs, trtrs, geqp3, ormqr = get_lapack_funcs(
    ("potrf", "potrs", "trtrs", "geqp3", "ormqr"), dtype=np.float64
)
spotrf, spotrs = get_lapack_funcs(("potrf", "potrs"), dtype=np.float32)


class NewtonSystem:
    """F diag(w) F^T, factored by Cholesky, or by a pivoted QR where it is ill conditioned.

    Parameters
    ----------
    FT : array of shape (d, r)
        F transposed.
    w : array of shape (d,)
        The weights, >= 0.
    rough : array of shape (d, r), optional
        FT in single precision. Where the system is well conditioned, a factor of that precision,
        for half the time, gives steps with a few correct digits: enough for Newton's method,
        whose residuals are exact.
    """

    def __init__(self, FT: Array, w: Array, rough: Single | None = None) -> None:
        self.FT, self.w, self.root = FT, w, np.sqrt(w)
        self.order: NDArray[np.intp] | None = None  # of the QR, once there is one
        self.complete = self.ill = False
        self.unit = 0.0  # of the factor in single precision, if that is the one in use
        if rough is None or not self._single(rough):
            self._double()

    def _single(self, rough: Single) -> bool:
        """Factor in single precision; return False where too many digits would be lost."""
        unit = float(self.root.max(initial=0.0))
        if unit == 0.0:
            return False
        KT = rough * (self.root / unit).astype(np.float32)[:, None]  # the largest weight is 1 in it
        gram = KT.T @ KT
        self.factor, failed = spotrf(gram, lower=1, clean=0)
        if failed or not _sound(self.factor, gram, ROUGH):
            return False
        self.unit = unit * unit
        return True

    def _double(self) -> None:
        """Factor in double precision."""
        KT = self._heavy() if len(self.w) > MANY else self.FT * self.root[:, None]
        gram = KT.T @ KT  # F W F^T = K K^T with K = F W^{1/2}
        self.factor, failed = potrf(gram, lower=1, clean=0)
        self.ill = failed != 0 or not _sound(self.factor, gram, ILL)

    def _heavy(self) -> Array:
        """Return sqrt(W) F^T without the rows that do not reach the Gram matrix."""
        heavy = np.flatnonzero(self.w > LIGHT * self.w.max(initial=0.0))
        if 2 * len(heavy) > len(self.w):
            return self.FT * self.root[:, None]
        return np.asarray(self.FT[heavy] * self.root[heavy, None])

    def _orthogonal(self, complete: bool) -> None:
        """Factor sqrt(W) F^T with its heavy rows first, which keeps the light ones accurate.

        (Cox and Higham 1998: Householder QR with sorted rows and column pivoting is backward
        stable row by row.) Rows far below the 2r heaviest cannot reach the factor; unless it is
        to be ``complete``, nor can those whose effect on F x is below rounding.
        """
        if self.order is not None and self.complete >= complete:
            return
        r, d = self.FT.shape[1], len(self.w)
        order = np.argsort(-self.w, kind="stable")  # heavy rows of W^{1/2} F^T first
        last = 1e-16 * self.w[order[min(2 * r, d) - 1]]
        lightest = last if complete else max(last, LIGHT * self.w[order[0]])
        self.order = order[self.w[order] > lightest]
        if not len(self.order):  # LAPACK takes no matrix without rows
            self.complete, self.seen, self.rank = complete, 0, 0
            return
        KT = np.asfortranarray(self.FT[self.order] * self.root[self.order, None])
        self.qr, pivot, self.tau, _, _ = geqp3(KT, overwrite_a=1)  # K^T P = H R, H orthogonal
        self.pivot, self.complete = pivot - 1, complete
        size = np.abs(self.qr.diagonal())  # |R_kk| falls: the numerical rank is where it stops
        first = size.max(initial=0.0)
        self.seen = int((size > SEEN * first).sum())
        self.rank = int((size > 1e-140 * first).sum())

    def solve(self, r: Array) -> Array:
        """Return z, zero in the directions whose effect on F x is below rounding."""
        if not len(r):
            return r
        if self.unit:
            z = spotrs(self.factor, r.astype(np.float32), lower=1)[0]
            return z.astype(np.float64) / self.unit
        if not self.ill:
            return potrs(self.factor, r, lower=1)[0]
        self._orthogonal(complete=False)
        k, z = self.seen, np.zeros_like(r)
        if not k:  # LAPACK takes no matrix without rows
            return z
        R = self.qr[:k, :k]
        # z is 0 beyond the k columns that are seen: R is cut to them.
        half = trtrs(R, r[self.pivot[:k]], trans=1)[0]  # K K^T z = P R^T R P^T z = r
        z[self.pivot[:k]] = trtrs(R, half)[0]
        return z

    def fit(self, u: Array, seen: bool = False) -> Array:
        """Return z that minimizes sum w_i (F_i^T z - u_i)^2; light rows keep their digits.

        With ``seen``, z is zero in the directions whose effect on F x is below rounding.
        """
        if not self.ill:
            z = self.solve(self.FT.T @ (self.w * u))  # normal equations F W F^T z = F W u
            if self.unit:  # one refinement doubles the digits
                z = z + self.solve(self.FT.T @ (self.w * (u - self.FT @ z)))
            return z
        self._orthogonal(complete=not seen)
        k, z = self.seen if seen else self.rank, np.zeros(self.FT.shape[1])
        if not k:
            return z
        right = np.asfortranarray((self.root[self.order] * u[self.order])[:, None])
        reflectors = self.qr[:, : len(self.tau)]
        # R z = H^T W^{1/2} u: unlike the normal equations it keeps the digits of light rows.
        right = ormqr("L", "T", reflectors, self.tau, right, max(1, 64 * len(right)))[0]
        z[self.pivot[:k]] = trtrs(self.qr[:k, :k], right[:k, 0])[0]
        return z


def _sound(factor: NDArray[Any], gram: NDArray[Any], least: float) -> bool:
    """Return whether no pivot has lost too much next to the diagonal it came from."""
    pivots = factor.diagonal()
    # pivot^2 / diagonal is the part of a row that those before it do not have.
    return bool((pivots * pivots > least * least * gram.diagonal()).all())
