"""The coder: scikit-learn's conventions, literal descent, and what codes it finds."""

import warnings

import numpy as np
import pytest
import torch
from sklearn.decomposition import SparseCoder
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import mirrorflow as mf
from mirrorflow.estimator.coder import codes


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
    AnyWidth(np.eye(4), n_steps=20, beta=1.0, learning_rate=1e-3),
    AnyWidth(np.eye(4), n_steps=20, beta=1.0, learning_rate=1e-5, form="log"),
])  # fmt: skip
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
    ours = mf.MirrorFlowCoder(D, alpha=0.2, beta=1e-3, n_steps=20_000).transform(X)
    theirs = SparseCoder(
        D, transform_algorithm="lasso_cd", transform_alpha=0.2, transform_max_iter=100_000
    ).transform(X)
    np.testing.assert_allclose(ours, theirs, atol=2e-3)


def test_switching_off_removes_the_shrinkage():
    D = dictionary(6, 8)
    truth = np.zeros((1, 6))
    truth[0, 2] = 3.0
    options = {"alpha": 0.3, "beta": 1e-3, "n_steps": 6000}
    kept = mf.MirrorFlowCoder(D, **options).transform(truth @ D)
    off = mf.MirrorFlowCoder(D, switch_off=3000, **options).transform(truth @ D)
    assert np.abs(off - truth).max() < 1e-3 < 0.1 < np.abs(kept - truth).max()


def test_it_is_used_like_sparse_coder():
    D = dictionary()
    X = np.random.default_rng(0).standard_normal((5, 8)).astype(np.float32)
    coder = mf.MirrorFlowCoder(D)
    z = make_pipeline(StandardScaler(), coder).fit_transform(X)
    assert z.shape == (5, 12) and z.dtype == np.float32
    coder.fit(X)
    assert coder.n_components_ == SparseCoder(D).fit(X).n_components_
    assert list(coder.get_feature_names_out()[:2]) == ["mirrorflowcoder0", "mirrorflowcoder1"]
    np.testing.assert_allclose(coder.inverse_transform(z), z @ D, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"k": 0}, "'k'"), ({"alpha": -1.0}, "alpha"), ({"beta": 0.0}, "beta"),
        ({"form": "cube"}, "form"), ({"learning_rate": 0.0}, "learning_rate"),
        ({"start": np.nan}, "start"), ({"start": np.zeros(3)}, "start must broadcast"),
        ({"learning_rate": 50.0, "start": 3.0, "k": 3}, "lower learning_rate"),
        ({"form": "log", "alpha": 1e3, "beta": 1.0}, "u or v has reached 0"),
    ],
)  # fmt: skip
def test_bad_parameters_are_named(options, said):
    with pytest.raises(ValueError, match=said):
        mf.MirrorFlowCoder(dictionary(), **options).transform(np.ones((2, 8)))


def test_bad_dictionaries_are_named():
    D = dictionary()
    with pytest.raises(ValueError, match="have 8 features, X has 3"):
        mf.MirrorFlowCoder(D).fit(np.ones((2, 3)))
    D[4] = 0
    with pytest.raises(ValueError, match="an atom that is 0"):
        mf.MirrorFlowCoder(D).transform(np.ones((2, 8)))
    D[4, 0] = np.nan
    with pytest.raises(ValueError, match="dictionary contains NaN"):
        mf.MirrorFlowCoder(D).transform(np.ones((2, 8)))
