r"""What a rate comes to in a group: the number that is written to it, and what shrinks the weights.

An optimizer that shrinks by lr x decay and one that shrinks by the decay alone need different
numbers for the same effect, so that a convention about what the rate means has to know the kind.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .conventions import NEED_PEAK, acting, number_for, peak_lr
from .coupling import COUNTED

__all__ = ["Acting", "decay_of", "has_gradient", "lr_of", "noted", "strength"]

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
