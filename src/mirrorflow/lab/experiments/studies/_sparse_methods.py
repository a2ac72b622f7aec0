"""The methods of the sparse regression studies: each chooses its knobs by 5-fold CV."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from itertools import combinations, product
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import (
    ElasticNetCV,
    LassoCV,
    OrthogonalMatchingPursuitCV,
    lasso_path,
)
from sklearn.model_selection import KFold

__all__ = ["GROUPED", "METHODS", "OPTIONAL", "available", "fit", "fit_grouped", "steadiness"]

Array = NDArray[np.float64]
FOLDS = 5
POINTS = 100  # of a path
STEPS = 30  # of the paths of MCP and SCAD, each of which is a fit
BLENDS = (0.0, 0.25, 0.5, 0.75, 1.0)  # parts of the lasso in the relaxed lasso, as in glmnet
MCP_GAMMA = 3.0
SCAD_GAMMA = 3.7
ITERATIONS = 1000  # of iterreg, as its estimator takes
# Of the flow of groups, each of which runs on its own: log A, t, and the least size of a group.
GROUP_TOL = 1e-5  # at the default, errors of collinear columns show in what is predicted
GROUP_SCALES = (-2.0, -10.0)
GROUP_TIMES = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
GROUP_ZEROS = (1e-3, 0.03, 0.1, 0.3)


def fit(name: str, X: Array, y: Array) -> tuple[Array, float]:
    """Fit a method; give its coefficients and intercept."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of convergence, at ends of paths that are not chosen
        return METHODS[name](X, y)


def fit_grouped(name: str, X: Array, y: Array, groups: NDArray[np.intp]) -> tuple[Array, float]:
    """Fit a method that keeps groups of columns or leaves them out whole.

    ``groups`` has the number of the group of each column, from 0.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _by_path(partial(GROUPED[name], groups))(X, y)


def _estimator(make: Callable[[], Any]) -> Callable[[Array, Array], tuple[Array, float]]:
    """Wrap a scikit-learn estimator that does its own cross-validation."""

    def run(X: Array, y: Array) -> tuple[Array, float]:
        model = make().fit(X, y)
        return model.coef_, float(model.intercept_)

    return run


def _flow(**options: Any) -> Any:
    from mirrorflow import MirrorFlowRegressorCV

    return MirrorFlowRegressorCV(**options)


def _elastic_net() -> Any:
    """Make an elastic net that also chooses its mixture."""
    options: Any = {"l1_ratio": [0.1, 0.5, 0.9], "cv": FOLDS}
    return ElasticNetCV(**options)


class Path(Protocol):
    """A path of coefficients: knobs and coefs (d, m), at given knobs or at its own."""

    def __call__(self, X: Array, y: Array, knobs: Array | None = None) -> tuple[Array, Array]:
        """Follow the path."""
        ...


def _by_path(path: Path) -> Callable[[Array, Array], tuple[Array, float]]:
    """Choose on a path of coefficients by cross-validation."""

    def run(X: Array, y: Array) -> tuple[Array, float]:
        knobs, coefs = path(X - X.mean(0), y - y.mean())
        errors = np.zeros(coefs.shape[1])
        for train, test in KFold(FOLDS).split(X):
            mean, offset = X[train].mean(0), y[train].mean()
            _, found = path(X[train] - mean, y[train] - offset, knobs)
            predicted = (X[test] - mean) @ found + offset
            errors += ((y[test][:, None] - predicted) ** 2).sum(0)
        coef = coefs[:, errors.argmin()]
        return coef, float(y.mean() - X.mean(0) @ coef)

    return run


def _relaxed(X: Array, y: Array, knobs: Array | None = None) -> tuple[Array, Array]:
    """Blend every point of the lasso's path with least squares on its support."""
    options: Any = {"alphas": POINTS if knobs is None else knobs}
    followed: Any = lasso_path(X, y, **options)
    alphas, coefs = followed[:2]
    refitted = coefs.copy()
    for i, coef in enumerate(coefs.T):
        support = np.flatnonzero(coef)
        if 0 < len(support) < len(y):  # as many as rows fit anything
            refitted[support, i] = np.linalg.lstsq(X[:, support], y, rcond=None)[0]
    return alphas, np.hstack([part * coefs + (1 - part) * refitted for part in BLENDS])


def _abess(X: Array, y: Array) -> tuple[Array, float]:
    """Fit best subsets of each size, the size chosen by cross-validation (abess)."""
    linear: Any = import_module("abess.linear")  # of the extra bench
    varying = np.ptp(X, axis=0) > 0  # it refuses columns that are constant
    model = linear.LinearRegression(cv=FOLDS, thread=1).fit(X[:, varying], y)
    coef = np.zeros(X.shape[1])
    coef[varying] = model.coef_
    return coef, float(np.ravel(model.intercept_)[0])


def _mcp(X: Array, y: Array, knobs: Array | None = None) -> tuple[Array, Array]:
    """Follow the path of the minimax concave penalty (skglm)."""
    from skglm.estimators import MCPRegression

    top = np.abs(X.T @ y).max() / len(y)
    alphas = np.geomspace(top, 1e-3 * top, STEPS) if knobs is None else knobs
    options: Any = {"gamma": MCP_GAMMA, "fit_intercept": False, "warm_start": True}
    model, coefs = MCPRegression(**options), np.zeros((X.shape[1], len(alphas)))
    for i, alpha in enumerate(alphas):
        coefs[:, i] = model.set_params(alpha=alpha).fit(X, y).coef_
    return alphas, coefs


def _scad(X: Array, y: Array, knobs: Array | None = None) -> tuple[Array, Array]:
    """Follow the path of the smoothly clipped absolute deviation (skglm)."""
    from skglm import GeneralizedLinearEstimator
    from skglm.datafits import Quadratic
    from skglm.penalties import SCAD
    from skglm.solvers import AndersonCD

    top = np.abs(X.T @ y).max() / len(y)
    alphas = np.geomspace(top, 1e-3 * top, STEPS) if knobs is None else knobs
    penalty, coefs = SCAD(top, SCAD_GAMMA), np.zeros((X.shape[1], len(alphas)))
    solver = AndersonCD(fit_intercept=False, warm_start=True)
    model = GeneralizedLinearEstimator(Quadratic(), penalty, solver)
    for i, alpha in enumerate(alphas):
        penalty.alpha = float(alpha)
        coefs[:, i] = model.fit(X, y).coef_
    return alphas, coefs


def _early_stopped(X: Array, y: Array, knobs: Array | None = None) -> tuple[Array, Array]:
    """Return the iterates of Chambolle and Pock's method for basis pursuit (iterreg)."""
    solvers: Any = import_module("iterreg.sparse")  # not on PyPI: type checkers do not find it
    iterates = solvers.dual_primal(X, y, max_iter=ITERATIONS, f_store=1)[-1]
    return np.arange(ITERATIONS, dtype=np.float64), iterates.T


def _group_flow(
    groups: NDArray[np.intp], X: Array, y: Array, knobs: Array | None = None
) -> tuple[Array, Array]:
    """Stop the flow of groups at several times from several scales, without its small groups."""
    from mirrorflow import MirrorFlowRegressor

    found = []
    for log_A, t in product(GROUP_SCALES, GROUP_TIMES):
        options: Any = {"groups": groups, "fit_intercept": False, "zero_tol": 0.0, "tol": GROUP_TOL}
        coef = MirrorFlowRegressor(log_A, t, **options).fit(X, y).coef_
        size = np.sqrt(np.bincount(groups, coef**2))[groups]
        found += [np.where(size >= least * size.max(), coef, 0.0) for least in GROUP_ZEROS]
    return np.arange(len(found), dtype=np.float64), np.transpose(found)


def _group_lasso(
    groups: NDArray[np.intp], X: Array, y: Array, knobs: Array | None = None
) -> tuple[Array, Array]:
    """Follow the path of the group lasso, the norms times the roots of the sizes (skglm)."""
    from skglm.estimators import GroupLasso

    varying = np.ptp(X, axis=0) > 0  # it divides by the norms of groups
    kept, own = np.unique(groups[varying], return_inverse=True)
    weights, Z = np.sqrt(np.bincount(groups)[kept]), X[:, varying]
    top = (np.sqrt(np.bincount(own, (Z.T @ y) ** 2)) / weights).max() / len(y)
    alphas = np.geomspace(top, 1e-3 * top, STEPS) if knobs is None else knobs
    members: Any = [np.flatnonzero(own == g).tolist() for g in range(len(kept))]
    options: Any = {"weights": weights, "fit_intercept": False, "warm_start": True}
    model, coefs = GroupLasso(members, **options), np.zeros((X.shape[1], len(alphas)))
    for i, alpha in enumerate(alphas):
        coefs[varying, i] = model.set_params(alpha=alpha).fit(Z, y).coef_
    return alphas, coefs


METHODS: dict[str, Callable[[Array, Array], tuple[Array, float]]] = {
    "mirrorflow": _estimator(_flow),
    "mirrorflow, refitted": _estimator(lambda: _flow(refit=True)),
    "lasso": _estimator(lambda: LassoCV(cv=FOLDS)),
    "elastic net": _estimator(_elastic_net),
    "relaxed lasso": _by_path(_relaxed),
    "OMP": _estimator(lambda: OrthogonalMatchingPursuitCV(cv=FOLDS)),
    "abess": _abess,
    "MCP": _by_path(_mcp),
    "SCAD": _by_path(_scad),
    "early-stopped basis pursuit": _by_path(_early_stopped),
}
GROUPED: dict[str, Callable[..., tuple[Array, Array]]] = {
    "groups, mirrorflow": _group_flow,
    "group lasso (skglm)": _group_lasso,
}
OPTIONAL = {
    "abess": "abess", "MCP": "skglm", "SCAD": "skglm", "early-stopped basis pursuit": "iterreg",
    "group lasso (skglm)": "skglm",
}  # fmt: skip


def available(name: str) -> bool:
    """Whether the package of a method is installed."""
    return name not in OPTIONAL or find_spec(OPTIONAL[name]) is not None


def steadiness(supports: list[NDArray[np.bool_]]) -> float | None:
    """Return the mean over pairs of splits of the common share of their supports."""
    shares = [
        float((a & b).sum() / (a | b).sum()) if (a | b).any() else 1.0
        for a, b in combinations(supports, 2)
    ]
    return statistics.fmean(shares) if shares else None
