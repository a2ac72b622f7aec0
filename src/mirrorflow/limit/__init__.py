r"""End points of training, computed without training: argmin {R_a(x) : Zx = y} (Theorem 3.6)."""

from .solve import LimitStats, limit

__all__ = ["LimitStats", "limit"]
