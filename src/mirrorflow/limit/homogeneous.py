r"""End points of homogeneous models under decay: argmin {R_a(x) : Zx = y}, R_a on its clock.

x = e^tau z(t), nu = nu(t) along a curve per coordinate, tau = k a. The dual variable nu alone does
not do: on the support of a sparse x it comes within e^{(k-2) a} of an end of its range, and loses x
to rounding. So t is an unknown beside theta, and the mismatch Q^T theta - nu(t) is carried along
from differences of nu that keep their digits, instead of being recomputed.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from ..legendre import PowerEntropy, ProductEntropy, RescaledFunction
from ..legendre._smallest_factor import advance, factors_at, tail
from .continuation import GOOD, VERTEX, Point
from .newton import NewtonSystem
from .rows import Rows, length

__all__ = ["Curve", "PowerCurve", "ProductCurve", "RescaledDual", "rescaled_dual"]

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
APART = 1e-9  # distance from b to the x in the domain at which there is no solution


@dataclass(frozen=True)
class Place:
    """Where the coordinates are: x and nu, their derivatives in t, and what nu is measured by.

    ``distance`` is that of nu to the end of its range named by ``side``, with all its digits.
    """

    x: Array
    dx: Array
    nu: Array
    dnu: Array
    distance: Array
    side: Array

    @property
    def weight(self) -> Array:
        """Return dx/dnu."""
        return self.dx / self.dnu


class Curve(ABC):
    """x and nu of every coordinate along its own parameter; both increase with it.

    Attributes
    ----------
    state0 : array of shape (d,)
        The parameter at nu = 0.
    lower, upper : arrays of shape (d,)
        The ends of nu.
    floor, ceiling : arrays of shape (d,)
        The domain of x.
    """

    state0: Array
    lower: Array
    upper: Array
    floor: Array
    ceiling: Array

    @abstractmethod
    def place(self, state: Array, tau: float) -> Place:
        """Return x in units that shrink like e^-tau, and nu."""

    @abstractmethod
    def move(self, state: Array, step: Array) -> Array:
        """Return the parameter after a step in t, of which log |x| is Lipschitz far out."""

    @abstractmethod
    def invert(self, nu: Array) -> Array:
        """Return the parameter at nu."""

    def inside(self, nu: Array) -> bool:
        """Return whether every nu is in its range."""
        return bool(((nu > self.lower) & (nu < self.upper)).all())

    def change(self, before: Place, after: Place) -> Array:
        """Return the change of nu, from the distances to an end where it is the same one."""
        near = before.side * (before.distance - after.distance)
        return np.where(before.side == after.side, near, after.nu - before.nu)


class ProductCurve(Curve):
    """The curve of `ProductEntropy`, by its smallest factor q."""

    def __init__(self, R: ProductEntropy) -> None:
        self.R, self.k = R, R.k
        self.c = R.c.reshape(R.k, -1)
        self.state0, self.lower, self.upper = (v.reshape(-1) for v in (R.q0, R.lower, R.upper))
        self.floor, self.ceiling = (v.numpy().reshape(-1) for v in R.domain(0.0))

    def place(self, state: Array, tau: float) -> Place:
        """Return x and nu from the factors e^{tau/k} w, which is where x is a number."""
        scale = math.exp(tau / self.k)
        w = factors_at(state, self.c) * scale
        others, far, clock = w[1:].prod(0), w[2:].prod(0), scale ** (self.k - 2)
        with np.errstate(divide="ignore", invalid="ignore"):
            turned = 1 + np.where(state == 0, 0.0, (scale * state / w[1:]) ** 2).sum(0)
            distance = clock * tail(np.concatenate([np.abs(scale * state)[None], w[1:]]))
        side = np.where(state < 0, -1.0, 1.0)
        nu = np.where(state < 0, self.lower + distance, self.upper - distance)
        dx = w[1] * others * turned
        return Place(scale * state * others, dx, nu, clock / far, distance, side)

    def move(self, state: Array, step: Array) -> Array:
        """Return q after a step in arcsinh(q / sqrt(c_2)), or in log q."""
        return advance(state, factors_at(state, self.c[:2])[1], step)

    def invert(self, nu: Array) -> Array:
        """Return q at nu."""
        return self.R.invert(nu.reshape(self.R.q0.shape)).reshape(-1)


class PowerCurve(Curve):
    """The curve of `PowerEntropy` without decay, by t = log(N / P)."""

    def __init__(self, R: PowerEntropy) -> None:
        self.c, self.q = R.c, R.q
        self.lower, self.upper = (v.numpy().astype(np.float64).reshape(-1) for v in R.range(0.0))
        self.log_sum = np.log(self.c * (self.upper - self.lower))
        self.state0 = np.log(-self.lower / self.upper)
        self.floor = np.full_like(self.state0, -np.inf)
        self.ceiling = -self.floor

    def place(self, state: Array, tau: float) -> Place:
        """Return x = P^-q - N^-q and nu, from log P and log N."""
        soft = np.logaddexp(0.0, np.abs(state))  # of the larger; the other is soft - |t|
        small, large = self.log_sum - soft, self.log_sum - soft + np.abs(state)
        near, far = np.exp(tau - self.q * small), np.exp(tau - self.q * large)
        side = np.where(state < 0, -1.0, 1.0)
        x = -side * near * np.expm1(-self.q * np.abs(state))
        share = np.exp(large - self.log_sum)  # N/S next to P^-q, and P/S next to N^-q
        dx = self.q * (near * share + far * (1 - share))
        distance = np.exp(small) / self.c
        nu = np.where(state < 0, self.lower + distance, self.upper - distance)
        return Place(x, dx, nu, distance * share, distance, side)

    def move(self, state: Array, step: Array) -> Array:
        """Return t + step."""
        return state + step

    def invert(self, nu: Array) -> Array:
        """Return log(N / P)."""
        return np.log((nu - self.lower) / (self.upper - nu))


@dataclass(frozen=True)
class RescaledDual:
    """The dual problem of a `RescaledFunction` whose R_0 has a curve; made by `rescaled_dual`."""

    Z: Array
    curve: Curve
    degree: float

    def solve(self, rows: Rows, a: Sequence[float], max_steps: int) -> list[Point]:
        """Solve for each ``a`` along one path, from an easy scale down."""
        size = length(rows.b)
        unit = size if size > 0 else 1.0
        taus = self.degree * np.asarray(a) - math.log(unit)
        walker = _Walker(self.curve, rows.Q, rows.b / unit, max_steps)
        order = np.argsort(-taus, kind="stable")
        walker.begin(float(taus[order[0]]))
        points = [walker.go(float(taus[i]), unit) for i in order]
        return [points[i] for i in np.argsort(order)]


def rescaled_dual(R: RescaledFunction, Z: Array) -> RescaledDual | None:
    """Return the dual problem of R for the measurements Z (n, d), or None if R_0 has no curve."""
    match R.start:
        case ProductEntropy():
            return RescaledDual(Z, ProductCurve(R.start), R.degree)
        case PowerEntropy():
            return RescaledDual(Z, PowerCurve(R.start), R.degree)
        case _:
            return None


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

    def go(self, tau: float, unit: float) -> Point:
        """Walk to ``tau`` and solve there."""
        while self.tau > tau and not self.lost:
            left = self.tau - tau
            self._step(left if left <= self.stride else min(self.stride, left / 2), tau)
        if not self.lost and self._correct(self.state, self.theta, self.off, tau, True):
            self._arrive()
        return self._point(tau, unit)

    def _point(self, tau: float, unit: float) -> Point:
        """Return the solution, or the last iterate."""
        x = self.curve.place(self.state, tau).x
        residual = float(np.linalg.norm(self.b - self.Q @ x))
        spent, self.counted = self.steps - self.counted, self.steps
        solved = residual < GOOD and not self.lost
        return Point(
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
        return float(nnls(np.hstack([self.Q[:, up], -self.Q[:, down]]), self.b)[1]) > APART

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
            step = NewtonSystem(self.QT, at.weight).solve(rest)
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
            dt = off / at.dnu
            largest = float(np.abs(dt).max(initial=0.0))
            if not largest < FAR:
                return None
            state, theta = self.curve.move(state, dt), theta + dtheta
            after = self.curve.place(state, tau)
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
        self.theta_slope = -system.fit(self.at.x / weight, seen=True)
        self.state_slope = (self.QT @ self.theta_slope) / self.at.dnu
        moved = self.at.x + self.at.dx * self.state_slope
        largest = float(np.abs(self.at.x).max(initial=0.0))
        self.drift = float(np.abs(moved).max(initial=0.0)) / largest if largest > 0 else math.inf
