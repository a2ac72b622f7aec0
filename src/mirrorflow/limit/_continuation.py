r"""Continuation of the solution of Q x(theta, tau) = b from a large scale tau down."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..legendre import ExponentialDual
from ._newton import NewtonSystem

__all__ = ["VERTEX", "DualPoint", "follow"]

Array = NDArray[np.float64]
EPS = 2.2e-16
LOOSE = 0.5  # change of the exponents by the last Newton step at scales only passed through
STRAIGHT = 1e-2  # drift of x below which the path is nearly straight: no bend is predicted
PLAIN = 1e-4  # drift of x above which systems are plain enough for single precision
SETTLED = 1e-6  # drift of x below which every point is solved to full precision
CROSSING = 1e-2  # drift of x below which the support may show already
SHOWS = 1e-3  # weight of a coordinate of the support, relative to the heaviest
WILD = 30.0  # residual, relative to y, at which a prediction is given up
GOOD = 1e-9  # residual at which a point counts as solved
VERTEX = 1e-13  # relative change of x per unit of log A at which the L1 vertex is reached
FIRST = 300  # Newton steps allowed for the first point, which starts from theta = 0
GROWTH = 2.0  # of the stride after an easy step
SHORTEST = 1e-4  # stride at which the continuation gives up


@dataclass(frozen=True)
class DualPoint:
    """One end point: x, its dual variable, and how good they are.

    ``slope`` is d theta / d tau, whose direction certifies how far x is from the L1 minimizer.
    """

    x: Array
    theta: Array
    slope: Array
    residual: float
    steps: int
    vertex: bool
    infeasible: bool = False
    exhausted: bool = False  # the limit on steps was reached
    left: bool = False  # on the way w came to the edge of where g is smooth
    tolerance: float = GOOD

    @property
    def solved(self) -> bool:
        """Return whether Qx = b holds to the tolerance."""
        return self.residual < self.tolerance


def follow(dual: ExponentialDual, b: Array, taus: list[float], max_steps: int) -> list[DualPoint]:
    """Solve Q x = b at each tau (descending); ``b`` has norm 1, or is 0."""
    path = _Continuation(dual, b, max_steps)
    # At a large scale x is nearly linear in theta, and Newton's method arrives from 0.
    first = max(dual.starting_scale(), taus[0])
    if path.correct(np.zeros(len(b)), first, first == taus[0], FIRST) is None:
        return [path.failed(tau) for tau in taus]
    path.start = first
    return [path.go(tau) for tau in taus]


class _Continuation:
    """The state of the continuation: the point, its tangent, and the length of the next step."""

    def __init__(self, dual: ExponentialDual, b: Array, max_steps: int) -> None:
        self.dual, self.b, self.max_steps = dual, b, max_steps
        self.steps = self.counted = 0
        self.stride, self.growth, self.bend, self.stuck = 3.0, GROWTH, np.zeros(len(b)), False
        self.start, self.drift, self.trial = -math.inf, math.inf, np.zeros(len(b))
        self.crossing, self.distrust = CROSSING, False

    def go(self, tau: float) -> DualPoint:
        """Walk to ``tau`` and solve there."""
        while self.tau > tau and not self.stuck:
            left = self.tau - tau
            ready = self.drift < self.crossing and left > self.start - self.tau > 0
            if ready and self._cross(tau):
                break
            # Two equal steps rather than a long one and a remainder.
            self._step(left if left <= self.stride else min(self.stride, left / 2), tau)
        if self.tau <= tau and self.residual > GOOD and not self.stuck:
            self.correct(self.theta, tau, True)
        if self.stuck:
            return self.failed(tau)
        vertex = self.residual < GOOD and self.drift < VERTEX
        return DualPoint(
            self.x, self.theta, self.tangent, self.residual, self._spent(), vertex,
            exhausted=self.steps >= self.max_steps,
        )  # fmt: skip

    def _spent(self) -> int:
        """Return the Newton steps since the last call."""
        spent, self.counted = self.steps - self.counted, self.steps
        return spent

    def failed(self, tau: float) -> DualPoint:
        """Return the last iterate at ``tau``, and whether Zx = b is proved to have no solution."""
        theta = self.trial
        self.dual.evaluate(theta, tau)
        residual = float(np.linalg.norm(self.b - self.dual.Q @ self.dual.x))
        infeasible = self.dual.certifies_infeasible(self.b, theta)
        exhausted = self.steps >= self.max_steps
        return DualPoint(
            self.dual.x, theta, -theta, residual, self._spent(), False, infeasible, exhausted
        )

    def _step(self, length: float, tau: float) -> None:
        """Predict, correct, and adapt the stride to how hard that was."""
        theta, tangent = self.theta, self.tangent
        guess = theta - length * tangent  # theta(tau - l) = theta - l theta' + l^2/2 theta'' + ...
        if self.drift > STRAIGHT:
            guess += (0.5 * length * length) * self.bend
        target = tau if self.tau - length <= tau * (1 + EPS) else self.tau - length
        needed = self.correct(guess, target, target == tau)
        if needed is None:  # too far: a third of it, along the tangent alone, with all digits
            self.distrust = True
            self.bend, self.stride, self.growth = np.zeros_like(self.bend), length / 3, 1.0
            self.stuck = self.stride < SHORTEST or self.steps >= self.max_steps
            return
        if self.drift < VERTEX:
            return
        # theta'' = (theta'(tau + l) - theta'(tau)) / l
        self.bend = (tangent - self.tangent) / length
        grown = length * (self.growth if needed <= 3 else 1.0 if needed <= 5 else 0.6)
        self.stride = max(grown, self.stride) if target == tau and needed <= 5 else grown
        self.growth = min(2 * self.growth, GROWTH)

    def _cross(self, tau: float) -> bool:
        """Jump to ``tau`` on the support that shows already; return False if that was too early.

        Continued along its average slope since the start, theta lets every coordinate off the
        support go on falling, as (its size)^(length). Whatever solves Qx = b at ``tau`` is right.
        """
        heavy = self.system.w > SHOWS * self.system.w.max()
        slope, F = self.theta / (self.tau - self.start), self.system.FT[heavy]
        # On the support F theta' = -u keeps x; elsewhere the slope stays the average one.
        slope = slope - np.linalg.lstsq(F, self.u[heavy] + F @ slope, rcond=None)[0]
        guess = self.theta - (self.tau - tau) * slope  # slope = d theta / d tau
        self.crossing = self.drift * CROSSING  # and not again before much has changed
        return self.correct(guess, tau, True, 6) is not None

    def correct(self, theta: Array, tau: float, last: bool, limit: int = 12) -> int | None:
        """Solve at ``tau`` by Newton's method from ``theta``; None if it does not converge.

        For sums of exponentials of rate s the step log(1 + beta)/beta, beta = s max|Q^T step|,
        decreases the objective (Sun and Tran-Dinh, generalized self-concordance with nu = 2).
        """
        dual, best, tight = self.dual, math.inf, last or self.drift < SETTLED
        for k in range(limit):
            dual.evaluate(theta, tau)
            residual = self.b - dual.Q @ dual.x
            size = math.sqrt(residual @ residual)
            if (not size < WILD and limit != FIRST) or self.steps >= self.max_steps:
                return None
            self.trial = theta
            if not dual.weight.max(initial=0.0) > 0:  # all of x underflows: no step from here
                return None
            plain = self.drift > PLAIN and not self.distrust
            # The Hessian s Q diag(A cosh t) Q^T of the potential, factored on its heavy columns.
            system = NewtonSystem(
                dual.basis(), dual.speed * dual.weight, dual.single_precision if plain else None
            )
            self.steps += 1
            # Rounding of the exponents moves x by eps |t|: nothing below that can be reached.
            floor = EPS * (10 + dual.largest) * (1 + math.sqrt(dual.x @ dual.x))
            if size <= floor or (size < 1e-10 and size > 0.3 * best):
                self._arrive(theta, tau, size, system)
                return k
            best = min(best, size)
            step = system.solve(residual)  # F W F^T step = b - Q x
            beta = dual.max_exponent_change(step)  # s max |Q^T step|
            if not tight and beta < LOOSE:
                self._arrive(theta + step, tau, size, system)
                return k
            # Damped where the exponents change by far: log(1 + beta) / beta of Newton's step.
            theta = theta + (step if beta < 0.5 else math.log1p(beta) / beta * step)
        return None

    def _arrive(self, theta: Array, tau: float, size: float, system: NewtonSystem) -> None:
        """Keep a solved point with its tangent and the speed of x along it.

        Q x = b for every tau gives F W (u + F^T theta') = 0 with u = mass/w, a weighted least
        squares problem; its residual is d x / d tau.
        """
        self.theta, self.tau, self.x, self.residual = theta, tau, self.dual.x, size
        mass, w = self.dual.mass, system.w
        u = np.divide(mass, w, out=np.zeros_like(mass), where=w > 0)
        self.u, self.system = u, system
        self.tangent = -system.fit(u, seen=True)  # theta' = argmin sum w_i (F_i^T theta' + u_i)^2
        moved = mass + w * (system.FT @ self.tangent)  # dx/dtau = x + W F^T theta'
        largest = float(np.abs(mass).max(initial=0.0))
        self.drift = float(np.abs(moved).max(initial=0.0)) / largest if largest > 0 else math.inf
        if self.drift < VERTEX and self.start > tau:
            self._aim(u, system)
        elif system.ill:  # x goes on moving, perhaps through directions that do not show in it yet
            self.tangent = -system.fit(u)

    def _aim(self, u: Array, system: NewtonSystem) -> None:
        """Point the tangent at the vertex: theta is linear in log A from here on.

        Directions that no longer show in x keep their average slope since the start, at which
        every coordinate off the support goes on falling.
        """
        slope = self.theta / (self.tau - self.start)  # sinks coordinates off the support on average
        self.tangent = slope - system.fit(u + system.FT @ slope, seen=True)
        self.bend, self.stride = np.zeros_like(self.bend), math.inf
