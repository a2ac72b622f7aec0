r"""End points of training, computed without training: argmin {R_a(x) : Zx = y} (Theorem 3.6)."""

from .early_stopping import PenalizedStats, penalized
from .solve import LimitStats, limit

__all__ = ["LimitStats", "PenalizedStats", "limit", "penalized"]
