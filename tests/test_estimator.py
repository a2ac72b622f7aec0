"""The regressors: scikit-learn's conventions, and the flow that they promise."""

import pickle
import warnings

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from scipy.optimize import linprog
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import Lasso, LassoCV, LinearRegression, Ridge
from sklearn.metrics import f1_score
from sklearn.model_selection import GridSearchCV, GroupKFold, KFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import mirrorflow as mf
from mirrorflow.estimator.chebyshev import stages
from mirrorflow.estimator.data import growth

MODELS = [
    mf.MirrorFlowRegressor(),
    mf.MirrorFlowRegressor(positive=True),
    mf.MirrorFlowRegressor(interpolate=True),
    mf.MirrorFlowRegressor(decay=mf.TurnOff(1.0, 0.5), refit=True),
    mf.MirrorFlowRegressorCV(log_As=(0.0, -8.0), ts=5),
]


@parametrize_with_checks(MODELS)
def test_scikit_learns_conventions(estimator, check):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the checks themselves warn
        check(estimator)


def problem(n=30, d=60, noise=0.1, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, d)) * rng.uniform(0.5, 2, d) + rng.standard_normal(d)
    truth = np.zeros(d)
    truth[[1, d // 2, d - 1]] = 2.0, -1.0, 0.5
    return X, X @ truth + 3 + noise * rng.standard_normal(n), truth


def by_flow(model, X, y, weights=None):
    """Integrate (m, w) of the centred problem by `mirrorflow.flow` to the model's own time."""
    n = len(y)
    v = np.full(n, 1 / n) if weights is None else weights / weights.sum()
    root = np.sqrt(n * v)
    Z, t = root[:, None] * (X - v @ X), root * (y - v @ y)
    loss = mf.LeastSquares(torch.from_numpy(Z), torch.from_numpy(t))
    decay, unit = model.decay, model.t_ / model.t
    drop = 2 * decay.alpha * min(model.t, decay.t) if decay else 0.0
    A = model.A_ * np.exp(drop)
    size = torch.full((X.shape[1],), float(np.sqrt(A if model.positive else 2 * A)))
    w0 = (size if model.positive else torch.zeros_like(size), size)
    w0 = tuple(w.double() for w in w0)
    off = min(decay.t, model.t) if decay else 0.0
    schedule = mf.SwitchOff(decay.alpha / unit, off * unit) if decay else mf.Constant(0.0)
    solution = mf.flow(loss, mf.Hadamard(), mf.WeightDecay(), w0, schedule, model.t_, rtol=1e-10)
    return solution.value.numpy()


@pytest.mark.parametrize("log_A", [2.0, -3.0, -10.0])
@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("decay", [None, mf.TurnOff(2.0, 0.7), mf.TurnOff(0.5, np.inf)])
def test_the_fit_is_the_flow_of_m_and_w(log_A, positive, decay):
    X, y, _ = problem()
    model = mf.MirrorFlowRegressor(
        log_A, 1.5, positive=positive, decay=decay, zero_tol=0, tol=1e-6
    ).fit(X, y)
    expected = by_flow(model, X, y)
    np.testing.assert_allclose(model.coef_, expected, atol=1e-4 * np.abs(expected).max())


def test_the_error_follows_the_tolerance():
    X, y, _ = problem()
    exact = mf.MirrorFlowRegressor(-10, 3, zero_tol=0, tol=1e-8).fit(X, y).coef_
    errors = [
        np.abs(mf.MirrorFlowRegressor(-10, 3, zero_tol=0, tol=tol).fit(X, y).coef_ - exact).max()
        for tol in (1e-2, 1e-3, 1e-5)
    ]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-4


def test_the_stages_reach_as_far_as_their_stability_polynomial_stays_below_1():
    for s in (2, 5, 12, 25):
        plan = stages(s)
        for z in np.linspace(0.01, 0.999 * plan.reach, 300):
            before, last = 1.0, 1.0 - plan.first * z
            for mu, nu, mu_tilde, gamma in plan.rest:
                new = (1 - mu - nu) + mu * last + nu * before - z * (mu_tilde * last + gamma)
                before, last = last, new
            assert abs(last) <= 1
        assert plan.reach > 0.6 * (s**2 - 1)
        assert plan.times[-1] == pytest.approx(1)


def test_weights_count_rows():
    X, y, _ = problem()
    counts = np.arange(len(y)) % 3
    model = mf.MirrorFlowRegressor(tol=1e-6, zero_tol=0)
    weighted = clone(model).fit(X, y, sample_weight=counts)
    repeated = clone(model).fit(np.repeat(X, counts, axis=0), np.repeat(y, counts))
    np.testing.assert_allclose(weighted.coef_, repeated.coef_, atol=1e-9)
    np.testing.assert_allclose(weighted.coef_, by_flow(weighted, X, y, counts), atol=1e-4)
    assert (weighted.dual_coef_[counts == 0] == 0).all()


def refusing(shape, toarray):
    """Make dense only what has not the shape of X."""

    def guarded(self, *args, **kwargs):
        assert sorted(self.shape) != sorted(shape)
        return toarray(self, *args, **kwargs)

    return guarded


@pytest.mark.parametrize("kind", [sp.csr_array, sp.csc_matrix])
def test_sparse_is_dense_and_stays_sparse(kind, monkeypatch):
    rng = np.random.default_rng(1)
    X = rng.standard_normal((40, 80)) * (rng.random((40, 80)) < 0.2)
    y = X @ rng.standard_normal(80) + 1
    for model in (mf.MirrorFlowRegressor(), mf.MirrorFlowRegressorCV(log_As=(0, -8), ts=4)):
        dense = clone(model).fit(X, y)
        with monkeypatch.context() as patch:
            for cls in (sp.csr_array, sp.csc_array, sp.csr_matrix, sp.csc_matrix):
                patch.setattr(cls, "toarray", refusing(X.shape, cls.toarray))
                patch.setattr(cls, "todense", None)
            sparse = clone(model).fit(kind(X), y)
            predicted = sparse.predict(kind(X))
        np.testing.assert_allclose(sparse.coef_, dense.coef_, atol=1e-6)
        np.testing.assert_allclose(predicted, dense.predict(X), atol=1e-5)


def test_several_targets_are_several_fits():
    X, y, _ = problem()
    Y = np.stack([y, -2 * y[::-1], np.full_like(y, 4.0)], axis=1)
    for options in ({}, {"interpolate": True}, {"refit": True}):
        model = mf.MirrorFlowRegressor(**options)
        together = clone(model).fit(X, Y)
        assert together.coef_.shape == together.support_.shape == (3, X.shape[1])
        for k in range(3):
            alone = clone(model).fit(X, Y[:, k])
            for name in ("coef_", "dual_coef_"):
                np.testing.assert_allclose(
                    getattr(together, name)[k], getattr(alone, name), atol=1e-9
                )
            for name in ("intercept_", "A_", "t_", "log_A_", "gap_", "kkt_residual_"):
                assert getattr(together, name)[k] == pytest.approx(
                    getattr(alone, name), rel=1e-9, abs=1e-9
                )


def test_dtypes_are_kept():
    X, y, _ = problem()
    for dtype in (np.float32, np.float64):
        model = mf.MirrorFlowRegressor().fit(X.astype(dtype), y.astype(dtype))
        assert model.coef_.dtype == model.predict(X.astype(dtype)).dtype == dtype
    assert mf.MirrorFlowRegressor().fit((10 * X).astype(int), y).coef_.dtype == np.float64


def test_read_only_and_fortran_ordered_input_is_left_alone():
    X, y, _ = problem()
    expected = mf.MirrorFlowRegressor().fit(X, y).coef_
    for order in "CF":
        Xo, yo = np.array(X, order=order), y.copy()
        Xo.flags.writeable = yo.flags.writeable = False
        np.testing.assert_allclose(mf.MirrorFlowRegressor().fit(Xo, yo).coef_, expected)


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_frames_give_their_names(library):
    frames = pytest.importorskip(library)
    X, y, _ = problem(d=4)
    frame = frames.DataFrame({f"f{i}": X[:, i] for i in range(4)})
    model = mf.MirrorFlowRegressor().fit(frame, y)
    assert list(model.feature_names_in_) == ["f0", "f1", "f2", "f3"]
    np.testing.assert_allclose(model.predict(frame), X @ model.coef_ + model.intercept_)


def test_the_intercept_is_not_penalized_on_wide_data():
    X, y, _ = problem()
    for options in ({}, {"interpolate": True}, {"positive": True}):
        model = mf.MirrorFlowRegressor(**options).fit(X, y)
        moved = mf.MirrorFlowRegressor(**options).fit(X + 5.0, y + 1e4)
        np.testing.assert_allclose(moved.coef_, model.coef_, atol=1e-6)
        expected = model.intercept_ + 1e4 - 5 * model.coef_.sum()
        assert moved.intercept_ == pytest.approx(expected, abs=1e-4)
    without = mf.MirrorFlowRegressor(fit_intercept=False).fit(X, y)
    assert without.intercept_ == 0


def test_units_make_the_fit_the_same_for_scaled_data():
    """X and y in other units of measurement: log_A and t mean the same."""
    X, y, _ = problem()
    model, scaled = mf.MirrorFlowRegressor().fit(X, y), mf.MirrorFlowRegressor().fit(X / 7, 100 * y)
    np.testing.assert_allclose(scaled.coef_, 700 * model.coef_, rtol=1e-8)
    assert scaled.log_A_ == model.log_A_


def test_the_end_point_is_that_of_limit_and_fits_exactly():
    X, y, truth = problem(noise=0)
    model = mf.MirrorFlowRegressor(-60, interpolate=True, zero_tol=0).fit(X, y)
    assert model.t_ == np.inf
    np.testing.assert_allclose(model.predict(X), y, atol=1e-6)
    np.testing.assert_allclose(model.coef_, truth, atol=1e-6)
    assert model.kkt_residual_ < 1e-9
    late = mf.MirrorFlowRegressor(-2, 2000, zero_tol=0).fit(X, y)
    end = mf.MirrorFlowRegressor(-2, interpolate=True, zero_tol=0).fit(X, y)
    np.testing.assert_allclose(late.coef_, end.coef_, atol=2e-3)


def test_the_end_point_on_more_rows_than_columns_is_least_squares():
    X, y, _ = problem(n=80, d=10)
    model = mf.MirrorFlowRegressor(interpolate=True, zero_tol=0).fit(X, y)
    expected = LinearRegression().fit(X, y)
    np.testing.assert_allclose(model.coef_, expected.coef_, atol=1e-8)
    assert model.intercept_ == pytest.approx(expected.intercept_)


def test_a_large_scale_is_early_stopped_gradient_flow():
    """A to infinity: x' = 2 A X^T (y - X x) / n, in closed form."""
    X, y, _ = problem()
    model = mf.MirrorFlowRegressor(9.0, 2.0, zero_tol=0, tol=1e-5).fit(X, y)
    Z, t = X - X.mean(0), y - y.mean()
    s, V = np.linalg.eigh(Z.T @ Z / len(y))
    time = 2 * model.A_ * model.t_
    filtered = -np.expm1(-np.maximum(s, 0) * time) / np.where(s > 1e-9, s, 1.0)
    filtered = np.where(s > 1e-9, filtered, time)
    expected = V @ (filtered * (V.T @ (Z.T @ t / len(y))))
    np.testing.assert_allclose(model.coef_, expected, atol=1e-3 * np.abs(expected).max())


def test_the_gap_bounds_how_far_from_l1_the_fit_is():
    X, y, _ = problem()
    for log_A in (-2.0, -10.0, -30.0):
        model = mf.MirrorFlowRegressor(log_A, 2.0, zero_tol=0).fit(X, y)
        Z = X - X.mean(0)
        d = X.shape[1]
        best = linprog(np.ones(2 * d), A_eq=np.hstack([Z, -Z]), b_eq=Z @ model.coef_).fun
        excess = 1 - best / np.abs(model.coef_).sum()
        assert -1e-9 <= excess <= model.gap_ + 1e-9


def test_small_coefficients_are_set_to_zero_by_the_stated_rule():
    X, y, _ = problem()
    raw = mf.MirrorFlowRegressor(zero_tol=0).fit(X, y).coef_
    for zero_tol in (1e-3, 0.2):
        model = mf.MirrorFlowRegressor(zero_tol=zero_tol).fit(X, y)
        kept = np.abs(raw) >= zero_tol * np.abs(raw).max()
        np.testing.assert_array_equal(model.support_, kept)
        np.testing.assert_allclose(model.coef_, np.where(kept, raw, 0))
        assert 0 < kept.sum() < len(raw)


def test_refit_is_least_squares_on_the_support():
    X, y, _ = problem()
    model = mf.MirrorFlowRegressor(-20, 3, zero_tol=0.1, refit=True).fit(X, y)
    expected = LinearRegression().fit(X[:, model.support_], y)
    np.testing.assert_allclose(model.coef_[model.support_], expected.coef_)
    assert model.intercept_ == pytest.approx(expected.intercept_)


def test_positive_means_positive():
    X, y, _ = problem()
    for t in (0.5, 3.0):
        assert (mf.MirrorFlowRegressor(t=t, positive=True).fit(X, y).coef_ >= 0).all()


def test_dual_coefficients_give_the_coefficients_back():
    X, y, _ = problem()
    model = mf.MirrorFlowRegressor(zero_tol=0).fit(X, y)
    np.testing.assert_allclose(
        model.coef_, model.A_ * np.sinh(2 * X.T @ model.dual_coef_), rtol=1e-9
    )
    assert model.kkt_residual_ < 1e-10


def test_the_scale_is_that_of_the_shortest_solution():
    X, y, _ = problem()
    Z, t = X - X.mean(0), y - y.mean()
    S = np.abs(np.linalg.pinv(Z) @ t).max()
    model = mf.MirrorFlowRegressor(-4.0).fit(X, y)
    np.testing.assert_allclose(model.A_, S * np.exp(-4.0))
    ridge = Ridge(1e-9).fit(X, y).coef_
    assert np.abs(ridge).max() == pytest.approx(S, rel=1e-5)


@pytest.mark.parametrize("options", [{}, {"decay": mf.TurnOff(1.0, 1.0)}, {"positive": True}])
def test_cross_validation_is_a_loop_over_folds_and_candidates(options):
    """Without a decay that is given, one flow more shrinks: its decay stays on."""
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


@pytest.mark.parametrize("refit", [False, True])
def test_the_threshold_is_the_largest_that_predicts_as_well_as_none(refit):
    X, y, _ = problem(n=40, noise=1.0)
    weights, cv = np.random.default_rng(3).uniform(0.5, 2, len(y)), KFold(4)
    tols = (0.3, 0.01, 0.1, 0.6)
    options = {"zero_tols": tols, "shrinkages": (), "refit": refit, "cv": cv, "tol": 1e-5}
    model = mf.MirrorFlowRegressorCV((-9.0,), [2.0], **options).fit(X, y, sample_weight=weights)
    whole = mf.MirrorFlowRegressor(-9.0, 1.0).fit(X, y, sample_weight=weights)
    for f, (train, test) in enumerate(cv.split(X)):
        part = X[train], y[train], weights[train]
        flow = _same_flow(-9.0, 2.0, (whole.t_, whole.A_), *part, {}).coef_
        for i, tol in enumerate(sorted(tols)):
            kept = np.abs(flow) >= tol * np.abs(flow).max()
            coef = np.where(kept, flow, 0.0)
            if refit:
                fitted = LinearRegression().fit(part[0][:, kept], *part[1:])
                coef[kept] = fitted.coef_
            offset = np.average(part[1] - part[0] @ coef, weights=part[2])
            missed = y[test] - X[test] @ coef - offset
            error = np.average(missed**2, weights=weights[test])
            assert model.zero_mse_path_[i, f] == pytest.approx(error, rel=3e-3)
    errors, without = model.zero_mse_path_.mean(1), model.mse_path_.mean()
    harmless = [tol for tol, e in zip(sorted(tols), errors, strict=True) if e <= without]
    assert model.best_zero_tol_ == (max(harmless) if harmless else sorted(tols)[errors.argmin()])
    np.testing.assert_array_equal(model.support_, model.coef_ != 0)


def test_zeros_cost_no_prediction_and_find_the_support():
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


def test_jobs_change_nothing():
    X, y, _ = problem(noise=1.0)
    alone = mf.MirrorFlowRegressorCV(ts=6, tol=1e-4).fit(X, y)
    shared = mf.MirrorFlowRegressorCV(ts=6, tol=1e-4, n_jobs=2).fit(X, y)
    np.testing.assert_allclose(shared.mse_path_, alone.mse_path_, rtol=1e-2)


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
    model = mf.MirrorFlowRegressorCV((-8.0,), 3, cv=GroupKFold(3))
    with pytest.raises(ValueError, match="enable_metadata_routing"):
        model.fit(X, y, groups=groups)
    with sklearn.config_context(enable_metadata_routing=True):
        assert model.fit(X, y, groups=groups).mse_path_.shape == (2, 3, 3)


def test_it_works_in_pipelines_searches_and_pickles():
    X, y, _ = problem()
    pipeline = make_pipeline(StandardScaler(), mf.MirrorFlowRegressor())
    search = GridSearchCV(pipeline, {"mirrorflowregressor__log_A": [-2.0, -10.0]}, cv=3)
    fitted = search.fit(X, y)
    again = pickle.loads(pickle.dumps(fitted))
    np.testing.assert_array_equal(again.predict(X), fitted.predict(X))


def test_a_constant_target_is_its_own_prediction():
    X, _, _ = problem()
    for model in (*MODELS,):
        fitted = clone(model).fit(X, np.full(len(X), 2.5))
        assert (fitted.coef_ == 0).all()
        np.testing.assert_allclose(fitted.predict(X), 2.5)


def test_degenerate_shapes():
    X, y, _ = problem()
    one = mf.MirrorFlowRegressor().fit(X[:1], y[:1])
    assert one.predict(X[:1]) == pytest.approx(y[0])
    narrow = mf.MirrorFlowRegressor(t=20).fit(X[:, :1], 2 * X[:, 0] + 1)
    assert narrow.coef_ == pytest.approx(2, abs=1e-3)
    X[:, 3] = 0
    assert mf.MirrorFlowRegressor().fit(X, y).coef_[3] == 0
    with pytest.raises(ValueError, match="0 sample"):
        mf.MirrorFlowRegressor().fit(X[:0], y[:0])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"log_A": np.nan}, "log_A"), ({"t": 0}, "'t'"), ({"t": -1.0}, "'t'"),
        ({"zero_tol": 1.0}, "zero_tol"), ({"tol": 0}, "'tol'"), ({"decay": 3}, "decay"),
        ({"max_iter": 0}, "max_iter"),
    ],
)  # fmt: skip
def test_bad_parameters_are_named(options, said):
    X, y, _ = problem()
    with pytest.raises(ValueError, match=said):
        mf.MirrorFlowRegressor(**options).fit(X, y)


@pytest.mark.parametrize(
    ("options", "said"),
    [({"log_As": []}, "log_As"), ({"log_As": [np.inf]}, "log_As"), ({"ts": [0.0, 1.0]}, "ts"),
     ({"ts": 0}, "'ts'"), ({"cv": 1}, "n_splits"), ({"shrinkages": [0.0]}, "between 0 and 1"),
     ({"zero_tols": []}, "zero_tols"), ({"zero_tols": [-0.1, 0.2]}, "zero_tols must be >= 0"),
     ({"zero_tols": [1.0]}, "zero_tols must be >= 0"),
     ({"shrinkages": [1.0]}, "between 0 and 1"), ({"shrinkages": [[0.5]]}, "between 0 and 1"),
     ({"shrinkages": [0.5], "decay": mf.TurnOff(1.0, 1.0)}, "give one of them")],
)  # fmt: skip
def test_bad_candidates_are_named(options, said):
    X, y, _ = problem()
    with pytest.raises(ValueError, match=said):
        mf.MirrorFlowRegressorCV(**options).fit(X, y)


@pytest.mark.parametrize(("alpha", "t", "said"), [(-1, 1, "alpha"), (1, 0, "t "), (np.nan, 1, "a")])
def test_turn_off_refuses_what_is_no_rate_or_time(alpha, t, said):
    with pytest.raises(ValueError, match=said):
        mf.TurnOff(alpha, t)


def test_too_few_steps_warn_and_are_not_hidden():
    X, y, _ = problem()
    with pytest.warns(ConvergenceWarning, match="max_iter=3"):
        mf.MirrorFlowRegressorCV(max_iter=3, ts=(0.3, 0.31)).fit(X, y)
    with pytest.warns(ConvergenceWarning, match="increase max_iter"):
        mf.MirrorFlowRegressor(max_iter=2).fit(X, y)


def test_weights_must_not_be_negative_or_all_zero():
    X, y, _ = problem()
    with pytest.raises(ValueError, match=r"[Nn]egative"):
        mf.MirrorFlowRegressor().fit(X, y, sample_weight=-np.ones(len(y)))
    with pytest.raises(ValueError, match="zero"):
        mf.MirrorFlowRegressor().fit(X, y, sample_weight=np.zeros(len(y)))
