"""Checks that ridge regression and elastic nets share, as candidates of the cross-validation."""

import joblib
import numpy as np
import pytest
from sklearn.base import clone

import mirrorflow as mf


def check_sharing(model, X, y, kind, errors):
    """The way in which the work is shared out changes no bit of what is chosen."""
    alone = clone(model).fit(X, y)
    with joblib.parallel_config("threading", n_jobs=2):
        shared = clone(model).fit(X, y)
    assert alone.best_kind_ == kind
    np.testing.assert_array_equal(getattr(shared, errors), getattr(alone, errors))
    np.testing.assert_array_equal(shared.coef_, alone.coef_)


def check_display(model, kind, errors):
    """The display shows the least error as a line, and refuses the path, which is of no flow."""
    pytest.importorskip("matplotlib")
    assert model.best_kind_ == kind
    display = mf.MirrorFlowCVDisplay.from_estimator(model)
    line = [line for line in display.ax_.get_lines() if line.get_label() == f"{kind}, chosen"]
    assert line[0].get_ydata()[0] == pytest.approx(getattr(model, errors).mean(axis=-1).min())
    with pytest.raises(ValueError, match="the path must be of a flow"):
        mf.MirrorFlowCVDisplay.from_estimator(model, kind="path")
