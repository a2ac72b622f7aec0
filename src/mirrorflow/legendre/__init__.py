r"""Legendre functions R_a: `legendre` makes the one of a commuting pair (g, h) started at w0."""

from .base import LegendreFunction, RangeError
from .build import IncompatiblePair, legendre
from .hyperbolic import HyperbolicEntropy, OneSidedEntropy
from .logcosh import LogCoshEntropy
from .matrix import MatrixEntropy
from .numerical import Inversion
from .power import PowerEntropy
from .quadratic import QuadraticEntropy

__all__ = [
    "HyperbolicEntropy",
    "IncompatiblePair",
    "Inversion",
    "LegendreFunction",
    "LogCoshEntropy",
    "MatrixEntropy",
    "OneSidedEntropy",
    "PowerEntropy",
    "QuadraticEntropy",
    "RangeError",
    "legendre",
]
