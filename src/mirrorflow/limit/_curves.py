r"""End points of homogeneous models along their curves: continuation from an easy scale down.

The parameter t of the curves is an unknown beside theta, and the mismatch Q^T theta - nu(t) is
carried along from differences of nu that keep their digits, instead of being recomputed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ..legendre import RangeError
from ..legendre._curves import Curve, CurveProblem, Place
from ..legendre._kernels import outside_cone
from ._constraints import Constraints, length
from ._continuation import GOOD, VERTEX, DualPoint
from ._newton import NewtonSystem

__all__ = ["solve_along_curves"]

Array = NDArray[np.float64]
EPS = 2.2e-16
FIRST = 300  # Newton steps allowed for the first point
PATIENCE = 25  # of those, after each of which a solution is made sure to exist
LIMIT = 10  # and for each later one
FAR = 3.0  # change of t by one Newton step at which a prediction is given up
LOOSE = 0.3  # change of t by the last Newton step at scales only passed through
SETTLED = 1e-6  # and at those asked for, and once the support shows: the next is its square
STRAIGHT = 1e-2  # drift of x below which the support shows
STRIDE = 2.0  # the first, in tau; it grows by GROWTH after an easy step
GROWTH = 3.0
EASY, HARD = 4, 6  # Newton steps up to which the stride grows, or stays
SHORTEST = 1e-4
LARGEST, SMALLEST = 600.0, -600.0  # tau, between which e^tau is a number
FAINT = 1e-130  # x at SMALLEST below which a coordinate fades
APART = 1e-9  # distance from b to the x in the domain that proves Zx = b infeasible


def solve_along_curves(
    problem: CurveProblem, constraints: Constraints, a: Sequence[float], max_steps: int
) -> list[DualPoint]:
    """Solve for each ``a`` along one path, from an easy scale down."""
    for ai in a:
        if problem.degree * ai > LARGEST:
            raise RangeError(
                f"a must keep x within float64, got a = {ai}: x has the scale "
                f"e^{problem.degree * ai:.0f}. Note that a is -int alpha dt, negative for decay."
            )
    size = length(constraints.b)
    if size == 0:
        return _at_zero(problem, constraints, a, max_steps)
    unit = size
    # x = e^tau z: in units in which b has norm 1 the scale e^{ka} is e^{ka} / |b|. Long before
    # SMALLEST all is at a vertex, where nothing changes any more.
    wanted = problem.degree * np.asarray(a) - math.log(unit)
    taus = np.maximum(wanted, SMALLEST)
    walker = _Walker(problem.curve, constraints.Q, constraints.b / unit, max_steps)
    order = np.argsort(-taus, kind="stable")
    walker.begin(float(taus[order[0]]))
    points = [walker.go(float(taus[i]), unit) for i in order]
    for place, i in enumerate(order):
        if taus[i] > wanted[i]:  # what fades goes on fading
            x = points[place].x
            points[place] = replace(points[place], x=np.where(abs(x) < FAINT * unit, 0.0, x))
    return [points[i] for i in np.argsort(order)]


def _at_zero(
    problem: CurveProblem, constraints: Constraints, a: Sequence[float], max_steps: int
) -> list[DualPoint]:
    """Solve Q x = 0 at one scale: theta is the same at every other, and x falls with it."""
    walker = _Walker(problem.curve, constraints.Q, constraints.b, max_steps)
    walker.begin(0.0)
    point = walker.go(walker.tau, 1.0)
    # Q z = 0 does not know the scale: x = e^tau z.
    return [replace(point, x=point.x * math.exp(problem.degree * ai - walker.tau)) for ai in a]


class _Walker:
    """Newton's method in (t, theta) along tau: F1 = nu(t) - Q^T theta = 0, F2 = Q x(t, tau) = b."""

    def __init__(self, curve: Curve, Q: Array, b: Array, max_steps: int) -> None:
        self.curve, self.Q, self.b, self.max_steps = curve, Q, b, max_steps
        self.QT, self.steps, self.counted = np.ascontiguousarray(Q.T), 0, 0
        self.theta, self.state = np.zeros(len(b)), curve.state0
        self.off = np.zeros(len(curve.state0))  # the mismatch Q^T theta - nu(t)
        self.stride, self.drift, self.lost = STRIDE, math.inf, False

    def begin(self, top: float) -> None:
        """Solve at the first scale: the one where x is about 1 without a loss, or ``top``."""
        at = self.curve.place(self.curve.state0, 0.0)
        reach = float(np.maximum(np.abs(at.x), at.dx).max(initial=0.0))
        self.tau = max(top, -math.log(reach)) if reach > 0 else top
        self.lost = not self._descend()
        if not self.lost:
            self._arrive()

    def go(self, tau: float, unit: float) -> DualPoint:
        """Walk to ``tau`` and solve there."""
        while self.tau > tau and not self.lost:
            left = self.tau - tau
            self._step(left if left <= self.stride else min(self.stride, left / 2), tau)
        if not self.lost and self._correct(self.state, self.theta, self.off, tau, True):
            self._arrive()
        return self._point(tau, unit)

    def _point(self, tau: float, unit: float) -> DualPoint:
        """Return the solution, or the last iterate."""
        x = self.curve.place(self.state, tau).x
        residual = float(np.linalg.norm(self.b - self.Q @ x))
        spent, self.counted = self.steps - self.counted, self.steps
        solved = residual < GOOD and not self.lost
        return DualPoint(
            unit * x, self.theta, -self.theta, residual if solved else max(residual, GOOD), spent,
            vertex=solved and self.drift < VERTEX,
            infeasible=not solved and self._excluded(),
            exhausted=self.steps >= self.max_steps,
        )  # fmt: skip

    def _excluded(self) -> bool:
        """Return whether no x in the domain has Qx = b."""
        up, down = np.isinf(self.curve.ceiling), np.isinf(self.curve.floor)
        if up.all() and down.all():
            return False
        # Farkas: b is off the cone of Q's columns with the signs that x can have.
        return outside_cone(np.hstack([self.Q[:, up], -self.Q[:, down]]), self.b, APART)

    def _descend(self) -> bool:
        """Minimize the dual objective by Newton's method from theta = 0, where t is nu's own."""
        at = self.curve.place(self.state, self.tau)
        for k in range(1, FIRST + 1):
            rest = self.b - self.Q @ at.x
            if np.linalg.norm(rest) < 1e-8:
                return True
            if self.steps >= self.max_steps or (k % PATIENCE == 0 and self._excluded()):
                return False
            self.steps += 1
            step = NewtonSystem(self.QT, at.weight).solve(rest)  # Q (dx/dnu) Q^T step = b - Qx
            found = self._searched(step, float(step @ rest))
            if found is None:
                return float(np.linalg.norm(rest)) < GOOD
            at = found
        return False

    def _searched(self, step: Array, slope: float) -> Place | None:
        """Move along ``step``, halved while the slope of the convex objective turns round."""
        share = 1.0
        while slope > 0 and share > 1e-10:
            theta = self.theta + share * step
            nu = self.QT @ theta
            if self.curve.inside(nu):
                state = self.curve.invert(nu)
                at = self.curve.place(state, self.tau)
                if np.isfinite(at.x).all() and step @ (self.b - self.Q @ at.x) >= -0.5 * slope:
                    self.theta, self.state = theta, state
                    return at
            share /= 2
        return None

    def _step(self, stride: float, tau: float) -> None:
        """Predict along the tangent, correct, and adapt the stride to how hard that was."""
        target = tau if self.tau - stride <= tau + 1e-12 * abs(tau) else self.tau - stride
        change = target - self.tau
        theta = self.theta + change * self.theta_slope
        state = self.curve.move(self.state, change * self.state_slope)
        moved = self.curve.change(self.at, self.curve.place(state, target))
        # Q^T theta - nu(t) by differences: both numbers may lie at an end of nu, to all digits.
        off = self.off + change * (self.QT @ self.theta_slope) - moved
        needed = self._correct(state, theta, off, target, False)
        if needed:
            self._arrive()
            self.stride = stride * (GROWTH if needed <= EASY else 1.0 if needed <= HARD else 0.5)
            if self.drift < VERTEX:  # the tangent is the path from here on
                self.stride = math.inf
        else:
            self.stride = stride / 4
            self.lost = self.stride < SHORTEST or self.steps >= self.max_steps

    def _correct(
        self, state: Array, theta: Array, off: Array, tau: float, last: bool
    ) -> int | None:
        """Solve at ``tau``; return the number of Newton steps, None if it does not converge.

        Linearized, dt = (Q^T dtheta + off) / nu' and Q (x + x' dt) = b, hence the system
        Q W Q^T dtheta = b - Qx - Q W off with W = x'/nu'.
        """
        at, best = self.curve.place(state, tau), math.inf
        loose = not last and self.drift > STRAIGHT
        for k in range(1, LIMIT + 1):
            if not (np.isfinite(at.x).all() and np.isfinite(at.weight).all()):
                return None
            if self.steps >= self.max_steps:
                return None
            rest = self.b - self.Q @ at.x
            size = float(np.linalg.norm(rest))
            system = NewtonSystem(self.QT, at.weight)
            self.steps += 1
            floor = EPS * 10 * (1 + float(np.linalg.norm(at.x)))
            # Below it the residual is rounding, which theta would follow where x is faint.
            dtheta = system.solve(rest if size > floor else 0 * rest) - system.fit(off, seen=True)
            off = off + self.QT @ dtheta
            dt = off / at.dnu  # nu' dt = Q^T (theta + dtheta) - nu(t)
            largest = float(np.abs(dt).max(initial=0.0))
            if not largest < FAR:
                return None
            state, theta = self.curve.move(state, dt), theta + dtheta
            after = self.curve.place(state, tau)
            # What the step in t really changed nu by takes the place of nu' dt.
            off, at = off - self.curve.change(at, after), after
            tight = size <= floor or (size < 1e-10 and size > 0.3 * best)
            if (loose and max(largest, size) < LOOSE) or (tight and largest < SETTLED):
                self.state, self.theta, self.off, self.tau = state, theta, off, tau
                return k
            best = min(best, size)
        return None

    def _arrive(self) -> None:
        """Keep the point with its tangent, for which Q (x + x' dt) = 0 and nu' dt = Q^T dtheta."""
        self.at = self.curve.place(self.state, self.tau)
        weight = self.at.weight
        system = NewtonSystem(self.QT, weight)
        # Q (x + W Q^T theta') = 0: theta' = -argmin sum W_i (Q_i^T z - x_i / W_i)^2.
        self.theta_slope = -system.fit(self.at.x / weight, seen=True)
        self.state_slope = (self.QT @ self.theta_slope) / self.at.dnu  # nu' t' = Q^T theta'
        moved = self.at.x + self.at.dx * self.state_slope  # dx/dtau along the path
        largest = float(np.abs(self.at.x).max(initial=0.0))
        self.drift = float(np.abs(moved).max(initial=0.0)) / largest if largest > 0 else math.inf
