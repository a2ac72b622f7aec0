"""Controlled decay in any training loop: the parts that the framework integrations are made of."""

from .loop import ControlledDecay

__all__ = ["ControlledDecay"]
