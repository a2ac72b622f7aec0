r"""The abstract schedule, and schedules of one formula each."""

from __future__ import annotations

import math
import reprlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._html import html_table

__all__ = [
    "Array",
    "Constant",
    "Cosine",
    "Linear",
    "Piecewise",
    "Schedule",
    "SwitchOff",
    "finite",
    "positive",
]

Array = NDArray[np.float64]


class Schedule(ABC):
    """A strength alpha(t) for t >= 0: a frozen value, right-continuous at its breakpoints."""

    @property
    @abstractmethod
    def breakpoints(self) -> tuple[float, ...]:
        """The times > 0, ascending, at which the rate jumps or has a kink."""

    @abstractmethod
    def _rate(self, t: Array) -> Array:
        """Evaluate alpha at times that are finite and >= 0."""

    @abstractmethod
    def _integral(self, t: Array) -> Array:
        """Evaluate int_0^t alpha at times that are finite and >= 0."""

    def rate(self, t: Any) -> Any:
        """Evaluate alpha(t): a float for a number, an array for an array."""
        return _evaluate(self._rate, t)

    def integral(self, t: Any) -> Any:
        """Evaluate int_0^t alpha(s) ds, exactly."""
        return _evaluate(self._integral, t)

    def accumulated(self, t: Any) -> Any:
        """Evaluate a_t = -int_0^t alpha(s) ds.

        The learning rate is not in it: in training a is `WeightDecayScheduler.accumulated`.
        """
        return 0.0 - self.integral(t)

    def _repr_html_(self) -> str:
        """Show from each breakpoint on the rate, and what had accumulated before it."""
        ends = [0.0, *self.breakpoints[:20]]
        rows = [(t, float(self.rate(t)), float(self.accumulated(t))) for t in ends]
        return html_table(repr(self), ("from t", "rate", "a until then"), rows)


@dataclass(frozen=True, init=False, repr=False)
class Constant(Schedule):
    """alpha(t) = rate.

    Parameters
    ----------
    rate : float
        The strength; a finite number.

    Examples
    --------
    >>> Constant(0.1).accumulated(5.0)
    -0.5
    """

    level: float  # not "rate", which is the method

    def __init__(self, rate: float) -> None:
        object.__setattr__(self, "level", finite("Constant: rate", rate))

    @property
    def breakpoints(self) -> tuple[float, ...]:
        """None."""
        return ()

    def _rate(self, t: Array) -> Array:
        return np.full_like(t, self.level)

    def _integral(self, t: Array) -> Array:
        return self.level * t

    def __repr__(self) -> str:
        """Show the rate."""
        return f"Constant({self.level})"


@dataclass(frozen=True, init=False, repr=False)
class SwitchOff(Schedule):
    """alpha(t) = rate before the time ``at``, and exactly 0 from then on.

    Parameters
    ----------
    rate : float
        The strength until the switch.
    at : float
        The time of the switch, > 0: in training an optimizer step, before which all steps decay;
        in `flow` a time.

    Examples
    --------
    >>> SwitchOff(0.02, at=625).integral(1250)
    12.5
    """

    level: float
    at: float

    def __init__(self, rate: float, at: float) -> None:
        object.__setattr__(self, "level", finite("SwitchOff: rate", rate))
        object.__setattr__(self, "at", positive("SwitchOff: at", at))

    @property
    def breakpoints(self) -> tuple[float, ...]:
        """The time of the switch."""
        return (self.at,)

    def _rate(self, t: Array) -> Array:
        return np.where(t < self.at, self.level, 0.0)

    def _integral(self, t: Array) -> Array:
        return self.level * np.minimum(t, self.at)

    def __repr__(self) -> str:
        """Show the rate and the time of the switch."""
        return f"SwitchOff({self.level}, at={self.at})"


@dataclass(frozen=True, init=False, repr=False)
class Piecewise(Schedule):
    """Piecewise constant: rates[i] holds between the i-th and the next of the times.

    Parameters
    ----------
    times : sequence of float
        Ascending times of the jumps, > 0. A leading 0 may be given, as the start of rates[0].
    rates : sequence of float
        One rate more than there are jumps: before the first, between, and after the last.

    Examples
    --------
    >>> schedule = Piecewise(times=[10, 20], rates=[0.1, 0.5, 0.0])
    >>> schedule.rate([0, 10, 20]).tolist(), schedule.integral(30)
    ([0.1, 0.5, 0.0], 6.0)
    """

    times: tuple[float, ...]
    rates: tuple[float, ...]

    def __init__(self, times: Sequence[float], rates: Sequence[float]) -> None:
        jumps, values = _several("Piecewise: times", times), _several("Piecewise: rates", rates)
        if jumps and jumps[0] == 0 and len(jumps) == len(values):
            jumps = jumps[1:]
        if len(values) != len(jumps) + 1:
            raise ValueError(
                f"Piecewise: rates must have one entry more than there are jumps in times "
                f"({len(jumps)}), got {len(values)}"
            )
        if any(b <= a for a, b in zip((0.0, *jumps), jumps, strict=False)):
            raise ValueError(f"Piecewise: times must be positive and ascending, got {times}")
        object.__setattr__(self, "times", jumps)
        object.__setattr__(self, "rates", values)

    @property
    def breakpoints(self) -> tuple[float, ...]:
        """The jumps."""
        return self.times

    def _rate(self, t: Array) -> Array:
        return np.asarray(self.rates)[np.searchsorted(self.times, t, side="right")]

    def _integral(self, t: Array) -> Array:
        starts = np.array((0.0, *self.times))
        lengths = np.diff(starts)
        absorbed = np.concatenate(([0.0], np.cumsum(np.asarray(self.rates[:-1]) * lengths)))
        piece = np.searchsorted(self.times, t, side="right")
        return absorbed[piece] + np.asarray(self.rates)[piece] * (t - starts[piece])

    def __repr__(self) -> str:
        """Show times and rates."""
        return f"Piecewise(times={list(self.times)}, rates={list(self.rates)})"


@dataclass(frozen=True)
class Linear(Schedule):
    """alpha(t) goes from start to end in a straight line, and stays at end.

    Parameters
    ----------
    start, end : float
        The strengths at time 0 and from time ``duration`` on.
    duration : float
        The time that the change takes, > 0.

    Examples
    --------
    >>> Linear(1.0, 0.0, duration=10).integral([10, 20]).tolist()
    [5.0, 5.0]
    """

    start: float
    end: float
    duration: float

    def __post_init__(self) -> None:
        """Check the numbers."""
        _check_ramp(self, self.start, self.end, self.duration)

    @property
    def breakpoints(self) -> tuple[float, ...]:
        """The end of the change."""
        return (self.duration,)

    def _rate(self, t: Array) -> Array:
        # end - (...) instead of start + (...), so that the rate is exactly `end` at the end.
        left = np.maximum(1 - t / self.duration, 0.0)
        return self.end + (self.start - self.end) * left

    def _integral(self, t: Array) -> Array:
        ramp = np.minimum(t, self.duration)
        gained = self.start + (self.end - self.start) * (ramp / (2 * self.duration))
        return ramp * gained + self.end * (t - ramp)


@dataclass(frozen=True)
class Cosine(Schedule):
    r"""alpha(t) = end + (start - end) (1 + cos(pi t / duration)) / 2, and stays at end.

    Parameters
    ----------
    start, end : float
        The strengths at time 0 and from time ``duration`` on.
    duration : float
        The time that the change takes, > 0.

    Examples
    --------
    >>> Cosine(1.0, 0.0, duration=10).rate([0, 5, 10, 11]).round(12).tolist()
    [1.0, 0.5, 0.0, 0.0]
    """

    start: float
    end: float
    duration: float

    def __post_init__(self) -> None:
        """Check the numbers."""
        _check_ramp(self, self.start, self.end, self.duration)

    @property
    def breakpoints(self) -> tuple[float, ...]:
        """The end of the change."""
        return (self.duration,)

    def _rate(self, t: Array) -> Array:
        half = np.where(t < self.duration, np.cos(np.pi * t / (2 * self.duration)), 0.0)
        return self.end + (self.start - self.end) * half**2  # (1 + cos 2s)/2 = cos^2 s

    def _integral(self, t: Array) -> Array:
        ramp = np.minimum(t, self.duration)
        sine = np.sin(np.pi * ramp / self.duration) * self.duration / np.pi
        return self.end * t + (self.start - self.end) * (ramp + sine) / 2


def _evaluate(function: Any, t: Any) -> Any:
    """Evaluate an array function at a number or an array of times, after checking them."""
    if isinstance(t, float) and 0 <= t < math.inf:  # the case that integrators call most
        return float(function(np.array((t,)))[0])
    times = np.asarray(t, dtype=np.float64)
    bad = ~(np.isfinite(times) & (times >= 0))
    if bad.any():
        raise ValueError(f"t must be finite and >= 0, got {times[bad].ravel()[0]}")
    values = function(np.atleast_1d(times))
    return float(values[0]) if times.ndim == 0 else values


def finite(name: str, value: Any) -> float:
    """Return ``value`` as a finite float, or an error that names it."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{name} must be a finite number, got {reprlib.repr(value)}")
    return number


def _several(name: str, values: Any) -> tuple[float, ...]:
    """Return the numbers of a sequence."""
    if getattr(values, "ndim", 1) == 0 or not isinstance(values, Iterable):
        raise ValueError(f"{name} must be a sequence of numbers, got {reprlib.repr(values)}")
    return tuple(finite(name, value) for value in values)


def positive(name: str, value: Any) -> float:
    """Return ``value`` as a finite float > 0, or an error that names it."""
    number = finite(name, value)
    if number <= 0:
        raise ValueError(f"{name} must be positive, got {reprlib.repr(value)}")
    return number


def _check_ramp(schedule: Schedule, start: float, end: float, duration: float) -> None:
    """Check the three numbers of a ramp and store them as floats."""
    name = type(schedule).__name__
    object.__setattr__(schedule, "start", finite(f"{name}: start", start))
    object.__setattr__(schedule, "end", finite(f"{name}: end", end))
    object.__setattr__(schedule, "duration", positive(f"{name}: duration", duration))
