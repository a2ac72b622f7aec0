r"""Dual problems of R_a = e^{ka} R_0(e^{-ka} x) whose x and nu run along a curve per coordinate.

On the support of a sparse x the dual variable comes within e^{(k-2) a} of an end of its range, and
loses x to rounding. A curve has a parameter t that loses nothing: x = e^tau z(t), nu = nu(t), with
tau = k a.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

from .dual import Array, DualProblem

__all__ = ["Curve", "CurveProblem", "Place"]


@dataclass(frozen=True)
class Place:
    """One point of every curve: x and nu, their derivatives in t, and what nu is measured by.

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
        return self.dx / self.dnu  # the inverse metric of the coordinate: W in Q W Q^T


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
        # nu = end - side * distance: the distances still differ where both nu round to the end.
        near = before.side * (before.distance - after.distance)
        return np.where(before.side == after.side, near, after.nu - before.nu)


@dataclass(frozen=True)
class CurveProblem(DualProblem):
    """A problem whose coordinates run along a `Curve`, at the scale tau = degree * a.

    Attributes
    ----------
    Z : array of shape (n, d)
        The measurements.
    curve : Curve
        The curves of all coordinates.
    degree : float
        k: g(c w) = c^k g(w).
    """

    Z: Array
    curve: Curve
    degree: float

    def expand(self, x: Array) -> Array:
        """Return x itself."""
        return x
