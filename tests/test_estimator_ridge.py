"""Ridge regression as a candidate of the cross-validation, against scikit-learn's."""

import numpy as np
import pytest
from scipy.sparse import csr_matrix
from sklearn.linear_model import Ridge
from sklearn.model_selection import KFold

import mirrorflow as mf
from linear_models import check_display, check_sharing

FEW = {"log_As": (-6.0,), "ts": 4, "l1_ratios": ()}


def dense_truth(n=40, d=60, seed=0):
    """Return a problem in which all coefficients matter, and weights."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, d)) + 2.0
    y = X @ rng.standard_normal(d) + rng.standard_normal(n)
    return X, y, rng.uniform(0.5, 2.0, n)


@pytest.mark.filterwarnings("ignore:the error is still falling")  # the flow's, for 10 columns
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize(("n", "d"), [(40, 60), (150, 10)])
def test_errors_and_fit_are_those_of_ridge_regression(n, d, center):
    X, y, weights = dense_truth(n, d)
    options = {"ridges": (1e-3, 0.1, 1e-2), "cv": KFold(4), "fit_intercept": center}
    model = mf.MirrorFlowRegressorCV(**FEW, **options).fit(X, y, sample_weight=weights)
    v = weights / weights.sum()
    unit = (v @ (X - center * (v @ X)) ** 2).sum()
    np.testing.assert_array_equal(model.ridges_, [0.1, 1e-2, 1e-3])
    for i, penalty in enumerate(model.ridges_):
        for f, (train, test) in enumerate(KFold(4).split(X)):
            ridge = Ridge(penalty * unit, fit_intercept=center)
            ridge.fit(X[train], y[train], weights[train] / weights[train].sum())
            missed = ridge.predict(X[test]) - y[test]
            error = np.average(missed**2, weights=weights[test])
            assert model.ridge_mse_[i, f] == pytest.approx(error, rel=1e-3)
    if model.best_kind_ == "ridge":
        whole = Ridge(model.best_ridge_ * unit, fit_intercept=center).fit(X, y, v)
        np.testing.assert_allclose(model.coef_, whole.coef_, atol=1e-8)
        np.testing.assert_allclose(model.predict(X), whole.predict(X), atol=1e-8)
        np.testing.assert_array_equal(model.coef_path_[:, -1], model.coef_)


def test_what_is_chosen_has_the_least_error_of_all_candidates():
    kinds = set()
    for seed, truth in enumerate([np.ones(60), np.r_[5.0, np.zeros(59)], np.zeros(60)]):
        X, _, _ = dense_truth(seed=seed)
        y = X @ truth + np.random.default_rng(9).standard_normal(len(X))
        model = mf.MirrorFlowRegressorCV(**FEW).fit(X, y)
        others = min(model.zero_mse_path_.mean(1).min(), model.intercept_mse_.mean())
        ridge = model.ridge_mse_.mean(1)
        assert (model.best_kind_ == "ridge") == (ridge.min() < others)
        if model.best_kind_ == "ridge":
            assert model.best_ridge_ == model.ridges_[ridge.argmin()]
            assert model.support_.all() and (model.selection_frequency_ == 1).all()
            assert model.best_log_A_ == model.best_t_ == model.log_A_ == np.inf
            assert model.kkt_residual_ < 1e-8 and 0 <= model.gap_ <= 1
            np.testing.assert_allclose(X.T @ model.dual_coef_, model.coef_, atol=1e-8)
        else:
            assert model.best_ridge_ is None
        kinds.add(model.best_kind_)
    assert {"ridge", "flow"} <= kinds


def test_a_sparse_matrix_and_several_targets_are_the_same_problem():
    X, y, weights = dense_truth()
    Y = np.c_[y, X @ np.ones(60)]
    Y -= 0.3 * Y[::-1]
    dense, sparse = (
        mf.MirrorFlowRegressorCV(**FEW, standardize=True).fit(M, Y, sample_weight=weights)
        for M in (X, csr_matrix(X))
    )
    np.testing.assert_allclose(sparse.ridge_mse_, dense.ridge_mse_, rtol=1e-4)
    assert dense.best_kind_ == sparse.best_kind_ == "ridge"
    np.testing.assert_allclose(sparse.coef_, dense.coef_, atol=1e-8)
    assert dense.coef_path_.shape[:2] == dense.coef_.shape == (2, 60)


def test_the_way_the_work_is_shared_out_changes_no_bit_of_ridge_regression():
    X, y, _ = dense_truth()
    check_sharing(mf.MirrorFlowRegressorCV(**FEW), X, y, "ridge", "ridge_mse_")


def test_ridge_regression_is_left_out_where_it_is_not_what_was_asked_for():
    X, y, _ = dense_truth()
    for options in ({"ridges": ()}, {"positive": True}, {"decay": mf.TurnOff(1.0, 0.2)},
                    {"criterion": "ebic"}):  # fmt: skip
        model = mf.MirrorFlowRegressorCV(**{**FEW, **options}).fit(X, y)
        assert model.best_kind_ != "ridge" and model.ridge_mse_.shape[0] == 0
    with pytest.raises(ValueError, match="ridges must be"):
        mf.MirrorFlowRegressorCV(ridges=[0.0]).fit(X, y)
    with pytest.raises(ValueError, match="ridges must be"):
        mf.MirrorFlowRegressorCV(ridges=[0.1], positive=True).fit(X, y)


def test_a_display_shows_ridge_regression_as_a_line():
    X, y, _ = dense_truth()
    check_display(mf.MirrorFlowRegressorCV(**FEW).fit(X, y), "ridge", "ridge_mse_")


def test_data_without_noise_keep_the_zeros_of_a_flow():
    """Any small penalty fits them exactly, with no zeros."""
    X = np.random.default_rng(0).standard_normal((40, 20))
    model = mf.MirrorFlowRegressorCV().fit(X, X[:, 0] + X[:, 1])
    assert model.best_kind_ == "flow" and model.best_ridge_ is None
    np.testing.assert_array_equal(np.flatnonzero(model.coef_), [0, 1])
