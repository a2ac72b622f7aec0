"""scikit-learn estimators: sparse and low-rank recovery by the flow and its end points."""

from .cross_validation import MirrorFlowRegressorCV
from .regressor import MirrorFlowRegressor, TurnOff

__all__ = ["MirrorFlowRegressor", "MirrorFlowRegressorCV", "TurnOff"]
