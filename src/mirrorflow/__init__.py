"""What weight decay does to a model, and when to switch it off: the public names.

Names are imported on first use, so that ``mirrorflow --help`` does not wait for torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .conditions import Report as Report
    from .conditions import check as check
    from .descent import descend as descend
    from .estimator import MatrixCompletion as MatrixCompletion
    from .estimator import MatrixSensing as MatrixSensing
    from .estimator import MirrorFlowCoder as MirrorFlowCoder
    from .estimator import MirrorFlowCVDisplay as MirrorFlowCVDisplay
    from .estimator import MirrorFlowRegressor as MirrorFlowRegressor
    from .estimator import MirrorFlowRegressorCV as MirrorFlowRegressorCV
    from .estimator import TurnOff as TurnOff
    from .estimator import entropy_path as entropy_path
    from .estimator import flow_path as flow_path
    from .flow import flow as flow
    from .legendre import IncompatiblePair as IncompatiblePair
    from .legendre import LegendreFunction as LegendreFunction
    from .legendre import RangeError as RangeError
    from .legendre import legendre as legendre
    from .limit import limit as limit
    from .loss import LeastSquares as LeastSquares
    from .regularizer import CustomRegularizer as CustomRegularizer
    from .regularizer import Regularizer as Regularizer
    from .regularizer import Separable as Separable
    from .regularizer import WeightDecay as WeightDecay
    from .reparam import CommutingQuadratic as CommutingQuadratic
    from .reparam import CustomReparam as CustomReparam
    from .reparam import Depth as Depth
    from .reparam import Hadamard as Hadamard
    from .reparam import Identity as Identity
    from .reparam import LogRatio as LogRatio
    from .reparam import PowerDifference as PowerDifference
    from .reparam import Product as Product
    from .reparam import Reparam as Reparam
    from .reparam import SymmetricFactor as SymmetricFactor
    from .schedule import Constant as Constant
    from .schedule import Cosine as Cosine
    from .schedule import Cyclic as Cyclic
    from .schedule import Linear as Linear
    from .schedule import Piecewise as Piecewise
    from .schedule import Schedule as Schedule
    from .schedule import SwitchOff as SwitchOff
    from .schedule import join as join
    from .schedule import schedule_from_dict as schedule_from_dict
    from .schedule import schedule_to_dict as schedule_to_dict
    from .solution import Path as Path
    from .solution import Solution as Solution
    from .solution import Status as Status
    from .spectrum import ProductSpectrum as ProductSpectrum
    from .spectrum import SpectralTracker as SpectralTracker
    from .spectrum import audit as audit
    from .spectrum import product_spectrum as product_spectrum
    from .weightdecay import HoldRatio as HoldRatio
    from .weightdecay import OffAtBudget as OffAtBudget
    from .weightdecay import OffBelow as OffBelow
    from .weightdecay import OffWhenLevel as OffWhenLevel
    from .weightdecay import PerLayer as PerLayer
    from .weightdecay import WeightDecayLR as WeightDecayLR
    from .weightdecay import WeightDecayScheduler as WeightDecayScheduler
    from .weightdecay import WeightDecaySchedulers as WeightDecaySchedulers
    from .weightdecay import lint as lint
    from .weightdecay import preview as preview
    from .weightdecay import scale_to_budget as scale_to_budget

__version__ = "0.1.0"

_HOMES = {
    "conditions": ("Report", "check"),
    "descent": ("descend",),
    "estimator": (
        "MatrixCompletion",
        "MatrixSensing",
        "MirrorFlowCVDisplay",
        "MirrorFlowCoder",
        "MirrorFlowRegressor",
        "MirrorFlowRegressorCV",
        "TurnOff",
        "entropy_path",
        "flow_path",
    ),
    "flow": ("flow",),
    "legendre": ("IncompatiblePair", "LegendreFunction", "RangeError", "legendre"),
    "limit": ("limit",),
    "loss": ("LeastSquares",),
    "regularizer": ("CustomRegularizer", "Regularizer", "Separable", "WeightDecay"),
    "reparam": (
        "CommutingQuadratic",
        "CustomReparam",
        "Depth",
        "Hadamard",
        "Identity",
        "LogRatio",
        "PowerDifference",
        "Product",
        "Reparam",
        "SymmetricFactor",
    ),
    "schedule": (
        "Constant",
        "Cosine",
        "Cyclic",
        "Linear",
        "Piecewise",
        "Schedule",
        "SwitchOff",
        "join",
        "schedule_from_dict",
        "schedule_to_dict",
    ),
    "solution": ("Path", "Solution", "Status"),
    "weightdecay": (
        "HoldRatio",
        "OffAtBudget",
        "OffBelow",
        "OffWhenLevel",
        "PerLayer",
        "WeightDecayLR",
        "WeightDecayScheduler",
        "WeightDecaySchedulers",
        "lint",
        "preview",
        "scale_to_budget",
    ),
    "spectrum": ("ProductSpectrum", "SpectralTracker", "audit", "product_spectrum"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """Import a public name from its module."""
    if name not in _HOME_OF:
        raise AttributeError(f"module 'mirrorflow' has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, imported or not."""
    return __all__


class _Package(ModuleType):
    """The package: a submodule never hides the public function of the same name."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse what the import system binds: ``mirrorflow.flow`` is the function."""
        if not (name in _HOME_OF and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
