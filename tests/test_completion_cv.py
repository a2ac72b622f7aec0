"""Completion that chooses: penalized offsets, scores of rows and pairs, and hidden entries."""

import warnings

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.metrics import r2_score
from sklearn.model_selection import GridSearchCV, KFold
from sklearn.utils.estimator_checks import parametrize_with_checks

import mirrorflow as mf
from test_completion import as_sparse, problem


@parametrize_with_checks([mf.MatrixCompletionCV((0.5, 0.1), (None, 0.0), max_iter=20, cv=2)])
@pytest.mark.sample(23)
def test_scikit_learns_conventions(estimator, check):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of columns without an entry, and of 20 steps
        check(estimator)


def with_levels(p=40, q=25, seen=0.5, noise=0.3, seed=0):
    """Draw a matrix of rank 1 beside levels of rows and columns, and what is known of it."""
    X, _ = problem(p, q, 1, seed=seed)
    rng = np.random.default_rng(seed + 1)
    X = X + 10 + rng.standard_normal((p, 1)) + 2 * rng.standard_normal(q)
    noisy = X + noise * rng.standard_normal(X.shape)
    return X, np.where(rng.random(X.shape) < seen, noisy, np.nan)


@pytest.mark.parametrize("penalty", [0.5, 5.0])
def test_penalized_offsets_are_a_ridge_regression_on_rows_and_columns(penalty):
    """With so much decay that there are no factors."""
    _, M = with_levels(12, 9)
    M[3], M[:, 4] = np.nan, np.nan
    model = mf.MatrixCompletion(alpha=5.0, center=True, offset_penalty=penalty)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*must have a known entry")
        model.fit(M)
    i, j = np.nonzero(~np.isnan(M))
    y, design = M[i, j], np.zeros((len(i), 21))
    design[np.arange(len(i)), i] = design[np.arange(len(i)), 12 + j] = 1.0
    solved = np.linalg.solve(design.T @ design + penalty * np.eye(21), design.T @ (y - y.mean()))
    np.testing.assert_allclose(model.row_offset_, solved[:12], atol=1e-8)
    np.testing.assert_allclose(model.column_offset_, y.mean() + solved[12:], atol=1e-8)


def test_penalized_offsets_and_factors_are_a_stationary_point():
    _, M = with_levels()
    model = mf.MatrixCompletion(25, 0.1, center=True, offset_penalty=2.0, tol=1e-9).fit(M)
    known = ~np.isnan(M)
    residual = np.where(known, np.nan_to_num(M) - model.matrix(), 0.0)
    a, b = model.row_offset_, model.column_offset_
    np.testing.assert_allclose(residual.sum(axis=1), 2.0 * a, atol=1e-5)
    np.testing.assert_allclose(residual.sum(axis=0), 2.0 * (b - M[known].mean()), atol=1e-5)
    np.testing.assert_allclose(residual @ model.V_, model.decay_ * model.U_, atol=1e-5)
    np.testing.assert_allclose(residual.T @ model.U_, model.decay_ * model.V_, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"center": True}, {"center": True, "offset_penalty": 3.0}])
def test_a_score_predicts_each_known_entry_from_the_others_of_its_row(options):
    _, M = with_levels()
    model = mf.MatrixCompletion(alpha=0.2, **options).fit(M[:30])
    rows = M[30:]
    known, expected = ~np.isnan(rows), np.zeros_like(rows)
    for i, j in zip(*np.nonzero(known), strict=True):
        hidden = rows[[i]].copy()
        hidden[0, j] = np.nan
        expected[i, j] = model.transform(hidden)[0, j]
    score = r2_score(rows[known], expected[known])
    assert model.score(rows) == pytest.approx(score, abs=1e-6)
    assert model.score(as_sparse(rows)) == pytest.approx(score, abs=1e-6)


def test_the_score_of_rows_with_one_entry_is_that_of_no_information():
    _, M = problem()
    model = mf.MatrixCompletion(switch_off=True).fit(M)
    rows = np.full((2, 25), np.nan)
    rows[0, 3], rows[1, 7] = 2.0, -1.0
    assert model.score(rows) == pytest.approx(r2_score([2.0, -1.0], [0.0, 0.0]), abs=1e-4)
    with pytest.raises(ValueError, match="must have a known entry"):
        model.score(np.full((2, 25), np.nan))


@pytest.mark.parametrize("model", [mf.MatrixCompletion(), mf.MatrixSensing(switch_off=False)])
@pytest.mark.sample(1)
def test_a_grid_search_chooses_a_decay_that_predicts(model):
    _, M = problem(80, 20, seen=0.7, noise=0.5)
    search = GridSearchCV(model, {"alpha": [0.9, 0.2]}, cv=3).fit(M)
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()
    assert search.best_params_ == {"alpha": 0.2}


def test_a_grid_search_takes_measurements():
    X, _ = problem(6, 5)
    A = np.random.default_rng(0).standard_normal((60, 6, 5))
    y = np.einsum("mij,ij->m", A, X)
    search = GridSearchCV(mf.MatrixSensing(), {"alpha": [0.1, 2.0]}, cv=3).fit(A, y)
    assert search.best_params_ == {"alpha": 0.1} and search.best_score_ > 0.99
    with pytest.raises(ValueError, match="y must be given"):
        search.best_estimator_.score(X)


def test_pairs_are_entries_of_the_matrix():
    X, M = with_levels()
    model = mf.MatrixCompletion(center=True).fit(M)
    pairs = np.argwhere(np.isnan(M))
    np.testing.assert_allclose(model.predict_pairs(pairs), model.matrix()[np.isnan(M)])
    assert model.score_pairs(pairs, X[np.isnan(M)]) > 0.9


@pytest.mark.parametrize(
    ("pairs", "message"),
    [([[0.5, 1.0]], "whole numbers"), ([0, 1], "whole numbers"), ([[40, 0]], "lie within X"),
     ([[0, -1]], "lie within X")],
)  # fmt: skip
def test_pairs_outside_the_matrix_are_refused(pairs, message):
    _, M = with_levels()
    with pytest.raises(ValueError, match=message):
        mf.MatrixCompletion(alpha=0.5, center=True).fit(M).predict_pairs(pairs)


@pytest.mark.slow
def test_the_chosen_model_is_the_one_that_predicts_hidden_entries_best():
    """A literal loop over folds and candidates, each fitted by itself."""
    _, M = with_levels(20, 15, seen=0.8)
    options = {"alphas": (0.5, 0.2), "offset_penalties": (None, 4.0), "tol": 1e-6}
    model = mf.MatrixCompletionCV(**options, cv=3).fit(M)
    i, j = np.nonzero(~np.isnan(M))
    for f, (train, test) in enumerate(KFold(3, shuffle=True, random_state=0).split(i)):
        part = np.full_like(M, np.nan)
        part[i[train], j[train]] = M[i[train], j[train]]
        for p, penalty in enumerate((None, 4.0)):
            for a, alpha in enumerate(model.alphas_):
                more = {} if penalty is None else {"center": True, "offset_penalty": penalty}
                one = mf.MatrixCompletion(None, alpha, tol=1e-6, **more).fit(part)
                missed = M[i[test], j[test]] - one.predict_pairs(np.stack([i[test], j[test]], 1))
                assert model.mse_path_[p, a, f] == pytest.approx((missed**2).mean(), rel=2e-3)
    p, a = np.unravel_index(model.mse_path_.mean(axis=2).argmin(), (2, 2))
    assert model.best_alpha_ == model.alphas_[a]
    assert model.best_offset_penalty_ == (None, 4.0)[p]
    more = {"center": True, "offset_penalty": 4.0} if p else {}
    last = mf.MatrixCompletion(None, model.best_alpha_, tol=1e-6, **more).fit(M)
    np.testing.assert_allclose(model.matrix(), last.matrix(), atol=1e-6)
    np.testing.assert_allclose(model.transform(M[:5]), last.transform(M[:5]), atol=1e-6)


def test_the_way_the_work_is_shared_out_changes_no_bit_of_a_completion():
    _, M = with_levels(20, 15, seen=0.8)
    model = mf.MatrixCompletionCV((0.5, 0.2), (None, 1.0), cv=2)
    alone, shared = clone(model).fit(M), clone(model).set_params(n_jobs=2).fit(M)
    np.testing.assert_array_equal(alone.mse_path_, shared.mse_path_)
    np.testing.assert_array_equal(alone.matrix(), shared.matrix())


def test_offsets_are_chosen_where_there_are_levels_and_left_out_where_there_are_none():
    alphas = (0.5, 0.2)
    levels = mf.MatrixCompletionCV(alphas, (None, 5.0)).fit(with_levels(30, 20)[1])
    assert levels.best_offset_penalty_ == 5.0
    plain = mf.MatrixCompletionCV(alphas, (None, 0.0)).fit(problem(noise=0.2)[1])
    assert plain.best_offset_penalty_ is None


@pytest.mark.parametrize(
    ("options", "message"),
    [({"alphas": []}, "alphas must be"), ({"alphas": [0.0]}, "alphas must be"),
     ({"offset_penalties": []}, "offset_penalties must be"),
     ({"offset_penalties": [-1.0]}, "offset_penalties must be"), ({"cv": 1}, "'cv'"),
     ({"cv": 600}, "at least cv=600 known entries")],
)  # fmt: skip
def test_bad_candidates_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        mf.MatrixCompletionCV(**options).fit(with_levels(20, 15)[1])


def test_a_fold_leaves_its_path_where_the_errors_rise():
    """With much noise weak decay fits it; what lies behind is not computed, and not chosen."""
    _, M = with_levels(40, 25, noise=3.0)
    alphas = (0.9, 0.5, 0.3, 0.1, 0.01)
    model = mf.MatrixCompletionCV(alphas, (0.0,), cv=3).fit(M)
    for errors in model.mse_path_[0].T:
        reached = int(np.isfinite(errors).sum())
        assert 1 < reached < len(alphas) and np.isinf(errors[reached:]).all()
        assert errors[reached - 1] > 1.1 * errors[: reached - 1].min()
    assert np.isfinite(model.mse_path_[0, list(model.alphas_).index(model.best_alpha_)]).all()
