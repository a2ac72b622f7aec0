"""Controlled decay in any training loop: the parts that the framework integrations are made of."""

from .loop import ControlledDecay
from .report import DecayRow, DRow, LoopRow, ProductRow, RunReport

__all__ = ["ControlledDecay", "DRow", "DecayRow", "LoopRow", "ProductRow", "RunReport"]
