"""What the cross-validated regressor says of its choice, and choices by information criteria."""

import matplotlib
import matplotlib.pyplot
import numpy as np
import pytest
from scipy.special import comb
from sklearn.base import clone
from sklearn.linear_model import LinearRegression
from sklearn.model_selection import KFold

import mirrorflow as mf

matplotlib.use("agg")
CV = mf.MirrorFlowRegressorCV


def problem(n=60, d=30, noise=1.0, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, d))
    return X, 3 * X[:, 0] - 2 * X[:, 7] + noise * rng.standard_normal(n)


@pytest.mark.parametrize("n", [40, 120])
def test_frequencies_count_the_folds_that_keep_a_coefficient(n):
    X, y = problem(n, noise=3.0)
    model = CV((-8.0,), ts=4, l1_ratios=(), cv=KFold(4), tol=1e-5).fit(X, y)
    kept = []
    for train, _ in KFold(4).split(X):
        # the same flow of the fold: its scale and time are in units of all samples
        whole = mf.MirrorFlowRegressor(-8.0, 1.0).fit(X, y)
        part = mf.MirrorFlowRegressor(-8.0, 1.0).fit(X[train], y[train])
        log_A = -8.0 + np.log(whole.A_ / part.A_)
        unit = mf.MirrorFlowRegressor(log_A, 1.0).fit(X[train], y[train]).t_
        fold = mf.MirrorFlowRegressor(
            log_A, model.best_t_ * whole.t_ / unit, tol=1e-5, zero_tol=model.best_zero_tol_
        )
        kept.append(fold.fit(X[train], y[train]).support_)
    np.testing.assert_array_equal(model.selection_frequency_, np.mean(kept, axis=0))
    assert model.selection_frequency_[[0, 7]].min() == 1


def test_the_path_is_that_of_flow_path_and_ends_at_the_model():
    X, y = problem()
    model = CV((-6.0,), ts=6, l1_ratios=(), zero_tols=[0.0]).fit(1000 * X, y)
    m = model.best_index_[1] + 1
    ts, coefs, _ = mf.flow_path(1000 * X, y, -6.0, model.ts_[:m], tol=1e-3)
    assert model.ts_[m - 1] == model.best_t_ == ts[-1]
    np.testing.assert_allclose(model.coef_path_, coefs, rtol=1e-8)
    np.testing.assert_array_equal(model.coef_path_[:, -1], model.coef_)
    both = clone(model).fit(X, np.stack([y, -y], axis=1))
    assert both.coef_path_.shape == (2, 30, both.best_index_[1] + 1)
    np.testing.assert_array_equal(both.selection_frequency_[0], both.selection_frequency_[1])


def test_the_display_marks_the_chosen_point_and_draws_its_path():
    X, y = problem()
    model = CV((0.0, -8.0), ts=5).fit(X, y)
    i, j = model.best_index_
    display = mf.MirrorFlowCVDisplay.from_estimator(model)
    ((t, error),) = display.ax_.collections[-1].get_offsets()
    assert (t, error) == pytest.approx((model.best_t_, model.mse_path_.mean(2)[i, j]))
    drawn = mf.MirrorFlowCVDisplay.from_estimator(model, kind="path")
    lines = drawn.ax_.lines
    assert len(lines) == X.shape[1] + 1 and lines[-1].get_xdata()[0] == model.best_t_
    kept = [line.get_ydata()[-1] for line in lines[:-1] if line.get_color() != "0.8"]
    np.testing.assert_allclose(kept, model.coef_path_[model.support_, -1])
    with pytest.raises(ValueError, match="kind must be 'error' or 'path'"):
        mf.MirrorFlowCVDisplay.from_estimator(model, kind="both")
    two = clone(model).fit(X, np.stack([y, y], axis=1))
    with pytest.raises(ValueError, match="must be of one target"):
        mf.MirrorFlowCVDisplay.from_estimator(two, kind="path")
    for shown in (display, drawn):
        matplotlib.pyplot.close(shown.figure_)


@pytest.mark.parametrize("criterion", ["bic", "ebic"])
@pytest.mark.parametrize(("n", "d"), [(80, 12), (60, 100)])
def test_the_criterion_is_that_of_the_model_that_is_fitted(criterion, n, d):
    X, y = problem(n, d)
    model = CV((-2.0, -10.0), ts=6, criterion=criterion, refit=True).fit(X, y)
    k, error = model.support_.sum(), np.mean((y - model.predict(X)) ** 2)
    value = n * np.log(error) + k * np.log(n)
    if criterion == "ebic":
        value += 2 * np.log(comb(d, k))
    assert value == pytest.approx(model.criterion_path_.min(), abs=0.1)
    assert model.support_[[0, 7]].all()
    if criterion == "ebic" and d > n:  # BIC itself lets noise in where there are more columns
        assert k == 2
    if model.best_refit_:
        fitted = LinearRegression().fit(X[:, model.support_], y)
        np.testing.assert_allclose(model.coef_[model.support_], fitted.coef_, rtol=1e-6)


def test_a_criterion_may_choose_the_intercept_alone_and_takes_one_target():
    rng = np.random.default_rng(1)
    X, y = rng.standard_normal((60, 40)), rng.standard_normal(60)
    assert not CV(ts=5, criterion="ebic").fit(X, y).support_.any()
    with pytest.raises(ValueError, match="y must be one target with criterion='bic', got 2"):
        CV(ts=5, criterion="bic").fit(X, np.stack([y, y], axis=1))
