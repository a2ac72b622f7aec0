r"""End points of any other Legendre function: Newton's method on the dual, by its two maps."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray

from ..legendre import LegendreFunction, RangeError
from ._constraints import Rows
from ._continuation import GOOD, Point
from ._newton import NewtonSystem

__all__ = ["solve_general"]

Array = NDArray[np.float64]
SHORTEST = 1e-6  # part of the way from the centre to y below which a step gives up


def solve_general(
    R: LegendreFunction, rows: Rows, a: float, theta: Array | None, max_steps: int
) -> Point:
    """Solve Q primal(Q^T theta, a) = b, from a nearby ``theta`` or from the centre of R_a.

    If a full step from there fails, the target moves from the prediction of the centre to b.
    """
    search = _Search(R, rows, a, max_steps)
    zero = np.zeros(len(rows.b))
    start = search.place(zero)
    if start is None:  # 0 is outside the range: R_a has no centre
        R.primal(torch.zeros(R.shape, dtype=R.dtype), a)  # raises with the range
    if theta is not None and search.newton(theta, rows.b) is not None:
        return search.point()
    theta, done, length, centre = zero, 0.0, 1.0, rows.Q @ search.x
    while done < 1 and length > SHORTEST and search.steps < max_steps:
        length = min(length, 1 - done)
        found = search.newton(theta, centre + (done + length) * (rows.b - centre))
        if found is None:
            length /= 3
        else:
            theta, done, length = found, done + length, 2 * length
    return search.point()


class _Search:
    """Newton's method with a line search on the slope of the convex dual objective."""

    def __init__(self, R: LegendreFunction, rows: Rows, a: float, max_steps: int) -> None:
        self.R, self.Q, self.b, self.a, self.max_steps = R, rows.Q, rows.b, a, max_steps
        self.QT, self.steps = np.ascontiguousarray(rows.Q.T), 0
        self.theta, self.x = np.zeros(len(rows.b)), np.zeros(rows.Q.shape[1])
        self.rates = np.zeros(rows.Q.shape[1])  # |d log weight / d mu|; 0 where it is not known
        self.missed, self.closest = math.inf, self.theta  # of all places
        self.eps = torch.finfo(R.dtype).eps
        self.good = max(GOOD, 1e3 * self.eps)

    def place(self, theta: Array) -> Array | None:
        """Evaluate x and its derivative at Q^T theta; None outside the range of mu."""
        mu = torch.from_numpy(self.QT @ theta).to(self.R.dtype)
        try:
            x = self._elementwise(mu) if self.R.elementwise else self._dense(mu)
        except RangeError:
            return None
        if not (np.isfinite(x).all() and np.isfinite(self.weights).all()):
            return None
        self.theta, self.x = theta, x
        missed = float(np.linalg.norm(self.b - self.Q @ x))
        if missed < self.missed:
            self.missed, self.closest = missed, theta
        return x

    def _elementwise(self, mu: torch.Tensor) -> Array:
        """Keep d x / d mu, a diagonal. The batch of one keeps messages of `Inversion` cheap."""
        mu = mu.reshape(1, *self.R.shape).requires_grad_()
        x = self.R.primal(mu, self.a)
        slope = torch.autograd.grad(x.sum(), mu, create_graph=True)[0]
        bend = torch.zeros_like(mu)
        if slope.requires_grad:  # not for a linear g
            (bend,) = torch.autograd.grad(slope.sum(), mu, materialize_grads=True)
        self.weights, self.frame = _numpy(slope), self.QT
        self.rates = np.abs(_numpy(bend)) / np.maximum(self.weights, 1e-300)
        return _numpy(x)

    def _dense(self, mu: torch.Tensor) -> Array:
        """Keep d x / d mu as its eigenvalues and the rows in its eigenbasis."""
        mu = mu.requires_grad_()
        x = self.R.primal(mu.reshape(self.R.shape), self.a).reshape(-1)
        slope = np.stack([_numpy(torch.autograd.grad(xi, mu, retain_graph=True)[0]) for xi in x])
        values, vectors = np.linalg.eigh((slope + slope.T) / 2)
        self.weights, self.frame = np.maximum(values, 0.0), vectors.T @ self.QT
        return _numpy(x)

    def newton(self, theta: Array, target: Array, limit: int = 60) -> Array | None:
        """Solve Q x = target from ``theta``; None if that does not succeed."""
        if self.place(theta) is None:
            return None
        best = math.inf
        scale = float(max(np.linalg.norm(target), np.linalg.norm(self.b))) or 1.0
        for _ in range(limit):
            residual = target - self.Q @ self.x
            size = float(np.linalg.norm(residual)) / scale
            floor = 10 * self.eps * (1 + float(np.linalg.norm(self.x)) / scale)
            if size <= floor or (size < self.good and size > 0.3 * best):
                return self.theta
            if self.steps >= self.max_steps:
                return None
            best, self.steps = min(best, size), self.steps + 1
            step = self._damped(NewtonSystem(self.frame, self.weights).solve(residual))
            if not self._advance(step, residual, target):
                return self.theta if size < self.good else None
        return None

    def _damped(self, step: Array) -> Array:
        """Shorten a step along which the weights would change by far: log(1 + beta) / beta of it.

        That is what sums of exponentials ask for (see `continuation`). Where weights have decayed
        to e^{-20}, a full step goes e^{20} too far, and every trial there is a long integration.
        """
        beta = float(np.max(self.rates * np.abs(self.QT @ step), initial=0.0))
        return step if not beta > 0.5 else math.log1p(beta) / beta * step

    def _advance(self, step: Array, residual: Array, target: Array) -> bool:
        """Move along ``step`` until the slope of the objective, -<step, residual>, has fallen.

        The objective is convex: a point where the slope is still negative, or a fraction of the
        first one, does not overshoot.
        """
        start, theta, length = float(step @ residual), self.theta, 1.0
        while start > 0 and length > 1e-10:
            if self.place(theta + length * step) is not None:
                slope = float(step @ (target - self.Q @ self.x))
                if slope >= -0.5 * start:
                    return True
            length /= 2
        self.place(theta)
        return False

    def point(self) -> Point:
        """Give the place that came closest to b."""
        self.place(self.closest)
        scale = float(np.linalg.norm(self.b)) or 1.0
        residual = float(np.linalg.norm(self.b - self.Q @ self.x)) / scale
        exhausted = self.steps >= self.max_steps
        return Point(
            self.x, self.theta, -self.theta, residual, self.steps, False,
            exhausted=exhausted, tolerance=self.good,
        )  # fmt: skip


def _numpy(value: torch.Tensor) -> Array:
    """Give a float64 vector."""
    return value.detach().numpy().astype(np.float64).reshape(-1)
