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
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from .coupling import COUNTED

__all__ = [
    "CONVENTIONS",
    "NEED_PEAK",
    "Acting",
    "UnknownPeakError",
    "acting",
    "decay_of",
    "has_gradient",
    "lr_of",
    "noted",
    "number_for",
    "peak_lr",
    "strength",
]

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


# What a rate comes to in a group: the number that is written to it, and what shrinks the weights.
#
# An optimizer that shrinks by lr x decay and one that shrinks by the decay alone need different
# numbers for the same effect, so that a convention about what the rate means has to know the
# kind.

_SETTINGS = ("momentum", "dampening", "nesterov")  # what the ledger of SGD depends on, beside lr


def lr_of(group: Mapping[str, Any]) -> float:
    """Give the learning rate of a group; NaN where the optimizer makes its own.

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
    kind: str,
    convention: str | None,
    peak: float | None = None,
) -> float:
    r"""Turn a rate into the number that an optimizer takes as its decay.

    Parameters
    ----------
    rate : float
        What the schedule gives, >= 0.
    group : mapping
        The settings of the group.
    kind : str
        How the decay of the group acts, one of ``coupling.KINDS``.
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
    An optimizer of the kind "fixed" shrinks by its decay, whatever the learning rate:

    >>> group = {"lr": 0.5}
    >>> [decay_of(0.1, group, "decoupled", c) for c in (None, "follow-lr", "fixed")]
    [0.1, 0.1, 0.2]
    >>> [decay_of(0.1, group, "fixed", c) for c in (None, "follow-lr", "fixed")]
    [0.1, 0.05, 0.1]
    """
    if convention is None or (convention == "fixed" and kind == "fixed"):
        return rate
    lr = lr_of(group)
    if math.isnan(lr):
        raise ValueError(
            f"convention={convention!r} needs a learning rate, and a parameter group has none "
            "(lr=None: the optimizer finds its own step size): leave convention= out"
        )
    top = peak_lr(group, peak) if convention in NEED_PEAK else lr
    return number_for(convention, rate, lr, top, kind)


def strength(decay: float, group: Mapping[str, Any], kind: str) -> float:
    """Give the part of the weights that a step takes away; NaN where that is not known.

    Examples
    --------
    >>> strength(0.1, {"lr": 0.5}, "decoupled"), strength(0.1, {"lr": 0.5}, "fixed")
    (0.05, 0.1)
    """
    return acting(decay, lr_of(group), kind) if kind in COUNTED else math.nan


@dataclass(frozen=True)
class Acting:
    """What acts on one set of tensors in a step, read before the optimizer takes it.

    Parameters
    ----------
    decay : float
        The decay, by the optimizer or from outside.
    settings : mapping
        lr, and for SGD momentum, dampening and nesterov.
    moved : bool
        Whether any of the tensors has a gradient; the others are left alone.
    """

    decay: float
    settings: Mapping[str, Any]
    moved: bool


def noted(decay: float | None, group: Mapping[str, Any], params: Iterable[torch.Tensor]) -> Acting:
    """Note what acts now: the decay given, or that of the group.

    Examples
    --------
    >>> w = torch.ones(2)
    >>> noted(None, {"lr": 0.5, "weight_decay": torch.tensor(0.25)}, [w])
    Acting(decay=0.25, settings={'lr': 0.5}, moved=False)
    """
    settings = {"lr": lr_of(group)} | {k: group[k] for k in _SETTINGS if k in group}
    acts = float(group["weight_decay"]) if decay is None else decay
    return Acting(acts, settings, has_gradient(params))


def has_gradient(params: Iterable[torch.Tensor]) -> bool:
    """Tell whether a step moves any of the tensors."""
    return any(p.grad is not None for p in params)
