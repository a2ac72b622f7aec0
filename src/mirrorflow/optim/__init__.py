"""Training of diagonal models x = m * w: an adaptive optimizer, and the way there and back."""

from __future__ import annotations

from .mirror_adam import MirrorAdam, PairAccount
from .parametrization import Folded, HadamardFactors, Overparametrized, fold, overparametrize

__all__ = [
    "Folded",
    "HadamardFactors",
    "MirrorAdam",
    "Overparametrized",
    "PairAccount",
    "fold",
    "overparametrize",
]
