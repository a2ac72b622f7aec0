"""scikit-learn estimators: sparse and low-rank recovery by the flow and its end points."""

from ._base import TurnOff
from .coding import MirrorFlowCoder
from .completion import MatrixCompletion
from .completion_cv import MatrixCompletionCV
from .paths import MirrorFlowCVDisplay, entropy_path, flow_path
from .regression import MirrorFlowRegressorCV
from .regressor import MirrorFlowRegressor
from .sensing import MatrixSensing

__all__ = [
    "MatrixCompletion",
    "MatrixCompletionCV",
    "MatrixSensing",
    "MirrorFlowCVDisplay",
    "MirrorFlowCoder",
    "MirrorFlowRegressor",
    "MirrorFlowRegressorCV",
    "TurnOff",
    "entropy_path",
    "flow_path",
]
