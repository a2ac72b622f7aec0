"""Whether a call of ``optimizer.step`` is a step, and whether the optimizer counts as many."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from .account import TOTALS, Account
from .acting import lr_of

__all__ = ["Clock", "only_makes_state", "stands"]


def only_makes_state(optimizer: Optimizer, kwargs: Mapping[str, Any]) -> bool:
    """Tell whether a step is the one by which torch.distributed.checkpoint makes the state.

    It calls ``step(closure=None)`` with learning rates of 0 and gradients of 0, before it reads or
    loads an optimizer that has no state yet. The weights stay what they are, so nothing counts.
    """
    if "closure" not in kwargs or kwargs["closure"] is not None or not stands(optimizer):
        return False
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return not any(_moves(p.grad) for p in params if p.grad is not None)


def stands(optimizer: Optimizer) -> bool:
    """Tell whether all learning rates that there are are 0."""
    return all(lr_of(group) == 0 for group in optimizer.param_groups if "lr" in group)


class Clock:
    """Compares the scheduler's count with the optimizer's own, where they can have come apart.

    Once; where the optimizer's groups say which step they are of, there is nothing to compare.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        Many count the steps of each tensor in their state.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._uncounted = 0  # steps that the optimizer has counted and the scheduler has not
        self._before: int | None = None
        self._empty = False  # the optimizer's state, before a step
        self.loaded(optimizer)

    def loaded(self, optimizer: Optimizer) -> None:
        """Take note of what the optimizer has loaded."""
        self._uncounted = 0
        self._compare = not any(TOTALS in group for group in optimizer.param_groups)

    def rested(self) -> None:
        """Take note of a step that does not count."""
        self._uncounted += 1

    def begins(self, optimizer: Optimizer) -> None:
        """Look at the optimizer's count before a step."""
        self._empty = not optimizer.state
        self._before = _own_count(optimizer) if self._compare else None

    def ends(self, optimizer: Optimizer, account: Account) -> None:
        """Compare after a step, and warn if the counts are not the same."""
        if self._compare:
            self._compare = False
            count = _own_count(optimizer)
            counts = count is not None and count == (self._before or 0) + 1
            if counts and count != account.steps + self._uncounted:
                account.alone = False
                warnings.warn(_APART.format(_name(optimizer), count, account.steps), stacklevel=4)
        alone, account.alone = account.alone, False
        if alone and self._empty and optimizer.state:  # its momentum began anew
            warnings.warn(_ALONE.format(_name(optimizer), account.steps - 1), stacklevel=4)


_APART = (
    "{} has taken {} steps by its own count, the decay schedule is at step {}: one of the two was "
    "not loaded, or the scheduler is new. To begin a schedule here as if at another step, shift "
    "it: lambda step: schedule.rate(step + ...)"
)
_ALONE = (
    "the state of WeightDecayScheduler was loaded at step {1}, and that of {0} was not: what it "
    "remembers of the gradients has begun anew. If it was saved, load it, too"
)


def _name(optimizer: Optimizer) -> str:
    """Name the class."""
    return type(optimizer).__name__


def _moves(gradient: Any) -> bool:
    """Tell whether a gradient is not 0; of a sharded one this process's part, without data no."""
    local = gradient.to_local() if hasattr(gradient, "to_local") else gradient
    return not local.is_meta and bool(local.any())


def _own_count(optimizer: Optimizer) -> int | None:
    """Give the number of steps that the optimizer has counted, if it does."""
    states = [state for state in optimizer.state.values() if isinstance(state, Mapping)]
    counts = [state["step"] for state in states if "step" in state]
    known = [int(count) for count in counts if isinstance(count, (int, float, torch.Tensor))]
    return max(known, default=None)
