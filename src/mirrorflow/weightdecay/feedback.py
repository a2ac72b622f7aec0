r"""Decay that answers to what is measured: hold a ratio, or switch off when there is reason to.

Each is a callable step -> rate for `WeightDecayScheduler`, fed by ``update(step, value)`` as often
as something is measured. A process that resumes loads ``state_dict()``.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

__all__ = ["Feedback", "HoldRatio", "OffAtBudget", "OffWhenLevel"]

AUTHORITY = 0.01  # relative change of the value below which a saturated decay has done nothing


class Feedback(ABC):
    """A rate that ``update`` may change, with the log of every decision.

    Attributes
    ----------
    current : float
        The rate that acts now.
    log : list of dict
        step, value, rate and reason of each update.
    """

    def __init__(self, rate: float) -> None:
        self.current = _number("rate", rate, 0.0)
        self.log: list[dict[str, Any]] = []

    def __call__(self, step: int) -> float:
        """Give the rate: the last decision's, whatever the step."""
        return self.current

    def update(self, step: int, value: float) -> float:
        """Take a measurement, and give the rate that acts from now on.

        Parameters
        ----------
        step : int
            The optimizer step it belongs to.
        value : float
            What was measured. NaN (a product that is still 0) changes nothing, and is logged.
        """
        if math.isnan(value):
            reason = "nothing to measure"
        else:
            self.current, reason = self._decide(float(value))
        self.log.append({"step": step, "value": value, "rate": self.current, "reason": reason})
        return self.current

    @abstractmethod
    def _decide(self, value: float) -> tuple[float, str]:
        """Give the new rate and the reason for it."""

    def state_dict(self) -> dict[str, Any]:
        """Give what a resumed run needs, in plain numbers and strings."""
        return {"current": self.current, "log": [dict(row) for row in self.log]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state."""
        self.current, self.log = float(state["current"]), [dict(row) for row in state["log"]]


class HoldRatio(Feedback):
    r"""Hold a measured ratio at a target, by proportional and integral control of the rate.

    .. math:: r = r_0 + K (e + \tfrac{1}{T} \sum e), \quad e = \log(\text{value} / \text{target})

    More decay lowers the ratio of nuclear to Frobenius norm, so a ratio above the target raises
    the rate.

    Parameters
    ----------
    target : float
        The ratio, > 0.
    rate : float
        The rate r_0 to begin with, >= 0.
    gain : float
        K, > 0: the change of the rate for a ratio e times the target.
    integral : float
        T, > 0: the number of updates in which a lasting error is added once more.
    bounds : (float, float)
        The lowest and the highest rate. The sum stops where the rate would leave them.
    slew : float
        The largest change in one update, > 0.
    deadband : float
        Relative errors smaller than this are taken as 0, >= 0.
    patience : int
        After so many updates in a row at the upper bound without an effect, a warning says that
        the decay has no authority: it shrinks both factors alike, which does not change the ratio.

    Examples
    --------
    >>> hold = HoldRatio(target=3.0, rate=0.1, gain=0.1)
    >>> hold.update(50, value=4.0) > 0.1
    True
    """

    def __init__(
        self,
        target: float,
        rate: float,
        gain: float,
        *,
        integral: float = 10.0,
        bounds: tuple[float, float] = (0.0, 1.0),
        slew: float = math.inf,
        deadband: float = 0.02,
        patience: int = 10,
    ) -> None:
        super().__init__(rate)
        self.target, self.base = _number("target", target, 0.0, strict=True), self.current
        self.gain = _number("gain", gain, 0.0, strict=True)
        self.integral = _number("integral", integral, 0.0, strict=True)
        self.low, self.high = (_number("bounds", b, 0.0) for b in bounds)
        if not self.low <= self.current <= self.high:
            raise ValueError(f"rate={rate} must lie within bounds={bounds}")
        self.slew = slew if slew == math.inf else _number("slew", slew, 0.0, strict=True)
        self.deadband = _number("deadband", deadband, 0.0)
        self.patience = int(_number("patience", patience, 1.0))
        self.sum = 0.0
        self._saturated: list[float] = []

    def _decide(self, value: float) -> tuple[float, str]:
        """Control the rate."""
        error = math.log(_number("value", value, 0.0, strict=True) / self.target)
        if abs(error) <= self.deadband:
            error = 0.0
        summed = self.sum + error / self.integral
        wanted = self.base + self.gain * (error + summed)
        bounded = min(max(wanted, self.low), self.high)
        if bounded == wanted or (wanted - bounded) * error <= 0:
            self.sum = summed  # else the rate is at its bound, and a longer sum would wind up
        change = min(max(bounded - self.current, -self.slew), self.slew)
        self._watch_authority(value, saturated=wanted >= self.high)
        return self.current + change, self._reason(error, bounded != wanted, change)

    def _reason(self, error: float, bound: bool, change: float) -> str:
        """Name what decided."""
        if error == 0:
            return "within the deadband"
        if abs(change) == self.slew:
            return "slew limit"
        return "at a bound" if bound else "held"

    def _watch_authority(self, value: float, saturated: bool) -> None:
        """Warn where the highest rate has no effect."""
        self._saturated = [*self._saturated, value] if saturated else []
        if len(self._saturated) == self.patience + 1:
            first, last = self._saturated[0], self._saturated[-1]
            if last > first * (1 - AUTHORITY):
                warnings.warn(
                    f"the decay has no authority: {self.patience} updates at its upper bound "
                    f"{self.high} have moved the ratio from {first:.4g} to {last:.4g}. Decay that "
                    "shrinks both factors alike does not change it; it acts only together with "
                    "the loss",
                    RuntimeWarning,
                    stacklevel=4,
                )

    def state_dict(self) -> dict[str, Any]:
        """Give what a resumed run needs, in plain numbers and strings."""
        return super().state_dict() | {"sum": self.sum, "saturated": list(self._saturated)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state."""
        super().load_state_dict(state)
        self.sum, self._saturated = float(state["sum"]), [float(v) for v in state["saturated"]]


class OffWhenLevel(Feedback):
    """Switch off, for good, when a measured quantity has levelled off.

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
        self.window = int(_number("window", window, 2.0))
        self.tol, self.earliest = _number("tol", tol, 0.0), int(_number("earliest", earliest, 0.0))

    def _decide(self, value: float) -> tuple[float, str]:
        """Compare the last values."""
        if self.current == 0:
            return 0.0, "off"
        seen = [row["value"] for row in self.log if not math.isnan(row["value"])]
        last = [*seen, value][-self.window :]
        if len(last) < self.window or len(seen) + 1 < self.earliest:
            return self.current, "too early"
        if max(last) - min(last) <= self.tol * max(abs(v) for v in last):
            return 0.0, "level: switched off"
        return self.current, "still moving"


class OffAtBudget(Feedback):
    """Switch off, for good, once a budget has been absorbed.

    Parameters
    ----------
    rate : float
        The rate until then, >= 0.
    budget : float
        The largest -a_T = sum of lr x decay, > 0: feed it ``-min(scheduler.accumulated)``.

    Examples
    --------
    >>> off = OffAtBudget(0.1, budget=0.5)
    >>> off.update(10, 0.3), off.update(20, 0.5)
    (0.1, 0.0)
    """

    def __init__(self, rate: float, budget: float) -> None:
        super().__init__(rate)
        self.budget = _number("budget", budget, 0.0, strict=True)

    def _decide(self, value: float) -> tuple[float, str]:
        """Compare with the budget."""
        if self.current == 0:
            return 0.0, "off"
        if value >= self.budget:
            return 0.0, "budget absorbed: switched off"
        return self.current, "within the budget"


def _number(name: str, value: Any, low: float, strict: bool = False) -> float:
    """Give a finite number that is not too small."""
    number = float(value)
    if not math.isfinite(number) or number < low or (strict and number == low):
        raise ValueError(
            f"{name} must be a number {'>' if strict else '>='} {low:g}, got {value!r}"
        )
    return number
