r"""Runge-Kutta-Chebyshev steps: explicit, and stable over a stretch that grows like s^2.

A gradient flow in dual coordinates has a Jacobian with real, negative eigenvalues, stiff once
coordinates have grown: s stages reach about 0.65 s^2 / lambda, where s Runge-Kutta steps of order
4 reach 0.7 s / lambda. Formulas: Sommeijer, Shampine and Verwer, "RKC: an explicit solver for
parabolic PDEs", J. Comp. Appl. Math. 88 (1998), order 2, damping 2/13.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._flows import Flows

__all__ = ["MAX_STAGES", "Saved", "Stages", "integrate", "stages", "stages_for"]

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
    w1 = D[s] / D2[s]  # T_s'(w0) / T_s''(w0)
    b = [0.0, 0.0, *(D2[j] / D[j] ** 2 for j in range(2, s + 1))]  # b_j = T_j''(w0) / T_j'(w0)^2
    b[0] = b[1] = b[2]
    rest = []
    for j in range(2, s + 1):
        mu, nu, mu_tilde = 2 * b[j] * w0 / b[j - 1], -b[j] / b[j - 2], 2 * b[j] * w1 / b[j - 1]
        # gamma~_j = -a_{j-1} mu~_j with a_j = 1 - b_j T_j(w0).
        rest.append((mu, nu, mu_tilde, -(1 - b[j - 1] * T[j - 1]) * mu_tilde))
    first = b[1] * w1
    # The stable interval ends where w0 - w1 h lambda = -1.
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
        # T_{j+1} = 2 w T_j - T_{j-1}, and its first two derivatives in w.
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


# The flows: each row has its own steps, all share the products with X.

Array = NDArray[Any]
SAFETY = 1.15  # on the estimate of the largest eigenvalue, which comes from below
WARM_UP = 6  # power iterations before the first step
GROWTH = (0.2, 3.0)

# Called with a row, the index of its time, its state, x and t.
Saved = Callable[[int, int, Array, Array, float], None]


def integrate(
    flows: Flows, times: Array, save: Saved, tol: float = 1e-3, max_steps: int = 10_000
) -> tuple[NDArray[np.intp], int]:
    """Integrate every row through its times (K, m), increasing, and hand over what is there.

    All rows go on until the last of them has reached its last time, and each point is handed over
    by itself: nothing but the flows decides what is computed, down to the last bit.

    Parameters
    ----------
    flows : Flows
        The problems.
    times : array of shape (K, m)
        When to save.
    save : callable
        Takes what is reached.
    tol : float
        The error of x in one step, relative to the largest entry of x.
    max_steps : int
        Steps, each shared by all rows.

    Returns
    -------
    reached : array of shape (K,)
        How many times each row has reached: m, or fewer where steps ran out; what is saved as
        the next time is then the last point.
    steps : int
        Steps taken.
    """
    run, steps = _Run(flows, times, save, tol), 0
    with np.errstate(all="ignore"):
        while (left := np.flatnonzero(run.reached < times.shape[1])).size and steps < max_steps:
            run.step()
            steps += 1
        for k in left:  # out of steps: what there is, in the place of what was wanted
            save(int(k), int(run.reached[k]), run.state[k], run.x[k], float(run.t[k]))
    return run.reached, steps


class _Run:
    """The state of all rows, with its velocity f, and mu, with its derivative g."""

    def __init__(self, flows: Flows, times: Array, save: Saved, tol: float) -> None:
        self.flows, self.times, self.save, self.tol = flows, times, save, tol
        self.state = flows.start
        count = len(self.state)
        self.reached, self.t = np.zeros(count, dtype=np.intp), np.zeros(count)
        self.mu = flows.mirror(self.state, self.t)
        self.x, self.slope = flows.primal(self.mu, self.t)
        self.f = flows.velocity(self.x)
        self.g = flows.gradient(self.f)
        # The first step moves the largest exponent, 2 mu, by 1: no time that is asked for decides.
        pull = np.abs(self.g).max(axis=1, initial=0.0).astype(np.float64)
        self.h = np.divide(0.5, pull, out=times[:, -1].copy(), where=pull > 0)
        self.v = flows.direction
        for _ in range(WARM_UP):
            self._power()

    def _power(self) -> None:
        """Improve the estimate of the largest eigenvalue by one power iteration."""
        size = self.flows.norm(self.v, self.slope)
        # v <- J v / |v| with J = w X diag(dx/dmu) X^T; |J v| / |v| tends to J's largest eigenvalue
        self.v = self.flows.apply(self.v / np.where(size > 0, size, 1.0), self.slope)
        self.largest = SAFETY * self.flows.norm(self.v, self.slope)[:, 0]

    def step(self) -> None:
        """Take one step of every row, each of its own length; some fail and stay."""
        self._power()
        off, decays = self.flows.off, self.flows.rate > 0
        # h lambda at most what MAX_STAGES are stable for.
        self.h = np.minimum(self.h, stages(MAX_STAGES).reach / np.maximum(self.largest, 1e-300))
        before = decays & (self.t < off)  # land where the decay jumps
        self.h = np.where(before, np.minimum(self.h, off - self.t), self.h)
        new = self._advance()
        t = self.t + self.h
        t = np.where(before & (np.abs(t - off) <= 4 * np.spacing(off)), off, t)
        mu = self.flows.mirror(new, t)
        x, slope = self.flows.primal(mu, t)
        f = self.flows.velocity(x)
        g = self.flows.gradient(f)
        error = self._error(mu, x, slope, g)
        good = error <= 1
        self._hand_over(good, t, new, f, mu, g)
        self._accept(good, t=t, state=new, mu=mu, x=x, slope=slope, f=f, g=g)
        # Order 2: the error of a step grows like h^3.
        self.h = self.h * np.clip(0.8 * np.maximum(error, 1e-9) ** (-1 / 3), *GROWTH)

    def _accept(self, good: NDArray[np.bool_], **values: Array) -> None:
        """Go on from the new values where the step was good."""
        every = bool(good.all())
        for name, value in values.items():
            if not every:
                which = good if value.ndim == 1 else good[:, None]
                value = np.where(which, value, getattr(self, name))
            setattr(self, name, value)

    def _advance(self) -> Array:
        """Go through the stages."""
        plan, h = stages_for(float((self.h * self.largest).max())), self.h[:, None]
        hf = h * self.f  # h f(Y_0), with Y_0 the state
        before, last = self.state, self.state + plan.first * hf  # Y_1 = Y_0 + mu~_1 h f(Y_0)
        for (mu, nu, mu_tilde, gamma), at in zip(plan.rest, plan.times, strict=False):
            # Y_j = (1 - mu_j - nu_j) Y_0 + mu_j Y_{j-1} + nu_j Y_{j-2}
            #       + mu~_j h f(Y_{j-1}) + gamma~_j h f(Y_0)
            y = self.flows.move(last, self.t + at * self.h) * (mu_tilde * h)
            y += (1 - mu - nu) * self.state + mu * last + nu * before + gamma * hf
            before, last = last, y
        return last

    def _error(self, mu: Array, x: Array, slope: Array, g: Array) -> Array:
        """Return the error estimate of x for each row, in units of the tolerance."""
        # RKC's estimate 0.8 (nu_n - nu_{n+1}) + 0.4 h (f_n + f_{n+1}), times d x / d nu.
        error = self.mu - mu
        error *= 2
        error += self.h.astype(g.dtype)[:, None] * (self.g + g)
        # The slope at the start of the step as well: a step too far can end where all slopes are 0.
        error *= np.maximum(slope, self.slope)
        size = np.maximum(np.abs(x).max(axis=1), np.finfo(x.dtype).tiny)
        found = 0.4 * np.abs(error, out=error).max(axis=1) / (self.tol * size)
        return np.where(np.isfinite(found), found, 1e9).astype(np.float64)

    def _hand_over(
        self, good: NDArray[np.bool_], t: Array, new: Array, f: Array, mu: Array, g: Array
    ) -> None:
        """Save the points that this step has passed, by cubic Hermite interpolation."""
        due = (self.times <= (t * (1 + 1e-12))[:, None]).sum(axis=1)
        due = np.where(good, np.maximum(due, self.reached), self.reached)
        if (due == self.reached).all():
            return
        k = np.repeat(np.arange(len(due)), due - self.reached)
        i = np.concatenate([np.arange(*ends) for ends in zip(self.reached, due, strict=True)])
        self.reached, at, h = due, self.times[k, i], (t - self.t)[k, None]
        weights = _hermite((at - self.t[k])[:, None] / h, h)
        states = _combined(weights, (self.state[k], new[k], self.f[k], f[k]))
        between = _combined(weights, (self.mu[k], mu[k], self.g[k], g[k]))
        points = self.flows.primal(between, at, k)[0]
        for point in zip(k.tolist(), i.tolist(), states, points, at.tolist(), strict=True):
            self.save(*point)


def _hermite(s: Array, h: Array) -> tuple[Array, Array, Array, Array]:
    """Return the weights, at the fraction s of h, of values and then derivatives at both ends."""
    left, right = (1 - s) ** 2, s**2
    return (1 + 2 * s) * left, right * (3 - 2 * s), h * s * left, h * right * (s - 1)


def _combined(weights: tuple[Array, ...], parts: tuple[Array, ...]) -> Array:
    """Return the sum of the parts with the weights, in the precision of the first part."""
    of = parts[0].dtype
    found = weights[0].astype(of) * parts[0]
    for weight, part in zip(weights[1:], parts[1:], strict=True):
        found += weight.astype(of) * part
    return found
