"""What a scheduler looks for in its schedules, and what it tells those that answer to it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence

from torch.optim import Optimizer

from ..schedule import Schedule
from .coupling import COUNTED
from .feedback import Feedback, OffAtBudget
from .ledger import Entry
from .selection import Target

__all__ = ["check_schedules", "over", "tell"]


def check_schedules(optimizer: Optimizer, targets: Sequence[Target], kinds: Sequence[str]) -> None:
    """Raise or warn where a schedule cannot do what it was made for.

    Raises
    ------
    ValueError
        If a budget is to be kept of which no account exists.
    """
    for target, kind in zip(targets, kinds, strict=True):
        if isinstance(target.schedule, OffAtBudget) and kind not in COUNTED:
            raise ValueError(
                f"OffAtBudget counts lr x decay, and no such sum describes the decay of "
                f"{type(optimizer).__name__}, which is {kind}: {_INSTEAD.get(kind, _OUTSIDE)}"
            )
    for schedule in {id(t.schedule): t.schedule for t in targets}.values():
        points = schedule.breakpoints if isinstance(schedule, Schedule) else ()
        if points and points[-1] < 1:
            warnings.warn(
                f"{schedule!r} is over before the first step has ended: its clock is the number of "
                "the optimizer's steps, not a fraction of the run. Multiply its times by the "
                "number of steps, as in SwitchOff(0.1, at=0.6 * total)",
                stacklevel=4,
            )
        if isinstance(schedule, Feedback) and schedule.log:
            last = schedule.log[-1]
            warnings.warn(
                f"this {type(schedule).__name__} has decided before, at step {last['step']} the "
                f"last time ({last['reason']}), and goes on from there with a rate of "
                f"{schedule.current:g}: for a new run make a new one",
                stacklevel=4,
            )


_OUTSIDE = "decoupled=True decays from outside, and is counted"
_INSTEAD = {
    "scaled": f'convention="fixed", {_OUTSIDE}',
    "averaged": "SwitchOff(rate, at=...) is off at a step, OffWhenLevel by a measurement",
}


def tell(ledgers: Iterable[tuple[Target, Entry]], step: int) -> None:
    """Tell the loops what the account of their decay says, before the step that comes next."""
    absorbed: dict[int, tuple[Feedback, float]] = {}
    for target, entry in ledgers:
        if isinstance(loop := target.schedule, Feedback):
            most = max(entry.absorbed, absorbed.get(id(loop), (loop, 0.0))[1])
            absorbed[id(loop)] = loop, most
    for loop, most in absorbed.values():
        if not isinstance(loop, OffAtBudget):
            loop.acts_at(step)
        elif loop.current and loop.spent_by(most):
            loop.update(step, most)


def over(targets: Iterable[Target]) -> None:
    """Tell the loops that the run is over."""
    loops = [t.schedule for t in targets if isinstance(t.schedule, Feedback)]
    for loop in {id(loop): loop for loop in loops}.values():
        loop.over()
