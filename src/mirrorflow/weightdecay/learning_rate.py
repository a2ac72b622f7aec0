"""The learning rates of a run that has not begun: a copy of the scheduler, stepped ahead."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .arguments import whole
from .checks import inner

__all__ = ["ahead", "as_scheduler", "learning_rates", "shadow"]


def learning_rates(scheduler: LRScheduler, steps: int, group: int = 0) -> list[float]:
    """Give the learning rates of a parameter group over the next steps of a scheduler.

    Parameters
    ----------
    scheduler : LRScheduler
        Any that steps without a metric; neither it nor its optimizer is changed.
    steps : int
        How many.
    group : int
        Of which parameter group.

    Raises
    ------
    TypeError
        If it is no learning-rate scheduler.
    ValueError
        If it needs a metric to step (ReduceLROnPlateau).

    Examples
    --------
    >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.5)
    >>> learning_rates(torch.optim.lr_scheduler.StepLR(optimizer, step_size=2), 4)
    [0.5, 0.5, 0.05, 0.05]
    """
    steps, found = whole("steps", steps), as_scheduler(scheduler)
    if found is None:
        raise TypeError(
            f"learning_rates takes a torch learning-rate scheduler, got {type(scheduler).__name__}"
        )
    optimizer = inner(found.optimizer)
    copied = shadow(optimizer)
    moved = ahead(copied, optimizer, found, steps)
    return [float(copied.param_groups[group]["lr"]) for _ in moved]


def as_scheduler(lr: Any) -> LRScheduler | None:
    """Give a torch scheduler, out of accelerate's wrapper too; None if it is none."""
    while not isinstance(lr, LRScheduler) and hasattr(lr, "scheduler"):
        lr = lr.scheduler
    return lr if isinstance(lr, LRScheduler) else None


def shadow(optimizer: Optimizer) -> Optimizer:
    """Make an optimizer with the settings of each group, and a single number for its weights."""
    groups = []
    for group in optimizer.param_groups:
        settings = {k: v for k, v in group.items() if k not in ("params", "param_names")}
        groups.append(copy.deepcopy(settings) | {"params": [torch.zeros((), requires_grad=True)]})
    return torch.optim.SGD(groups, lr=1.0)


def ahead(copied: Optimizer, optimizer: Optimizer, lr: Any, steps: int) -> Iterator[None]:
    """Yield at each step, with its learning rates in the groups of the shadow.

    Parameters
    ----------
    copied : Optimizer
        The `shadow` of the optimizer.
    optimizer : Optimizer
        Whose learning rates they are.
    lr : LRScheduler, iterable of float, or None
        The scheduler, stepped after each step; the learning rate of each step for all groups; or
        None, so that it stays as it is.
    steps : int
        How many.
    """
    scheduler = as_scheduler(lr)
    if scheduler is not None:
        scheduler = _copied(scheduler, optimizer, copied)
    elif lr is not None:
        rates = _rates(lr, steps)
    for step in range(steps):
        if scheduler is not None and step:
            _step(scheduler)
        elif scheduler is None and lr is not None:
            for group in copied.param_groups:
                group["lr"] = rates[step]
        yield


def _rates(lr: Any, steps: int) -> list[float]:
    """Give the learning rates of the steps, from what the user gave."""
    if not isinstance(lr, Iterable) or isinstance(lr, (str, bytes)):
        raise TypeError(
            f"lr: a learning-rate scheduler or the learning rate of each step is needed, got {lr!r}"
        )
    rates = [float(rate) for _, rate in zip(range(steps), lr, strict=False)]
    if len(rates) < steps:
        raise ValueError(f"{len(rates)} learning rates for {steps} steps")
    return rates


def _copied(scheduler: LRScheduler, optimizer: Optimizer, copied: Optimizer) -> LRScheduler:
    """Copy a scheduler, with the shadow in the place of its optimizer."""
    name, theirs = type(scheduler).__name__, scheduler.optimizer
    if inner(theirs) is not optimizer:
        raise ValueError(f"this {name} belongs to another optimizer: give the one of this")
    needed = [
        parameter.name
        for parameter in inspect.signature(scheduler.step).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    if needed:
        raise ValueError(
            f"{name} answers to {', '.join(needed)}, which nobody knows before the run: give the "
            "learning rates that you expect, one for each step, instead of the scheduler"
        )
    return copy.deepcopy(scheduler, {id(optimizer): copied, id(theirs): copied})


def _step(scheduler: LRScheduler) -> None:
    """Step a copied scheduler, whose optimizer takes no steps."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of step() before optimizer.step()
        scheduler.step()
