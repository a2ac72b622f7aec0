r"""Training on matrix sensing: many scenarios of U U^T together, and the linear model X.

The loss is f(X) = 1/(2m) sum_i (<A_i, X> - y_i)^2 with symmetric A_i. Everything runs on half
vectors (the upper triangle): the row H_i holds A_i with its off-diagonal entries doubled, so that
<A_i, X> = H_i x, and one matrix H of shape (m, n(n+1)/2) serves both directions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigvalsh

__all__ = ["METRICS", "Curves", "Scenario", "SensingProblem", "train_factor", "train_linear"]

Array = NDArray[np.float64]
Watch = Callable[[int, "dict[str, Array]"], None]

METRICS = ("train", "error", "nuclear")
SMALL_BATCH = 4  # up to this many rows, products by vectors are faster than BLAS's packed product
STABLE = 1.9  # of the curvature times the step: at 2, gradient descent on X no longer converges
SETTLED = 1e-15  # relative change in a step below which X has arrived in this precision


@dataclass(frozen=True)
class Scenario:
    """Decay ``alpha`` in every step before ``off`` (in all of them if it is None)."""

    alpha: float
    off: int | None = None

    def rate(self, step: int) -> float:
        """Return the decay at a step."""
        return self.alpha if self.off is None or step < self.off else 0.0

    def until(self, step: int) -> Scenario:
        """Return the scenario as far as it is visible at ``step``: equal ones share a row."""
        switched = self.off is not None and self.off <= step
        return self if switched else Scenario(self.alpha)

    def accumulated(self, eta: float, steps: int) -> float:
        """Return a = -int alpha dt <= 0 on the clock t = eta * step."""
        return 0.0 - eta * self.alpha * (steps if self.off is None else min(self.off, steps))


@dataclass(frozen=True)
class Curves:
    """What training has left.

    Attributes
    ----------
    steps : array of shape (k,)
        The recorded steps.
    metrics : dict of arrays of shape (scenarios, k)
        "train" is f(X), "error" is |X - X*|_F, "nuclear" is the nuclear norm of X.
    X : array of shape (scenarios, n, n)
        The last X of each scenario.
    """

    steps: NDArray[np.int64]
    metrics: dict[str, Array]
    X: Array


class SensingProblem:
    """Sensing matrices A_i, a truth X* of rank r with nuclear norm 1, and y_i = <A_i, X*>.

    Parameters
    ----------
    A : array of shape (m, n, n)
        Symmetric.
    truth : array of shape (n, n)
        X*, symmetric and positive semi-definite.
    """

    def __init__(self, A: Array, truth: Array) -> None:
        self.m, self.n = len(A), len(truth)
        rows, columns = np.triu_indices(self.n)
        self.weight = np.where(rows == columns, 1.0, 2.0)
        self.half = rows * self.n + columns  # where the half vector lies in the flat matrix
        self.full = np.empty((self.n, self.n), dtype=np.int64)  # and the way back
        self.full[rows, columns] = self.full[columns, rows] = np.arange(len(self.half))
        self.H = A.reshape(self.m, -1)[:, self.half] * self.weight
        self.truth = truth
        self.y = self.H @ self.vector(truth)

    @classmethod
    def random(cls, seed: int, n: int, r: int, m: int) -> SensingProblem:
        """Draw the problem of Appendix C: U* and B_i normal, A_i = (B_i + B_i^T)/2."""
        rng = np.random.default_rng(seed)
        U = rng.standard_normal((n, r))
        B = rng.standard_normal((m, n, n))
        return cls(0.5 * (B + B.transpose(0, 2, 1)), U @ U.T / (U**2).sum())

    @classmethod
    def commuting(cls, seed: int, n: int, r: int, m: int) -> SensingProblem:
        """Draw one in which all matrices share their eigenvectors, as Corollary C.3 requires."""
        rng = np.random.default_rng(seed)
        V = np.linalg.qr(rng.standard_normal((n, n)))[0]
        values, spectrum = rng.standard_normal((m, n)), np.zeros(n)
        spectrum[:r] = rng.exponential(size=r)
        A = np.einsum("ij,kj,lj->kil", V, values, V)
        return cls(A, (V * (spectrum / spectrum.sum())) @ V.T)

    def vector(self, X: Array) -> Array:
        """Return the half vectors of symmetric matrices (..., n, n)."""
        return X.reshape(*X.shape[:-2], -1).take(self.half, axis=-1)

    def matrix(self, x: Array) -> Array:
        """Return the symmetric matrices of half vectors."""
        return x.take(self.full, axis=-1)

    def sensing(self) -> Array:
        """Return the A_i, of shape (m, n, n)."""
        return self.matrix(self.H / self.weight)

    def residual(self, x: Array) -> Array:
        """Return <A_i, X> - y_i for half vectors of shape (rows, p)."""
        if len(x) <= SMALL_BATCH:
            return np.stack([self.H @ row for row in x]) - self.y
        return x @ self.H.T - self.y

    def slope(self, residual: Array) -> Array:
        """Return the half vectors of grad f(X) = 1/m sum_i residual_i A_i."""
        few = len(residual) <= SMALL_BATCH
        back = np.stack([row @ self.H for row in residual]) if few else residual @ self.H
        return back / (self.m * self.weight)

    def curvature(self) -> float:
        """Return the largest curvature of f over symmetric matrices."""
        rows = self.H / np.sqrt(self.weight)  # an isometry: |rows_i| = |A_i|_F
        return float(eigvalsh(rows @ rows.T, subset_by_index=[self.m - 1] * 2)[0]) / self.m

    def measure(self, x: Array) -> dict[str, Array]:
        """Return the metrics of half vectors (rows, p)."""
        X = self.matrix(x)
        return {
            "train": (self.residual(x) ** 2).sum(-1) / (2 * self.m),
            "error": np.linalg.norm(X - self.truth, axis=(-2, -1)),
            "nuclear": np.abs(np.linalg.eigvalsh(X)).sum(-1),
        }


@np.errstate(over="ignore", invalid="ignore")  # the film says what it means
def train_factor(
    problem: SensingProblem,
    scenarios: Sequence[Scenario],
    eta: float,
    steps: int,
    start: float,
    every: int,
    watch: Watch | None = None,
) -> Curves:
    r"""Train U U^T in all scenarios at once: U <- U - eta (grad f(U U^T) U + alpha U).

    This is the flow of Corollary C.3 in steps of eta from U = start * I; differentiating f(U U^T)
    would give twice the gradient. Scenarios share a row of the batch until they part: "alpha" and
    "alpha, then off" are one run until the switch.

    Raises
    ------
    FloatingPointError
        If it diverges.
    """
    previous: list[Scenario] = []
    U = np.broadcast_to(start * np.eye(problem.n), (1, problem.n, problem.n))
    film = _Film(problem, every, steps, watch)
    offs = {s.off for s in scenarios if s.off is not None and s.off < steps}
    for begin, end in pairwise(sorted({0, steps} | offs)):
        visible = [s.until(begin) for s in scenarios]
        live = list(dict.fromkeys(visible))
        parents = [previous.index(s.until(begin - 1)) if previous else 0 for s in live]
        U, previous = U[parents], live
        rates = np.array([s.rate(begin) for s in live])[:, None, None]
        rows = [live.index(s) for s in visible]
        for step in range(begin, end):
            x = problem.vector(U @ U.transpose(0, 2, 1))
            film.take(step, x, rows)
            G = problem.matrix(problem.slope(problem.residual(x)))
            U = U - eta * (G @ U + rates * U)
    last = problem.vector(U @ U.transpose(0, 2, 1))
    film.take(steps, last, rows)
    return film.curves(problem.matrix(last)[rows])


def train_linear(
    problem: SensingProblem,
    scenarios: Sequence[Scenario],
    eta: float,
    steps: int,
    start: float,
    every: int,
    penalty: str = "nuclear",
) -> Curves:
    r"""Train the symmetric matrix X itself: X <- prox_{eta alpha |.|}(X - eta grad f(X)).

    With ``penalty`` "nuclear" the norm is the sum of |eigenvalues|: with constant alpha its
    minimizer is where U U^T is stationary, (grad f + alpha I) U = 0. With "l1" it is the sum of
    |entries|, as the paper's text says. The start is start^2 * I, where U U^T starts. Where the
    curvature does not allow the step eta, k steps of eta/k are taken, on the same clock. An X that
    no longer changes is not computed again.
    """
    parts = [_linear(problem, s, eta, steps, start, every, _SHRINK[penalty]) for s in scenarios]
    metrics = {name: np.concatenate([p.metrics[name] for p in parts]) for name in METRICS}
    return Curves(parts[0].steps, metrics, np.concatenate([p.X for p in parts]))


def _linear(
    problem: SensingProblem,
    scenario: Scenario,
    eta: float,
    steps: int,
    start: float,
    every: int,
    shrink: Callable[[SensingProblem, Array, float], Array],
) -> Curves:
    """Train one scenario of the linear model."""
    inner = max(1, math.ceil(eta * problem.curvature() / STABLE))
    x = problem.vector(start**2 * np.eye(problem.n))[None]
    film, settled = _Film(problem, every, steps, None), False
    for step in range(steps):
        film.take(step, x, [0])
        settled = settled and step != scenario.off
        for _ in range(0 if settled else inner):
            before = x
            x = x - eta / inner * problem.slope(problem.residual(x))
            if scenario.rate(step):
                x = shrink(problem, x, eta / inner * scenario.rate(step))
            settled = bool(np.abs(x - before).max() <= SETTLED * np.abs(x).max())
    film.take(steps, x, [0])
    return film.curves(problem.matrix(x))


def _shrink_eigenvalues(problem: SensingProblem, x: Array, by: float) -> Array:
    """Move the eigenvalues towards 0: the proximal map of the nuclear norm."""
    values, V = np.linalg.eigh(problem.matrix(x))
    return problem.vector((V * _soft(values, by)[:, None, :]) @ V.transpose(0, 2, 1))


def _shrink_entries(problem: SensingProblem, x: Array, by: float) -> Array:
    """Move the entries towards 0: the proximal map of sum_ij |X_ij|."""
    return _soft(x, by)


def _soft(values: Array, by: float) -> Array:
    return np.sign(values) * np.maximum(np.abs(values) - by, 0)


_SHRINK = {"nuclear": _shrink_eigenvalues, "l1": _shrink_entries}


class _Film:
    """Measures every so many steps, and at the end."""

    def __init__(
        self, problem: SensingProblem, every: int, steps: int, watch: Watch | None
    ) -> None:
        self.problem, self.every, self.last, self.watch = problem, every, steps, watch
        self.steps: list[int] = []
        self.rows: list[dict[str, Array]] = []

    def take(self, step: int, x: Array, rows: Sequence[int]) -> None:
        """Measure half vectors; ``rows`` says which of them each scenario is."""
        if step % self.every and step != self.last:
            return
        if not np.isfinite(x).all():
            raise FloatingPointError(f"matrix sensing diverged by step {step}: lower eta")
        measured = self.problem.measure(x)
        self.steps.append(step)
        self.rows.append({name: values[list(rows)] for name, values in measured.items()})
        if self.watch is not None:
            self.watch(step, self.rows[-1])

    def curves(self, X: Array) -> Curves:
        """Return all that was measured."""
        metrics = {name: np.stack([row[name] for row in self.rows], 1) for name in METRICS}
        return Curves(np.array(self.steps), metrics, X)
