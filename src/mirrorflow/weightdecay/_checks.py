"""What is refused or warned of before a schedule takes an optimizer over."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from ..schedule import Constant, Schedule
from ._targets import Target
from .coupling import COUNTED, CoupledDecayWarning
from .feedback import Feedback, OffAtBudget

__all__ = [
    "check_decay",
    "check_exact_off",
    "check_free",
    "check_not_captured",
    "check_schedules",
    "inner",
    "one_of",
    "warn_if_coupled",
]

Groups = Sequence[Mapping[str, Any]]


def inner(optimizer: Any) -> Optimizer:
    """Give the optimizer inside the wrappers of accelerate and Lightning."""
    while isinstance(wrapped := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = wrapped
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
    return optimizer


def one_of(name: str, value: str, known: Iterable[str]) -> None:
    """Raise unless the value is known."""
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")


def check_free(optimizer: Optimizer, kind: type) -> None:
    """Raise if an object of this kind has its hooks in the optimizer already."""
    for hook in optimizer._optimizer_step_pre_hooks.values():
        if isinstance(getattr(inspect.unwrap(hook), "__self__", None), kind):
            raise ValueError(
                f"this {type(optimizer).__name__} has a {kind.__name__} already: close() it first, "
                "or give one scheduler several schedules with groups="
            )


def check_decay(
    optimizer: Optimizer, targets: Sequence[Target], decoupled: bool, relative: bool = False
) -> None:
    """Raise if there is nothing to schedule, and say how to change that."""
    groups = optimizer.param_groups
    if not decoupled and not all("weight_decay" in group for group in groups):
        raise ValueError(
            f"{type(optimizer).__name__} has no weight_decay in its parameter groups: "
            "decoupled=True decays its weights from outside"
        )
    if relative and not any("weight_decay" in group for group in groups):
        raise ValueError(
            f"relative=True multiplies the decay of each group, and {type(optimizer).__name__} has "
            "no weight_decay: with relative=False the schedule gives the decay itself"
        )
    if not any(t.schedule is not None and t.params(groups[t.group]) for t in targets):
        raise ValueError(
            "nothing to schedule: every parameter group has weight_decay 0, the default of "
            "TrainingArguments and of most optimizers, and such groups stay without decay. Make "
            "the optimizer with weight_decay > 0 (TrainingArguments(weight_decay=0.1); for LoRA+ "
            "loraplus_weight_decay=0.1), or name what shall decay: groups=[(0, schedule)]"
        )


def check_exact_off(optimizer: Optimizer, targets: Sequence[Target], kinds: Sequence[str]) -> None:
    """Raise where the decay cannot be taken out of what the optimizer remembers."""
    for target, kind in zip(targets, kinds, strict=True):
        if target.schedule is not None and kind == "averaged":
            raise ValueError(
                "exact_off takes L2 out of the momentum of torch.optim.SGD, and "
                f"{type(optimizer).__name__} moves the weights to copies or averages that it keeps "
                "of them, which have absorbed the decay, too: leave exact_off out"
            )
        if target.schedule is not None and kind in ("coupled", "unknown"):
            raise ValueError(
                f"exact_off takes L2 out of the momentum of torch.optim.SGD, which is linear in "
                f"it. That of {type(optimizer).__name__} is not known to be (Adam's moments are "
                "not), and what it holds of the decay cannot be told from the gradients then. "
                "decoupled=True keeps the decay out of them from the start"
            )


def check_not_captured() -> None:
    """Raise while a CUDA graph records, which would keep the decay of this moment."""
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "optimizer.step() is being captured in a CUDA graph: a replay would repeat the decay "
            "of this moment for ever. Capture forward and backward, and step outside of the graph"
        )


def warn_if_coupled(
    optimizer: Optimizer, targets: Sequence[Target], kinds: Sequence[str], exact_off: bool
) -> None:
    """Warn of a decay that a schedule cannot switch off, or that no ledger can count."""
    name = type(optimizer).__name__
    found = set()
    for target, kind in zip(targets, kinds, strict=True):
        if target.schedule is None or kind not in _ADVICE:
            continue
        if kind == "sgd" and exact_off:
            continue
        momentum = optimizer.param_groups[target.group].get("momentum", 0)
        if kind != "sgd" or (momentum != 0 and not isinstance(target.schedule, Constant)):
            found.add(kind)
    for kind in sorted(found):
        warnings.warn(_ADVICE[kind].format(name=name), CoupledDecayWarning, stacklevel=4)


_ADVICE = {
    "sgd": (
        "{name} with momentum takes weight decay into the gradient: its buffer goes on decaying "
        "after the schedule has reached 0 (`pending` says how much). exact_off=True takes it out "
        "of the buffer then; decoupled=True decays from outside and never puts it there"
    ),
    "coupled": (
        "{name} takes weight decay into the gradient, which it rescales and may remember: a decay "
        "of 0 need not be off, and no sum of lr x decay describes it, so `accumulated` is NaN. "
        "decoupled=True decays from outside and ends exactly"
    ),
    "unknown": (
        "how {name} decays could not be found out, so `accumulated` is NaN: say it with "
        'coupling="decoupled", "fixed", "scaled", "averaged" or "coupled", or use decoupled=True'
    ),
}


# What a scheduler looks for in its schedules, and what it tells those that answer to it.


def check_schedules(optimizer: Optimizer, targets: Sequence[Target], kinds: Sequence[str]) -> None:
    """Raise or warn where a schedule cannot do what it was made for.

    Raises
    ------
    ValueError
        If a budget is to be kept of which no account exists.
    """
    for target, kind in zip(targets, kinds, strict=True):
        if isinstance(target.schedule, OffAtBudget) and kind not in COUNTED:
            raise ValueError(
                f"OffAtBudget counts lr x decay, and no such sum describes the decay of "
                f"{type(optimizer).__name__}, which is {kind}: {_INSTEAD.get(kind, _OUTSIDE)}"
            )
    for schedule in {id(t.schedule): t.schedule for t in targets}.values():
        points = schedule.breakpoints if isinstance(schedule, Schedule) else ()
        if points and points[-1] < 1:
            warnings.warn(
                f"{schedule!r} is over before the first step has ended: its clock is the number of "
                "the optimizer's steps, not a fraction of the run. Multiply its times by the "
                "number of steps, as in SwitchOff(0.1, at=0.6 * total)",
                stacklevel=4,
            )
        if isinstance(schedule, Feedback) and schedule.log:
            last = schedule.log[-1]
            warnings.warn(
                f"this {type(schedule).__name__} has decided before, at step {last['step']} the "
                f"last time ({last['reason']}), and goes on from there with a rate of "
                f"{schedule.current:g}: for a new run make a new one",
                stacklevel=4,
            )


_OUTSIDE = "decoupled=True decays from outside, and is counted"
_INSTEAD = {
    "scaled": f'convention="fixed", {_OUTSIDE}',
    "averaged": "SwitchOff(rate, at=...) is off at a step, OffWhenLevel by a measurement",
}
