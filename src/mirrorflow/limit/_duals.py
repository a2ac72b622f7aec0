r"""Dual problems whose potential is a sum of exponentials: Q x(theta) = b in r unknowns.

Each has a log-scale tau that is added to log A: at large tau the problem is nearly quadratic, and
the continuation follows the solution down to the wanted scale.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

__all__ = [
    "ColumnDual",
    "ExponentialDual",
    "HyperbolicDual",
    "MatrixDual",
    "OneSidedDual",
    "commutator",
    "smat",
    "svec",
]

Array = NDArray[np.float64]
LARGE = 5_000_000  # r^2 d, from which Newton steps are computed in single precision
APART = 1e-9  # distance from b to the x of the right signs at which there is no solution


class ExponentialDual(ABC):
    """x(theta, tau) = grad of a sum of exponentials in Q^T theta, scaled by e^tau.

    After `place`, in coordinates in which the Hessian of the potential is diagonal:

    Attributes
    ----------
    x : array of shape (d,)
        The point, in the coordinates of the rows Q.
    mass, weight : arrays of shape (d,)
        x, and the Hessian's diagonal divided by ``speed``; d x / d tau at fixed theta is x.
    largest : float
        The largest exponent in size.
    speed : float
        The rate of the exponentials in Q^T theta: it bounds how fast curvature changes.
    """

    speed: float
    Q: Array
    QT: Array
    x: Array
    mass: Array
    weight: Array
    largest: float

    @property
    def rough(self) -> NDArray[np.float32] | None:
        """F^T in single precision, where systems are so large that it pays."""
        return None

    @abstractmethod
    def place(self, theta: Array, tau: float) -> None:
        """Compute the attributes above at (theta, tau)."""

    @abstractmethod
    def frame(self) -> Array:
        """Give F^T (d, r): the rows Q in the coordinates of ``mass``, transposed."""

    @abstractmethod
    def reach(self, step: Array) -> float:
        """Give the largest change of an exponent along a step."""

    @abstractmethod
    def ceiling(self, theta: Array) -> float:
        """Give sup <theta, Qx> over x in the domain with norm (L1, or trace) 1."""

    @abstractmethod
    def easy(self) -> float:
        """Give a scale tau at which x(0, tau) has size about 1."""

    def excludes(self, b: Array, theta: Array) -> bool:
        """Whether ``theta`` proves that no x in the domain has Qx = b.

        <theta, b> <= ceiling(theta) |x| for every x with Qx = b: where the left side is much
        larger, a solution would have to be absurdly large (Farkas).
        """
        gain = float(theta @ b)
        return gain > 0 and self.ceiling(theta) * 1e4 < gain


class ColumnDual(ExponentialDual):
    """A dual with one exponent for each column of Q: t = s Q^T theta + shift, or sigma times it."""

    one_sided: bool  # whether x keeps its signs

    def __init__(self, Q: Array, speed: float, shift: Array | float) -> None:
        self.Q, self.QT, self.speed, self.shift = Q, np.ascontiguousarray(Q.T), speed, shift
        self.large = self.QT.size * len(Q) > LARGE

    @cached_property
    def rough(self) -> NDArray[np.float32] | None:
        """Q^T in single precision, where systems are so large that it pays."""
        return self.QT.astype(np.float32) if self.large else None

    def frame(self) -> Array:
        """Give Q^T."""
        return self.QT

    def reach(self, step: Array) -> float:
        """Give the largest change of an exponent along a step."""
        return float(self.speed * np.abs(self.QT @ step).max(initial=0.0))

    @abstractmethod
    def log_scale(self, tau: float) -> Array:
        """Give log(|x| e^-t) for large exponents t."""

    @abstractmethod
    def turn(self) -> Array | float:
        """Give the signs that x keeps, or 1."""

    def signed(self) -> Array:
        """Give Q, its columns turned to the signs that x keeps, if it does."""
        return self.Q * self.turn() if self.one_sided else self.Q


class HyperbolicDual(ColumnDual):
    """x = A sinh(s Q^T theta + rho)."""

    one_sided = False

    def __init__(self, Q: Array, log_A: Array, rho: Array, speed: float) -> None:
        super().__init__(Q, speed, rho)
        self.log_half = log_A - np.log(2.0)

    def place(self, theta: Array, tau: float) -> None:
        """Compute x and its derivative; see `ExponentialDual`."""
        t = self.QT @ (self.speed * theta)
        t += self.shift
        size = np.abs(t)
        half = np.exp(self.log_half + (tau + size))  # never e^t alone
        size *= -2
        self.largest = -0.5 * float(size.min(initial=0.0))
        self.weight = half + half * np.exp(size)  # A cosh t
        self.x = self.mass = np.copysign(half * np.expm1(size), t)

    def ceiling(self, theta: Array) -> float:
        """Give the largest |<theta, Qx>|, of either sign."""
        return float(np.abs(self.QT @ theta).max(initial=0.0))

    def easy(self) -> float:
        """Give the scale at which the largest x(0) is about 1."""
        return -float((self.log_half + np.abs(self.shift)).max(initial=-np.inf))

    def log_scale(self, tau: float) -> Array:
        """Give log(A/2)."""
        return self.log_half + tau

    def turn(self) -> float:
        """Give 1: x has either sign."""
        return 1.0


class OneSidedDual(ColumnDual):
    """x = sigma X_0 e^{tau + s sigma Q^T theta}, sigma = +-1 per coordinate."""

    one_sided = True

    def __init__(self, Q: Array, log_x0: Array, sign: Array, speed: float) -> None:
        super().__init__(Q, speed, 0.0)
        self.log_x0, self.sign = log_x0, sign

    def place(self, theta: Array, tau: float) -> None:
        """Compute x and its derivative; see `ExponentialDual`."""
        t = self.speed * self.sign * (self.QT @ theta)
        self.largest = float(np.abs(t).max(initial=0.0))
        self.weight = np.exp(self.log_x0 + tau + t)
        self.x = self.mass = self.sign * self.weight

    def ceiling(self, theta: Array) -> float:
        """Give the largest <theta, Qx> for the signs that x has."""
        return float((self.sign * (self.QT @ theta)).max(initial=0.0))

    def easy(self) -> float:
        """Give the scale at which the largest x(0) is about 1."""
        return -float(self.log_x0.max(initial=-np.inf))

    def log_scale(self, tau: float) -> Array:
        """Give log X_0."""
        return self.log_x0 + tau

    def turn(self) -> Array:
        """Give sigma."""
        return self.sign

    def excludes(self, b: Array, theta: Array) -> bool:
        """Whether b, of norm 1 or 0, is outside the cone of the columns of Q with their signs."""
        return float(nnls(self.Q * self.sign, b)[1]) > APART


# The dual of the matrix entropy, on half-vectors of symmetric matrices.

Array = NDArray[np.float64]


class MatrixDual(ExponentialDual):
    """X = e^{log_beta + tau} exp(2 M), M = sum theta_i Q_i, with half-vectors as coordinates."""

    def __init__(self, Q: Array, n: int, log_beta: float) -> None:
        self.Q, self.QT, self.n, self.speed, self.log_beta = Q, Q.T, n, 2.0, log_beta
        self.rows, self.columns = np.triu_indices(n)
        self.full = smat(Q, n)  # (r, n, n)
        self.root2 = np.where(self.rows == self.columns, 1.0, np.sqrt(2.0))

    def place(self, theta: Array, tau: float) -> None:
        """Compute X and its derivative in the eigenbasis of M."""
        t, self.vectors = np.linalg.eigh(2 * smat(theta @ self.Q, self.n))
        self.largest = float(np.abs(t).max())
        values = np.exp(self.log_beta + tau + t)
        self.x = svec((self.vectors * values) @ self.vectors.T)
        self.mass = svec(np.diag(values))
        # d exp in the eigenbasis is diagonal: divided differences (Daleckii and Krein).
        self.weight = _logarithmic_mean(values)[self.rows, self.columns]

    def frame(self) -> Array:
        """Give the rows, turned to the eigenbasis of M."""
        V, n = self.vectors, self.n
        turned = (self.full.reshape(-1, n) @ V).reshape(-1, n, n)
        turned = np.matmul(V.T, turned)
        return (turned[:, self.rows, self.columns] * self.root2).T

    def reach(self, step: Array) -> float:
        """Give the largest change of an exponent along a step."""
        return float(np.abs(self._eigenvalues(step)).max()) * self.speed

    def ceiling(self, theta: Array) -> float:
        """Give the largest eigenvalue: X has no negative ones."""
        return float(self._eigenvalues(theta).max())

    def _eigenvalues(self, theta: Array) -> Array:
        values = np.linalg.eigvalsh(smat(theta @ self.Q, self.n))
        return np.asarray(values, dtype=np.float64)

    def easy(self) -> float:
        """Give the scale at which X is the identity for theta = 0."""
        return -self.log_beta


def svec(X: Array) -> Array:
    """Give the half-vectors of symmetric matrices (..., n, n), with the inner product kept."""
    rows, columns = np.triu_indices(X.shape[-1])
    return X[..., rows, columns] * np.where(rows == columns, 1.0, np.sqrt(2.0))


def smat(v: Array, n: int) -> Array:
    """Give the symmetric matrices (..., n, n) of half-vectors."""
    rows, columns = np.triu_indices(n)
    X = np.empty((*v.shape[:-1], n, n))
    entries = v / np.where(rows == columns, 1.0, np.sqrt(2.0))
    X[..., rows, columns] = entries
    X[..., columns, rows] = entries
    return X


def _logarithmic_mean(s: Array) -> Array:
    """Give (s_i - s_j) / (log s_i - log s_j), and s_i where they meet."""
    low, high = np.minimum(s[:, None], s), np.maximum(s[:, None], s)
    with np.errstate(divide="ignore", invalid="ignore"):
        gap = np.log(high) - np.log(low)
        mean = high * -np.expm1(-gap) / gap
    near = high * (1 - gap / 2 + gap**2 / 6)
    return np.where(gap < 1e-4, near, np.where(low > 0, mean, 0.0))


def commutator(Z: Array, trials: int = 3) -> float:
    """Give the relative size of [S, T] for random combinations S, T of the matrices Z_i (n, p, p).

    It is 0 with probability 1 only if all of them commute, at the cost of a few products.
    """
    rng = np.random.default_rng(0)
    sizes = np.sqrt(np.einsum("ijk,ijk->i", Z, Z))
    keep = sizes > 0
    flat = (Z[keep] / sizes[keep, None, None]).reshape(int(keep.sum()), -1)
    worst = 0.0
    for _ in range(trials):
        S, T = (rng.standard_normal((2, len(flat))) @ flat).reshape(2, *Z.shape[1:])
        size = np.linalg.norm(S) * np.linalg.norm(T)
        worst = max(worst, float(np.linalg.norm(S @ T - T @ S) / size) if size > 0 else 0.0)
    return worst
