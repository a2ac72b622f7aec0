r"""Training the factors of a matrix on some of its entries, by alternating least squares.

.. math:: f(U V^T) + \tfrac{\alpha}{2} (|U|_F^2 + |V|_F^2)

is minimized, whose second term is at least alpha times the nuclear norm of the product, with
equality where the factors are balanced; then alpha is set to 0, from where they are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array, issparse
from sklearn.utils.extmath import randomized_svd

__all__ = [
    "ABOVE",
    "DEAD",
    "Observed",
    "Trained",
    "alternate",
    "balanced",
    "distance",
    "like",
    "product_at",
    "solve_rows",
]

Array = NDArray[np.float64]
BLOCK = 2**22  # numbers in the normal equations that are held at once
DEAD = 1e-6  # relative size below which decay has removed a direction
ABOVE = 1.01  # times alpha: a pull that is stronger is not one that decay balances


@dataclass(frozen=True)
class Trained:
    """Factors U (p, r) and V (q, r), the steps they took, and whether they have settled.

    ``left_out`` says that decay would have let more directions in than there were columns.
    """

    U: Array
    V: Array
    steps: int
    settled: bool
    left_out: bool = False

    def times(self, unit: float) -> Trained:
        """Give the factors of ``unit`` times the product."""
        root = np.sqrt(unit)
        return replace(self, U=root * self.U, V=root * self.V)


@dataclass(frozen=True)
class Observed:
    """f(X) = sum over observed entries of (X_ij - Y_ij)^2 / 2: Y and its pattern, by rows."""

    Y: Any
    seen: Any

    @classmethod
    def of(cls, M: Any) -> Observed:
        """Take what is not NaN, of a sparse M what is stored (zeros too) and not NaN."""
        if issparse(M):
            stored = csr_array(M, copy=True)
            stored.sum_duplicates()
            stored = stored.tocoo()
            rows, columns, values = *stored.coords, stored.data
        else:
            rows, columns = np.nonzero(~np.isnan(M))
            values = M[rows, columns]
        known = ~np.isnan(values)
        return cls.at(rows[known], columns[known], values[known].astype(np.float64), M.shape)

    @classmethod
    def at(cls, rows: Any, columns: Any, values: Array, shape: Any) -> Observed:
        """Take values at their places."""
        Y = csr_array((values, (rows, columns)), shape=shape)
        return cls(Y, csr_array((np.ones_like(Y.data), Y.indices, Y.indptr), shape=shape))

    def transposed(self) -> Observed:
        """Give the problem of X^T."""
        return Observed(csr_array(self.Y.T), csr_array(self.seen.T))

    def times(self, unit: float) -> Observed:
        """Give the problem of ``unit`` times X."""
        return replace(self, Y=like(self.Y, unit * self.Y.data))

    def pull(self, U: Array, V: Array) -> Any:
        """Give -grad f(U V^T), which is sparse."""
        return like(self.Y, self.Y.data - product_at(self.Y, U, V))

    def strongest(self, U: Array, V: Array, k: int) -> tuple[Array, Array]:
        """Give the k largest singular values of -grad f(U V^T), and (k, q) right vectors."""
        decomposed: Any = randomized_svd(self.pull(U, V), k, random_state=0)
        return decomposed[1], decomposed[2]

    def settle(
        self, U: Array, V: Array, alpha: float, steps: int, tol: float
    ) -> tuple[Array, Array, int, bool]:
        """Alternate at one alpha; give the factors, the steps, and whether they have settled."""
        turned = self.transposed()
        for count in range(1, steps + 1):
            before = U
            U = solve_rows(self, V, alpha)
            V = solve_rows(turned, U, alpha)
            U, V = balanced(U, V)
            if distance(before, U) <= tol * float(np.linalg.norm(U)):
                return U, V, count, True
        return U, V, steps, False


def like(pattern: Any, values: Array) -> Any:
    """Give a matrix with the pattern of another, zeros included."""
    return csr_array((values, pattern.indices, pattern.indptr), shape=pattern.shape)


def product_at(pattern: Any, U: Array, V: Array) -> Array:
    """Give the entries of U V^T where something is stored, in memory for one column at a time."""
    rows = np.repeat(np.arange(len(U)), np.diff(pattern.indptr))
    found = np.zeros(len(rows))
    for u, v in zip(U.T, V.T, strict=True):
        found += u[rows] * v[pattern.indices]
    return found


def solve_rows(problem: Observed, V: Array, alpha: float | Array) -> Array:
    """Give the U that minimizes f(U V^T) + alpha/2 |U|^2: a small system for each row.

    alpha may have a value for each column of U.
    """
    r, p = V.shape[1], problem.Y.shape[0]
    upper = np.triu_indices(r)
    products = V[:, upper[0]] * V[:, upper[1]]
    right, U, seen = problem.Y @ V, np.zeros((p, r)), problem.seen
    # Without decay a row with too few entries gets the shortest factor, and 0 without any.
    tiny = 1e-12 * float((V**2).sum()) / max(1, len(V)) or 1.0
    ridge = np.diag(np.broadcast_to(alpha + tiny, r))
    block = max(1, BLOCK // (r * r))
    for begin in range(0, p, block):
        part = slice(begin, begin + block)
        gram = np.empty((min(block, p - begin), r, r))
        gram[:, upper[0], upper[1]] = gram[:, upper[1], upper[0]] = seen[part] @ products
        U[part] = np.linalg.solve(gram + ridge, right[part][..., None])[..., 0]
    return U


def alternate(
    problem: Any, max_rank: int, stages: list[tuple[float, float]], steps: int
) -> Trained:
    """Train the factors at each (alpha, tol) until they settle; ``problem`` says how.

    Under decay directions of the residual whose singular value exceeds alpha are added, up to
    ``max_rank``: with none left the product minimizes f + alpha |X|_*. Without decay (a last alpha
    of 0) the directions are those that the decay has left: the fit of that rank.
    """
    U, V = np.zeros((problem.Y.shape[0], 0)), np.zeros((problem.Y.shape[1], 0))
    count, settled, left_out, decay = 0, True, False, 0.0
    for alpha, tol in stages:
        U, V, taken, settled = _stage(problem, U, V, alpha, max_rank, steps, tol)
        count, decay = count + taken, alpha or decay
        left_out = left_out or (settled and _left_out(problem, U, V, decay, max_rank))
    if not V.shape[1]:  # decay allows nothing
        return Trained(np.zeros((len(U), 1)), np.zeros((len(V), 1)), count, True)
    return Trained(U, V, count, settled, left_out)


def _stage(
    problem: Any, U: Array, V: Array, alpha: float, max_rank: int, steps: int, tol: float
) -> tuple[Array, Array, int, bool]:
    """Train at one alpha, with new directions as long as decay leaves any of them."""
    count, settled = 0, not V.shape[1]
    for number in range(max_rank + 1):
        rank = V.shape[1]
        V, added = _extended(problem, U, V, alpha, max_rank)
        if not V.shape[1] or (number and not added):
            break
        U, V, taken, settled = problem.settle(U, V, alpha, steps, tol)
        count += taken
        if not settled or (number and V.shape[1] <= rank):
            break
    return U, V, count, settled


def _extended(problem: Any, U: Array, V: Array, alpha: float, max_rank: int) -> tuple[Array, bool]:
    """Add to V the singular vectors of the residual that decay does not hold down."""
    room = max_rank - V.shape[1]
    if alpha == 0 or room == 0:
        return V, False
    s, right = problem.strongest(U, V, room)
    new = s > alpha * (1 + 1e-6)
    return np.hstack([V, right[new].T * np.sqrt(s[new] - alpha)]), bool(new.any())


def _left_out(problem: Any, U: Array, V: Array, alpha: float, max_rank: int) -> bool:
    """Whether the residual pulls harder than alpha, and there is no column for it."""
    if V.shape[1] < max_rank or max_rank == min(problem.Y.shape):
        return False
    # At the end each column balances a pull of alpha; while one still grows its pull is stronger.
    pulls = problem.strongest(U, V, max_rank + 1)[0]
    return bool(pulls.max() > ABOVE * alpha and pulls.min() > 0.9 * alpha)


def distance(before: Array, after: Array) -> float:
    """Give |before - after| of factors with as many columns; infinity otherwise."""
    if before.shape != after.shape:
        return np.inf
    signs = np.sign(np.einsum("ij,ij->j", before, after))
    return float(np.linalg.norm(before * np.where(signs == 0, 1.0, signs) - after))


def balanced(U: Array, V: Array) -> tuple[Array, Array]:
    """Give factors of the same product with U^T U = V^T V diagonal, without dead directions."""
    QU, RU = np.linalg.qr(U)
    QV, RV = np.linalg.qr(V)
    left, s, right = np.linalg.svd(RU @ RV.T)
    keep = s > DEAD * s.max(initial=0.0)
    root = np.sqrt(s[keep])
    return (QU @ left[:, keep]) * root, (QV @ right.T[:, keep]) * root
