"""Schedules made of schedules: one after the other, and over and over again."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .schedules import Array, Schedule, positive

__all__ = ["Cyclic", "Joined", "join"]


@dataclass(frozen=True)
class Joined(Schedule):
    """Schedules one after the other, each with a clock that starts at 0; made by `join`."""

    schedules: tuple[Schedule, ...]
    starts: tuple[float, ...]

    @property
    def breakpoints(self) -> tuple[float, ...]:
        """The joints, and the breakpoints of the parts within their spans."""
        ends = (*self.starts[1:], math.inf)
        inner = {
            t
            for schedule, start, end in zip(self.schedules, self.starts, ends, strict=True)
            for t in (_clock(start, b) for b in schedule.breakpoints)
            if t < end
        }
        return tuple(sorted(inner | set(self.starts[1:])))

    def _rate(self, t: Array) -> Array:
        return self._by_part(t, lambda schedule, local: schedule._rate(local))

    def _integral(self, t: Array) -> Array:
        lengths = np.diff(self.starts)
        spans = [s.integral(d) for s, d in zip(self.schedules, lengths, strict=False)]
        absorbed = np.concatenate(([0.0], np.cumsum(spans)))
        part = self._part(t)
        return absorbed[part] + self._by_part(t, lambda s, local: s._integral(local))

    def _part(self, t: Array) -> NDArray[np.intp]:
        """Return the index of the schedule that holds at each time."""
        return np.searchsorted(self.starts, t, side="right") - 1

    def _by_part(self, t: Array, evaluate: Any) -> Array:
        """Evaluate each time with its own schedule, on that schedule's clock."""
        part, result = self._part(t), np.empty_like(t)
        for i, (schedule, start) in enumerate(zip(self.schedules, self.starts, strict=True)):
            mask = part == i
            result[mask] = evaluate(schedule, t[mask] - start)
        return result


def join(parts: Sequence[tuple[Schedule, float | None]]) -> Joined:
    """Put schedules one after the other, the clock of each starting at 0.

    Parameters
    ----------
    parts : sequence of (Schedule, duration)
        The last schedule goes on for ever: its duration is not used to end it, and may be None.

    Raises
    ------
    ValueError
        If there is no part, or a duration is not positive and finite (None or inf but in the last).

    Examples
    --------
    >>> from mirrorflow import Constant, Linear
    >>> warm = join([(Linear(0, 0.1, 10), 10), (Constant(0.1), 20), (Constant(0.0), None)])
    >>> warm.breakpoints, warm.integral(100)
    ((10.0, 30.0), 2.5)
    """
    parts = _pairs(parts)
    if not parts:
        raise ValueError("join: parts must hold at least one (schedule, duration), got none")
    if any(duration is None for _, duration in parts[:-1]):
        raise ValueError("join: duration must be a number in all pairs but the last, got None")
    durations = [positive("join: duration", d) for _, d in parts[:-1]]
    if parts[-1][1] not in (None, math.inf):
        positive("join: duration", parts[-1][1])
    starts = tuple(float(s) for s in np.concatenate(([0.0], np.cumsum(durations))))
    return Joined(tuple(schedule for schedule, _ in parts), starts)


def _pairs(parts: Any) -> list[tuple[Schedule, Any]]:
    """Return the pairs as a list, or say what is none."""
    if not isinstance(parts, Iterable):
        raise TypeError(f"join: parts must be a list of (Schedule, duration) pairs, got {parts!r}")
    found = list(parts)
    for pair in found:
        if not (isinstance(pair, Sequence) and len(pair) == 2 and isinstance(pair[0], Schedule)):
            wrong = pair[0] if isinstance(pair, Sequence) and len(pair) == 2 else pair
            raise TypeError(f"join: parts must be (Schedule, duration) pairs, got {wrong!r}")
    return found


@dataclass(frozen=True)
class Cyclic(Schedule):
    r"""A schedule begun anew every ``period``: warm restarts.

    .. math:: \alpha(t) = \beta(t - k \cdot \text{period}), \quad
              k = \min(\lfloor t / \text{period} \rfloor, \text{cycles} - 1)

    The last cycle goes on, as the last part of a `join` does.

    Parameters
    ----------
    schedule : Schedule
        beta, whose clock starts at 0 in every cycle.
    period : float
        The length of a cycle, > 0.
    cycles : int
        How often it is run, >= 1. Finite, since `breakpoints` lists every restart.

    Examples
    --------
    >>> from mirrorflow import Linear
    >>> restarts = Cyclic(Linear(1.0, 0.0, duration=10), period=10, cycles=3)
    >>> restarts.rate([0, 5, 10, 29, 30]).round(12).tolist(), restarts.integral(100)
    ([1.0, 0.5, 1.0, 0.1, 0.0], 15.0)
    """

    schedule: Schedule
    period: float
    cycles: int

    def __post_init__(self) -> None:
        """Check the settings."""
        if not isinstance(self.schedule, Schedule):
            raise TypeError(f"Cyclic: schedule must be a Schedule, got {self.schedule!r}")
        cycles = positive("Cyclic: cycles", self.cycles)
        if cycles != int(cycles):
            raise ValueError(f"Cyclic: cycles must be a whole number, got {self.cycles!r}")
        object.__setattr__(self, "period", positive("Cyclic: period", self.period))
        object.__setattr__(self, "cycles", int(cycles))

    @property
    def breakpoints(self) -> tuple[float, ...]:
        """The restarts, and the breakpoints of the schedule within each cycle."""
        starts = [k * self.period for k in range(self.cycles)]
        ends = [*starts[1:], math.inf]
        inner = {
            t
            for start, end in zip(starts, ends, strict=True)
            for t in (_clock(start, b) for b in self.schedule.breakpoints)
            if t < end
        }
        return tuple(sorted(inner | set(starts[1:])))

    def _rate(self, t: Array) -> Array:
        return self.schedule._rate(t - self._cycle(t) * self.period)

    def _integral(self, t: Array) -> Array:
        cycle = self._cycle(t)
        return cycle * self.schedule.integral(self.period) + self.schedule._integral(
            t - cycle * self.period
        )

    def _cycle(self, t: Array) -> Array:
        """Return the number of restarts by each time, those at the time itself included."""
        cycle = np.floor(t / self.period)
        cycle -= cycle * self.period > t  # the quotient may be rounded up to a whole number,
        cycle += (cycle + 1) * self.period <= t  # or down
        return np.minimum(cycle, self.cycles - 1)


def _clock(start: float, local: float) -> float:
    """Return the time at which the clock that starts at ``start`` shows ``local``, rounded up."""
    t = start + local
    return t if t - start >= local else math.nextafter(t, math.inf)
