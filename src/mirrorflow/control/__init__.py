"""Controlled decay in any training loop, and the schedule that stored experiments speak for."""

from .loop import ControlledDecay
from .recommendation import Recommendation, recommend
from .report import DecayRow, DRow, LoopRow, ProductRow, RunReport

__all__ = [
    "ControlledDecay",
    "DRow",
    "DecayRow",
    "LoopRow",
    "ProductRow",
    "Recommendation",
    "RunReport",
    "recommend",
]
