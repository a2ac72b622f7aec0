"""The decay of the regressors: `SwitchOff`, `Constant`, and `TurnOff` as an alias."""

import pickle

import numpy as np
import pytest
from sklearn.base import clone

import mirrorflow as mf


def problem():
    rng = np.random.default_rng(0)
    X = rng.standard_normal((30, 50))
    return X, 3 * X[:, 0] - X[:, 4] + 0.1 * rng.standard_normal(30)


@pytest.mark.parametrize(
    ("one", "other"),
    [(mf.SwitchOff(1.0, at=0.5), mf.TurnOff(1.0, 0.5)),
     (mf.Constant(0.4), mf.TurnOff(0.4, np.inf))],
)  # fmt: skip
def test_schedules_and_their_former_name_give_the_same_fit(one, other):
    X, y = problem()
    for model in (mf.MirrorFlowRegressor(), mf.MirrorFlowRegressorCV((-6.0,), [2.0], cv=3)):
        fits = [clone(model).set_params(decay=decay).fit(X, y).coef_ for decay in (one, other)]
        np.testing.assert_array_equal(*fits)
    paths = [mf.flow_path(X, y, ts=[1.0, 2.0], decay=decay)[1] for decay in (one, other)]
    np.testing.assert_array_equal(*paths)


def test_turn_off_is_a_switch_off():
    decay = mf.TurnOff(alpha=0.3, t=2.0)
    assert isinstance(decay, mf.SwitchOff)
    assert decay == mf.SwitchOff(0.3, at=2.0) and mf.SwitchOff(0.3, at=2.0) == decay
    assert hash(decay) == hash(mf.SwitchOff(0.3, at=2.0))
    assert decay != mf.SwitchOff(0.3, at=1.0) and decay != 0.3
    assert (decay.alpha, decay.t) == (0.3, 2.0) and decay.integral(5.0) == pytest.approx(0.6)
    assert pickle.loads(pickle.dumps(decay)) == decay
    kept = mf.TurnOff(0.3, np.inf)
    assert kept.breakpoints == () and kept.integral(5.0) == pytest.approx(1.5)


def test_rates_below_zero_and_other_schedules_are_refused():
    X, y = problem()
    with pytest.raises(ValueError, match="rate >= 0"):
        mf.MirrorFlowRegressor(decay=mf.Constant(-1.0)).fit(X, y)
    with pytest.raises(ValueError, match="decay"):
        mf.MirrorFlowRegressor(decay=mf.Linear(1.0, 0.0, 2.0)).fit(X, y)
    with pytest.raises(ValueError, match="must be switched off"):
        mf.MirrorFlowRegressor(interpolate=True, decay=mf.Constant(1.0)).fit(X, y)
