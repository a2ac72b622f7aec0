"""Watchdogs of a run: counts that disagree, schedules without gradients, steps that are none."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from ._ledger import TOTALS, Account
from .conventions import lr_of

__all__ = [
    "CountComparison",
    "GradientWatchdog",
    "only_makes_state",
    "stands_still",
    "warn_of_too_much",
]


class CountComparison:
    """Compares the scheduler's count with the optimizer's own, where they can have come apart.

    Once; where the optimizer's groups say which step they are of, there is nothing to compare.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        Many count the steps of each tensor in their state.

    Attributes
    ----------
    due : bool
        Whether the next step compares.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._uncounted = 0  # steps that the optimizer has counted and the scheduler has not
        self._before: int | None = None
        self._empty = False  # the optimizer's state, before a step
        self.loaded(optimizer)

    def loaded(self, optimizer: Optimizer) -> None:
        """Take note of what the optimizer has loaded."""
        self._uncounted = 0
        self.due = not any(TOTALS in group for group in optimizer.param_groups)

    def rested(self) -> None:
        """Take note of a step that does not count."""
        self._uncounted += 1

    def begins(self, optimizer: Optimizer) -> None:
        """Look at the optimizer's count before a step."""
        self._empty = not optimizer.state
        self._before = _own_count(optimizer) if self.due else None

    def ends(self, optimizer: Optimizer, account: Account) -> None:
        """Compare after a step, and warn if the counts are not the same."""
        if self.due:
            self.due = False
            count = _own_count(optimizer)
            counts = count is not None and count == (self._before or 0) + 1
            if counts and count != account.steps + self._uncounted:
                account.alone = False
                warnings.warn(_APART.format(_name(optimizer), count, account.steps), stacklevel=4)
        alone, account.alone = account.alone, False
        if alone and self._empty and optimizer.state:  # its momentum began anew
            warnings.warn(_ALONE.format(_name(optimizer), account.steps - 1), stacklevel=4)


_APART = (
    "{} has taken {} steps but the decay schedule is at step {}. Load the scheduler's state as "
    "well. If the scheduler is new, shift its schedule to begin at another step: "
    "lambda step: schedule.rate(step + ...)"
)
_ALONE = (
    "WeightDecayScheduler continues from step {1}, but {0} has started with empty state, without "
    "its moments of past gradients. Load the optimizer's state as well"
)


def _name(optimizer: Optimizer) -> str:
    """Return the name of the class."""
    return type(optimizer).__name__


def _own_count(optimizer: Optimizer) -> int | None:
    """Return the number of steps that the optimizer has counted, if it does."""
    states = [state for state in optimizer.state.values() if isinstance(state, Mapping)]
    counts = [state["step"] for state in states if "step" in state]
    known = [int(count) for count in counts if isinstance(count, (int, float, torch.Tensor))]
    return max(known, default=None)


class GradientWatchdog:
    """Warns, once, of scheduled groups none of whose tensors had a gradient in the first steps."""

    def __init__(self) -> None:
        self._steps, self._seen = 0, set[int]()

    def sees(self, recorded: set[int], idle: Callable[[set[int]], list[int]], again: bool) -> bool:
        """Take note of the ledgers that have a step; return whether the watch is over.

        Parameters
        ----------
        recorded : set of int
            The places of the ledgers that have the step.
        idle : callable
            The groups with a schedule, of the places that were never recorded.
        again : bool
            Whether the call goes on with the last step.
        """
        self._seen |= recorded
        self._steps += not again
        if self._steps < _PATIENCE:
            return False
        if groups := sorted(set(idle(self._seen))):
            names = ", ".join(map(str, groups))
            warnings.warn(_IDLE.format(names, self._steps), stacklevel=4)
        return True


_PATIENCE = 5  # steps
_IDLE = (
    "no tensor of parameter group {} had a gradient in the first {} steps, so its schedule acts on "
    "nothing. If the optimizer stands in for others that step in the backward pass, as the "
    "Trainer's layer-wise optimizers do, schedule those; if the tensors are frozen, take them out"
)


# Whether a call of ``optimizer.step`` is a step


def only_makes_state(optimizer: Optimizer, kwargs: Mapping[str, Any]) -> bool:
    """Return whether a step is the one by which torch.distributed.checkpoint makes the state.

    It calls ``step(closure=None)`` with learning rates of 0 and gradients of 0, before it reads or
    loads an optimizer that has no state yet. The weights stay what they are, so nothing counts.
    """
    if "closure" not in kwargs or kwargs["closure"] is not None or not stands_still(optimizer):
        return False
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return not any(_moves(p.grad) for p in params if p.grad is not None)


def stands_still(optimizer: Optimizer) -> bool:
    """Return whether all learning rates that there are are 0."""
    return all(lr_of(group) == 0 for group in optimizer.param_groups if "lr" in group)


def _moves(gradient: Any) -> bool:
    """Return whether this process's part of a gradient is not 0; False without data."""
    local = gradient.to_local() if hasattr(gradient, "to_local") else gradient
    return not local.is_meta and bool(local.any())


def warn_of_too_much(group: int, coupling: str, taken: float, step: int) -> None:
    """Warn of a decay that takes the weights of a group to 0, or through it."""
    product = "weight_decay" if coupling == "fixed" else "lr * weight_decay"
    effect = "flips the sign of the weights" if taken > 1 else "sets the weights to 0"
    warnings.warn(
        f"{product} = {taken:g} >= 1 for group {group} at step {step}: this step {effect}. Use a "
        "smaller rate, or set convention= to what the rate means",
        stacklevel=5,
    )


def check_not_captured() -> None:
    """Raise while a CUDA graph records, which would keep the decay of this moment."""
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "optimizer.step() is being captured in a CUDA graph: a replay would repeat the decay "
            "of this moment for ever. Capture forward and backward, and step outside of the graph"
        )
