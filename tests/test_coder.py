"""The coder: scikit-learn's conventions, literal descent, and what codes it finds."""

import warnings
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls
from sklearn.decomposition import SparseCoder
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.linear_model import LinearRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import mirrorflow as mf
from mirrorflow.estimator._codes import codes

pd = pytest.importorskip("pandas")  # which the lowest versions are tested without


class AnyWidth(mf.MirrorFlowCoder):
    """The checks feed signals of many widths, a dictionary has one: this one's grows with them."""

    def _atoms(self, X):
        rng = np.random.default_rng(0)
        wide = rng.standard_normal((len(self.dictionary), 1000))[:, : X.shape[1]]
        whole = mf.MirrorFlowCoder(wide / np.linalg.norm(wide, axis=1)[:, None])
        return whole._atoms(X)

    def inverse_transform(self, X):
        raise NotImplementedError


@parametrize_with_checks([
    AnyWidth(np.eye(4)),
    AnyWidth(np.eye(4), n_steps=20, beta=1.0, learning_rate=1e-3),
    AnyWidth(np.eye(4), n_steps=20, beta=1.0, learning_rate=1e-5, form="log"),
])  # fmt: skip
@pytest.mark.sample(60)
def test_scikit_learns_conventions(estimator, check):
    name = check.func.__name__
    if name == "check_fit2d_1feature":
        pytest.skip("an atom of one feature is what it asks about; AnyWidth has it")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(estimator)


def dictionary(atoms=12, features=8, seed=0):
    D = np.random.default_rng(seed).standard_normal((atoms, features))
    return D / np.linalg.norm(D, axis=1, keepdims=True)


@pytest.mark.parametrize(("form", "k"), [("power", 1), ("power", 3), ("log", 1)])
@pytest.mark.parametrize("off", [np.inf, 4])
def test_the_steps_are_gradient_descent_on_u_and_v(form, k, off):
    D, alpha, step = dictionary(), 0.05, 0.01
    X = np.random.default_rng(1).standard_normal((5, 8))
    start = np.random.default_rng(2).standard_normal((5, 12))
    ours = [z for _, z in zip(range(11), codes(X, D, form, k, alpha, 0.7, start, step, off),
                              strict=False)]  # fmt: skip
    np.testing.assert_allclose(ours[0], start, atol=1e-12)
    g, h = (mf.PowerDifference(k) if form == "power" else mf.LogRatio()), mf.Separable()
    if form == "power":
        root = np.sqrt(start**2 + 0.7**2)
        w = [((root + s * start) / 2) ** (1 / (2 * k)) for s in (1, -1)]
    else:
        w = [1 / (0.7 * (1 + np.exp(-s * start))) for s in (1, -1)]
    w = [torch.tensor(v, requires_grad=True) for v in w]
    Xt, Dt = torch.from_numpy(X), torch.from_numpy(D)
    for count in range(10):
        z = g(tuple(w))
        np.testing.assert_allclose(ours[count], z.detach().numpy(), rtol=1e-9, atol=1e-12)
        rate = alpha if count < off else 0.0
        loss = 0.5 * (Xt - z @ Dt).square().sum() + rate * h.value(tuple(w), g)
        gradients = torch.autograd.grad(loss, w)
        with torch.no_grad():
            for v, gradient in zip(w, gradients, strict=True):
                v -= step * gradient


def test_codes_of_the_power_are_those_of_the_lasso():
    """For k = 1 and a small start the rest point of the decay is the lasso's."""
    D = dictionary(6, 8)
    X = np.random.default_rng(3).standard_normal((4, 8))
    ours = mf.MirrorFlowCoder(D, alpha=0.2, beta=1e-3, tol=1e-6).transform(X)
    theirs = SparseCoder(
        D, transform_algorithm="lasso_cd", transform_alpha=0.2, transform_max_iter=100_000
    ).transform(X)
    np.testing.assert_allclose(ours, theirs, atol=2e-3)


def test_switching_off_removes_the_shrinkage():
    D = dictionary(6, 8)
    truth = np.zeros((1, 6))
    truth[0, 2] = 3.0
    options = {"alpha": 0.3, "beta": 1e-3, "n_steps": 6000, "tol": 1e-5}
    kept = mf.MirrorFlowCoder(D, **options).transform(truth @ D)
    off = mf.MirrorFlowCoder(D, switch_off=3000, **options).transform(truth @ D)
    assert np.abs(off - truth).max() < 1e-3 < 0.1 < np.abs(kept - truth).max()


def signals(kind, count=10, features=64, seed=5):
    rng = np.random.default_rng(seed)
    if kind == "sparse":
        z = rng.standard_normal((count, 100)) * (rng.random((count, 100)) < 0.08)
        return z @ dictionary(100, features) + 0.05 * rng.standard_normal((count, features))
    return (
        rng.standard_normal((count, features))
        if kind == "normal"
        else rng.random((count, features))
    )


def lasso(D, X, alpha):
    """scikit-learn's codes."""
    return SparseCoder(
        D, transform_algorithm="lasso_cd", transform_alpha=alpha, transform_max_iter=100_000
    ).transform(X)


def objective(z, D, X, alpha):
    return 0.5 * ((X - z @ D) ** 2).sum(axis=1) + alpha * np.abs(z).sum(axis=1)


@pytest.mark.parametrize(
    ("kind", "alpha"),
    [("sparse", 0.01), ("sparse", 0.1), ("uniform", 0.01), ("uniform", 0.1), ("normal", 0.1)],
)
@pytest.mark.sample(2)
def test_the_default_reaches_the_objective_of_lasso_cd(kind, alpha):
    D, X = dictionary(100, 64), signals(kind)
    ours = objective(mf.MirrorFlowCoder(D, alpha=alpha).transform(X), D, X, alpha)
    theirs = objective(lasso(D, X, alpha), D, X, alpha)
    assert (ours < theirs * (1 + 1e-3)).all()
    assert (ours > theirs * (1 - 1e-6)).all()  # else the oracle is off


@pytest.mark.parametrize("size", [1, 16, 255])
@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.sample(4)
def test_the_default_diverges_for_no_size_and_power(size, k):
    """u^{2k} + v^{2k} >= |z|: for every k the least value is the lasso's."""
    D, X = dictionary(30, 64), size * signals("uniform")
    ours = mf.MirrorFlowCoder(D, k=k).transform(X)
    least = objective(lasso(D, X, 0.1), D, X, 0.1)
    assert (objective(ours, D, X, 0.1) < least * (1 + 1e-3)).all()


@pytest.mark.parametrize("k", [2, 3, 4, 5])
def test_more_atoms_than_features_do_not_make_it_diverge(k):
    D, X, alpha = dictionary(12, 8), signals("normal", features=8), 0.05
    ours = mf.MirrorFlowCoder(D, k=k, alpha=alpha).transform(X)
    least = objective(lasso(D, X, alpha), D, X, alpha)
    assert (objective(ours, D, X, alpha) < least * (1 + 1e-3)).all()


@pytest.mark.parametrize(
    "options", [{}, {"k": 2}, {"switch_off": 200}, {"form": "log", "alpha": 0.0}]
)
def test_no_signal_knows_of_the_others(options):
    """Each is coded row by row, as if alone, whenever the others settle."""
    top = 1.0 if "form" in options else 1e2  # the codes of log u - log v are exponents
    low = 1.0 if "switch_off" in options else 1e-2  # what decay has brought to 0 comes back late
    X = signals("normal", features=8) * np.geomspace(low, top, 10)[:, None]
    D, alpha = dictionary(6, 8), 0.0 if len(options) > 1 or "switch_off" in options else 0.1
    coder = mf.MirrorFlowCoder(D, **options)
    whole, beside = coder.transform(X), X[::-1].copy()
    beside[1::2] = X[1::2]
    np.testing.assert_array_equal(coder.transform(beside)[1::2], whole[1::2])
    alone = np.vstack([coder.transform(x[None]) for x in X])
    reached = objective(whole, D, X, alpha)
    np.testing.assert_allclose(objective(alone, D, X, alpha), reached, rtol=2e-3)


@given(
    c=st.floats(1e-9, 1e9), d=st.floats(1e-3, 1e3), k=st.integers(1, 3),
    off=st.sampled_from([None, 300]), seed=st.integers(0, 100),
)  # fmt: skip
@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@pytest.mark.slow
def test_codes_have_the_units_of_signals_over_atoms(c, d, k, off, seed):
    D, X = dictionary(6, 8, seed), signals("normal", 3, 8, seed)
    options = {"k": k, "switch_off": off, "tol": 1e-7, "n_steps": 100_000}
    plain = mf.MirrorFlowCoder(D, alpha=0.1, start=0.2, **options).transform(X)
    other = mf.MirrorFlowCoder(d * D, alpha=0.1 * c * d, start=0.2 * c / d, **options)
    scaled = other.transform(c * X) * d / c
    np.testing.assert_allclose(scaled, plain, atol=2e-3 * np.abs(plain).max())


def test_a_change_of_units_by_a_power_of_two_rounds_nothing():
    D, X = dictionary(), signals("normal", features=8)
    for c in (2.0**-20, 2.0**20):
        scaled = mf.MirrorFlowCoder(D, alpha=0.1 * c).transform(c * X)
        plain = mf.MirrorFlowCoder(D, alpha=0.1).transform(X)
        np.testing.assert_allclose(scaled, c * plain, rtol=1e-9)


def test_beta_is_in_units_of_the_largest_code_of_one_atom():
    D, X = dictionary() * 3, signals("normal", features=8)
    size = np.array([max(abs(x @ d) / (d @ d) for d in D) for x in X])
    ours = mf.MirrorFlowCoder(D, beta=0.2, learning_rate=1e-2, n_steps=10, zero_tol=0)
    for x, s, z in zip(X, size, ours.transform(X), strict=True):
        path = codes(x[None], D, "power", 1, 0.1, 0.2 * s, 0.0, 1e-2 / np.linalg.norm(D, 2) ** 2)
        np.testing.assert_allclose(z, list(islice(path, 11))[-1][0], rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"n_steps": 5}, "within n_steps=5 .* for 5 of 5 signals. Increase n_steps"),
        ({"n_steps": 0}, "n_steps=0 .* Increase n_steps"),
        ({"switch_off": 10, "n_steps": 12}, "n_steps=12"),
    ],
)
def test_what_has_not_settled_warns(options, said):
    coder = mf.MirrorFlowCoder(dictionary(), **options)
    with pytest.warns(ConvergenceWarning, match=said):
        z = coder.transform(signals("normal", 5, 8))
    assert np.isfinite(z).all()


@pytest.mark.parametrize("options", [{}, {"k": 3}, {"form": "log", "alpha": 0.0}])
def test_training_starts_at_start(options):
    D, X = dictionary() * 3, signals("normal", 5, 8)
    start = np.random.default_rng(2).standard_normal((5, 12))
    coder = mf.MirrorFlowCoder(D, start=start, n_steps=0, zero_tol=0, **options)
    with pytest.warns(ConvergenceWarning):
        np.testing.assert_allclose(coder.transform(X), start, atol=1e-12)


def test_only_the_signals_that_have_not_settled_are_counted():
    X = signals("normal", 3, 8)
    X[1] = 0
    with pytest.warns(ConvergenceWarning, match="2 of 3 signals"):
        mf.MirrorFlowCoder(dictionary(), n_steps=5).transform(X)


@pytest.mark.parametrize("start", [0.0, 0.5])
@pytest.mark.parametrize("alpha", [0.0, 0.1])
def test_a_signal_that_is_0_has_codes_near_0(start, alpha):
    D = dictionary(6, 8)
    z = mf.MirrorFlowCoder(D, start=start, alpha=alpha).transform(np.zeros((1, 8)))
    assert np.abs(z).max() <= (0.05 if start else 0)


def test_from_the_largest_force_on_all_codes_are_0():
    D, X = dictionary(), signals("normal", 4, 8)
    top = np.abs(X @ D.T).max()
    assert not mf.MirrorFlowCoder(D, alpha=1.001 * top).transform(X).any()
    assert mf.MirrorFlowCoder(D, alpha=0.9 * top).transform(X).any()


@pytest.mark.parametrize(("form", "k"), [("power", 1), ("power", 3), ("log", 1)])
def test_without_a_penalty_codes_are_those_of_least_squares(form, k):
    D, X = dictionary(6, 8), signals("normal", 4, 8)
    z = mf.MirrorFlowCoder(D, form=form, k=k, alpha=0, tol=1e-5).transform(X)
    fitted = np.linalg.lstsq(D.T, X.T)[0].T
    np.testing.assert_allclose(z, fitted, atol=3e-3 * np.abs(fitted).max())


def test_small_codes_are_exactly_0_and_the_others_left():
    D, X = dictionary(100, 64), signals("normal")
    raw = mf.MirrorFlowCoder(D, alpha=0.1, zero_tol=0).transform(X)
    assert (raw != 0).mean() > 0.99
    for coder, zero_tol in (
        (mf.MirrorFlowCoder(D, alpha=0.1), 1e-3),
        (mf.MirrorFlowCoder(D, alpha=0.1, zero_tol=0.1), 0.1),
    ):
        z = coder.transform(X)
        for before, after in zip(raw, z, strict=True):
            kept = abs(before) >= zero_tol * max(abs(before))
            np.testing.assert_array_equal(after != 0, kept)
            np.testing.assert_allclose(after, kept * before, rtol=1e-9)
    zeros = (mf.MirrorFlowCoder(D, alpha=0.1).transform(X) == 0).mean()
    assert abs(zeros - (lasso(D, X, 0.1) == 0).mean()) < 0.03


def test_it_is_used_like_sparse_coder():
    D = dictionary()
    X = np.random.default_rng(0).standard_normal((5, 8)).astype(np.float32)
    coder = mf.MirrorFlowCoder(D, alpha=0.1)
    z = make_pipeline(StandardScaler(), coder).fit_transform(X)
    assert z.shape == (5, 12) and z.dtype == np.float32
    coder.fit(X)
    assert coder.n_components_ == SparseCoder(D).fit(X).n_components_
    assert list(coder.get_feature_names_out()[:2]) == ["mirrorflowcoder0", "mirrorflowcoder1"]
    back = coder.inverse_transform(z)
    assert back.dtype == np.float32
    np.testing.assert_allclose(back, z @ D, rtol=1e-4, atol=1e-6)
    double = coder.transform(X.astype(np.float64))
    np.testing.assert_allclose(coder.transform(X), double, atol=1e-2 * np.abs(double).max())


def test_it_gives_frames_in_a_pipeline():
    D, X = dictionary(), pd.DataFrame(signals("normal", 5, 8), index=list("abcde"))
    X.columns = [f"pixel{i}" for i in range(8)]
    coder = mf.MirrorFlowCoder(D, alpha=0.1)
    z = make_pipeline(StandardScaler(), coder).set_output(transform="pandas").fit_transform(X)
    assert list(z.columns) == [f"mirrorflowcoder{i}" for i in range(12)]
    assert list(z.index) == list("abcde")
    expected = mf.MirrorFlowCoder(D, alpha=0.1).transform(StandardScaler().fit_transform(X))
    np.testing.assert_allclose(z.to_numpy(), expected, atol=1e-2 * np.abs(expected).max())


def test_alpha_is_searched_where_transform_alpha_was():
    D, X = dictionary(), signals("normal", 30, 8)
    y = lasso(D, X, 0.1)[:, 0]
    pipe = make_pipeline(mf.MirrorFlowCoder(D), LinearRegression())
    search = GridSearchCV(pipe, {"mirrorflowcoder__alpha": [0.1, 3.0]}, cv=3).fit(X, y)
    assert search.best_params_ == {"mirrorflowcoder__alpha": 0.1} and search.best_score_ > 0.9


def test_what_is_not_fitted_behaves_as_sparse_coder_does():
    for coder in (SparseCoder(dictionary()), mf.MirrorFlowCoder(dictionary())):
        with pytest.raises(NotFittedError):
            coder.get_feature_names_out()
        assert coder.transform(np.ones((1, 8))).shape == (1, 12)
    assert not hasattr(mf.MirrorFlowCoder(None), "n_components_")


def test_codes_of_another_width_are_refused():
    coder = mf.MirrorFlowCoder(dictionary())
    with pytest.raises(ValueError, match="a column for each of the 12 atoms, got 5"):
        coder.inverse_transform(np.ones((2, 5)))


@pytest.mark.parametrize(
    ("change", "X"),
    [
        ({"dictionary": dictionary(12, 3)}, np.ones((2, 8))),
        ({"switch_off": 11, "n_steps": 10}, np.ones((2, 8))),
        ({}, np.ones((2, 3))),
    ],
)
def test_a_fit_that_fails_leaves_the_coder_as_it_was(change, X):
    coder = mf.MirrorFlowCoder(dictionary()).fit(np.ones((2, 8))).set_params(**change)
    before = dict(vars(coder))
    with pytest.raises(ValueError, match=r"switch_off|columns"):
        coder.fit(X)
    assert vars(coder) == before and coder.n_features_in_ == 8
    assert not hasattr(mf.MirrorFlowCoder(dictionary()), "n_features_in_")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"k": 0}, "'k'"), ({"alpha": -1.0}, "alpha"), ({"beta": 0.0}, "beta"),
        ({"form": "cube"}, "form"), ({"learning_rate": 0.0}, "learning_rate"),
        ({"start": np.nan}, "start"), ({"start": np.zeros(3)}, "start must broadcast"),
        ({"learning_rate": 50.0, "start": 3.0, "k": 3}, "lower learning_rate"),
        ({"learning_rate": 50.0, "start": 3.0, "k": 3}, "learning_rate='adaptive'"),
        ({"form": "log", "alpha": 1e3, "beta": 1.0, "learning_rate": 0.1}, "u or v has reached 0"),
        ({"form": "log", "alpha": 0.0, "start": 900.0}, "beta and start"),
        ({"beta": 1e-300}, "beta and start"),
        ({"form": "log", "alpha": 1e-3}, "learning_rate must be a number .* Use 0.1"),
        ({"learning_rate": "fast"}, "learning_rate"), ({"tol": 0.0}, "tol"),
        ({"zero_tol": 1.0}, "zero_tol"), ({"dictionary": None}, "dictionary"),
    ],
)  # fmt: skip
def test_bad_parameters_are_named(options, said):
    with pytest.raises(ValueError, match=said):
        mf.MirrorFlowCoder(**({"dictionary": dictionary()} | options)).transform(np.ones((2, 8)))


def test_bad_dictionaries_are_named():
    D = dictionary()
    with pytest.raises(ValueError, match="must have 3 columns, as X has, got 8"):
        mf.MirrorFlowCoder(D).fit(np.ones((2, 3)))
    D[4] = 0
    with pytest.raises(ValueError, match="non-zero, got row 4 = 0"):
        mf.MirrorFlowCoder(D).transform(np.ones((2, 8)))
    D[4, 0] = np.nan
    with pytest.raises(ValueError, match="dictionary contains NaN"):
        mf.MirrorFlowCoder(D).transform(np.ones((2, 8)))


@pytest.mark.parametrize("k", [1, 2])
def test_positive_codes_are_those_of_the_positive_lasso(k):
    D, X = dictionary(), signals("normal", 6, 8)
    coder = mf.MirrorFlowCoder(D, k=k, alpha=0.2, positive_code=True, tol=1e-6, zero_tol=1e-4)
    z = coder.transform(X)
    lasso_cd = {"transform_algorithm": "lasso_cd", "transform_alpha": 0.2}
    expected = SparseCoder(D, **lasso_cd, positive_code=True).transform(X)
    assert z.min() == 0 and (expected > 0).any()
    np.testing.assert_allclose(z, expected, atol=2e-3 * expected.max())


def test_positive_codes_without_decay_are_nonnegative_least_squares():
    D, X = dictionary(6, 8), signals("normal", 5, 8)
    coder = mf.MirrorFlowCoder(D, alpha=0.0, positive_code=True, tol=1e-5, zero_tol=0)
    expected = np.stack([nnls(D.T, x)[0] for x in X])
    np.testing.assert_allclose(coder.transform(X), expected, atol=1e-2 * expected.max())


def test_positive_codes_by_steps_of_one_length_keep_v_at_0():
    D, X = dictionary(), signals("normal", 4, 8)
    options = {"learning_rate": 0.1, "n_steps": 4000, "positive_code": True, "beta": 0.1}
    z = mf.MirrorFlowCoder(D, alpha=0.2, zero_tol=1e-2, **options).transform(X)
    settled = mf.MirrorFlowCoder(D, alpha=0.2, positive_code=True, zero_tol=1e-2).transform(X)
    assert z.min() == 0
    np.testing.assert_allclose(z, settled, atol=2e-2 * settled.max())


def test_the_largest_codes_are_kept():
    D, X = dictionary(), signals("normal", 6, 8)
    every = mf.MirrorFlowCoder(D, alpha=0.01).transform(X)
    few = mf.MirrorFlowCoder(D, alpha=0.01, n_nonzero=3).transform(X)
    for before, after in zip(every, few, strict=True):
        largest = np.argsort(-abs(before))[:3]
        np.testing.assert_array_equal(np.sort(np.flatnonzero(after)), np.sort(largest))
        np.testing.assert_array_equal(after[largest], before[largest])


def test_positive_codes_refuse_what_has_a_sign():
    with pytest.raises(ValueError, match="positive_code=True must go with form='power'"):
        mf.MirrorFlowCoder(dictionary(), form="log", positive_code=True).transform(np.ones((1, 8)))
    with pytest.raises(ValueError, match="start must be >= 0 with positive_code=True, got -1"):
        coder = mf.MirrorFlowCoder(dictionary(), start=-1.0, positive_code=True)
        coder.transform(np.ones((1, 8)))


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 0.1, 10.0])
def test_codes_are_0_where_no_atom_pulls_more_than_the_penalty(alpha, positive):
    signals = np.array([[-1.0, -1.0], [0.05, -2.0], [1.0, 2.0]])
    coder = mf.MirrorFlowCoder(np.eye(2), alpha=alpha, positive_code=positive, tol=1e-6)
    pulls = np.maximum(signals, 0.0) if positive else signals
    expected = np.sign(pulls) * np.maximum(np.abs(pulls) - alpha, 0.0)
    found = coder.transform(signals)
    np.testing.assert_allclose(found, expected, atol=1e-3)
    assert not found[(expected == 0).all(axis=1)].any()
