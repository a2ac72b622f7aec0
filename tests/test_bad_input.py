"""What the estimators do with bad or degenerate input: a clear error, or the right answer."""

import numpy as np
import pandas as pd
import pytest

import mirrorflow as mf

rng = np.random.default_rng(0)
X = rng.standard_normal((20, 8))
Y = 2 * X[:, 0] + 1
NAN, ZERO = X.copy(), X.copy()
NAN[0, 0], ZERO[:, 2] = np.nan, 0.0
ATOMS = rng.standard_normal((5, 8))
PLAIN = {
    "MirrorFlowRegressor": lambda: mf.MirrorFlowRegressor(),
    "interpolating": lambda: mf.MirrorFlowRegressor(interpolate=True),
    "positive": lambda: mf.MirrorFlowRegressor(positive=True),
    "MirrorFlowRegressorCV": lambda: mf.MirrorFlowRegressorCV(cv=3),
    "kept decay": lambda: mf.MirrorFlowRegressorCV(cv=3, shrinkages=(0.01,)),
}


@pytest.fixture(params=list(PLAIN))
def regressor(request):
    return PLAIN[request.param]()


def test_a_constant_target_is_the_intercept(regressor):
    model = regressor.fit(X, np.full(20, 3.0))
    assert model.intercept_ == pytest.approx(3) and not model.coef_.any()


def test_a_column_of_zeros_gets_nothing_and_disturbs_nothing(regressor):
    model = regressor.fit(ZERO, Y)
    assert model.coef_[2] == 0 and model.score(ZERO, Y) > 0.9
    assert np.isfinite(model.coef_).all()


def test_only_zeros_leave_the_mean(regressor):
    model = regressor.fit(np.zeros_like(X), Y)
    assert not model.coef_.any() and model.intercept_ == pytest.approx(Y.mean())


def test_one_column_is_enough(regressor):
    model = regressor.fit(X[:, :1], Y)
    assert model.coef_[0] == pytest.approx(2, rel=0.01)


@pytest.mark.parametrize("name", ["MirrorFlowRegressor", "interpolating", "positive"])
def test_one_sample_is_its_own_mean(name):
    model = PLAIN[name]().fit(X[:1], Y[:1])
    assert not model.coef_.any() and model.predict(X[:1]) == pytest.approx(Y[:1])


def test_one_sample_cannot_be_split():
    with pytest.raises(ValueError, match="n_splits=3 greater than the number of samples"):
        PLAIN["MirrorFlowRegressorCV"]().fit(X[:1], Y[:1])


@pytest.mark.parametrize(
    ("data", "target", "message"),
    [
        (NAN, Y, "X contains NaN"),
        (np.where(np.isnan(NAN), np.inf, NAN), Y, "X contains infinity"),
        (X, np.r_[np.nan, Y[1:]], "y contains NaN"),
        (X, np.r_[np.inf, Y[1:]], "y contains infinity"),
        (X, Y[:5], "inconsistent numbers of samples"),
        (pd.DataFrame(X[:0]), Y[:0], r"0 sample\(s\)"),
        (X[:, :0], Y, r"0 feature\(s\)"),
        (X[:, 0], Y, "Expected 2D array"),
        (np.full((20, 2), "word"), Y, "could not convert|numeric"),
    ],
)
def test_what_cannot_be_fitted_is_named(regressor, data, target, message):
    with pytest.raises(ValueError, match=message):
        regressor.fit(data, target)


def test_integers_read_only_and_fortran_ordered_arrays_are_taken(regressor):
    whole, target = (10 * X).astype(int), (10 * Y).astype(int)
    expected = regressor.fit(whole.astype(float), target.astype(float)).coef_
    np.testing.assert_allclose(regressor.fit(whole, target).coef_, expected, rtol=1e-6, atol=1e-8)
    other = np.asfortranarray(whole.astype(float))
    other.flags.writeable = target.flags.writeable = False
    before = other.copy()
    np.testing.assert_allclose(regressor.fit(other, target).coef_, expected, rtol=1e-6, atol=1e-8)
    np.testing.assert_array_equal(other, before)


@pytest.mark.parametrize(("alpha", "t", "message"), [(-1.0, 5.0, "alpha"), (1.0, -5.0, "t must")])
def test_a_decay_below_zero_and_a_time_before_the_start_are_refused(alpha, t, message):
    with pytest.raises(ValueError, match=message):
        mf.TurnOff(alpha, t)


def test_a_decay_that_ends_after_the_training_is_refused():
    with pytest.raises(ValueError, match="switch_off"):
        mf.MirrorFlowCoder(ATOMS, n_steps=10, switch_off=11).fit(X).transform(X)


@pytest.mark.parametrize(
    ("coder", "data", "message"),
    [
        (
            lambda: mf.MirrorFlowCoder(ATOMS * [[1], [0], [1], [1], [1]]),
            X,
            "non-zero, got row 1 = 0",
        ),
        (lambda: mf.MirrorFlowCoder(ATOMS[:, :3]), X, "must have 8 columns, as X has, got 3"),
        (lambda: mf.MirrorFlowCoder(ATOMS, alpha=-1.0), X, "'alpha' parameter"),
        (lambda: mf.MirrorFlowCoder(ATOMS), NAN, "X contains NaN"),
        (lambda: mf.MirrorFlowCoder(ATOMS), X[:0], r"0 sample\(s\)"),
        (lambda: mf.MirrorFlowCoder(ATOMS * np.nan), X, "NaN"),
    ],
)
def test_what_cannot_be_coded_is_named(coder, data, message):
    with pytest.raises(ValueError, match=message):
        coder().fit(data).transform(data)


def test_a_matrix_smaller_than_ten_has_a_rank_that_fits():
    M = np.outer(np.arange(1.0, 7), np.arange(1.0, 6))
    seen = M.copy()
    seen[0, 0] = seen[3, 2] = np.nan
    model = mf.MatrixSensing().fit(seen)
    assert model.rank_ == 1
    np.testing.assert_allclose(model.matrix(), M, rtol=1e-3)
    with pytest.raises(ValueError, match=r"max_rank must be at most . for X"):
        mf.MatrixSensing(9).fit(seen)


def test_a_matrix_of_which_nothing_is_known_is_refused():
    with pytest.raises(ValueError, match="Mark only unknown entries"):
        mf.MatrixSensing().fit(np.full((4, 5), np.nan))


@pytest.mark.parametrize("name", list(PLAIN))
def test_an_interrupted_fit_leaves_the_estimator_as_it_was(name, monkeypatch):
    """What is half fitted would look fitted."""
    model = PLAIN[name]().fit(X, Y)
    before = {key: np.copy(v) for key, v in vars(model).items() if key.endswith("_")}

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    # Data and settings have been read by then, and in part been set.
    for step in ("kkt", "ridge_dual", "net_dual"):  # one of them is taken
        monkeypatch.setattr(f"mirrorflow.estimator._base.{step}", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.fit(X[:, :4], X[:, 0])
    for key, value in before.items():
        np.testing.assert_array_equal(getattr(model, key), value)
    assert model.predict(X).shape == (20,)
