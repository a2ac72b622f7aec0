r"""Runge-Kutta-Chebyshev steps: explicit, and stable over a stretch that grows like s^2.

A gradient flow in dual coordinates has a Jacobian with real, negative eigenvalues, stiff once
coordinates have grown: s stages reach about 0.65 s^2 / lambda, where s Runge-Kutta steps of order
4 reach 0.7 s / lambda. Formulas: Sommeijer, Shampine and Verwer, "RKC: an explicit solver for
parabolic PDEs", J. Comp. Appl. Math. 88 (1998), order 2, damping 2/13.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..legendre._kernels import shared_sinh_cosh

__all__ = ["MAX_STAGES", "BatchedFlows", "Saved", "Stages", "integrate", "stages", "stages_for"]

MAX_STAGES = 25
DAMPING = 2 / 13


@dataclass(frozen=True)
class Stages:
    """The coefficients of s stages.

    Attributes
    ----------
    first : float
        Of the first stage.
    rest : tuple of (mu, nu, mu_tilde, gamma_tilde)
        Of the stages 2 to s.
    times : tuple of float
        The times of the stages 1 to s, as fractions of the step.
    reach : float
        The largest stable h * lambda.
    """

    first: float
    rest: tuple[tuple[float, float, float, float], ...]
    times: tuple[float, ...]
    reach: float


@cache
def stages(s: int) -> Stages:
    """Return the coefficients for s >= 2 stages."""
    w0 = 1 + DAMPING / s**2
    T, D, D2 = _chebyshev(s, w0)
    w1 = D[s] / D2[s]
    b = [0.0, 0.0, *(D2[j] / D[j] ** 2 for j in range(2, s + 1))]
    b[0] = b[1] = b[2]
    rest = []
    for j in range(2, s + 1):
        mu, nu, mu_tilde = 2 * b[j] * w0 / b[j - 1], -b[j] / b[j - 2], 2 * b[j] * w1 / b[j - 1]
        rest.append((mu, nu, mu_tilde, -(1 - b[j - 1] * T[j - 1]) * mu_tilde))
    first = b[1] * w1
    return Stages(first, tuple(rest), _times(first, rest), (w0 + 1) * D2[s] / D[s])


def stages_for(stretch: float) -> Stages:
    """Return the fewest stages that are stable for h * lambda = ``stretch``, up to MAX_STAGES."""
    s = 2
    while s < MAX_STAGES and stages(s).reach < stretch:
        s += 1
    return stages(s)


def _chebyshev(s: int, w: float) -> tuple[list[float], list[float], list[float]]:
    """Return the Chebyshev polynomials T_0 to T_s at w, and their first two derivatives."""
    T, D, D2 = [1.0, w], [0.0, 1.0], [0.0, 0.0]
    for _ in range(2, s + 1):
        D2.append(2 * w * D2[-1] - D2[-2] + 4 * D[-1])
        D.append(2 * w * D[-1] - D[-2] + 2 * T[-1])
        T.append(2 * w * T[-1] - T[-2])
    return T, D, D2


def _times(first: float, rest: list[tuple[float, float, float, float]]) -> tuple[float, ...]:
    """Apply the stages to y' = 1: the times at which they evaluate."""
    times = [0.0, first]
    for mu, nu, mu_tilde, gamma in rest:
        times.append(mu * times[-1] + nu * times[-2] + mu_tilde + gamma)
    return tuple(times[1:])


# Many least-squares flows at once: one column each for a fold, a scale A, or an output.
#
# Column k follows, in as many dual numbers as X has rows,
#
# .. math:: \nu' = w \circ (y - X x), \quad x = A_t \sinh(2 X^T \nu), \quad A_t = A e^{2 a_t},
#
# the Hadamard flow started at m = 0, w = sqrt(2 A) (Theorem 3.2), or x = A_t e^{2 X^T nu} for
# m = w = sqrt(A). All columns share the products with X; each has its own steps.

Array = NDArray[np.float64]
SAFETY = 1.15  # on the estimate of the largest eigenvalue, which comes from below
WARM_UP = 6  # power iterations before the first step
GROWTH = (0.2, 3.0)


@dataclass(frozen=True)
class BatchedFlows:
    """The problems: X (n, d), dense or sparse, and for each of K columns y, weights and log A.

    Attributes
    ----------
    X : array or sparse matrix of shape (n, d)
        The features, as they are: ``center`` subtracts their weighted mean without forming it.
    y, weights : arrays of shape (n, K)
        The targets, and weights of the rows that sum to 1 in each column.
    log_A : array of shape (K,)
        The scale at the start.
    rate, off : arrays of shape (K,)
        Weight decay of this strength until this time: a_t = -rate min(t, off).
    center : bool
        Whether there is an intercept.
    positive : bool
        Whether x = A e^{2 mu} instead of A sinh(2 mu).
    """

    X: Any
    y: Array
    weights: Array
    log_A: Array  # noqa: N815 - as the parameter is called
    rate: Array
    off: Array
    center: bool = True
    positive: bool = False

    @cached_property
    def XT(self) -> Any:
        """X transposed, in the layout in which products with it are fast."""
        return (
            np.ascontiguousarray(self.X.T) if isinstance(self.X, np.ndarray) else self.X.T.tocsr()
        )

    def residual(self, x: Array) -> Array:
        """Return the weighted residual w (y - Xx), which sums to 0 where there is an intercept."""
        return self._centered(self.weights * (self.y - self.X @ x))

    def apply(self, v: Array, slope: Array) -> Array:
        """Return w X diag(slope) X^T v, the Jacobian of the velocity up to its sign."""
        return self._centered(self.weights * (self.X @ (slope * (self.XT @ v))))

    def norm(self, v: Array) -> Array:
        """Return the norms in which `apply` is symmetric: a row of weight 2 counts as two rows."""
        squares = np.divide(v * v, self.weights, out=np.zeros_like(v), where=self.weights > 0)
        return np.sqrt(squares.sum(axis=0))

    def _centered(self, r: Array) -> Array:
        if self.center:  # the weights sum to 1
            r -= self.weights * r.sum(axis=0)
        return r

    def primal(self, nu: Array, t: Array, k: Any = slice(None)) -> tuple[Array, Array]:
        """Return x and d x / d mu at (nu, t), of all columns or of those with indices k."""
        log_A = self.log_A[k] - 2 * self.rate[k] * np.minimum(t, self.off[k])  # log A_t
        exponent = self.XT @ nu
        exponent *= 2
        if self.positive:
            x = np.exp(exponent + log_A)  # x = A e^{2 mu}
            return x, 2 * x
        x, slope = shared_sinh_cosh(log_A, exponent)  # x = A sinh(2 mu)
        slope *= 2
        return x, slope

    def velocity(self, nu: Array, t: Array) -> Array:
        """Return d nu / dt."""
        return self.residual(self.primal(nu, t)[0])


# Called with the columns and the indices of their times, their nu, x and t.
Saved = Callable[[NDArray[np.intp], NDArray[np.intp], Array, Array, Array], None]


def integrate(
    columns: BatchedFlows, times: Array, save: Saved, tol: float = 1e-3, max_steps: int = 10_000
) -> tuple[NDArray[np.intp], int]:
    """Integrate every column through its times (K, m), increasing, and hand over what is there.

    All columns go on until the last of them has reached its last time, and each point is handed
    over by itself: nothing but the columns decides what is computed, down to the last bit.

    Parameters
    ----------
    columns : BatchedFlows
        The problems.
    times : array of shape (K, m)
        When to save.
    save : callable
        Takes what is reached.
    tol : float
        The error of x in one step, relative to the largest entry of x.
    max_steps : int
        Steps, each shared by all columns.

    Returns
    -------
    reached : array of shape (K,)
        How many times each column has reached: m, or fewer where steps ran out; what is saved as
        the next time is then the last point.
    steps : int
        Steps taken.
    """
    run, steps = _Run(columns, times, save, tol), 0
    with np.errstate(all="ignore"):
        while (left := np.flatnonzero(run.reached < times.shape[1])).size and steps < max_steps:
            run.step()
            steps += 1
        for k in left[:, None]:  # out of steps: what there is, in the place of what was wanted
            save(k, run.reached[k], run.nu[:, k], run.x[:, k], run.t[k])
    return run.reached, steps


class _Run:
    """The state of all columns."""

    def __init__(self, columns: BatchedFlows, times: Array, save: Saved, tol: float) -> None:
        self.c, self.times, self.save, self.tol = columns, times, save, tol
        n, count = columns.y.shape
        self.reached = np.zeros(count, dtype=np.intp)
        self.t, self.nu = np.zeros(count), np.zeros((n, count))
        self.x, self.slope = columns.primal(self.nu, self.t)
        self.f = columns.residual(self.x)
        # The first step moves the largest exponent, 2 mu, by 1: no time that is asked for decides.
        pull = np.abs(columns.XT @ self.f).max(axis=0, initial=0.0)
        self.h = np.divide(0.5, pull, out=times[:, -1].copy(), where=pull > 0)
        self.v = self.f.copy()
        for _ in range(WARM_UP):
            self._power()

    def _power(self) -> None:
        """Improve the estimate of the largest eigenvalue by one power iteration."""
        size = self.c.norm(self.v)
        # v <- J v / |v| with J = w X diag(dx/dmu) X^T; |J v| / |v| tends to J's largest eigenvalue
        self.v = self.c.apply(self.v / np.where(size > 0, size, 1.0), self.slope)
        self.largest = SAFETY * self.c.norm(self.v)

    def step(self) -> None:
        """Take one step of every column, each of its own length; some fail and stay."""
        self._power()
        off, decays = self.c.off, self.c.rate > 0
        self.h = np.minimum(self.h, stages(MAX_STAGES).reach / np.maximum(self.largest, 1e-300))
        before = decays & (self.t < off)  # land where the decay jumps
        self.h = np.where(before, np.minimum(self.h, off - self.t), self.h)
        new = self._advance()
        t = self.t + self.h
        t = np.where(before & (np.abs(t - off) <= 4 * np.spacing(off)), off, t)
        x, slope = self.c.primal(new, t)
        f = self.c.residual(x)
        error = self._error(new, x, slope, f)
        good = error <= 1
        self._hand_over(good, t, new, f)
        for name, value in (("t", t), ("nu", new), ("x", x), ("slope", slope), ("f", f)):
            setattr(self, name, np.where(good, value, getattr(self, name)))
        self.h = self.h * np.clip(0.8 * np.maximum(error, 1e-9) ** (-1 / 3), *GROWTH)

    def _advance(self) -> Array:
        """Go through the stages."""
        plan = stages_for(float((self.h * self.largest).max()))
        hf = self.h * self.f  # h f(Y_0), with Y_0 = nu
        before, last = self.nu, self.nu + plan.first * hf  # Y_1 = Y_0 + mu~_1 h f(Y_0)
        for (mu, nu, mu_tilde, gamma), at in zip(plan.rest, plan.times, strict=False):
            # Y_j = (1 - mu_j - nu_j) Y_0 + mu_j Y_{j-1} + nu_j Y_{j-2}
            #       + mu~_j h f(Y_{j-1}) + gamma~_j h f(Y_0)
            y = self.c.velocity(last, self.t + at * self.h)
            y *= mu_tilde * self.h
            y += (1 - mu - nu) * self.nu + mu * last + nu * before + gamma * hf
            before, last = last, y
        return last

    def _error(self, new: Array, x: Array, slope: Array, f: Array) -> Array:
        """Return the error estimate of x for each column, in units of the tolerance."""
        # RKC's estimate 0.8 (nu_n - nu_{n+1}) + 0.4 h (f_n + f_{n+1}), times d x / d nu.
        error = self.c.XT @ (0.8 * (self.nu - new) + 0.4 * self.h * (self.f + f))
        size = np.abs(x).max(axis=0)
        # The slope at the start of the step as well: a step too far can end where all slopes are 0.
        steep = np.maximum(slope, self.slope)
        found = (steep * np.abs(error)).max(axis=0) / (self.tol * np.maximum(size, 1e-300))
        return np.where(np.isfinite(found), found, 1e9)

    def _hand_over(self, good: NDArray[np.bool_], t: Array, new: Array, f: Array) -> None:
        """Save the points that this step has passed, by cubic Hermite interpolation of nu."""
        due = (self.times <= (t * (1 + 1e-12))[:, None]).sum(axis=1)
        for k in np.flatnonzero(good & (due > self.reached))[:, None]:
            h = (t - self.t)[k]
            for i in range(int(self.reached[k[0]]), int(due[k[0]])):
                at = self.times[k, i]
                s = (at - self.t[k]) / h  # Hermite: nu and f = nu' at both ends, s in [0, 1]
                nu = (1 + 2 * s) * (1 - s) ** 2 * self.nu[:, k] + s**2 * (3 - 2 * s) * new[:, k]
                nu += h * (s * (1 - s) ** 2 * self.f[:, k] - s**2 * (1 - s) * f[:, k])
                self.save(k, np.array([i]), nu, self.c.primal(nu, at, k)[0], at)
            self.reached[k] = due[k]
