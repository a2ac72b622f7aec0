r"""Early stopping as a penalty: argmin loss + D_{R_a}(x, x_c) / t, by its dual."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import scipy.linalg
import torch
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve

from .._solution import Solution, Status
from .._threads import few_threads, one_pool, small_on_one_thread
from ..legendre import LegendreFunction, NewtonProblem, RangeError
from ..legendre.dual import LocalModel
from ._constraints import length
from .solve import SMALL, finite_array, measurements

__all__ = ["PenalizedStats", "penalized"]

Array = NDArray[np.float64]
SETTLED = 1e-13  # size of the gradient of the dual, relative to y, that a step more hardly improves
GOOD = 1e-9  # and at which a point counts as solved
EPS = float(np.finfo(np.float64).eps)
SHORTEST = 1e-12  # part of Newton's step below which a step gives up


@dataclass(frozen=True)
class PenalizedStats:
    """Measurements of `penalized`; along a path, arrays with one entry per ``t`` (except seconds).

    Attributes
    ----------
    residual : float or array
        |Zx + (n/t) theta - y| / |y|, which is 0 where x is optimal (not over ``|y|`` for y = 0).
    steps : int or array
        Newton steps; along a path those since the point before it.
    seconds : float
        Wall time of the call.
    """

    residual: Any
    steps: Any
    seconds: float


def penalized(
    R: LegendreFunction, Z: Any, y: Any, a: float, t: Any, max_steps: int = 1000
) -> Solution:
    r"""Minimize the loss with the Bregman divergence of R_a as a penalty of strength 1/t.

    .. math:: \min_x \frac{1}{2n} |Zx - y|^2 + \frac{1}{t} D_{R_a}(x, x_c), \qquad
              x_c = \arg\min R_a

    It is to the flow that is stopped at the time t, from the centre of R_a and without further
    decay (with `WeightDecay` and a homogeneous g: training from e^a w0), what ridge regression is
    to gradient descent on a linear model: x runs from x_c at t = 0 to `limit` at t = infinity. Both
    have mirror(x) = Z^T theta; the flow has theta = int (y - Z x_s) ds / n, and the penalty
    theta = t (y - Zx) / n.

    Parameters
    ----------
    R : LegendreFunction
        From `legendre`. Where R has a clock, t is clock(a) times the time of the flow.
    Z : Tensor or array of shape ``(n, *R.shape)``
        The measurements.
    y : Tensor or array of shape (n,)
        The targets; they need not be consistent.
    a : float
        The accumulated regularization.
    t : float, or 1-d sequence of k floats
        The time, > 0. Several make a path, in any order.
    max_steps : int
        The limit on Newton steps for each t.

    Returns
    -------
    Solution
        ``value`` x, of shape R.shape, or ``(k, *R.shape)`` for a path; ``status`` converged,
        stalled or max_steps, for a path the worst; ``stats`` a `PenalizedStats`; ``aux["theta"]``
        the dual variable, (n,) or (k, n).

    Warns
    -----
    RuntimeWarning
        If a point did not converge.

    Raises
    ------
    ValueError
        If a shape does not fit, t is not positive, or something is NaN or infinite.
    RangeError
        If R_a has no centre at this ``a``.

    Examples
    --------
    A linear model started at 0 gives ridge regression with the penalty ``|x|^2 / (2t)``:

    >>> import torch, mirrorflow as mf
    >>> R = mf.legendre(mf.Identity(), mf.Separable(), torch.zeros(2, dtype=torch.float64))
    >>> Z, y = torch.tensor([[1.0, 2.0]]), torch.tensor([2.0])
    >>> mf.penalized(R, Z, y, a=0.0, t=[0.2, 1e9]).value  # 2 Z / (5 + 1/t)
    tensor([[0.2000, 0.4000],
            [0.4000, 0.8000]], dtype=torch.float64)
    """
    started = time.perf_counter()
    if not isinstance(R, LegendreFunction):
        raise TypeError(f"R must be a LegendreFunction, got {type(R)}. Make one by mf.legendre.")
    Zs, ys = measurements(R, Z, y)
    at, times = finite_array("a", a), finite_array("t", t)
    if at.ndim:
        raise ValueError(f"a must be one number, got shape {at.shape}. Call once for each a.")
    if times.ndim > 1 or not times.size or not (times > 0).all():
        raise ValueError(f"t must be a positive number or a 1-d sequence of them, got {t}")
    with (
        np.errstate(all="ignore"),
        one_pool(),
        small_on_one_thread(Zs.size, SMALL),
        few_threads(Zs.size, SMALL),
    ):
        points = _path(R, Zs, ys, float(at), times.reshape(-1), max_steps)
    _warn(points)
    x = torch.from_numpy(np.stack([p.x for p in points])).to(R.dtype).reshape(-1, *R.shape)
    theta = torch.from_numpy(np.stack([p.theta for p in points])).to(R.dtype)
    worst = max((p.status for p in points), key=ORDER.index)
    residual, steps = np.array([p.residual for p in points]), np.array([p.steps for p in points])
    seconds = time.perf_counter() - started
    if times.ndim == 0:
        stats = PenalizedStats(float(residual[0]), int(steps[0]), seconds)
        return Solution(x[0], worst, stats, aux={"theta": theta[0]})
    return Solution(x, worst, PenalizedStats(residual, steps, seconds), aux={"theta": theta})


ORDER = (Status.converged, Status.stalled, Status.max_steps)


@dataclass(frozen=True)
class _Point:
    x: Array
    theta: Array
    residual: float
    steps: int
    status: Status


def _path(
    R: LegendreFunction, Z: Array, y: Array, a: float, times: Array, max_steps: int
) -> list[_Point]:
    """Solve at each t, from the smallest up; each starts from its neighbour."""
    rows = _Rows(Z, y)
    problem = LegendreFunction.dual_problem(R, rows.Z)  # by its maps, whatever R has for `limit`
    assert isinstance(problem, NewtonProblem)
    problem.require_centre(a)
    search = _Search(problem, rows, a, max_steps)
    points: dict[int, _Point] = {}
    phi = np.zeros(len(rows.y))
    for i in np.argsort(times, kind="stable"):
        points[i] = search.solve(phi, len(y) / float(times[i]))  # the ridge n/t
        phi = points[i].theta
    return [rows.restored(points[i], float(times[i])) for i in range(len(times))]


class _Rows:
    r"""The same problem with independent rows: Z = U Z', y = U y' + r with U^T U = I, U^T r = 0.

    From theta = t (y - Zx)/n follows theta = U phi + (t/n) r, with phi = t (y' - Z'x)/n and
    mu = Z^T theta = Z'^T phi. Left in theta, the part (t/n) r, which no x can change, would drown
    phi in its rounding as t grows.
    """

    def __init__(self, Z: Array, y: Array) -> None:
        self.U: Array | None = None
        self.Z, self.y, self.r = Z, y, np.zeros_like(y)
        self.unit = length(y) or 1.0  # also where y' is 0
        if not Z.size:
            return
        U, s, V = scipy.linalg.svd(Z, full_matrices=False, check_finite=False)
        rank = int((s > max(Z.shape) * EPS * s[0]).sum())
        if 0 < rank < len(Z):
            self.U = kept = U[:, :rank]
            self.Z, self.y = s[:rank, None] * V[:rank], kept.T @ y
            left = y - kept @ self.y
            self.r = left if length(left) > SETTLED * self.unit else self.r  # else rounding

    def restored(self, point: _Point, t: float) -> _Point:
        """Return the point with the theta of the rows as they were given."""
        if self.U is None:
            return point
        theta = self.U @ point.theta + t / len(self.r) * self.r
        return replace(point, theta=theta)


class _Search:
    r"""Newton's method on the dual, min R_a^*(Z^T theta) + (n/2t) |theta|^2 - <y, theta>.

    Its gradient is Zx + (n/t) theta - y with x = primal(Z^T theta, a), which vanishes where
    theta = t (y - Zx)/n; its Hessian is Z W Z^T + (n/t) I, W = d primal / d mu.
    """

    def __init__(self, problem: NewtonProblem, rows: _Rows, a: float, max_steps: int) -> None:
        self.problem, self.a, self.max_steps = problem, a, max_steps
        self.Z, self.y, self.unit = rows.Z, rows.y, rows.unit

    def solve(self, theta: Array, ridge: float) -> _Point:
        """Return the solution for the ridge n/t, from a theta in the range."""
        local = self.problem.evaluate(self.Z.T @ theta, self.a)
        gradient, last = self._gradient(local, theta, ridge), np.inf
        steps, status = 0, Status.max_steps
        while steps < self.max_steps:
            size = length(gradient) / self.unit
            floor = SETTLED * (1 + length(self.Z @ local.x) / self.unit)
            if size <= floor or (size < GOOD and size > 0.3 * last):
                status = Status.converged
                break
            step = self._step(local, gradient, ridge)
            moved = self._moved(theta, step, float(step @ gradient), ridge)
            if moved is None:
                status = Status.converged if size < GOOD else Status.stalled
                break
            last, steps = size, steps + 1
            theta, local, gradient = moved
        return _Point(local.x, theta, length(gradient) / self.unit, steps, status)

    def _gradient(self, local: LocalModel, theta: Array, ridge: float) -> Array:
        return self.Z @ local.x + ridge * theta - self.y  # 0 where theta = (t/n) (y - Zx)

    def _step(self, local: LocalModel, gradient: Array, ridge: float) -> Array:
        """Return Newton's step."""
        rows = self.Z if local.vectors is None else self.Z @ local.vectors
        hessian = (rows * local.slope) @ rows.T  # Z W Z^T, and n/t on its diagonal
        hessian[np.diag_indices_from(hessian)] += ridge
        try:
            return -cho_solve(cho_factor(hessian, lower=True), gradient)
        except (np.linalg.LinAlgError, ValueError):  # rows dependent up to rounding
            return -np.asarray(np.linalg.lstsq(hessian, gradient, rcond=None)[0], np.float64)

    def _moved(
        self, theta: Array, step: Array, slope: float, ridge: float
    ) -> tuple[Array, LocalModel, Array] | None:
        """Move along ``step``, halved while the slope of the convex objective turns round."""
        share = 1.0
        while slope < 0 and share > SHORTEST:
            there = theta + share * step
            try:
                local = self.problem.evaluate(self.Z.T @ there, self.a)
            except RangeError:
                local = None
            if local is not None and np.isfinite(local.x).all():
                gradient = self._gradient(local, there, ridge)
                # The slope along the step may turn to half of its size, past the minimum.
                if np.isfinite(local.slope).all() and step @ gradient <= -0.5 * slope:
                    return there, local, gradient
            share /= 2
        return None


def _warn(points: list[_Point]) -> None:
    """Warn of points that did not converge."""
    bad = [p for p in points if p.status is not Status.converged]
    if bad:
        worst = max(p.residual for p in bad)
        message = f"penalized: {bad[0].status.value} ({len(bad)} of {len(points)} points)"
        warnings.warn(f"{message}; relative residual {worst:.1e}", RuntimeWarning, stacklevel=3)
