"""The regressors on data as people have them: tall, shifted, in unequal units, at the boundary."""

import warnings

import joblib
import numpy as np
import pytest
import scipy.sparse as sp
from scipy.optimize import nnls
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning
from sklearn.feature_selection import SelectFromModel
from sklearn.model_selection import KFold

import mirrorflow as mf
from test_estimator import shortest_solution

Regressor, RegressorCV = mf.MirrorFlowRegressor, mf.MirrorFlowRegressorCV


def problem(n=60, d=100, noise=0.5, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, d))
    return X, 3 * X[:, 0] - 2 * X[:, min(7, d - 1)] + noise * rng.standard_normal(n)


@pytest.mark.parametrize(("n", "d"), [(50, 5), (50, 40), (50, 100)])
def test_the_end_of_a_positive_flow_is_least_squares_over_what_is_positive(n, d):
    X, y = problem(n, d)
    model = Regressor(interpolate=True, positive=True, zero_tol=0).fit(X, y)
    Z, t = X - X.mean(0), y - y.mean()
    best = nnls(Z, t)[1]
    assert best > 1e-3  # no positive coefficients fit
    assert np.linalg.norm(Z @ model.coef_ - t) == pytest.approx(best, rel=1e-9)
    assert (model.coef_ >= 0).all()
    _, coefs, intercepts, _ = mf.entropy_path(X, y, [2.0, -10.0], positive=True)
    for coef, intercept in zip(coefs.T, intercepts, strict=True):
        assert np.linalg.norm(X @ coef + intercept - y) == pytest.approx(best, rel=1e-9)
    if n > d:  # the solution is unique: the flow gets there
        late = Regressor(t=3000, positive=True, zero_tol=0, tol=1e-4).fit(X, y)
        np.testing.assert_allclose(model.coef_, late.coef_, atol=1e-6)


@pytest.mark.parametrize("d", [1, 2, 5])
@pytest.mark.parametrize("t", [5.0, 50.0])
@pytest.mark.sample(2)
def test_a_late_first_time_is_not_stepped_over(d, t):
    X, _ = problem(30, d)
    for options in ({}, {"positive": True}):
        exact = Regressor(t=t, tol=1e-7, zero_tol=0, **options).fit(X, X.sum(axis=1)).coef_
        assert t < 50 or np.abs(exact - 1).max() < 0.02
        model = Regressor(t=t, zero_tol=0, **options).fit(X, X.sum(axis=1))
        np.testing.assert_allclose(model.coef_, exact, atol=5e-3)
        path = mf.flow_path(X, X.sum(axis=1), ts=[t], **options)[1]
        np.testing.assert_allclose(path[:, 0], exact, atol=5e-3)


@pytest.mark.parametrize("shift", [1e5, 1e7])
@pytest.mark.parametrize("options", [{}, {"interpolate": True}])
def test_large_means_change_nothing(shift, options):
    X, y = problem()
    plain = Regressor(zero_tol=0, **options).fit(X, y).coef_
    moved = Regressor(zero_tol=0, **options).fit(X + shift, y + shift).coef_
    np.testing.assert_allclose(moved, plain, atol=1e-14 * shift)
    X[:, 50] += 1e8  # a column that looks like an identifier
    assert RegressorCV(ts=8).fit(X, y + 1e6).score(X, y + 1e6) > 0.8


@pytest.mark.parametrize("shape", [(120, 80), (60, 90)])
def test_sparse_is_dense_where_columns_have_unequal_scales(shape):
    rng = np.random.default_rng(0)
    X = rng.standard_normal(shape) * (rng.random(shape) < 0.1) * np.geomspace(1e-2, 1e2, shape[1])
    y = X @ rng.standard_normal(shape[1]) + 0.1 * rng.standard_normal(len(X)) + 2
    with pytest.warns(UserWarning, match="standardize=True"):
        dense = Regressor().fit(X, y)
    with pytest.warns(UserWarning, match="standardize=True"):
        sparse = Regressor().fit(sp.csr_array(X), y)
    assert abs(sparse.A_ / dense.A_ - 1) < 1e-6
    np.testing.assert_allclose(sparse.coef_, dense.coef_, atol=1e-5 * np.abs(dense.coef_).max())


def test_large_sparse_data_take_lsqr_which_says_when_it_fails(monkeypatch):
    X, y = problem()
    expected = Regressor().fit(X, y)
    monkeypatch.setattr("mirrorflow.estimator._data.FEW", 5)
    found = Regressor().fit(sp.csr_array(X), y)
    np.testing.assert_allclose(found.coef_, expected.coef_, atol=1e-5)
    monkeypatch.setattr("mirrorflow.estimator._data.lsqr", lambda *a, **k: (np.ones(100), 7))
    with pytest.warns(ConvergenceWarning, match="common scale"):
        Regressor().fit(sp.csr_array(X), y)


def by_all_rows(monkeypatch):
    """Follow tall data row by row."""
    for module in ("_base", "_fold_problems"):
        monkeypatch.setattr(f"mirrorflow.estimator.{module}.tall", lambda n, d: False)


@pytest.mark.parametrize("options", [{}, {"positive": True}, {"fit_intercept": False}])
@pytest.mark.sample(1)
def test_tall_data_are_summed_over_rows_without_a_change(options, monkeypatch):
    X, y = problem(200, 12)
    Y = np.stack([y, -y[::-1] + X[:, 3]], axis=1) + 5
    weights, fine = np.random.default_rng(1).uniform(0.5, 2, len(y)), {"tol": 1e-6, **options}
    models = [Regressor(t=3, **fine), RegressorCV((0.0, -8.0), ts=4, cv=KFold(3), **fine)]
    few = [clone(m).fit(X, Y, sample_weight=weights) for m in models]
    path = mf.flow_path(X, y, ts=[1.0, 2.0], **fine)
    by_all_rows(monkeypatch)
    for model, found in zip(models, few, strict=True):
        every = clone(model).fit(X, Y, sample_weight=weights)
        np.testing.assert_allclose(found.coef_, every.coef_, atol=1e-4)
        np.testing.assert_allclose(found.intercept_, every.intercept_, atol=1e-4)
        scale = np.abs(every.dual_coef_).max()
        np.testing.assert_allclose(found.dual_coef_, every.dual_coef_, atol=1e-4 * scale)
        np.testing.assert_allclose(found.gap_, every.gap_, atol=1e-4)
        assert found.kkt_residual_.max() < 1e-10
    np.testing.assert_allclose(few[1].mse_path_, every.mse_path_, rtol=1e-3)
    np.testing.assert_allclose(few[1].zero_mse_path_, every.zero_mse_path_, rtol=1e-3)
    np.testing.assert_allclose(path[1], mf.flow_path(X, y, ts=[1.0, 2.0], **fine)[1], atol=1e-4)


@pytest.mark.parametrize("shape", [(60, 100), (150, 100), (300, 12)])
@pytest.mark.parametrize("size", [1.0, 1e25])
def test_single_precision_of_products_costs_no_accuracy(shape, size, monkeypatch):
    """They are formed in units in which all numbers are moderate."""
    X, y = problem(*shape)
    options = {"log_As": (2.0, -12.0), "ts": 6}
    few = RegressorCV(**options).fit(size * X, y * size**2)
    monkeypatch.setattr("mirrorflow.estimator._fold_problems.SINGLE", np.inf)
    every = RegressorCV(**options).fit(X, y)
    np.testing.assert_allclose(few.mse_path_, size**4 * every.mse_path_, rtol=2e-2)
    assert (few.best_log_A_, few.best_t_) == (every.best_log_A_, every.best_t_)
    np.testing.assert_allclose(few.coef_, size * every.coef_, rtol=0, atol=1e-6 * size)


def test_an_error_that_still_falls_at_the_last_time_is_warned_of():
    X, y = problem(300, 8)
    X[:, 0] *= 9
    with pytest.warns(UserWarning, match=r"still falling at the largest t, 0.7.*StandardScaler"):
        RegressorCV(ts=[0.5, 0.6, 0.7], ridges=(), l1_ratios=()).fit(
            X, X[:, 1:].sum(axis=1) + 0.1 * y
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RegressorCV().fit(X / X.std(0), X[:, 1:].sum(axis=1) + 0.1 * y)


@pytest.mark.parametrize("model", [Regressor(), RegressorCV((-2.0, -12.0), 8)])
@pytest.mark.parametrize("kind", [np.asarray, sp.csr_array])
def test_unequal_scales_are_warned_of_and_standardizing_makes_up_for_them(model, kind):
    X, y = problem(100, 30)
    scales = np.ones(30)
    scales[3] = 100.0
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        clone(model).fit(kind(X * scales), y)
    said = [w for w in found if "standardize=True" in str(w.message)]
    assert len(said) == 1 and said[0].filename == __file__
    assert "factor of" in str(said[0].message) and "(columns 3 and" in str(said[0].message)
    equal = clone(model).set_params(standardize=True).fit(kind(X), y)
    unequal = clone(model).set_params(standardize=True).fit(kind(X * scales), y)
    np.testing.assert_allclose(unequal.coef_ * scales, equal.coef_, atol=1e-8)
    assert unequal.score(kind(X * scales), y) > 0.9
    by_hand = clone(model).fit((X - X.mean(0)) / X.std(0), y)
    np.testing.assert_allclose(equal.coef_ * X.std(0), by_hand.coef_, atol=1e-4)


def test_standardized_coefficients_follow_from_the_dual_variables():
    X, y = problem(40, 10)
    X = X * np.geomspace(1, 1e3, 10)
    for options in ({}, {"interpolate": True}, {"fit_intercept": False}):
        model = Regressor(standardize=True, zero_tol=0, **options).fit(X, y)
        size = X.std(0) if options.get("fit_intercept", True) else np.sqrt((X**2).mean(0))
        flow = model.A_ * np.sinh(2 * X.T @ model.dual_coef_ / size)
        np.testing.assert_allclose(model.coef_ * size, flow, atol=1e-8)


def test_feature_selection_by_its_default_keeps_the_support():
    X, y = problem()
    selector = SelectFromModel(RegressorCV((-12.0,), 8)).fit(X, y)
    np.testing.assert_array_equal(selector.get_support(), selector.estimator_.support_)
    assert 2 <= selector.get_support().sum() < 100


@pytest.mark.parametrize("log_A", [20.0, -1000.0, -3000.0])
@pytest.mark.sample(1)
def test_extreme_scales_are_the_limits_that_they_stand_for(log_A):
    X, y = problem(30, 60, noise=0)
    model = Regressor(log_A, interpolate=True, zero_tol=0).fit(X, y)
    np.testing.assert_allclose(model.predict(X), y, atol=1e-6)
    assert np.isfinite(model.kkt_residual_) and model.kkt_residual_ < 1e-6
    if log_A > 0:
        np.testing.assert_allclose(model.coef_, shortest_solution(X, y), atol=1e-6)
    assert Regressor(log_A, t=5).fit(X, y).score(X, y) > 0.99
    drained = Regressor(interpolate=True, decay=mf.TurnOff(100.0, 10.0)).fit(X, y)
    assert drained.score(X, y) > 0.999


def test_a_decay_that_would_be_switched_off_after_the_training_is_refused():
    X, y = problem()
    late = mf.TurnOff(1.0, 5.0)
    for call in (
        lambda: Regressor(t=2, decay=late).fit(X, y),
        lambda: RegressorCV(ts=[1.0, 2.0], decay=late).fit(X, y),
        lambda: mf.flow_path(X, y, ts=[1.0, 2.0], decay=late),
    ):
        with pytest.raises(ValueError, match="by t=2, where training ends"):
            call()
    with pytest.raises(ValueError, match="must be switched off"):
        Regressor(interpolate=True, decay=mf.TurnOff(1.0, np.inf)).fit(X, y)
    assert Regressor(t=2, decay=mf.TurnOff(1.0, np.inf)).fit(X, y).log_A_ == -14
    with pytest.raises(TypeError, match="alpha must be a number"):
        mf.TurnOff("much", 1.0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("path", "options", "said"),
    [
        ("both", {"sample_weight": np.ones(10)}, "sample_weight"),
        ("both", {"sample_weight": -np.ones(60)}, "sample_weight|[Nn]egative"),
        ("both", {"sample_weight": np.zeros(60)}, "[Ss]ample.weight"),
        ("both", {"max_iter": 0}, "max_iter"),
        ("flow", {"tol": -1}, "'tol'"), ("flow", {"log_A": np.nan}, "'log_A'"),
        ("flow", {"log_A": "a"}, "'log_A'"), ("flow", {"ts": 0}, "'ts'"),
        ("flow", {"ts": [-3.0]}, "ts must be > 0"), ("flow", {"decay": 1.0}, "'decay'"),
        ("entropy", {"log_As": 0}, "'log_As'"), ("entropy", {"log_As": [30.0]}, "log_As must be"),
    ],
)  # fmt: skip
def test_bad_arguments_of_paths_are_named(path, options, said):
    X, y = problem()
    calls = {"flow": [mf.flow_path], "entropy": [mf.entropy_path]}
    for call in calls.get(path, [mf.flow_path, mf.entropy_path]):
        with pytest.raises(ValueError, match=said):
            call(X, y, **options)


def test_paths_keep_single_precision_and_count_with_any_integer():
    X, y = problem(d=20)
    X, y = X.astype(np.float32), y.astype(np.float32)
    for found in (mf.flow_path(X, y, ts=np.int64(3)), mf.entropy_path(X, y, np.int64(3))):
        assert found[1].dtype == found[2].dtype == np.float32
        assert found[1].shape == (20, 3)


def test_joblibs_context_is_heard():
    """As everywhere in scikit-learn: ``n_jobs=None`` takes the number of the context."""
    counted = []

    class Counting(joblib._parallel_backends.ThreadingBackend):
        def submit(self, func, callback=None):
            counted.append(1)
            return super().submit(func, callback)

    joblib.register_parallel_backend("counting", Counting)
    X, y = problem(d=20)
    with joblib.parallel_config("counting", n_jobs=2):
        shared = RegressorCV((0, -4, -8), ts=4).fit(X, y)
    assert len(counted) >= 3  # one for each flow
    np.testing.assert_array_equal(shared.coef_, RegressorCV((0, -4, -8), ts=4).fit(X, y).coef_)


def test_a_fold_without_weight_is_refused():
    X, y = problem()
    weights = np.r_[np.zeros(20), np.ones(40)]
    with pytest.raises(ValueError, match="weight > 0, got one without"):
        RegressorCV(cv=KFold(3)).fit(X, y, sample_weight=weights)
