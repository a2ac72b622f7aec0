r"""The flow of groups x_g = s_g v_g, a number times a vector each, which does not commute.

From v_g = 0, s_g = sqrt(2 A), decay keeps s_g^2 - |v_g|^2 = 2 A_t, A_t = A e^{2 a_t}, so that
v_g = sqrt(2 A_t) sinh(|q_g|) q_g / |q_g| with one vector q_g for each group, and

.. math:: x_g = A_t \sinh(2 |q_g|) \, q_g / |q_g|, \quad
    q_g' = r_\parallel + |q_g| \coth(|q_g|) \, r_\perp, \quad r = X^T w (y - X x),

with r split into its parts along q_g and across. A group of one has no part across: there q is the
mu of m * w, and mirror(x) = mu. Larger ones turn at a speed that depends on the way.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.integrate import RK45
from scipy.sparse import issparse

from ..legendre._kernels import exp_sinh
from ._data import Data, gram, pulls, shortest
from ._endpoints import warn_unfinished
from ._flows import tall

__all__ = ["Groups", "in_groups"]

Array = NDArray[np.float64]
NEAR = 1e-4  # |q| below which the limits at 0 are right to rounding


@dataclass(frozen=True)
class Groups:
    """Which group each column belongs to, counted from 0."""

    of: NDArray[np.intp]

    @classmethod
    def read(cls, groups: Any, d: int) -> Groups:
        """Read one label for each of d columns, or one list of column indices for each group."""
        parts = list(groups)
        if parts and all(np.ndim(part) == 1 for part in parts):
            return cls(_from_indices(parts, d))
        labels = np.asarray(parts)
        if labels.shape != (d,):
            raise ValueError(
                f"groups must have one label for each of the {d} columns of X, or one list of "
                f"column indices for each group, got an array of shape {labels.shape}."
            )
        return cls(np.unique(labels, return_inverse=True)[1])

    def sizes(self, values: Array) -> Array:
        """Return the norm of its group for each entry of values (..., d)."""
        rows = np.atleast_2d(values)
        squares = [np.bincount(self.of, row**2) for row in rows]
        return np.sqrt(squares)[:, self.of].reshape(values.shape)

    def units(self, data: Data) -> Data:
        """Return the data with the scale and the pull of groups, by their norms."""
        largest = (self.sizes(f(data).T).max(axis=1, initial=0.0) for f in (shortest, pulls))
        scale, pull = (np.where(data.pull > 0, values, 0.0) for values in largest)
        return replace(data, scale=scale, pull=pull)

    def without_small(self, coef: Array, zero_tol: float) -> Array:
        """Set to 0 the groups whose norm is below ``zero_tol`` times the largest of a row."""
        size = self.sizes(coef)
        largest = np.maximum(size.max(axis=-1, keepdims=True, initial=0.0), 1e-300)
        return np.where(size >= zero_tol * largest, coef, 0.0)


def _from_indices(parts: list[Any], d: int) -> NDArray[np.intp]:
    """Return the group of each column from the columns of each group."""
    found = np.full(d, -1)
    for g, part in enumerate(parts):
        indices = np.asarray(part)
        if indices.dtype.kind not in "iu" or not indices.size:
            raise ValueError(
                f"groups must hold column indices, whole numbers and at least one, got {part!r}."
            )
        outside = indices[(indices < 0) | (indices >= d)]
        if outside.size:
            raise ValueError(f"groups must hold columns from 0 to {d - 1}, got {outside[0]}.")
        twice = (found[indices] >= 0) | (np.bincount(indices, minlength=d)[indices] > 1)
        if twice.any():
            raise ValueError(
                f"groups must hold each column once, got column {indices[twice][0]} twice. Repeat "
                "the column in X to let it be in two groups."
            )
        found[indices] = g
    if (found < 0).any():
        raise ValueError(
            f"groups must hold each of the {d} columns of X, got none with column "
            f"{np.flatnonzero(found < 0)[0]}. Give it a group of its own."
        )
    return found


@dataclass(frozen=True)
class _Target:
    """The flow of one target: its start, its decay, and the gradient."""

    data: Data
    groups: Groups
    k: int
    log_A: float  # noqa: N815 - as the parameter is called
    rate: float
    off: float
    gram: Array | None

    def x(self, t: float, q: Array) -> Array:
        """Return the coefficients."""
        size = self.groups.sizes(q)
        log_A = self.log_A - 2 * self.rate * min(t, self.off)  # A_t = A e^{2 a_t}
        safe = np.where(size > NEAR, size, 1.0)  # A sinh(2 |q|) / |q| -> 2 A
        return np.where(size > NEAR, exp_sinh(log_A, 2 * safe) / safe, 2 * np.exp(log_A)) * q

    def move(self, t: float, q: Array) -> Array:
        """Return the derivative of q."""
        r, size = self._pull(self.x(t, q)), self.groups.sizes(q)
        safe = np.where(size > NEAR, size, 1.0)
        inner = np.bincount(self.groups.of, q * r)[self.groups.of]
        along = np.where(size > NEAR, inner * q / safe**2, r)  # q <q, r> / |q|^2
        # q' = r_par + |q| coth(|q|) r_perp, and |q| coth(|q|) -> 1.
        return along + np.where(size > NEAR, safe / np.tanh(safe), 1.0) * (r - along)

    def _pull(self, x: Array) -> Array:
        """Return X^T w (y - X x)."""
        data = self.data
        if self.gram is not None:
            return (data.weights * data.y[:, self.k]) @ data.X - self.gram @ x
        missed = data.weights * (data.y[:, self.k] - data.X @ x)
        if data.center:  # the weights sum to 1
            missed -= data.weights * missed.sum()
        return data.X.T @ missed


def in_groups(
    data: Data, groups: Groups, log_A: float, decay: tuple[float, float], t: float, tol: float,
    max_iter: float,
) -> tuple[Array, int]:  # fmt: skip
    """Return the coefficients (K, d) of the flow of groups at time t, and the most steps taken.

    ``decay`` is its rate and its end; it and t are in units of the time to grow.
    """
    coefs, steps = np.zeros((data.y.shape[1], data.X.shape[1])), 1
    square = None
    if not issparse(data.X) and tall(*data.X.shape):
        square = gram(data.X, data.weights)
    for k in np.flatnonzero(data.pull > 0).tolist():
        unit, start = float(data.unit(log_A, False)[k]), float(data.log_A(log_A)[k])
        target = _Target(data, groups, k, start, decay[0] / unit, decay[1] * unit, square)
        jump = decay[0] > 0 and decay[1] < t
        stops = [target.off, t * unit] if jump else [t * unit]
        coefs[k], taken = _integrate(target, stops, tol, max_iter)
        steps = max(steps, taken)
    return coefs, steps


def _integrate(
    target: _Target, stops: list[float], tol: float, max_iter: float
) -> tuple[Array, int]:
    """Integrate from q = 0 through the stops, at which the decay may jump."""
    t, q, steps = 0.0, np.zeros(target.data.X.shape[1]), 0
    for stop in stops:
        # d log |x| / d |q| = 2 coth(2 |q|): an error of tol / 2 in q is one of tol in x. SciPy
        # takes the root mean square of d errors, of which one may be all of it.
        atol = 0.5 * tol / np.sqrt(len(q))
        solver = RK45(target.move, t, q, stop, rtol=1e-12, atol=atol)
        with np.errstate(all="ignore"):  # a step too far overflows, and is taken back
            while solver.status == "running" and steps < max_iter:
                solver.step()
                steps += 1
        t, q = solver.t, solver.y
        if solver.status != "finished":
            warn_unfinished(max_iter)
            break
    return target.x(t, q), steps
