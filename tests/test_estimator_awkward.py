"""240 awkward designs: each fit against numpy.linalg.lstsq, or against CVXPY where x >= 0."""

import warnings
from itertools import cycle, product

import cvxpy as cp
import numpy as np
import pytest
from scipy.sparse import csr_matrix

import mirrorflow as mf


def one_hot(rng, n, levels):
    codes = np.r_[np.arange(levels), rng.integers(0, levels, n - levels)]
    return np.eye(levels)[rng.permutation(codes)]


def low_rank(rng, n, d, rank):
    return rng.standard_normal((n, rank)) @ rng.standard_normal((rank, d))


def near(rng, n, d, distance):
    """Return columns of which the last is nearly the sum of the others."""
    X = rng.standard_normal((n, d))
    return np.c_[X, X.sum(1) + distance * rng.standard_normal(n)]


def thinned(rng, n, d):
    """Return a matrix of which one entry in five is not 0, with a column that is never seen."""
    X = rng.standard_normal((n, d)) * (rng.random((n, d)) < 0.2)
    X[:, -1] = 0.0
    return X


DESIGNS = {
    "tall": lambda r: r.standard_normal((50, 6)),
    "square": lambda r: r.standard_normal((15, 15)),
    "wide": lambda r: r.standard_normal((12, 40)),
    "low rank, tall": lambda r: low_rank(r, 45, 9, 4),
    "low rank, square": lambda r: low_rank(r, 18, 18, 6),
    "low rank, wide": lambda r: low_rank(r, 14, 30, 5),
    "duplicated": lambda r: r.standard_normal((35, 5))[:, [0, 1, 2, 2, 3, 0, 4, 2]],
    "near-dependent": lambda r: near(r, 40, 5, 1e-4),
    "dependent to rounding": lambda r: near(r, 40, 5, 1e-16),
    "one-hot": lambda r: one_hot(r, 36, 5),
    "one-hot sets": lambda r: np.c_[one_hot(r, 40, 4), one_hot(r, 40, 5), r.standard_normal(40)][
        :, r.permutation(10)
    ],
    "sparse": lambda r: thinned(r, 60, 12),
}
# A way to fit, and what it needs: the options, weights, and the number of targets.
WAYS = {
    "plain": ({}, None, 1),
    "weighted": ({}, "positive", 1),
    "rows without weight": ({}, "some 0", 1),
    "no intercept": ({"fit_intercept": False}, "positive", 1),
    "positive": ({"positive": True}, "positive", 1),
    "several targets": ({}, "positive", 3),
    "standardized": ({"standardize": True}, None, 2),
    "ridge-like": ({"log_A": 2.0}, None, 1),
    "to L1": ({"log_A": -30.0}, None, 1),
    "single precision": ({"fit_intercept": False}, None, 1),
}
CASES = list(product(DESIGNS, WAYS, (0, 1)))
assert len(CASES) == 240
FEW = [(name, way, 0) for name, way in zip(DESIGNS, cycle(WAYS))]  # in the ordinary suite


def weights_of(rng, kind, n):
    if kind is None:
        return None
    found = rng.uniform(0.5, 2.0, n)
    if kind == "some 0":
        found[rng.choice(n, n // 5, replace=False)] = 0.0
    return found


def textbook(X, y, weights, center):
    """Return the weighted, centred problem, each column of unit length."""
    v = np.ones(len(X)) if weights is None else weights
    v = v / v.sum()
    if center:
        X, y = X - v @ X, y - v @ y
    Z, t = np.sqrt(v)[:, None] * X, np.sqrt(v)[:, None] * y
    size = np.linalg.norm(Z, axis=0)
    return Z, t, np.where(size > 1e-9 * size.max(), size, np.inf)


def nonnegative(Z, t):
    """Return the least residual of x >= 0, by CVXPY."""
    x = cp.Variable(Z.shape[1], nonneg=True)
    cp.Problem(cp.Minimize(cp.norm(Z @ x - t))).solve(solver="CLARABEL")
    return np.linalg.norm(Z @ np.maximum(x.value, 0.0) - t)


def check(name, way, seed):
    """Fit, and compare with the oracle."""
    options, kind, K = WAYS[way]
    rng = np.random.default_rng([seed, list(DESIGNS).index(name), list(WAYS).index(way)])
    X = DESIGNS[name](rng)
    n, d = X.shape
    Y = X @ rng.standard_normal((d, K)) + rng.standard_normal((n, K))
    weights = weights_of(rng, kind, n)
    loose = 1.0
    if way == "single precision":
        X, Y, loose = X.astype(np.float32), Y.astype(np.float32), 1e3
    model = mf.MirrorFlowRegressor(interpolate=True, zero_tol=0, **options)
    model.fit(X, Y[:, 0] if K == 1 else Y, sample_weight=weights)
    coefs = np.atleast_2d(model.coef_).astype(float)
    center = model.fit_intercept
    Z, T, size = textbook(X.astype(float), Y.astype(float), weights, center)
    for k, x in enumerate(coefs):
        t, scale = T[:, k], np.linalg.norm(T[:, k])
        if model.positive:
            assert (x >= 0).all()
            assert np.linalg.norm(Z @ x - t) <= nonnegative(Z / size, t) + 1e-6 * scale
        else:
            unit = Z / size
            fitted = unit @ np.linalg.lstsq(unit, t, rcond=1e-7 if loose > 1 else 1e-9)[0]
            np.testing.assert_allclose(Z @ x, fitted, atol=1e-6 * loose * scale)
        assert np.atleast_1d(model.kkt_residual_)[k] < 1e-6
    v = np.ones(n) if weights is None else weights
    if center:  # the intercept makes the weighted residuals sum to 0
        missed = Y - model.predict(X).reshape(n, K)
        np.testing.assert_allclose(v @ missed / v.sum(), 0, atol=1e-6 * np.abs(Y).max())
    sparse_is_dense(X, Y, weights, options)


def sparse_is_dense(X, Y, weights, options):
    """Compare flows that are stopped: a sparse X is the same problem as the dense one."""
    model = mf.MirrorFlowRegressor(**{"log_A": -4.0, "t": 1.5, "tol": 1e-5} | options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of the scales of columns
        dense = np.atleast_2d(model.fit(X, Y, weights).coef_)
        sparse = np.atleast_2d(model.fit(csr_matrix(X), Y, weights).coef_)
    np.testing.assert_allclose(sparse, dense, atol=1e-3 * np.abs(dense).max())


@pytest.mark.parametrize(("name", "way", "seed"), FEW)
def test_a_fit_is_that_of_the_oracle_on_a_dozen_awkward_designs(name, way, seed):
    check(name, way, seed)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "way", "seed"), CASES)
def test_a_fit_is_that_of_the_oracle_on_awkward_designs(name, way, seed):
    check(name, way, seed)


@pytest.mark.parametrize("targets", [[3.0, 2.0, 1.0], [[1.0, 3.0], [2.0, 2.0], [3.0, 1.0]]])
def test_coefficients_that_must_be_0_are_0(targets):
    """SciPy's non-negative least squares aborts the interpreter without columns."""
    X, y = np.array([[1.0], [2.0], [3.0]]), np.array(targets)
    model = mf.MirrorFlowRegressor(positive=True, interpolate=True).fit(X, y)
    expected = [0.0] if y.ndim == 1 else [[1.0], [0.0]]
    np.testing.assert_allclose(model.coef_, expected, atol=1e-12)
    assert np.isfinite(model.dual_coef_).all() and np.max(model.gap_) < 1e-12
    flat = mf.MirrorFlowRegressor(positive=True, interpolate=True).fit(np.ones((3, 2)), 1e-9 * X)
    assert not flat.coef_.any() and not flat.support_.any()
