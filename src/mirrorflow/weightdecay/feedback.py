"""Closed-loop schedules: a decay that measurements switch off.

Each is a callable step -> rate for `WeightDecayScheduler`, fed by ``update(step, value)`` as often
as something is measured. What it remembers travels in the optimizer's groups, and is there again
when the optimizer has loaded its checkpoint; ``state_dict()`` has the log of decisions as well.
"""

from __future__ import annotations

import math
import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

__all__ = [
    "FeedWatchdog",
    "Feedback",
    "OffAtBudget",
    "OffBelow",
    "OffWhenLevel",
    "as_float",
    "feed",
    "number",
    "reachable",
    "whole",
]


class Feedback(ABC):
    """A rate that ``update`` may change, with the log of every decision.

    Attributes
    ----------
    current : float
        The rate that acts now.
    log : list of dict
        step, value, rate and reason of each update.
    fed_every : int
        The number of steps between two measurements, as announced; 0 if that is not known.
    """

    def __init__(self, rate: float) -> None:
        self.current = number("rate", rate, 0.0)
        self.log: list[dict[str, Any]] = []
        self.fed_every, self._resumed = 0, False
        self._watchdog: FeedWatchdog | None = None  # from when it first sets the decay

    def __call__(self, step: int) -> float:
        """Return the rate of the last decision, whatever the step."""
        return self.current

    def update(self, step: int, value: float) -> float:
        """Take a measurement, and return the rate that acts from now on.

        Parameters
        ----------
        step : int
            The optimizer step it belongs to.
        value : float
            What was measured. NaN (a product that is still 0), or what is infinite, changes
            nothing, and is logged.
        """
        value = as_float("value", value)
        if math.isnan(value):
            reason = "nothing to measure"
        elif math.isinf(value):
            reason = "not finite"
        else:
            self.current, reason = self._decide(value)
        self.log.append({"step": step, "value": value, "rate": self.current, "reason": reason})
        if self._watchdog:
            self._watchdog.fed()
        return self.current

    def waits(self) -> int:
        """Return how many measurements it needs at least before it can change the rate."""
        return 1

    @property
    def fired_at(self) -> int | None:
        """The step of the measurement that switched the rate off; None if none in the log did."""
        rows = (row for row in self.log if row["rate"] == 0 and row["reason"] != "off")
        return next((row["step"] for row in rows if math.isfinite(row["value"])), None)

    def outcome(self) -> str:
        """Return in a sentence what has become of the rate, for the report of a run."""
        step = self.fired_at
        if step is not None:
            row = next(row for row in self.log if row["step"] == step and row["reason"] != "off")
            return f"{row['reason']} at step {step}, at {row['value']:.4g}"
        if self.current == 0:
            return "off: it was so before this log begins"
        values = [row["value"] for row in self.log if math.isfinite(row["value"])]
        if not values:
            unfed = "it was never fed a measurement" if not self.log else "nothing was measurable"
            return f"did not fire: {unfed}; the rate is still {self.current:.4g}"
        why = self._why_not(values)
        return f"did not fire in {len(values)} measurements: {why}; the rate is {self.current:.4g}"

    def _why_not(self, values: Sequence[float]) -> str:
        """Return why what was measured has not switched the rate off."""
        return f"the last value is {values[-1]:.4g}"

    def acts_at(self, step: int) -> None:
        """Warn, once, if this sets the decay and never receives a measurement.

        After 1,000 steps, or three times ``fed_every``; in a shorter run when it is over: when the
        scheduler is closed, this is dropped, or the program ends.

        Parameters
        ----------
        step : int
            The optimizer step that comes next.
        """
        if self.log:
            return
        if self._watchdog is None:
            self._watchdog = FeedWatchdog(self, step, self._resumed)
        self._watchdog.acts_at(step, self.fed_every)

    def over(self) -> None:
        """Warn, once, if the run ends without a measurement."""
        if self._watchdog and not self.log:
            self._watchdog.over()

    def __getstate__(self) -> dict[str, Any]:
        """Leave what watches over this one, and not over a copy."""
        return vars(self) | {"_watchdog": None}

    @abstractmethod
    def _decide(self, value: float) -> tuple[float, str]:
        """Return the new rate and the reason for it."""

    def _memory(self) -> tuple[float, ...]:
        """Return what the next decision depends on, beside the rate; here nothing."""
        return ()

    def _recall(self, *memory: float) -> None:
        """Take back what `_memory` gave."""
        if memory:
            raise ValueError(f"{type(self).__name__} remembers nothing but its rate: {memory}")

    def memory(self) -> tuple[Any, ...]:
        """Return what the next decision depends on: the name of the class, and a few numbers."""
        return (type(self).__name__, self.current, *self._memory())

    def recall(self, memory: Sequence[Any]) -> None:
        """Take back what `memory` gave; the log is not in it.

        Raises
        ------
        ValueError
            If it is the memory of another class.
        """
        kind, current, *rest = memory
        if kind != type(self).__name__:
            raise ValueError(f"this is the state of {kind}, not of {type(self).__name__}")
        self.current, self._resumed = float(current), True
        if self._watchdog:
            self._watchdog.fed()  # perhaps: the checkpoint does not say
            self._watchdog = None
        self._recall(*map(float, rest))

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs and the log, in plain numbers and strings."""
        return {"memory": list(self.memory()), "log": [dict(row) for row in self.log]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state."""
        self.recall(state["memory"])
        self.log = [dict(row) for row in state["log"]]


class OffWhenLevel(Feedback):
    """A rate that is off, for good, when a measured quantity has levelled off.

    Parameters
    ----------
    rate : float
        The rate until then, >= 0.
    window : int
        How many updates are compared, >= 2.
    tol : float
        Level is: the largest and the smallest of the window differ by at most this fraction.
    earliest : int
        No decision before so many updates.

    Examples
    --------
    >>> off = OffWhenLevel(0.1, window=3, tol=0.01)
    >>> [off.update(k, v) for k, v in enumerate([5.0, 4.0, 3.01, 3.0, 3.0])]
    [0.1, 0.1, 0.1, 0.1, 0.0]
    """

    def __init__(self, rate: float, window: int = 5, tol: float = 0.01, earliest: int = 0) -> None:
        super().__init__(rate)
        self.window = whole("window", window, 2)
        self.tol, self.earliest = number("tol", tol, 0.0), whole("earliest", earliest, 0)
        self._count = 0  # how many were measured
        self._last: tuple[float, ...] = ()  # and the last of them

    def _decide(self, value: float) -> tuple[float, str]:
        """Return the rate by how far the last values differ."""
        if self.current == 0:
            return 0.0, "off"
        self._count += 1
        self._last = last = (*self._last, value)[-self.window :]
        if self._count < max(self.window, self.earliest):
            return self.current, "too early"
        if max(last) - min(last) <= self.tol * max(abs(v) for v in last):
            return 0.0, "level: switched off"
        return self.current, "still moving"

    def waits(self) -> int:
        """Return how many measurements the window, and ``earliest``, still lack."""
        return max(1, max(self.window, self.earliest) - self._count)

    def _why_not(self, values: Sequence[float]) -> str:
        """Return by how much the last values differ, or that there are too few."""
        if self._count < (least := max(self.window, self.earliest)):
            return f"{least} are needed before it may decide"
        last = self._last
        spread = (max(last) - min(last)) / max(abs(v) for v in last)
        return f"the last {len(last)} differ by {spread:.2%}, level is {self.tol:.2%}"

    def _memory(self) -> tuple[float, ...]:
        """Return the window."""
        return float(self._count), *self._last

    def _recall(self, *memory: float) -> None:
        """Take it back."""
        count, *last = memory
        self._count, self._last = int(count), tuple(last)


class OffBelow(Feedback):
    """A rate that is off, for good, once a measured quantity has fallen to a target.

    Parameters
    ----------
    rate : float
        The rate until then, >= 0.
    target : float
        Off with the first value that is not above it; what it does later changes nothing.
    lowest : float
        The lowest value that the quantity can have, which the target may not be below: 1 for the
        ratio and for ranks. Of another quantity, such as a loss, give its own, or ``-math.inf``.

    Raises
    ------
    ValueError
        If no value could ever reach the target.

    Examples
    --------
    >>> off = OffBelow(0.1, target=3.0)
    >>> [off.update(k, v) for k, v in enumerate([4.0, 3.0, 5.0])]
    [0.1, 0.0, 0.0]
    """

    def __init__(self, rate: float, target: float, *, lowest: float = 1.0) -> None:
        super().__init__(rate)
        self.target = reachable(number("target", target, -math.inf), lowest)

    def _decide(self, value: float) -> tuple[float, str]:
        """Return the rate by the target."""
        if self.current == 0:
            return 0.0, "off"
        if value <= self.target:
            return 0.0, "target reached: switched off"
        return self.current, "above the target"

    def _why_not(self, values: Sequence[float]) -> str:
        """Return how near the target was."""
        return f"the lowest value was {min(values):.4g}, the target is {self.target:.4g}"


class OffAtBudget(Feedback):
    """A rate that is off, for good, once a budget has been absorbed.

    A `WeightDecayScheduler` feeds it what its own account says, before every step.

    Parameters
    ----------
    rate : float
        The rate until then, >= 0.
    budget : float
        The largest -a_T = sum of lr x decay, > 0, of any one tensor that it acts on: over the
        steps in which the tensor had a gradient.

    Examples
    --------
    >>> off = OffAtBudget(0.1, budget=0.5)
    >>> off.update(10, 0.3), off.update(20, 0.5)
    (0.1, 0.0)
    """

    def __init__(self, rate: float, budget: float) -> None:
        super().__init__(rate)
        self.budget = number("budget", budget, 0.0, strict=True)

    def spent_by(self, absorbed: float) -> bool:
        """Return whether this is the budget, or misses it by the rounding of a long sum only."""
        return absorbed >= self.budget * (1 - 1e-9)

    def _decide(self, value: float) -> tuple[float, str]:
        """Return the rate by the budget."""
        if self.current == 0:
            return 0.0, "off"
        if self.spent_by(value):
            return 0.0, "budget absorbed: switched off"
        return self.current, "within the budget"

    def outcome(self) -> str:
        """Return in a sentence whether the budget was spent: it is fed only then."""
        if self.log or self.current == 0:
            return super().outcome()
        return f"did not fire: less than the budget of {self.budget:.4g} was absorbed"

    def _why_not(self, values: Sequence[float]) -> str:
        """Return how much of the budget was spent."""
        return f"{max(values):.4g} of the budget of {self.budget:.4g} was absorbed"


def feed(absorbed: Iterable[tuple[Any, float]], step: int) -> None:
    """Feed the closed loops among schedules the account of their decay, before a step.

    Parameters
    ----------
    absorbed : iterable of (schedule, float)
        The most that a tensor of each set has absorbed; of a loop that has several the largest
        counts.
    step : int
        The optimizer step that comes next.
    """
    most: dict[int, tuple[Feedback, float]] = {}
    for loop, value in absorbed:
        if isinstance(loop, Feedback):
            most[id(loop)] = loop, max(value, most.get(id(loop), (loop, 0.0))[1])
    for loop, value in most.values():
        if not isinstance(loop, OffAtBudget):
            loop.acts_at(step)
        elif loop.current and loop.spent_by(value):
            loop.update(step, value)


# Warn when a closed-loop schedule never receives measurements: once late, or when the run ends.

_LONG = 1000  # steps that a loop may wait, where no interval was announced
_INTERVALS = 3  # of those that were announced
_SHORT = 20  # steps: a run that ends before is a trial


class FeedWatchdog:
    """Warns when a loop has set the decay for many steps without a measurement.

    Parameters
    ----------
    loop : Feedback
        Kept weakly: when the program drops the loop, the run is over, and the watch ends.
    step : int
        The optimizer step that comes next.
    resumed : bool
        Whether it goes on from a checkpoint: it may have been fed before.

    Examples
    --------
    >>> from mirrorflow.weightdecay import OffBelow
    >>> watchdog = FeedWatchdog(OffBelow(0.1, target=2.0), step=0, resumed=False)
    >>> watchdog.acts_at(500, every=0)
    >>> watchdog.fed()
    """

    def __init__(self, loop: Any, step: int, resumed: bool) -> None:
        self.name, self.rate = type(loop).__name__, loop.current
        self.start, self.step, self.every = step, step, 0
        self.resumed, self.warned = resumed, False
        self._end = weakref.finalize(loop, self.over)

    def acts_at(self, step: int, every: int) -> None:
        """Warn, once, if the loop should have been fed by now.

        Parameters
        ----------
        step : int
            The optimizer step that comes next.
        every : int
            The number of steps between two measurements, as announced; else 0.
        """
        if step not in (self.step, self.step + 1):  # a run that is taken up at a later step
            self.start = step
        self.step, self.every = step, every
        longest = max(_SHORT, _INTERVALS * every) if every else _LONG
        if self.step - self.start >= longest:
            self._warn(stacklevel=6)

    def over(self) -> None:
        """Warn if the run is over, and the loop was not fed in it."""
        if not self.resumed and self.step - self.start >= _SHORT:
            self._warn(stacklevel=2)

    def fed(self) -> None:
        """Take note of a measurement: the watch is over."""
        self.warned = True
        self._end.detach()

    def _warn(self, stacklevel: int) -> None:
        """Warn, unless that was done."""
        if self.warned:
            return
        self.fed()
        how = (
            f"ControlledDecay feeds it every {self.every} steps (track_every), by its own step(), "
            "which has to follow each optimizer.step()"
            if self.every
            else "call its update(step, value) with each measurement, or let "
            "mirrorflow.ControlledDecay measure"
        )
        warnings.warn(
            f"{self.name} has set the decay of steps {self.start} to {self.step} and was never "
            f"fed a measurement, so its rate stays at {self.rate}: {how}",
            stacklevel=stacklevel,
        )


# Numbers among the arguments: as Python has them, and refused where they cannot be meant.


def reachable(target: float, lowest: float) -> float:
    """Return a target; raise where no value of what is measured could reach it."""
    if not target >= as_float("lowest", lowest):
        raise ValueError(
            f"target must be >= {lowest:g}, the lowest value that a ratio or a rank can have, "
            f"got {target!r}. Of another quantity, such as a loss, give the lowest value, "
            "lowest=0.0 or -math.inf"
        )
    return target


def whole(name: str, value: Any, low: int = 1) -> int:
    """Return a whole number that is not too small.

    Examples
    --------
    >>> whole("steps", 1e3)
    1000
    """
    number: Any = value
    known = isinstance(value, Real) and not isinstance(value, bool)
    if known and number >= low and float(number).is_integer():
        return int(number)
    raise ValueError(f"{name} must be a whole number >= {low}, got {value!r}")


def number(name: str, value: Any, low: float, strict: bool = False) -> float:
    """Return a finite number that is not too small."""
    number = as_float(name, value)
    if not math.isfinite(number) or number < low or (strict and number == low):
        raise ValueError(
            f"{name} must be a number {'>' if strict else '>='} {low:g}, got {value!r}"
        )
    return number


def as_float(name: str, value: Any) -> float:
    """Return a Python float; of text none, also if it reads as a number."""
    error = None
    try:
        if not isinstance(value, (str, bytes)):
            return float(value)
    except (TypeError, ValueError, RuntimeError) as cause:  # of a tensor with several elements
        error = cause
    raise TypeError(f"{name} must be a number, got {value!r}") from error
