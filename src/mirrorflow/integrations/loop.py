"""Alias of `mirrorflow.control`: controlled decay in a training loop of your own."""

from ..control import ControlledDecay

__all__ = ["ControlledDecay"]
