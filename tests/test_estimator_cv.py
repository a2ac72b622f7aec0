"""The cross-validated regressor against a literal loop over folds and candidates."""

import joblib
import numpy as np
import pytest
from sklearn.linear_model import Lasso, LassoCV, LinearRegression
from sklearn.metrics import f1_score
from sklearn.model_selection import GroupKFold, KFold
from threadpoolctl import threadpool_limits

import mirrorflow as mf
from mirrorflow.estimator._data import growth
from test_estimator import problem


@pytest.mark.parametrize("options", [{}, {"decay": mf.TurnOff(1.0, 1.0)}, {"positive": True}])
@pytest.mark.sample(1)
def test_cross_validation_is_a_loop_over_folds_and_candidates(options):
    """Without a decay that is given, two flows more shrink: their decay stays on."""
    X, y, _ = problem(noise=1.0)
    weights = np.random.default_rng(3).uniform(0.5, 2, len(y))
    cv = KFold(4, shuffle=True, random_state=0)
    model = mf.MirrorFlowRegressorCV((-2.0, -9.0), (0.5, 2.0, 9.0), cv=cv, tol=1e-5, **options)
    model.fit(X, y, sample_weight=weights)
    units, ways = {}, {}
    for i, (log_A, shrinkage) in enumerate(zip(model.log_As_, model.shrinkages_, strict=True)):
        rate = shrinkage * growth(log_A, model.positive)
        ways[i] = options | ({"decay": mf.TurnOff(rate, np.inf)} if shrinkage else {})
        whole = mf.MirrorFlowRegressor(log_A, 1.0, **ways[i]).fit(X, y, sample_weight=weights)
        units[i] = whole.t_, whole.A_
    for f, (train, test) in enumerate(cv.split(X)):
        for i, log_A in enumerate(model.log_As_):
            for j, t in enumerate(model.ts_):
                found = _same_flow(log_A, t, units[i], X[train], y[train], weights[train], ways[i])
                error = np.average((found.predict(X[test]) - y[test]) ** 2, weights=weights[test])
                assert model.mse_path_[i, j, f] == pytest.approx(error, rel=3e-3)
    best = np.unravel_index(model.mse_path_.mean(2).argmin(), model.mse_path_.shape[:2])
    assert (model.best_log_A_, model.best_t_) == (model.log_As_[best[0]], model.ts_[best[1]])
    way = options | {"decay": model.best_decay_, "zero_tol": model.best_zero_tol_}
    last = mf.MirrorFlowRegressor(model.best_log_A_, model.best_t_, tol=1e-6, **way)
    np.testing.assert_allclose(model.coef_, last.fit(X, y, sample_weight=weights).coef_, atol=1e-6)


@pytest.mark.parametrize("noise", [0.3, 3.0, 30.0])
@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.sample(3)
def test_the_threshold_is_the_largest_that_predicts_nearly_as_well_as_the_best(refit, noise):
    X, y, _ = problem(n=40, noise=noise)
    weights, cv = np.random.default_rng(3).uniform(0.5, 2, len(y)), KFold(4)
    tols = (0.3, 0.01, 0.1, 0.6)
    options = {"zero_tols": tols, "l1_ratios": (), "refit": refit, "cv": cv, "tol": 1e-5}
    model = mf.MirrorFlowRegressorCV((-9.0,), [2.0], **options).fit(X, y, sample_weight=weights)
    whole = mf.MirrorFlowRegressor(-9.0, 1.0).fit(X, y, sample_weight=weights)
    errors = {}
    for train, test in cv.split(X):
        part = X[train], y[train], weights[train]
        flow = _same_flow(-9.0, 2.0, (whole.t_, whole.A_), *part, {}).coef_
        for tol in (*tols, np.inf):
            kept = np.abs(flow) >= tol * np.abs(flow).max()
            plain = np.where(kept, flow, 0.0)
            again = plain.copy()
            if kept.any():
                again[kept] = LinearRegression().fit(part[0][:, kept], *part[1:]).coef_
            for way, coef in ((False, plain), (True, again))[: 1 + (refit and tol < 1)]:
                offset = np.average(part[1] - part[0] @ coef, weights=part[2])
                missed = y[test] - X[test] @ coef - offset
                errors.setdefault((tol, way), []).append(
                    np.average(missed**2, weights=weights[test])
                )
    for i, tol in enumerate(sorted(tols)):
        np.testing.assert_allclose(model.zero_mse_path_[i], errors[tol, refit], rtol=3e-3)
    np.testing.assert_allclose(model.intercept_mse_, errors[np.inf, False], rtol=3e-3)
    best = min(errors.values(), key=sum)
    near = []
    for key, found in errors.items():
        worse = [e - b for e, b in zip(found, best, strict=True)]
        mean = sum(worse) / 4
        if mean <= 0.5 * (sum((w - mean) ** 2 for w in worse) / 4 / 4) ** 0.5:
            near.append(key)
    largest = [key for key in near if key[0] == max(near)[0]]
    expected = min(largest, key=lambda key: sum(errors[key]))
    assert (model.best_zero_tol_, model.best_refit_) == expected
    np.testing.assert_array_equal(model.support_, model.coef_ != 0)
    assert model.support_.any() == np.isfinite(model.best_zero_tol_)


def test_without_noise_the_threshold_loses_no_coefficient_that_counts():
    rng = np.random.default_rng(3)
    X, truth = rng.standard_normal((100, 150)), np.zeros(150)
    truth[:15] = rng.standard_normal(15)
    model = mf.MirrorFlowRegressorCV().fit(X, X @ truth)
    chosen = model.zero_mse_path_[model.zero_tols_ == model.best_zero_tol_].mean()
    assert chosen <= 2 * model.zero_mse_path_.mean(axis=1).min()
    assert np.linalg.norm(model.coef_ - truth) < 0.02 * np.linalg.norm(truth)


def test_refitting_is_left_out_where_it_predicts_worse():
    """Many weak coefficients and much noise: least squares on a support overfits."""
    rng = np.random.default_rng(0)
    X, truth = rng.standard_normal((60, 100)), rng.standard_normal(100) / 5
    y = X @ truth + 2 * rng.standard_normal(60)
    plain = mf.MirrorFlowRegressorCV(ts=8).fit(X, y)
    model = mf.MirrorFlowRegressorCV(ts=8, refit=True).fit(X, y)
    error, plain_error = (np.linalg.norm(m.coef_ - truth) for m in (model, plain))
    assert error <= 1.05 * plain_error


def test_the_support_of_noise_may_be_empty():
    empty = []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        X, y = rng.standard_normal((100, 50)), rng.standard_normal(100)
        model = mf.MirrorFlowRegressorCV((-2.0, -12.0), 8).fit(X, y)
        empty.append(not model.support_.any())
        if empty[-1]:
            assert model.best_zero_tol_ == np.inf
            np.testing.assert_allclose(model.predict(X), y.mean())
    assert any(empty)


def test_zeros_cost_little_prediction_and_find_the_support():
    """On several draws: fewer false coefficients than the lasso, at no larger error."""
    hits = []
    for seed in range(5):
        rng = np.random.default_rng(seed)
        X, truth = rng.standard_normal((100, 200)), np.zeros(200)
        truth[:10] = 1.0
        y = X @ truth + rng.standard_normal(100)
        model, lasso = mf.MirrorFlowRegressorCV().fit(X, y), LassoCV(cv=5).fit(X, y)
        f1 = [f1_score(truth != 0, found.coef_ != 0) for found in (model, lasso)]
        error = [np.linalg.norm(found.coef_ - truth) for found in (model, lasso)]
        hits.append((f1[0] > f1[1], error[0] < error[1]))
    assert np.sum(hits, axis=0).min() >= 4


def test_the_flow_whose_decay_stays_on_tends_to_the_lasso():
    X, y, _ = problem(noise=1.0)
    model = mf.MirrorFlowRegressorCV((-6.0,), [60.0], shrinkages=[0.3], zero_tols=[0]).fit(X, y)
    np.testing.assert_array_equal(model.shrinkages_, [0.0, 0.3])
    decay = mf.TurnOff(0.3 * growth(-6.0, False), 60.0)
    found = mf.MirrorFlowRegressor(-6.0, 60.0, decay=decay, zero_tol=0).fit(X, y)
    penalty = 0.3 * np.abs((X - X.mean(0)).T @ (y - y.mean())).max() / len(y)
    lasso = Lasso(penalty, tol=1e-10, max_iter=100_000).fit(X, y)
    np.testing.assert_allclose(found.coef_, lasso.coef_, atol=2e-3 * np.abs(lasso.coef_).max())
    if model.best_decay_ is not None:
        assert model.best_decay_ == decay
        np.testing.assert_allclose(model.coef_, found.coef_, atol=1e-3)


def _same_flow(log_A, t, unit, X, y, weights, options):
    """Fit the part of a fold with the A and the time that the whole sample defines."""
    time, A = unit
    options = {**options, "zero_tol": 0, "tol": 1e-5}
    decay = options.pop("decay", None)
    probe = mf.MirrorFlowRegressor(log_A, 1.0, **options).fit(X, y, sample_weight=weights)
    if decay:  # the A of `unit` is that at t = 1
        A = A * np.exp(2 * decay.alpha * min(1.0, decay.t))
    shifted = log_A + np.log(A / probe.A_)
    unit = mf.MirrorFlowRegressor(shifted, 1.0, **options).fit(X, y, sample_weight=weights).t_
    if decay:
        off = decay.t * time / unit if decay.t <= t else np.inf
        options["decay"] = mf.TurnOff(decay.alpha * unit / time, off)
    model = mf.MirrorFlowRegressor(shifted, t * time / unit, **options)
    return model.fit(X, y, sample_weight=weights)


def fields(model):
    """Return all that a fit has set, arrays as bytes."""
    found = {k: v for k, v in vars(model).items() if k.endswith("_")}
    return {k: v.tobytes() if isinstance(v, np.ndarray) else v for k, v in found.items()}


@pytest.mark.parametrize(("n", "d"), [(40, 100), (90, 12)])
def test_the_way_the_work_is_shared_out_changes_no_bit(n, d):
    rng = np.random.default_rng(32)
    X = rng.standard_normal((n, d))
    y = X[:, :5].sum(axis=1) + 2 * rng.standard_normal(n)
    options = {"log_As": (0.0, -6.0, -12.0), "ts": 5}
    alone = fields(mf.MirrorFlowRegressorCV(**options).fit(X, y))
    assert fields(mf.MirrorFlowRegressorCV(**options, n_jobs=2).fit(X, y)) == alone
    with joblib.parallel_config("threading", n_jobs=2):
        assert fields(mf.MirrorFlowRegressorCV(**options).fit(X, y)) == alone
    with threadpool_limits(1):
        assert fields(mf.MirrorFlowRegressorCV(**options).fit(X, y)) == alone


def test_other_candidates_change_no_error_of_a_candidate():
    X, y, _ = problem(n=40, noise=1.0)
    one = {"shrinkages": [0.3], "cv": 4}
    all_of_them = mf.MirrorFlowRegressorCV((-6.0, -9.0, -12.0), [0.5, 1.0, 4.0, 20.0], **one)
    few = mf.MirrorFlowRegressorCV((-6.0,), [4.0, 20.0], **one)
    for model in (all_of_them, few):
        model.fit(X, y)
    np.testing.assert_array_equal(few.mse_path_, all_of_them.mse_path_[[0, 3]][:, [2, 3]])


@pytest.mark.parametrize("d", [60, 5])
def test_what_is_not_kept_is_integrated_again(d, monkeypatch):
    X, y, _ = problem(n=40, d=d, noise=1.0)
    kept = mf.MirrorFlowRegressorCV(ts=6, tol=1e-5).fit(X, y)
    monkeypatch.setattr("mirrorflow.estimator._folds.KEPT", 0)
    again = mf.MirrorFlowRegressorCV(ts=6, tol=1e-5).fit(X, y)
    np.testing.assert_allclose(again.zero_mse_path_, kept.zero_mse_path_, rtol=1e-3)
    np.testing.assert_allclose(again.coef_, kept.coef_, atol=1e-4)


def test_cross_validation_finds_the_kind_of_truth():
    rng = np.random.default_rng(0)
    X = rng.standard_normal((80, 120))
    sparse = np.zeros(120)
    sparse[:4] = 3.0
    dense = rng.standard_normal(120) / 4
    found = [
        mf.MirrorFlowRegressorCV().fit(X, X @ truth + 0.5 * rng.standard_normal(80)).best_log_A_
        for truth in (sparse, dense)
    ]
    assert found[0] <= -12 < found[1]


def test_metadata_is_routed_to_the_splitter():
    import sklearn

    X, y, _ = problem()
    groups = np.arange(len(y)) % 3
    model = mf.MirrorFlowRegressorCV((-8.0,), 3, shrinkages=[0.2], cv=GroupKFold(3))
    with pytest.raises(ValueError, match="enable_metadata_routing"):
        model.fit(X, y, groups=groups)
    with sklearn.config_context(enable_metadata_routing=True):
        assert model.fit(X, y, groups=groups).mse_path_.shape == (2, 3, 3)


@pytest.mark.parametrize(
    ("options", "said"),
    [({"log_As": []}, "log_As"), ({"log_As": [np.inf]}, "log_As"), ({"ts": [0.0, 1.0]}, "ts"),
     ({"ts": 0}, "'ts'"), ({"cv": 1}, "n_splits"), ({"shrinkages": [0.0]}, "> 0 and < 1"),
     ({"zero_tols": []}, "zero_tols"), ({"zero_tols": [-0.1, 0.2]}, "zero_tols must be >= 0"),
     ({"zero_tols": [1.0]}, "zero_tols must be >= 0"),
     ({"shrinkages": [1.0]}, "> 0 and < 1"), ({"shrinkages": [[0.5]]}, "> 0 and < 1"),
     ({"shrinkages": [0.5], "decay": mf.TurnOff(1.0, 1.0)}, "must be .. with decay")],
)  # fmt: skip
def test_bad_candidates_are_named(options, said):
    X, y, _ = problem()
    with pytest.raises(ValueError, match=said):
        mf.MirrorFlowRegressorCV(**options).fit(X, y)
