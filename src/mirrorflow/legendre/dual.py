r"""Dual problems: what `limit` needs of a Legendre function to minimize R_a subject to Zx = y.

The dual of ``min R_a(x)`` subject to ``Qx = b`` has one unknown for each row: x = primal(Q^T theta)
and Qx = b. A Legendre function describes it by `LegendreFunction.dual_problem`:

- `ExponentialProblem`, where the conjugate of R_a is a sum of exponentials. `limit` follows the
  solution along the scale of x, down to e^{-300} and to the L1 vertex.
- `NewtonProblem`, any other: x and d x / d mu at a mu. `limit` takes damped Newton steps. The
  default of every Legendre function; it differentiates `primal`, unless R defines `array_primal`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Array",
    "ArrayPrimal",
    "DualProblem",
    "ExponentialDual",
    "ExponentialProblem",
    "LocalModel",
    "NewtonProblem",
    "unchanged",
]

Array = NDArray[np.float64]
# From mu, flattened, and a: x and d x / d mu; `RangeError` outside the range of mu.
ArrayPrimal = Callable[[Array, float], tuple[Array, Array]]


class DualProblem(ABC):
    """The dual of min R_a(x) subject to Zx = y, as a kind of problem that `limit` can solve.

    Attributes
    ----------
    Z : array of shape (n, d')
        The measurements in the coordinates x' in which the problem is solved.
    """

    Z: Array

    @abstractmethod
    def expand(self, x: Array) -> Array:
        """Return x, flattened, from x'."""


def unchanged(x: Array) -> Array:
    """Return x' itself, where it is x."""
    return x


@dataclass(frozen=True)
class ExponentialProblem(DualProblem):
    """A problem whose conjugate is a sum of exponentials.

    Attributes
    ----------
    Z : array of shape (n, d')
        The measurements in the coordinates x'.
    make : callable
        Returns the `ExponentialDual` of (Q, a, log_unit), for x' in units of e^log_unit.
    log_size : callable
        Returns the logarithm of the largest scale of x at ``a``.
    decay : float or None
        The slope in ``a`` of a log-scale that all coordinates share; None if they share none.
    to_x : callable
        Returns x, flattened, from x'.
    """

    Z: Array
    make: Callable[[Array, float, float], ExponentialDual]
    log_size: Callable[[float], float]
    decay: float | None
    to_x: Callable[[Array], Array] = unchanged

    def expand(self, x: Array) -> Array:
        """Return x, flattened, from x'."""
        return self.to_x(x)


class ExponentialDual(ABC):
    """x(theta, tau) = grad of a sum of exponentials in Q^T theta, scaled by e^tau.

    At large tau the problem is nearly quadratic; `limit` follows the solution down to the wanted
    tau. After `evaluate`, in coordinates in which the Hessian of the potential is diagonal:

    Attributes
    ----------
    x : array of shape (d,)
        The point, in the coordinates of the rows Q.
    mass, weight : arrays of shape (d,)
        x, and the Hessian's diagonal divided by ``speed``; d x / d tau at fixed theta is x.
    largest : float
        The largest exponent in size.
    speed : float
        The rate of the exponentials in Q^T theta: it bounds how fast curvature changes.
    """

    speed: float
    Q: Array
    QT: Array
    x: Array
    mass: Array
    weight: Array
    largest: float

    @property
    def single_precision(self) -> NDArray[np.float32] | None:
        """The transposed basis in single precision, where systems are so large that it pays."""
        return None

    @abstractmethod
    def evaluate(self, theta: Array, tau: float) -> None:
        """Compute the attributes above at (theta, tau)."""

    @abstractmethod
    def basis(self) -> Array:
        """Return F^T (d, r): the rows Q in the coordinates of ``mass``, transposed."""

    @abstractmethod
    def max_exponent_change(self, step: Array) -> float:
        """Return the largest change of an exponent along a step."""

    @abstractmethod
    def ceiling(self, theta: Array) -> float:
        """Return sup <theta, Qx> over x in the domain with norm (L1, or trace) 1."""

    @abstractmethod
    def starting_scale(self) -> float:
        """Return a scale tau at which x(0, tau) has size about 1."""

    def certifies_infeasible(self, b: Array, theta: Array) -> bool:
        """Return whether ``theta`` proves that no x in the domain has Qx = b.

        <theta, b> <= ceiling(theta) |x| for every x with Qx = b: where the left side is much
        larger, a solution would have to be absurdly large (Farkas).
        """
        gain = float(theta @ b)
        return gain > 0 and self.ceiling(theta) * 1e4 < gain  # |x| >= gain / ceiling > 1e4


@dataclass(frozen=True)
class LocalModel:
    """x and its derivative in mu at one point.

    Attributes
    ----------
    x : array of shape (d,)
        primal(mu, a), flattened.
    slope : array of shape (d,)
        d x / d mu: its diagonal, or its eigenvalues where ``vectors`` is given.
    vectors : array of shape (d, d) or None
        The eigenvectors, as columns.
    rates : array of shape (d,)
        |d log slope / d mu|, which damps Newton steps; 0 where it is not known.
    """

    x: Array
    slope: Array
    vectors: Array | None
    rates: Array


class NewtonProblem(DualProblem):
    """A problem given by x and d x / d mu at any mu.

    Attributes
    ----------
    eps : float
        The rounding of the precision in which `evaluate` computes.
    """

    eps: float = 2.2e-16

    @abstractmethod
    def evaluate(self, mu: Array, a: float) -> LocalModel:
        """Return the local model at mu (d,); `RangeError` outside the range of mu."""

    def require_centre(self, a: float) -> None:
        """Raise `RangeError` if mu = 0 is outside the range: R_a has no minimizer."""
        self.evaluate(np.zeros(self.Z.shape[1]), a)

    def expand(self, x: Array) -> Array:
        """Return x itself."""
        return x
