"""The dual problem of the matrix entropy, on half-vectors of symmetric matrices."""

from __future__ import annotations

import numpy as np

from .dual import Array, ExponentialDual

__all__ = ["MatrixDual", "commutator", "smat", "svec"]


class MatrixDual(ExponentialDual):
    """X = e^{log_beta + tau} exp(2 M), M = sum theta_i Q_i, with half-vectors as coordinates."""

    def __init__(self, Q: Array, n: int, log_beta: float) -> None:
        self.Q, self.QT, self.n, self.speed, self.log_beta = Q, Q.T, n, 2.0, log_beta
        self.rows, self.columns = np.triu_indices(n)
        self.full = smat(Q, n)  # (r, n, n)
        # <S, T> counts entries off the diagonal twice.
        self.root2 = np.where(self.rows == self.columns, 1.0, np.sqrt(2.0))

    def evaluate(self, theta: Array, tau: float) -> None:
        """Compute X and its derivative in the eigenbasis of M."""
        t, self.vectors = np.linalg.eigh(2 * smat(theta @ self.Q, self.n))  # 2M = V diag(t) V^T
        self.largest = float(np.abs(t).max())
        values = np.exp(self.log_beta + tau + t)
        # X = beta e^tau exp(2M), Corollary C.3, and d X / d tau = X, diagonal in this basis.
        self.x = svec((self.vectors * values) @ self.vectors.T)
        self.mass = svec(np.diag(values))
        # D exp in the eigenbasis is diagonal, dX_ij = (s_i - s_j) / (t_i - t_j) 2 dM_ij: divided
        # differences (Daleckii and Krein), with t = log s up to a shift; the 2 is ``speed``.
        self.weight = _logarithmic_mean(values)[self.rows, self.columns]

    def basis(self) -> Array:
        """Return the rows, turned to the eigenbasis of M."""
        V, n = self.vectors, self.n
        turned = (self.full.reshape(-1, n) @ V).reshape(-1, n, n)
        turned = np.matmul(V.T, turned)  # V^T Q_i V for every i
        return (turned[:, self.rows, self.columns] * self.root2).T

    def max_exponent_change(self, step: Array) -> float:
        """Return the largest change of an exponent along a step."""
        return float(np.abs(self._eigenvalues(step)).max()) * self.speed

    def ceiling(self, theta: Array) -> float:
        """Return the largest eigenvalue: X has no negative ones."""
        return float(self._eigenvalues(theta).max())  # sup <M, X> over X >= 0 of trace 1

    def _eigenvalues(self, theta: Array) -> Array:
        values = np.linalg.eigvalsh(smat(theta @ self.Q, self.n))
        return np.asarray(values, dtype=np.float64)

    def starting_scale(self) -> float:
        """Return the scale at which X is the identity for theta = 0."""
        return -self.log_beta


def svec(X: Array) -> Array:
    """Return the half-vectors of symmetric matrices (..., n, n), with the inner product kept."""
    rows, columns = np.triu_indices(X.shape[-1])
    return X[..., rows, columns] * np.where(rows == columns, 1.0, np.sqrt(2.0))


def smat(v: Array, n: int) -> Array:
    """Return the symmetric matrices (..., n, n) of half-vectors."""
    rows, columns = np.triu_indices(n)
    X = np.empty((*v.shape[:-1], n, n))
    entries = v / np.where(rows == columns, 1.0, np.sqrt(2.0))
    X[..., rows, columns] = entries
    X[..., columns, rows] = entries
    return X


def _logarithmic_mean(s: Array) -> Array:
    """Return (s_i - s_j) / (log s_i - log s_j), and s_i where they meet."""
    low, high = np.minimum(s[:, None], s), np.maximum(s[:, None], s)
    with np.errstate(divide="ignore", invalid="ignore"):
        gap = np.log(high) - np.log(low)
        mean = high * -np.expm1(-gap) / gap  # s_i - s_j = high (1 - e^-gap), without the difference
    near = high * (1 - gap / 2 + gap**2 / 6)  # (1 - e^-g) / g to third order
    return np.where(gap < 1e-4, near, np.where(low > 0, mean, 0.0))


def commutator(Z: Array, trials: int = 3) -> float:
    """Return the relative size of [S, T] for random combinations S, T of matrices Z (n, p, p).

    It is 0 with probability 1 only if all of them commute, at the cost of a few products.
    """
    rng = np.random.default_rng(0)
    sizes = np.sqrt(np.einsum("ijk,ijk->i", Z, Z))
    keep = sizes > 0
    flat = (Z[keep] / sizes[keep, None, None]).reshape(int(keep.sum()), -1)
    worst = 0.0
    for _ in range(trials):
        # [S, T] = sum_ij a_i b_j [Z_i, Z_j] is 0 for almost no a and b unless all brackets are.
        S, T = (rng.standard_normal((2, len(flat))) @ flat).reshape(2, *Z.shape[1:])
        size = np.linalg.norm(S) * np.linalg.norm(T)
        worst = max(worst, float(np.linalg.norm(S @ T - T @ S) / size) if size > 0 else 0.0)
    return worst
