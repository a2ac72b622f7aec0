"""Paths are what separate fits give, and the picture of a cross-validation shows its numbers."""

import matplotlib
import numpy as np
import pytest
from scipy.optimize import linprog
from sklearn.exceptions import ConvergenceWarning, NotFittedError

import mirrorflow as mf

matplotlib.use("Agg")


def problem(n=25, d=50):
    rng = np.random.default_rng(0)
    X = rng.standard_normal((n, d)) + 1
    return X, X[:, 3] - 2 * X[:, 9] + 5 + 0.1 * rng.standard_normal(n)


@pytest.mark.parametrize("options", [{}, {"positive": True}, {"decay": mf.TurnOff(1.0, 0.4)},
                                     {"fit_intercept": False}])  # fmt: skip
def test_the_flow_path_is_that_of_separate_fits(options):
    X, y = problem()
    ts, coefs, intercepts = mf.flow_path(X, y, -8.0, [3.0, 0.5, 1.5], tol=1e-6, **options)
    assert ts.tolist() == [0.5, 1.5, 3.0]
    for t, coef, intercept in zip(ts, coefs.T, intercepts, strict=True):
        alone = mf.MirrorFlowRegressor(-8.0, t, zero_tol=0, tol=1e-6, **options).fit(X, y)
        np.testing.assert_allclose(coef, alone.coef_, atol=1e-5)
        assert intercept == pytest.approx(alone.intercept_, abs=1e-4)


@pytest.mark.parametrize("options", [{}, {"fit_intercept": False}])
def test_the_entropy_path_is_that_of_separate_end_points(options):
    X, y = problem()
    log_As, coefs, intercepts, gaps = mf.entropy_path(X, y, [-5.0, 2.0, -30.0], **options)
    assert log_As.tolist() == [-5.0, 2.0, -30.0]
    for log_A, coef, intercept, gap in zip(log_As, coefs.T, intercepts, gaps, strict=True):
        alone = mf.MirrorFlowRegressor(log_A, interpolate=True, zero_tol=0, **options).fit(X, y)
        np.testing.assert_allclose(coef, alone.coef_, atol=1e-8)
        np.testing.assert_allclose(X @ coef + intercept, y, atol=1e-8)
        d = len(coef)
        Z = X - X.mean(0) if alone.fit_intercept else X
        least = linprog(np.ones(2 * d), A_eq=np.hstack([Z, -Z]), b_eq=Z @ coef).fun
        assert 1 - least / np.abs(coef).sum() <= gap + 1e-9
    assert len(mf.entropy_path(X, y)[0]) == 30


def test_a_constant_target_has_paths_of_zeros():
    X, y = problem()
    for path in (mf.flow_path(X, np.ones(len(y))), mf.entropy_path(X, np.ones(len(y)))):
        assert (path[1] == 0).all()
        np.testing.assert_allclose(path[2], 1)


def test_too_few_steps_warn():
    X, y = problem()
    with pytest.warns(ConvergenceWarning, match="max_iter=3"):
        mf.flow_path(X, y, max_iter=3)


def test_the_display_shows_the_errors():
    X, y = problem()
    model = mf.MirrorFlowRegressorCV((0.0, -8.0), ts=5, l1_ratios=())
    with pytest.raises(NotFittedError):
        mf.MirrorFlowCVDisplay.from_estimator(model)
    display = mf.MirrorFlowCVDisplay.from_estimator(model.fit(X, y))
    assert len(display.ax_.lines) == len(model.log_As_) == 2
    np.testing.assert_allclose(display.ax_.lines[1].get_ydata(), model.mse_path_.mean(2)[1])
    assert display.ax_.get_xlabel() and display.ax_.get_ylabel()
    matplotlib.pyplot.close(display.figure_)
