"""Groups of coefficients: the flow of a number times a vector each, and what it tends to."""

import cvxpy as cp
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from scipy.integrate import solve_ivp
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import GridSearchCV

import mirrorflow as mf

LABELS = np.repeat(np.arange(8), [1, 2, 3, 4, 5, 1, 6, 8])


def problem(n=40, seed=0, noise=0.3):
    rng = np.random.default_rng(seed)
    d = len(LABELS)
    X, truth = rng.standard_normal((n, d)) + 1, np.zeros(d)
    for g in (1, 4):
        truth[g == LABELS] = rng.standard_normal((g == LABELS).sum())
    return X, X @ truth + 2 + noise * rng.standard_normal(n)


def norms(x):
    return np.sqrt(np.bincount(LABELS, x**2))


def literal(X, y, A, T, rate=0.0, off=np.inf):
    """Integrate s and v themselves, group by group."""
    Z, t, d = X - X.mean(0), y - y.mean(), X.shape[1]

    def move(at, w):
        s, v = w[:8], w[8:]
        r = Z.T @ (t - Z @ (s[LABELS] * v)) / len(t)
        alpha = rate if at < off else 0.0
        return np.r_[np.bincount(LABELS, v * r) - alpha * s, s[LABELS] * r - alpha * v]

    w, at = np.r_[np.full(8, np.sqrt(2 * A)), np.zeros(d)], 0.0
    for end in (min(off, T), T):
        if end > at:
            w, at = solve_ivp(move, (at, end), w, "DOP853", rtol=1e-11, atol=1e-13).y[:, -1], end
    return w[:8][LABELS] * w[8:]


@pytest.mark.parametrize("log_A", [1.0, -3.0, -10.0])
@pytest.mark.parametrize("decay", [None, mf.SwitchOff(1.0, 0.7), mf.Constant(0.5)])
@pytest.mark.parametrize("n", [20, 100])  # fewer rows than columns, and so many that sums do
def test_the_fit_is_the_flow_of_s_and_v(log_A, decay, n):
    X, y = problem(n)
    model = mf.MirrorFlowRegressor(
        log_A, 1.5, groups=LABELS, decay=decay, zero_tol=0, tol=1e-7
    ).fit(X, y)
    unit = model.t_ / model.t
    rate, off = (0.0, np.inf) if decay is None else (decay.level, getattr(decay, "at", np.inf))
    A = model.A_ * np.exp(2 * rate * min(model.t, off))
    expected = literal(X, y, A, model.t_, rate / unit, off * unit)
    np.testing.assert_allclose(model.coef_, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("decay", [None, mf.Constant(1.0)])
@pytest.mark.parametrize("log_A", [2.0, -6.0, -900.0])
@pytest.mark.sample(4)
def test_groups_of_one_column_are_m_times_w(decay, log_A):
    X, y = problem()
    model = mf.MirrorFlowRegressor(log_A, 3, decay=decay, zero_tol=0, tol=1e-6)
    single = clone(model).set_params(groups=np.arange(X.shape[1])).fit(X, y)
    plain = model.fit(X, y)
    np.testing.assert_allclose(single.coef_, plain.coef_, atol=1e-4 * np.abs(plain.coef_).max())
    assert (single.t_, single.A_, single.intercept_) == pytest.approx(
        (plain.t_, plain.A_, plain.intercept_), rel=1e-3
    )


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("n", [20, 100])
def test_decay_that_is_kept_ends_at_the_group_lasso(n, weighted):
    X, y = problem(n)
    weights = np.arange(n) % 3 if weighted else None
    model = mf.MirrorFlowRegressor(-4, 300, decay=mf.Constant(0.5), groups=LABELS, zero_tol=1e-6)
    model.set_params(tol=1e-6).fit(X, y, sample_weight=weights)
    v = np.full(n, 1 / n) if weights is None else weights / weights.sum()
    x, b = cp.Variable(X.shape[1]), cp.Variable()
    loss = cp.sum_squares(cp.multiply(np.sqrt(v), y - X @ x - b)) / 2
    penalty = 0.5 * model.t / model.t_
    size = sum(cp.norm(x[np.flatnonzero(g == LABELS)]) for g in range(8))
    cp.Problem(cp.Minimize(loss + penalty * size)).solve(solver=cp.CLARABEL)
    missed = y - X @ model.coef_ - model.intercept_
    reached = v @ missed**2 / 2 + penalty * norms(model.coef_).sum()
    assert reached == pytest.approx((loss + penalty * size).value, abs=1e-8)
    np.testing.assert_allclose(model.coef_, x.value, atol=1e-4)
    found = norms(model.coef_) > 0
    assert 0 < found.sum() < 8 and (found == (norms(x.value) > 1e-5)).all()


def test_turning_a_group_turns_its_coefficients_and_nothing_else():
    X, y = problem()
    rng = np.random.default_rng(1)
    turn = np.eye(X.shape[1])
    for g in range(8):
        of = np.flatnonzero(g == LABELS)
        turn[np.ix_(of, of)] = np.linalg.qr(rng.standard_normal((len(of), len(of))))[0]
    model = mf.MirrorFlowRegressor(-8, 2, groups=LABELS, zero_tol=0.01, tol=1e-7)
    plain, turned = clone(model).fit(X, y), clone(model).fit(X @ turn, y)
    np.testing.assert_allclose(turn @ turned.coef_, plain.coef_, atol=1e-5)
    assert 0 < (norms(plain.coef_) == 0).sum() < 8


def test_check_says_that_a_number_times_a_vector_does_not_commute():
    def product(w):
        return w[0] * w[1:]

    w = torch.tensor([1.0, 0.5, -0.3, 0.8], dtype=torch.float64)
    assert not mf.check(mf.CustomReparam(product), mf.WeightDecay(), w).applies


def test_labels_and_lists_of_columns_say_the_same():
    X, y = problem()
    order = np.random.default_rng(2).permutation(len(LABELS))
    X, labels = X[:, order], LABELS[order]
    names = [f"group {g}" for g in labels]
    lists = [np.flatnonzero(labels == g).tolist() for g in (3, 1, 0, 2, 4, 7, 6, 5)]
    first, *others = (
        mf.MirrorFlowRegressor(groups=g).fit(X, y) for g in (labels, names, lists)
    )  # fmt: skip
    for other in others:
        np.testing.assert_allclose(other.coef_, first.coef_, atol=1e-9)


def test_options_hold_for_groups():
    X, y = problem()
    model = mf.MirrorFlowRegressor(-8, 3, groups=LABELS, zero_tol=0.2, tol=1e-6)
    fitted = clone(model).fit(X, y)
    sparse = clone(model).fit(sp.csr_array(X), y)
    np.testing.assert_allclose(sparse.coef_, fitted.coef_, atol=1e-6)
    targets = clone(model).fit(X, np.stack([y, 0 * y, -2 * y], axis=1))
    np.testing.assert_allclose(targets.coef_, [fitted.coef_, 0 * fitted.coef_, -2 * fitted.coef_],
                               atol=1e-6)  # fmt: skip
    scaled = clone(model).set_params(standardize=True).fit(7 * X, y)
    same = clone(model).set_params(standardize=True).fit(X, y)
    np.testing.assert_allclose(7 * scaled.coef_, same.coef_, atol=1e-8)
    refitted = clone(model).set_params(refit=True).fit(X, y)
    kept = np.flatnonzero(refitted.support_)
    assert set(LABELS[kept]) == {1, 4} and (refitted.support_ == np.isin(LABELS, [1, 4])).all()
    Z = np.c_[X[:, kept], np.ones(len(X))]
    np.testing.assert_allclose(refitted.coef_[kept], np.linalg.lstsq(Z, y)[0][:-1], atol=1e-8)
    assert np.isnan([fitted.kkt_residual_, fitted.gap_]).all()
    assert fitted.dual_coef_.shape == (len(y),) and np.isnan(fitted.dual_coef_).all()
    search = GridSearchCV(model, {"t": [0.1, 3.0]}, cv=3).fit(X, y)
    assert search.best_params_ == {"t": 3.0}


@pytest.mark.parametrize(
    ("groups", "said"),
    [
        (LABELS[:-1], r"one label for each of the 30 columns.*got an array of shape \(29,\)"),
        ([[0, 1], [1, 2]], "must hold each column once, got column 1 twice"),
        ([[0, 1], [2, 2]], "must hold each column once, got column 2 twice"),
        ([list(range(29))], "must hold each of the 30 columns of X, got none with column 29"),
        ([[0, 30]], "must hold columns from 0 to 29, got 30"),
        ([[0, -1]], "must hold columns from 0 to 29, got -1"),
        ([[0.5, 1.0]], "must hold column indices, whole numbers and at least one"),
        ([[], list(range(30))], "must hold column indices, whole numbers and at least one"),
        ([], r"got an array of shape \(0,\)"),
    ],
)
def test_groups_that_are_none_are_refused(groups, said):
    X, y = problem()
    with pytest.raises(ValueError, match=said):
        mf.MirrorFlowRegressor(groups=groups).fit(X, y)


@pytest.mark.parametrize("option", ["interpolate", "positive"])
def test_what_the_flow_of_groups_does_not_have_is_refused(option):
    X, y = problem()
    with pytest.raises(ValueError, match=rf"{option} must be False with groups, got True\."):
        mf.MirrorFlowRegressor(groups=LABELS).set_params(**{option: True}).fit(X, y)


def test_steps_that_run_out_are_said():
    X, y = problem()
    with pytest.warns(ConvergenceWarning, match="must reach its end within max_iter=5 steps"):
        mf.MirrorFlowRegressor(groups=LABELS, max_iter=5).fit(X, y)
