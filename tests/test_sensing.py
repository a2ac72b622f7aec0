"""Low-rank recovery: from measurements and from entries, against convex and literal oracles."""

import pickle
import tracemalloc
import warnings

import cvxpy as cp
import numpy as np
import pytest
from scipy.sparse import csr_array
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.estimator_checks import parametrize_with_checks

import mirrorflow as mf
from mirrorflow.estimator.factors import Measured, Observed, descend, solve_rows
from mirrorflow.experiments._sensing import Problem


class AnyShape(mf.MatrixSensing):
    """The checks give rows of any length: as measurements of a matrix with one column."""

    def fit(self, X, y=None):
        if y is None:
            return super().fit(X)
        width = np.shape(X)[1] if np.ndim(X) == 2 else 1
        self.shape = (width, 1)
        try:
            return super().fit(X, y)
        finally:
            self.shape = None


# These ask that a fit without y has the features of X as measurements, or that NaN is refused.
ENTRIES = {
    "check_estimators_nan_inf", "check_transformer_data_not_an_array", "check_dict_unchanged",
    "check_transformer_general", "check_transformers_unfitted", "check_methods_subset_invariance",
    "check_methods_sample_order_invariance", "check_fit2d_1sample", "check_estimators_dtypes",
    "check_n_features_in_after_fitting", "check_fit2d_predict1d", "check_pipeline_consistency",
    "check_fit_idempotent", "check_estimators_pickle", "check_f_contiguous_array_estimator",
    "check_fit1d", "check_fit_score_takes_y", "check_dtype_object",
    "check_transformer_preserve_dtypes", "check_do_not_raise_errors_in_init_or_set_param",
    "check_fit_check_is_fitted",
}  # fmt: skip


@parametrize_with_checks([AnyShape(max_rank=1, max_iter=50)])
def test_scikit_learns_conventions(estimator, check):
    if check.func.__name__ in ENTRIES:
        pytest.skip("a matrix with entries is one object: it has no samples to take apart")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(estimator)


def low_rank(p=40, q=30, rank=2, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((p, rank)) @ rng.standard_normal((rank, q)), rng


def test_switching_off_recovers_what_constant_decay_shrinks():
    """The demonstration of the paper: from the same measurements, psd."""
    problem = Problem.random(0, 20, 2, 120)
    A, y, truth = problem.sensing(), problem.y, problem.truth
    options = {"max_rank": 20, "symmetric": True, "max_iter": 5000}

    def error(**more):
        model = mf.MatrixSensing(**options, **more).fit(A, y)
        assert model.U_.shape == model.V_.shape
        return np.linalg.norm(model.matrix() - truth)

    kept, free, off = error(switch_off=False), error(alpha=0.0), error()
    assert off < 1e-3 < 0.02 < min(kept, free)


def test_under_constant_decay_it_is_the_nuclear_norm_minimizer():
    X, rng = low_rank(8, 6)
    A = rng.standard_normal((30, 8, 6))
    y = np.einsum("ijk,jk->i", A, X)
    model = mf.MatrixSensing(6, 0.2, switch_off=False, tol=1e-9, max_iter=20_000).fit(A, y)
    top = np.linalg.norm(np.einsum("i,ijk->jk", y, A) / 30, 2)
    M = cp.Variable((8, 6))
    fit = cp.sum_squares(A.reshape(30, -1) @ cp.vec(M, order="C") - y) / 60
    cp.Problem(cp.Minimize(fit + 0.2 * top * cp.normNuc(M))).solve(solver="CLARABEL")
    np.testing.assert_allclose(model.matrix(), M.value, atol=1e-4)


def test_completion_under_constant_decay_is_the_nuclear_norm_minimizer():
    X, rng = low_rank(9, 7)
    seen = np.where(rng.random(X.shape) < 0.7, X + 0.1 * rng.standard_normal(X.shape), np.nan)
    model = mf.MatrixSensing(7, 0.2, switch_off=False, tol=1e-10).fit(seen)
    known = ~np.isnan(seen)
    alpha = 0.2 * np.linalg.norm(np.nan_to_num(seen), 2)
    M = cp.Variable(X.shape)
    fit = 0.5 * cp.sum_squares(cp.multiply(known, M) - np.nan_to_num(seen))
    cp.Problem(cp.Minimize(fit + alpha * cp.normNuc(M))).solve(solver="CLARABEL")
    np.testing.assert_allclose(model.matrix(), M.value, atol=1e-4)


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("shape", [(60, 50), (50, 60)])
def test_entries_recover_the_matrix_and_its_rank(rank, shape):
    X, rng = low_rank(*shape, rank)
    seen = np.where(rng.random(X.shape) < 0.5, X, np.nan)
    model = mf.MatrixSensing(10).fit(seen)
    assert model.rank_ == rank
    np.testing.assert_allclose(model.matrix(), X, atol=1e-3 * np.abs(X).max())
    np.testing.assert_allclose(model.singular_values_[:rank], np.linalg.svd(X)[1][:rank], rtol=1e-3)
    filled = model.fit_transform(seen)
    np.testing.assert_array_equal(filled[~np.isnan(seen)], X[~np.isnan(seen)])
    assert not np.isnan(filled).any()


def test_noise_is_not_fitted():
    X, rng = low_rank(60, 50)
    noisy = X + 0.3 * rng.standard_normal(X.shape)
    seen = np.where(rng.random(X.shape) < 0.6, noisy, np.nan)
    model = mf.MatrixSensing(10, 0.3).fit(seen)
    hidden = np.isnan(seen)
    error = np.sqrt(((model.matrix() - X)[hidden] ** 2).mean())
    assert error < 0.15


def test_rectangular_measurements_recover():
    X, rng = low_rank(12, 10, 1)
    A = rng.standard_normal((90, 12, 10))
    y = np.einsum("ijk,jk->i", A, X)
    model = mf.MatrixSensing(5, max_iter=5000).fit(A, y)
    np.testing.assert_allclose(model.matrix(), X, atol=1e-2 * np.abs(X).max())
    np.testing.assert_allclose(model.predict(A), y, atol=0.05 * np.abs(y).max())
    flat = clone(model).set_params(shape=(12, 10)).fit(A.reshape(90, -1), y)
    np.testing.assert_allclose(flat.matrix(), model.matrix())


def test_descent_never_raises_the_objective_and_stays_balanced():
    X, rng = low_rank(6, 5)
    A = rng.standard_normal((40, 30))
    f = Measured(A, A @ X.ravel(), (6, 5))
    U, V = rng.standard_normal((6, 3)), rng.standard_normal((5, 3))
    values = [f.value(U, V)]
    for steps in (1, 3, 10, 30):
        found = descend(f, U, V, False, 0.0, None, steps, 1e-12)
        values.append(f.value(found.U, found.V))
    assert values == sorted(values, reverse=True)


def test_rows_are_ridge_regressions():
    X, rng = low_rank()
    seen = np.where(rng.random(X.shape) < 0.5, X, np.nan)
    V = rng.standard_normal((30, 4))
    U = solve_rows(Observed.of(seen), V, 0.7)
    for i, row in enumerate(seen):
        known = ~np.isnan(row)
        expected = np.linalg.solve(V[known].T @ V[known] + 0.7 * np.eye(4), V[known].T @ row[known])
        np.testing.assert_allclose(U[i], expected, atol=1e-9)


def test_large_matrices_take_the_memory_of_their_entries():
    """5,000 x 4,000 with 1 entry in 100: 160 MB if it were dense, once."""
    rng = np.random.default_rng(0)
    p, q, r = 5000, 4000, 3
    left, right = rng.standard_normal((p, r)), rng.standard_normal((q, r))
    flat = np.unique(rng.integers(0, p * q, 200_000))
    rows, columns = flat // q, flat % q
    values = np.einsum("ij,ij->i", left[rows], right[columns])
    Y = csr_array((values, (rows, columns)), shape=(p, q))
    seen = csr_array((np.ones_like(values), (rows, columns)), shape=(p, q))
    tracemalloc.start()
    solve_rows(Observed(Y, seen), right, 1e-6)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40e6


def test_it_pickles():
    X, _ = low_rank(8, 7)
    model = mf.MatrixSensing(3).fit(X)
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(again.matrix(), model.matrix())


def test_zero_is_recovered_as_zero():
    model = mf.MatrixSensing(2).fit(np.zeros((4, 3)))
    assert model.rank_ == 0 and (model.matrix() == 0).all()
    measured = mf.MatrixSensing(2).fit(np.ones((5, 3, 3)), np.zeros(5))
    assert (measured.matrix() == 0).all()


def test_contradictory_measurements_are_fitted_in_between():
    A = np.repeat(np.eye(2).reshape(1, 2, 2), 2, axis=0)
    model = mf.MatrixSensing(2, 0.01).fit(A, [1.0, 3.0])
    assert np.trace(model.matrix()) == pytest.approx(2, abs=1e-3)


def test_rows_without_entries_are_named():
    X, _ = low_rank(8, 7)
    X[3] = np.nan
    with pytest.warns(UserWarning, match="1 rows of X have no entry"):
        model = mf.MatrixSensing(3).fit(X)
    assert (model.matrix()[3] == 0).all()


@pytest.mark.parametrize(
    ("options", "X", "y", "said"),
    [
        ({"max_rank": 9}, np.ones((4, 5)), None, "max_rank=9 is above"),
        ({"max_rank": 9}, np.ones((3, 4, 5)), np.ones(3), "max_rank=9 is above"),
        ({"alpha": -1.0}, np.ones((4, 5)), None, "alpha"),
        ({"symmetric": True, "max_rank": 2}, np.ones((3, 4, 5)), np.ones(3), "p = q"),
        ({"symmetric": True, "max_rank": 2}, np.ones((4, 4)), None, "give y"),
        ({"max_rank": 1}, np.ones((3, 6)), np.ones(3), "with shape="),
        ({"max_rank": 1, "shape": (2, 2)}, np.ones((3, 6)), np.ones(3), "does not fit"),
        ({"max_rank": 1}, np.ones((3, 2, 3)), np.ones(4), "3 measurements, y has 4"),
        ({"max_rank": 1}, np.full((3, 3), np.inf), None, "infinity"),
        ({"max_rank": 1}, np.full((3, 2, 2), np.nan), np.ones(3), "NaN"),
    ],
)
def test_bad_input_is_named(options, X, y, said):
    with pytest.raises(ValueError, match=said):
        mf.MatrixSensing(**options).fit(X, y)


def test_too_few_steps_warn():
    X, rng = low_rank(12, 10)
    A = rng.standard_normal((60, 12, 10))
    with pytest.warns(ConvergenceWarning, match="max_iter=3"):
        mf.MatrixSensing(3, max_iter=3).fit(A, np.einsum("ijk,jk->i", A, X))
