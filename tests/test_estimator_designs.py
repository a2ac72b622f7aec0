"""End points on awkward designs, against least squares, NNLS, CVXPY and the null space."""

import cvxpy as cp
import numpy as np
import pytest
from scipy.linalg import null_space
from scipy.optimize import nnls

import mirrorflow as mf

Regressor = mf.MirrorFlowRegressor


def one_hot(rng, n, levels):
    codes = np.r_[np.arange(levels), rng.integers(0, levels, n - levels)]
    return np.eye(levels)[rng.permutation(codes)]


def combined(rng, n, d, rank):
    """Return a matrix of rank ``rank`` whose columns are combinations of independent ones."""
    return rng.standard_normal((n, rank)) @ rng.standard_normal((rank, d))


DESIGNS = {
    "tall": lambda r: r.standard_normal((40, 5)),
    "square": lambda r: r.standard_normal((12, 12)),
    "wide": lambda r: r.standard_normal((12, 30)),
    "sum_last": lambda r: (lambda X: np.c_[X, X.sum(1)])(r.standard_normal((40, 4))),
    "sum_first": lambda r: (lambda X: np.c_[X.sum(1), X])(r.standard_normal((40, 4))),
    "duplicate": lambda r: (lambda X: X[:, [0, 1, 1, 2, 0, 3]])(r.standard_normal((30, 4))),
    "proportional": lambda r: (lambda X: np.c_[X, 30.0 * X[:, 1]])(r.standard_normal((30, 4))),
    "low_rank_tall": lambda r: combined(r, 40, 8, 3),
    "low_rank_wide": lambda r: combined(r, 15, 25, 6),
    "low_rank_square": lambda r: combined(r, 20, 20, 7),
    "one_hot": lambda r: one_hot(r, 40, 4),
    "one_hot_sets": lambda r: np.c_[one_hot(r, 40, 4), one_hot(r, 40, 3), r.standard_normal(40)],
    "one_hot_sets_mixed": lambda r: np.c_[one_hot(r, 40, 4), one_hot(r, 40, 3)][
        :, r.permutation(7)
    ],
    "constant": lambda r: np.c_[r.standard_normal((30, 4)), np.full(30, 7.3), np.zeros(30)],
    "repeated_rows": lambda r: np.repeat(r.standard_normal((6, 12)), 3, axis=0),
    "balanced": lambda r: (lambda X: np.r_[X, -X, 0 * X[:1]])(r.standard_normal((8, 25))),
    "shifted": lambda r: (lambda X: np.c_[X, X.sum(1)] + 1e6)(r.standard_normal((40, 4))),
    "shifted_sum": lambda r: (lambda X: np.c_[X, X.sum(1)])(1e6 + r.standard_normal((40, 4))),
    "units": lambda r: (lambda X: np.c_[X, X.sum(1)])(
        r.standard_normal((40, 4)) * [1e-4, 1, 1e3, 1e-2]
    ),
    "polynomial": lambda r: np.vander(r.uniform(-1, 1, 40), 7),
    "near_dependent": lambda r: (lambda X: np.c_[X, X[:, 0] + 1e-4 * r.standard_normal(40)])(
        r.standard_normal((40, 4))
    ),
}
OPTIONS = {
    "plain": {},
    "no_intercept": {"fit_intercept": False},
    "decay": {"decay": mf.TurnOff(1.0, 2.0)},
    "ridge_like": {"log_A": 2.0},
}


def weighted(X, y, weights, center):
    """Return the weighted, centred problem by the textbook, apart from the library."""
    v = weights / weights.sum()
    if center:
        X, y = X - v @ X, y - v @ y
        X, y = X - v @ X, y - v @ y
    root = np.sqrt(v)
    return root[:, None] * X, (root * y.T).T


def least_squares(Z, y, rcond):
    """Return the predictions of least squares on columns of unit length."""
    size = np.sqrt((Z**2).sum(0))
    Z = Z / np.where(size > 1e-9 * size.max(), size, np.inf)
    return Z @ np.linalg.lstsq(Z, y, rcond=rcond)[0], null_space(Z, rcond) / np.where(
        size > 1e-9 * size.max(), size, 1.0
    )[:, None]


@pytest.mark.parametrize("name", DESIGNS)
@pytest.mark.parametrize("kind", OPTIONS)
def test_an_end_point_is_least_squares_with_its_mirror_image_in_the_row_space(name, kind):
    """The two conditions together have one solution: the one of least R_a."""
    rng = np.random.default_rng(len(name) + 100 * len(kind))
    X = DESIGNS[name](rng)
    n, d = X.shape
    y = np.stack([X @ rng.standard_normal(d) + rng.standard_normal(n), rng.standard_normal(n)], 1)
    weights = rng.uniform(0.5, 2, n)
    model = Regressor(interpolate=True, zero_tol=0, **OPTIONS[kind]).fit(X, y, weights)
    Z, t = weighted(X, y, weights, kind != "no_intercept")
    fitted, null = least_squares(Z, t, 1e-8)
    for k in range(2):
        x, size = model.coef_[k], np.linalg.norm(t[:, k])
        np.testing.assert_allclose(Z @ x, fitted[:, k], atol=1e-6 * size)
        mirror = np.arcsinh(x / model.A_[k])
        tilt = null.T @ mirror / np.maximum(np.abs(null).T @ np.abs(mirror), 1e-300)
        assert np.abs(tilt).max(initial=0.0) < 1e-6
        assert model.kkt_residual_[k] < 1e-6
        nu = model.dual_coef_[k]
        if np.abs(X).max() < 1e5:  # the certificate is one of X as given
            mu = X.T @ nu
            assert np.abs(mirror / 2 - mu).max() < 1e-6 * np.abs(mu).max()


@pytest.mark.parametrize("name", DESIGNS)
def test_the_end_of_a_positive_flow_is_that_of_nnls_on_any_design(name):
    rng = np.random.default_rng(len(name))
    X = DESIGNS[name](rng)
    n, d = X.shape
    for truth in (rng.standard_normal(d), rng.uniform(0.5, 1.5, d)):
        y = X @ truth / np.linalg.norm(X, axis=0).max() + rng.standard_normal(n)
        model = Regressor(interpolate=True, positive=True, zero_tol=0).fit(X, y)
        Z, t = weighted(X, y, np.ones(n), True)
        size = np.sqrt((Z**2).sum(0))
        best = nnls(Z / np.where(size > 1e-9, size, np.inf), t)[1]
        assert (model.coef_ >= 0).all()
        assert np.linalg.norm(Z @ model.coef_ - t) <= best + 1e-6 * np.linalg.norm(t)
        assert model.kkt_residual_ < 1e-6


@pytest.mark.parametrize("name", ["tall", "sum_last", "duplicate", "one_hot_sets", "wide"])
@pytest.mark.parametrize("positive", [False, True])
def test_an_end_point_has_the_least_entropy_that_cvxpy_finds(name, positive):
    rng = np.random.default_rng(7)
    X = DESIGNS[name](rng)
    n, d = X.shape
    truth = np.abs(rng.standard_normal(d)) if positive else rng.standard_normal(d)
    y = X @ truth
    model = Regressor(-3.0, interpolate=True, positive=positive, zero_tol=0).fit(X, y)
    Z, t = weighted(X, y, np.ones(n), True)
    U, s, Vt = np.linalg.svd(Z, full_matrices=False)
    keep = s > 1e-8 * s[0]
    Q, b, A = Vt[keep], (U.T @ t)[keep] / s[keep], float(model.A_)
    x = cp.Variable(d)
    if positive:  # x log(x / A) - x
        objective = cp.sum(cp.kl_div(x, np.full(d, A)))
        problem = cp.Problem(cp.Minimize(objective), [Q @ x == b])
        problem.solve(solver="CLARABEL")
        found = x.value
    else:  # the dual: its gradient A sinh(2 Q^T theta) is x
        theta = cp.Variable(int(keep.sum()))
        mu = Q.T @ theta
        dual = b @ theta - A / 4 * cp.sum(cp.exp(2 * mu) + cp.exp(-2 * mu))
        cp.Problem(cp.Maximize(dual)).solve(solver="CLARABEL")
        found = A * np.sinh(2 * Q.T @ theta.value)
    np.testing.assert_allclose(model.coef_, found, atol=1e-3 * np.abs(found).max())


def test_a_small_scale_ends_at_the_smallest_l1_norm_of_least_squares():
    for name in ("sum_last", "duplicate", "low_rank_tall", "one_hot_sets"):
        rng = np.random.default_rng(3)
        X = DESIGNS[name](rng)
        y = rng.standard_normal(len(X))
        model = Regressor(-60.0, interpolate=True, zero_tol=0).fit(X, y)
        Z, t = weighted(X, y, np.ones(len(X)), True)
        fitted, _ = least_squares(Z, t, 1e-8)
        x = cp.Variable(Z.shape[1])
        constraints = [cp.norm(Z @ x - fitted) <= 1e-9]
        smallest = cp.Problem(cp.Minimize(cp.norm1(x)), constraints).solve(solver="CLARABEL")
        excess = 1 - smallest / np.abs(model.coef_).sum()
        assert -1e-6 <= excess <= model.gap_ + 1e-6


def test_single_precision_data_are_not_known_beyond_single_precision():
    rng = np.random.default_rng(0)
    X = rng.standard_normal((60, 4))
    y = X @ [1.0, 2.0, 0.0, -1.0] + rng.standard_normal(60)
    X = np.c_[X, X.sum(1)]
    double = Regressor(interpolate=True).fit(X, y)
    single = Regressor(interpolate=True).fit(X.astype(np.float32), y.astype(np.float32))
    np.testing.assert_allclose(single.coef_, double.coef_, atol=1e-4)


def test_refitting_on_dependent_columns_takes_the_shortest_solution():
    for shift in (0.0, 1e6):
        rng = np.random.default_rng(1)
        X = rng.standard_normal((40, 4)) + shift
        y = (X - shift) @ [1.0, 2.0, -1.0, 0.5] + 0.1 * rng.standard_normal(40)
        X = np.c_[X, X.sum(1)]
        model = Regressor(2.0, 20.0, refit=True, zero_tol=1e-6).fit(X, y)
        assert model.support_.all()
        Z, t = weighted(X, y, np.ones(40), True)
        expected = np.linalg.lstsq(Z, t, rcond=1e-6)[0]
        np.testing.assert_allclose(model.coef_, expected, atol=1e-6)


def test_a_path_of_end_points_stands_on_the_same_rank_decisions():
    rng = np.random.default_rng(0)
    X = DESIGNS["shifted_sum"](rng)
    y = rng.standard_normal(len(X))
    _, coefs, _, gaps = mf.entropy_path(X, y, [2.0, -4.0, -30.0])
    for log_A, coef in zip([2.0, -4.0, -30.0], coefs.T, strict=True):
        model = Regressor(log_A, interpolate=True, zero_tol=0).fit(X, y)
        np.testing.assert_allclose(coef, model.coef_, atol=1e-6 * np.abs(coef).max())
    assert (gaps[:-1] >= gaps[1:] - 1e-9).all()
