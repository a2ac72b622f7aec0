r"""Ratio controllers: proportional and integral control of the decay, for one loop or many."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from .feedback import Feedback, number, reachable, whole

__all__ = ["HoldRatio", "PerLayer"]

GAIN = 16.0  # in multiples of the rate to begin with: the best of the experiment beyond_gain
AUTHORITY = 0.01  # relative change of the value below which a saturated decay has done nothing


class HoldRatio(Feedback):
    r"""A rate that holds a measured ratio at a target, by proportional and integral control.

    .. math:: r = r_0 + K (e + \tfrac{1}{T} \sum e), \quad e = \log(\text{value} / \text{target})

    More decay lowers the ratio of nuclear to Frobenius norm, so a ratio above the target raises
    the rate. The sum follows what acts: it stops at a bound, and under the slew limit it goes no
    further than the rate has come, so that an error which turns is answered at once.

    Parameters
    ----------
    target : float
        The ratio, > 0 and not below ``lowest``.
    rate : float
        The rate r_0 to begin with, >= 0.
    gain : float, optional
        K, > 0: the change of the rate for a ratio e times the target. By default 16 times ``rate``,
        with which small factorized regressions ended nearest to their targets without running into
        a bound (experiment ``beyond_gain``).
    integral : float
        T, > 0: the number of updates in which a lasting error is added once more.
    bounds : (float, float)
        The lowest and the highest rate.
    slew : float
        The largest change in one update, > 0.
    deadband : float
        Relative errors smaller than this are taken as 0, >= 0.
    patience : int
        After so many updates in a row at which the upper bound has acted without an effect, the
        decay has no authority: it shrinks both factors alike, which does not change the ratio. A
        warning says so, and the loop gives up: the rate goes back to ``rate`` and stays there.
    lowest : float
        The lowest value that the quantity can have, as in `OffBelow`: 1 for the ratio and for
        ranks; 0 for norms and losses.

    Notes
    -----
    The reasons in the log say what the rate does: "raising", "lowering" or "unchanged" (with
    ", slew limit" where that holds it back), "at its upper bound", "at its lower bound", "within
    the deadband", "without authority: given up". Only the deadband means that the target is
    held.

    Examples
    --------
    >>> hold = HoldRatio(target=3.0, rate=0.1)
    >>> hold.gain, hold.update(50, value=4.0) > 0.1
    (1.6, True)
    >>> hold.log[-1]["reason"]
    'raising'
    >>> hold.outcome().partition(";")[0]
    'not held: the target is 3, the last value 4, 33.3% above'
    """

    def __init__(
        self,
        target: float,
        rate: float,
        gain: float | None = None,
        *,
        integral: float = 10.0,
        bounds: tuple[float, float] = (0.0, 1.0),
        slew: float = math.inf,
        deadband: float = 0.02,
        patience: int = 10,
        lowest: float = 1.0,
    ) -> None:
        super().__init__(rate)
        self.target = reachable(number("target", target, 0.0, strict=True), lowest)
        self.base = self.current
        if gain is None and self.base == 0:
            raise ValueError("gain must be given where rate is 0, got None. Pass gain=0.1, say.")
        self.gain = number("gain", GAIN * self.base if gain is None else gain, 0.0, strict=True)
        self.integral = number("integral", integral, 0.0, strict=True)
        self.low, self.high = _ordered(bounds)
        if not self.low <= self.current <= self.high:
            raise ValueError(f"rate={rate} must lie within bounds={bounds}")
        self.slew = slew if slew == math.inf else number("slew", slew, 0.0, strict=True)
        self.deadband = number("deadband", deadband, 0.0)
        self.patience = whole("patience", patience)
        self.sum, self.given_up = 0.0, False
        self._saturated, self._since = 0, 0.0  # for so many updates, since the ratio had this value

    def _decide(self, value: float) -> tuple[float, str]:
        """Return the controlled rate."""
        # r = r_0 + K (e + sum e / T),  e = log(value / target)
        error = math.log(number("value", value, 0.0, strict=True) / self.target)
        if self.given_up:
            return self._slewed(self.base), "without authority: given up"
        if abs(error) <= self.deadband:
            error = 0.0
        summed = self.sum + error / self.integral
        wanted = self.base + self.gain * (error + summed)
        bounded = min(max(wanted, self.low), self.high)
        # r = r_0 + K (e + S), S the sum; the bounds first, then the slew limit.
        acting = self._slewed(bounded)
        if self._has_no_authority(value, saturated=error > 0 and acting == self.high):
            return self._slewed(self.base), "without authority: given up"
        self.sum = self._held_back(error, summed, wanted, acting) if acting != wanted else summed
        return acting, self._reason(error, bounded, wanted, acting)

    def _held_back(self, error: float, summed: float, wanted: float, acting: float) -> float:
        """Return the sum where bounds or slew limit keep the rate from what is wanted."""
        further = (wanted - acting) * error > 0  # the error asks for more of what it does not get
        if acting in (self.low, self.high):
            return self.sum if further else summed
        alone = (acting - self.base) / self.gain  # with this sum, and no error, the rate would act
        if further:
            return min(summed, alone) if error > 0 else max(summed, alone)
        # The error shrinks faster than the slew limit lets the rate go back. What is left of the
        # way is given up, or the rate would go it after the error has turned.
        return alone - error

    def _slewed(self, rate: float) -> float:
        """Return the rate nearest to this one that an update may go to."""
        return min(max(rate, self.current - self.slew), self.current + self.slew)

    def _reason(self, error: float, bounded: float, wanted: float, acting: float) -> str:
        """Return what the rate does, and what decided."""
        if error == 0:
            return "within the deadband"
        if acting == bounded != wanted:
            return "at its upper bound" if wanted > bounded else "at its lower bound"
        moves = "unchanged" if acting == self.current else "lowering"
        moves = "raising" if acting > self.current else moves
        return f"{moves}, slew limit" if acting != bounded else moves

    def outcome(self) -> str:
        """Return in a sentence what the rate has done, and how far off its target the value is."""
        values = [row["value"] for row in self.log if math.isfinite(row["value"])]
        if not values:
            return super().outcome()
        off = values[-1] / self.target - 1  # e = log(value / target) = log1p(off)
        said = "held" if abs(math.log1p(off)) <= self.deadband else "not held"
        where = f"{abs(off):.1%} {'above' if off > 0 else 'below'}"
        counts = Counter(row["reason"].split(",")[0] for row in self.log)
        did = ", ".join(f"{reason} {count}" for reason, count in counts.most_common())
        return (
            f"{said}: the target is {self.target:.4g}, the last value {values[-1]:.4g}, {where}; "
            f"the rate is {self.current:.4g}; of {len(self.log)} updates: {did}"
        )

    def _has_no_authority(self, value: float, saturated: bool) -> bool:
        """Return whether the highest rate acts without an effect; warn, and give up, if it does."""
        if not saturated:
            self._saturated = 0
            return False
        if self._saturated == 0:
            self._since = value
        self._saturated += 1
        if self._saturated <= self.patience:
            return False
        first, self._saturated = self._since, 0
        self.given_up = value > first * (1 - AUTHORITY)  # the upper bound has not lowered it
        if self.given_up:
            warnings.warn(
                f"the decay has no authority: {self.patience} updates at its upper bound "
                f"{self.high} have moved what is measured from {first:.4g} to {value:.4g}. Decay "
                "that shrinks both factors alike does not change their ratio; it acts only "
                f"together with the loss. The rate goes back to {self.base}",
                RuntimeWarning,
                stacklevel=4,
            )
        return self.given_up

    def _memory(self) -> tuple[float, ...]:
        """Return the sum, and what is known of the authority."""
        return self.sum, float(self._saturated), self._since, float(self.given_up)

    def _recall(self, *memory: float) -> None:
        """Take them back."""
        self.sum, saturated, self._since, given_up = memory
        self._saturated, self.given_up = int(saturated), bool(given_up)


def _ordered(bounds: Any) -> tuple[float, float]:
    """Return the lowest and the highest rate."""
    if not isinstance(bounds, Sequence) or isinstance(bounds, str) or len(bounds) != 2:
        raise TypeError(f"bounds must be the lowest and the highest rate, got {bounds!r}")
    low, high = (number("bounds", bound, 0.0) for bound in bounds)
    if low > high:
        raise ValueError(f"bounds must ascend, the lowest rate first, got {bounds}")
    return low, high


# A closed loop for each layer: its own measurement, its own rate.


class PerLayer:
    """A loop for each layer, which acts on its weights and answers to its measurement.

    Parameters
    ----------
    make : callable name -> Feedback
        Makes the loop of a layer. Each has bounds, slew limit, deadband and a log of its own.

    Attributes
    ----------
    loops : dict of str to Feedback
        By the name of the layer, once `rules` has been called.

    Examples
    --------
    >>> from mirrorflow.weightdecay import HoldRatio, WeightDecayScheduler
    >>> layers = {"first": [torch.nn.Parameter(torch.ones(2, 2))],
    ...           "second": [torch.nn.Parameter(torch.ones(2, 2))]}
    >>> optimizer = torch.optim.AdamW(sum(layers.values(), []), lr=0.1, weight_decay=0.1)
    >>> held = PerLayer(lambda layer: HoldRatio(target=1.5, rate=0.1, gain=0.1))
    >>> scheduler = WeightDecayScheduler(
    ...     optimizer, None, groups=held.rules(layers), decoupled=True
    ... )
    >>> rates = held.update(10, {"first": 1.9, "second": 1.5})
    >>> scheduler.step()
    >>> rates["first"] > 0.1, scheduler.get_last_weight_decay() == [rates["first"], 0.1]
    (True, True)
    """

    def __init__(self, make: Callable[[str], Feedback]) -> None:
        if not callable(make):
            raise TypeError(
                "PerLayer takes a function that makes the loop of a layer, such as "
                f"lambda layer: HoldRatio(...), got {make!r}"
            )
        self.make = make
        self.loops: dict[str, Feedback] = {}

    def rules(
        self, layers: Mapping[str, Iterable[torch.Tensor]]
    ) -> list[tuple[list[torch.Tensor], Feedback]]:
        """Make the loops, and return the rules for ``WeightDecayScheduler(decoupled=True)``.

        Parameters
        ----------
        layers : mapping of str to tensors
            The weights that the decay of each layer acts on.

        Raises
        ------
        ValueError
            If a weight belongs to two layers, whose loops would pull at it.
        """
        owner: dict[int, str] = {}
        found = {name: list(tensors) for name, tensors in layers.items()}
        for name, tensors in found.items():
            for tensor in tensors:
                if (other := owner.setdefault(id(tensor), name)) != name:
                    raise ValueError(
                        f"the layers {other!r} and {name!r} share a weight, and one decay cannot "
                        "follow two loops: leave one of them out"
                    )
        self.loops = {name: self._made(name) for name in found}
        if len({id(loop) for loop in self.loops.values()}) < len(self.loops):
            raise ValueError(
                "PerLayer: each layer needs a loop of its own, made when it is asked for"
            )
        return [(tensors, self.loops[name]) for name, tensors in found.items()]

    def _made(self, name: str) -> Feedback:
        """Return the loop of a layer; raise if it is not one."""
        loop = self.make(name)
        if not isinstance(loop, Feedback):
            raise TypeError(
                f"PerLayer: the loop of {name!r} must be a Feedback, like HoldRatio, got {loop!r}"
            )
        return loop

    def update(self, step: int, values: Mapping[str, float]) -> dict[str, float]:
        """Take the measurements of all layers, and return the rates that act from now on.

        Parameters
        ----------
        step : int
            The optimizer step they belong to.
        values : mapping of str to float
            What was measured of each layer; NaN where there is nothing to measure yet.
        """
        if missing := [name for name in self.loops if name not in values]:
            raise ValueError(f"PerLayer: no measurement of {', '.join(map(repr, missing))}")
        return {name: loop.update(step, values[name]) for name, loop in self.loops.items()}

    @property
    def log(self) -> list[dict[str, Any]]:
        """Return every decision, as rows with the name of the layer."""
        rows = [{"layer": name} | row for name, loop in self.loops.items() for row in loop.log]
        return sorted(rows, key=lambda row: row["step"])

    def state_dict(self) -> dict[str, Any]:
        """Return the states of the loops, in plain numbers and strings."""
        return {name: loop.state_dict() for name, loop in self.loops.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state of the same layers."""
        if set(state) != set(self.loops):
            raise ValueError(
                f"the state is of the layers {sorted(state)}, these are {sorted(self.loops)}"
            )
        for name, loop in self.loops.items():
            loop.load_state_dict(state[name])
