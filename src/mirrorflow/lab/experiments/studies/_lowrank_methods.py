"""The methods of the low-rank study: each has one knob, which is chosen on held-out data."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._lowrank_data import Entries, LowRankData

__all__ = ["METHODS", "OPTIONAL", "Fitted", "available", "fit"]

Array = NDArray[np.float64]
DECAYS = (0.5, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01)  # in units of the smallest that keeps X at 0
PATH = tuple(float(c) for c in np.geomspace(0.5, 1e-3, 14))
RANKS = (1, 2, 3, 4, 5, 7, 10, 14, 20, 30)
STEPS = 300  # of soft- and hard-impute, for each knob
SETTLED = 1e-4  # relative change of X in a step


@dataclass(frozen=True)
class Fitted:
    """What a method found.

    Attributes
    ----------
    X : array
        The matrix.
    knob : float
        Decay, threshold or rank that was chosen.
    seconds : float
        For everything: the whole grid, and the last fit to all data.
    settled : bool
        Whether the last fit has converged.
    """

    X: Array
    knob: float
    seconds: float
    settled: bool


Solutions = list[tuple[Array, bool]]
Method = Callable[[LowRankData, Sequence[float], int], Solutions]


def fit(name: str, problem: LowRankData, max_rank: int, seed: int) -> Fitted:
    """Choose the knob on held-out data, and fit all data with it."""
    method, knobs = METHODS[name]
    started = time.perf_counter()
    train, held = problem.split(np.random.default_rng(seed))
    knobs = [k for k in knobs if method is not _hard_impute or k <= max_rank]
    errors = [held.error(X) for X, _ in method(train, knobs, max_rank)]
    knob = knobs[int(np.argmin(errors))]
    X, settled = method(problem, [knob], max_rank)[-1]
    return Fitted(X, float(knob), time.perf_counter() - started, settled)


def _mirrorflow(off: bool) -> Method:
    """Train factors under decay; with ``off`` it is switched off in the end."""

    def solve(problem: LowRankData, knobs: Sequence[float], max_rank: int) -> Solutions:
        from mirrorflow import MatrixSensing

        data, options = _arguments(problem)
        found: Solutions = []
        for alpha in knobs:
            model = MatrixSensing(max_rank, alpha, switch_off=off, **options)
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                model.fit(*data)
            late = any("not settled" in str(w.message) for w in said)
            found.append((model.matrix(), not late))
        return found

    return solve


def _arguments(problem: LowRankData) -> tuple[tuple[Array, ...], dict[str, Any]]:
    """Return what MatrixSensing fits, and for entries as many steps as the others take."""
    if isinstance(problem, Entries):
        return (problem.M,), {"tol": SETTLED, "max_iter": STEPS}
    return (problem.A, problem.y), {}


def _soft_impute(problem: LowRankData, knobs: Sequence[float], max_rank: int) -> Solutions:
    """Follow the thresholds of Mazumder, Hastie and Tibshirani (2010), each from the last."""
    top = np.linalg.norm(problem.adjoint(), 2)
    above = [c for c in PATH if c > max(knobs)]  # the path also reaches a single threshold

    def shrink(s: Array, knob: float) -> Array:
        return np.maximum(s - knob * top, 0)

    return _impute(problem, [*above, *knobs], shrink)[len(above) :]


def _hard_impute(problem: LowRankData, knobs: Sequence[float], max_rank: int) -> Solutions:
    """Keep as many singular values as the knob says, unshrunk; start from the rank before."""
    before = [r for r in RANKS if r < min(knobs)]

    def keep(s: Array, knob: float) -> Array:
        return np.where(np.arange(len(s)) < knob, s, 0.0)

    return _impute(problem, [*before, *knobs], keep)[len(before) :]


def _impute(
    problem: LowRankData, knobs: Sequence[float], shrink: Callable[[Array, float], Array]
) -> Solutions:
    """Fill the unknown entries with X, shrink the singular values, and repeat."""
    assert isinstance(problem, Entries)
    known, Y = ~np.isnan(problem.M), problem.adjoint()
    X, found = np.zeros_like(Y), []
    for knob in knobs:
        settled = False
        for _ in range(STEPS):
            U, s, Vt = np.linalg.svd(np.where(known, Y, X), full_matrices=False)
            new = (U * shrink(s, knob)) @ Vt
            settled = np.linalg.norm(new - X) <= SETTLED * np.linalg.norm(new)
            X = new
            if settled:
                break
        found.append((X, bool(settled)))
    return found


def _nuclear(problem: LowRankData, knobs: Sequence[float], max_rank: int) -> Solutions:
    """Minimize 1/2 |residual|^2 + knob |X|_* by CVXPY; knob 0 is |X|_* subject to the data."""
    import cvxpy as cp

    M, weight = cp.Variable(problem.shape), cp.Parameter(nonneg=True)
    if isinstance(problem, Entries):
        known = np.nonzero(~np.isnan(problem.M))
        residual: Any = M[known] - problem.M[known]
    else:
        flat = problem.A.reshape(len(problem.y), -1)
        residual = flat @ cp.vec(M, order="C") - problem.y
    norm = cp.normNuc(M)
    soft = cp.Problem(cp.Minimize(0.5 * cp.sum_squares(residual) + weight * norm))
    hard = cp.Problem(cp.Minimize(norm), [residual == 0])
    top, found = np.linalg.norm(problem.adjoint(), 2), []
    for knob in knobs:
        weight.value = knob * top
        chosen = soft if knob > 0 else hard
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the status says it as well
            chosen.solve(solver=cp.SCS, eps=1e-6, max_iters=20_000)
        found.append((np.asarray(M.value), chosen.status == cp.OPTIMAL))
    return found


METHODS: dict[str, tuple[Method, tuple[float, ...]]] = {
    "mirrorflow (decay off)": (_mirrorflow(True), DECAYS),
    "mirrorflow (decay kept)": (_mirrorflow(False), (*DECAYS, 0.005, 0.002)),
    "soft-impute": (_soft_impute, PATH),
    "hard-impute": (_hard_impute, RANKS),
    "nuclear norm (CVXPY)": (_nuclear, (*DECAYS, 0.005, 0.0)),
}
OPTIONAL = {"nuclear norm (CVXPY)": "cvxpy"}


def available(name: str) -> bool:
    """Whether the package of a method is installed."""
    return name not in OPTIONAL or find_spec(OPTIONAL[name]) is not None
