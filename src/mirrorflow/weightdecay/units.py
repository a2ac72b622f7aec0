r"""The units of a weight decay, and schedules of equal budget.

A step with learning rate lr and decay lambda shrinks a weight by ``1 - lr lambda``; only the
product acts. Over a run its sum is the budget, ``sum_t lr_t lambda_t = -a_T``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..schedule import Schedule
from .selection import check_schedule, rate_at

__all__ = ["CONVENTIONS", "UNITS", "Scaled", "budget", "convert", "scale_to_budget"]

_TO_STEP: dict[str, Callable[[float, float, int], float]] = {
    "decay": lambda value, lr, steps: value * lr,
    "per step": lambda value, lr, steps: value,
    "half-life": lambda value, lr, steps: -math.expm1(-math.log(2) / value),
    "time scale": lambda value, lr, steps: 1 / value,
    "budget": lambda value, lr, steps: value / steps,
}
_FROM_STEP: dict[str, Callable[[float, float, int], float]] = {
    "decay": lambda x, lr, steps: x / lr,
    "per step": lambda x, lr, steps: x,
    "half-life": lambda x, lr, steps: -math.log(2) / math.log1p(-x),
    "time scale": lambda x, lr, steps: 1 / x,
    "budget": lambda x, lr, steps: x * steps,
}
UNITS = tuple(_TO_STEP)

# From the rate of a schedule, the learning rate and its peak to the decay of the optimizer. Where
# the learning rate is 0 nothing can act.
CONVENTIONS: dict[str, Callable[[float, float, float], float]] = {
    "follow-lr": lambda rate, lr, peak: rate,
    "fixed": lambda rate, lr, peak: rate / lr if lr else 0.0,
    "adamc": lambda rate, lr, peak: rate * lr / peak if peak else 0.0,
}


def convert(value: float, unit: str, to: str, *, lr: float, steps: int = 1) -> float:
    """Say a constant decay in another unit.

    Parameters
    ----------
    value : float
        The decay, > 0.
    unit, to : {"decay", "per step", "half-life", "time scale", "budget"}
        The optimizer's number; lr x decay; the steps until ``(1 - lr decay)^n = 1/2``; the steps
        ``1 / (lr decay)``; lr x decay summed over ``steps``.
    lr : float
        The learning rate, > 0.
    steps : int
        The length of the run, for the budget.

    Examples
    --------
    >>> convert(0.1, "decay", "time scale", lr=1e-3)
    10000.0
    >>> round(convert(5000, "half-life", "decay", lr=1e-3), 6)
    0.13862
    """
    for name in (unit, to):
        if name not in UNITS:
            raise ValueError(f"a unit of decay is one of {', '.join(UNITS)}, got {name!r}")
    for name, number in (("value", value), ("lr", lr), ("steps", steps)):
        if not (math.isfinite(number) and number > 0):
            raise ValueError(f"convert: {name} must be positive and finite, got {number}")
    per_step = _TO_STEP[unit](value, lr, steps)
    if to == "half-life" and per_step >= 1:
        raise ValueError(f"lr x decay = {per_step} >= 1: no half-life, a step already overshoots 0")
    return _FROM_STEP[to](per_step, lr, steps)


def budget(schedule: Any, lrs: float | Iterable[float], steps: int | None = None) -> float:
    """Sum lr x decay over a run.

    Parameters
    ----------
    schedule : Schedule or callable step -> float
        The decay at each step.
    lrs : float or iterable of float
        The learning rate, or that of each step (`learning_rates` takes them from a scheduler).
    steps : int, optional
        The length of the run; needed if ``lrs`` is a number.

    Examples
    --------
    >>> from mirrorflow import Constant, SwitchOff
    >>> budget(SwitchOff(0.5, at=50), lrs=0.25, steps=100)
    6.25
    """
    check_schedule(schedule)
    rates = _lrs(lrs, steps)
    return math.fsum(lr * rate_at(schedule, step) for step, lr in enumerate(rates))


def scale_to_budget(
    schedule: Schedule, other: Any, lrs: float | Iterable[float], steps: int | None = None
) -> Scaled:
    """Scale a schedule so that it spends what another does.

    A comparison of two schedules of different budgets compares budgets.

    Parameters
    ----------
    schedule : Schedule
        What to scale.
    other : Schedule or callable step -> float
        Whose budget to match.
    lrs : float or iterable of float
        The learning rate, or that of each step, the same in both runs.
    steps : int, optional
        The length of the run; needed if ``lrs`` is a number.

    Examples
    --------
    >>> from mirrorflow import Constant, SwitchOff
    >>> matched = scale_to_budget(SwitchOff(1.0, at=50), Constant(0.1), lrs=0.25, steps=200)
    >>> matched.factor, matched.rate(0), matched.rate(50)
    (0.4, 0.4, 0.0)
    """
    rates = _lrs(lrs, steps)
    own = budget(schedule, rates)
    if own == 0:
        raise ValueError(
            f"{schedule} spends nothing over {len(rates)} steps: no factor changes that"
        )
    return Scaled(schedule, budget(other, rates) / own)


@dataclass(frozen=True)
class Scaled(Schedule):
    """A schedule times a number; made by `scale_to_budget`.

    Parameters
    ----------
    schedule : Schedule
        What is scaled.
    factor : float
        By how much.

    Examples
    --------
    >>> from mirrorflow import Linear
    >>> Scaled(Linear(1.0, 0.0, duration=10), 0.5).integral(10)
    2.5
    """

    schedule: Schedule
    factor: float

    @property
    def breakpoints(self) -> tuple[float, ...]:
        """Those of the schedule."""
        return self.schedule.breakpoints

    def _rate(self, t: NDArray[np.float64]) -> NDArray[np.float64]:
        return self.factor * self.schedule._rate(t)

    def _integral(self, t: NDArray[np.float64]) -> NDArray[np.float64]:
        return self.factor * self.schedule._integral(t)


def _lrs(lrs: float | Iterable[float], steps: int | None) -> Sequence[float]:
    """Give the learning rate of each step as a list."""
    if isinstance(lrs, (int, float)):
        if steps is None:
            raise ValueError("a single learning rate needs steps=, the length of the run")
        return [float(lrs)] * steps
    rates = [float(lr) for lr in lrs]
    if steps is not None and steps != len(rates):
        raise ValueError(f"steps={steps}, but there are {len(rates)} learning rates")
    return rates
