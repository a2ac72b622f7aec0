"""scikit-learn estimators: sparse and low-rank recovery by the flow and its end points."""

from .coder import MirrorFlowCoder
from .cross_validation import MirrorFlowRegressorCV
from .regressor import MirrorFlowRegressor, TurnOff

__all__ = ["MirrorFlowCoder", "MirrorFlowRegressor", "MirrorFlowRegressorCV", "TurnOff"]
