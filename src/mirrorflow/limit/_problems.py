r"""The solver for each kind of dual problem: continuation, or damped Newton steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ..legendre import DualProblem, ExponentialProblem, NewtonProblem, RangeError
from ..legendre._curves import CurveProblem
from ..legendre._exponential_duals import ColumnDual
from ..legendre._weights import WeightsProblem
from ._by_weights import solve_by_weights
from ._constraints import Constraints, length
from ._continuation import DualPoint, follow
from ._curves import solve_along_curves
from ._dense_newton import solve_newton
from ._l1_vertex import at_vertex

__all__ = ["solve_problem"]

Array = NDArray[np.float64]
LARGEST = 600.0  # log of the largest scale of x: some room to 709, where float64 ends


def solve_problem(
    problem: DualProblem, constraints: Constraints, a: Sequence[float], max_steps: int
) -> list[DualPoint]:
    """Solve for each ``a`` by the method for this kind of problem."""
    match problem:
        case ExponentialProblem():
            return _exponential(problem, constraints, a, max_steps)
        case CurveProblem():
            return solve_along_curves(problem, constraints, a, max_steps)
        case WeightsProblem():
            return _by_weights(problem, constraints, a, max_steps)
        case NewtonProblem():
            return _newton(problem, constraints, a, max_steps)
    raise TypeError(
        "R.dual_problem(Z) must return an ExponentialProblem or a NewtonProblem, got "
        f"{type(problem).__name__}. Subclass NewtonProblem for any smooth R_a."
    )


def _by_weights(
    problem: WeightsProblem, constraints: Constraints, a: Sequence[float], max_steps: int
) -> list[DualPoint]:
    """Solve one by one by following w, and by Newton's method where that does not arrive."""
    points = [solve_by_weights(problem, constraints, ai) for ai in a]
    late = [ai for ai, p in zip(a, points, strict=True) if p is None]
    others = iter(_newton(problem.general, constraints, late, max_steps))
    return [next(others) if p is None else p for p in points]


def _newton(
    problem: NewtonProblem, constraints: Constraints, a: Sequence[float], max_steps: int
) -> list[DualPoint]:
    """Solve one by one, from the largest ``a`` down; each starts from its neighbour."""
    points: dict[int, DualPoint] = {}
    theta = None
    for i in np.argsort(-np.asarray(a), kind="stable"):
        points[i] = solve_newton(problem, constraints, a[i], theta, max_steps)
        theta = points[i].theta if points[i].solved else None
    return [points[i] for i in range(len(a))]


def _exponential(
    problem: ExponentialProblem, constraints: Constraints, a: Sequence[float], max_steps: int
) -> list[DualPoint]:
    """Solve along one path where the log-scale is shared, else one by one.

    Where y is 0 the path is one point: theta is the same for every scale, the size of x is not.
    """
    for ai in a:
        if problem.log_size(ai) > LARGEST:
            raise RangeError(
                f"a must keep x within float64, got a = {ai}: x has the scale "
                f"e^{problem.log_size(ai):.0f}. Note that a is -int alpha dt, negative for decay."
            )
    if problem.decay is None or not constraints.b.any():
        return [_along(problem, constraints, ai, [0.0], max_steps)[0] for ai in a]
    scales = problem.decay * np.asarray(a)
    order = np.argsort(-scales, kind="stable")
    lowest = int(order[-1])
    # The dual is made at the lowest scale; at tau its A is e^tau times that.
    taus = [float(scales[i] - scales[lowest]) for i in order]
    points = _along(problem, constraints, a[lowest], taus, max_steps)
    return [points[i] for i in np.argsort(order)]


def _along(
    problem: ExponentialProblem,
    constraints: Constraints,
    a: float,
    taus: list[float],
    max_steps: int,
) -> list[DualPoint]:
    """Solve in units in which b has norm 1, or, where y is 0, in units of x at theta = 0."""
    size = length(constraints.b)
    log_unit = math.log(size) if size > 0 else problem.log_size(a)
    if not math.isfinite(log_unit):  # no coordinate at all
        log_unit = 0.0
    # x / unit has the constants log A - log unit, and solves Q x = b / unit.
    unit = math.exp(log_unit)  # may underflow where y is 0: then so does x
    dual = problem.make(constraints.Q, a, log_unit)
    b = constraints.b / (unit if size > 0 else 1.0)
    vertex = None
    if isinstance(dual, ColumnDual) and dual.large and len(taus) == 1 and size > 0:
        vertex = at_vertex(dual, b, taus[0])
    points = [vertex] if vertex else follow(dual, b, taus, max_steps)
    return [replace(p, x=problem.expand(p.x * unit)) for p in points]
