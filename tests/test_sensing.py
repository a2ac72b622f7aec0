"""Low-rank recovery: from measurements and from entries, against convex and literal oracles."""

import pickle
import tracemalloc
import warnings

import cvxpy as cp
import numpy as np
import pandas as pd
import pytest
from scipy.sparse import coo_array, csc_array, csr_array, csr_matrix
from sklearn import config_context
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import cross_val_score
from sklearn.utils.estimator_checks import parametrize_with_checks

import mirrorflow as mf
from mirrorflow.estimator._alternating import Observed, alternate, solve_rows
from mirrorflow.estimator._sensing_solver import MeasurementProblem, descend
from mirrorflow.lab.experiments.matrix_sensing._problem import SensingProblem


class Rows(mf.MatrixSensing, auto_wrap_output_keys=None):
    """The checks give rows of any length: as measurements of a matrix with one column.

    What is for a matrix with missing entries is left out, and tested in test_completion.py:
    transform, fit_transform and NaN.
    """

    @property
    def transform(self):
        raise AttributeError("transform")

    @property
    def fit_transform(self):
        raise AttributeError("fit_transform")

    def fit(self, X, y=None, sample_weight=None):
        if y is None:
            return super().fit(X)
        shape = X.shape if hasattr(X, "shape") else np.asarray(X).shape
        width = shape[1] if len(shape) == 2 else 1
        self.shape = (max(1, width), 1)
        try:
            return super().fit(X, y, sample_weight)
        finally:
            self.shape = None

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = False
        tags.target_tags.required = True
        return tags


@parametrize_with_checks([Rows(max_rank=1)])
def test_scikit_learns_conventions(estimator, check):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a few steps, of a rank of 1
        check(estimator)


def low_rank(p=40, q=30, rank=2, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((p, rank)) @ rng.standard_normal((rank, q)), rng


def test_switching_off_recovers_what_constant_decay_shrinks():
    """The demonstration of the paper: from the same measurements, psd."""
    problem = SensingProblem.random(0, 20, 2, 120)
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


@pytest.fixture(scope="module")
def rank_one():
    """120 measurements of a rank-1 matrix."""
    X, rng = low_rank(8, 6, 1)
    A = rng.standard_normal((120, 8, 6))
    return A, np.einsum("ijk,jk->i", A, X), X


@pytest.mark.parametrize(("c", "d"), [(1e-6, 1), (1e-4, 1e-4), (0.1, 1e-7), (1e6, 3), (3, 1e6)])
def test_the_units_of_measurements_do_not_matter(rank_one, c, d):
    A, y, X = rank_one
    model = mf.MatrixSensing().fit(A, y)
    assert np.linalg.norm(model.matrix() - X) < 1e-5 * np.linalg.norm(X)
    scaled = mf.MatrixSensing().fit(c * A, d * y)
    assert np.linalg.norm(c / d * scaled.matrix() - X) < 1e-5 * np.linalg.norm(X)
    np.testing.assert_allclose(
        c / d * scaled.matrix(), model.matrix(), atol=1e-6 * np.abs(X).max(), rtol=0
    )


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("d", [1e-6, 7, 1e6])
def test_the_units_of_entries_do_not_matter(d, symmetric):
    X, rng = low_rank(30, 30)
    X = X @ X.T if symmetric else X
    seen = np.where(rng.random(X.shape) < 0.6, X + 0.1 * rng.standard_normal(X.shape), np.nan)
    model = mf.MatrixSensing(symmetric=symmetric)
    expected = d * model.fit(seen).matrix()
    np.testing.assert_allclose(model.fit(d * seen).matrix(), expected, atol=1e-5 * expected.max())


@pytest.mark.parametrize("switch_off", [False, True])
@pytest.mark.parametrize("alpha", [1.0, 3.0])
def test_decay_that_keeps_the_matrix_at_zero_does(rank_one, alpha, switch_off):
    A, y, X = rank_one
    model = mf.MatrixSensing(alpha=alpha, switch_off=switch_off)
    assert not model.fit(A, y).matrix().any()
    assert not model.fit(X).matrix().any() and model.rank_ == 0
    assert not mf.MatrixSensing(alpha=alpha, symmetric=True).fit(X @ X.T).matrix().any()


def test_directions_that_max_rank_leaves_out_are_named():
    X, rng = low_rank(14, 12, 4)
    A = rng.standard_normal((300, 14, 12))
    y = np.einsum("ijk,jk->i", A, X)
    model = mf.MatrixSensing(2, 0.02)
    with pytest.warns(UserWarning, match="max_rank must admit all directions"):
        model.fit(A, y)
    with pytest.warns(UserWarning, match="max_rank must admit all directions") as said:
        model.fit(X)
    assert said[0].filename == __file__
    with pytest.warns(UserWarning, match="max_rank must admit all directions"):
        mf.MatrixSensing(2, 0.02, symmetric=True).fit(X @ X.T)
    for enough in (4, 6):  # and no warning
        assert mf.MatrixSensing(enough, 0.02).fit(X).rank_ == 4
        mf.MatrixSensing(enough, 0.02).fit(A, y)


def test_columns_that_still_grow_leave_nothing_out():
    """Their pull exceeds the decay, too, where tol is coarse."""
    X, rng = low_rank(14, 12, 3)
    M = np.where(rng.random(X.shape) < 0.9, X / np.linalg.norm(X, 2), np.nan)
    problem = Observed.of(M)
    found = alternate(problem, 3, [(0.1, 0.3)], 100)
    assert problem.strongest(found.U, found.V, 1)[0] > 0.103
    assert found.settled and not found.left_out


def test_ten_columns_that_are_too_few_are_named():
    X, _ = low_rank(40, 30, 14)
    with pytest.warns(UserWarning, match="max_rank must admit all directions .* got 10"):
        mf.MatrixSensing(alpha=0.02).fit(X)


def test_a_fit_that_fails_leaves_the_estimator_as_it_was(rank_one, monkeypatch):
    A, y, X = rank_one
    model = mf.MatrixSensing().fit(A, y)
    before = dict(vars(model))
    with pytest.raises(ValueError, match=r"y must have 3 values, .* got 2"):
        model.fit(np.ones((3, 2, 2)), np.ones(2))
    assert vars(model) == before

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("mirrorflow.estimator.sensing.sense", interrupted)
    monkeypatch.setattr("mirrorflow.estimator._lowrank.alternate", interrupted)
    for data in ((A[:, :3], y), (X[:, :3],)):
        with pytest.raises(KeyboardInterrupt):
            model.fit(*data)
        assert vars(model) == before


def test_weights_are_repetitions(rank_one):
    A, y, _ = rank_one
    y = y + np.random.default_rng(1).standard_normal(len(y))
    weights = np.arange(len(y)) % 3
    model = mf.MatrixSensing(tol=1e-8, max_iter=20_000)
    expected = model.fit(np.repeat(A, weights, axis=0), np.repeat(y, weights)).matrix()
    weighted = model.fit(A, y, sample_weight=weights).matrix()
    np.testing.assert_allclose(weighted, expected, atol=1e-6)
    assert np.abs(model.fit(A, y).matrix() - expected).max() > 1e-2


def test_measurements_that_are_matrices_are_cross_validated(rank_one):
    A, y, _ = rank_one
    scores = cross_val_score(mf.MatrixSensing(), A, y, cv=3)
    assert scores.min() > 0.999 and scores.shape == (3,)


def test_weights_are_routed():
    with config_context(enable_metadata_routing=True):
        model = mf.MatrixSensing().set_fit_request(sample_weight=True)
        model.set_score_request(sample_weight=False)
        assert model.get_metadata_routing().fit.requests == {"sample_weight": True}


def test_the_score_is_the_explained_variance(rank_one):
    A, y, _ = rank_one
    model = mf.MatrixSensing(alpha=0.5, switch_off=False).fit(A, y)
    w = np.linspace(0, 1, len(y))
    residual = y - np.tensordot(A, model.matrix(), 2)
    expected = 1 - (w @ residual**2) / (w @ (y - w @ y / w.sum()) ** 2)
    assert 0 < expected < 0.99
    assert model.score(A, y, sample_weight=w) == pytest.approx(expected)


def test_frames_give_names_and_float32_stays(rank_one):
    A, y, X = rank_one
    frame = pd.DataFrame(A.reshape(len(A), -1), columns=[f"a{i}" for i in range(48)])
    model = mf.MatrixSensing(shape=(8, 6)).fit(frame.astype(np.float32), y)
    assert list(model.feature_names_in_) == list(frame.columns) and model.n_features_in_ == 48
    assert {a.dtype for a in (model.U_, model.V_, model.matrix())} == {np.dtype(np.float32)}
    np.testing.assert_allclose(model.matrix(), X, atol=1e-4)
    with pytest.raises(ValueError, match="feature names"):
        model.predict(frame[frame.columns[::-1]])


def test_sparse_measurements_are_not_made_dense():
    """9,000 entries of a 150 x 120 matrix, one a measurement: dense they would be 1.3 GB."""
    X, rng = low_rank(150, 120)
    places = rng.permutation(X.size)[:9000]
    A = csr_array((np.full(9000, 0.5), (np.arange(9000), places)), shape=(9000, X.size))
    model = mf.MatrixSensing(4, shape=X.shape)
    tracemalloc.start()
    model.fit(A, A @ X.ravel())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5e6
    np.testing.assert_allclose(model.matrix(), X, atol=1e-2)
    np.testing.assert_allclose(model.predict(A[:50]), A[:50] @ X.ravel(), atol=1e-2)


def test_sparse_and_dense_measurements_are_the_same():
    X, rng = low_rank(8, 6, 1)
    A = rng.standard_normal((60, 48)) * (rng.random((60, 48)) < 0.3)
    model, y = mf.MatrixSensing(shape=(8, 6)), A @ X.ravel()
    expected = model.fit(A, y).matrix()
    for form in (csr_array, csc_array, csr_matrix, coo_array):
        np.testing.assert_allclose(model.fit(form(A), y).matrix(), expected, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "known"), [(1, 20_000), (50, 400_000)])
def test_a_thousand_by_a_thousand_in_reasonable_memory(rank, known):
    X, rng = low_rank(1000, 1000, rank)
    places = rng.permutation(X.size)[:known]
    A = csr_array((np.ones(known), (np.arange(known), places)), shape=(known, X.size))
    y = X.ravel()[places]
    tracemalloc.start()
    model = mf.MatrixSensing(rank + 5, shape=X.shape, tol=1e-4).fit(A, y)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6
    assert np.linalg.norm(model.matrix() - X) < 1e-2 * np.linalg.norm(X)


def test_descent_never_raises_the_objective_and_stays_balanced():
    X, rng = low_rank(6, 5)
    A = rng.standard_normal((40, 30))
    f = MeasurementProblem.of(A, A @ X.ravel(), (6, 5))
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


def test_it_pickles():
    X, _ = low_rank(8, 7)
    model = mf.MatrixSensing(3).fit(X)
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(again.U_, model.U_)
    np.testing.assert_allclose(again.matrix(), model.matrix(), atol=1e-12)


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
    with pytest.warns(UserWarning, match="got 1 rows without"):
        model = mf.MatrixSensing(3).fit(X)
    assert (model.matrix()[3] == 0).all()


@pytest.mark.parametrize(
    ("options", "X", "y", "said"),
    [
        ({"max_rank": 9}, np.ones((4, 5)), None, "max_rank must be at most"),
        ({"max_rank": 9}, np.ones((3, 4, 5)), np.ones(3), "max_rank must be at most"),
        ({"alpha": -1.0}, np.ones((4, 5)), None, "alpha"),
        (
            {"symmetric": True, "max_rank": 2},
            np.ones((3, 4, 5)),
            np.ones(3),
            "square with symmetric=True",
        ),
        ({"symmetric": True, "max_rank": 2}, np.ones((4, 5)), None, "square with symmetric=True"),
        ({"max_rank": 1}, np.ones((3, 6)), np.ones(3), "must be .p, q. for measurements"),
        (
            {"max_rank": 1, "shape": (2, 2)},
            np.ones((3, 6)),
            np.ones(3),
            r"p \* q = 6",
        ),
        ({"max_rank": 1, "shape": (6,)}, np.ones((3, 6)), np.ones(3), "shape must be two whole"),
        ({"max_rank": 1, "shape": ("a", 2)}, np.ones((3, 6)), np.ones(3), "shape must be two"),
        ({"max_rank": 1, "shape": (-2, -3)}, np.ones((3, 6)), np.ones(3), "shape must be two"),
        ({"max_rank": 1, "shape": (2.0, 3.0)}, np.ones((3, 6)), np.ones(3), "shape must be two"),
        ({"max_rank": 1, "shape": (1, 2, 3)}, np.ones((3, 6)), np.ones(3), "shape must be two"),
        (
            {"max_rank": 1, "shape": (3, 2)},
            np.ones((3, 2, 3)),
            np.ones(3),
            "shape must be that of the measurements",
        ),
        (
            {"max_rank": 1, "shape": (4, 5)},
            np.ones((4, 5)),
            None,
            "shape must be left out without y",
        ),
        ({"max_rank": 1}, np.ones((3, 2, 3)), np.ones(4), "y must have 3 values, .* got 4"),
        ({"max_rank": 1}, np.full((3, 3), np.inf), None, "infinity"),
        ({"max_rank": 1}, np.full((3, 2, 2), np.nan), np.ones(3), "NaN"),
    ],
)
def test_bad_input_is_named(options, X, y, said):
    with pytest.raises(ValueError, match=said):
        mf.MatrixSensing(**options).fit(X, y)


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ([1.0, -1.0, 1.0], "[Nn]egative"),
        (np.zeros(3), "zero"),
        (np.ones(2), "shape"),
    ],
)
def test_bad_weights_are_named(weights, said):
    with pytest.raises(ValueError, match=said):
        mf.MatrixSensing(1).fit(np.ones((3, 2, 3)), np.ones(3), weights)


def test_entries_have_no_weights():
    with pytest.raises(ValueError, match="sample_weight must be left out without y"):
        mf.MatrixSensing(1).fit(np.ones((3, 2)), sample_weight=np.ones(3))


def test_too_few_steps_warn():
    X, rng = low_rank(12, 10)
    A = rng.standard_normal((60, 12, 10))
    with pytest.warns(ConvergenceWarning, match="max_iter=3"):
        mf.MatrixSensing(3, max_iter=3).fit(A, np.einsum("ijk,jk->i", A, X))
