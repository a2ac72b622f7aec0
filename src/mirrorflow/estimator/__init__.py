"""scikit-learn estimators: sparse and low-rank recovery by the flow and its end points."""

from .coder import MirrorFlowCoder
from .completion import MatrixCompletion
from .cross_validation import MirrorFlowRegressorCV
from .linear import TurnOff
from .paths import MirrorFlowCVDisplay, entropy_path, flow_path
from .regressor import MirrorFlowRegressor
from .sensing import MatrixSensing

__all__ = [
    "MatrixCompletion",
    "MatrixSensing",
    "MirrorFlowCVDisplay",
    "MirrorFlowCoder",
    "MirrorFlowRegressor",
    "MirrorFlowRegressorCV",
    "TurnOff",
    "entropy_path",
    "flow_path",
]
