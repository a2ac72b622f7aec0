r"""What the rate of a schedule means: from the rate to the ``weight_decay`` of an optimizer.

A convention says by which fraction the weights shall shrink in a step; how the optimizer decays
(`coupling.KINDS`) says which number makes them do so.

=============  ==================  ===========================  =====================
convention     fraction of a step  number, where lr x number    number, where number
                                   acts (AdamW, SGD)            itself acts ("fixed")
=============  ==================  ===========================  =====================
(none)         as the optimizer    rate                         rate
follow-lr      lr rate             rate                         lr rate
fixed          rate                rate / lr                    rate
adamc          lr^2 / peak rate    lr / peak rate               lr^2 / peak rate
schedule-only  lr / peak rate      rate / peak                  lr / peak rate
=============  ==================  ===========================  =====================

``peak`` is the highest learning rate of the run. "schedule-only" is the decay of the AdamW paper
and of Composer, which follows the shape of the learning rate and not its size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

__all__ = ["CONVENTIONS", "NEED_PEAK", "UnknownPeakError", "acting", "number_for", "peak_lr"]

# The fraction that lr x number shall make, divided by lr: (rate, lr, peak) -> number.
_NUMBER: dict[str, Callable[[float, float, float], float]] = {
    "follow-lr": lambda rate, lr, peak: rate,
    "fixed": lambda rate, lr, peak: rate / lr if lr else 0.0,  # nothing can act where lr is 0
    "adamc": lambda rate, lr, peak: rate * (lr / peak) if peak else 0.0,
    "schedule-only": lambda rate, lr, peak: rate / peak if peak else 0.0,
}
NEED_PEAK = ("adamc", "schedule-only")
_ABOVE = 1 + 1e-6  # a learning rate may exceed its peak by rounding


class UnknownPeakError(ValueError):
    """Nothing says yet how high the learning rate of the run will be."""


def number_for(
    convention: str | None, rate: float, lr: float, peak: float, kind: str = "decoupled"
) -> float:
    """Give the ``weight_decay`` that makes a rate act; ``CONVENTIONS[name]`` is this by its name.

    Parameters
    ----------
    convention : str or None
        One of the rows above; None: the rate is the optimizer's own number.
    rate, lr, peak : float
        The rate of the schedule, the learning rate of this step and its peak, >= 0.
    kind : str
        How the decay of the optimizer acts, one of ``coupling.KINDS``. L2 in the gradient is
        taken for lr x decay, which is what it comes to in SGD; of "unknown" nothing else is known.

    Examples
    --------
    >>> number_for("fixed", 0.125, lr=0.5, peak=0.5, kind="decoupled")
    0.25
    >>> number_for("fixed", 0.125, lr=0.5, peak=0.5, kind="fixed")
    0.125
    """
    if convention is None:
        return rate
    if kind != "fixed":
        return _NUMBER[convention](rate, lr, peak)
    return rate if convention == "fixed" else lr * _NUMBER[convention](rate, lr, peak)


CONVENTIONS = {name: partial(number_for, name) for name in _NUMBER}


def acting(number: float, lr: float, kind: str) -> float:
    """Give the fraction by which a ``weight_decay`` shrinks the weights in a step.

    Examples
    --------
    >>> acting(0.5, lr=0.25, kind="decoupled"), acting(0.5, lr=0.25, kind="fixed")
    (0.125, 0.5)
    """
    return number if kind == "fixed" else lr * number


def peak_lr(group: Mapping[str, Any], peak: float | None = None) -> float:
    """Give the highest learning rate of the run of a parameter group.

    Parameters
    ----------
    group : mapping
        The live group. Without ``peak`` its ``max_lr`` counts (OneCycleLR), else its
        ``initial_lr``, which every learning-rate scheduler writes and most start or warm up to.
    peak : float, optional
        What the user says.

    Raises
    ------
    UnknownPeakError
        If nothing says it; a learning-rate scheduler that is made later will.
    ValueError
        If the learning rate is higher than that.

    Examples
    --------
    >>> peak_lr({"lr": 0.01, "initial_lr": 0.1}), peak_lr({"lr": 0.01}, peak=0.5)
    (0.1, 0.5)
    """
    lr = float(group["lr"])
    found = peak if peak is not None else group.get("max_lr", group.get("initial_lr"))
    if found is None:
        raise UnknownPeakError(
            f"the peak of the learning rate is not known: no learning-rate scheduler has written "
            f"it to the parameter group. Give it: peak={lr:g} if the learning rate never rises "
            "above what it is now, or make the learning-rate scheduler first"
        )
    if not (math.isfinite(float(found)) and found > 0 and lr <= _ABOVE * float(found)):
        raise ValueError(
            f"the learning rate {lr:g} is above its peak {float(found):g}, by which this "
            "convention divides: give the highest learning rate of the run, "
            "peak=max(learning_rates(lr_scheduler, steps))"
        )
    return float(found)
