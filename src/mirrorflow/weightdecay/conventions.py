r"""Conventions of a rate: the ``weight_decay`` it stands for, and the decay that acts.

A convention says by which fraction the weights shall shrink in a step; how the optimizer decays
(`coupling.COUPLINGS`) says which number makes them do so.

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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ..schedule import Schedule
from .coupling import COUNTED
from .feedback import as_float

__all__ = [
    "CONVENTIONS",
    "NEED_PEAK",
    "EffectiveDecay",
    "NoValueError",
    "UnknownPeakError",
    "decay_of",
    "effective_decay",
    "lr_of",
    "number_for",
    "peak_lr",
    "rate_at",
    "read_effective",
    "set_decay",
    "shrink",
    "strength",
    "tensors",
]


@dataclass(frozen=True)
class Convention:
    """What a rate means.

    Parameters
    ----------
    number : callable (rate, lr, peak) -> float
        The number that makes it act where lr x number acts: the fraction of a step, divided by lr.
    needs_peak : bool
        Whether the highest learning rate of the run matters.
    """

    number: Callable[[float, float, float], float]
    needs_peak: bool = False


_BY_NAME = {
    "follow-lr": Convention(lambda rate, lr, peak: rate),
    "fixed": Convention(lambda rate, lr, peak: rate / lr if lr else 0.0),  # lr = 0: nothing acts
    "adamc": Convention(lambda rate, lr, peak: rate * (lr / peak) if peak else 0.0, True),
    "schedule-only": Convention(lambda rate, lr, peak: rate / peak if peak else 0.0, True),
}
NEED_PEAK = tuple(name for name, convention in _BY_NAME.items() if convention.needs_peak)
_ABOVE = 1 + 1e-6  # a learning rate may exceed its peak by rounding


class NoValueError(RuntimeError):
    """A schedule has no value at a step, because it is shorter than the run."""


class UnknownPeakError(ValueError):
    """The highest learning rate of the run is not known yet."""


def number_for(
    convention: str | None, rate: float, lr: float, peak: float, coupling: str = "decoupled"
) -> float:
    """Return the ``weight_decay`` that makes a rate act; ``CONVENTIONS[name]`` is this by its name.

    Parameters
    ----------
    convention : str or None
        One of the rows above; None: the rate is the optimizer's own number.
    rate, lr, peak : float
        The rate of the schedule, the learning rate of this step and its peak, >= 0.
    coupling : str
        How the decay of the optimizer acts, one of ``coupling.COUPLINGS``. L2 in the gradient is
        taken for lr x decay, which is what it comes to in SGD; of "unknown" nothing else is known.

    Examples
    --------
    >>> number_for("fixed", 0.125, lr=0.5, peak=0.5, coupling="decoupled")
    0.25
    >>> number_for("fixed", 0.125, lr=0.5, peak=0.5, coupling="fixed")
    0.125
    """
    if convention is None:
        return rate
    if coupling != "fixed":
        return _BY_NAME[convention].number(rate, lr, peak)
    return rate if convention == "fixed" else lr * _BY_NAME[convention].number(rate, lr, peak)


CONVENTIONS = {name: partial(number_for, name) for name in _BY_NAME}


def effective_decay(number: float, lr: float, coupling: str) -> float:
    """Return the fraction by which a ``weight_decay`` shrinks the weights in a step.

    Examples
    --------
    >>> [effective_decay(0.5, lr=0.25, coupling=how) for how in ("decoupled", "fixed")]
    [0.125, 0.5]
    """
    return number if coupling == "fixed" else lr * number


def peak_lr(group: Mapping[str, Any], peak: float | None = None) -> float:
    """Return the highest learning rate of the run of a parameter group.

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
            "the peak of the learning rate is not known: no learning-rate scheduler has written it "
            f"to the parameter group. Set peak={lr:g} if the learning rate never rises above its "
            "present value, or make the learning-rate scheduler first"
        )
    top = as_float("peak", found)
    if not (math.isfinite(top) and top > 0 and lr <= _ABOVE * top):
        raise ValueError(
            f"the learning rate {lr:g} is above its peak {top:g}, by which this "
            "convention divides. Set the highest learning rate of the run, "
            "peak=max(learning_rates(lr_scheduler, steps))"
        )
    return top


def rate_at(schedule: Any, step: int) -> float:
    """Return the rate of a schedule at an optimizer step, a Python float >= 0.

    Examples
    --------
    >>> from mirrorflow import SwitchOff
    >>> rate_at(SwitchOff(0.1, at=10), 9), rate_at(lambda step: 1 / (step + 1), 3)
    (0.1, 0.25)
    """
    try:
        value = schedule.rate(float(step)) if isinstance(schedule, Schedule) else schedule(step)
    except (LookupError, StopIteration) as error:  # a list, table or iterator that has ended
        raise NoValueError(
            f"the decay schedule {schedule!r} has no value at step {step}: if it is shorter than "
            "the run, let it keep its last value"
        ) from error
    try:
        rate = float(value)
    except (TypeError, ValueError, RuntimeError) as error:  # of a string, or of several elements
        raise TypeError(
            f"the decay schedule {schedule!r} gives {value!r} at step {step}: a weight decay is a "
            "number"
        ) from error
    if not (math.isfinite(rate) and rate >= 0):
        raise ValueError(
            f"the decay schedule {schedule!r} gives {rate} at step {step}: "
            "a weight decay is a finite number >= 0"
        )
    return rate


# The number that a rate comes to in a group, and the decay that acts.
#
# An optimizer that shrinks by lr x decay and one that shrinks by the decay alone need different
# numbers for the same effect, so that a convention about what the rate means has to know the
# coupling.

_SETTINGS = ("momentum", "dampening", "nesterov")  # what the ledger of SGD depends on, beside lr


def lr_of(group: Mapping[str, Any]) -> float:
    """Return the learning rate of a group; NaN where the optimizer makes its own.

    Examples
    --------
    >>> lr_of({"lr": torch.tensor(0.5)}), lr_of({"lr": None}), lr_of({})
    (0.5, nan, nan)
    """
    lr = group.get("lr")
    return math.nan if lr is None else float(lr)


def decay_of(
    rate: float,
    group: Mapping[str, Any],
    coupling: str,
    convention: str | None,
    peak: float | None = None,
) -> float:
    r"""Return the number that makes a rate act as the decay of an optimizer.

    Parameters
    ----------
    rate : float
        What the schedule gives, >= 0.
    group : mapping
        The settings of the group.
    coupling : str
        How the decay of the group acts, one of ``coupling.COUPLINGS``.
    convention : str or None
        What the rate means; None: the optimizer's own number.
    peak : float, optional
        The highest learning rate of the run, where the convention asks for it, as for `peak_lr`.

    Raises
    ------
    ValueError
        If the convention needs a learning rate, and the group has none.

    Examples
    --------
    An optimizer whose coupling is "fixed" shrinks by its decay, whatever the learning rate:

    >>> group = {"lr": 0.5}
    >>> [decay_of(0.1, group, "decoupled", c) for c in (None, "follow-lr", "fixed")]
    [0.1, 0.1, 0.2]
    >>> [decay_of(0.1, group, "fixed", c) for c in (None, "follow-lr", "fixed")]
    [0.1, 0.05, 0.1]
    """
    if convention is None or (convention == "fixed" and coupling == "fixed"):
        return rate
    lr = lr_of(group)
    if math.isnan(lr):
        raise ValueError(
            f"convention={convention!r} needs a learning rate, and a parameter group has none "
            "(lr=None: the optimizer finds its own step size): leave convention= out"
        )
    top = peak_lr(group, peak) if convention in NEED_PEAK else lr
    return number_for(convention, rate, lr, top, coupling)


def strength(decay: float, group: Mapping[str, Any], coupling: str) -> float:
    """Return the part of the weights that a step takes away; NaN where that is not known.

    Examples
    --------
    >>> strength(0.1, {"lr": 0.5}, "decoupled"), strength(0.1, {"lr": 0.5}, "fixed")
    (0.05, 0.1)
    """
    return effective_decay(decay, lr_of(group), coupling) if coupling in COUNTED else math.nan


@dataclass(frozen=True)
class EffectiveDecay:
    """The decay that acts on one set of tensors in a step, read before the optimizer takes it.

    Parameters
    ----------
    decay : float
        The decay, the optimizer's own or from outside.
    settings : mapping
        lr, and for SGD momentum, dampening and nesterov.
    params : list of Tensor
        The tensors.
    still : list of int
        The places of the tensors that have no gradient; the step leaves them alone.
    """

    decay: float
    settings: Mapping[str, Any]
    params: list[torch.Tensor]
    still: list[int]

    @property
    def moved(self) -> bool:
        """Whether any of the tensors has a gradient."""
        return len(self.still) < len(self.params)


def read_effective(
    decay: float | None, group: Mapping[str, Any], positions: Sequence[int] | None = None
) -> EffectiveDecay:
    """Return what acts now on tensors of a group: the decay given, or the group's own.

    Parameters
    ----------
    decay : float or None
        The decay from outside; None for the group's own.
    group : mapping
        The live group.
    positions : sequence of int, optional
        The places of the tensors in the group; all of them by default.

    Examples
    --------
    >>> found = read_effective(None, {"params": [], "lr": 0.5, "weight_decay": torch.tensor(0.25)})
    >>> found.decay, found.settings, found.moved
    (0.25, {'lr': 0.5}, False)
    """
    settings = {"lr": lr_of(group)}
    for key in _SETTINGS:
        if key in group:
            settings[key] = group[key]
    acts = float(group["weight_decay"]) if decay is None else decay
    params = tensors(group, positions)
    still = [place for place, p in enumerate(params) if p.grad is None]
    return EffectiveDecay(acts, settings, params, still)


def set_decay(group: dict[str, Any], decay: float) -> None:
    """Set the decay of a group that has one; a tensor in place, since a graph may hold it."""
    if isinstance(group.get("weight_decay"), torch.Tensor):
        group["weight_decay"].fill_(decay)
    elif "weight_decay" in group:
        group["weight_decay"] = decay


def tensors(group: Mapping[str, Any], positions: Sequence[int] | None = None) -> list[torch.Tensor]:
    """Return the tensors of a live group at these places, or all of them."""
    params = group["params"]
    return params if positions is None else [params[i] for i in positions]


_HALF = (torch.bfloat16, torch.float16)


@torch.no_grad()
def shrink(params: list[torch.Tensor], factor: float) -> None:
    """Multiply parameters, in place: w <- factor w.

    Examples
    --------
    >>> w = torch.ones(2)
    >>> shrink([w], 0.5)
    >>> w
    tensor([0.5000, 0.5000])
    """
    if factor == 1:
        return
    # On a CPU foreach rounds the factor to the precision of the weights: in bfloat16 0.99 is
    # 0.98828, and decay is a sixth more than it should be. mul_ computes in float32.
    half, rest = [], []
    for p in params:
        (half if p.dtype in _HALF and p.device.type == "cpu" else rest).append(p)
    for p in half:
        p.mul_(factor)
    if rest:
        torch._foreach_mul_(rest, factor)  # pyright: ignore[reportPrivateImportUsage]
