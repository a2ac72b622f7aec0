r"""Training the factors of a matrix on some of its entries, by alternating least squares.

.. math:: f(U V^T) + \tfrac{\alpha}{2} (|U|_F^2 + |V|_F^2)

is minimized, whose second term is at least alpha times the nuclear norm of the product, with
equality where the factors are balanced; then alpha is set to 0, from where they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.sparse import csr_array, issparse
from scipy.sparse.linalg import eigsh
from sklearn.utils.extmath import randomized_svd

__all__ = [
    "ABOVE",
    "DEAD",
    "Observed",
    "OffsetObserved",
    "SymmetricObserved",
    "Trained",
    "alternate",
    "balanced",
    "distance",
    "entries",
    "path",
    "product_at",
    "solve_rows",
    "solve_with_offsets",
    "with_values",
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
        """Return the factors of ``unit`` times the product."""
        root = np.sqrt(unit)  # each factor takes half of it
        return replace(self, U=root * self.U, V=root * self.V)


@dataclass(frozen=True)
class Observed:
    """f(X) = sum over observed entries of (X_ij - Y_ij)^2 / 2: Y and its pattern, by rows."""

    Y: Any
    seen: Any

    @classmethod
    def of(cls, M: Any) -> Observed:
        """Take what is not NaN, of a sparse M what is stored (zeros included) and not NaN."""
        return cls.from_entries(*entries(M), M.shape)

    @classmethod
    def from_entries(cls, rows: Any, columns: Any, values: Array, shape: Any) -> Observed:
        """Take values at their places."""
        Y = csr_array((values, (rows, columns)), shape=shape)
        return cls(Y, csr_array((np.ones_like(Y.data), Y.indices, Y.indptr), shape=shape))

    def transposed(self) -> Observed:
        """Return the problem of X^T."""
        return Observed(csr_array(self.Y.T), csr_array(self.seen.T))

    def times(self, unit: float) -> Observed:
        """Return the problem of ``unit`` times X."""
        return replace(self, Y=with_values(self.Y, unit * self.Y.data))

    def negative_gradient(self, U: Array, V: Array) -> Any:
        """Return -grad f(U V^T), which is sparse."""
        return with_values(self.Y, self.Y.data - product_at(self.Y, U, V))

    def strongest(self, U: Array, V: Array, k: int) -> tuple[Array, Array]:
        """Return the k largest singular values of -grad f(U V^T), and (k, q) right vectors."""
        decomposed: Any = randomized_svd(self.negative_gradient(U, V), k, random_state=0)
        return decomposed[1], decomposed[2]

    def fit(
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


def entries(M: Any) -> tuple[Any, Any, Array]:
    """Return rows, columns and values of what is known of M, row by row."""
    if issparse(M):
        stored = csr_array(M, copy=True)
        stored.sum_duplicates()
        stored = stored.tocoo()
        rows, columns, values = stored.row, stored.col, stored.data
    else:
        rows, columns = np.nonzero(~np.isnan(M))
        values = M[rows, columns]
    known = ~np.isnan(values)
    return rows[known], columns[known], values[known].astype(np.float64)


def with_values(pattern: Any, values: Array) -> Any:
    """Return a matrix with the pattern of another, zeros included."""
    return csr_array((values, pattern.indices, pattern.indptr), shape=pattern.shape)


def product_at(pattern: Any, U: Array, V: Array) -> Array:
    """Return the entries of U V^T where something is stored, in memory for one column at a time."""
    rows = np.repeat(np.arange(len(U)), np.diff(pattern.indptr))
    found = np.zeros(len(rows))
    for u, v in zip(U.T, V.T, strict=True):
        found += u[rows] * v[pattern.indices]
    return found


def solve_rows(problem: Observed, V: Array, alpha: float | Array) -> Array:
    """Return the U that minimizes f(U V^T) + alpha/2 |U|^2: a small system for each row.

    alpha may have a value for each column of U.
    """
    r, p = V.shape[1], problem.Y.shape[0]
    upper = np.triu_indices(r)
    # One sparse product with the entries of all v_j v_j^T gives the Gram matrix of every row.
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
        # (sum_j v_j v_j^T + alpha) u_i = sum_j Y_ij v_j over the entries of row i.
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
    count, left_out, decay = 0, False, 0.0
    found = Trained(np.zeros((problem.Y.shape[0], 0)), np.zeros((problem.Y.shape[1], 0)), 0, True)
    for (alpha, _), found in zip(stages, path(problem, max_rank, stages, steps), strict=True):
        count, decay = count + found.steps, alpha or decay
        U, V = found.U, found.V
        left_out = left_out or (found.settled and _left_out(problem, U, V, decay, max_rank))
    if not found.V.shape[1]:  # decay allows nothing
        U, V = np.zeros((len(found.U), 1)), np.zeros((len(found.V), 1))
        return Trained(U, V, count, True)
    return replace(found, steps=count, left_out=left_out)


def path(
    problem: Any, max_rank: int, stages: list[tuple[float, float]], steps: int
) -> Iterator[Trained]:
    """Train at one (alpha, tol) after the other, each from where the one before has ended."""
    U, V = np.zeros((problem.Y.shape[0], 0)), np.zeros((problem.Y.shape[1], 0))
    for alpha, tol in stages:
        U, V, taken, settled = _stage(problem, U, V, alpha, max_rank, steps, tol)
        yield Trained(U, V, taken, settled)


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
        U, V, taken, settled = problem.fit(U, V, alpha, steps, tol)
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
    # Decay leaves s - alpha of a singular value s, and a balanced factor has the root of it.
    return np.hstack([V, right[new].T * np.sqrt(s[new] - alpha)]), bool(new.any())


def _left_out(problem: Any, U: Array, V: Array, alpha: float, max_rank: int) -> bool:
    """Whether the residual pulls harder than alpha, and there is no column for it."""
    if V.shape[1] < max_rank or max_rank == min(problem.Y.shape):
        return False
    # At the end each column balances a pull of alpha; while one still grows its pull is stronger.
    pulls = problem.strongest(U, V, max_rank + 1)[0]
    return bool(pulls.max() > ABOVE * alpha and pulls.min() > 0.9 * alpha)


def distance(before: Array, after: Array) -> float:
    """Return |before - after| of factors with as many columns; infinity otherwise."""
    if before.shape != after.shape:
        return np.inf
    # (-u)(-v)^T = u v^T: a column has no sign of its own.
    signs = np.sign(np.einsum("ij,ij->j", before, after))
    return float(np.linalg.norm(before * np.where(signs == 0, 1.0, signs) - after))


def balanced(U: Array, V: Array) -> tuple[Array, Array]:
    """Return factors of the same product with U^T U = V^T V diagonal, without dead directions."""
    QU, RU = np.linalg.qr(U)
    QV, RV = np.linalg.qr(V)
    left, s, right = np.linalg.svd(RU @ RV.T)  # U V^T = QU (RU RV^T) QV^T
    keep = s > DEAD * s.max(initial=0.0)
    root = np.sqrt(s[keep])
    return (QU @ left[:, keep]) * root, (QV @ right.T[:, keep]) * root


# Training factors beside offsets of rows and columns.
#
# .. math:: X_{ij} = (U V^T)_{ij} + a_i + b_j, \quad
#    \text{penalty} \; \tfrac{\beta}{2} \sum_i a_i^2 + \tfrac{\beta}{2} \sum_j (b_j - m)^2
#
# with m the mean of the entries; beta counts entries: a_i alone is the mean of what is known of
# its row, times n_i / (n_i + beta). The offsets are one more column of each factor, beside a column
# of ones in the other: each step of the alternation solves for both.


TOL = 1e-12  # of the offsets before there are factors, relative to the largest entry
STEPS = 1000  # at most for them: the factors' own steps go on with them


@dataclass
class Offsets:
    """a of the rows and b of the columns; they change with the factors.

    Without a penalty a has mean 0: only the sums a_i + b_j matter.
    """

    a: Array
    b: Array
    penalty: float = 0.0
    level: float = 0.0

    def times(self, unit: float) -> Offsets:
        """Return the offsets of ``unit`` times X."""
        return Offsets(unit * self.a, unit * self.b, self.penalty, unit * self.level)

    def keep(self, a: Array, b: Array, seen: Any) -> None:
        """Take new ones; a row without an entry gets 0, such a column the mean of the others."""
        if self.penalty > 0:  # which has decided both
            self.a, self.b = a, b
            return
        rows, columns = (np.asarray(seen.sum(axis=axis)).ravel() > 0 for axis in (1, 0))
        level = a[rows].mean()  # a - level and b + level have the same sums
        self.a = np.where(rows, a - level, 0.0)
        self.b = np.where(columns, b + level, (b[columns] + level).mean())


@dataclass(frozen=True)
class OffsetObserved(Observed):
    """f(X) of what the offsets leave; they start at their fit without factors."""

    offsets: Offsets = field(default_factory=lambda: Offsets(np.zeros(0), np.zeros(0)))

    @classmethod
    def penalized(cls, M: Any, penalty: float) -> OffsetObserved:
        """Take what is known of M, and fit the offsets alone."""
        plain = Observed.of(M)
        values = plain.Y.data
        level = float(values.mean()) if len(values) else 0.0
        p, q = M.shape
        problem = cls(plain.Y, plain.seen, Offsets(np.zeros(p), np.full(q, level), penalty, level))
        if not len(values):
            return problem
        start, empty, size = problem.offsets, np.zeros((q, 0)), float(np.abs(values).max())
        for _ in range(STEPS):
            before = start.a
            problem.alternated(empty, 0.0)
            if np.abs(start.a - before).max() <= TOL * size:
                break
        return problem

    def times(self, unit: float) -> OffsetObserved:
        """Return the problem of ``unit`` times X."""
        scaled = with_values(self.Y, unit * self.Y.data)
        return replace(self, Y=scaled, offsets=self.offsets.times(unit))

    def negative_gradient(self, U: Array, V: Array) -> Any:
        """Return -grad f, which is sparse."""
        left, right = _beside(U, self.offsets.a), _beside(V, 1.0)
        return Observed.negative_gradient(without(self, self.offsets.b), left, right)

    def alternated(self, V: Array, alpha: float) -> tuple[Array, Array]:
        """Solve for U and a, then for V and b."""
        penalty, level = self.offsets.penalty, self.offsets.level
        U, a = solve_with_offsets(self, V, self.offsets.b, alpha, penalty)
        V, b = solve_with_offsets(self.transposed(), U, a + level, alpha, penalty)
        # The penalty is on b - m, which is what was solved for beside a + m.
        self.offsets.keep(a, b + level, self.seen)
        return U, V

    def fit(
        self, U: Array, V: Array, alpha: float, steps: int, tol: float
    ) -> tuple[Array, Array, int, bool]:
        """Alternate at one alpha; give the factors, the steps, and whether all have settled."""
        for count in range(1, steps + 1):
            before, a = U, self.offsets.a
            U, V = balanced(*self.alternated(V, alpha))
            # |a 1^T - a_before 1^T|, beside the norm of U V^T.
            moved = np.sqrt(len(V)) * np.linalg.norm(self.offsets.a - a)
            size = float(np.linalg.norm(U.T @ U))  # of the product: the factors are balanced
            if distance(before, U) <= tol * np.linalg.norm(U) and moved <= tol * size:
                return U, V, count, True
        return U, V, steps, False


def without(problem: Observed, b: Array) -> Observed:
    """Return the problem without offsets of its columns."""
    return Observed(with_values(problem.Y, problem.Y.data - b[problem.Y.indices]), problem.seen)


def _beside(U: Array, column: Array | float) -> Array:
    """Add a column."""
    return np.column_stack([U, np.broadcast_to(column, len(U))])


def solve_with_offsets(
    problem: Observed, V: Array, b: Array, alpha: float, penalty: float = 0.0
) -> tuple[Array, Array]:
    """Return the U and a that minimize f(U V^T + a + b) + alpha/2 |U|^2 + penalty/2 |a|^2."""
    penalties = np.r_[np.full(V.shape[1], alpha), penalty]
    found = solve_rows(without(problem, b), _beside(V, 1.0), penalties)
    return found[:, :-1], found[:, -1]


# Training U of a symmetric, positive semi-definite matrix U U^T on some of its entries.
#
# :math:`f(U U^T) + \alpha |U|_F^2` is minimized by L-BFGS: its stationary points are those of
# gradient descent on U under decay, and :math:`|U|_F^2` is the trace of the product.


DENSE = 200  # rows up to which all eigenvalues are computed at once
FLOOR = 1e-7  # a gradient that line searches cannot lower for rounding, in units of the data


@dataclass(frozen=True)
class SymmetricObserved(Observed):
    """f of a symmetric X: each entry that is known counts half for its place and half for (j, i).

    ``Y`` is symmetric, with the mean where both are known; ``seen`` has the weights 1/2 and 1.
    """

    @classmethod
    def from_entries(cls, rows: Any, columns: Any, values: Array, shape: Any) -> SymmetricObserved:
        """Take values at their places and at the mirrored ones."""
        places = np.r_[rows, columns], np.r_[columns, rows]
        sums: Any = csr_array((np.r_[values, values], places), shape=shape)
        # 2 on the diagonal, and where (i, j) and (j, i) are both known.
        counts: Any = csr_array((np.ones(2 * len(values)), places), shape=shape)
        Y = csr_array((sums.data / counts.data, sums.indices, sums.indptr), shape=shape)
        return cls(Y, csr_array((counts.data / 2, sums.indices, sums.indptr), shape=shape))

    def negative_gradient(self, U: Array, V: Array) -> Any:
        """Return -grad f(U V^T), which is sparse and, where V is U, symmetric."""
        values = self.seen.data * (self.Y.data - product_at(self.Y, U, V))
        return csr_array((values, self.Y.indices, self.Y.indptr), shape=self.Y.shape)

    def strongest(self, U: Array, V: Array, k: int) -> tuple[Array, Array]:
        """Return the k largest eigenvalues of -grad f(U V^T), and (k, q) eigenvectors."""
        G, n = self.negative_gradient(U, V), self.Y.shape[0]
        if n <= max(DENSE, k + 1):
            s, L = np.linalg.eigh(G.toarray())
        else:
            s, L = eigsh(G, k, which="LA", v0=np.ones(n))
        largest = np.argsort(s)[::-1][:k]
        return s[largest], L[:, largest].T

    def fit(
        self, U: Array, V: Array, alpha: float, steps: int, tol: float
    ) -> tuple[Array, Array, int, bool]:
        """Minimize at one alpha from V; give U twice, the steps, and whether it has settled."""

        def objective(flat: Array) -> tuple[float, Array]:
            W = flat.reshape(V.shape)
            residual = self.Y.data - product_at(self.Y, W, W)
            value = 0.5 * float(self.seen.data @ residual**2) + alpha * float(flat @ flat)
            # grad of f(W W^T) + alpha |W|^2 = 2 (grad f + alpha) W, grad f being symmetric.
            return value, 2 * (alpha * W - self.negative_gradient(W, W) @ W).ravel()

        limits: Any = {"maxiter": steps, "maxfun": 5 * steps, "ftol": 0.0, "gtol": 0.1 * tol}
        found = minimize(objective, V.ravel(), jac=True, method="L-BFGS-B", options=limits)
        settled = float(np.abs(found.jac).max()) <= max(0.1 * tol, FLOOR)
        L, s, _ = np.linalg.svd(found.x.reshape(V.shape), full_matrices=False)  # W W^T = L s^2 L^T
        keep = s**2 > DEAD * s.max(initial=0.0) ** 2
        W = L[:, keep] * s[keep]
        return W, W, int(found.nit), settled
