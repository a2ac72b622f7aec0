r"""Training the factors of a matrix: descent on measurements, alternation on entries.

Both minimize :math:`f(U V^T) + \tfrac{\alpha}{2} (|U|_F^2 + |V|_F^2)`, whose second term is at
least alpha times the nuclear norm of the product, with equality where the factors are balanced;
both then set alpha to 0 and go on from where they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from sklearn.utils.extmath import randomized_svd

__all__ = ["Measured", "Observed", "Trained", "alternate", "descend"]

Array = NDArray[np.float64]
BLOCK = 2**22  # numbers in the normal equations that are held at once
DEAD = 1e-6  # relative size below which decay has removed a direction


@dataclass(frozen=True)
class Trained:
    """Factors U (p, r) and V (q, r), the steps they took, and whether they have settled."""

    U: Array
    V: Array
    steps: int
    settled: bool


@dataclass(frozen=True)
class Measured:
    """f(X) = sum_i (<A_i, X> - y_i)^2 / (2m), for A of shape (m, p * q)."""

    A: Array
    y: Array
    shape: tuple[int, int]

    def value(self, U: Array, V: Array) -> float:
        """Give f(U V^T)."""
        residual = self.A @ (U @ V.T).ravel() - self.y
        return float(residual @ residual) / (2 * len(self.y))

    def gradient(self, U: Array, V: Array) -> Array:
        """Give grad f(U V^T)."""
        residual = self.A @ (U @ V.T).ravel() - self.y
        return ((residual @ self.A) / len(self.y)).reshape(self.shape)


def descend(
    f: Measured,
    U: Array,
    V: Array,
    symmetric: bool,
    alpha: float,
    off: int | None,
    steps: int,
    tol: float,
) -> Trained:
    r"""Descend on both factors until they settle under decay, or to step ``off``; then without it.

    With ``off`` None the decay stays. The step length grows while the objective falls and is
    halved where it rises. With ``symmetric`` V is U, and U moves by -(grad f + alpha) U
    (Corollary C.3).
    """
    eta, rate, settled, count = 1.0, alpha, False, 0
    decayed = off is None
    while count < steps and not (settled and decayed):
        if not decayed and (settled or count >= (off or 0)):
            rate, decayed = 0.0, True
        U, V, eta, moved = _step(f, U, V, symmetric, rate, 1.5 * eta)
        settled = moved <= tol * float(np.sqrt((U**2).sum() + (V**2).sum()))
        count += 1
    return Trained(U, V, count, settled)


def _step(
    f: Measured, U: Array, V: Array, symmetric: bool, rate: float, eta: float
) -> tuple[Array, Array, float, float]:
    """Take a step that lowers the objective; give its length in time and in space, too."""
    G, value = f.gradient(U, V), _objective(f, U, V, rate)
    GU = (G + G.T) @ U / 2 + rate * U if symmetric else G @ V + rate * U
    GV = GU if symmetric else G.T @ U + rate * V
    slope = float((GU**2).sum() + (GV**2).sum())
    while True:
        newU, newV = U - eta * GU, V - eta * GV
        fallen = value - _objective(f, newU, newV, rate)
        if fallen >= 0.1 * eta * slope or eta * eta * slope < 1e-30:
            return newU, newV, eta, eta * float(np.sqrt(slope))
        eta /= 2


def _objective(f: Measured, U: Array, V: Array, rate: float) -> float:
    """Give f(U V^T) + rate/2 (|U|^2 + |V|^2)."""
    return f.value(U, V) + 0.5 * rate * float((U**2).sum() + (V**2).sum())


@dataclass(frozen=True)
class Observed:
    """f(X) = sum over observed entries of (X_ij - Y_ij)^2 / 2: Y and its pattern, by rows."""

    Y: Any
    seen: Any

    @classmethod
    def of(cls, M: Array) -> Observed:
        """Take what is not NaN."""
        rows, columns = np.nonzero(~np.isnan(M))
        values = M[rows, columns]
        Y = csr_array((values, (rows, columns)), shape=M.shape)
        return cls(Y, csr_array((np.ones_like(values), (rows, columns)), shape=M.shape))

    def transposed(self) -> Observed:
        """Give the problem of X^T."""
        return Observed(csr_array(self.Y.T), csr_array(self.seen.T))

    def residual(self, U: Array, V: Array) -> Array:
        """Give U V^T - Y on the observed entries."""
        rows = np.repeat(np.arange(len(U)), np.diff(self.Y.indptr))
        return np.einsum("ij,ij->i", U[rows], V[self.Y.indices]) - self.Y.data


def solve_rows(problem: Observed, V: Array, alpha: float) -> Array:
    """Give the U that minimizes f(U V^T) + alpha/2 |U|^2: a small system for each row."""
    r, p = V.shape[1], problem.Y.shape[0]
    upper = np.triu_indices(r)
    products = V[:, upper[0]] * V[:, upper[1]]
    right, U, seen = problem.Y @ V, np.zeros((p, r)), problem.seen
    ridge = (alpha + 1e-12 * float((V**2).sum()) / max(1, len(V))) * np.eye(r)
    block = max(1, BLOCK // (r * r))
    for begin in range(0, p, block):
        part = slice(begin, begin + block)
        gram = np.empty((min(block, p - begin), r, r))
        gram[:, upper[0], upper[1]] = gram[:, upper[1], upper[0]] = seen[part] @ products
        U[part] = np.linalg.solve(gram + ridge, right[part][..., None])[..., 0]
    return U


def alternate(
    problem: Observed, max_rank: int, alphas: list[float], steps: int, tol: float
) -> Trained:
    """Alternate between the factors, at each alpha until they settle.

    Under decay directions of the residual whose singular value exceeds alpha are added, up to
    ``max_rank``: with none left the product minimizes f + alpha |X|_*. Without decay (a last alpha
    of 0) the directions are those that the decay has left: the fit of that rank.
    """
    U, V = np.zeros((problem.Y.shape[0], 0)), np.zeros((problem.Y.shape[1], 0))
    count, settled = 0, False
    for alpha in alphas:
        for _ in range(max_rank + 1):
            V, added = _extended(problem, U, V, alpha, max_rank)
            if not added and settled and alpha > 0:
                break
            U, V, taken, settled = _settle(problem, U, V, alpha, steps, tol)
            count += taken
            if alpha == 0 or not settled:
                break
    if not V.shape[1]:  # decay allows nothing
        return Trained(np.zeros((len(U), 1)), np.zeros((len(V), 1)), count, True)
    return Trained(U, V, count, settled)


def _extended(
    problem: Observed, U: Array, V: Array, alpha: float, max_rank: int
) -> tuple[Array, bool]:
    """Add to V the singular vectors of the residual that decay does not hold down."""
    room = max_rank - V.shape[1]
    if (alpha == 0 and V.shape[1]) or room == 0:
        return V, False
    rows = csr_array(
        (-problem.residual(U, V), problem.Y.indices, problem.Y.indptr), shape=problem.Y.shape
    )
    decomposed: Any = randomized_svd(rows, room, random_state=0)
    s, right = decomposed[1:]
    new = s > alpha * (1 + 1e-6) + 1e-12 * s.max(initial=0.0)
    return np.hstack([V, right[new].T * np.sqrt(s[new] - alpha)]), bool(new.any())


def _settle(
    problem: Observed, U: Array, V: Array, alpha: float, steps: int, tol: float
) -> tuple[Array, Array, int, bool]:
    """Alternate at one alpha; give the factors, the steps, and whether they have settled."""
    if not V.shape[1]:
        return U, V, 0, True
    turned = problem.transposed()
    for count in range(1, steps + 1):
        before = U
        U = solve_rows(problem, V, alpha)
        V = solve_rows(turned, U, alpha)
        U, V = _balanced(U, V)
        if _distance(before, U) <= tol * float(np.linalg.norm(U)):
            return U, V, count, True
    return U, V, steps, False


def _distance(before: Array, after: Array) -> float:
    """Give |before - after| of factors with as many columns; infinity otherwise."""
    if before.shape != after.shape:
        return np.inf
    signs = np.sign(np.einsum("ij,ij->j", before, after))
    return float(np.linalg.norm(before * np.where(signs == 0, 1.0, signs) - after))


def _balanced(U: Array, V: Array) -> tuple[Array, Array]:
    """Give factors of the same product with U^T U = V^T V diagonal, without dead directions."""
    QU, RU = np.linalg.qr(U)
    QV, RV = np.linalg.qr(V)
    left, s, right = np.linalg.svd(RU @ RV.T)
    keep = s > DEAD * s.max(initial=0.0)
    root = np.sqrt(s[keep])
    return (QU @ left[:, keep]) * root, (QV @ right.T[:, keep]) * root
