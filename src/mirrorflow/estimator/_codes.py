r"""Descent on u and v, z = g(u, v): with a step of one length, or steps that fit u and v."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["codes", "lipschitz", "settled_codes", "sizes"]

Array = NDArray[Any]


def lipschitz(dictionary: Array) -> float:
    """Return the largest eigenvalue of D D^T: the curvature of |x - z D|^2 / 2 in z."""
    return float(np.linalg.norm(dictionary, 2)) ** 2


def sizes(X: Array, dictionary: Array) -> Array:
    """Return for each signal the largest code of one atom alone: the size of its codes.

    It is 1 where x is orthogonal to all atoms, whose codes are 0.
    """
    alone = np.abs(_rows_times(X, dictionary.T)) / (dictionary**2).sum(axis=1)
    size = alone.max(axis=1)
    return np.where(size > 0, size, 1.0)


def codes(
    X: Array,
    dictionary: Array,
    form: str,
    k: int,
    alpha: float,
    beta: float | Array,
    start: Array,
    step: float,
    off: float = np.inf,
    positive: bool = False,
) -> Iterator[Array]:
    r"""Return the codes z (n_samples, n_components) before the first step, after it, and so on.

    The steps descend :math:`\tfrac12 |x - z D|^2 + \alpha h(u, v)`, with the h that commutes with
    g (Corollary 3.7): u^{2k} + v^{2k}, or log u + log v. From step ``off`` on alpha is 0. With
    ``positive`` v is 0 and stays 0.
    """
    w = np.stack(_start(form, k, beta, np.broadcast_to(start, (len(X), len(dictionary)))))
    w = w.astype(X.dtype)
    if positive:
        w[1] = 0
    # grad_z |x - z D|^2 / 2 = z D D^T - x D^T
    gram, pull = dictionary @ dictionary.T, X @ dictionary.T
    signs = np.array([1.0, -1.0], dtype=X.dtype)[:, None, None]
    count = 0
    while True:
        z = w[0] ** (2 * k) - w[1] ** (2 * k) if form == "power" else np.log(w[0]) - np.log(w[1])
        yield z
        slope = 2 * k * w ** (2 * k - 1) if form == "power" else 1 / w
        decay = alpha if count < off else 0.0
        # h is the sum of the terms of g: grad h has the same slope, without the sign.
        w = w - step * slope * (signs * (z @ gram - pull) + decay)
        count += 1


def _start(form: str, k: int, beta: float | Array, x: Array) -> tuple[Array, Array]:
    """Return u and v with g(u, v) = x (Appendix E; for the power erratum 7)."""
    if form == "power":
        root = np.sqrt(x**2 + beta**2)
        # The smaller of root + x and root - x without cancellation: their product is beta^2.
        large, small = (root + np.abs(x)) / 2, beta**2 / (2 * (root + np.abs(x)))
        u, v = np.where(x > 0, large, small), np.where(x > 0, small, large)
        return u ** (1 / (2 * k)), v ** (1 / (2 * k))  # 1/2 inside the power: errata 7
    # u/v = e^x and u + v = 1/beta
    return 1 / (beta * (1 + np.exp(-x))), 1 / (beta * (1 + np.exp(x)))


# --- Steps that fit u and v -----------------------------------------------------------------------

LONGEST = 0.5  # the most by which a step changes u^k or v^k, relative to them: none crosses 0
DECREASE = 1e-4  # of what the slope promises: the least that a step must bring
MEMORY = 0.85  # of the value that steps must stay below: it may rise for a while
SMALLEST = 1e-100  # u and v: from 0 they would not come back


def settled_codes(
    X: Array,
    dictionary: Array,
    form: str,
    k: int,
    alpha: float,
    beta: float,
    start: Array,
    tol: float,
    n_steps: int,
    off: int | None,
    positive: bool = False,
) -> tuple[Array, Array]:
    """Return codes at rest, and each signal's distance from rest, to compare with tol.

    For the log form alpha must be 0. At step ``off`` at the latest alpha becomes 0; before, once
    codes have settled. Everything is in units in which Lip(D) and the sizes of codes are 1, and no
    signal knows of another.
    """
    curvature = lipschitz(dictionary)
    size = sizes(X, dictionary) if form == "power" else np.ones(len(X))  # log u - log v has no unit
    problem = CodingProblem(
        X / (size * np.sqrt(curvature))[:, None],
        dictionary / np.sqrt(curvature),
        # z = size z', D = sqrt(L) D', x = size sqrt(L) x': units size^2 L of the fit, size of h.
        form, k, alpha / (size * curvature), positive,
    )  # fmt: skip
    w = np.stack(_start(form, k, beta, start / size[:, None]), axis=1)
    w = w[:, :1] if positive else w
    w, distance = settle(problem, w, tol, n_steps if off is None else off)
    if off is not None:
        problem = replace(problem, alpha=np.zeros_like(problem.alpha))
        w, distance = settle(problem, w, tol, n_steps - off)
    z = size[:, None] * problem.codes(w)
    if form == "power":
        pull = X @ dictionary.T
        # z = 0 is best where no atom pulls more than the penalty: u and v are then on their way to
        # 0, which they do not reach.
        largest = (pull if positive else np.abs(pull)).max(axis=1)
        still = largest <= (alpha if off is None else 0.0)
        z[still], distance = 0.0, np.where(still, 0.0, distance)
    return z, distance


@dataclass(frozen=True)
class CodeState:
    """u and v of each signal, w of shape (n_samples, 2, n_components), and what is known there.

    Of codes >= 0 it is u alone, (n_samples, 1, n_components).
    """

    w: Array
    value: Array
    gradient: Array
    distance: Array

    def rows(self, rows: Array) -> CodeState:
        """Keep some signals."""
        return CodeState(*(part[rows] for part in vars(self).values()))

    def moved(self, moves: Array, to: CodeState) -> CodeState:
        """Go to another point, where ``moves``."""
        pairs = zip(vars(self).values(), vars(to).values(), strict=True)
        return CodeState(*(np.where(moves[(..., *[None] * (a.ndim - 1))], b, a) for a, b in pairs))


@dataclass(frozen=True)
class CodingProblem:
    """|x - g(u, v) D|^2 / 2 + alpha h(u, v) for each row x of X; one alpha for each."""

    X: Array
    D: Array
    form: str
    k: int
    alpha: Array
    positive: bool = False

    def rows(self, rows: Array) -> CodingProblem:
        """Keep some signals."""
        return replace(self, X=self.X[rows], alpha=self.alpha[rows])

    def codes(self, w: Array) -> Array:
        """Return z = g(u, v)."""
        # u^{2k} - v^{2k}, or log u - log v
        return self._difference(w ** (2 * self.k) if self.form == "power" else np.log(w))

    def _difference(self, parts: Array) -> Array:
        return parts[:, 0] if self.positive else parts[:, 0] - parts[:, 1]

    def state(self, w: Array) -> CodeState:
        """Return value, gradient and distance from rest."""
        power, k, alpha = self.form == "power", self.k, self.alpha
        h = w ** (2 * k) if power else np.log(w)
        slope = 2 * k * w ** (2 * k - 1) if power else 1 / w
        z = self._difference(h)
        residual = self.X - _rows_times(z, self.D)
        g = -_rows_times(residual, self.D.T)
        value = 0.5 * (residual**2).sum(axis=1) + alpha * _sums(h)
        signed = g[:, None] if self.positive else np.stack([g, -g], axis=1)
        gradient = slope * (signed + alpha[:, None, None])
        distance = self._gap(z, residual, g) if alpha.any() else self._force(z, g)
        return CodeState(w, value, gradient, distance)

    def longest(self, point: CodeState) -> Array:
        """Return the longest step that leaves every u^k and v^k about LONGEST of what it was."""
        # d log u^k = k du / u
        relative = self.k * np.abs(point.gradient / point.w).max(axis=(1, 2))
        return LONGEST / np.maximum(relative, SMALLEST)

    def next_step(self, old: CodeState, new: CodeState) -> Array:
        """Return <s, y> / <y, y>, s and y the changes of w and of the gradient; not too long."""
        s, y = new.w - old.w, new.gradient - old.gradient
        along, squares = _sums(s * y), _sums(y**2)  # Barzilai and Borwein's shorter length
        curved = (along > 0) & (squares > 0)
        length = np.where(curved, along / np.where(curved, squares, 1.0), np.inf)
        return np.minimum(length, self.longest(new))

    def _gap(self, z: Array, residual: Array, g: Array) -> Array:
        """Return the duality gap of the lasso over its value: alpha |z| is the least alpha h.

        It is absolute for a signal that is 0.
        """
        size = -g if self.positive else np.abs(g)  # of codes >= 0 the dual set has one side
        largest = np.maximum(size.max(axis=1), np.finfo(float).tiny)
        # s times the residual is dual feasible: |D r| s <= alpha.
        s = np.minimum(1.0, self.alpha / largest)
        energy, fit = (residual**2).sum(axis=1), (residual * self.X).sum(axis=1)
        value = 0.5 * energy + self.alpha * np.abs(z).sum(axis=1)
        gap = value - (s * fit - 0.5 * s**2 * energy)  # the dual's s <r, x> - s^2 |r|^2 / 2
        return gap / np.where(self.X.any(axis=1), value, 1.0)

    def _force(self, z: Array, g: Array) -> Array:
        """Return the largest force on z, relative to the first where that is not 0.

        A code >= 0 that is small beside the others gives way to a force that pushes it to 0.
        """
        pulls = _rows_times(self.X, self.D.T)  # with all codes 0
        if self.positive:
            share = z / np.maximum(z.max(axis=1, keepdims=True), np.finfo(float).tiny)
            force, first = np.maximum(-g, np.abs(g) * share), pulls.max(axis=1)
        else:
            force, first = np.abs(g), np.abs(pulls).max(axis=1)
        return np.maximum(force.max(axis=1), 0.0) / np.where(first > 0, first, 1.0)


def settle(problem: CodingProblem, w: Array, tol: float, n_steps: int) -> tuple[Array, Array]:
    """Descend until each signal is within ``tol`` of rest; give u and v, and the distances.

    The steps are of Barzilai and Borwein's length, which follows the curvature; one that does not
    bring the value down is taken back and made shorter.
    """
    w, now, rows = w.copy(), problem.state(w), np.arange(len(w))
    distance, step, bound = now.distance.copy(), problem.longest(now), now.value
    for _ in range(n_steps):
        moving = now.distance > tol
        if not moving.all():
            w[rows], distance[rows] = now.w, now.distance
            rows, problem, now = rows[moving], problem.rows(moving), now.rows(moving)
            step, bound = step[moving], bound[moving]
        if not len(rows):
            break
        trial = problem.state(np.maximum(now.w - step[:, None, None] * now.gradient, SMALLEST))
        # Armijo's condition, below a mean of past values: steps of this length rise now and then.
        better = trial.value <= bound - DECREASE * step * _sums(now.gradient**2)
        step = np.where(better, problem.next_step(now, trial), step / 4)
        bound = np.where(better, MEMORY * bound + (1 - MEMORY) * trial.value, bound)
        now = now.moved(better, trial)
    w[rows], distance[rows] = now.w, now.distance
    return w, distance


def _sums(parts: Array) -> Array:
    """Sum for each signal."""
    return parts.reshape(len(parts), -1).sum(axis=1)


def _rows_times(rows: Array, matrix: Array) -> Array:
    """Multiply row by row: one product of all rounds differently with other signals beside it."""
    return np.matmul(rows[:, None, :], matrix)[:, 0]
