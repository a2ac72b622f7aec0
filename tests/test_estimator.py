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
from sklearn.linear_model import LinearRegression, Ridge
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import mirrorflow as mf
from mirrorflow.estimator._chebyshev import stages

MODELS = [
    mf.MirrorFlowRegressor(),
    mf.MirrorFlowRegressor(positive=True),
    mf.MirrorFlowRegressor(interpolate=True),
    mf.MirrorFlowRegressor(decay=mf.TurnOff(1.0, 0.5), refit=True),
    mf.MirrorFlowRegressorCV(log_As=(0.0, -8.0), ts=5),
]


@parametrize_with_checks(MODELS)
@pytest.mark.sample(110)
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


def shortest_solution(X, y):
    """Solve the centred problem on wide data, whose n rows add up to 0: their rank is n - 1."""
    U, s, Vt = np.linalg.svd(X - X.mean(0), full_matrices=False)
    rank = len(X) - 1
    assert s[rank - 1] > 1e-6 * s[0] > 1e6 * s[rank]  # no cut-off has to decide
    return Vt[:rank].T @ ((U[:, :rank].T @ (y - y.mean())) / s[:rank])


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
    S = np.abs(shortest_solution(X, y)).max()
    model = mf.MirrorFlowRegressor(-4.0).fit(X, y)
    np.testing.assert_allclose(model.A_, S * np.exp(-4.0))
    ridge = Ridge(1e-9).fit(X, y).coef_
    assert np.abs(ridge).max() == pytest.approx(S, rel=1e-5)


def test_it_works_in_pipelines_searches_and_pickles():
    X, y, _ = problem()
    pipeline = make_pipeline(StandardScaler(), mf.MirrorFlowRegressor())
    search = GridSearchCV(pipeline, {"mirrorflowregressor__log_A": [-2.0, -10.0]}, cv=3)
    fitted = search.fit(X, y)
    again = pickle.loads(pickle.dumps(fitted))
    np.testing.assert_allclose(again.predict(X), fitted.predict(X), rtol=1e-12)


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


@pytest.mark.parametrize(("alpha", "t", "said"), [(-1, 1, "alpha"), (1, 0, "t "), (np.nan, 1, "a")])
def test_turn_off_refuses_what_is_no_rate_or_time(alpha, t, said):
    with pytest.raises(ValueError, match=said):
        mf.TurnOff(alpha, t)


def test_too_few_steps_warn_and_are_not_hidden():
    X, y, _ = problem()
    with pytest.warns(ConvergenceWarning, match="max_iter=3"):
        mf.MirrorFlowRegressorCV(max_iter=3, ts=(0.3, 3.0)).fit(X, y)
    with pytest.warns(ConvergenceWarning, match="Increase max_iter"):
        mf.MirrorFlowRegressor(max_iter=2).fit(X, y)


def test_weights_must_not_be_negative_or_all_zero():
    X, y, _ = problem()
    with pytest.raises(ValueError, match=r"[Nn]egative"):
        mf.MirrorFlowRegressor().fit(X, y, sample_weight=-np.ones(len(y)))
    with pytest.raises(ValueError, match=r"zero|sum"):
        mf.MirrorFlowRegressor().fit(X, y, sample_weight=np.zeros(len(y)))
