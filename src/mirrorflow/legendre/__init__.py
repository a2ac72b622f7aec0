from .entropy import HyperbolicEntropy, OneSidedEntropy
from .function import LegendreFunction, RangeError
