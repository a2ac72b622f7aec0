r"""Many least-squares flows at once: one row each for a fold, a scale A, or an output.

Row k follows the Hadamard flow started at m = 0, w = sqrt(2 A) (Theorem 3.2),

.. math:: \nu' = w \circ (y - X x), \quad x = A_t \sinh(2 \mu), \quad \mu = X^T \nu, \quad
    A_t = A e^{2 a_t},

or x = A_t e^{2 mu} for m = w = sqrt(A), in one of two states: nu, one number for each row of X
(`RowFlows`), or, where X has many rows, z with z' = x, one for each column (`GramFlows`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import issparse

from ..legendre._kernels import LOG_2, shared_sinh_cosh

__all__ = ["Flows", "GramFlows", "RowFlows", "tall"]

Array = NDArray[Any]
CACHED = 2**21  # bytes of X that the cache holds
TALL = 2  # times as many rows as columns, from which Gram matrices are the smaller problem


def tall(n: int, d: int) -> bool:
    """Return whether X (n, d) has so many rows that its Gram matrix replaces it."""
    return n > TALL * d


@dataclass(frozen=True)
class Flows(ABC):
    """Flows of K problems, one row each.

    Attributes
    ----------
    log_A : array of shape (K,)
        The scale at the start.
    rate, off : arrays of shape (K,)
        Weight decay of this strength until this time: a_t = -rate min(t, off).
    positive : bool
        Whether x = A e^{2 mu} instead of A sinh(2 mu).
    """

    log_A: Array  # noqa: N815 - as the parameter is called
    rate: Array
    off: Array
    positive: bool

    @property
    @abstractmethod
    def start(self) -> Array:
        """The state (K, size) at time 0: 0."""

    @property
    @abstractmethod
    def direction(self) -> Array:
        """A state in which power iterations start."""

    @abstractmethod
    def mirror(self, state: Array, t: Array) -> Array:
        """Return mu (K, d)."""

    @abstractmethod
    def velocity(self, x: Array) -> Array:
        """Return the derivative of the state at coefficients x (K, d)."""

    @abstractmethod
    def gradient(self, velocity: Array) -> Array:
        """Return the derivative of mu where the state has this one."""

    @abstractmethod
    def apply(self, v: Array, slope: Array) -> Array:
        """Return the Jacobian of the velocity, up to its sign, times v; ``slope`` is dx / dmu."""

    @abstractmethod
    def norm(self, v: Array, slope: Array) -> Array:
        """Return norms (K, 1) of an inner product in which `apply` is symmetric."""

    def move(self, state: Array, t: Array) -> Array:
        """Return the derivative of the state."""
        rise = self.mirror(state, t)
        rise *= 2
        log_A = self._log_A(t, slice(None)).astype(rise.dtype)[:, None]
        if self.positive:
            return self.velocity(np.exp(rise + log_A))
        half, fall = log_A - np.asarray(LOG_2, rise.dtype), -rise
        rise += half
        fall += half
        x = np.exp(rise, out=rise)  # A sinh(2 mu) = (A/2) e^{2 mu} - (A/2) e^{-2 mu}
        x -= np.exp(fall, out=fall)
        return self.velocity(x)

    def primal(self, mu: Array, t: Array, k: Any = slice(None)) -> tuple[Array, Array]:
        """Return x and dx / dmu at (mu, t), of all rows or of those with indices k."""
        log_A, exponent = self._log_A(t, k).astype(mu.dtype)[:, None], mu + mu
        if self.positive:
            exponent += log_A
            x = np.exp(exponent, out=exponent)  # x = A e^{2 mu}
            return x, 2 * x
        x, slope = shared_sinh_cosh(log_A, exponent)  # x = A sinh(2 mu)
        slope *= 2
        return x, slope

    def _log_A(self, t: Array, k: Any) -> Array:
        """Return log A_t."""
        if not self._decays:
            return self.log_A[k]
        # A_t = A e^{2 a_t}, a_t = -rate min(t, off)
        return self.log_A[k] - 2 * self.rate[k] * np.minimum(t, self.off[k])

    @cached_property
    def _decays(self) -> bool:
        return bool((self.rate > 0).any())


@dataclass(frozen=True)
class RowFlows(Flows):
    """Flows in nu, which share the products with X.

    Attributes
    ----------
    X : array or sparse matrix of shape (n, d)
        The features, as they are: ``center`` subtracts their weighted mean without forming it.
        Products are formed in its precision.
    y, weights : arrays of shape (K, n)
        The targets, and weights of the rows of X that sum to 1 for each flow.
    center : bool
        Whether there is an intercept.
    """

    X: Any
    y: Array
    weights: Array
    center: bool

    @property
    def start(self) -> Array:
        """The state 0."""
        return np.zeros(self.y.shape)

    @property
    def direction(self) -> Array:
        """The velocity at x = 0."""
        return self._centered(self.weights * self.y)

    def mirror(self, state: Array, t: Array) -> Array:
        """Return mu = X^T nu."""
        return self._rows(state.astype(self.X.dtype), self.X)

    def velocity(self, x: Array) -> Array:
        """Return w (y - Xx), which sums to 0 where there is an intercept."""
        return self._centered(self.weights * (self.y - self._rows(x, self.X.T)))

    def gradient(self, velocity: Array) -> Array:
        """Return X^T nu'."""
        return self._rows(velocity.astype(self.X.dtype), self.X)

    def apply(self, v: Array, slope: Array) -> Array:
        """Return w X diag(slope) X^T v."""
        moved = slope * self._rows(v.astype(self.X.dtype), self.X)
        return self._centered(self.weights * self._rows(moved, self.X.T))

    def norm(self, v: Array, slope: Array) -> Array:
        """Return the norms in which a row of weight 2 counts as two rows."""
        # <v, w^{-1} v>, in which the Jacobian w X diag(slope) X^T is symmetric.
        return np.sqrt((v * v * self._inverse).sum(axis=1, keepdims=True))

    @cached_property
    def _inverse(self) -> Array:
        """1 / w, and 0 where w is 0."""
        return np.divide(1.0, self.weights, out=np.zeros_like(self.weights), where=self.weights > 0)

    def _rows(self, v: Array, M: Any) -> Array:
        """Return v M: row by row, which is faster for few rows, where M stays in the cache."""
        if issparse(M) or M.nbytes > CACHED:
            return np.asarray(v @ M)
        return np.matmul(v[:, None, :], M)[:, 0]

    def _centered(self, r: Array) -> Array:
        if self.center:  # the weights sum to 1
            r -= self.weights * r.sum(axis=1, keepdims=True)
        return r


@dataclass(frozen=True)
class GramFlows(Flows):
    r"""Flows in z, the integral of x: nu = w (t y - X z), so that mu = t b - G z.

    Nothing is solved, so that G and b, which are products of X with itself, are as good as X: an
    error of rounding in them is one of the data.

    Attributes
    ----------
    G : array of shape (K, d, d)
        X^T w X, centred where there is an intercept.
    b : array of shape (K, d)
        X^T w y.
    """

    G: Array
    b: Array

    @property
    def start(self) -> Array:
        """The state 0."""
        return np.zeros(self.b.shape)

    @property
    def direction(self) -> Array:
        """The gradient at x = 0, on which the flow starts."""
        return self.b.copy()

    def mirror(self, state: Array, t: Array) -> Array:
        """Return mu = t b - G z."""
        # mu = X^T nu = X^T w (t y - X z)
        return np.multiply(t, self.b.T).T - self._product(state)

    def velocity(self, x: Array) -> Array:
        """Return x."""
        return x

    def gradient(self, velocity: Array) -> Array:
        """Return b - G x."""
        return self.b - self._product(velocity)

    def apply(self, v: Array, slope: Array) -> Array:
        """Return diag(slope) G v."""
        return slope * self._product(v)

    def norm(self, v: Array, slope: Array) -> Array:
        """Return the norms of diag(slope)^{-1/2} v."""
        # <v, diag(slope)^{-1} v>, in which the Jacobian diag(slope) G is symmetric.
        squares = np.divide(v * v, slope, out=np.zeros_like(v), where=slope > 0)
        return np.sqrt(squares.sum(axis=1, keepdims=True))

    def _product(self, v: Array) -> Array:
        """Return G v of each flow; G is symmetric."""
        return np.matmul(v[:, None, :], self.G)[:, 0]
