"""Parametrizations x = g(w): their derivatives, and what the theory knows about each."""

from .custom import CustomReparam
from .matrices import CommutingQuadratic, Product, SymmetricFactor
from .model import (
    Parameters,
    Reparam,
    factors,
    flatten,
    unflatten,
)
from .products import Depth, Hadamard, reset_geometry
from .separable import Identity, LogRatio, PowerDifference, SeparableReparam

__all__ = [
    "CommutingQuadratic",
    "CustomReparam",
    "Depth",
    "Hadamard",
    "Identity",
    "LogRatio",
    "Parameters",
    "PowerDifference",
    "Product",
    "Reparam",
    "SeparableReparam",
    "SymmetricFactor",
    "factors",
    "flatten",
    "reset_geometry",
    "unflatten",
]
