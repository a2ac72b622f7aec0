r"""Training factors beside offsets of rows and columns that are not penalized.

.. math:: X_{ij} = (U V^T)_{ij} + a_i + b_j

The offsets are one more column of each factor, beside a column of ones in the other: each step of
the alternation solves for both.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .factors import Observed, balanced, distance, like, solve_rows

__all__ = ["CentredObserved", "solve_centred"]

Array = NDArray[np.float64]
TOL = 1e-12  # of the offsets before there are factors, relative to the largest entry
STEPS = 1000  # at most for them: the factors' own steps go on with them


@dataclass
class Offsets:
    """a of the rows, with mean 0, and b of the columns; they change with the factors."""

    a: Array
    b: Array

    def keep(self, a: Array, b: Array, seen: Any) -> None:
        """Take new ones; a row without an entry gets 0, such a column the mean of the others."""
        rows, columns = (np.asarray(seen.sum(axis=axis)).ravel() > 0 for axis in (1, 0))
        level = a[rows].mean()
        self.a = np.where(rows, a - level, 0.0)
        self.b = np.where(columns, b + level, (b[columns] + level).mean())


@dataclass(frozen=True)
class CentredObserved(Observed):
    """f(X) of what the offsets leave; they start at their fit without factors."""

    offsets: Offsets = field(default_factory=lambda: Offsets(np.zeros(0), np.zeros(0)))

    @classmethod
    def at(cls, rows: Any, columns: Any, values: Array, shape: Any) -> CentredObserved:
        """Take values at their places, and fit the offsets alone."""
        plain = Observed.at(rows, columns, values, shape)
        start = Offsets(np.zeros(shape[0]), np.zeros(shape[1]))
        problem = cls(plain.Y, plain.seen, start)
        if not len(values):
            return problem
        empty, size = np.zeros((shape[1], 0)), float(np.abs(values).max(initial=0.0))
        for _ in range(STEPS):
            before = start.a
            problem.alternated(empty, 0.0)
            if np.abs(start.a - before).max() <= TOL * size:
                break
        return problem

    def times(self, unit: float) -> CentredObserved:
        """Give the problem of ``unit`` times X."""
        scaled = Offsets(unit * self.offsets.a, unit * self.offsets.b)
        return replace(self, Y=like(self.Y, unit * self.Y.data), offsets=scaled)

    def pull(self, U: Array, V: Array) -> Any:
        """Give -grad f, which is sparse."""
        left, right = _beside(U, self.offsets.a), _beside(V, 1.0)
        return Observed.pull(without(self, self.offsets.b), left, right)

    def alternated(self, V: Array, alpha: float) -> tuple[Array, Array]:
        """Solve for U and a, then for V and b."""
        U, a = solve_centred(self, V, self.offsets.b, alpha)
        V, b = solve_centred(self.transposed(), U, a, alpha)
        self.offsets.keep(a, b, self.seen)
        return U, V

    def settle(
        self, U: Array, V: Array, alpha: float, steps: int, tol: float
    ) -> tuple[Array, Array, int, bool]:
        """Alternate at one alpha; give the factors, the steps, and whether all have settled."""
        for count in range(1, steps + 1):
            before, a = U, self.offsets.a
            U, V = balanced(*self.alternated(V, alpha))
            moved = np.sqrt(len(V)) * np.linalg.norm(self.offsets.a - a)
            size = float(np.linalg.norm(U.T @ U))  # of the product: the factors are balanced
            if distance(before, U) <= tol * np.linalg.norm(U) and moved <= tol * size:
                return U, V, count, True
        return U, V, steps, False


def without(problem: Observed, b: Array) -> Observed:
    """Give the problem without offsets of its columns."""
    return Observed(like(problem.Y, problem.Y.data - b[problem.Y.indices]), problem.seen)


def _beside(U: Array, column: Array | float) -> Array:
    """Add a column."""
    return np.column_stack([U, np.broadcast_to(column, len(U))])


def solve_centred(problem: Observed, V: Array, b: Array, alpha: float) -> tuple[Array, Array]:
    """Give the U and a that minimize f(U V^T + a + b) + alpha/2 |U|^2."""
    penalties = np.r_[np.full(V.shape[1], alpha), 0.0]
    found = solve_rows(without(problem, b), _beside(V, 1.0), penalties)
    return found[:, :-1], found[:, -1]
