"""Elastic nets as candidates of the cross-validation, against scikit-learn's."""

import numpy as np
import pytest
from scipy.sparse import csr_matrix
from sklearn.linear_model import ElasticNet
from sklearn.model_selection import KFold

import mirrorflow as mf
from linear_models import check_display, check_sharing

FEW = {"log_As": (-6.0,), "ts": 4, "ridges": (), "cv": KFold(4)}
PENALTIES = np.geomspace(1.0, 1e-2, 18)[1:]


def noisy(n=30, d=60, seed=0, noise=2.0):
    """Return a problem of which a third of the coefficients matter, and weights."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, d)) + 2.0
    y = X[:, : d // 3].sum(axis=1) / 2 + noise * rng.standard_normal(n)
    return X, y, rng.uniform(0.5, 2.0, n)


def reference(X, y, v, penalty, ratio, center=True, positive=False):
    """Return scikit-learn's elastic net in the units as they are.

    For X and y of unit scale it is alpha (r |x|_1 + (1 - r) |x|^2 / 2) with alpha relative to
    max |X^T v y| / r.
    """
    Z, t = (M - center * (v @ M) for M in (X, y))
    units = np.sqrt((v @ Z**2).mean()), np.sqrt(v @ t**2)
    one = penalty * np.abs(Z.T @ (v * t)).max()
    # x' = x s_X / s_y: |x'|^2 / 2 beside |x'|_1 is s_X / s_y times |x|^2 / 2 beside |x|_1.
    two = one * (1 - ratio) / ratio * units[0] / units[1]
    options = {"fit_intercept": center, "positive": positive, "tol": 1e-13, "max_iter": 10**6}
    return ElasticNet(one + two, l1_ratio=one / (one + two), **options)


def mixture(X, y, ratio):
    """Return the l1 ratio in the units of X and y, without weights."""
    net = reference(X, y, np.full(len(y), 1 / len(y)), 0.1, ratio)
    return net.l1_ratio


@pytest.mark.filterwarnings("ignore:the error is still falling")  # the flow's
@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize(("n", "d"), [(30, 60), (300, 12)])
def test_errors_and_fit_are_those_of_elastic_nets(n, d, center, positive):
    X, y, weights = noisy(n, d, noise=4.0)
    alike = {"center": center, "positive": positive}
    options = {"fit_intercept": center, "positive": positive, "l1_ratios": (0.3, 0.8), "tol": 1e-6}
    model = mf.MirrorFlowRegressorCV(**FEW, **options).fit(X, y, sample_weight=weights)
    v = weights / weights.sum()
    assert model.net_mse_.shape == (2, 17, 4)
    for i, j in np.ndindex(2, 3):
        net = reference(X, y, v, PENALTIES[8 * j], model.l1_ratios_[i], **alike)
        for f, (train, test) in enumerate(KFold(4).split(X)):
            net.fit(X[train], y[train], weights[train])
            error = np.average((net.predict(X[test]) - y[test]) ** 2, weights=weights[test])
            assert model.net_mse_[i, 8 * j, f] == pytest.approx(error, rel=5e-3)
    if model.best_kind_ == "elastic net":
        ratio, penalty = model.best_net_
        net = reference(X, y, v, penalty, ratio, **alike).fit(X, y, weights)
        np.testing.assert_allclose(model.coef_, net.coef_, atol=1e-6)
        np.testing.assert_allclose(model.predict(X), net.predict(X), atol=1e-6)
        np.testing.assert_array_equal(model.coef_path_[:, -1], model.coef_)


def test_an_elastic_net_is_taken_where_no_flow_is_clearly_better():
    kinds = []
    for seed in range(8):
        X, y, _ = noisy(seed=seed, noise=4.0 * (seed % 2))
        model = mf.MirrorFlowRegressorCV(**FEW).fit(X, y)
        rows = np.vstack([model.zero_mse_path_, model.intercept_mse_])
        nets = model.net_mse_.reshape(-1, 4)
        best, net = (e[e.mean(1).argmin()] for e in (rows, nets))
        worse = net - best
        near = worse.mean() <= 0.5 * worse.std() / np.sqrt(4)
        better = net.mean() < model.intercept_mse_.mean()
        assert (model.best_kind_ == "elastic net") == (near and better)
        kinds.append(model.best_kind_)
    assert len(set(kinds)) > 1


def test_what_an_elastic_net_leaves_is_certified():
    X, y, _ = noisy(seed=4)
    model = mf.MirrorFlowRegressorCV(**FEW, l1_ratios=(0.5,)).fit(X, y)
    assert model.best_kind_ == "elastic net"
    ratio, penalty = model.best_net_
    assert ratio == 0.5 and np.abs(PENALTIES / penalty - 1).min() < 1e-12
    assert (
        model.best_log_A_ == model.best_t_ == model.log_A_ == np.inf and model.best_ridge_ is None
    )
    # X^T nu is the slope of r |x|_1 + (1 - r) |x|^2 / 2 on the support, and within r off it.
    mu, x, r = X.T @ model.dual_coef_, model.coef_, mixture(X, y, ratio)
    slope = r * np.sign(x) + (1 - r) * x
    np.testing.assert_allclose(mu[x != 0], slope[x != 0], atol=1e-6)
    assert np.abs(mu[x == 0]).max() <= r + 1e-6
    assert model.kkt_residual_ < 1e-6 and 0 < model.gap_ < 1
    np.testing.assert_array_equal(model.support_, x != 0)
    assert ((model.selection_frequency_ >= 0) & (model.selection_frequency_ <= 1)).all()
    assert model.selection_frequency_[x != 0].mean() > model.selection_frequency_[x == 0].mean()


@pytest.mark.parametrize("positive", [False, True])
def test_the_units_of_the_data_do_not_matter(positive):
    X, y, _ = noisy(seed=4, noise=4.0)
    model = mf.MirrorFlowRegressorCV(**FEW, positive=positive).fit(X, y)
    assert model.best_kind_ == "elastic net"
    for b, c in ((1.0, 1e-9), (1e6, 1.0), (1e-3, 1e4)):
        other = mf.MirrorFlowRegressorCV(**FEW, positive=positive).fit(b * X, c * y)
        assert other.best_net_ == model.best_net_
        np.testing.assert_allclose(other.net_mse_ / c**2, model.net_mse_, rtol=1e-6)
        size = np.abs(model.coef_).max()
        np.testing.assert_allclose(other.coef_ * b / c, model.coef_, atol=1e-6 * size)
    both = mf.MirrorFlowRegressorCV(**FEW, positive=positive).fit(X, np.c_[y, 2 * y])
    np.testing.assert_allclose(both.coef_[1], 2 * both.coef_[0], atol=1e-6)


def test_a_sparse_matrix_and_several_targets_are_the_same_problem():
    X, y, weights = noisy(seed=4, noise=4.0)
    X = X * (np.random.default_rng(1).random(X.shape) < 0.5)
    Y = np.c_[y, y[::-1]]
    for options in ({}, {"standardize": True}, {"fit_intercept": False}, {"positive": True}):
        dense, sparse = (
            mf.MirrorFlowRegressorCV(**FEW, **options).fit(M, Y, sample_weight=weights)
            for M in (X, csr_matrix(X))
        )
        np.testing.assert_allclose(sparse.net_mse_, dense.net_mse_, rtol=1e-4)
        assert dense.best_kind_ == sparse.best_kind_
        np.testing.assert_allclose(sparse.coef_, dense.coef_, atol=1e-6)
        assert dense.selection_frequency_.shape == dense.coef_.shape == (2, 60)


def test_the_way_the_work_is_shared_out_changes_no_bit_of_an_elastic_net():
    X, y, _ = noisy(seed=4, noise=4.0)
    check_sharing(mf.MirrorFlowRegressorCV(**FEW), X, y, "elastic net", "net_mse_")


def test_elastic_nets_are_left_out_where_they_are_not_what_was_asked_for():
    X, y, _ = noisy(seed=4, noise=4.0)
    for options in ({"l1_ratios": ()}, {"decay": mf.TurnOff(1.0, 0.2)}, {"criterion": "ebic"}):
        model = mf.MirrorFlowRegressorCV(**{**FEW, **options}).fit(X, y)
        assert model.best_kind_ != "elastic net" and model.best_net_ is None
        assert model.net_mse_.shape[0] == 0
    for wrong in ([0.0], [1.0], [[0.5]], [np.nan]):
        with pytest.raises(ValueError, match="l1_ratios must be > 0 and < 1"):
            mf.MirrorFlowRegressorCV(l1_ratios=wrong).fit(X, y)
    with pytest.raises(ValueError, match=r"l1_ratios must be \(\) with decay or a criterion"):
        mf.MirrorFlowRegressorCV(l1_ratios=[0.5], criterion="bic").fit(X, y)


def test_data_without_noise_keep_the_zeros_of_a_flow():
    X = np.random.default_rng(0).standard_normal((40, 20))
    model = mf.MirrorFlowRegressorCV(ridges=()).fit(X, X[:, 0] + X[:, 1])
    assert model.best_kind_ == "flow" and model.best_net_ is None
    np.testing.assert_array_equal(np.flatnonzero(model.coef_), [0, 1])


def test_a_constant_target_has_no_coefficients():
    X, y, _ = noisy()
    model = mf.MirrorFlowRegressorCV(**FEW).fit(X, np.c_[y, np.full(len(y), 3.0)])
    assert not model.coef_[1].any() and model.intercept_[1] == pytest.approx(3.0)


def test_a_display_shows_an_elastic_net_as_a_line():
    X, y, _ = noisy(seed=4, noise=4.0)
    check_display(mf.MirrorFlowRegressorCV(**FEW).fit(X, y), "elastic net", "net_mse_")
