r"""The units of a weight decay, and schedules of equal budget.

A step with learning rate lr and decay lambda shrinks a weight by ``1 - lr lambda``; only the
product acts. Over a run its sum is the budget, ``sum_t lr_t lambda_t = -a_T``.
"""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, TypedDict, Unpack, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..schedule import Schedule
from ._checks import check_momentum, inner, one_of
from ._targets import check_schedule
from .conventions import (
    CONVENTIONS,
    NEED_PEAK,
    effective_decay,
    number_for,
    peak_lr,
    rate_at,
)
from .feedback import Feedback, as_float, number, whole

__all__ = [
    "CONVENTIONS",
    "UNITS",
    "Scaled",
    "ScaledFunction",
    "ahead",
    "as_scheduler",
    "budget",
    "check_owner",
    "convert",
    "learning_rates",
    "listed_rates",
    "scale_to_budget",
    "shadow",
]

_TO_STEP: dict[str, Callable[[float, float, int], float]] = {
    "decay": lambda value, lr, steps: value * lr,
    "per step": lambda value, lr, steps: value,
    # (1 - x)^n = 1/2, so that x = 1 - 2^{-1/n}: expm1 and log1p keep the digits of a small x.
    "half-life": lambda value, lr, steps: -math.expm1(-math.log(2) / value),
    "time scale": lambda value, lr, steps: 1 / value,
    "budget": lambda value, lr, steps: value / steps,
}
_FROM_STEP: dict[str, Callable[[float, float, int], float]] = {
    "decay": lambda x, lr, steps: x / lr,
    "per step": lambda x, lr, steps: x,
    "half-life": lambda x, lr, steps: -math.log(2) / math.log1p(-x),
    "time scale": lambda x, lr, steps: 1 / x,
    "budget": lambda x, lr, steps: x * steps,
}
UNITS = tuple(_TO_STEP)


def convert(value: float, unit: str, to: str, *, lr: float, steps: int = 1) -> float:
    """Return a constant decay in another unit.

    Parameters
    ----------
    value : float
        The decay, > 0.
    unit, to : {"decay", "per step", "half-life", "time scale", "budget"}
        The optimizer's number; lr x decay; the steps until ``(1 - lr decay)^n = 1/2``; the steps
        ``1 / (lr decay)``; lr x decay summed over ``steps``.
    lr : float
        The learning rate, > 0.
    steps : int
        The length of the run, for the budget.

    Examples
    --------
    >>> convert(0.1, "decay", "time scale", lr=1e-3)
    10000.0
    >>> round(convert(5000, "half-life", "decay", lr=1e-3), 6)
    0.13862
    """
    for name in (unit, to):
        if name not in UNITS:
            raise ValueError(f"a unit of decay must be one of {', '.join(UNITS)}, got {name!r}")
    for name, given in (("value", value), ("lr", lr), ("steps", steps)):
        number(name, given, 0.0, strict=True)
    per_step = _TO_STEP[unit](value, lr, steps)
    if to == "half-life" and per_step >= 1:
        raise ValueError(
            f"lr x decay must be < 1 for a half-life, got {per_step}. Lower one of them"
        )
    return _FROM_STEP[to](per_step, lr, steps)


def budget(
    schedule: Any,
    lrs: Any,
    steps: int | None = None,
    *,
    convention: str | None = None,
    kind: str = "decoupled",
    momentum: float = 0.0,
    peak: float | None = None,
) -> float:
    """Return the sum of what acts over a run, lr x decay for most optimizers.

    Parameters
    ----------
    schedule : Schedule or callable step -> float
        The rate at each step.
    lrs : float, sequence of float, or LRScheduler
        The learning rate, one number or one a step; or its scheduler, from where it is (the first
        group).
    steps : int, optional
        The length of the run; needed unless ``lrs`` is a sequence.
    convention : str, optional
        What the rate means, as for `WeightDecayScheduler`; by default the optimizer's own number.
    kind : {"decoupled", "fixed", "sgd"}
        How the optimizer's decay acts, as `coupling` names it.
    momentum : float
        SGD's momentum, through which a decay acts 1 / (1 - momentum) times by and by; what it holds
        at the end of the run is not counted. `preview` also knows momentum that changes, dampening
        and Nesterov's.
    peak : float, optional
        The highest learning rate, where the convention asks for it; by default what a scheduler
        has written to the group, or the highest of ``lrs``.

    Raises
    ------
    TypeError
        If the schedule is a closed loop, which decides in the run.

    Examples
    --------
    >>> from mirrorflow import Constant, SwitchOff
    >>> budget(SwitchOff(0.5, at=50), lrs=0.25, steps=100)
    6.25
    >>> budget(Constant(0.01), lrs=[0.5, 0.25], convention="fixed")
    0.02
    """
    _check_known(schedule)
    if convention is not None:
        one_of("convention", convention, CONVENTIONS)
    one_of("kind", kind, ("decoupled", "fixed", "sgd"))  # of others no such sum says what acts
    check_momentum(momentum, kind)
    rates = _lrs(lrs, steps)
    top = _peak(lrs, rates, convention, peak)
    held, acts = 0.0, []
    for step, lr in enumerate(rates):
        decay = number_for(convention, rate_at(schedule, step), lr, top, kind)
        held = momentum * held + decay  # SGD's buffer without dampening: c <- m c + decay
        acts.append(effective_decay(held, lr, kind))
    return math.fsum(acts)  # exact: thousands of small terms


class _Settings(TypedDict, total=False):
    """The settings of a budget."""

    convention: str | None
    kind: str
    momentum: float
    peak: float | None


@overload
def scale_to_budget(
    schedule: Schedule,
    other: Any,
    lrs: Any,
    steps: int | None = None,
    **settings: Unpack[_Settings],
) -> Scaled: ...


@overload
def scale_to_budget(
    schedule: Callable[[int], float],
    other: Any,
    lrs: Any,
    steps: int | None = None,
    **settings: Unpack[_Settings],
) -> ScaledFunction: ...


def scale_to_budget(
    schedule: Any,
    other: Any,
    lrs: Any,
    steps: int | None = None,
    *,
    convention: str | None = None,
    kind: str = "decoupled",
    momentum: float = 0.0,
    peak: float | None = None,
) -> Scaled | ScaledFunction:
    """Return a schedule scaled so that it spends what another does.

    A comparison of two schedules of different budgets compares budgets.

    Parameters
    ----------
    schedule : Schedule or callable step -> float
        What to scale.
    other : Schedule or callable step -> float
        Whose budget to match.
    lrs : float, sequence of float, or LRScheduler
        The learning rate, one number or one a step, the same in both runs; or its scheduler.
    steps : int, optional
        The length of the run; needed unless ``lrs`` is a sequence.
    convention, kind, momentum, peak
        Of both runs, as for `budget`.

    Returns
    -------
    Scaled, or ScaledFunction of a function

    Examples
    --------
    >>> from mirrorflow import Constant, SwitchOff
    >>> matched = scale_to_budget(SwitchOff(1.0, at=50), Constant(0.1), lrs=0.25, steps=200)
    >>> matched.factor, matched.rate(0), matched.rate(50)
    (0.4, 0.4, 0.0)
    """
    rates = _lrs(lrs, steps)
    settings: _Settings = {"convention": convention, "kind": kind, "momentum": momentum}
    settings["peak"] = _peak(lrs, rates, convention, peak)
    own = budget(schedule, rates, **settings)
    if own == 0:
        raise ValueError(
            f"schedule must spend a budget above 0, got {schedule}, which is 0 over {len(rates)} "
            "steps. Give one that decays in them"
        )
    factor = budget(other, rates, **settings) / own
    if isinstance(schedule, Schedule):
        return Scaled(schedule, factor)
    return ScaledFunction(schedule, factor)


@dataclass(frozen=True)
class Scaled(Schedule):
    """A schedule times a number; made by `scale_to_budget`.

    Parameters
    ----------
    schedule : Schedule
        What is scaled.
    factor : float
        By how much.

    Examples
    --------
    >>> from mirrorflow import Linear
    >>> Scaled(Linear(1.0, 0.0, duration=10), 0.5).integral(10)
    2.5
    """

    schedule: Schedule
    factor: float

    @property
    def breakpoints(self) -> tuple[float, ...]:
        """Those of the schedule."""
        return self.schedule.breakpoints

    def _rate(self, t: NDArray[np.float64]) -> NDArray[np.float64]:
        return self.factor * self.schedule._rate(t)

    def _integral(self, t: NDArray[np.float64]) -> NDArray[np.float64]:
        return self.factor * self.schedule._integral(t)


@dataclass(frozen=True)
class ScaledFunction:
    """A function of the step times a number; made by `scale_to_budget`.

    Parameters
    ----------
    function : callable step -> float
        What is scaled.
    factor : float
        By how much.

    Examples
    --------
    >>> ScaledFunction(lambda step: 0.5**step, 4.0)(2)
    1.0
    """

    function: Callable[[int], float]
    factor: float

    def __call__(self, step: int) -> float:
        """Return its value at an optimizer step."""
        return self.factor * rate_at(self.function, step)  # the budget is linear in the rates


def _check_known(schedule: Any) -> None:
    """Raise unless the rates of a schedule are known before the run."""
    check_schedule(schedule)
    if isinstance(schedule, Feedback):
        raise TypeError(
            f"{type(schedule).__name__} decides in the run, so what it will spend is not known "
            "before. Run it first, and compare with what its scheduler has accumulated"
        )


def _peak(lrs: Any, rates: list[float], convention: str | None, peak: float | None) -> float:
    """Return the peak as `WeightDecayScheduler` knows it, or the highest learning rate."""
    top, scheduler = max(rates, default=0.0), as_scheduler(lrs)
    if convention not in NEED_PEAK or (peak is None and scheduler is None):
        return top
    group = {} if scheduler is None else scheduler.optimizer.param_groups[0]
    return peak_lr({**group, "lr": top}, peak)


def _lrs(lrs: Any, steps: int | None) -> list[float]:
    """Return the learning rate of each step as a list."""
    number = isinstance(lrs, Real) or getattr(lrs, "ndim", None) == 0
    scheduler = None if number else as_scheduler(lrs)
    if (number or scheduler is not None) and steps is None:
        raise ValueError(
            f"a {'single learning rate' if number else type(lrs).__name__} needs steps=, the "
            "length of the run"
        )
    steps = None if steps is None else whole("steps", steps)
    if number:
        rates = [_checked(lrs)] * (steps or 0)
    elif scheduler is not None:
        rates = learning_rates(scheduler, steps or 0)
    elif isinstance(lrs, Iterable) and not isinstance(lrs, (str, bytes, Mapping)):
        rates = [_checked(lr, step) for step, lr in enumerate(lrs)]
    else:
        raise TypeError(
            "lrs must be a number, the learning rate of each step, or a torch learning-rate "
            f"scheduler, got {lrs!r}"
        )
    if steps is not None and steps != len(rates):
        raise ValueError(f"steps={steps}, but there are {len(rates)} learning rates")
    return rates


def _checked(lr: Any, step: int = 0) -> float:
    """Return the learning rate of a step as a float, if it is one."""
    rate = as_float("a learning rate", lr)
    if not (math.isfinite(rate) and rate >= 0):
        raise ValueError(
            f"a learning rate must be a finite number >= 0, got {rate:g} at step {step}. Correct "
            "it, or the scheduler that gives it"
        )
    return rate


# The learning rates of a run that has not begun: a copy of the scheduler, stepped ahead.


def learning_rates(scheduler: LRScheduler, steps: int, group: int = 0) -> list[float]:
    """Return the learning rates of a parameter group over the next steps of a scheduler.

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
        If it is not a learning-rate scheduler.
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
    one_of("group", group, range(len(optimizer.param_groups)))
    copied = shadow(optimizer)
    moved = ahead(copied, optimizer, found, steps)
    named = f"the learning rate of parameter group {group}"
    return [as_float(named, copied.param_groups[group].get("lr")) for _ in moved]


def as_scheduler(lr: Any) -> LRScheduler | None:
    """Return a torch scheduler, also out of accelerate's wrapper; None if it is not one."""
    while not isinstance(lr, LRScheduler) and hasattr(lr, "scheduler"):
        lr = lr.scheduler
    return lr if isinstance(lr, LRScheduler) else None


def shadow(optimizer: Optimizer) -> Optimizer:
    """Return an optimizer with the settings of each group, and a single number for its weights."""
    groups = []
    for group in optimizer.param_groups:
        settings = {k: v for k, v in group.items() if k not in ("params", "param_names")}
        groups.append(copy.deepcopy(settings) | {"params": [torch.zeros((), requires_grad=True)]})
    return torch.optim.SGD(groups, lr=1.0)


def ahead(copied: Optimizer, optimizer: Optimizer, lr: Any, steps: int) -> Iterator[None]:
    """Yield at each step, with its learning rates in the groups of the shadow, each >= 0.

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
        rates = listed_rates("lr", lr, steps)
    for step in range(steps):
        if scheduler is not None and step:
            _step(scheduler)
        elif scheduler is None and lr is not None:
            for group in copied.param_groups:
                group["lr"] = rates[step]
        for group in copied.param_groups:
            if group.get("lr") is not None:  # else the optimizer makes its own
                _checked(group["lr"], step)
        yield


def listed_rates(name: str, lr: Any, steps: int) -> list[float]:
    """Return the learning rates of the steps, from what the user gave under this name."""
    if not isinstance(lr, Iterable) or isinstance(lr, (str, bytes)):
        raise TypeError(
            f"{name} must be a learning-rate scheduler or the learning rate of each step, got "
            f"{lr!r}"
        )
    rates = [_checked(rate, step) for step, rate in zip(range(steps), lr, strict=False)]
    if len(rates) < steps:
        raise ValueError(f"{len(rates)} learning rates for {steps} steps")
    return rates


def check_owner(scheduler: LRScheduler, optimizer: Optimizer) -> None:
    """Raise unless a scheduler writes the learning rates of this optimizer."""
    if inner(scheduler.optimizer) is not optimizer:
        raise ValueError(
            f"this {type(scheduler).__name__} belongs to another optimizer. Give the scheduler of "
            "this one"
        )


def _copied(scheduler: LRScheduler, optimizer: Optimizer, copied: Optimizer) -> LRScheduler:
    """Return a copy of a scheduler, with the shadow in the place of its optimizer."""
    check_owner(scheduler, optimizer)
    name, theirs = type(scheduler).__name__, scheduler.optimizer
    needed = [
        parameter.name
        for parameter in inspect.signature(scheduler.step).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    if needed:
        raise ValueError(
            f"{name} answers to {', '.join(needed)}, which only the run can give. Give the "
            "learning rates that you expect, one for each step, instead of the scheduler"
        )
    return copy.deepcopy(scheduler, {id(optimizer): copied, id(theirs): copied})


def _step(scheduler: LRScheduler) -> None:
    """Step a copied scheduler, whose optimizer takes no steps."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of step() before optimizer.step()
        scheduler.step()
