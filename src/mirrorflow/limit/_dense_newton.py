r"""End points of any other Legendre function: Newton's method on the dual, by its two maps."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from ..legendre import NewtonProblem, RangeError
from ..legendre.dual import LocalModel
from ._constraints import Constraints
from ._continuation import GOOD, DualPoint
from ._newton import NewtonSystem

__all__ = ["solve_newton"]

Array = NDArray[np.float64]
SHORTEST = 1e-6  # part of the way from the centre to y below which a step gives up


def solve_newton(
    problem: NewtonProblem,
    constraints: Constraints,
    a: float,
    theta: Array | None,
    max_steps: int,
) -> DualPoint:
    """Solve Q primal(Q^T theta, a) = b, from a nearby ``theta`` or from the centre of R_a.

    If a full step from there fails, the target moves from the prediction of the centre to b.
    """
    search = _Search(problem, constraints, a, max_steps)
    zero = np.zeros(len(constraints.b))
    if not search.evaluate(zero):
        problem.require_centre(a)  # raises, with the range of mu, where R_a has no centre
        raise RangeError(f"a = {a}: x must be finite at mu = 0. Use an a nearer to 0.")
    centre = search.Q @ search.x
    if theta is not None and search.newton(theta, constraints.b) is not None:
        return search.point()
    theta, done, length = zero, 0.0, 1.0
    while done < 1 and length > SHORTEST and search.steps < max_steps:
        length = min(length, 1 - done)
        found = search.newton(theta, centre + (done + length) * (constraints.b - centre))
        if found is None:
            length /= 3
        else:
            theta, done, length = found, done + length, 2 * length
    return search.point()


class _Search:
    """Newton's method with a line search on the slope of the convex dual objective."""

    def __init__(
        self, problem: NewtonProblem, constraints: Constraints, a: float, max_steps: int
    ) -> None:
        self.problem, self.a, self.max_steps = problem, a, max_steps
        self.Q, self.b, self.steps = constraints.Q, constraints.b, 0
        self.QT = np.ascontiguousarray(self.Q.T)
        self.theta, self.x = np.zeros(len(self.b)), np.zeros(self.Q.shape[1])
        self.missed, self.closest = math.inf, self.theta  # of all places
        self.eps = problem.eps
        self.good = max(GOOD, 1e3 * self.eps)
        self.local: LocalModel

    def evaluate(self, theta: Array) -> bool:
        """Move to ``theta``; return whether it is inside the range of mu, else stay."""
        try:
            local = self.problem.evaluate(self.QT @ theta, self.a)
        except RangeError:
            return False
        if not (np.isfinite(local.x).all() and np.isfinite(local.slope).all()):
            return False
        self.theta, self.x, self.local = theta, local.x, local
        missed = float(np.linalg.norm(self.b - self.Q @ local.x))
        if missed < self.missed:
            self.missed, self.closest = missed, theta
        return True

    def _step(self, residual: Array) -> Array:
        """Return Newton's step: Q (dx/dmu) Q^T step = residual."""
        local = self.local
        # dx/dmu = V diag(slope) V^T
        basis = self.QT if local.vectors is None else local.vectors.T @ self.QT
        return self._damped(NewtonSystem(basis, local.slope).solve(residual))

    def newton(self, theta: Array, target: Array, limit: int = 60) -> Array | None:
        """Solve Q x = target from ``theta``; None if that does not succeed."""
        if not self.evaluate(theta):
            return None
        best = math.inf
        scale = float(max(np.linalg.norm(target), np.linalg.norm(self.b))) or 1.0
        for _ in range(limit):
            residual = target - self.Q @ self.x
            size = float(np.linalg.norm(residual)) / scale
            floor = 10 * self.eps * (1 + float(np.linalg.norm(self.x)) / scale)
            # At rounding, or good and no longer falling as Newton's method does.
            if size <= floor or (size < self.good and size > 0.3 * best):
                return self.theta
            if self.steps >= self.max_steps:
                return None
            best, self.steps = min(best, size), self.steps + 1
            step = self._step(residual)
            if not self._advance(step, residual, target):
                return self.theta if size < self.good else None
        return None

    def _damped(self, step: Array) -> Array:
        """Shorten a step along which the weights would change by far: log(1 + beta) / beta of it.

        That is what sums of exponentials ask for (see `_continuation`). Where weights have decayed
        to e^{-20}, a full step goes e^{20} too far, and every trial there is a long integration.
        """
        beta = float(np.max(self.local.rates * np.abs(self.QT @ step), initial=0.0))
        return step if not beta > 0.5 else math.log1p(beta) / beta * step

    def _advance(self, step: Array, residual: Array, target: Array) -> bool:
        """Move along ``step`` until the slope of the objective, -<step, residual>, has fallen.

        The objective is convex: a point where the slope is still negative, or a fraction of the
        first one, does not overshoot.
        """
        start, theta, length = float(step @ residual), self.theta, 1.0
        while start > 0 and length > 1e-10:
            if self.evaluate(theta + length * step):
                # Minus the derivative of the objective along the step.
                slope = float(step @ (target - self.Q @ self.x))
                if slope >= -0.5 * start:
                    return True
            length /= 2
        self.evaluate(theta)
        return False

    def point(self) -> DualPoint:
        """Return the place that came closest to b."""
        self.evaluate(self.closest)
        scale = float(np.linalg.norm(self.b)) or 1.0
        residual = float(np.linalg.norm(self.b - self.Q @ self.x)) / scale
        exhausted = self.steps >= self.max_steps
        return DualPoint(
            self.x, self.theta, -self.theta, residual, self.steps, False,
            exhausted=exhausted, tolerance=self.good,
        )  # fmt: skip
